"""SAC Flow: flow policies trained end to end by SAC (Flow-G, Flow-T), from scratch and from data.

Paper: "SAC Flow", arXiv 2509.25756.  Baselines in the same file: the naive MLP velocity (`--policy
mlp`) and Gaussian SAC (`--policy gaussian`); the critic without target network is CrossQ's
(Bhatt et al., ICLR 2024), the chunked protocol that of Q-chunking (arXiv 2507.07969).

What is optimised (s observation, a action or chunk of H actions, sg = stop-gradient)

  rollout       A_0 ~ N(0, I);  A_{i+1} = A_i + v(s, A_i, i/K) / K + s_i eps_i,  eps_i ~ N(0, I)
                u = A_K,  a = scale tanh(u)                            K Euler steps, each noisy
  flow-g        v = g (vhat - A), gate g = sigmoid(.): a step is (1 - g/K) A + (g/K) vhat
  flow-t        v from a decoder block with a normalised residual stream, token A, memory s
  path density  log p = sum of Gaussian log-densities of A_0 and of each A_{i+1} given A_i
                        - sum_j log scale (1 - tanh(u_j)^2)            in the place of log pi(a|s)

Online (--mode online, Gymnasium tasks), every step of the environment
  critic        y = sg[r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log p')]
                L_critic = 1/2 sum_c mean (Q_c(s, a) - y)^2,  (s, a) and (s', a') in ONE pass
                through BatchRenorm critics without target network  (plain: with one, no 1/2)
  actor         L_actor = mean (alpha log p - min_c Q_c(s, a)),  every --policy-delay updates
  temperature   L_alpha = alpha (H - H_target),  H = -mean sg[log p]

Offline-to-online (--mode offline-to-online, OGBench tasks), chunks of H actions played open loop
  critic        y = sg[sum_k gamma^k r_k + gamma^H mask (mean_c Q'_c(s', a') - alpha log p')]
                L_critic = mean valid (Q_c(s, a) - y)^2,  Q' <- tau Q + (1 - tau) Q'
  step A        critic, and flow matching mean valid (v(s, x_t, t) - (x_1 - x_0))^2
  step B        critic, and the actor:
                L_actor = mean (alpha log p - mean_c Q_c(s, a)) + beta mean (a - a_data)^2
  Offline both steps are taken on each batch; online one step B per environment step.

Deviations from the released code (P: from the paper, where the released code differs from it)
  1. log p contains -log s_i at every step, of every policy; tanh's Jacobian in its stable form.
  2. Noise of its own for every step and call: released Flow-G reuses one key offline-to-online.
  3. Offline-to-online alpha is the constant 0: there, a sign error drives it to 0; --autotune has
     the right sign.
  4. No chunk crosses the replay's write pointer, and online rows never overwrite the dataset. The
     target critic follows the critic after its step (there: before).
  5. Stochastic and deterministic evaluation; checkpoints hold the state of BatchRenorm, which takes
     variances in two passes.
  6. Same function, less work: attention over one token is two linear maps; what does not change
     along a rollout is computed once.
  7. Deterministic evaluation starts at A_0 = 0 and adds no noise.
  8. With --num-envs above 1 on official environments, updates overlap with the next step and see
     the new rows one step later.
  P. Learned noise online and 0.05 / 0.02 offline-to-online instead of one sigma with drift
     correction; CrossQ critic, policy delay, Adam b1 0.5; widths 512 / 96; no clamp of Flow-G's
     candidate; post-norm blocks with self-attention; BC and RL interleaved offline; constant beta.
     Not here: frozen pre-trained velocities inside Flow-G or Flow-T.

Where to look: the method is below "# ---- networks" and "# ---- the method"; what stands between
"# ==== shared: NAME ====" lines is the same in every script of this repository.

Modes
  python algos/sac_flow.py                                vmapped pendulum, a few minutes
  python algos/sac_flow.py --policy gaussian              the same with SAC
  python algos/sac_flow.py --env-id HalfCheetah-v4        from scratch, the published settings
  python algos/sac_flow.py --env-id cube-double           offline, then online, in chunks
  python algos/sac_flow.py --env-id pointmaze-medium      the same on a point maze, small networks
  python algos/sac_flow.py --evaluate runs/RUN            load a checkpoint and evaluate it
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
from typing import Annotated, Any, Literal, NamedTuple

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
from gymnasium.envs.phys2d.pendulum import PendulumFunctional
from gymnasium.experimental.functional import FuncEnv
from tqdm import tqdm

ALGO = "sac_flow"
RECENT = 20  # episodes whose mean return is charts/episodic_return, as published
FREE_ALSO = ()  # flags that may still change when a run without online phase is resumed
EVALUATION_FLAGS = ()  # flags that may change with --evaluate


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- experiment ----
    env_id: str = "phys2d/Pendulum-v0"
    """task: phys2d/Pendulum-v0, a Gymnasium MuJoCo id (HalfCheetah-v5), an OGBench single-task id
    or its short name (cube-double-task3, pointmaze-medium)"""
    mode: Literal["online", "offline-to-online"] | None = None
    """from scratch (Gymnasium tasks) or from a dataset and then online (OGBench tasks)"""
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
    """jax: vmapped environment inside the program (pendulum, point mazes); host: the official
    environment through gymnasium.vector; auto: jax where it exists, else host;
    mjx: MuJoCo tasks (v5) vmapped inside the program, for a GPU (far slower than host on a CPU)"""
    success_timing: Literal["post", "pre"] = "post"
    """OGBench: reward and success after the action (post, as published) or before it (pre)"""
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    num_envs: int | None = None
    """parallel environments per seed; each step of all makes num-envs * utd updates, so the acting
    policy is up to num-envs * utd updates old (published: 1)"""
    action_scale: float | None = None
    """half width of the action box (default: the task's own, 0.4 for Humanoid, else mostly 1)"""
    normalize_obs: bool | None = None
    """offline-to-online: standardise observations with the dataset's mean and deviation"""
    sparse: bool | None = None  # offline-to-online: every non-zero reward becomes -1

    # ---- schedule ----
    offline_steps: int | None = None  # offline-to-online: offline iterations (published: 1,000,000)
    online_steps: Annotated[int | None, tyro.conf.arg(aliases=["--total-timesteps"])] = None
    """environment steps, those before learning starts included; updates come in whole groups of
    policy-delay, so up to policy-delay - 1 steps more (published: 1,000,000)"""
    learning_starts: int | None = None
    """online steps before the first online update: random actions in --mode online, the policy's
    own offline-to-online"""
    updates_per_dispatch: int | None = None
    """log every this many steps; the program's length adapts to about a second"""
    eval_interval: Annotated[int | None, tyro.conf.arg(aliases=["--eval-freq"])] = None
    """evaluate every this many steps and at the end of each phase"""
    eval_episodes: int | None = None  # episodes per evaluation, mode of acting and seed
    checkpoint_interval: int | None = None
    """checkpoint every this many steps and at the end (default: eval-interval)"""
    offline_schedule: Literal["interleaved", "sequential"] | None = None
    """offline: flow matching and RL on each batch, or flow matching first and RL afterwards"""
    bc_fraction: float | None = None
    """sequential schedule: part of the offline iterations that are flow matching"""

    # ---- optimisation ----
    batch_size: int | None = None  # rows per gradient step
    actor_lr: float | None = None  # Adam's step size for the policy
    critic_lr: float | None = None  # Adam's step size for the critics
    alpha_lr: float | None = None  # Adam's step size for the temperature
    adam_b1: float | None = None  # Adam's b1 of all three (CrossQ: 0.5)
    tau: float | None = None  # target critic: fraction of the new critic in each step
    gamma: float | None = None  # discount per environment step
    policy_delay: int | None = None  # critic updates per actor update
    utd: int = 1  # critic updates per environment step
    buffer_size: int = 1_000_000  # online rows that are kept per seed
    num_critics: int = 2  # critics, joined by min (online) or mean (offline-to-online)
    critic: Literal["brn", "plain"] | None = None
    """online: BatchRenorm without target network, or plain ReLU with one (offline-to-online:
    always LayerNorm with one)"""
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of the critics
    hidden_dim: int | None = None  # width of flow-g, mlp and gaussian policies
    d_model: int | None = None  # width of flow-t's residual stream

    # ---- algorithm ----
    policy: Literal["flow-g", "flow-t", "mlp", "gaussian"] | None = None
    """gated velocity, decoder-block velocity, plain MLP velocity, or SAC's Gaussian"""
    flow_steps: int = 4  # K, Euler steps of the rollout
    noise: Literal["learned", "fixed"] | None = None
    """deviation of the noise at each Euler step: learned or --sigma"""
    sigma: float | None = None  # fixed noise: deviation in the actor's loss
    sigma_inference: float | None = None  # fixed noise: deviation for targets, acting, evaluation
    drift_correction: bool = False
    """fixed noise: the paper's drift that keeps the flow's marginals, with noise sigma sqrt(1/K)"""
    autotune: bool | None = None  # learn the temperature alpha
    ent_coef: float | None = None  # temperature alpha, the initial one with --autotune
    target_entropy: float | None = None  # of the path's density; gaussian: of the action's
    horizon_length: int | None = None  # offline-to-online: H, actions per chunk
    beta: float | None = None  # offline-to-online: weight of the distance to the data, offline
    beta_online: float | None = None  # the same in the online phase
    bc_space: Literal["action", "pretanh"] | None = None
    """offline-to-online: flow matching of the actions, as published, or of their atanh"""


# What a task sets when no flag does: the mode's settings, over them the task's (the first matching
# prefix wins). Sources: [code] released code, [qc] Q-chunking, [ours] chosen here.
PAPER = {
    "online": dict(  # [code]
        online_steps=1_000_000, learning_starts=50_000, batch_size=512, gamma=0.99, num_envs=1,
        actor_lr=3e-4, critic_lr=1e-3, alpha_lr=1e-3, adam_b1=0.5, policy_delay=3, hidden_dim=512,
        d_model=96, critic_hidden_dims=(1024, 1024), policy="flow-g", noise="learned",
        autotune=True, ent_coef=0.2, action_scale=1.0, updates_per_dispatch=500,
        eval_interval=25_000, eval_episodes=10, offline_steps=0, horizon_length=1,
        normalize_obs=False, sparse=False,
    ),
    "offline-to-online": dict(  # [code], [qc]
        offline_steps=1_000_000, online_steps=1_000_000, learning_starts=5_000, batch_size=256,
        gamma=0.99, num_envs=1, actor_lr=3e-4, critic_lr=3e-4, alpha_lr=3e-4, adam_b1=0.9,
        tau=0.005, policy_delay=1, hidden_dim=512, d_model=128,
        critic_hidden_dims=(512, 512, 512, 512), policy="flow-t", noise="fixed", autotune=False,
        action_scale=1.0, updates_per_dispatch=500, eval_interval=100_000, eval_episodes=50,
        horizon_length=5, normalize_obs=False, sparse=False, beta=100.0, bc_space="action",
        offline_schedule="interleaved", bc_fraction=0.25,
    ),
}  # fmt: skip
PLAIN = dict(  # [code] --critic plain
    adam_b1=0.9, tau=0.005, policy_delay=1, critic_hidden_dims=(512, 512, 512, 512)
)
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. Fewer or smaller steps of the actor leave seeds of Flow-G at
    # returns of -500 to -1000 for the whole run.
    "phys2d/Pendulum": dict(
        online_steps=20_000, learning_starts=1_000, num_envs=4, batch_size=128, hidden_dim=64,
        d_model=32, critic_hidden_dims=(128, 128), actor_lr=1e-3, policy_delay=1, action_scale=2.0,
        eval_interval=2_500, eval_episodes=50,
    ),
    "Humanoid": dict(action_scale=0.4),  # its box; HumanoidStandup's too
    "pointmaze": dict(  # [ours] minutes on two CPU cores
        offline_steps=10_000, online_steps=10_000, learning_starts=500, batch_size=256,
        actor_lr=1e-3, critic_lr=1e-3, tau=0.01, hidden_dim=128, d_model=64, num_envs=1,
        critic_hidden_dims=(128, 128, 128), beta=10.0, normalize_obs=True, eval_interval=2_500,
    ),
    "cube-double": dict(beta=300.0),  # reported for the paper, as is 100 for the next two
    "cube-triple": dict(beta=100.0),
    "cube-quadruple": dict(beta=100.0),
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


# ==== shared: mjx locomotion ====
# What Gymnasium's v5 locomotion tasks pay and when they end: `forward` times the velocity along x,
# `lift` times the height, `alive` while healthy, minus `control` * |a|^2 and `contact` * |contact
# forces|^2. Healthy: height and pitch in their ranges, every other coordinate below `limit`.
MJX_TASKS = {
    "Hopper-v5": dict(
        alive=1.0, control=1e-3, height=(0.7, np.inf), pitch=(-0.2, 0.2), limit=100.0,
        clip_velocity=10.0, noise=5e-3,
    ),
    "Walker2d-v5": dict(
        alive=1.0, control=1e-3, height=(0.8, 2.0), pitch=(-1.0, 1.0), clip_velocity=10.0,
        noise=5e-3,
    ),
    "HalfCheetah-v5": dict(control=0.1, ends=False, noise=0.1, gaussian=True),
    "Ant-v5": dict(
        alive=1.0, control=0.5, contact=5e-4, height=(0.2, 1.0), clip_force=1.0, noise=0.1,
        gaussian=True,
    ),
    "Humanoid-v5": dict(
        forward=1.25, alive=5.0, control=0.1, contact=5e-7, height=(1.0, 2.0), noise=1e-2,
    ),
    "HumanoidStandup-v5": dict(
        forward=0.0, lift=1 / 0.003, alive=1.0, control=0.1, contact=5e-7, ends=False, noise=1e-2,
    ),
}  # fmt: skip


class MjxLocomotion(Mjx):
    """Gymnasium's Hopper, Walker2d, HalfCheetah, Ant, Humanoid and HumanoidStandup (v5)."""

    forward, lift, alive, contact, ends, gaussian = 1.0, 0.0, 0.0, 0.0, True, False
    height, pitch, limit = (-np.inf, np.inf), (-np.inf, np.inf), np.inf
    clip_velocity = clip_force = np.inf

    def __init__(self, gym_id: str):
        self.robot = gym_id.removesuffix("-v5")
        for name, value in MJX_TASKS[gym_id].items():
            setattr(self, name, value)
        super().__init__(gym_id)
        self.planar = self.robot in ("Hopper", "Walker2d", "HalfCheetah")

    def derive(self, data):
        force = jnp.clip(data.cfrc_ext[1:], -self.clip_force, self.clip_force).ravel()
        if self.robot == "Ant":
            return data.xpos[1, 0], force
        if self.robot.startswith("Humanoid"):
            mass = self.model.body_mass / self.model.body_mass.sum()
            inertia, velocity = data._impl.cinert[1:].ravel(), data.cvel[1:].ravel()
            derived = jnp.concatenate([inertia, velocity, data.qfrc_actuator[6:], force])
            return mass @ data.xipos[:, 0], derived
        return super().derive(data)

    def transition(self, state, action, rng=None, params=None) -> MjxState:
        new = self.simulate(state, action)
        return new._replace(x=new.qpos[0]) if self.planar else new  # here nothing lags behind

    def observation(self, state, rng=None, params=None):
        qvel = jnp.clip(state.qvel, -self.clip_velocity, self.clip_velocity)
        return jnp.concatenate([state.qpos[1 if self.planar else 2 :], qvel, state.derived])

    def healthy(self, state):
        height, pitch = state.qpos[1:3] if self.planar else (state.qpos[2], 0.0)
        upright = (self.height[0] < height) & (height < self.height[1])
        upright &= (self.pitch[0] < pitch) & (pitch < self.pitch[1])
        others = jnp.concatenate([state.qpos[2:], state.qvel])
        return upright & (jnp.abs(others) < self.limit).all()

    def reward(self, state, action, next_state, rng=None, params=None):
        force = next_state.derived[-(self.model.nbody - 1) * 6 :]
        costs = self.control * (action**2).sum()
        costs += jnp.minimum(self.contact * (force**2).sum(), 10.0)
        earned = self.forward * (next_state.x - state.x) / self.dt + self.lift * next_state.qpos[2]
        return earned + self.alive * (self.healthy(next_state) | (not self.ends)) - costs

    def terminal(self, state, rng=None, params=None):
        return ~self.healthy(state) & self.ends


# ==== end shared: mjx locomotion ====


# ---- Gymnasium's tasks ----
PENDULUM = "phys2d/Pendulum-v0"
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup")
GYMNASIUM = (PENDULUM, *(f"{name}-{version}" for name in MUJOCO for version in ("v4", "v5")))


class Pendulum(PendulumFunctional):
    """Gymnasium's functional pendulum with the time limit of its registered version.

    Swing up and balance; it never terminates. A good policy returns about -150, a random one
    about -1200.
    """

    max_episode_steps = 200


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
class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe 2017) as in CrossQ: batch statistics for the first `warm_up`
    calls, afterwards corrected to the running ones, to which inference always keeps."""

    warm_up: int = 100_000
    momentum: float = 0.99
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, train):
        width = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        calls = self.variable("batch_stats", "calls", jnp.zeros, (), jnp.int32)
        gain = self.param("gain", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            m = x.mean(axis=tuple(range(x.ndim - 1)))
            v = ((x - m) ** 2).mean(axis=tuple(range(x.ndim - 1)))
            std = jnp.sqrt(var + self.epsilon)
            r = jax.lax.stop_gradient(jnp.clip(jnp.sqrt(v + self.epsilon) / std, 1 / 3, 3))
            d = jax.lax.stop_gradient(jnp.clip((m - mean) / std, -5, 5))
            # sqrt has no gradient at 0, the variance of a constant feature or a dead unit
            root = jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1.0)), 0.0)
            renorm = calls.value >= self.warm_up
            mean = jnp.where(renorm, m - d * root / r, m)
            var = jnp.where(renorm, v / r**2, v)
            keep = lambda old, new: self.momentum * old + (1 - self.momentum) * new
            running_mean.value = keep(running_mean.value, jax.lax.stop_gradient(m))
            running_var.value = keep(running_var.value, jax.lax.stop_gradient(v))
            calls.value += 1
        return gain * (x - mean) / jnp.sqrt(var + self.epsilon) + bias


class Norm(nn.Module):
    """The normalisation of that kind: brn, layer, or none."""

    kind: str

    @nn.compact
    def __call__(self, x, train):
        if self.kind == "brn":
            return BatchRenorm()(x, train)
        return nn.LayerNorm()(x) if self.kind == "layer" else x


FAN_AVG = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


class MLP(nn.Module):
    """Dense layers with activation and then a norm, and a linear head where `out_dim` is given."""

    hidden_dims: tuple[int, ...]
    out_dim: int | None = None
    activation: Callable = nn.relu
    norm: str = "none"  # brn also normalises the input
    kernel_init: Callable = nn.initializers.lecun_normal()
    head_init: Callable | None = None
    head_bias: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchRenorm()(x, train) if self.norm == "brn" else x
        for width in self.hidden_dims:
            x = self.activation(nn.Dense(width, kernel_init=self.kernel_init)(x))
            x = Norm(self.norm)(x, train)
        if self.out_dim is None:
            return x
        inits = self.head_init or self.kernel_init, nn.initializers.constant(self.head_bias)
        return nn.Dense(self.out_dim, kernel_init=inits[0], bias_init=inits[1])(x)


class Critic(nn.Module):
    """Independent Q functions with stacked parameters: (obs, action) -> (num_critics, B)."""

    num_critics: int
    net: dict

    @nn.compact
    def __call__(self, obs, actions, train):
        members = nn.vmap(
            MLP,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.num_critics,
        )
        x = jnp.concatenate([obs, actions], axis=-1)
        return members(out_dim=1, **self.net)(x, train).squeeze(-1)


def bound_log_std(head):
    """A learned log deviation within [-5, 2], about -1.5 at first."""
    return -5 + 3.5 * (jnp.tanh(head) + 1)


def join(*parts):
    """Concatenate features; a part with one row belongs to all rows."""
    rows = max(p.shape[0] for p in parts)
    return jnp.concatenate([jnp.broadcast_to(p, (rows, p.shape[1])) for p in parts], axis=-1)


class Velocity(nn.Module):
    """What the three velocities share. `context(obs)` is computed once per rollout;
    `velocity(context, x, t, k)` at each Euler step k, time t (1 or B, 1), gives v and the log
    deviation of the step's noise (None where it is not learned)."""

    act_dim: int
    width: int  # hidden_dim, or d_model of flow-t
    flow_steps: int
    online: bool  # from scratch: BatchRenorm; offline-to-online: none, and deeper MLPs
    learned_noise: bool

    def __call__(self, obs, x, train=False):
        """Touch every parameter, for the initialisation."""
        context, t = self.context(obs, train), jnp.zeros((1, 1))
        return [self.velocity(context, x, t, k, train) for k in range(self.flow_steps)]


