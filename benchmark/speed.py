"""How fast updates, actions and environments are on this machine. One run, one table.

    python benchmark/speed.py                          # every method at its paper's settings
    python benchmark/speed.py --num-seeds 1 2 4 8      # and how it scales over vmapped seeds
    python benchmark/speed.py --quick                  # tiny networks: does it run? (tests)

Rows "update": milliseconds per update of all seeds inside one dispatch, data sampled on the device.
  x one at a time   the same update of one seed, dispatched by itself on a batch that NumPy gathers,
                    takes so many times as long (per seed)
  of product rate   floating-point operations, counted from the layer sizes (dense layers: 2 m n per
                    row forward, twice that backward), per second, as a share of what a bare float32
                    product (256, 512) x (512, 512) reaches in the same run
  peak MiB          of a GPU's memory, the most that this process has taken up to then
Rows "action": one decision for one observation, from the call to the array on the host.
Rows "steps": environment steps, of the JAX point maze (vmapped) and of OGBench's own (one process).
"""

import dataclasses
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ALGOS = Path(__file__).resolve().parent.parent / "algos"


@dataclasses.dataclass(frozen=True)
class Args:
    methods: tuple[str, ...] = ()  # rows of these methods only (default: all whose script is here)
    num_seeds: tuple[int, ...] = (1,)  # vmapped seeds, one row each
    num_rows: int = 100_000  # rows of the random dataset
    seconds: float = 2.0  # about how long one timed dispatch lasts
    repeats: int = 5  # timed dispatches; the fastest counts
    num_envs: int = 1_000  # JAX environments, vmapped
    env_steps: int = 200  # steps of each environment
    parts: tuple[Literal["update", "action", "env"], ...] = ("update", "action", "env")
    """which rows"""
    matmul_precision: str = "default"
    """JAX's name of a precision of float32 products: highest, BF16_BF16_F32, ..."""
    quick: bool = False  # tiny networks and short timings: a check that all of it runs


class Case(NamedTuple):
    """What is measured of one method; the only part that knows its script."""

    script: Any  # the module
    args: Any  # resolved arguments
    sizes: tuple  # observation and action size
    data: dict  # random dataset on the device
    step: Callable  # (carry, data) -> carry: sample and update, one seed
    update: Callable  # (state, batches, key) -> state: the same on given batches
    gather: Callable  # (rows: NumPy arrays, indices) -> one batch, on the host
    policies: dict  # mode of acting -> function (state, obs (D,), key) -> action(s)
    flops: Callable  # (params, online=False) -> operations of one update in that phase
    updates: int = 1  # updates in one step
    batches: int = 1  # batches in one step


# ---- the methods ----
def load_script(name):
    """Import algos/NAME.py, once."""
    module = f"cleanflow_{name}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, ALGOS / f"{name}.py")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def resolve(script, flags, **defaults):
    """Arguments as the script's `main` resolves them, from keyword flags; resolved ones stay."""
    if not isinstance(flags, dict):
        return flags
    found, train = [], script.train
    script.train = lambda args, task: found.append(args)
    try:
        script.main(script.Args(**defaults | flags))
    finally:
        script.train = train
    return found[0]


def kernel_flops(params, *names):
    """2 m n per row for each dense kernel below entries whose name starts with one of `names`."""
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [entry.key for entry in path]
        if keys[-1] == "kernel" and any(k.startswith(n) for k in keys for n in names):
            total += 2 * leaf.size  # ensemble members included
    return total


def random_rows(num_rows, obs_dim, act_dim):
    """A dataset in the raw format of `load_dataset`: episodes of 1,000 rows, no goal reached."""
    rng, shape = np.random.default_rng(0), (num_rows, obs_dim)
    rows = np.arange(num_rows)
    return dict(
        observations=rng.normal(size=shape).astype(np.float32),
        next_observations=rng.normal(size=shape).astype(np.float32),
        actions=rng.uniform(-1, 1, (num_rows, act_dim)).astype(np.float32),
        rewards=-np.ones(num_rows, np.float32),
        masks=np.ones(num_rows, np.float32),
        terminals=((rows % 1_000 == 999) | (rows == num_rows - 1)).astype(np.float32),
    )


def gather_rows(rows, index):
    """Batch of single rows."""
    return {k: v[index] for k, v in rows.items()}


