"""Networks, flow-map identities, FMQ, beam search and the update of fmq.py, each against numbers
or calculations of their own."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, load_script
from helpers import random_params, with_changes

SMALL = dict(env_id="cube-double", hidden_dims=(8, 8), batch_size=16, num_samples=3, horizon=2)


@pytest.fixture(scope="module")
def fmq():
    return load_script(ROOT / "algos" / "fmq.py")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_args(fmq, **flags):
    flags = SMALL | flags
    flags["online_steps"] = flags["horizon"]
    return fmq.resolve(fmq.Args(**flags), fmq.parse_task(flags["env_id"]))


def unused(*_):
    raise AssertionError("this network has no part in the test")


def networks(fmq, actor=unused, critic=unused):
    return fmq.Networks(2, actor, critic)


def random_batch(batch_size, obs_dim, horizon, act_dim, seed=0):
    """What `sample_chunks` returns, at random; every other window leaves its episode."""
    rng, dtype = np.random.default_rng(seed), jnp.zeros(()).dtype
    batch = dict(
        obs=rng.normal(size=(batch_size, obs_dim)),
        actions=rng.uniform(-1, 1, (batch_size, horizon * act_dim)),
        returns=rng.normal(size=batch_size),
        discounts=0.9 * (rng.random(batch_size) < 0.7),
        next_obs=rng.normal(size=(batch_size, obs_dim)),
        valid=np.ones((batch_size, horizon)),
    )
    batch["valid"][::2, -1] = 0
    return {k: jnp.asarray(v, dtype) for k, v in batch.items()}


def fresh_state(fmq, args, seed=0):
    init = jax.jit(lambda seed: fmq.init_state(args, 3, 2, jnp.zeros(3), jnp.ones(3), seed))
    return init(jnp.int32(seed))


def make_state(fmq, args, seed=0):
    """A state whose parameters, biases included, have left their initial values."""
    state = fresh_state(fmq, args, seed)
    return state.replace(params=random_params(state.params, seed))


def jit_networks(fmq, args):
    """The networks with each call compiled as a whole."""
    nets = fmq.make_networks(args, 2)
    return nets._replace(actor=jax.jit(nets.actor), critic=jax.jit(nets.critic))


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# ---- networks ----


def shapes(fmq, task, obs_dim, act_dim, **flags):
    args = fmq.resolve(fmq.Args(env_id=task, **flags), fmq.parse_task(task))
    init = lambda key: fmq.init_params(args, obs_dim, act_dim, key)
    return jax.eval_shape(init, jax.random.key(0))


def test_parameter_counts_of_the_paper(fmq):
    params = shapes(fmq, "cube-triple", 46, 5)
    assert count(params["actor"]) == 903_193 and count(params["critic"]) == 2 * 829_441
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    raw = shapes(fmq, "cube-triple", 46, 5, time_embedding="raw")
    assert count(raw["actor"]) == 903_193 - 126 * 512
    flow = shapes(fmq, "cube-triple", 46, 5, actor="flow")
    assert count(flow["actor"]) == 903_193 - 127 * 512


def test_time_features(fmq):
    zero, one = (np.asarray(fmq.sinusoid(jnp.full(1, t))) for t in (0.0, 1.0))
    np.testing.assert_array_equal(zero, [1] * 32 + [0] * 32)
    np.testing.assert_allclose(one[[0, 32]], [0.540302, 0.841471], atol=1e-6)
    frequencies = 10_000.0 ** (-np.arange(32) / 31)
    np.testing.assert_allclose(one[32:], np.sin(frequencies), atol=1e-6)


def test_initial_values(fmq):
    """Xavier uniform kernels, zero biases, members that differ, copies where copies belong."""
    args = make_args(fmq, hidden_dims=(40, 60))
    state = fresh_state(fmq, args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if "kernel" in jax.tree_util.keystr(path):
            bound = math.sqrt(6 / sum(leaf.shape[-2:]))
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            np.testing.assert_allclose(np.std(leaf), bound / math.sqrt(3), rtol=0.2)
            if leaf.ndim == 3:
                assert not np.allclose(leaf[0], leaf[1])
        elif "bias" in jax.tree_util.keystr(path):
            assert not np.any(leaf)
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"], state.target_critic)
    jax.tree.map(np.testing.assert_array_equal, state.params["actor"], state.offline_actor)
    assert "LayerNorm_0" in state.params["critic"]["params"]["VmapMLP_0"]
    assert "LayerNorm_0" not in state.params["actor"]["params"]["MLP_0"]


def test_split_first_layer_is_a_dense_layer_on_the_concatenation(fmq):
    """Networks written out with plain Dense layers and repeated observations."""
    args = make_args(fmq, hidden_dims=(16, 12))
    nets, params = jit_networks(fmq, args), make_state(fmq, args).params
    rng = np.random.default_rng(1)
    obs, x = rng.normal(size=(5, 1, 3)), rng.normal(size=(5, 7, 4))
    repeated = np.repeat(obs, 7, axis=1)

    def plain(tree, inputs, layer_norm):
        h = np.concatenate(inputs, axis=-1)
        layers = [tree["FirstDense_0"], tree["Dense_0"], tree["Dense_1"]]
        for i, layer in enumerate(layers):
            h = h @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
            if i < len(layers) - 1:
                h = np.asarray(nn.gelu(h))
            if layer_norm and i < len(layers) - 1:
                norm = tree[f"LayerNorm_{i}"]
                h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
                h = h * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
        return h

    times = [np.broadcast_to(fmq.sinusoid(jnp.full(1, t)), (5, 7, 64)) for t in (0.2, 0.9)]
    expected = plain(params["actor"]["params"]["MLP_0"], [repeated, x, *times], False)
    np.testing.assert_allclose(nets.actor(params["actor"], obs, x, 0.2, 0.9), expected, atol=1e-5)
    stacked = params["critic"]["params"]["VmapMLP_0"]
    members = [jax.tree.map(lambda leaf, j=j: leaf[j], stacked) for j in range(2)]
    expected = [plain(member, [repeated, x], True)[..., 0] for member in members]
    np.testing.assert_allclose(nets.critic(params["critic"], obs, x), expected, atol=1e-5)


# ---- the reference flow map: a_1 ~ N(mu, s^2), a_0 ~ N(0, 1), one dimension ----
MU, S = 0.5, 0.3
R, T, A = 0.2, 0.7, 0.4


def sigma(t):
    return jnp.sqrt((1 - t) ** 2 + (t * S) ** 2)


def exact_map(x, r, t):
    return t * MU + sigma(t) / sigma(r) * (x - r * MU)


def exact_velocity(x, t):
    return MU + (-(1 - t) + t * S**2) / sigma(t) ** 2 * (x - t * MU)


def exact_u(params, obs, x, r, t):
    gap = jnp.asarray(t - r)
    safe = jnp.where(gap == 0, 1.0, gap)
    return jnp.where(gap == 0, exact_velocity(x, r), (exact_map(x, r, t) - x) / safe)


def reference_batch(fmq):
    """One window and noise with a_r = A, whose conditional velocity is the marginal one."""
    v = exact_velocity(A, R)
    column = lambda x: jnp.full((1, 1), x)
    batch = dict(obs=column(0.0), actions=column(A + (1 - R) * v), valid=jnp.ones((1, 1)))
    return batch, column(A - R * v), column(R), column(T)


def identity_loss(fmq, kind, actor=exact_u):
    args = make_args(fmq, horizon=1, consistency=kind)
    batch, noise, r, t = reference_batch(fmq)
    nets, share = networks(fmq, actor), jnp.full((1, 1), 0.4)
    return fmq.consistency_loss({"actor": None}, nets, args, batch, noise, r, t, share)[0]


def test_reference_numbers(x64):
    np.testing.assert_allclose([sigma(R), sigma(T)], [0.802247, 0.366197], atol=1e-6)
    np.testing.assert_allclose(exact_map(A, R, T), 0.486939, atol=1e-6)
    np.testing.assert_allclose(exact_u(None, None, A, R, T), 0.173878, atol=1e-6)
    np.testing.assert_allclose(exact_velocity(A, R), 0.135488, atol=1e-6)
    np.testing.assert_allclose(exact_map(1.0, 0.0, 1.0), 0.8, atol=1e-10)


def test_eulerian_identity(fmq, x64):  # T1
    u = functools.partial(exact_u, None, None)
    bracket = jax.jvp(u, (A, R, T), (exact_velocity(A, R), 1.0, 0.0))[1]
    np.testing.assert_allclose(bracket, 0.076781, atol=1e-6)
    assert abs(u(A, R, T) - exact_velocity(A, R) - (T - R) * bracket) < 1e-10
    assert identity_loss(fmq, "eulerian") < 1e-20


def test_lagrangian_identity(fmq, x64):  # T2
    slope = jax.grad(lambda t: exact_map(A, R, t))(T)
    np.testing.assert_allclose(slope, 0.257982, atol=1e-6)
    assert abs(slope - exact_velocity(exact_map(A, R, T), T)) < 1e-10
    assert identity_loss(fmq, "lagrangian") < 1e-20


def test_semigroup_identity(fmq, x64):  # T3
    middle = R + 0.4 * (T - R)
    first, x = exact_u(None, None, A, R, middle), exact_map(A, R, middle)
    second = exact_u(None, None, x, middle, T)
    np.testing.assert_allclose([first, x, second], [0.144066, 0.428813, 0.193753], atol=1e-6)
    assert abs(0.4 * first + 0.6 * second - exact_u(None, None, A, R, T)) < 1e-10
    assert identity_loss(fmq, "semigroup") < 1e-20


@pytest.mark.parametrize("kind", ["eulerian", "semigroup", "lagrangian"])
def test_a_wrong_map_breaks_the_identities(fmq, x64, kind):
    wrong = lambda *inputs: 1.1 * exact_u(*inputs)
    assert identity_loss(fmq, kind, wrong) > 1e-6


def test_eulerian_identity_alone_leaves_a_constant_free(fmq, x64):  # T4
    shifted = lambda p, o, x, r, t: exact_u(p, o, x, r, t) + 0.25 / (t - r)
    np.testing.assert_allclose(shifted(None, None, A, R, T), 0.673878, atol=1e-6)
    assert identity_loss(fmq, "eulerian", shifted) < 1e-20
    near = R + 0.01
    offset = shifted(None, None, A, R, near) - exact_u(None, None, A, R, near)
    np.testing.assert_allclose(offset, 25, atol=1e-10)
    # the diagonal loss of a function so far from the velocity near the diagonal
    batch, noise, r, _ = reference_batch(fmq)
    off_diagonal = lambda p, o, x, r, t: shifted(p, o, x, r, t + 0.01)
    loss, _ = fmq.diagonal_loss({"actor": None}, networks(fmq, off_diagonal), batch, noise, r)
    assert loss > 600
    loss, _ = fmq.diagonal_loss({"actor": None}, networks(fmq, exact_u), batch, noise, r)
    assert loss < 1e-20


def test_completion_keeps_the_spread(fmq):  # T5
    """x ~ p_t': the flow map returns the deviation 0.3, one Euler step the posterior mean's."""
    x = MU * 0.6 + sigma(0.6) * jnp.asarray([[-0.5], [0.5]])  # inside the box at the end
    for completion, expected in (("flowmap", 0.3), ("diagonal", 0.123109)):
        args = make_args(fmq, horizon=1, qgbs_completion=completion)
        ends = fmq.complete({"actor": None}, networks(fmq, exact_u), args, None, x, 0.6)
        np.testing.assert_allclose(ends[1] - ends[0], expected, atol=1e-5)
        np.testing.assert_allclose(ends.mean(), MU, atol=1e-5)


# ---- consistency and diagonal losses ----


def test_errors_behind_an_episode_count_as_zeros(fmq):
    error = jnp.asarray([[1.0, 2, 3, 4], [5, 6, 7, 8]])  # two windows, H = 2, A = 2
    valid = jnp.asarray([[1.0, 0], [1, 1]])
    assert fmq.mean_square(error, valid) == (1 + 4 + 25 + 36 + 49 + 64) / 8


@pytest.mark.parametrize("kind", ["eulerian", "semigroup", "lagrangian"])
def test_target_is_constant_and_jvp_is_the_slope(fmq, x64, kind):  # T11, second part
    """Gradient of L_cons = gradient of R(u - constant), the constant from finite differences."""
    args = make_args(fmq, consistency=kind, hidden_dims=(16, 16))
    nets = jit_networks(fmq, args)
    state = make_state(fmq, args)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
    batch, rng = random_batch(6, 3, 2, 2), np.random.default_rng(0)
    noise, share = rng.normal(size=(6, 4)), rng.random((6, 1))
    r, t = np.sort(rng.random((2, 6, 1)), axis=0)
    v, x = batch["actions"] - noise, (1 - r) * noise + r * batch["actions"]
    u = lambda p, x, r, t: nets.actor(p["actor"], batch["obs"], x, r, t)
    h = 1e-5
    if kind == "eulerian":
        ahead, back = u(params, x + h * v, r + h, t), u(params, x - h * v, r - h, t)
        target, student = v + (t - r) * (ahead - back) / (2 * h), u
    elif kind == "semigroup":
        w = r + share * (t - r)
        middle = x + (w - r) * u(params, x, r, w)
        target = share * u(params, x, r, w) + (1 - share) * u(params, middle, w, t)
        student = u
    else:
        target = u(params, x + (t - r) * u(params, x, r, t), t, t)
        jump = lambda p, x, r, t: x + (t - r) * u(p, x, r, t)
        student = lambda p, x, r, t: (jump(p, x, r, t + h) - jump(p, x, r, t - h)) / (2 * h)

    def regression(p):
        valid = np.repeat(batch["valid"], 2, axis=1)
        return (valid * (student(p, x, r, t) - target) ** 2).sum() / (6 * 4)

    loss = lambda p: fmq.consistency_loss(p, nets, args, batch, noise, r, t, share)[0]
    np.testing.assert_allclose(loss(params), regression(params), rtol=1e-6)
    ours, expected = jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(regression))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)


def test_diagonal_loss_is_flow_matching(fmq):
    args = make_args(fmq)
    nets, params = jit_networks(fmq, args), make_state(fmq, args).params
    batch, rng = random_batch(6, 3, 2, 2), np.random.default_rng(0)
    noise, t = np.float32(rng.normal(size=(6, 4))), np.float32(rng.random((6, 1)))
    loss, _ = fmq.diagonal_loss(params, nets, batch, noise, t)
    x_t = (1 - t) * noise + t * batch["actions"]
    error = nets.actor(params["actor"], batch["obs"], x_t, t, t) - batch["actions"] + noise
    expected = (np.repeat(batch["valid"], 2, axis=1) * error**2).sum() / 24
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_curriculum(fmq):  # T14
    args = make_args(fmq, consistency_warmup=5_000, consistency_anneal_end=50_000)
    draw = jax.jit(lambda n: fmq.time_pairs(n, args, jax.random.key(0), 200_000))
    for number, progress in ((5_000, 0), (27_500, 0.5), (50_000, 1), (1_000_000, 1)):
        r, t = draw(number)
        assert r.min() >= 0 and t.max() <= 1 and (r <= t).all()
        np.testing.assert_allclose((t - r).mean(), progress / 3, atol=0.003)
        np.testing.assert_allclose(((r + t) / 2).var(), 1 / 24, rtol=0.02)
    r, t = draw(5_000)
    np.testing.assert_array_equal(r, t)
    share = np.mean(np.asarray(r) < 0.25)  # triangular: P(mid < x) = 2 x^2 below one half
    np.testing.assert_allclose(share, 0.125, atol=0.005)


def test_consistency_starts_behind_the_warmup(fmq):
    """Update number 5,000 has weight 0, number 5,001 weight 1."""
    args = make_args(fmq, consistency_warmup=5_000, consistency_anneal_end=50_000)
    nets, params = jit_networks(fmq, args), make_state(fmq, args).params
    keys = dict(zip(fmq.DRAWS, jax.random.split(jax.random.key(0), len(fmq.DRAWS)), strict=True))
    batch = random_batch(6, 3, 2, 2)
    for number, weight in ((1, 0), (5_000, 0), (5_001, 1), (90_000, 1)):
        loss, info = fmq.actor_loss(
            params, params["actor"], nets, args, "offline", batch, number, keys
        )
        expected = info["diagonal_loss"] + weight * info["consistency_loss"]
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert info["consistency_loss"] > 0.01


@pytest.mark.parametrize("precision,step,limit", [(32, 1e-2, 1e-3), (64, 1e-4, 1e-6)])
def test_slope_of_the_network(fmq, precision, step, limit):  # T15
    """JVP of the actor at the paper's size along (v, 1, 0) against central differences."""
    with jax.enable_x64(precision == 64):
        task = fmq.parse_task("cube-triple")
        args = fmq.resolve(fmq.Args(env_id="cube-triple"), task)
        params = jax.jit(lambda key: fmq.init_params(args, 46, 5, key))(jax.random.key(0))["actor"]
        dtype = jnp.float64 if precision == 64 else jnp.float32
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        rng = np.random.default_rng(0)
        obs, v = (jnp.asarray(rng.normal(size=(64, n)), dtype) for n in (46, 25))
        x = jnp.asarray(rng.normal(size=(64, 25)), dtype)
        r, t = jnp.asarray(np.sort(rng.random((2, 64, 1)), axis=0), dtype)
        u = jax.jit(lambda x, r: fmq.make_networks(args, 5).actor(params, obs, x, r, t))
        slope = jax.jvp(u, (x, r), (v, jnp.ones_like(r)))[1]
        difference = (u(x + step * v, r + step) - u(x - step * v, r - step)) / (2 * step)
        assert jnp.linalg.norm(slope - difference) / jnp.linalg.norm(slope) < limit


