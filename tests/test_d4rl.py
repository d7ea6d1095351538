"""Tests of benchmark/tasks/d4rl.py: names, files, transitions, environments, scores.

No download: files are made here or served by this machine. Environments are compared with figures
that do not come from this code: D4RL's published returns of random policies, the layouts of its
observations and the terms of its rewards, OGBench's mazes.
"""

import dataclasses
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import gymnasium
import numpy as np
import pytest

h5py = pytest.importorskip("h5py")
pytest.importorskip("gymnasium_robotics")
from conftest import ROOT, load_script

d4rl = load_script(ROOT / "benchmark" / "tasks" / "d4rl.py")
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


# ---- names and addresses ----


@pytest.mark.parametrize(
    ("name", "address"),
    [  # d4rl/infos.py and the registrations of the d4rl package
        ("antmaze-umaze-v2", "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_"
         "sparse_fixed.hdf5"),
        ("antmaze-umaze-diverse-v2", "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_"
         "True_sparse_fixed.hdf5"),
        ("antmaze-medium-play-v2", "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_"
         "False_sparse_fixed.hdf5"),
        ("antmaze-large-diverse-v2", "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_"
         "multigoal_True_sparse_fixed.hdf5"),
        ("walker2d-medium-replay-v2", "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5"),
        ("hopper-random-v2", "gym_mujoco_v2/hopper_random-v2.hdf5"),
        ("pen-human-v1", "hand_dapg_v1/pen-human-v1.hdf5"),
    ],
)  # fmt: skip
def test_addresses(name, address):
    original, mirror = d4rl.url(name)
    assert original == f"http://rail.eecs.berkeley.edu/datasets/offline_rl/{address}"
    file = address.split("/")[1]
    assert mirror == f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}"


def test_names():
    names = d4rl.all_names()
    assert len(names) == len(set(names)) == 6 + 3 * 6 + 4 * 3
    assert len({d4rl.url(name)[0] for name in names}) == len(names)
    for wrong in ("antmaze-large-v2", "antmaze-large-play-v1", "kitchen-mixed-v0", "", "hopper"):
        with pytest.raises(ValueError, match=f"unknown D4RL task '{wrong}'; close matches"):
            d4rl.make_task(wrong, "anywhere")


