"""FlowQ's losses, guidance and sampler against independent calculations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, load_script
from helpers import make_carry, random_params
from helpers import make_state as fresh_state

TINY = dict(env_id="pointmaze-medium", hidden_dims=(8, 8), batch_size=16, flow_steps=3)
TIMES = np.array([0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95])
FIXED = [(f, s) for f in ("score", "drop-time", "field") for s in ("t", "t2", "t2_over_1mt")]


@pytest.fixture(scope="module")
def flowq():
    return load_script(ROOT / "algos" / "flowq.py")


OWN_TASK = """
import jax.numpy as jnp
import numpy as np
from types import SimpleNamespace
from gymnasium.spaces import Box

def make_task(name, dataset_dir):
    spaces = dict(action_space=Box(-1, 1, (2,), np.float32))
    spaces |= dict(observation_space=Box(-1, 1, (1,), np.float32))
    same = lambda x, *_: x
    steps = dict(initial=lambda rng: jnp.zeros(1), transition=same, observation=same)
    steps |= dict(reward=lambda s, *_: s[0], terminal=lambda s, _: s[0] > 0, max_episode_steps=1)
    env = SimpleNamespace(**spaces, **steps)
    return dict(env=env, critic=lambda obs, a: obs[..., 0] * a[..., 0] + a[..., 1])
"""


def resolved(flowq, **flags):
    args = flowq.Args(**(TINY | flags))
    return flowq.resolve(args, flowq.parse_task(args.env_id))


def make_networks(flowq, args, act_dim=2):
    return flowq.make_networks(args, act_dim, flowq.parse_task(args.env_id))


def make_batch(obs_dim=3, act_dim=2, size=16, seed=0):
    rng = np.random.default_rng(seed)
    batch = dict(
        obs=rng.normal(size=(size, obs_dim)),
        actions=rng.uniform(-1, 1, (size, act_dim)),
        returns=rng.normal(size=size),
        discounts=0.99 * (rng.random(size) < 0.7),
        next_obs=rng.normal(size=(size, obs_dim)),
    )
    return {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}


def make_state(flowq, args, obs_dim=3, act_dim=2, seed=0):
    """A state whose parameters, targets and averages all differ and sit at no special value."""
    state = fresh_state(flowq, args, obs_dim, act_dim, seed)
    return state.replace(
        params=random_params(state.params, seed),
        target_critic=random_params(state.target_critic, seed + 1),
        ema=random_params(state.ema, seed + 2),
    )


def draws(shape, seed=0):
    rng = np.random.default_rng(seed)
    eps, t = rng.normal(size=shape), rng.uniform(0, 0.999, (shape[0], 1))
    return jnp.asarray(eps, jnp.float32), jnp.asarray(t, jnp.float32)


def settings(flowq, lam=1.0):
    return flowq.Settings(jnp.float32(lam))


# ---- c(t) ----
def general_weight(form, schedule, t):
    """c(t) from h and a central difference for h'."""
    h = {"t": lambda t: t, "t2": lambda t: t**2, "t2_over_1mt": lambda t: t**2 / (1 - t)}[schedule]
    if form == "score":
        return h(t) * (1 - t) / t
    if form == "drop-time":
        return h(t) * (1 - t)
    d = 1e-6
    return (h(t + d) - h(t - d)) / (2 * d) * (1 - t) ** 2 - h(t) * (1 - t)


@pytest.mark.parametrize("form,schedule", FIXED)
def test_weight_table(flowq, form, schedule):
    c = flowq.GUIDANCE[form][schedule]
    assert np.abs(c(TIMES) - general_weight(form, schedule, TIMES)).max() < 1e-6
    ends = c(jnp.asarray([0.0, 1 - 1e-3]))
    assert jnp.isfinite(ends).all() and jnp.abs(ends).max() <= 1


def test_learned_schedule_starts_at_t_and_keeps_its_ends(flowq):
    """c = 1 - t exactly at the start; whatever the parameters, r(1) = 1 and c >= 0."""
    args = resolved(flowq, schedule="learned")
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    fresh = fresh_state(flowq, args, 3, 2).params
    t = jnp.linspace(0, 0.999, 50)[:, None]
    np.testing.assert_array_equal(flowq.guidance_weight(fresh, t, nets, args), 1 - t)
    c = flowq.guidance_weight(state.params, t, nets, args)
    assert (c >= 0).all() and jnp.abs(c - (1 - t)).max() > 0.01
    assert nets.schedule(state.params["schedule"], jnp.ones((1, 1)))[0, 0] == 1


# ---- guidance ----
def quadratic(params, obs, actions):
    """Two critics whose slopes are known: -k |a - m|^2 + s_0 for (k, m) in params."""
    k, m = params["k"][:, None], params["m"]
    return -k * ((actions[None] - m) ** 2).sum(-1) + obs[:, 0]


