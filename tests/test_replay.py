"""n-step targets, the online ring and its sampling against plain NumPy bookkeeping."""

import collections
import errno
import functools
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GAMMA = 0.9


def targets(gsflow, rewards, masks, terminals, n, index=None, newest=None, stride=1):
    rows = dict(rewards=rewards, masks=masks, terminals=terminals)
    rows = {k: jnp.asarray(v, jnp.float32) for k, v in rows.items()}
    index = jnp.arange(len(rewards)) if index is None else jnp.asarray(index)
    newest = len(rewards) - 1 if newest is None else newest
    return [np.asarray(x) for x in gsflow.n_step_targets(rows, index, newest, n, GAMMA, stride)]


def check(result, returns, discounts, last):
    np.testing.assert_allclose(result[0], returns, rtol=1e-6)
    np.testing.assert_allclose(result[1], discounts, rtol=1e-6)
    np.testing.assert_array_equal(result[2], last)


# ---- n-step targets ----


def test_one_step(gsflow):
    rewards, masks, terminals = [1, 2, 3, 4], [1, 0, 1, 1], [0, 0, 1, 0]
    result = targets(gsflow, rewards, masks, terminals, 1)
    check(result, rewards, [0.9, 0, 0.9, 0.9], [0, 1, 2, 3])


def test_three_steps_within_an_episode(gsflow):
    result = targets(gsflow, [1, 10, 100, 1000, 10000], [1] * 5, [0, 0, 0, 0, 1], 3)
    returns = [1 + 9 + 81, 10 + 90 + 810, 100 + 900 + 8100, 1000 + 9000, 10000]
    check(result, returns, [0.729, 0.729, 0.729, 0.81, 0.9], [2, 3, 4, 4, 4])


def test_window_stops_at_success(gsflow):
    """Nothing is bootstrapped there, and the rows behind it do not count although they follow."""
    result = targets(gsflow, [1, 10, 100, 1000], [1, 0, 1, 1], [0, 0, 0, 1], 3)
    check(result, [10, 10, 1000, 1000], [0, 0, 0.81, 0.9], [1, 1, 3, 3])


def test_window_stops_at_the_end_of_an_episode(gsflow):
    """A time limit: the value behind it is bootstrapped, the next episode's rewards are not."""
    result = targets(gsflow, [1, 10, 100, 1000], [1] * 4, [0, 1, 0, 1], 3)
    check(result, [10, 10, 1000, 1000], [0.81, 0.9, 0.81, 0.9], [1, 1, 3, 3])


def test_window_stops_at_the_newest_row_of_a_ring(gsflow):
    """Rows 0..2 were written last; row 3 is the oldest and continues at row 0 by the wrap."""
    result = targets(gsflow, [1, 10, 100, 1000, 10000], [1] * 5, [0] * 5, 3, newest=2)
    returns = [1 + 9 + 81, 10 + 90, 100, 1000 + 9000 + 0.81, 10000 + 0.9 + 8.1]
    check(result, returns, [0.729, 0.81, 0.9, 0.729, 0.729], [2, 2, 2, 0, 1])


def test_several_environments_side_by_side(gsflow):
    """Two environments: rows 0, 2, 4 belong to one and 1, 3, 5 to the other; 5 is the newest."""
    rewards, terminals = [1, 2, 10, 20, 100, 200], [0, 0, 0, 1, 0, 0]
    result = targets(gsflow, rewards, [1] * 6, terminals, 3, stride=2)
    returns = [1 + 9 + 81, 2 + 18, 10 + 90, 20, 100, 200]
    discounts = [0.729, 0.81, 0.81, 0.9, 0.9, 0.9]
    check(result, returns, discounts, [4, 3, 4, 3, 4, 5])


