"""FMQ (flow map Q-guidance) and QGBS (Q-guided beam search): offline-to-online with flow maps.

Paper: arXiv 2605.12416.  Baselines in the same file: MVP as in the FMQ code (arXiv 2602.13810) by
`--online-objective mvp`, Q-chunking with a 10-step flow (QC) by `--actor flow`.

What is optimised (s observation, a a chunk of H actions as one vector of D = H A numbers, noise at
flow time 0, action at 1, sg = stop-gradient, R(e) = mean of valid * e^2 over the whole batch)

  flow map      X_{r,t}(x) = x + (t-r) u(s, x, r, t);  one-step policy: clip(X_{0,1}(a0), -1, 1),
                a0 ~ N(0, I);  a_t = (1-t) a0 + t a and v = a - a0 on the way to a dataset chunk a
  BoN(s)        of 32 one-step chunks the one with the largest agg_i Q_i;  agg = mean, online min
  critic        y = sg[sum_k gamma^k r_k + gamma^H mask agg_i Q'_i(s_H, BoN(s_H))]
                L_Q = mean valid_last (Q_i(s, a) - y)^2
  offline       L_diag = R(u(s, a_t, t, t) - v)                                          (Eq. 3)
                L_cons = R(student - sg target) at random r < t, on fresh noise, with
   eulerian     u(s, a_r, r, t)          | v + (t-r) du/d(r, a) . (1, v)                  (Eq. 5)
   semigroup    u(s, a_r, r, t)          | c u(s, a_r, r, w) + (1-c) u(s, X_{r,w}, w, t)  (Eq. 6)
   lagrangian   d/dt X_{r,t}(a_r)        | u(s, X_{r,t}, t, t)                            (Eq. 4)
                L_diag + 1{step > 5000} L_cons, the gap t-r growing until step 50000
  online FMQ    a_r = (1-r) a0 + r a;  u_off = the frozen offline u(s, a_r, r, 1)
                g = dQ_1/da / |dQ_1/da| at clip(X^off_{r,1}(a_r));  delta = |Q_1 - Q_2| there
                eta' = eta / (1 + beta delta / mean delta)                               (Eq. 13)
                L_FMQ = R(u(s, a_r, r, 1) - sg[u_off + eta' g])                          (Eq. 12)
                u_off + eta g is the exact maximiser of the linearised Q in |u - u_off| <= eta
  QGBS          M one-step chunks; K rounds: B children of each from x = t' a + (1-t') noise and
                X_{t',1}(x), the best M by min_i Q_i, a step of length eta_q up min_i Q_i; best one

One update is one Adam step on the sum of actor and critic loss.  Online: H environment steps, then
H updates.  The actions of a chunk run open loop; when an episode ends, the rest is dropped.

Deviations from the released code (and, where marked P, from the paper)
  1. eta / (1 + beta delta) as in the paper: the code leaves eta out of its adaptive radius (the
     default eta = 1 makes both the same).  Without --adaptive-eta eta is 0.5, as there.
  2. Settings are those of the code's YAML files, not of its Python defaults.
  3. QGBS completes with the flow map X_{t',1}, as the paper's Algorithm 2; the code takes one Euler
     step along u(s, x, t', t'), which --qgbs-completion diagonal does.
  4. P: acting is best-of-32, as in the code; Algorithm 1 draws one chunk (mode one-step).
  5. BoN selects with the online critic and takes the target critic's value; agg is the mean
     offline, min online (mvp, flow: mean) and a flag.  The code's comments say min throughout.
  6. Q_1's gradient guides FMQ, that of the min QGBS, as in the code.
  7. |u - u_off| <= eta; another statement of the theorem squares the norm, which does not fit its
     solution.
  8. No behaviour cloning online; --online-cons-weight and --online-diag-weight bring it back.
  9. MVP is "as in the FMQ code": the offline loss goes on, on old and new data.
 10. gamma = 0.99 also on mazes, as in the code.
 11. scene has sparse rewards (-1, 0), in the data and online, as the code's README says.
 12. Lagrangian: the student is d/dt X; the code swaps student and target.
 13. The policy is asked at chunk starts only; the code computes and discards in between.
 14. Windows never join the newest and the oldest row of the replay: dataset and online rows lie in
     two blocks, which act as one first-in first-out pool.
 15. H environment steps, then H updates (code: one by one).  With official environments the
     updates run while the simulators step, on the rows before those steps.
 16. With --actor flow, QGBS completes by the flow's Euler steps from t' to 1.
 17. --normalize-obs, small networks and fewer samples exist for quick runs; paper: off, 512, 32.

Where to look: the method is below "# ---- networks" and "# ---- the method"; what stands between
"# ==== shared: NAME ====" lines is the same in every script of this repository.

Modes
  python algos/fmq.py                                     both phases on pointmaze-medium, minutes
  python algos/fmq.py --env-id cube-double-task4          the paper's settings
  python algos/fmq.py --env-id cube-double-task4 --online-objective mvp               MVP
  python algos/fmq.py --env-id cube-double-task4 --actor flow                         QC
  python algos/fmq.py --evaluate runs/RUN                 load a checkpoint and evaluate it
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

ALGO = "fmq"
FREE_ALSO = (  # flags that may still change when a run without online phase is resumed
    "online_objective", "mvp_target", "eta", "adaptive_eta", "beta", "normalize_grad", "grad_at",
    "online_cons_weight", "online_diag_weight", "q_agg_online", "learning_starts", "utd",
    "buffer_size",
)  # fmt: skip
EVALUATION_FLAGS = (  # flags that may change with --evaluate
    "eval_modes", "num_samples", "qgbs_beam", "qgbs_branches", "qgbs_rounds", "qgbs_snr",
    "qgbs_eta", "qgbs_completion",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id or a short name (antmaze-giant-task4, cube-triple-task3)"""
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
    """jax: vmapped environment inside the program (point mazes); host: the official
    environment through gymnasium.vector; auto: jax where it exists, else host;
    mjx: antmaze-* vmapped inside the program, for a GPU (far slower than host on a CPU)"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    normalize_obs: bool | None = None
    """standardise observations with the dataset's mean and deviation (paper: no)"""
    sparse: bool | None = None
    """every reward but 0 becomes -1, in the dataset and online (default: for scene only)"""

    # ---- schedule ----
    offline_steps: int | None = None  # offline gradient steps (paper: 1,000,000)
    online_steps: int | None = None
    """online environment steps after the offline phase (paper: 1,000,000)"""
    learning_starts: int | None = None  # online environment steps before the first online update
    updates_per_dispatch: int | None = None
    """steps over which metrics are averaged before they are logged"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end of each phase
    eval_episodes: int | None = None  # episodes per evaluation, mode and seed
    eval_modes: tuple[Literal["best-of-n", "one-step", "qgbs"], ...] = (
        "best-of-n", "one-step", "qgbs",
    )  # fmt: skip
    """ways to act that each evaluation tries; the first gives the headline number"""
    checkpoint_interval: int | None = None
    """checkpoint every this many steps and at the end (default: eval-interval)"""

    # ---- optimisation ----
    batch_size: int = 256  # windows per gradient step
    learning_rate: float | None = None  # Adam's step size for all networks
    tau: float | None = None  # target critic: fraction of the critic in each step
    gamma: float | None = None  # discount per environment step
    hidden_dims: tuple[int, ...] | None = None  # widths of actor and critic
    num_critics: int = 2  # independent Q functions
    utd: int = 1  # gradient steps per environment step
    buffer_size: int = 2_000_000
    """rows of dataset plus online data that are kept; the oldest, dataset first, give way"""

    # ---- algorithm ----
    horizon: int = 5  # H, actions per chunk
    actor: Literal["flowmap", "flow"] = "flowmap"
    """flowmap: average velocities, one-step sampling; flow: velocities, Euler steps (QC)"""
    flow_steps: int = 10  # Euler steps of --actor flow
    time_embedding: Literal["sinusoid", "raw"] = "sinusoid"
    """how the flow map reads its times: 64 features each, or the number itself"""
    num_samples: int | None = None
    """N, chunks among which the critic chooses in TD target, acting and best-of-n (paper: 32)"""
    q_agg_offline: Literal["mean", "min"] = "mean"  # how critics are joined in the offline phase
    q_agg_online: Literal["auto", "mean", "min"] = "auto"
    """how critics are joined in the online phase (auto: min for fmq, mean for mvp and flow)"""
    consistency: Literal["eulerian", "semigroup", "lagrangian"] = "eulerian"
    """which identity of flow maps the offline loss asks for"""
    consistency_warmup: int | None = None  # updates with the diagonal loss alone (paper: 5,000)
    consistency_anneal_end: int | None = None
    """updates after which time pairs have their full gap (paper: 50,000)"""
    online_objective: Literal["fmq", "mvp"] | None = None
    """fmq: Q-guided steps off the frozen actor; mvp: the offline loss goes on (default: fmq, with
    --actor flow mvp)"""
    mvp_target: Literal["buffer", "reselect"] = "buffer"
    """mvp imitates the chunks in the buffer, or the best of n at their states"""
    eta: float | None = None
    """trust-region radius of FMQ (paper: 1, without --adaptive-eta 0.5)"""
    adaptive_eta: bool = True  # shrink the radius where the critics disagree
    beta: float = 0.3  # how much disagreement shrinks the radius
    normalize_grad: bool = True  # FMQ steps along the unit gradient, or along the gradient itself
    grad_at: Literal["offline", "online"] = "offline"
    """whose endpoint the critic's gradient is taken at: the frozen or the current actor's"""
    online_cons_weight: float = 0.0  # weight of the consistency loss beside L_FMQ
    online_diag_weight: float = 0.0  # weight of the diagonal loss beside L_FMQ
    qgbs_beam: int = 4  # M, chunks that survive a round of beam search
    qgbs_branches: int = 4  # B, children per surviving chunk
    qgbs_rounds: int = 1  # K, rounds
    qgbs_snr: float = 1.5  # rho, signal-to-noise ratio of renoising: t' = rho / (1 + rho)
    qgbs_eta: float = 0.3  # eta_q, length of the step up the critic after each round
    qgbs_completion: Literal["flowmap", "diagonal"] = "flowmap"
    """renoised chunks are completed by the flow map, or by one Euler step (released code)"""


# What a task sets when no flag does; the first matching prefix wins, "" is the rest. Sources:
# [code] released FMQ code, [ours] chosen here.
PAPER = dict(  # [code]
    offline_steps=1_000_000, online_steps=1_000_000, learning_starts=5_000,
    updates_per_dispatch=500, eval_interval=100_000, eval_episodes=50, normalize_obs=False,
    sparse=False, hidden_dims=(512, 512, 512, 512), learning_rate=3e-4, tau=0.005, gamma=0.99,
    num_samples=32, consistency_warmup=5_000, consistency_anneal_end=50_000,
)  # fmt: skip
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. The data walk to goals everywhere, so a single chunk of their
    # clone leads nowhere: a wide trust region lets FMQ turn most of them towards the task's goal.
    "pointmaze": dict(
        offline_steps=8_000, online_steps=5_000, learning_starts=500, eval_interval=2_000,
        hidden_dims=(128, 128, 128), learning_rate=1e-3, tau=0.01, num_samples=8, eta=2.0,
        consistency_warmup=500, consistency_anneal_end=3_000, normalize_obs=True,
    ),
    "scene": dict(sparse=True),  # [code]
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


# ==== shared: chunks ====
def chunk_data(data):
    """Put a dataset on the device, row by row, for windows of consecutive rows."""
    names = dict(obs="observations", next_obs="next_observations", actions="actions")
    names |= {k: k for k in ("rewards", "masks", "terminals")}
    rows = {k: jnp.asarray(data[name], jnp.float32) for k, name in names.items()}
    return rows | dict(actions=jnp.clip(rows["actions"], -ACTION_LIMIT, ACTION_LIMIT))


def sample_chunks(
    key, data, replay, batch_size, horizon, gamma, pool=None, added=None, limit=None, stride=1
):
    """Windows of `horizon` rows H, i.i.d. and uniform over all starts in dataset and ring.

    No window joins the two or crosses the ring's pointer. `pool`: size of the first-in first-out
    pool in which dataset rows leave first (None: they stay). Of the ring only the `limit` newest
    of the first `added` rows ever written count (None: all), and rows of one environment lie
    `stride` apart. `data` or `replay` may be None.

    Returns obs (B, D), actions (B, H * A) in order of time, returns (B,) = sum gamma^k r_k,
    discounts (B,) = gamma^H min_k mask_k, next_obs behind the last row, and valid (B, H): 1 up to
    the first end of an episode and 0 behind it.
    """
    num_data = 0 if data is None else data["rewards"].shape[0]
    num_online, dropped, steps = 0, 0, jnp.arange(horizon)
    if replay is not None:
        ring, capacity = replay["rows"], replay["rows"]["rewards"].shape[0]
        added = replay["added"] if added is None else added
        num_online = jnp.minimum(added, capacity if limit is None else limit)
        if pool is not None:
            dropped = jnp.clip(num_data + added - max(pool, num_data + 1), 0, num_data)
    num_offline_starts = jnp.maximum(num_data - dropped - (horizon - 1), 0)
    num_online_starts = jnp.maximum(num_online - (horizon - 1) * stride, 0)
    draw = jax.random.randint(key, (batch_size,), 0, num_offline_starts + num_online_starts)

    def windows(rows, index):  # index (B, H)
        inner = {k: rows[k][index] for k in ("actions", "rewards", "masks", "terminals")}
        return dict(obs=rows["obs"][index[:, 0]], next_obs=rows["next_obs"][index[:, -1]], **inner)

    parts = []
    if data is not None:
        start = jnp.minimum(dropped + draw, num_data - horizon)
        parts.append(windows(data, start[:, None] + steps))
    if replay is not None:
        start = added - num_online + draw - num_offline_starts  # counted from the first row ever
        parts.append(windows(ring, (start[:, None] + steps * stride) % capacity))
    offline = draw < num_offline_starts
    pick = lambda *x: jnp.where(offline.reshape(-1, *[1] * (x[0].ndim - 1)), x[0], x[-1])
    rows = jax.tree.map(pick, *parts)
    ended = jnp.cumsum(rows["terminals"], axis=1) - rows["terminals"]  # before row k
    return dict(
        obs=rows["obs"],
        actions=rows["actions"].reshape(batch_size, -1),
        returns=(gamma**steps * rows["rewards"]).sum(axis=1),
        discounts=gamma**horizon * rows["masks"].min(axis=1),
        next_obs=rows["next_obs"],
        valid=(ended == 0).astype(jnp.float32),
    )


# ==== end shared: chunks ====


# ---- networks ----
class FirstDense(nn.Module):
    """Dense layer on the concatenation of its inputs, as a sum of products that broadcast: an
    observation shared by many candidates, (B, 1, D) beside (B, N, A), is multiplied once."""

    width: int

    @nn.compact
    def __call__(self, *inputs):
        sizes = [x.shape[-1] for x in inputs]
        shape = (sum(sizes), self.width)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        blocks = jnp.split(kernel, np.cumsum(sizes)[:-1])
        return sum(x @ block for x, block in zip(inputs, blocks, strict=True)) + bias


class MLP(nn.Module):
    """Dense layers with GELU (then LayerNorm, if asked for) and a linear head."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, *inputs):
        x = FirstDense(self.hidden_dims[0])(*inputs)
        for width in (*self.hidden_dims[1:], self.out_dim):
            x = nn.gelu(x)  # the tanh form
            x = nn.LayerNorm()(x) if self.layer_norm else x
            x = nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x)
        return x


