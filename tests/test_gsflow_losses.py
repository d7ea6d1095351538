"""Networks, sampling, losses and the update of gsflow.py against independent calculations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    FQL,
    make_carry,
    make_settings,
    make_state,
    random_batch,
    random_params,
    small_args,
    with_changes,
)

TOL = dict(rtol=0, atol=1e-5)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **(TOL | tolerance))


def count(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def unused(*_):
    raise AssertionError("this network has no part in the test")


def networks(gsflow, **functions):
    """Networks made of the given functions of (params, ...); the others must not be called."""
    own = dict(critic=unused, velocity=unused, student=unused) | functions
    return gsflow.Networks(**(dict(act_dim=2, latent_dim=3) | own))


def jit_update(gsflow, nets, args):
    """(state, batch, key, settings) -> (state, metrics), compiled."""
    return jax.jit(gsflow.make_update(nets, args))


def both(q):
    """Two equal critics."""
    return jnp.stack([q, q])


# ---- networks ----


def shapes_at(gsflow, **flags):
    task = gsflow.parse_task("antmaze-large")
    args = gsflow.resolve(gsflow.Args(env_id="antmaze-large", **flags), task)
    return jax.eval_shape(lambda key: gsflow.init_params(args, 29, 8, key), jax.random.key(0))


def test_parameter_counts(gsflow):
    expected = dict(critic=1_624_066, velocity=812_040, student=815_632)
    expected |= dict(encoder=22_534, decoder=21_000, log_temperature=1)
    params = shapes_at(gsflow)
    assert {name: count(group) for name, group in params.items()} == expected
    assert count(params) == 3_295_273
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    fql = {name: count(group) for name, group in shapes_at(gsflow, **FQL).items()}
    assert fql == dict(critic=1_624_066, velocity=812_040, student=811_528)
    assert set(shapes_at(gsflow, prior="gaussian")) == {
        "critic", "velocity", "student", "log_temperature",
    }  # fmt: skip
    assert set(shapes_at(gsflow, student="deterministic")) == {
        "critic", "velocity", "student", "encoder", "decoder",
    }  # fmt: skip


def named_leaves(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_initial_values(gsflow):
    """Uniform kernels with their exact bounds, zero biases, critics that differ, target = copy."""
    args = small_args(gsflow, hidden_dims=(40, 60), prior_hidden_dims=(200,))
    state = make_state(gsflow, args, 3, 2)
    for name, group in state.params.items():
        for path, leaf in named_leaves(group).items():
            if "bias" in path:
                assert not np.any(leaf), (name, path)
            if "kernel" not in path:
                continue
            fan_in, fan_out = leaf.shape[-2:]
            if name in ("encoder", "decoder"):  # truncated normal of variance 1 / fan_in
                np.testing.assert_allclose(np.std(leaf), fan_in**-0.5, rtol=0.2)
                continue
            head = name == "student" and "MLP" not in path
            bound = math.sqrt(6 / (fan_in + fan_out)) * (0.1 if head else 1)
            assert np.abs(leaf).max() <= bound, (name, path)
            np.testing.assert_allclose(np.std(leaf), bound / math.sqrt(3), rtol=0.2)
            if name == "critic":
                assert not np.allclose(leaf[0], leaf[1])
    assert state.params["log_temperature"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"], state.target_critic)
    fql = make_state(gsflow, small_args(gsflow, hidden_dims=(40, 60), **FQL), 3, 2).params
    head = named_leaves(fql["student"])["['params']['Dense_2']['kernel']"]
    assert 0.8 * math.sqrt(6 / 62) < np.abs(head).max() <= math.sqrt(6 / 62)


def test_log_std_clip(gsflow):
    """The head's bias sets sigma; outside of [-2, 0] it receives no gradient."""
    args = small_args(gsflow)
    module = gsflow.make_modules(args, 2)["student"]
    obs = x = jnp.ones((1, 2))
    params = module.init(jax.random.key(0), obs, x)
    head = params["params"]["Dense_1"]  # Dense_0 is the mean's
    head["kernel"] = jnp.zeros_like(head["kernel"])

    def sigma(bias):
        tree = params["params"] | {"Dense_1": head | {"bias": jnp.full(2, bias)}}
        return jnp.exp(module.apply({"params": tree}, obs, x)[1])[0, 0]

    for bias, expected, gradient in ((-3.0, 0.135335, 0), (0.5, 1, 0), (-1.0, 0.367879, 0.367879)):
        close(sigma(bias), expected)
        close(jax.grad(sigma)(bias), gradient, atol=1e-5 if gradient else 0)


# ---- sampling ----


