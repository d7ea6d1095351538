"""GSFlow (GoldenStart): Q-guided prior, one-step student of a flow teacher, entropy control.

Paper: "GoldenStart", arXiv 2603.14245.  Baseline in the same file: Flow Q-Learning (FQL),
arXiv 2502.02538, by `--prior gaussian --student deterministic`.

What is optimised (s observation, a action in [-1,1]^A, sg = stop-gradient, mask = 1 - terminated)

  act(s; T)     x = D(s, z), z ~ N(0, I_L)           Q-guided prior: the decoder supplies the noise
                (mu, sigma) = student(s, x);  a = clip(tanh(mu + T sigma eps), -1, 1)
  F(s, x)       K Euler steps of the teacher's velocity from x at t = 0, clipped to the box once
  critic        y = sg[r + gamma mask mean_i Q'_i(s', act(s'; T))]       --q-agg min: the smaller
                L_critic = mean (Q_i(s, a) - y)^2
  teacher       x_t = (1-t) x0 + t a, x0 ~ N(0, I):  L_flow = mean (v(s, x_t, t) - (a - x0))^2
  prior         x_adv = the one of N noises whose action F(s, x) has the largest mean_i Q_i
                L_prior = w_rec mean (D(s, z) - x_adv)^2 + w_KL KL(E(s, x_adv) || N(0, I_L))
  student       L_student = alpha1 mean (tanh(mu) - sg F(s, x))^2 - mean Q_i(s, a)
                            + sg[alpha2] mean log pi(a|s, x)             one x for all three terms
  temperature   alpha2 = exp(eta):  L_temp = alpha2 (H - H_target),  H = -mean sg[log pi]

One update is one Adam step on the sum (the five groups of parameters are disjoint), then
Q' <- tau Q + (1 - tau) Q'.  Offline: T = 0 in the target.  Online: one environment step per update,
T = 1 in the target and for exploration.  Evaluation uses T = 0; the prior's noise x stays random.

Deviations from the released code (and, where marked P, from the paper)
  1. Candidate selection is rebuilt: the released code calls a function that is defined nowhere.
  2. No inner loops: the released code's extra critic and CVAE steps discard their results.
  3. The CVAE has one hidden layer by declaration: the released one declares three that all read
     the raw input, so two of them never receive a gradient.
  4. Every random draw has a key of its own; there, the student and the CVAE share one.
  5. --alpha works: there it is overwritten by another flag.
  6. The target critic follows the critic after its Adam step (there: before) and lives outside
     the optimiser.
  7. Toy evaluation works, and everything is seeded.
  8. The replay buffer samples all of its rows; no logging-only forward pass in an update.
  9. --success-timing post is explicit, because OGBench changed its default after publication.
 10. P: tanh squashing (paper: plain Gaussian); entropy term active offline too, as in the code.
 11. --n-step, --normalize-obs and small networks exist for quick runs; papers' tables: 1, off, 512.

Where to look: the method is below "# ---- networks" and "# ---- the method"; what stands between
"# ==== shared: NAME ====" lines is the same in every script of this repository.

Modes
  python algos/gsflow.py                                  offline on pointmaze-medium, a few minutes
  python algos/gsflow.py --env-id antmaze-large           offline, the paper's settings
  python algos/gsflow.py --env-id cube-double --online-steps 1000000     offline, then online
  python algos/gsflow.py --env-id multi-crescent          the paper's toy, with pictures
  python algos/gsflow.py --evaluate runs/RUN              load a checkpoint and evaluate it
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2",
#   "flax==0.12.8",
#   "optax==0.2.8",
#   "tyro==1.0.17",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "ogbench==1.2.2",
#   "mujoco==3.17.0",
#   "mujoco-mjx==3.17.0",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
# ]
# ///

import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # headless rendering
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # share the GPU with others

import flax
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from gymnasium.experimental.functional import FuncEnv
from tqdm import tqdm

ALGO = "gsflow"
FREE_ALSO = ()  # flags that may still change when a run without online phase is resumed
EVALUATION_FLAGS = ("eval_temperature",)  # flags that may change with --evaluate


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id, a short name (antmaze-large, cube-double-task3), or
    multi-crescent"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # train this many seeds (seed, seed+1, ...) in one vmapped program
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None
    """run directory: load its checkpoint, evaluate, print a table, train nothing"""
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """float32 matmuls: JAX's default (TF32 on recent GPUs), high or highest"""

    # ---- environment and data ----
    env_backend: Literal["auto", "jax", "host", "mjx"] = "auto"
    """jax: vmapped environment inside the program (point mazes, multi-crescent); host: the official
    environment through gymnasium.vector; auto: jax where it exists, else host;
    mjx: antmaze-* vmapped inside the program, for a GPU (far slower than host on a CPU)"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    num_envs: int = 1
    """parallel environments per seed in the online phase; each step of all makes num-envs rows and
    num-envs * utd updates"""
    normalize_obs: bool | None = None
    """standardise observations with the dataset's mean and deviation (papers: no)"""

    # ---- schedule ----
    offline_steps: int | None = None  # offline gradient steps (paper: 1,000,000)
    online_steps: int = 0
    """online environment steps after the offline phase (published protocol: 1,000,000)"""
    updates_per_dispatch: int | None = None
    """gradient steps per compiled call; metrics are averaged over them and logged"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end of each phase
    eval_episodes: int | None = None  # episodes per evaluation and seed
    checkpoint_interval: int | None = None
    """checkpoint every this many steps and at the end (default: eval-interval)"""

    # ---- optimisation ----
    batch_size: int = 256  # rows per gradient step
    learning_rate: float | None = None  # Adam's step size for all networks
    tau: float | None = None  # target critic: fraction of the new critic in each step
    gamma: float | None = None  # discount
    n_step: int | None = None
    """n-step TD targets that stop at success and at episode ends (papers: 1)"""
    hidden_dims: tuple[int, ...] | None = None
    """widths of critic, teacher and student, unless the next two say otherwise"""
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of the critic
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of teacher and student
    critic_layer_norm: bool = True  # LayerNorm after each activation of the critic
    actor_layer_norm: bool = False  # LayerNorm after each activation of teacher and student
    q_agg: Literal["mean", "min"] | None = None  # how the TD target joins the two target critics
    utd: int = 1  # gradient steps per environment step
    buffer_size: int = 2_000_000
    """rows of dataset plus online data that are kept; the oldest, dataset first, give way"""
    balanced_sampling: bool = False
    """online batches: half dataset, half new data (default: uniform over both)"""

    # ---- algorithm ----
    prior: Literal["cvae", "gaussian"] = "cvae"
    """noise of teacher and student: Q-guided CVAE (GSFlow) or N(0, I) (FQL)"""
    student: Literal["gaussian", "deterministic"] = "gaussian"
    """one-step policy: tanh-Gaussian with entropy control (GSFlow) or deterministic (FQL)"""
    alpha: float | None = None  # alpha1, weight of the distillation loss
    online_alpha: float | None = None
    """alpha1 in the online phase (default: the task's, else --alpha)"""
    num_candidates: int | None = None  # N, noises among which the critic chooses (paper: 10)
    candidate_q_agg: Literal["mean", "min"] = "mean"  # how candidates' two critic values are joined
    flow_steps: int = 10  # K, Euler steps of the teacher
    latent_dim: int = 3  # L, latent size of the CVAE
    recon_weight: float = 1.0  # w_rec
    kl_weight: float = 0.01  # w_KL
    prior_hidden_dims: tuple[int, ...] = (512,)  # widths of the CVAE's encoder and decoder
    log_std_min: float = -2.0  # lower clip of the student's log standard deviation
    log_std_max: float = 0.0  # upper clip of the student's log standard deviation
    student_head_scale: float = 0.01  # initial scale of the Gaussian student's two heads
    target_entropy_scale: float = 0.5  # target entropy = -scale * action size
    target_entropy: float | None = None  # target entropy itself; overrides the scale
    init_temperature: float = 1.0  # alpha2 at the start
    offline_td_temperature: float = 0.0  # T in the TD target, offline
    online_td_temperature: float = 1.0  # T in the TD target, online
    behavior_temperature: float = 1.0  # T for exploration
    eval_temperature: float = 0.0  # T in evaluation
    soft_backup: bool = False
    """subtract alpha2 log pi(a'|s') from the TD target (needs a target T above 0)"""
    normalize_q_loss: bool = False  # divide the student's Q term by the batch mean of |Q|


# What a task sets when no flag does; the first matching prefix wins, "" is the rest. Sources:
# [code] released GSFlow code, [fql] FQL's published settings, [ours] chosen here.
PAPER = dict(  # [code]
    offline_steps=1_000_000, updates_per_dispatch=500, eval_interval=100_000, eval_episodes=50,
    hidden_dims=(512, 512, 512, 512), learning_rate=3e-4, tau=0.005, gamma=0.99, n_step=1,
    normalize_obs=False, q_agg="mean", alpha=10.0, fql_alpha=10.0, num_candidates=10,
)  # fmt: skip
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. The best of 10 noises follows value differences too small to
    # be real, drifts along the walls into corners without data and stays there; that of 4 does not.
    "pointmaze": dict(
        offline_steps=15_000, eval_interval=2_500, hidden_dims=(128, 128, 128), learning_rate=1e-3,
        tau=0.01, n_step=10, normalize_obs=True, alpha=3.0, fql_alpha=3.0, num_candidates=4,
    ),
    "multi-crescent": dict(  # [ours] small networks; the alphas that find most of the 15-modes
        offline_steps=2_000, eval_interval=2_000, eval_episodes=1_000, hidden_dims=(64, 64),
        alpha=10.0, fql_alpha=50.0,
    ),
    "antmaze-giant": dict(gamma=0.995, q_agg="min"),  # [fql]
    "antmaze": dict(q_agg="min"),  # [fql]
    "humanoidmaze-medium": dict(gamma=0.995, fql_alpha=30.0, fql_online_alpha=100.0),  # [fql]
    "humanoidmaze": dict(gamma=0.995, fql_alpha=30.0),  # [fql]
    "antsoccer": dict(gamma=0.995, fql_online_alpha=30.0),  # [fql]
    "cube-double": dict(fql_alpha=300.0),  # alpha = 10 is GSFlow's only published value; [fql]
    "cube": dict(fql_alpha=300.0),  # [fql]
    "scene": dict(fql_alpha=300.0),  # [fql]
    "puzzle": dict(fql_alpha=1000.0),  # [fql]
    "": {},
}  # fmt: skip


class UserError(Exception):
    """Something the user can mend; shown as one sentence, exit code 2."""


# ==== shared: tasks ====
OGBENCH = {  # family: (variants, dataset types, default first; default task)
    "pointmaze": (("medium", "large", "giant", "teleport"), ("navigate", "stitch"), 1),
    "antmaze": (("medium", "large", "giant", "teleport"), ("navigate", "stitch", "explore"), 1),
    "humanoidmaze": (("medium", "large", "giant"), ("navigate", "stitch"), 1),
    "antsoccer": (("arena", "medium"), ("navigate", "stitch"), 4),
    "cube": (("single", "double", "triple", "quadruple"), ("play", "noisy"), 2),
    "scene": (("",), ("play", "noisy"), 2),
    "puzzle": (("3x3", "4x4", "4x5", "4x6"), ("play", "noisy"), 4),
}
PUZZLE_DEFAULT_TASK = {"puzzle-4x5": 2, "puzzle-4x6": 2}


class Task(NamedTuple):
    """One task: `name` is the full id, `base` what the task table is looked up with."""

    name: str  # antmaze-large-navigate-singletask-task1-v0
    base: str  # antmaze-large
    gym_id: str = ""  # antmaze-large-singletask-task1-v0, the official environment
    dataset: str = ""  # antmaze-large-navigate-v0, the official data
    index: int = 1
    success: bool = True  # whether there is such a thing; else only the return counts


def parse_task(env_id, other=()):
    """Full OGBench single-task id or short name -> Task; `other` lists names outside OGBench."""
    if env_id in other:
        return Task(env_id, env_id)
    tasks = {}
    for family, (variants, kinds, default) in OGBENCH.items():
        for base in (f"{family}-{v}" if v else family for v in variants):
            for kind in kinds:
                for i in (0, 1, 2, 3, 4, 5):
                    index = i or PUZZLE_DEFAULT_TASK.get(base, default)
                    name = f"{base}-{kind}-singletask-task{index}-v0"
                    gym_id = f"{base}-singletask-task{index}-v0"
                    task = Task(name, base, gym_id, f"{base}-{kind}-v0", index)
                    suffix = f"-task{i}" if i else ""
                    tasks[f"{base}-{kind}-singletask{suffix}-v0"] = task
                    tasks[f"{base}-{kind}{suffix}"] = task
                    if kind == kinds[0]:
                        tasks[f"{base}{suffix}"] = task
    if env_id not in tasks:
        close = difflib.get_close_matches(env_id, [*other, *tasks], n=3, cutoff=0.3)
        raise UserError(f"unknown task '{env_id}'; close matches: {', '.join(close) or 'none'}")
    return tasks[env_id]


# ==== end shared: tasks ====


# ==== shared: point mazes ====
# OGBench's point mazes, one word per row from the smallest y upwards, # is a wall; then the five
# single tasks as (start row, start column, goal row, goal column).
MAZES = {
    "medium": (
        "######## #..##..# #..#...# ##...### #..#...# #.#..#.# #...#..# ########",
        ((1, 1, 6, 6), (6, 1, 1, 6), (5, 3, 4, 2), (6, 5, 6, 1), (2, 6, 1, 1)),
    ),
    "large": (
        "############ #....#.....# #.##.#.#.#.# #......#...# #.####.###.# "
        "#..#.#.....# ##.#.#.#.### #..#...#...# ############",
        ((1, 1, 7, 10), (5, 4, 7, 1), (7, 4, 1, 10), (3, 8, 5, 4), (1, 1, 5, 4)),
    ),
    "giant": (
        "################ #.#......##....# #.#.##.#.#..##.# #...#..#...#...# "
        "#.###.######.#.# #...#...#....#.# ###.#.#..#.#.### #...#..#...#...# "
        "#.#.#.######.#.# #.###...#...##.# #.....#...#....# ################",
        ((1, 1, 10, 14), (1, 14, 10, 1), (8, 14, 1, 1), (8, 3, 5, 12), (5, 9, 3, 8)),
    ),
}
CELL, RADIUS = 4.0, 0.7  # width of a cell; radius of the ball
STEP_SIZE, SUBSTEPS, TIMESTEP = 0.2, 5, 0.02  # displacement at |a| = 1; RK4 steps and their length


