"""SAC Flow's policies: densities of paths, the networks, BatchRenorm, gradients along a rollout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import random_params

FLOWS = ("flow-g", "flow-t", "mlp")
SMALL = dict(hidden_dim=16, d_model=8, critic_hidden_dims=(16, 16), batch_size=8)


@pytest.fixture(scope="session")
def sac():
    return load_script(ROOT / "algos" / "sac_flow.py")


def make_args(sac, env_id="Hopper-v4", action_scale=1.0, **flags):
    args = sac.Args(env_id=env_id, action_scale=action_scale, **flags)
    return sac.resolve(args, sac.parse_task(env_id))


def make_actor(sac, args, obs_dim, act_dim, seed=0, moved=True):
    """(networks, params, stats) of the actor, by default moved away from special initial values."""
    nets = sac.make_networks(args, act_dim)
    params, stats = jax.jit(nets.init, static_argnums=0)(obs_dim, jax.random.key(seed))
    actor = random_params(params["actor"], seed, 0.1) if moved else params["actor"]
    return nets, actor, stats["actor"]


def step_velocity(nets, params, stats, obs, x, t, k, train=False):
    """(v, log_std) at Euler step k and time t."""
    context, stats = nets.context(params, stats, obs, train=train)
    return nets.velocity(params, stats, context, x, jnp.full((1, 1), t), k, train=train)[0]


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def normal_logpdf(x, mean, std):
    x, mean, std = (np.asarray(v, np.float64) for v in (x, mean, std))
    return -0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)


def toy_nets(sac, log_std=None):
    """v = -A with a noise of its own, or fixed noise where there is none."""

    def velocity(params, stats, context, x, t, k, train=False):
        return (-x, log_std), stats

    return sac.Networks(1, None, lambda p, s, obs, train=False: (obs, s), velocity)


# ---- density of the path ----

NOISES = [(p, "learned", False) for p in (*FLOWS, "gaussian")]
NOISES += [(p, "fixed", drift) for p in FLOWS for drift in (False, True)]


@pytest.mark.parametrize("policy,noise,drift", NOISES)
def test_log_prob_is_a_sum_of_gaussian_log_densities(sac, policy, noise, drift):
    """Density of the given path under the velocity's means and deviations, in float64."""
    flags = dict(noise=noise) if policy != "gaussian" else {}
    args = make_args(sac, policy=policy, drift_correction=drift, action_scale=0.4, **flags, **SMALL)
    nets, *variables = make_actor(sac, args, 5, 3)
    to_64 = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
    with jax.enable_x64():
        params, stats = jax.tree.map(to_64, variables)
        obs = jax.random.normal(jax.random.key(1), (6, 5))
        sample = jax.jit(
            lambda obs, key: sac.sample_action(params, stats, nets, args, obs, key, args.sigma)
        )
        action, log_prob, path, _ = sample(obs, jax.random.key(2))
        u = np.asarray(path.x[-1], np.float64)
        np.testing.assert_allclose(action, 0.4 * np.tanh(u), atol=1e-6)
        assert 0.1 < np.abs(u).max() < 12
        expected = -np.log(0.4 * (1 - np.tanh(u) ** 2))
        if policy == "gaussian":
            (mean, log_std), _ = nets.context(params, stats, obs)
            expected += normal_logpdf(u, mean, np.exp(np.asarray(log_std, np.float64)))
        else:
            expected += normal_logpdf(path.x[0], 0.0, 1.0)
            velocity = jax.jit(
                lambda x, t, k: step_velocity(nets, params, stats, obs, x, t, k), static_argnums=2
            )
            for k in range(4):
                x, t = path.x[k], k / 4
                v, log_std = velocity(x, t, k)
                std = 0.05 * 2 * 0.5 if drift else 0.05  # sigma 0.10 with the correction, sqrt(1/4)
                std = std if log_std is None else np.exp(np.asarray(log_std, np.float64))
                if drift:
                    v += 0.10**2 / 2 * (t * v - x) / (1 - t)
                expected += normal_logpdf(path.x[k + 1], x + v / 4, std)
        np.testing.assert_allclose(log_prob, expected.sum(axis=-1), rtol=1e-6)


