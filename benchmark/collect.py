"""Collect an OGBench-format dataset locally, for machines that cannot download one.

    python benchmark/collect.py antmaze-large        # antmaze-large-navigate-v0, 1M transitions
    python benchmark/collect.py cube-double-task3 --num-transitions 200000
    python benchmark/collect.py d4rl/antmaze-medium-diverse-v2 --num-transitions 200000
    python benchmark/collect.py d4rl/halfcheetah-medium-v2 --policy RUN_DIR
    python benchmark/collect.py --describe ~/.ogbench/data/cube-single-play-v0.collected.npz

The procedure is the one OGBench published for its own files (Park et al., 2025, and its generation
scripts), run on the environments and scripted oracles of the installed `ogbench` package:

  navigate  walk to a random junction, then to the next one, for the whole episode
  stitch    walk to one cell four steps away and stay there
  explore   follow a random direction, redrawn every 10 steps, with much action noise
  play      one random sub-task after another by open-loop plans with smoothed noise
  noisy     the same by closed-loop oracles with Gaussian noise and some random actions

Differences from the official files: (1) the ant walks with a policy of our own, which reaches about
2.9 goals per 1000 steps in antmaze-large and lies on its back at the end of 15% of the episodes;
(2) every episode has a seed of its own, so the draws differ, whatever the number of workers.
So a result on collected data is not a result on official data: the files are called
`<dataset>.collected.npz` and `<dataset>.collected-val.npz`, and each says in its `metadata` entry
(a JSON string) how it was made. Both are loaded by
`ogbench.make_env_and_datasets(name, dataset_path=".../<dataset>.collected.npz")`.

D4RL's antmaze sets, d4rl/NAME, become one `NAME.collected.hdf5` in D4RL's format, where
benchmark/tasks/d4rl.py finds it. As in D4RL's own (Fu et al., 2020, and its generation scripts) the
ant walks to goals with action noise 0.2 for 1000 steps and the rows within 0.5 of one target are
rewarded and terminal. It starts at the task's start (umaze) or in any cell (the others). Unlike
there, a goal that is reached is followed by one in another cell, and about half of all goals lie in
the cell of the evaluation's goal, so that a small set holds something to learn; the others are the
start (umaze), the start and far ends of corridors (play) or any cell (diverse). The target is the
mean of the evaluation's goals.

D4RL's locomotion sets, d4rl/halfcheetah-medium-v2 and the like, are rolled out with a policy that
you train first, as D4RL's were: `--policy RUN_DIR`, a run of algos/sac_flow.py on that robot
(python algos/sac_flow.py --env-id HalfCheetah-v4 --online-steps 60000). It acts with its noise;
medium-expert alternates it with its most probable actions, medium-replay and full-replay are the
run's own replay, and random needs no policy. How good a set is, is up to that run: the file's
metadata name its mean return.
"""

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import difflib
import errno
import fcntl
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import tyro
from tqdm import tqdm

# The directional ant policy: SAC, 300k steps on OGBench's online ant with a direction command.
# Arrays w0, b0, w1, b1, w2, b2 (float32): 27 state entries (no xy) + 2 of the unit direction -> 256
# -> 256 -> 8, tanh-GELU in between, tanh on the output.
ANT_POLICY = Path(__file__).with_name("ant_expert.npz")
TASKS = Path(__file__).with_name("tasks")
DTYPES = {"terminals": np.bool_, "button_states": np.int64}  # every other array is float32


@dataclasses.dataclass(frozen=True)
class Args:
    name: tyro.conf.Positional[str | None] = None
    """Dataset or task: antmaze-large, cube-double-noisy, scene-play-v0, cube-double-task3,
    d4rl/antmaze-large-play-v2, d4rl/hopper-medium-v2, ..."""
    num_transitions: int | None = None
    """Transitions in the training file, rounded up to whole episodes (default: OGBench's size)."""
    episode_length: int | None = None
    """Transitions per episode (default: OGBench's length for this dataset)."""
    dataset_dir: Path = Path("~/.ogbench/data")
    """Directory of the two files, and what D4RL's directory derives from."""
    policy: Path | None = None
    """D4RL's locomotion sets: run directory of algos/sac_flow.py whose policy is rolled out."""
    workers: int | None = None
    """Simulator processes (default: all cores). The files do not depend on it."""
    seed: int = 0
    """Seed of the whole dataset."""
    overwrite: bool = False
    """Collect again although the files are there."""
    describe: Path | None = None
    """Collect nothing; report on this dataset file instead."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How OGBench made one of its datasets."""

    env: str  # environment id without -v0
    kind: str  # navigate, stitch, explore, play or noisy
    episodes: int
    length: int  # transitions per episode; an episode of n transitions has n + 1 rows
    noise: float  # standard deviation of the action; of the plan (play); its upper bound (noisy)
    p_random: float  # probability of a uniformly random action
    p_stack: tuple[float, float]  # range, over episodes, of the probability to stack cubes

    @property
    def policy(self) -> str:
        if "antmaze" in self.env:
            return ANT_POLICY.name
        return "the direction itself" if "maze" in self.env else "oracles of the ogbench package"

    @property
    def d4rl(self) -> bool:
        return self.env.startswith("d4rl/")  # then the whole name

    @property
    def dataset(self) -> str:
        return self.env.removeprefix("d4rl/") if self.d4rl else f"{self.env}-{self.kind}-v0"


