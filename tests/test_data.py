"""Where data comes from: official file, collected file, download, collection; what it teaches."""

import concurrent.futures
import fcntl
import io
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
from conftest import ROOT

NUM_TRANSITIONS = 2_000


def flags(gsflow, directory, **others):
    """Arguments that say where datasets lie."""
    return gsflow.Args(dataset_dir=str(directory), **others)


@pytest.fixture(scope="module")
def collected(gsflow, tmp_path_factory):
    """cube-single through the fallback: no file, no network, so the collector is called."""
    directory = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    patch.setattr(gsflow.urllib.request, "urlopen", no_network)
    patch.setattr(gsflow, "AUTO_COLLECT", NUM_TRANSITIONS)
    task = gsflow.parse_task("cube-single")
    data, source = gsflow.load_dataset(task, flags(gsflow, directory))
    patch.undo()
    return task, directory, data, source


def test_fallback_collects_and_labels(gsflow, collected, capsys):
    task, directory, data, source = collected
    assert source == "collected (cube-single-play-v0.collected.npz)"
    assert len(data["rewards"]) == NUM_TRANSITIONS
    names = sorted(path.name for path in directory.iterdir())
    assert names == [f"{task.dataset}.collected{part}.npz" for part in ("-val", "")]
    again, source_again = gsflow.load_dataset(
        task, flags(gsflow, directory)
    )  # found, not made anew
    assert source_again == source
    np.testing.assert_array_equal(again["observations"], data["observations"])


def test_transitions_equal_ogbench_own_loader(gsflow, collected):
    task, directory, data, _ = collected
    path = str(directory / f"{task.dataset}.collected.npz")
    env, official, _ = ogbench.make_env_and_datasets(task.name, dataset_path=path)
    env.close()
    for key in ("observations", "next_observations", "actions", "terminals", "rewards", "masks"):
        np.testing.assert_array_equal(data[key], official[key], err_msg=key)


def test_point_maze_relabelling_equals_ogbench(gsflow, tmp_path):
    task = gsflow.parse_task("pointmaze-medium-task3")
    raw = gsflow.collect_pointmaze("medium", 20_000)
    for part in ("", "-val"):
        np.savez(tmp_path / f"{task.dataset}{part}.npz", **raw)
    data, source = gsflow.load_dataset(task, flags(gsflow, tmp_path))
    assert source == "official"
    path = str(tmp_path / f"{task.dataset}.npz")
    env, official, _ = ogbench.make_env_and_datasets(task.name, dataset_path=path)
    env.close()
    assert 0 < (official["masks"] == 0).sum() < 20_000
    for key in ("observations", "next_observations", "actions", "terminals", "rewards", "masks"):
        np.testing.assert_array_equal(data[key], official[key], err_msg=key)


def test_copied_script_without_the_repository(gsflow, tmp_path, monkeypatch):
    monkeypatch.setattr(gsflow, "download", lambda *args: False)
    monkeypatch.setattr(gsflow, "__file__", str(tmp_path / "copies" / "gsflow.py"))
    with pytest.raises(gsflow.UserError, match=r"put cube-single-play-v0\.npz there, or make one"):
        gsflow.load_dataset(gsflow.parse_task("cube-single"), flags(gsflow, tmp_path))


class Answer(io.BytesIO):
    """What a server sends, and how much of what it promised is missing."""

    length = 0


@pytest.mark.parametrize("missing", [0, 5, None])
def test_a_download_is_whole_or_not_there(gsflow, tmp_path, monkeypatch, missing):
    """A connection that is cut leaves nothing behind; a server need not state the length."""
    answer, file = Answer(b"content"), tmp_path / "sets" / "cube-single-play-v0.npz"
    answer.length = missing
    monkeypatch.setattr(gsflow.urllib.request, "urlopen", lambda *args, **options: answer)
    assert gsflow.download(file) == (not missing)
    assert [path.name for path in file.parent.iterdir()] == ([] if missing else [file.name])
    assert missing or file.read_bytes() == b"content"


