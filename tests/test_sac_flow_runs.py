"""SAC Flow's environments and runs: ends of episodes, schedules, resume, bad flags, learning."""

import functools
import json
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from gymnasium.experimental.functional import FuncEnv
from helpers import assert_same_end, launch, only_run, rows_without_time
from test_sac_flow_policies import step_gradients

PENDULUM = "phys2d/Pendulum-v0"
TINY = dict(hidden_dim=8, d_model=8, critic_hidden_dims=(8,), batch_size=8, flow_steps=2)
FLAGS = "--hidden-dim 8 --d-model 8 --critic-hidden-dims 8 --batch-size 8 --flow-steps 2"
FLAGS = [*FLAGS.split(), "--updates-per-dispatch", "20", "--eval-episodes", "2"]


@pytest.fixture(scope="session")
def sac():
    return load_script(ROOT / "algos" / "sac_flow.py")


def make_args(sac, env_id, **flags):
    args = sac.Args(env_id=env_id, **(TINY | dict(action_scale=1.0) | flags))
    return sac.fill(sac.resolve(args, sac.parse_task(env_id)), target_entropy=0.0)


# ---- tasks ----


def test_gymnasium_tasks(sac):
    """Any Gymnasium id whose observations and actions are vectors; the box says the scale."""
    boxes = {PENDULUM: 2.0, "Pendulum-v1": 2.0, "HalfCheetah-v4": 1.0, "Humanoid-v5": 0.4}
    for env_id, scale in boxes.items():
        task = sac.parse_task(env_id)
        assert task.name == task.base == env_id and not task.success and not task.dataset
        args = sac.resolve(sac.Args(env_id=env_id, online_steps=60_000), task)
        assert args.mode == "online" and args.action_scale is None
        args, sizes = sac.fit_to_env(args, task, sac.make_jax_env(task, args))
        assert args.action_scale == pytest.approx(scale)
        assert sizes == ((3, 1) if scale == 2 else (17, 6) if scale == 1 else (348, 17))
    with pytest.raises(sac.UserError, match="close matches: HalfCheetah-v"):
        sac.parse_task("HalfCheeta-v3")
    skewed = SimpleNamespace(observation_space=Counter.observation_space)
    skewed.action_space = gymnasium.spaces.Box(-1, 2, (1,), np.float32)
    with pytest.raises(sac.UserError, match="one and the same scale in each dimension"):
        sac.fit_to_env(args, task, skewed)


def test_environment_that_needs_a_package(sac, monkeypatch):
    def make(task, timing):
        raise gymnasium.error.DependencyNotInstalled("Box2D is missing,\n pip install it")

    monkeypatch.setattr(sac, "make_host_env", make)
    with pytest.raises(sac.UserError, match="Box2D is missing, pip install it"):
        sac.fit_to_env(make_args(sac, "Hopper-v5"), sac.parse_task("Hopper-v5"), None)


def test_tasks_with_data_are_offline_to_online(sac):
    task = sac.parse_task("cube-double")
    assert sac.resolve(sac.Args(env_id="cube-double"), task).mode == "offline-to-online"
    assert task.success and sac.parse_task("pointmaze-medium").dataset
    toy = sac.parse_task("multi-crescent")  # a task file
    assert sac.resolve(sac.Args(env_id="multi-crescent"), toy).mode == "offline-to-online"
    hopper = sac.parse_task("Hopper-v5")
    own = sac.Args(env_id="Hopper-v5", dataset="own.npz")
    assert sac.resolve(own, hopper).mode == "offline-to-online"