def test_log_prob_by_hand(sac):
    """d = 1, K = 2, v = -A, s = 0.3, A_0 = 0.5, eps = (1, -0.5)."""
    args = make_args(sac, flow_steps=2, noise="fixed", sigma=0.3)
    eps = jnp.asarray([0.5, 1.0, -0.5])[:, None, None]
    path, _ = sac.rollout({}, {}, toy_nets(sac), args, jnp.zeros((1, 1)), eps, 0.3)
    assert path.x[-1, 0, 0] == pytest.approx(0.125, abs=1e-5)
    assert np.tanh(path.x[-1, 0, 0]) == pytest.approx(0.1243530, abs=1e-5)
    assert sac.path_log_prob(path, 1.0)[0] == pytest.approx(-1.0832855, abs=1e-5)
    quadratic = (-0.5 * eps**2 - 0.5 * np.log(2 * np.pi)).sum() - 2 * np.log(0.3)
    assert sac.path_log_prob(path, 1.0)[0] - quadratic == pytest.approx(0.0155845, abs=1e-5)


def grid_density(sac, y, log_std_term=True):
    """Density of the action y and its integral over all paths that end there."""
    a = np.linspace(-6, 6, 401)
    x0, x1 = (x.reshape(-1) for x in np.meshgrid(a, a, indexing="ij"))
    x2 = np.full_like(x0, np.arctanh(y))
    eps = np.stack([x0, (x1 - 0.5 * x0) / 0.3, (x2 - 0.5 * x1) / 0.3])[..., None]
    x = np.stack([x0, x1, x2])[..., None]
    log_std = np.zeros_like(eps) + (np.log([0, 0.3, 0.3] + np.array([1, 0, 0])))[:, None, None]
    path = sac.Rollout(*(jnp.asarray(v) for v in (x, x, log_std * log_std_term, eps)))
    return float(jnp.exp(sac.path_log_prob(path, 1.0)).sum() * (a[1] - a[0]) ** 2)


def test_path_density_integrates_to_one(sac):
    """v = -A, K = 2, s = 0.3: A_2 ~ N(0, 0.175); without -log s the integral would be 0.09."""
    with jax.enable_x64():
        assert grid_density(sac, 0.0) == pytest.approx(0.9536545, abs=1e-4)
        assert grid_density(sac, 0.5) == pytest.approx(0.5369350, abs=1e-4)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        total = sum(w * grid_density(sac, y) for y, w in zip(nodes, weights, strict=True))
        assert total == pytest.approx(1.0, abs=1e-4)
        mutant = sum(w * grid_density(sac, y, False) for y, w in zip(nodes, weights, strict=True))
        assert mutant == pytest.approx(0.09, abs=1e-4)


def test_drawn_paths_have_the_density_that_is_claimed(sac):
    """The same flow, sampled: variance of u, and the entropy as the mean of -log p."""
    args = make_args(sac, flow_steps=2, noise="fixed", sigma=0.3)
    obs = jnp.zeros((200_000, 1))
    _, log_prob, path, _ = sac.sample_action(
        {}, {}, toy_nets(sac), args, obs, jax.random.key(0), 0.3
    )
    u = np.asarray(path.x[-1, :, 0], np.float64)
    assert u.var() == pytest.approx(0.175, rel=0.02) and abs(u.mean()) < 0.005
    jacobian = np.log(1 - np.tanh(u) ** 2).mean()
    entropy = 1.5 * np.log(2 * np.pi * np.e) + 2 * np.log(0.3) + jacobian
    assert -log_prob.mean() == pytest.approx(entropy, abs=0.01)