class NaiveVelocity(Velocity):
    """--policy mlp: a plain network, whose rollout is a residual RNN."""

    def setup(self):
        if self.online:
            self.norm = BatchRenorm()
            self.body = MLP((self.width, self.width))
        else:
            self.body = MLP((self.width,) * 4, None, nn.gelu, kernel_init=FAN_AVG)
        head_init = nn.initializers.lecun_normal() if self.online else FAN_AVG
        self.head = nn.Dense(self.act_dim, kernel_init=head_init)
        if self.learned_noise:
            self.noise_head = nn.Dense(self.act_dim)

    def context(self, obs, train):
        return obs

    def velocity(self, obs, x, t, k, train):
        x = join(obs, x, t)
        x = self.body(self.norm(x, train) if self.online else x)
        return self.head(x), bound_log_std(self.noise_head(x)) if self.learned_noise else None


class GatedVelocity(Velocity):
    """--policy flow-g: v = g (vhat - x), as in a GRU; g is 0.993 at first, whatever the input."""

    def setup(self):
        if self.online:
            self.norm = BatchRenorm()
            self.time = MLP((64,), 32, nn.swish)
            self.candidate = MLP((self.width,), self.act_dim, nn.swish)
            gate = dict(hidden_dims=(self.width,))
        else:
            self.candidate = MLP((self.width,) * 4, self.act_dim, nn.gelu, kernel_init=FAN_AVG)
            gate = dict(hidden_dims=(self.width // 2,), kernel_init=FAN_AVG)
        zeros = nn.initializers.zeros
        self.gate = MLP(
            out_dim=self.act_dim, activation=nn.swish, head_init=zeros, head_bias=5.0, **gate
        )
        if self.learned_noise:  # of the state alone, so the same for all steps
            self.noise = MLP((self.width, self.width), self.act_dim)

    def context(self, obs, train):
        return obs, bound_log_std(self.noise(obs)) if self.learned_noise else None

    def velocity(self, context, x, t, k, train):
        obs, log_std = context
        if self.online:
            angles = t * jnp.exp(-jnp.log(1e4) * jnp.arange(16) / 15)
            time = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
            inputs = join(self.norm(join(obs, x), train), time)
        else:
            inputs = join(obs, x, t)
        return nn.sigmoid(self.gate(inputs)) * (self.candidate(inputs) - x), log_std


class DecoderVelocity(Velocity):
    """--policy flow-t: a transformer decoder whose one token is x and whose one memory is s.

    A softmax over one key is 1, whatever the query: self-attention is W_o W_v x, cross-attention
    W_o' W_v' m, and queries, keys, masks and heads would have no effect. The product W_o W_v stays
    two matrices, because Adam treats them as two.
    """

    num_blocks: int = 2

    def setup(self):
        d, norm = self.width, "brn" if self.online else "layer"
        dense = lambda: nn.Dense(d)
        norms = lambda n: [Norm(norm) for _ in range(n)]
        blocks = range(self.num_blocks)
        if self.online:
            self.obs_norm = BatchRenorm()
            self.token_norms = [BatchRenorm() for _ in range(self.flow_steps)]
        self.memory = MLP((d // 2,), d, nn.silu)
        self.token = dense()
        self.time = MLP((d // 4, d // 2), d, nn.silu)
        self.self_value, self.self_out = [dense() for _ in blocks], [dense() for _ in blocks]
        self.cross_value, self.cross_out = [dense() for _ in blocks], [dense() for _ in blocks]
        self.feed_forward = [MLP((4 * d,), d, nn.gelu) for _ in blocks]
        self.norms = [norms(3) for _ in blocks]
        self.head = nn.Dense(self.act_dim)
        if self.learned_noise:
            self.noise_head = nn.Dense(self.act_dim)

    def context(self, obs, train):
        m = self.memory(self.obs_norm(obs, train) if self.online else obs)
        return [o(v(m)) for v, o in zip(self.cross_value, self.cross_out, strict=True)]

    def velocity(self, memories, x, t, k, train):
        x = self.token(self.token_norms[k](x, train) if self.online else x) + self.time(t)
        for b, memory in enumerate(memories):  # post-norm
            norms = self.norms[b]
            x = norms[0](x + self.self_out[b](self.self_value[b](x)), train)
            x = norms[1](x + memory, train)
            x = norms[2](x + self.feed_forward[b](x), train)
        if not self.learned_noise:
            return self.head(x), None
        # this policy's noise is added to the velocity, so a step of 1/K scales it too
        return self.head(x), bound_log_std(self.noise_head(x)) - jnp.log(self.flow_steps)


class GaussianPolicy(nn.Module):
    """--policy gaussian: mean and clipped log deviation of SAC's action before tanh."""

    act_dim: int
    width: int
    norm: str

    @nn.compact
    def __call__(self, obs, train):
        x = MLP((self.width // 2, self.width, self.width // 2), norm=self.norm)(obs, train)
        mean, log_std = nn.Dense(self.act_dim)(x), nn.Dense(self.act_dim)(x)
        return mean, jnp.clip(log_std, -20, 2)


class Networks(NamedTuple):
    """The method's functions of (params, stats, inputs..., train) -> (output, stats), `stats` being
    BatchRenorm's state; tests put hand-made ones in their place."""

    dim: int  # actions of a whole chunk
    critic: Callable  # obs, action -> (num_critics, B)
    context: Callable | None = None  # obs -> what the velocity needs of it
    velocity: Callable | None = None  # context, x, t, k -> (v, log_std or None)
    gaussian: Callable | None = None  # obs -> (mean, log_std)


def make_modules(args, act_dim):
    """Flax modules of actor and critic, which see all actions of a chunk as one."""
    dim = args.horizon_length * act_dim
    online = args.mode == "online"
    kind = args.critic if online else "layer"
    activation = nn.relu if online else nn.gelu
    init = nn.initializers.lecun_normal() if online else FAN_AVG
    net = dict(hidden_dims=args.critic_hidden_dims, activation=activation, kernel_init=init)
    critic = Critic(args.num_critics, net | dict(norm="none" if kind == "plain" else kind))
    if args.policy == "gaussian":
        norm = "brn" if kind == "brn" else "none"
        return dict(actor=GaussianPolicy(dim, args.hidden_dim, norm), critic=critic)
    kinds = {"mlp": NaiveVelocity, "flow-g": GatedVelocity, "flow-t": DecoderVelocity}
    width = args.d_model if args.policy == "flow-t" else args.hidden_dim
    learned = args.noise == "learned"
    actor = kinds[args.policy](dim, width, args.flow_steps, online, learned)
    return dict(actor=actor, critic=critic)


def make_networks(args, act_dim):
    """The modules as plain functions."""

    def function(module, method=None):
        def apply(params, stats, *inputs, train=False):
            variables = {"params": params, "batch_stats": stats}
            out, new = module.apply(
                variables, *inputs, train, method=method, mutable=["batch_stats"]
            )
            return out, new.get("batch_stats", stats)

        return apply

    modules = make_modules(args, act_dim)
    actor, critic = modules["actor"], function(modules["critic"])
    if args.policy == "gaussian":
        return Networks(actor.act_dim, critic, gaussian=function(actor))
    return Networks(actor.act_dim, critic, function(actor, "context"), function(actor, "velocity"))


def init_params(args, obs_dim, act_dim, key):
    """(trainable parameters, state of BatchRenorm), each with entries actor and critic."""
    modules = make_modules(args, act_dim)
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, modules["actor"].act_dim))
    actor_key, critic_key = jax.random.split(key)
    inputs = (obs, False) if args.policy == "gaussian" else (obs, action, False)
    variables = dict(
        actor=modules["actor"].init(actor_key, *inputs),
        critic=modules["critic"].init(critic_key, obs, action, False),
    )
    params = {name: v["params"] for name, v in variables.items()}
    if args.autotune:
        params["log_alpha"] = jnp.log(jnp.float32(args.ent_coef))
    return params, {name: v.get("batch_stats", {}) for name, v in variables.items()}


# ---- the method: sampling ----
class Rollout(NamedTuple):
    """Every Gaussian draw x = mean + exp(log_std) eps behind one action, each (draws, B, A): A_0
    and the K noisy Euler steps of a flow, or the Gaussian policy's one draw. The last x is u."""

    x: jax.Array
    mean: jax.Array
    log_std: jax.Array
    eps: jax.Array


def num_draws(args):
    return 1 if args.policy == "gaussian" else args.flow_steps + 1


def rollout(params, stats, nets, args, obs, eps, sigma, train=False):
    """Path from the noise `eps` (draws, B, A); None: the deterministic path -> (Rollout, stats).

    `params` and `stats` are the actor's. `sigma` is the deviation of fixed noise.
    """
    if args.policy == "gaussian":
        (mean, log_std), stats = nets.gaussian(params, stats, obs, train=train)
        eps = jnp.zeros((1, *mean.shape)) if eps is None else eps
        x = mean + jnp.exp(log_std) * eps[0]
        return Rollout(x[None], mean[None], log_std[None], eps), stats
    dt, noisy = 1 / args.flow_steps, eps is not None
    context, stats = nets.context(params, stats, obs, train=train)
    if not noisy:
        eps = jnp.zeros((num_draws(args), obs.shape[0], nets.dim))
    zeros = jnp.zeros_like(eps[0])
    path = [(eps[0], zeros, zeros)]  # A_0
    for k in range(args.flow_steps):  # unrolled: flow-t has a norm for each step
        x, t = path[-1][0], k * dt
        (v, log_std), stats = nets.velocity(
            params, stats, context, x, jnp.full((1, 1), t), k, train=train
        )
        if log_std is None:
            log_std = jnp.full_like(zeros, jnp.log(step_std(args, sigma)))
        if args.drift_correction and noisy:  # + sigma^2 / 2 times the score of the flow at time t
            v = v + sigma**2 / 2 * (t * v - x) / (1 - t)
        mean = x + dt * v
        log_std = jnp.broadcast_to(log_std, mean.shape)
        path.append((mean + jnp.exp(log_std) * eps[k + 1], mean, log_std))
    x, mean, log_std = (jnp.stack(parts) for parts in zip(*path, strict=True))
    return Rollout(x, mean, log_std, eps), stats


def step_std(args, sigma):
    """Actual deviation of fixed noise in one Euler step."""
    return sigma * args.flow_steps**-0.5 if args.drift_correction else sigma


def path_log_prob(path, scale):
    """log density of a path and its action scale * tanh(u): (draws, B, A) -> (B,).

    The quadratic term in eps is that of the drawn x, exactly; log(1 - tanh^2) is stable for any u.
    """
    draws = -0.5 * path.eps**2 - path.log_std - 0.5 * jnp.log(2 * jnp.pi)
    u = path.x[-1]
    jacobian = jnp.log(scale) + 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return (draws.sum(axis=0) - jacobian).sum(axis=-1)


def sample_action(params, stats, nets, args, obs, key, sigma, train=False):
    """Stochastic actions (B, A), log density of their paths (B,), the paths, the actor's stats."""
    eps = jax.random.normal(key, (num_draws(args), obs.shape[0], nets.dim))
    path, stats = rollout(params, stats, nets, args, obs, eps, sigma, train)
    action = args.action_scale * jnp.tanh(path.x[-1])
    return action, path_log_prob(path, args.action_scale), path, stats


def aggregate(q, args):
    """Join the critics' values: the smallest online, the mean offline-to-online."""
    return q.min(axis=0) if args.mode == "online" else q.mean(axis=0)


# ---- the method: losses ----
def critic_loss(params, stats, target, nets, args, batch, next_action, next_cost):
    """TD error; next_cost = alpha log p' (B,). `target`: (params, stats) of the target critic, or
    None for CrossQ, where both pairs share one pass and its batch statistics."""
    inputs = (batch["obs"], batch["actions"]), (batch["next_obs"], next_action)
    if target is None:
        both = [jnp.concatenate(pair) for pair in zip(*inputs, strict=True)]
        q, stats = nets.critic(params, stats, *both, train=True)
        q, next_q = jnp.split(q, 2, axis=1)
    else:
        q, stats = nets.critic(params, stats, *inputs[0], train=True)
        next_q, _ = nets.critic(*target, *inputs[1])
    value = aggregate(next_q, args) - next_cost
    y = jax.lax.stop_gradient(batch["returns"] + batch["discounts"] * value)
    errors = batch["valid"][:, -1] * (q - y) ** 2  # 0 where an episode ended inside the chunk
    if args.mode == "online":
        loss = errors.sum(axis=0).mean() * (0.5 if args.critic == "brn" else 1.0)
    else:
        loss = errors.mean()
    return loss, ({"critic_loss": loss, "q": q.mean(), "td_target": y.mean()}, stats)


def actor_loss(params, stats, nets, args, batch, critic, alpha, beta, key):
    """Up the critic, entropy, and offline-to-online the distance to the data.

    `critic` is its (params, stats); the gradient is that of the actor alone.
    """
    action, log_prob, path, stats = sample_action(
        params, stats, nets, args, batch["obs"], key, args.sigma, train=True
    )
    q, _ = nets.critic(*critic, batch["obs"], action)
    loss = jnp.mean(alpha * log_prob - aggregate(q, args))
    info = {"entropy": -log_prob.mean(), "actor_q": q.mean()}
    info["step_std"] = jnp.exp(path.log_std[-1]).mean()
    if args.mode == "offline-to-online":
        info["data_distance"] = jnp.mean((action - batch["actions"]) ** 2)
        loss += beta * info["data_distance"]
    return loss, ({"actor_loss": loss, **info}, stats)


def flow_matching_loss(params, stats, nets, args, batch, key):
    """Behaviour cloning: the velocity of straight paths from N(0, I) to the data."""
    x1 = batch["actions"]
    if args.bc_space == "pretanh":  # the rollout's own space: tanh(x1) is what is played
        x1 = jnp.arctanh(x1)
    noise_key, time_key = jax.random.split(key)
    x0 = jax.random.normal(noise_key, x1.shape)
    t = jax.random.uniform(time_key, (len(x1), 1))
    context, _ = nets.context(params, stats, batch["obs"], train=True)
    x_t = (1 - t) * x0 + t * x1
    (v, _), _ = nets.velocity(params, stats, context, x_t, t, 0, train=True)
    valid = jnp.repeat(batch["valid"], x1.shape[1] // batch["valid"].shape[1], axis=1)
    loss = jnp.mean(valid * (v - (x1 - x0)) ** 2)
    return loss, ({"bc_loss": loss}, stats)


def temperature_loss(log_alpha, entropy, target_entropy):
    """Raise alpha while the entropy is below its target, lower it above."""
    return jnp.exp(log_alpha) * jax.lax.stop_gradient(entropy - target_entropy)


# ---- the method: one update ----
@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Keys are functions of (seed, step), so none is stored."""

    params: Any  # actor, critic and, if it is learned, log_alpha
    stats: Any  # BatchRenorm's running statistics of actor and critic
    target_critic: Any  # empty where there is none
    opt_state: Any
    obs_mean: jax.Array
    obs_std: jax.Array
    seed: jax.Array
    step: jax.Array  # critic updates


class PhaseSettings(NamedTuple):
    """What differs between the phases; traced, so that a switch recompiles nothing."""

    beta: jax.Array


def optimizers(args):
    """One Adam per group, without clipping, decay or schedule."""
    rates = dict(actor=args.actor_lr, critic=args.critic_lr, log_alpha=args.alpha_lr)
    return {name: optax.adam(rate, b1=args.adam_b1) for name, rate in rates.items()}


def has_target(args):
    return args.mode == "offline-to-online" or args.critic == "plain"


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params, stats = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    return TrainState(
        params=params,
        stats=stats,
        target_critic=params["critic"] if has_target(args) else {},
        opt_state={name: optimizers(args)[name].init(p) for name, p in params.items()},
        obs_mean=obs_mean,
        obs_std=obs_std,
        seed=seed,
        step=jnp.zeros((), jnp.int32),
    )


def descend(state, name, grads, args):
    """One Adam step of the group `name`."""
    params, opt_state = dict(state.params), dict(state.opt_state)
    updates, opt_state[name] = optimizers(args)[name].update(grads, opt_state[name], params[name])
    params[name] = optax.apply_updates(params[name], updates)
    return state.replace(params=params, opt_state=opt_state)


def temperature(state, args):
    """alpha, learned or constant."""
    return jnp.exp(state.params["log_alpha"]) if args.autotune else jnp.float32(args.ent_coef)


def critic_step(state, batch, key, nets, args):
    """One Adam step of the critics and, where there is one, a small step of their target."""
    next_action, next_log_prob, _, _ = sample_action(
        state.params["actor"], state.stats["actor"], nets, args, batch["next_obs"], key,
        args.sigma_inference,
    )  # fmt: skip
    target = (state.target_critic, state.stats["critic"]) if has_target(args) else None
    next_cost = temperature(state, args) * next_log_prob
    grads, (info, stats) = jax.grad(critic_loss, has_aux=True)(
        state.params["critic"], state.stats["critic"], target, nets, args, batch, next_action,
        next_cost,
    )  # fmt: skip
    state = descend(state, "critic", grads, args)
    if has_target(args):
        new = optax.incremental_update(state.params["critic"], state.target_critic, args.tau)
        state = state.replace(target_critic=new)
    return state.replace(stats=state.stats | {"critic": stats}, step=state.step + 1), info


def actor_step(state, judge, batch, key, settings, nets, args, kind):
    """One Adam step of the actor, by flow matching ("bc") or up the critic of `judge` ("rl"), and
    with --autotune one of the temperature."""
    actor = (state.params["actor"], state.stats["actor"], nets, args, batch)
    if kind == "bc":
        grads, (info, _) = jax.grad(flow_matching_loss, has_aux=True)(*actor, key)
        return descend(state, "actor", grads, args), info
    critic = (judge.params["critic"], judge.stats["critic"])
    alpha = temperature(state, args)
    grads, (info, stats) = jax.grad(actor_loss, has_aux=True)(
        *actor, critic, alpha, settings.beta, key
    )
    state = descend(state, "actor", grads, args)
    state = state.replace(stats=state.stats | {"actor": stats})
    if args.autotune:
        log_alpha = state.params["log_alpha"]
        grads = jax.grad(temperature_loss)(log_alpha, info["entropy"], args.target_entropy)
        state = descend(state, "log_alpha", grads, args)
    return state, info | {"alpha": alpha}


def update(state, batches, key, settings, nets, args, kind="rl"):
    """One critic step on each of the policy_delay batches, then an actor step on the last one.

    batch: obs, next_obs (B, D), actions (B, H * A), returns, discounts (B,), valid (B, H); see
    `sample_chunks`. Offline-to-online both steps start from the same parameters, as one joint step.
    """
    actor_key, *keys = jax.random.split(key, len(batches) + 1)
    infos = []
    for batch, critic_key in zip(batches, keys, strict=True):
        before = state
        state, info = critic_step(state, batch, critic_key, nets, args)
        infos.append(info)
    judge = before if args.mode == "offline-to-online" else state
    state, actor_info = actor_step(state, judge, batches[-1], actor_key, settings, nets, args, kind)
    return state, jax.tree.map(lambda *x: sum(x) / len(x), *infos) | actor_info


def policy(state, obs, key, nets, args, deterministic=False):
    """Actions (H * A,) of the next H steps for one raw observation (D,)."""
    obs = ((obs - state.obs_mean) / state.obs_std)[None]
    actor = (state.params["actor"], state.stats["actor"], nets, args, obs)
    if deterministic:
        path, _ = rollout(*actor, None, args.sigma_inference)
        return args.action_scale * jnp.tanh(path.x[-1, 0])
    return sample_action(*actor, key, args.sigma_inference)[0][0]


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
ONLY_OFFLINE_TO_ONLINE = ("offline_steps", "horizon_length", "normalize_obs", "sparse", "beta")
ONLY_OFFLINE_TO_ONLINE += ("beta_online", "bc_space", "offline_schedule", "bc_fraction")


def find_task(env_id):
    """Gymnasium id, OGBench id or short name -> Task."""
    task = parse_task(env_id, GYMNASIUM)
    if task.name in GYMNASIUM:
        task = task._replace(gym_id="" if task.name == PENDULUM else task.name, success=False)
    return task


def resolve(args, task):
    """Fill what no flag set from the tables; refuse what is out of range or contradictory."""
    mode = "offline-to-online" if task.dataset else "online"
    if args.mode not in (None, mode):
        kind = "an OGBench" if task.dataset else "a Gymnasium"
        raise UserError(f"{task.name} is {kind} task: use --mode {mode}, or another --env-id")
    for name in ONLY_OFFLINE_TO_ONLINE if mode == "online" else ("critic",):
        if getattr(args, name) not in (None, PAPER["online"].get(name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no meaning with --mode {mode}; leave it out")
    if mode == "offline-to-online" and args.policy == "gaussian":
        raise UserError(
            "--policy gaussian exists with --mode online alone; use flow-g, flow-t, mlp"
        )

    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    table = PAPER[mode] | TASK_DEFAULTS[family]
    if mode == "online":
        gaussian = (args.policy or table["policy"]) == "gaussian"
        args = fill(args, critic="plain" if gaussian else "brn")
        if args.critic == "plain":
            table = table | PLAIN | {k: v for k, v in TASK_DEFAULTS[family].items() if k in PLAIN}
            table["policy_delay"] = PLAIN["policy_delay"]
    elif args.beta is None and "beta" not in TASK_DEFAULTS[family]:
        print(f"beta for {task.base} is not published: {table['beta']:g}; see --beta")
    if args.autotune and not args.ent_coef and mode == "offline-to-online":
        table["ent_coef"] = 0.2
    if args.drift_correction:
        table |= dict(sigma=0.10, sigma_inference=0.10)
    args = fill(args, env_id=task.name, mode=mode, **table)
    args = fill(args, sigma=0.05, ent_coef=0.0, checkpoint_interval=args.eval_interval)
    args = fill(args, sigma_inference=0.02 if task.dataset else args.sigma, beta_online=args.beta)

    check_numbers(args, unbounded=("target_entropy",), zero=("learning_starts",))
    if min(args.critic_hidden_dims, default=0) < 1:
        raise UserError("--critic-hidden-dims needs layers of at least one unit")
    if args.d_model % 4 or args.hidden_dim % 2:
        raise UserError("--d-model must be a multiple of 4 and --hidden-dim of 2")
    if args.offline_steps + args.online_steps == 0:
        raise UserError("nothing to train: give --offline-steps or --online-steps")
    if mode == "online" and args.online_steps <= args.learning_starts:
        raise UserError("nothing to train: --online-steps must exceed --learning-starts")
    if args.online_steps % args.num_envs or args.learning_starts % args.num_envs:
        raise UserError("--online-steps and --learning-starts must be multiples of --num-envs")
    if args.buffer_size < args.num_envs * args.horizon_length:
        raise UserError(
            "--buffer-size must hold at least --horizon-length rows of each environment"
        )
    if args.bc_fraction is not None and args.bc_fraction > 1:
        raise UserError(f"--bc-fraction is {args.bc_fraction:g}, but must be between 0 and 1")
    if args.policy == "gaussian" and (args.noise == "fixed" or args.drift_correction):
        raise UserError("--policy gaussian learns its deviation; leave out --noise")
    if args.drift_correction and args.noise != "fixed":
        raise UserError("--drift-correction needs noise of a known size: add --noise fixed")
    if args.noise == "fixed" and min(args.sigma, args.sigma_inference) <= 0:
        raise UserError("--sigma and --sigma-inference must be above 0")
    if args.autotune and args.ent_coef <= 0:
        raise UserError("--autotune starts from --ent-coef, which must be above 0")
    return args


def fill(args, **values):
    """Set those of `values` that no flag has set; env_id always."""
    unset = {k: v for k, v in values.items() if getattr(args, k) is None or k == "env_id"}
    return dataclasses.replace(args, **unset)


def entropy_ceiling(args, dim):
    """Largest entropy of a path with fixed noise; the action's Jacobian only lowers it."""
    step = jnp.log(step_std(args, args.sigma)) * args.flow_steps
    draws = (args.flow_steps + 1) / 2 * jnp.log(2 * jnp.pi * jnp.e)
    return float(dim * (draws + step + jnp.log(args.action_scale)))


def fit_to_task(args, obs_dim, act_dim):
    """What depends on the sizes of observation and action: target entropy, memory."""
    if args.autotune:
        if args.mode == "offline-to-online" and args.target_entropy is None:
            raise UserError("--autotune needs --target-entropy with --mode offline-to-online")
        args = fill(args, target_entropy=-float(act_dim) if args.policy == "gaussian" else 0.0)
        ceiling = entropy_ceiling(args, args.horizon_length * act_dim)
        if args.noise == "fixed" and args.target_entropy >= ceiling:
            raise UserError(
                f"--target-entropy {args.target_entropy:g} cannot be reached with fixed noise, "
                f"whose entropy is at most {ceiling:.4f}: lower it or raise --sigma"
            )
    rows, row = args.num_seeds * ring_rows(args), 4 * (2 * obs_dim + act_dim + 3)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", host_memory())
    if rows * row > memory * jax.device_count():
        raise UserError(
            f"the replay of {args.num_seeds} seed(s) takes {rows * row / 1e9:.1f} GB, and the "
            f"device has {memory / 1e9:.1f}: lower --buffer-size or --num-seeds"
        )
    return args


def host_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze = task.base.removeprefix("pointmaze-")
    built_in = args.env_backend in ("auto", "jax")
    if task.name == PENDULUM and built_in:
        return Pendulum()
    if task.base != maze and maze in MAZES and built_in:
        return PointMaze(maze, task.index, args.success_timing)
    if args.env_backend == "mjx" and task.gym_id and task.base == maze:
        return make_mjx(task, MJX_TASKS, lambda: MjxLocomotion(task.gym_id))
    if args.env_backend in ("jax", "mjx") or not task.gym_id:
        raise UserError(f"{task.name} has no {args.env_backend} environment; drop --env-backend")
    return None


def open_env(task, env, args):
    """(observation size, action size) of the task, whose action box must be that of the flags."""
    spaces = env or make_host_env(task.gym_id, args.success_timing if task.dataset else None)
    box, scale = spaces.action_space, args.action_scale
    if not (np.allclose(box.low, -scale) and np.allclose(box.high, scale)):
        raise UserError(f"--action-scale is {scale:g}, but {task.name} has the box {box}")
    return spaces.observation_space.shape[0], box.shape[0]


# ---- collecting and learning ----
def block_steps(args):
    """Vector steps after which a whole number of actor updates is due. With one environment, three
    steps and then three critic updates and one of the actor equal step after step: the actor that
    acts is the same, and each update sees the rows that it would have seen."""
    per_step = args.num_envs * args.utd
    return args.policy_delay // np.gcd(args.policy_delay, per_step)


def ring_rows(args):
    """Rows of the replay: those an update may see, and those that the rest of its block adds."""
    rows = min(args.online_steps, args.buffer_size)
    rows += -rows % args.num_envs + block_steps(args) * args.num_envs
    return int(rows)


def sample_and_update(carry, data, settings, nets, args, first=0, kinds=None):
    """Sample and update once for each of the `kinds` of step -> (carry, metrics).

    carry: state and, online, replay. `first`: number of the update within its block.
    """
    offline_to_online = args.mode == "offline-to-online"
    kinds = kinds or (("bc", "rl") if offline_to_online else ("rl",))
    state, replay = carry["state"], carry.get("replay")

    def keys(state, j=0):
        return jax.random.split(purpose_key(state.seed, "update", state.step + j))

    def draw(j):
        visible = {}
        if replay is not None:  # the rows that existed at the step of update first + j
            later = block_steps(args) - 1 - (first + j) // (args.num_envs * args.utd)
            visible = dict(added=replay["added"] - args.num_envs * later, limit=args.buffer_size)
        batch = sample_chunks(
            keys(state, j)[0], data, replay, args.batch_size, args.horizon_length, args.gamma,
            stride=args.num_envs, **visible,
        )  # fmt: skip
        for name in ("obs", "next_obs"):
            batch[name] = (batch[name] - state.obs_mean) / state.obs_std
        return batch

    batches, metrics = [draw(j) for j in range(args.policy_delay)], {}
    for kind in kinds:  # offline both on the same batch, with keys of their own
        state, info = update(state, batches, keys(state)[1], settings, nets, args, kind)
        metrics |= info
    return carry | {"state": state}, metrics


def gradient_step(carry, data, settings, nets, args, first=0, kinds=None):
    """`sample_and_update` with its metrics added to the running sums, once per critic update."""
    carry, metrics = sample_and_update(carry, data, settings, nets, args, first, kinds)
    sums = carry["sums"]
    metrics = {k: metrics.get(k, jnp.zeros(())) for k in sums["train"]}
    for _ in range(args.policy_delay):
        sums = add_sums(sums, metrics)
    return carry | {"sums": sums}


def learn_block(carry, data, settings, nets, args):
    """All updates of a block: groups of policy_delay critic updates and one of the actor."""
    groups = block_steps(args) * args.num_envs * args.utd // args.policy_delay

    def learn(g, carry):
        first = g * args.policy_delay
        return gradient_step(carry, data, settings, nets, args, first, ("rl",))

    return jax.lax.fori_loop(0, groups, learn, carry)


def explore(state, obs, time, nets, args, act_dim, warm_up):
    """Chunks (E, H, A) for one seed's environments at online step `time`."""
    key, shape = purpose_key(state.seed, "act", time), (len(obs), args.horizon_length, act_dim)
    if warm_up and args.mode == "online":
        return args.action_scale * jax.random.uniform(key, shape, minval=-1, maxval=1)
    act = lambda obs, key: policy(state, obs, key, nets, args)
    return jax.vmap(act)(obs, jax.random.split(key, len(obs))).reshape(shape)


def store(carry, obs, actions, out, returns, args, warm_up):
    """Put one step of all environments into the replay and note the episodes that ended."""
    done = out["terminated"] | out["truncated"]
    reward = jnp.where(out["reward"] != 0, -1.0, 0.0) if args.sparse else out["reward"]
    rows = dict(obs=obs, actions=actions, rewards=reward, next_obs=out["next_obs"])
    rows |= dict(masks=1.0 - out["terminated"], terminals=done)
    carry = carry | {"replay": insert(carry["replay"], rows)}
    if warm_up:  # these returns are not the trained policy's
        return carry
    recent = jnp.concatenate([jnp.where(done, returns, jnp.nan), carry["recent"]])
    recent = recent[jnp.argsort(jnp.isnan(recent))][:RECENT]  # stable: the newest come first
    sums = add_episodes(carry["sums"], returns, done, out["success"])
    return carry | {"recent": recent, "sums": sums}


def environment_step(carry, env, nets, args, act_dim, warm_up):
    """One step of a JAX environment (num_envs copies)."""
    state, envs, time = carry["state"], carry["envs"], carry["replay"]["added"]
    obs, taken = observe(env, envs["state"]), envs["taken"]
    chunks = jax.lax.cond(  # open loop: a new chunk where the last one is used up
        (taken == 0).any(),
        lambda: explore(state, obs, time, nets, args, act_dim, warm_up),
        lambda: envs["chunks"],
    )
    chunks = jnp.where((taken == 0)[:, None, None], chunks, envs["chunks"])
    actions = chunks[jnp.arange(len(taken)), taken]
    env_state, out = step_envs(env, envs["state"], actions, purpose_key(state.seed, "env", time))
    returns = envs["returns"] + out["reward"]
    carry = store(carry, obs, actions, out, returns, args, warm_up)
    done = out["terminated"] | out["truncated"]
    carry["envs"] = dict(
        state=env_state,
        returns=jnp.where(done, 0.0, returns),
        chunks=chunks,
        taken=jnp.where(done, 0, (taken + 1) % args.horizon_length),
    )
    return carry


def online_block(carry, data, settings, env, nets, args, act_dim, warm_up):
    """A block of steps of a JAX environment, then its updates."""

    def step(i, carry):
        return environment_step(carry, env, nets, args, act_dim, warm_up)

    if warm_up:
        return step(0, carry)
    carry = jax.lax.fori_loop(0, block_steps(args), step, carry)
    return learn_block(carry, data, settings, nets, args)


class HostLoop:
    """Online phase on official environments.

    One environment: a block of steps, then its updates, exactly in the published order; they run
    while further actions of a chunk are played. More environments: the updates of a block run
    while the simulators take the next step.
    """

    def __init__(self, envs, data, settings, nets, args, act_dim, warm_up):
        def learn(carry, data, settings):
            return learn_block(carry, data, settings, nets, args)

        def act(state, obs, time):
            return explore(state, obs, time, nets, args, act_dim, warm_up)

        def keep(carry, *inputs):
            return store(carry, *inputs, args, warm_up)

        self.envs, self.args, self.warm_up = envs, args, warm_up
        self.act = jax.jit(jax.vmap(act))
        self.learn = Program(learn, data, settings)
        self.store = jax.jit(jax.vmap(keep), donate_argnums=0)
        self.num_steps = 1 if warm_up else block_steps(args)

    @property
    def seconds(self):
        return self.learn.seconds

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        time, num_envs = int(carry["replay"]["added"][0]), self.args.num_envs
        shape = (self.args.num_seeds, num_envs)
        ids = [(self.args.seed + s, time, e) for s in range(shape[0]) for e in range(num_envs)]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.obs = self.envs.reset(seed=seeds)[0].astype(np.float32).reshape(*shape, -1)
        self.returns, self.taken = np.zeros(shape, np.float32), np.zeros(shape, int)
        self.chunks = 0.0
        return end_episodes(carry, num_envs)

    def __call__(self, carry, n):
        for i in range(n * self.num_steps):
            obs, due = self.obs, self.taken == 0
            if due.any():
                chunks = np.asarray(self.act(carry["state"], obs, carry["replay"]["added"]))
                self.chunks = np.where(due[..., None, None], chunks, self.chunks)
            actions = np.take_along_axis(self.chunks, self.taken[..., None, None], axis=2)[:, :, 0]
            self.envs.step_async(actions.reshape(self.envs.num_envs, -1))
            learn = not self.warm_up
            if learn and self.args.num_envs > 1 and i % self.num_steps == 0:
                carry = self.learn(carry, 1)  # returns before it is done
            out, self.obs = self.outcome(obs.shape)
            self.returns = self.returns + out["reward"]
            carry = self.store(carry, obs, actions, out, self.returns)
            done = out["terminated"] | out["truncated"]
            self.returns = self.returns * ~done
            self.taken = np.where(done, 0, (self.taken + 1) % self.args.horizon_length)
            if learn and self.args.num_envs == 1 and (i + 1) % self.num_steps == 0:
                carry = self.learn(carry, 1)
        return carry

    def outcome(self, shape):
        """Wait for the simulators -> (rows' outcome, observations with which to go on)."""
        obs, reward, terminated, truncated, info = self.envs.step_wait()
        next_obs, success = obs.astype(np.float32), np.zeros(len(reward), np.float32)
        for i in np.flatnonzero(terminated | truncated):  # there, obs already starts an episode
            next_obs[i] = info["final_obs"][i]
            if "success" in info["final_info"]:
                success[i] = info["final_info"]["success"][i]
        out = dict(reward=reward.astype(np.float32), success=success, next_obs=next_obs)
        out |= dict(terminated=terminated, truncated=truncated & ~terminated)
        out = {k: v.reshape(*shape[:2], *v.shape[1:]) for k, v in out.items()}
        return out, obs.astype(np.float32).reshape(shape)


def end_episodes(carry, num_envs):
    """What was under way ends here: no chunk may join the newest rows with what comes."""
    rows, added = carry["replay"]["rows"], carry["replay"]["added"]
    newest = (added[:, None] - 1 - jnp.arange(num_envs)) % rows["terminals"].shape[1]
    seeds = jnp.arange(len(added))[:, None]
    terminals = rows["terminals"].at[seeds, newest].set(1.0)  # before the first row: never read
    return carry | {"replay": carry["replay"] | {"rows": rows | {"terminals": terminals}}}


def make_phases(task, env, data, nets, args, obs_dim, act_dim):
    """The offline phases and, if asked for, the online ones: without updates, then with them."""
    settings = PhaseSettings(jnp.float32(args.beta or 0.0))
    online = PhaseSettings(jnp.float32(args.beta_online or 0.0))
    phases = []

    def offline(name, start, end, kinds):
        def learn(carry, data, settings):
            return gradient_step(carry, data, settings, nets, args, kinds=kinds)

        if start < end:
            phases.append(Phase(name, start, end, lambda c: c, Program(learn, data, settings)))

    if args.offline_schedule == "sequential":
        middle = round(args.bc_fraction * args.offline_steps)
        offline("cloning", 0, middle, ("bc",))
        offline("offline", middle, args.offline_steps, ("rl",))
    else:
        offline("offline", 0, args.offline_steps, ("bc", "rl"))
    if not args.online_steps:
        return phases

    envs, num_envs = None, args.num_envs
    if env is None:
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        timing = args.success_timing if task.dataset else None
        envs = make_host_envs(task.gym_id, timing, args.num_seeds * num_envs, same_step)

    def fresh(seed, time):  # environments at the start of an episode
        env_state = reset_envs(env, purpose_key(seed, "env", time, 1), num_envs)
        chunks = jnp.zeros((num_envs, args.horizon_length, act_dim))
        taken = jnp.zeros(num_envs, jnp.int32)
        return dict(state=env_state, returns=jnp.zeros(num_envs), chunks=chunks, taken=taken)

    def phase(name, start, end, warm_up):
        if env is None:
            advance = HostLoop(envs, data, online, nets, args, act_dim, warm_up)
        else:
            fixed = dict(env=env, nets=nets, args=args, act_dim=act_dim, warm_up=warm_up)
            advance = Program(functools.partial(online_block, **fixed), data, online)

        def enter(carry):
            seeds = carry["state"].seed
            if "replay" not in carry:
                make = lambda seed: make_replay(ring_rows(args), obs_dim, act_dim)
                carry = carry | {"replay": place(jax.jit(jax.vmap(make))(seeds), args.num_seeds)}
            if env is None:
                return advance.restart(carry)
            new = jax.jit(jax.vmap(fresh))(seeds, carry["replay"]["added"])
            return end_episodes(carry, num_envs) | {"envs": place(new, args.num_seeds)}

        stride = num_envs * (1 if warm_up else block_steps(args))
        restart = advance.restart if env is None else None
        return Phase(name, start, end, enter, advance, int(stride), restart)

    start = args.offline_steps + min(args.learning_starts, args.online_steps)
    end = args.offline_steps + args.online_steps
    phases += [phase("warm-up", args.offline_steps, start, True)] * (args.learning_starts > 0)
    return [*phases, *[phase("online", start, end, False)] * (start < end)]


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all seeds on the device(s)."""
    seeds = jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed
    init = jax.vmap(lambda seed: init_state(args, obs_dim, act_dim, mean, std, seed))
    return place(jax.jit(init)(seeds), args.num_seeds)


def start_carry(args, data, nets, state):
    """The carry with which a run starts: states, metric sums, last returns (none yet)."""
    beta, sample = PhaseSettings(jnp.float32(0)), data
    if data is None:  # online: the metrics of an update from the replay, which is not there yet
        obs_dim = state.obs_mean.shape[-1]
        rows = make_replay(1, obs_dim, nets.dim)["rows"]
        sample = {k: jnp.zeros((args.horizon_length, *v.shape[1:])) for k, v in rows.items()}
    one = jax.tree.map(lambda x: x[0], state)
    inputs = (sample, beta, nets, args)
    _, metrics = jax.eval_shape(lambda s: sample_and_update({"state": s}, *inputs), one)
    sums = place(jax.vmap(lambda seed: zero_sums(metrics))(state.seed), args.num_seeds)
    recent = place(jnp.full((args.num_seeds, RECENT), jnp.nan), args.num_seeds)
    return dict(state=state, sums=sums, recent=recent)


def evaluation_policies(nets, args):
    """How to act in evaluation: with the policy's noise (the published numbers' way) or without."""
    act = functools.partial(policy, nets=nets, args=args)
    return dict(stochastic=act, deterministic=functools.partial(act, deterministic=True))


def train(args, task):
    """Train from the start, or from the checkpoint of --resume; writes the run directory."""
    tree, facts = load_checkpoint(args.resume) if args.resume else (None, {"step": 0})
    env = make_jax_env(task, args)
    obs_dim, act_dim = open_env(task, env, args)
    args = fit_to_task(args, obs_dim, act_dim)
    raw, source, data = None, "none: online from scratch", None
    mean, std = jnp.zeros(obs_dim), jnp.ones(obs_dim)
    if task.dataset:
        raw, source = load_dataset(task, args.dataset_dir, args.success_timing)
        if args.sparse:
            raw["rewards"] = -(raw["rewards"] != 0).astype(np.float32)
        data = place(chunk_data(raw), args.num_seeds, copy=True)
    if args.normalize_obs:
        mean, std = data["obs"].mean(axis=0), data["obs"].std(axis=0) + 1e-6
    nets = make_networks(args, act_dim)
    phases = make_phases(task, env, data, nets, args, obs_dim, act_dim)

    state = start_states(args, obs_dim, act_dim, mean, std)
    carry = start_carry(args, data, nets, state)
    if tree is not None:  # enter the phase in which the checkpoint was made, then fill it in
        current = next((p for p in phases if facts["step"] <= p.end), phases[-1])
        carry = current.enter(carry)
        carry = restore(carry, tree, args.resume)
        carry = current.restart(carry) if current.restart else carry
    policies = evaluation_policies(nets, args)
    run = Run(args, task, source, raw, policies, facts["step"])
    run.header(raw)
    evaluate = make_evaluate(task, env, policies, args)
    run.finish(train_loop(run, carry, phases, evaluate, args))


def evaluate_only(args, task):
    """--evaluate: rebuild the networks of a run and evaluate its last checkpoint as it did."""
    tree, facts = load_checkpoint(args.evaluate)
    env = make_jax_env(task, args)
    obs_dim, act_dim = open_env(task, env, args)
    state = start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    state = restore(state, tree["state"], args.evaluate)
    policies = evaluation_policies(make_networks(args, act_dim), args)
    results = make_evaluate(task, env, policies, args)(state, facts["step"])
    print_evaluation(task, args, policies, facts["step"], results)


# ---- main ----
def run(args):
    """Resolve the arguments, then train or evaluate."""
    task = find_task(args.env_id)
    args = resolve(args, task)
    if args.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    evaluate_only(args, task) if args.evaluate else train(args, task)


if __name__ == "__main__":
    sys.exit(command_line(run, Args))
