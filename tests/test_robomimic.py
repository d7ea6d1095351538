"""Tests of benchmark/tasks/robomimic.py: names, files, transitions, the simulator, demonstrations.

No download: files are written here, or collected with the task file's own controller. Observations,
mass matrices and successes are compared with MuJoCo's own state.
"""

import importlib.metadata
import json
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

h5py = pytest.importorskip("h5py")
pytest.importorskip("robosuite")
import mujoco
from conftest import ROOT, load_script

robomimic = load_script(ROOT / "benchmark" / "tasks" / "robomimic.py")
TASKS = ("lift", "can", "square", "transport")
OBS_DIMS = dict(zip(TASKS, (19, 23, 23, 50), strict=True))
ACT_DIMS = dict(zip(TASKS, (7, 7, 7, 14), strict=True))
LIMITS = dict(zip(TASKS, (300, 300, 400, 800), strict=True))
ENV_NAMES = dict(
    lift="Lift", can="PickPlaceCan", square="NutAssemblySquare", transport="TwoArmTransport"
)


def env_args(task, version="1.5.1"):
    robots = ["Panda"] * (2 if task == "transport" else 1)
    kwargs = robomimic.ENV_KWARGS | dict(robots=robots)
    return json.dumps(dict(env_name=ENV_NAMES[task], env_version=version, env_kwargs=kwargs))


def write_file(directory, name="can-mh", dones=((0, 0, 1, 1), (0, 0, 0)), **changes):
    """A small file in RoboMimic's layout at its official place, with random numbers.

    `changes`: env_args, or a data set of demo_1 ("actions", "obs/object", ...) with its new value,
    None to leave it out.
    """
    rng, task = np.random.default_rng(0), name.split("-")[0]
    target = directory / "robomimic" / task / name.split("-")[1] / "low_dim_v15.hdf5"
    target.parent.mkdir(parents=True, exist_ok=True)
    sizes = dict(robot0_eef_pos=3, robot0_eef_quat=4, robot0_gripper_qpos=2)
    sizes["object"] = OBS_DIMS[task] - 9
    with h5py.File(target, "w") as file:
        data = file.create_group("data")
        args = changes.pop("env_args", env_args(task))
        if args is not None:
            data.attrs["env_args"] = args
        for i, done in enumerate(dones):
            n = len(done)
            demo = dict(dones=np.array(done), rewards=np.array(done, np.float64))
            demo["actions"] = rng.uniform(-1, 1, (n, ACT_DIMS[task]))
            for key, size in sizes.items():
                demo[f"obs/{key}"] = rng.normal(size=(n, size))
                demo[f"next_obs/{key}"] = rng.normal(size=(n, size))
            demo |= changes if i == 1 else {}
            group = data.create_group(f"demo_{i}")
            for key, value in demo.items():
                if value is not None:
                    group[key] = value
    return target


# ---- names and files ----


def test_names_and_addresses():
    assert robomimic.all_names() == [f"{task}-{kind}" for task in TASKS for kind in ("ph", "mh")]
    for name in ("can-mh", "can-mh-low_dim"):
        assert robomimic.url(name) == [
            "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/can/mh/"
            "low_dim_v15.hdf5"
        ]
    for wrong in ("can", "can-mg", "tool_hang-ph", "", "can-mh-image"):
        with pytest.raises(ValueError, match=f"unknown RoboMimic task '{wrong}'; close matches: "):
            robomimic.make_task(wrong, "nowhere")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tail = ("can", "mh", "low_dim_v15.hdf5")
    assert robomimic.path("can-mh", "~/.ogbench/data") == tmp_path.joinpath(".robomimic", *tail)
    assert robomimic.path("can-mh", "~/data") == tmp_path.joinpath("data", "robomimic", *tail)
    (tmp_path / ".ogbench" / "data" / "robomimic").mkdir(parents=True)
    own = tmp_path.joinpath(".ogbench", "data", "robomimic", *tail)
    assert robomimic.path("can-mh", "~/.ogbench/data") == own
    stand_in = robomimic.collected_path("can-mh", "~/.ogbench/data")
    assert stand_in == own.with_name("low_dim_v15.collected.hdf5")


