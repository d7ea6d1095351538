"""The toys with a known answer: GSFlow's multi-crescent and FlowQ's energy-toy, task files both."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import FQL

TASKS = ROOT / "benchmark" / "tasks"
crescent = load_script(TASKS / "multi_crescent.py")
energy_toy = load_script(TASKS / "energy_toy.py")

# ---- multi-crescent ----

POINTS = [
    (0.8, 0), (0.59, 0), (0.61, 0), (0.89, 0), (1, 0), (2, 0),
    (0.5, 0.5), (0.3, 0.6), (-0.45, -0.75), (-0.45, 0.75), (0, 0),
]  # fmt: skip
REWARDS = [10, 0, 10, 0, 0, 0, 15, 15, 15, 5, 0]


def test_crescent_rewards():
    np.testing.assert_array_equal(crescent.crescent_reward(jnp.asarray(POINTS)), REWARDS)
    single = [float(crescent.crescent_reward(jnp.asarray(p))) for p in POINTS]
    np.testing.assert_array_equal(single, REWARDS)
    # clipped, then scored: the clipped points lie on the corner and the edge of the box
    np.testing.assert_array_equal(
        crescent.crescent_reward(jnp.asarray([(-0.45, 3.0), (7.0, 7.0)])),
        crescent.crescent_reward(jnp.asarray([(-0.45, 1.0), (1.0, 1.0)])),
    )


def test_crescent_environment():
    env = crescent.MultiCrescent()
    actions = jnp.asarray(POINTS, jnp.float32)
    states = jax.vmap(env.initial)(jax.random.split(jax.random.key(0), len(POINTS)))
    following = jax.jit(jax.vmap(env.transition))(states, actions)
    rewards = jax.vmap(env.reward)(states, actions, following)
    np.testing.assert_array_equal(rewards, REWARDS)
    np.testing.assert_array_equal(jax.vmap(env.success)(following), np.array(REWARDS) >= 10)
    assert not np.asarray(jax.vmap(env.terminal)(states)).any()
    assert np.asarray(jax.vmap(env.terminal)(following)).all()
    assert (np.asarray(jax.vmap(env.observation)(following)) == 0).all()
    assert env.max_episode_steps == 1


def test_crescent_statistics():
    actions = jax.random.uniform(jax.random.key(0), (1_000_000, 2), minval=-1, maxval=1)
    rewards = np.asarray(jax.jit(crescent.crescent_reward)(actions))
    assert abs(rewards.mean() - 2.992) < 0.02
    assert abs((rewards >= 10).mean() - 0.201) < 0.002
    assert abs((rewards == 15).mean() - 0.0982) < 0.002


@pytest.mark.parametrize("seed", range(3))
def test_crescent_dataset(seed):
    data = crescent.crescent_dataset(seed)
    n = len(data["actions"])
    assert abs(n - 515) <= 80
    assert np.abs(data["actions"]).max() <= 1 - 1e-5 + 1e-7
    assert abs(data["rewards"].mean() - 7.5) <= 0.6
    assert set(np.unique(data["rewards"])) <= {0, 5, 10}  # clipping may leave a crescent, 15 never
    np.testing.assert_array_equal(data["masks"], np.zeros(n))
    np.testing.assert_array_equal(data["terminals"], np.ones(n))
    np.testing.assert_array_equal(data["observations"], np.zeros((n, 2)))
    np.testing.assert_array_equal(data["next_observations"], np.zeros((n, 2)))
    assert all(v.dtype == np.float32 for v in data.values())
    inside = (
        np.abs(data["actions"]).max(1) < 0.999
    )  # rewards belong to their rows after the shuffle
    np.testing.assert_array_equal(
        crescent.crescent_reward(data["actions"][inside]), data["rewards"][inside]
    )
    assert (np.diff(data["rewards"][:100]) != 0).sum() > 10
    np.testing.assert_array_equal(crescent.crescent_dataset(seed)["actions"], data["actions"])
    other = crescent.crescent_dataset(seed + 1)["actions"]
    assert len(other) != n or (other != data["actions"]).any()


def stub_script(asked):
    """What the picture asks of gsflow.py, each answer a point of its own; notes the arguments."""

    def sample_prior(params, nets, obs, key):
        asked.append(("prior", params, nets, obs.shape))
        return jnp.full((len(obs), 2), 0.1)

    def flow_endpoint(params, nets, obs, x, flow_steps):
        asked.append(("teacher", params, nets, flow_steps))
        return x + 0.1

    def sample_action(params, nets, obs, x, temperature, key):
        asked.append(("student", params, nets, temperature))
        return jnp.where(temperature > 0, jnp.asarray([0.8, 0.0]), jnp.full(obs.shape, 0.5)), None

    functions = (sample_prior, flow_endpoint, sample_action)
    return SimpleNamespace(**{f.__name__: f for f in functions})


@pytest.mark.parametrize(
    "phase, alpha, student, method",
    [
        ("offline", 3.0, "deterministic", "FQL"),
        ("online", 7.0, "gaussian", "gaussian prior, gaussian student"),
    ],
)
def test_picture_shows_the_first_seed(tmp_path, monkeypatch, phase, alpha, student, method):
    asked, drawn = [], []
    draw = crescent.draw_crescents
    monkeypatch.setattr(crescent, "draw_crescents", lambda *a: (drawn.append(a), draw(*a)))
    settings = dict(prior="gaussian", student=student, alpha=3.0, online_alpha=7.0, flow_steps=4)
    args = SimpleNamespace(**settings)
    state = SimpleNamespace(params={"w": jnp.asarray([1.0, 2.0])}, ema=None)  # of two seeds
    after_phase = crescent.make_task("multi-crescent", "")["after_phase"]
    after_phase(tmp_path, phase, stub_script(asked), "nets", args, state)
    assert [a[0] for a in asked] == ["prior", "teacher", "student", "student"]
    assert all(a[2] == "nets" and a[1]["w"].shape == () for a in asked)
    assert [a[3] for a in asked] == [(1_000, 2), 4, 0.0, 1.0]
    ((path, draws, title),) = drawn
    assert title == f"{method} {phase}, alpha {alpha:g}"
    picture = tmp_path / f"multi_crescent_{phase}.png"
    assert list(tmp_path.iterdir()) == [picture] == [path]
    for points, expected in zip(draws, [(0.1, 0.1), (0.2, 0.2), (0.5, 0.5), (0.8, 0)], strict=True):
        np.testing.assert_allclose(points, np.tile(expected, (1_000, 1)), rtol=1e-6)
    pixels = pytest.importorskip("matplotlib.image").imread(picture)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 400 and pixels.std() > 0.1


def test_picture_is_gsflows_alone(tmp_path):
    """Other scripts have no prior and no student: nothing is drawn, nothing fails."""
    after_phase = crescent.make_task("multi-crescent", "")["after_phase"]
    after_phase(tmp_path, "offline", SimpleNamespace(), None, SimpleNamespace(), None)
    assert not list(tmp_path.iterdir())


def test_statistics_of_the_sweep(tmp_path):
    """Two seeds: one that always finds 15, one that finds it in 4 of 100 actions."""
    rows = ["step,eval/return", "10,4.0", "10,6.0", "20,9.0", "20,9.0"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    returns = [[15.0] * 100, [15.0] * 4 + [10.0] * 46 + [0.0] * 50]
    (tmp_path / "result.json").write_text(json.dumps({"episodes": {"return": returns}}))
    s = crescent.statistics(tmp_path, crescent.Args(offline_steps=10))
    expected = dict(offline=5.0, online=10.1, deviation=4.9, good=0.75, best=0.52, seeds=1)
    assert s == pytest.approx(expected)


# ---- learning on multi-crescent ----


class Toy:
    """Seeds of multi-crescent through the script's own phases, run one at a time."""

    def __init__(self, gsflow, directory, monkeypatch, **flags):
        flags = dict(n_step=1, hidden_dims=(64, 64), eval_episodes=1_000) | flags
        flags |= dict(env_id="multi-crescent", out_dir=str(directory))
        task, parts = gsflow.parse_task("multi-crescent"), []
        self.args = gsflow.resolve(gsflow.Args(**flags), task)
        with monkeypatch.context() as patch:  # all that `train` makes, but not its loop
            patch.setattr(gsflow, "train_loop", lambda run, *rest: parts.extend(rest))
            patch.setattr(gsflow.signal, "signal", lambda *_: None)
            patch.setattr(gsflow.Run, "finish", lambda run, results: None)
            gsflow.train(self.args, task)
        self.carry, self.phases, self.evaluate, self.nets = parts

    def run(self, index):
        phase = self.phases[index]
        self.carry = phase.advance(phase.enter(self.carry), phase.end - phase.start)
        return self.carry["state"]

    def rewards(self):
        """Mean reward of each seed over 1,000 actions at T = 0."""
        return self.evaluate(self.carry["state"], 0)["return"].mean(axis=1)


