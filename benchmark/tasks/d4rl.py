"""D4RL's antmaze (v2), locomotion (v2) and adroit (v1): original files, today's MuJoCo, no d4rl.

    pip install -r requirements.txt -r benchmark/tasks/requirements.txt
    python algos/gsflow.py --env-id d4rl/antmaze-large-play-v2
    python algos/flowq.py --env-id d4rl/hopper-medium-replay-v2
    python benchmark/collect.py d4rl/antmaze-medium-diverse-v2 --num-transitions 200000

Files (Fu et al., arXiv 2004.07219): looked for in `DATASET_DIR/d4rl` where that folder exists or
where --dataset-dir was changed, else in `~/.d4rl/datasets`, which is d4rl's own cache: the sibling
of OGBench's `~/.ogbench/data`. First the original file, then `NAME.collected.hdf5` of
benchmark/collect.py, then a download from the original address, then one from a copy on the
Hugging Face hub. A download gets its name only when it is complete.

Transitions are read as FQL (arXiv 2502.02538) and d4rl.qlearning_dataset read them: the row at
which an episode timed out has no successor and is dropped; only terminals stop the bootstrap;
antmaze rewards are lowered by 1, in the data and in the environment. Actions are clipped to
[-1, 1].

Environments. Returns count in units of the original's reward, except for antmaze.
  antmaze     OGBench's ant, which is D4RL's, among D4RL's walls; success within 0.5 of a goal that
              is drawn anew near the same cell in every episode; success ends the episode
  locomotion  Gymnasium's HalfCheetah, Hopper, Walker2d (v4): state, reward and ending of the
              originals' v2, on another MuJoCo
  adroit      gymnasium-robotics, with two things put right: the reward for door, hammer and
              relocate has the sign of its approach term turned round there, and pen neither ends
              when it is dropped nor stops after 100 steps
The score is D4RL's normalised one: 0 is a random policy, 100 an expert (antmaze: % of successes).
FrankaKitchen is left out: its environment does not construct on MuJoCo 3.17.
"""

import contextlib
import difflib
import http.client
import importlib
import importlib.metadata
import io
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import gymnasium
import numpy as np
from tqdm import tqdm

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
INSTALL = "pip install -r benchmark/tasks/requirements.txt"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
ADROIT_VERSION = "1.4.2"  # of gymnasium-robotics: its rewards are corrected below


class Family(NamedTuple):
    """Tasks that share an environment up to its maze."""

    sets: tuple[str, ...]  # the middle part of the names
    version: str
    obs_dim: int
    act_dim: int
    limit: int  # steps of an episode; antmaze-umaze has 700
    random: float  # return that scores 0, d4rl/infos.py
    expert: float  # return that scores 100


LOCOMOTION = ("random", "medium", "medium-replay", "full-replay", "medium-expert", "expert")
ADROIT = ("human", "cloned", "expert")
MAZE_SETS = (
    "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"
)  # fmt: skip
FAMILIES = {
    "antmaze": Family(MAZE_SETS, "v2", 29, 8, 1000, 0.0, 1.0),
    "halfcheetah": Family(LOCOMOTION, "v2", 17, 6, 1000, -280.178953, 12135.0),
    "hopper": Family(LOCOMOTION, "v2", 11, 3, 1000, -20.272305, 3234.3),
    "walker2d": Family(LOCOMOTION, "v2", 17, 6, 1000, 1.629008, 4592.3),
    "pen": Family(ADROIT, "v1", 45, 24, 100, 96.262799, 3076.8331017826877),
    "door": Family(ADROIT, "v1", 39, 28, 200, -56.512833, 2880.5693087298737),
    "hammer": Family(ADROIT, "v1", 46, 26, 200, -274.856578, 12794.134825156867),
    "relocate": Family(ADROIT, "v1", 39, 30, 200, -6.425911, 4233.877797728884),
}


class Maze(NamedTuple):
    """Rows from the smallest y upwards, # is a wall, a cell is 4 x 4; cell (1, 1) is the origin."""

    file: str  # its name in the names of the files
    rows: tuple[str, ...]
    goal: tuple[int, int]  # row and column; the start is (1, 1)
    limit: int