def test_log_prob_values(gsflow):
    rows = [(0, 0, 1, -0.9189385), (0.5, 0.2, 0.5, -0.1655623), (10, 0, 1, -32.305233)]
    for u, mu, sigma, expected in rows:
        arrays = [jnp.full((1, 1), float(v)) for v in (u, mu, math.log(sigma))]
        log_prob = gsflow.squashed_log_prob(*arrays)
        np.testing.assert_allclose(log_prob, [expected], rtol=1e-5)
    far = gsflow.squashed_log_prob(jnp.full((1, 1), 1e3), jnp.full((1, 1), 1e3), jnp.zeros((1, 1)))
    assert np.isfinite(far).all()


@pytest.mark.parametrize(
    "mu, sigma, entropy",
    [(0.0, 1.0, 0.669804), (0.5, 0.5, 0.298373), (-1.0, math.exp(-2), -1.456366)],
)
def test_density_and_entropy(gsflow, mu, sigma, entropy):
    """exp(log pi) integrates to 1 over actions; the entropy by Gauss-Hermite quadrature."""
    with jax.enable_x64(True):

        def log_prob(u):
            u = jnp.asarray(u)[:, None]
            full = functools.partial(jnp.full_like, u)
            return np.asarray(gsflow.squashed_log_prob(u, full(mu), full(math.log(sigma))))

        edges = np.linspace(-1, 1, 400_001)
        a = (edges[1:] + edges[:-1]) / 2
        integral = np.exp(log_prob(np.arctanh(a))).sum() * (a[1] - a[0])
        close(integral, 1, atol=1e-3)
        nodes, weights = np.polynomial.hermite.hermgauss(80)
        expected_log_prob = weights @ log_prob(mu + sigma * math.sqrt(2) * nodes)
        close(-expected_log_prob / math.sqrt(math.pi), entropy)
        # a sum over dimensions
        u = jnp.asarray([[0.3, -0.8]])
        single = [gsflow.squashed_log_prob(u[:, i : i + 1], 0.1, -0.5) for i in (0, 1)]
        close(gsflow.squashed_log_prob(u, 0.1, -0.5), single[0] + single[1])


def test_mode_is_a_function_of_the_noise_alone(gsflow):
    args = small_args(gsflow)
    nets = gsflow.make_networks(args, 2)
    state = make_state(gsflow, args, 2, 2)
    state = state.replace(
        params=random_params(state.params), obs_mean=jnp.ones(2), obs_std=jnp.full(2, 2.0)
    )
    obs, keys = jnp.asarray([0.4, -0.7]), jax.random.split(jax.random.key(5), 8)

    def act(state, temperature):
        one = lambda key: gsflow.make_policy(nets)(state, obs, key, temperature)
        return np.asarray(jax.jit(jax.vmap(one))(keys))

    zeroed = state.params | {"decoder": jax.tree.map(jnp.zeros_like, state.params["decoder"])}
    seen = (obs - 1) / 2
    mode = jnp.tanh(nets.student(state.params["student"], seen[None], jnp.zeros((1, 2)))[0])
    close(act(state.replace(params=zeroed), 0.0), np.broadcast_to(mode, (8, 2)))
    assert len(np.unique(act(state.replace(params=zeroed), 1.0), axis=0)) == 8
    assert len(np.unique(act(state, 0.0), axis=0)) == 8  # a live decoder: the noise differs