@pytest.mark.slow
@pytest.mark.optimised
def test_fql_on_the_toy(gsflow, tmp_path, monkeypatch):
    flags = dict(num_seeds=4, alpha=10.0, online_alpha=1.0, **FQL)
    toy = Toy(gsflow, tmp_path, monkeypatch, offline_steps=2_000, online_steps=2_000, **flags)
    assert toy.rewards().max() < 5  # untrained; uniform actions earn 2.99
    toy.run(0)
    state = toy.run(1)
    assert (np.asarray(state.step) == 4_000).all()
    assert (np.asarray(toy.carry["replay"]["added"]) == 2_000).all()
    assert (np.asarray(toy.carry["sums"]["online/return"])[:, 1] == 2_000).all()
    assert toy.rewards().min() >= 7, toy.rewards()


@pytest.mark.slow
@pytest.mark.optimised
def test_gsflow_on_the_toy(gsflow, tmp_path, monkeypatch):
    """Two seeds, because four take minutes more; the averages over four pass as well."""
    flags = dict(num_seeds=2, alpha=10.0, online_alpha=10.0)
    toy = Toy(gsflow, tmp_path, monkeypatch, offline_steps=2_000, online_steps=6_000, **flags)
    nets, flow_steps, obs = toy.nets, toy.args.flow_steps, jnp.zeros((2_000, 2))

    def gap(state):
        """Mean Q of the teacher's actions for decoded noise, minus that for N(0, I)."""
        keys, params = jax.random.split(jax.random.key(0)), state.params
        decoded = gsflow.sample_prior(params, nets, obs, keys[0])
        q = []
        for x in (decoded, jax.random.normal(keys[1], (2_000, 2))):
            action = gsflow.flow_endpoint(params, nets, obs, x, flow_steps)
            q.append(nets.critic(params["critic"], obs, action).mean())
        return q[0] - q[1]

    gaps = np.asarray(jax.jit(jax.vmap(gap))(toy.run(0)))
    assert gaps.mean() > 0.2, gaps
    state = toy.run(1)
    assert (np.asarray(state.step) == 8_000).all()
    assert toy.rewards().mean() >= 5.5, toy.rewards()


