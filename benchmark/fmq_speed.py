"""FMQ at the paper's sizes: the best-of-32 bootstrap, latency per decision, updates per second.

    python benchmark/fmq_speed.py                        # observation 46, 5 x 5 actions, 4 x 512
    python benchmark/fmq_speed.py --updates 500 --num-seeds 1 8          # on a GPU

One run prints three tables. Bootstrap: TD target and critic gradient of one batch as fmq.py does
them, against the same numbers obtained without its savings. Latency: one decision for one
observation. Updates: many per dispatch with batches drawn on the device, against one dispatch per
update with batches that NumPy gathers.
"""

import dataclasses
import functools
import importlib.util
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "fmq.py"


@dataclasses.dataclass(frozen=True)
class Args:
    obs_dim: int = 46  # observation size (cube-triple: 46)
    act_dim: int = 5  # action size (cube-triple: 5)
    num_rows: int = 100_000  # rows of the random dataset
    updates: int = 4  # updates per timed dispatch (GPU: use 500)
    repeats: int = 3  # timed calls; the fastest counts
    decisions: int = 100  # timed decisions per way of acting; their median counts
    num_seeds: tuple[int, ...] = (1,)  # vmapped seeds, rows of their own


def load_script():
    spec = importlib.util.spec_from_file_location("fmq", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fmq"] = module
    spec.loader.exec_module(module)
    return module


def times(fn, repeats):
    """Seconds of several calls, after one that compiles."""
    jax.block_until_ready(fn())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - start)
    return seconds


def setup(fmq, bench, seeds=1, **flags):
    """(arguments, networks, states of all seeds) at the paper's settings."""
    args = fmq.Args(env_id="cube-triple", num_seeds=seeds, **flags)
    args = fmq.resolve(args, fmq.parse_task(args.env_id))
    mean, std = jnp.zeros(bench.obs_dim), jnp.ones(bench.obs_dim)
    state = fmq.start_states(args, bench.obs_dim, bench.act_dim, mean, std)
    return args, fmq.make_networks(args, bench.act_dim), state


def random_data(bench):
    rng = np.random.default_rng(0)
    data = {k: rng.normal(size=(bench.num_rows, bench.obs_dim)) for k in ("obs", "next_obs")}
    data |= dict(actions=rng.uniform(-1, 1, (bench.num_rows, bench.act_dim)))
    data |= dict(rewards=rng.normal(size=bench.num_rows), masks=np.ones(bench.num_rows))
    data |= dict(terminals=np.arange(bench.num_rows) % 1000 == 999)
    return {k: v.astype(np.float32) for k, v in data.items()}


# ---- the bootstrap ----
def with_gradient(fmq, nets, state, batch, y):
    """(y, gradient of the critic's loss against it)."""
    loss = lambda critic: fmq.critic_loss({"critic": critic}, nets, batch, y)[0]
    return y, jax.grad(loss)(state.params["critic"])


def script(fmq, nets, args, state, batch, noise):
    """As fmq.py: forward only, first layers split, target critic on the winners alone; on a CPU one
    candidate after another."""
    y = fmq.td_target(state, nets, args, batch, noise)
    return with_gradient(fmq, nets, state, batch, y)


def repeated(fmq, nets, args, state, batch, noise):
    """Every candidate is a row with its own copy of observation and times; both critics judge all
    candidates; the target is computed inside the differentiated loss."""
    size, n, dim = noise.shape
    rows, params = size * n, state.params

    def loss(critic):
        obs = jnp.repeat(batch["next_obs"], n, axis=0)
        x, zero, one = noise.reshape(rows, dim), jnp.zeros((rows, 1)), jnp.ones((rows, 1))
        chunks = jnp.clip(x + nets.actor(params["actor"], obs, x, zero, one), -1, 1)
        score = nets.critic(critic, obs, chunks).mean(axis=0).reshape(size, n)
        value = nets.critic(state.target_critic, obs, chunks).mean(axis=0).reshape(size, n)
        best = score.argmax(axis=1)[:, None]
        q = jnp.take_along_axis(value, best, axis=1)[:, 0]
        y = jax.lax.stop_gradient(batch["returns"] + batch["discounts"] * q)
        return fmq.critic_loss({"critic": critic}, nets, batch, y)[0], y

    grads, y = jax.grad(loss, has_aux=True)(params["critic"])
    return y, grads


