"""FlowQ on problems whose answer is known: Gaussians, a mixture of two, a bandit, probes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, load_script
from helpers import make_carry

pytestmark = pytest.mark.optimised
FIXED = [(f, s) for f in ("score", "drop-time", "field") for s in ("t", "t2", "t2_over_1mt")]
SCHEDULES = ("t", "t2", "t2_over_1mt")
energy_toy = load_script(ROOT / "benchmark" / "tasks" / "energy_toy.py")
ONE = np.ones(1)  # slope of Q = x in one dimension


@pytest.fixture(scope="module")
def flowq():
    return load_script(ROOT / "algos" / "flowq.py")


@pytest.fixture(scope="module")
def toy():
    return load_script(ROOT / "benchmark" / "flowq_toy.py")


def gaussian(toy, s):
    return toy.Mixture(np.ones(1), np.zeros((1, 1)), s)


def two_modes(toy):
    return toy.Mixture(np.full(2, 0.5), energy_toy.TOY_MEANS, energy_toy.TOY_STD)


def resolved(flowq, **flags):
    args = flowq.Args(**(dict(env_id="energy-toy") | flags))
    return flowq.resolve(args, flowq.parse_task(args.env_id))


def make_networks(flowq, args, dim):
    return flowq.make_networks(args, dim, flowq.parse_task(args.env_id))


def prepare(flowq, raw, args):
    return flowq.prepare(raw, args, flowq.parse_task(args.env_id))


# ---- one Gaussian, Q = x, lambda = 1: final means ----
MEANS = {  # rows of s = 1, 0.5, 0.2
    ("score", "t"): (0.623, 0.372, 0.173),
    ("score", "t2"): (0.217, 0.147, 0.076),
    ("score", "t2_over_1mt"): (0.623, 0.489, 0.320),
    ("drop-time", "t"): (0.217, 0.147, 0.076),
    ("drop-time", "t2"): (0.109, 0.080, 0.045),
    ("drop-time", "t2_over_1mt"): (0.406, 0.342, 0.244),
    ("field", "t"): (0.188, 0.079, 0.021),
    ("field", "t2"): (0.109, 0.053, 0.016),
    ("field", "t2_over_1mt"): (0.435, 0.293, 0.152),
}
D_MEANS = {
    "t": (0.029, 0.068, 0.056),
    "t2": (0.000, 0.027, 0.029),
    "t2_over_1mt": (-0.029, 0.049, 0.091),
}
STDS = (1.0, 0.5, 0.2)


def optimal_weight(s):
    return lambda t: s**2 * (1 - t) / (t**2 * s**2 + (1 - t) ** 2)


def quadrature(c, s, n=200_000):
    """s * integral of c / sqrt(v), by midpoints: the final mean of a form with weight c."""
    t = (np.arange(n) + 0.5) / n
    return s * (c(t) / np.sqrt((t * s) ** 2 + (1 - t) ** 2)).mean()


def ends(toy, field, dim=1, n=20_000):
    return toy.integrate(field, np.random.default_rng(0).standard_normal((n, dim)))


@pytest.mark.parametrize("form,schedule", FIXED)
def test_final_mean_of_a_gaussian(flowq, toy, form, schedule):
    """The table, by quadrature and by particles in the exact velocity field."""
    c = flowq.GUIDANCE[form][schedule]
    for s, expected in zip(STDS, MEANS[form, schedule], strict=True):
        assert abs(quadrature(c, s) - expected) < 6e-4
        x = ends(toy, toy.guided_field(gaussian(toy, s), ONE, 1.0, c))
        assert abs(x.mean() - expected) < 0.015
        assert abs(x.std() - s) < 0.015


def test_closed_form_of_one_entry(flowq):
    for schedule in ("t", "t2_over_1mt"):
        mean = quadrature(flowq.GUIDANCE["score"][schedule], 1.0)
        assert abs(mean - np.arcsinh(1) / np.sqrt(2)) < 1e-6


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_controls_on_a_gaussian(toy, schedule):
    """G, the exact velocity of the guided path, gives no guidance at all; D hardly any."""
    for s, expected in zip(STDS, D_MEANS[schedule], strict=True):
        p = gaussian(toy, s)
        assert abs(ends(toy, toy.control_field(p, ONE, 1.0, schedule, exact=True)).mean()) <= 0.02
        mean = ends(toy, toy.control_field(p, ONE, 1.0, schedule, exact=False)).mean()
        assert abs(mean - expected) < 0.015


@pytest.mark.parametrize("s", STDS)
def test_oracle_weight_gives_the_exact_tilt(toy, s):
    c = optimal_weight(s)
    assert abs(quadrature(c, s) - s**2) < 1e-6
    x = ends(toy, toy.guided_field(gaussian(toy, s), ONE, 1.0, c))
    assert abs(x.mean() - s**2) < 0.01


# ---- the script's sampler on exact fields ----
FACTORS = {5: (0.77, 0.74, 0.57), 10: (0.88, 0.86, 0.77), 20: (0.94, 0.93, 0.88)}


@pytest.mark.parametrize("flow_steps", FACTORS)
def test_euler_steps(flowq, toy, flow_steps):
    """Particles against the recursion for mean and spread; the spread that few steps lose."""
    args = resolved(flowq, flow_steps=flow_steps)
    x = np.random.default_rng(0).standard_normal((500, 1))
    for s, factor in zip(STDS, FACTORS[flow_steps], strict=True):
        for form, schedule in FIXED:
            c = flowq.GUIDANCE[form][schedule]

            def beta(t, s=s):
                return (t * s**2 - (1 - t)) / ((t * s) ** 2 + (1 - t) ** 2)

            field = lambda p, obs, x, t, b=beta, c=c: b(t) * x + 0.7 * c(t)
            nets = flowq.Networks(1, np.inf, critic=None, velocity=field)
            out = flowq.flow_endpoint(None, nets, None, jnp.asarray(x), args)
            expected, spread = x, 1.0
            for k in range(flow_steps):
                t = k / flow_steps
                expected = (1 + beta(t) / flow_steps) * expected + 0.7 * c(t) / flow_steps
                spread *= 1 + beta(t) / flow_steps
            np.testing.assert_allclose(out, expected, atol=1e-5)
        assert abs(spread / s - factor) < 0.005


def test_few_euler_steps_undercount_late_guidance(toy):
    """s = 1: means after K = 5 and 10 left-end steps for c = t and c = 1 - t."""
    expected = {"late": (0.449, 0.530), "early": (0.666, 0.644)}
    for name, c in (("late", lambda t: t), ("early", lambda t: 1 - t)):
        for k, mean in zip((5, 10), expected[name], strict=True):
            x = np.zeros((1, 1))
            for i in range(k):
                t = i / k
                x = x + (toy.velocity(gaussian(toy, 1.0), x, t) + c(t)) / k
            assert abs(x[0, 0] - mean) < 6e-4


# ---- trained flows ----
def train_flow(flowq, data, args, nets):
    """Final state of one run of the script's update on the data."""
    settings = flowq.Settings(jnp.float32(args.guidance_lambda))
    carry = make_carry(flowq, args, data, nets, settings)
    program = flowq.Program(flowq.make_learn(nets, args), data, settings)
    carry = program(carry, args.offline_steps)
    return jax.tree.map(lambda x: x[0], carry["state"])


