"""FlowQ: a flow policy trained towards pi_beta(a|s) exp(lambda Q(s, a)), offline.

Paper: "FlowQ: Energy-Guided Flow Policies for Offline Reinforcement Learning", arXiv 2505.14139.
Read this first: the paper's velocity formula, algorithm box, hyperparameters and score tables were
not available to us in readable form.  The target policy, the guided path, its schedules t, t^2,
t^2/(1-t) and a learned one, and the claims about cost are the paper's; the loss below (form S) is
our reconstruction, and no default here is "the paper's setting".

What is optimised (s observation, a in [-1,1]^A data action, e ~ N(0, I), sg = stop-gradient)

  path          x_t = t a + (1-t) e,  t ~ U(0, 0.999)
  guidance      g = grad_y mean_i Q'_i(s, y) at y = clip(x_t) / mean_batch |Q'(s, a)|
                w = lambda c(t) g, its length at most --guidance-clip
  policy        L_policy = mean (u(s, x_t, t) - sg[a - e + w])^2
  act(s)        K Euler steps of u_EMA from N(0, I) at t = 0, clipped to the box once
                N > 1: N draws, the one with the largest min_i Q'_i
  critic td     y = sg[r + gamma mask agg_i max_m Q'_i(s', a'_m)],  a'_1..M ~ act(s')
  critic iql    y = sg[r + gamma mask V(s')],  V by expectile regression on min_i Q'_i(s, a)
                L_critic = sum_i mean (Q_i(s, a) - y)^2

c(t) says how much of the energy's slope the velocity takes up along the path.  With lambda(t) =
lambda h(t) the density at time t is p_t exp(lambda(t) Q); the forms differ in how it becomes c:

  form                c(t) in general          h = t           t^2             t^2/(1-t)
  score (S, default)  h (1-t)/t                1-t             t(1-t)          t
  drop-time (T)       h (1-t)                  t(1-t)          t^2(1-t)        t^2
  field (Gb)          h' (1-t)^2 - h (1-t)     (1-t)(1-2t)     t(1-t)(2-3t)    2t(1-t)

S puts the score of the guided density into v = x/t + (1-t)/t score; T puts the guided mean into the
velocity of the Gaussian path and drops its time derivative; Gb keeps that derivative and holds g
fixed.  The exact velocity of the guided path, with every row weighted alike, cancels the guidance
(the tests show it), so the paper must do something else; which of these, if any, we do not know.
None samples the exact posterior: `python benchmark/flowq_toy.py` shows by how much.

  learned h     c(t) = (1-t) r(t),  r = softplus(net(t)) / softplus(net(1)),  r = 1 at the start
                minimise sum_i w_i |a_i - e_i - u_base(s_i, x_i, t_i) - lambda c(t_i) g_i|^2 / A
                w_i ~ exp(min(lambda (Q'(s_i, a_i) - V(s_i)) / mean |Q'|, 5)), normalised over rows
                u_base: plain flow matching; V: mean squared error to Q' (critic iql: its V)

One update is one Adam step for each net (their parameters are disjoint), then Q' <- tau Q +
(1 - tau) Q' and u_EMA <- 0.999 u_EMA + 0.001 u.  No sample of the policy enters L_policy, so a
policy update costs the same for every K; that of the td critic grows with K.  lambda = 0 is flow
matching of the data, bit for bit.

Open in the paper, and what we took
  1. Velocity form: score; drop-time and field are flags.
  2. Schedule on real data: t, which lets go of the critic as t -> 1.
  3. Where grad Q is taken: the noisy action, clipped to the box (the gradient passes the clip
     unchanged); its mean t a, the data action and the denoised action are flags.
  4. Which Q, and its scale: mean of the two target critics over the batch mean of |Q|, as in
     Diffusion Actor-Critic.  That undoes a factor on the rewards but not an offset.
  5. lambda: nothing is published for OGBench.  Our pilot on the point maze says 30 or more; 30 is
     the start of a sweep elsewhere.
  6. Critic: td with sampled actions, as in Diffusion-QL; iql needs none.
  7. K = 10, N = 50 and argmax.  N = 1 is always reported beside it, because with N = 50 plain flow
     matching scores as well.
  8. Networks, learning rate, discount and target aggregation: FQL's on OGBench; EMA ours.
     Diffusion-QL's networks are there by flags (--activation mish, --time-embedding sinusoid).
  9. How h is learned, and V in place of the log-normaliser in its weights: ours.
 10. The path ends in the data point itself (no sigma_min); the last checkpoint is reported.
 11. The toy's data and energy: two modes (0, 1) and (0, -1), deviation 0.2, Q = second coordinate.
 12. --n-step, --normalize-obs and small networks exist for quick runs.

Where to look: the method is below "# ---- networks" and "# ---- the method"; what stands between
"# ==== shared: NAME ====" lines is the same in every script of this repository.

Modes
  python algos/flowq.py                                   pointmaze-medium, a few minutes
  python algos/flowq.py --guidance-lambda 0               the same without guidance
  python algos/flowq.py --env-id cube-single              full-size networks, for a GPU
  python algos/flowq.py --env-id energy-toy               two modes and a known energy
  python algos/flowq.py --evaluate runs/RUN               load a checkpoint and evaluate it
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

ALGO = "flowq"
FREE_ALSO = ()  # flags that may still change when a run is resumed
EVALUATION_FLAGS = ("eval_candidates",)  # flags that may change with --evaluate


@dataclasses.dataclass(frozen=True)
class Args:
    online_steps = 0  # no field, no flag: this method has no online phase

    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id, a short name (antmaze-large, cube-double-task3), or
    energy-toy"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # train this many seeds (seed, seed+1, ...) in one vmapped program
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None
    """run directory: load its checkpoint, evaluate, print a table, train nothing"""
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """float32 matmuls: JAX's default (TF32 on recent GPUs), high or highest"""

    # ---- environment and data ----
    env_backend: Literal["auto", "jax", "host"] = "auto"
    """jax: vmapped environment inside the program (point mazes, energy-toy); host: the official
    environment through gymnasium.vector; auto: jax where it exists"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    normalize_obs: bool | None = None
    """standardise observations with the dataset's mean and deviation (full-size runs: no)"""
    reward_transform: Literal[
        "none", "antmaze-cql", "antmaze-iql", "standardize", "return-range"
    ] = "none"
    """r, 4(r - 0.5), r - 1, (r - mean)/std, 1000 r/(largest - smallest return); another one needs
    another lambda"""
    dataset_action_clip: float = 1e-5  # dataset actions are kept this far inside the box

    # ---- schedule ----
    offline_steps: int | None = None  # gradient steps
    updates_per_dispatch: int | None = None
    """gradient steps per compiled call; metrics are averaged over them and logged"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end
    eval_episodes: int | None = None  # episodes per evaluation, seed and number of candidates
    checkpoint_interval: int | None = None
    """checkpoint every this many steps and at the end (default: eval-interval)"""

    # ---- optimisation ----
    batch_size: int | None = None  # rows per gradient step
    learning_rate: float | None = None  # Adam's step size for all networks
    lr_decay: bool | None = None
    """cosine decay to 0 over --offline-steps (which then must not change on resume)"""
    grad_norm_clip: float = 0.0  # largest gradient norm of each network; 0: no limit
    tau: float | None = None  # target critic: fraction of the new critic in each step
    ema_decay: float = 0.999
    """averaged policy, which acts and makes critic targets: share kept in each step"""
    gamma: float | None = None  # discount
    n_step: int | None = None
    """n-step TD targets that stop at success and at episode ends (full-size runs: 1)"""
    hidden_dims: tuple[int, ...] | None = None
    """widths of critic and velocity net, unless the next two say otherwise"""
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of critic and value net
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of the velocity nets
    critic_layer_norm: bool = True  # LayerNorm after each activation of critic and value net
    activation: Literal["gelu", "mish"] = "gelu"  # of all networks (Diffusion-QL: mish)
    time_embedding: Literal["raw", "sinusoid"] = "raw"
    """the velocity net's time input: t itself, or Diffusion-QL's embedded sinusoids of 1000 t"""

    # ---- algorithm ----
    guidance_lambda: float | None = None  # lambda, weight of the energy; 0: flow matching alone
    velocity_form: Literal["score", "drop-time", "field"] = "score"
    """how the guided density becomes a velocity: S, T or Gb of the table at the top"""
    schedule: Literal["t", "t2", "t2_over_1mt", "learned"] = "t"
    """h(t): t, t^2, t^2/(1-t), or learned (with --velocity-form score only)"""
    schedule_warmup: int | None = None
    """updates during which the learned schedule waits for base flow and value net"""
    grad_at: Literal["noisy", "mean", "data", "denoised"] = "noisy"
    """action at which grad Q is taken: x_t, t a, a, or x_t carried to t = 1 by the policy"""
    guidance_q: Literal["mean", "min"] = "mean"
    """how the guidance and its scale join the two target critics"""
    q_norm: Literal["mean-abs", "none"] | None = None
    """divide the guidance by the batch mean of |Q| at dataset actions"""
    guidance_clip: float | None = None  # largest length of a row's guidance; 0: no limit
    critic: Literal["td", "iql", "exact"] | None = None
    """td: TD targets with sampled actions; iql: expectile value net, no samples; exact: the
    toy's known energy, no critic to train"""
    expectile: float = 0.9  # of the value net of --critic iql
    q_agg: Literal["mean", "min"] | None = None
    """how the TD target of --critic td joins the two target critics"""
    max_backup_samples: int = 1
    """actions per next state; each target critic keeps its largest value, then they are joined"""
    flow_steps: int | None = None  # K, Euler steps from noise to action
    eval_candidates: int | None = None
    """N: evaluate also with the best of N actions by the target critics; 1: plain samples only"""