def gather_windows(rows, index, horizon, gamma):
    """Batch of windows of `horizon` rows: what `sample_chunks` returns, by NumPy."""
    index = np.minimum(index, len(rows["rewards"]) - horizon)[:, None] + np.arange(horizon)
    terminals = rows["terminals"][index]
    return dict(
        obs=rows["obs"][index[:, 0]],
        actions=rows["actions"][index].reshape(len(index), -1),
        returns=(gamma ** np.arange(horizon) * rows["rewards"][index]).sum(1).astype(np.float32),
        discounts=np.float32(gamma**horizon) * rows["masks"][index].min(1),
        next_obs=rows["next_obs"][index[:, -1]],
        valid=(np.cumsum(terminals, 1) - terminals == 0).astype(np.float32),
    )


def gsflow_case(flags, num_rows):
    """GSFlow, or FQL by flags, on antmaze-large."""
    script, sizes = load_script("gsflow"), (29, 8)
    args = resolve(script, flags, env_id="antmaze-large")
    nets, settings = script.make_networks(args, sizes[1]), script.phase_settings(args, "offline")
    learn, update = script.make_learn(nets, args), script.make_update(nets, args)

    def flops(params, online=False):
        names = ("velocity", "critic", "student", "encoder", "decoder")
        velocity, critic, student, encoder, decoder = (kernel_flops(params, n) for n in names)
        candidates = args.num_candidates if args.prior == "cvae" else 0
        teacher = args.flow_steps * (candidates + 1) * velocity + candidates * critic
        losses = 3 * velocity + 4 * student + 6 * critic + 4 * (encoder + decoder)
        return args.batch_size * (teacher + losses)

    return Case(
        script, args, sizes,
        data=script.device_data(random_rows(num_rows, *sizes), args.n_step, args.gamma),
        step=lambda carry, data: {"state": learn(carry | {"sums": {}}, data, settings)["state"]},
        update=lambda state, b, key: update(state, b[0], key, settings)[0],
        gather=gather_rows,
        policies=script.evaluation_policies(nets, args),
        flops=flops,
    )  # fmt: skip


def flowq_case(flags, num_rows):
    """FlowQ on antmaze-large."""
    script, sizes = load_script("flowq"), (29, 8)
    args = resolve(script, flags, env_id="antmaze-large")
    task = script.parse_task(args.env_id)
    nets = script.make_networks(args, sizes[1], task)
    settings = script.Settings(jnp.float32(args.guidance_lambda))
    learn, update = script.make_learn(nets, args), script.make_update(nets, args)

    def flops(params, online=False):
        velocity, critic = kernel_flops(params, "velocity"), kernel_flops(params, "critic")
        target = args.flow_steps * velocity + critic if args.critic == "td" else 0
        guidance = 3 * critic  # slope: forward and back to the action; scale: forward
        return args.batch_size * (target + guidance + 3 * velocity + 3 * critic)

    return Case(
        script, args, sizes,
        data=script.prepare(random_rows(num_rows, *sizes), args, task),
        step=lambda carry, data: {"state": learn(carry | {"sums": {}}, data, settings)["state"]},
        update=lambda state, b, key: update(state, b[0], key, settings)[0],
        gather=gather_rows,
        policies=script.evaluation_policies(nets, args),
        flops=flops,
    )  # fmt: skip


def fmq_case(flags, num_rows, objective="offline"):
    """FMQ, or Q-chunking by flags, on cube-triple; chunks of 5 actions."""
    script, sizes = load_script("fmq"), (46, 5)
    args = resolve(script, flags, env_id="cube-triple-task4")
    nets = script.make_networks(args, sizes[1])
    learn = script.make_learn(nets, args, objective)
    update = script.make_update(nets, args, objective)

    def flops(params, online=False):
        actor, critic = kernel_flops(params, "actor"), kernel_flops(params, "critic")
        # of a candidate, the first layer sees the chunk alone: state and times are done once
        width, chunk = args.hidden_dims[0], args.horizon * sizes[1]
        kernel = params["actor"]["params"]["MLP_0"]["FirstDense_0"]["kernel"]
        once_actor = 2 * width * (kernel.shape[0] - chunk)
        once_critic = 2 * width * sizes[0] * args.num_critics
        jumps = 1 if args.actor == "flowmap" else args.flow_steps
        candidates = args.num_samples * (jumps * (actor - once_actor) + critic - once_critic)
        shared = jumps * 2 * width * sizes[0] + once_critic
        imitation = 3 * actor if args.actor == "flow" else 7 * actor  # diagonal 3, Eulerian 4
        offline = objective == "offline" and not online
        learning = imitation if offline else 4 * actor + 2 * critic
        return args.batch_size * (candidates + shared + 4 * critic + learning)

    return Case(
        script, args, sizes,
        data=script.device_rows(random_rows(num_rows, *sizes)),
        step=lambda carry, data: {"state": learn(carry | {"sums": {}}, data)["state"]},
        update=lambda state, b, key: update(state, b[0], key)[0],
        gather=lambda rows, index: gather_windows(rows, index, args.horizon, args.gamma),
        policies=script.evaluation_policies(nets, args) if objective == "offline" else {},
        flops=flops,
    )  # fmt: skip