def draw_flow(flowq, state, nets, args, dim, n=20_000):
    noise, obs = jax.random.normal(jax.random.key(5), (n, dim)), jnp.zeros((n, 1))
    sample = jax.jit(lambda ema: flowq.flow_endpoint(ema, nets, obs, noise, args))
    return np.float64(sample(state.ema))


def bandit_rows(actions):
    n = len(actions)
    return dict(
        observations=np.zeros((n, 1), np.float32),
        next_observations=np.zeros((n, 1), np.float32),
        actions=np.float32(actions),
        rewards=np.float32(actions[:, -1]),
        masks=np.zeros(n, np.float32),
        terminals=np.ones(n, np.float32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("form,schedule", [*FIXED[:3], FIXED[5], FIXED[8]])
def test_trained_flow_of_a_gaussian(flowq, form, schedule):
    """s = 0.5, through the script's policy loss, optimiser, averaging and sampler."""
    args = resolved(
        flowq, velocity_form=form, schedule=schedule, hidden_dims=(128, 128), batch_size=512,
        offline_steps=4_000, learning_rate=2e-3,
    )  # fmt: skip
    actions = 0.5 * np.random.default_rng(0).standard_normal((200_000, 1))
    slope_one = lambda p, obs, a: jnp.stack([a[..., 0]] * 2)
    nets = make_networks(flowq, args, 1)._replace(critic=slope_one)
    state = train_flow(flowq, prepare(flowq, bandit_rows(actions), args), args, nets)
    x = draw_flow(flowq, state, nets, args, 1)
    assert abs(x.mean() - MEANS[form, schedule][1]) < 0.03
    assert abs(x.std() - 0.5) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("form, upper, moved", [("score", 0.699, 0.117), ("weighted", 0.881, 0.04)])
def test_trained_flow_of_two_modes(flowq, toy, form, upper, moved):
    """energy-toy as the script runs it, lambda = 1, against the table's row for S and h = t; and
    weighted rows, which sample the exact posterior."""
    args = resolved(flowq, velocity_form=form)
    nets = make_networks(flowq, args, 2)
    data = prepare(flowq, energy_toy.toy_dataset(seed=0), args)
    x = draw_flow(flowq, train_flow(flowq, data, args, nets), nets, args, 2)
    exact = toy.tilt_linear(two_modes(toy), toy.B, 1.0).sample(np.random.default_rng(0), len(x))
    mass, shift, _, _ = toy.figures(x, exact)
    assert abs(mass - upper) < 0.03 and abs(shift - moved) < 0.04


# ---- two modes, exact fields ----
TABLE = {  # upper mass, shift, W1 at lambda = 1 and 2
    ("score", "t"): ((0.699, 0.117, 0.34), (0.854, 0.261, 0.32)),
    ("score", "t2"): ((0.558, 0.053, 0.63), (0.609, 0.112, 0.70)),
    ("score", "t2_over_1mt"): ((0.610, 0.275, 0.51), (0.702, 0.559, 0.63)),
    ("score", "learned"): ((0.734, 0.127, 0.28), (0.795, 0.191, 0.37)),
    ("drop-time", "t2_over_1mt"): ((0.548, 0.224, 0.58), (0.602, 0.447, 0.71)),
    ("field", "t"): ((0.584, 0.007, 0.63), (0.677, 0.007, 0.69)),
    ("field", "t2_over_1mt"): ((0.614, 0.111, 0.48), (0.726, 0.233, 0.49)),
    "none": ((0.50, 0.00, 0.81), (0.50, 0.00, 1.04)),
    "G": ((0.50, 0.00, 0.81), (0.50, 0.00, 1.04)),
    "D": ((0.428, 0.117, 0.83), (0.361, 0.226, 1.11)),
}


@pytest.mark.slow
@pytest.mark.parametrize("lam", [1.0, 2.0])
@pytest.mark.parametrize("arm", TABLE, ids=str)
def test_two_modes(flowq, toy, arm, lam):
    p = two_modes(toy)
    exact = toy.tilt_linear(p, toy.B, lam).sample(np.random.default_rng(1), 20_000)
    if arm == "none":
        field = toy.guided_field(p, toy.B, 0.0, lambda t: 0)
    elif arm in ("G", "D"):
        field = toy.control_field(p, toy.B, lam, "t2_over_1mt", exact=arm == "G")
    elif arm[1] == "learned":
        fit = toy.fitted_weights(p, toy.B, lam, 50, np.random.default_rng(2), 50_000)
        field = toy.guided_field(p, toy.B, lam, lambda t: np.interp(t, *fit))
    else:
        field = toy.guided_field(p, toy.B, lam, flowq.GUIDANCE[arm[0]][arm[1]])
    mass, shift, _, w1 = toy.figures(ends(toy, field, dim=2), exact)
    expected = TABLE[arm][int(lam) - 1]
    assert abs(mass - expected[0]) < 0.02 and abs(shift - expected[1]) < 0.02
    assert abs(w1 - expected[2]) < 0.04
    if arm == "D":
        assert mass < 0.48  # the wrong side


def test_exact_posteriors(toy):
    """Linear and quadratic energies against importance weights; the toy's closed form."""
    p, rng = two_modes(toy), np.random.default_rng(0)
    for lam in (1.0, 2.0):
        tilted = toy.tilt_linear(p, toy.B, lam)
        upper = 1 / (1 + np.exp(-2 * lam))
        np.testing.assert_allclose(tilted.weights, [upper, 1 - upper], atol=1e-12)
        np.testing.assert_allclose(tilted.means - p.means, [[0, 0.04 * lam]] * 2, atol=1e-12)
    x, b = p.sample(rng, 400_000), np.array([0.7, -0.4])
    tilted = toy.tilt_linear(p, b, 1.5)
    weight = toy.softmax(1.5 * x @ b)
    np.testing.assert_allclose(weight @ x, tilted.weights @ tilted.means, atol=0.01)
    matrix, centre = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.3, 0.4])
    weights, means, covariance = toy.tilt_quadratic(p, matrix, centre, 1.3)
    gap = x - centre
    weight = toy.softmax(-1.3 * np.einsum("ni,ij,nj->n", gap, matrix, gap) / 2)
    up = x[:, 1] > 0
    np.testing.assert_allclose(weight @ up, weights[0], atol=0.01)
    mean = weight[up] @ x[up] / weight[up].sum()
    np.testing.assert_allclose(mean, means[0], atol=0.01)
    spread = np.cov(x[up].T, aweights=weight[up])
    np.testing.assert_allclose(spread, covariance, atol=2e-3)