QUADRATIC = dict(k=jnp.asarray([1.0, 3.0]), m=jnp.asarray([[[0.2, 0.1]], [[-0.4, 0.0]]]))


def slope_of_quadratic(y, obs, how):
    """NumPy: grad of the mean or the smaller critic at y."""
    k, m = np.float64(QUADRATIC["k"]), np.float64(QUADRATIC["m"])
    slopes = -2 * k[:, None, None] * (y[None] - m)
    if how == "mean":
        return slopes.mean(0)
    which = (-k[:, None] * ((y[None] - m) ** 2).sum(-1)).argmin(0)
    return slopes[which, np.arange(len(y))]


@pytest.mark.parametrize("how", ["mean", "min"])
@pytest.mark.parametrize("grad_at", ["noisy", "mean", "data", "denoised"])
@pytest.mark.parametrize("clip", [0.0, 0.15])
def test_policy_loss(flowq, grad_at, how, clip):
    """The whole loss in NumPy: place and clip of the gradient, scale, cap, target."""
    args = resolved(flowq, grad_at=grad_at, guidance_q=how, guidance_clip=clip, schedule="t2")
    nets = make_networks(flowq, args)._replace(critic=quadratic)
    state = make_state(flowq, args).replace(target_critic=QUADRATIC)
    batch, (eps, t) = make_batch(), draws((16, 2))
    loss, info = flowq.policy_loss(
        state.params, state, batch, eps, t, settings(flowq, 0.7), nets, args
    )

    a, e, time, obs = (np.float64(x) for x in (batch["actions"], eps, t, batch["obs"]))
    x = time * a + (1 - time) * e
    y = dict(noisy=x, mean=time * a, data=a).get(grad_at)
    if grad_at == "denoised":  # where the flow without guidance leads in one step
        y = x + (1 - time) * nets.base(state.params["base"], batch["obs"], jnp.float32(x), t)
    assert grad_at != "noisy" or (np.abs(y) > 1).any()  # the clip is at work
    values = np.float64(quadratic(QUADRATIC, batch["obs"], batch["actions"]))
    q = values.mean(0) if how == "mean" else values.min(0)
    g = slope_of_quadratic(np.clip(y, -1, 1), obs, how) / (np.abs(q).mean() + 1e-6)
    guidance = 0.7 * time * (1 - time) * g
    length = np.linalg.norm(guidance, axis=1, keepdims=True)
    if clip:
        assert info["guidance_clipped"] == (length > clip).mean() > 0
        guidance = guidance * np.minimum(1, clip / length)
    u = np.float64(nets.velocity(state.params["velocity"], batch["obs"], jnp.float32(x), t))
    expected = ((u - (a - e + guidance)) ** 2).mean()
    assert abs(loss - expected) < 1e-5 * max(1, expected)
    norms = np.linalg.norm(guidance, axis=1), np.linalg.norm(a - e, axis=1)
    assert abs(info["guidance_norm"] - norms[0].mean()) < 1e-5
    assert abs(info["guidance_ratio"] - norms[0].mean() / norms[1].mean()) < 1e-5
    cosine = ((a - e) * guidance).sum(1) / (norms[0] * norms[1])
    assert abs(info["guidance_cosine"] - cosine.mean()) < 1e-5
    assert abs(info["q_abs"] - np.abs(q).mean()) < 1e-5


def test_policy_gradient_by_finite_differences(flowq):
    args = resolved(flowq)
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    batch, (eps, t) = make_batch(), draws((16, 2))

    def loss(velocity):
        params = state.params | {"velocity": velocity}
        return flowq.policy_loss(params, state, batch, eps, t, settings(flowq, 3.0), nets, args)[0]

    params = state.params["velocity"]
    direction = random_params(jax.tree.map(jnp.zeros_like, params), 5, 1.0)
    along = lambda h: jax.tree.map(lambda p, d: p + h * d, params, direction)
    numeric = (loss(along(1e-2)) - loss(along(-1e-2))) / 2e-2
    pairs = zip(*map(jax.tree.leaves, (jax.grad(loss)(params), direction)), strict=True)
    exact = sum((g * d).sum() for g, d in pairs)
    assert abs(numeric - exact) < 2e-3 * abs(exact)