def test_jacobian_is_stable(sac):
    def term(u):
        zero = jnp.zeros((1, 1, 1))
        return sac.path_log_prob(sac.Rollout(jnp.full((1, 1, 1), u), zero, zero, zero), 1.0)[0]

    base = -0.5 * np.log(2 * np.pi)
    assert base - term(10.0) == pytest.approx(-18.6137056, abs=1e-5)
    for u in (-50.0, 50.0):
        assert jax.grad(term)(u) == pytest.approx(2 * np.tanh(u), abs=1e-5)


def test_drift_correction_follows_the_score(sac):
    """Linear flow of data N(0, 0): x_t = (1 - t) x_0, so v = -x / (1 - t), score -x / (1 - t)^2."""
    sigma, eps = 0.1, jnp.zeros((5, 1, 1)).at[0].set(0.7)
    velocity = lambda p, s, c, x, t, k, train=False: ((-x / (1 - t), None), s)
    nets = toy_nets(sac)._replace(velocity=velocity)
    args = make_args(sac, noise="fixed", drift_correction=True)
    assert (args.sigma, args.sigma_inference) == (0.1, 0.1)
    path, _ = sac.rollout({}, {}, nets, args, jnp.zeros((1, 1)), eps, sigma)
    for k in range(4):
        x, t = float(path.x[k, 0, 0]), k / 4
        b = -x / (1 - t) + sigma**2 / 2 * (-x / (1 - t) ** 2)
        assert path.mean[k + 1, 0, 0] == pytest.approx(x + b / 4, abs=1e-6)
        assert jnp.exp(path.log_std[k + 1, 0, 0]) == pytest.approx(0.05, abs=1e-6)


def test_deterministic_action(sac):
    """No noise at all, no drift correction, running statistics; whatever the key."""
    args = make_args(sac, noise="fixed", drift_correction=True, **SMALL)
    state = jax.jit(lambda: sac.init_state(args, 5, 3, jnp.zeros(5), jnp.ones(5), 0))()
    state = state.replace(params=random_params(state.params))
    nets, obs = sac.make_networks(args, 3), jnp.arange(5.0)
    act = jax.jit(sac.make_policy(nets, args), static_argnames="deterministic")
    actions = [act(state, obs, jax.random.key(i), deterministic=True) for i in (0, 1)]
    np.testing.assert_array_equal(*actions)
    x = jnp.zeros((1, 3))
    actor = (state.params["actor"], state.stats["actor"])
    velocity = jax.jit(lambda x, t: step_velocity(nets, *actor, obs[None], x, t, 0)[0])
    for k in range(4):
        x += velocity(x, k / 4) / 4
    np.testing.assert_allclose(actions[0], np.tanh(x[0]), atol=1e-6)
    noisy = [act(state, obs, jax.random.key(i)) for i in (0, 1)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3


# ---- networks ----


def test_flow_t_from_scratch_learns_nothing_of_time(sac):
    """As released: what the time network adds is the same for a whole batch, and the BatchRenorm
    behind it subtracts the batch's mean. Acting subtracts a running one, so there it shows."""
    args = make_args(sac, policy="flow-t", flow_steps=2, **SMALL)
    nets, params, stats = make_actor(sac, args, 5, 3)
    obs, x = jax.random.normal(jax.random.key(1), (16, 5)), jnp.linspace(-1, 1, 48).reshape(16, 3)

    @functools.partial(jax.jit, static_argnums=1)
    def velocity(params, train):
        return step_velocity(nets, params, stats, obs, x, 0.5, 1, train=train)[0]

    untimed = params | {"time": jax.tree.map(jnp.zeros_like, params["time"])}
    np.testing.assert_allclose(velocity(params, True), velocity(untimed, True), atol=1e-4)
    assert np.abs(velocity(params, False) - velocity(untimed, False)).max() > 0.01
    gradient = jax.jit(jax.grad(lambda params: (x * velocity(params, True)).sum()))(params)
    largest = lambda tree: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(tree))
    assert largest(gradient["token"]["kernel"]) > 1e-2
    norms = [v["BatchRenorm_0"]["bias"] for k, v in gradient.items() if "token_norms" in k]
    assert len(norms) == 2
    for constant in (gradient["time"], gradient["token"]["bias"], norms):
        assert largest(constant) < 1e-4


