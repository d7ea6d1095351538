"""How fast one update is, against what this machine's matrix products allow. One run, one table.

    python benchmark/speed.py                 # paper settings: obs 29, act 8, batch 256, 4 x 512

For GSFlow and for its FQL flags: milliseconds per update inside one dispatch, the floating-point
operations counted from the layer sizes (dense layers, forward 2 m n per row, backward twice that),
the rate that makes, and its share of the rate of a bare float32 product (batch, 512) x (512, 512)
measured in the same run. `--num-seeds` adds rows for several vmapped seeds.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "gsflow.py"


@dataclasses.dataclass(frozen=True)
class Args:
    obs_dim: int = 29  # observation size (antmaze: 29)
    act_dim: int = 8  # action size (antmaze: 8)
    num_rows: int = 100_000  # rows of the random dataset
    updates: int = 10  # updates per timed dispatch (GPU: use 500)
    repeats: int = 5  # timed dispatches; the fastest counts
    num_seeds: tuple[int, ...] = (1,)  # vmapped seeds, one row each


def load_gsflow():
    spec = importlib.util.spec_from_file_location("gsflow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gsflow"] = module
    spec.loader.exec_module(module)
    return module


def fastest(fn, repeats):
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(batch, width, repeats):
    """FLOP/s of (batch, width) x (width, width) products in float32, hundreds in one dispatch."""
    x = jax.random.normal(jax.random.key(0), (batch, width))
    w = jax.random.normal(jax.random.key(1), (width, width)) / width**0.5
    products = 300
    program = jax.jit(lambda x, w: jax.lax.fori_loop(0, products, lambda i, x: x @ w, x))
    return products * 2 * batch * width * width / fastest(lambda: program(x, w), repeats)


def count_flops(params, args, batch):
    """FLOPs of one update, from the kernels' sizes; the logging-free count of the method's cost."""

    def per_row(group):
        kernels = [x for x in jax.tree.leaves(params.get(group, {})) if x.ndim >= 2]
        return sum(2 * x.size for x in kernels if x.shape[-1] * x.shape[-2] > x.shape[0])

    velocity, critic, student = (per_row(g) for g in ("velocity", "critic", "student"))
    extra = 4 * (per_row("encoder") + per_row("decoder"))
    candidates = args.num_candidates if args.prior == "cvae" else 0
    rows = args.flow_steps * (candidates + 1) * velocity + candidates * critic
    return batch * (rows + 3 * velocity + 4 * student + 6 * critic + extra)


def measure(gsflow, flags, seeds, bench):
    """(milliseconds per update of all seeds, FLOPs of one seed's update)."""
    args = gsflow.Args(env_id="antmaze-large", num_seeds=seeds, **flags)
    args = gsflow.resolve(args, gsflow.parse_task(args.env_id))
    args = gsflow.fill(args, target_entropy=-0.5 * bench.act_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    obs_shape = (bench.num_rows, bench.obs_dim)
    data = dict(
        obs=jax.random.normal(keys[0], obs_shape),
        next_obs=jax.random.normal(keys[1], obs_shape),
        actions=jax.random.uniform(keys[2], (bench.num_rows, bench.act_dim), minval=-1),
        returns=jax.random.normal(keys[3], (bench.num_rows,)),
        discounts=jnp.full(bench.num_rows, 0.99),
    )
    nets = gsflow.make_networks(args, bench.act_dim)
    mean, std = jnp.zeros(bench.obs_dim), jnp.ones(bench.obs_dim)
    state = gsflow.start_states(args, bench.obs_dim, bench.act_dim, mean, std)
    settings = gsflow.PhaseSettings(jnp.float32(args.alpha), jnp.float32(0))

    def step(carry, data, settings):
        return gsflow.sample_and_update(carry, data, settings, nets, args)[0]

    program = gsflow.Program(step, data, settings)
    carry = {"state": state}

    def dispatch():
        nonlocal carry
        carry = program(carry, bench.updates)
        return carry

    seconds = fastest(dispatch, bench.repeats) / bench.updates
    params = jax.tree.map(lambda x: x[0], carry["state"].params)
    return 1e3 * seconds, count_flops(params, args, args.batch_size)


def main(bench):
    gsflow = load_gsflow()
    rate = matmul_rate(256, 512, bench.repeats)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"float32 product (256, 512) x (512, 512): {rate / 1e9:,.0f} GFLOP/s\n")
    print("| method | seeds | ms / update | updates/s | GFLOP | GFLOP/s | share of product rate |")
    print("|---|---|---|---|---|---|---|")
    for name, flags in (("GSFlow", {}), ("FQL", dict(prior="gaussian", student="deterministic"))):
        for seeds in bench.num_seeds:
            ms, flops = measure(gsflow, flags, seeds, bench)
            achieved = seeds * flops / ms * 1e3
            print(
                f"| {name} | {seeds} | {ms:.1f} | {1e3 / ms:.1f} | {seeds * flops / 1e9:.1f} | "
                f"{achieved / 1e9:,.0f} | {achieved / rate:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