def test_posterior_slope_goes_through_the_unguided_flow(flowq):
    """lambda (1-t)/t times the slope in x_t of Q at the one-step end of the unguided flow; the clip
    of that end stops no slope, and the factor stays finite at t = 0."""
    args = resolved(flowq, velocity_form="posterior", guidance_clip=0.0, guidance_lambda=0.7)
    nets = make_networks(flowq, args)._replace(critic=quadratic)
    state = make_state(flowq, args).replace(target_critic=QUADRATIC)
    assert set(state.params) == {"velocity", "critic", "base"}
    batch, (eps, t) = make_batch(), draws((16, 2))
    t = t.at[0].set(0.0)
    x = t * batch["actions"] + (1 - t) * eps
    end = lambda x: x + (1 - t) * nets.base(state.params["base"], batch["obs"], x, t)
    h, columns = 1e-2, []
    for i in range(2):  # the Jacobian of the end, by differences
        step = jnp.zeros(2).at[i].set(h)
        columns.append(np.float64(end(x + step) - end(x - step)) / (2 * h))
    jacobian = np.stack(columns, axis=-1)  # (B, end, x)
    clipped = np.clip(np.float64(end(x)), -1, 1)
    assert (clipped != end(x)).any()
    scale = np.abs(np.float64(quadratic(QUADRATIC, batch["obs"], batch["actions"])).mean(0)).mean()
    slope = np.einsum("bex,be->bx", jacobian, slope_of_quadratic(clipped, batch["obs"], "mean"))
    guidance = 0.7 * (1 - t) / np.maximum(t, 0.05) * slope / scale
    inputs = (state, batch, eps, t, settings(flowq, 0.7), nets, args)
    loss, _ = flowq.policy_loss(state.params, *inputs)
    np.testing.assert_allclose(flowq.energy_slope(*inputs[:4], nets, args)[0] * scale, slope,
                               atol=2e-3)  # fmt: skip
    u = np.float64(nets.velocity(state.params["velocity"], batch["obs"], x, t))
    expected = ((u - (batch["actions"] - eps + guidance)) ** 2).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-3)
    grads = jax.grad(lambda p: flowq.policy_loss(p, *inputs)[0])(state.params)
    moved = {k for k, g in grads.items() if any(np.any(x) for x in jax.tree.leaves(g))}
    assert moved == {"velocity"}


def test_weighted_rows(flowq):
    """Flow matching, its rows weighted by exp(lambda (Q - V)), at most e^5 before normalising; no
    slope of Q enters; at lambda = 0 it is flow matching."""
    args = resolved(flowq, velocity_form="weighted")
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    assert set(state.params) == {"velocity", "critic", "value"}
    batch, (eps, t) = make_batch(), draws((16, 2))
    q = np.float64(nets.critic(state.target_critic, batch["obs"], batch["actions"])).mean(0)
    v = np.float64(nets.value(state.params["value"], batch["obs"]))
    x = t * batch["actions"] + (1 - t) * eps
    u = np.float64(nets.velocity(state.params["velocity"], batch["obs"], x, t))
    error = ((u - np.float64(batch["actions"] - eps)) ** 2).mean(1)
    for lam, capped in ((0.0, False), (1.0, False), (40.0, True)):
        exponent = lam * (q - v) / (np.abs(q).mean() + 1e-6)
        assert (exponent > 5).any() == capped
        w = np.exp(np.minimum(exponent, 5))
        w /= w.sum()
        inputs = (state, batch, eps, t, settings(flowq, lam), nets, args)
        loss, info = flowq.policy_loss(state.params, *inputs)
        np.testing.assert_allclose(loss, (w * error).sum(), rtol=1e-4)
        np.testing.assert_allclose(info["row_share"], 1 / (16 * (w**2).sum()), rtol=1e-4)
        assert info["guidance_norm"] == 0
        plain = flow_matching(state.params, *inputs)[0]
        assert (loss == plain) == (lam == 0)
        grads = jax.grad(lambda p, i=inputs: flowq.policy_loss(p, *i)[0])(state.params)
        moved = {k for k, g in grads.items() if any(np.any(x) for x in jax.tree.leaves(g))}
        assert moved == {"velocity"}


def test_guidance_warmup(flowq):
    """lambda rises with the updates to its full value; the step is that of the smaller lambda."""
    nets, state = make_networks(flowq, resolved(flowq)), make_state(flowq, resolved(flowq))
    updates = [
        jax.jit(flowq.make_update(nets, resolved(flowq, guidance_warmup=n))) for n in (0, 10)
    ]

    def policy_after(update, step, lam):
        now, key = state.replace(step=jnp.int32(step)), jax.random.key(0)
        new, info = update(now, make_batch(), key, settings(flowq, lam))
        return jax.tree.leaves(new.params["velocity"]), float(info["guidance_norm"])

    _, length = policy_after(updates[0], 0, 2.0)
    for step, share in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        ours, norm = policy_after(updates[1], step, 2.0)
        expected, _ = policy_after(updates[0], step, 2.0 * share)
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert (norm == 0) == (share == 0) and (abs(norm - length) < 1e-5) == (share == 1)