SIZES = {
    ("Hopper-v4", "flow-g"): (325_765, 2_140_218),
    ("Hopper-v4", "flow-t"): (236_308, 2_140_218),
    ("Hopper-v4", "mlp"): (273_954, 2_140_218),
    ("Hopper-v4", "gaussian"): (267_526, 1_592_322),
    ("cube-triple", "flow-g"): (863_282, 1_658_882),
    ("cube-triple", "flow-t"): (425_433, 1_658_882),
    ("cube-triple", "mlp"): (838_169, 1_658_882),
}


@pytest.mark.parametrize("env_id,policy", SIZES)
def test_parameter_counts(sac, env_id, policy):
    args = make_args(sac, env_id, policy=policy)
    obs_dim, act_dim = (11, 3) if env_id == "Hopper-v4" else (46, 5)
    init = functools.partial(sac.make_networks(args, act_dim).init, obs_dim)
    params, _ = jax.eval_shape(init, jax.random.key(0))
    assert (count(params["actor"]), count(params["critic"])) == SIZES[env_id, policy]


def test_attention_over_one_token_is_two_linear_maps(sac):
    """A real attention layer (4 heads, softmax) on one query and one key."""
    import flax.linen as nn

    attention = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=8, out_features=8)
    query, memory = jax.random.normal(jax.random.key(0), (2, 5, 1, 8))
    init = jax.jit(attention.init)
    params = random_params(init(jax.random.key(1), query, memory)["params"])
    flat = lambda p, shape: (p["kernel"].reshape(shape), p["bias"].reshape(-1))
    (wv, bv), (wo, bo) = flat(params["value"], (8, 8)), flat(params["out"], (8, 8))
    out = attention.apply({"params": params}, query, memory)
    np.testing.assert_allclose(out, (memory @ wv + bv) @ wo + bo, atol=1e-6)
    loss = lambda p: (attention.apply({"params": p}, query, memory) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)
    for name in ("query", "key"):
        assert all((g == 0).all() for g in jax.tree.leaves(grads[name]))
    assert np.abs(grads["value"]["kernel"]).max() > 0.1


def test_flow_t_computes_that_block(sac):
    """Flow-T's velocity, offline-to-online, against NumPy with attention by softmax."""
    args = make_args(sac, "cube-triple", d_model=8, horizon_length=1)
    nets, params, stats = make_actor(sac, args, 5, 3)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    obs, x = jax.random.normal(jax.random.key(1), (2, 4, 5))
    x = x[:, :3]
    v, _ = jax.jit(lambda x: step_velocity(nets, params, stats, obs, x, 0.25, 1))(x)

    dense = lambda p, x: x @ p["kernel"] + p["bias"]
    silu = lambda x: x / (1 + np.exp(-x))
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    norm = lambda p, x: (
        (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
    )  # fmt: skip

    def attend(value, out, x):
        weights = np.ones((len(x), 1, 1))  # softmax of a single score
        return dense(out, (weights @ dense(value, x)[:, None])[:, 0])

    m = dense(p["memory"]["Dense_1"], silu(dense(p["memory"]["Dense_0"], np.asarray(obs))))
    e, time = np.full((1, 1), 0.25), p["time"]
    e = silu(dense(time["Dense_1"], silu(dense(time["Dense_0"], e))))
    h = dense(p["token"], np.asarray(x)) + dense(time["Dense_2"], e)
    for b in range(2):
        norms = [p[f"norms_{b}_{i}"] for i in range(3)]
        h = norm(norms[0], h + attend(p[f"self_value_{b}"], p[f"self_out_{b}"], h))
        h = norm(norms[1], h + attend(p[f"cross_value_{b}"], p[f"cross_out_{b}"], m))
        mlp = p[f"feed_forward_{b}"]
        h = norm(norms[2], h + dense(mlp["Dense_1"], gelu(dense(mlp["Dense_0"], h))))
    np.testing.assert_allclose(v, dense(p["head"], h), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "cube-triple"])