def test_directories(tmp_path, monkeypatch):
    """d4rl's own cache beside OGBench's, unless a d4rl folder lies in the dataset directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name, file = "pen-human-v1", "pen-human-v1.hdf5"
    assert d4rl.path(name, "~/.ogbench/data") == tmp_path / ".d4rl" / "datasets" / file
    assert d4rl.path(name, tmp_path / "sets") == tmp_path / "sets" / "d4rl" / file
    (tmp_path / ".ogbench" / "data" / "d4rl").mkdir(parents=True)
    assert d4rl.path(name, "~/.ogbench/data").parent == tmp_path / ".ogbench" / "data" / "d4rl"


def test_make_task_is_cheap(tmp_path):
    """It neither loads a simulator or h5py nor looks at the disk."""
    code = (
        "import sys, d4rl; d4rl.make_task('hopper-medium-v2', '/nowhere');"
        "print({'mujoco', 'h5py', 'ogbench', 'gymnasium_robotics', 'jax'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmark" / "tasks")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.strip() == b"set()", done.stderr


# ---- files ----


def make_rows(name, num_rows=60, seed=0):
    """Rows of a D4RL file: episodes of 7 rows, some cut by time, some terminated."""
    spec, rng = d4rl.FAMILIES[d4rl.parse(name)[0]], np.random.default_rng(seed)
    ends = np.arange(num_rows) % 7 == 6
    timeouts = ends & (rng.random(num_rows) < 0.5)
    terminals = ends & ~timeouts
    if name.startswith("antmaze"):  # an ant stays at the goal, and the file's episode goes on
        timeouts, terminals = ends, rng.random(num_rows) < 0.3
    return dict(
        observations=rng.normal(size=(num_rows, spec.obs_dim)).astype(np.float32),
        actions=rng.uniform(-1.2, 1.2, (num_rows, spec.act_dim)).astype(np.float32),
        rewards=rng.integers(0, 2, num_rows).astype(np.float32),
        terminals=terminals,
        timeouts=timeouts,
    )


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in rows.items():
            file[key] = array
        file["infos/goal"] = np.zeros((len(rows["observations"]), 2))


def reference(name, rows):
    """d4rl.qlearning_dataset and FQL's reading of it, row by row."""
    found = []
    for i in range(len(rows["rewards"]) - 1):
        if not rows["timeouts"][i]:
            found.append([rows[k][i] for k in KEYS[:4]] + [rows["observations"][i + 1]])
    ant = name.startswith("antmaze")
    last = []
    for i, (_, _, _, terminal, next_obs) in enumerate(found):
        final = i + 1 == len(found) or np.linalg.norm(found[i + 1][0] - next_obs) > 1e-6
        last.append(float(final or (bool(terminal) and not ant)))
    obs, actions, rewards, terminals, next_obs = (np.array(x) for x in zip(*found, strict=True))
    return dict(observations=obs, actions=np.clip(actions, -1, 1), rewards=rewards - ant,
                next_observations=next_obs, masks=1.0 - terminals, terminals=last)  # fmt: skip


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "hopper-medium-v2", "door-cloned-v1"])
def test_transitions(name, tmp_path):
    for seed in range(5):
        rows = make_rows(name, seed=seed)
        write(d4rl.path(name, tmp_path), rows)
        data, source = d4rl.make_task(name, str(tmp_path))["data"]()
        expected = reference(name, rows)
        assert source == "official" and set(data) == set(expected)
        for key, array in expected.items():
            np.testing.assert_array_equal(data[key], np.float32(array), err_msg=key)
            assert data[key].dtype == np.float32
        assert data["terminals"][-1] == 1 and 0 < data["masks"].mean() < 1
        assert 1 < data["terminals"].sum() < len(data["rewards"])


def test_shapes_of_old_files(tmp_path):
    """Columns (N, 1), flags that are floats and double precision read as the usual kinds do."""
    name = "pen-cloned-v1"
    rows = make_rows(name)
    write(d4rl.path(name, tmp_path / "a"), rows)
    old = {k: np.float64(v)[:, None] if v.ndim == 1 else np.float64(v) for k, v in rows.items()}
    write(d4rl.path(name, tmp_path / "b"), old)
    (one, _), (two, _) = (d4rl.load(name, tmp_path / folder) for folder in "ab")
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


def bad_files():
    """Yield (a change of the rows, a part of the sentence)."""
    nan = lambda rows, key: rows[key].__setitem__(5, np.nan)
    yield lambda rows: rows.pop("timeouts"), "no 'timeouts'"
    yield lambda rows: nan(rows, "observations"), "'observations' holds NaN or infinity"
    yield lambda rows: nan(rows, "rewards"), "'rewards' holds NaN or infinity"
    yield lambda rows: rows.update(actions=rows["actions"][:, :2]), "'actions' has shape (60, 2)"
    yield lambda rows: rows.update(actions=rows["actions"][:50]), "'actions' has shape (50, 3)"
    yield lambda rows: rows.update(rewards=np.float32(3)), "'rewards' has shape ()"
    yield lambda rows: rows.update({k: v[:1] for k, v in rows.items()}), "2 rows or more"
    yield lambda rows: rows.update(terminals=np.array([b"no"] * 60)), "'terminals' holds no numbers"
    yield lambda rows: rows.update(timeouts=np.ones(60, bool)), "every row is a time-out"


@pytest.mark.parametrize(("change", "part"), list(bad_files()))
def test_bad_files_get_one_sentence(change, part, tmp_path):
    name = "hopper-medium-v2"
    rows = make_rows(name)
    change(rows)
    write(d4rl.path(name, tmp_path), rows)
    with pytest.raises(ValueError) as error:
        d4rl.load(name, tmp_path)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_a_cut_file(tmp_path):
    name = "hopper-medium-v2"
    file = d4rl.path(name, tmp_path)
    write(file, make_rows(name))
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(OSError, match="no complete HDF5 file; delete it and get it again"):
        d4rl.load(name, tmp_path)