def guidance_of(flowq, critic, y, q_norm="mean-abs"):
    """Scaled slope at data actions y, for a critic of (params, obs, actions)."""
    args = resolved(flowq, grad_at="data", q_norm=q_norm)
    nets = make_networks(flowq, args)._replace(critic=critic)
    state = make_state(flowq, args)
    batch = make_batch() | {"actions": jnp.asarray(y, jnp.float32)}
    return flowq.energy_slope(state, batch, *draws((16, 2)), nets, args)[0]


def test_normaliser_undoes_scale_but_not_offset(flowq):
    y = np.random.default_rng(3).uniform(-2, 2, (16, 2))
    q = lambda p, obs, a: quadratic(QUADRATIC, obs, a)
    scaled = lambda p, obs, a: 70 * quadratic(QUADRATIC, obs, a)
    offset = lambda p, obs, a: quadratic(QUADRATIC, obs, a) - 100
    plain = guidance_of(flowq, q, y)
    np.testing.assert_allclose(guidance_of(flowq, scaled, y), plain, rtol=1e-5)
    shrunk = jnp.linalg.norm(guidance_of(flowq, offset, y)) / jnp.linalg.norm(plain)
    assert shrunk < 0.2  # the trap: an offset in the rewards weakens lambda
    outside = (np.abs(y) > 1).any(1)
    assert outside.any() and (jnp.abs(plain[outside]).min() > 0).all()


def test_toy_has_no_box(flowq):
    """Beyond +-1 the toy's actions are not clipped: neither data, nor paths' ends."""
    args = resolved(flowq, env_id="energy-toy", flow_steps=1)
    task = flowq.parse_task("energy-toy")
    raw = load_script(ROOT / "benchmark" / "tasks" / "energy_toy.py").toy_dataset(0, rows=1_000)
    data = flowq.prepare(raw, args, task)
    np.testing.assert_array_equal(data["actions"], raw["actions"])
    assert np.abs(raw["actions"]).max() > 1.2
    nets = make_networks(flowq, args)._replace(velocity=lambda p, obs, x, t: 0 * x)
    x = jnp.asarray([[3.0, -2.0]])
    np.testing.assert_array_equal(flowq.flow_endpoint(None, nets, jnp.zeros((1, 1)), x, args), x)
    boxed = make_networks(flowq, resolved(flowq))._replace(velocity=nets.velocity)
    np.testing.assert_array_equal(
        flowq.flow_endpoint(None, boxed, jnp.zeros((1, 1)), x, args), [[1.0, -1.0]]
    )


def test_exact_critic_is_the_task_files(flowq, tmp_path):
    """Q of the file, for both critics; the box is that of its environment; td works there too."""
    (tmp_path / "own.py").write_text(OWN_TASK)
    task = flowq.parse_task(f"{tmp_path}/own.py:any")
    nets = {}
    for critic in ("exact", "td"):
        args = flowq.resolve(flowq.Args(critic=critic, hidden_dims=(8,)), task)
        nets[critic] = flowq.make_networks(args, 2, task)
    obs, actions = jnp.asarray([[1.0], [2.0]]), jnp.asarray([[0.5, 3.0], [0.25, 1.0]])
    q = nets["exact"].critic(None, obs, actions)
    np.testing.assert_array_equal(q, [[3.5, 1.5]] * 2)
    still = nets["exact"]._replace(velocity=lambda p, obs, x, t: 0 * x)
    ends = flowq.flow_endpoint(None, still, obs, actions, args)
    np.testing.assert_array_equal(ends, [[0.5, 1.0], [0.25, 1.0]])
    assert set(flowq.init_params(args, 1, 2, jax.random.key(0))) == {"velocity", "critic"}


# ---- what receives a gradient ----
@pytest.mark.parametrize("critic", ["td", "iql"])
def test_gradients_reach_one_net_each(flowq, critic):
    args = resolved(flowq, critic=critic, schedule="learned", grad_at="denoised")
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    batch, (eps, t), key = make_batch(), draws((16, 2)), jax.random.key(0)
    drawn = (batch, eps, t, settings(flowq), nets, args)

    def td(params, fixed):
        target = flowq.td_target(params, fixed, batch, key, nets, args)
        return flowq.critic_loss(params, batch, target, nets)[0]

    losses = dict(
        velocity=lambda p, s: flowq.policy_loss(p, s, *drawn)[0],
        schedule=lambda p, s: flowq.schedule_loss(p, s, *drawn)[0],
        base=lambda p, s: flowq.base_loss(p, batch, eps, t, nets)[0],
        value=lambda p, s: flowq.value_loss(p, s, batch, nets, args)[0],
        critic=td,
    )
    assert set(losses) == set(state.params)
    for name, loss in losses.items():
        grads = jax.jit(jax.grad(loss))(state.params, state)
        for net, grad in grads.items():
            size = max(jnp.abs(g).max() for g in jax.tree.leaves(grad))
            assert (size > 0) == (net == name), f"{name} loss, gradient of {net}: {size}"

    def of_frozen(target_critic, ema):
        fixed = state.replace(target_critic=target_critic, ema=ema)
        return losses["velocity"](state.params, fixed)

    for grad in jax.tree.leaves(jax.grad(of_frozen, (0, 1))(state.target_critic, state.ema)):
        assert (grad == 0).all()