def wall_acceleration(px, py, vx, vy, walls):
    """Acceleration that MuJoCo's soft contacts give a ball near a meeting point of four cells.

    The origin is that meeting point and the ball's own cell lies at px, py < 0. `walls` says which
    of the cells across x, across y and across both are walls. MuJoCo minimises
    |a|^2 / 2 + sum_rows w min(J a - aref, 0)^2 / 2 (here divided by the mass, which cancels).
    """
    # solref 0.02 is raised to 2 * timestep (refsafe): K = 1 / (dmax tc)^2, B = 2 / (dmax tc)
    dmin, dmax, width, tc = 0.9, 0.95, 0.001, 2 * TIMESTEP  # solimp and time constant
    stiffness, damping = 1 / (dmax * tc) ** 2, 2 / (dmax * tc)
    rows = []
    own_x, own_y = jnp.minimum(px, 0), jnp.minimum(py, 0)
    over_x, over_y = jnp.maximum(px, 0), jnp.maximum(py, 0)
    offsets = ((own_x, over_y), (over_x, own_y), (own_x, own_y))  # ball - nearest point of the cell
    for wall, (dx, dy) in zip(walls, offsets, strict=True):
        distance = jnp.sqrt(jnp.maximum(dx * dx + dy * dy, 1e-12))
        nx, ny, depth = dx / distance, dy / distance, RADIUS - distance
        x = jnp.clip(depth / width, 0, 1)
        y = jnp.where(x < 0.5, 2 * x * x, 1 - 2 * (1 - x) ** 2)
        impedance = dmin + y * (dmax - dmin)
        # w = 1 / R with R = (1 - imp) / imp * 2 mu^2 (1 + mu^2) * invweight, friction mu = 1 and
        # mass * invweight = 2/3 (MuJoCo averages 1/m, 1/m and the locked z axis' 0)
        w = jnp.where(wall & (depth > 0), impedance / (1 - impedance) / (4 * 2 / 3), 0)
        # The friction pyramid's edges are n +- t with t in the plane and n +- z; the ball cannot
        # move along z, so the last two are both n.
        for jx, jy, weight in ((nx - ny, ny + nx, w), (nx + ny, ny - nx, w), (nx, ny, 2 * w)):
            aref = stiffness * impedance * depth - damping * (jx * vx + jy * vy)
            rows.append((jx, jy, weight, aref))

    def newton(_, a):
        ax, ay = a
        gx, gy, hxx, hxy, hyy = ax, ay, 1.0, 0.0, 1.0
        for jx, jy, weight, aref in rows:
            residual = jx * ax + jy * ay - aref
            active = jnp.where(residual < 0, weight, 0)  # contacts push, they never pull
            gx, gy = gx + active * residual * jx, gy + active * residual * jy
            hxx, hyy = hxx + active * jx * jx, hyy + active * jy * jy
            hxy = hxy + active * jx * jy
        det = hxx * hyy - hxy * hxy
        return ax - (hyy * gx - hxy * gy) / det, ay - (hxx * gy - hxy * gx) / det

    # Piecewise quadratic, so exact once the active rows are found: six steps did for each of two
    # million random states, nearly always four.
    return jax.lax.fori_loop(0, 6, newton, (jnp.zeros_like(px), jnp.zeros_like(px)))


class PointMazeState(NamedTuple):
    xy: jax.Array
    success: jax.Array  # did the last transition reach the goal?


class PointMaze(FuncEnv):
    """OGBench's pointmaze-{medium,large,giant} with a fixed task, as pure functions.

    MuJoCo's contact dynamics, written out for a ball and the cells around it: a step agrees with
    the official environment to 1e-12 in float64 (1e-8 where MuJoCo's solver stops early, a few
    times in 100,000 steps) and to 1e-5 in float32, unless an action carries the ball's centre into
    a wall (|a_i| > 3 could). As there, actions are not clipped.
    """

    max_episode_steps = 1000
    goal_tol = 1.0

    def __init__(self, maze: str, task: int = 1, success_timing: str = "post"):
        super().__init__()
        if maze not in MAZES or task not in range(1, 6) or success_timing not in ("pre", "post"):
            raise ValueError(f"no point maze {maze!r}, task {task}, timing {success_timing!r}")
        rows, tasks = MAZES[maze]
        self.maze_map = np.array([[c == "#" for c in row] for row in rows.split()], np.int64)
        self.start_xy = self.ij_to_xy(np.array(tasks[task - 1][:2]))
        self.goal_xy = self.ij_to_xy(np.array(tasks[task - 1][2:]))
        self.success_timing = success_timing
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def ij_to_xy(self, ij):
        return CELL * ij[..., ::-1] - CELL

    def xy_to_ij(self, xy):
        return jnp.floor((xy[..., ::-1] + 1.5 * CELL) / CELL).astype(int)

    def move(self, xy, action):
        """Position and velocity after one step; the ball starts each step at rest."""
        xy = xy + STEP_SIZE * action
        ij = self.xy_to_ij(xy)
        from_centre = xy - self.ij_to_xy(ij)
        # Mirror the plane so that the ball sits in the lower left of the four nearest cells. The
        # meeting point as the origin also keeps float32 accurate far from the maze's corner.
        side = jnp.where(from_centre < 0, -1, 1)
        p = jnp.abs(from_centre) - CELL / 2
        (i, j), (sx, sy), wall = ij, side, jnp.asarray(self.maze_map == 1)
        walls = wall[i, j + sx], wall[i + sy, j], wall[i + sy, j + sx]

        def derivative(s):
            return (*s[2:], *wall_acceleration(*s, walls))

        def advance(s, h, k):
            return tuple(a + h * b for a, b in zip(s, k, strict=True))

        def rk4(s, _):
            k1 = derivative(s)
            k2 = derivative(advance(s, TIMESTEP / 2, k1))
            k3 = derivative(advance(s, TIMESTEP / 2, k2))
            k4 = derivative(advance(s, TIMESTEP, k3))
            ends, middle = advance(k1, 1, k4), advance(k2, 1, k3)
            return advance(s, TIMESTEP / 6, advance(ends, 2, middle)), None

        # Scalars rather than vectors: under vmap each becomes one (batch,) array, which XLA fuses.
        state = (p[0], p[1], jnp.zeros_like(p[0]), jnp.zeros_like(p[0]))
        state, _ = jax.lax.scan(rk4, state, None, length=SUBSTEPS)
        return xy + side * (jnp.stack(state[:2]) - p), side * jnp.stack(state[2:])

    def initial(self, rng: Any, params: Any = None) -> PointMazeState:
        xy = self.start_xy + jax.random.uniform(rng, (2,), minval=-1, maxval=1)
        return PointMazeState(xy, jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None) -> PointMazeState:
        xy, _ = self.move(state.xy, action)
        judged = xy if self.success_timing == "post" else state.xy
        return PointMazeState(xy, jnp.linalg.norm(judged - self.goal_xy) <= self.goal_tol)

    def observation(self, state, rng=None, params=None):
        return state.xy

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.success.astype(jnp.float32) - 1

    def terminal(self, state, rng=None, params=None):
        return state.success

    def success(self, state):
        return state.success


def maze_paths(maze_map):
    """Shortest-path lengths between cells and the next cell on the way, both [from, to].

    Cells are numbered row by row. A wall or the goal itself leads nowhere: next = from. Among
    equally short ways the order up, left, down, right decides, as in OGBench.
    """
    size, free = maze_map.size, np.flatnonzero(maze_map == 0)
    width = maze_map.shape[1]
    neighbours = free + np.array([-width, -1, width, 1])[:, None]
    length = np.full((size, size), size)  # `size` means unreachable
    length[free, free] = 0
    for _ in free:
        length[free] = np.minimum(length[free], length[neighbours].min(0) + 1)
    step = neighbours[length[neighbours].argmin(0), np.arange(len(free))[:, None]]
    next_cell = np.tile(np.arange(size)[:, None], size)
    closer = length[neighbours].min(0) < length[free]
    next_cell[free] = np.where(closer, step, next_cell[free])
    return length, next_cell


def collect_pointmaze(
    maze: str,
    num_transitions: int,
    seed: int = 0,
    dataset_type: str = "navigate",
    with_goals: bool = False,
) -> dict[str, np.ndarray]:
    """Collect a dataset as OGBench made its own, in the layout of its files.

    The controller walks from cell to cell along the shortest path with Gaussian action noise.
    navigate: a new goal whenever one is reached; stitch: one goal, four cells away. An episode of
    n + 1 rows holds n transitions (OGBench's 1M: 1000 episodes of 1001 rows; giant 500 of 2001;
    stitch 5000 of 201), and the number of episodes is rounded up. `with_goals` adds the position
    that each row was heading for, which OGBench does not store.
    """
    if dataset_type not in ("navigate", "stitch"):
        raise ValueError(f"no dataset type {dataset_type!r}: navigate or stitch")
    env, navigate = PointMaze(maze), dataset_type == "navigate"
    steps = (2001 if maze == "giant" else 1001) if navigate else 201
    episodes = -(-num_transitions // (steps - 1))
    length, next_cell = maze_paths(env.maze_map)

    wall = env.maze_map == 1
    up, down, left, right = (np.roll(wall, shift, axis) for axis in (0, 1) for shift in (1, -1))
    hallway = (up & down & ~left & ~right) | (left & right & ~up & ~down)
    goals = np.flatnonzero(~wall & ~hallway)  # OGBench puts no goals in the middle of a corridor
    cell_xy = jnp.asarray(env.ij_to_xy(np.indices(wall.shape).reshape(2, -1).T))

    rng = np.random.default_rng(seed)
    starts = rng.choice(np.flatnonzero(~wall), episodes)
    if navigate:
        first_goals = rng.choice(goals, episodes)
    else:
        first_goals = np.array([rng.choice(np.flatnonzero(length[s] == 4)) for s in starts])
    noise = jnp.asarray(rng.uniform(-1, 1, (2, episodes, 2)))
    velocity = 0.1 * rng.standard_normal((episodes, 2))  # the reset's: stored, without any effect

    def episode(key, xy, velocity, goal_cell, goal_xy):
        def step(carry, key):
            xy, velocity, goal_cell, goal_xy = carry
            noise_key, cell_key, goal_key = jax.random.split(key, 3)
            i, j = env.xy_to_ij(xy)
            way = cell_xy[jnp.asarray(next_cell)[i * wall.shape[1] + j, goal_cell]] - xy
            way = way / (jnp.linalg.norm(way) + 1e-6)
            action = jnp.clip(way + 0.5 * jax.random.normal(noise_key, (2,)), -1, 1)
            row = (xy, action, velocity, goal_xy)
            xy, velocity = env.move(xy, action)
            if navigate:
                reached = jnp.linalg.norm(xy - goal_xy) <= env.goal_tol
                new_cell = jax.random.choice(cell_key, jnp.asarray(goals))
                new_xy = cell_xy[new_cell] + jax.random.uniform(goal_key, (2,), minval=-1, maxval=1)
                goal_cell = jnp.where(reached, new_cell, goal_cell)
                goal_xy = jnp.where(reached, new_xy, goal_xy)
            return (xy, velocity, goal_cell, goal_xy), row

        carry = (xy, velocity, goal_cell, goal_xy)
        return jax.lax.scan(step, carry, jax.random.split(key, steps))[1]

    keys = jax.random.split(jax.random.key(seed), episodes)
    start_xy, goal_xy = cell_xy[starts] + noise[0], cell_xy[first_goals] + noise[1]
    rows = jax.jit(jax.vmap(episode))(keys, start_xy, jnp.asarray(velocity), first_goals, goal_xy)
    xy, actions, velocity, goals = (np.asarray(a, np.float32).reshape(-1, 2) for a in rows)
    terminals = np.tile(np.arange(steps) == steps - 1, episodes)
    data = dict(observations=xy, actions=actions, terminals=terminals, qpos=xy, qvel=velocity)
    return data | (dict(goals=goals) if with_goals else {})


# ==== end shared: point mazes ====


# ==== shared: vector environments ====
def reset_envs(env, key, num_envs):
    """Start `num_envs` copies of a functional environment -> (states, steps taken)."""
    states = jax.vmap(env.initial)(jax.random.split(key, num_envs))
    return states, jnp.zeros(num_envs, jnp.int32)


def observe(env, env_state):
    """Observations (num_envs, D) of all copies."""
    return jax.vmap(lambda s: env.observation(s, None))(env_state[0])


def step_envs(env, env_state, actions, key):
    """Step all copies and restart those that ended.

    Returns the new states and, per copy: reward, terminated (no bootstrap), truncated (time limit,
    bootstrap), success, and next_obs, the observation before any restart.
    """
    states, t = env_state
    keys, reset_keys = jax.random.split(key, (2, t.shape[0]))
    next_states = jax.vmap(env.transition)(states, actions, keys)
    reward = jax.vmap(lambda s, a, n: env.reward(s, a, n, None))(states, actions, next_states)
    terminated = jax.vmap(lambda s: env.terminal(s, None))(next_states)
    truncated = (t + 1 >= env.max_episode_steps) & ~terminated
    done = terminated | truncated
    success = jax.vmap(env.success)(next_states) if hasattr(env, "success") else jnp.zeros(t.shape)
    out = dict(
        reward=reward.astype(jnp.float32),
        terminated=terminated,
        truncated=truncated,
        success=success.astype(jnp.float32),
        next_obs=observe(env, (next_states, t)),
    )

    def restart(new, old):
        return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), new, old)

    fresh, _ = jax.lax.cond(  # most steps end no episode
        done.any(),
        lambda: reset_envs(env, reset_keys[0], t.shape[0]),
        lambda: (next_states, t),
    )
    return (jax.tree.map(restart, fresh, next_states), jnp.where(done, 0, t + 1)), out


