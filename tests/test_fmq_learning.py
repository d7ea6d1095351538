"""fmq.py learns: the reference flow map, the guided step, probe problems, the point maze."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, load_script

pytestmark = pytest.mark.optimised
GAMMA = 0.8


@pytest.fixture(scope="module")
def fmq():
    return load_script(ROOT / "algos" / "fmq.py")


def make_args(fmq, **flags):
    flags = dict(online_steps=0, hidden_dims=(64, 64), learning_rate=1e-3) | flags
    return fmq.resolve(fmq.Args(**flags), fmq.parse_task("pointmaze-medium"))


# ---- the flow map of a Gaussian ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eulerian", "semigroup", "lagrangian"])
def test_one_jump_draws_from_the_data(fmq, kind):  # L1
    """a_1 ~ N(0.5, 0.3): X_{0,1}(a_0) = 0.5 + 0.3 a_0. Three seeds."""
    args = make_args(
        fmq, horizon=1, consistency=kind, consistency_warmup=200, consistency_anneal_end=2_000
    )
    nets, adam = fmq.make_networks(args, 1), optax.adam(args.learning_rate)

    def step(carry, number):
        params, opt_state, key = carry
        key, data_key, loss_key = jax.random.split(key, 3)
        actions = 0.5 + 0.3 * jax.random.normal(data_key, (256, 1))
        batch = dict(obs=jnp.zeros((256, 1)), actions=actions, valid=jnp.ones((256, 1)))
        keys = dict(zip(fmq.DRAWS, jax.random.split(loss_key, len(fmq.DRAWS)), strict=True))

        def loss(params):
            fixed = (params["actor"], nets, args, "offline", batch, number, keys)
            return fmq.actor_loss(params, *fixed)[0]

        updates, opt_state = adam.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state, key), None

    def train(seed):
        params = fmq.init_params(args, 1, 1, jax.random.key(seed))
        carry = (params, adam.init(params), jax.random.key(seed + 10))
        (params, _, _), _ = jax.lax.scan(step, carry, jnp.arange(1, 4_001))
        noise = jax.random.normal(jax.random.key(99), (4_000, 1))
        jump = nets.actor(params["actor"], jnp.zeros((4_000, 1)), noise, 0.0, 1.0)
        return noise, noise + jump  # before the clip to the box

    noise, ends = jax.jit(jax.vmap(train))(jnp.arange(3))
    for x, end in zip(noise, ends, strict=True):
        assert abs(end.mean() - 0.5) < 0.1 and 0.2 < end.std() < 0.55
        assert jnp.sqrt(jnp.mean((end - 0.5 - 0.3 * x) ** 2)) < 0.25


# ---- the step of FMQ ----


@pytest.mark.slow
def test_guided_step_is_learned(fmq):  # L2
    """Q = 3 a_1 + 4 a_2: u - u_off at r = 0 becomes (0.6, 0.8)."""
    args = make_args(fmq, horizon=1, beta=0.0, eta=1.0)
    critic = lambda params, obs, chunk: jnp.stack([chunk @ jnp.array([3.0, 4.0])] * 2)
    nets, adam = fmq.make_networks(args, 2)._replace(critic=critic), optax.adam(1e-3)
    offline = fmq.init_params(args, 1, 2, jax.random.key(0))["actor"]
    obs, valid = jnp.zeros((256, 1)), jnp.ones((256, 1))

    def step(carry, key):
        actor, opt_state = carry
        keys = jax.random.split(key, 3)
        actions = jax.random.uniform(keys[0], (256, 2), minval=-1)
        noise, r = jax.random.normal(keys[1], (256, 2)), jax.random.uniform(keys[2], (256, 1))
        batch = dict(obs=obs, actions=actions, valid=valid)

        def loss(actor):
            params = dict(actor=actor, critic=None)
            return fmq.fmq_loss(params, offline, nets, args, batch, noise, r)[0]

        value, grad = jax.value_and_grad(loss)(actor)
        updates, opt_state = adam.update(grad, opt_state)
        return (optax.apply_updates(actor, updates), opt_state), value

    keys = jax.random.split(jax.random.key(1), 1_500)
    (actor, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))(
        (offline, adam.init(offline))
    )
    np.testing.assert_allclose(losses[0], 0.5, atol=1e-6)
    assert losses[-1] < 1e-4
    noise = jax.random.normal(jax.random.key(2), (256, 2))
    moved = nets.actor(actor, obs, noise, 0.0, 1.0) - nets.actor(offline, obs, noise, 0.0, 1.0)
    np.testing.assert_allclose(moved.mean(axis=0), [0.6, 0.8], atol=0.01)


# ---- probe problems: chunks of two actions ----


def probe(reward, mask, terminal):
    """Windows (s, a, a'): obs +-1, uniform actions; reward of the second row, of (s, a')."""
    rng, rows = np.random.default_rng(0), 1_000
    obs = np.repeat(rng.choice([-1.0, 1.0], rows // 2), 2)
    action, second = rng.uniform(-1, 1, rows), np.arange(rows) % 2 == 1
    raw = dict(observations=obs[:, None], next_observations=obs[:, None])
    raw |= dict(actions=action[:, None], rewards=np.where(second, reward(obs, action), 0.0))
    raw |= dict(masks=np.where(second, mask, 1.0), terminals=np.where(second, terminal, 0.0))
    return {k: v.astype(np.float32) for k, v in raw.items()}


@functools.cache
def learner(fmq, objective):
    args = make_args(
        fmq, horizon=2, hidden_dims=(32, 32), learning_rate=2e-3, tau=0.05, gamma=GAMMA,
        num_samples=8, num_seeds=2, consistency_warmup=100, consistency_anneal_end=500,
        normalize_obs=False, eta=0.5,
    )  # fmt: skip
    nets = fmq.make_networks(args, 1)

    return args, nets, fmq.Program(fmq.make_learn(nets, args, objective), None)


def learn_probe(fmq, raw, steps, objective="offline"):
    """Train two seeds on the rows -> (state before, state after)."""
    args = learner(fmq, objective)[0]
    state = fmq.start_states(args, 1, 1, jnp.zeros(1), jnp.ones(1))
    before = jax.tree.map(jnp.copy, state)
    return before, go_on(fmq, state, raw, steps, objective)


def go_on(fmq, state, raw, steps, objective):
    """The state of two seeds after so many updates on the rows."""
    program = learner(fmq, objective)[2]
    program.inputs = (fmq.device_rows(raw),)
    sums = fmq.zero_sums(program.step, {"state": state}, *program.inputs)
    return program(dict(state=state, sums=sums), steps)["state"]


OBS, CHUNKS = np.float32([[-1], [-1], [1], [1]]), np.float32([[0.3, -0.8], [0, 0.8]] * 2)


def check_values(fmq, states, expected, tolerance=0.12):
    """Q of both members and seeds; the untrained networks are far from it."""
    nets = learner(fmq, "offline")[1]
    value = jax.jit(jax.vmap(lambda s: nets.critic(s.params["critic"], OBS, CHUNKS)))
    before, after = value(states[0]), value(states[1])
    assert np.abs(after - np.asarray(expected)).max() < tolerance, after
    assert np.abs(before - np.asarray(expected)).max() > 3 * tolerance


@pytest.mark.slow
def test_constant_reward(fmq):
    states = learn_probe(fmq, probe(lambda s, a: 1.0, 0, 1), 600)
    check_values(fmq, states, GAMMA)


@pytest.mark.slow
def test_reward_of_the_observation(fmq):
    states = learn_probe(fmq, probe(lambda s, a: s, 0, 1), 800)
    check_values(fmq, states, GAMMA * OBS[:, 0])


@pytest.mark.slow
def test_time_limits_bootstrap(fmq):
    """Reward 1 every second step for ever: Q = 0.8 + 0.64 Q = 2.22; ended by success: 0.8."""
    states = learn_probe(fmq, probe(lambda s, a: 1.0, 1, 1), 1_500)
    check_values(fmq, states, GAMMA / (1 - GAMMA**2), tolerance=0.25)


@pytest.mark.slow
def test_reward_of_the_action(fmq):
    """The best second action is 0.5. The critic learns it; the behaviour clone stays spread out;
    best-of-n and beam search find it; FMQ moves the one-step policy towards it."""
    raw = probe(lambda s, a: 1 - (a - 0.5) ** 2, 0, 1)
    before, offline = learn_probe(fmq, raw, 1_500)
    check_values(fmq, (before, offline), GAMMA * (1 - (CHUNKS[:, 1] - 0.5) ** 2), 0.15)
    args, nets, _ = learner(fmq, "fmq")
    online = jax.tree.map(jnp.copy, offline)
    online = online.replace(offline_actor=jax.tree.map(jnp.copy, offline.params["actor"]))
    online = go_on(fmq, online, raw, 1_000, "fmq")
    policy = fmq.make_policy(nets, args)

    def second_actions(state, mode):
        act = lambda s, key: policy(s, jnp.ones(1), key, mode)
        many = jax.vmap(act, (None, 0))
        chunks = jax.jit(jax.vmap(many, (0, None)))(state, jax.random.split(jax.random.key(0), 300))
        return np.asarray(chunks[..., 1])

    error = {
        (name, mode): np.abs(second_actions(state, mode) - 0.5).mean()
        for name, state in (("offline", offline), ("online", online))
        for mode in ("one-step", "best-of-n", "qgbs")
    }
    assert 0.4 < error["offline", "one-step"] < 0.8, error  # uniform actions: 0.625
    assert error["offline", "best-of-n"] < 0.2 and error["offline", "qgbs"] < 0.2, error
    # a step of 0.5 towards 0.5 from uniform actions: on average 0.375 instead of 0.625
    assert error["online", "one-step"] < 0.75 * error["offline", "one-step"], error


# ---- the point maze ----


@pytest.mark.slow
def test_point_maze_is_solved(tmp_path):
    flags = "--offline-steps 5000 --online-steps 1000 --learning-starts 200 --eval-episodes 20"
    command = [sys.executable, str(ROOT / "algos" / "fmq.py"), *flags.split()]
    out = subprocess.run([*command, "--out-dir", tmp_path], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    (run,) = tmp_path.iterdir()
    result = json.loads((run / "result.json").read_text())
    assert max(result[f"eval/success_{m}"] for m in ("one_step", "best_of_n", "qgbs")) >= 0.8
    assert result["eval/success_best_of_n"] >= 0.7


@pytest.mark.slow
def test_untrained_policy_fails(fmq):
    args, task = make_args(fmq, eval_episodes=10), fmq.parse_task("pointmaze-medium")
    state = fmq.start_states(args, 2, 2, jnp.zeros(2), jnp.ones(2))
    policies = fmq.evaluation_policies(fmq.make_networks(args, 2), args)
    results = fmq.make_evaluate(task, fmq.make_jax_env(task, args), policies, args)(state, 0)
    for mode in ("one_step", "best_of_n", "qgbs"):
        assert results[f"success_{mode}"].mean() <= 0.02