# ---- lambda = 0 ----
def policies_after(flowq, lam, critic_seed, steps=300):
    """State of two vmapped seeds after some updates, for some starting critics."""
    args = resolved(flowq, num_seeds=2, normalize_obs=False)
    nets, data = make_networks(flowq, args), make_batch(size=64)
    carry = make_carry(flowq, args, data, nets, settings(flowq, lam))
    critic = random_params(carry["state"].params["critic"], critic_seed)
    copy, params = jax.tree.map(jnp.copy, critic), carry["state"].params | {"critic": critic}
    carry["state"] = carry["state"].replace(params=params, target_critic=copy)
    program = flowq.Program(flowq.make_learn(nets, args), data, settings(flowq, lam))
    return program(carry, steps)["state"]


def flow_matching(params, state, batch, eps, t, settings, nets, args):
    """The policy's loss without guidance, written from the paper on flow matching."""
    x = t * batch["actions"] + (1 - t) * eps
    velocity = nets.velocity(params["velocity"], batch["obs"], x, t)
    loss = jnp.mean((velocity - (batch["actions"] - eps)) ** 2)
    return loss, {"policy_loss": loss}


@pytest.mark.slow
def test_lambda_zero_is_flow_matching_bit_for_bit(flowq, monkeypatch):
    """The same policy for two critics, and for a program that has no guidance in it."""
    states = [policies_after(flowq, *case) for case in ((0.0, 1), (0.0, 2), (1.0, 1))]
    with monkeypatch.context() as patch:
        patch.setattr(flowq, "policy_loss", flow_matching)
        states.append(policies_after(flowq, 0.0, 1))
    policies = [jax.tree.leaves(s.params["velocity"]) for s in states]
    for a, b, guided, plain in zip(*policies, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, plain)
        assert not np.array_equal(a, guided)
    critics = [jax.tree.leaves(s.params["critic"])[0] for s in states]
    assert not np.array_equal(critics[0], critics[1])


# ---- critics ----
def test_td_target_and_critic_loss(flowq):
    """One sampled action per next state, clipped, judged by the averaged policy and targets."""
    args = resolved(flowq, q_agg="min")
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    batch, key = make_batch(), jax.random.key(3)
    target = flowq.td_target(state.params, state, batch, key, nets, args)
    x = jax.random.normal(key, (1, 16, 2))[0]
    for k in range(3):
        x = x + nets.velocity(state.ema, batch["next_obs"], x, jnp.full((16, 1), k / 3)) / 3
    q = nets.critic(state.target_critic, batch["next_obs"], jnp.clip(x, -1, 1)).min(0)
    np.testing.assert_allclose(target, batch["returns"] + batch["discounts"] * q, atol=1e-5)
    loss, info = flowq.critic_loss(state.params, batch, target, nets)
    q = np.float64(nets.critic(state.params["critic"], batch["obs"], batch["actions"]))
    np.testing.assert_allclose(loss, ((q - np.asarray(target)) ** 2).mean(1).sum(), rtol=1e-5)
    np.testing.assert_allclose(info["q"], q.mean(), rtol=1e-5)


def test_max_backup_takes_each_critics_best_sample_first(flowq):
    args = resolved(flowq, q_agg="min", max_backup_samples=2)
    table = jnp.asarray([[[1.0], [4.0]], [[3.0], [2.0]]])  # critics x samples x one row
    nets = make_networks(flowq, args)._replace(critic=lambda p, obs, a: table)
    batch = make_batch(size=1) | dict(returns=jnp.zeros(1), discounts=jnp.ones(1))
    target = flowq.td_target({}, make_state(flowq, args), batch, jax.random.key(0), nets, args)
    assert target == 3  # min over samples first would give 2