def test_a_collected_file_is_labelled(tmp_path):
    name = "antmaze-medium-diverse-v2"
    write(d4rl.collected_path(name, tmp_path), make_rows(name))
    assert d4rl.load(name, tmp_path)[1] == f"collected ({name}.collected.hdf5)"
    write(d4rl.path(name, tmp_path), make_rows(name))  # the official one comes first
    assert d4rl.load(name, tmp_path)[1] == "official"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /good/... sends the server's body, /short/... half of it, /page/... a page, others 404"""

    def log_message(self, *_):
        pass

    def do_GET(self):
        how = self.path.split("/")[1]
        self.server.asked.append(how)
        if how not in ("good", "short", "page"):
            return self.send_error(404)
        body = b"<html></html>" if how == "page" else self.server.body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if how == "short" else body)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked, found.daemon_threads = [], True
        threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
        yield found
        found.shutdown()


@pytest.mark.parametrize("original", ["good", "short", "page", "missing"])
@pytest.mark.parametrize("mirror", ["good", "missing"])
def test_download(original, mirror, server, tmp_path, monkeypatch):
    """The original, else the mirror, else one sentence; a file appears only when it is whole."""
    name = "walker2d-expert-v2"
    write(tmp_path / "made.hdf5", make_rows(name))
    server.body = (tmp_path / "made.hdf5").read_bytes()
    root = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(d4rl, "URL", f"{root}/{original}")
    monkeypatch.setattr(d4rl, "MIRROR", f"{root}/{mirror}")
    target = d4rl.path(name, tmp_path)
    if "good" in (original, mirror):
        data, source = d4rl.load(name, tmp_path)
        assert source == "official" and target.read_bytes() == server.body
        assert len(data["rewards"]) > 20 and os.listdir(target.parent) == [target.name]
        assert server.asked == ([original] if original == "good" else [original, mirror])
    else:
        with pytest.raises(OSError) as error:
            d4rl.load(name, tmp_path)
        sentence = str(error.value)
        assert all(part in sentence for part in (str(target), *d4rl.url(name)))
        assert "\n" not in sentence and os.listdir(target.parent) == []


def test_nowhere_to_write(tmp_path):
    (tmp_path / "plain").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write to .*; give --dataset-dir"):
        d4rl.load("hopper-medium-v2", tmp_path / "plain")


def test_missing_packages(tmp_path, monkeypatch):
    """One sentence with the pip command, whichever package is missing."""
    command = "pip install -r benchmark/tasks/requirements.txt"
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=f"'h5py': {command}"):
        d4rl.load("hopper-medium-v2", tmp_path)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=f"'gymnasium_robotics': {command}"):
        d4rl.make_env("pen-human-v1")
    monkeypatch.undo()
    monkeypatch.setattr(d4rl, "ADROIT_VERSION", "1.2.0")
    with pytest.raises(ImportError, match=r"1\.2\.0, which this file corrects: pip install"):
        d4rl.make_env("pen-human-v1")


# ---- environments ----


@functools.cache
def random_episodes(name, number=40):
    """Returns and lengths of uniformly random actions."""
    env = d4rl.make_env(name)
    env.action_space.seed(0)
    returns, lengths = [], []
    for seed in range(number):
        env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, steps, over = total + reward, steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    return np.array(returns), np.array(lengths)