def sac_flow_case(flags, num_rows):
    """SAC Flow: from scratch on Hopper, or offline-to-online on cube-triple."""
    script = load_script("sac_flow")
    args = resolve(script, flags, action_scale=1.0)
    args = dataclasses.replace(args, action_scale=args.action_scale or 1.0)
    scratch = args.mode == "online"
    sizes = (11, 3) if scratch else (46, 5)
    args = script.fit_to_sizes(args, *sizes)
    nets, beta = script.make_networks(args, sizes[1]), jnp.float32(args.beta or 0)
    kinds = (False,) if scratch else (True, False)  # flow matching, then RL
    updates = [script.make_update(nets, args, clone=kind) for kind in kinds]
    learn = script.make_learn(nets, args, *updates)

    def flops(params, online=False):
        actor, critic = params["actor"], kernel_flops(params, "critic")
        context = kernel_flops(actor, "noise", "memory", "cross_")  # once per rollout
        time = kernel_flops(actor, "time")  # of one row, except in flow matching
        velocity = kernel_flops(actor, "") - context - time
        rollout = context + args.flow_steps * velocity
        if scratch:  # one pass of the critics over both pairs; an actor step every policy_delay
            per_row = rollout + 6 * critic + (3 * rollout + 2 * critic) / args.policy_delay
        else:  # a critic step with the actor's; offline, before it one with flow matching
            per_row = rollout + 4 * critic + 3 * rollout + 2 * critic
            per_row += 0 if online else rollout + 4 * critic + 3 * (context + velocity + time)
        return args.batch_size * per_row

    def update(state, batches, key):
        for one in updates:
            state, _ = one(state, batches, key, beta)
        return state

    return Case(
        script, args, sizes,
        data=script.device_rows(random_rows(num_rows, *sizes)),
        step=lambda carry, data: {"state": learn(carry | {"sums": {}}, data, beta)["state"]},
        update=update,
        gather=lambda rows, index: gather_windows(rows, index, args.horizon_length, args.gamma),
        policies=script.evaluation_policies(nets, args),
        flops=flops, updates=args.policy_delay, batches=args.policy_delay,
    )  # fmt: skip


FQL = dict(prior="gaussian", student="deterministic")
HOPPER, CUBES = dict(env_id="Hopper-v5"), dict(env_id="cube-triple-task4")
METHODS = {  # name: (script, function (flags, num_rows) -> Case, flags)
    "GSFlow": ("gsflow", gsflow_case, {}),
    "FQL": ("gsflow", gsflow_case, FQL),
    "FlowQ": ("flowq", flowq_case, {}),
    "FMQ offline": ("fmq", fmq_case, {}),
    "FMQ online": ("fmq", functools.partial(fmq_case, objective="fmq"), {}),
    "QC": ("fmq", fmq_case, dict(actor="flow", eval_modes=("best-of-n",))),
    "SAC Flow-G Hopper": ("sac_flow", sac_flow_case, HOPPER | dict(policy="flow-g")),
    "SAC Flow-T Hopper": ("sac_flow", sac_flow_case, HOPPER | dict(policy="flow-t")),
    "SAC Flow-T cubes": ("sac_flow", sac_flow_case, CUBES | dict(policy="flow-t")),
}
QUICK = {  # flags that make a script's networks tiny
    "gsflow": dict(hidden_dims=(16, 16), prior_hidden_dims=(16,), batch_size=16),
    "flowq": dict(hidden_dims=(16, 16), batch_size=16),
    "fmq": dict(hidden_dims=(16, 16), batch_size=16, num_samples=4),
    "sac_flow": dict(hidden_dim=16, d_model=16, critic_hidden_dims=(16, 16), batch_size=16),
}


def run_flops(stem, args):
    """Operations of a whole run of the script with these resolved arguments, evaluation left out;
    observations and actions have the sizes of the method's usual task."""
    make_case = next(make for script, make, _ in METHODS.values() if script == stem)
    case = make_case(args, 2_000)
    params = jax.eval_shape(lambda: start_carry(case)["state"].params)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    online = getattr(args, "online_steps", 0) * getattr(args, "utd", 1)
    work = args.offline_steps * case.flops(params) if args.offline_steps else 0
    return args.num_seeds * (work + online * case.flops(params, online=True))