def test_iql_target_and_expectile(flowq):
    args = resolved(flowq, critic="iql", expectile=0.7)
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    batch = make_batch()
    target = flowq.td_target(state.params, state, batch, jax.random.key(0), nets, args)
    v = nets.value(state.params["value"], batch["next_obs"])
    np.testing.assert_allclose(target, batch["returns"] + batch["discounts"] * v, atol=1e-6)
    loss, _ = flowq.value_loss(state.params, state, batch, nets, args)
    q = np.float64(nets.critic(state.target_critic, batch["obs"], batch["actions"])).min(0)
    error = q - np.float64(nets.value(state.params["value"], batch["obs"]))
    assert (error > 0).any() and (error < 0).any()
    weight = np.where(error > 0, 0.7, 0.3)
    np.testing.assert_allclose(loss, (weight * error**2).mean(), rtol=1e-5)
    # a constant V that minimises the loss is the 0.7-expectile
    grid = np.linspace(q.min(), q.max(), 2001)
    flat = [np.mean(np.where(q > v, 0.7, 0.3) * (q - v) ** 2) for v in grid]
    best = grid[np.argmin(flat)]
    excess, shortfall = np.maximum(q - best, 0).sum(), np.maximum(best - q, 0).sum()
    assert abs(0.7 * excess - 0.3 * shortfall) < 0.01 * 0.7 * excess


@pytest.mark.parametrize("clip", [0.0, 20.0])
def test_schedule_loss(flowq, clip):
    """Row weights, capped advantage, clipped guidance and residual in NumPy."""
    args = resolved(flowq, schedule="learned", guidance_clip=clip)
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    batch, (eps, t), lam = make_batch(), draws((16, 2)), 40.0
    loss, info = flowq.schedule_loss(
        state.params, state, batch, eps, t, settings(flowq, lam), nets, args
    )
    slope, _, _ = flowq.energy_slope(state, batch, eps, t, nets, args)
    q = np.float64(nets.critic(state.target_critic, batch["obs"], batch["actions"])).mean(0)
    v = np.float64(nets.value(state.params["value"], batch["obs"]))
    exponent = np.minimum(lam * (q - v) / (np.abs(q).mean() + 1e-6), 5)
    assert (exponent == 5).any() and (exponent < 5).any()
    w = np.exp(exponent) / np.exp(exponent).sum()
    x = t * batch["actions"] + (1 - t) * eps
    base = nets.base(state.params["base"], batch["obs"], x, t)
    c = (1 - t) * nets.schedule(state.params["schedule"], t)
    guidance = np.float64(lam * c * slope)
    length = np.linalg.norm(guidance, axis=-1, keepdims=True)
    if clip:
        assert (length > clip).any() and (length < clip).any()
        guidance *= np.minimum(1, clip / length)
    rest = np.float64(batch["actions"] - eps - base) - guidance
    np.testing.assert_allclose(loss, (w * (rest**2).mean(1)).sum(), rtol=1e-4)
    np.testing.assert_allclose(info["row_share"], 1 / (16 * (w**2).sum()), rtol=1e-4)
    assert info["c_0"] == nets.schedule(state.params["schedule"], jnp.zeros((1, 1)))[0, 0]
    of_lambda = lambda lam: (
        lambda params: flowq.schedule_loss(
            params, state, batch, eps, t, settings(flowq, lam), nets, args
        )[0]
    )
    grad = jax.grad(of_lambda(0.0))(state.params)  # as in a warm-up of the guidance
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad["schedule"]))


# ---- one update ----
def test_update_moves_every_net_and_averages(flowq):
    args = resolved(flowq, schedule="learned", schedule_warmup=1, tau=0.1, ema_decay=0.9)
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    update = flowq.make_update(nets, args)
    step = jax.jit(lambda s: update(s, make_batch(), jax.random.key(0), settings(flowq))[0])
    after = step(state)
    again = step(after)
    moved = lambda a, b: any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    for name in ("velocity", "critic", "value", "base"):
        assert moved(after.params[name], state.params[name])
    for part in ("params", "opt_state"):  # the schedule waits for one update
        before, middle, end = (getattr(s, part)["schedule"] for s in (state, after, again))
        assert not moved(before, middle) and moved(middle, end)
    for new, old, source, share in (
        (after.target_critic, state.target_critic, after.params["critic"], 0.1),
        (after.ema, state.ema, after.params["velocity"], 0.1),
    ):
        expected = jax.tree.map(lambda s, o, k=share: k * s + (1 - k) * o, source, old)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    assert after.step == 1