@pytest.mark.parametrize("family", ["pen", "door", "hammer", "relocate", "halfcheetah", "walker2d"])
def test_random_policies_score_zero(family):
    """D4RL's reference returns lie within 4 standard errors of 40 episodes: for a right
    environment that fails once in 16,000. gymnasium-robotics' own rewards are 8 (hammer) to over
    100 (door) standard errors away. Hopper's reference, -20.3, cannot be a mean of this or the
    original environment, whose rewards for short episodes are positive: not compared."""
    spec = d4rl.FAMILIES[family]
    returns, lengths = random_episodes(f"{family}-{spec.sets[0]}-{spec.version}")
    error = returns.std(ddof=1) / np.sqrt(len(returns))
    assert abs(returns.mean() - spec.random) < 4 * error, (returns.mean(), error)
    assert lengths.max() <= spec.limit
    if family in ("door", "hammer", "relocate", "halfcheetah"):
        assert lengths.min() == spec.limit


@pytest.mark.parametrize("family", list(d4rl.FAMILIES))
def test_spaces_and_files_fit(family):
    """Sizes as in D4RL's files; -1 to 1 for every action."""
    spec = d4rl.FAMILIES[family]
    env = d4rl.make_env(f"{family}-{spec.sets[0]}-{spec.version}")
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (spec.obs_dim,)
    space = env.action_space
    assert space.shape == (spec.act_dim,) and (space.low == -1).all() and (space.high == 1).all()


@pytest.mark.parametrize(
    ("name", "limit"),
    [("antmaze-umaze-v2", 700), ("antmaze-large-play-v2", 1000), ("door-human-v1", 200),
     ("relocate-human-v1", 200), ("halfcheetah-medium-v2", 1000)],
)  # fmt: skip
def test_horizons(name, limit):
    env = d4rl.make_env(name)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    steps = [env.step(action)[2:4] for _ in range(limit)]
    assert steps == [(False, False)] * (limit - 1) + [(False, True)]


def test_locomotion_is_the_original():
    """Observation without the x position, velocities clipped for Hopper and Walker2d; D4RL's
    rewards and, for Hopper, the heights and angles at which it ends."""
    for name, frames, cost, alive in (
        ("hopper-medium-v2", 4 * 0.002, 1e-3, 1.0),
        ("walker2d-medium-v2", 4 * 0.002, 1e-3, 1.0),
        ("halfcheetah-medium-v2", 5 * 0.01, 0.1, 0.0),
    ):
        env = d4rl.make_env(name)
        data = env.unwrapped.data
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(60):
            action, x = env.action_space.sample(), data.qpos[0]
            obs, reward, terminated, _, _ = env.step(action)
            velocity = data.qvel if "cheetah" in name else np.clip(data.qvel, -10, 10)
            np.testing.assert_array_equal(obs, np.concatenate([data.qpos[1:], velocity]))
            expected = (data.qpos[0] - x) / frames + alive - cost * np.square(action).sum()
            assert reward == pytest.approx(expected, abs=1e-6)
            if name.startswith("hopper"):
                healthy = data.qpos[1] > 0.7 and abs(data.qpos[2]) < 0.2
                assert terminated == (not healthy or np.abs(obs[1:]).max() >= 100)
            if terminated:
                break


def adroit_steps(hand, episodes=8):
    """Yield (obs, reward, terminated, unwrapped environment, steps so far) of random actions."""
    env = d4rl.make_env(f"{hand}-human-v1")
    env.action_space.seed(1)
    for seed in range(episodes):
        env.reset(seed=seed)
        for step in range(env._max_episode_steps):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert set(info) >= {"success"}
            yield obs, reward, terminated, env.unwrapped, step + 1
            if terminated or truncated:
                break


def test_pen():
    """D4RL's pen: layout, reward, and the episode ends when (and only when) it is dropped."""
    drops = 0
    for obs, reward, terminated, env, step in adroit_steps("pen"):
        np.testing.assert_array_equal(obs[:24], env.data.qpos[:24])
        np.testing.assert_array_equal(obs[24:27], env.data.xpos[env.obj_body_id])
        np.testing.assert_allclose(obs[42:45], obs[33:36] - obs[36:39], atol=1e-12)
        distance, similarity = np.linalg.norm(obs[39:42]), obs[33:36] @ obs[36:39]
        dropped, near = obs[26] < 0.075, distance < 0.075
        bonus = 10 * (near and similarity > 0.9) + 50 * (near and similarity > 0.95)
        assert reward == pytest.approx(similarity - distance + bonus - 5 * dropped, abs=1e-9)
        assert terminated == dropped and step <= 100
        drops += dropped
    assert 3 <= drops <= 8