def evaluate_jax(env, policy, key, num_episodes):
    """Run `num_episodes` in parallel, in one program; all start together.

    `policy(obs (D,), key) -> (H * A,)` gives the actions of the next H steps, which are taken
    without looking. Returns arrays (num_episodes,): success at the last step, return, length.
    """
    start_key, env_key, policy_key = jax.random.split(key, 3)

    def decide(loop):
        env_state, _, result = loop
        t = result["length"].max()
        keys = jax.random.split(jax.random.fold_in(policy_key, t), num_episodes)
        chunks = jax.vmap(policy)(observe(env, env_state), keys)
        chunks = chunks.reshape(num_episodes, -1, *env.action_space.shape).swapaxes(0, 1)
        return jax.lax.scan(episode_step, loop, chunks)[0]

    def episode_step(loop, actions):
        env_state, alive, result = loop
        t = result["length"].max()
        env_state, out = step_envs(env, env_state, actions, jax.random.fold_in(env_key, t))
        result = {
            "success": jnp.where(alive, out["success"], result["success"]),
            "return": result["return"] + alive * out["reward"],
            "length": result["length"] + alive,
        }
        return (env_state, alive & ~out["terminated"] & ~out["truncated"], result), None

    zeros = jnp.zeros(num_episodes)
    result = {"success": zeros, "return": zeros, "length": jnp.zeros(num_episodes, jnp.int32)}
    start = (reset_envs(env, start_key, num_episodes), jnp.ones(num_episodes, bool), result)
    return jax.lax.while_loop(lambda loop: loop[1].any(), decide, start)[2]


class SeededReset(gymnasium.Wrapper):
    """OGBench draws start noise from NumPy's global generator: seed that too, so that an episode
    is a function of its seed."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed)
            self.unwrapped.action_space.seed(seed)
        return self.env.reset(seed=seed, options=options)


def make_host_env(gym_id, success_timing=None):
    """The official environment (OGBench's where `success_timing` is given); in a worker process
    Ctrl-C is left to the main process."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's spaces set off warnings
    import ogbench  # noqa: F401  registers the environments

    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = dict(success_timing=success_timing) if success_timing else {}
    return SeededReset(gymnasium.make(gym_id, **options))


def make_host_envs(gym_id, success_timing, num_envs, autoreset):
    """`num_envs` official environments in processes of their own."""
    return gymnasium.vector.AsyncVectorEnv(
        [functools.partial(make_host_env, gym_id, success_timing)] * num_envs,
        autoreset_mode=autoreset,
        context="forkserver",  # forking a process that runs JAX's threads can deadlock
    )


def evaluate_host(envs, act, seeds, step, num_episodes):
    """Run `num_episodes` per seed on official environments, one after another in each slot.

    `act(obs (S, slots, D), episode (S, slots), t (S, slots)) -> actions (S, slots, A)`. An episode
    depends on (seed, step, its number) alone, so the result does not depend on how many slots
    there are. Returns arrays (S, num_episodes): success at the last step, return, length.
    """
    num_slots = envs.num_envs // len(seeds)
    shape = (len(seeds), num_slots)
    episode = np.tile(np.arange(num_slots), (len(seeds), 1))
    next_episode = np.full(len(seeds), num_slots)
    t, total = np.zeros(shape, np.int32), np.zeros(shape)
    result = {k: np.zeros((len(seeds), num_episodes)) for k in ("success", "return", "length")}
    remaining = len(seeds) * num_episodes

    def episode_seeds():
        ids = [(seeds[s], step, episode[s, k]) for s in range(shape[0]) for k in range(shape[1])]
        return [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]

    obs, _ = envs.reset(seed=episode_seeds())
    while remaining:
        actions = np.asarray(act(obs.reshape(*shape, -1), episode, t))
        obs, reward, terminated, truncated, info = envs.step(actions.reshape(envs.num_envs, -1))
        t += 1
        total += reward.reshape(shape)
        done = (terminated | truncated).reshape(shape)
        for s, k in zip(*np.nonzero(done), strict=True):
            if episode[s, k] < num_episodes:
                success = np.asarray(info["success"]).reshape(shape) if "success" in info else t * 0
                outcome = {"success": success[s, k], "return": total[s, k], "length": t[s, k]}
                for name, value in outcome.items():
                    result[name][s, episode[s, k]] = value
                remaining -= 1
            episode[s, k] = next_episode[s]
            next_episode[s] += 1
        if done.any() and remaining:
            t[done], total[done] = 0, 0.0
            obs, _ = envs.reset(seed=episode_seeds(), options={"reset_mask": done.reshape(-1)})
    return result


# ==== end shared: vector environments ====


# ==== shared: mjx physics ====
def nearest_points(gap, one, two):
    """Where two segments s * one and t * two, |s|, |t| <= 1, are nearest; `gap` is the first centre
    minus the second. Returns s, t, whether s is at an end, and whether at the upper one."""
    aa, ab, bb = one @ one, -(one @ two), two @ two
    u, v, det = -(one @ gap), two @ gap, aa * bb - ab**2
    parallel = det <= jnp.finfo(det.dtype).eps * aa * bb
    s = jnp.where(parallel, 0, (bb * u - ab * v) / jnp.where(parallel, 1, det))
    at_end, upper, s = jnp.abs(s) > 1, s > 1, jnp.clip(s, -1, 1)
    t = (v - ab * s) / bb
    s = jnp.where(jnp.abs(t) > 1, (u - ab * jnp.sign(t)) / aa, s)
    upper = jnp.where(jnp.abs(s) > 1, s > 1, upper)
    return jnp.clip(s, -1, 1), jnp.clip(t, -1, 1), at_end | (jnp.abs(s) > 1), upper


def import_mjx():
    """MJX, MuJoCo's engine in JAX, with three colliders replaced by what MuJoCo's own do: MJX
    aligns the tangents of a capsule's contact with a plane only beyond 30 degrees off the normal,
    and finds the nearest points of capsules to five digits."""
    with contextlib.redirect_stdout(None):  # it says that it has no warp
        from mujoco import mjx
        from mujoco.mjx._src.collision_driver import _COLLISION_FUNC
        from mujoco.mjx._src.collision_primitive import _sphere_sphere, collider
        from mujoco.mjx._src.math import make_frame
        from mujoco.mjx._src.types import GeomType

    def balls(one, centre1, two, centre2):
        dist, pos, normal = _sphere_sphere(centre1, one.size[0], centre2, two.size[0])
        return dist, pos, make_frame(normal)

    @collider(ncon=2)
    def plane_capsule(plane, cap):
        normal, axis = plane.mat[:, 2], cap.mat[:, 2]
        tangent = axis - normal * (normal @ axis)
        norm = jnp.linalg.norm(tangent)
        tangent = tangent / jnp.maximum(norm, 1e-6)
        frame = jnp.stack([normal, tangent, jnp.cross(normal, tangent)])
        frame = jnp.where(norm > 1e-6, frame, make_frame(normal))
        ends = cap.pos + jnp.stack([axis, -axis]) * cap.size[1]
        dist = (ends - plane.pos) @ normal - cap.size[0]
        return dist, ends - (cap.size[0] + dist / 2)[:, None] * normal, jnp.stack([frame, frame])

    @collider(ncon=1)
    def sphere_capsule(ball, cap):
        axis, length = cap.mat[:, 2], cap.size[1]
        t = jnp.clip((ball.pos - cap.pos) @ axis, -length, length)
        return balls(ball, ball.pos, cap, cap.pos + t * axis)

    @collider(ncon=1)
    def capsule_capsule(one, two):
        half1, half2 = (cap.mat[:, 2] * cap.size[1] for cap in (one, two))
        s, t, *_ = nearest_points(one.pos - two.pos, half1, half2)
        return balls(one, one.pos + s * half1, two, two.pos + t * half2)

    _COLLISION_FUNC[GeomType.PLANE, GeomType.CAPSULE] = plane_capsule
    _COLLISION_FUNC[GeomType.SPHERE, GeomType.CAPSULE] = sphere_capsule
    _COLLISION_FUNC[GeomType.CAPSULE, GeomType.CAPSULE] = capsule_capsule
    return mjx


class MjxState(NamedTuple):
    qpos: jax.Array
    qvel: jax.Array
    qacc: jax.Array  # of the last evaluation; the constraint solver starts from it
    x: jax.Array  # position along x by which a locomotion task pays
    derived: jax.Array  # inertias, velocities and forces that it observes, of the last evaluation
    success: jax.Array  # did the last transition reach the goal? (mazes)


class Mjx(FuncEnv):
    """A MuJoCo environment in MJX: the official model; the rest is its subclasses'.

    What MuJoCo derives from positions (body positions, contact forces, ...) is, after a step, that
    of the last evaluation within the last Runge-Kutta step, and so it is here: `derive` reads it.
    """

    noise, gaussian = 0.1, True  # of the start: uniform on positions; on velocities perhaps normal

    def __init__(self, gym_id: str):
        super().__init__()
        self.mjx = import_mjx()
        self.official = make_host_env(gym_id).unwrapped
        self.max_episode_steps = gymnasium.spec(gym_id).max_episode_steps
        self.observation_space = self.official.observation_space
        self.action_space = self.official.action_space
        self.init_qpos, self.dt = self.official.init_qpos, self.official.dt
        model = self.make_model()
        # MJX lacks the iterative solver that Humanoid's model asks for, and runs line searches to
        # their limit, 50 by default, though a few iterations find the minimum.
        model.opt.solver, model.opt.ls_iterations = 2, 10  # Newton's method
        self.model = self.mjx.put_model(model)
        self.data = self.mjx.make_data(self.model)

    def make_model(self):
        return copy.copy(self.official.model)

    def model_at(self, qpos):
        """The model when the robot is there."""
        return self.model

    def derive(self, data):
        """`x` and `derived` of a state."""
        return data.qpos[0], jnp.zeros(0)

    def simulate(self, state, action):
        """The steps of MuJoCo in one of the environment, by the model's integrator: semi-implicit
        Euler (HalfCheetah), or Runge-Kutta as a loop over its four evaluations, compiled once."""
        mjx, h = self.mjx, self.model.opt.timestep
        integrate = functools.partial(mjx._src.forward._integrate_pos, self.model.jnt_type)
        tableau = jnp.array([[0, 1 / 6], [1 / 2, 1 / 3], [1 / 2, 1 / 3], [1, 1 / 6]])

        def step(_, state):
            model, data = self.model_at(state.qpos), self.data.replace(ctrl=action)
            if model.opt.integrator == 0:
                start = dict(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.qacc)
                new = mjx.step(model, data.replace(**start))
                return state._replace(qpos=new.qpos, qvel=new.qvel, qacc=new.qacc)

            def evaluate(carry, ab):
                qvel, qacc, mean_qvel, mean_qacc, _ = carry
                qpos = integrate(state.qpos, qvel, ab[0] * h)
                qvel = state.qvel + ab[0] * h * qacc
                new = mjx.forward(model, data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=qacc))
                means = mean_qvel + ab[1] * qvel, mean_qacc + ab[1] * new.qacc
                new = mjx.rne_postconstraint(model, new)  # contact forces on bodies, if observed
                return (qvel, new.qacc, *means, self.derive(new)), None

            zeros = jnp.zeros_like(state.qvel)
            carry = (state.qvel, state.qacc, zeros, zeros, (state.x, state.derived))
            (_, qacc, qvel, mean_qacc, (x, derived)), _ = jax.lax.scan(evaluate, carry, tableau)
            qpos, qvel = integrate(state.qpos, qvel, h), state.qvel + h * mean_qacc
            return state._replace(qpos=qpos, qvel=qvel, qacc=qacc, x=x, derived=derived)

        return jax.lax.fori_loop(0, self.official.frame_skip, step, state)

    def at(self, qpos, qvel):
        """State after a reset to these positions and velocities."""
        data = self.data.replace(qpos=qpos, qvel=qvel)
        for part in (self.mjx.kinematics, self.mjx.com_pos, self.mjx.com_vel):
            data = part(self.model, data)
        return MjxState(qpos, qvel, jnp.zeros_like(qvel), *self.derive(data), jnp.asarray(False))

    def initial(self, rng: Any, params: Any = None) -> MjxState:
        keys, shapes = jax.random.split(rng), (self.init_qpos.shape, (self.model.nv,))
        qpos = jax.random.uniform(keys[0], shapes[0], minval=-1)
        draw = jax.random.normal if self.gaussian else jax.random.uniform
        qvel = draw(keys[1], shapes[1]) if self.gaussian else draw(keys[1], shapes[1], minval=-1)
        return self.at(self.init_qpos + self.noise * qpos, self.noise * qvel)

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        return self.simulate(state, action)


def make_mjx(task, supported, make):
    """`make()` if the task is among those that MJX can simulate; on a CPU with a warning."""
    if task.base not in supported:
        raise UserError(
            f"--env-backend mjx is for {', '.join(supported)}, not for {task.name}; use the "
            f"official environment, --env-backend host"
        )
    if jax.default_backend() == "cpu":
        print(
            "NOTICE: --env-backend mjx is made for a GPU; on a CPU the official engine, "
            "--env-backend host, is many times faster",
            file=sys.stderr,
        )
    return make()


# ==== end shared: mjx physics ====


# ==== shared: mjx ant mazes ====
MJX_MAZES = ("antmaze-medium", "antmaze-large", "antmaze-giant")
EDGES = [(j, *corner) for j in range(3) for corner in ((-1, -1), (1, -1), (-1, 1), (1, 1))]
EDGE_AXIS = np.eye(3)[[e[0] for e in EDGES]]  # the axis along which each edge of a box runs
EDGE_SIDE = np.array([np.insert(e[1:], e[0], 0) for e in EDGES])  # and where it lies on the others


def sphere_box(centre, radius, size):
    """Distance, position and normal (towards the box) of a contact, all in the box's frame."""
    gap = jnp.clip(centre, -size, size) - centre
    dist = jnp.linalg.norm(gap)
    depths = jnp.concatenate([size + centre, size - centre])  # below the faces, where inside
    inward = jnp.asarray(np.concatenate([np.eye(3), -np.eye(3)]))[depths.argmin()]
    normal = jnp.where(dist > 1e-15, gap / jnp.maximum(dist, 1e-15), inward)
    dist = jnp.where(dist > 1e-15, dist, -depths.min())
    return dist - radius, centre + normal * (radius + dist) / 2, normal


