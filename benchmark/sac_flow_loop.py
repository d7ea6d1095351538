"""How fast the from-scratch loop is, against one dispatch per step. One run, one table.

    python benchmark/sac_flow_loop.py                              # pendulum and HalfCheetah-v5
    python benchmark/sac_flow_loop.py --tasks HalfCheetah-v5 --hidden-dim 512 \
        --critic-hidden-dims 1024 1024 --batch-size 512            # published sizes

Both loops do the same work: a critic update per environment step, an actor update every
--policy-delay of them, on a replay that holds `--warm-up` random rows at the start. The plain loop
does what the released code does, with one environment: it acts (one call, one fetch), steps the
environment, writes the row to a NumPy replay, gathers the batch there, and makes a call per update.
The script's loop is the script's own: replay and sampling on the device, the pendulum inside the
program, the updates of a block in one dispatch.
"""

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Literal

import cloudpickle
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "sac_flow.py"


@dataclasses.dataclass(frozen=True)
class Args:
    tasks: tuple[str, ...] = ("phys2d/Pendulum-v0", "HalfCheetah-v5")  # Gymnasium ids
    policy: str = "flow-g"  # whose loop
    hidden_dim: int = 64  # width of the policy
    critic_hidden_dims: tuple[int, ...] = (128, 128)  # widths of the critic
    batch_size: int = 128  # rows per update
    policy_delay: int = 3  # critic updates per actor update
    num_envs: tuple[int, ...] = (1, 6)  # environments of the script's loop, a row each
    warm_up: int = 600  # random rows before
    steps: int = 1_200  # environment steps that are timed, after one tenth of that
    repeats: int = 3  # the fastest counts
    clock: Literal["wall", "processor"] = "wall"
    """processor: for machines with other jobs; leaves out simulators in other processes"""


def load_script():
    spec = importlib.util.spec_from_file_location("sac_flow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sac_flow"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)  # the simulators' processes cannot import it
    return module


def resolved(sac, env_id, bench, num_envs):
    """(task, arguments, JAX environment or None, sizes)"""
    flags = {k: getattr(bench, k) for k in ("policy", "hidden_dim", "critic_hidden_dims")}
    flags |= dict(batch_size=bench.batch_size, policy_delay=bench.policy_delay)
    flags |= dict(num_envs=num_envs, learning_starts=bench.warm_up, online_steps=120_000)
    task = sac.parse_task(env_id)
    args = sac.resolve(sac.Args(env_id=env_id, **flags), task)
    env = sac.make_jax_env(task, args)
    args, sizes = sac.fit_to_env(args, task, env)
    return task, args, env, sizes


def fastest(fn, bench):
    """Steps per second of the fastest of several calls, after one that compiles."""
    clock = time.perf_counter if bench.clock == "wall" else time.process_time
    steps, times = bench.steps, []
    fn(max(steps // 10, 60))
    for _ in range(bench.repeats):
        start = clock()
        fn(steps)
        times.append(clock() - start)
    return steps / min(times)


def script_loop(sac, env_id, bench, num_envs):
    """Environment steps per second of the script's loop."""
    task, args, env, sizes = resolved(sac, env_id, bench, num_envs)
    nets = sac.make_networks(args, sizes[1])
    state = sac.start_states(args, *sizes, jnp.zeros(sizes[0]), jnp.ones(sizes[0]))
    carry = sac.start_carry(args, None, nets, state)
    warm_up, online = sac.make_phases(task, env, None, nets, args, sizes)
    carry = warm_up.advance(warm_up.enter(carry), bench.warm_up // warm_up.stride)
    carry = online.enter(carry)

    def go(steps):
        nonlocal carry
        carry = online.advance(carry, steps // online.stride)
        jax.device_get(carry["sums"])  # what the training loop fetches after a dispatch

    speed = fastest(go, bench)
    if env is None:
        online.advance.envs.close()
    return speed


def plain_loop(sac, env_id, bench):
    """Environment steps per second with separate calls and a NumPy replay."""
    _, args, env, (obs_dim, act_dim) = resolved(sac, env_id, bench, 1)
    nets = sac.make_networks(args, act_dim)
    state = sac.init_state(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim), 0)
    act = jax.jit(sac.make_policy(nets, args))
    critic = jax.jit(lambda s, b, k: sac.critic_step(s, b, k, nets, args))

    @jax.jit
    def actor(state, batch, key):
        critic = state.params["critic"], state.stats["critic"]
        return sac.actor_step(state, critic, batch, key, 0.0, nets, args)

    rows = dict(obs=(obs_dim,), actions=(act_dim,), returns=(), discounts=(), next_obs=(obs_dim,))
    rows = {k: np.zeros((100_000, *shape), np.float32) for k, shape in rows.items()}
    rng, count, key = np.random.default_rng(0), 0, jax.random.key(0)
    world = None
    if env is None:
        host = gymnasium.make(env_id)
        obs = host.reset(seed=0)[0].astype(np.float32)
    else:
        step = jax.jit(lambda e, a, k: sac.step_envs(env, e, a[None], k))
        world = sac.reset_envs(env, key, 1)
        obs = np.asarray(sac.observe(env, world)[0])

    def go(steps, learn=True):
        nonlocal obs, count, key, state, world
        for _ in range(steps):
            key, *keys = jax.random.split(key, 5)
            action = np.asarray(act(state, obs, keys[0]))
            if env is None:
                next_obs, reward, terminated, truncated, _ = host.step(action)
                next_obs = next_obs.astype(np.float32)
            else:
                world, out = step(world, action, keys[1])
                next_obs, reward = np.asarray(out["next_obs"][0]), float(out["reward"][0])
                terminated, truncated = bool(out["terminated"][0]), bool(out["truncated"][0])
            discount = args.gamma * (1 - terminated)
            new = dict(obs=obs, actions=action, returns=reward, discounts=discount)
            for name, value in (new | dict(next_obs=next_obs)).items():
                rows[name][count % 100_000] = value
            count += 1
            obs = next_obs
            if terminated or truncated:
                if env is None:
                    obs = host.reset()[0].astype(np.float32)
                else:
                    obs = np.asarray(sac.observe(env, world)[0])
            if not learn:
                continue
            index = rng.integers(0, count, args.batch_size)
            batch = {k: v[index] for k, v in rows.items()}
            state, info = critic(state, batch, keys[2])
            if count % args.policy_delay == 0:
                state, _ = actor(state, batch, keys[3])
        if learn:
            float(info["critic_loss"])

    go(bench.warm_up, learn=False)
    return fastest(go, bench)


def main(bench):
    sac = load_script()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {bench}")
    print("\n| task | loop | env steps/s | critic updates/s | ratio |")
    print("|---|---|---|---|---|")
    for env_id in bench.tasks:
        plain = plain_loop(sac, env_id, bench)
        print(f"| {env_id} | plain | {plain:,.0f} | {plain:,.0f} | 1.00 |", flush=True)
        for num_envs in bench.num_envs:
            speed = script_loop(sac, env_id, bench, num_envs)
            name = f"sac_flow.py, {num_envs} environment(s)"
            ratio = f"{speed / plain:.2f}"
            print(f"| {env_id} | {name} | {speed:,.0f} | {speed:,.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