def test_door():
    for obs, reward, terminated, env, _ in adroit_steps("door", episodes=2):
        qpos, hinge = env.data.qpos, obs[28]
        np.testing.assert_array_equal(obs[:28], np.append(qpos[1:-2], qpos[-1]))
        np.testing.assert_allclose(obs[35:38], obs[29:32] - obs[32:35], atol=1e-12)
        bonus = 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)
        expected = -0.1 * np.linalg.norm(obs[35:38]) - 0.1 * (hinge - 1.57) ** 2 + bonus
        assert reward == pytest.approx(expected - 1e-5 * np.sum(env.data.qvel**2), abs=1e-9)
        assert not terminated


def test_relocate():
    for obs, reward, terminated, env, _ in adroit_steps("relocate", episodes=2):
        np.testing.assert_array_equal(obs[:30], env.data.qpos[:30])
        to_ball, to_target, ball = (np.linalg.norm(obs[i : i + 3]) for i in (30, 33, 36))
        lifted = env.data.xpos[env.obj_body_id][2] > 0.04
        expected = -0.1 * to_ball + lifted * (1 - 0.5 * to_target - 0.5 * ball)
        assert reward == pytest.approx(expected + 10 * (ball < 0.1) + 20 * (ball < 0.05), abs=1e-9)
        assert not terminated


def test_hammer():
    for obs, reward, terminated, env, _ in adroit_steps("hammer", episodes=2):
        np.testing.assert_array_equal(obs[:27], env.data.qpos[:27])
        palm, hammer, nail = obs[33:36], obs[36:39], obs[42:45]
        head = env.data.site_xpos[env.tool_site_id]
        goal = env.data.site_xpos[env.goal_site_id]
        to_goal = np.linalg.norm(nail - goal)
        lifted = hammer[2] > 0.04 and head[2] > 0.04
        expected = -0.1 * np.linalg.norm(palm - hammer) - np.linalg.norm(head - nail)
        expected -= 10 * to_goal + 0.01 * np.linalg.norm(env.data.qvel)
        expected += 2 * lifted + 25 * (to_goal < 0.02) + 75 * (to_goal < 0.01)
        assert reward == pytest.approx(expected, abs=1e-9)
        assert not terminated


# ---- antmaze ----


@pytest.mark.parametrize("maze", ["medium", "large"])
def test_antmaze_moves_as_ogbench_s(maze):
    """Same walls and ant as OGBench's maze of that name: equal states, against the walls too."""
    import ogbench  # noqa: F401  (registers the environments)

    ours = d4rl.make_env(f"antmaze-{maze}-play-v2").unwrapped
    theirs = gymnasium.make(f"antmaze-{maze}-v0", disable_env_checker=True).unwrapped
    grid = np.array([[cell == "#" for cell in row] for row in d4rl.MAZES[maze].rows])
    np.testing.assert_array_equal(grid, theirs.maze_map == 1)
    theirs.reset(seed=0, options={"task_id": 1})
    ours.reset(seed=0)
    rng, touched = np.random.default_rng(0), 0
    for start in ((0.0, 0.0), (-0.9, -0.9), (1.0, -1.0)):
        qpos, qvel = ours.init_qpos.copy(), rng.normal(size=14) * 2
        qpos[:2], qvel[:2] = start, (0, -3)  # towards the wall at y = -2
        for env in (ours, theirs):
            env.set_state(qpos, qvel)
        for _ in range(60):
            action = rng.uniform(-1, 1, 8).astype(np.float32)
            obs, other = (env.step(action)[0] for env in (ours, theirs))
            np.testing.assert_allclose(obs, other[:29], atol=1e-9)
            names = [ours.model.geom(g).name for g in ours.data.contact.geom.ravel()]
            touched += any(name.startswith("block") for name in names)
    assert touched > 20