CELL, GOAL_RADIUS = 4.0, 0.5
MAZES = {  # d4rl/locomotion/maze_env.py
    "umaze": Maze("u-maze", ("#####", "#...#", "###.#", "#...#", "#####"), (3, 1), 700),
    "medium": Maze(
        "big-maze",
        ("########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#..#",
         "########"), (6, 6), 1000,
    ),
    "large": Maze(
        "hardest-maze",
        ("############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#",
         "#..#.#.....#", "##.#.#.#.###", "#..#...#...#", "############"), (7, 9), 1000,
    ),
}  # fmt: skip


# ---- names and files ----


def all_names() -> list[str]:
    """Every task of this file: antmaze-umaze-v2, ..., relocate-expert-v1."""
    return [f"{f}-{kind}-{spec.version}" for f, spec in FAMILIES.items() for kind in spec.sets]


def parse(name: str) -> tuple[str, str]:
    """antmaze-large-play-v2 -> ("antmaze", "large-play"); ValueError for an unknown name."""
    if name not in all_names():
        close = difflib.get_close_matches(name, all_names(), n=3, cutoff=0.3)
        raise ValueError(f"unknown D4RL task '{name}'; close matches: {', '.join(close) or 'none'}")
    family, _, rest = name.partition("-")
    return family, rest.rpartition("-")[0]


def url(name: str) -> list[str]:
    """Addresses of a task's file: the original, then the copy on the Hugging Face hub."""
    family, kind = parse(name)
    if family == "antmaze":
        maze, _, style = kind.partition("-")
        flags = f"multistart_{style != ''}_multigoal_{style == 'diverse'}"
        folder, file = "ant_maze_v2", f"Ant_maze_{MAZES[maze].file}_noisy_{flags}_sparse_fixed.hdf5"
    elif FAMILIES[family].sets == ADROIT:
        folder, file = "hand_dapg_v1", f"{name}.hdf5"
    else:
        folder, file = "gym_mujoco_v2", f"{family}_{kind.replace('-', '_')}-v2.hdf5"
    return [f"{URL}/{folder}/{file}", f"{MIRROR}/{file}"]


def path(name: str, dataset_dir: str | Path) -> Path:
    """Where a task's original file is looked for and downloaded to; see the top for the rule."""
    directory = Path(dataset_dir).expanduser()
    own = directory / "d4rl"
    if not own.is_dir() and directory.parts[-2:] == (".ogbench", "data"):
        own = directory.parent.parent / ".d4rl" / "datasets"
    return own / url(name)[0].rpartition("/")[2]


def collected_path(name: str, dataset_dir: str | Path) -> Path:
    """Where benchmark/collect.py puts its stand-in for a task's file."""
    return path(name, dataset_dir).with_name(f"{name}.collected.hdf5")


def download(addresses: list[str], target: Path) -> list[str]:
    """Fetch `target` from the first address that gives it whole; returns what went wrong before.

    The file is written under another name beside it; OSError where nothing can be written there.
    """
    failures = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(".part", f"{target.name}.", target.parent)
    except OSError as e:
        raise OSError(f"cannot write to {target.parent} ({e.strerror}); give --dataset-dir") from e
    os.close(handle)
    try:
        for address in addresses:
            try:
                fetch(address, Path(part))
            except (OSError, http.client.HTTPException) as e:
                failures.append(f"{address}: {e or type(e).__name__}")
                continue
            os.chmod(part, 0o644)  # mkstemp gives it to the owner alone
            os.replace(part, target)
            break
    finally:
        Path(part).unlink(missing_ok=True)
    return failures


def fetch(address: str, target: Path):
    """Download one file; OSError unless all of it came and it is HDF5."""
    with urllib.request.urlopen(address, timeout=20) as response, open(target, "wb") as file:
        length = response.headers.get("Content-Length")
        bar = {"total": length and int(length), "desc": address.rpartition("/")[2], "miniters": 1}
        with tqdm.wrapattr(file, "write", **bar) as out:
            shutil.copyfileobj(response, out, 1 << 20)
    size = target.stat().st_size
    if length is not None and size != int(length):
        raise OSError(f"only {size:,} of {int(length):,} bytes came")
    with open(target, "rb") as file:
        if file.read(len(HDF5_SIGNATURE)) != HDF5_SIGNATURE:
            raise OSError("what came is not an HDF5 file")


