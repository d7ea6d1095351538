"""RoboMimic's lift, can, square and transport: low_dim demonstrations on robosuite, no robomimic.

    pip install -r requirements.txt -r benchmark/tasks/requirements.txt
    python benchmark/download.py robomimic/can-mh
    python algos/fmq.py --env-id robomimic/can-mh
    python benchmark/tasks/robomimic.py collect lift --episodes 50    demonstrations of our own

Names are TASK-KIND with the kinds ph (200 demonstrations of one proficient operator) and mh (300 of
six operators); `can-mh-low_dim`, as Q-chunking calls it, is the same task. Files (Mandlekar et al.,
arXiv 2108.03298; version 1.5) are TASK/KIND/low_dim_v15.hdf5 in `DATASET_DIR/robomimic` where that
folder exists or where --dataset-dir was changed, else in `~/.robomimic`, Q-chunking's place. Where
the file is missing, low_dim_v15.collected.hdf5 beside it, made by `collect`, takes its place.

Data and environment as in Q-chunking (arXiv 2507.07969), whose code FMQ's and SAC Flow's RoboMimic
runs follow. Known differences: the version of MuJoCo; and their observations are read one step of
the physics (2 ms) before the end of an environment step, ours at its end.
  observation  end effector's position (3) and quaternion (4), finger positions (2) of robot 0, then
               the task's objects. For transport this leaves robot 1 unseen, as theirs does. For
               can and square the object's pose relative to the hand comes from its pose one step
               earlier: so robosuite computes it.
  reward       the sparse reward, 1 at success, minus 1: -1 per step, 0 at success
  end          success ends an episode (no bootstrap); else 300, 300, 400, 800 steps. The rows of a
               demonstration after its first success are episodes of one step each.
The simulator is built from the file's own `env_args`, which name robosuite 1.5.1. On MuJoCo 3.17
two calls of it are mended (`import_robosuite`). It runs at 10 to 70 steps per second.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

URL = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5"
INSTALL = "pip install -r benchmark/tasks/requirements.txt"
ROBOSUITE = "1.5.1"
KINDS = ("ph", "mh")
OBS_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
SIZES = (3, 4, 2)  # of all keys but the last


class Spec(NamedTuple):
    """What is fixed for a task."""

    env_name: str  # robosuite's
    limit: int  # steps of an episode
    object_dim: int
    act_dim: int


SPECS = {
    "lift": Spec("Lift", 300, 10, 7),
    "can": Spec("PickPlaceCan", 300, 14, 7),
    "square": Spec("NutAssemblySquare", 400, 14, 7),
    "transport": Spec("TwoArmTransport", 800, 41, 14),
}


# ---- names and files ----


def all_names() -> list[str]:
    """Every task of this file: lift-ph, lift-mh, ..., transport-mh."""
    return [f"{task}-{kind}" for task in SPECS for kind in KINDS]


def parse(name: str) -> tuple[str, str]:
    """can-mh or can-mh-low_dim -> ("can", "mh"); ValueError for an unknown name."""
    short = name.removesuffix("-low_dim")
    if short not in all_names():
        close = difflib.get_close_matches(short, all_names(), n=3, cutoff=0.3) or all_names()
        raise ValueError(f"unknown RoboMimic task '{name}'; close matches: {', '.join(close)}")
    task, _, kind = short.partition("-")
    return task, kind


def url(name: str) -> list[str]:
    """Addresses of a task's file."""
    return ["/".join([URL, *parse(name), "low_dim_v15.hdf5"])]


def path(name: str, dataset_dir: str | Path) -> Path:
    """Where a task's official file is looked for and downloaded to; see the top for the rule."""
    directory = Path(dataset_dir).expanduser()
    own = directory / "robomimic"
    if not own.is_dir() and directory.parts[-2:] == (".ogbench", "data"):
        own = directory.parent.parent / ".robomimic"
    return own.joinpath(*parse(name), "low_dim_v15.hdf5")


def collected_path(name: str, dataset_dir: str | Path) -> Path:
    """Where `collect` puts its stand-in for a task's file."""
    return path(name, dataset_dir).with_name("low_dim_v15.collected.hdf5")