def test_plain_velocity_is_the_conditional_mean(toy):
    """E[a - eps | x_t] by brute force in a thin slab."""
    p = toy.Mixture(np.array([0.3, 0.7]), np.array([[1.0], [-0.5]]), 0.3)
    rng, t = np.random.default_rng(0), 0.6
    a, eps = p.sample(rng, 2_000_000), rng.standard_normal((2_000_000, 1))
    x = t * a + (1 - t) * eps
    for at in (-0.6, 0.0, 0.5):
        near = np.abs(x - at) < 0.01
        assert abs((a - eps)[near].mean() - toy.velocity(p, np.array([[at]]), t)[0, 0]) < 0.03


# ---- why the literal reading gives no guidance ----
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_exact_velocity_of_the_guided_path(toy, schedule, t):
    """Form G's target is the time derivative of the guided path, at its own point and at any
    other; non-quadratic Q, three dimensions, sigma = 1 - (1 - sigma_min) t."""
    lam, low = 1.7, 0.05
    rng = np.random.default_rng(0)
    a, eps, w = rng.standard_normal((3, 3))

    def gradient(y):  # of Q = sin(w.y) + sum y^4 / 4
        return np.cos(w @ y) * w + y**3

    def hessian_times(y, v):
        return -np.sin(w @ y) * (w @ v) * w + 3 * y**2 * v

    def path(t):
        h, sigma = toy.h_and_slope(schedule, t)[0], 1 - (1 - low) * t
        return t * a + lam * h * sigma**2 * gradient(t * a) + sigma * eps

    numeric = (path(t + 1e-5) - path(t - 1e-5)) / 2e-5
    (h, slope), sigma, decay = toy.h_and_slope(schedule, t), 1 - (1 - low) * t, -(1 - low)
    g, bend = gradient(t * a), hessian_times(t * a, a)
    on_path = a + decay * eps + lam * (slope * sigma**2 + 2 * h * sigma * decay) * g
    on_path = on_path + lam * h * sigma**2 * bend
    in_field = a + decay / sigma * (path(t) - t * a)
    in_field = in_field + lam * (slope * sigma**2 + h * sigma * decay) * g
    in_field = in_field + lam * h * sigma**2 * bend
    np.testing.assert_allclose(on_path, numeric, atol=1e-6)
    np.testing.assert_allclose(in_field, on_path, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_slope_of_the_schedules(toy, schedule):
    t, d = np.linspace(0.05, 0.95, 19), 1e-6
    numeric = (toy.h_and_slope(schedule, t + d)[0] - toy.h_and_slope(schedule, t - d)[0]) / (2 * d)
    np.testing.assert_allclose(toy.h_and_slope(schedule, t)[1], numeric, rtol=1e-6)


# ---- learned schedule ----
@pytest.mark.parametrize("s", STDS)
def test_fitted_weights_find_the_oracle(toy, s):
    """R1 with the exact plain velocity; at lambda = 0 nothing is defined, so 0."""
    t, c = toy.fitted_weights(gaussian(toy, s), ONE, 1.0, 20, np.random.default_rng(0))
    assert np.abs(c - optimal_weight(s)(t)).max() < 0.03
    assert (toy.fitted_weights(gaussian(toy, s), ONE, 0.0, 20, None)[1] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("s", STDS)
def test_learned_schedule_finds_the_oracle(flowq, s):
    """R2, the script's own loss, with the exact plain velocity as base flow."""
    args = resolved(flowq, schedule="learned")
    v = lambda t: (t * s) ** 2 + (1 - t) ** 2
    nets = make_networks(flowq, args, 1)._replace(
        critic=lambda p, obs, a: jnp.stack([a[..., 0]] * 2),
        base=lambda p, obs, x, t: (t * s**2 - (1 - t)) / v(t) * x,
    )
    params = flowq.init_params(args, 1, 1, jax.random.key(0))
    state = flowq.start_states(args, 1, 1, jnp.zeros(1), jnp.ones(1))
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, 3_000))
    settings = flowq.Settings(jnp.float32(1.0))

    def step(i, loop):
        theta, moments = loop
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), 3)
        batch = dict(obs=jnp.zeros((1024, 1)), actions=s * jax.random.normal(keys[0], (1024, 1)))
        eps, t = jax.random.normal(keys[1], (1024, 1)), jax.random.uniform(keys[2], (1024, 1))

        def loss(theta):
            learned = params | {"schedule": theta}
            return flowq.schedule_loss(learned, state, batch, eps, t, settings, nets, args)[0]

        move, moments = adam.update(jax.grad(loss)(theta), moments)
        return optax.apply_updates(theta, move), moments

    train = jax.jit(lambda p: jax.lax.fori_loop(0, 3_000, step, (p, adam.init(p)))[0])
    t = np.linspace(0.025, 0.975, 39)[:, None]
    theta = train(params["schedule"])
    c = flowq.guidance_weight({"schedule": theta}, jnp.float32(t), nets, args)
    error = np.asarray(c) - optimal_weight(s)(t)
    print(f"s {s}: largest error {np.abs(error).max():.3f}, RMS {np.sqrt((error**2).mean()):.3f}")
    if s == 0.2:
        assert np.abs(error).max() <= 0.04
    else:
        assert np.abs(error).max() <= 0.10 and np.sqrt((error**2).mean()) <= 0.05