class Critic(nn.Module):
    """Independent Q functions with stacked parameters: (obs, chunk) (..., .) -> (members, ...)."""

    hidden_dims: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, obs, chunk):
        members = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.num_critics,
        )
        return members(self.hidden_dims, 1, layer_norm=True)(obs, chunk).squeeze(-1)


def sinusoid(time):
    """64 features of a time (..., 1): cos and sin of 32 angles, of which the fastest is 1 rad."""
    angles = time * 10_000.0 ** (-jnp.arange(32) / 31)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Actor(nn.Module):
    """Average velocity u(s, x, r, t) of the jump from r to t; --actor flow: velocity at r."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    kind: str
    time_embedding: str

    @nn.compact
    def __call__(self, obs, x, r, t):
        r, t = jnp.atleast_1d(r), jnp.atleast_1d(t)
        if self.kind == "flow":
            times = (r,)
        else:
            times = (r, t) if self.time_embedding == "raw" else (sinusoid(r), sinusoid(t))
        return MLP(self.hidden_dims, self.out_dim)(obs, x, *times)


class Networks(NamedTuple):
    """The method's functions of (params, inputs); tests put hand-made ones in their place."""

    actor: Callable  # (params, obs, x (..., D), r, t), times a number or (..., 1) -> (..., D)
    critic: Callable  # (params, obs, chunk (..., D)) -> (members, ...)