# ---- FMQ: the guided target ----
C = np.array([3.0, 4.0])


def linear_critic(params, obs, chunk):
    """Two equal critics c . a."""
    return jnp.stack([chunk @ jnp.asarray(C, chunk.dtype)] * 2)


def fmq_case(fmq, critic, act_dim=2, batch_size=8, offset=0.0, **flags):
    """L_FMQ of an actor whose output is its parameter vector: (loss function, frozen vector)."""
    args = make_args(fmq, horizon=1, **flags)
    actor = lambda params, obs, x, r, t: jnp.broadcast_to(params, x.shape)
    nets, batch = networks(fmq, actor, critic), random_batch(batch_size, 3, 1, act_dim)
    batch["valid"] = jnp.ones((batch_size, 1))
    rng = np.random.default_rng(1)
    noise = jnp.asarray(0.1 * rng.normal(size=(batch_size, act_dim)))
    r, frozen = jnp.asarray(rng.random((batch_size, 1))), jnp.full(act_dim, 0.1)

    def loss(u, frozen=frozen, critic_params=None):
        params = dict(actor=u, critic=critic_params)
        return fmq.fmq_loss(params, frozen, nets, args, batch, noise, r)

    return loss, frozen


def test_linear_critic(fmq, x64):  # T6
    args = make_args(fmq)
    u_off = np.array([[0.3, -0.2]])
    target = fmq.guided_target(u_off, C[None], jnp.ones(1), args)
    np.testing.assert_allclose(target - u_off, [[0.6, 0.8]], atol=1e-8)
    for r, gain in ((0.0, 5.0), (0.25, 3.75)):
        ours = (1 - r) * (target - u_off)[0] @ C
        np.testing.assert_allclose(ours, gain, atol=1e-7)
        others = np.random.default_rng(0).normal(size=(10_000, 2))
        others /= np.linalg.norm(others, axis=1, keepdims=True)
        assert ((1 - r) * others @ C).max() <= ours + 1e-7
    loss, frozen = fmq_case(fmq, linear_critic, beta=0.0)  # the loss regresses on that target
    for r_shift in ([0.6, 0.8], [0.0, 0.0]):
        expected = 0.5 * ((0.6 - r_shift[0]) ** 2 + (0.8 - r_shift[1]) ** 2)
        np.testing.assert_allclose(loss(frozen + jnp.asarray(r_shift))[0], expected, atol=1e-8)


