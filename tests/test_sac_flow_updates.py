"""SAC Flow's losses and updates, the temperature, chunks and what an update may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import random_params

TINY = dict(hidden_dim=8, d_model=8, critic_hidden_dims=(8, 8), batch_size=16, flow_steps=2)


@pytest.fixture(scope="session")
def sac():
    return load_script(ROOT / "algos" / "sac_flow.py")


def make_args(sac, env_id="Hopper-v4", **flags):
    args = sac.Args(env_id=env_id, **(TINY | dict(action_scale=1.0) | flags))
    return sac.resolve(args, sac.parse_task(env_id))


def make_state(sac, args, obs_dim=3, act_dim=2, seed=0):
    """A fresh state with all parameters moved, in the default float type."""
    init = functools.partial(sac.init_state, args, obs_dim, act_dim, jnp.zeros(obs_dim))
    state = jax.jit(lambda: init(jnp.ones(obs_dim), jnp.int32(seed)))()
    return to_default(state.replace(params=random_params(state.params, seed, 0.2)))


def to_default(tree):
    dtype = jnp.zeros(()).dtype
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def make_batch(args, obs_dim=3, act_dim=2, seed=0):
    """What `sample_chunks` returns, at random; the last row of some windows is not valid."""
    rng, rows, horizon = np.random.default_rng(seed), args.batch_size, args.horizon_length
    batch = dict(
        obs=rng.normal(size=(rows, obs_dim)),
        actions=rng.uniform(-0.9, 0.9, (rows, horizon * act_dim)),
        returns=rng.normal(size=rows),
        discounts=0.9 * (rng.random(rows) < 0.7),
        next_obs=rng.normal(size=(rows, obs_dim)),
        valid=np.ones((rows, horizon)),
    )
    if horizon > 1:
        batch["valid"][:5, -1] = 0
    return {k: jnp.asarray(v, jnp.zeros(()).dtype) for k, v in batch.items()}


def numeric_gradient(loss, params, name, count=3, step=1e-6):
    """Central differences along random directions, and the same from autodiff."""
    grads, pairs = jax.grad(loss)(params), []
    for i in range(count):
        rng = np.random.default_rng(i)
        move = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)  # noqa: B023
        at = lambda h: loss(jax.tree.map(lambda x, m: x + h * m, params, move))  # noqa: B023
        products = jax.tree.map(lambda g, m: (g * m).sum(), grads, move)
        pairs.append((float(at(step) - at(-step)) / (2 * step), sum(jax.tree.leaves(products))))
    return np.array(pairs, np.float64).T


# ---- critic ----


def test_crossq_critic_in_one_pass(sac):
    """Statistics over both halves, live; gradient against finite differences with y frozen."""
    with jax.enable_x64():
        args = make_args(sac)
        assert args.critic == "brn"
        nets, state, batch = sac.make_networks(args, 2), make_state(sac, args), make_batch(args)
        rng = np.random.default_rng(1)
        next_action = jnp.asarray(rng.uniform(-1, 1, (16, 2)))
        next_cost = jnp.asarray(rng.normal(size=16))
        params, stats = state.params["critic"], state.stats["critic"]
        inputs = (nets, args, batch, next_action, next_cost)
        loss = lambda p: sac.critic_loss(p, stats, None, *inputs)
        value, (info, new) = loss(params)

        first = jnp.concatenate([batch["obs"], batch["actions"]], axis=1)
        both = jnp.concatenate([first, jnp.concatenate([batch["next_obs"], next_action], axis=1)])
        inner = lambda tree: tree["VmapMLP_0"]["BatchRenorm_0"]
        assert (inner(stats)["mean"] == 0).all()
        np.testing.assert_allclose(inner(new)["mean"][0], 0.01 * both.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose(inner(new)["mean"][1], 0.01 * both.mean(axis=0), atol=1e-12)
        assert (inner(new)["calls"] == 1).all()

        q, _ = nets.critic(params, stats, both[:, :3], both[:, 3:], train=True)
        alone, _ = nets.critic(params, stats, batch["obs"], batch["actions"], train=True)
        assert np.abs(q[:, :16] - alone).max() > 0.01
        y = batch["returns"] + batch["discounts"] * (q[:, 16:].min(axis=0) - next_cost)
        expected = 0.5 * ((q[:, :16] - y) ** 2).mean(axis=1).sum()
        assert value == pytest.approx(float(expected), rel=1e-10)
        assert info["td_target"] == pytest.approx(float(y.mean()), rel=1e-10)

        def frozen(p):  # y a constant, both halves of the batch live in the statistics
            q, _ = nets.critic(p, stats, both[:, :3], both[:, 3:], train=True)
            return 0.5 * ((q[:, :16] - y) ** 2).mean(axis=1).sum()

        numeric, _ = numeric_gradient(frozen, params, "critic")
        _, exact = numeric_gradient(lambda p: loss(p)[0], params, "critic")
        np.testing.assert_allclose(exact, numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "cube-triple"])
def test_critic_with_target(sac, env_id):
    """plain: min and sum; offline-to-online: mean, gamma^H, windows that are not valid weigh 0."""
    flags = dict(critic="plain") if env_id == "Hopper-v4" else dict(horizon_length=2)
    args = make_args(sac, env_id, **flags)
    nets, state, batch = sac.make_networks(args, 2), make_state(sac, args), make_batch(args)
    state = state.replace(target_critic=random_params(state.target_critic, 9))
    rng = np.random.default_rng(1)
    next_action = jnp.asarray(rng.uniform(-1, 1, batch["actions"].shape))
    next_cost = jnp.asarray(rng.normal(size=16))
    value, _ = sac.critic_loss(
        state.params["critic"], {}, (state.target_critic, {}), nets, args, batch, next_action,
        next_cost,
    )  # fmt: skip
    q, _ = nets.critic(state.params["critic"], {}, batch["obs"], batch["actions"])
    next_q, _ = nets.critic(state.target_critic, {}, batch["next_obs"], next_action)
    q, next_q = np.asarray(q, np.float64), np.asarray(next_q, np.float64)
    joined = next_q.min(axis=0) if env_id == "Hopper-v4" else next_q.mean(axis=0)
    errors = (q - batch["returns"] - batch["discounts"] * (joined - next_cost)) ** 2
    if env_id == "Hopper-v4":
        expected = errors.mean(axis=1).sum()
    else:
        assert (np.asarray(batch["valid"][:, -1]) == 0).sum() == 5
        expected = errors[:, 5:].sum() / errors.size
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_target_moves_by_tau(sac):
    """Towards the critic as it is after its step; its inputs are next action and constant alpha."""
    args = make_args(sac, "cube-triple", horizon_length=2, tau=0.25)
    nets, state, batch = sac.make_networks(args, 2), make_state(sac, args), make_batch(args)
    state = state.replace(target_critic=random_params(state.target_critic, 9))
    new, _ = jax.jit(lambda s: sac.critic_step(s, batch, jax.random.key(0), nets, args))(state)
    for old, critic, target in zip(
        *map(jax.tree.leaves, (state.target_critic, new.params["critic"], new.target_critic)),
        strict=True,
    ):
        np.testing.assert_allclose(target, 0.75 * old + 0.25 * critic, atol=1e-6)
    assert new.step == 1


# ---- actor ----


@pytest.mark.parametrize("env_id", ["Hopper-v4", "cube-triple"])
def test_actor_loss(sac, env_id):
    """alpha log p - Q (+ beta MSE), from its parts; its gradient from finite differences."""
    with jax.enable_x64():
        flags = dict(policy="flow-g")
        flags |= dict(horizon_length=2) if env_id == "cube-triple" else {}
        args = make_args(sac, env_id, **flags)
        nets, state, batch = sac.make_networks(args, 2), make_state(sac, args), make_batch(args)
        key, alpha, beta = jax.random.key(3), 0.3, 7.0
        params, stats = state.params["actor"], state.stats["actor"]
        critic = (state.params["critic"], state.stats["critic"])

        @jax.jit
        def loss(p):
            inputs = (stats, nets, args, batch, critic, alpha, beta, key)
            return sac.actor_loss(p, *inputs)[0]

        action, log_prob, _, _ = sac.sample_action(
            params, stats, nets, args, batch["obs"], key, args.sigma, train=True
        )
        q, _ = nets.critic(*critic, batch["obs"], action)
        if env_id == "Hopper-v4":
            expected = (alpha * log_prob - q.min(axis=0)).mean()
        else:
            distance = ((action - batch["actions"]) ** 2).mean()
            expected = (alpha * log_prob - q.mean(axis=0)).mean() + beta * distance
        assert loss(params) == pytest.approx(float(expected), rel=1e-9)
        numeric, exact = numeric_gradient(loss, params, "actor")
        np.testing.assert_allclose(exact, numeric, rtol=1e-4, atol=1e-6)


def changed_groups(before, after):
    """Names of the parameter groups that differ between two states."""
    different = lambda a, b: (
        not all(
            np.array_equal(x, y)
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
    )
    return {k for k in before.params if different(before.params[k], after.params[k])}


@pytest.mark.parametrize("env_id,delay", [("Hopper-v4", 3), ("cube-triple", 1)])
def test_one_update_of_each_mode(sac, env_id, delay):
    """Online: policy_delay critic steps, then the actor up the new critic and the temperature.
    Offline-to-online: joint steps, the actor up the critic as it was before."""
    beta, key = jnp.float32(2.0), jax.random.key(4)
    args = make_args(sac, env_id, policy="flow-g", target_entropy=0.0)
    assert args.policy_delay == delay
    nets, state = sac.make_networks(args, 2), make_state(sac, args)
    batches = [make_batch(args, seed=i) for i in range(delay)]
    new, info = jax.jit(sac.make_update(nets, args))(state, batches, key, beta)
    assert changed_groups(state, new) == set(state.params) and new.step == delay

    keys, expected, infos = jax.random.split(key, delay + 1), state, []
    step = jax.jit(functools.partial(sac.critic_step, nets=nets, args=args))
    for batch, critic_key in zip(batches, keys[1:], strict=True):
        expected, critic_info = step(expected, batch, critic_key)
        infos.append(critic_info)
    judge = expected if env_id == "Hopper-v4" else state
    critic = judge.params["critic"], judge.stats["critic"]
    act = jax.jit(functools.partial(sac.actor_step, nets=nets, args=args))
    expected, _ = act(expected, critic, batches[-1], keys[0], beta)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), expected, new)
    assert info["q"] == pytest.approx(np.mean([i["q"] for i in infos]), abs=1e-5)
    assert {"actor_loss", "entropy", "alpha", "step_std"} <= info.keys()

    if env_id == "cube-triple":
        step = jax.jit(sac.make_update(nets, args, clone=True))
        clone, info = step(state, batches, key, beta)
        assert changed_groups(state, clone) == {"actor", "critic"} and "bc_loss" in info


# ---- temperature ----


@pytest.mark.parametrize("env_id", ["Hopper-v4", "cube-triple"])
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_temperature_moves_the_right_way(sac, env_id, shift):
    """Entropy below the target raises alpha, above lowers it; first step = learning rate."""
    args = make_args(sac, env_id, autotune=True, policy="flow-g", target_entropy=-500.0)
    nets, state, batch = sac.make_networks(args, 2), make_state(sac, args), make_batch(args)
    critic = state.params["critic"], state.stats["critic"]
    inputs = (critic, batch, jax.random.key(0), jnp.float32(1.0), nets)
    step = lambda a: jax.jit(lambda s: sac.actor_step(s, *inputs, a))(state)
    entropy = float(step(args)[1]["entropy"])
    args = sac.dataclasses.replace(args, target_entropy=entropy - shift)
    after = step(args)[0].params["log_alpha"]
    moved = float(after - state.params["log_alpha"])
    assert moved == pytest.approx(-shift * args.alpha_lr, rel=1e-3)


def test_entropy_ceiling(sac):
    """d = 25, s = 0.05: -122.2059; per dimension -8.55, -4.89, -2.12."""
    args = make_args(sac, "cube-triple", flow_steps=4)
    assert sac.entropy_ceiling(args, 25) == pytest.approx(-122.2059, abs=1e-3)
    for sigma, ceiling in ((0.02, -8.55), (0.05, -4.89), (0.10, -2.12)):
        other = sac.dataclasses.replace(args, sigma=sigma)
        assert sac.entropy_ceiling(other, 1) == pytest.approx(ceiling, abs=0.01)


def test_target_entropy_above_the_ceiling(sac, capsys):
    """Refused where it is only the default; asked for, as in the paper, it is run with a notice."""
    asked = dict(autotune=True, flow_steps=4)
    with pytest.raises(sac.UserError, match="--autotune needs --target-entropy"):
        sac.fit_to_sizes(make_args(sac, "cube-triple", **asked), 46, 5)
    args = make_args(sac, "cube-triple", target_entropy=-122.3, **asked)
    assert sac.fit_to_sizes(args, 46, 5).target_entropy == -122.3
    assert capsys.readouterr().out == ""
    paper = dict(noise="fixed", drift_correction=True, flow_steps=4)
    with pytest.raises(sac.UserError, match=r"cannot be reached.* at most -14\.66"):
        sac.fit_to_sizes(make_args(sac, **paper), 11, 3)
    args = sac.fit_to_sizes(make_args(sac, target_entropy=0.0, **paper), 11, 3)
    assert (args.target_entropy, args.sigma, args.sigma_inference) == (0.0, 0.1, 0.1)
    assert "at most -14.66" in capsys.readouterr().out


def test_default_targets(sac):
    """0 for the path of a flow, -d for a Gaussian."""
    for policy, target in (("flow-g", 0.0), ("flow-t", 0.0), ("mlp", 0.0), ("gaussian", -3.0)):
        args = sac.fit_to_sizes(make_args(sac, policy=policy, online_steps=60_000), 11, 3)
        assert args.target_entropy == target
    with pytest.raises(sac.UserError, match="the replay of 10000 seed"):
        sac.fit_to_sizes(make_args(sac, num_seeds=10_000), 376, 17)


# ---- chunks and what an update may see ----


def rows_of(rewards, terminals, masks):
    n = len(rewards)
    column = np.arange(n, dtype=np.float32)[:, None]
    data = dict(observations=column, next_observations=column + 1, actions=column / 100)
    data |= dict(rewards=rewards, terminals=terminals, masks=masks)
    return {k: np.asarray(v, np.float32) for k, v in data.items()}


@pytest.mark.parametrize(
    "terminals,masks,valid,discount",
    [
        ((0, 1, 0, 0), (1, 1, 1, 1), (1, 1, 0, 0), 0.0625),
        ((0, 0, 0, 1), (1, 1, 1, 1), (1, 1, 1, 1), 0.0625),  # time limit: bootstrap
        ((0, 0, 0, 1), (1, 1, 1, 0), (1, 1, 1, 1), 0.0),  # success in the last row
        ((0, 0, 0, 0), (1, 0, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_chunk_masks(sac, terminals, masks, valid, discount):
    """h = 4, gamma = 0.5, rewards 1, 2, 4, 8: R = 4; the critic weighs by the last valid."""
    data = sac.device_rows(rows_of([1, 2, 4, 8], terminals, masks))
    batch = sac.sample_chunks(jax.random.key(0), data, None, 2, 4, 0.5)
    assert (np.asarray(batch["returns"]) == 4).all()
    assert (np.asarray(batch["discounts"]) == discount).all()
    np.testing.assert_array_equal(batch["valid"][0], valid)
    np.testing.assert_allclose(batch["actions"][0], [0, 0.01, 0.02, 0.03], atol=1e-7)
    assert batch["obs"][0, 0] == 0 and batch["next_obs"][0, 0] == 4
    args = make_args(sac, "cube-triple", horizon_length=4, batch_size=2)
    critic = lambda p, s, obs, a, train=False: (jnp.full((2, len(obs)), 1.0), s)
    nets = sac.Networks(4, critic)
    loss, _ = sac.critic_loss({}, {}, ({}, {}), nets, args, batch, batch["actions"], 0.0)
    assert loss == pytest.approx(valid[-1] * (1 - (4 + discount)) ** 2)


def ring(sac, capacity, writes, rows_per_write=1):
    """A ring in which row i (counted from the first ever) has reward i."""
    replay = sac.make_replay(capacity, 1, 1)
    for i in range(0, writes * rows_per_write, rows_per_write):
        number = jnp.arange(i, i + rows_per_write, dtype=jnp.float32)
        rows = dict(obs=number[:, None], next_obs=number[:, None], actions=number[:, None])
        rows |= dict(rewards=number, masks=jnp.ones(rows_per_write))
        replay = sac.insert(replay, rows | dict(terminals=jnp.zeros(rows_per_write)))
    return replay


def all_windows(sac, data, replay, horizon, num_starts, monkeypatch, **limits):
    """Every window that can be drawn, by drawing every number once: its rows' actions."""
    seen = {}

    def every(key, shape, low, high):
        seen["high"] = int(high)
        return jnp.arange(shape[0]) % jnp.maximum(high, 1)

    monkeypatch.setattr(sac.jax.random, "randint", every)
    batch = sac.sample_chunks(None, data, replay, num_starts, horizon, 0.9, **limits)
    assert seen["high"] == num_starts
    return np.asarray(batch["actions"])