def capsule_box(centre, half, size):
    """Where on a capsule's segment centre + t * half, |t| <= 1, MuJoCo puts its two contacts with a
    box, in the box's frame -> (t of the first, step to the second, whether there is a second).

    The first is the point nearest to the box's surface: an end over a face, or the point nearest to
    an edge. The second lies as far along the segment as it runs along the face or edge.
    """
    ends = centre + jnp.array([[-1.0], [1.0]]) * half
    outside = jnp.abs(ends) > size
    face_dist = (jnp.maximum(jnp.abs(ends) - size, 0) ** 2).sum(1)
    face_dist = jnp.where(outside.sum(1) <= 1, face_dist, jnp.inf)
    end = face_dist.argmin()

    edges, gap = EDGE_AXIS * size, EDGE_SIDE * size - centre
    box_t, t, corner, upper = jax.vmap(nearest_points, (0, 0, None))(gap, edges, half)
    apart = gap + box_t[:, None] * edges - t[:, None] * half
    edge_dist = (apart**2).sum(1)
    k = edge_dist.argmin()
    on_face = face_dist[end] - 1e-15 <= edge_dist[k]

    # from an end over a face: towards the other end, until the segment leaves the face
    sign = 1 - 2 * end
    exits = jnp.stack([size - ends[end], -size - ends[end]]) / (sign * half)
    exits = jnp.where((exits > 0) & ~outside[end], exits, jnp.inf)
    face_second = sign * jnp.minimum(exits.min(), 2)

    # from a corner: `odd` is the axis on which the segment runs otherwise than on the other two
    t, box_t, edge = t[k], box_t[k], jnp.asarray(EDGE_AXIS)[k] > 0
    side = jnp.where(edge, upper[k], jnp.asarray(EDGE_SIDE)[k] > 0)
    away = (half > 0) != side
    across = 2 * size / jnp.abs(half)
    sign = jnp.where(away.sum() == 1, 1, -1)
    odd = away == (sign > 0)
    along_edge = jnp.minimum(1 - sign * t, jnp.where(odd, across, jnp.inf).min())
    along_face = jnp.minimum(1 + sign * t, jnp.where(odd, jnp.inf, across).min())
    is_along_edge = 2 * jnp.where(odd, half**2, 0).sum() > half @ half
    corner_second = sign * jnp.where(is_along_edge, along_edge, -along_face)
    corner_has = (away.sum() > 0) & (away.sum() < 3)

    # from inside an edge: over the face with which the segment makes the smaller angle
    over = jnp.where(edge, -1, jnp.abs(half)).argmax()
    sign = jnp.where(away[over], 1, -1)
    rest = 1 - box_t * jnp.where((jnp.where(edge, half, 0).sum() > 0) == away[over], 1, -1)
    rest = rest / 2 * jnp.where(edge, across, 0).sum()
    edge_second = sign * jnp.minimum(jnp.minimum(1 - sign * t, across[over]), rest)
    edge_has = (away & ~edge).sum() == 1

    second = jnp.where(corner[k], corner_second, edge_second)
    has_second = jnp.where(corner[k], corner_has, edge_has)
    t = jnp.where(on_face, -1 + 2 * end, t)
    second = jnp.where(on_face, face_second, second)
    return t, second, jnp.where(on_face, outside[end].any(), has_second)


def import_box_colliders():
    """Replace MJX's contacts of spheres and capsules with boxes by MuJoCo's: MJX drops those that
    are apart but within the margin, and has others where a capsule meets an edge of the box."""
    from mujoco.mjx._src.collision_driver import _COLLISION_FUNC
    from mujoco.mjx._src.collision_primitive import collider
    from mujoco.mjx._src.math import make_frame
    from mujoco.mjx._src.types import GeomType

    def contacts(points, radius, box):
        dist, pos, normal = jax.vmap(lambda p: sphere_box(p, radius, box.size))(points)
        return dist, box.pos + pos @ box.mat.T, jax.vmap(make_frame)(normal @ box.mat.T)

    @collider(ncon=1)
    def sphere(ball, box):
        centre = box.mat.T @ (ball.pos - box.pos)
        return jax.tree.map(lambda x: x[0], contacts(centre[None], ball.size[0], box))

    @collider(ncon=2)
    def capsule(cap, box):
        centre, half = box.mat.T @ (cap.pos - box.pos), box.mat.T @ cap.mat[:, 2] * cap.size[1]
        t, step, second = capsule_box(centre, half, box.size)
        points = centre + jnp.stack([t, t + jnp.where(second, step, 0)])[:, None] * half
        dist, pos, frame = contacts(points, cap.size[0], box)
        return dist.at[1].set(jnp.where(second, dist[1], 1.0)), pos, frame

    _COLLISION_FUNC[GeomType.SPHERE, GeomType.BOX] = sphere
    _COLLISION_FUNC[GeomType.CAPSULE, GeomType.BOX] = capsule


class MjxAntMaze(Mjx):
    """OGBench's antmaze-{medium,large,giant} with a fixed task.

    Of the walls, four boxes stand where the ant is: in the 2 x 2 cells around it, as often as the
    engine steps. An ant (1.3 wide to each side) cannot touch another one.
    """

    max_active = 20  # contacts, the deepest ones: nine at once is the most that was ever seen

    def __init__(self, gym_id: str, success_timing: str):
        super().__init__(gym_id)
        import_box_colliders()
        self.success_timing = success_timing
        info = self.official.task_infos[self.official._reward_task_id - 1]
        self.start_xy, self.goal_xy = np.array(info["init_xy"]), np.array(info["goal_xy"])

    def make_model(self):
        import mujoco

        spec = mujoco.MjSpec.from_file(self.official.fullpath)
        walls = [geom for geom in spec.geoms if geom.name.startswith("block_")]
        for geom in walls[4:]:
            spec.delete(geom)
        spec.delete(spec.numeric("init_qpos"))  # MJX would take its first entry for the next one
        spec.add_numeric(name="max_contact_points", size=1, data=[self.max_active])
        model = spec.compile()
        self.tiles = np.array([model.geom(geom.name).id for geom in walls[:4]])
        return model

    def model_at(self, qpos):
        unit = self.official._maze_unit
        corner = jnp.floor((qpos[:2] + self.official._offset_x) / unit).astype(int)
        cells = corner + np.array([(0, 0), (1, 0), (0, 1), (1, 1)])
        wall = jnp.asarray(self.official.maze_map == 1)[cells[:, 1], cells[:, 0]]
        height = jnp.where(wall, self.official._maze_height / 2 * unit, -100.0)  # or out of reach
        xy = cells * unit - self.official._offset_x
        tiles = jnp.concatenate([xy, height[:, None]], axis=1)
        return self.model.replace(geom_pos=self.model.geom_pos.at[self.tiles].set(tiles))

    def initial(self, rng: Any, params: Any = None) -> MjxState:
        state_key, xy_key = jax.random.split(rng)
        state = super().initial(state_key)
        xy = self.start_xy + jax.random.uniform(xy_key, (2,), minval=-1, maxval=1)
        return state._replace(qpos=state.qpos.at[:2].set(xy))

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        new = self.simulate(state, action)
        judged = new if self.success_timing == "post" else state
        distance = jnp.linalg.norm(judged.qpos[:2] - self.goal_xy)
        return new._replace(success=distance <= self.official._goal_tol)

    def observation(self, state, rng=None, params=None):
        return jnp.concatenate([state.qpos, state.qvel])

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.success.astype(jnp.float32) - 1

    def terminal(self, state, rng=None, params=None):
        return state.success

    def success(self, state):
        return state.success


# ==== end shared: mjx ant mazes ====


# ==== shared: data ====
AUTO_COLLECT = 200_000  # transitions collected when a download fails: a minute or two, not an hour
ACTION_LIMIT = 1 - 1e-5  # dataset actions are kept just inside the box


def load_dataset(task, dataset_dir, success_timing):
    """Transitions of a task -> (dict of arrays, source "official" or "collected ...").

    Keys: observations, next_observations (N, D), actions (N, A), rewards, masks (0 after success),
    terminals (1 at an episode's last row), each (N,). Looks for the official file, then for a
    collected one; then downloads; then collects.
    """
    family, maze = task.base.split("-", 1)[0], task.base.split("-")[-1]
    directory = Path(dataset_dir).expanduser()
    official = directory / f"{task.dataset}.npz"
    collected = directory / f"{task.dataset.removesuffix('-v0')}-v0.collected.npz"
    if official.exists():
        raw, source = read_npz(official), "official"
    elif collected.exists():
        raw, source = read_npz(collected), f"collected ({collected.name})"
    elif family == "pointmaze" and maze in MAZES:
        kind = task.dataset.split("-")[2]
        raw = collect_pointmaze(maze, AUTO_COLLECT, dataset_type=kind)
        source = f"collected ({AUTO_COLLECT:,} transitions, in this script)"
    elif download(task.dataset, directory):
        raw, source = read_npz(official), "official"
    else:
        collect(task.dataset, directory)
        raw, source = read_npz(collected), f"collected ({collected.name})"

    keep = np.flatnonzero(~raw["terminals"].astype(bool))  # an episode's last row has no successor
    data = {k: v[keep] for k, v in raw.items() if len(v) == len(raw["terminals"])}
    data["next_observations"] = raw["observations"][keep + 1]
    data["terminals"] = raw["terminals"][keep + 1].astype(np.float32)
    point_maze = family == "pointmaze" and maze in MAZES
    env = PointMaze(maze, task.index) if point_maze else make_host_env(task.gym_id, success_timing)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    if sizes != (data["observations"].shape[1], data["actions"].shape[1]):
        raise UserError(
            f"the dataset belongs to another environment: {task.name} has observations and actions "
            f"of {sizes[0]} and {sizes[1]} entries; put the right {task.dataset}.npz in {directory}"
        )
    if point_maze:  # what OGBench's relabelling does, without building its simulator
        distance = np.linalg.norm(data["qpos"] - env.goal_xy, axis=-1)
        data["masks"] = (distance > env.goal_tol).astype(np.float32)
        data["rewards"] = -data["masks"]
    else:
        from ogbench.relabel_utils import relabel_dataset

        relabel_dataset(task.gym_id, env, data)
        env.close()
    return data, source


def read_npz(path):
    """Read and check a raw OGBench file: observations (N, D), actions (N, A), terminals (N,)."""
    try:
        with np.load(path) as file:
            raw = {k: file[k] for k in file.files if k != "metadata"}
    except Exception as e:
        raise UserError(f"cannot read {path} ({e}); delete it and start again") from e

    def bad(what):
        raise UserError(f"{path}: {what}; delete the file and download or collect it again")

    for key, ndim in (("observations", 2), ("actions", 2), ("terminals", 1), ("qpos", 2)):
        if key not in raw:
            bad(f"no '{key}' in it")
        if raw[key].ndim != ndim or len(raw[key]) != len(raw["terminals"]) or len(raw[key]) < 2:
            bad(f"'{key}' has shape {raw[key].shape}")
        if raw[key].dtype.kind not in "fb" or not np.isfinite(raw[key]).all():
            bad(f"'{key}' is not floating point, or holds NaN or infinity")
    if np.abs(raw["actions"]).max() > 1 + 1e-5:
        bad("actions outside [-1, 1]")
    if not raw["terminals"][-1]:
        bad("the last row does not end an episode, so the file looks cut short")
    return raw


def download(dataset, directory):
    """Fetch an official dataset with OGBench's own downloader -> whether it worked."""
    import ogbench

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        ogbench.download_datasets([dataset], directory)
        return True
    except OSError as e:  # urllib's errors are among them
        print(f"download of {dataset} failed: {e}", flush=True)
        return False
    finally:
        socket.setdefaulttimeout(timeout)


def collect(dataset, directory):
    """Collect a stand-in dataset with benchmark/collect.py, where the script has it beside it."""
    tool = Path(__file__).resolve().parent.parent / "benchmark" / "collect.py"
    if not tool.exists():
        raise UserError(
            f"no dataset {dataset} in {directory} and no download: put {dataset}.npz there, or "
            f"make one with benchmark/collect.py of the CleanFlow repository"
        )
    print(
        f"NOTICE: collecting {AUTO_COLLECT:,} transitions with {tool.name} instead (a small set, "
        f"so that this run starts soon); results are labelled 'collected' and do not compare with "
        f"published ones. For a full-size set: python {tool} {dataset}",
        flush=True,
    )
    command = [sys.executable, str(tool), dataset, "--num-transitions", str(AUTO_COLLECT)]
    if subprocess.run([*command, "--dataset-dir", str(directory)]).returncode:
        raise UserError(f"collecting {dataset} failed; see the message above")


# ==== end shared: data ====


# ==== shared: n-step targets ====
def n_step_targets(rows, index, newest, n, gamma, stride=1):
    """n-step return, bootstrap factor and last row of the windows that start at `index` (M,).

    R = sum_{k<n} gamma^k r_k; a window stops at success (mask 0), at an episode's end and at the
    `newest` row of a ring. `rows` holds rewards, masks, terminals (C,); consecutive rows of an
    episode lie `stride` apart. The target is R + discount * Q(next_obs[last]).
    """
    size = rows["rewards"].shape[0]
    ret, discount = jnp.zeros(index.shape), jnp.ones(index.shape)
    alive, last = jnp.ones(index.shape, bool), index
    for k in range(n):
        row = (index + k * stride) % size
        ret += jnp.where(alive, discount * rows["rewards"][row], 0.0)
        discount = jnp.where(alive, discount * gamma * rows["masks"][row], discount)
        last = jnp.where(alive, row, last)
        ends = (rows["masks"][row] == 0) | (rows["terminals"][row] > 0)
        alive &= ~ends & (row // stride != newest // stride)
    return ret, discount, last


def device_data(data, n, gamma):
    """Put a dataset on the device with its n-step targets worked out once."""
    num_rows = len(data["rewards"])
    rows = {k: jnp.asarray(data[k], jnp.float32) for k in ("rewards", "masks", "terminals")}
    targets = jax.jit(lambda rows, i: n_step_targets(rows, i, num_rows - 1, n, gamma))
    returns, discounts, last = targets(rows, jnp.arange(num_rows))
    actions = np.clip(data["actions"], -ACTION_LIMIT, ACTION_LIMIT)
    return dict(
        obs=jnp.asarray(data["observations"], jnp.float32),
        actions=jnp.asarray(actions, jnp.float32),
        returns=returns,
        discounts=discounts,
        next_obs=jnp.asarray(data["next_observations"], jnp.float32)[last],
    )


# ==== end shared: n-step targets ====


# ==== shared: replay ====
def make_replay(capacity, obs_dim, act_dim):
    """Empty ring of online rows; `added` counts all rows ever written."""
    shapes = dict(obs=(obs_dim,), next_obs=(obs_dim,), actions=(act_dim,))
    shapes |= dict(rewards=(), masks=(), terminals=())
    rows = {k: jnp.zeros((capacity, *shape)) for k, shape in shapes.items()}
    return dict(rows=rows, added=jnp.zeros((), jnp.int32))


def insert(replay, new_rows):
    """Write E rows (dict of (E, ...)) at the ring's pointer; the capacity is a multiple of E."""
    num_rows = new_rows["rewards"].shape[0]
    start = replay["added"] % replay["rows"]["rewards"].shape[0]

    def write(ring, new):
        return jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), start, axis=0)

    rows = jax.tree.map(write, replay["rows"], new_rows)
    return dict(rows=rows, added=replay["added"] + num_rows)