def test_policy_loss_uses_the_target_critic_before_its_step(flowq):
    """The velocity net's step is the same whatever tau is."""
    steps = []
    for tau in (0.0, 1.0):
        args = resolved(flowq, tau=tau)
        nets, state = make_networks(flowq, args), make_state(flowq, args)
        key = jax.random.key(0)
        step = jax.jit(flowq.make_update(nets, args))
        new, _ = step(state, make_batch(), key, settings(flowq))
        steps.append(new.params["velocity"])
    before = state.params["velocity"]
    for a, b, old in zip(*map(jax.tree.leaves, (*steps, before)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, old)


def test_learning_rate_decay_and_gradient_clip(flowq):
    """Cosine to 0 over the run; a clipped gradient is the unit direction times the limit."""
    args = resolved(flowq, lr_decay=True, offline_steps=10, learning_rate=0.1)
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.asarray([3.0, 0.0, -4.0])}
    adam = flowq.optimizer(args, "velocity")
    moments, sizes = adam.init(params), []
    for _ in range(11):
        move, moments = adam.update(grads, moments, params)
        sizes.append(float(-move["w"][0]))
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(sizes, expected, atol=1e-5)
    slow = resolved(flowq, learning_rate=0.1, actor_learning_rate=0.01, schedule="learned")
    for name, rate in dict(velocity=0.01, base=0.01, critic=0.1, value=0.1, schedule=1e-3).items():
        adam = flowq.optimizer(slow, name)
        move, _ = adam.update(grads, adam.init(params), params)
        np.testing.assert_allclose(-move["w"][0], rate, rtol=1e-5)
    clipped = flowq.optimizer(dataclasses.replace(args, grad_norm_clip=0.5), "velocity")
    _, moments = clipped.update(grads, clipped.init(params), params)
    mu = next(x for x in jax.tree.leaves(moments) if x.shape == (3,))  # first moment: 0.1 g
    np.testing.assert_allclose(mu, 0.1 * 0.5 * np.array([0.6, 0.0, -0.8]), atol=1e-6)


# ---- cost ----
def traced(fn, *inputs):
    return str(jax.make_jaxpr(fn)(*inputs))


@pytest.mark.slow
def test_policy_update_does_not_depend_on_flow_steps(flowq):
    """The traced program of a policy update is the same text for K = 1 and 50; that of the td
    critic's is not; under iql the whole update's is."""
    programs = {}
    for critic in ("td", "iql"):
        for k in (1, 50):
            args = resolved(flowq, flow_steps=k, critic=critic, schedule="learned")
            nets, state = make_networks(flowq, args), make_state(flowq, args)
            batch, (eps, t), lam = make_batch(), draws((16, 2)), settings(flowq)

            def policy_step(params, state, nets=nets, args=args, drawn=(batch, eps, t, lam)):
                loss = lambda p: flowq.policy_loss(p, state, *drawn, nets, args)[0]
                adam = flowq.optimizer(args, "velocity")
                grads = jax.grad(loss)(params)["velocity"]
                move, _ = adam.update(grads, state.opt_state["velocity"])
                velocity = optax.apply_updates(params["velocity"], move)
                return velocity, optax.incremental_update(velocity, state.ema, 0.001)

            def target(params, state, nets=nets, args=args, batch=batch):
                return flowq.td_target(params, state, batch, jax.random.key(0), nets, args)

            def whole(state, nets=nets, args=args, batch=batch, lam=lam):
                return flowq.make_update(nets, args)(state, batch, jax.random.key(0), lam)

            programs["policy", critic, k] = traced(policy_step, state.params, state)
            programs["target", critic, k] = traced(target, state.params, state)
            programs["whole", critic, k] = traced(whole, state)
    same = {n[:2] for n in programs if programs[(*n[:2], 1)] == programs[(*n[:2], 50)]}
    assert same == {("policy", "td"), ("policy", "iql"), ("target", "iql"), ("whole", "iql")}


# ---- acting ----
def test_best_of_n(flowq):
    """N = 1 is one plain sample bit for bit; N = 50 keeps the draw that the smaller critic likes
    best; observations are standardised."""
    args = resolved(flowq)
    nets, state = make_networks(flowq, args), make_state(flowq, args)
    state = state.replace(obs_mean=jnp.asarray([1.0, 2.0, 3.0]), obs_std=jnp.full(3, 2.0))
    obs, key = jnp.asarray([0.3, -1.0, 5.0]), jax.random.key(7)
    scaled = (obs - state.obs_mean) / 2

    def sample(n):
        noise = jax.random.normal(key, (n, 2))
        return flowq.flow_endpoint(state.ema, nets, jnp.tile(scaled, (n, 1)), noise, args)

    policy = flowq.make_policy(nets, args)
    one = policy(state, obs, key, 1)
    np.testing.assert_array_equal(one, sample(1)[0])
    draws = sample(50)
    q = nets.critic(state.target_critic, jnp.tile(scaled, (50, 1)), draws).min(0)
    best = policy(state, obs, key, 50)
    np.testing.assert_array_equal(best, draws[np.argmax(q)])
    known = nets._replace(critic=lambda p, obs, a: jnp.stack([a[:, 0], a[:, 0] + a[:, 1] ** 2]))
    best = flowq.make_policy(known, args)(state, obs, key, 50)
    np.testing.assert_array_equal(best, draws[draws[:, 0].argmax()])