def test_action_of_a_known_draw(gsflow, monkeypatch):
    """a = tanh(mu + T sigma eps), and the density of T sigma for the soft backup."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, 0.8))
    student = lambda p, obs, x: (x, jnp.full_like(x, -0.5))
    nets, x = networks(gsflow, student=student), jnp.asarray([[0.2]])
    params, key = {"student": None}, jax.random.key(0)
    for temperature in (0.0, 0.5, 1.0):
        action, log_prob = gsflow.sample_action(params, nets, x, x, temperature, key)
        sigma = temperature * math.exp(-0.5)
        a = math.tanh(0.2 + 0.8 * sigma)
        close(action, [[a]])
        if temperature:
            density = math.exp(-0.32) / (sigma * math.sqrt(2 * math.pi)) / (1 - a * a)
            close(log_prob, [math.log(density)])
    clipped = networks(gsflow, student=lambda p, obs, x: (10 * x, None))
    close(gsflow.sample_action(params, clipped, x, x, 1.0, key)[0], [[1.0]])


# ---- the teacher and the choice of noise ----


def test_teacher_map(gsflow):
    def endpoint(velocity, x):
        nets = networks(gsflow, velocity=lambda p, obs, x, t: velocity(x, t))
        x = jnp.full((3, 2), x)
        return gsflow.flow_endpoint({"velocity": None}, nets, jnp.zeros((3, 1)), x, 10)

    close(endpoint(lambda x, t: -x, 0.5), np.full((3, 2), 0.1743392))
    close(endpoint(lambda x, t: x, 0.5), np.full((3, 2), 1.0))
    close(endpoint(lambda x, t: t + 0 * x, 0.1), np.full((3, 2), 0.55))
    # no clip on the way, which would end at -1
    there_and_back = lambda x, t: jnp.where(t < 0.45, 20.0, -20.0) + 0 * x
    close(endpoint(there_and_back, 0.3), np.full((3, 2), 0.3))
    close(endpoint(lambda x, t: x, -7.0), np.full((3, 2), -1.0))


def test_candidate_choice_row_by_row(gsflow):
    rng = np.random.default_rng(0)
    obs, noises = rng.uniform(-1, 1, (32, 2)), 1.5 * rng.standard_normal((10, 32, 2))
    nets = networks(
        gsflow,
        velocity=lambda p, obs, x, t: jnp.zeros_like(x),
        critic=lambda p, obs, a: both(-((a - obs) ** 2).sum(-1)),
    )
    params = {"velocity": None, "critic": None}
    obs_, noises_ = jnp.asarray(obs, jnp.float32), jnp.asarray(noises, jnp.float32)
    stacked = jnp.broadcast_to(obs_, noises.shape)
    actions = gsflow.flow_endpoint(params, nets, stacked, noises_, 10)
    chosen = gsflow.select_noise(params, nets, obs_, noises_, actions, "mean")
    for b in range(32):
        distance = [np.linalg.norm(np.clip(x[b], -1, 1) - obs[b]) for x in noises]
        close(chosen[b], noises[np.argmin(distance), b])


def test_candidate_aggregation_and_ties(gsflow):
    def critic(params, obs, a):
        second = a[..., 0] > 0
        return jnp.stack([jnp.where(second, 10.0, 4.0), jnp.where(second, 0.0, 4.0)])

    noises = jnp.asarray([[[-0.5]], [[0.5]]])
    choose = lambda nets, how: gsflow.select_noise(
        {"critic": None}, nets, jnp.zeros((1, 1)), noises, noises, how
    )
    nets = networks(gsflow, critic=critic)
    assert choose(nets, "mean") == 0.5 and choose(nets, "min") == -0.5
    flat = networks(gsflow, critic=lambda p, obs, a: both(0 * a[..., 0]))
    assert choose(flat, "mean") == choose(flat, "min") == -0.5


def test_teacher_on_the_stack_equals_single_calls(gsflow):
    args = small_args(gsflow)
    nets = gsflow.make_networks(args, 2)
    params = random_params(make_state(gsflow, args, 3, 2).params)
    obs = random_batch(3, 2, 16)["obs"]
    noises = jax.random.normal(jax.random.key(1), (args.num_candidates + 1, 16, 2))
    stacked = jnp.broadcast_to(obs, (*noises.shape[:2], 3))
    together = gsflow.flow_endpoint(params, nets, stacked, noises, args.flow_steps)
    for x, actions in zip(noises, together, strict=True):
        close(gsflow.flow_endpoint(params, nets, obs, x, args.flow_steps), actions)


# ---- losses ----


def test_prior_loss_values(gsflow):
    args, x_adv = small_args(gsflow), jnp.asarray([[0.3, -1.2], [2.0, 0.1]])
    for m, log_std, kl in (
        ((1, 1, 1), 0.0, 0.5),
        ((1, 2, 0), 0.0, 0.8333333),
        ((0, 0, 0), math.log(2), 0.8068528),
    ):
        mean = jnp.broadcast_to(jnp.asarray(m, jnp.float32), (2, 3))
        nets = networks(
            gsflow,
            encoder=lambda p, obs, x, m=mean, s=log_std: (m, jnp.full_like(m, s)),
            decoder=lambda p, obs, z: jnp.zeros((2, 2)),
        )
        params, batch = {"encoder": None, "decoder": None}, {"obs": jnp.zeros((2, 1))}
        loss, info = gsflow.prior_loss(params, nets, args, batch, x_adv, jnp.ones((2, 3)))
        close(info["prior_kl"], kl)
        close(info["prior_recon"], np.mean(np.square(x_adv)))
        close(loss, np.mean(np.square(x_adv)) + 0.01 * kl)
        # the latent that the decoder receives is m + exp(l) xi
        echo = nets._replace(decoder=lambda p, obs, z: z[:, :2])
        info = gsflow.prior_loss(params, echo, args, batch, x_adv, jnp.ones((2, 3)))[1]
        close(info["prior_recon"], np.mean(np.square(mean[:, :2] + math.exp(log_std) - x_adv)))


def constant_critic(params, obs, actions):
    """Members with the constant values in their parameters."""
    zeros = jnp.zeros(actions.shape[:-1])
    return jnp.stack([zeros + params[0], zeros + params[1]])


@pytest.mark.parametrize(
    "how, mask, expected", [("mean", 1, 3.97), ("min", 1, 2.98), ("mean", 0, 1)]
)
@pytest.mark.parametrize("flags", [{}, FQL])
def test_td_target(gsflow, flags, how, mask, expected):
    args = small_args(gsflow, q_agg=how, **flags)
    nets = gsflow.make_networks(args, 2)._replace(critic=constant_critic)
    state = make_state(gsflow, args, 2, 2)
    params = state.params | {"critic": jnp.zeros(2)}
    state = state.replace(
        params=params,
        target_critic=jnp.asarray([2.0, 4.0]),
        opt_state=gsflow.optimizer(args).init(params),
    )
    batch = random_batch(2, 2, 4) | dict(returns=jnp.ones(4), discounts=jnp.full(4, 0.99 * mask))
    settings = make_settings(gsflow, args)
    _, info = jit_update(gsflow, nets, args)(state, batch, jax.random.key(0), settings)
    close(info["td_target"], expected)
    close(info["critic_loss"], expected**2)
    if how == "mean" and mask:
        close(info["critic_loss"], 15.7609)


def test_gsflow_student_loss_values(gsflow, monkeypatch):
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
    for how in ("mean", "min"):
        args = small_args(gsflow, act_dim=1, q_agg=how)
        nets = networks(
            gsflow,
            student=lambda p, obs, x: (jnp.full((4, 1), 0.5), jnp.zeros((4, 1))),
            critic=lambda p, obs, a: jnp.stack([a[:, 0], 3 * a[:, 0]]),
        )
        params = dict(student=None, critic=None, log_temperature=jnp.zeros(()))
        inputs = ({"obs": jnp.zeros((4, 1))}, jnp.zeros((4, 1)), jnp.full((4, 1), 0.2), 10.0)
        column = nets._replace(
            student=lambda p, obs, x: (x, jnp.float32([[-2], [-1], [-0.1], [0]]))
        )
        info = gsflow.student_loss(params, column, args, *inputs, jax.random.key(0))[1]
        close(info["std_clipped"], 0.5)  # at -2 and 0, not between
        loss, info = gsflow.student_loss(params, nets, args, *inputs, jax.random.key(0))
        close(info["distill_loss"], 0.0687054)
        close(-info["student_q"], -0.9242343)
        close(-info["entropy"], -0.6787095)
        close(info["student_std"], 1.0)
        close(loss, -0.9158898)
        # another temperature weighs the entropy alone; the normaliser divides the Q term alone
        params["log_temperature"] = jnp.log(jnp.asarray(3.0))
        loss = gsflow.student_loss(params, nets, args, *inputs, jax.random.key(0))[0]
        close(loss, -0.9158898 + 2 * -0.6787095)
        params["log_temperature"] = jnp.zeros(())
        normed = with_changes(args, normalize_q_loss=True)
        loss = gsflow.student_loss(params, nets, normed, *inputs, jax.random.key(0))[0]
        close(loss, 10 * 0.0687054 - 1 - 0.6787095)


def test_temperature_loss_and_its_first_step(gsflow):
    args = small_args(gsflow, act_dim=8)
    assert args.target_entropy == -4
    params = {"log_temperature": jnp.zeros(())}
    loss = lambda params: gsflow.temperature_loss(params, jnp.asarray(1.0), args.target_entropy)[0]
    gradient = jax.grad(loss)(params)
    close(loss(params), 5)
    close(gradient["log_temperature"], 5)
    adam = gsflow.optimizer(args)
    step, _ = adam.update(gradient, adam.init(params))
    np.testing.assert_allclose(step["log_temperature"], -3e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "entropy, offline, online, tuned",
    [("tuned", 1, 1, True), ("fixed", 1, 1, False), ("online", 0, 1, True), ("off", 0, 0, False)],
)
def test_entropy_ablations(gsflow, entropy, offline, online, tuned):
    """Which phase has the entropy term, and which moves its temperature, beside all else alike."""
    args = small_args(gsflow, entropy=entropy, init_temperature=0.5)
    nets, batch, key = gsflow.make_networks(args, 2), random_batch(2, 2, 16), jax.random.key(0)
    state = make_state(gsflow, args, 2, 2)
    state = state.replace(params=random_params(state.params) | {
        "log_temperature": state.params["log_temperature"]
    })  # fmt: skip
    for phase, weight in (("offline", offline), ("online", online)):
        settings = gsflow.phase_settings(args, phase)
        assert settings.entropy == weight
        after, info = jit_update(gsflow, nets, args)(state, batch, key, settings)
        expected = settings.alpha * info["distill_loss"] - info["student_q"]
        expected -= weight * 0.5 * info["entropy"]
        np.testing.assert_allclose(info["student_loss"], expected, rtol=1e-4)
        moved = after.params["log_temperature"] != state.params["log_temperature"]
        assert moved == (tuned and weight == 1)
        np.testing.assert_allclose(info["temperature"], 0.5, rtol=1e-6)


def test_teacher_is_the_critics_choice_among_its_actions(gsflow):
    """Best of N from N(0, I), not from the prior; evaluated beside the student, which stays
    first."""
    args = small_args(gsflow, num_candidates=5, eval_teacher=True)
    nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
    state = state.replace(
        params=random_params(state.params), obs_mean=jnp.ones(3), obs_std=jnp.full(3, 2.0)
    )
    obs, chosen = jnp.asarray([0.4, -0.7, 2.0]), set()
    policies = gsflow.evaluation_policies(nets, args)
    assert list(policies) == ["", "teacher"]
    task = gsflow.parse_task("pointmaze-medium")
    names = gsflow.metric_names(task, policies)
    assert names[0] == "success" and "success_teacher" in names
    assert list(gsflow.evaluation_policies(nets, small_args(gsflow))) == [""]
    seen = (obs[None] - 1) / 2
    flow = lambda x: gsflow.flow_endpoint(state.params, nets, seen, x, args.flow_steps)
    for i in range(6):
        key = jax.random.key(i)
        actions = np.concatenate([flow(x) for x in jax.random.normal(key, (5, 1, 2))])
        q = [nets.critic(state.params["critic"], seen, a[None]).mean() for a in actions]
        chosen.add(best := int(np.argmax(q)))
        close(policies["teacher"](state, obs, key), actions[best])
    assert len(chosen) > 1


def test_fql_student_loss_values(gsflow):
    args = small_args(gsflow, **FQL)
    nets = networks(
        gsflow, student=lambda p, obs, x: (p, None), critic=lambda p, obs, a: both(a.sum(-1))
    )
    obs, teacher_action = jnp.zeros((1, 1)), jnp.asarray([[0.25, 1.0]])

    def loss(mu):
        params = dict(student=mu, critic=None)
        inputs = ({"obs": obs}, jnp.zeros((1, 2)), teacher_action, 10.0, jax.random.key(0))
        return gsflow.student_loss(params, nets, args, *inputs)

    (value, info), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray([[0.5, 1.5]]))
    close(info["distill_loss"], 0.15625)
    close(info["student_q"], 1.5)
    close(value, 0.0625)
    close(gradient, [[1.5, 5.0]])


# ---- FQL in NumPy ----


def numpy_mlp(params, *inputs):
    """Dense, tanh-form GELU, LayerNorm where there are parameters for one; a linear head."""
    params = params.get("params", params)
    x, depth = np.concatenate(inputs, -1), sum(name.startswith("Dense") for name in params)
    for i in range(depth):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        if i == depth - 1:
            return x
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if f"LayerNorm_{i}" in params:
            norm = params[f"LayerNorm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
    raise AssertionError


def numpy_critic(params, obs, actions):
    (members,) = params["params"].values()
    member = lambda i: jax.tree.map(lambda x: x[i], members)
    return np.stack([numpy_mlp(member(i), obs, actions)[:, 0] for i in (0, 1)])


@pytest.mark.parametrize("how", ["mean", "min"])
def test_fql_losses_equal_numpy(gsflow, how):
    with jax.enable_x64(True):
        args = small_args(gsflow, alpha=7.0, q_agg=how, **FQL)
        nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
        assert set(state.params) == {"critic", "velocity", "student"}
        assert not [p for p in named_leaves(state.params["student"]) if "log_std" in p]
        params = random_params(state.params, scale=0.5)
        target = random_params(state.target_critic, 1)
        state = state.replace(params=params, target_critic=target)
        batch, key = random_batch(3, 2, 16), jax.random.key(3)
        settings = make_settings(gsflow, args)
        _, info = jit_update(gsflow, nets, args)(state, batch, key, settings)
        assert set(info) == {
            "critic_loss", "q", "td_target", "flow_loss", "student_loss", "distill_loss",
            "student_q",
        }  # fmt: skip
        keys = dict(zip(gsflow.DRAWS, jax.random.split(key, len(gsflow.DRAWS)), strict=True))
        normal = lambda name: np.asarray(jax.random.normal(keys[name], (16, 2)))
        x_next, x, x0 = normal("td_prior"), normal("student_prior"), normal("flow_noise")
        t = np.asarray(jax.random.uniform(keys["flow_time"], (16, 1)))
        params, target, batch = jax.tree.map(np.asarray, (params, target, batch))

    next_action = np.clip(numpy_mlp(params["student"], batch["next_obs"], x_next), -1, 1)
    next_q = numpy_critic(target, batch["next_obs"], next_action)
    y = batch["returns"] + batch["discounts"] * (next_q.mean(0) if how == "mean" else next_q.min(0))
    q = numpy_critic(params["critic"], batch["obs"], batch["actions"])
    close(info["td_target"], y.mean())
    close(info["critic_loss"], ((q - y) ** 2).mean())

    x_t = (1 - t) * x0 + t * batch["actions"]
    velocity = numpy_mlp(params["velocity"], batch["obs"], x_t, t)
    close(info["flow_loss"], ((velocity - (batch["actions"] - x0)) ** 2).mean())

    a_t = x
    for k in range(10):
        time = np.full((16, 1), k / 10)
        a_t = a_t + numpy_mlp(params["velocity"], batch["obs"], a_t, time) / 10
    mu = numpy_mlp(params["student"], batch["obs"], x)
    distill = ((mu - np.clip(a_t, -1, 1)) ** 2).mean()
    student_q = numpy_critic(params["critic"], batch["obs"], np.clip(mu, -1, 1)).mean()
    assert np.abs(mu).max() > 1 and np.abs(a_t).max() > 1  # so that both clips matter
    close(info["distill_loss"], distill)
    close(info["student_q"], student_q)
    close(info["student_loss"], 7 * distill - student_q)


# ---- gradients ----


def test_losses_reach_their_own_group_alone(gsflow):
    args = small_args(gsflow)
    nets = gsflow.make_networks(args, 2)
    params = random_params(make_state(gsflow, args, 3, 2).params)
    batch, key = random_batch(3, 2, 16), jax.random.key(0)
    noise = jax.random.normal(key, (5, 16, 2))

    def student(params):
        x = gsflow.sample_prior(jax.lax.stop_gradient(params), nets, batch["obs"], key)
        return gsflow.student_loss(params, nets, args, batch, x, noise[0].clip(-1, 1), 10.0, key)

    losses = dict(
        critic=(["critic"], lambda p: gsflow.critic_loss(p, nets, batch, jnp.ones(16))),
        flow=(
            ["velocity"],
            lambda p: gsflow.flow_loss(p, nets, batch, noise[1], jnp.full((16, 1), 0.3)),
        ),
        student=(["student"], student),
        prior=(
            ["encoder", "decoder"],
            lambda p: gsflow.prior_loss(p, nets, args, batch, noise[2], jnp.ones((16, 3))),
        ),
        temperature=(["log_temperature"], lambda p: gsflow.temperature_loss(p, 1.0, -1.0)),
    )
    for name, (own, loss) in losses.items():
        gradient = jax.jit(jax.grad(loss, has_aux=True))(params)[0]
        for group, leaves in gradient.items():
            for path, leaf in named_leaves(leaves).items():
                assert np.any(leaf) == (group in own), (name, group, path)


COMBINATIONS = {
    "gsflow": {},
    "fql": FQL,
    "prior-alone": dict(student="deterministic"),
    "entropy-alone": dict(prior="gaussian"),
    "soft-min": dict(soft_backup=True, offline_td_temperature=0.7, q_agg="min",
                     candidate_q_agg="min", actor_layer_norm=True),
}  # fmt: skip


def separate_losses(gsflow, args, nets, state, batch, key, settings):
    """The losses as functions of their own group alone; everything else is fixed beforehand."""
    draw = dict(zip(gsflow.DRAWS, jax.random.split(key, len(gsflow.DRAWS)), strict=True))
    fixed, shape = state.params, batch["actions"].shape
    prior = lambda obs, k: gsflow.sample_prior(fixed, nets, obs, k)
    endpoint = lambda x: gsflow.flow_endpoint(fixed, nets, batch["obs"], x, args.flow_steps)

    next_action, log_prob = gsflow.sample_action(
        fixed, nets, batch["next_obs"], prior(batch["next_obs"], draw["td_prior"]),
        settings.td_temperature, draw["td_action"],
    )  # fmt: skip
    next_q = nets.critic(state.target_critic, batch["next_obs"], next_action)
    next_q = next_q.min(0) if args.q_agg == "min" else next_q.mean(0)
    if args.soft_backup:
        next_q = next_q - jnp.exp(fixed["log_temperature"]) * log_prob
    y = batch["returns"] + batch["discounts"] * next_q
    x0 = jax.random.normal(draw["flow_noise"], shape)
    t = jax.random.uniform(draw["flow_time"], (shape[0], 1))
    x = prior(batch["obs"], draw["student_prior"])
    student_inputs = (batch, x, endpoint(x), settings.alpha, draw["student_action"])

    losses = {
        ("critic",): lambda p: gsflow.critic_loss(p, nets, batch, y),
        ("velocity",): lambda p: gsflow.flow_loss(p, nets, batch, x0, t),
        ("student",): lambda p: gsflow.student_loss(p, nets, args, *student_inputs),
    }
    if args.student == "gaussian":
        info = gsflow.student_loss(fixed, nets, args, *student_inputs)[1]
        losses[("log_temperature",)] = lambda p: gsflow.temperature_loss(
            p, info["entropy"], args.target_entropy
        )
    if args.prior == "cvae":
        noises = jax.random.normal(draw["candidates"], (args.num_candidates, *shape))
        critic = lambda a: nets.critic(fixed["critic"], batch["obs"], a)
        join = jnp.min if args.candidate_q_agg == "min" else jnp.mean
        values = jnp.stack([join(critic(endpoint(noise)), axis=0) for noise in noises])
        x_adv = noises[values.argmax(0), jnp.arange(shape[0])]
        xi = jax.random.normal(draw["latent"], (shape[0], args.latent_dim))
        losses[("encoder", "decoder")] = lambda p: gsflow.prior_loss(
            p, nets, args, batch, x_adv, xi
        )

    def of_group(names, loss):
        return lambda group: loss(fixed | group)[0]

    return {names: of_group(names, loss) for names, loss in losses.items()}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name, marks=[pytest.mark.slow] if "alone" in name else [])
        for name, flags in COMBINATIONS.items()
    ],
)
def test_joint_gradient_equals_separate_ones(gsflow, monkeypatch, flags):
    """The gradient inside `update`, seen through SGD of step 1; then central differences."""
    monkeypatch.setattr(gsflow, "optimizer", lambda args: optax.sgd(1.0))
    with jax.enable_x64(True):
        args = small_args(gsflow, **flags)
        nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
        params = random_params(state.params)
        state = state.replace(params=params, target_critic=random_params(state.target_critic, 1))
        batch, key = random_batch(3, 2, args.batch_size), jax.random.key(2)
        settings = make_settings(gsflow, args)
        after, info = jit_update(gsflow, nets, args)(state, batch, key, settings)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(after.params))
        joint = jax.tree.map(lambda old, new: old - new, params, after.params)

        @jax.jit
        def separately(params):
            state_ = state.replace(params=params)
            losses = separate_losses(gsflow, args, nets, state_, batch, key, settings)
            results = {}
            for groups, loss in losses.items():
                own = {name: params[name] for name in groups}
                value, gradient = jax.value_and_grad(loss)(own)
                results[groups] = value, gradient, central_differences(loss, own, gradient)
            return results

        results = separately(params)
        assert sorted(sum(results, ())) == sorted(params)
        names = dict(critic="critic", velocity="flow", student="student", encoder="prior")
        names |= dict(log_temperature="temperature")
        for groups, (value, gradient, (slopes, numeric)) in results.items():
            close(info[f"{names[groups[0]]}_loss"], value, atol=1e-10)
            for name in groups:
                jax.tree.map(lambda a, b: close(a, b, atol=1e-6), joint[name], gradient[name])
            np.testing.assert_allclose(slopes, numeric, rtol=1e-4, atol=1e-8)


def central_differences(loss, params, gradient, step=1e-6):
    """Slopes (leaves,) of one random direction in each leaf: by the gradient, and measured."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    directions = [rng.standard_normal(x.shape) for x in leaves]
    slopes = [jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), directions, strict=True)]

    def moved(sign):
        """(leaves,) losses; the i-th with the i-th leaf moved."""
        stacked = []
        for i, (x, d) in enumerate(zip(leaves, directions, strict=True)):
            chosen = (np.arange(len(leaves)) == i).reshape(-1, *[1] * x.ndim)
            stacked.append(x + sign * step * chosen * d)
        return jax.vmap(loss)(jax.tree.unflatten(structure, stacked))

    return jnp.stack(slopes), (moved(1) - moved(-1)) / (2 * step)