MANIPULATION = {"cube-single": 1, "cube-double": 1, "cube-triple": 3, "cube-quadruple": 5}
MANIPULATION |= {"scene": 1, "puzzle-3x3": 1, "puzzle-4x4": 1, "puzzle-4x5": 3, "puzzle-4x6": 5}
NEVER = (0.0, 0.0)
STACKING = {"cube-double": (0.0, 0.25), "cube-triple": (0.05, 0.35), "cube-quadruple": (0.1, 0.5)}


def all_recipes() -> dict[str, Recipe]:
    """Return every dataset that can be collected here, by full name."""
    found = []
    for body, noise in (("pointmaze", 0.5), ("antmaze", 0.2)):
        for size in ("medium", "large", "giant", "teleport"):
            episodes, length = (500, 2000) if size == "giant" else (1000, 1000)
            found.append(Recipe(f"{body}-{size}", "navigate", episodes, length, noise, 0.0, NEVER))
            found.append(Recipe(f"{body}-{size}", "stitch", 5000, 200, noise, 0.0, NEVER))
            if body == "antmaze" and size != "giant":
                found.append(Recipe(f"{body}-{size}", "explore", 10000, 500, 1.0, 0.0, NEVER))
    for env, thousands in MANIPULATION.items():
        p_random, p_stack = (0.2 if "puzzle" in env else 0.1), STACKING.get(env, NEVER)
        found.append(Recipe(env, "play", thousands * 1000, 1000, 0.1, 0.0, p_stack))
        found.append(Recipe(env, "noisy", thousands * 1000, 1000, 0.1, p_random, p_stack))
    # OGBench offers this one in 100 parts; the default here is one part.
    found.append(Recipe("cube-octuple", "play", 1000, 1000, 0.1, 0.0, (0.0, 0.35)))
    return {recipe.dataset: recipe for recipe in found}


NOT_COLLECTED = {
    "humanoidmaze": "needs a trained humanoid walking policy, which this project does not have",
    "antsoccer": "needs a trained policy for dribbling the ball, which this project does not have",
    "visual": "has pixel observations, and only state observations are collected here",
    "powderworld": "is not a maze or manipulation dataset, the only families collected here",
}


def find_recipe(name: str) -> Recipe:
    """Resolve a short, full or single-task name; tasks share their dataset, so they are dropped."""
    recipes = all_recipes()
    if name.startswith("d4rl/"):
        return find_d4rl_recipe(name)
    for family, reason in NOT_COLLECTED.items():
        if name.startswith(family):
            fail(f"'{name}' {reason}.")
    stem = re.sub(r"(-singletask|-oraclerep)?(-task[1-5])?(-v0)?$", "", name)
    for kind in ("", "-navigate", "-play"):
        if f"{stem}{kind}-v0" in recipes:
            return recipes[f"{stem}{kind}-v0"]
    known = [d.removesuffix("-v0") for d in recipes] + [r.env for r in recipes.values()]
    close = difflib.get_close_matches(stem, dict.fromkeys(known), n=4, cutoff=0.4)
    fail(f"Unknown dataset '{name}'; closest: {', '.join(close) or 'antmaze-large, cube-single'}.")


def find_d4rl_recipe(name: str) -> Recipe:
    """Resolve d4rl/NAME; the kind is umaze, play or diverse."""
    try:
        family, kind = load_d4rl().parse(name.removeprefix("d4rl/"))
    except ValueError as error:
        fail(f"{error}.")
    if family in ("pen", "door", "hammer", "relocate"):
        fail(f"'{name}' needs demonstrations of a hand, which this project does not have.")
    return Recipe(name, kind.partition("-")[2] or "umaze", 1000, 1000, 0.2, 0.0, NEVER)


@functools.cache
def load_d4rl():
    """Import benchmark/tasks/d4rl.py, which knows D4RL's names, mazes and directories."""
    if not (path := TASKS / "d4rl.py").is_file():
        fail(f"{path} is missing; copy it from the repository.")
    return load_module(path)