def test_a_download_waits_for_that_of_another_process(gsflow, tmp_path, monkeypatch):
    """It finds the lock taken, then the file in place, and asks no server."""
    file, asked = tmp_path / "cube-single-play-v0.npz", []
    monkeypatch.setattr(gsflow.urllib.request, "urlopen", lambda *args, **_: asked.append(args))
    with open(file.with_suffix(".part"), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            second = pool.submit(gsflow.download, file)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            file.with_suffix(".part").replace(file)
            fcntl.flock(other, fcntl.LOCK_UN)
            assert second.result() and not asked
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_names_resolve_to_official_environments(gsflow):
    import gymnasium

    for name, gym_id, dataset in (
        ("antmaze-large", "antmaze-large-singletask-task1-v0", "antmaze-large-navigate-v0"),
        ("cube-double-task3", "cube-double-singletask-task3-v0", "cube-double-play-v0"),
        ("scene-noisy", "scene-singletask-task2-v0", "scene-noisy-v0"),
        ("puzzle-4x6", "puzzle-4x6-singletask-task2-v0", "puzzle-4x6-play-v0"),
        ("antsoccer-arena", "antsoccer-arena-singletask-task4-v0", "antsoccer-arena-navigate-v0"),
        ("antmaze-giant-stitch-singletask-task2-v0",) * 1
        + ("antmaze-giant-singletask-task2-v0", "antmaze-giant-stitch-v0"),
    ):
        task = gsflow.parse_task(name)
        assert (task.gym_id, task.dataset) == (gym_id, dataset)
        assert gym_id in gymnasium.registry
    # a name without a task number means OGBench's own default task
    for name in ("antmaze-large", "cube-double", "scene", "puzzle-3x3", "antsoccer-medium"):
        task = gsflow.parse_task(name)
        default = gymnasium.make(task.gym_id.replace(f"-task{task.index}", ""))
        default.reset()
        assert default.unwrapped.cur_task_id == task.index
        default.close()


@pytest.mark.slow
def test_training_on_collected_data_learns(gsflow, collected):
    """After 400 small updates the teacher's action fits the held-out state it is given better than
    that of another state; an untrained one cannot tell states apart."""
    task, directory, data, _ = collected
    argv = ["--offline-steps", "400", "--hidden-dims", "128", "128", "--learning-rate", "1e-3"]
    argv += ["--prior", "gaussian", "--student", "deterministic", "--normalize-obs", "True"]
    args = gsflow.tyro.cli(gsflow.Args, args=["--env-id", "cube-single", *argv])
    args = gsflow.resolve(args, task)
    rows = gsflow.device_data(data, args.n_step, args.gamma)
    mean, std = rows["obs"].mean(axis=0), rows["obs"].std(axis=0) + 1e-6
    act_dim = rows["actions"].shape[1]
    nets = gsflow.make_networks(args, act_dim)
    before = gsflow.start_states(args, len(mean), act_dim, mean, std)
    settings = gsflow.PhaseSettings(jnp.float32(args.alpha), jnp.float32(0))
    learn, carry = gsflow.make_learn(nets, args), {"state": jax.tree.map(jnp.copy, before)}
    carry["sums"] = gsflow.zero_sums(learn, carry, rows, settings)
    after = gsflow.Program(learn, rows, settings)(carry, 400)["state"]
    with np.load(directory / f"{task.dataset}.collected-val.npz") as file:
        obs, actions = file["observations"][:-1], file["actions"][:-1]
    obs = (jnp.asarray(obs) - mean) / std

    def errors(state):
        params = jax.tree.map(lambda x: x[0], state.params)
        noise = jax.random.normal(jax.random.key(0), actions.shape)
        fit = gsflow.flow_endpoint(params, nets, obs, noise, args.flow_steps)
        other = gsflow.flow_endpoint(params, nets, obs[::-1], noise, args.flow_steps)
        return [float(jnp.mean((a - actions) ** 2)) for a in (fit, other)]

    untrained, trained = errors(before), errors(after)
    assert 0.9 < untrained[0] / untrained[1] < 1.1
    assert trained[0] < 0.75 * trained[1] and trained[0] < 0.6 * untrained[0]


def test_ant_policy_is_documented():
    assert (ROOT / "benchmark" / "ant_expert.npz").stat().st_size < 1_000_000
    assert "ant_expert.npz" in (ROOT / "README.md").read_text()