def test_device_data(gsflow):
    """Clipped actions, targets worked out once, and the observation behind the whole window."""
    raw = dict(observations=np.arange(5.0)[:, None], next_observations=np.arange(1.0, 6)[:, None])
    raw |= dict(actions=np.array([[-1.0], [0.5], [1.0], [0.0], [0.2]]), rewards=np.ones(5))
    raw |= dict(masks=np.array([1, 1, 1, 0, 1]), terminals=np.array([0, 1, 0, 0, 1]))
    for n, returns, discounts, after in (
        (1, [1] * 5, [0.9, 0.9, 0.9, 0, 0.9], [1, 2, 3, 4, 5]),
        (2, [1.9, 1, 1.9, 1, 1], [0.81, 0.9, 0, 0, 0.9], [2, 2, 4, 4, 5]),
    ):
        data = gsflow.device_data(raw, n, GAMMA)
        np.testing.assert_allclose(data["returns"], returns, rtol=1e-6)
        np.testing.assert_allclose(data["discounts"], discounts, rtol=1e-6)
        np.testing.assert_array_equal(data["next_obs"][:, 0], after)
        np.testing.assert_array_equal(data["obs"], raw["observations"])
        limit = np.float32(1 - 1e-5)
        np.testing.assert_array_equal(
            data["actions"][:, 0], np.float32([-limit, 0.5, limit, 0, 0.2])
        )
        assert all(x.dtype == jnp.float32 for x in data.values())


# ---- the ring ----


def dataset(num_rows):
    """Rows that carry their numbers, -1, -2, ..., as observations."""
    ids = -jnp.arange(1.0, num_rows + 1)
    data = dict(obs=ids[:, None], actions=ids[:, None], next_obs=ids[:, None])
    return data | dict(returns=ids, discounts=jnp.full(num_rows, GAMMA))


class History:
    """What the environments did, in order, beside the ring that holds the end of it."""

    def __init__(self, gsflow, capacity, num_envs=1, seed=0):
        self.replay, self.num_envs = gsflow.make_replay(capacity, 1, 1), num_envs
        self.rng, self.rows = np.random.default_rng(seed), []
        self.insert = jax.jit(gsflow.insert)

    def step(self):
        """One step of all environments; row number i has observation i and action 2 i."""
        shape, first = self.num_envs, len(self.rows)
        ids = np.arange(first, first + shape, dtype=np.float32)
        success, ends = self.rng.random(shape) < 0.1, self.rng.random(shape) < 0.1
        new = dict(obs=ids[:, None], actions=2 * ids[:, None], next_obs=ids[:, None] + 0.5)
        new |= dict(rewards=self.rng.standard_normal(shape), masks=1.0 - success)
        new |= dict(terminals=success | ends)
        self.rows += [{k: v[e] for k, v in new.items()} for e in range(shape)]
        self.replay = self.insert(self.replay, jax.tree.map(jnp.asarray, new))

    def window(self, start, n):
        """(return, discount, last row) of the window that begins at row number `start`."""
        ret, discount, row = 0.0, 1.0, start
        while True:
            ret += discount * self.rows[row]["rewards"]
            discount *= GAMMA * self.rows[row]["masks"]
            n, following = n - 1, row + self.num_envs
            if not n or self.rows[row]["terminals"] or following >= len(self.rows):
                return ret, discount, row
            row = following


def test_insert_wraps_around(gsflow):
    history = History(gsflow, 6, num_envs=2)
    for _ in range(5):
        history.step()
    assert history.replay["added"] == 10
    np.testing.assert_array_equal(history.replay["rows"]["obs"][:, 0], [6, 7, 8, 9, 4, 5])
    for i, number in enumerate((6, 7, 8, 9, 4, 5)):
        for name, ring in history.replay["rows"].items():
            np.testing.assert_allclose(ring[i], history.rows[number][name], rtol=1e-6)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("n", [1, 4])
def test_no_window_crosses_the_write_pointer(gsflow, num_envs, n):
    """Every start in the ring, at every fill level and pointer, against the true history."""
    capacity, data = 12, dataset(4)
    history = History(gsflow, capacity, num_envs)
    draw = jax.jit(
        lambda key, replay: gsflow.sample(
            key, data, replay, 400, n, GAMMA, buffer_size=100, stride=num_envs
        )
    )
    newest_seen = 0
    for step in range(1, 2 * capacity // num_envs + 2):
        history.step()
        batch = jax.device_get(draw(jax.random.key(step), history.replay))
        numbers = batch["obs"][:, 0].astype(int)
        live = range(max(0, len(history.rows) - capacity), len(history.rows))
        assert set(numbers[numbers >= 0]) == set(live)  # all of them, the newest too
        expected = {i: history.window(i, n) for i in live}
        for b in np.flatnonzero(numbers >= 0):
            ret, discount, last = expected[numbers[b]]
            np.testing.assert_allclose(batch["returns"][b], ret, atol=1e-5)
            np.testing.assert_allclose(batch["discounts"][b], discount, rtol=1e-5)
            assert batch["next_obs"][b, 0] == last + 0.5
            assert batch["actions"][b, 0] == 2 * numbers[b]
            newest_seen += last >= len(history.rows) - num_envs
    assert newest_seen > 100


# ---- sampling ----


@functools.cache
def sampler(gsflow, num_data, batch_size, buffer_size=1, **kwargs):
    fixed = (batch_size, 1, GAMMA, buffer_size)
    data = dataset(num_data)
    return jax.jit(lambda key, replay: gsflow.sample(key, data, replay, *fixed, **kwargs))


def draw_ids(draw, key, replay):
    return np.asarray(draw(jax.random.key(key), replay)["obs"][:, 0]).astype(int)


def assert_uniform(ids, population):
    """Chi-square against equal shares, four standard deviations; and nothing from elsewhere."""
    counts = collections.Counter(ids.tolist())
    assert set(counts) <= set(population)
    expected, freedom = len(ids) / len(population), len(population) - 1
    statistic = sum((counts[i] - expected) ** 2 / expected for i in population)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom), statistic