def make_modules(args, act_dim):
    """Flax modules of the settings in `args`."""
    actor = Actor(args.hidden_dims, args.horizon * act_dim, args.actor, args.time_embedding)
    return dict(actor=actor, critic=Critic(args.hidden_dims, args.num_critics))


def make_networks(args, act_dim):
    """The modules as plain functions."""
    return Networks(**{k: m.apply for k, m in make_modules(args, act_dim).items()})


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters of actor and critic."""
    obs, chunk = jnp.zeros((1, obs_dim)), jnp.zeros((1, args.horizon * act_dim))
    modules, keys = make_modules(args, act_dim), jax.random.split(key)
    return dict(
        actor=modules["actor"].init(keys[0], obs, chunk, 0.0, 1.0),
        critic=modules["critic"].init(keys[1], obs, chunk),
    )


# ---- the method: acting ----
def endpoint(params, nets, args, obs, x, r=0.0):
    """X_{r,1}(x): one jump of the flow map; --actor flow: Euler steps of its velocity."""
    if args.actor == "flowmap":
        return x + (1 - r) * nets.actor(params["actor"], obs, x, r, 1.0)

    def euler_step(x, k):
        step = (1 - r) / args.flow_steps
        return x + step * nets.actor(params["actor"], obs, x, r + k * step, 1.0), None

    return jax.lax.scan(euler_step, x, jnp.arange(args.flow_steps, dtype=x.dtype))[0]


def sample_chunk(params, nets, args, obs, noise):
    """One-step policy: noise (..., D) -> chunk in the box."""
    return jnp.clip(endpoint(params, nets, args, obs, noise), -1, 1)


def aggregate(q, pessimistic):
    """Join the critics' values by their minimum or their mean: (members, ...) -> (...)."""
    return jnp.where(pessimistic, q.min(axis=0), q.mean(axis=0))


