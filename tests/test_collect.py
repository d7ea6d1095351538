"""Tests of benchmark/collect.py: the files, their reproducibility, and what goes wrong."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ogbench
import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.insert(0, str(BENCHMARK))
import collect

SHORT = ["--episode-length", "60", "--num-transitions", "600"]  # 10 + 1 episodes
POINT, CUBE = "pointmaze-medium-navigate-v0", "cube-single-play-v0"


def command(*arguments):
    return [sys.executable, str(BENCHMARK / "collect.py"), *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """One worker, and two: {dataset: (directory of the one, directory of the other)}."""
    found = {}
    for dataset in ("antmaze-large-navigate-v0", CUBE, "scene-noisy-v0"):
        found[dataset] = tuple(tmp_path_factory.mktemp(f"workers{n}") for n in (1, 2))
        for workers, directory in zip((1, 2), found[dataset], strict=True):
            done = run(dataset, *SHORT, "--workers", workers, "--dataset-dir", directory)
            assert done.returncode == 0, done.stderr
            assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    return found


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("antmaze-large", "antmaze-large-navigate-v0"),
        ("antmaze-large-stitch", "antmaze-large-stitch-v0"),
        ("antmaze-large-navigate-v0", "antmaze-large-navigate-v0"),
        ("antmaze-large-navigate-singletask-task1-v0", "antmaze-large-navigate-v0"),
        ("antmaze-medium-explore-singletask-v0", "antmaze-medium-explore-v0"),
        ("pointmaze-giant-task5", "pointmaze-giant-navigate-v0"),
        ("cube-single", CUBE),
        ("cube-double-noisy", "cube-double-noisy-v0"),
        ("cube-double-task3", "cube-double-play-v0"),
        ("scene", "scene-play-v0"),
        ("scene-play-singletask-task2-v0", "scene-play-v0"),
        ("puzzle-4x6-noisy-v0", "puzzle-4x6-noisy-v0"),
        ("puzzle-3x3-play-oraclerep-v0", "puzzle-3x3-play-v0"),
    ],
)
def test_names(name, dataset):
    assert collect.find_recipe(name).dataset == dataset


def test_official_sizes():
    """Rows of some official datasets: episodes x (transitions + 1)."""
    sizes = {name: (r.episodes, r.length + 1) for name, r in collect.all_recipes().items()}
    assert sizes["antmaze-large-navigate-v0"] == sizes[CUBE] == (1000, 1001)
    assert sizes["pointmaze-giant-navigate-v0"] == (500, 2001)
    assert sizes["antmaze-giant-stitch-v0"] == (5000, 201)
    assert sizes["antmaze-large-explore-v0"] == (10000, 501)
    assert sizes["cube-triple-noisy-v0"] == (3000, 1001)
    assert sizes["puzzle-4x6-play-v0"] == (5000, 1001)


def bad_inputs(directory: Path):
    """Yield (arguments, a part of the sentence)."""
    plain, text, other = directory / "plain", directory / "text.npz", directory / "other.npz"
    plain.write_text("a file")
    text.write_text("not a zip archive")
    np.savez(other, x=np.zeros(3))
    cut, unnamed = directory / "cut.npz", directory / "unnamed.npz"
    arrays = dict.fromkeys(("observations", "actions", "terminals", "qpos"), np.ones((500, 2)))
    np.savez(unnamed, **arrays)
    cut.write_bytes(unnamed.read_bytes()[:3000])
    blocked = directory / "blocked"
    (blocked / f"{POINT}.collected.npz.tmp").mkdir(parents=True)
    yield [], "which dataset"
    yield ["antmaze-lage"], "antmaze-large"
    yield ["cube-double-task9"], "cube-double"
    yield ["qqq"], "Unknown dataset 'qqq'"
    yield ["humanoidmaze-medium-navigate-v0"], "humanoid walking policy"
    yield ["antsoccer-arena"], "dribbling"
    yield ["visual-cube-single-play-v0"], "pixel"
    yield ["powderworld-easy"], "not a maze"
    yield ["pointmaze-medium", "--num-transitions", "0"], "--num-transitions must be at least 1"
    yield ["pointmaze-medium", "--episode-length", "-5"], "--episode-length"
    yield ["pointmaze-medium", "--workers", "0"], "--workers must"
    yield ["pointmaze-medium", "--seed", "-1"], "--seed must"
    yield ["pointmaze-medium", "--dataset-dir", str(plain)], "not a directory"
    yield ["pointmaze-medium", "--dataset-dir", str(plain / "below")], "not a directory"
    yield ["pointmaze-medium", "--dataset-dir", str(blocked)], "cannot write to --dataset-dir"
    yield ["--describe", str(directory / "absent.npz")], "No such file"
    yield ["--describe", str(directory)], "cannot read"
    yield ["--describe", str(text)], "not a complete .npz"
    yield ["--describe", str(cut)], "not a complete .npz"
    yield ["--describe", str(other)], "not an OGBench dataset"
    yield ["--describe", str(unnamed)], "which dataset"


def test_bad_inputs_get_one_sentence(tmp_path, capsys):
    for arguments, part in bad_inputs(tmp_path):
        with pytest.raises(SystemExit) as stopped:
            collect.main(arguments)
        out, err = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert part in err and err.count("\n") == 1 and not out, (arguments, out, err)
    done = run("antmaze-lage")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_unwritable_directory(tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(collect.os, "open", denied)
    with pytest.raises(SystemExit) as stopped:
        collect.main(["pointmaze-medium", "--dataset-dir", str(tmp_path)])
    assert stopped.value.code == 2 and "Permission denied" in capsys.readouterr().err


def test_import_is_light():
    code = "import sys, collect; print({'jax', 'mujoco', 'torch', 'ogbench'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK)}
    loaded = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert loaded.stdout.strip() == b"set()", loaded.stderr


@pytest.mark.slow
def test_worker_count_does_not_matter(collected):
    for dataset, (one, two) in collected.items():
        for suffix in ("", "-val"):
            name = f"{dataset}.collected{suffix}.npz"
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        assert sorted(os.listdir(one)) == [f"{dataset}.collected{s}.npz" for s in ("-val", "")]


@pytest.mark.slow
def test_format(collected):
    """The arrays of the files, and what OGBench's own loader makes of them."""
    dims = {"antmaze-large-navigate-v0": (29, 8, 15, 14), CUBE: (28, 5, 21, 20)}
    dims["scene-noisy-v0"] = (40, 5, 25, 24)
    for dataset, (directory, _) in collected.items():
        path = directory / f"{dataset}.collected.npz"
        for file_path, episodes in ((path, 10), (path.with_stem(path.stem + "-val"), 1)):
            with np.load(file_path) as file:
                arrays = {key: file[key] for key in file.files}
            facts = json.loads(arrays.pop("metadata").item())
            assert facts["dataset"] == dataset and facts["episodes"] == episodes
            assert facts["versions"]["ogbench"] and facts["seed"] == 0
            states = arrays.pop("button_states", None)
            if dataset.startswith("scene"):
                assert states.dtype == np.int64 and states.shape == (episodes * 61, 2)
            ends = arrays.pop("terminals")
            assert ends.dtype == bool and list(np.flatnonzero(ends)) == list(
                range(60, episodes * 61, 61)
            )
            for key, dim in zip(
                ("observations", "actions", "qpos", "qvel"), dims[dataset], strict=True
            ):
                array = arrays.pop(key)
                assert array.dtype == np.float32 and array.shape == (episodes * 61, dim), key
                assert np.isfinite(array).all()
                if key == "actions":
                    assert np.abs(array).max() <= 1
            assert not arrays
        loaded = ogbench.load_dataset(path)
        assert len(loaded["observations"]) == 600 and loaded["terminals"].sum() == 10
        task = f"{dataset.removesuffix('-v0')}-singletask-task2-v0"
        env, train, val = ogbench.make_env_and_datasets(task, dataset_path=str(path))
        assert train["observations"].shape == (600, *env.observation_space.shape)
        assert len(val["rewards"]) == 60 and set(np.unique(train["masks"])) <= {0.0, 1.0}
    ant = np.load(
        collected["antmaze-large-navigate-v0"][0] / "antmaze-large-navigate-v0.collected.npz"
    )
    np.testing.assert_array_equal(ant["observations"], np.hstack([ant["qpos"], ant["qvel"]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset", ["antmaze-medium-explore-v0", "cube-double-play-v0", "scene-noisy-v0"]
)
def test_no_episode_depends_on_the_one_before(dataset):
    """An environment in its fifth episode gives the same data as a new one."""
    recipe = collect.find_recipe(dataset)

    def new():
        collect.maze_tools.cache_clear()
        collect.manipulation_tools.cache_clear()

    def episode(index):
        return collect.run_episode(recipe, 0, 0, index, 120)[0]

    fresh = [(new(), episode(index))[1] for index in range(5)]
    new()
    for index in (4, 2, 0, 3, 1):
        for key, array in episode(index).items():
            np.testing.assert_array_equal(array, fresh[index][key], f"{key} of episode {index}")
    assert not np.array_equal(fresh[0]["actions"], fresh[1]["actions"])
    other_seed = collect.run_episode(recipe, 1, 0, 0, 120)[0]
    assert not np.array_equal(fresh[0]["actions"], other_seed["actions"])


def test_stitch_goals_are_four_cells_away():
    """Without noise, the point ends four steps from its start, or on it if nothing is so far."""
    recipe = dataclasses.replace(collect.find_recipe("pointmaze-large-stitch"), noise=0.0)
    env = collect.maze_tools(recipe.env)[0]
    for index in range(5):
        xy = collect.run_episode(recipe, 0, 0, index, 200)[0]["qpos"]
        distance = env.get_oracle_subgoal(xy[-1], xy[0])[1][env.xy_to_ij(xy[0])]
        reached = env.get_oracle_subgoal(xy[0], xy[0])[1][env.xy_to_ij(xy[-1])]
        assert distance == 0 and reached == 4


def test_unhealthy_scene_episodes_are_seen():
    good = np.array([[0.4, 0.1, 0.02], [0.33, -0.35, 0.07]])
    assert collect.cube_stays_visible(good)
    assert not collect.cube_stays_visible(np.vstack([good, [[0.4, 0.3, 0.02]]]))
    assert not collect.cube_stays_visible(np.vstack([good, [[0.4, -0.31, 0.02]]]))


def group_members(group: int) -> list[int]:
    """Return the live processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    "how", ["terminal", "terminate", pytest.param("kill", marks=pytest.mark.slow)]
)
def test_interrupted(how, tmp_path):
    """Ctrl-C (to the whole group), SIGTERM and SIGKILL leave no file and no process behind."""
    arguments = command(CUBE, "--dataset-dir", tmp_path, "--workers", 2)
    process = subprocess.Popen(arguments, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert "Collecting" in process.stdout.readline()
    deadline = time.time() + 30
    while len(group_members(process.pid)) < 3 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep({"terminal": 0.3, "terminate": 3, "kill": 3}[how])  # starting, or in full swing
    if how == "terminal":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM if how == "terminate" else signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    while group_members(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert group_members(process.pid) == []
    if how == "kill":
        left = set(os.listdir(tmp_path))
        assert left <= {f"{CUBE}.collected.npz.tmp"}
        assert run(CUBE, *SHORT, "--dataset-dir", tmp_path).returncode == 0  # it does not disturb
        assert sorted(os.listdir(tmp_path)) == [f"{CUBE}.collected{s}.npz" for s in ("-val", "")]
    else:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "collect.py: interrupted; no file was written."
        assert "Traceback" not in err
        assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path, monkeypatch, capsys):
    """ENOSPC in the middle of either file: one sentence, and the old pair (if any) is untouched."""
    part = {"terminals": np.zeros(3, bool)}
    monkeypatch.setattr(collect, "collect", lambda *_: ((dict(part), dict(part)), [0, 0]))
    arguments = ["pointmaze-medium", *SHORT, "--dataset-dir", str(tmp_path), "--overwrite"]

    def disk_for(files):
        """Return a writer whose disk is full after that many files and a bit."""
        left = iter(range(files))

        def write(file, **_):
            file.write(b"the beginning")
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        return write

    for old in ([], [f"{POINT}.collected{s}.npz" for s in ("-val", "")]):
        for name in old:
            (tmp_path / name).write_bytes(b"old")
        for files in (0, 1):
            monkeypatch.setattr(collect.np, "savez_compressed", disk_for(files))
            with pytest.raises(SystemExit) as stopped:
                collect.main(arguments)
            err = capsys.readouterr().err
            assert stopped.value.code == 1 and "No space left" in err and err.count("\n") == 1
            assert sorted(os.listdir(tmp_path)) == old
            assert all((tmp_path / name).read_bytes() == b"old" for name in old)


@pytest.mark.slow
def test_file_size_limit(tmp_path):
    """The same with a real refusal by the kernel."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run(CUBE, *SHORT, "--dataset-dir", tmp_path, preexec_fn=limit)
    assert done.returncode == 1 and os.listdir(tmp_path) == []
    last = "collect.py: cannot write the dataset (File too large); no file was kept."
    assert done.stderr.splitlines()[-1] == last and "Traceback" not in done.stderr


def test_too_small_disk_is_noticed_early(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # restored afterwards
    with pytest.raises(SystemExit) as stopped:
        collect.main(["pointmaze-medium", *SHORT, "--dataset-dir", str(tmp_path)])
    assert stopped.value.code == 1 and "will not fit" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_existing_files_and_two_runs_at_once(tmp_path):
    """Two runs of one dataset: one collects, the other waits and finds it; --overwrite replaces."""
    arguments = command("pointmaze-medium", *SHORT, "--dataset-dir", tmp_path)
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("already there (600 transitions, seed 0)" in out for out in outs) == [False, True]
    path = tmp_path / f"{POINT}.collected.npz"
    before = path.read_bytes()
    again = run("pointmaze-medium", *SHORT, "--seed", 1, "--dataset-dir", tmp_path)
    assert again.returncode == 0 and "already there" in again.stdout
    assert path.read_bytes() == before
    replaced = run(
        "pointmaze-medium", *SHORT, "--seed", 1, "--dataset-dir", tmp_path, "--overwrite"
    )
    assert replaced.returncode == 0 and path.read_bytes() != before
    assert len(os.listdir(tmp_path)) == 2


def test_describe_counts_by_hand(tmp_path, capsys):
    """Two ant episodes of four transitions; the first spends two of them at the goal of task 1."""
    qpos = np.zeros((10, 15), np.float32)
    qpos[2:4, :2] = [36.0, 24.3]  # the centre of cell (7, 10) is (36, 24), the tolerance 0.5
    qpos[9, :2] = [36.0, 24.0]  # the last row of an episode is no transition
    ends = np.arange(10) % 5 == 4
    path = tmp_path / "antmaze-large-navigate-v0.npz"  # as OGBench's own, without metadata
    np.savez(path, observations=np.zeros((10, 29)), actions=np.full((10, 8), 0.5), terminals=ends,
             qpos=qpos, qvel=np.zeros((10, 14)))  # fmt: skip
    report = collect.describe(path)
    assert (report["transitions"], report["episodes"], report["actions"]) == (8, 2, (0.5, 0.5))
    assert report["tasks"][1] == {"share": 0.25, "reached": 1, "best": -2.0, "mean": -3.0}
    assert report["tasks"][2] == {"share": 0.0, "reached": 0, "best": -4.0, "mean": -4.0}
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "25.000%" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.slow
def test_describe_agrees_with_ogbench(collected):
    for dataset in (CUBE, "scene-noisy-v0"):
        path = collected[dataset][0] / f"{dataset}.collected.npz"
        report = collect.describe(path)
        for task in (1, 4):
            name = f"{dataset.removesuffix('-v0')}-singletask-task{task}-v0"
            _, data, _ = ogbench.make_env_and_datasets(name, dataset_path=str(path))
            returns = data["rewards"].reshape(10, 60).sum(1)
            expected = {
                "share": (data["masks"] == 0).mean(),
                "reached": (data["masks"] == 0).reshape(10, 60).any(1).sum(),
                "best": returns.max(),
                "mean": returns.mean(),
            }
            assert report["tasks"][task] == pytest.approx(expected, rel=1e-5)