def test_gate_is_open_at_first(sac, env_id):
    """v = 0.9933071 (vhat - x) for any input."""
    args = make_args(sac, env_id, policy="flow-g", hidden_dim=16, horizon_length=1)
    _, params, stats = make_actor(sac, args, 5, 3, moved=False)
    norm, learned = ("brn", True) if args.mode == "online" else ("none", False)
    module = sac.GatedVelocity(3, 16, args.flow_steps, norm, learned, False)
    obs, x = 10 * jax.random.normal(jax.random.key(1), (2, 7, 5))
    x, t = x[:, :3], jnp.full((1, 1), 0.5)

    def both(self):
        out, _ = self.velocity(self.context(obs, False), x, t, 2, False)
        if args.mode == "online":
            angles = t * jnp.exp(-jnp.log(1e4) * jnp.arange(16) / 15)
            time = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
            inputs = sac.join(self.norm(sac.join(obs, x), False), time)
        else:
            inputs = sac.join(obs, x, t)
        return out, self.candidate(inputs)

    apply = jax.jit(functools.partial(module.apply, method=both))
    v, candidate = apply({"params": params, "batch_stats": stats})
    np.testing.assert_allclose(v, 0.9933071 * (candidate - x), rtol=1e-5, atol=1e-5)


def test_learned_noise_bounds(sac):
    """l in [-5, 2], -1.5 for a head of 0: deviation 0.223 (flow-g), a quarter of it (flow-t)."""
    policy = sac.NaiveVelocity(3, 16, 4, "brn", True, False)
    outputs = policy.log_std(lambda x: 2 * x, jnp.asarray([-25.0, 0.0, 25.0]))
    assert np.allclose(outputs, [-5, -1.5, 2])
    for policy, k in (("flow-g", 1), ("mlp", 1), ("flow-t", 4)):
        args = make_args(sac, policy=policy, **SMALL)
        nets, params, stats = make_actor(sac, args, 5, 3, moved=False)
        params = jax.tree.map(jnp.zeros_like, params)
        step = jax.jit(functools.partial(step_velocity, nets, t=0.0, k=0))
        _, log_std = step(params, stats, jnp.ones((2, 5)), jnp.ones((2, 3)))
        np.testing.assert_allclose(jnp.exp(log_std), np.exp(-1.5) / k, rtol=1e-5)


# ---- BatchRenorm ----


def renorm(sac, x, stats=None, train=True, **settings):
    """(y, running statistics) of one call on the batch (B, 1), gain 1 and bias 0."""
    module = sac.BatchRenorm(**settings)
    variables = module.init(jax.random.key(0), x, train)
    stats = variables["batch_stats"] | (stats or {})
    variables = {"params": variables["params"], "batch_stats": stats}
    y, new = module.apply(variables, x, train, mutable=["batch_stats"])
    return y, new["batch_stats"]


BATCH = jnp.asarray([[0.0], [4.0]])


def running(mean, var, calls=0):
    floats = {k: jnp.asarray([v], jnp.float32) for k, v in dict(mean=mean, var=var).items()}
    return floats | {"calls": jnp.int32(calls)}


def test_batch_renorm_by_hand(sac):
    y, stats = renorm(sac, BATCH)
    np.testing.assert_allclose(y[:, 0], [-0.9998750, 0.9998750], atol=1e-6)
    np.testing.assert_allclose([stats["mean"][0], stats["var"][0]], [0.02, 1.03], atol=1e-6)
    for _ in range(2):
        _, stats = renorm(sac, BATCH, stats)
    expected = [0.0594020, 1.0891030]
    np.testing.assert_allclose([stats["mean"][0], stats["var"][0]], expected, atol=1e-6)
    assert stats["calls"] == 3