# ---- the update as a program ----


def test_target_critic_follows_the_new_critic(gsflow):
    args = small_args(gsflow, tau=0.005)
    nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
    inputs = (random_batch(3, 2, 16), jax.random.key(0), make_settings(gsflow, args))
    after, _ = jit_update(gsflow, nets, args)(state, *inputs)
    old, new = state.params["critic"], after.params["critic"]
    mixed = jax.tree.map(lambda old, new: 0.005 * new + 0.995 * old, old, new)
    jax.tree.map(lambda a, b: close(a, b, atol=1e-7), after.target_critic, mixed)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.target_critic, old)
    assert max(jax.tree.leaves(moved)) > 1e-6  # the lagged rule would leave it where it was
    assert after.step == 1
    adam = after.opt_state[0]
    for moments in (adam.mu, adam.nu):
        assert jax.tree.structure(moments) == jax.tree.structure(after.params)
    assert count(after.opt_state) == 2 * count(after.params) + 1  # and the step count
    # Adam's first step is the learning rate in the direction of the sign
    steps = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, state.params)
    np.testing.assert_allclose(jax.tree.leaves(steps), args.learning_rate, rtol=1e-2)


def test_averaged_networks_act_distil_and_make_targets(gsflow):
    """With --ema-decay, and without: there nothing but the parameters themselves."""
    args = small_args(gsflow, ema_decay=0.9)
    nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
    inputs = (random_batch(3, 2, 16), jax.random.key(0), make_settings(gsflow, args))
    update = jit_update(gsflow, nets, args)
    after, info = update(state, *inputs)
    old, new, ema = jax.device_get((state.ema, after.params, after.ema))
    jax.tree.map(lambda old, new, x: close(x, 0.9 * old + 0.1 * new, atol=1e-7), old, new, ema)
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, old, ema)))

    # another average of one network: what it makes changes, and what it does not make stays
    for part, made in dict(
        decoder={"td_target", "distill_loss"}, student={"td_target"}, velocity={"distill_loss"}
    ).items():
        others = state.replace(ema=state.ema | {part: random_params(state.ema[part], 1)})
        _, other = update(others, *inputs)
        names = ("td_target", "distill_loss", "flow_loss", "q")
        assert {n for n in names if abs(info[n] - other[n]) > 1e-5} == made, part
    others = state.replace(ema=random_params(state.ema, 1))
    policy, teacher = gsflow.make_policy(nets), gsflow.make_teacher(nets, args)
    obs, key = jnp.asarray([0.4, -0.7, 2.0]), jax.random.key(1)
    of_averages = others.replace(params=others.ema | {"critic": others.params["critic"]}, ema={})
    for act in map(jax.jit, (functools.partial(policy, temperature=0.0), teacher)):
        close(act(others, obs, key), act(of_averages, obs, key))
        assert np.abs(act(others, obs, key) - act(state, obs, key)).max() > 1e-4

    plain = jax.eval_shape(lambda: make_state(gsflow, small_args(gsflow), 3, 2))
    assert plain.ema == jax.eval_shape(gsflow.make_update(nets, args), plain, *inputs)[0].ema == {}