PAPER_SIZES = dict(hidden_dims=(512,) * 4, gamma=0.99, online_steps=1_000_000)
ONLINE = {  # dispatches that act, step a JAX environment and store as well: (script, flags)
    "GSFlow online, maze": (
        "gsflow", PAPER_SIZES | dict(env_id="pointmaze-medium", n_step=1, num_candidates=10)
    ),
    "FMQ online, maze": (
        "fmq", PAPER_SIZES | dict(env_id="pointmaze-medium", num_samples=32)
    ),
    "SAC Flow online, pendulum": ("sac_flow", dict(env_id="phys2d/Pendulum-v0")),
}  # fmt: skip


def script_of(name):
    return (METHODS.get(name) or ONLINE[name])[0]


def known_methods():
    return [name for name, (script, *_) in METHODS.items() if (ALGOS / f"{script}.py").is_file()]


def known_dispatches():
    return [n for n in (*METHODS, *ONLINE) if (ALGOS / f"{script_of(n)}.py").is_file()]


def dispatch(name, tiny=False, **flags):
    """One of `known_dispatches` -> (the script's Program, shapes of its carry, updates in one of
    its iterations); nothing is run."""
    script = script_of(name)
    flags |= QUICK[script] if tiny else {}
    if name in METHODS:
        case = METHODS[name][1](METHODS[name][2] | flags, 2_000)
        carry = jax.eval_shape(lambda: start_carry(case))
        return case.script.Program(case.step, case.data), carry, case.updates
    script, own = load_script(script), ONLINE[name][1]
    sizes, found = script.PointMaze("medium").observation_space.shape[0], []
    patches = dict(  # up to where the training loop would begin
        load_dataset=lambda task, args: (random_rows(2_000, sizes, 2), "random"),
        Run=mock.MagicMock(),
        train_loop=lambda run, carry, phases, *rest: found.append((carry, phases)),
    )
    with mock.patch.multiple(script, **patches):
        script.main(script.Args(**own | flags))
    (carry, phases), args = found[0], resolve(script, own | flags)
    for phase in phases:
        carry = jax.eval_shape(phase.enter, carry)
    return phases[-1].advance, carry, phases[-1].stride * args.utd


# ---- timing ----
def fastest(fn, repeats):
    """Seconds of the fastest of several calls, after one that compiles."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def per_call(fn, bench):
    """Seconds per repetition of `fn(n)`, with n such that a call lasts about `bench.seconds`."""
    n = 1
    while (once := fastest(functools.partial(fn, n), 1)) < bench.seconds / 8:
        n *= 4
    n = max(1, round(n * bench.seconds / once))
    return fastest(functools.partial(fn, n), bench.repeats) / n


def matmul_rate(bench, batch=256, width=512):
    """FLOP/s of (batch, width) x (width, width) products in float32, many in one dispatch."""
    x = jax.random.normal(jax.random.key(0), (batch, width))
    w = jax.random.normal(jax.random.key(1), (width, width)) / width**0.5
    program = jax.jit(lambda x, w, n: jax.lax.fori_loop(0, n, lambda i, x: x @ w, x))
    return 2 * batch * width**2 / per_call(lambda n: program(x, w, n), bench)


def start_carry(case):
    obs_dim, act_dim = case.sizes
    mean, std = jnp.zeros(obs_dim), jnp.ones(obs_dim)
    return {"state": case.script.start_states(case.args, obs_dim, act_dim, mean, std)}


def time_dispatched(case, bench):
    """Seconds per update of all seeds, many updates in one dispatch."""
    program, carry = case.script.Program(case.step, case.data), start_carry(case)

    def dispatch(n):
        nonlocal carry
        carry = program(carry, n)
        return carry

    return per_call(dispatch, bench) / case.updates


def time_one_at_a_time(case, bench):
    """Seconds per update of one seed: NumPy gathers a batch, one dispatch updates on it."""
    state = jax.tree.map(lambda x: x[0], start_carry(case)["state"])
    rows, rng = jax.device_get(case.data), np.random.default_rng(0)
    size, key = len(rows["obs"]), jax.random.key(0)
    update = jax.jit(case.update, donate_argnums=0)
    state, step = jax.tree.map(jnp.copy, state), 0

    def updates(n):
        nonlocal state, step
        for _ in range(n):
            indices = rng.integers(size, size=(case.batches, case.args.batch_size))
            batches = [case.gather(rows, index) for index in indices]
            state, step = update(state, batches, jax.random.fold_in(key, step)), step + 1
        return state

    return per_call(updates, bench) / case.updates


def time_action(case, policy, bench):
    """Seconds from an observation on the host to its action(s) on the host."""
    state = jax.tree.map(lambda x: x[0], start_carry(case)["state"])
    act, key = jax.jit(policy), jax.random.key(0)
    obs = np.zeros(case.sizes[0], np.float32)

    def decide(n):
        for _ in range(n):
            np.asarray(act(state, obs, key))

    return per_call(decide, dataclasses.replace(bench, seconds=bench.seconds / 4))


def time_jax_env(bench):
    """Seconds per step of one of many vmapped point mazes, random actions."""
    script = load_script("gsflow")
    env, n = script.PointMaze("medium", 1), bench.num_envs

    def step(i, env_state):
        action_key, env_key = jax.random.split(jax.random.key(i))
        actions = jax.random.uniform(action_key, (n, 2), minval=-1.0)
        return script.step_envs(env, env_state, actions, env_key)[0]

    steps = jax.jit(lambda s: jax.lax.fori_loop(0, bench.env_steps, step, s))
    env_state = jax.jit(lambda: script.reset_envs(env, jax.random.key(0), n))()
    return fastest(lambda: steps(env_state), bench.repeats) / (n * bench.env_steps)


def time_host_env(bench):
    """Seconds per step of OGBench's own point maze in this process, random actions."""
    script = load_script("gsflow")
    env = script.make_host_env(script.parse_task("pointmaze-medium"), "post")
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (bench.env_steps, 2)).astype(np.float32)

    def steps():
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    seconds = fastest(steps, bench.repeats) / bench.env_steps
    env.close()
    return seconds