def test_task(tmp_path):
    """Nothing is opened before it is asked for; SAC Flow's weights are the reported ones."""
    task = robomimic.make_task("square-ph", str(tmp_path))
    assert set(task) == {"make_env", "data", "defaults"}
    assert task["defaults"] == {"sac_flow": {"beta": 10_000, "beta_online": 1_000}}
    for function in (task["data"], task["make_env"]):
        with pytest.raises(OSError, match=r"download.py robomimic/square-ph or from https://"):
            function()
    with pytest.raises(OSError, match=f"robomimic.py collect lift-mh --out {tmp_path}"):
        robomimic.load("lift-mh", tmp_path)


# ---- transitions ----


@pytest.mark.parametrize("task", TASKS)
def test_transitions(tmp_path, task):
    """Order of demonstrations and keys, rewards, masks and terminals as in Q-chunking's reading."""
    name = f"{task}-ph"
    dones = [(0, 0, 1, 1), (0, 0, 0)] + [(0, 1)] * 9  # demo_10 comes last, not second
    target = write_file(tmp_path, name, dones)
    data, source = robomimic.load(name, tmp_path)
    assert source == "official"
    keys = {"observations", "next_observations", "actions", "rewards", "masks", "terminals"}
    assert set(data) == keys and all(array.dtype == np.float32 for array in data.values())
    assert data["observations"].shape == data["next_observations"].shape == (25, OBS_DIMS[task])
    assert data["actions"].shape == (25, ACT_DIMS[task])
    np.testing.assert_array_equal(data["rewards"][:7], [-1, -1, 0, 0, -1, -1, -1])
    np.testing.assert_array_equal(data["masks"][:7], [1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data["terminals"][:7], [0, 0, 1, 1, 0, 0, 1])
    with h5py.File(target) as file:
        for demo, rows in (("demo_0", slice(0, 4)), ("demo_10", slice(-2, None))):
            group = file["data"][demo]
            for ours, theirs in (("observations", "obs"), ("next_observations", "next_obs")):
                parts = [
                    group[theirs][key][()]
                    for key in (
                        "robot0_eef_pos",
                        "robot0_eef_quat",
                        "robot0_gripper_qpos",
                        "object",
                    )
                ]
                np.testing.assert_array_equal(
                    data[ours][rows], np.concatenate(parts, 1).astype(np.float32)
                )
            np.testing.assert_array_equal(
                data["actions"][rows], group["actions"][()].astype(np.float32)
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "actions"),
        ({"next_obs/object": None}, "object"),
        (
            {"actions": np.zeros((3, 14))},
            r"demo_1/actions' has shape \(3, 14\) instead of \(3, 7\)",
        ),
        ({"rewards": np.zeros(2)}, r"demo_1/rewards' has shape \(2,\) instead of \(3,\)"),
        ({"obs/object": np.full((3, 14), np.nan)}, "demo_1/obs/object' holds NaN or infinity"),
        ({"rewards": np.array([b"a", b"b", b"c"])}, "delete it and get it again"),
        ({"env_args": None}, "env_args"),
        ({"env_args": "{"}, "delete it and get it again"),
        ({"env_args": env_args("can", "1.4.1")}, "PickPlaceCan of robosuite 1.4.1, not can-mh"),
        ({"env_args": env_args("square")}, "NutAssemblySquare of robosuite 1.5.1, not can-mh"),
    ],
)
def test_wrong_files(tmp_path, changes, message):
    """One sentence each, with the file's name and the remedy."""
    target = write_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        robomimic.load("can-mh", tmp_path)
    text = str(error.value)
    assert text.startswith(f"{target}: ") and text.endswith("; delete it and get it again")
    assert "\n" not in text


def test_damaged_files(tmp_path):
    write_file(tmp_path, dones=())
    with pytest.raises(ValueError, match="no demonstrations; delete it and get it again"):
        robomimic.load("can-mh", tmp_path)
    target = write_file(tmp_path)
    whole = target.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        target.write_bytes(content)
        for function in (robomimic.load, robomimic.make_env):
            with pytest.raises(OSError, match="no complete HDF5 file; delete it and get it again"):
                function("can-mh", tmp_path)