def test_ring_seam(sac, monkeypatch):
    """C = 8, h = 3. After 11 writes rows 3..10 are there: starts 3..7 and 0, never 1, 2."""
    windows = all_windows(sac, None, ring(sac, 8, 11), 3, 6, monkeypatch)
    assert (windows[:, 0] % 8).tolist() == [3, 4, 5, 6, 7, 0]
    assert (np.diff(windows, axis=1) == 1).all() and windows.max() == 10
    windows = all_windows(sac, None, ring(sac, 8, 5), 3, 3, monkeypatch)
    assert windows[:, 0].tolist() == [0, 1, 2]


def test_no_window_joins_dataset_and_ring(sac, monkeypatch):
    data = sac.device_rows(rows_of(np.arange(6), np.zeros(6), np.ones(6)))
    data["actions"] = -1 - data["obs"]  # dataset rows are -1, -2, ...
    windows = all_windows(sac, data, ring(sac, 8, 5), 3, 4 + 3, monkeypatch)
    assert ((windows < 0).all(axis=1) | (windows >= 0).all(axis=1)).all()
    assert (np.abs(np.diff(windows, axis=1)) == 1).all()
    assert sorted(windows[:, 0].tolist()) == [-4, -3, -2, -1, 0, 1, 2]


@pytest.mark.parametrize(
    "num_envs,utd,delay",
    [(1, 1, 3), (1, 2, 3), (4, 1, 3), (4, 1, 2), (2, 3, 2), (1, 0.5, 1), (1, 0.3, 2), (4, 0.1, 3)],
)
def test_an_update_sees_no_row_newer_than_its_step(sac, monkeypatch, num_envs, utd, delay):
    """Of a block's updates each sees the rows of the steps up to its own, no more, no fewer."""
    flags = dict(num_envs=num_envs, utd=utd, policy_delay=delay, batch_size=4)
    args = make_args(sac, buffer_size=20, online_steps=240, learning_starts=0, **flags)
    steps, groups = sac.block_size(args)
    updates = groups * delay
    assert updates == pytest.approx(steps * num_envs * utd)
    for fewer in range(1, steps):  # no shorter block has a whole number of actor updates
        assert abs(fewer * num_envs * utd / delay % 1 - 0.5) < 0.499
    capacity = sac.ring_rows(args)
    assert capacity == 20 + steps * num_envs
    writes = 3 * steps + 100 // num_envs
    replay = ring(sac, capacity, writes, num_envs)
    windows = []

    def record(key, data, replay, batch_size, horizon, gamma, stride, limit):
        assert stride == num_envs
        windows.append((int(replay["added"]), int(limit)))
        return dict.fromkeys(("obs", "next_obs"), jnp.zeros((batch_size, 3)))

    monkeypatch.setattr(sac, "sample_chunks", record)
    state = make_state(sac, args)
    learn = sac.make_learn(None, args, lambda state, *rest: (state, {}))
    for block in (0, 1):  # the same in each block, counted from its end
        for first in range(0, updates, delay):
            state = state.replace(step=jnp.int32(block * updates + first))
            learn(dict(state=state, replay=replay, sums={}), None, None)
    before = (writes - steps) * num_envs  # rows when the block began
    due = [np.ceil(round((j + 1) / (num_envs * utd), 6)) for j in range(updates)]
    expected = [before + num_envs * int(step) for step in due]
    assert windows[:updates] == [(e, 20) for e in expected] and expected[-1] == writes * num_envs
    assert windows[updates:] == windows[:updates]
    monkeypatch.undo()
    oldest = expected[0] - 20
    seen = all_windows(sac, None, replay | {"added": expected[0]}, 1, 20, monkeypatch, limit=20)
    assert sorted(seen[:, 0].tolist()) == list(range(oldest, expected[0]))  # still in the ring