# ---- the table ----
COLUMNS = ("what", "seeds or envs", "ms each", "per second", "x one at a time")
COLUMNS += ("GFLOP each", "GFLOP/s", "of product rate", "peak MiB")


def row(what, count, seconds, ratio="", gflop="", rate="", share="", peak=""):
    """One line; `seconds` per update of all seeds, per action, or per step of one environment."""
    per_second = f"{1 / seconds:,.0f}" if seconds < 0.01 else f"{1 / seconds:.3g}"
    cells = (what, count, f"{1e3 * seconds:.3g}", per_second, ratio, gflop, rate, share, peak)
    return "| " + " | ".join(map(str, cells)) + " |"


def peak_memory():
    """MiB that this process has taken of a GPU at most; on a CPU nobody counts them."""
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats['peak_bytes_in_use'] / 2**20:,.0f}" if "peak_bytes_in_use" in stats else ""


def measure(name, bench, product_rate):
    """Lines of one method."""
    script, make_case, flags = METHODS[name]
    flags = flags | (QUICK[script] if bench.quick else {})
    alone = None
    for seeds in bench.num_seeds if "update" in bench.parts else ():
        case = make_case(flags | dict(num_seeds=seeds), bench.num_rows)
        alone = time_one_at_a_time(case, bench) if alone is None else alone
        params = jax.tree.map(lambda x: x[0], start_carry(case)["state"].params)
        seconds, work = time_dispatched(case, bench), seeds * case.flops(params)
        yield row(
            f"{name} update", seeds, seconds, f"{alone * seeds / seconds:.2f}", f"{work / 1e9:.3g}",
            f"{work / seconds / 1e9:,.0f}", f"{work / seconds / product_rate:.0%}", peak_memory(),
        )  # fmt: skip
    if "action" not in bench.parts:
        return
    case = make_case(flags | dict(num_seeds=1), bench.num_rows)
    for mode, policy in case.policies.items():
        yield row(f"{name} action {mode}".strip(), 1, time_action(case, policy, bench))


def main(bench):
    if bench.quick:
        bench = dataclasses.replace(
            bench, num_rows=2_000, seconds=0.01, repeats=1, num_envs=10, env_steps=20
        )
    known = known_methods()
    if unknown := set(bench.methods) - set(known):
        print(f"error: no method {', '.join(unknown)}; there are: {', '.join(known)}")
        return 2
    if bench.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", bench.matmul_precision)
    rate = matmul_rate(bench)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"float32 product (256, 512) x (512, 512): {rate / 1e9:,.0f} GFLOP/s")
    print("tiny networks: these numbers mean nothing\n" if bench.quick else "")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for name in bench.methods or (known if {"update", "action"} & set(bench.parts) else ()):
        for line in measure(name, bench, rate):
            print(line, flush=True)
    if "env" in bench.parts:
        print(row("point maze steps, JAX", bench.num_envs, time_jax_env(bench)), flush=True)
        print(row("point maze steps, OGBench", 1, time_host_env(bench)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