def test_umaze_walls():
    env = d4rl.make_env("antmaze-umaze-v2").unwrapped
    cells = {
        tuple(np.int64(np.round(env.model.geom(g).pos[:2] / 4)))
        for g in range(env.model.ngeom)
        if env.model.geom(g).name.startswith("block")
    }
    free = {(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (0, 2)}  # x, y; the goal's is (0, 2)
    assert cells == {(x, y) for x in range(-1, 4) for y in range(-1, 4)} - free


@pytest.mark.parametrize(
    ("name", "centre"),
    [("antmaze-umaze-v2", (0, 8)), ("antmaze-medium-play-v2", (20, 20)),
     ("antmaze-large-diverse-v2", (32, 24))],
)  # fmt: skip
def test_antmaze_goals(name, centre):
    """A new goal in each episode: U(0, 1) + U(0, 0.5) beyond the cell's centre in x and in y."""
    env = d4rl.make_env(name)
    offsets = []
    for seed in range(150):
        obs, _ = env.reset(seed=seed)
        assert np.abs(obs[:2]).max() <= 0.1  # the start is the origin
        offsets.append(env.get_wrapper_attr("goal_xy") - centre)
    offsets = np.array(offsets)
    assert offsets.min() >= 0 and offsets.max() <= 1.5
    # mean 0.75 and variance (1 + 0.25) / 12, with 4 standard errors
    np.testing.assert_allclose(offsets.mean(0), 0.75, atol=4 * np.sqrt(1.25 / 12 / 150))
    assert offsets.max() > 1.2 and offsets.min() < 0.3
    env.reset(seed=3)
    np.testing.assert_array_equal(env.get_wrapper_attr("goal_xy") - centre, offsets[3])


def test_antmaze_success_radius():
    """Within 0.5 of the goal: success, reward 0, the end; outside: -1 and on."""
    env = d4rl.make_env("antmaze-large-play-v2")
    seen = []
    for distance in np.linspace(0.2, 0.8, 13):
        env.reset(seed=0)
        goal = env.get_wrapper_attr("goal_xy")
        env.unwrapped.set_xy(goal + [distance, 0])
        obs, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
        near = np.hypot(*(obs[:2] - goal)) <= 0.5
        assert (reward, terminated, truncated) == (
            (0.0, True, False) if near else (-1, False, False)
        )
        assert info["success"] == float(near)
        np.testing.assert_array_equal(
            obs, np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel])
        )
        seen.append(near)
    assert seen == sorted(seen, reverse=True) and seen[0] and not seen[-1]


# ---- scores and defaults ----


@pytest.mark.parametrize(
    ("name", "episode_return", "expected"),
    [
        ("halfcheetah-medium-v2", 12135.0, 100.0),
        ("halfcheetah-random-v2", -280.178953, 0.0),
        ("hopper-medium-v2", 1606.97, 50.0),  # half-way between -20.27 and 3234.3
        ("walker2d-expert-v2", 5510.99, 120.01),
        ("pen-human-v1", 3076.83, 100.0),
        ("hammer-cloned-v1", -274.86, 0.0),
        ("antmaze-umaze-v2", -700.0, 0.0),
        ("antmaze-umaze-v2", -699.0, 100.0),  # success in the last step
        ("antmaze-large-play-v2", -1000.0, 0.0),
        ("antmaze-large-play-v2", -312.0, 100.0),
    ],
)
def test_scores(name, episode_return, expected):
    task = d4rl.make_task(name, "nowhere")
    assert task["score"](episode_return) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("algo", ["gsflow", "flowq"])
def test_defaults_are_flags(algo):
    """Every key is a flag of the script, or one of the two alphas of its FQL setting."""
    script = load_script(ROOT / "algos" / f"{algo}.py")
    flags = {field.name for field in dataclasses.fields(script.Args)}
    for name in d4rl.all_names():
        assert set(d4rl.defaults(name)[algo]) <= flags | {"fql_alpha", "fql_online_alpha"}