# ==== end shared: replay ====


def sample(key, data, replay, batch_size, n, gamma, buffer_size, stride=1, balanced=False):
    """Batch of obs, actions, returns, discounts, next_obs, i.i.d. with replacement.

    Without a replay: uniform over the dataset. With one: uniform over both as one first-in
    first-out pool of `buffer_size` rows (dataset rows leave first, and it always holds the dataset
    and one row more), or half dataset and half online rows if `balanced`.
    """
    num_data = data["returns"].shape[0]
    if replay is None:
        index = jax.random.randint(key, (batch_size,), 0, num_data)
        return {k: v[index] for k, v in data.items()}
    rows, added = replay["rows"], replay["added"]
    capacity = rows["rewards"].shape[0]
    num_online = jnp.minimum(added, capacity)
    dropped = jnp.clip(num_data + added - max(buffer_size, num_data + 1), 0, num_data)
    num_live = num_data - dropped
    draw_key, part_key = jax.random.split(key)
    if balanced:
        online = (jnp.arange(batch_size) < batch_size // 2) & (added > 0)
        offline_index = jax.random.randint(draw_key, (batch_size,), 0, num_data)
        online_index = jax.random.randint(part_key, (batch_size,), 0, jnp.maximum(num_online, 1))
    else:
        draw = jax.random.randint(draw_key, (batch_size,), 0, num_live + num_online)
        online = draw >= num_live
        offline_index, online_index = dropped + draw, draw - num_live
    offline_index = jnp.clip(offline_index, 0, num_data - 1)
    online_index = jnp.clip(online_index, 0, capacity - 1)
    newest = (added - 1) % capacity
    returns, discounts, last = n_step_targets(rows, online_index, newest, n, gamma, stride)
    new = dict(
        obs=rows["obs"][online_index],
        actions=rows["actions"][online_index],
        returns=returns,
        discounts=discounts,
        next_obs=rows["next_obs"][last],
    )

    def pick(new, old):
        return jnp.where(online.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return {k: pick(new[k], data[k][offline_index]) for k in new}


# ---- multi-crescent, the paper's toy task ----
ANGLES = np.arange(6) * np.pi / 3
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)
OFFSETS = np.array([(0.2828, 0), (0.2, 0.2), (-0.2, 0.2), (-0.2828, 0), (-0.2, -0.2), (0.2, -0.2)])
VALUES = np.array([10.0, 15.0, 5.0, 10.0, 15.0, 5.0])


def crescent_value(points):
    """Value of the crescent that contains each point (they never overlap), 0 outside of all."""
    points = jnp.asarray(points)[..., None, :]
    in_disc = jnp.linalg.norm(points - CENTRES, axis=-1) < 0.4
    in_bite = jnp.linalg.norm(points - CENTRES - OFFSETS, axis=-1) <= 0.4
    return jnp.where(in_disc & ~in_bite, VALUES, 0.0).max(-1)


def crescent_reward(action):
    return crescent_value(jnp.clip(action, -1, 1))


class MultiCrescentState(NamedTuple):
    value: jax.Array  # reward of the last transition
    done: jax.Array


class MultiCrescent(FuncEnv):
    """GSFlow's toy: a one-step bandit whose rewards lie on six thin crescents on a circle.

    10 is the best reward in the dataset (right and left), 15 (top right, bottom left) is not in it.
    """

    max_episode_steps = 1

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def initial(self, rng: Any, params: Any = None) -> MultiCrescentState:
        return MultiCrescentState(jnp.zeros(()), jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None) -> MultiCrescentState:
        return MultiCrescentState(crescent_reward(action), jnp.asarray(True))

    def observation(self, state, rng=None, params=None):
        return jnp.zeros(2)

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.value

    def terminal(self, state, rng=None, params=None):
        return state.done

    def success(self, state):
        return state.value >= 10


def crescent_dataset(seed: int) -> dict:
    """Points scattered around the four crescents worth 5 and 10, kept where they hit a crescent."""
    rng = np.random.default_rng(seed)
    centres = CENTRES[[0, 2, 3, 5]]
    points = (centres[:, None] + np.sqrt(0.02) * rng.standard_normal((4, 500, 2))).reshape(-1, 2)
    kept = rng.permutation(points[np.asarray(crescent_value(points)) > 0])
    rewards = np.asarray(crescent_reward(kept), np.float32)
    zeros, ones = np.zeros((len(kept), 2), np.float32), np.ones(len(kept), np.float32)
    return dict(
        observations=zeros,
        actions=np.clip(kept, -(1 - 1e-5), 1 - 1e-5).astype(np.float32),
        rewards=rewards,
        masks=1 - ones,
        terminals=ones,
        next_observations=zeros.copy(),
    )


# ---- networks ----
class MLP(nn.Module):
    """Dense layers with activation (then LayerNorm, if asked for) and a linear head."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    layer_norm: bool = False
    activation: Callable = nn.gelu  # the tanh form
    kernel_init: Callable = nn.initializers.glorot_uniform()
    bias_init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden_dims:
            x = self.activation(nn.Dense(width, kernel_init=self.kernel_init)(x))
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return nn.Dense(self.out_dim, kernel_init=self.kernel_init)(x) if self.out_dim else x


class Critic(nn.Module):
    """Two independent Q functions with stacked parameters: (obs, action) -> (2, B)."""

    hidden_dims: tuple[int, ...]
    layer_norm: bool

    @nn.compact
    def __call__(self, obs, actions):
        members = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=2,
        )
        return members(self.hidden_dims, 1, self.layer_norm)(obs, actions).squeeze(-1)


class GaussianStudent(nn.Module):
    """(obs, noise) -> mean and clipped log standard deviation of the action before tanh."""

    hidden_dims: tuple[int, ...]
    act_dim: int
    layer_norm: bool
    head_scale: float
    log_std_min: float
    log_std_max: float

    @nn.compact
    def __call__(self, obs, noise):
        x = MLP(self.hidden_dims, 0, self.layer_norm)(obs, noise)
        init = nn.initializers.variance_scaling(self.head_scale, "fan_avg", "uniform")
        mu = nn.Dense(self.act_dim, kernel_init=init)(x)
        log_std = nn.Dense(self.act_dim, kernel_init=init)(x)
        return mu, jnp.clip(log_std, self.log_std_min, self.log_std_max)


class Encoder(nn.Module):
    """(obs, noise) -> mean and log standard deviation of the latent."""

    hidden_dims: tuple[int, ...]
    latent_dim: int

    @nn.compact
    def __call__(self, obs, noise):
        init = nn.initializers.lecun_normal()
        out = MLP(self.hidden_dims, 2 * self.latent_dim, False, nn.relu, init)(obs, noise)
        return jnp.split(out, 2, axis=-1)


class Networks(NamedTuple):
    """The method's functions of (params, inputs); tests put hand-made ones in their place."""

    critic: Callable  # (params, obs, action) -> (2, B)
    velocity: Callable  # (params, obs, x_t, t (B, 1)) -> (B, A)
    student: Callable  # (params, obs, x) -> (mu, log_std), each (B, A); deterministic: mu alone
    encoder: Callable | None = None  # (params, obs, x) -> (mean, log_std), each (B, L)
    decoder: Callable | None = None  # (params, obs, z) -> x (B, A)


def make_modules(args, act_dim):
    """Flax modules of the settings in `args`; only those that these settings train."""
    actor = (args.actor_hidden_dims, act_dim, args.actor_layer_norm)
    modules = dict(
        critic=Critic(args.critic_hidden_dims, args.critic_layer_norm),
        velocity=MLP(*actor),
        student=MLP(*actor),
    )
    if args.student == "gaussian":
        clip = (args.log_std_min, args.log_std_max)
        modules["student"] = GaussianStudent(*actor, args.student_head_scale, *clip)
    if args.prior == "cvae":
        init = nn.initializers.lecun_normal()
        modules["encoder"] = Encoder(args.prior_hidden_dims, args.latent_dim)
        modules["decoder"] = MLP(args.prior_hidden_dims, act_dim, False, nn.relu, init)
    return modules


def make_networks(args, act_dim):
    """The modules as plain functions."""
    return Networks(**{k: m.apply for k, m in make_modules(args, act_dim).items()})


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters, one entry per group: critic, velocity, student, ..."""
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, act_dim))
    inputs = dict(
        critic=(obs, action),
        velocity=(obs, action, jnp.zeros((1, 1))),
        student=(obs, action),
        encoder=(obs, action),
        decoder=(obs, jnp.zeros((1, args.latent_dim))),
    )
    modules = make_modules(args, act_dim)
    keys = jax.random.split(key, len(modules))
    params = {n: m.init(k, *inputs[n]) for (n, m), k in zip(modules.items(), keys, strict=True)}
    if args.student == "gaussian":
        params["log_temperature"] = jnp.log(jnp.float32(args.init_temperature))
    return params


# ---- the method: sampling ----
def squashed_sample(mu, log_std, temperature, key):
    """u = mu + T sigma eps -> (action tanh(u), u). T = 0 gives the mode."""
    u = mu + temperature * jnp.exp(log_std) * jax.random.normal(key, mu.shape)
    return jnp.tanh(u), u


def squashed_log_prob(u, mu, log_std):
    """log pi of a = tanh(u), summed over action dimensions, stable for any u: (..., A) -> (...)."""
    gaussian = -0.5 * ((u - mu) * jnp.exp(-log_std)) ** 2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return (gaussian - 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))).sum(axis=-1)


def sample_prior(params, nets, obs, act_dim, latent_dim, key):
    """Noise for teacher and student: decoded latents, or N(0, I) where there is no decoder."""
    if nets.decoder is None:
        return jax.random.normal(key, (*obs.shape[:-1], act_dim))
    z = jax.random.normal(key, (*obs.shape[:-1], latent_dim))
    return nets.decoder(params["decoder"], obs, z)


def sample_action(params, nets, args, obs, x, temperature, key):
    """One action per row and its log-probability (None for the deterministic student)."""
    if args.student == "deterministic":
        return jnp.clip(nets.student(params["student"], obs, x), -1, 1), None
    mu, log_std = nets.student(params["student"], obs, x)
    action, u = squashed_sample(mu, log_std, temperature, key)
    # the density is that of T * sigma; at T = 0 there is none, and nothing may use it
    log_prob = squashed_log_prob(u, mu, log_std + jnp.log(jnp.maximum(temperature, 1e-8)))
    return jnp.clip(action, -1, 1), log_prob


def flow_endpoint(params, nets, obs, x, flow_steps):
    """Teacher's map F(s, x): Euler steps at t = 0, 1/K, ..., clipped once at the end."""

    def euler_step(x, k):
        t = jnp.full((*x.shape[:-1], 1), k / flow_steps)
        return x + nets.velocity(params["velocity"], obs, x, t) / flow_steps, None

    x, _ = jax.lax.scan(euler_step, x, jnp.arange(flow_steps))
    return jnp.clip(x, -1, 1)


def aggregate(q, how):
    """Join the two critics' values: (2, ...) -> (...)."""
    return q.min(axis=0) if how == "min" else q.mean(axis=0)


def select_noise(params, nets, obs, noises, actions, how):
    """Among candidates (N, B, A), the noise (B, A) whose action the critic likes best."""
    obs = jnp.broadcast_to(obs, (noises.shape[0], *obs.shape))
    q = aggregate(nets.critic(params["critic"], obs, actions), how)
    best = q.argmax(axis=0)  # the first one on ties
    return jnp.take_along_axis(noises, best[None, :, None], axis=0)[0]


# ---- the method: losses ----
def critic_loss(params, nets, batch, target):
    """Mean squared TD error against the fixed target (B,)."""
    q = nets.critic(params["critic"], batch["obs"], batch["actions"])
    loss = jnp.mean((q - target) ** 2)
    return loss, {"critic_loss": loss, "q": q.mean(), "td_target": target.mean()}


def flow_loss(params, nets, batch, x0, t):
    """Teacher: flow matching on straight paths from N(0, I) to the data; t is (B, 1)."""
    x_t = (1 - t) * x0 + t * batch["actions"]
    velocity = nets.velocity(params["velocity"], batch["obs"], x_t, t)
    loss = jnp.mean((velocity - (batch["actions"] - x0)) ** 2)
    return loss, {"flow_loss": loss}


def prior_loss(params, nets, args, batch, x_adv, latent_noise):
    """Q-guided prior: CVAE that reproduces the noise the critic chose."""
    mean, log_std = nets.encoder(params["encoder"], batch["obs"], x_adv)
    z = mean + jnp.exp(log_std) * latent_noise
    x_rec = nets.decoder(params["decoder"], batch["obs"], z)
    recon = jnp.mean((x_rec - x_adv) ** 2)
    kl = -0.5 * jnp.mean(1 + 2 * log_std - mean**2 - jnp.exp(2 * log_std))
    loss = args.recon_weight * recon + args.kl_weight * kl
    return loss, {"prior_loss": loss, "prior_recon": recon, "prior_kl": kl}


def student_loss(params, nets, args, batch, x, teacher_action, alpha, key):
    """Distillation to the teacher, up the critic, entropy; one noise x for all three."""
    frozen = jax.lax.stop_gradient(params)
    obs = batch["obs"]
    if args.student == "gaussian":
        mu, log_std = nets.student(params["student"], obs, x)
        action, u = squashed_sample(mu, log_std, 1.0, key)
        log_prob = squashed_log_prob(u, mu, log_std)
        distill = jnp.mean((jnp.tanh(mu) - teacher_action) ** 2)  # the mode, not the sample
        entropy_term = jnp.exp(frozen["log_temperature"]) * log_prob.mean()
        info = {"entropy": -log_prob.mean(), "student_std": jnp.exp(log_std).mean()}
    else:
        action = nets.student(params["student"], obs, x)
        distill = jnp.mean((action - teacher_action) ** 2)  # before the clip
        entropy_term, info = 0.0, {}
    q = nets.critic(frozen["critic"], obs, jnp.clip(action, -1, 1))
    q_term = -q.mean()  # always the mean of both critics
    if args.normalize_q_loss:
        q_term = q_term / jax.lax.stop_gradient(jnp.abs(q.mean(axis=0)).mean())
    loss = alpha * distill + q_term + entropy_term
    return loss, {"student_loss": loss, "distill_loss": distill, "student_q": q.mean(), **info}


def temperature_loss(params, entropy, target_entropy):
    """Raise alpha2 while the entropy is below its target, lower it above."""
    temperature = jnp.exp(params["log_temperature"])
    loss = temperature * jax.lax.stop_gradient(entropy - target_entropy)
    return loss, {"temperature_loss": loss, "temperature": temperature}


# ---- the method: one update ----
@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Keys are functions of (seed, step), so none is stored."""

    params: Any
    target_critic: Any
    opt_state: Any
    obs_mean: jax.Array
    obs_std: jax.Array
    seed: jax.Array
    step: jax.Array


class PhaseSettings(NamedTuple):
    """What differs between the phases; traced, so that a switch recompiles nothing."""

    alpha: jax.Array
    td_temperature: jax.Array


def optimizer(args):
    """Adam without clipping, decay or schedule."""
    return optax.adam(args.learning_rate)


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    return TrainState(
        params=params,
        target_critic=params["critic"],
        opt_state=optimizer(args).init(params),
        obs_mean=obs_mean,
        obs_std=obs_std,
        seed=seed,
        step=jnp.zeros((), jnp.int32),
    )


DRAWS = ("td_prior", "td_action", "flow_noise", "flow_time", "student_prior", "student_action")
DRAWS += ("candidates", "latent")


def update(state, batch, key, settings, nets, args):
    """One joint step of critic, teacher, prior, student and temperature, then the target critic.

    batch: obs, next_obs (B, D), actions (B, A), returns, discounts (B,); see `sample`.
    """
    keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
    params = state.params
    obs, next_obs = batch["obs"], batch["next_obs"]
    shape = batch["actions"].shape
    noise_args = (shape[-1], args.latent_dim)

    # TD target: current student and decoder, target critic
    x_next = sample_prior(params, nets, next_obs, *noise_args, keys["td_prior"])
    next_action, next_log_prob = sample_action(
        params, nets, args, next_obs, x_next, settings.td_temperature, keys["td_action"]
    )
    next_q = aggregate(nets.critic(state.target_critic, next_obs, next_action), args.q_agg)
    if args.soft_backup:
        next_q -= jnp.exp(params["log_temperature"]) * next_log_prob
    target = batch["returns"] + batch["discounts"] * next_q

    # Teacher's actions for the student's noise and for the candidates: one chain of Euler steps
    x = sample_prior(params, nets, obs, *noise_args, keys["student_prior"])
    if args.prior == "cvae":
        candidates = jax.random.normal(keys["candidates"], (args.num_candidates, *shape))
        noises = jnp.concatenate([x[None], candidates])
        stacked_obs = jnp.broadcast_to(obs, (*noises.shape[:2], obs.shape[-1]))
        actions = flow_endpoint(params, nets, stacked_obs, noises, args.flow_steps)
        teacher_action = actions[0]
        x_adv = select_noise(params, nets, obs, candidates, actions[1:], args.candidate_q_agg)
    else:
        teacher_action = flow_endpoint(params, nets, obs, x, args.flow_steps)

    def total_loss(params):
        x0 = jax.random.normal(keys["flow_noise"], shape)
        t = jax.random.uniform(keys["flow_time"], (shape[0], 1))
        losses = [
            critic_loss(params, nets, batch, target),
            flow_loss(params, nets, batch, x0, t),
            student_loss(
                params, nets, args, batch, x, teacher_action, settings.alpha, keys["student_action"]
            ),
        ]
        if args.student == "gaussian":
            losses += [temperature_loss(params, losses[2][1]["entropy"], args.target_entropy)]
        if args.prior == "cvae":
            latent_noise = jax.random.normal(keys["latent"], (shape[0], args.latent_dim))
            losses += [prior_loss(params, nets, args, batch, x_adv, latent_noise)]
        info = functools.reduce(lambda a, b: a | b, (info for _, info in losses))
        return sum(loss for loss, _ in losses), info

    grads, info = jax.grad(total_loss, has_aux=True)(params)
    updates, opt_state = optimizer(args).update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    target_critic = optax.incremental_update(params["critic"], state.target_critic, args.tau)
    state = state.replace(
        params=params, target_critic=target_critic, opt_state=opt_state, step=state.step + 1
    )
    return state, info


def policy(state, obs, key, temperature, nets, args, act_dim):
    """act(s; T) for one raw observation (D,) -> action (A,)."""
    prior_key, action_key = jax.random.split(key)
    obs = (obs - state.obs_mean) / state.obs_std
    x = sample_prior(state.params, nets, obs, act_dim, args.latent_dim, prior_key)
    return sample_action(state.params, nets, args, obs, x, temperature, action_key)[0]


# ==== shared: runs ====
PURPOSES = ("init", "update", "act", "env", "eval")
MAGIC = b"CLEANFLOW1"
FREE_ON_RESUME = ("offline_steps", "online_steps", "eval_interval", "eval_episodes")
FREE_ON_RESUME += ("checkpoint_interval", "resume", "evaluate")
# FREE_ALSO, a script's own, are free until its online phase has begun; with --evaluate env_backend
# and EVALUATION_FLAGS, also its own, are


def purpose_key(seed, purpose, *numbers):
    """Random key of one purpose: a function of the seed and, say, the step, so none is stored."""
    key = jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def place(tree, num_seeds, copy=False):
    """Put arrays on the device; on several devices split them by their leading seed axis, or give
    each device a copy (`copy`), where the seeds divide evenly."""
    devices = jax.devices()
    if len(devices) == 1 or num_seeds % len(devices):
        return jax.device_put(tree, devices[0])
    mesh = jax.sharding.Mesh(np.array(devices), ("seeds",))
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P() if copy else jax.P("seeds")))


class Program:
    """`step(carry, *inputs)` n times for all seeds in one dispatch: program(carry, n) -> carry.

    The inputs (dataset, settings) are arguments of the compiled code, shared by the seeds; the
    carry is overwritten. Compiles at the first call and keeps the seconds that took.
    """

    def __init__(self, step, *inputs):
        self.step, self.inputs, self.executable, self.seconds = step, inputs, None, 0.0

    def compile(self, carry, n):
        def repeat(carry, n, *inputs):
            return jax.lax.fori_loop(0, n, lambda i, c: self.step(c, *inputs), carry)

        def one_seed(carry, *inputs):  # an axis of one can cost XLA's CPU code twice the time
            carry = repeat(jax.tree.map(lambda x: x[0], carry), *inputs)
            return jax.tree.map(lambda x: x[None], carry)

        start = time.perf_counter()
        over_seeds = jax.vmap(repeat, in_axes=(0, *[None] * (len(self.inputs) + 1)))
        over_seeds = one_seed if len(jax.tree.leaves(carry)[0]) == 1 else over_seeds
        layout = jax.tree.map(lambda x: x.sharding, carry)  # stays as it is
        program = jax.jit(over_seeds, donate_argnums=0, out_shardings=layout)
        self.executable = program.lower(carry, n, *self.inputs).compile()
        self.seconds = time.perf_counter() - start

    def __call__(self, carry, n):
        n = jnp.int32(n)
        if self.executable is None:
            self.compile(carry, n)
        return self.executable(carry, n, *self.inputs)


def zero_sums(metrics):
    """Running sums of an update's metrics and of finished episodes, for one seed."""
    zeros = {k: jnp.zeros(()) for k in ("count", "episodes", "return", "success")}
    return zeros | {"train": {k: jnp.zeros(()) for k in metrics}}


def add_sums(sums, metrics):
    """Add one update's metrics; the sums are fetched once per dispatch."""
    train = jax.tree.map(jnp.add, sums["train"], metrics)
    return sums | {"train": train, "count": sums["count"] + 1}


def add_episodes(sums, returns, done, success):
    """Add the episodes that ended in the online phase; returns, done, success are (E,)."""
    done = done.astype(jnp.float32)
    ended = {"episodes": done, "success": done * success, "return": done * returns}
    return sums | {k: sums[k] + v.sum() for k, v in ended.items()}


def write_file(path, content, keep_previous=False):
    """Write bytes so that a crash at any moment leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, path.with_suffix(".previous"))
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {e.strerror}; free some space, then --resume {path.parent}"
        ) from e


def save_checkpoint(run_dir, carry, facts):
    """Everything that training changes, with a checksum; the one before stays beside it."""
    tree = flax.serialization.to_state_dict(jax.device_get(carry))
    body = flax.serialization.msgpack_serialize({"facts": json.dumps(facts), "carry": tree})
    content = MAGIC + hashlib.sha256(body).digest() + body
    write_file(run_dir / "checkpoint.msgpack", content, keep_previous=True)


def load_checkpoint(run_dir):
    """Newest intact checkpoint of a run -> (nested dict of arrays, facts)."""
    newest = Path(run_dir) / "checkpoint.msgpack"
    for path in (newest, newest.with_suffix(".previous")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        digest, body = content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
        if content.startswith(MAGIC) and hashlib.sha256(body).digest() == digest:
            stored = flax.serialization.msgpack_restore(body)
            return stored["carry"], json.loads(stored["facts"])
        print(f"NOTICE: {path} is damaged; looking for the one before it", file=sys.stderr)
    raise UserError(f"no intact checkpoint in {run_dir}: give the directory of a run")


def restore(template, tree, run_dir):
    """Put a loaded checkpoint into the structure, shapes and device layout of `template`.

    A replay's ring may have become longer, for more online steps; it then has not wrapped yet.
    """

    def lengthen(ring, longer):
        missing = max(0, longer.shape[1] - ring.shape[1])
        return np.pad(ring, [(0, 0), (0, missing), *[(0, 0)] * (ring.ndim - 2)])

    try:
        if "replay" in tree and "replay" in template:
            rows = jax.tree.map(lengthen, tree["replay"]["rows"], template["replay"]["rows"])
            tree["replay"]["rows"] = rows
        loaded = flax.serialization.from_state_dict(template, tree)
        fits = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype, template, loaded
        )
        if not all(jax.tree.leaves(fits)):
            raise ValueError("shapes differ")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"the checkpoint in {run_dir} does not fit its args.json: {e}") from e
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), loaded, template)


def read_args(run_dir, argv, default):
    """Arguments of an earlier run, plus the flags given now; refuses what may not change."""
    path = Path(run_dir) / "args.json"
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no args.json")
    try:
        stored = json.loads(path.read_text())
        known = {f.name: stored["args"][f.name] for f in dataclasses.fields(default)}
        algo = stored["algo"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged or of another version ({e}); start a new run") from e
    if algo != ALGO:
        raise UserError(f"{run_dir} is a run of {algo}.py; use that script")
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    before = dataclasses.replace(default, **known)
    args = tyro.cli(type(default), args=argv, default=before)
    for name, new in vars(args).items():
        old = getattr(before, name)
        free = name in FREE_ON_RESUME and not (name == "offline_steps" and before.online_steps)
        free = free or (name in FREE_ALSO and not before.online_steps)
        free = free or (args.evaluate and name in ("env_backend", *EVALUATION_FLAGS))
        if old != new and not free:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} was {old} in {run_dir} and cannot change; start a new run")
    return args


class Run:
    """A run directory: args.json, metrics.csv, TensorBoard events, checkpoint, result.json."""

    def __init__(self, args, task, dataset_source, data, policies, step=0):
        self.seeds = [args.seed + i for i in range(args.num_seeds)]
        self.step, self.evals, self.csv, self.columns = step, [], None, None
        self.metrics = metric_names(task, policies)  # of an evaluation; the first is the headline
        self.train_seconds, self.updates_per_s = 0.0, 0.0
        packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "ogbench", "mujoco")
        commit, git = "", ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        if shutil.which("git"):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        checksum = None  # of data from a file, which may be another one when the run is resumed
        if dataset_source == "official" or ".npz" in dataset_source:
            names = ("observations", "actions", "rewards")
            checksum = functools.reduce(
                lambda crc, k: zlib.crc32(np.ascontiguousarray(data[k]), crc), names, 0
            )
        self.facts = dict(
            algo=ALGO,
            task=task.name,
            dataset_source=dataset_source,
            dataset_crc32=checksum,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            commit=commit or None,
            versions={p: importlib.metadata.version(p) for p in packages},
            args=dataclasses.asdict(args),
        )
        if args.resume:
            self.dir = Path(args.resume)
            before = json.loads((self.dir / "args.json").read_text())
            if before.get("dataset_crc32") != checksum:
                raise UserError(
                    f"{self.dir} was started on other data ({before.get('dataset_source')}): put "
                    f"that file back, or start a new run"
                )
            self.cut_metrics()
        else:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            name = task.name.removesuffix("-v0").replace("/", "-")
            name = f"{name}__{ALGO}__{args.seed}__{stamp}"
            self.dir = Path(args.out_dir) / name
            while self.dir.exists():
                self.dir = self.dir.with_name(self.dir.name + "x")
            try:
                self.dir.mkdir(parents=True)
            except OSError as e:
                raise UserError(f"cannot create {self.dir}: {e.strerror}; choose --out-dir") from e
        self.write_json("args.json", self.facts)

    def write_json(self, name, content):
        write_file(self.dir / name, (json.dumps(content, indent=2) + "\n").encode())

    def cut_metrics(self):
        """On resume, drop the rows after the checkpoint: they will be written again."""
        path = self.dir / "metrics.csv"
        if not path.is_file():
            return
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [r for r in reader if None not in r.values() and int(r["step"]) <= self.step]
            self.columns = reader.fieldnames
        lines = [self.columns, *[r.values() for r in rows]]
        write_file(path, "".join(",".join(line) + "\n" for line in lines).encode())
        headline = f"eval/{self.metrics[0]}"
        evals = [float(r[headline]) for r in rows if r[headline]]
        self.evals = np.reshape(evals, (-1, len(self.seeds))).tolist()
        self.train_seconds = float(rows[-1]["time/train_seconds"]) if rows else 0.0

    def log(self, phase, values):
        """One CSV row and TensorBoard point per seed; values are (num_seeds,) or scalars."""
        try:
            if self.csv is None:
                from tensorboard.summary import Writer

                self.columns = self.columns or ["step", "phase", "seed", *values]
                self.csv = open(self.dir / "metrics.csv", "a", newline="")  # noqa: SIM115
                self.writers = [Writer(str(self.dir / f"tb_seed{s}")) for s in self.seeds]
            table = csv.DictWriter(self.csv, self.columns)
            if self.csv.tell() == 0:
                table.writeheader()
            for i, seed in enumerate(self.seeds):
                row = {k: float(np.broadcast_to(v, len(self.seeds))[i]) for k, v in values.items()}
                row = {k: v for k, v in row.items() if not np.isnan(v)}  # nothing to report yet
                table.writerow(dict(step=self.step, phase=phase, seed=seed, **row))
                for name, value in row.items():
                    self.writers[i].add_scalar(name, value, self.step)
            self.csv.flush()
        except OSError as e:
            raise UserError(
                f"cannot write metrics: {e.strerror}; free some space, then --resume {self.dir}"
            ) from e

    def header(self, data):
        """Show what is about to run: the data, the machine and the resolved arguments."""
        facts, args = self.facts, self.facts["args"]
        print(f"{ALGO} on {facts['task']}, {facts['device']}, run directory {self.dir}")
        if data is not None:
            rows, episodes = len(data["rewards"]), int(data["terminals"].sum())
            print(
                f"dataset: {facts['dataset_source']}, {rows:,} transitions, {episodes:,} episodes, "
                f"{(data['masks'] == 0).mean():.2%} of the rows at the goal"
            )
        fields = "  ".join(f"{k}={v}" for k, v in args.items() if v is not None)
        print(textwrap.fill(fields, 100, initial_indent="  ", subsequent_indent="  "), flush=True)

    def finish(self, results):
        """Write result.json and print the same figures as the last line."""
        last_three = float(np.mean(self.evals[-3:]))
        facts = {k: self.facts[k] for k in ("dataset_source", "device", "commit")}
        result = {f"eval/{k}": float(v.mean()) for k, v in results.items()}
        result |= {f"eval/{self.metrics[0]}_last_three": last_three, "steps": self.step, **facts}
        result |= {"train_seconds": self.train_seconds, "updates_per_s": self.updates_per_s}
        result |= {"seeds": self.seeds, "episodes": {k: v.tolist() for k, v in results.items()}}
        self.write_json("result.json", result)
        print(
            f"done: {summary(results)}  last three evaluations {last_three:.2f}  "
            f"steps {self.step:,}  train_seconds {self.train_seconds:.0f}  updates_per_s "
            f"{self.updates_per_s:.1f}  dataset {facts['dataset_source']}  in {self.dir}"
        )


def metric_names(task, policies):
    """What one evaluation measures: success (where the task has it), return and length by mode."""
    kinds = ("success", "return", "length") if task.success else ("return", "length")
    return [f"{kind}_{mode}".rstrip("_") for mode in policies for kind in kinds]


def summary(results):
    """Mean over seeds and episodes, with the deviation over seeds where there are several."""
    parts = []
    for name, values in results.items():
        per_seed = values.mean(axis=1)
        spread = f" ± {per_seed.std():.2f}" if len(per_seed) > 1 else ""
        parts.append(f"{name} {per_seed.mean():.2f}{spread}")
    return "  ".join(parts)


class StopSignal:
    """First Ctrl-C or SIGTERM: finish the dispatch and checkpoint. Second: stop at once."""

    def __init__(self):
        self.number = None
        signal.signal(signal.SIGINT, self)
        signal.signal(signal.SIGTERM, self)

    def __call__(self, number, frame):
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        print("\nstopping soon; once more to stop at once", file=sys.stderr, flush=True)


class Phase(NamedTuple):
    """A stretch of training: `advance(carry, n)` does n iterations of `stride` steps each."""

    name: str
    start: int
    end: int
    enter: Callable  # carry of the phase before -> carry of this one
    advance: Callable
    stride: int = 1
    restart: Callable | None = None  # host environments begin new episodes at each checkpoint


def train_loop(run, carry, phases, evaluate, args):
    """Run the phases; log, evaluate and checkpoint between dispatches. Returns the last evaluation.

    A dispatch lasts about a second, so that the bar moves and Ctrl-C is heard. What is computed and
    logged does not depend on how long dispatches are.
    """
    intervals = (args.updates_per_dispatch, args.eval_interval, args.checkpoint_interval)
    stop, saved = StopSignal(), run.step
    if run.step >= phases[-1].end:
        if (run.dir / "result.json").exists():
            raise UserError(
                f"{run.dir} is complete at step {run.step:,}: give more steps or --evaluate"
            )
        return evaluate(carry["state"], run.step)  # stopped between the last checkpoint and this

    for phase in (p for p in phases if run.step < p.end):
        if run.step == phase.start:
            carry = phase.enter(carry)
        quiet = not sys.stderr.isatty()
        bar = tqdm(total=phase.end, initial=run.step, desc=phase.name, unit="step", disable=quiet)
        rate, log_seconds, said = 8.0, 0.0, time.perf_counter()
        while run.step < phase.end:
            target = min([phase.end] + [(run.step // m + 1) * m for m in intervals])
            n = max(1, min(-(-(target - run.step) // phase.stride), int(rate)))
            compiled, start = phase.advance.seconds, time.perf_counter()
            carry = phase.advance(carry, n)
            sums = jax.device_get(carry["sums"])
            compiling = phase.advance.seconds - compiled
            if compiling:
                tqdm.write(f"{phase.name}: compiled in {compiling:.1f} s")
            seconds = time.perf_counter() - start - compiling
            before, run.step, rate = run.step, run.step + n * phase.stride, n / seconds
            run.train_seconds, log_seconds = run.train_seconds + seconds, log_seconds + seconds
            bar.update(run.step - before)
            if quiet and time.perf_counter() - said > 10:  # not a terminal: lines, not a bar
                said, speed = time.perf_counter(), rate * phase.stride
                eta = (phase.end - run.step) / speed
                print(f"{phase.name} {run.step:,}/{phase.end:,}  {speed:,.1f}/s  ETA {eta:,.0f} s")
            broken = [k for k, v in sums["train"].items() if not np.isfinite(v).all()]
            if broken:
                raise UserError(
                    f"training diverged before step {run.step:,}: {', '.join(broken)} not finite; "
                    f"step {saved:,} is the last good one in {run.dir}; try a lower --learning-rate"
                )

            log, evaluation, checkpoint = (
                run.step // m > before // m or run.step >= phase.end for m in intervals
            )
            if log or evaluation:
                count, episodes = np.maximum(sums["count"], 1), np.maximum(sums["episodes"], 1)
                run.updates_per_s = float(sums["count"].flat[0] / log_seconds)
                values = {f"train/{k}": v / count for k, v in sums["train"].items()}
                for name in ("return", "success"):
                    mean = np.where(sums["episodes"] > 0, sums[name] / episodes, np.nan)
                    values[f"online/{name}"] = mean
                values["time/updates_per_s"] = run.updates_per_s
                values["time/train_seconds"] = run.train_seconds
                values["time/compile_s"] = phase.advance.seconds
                if "recent" in carry:  # the last episodes' returns, as many as there were
                    recent = np.asarray(carry["recent"])
                    known = np.maximum((~np.isnan(recent)).sum(axis=1), 1)
                    mean = np.where(np.isnan(recent[:, 0]), np.nan, np.nansum(recent, 1) / known)
                    values["charts/episodic_return"] = mean
                values |= {f"eval/{k}": np.nan for k in run.metrics}
                zeros = jax.tree.map(jnp.zeros_like, carry["sums"])
                carry, log_seconds = carry | {"sums": place(zeros, args.num_seeds)}, 0.0
            if evaluation:
                results = evaluate(carry["state"], run.step)
                values |= {f"eval/{k}": v.mean(axis=1) for k, v in results.items()}
                run.evals.append(results[run.metrics[0]].mean(axis=1).tolist())
                tqdm.write(f"{phase.name} step {run.step:>9,}  {summary(results)}")
            if log or evaluation:
                run.log(phase.name, values)
            stopping = stop.number is not None and run.step < phases[-1].end
            if checkpoint or (stopping and phase.restart is None):
                carry = phase.restart(carry) if phase.restart else carry
                save_checkpoint(run.dir, carry, dict(step=run.step))
                saved = run.step
            if stopping:
                bar.close()
                print(f"stopped; --resume {run.dir} continues at {saved:,}", file=sys.stderr)
                raise SystemExit(128 + stop.number)
        bar.close()
    return results


def make_evaluate(task, env, policies, args):
    """Function (state of all seeds, step) -> {metric: (num_seeds, episodes)} of one evaluation.

    `policies` maps each mode to `policy(state, obs (D,), key) -> (H * A,)`, the actions of the next
    H steps; a mode's metrics end in its name. `env` is the JAX environment or None (official).
    """
    seeds = [args.seed + i for i in range(args.num_seeds)]
    slots = max(1, min(args.eval_episodes, (os.cpu_count() or 1) // args.num_seeds))

    @functools.cache  # made at the first evaluation and kept
    def host_envs():
        disabled = gymnasium.vector.AutoresetMode.DISABLED
        timing = args.success_timing if task.dataset else None
        return make_host_envs(task.gym_id, timing, slots * args.num_seeds, disabled)

    def run_jax(policy, state, step):
        key = purpose_key(state.seed, "eval", step)
        return evaluate_jax(env, functools.partial(policy, state), key, args.eval_episodes)

    def decide(policy, state, obs, episode, t, step):  # one seed: obs (slots, D), episode (slots,)
        def one(obs, episode, t):
            return policy(state, obs, purpose_key(state.seed, "eval", step, episode, t))

        return jax.vmap(one)(obs, episode, t)

    def on_host(program, state, step):
        envs, chunks = host_envs(), None

        def act(obs, episode, t):  # open loop within a chunk; the slots' episodes are out of phase
            nonlocal chunks
            due = np.ones(t.shape, bool) if chunks is None else t % chunks.shape[2] == 0
            if due.any():
                new = np.asarray(program(state, obs.astype(np.float32), episode, t, step))
                new = new.reshape(*t.shape, -1, *envs.single_action_space.shape)
                chunks = np.where(due[..., None, None], new, new if chunks is None else chunks)
            return np.take_along_axis(chunks, (t % chunks.shape[2])[..., None, None], axis=2)

        return evaluate_host(envs, act, seeds, step, args.eval_episodes)

    def one_mode(policy):
        if env is not None:
            return jax.jit(jax.vmap(functools.partial(run_jax, policy), in_axes=(0, None)))
        axes = (0, 0, 0, 0, None)
        program = jax.jit(jax.vmap(functools.partial(decide, policy), in_axes=axes))
        return functools.partial(on_host, program)

    modes = {mode: one_mode(policy) for mode, policy in policies.items()}

    def evaluate(state, step):
        measured = {}
        for mode, run_episodes in modes.items():
            result = jax.device_get(run_episodes(state, step))
            measured |= {f"{k}_{mode}".rstrip("_"): v for k, v in result.items()}
        return {name: measured[name] for name in metric_names(task, policies)}

    return evaluate


def print_evaluation(task, args, policies, step, results):
    """The table of --evaluate: one line per seed and mode."""
    print(f"{task.name}, step {step:,}, {args.eval_episodes} episodes per seed")
    names = metric_names(task, policies)
    for mode in policies:
        columns = [n for n in names if n.partition("_")[2] == mode]
        width = max(10, *(len(n) + 2 for n in columns))
        print(f"{'seed':>6}" + "".join(f"{name:>{width}}" for name in columns))
        for i in range(args.num_seeds):
            row = "".join(f"{results[name][i].mean():>{width}.2f}" for name in columns)
            print(f"{args.seed + i:>6}{row}")
    print(f"   all  {summary(results)}")


def check_numbers(args, unbounded=(), zero=()):
    """Counts are at least 1 (steps, seed and those in `zero`: 0), other numbers at least 0, gamma
    and tau at most 1."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name in unbounded:
            continue
        may_be_0 = ("seed", "offline_steps", "online_steps", *zero)
        low = 0 if isinstance(value, float) or name in may_be_0 else 1
        high = 1 if name in ("gamma", "tau") else np.inf
        if not low <= value <= high:
            bound = f"at least {low}" if high == np.inf else f"between {low} and {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be {bound}")


