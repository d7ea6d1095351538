"""fmq.py: windows, replay and rewards; chunks in the online phase, on both kinds of environment."""

import functools
import types

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from gymnasium.experimental.functional import FuncEnv
from test_replay import assert_uniform

H = 5


@pytest.fixture(scope="module")
def fmq():
    return load_script(ROOT / "algos" / "fmq.py")


def make_raw(terminals, rewards, masks=None):
    """A dataset whose observations and actions are row numbers."""
    rows = np.arange(len(terminals), dtype=np.float32)[:, None]
    raw = dict(observations=rows, actions=rows / 1000, next_observations=rows + 0.5)
    masks = np.ones(len(terminals)) if masks is None else masks
    raw |= dict(terminals=terminals, rewards=rewards, masks=masks)
    return {k: np.asarray(v, np.float32) for k, v in raw.items()}


def draw(fmq, data, replay=None, batch_size=64, key=0, **options):
    sample = functools.partial(fmq.sample_chunks, **options)
    sample = jax.jit(sample, static_argnames=("batch_size", "horizon", "gamma"))
    fixed = dict(batch_size=batch_size, horizon=H, gamma=0.99)
    return jax.device_get(sample(jax.random.key(key), data, replay, **fixed))


# ---- windows ----


def zero_critic_loss(fmq, batch):
    """L_Q of critics that answer 0 everywhere."""
    zero = lambda params, obs, chunk: jnp.zeros((2, *chunk.shape[:-1]))
    target = batch["returns"] + batch["discounts"] * 0
    return fmq.critic_loss({"critic": None}, fmq.Networks(1, None, zero), batch, target)[0]


def test_window_over_an_episode_end(fmq):  # D1
    data = fmq.device_rows(make_raw([0, 0, 1, 0, 0], [-1.0] * 5))
    batch = draw(fmq, data)
    np.testing.assert_array_equal(batch["valid"], [[1, 1, 1, 0, 0]] * 64)
    assert zero_critic_loss(fmq, batch) == 0


def test_window_that_ends_at_success(fmq):  # D1
    raw = make_raw([0, 0, 0, 0, 1], [-1.0] * 4 + [0.0], [1, 1, 1, 1, 0])
    batch = draw(fmq, fmq.device_rows(raw))
    np.testing.assert_array_equal(batch["valid"], np.ones((64, 5)))
    np.testing.assert_allclose(batch["returns"], -3.940399, atol=1e-6)
    np.testing.assert_array_equal(batch["discounts"], 0)
    np.testing.assert_allclose(zero_critic_loss(fmq, batch), 3.940399**2, rtol=1e-6)


def test_endless_cost(fmq):  # D2
    batch = draw(fmq, fmq.device_rows(make_raw([0] * 7, [-1.0] * 7)))
    np.testing.assert_allclose(batch["returns"], -4.90099501, atol=1e-5)
    np.testing.assert_allclose(batch["discounts"], 0.95099005, atol=1e-6)
    np.testing.assert_allclose(batch["returns"] + batch["discounts"] * -100, -100, atol=1e-4)
    np.testing.assert_array_equal(batch["next_obs"], batch["obs"] + 4.5)
    rows = batch["obs"] + np.arange(H)
    np.testing.assert_allclose(batch["actions"], rows / 1000, rtol=1e-6)


@pytest.mark.parametrize("pool", [100, 24])
def test_starts_are_those_of_a_first_in_first_out_ring(fmq, pool):  # D3
    """At every fill level: uniform over the live rows but the last H - 1 of each block, and no
    window with rows that were not written one after another."""
    num_data, capacity, block = 23, 20, 5
    data = fmq.device_rows(make_raw([0] * num_data, [0.0] * num_data))
    replay = fmq.make_replay(capacity, 1, 1)
    insert = jax.jit(fmq.insert)
    live = list(range(-num_data, 0))  # row numbers; the dataset's are negative
    data |= {"obs": data["obs"] - num_data, "actions": data["obs"] - num_data}
    for step in range(13):
        rows = np.arange(step * block, (step + 1) * block, dtype=np.float32)[:, None]
        new = dict(obs=rows, next_obs=rows, actions=rows)
        new |= {k: jnp.zeros(block) for k in ("rewards", "masks", "terminals")}
        replay = insert(replay, new)
        live = (live + rows[:, 0].astype(int).tolist())[-pool:]
        online = [i for i in live if i >= 0][-capacity:]
        offline = [i for i in live if i < 0]
        starts = offline[: -(H - 1)] + online[: -(H - 1)]
        batch = draw(fmq, data, replay, 6_000, step, pool=pool)
        assert_uniform(batch["obs"][:, 0].astype(int), starts)
        np.testing.assert_array_equal(batch["actions"], batch["obs"] + np.arange(H))
    assert pool == 100 or not offline