# ---- transitions ----


def load(name: str, dataset_dir: str | Path) -> tuple[dict[str, np.ndarray], str]:
    """Transitions of a task and their source, "official" or "collected (FILE)".

    All arrays are float32: observations, next_observations (N, D), actions (N, A), rewards, masks
    (0: terminated), terminals (1: an episode's last row), each (N,).
    """
    needed("h5py")
    official, collected = path(name, dataset_dir), collected_path(name, dataset_dir)
    if not official.exists() and collected.exists():
        return transitions(name, read(name, collected)), f"collected ({collected.name})"
    if not official.exists():
        failures = download(url(name), official)
        if not official.exists():
            print(*failures, sep="\n")
            stand_in = f", or make a stand-in with python benchmark/collect.py d4rl/{name}"
            raise OSError(
                f"no {official} and no download: fetch it from {' or '.join(url(name))}"
                + stand_in * (name.partition("-")[0] not in FQL_ALPHA)
            )
    return transitions(name, read(name, official)), "official"


def read(name: str, file_path: Path) -> dict[str, np.ndarray]:
    """The arrays of a D4RL file, checked: float32, rewards and flags (N,), the others (N, size)."""
    h5py = needed("h5py")
    spec = FAMILIES[parse(name)[0]]
    sizes = {"observations": spec.obs_dim, "actions": spec.act_dim}

    def bad(what):
        raise ValueError(f"{file_path}: {what}; delete the file and get it again")

    try:
        with h5py.File(file_path) as file:
            keys = (*sizes, "rewards", "terminals", "timeouts")
            missing = [k for k in keys if not isinstance(file.get(k), h5py.Dataset)]
            raw = {k: file[k][()] for k in keys if k not in missing}
    except OSError as e:
        raise OSError(f"{file_path} is no complete HDF5 file; delete it and get it again") from e
    if missing:
        bad(f"no '{missing[0]}' in it")
    num_rows = np.shape(raw["observations"])[0] if np.ndim(raw["observations"]) else 0
    for key, array in raw.items():
        shape = (num_rows, sizes[key]) if key in sizes else (num_rows,)
        if array.dtype.kind not in "fbiu":
            bad(f"'{key}' holds no numbers")
        if array.shape not in (shape, (*shape, 1)) or num_rows < 2:
            bad(f"'{key}' has shape {array.shape}, but {name} needs {shape} with 2 rows or more")
        raw[key] = array.reshape(shape).astype(np.float32)
        if not np.isfinite(raw[key]).all():
            bad(f"'{key}' holds NaN or infinity")
    return raw


def transitions(name: str, raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of a file -> transitions, see `load`."""
    keep = np.flatnonzero(raw["timeouts"][:-1] == 0)  # the last row has no successor either
    if len(keep) == 0:
        raise ValueError(f"the file of {name} has no transitions: every row is a time-out")
    data = {k: raw[k][keep] for k in ("observations", "actions", "rewards")}
    data["next_observations"] = raw["observations"][keep + 1]
    data["actions"] = np.clip(data["actions"], -1, 1)
    terminated = raw["terminals"][keep] != 0
    jump = np.linalg.norm(data["observations"][1:] - data["next_observations"][:-1], axis=1) > 1e-6
    last = np.append(jump, True)
    if name.startswith("antmaze"):  # at the goal many rows in a row are terminal: walk on there
        data["rewards"] -= 1
    else:
        last |= terminated
    data["masks"], data["terminals"] = 1 - terminated.astype(np.float32), last.astype(np.float32)
    return data


# ---- environments ----


def needed(module: str):
    """Import a package of benchmark/tasks/requirements.txt; ImportError names the pip command."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gymnasium-robotics greets with a notice
            return importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"D4RL's tasks need the package of '{module}': {INSTALL}") from e


