"""How fast MJX steps each task, against the official engine on this machine. One run, one table.

    python benchmark/mjx.py                                        # CPU: small batches
    python benchmark/mjx.py --num-envs 256 1024 4096 --steps 100   # GPU

Environment steps per second inside one dispatch (uniformly random actions, restarts included) and
the seconds that compiling took; beside them the official environment in one process, without
Gymnasium's wrappers.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
TASKS = ("Hopper-v5", "Walker2d-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5")
TASKS += ("HumanoidStandup-v5", "antmaze-large-singletask-task1-v0")


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = TASKS  # Gymnasium ids
    num_envs: tuple[int, ...] = (1, 16)  # environments stepped together, one row each
    steps: int = 10  # environment steps of each per dispatch
    repeats: int = 3  # timed dispatches; the fastest counts


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def official_rate(env, seconds=1.0):
    """Steps per second of the official environment in this process."""
    env.reset(seed=0)
    rng, high, steps = np.random.default_rng(0), env.action_space.high, 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        terminated = env.step(rng.uniform(-high, high))[2]
        if terminated:
            env.reset()
        steps += 1
    return steps / (time.perf_counter() - start)


def mjx_rate(script, env, num_envs, bench):
    """(steps per second of `num_envs` vmapped environments, seconds that compiling took)."""
    high = jnp.asarray(env.action_space.high)

    def step(env_state, key):
        shape = (num_envs, *env.action_space.shape)
        actions = high * jax.random.uniform(key, shape, minval=-1, maxval=1)
        env_state, out = script.step_envs(env, env_state, actions, jax.random.fold_in(key, 1))
        return env_state, out["reward"].mean()

    def run(env_state, key):
        return jax.lax.scan(step, env_state, jax.random.split(key, bench.steps))

    key = jax.random.key(0)
    env_state = jax.jit(lambda key: script.reset_envs(env, key, num_envs))(key)
    start = time.perf_counter()
    program = jax.jit(run).lower(env_state, key).compile()
    compile_seconds, times = time.perf_counter() - start, []
    for i in range(1 + bench.repeats):
        start = time.perf_counter()
        env_state, reward = program(env_state, jax.random.fold_in(key, i))
        jax.block_until_ready(reward)
        times.append(time.perf_counter() - start)
    return num_envs * bench.steps / min(times[1:]), compile_seconds


def main(bench):
    script, task_file = load(HERE.parent / "algos" / "gsflow.py"), load(HERE / "tasks" / "mjx.py")
    device = jax.devices()[0]
    print(f"{device.platform} {device.device_kind}, jax {jax.__version__}, float32")
    print("| task | environments | MJX steps/s | official steps/s, 1 process | ratio | compile s |")
    print("|---|---|---|---|---|---|")
    for gym_id in bench.tasks:
        env = task_file.make_env(gym_id, "post")
        for num_envs in bench.num_envs:
            ours, seconds = mjx_rate(script, env, num_envs, bench)
            theirs = official_rate(env.official)
            print(
                f"| {gym_id} | {num_envs} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.3f} | "
                f"{seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Args))