def at_once(fmq, nets, args, state, batch, noise):
    """All candidates in one call of the actor and one of the critics, on every device."""
    obs, params = batch["next_obs"], state.params
    chunks = fmq.sample_chunk(params, nets, args, obs[:, None], noise)
    score = nets.critic(params["critic"], obs[:, None], chunks).mean(axis=0)
    chunk = jnp.take_along_axis(chunks, score.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    q = nets.critic(state.target_critic, obs, chunk).mean(axis=0)
    return with_gradient(fmq, nets, state, batch, batch["returns"] + batch["discounts"] * q)


def bootstrap_table(fmq, bench):
    args, nets, state = setup(fmq, bench)
    other = fmq.start_states(dataclasses.replace(args, seed=1), bench.obs_dim, bench.act_dim, 0, 1)
    state = jax.tree.map(lambda x: x[0], state.replace(target_critic=other.target_critic))
    data = fmq.place(random_data(bench), 1)
    key, noise_key = jax.random.split(jax.random.key(0))
    batch = fmq.sample_chunks(key, data, None, args.batch_size, args.horizon, args.gamma)
    shape = (args.batch_size, args.num_samples, args.horizon * bench.act_dim)
    inputs = (state, batch, jax.random.normal(noise_key, shape))
    print("| TD target and critic gradient | ms | ratio | peak MiB | ratio | largest difference |")
    print("|---|---|---|---|---|---|")
    first = None
    for version in (script, at_once, repeated):
        step = jax.jit(lambda *x, version=version: version(fmq, nets, args, *x))
        program = step.lower(*inputs).compile()
        ms = 1e3 * min(times(lambda p=program: p(*inputs), bench.repeats))
        mib = program.memory_analysis().temp_size_in_bytes / 2**20
        result = jax.device_get(program(*inputs))
        first = first or (ms, mib, result)
        errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), result, first[2])
        print(
            f"| {version.__name__.replace('_', ' ')} | {ms:.1f} | {ms / first[0]:.2f} | {mib:.1f} "
            f"| {mib / first[1]:.2f} | {max(jax.tree.leaves(errors)):.1e} |",
            flush=True,
        )


# ---- decisions and updates ----
def latency_table(fmq, bench):
    print("\n| one decision | ms | ratio to one-step |\n|---|---|---|")
    first = None
    ways = [("one-step", {}), ("best-of-n", {}), ("qgbs", {}), ("best-of-n", dict(actor="flow"))]
    for mode, flags in ways:
        args, nets, state = setup(fmq, bench, **flags)
        state = jax.tree.map(lambda x: x[0], state)
        decide = jax.jit(functools.partial(fmq.make_policy(nets, args), mode=mode))
        inputs = (state, jnp.ones(bench.obs_dim), jax.random.key(0))
        ms = 1e3 * float(np.median(times(lambda d=decide, i=inputs: d(*i), bench.decisions)))
        first = first or ms
        name = "QC, best of 32, 10 steps" if flags else mode.replace("-n", "-32")
        print(f"| {name} | {ms:.2f} | {ms / first:.1f} |", flush=True)


def device_rate(fmq, bench, objective, args, nets, state, data):
    """Updates per second with many in one dispatch and batches drawn on the device."""

    learn = fmq.make_learn(nets, args, objective)
    program, carry = fmq.Program(learn, data), {"state": state}
    carry["sums"] = fmq.zero_sums(learn, carry, data)

    def dispatch():
        nonlocal carry
        carry = program(carry, bench.updates)
        return carry

    return bench.updates / min(times(dispatch, bench.repeats))


def host_rate(fmq, bench, objective, args, nets, state, data):
    """Updates per second with one dispatch each and batches that NumPy gathers."""
    rng, window = np.random.default_rng(0), np.arange(args.horizon)
    weights = np.float32(args.gamma) ** window
    keys = jax.random.split(jax.random.key(0), args.num_seeds)
    step = jax.jit(jax.vmap(fmq.make_update(nets, args, objective)), donate_argnums=0)

    def gather():
        size = (args.num_seeds, args.batch_size)
        index = rng.integers(0, bench.num_rows - args.horizon, size)[..., None] + window
        rows = {k: v[index] for k, v in data.items()}
        ended = np.cumsum(rows["terminals"], axis=-1) - rows["terminals"]
        return dict(
            obs=rows["obs"][..., 0, :],
            actions=rows["actions"].reshape(*size, -1),
            returns=(rows["rewards"] * weights).sum(-1),
            discounts=np.float32(args.gamma**args.horizon) * rows["masks"].min(-1),
            next_obs=rows["next_obs"][..., -1, :],
            valid=(ended == 0).astype(np.float32),
        )

    def loop():
        nonlocal state
        for _ in range(bench.updates):
            state, _ = step(state, gather(), keys)
        return state

    return bench.updates / min(times(loop, bench.repeats))


def update_table(fmq, bench):
    print("\n| updates/s of each seed | seeds | many per dispatch | one per dispatch | ratio |")
    print("|---|---|---|---|---|")
    data = random_data(bench)
    cases = (("FMQ, offline", "offline", {}), ("FMQ, online", "fmq", {}))
    cases += (("QC, offline", "offline", dict(actor="flow")),)
    for name, objective, flags in cases:
        for seeds in bench.num_seeds:
            fixed = (fmq, bench, objective, *setup(fmq, bench, seeds, **flags))
            many = device_rate(*fixed, fmq.place(data, seeds, copy=True))
            fixed = (fmq, bench, objective, *setup(fmq, bench, seeds, **flags))  # state was donated
            one = host_rate(*fixed, data)
            print(f"| {name} | {seeds} | {many:.2f} | {one:.2f} | {many / one:.2f} |", flush=True)


def main(bench):
    fmq = load_script()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    bootstrap_table(fmq, bench)
    latency_table(fmq, bench)
    update_table(fmq, bench)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