def test_published_settings():
    """FQL's README."""
    found = {name: d4rl.defaults(name)["gsflow"] for name in d4rl.all_names()}
    alphas = {"antmaze-umaze-v2": 10, "antmaze-large-play-v2": 3, "pen-expert-v1": 3000}
    alphas |= {"door-human-v1": 30000, "hammer-cloned-v1": 10000, "relocate-human-v1": 10000}
    assert {name: found[name]["fql_alpha"] for name in alphas} == alphas
    assert found["relocate-cloned-v1"]["fql_online_alpha"] == 10000
    assert {found[name]["q_agg"] for name in alphas} == {"mean", "min"}
    assert found["antmaze-umaze-v2"]["q_agg"] == "mean"
    assert {found[name]["offline_steps"] for name in alphas} == {500_000}
    rates = {name: d4rl.defaults(name)["flowq"].get("actor_learning_rate") for name in found}
    assert {k: v for k, v in rates.items() if v} == {
        "antmaze-medium-play-v2": 1e-3, "pen-human-v1": 3e-5, "pen-cloned-v1": 3e-5
    }  # fmt: skip


# ---- data collected here ----


def collect(name, directory, workers=2, transitions=2000, seed=0, options=()):
    command = [sys.executable, str(ROOT / "benchmark" / "collect.py"), f"d4rl/{name}"]
    command += ["--num-transitions", str(transitions), "--workers", str(workers)]
    command += ["--dataset-dir", str(directory), "--seed", str(seed), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["antmaze-umaze-v2", "antmaze-medium-play-v2"])
def test_collected_files_are_d4rl_s(name, tmp_path):
    """Keys, episodes of 1000 transitions, rewards of the next row, both from D4RL's own relabelling
    rule; the same rows for one worker and two; a label that `load` passes on."""
    for folder, workers in (("one", 1), ("two", 2)):
        done = collect(name, tmp_path / folder, workers)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert os.listdir(tmp_path / folder / "d4rl") == [f"{name}.collected.hdf5"]
    file = d4rl.collected_path(name, tmp_path / "one")
    assert file.read_bytes() == d4rl.collected_path(name, tmp_path / "two").read_bytes()
    with h5py.File(file) as opened:
        rows = {key: opened[key][()] for key in (*KEYS, "infos/goal")}
        facts = json.loads(opened.attrs["metadata"])
    assert facts["source"] == "collected" and facts["dataset"] == name
    assert facts["transitions"] == 2000 and facts["goals_reached"] > 0
    assert list(np.flatnonzero(rows["timeouts"])) == [1000, 2001]
    xy = rows["observations"][:, :2]
    goal = {"umaze": (0.75, 8.75), "medium": (20.75, 20.75)}[name.split("-")[1]]
    near = np.append(np.hypot(*(xy[1:] - goal).T) <= 0.5, False)
    near[[1000, 2001]] = False  # what follows is another episode's
    np.testing.assert_array_equal(rows["rewards"], near)
    np.testing.assert_array_equal(rows["terminals"], near)
    assert np.abs(rows["actions"]).max() <= 1
    maze = d4rl.MAZES[name.split("-")[1]]
    for column, row in np.int64(np.floor(xy / 4 + 1.5)):  # the ant stays in the free cells
        assert maze.rows[row][column] != "#"
    data, source = d4rl.load(name, tmp_path / "one")
    assert source == f"collected ({name}.collected.hdf5)" and len(data["rewards"]) == 2000
    assert list(np.flatnonzero(data["terminals"])) == [999, 1999]
    again = collect(name, tmp_path / "one")
    assert again.returncode == 0 and "already there (2,000 transitions, seed 0)" in again.stdout