def test_batch_renorm_after_the_warm_up(sac):
    y, _ = renorm(sac, BATCH, running(0.02, 1.03, 100_000))
    np.testing.assert_allclose(y[:, 0], [-0.0199336, 3.9180543], atol=1e-5)
    y, _ = renorm(sac, BATCH, running(0.0, 0.01, 100_000))  # r and d clipped to 3 and 5
    np.testing.assert_allclose(y[:, 0], [1.9977538, 7.9910152], atol=1e-5)
    late = running(0.02, 1.03, 100_000)
    corrected, _ = renorm(sac, BATCH, late, epsilon=1e-8)
    inference, _ = renorm(sac, BATCH, late, train=False, epsilon=1e-8)
    np.testing.assert_allclose(corrected, inference, atol=1e-6)
    last, _ = renorm(sac, BATCH, running(0.02, 1.03, 99_999))
    np.testing.assert_allclose(last[:, 0], [-0.9998750, 0.9998750], atol=1e-6)


def test_inference_and_initialisation_leave_the_statistics(sac):
    fresh = sac.BatchRenorm().init(jax.random.key(0), BATCH, True)["batch_stats"]
    assert (fresh["mean"], fresh["var"], fresh["calls"]) == (0, 1, 0)
    y, stats = renorm(sac, BATCH, running(1.0, 4.0, 7), train=False)
    assert (stats["mean"], stats["var"], stats["calls"]) == (1, 4, 7)
    np.testing.assert_allclose(y[:, 0], (BATCH[:, 0] - 1) / np.sqrt(4.001), atol=1e-6)


def test_gradient_of_batch_renorm(sac):
    """Through the batch's mean and variance but not through r and d: finite differences of a
    version whose r and d are constants; and no NaN where a feature is constant."""
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        x, w = jnp.asarray(rng.normal(size=(5, 1))), jnp.asarray(rng.normal(size=(5, 1)))
        stats = {"mean": jnp.asarray([0.1]), "var": jnp.asarray([0.8]), "calls": jnp.int32(100_000)}
        loss = lambda x: (w * renorm(sac, x, stats)[0]).sum()
        v0, m0 = x.var(), x.mean()
        r, d = jnp.sqrt((v0 + 1e-3) / 0.801), (m0 - 0.1) / jnp.sqrt(0.801)

        def frozen(x):
            m, v = x.mean(), x.var()
            return (w * (x - m + d * jnp.sqrt(v) / r) / jnp.sqrt(v / r**2 + 1e-3)).sum()

        assert loss(x) == pytest.approx(float(frozen(x)), abs=1e-6)
        for i in range(5):
            step = jnp.zeros((5, 1)).at[i].set(1e-6)
            slope = (frozen(x + step) - frozen(x - step)) / 2e-6
            assert jax.grad(loss)(x)[i, 0] == pytest.approx(float(slope), abs=1e-6)


@pytest.mark.parametrize("calls", [0, 100_000])
def test_constant_features_have_a_gradient(sac, calls):
    """A dead unit's variance is 0, where a square root has no slope."""
    loss = lambda x: renorm(sac, x, running(0.0, 1.0, calls))[0].sum()
    assert np.isfinite(jax.grad(loss)(jnp.ones((4, 1)))).all()