def test_dataset_alone(gsflow):
    ids = draw_ids(sampler(gsflow, 20, 20_000), 0, None)
    assert_uniform(ids, range(-20, 0))
    again = draw_ids(sampler(gsflow, 20, 20_000), 0, None)
    np.testing.assert_array_equal(ids, again)
    # independent draws: pairs of neighbours are uniform as well
    assert_uniform((ids[::2] + 20) * 20 + ids[1::2] + 20, range(400))


def test_dataset_and_ring_are_one_uniform_pool(gsflow):
    history = History(gsflow, 8)
    draw = sampler(gsflow, 12, 20_000, buffer_size=100)
    for steps in (3, 10):
        while len(history.rows) < steps:
            history.step()
        live = range(max(0, steps - 8), steps)
        assert_uniform(draw_ids(draw, steps, history.replay), [*range(-12, 0), *live])


def test_oldest_rows_leave_first_and_the_dataset_before_the_ring(gsflow):
    """The reachable rows at every step equal a first-in first-out queue of the same length."""
    num_data, buffer_size = 7, 10
    queue = collections.deque(range(-1, -num_data - 1, -1), maxlen=buffer_size)
    history = History(gsflow, buffer_size)
    draw = sampler(gsflow, num_data, 600, buffer_size=buffer_size)
    for step in range(25):
        history.step()
        queue.append(step)
        assert set(draw_ids(draw, step, history.replay)) == set(queue)
    assert -1 not in queue and len(queue) == 10


def test_short_online_phase_keeps_the_dataset(gsflow):
    """A ring as long as the online phase: nothing is overwritten and little of the data leaves."""
    history = History(gsflow, 4)
    draw = sampler(gsflow, 7, 600, buffer_size=10)
    for _ in range(4):
        history.step()
    assert set(draw_ids(draw, 0, history.replay)) == {*range(-7, -1), *range(4)}


def test_empty_replay_falls_back_to_the_dataset(gsflow):
    replay = gsflow.make_replay(8, 1, 1)
    for balanced in (False, True):
        draw = sampler(gsflow, 12, 12_000, buffer_size=100, balanced=balanced)
        assert_uniform(draw_ids(draw, 0, replay), range(-12, 0))


def test_balanced_sampling(gsflow):
    history = History(gsflow, 8)
    draw = sampler(gsflow, 12, 20_000, buffer_size=100, balanced=True)
    for steps in (1, 5, 11):
        while len(history.rows) < steps:
            history.step()
        ids = draw_ids(draw, steps, history.replay)
        assert (ids >= 0).sum() == 10_000
        assert_uniform(ids[ids < 0], range(-12, 0))
        if steps > 1:
            assert_uniform(ids[ids >= 0], range(max(0, steps - 8), steps))


def test_small_buffer_still_holds_the_dataset(gsflow):
    """Asked for less than the dataset, the pool is the dataset and one more row."""
    history = History(gsflow, 8)
    draw = sampler(gsflow, 7, 600, buffer_size=4)
    assert set(draw_ids(draw, 0, history.replay)) == set(range(-7, 0))
    queue = collections.deque(range(-1, -8, -1), maxlen=8)
    for step in range(10):
        history.step()
        queue.append(step)
        assert set(draw_ids(draw, step, history.replay)) == set(queue)


# ---- its files ----