def test_sparse_rewards(fmq):  # D4
    """In the dataset and online; refused where a reward could be positive."""
    rewards = np.float32([-3, -1, 0])
    resolve = lambda name, **flags: fmq.resolve(
        fmq.Args(env_id=name, horizon=1, **flags), fmq.parse_task(name)
    )
    for task, expected in (("scene-task4", [-1, -1, 0]), ("cube-double-task4", [-3, -1, 0])):
        args, raw = resolve(task), make_raw([0, 0, 1], rewards)
        np.testing.assert_array_equal(fmq.prepare(raw, args)["rewards"], expected)
        np.testing.assert_array_equal(raw["rewards"], rewards)
        play = fmq.Play(None, None, sparse=args.sparse, count=False)
        carry = dict(replay=fmq.make_replay(3, 1, 1), returns=jnp.zeros(1), sums={}, recent=None)
        for reward in rewards:
            ended = jnp.zeros(1, bool)
            out = dict(reward=reward[None], terminated=ended, truncated=ended, success=ended)
            step = dict(obs=jnp.zeros((1, 1)), actions=jnp.zeros((1, 1)))
            carry = fmq.remember(carry, **step, out=out | dict(next_obs=step["obs"]), play=play)
        np.testing.assert_array_equal(carry["replay"]["rows"]["rewards"], expected)
    with pytest.raises(fmq.UserError, match="rewards of at most 0; use --sparse False"):
        fmq.prepare(make_raw([0, 0, 1], [0, 1, 0]), resolve("scene-task4"))
    with pytest.raises(fmq.UserError, match="not for Pendulum-v1; use --sparse False"):
        resolve("Pendulum-v1", sparse=True)
    assert not resolve("Pendulum-v1").sparse


def test_dataset_shorter_than_a_chunk(fmq):
    args = fmq.resolve(fmq.Args(horizon=5), fmq.parse_task("pointmaze-medium"))
    with pytest.raises(fmq.UserError, match="shorter than one chunk of --horizon 5"):
        fmq.prepare(make_raw([0, 0, 0, 1], [0] * 4), args)
    assert len(fmq.prepare(make_raw([0] * 5, [0] * 5), args)["rewards"]) == 5


TABLE = {  # task: observation, action, time limit
    "cube-double-task4": (37, 5, 500),
    "cube-triple-task3": (46, 5, 1000),
    "scene-task5": (40, 5, 750),
    "humanoidmaze-medium-task3": (69, 21, 2000),
    "antmaze-giant-task4": (29, 8, 1000),
}


@pytest.mark.parametrize("task", TABLE)
def test_sizes_and_limits_of_the_papers_tasks(fmq, task):
    env = fmq.make_host_env(fmq.parse_task(task), "post")
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    assert (*sizes, env.spec.max_episode_steps) == TABLE[task]
    env.close()


# ---- online: an environment whose episodes last 7 steps and a policy that tells on itself ----
LIMIT, STEPS = 7, 40


class Counter(FuncEnv):
    """Observation: 100 * (episodes begun, from the start state's draw) + steps of this one."""

    max_episode_steps = LIMIT
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def initial(self, rng, params=None):
        return jnp.zeros(())

    def transition(self, state, action, rng=None, params=None):
        return state + 1

    def observation(self, state, rng=None, params=None):
        return state[None]

    def reward(self, state, action, next_state, rng=None, params=None):
        return -1.0 - state

    def terminal(self, state, rng=None, params=None):
        return jnp.asarray(False)


class HostCounter(gymnasium.Env):
    """The same as an official environment."""

    observation_space, action_space = Counter.observation_space, Counter.action_space

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {"success": 0.0}

    def step(self, action):
        self.t += 1
        obs = np.float32([self.t])
        return obs, -float(self.t), False, self.t >= LIMIT, {"success": 0.0}


class HostCounters(gymnasium.vector.SyncVectorEnv):
    """Several of them in this process, stepped in two calls as those in processes of their own."""

    def step_async(self, actions):
        self.actions_under_way = actions

    def step_wait(self):
        return self.step(self.actions_under_way)


def telling_actor(params, obs, x, r, t):
    """Jumps to a chunk that tells the observation it was drawn at and each action's position."""
    return obs / 10 + jnp.arange(H) / 1000 - x


def expected_rows(cut):
    """What must lie in the replay: chunks of 5 steps, cut when an episode of 7 ends, or (official
    environments) at row `cut`, where learning starts: a checkpoint, which ends all episodes."""
    rows, t, position, start = [], 0, 0, 0
    for i in range(STEPS):
        start = t if position == 0 else start
        ends = t + 1 == LIMIT or i + 1 == cut
        rows.append((t, start / 10 + position / 1000, -1.0 - t, t + 1, ends))
        position = 0 if ends else (position + 1) % H
        t = 0 if ends else t + 1
    return [np.array(column, np.float32) for column in zip(*rows, strict=True)]