def needed(module: str, version: str | None = None):
    """Import a package of benchmark/tasks/requirements.txt; ImportError names the pip command."""
    try:
        found = importlib.metadata.version(module)
        if version in (None, found):
            return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"RoboMimic's tasks need the package '{module}': {INSTALL}") from e
    raise ImportError(
        f"RoboMimic's files were made with {module} {version}, and {found} may differ: {INSTALL}"
    )


@contextlib.contextmanager
def opened(name: str, dataset_dir: str | Path):
    """A task's file, open and seen to be of this task; what is wrong with it is one sentence.

    OSError where it is missing or no HDF5 file, ValueError for everything else.
    """
    h5py = needed("h5py")
    official, stand_in = path(name, dataset_dir), collected_path(name, dataset_dir)
    if not official.exists() and not stand_in.exists():
        task, kind = parse(name)
        ours = f", or collect a small set with {collect_command(kind, dataset_dir)}"
        raise FileNotFoundError(
            f"no {official}: get it with python benchmark/download.py robomimic/{task}-{kind} or "
            f"from {url(name)[0]}" + ours * (task == "lift")
        )
    file_path = official if official.exists() else stand_in
    try:
        with h5py.File(file_path) as file:
            meta = json.loads(file["data"].attrs["env_args"])
            made_for = meta["env_name"], meta["env_version"], bool(meta["env_kwargs"])
            if made_for != (SPECS[parse(name)[0]].env_name, ROBOSUITE, True):
                raise ValueError(f"it is for {made_for[0]} of robosuite {made_for[1]}, not {name}")
            yield file
    except OSError as e:
        raise OSError(f"{file_path} is no complete HDF5 file; delete it and get it again") from e
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as e:  # h5py says which object is missing
        what = e.args[0] if e.args else e
        raise ValueError(f"{file_path}: {what}; delete it and get it again") from e


def collect_command(kind: str, dataset_dir: str | Path) -> str:
    return f"python benchmark/tasks/robomimic.py collect lift-{kind} --out {dataset_dir}"


# ---- transitions ----