def test_packages(tmp_path, monkeypatch):
    """A missing package and another robosuite are refused with the pip command."""
    write_file(tmp_path)
    versions = {"h5py": "3.16.0", "robosuite": "1.5.2"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    robomimic.import_robosuite.cache_clear()
    install = "pip install -r benchmark/tasks/requirements.txt"
    with pytest.raises(ImportError, match=f"made with robosuite 1.5.1, and 1.5.2 .*: {install}"):
        robomimic.make_env("can-mh", tmp_path)

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=f"need the package 'h5py': {install}"):
        robomimic.load("can-mh", tmp_path)
    with pytest.raises(ImportError, match=f"need the package 'robosuite': {install}"):
        robomimic.import_robosuite()


# ---- the simulator ----


@pytest.fixture(scope="module")
def lift():
    """The environment that demonstrations are collected in."""
    return robomimic.lift_env()


def physics(env):
    """MuJoCo's own model and data."""
    return env.sim.sim.model._model, env.sim.sim.data._data


def xyzw(quat):
    return np.roll(quat, -1)


def check_layout(env, obs):
    """Robot 0's part of an observation is MuJoCo's state at the end of the step."""
    data = physics(env)[1]
    np.testing.assert_allclose(obs[:3], data.site("gripper0_right_grip_site").xpos, atol=1e-6)
    np.testing.assert_allclose(obs[3:7], xyzw(data.body("robot0_right_hand").xquat), atol=1e-6)
    fingers = [data.joint(f"gripper0_right_finger_joint{i}").qpos[0] for i in (1, 2)]
    np.testing.assert_allclose(obs[7:9], fingers, atol=1e-6)


def check_object(env, obs, before):
    """Of can and square: position and quaternion in the hand's frame, then in the world's.

    robosuite computes the first two from the object's pose in the observation before.
    """
    data = physics(env)[1]
    body = data.body(
        "Can_main" if env.sim.__class__.__name__ == "PickPlaceCan" else "SquareNut_main"
    )
    np.testing.assert_allclose(obs[16:19], body.xpos, atol=1e-6)
    np.testing.assert_allclose(obs[19:23], xyzw(body.xquat), atol=1e-6)
    hand = matrix(obs[3:7])
    np.testing.assert_allclose(obs[9:12], hand.T @ (before[16:19] - obs[:3]), atol=1e-6)
    np.testing.assert_allclose(matrix(obs[12:16]), hand.T @ matrix(before[19:23]), atol=1e-5)


def matrix(quat):
    """Rotation matrix of a quaternion (x, y, z, w)."""
    flat = np.zeros(9)
    mujoco.mju_quat2Mat(flat, np.roll(quat, 1).astype(np.float64))
    return flat.reshape(3, 3)


def test_lift_layout(lift):
    obs, info = lift.reset(seed=1)
    assert info == {"success": 0.0} and obs.dtype == np.float32
    for action in np.random.default_rng(0).uniform(-1, 1, (3, 7)):
        obs = lift.step(action)[0]
    check_layout(lift, obs)
    cube = physics(lift)[1].body("cube_main")
    np.testing.assert_allclose(obs[9:12], cube.xpos, atol=1e-6)
    np.testing.assert_allclose(obs[12:16], xyzw(cube.xquat), atol=1e-6)
    np.testing.assert_allclose(obs[16:19], cube.xpos - obs[:3], atol=1e-6)


def test_seeds(lift):
    """A seed decides an episode, whatever was drawn before, and NumPy's generator is left alone."""
    first = lift.reset(seed=5)[0]
    second, third = lift.reset()[0], lift.reset()[0]
    before = np.random.get_state()
    np.testing.assert_array_equal(lift.reset(seed=5)[0], first)
    after = np.random.get_state()
    assert before[2] == after[2] and np.array_equal(before[1], after[1])
    np.random.random(7)
    np.testing.assert_array_equal(lift.reset()[0], second)
    assert not np.array_equal(second, third) and not np.array_equal(first, second)
    assert not np.array_equal(lift.reset(seed=6)[0], first)