# ---- with a learned critic ----
def bandit_mean(flowq, lam):
    """Mean action of N = 1 after learning from rewards; the data are +-0.5, the reward is a.

    The scale of the guidance, mean |Q|, is 0.5: in the exact field the mean is 0.56 at lambda = 1.
    """
    rng = np.random.default_rng(0)
    actions = rng.choice([-0.5, 0.5], (20_000, 1)) + 0.1 * rng.standard_normal((20_000, 1))
    args = resolved(
        flowq, env_id="pointmaze-medium", guidance_lambda=lam, n_step=1,
        hidden_dims=(64, 64), offline_steps=3_000, normalize_obs=False,
    )  # fmt: skip
    nets = make_networks(flowq, args, 1)
    state = train_flow(flowq, prepare(flowq, bandit_rows(actions), args), args, nets)
    policy = flowq.make_policy(nets, args)
    act = lambda key: policy(state, jnp.zeros(1), key, 1)
    return jax.jit(jax.vmap(act))(jax.random.split(jax.random.key(9), 5_000)).mean()


@pytest.mark.slow
def test_bandit_is_pulled_up_by_its_learned_critic(flowq):
    assert abs(bandit_mean(flowq, 0.0)) < 0.1
    assert bandit_mean(flowq, 1.0) > 0.35