# What a task sets when no flag does; the first matching prefix wins, "" is the rest. Sources:
# [fql] FQL's published settings, [dql] Diffusion-QL's, [ours] chosen here.
DEFAULTS = dict(
    offline_steps=1_000_000, updates_per_dispatch=500, eval_interval=100_000, eval_episodes=50,
    batch_size=256, hidden_dims=(512, 512, 512, 512), learning_rate=3e-4, tau=0.005, gamma=0.99,
    n_step=1, normalize_obs=False, q_agg="mean", flow_steps=10,  # [fql], with the line before
    eval_candidates=50, critic="td", lr_decay=False,  # [dql]
    guidance_lambda=30.0, q_norm="mean-abs", guidance_clip=5.0, schedule_warmup=10_000,  # [ours]
)  # fmt: skip
TASK_DEFAULTS = {
    "pointmaze": dict(  # [ours] minutes on two CPU cores
        offline_steps=10_000, eval_interval=5_000, hidden_dims=(128, 128, 128), learning_rate=1e-3,
        tau=0.01, n_step=10, normalize_obs=True, guidance_lambda=100.0, schedule_warmup=3_000,
    ),
    "energy-toy": dict(  # [ours]
        offline_steps=6_000, eval_interval=6_000, eval_episodes=2_000, batch_size=512,
        hidden_dims=(128, 128, 128), learning_rate=1e-3, lr_decay=True, guidance_lambda=1.0,
        q_norm="none", guidance_clip=0.0, critic="exact", schedule_warmup=2_000, flow_steps=100,
        eval_candidates=1,
    ),
    "antmaze-giant": dict(gamma=0.995, q_agg="min"),  # [fql]
    "antmaze-large": dict(q_agg="min"),  # [fql]
    "humanoidmaze": dict(gamma=0.995),  # [fql]
    "antsoccer": dict(gamma=0.995),  # [fql]
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


# ---- energy-toy, two modes and a known energy ----
TOY_MEANS, TOY_STD = np.array([[0.0, 1.0], [0.0, -1.0]]), 0.2


class EnergyToyState(NamedTuple):
    action: jax.Array
    done: jax.Array


class EnergyToy(FuncEnv):
    """One-step bandit whose reward is the toy's Q, the second coordinate of the action.

    Success is an action in the upper half, so the success rate is the mass of the upper mode.
    """

    max_episode_steps = 1

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def initial(self, rng: Any, params: Any = None) -> EnergyToyState:
        return EnergyToyState(jnp.zeros(2), jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None) -> EnergyToyState:
        return EnergyToyState(action, jnp.asarray(True))

    def observation(self, state, rng=None, params=None):
        return jnp.zeros(1)

    def reward(self, state, action, next_state, rng=None, params=None):
        return action[1]

    def terminal(self, state, rng=None, params=None):
        return state.done

    def success(self, state):
        return state.action[1] > 0


def toy_dataset(seed: int, rows: int = 100_000) -> dict:
    """Actions from two equally heavy Gaussians, one step each."""
    rng = np.random.default_rng(seed)
    actions = TOY_MEANS[rng.integers(0, 2, rows)] + TOY_STD * rng.standard_normal((rows, 2))
    zeros, ones = np.zeros((rows, 1), np.float32), np.ones(rows, np.float32)
    return dict(
        observations=zeros,
        actions=actions.astype(np.float32),
        rewards=actions[:, 1].astype(np.float32),
        masks=1 - ones,
        terminals=ones,
        next_observations=zeros.copy(),
    )


def toy_critic(params, obs, actions):
    """The toy's Q in the shape of two critics that agree."""
    return jnp.stack([actions[..., 1]] * 2)


# ---- networks ----
ACTIVATIONS = {"gelu": nn.gelu, "mish": jax.nn.mish}  # gelu: the tanh form


class MLP(nn.Module):
    """Dense layers with activation (then LayerNorm, if asked for) and a linear head."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    activation: Callable
    layer_norm: bool = False
    head_init: Callable = nn.initializers.glorot_uniform()

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, axis=-1)
        for width in self.hidden_dims:
            x = self.activation(nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x))
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return nn.Dense(self.out_dim, kernel_init=self.head_init)(x)


class Critic(nn.Module):
    """Two independent Q functions with stacked parameters: (obs, action) -> (2, B)."""

    hidden_dims: tuple[int, ...]
    activation: Callable
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
        q = members(self.hidden_dims, 1, self.activation, self.layer_norm)(obs, actions)
        return q.squeeze(-1)


class Velocity(nn.Module):
    """(obs, x, t (B, 1)) -> velocity (B, A); t as it is, or as learned features of sinusoids."""

    hidden_dims: tuple[int, ...]
    act_dim: int
    activation: Callable
    time_embedding: str

    @nn.compact
    def __call__(self, obs, x, t):
        if self.time_embedding == "sinusoid":
            angles = 1000 * t * jnp.exp(-jnp.log(10_000) * jnp.arange(8) / 7)
            waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
            t = MLP((32,), 16, jax.nn.mish)(waves)
        return MLP(self.hidden_dims, self.act_dim, self.activation)(obs, x, t)


class Value(nn.Module):
    """V: obs -> (B,)."""

    hidden_dims: tuple[int, ...]
    activation: Callable
    layer_norm: bool

    @nn.compact
    def __call__(self, obs):
        return MLP(self.hidden_dims, 1, self.activation, self.layer_norm)(obs).squeeze(-1)


class Schedule(nn.Module):
    """r(t) = h(t) / t: positive, 1 at t = 1 always and everywhere at the start."""

    @nn.compact
    def __call__(self, t):
        net = MLP((16, 16), 1, jnp.tanh, head_init=nn.initializers.zeros)
        return jax.nn.softplus(net(t)) / jax.nn.softplus(net(jnp.ones_like(t)))


class Networks(NamedTuple):
    """The method's functions of (params, inputs); tests put hand-made ones in their place."""

    critic: Callable  # (params, obs, action) -> (2, B)
    velocity: Callable  # (params, obs, x_t, t (B, 1)) -> (B, A)
    value: Callable | None = None  # (params, obs) -> (B,)
    base: Callable | None = None  # as velocity
    schedule: Callable | None = None  # (params, t (B, 1)) -> r(t) (B, 1)


def make_modules(args, act_dim):
    """Flax modules of the settings in `args`; only those that these settings train."""
    activation = ACTIVATIONS[args.activation]
    velocity = Velocity(args.actor_hidden_dims, act_dim, activation, args.time_embedding)
    critic = (args.critic_hidden_dims, activation, args.critic_layer_norm)
    modules = dict(velocity=velocity)
    if args.critic != "exact":
        modules["critic"] = Critic(*critic)
    if args.critic == "iql" or (args.critic == "td" and args.schedule == "learned"):
        modules["value"] = Value(*critic)
    if args.schedule == "learned":
        modules |= dict(base=velocity, schedule=Schedule())
    return modules


def make_networks(args, act_dim):
    """The modules as plain functions."""
    nets = {k: m.apply for k, m in make_modules(args, act_dim).items()}
    return Networks(**{"critic": toy_critic} | nets)


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters, one entry per net: velocity, critic, ..."""
    obs, action, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, act_dim)), jnp.zeros((1, 1))
    inputs = dict(
        velocity=(obs, action, t), critic=(obs, action), value=(obs,), base=(obs, action, t)
    )
    inputs["schedule"] = (t,)
    modules = make_modules(args, act_dim)
    keys = jax.random.split(key, len(inputs))  # a net's start does not depend on the others
    keys = dict(zip(inputs, keys, strict=True))
    return {name: module.init(keys[name], *inputs[name]) for name, module in modules.items()}


# ---- the method: guidance ----
# c(t) for each form and h(t). Products, never h(t) times (1-t)/t: those factors overflow at the
# ends of the path, their product does not.
GUIDANCE = {
    "score": {"t": lambda t: 1 - t, "t2": lambda t: t * (1 - t), "t2_over_1mt": lambda t: t},
    "drop-time": {
        "t": lambda t: t * (1 - t),
        "t2": lambda t: t**2 * (1 - t),
        "t2_over_1mt": lambda t: t**2,
    },
    "field": {
        "t": lambda t: (1 - t) * (1 - 2 * t),
        "t2": lambda t: t * (1 - t) * (2 - 3 * t),
        "t2_over_1mt": lambda t: 2 * t * (1 - t),
    },
}


def guidance_weight(params, t, nets, args):
    """c(t)."""
    if args.schedule == "learned":
        return (1 - t) * nets.schedule(params["schedule"], t)
    return GUIDANCE[args.velocity_form][args.schedule](t)


def aggregate(q, how):
    """Join the two critics' values: (2, ...) -> (...)."""
    return q.min(axis=0) if how == "min" else q.mean(axis=0)


def action_limit(args):
    """Actions are clipped to this box; the toy's modes stand on its edge, so there it has none."""
    return np.inf if args.critic == "exact" else 1.0


def path_point(batch, eps, t):
    """x_t on the straight path from noise to the data action."""
    return t * batch["actions"] + (1 - t) * eps


def energy_slope(state, batch, eps, t, nets, args):
    """grad Q / scale where --grad-at says (B, A); Q at the data actions (B,); the scale."""
    obs, x = batch["obs"], path_point(batch, eps, t)
    if args.grad_at == "noisy":
        y = x
    elif args.grad_at == "mean":
        y = t * batch["actions"]
    elif args.grad_at == "data":
        y = batch["actions"]
    else:
        y = x + (1 - t) * nets.velocity(state.ema, obs, x, t)

    def q(actions):
        return aggregate(nets.critic(state.target_critic, obs, actions), args.guidance_q)

    limit = action_limit(args)
    # the slope at the clipped action, not the slope of the clip: outside the box that would be 0
    slope = jax.grad(lambda y: q(y).sum())(jnp.clip(y, -limit, limit))
    data_q = q(batch["actions"])
    scale = jnp.abs(data_q).mean() + 1e-6 if args.q_norm == "mean-abs" else 1.0
    return slope / scale, data_q, scale


def shorten(rows, limit):
    """Rows no longer than `limit` (0: any length), direction kept -> (rows, share shortened)."""
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    if limit == 0:
        return rows, jnp.zeros(())
    return rows * jnp.minimum(1, limit / jnp.maximum(length, 1e-12)), (length > limit).mean()


# ---- the method: losses ----
def policy_loss(params, state, batch, eps, t, settings, nets, args):
    """Flow matching whose target is pulled up the energy's slope; t is (B, 1)."""
    plain = batch["actions"] - eps
    slope, q, _ = energy_slope(state, batch, eps, t, nets, args)
    weight = guidance_weight(params, t, nets, args)
    guidance, clipped = shorten(settings.guidance_lambda * weight * slope, args.guidance_clip)
    target = jax.lax.stop_gradient(plain + guidance)  # last, so that lambda = 0 changes no bit
    x = path_point(batch, eps, t)
    velocity = nets.velocity(params["velocity"], batch["obs"], x, t)
    loss = jnp.mean((velocity - target) ** 2)

    plain_length, length = (jnp.linalg.norm(v, axis=-1) for v in (plain, guidance))
    cosine = (plain * guidance).sum(-1) / jnp.maximum(plain_length * length, 1e-12)
    info = dict(policy_loss=loss, flow_norm=plain_length.mean(), guidance_norm=length.mean())
    info |= dict(guidance_ratio=length.mean() / plain_length.mean(), guidance_cosine=cosine.mean())
    return loss, info | dict(guidance_clipped=clipped, q_abs=jnp.abs(q).mean())


def critic_loss(params, batch, target, nets):
    """Sum of both critics' mean squared errors to the fixed target (B,)."""
    q = nets.critic(params["critic"], batch["obs"], batch["actions"])
    loss = jnp.mean((q - target) ** 2, axis=-1).sum()
    return loss, {"critic_loss": loss, "q": q.mean(), "td_target": target.mean()}


def value_loss(params, state, batch, nets, args):
    """V(s): under iql the expectile of the smaller target Q, else the mean of the guidance's Q."""
    how = "min" if args.critic == "iql" else args.guidance_q
    q = aggregate(nets.critic(state.target_critic, batch["obs"], batch["actions"]), how)
    error = q - nets.value(params["value"], batch["obs"])
    expectile = args.expectile if args.critic == "iql" else 0.5
    loss = jnp.mean(jnp.where(error > 0, expectile, 1 - expectile) * error**2)
    return loss, {"value_loss": loss, "advantage": error.mean()}


def base_loss(params, batch, eps, t, nets):
    """Flow without guidance, on the same draws as the policy: what a learned schedule corrects."""
    velocity = nets.base(params["base"], batch["obs"], path_point(batch, eps, t), t)
    loss = jnp.mean((velocity - (batch["actions"] - eps)) ** 2)
    return loss, {"base_loss": loss}


def schedule_loss(params, state, batch, eps, t, settings, nets, args):
    """Learned h: rows weighted by exp(lambda Q), residual of the unguided flow against guidance."""
    slope, q, scale = energy_slope(state, batch, eps, t, nets, args)
    if nets.value is None:  # the toy has one state only
        log_weight = settings.guidance_lambda * q / scale
    else:  # V stands for the log-normaliser of each state
        advantage = q - nets.value(params["value"], batch["obs"])
        log_weight = jnp.minimum(settings.guidance_lambda * advantage / scale, 5)
    row_weight = jax.lax.stop_gradient(jax.nn.softmax(log_weight))
    base = nets.base(params["base"], batch["obs"], path_point(batch, eps, t), t)
    residual = jax.lax.stop_gradient(batch["actions"] - eps - base)
    guidance = settings.guidance_lambda * guidance_weight(params, t, nets, args) * slope
    loss = (row_weight * ((residual - guidance) ** 2).mean(axis=-1)).sum()
    info = dict(schedule_loss=loss, row_share=1 / (len(q) * (row_weight**2).sum()))
    for percent in (0, 25, 50, 75, 95):
        time = jnp.full((1, 1), percent / 100)
        info[f"c_{percent}"] = guidance_weight(params, time, nets, args)[0, 0]
    return loss, info


# ---- the method: acting ----
def flow_endpoint(velocity_params, nets, obs, x, args):
    """Euler steps at t = 0, 1/K, ..., clipped once at the end."""

    def euler_step(x, k):
        t = jnp.full((*x.shape[:-1], 1), k / args.flow_steps)
        return x + nets.velocity(velocity_params, obs, x, t) / args.flow_steps, None

    x, _ = jax.lax.scan(euler_step, x, jnp.arange(args.flow_steps))
    return jnp.clip(x, -action_limit(args), action_limit(args))


def policy(state, obs, key, candidates, nets, args, act_dim):
    """Best of `candidates` actions (A,) for one raw observation (D,), by the target critics."""
    obs = jnp.broadcast_to((obs - state.obs_mean) / state.obs_std, (candidates, *obs.shape))
    noise = jax.random.normal(key, (candidates, act_dim))
    actions = flow_endpoint(state.ema, nets, obs, noise, args)
    return actions[nets.critic(state.target_critic, obs, actions).min(axis=0).argmax()]


def td_target(params, state, batch, key, nets, args):
    """Fixed target (B,): V(s') under iql, else target critics at sampled actions of s'."""
    next_obs = batch["next_obs"]
    if args.critic == "iql":
        next_q = nets.value(params["value"], next_obs)
    else:
        samples = (args.max_backup_samples, *batch["actions"].shape)
        next_obs = jnp.broadcast_to(next_obs, (*samples[:2], next_obs.shape[-1]))
        noise = jax.random.normal(key, samples)
        next_actions = flow_endpoint(state.ema, nets, next_obs, noise, args)
        q = nets.critic(state.target_critic, next_obs, next_actions)  # (2, M, B)
        next_q = aggregate(q.max(axis=1), args.q_agg)  # each critic's best sample, then both
    return jax.lax.stop_gradient(batch["returns"] + batch["discounts"] * next_q)


# ---- the method: one update ----
@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Keys are functions of (seed, step), so none is stored."""

    params: Any
    target_critic: Any  # None where the critic is exact
    ema: Any  # averaged parameters of the velocity net
    opt_state: Any  # one per net
    obs_mean: jax.Array
    obs_std: jax.Array
    seed: jax.Array
    step: jax.Array


class Settings(NamedTuple):
    """Traced scalars, so that another lambda recompiles nothing and several can be vmapped."""

    guidance_lambda: jax.Array


def optimizer(args, name):
    """Adam for one net, with clipping and decay where asked for."""
    rate = 1e-3 if name == "schedule" else args.learning_rate
    if args.lr_decay:
        rate = optax.cosine_decay_schedule(rate, args.offline_steps)
    adam = optax.adam(rate)
    if args.grad_norm_clip:
        return optax.chain(optax.clip_by_global_norm(args.grad_norm_clip), adam)
    return adam


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    return TrainState(
        params=params,
        target_critic=params.get("critic"),
        ema=params["velocity"],
        opt_state={name: optimizer(args, name).init(p) for name, p in params.items()},
        obs_mean=obs_mean,
        obs_std=obs_std,
        seed=seed,
        step=jnp.zeros((), jnp.int32),
    )


DRAWS = ("flow_noise", "flow_time", "td_noise")


def update(state, batch, key, settings, nets, args):
    """One step of every net, then the target critic and the averaged policy.

    batch: obs, next_obs (B, D), actions (B, A), returns, discounts (B,).
    """
    keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
    shape = batch["actions"].shape
    eps = jax.random.normal(keys["flow_noise"], shape)
    t = jax.random.uniform(keys["flow_time"], (shape[0], 1), maxval=1 - 1e-3)
    drawn = (state, batch, eps, t, settings, nets, args)

    def total_loss(params):
        losses = [policy_loss(params, *drawn)]
        if "critic" in params:
            target = td_target(params, state, batch, keys["td_noise"], nets, args)
            losses += [critic_loss(params, batch, target, nets)]
        if "value" in params:
            losses += [value_loss(params, state, batch, nets, args)]
        if "schedule" in params:
            losses += [base_loss(params, batch, eps, t, nets), schedule_loss(params, *drawn)]
        info = functools.reduce(lambda a, b: a | b, (info for _, info in losses))
        return sum(loss for loss, _ in losses), info

    grads, info = jax.grad(total_loss, has_aux=True)(state.params)
    params, opt_state = {}, {}
    for name, old in state.params.items():
        step, opt_state[name] = optimizer(args, name).update(
            grads[name], state.opt_state[name], old
        )
        params[name] = optax.apply_updates(old, step)
    if "schedule" in params:  # waits until base flow and value net mean something
        new = (params["schedule"], opt_state["schedule"])
        old = (state.params["schedule"], state.opt_state["schedule"])
        waits = state.step < args.schedule_warmup
        params["schedule"], opt_state["schedule"] = jax.tree.map(
            lambda a, b: jnp.where(waits, a, b), old, new
        )
    target_critic = state.target_critic
    if "critic" in params:
        target_critic = optax.incremental_update(params["critic"], target_critic, args.tau)
    ema = optax.incremental_update(params["velocity"], state.ema, 1 - args.ema_decay)
    state = state.replace(
        params=params, target_critic=target_critic, ema=ema, opt_state=opt_state,
        step=state.step + 1,
    )  # fmt: skip
    return state, info


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
OTHER_TASKS = ("energy-toy",)


def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    args = fill(args, env_id=task.name, **(DEFAULTS | TASK_DEFAULTS[family]))
    args = fill(
        args,
        critic_hidden_dims=args.hidden_dims,
        actor_hidden_dims=args.hidden_dims,
        checkpoint_interval=args.eval_interval,
    )
    check_numbers(args, zero=("schedule_warmup",))
    for name in ("critic_hidden_dims", "actor_hidden_dims"):
        if min(getattr(args, name), default=0) < 1:
            raise UserError(f"--{name.replace('_', '-')} needs layers of at least one unit")
    if args.offline_steps == 0:
        raise UserError("nothing to train: give --offline-steps")
    for name in ("ema_decay", "expectile", "dataset_action_clip"):
        if not getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be below 1")
    if args.schedule == "learned" and args.velocity_form != "score":
        raise UserError("--schedule learned needs --velocity-form score")
    if (args.critic == "exact") != (task.base in OTHER_TASKS):
        raise UserError("--critic exact belongs to energy-toy, which has no other; drop --critic")
    if args.max_backup_samples > 1 and args.critic != "td":
        raise UserError("--max-backup-samples needs --critic td, the only one that samples actions")
    return args


def fill(args, **values):
    """Set those of `values` that no flag has set; env_id always."""
    unset = {k: v for k, v in values.items() if getattr(args, k) is None or k == "env_id"}
    return dataclasses.replace(args, **unset)


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze = task.base.removeprefix("pointmaze-")
    if task.base == "energy-toy" and args.env_backend != "host":
        return EnergyToy()
    if task.base != maze and maze in MAZES and args.env_backend != "host":
        return PointMaze(maze, task.index, args.success_timing)
    if args.env_backend == "jax" or not task.gym_id:
        raise UserError(f"{task.name} has no {args.env_backend} environment; drop --env-backend")
    return None


def transform_rewards(raw, how):
    """Rewards (N,) after --reward-transform."""
    rewards = raw["rewards"]
    if how == "antmaze-cql":
        return 4 * (rewards - 0.5)
    if how == "antmaze-iql":
        return rewards - 1
    if how == "standardize":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    if how == "return-range":
        starts = np.flatnonzero(np.append(1, raw["terminals"][:-1]))
        returns = np.add.reduceat(rewards, starts)
        return 1000 * rewards / max(returns.max() - returns.min(), 1e-6)
    return rewards


def prepare(raw, args):
    """The dataset on the device, with its n-step targets: see `device_data`."""
    rewards = transform_rewards(raw, args.reward_transform)
    data = device_data(raw | {"rewards": rewards}, args.n_step, args.gamma)
    limit = action_limit(args) - args.dataset_action_clip
    return data | {"actions": jnp.asarray(np.clip(raw["actions"], -limit, limit), jnp.float32)}


def sample_and_update(carry, data, settings, nets, args):
    """Sample a batch and update once -> (carry, metrics)."""
    state = carry["state"]
    batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
    index = jax.random.randint(batch_key, (args.batch_size,), 0, data["returns"].shape[0])
    batch = {k: v[index] for k, v in data.items()}
    for name in ("obs", "next_obs"):
        batch[name] = (batch[name] - state.obs_mean) / state.obs_std
    state, metrics = update(state, batch, update_key, settings, nets, args)
    return carry | {"state": state}, metrics


def gradient_step(carry, data, settings, nets, args):
    """`sample_and_update` with its metrics added to the running sums."""
    carry, metrics = sample_and_update(carry, data, settings, nets, args)
    return carry | {"sums": add_sums(carry["sums"], metrics)}


def make_phases(task, env, data, nets, args):
    """The one phase, offline."""
    settings = Settings(jnp.float32(args.guidance_lambda))

    def learn(carry, data, settings):
        return gradient_step(carry, data, settings, nets, args)

    return [Phase("offline", 0, args.offline_steps, lambda c: c, Program(learn, data, settings))]


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all seeds on the device(s)."""
    seeds = jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed
    init = jax.vmap(lambda seed: init_state(args, obs_dim, act_dim, mean, std, seed))
    return place(jax.jit(init)(seeds), args.num_seeds)


def evaluation_policies(nets, args, act_dim):
    """One sample, and the best of --eval-candidates."""
    fixed = dict(nets=nets, args=args, act_dim=act_dim)
    counts = sorted({1, args.eval_candidates})
    return {f"n{n}": functools.partial(policy, candidates=n, **fixed) for n in counts}


def train(args, task):
    """Train from the start, or from the checkpoint of --resume; writes the run directory."""
    tree, facts = load_checkpoint(args.resume) if args.resume else (None, {"step": 0})
    env = make_jax_env(task, args)
    if task.base == "energy-toy":
        raw, source = toy_dataset(seed=0), "generated"
    else:
        raw, source = load_dataset(task, args.dataset_dir, args.success_timing)
    data = place(prepare(raw, args), args.num_seeds, copy=True)
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
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
    if tree is not None:
        carry = restore(carry, tree, args.resume)
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
    task = parse_task(args.env_id, OTHER_TASKS)
    args = resolve(args, task)
    if args.resume and args.lr_decay:
        steps = read_args(args.resume, [], Args()).offline_steps
        if steps != args.offline_steps:
            raise UserError(
                f"--lr-decay ends at --offline-steps, {steps} in {args.resume}, which cannot "
                "change; start a new run"
            )
    if args.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    evaluate_only(args, task) if args.evaluate else train(args, task)


if __name__ == "__main__":
    sys.exit(command_line(run, Args))