class AntMaze(gymnasium.Wrapper):
    """D4RL's antmaze (v2) without time limit: observation (29,) = qpos (15), qvel (14) of the ant.

    The reward is 0 at the goal, which ends the episode, and -1 elsewhere.
    """

    def __init__(self, maze: str):
        from ogbench.locomaze.ant import AntEnv

        self.goal_xy, self.maze = np.full(2, np.nan), MAZES[maze]
        self.maze_map = np.array([[cell == "#" for cell in row] for row in self.maze.rows])
        tree = ElementTree.parse(AntEnv.xml_file)
        for i, j in np.argwhere(self.maze_map):
            wall = dict(name=f"block_{i}_{j}", type="box", contype="1", conaffinity="1")
            wall |= dict(size=f"{CELL / 2} {CELL / 2} 1", rgba="0.7 0.5 0.3 1")
            x, y = self.ij_to_xy((i, j))
            wall |= dict(pos=f"{x} {y} 1")
            ElementTree.SubElement(tree.find("worldbody"), "geom", wall)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "maze.xml"
            tree.write(file)
            super().__init__(AntEnv(xml_file=str(file)))

    def ij_to_xy(self, ij):
        """Row and column of a cell -> the position (2,) of its centre."""
        return CELL * np.array([ij[1] - 1, ij[0] - 1])

    def reset(self, *, seed=None, options=None):
        obs, _ = self.env.reset(seed=seed)
        rng = self.unwrapped.np_random
        # two uniform draws, as in D4RL's goal sampler: up to 1.5 beyond the cell's centre
        self.goal_xy = self.ij_to_xy(self.maze.goal) + rng.uniform(0, [[1], [0.5]], (2, 2)).sum(0)
        return obs, {"success": 0.0}

    def step(self, action):
        obs, *_ = self.env.step(action)
        success = bool(np.linalg.norm(obs[:2] - self.goal_xy) <= GOAL_RADIUS)
        return obs, success - 1.0, success, False, {"success": float(success)}


class Adroit(gymnasium.Wrapper):
    """D4RL's pen, door, hammer or relocate (v1) without time limit, from gymnasium-robotics."""

    def __init__(self, hand: str):
        needed("gymnasium_robotics")
        version = importlib.metadata.version("gymnasium-robotics")
        if version != ADROIT_VERSION:
            raise ImportError(
                f"gymnasium-robotics {version} may have other adroit rewards than "
                f"{ADROIT_VERSION}, which this file corrects: {INSTALL}"
            )
        module = importlib.import_module(f"gymnasium_robotics.envs.adroit_hand.adroit_{hand}")
        super().__init__(getattr(module, f"AdroitHand{hand.capitalize()}Env")())
        self.hand = hand

    def step(self, action):
        obs, reward, terminated, _, info = self.env.step(action)
        env = self.unwrapped
        if self.hand == "pen":
            terminated = bool(env.data.xpos[env.obj_body_id][2] < 0.075)  # dropped
        else:  # 0.1 times the palm's distance to what it approaches was added, not subtracted
            if self.hand == "door":
                palm, aim = env.grasp_site_id, env.data.site_xpos[env.handle_site_id]
            else:
                palm, aim = env.S_grasp_site_id, env.data.xpos[env.obj_body_id]
            reward -= 0.2 * np.linalg.norm(env.data.site_xpos[palm] - aim)
        return obs, float(reward), terminated, False, {"success": float(info["success"])}


def make_env(name: str) -> gymnasium.Env:
    """The task's environment, time limit included; every step's info has a success (0 or 1)
    for antmaze and adroit."""
    family, kind = parse(name)
    level, gymnasium.logger.min_level = gymnasium.logger.min_level, gymnasium.logger.ERROR
    try:  # v4 is out of date on purpose: it is the original's reward and observation
        if family == "antmaze":
            env = AntMaze(kind.partition("-")[0])
        elif FAMILIES[family].sets == ADROIT:
            env = Adroit(family)
        else:
            robot = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}
            return gymnasium.make(f"{robot[family]}-v4", disable_env_checker=True)
    finally:
        gymnasium.logger.min_level = level
    return gymnasium.wrappers.TimeLimit(env, limit(name))