@pytest.mark.slow
def test_calls_are_counted_as_the_method_makes_them(sac):
    """Per actor update: flow-g's input norm and flow-t's block norms K times, the others once."""
    expected = {"flow-g": {"norm": 4}, "mlp": {"norm": 4}}
    expected["flow-t"] = {"obs_norm": 1, "token_norms_0": 1, "token_norms_3": 1, "norms_1_2": 4}
    for policy, calls in expected.items():
        args = make_args(sac, policy=policy, **SMALL)
        nets, params, stats = make_actor(sac, args, 5, 3)
        key, obs = jax.random.key(0), jnp.ones((4, 5))
        sample = functools.partial(
            sac.sample_action, nets=nets, args=args, obs=obs, key=key, sigma=0.1
        )
        sample = jax.jit(sample, static_argnames="train")
        *_, new = sample(params, stats, train=True)
        for name, number in calls.items():
            (leaf,) = [
                x for path, x in jax.tree_util.tree_leaves_with_path(new[name])
                if path[-1].key == "calls"
            ]  # fmt: skip
            assert leaf == number, (policy, name)
        *_, same = sample(params, stats)
        jax.tree.map(np.testing.assert_array_equal, same, stats)


@pytest.mark.parametrize("renorm_time", [False, True])
def test_naive_velocity_acts_on_the_times_of_its_training(sac, renorm_time):
    """Running statistics of one batch, seen often enough, give in acting what they give in
    training. As released they do not: time is constant in a batch, so training sees 0 for each,
    and acting, by a running variance of 0, -12 at the first step and +12 at the last."""
    args = make_args(sac, policy="mlp", renorm_time=renorm_time, **SMALL)
    nets, params, stats = make_actor(sac, args, 5, 3)
    obs, x = jax.random.normal(jax.random.key(1), (2, 64, 5))
    times = jnp.arange(4.0)[:, None, None] / 4

    def rollouts(_, stats):
        for k in range(4):
            inputs = obs, x[:, :3], times[k], k
            _, stats = nets.velocity(params, stats, *inputs, train=True)
        return stats

    stats = jax.jit(lambda s: jax.lax.fori_loop(0, 400, rollouts, s))(stats)
    outputs = {}
    for train in (False, True):
        step = functools.partial(nets.velocity, params, stats, obs, x[:, :3], train=train)
        outputs[train] = jnp.stack([jax.jit(step)(times[k], k)[0][0] for k in (0, 3)])
    gap = np.abs(outputs[True] - outputs[False]).max()
    if renorm_time:
        mean, var = (stats["norm"]["BatchRenorm_0"][k][-1] for k in ("mean", "var"))
        seen = (times[jnp.asarray([0, 3]), 0, 0] - mean) / jnp.sqrt(var + 1e-3)
        np.testing.assert_allclose(seen, [-12, 12], atol=0.5)
        assert gap > 1
    else:
        assert gap < 1e-3


# ---- gradients along the rollout ----


def step_gradients(nets, params, stats, args, obs, key, train=False):
    """Mean norm of dL/dA_k, k = 0..K, of a random linear L of the last A, without noise."""
    keys = jax.random.split(key)
    weights = jax.random.normal(keys[0], (len(obs), nets.dim))
    start = jax.random.normal(keys[1], weights.shape)

    def loss(moves):
        context, new = nets.context(params, stats, obs, train=train)
        x = start + moves[0]
        for k in range(args.flow_steps):
            t = jnp.full((1, 1), k / args.flow_steps)
            (v, _), new = nets.velocity(params, new, context, x, t, k, train=train)
            x = x + v / args.flow_steps + moves[k + 1]
        return (weights * x).sum()

    grads = jax.grad(loss)(jnp.zeros((args.flow_steps + 1, *weights.shape)))
    return jnp.linalg.norm(grads, axis=-1).mean(axis=-1)