def command_line(run, args_type, argv=None):
    """Parse the flags and call `run(args)`; what the user can mend is one sentence, exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows progress too
    try:
        args = tyro.cli(args_type, args=argv)
        if args.resume or args.evaluate:
            args = read_args(args.resume or args.evaluate, argv, args_type())
        run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted before training began; nothing was written", file=sys.stderr)
        return 130
    return 0


# ==== end shared: runs ====


# ---- from flags to a run ----
OTHER_TASKS = ("multi-crescent",)


def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    table = PAPER | TASK_DEFAULTS[family]
    if (args.prior, args.student) == ("gaussian", "deterministic"):
        online_alpha = table.get("fql_online_alpha", table["fql_alpha"])
        table["alpha"] = online_alpha if args.online_steps else table["fql_alpha"]
    args = fill(args, env_id=task.name, **{k: v for k, v in table.items() if k in vars(args)})
    args = fill(
        args,
        online_alpha=args.alpha,
        critic_hidden_dims=args.hidden_dims,
        actor_hidden_dims=args.hidden_dims,
        checkpoint_interval=args.eval_interval,
    )
    check_numbers(args, unbounded=("log_std_min", "log_std_max", "target_entropy"))
    for name in ("critic_hidden_dims", "actor_hidden_dims", "prior_hidden_dims"):
        if min(getattr(args, name), default=0) < 1:
            raise UserError(f"--{name.replace('_', '-')} needs layers of at least one unit")
    if args.offline_steps + args.online_steps == 0:
        raise UserError("nothing to train: give --offline-steps or --online-steps")
    if args.online_steps % args.num_envs:
        raise UserError("--online-steps must be a multiple of --num-envs")
    if args.log_std_min > args.log_std_max or args.init_temperature <= 0:
        raise UserError(
            "--log-std-min must not exceed --log-std-max, --init-temperature be above 0"
        )
    used = [args.offline_td_temperature] * (args.offline_steps > 0)
    used += [args.online_td_temperature] * (args.online_steps > 0)
    if args.soft_backup and (args.student == "deterministic" or min(used) <= 0):
        raise UserError(
            "--soft-backup needs the Gaussian student and TD temperatures above 0; add "
            "--offline-td-temperature 1"
        )
    return args


def fill(args, **values):
    """Set those of `values` that no flag has set; env_id always."""
    unset = {k: v for k, v in values.items() if getattr(args, k) is None or k == "env_id"}
    return dataclasses.replace(args, **unset)


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze = task.base.removeprefix("pointmaze-")
    built_in = args.env_backend in ("auto", "jax")
    if task.base == "multi-crescent" and built_in:
        return MultiCrescent()
    if task.base != maze and maze in MAZES and built_in:
        return PointMaze(maze, task.index, args.success_timing)
    if args.env_backend == "mjx" and task.gym_id and task.base == maze:
        return make_mjx(task, MJX_MAZES, lambda: MjxAntMaze(task.gym_id, args.success_timing))
    if args.env_backend in ("jax", "mjx") or not task.gym_id:
        raise UserError(f"{task.name} has no {args.env_backend} environment; drop --env-backend")
    return None


def sample_and_update(carry, data, settings, nets, args):
    """Sample a batch and update once -> (carry, metrics). carry: state and, online, replay."""
    state = carry["state"]
    batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
    batch = sample(
        batch_key, data, carry.get("replay"), args.batch_size, args.n_step, args.gamma,
        args.buffer_size, args.num_envs, args.balanced_sampling,
    )  # fmt: skip
    for name in ("obs", "next_obs"):
        batch[name] = (batch[name] - state.obs_mean) / state.obs_std
    state, metrics = update(state, batch, update_key, settings, nets, args)
    return carry | {"state": state}, metrics


def gradient_step(carry, data, settings, nets, args):
    """`sample_and_update` with its metrics added to the running sums."""
    carry, metrics = sample_and_update(carry, data, settings, nets, args)
    return carry | {"sums": add_sums(carry["sums"], metrics)}


def explore(state, obs, time, nets, args, act_dim):
    """Exploring actions (E, A) for one seed's environments at online step `time`."""
    keys = jax.random.split(purpose_key(state.seed, "act", time), obs.shape[0])

    def one(obs, key):
        return policy(state, obs, key, args.behavior_temperature, nets, args, act_dim)

    return jax.vmap(one)(obs, keys)