GAMMA = 0.8
OBS, ACTIONS = np.array([-1.0, -1, -1, 1, 1, 1]), np.array([-0.8, 0, 0.8, -0.8, 0, 0.8])


def probe(reward, mask, next_obs=None, size=400):
    """Rows with obs +-1 and uniform actions; reward and mask are functions of (obs, action)."""
    rng = np.random.default_rng(0)
    obs, action = rng.choice([-1.0, 1.0], size), rng.uniform(-1, 1, size)
    column = lambda x: np.broadcast_to(x, size)[:, None].astype(np.float32)
    raw = dict(observations=column(obs), actions=column(action))
    raw["next_observations"] = column(obs if next_obs is None else next_obs(obs))
    raw["rewards"] = np.broadcast_to(reward(obs, action), size).astype(np.float32)
    raw["masks"] = np.broadcast_to(mask(obs), size).astype(np.float32)
    return raw | dict(terminals=np.ones(size, np.float32))


@functools.cache
def learner(flowq, critic):
    """(args, networks, dispatch): one compiled program for all probes."""
    args = resolved(
        flowq, env_id="pointmaze-medium", critic=critic, hidden_dims=(32, 32), learning_rate=2e-3,
        tau=0.05, gamma=GAMMA, guidance_lambda=5.0, flow_steps=5, num_seeds=2, n_step=1,
        ema_decay=0.99, normalize_obs=False, **(dict(expectile=0.5) if critic == "iql" else {}),
    )  # fmt: skip
    nets = make_networks(flowq, args, 1)
    learn = flowq.make_learn(nets, args)
    return args, nets, flowq.Program(learn, None, flowq.Settings(jnp.float32(5.0)))