def float64_run(gsflow, args, obs_dim=2, act_dim=2):
    """(data, carry of all seeds, settings, networks) in float64."""
    rng, size = np.random.default_rng(0), 40
    raw = dict(observations=rng.standard_normal((size, obs_dim)))
    raw |= dict(next_observations=rng.standard_normal((size, obs_dim)))
    raw |= dict(actions=rng.uniform(-1, 1, (size, act_dim)), rewards=rng.standard_normal(size))
    raw |= dict(masks=(rng.random(size) < 0.8) * 1.0, terminals=np.ones(size))
    data = gsflow.device_data(raw, args.n_step, args.gamma)
    data = {k: v.astype(jnp.float64) for k, v in data.items()}
    nets, settings = gsflow.make_networks(args, act_dim), make_settings(gsflow, args)
    seeds = range(args.seed, args.seed + args.num_seeds)
    states = [make_state(gsflow, args, obs_dim, act_dim, seed) for seed in seeds]
    carry = make_carry(gsflow, args, data, nets, settings)
    carry["state"] = jax.tree.map(lambda *x: jnp.stack(x), *states)
    carry["sums"] = jax.tree.map(lambda x: x.astype(jnp.float64), carry["sums"])
    return data, carry, settings, nets


@pytest.mark.slow
@pytest.mark.parametrize("flags", [pytest.param({}, id="gsflow"), pytest.param(FQL, id="fql")])
def test_one_dispatch_of_many_updates_equals_single_updates(gsflow, flags):
    """20 updates of 3 seeds in one program against calls one by one, and seed by seed."""
    with jax.enable_x64(True):
        args = small_args(gsflow, num_seeds=3, seed=5, **flags)
        data, carry, settings, nets = float64_run(gsflow, args)
        first = jax.tree.map(jnp.copy, carry)
        learn = gsflow.make_learn(nets, args)
        together = gsflow.Program(learn, data, settings)(carry, 20)
        assert (np.asarray(together["state"].step) == 20).all()
        step = jax.jit(learn)
        for seed in range(3):
            alone = jax.tree.map(lambda x, seed=seed: x[seed], first)
            for _ in range(20):
                alone = step(alone, data, settings)
            mine = jax.tree.map(lambda x, seed=seed: x[seed], together)
            jax.tree.map(lambda a, b: close(a, b, atol=1e-6), mine, alone)
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(),
            together["state"].target_critic,
            first["state"].target_critic,
        )
        assert max(jax.tree.leaves(moved)) > 1e-5


def test_phase_switch_does_not_recompile(gsflow):
    args = small_args(gsflow, alpha=10.0, online_alpha=1.0)
    nets, state = gsflow.make_networks(args, 2), make_state(gsflow, args, 3, 2)
    batch, key, traces = random_batch(3, 2, 16), jax.random.key(0), []

    @jax.jit
    def step(state, settings):
        traces.append(settings)
        return gsflow.make_update(nets, args)(state, batch, key, settings)

    _, offline = step(state, make_settings(gsflow, args))
    _, online = step(state, make_settings(gsflow, args, online=True))
    assert len(traces) == 1 and step._cache_size() == 1
    difference = offline["student_loss"] - online["student_loss"]
    close(difference, 9 * offline["distill_loss"])
    assert abs(offline["td_target"] - online["td_target"]) > 1e-4  # T = 0, then 1