def store(carry, obs, actions, out, returns):
    """Put one step of all environments into the replay and count the episodes that ended."""
    done = out["terminated"] | out["truncated"]
    rows = dict(obs=obs, actions=actions, rewards=out["reward"], next_obs=out["next_obs"])
    rows |= dict(masks=1.0 - out["terminated"], terminals=done)
    sums = add_episodes(carry["sums"], returns, done, out["success"])
    return carry | {"replay": insert(carry["replay"], rows), "sums": sums}


def online_step(carry, data, settings, env, nets, args, act_dim):
    """One step of a JAX environment (num_envs copies), then num_envs * utd updates."""
    state, envs, time = carry["state"], carry["envs"], carry["replay"]["added"]
    obs = observe(env, envs["state"])
    actions = explore(state, obs, time, nets, args, act_dim)
    env_state, out = step_envs(env, envs["state"], actions, purpose_key(state.seed, "env", time))
    returns = envs["returns"] + out["reward"]
    carry = store(carry, obs, actions, out, returns)
    returns = jnp.where(out["terminated"] | out["truncated"], 0.0, returns)
    carry["envs"] = dict(state=env_state, returns=returns)

    def learn(i, carry):
        return gradient_step(carry, data, settings, nets, args)

    return jax.lax.fori_loop(0, args.num_envs * args.utd, learn, carry)