def load_module(path: Path):
    """Import a file of this repository by its path."""
    spec = importlib.util.spec_from_file_location(f"cleanflow_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def d4rl_path(name: str, dataset_dir: Path) -> Path:
    """Where a collected D4RL set is written, once it is sure that it can be."""
    try:
        load_d4rl().needed("h5py")
    except ImportError as error:
        fail(f"{error}.")
    return load_d4rl().collected_path(name, dataset_dir)


def fail(message: str, code: int = 2) -> NoReturn:
    """Leave with one sentence on stderr: code 2 for bad input, 1 for what went wrong on the way."""
    print(f"collect.py: {message}", file=sys.stderr)
    raise SystemExit(code)


# ---- episodes (these run in the worker processes) ----


def run_episode(recipe: Recipe, seed: int, split: int, index: int, length: int):
    """Collect episode `index` of split 0 (train) or 1 (val); a function of its arguments alone.

    Returns (rows, goals): rows maps each key of the file to an array (length + 1, ...), goals is
    the number of goals (navigate) or sub-tasks (manipulation) that were reached.
    """
    episode = maze_episode if "maze" in recipe.env else manipulation_episode
    episode = d4rl_episode if recipe.d4rl else episode
    for attempt in itertools.count():
        root = np.random.SeedSequence(seed, spawn_key=(split, index, attempt))
        for_global, for_env, for_script = root.spawn(3)
        np.random.seed(for_global.generate_state(4))  # maze noise, teleports and oracles draw here
        env_seed = int(for_env.generate_state(1)[0])
        log, goals = episode(recipe, np.random.default_rng(for_script), env_seed, length + 1)
        rows = {key: np.asarray(log[key], DTYPES.get(key, np.float32)) for key in log}
        rows["terminals"] = np.arange(length + 1) == length
        if recipe.env != "scene" or cube_stays_visible(rows["qpos"][:, 14:17]):
            return rows, goals


def record(log: dict[str, list], ob, action, info: dict):
    """Append one row: what was seen, what was done, and the simulator state before it."""
    log["observations"].append(ob)
    log["actions"].append(action)
    for key in ("qpos", "qvel", "button_states"):
        if f"prev_{key}" in info:
            log[key].append(info[f"prev_{key}"])


def make_env(env_name: str, **options):
    """Make an OGBench environment without Gymnasium's wrappers: time limits are ours."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported
    import gymnasium
    import ogbench  # noqa: F401  (registers the environments)

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # not a warning for every Box it casts
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory() as tempfile.tempdir:  # mazes leave their XML file there
        try:
            return gymnasium.make(f"{env_name}-v0", disable_env_checker=True, **options).unwrapped
        finally:
            tempfile.tempdir = usual


@functools.cache
def maze_tools(env_name: str):
    """Build, once per process, the maze, its policy and its cells.

    Returns (env, policy, free, junctions, waypoint): policy(state, direction) -> action; lists of
    cells (i, j), of which junctions are not the inside of a straight corridor;
    waypoint(cell, goal_cell) -> xy (2,) of the next cell's centre on a shortest path.
    """
    env = make_env(env_name, terminate_at_goal=False)
    wall = env.maze_map == 1
    free = [tuple(map(int, cell)) for cell in np.argwhere(~wall)]

    def corridor(i, j):
        above, below, left, right = wall[i - 1, j], wall[i + 1, j], wall[i, j - 1], wall[i, j + 1]
        return above == below and left == right and above != left

    @functools.cache  # a breadth-first search per step would cost more than the point's physics
    def waypoint(cell, goal):
        return env.get_oracle_subgoal(env.ij_to_xy(cell), env.ij_to_xy(goal))[0]

    policy = (lambda state, direction: direction) if "point" in env_name else load_ant_policy()
    return env, policy, free, [cell for cell in free if not corridor(*cell)], waypoint


def load_ant_policy():
    """Return policy(state (29,), direction (2,)) -> action (8,) in [-1, 1]."""
    with np.load(ANT_POLICY) as file:
        w0, b0, w1, b1, w2, b2 = (file[key] for key in ("w0", "b0", "w1", "b1", "w2", "b2"))

    def gelu(x):
        inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return 0.5 * x * (1 + np.tanh(inner))

    def policy(state, direction):
        x = np.concatenate([state[2:], direction]).astype(np.float32)
        return np.tanh(gelu(gelu(x @ w0 + b0) @ w1 + b1) @ w2 + b2)

    return policy


def maze_episode(recipe: Recipe, rng: np.random.Generator, env_seed: int, num_rows: int):
    env, policy, free, junctions, waypoint = maze_tools(recipe.env)
    start = free[rng.integers(len(free))]
    goals = junctions
    if recipe.kind == "stitch":
        _, distance = env.get_oracle_subgoal(env.ij_to_xy(start), env.ij_to_xy(start))
        goals = [cell for cell in free if distance[cell] == 4] or [start]
    goal = goals[rng.integers(len(goals))]
    env.action_space.seed(env_seed)
    task = {"init_ij": start, "goal_ij": goal}
    ob, _ = env.reset(seed=env_seed, options={"task_info": task})

    log, reached = collections.defaultdict(list), 0
    for step in range(num_rows):
        if recipe.kind != "explore":
            xy = env.get_xy()
            direction = waypoint(env.xy_to_ij(xy), goal) - xy
        elif step % 10 == 0:
            direction = rng.standard_normal(2)
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        action = policy(env.get_ob(), direction)
        action = np.clip(action + rng.normal(0, recipe.noise, action.shape), -1, 1)
        next_ob, _, _, _, info = env.step(action)
        if info["success"] and recipe.kind == "navigate":
            reached += 1
            goal = goals[rng.integers(len(goals))]
            env.set_goal(goal_xy=env.add_noise(env.ij_to_xy(goal)))
        record(log, ob, action, info)
        ob = next_ob
    return log, reached


@functools.cache
def d4rl_tools(name: str):
    """Build, once per process, D4RL's maze, its policy and its cells (row, column).

    Returns (env, policy, free, waypoint): policy and waypoint as in `maze_tools`.
    """
    d4rl = load_d4rl()
    env = d4rl.AntMaze(d4rl.parse(name)[1].partition("-")[0])
    rows = env.maze.rows
    free = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell != "#"]

    @functools.cache
    def steps_to(goal):
        """Steps from each free cell to `goal`, breadth first."""
        steps, queue = {goal: 0}, collections.deque([goal])
        while queue:
            i, j = cell = queue.popleft()
            for new in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if new in free and new not in steps:
                    steps[new] = steps[cell] + 1
                    queue.append(new)
        return steps

    def waypoint(cell, goal):
        (i, j), steps = cell, steps_to(goal)
        around = ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1), cell)
        best = min((c for c in around if c in steps), key=steps.get, default=goal)
        return d4rl.CELL * np.array([best[1] - 1, best[0] - 1])

    return env, load_ant_policy(), free, waypoint


def d4rl_episode(recipe: Recipe, rng: np.random.Generator, env_seed: int, num_rows: int):
    env, policy, free, waypoint = d4rl_tools(recipe.dataset)
    size, radius = load_d4rl().CELL, load_d4rl().GOAL_RADIUS

    goal_cell = env.maze.goal

    def neighbours(cell):
        return sum(abs(cell[0] - i) + abs(cell[1] - j) == 1 for i, j in free)

    others = {
        "umaze": [(1, 1)],
        "play": [(1, 1)] + [c for c in free if neighbours(c) == 1 and math.dist(c, goal_cell) > 2],
        "diverse": free,
    }[recipe.kind]

    def new_goal(old=None):
        cell = old
        while cell == old:
            cell = goal_cell if rng.random() < 0.5 else others[rng.integers(len(others))]
        centre = size * np.array([cell[1] - 1, cell[0] - 1])
        return cell, centre + rng.uniform(0, [[1], [0.5]], (2, 2)).sum(0)  # as in evaluations

    ob, _ = env.reset(seed=env_seed)
    if recipe.kind != "umaze":
        i, j = free[rng.integers(len(free))]
        env.unwrapped.set_xy(size * np.array([j - 1, i - 1]) + rng.uniform(0, 1, 2))
        ob = env.unwrapped.get_ob()
    goal, goal_xy = new_goal()
    log, reached = collections.defaultdict(list), 0
    for _ in range(num_rows):
        column, row = (int(x) for x in np.floor(ob[:2] / size + 1.5))
        towards = goal_xy if (row, column) == goal else waypoint((row, column), goal)
        direction = towards - ob[:2]
        action = policy(ob, direction / (np.linalg.norm(direction) + 1e-6))
        action = np.clip(action + rng.normal(0, recipe.noise, action.shape), -1, 1)
        next_ob, *_ = env.step(action)
        for key, value in (("observations", ob), ("actions", action), ("infos/goal", goal_xy)):
            log[key].append(value)
        ob = next_ob
        if np.linalg.norm(ob[:2] - goal_xy) <= radius:
            reached += 1
            goal, goal_xy = new_goal(goal)
    return log, reached


@functools.cache
def manipulation_tools(env_name: str, kind: str):
    """Build, once per process, the arm environment and one oracle for each kind of sub-task.

    Returns (env, oracles, forget); forget() removes what an episode leaves behind in env.
    """
    env = make_env(env_name, terminate_at_goal=False, mode="data_collection")
    # The first reset compiles the model and sets its gains only afterwards, so it leaves another
    # solver warm start than later resets. Spend it here: no episode may depend on the one before.
    env.reset(seed=0)
    style, options = "plan", {"noise": 0.1, "noise_smoothing": 0.5}
    if kind == "noisy":
        style, options = "markov", {"min_norm": 0.4}
    oracles = {}
    for task in ("cube", "button", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{task}_{style}")
        oracle_class = getattr(module, f"{task.title()}{style.title()}Oracle")
        closed = "puzzle" in env_name and task == "button"
        oracles[task] = oracle_class(
            env=env, **options, **({"gripper_always_closed": True} if closed else {})
        )
    # A reset keeps the targets of sub-tasks that it does not draw, and the oracles look at them.
    left = [key for key in vars(env) if key.startswith(("_target_", "_cur_button"))]
    kept = copy.deepcopy({key: vars(env)[key] for key in left})
    sites, damping = env.model.site_pos.copy(), env.model.dof_damping.copy()

    def forget():
        vars(env).update(copy.deepcopy(kept))
        env.model.site_pos[:], env.model.dof_damping[:] = sites, damping

    return env, oracles, forget


def manipulation_episode(recipe: Recipe, rng: np.random.Generator, env_seed: int, num_rows: int):
    env, oracles, forget = manipulation_tools(recipe.env, recipe.kind)
    forget()
    ob, info = env.reset(seed=env_seed)
    p_stack = rng.uniform(*recipe.p_stack)
    scale = rng.uniform(0, recipe.noise) * np.array([1, 1, 1, 3, 10])  # xyz, yaw, gripper
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)

    log, reached = collections.defaultdict(list), 0
    for _ in range(num_rows):
        if rng.random() < recipe.p_random:
            action = rng.uniform(-1, 1, 5)
        else:
            action = np.asarray(oracle.select_action(ob, info))
            if recipe.kind == "noisy":
                action = action + rng.normal(0, scale)
        action = np.clip(action, -1, 1)
        next_ob, _, _, _, info = env.step(action)
        if oracle.done:
            reached += bool(info["success"])
            target_ob, target_info = env.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)
        record(log, ob, action, info)
        ob = next_ob
    return log, reached


def cube_stays_visible(xyz: np.ndarray) -> bool:
    """Tell whether the cube, xyz (rows, 3), left the view nowhere but in the drawer."""
    y, z = xyz[:, 1], xyz[:, 2]
    return not np.any((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08))))


# ---- the pool ----


def start_worker():
    """End this worker when the parent dies, even by SIGKILL; otherwise it would wait for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def collect(recipe: Recipe, seed: int, episodes, length: int, workers: int, directory: Path):
    """Run `episodes` (train, val) in worker processes; returns ((train, val), [goals, goals]).

    train and val map each key to an array (episodes * (length + 1), ...), filled in place in
    episode order as results arrive, so memory peaks at little more than the data itself.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # one core a worker
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=start_worker)
    jobs = ((split, index) for split in (0, 1) for index in range(episodes[split]))
    rows = length + 1
    data, goals = ({}, {}), [0, 0]

    def submit(number):
        return [
            (*job, pool.submit(run_episode, recipe, seed, *job, length))
            for job in itertools.islice(jobs, number)
        ]

    try:
        # Workers inherit the blocked signal: Ctrl-C is handled here, without their tracebacks, and
        # one that comes meanwhile is only put off. (The tracker's start would lift the block.)
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        running = collections.deque(submit(3 * workers))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with progress(sum(episodes) * rows, recipe.dataset) as advance:
            while running:
                split, index, future = running.popleft()
                episode, reached = future.result()
                if split == index == 0:
                    size = sum(episodes) * sum(array.nbytes for array in episode.values())
                    if shutil.disk_usage(directory).free < size // 2:  # compression saves less
                        fail(f"{size / 1e9:.1f} GB of data will not fit into {directory}.", 1)
                for key, array in episode.items():
                    if key not in data[split]:
                        shape = (episodes[split] * rows, *array.shape[1:])
                        data[split][key] = np.empty(shape, array.dtype)
                    data[split][key][index * rows : (index + 1) * rows] = array
                goals[split] += reached
                running.extend(submit(1))
                advance(rows)
    except concurrent.futures.process.BrokenProcessPool:
        fail("a worker process died (out of memory?); try fewer --workers.", 1)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return data, goals


@contextlib.contextmanager
def progress(total: int, label: str):
    """Yield advance(n): a bar with its ETA on a terminal, else a line about every ten seconds."""
    quiet = not sys.stderr.isatty()
    bar = tqdm(total=total, desc=label, unit=" transitions", unit_scale=True, disable=quiet)
    done, start = 0, time.monotonic()
    last = start

    def advance(n: int):
        nonlocal done, last
        done, now = done + n, time.monotonic()
        bar.update(n)
        if quiet and now - last > 10 and done < total:
            last, speed = now, done / (now - start)
            status = f"{done:,} of {total:,} transitions, {speed:,.0f}/s"
            left = (total - done) / speed / 60
            print(f"{label}: {status}, {left:.1f} min left", file=sys.stderr, flush=True)

    with bar:
        yield advance


# ---- files ----


def temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def claimed(path: Path):
    """Hold `path`.tmp under a lock, so that two runs never collect the same file at once.

    The kernel drops the lock of a killed process, and the next run overwrites its leftover.
    """

    def still_named():  # or has another run renamed or removed what was opened here?
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(temporary(path)), os.fstat(file.fileno()))

    while True:
        # Neither truncate nor append: another process may be writing this very file.
        file = os.fdopen(os.open(temporary(path), os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"collect.py: waiting for another run that collects {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: go on without one
        if still_named():
            break
        file.close()
    try:
        yield file
    finally:
        if still_named():
            temporary(path).unlink()
        file.close()


def write_pair(paths: tuple[Path, Path], file, parts: list[dict]):
    """Write train (into the claimed `file`) and val completely, then give both their names.

    The training file goes first and appears last: where it exists, both are complete.
    """
    try:
        file.truncate(0)
        with open(temporary(paths[1]), "wb") as val_file:
            for handle, part in ((val_file, parts[1]), (file, parts[0])):
                np.savez_compressed(handle, **part)
                handle.flush()
                os.fsync(handle.fileno())
        paths[0].unlink(missing_ok=True)
        os.replace(temporary(paths[1]), paths[1])
        os.replace(temporary(paths[0]), paths[0])
    finally:
        temporary(paths[1]).unlink(missing_ok=True)


def write_antmaze(paths: tuple[Path], file, parts: list[dict]):
    """Write a D4RL antmaze file with its rewards and ends, see `write_hdf5`.

    Row t is rewarded and terminal where row t + 1 of its episode lies within the goal's radius; the
    last row of an episode is its time-out, as in D4RL's files.
    """
    d4rl, rows = load_d4rl(), dict(parts[0])
    metadata, ends = rows.pop("metadata").item(), rows.pop("terminals")
    maze = d4rl.MAZES[d4rl.parse(json.loads(metadata)["dataset"])[1].partition("-")[0]]
    target = d4rl.CELL * np.array([maze.goal[1] - 1, maze.goal[0] - 1]) + 0.75
    near = np.linalg.norm(rows["observations"][:, :2] - target, axis=1) <= d4rl.GOAL_RADIUS
    near = np.append(near[1:], False) & ~ends
    rows |= {"rewards": near.astype(np.float32), "terminals": near, "timeouts": ends}
    write_hdf5(paths, file, rows, metadata)


def write_hdf5(paths: tuple[Path], file, rows: dict, metadata: str):
    """Write a D4RL file into the claimed `file` completely, then give it its name."""
    import h5py

    file.truncate(0)
    with h5py.File(file, "w") as out:
        out.attrs["metadata"] = metadata
        for key, array in rows.items():
            out.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    file.flush()
    os.fsync(file.fileno())
    os.replace(temporary(paths[0]), paths[0])


@contextlib.contextmanager
def destination(paths: tuple[Path, ...], overwrite: bool):
    """The claimed file of a dataset, unless it is there already (then leave with a sentence)."""

    def leave_if_there():
        if all(path.exists() for path in paths) and not overwrite:
            there = read_metadata(paths[0])
            what = f"{there.get('transitions', 0):,} transitions, seed {there.get('seed')}"
            print(f"{paths[0]} is already there ({what}); --overwrite replaces it.")
            raise SystemExit(0)

    leave_if_there()
    with contextlib.ExitStack() as stack:
        # A batch system's stop is treated like Ctrl-C; a background shell may have ignored both.
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.signal(number, signal.default_int_handler)
            stack.callback(signal.signal, number, previous)
        directory = paths[0].parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(claimed(paths[0]))
        except OSError as error:
            why = error.strerror if directory.is_dir() else f"not a directory ({error.strerror})"
            fail(f"cannot write to --dataset-dir {directory}: {why}.")
        leave_if_there()  # another run may have finished while this one waited
        yield file


BAD_ZIP = (zipfile.BadZipFile, zlib.error)


@contextlib.contextmanager
def readable(path: Path):
    """Turn what an unreadable or broken dataset file raises into one sentence."""
    try:
        yield
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror or error}.")
    except (ValueError, TypeError, AttributeError, IndexError, EOFError, *BAD_ZIP):
        fail(f"cannot read {path}: it is not a complete .npz dataset.")


def read_metadata(path: Path) -> dict:
    """Return the metadata of a collected file, {} for an official one."""
    if path.suffix == ".hdf5":
        import h5py

        with readable(path), h5py.File(path) as file:
            return json.loads(file.attrs.get("metadata", "{}"))
    with readable(path), np.load(path) as file:
        if missing := {"observations", "actions", "terminals", "qpos"} - set(file.files):
            fail(f"{path} is not an OGBench dataset: it has no '{min(missing)}'.")
        return json.loads(file["metadata"].item()) if "metadata" in file.files else {}


# ---- report ----


def describe(path: Path) -> dict:
    """Print what is in a dataset file and how each single task fares in it; returns the numbers."""
    metadata = read_metadata(path)
    name = metadata.get("dataset", re.sub(r"(-val)?\.npz$", "", path.name))
    if name not in all_recipes():
        fail(f"cannot tell which dataset {path} is: '{name}' is not a known name.")
    env_name = all_recipes()[name].env
    import ogbench
    from ogbench.relabel_utils import relabel_dataset

    with readable(path):
        data = ogbench.load_dataset(path, add_info=True)
    starts = np.concatenate([[0], np.flatnonzero(data["terminals"])[:-1] + 1])
    size = len(data["observations"])
    if size == 0:
        fail(f"{path} has no transitions.")
    lengths = np.diff(starts, append=size)
    report = {"dataset": name, "transitions": size, "episodes": len(starts), "tasks": {}}
    print(f"{path}: {name}, {path.stat().st_size / 1e6:.1f} MB")
    for key in sorted(metadata.keys() - {"dataset"}):
        print(f"  {key}: {json.dumps(metadata[key])}")
    print(f"  {size:,} transitions, {len(starts):,} episodes of {lengths.min()} to {lengths.max()}")
    for key in ("observations", "actions"):
        report[key] = low, high = float(data[key].min()), float(data[key].max())
        note = "" if np.isfinite(low + high) else ", SOME OF THEM NOT FINITE"
        print(f"  {key}: {data[key].shape[1]} entries in [{low:.3f}, {high:.3f}]{note}")

    print("  after OGBench's relabelling (undiscounted returns of whole episodes):")
    print("  task | transitions at the goal | episodes that reach it | best return | mean return")
    for task in range(1, 6):
        env = make_env(f"{env_name}-singletask-task{task}")
        relabel_dataset(env_name, env, data)
        at_goal = data["masks"] == 0
        returns = np.add.reduceat(data["rewards"].astype(np.float64), starts)
        share, best, mean = float(at_goal.mean()), float(returns.max()), float(returns.mean())
        reached = int(np.logical_or.reduceat(at_goal, starts).sum())
        report["tasks"][task] = {"share": share, "reached": reached, "best": best, "mean": mean}
        print(f"  {task:4d} | {share:23.3%} | {reached:22,} | {best:11,.0f} | {mean:11,.1f}")
    if "maze" in env_name:
        plot_coverage(data["qpos"][:, :2], env, path.with_suffix(".png"), path.name)
    return report


def plot_coverage(xy: np.ndarray, env, png: Path, title: str):
    """Draw how often each square of 0.5 x 0.5 was visited; xy: (transitions, 2)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("collect.py: matplotlib is not installed, so no picture.", file=sys.stderr)
        return
    rows, columns = env.maze_map.shape
    (x0, y0), (x1, y1) = env.ij_to_xy((-0.5, -0.5)), env.ij_to_xy((rows - 0.5, columns - 0.5))
    edges = np.arange(x0, x1 + 0.5, 0.5), np.arange(y0, y1 + 0.5, 0.5)
    counts = np.histogram2d(xy[:, 0], xy[:, 1], edges)[0].T  # (y, x)
    walls = np.kron(env.maze_map, np.ones((8, 8))) == 1  # a cell is 4 x 4
    print(f"  coverage: {np.mean(counts[~walls] > 0):.1%} of the free area; picture: {png}")
    figure, axes = plt.subplots(figsize=(10, 10 * rows / columns))
    place = {"extent": (x0, x1, y0, y1), "origin": "lower"}
    axes.imshow(np.where(walls, 0.6, 1.0), cmap="gray", vmin=0, vmax=1, **place)
    visits = np.ma.masked_equal(counts, 0)
    image = axes.imshow(visits, norm="log", cmap="viridis", **place)
    figure.colorbar(image, label="transitions", shrink=0.8)
    axes.set(title=title, xlabel="x", ylabel="y")
    try:
        figure.savefig(png, dpi=100, bbox_inches="tight")
    except OSError as error:
        fail(f"cannot write {png}: {error.strerror}.")
    finally:
        plt.close(figure)


# ---- command line ----


def provenance(recipe: Recipe) -> dict:
    packages = ("ogbench", "mujoco", "gymnasium", "numpy")
    procedure = {key: getattr(recipe, key) for key in ("kind", "noise", "p_random", "p_stack")}
    return {
        "dataset": recipe.dataset,
        "source": "collected",
        "procedure": procedure | {"policy": recipe.policy},
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


# ---- D4RL's locomotion: roll-outs of a trained policy, in this process ----
ROLLOUT_ENVS = 8


def load_policy(run_dir: Path, env):
    """A run of algos/sac_flow.py -> (act(obs (E, D), step, noisy (E,)) -> (E, A), its carry)."""
    import jax
    import jax.numpy as jnp

    script = load_module(TASKS.parent.parent / "algos" / "sac_flow.py")
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    try:
        args = script.read_args(run_dir, [], script.Args())
        tree, _ = script.load_checkpoint(run_dir)
        fresh = script.start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
        states = script.restore(fresh, tree["state"], run_dir)
    except script.UserError as error:
        fail(f"--policy: {error}.")
    state = jax.tree.map(lambda leaf: leaf[0], states)  # of the run's first seed
    modes = script.evaluation_policies(script.make_networks(args, act_dim), args)

    @jax.jit
    def act(obs, step, noisy):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), step), len(obs))
        noise, mean = (jax.vmap(modes[m], (None, 0, 0))(state, obs, keys)[:, :act_dim]
                       for m in ("stochastic", "deterministic"))  # fmt: skip
        return jnp.where(noisy[:, None], noise, mean)

    return act, tree


