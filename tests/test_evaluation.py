"""Evaluation: open-loop chunks, several modes, tasks without success; JAX and official."""

import types
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ACTIONS = np.array([[1.0, 0.2], [0.4, -1.0], [-0.3, 0.9]], np.float32)


class State(NamedTuple):
    seed: jax.Array
    gain: jax.Array


STATE = State(jnp.zeros(1, jnp.int32), jnp.ones(1))


def chunk_policy(horizon):
    """Looks at the observation once, then plays `horizon` actions scaled by what it saw."""

    def policy(state, obs, key):
        scale = state.gain * jnp.cos(obs.sum())
        return (scale * jnp.asarray(ACTIONS[:horizon])).reshape(-1)

    return policy


def rollout(observe, step, horizon, steps):
    """The same by an explicit loop: list of rewards."""
    rewards = []
    for t in range(steps):
        if t % horizon == 0:
            scale = np.cos(np.float32(observe().sum()))
        rewards.append(step(scale * ACTIONS[t % horizon]))
        if rewards[-1] == 0:
            break
    return rewards


@pytest.fixture
def args():
    return types.SimpleNamespace(
        seed=0, num_seeds=1, eval_episodes=3, success_timing="post", env_backend="auto"
    )


@pytest.mark.parametrize("horizon", [1, 3])
def test_chunks_on_a_jax_environment(gsflow, args, horizon):
    env = gsflow.PointMaze("medium")
    env.max_episode_steps, env.goal_tol = 50, 3.0
    env.goal_xy = env.start_xy + np.array([2.0, 2.0])  # near: some episodes end within a chunk
    task, policies = gsflow.parse_task("pointmaze-medium"), {"": chunk_policy(horizon)}
    evaluate = gsflow.make_evaluate(task, env, policies, args)
    results = evaluate(STATE, 0)
    start_key, _, _ = jax.random.split(gsflow.purpose_key(0, "eval", 0), 3)
    (states, _), move = gsflow.reset_envs(env, start_key, 3), jax.jit(env.move)
    for episode in range(3):
        xy = np.asarray(states.xy[episode])

        def step(action):
            nonlocal xy
            xy = np.asarray(move(xy, action)[0])
            return float(np.linalg.norm(xy - env.goal_xy) <= env.goal_tol) - 1

        rewards = rollout(lambda: xy, step, horizon, 50)  # noqa: B023
        assert results["length"][0, episode] == len(rewards)
        assert results["return"][0, episode] == sum(rewards)
        assert results["success"][0, episode] == (rewards[-1] == 0)


def test_chunks_modes_and_no_success_on_official_environments(gsflow, args):
    task = gsflow.Task("Pendulum-v1", "Pendulum-v1", "Pendulum-v1", success=False)
    policies = {"single": chunk_policy(1), "chunk": chunk_policy(3)}
    scaled = {
        k: lambda s, o, key, p=p: p(s, o, key).reshape(-1, 2)[:, 0] for k, p in policies.items()
    }
    evaluate = gsflow.make_evaluate(task, None, scaled, args)
    results, headline = evaluate(STATE, 7), evaluate(STATE, 7, every=False)
    assert list(results) == ["return_single", "length_single", "return_chunk", "length_chunk"]
    assert list(results) == gsflow.metric_names(task, policies)
    assert list(headline) == ["return_single", "length_single"]
    np.testing.assert_array_equal(headline["return_single"], results["return_single"])
    assert (results["length_chunk"] == 200).all()
    env = gymnasium.make("Pendulum-v1")
    for mode, horizon in (("single", 1), ("chunk", 3)):
        for episode in range(3):
            seed = int(np.random.SeedSequence((0, 7, episode)).generate_state(1)[0])
            obs, _ = env.reset(seed=seed)

            def step(action):
                nonlocal obs
                obs, reward, *_ = env.step(action[:1].astype(np.float32))
                return reward

            rewards = rollout(lambda: obs, step, horizon, 200)  # noqa: B023
            np.testing.assert_allclose(
                results[f"return_{mode}"][0, episode], sum(rewards), rtol=1e-3
            )


def test_metric_names(gsflow):
    task = gsflow.parse_task("cube-single")
    names = gsflow.metric_names(task, {"one_step": None, "best_of_n": None})
    assert names[:3] == ["success_one_step", "return_one_step", "length_one_step"]
    assert gsflow.metric_names(task, {"": None}) == ["success", "return", "length"]