@pytest.mark.parametrize("schedule,number", [("interleaved", 2), ("sequential", 1)])
def test_offline_updates_do_not_count_in_a_block(sac, schedule, number):
    """Offline iterations take one step of the critic or two; the first online update is the first
    of its block in either schedule."""
    flags = dict(offline_schedule=schedule, offline_steps=5, num_envs=2, policy_delay=4)
    args = make_args(sac, "cube-triple", **flags)
    assert sac.block_size(args) == (2, 1)
    replay, start = dict(added=jnp.int32(30)), 5 * 4 * number
    seen = [int(sac.visible_rows(args, replay, jnp.int32(start + j))) for j in range(8)]
    assert seen == [28, 28, 30, 30] * 2


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["Hopper-v4", "cube-triple"])
def test_two_seeds_equal_two_single_runs(sac, env_id):
    """Three updates under vmap against each seed alone."""
    params = {}
    raw = rows_of(np.arange(30) / 30, np.zeros(30), np.ones(30))
    data = sac.device_rows({k: np.repeat(v, 3, 1) if v.ndim > 1 else v for k, v in raw.items()})
    for seed, number in ((0, 2), (0, 1), (1, 1)):
        args = make_args(sac, env_id, seed=seed, num_seeds=number, target_entropy=0.0)
        nets = sac.make_networks(args, 3)
        learn = sac.make_learn(nets, args, sac.make_update(nets, args))
        state = sac.start_states(args, 3, 3, jnp.zeros(3), jnp.ones(3))
        carry = sac.start_carry(args, data, nets, state)
        repeat = sac.repeat(learn, 3)
        step = jax.vmap(lambda carry, repeat=repeat: repeat(carry, data, jnp.float32(1.0)))
        params[seed, number] = jax.jit(step)(carry)["state"].params
    both, alone = params[0, 2], (params[0, 1], params[1, 1])
    for i in (0, 1):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], both)
        close = functools.partial(np.testing.assert_allclose, atol=1e-4)
        jax.tree.map(close, one, alone[i])
    assert any((np.asarray(x)[0] != np.asarray(x)[1]).any() for x in jax.tree.leaves(both))