def replay_rows(tree: dict) -> dict[str, np.ndarray]:
    """A run's own replay, oldest first, each environment's rows together, in D4RL's layout."""
    replay, num_envs = tree["replay"], tree["returns"].shape[1]
    size, added = replay["rows"]["rewards"].shape[1], int(replay["added"][0])
    order = (np.arange(max(0, added - size), added) % size).reshape(-1, num_envs).T
    rows = {k: np.asarray(v[0])[order] for k, v in replay["rows"].items()}
    terminals = rows["masks"] == 0
    timeouts = (rows["terminals"] > 0) & ~terminals
    timeouts[:, -1] = ~terminals[:, -1]
    rows = dict(observations=rows["obs"], actions=rows["actions"], rewards=rows["rewards"],
                terminals=terminals, timeouts=timeouts)  # fmt: skip
    return {k: v.reshape(-1, *v.shape[2:]) for k, v in rows.items()}


def rollout_rows(name: str, act, noisy, num_rows: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of `act` in E copies of D4RL's environment, each copy's rows together."""
    import gymnasium

    make = [functools.partial(load_d4rl().make_env, name)] * len(noisy)
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(make, autoreset_mode=mode)
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(len(noisy)).tolist())
    log, steps = collections.defaultdict(list), -(-num_rows // len(noisy))
    with progress(steps * len(noisy), "collecting") as advance:
        for step in range(steps):
            actions = np.asarray(act(obs.astype(np.float32), step, noisy))
            next_obs, rewards, terminals, timeouts, _ = envs.step(actions)
            row = dict(observations=obs, actions=actions, rewards=rewards, terminals=terminals)
            for key, value in (row | dict(timeouts=timeouts | (step == steps - 1))).items():
                log[key].append(value)
            obs = next_obs
            advance(len(noisy))
    envs.close()
    rows = {k: np.stack(v, 1) for k, v in log.items()}
    rows["timeouts"] &= ~rows["terminals"]
    return {k: v.reshape(-1, *v.shape[2:]) for k, v in rows.items()}


def make_locomotion(args: Args):
    """Write a D4RL locomotion set from one's own policy; a function of the run and the seed."""
    d4rl, name = load_d4rl(), args.name.removeprefix("d4rl/")
    family, kind = d4rl.parse(name)
    example = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}[family]
    if args.policy is None and kind != "random":
        fail(f"{args.name} needs --policy RUN_DIR, a run of: python algos/sac_flow.py "
             f"--env-id {example}-v4 --online-steps 60000")  # fmt: skip
    if args.num_transitions is not None and args.num_transitions < ROLLOUT_ENVS:
        fail(f"--num-transitions must be at least {ROLLOUT_ENVS}, not {args.num_transitions}.")
    paths, env = (d4rl_path(name, args.dataset_dir),), d4rl.make_env(name)
    rng, act, tree = np.random.default_rng(args.seed), None, None
    if kind == "random":
        size = (ROLLOUT_ENVS, *env.action_space.shape)
        act = lambda obs, step, noisy: rng.uniform(-1, 1, size).astype(np.float32)
    else:
        act, tree = load_policy(args.policy, env)
    with destination(paths, args.overwrite) as file:
        print(f"Collecting {name}.", flush=True)
        if kind.endswith("replay"):
            if "replay" not in tree:
                fail(f"{args.policy} has no replay: give a run that got to its online phase.")
            rows = replay_rows(tree)
        else:
            noisy = (np.arange(ROLLOUT_ENVS) % 2 == 0) | ("expert" not in kind)
            rows = rollout_rows(name, act, noisy, args.num_transitions or 200_000, args.seed)
        ends = rows["terminals"] | rows["timeouts"]
        mean_return = float(rows["rewards"].sum() / ends.sum())
        facts = dict(
            dataset=name, source="collected", split="train", seed=args.seed,
            transitions=len(ends), episodes=int(ends.sum()), mean_return=mean_return,
            procedure=dict(kind=kind, policy=args.policy.name if args.policy else "uniform"),
            versions={p: importlib.metadata.version(p) for p in ("mujoco", "gymnasium", "numpy")},
        )  # fmt: skip
        write_hdf5(paths, file, rows, json.dumps(facts))
    score = d4rl.score(name, mean_return)
    print(f"{paths[0]}: {len(ends):,} transitions, {ends.sum():,} episodes (the last ones cut), "
          f"mean return {mean_return:,.0f}, normalised {score:.1f}.")  # fmt: skip