def best_of_n(params, nets, args, obs, noise, pessimistic):
    """BoN: of the chunks made from noise (..., N, D) the one that the critic likes best (..., D).

    All candidates go through the actor in one call and through all critics in another.
    """
    chunks = sample_chunk(params, nets, args, obs[..., None, :], noise)
    q = nets.critic(params["critic"], obs[..., None, :], chunks)
    best = aggregate(q, pessimistic).argmax(axis=-1)  # the first one on ties
    return jnp.take_along_axis(chunks, best[..., None, None], axis=-2).squeeze(-2)


def critic_step(params, nets, args, obs, chunks):
    """QGBS's projection: a step of length eta_q up min_i Q_i, then back into the box."""
    min_q = lambda x: nets.critic(params["critic"], obs, x).min(axis=0).sum()
    grad = jax.grad(min_q)(chunks)
    grad = grad / (jnp.linalg.norm(grad, axis=-1, keepdims=True) + 1e-8)
    return jnp.clip(chunks + args.qgbs_eta * grad, -1, 1)


def renoising_time(args):
    """t' at which signal and noise have the ratio rho."""
    return args.qgbs_snr / (1 + args.qgbs_snr)


def complete(params, nets, args, obs, x):
    """QGBS: renoised chunks at time t' -> chunks in the box."""
    time = renoising_time(args)
    if args.qgbs_completion == "flowmap":
        chunk = endpoint(params, nets, args, obs, x, time)
    else:
        chunk = x + (1 - time) * nets.actor(params["actor"], obs, x, time, time)
    return jnp.clip(chunk, -1, 1)


def beam_search(params, nets, args, obs, dim, key):
    """QGBS for one observation (Algorithm 2): M (1 + K B) jumps -> chunk (D,)."""
    beam, branches, rounds = args.qgbs_beam, args.qgbs_branches, args.qgbs_rounds
    start_key, key = jax.random.split(key)
    time = renoising_time(args)
    min_q = lambda x: nets.critic(params["critic"], obs, x).min(axis=0)
    chunks = sample_chunk(params, nets, args, obs, jax.random.normal(start_key, (beam, dim)))
    for k in range(rounds):
        noise = jax.random.normal(jax.random.fold_in(key, k), (beam, branches, dim))
        children = complete(params, nets, args, obs, time * chunks[:, None] + (1 - time) * noise)
        children = children.reshape(-1, dim)  # the parents do not stay
        chunks = children[jax.lax.top_k(min_q(children), beam)[1]]
        chunks = critic_step(params, nets, args, obs, chunks)
    if not rounds:
        chunks = critic_step(params, nets, args, obs, chunks)
    return chunks[min_q(chunks).argmax()]