def learn_probe(flowq, critic, raw, steps, n_step=1):
    """Q (seeds, members, 6) and 64 actions of N = 1 for each of both observations."""
    args, nets, dispatch = learner(flowq, critic)
    data, settings = flowq.device_data(raw, n_step, GAMMA), dispatch.inputs[1]
    dispatch.inputs = (data, settings)
    start = make_carry(flowq, args, data, nets, settings)
    before = jax.tree.map(jnp.copy, start["state"])
    after = dispatch(start, steps)["state"]

    def look(state):
        q = nets.critic(
            state.params["critic"], jnp.float32(OBS[:, None]), jnp.float32(ACTIONS[:, None])
        )
        keys = jax.random.split(jax.random.key(0), 64)
        act = lambda obs, key: flowq.make_policy(nets, args)(state, obs, key, 1)
        return q, jax.vmap(jax.vmap(act, (None, 0)), (0, None))(jnp.asarray([[-1.0], [1.0]]), keys)

    return [jax.device_get(jax.jit(jax.vmap(look))(s)) for s in (before, after)]


def check_values(states, expected, tolerance=0.1):
    (untrained, _), (q, actions) = states
    assert np.abs(q - expected).max() < tolerance, q
    assert np.abs(untrained - expected).max() > 3 * tolerance
    return actions[..., 0]


critics = pytest.mark.parametrize("critic", ["td", pytest.param("iql", marks=pytest.mark.slow)])


@pytest.mark.slow
@critics
def test_constant_reward(flowq, critic):
    check_values(learn_probe(flowq, critic, probe(lambda s, a: 1.0, lambda s: 0.0), 600), 1.0)


@pytest.mark.slow
@critics
def test_reward_of_the_observation(flowq, critic):
    check_values(learn_probe(flowq, critic, probe(lambda s, a: s, lambda s: 0.0), 600), OBS)


@pytest.mark.slow
@critics
@pytest.mark.parametrize("n_step", [1, 2])
def test_two_step_chain(flowq, critic, n_step):
    """From -1 to +1 for nothing, then reward 1 and the end: Q(s0) = gamma."""
    raw = dict(observations=np.tile([[-1.0], [1.0]], (200, 1)), next_observations=np.ones((400, 1)))
    raw |= dict(actions=np.random.default_rng(0).uniform(-1, 1, (400, 1)))
    step = np.tile([0.0, 1.0], 200)
    raw = {
        k: np.float32(v)
        for k, v in (raw | dict(rewards=step, masks=1 - step, terminals=step)).items()
    }
    expected = np.where(OBS < 0, GAMMA, 1.0)
    check_values(learn_probe(flowq, critic, raw, 1_000, n_step), expected, 0.08)


@pytest.mark.slow
@critics
def test_endless_reward(flowq, critic):
    """Reward 1 for ever, cut by time limits alone: Q = 1 / (1 - gamma) = 5."""
    states = learn_probe(flowq, critic, probe(lambda s, a: 1.0, lambda s: 1.0), 1_500)
    check_values(states, 5.0, 0.3)


@pytest.mark.slow
@critics
def test_reward_of_both(flowq, critic):
    """Best action s / 2: the guided policy moves there, the data's mean is 0."""
    raw = probe(lambda s, a: 1 - (a - s / 2) ** 2, lambda s: 0.0)
    states = learn_probe(flowq, critic, raw, 2_000)
    actions = check_values(states, 1 - (ACTIONS - OBS / 2) ** 2, 0.15)
    assert np.abs(actions.mean(-1) - [-0.5, 0.5]).max() < 0.15, actions.mean(-1)