def check_counts(args: Args):
    for field, low in {"num_transitions": 1, "episode_length": 1, "workers": 1, "seed": 0}.items():
        if (value := getattr(args, field)) is not None and value < low:
            fail(f"--{field.replace('_', '-')} must be at least {low}, not {value}.")


def make_dataset(args: Args):
    if args.name is None:
        fail("which dataset? For example: python benchmark/collect.py antmaze-large")
    if args.name.startswith(("d4rl/halfcheetah", "d4rl/hopper", "d4rl/walker2d")):
        find_d4rl_recipe(args.name)  # is there such a set?
        check_counts(args)
        return make_locomotion(args)
    recipe = find_recipe(args.name)
    check_counts(args)
    if recipe.policy == ANT_POLICY.name and not ANT_POLICY.is_file():
        fail(f"the ant policy {ANT_POLICY} is missing; copy it from the repository.")

    length = args.episode_length or recipe.length
    num_train = -(-(args.num_transitions or recipe.episodes * recipe.length) // length)
    episodes = (num_train, 0 if recipe.d4rl else max(1, num_train // 10))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(args.workers or cores, sum(episodes))
    directory = args.dataset_dir.expanduser()
    stem = directory / f"{recipe.dataset}.collected"
    paths = (Path(f"{stem}.npz"), Path(f"{stem}-val.npz"))
    if recipe.d4rl:
        paths = (d4rl_path(recipe.dataset, args.dataset_dir),)
    with destination(paths, args.overwrite) as file:
        what = f"{episodes[0]:,}" + f" + {episodes[1]:,}" * (not recipe.d4rl) + " episodes"
        what += " (train + val)" * (not recipe.d4rl) + f" of {length:,} transitions"
        print(f"Collecting {recipe.dataset}: {what}, {workers} workers.", flush=True)
        start = time.monotonic()
        data, goals = collect(recipe, args.seed, episodes, length, workers, paths[0].parent)
        seconds = time.monotonic() - start
        for split, part in enumerate(data[: len(paths)]):
            facts = {
                "split": ("train", "val")[split],
                "seed": args.seed,
                "episodes": episodes[split],
                "episode_length": length,
                "transitions": episodes[split] * length,
            }
            if recipe.kind not in ("stitch", "explore"):
                facts["goals_reached"] = goals[split]
            part["metadata"] = np.array(json.dumps(provenance(recipe) | facts))
        (write_antmaze if recipe.d4rl else write_pair)(paths, file, data)
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    rate = 1000 * goals[0] / (episodes[0] * length)
    speed = sum(episodes) * (length + 1) / seconds
    print(f"{speed:,.0f} transitions/s with {workers} workers.")
    if goals[0]:
        print(f"{rate:.2f} goals (sub-tasks) reached per 1000 steps.")


def main(argv: list[str] | None = None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if args.describe is not None:
            describe(args.describe.expanduser())
        else:
            make_dataset(args)
    except KeyboardInterrupt:
        fail("interrupted; no file was written.", 130)
    except MemoryError:
        fail("not enough memory; ask for fewer --num-transitions.", 1)
    except ImportError as error:
        fail(f"{error}; install the packages of requirements.txt.", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        fail(f"cannot write the dataset ({error.strerror}); no file was kept.", 1)


if __name__ == "__main__":
    main()