@pytest.mark.slow
def test_tasks_with_data_from_scratch(sac, monkeypatch, tmp_path):
    """--mode online: the settings of scratch, single actions, and no data is looked for."""
    cube = sac.Args(env_id="cube-double", mode="online", sparse=True)
    args = sac.resolve(cube, sac.parse_task("cube-double"))
    assert (args.policy, args.critic, args.noise, args.sparse) == ("flow-g", "brn", "learned", True)
    assert (args.horizon_length, args.offline_steps, args.beta) == (1, 0, 0.0)
    assert (args.online_steps, args.learning_starts) == (1_000_000, 50_000)

    def load(task, args):
        raise AssertionError("data was asked for")

    monkeypatch.setattr(sac, "load_dataset", load)
    monkeypatch.setattr(sac.signal, "signal", lambda *_: None)
    flags = [*FLAGS, "--env-id", "pointmaze-medium", "--mode", "online", "--online-steps", 60]
    flags += ["--learning-starts", 20, "--eval-episodes", 1, "--out-dir", tmp_path]
    assert sac.command_line(sac.main, sac.Args, [*map(str, flags)]) == 0
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["dataset_source"] == "none: online from scratch" and result["steps"] >= 60
    assert "eval/success_stochastic" in result


@pytest.mark.parametrize(
    "env_id,beta", [("cube-double", 300), ("cube-triple", 100), ("cube-quadruple", 100)]
)
def test_published_settings(sac, env_id, beta, capsys):
    args = sac.resolve(sac.Args(env_id=env_id), sac.parse_task(env_id))
    assert (args.beta, args.beta_online, args.policy, args.horizon_length) == (
        beta,
        beta,
        "flow-t",
        5,
    )
    assert (args.noise, args.sigma, args.sigma_inference) == ("fixed", 0.05, 0.02)
    assert (args.autotune, args.ent_coef, args.adam_b1, args.tau) == (False, 0.0, 0.9, 0.005)
    assert capsys.readouterr().out == ""
    sac.resolve(sac.Args(env_id="scene"), sac.parse_task("scene"))
    assert "beta for scene is not published: 100" in capsys.readouterr().out


@pytest.mark.parametrize("policy", ["flow-g", "gaussian"])
def test_settings_follow_the_critic(sac, policy):
    args = sac.resolve(sac.Args(env_id="Ant-v4", policy=policy), sac.parse_task("Ant-v4"))
    found = (args.critic, args.adam_b1, args.policy_delay, args.tau, args.critic_hidden_dims)
    crossq = ("brn", 0.5, 3, None, (1024, 1024))
    assert found == (crossq if policy == "flow-g" else ("plain", 0.9, 1, 0.005, (512,) * 4))


def test_pendulum_is_gymnasiums(sac):
    """Same states, rewards and observations as the registered version; 200 steps, never over."""
    env = sac.Pendulum()
    assert gymnasium.spec(PENDULUM).max_episode_steps == env.max_episode_steps == 200
    classic = gymnasium.make("Pendulum-v1").unwrapped
    classic.reset(seed=0)
    rng = np.random.default_rng(0)
    state = jnp.asarray([2.0, -0.5])
    classic.state = np.asarray(state, np.float64)
    for _ in range(20):
        action = rng.uniform(-2, 2, 1).astype(np.float32)
        new = env.transition(state, jnp.asarray(action), None)
        obs, reward, terminated, _, _ = classic.step(action)
        np.testing.assert_allclose(env.observation(new, None), obs, atol=1e-4)
        assert env.reward(state, action, new, None) == pytest.approx(float(reward), abs=1e-3)
        assert not terminated and not env.terminal(new, None)
        state = new


# ---- ends of episodes ----


class Counter(gymnasium.Env):
    """Observation: steps taken (from 0), terminates at 3 with an action above 0, truncates at 5."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1), {}

    def step(self, action):
        self.t += 1
        over = self.t == 3 and float(action[0]) > 0
        return np.full(1, self.t, float), float(self.t), over, self.t == 5 and not over, {}


class FunctionalCounter(FuncEnv):
    """The same as pure functions."""

    max_episode_steps = 5
    observation_space, action_space = Counter.observation_space, Counter.action_space

    def initial(self, rng, params=None):
        return jnp.zeros((), jnp.int32), jnp.asarray(False)

    def transition(self, state, action, rng=None, params=None):
        return state[0] + 1, (state[0] == 2) & (action[0] > 0)

    def observation(self, state, rng=None, params=None):
        return state[0][None].astype(jnp.float32)

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state[0].astype(jnp.float32)

    def terminal(self, state, rng=None, params=None):
        return state[1]


def check_rows(rows, count, num_envs):
    """Every stored row is what the environment did; both ways to end occur."""
    rows = {k: np.asarray(v)[0, :count] for k, v in rows.items()}
    obs, next_obs, action = (rows[k][:, 0] for k in ("obs", "next_obs", "actions"))
    np.testing.assert_array_equal(next_obs, obs + 1)  # never the observation after a restart
    np.testing.assert_array_equal(rows["rewards"], obs + 1)
    terminated = (obs == 2) & (action > 0)
    truncated = obs == 4
    np.testing.assert_array_equal(rows["masks"], 1.0 - terminated)  # time limits bootstrap
    np.testing.assert_array_equal(rows["terminals"], terminated | truncated)
    assert terminated.sum() > 2 and truncated.sum() > 2
    for e in range(num_envs):
        o, end = obs[e::num_envs], (terminated | truncated)[e::num_envs]
        np.testing.assert_array_equal(o[1:], np.where(end[:-1], 0, o[:-1] + 1))
    return rows, terminated | truncated


def start(sac, args, env):
    state = sac.start_states(args, 1, 1, jnp.zeros(1), jnp.ones(1))
    nets = sac.make_networks(args, 1)
    return nets, sac.start_carry(args, None, nets, state)


@pytest.fixture
def counting_envs(sac, monkeypatch):
    """The script's vector environments, of counters in this process."""

    waiting = {}

    class Async(gymnasium.vector.SyncVectorEnv):
        def step_async(self, actions):
            waiting[id(self)] = actions

        def step_wait(self):
            return self.step(waiting.pop(id(self)))

    def make_async(task, args, num_envs, autoreset):
        return Async([Counter] * num_envs, autoreset_mode=autoreset)

    monkeypatch.setattr(sac, "make_host_envs", make_async)


SLOW = dict(marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "backend, num_envs",
    [("jax", 1), ("host", 4), pytest.param("jax", 4, **SLOW), pytest.param("host", 1, **SLOW)],
)
def test_ends_of_episodes(sac, counting_envs, backend, num_envs):
    """What both loops store, and which returns they report."""
    flags = dict(num_envs=num_envs, learning_starts=8, online_steps=120, action_scale=1.0)
    args = make_args(sac, "Hopper-v4", policy_delay=1, num_seeds=2, **flags)
    env = FunctionalCounter() if backend == "jax" else None
    nets, carry = start(sac, args, env)
    task = sac.parse_task("Hopper-v4")
    phases = sac.make_phases(task, env, None, nets, args, (1, 1))
    assert [(p.name, p.start, p.end, p.stride) for p in phases] == [
        ("warm-up", 0, 8, num_envs), ("online", 8, 120, num_envs)
    ]  # fmt: skip
    for phase in phases:
        carry = phase.enter(carry)
        carry = phase.advance(carry, (phase.end - phase.start) // phase.stride)
        if phase.name == "warm-up":
            assert np.isnan(carry["recent"]).all() and (carry["sums"]["online/return"] == 0).all()
            assert (carry["state"].step == 0).all()
            carry = jax.tree.map(jnp.copy, carry)
        if backend == "host":  # acting and storing are compiled too, of which training knows
            learning = phase.advance.learn.seconds
            assert phase.advance.seconds > learning and (phase.name == "warm-up") == (learning == 0)
    assert (carry["state"].step == 112).all()
    stored = {k: v[:, 8:] for k, v in carry["replay"]["rows"].items()}
    rows, done = check_rows(stored, 112, num_envs)
    lengths = rows["obs"][:, 0] + 1
    returns = np.where(done, lengths * (lengths + 1) / 2, 0)
    np.testing.assert_array_equal(carry["sums"]["online/return"][0], [returns.sum(), done.sum()])
    recent = np.asarray(carry["recent"])[0]
    newest = returns.reshape(-1, num_envs)[::-1].ravel()
    newest = newest[newest > 0]
    steps = done.reshape(-1, num_envs)[::-1].sum(axis=1)
    ends = np.cumsum(steps[steps > 0])
    first = ends[ends <= 20]  # the order of episodes that end together does not matter
    assert len(newest) > 20 and not np.isnan(recent).any()
    assert recent[: first[-1]].sum() == newest[: first[-1]].sum()


@pytest.mark.parametrize("num_envs", [256, 1024])
def test_steps_are_rounded_up(sac, num_envs):
    """50,000 steps before learning and 1,000,000 in all are no multiples of these."""
    args = make_args(sac, "HalfCheetah-v5", num_envs=num_envs)
    first, steps = sac.whole_blocks(args, FunctionalCounter())
    assert 0 <= first - 50_000 < num_envs and first % num_envs == 0
    block = 3 * num_envs  # three steps of all: the fewest updates that --policy-delay 3 divides
    assert 0 <= steps - 1_000_000 < block and (steps - first) % block == 0


@pytest.mark.slow
@pytest.mark.parametrize("utd,stride,updates", [(1.0, 3, 60), (0.25, 12, 15)])
def test_rounded_phases_are_played(sac, utd, stride, updates):
    """42 steps without updates instead of 40, then 60 instead of 58; the replay holds them all."""
    flags = dict(policy_delay=1, num_envs=3, learning_starts=40, online_steps=100, utd=utd)
    args = make_args(sac, "Hopper-v4", **flags)
    env = FunctionalCounter()
    nets, carry = start(sac, args, env)
    phases = sac.make_phases(sac.parse_task("Hopper-v4"), env, None, nets, args, (1, 1))
    assert [(p.start, p.end, p.stride) for p in phases] == [(0, 42, 3), (42, 102, stride)]
    for phase in phases:
        carry = phase.advance(phase.enter(carry), (phase.end - phase.start) // phase.stride)
    assert carry["replay"]["added"] == 102 and carry["state"].step == updates
    check_rows(carry["replay"]["rows"], 102, 3)


@pytest.mark.parametrize("delay", [1, 3])
def test_no_update_before_the_first_rows(sac, counting_envs, monkeypatch, delay):
    """Updates that overlap with the simulators see only rows that exist, also when learning is to
    start at once: a reward is at least 1, an empty row's is 0."""

    def make_update(nets, args, clone=False):
        def update(state, batches, key, beta):
            empty = sum((batch["returns"] == 0).sum() for batch in batches)
            return state.replace(step=state.step + len(batches)), {"empty": empty.astype(float)}

        return update

    monkeypatch.setattr(sac, "make_update", make_update)
    flags = dict(num_envs=4, learning_starts=0, online_steps=60)
    args = make_args(sac, "Hopper-v4", policy_delay=delay, **flags)
    nets, carry = start(sac, args, None)
    phases = sac.make_phases(sac.parse_task("Hopper-v4"), None, None, nets, args, (1, 1))
    block = 4 * delay
    assert [(p.start, p.end, p.stride) for p in phases] == [(0, block, 4), (block, 60, block)]
    for phase in phases:
        carry = phase.advance(phase.enter(carry), (phase.end - phase.start) // phase.stride)
    np.testing.assert_array_equal(carry["sums"]["train/empty"], [[0, 60 - block]])


@pytest.mark.slow
def test_a_block_equals_step_after_step(sac):
    """One environment, delay 3: three steps and then a group of updates do the same as 'step,
    update the critic' three times and the actor, written out in Python."""
    flags = dict(num_envs=1, learning_starts=12, online_steps=18, action_scale=1.0)
    args = make_args(sac, "Hopper-v4", policy_delay=3, policy="flow-g", **flags)
    env = FunctionalCounter()
    nets, carry = start(sac, args, env)
    task = sac.parse_task("Hopper-v4")
    warm_up, online = sac.make_phases(task, env, None, nets, args, (1, 1))
    assert online.stride == 3
    carry = online.enter(warm_up.advance(warm_up.enter(carry), 12))
    one = jax.tree.map(lambda x: jnp.copy(x[0]), carry)
    blocks = jax.tree.map(lambda x: x[0], online.advance(carry, 2))

    step = jax.jit(sac.interact(env, sac.Play(sac.make_act(nets, args), None)))
    update = jax.jit(sac.make_update(nets, args))
    draw = jax.jit(lambda key, replay: sac.sample_chunks(key, None, replay, 8, 1, 0.99))
    for _ in range(2):
        seen, seed, number = [], one["state"].seed, one["state"].step
        for j in range(3):
            one = step(one)
            key = jax.random.split(sac.purpose_key(seed, "update", number + j))[0]
            seen.append(draw(key, one["replay"]))
        key = jax.random.split(sac.purpose_key(seed, "update", number))[1]
        one["state"], _ = update(one["state"], seen, key, jnp.float32(0))
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, one["state"], blocks["state"])
    jax.tree.map(close, one["replay"], blocks["replay"])
    assert blocks["state"].step == 6


@pytest.mark.parametrize("backend", ["jax", "host"])
def test_chunks_are_played_open_loop_and_end_with_the_episode(
    sac, counting_envs, monkeypatch, backend
):
    """Actions repeat the chunk that was decided; after an end a new chunk begins."""
    args = make_args(
        sac, "cube-double", horizon_length=3, offline_steps=0, online_steps=60, learning_starts=60
    )
    env = FunctionalCounter() if backend == "jax" else None
    nets = sac.make_networks(args, 1)
    carry = dict(state=sac.start_states(args, 1, 1, jnp.zeros(1), jnp.ones(1)))
    carry["sums"] = sac.zero_sums(lambda carry: carry, carry)
    decided = {}

    def fake(state, obs, time):  # the step of the decision, and k
        base = time.astype(jnp.float32) * 0.01 + jnp.arange(3) * 0.001
        sign = jnp.where(time % 2 == 0, 1.0, -1.0)
        return jnp.broadcast_to((sign * base)[None, :, None], (len(obs), 3, 1))

    monkeypatch.setattr(sac, "make_act", lambda nets, args, random=False: fake)
    (phase,) = sac.make_phases(sac.parse_task("cube-double"), env, None, nets, args, (1, 1))
    carry = phase.advance(phase.enter(carry), 60)
    rows = {k: np.asarray(v)[0, :60] for k, v in carry["replay"]["rows"].items()}
    position = 0
    for i, action in enumerate(np.abs(rows["actions"][:, 0])):
        decided[i] = i - position
        assert action == pytest.approx(0.01 * decided[i] + 0.001 * position, abs=1e-6)
        position = 0 if rows["terminals"][i] else (position + 1) % 3
    assert len(set(decided.values())) > 20


# ---- runs ----


PENDULUM_RUN = [*FLAGS, "--online-steps", 120, "--learning-starts", 40, "--eval-interval", 40]
PENDULUM_RUN += ["--checkpoint-interval", 40]
RUNS = {
    # phases: warm-up to 40, online to 120; two seeds
    "pendulum": ([*PENDULUM_RUN, "--num-seeds", 2], [40, 80]),
    # official environments: the checkpoint at 30 lies inside the online phase
    "Hopper": (
        [*FLAGS, "--env-id", "Hopper-v5", "--policy", "gaussian", "--online-steps", 60]
        + ["--learning-starts", 20, "--eval-interval", 60, "--checkpoint-interval", 10],
        [20, 40],
    ),
    # cloning to 10, RL to 40, warm-up to 60, online to 100
    "pointmaze": (
        [*FLAGS, "--env-id", "pointmaze-medium", "--offline-steps", 40, "--online-steps", 60]
        + ["--offline-schedule", "sequential", "--learning-starts", 20, "--eval-interval", 10]
        + ["--horizon-length", 3, "--eval-episodes", 1, "--checkpoint-interval", 10],
        [10, 30, 50, 80],
    ),
}


def interrupt_at(sac, run_dir, flags, steps, monkeypatch):
    """Train in this process and stop right behind the first checkpoint at or after each step."""
    wanted, save = iter(steps), sac.save_checkpoint
    target = [next(wanted, None)]

    class Stop(Exception):
        pass

    def save_and_stop(directory, carry, facts, *name):
        save(directory, carry, facts, *name)
        if not name and target[0] is not None and facts["step"] >= target[0]:
            target[0] = next(wanted, None)
            raise Stop

    monkeypatch.setattr(sac, "save_checkpoint", save_and_stop)
    monkeypatch.setattr(sac.signal, "signal", lambda *_: None)
    argv = [*map(str, flags), "--out-dir", str(run_dir)]
    for _ in range(len(steps)):
        with pytest.raises(Stop):
            sac.command_line(sac.main, sac.Args, argv)
        argv = ["--resume", str(only_run(run_dir))]
    assert sac.command_line(sac.main, sac.Args, argv) == 0


def whole_and_parts(sac, directory, flags, steps, monkeypatch):
    """The same run uninterrupted and interrupted, which must end alike; their run directories."""
    runs = []
    for name, stops in (("whole", []), ("parts", steps)):
        (directory / name).mkdir()
        with monkeypatch.context() as patch:
            interrupt_at(sac, directory / name, flags, stops, patch)
        runs.append(only_run(directory / name))
    whole, parts = runs
    assert_same_end(sac, *runs)
    assert rows_without_time(whole) == rows_without_time(parts)
    return whole, parts


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_interrupted_runs_end_bit_identical(sac, name, data_dir, tmp_path, monkeypatch):
    """Stopped at checkpoints in every phase, against a run that nobody interrupted."""
    flags, steps = RUNS[name]
    flags = flags + ["--dataset-dir", data_dir]
    whole, _ = whole_and_parts(sac, tmp_path, flags, steps, monkeypatch)
    if name == "pendulum":
        check_a_finished_run(sac, whole)


@pytest.mark.slow
def test_start_from_equals_one_go(sac, data_dir, tmp_path, monkeypatch):
    """Offline alone, then a new run from its end, against both phases at once."""
    monkeypatch.setattr(sac.signal, "signal", lambda *_: None)
    flags = [*RUNS["pointmaze"][0], "--dataset-dir", data_dir]
    runs = {}
    for name, more in (("whole", []), ("offline", ["--online-steps", 0]), ("online", None)):
        if more is None:
            argv = ["--start-from", runs["offline"], "--online-steps", 60]
        else:
            argv = [*flags, *more]
        argv = [*map(str, argv), "--out-dir", str(tmp_path / name)]
        assert sac.command_line(sac.main, sac.Args, argv) == 0
        runs[name] = only_run(tmp_path / name)
    assert_same_end(sac, runs["whole"], runs["online"])
    rows = {name: rows_without_time(run) for name, run in runs.items()}
    assert rows["whole"] == rows["offline"] + rows["online"]


def check_a_finished_run(sac, run):
    """What a run leaves behind; --evaluate repeats its last evaluation."""
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 120 and np.shape(result["episodes"]["return_stochastic"]) == (2, 2)
    assert {"eval/return_deterministic", "eval/return_stochastic_last_three"} <= result.keys()
    assert not [k for k in result if "success" in k]
    rows = rows_without_time(run)
    assert {"charts/episodic_return", "train/entropy", "train/alpha"} <= rows[0].keys()
    assert all(r["charts/episodic_return"] == "" for r in rows if int(r["step"]) <= 40)
    out = launch(sac, "--evaluate", run)[0].splitlines()
    for mode, line in (("stochastic", 2), ("deterministic", 5)):
        for i in (0, 1):
            mean = np.mean(result["episodes"][f"return_{mode}"][i])
            assert out[line + i].split()[:2] == [str(i), f"{mean:.2f}"]
    tree, _ = sac.load_checkpoint(run)
    calls = tree["state"]["stats"]["critic"]["VmapMLP_0"]["BatchRenorm_0"]["calls"]
    assert (calls == 80).all()  # the state of BatchRenorm is in the checkpoint


def test_episodic_return_is_the_mean_of_the_last_episodes(sac):
    """Newest first, NaN where there was none yet."""
    carry = dict(replay=sac.make_replay(30, 1, 1), recent=jnp.full(20, jnp.nan))
    carry["sums"], play = {}, sac.Play(None, None)
    rng, history = np.random.default_rng(0), []
    for _ in range(12):
        done, returns = rng.random(3) < 0.7, rng.normal(size=3).astype(np.float32)
        out = dict(reward=jnp.zeros(3), terminated=jnp.asarray(done), truncated=jnp.zeros(3, bool))
        out |= dict(success=jnp.zeros(3), next_obs=jnp.zeros((3, 1)))
        obs = jnp.zeros((3, 1))
        carry = sac.remember(carry | {"returns": jnp.asarray(returns)}, obs, obs, out, play)
        history = [*returns[done], *history]
        expected = (history + [np.nan] * 20)[:20]
        np.testing.assert_array_equal(carry["recent"], np.float32(expected))
    assert len(history) > 20


BAD_FLAGS = {
    "unknown": ("--env-id Hoper-v4", "close matches: Hopper-v4"),
    "mode": ("--env-id Hopper-v4 --mode offline-to-online", "or use --mode online"),
    "beta": ("--beta 3", "--beta has no meaning with --mode online"),
    "beta from scratch": ("--env-id cube-double --mode online --beta 3", "--beta has no meaning"),
    "own data from scratch": ("--mode online --dataset own.npz", "--dataset has no meaning"),
    "sparse": ("--env-id Hopper-v4 --sparse True", "--sparse is for tasks with data"),
    "offline": ("--offline-steps 10", "--offline-steps has no meaning with --mode online"),
    "chunk": ("--horizon-length 5", "--horizon-length has no meaning"),
    "critic": ("--env-id cube-double --critic brn", "--critic brn has no meaning here"),
    "gaussian": ("--env-id cube-double --policy gaussian", "exists with --mode online alone"),
    "gaussian noise": ("--policy gaussian --noise fixed", "leave out --noise"),
    "renorm": ("--renorm-time", "--renorm-time is for --policy mlp with --mode online alone"),
    "drift": ("--drift-correction", "add --noise fixed"),
    "sigma": ("--noise fixed --sigma 0", "must be above 0"),
    "ceiling": ("--noise fixed", "cannot be reached with fixed noise"),
    "no target": ("--env-id pointmaze-medium --autotune True", "needs --target-entropy"),
    "coefficient": ("--ent-coef 0", "--autotune starts from --ent-coef"),
    "steps": ("--total-timesteps 500", "must exceed --learning-starts"),
    "nothing": ("--env-id cube-double --offline-steps 0 --online-steps 0", "nothing to train"),
    "not installed": ("--env-id LunarLanderContinuous-v3", "Box2D is not installed"),
    "discrete": ("--env-id CartPole-v1", "choose a task where both are vectors"),
    "scale": ("--action-scale 1", "--action-scale is 1, but phys2d/Pendulum-v0 has the box"),
    "backend": ("--env-backend host", "has no host environment"),
    "no jax": ("--env-id Ant-v5 --env-backend jax", "has no jax environment"),
    "width": ("--d-model 30", "multiple of 4"),
    "layers": ("--critic-hidden-dims 0", "needs layers"),
    "fraction": ("--env-id cube-double --bc-fraction 2", "between 0 and 1"),
    "memory": ("--num-seeds 1000000 --online-steps 1000000", "lower --buffer-size or --num-seeds"),
    "ring": ("--buffer-size 2", "--buffer-size must hold"),
    "delay": ("--policy-delay 0", "--policy-delay is 0"),
    "utd": ("--utd 0", "--utd is 0, but must be at least 0.001"),
    "rate": ("--actor-lr -1", "--actor-lr is -1"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(sac, tmp_path, capsys, monkeypatch, name):
    """One sentence with the remedy on stderr, exit code 2, nothing written."""
    flags, message = BAD_FLAGS[name]
    monkeypatch.chdir(tmp_path)
    assert sac.command_line(sac.main, sac.Args, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_advice_after_divergence_names_flags_of_this_script(sac, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sac.signal, "signal", lambda *_: None)
    flags = [*PENDULUM_RUN, "--policy", "gaussian", "--critic-lr", "1e30", "--out-dir", tmp_path]
    assert sac.command_line(sac.main, sac.Args, [*map(str, flags)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "training diverged before step" in err
    advice = err.split("try a lower ")[1].split()
    assert advice == ["--actor-lr", "or", "--critic-lr", "or", "--alpha-lr"]
    known = sac.Args.__dataclass_fields__
    assert all(flag[2:].replace("-", "_") in known for flag in advice[::2])


# ---- learning ----


class Bandit(FunctionalCounter):
    """One step, whose best action is 0.5."""

    def transition(self, state, action, rng=None, params=None):
        return state[0] + 1, jnp.asarray(True)

    def reward(self, state, action, next_state, rng=None, params=None):
        return 1 - (action[0] - 0.5) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["flow-g", "flow-t"])
def test_bandit_is_learned(sac, policy):
    """Through both online phases; the actions of two untrained seeds lie elsewhere."""
    args = make_args(
        sac, "Hopper-v4", policy=policy, critic="plain", num_envs=8, num_seeds=2, autotune=False,
        ent_coef=0.01, actor_lr=3e-3, critic_lr=3e-3, tau=0.05, batch_size=64,
        critic_hidden_dims=(32, 32), learning_starts=400, online_steps=2_400,
    )  # fmt: skip
    env = Bandit()
    nets, carry = start(sac, args, env)
    policy = jax.vmap(sac.make_policy(nets, args), (None, None, 0))
    act = jax.jit(jax.vmap(policy, (0, None, None)))
    actions = lambda: act(carry["state"], jnp.zeros(1), jax.random.split(jax.random.key(0), 200))
    before = np.asarray(actions())[..., 0]
    for phase in sac.make_phases(sac.parse_task("Hopper-v4"), env, None, nets, args, (1, 1)):
        carry = phase.advance(phase.enter(carry), (phase.end - phase.start) // phase.stride)
    after = np.asarray(actions())[..., 0]
    assert np.abs(before - 0.5).mean(axis=1).min() > 0.3
    assert np.abs(after - 0.5).mean(axis=1).max() < 0.15, after.mean(axis=1)


def returns_of(sac, args, task, state):
    policies = sac.evaluation_policies(sac.make_networks(args, 1), args)
    return sac.make_evaluate(task, sac.Pendulum(), policies, args)(state, 0)


@pytest.mark.slow
@pytest.mark.optimised
def test_pendulum_is_learned(tmp_path, sac):
    """Flow-G with the defaults; an untrained and a random policy are measured beside it."""
    task = sac.parse_task(PENDULUM)
    args, _ = sac.fit_to_env(sac.resolve(sac.Args(), task), task, sac.Pendulum())
    untrained = sac.start_states(args, 3, 1, jnp.zeros(3), jnp.ones(3))
    before = returns_of(sac, args, task, untrained)["return_stochastic"].mean()
    random = lambda state, obs, key: jax.random.uniform(key, (1,), minval=-2, maxval=2)
    evaluate = sac.make_evaluate(task, sac.Pendulum(), {"": random}, args)
    chance = evaluate(untrained, 0)["return"].mean()
    launch(sac, "--online-steps", 10_000, "--eval-interval", 5_000, out_dir=tmp_path)
    run = only_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert len(result["episodes"]["return_stochastic"][0]) == 50
    assert result["eval/return_stochastic"] >= -300, result["eval/return_stochastic"]
    assert max(before, chance) < -800

    # trained, its gradient still reaches the first step of the rollout and does not grow on the way
    tree, _ = sac.load_checkpoint(run)
    trained = jax.tree.map(lambda x: x[0], sac.restore(untrained, tree["state"], run))
    nets = sac.make_networks(args, 1)
    rows = tree["replay"]["rows"]["obs"][0]
    obs = jnp.asarray(rows[np.random.default_rng(0).integers(0, 10_000, 256)])
    actor = (trained.params["actor"], trained.stats["actor"])
    norms = step_gradients(nets, *actor, args, obs, jax.random.key(0))
    assert 0.02 < norms[0] / norms[-1] < 2, norms