class Stop(Exception):
    """Raised in place of the training loop."""


def run_online(fmq, monkeypatch, host):
    """What `train` sets up, then 40 online steps with 2 seeds; learning begins at step 10, the
    first start of a chunk from step 8 on -> (carry at the start, at the end, updates by block)."""
    args = fmq.Args(
        offline_steps=0, online_steps=STEPS, learning_starts=8, num_seeds=2, hidden_dims=(4,),
        num_samples=2, batch_size=4, normalize_obs=False,
    )  # fmt: skip
    task = fmq.parse_task("pointmaze-medium")
    args, found = fmq.resolve(args, task), []
    nets = fmq.make_networks(args, 1)._replace(actor=telling_actor)
    raw = make_raw([0] * 20, [0.0] * 20)

    def train_loop(run, carry, phases, evaluate, nets):
        found.extend([carry, phases])
        raise Stop

    def envs(task, args, num_envs, autoreset):
        return HostCounters([HostCounter] * num_envs, autoreset_mode=autoreset)

    monkeypatch.setattr(Counter, "max_episode_steps", LIMIT)
    monkeypatch.setattr(fmq, "make_jax_env", lambda task, args: None if host else Counter())
    monkeypatch.setattr(fmq, "load_dataset", lambda task, args: (raw, "generated"))
    monkeypatch.setattr(fmq, "make_networks", lambda args, act_dim: nets)
    monkeypatch.setattr(fmq, "make_host_envs", envs)
    monkeypatch.setattr(fmq, "Run", lambda *_: types.SimpleNamespace(finish=None))
    monkeypatch.setattr(fmq, "train_loop", train_loop)
    with pytest.raises(Stop):
        fmq.train(args, task)
    carry, phases = found
    first, history = jax.device_get(carry), []
    for phase in phases[1:]:
        carry = phase.enter(carry)
        for _ in range(phase.start, phase.end, phase.stride):
            carry = phase.advance(carry, 1)
            history.append(int(carry["state"].step[0]))
    return first, jax.device_get(carry), history


@pytest.mark.parametrize("host", [False, True], ids=["jax", "host"])
def test_chunks_run_open_loop_and_end_with_the_episode(fmq, monkeypatch, host):
    before, carry, history = run_online(fmq, monkeypatch, host)
    rows = carry["replay"]["rows"]
    obs, actions, rewards, next_obs, ends = expected_rows(cut=10 if host else None)
    for seed in range(2):
        np.testing.assert_array_equal(rows["obs"][seed, :, 0], obs)
        np.testing.assert_allclose(rows["actions"][seed, :, 0], actions, atol=1e-6)
        np.testing.assert_array_equal(rows["rewards"][seed], rewards)
        np.testing.assert_array_equal(rows["next_obs"][seed, :, 0], next_obs)
        np.testing.assert_array_equal(rows["terminals"][seed], ends)
        np.testing.assert_array_equal(rows["masks"][seed], 1)  # time limits bootstrap
    ended = STEPS // LIMIT
    np.testing.assert_array_equal(carry["sums"]["online/return"], [[-28 * ended, ended]] * 2)
    assert history == [0, 0, 5, 10, 15, 20, 25, 30]  # none before step 10, then one per step
    np.testing.assert_array_equal(carry["sums"]["train/fmq_loss"][:, 1], [30, 30])
    # the frozen actor is the one that the phase began with; the one in training has moved on
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert same(carry["state"].offline_actor, before["state"].params["actor"])
    assert not same(carry["state"].params["critic"], before["state"].params["critic"])
    assert carry["state"].pessimistic.all() and not before["state"].pessimistic.any()
    names = "critic_loss q td_target diagonal_loss consistency_loss fmq_loss radius disagreement"
    names = {f"train/{name}" for name in (*names.split(), "drift", "grad_norm")}
    assert set(before["sums"]) == names | {"online/return", "online/success"}


def test_a_flag_decides_how_critics_are_joined_online(fmq):
    def agg(**flags):
        args = fmq.resolve(fmq.Args(**flags), fmq.parse_task("pointmaze-medium"))
        state = fmq.TrainState(**dict.fromkeys(fmq.TrainState.__dataclass_fields__))
        state = state.replace(params={"actor": np.ones(3)}, pessimistic=np.zeros(2, bool))
        return "min" if fmq.begin_online(state, args).pessimistic.all() else "mean"

    assert agg() == "min" and agg(online_objective="mvp") == "mean" == agg(actor="flow")
    assert agg(q_agg_online="mean") == "mean"
    assert agg(online_objective="mvp", q_agg_online="min") == "min"