# ---- energy-toy ----


def test_energy_toy_environment():
    env = energy_toy.EnergyToy()
    actions = jnp.asarray([(0.3, 1.2), (5.0, -0.1), (0.0, 0.0), (-1.0, 7.5)])
    states = jax.vmap(env.initial)(jax.random.split(jax.random.key(0), 4))
    following = jax.jit(jax.vmap(env.transition))(states, actions)
    rewards = jax.vmap(env.reward)(states, actions, following)
    np.testing.assert_array_equal(rewards, actions[:, 1])
    np.testing.assert_array_equal(jax.vmap(env.success)(following), [True, False, False, True])
    assert not np.asarray(jax.vmap(env.terminal)(states)).any()
    assert np.asarray(jax.vmap(env.terminal)(following)).all()
    assert jax.vmap(env.observation)(following).shape == (4, *env.observation_space.shape)
    assert env.max_episode_steps == 1 and env.action_space.shape == (2,)


def test_energy_toy_dataset():
    data = energy_toy.toy_dataset(0)
    n = len(data["actions"])
    assert n == 100_000 and all(v.dtype == np.float32 for v in data.values())
    upper = data["actions"][:, 1] > 0
    assert abs(upper.mean() - 0.5) < 0.01
    for side, mean in ((upper, energy_toy.TOY_MEANS[0]), (~upper, energy_toy.TOY_MEANS[1])):
        np.testing.assert_allclose(data["actions"][side].mean(0), mean, atol=0.005)
        np.testing.assert_allclose(data["actions"][side].std(0), energy_toy.TOY_STD, atol=0.005)
    np.testing.assert_array_equal(data["rewards"], data["actions"][:, 1])
    np.testing.assert_array_equal(data["masks"], np.zeros(n))
    np.testing.assert_array_equal(data["terminals"], np.ones(n))
    for name in ("observations", "next_observations"):
        np.testing.assert_array_equal(data[name], np.zeros((n, 1)))
    np.testing.assert_array_equal(energy_toy.toy_dataset(0)["actions"], data["actions"])
    assert (energy_toy.toy_dataset(1)["actions"] != data["actions"]).any()
    assert len(energy_toy.toy_dataset(0, rows=7)["rewards"]) == 7


def test_energy_toy_critic_is_the_reward():
    actions = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    q = energy_toy.make_task("energy-toy", "")["critic"](np.zeros((3, 5, 1)), actions)
    np.testing.assert_array_equal(q, actions[..., 1])
    slope = jax.vmap(jax.grad(lambda a: energy_toy.toy_critic(jnp.zeros(1), a)))(actions[0])
    np.testing.assert_array_equal(slope, [(0, 1)] * 5)


# ---- both as task files ----


@pytest.mark.parametrize(
    "module, name, script",
    [(crescent, "multi-crescent", "gsflow"), (energy_toy, "energy-toy", "flowq")],
)
def test_task_files(module, name, script):
    task = module.make_task(name, "/nowhere")
    data, source = task["data"]()
    env, obs, actions = task["env"], data["observations"], data["actions"]
    assert source == "generated" and list(task["defaults"]) == [script]
    assert obs.shape[1:] == env.observation_space.shape
    assert actions.shape[1:] == env.action_space.shape
    state = jax.vmap(lambda a: env.transition(None, a))(actions[:100])
    reward = jax.vmap(lambda a, s: env.reward(None, a, s))(actions[:100], state)
    np.testing.assert_array_equal(reward, data["rewards"][:100])
    with pytest.raises(ValueError, match=f"'other'.*use {name}$"):
        module.make_task("other", "/nowhere")