def test_no_gradient_no_step(fmq):  # T7
    flat = lambda params, obs, chunk: jnp.ones((2, *chunk.shape[:-1]))
    loss, frozen = fmq_case(fmq, flat)
    assert loss(frozen)[0] == 0
    away = frozen + jnp.asarray([1.0, 2.0])
    np.testing.assert_allclose(loss(away)[0], 2.5, rtol=1e-6)
    grad = jax.grad(lambda u: loss(u)[0])(away)
    np.testing.assert_allclose(grad, [1.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("r,gain", [(0.5, 0.05), (0.4, 0.0), (0.2, -0.16)])
def test_curved_critic(fmq, x64, r, gain):  # T8
    """Q = -|a - a*|^2 at distance 0.3: better if and only if (1 - r) eta < 0.6."""
    best = np.array([0.2, -0.1])
    start = best + 0.3 * np.array([0.6, 0.8])
    q = lambda a: -jnp.sum((a - best) ** 2)
    noise = np.array([0.5, 0.5])  # a_r; u_off takes it to `start`
    u_off = (start - noise) / (1 - r)
    args = make_args(fmq)
    target = fmq.guided_target(u_off[None], jax.grad(q)(start)[None], jnp.ones(1), args)
    np.testing.assert_allclose(q(noise + (1 - r) * target[0]) - q(start), gain, atol=1e-7)


@pytest.mark.parametrize("dim,expected", [(25, 0.04), (40, 0.025), (105, 0.0095238)])
def test_loss_at_the_start(fmq, dim, expected):  # T9
    weights = np.random.default_rng(0).normal(size=dim)
    equal = lambda params, obs, chunk: jnp.stack([chunk @ jnp.asarray(weights, chunk.dtype)] * 2)
    apart = lambda *inputs: equal(*inputs) + jnp.asarray([[0.0], [1.0]])
    loss, frozen = fmq_case(fmq, equal, dim)
    value, info = loss(frozen)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert info["radius"] == 1 and info["drift"] == 0
    if dim == 25:
        loss, frozen = fmq_case(fmq, apart, dim)
        np.testing.assert_allclose(loss(frozen)[0], 0.0236686, rtol=1e-5)
    # eta scales the target
    loss, frozen = fmq_case(fmq, equal, dim, eta=0.3)
    np.testing.assert_allclose(loss(frozen)[0], 0.09 / dim, rtol=1e-5)


def test_disagreement(fmq):  # T10
    args = make_args(fmq)
    delta = jnp.asarray([1.0, 2, 3, 4])
    expected = [0.892857, 0.806452, 0.735294, 0.675676]
    np.testing.assert_allclose(fmq.trust_radius(delta, args), expected, atol=1e-6)
    np.testing.assert_allclose(fmq.trust_radius(7 * delta, args), expected, atol=1e-6)
    np.testing.assert_allclose(fmq.trust_radius(0 * delta, args), 1.0)
    np.testing.assert_allclose(fmq.trust_radius(delta, with_changes(args, beta=0.0)), 1.0)
    halved = fmq.trust_radius(delta, with_changes(args, eta=0.5))
    np.testing.assert_allclose(halved, np.asarray(expected) / 2, atol=1e-6)
    fixed = with_changes(args, adaptive_eta=False)
    np.testing.assert_allclose(fmq.trust_radius(delta, fixed), 0.5)
    np.testing.assert_allclose(fmq.trust_radius(delta, with_changes(fixed, eta=2.0)), 2.0)
    half_normal = jnp.abs(jax.random.normal(jax.random.key(0), (400_000,)))
    np.testing.assert_allclose(fmq.trust_radius(half_normal, args).mean(), 0.7907, atol=0.002)


def test_disagreement_reaches_the_radius(fmq, x64):
    """Critics that differ by 1, 2, 3, 4 at the four windows' endpoints."""
    spread = jnp.asarray([1.0, 2, 3, 4])
    critic = lambda p, o, chunk: jnp.stack([chunk.sum(-1), chunk.sum(-1) + spread])
    loss, frozen = fmq_case(fmq, critic, batch_size=4)
    expected = [0.892857, 0.806452, 0.735294, 0.675676]
    value, info = loss(frozen)
    np.testing.assert_allclose(info["radius"], np.mean(expected), atol=1e-6)
    np.testing.assert_allclose(value, np.mean(np.square(expected)) / 2, atol=1e-6)


def test_only_the_first_critic_guides(fmq):
    critic = lambda p, o, chunk: jnp.stack([chunk @ jnp.asarray(C, chunk.dtype), -9 * chunk[:, 0]])
    loss, frozen = fmq_case(fmq, critic, beta=0.0)
    np.testing.assert_allclose(loss(frozen + jnp.asarray([0.6, 0.8]))[0], 0, atol=1e-12)


def test_gradient_gates(fmq):  # T11
    args = make_args(fmq)
    nets, state = jit_networks(fmq, args), make_state(fmq, args)
    offline = make_state(fmq, args, seed=1).params["actor"]
    batch, rng = random_batch(6, 3, 2, 2), np.random.default_rng(0)
    noise, r = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.random((6, 1)))
    for grad_at in ("offline", "online"):
        setting = with_changes(args, grad_at=grad_at)
        loss = lambda p, off, s=setting: fmq.fmq_loss(p, off, nets, s, batch, noise, r)[0]
        grads, frozen = jax.grad(loss, argnums=(0, 1))(state.params, offline)
        assert all(not np.any(x) for x in jax.tree.leaves((grads["critic"], frozen)))
        assert any(np.any(x) for x in jax.tree.leaves(grads["actor"]))


@pytest.mark.parametrize("grad_at", ["offline", "online"])
def test_fmq_loss_written_out(fmq, x64, grad_at):
    """The whole of Eq. 12 in NumPy, with the critic's gradient by finite differences. Wherever that
    is taken, the critics' disagreement is taken at the frozen actor's endpoint."""
    args = make_args(fmq, grad_at=grad_at, hidden_dims=(16, 16))
    nets = jit_networks(fmq, args)
    double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    params = double(make_state(fmq, args).params)
    offline = double(make_state(fmq, args, seed=1).params["actor"])
    batch, rng = random_batch(6, 3, 2, 2), np.random.default_rng(0)
    obs, noise, r = batch["obs"], rng.normal(size=(6, 4)), rng.random((6, 1))
    loss, info = fmq.fmq_loss(params, offline, nets, args, batch, noise, r)

    x = (1 - r) * noise + r * batch["actions"]
    u, u_off = (np.asarray(nets.actor(p, obs, x, r, 1.0)) for p in (params["actor"], offline))
    off_end, on_end = (np.clip(x + (1 - r) * v, -1, 1) for v in (u_off, u))
    end = off_end if grad_at == "offline" else on_end
    q = lambda a: np.asarray(nets.critic(params["critic"], obs, a))
    h = 1e-6 * np.eye(4)
    grad = np.stack([(q(end + e)[0] - q(end - e)[0]) / 2e-6 for e in h], axis=-1)
    grad /= np.linalg.norm(grad, axis=-1, keepdims=True)
    delta = np.abs(q(off_end)[0] - q(off_end)[1]) / np.sqrt(2)
    np.testing.assert_allclose(info["disagreement"], delta.mean() / np.sqrt(2), rtol=1e-6)
    assert np.abs(np.diff(q(off_end) - q(on_end), axis=0)).mean() > 0.01  # elsewhere it is another
    eta = 1 / (1 + 0.3 * delta / delta.mean())
    error = np.repeat(batch["valid"], 2, axis=1) * (u - u_off - eta[:, None] * grad) ** 2
    np.testing.assert_allclose(loss, error.sum() / 24, rtol=1e-6)


def test_radius_of_the_raw_gradient(fmq, x64):  # T12
    """Without normalisation the step is sigma^2 c / (2 alpha), the best of c d - alpha |d|^2."""
    args = make_args(fmq, normalize_grad=False, adaptive_eta=False)
    c = np.array([2.0, 0.0])
    step = fmq.guided_target(np.zeros((1, 2)), c[None], fmq.trust_radius(jnp.ones(1), args), args)
    np.testing.assert_allclose(step, [[1.0, 0.0]], atol=1e-12)
    grid = np.stack(np.meshgrid(*[np.linspace(-2, 2, 201)] * 2), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(grid[(grid @ c - (grid**2).sum(1)).argmax()], step[0], atol=1e-9)


# ---- acting ----


def test_best_of_n_is_the_loop(fmq):
    """One fused pass = sample, score and choose one by one; mean and min choose differently."""
    args = make_args(fmq, num_samples=6)
    nets, params = jit_networks(fmq, args), make_state(fmq, args).params
    obs = np.random.default_rng(0).normal(size=(40, 3))
    noise = np.random.default_rng(1).normal(size=(40, 6, 4))
    chosen = {}
    for pessimistic in (False, True):
        ours = fmq.best_of_n(params, nets, args, obs, noise, jnp.asarray(pessimistic))
        for b in range(40):
            chunks = [
                np.clip(x + nets.actor(params["actor"], obs[b], x, 0.0, 1.0), -1, 1)
                for x in noise[b]
            ]
            q = [np.asarray(nets.critic(params["critic"], obs[b], chunk)) for chunk in chunks]
            score = [x.min() if pessimistic else x.mean() for x in q]
            np.testing.assert_allclose(ours[b], chunks[int(np.argmax(score))], atol=1e-5)
        chosen[pessimistic] = ours
    assert not np.allclose(chosen[False], chosen[True])


def test_flow_sampler_is_ten_euler_steps(fmq):
    args = make_args(fmq, actor="flow")
    nets, params = jit_networks(fmq, args), make_state(fmq, args).params
    obs, x = np.ones((5, 3)), np.float32(np.random.default_rng(0).normal(size=(5, 4)))
    expected = x
    for i in range(10):
        expected = expected + 0.1 * np.asarray(
            nets.actor(params["actor"], obs, expected, i / 10, 9.9)
        )
    ours = fmq.sample_chunk(params, nets, args, obs, x)
    np.testing.assert_allclose(ours, np.clip(expected, -1, 1), atol=1e-5)
    # from t' onwards, as beam search completes: the exact flow of a constant velocity
    constant = networks(fmq, lambda p, o, x, r, t: jnp.full_like(x, 0.2))
    end = fmq.sample_chunk({"actor": None}, constant, args, obs, jnp.zeros((5, 4)), 0.6)
    np.testing.assert_allclose(end, 0.08, atol=1e-6)


@pytest.mark.parametrize("jumps", [1, 2, 5])
def test_jumps_of_an_exact_flow_map_compose(fmq, jumps):
    """X_{1/2,1} after X_{0,1/2} is X_{0,1}; by the velocities alone, as a flow, it would not be."""
    args = make_args(fmq, horizon=1, flow_steps=jumps)
    nets, x = networks(fmq, exact_u), jnp.asarray([[-1.0], [0.2], [1.0]])
    ends = fmq.sample_chunk({"actor": None}, nets, args, None, x)
    np.testing.assert_allclose(ends, exact_map(x, 0.0, 1.0), atol=1e-5)
    ends = fmq.sample_chunk({"actor": None}, nets, args, None, x, 0.3)
    np.testing.assert_allclose(ends, exact_map(x, 0.3, 1.0), atol=1e-5)
    diagonal = networks(fmq, lambda p, obs, x, r, t: exact_u(p, obs, x, r, r))
    euler = fmq.sample_chunk({"actor": None}, diagonal, args, None, x)
    assert np.abs(euler - exact_map(x, 0.0, 1.0)).max() > 0.02


def search_case(fmq, **flags):
    args = make_args(fmq, hidden_dims=(16, 16), **flags)
    return args, jit_networks(fmq, args), make_state(fmq, args).params


def test_beam_search_without_rounds_is_best_of_m(fmq):  # T13
    args, nets, params = search_case(fmq, qgbs_rounds=0, qgbs_eta=0.0)
    for i in range(5):
        obs, key = jax.random.normal(jax.random.key(i), (3,)), jax.random.key(i)
        noise = jax.random.normal(jax.random.split(key)[0], (args.qgbs_beam, 4))
        expected = fmq.best_of_n(params, nets, args, obs, noise, True)
        ours = fmq.beam_search(params, nets, args, obs, 4, key)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_beam_search_step_by_step(fmq):
    """Algorithm 2 as a loop over lists; what it returns is the best of the last beam."""
    args, nets, params = search_case(fmq, qgbs_rounds=2, qgbs_beam=3, qgbs_branches=2)
    obs, key = jnp.ones(3), jax.random.key(3)
    value = lambda a: float(nets.critic(params["critic"], obs, a).min())
    start_key, round_key = jax.random.split(key)
    jump = lambda x, r: jnp.clip(x + (1 - r) * nets.actor(params["actor"], obs, x, r, 1.0), -1, 1)
    beam = [jump(x, 0.0) for x in jax.random.normal(start_key, (3, 4))]
    for k in range(2):
        noise = jax.random.normal(jax.random.fold_in(round_key, k), (3, 2, 4))
        children = [jump(0.6 * beam[m] + 0.4 * noise[m, b], 0.6) for m in range(3) for b in (0, 1)]
        beam = sorted(children, key=value, reverse=True)[:3]
        for m, chunk in enumerate(beam):
            grad = jax.grad(lambda a: nets.critic(params["critic"], obs, a).min())(chunk)
            beam[m] = jnp.clip(chunk + 0.3 * grad / jnp.linalg.norm(grad), -1, 1)
    ours = fmq.beam_search(params, nets, args, obs, 4, key)
    np.testing.assert_allclose(ours, max(beam, key=value), atol=1e-5)
    assert all(value(ours) >= value(chunk) - 1e-5 for chunk in beam)


@pytest.mark.parametrize("rounds,steps", [(0, 1), (1, 1), (2, 2)])
def test_beam_search_steps_up_a_linear_critic(fmq, rounds, steps):
    """A step of length eta_q raises Q = c a by eta_q |c|; without rounds it is still taken once.
    Jumps that all end at one point, from t' at where they start: only these steps move a chunk."""
    args = make_args(fmq, qgbs_rounds=rounds)
    back = lambda p, o, x, r, t: jnp.where(r == 0, 0.1 - x, 0.0)
    nets, params, chunks = networks(fmq, back, linear_critic), dict(actor=None, critic=None), {}
    for eta in (0.0, 0.3):
        own = with_changes(args, qgbs_eta=eta, qgbs_snr=1e9)  # t' = 1: nothing is renoised
        chunks[eta] = fmq.beam_search(params, nets, own, None, 2, jax.random.key(0))
    np.testing.assert_allclose(chunks[0.0], [0.1, 0.1], atol=1e-5)
    np.testing.assert_allclose((chunks[0.3] - chunks[0.0]) @ C, 1.5 * steps, atol=1e-4)
    np.testing.assert_allclose(chunks[0.3], 0.1 + 0.3 * steps * C / 5, atol=1e-5)


@pytest.mark.parametrize(
    "setting,jumps",
    [((4, 4, 1), 20), ((8, 2, 1), 24), ((16, 1, 1), 32), ((4, 4, 2), 36), ((16, 4, 2), 144)],
)
def test_actor_evaluations_of_beam_search(fmq, setting, jumps):
    beam, branches, rounds = setting
    args = make_args(fmq, qgbs_beam=beam, qgbs_branches=branches, qgbs_rounds=rounds)
    calls = []

    def actor(params, obs, x, r, t):
        calls.append((math.prod(x.shape[:-1]), r, t))
        return -x

    nets = networks(fmq, actor, linear_critic)
    fmq.beam_search(dict(actor=None, critic=None), nets, args, None, 2, jax.random.key(0))
    assert sum(rows for rows, _, _ in calls) == jumps
    assert [(r, t) for _, r, t in calls] == [(0.0, 1.0)] + [(0.6, 1.0)] * rounds


# ---- one update ----


def update_once(fmq, args, state, batch, objective, key=0):
    update = fmq.make_update(fmq.make_networks(args, 2), args, objective)
    return jax.jit(update)(state, batch, jax.random.key(key))


def test_target_of_the_critic(fmq):
    """y = R + discount * agg Q'(s', a'), a' chosen by the online critic; windows that leave their
    episode weigh nothing but count; the target network lags by one step."""
    args = make_args(fmq, num_samples=5)
    nets, batch = jit_networks(fmq, args), random_batch(8, 3, 2, 2)
    state = make_state(fmq, args)
    state = state.replace(target_critic=random_params(state.target_critic, 7))
    for pessimistic in (False, True):
        state = state.replace(pessimistic=jnp.asarray(pessimistic))
        after, info = update_once(fmq, args, state, batch, "offline")
        key = dict(zip(fmq.DRAWS, jax.random.split(jax.random.key(0), len(fmq.DRAWS)), strict=True))
        noise = jax.random.normal(key["bootstrap"], (8, 5, 4))
        best = fmq.best_of_n(state.params, nets, args, batch["next_obs"], noise, pessimistic)
        q = np.asarray(nets.critic(state.target_critic, batch["next_obs"], best))
        q = q.min(axis=0) if pessimistic else q.mean(axis=0)
        target = batch["returns"] + batch["discounts"] * q
        ours = fmq.td_target(state, nets, args, batch, noise)
        assert ours.shape == (8,)
        np.testing.assert_allclose(ours, target, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info["td_target"], target.mean(), rtol=1e-5)
        error = nets.critic(state.params["critic"], batch["obs"], batch["actions"]) - target
        loss = (np.asarray(error)[:, 1::2] ** 2).sum() / 16
        np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-4)
        expected = jax.tree.map(
            lambda old, new: 0.995 * old + 0.005 * new, state.target_critic, state.params["critic"]
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.target_critic, expected
        )
        assert after.step == 1


def test_one_adam_step_on_each_loss(fmq):
    """Adam on the sum = Adam on each group's own loss."""
    args = make_args(fmq)
    nets, batch, state = jit_networks(fmq, args), random_batch(8, 3, 2, 2), make_state(fmq, args)
    keys = dict(zip(fmq.DRAWS, jax.random.split(jax.random.key(0), len(fmq.DRAWS)), strict=True))
    for objective in ("offline", "fmq", "mvp"):
        after, _ = update_once(fmq, args, state, batch, objective)
        loss = lambda p, o=objective: fmq.actor_loss(
            p, state.offline_actor, nets, args, o, batch, state.step + 1, keys
        )[0]
        grads = jax.grad(loss)(state.params)
        assert all(not np.any(x) for x in jax.tree.leaves(grads["critic"]))
        adam = optax.adam(args.learning_rate)
        step, _ = adam.update(grads["actor"], adam.init(state.params["actor"]))
        expected = optax.apply_updates(state.params["actor"], step)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
        jax.tree.map(close, after.params["actor"], expected)
        jax.tree.map(np.testing.assert_array_equal, after.offline_actor, state.offline_actor)


def test_losses_of_each_objective(fmq):
    """What is computed: mvp is the offline loss, fmq L_FMQ alone unless weights bring more."""
    state, batch = make_state(fmq, make_args(fmq)), random_batch(8, 3, 2, 2)
    names = ("diagonal_loss", "consistency_loss", "fmq_loss")

    def computed(objective, **flags):
        args = make_args(fmq, **flags)
        state = make_state(fmq, args)
        _, info = update_once(fmq, args, state, batch, objective)
        assert {"critic_loss", "q", "td_target"} <= set(info)
        return [bool(info.get(name, 0) != 0) for name in names]

    assert computed("offline") == [True, True, False]
    assert computed("mvp") == [True, True, False]
    assert computed("fmq") == [False, False, True]
    assert computed("fmq", online_diag_weight=1.0) == [True, False, True]
    assert computed("fmq", online_cons_weight=1.0) == [False, True, True]
    for objective in ("offline", "mvp"):
        assert computed(objective, actor="flow") == [True, False, False]
    a, b = (update_once(fmq, make_args(fmq), state, batch, o)[0] for o in ("offline", "mvp"))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_mvp_on_reselected_chunks(fmq):
    """The actor imitates BoN(s), all steps valid; the critic keeps the chunks of the buffer."""
    args = make_args(fmq, online_objective="mvp", mvp_target="reselect")
    nets, batch, state = jit_networks(fmq, args), random_batch(8, 3, 2, 2), make_state(fmq, args)
    _, info = update_once(fmq, args, state, batch, "mvp")
    keys = dict(zip(fmq.DRAWS, jax.random.split(jax.random.key(0), len(fmq.DRAWS)), strict=True))
    noise = jax.random.normal(keys["reselect"], (8, 3, 4))
    best = fmq.best_of_n(state.params, nets, args, batch["obs"], noise, False)
    chosen = batch | dict(actions=best, valid=jnp.ones((8, 2)))
    x = jax.random.normal(keys["diag_noise"], (8, 4))
    t = jax.random.uniform(keys["diag_time"], (8, 1))
    expected, _ = fmq.diagonal_loss(state.params, nets, chosen, x, t)
    np.testing.assert_allclose(info["diagonal_loss"], expected, rtol=1e-4)
    _, plain_info = update_once(fmq, make_args(fmq), state, batch, "mvp")
    np.testing.assert_allclose(info["critic_loss"], plain_info["critic_loss"], rtol=1e-5)
    assert abs(plain_info["diagonal_loss"] - expected) > 1e-3