class Recorder:
    """Two seeds' rings of six rows, which `Run.save` writes."""

    def __init__(self, gsflow, directory):
        self.gsflow, self.rng, self.time = gsflow, np.random.default_rng(0), 0
        ring = jax.vmap(lambda _: gsflow.make_replay(6, 3, 2))(jnp.arange(2))
        self.carry = dict(replay=ring)
        csv, args = SimpleNamespace(tell=lambda: 0), SimpleNamespace(offline_steps=1)
        self.run = SimpleNamespace(**gsflow.PROGRESS, dir=directory, csv=csv, args=args, rows=[])
        self.insert = jax.jit(jax.vmap(gsflow.insert))

    def step(self, times=1):
        for _ in range(times):
            new = {k: self.rng.normal(size=(2, 2, *v.shape[2:]))
                   for k, v in self.carry["replay"]["rows"].items()}  # fmt: skip
            self.carry = dict(replay=self.insert(self.carry["replay"], new))
            self.time += 2

    def save(self):
        self.run.step = self.time
        self.gsflow.Run.save(self.run, self.carry)

    def load(self):
        """Go on from the last checkpoint, as --resume does."""
        carry, facts = self.gsflow.load_checkpoint(self.run.dir)
        vars(self.run).update(self.gsflow.PROGRESS | facts)
        self.carry, self.time = jax.tree.map(jnp.asarray, carry), facts["step"]


def assert_same_bytes(one, other):
    one, other = (jax.tree_util.tree_flatten_with_path(jax.device_get(x))[0] for x in (one, other))
    assert [path for path, _ in one] == [path for path, _ in other]
    for (path, x), (_, y) in zip(one, other, strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), path


@pytest.mark.parametrize("resume", [False, True])
def test_saved_rows_are_those_of_the_ring(gsflow, tmp_path, resume):
    """Bit for bit at every fill level and pointer, in the last checkpoint and in the one before;
    each row is written once, and what neither needs is deleted."""
    recorder, before, ends = Recorder(gsflow, tmp_path), None, [0]
    for steps in (1, 1, 1, 1, 2, 3, 1, 4, 9, 1, 0, 2, 1, 1):  # of two rows; the ring has six
        recorder.step(steps)
        recorder.save()
        ends.append(recorder.time)
        carry, facts = gsflow.load_checkpoint(tmp_path)
        assert_same_bytes(carry, recorder.carry)
        first, end, _ = facts["replay_files"][-1]
        assert (first, end) == (max(ends[-2], ends[-1] - 6, 0), ends[-1])
        if before:
            older = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{len(ends)}"))
            (older / "checkpoint.msgpack").unlink()
            assert_same_bytes(gsflow.load_checkpoint(older)[0], before)
        files = {tuple(map(int, p.stem.split("-"))) for p in (tmp_path / "replay").iterdir()}
        assert all(b > ends[-2] - 6 or b == ends[-2] for _, b in files), files
        before = recorder.carry
        if resume:
            recorder.load()


@pytest.mark.parametrize("moment", range(6))
def test_a_crash_at_any_moment_of_a_save(gsflow, tmp_path, monkeypatch, moment):
    """Stopped at one of its calls by a full disk: what is loaded is the checkpoint before or the
    new one, whole, and what follows from it is saved as ever."""
    recorder, calls, stopped = Recorder(gsflow, tmp_path), [], 0

    def fail_at_the_moment(call):
        def wrapped(*inputs):
            calls.append(call)
            if len(calls) == moment + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*inputs)

        return wrapped

    recorder.step(), recorder.save()
    for _ in range(3):
        before = gsflow.load_checkpoint(tmp_path)[0]
        recorder.step(2)
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace"):
                patch.setattr(os, name, fail_at_the_moment(getattr(os, name)))
            calls.clear()
            try:
                recorder.save()
            except OSError:
                stopped += 1
        assert not [p for p in tmp_path.rglob("*.tmp")]
        carry, facts = gsflow.load_checkpoint(tmp_path)
        done = facts["step"] == recorder.time
        assert_same_bytes(carry, recorder.carry if done else before)
        (tmp_path / "replay" / "9-99.tmp").touch()  # as SIGKILL leaves them
        recorder.load()
        recorder.step(), recorder.save()
        assert_same_bytes(gsflow.load_checkpoint(tmp_path)[0], recorder.carry)
        assert len(list((tmp_path / "replay").iterdir())) <= 4
    assert stopped == 3 * (moment < 5)  # two calls for the rows, three for the checkpoint