def test_success_ends_an_episode(lift):
    """The cube above 0.84 m (0.04 over the table): reward 0, the end, no time-out."""
    lift.reset(seed=0)
    data = physics(lift)[1]
    obs, reward, terminated, truncated, info = lift.step(np.zeros(7))
    assert (reward, terminated, truncated, info) == (-1, False, False, {"success": 0.0})
    data.joint("cube_joint0").qpos[:3] = 0.3, 0.3, 1.0
    lift.steps = 299  # the last step, too
    obs, reward, terminated, truncated, info = lift.step(np.zeros(7))
    assert obs[11] > 0.84
    assert (reward, terminated, truncated, info) == (0, True, False, {"success": 1.0})


def test_time_limit(lift):
    lift.reset(seed=0)
    lift.steps = 298
    ends = [lift.step(np.zeros(7))[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]
    lift.reset()
    assert lift.step(np.zeros(7))[2:4] == (False, False)


def test_mended_calls(lift):
    """Both mends against MuJoCo: addresses of joints, and the arm's part of the mass matrix."""
    lift.reset(seed=0)
    lift.step(np.full(7, 0.5))
    model, data = physics(lift)
    wrapped = lift.sim.sim.model
    cube, arm = model.joint("cube_joint0"), model.joint("robot0_joint3")
    qpos, qvel = cube.qposadr[0], cube.dofadr[0]
    assert wrapped.get_joint_qpos_addr("cube_joint0") == (qpos, qpos + 7)
    assert wrapped.get_joint_qvel_addr("cube_joint0") == (qvel, qvel + 6)
    assert wrapped.get_joint_qpos_addr("robot0_joint3") == arm.qposadr[0]
    assert wrapped.get_joint_qvel_addr("robot0_joint3") == arm.dofadr[0]
    controller = lift.sim.robots[0].composite_controller.part_controllers["right"]
    controller.update(force=True)
    columns = [model.joint(f"robot0_joint{i}").dofadr[0] for i in range(1, 8)]
    matrix, column = np.zeros((7, 7)), np.zeros(model.nv)
    for i, dof in enumerate(columns):
        unit = np.zeros(model.nv)
        unit[dof] = 1
        mujoco.mj_mulM(model, data, column, unit)
        matrix[:, i] = column[columns]
    np.testing.assert_allclose(controller.mass_matrix, matrix, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_environments(tmp_path, task):
    """Sizes, layout, limits and -1 per step, built from the env_args of a file."""
    write_file(tmp_path, f"{task}-mh")
    env = robomimic.make_task(f"{task}-mh", str(tmp_path))["make_env"]()
    assert env.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIMS[task],))
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (ACT_DIMS[task],))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (OBS_DIMS[task],)
    if task in ("can", "square"):
        check_object(env, obs, obs)
    env.action_space.seed(0)
    for _ in range(3):
        before = obs
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert (reward, terminated, truncated, info) == (-1, False, False, {"success": 0.0})
        check_layout(env, obs)
        if task in ("can", "square"):
            check_object(env, obs, before)
    env.steps = LIMITS[task] - 2
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(2)]
    assert ends == [(False, False), (False, True)]
    env.close()


@pytest.mark.slow
def test_can_success(tmp_path):
    """The can at rest in its bin, the hand away from it."""
    write_file(tmp_path, "can-mh")
    env = robomimic.make_env("can-mh", tmp_path)
    env.reset(seed=0)
    data = physics(env)[1]
    target = env.sim.target_bin_placements[env.sim.object_to_id["can"]]
    data.joint("Can_joint0").qpos[:3] = *target[:2], target[2] + 0.1
    _, reward, terminated, _, info = env.step(np.zeros(7))
    assert (reward, terminated, info) == (0, True, {"success": 1.0})