@pytest.mark.parametrize("policy", ["flow-g", "mlp"])
def test_jacobian_of_one_step(sac, policy):
    """Flow-G at the start: 0.7516733 I + g dt J_vhat; mlp: I + dt J_v."""
    args = make_args(sac, policy=policy, **SMALL)
    nets, params, stats = make_actor(sac, args, 5, 3, moved=False)
    obs, t = jnp.ones((1, 5)), jnp.full((1, 1), 0.5)
    x = jnp.asarray([0.3, -0.2, 0.5])

    @jax.jit
    def jacobians(params):
        context, _ = nets.context(params, stats, obs)
        v = lambda x: nets.velocity(params, stats, context, x[None], t, 2)[0][0][0]
        return jax.jacobian(lambda x: x + v(x) / 4)(x), jax.jacobian(v)(x)

    step, slope = jacobians(params)
    if policy == "mlp":
        np.testing.assert_allclose(step, jnp.eye(3) + slope / 4, atol=1e-6)
        return
    gate = 0.9933071  # v = g (vhat - x), so J_vhat = J_v / g + I
    expected = 0.7516733 * jnp.eye(3) + gate / 4 * (slope / gate + jnp.eye(3))
    np.testing.assert_allclose(step, expected, atol=1e-5)
    dead = params | {"candidate": jax.tree.map(jnp.zeros_like, params["candidate"])}
    np.testing.assert_allclose(jacobians(dead)[0], 0.7516733 * jnp.eye(3), atol=1e-6)


@pytest.mark.slow
def test_gradient_growth_with_large_kernels(sac):
    """Every kernel times 4 at Hopper's shapes: the naive flow's gradient grows from the last step
    to the first, Flow-G's and Flow-T's do not. At the start none of them grows."""
    limits = {"mlp": (20, np.inf), "flow-g": (0, 10), "flow-t": (0, 2)}
    for policy, (low, high) in limits.items():
        args = make_args(sac, policy=policy)
        nets, params, stats = make_actor(sac, args, 11, 3, moved=False)
        obs = jax.random.normal(jax.random.key(5), (256, 11))
        enlarge = lambda path, x: 4 * x if path[-1].key == "kernel" else x
        large = jax.tree_util.tree_map_with_path(enlarge, params)
        train = policy == "flow-t"  # untouched running statistics would normalise nothing
        growth = []
        for p in (params, large):
            norms = jax.jit(functools.partial(step_gradients, nets, args=args, train=train))(
                p, stats, obs=obs, key=jax.random.key(6)
            )
            growth.append(float(norms[0] / norms[-1]))
        assert growth[0] < 3, (policy, growth)
        assert low < growth[1] < high, (policy, growth)


@pytest.mark.parametrize("space", ["action", "pretanh"])
def test_bc_loss_is_zero_for_the_right_velocity(sac, space):
    """One action in the data: v = (x_1 - x) / (1 - t), in both spaces; masked by valid."""
    args = make_args(sac, "cube-triple", bc_space=space, horizon_length=2, batch_size=6)
    action = jnp.tile(jnp.asarray([0.5, -0.3, 0.9, 0.1]), (6, 1))
    x1 = jnp.arctanh(action) if space == "pretanh" else action
    exact = lambda p, s, c, x, t, k, train=False: (((x1 - x) / (1 - t) + p, None), s)
    nets = toy_nets(sac)._replace(dim=4, velocity=exact)
    valid = jnp.ones((6, 2)).at[:3, 1].set(0.0)
    batch = dict(obs=jnp.zeros((6, 1)), actions=action, valid=valid)
    loss = lambda off: sac.flow_matching_loss(off, {}, nets, args, batch, jax.random.key(0))[0]
    assert loss(0.0) == pytest.approx(0, abs=1e-6)
    assert loss(2.0) == pytest.approx(4 * 0.75, abs=1e-4)  # a quarter of the entries is masked


def test_fresh_noise_for_every_step_and_call(sac):
    args = dataclasses.replace(make_args(sac, noise="fixed"), sigma=0.3)
    obs = jnp.zeros((1000, 1))
    paths = [
        sac.sample_action({}, {}, toy_nets(sac), args, obs, jax.random.key(i), 0.3)[2].eps[..., 0]
        for i in (0, 1)
    ]
    draws = np.concatenate([np.asarray(p) for p in paths])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert draws.shape == (10, 1000) and np.abs(correlation).max() < 0.12