def load(name: str, dataset_dir: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """Transitions of all demonstrations, in their order, and their source.

    All arrays are float32: observations, next_observations (N, D), actions (N, A), rewards (-1, at
    success 0), masks (0: success), terminals (1: an episode's last row), each (N,).
    """
    with opened(name, dataset_dir) as file:
        demos = sorted(file["data"], key=lambda demo: int(demo.removeprefix("demo_")))
        if not demos:
            raise ValueError("it has no demonstrations")
        rows = [read(file["data"][demo], SPECS[parse(name)[0]]) for demo in demos]
        collected = file["data"].attrs.get("source") == "collected"
        source = f"collected ({Path(file.filename).name})" if collected else "official"
    return {k: np.concatenate([row[k] for row in rows]) for k in rows[0]}, source


def read(demo, spec: Spec) -> dict[str, np.ndarray]:
    """One demonstration's transitions; ValueError or KeyError says what is wrong with it."""
    sizes = dict(zip(OBS_KEYS, (*SIZES, spec.object_dim), strict=True))
    shapes = {"actions": (spec.act_dim,), "rewards": (), "dones": ()}
    shapes |= {f"{g}/{k}": (size,) for g in ("obs", "next_obs") for k, size in sizes.items()}
    raw = {key: demo[key][()] for key in shapes}
    for key, array in raw.items():
        shape = (len(raw["actions"]), *shapes[key])
        if array.shape != shape or not len(array):
            raise ValueError(f"'{demo.name}/{key}' has shape {array.shape} instead of {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"'{demo.name}/{key}' holds NaN or infinity")
        raw[key] = array.astype(np.float32)
    join = lambda group: np.concatenate([raw[f"{group}/{key}"] for key in OBS_KEYS], -1)
    last = np.arange(len(raw["dones"])) == len(raw["dones"]) - 1
    return dict(
        observations=join("obs"),
        actions=np.clip(raw["actions"], -1, 1),
        next_observations=join("next_obs"),
        rewards=raw["rewards"] - 1,
        masks=1 - raw["dones"],
        terminals=np.maximum(raw["dones"], last).astype(np.float32),
    )


# ---- environment ----


@functools.cache
def import_robosuite():
    """robosuite, without its greetings, and mended for MuJoCo 3.17 (it was written for 3.2)."""
    import mujoco

    silent = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        robosuite = needed("robosuite", ROBOSUITE)
    finally:
        logging.disable(silent)
    from robosuite.controllers.parts import controller
    from robosuite.utils import binding_utils

    def joint_rows(first, widths):
        """MjModel's get_joint_qpos_addr and get_joint_qvel_addr: an index, or (start, end)."""

        def rows(model, joint_name):
            joint = model.joint_name2id(joint_name)
            start, width = getattr(model, first)[joint], widths[model.jnt_type[joint]]
            return start if width == 1 else (start, start + width)

        return rows

    # Theirs asks whether an integer is one of MuJoCo's enums, which is never so any more. The types
    # are free, ball, slide, hinge.
    binding_utils.MjModel.get_joint_qpos_addr = joint_rows("jnt_qposadr", (7, 4, 1, 1))
    binding_utils.MjModel.get_joint_qvel_addr = joint_rows("jnt_dofadr", (6, 3, 1, 1))
    if not hasattr(mujoco.MjData, "qM"):  # the mass matrix now comes from the data as a whole
        full = lambda model, out, data: mujoco.mj_fullM(model, data, out)
        binding_utils.MjData.qM = property(lambda data: data._data)
        controller.mujoco = types.SimpleNamespace(mj_fullM=full)
    return robosuite


class RoboMimic(gymnasium.Env):
    """The simulator of a task's file with time limit; an episode ends at success."""

    def __init__(self, name: str, env_kwargs: dict):
        spec = SPECS[parse(name)[0]]
        fixed = dict(use_object_obs=True, ignore_done=True, reward_shaping=False)
        for camera in ("has_renderer", "has_offscreen_renderer", "use_camera_obs"):
            fixed[camera] = False
        self.sim = import_robosuite().make(spec.env_name, **env_kwargs | fixed)
        self.limit, obs_dim = spec.limit, sum(SIZES) + spec.object_dim
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (self.sim.action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        outside = np.random.get_state()  # robosuite draws from NumPy's global generator
        np.random.seed(self.np_random.integers(2**32))
        try:
            self.sim.reset()
        finally:
            np.random.set_state(outside)
        self.steps = 0
        # What reset returns has zeros where can or nut should be relative to the hand. Look again,
        # but let no time pass: observables are read once in 25 steps of the physics, the last.
        for observable in self.sim._observables.values():
            observable.update(0.0, self.sim._obs_cache, force=True)
        return flat(self.sim._get_observations()), {"success": 0.0}

    def step(self, action):
        raw, reward, _, _ = self.sim.step(np.asarray(action, np.float64))
        self.steps += 1
        success = bool(reward > 0)
        truncated = self.steps >= self.limit and not success
        return flat(raw), float(success) - 1, success, truncated, {"success": float(success)}

    def close(self):
        self.sim.close()


def flat(raw: dict) -> np.ndarray:
    """robosuite's observation -> (D,) in RoboMimic's order."""
    keys = (*OBS_KEYS[:-1], "object-state")
    return np.concatenate([raw[key] for key in keys]).astype(np.float32)


def make_env(name: str, dataset_dir: str | Path) -> RoboMimic:
    with opened(name, dataset_dir) as file:
        env_kwargs = json.loads(file["data"].attrs["env_args"])["env_kwargs"]
    return RoboMimic(name, env_kwargs)


# What the papers set for these tasks; everything else is the scripts' own. SAC Flow's weights
# of its regularisation, offline and online, are for lift, can, square; transport gets the same.
# FMQ's code has no setting per task here.
DEFAULTS = {"sac_flow": dict(beta=10_000.0, beta_online=1_000.0)}


def make_task(name: str, dataset_dir: str) -> dict:
    """What --env-id robomimic/NAME is; ValueError for an unknown name."""
    parse(name)
    return dict(
        make_env=lambda: make_env(name, dataset_dir),
        data=lambda: load(name, dataset_dir),
        defaults=DEFAULTS,
    )


# ---- demonstrations of our own: lift ----

PANDA = dict(  # the arm's controller and the other settings in the official files of version 1.5
    type="OSC_POSE", input_max=1, input_min=-1, output_max=[0.05] * 3 + [0.5] * 3,
    output_min=[-0.05] * 3 + [-0.5] * 3, kp=150, damping=1, impedance_mode="fixed",
    kp_limits=[0, 300], damping_limits=[0, 10], position_limits=None, orientation_limits=None,
    uncouple_pos_ori=True, control_delta=True, interpolation=None, ramp_ratio=0.2,
    input_ref_frame="world", gripper=dict(type="GRIP"),
)  # fmt: skip
ENV_KWARGS = dict(
    robots=["Panda"], controller_configs=dict(type="BASIC", body_parts=dict(right=PANDA)),
    control_freq=20, lite_physics=False, reward_shaping=False, use_object_obs=True,
    ignore_done=True, has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False,
    camera_depths=False, camera_heights=84, camera_widths=84,
)  # fmt: skip
NOISE = {"ph": (0.1,), "mh": (0.1, 0.2, 0.3)}  # of the actions: one operator, or three in turn


def lift_action(obs: np.ndarray) -> np.ndarray:
    """A controller for lift: observation (19,) -> action (7,), a function of the observation alone.

    Above the cube it turns the fingers parallel to its faces, then goes down, grasps and lifts.
    """
    hand, hand_quat, fingers, cube, cube_quat = np.split(obs[:16].astype(np.float64), [3, 7, 9, 12])
    turn = (yaw(cube_quat) - yaw(hand_quat) + np.pi / 4) % (np.pi / 2) - np.pi / 4
    way = cube - hand
    near = np.linalg.norm(way) < 0.015
    held = near and fingers[0] - fingers[1] < 0.046  # the cube's width is 0.040 to 0.044
    if held:
        way = np.array([0, 0, 0.1])
    elif not near and (np.linalg.norm(way[:2]) > 0.012 or abs(turn) > 0.15):
        way[2] += 0.06
    action = np.zeros(7)
    action[:3] = 2 * way / 0.05  # 1 asks for 0.05 m, of which the arm makes about half in a step
    action[5] = 0 if held else 2 * turn / 0.5
    action[6] = 1 if near else -1
    return action.clip(-1, 1)


def yaw(quat: np.ndarray) -> float:
    """Angle about the vertical of a quaternion (x, y, z, w)."""
    x, y, z, w = quat
    return np.arctan2(2 * (x * y + w * z), 1 - 2 * (y * y + z * z))


@functools.cache
def lift_env():
    return RoboMimic("lift-ph", ENV_KWARGS)


def attempt(job: tuple[str, int, int]) -> dict | None:
    """One episode of lift: (kind, seed, number) -> a demonstration's arrays, None for a failure."""
    kind, seed, number = job
    env, rng = lift_env(), np.random.default_rng([seed, number])
    noise = NOISE[kind][number % len(NOISE[kind])]
    episode_seed = int(rng.integers(2**31))
    obs, end = env.reset(seed=episode_seed)[0], False
    rows = {"states": [], "actions": [], "rewards": [], "dones": [], "obs": [], "next_obs": []}
    while not end:
        action = lift_action(obs)
        action[:6] = (action[:6] + noise * rng.normal(size=6)).clip(-1, 1)
        state = env.sim.sim.get_state().flatten()
        next_obs, reward, success, truncated, _ = env.step(action)
        row = (state, action, reward + 1, int(success), obs, next_obs)
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
        obs, end = next_obs, success or truncated
    return {k: np.array(v) for k, v in rows.items()} | {"seed": episode_seed} if success else None


def collect(kind: str, episodes: int, seed: int, dataset_dir: str | Path, workers: int) -> Path:
    """Write that many successful demonstrations of lift; the same data for the same seed.

    Each keeps, besides RoboMimic's arrays, the seed with which its episode was reset.
    """
    h5py = needed("h5py")
    import_robosuite()  # what is missing is said once, not by each worker
    target = collected_path(f"lift-{kind}", dataset_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(".part", f"{target.name}.", target.parent)
    except OSError as e:
        raise OSError(f"cannot write to {target.parent} ({e.strerror}); give --out") from e
    os.close(handle)
    try:
        demos, tried = attempts(kind, episodes, seed, workers)
        with h5py.File(part, "w") as file:
            write(file.create_group("data"), demos)
        os.chmod(part, 0o644)  # mkstemp gives it to the owner alone
        os.replace(part, target)
    finally:
        Path(part).unlink(missing_ok=True)
    steps = sum(len(demo["actions"]) for demo in demos)
    print(
        f"{target}: {episodes} demonstrations, {steps:,} steps; {episodes} of {tried} attempts "
        f"succeeded ({episodes / tried:.0%})"
    )
    return target


def attempts(kind: str, episodes: int, seed: int, workers: int) -> tuple[list[dict], int]:
    """The first `episodes` demonstrations that succeed, and how many attempts they took."""
    demos, tried = [], 0
    with contextlib.ExitStack() as stack:
        bar, run = stack.enter_context(tqdm(total=episodes, unit="episode", disable=None)), map
        if workers > 1:
            run = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers)).imap
        while len(demos) < episodes:  # in the order of their numbers, whatever the workers do
            numbers = range(tried, tried + episodes - len(demos))
            for demo in run(attempt, [(kind, seed, number) for number in numbers]):
                demos += [demo] if demo else []
                bar.update(len(demos) - bar.n)
            tried = numbers.stop
            if not demos:
                raise ValueError(f"none of {tried} attempts lifted the cube: {INSTALL}")
    return demos, tried


def write(data, demos: list[dict]):
    """Fill the group `data` of an HDF5 file as RoboMimic's files are."""
    meta = dict(env_name=SPECS["lift"].env_name, env_version=ROBOSUITE, type=1)
    data.attrs["env_args"] = json.dumps(meta | dict(env_kwargs=ENV_KWARGS))
    data.attrs["source"] = "collected"
    data.attrs["total"] = sum(len(demo["actions"]) for demo in demos)
    for i, demo in enumerate(demos):
        group = data.create_group(f"demo_{i}")
        group.attrs["num_samples"], group.attrs["seed"] = len(demo["actions"]), demo["seed"]
        for key in ("states", "actions", "rewards", "dones"):
            group[key] = demo[key]
        for obs in ("obs", "next_obs"):
            columns = np.split(demo[obs], np.cumsum(SIZES), axis=1)
            for key, column in zip(OBS_KEYS, columns, strict=True):
                group[f"{obs}/{key}"] = column


# ---- command line ----


@dataclasses.dataclass(frozen=True)
class Args:
    command: tyro.conf.Positional[Literal["collect"]]
    """Make demonstrations with a scripted controller."""
    task: tyro.conf.Positional[str]
    """lift, which is lift-ph (low noise), or lift-mh (three levels of noise)."""
    episodes: int = 50
    """Demonstrations to write; failed attempts are left out."""
    seed: int = 0
    """Seed of starts and noise."""
    out: str = "~/.ogbench/data"
    """The scripts' --dataset-dir; see the top for the folder that follows from it."""
    workers: int = os.cpu_count() or 1
    """Processes."""


def main(argv: list[str] | None = None) -> int:
    try:
        args = tyro.cli(Args, args=argv, description=__doc__)
        task, _, kind = args.task.partition("-")
        if task != "lift" or kind not in ("", *KINDS):
            raise ValueError(f"lift, lift-ph, lift-mh can be collected, not '{args.task}'")
        if args.episodes < 1 or args.workers < 1 or args.seed < 0:
            raise ValueError("--episodes and --workers must be 1 or more, --seed 0 or more")
        workers = min(args.workers, args.episodes)
        collect(kind or "ph", args.episodes, args.seed, args.out, workers)
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