class HostLoop:
    """Online phase on official environments: the simulators step while the device trains."""

    def __init__(self, task, data, settings, nets, args, act_dim):
        def learn(carry, data, settings):
            return gradient_step(carry, data, settings, nets, args)

        self.shape, self.utd, self.seed = (args.num_seeds, args.num_envs), args.utd, args.seed
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        count = args.num_seeds * args.num_envs
        self.envs = make_host_envs(task.gym_id, args.success_timing, count, same_step)
        self.explore = jax.jit(jax.vmap(lambda s, o, t: explore(s, o, t, nets, args, act_dim)))
        self.learn = Program(learn, data, settings)
        self.store = jax.jit(jax.vmap(store), donate_argnums=0)

    @property
    def seconds(self):
        return self.learn.seconds

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        time, (num_seeds, num_envs) = int(carry["replay"]["added"][0]), self.shape
        ids = [(self.seed + s, time, e) for s in range(num_seeds) for e in range(num_envs)]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.obs = self.envs.reset(seed=seeds)[0].astype(np.float32)
        self.returns = np.zeros(self.shape, np.float32)
        if not time:
            return carry
        # what was under way ends here: no n-step window may join it with what comes
        rows = carry["replay"]["rows"]
        newest = (time - 1 - np.arange(num_envs)) % rows["terminals"].shape[1]
        rows = rows | {"terminals": rows["terminals"].at[:, newest].set(1.0)}
        return carry | {"replay": carry["replay"] | {"rows": rows}}

    def __call__(self, carry, n):
        for _ in range(n):
            obs = self.obs.reshape(*self.shape, -1)
            actions = self.explore(carry["state"], obs, carry["replay"]["added"])
            self.envs.step_async(np.asarray(actions).reshape(len(self.obs), -1))
            carry = self.learn(carry, self.shape[1] * self.utd)  # returns before it is done
            next_obs, reward, terminated, truncated, info = self.envs.step_wait()
            self.obs, last_obs = next_obs.astype(np.float32), next_obs.astype(np.float32)
            success = np.zeros(len(reward), np.float32)
            for i in np.flatnonzero(terminated | truncated):  # there, next_obs starts an episode
                last_obs[i], success[i] = info["final_obs"][i], info["final_info"]["success"][i]
            out = dict(reward=reward.astype(np.float32), success=success, next_obs=last_obs)
            out |= dict(terminated=terminated, truncated=truncated & ~terminated)
            out = {k: v.reshape(*self.shape, *v.shape[1:]) for k, v in out.items()}
            self.returns = self.returns + out["reward"]
            carry = self.store(carry, obs, actions, out, self.returns)
            self.returns = self.returns * ~(out["terminated"] | out["truncated"])
        return carry


def make_phases(task, env, data, nets, args):
    """The offline and, if asked for, the online phase."""
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    offline = PhaseSettings(jnp.float32(args.alpha), jnp.float32(args.offline_td_temperature))
    online = PhaseSettings(jnp.float32(args.online_alpha), jnp.float32(args.online_td_temperature))

    def learn(carry, data, settings):
        return gradient_step(carry, data, settings, nets, args)

    def interact(carry, data, settings):
        return online_step(carry, data, settings, env, nets, args, act_dim)

    phases = [Phase("offline", 0, args.offline_steps, lambda c: c, Program(learn, data, offline))]
    if not args.online_steps:
        return phases
    capacity = min(args.online_steps, max(args.buffer_size, len(data["obs"]) + 1))
    capacity -= capacity % args.num_envs
    host = HostLoop(task, data, online, nets, args, act_dim) if env is None else None

    def enter(carry):
        def start(seed):
            new = dict(replay=make_replay(capacity, obs_dim, act_dim))
            if env is not None:
                env_state = reset_envs(env, purpose_key(seed, "env"), args.num_envs)
                new["envs"] = dict(state=env_state, returns=jnp.zeros(args.num_envs))
            return new

        carry = carry | place(jax.jit(jax.vmap(start))(carry["state"].seed), args.num_seeds)
        return host.restart(carry) if host else carry

    end = args.offline_steps + args.online_steps
    advance, restart = (host, host.restart) if host else (Program(interact, data, online), None)
    online_phase = ("online", args.offline_steps, end, enter, advance, args.num_envs, restart)
    return [*phases, Phase(*online_phase)]


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all seeds on the device(s)."""
    seeds = jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed
    init = jax.vmap(lambda seed: init_state(args, obs_dim, act_dim, mean, std, seed))
    return place(jax.jit(init)(seeds), args.num_seeds)


def evaluation_policies(nets, args, act_dim):
    """The one mode of evaluation: (state, obs, key) -> action at the evaluation's temperature."""
    fixed = dict(temperature=args.eval_temperature, nets=nets, args=args, act_dim=act_dim)
    return {"": functools.partial(policy, **fixed)}


def train(args, task):
    """Train from the start, or from the checkpoint of --resume; writes the run directory."""
    tree, facts = load_checkpoint(args.resume) if args.resume else (None, {"step": 0})
    env = make_jax_env(task, args)
    if task.base == "multi-crescent":
        raw, source = crescent_dataset(seed=0), "generated"
    else:
        raw, source = load_dataset(task, args.dataset_dir, args.success_timing)
    data = place(device_data(raw, args.n_step, args.gamma), args.num_seeds, copy=True)
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    args = fill(args, target_entropy=-args.target_entropy_scale * act_dim)
    nets = make_networks(args, act_dim)
    mean, std = jnp.zeros(obs_dim), jnp.ones(obs_dim)
    if args.normalize_obs:
        mean, std = data["obs"].mean(axis=0), data["obs"].std(axis=0) + 1e-6
    phases = make_phases(task, env, data, nets, args)

    state = start_states(args, obs_dim, act_dim, mean, std)
    one = jax.tree.map(lambda x: x[0], state)
    inputs = (data, phases[0].advance.inputs[1], nets, args)
    _, metrics = jax.eval_shape(lambda s: sample_and_update({"state": s}, *inputs), one)
    sums = jax.vmap(lambda seed: zero_sums(metrics))(state.seed)
    carry = dict(state=state, sums=place(sums, args.num_seeds))
    if tree is not None:  # enter the phase in which the checkpoint was made, then fill it in
        current = next((p for p in phases if facts["step"] <= p.end), phases[-1])
        carry = current.enter(carry)
        carry = restore(carry, tree, args.resume)
        carry = current.restart(carry) if current.restart else carry
    policies = evaluation_policies(nets, args, act_dim)
    run = Run(args, task, source, raw, policies, facts["step"])
    run.header(raw)
    evaluate = make_evaluate(task, env, policies, args)
    if task.base == "multi-crescent":
        evaluate = with_picture(evaluate, run, raw, nets, args)
    run.finish(train_loop(run, carry, phases, evaluate, args))


def evaluate_only(args, task):
    """--evaluate: rebuild the networks of a run and evaluate its last checkpoint as it did."""
    tree, facts = load_checkpoint(args.evaluate)
    env = make_jax_env(task, args)
    spaces = env or make_host_env(task.gym_id, args.success_timing)
    obs_dim, act_dim = spaces.observation_space.shape[0], spaces.action_space.shape[0]
    state = start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    state = restore(state, tree["state"], args.evaluate)
    policies = evaluation_policies(make_networks(args, act_dim), args, act_dim)
    results = make_evaluate(task, env, policies, args)(state, facts["step"])
    print_evaluation(task, args, policies, facts["step"], results)


# ---- picture of the toy task ----
def with_picture(evaluate, run, raw, nets, args):
    """multi-crescent: after each phase, also draw the rewards, the data and what the seed does."""

    def draws(state):  # prior noise, its teacher actions, the student's actions at T = 0 and T = 1
        obs, keys = jnp.zeros((1_000, 2)), jax.random.split(jax.random.key(0), 3)
        x = sample_prior(state.params, nets, obs, 2, args.latent_dim, keys[0])
        teacher = flow_endpoint(state.params, nets, obs, x, args.flow_steps)
        mode, _ = sample_action(state.params, nets, args, obs, x, 0.0, keys[1])
        return x, teacher, mode, sample_action(state.params, nets, args, obs, x, 1.0, keys[2])[0]

    def evaluate_and_draw(state, step):
        if step in (args.offline_steps, args.offline_steps + args.online_steps):
            first_seed = jax.tree.map(lambda x: x[0], state)
            phase = "offline" if step == args.offline_steps else "online"
            method = "GSFlow" if args.prior == "cvae" else "FQL"
            alpha = args.alpha if phase == "offline" else args.online_alpha
            path = run.dir / f"multi_crescent_{phase}.png"
            draw_crescents(
                path, raw, jax.jit(draws)(first_seed), f"{method} {phase}, alpha {alpha:g}"
            )
        return evaluate(state, step)

    return evaluate_and_draw


def draw_crescents(path, raw, draws, title):
    """One picture: reward map, box, data, prior noise, teacher's and student's actions."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    noise, teacher, mode, sampled = draws
    rewards = np.asarray(crescent_reward(mode))
    figure = Figure(figsize=(6, 5))
    FigureCanvasAgg(figure)
    axis, grid = figure.add_subplot(), np.linspace(-1.5, 1.5, 601)
    landscape = crescent_value(np.stack(np.meshgrid(grid, grid), axis=-1))
    colours = axis.contourf(grid, grid, landscape, [-1, 2.5, 7.5, 12.5, 17.5], cmap="Greens")
    figure.colorbar(colours, label="reward", ticks=[0, 5, 10, 15])
    axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], c="black", lw=1)
    axis.scatter(*raw["actions"].T, s=2, c="grey", label="data")
    axis.scatter(*noise.T, s=3, c="red", alpha=0.15, label="prior noise x")
    axis.scatter(*teacher.T, s=3, c="blue", alpha=0.15, label="teacher F(s, x)")
    axis.scatter(*sampled.T, s=3, c="orange", alpha=0.3, label="student, T = 1")
    axis.scatter(*mode[:50].T, s=60, c="black", marker="*", label="student, T = 0")
    shares = f"P(r >= 10) {(rewards >= 10).mean():.2f}, P(r = 15) {(rewards == 15).mean():.2f}"
    axis.set_title(f"{title}: mean reward {rewards.mean():.2f}, {shares}", fontsize=8)
    axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.55, -0.06), ncols=5)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    tqdm.write(f"picture: {path}")


# ---- main ----
def run(args):
    """Resolve the arguments, then train or evaluate."""
    task = parse_task(args.env_id, OTHER_TASKS)
    args = resolve(args, task)
    if args.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    evaluate_only(args, task) if args.evaluate else train(args, task)


if __name__ == "__main__":
    sys.exit(command_line(run, Args))