@pytest.mark.slow
def test_collected_files_hold_the_goal(tmp_path):
    """At least half of ten episodes reach the rewarded place."""
    name = "antmaze-umaze-diverse-v2"
    assert collect(name, tmp_path, transitions=10_000).returncode == 0
    data, _ = d4rl.load(name, tmp_path)
    reached = (data["masks"].reshape(10, 1000) == 0).any(1)
    assert reached.sum() >= 5 and (data["rewards"] == data["masks"] * -1).all()


def test_collected_random_locomotion(tmp_path):
    """A uniformly random policy scores about 0 by D4RL's reference; only falls are terminal, and
    where an episode goes on the hopper stands as Gymnasium's rule for it says."""
    name = "hopper-random-v2"
    done = collect(name, tmp_path, transitions=4000)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    with h5py.File(d4rl.collected_path(name, tmp_path)) as opened:
        rows = {key: opened[key][()] for key in KEYS}
        facts = json.loads(opened.attrs["metadata"])
    ends = rows["terminals"] | rows["timeouts"]
    assert not (rows["terminals"] & rows["timeouts"]).any() and rows["timeouts"].sum() == 8
    assert facts["mean_return"] == pytest.approx(rows["rewards"].sum() / ends.sum())
    assert abs(d4rl.score(name, facts["mean_return"])) < 3
    data, source = d4rl.load(name, tmp_path)
    assert source == f"collected ({name}.collected.hdf5)"
    assert (data["masks"] == 0).sum() == rows["terminals"].sum() > 50
    on = data["next_observations"][(data["masks"] == 1)]
    assert (on[:, 0] > 0.7).all() and (np.abs(on[:, 1]) < 0.2).all()
    assert np.abs(rows["actions"]).max() <= 1 and rows["actions"].std() == pytest.approx(
        1 / np.sqrt(3), abs=0.02
    )


@pytest.mark.slow
def test_collected_policy_and_replay(tmp_path):
    """Roll-outs of a run's policy, and the run's own replay in D4RL's layout."""
    run = [sys.executable, str(ROOT / "algos" / "sac_flow.py"), "--env-id", "Hopper-v4"]
    flags = dict(online_steps=300, learning_starts=100, hidden_dim=8, critic_hidden_dims=8)
    flags |= dict(batch_size=8, eval_interval=300, eval_episodes=1, out_dir=tmp_path / "runs")
    run += [x for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    options = ["--policy", str(run_dir)]
    files = {}
    for kind in ("medium", "medium-replay"):
        done = collect(f"hopper-{kind}-v2", tmp_path, transitions=800, options=options)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        with h5py.File(d4rl.collected_path(f"hopper-{kind}-v2", tmp_path)) as opened:
            files[kind] = {key: opened[key][()] for key in KEYS}
        data, _ = d4rl.load(f"hopper-{kind}-v2", tmp_path)
        on = data["next_observations"][(data["masks"] == 1)]
        assert (on[:, 0] > 0.7).all() and (np.abs(on[:, 1]) < 0.2).all()
    assert len(files["medium"]["rewards"]) == 800
    tree, _ = load_script(ROOT / "algos" / "sac_flow.py").load_checkpoint(run_dir)
    added = int(tree["replay"]["added"][0])
    ring = {k: v[0, :added] for k, v in tree["replay"]["rows"].items()}
    for key, ours in (("observations", "obs"), ("actions", "actions"), ("rewards", "rewards")):
        np.testing.assert_array_equal(files["medium-replay"][key], ring[ours])
    np.testing.assert_array_equal(files["medium-replay"]["terminals"], ring["masks"] == 0)
    assert files["medium-replay"]["timeouts"][-1] != files["medium-replay"]["terminals"][-1]


@pytest.mark.parametrize(
    ("name", "part"),
    [("hopper-medium-v2", "needs --policy RUN_DIR"), ("antmaze-huge-v2", "unknown D4RL task"),
     ("pen-human-v1", "needs demonstrations of a hand"), ("walker2d-best-v2", "unknown D4RL task")],
)  # fmt: skip
def test_what_is_not_collected(name, part, tmp_path):
    done = collect(name, tmp_path)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []
