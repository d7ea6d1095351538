"""Wiring of every script: what data, flags and phases say reaches the updates, the policies and the
environments, and each random key has one purpose, one seed and one step. Networks, updates and
policies are stand-ins that record what they are given, so that nearly nothing is compiled."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, SCRIPTS, load_script
from gymnasium.experimental.functional import FuncEnv

ONLINE = [name for name in SCRIPTS if name != "flowq"]
FLAGS = dict(
    gsflow=dict(n_step=2, num_envs=2, utd=2, online_steps=40, alpha=3.0, online_alpha=5.0)
    | dict(offline_td_temperature=0.25, online_td_temperature=0.75, num_candidates=2)
    | dict(behavior_temperature=0.6, eval_temperature=0.2),
    flowq=dict(n_step=2, guidance_lambda=7.0, eval_candidates=3),
    fmq=dict(horizon=2, utd=2, online_steps=40, learning_starts=4, num_samples=2, sparse=True),
    sac_flow=dict(horizon_length=2, num_envs=2, online_steps=40, learning_starts=4, sparse=True)
    | dict(beta=4.0, beta_online=6.0, policy="flow-g", sigma=0.3, sigma_inference=0.1),
)
SHARED = dict(env_id="pointmaze-medium", batch_size=8, offline_steps=3, num_seeds=2)


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load_script(ROOT / "algos" / f"{request.param}.py")


def make_args(script, **flags):
    """Resolved arguments, all of which differ where phases or purposes have one each."""
    task = script.parse_task("pointmaze-medium")
    return script.resolve(script.Args(**(SHARED | FLAGS[script.ALGO] | flags)), task)


def raw_data():
    """Two episodes of six rows; action, observation and reward tell the row's number."""
    i = np.arange(12, dtype=np.float32)
    raw = dict(observations=np.stack([i, 10 * i], 1), actions=i[:, None] / 100, rewards=-i)
    raw |= dict(next_observations=raw["observations"] + 0.5, masks=np.ones_like(i))
    return raw | dict(terminals=np.float32(i % 6 == 5))


def make_state(script, **parts):
    fields = dict.fromkeys(script.TrainState.__dataclass_fields__)
    own = dict(obs_mean=jnp.zeros(2), obs_std=jnp.ones(2), seed=jnp.int32(0), step=jnp.int32(0))
    return script.TrainState(**(fields | own | parts))


def recorded_keys(monkeypatch, *names):
    """The keys of all draws of these kinds from now on."""
    keys = []

    def recorder(draw):
        def record(key, *inputs, **options):
            keys.append(key)
            return draw(key, *inputs, **options)

        return record

    for name in names:
        monkeypatch.setattr(jax.random, name, recorder(getattr(jax.random, name)))
    return keys


def as_tuple(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


# ---- data -> batch -> update ----
def test_batches_and_keys(script, monkeypatch):
    """Rows of the dataset arrive standardised, with what lies behind them; keys of batches and of
    updates differ from each other, between steps and between seeds; settings are handed on."""
    args, raw, seen = make_args(script), raw_data(), []

    def update(state, batch, key, *settings):
        batches = batch if isinstance(batch, list) else [batch]
        seen.extend((b, as_tuple(key), settings) for b in batches)
        return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

    chunks = {"fmq": "horizon", "sac_flow": "horizon_length"}.get(script.ALGO)
    rows, targets = script.device_rows, getattr(script, "device_data", None)
    data = rows(raw) if chunks else targets(raw, args.n_step, args.gamma)
    if script.ALGO == "sac_flow":
        learn = script.make_learn(None, args, update, update)
    else:
        monkeypatch.setattr(script, "make_update", lambda *_: update)
        learn = script.make_learn(None, args)
    name, asked = "sample_chunks" if chunks else "sample", []
    draw = getattr(script, name, None)  # flowq.py draws its rows in `learn`

    def note(key, data, *inputs, **options):
        asked.append((inputs, options))
        return draw(key, data, *inputs, **options)

    monkeypatch.setattr(script, name, note, raising=False)
    drawn = recorded_keys(monkeypatch, "randint")
    mean, std = np.array([1.0, 2.0]), np.array([2.0, 4.0])
    settings = [] if script.ALGO == "fmq" else [object()]
    for seed, step in ((0, 0), (0, 2), (1, 0)):
        numbers = dict(seed=jnp.int32(seed), step=jnp.int32(step))
        state = make_state(script, obs_mean=mean, obs_std=std, **numbers)
        carry = learn(dict(state=state, sums={}), data, *settings)
        assert carry["state"].step > step and "train/loss" in carry["sums"]
    rows = []
    for batch, _, given in seen:
        i = np.rint(100 * np.asarray(batch["actions"])[:, 0]).astype(int)
        last = i + 1 if chunks else np.minimum(i + 1, i // 6 * 6 + 5)  # of two steps
        scaled = lambda x: (x - mean) / std
        np.testing.assert_allclose(batch["obs"], scaled(raw["observations"][i]), rtol=1e-5)
        after = scaled(raw["next_observations"][last])
        np.testing.assert_allclose(batch["next_obs"], after, rtol=1e-5)
        assert list(given) == settings
        rows.append(i.tolist())
    assert rows[0] != rows[-1]
    # replay, rows, length of the windows, discount; rows that are kept
    window, pool = (None, 8, 2, args.gamma), getattr(args, "buffer_size", None)
    expected = dict(gsflow=((*window, pool, 2, False), {}), fmq=((*window, pool), {}))
    expected |= dict(sac_flow=(window, dict(limit=pool, stride=2)))
    assert asked == [expected[name] for name in [script.ALGO] * 3 if name in expected]
    keys = [key for _, key, _ in seen]
    drawn = [as_tuple(key) for key in drawn]
    assert len(set(keys)) == len(seen) >= 3 and len(set(drawn)) == len(drawn) == 3
    assert not set(keys) & set(drawn)


def one_update(update, keys, drawn, *inputs):
    """In one program: (metrics, what was drawn), after checking that no key was used twice."""

    @jax.jit
    def program(*inputs):
        info = update(*inputs)[1]
        return info, drawn, [jax.random.key_data(key) for key in keys]

    *results, used = jax.device_get(program(*inputs))
    used = [tuple(key.tolist()) for key in used]
    assert len(set(used)) == len(used) >= 2, f"{len(used)} draws of {len(set(used))} keys"
    return results


def values(params, obs, actions):
    """Two critics that see the observation alone, once and twice: (2, ...)."""
    q = params * obs.sum(axis=-1) + 0 * actions.sum(axis=-1)
    return jnp.stack([q, 2 * q])


def test_td_target_and_keys(script, monkeypatch):
    """The target network judges the next observation; no key is used for two draws."""
    scaled = lambda params, obs, x, *times: params * x
    args, rng = make_args(script), np.random.default_rng(0)
    width = 2 if script.ALGO in ("fmq", "sac_flow") else 1
    batch = dict(obs=rng.normal(size=(8, 2)), next_obs=rng.normal(size=(8, 2)))
    batch |= dict(actions=rng.uniform(-1, 1, (8, width)), returns=rng.normal(size=8))
    batch |= dict(discounts=rng.uniform(size=8), valid=np.ones((8, width)))
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    expected = batch["returns"] + batch["discounts"] * 4.5 * batch["next_obs"].sum(axis=1)
    params = dict(critic=1.0)  # and 3 in the target network, so that the two average 4.5
    if script.ALGO == "gsflow":
        params |= dict(velocity=0.5, student=0.4, encoder=0.3, decoder=0.2, log_temperature=0.0)
        student = lambda params, obs, x: (params * x, jnp.zeros_like(x))
        encoder = lambda params, obs, x: (params * jnp.tile(x, 3), jnp.zeros((8, 3)))
        decoder = lambda params, obs, z: params * z[..., :1]
        nets = script.Networks(1, 3, values, scaled, student, encoder, decoder)
    elif script.ALGO == "flowq":
        params |= dict(velocity=0.5)
        nets = script.Networks(1, 1.0, values, scaled)
    elif script.ALGO == "fmq":
        params |= dict(actor=0.5)
        nets = script.Networks(1, scaled, values)
    else:
        return check_sac(script, args, batch, expected, monkeypatch)
    params = {k: jnp.float32(v) for k, v in params.items()}
    parts = dict(params=params, target_critic=jnp.float32(3))
    if script.ALGO == "flowq":
        rates = {k: script.optimizer(args, k).init(p) for k, p in params.items()}
        parts |= dict(ema=params["velocity"], opt_state=rates)
    else:
        parts |= dict(opt_state=optax.adam(args.learning_rate).init(params))
    if script.ALGO == "fmq":
        parts |= dict(offline_actor=params["actor"], pessimistic=jnp.asarray(False))
    settings = dict(gsflow=lambda: [script.phase_settings(args, "offline")], fmq=lambda: [])
    settings |= dict(flowq=lambda: [script.Settings(jnp.float32(1))])
    for objective in ("offline", "fmq") if script.ALGO == "fmq" else (None,):
        keys = recorded_keys(monkeypatch, "normal", "uniform")
        update = script.make_update(nets, args, *([objective] if objective else []))
        state = make_state(script, **parts)
        inputs = state, batch, jax.random.key(0), *settings[script.ALGO]()
        info, _ = one_update(update, keys, [], *inputs)
        monkeypatch.undo()
        np.testing.assert_allclose(info["td_target"], expected.mean(), rtol=1e-4, atol=1e-5)


def check_sac(script, args, batch, expected, monkeypatch):
    """Also the temperature's share of the target, and which deviation of the noise is used where;
    beta weighs the distance to the data."""
    critic = lambda params, stats, *inputs, train=False: (values(params["gain"], *inputs), stats)
    context = lambda params, stats, obs, train=False: (obs, stats)
    velocity = lambda params, stats, context, x, *_, train=False: ((params * x, None), stats)
    nets, sample, drawn = script.Networks(2, critic, context, velocity), script.sample_action, []
    sigmas = []

    def record(params, stats, nets, args, obs, key, sigma, train=False):
        result = sample(params, stats, nets, args, obs, key, sigma, train)
        sigmas.append(sigma)
        drawn.append((obs, result[1]) if len(sigmas) == 1 else obs)  # the target's, the loss's
        return result

    args = dataclasses.replace(args, ent_coef=0.3)
    params = dict(actor=jnp.float32(0.5), critic={"gain": jnp.float32(1)})
    rates = {name: script.optimizer(args, name).init(p) for name, p in params.items()}
    state = make_state(script, params=params, stats=dict(actor={}, critic={}), opt_state=rates)
    state = state.replace(target_critic={"gain": jnp.float32(3)})
    keys = recorded_keys(monkeypatch, "normal")
    monkeypatch.setattr(script, "sample_action", record)
    inputs = state, [batch], jax.random.key(0), jnp.float32(7)
    info, drawn = one_update(script.make_update(nets, args), keys, drawn, *inputs)
    (next_obs, log_prob), obs = drawn
    np.testing.assert_array_equal(next_obs, batch["next_obs"])
    np.testing.assert_array_equal(obs, batch["obs"])
    assert sigmas == [0.1, 0.3]
    expected = expected - batch["discounts"] * 0.3 * log_prob
    np.testing.assert_allclose(info["td_target"], expected.mean(), rtol=1e-4)
    loss = -0.3 * info["entropy"] - info["actor_q"] + 7 * info["data_distance"]
    np.testing.assert_allclose(info["actor_loss"], loss, rtol=1e-4)


def test_observation_scale(gsflow):
    data = dict(obs=jnp.asarray(raw_data()["observations"]))
    mean, std = gsflow.observation_scale(data, SimpleNamespace(normalize_obs=True))
    np.testing.assert_allclose(mean, [5.5, 55], rtol=1e-6)
    np.testing.assert_allclose(std, np.std(np.arange(12)) * np.array([1, 10]), rtol=1e-5)
    plain = gsflow.observation_scale(data, SimpleNamespace(normalize_obs=False))
    np.testing.assert_array_equal(plain, [[0, 0], [1, 1]])


# ---- acting ----
def random_policy(script, seen):
    """A stand-in for make_policy: actions by the key alone; notes how it is asked to act."""

    def make_policy(nets, args=None):
        width = getattr(args, "horizon", None) or getattr(args, "horizon_length", 1)

        def policy(state, obs, key, *how, **options):
            seen.append((*how, *options.values()))
            return jax.random.uniform(key, (width,), minval=-1)

        return policy

    return make_policy


@pytest.mark.parametrize("script", ONLINE, indirect=True)
def test_exploring_actions(script, monkeypatch):
    """Others for each environment, step and seed, drawn in the mode that explores."""
    args, seen = make_args(script), []
    monkeypatch.setattr(script, "make_policy", random_policy(script, seen))
    count = 1 if script.ALGO == "fmq" else 2
    nets, obs = SimpleNamespace(act_dim=1, dim=2), jnp.zeros((count, 2))
    act, horizon = script.make_act(nets, args), 1 if script.ALGO == "gsflow" else 2
    actions = []
    for seed, time in ((0, 0), (0, 2), (1, 0)):
        chunks = act(make_state(script, seed=jnp.int32(seed)), obs, jnp.int32(time))
        assert chunks.shape == (count, horizon, 1)
        actions += np.ravel(chunks).tolist()
    assert len(set(actions)) == len(actions) == 3 * count * horizon
    how = dict(gsflow=(0.6,), fmq=("best-of-n",), sac_flow=())[script.ALGO]
    assert set(seen) == {how}
    if script.ALGO == "sac_flow":  # before learning from scratch: uniform over the whole box
        act = script.make_act(nets, dataclasses.replace(args, action_scale=2.0), random=True)
        first, later = (act(make_state(script), jnp.zeros((50, 2)), t) for t in (0, 2))
        assert 1.9 < np.abs(first).max() <= 2 and np.abs(np.mean(first)) < 0.5
        assert first.shape == (50, 1, 2) and not np.intersect1d(first, later).size


def test_modes_of_evaluation(script, monkeypatch):
    """Each mode acts as its name says, at the evaluation's own settings."""
    args, seen = make_args(script), []
    if script.ALGO == "sac_flow":

        def sample(params, stats, nets, args, obs, key, sigma, train=False):
            seen.append((key is None, sigma, train))
            np.testing.assert_array_equal(obs, [[1, 2]])  # standardised
            return jnp.zeros((1, 2)), None, None, None

        monkeypatch.setattr(script, "sample_action", sample)
        expected = dict(stochastic=(False, 0.1, False), deterministic=(True, 0.1, False))
    else:
        monkeypatch.setattr(script, "make_policy", random_policy(script, seen))
        modes = ("best-of-n", "one-step", "qgbs")
        expected = dict(gsflow={"": (0.2,)}, flowq={"n1": (1,), "n3": (3,)})
        expected |= dict(fmq={mode.replace("-", "_"): (mode,) for mode in modes})
        expected = expected[script.ALGO]
    parts = dict(params=dict(actor={}), stats=dict(actor={}))
    parts = parts if script.ALGO == "sac_flow" else {}
    state = make_state(script, obs_mean=jnp.ones(2), obs_std=jnp.full(2, 2.0), **parts)
    policies = script.evaluation_policies(None, args)
    for policy in policies.values():
        policy(state, jnp.asarray([3.0, 5.0]), jax.random.key(0))
    assert dict(zip(policies, seen, strict=True)) == expected


# ---- environments: steps t of an episode that is known by the number drawn at its start ----
class Walk(FuncEnv):
    """Observation: (t, the number). Terminates at 3 by an action above 0, is cut at 5."""

    max_episode_steps = 5
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def initial(self, rng, params=None):
        return jnp.stack([0.0, jax.random.uniform(rng), 0.0])  # t, the number, the last action

    def transition(self, state, action, rng=None, params=None):
        return jnp.stack([state[0] + 1, state[1], action[0]])

    def observation(self, state, rng=None, params=None):
        return state[:2]

    def reward(self, state, action, next_state, rng=None, params=None):
        return -next_state[0] - action[0] / 4

    def terminal(self, state, rng=None, params=None):
        return (state[0] == 3) & (state[2] > 0)


class HostWalk(gymnasium.Env):
    """The same as an official environment."""

    observation_space, action_space = Walk.observation_space, Walk.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.number = 0, self.np_random.random()
        return np.float32([0, self.number]), {}

    def step(self, action):
        self.t += 1
        over, cut = self.t == 3 and action[0] > 0, self.t == 5
        reward = np.float32(-self.t - np.float32(action[0]) / 4)
        return np.float32([self.t, self.number]), reward, over, cut and not over, {}


def walks(task, args, number, autoreset):
    """In place of make_host_envs: in this process, stepped in two calls."""

    class Walks(gymnasium.vector.SyncVectorEnv):
        def step_async(self, actions):
            self.asked = actions

        def step_wait(self):
            return self.step(self.asked)

    return Walks([HostWalk] * number, autoreset_mode=autoreset)


def counting_update(nets, args, objective="", clone=False):
    """In place of make_update: counts, and reports the phase's settings, or its objective."""
    code = {"mvp": 1.0, "fmq": 2.0}.get(objective, 0.0)

    def update(state, batch, key, *settings):
        numbers = jax.tree.leaves(settings) or [code]
        info = {f"setting{i}": jnp.float32(x) for i, x in enumerate(numbers)}
        return state.replace(step=state.step + 1), info

    return update


def start_of_training(script, monkeypatch, args, env):
    """What `train` sets up on these environments: (carry, phases)."""
    found = []

    def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
        net = {"actor": jnp.zeros(1)}
        parts = dict(params=net, obs_mean=obs_mean, obs_std=obs_std, seed=seed)
        fmq = dict(offline_actor=net["actor"], pessimistic=jnp.asarray(False))
        return make_state(script, **parts, **(fmq if script.ALGO == "fmq" else {}))

    def resume(carry, phases, args):
        found.extend((carry, phases))
        return carry, {}

    for name, stand_in in dict(
        make_jax_env=lambda *_: env, load_dataset=lambda *_: (raw_data(), "generated"),
        make_host_env=lambda *_: HostWalk(), make_host_envs=walks, make_update=counting_update,
        make_policy=random_policy(script, []), init_state=init_state, resume=resume,
        Run=lambda *_: SimpleNamespace(finish=lambda results: None), train_loop=lambda *_: None,
    ).items():  # fmt: skip
        monkeypatch.setattr(script, name, stand_in, raising=name != "make_update")
    script.train(args, script.parse_task("pointmaze-medium"))
    return found


RUNS = [
    pytest.param(name, kind, id=f"{name}-{kind}") for name in ONLINE for kind in ("jax", "host")
]


@pytest.mark.parametrize(
    "script,backend", [*RUNS, pytest.param("flowq", "jax", id="flowq-jax")], indirect=["script"]
)
def test_phases_and_stored_rows(script, monkeypatch, backend):
    """Each phase learns with its own settings, as often as the flags say; the replay holds what the
    environments did with the actions that were taken, through restarts too."""
    args = make_args(script)
    env = Walk() if backend == "jax" else None
    carry, phases = start_of_training(script, monkeypatch, args, env)
    assert phases[0].name == "offline" and (phases[0].start, phases[0].end) == (0, 3)
    data = phases[0].advance.inputs[0]
    if "discounts" in data:  # worked out for two steps, within an episode
        steps = np.where(np.arange(12) % 6 == 5, 1, 2)
        np.testing.assert_allclose(data["discounts"], args.gamma**steps, rtol=1e-5)
    else:  # sparse
        np.testing.assert_array_equal(data["rewards"], -1.0 * (np.arange(12) > 0))
    carry = phases[0].advance(phases[0].enter(carry), 3)
    number = lambda sums: sorted(k for k in sums if "setting" in k)
    found = [np.asarray(carry["sums"][k]) for k in number(carry["sums"])]
    expected = dict(gsflow=[(3, 0.25, 1), (5, 0.75, 1)], flowq=[(7,)], fmq=[(0,), (2,)])
    expected = expected.get(script.ALGO, [(4,), (6,)])
    for pairs, value in zip(found, expected[0], strict=True):
        np.testing.assert_array_equal(pairs, [[3 * value, 3]] * 2)
    if script.ALGO == "flowq":
        return
    offline_updates, envs = np.asarray(carry["state"].step), args.num_envs
    cuts = []
    for phase in phases[1:]:
        if backend == "host":
            cuts.append(phase.start - 3)
        carry, steps = phase.enter(carry), (phase.end - phase.start) // phase.stride
        if not carry["replay"]["added"][0]:  # a checkpoint holds no row before the first one
            assert not any(np.asarray(v).any() for v in carry["replay"]["rows"].values())
        carry = phase.advance(carry, steps // 2)
        if phase.restart:
            cuts.append(int(carry["replay"]["added"][0]))
            carry = phase.restart(carry)
        carry = phase.advance(carry, steps - steps // 2)
    updates = dict(gsflow=20 * 2 * 2, fmq=18 * 2 * 2, sac_flow=18 * 2)[script.ALGO]
    np.testing.assert_array_equal(carry["state"].step - offline_updates, updates)
    for k, before, value in zip(number(carry["sums"]), found, expected[1], strict=True):
        np.testing.assert_array_equal(carry["sums"][k] - before, [[updates * value, updates]] * 2)
    assert (carry["replay"]["added"] == 40).all()
    rows = {k: np.asarray(v)[:, :40] for k, v in carry["replay"]["rows"].items()}
    returns = check_rows(rows, envs, cuts, sparse=script.ALGO != "gsflow")
    if script.ALGO == "gsflow":
        np.testing.assert_allclose(carry["sums"]["online/return"], returns, rtol=1e-5)


@pytest.mark.parametrize("script", ONLINE, indirect=True)
def test_updates_run_while_simulators_step(script, monkeypatch):
    """Nothing acts on what updates under way will bring, wherever episodes end: in a block they
    begin behind the last chunk that is due, unless an episode ends later."""
    carry, phases = start_of_training(script, monkeypatch, make_args(script), None)
    loop, events, simulate = phases[-1].advance, [], script.simulate
    for name in ("act", "learn", "keep"):
        call = getattr(loop, name)
        note = lambda *x, name=name, call=call: events.append(name) or call(*x)
        monkeypatch.setattr(loop, name, note)

    def simulate_and_note(envs, method, *inputs, **options):
        out = simulate(envs, method, *inputs, **options)
        events.extend(["end"] if method == "step_wait" and (out[2] | out[3]).any() else [])
        return out

    monkeypatch.setattr(script, "simulate", simulate_and_note)
    for phase in phases[1:]:
        events.clear()
        carry = phase.advance(phase.enter(carry), (phase.end - phase.start) // phase.stride)
    blocks = " ".join(events).split(" keep")
    assert sum("learn" in block for block in blocks) == len(blocks) - 1 > 3
    late = [block.split("learn")[1].split("end")[0] for block in blocks[:-1]]
    assert not any("act" in block for block in late)
    if loop.play.steps > 1:  # and some chunk was due within a block
        assert any("act" in block.split("learn")[0][3:] for block in blocks[:-1])


@pytest.mark.parametrize("script", ONLINE, indirect=True)
def test_no_episode_begins_as_another(script, monkeypatch):
    """One environment whose episodes end after a step: each start is drawn by a key of its own."""
    monkeypatch.setattr(Walk, "max_episode_steps", 1)
    args = make_args(script, **({} if script.ALGO == "fmq" else dict(num_envs=1)))
    carry, phases = start_of_training(script, monkeypatch, args, Walk())
    for phase in phases[1:]:
        carry = phase.advance(phase.enter(carry), (phase.end - phase.start) // phase.stride)
    starts = np.asarray(carry["replay"]["rows"]["obs"])[:, :40, 1]
    assert len(np.unique(starts)) == starts.size == 2 * 40


def check_rows(rows, envs, cuts, sparse):
    """Rows (seeds, 40) of `envs` environments in turn; at the rows `cuts` all episodes began.
    Returns the sum of the returns of the episodes that ended by themselves, and their number."""
    obs, next_obs, actions = rows["obs"], rows["next_obs"], rows["actions"][..., 0]
    t, episode = obs[..., 0], obs[..., 1]
    np.testing.assert_array_equal(next_obs[..., 0], t + 1)
    np.testing.assert_array_equal(next_obs[..., 1], episode)
    reward = np.float32(-1) if sparse else -(t + 1) - actions / 4
    np.testing.assert_allclose(rows["rewards"], np.broadcast_to(reward, t.shape), rtol=1e-6)
    over, cut = (t == 2) & (actions > 0), t == 4
    restarted = np.zeros(t.shape, bool)
    for row in cuts:
        restarted[:, max(0, row - envs) : row] = True
    ends = over | cut | restarted
    np.testing.assert_array_equal(rows["masks"], 1.0 - over)
    np.testing.assert_array_equal(rows["terminals"], ends)
    assert over.any() and cut.any() and (ends & ~over & ~cut).any() == bool(cuts)
    begins = np.concatenate([np.ones_like(ends[:, :envs]), ends[:, :-envs]], axis=1)
    before = np.concatenate([t[:, :envs], t[:, :-envs]], axis=1)
    np.testing.assert_array_equal(t, np.where(begins, 0, before + 1))
    numbers = episode[begins]  # no episode of any seed or environment begins like another
    assert len(set(numbers.tolist())) == len(numbers) > 15
    assert len(set(actions.ravel().tolist())) == actions.size  # each drawn with a key of its own
    total, so_far = 0.0, np.zeros((2, envs))
    for first in range(0, 40, envs):
        now = slice(first, first + envs)
        so_far = np.where(begins[:, now], 0, so_far) - (t[:, now] + 1) - actions[:, now] / 4
        total = total + (so_far * (over | cut)[:, now]).sum(axis=1)
    return np.stack([total, (over | cut).sum(axis=1)], axis=1)


class Seeded(NamedTuple):
    seed: jax.Array


@pytest.mark.parametrize("backend", ["jax", "host"])
def test_episodes_of_evaluation(gsflow, monkeypatch, backend):
    """Others for each seed, step and number; those of seed 1 are the same alone and beside seed 0.
    One policy acts by the start alone, another by its key alone."""
    monkeypatch.setattr(gsflow, "make_host_envs", walks)
    task = gsflow.Task("walk", "walk", success=False)
    by_start = lambda state, obs, key: obs[1:] - 0.5
    by_key = lambda state, obs, key: jax.random.uniform(key, (1,), minval=-1)
    results = {}
    for seed, number in ((0, 2), (1, 1)):
        args = SimpleNamespace(seed=seed, num_seeds=number, eval_episodes=4)
        args.env_backend, args.success_timing = "auto", "post"
        env, policies = Walk() if backend == "jax" else None, dict(start=by_start, key=by_key)
        evaluate = gsflow.make_evaluate(task, env, policies, args)
        state = Seeded(jnp.arange(number, dtype=jnp.int32) + seed)
        for step in (0, 7):
            results[number, step] = evaluate(state, step)
    for mode in ("start", "key"):
        returns = np.stack([results[2, step][f"return_{mode}"] for step in (0, 7)])
        lengths = np.stack([results[2, step][f"length_{mode}"] for step in (0, 7)])
        assert returns.shape == (2, 2, 4) and len(set(returns.ravel().tolist())) == 16
        assert set(lengths.ravel().tolist()) == {3, 5}
        assert (np.abs(returns + lengths * (lengths + 1) / 2) <= lengths / 4).all()
        for step in (0, 7):
            alone, beside = results[1, step], results[2, step]
            for kind in (f"return_{mode}", f"length_{mode}"):
                np.testing.assert_allclose(alone[kind][0], beside[kind][1], rtol=1e-5)


def test_success_timing_reaches_the_environments(gsflow, monkeypatch):
    made, task = [], gsflow.parse_task("pointmaze-medium")

    def make(name, **options):
        made.append(options)
        return HostWalk()

    monkeypatch.setattr(gymnasium, "make", make)
    for timing in ("pre", "post"):
        args = gsflow.Args(success_timing=timing)
        assert gsflow.make_jax_env(task, args).success_timing == timing
        gsflow.make_host_envs(task, args, 1, gymnasium.vector.AutoresetMode.SAME_STEP)
    assert made == [{"success_timing": "pre"}, {"success_timing": "post"}]


# ---- the loop and its runs ----
def test_training_loop(gsflow):
    """A phase is entered at its start alone, and begins new episodes before each checkpoint. The
    evaluation at a phase's end is of all modes, and the last one is returned."""
    add = lambda word: lambda carry: carry | {"trace": carry["trace"] + word}
    offline = gsflow.Phase("offline", 0, 4, None, add("o"))
    online = gsflow.Phase("online", 4, 8, None, add("n"), restart=add("r"))

    class Run:
        signal, task = None, SimpleNamespace(parts={})

        def __init__(self, step):
            self.step, self.saved, self.logged = step, [], []

        def dispatch(self, carry):
            self.step += 2
            return add(".")(carry), False, self.step % 4 == 0 or self.step == 6, True

        def catch_up(self, evaluate, state):
            return None

        def evaluate(self, evaluate, state, every):
            return SimpleNamespace(result=lambda now=(state, self.step, every): now)

        def log(self, carry, evaluation):
            self.logged.append(evaluation.result())
            return carry

        def save(self, carry):
            self.saved.append(carry["trace"])

    for step, trace in ((0, ["o.", "o..", "o..n.r", "o..n.r.r"]), (6, [".r"])):
        run, carry = Run(step), dict(state="state", trace="")
        assert gsflow.train_loop(run, carry, [offline, online], None, None)[1:] == (8, True)
        assert run.saved == trace
        assert [result[1:] for result in run.logged] == [
            pair for pair in ((4, True), (6, False), (8, True)) if pair[0] > step
        ]


def test_resume_enters_its_phase(gsflow, tmp_path):
    """A checkpoint is restored into the phase that wrote it: at a boundary the one before, which
    has no replay yet; where there are restarts, new episodes begin."""
    online = dict(enter=lambda carry: carry | {"replay": jnp.zeros(1)})
    online |= dict(restart=lambda carry: carry | {"restarted": True})
    phases = [gsflow.Phase("offline", 0, 4, None), gsflow.Phase("online", 4, 8, None, **online)]
    args = SimpleNamespace(resume=str(tmp_path), start_from="")
    for step, more in ((4, {}), (6, {"replay": 2.0})):
        saved = {k: np.full(1, v, np.float32) for k, v in ({"state": 1.0} | more).items()}
        gsflow.save_checkpoint(tmp_path, saved, {"step": step})
        carry, facts = gsflow.resume({"state": jnp.zeros(1)}, phases, args)
        assert facts == {"step": step} and carry.pop("restarted", False) == (step == 6)
        assert carry == saved


def test_seeds_begin_at_the_flag(gsflow, monkeypatch):
    init = lambda args, obs_dim, act_dim, mean, std, seed: seed
    monkeypatch.setattr(gsflow, "init_state", init)
    states = gsflow.start_states(gsflow.Args(seed=5, num_seeds=3), 1, 1, None, None)
    np.testing.assert_array_equal(states, [5, 6, 7])


def test_last_three_evaluations(gsflow, tmp_path):
    """Their mean over the seeds that did not diverge, of more evaluations than three."""
    run = object.__new__(gsflow.Run)
    vars(run).update(
        evals=[[0.0, 9.0, 0.0], [1.0, 9.0, 3.0], [2.0, 9.0, 4.0], [6.0, 9.0, 5.0]], left=[0, 2],
        metrics=["success"], members=gsflow.members(gsflow.Args(num_seeds=3)), diverged={"1": 2},
        step=8, dir=tmp_path, train_seconds=1.0, updates_per_s=1.0,
        facts=dict(dataset_source="own", device="cpu", commit=None),
    )  # fmt: skip
    run.finish({"success": np.array([[1.0], [0.0], [0.0]])})
    result = gsflow.json.loads((tmp_path / "result.json").read_text())
    assert result["eval/success_last_three"] == 3.5 and result["eval/success"] == 0.5
    assert result["seeds"] == [0, 2]