# ---- the method: losses ----
def mean_square(error, valid):
    """R(e) of errors (B, H * A) and valid (B, H): invalid steps count as zeros."""
    valid = jnp.repeat(valid, error.shape[-1] // valid.shape[-1], axis=-1)
    return jnp.mean(valid * error**2)


def critic_loss(params, nets, batch, target):
    """TD error against the fixed target (B,) of the windows that lie in one episode."""
    q = nets.critic(params["critic"], batch["obs"], batch["actions"])
    loss = jnp.mean(batch["valid"][:, -1] * (q - target) ** 2)
    return loss, {"critic_loss": loss, "q": q.mean(), "td_target": target.mean()}


def diagonal_loss(params, nets, batch, noise, t):
    """Eq. 3: u(s, a_t, t, t) is the velocity of flow matching; t is (B, 1)."""
    chunk = batch["actions"]
    velocity = nets.actor(params["actor"], batch["obs"], (1 - t) * noise + t * chunk, t, t)
    loss = mean_square(velocity - (chunk - noise), batch["valid"])
    return loss, {"diagonal_loss": loss}


def time_pairs(number, args, key, batch_size):
    """Start and end (B, 1) of the jumps that update `number` trains: the gap grows from zero."""
    anneal = args.consistency_anneal_end - args.consistency_warmup
    progress = jnp.clip((number - args.consistency_warmup) / anneal, 0, 1)
    a, b = jax.random.uniform(key, (2, batch_size, 1))
    middle, half_gap = (a + b) / 2, progress * jnp.abs(a - b) / 2
    return middle - half_gap, middle + half_gap


def consistency_loss(params, nets, args, batch, noise, r, t, share):
    """Eqs. 4 to 6: what u says about the jump from r to t agrees with what it says elsewhere."""
    chunk, obs = batch["actions"], batch["obs"]
    velocity, x = chunk - noise, (1 - r) * noise + r * chunk
    u = lambda x, r, t: nets.actor(params["actor"], obs, x, r, t)
    if args.consistency == "eulerian":  # along the conditional velocity, as MeanFlow
        ones, zeros = jnp.ones_like(r), jnp.zeros_like(t)
        student, slope = jax.jvp(u, (x, r, t), (velocity, ones, zeros))
        target = velocity + (t - r) * slope
    elif args.consistency == "semigroup":  # two jumps, that meet at w
        w, student = r + share * (t - r), u(x, r, t)
        first = u(x, r, w)
        target = share * first + (1 - share) * u(x + (w - r) * first, w, t)
    else:  # lagrangian: the end of the jump moves with the velocity there
        jump = lambda t: x + (t - r) * u(x, r, t)
        end, student = jax.jvp(jump, (t,), (jnp.ones_like(t),))
        target = u(end, t, t)
    loss = mean_square(student - jax.lax.stop_gradient(target), batch["valid"])
    return loss, {"consistency_loss": loss}


def trust_radius(disagreement, args):
    """Eq. 13: eta per sample, smaller where the critics disagree more than on average."""
    if not args.adaptive_eta:
        return jnp.full_like(disagreement, 0.5 if args.eta is None else args.eta)
    relative = disagreement / (disagreement.mean() + 1e-8)
    return (1.0 if args.eta is None else args.eta) / (1 + args.beta * relative)


def guided_target(u_off, grad, radius, args):
    """Theorem 3.2: the maximiser of the linearised Q in the ball of that radius around u_off."""
    if args.normalize_grad:
        grad = grad / (jnp.linalg.norm(grad, axis=-1, keepdims=True) + 1e-8)
    return u_off + radius[:, None] * grad


def fmq_loss(params, offline_actor, nets, args, batch, noise, r):
    """Eq. 12: the jump from r to 1 follows the frozen actor's, moved up the first critic."""
    frozen = jax.lax.stop_gradient(dict(offline=offline_actor, critic=params["critic"]))
    obs, x = batch["obs"], (1 - r) * noise + r * batch["actions"]
    u = nets.actor(params["actor"], obs, x, r, 1.0)
    u_off = nets.actor(frozen["offline"], obs, x, r, 1.0)
    start = u_off if args.grad_at == "offline" else jax.lax.stop_gradient(u)
    end = jnp.clip(x + (1 - r) * start, -1, 1)
    q, pull_back = jax.vjp(lambda chunk: nets.critic(frozen["critic"], obs, chunk), end)
    (grad,) = pull_back(jnp.zeros_like(q).at[0].set(1.0))
    disagreement = q.std(axis=0)  # of two critics: half their distance, whose factor cancels
    radius = trust_radius(disagreement, args)
    loss = mean_square(u - guided_target(u_off, grad, radius, args), batch["valid"])
    info = {"fmq_loss": loss, "radius": radius.mean(), "disagreement": disagreement.mean()}
    info["drift"] = jnp.mean(jnp.sum((u - u_off) ** 2, axis=-1))
    return loss, info | {"grad_norm": jnp.linalg.norm(grad, axis=-1).mean()}


# ---- the method: one update ----
@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Keys are functions of (seed, step), so none is stored."""

    params: Any
    target_critic: Any
    opt_state: Any
    offline_actor: Any  # u_off, copied when the online phase begins
    pessimistic: jax.Array  # this phase joins the critics by their minimum
    obs_mean: jax.Array
    obs_std: jax.Array
    seed: jax.Array
    step: jax.Array  # updates so far


DRAWS = ("bootstrap", "diag_noise", "diag_time", "cons_noise", "cons_time", "cons_share")
DRAWS += ("fmq_noise", "fmq_time", "reselect")
METRICS = ("critic_loss", "q", "td_target", "diagonal_loss", "consistency_loss", "fmq_loss")
METRICS += ("radius", "disagreement", "drift", "grad_norm")


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
        offline_actor=params["actor"],
        pessimistic=jnp.asarray(args.q_agg_offline == "min"),
        obs_mean=obs_mean,
        obs_std=obs_std,
        seed=seed,
        step=jnp.zeros((), jnp.int32),
    )


def actor_loss(params, offline_actor, nets, args, objective, batch, number, keys):
    """Offline and mvp: L_diag + w L_cons; fmq: L_FMQ, plus those two if their flags say so."""
    shape, noise = batch["actions"].shape, jax.random.normal
    draw_time = lambda key: jax.random.uniform(key, (shape[0], 1))
    losses, weights = [], []
    diag_weight, cons_weight = 1.0, jnp.where(number > args.consistency_warmup, 1.0, 0.0)
    if objective == "fmq":
        x, r = noise(keys["fmq_noise"], shape), draw_time(keys["fmq_time"])
        losses += [fmq_loss(params, offline_actor, nets, args, batch, x, r)]
        weights += [1.0]
        diag_weight, cons_weight = args.online_diag_weight, args.online_cons_weight
    if objective != "fmq" or args.online_diag_weight:
        x, t = noise(keys["diag_noise"], shape), draw_time(keys["diag_time"])
        losses += [diagonal_loss(params, nets, batch, x, t)]
        weights += [diag_weight]
    if args.actor == "flowmap" and (objective != "fmq" or args.online_cons_weight):
        x, share = noise(keys["cons_noise"], shape), draw_time(keys["cons_share"])
        r, t = time_pairs(number, args, keys["cons_time"], shape[0])
        losses += [consistency_loss(params, nets, args, batch, x, r, t, share)]
        weights += [cons_weight]
    info = functools.reduce(lambda a, b: a | b, (info for _, info in losses))
    return sum(w * loss for w, (loss, _) in zip(weights, losses, strict=True)), info


def update(state, batch, key, objective, nets, args):
    """One joint step of actor and critic; objective "offline", "fmq" or "mvp".

    batch: obs, next_obs (B, D), actions (B, H * A), returns, discounts (B,), valid (B, H).
    """
    keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
    params, (batch_size, dim) = state.params, batch["actions"].shape
    many = (batch_size, args.num_samples, dim)

    # TD target, forward only: nothing of the B * N candidates is kept for a backward pass
    noise = jax.random.normal(keys["bootstrap"], many)
    next_chunk = best_of_n(params, nets, args, batch["next_obs"], noise, state.pessimistic)
    next_q = nets.critic(state.target_critic, batch["next_obs"], next_chunk)  # winners only
    target = batch["returns"] + batch["discounts"] * aggregate(next_q, state.pessimistic)

    imitated = batch
    if objective == "mvp" and args.mvp_target == "reselect":
        noise = jax.random.normal(keys["reselect"], many)
        chunk = best_of_n(params, nets, args, batch["obs"], noise, state.pessimistic)
        imitated = batch | dict(actions=chunk, valid=jnp.ones_like(batch["valid"]))

    def total_loss(params):
        td_loss, td_info = critic_loss(params, nets, batch, target)
        loss, info = actor_loss(
            params, state.offline_actor, nets, args, objective, imitated, state.step + 1, keys
        )
        return td_loss + loss, td_info | info

    grads, info = jax.grad(total_loss, has_aux=True)(params)
    updates, opt_state = optimizer(args).update(grads, state.opt_state, params)
    # the target follows the critic before its step, as in the released code
    target_critic = optax.incremental_update(params["critic"], state.target_critic, args.tau)
    state = state.replace(
        params=optax.apply_updates(params, updates),
        target_critic=target_critic,
        opt_state=opt_state,
        step=state.step + 1,
    )
    return state, {name: info.get(name, jnp.zeros(())) for name in METRICS}


def policy(state, obs, key, mode, nets, args, act_dim):
    """Chunk (H * A,) for one raw observation (D,): one-step, best-of-n or qgbs."""
    obs, dim = (obs - state.obs_mean) / state.obs_std, args.horizon * act_dim
    if mode == "qgbs":
        return beam_search(state.params, nets, args, obs, dim, key)
    if mode == "one-step":
        return sample_chunk(state.params, nets, args, obs, jax.random.normal(key, (dim,)))
    noise = jax.random.normal(key, (args.num_samples, dim))
    return best_of_n(state.params, nets, args, obs, noise, state.pessimistic)


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
def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    args = fill(args, env_id=task.name, **PAPER | TASK_DEFAULTS[family])
    args = fill(
        args,
        checkpoint_interval=args.eval_interval,
        online_objective="fmq" if args.actor == "flowmap" else "mvp",
    )
    zero = ("learning_starts", "consistency_warmup", "consistency_anneal_end", "qgbs_rounds")
    check_numbers(args, zero=zero)
    if min(args.hidden_dims, default=0) < 1:
        raise UserError("--hidden-dims needs layers of at least one unit")
    if args.actor == "flow" and args.online_objective == "fmq":
        raise UserError(
            "--online-objective fmq guides the flow map's jumps, which --actor flow has not: use "
            "--online-objective mvp with it"
        )
    if args.consistency_anneal_end <= args.consistency_warmup:
        raise UserError("--consistency-anneal-end must be larger than --consistency-warmup")
    if args.offline_steps + args.online_steps == 0:
        raise UserError("nothing to train: give --offline-steps or --online-steps")
    if args.online_steps % args.horizon:
        raise UserError("--online-steps must be a multiple of --horizon")
    if not args.eval_modes or len(set(args.eval_modes)) < len(args.eval_modes):
        raise UserError("--eval-modes needs at least one mode, and each only once")
    return args


def fill(args, **values):
    """Set those of `values` that no flag has set; env_id always."""
    unset = {k: v for k, v in values.items() if getattr(args, k) is None or k == "env_id"}
    return dataclasses.replace(args, **unset)


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze = task.base.removeprefix("pointmaze-")
    built_in = args.env_backend in ("auto", "jax")
    if task.base != maze and maze in MAZES and built_in:
        return PointMaze(maze, task.index, args.success_timing)
    if args.env_backend == "mjx" and task.base == maze:
        return make_mjx(task, MJX_MAZES, lambda: MjxAntMaze(task.gym_id, args.success_timing))
    if args.env_backend in ("jax", "mjx"):
        raise UserError(f"{task.name} has no {args.env_backend} environment; drop --env-backend")
    return None


def sparse_rewards(rewards):
    """-1 for every reward but 0."""
    return -(rewards != 0).astype(rewards.dtype)


def sample_and_update(carry, data, objective, nets, args):
    """Sample a batch and update once -> (carry, metrics). carry: state and, online, replay."""
    state = carry["state"]
    batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
    batch = sample_chunks(
        batch_key, data, carry.get("replay"), args.batch_size, args.horizon, args.gamma,
        args.buffer_size,
    )  # fmt: skip
    for name in ("obs", "next_obs"):
        batch[name] = (batch[name] - state.obs_mean) / state.obs_std
    state, metrics = update(state, batch, update_key, objective, nets, args)
    return carry | {"state": state}, metrics


def gradient_step(carry, data, objective, nets, args):
    """`sample_and_update` with its metrics added to the running sums."""
    carry, metrics = sample_and_update(carry, data, objective, nets, args)
    return carry | {"sums": add_sums(carry["sums"], metrics)}


def explore(state, obs, time, nets, args, act_dim):
    """One seed's chunk (H, A) at online step `time`."""
    key = purpose_key(state.seed, "act", time)
    return policy(state, obs, key, "best-of-n", nets, args, act_dim).reshape(args.horizon, act_dim)


def store(carry, rows, returns, success, args):
    """Put H steps into the replay and count the episodes that ended among them."""
    if args.sparse:
        rows = rows | {"rewards": sparse_rewards(rows["rewards"])}
    sums = add_episodes(carry["sums"], returns, rows["terminals"], success)
    return carry | {"replay": insert(carry["replay"], rows), "sums": sums}


def online_block(carry, data, objective, env, nets, args, act_dim):
    """H steps of a JAX environment, then H * utd updates."""
    state, start = carry["state"], carry["replay"]["added"]

    def env_step(envs, time):
        obs = observe(env, envs["state"])
        # A new chunk costs little beside an update: make one always, take it when one is due.
        fresh = explore(state, obs[0], time, nets, args, act_dim)
        plan = jnp.where(envs["position"] == 0, fresh, envs["plan"])
        actions = plan[envs["position"]][None]
        env_state, out = step_envs(
            env, envs["state"], actions, purpose_key(state.seed, "env", time)
        )
        done = out["terminated"] | out["truncated"]
        rows = dict(obs=obs, actions=actions, rewards=out["reward"], next_obs=out["next_obs"])
        rows |= dict(masks=1.0 - out["terminated"], terminals=done)
        returns = envs["returns"] + out["reward"]
        envs = dict(
            state=env_state,
            returns=jnp.where(done, 0.0, returns),
            plan=plan,
            position=jnp.where(done[0], 0, (envs["position"] + 1) % args.horizon),
        )
        return envs, jax.tree.map(lambda x: x[0], (rows, returns, out["success"]))

    envs, steps = jax.lax.scan(env_step, carry["envs"], start + jnp.arange(args.horizon))
    carry = store(carry | {"envs": envs}, *steps, args)

    def learn(_, learner):
        after = gradient_step(carry | learner, data, objective, nets, args)
        return {k: after[k] for k in learner}

    updates = jnp.where(start < args.learning_starts, 0, args.horizon * args.utd)
    return carry | jax.lax.fori_loop(0, updates, learn, {k: carry[k] for k in ("state", "sums")})


class HostLoop:
    """Online phase on official environments, one per seed: while they take H steps, the device
    makes H * utd updates."""

    def __init__(self, task, data, objective, nets, args, act_dim):
        def learn(carry, data):
            return gradient_step(carry, data, objective, nets, args)

        self.args, self.act_dim = args, act_dim
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        self.envs = make_host_envs(task.gym_id, args.success_timing, args.num_seeds, same_step)
        choose = lambda s, o, t: explore(s, o, t, nets, args, act_dim)
        self.explore = jax.jit(jax.vmap(choose, in_axes=(0, 0, None)))
        self.learn = Program(learn, data)
        keep = lambda *parts: store(*parts, args)
        self.store = jax.jit(jax.vmap(keep, in_axes=(0, 1, 1, 1)), donate_argnums=0)

    @property
    def seconds(self):
        return self.learn.seconds

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        self.time, num_seeds = int(carry["replay"]["added"][0]), self.args.num_seeds
        ids = [(self.args.seed + s, self.time) for s in range(num_seeds)]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.obs = self.envs.reset(seed=seeds)[0].astype(np.float32)
        self.returns = np.zeros(num_seeds, np.float32)
        self.plan = np.zeros((num_seeds, self.args.horizon, self.act_dim), np.float32)
        self.position = np.zeros(num_seeds, int)
        if not self.time:
            return carry
        # what was under way ends here: no window may join it with what comes
        rows = carry["replay"]["rows"]
        newest = (self.time - 1) % rows["terminals"].shape[1]
        rows = rows | {"terminals": rows["terminals"].at[:, newest].set(1.0)}
        return carry | {"replay": carry["replay"] | {"rows": rows}}

    def act(self, carry, time):
        """The next action of each seed; new chunks where the last one is used up."""
        due = self.position == 0
        if due.any():
            fresh = np.asarray(self.explore(carry["state"], self.obs, time))
            self.plan = np.where(due[:, None, None], fresh, self.plan)
        return np.take_along_axis(self.plan, self.position[:, None, None], axis=1)[:, 0]

    def step(self, actions):
        """One step of all environments -> (rows, returns, success), each with a leading seed."""
        next_obs, reward, terminated, truncated, info = self.envs.step(actions)
        obs, self.obs, done = self.obs, next_obs.astype(np.float32), terminated | truncated
        last_obs, success = self.obs.copy(), np.zeros(len(reward), np.float32)
        for i in np.flatnonzero(done):  # there, next_obs starts an episode
            last_obs[i], success[i] = info["final_obs"][i], info["final_info"]["success"][i]
        rows = dict(obs=obs, actions=actions, rewards=reward.astype(np.float32), next_obs=last_obs)
        rows |= dict(masks=np.float32(1) - terminated, terminals=done)
        returns = self.returns + rows["rewards"]
        self.returns = np.where(done, np.float32(0), returns)
        self.position = np.where(done, 0, (self.position + 1) % self.args.horizon)
        return rows, returns, success

    def __call__(self, carry, n):
        horizon = self.args.horizon
        for _ in range(n):
            updates = 0 if self.time < self.args.learning_starts else horizon * self.args.utd
            actions = self.act(carry, self.time)
            carry = self.learn(carry, updates)  # returns before it is done
            steps = [self.step(actions)]
            for h in range(1, horizon):
                steps += [self.step(self.act(carry, self.time + h))]
            carry = self.store(carry, *jax.tree.map(lambda *x: np.stack(x), *steps))
            self.time += horizon
        return carry


def online_agg(args):
    """How the online phase joins the critics."""
    if args.q_agg_online != "auto":
        return args.q_agg_online
    return "min" if args.online_objective == "fmq" else "mean"


def make_phases(task, env, data, nets, args):
    """The offline and, if asked for, the online phase."""
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    objective = args.online_objective

    def learn(carry, data):
        return gradient_step(carry, data, "offline", nets, args)

    def interact(carry, data):
        return online_block(carry, data, objective, env, nets, args, act_dim)

    phases = [Phase("offline", 0, args.offline_steps, lambda c: c, Program(learn, data))]
    if not args.online_steps:
        return phases
    capacity = min(args.online_steps, max(args.buffer_size, len(data["obs"]) + 1))
    capacity -= capacity % args.horizon
    host = HostLoop(task, data, objective, nets, args, act_dim) if env is None else None

    def enter(carry):
        def start(state):
            state = state.replace(
                offline_actor=jax.tree.map(jnp.copy, state.params["actor"]),
                pessimistic=jnp.asarray(online_agg(args) == "min"),
            )
            new = dict(state=state, replay=make_replay(capacity, obs_dim, act_dim))
            if env is not None:
                env_state = reset_envs(env, purpose_key(state.seed, "env"), 1)
                new["envs"] = dict(state=env_state, returns=jnp.zeros(1))
                new["envs"] |= dict(plan=jnp.zeros((args.horizon, act_dim)), position=jnp.int32(0))
            return new

        carry = carry | place(jax.jit(jax.vmap(start))(carry["state"]), args.num_seeds)
        return host.restart(carry) if host else carry

    end = args.offline_steps + args.online_steps
    advance, restart = (host, host.restart) if host else (Program(interact, data), None)
    online_phase = ("online", args.offline_steps, end, enter, advance, args.horizon, restart)
    return [*phases, Phase(*online_phase)]


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all seeds on the device(s)."""
    seeds = jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed
    init = jax.vmap(lambda seed: init_state(args, obs_dim, act_dim, mean, std, seed))
    return place(jax.jit(init)(seeds), args.num_seeds)


def evaluation_policies(nets, args, act_dim):
    """Mode -> (state, obs, key) -> chunk."""
    fixed = dict(nets=nets, args=args, act_dim=act_dim)
    modes = {mode.replace("-", "_"): mode for mode in args.eval_modes}
    return {name: functools.partial(policy, mode=mode, **fixed) for name, mode in modes.items()}


def train(args, task):
    """Train from the start, or from the checkpoint of --resume; writes the run directory."""
    tree, facts = load_checkpoint(args.resume) if args.resume else (None, {"step": 0})
    env = make_jax_env(task, args)
    raw, source = load_dataset(task, args.dataset_dir, args.success_timing)
    if args.sparse and raw["rewards"].max() > 0:
        raise UserError("--sparse is for rewards of at most 0; use --sparse False")
    if args.sparse:
        raw["rewards"] = sparse_rewards(raw["rewards"])
    if len(raw["rewards"]) < args.horizon:
        raise UserError(f"the dataset is shorter than one chunk of --horizon {args.horizon} steps")
    data = place(chunk_data(raw), args.num_seeds, copy=True)
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    nets = make_networks(args, act_dim)
    mean, std = jnp.zeros(obs_dim), jnp.ones(obs_dim)
    if args.normalize_obs:
        mean, std = data["obs"].mean(axis=0), data["obs"].std(axis=0) + 1e-6
    phases = make_phases(task, env, data, nets, args)

    state = start_states(args, obs_dim, act_dim, mean, std)
    sums = jax.vmap(lambda seed: zero_sums(METRICS))(state.seed)
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


# ---- main ----
def run(args):
    """Resolve the arguments, then train or evaluate."""
    task = parse_task(args.env_id)
    args = resolve(args, task)
    if args.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    evaluate_only(args, task) if args.evaluate else train(args, task)


if __name__ == "__main__":
    sys.exit(command_line(run, Args))
