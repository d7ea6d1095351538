"""FlowQ's toy: two modes and a known energy, so that the guided distribution is known as well.

    python algos/flowq.py --env-id energy-toy    a run: the success rate is the upper mode's mass
    python benchmark/flowq_toy.py                each velocity form and schedule against the truth

Data: (0, 1) and (0, -1) with deviation 0.2, equally heavy. Q(a) = a_2, so p exp(lambda Q) is again
a mixture of two Gaussians; no critic is learned.
"""

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.experimental.functional import FuncEnv

TOY_MEANS, TOY_STD = np.array([[0.0, 1.0], [0.0, -1.0]]), 0.2
DEFAULTS = {
    "flowq": dict(
        offline_steps=6_000, eval_interval=6_000, eval_episodes=2_000, batch_size=512,
        hidden_dims=(128, 128, 128), learning_rate=1e-3, lr_decay=True, guidance_lambda=1.0,
        q_norm="none", guidance_clip=0.0, critic="exact", schedule_warmup=2_000, flow_steps=100,
        eval_candidates=1,
    ),
}  # fmt: skip


class EnergyToyState(NamedTuple):
    action: jax.Array
    done: jax.Array


class EnergyToy(FuncEnv):
    """One-step bandit whose reward is the toy's Q, the second coordinate of the action.

    Success is an action in the upper half, so the success rate is the mass of the upper mode.
    Actions have no limits: the modes stand on the edge of the usual box.
    """

    max_episode_steps = 1

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def initial(self, rng: Any, params: Any = None) -> EnergyToyState:
        return EnergyToyState(jnp.zeros(2), jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None) -> EnergyToyState:
        return EnergyToyState(action, jnp.asarray(True))

    def observation(self, state, rng=None, params=None):
        return jnp.zeros(1)

    def reward(self, state, action, next_state, rng=None, params=None):
        return action[1]

    def terminal(self, state, rng=None, params=None):
        return state.done

    def success(self, state):
        return state.action[1] > 0


def toy_dataset(seed: int, rows: int = 100_000) -> dict:
    """Actions from two equally heavy Gaussians, one step each."""
    rng = np.random.default_rng(seed)
    actions = TOY_MEANS[rng.integers(0, 2, rows)] + TOY_STD * rng.standard_normal((rows, 2))
    zeros, ones = np.zeros((rows, 1), np.float32), np.ones(rows, np.float32)
    return dict(
        observations=zeros,
        actions=actions.astype(np.float32),
        rewards=actions[:, 1].astype(np.float32),
        masks=1 - ones,
        terminals=ones,
        next_observations=zeros.copy(),
    )


def toy_critic(obs, actions):
    """The toy's Q: obs (..., 1), actions (..., 2) -> (...)."""
    return actions[..., 1]


def make_task(name: str, dataset_dir: str) -> dict:
    """What a script needs to know of the task; there is one name, energy-toy."""
    if name != "energy-toy":
        raise ValueError(f"no task '{name}' in {Path(__file__).name}: use energy-toy")
    return dict(
        env=EnergyToy(),
        data=lambda: (toy_dataset(seed=0), "generated"),
        critic=toy_critic,
        defaults=DEFAULTS,
    )