def test_softmax_choice(flowq):
    """Four candidates of values log 1 ... log 4 are taken in proportion 1 : 2 : 3 : 4."""
    args = resolved(flowq, eval_choice="softmax")
    logs = jnp.log(jnp.arange(1.0, 5.0))
    nets = make_networks(flowq, args)._replace(critic=lambda p, obs, a: jnp.stack([logs, logs]))
    state, obs = make_state(flowq, args), jnp.ones(3)

    def chosen(key):
        noise = jax.random.normal(key, (4, 2))
        draws = flowq.flow_endpoint(state.ema, nets, jnp.ones((4, 3)), noise, args)
        action = flowq.make_policy(nets, args)(state, obs, key, 4)
        return jnp.abs(draws - action).sum(axis=1).argmin()

    state = state.replace(ema=jax.tree.map(jnp.zeros_like, state.ema))  # the noise, clipped
    picks = jax.jit(jax.vmap(chosen))(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(np.bincount(picks) / 20_000, [0.1, 0.2, 0.3, 0.4], atol=0.02)


def test_evaluation_modes(flowq):
    task = flowq.parse_task("pointmaze-medium")
    for n, modes in ((50, ["n1", "n50"]), (1, ["n1"])):
        args = resolved(flowq, eval_candidates=n)
        policies = flowq.evaluation_policies(make_networks(flowq, args), args)
        assert list(policies) == modes
    assert flowq.metric_names(task, ["n1", "n50"])[0] == "success_n1"


def test_sinusoid_time_embedding(flowq):
    """16 sinusoids of 1000 t with frequencies from 1 to 1/10,000, then 32 Mish units to 16."""
    args = resolved(flowq, time_embedding="sinusoid", activation="mish")
    params = random_params(flowq.init_params(args, 3, 2, jax.random.key(0))["velocity"], 1)
    obs, x, t = jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.asarray([[0.0], [0.1], [0.5], [0.9]])
    out = make_networks(flowq, args).velocity(params, obs, x, t)
    mish = lambda z: z * np.tanh(np.log1p(np.exp(z)))
    angles = 1000 * np.float64(t) / 10_000 ** (np.arange(8) / 7)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)

    def dense(z, layer):
        return z @ np.float64(layer["kernel"]) + np.float64(layer["bias"])

    embed, main = params["params"]["MLP_0"], params["params"]["MLP_1"]
    z = dense(mish(dense(waves, embed["Dense_0"])), embed["Dense_1"])
    assert z.shape == (4, 16) and waves.shape == (4, 16)
    z = np.concatenate([obs, x, z], 1)
    z = dense(mish(dense(mish(dense(z, main["Dense_0"])), main["Dense_1"])), main["Dense_2"])
    np.testing.assert_allclose(out, z, atol=2e-4)


# ---- data ----
def test_reward_transforms(flowq):
    raw = dict(rewards=np.array([0.0, 1, 0, 0, 3], np.float32), terminals=np.array([0, 1, 0, 0, 1]))
    expected = {
        "none": raw["rewards"],
        "antmaze-cql": np.array([-2.0, 2, -2, -2, 10]),
        "antmaze-iql": np.array([-1.0, 0, -1, -1, 2]),
        "standardize": (raw["rewards"] - 0.8) / np.std([0, 1, 0, 0, 3]),
        "return-range": 1000 * raw["rewards"] / 2,  # episodes return 1 and 3
    }
    for how, rewards in expected.items():
        np.testing.assert_allclose(flowq.transform_rewards(raw, how), rewards, rtol=1e-5)


def test_return_range_needs_one(flowq):
    """Episodes that all return the same have no range to divide by."""
    raw = dict(rewards=np.array([1.0, 0, 0, 1], np.float32), terminals=np.array([0, 1, 0, 1]))
    with pytest.raises(flowq.UserError, match="returns, but all of them are 1 here"):
        flowq.transform_rewards(raw, "return-range")
    raw["rewards"][0] = 2.0
    np.testing.assert_allclose(flowq.transform_rewards(raw, "return-range"), [2_000, 0, 0, 1_000])


def test_prepare_clips_actions_and_transforms_before_the_targets(flowq):
    raw = dict(
        observations=np.zeros((3, 2), np.float32),
        next_observations=np.ones((3, 2), np.float32),
        actions=np.array([[1.0, -1], [0.5, 2], [0, 0]], np.float32),
        rewards=np.array([1.0, 0, 1], np.float32),
        masks=np.ones(3, np.float32),
        terminals=np.array([0.0, 0, 1], np.float32),
    )
    args = resolved(
        flowq, n_step=2, gamma=0.5, reward_transform="antmaze-cql", dataset_action_clip=0.1
    )
    data = flowq.prepare(raw, args, flowq.parse_task("pointmaze-medium"))
    np.testing.assert_allclose(data["actions"], [[0.9, -0.9], [0.5, 0.9], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(data["returns"], [2 - 1, -2 + 1, 2])
    np.testing.assert_allclose(data["discounts"], [0.25, 0.25, 0.5])