def limit(name: str) -> int:
    """Steps after which an episode of the task is cut."""
    family, kind = parse(name)
    return MAZES[kind.partition("-")[0]].limit if family == "antmaze" else FAMILIES[family].limit


def score(name: str, episode_return: float) -> float:
    """D4RL's normalised score of one episode's return.

    In antmaze D4RL's return is 1 for a success; here every step before it costs 1, so an episode
    without one returns -limit, and one with a success more.
    """
    spec = FAMILIES[parse(name)[0]]
    if name.startswith("antmaze"):
        episode_return = float(episode_return > 0.5 - limit(name))
    return 100 * (float(episode_return) - spec.random) / (spec.expert - spec.random)


# ---- defaults ----

# FQL's weight of the distillation loss on adroit: its README (github.com/seohongpark/fql).
FQL_ALPHA = {  # human, cloned, expert; cloned with an online phase
    "pen": ((10_000.0, 10_000.0, 3_000.0), 1_000.0),
    "door": ((30_000.0, 30_000.0, 30_000.0), 1_000.0),
    "hammer": ((30_000.0, 10_000.0, 30_000.0), 1_000.0),
    "relocate": ((10_000.0, 30_000.0, 30_000.0), 10_000.0),
}
# Diffusion-QL's eta (arXiv 2208.06193), its weight of Q / mean |Q|. FlowQ's own lambdas are not
# known; eta is a first guess for them, and the other sets have 1.
DIFFUSION_QL_ETA = {
    "antmaze-umaze": 0.5, "antmaze-umaze-diverse": 2.0, "antmaze-medium-play": 2.0,
    "antmaze-medium-diverse": 3.0, "antmaze-large-play": 4.5, "antmaze-large-diverse": 3.5,
    "pen-human": 0.15, "pen-cloned": 0.1,
}  # fmt: skip
# and its policy's learning rate, where it is not the 3e-4 of its critic
DIFFUSION_QL_RATE = {"antmaze-medium-play": 1e-3, "pen-human": 3e-5, "pen-cloned": 3e-5}


def defaults(name: str) -> dict[str, dict]:
    """What the task sets when no flag does.

    offline_steps, q_agg, gamma, fql_alpha are FQL's D4RL settings (with an online phase it trains
    1,000,000 steps offline: --offline-steps 1000000 --online-steps 1000000). FQL has none for
    locomotion: Diffusion-QL's episodes and smaller-of-two target there. GSFlow's alphas on D4RL are
    not published: antmaze has FQL's, adroit FQL's with an online phase, to sweep.
    """
    family, kind = parse(name)
    shared = dict(offline_steps=500_000, eval_episodes=50, q_agg="min", gamma=0.99)
    gsflow = {}
    if family == "antmaze":
        shared["q_agg"] = "mean"
        alpha = 3.0 if kind.startswith("large") else 10.0
        gsflow = dict(alpha=alpha, fql_alpha=alpha)
    elif family in FQL_ALPHA:
        offline, online = FQL_ALPHA[family]
        gsflow = dict(alpha=online, fql_alpha=offline[ADROIT.index(kind)], fql_online_alpha=online)
    else:
        shared |= dict(offline_steps=1_000_000, eval_episodes=10)
    flowq = dict(guidance_lambda=DIFFUSION_QL_ETA.get(f"{family}-{kind}", 1.0))
    if rate := DIFFUSION_QL_RATE.get(f"{family}-{kind}"):
        flowq["actor_learning_rate"] = rate
    return {"gsflow": shared | gsflow, "flowq": shared | flowq}


def make_task(name: str, dataset_dir: str) -> dict:
    """The task as the scripts of algos/ want it; builds nothing and reads nothing yet.

    Adroit counts by its score: its success holds at single steps and ends nothing.
    """
    family, _ = parse(name)
    return dict(
        make_env=lambda: make_env(name),
        data=lambda: load(name, dataset_dir),
        success=family == "antmaze",
        score=lambda episode_return: score(name, episode_return),
        defaults=defaults(name),
    )