# ---- demonstrations of our own ----


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A data directory with two demonstrations of lift."""
    directory = tmp_path_factory.mktemp("collected")
    robomimic.collect("ph", 2, 3, directory, workers=1)
    return directory


def test_collected_file(collected):
    """Read like an official one, labelled, and every demonstration ends with its only success."""
    file = collected / "robomimic" / "lift" / "ph" / "low_dim_v15.collected.hdf5"
    assert list(file.parent.iterdir()) == [file]
    data, source = robomimic.load("lift-ph", collected)
    assert source == "collected (low_dim_v15.collected.hdf5)"
    ends = np.flatnonzero(data["terminals"])
    assert len(ends) == 2 and ends[-1] == len(data["rewards"]) - 1
    np.testing.assert_array_equal(data["rewards"], data["terminals"] - 1)
    np.testing.assert_array_equal(data["masks"], 1 - data["terminals"])
    inside = np.flatnonzero(data["terminals"][:-1] == 0)
    np.testing.assert_array_equal(
        data["next_observations"][inside], data["observations"][inside + 1]
    )
    assert (data["next_observations"][ends, 11] > 0.84).all()
    assert (data["observations"][:, 11] < 0.84).all()


def test_replay_reaches_success(collected, lift):
    """The recorded actions from the recorded start give the recorded episode, bit for bit."""
    data, _ = robomimic.load("lift-ph", collected)
    file = robomimic.collected_path("lift-ph", collected)
    with h5py.File(file) as file:
        demo = file["data/demo_1"]
        actions, states, start = demo["actions"][()], demo["states"][()], demo.attrs["seed"]
        assert file["data"].attrs["total"] == len(data["rewards"])
    rows = slice(len(data["rewards"]) - len(actions), None)
    obs, _ = lift.reset(seed=int(start))
    for i, action in enumerate(actions):
        np.testing.assert_array_equal(obs, data["observations"][rows][i])
        np.testing.assert_array_equal(lift.sim.sim.get_state().flatten(), states[i])
        obs, reward, terminated, _, info = lift.step(action)
        assert reward == data["rewards"][rows][i]
    np.testing.assert_array_equal(obs, data["next_observations"][-1])
    assert terminated and info["success"] == 1


@pytest.mark.slow
def test_controller(lift):
    """Without noise it lifts the cube from every start within 60 steps; doing nothing does not."""
    for seed in range(5):
        obs, done, steps = lift.reset(seed=seed)[0], False, 0
        while not done and steps < 60:
            obs, _, done, _, _ = lift.step(robomimic.lift_action(obs))
            steps += 1
        assert done
    lift.reset(seed=0)
    assert not any(lift.step(np.zeros(7))[2] for _ in range(60))


@pytest.mark.slow
def test_same_data_with_workers(tmp_path, collected):
    """The command, in two processes, writes what one process wrote."""
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "tasks" / "robomimic.py"),
        "collect",
        "lift",
    ]
    command += ["--episodes", "2", "--seed", "3", "--workers", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 attempts succeeded (100%)" in done.stdout
    ours, theirs = (robomimic.load("lift-ph", d)[0] for d in (tmp_path, collected))
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_command_errors(tmp_path, capsys):
    """Exit code 2, one sentence, nothing written."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    for argv, message in (
        (["can"], "lift, lift-ph, lift-mh can be collected, not 'can'"),
        (["lift", "--episodes", "0"], "--episodes and --workers must be 1 or more"),
        (["lift", "--out", str(blocked)], "; give --out"),
    ):
        assert robomimic.main(["collect", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [blocked]


def test_failed_attempts_are_counted(tmp_path, monkeypatch, capsys):
    """Every second attempt fails: four demonstrations take eight attempts, in their order."""
    n = 2
    arrays = dict(states=np.zeros((n, 3)), actions=np.zeros((n, 7)), rewards=np.array([0.0, 1]))
    arrays |= dict(dones=np.array([0, 1]), obs=np.zeros((n, 19)), next_obs=np.zeros((n, 19)))
    attempt = lambda job: arrays | {"seed": job[2]} if job[2] % 2 else None
    monkeypatch.setattr(robomimic, "attempt", attempt)
    target = robomimic.collect("mh", 4, 0, tmp_path, workers=1)
    assert "4 of 8 attempts succeeded (50%)" in capsys.readouterr().out
    with h5py.File(target) as file:
        assert [file[f"data/demo_{i}"].attrs["seed"] for i in range(4)] == [1, 3, 5, 7]
    target.unlink()
    monkeypatch.setattr(robomimic, "attempt", lambda job: None)
    with pytest.raises(ValueError, match="none of 4 attempts lifted the cube"):
        robomimic.collect("mh", 4, 0, tmp_path, workers=1)
    assert list(target.parent.iterdir()) == []
