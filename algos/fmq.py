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

Deviations from the released code
  1. eta / (1 + beta delta) as in the paper: the code leaves eta out of its adaptive radius (the
     default eta = 1 makes both the same).  Other settings are those of its YAML files.
  2. QGBS completes with X_{t',1} (Algorithm 2), with --actor flow by Euler steps from t' to 1; the
     code's single one: --qgbs-completion diagonal.
  3. Lagrangian: the student is d/dt X; the code swaps student and target.
  4. Windows never join the newest and the oldest row of the replay: dataset and online rows lie in
     two blocks, which act as one first-in first-out pool.
  5. H environment steps, then H updates (code: one by one).  With official environments they run
     while the simulators step, on the rows before, once no further chunk is due in those steps.
As the code has it, where the paper says otherwise or nothing
  6. Acting is best-of-32; Algorithm 1 draws one chunk (mode one-step).
  7. BoN selects with the online critic and takes the target critic's value; agg is the mean
     offline, min online (mvp, flow: mean).  The code's comments say min throughout.
  8. Q_1's gradient guides FMQ, that of the min QGBS.
  9. |u - u_off| <= eta; with the norm squared, as also stated, the solution would not fit.
 10. No behaviour cloning online, unless weighted by flag; under mvp the offline loss goes on, on
     old and new data.
 11. gamma = 0.99 also on mazes; rewards of -1 and 0 in scene, in the data and online.  Those of
     the data come from s, as OGBench computes them, those online from s' (--success-timing post).

Modes
  python algos/fmq.py                                     both phases on pointmaze-medium, minutes
  python algos/fmq.py --env-id cube-double-task4          the paper's settings; likewise MVP and QC
  python algos/fmq.py --evaluate runs/RUN                 load a checkpoint and evaluate it
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2",
#   "flax==0.12.8",
#   "optax==0.2.8",
#   "tyro==1.0.17",
#   "typeguard==4.6.1",
#   "numpy==2.4.6",
#   "gymnasium==1.4.0",
#   "ogbench==1.2.2",
#   "mujoco==3.17.0",
#   "tensorboard==2.21.0",
#   "tqdm==4.70.1",
# ]
# ///

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # headless rendering
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # share the GPU with others
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/cleanflow/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import flax
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

ALGO = "fmq"
Values = float | tuple[float, ...]  # several: a grid, whose combinations train in one program
Mode = Literal["best-of-n", "one-step", "qgbs"]


@dataclasses.dataclass(frozen=True)
class Args:
    num_envs = 1  # not a flag: one environment per seed

    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id, a short name (antmaze-giant, cube-double-task4), a Gymnasium
    id (with --dataset), or FILE.py:NAME, a task file"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds (seed, seed+1, ...) in one vmapped program; of a grid: of each arm
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None  # run directory: evaluate its last checkpoint, train nothing
    video: bool = False  # with --evaluate: also record episodes (see benchmark/see.py)
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    start_from: str = ""
    """run directory: a new run from the end of its offline phase; its flags are the defaults"""
    wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
    matmul_precision: Literal["default", "high", "highest"] = "default"  # of float32 matmuls

    # ---- environment and data ----
    env_backend: Literal["auto", "jax", "host", "mjx"] = "auto"
    """jax: vmapped environment inside the program (point mazes); host: the official environment
    through gymnasium.vector; auto: jax where it exists, else host; mjx: ant mazes vmapped inside
    the program, for a GPU (far slower than host on a CPU; evaluation stays official)"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset: str | None = None  # transitions of your own: FILE.npz or FILE.hdf5 (see README)
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    normalize_obs: bool | None = None  # standardise observations, by the data (paper: no)
    sparse: bool | None = None
    """every reward but 0 becomes -1, in the data and online (OGBench only; default: scene only)"""

    # ---- schedule ----
    offline_steps: int | None = None  # offline gradient steps (paper: 1,000,000)
    online_steps: int | None = None  # online environment steps after that (paper: 1,000,000)
    learning_starts: int | None = None  # online steps before the first update, in whole chunks
    log_interval: Annotated[int | None, tyro.conf.arg(aliases=["--updates-per-dispatch"])] = None
    """log the metrics' mean over this many steps"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end of each phase
    eval_episodes: int | None = None  # episodes per evaluation, mode and seed
    eval_background: bool = True  # within a phase, simulators evaluate while training goes on
    eval_all_modes: bool = False  # all modes within a phase too, not just the first
    eval_modes: tuple[Mode, ...] = ("best-of-n", "one-step", "qgbs")
    """ways to act that evaluations try; the first gives the headline number"""
    checkpoint_interval: int | None = None  # checkpoint every this many steps and at the end

    # ---- optimisation ----
    batch_size: int = 256  # windows per gradient step
    learning_rate: Values | None = None  # Adam's step size for all networks
    tau: Values | None = None  # target critic: fraction of the critic in each step
    gamma: Values | None = None  # discount per environment step
    hidden_dims: tuple[int, ...] | None = None  # widths of actor and critic
    num_critics: int = 2  # independent Q functions
    utd: int = 1  # gradient steps per environment step
    buffer_size: int = 2_000_000
    """rows of dataset plus online data that are kept; the oldest, dataset first, give way"""

    # ---- algorithm ----
    horizon: int = 5  # H, actions per chunk
    actor: Literal["flowmap", "flow"] = "flowmap"  # one-step flow map, or flow by Euler steps (QC)
    flow_steps: int | None = None
    """jumps from noise to chunk (1; FMQ trains only that to t = 1), Euler steps of the flow (10)"""
    time_embedding: Literal["sinusoid", "raw"] = "sinusoid"  # flow map's times: features or numbers
    num_samples: int | None = None  # N of BoN, in TD targets, acting and best-of-n (paper: 32)
    q_agg_offline: Literal["mean", "min"] = "mean"  # how critics are joined in the offline phase
    q_agg_online: Literal["auto", "mean", "min"] = "auto"  # and online (auto: only fmq's by min)
    consistency: Literal["eulerian", "semigroup", "lagrangian"] = "eulerian"
    """which identity of flow maps the offline loss asks for"""
    consistency_warmup: int | None = None  # updates with the diagonal loss alone (paper: 5,000)
    consistency_anneal_end: int | None = None  # updates before gaps t - r are full (paper: 50,000)
    online_objective: Literal["fmq", "mvp"] | None = None
    """fmq: Q-guided steps off the frozen actor; mvp: the offline loss goes on (flow's default)"""
    mvp_target: Literal["buffer", "reselect"] = "buffer"  # what mvp imitates: the data, or BoN(s)
    eta: Values | None = None  # trust-region radius of FMQ (paper: 1, without --adaptive-eta 0.5)
    adaptive_eta: bool = True  # shrink the radius where the critics disagree
    beta: Values = 0.3  # how much disagreement shrinks the radius
    normalize_grad: bool = True  # FMQ steps along the unit gradient, or along the gradient itself
    grad_at: Literal["offline", "online"] = "offline"
    """whose endpoint has the gradient, the frozen or current actor's; disagreement: the frozen's"""
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
    log_interval=500, eval_interval=100_000, eval_episodes=50, checkpoint_interval=100_000,
    normalize_obs=False, sparse=False, hidden_dims=(512, 512, 512, 512), learning_rate=3e-4,
    tau=0.005, gamma=0.99, num_samples=32, consistency_warmup=5_000, consistency_anneal_end=50_000,
)  # fmt: skip
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. The data walk to goals everywhere, so a single chunk of their
    # clone leads nowhere: a wide trust region lets FMQ turn most of them towards the task's goal.
    "pointmaze": dict(
        offline_steps=8_000, online_steps=5_000, learning_starts=500, eval_interval=2_000,
        checkpoint_interval=2_000, hidden_dims=(128, 128, 128), learning_rate=1e-3, tau=0.01,
        num_samples=8, eta=2.0, consistency_warmup=500, consistency_anneal_end=3_000,
        normalize_obs=True,
    ),
    "scene": dict(sparse=True),  # [code]
    "": {},
}  # fmt: skip


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
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        members = nn.vmap(MLP, **axes, axis_size=self.num_critics)
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
        times = [jnp.atleast_1d(time) for time in ((r,) if self.kind == "flow" else (r, t))]
        if self.kind == "flowmap" and self.time_embedding == "sinusoid":
            times = map(sinusoid, times)
        return MLP(self.hidden_dims, self.out_dim)(obs, x, *times)


class Networks(NamedTuple):
    """The method's functions of (params, inputs); tests put hand-made ones in their place."""

    act_dim: int  # A
    actor: Callable  # (params, obs, x (..., D), r, t), times a number or (..., 1) -> (..., D)
    critic: Callable  # (params, obs, chunk (..., D)) -> (members, ...)


def make_modules(args, act_dim):
    """Actor and critic of the settings in `args`."""
    actor = Actor(args.hidden_dims, args.horizon * act_dim, args.actor, args.time_embedding)
    return actor, Critic(args.hidden_dims, args.num_critics)


def make_networks(args, act_dim):
    """The modules as plain functions."""
    return Networks(act_dim, *(module.apply for module in make_modules(args, act_dim)))


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters of actor and critic."""
    obs, chunk = jnp.zeros((1, obs_dim)), jnp.zeros((1, args.horizon * act_dim))
    (actor, critic), keys = make_modules(args, act_dim), jax.random.split(key)
    return dict(
        actor=actor.init(keys[0], obs, chunk, 0.0, 1.0), critic=critic.init(keys[1], obs, chunk)
    )


# ---- the method: acting ----
def sample_chunk(params, nets, args, obs, x, r=0.0):
    """clip(X_{r,1}(x)) by jumps of equal length, of --actor flow Euler steps; from noise at r = 0
    this is the policy."""
    step = (1 - r) / args.flow_steps

    def jump(x, k):
        start = r + k * step
        return x + step * nets.actor(params["actor"], obs, x, start, start + step), None

    steps = jnp.arange(args.flow_steps, dtype=x.dtype)
    x, _ = jump(x, 0) if args.flow_steps == 1 else jax.lax.scan(jump, x, steps)
    return jnp.clip(x, -1, 1)


def aggregate(q, pessimistic):
    """Join the critics' values by their minimum or their mean: (members, ...) -> (...)."""
    return jnp.where(pessimistic, q.min(axis=0), q.mean(axis=0))


def best_of_n(params, nets, args, obs, noise, pessimistic):
    """BoN: of the chunks from noise (..., N, D) the one that the critic likes best (..., D). All go
    at once, but on a CPU, whose cache a batch of them would leave, one after another."""

    def judge(x):
        chunk = sample_chunk(params, nets, args, obs, x)
        return chunk, aggregate(nets.critic(params["critic"], obs, chunk), pessimistic)

    at_once, loop = jax.vmap(judge), functools.partial(jax.lax.map, judge)
    ways = dict(cpu=loop if noise.ndim > 2 else at_once, default=at_once)
    chunks, q = jax.lax.platform_dependent(jnp.moveaxis(noise, -2, 0), **ways)
    return jnp.take_along_axis(chunks, q.argmax(axis=0)[None, ..., None], axis=0)[0]


def unit(vectors):
    """Vectors (..., D) of length 1; 0 stays 0."""
    return vectors / (jnp.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-8)


def complete(params, nets, args, obs, x, time):
    """QGBS: renoised chunks at time t' -> chunks in the box."""
    if args.qgbs_completion == "flowmap":
        return sample_chunk(params, nets, args, obs, x, time)
    return jnp.clip(x + (1 - time) * nets.actor(params["actor"], obs, x, time, time), -1, 1)


def beam_search(params, nets, args, obs, dim, key):
    """QGBS for one observation (Algorithm 2): M (1 + K B) jumps -> chunk (D,)."""
    beam, rounds, time = args.qgbs_beam, args.qgbs_rounds, args.qgbs_snr / (1 + args.qgbs_snr)
    start_key, key = jax.random.split(key)
    min_q = lambda x: nets.critic(params["critic"], obs, x).min(axis=0)
    chunks = sample_chunk(params, nets, args, obs, jax.random.normal(start_key, (beam, dim)))
    for k in range(max(rounds, 1)):
        if rounds:  # else only the step up the critics
            noise = jax.random.normal(jax.random.fold_in(key, k), (beam, args.qgbs_branches, dim))
            children = time * chunks[:, None] + (1 - time) * noise
            children = complete(params, nets, args, obs, children, time).reshape(-1, dim)
            chunks = children[jax.lax.top_k(min_q(children), beam)[1]]  # the parents do not stay
        step = args.qgbs_eta * unit(jax.grad(lambda x: min_q(x).sum())(chunks))
        chunks = jnp.clip(chunks + step, -1, 1)
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
    eta = args.eta if args.eta is not None else 1.0 if args.adaptive_eta else 0.5
    relative = disagreement / (disagreement.mean() + 1e-8)
    return eta / (1 + args.adaptive_eta * args.beta * relative)


def guided_target(u_off, grad, radius, args):
    """Theorem 3.2: the maximiser of the linearised Q in the ball of that radius around u_off."""
    return u_off + radius[:, None] * (unit(grad) if args.normalize_grad else grad)


def fmq_loss(params, offline_actor, nets, args, batch, noise, r):
    """Eq. 12: the jump from r to 1 follows the frozen actor's, moved up the first critic."""
    frozen = jax.lax.stop_gradient(dict(offline=offline_actor, critic=params["critic"]))
    obs, x = batch["obs"], (1 - r) * noise + r * batch["actions"]
    u = nets.actor(params["actor"], obs, x, r, 1.0)
    u_off = nets.actor(frozen["offline"], obs, x, r, 1.0)
    q_at = lambda end: jax.vjp(lambda chunk: nets.critic(frozen["critic"], obs, chunk), end)
    q, pull_back = q_at(jnp.clip(x + (1 - r) * u_off, -1, 1))
    disagreement = q.std(axis=0)  # of two critics: half their distance, whose factor cancels
    if args.grad_at == "online":
        q, pull_back = q_at(jnp.clip(x + (1 - r) * jax.lax.stop_gradient(u), -1, 1))
    (grad,) = pull_back(jnp.zeros_like(q).at[0].set(1.0))
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
    arm: Any = None  # of a grid: which of a flag's values are this member's


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    rest = dict(obs_mean=obs_mean, obs_std=obs_std, seed=seed, step=jnp.zeros((), jnp.int32))
    return TrainState(
        params=params, target_critic=params["critic"], offline_actor=params["actor"],
        opt_state=optax.adam(args.learning_rate).init(params),
        pessimistic=jnp.asarray(args.q_agg_offline == "min"), **rest,
    )  # fmt: skip


def actor_loss(params, offline_actor, nets, args, objective, batch, number, keys):
    """Offline and mvp: L_diag + w L_cons; fmq: L_FMQ, plus those two if their flags say so."""
    shape, noise = batch["actions"].shape, jax.random.normal
    draw_time = lambda key: jax.random.uniform(key, (shape[0], 1))
    guided, terms = objective == "fmq", []  # (weight, (loss, metrics))
    diag_weight, cons_weight = 1.0, jnp.where(number > args.consistency_warmup, 1.0, 0.0)
    if guided:
        x, r = noise(keys["fmq_noise"], shape), draw_time(keys["fmq_time"])
        terms += [(1.0, fmq_loss(params, offline_actor, nets, args, batch, x, r))]
        diag_weight, cons_weight = args.online_diag_weight, args.online_cons_weight
    if diag_weight:
        x, t = noise(keys["diag_noise"], shape), draw_time(keys["diag_time"])
        terms += [(diag_weight, diagonal_loss(params, nets, batch, x, t))]
    if args.actor == "flowmap" and not (guided and cons_weight == 0):
        x, share = noise(keys["cons_noise"], shape), draw_time(keys["cons_share"])
        r, t = time_pairs(number, args, keys["cons_time"], shape[0])
        terms += [(cons_weight, consistency_loss(params, nets, args, batch, x, r, t, share))]
    info = functools.reduce(lambda a, b: a | b, (info for _, (_, info) in terms))
    return sum(weight * loss for weight, (loss, _) in terms), info


def td_target(state, nets, args, batch, noise):
    """y (B,): of the chunks from noise (B, N, H * A) the critic chooses, its target has the value.
    Forward only: nothing of the B * N candidates is kept for a backward pass."""
    obs, agg = batch["next_obs"], state.pessimistic
    chunk = best_of_n(state.params, nets, args, obs, noise, agg)
    q = aggregate(nets.critic(state.target_critic, obs, chunk), agg)  # winners only
    return batch["returns"] + batch["discounts"] * q


DRAWS = ("bootstrap", "diag_noise", "diag_time", "cons_noise", "cons_time", "cons_share")
DRAWS += ("fmq_noise", "fmq_time", "reselect")  # one key each


def make_update(nets, args, objective):
    """update(state, batch, key) -> (state, metrics): one joint step of actor and critic, then the
    target critic; objective "offline", "fmq" or "mvp".

    batch: obs, next_obs (B, D), actions (B, H * A), returns, discounts (B,), valid (B, H).
    """

    def update(state, batch, key):
        keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
        params, number, (batch_size, dim) = state.params, state.step + 1, batch["actions"].shape
        candidates = lambda key: jax.random.normal(key, (batch_size, args.num_samples, dim))
        target = td_target(state, nets, args, batch, candidates(keys["bootstrap"]))
        imitated = batch
        if objective == "mvp" and args.mvp_target == "reselect":
            noise = candidates(keys["reselect"])
            chunk = best_of_n(params, nets, args, batch["obs"], noise, state.pessimistic)
            imitated = batch | dict(actions=chunk, valid=jnp.ones_like(batch["valid"]))

        def total_loss(params):
            td_loss, td_info = critic_loss(params, nets, batch, target)
            what = (objective, imitated, number, keys)
            loss, info = actor_loss(params, state.offline_actor, nets, args, *what)
            return td_loss + loss, td_info | info

        grads, info = jax.grad(total_loss, has_aux=True)(params)
        updates, opt_state = optax.adam(args.learning_rate).update(grads, state.opt_state, params)
        # the target follows the critic before its step, as in the released code
        target_critic = optax.incremental_update(params["critic"], state.target_critic, args.tau)
        params = optax.apply_updates(params, updates)
        changes = dict(params=params, target_critic=target_critic, opt_state=opt_state)
        return state.replace(**changes, step=number), info

    return update


def make_policy(nets, args):
    """policy(state, obs, key, mode): raw observation (D,) -> chunk (H * A,), by a `Mode`."""
    dim = args.horizon * nets.act_dim

    def policy(state, obs, key, mode):
        obs = (obs - state.obs_mean) / state.obs_std
        if mode == "qgbs":
            return beam_search(state.params, nets, args, obs, dim, key)
        if mode == "one-step":
            return sample_chunk(state.params, nets, args, obs, jax.random.normal(key, (dim,)))
        noise = jax.random.normal(key, (args.num_samples, dim))
        return best_of_n(state.params, nets, args, obs, noise, state.pessimistic)

    return policy


def evaluation_policies(nets, args):
    """Mode -> (state, obs, key) -> chunk."""
    policy = make_policy(nets, args)
    return {m.replace("-", "_"): functools.partial(policy, mode=m) for m in args.eval_modes}


# ---- training ----
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of members, which a
# program's steps do not see. Always: state, a TrainState, and sums, the metrics since the last log.
# Online also: replay, a ring of C rows = {obs, next_obs (C, D), actions (C, A), rewards, masks,
# terminals (C,)} and added, their number so far; returns (1,) of the episode under way; recent, the
# last 20 episodes' returns; and on JAX environments envs: the environment's state, the chunk
# (1, H, A) of actions being played, and how many of it are taken (1,).
def make_learn(nets, args, objective="offline"):
    """learn(carry, data) -> carry: sample a batch of windows and update once."""
    update = make_update(nets, args, objective)

    def learn(carry, data):
        state = carry["state"]
        batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
        sizes = args.batch_size, args.horizon, args.gamma, args.buffer_size
        batch = sample_chunks(batch_key, data, carry.get("replay"), *sizes)
        for name in ("obs", "next_obs"):
            batch[name] = (batch[name] - state.obs_mean) / state.obs_std
        state, metrics = update(state, batch, update_key)
        return carry | {"state": state, "sums": add_sums(carry["sums"], metrics)}

    return learn


def make_act(nets, args):
    """act(state, obs (1, D), time) -> best-of-n chunk (1, H, A) at online step `time`."""
    policy = make_policy(nets, args)

    def act(state, obs, time):
        chunk = policy(state, obs[0], purpose_key(state.seed, "act", time), "best-of-n")
        return chunk.reshape(1, args.horizon, nets.act_dim)

    return act


def begin_online(state, args):
    """Freeze the offline actor; join the critics as the online phase does."""
    agg = "min" if args.online_objective == "fmq" else "mean"
    agg = agg if args.q_agg_online == "auto" else args.q_agg_online
    frozen = jax.tree.map(jnp.copy, state.params["actor"])
    pessimistic = jnp.full_like(state.pessimistic, agg == "min")
    return state.replace(offline_actor=frozen, pessimistic=pessimistic)


def train(args, task):
    """Offline, then online: H steps of the environment, then H * utd updates."""
    env = make_jax_env(task, args)
    raw, source = load_dataset(task, args)
    raw = prepare(raw, args)
    data = place(device_rows(raw), len(members(args)), copy=True)
    sizes = data["obs"].shape[1], data["actions"].shape[1]
    nets, horizon = make_networks(args, sizes[1]), args.horizon

    learn = per_arm(make_learn, nets, args)
    phases = [Phase("offline", 0, args.offline_steps, Program(learn, data))]
    if args.online_steps:
        learn = per_arm(make_learn, nets, args, args.online_objective)
        learn = repeat(learn, horizon * args.utd)
        play = Play(make_act(nets, args), learn, horizon, horizon, args.sparse)
        warm_up = play._replace(learn=None), -(-args.learning_starts // horizon) * horizon
        rows = min(args.online_steps, max(args.buffer_size, len(data["obs"]) + 1))
        first, *rest = online_phases(task, env, play, args, rows, sizes, (data,), *warm_up)
        begin = lambda carry: first.enter(carry | {"state": begin_online(carry["state"], args)})
        phases += [first._replace(enter=begin), *rest]

    state = start_states(args, *sizes, *observation_scale(data, args))
    # the sums have a place for each metric of each phase, of one that a resumed run adds too
    all_terms = dataclasses.replace(args, online_cons_weight=1.0, online_diag_weight=1.0)
    learn = per_arm(make_learn, nets, all_terms, "fmq" if args.actor == "flowmap" else "mvp")
    carry = dict(state=state, sums=zero_sums(learn, {"state": state}, data))
    carry, progress = resume(carry, phases, args)
    policies = evaluation_policies(nets, args)
    run = Run(args, task, source, raw, policies, progress)
    evaluate = make_evaluate(task, env, policies, args)
    run.finish(train_loop(run, carry, phases, evaluate, nets))


# ==== shared: training loop ====
def train_loop(run, carry, phases, evaluate, nets):
    """Run the phases dispatch by dispatch, each about a second, so that the bar moves and Ctrl-C is
    heard; what is computed and logged does not depend on how long they are. Between dispatches
    evaluate (simulators do so while they go on), log and save. Returns the last evaluation."""
    results = run.catch_up(evaluate, carry["state"])
    for phase in (p for p in phases if run.step < p.end):
        carry = phase.enter(carry) if run.step == phase.start else carry
        run.phase, run.rate, run.said = phase, 8.0, time.perf_counter()
        run.bar = tqdm(total=phase.end, initial=run.step, desc=phase.name, disable=None)
        while run.step < phase.end:
            carry, log, evaluation, save = run.dispatch(carry)
            if evaluation:
                results = run.evaluate(evaluate, carry["state"], run.step >= phase.end)
            if log or evaluation:
                carry = run.log(carry, results if evaluation else None)
            stopping = run.signal and run.step < phases[-1].end
            if save or stopping:
                carry = phase.restart(carry) if phase.restart else carry
                run.save(carry)
            if stopping:
                run.bar.close()
                again = f"--resume {shlex.quote(str(run.dir))} continues at {run.step:,}"
                print(f"stopped; {again}", file=sys.stderr)
                raise SystemExit(128 + run.signal)
        run.bar.close()
        if draw := run.task.parts.get("after_phase"):
            first, script = next(iter(arms(run.args).values())), sys.modules[__name__]
            ask(draw, run.dir, phase.name, script, nets, first, carry["state"])
    return results.result() if results else evaluate(carry["state"], run.step)


# ==== end shared: training loop ====


# ---- main ----
def main(args):
    """Resolve the arguments, then train or evaluate."""
    task = parse_task(args.env_id, args.dataset_dir)
    args = resolve(args, task)
    if args.matmul_precision != "default":
        jax.config.update("jax_default_matmul_precision", args.matmul_precision)
    return evaluate_only(args, task) if args.evaluate else train(args, task)


# region support: nothing below belongs to the method, and nearly all is the same in every script
# ==== shared: imports ====
import csv
import difflib
import errno
import fcntl
import hashlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import resource
import shlex
import shutil
import signal
import subprocess
import textwrap
import traceback
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, resource_tracker
from types import MappingProxyType

from tqdm import tqdm
from typeguard import TypeCheckError, check_type

# ==== end shared: imports ====


class UserError(Exception):
    """Something the user can mend; shown as one sentence, exit code 2."""


# ==== shared: tasks ====
OGBENCH = (  # names, dataset types (default first), default task
    ("pointmaze-medium pointmaze-large pointmaze-giant pointmaze-teleport", "navigate stitch", 1),
    ("antmaze-medium antmaze-large antmaze-giant antmaze-teleport", "navigate stitch explore", 1),
    ("humanoidmaze-medium humanoidmaze-large humanoidmaze-giant", "navigate stitch", 1),
    ("antsoccer-arena antsoccer-medium", "navigate stitch", 4),
    ("cube-single cube-double cube-triple cube-quadruple scene", "play noisy", 2),
    ("puzzle-3x3 puzzle-4x4", "play noisy", 4),
    ("puzzle-4x5 puzzle-4x6", "play noisy", 2),
)
TASK_FILES = ("d4rl", "robomimic", "multi-crescent", "energy-toy")  # those of the repository


class Task(NamedTuple):
    """One task: `name` is the full id, `base` what the task table is looked up with."""

    name: str  # antmaze-large-navigate-singletask-task1-v0
    base: str  # antmaze-large
    gym_id: str = ""  # antmaze-large-singletask-task1-v0, the official environment
    dataset: str = ""  # antmaze-large-navigate-v0, the official data
    index: int = 1
    success: bool = True  # whether there is such a thing; else only the return counts
    source: tuple = ()  # of a task file: (path, name, dataset_dir)
    parts: Any = MappingProxyType({})  # what that file's make_task says


def need(condition, text):
    """Where a condition does not hold, stop with one sentence."""
    if not condition:
        raise UserError(text)


def ask(function, *inputs, failing="", error=UserError):
    """Call a function; what it raises becomes one sentence, of a bug with its kind and place."""
    try:
        return function(*inputs)
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        places = traceback.extract_tb(e.__traceback__)
        *_, at = places[0], *(p for p in places if "-packages" not in p.filename)
        said = ValueError, OSError, ImportError, SyntaxError, gymnasium.error.Error, TypeCheckError
        bug = "" if isinstance(e, said) else f"{type(e).__name__} in {at.filename}:{at.lineno}: "
        raise error(failing + bug + " ".join(str(e).split())[:300]) from e


def repository_file(name, otherwise):
    """A file of benchmark/, which a script that was copied elsewhere does not have."""
    path = Path(__file__).resolve().parent.parent / "benchmark" / name
    need(path.is_file(), f"{otherwise} benchmark/{name} of the CleanFlow repository")
    return path


def parse_task(env_id, dataset_dir="~/.ogbench/data"):
    """OGBench single-task id or short name, Gymnasium id, or FILE.py:NAME -> Task."""
    suite, _, name = env_id.partition("/")
    if suite in TASK_FILES:
        file, name = f"{suite.replace('-', '_')}.py", name or env_id
        path = repository_file(f"tasks/{file}", f"give --env-id {file}:{name} with a copy of")
        return load_task(env_id, path, name, dataset_dir)
    path, _, name = env_id.rpartition(":")
    if path.endswith(".py"):
        return load_task(f"{Path(path).stem}/{name}", Path(path), name, dataset_dir)
    tasks = {}
    for names, kinds, default in OGBENCH:
        for base, kind, i in itertools.product(names.split(), kinds.split(), range(6)):
            one, suffix = f"singletask-task{i or default}-v0", f"-task{i}" if i else ""
            task = f"{base}-{kind}-{one}", base, f"{base}-{one}", f"{base}-{kind}-v0", i or default
            for name in (f"-{kind}-singletask{suffix}-v0", f"-{kind}{suffix}", suffix):
                tasks.setdefault(base + name, Task(*task))
    if env_id in tasks:
        return tasks[env_id]
    if env_id in gymnasium.registry or env_id in JAX_ENVS:
        return Task(env_id, env_id, "" if env_id in JAX_ENVS else env_id, success=False)
    known = [*tasks, *JAX_ENVS, *gymnasium.registry]
    close = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0.3))
    raise UserError(f"unknown task '{env_id}'; close matches: {close or 'none'}")


def load_file(path):
    """Import a Python file by its path; its own imports must be installed packages."""
    spec = importlib.util.spec_from_file_location(f"cleanflow_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    ask(spec.loader.exec_module, module, failing=f"cannot load {path}: ")
    return module


def load_task(task_name, path, name, dataset_dir):
    """make_task(name, dataset_dir) of a task file -> Task; see README for what it returns."""
    make_task = getattr(load_file(path), "make_task", None)
    need(make_task, f"{path} has no function make_task(name, dataset_dir); see README")
    parts = ask(make_task, name, dataset_dir)
    right = isinstance(parts, dict) and {"env", "make_env"} & set(parts)
    need(right, f"make_task of {path} must return a dict with 'env' or 'make_env'")
    known = ("env", "make_env", "data", "success", "score", "defaults", "critic", "after_phase")
    other = [key for key in parts if key not in known]
    need(not other, f"make_task of {path} returns {other}, but may return {known}")
    if (env := parts.get("env")) is not None:  # a step is traced
        start = lambda: reset_envs(env, jax.random.key(0), 1)
        step = lambda: step_envs(env, start(), env.action_space.sample()[None], jax.random.key(0))
        obs = lambda: step()[1]["next_obs"].reshape(1, *env.observation_space.shape)
        ask(jax.eval_shape, obs, failing=f"the 'env' of {path} does not work: ")
    success, source = parts.get("success", True), (path.resolve(), name, dataset_dir)
    return Task(task_name, task_name, success=success, source=source, parts=parts)


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze, backend = task.base.removeprefix("pointmaze-"), args.env_backend
    if backend == "mjx" and task.gym_id:
        path = repository_file("tasks/mjx.py", "--env-backend mjx needs")
        return ask(load_file(path).make_env, task.gym_id, args.success_timing)
    if backend in ("auto", "jax"):
        if task.parts.get("env") or task.base in JAX_ENVS:
            return task.parts.get("env") or JAX_ENVS[task.base]()
        if task.base != maze and maze in MAZES:
            return PointMaze(maze, task.index, args.success_timing)
    official = backend in ("auto", "host") and (task.gym_id or "make_env" in task.parts)
    need(official, f"{task.name} has no {backend} environment; drop --env-backend")


# ==== end shared: tasks ====


# ==== shared: point mazes ====
# OGBench's point mazes inside their outer wall, one word per row from the smallest y upwards, # is
# a wall; and their five single tasks as (start row, start column, goal row, goal column).
MAZES = {
    "medium": "..##.. ..#... #...## ..#... .#..#. ...#..",
    "large": "....#..... .##.#.#.#. ......#... .####.###. ..#.#..... #.#.#.#.## ..#...#...",
    "giant": ".#......##.... .#.##.#.#..##. ...#..#...#... .###.######.#. ...#...#....#. "
    "##.#.#..#.#.## ...#..#...#... .#.#.######.#. .###...#...##. .....#...#....",
}
TASKS = {
    "medium": ((1, 1, 6, 6), (6, 1, 1, 6), (5, 3, 4, 2), (6, 5, 6, 1), (2, 6, 1, 1)),
    "large": ((1, 1, 7, 10), (5, 4, 7, 1), (7, 4, 1, 10), (3, 8, 5, 4), (1, 1, 5, 4)),
    "giant": ((1, 1, 10, 14), (1, 14, 10, 1), (8, 14, 1, 1), (8, 3, 5, 12), (5, 9, 3, 8)),
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
    stiffness, damping, rows = 1 / (dmax * tc) ** 2, 2 / (dmax * tc), []
    own, over = ([limit(p, 0) for p in (px, py)] for limit in (jnp.minimum, jnp.maximum))
    offsets = ((own[0], over[1]), (over[0], own[1]), own)  # ball - nearest point of the cell
    for wall, (dx, dy) in zip(walls, offsets, strict=True):
        distance = jnp.sqrt(jnp.maximum(dx * dx + dy * dy, 1e-12))
        nx, ny, depth = dx / distance, dy / distance, RADIUS - distance
        x = jnp.clip(depth / width, 0, 1)
        impedance = dmin + jnp.where(x < 0.5, 2 * x * x, 1 - 2 * (1 - x) ** 2) * (dmax - dmin)
        # w = 1 / R with R = (1 - imp) / imp * 2 mu^2 (1 + mu^2) * invweight, friction mu = 1 and
        # mass * invweight = 2/3 (MuJoCo averages 1/m, 1/m and the locked z axis' 0)
        w = jnp.where(wall & (depth > 0), impedance / (1 - impedance) / (4 * 2 / 3), 0)
        # The friction pyramid's edges are n +- t with t in the plane and n +- z; the ball cannot
        # move along z, so the last two are both n.
        for jx, jy, weight in ((nx - ny, ny + nx, w), (nx + ny, ny - nx, w), (nx, ny, 2 * w)):
            aref = stiffness * impedance * depth - damping * (jx * vx + jy * vy)
            rows.append((jx, jy, weight, aref))

    def newton(_, a):
        (gx, gy), hxx, hxy, hyy = a, 1.0, 0.0, 1.0
        for jx, jy, weight, aref in rows:
            residual = jx * a[0] + jy * a[1] - aref
            active = jnp.where(residual < 0, weight, 0)  # contacts push, they never pull
            gx, gy = gx + active * residual * jx, gy + active * residual * jy
            hxx, hxy, hyy = hxx + active * jx * jx, hxy + active * jx * jy, hyy + active * jy * jy
        det = hxx * hyy - hxy * hxy
        return a[0] - (hyy * gx - hxy * gy) / det, a[1] - (hxx * gy - hxy * gx) / det

    # Piecewise quadratic, so exact once the active rows are found: six steps did for each of two
    # million random states, nearly always four.
    return jax.lax.fori_loop(0, 6, newton, (jnp.zeros_like(px), jnp.zeros_like(px)))


class PointMazeState(NamedTuple):
    xy: jax.Array
    success: jax.Array  # did the last transition reach the goal?


class PointMaze:
    """OGBench's pointmaze-{medium,large,giant} with a fixed task, as gymnasium's FuncEnv.

    MuJoCo's contact dynamics, written out for a ball and the cells around it: a step agrees with
    the official environment to 1e-12 in float64 (1e-8 where MuJoCo's solver stops early, a few
    times in 100,000 steps) and to 1e-5 in float32, unless an action carries the ball's centre into
    a wall (|a_i| > 3 could). As there, actions are not clipped.
    """

    max_episode_steps, goal_tol = 1000, 1.0
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, maze, task=1, success_timing="post"):
        inside = np.array([[c == "#" for c in row] for row in MAZES[maze].split()])
        self.maze_map = np.pad(inside, 1, constant_values=True)
        self.start_xy, self.goal_xy = self.ij_to_xy(np.reshape(TASKS[maze][task - 1], (2, 2)))
        self.success_timing = success_timing

    def ij_to_xy(self, ij):
        return CELL * ij[..., ::-1] - CELL

    def xy_to_ij(self, xy):
        return jnp.floor((xy[..., ::-1] + 1.5 * CELL) / CELL).astype(int)

    def move(self, xy, action):
        """Position and velocity after one step; the ball starts each step at rest."""
        xy = xy + STEP_SIZE * action
        i, j = ij = self.xy_to_ij(xy)
        from_centre = xy - self.ij_to_xy(ij)
        # Mirror the plane so that the ball sits in the lower left of the four nearest cells. The
        # meeting point as the origin also keeps float32 accurate far from the maze's corner.
        sx, sy = side = jnp.where(from_centre < 0, -1, 1)
        p, wall = jnp.abs(from_centre) - CELL / 2, jnp.asarray(self.maze_map)
        walls = wall[i, j + sx], wall[i + sy, j], wall[i + sy, j + sx]

        def advance(s, h, k):
            return tuple(a + h * b for a, b in zip(s, k, strict=True))

        def rk4(_, s):
            slope = lambda s: (*s[2:], *wall_acceleration(*s, walls))
            k1 = slope(s)
            k2 = slope(advance(s, TIMESTEP / 2, k1))
            k3 = slope(advance(s, TIMESTEP / 2, k2))
            k4 = slope(advance(s, TIMESTEP, k3))
            return advance(s, TIMESTEP / 6, advance(advance(k1, 1, k4), 2, advance(k2, 1, k3)))

        # Scalars rather than vectors: under vmap each becomes one (batch,) array, which XLA fuses.
        start = (p[0], p[1], jnp.zeros_like(p[0]), jnp.zeros_like(p[0]))
        px, py, *velocity = jax.lax.fori_loop(0, SUBSTEPS, rk4, start)
        return xy + side * (jnp.stack([px, py]) - p), side * jnp.stack(velocity)

    def initial(self, rng, params=None):
        xy = self.start_xy + jax.random.uniform(rng, (2,), minval=-1, maxval=1)
        return PointMazeState(xy, jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None):
        xy, _ = self.move(state.xy, action)
        judged = xy if self.success_timing == "post" else state.xy
        return PointMazeState(xy, jnp.linalg.norm(judged - self.goal_xy) <= self.goal_tol)

    def observation(self, state, rng=None, params=None):
        return state.xy

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.success - 1.0

    def terminal(self, state, rng=None, params=None):
        return state.success

    success = terminal


def maze_paths(wall):
    """Shortest-path lengths between cells, numbered row by row, and the next cell on the way, both
    [from, to]. Among equally short ways up, left, down, right decides, as in OGBench."""
    size, width, blocked = wall.size, wall.shape[1], wall.reshape(-1, 1)
    cells = np.arange(size)[:, None]
    around = (cells[:, 0] + [[-width], [-1], [width], [1]]) % size
    length = np.where((cells == cells.T) & ~blocked, 0, size)  # `size` means unreachable
    for _ in cells:
        length = np.where(blocked, size, np.minimum(length, length[around].min(0) + 1))
    nearest = around[length[around].argmin(0), cells]
    return length, np.where(length[around].min(0) < length, nearest, cells)


def collect_pointmaze(maze, num_transitions, seed=0, dataset_type="navigate"):
    """Collect a dataset as OGBench made its own, in the layout of its files, with the goals added.

    The controller walks from cell to cell along the shortest path with Gaussian action noise;
    navigate: a new goal whenever one is reached; stitch: one goal, four cells away. An episode of
    n + 1 rows holds n transitions; the number of episodes is rounded up.
    """
    env, navigate = PointMaze(maze), dataset_type == "navigate"
    steps = dict(navigate=2001 if maze == "giant" else 1001, stitch=201)[dataset_type]
    episodes = -(-num_transitions // (steps - 1))
    wall, (length, next_cell) = env.maze_map, maze_paths(env.maze_map)
    up, down, left, right = (np.roll(wall, shift, axis) for axis in (0, 1) for shift in (1, -1))
    hallway = (up & down & ~left & ~right) | (left & right & ~up & ~down)
    goals = np.flatnonzero(~wall & ~hallway)  # OGBench puts no goals in the middle of a corridor
    cell_xy = jnp.asarray(env.ij_to_xy(np.indices(wall.shape).reshape(2, -1).T))

    def step(carry, key):
        xy, velocity, goal, goal_xy = carry
        noise_key, cell_key, goal_key = jax.random.split(key, 3)
        i, j = env.xy_to_ij(xy)
        way = cell_xy[jnp.asarray(next_cell)[i * wall.shape[1] + j, goal]] - xy
        way = way / (jnp.linalg.norm(way) + 1e-6)
        action = jnp.clip(way + 0.5 * jax.random.normal(noise_key, (2,)), -1, 1)
        row = dict(observations=xy, actions=action, qpos=xy, qvel=velocity, goals=goal_xy)
        xy, velocity = env.move(xy, action)
        reached = navigate & (jnp.linalg.norm(xy - goal_xy) <= env.goal_tol)
        new = jax.random.choice(cell_key, jnp.asarray(goals))
        new_xy = cell_xy[new] + jax.random.uniform(goal_key, (2,), minval=-1, maxval=1)
        new, new_xy = jnp.where(reached, new, goal), jnp.where(reached, new_xy, goal_xy)
        return (xy, velocity, new, new_xy), row

    rng = np.random.default_rng(seed)
    starts = rng.choice(np.flatnonzero(~wall), episodes)
    near = [goals if navigate else np.flatnonzero(length[cell] == 4) for cell in starts]
    first = np.array([rng.choice(cells) for cells in near])
    noise = rng.uniform(-1, 1, (2, episodes, 2))
    velocity = 0.1 * rng.standard_normal((episodes, 2))  # the reset's: stored, without any effect
    begin = (cell_xy[starts] + noise[0], jnp.asarray(velocity), first, cell_xy[first] + noise[1])
    episode = lambda begin, key: jax.lax.scan(step, begin, jax.random.split(key, steps))[1]
    keys = jax.random.split(jax.random.key(seed), episodes)
    rows = jax.device_get(jax.jit(jax.vmap(episode))(begin, keys))
    data = {k: np.asarray(v, np.float32).reshape(-1, 2) for k, v in rows.items()}
    return data | dict(terminals=np.tile(np.arange(steps) == steps - 1, episodes))


# ==== end shared: point mazes ====


# ==== shared: environments and evaluation ====
def reset_envs(env, key, num_envs):
    """Start `num_envs` copies of a functional environment -> (states, steps taken)."""
    states = jax.vmap(env.initial)(jax.random.split(key, num_envs))
    return states, jnp.zeros(num_envs, jnp.int32)


def observe(env, env_state):
    """Observations (num_envs, D) of all copies."""
    return jax.vmap(lambda s: env.observation(s, None))(env_state[0])


def step_envs(env, env_state, actions, key):
    """Step all copies and restart those that ended -> (new states, dict of each copy's reward,
    success, terminated (no bootstrap), truncated (time limit, bootstrap) and next_obs, the
    observation before any restart)."""
    states, t = env_state
    keys, reset_keys = jax.random.split(key, (2, len(t)))

    def step(state, action, key):
        new = env.transition(state, action, key)
        success = env.success(new) if hasattr(env, "success") else 0
        out = dict(success=jnp.float32(success), terminated=env.terminal(new, None))
        out |= dict(reward=jnp.float32(env.reward(state, action, new, None)))
        return new, out | dict(next_obs=env.observation(new, None))

    states, out = jax.vmap(step)(states, actions, keys)
    out["truncated"] = (t + 1 >= env.max_episode_steps) & ~out["terminated"]
    done = out["terminated"] | out["truncated"]
    fresh, _ = jax.lax.cond(  # most steps end no episode
        done.any(), lambda: reset_envs(env, reset_keys[0], len(t)), lambda: (states, t)
    )
    states = jax.tree.map(functools.partial(jax.vmap(jnp.where), done), fresh, states)
    return (states, jnp.where(done, 0, t + 1)), out


class SeededReset(gymnasium.Wrapper):
    """OGBench draws start noise from NumPy's global generator: seed that too, so that an episode
    is a function of its seed. An error becomes one that can travel between processes."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed)
            self.unwrapped.action_space.seed(seed)
        return ask(lambda: self.env.reset(seed=seed, options=options), error=RuntimeError)

    def step(self, action):
        return ask(self.env.step, action, error=RuntimeError)


def make_host_env(task, success_timing):
    """The official environment, or a task file's."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR + 1  # OGBench's spaces set off warnings
    if multiprocessing.parent_process() is not None:  # signals are left to the main process
        os.setpgrp()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if task.source:  # loaded here again: a worker cannot import what the main process loaded
        path, name, dataset_dir = task.source
        return SeededReset(ask(load_file(path).make_task(name, dataset_dir)["make_env"]))
    options = dict(success_timing=success_timing) if task.dataset else {}
    return SeededReset(gymnasium.make(f"ogbench:{task.gym_id}", **options))  # imports ogbench first


class InThisProcess(gymnasium.vector.SyncVectorEnv):
    """One environment that steps when it is waited for, which spares the way to another process."""

    def step_async(self, actions):
        self.asked = actions

    def step_wait(self):
        return self.step(self.asked)


def make_host_envs(task, args, num_envs, autoreset):
    """`num_envs` official environments in processes of their own; a single one that is trained on,
    not evaluated, steps in this one."""
    make = functools.partial(make_host_env, task._replace(parts={}), args.success_timing)
    if num_envs == 1 and autoreset == gymnasium.vector.AutoresetMode.SAME_STEP:
        return InThisProcess([make], autoreset_mode=autoreset)
    # A closed terminal or timeout(1) signals the whole group: what starts and tracks the simulators
    # inherits the mask and lives on. Each starts alone, as the second unblocks SIGTERM by itself.
    group = signal.SIGHUP, signal.SIGTERM
    for helper in (resource_tracker, forkserver):
        signal.pthread_sigmask(signal.SIG_BLOCK, group)
        helper.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, group)
    options = dict(autoreset_mode=autoreset, context="forkserver")  # fork deadlocks JAX's threads
    start = lambda: gymnasium.vector.AsyncVectorEnv([make] * num_envs, **options)
    return ask(start, failing="cannot start the simulators: ")


def simulate(envs, method, *inputs, **options):
    """Call a method of official environments; a simulator that raises or dies ends the run."""
    try:
        return getattr(envs, method)(*inputs, **options)
    except Exception as e:
        processes, envs.closed = getattr(envs, "processes", []), True  # nothing else is to close
        multiprocessing.connection.wait([p.sentinel for p in processes], 1)
        over = [f" {i} (exit {p.exitcode})" for i, p in enumerate(processes) if not p.is_alive()]
        for process in processes:
            process.kill()
        again = f"; --resume {shlex.quote(str(Run.dir))} goes on" if Run.dir else ""
        raise UserError(f"simulator{','.join(over)} failed: {str(e) or repr(e)}{again}") from e


def evaluate_jax(env, episodes, policy, state, step):
    """Episodes of one seed, all at once in one program -> {success (at the last step), return,
    length: (episodes,)}. The H actions that the policy gives are taken without looking."""
    start_key, env_key, policy_key = jax.random.split(purpose_key(state.seed, "eval", step), 3)

    def take(loop, actions):
        env_state, alive, result = loop
        key = jax.random.fold_in(env_key, result["length"].max())
        env_state, out = step_envs(env, env_state, actions, key)
        ended = out["terminated"] | out["truncated"]
        gain = {"success": ended * out["success"], "return": out["reward"], "length": 1}
        result = {k: v + alive * gain[k] for k, v in result.items()}
        return (env_state, alive & ~ended, result), None

    def chunk(loop):
        key = jax.random.fold_in(policy_key, loop[2]["length"].max())
        one = functools.partial(policy, state)
        actions = jax.vmap(one)(observe(env, loop[0]), jax.random.split(key, episodes))
        actions = actions.reshape(episodes, -1, *env.action_space.shape).swapaxes(0, 1)
        return jax.lax.scan(take, loop, actions)[0]

    zeros = jnp.zeros(episodes)
    result = {"success": zeros, "return": zeros, "length": zeros.astype(int)}
    start = (reset_envs(env, start_key, episodes), zeros == 0, result)
    return jax.lax.while_loop(lambda loop: loop[1].any(), chunk, start)[2]


def evaluate_host(make_envs, episodes, seeds, act, state, step):
    """Episodes of S seeds on official environments, one after another in each slot -> as above,
    (S, episodes). Episode n is a function of (seed, step, n), however many slots there are.
    `act(state, obs (S, slots, D), n (S, slots), t (S, slots), step) -> (S, slots, H * A)`."""
    envs = make_envs()
    shape = (len(seeds), envs.num_envs // len(seeds))
    n = np.tile(np.arange(shape[1]), (shape[0], 1))  # the episode in each slot
    t, total, done = np.zeros(shape, np.int32), np.zeros(shape), np.ones(shape, bool)
    result, chunks, horizon = np.zeros((3, shape[0], episodes)), 0.0, 1
    while n.min() < episodes:
        if done.any():
            t[done], total[done] = 0, 0.0
            ids = [(seeds[s], step, n[s, k]) for s, k in np.ndindex(shape)]
            fresh = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
            obs, _ = simulate(envs, "reset", seed=fresh, options={"reset_mask": done.reshape(-1)})
        due = t % horizon == 0  # the slots' episodes are out of phase
        if due.any():
            new = np.asarray(act(state, obs.astype(np.float32).reshape(*shape, -1), n, t, step))
            new = new.reshape(*shape, -1, *envs.single_action_space.shape)
            chunks, horizon = np.where(due[..., None, None], new, chunks), new.shape[2]
        actions = np.take_along_axis(chunks, (t % horizon)[..., None, None], axis=2)
        obs, reward, *ends, info = simulate(envs, "step", actions.reshape(envs.num_envs, -1))
        t, total, done = t + 1, total + reward.reshape(shape), np.any(ends, axis=0).reshape(shape)
        success = np.reshape(info.get("success", 0 * reward), shape)
        for s, k in np.argwhere(done):
            if n[s, k] < episodes:
                result[:, s, n[s, k]] = success[s, k], total[s, k], t[s, k]
            n[s, k] = n[s].max() + 1
    return dict(zip(("success", "return", "length"), result, strict=True))


def metric_names(task, policies):
    """An evaluation's metrics by mode of acting; score and success where there are such."""
    kinds = ["score"] * ("score" in task.parts) + ["success"] * task.success + ["return", "length"]
    return [f"{kind}_{mode}".rstrip("_") for mode in policies for kind in kinds]


def summary(results):
    """Mean over seeds and episodes, with the deviation over seeds where there are several."""
    means = {name: values.mean(axis=1) for name, values in results.items()}
    spread = lambda mean: f" ± {mean.std():.2f}" if len(mean) > 1 else ""
    return "  ".join(f"{name} {mean.mean():.2f}{spread(mean)}" for name, mean in means.items())


def make_evaluate(task, env, policies, args):
    """Function (state of all members, step, every) -> {metric: (members, episodes)} of one
    evaluation; of the first mode alone unless `every` or --eval-all-modes. `policies` maps a mode,
    in which its metrics' names end, to `policy(state, obs (D,), key) -> (H * A,)`, the actions of
    the next H steps. `env` is the JAX environment or None (official)."""
    seeds, episodes = [member.seed for member in members(args)], args.eval_episodes
    simulators = env is None or args.env_backend == "mjx"  # MJX: evaluated officially
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = len(seeds) * max(1, min(episodes, cores // len(seeds)))
    keep = gymnasium.vector.AutoresetMode.DISABLED  # an ended episode waits to be reset
    envs = functools.cache(lambda: make_host_envs(task, args, count, keep))  # at the first call

    def one_mode(policy):
        def act(state, obs, n, t, step):
            return policy(state, obs, purpose_key(state.seed, "eval", step, n, t))

        if not simulators:
            run = functools.partial(evaluate_jax, env, episodes, policy)
            return jax.jit(jax.vmap(run, (0, None)))
        act = jax.jit(jax.vmap(jax.vmap(act, (None, 0, 0, 0, None)), (0, 0, 0, 0, None)))
        return functools.partial(evaluate_host, envs, episodes, seeds, act)

    modes = {mode: one_mode(policy) for mode, policy in policies.items()}

    def evaluate(state, step, every=True):
        results, every = {}, every or getattr(args, "eval_all_modes", False)
        for mode in list(modes)[: None if every else 1]:
            result = jax.device_get(modes[mode](state, step))
            if score := task.parts.get("score"):
                result["score"] = np.vectorize(score, otypes=[float])(result["return"])
            results |= {k: result[k.partition("_")[0]] for k in metric_names(task, [mode])}
        return results

    # in a thread of its own, on the CPU: on a GPU each action would wait for a dispatch
    evaluate.beside = simulators and "cpu" in (jax.config.jax_platforms or "cpu")
    return evaluate


def record(run_dir):
    """--video: call benchmark/see.py, where the script has it beside it."""
    tool = Path(__file__).resolve().parent.parent / "benchmark" / "see.py"
    command = [str(tool), str(run_dir), "--script", __file__]
    need(tool.is_file(), f"--video needs benchmark/see.py of the CleanFlow repository: copy that "
         f"file and run: python {shlex.join(['see.py', *command[1:]])}")  # fmt: skip
    failed = subprocess.run([sys.executable, *command]).returncode
    need(not failed, "recording failed; see the message above")


def evaluate_only(args, task):
    """--evaluate: rebuild a run's networks, evaluate its last checkpoint as it did; a table."""
    if args.video:
        record(args.evaluate)
    tree, facts = load_checkpoint(args.evaluate, replay=False)
    env = make_jax_env(task, args)
    spaces = env or make_host_env(task, args.success_timing)
    obs_dim, act_dim = spaces.observation_space.shape[0], spaces.action_space.shape[0]
    state = start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    state = restore(state, tree["state"], args.evaluate)
    policies = evaluation_policies(make_networks(args, act_dim), args)
    results = make_evaluate(task, env, policies, args)(state, facts["step"])
    labels = [member.name for member in members(args)]
    left = max(6, *map(len, labels))
    print(f"{task.name}, step {facts['step']:,}, {args.eval_episodes} episodes per seed")
    for names in (metric_names(task, [mode]) for mode in policies):
        width = max(map(len, names)) + 3
        print(f"{'seed':>{left}}" + "".join(f"{name:>{width}}" for name in names))
        for i, name in enumerate(labels):
            means = (results[name][i].mean() for name in names)
            print(f"{name:>{left}}" + "".join(f"{mean:>{width}.2f}" for mean in means))
    print(f"{'all':>{left}}  {summary(results)}")
    return results


# ==== end shared: environments and evaluation ====


# ==== shared: data ====
AUTO_COLLECT = 200_000  # transitions collected when a download fails
ACTION_LIMIT = 1 - 1e-5  # dataset actions are kept just inside the box
RANKS = dict(terminals=1, observations=2, actions=2, next_observations=2, rewards=1, masks=1)


def load_dataset(task, args):
    """Transitions of a task -> (dict of float32 arrays, source).

    Keys: observations, next_observations (N, D), actions (N, A), rewards, masks (0 after success),
    terminals (1 at an episode's last row), each (N,). From --dataset, from the task file, or from
    `dataset_dir`: an official or a collected file, else a download, else data collected here.
    """
    if args.dataset is not None:
        path = Path(args.dataset).expanduser()
        data, source = read_file(path), f"own ({path.name})"
    elif "data" in task.parts:
        parts = lambda: zip((dict, str), task.parts["data"](), strict=True)
        failing = f"'data' of {task.name} must return transitions and their source: "
        data, source = ask(lambda: [kind(part) for kind, part in parts()], failing=failing)
    else:
        need(task.dataset, f"{task.name} comes without data: give --dataset FILE.npz")
        data, source = ogbench_data(task, Path(args.dataset_dir).expanduser())
    what = f"mend or replace {args.dataset or f'the data of {task.name} ({source})'}"
    env = make_jax_env(task, dataclasses.replace(args, env_backend="auto"))
    env = env or ask(make_host_env, task, args.success_timing)
    if "rewards" not in data:
        relabel(task, env, data, what)
    check(data, what, *RANKS)
    obs, actions = env.observation_space.shape, env.action_space.shape
    found = [np.shape(data[k])[1:] for k in ("observations", "next_observations", "actions")]
    text = f"it belongs to another environment, {task.name} has shapes {obs} and {actions}"
    need(found == [obs, obs, actions], f"{what}: {text}")
    inside = np.isinf(env.action_space.high).any() or np.abs(data["actions"]).max() <= 1 + 1e-5
    need(inside, f"{what}: it has actions outside [-1, 1]")
    longest = np.diff(np.flatnonzero(data["terminals"]), prepend=-1).max(initial=0)
    for flag in ("n-step", "horizon", "horizon-length"):
        enough = longest >= (getattr(args, flag.replace("-", "_"), None) or 1)
        need(enough, f"{what}: its longest episode has {longest} rows, too few for --{flag}")
    if hasattr(env, "close"):
        env.close()
    data = {k: np.asarray(data[k], np.float32) for k in RANKS}
    MEMORY["data"] = sum(x.nbytes for x in data.values())
    return data, source


def ogbench_data(task, directory):
    """Transitions of an OGBench dataset -> (dict, source)."""
    official, other = (directory / f"{task.dataset}{kind}.npz" for kind in ("", ".collected"))
    maze = task.base.removeprefix("pointmaze-")
    if not official.exists() and not other.exists():
        if task.base != maze and maze in MAZES:  # quicker than any download
            kind = task.dataset.removeprefix(f"{task.base}-").removesuffix("-v0")
            raw = collect_pointmaze(maze, AUTO_COLLECT, dataset_type=kind)
            source = f"collected ({AUTO_COLLECT:,} transitions, in this script)"
            return transitions(raw, task.name), source
        if not download(official):
            collect(official)
    if official.exists():
        return read_file(official), "official"
    return read_file(other), f"collected ({other.name})"


def read_file(path):
    """Transitions of a dataset, FILE.npz or FILE.hdf5."""
    try:
        if path.suffix in (".hdf5", ".h5"):
            import h5py

            with h5py.File(path) as file:
                raw = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset)}
        else:
            with np.load(path) as file:
                raw = {k: file[k] for k in file.files if k != "metadata"}
    except Exception as e:
        raise UserError(f"cannot read {path}: {e}; pip install what lacks, or replace it") from e
    return transitions(raw, f"mend or replace {path}")


def transitions(raw, what):
    """Check and complete what a file holds: transitions, D4RL's names for them, or OGBench's rows,
    of which an episode's last one has no successor and is dropped."""
    check(raw, what, "terminals", "observations", "actions", *({"timeouts", *RANKS} & raw.keys()))
    ends = raw["terminals"].astype(np.float32)
    if "next_observations" in raw and "masks" not in raw:
        raw = raw | dict(masks=1 - ends)
        ends = np.append(np.maximum(ends, raw.get("timeouts", 0))[:-1], 1)
    need(ends[-1], f"{what}: the last row does not end an episode, so it looks cut short")
    need(not ends.all(), f"{what}: every row ends an episode")
    if "next_observations" in raw:
        return raw | dict(terminals=ends)
    keep = np.flatnonzero(ends == 0)
    data = {k: v[keep] for k, v in raw.items() if np.shape(v)[:1] == ends.shape}
    return data | dict(terminals=ends[keep + 1], next_observations=raw["observations"][keep + 1])


def check(data, what, *keys):
    """Refuse what would train into nonsense: missing keys, wrong shapes, types, magnitudes."""
    for key in keys:
        need(key in data, f"{what}: no '{key}' in it")
        x, rank = np.asarray(data[key]), RANKS.get(key, 2 if key == "qpos" else 1)
        right = x.ndim == rank and len(x) == len(data["terminals"]) > 1
        need(right, f"{what}: '{key}' has shape {x.shape}")
        right = x.dtype.kind in ("f" if rank == 2 else "fb") and np.isfinite(x).all()
        need(right, f"{what}: '{key}' is not floating point, or holds NaN or infinity")
        need(np.abs(x).max() < 1e6, f"{what}: '{key}' holds numbers beyond a million")


def relabel(task, env, data, what):
    """Add rewards and masks of the task, from the simulator's positions, as OGBench does."""
    check(data, what, "qpos" if task.dataset else "rewards")
    size = 2 if isinstance(env, PointMaze) else env.unwrapped.model.nq
    need(data["qpos"].shape[1] == size, f"{what}: 'qpos' must have {size} numbers a row")
    buttons = "button_states" in data or not task.base.startswith(("scene", "puzzle"))
    need(buttons, f"{what}: no 'button_states' in it")
    if isinstance(env, PointMaze):  # the same, without its simulator
        distance = np.linalg.norm(data["qpos"] - env.goal_xy, axis=-1)
        data["masks"] = (distance > env.goal_tol).astype(np.float32)
        data["rewards"] = -data["masks"]
    else:
        from ogbench.relabel_utils import relabel_dataset

        ask(relabel_dataset, task.gym_id, env, data)


def download(file):
    """Fetch an official dataset -> whether it worked. The file appears when all of it is here."""
    from ogbench.utils import DATASET_URL

    part = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as out:
            fcntl.flock(out, fcntl.LOCK_EX)  # another process may be at it: wait for it
            if not file.exists():
                out.truncate(0)
                with urllib.request.urlopen(f"{DATASET_URL}/{file.name}", timeout=10) as answer:
                    bar = tqdm.wrapattr(out, "write", total=answer.length, desc=file.name)
                    with bar as watched:
                        shutil.copyfileobj(answer, watched)
                if answer.length:
                    raise OSError("the connection was cut")
                out.flush()
                part.replace(file)
        return True
    except (OSError, http.client.HTTPException) as e:  # urllib's errors are among the first
        print(f"download of {file.name} failed: {e}")
        return False
    finally:
        part.unlink(missing_ok=True)


def collect(file):
    """Collect a stand-in for an official dataset, where the script has benchmark/ beside it."""
    where = f"no dataset {file.stem} in {file.parent} and no download"
    tool = repository_file("collect.py", f"{where}: put {file.name} there, or make one with")
    print(
        f"NOTICE: collecting {AUTO_COLLECT:,} transitions instead, a small set whose results are "
        f"'collected' and no published ones. For the full size: python {tool} {file.stem}"
    )
    command = [sys.executable, tool, file.stem, "--num-transitions", str(AUTO_COLLECT)]
    failed = subprocess.run([*command, "--dataset-dir", file.parent]).returncode
    need(not failed, f"collecting {file.stem} failed; see the message above")


def device_rows(data):
    """Put a dataset on the device, row by row."""
    names = dict(obs="observations", next_obs="next_observations", actions="actions")
    names |= {k: k for k in ("rewards", "masks", "terminals")}
    rows = {k: jnp.asarray(data[name], jnp.float32) for k, name in names.items()}
    return rows | dict(actions=jnp.clip(rows["actions"], -ACTION_LIMIT, ACTION_LIMIT))


def observation_scale(data, args):
    """Mean and deviation (D,) that standardise observations; 0 and 1 without --normalize-obs."""
    if args.normalize_obs:
        return data["obs"].mean(axis=0), data["obs"].std(axis=0) + 1e-6
    return jnp.zeros(data["obs"].shape[1]), jnp.ones(data["obs"].shape[1])


# ==== end shared: data ====


# ==== shared: chunks ====
def sample_chunks(key, data, replay, batch_size, horizon, gamma, pool=None, limit=None, stride=1):
    """Windows of `horizon` rows H, i.i.d. and uniform over all starts in dataset and ring.

    No window joins the two or crosses the ring's pointer. `pool`: size of the first-in first-out
    pool in which dataset rows leave first (None: they stay). Of the ring the `limit` newest rows
    count (None: all); rows of one environment lie `stride` apart. `data` or `replay` may be None.

    Returns obs (B, D), actions (B, H * A) in order of time, returns (B,) = sum gamma^k r_k,
    discounts (B,) = gamma^H min_k mask_k, next_obs behind the last row, and valid (B, H): 1 up to
    the first end of an episode and 0 behind it.
    """
    num_data = 0 if data is None else len(data["rewards"])
    num_online, dropped, steps = 0, 0, jnp.arange(horizon)
    if replay is not None:
        added, capacity = replay["added"], len(replay["rows"]["rewards"])
        num_online = jnp.minimum(added, limit or capacity)
        if pool is not None:
            dropped = jnp.clip(num_data + added - max(pool, num_data + 1), 0, num_data)
    old_starts = jnp.maximum(num_data - dropped - (horizon - 1), 0)
    new_starts = jnp.maximum(num_online - (horizon - 1) * stride, 0)
    draw = jax.random.randint(key, (batch_size,), 0, old_starts + new_starts)

    def windows(rows, index):  # index (B, H)
        inner = {k: rows[k][index] for k in ("actions", "rewards", "masks", "terminals")}
        return inner | dict(obs=rows["obs"][index[:, 0]], next_obs=rows["next_obs"][index[:, -1]])

    parts = []
    if data is not None:
        start = jnp.minimum(dropped + draw, num_data - horizon)
        parts.append(windows(data, start[:, None] + steps))
    if replay is not None:
        start = added - num_online + draw - old_starts  # counted from the first row ever
        parts.append(windows(replay["rows"], (start[:, None] + steps * stride) % capacity))
    old = draw < old_starts
    pick = lambda *x: jnp.where(old.reshape(-1, *[1] * (x[0].ndim - 1)), x[0], x[-1])
    rows = jax.tree.map(pick, *parts)
    before = jnp.cumsum(rows["terminals"], axis=1) - rows["terminals"]  # ends before row k
    batch = dict(obs=rows["obs"], actions=rows["actions"].reshape(batch_size, -1))
    batch |= dict(returns=(gamma**steps * rows["rewards"]).sum(axis=1), next_obs=rows["next_obs"])
    batch |= dict(discounts=gamma**horizon * rows["masks"].min(axis=1))
    return batch | dict(valid=(before == 0).astype(jnp.float32))


# ==== end shared: chunks ====


# ==== shared: replay ====
def make_replay(capacity, obs_dim, act_dim):
    """Empty ring of online rows; `added` counts all rows ever written."""
    sizes = dict(obs=obs_dim, next_obs=obs_dim, actions=act_dim)
    rows = {k: jnp.zeros((capacity, size)) for k, size in sizes.items()}
    rows |= {k: jnp.zeros(capacity) for k in ("rewards", "masks", "terminals")}
    return dict(rows=rows, added=jnp.zeros((), jnp.int32))


def insert(replay, new_rows):
    """Write E rows (dict of (E, ...)) at the ring's pointer; the capacity is a multiple of E."""
    start = replay["added"] % len(replay["rows"]["rewards"])

    def write(ring, new):
        return jax.lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), start, axis=0)

    rows = jax.tree.map(write, replay["rows"], new_rows)
    return dict(rows=rows, added=replay["added"] + len(new_rows["rewards"]))


# ==== end shared: replay ====


# ==== shared: online ====
class Play(NamedTuple):
    """How a script collects and learns online: a block of steps, then its updates."""

    act: Callable  # (state, obs (E, D), time) -> chunks (E, H, A), played without looking
    learn: Callable | None  # (carry, *inputs) -> carry: all updates of a block; None: warm-up
    steps: int = 1  # steps of all environments in a block
    horizon: int = 1  # H
    sparse: bool = False  # every reward but 0 becomes -1
    count: bool = True  # the episodes' returns are the policy's own
    learn_first: bool = True  # official environments: learn while they take a block's steps


def repeat(learn, n):
    """n updates as one function; the replay, which they only read, stays outside of the loop."""

    def block(carry, *inputs):
        pick = lambda carry: {k: carry[k] for k in ("state", "sums")}
        body = lambda _, part: pick(learn(carry | part, *inputs))
        return carry | jax.lax.fori_loop(0, n, body, pick(carry))

    return block


def remember(carry, obs, actions, out, play):
    """Put one step of all environments into the replay and note the episodes that ended."""
    done = out["terminated"] | out["truncated"]
    reward = -(out["reward"] != 0).astype(jnp.float32) if play.sparse else out["reward"]
    rows = dict(obs=obs, actions=actions, rewards=reward, next_obs=out["next_obs"])
    rows |= dict(masks=1.0 - out["terminated"], terminals=done)
    returns, sums, recent = carry["returns"] + out["reward"], carry["sums"], carry["recent"]
    if play.count:
        ended = {"return": returns, "success": out["success"]}
        sums = add_sums(sums, ended, done, "online")
        recent = jnp.concatenate([jnp.where(done, returns, jnp.nan), recent])
        recent = recent[jnp.argsort(jnp.isnan(recent))][: carry["recent"].size]  # newest first
    replay, returns = insert(carry["replay"], rows), jnp.where(done, 0.0, returns)
    return carry | dict(replay=replay, returns=returns, sums=sums, recent=recent)


def interact(env, play):
    """(carry, *inputs) -> carry: one block on a JAX environment."""

    def env_step(_, carry):
        state, time, envs = carry["state"], carry["replay"]["added"], carry["envs"]
        obs, chunks, taken = observe(env, envs["state"]), envs["chunks"], envs["taken"]
        new = lambda: play.act(state, obs, time)
        if play.horizon > 1:  # open loop: a new chunk where the last one is used up
            new = jax.lax.cond((taken == 0).any(), new, lambda: chunks)
        chunks = new() if play.horizon == 1 else jnp.where((taken == 0)[:, None, None], new, chunks)
        actions, key = chunks[jnp.arange(len(taken)), taken], purpose_key(state.seed, "env", time)
        env_state, out = step_envs(env, envs["state"], actions, key)
        taken = (taken + 1) % play.horizon * ~(out["terminated"] | out["truncated"])
        envs = dict(state=env_state, chunks=chunks, taken=taken)
        return remember(carry, obs, actions, out, play) | {"envs": envs}

    def block(carry, *inputs):
        carry = jax.lax.fori_loop(0, play.steps, env_step, carry)
        return play.learn(carry, *inputs) if play.learn else carry

    return block


class HostLoop:
    """Blocks on official environments, E per member: advance(carry, n) -> carry.

    The simulators step while the device makes the updates of a block, which see the rows before it
    (`learn_first`): from where no chunk is due any more, as acting would wait for them. (Where an
    episode ends behind that, it does.) Else the updates come after the block's last step.
    """

    seconds = property(lambda self: self.learn.seconds + self.compiling)  # that compiling took

    def __init__(self, make_envs, play, args, inputs):
        self.make_envs, self.play, self.args = make_envs, play, args
        self.learn = Program(play.learn, *inputs)
        self.ids = [(m.seed, e) for m in members(args) for e in range(args.num_envs)]
        split = lambda x: x.reshape(-1, args.num_envs, *x.shape[1:])

        def act(state, obs, added, i):  # at the i-th step of a block
            chunks = jax.vmap(play.act)(state, split(obs), added + i * args.num_envs)
            return jax.lax.collapse(chunks, 0, 2)

        def keep(carry, step):
            put = jax.vmap(functools.partial(remember, play=play))
            return put(carry, *jax.tree.map(split, step)), None

        keep_all, self.compiling = lambda carry, steps: jax.lax.scan(keep, carry, steps)[0], 0.0
        self.act, self.keep = self.timed(act), self.timed(keep_all, donate_argnums=0)

    def timed(self, function, **options):
        """The function as a program, whose first call, which compiles it, counts in `seconds`."""
        program, calls = jax.jit(function, **options), itertools.count()

        def call(*inputs):
            start = time.perf_counter()
            out = program(*inputs)
            self.compiling += 0.0 if next(calls) else time.perf_counter() - start
            return out

        return call

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        args, replay, time = self.args, carry["replay"], int(carry["replay"]["added"][0])
        ids = [(seed, time, e) for seed, e in self.ids]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.envs, self.chunks, self.taken = self.make_envs(), 0.0, np.zeros(len(ids), int)
        self.obs, _ = simulate(self.envs, "reset", seed=seeds)
        # what was under way ends here: no window may join it with what comes
        terminals = replay["rows"]["terminals"]
        newest = (time - 1 - np.arange(min(time, args.num_envs))) % terminals.shape[1]
        terminals = terminals.at[:, newest].set(1.0)
        replay = replay | {"rows": replay["rows"] | {"terminals": terminals}}
        return carry | {"replay": replay, "returns": jnp.zeros_like(carry["returns"])}

    def __call__(self, carry, n):
        play = self.play
        for _ in range(n):
            steps, last = [], min(int((-self.taken % play.horizon).max()), play.steps - 1)
            for i in range(play.steps):
                if (due := self.taken == 0).any():
                    new = self.act(carry["state"], self.obs, carry["replay"]["added"], i)
                    self.chunks = np.where(due[:, None, None], new, self.chunks)
                actions = self.chunks[np.arange(len(due)), self.taken]
                simulate(self.envs, "step_async", actions)
                if play.learn and play.learn_first and i == last:
                    carry = self.learn(carry, 1)  # returns before it is done
                obs = self.obs
                self.obs, reward, terminated, truncated, info = simulate(self.envs, "step_wait")
                ended, next_obs = terminated | truncated, self.obs.copy()
                for e in np.flatnonzero(ended):  # there, self.obs already starts an episode
                    next_obs[e] = info["final_obs"][e]
                success = np.where(ended, info.get("final_info", {}).get("success", 0.0), 0.0)
                self.taken = np.where(ended, 0, (self.taken + 1) % play.horizon)
                out = dict(reward=reward, success=success.astype(float), next_obs=next_obs)
                out |= dict(terminated=terminated, truncated=truncated)
                steps.append((obs, actions, out))
            part = {k: carry[k] for k in ("replay", "returns", "sums", "recent")}
            carry = carry | self.keep(part, jax.tree.map(lambda *x: np.stack(x), *steps))
            if play.learn and not play.learn_first:
                carry = self.learn(carry, 1)
        return carry


def online_phases(task, env, play, args, rows, sizes, inputs, warm_up=None, warm_up_steps=0):
    """The online phase on JAX environments (`env`) or official ones (None); before it, if asked
    for, one without updates. `rows`: the replay's; `sizes`: of observation and action."""
    num_envs, number, start = args.num_envs, len(members(args)), args.offline_steps
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    make_envs = functools.cache(lambda: make_host_envs(task, args, number * num_envs, same_step))

    def begin(seed):
        new = dict(replay=make_replay(rows - rows % num_envs, *sizes))
        new |= dict(returns=jnp.zeros(num_envs), recent=jnp.full(20, jnp.nan))
        if env is not None:
            env_state = reset_envs(env, purpose_key(seed, "start"), num_envs)
            chunks = jnp.zeros((num_envs, play.horizon, sizes[1]))
            new["envs"] = dict(state=env_state, chunks=chunks, taken=jnp.zeros(num_envs, jnp.int32))
        return new

    def phase(name, start, end, play):
        host = HostLoop(make_envs, play, args, inputs) if env is None else None
        loop, restart = host or Program(interact(env, play), *inputs), host and host.restart

        def enter(carry):
            if "replay" not in carry:
                new = jax.jit(jax.vmap(begin))(carry["state"].seed)
                carry = carry | place(new, number)
            return restart(carry) if restart else carry

        return Phase(name, start, end, loop, enter, num_envs * play.steps, restart)

    MEMORY.update(rows=rows, row=4 * (2 * sizes[0] + sizes[1] + 3))
    middle, end = start + min(warm_up_steps, args.online_steps), start + args.online_steps
    phases = [("warm-up", start, middle, warm_up), ("online", middle, end, play)]
    return [phase(*parts) for parts in phases if parts[1] < parts[2]]


# ==== end shared: online ====


# ==== shared: runs ====
PURPOSES = ("init", "update", "act", "env", "eval", "start")
MAGIC = b"CLEANFLOW1"
REMEDY = {errno.ENOSPC: "free some space", errno.EFBIG: "raise the limit on file sizes"}
REMEDY[errno.EAGAIN] = "it is in use by another process: wait for it to end"  # its lock
# Free on --resume. FREE_ALSO, a script's own, and offline_steps are, until its online phase has
# begun; env_backend and EVALUATION_FLAGS, also its own, are with --evaluate.
FREE = ("online_steps", "eval_interval", "eval_episodes", "eval_all_modes", "eval_background")
FREE += ("checkpoint_interval",)
# What a checkpoint knows of its run, as it is at the start
PROGRESS = dict(step=0, train_seconds=0, log_seconds=0, updates_per_s=0, csv_bytes=0, evals=())
PROGRESS["diverged"] = {}  # seed (a string): before which step
PROGRESS["pending"] = ()  # the row of metrics of an evaluation that was under way
PROGRESS["replay_files"] = ()  # of the rows in the ring: first row, the one behind, checksum
MEMORY = {}  # bytes that this run's parts need, and how many there are, for `what_fits`


def purpose_key(seed, purpose, *numbers):
    """Random key of one purpose: a function of the seed and, say, the step, so none is stored."""
    numbers = (PURPOSES.index(purpose), *numbers)
    return functools.reduce(jax.random.fold_in, numbers, jax.random.key(seed))


# A run trains members: `num_seeds` seeds of each arm, one combination of the values of those flags
# that have several (a grid). state.arm is the arm's number, None without a grid.
class Member(NamedTuple):
    arm: str  # alpha=3,tau=0.01; without a grid empty
    seed: int
    name: str  # alpha=3,tau=0.01,seed=2; without a grid 2


def grid_flags(args_type):
    """Names of the flags that may have several values."""
    fields = dataclasses.fields(args_type)
    return [field.name for field in fields if tuple[float, ...] in get_args(field.type)]


def several(args):
    """The flags that have several values, {name: a value for each arm}."""
    return {k: v for k, v in vars(args).items() if isinstance(v, tuple) and float in map(type, v)}


def combine(args):
    """All combinations of the values that were given with each flag, as the arms."""
    given = several(args)
    for name, values in given.items():
        need(len({*values}) == len(values), f"--{name.replace('_', '-')} has a value twice")
    columns = zip(*itertools.product(*given.values()), strict=True)
    return dataclasses.replace(args, **dict(zip(given, columns, strict=True)))


def arms(args):
    """{name: its arguments, as of a run of its own}; a flag that follows another is not named."""
    columns = several(args)
    if not columns:
        return {"": args}
    named = {v: k for k, v in reversed(columns.items())}  # of flags with equal values the first
    found = {}
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        name = ",".join(f"{k}={v[i]:.12g}" for v, k in reversed(named.items()))
        found[name] = dataclasses.replace(args, **dict(zip(columns, row, strict=True)))
    return found


def members(args):
    """Those of the first arm, then those of the next; all arrays of a run are in this order."""
    pairs = itertools.product(arms(args), range(args.seed, args.seed + args.num_seeds))
    return [Member(arm, s, f"{arm},seed={s}" if arm else str(s)) for arm, s in pairs]


def each_arm(resolve):
    """Let a function (args, ...) -> args see the arms one by one, as runs of their own."""

    @functools.wraps(resolve)
    def resolve_all(args, *inputs):
        first, *rest = rows = [resolve(arm, *inputs) for arm in arms(args).values()]
        columns = {k: tuple(getattr(row, k) for row in rows) for k in vars(first)}
        columns = {k: v for k, v in columns.items() if rest and len({*v}) > 1}
        for name in columns.keys() - grid_flags(type(args)):
            raise UserError(f"--{name.replace('_', '-')} would differ between the arms: give it")
        return dataclasses.replace(first, **columns)

    return resolve_all


def of_arm(args, arm):
    """`args` with the numbers of an arm, which is a traced number or None."""
    own = {k: jnp.float32(v)[arm] for k, v in several(args).items()}
    return dataclasses.replace(args, **own) if own else args


def per_arm(make, nets, args, *more):
    """make(nets, args, *more), a function whose first input is a carry or a state: of a grid it has
    the numbers of that member's arm, in args and in the settings of learn(carry, data, *settings),
    whose numbers are arrays over the arms where arms differ."""

    def function(first, *inputs, **options):
        is_carry = isinstance(first, dict)
        arm = (first["state"] if is_carry else first).arm
        if is_carry:
            own = jax.tree.map(lambda x: x[arm] if x.ndim else x, inputs[1:])
            inputs = (inputs[0], *own)
        return make(nets, of_arm(args, arm), *more)(first, *inputs, **options)

    return function if several(args) else make(nets, args, *more)


def place(tree, number, copy=False):
    """Put arrays on the device; on several devices split them by their leading axis of members, or
    give each device a copy (`copy`), where the members divide evenly."""
    devices = jax.devices()
    if len(devices) == 1 or number % len(devices):
        return jax.device_put(tree, devices[0])
    mesh = jax.sharding.Mesh(np.array(devices), ("members",))
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P() if copy else jax.P("members")))


class Program:
    """`step(carry, *inputs)` n times for all members in one dispatch: program(carry, n) -> carry,
    whose memory is reused. They share the inputs (dataset, settings). `seconds`: of compiling."""

    def __init__(self, step, *inputs):
        self.step, self.inputs, self.executable, self.seconds = step, inputs, None, 0.0

    def __call__(self, carry, n):
        n = jnp.int32(n)
        if self.executable is None:
            start, layout = time.perf_counter(), jax.tree.map(lambda x: x.sharding, carry)
            program = jax.jit(self.repeat, donate_argnums=0, out_shardings=layout)
            self.executable = program.lower(carry, n, *self.inputs).compile()
            self.seconds = time.perf_counter() - start
        return self.executable(carry, n, *self.inputs)

    def repeat(self, carry, n, *inputs):
        one_member = lambda c: jax.lax.fori_loop(0, n, lambda _, c: self.step(c, *inputs), c)
        if len(jax.tree.leaves(carry)[0]) > 1:
            return jax.vmap(one_member)(carry)
        carry = one_member(jax.tree.map(lambda x: x[0], carry))  # an axis of one can cost XLA's CPU
        return jax.tree.map(lambda x: x[None], carry)  # code twice the time


def add_sums(sums, metrics, weight=1, kind="train"):
    """Add metrics to the sums since the last log, {kind/name: (of weight * metric, of weight)}."""
    pair = lambda v: jnp.stack([jnp.sum(weight * v), jnp.sum(weight)])
    new = {f"{kind}/{name}": pair(value) for name, value in metrics.items()}
    return sums | {name: sums.get(name, 0.0) + value for name, value in new.items()}


def zero_sums(learn, carry, *inputs):
    """Sums of metrics before the first update, for all members; `carry` is what `learn` needs."""
    one, count = jax.tree.map(lambda x: x[0], carry), len(carry["state"].seed)
    names = jax.eval_shape(learn, one | {"sums": {}}, *inputs)["sums"]
    names = [*names, "online/return", "online/success"]
    return place({name: jnp.zeros((count, 2)) for name in names}, count)


def write_file(path, content):
    """Write bytes, or facts as JSON, so that a crash at any moment leaves the old file or the new
    one; beside a checkpoint stays the one before."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            is_json = isinstance(content, dict)
            file.write((json.dumps(content, indent=2) + "\n").encode() if is_json else content)
            file.flush()
            os.fsync(file.fileno())
        if not is_json and path.exists():
            os.replace(path, path.with_suffix(".previous"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_replay(run_dir, replay, files):
    """Write the rows that are newer than those in `files`, which is all that can have changed, to
    one more file -> (the replay without its rows, the files of those still in the ring)."""
    added, capacity = int(replay["added"][0]), replay["rows"]["rewards"].shape[1]
    oldest = max(0, added - capacity)
    first = max(oldest, files[-1][1] if files else 0)
    at = np.arange(first, added) % capacity
    new = {k: np.asarray(v[:, at]) for k, v in replay["rows"].items()}  # one by one, for memory
    body = flax.serialization.msgpack_serialize(new)
    (run_dir / "replay").mkdir(exist_ok=True)
    write_file(run_dir / f"replay/{first}-{added}.msgpack", body)
    kept = [file for file in files if file[1] > oldest]
    return replay | {"rows": capacity}, [*kept, (first, added, zlib.crc32(body))]


def load_replay(run_dir, replay, files):
    """Put the rows that `save_replay` wrote where they were in the ring; None where a file is not
    as it was written."""
    capacity, rows = replay["rows"], {}
    for first, end, checksum in files:
        path = Path(run_dir) / f"replay/{first}-{end}.msgpack"
        body = path.read_bytes() if path.is_file() else b""
        if zlib.crc32(body) != checksum:
            return print(f"NOTICE: {path} is damaged; --evaluate can do without", file=sys.stderr)
        for k, v in flax.serialization.msgpack_restore(body).items():
            ring = rows.setdefault(k, np.zeros((len(v), capacity, *v.shape[2:]), v.dtype))
            ring[:, np.arange(first, end) % capacity] = v
    return replay | {"rows": rows}


def save_checkpoint(run_dir, carry, facts, name="checkpoint"):
    """Everything that training changes (of a replay, see `save_replay`), and facts of the run."""
    tree = flax.serialization.to_state_dict(jax.device_get(carry))
    body = flax.serialization.msgpack_serialize({"facts": json.dumps(facts), "carry": tree})
    write_file(run_dir / f"{name}.msgpack", MAGIC + hashlib.sha256(body).digest() + body)


def load_checkpoint(run_dir, name="checkpoint", replay=True):
    """Newest intact checkpoint of a run, without the rows of its replay if it is not asked for ->
    (nested dict of arrays, facts)."""
    newest = Path(run_dir) / f"{name}.msgpack"
    for path in filter(Path.is_file, (newest, newest.with_suffix(".previous"))):
        content = path.read_bytes()
        digest, body = content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
        if not content.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
            print(f"NOTICE: {path} is damaged; looking for the one before it", file=sys.stderr)
            continue
        stored = flax.serialization.msgpack_restore(body)
        carry, facts = stored["carry"], json.loads(stored["facts"])
        if not (replay and facts.get("replay_files")):
            return carry, facts
        if ring := load_replay(run_dir, carry["replay"], facts["replay_files"]):
            return carry | {"replay": ring}, facts
    raise UserError(f"no intact {newest.name} in {run_dir}; it got not so far, so start a new run")


def restore(template, tree, run_dir):
    """Put a loaded checkpoint into the structure and device layout of `template`. A replay's ring
    may have become longer, for more online steps (it then has not wrapped yet), and stays as long
    as it was for fewer."""

    def put(path, new, old):
        if "['replay']['rows']" in (name := jax.tree_util.keystr(path)):
            old = np.pad(old, {1: (0, max(0, new.shape[1] - old.shape[1]))})
        elif (new.shape, new.dtype) != (old.shape, old.dtype):
            raise ValueError(f"{name} is {old.dtype} {old.shape}, not {new.dtype} {new.shape}")
        elif name.endswith(("['seed']", "['arm']")) and (new != old).any():
            raise ValueError(f"{name} is {old}, not {new}")
        return jax.device_put(old, new.sharding)

    target = flax.serialization.to_state_dict(template)
    for part in (tree, tree.get("state")):
        if isinstance(part, dict) and "seed" in part:
            part.setdefault("arm")  # from before there were grids
    failing = f"the checkpoint in {run_dir} does not fit the arguments: "
    tree = ask(jax.tree_util.tree_map_with_path, put, target, tree, failing=failing)
    return flax.serialization.from_state_dict(template, tree)


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all members on the device(s)."""
    count, arm = len(arms(args)), None
    seeds = jnp.tile(jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed, count)
    if count > 1:
        arm = jnp.repeat(jnp.arange(count), args.num_seeds)

    def init(mean, std, seed, arm):
        state = init_state(of_arm(args, arm), obs_dim, act_dim, mean, std, seed)
        return state if arm is None else state.replace(arm=arm)

    init = jax.jit(jax.vmap(init, (None, None, 0, 0)))
    return place(init(mean, std, seeds, arm), len(seeds))


def resume(carry, phases, args):
    """--resume, --start-from: (the carry of that run's last checkpoint, or of the one at the end of
    its offline phase, the checkpoint's facts); else the carry given, none."""
    leaves = jax.tree.leaves(carry)
    MEMORY.update(members=len(leaves[0]), networks=sum(x.nbytes for x in leaves))
    run_dir, name = (args.resume, "checkpoint") if args.resume else (args.start_from, "offline")
    if not run_dir:
        return carry, {}
    tree, facts = load_checkpoint(run_dir, name)
    if several(args) and tree["state"].get("arm") is None:  # all arms begin at that run's end
        count, before = len(arms(args)), facts["diverged"]
        tree = jax.tree.map(lambda x: np.concatenate([x] * count), tree)
        tree["state"]["arm"] = np.asarray(carry["state"].arm)
        own = {m.name: before[str(m.seed)] for m in members(args) if str(m.seed) in before}
        facts |= dict(diverged=own, evals=[values * count for values in facts["evals"]])
    step, end = facts["step"], phases[-1].end
    over = not args.resume or (Path(run_dir) / "result.json").exists()
    more = step < end or (step == end and not over)
    need(more, f"{run_dir} is complete at step {step:,}: add steps or use --evaluate")
    phase = next(p for p in phases if step <= p.end)  # in which the checkpoint was made
    carry = restore(phase.enter(carry), tree, run_dir)
    return (phase.restart(carry) if phase.restart else carry), facts


def read_args(run_dir, argv, default):
    """Arguments of an earlier run, plus the flags given now; refuses what may not change."""
    path = Path(run_dir) / "args.json"
    need(run_dir and path.is_file(), f"'{run_dir}' is not a run directory: it has no args.json")
    try:
        stored = json.loads(path.read_text())
        need(stored["algo"] == ALGO, f"{run_dir} is a run of {stored['algo']}.py; use that script")
        known = {name: stored["args"][name] for name in vars(default)}
        intact = stored.get("args_crc32") in (None, zlib.crc32(json.dumps(stored["args"]).encode()))
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged or of another version ({e}); start a new run") from e
    need(intact, f"{path} was changed: put it back, or remove args_crc32 from it if it was you")
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    known |= dict(resume=None, evaluate=None)
    args = tyro.cli(type(default), args=argv, default=type(default)(**known))
    new = several(combine(tyro.cli(type(default), args=argv)))
    text = f"--{', --'.join(new)} had other values in {run_dir}, which cannot change"
    begins = args.start_from and not (args.resume or args.evaluate)
    fits = new.items() <= known.items() or (begins and not several(type(default)(**known)))
    need(fits, f"{text}; start a new run".replace("_", "-"))
    args = dataclasses.replace(args, **new)
    free = {"resume", "evaluate", *FREE}
    free |= set() if known.get("online_steps") else {"offline_steps", *FREE_ALSO}
    free |= {"env_backend", "video", *EVALUATION_FLAGS} if args.evaluate else set()
    if begins:  # networks' sizes: see `restore`
        free = known.keys() - {"offline_steps", "seed", "num_seeds"}
    for name, old in known.items():
        if getattr(args, name) != old and name not in free:
            name = f"--{name.replace('_', '-')}"
            raise UserError(f"{name} was {old!r} in {run_dir} and cannot change; start a new run")
    return args


class Run:
    """A run directory (args.json, metrics.csv, TensorBoard events, checkpoint, result.json), and
    what the training loop does between dispatches."""

    dir = None  # of the run that this process works on; `command_line` names it

    def __init__(self, args, task, source, data, policies, progress):
        vars(self).update(PROGRESS | progress)
        self.args, self.task, self.saved, self.signal = args, task, self.step, None
        self.members, self.rows, self.thread = members(args), [], ThreadPoolExecutor(1)
        self.left = [i for i, m in enumerate(self.members) if m.name not in self.diverged]
        self.tags = [m.name if m.arm else f"seed{m.seed}" for m in self.members]
        self.metrics = metric_names(task, policies)  # of an evaluation; the first is the headline
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup(1)
        for number in (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (not ignored)):
            signal.signal(number, self.stop)
        packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "ogbench", "mujoco")
        git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        git = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
        checksum = None  # of data from a file, which may be another one when the run is resumed
        if data is not None and "in this script" not in source:
            for name in ("observations", "actions", "rewards"):
                checksum = zlib.crc32(np.ascontiguousarray(data[name]), checksum or 0)
        self.facts = dict(
            algo=ALGO, task=task.name, dataset_source=source, dataset_crc32=checksum,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            commit=(git or "").strip() or None, args=vars(args),
            arms={k: {n: vars(arm)[n] for n in several(args)} for k, arm in arms(args).items()},
            args_crc32=zlib.crc32(json.dumps(vars(args)).encode()),
            versions={p: importlib.metadata.version(p) for p in packages},
        )  # fmt: skip
        self.open()
        print(f"{ALGO} on {task.name}, {self.facts['device']}, run directory {self.dir}")
        if data is not None:
            rows, episodes = len(data["rewards"]), int(data["terminals"].sum())
            goal = f"{(data['masks'] == 0).mean():.2%} of the rows at the goal"
            print(f"dataset: {source}, {rows:,} transitions, {episodes:,} episodes, {goal}")
        fields = "  ".join(f"{k}={v}" for k, v in vars(args).items() if v is not None)
        print(textwrap.fill(fields, 100, initial_indent="  ", subsequent_indent="  "), flush=True)

    def open(self):
        """Make the directory, or go on in that of --resume: args.json keeps what it says of the
        start, metrics.csv what was there at the checkpoint."""
        args, now, path = self.args, self.facts, Path(self.args.resume or self.args.out_dir)
        wandb = args.wandb_project and ask(importlib.import_module, "wandb")  # pip install wandb
        if not args.resume:
            name = f"{self.task.name.removesuffix('-v0').replace('/', '-')}__{ALGO}__{args.seed}"
            path /= f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
            while path.exists():
                path = path.with_name(path.name + "x")
            path.mkdir(parents=True)
        Run.dir, self.lock_file = path, open(path / ".lock", "w")
        fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one process writes a run
        if args.resume:
            before = json.loads((path / "args.json").read_text())
            was, same = (before.get(f"dataset_{k}") for k in ("source", "crc32"))
            text = f"{path} was started on other data ({was}): put it back"
            need(same == now["dataset_crc32"], text)
            new = {k: now[k] for k in ("commit", "device", "versions")} | {"step": self.step}
            self.facts = now | before | {k: now[k] for k in ("args", "args_crc32")}
            self.facts["resumes"] = [*before.get("resumes", []), new]
        write_file(path / "args.json", self.facts)
        self.csv = open(path / "metrics.csv", "a", newline="")
        size = min(self.csv.tell(), self.csv_bytes)  # less where the file was emptied
        self.csv.seek(self.csv.truncate(size))

        from tensorboard.summary import Writer

        self.writers = [Writer(str(path / f"tb_{tag}")) for tag in self.tags]
        names = dict(project=args.wandb_project, id=path.name, config=self.facts)
        self.wandb = wandb and wandb.init(**names, resume="allow")

    def stop(self, number, frame):
        """First Ctrl-C, SIGTERM or SIGHUP: finish the dispatch and save. Second: stop at once."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        print("\nstopping soon; once more to stop at once", file=sys.stderr, flush=True)

    def dispatch(self, carry):
        """Iterations of about a second, up to the next thing that is due -> (carry, whether to log,
        to evaluate, to save). A member that diverged is named and left out; without any, stops."""
        phase, args, before = self.phase, self.args, self.step
        due = (args.log_interval, args.eval_interval, args.checkpoint_interval)
        due = [min(phase.end, (before // interval + 1) * interval) for interval in due]
        n = max(1, min(-(-(min(due) - before) // phase.stride), int(self.rate)))
        start, compiled = time.perf_counter(), phase.advance.seconds
        carry = phase.advance(carry, n)
        sums = jax.device_get(carry["sums"])
        if compiling := phase.advance.seconds - compiled:
            tqdm.write(f"{phase.name}: compiled in {compiling:.1f} s")
        seconds = time.perf_counter() - start - compiling
        self.step, self.rate = before + n * phase.stride, n / seconds
        self.train_seconds += seconds
        self.log_seconds += seconds
        self.bar.update(self.step - before)
        if self.bar.disable and time.perf_counter() - self.said > 10:  # no terminal: lines
            self.said, speed = time.perf_counter(), self.rate * phase.stride
            eta = (phase.end - self.step) / speed
            print(f"{phase.name} {self.step:,}/{phase.end:,}  {speed:,.1f}/s  ETA {eta:,.0f} s")
        for i in list(self.left):
            broken = [k for k, v in sums.items() if "train/" in k and not np.isfinite(v[i]).all()]
            if broken:
                what = f"diverged before step {self.step:,}: {', '.join(broken)} not finite"
                self.diverged = self.diverged | {self.members[i].name: self.step}
                self.left.remove(i)
                if self.left:
                    kind = "" if self.members[i].arm else "seed "
                    tqdm.write(f"{kind}{self.members[i].name} {what}; the others go on")
        self.write(wait=not self.left)
        if not self.left:
            rates = [k.replace("_", "-") for k in vars(args) if k.endswith(("_lr", "ing_rate"))]
            raise UserError(
                f"training {what}; step {self.saved:,} is the last good one in {self.dir}; "
                f"try a lower --{' or --'.join(rates)}"
            )
        return carry, *(self.step >= step for step in due)

    def evaluate(self, evaluate, state, every=False):
        """Begin to evaluate -> Future. Unless `every`, which ends a phase, training goes on while
        simulators evaluate a copy of the state; of two evaluations the second waits."""
        self.write(wait=True)
        beside = evaluate.beside and self.args.eval_background and not every
        if beside:
            state = jax.device_put(jax.tree.map(jnp.copy, state), jax.devices("cpu")[0])
        future = self.thread.submit(evaluate, state, self.step, every)
        if not beside:
            future.exception()  # waits
        return future

    def catch_up(self, evaluate, state):
        """Once more what was being evaluated when the checkpoint was written -> Future or None."""
        self.rows = [[*row, self.evaluate(evaluate, state)] for row in self.pending]
        return self.rows[0][-1] if self.rows else None

    def log(self, carry, evaluation):
        """A row of metrics: means since the last log, and what `evaluation`, if there is one, will
        find. What nothing is known of is NaN here, and left out."""
        mean = lambda total, n: np.where(n > 0, total / np.maximum(n, 1), np.nan)
        sums, count = jax.device_get(carry["sums"]), len(self.members)
        values = {name: mean(*pairs.T) for name, pairs in sums.items()}
        returns = np.asarray(carry.get("recent", np.full((count, 1), np.nan)))
        values["charts/episodic_return"] = mean(np.nansum(returns, 1), (~np.isnan(returns)).sum(1))
        updates = max(pairs[0, 1] for name, pairs in sums.items() if "train/" in name)
        self.updates_per_s, self.log_seconds = float(updates / self.log_seconds), 0.0
        values |= {f"time/{k}": getattr(self, k) for k in ("updates_per_s", "train_seconds")}
        values["time/compile_s"] = self.phase.advance.seconds
        values = {k: np.broadcast_to(v, count).tolist() for k, v in values.items()}
        self.rows.append([self.step, self.phase.name, [*self.left], values, evaluation])
        self.write()
        return carry | {"sums": place(jax.tree.map(np.zeros_like, sums), count)}

    def write(self, wait=False):
        """A CSV row and TensorBoard point per member of each row of metrics, in their order, up to
        one whose evaluation is under way, for which it may `wait`."""
        while self.rows and (wait or self.rows[0][-1] is None or self.rows[0][-1].done()):
            step, phase, left, values, evaluation = self.rows.pop(0)
            results = evaluation.result() if evaluation else {}
            measured = {f"eval/{k}": v.mean(1).tolist() for k, v in results.items()}
            nothing = [np.nan] * len(self.members)
            values |= {k: measured.get(k, nothing) for k in (f"eval/{k}" for k in self.metrics)}
            if results:
                self.evals = [*self.evals, values[f"eval/{self.metrics[0]}"]]
                for arm, rows in self.left_by_arm(left).items():
                    text = summary({k: v[rows] for k, v in results.items()})
                    tqdm.write(f"{phase} step {step:>9,}  {f'{arm}  ' * bool(arm)}{text}")
            arm_column = ["arm"] * bool(self.members[0].arm)
            table = csv.DictWriter(self.csv, ["step", "phase", *arm_column, "seed", *values])
            if self.csv.tell() == 0:
                table.writeheader()
            for i, member in enumerate(self.members):
                row = {k: v[i] for k, v in values.items() if i in left and not np.isnan(v[i])}
                where = dict(step=step, phase=phase, seed=member.seed)
                table.writerow(where | dict.fromkeys(arm_column, member.arm) | row)
                for name, value in row.items():
                    self.writers[i].add_scalar(name, value, step)
                if self.wandb:
                    self.wandb.log({f"{k}/{self.tags[i]}": v for k, v in row.items()}, step)
            self.csv.flush()

    def save(self, carry):
        if self.rows and self.rows[0][0] < self.step:  # one of this step can be evaluated again
            self.write(wait=True)
        self.pending = [row[:-1] for row in self.rows]
        self.saved, self.csv_bytes = self.step, self.csv.tell()
        before = self.replay_files  # those of the checkpoint that becomes the previous one
        if "replay" in carry:
            replay, self.replay_files = save_replay(self.dir, carry["replay"], before)
            carry = carry | {"replay": replay}
        facts = {k: getattr(self, k) for k in PROGRESS}
        if self.step == self.args.offline_steps and self.args.start_from is not None:
            save_checkpoint(self.dir, carry, facts, "offline")  # stays, for --start-from
        save_checkpoint(self.dir, carry, facts)
        needed = (self.dir / f"replay/{a}-{b}.msgpack" for a, b, _ in (*before, *self.replay_files))
        for path in {*self.dir.glob("replay/*")}.difference(needed):
            path.unlink()

    def left_by_arm(self, left):
        """{an arm's name: its members of those that are left}, of the arms that have any."""
        by_arm = itertools.groupby(left, lambda i: self.members[i].arm)
        return {arm: list(rows) for arm, rows in by_arm}

    def figures(self, results, rows):
        """What the last evaluation says of some members -> (facts, the same as a line)."""
        last_three = float(np.array(self.evals[-3:])[:, rows].mean())
        results = {k: v[rows] for k, v in results.items()}
        facts = {f"eval/{k}": float(v.mean()) for k, v in results.items()}
        facts |= {f"eval/{self.metrics[0]}_last_three": last_three}
        facts |= {"seeds": [self.members[i].seed for i in rows]}
        facts |= {"episodes": {k: v.tolist() for k, v in results.items()}}
        return facts, f"{summary(results)}  last three evaluations {last_three:.2f}"

    def finish(self, results):
        """Write result.json and print the same figures as the last line."""
        result, text = self.figures(results, self.left)
        result |= {"steps": self.step, "diverged": self.diverged}
        result |= {k: self.facts[k] for k in ("dataset_source", "device", "commit")}
        result |= {"train_seconds": self.train_seconds, "updates_per_s": self.updates_per_s}
        if self.members[0].arm:
            by_arm = self.left_by_arm(self.left).items()
            arms = {arm: self.figures(results, rows) for arm, rows in by_arm}
            result["arms"] = {arm: facts for arm, (facts, _) in arms.items()}
            print(*(f"{arm}  {line}" for arm, (_, line) in arms.items()), sep="\n")
        write_file(self.dir / "result.json", result)
        speed = f"train_seconds {self.train_seconds:.0f}  updates_per_s {self.updates_per_s:.1f}"
        print(f"done: {text}  steps {self.step:,}  {speed}  "
              f"dataset {self.facts['dataset_source']}  in {self.dir}")  # fmt: skip


class Phase(NamedTuple):
    """A stretch of training: `advance(carry, n)` does n iterations of `stride` steps each."""

    name: str
    start: int
    end: int
    advance: Callable
    enter: Callable = lambda carry: carry  # from the carry of the phase before
    stride: int = 1
    restart: Callable | None = None  # host environments begin new episodes at each checkpoint


def check_numbers(args, unbounded=(), zero=()):
    """Types fit; counts are at least 1 (steps, seed and those in `zero`: 0) and fit into int32,
    other numbers at least 0 and finite, gamma and tau at most 1."""
    zero = ("seed", "offline_steps", "online_steps", *zero)
    most = dict(gamma=1, tau=1, seed=max(0, 2**31 - args.num_seeds))
    for name, kind in ((field.name, field.type) for field in dataclasses.fields(args)):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        ask(check_type, value, kind, failing=f"{flag} is {value!r}: ")
        need(value != () or name not in grid_flags(type(args)), f"{flag} needs a number")
        if type(value) in (int, float):
            low = -1e30 if name in unbounded else int(type(value) is int and name not in zero)
            high = most.get(name, 2**31 - 1 if type(value) is int else 1e30)
            bound = f"at least {low}" if value < low else f"between {low} and {high}"
            need(low <= value <= high, f"{flag} is {value}, but must be {bound}")


def fill(args, **values):
    """Set those of `values` that this script has flags for and no flag has set."""
    unset = {k: v for k, v in values.items() if getattr(args, k, v) is None}
    return dataclasses.replace(args, **unset)


def task_table(task, defaults):
    """What a task sets when no flag does: `defaults`, then the task's, then those of its file."""
    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    own = task.parts.get("defaults", {})
    return defaults | TASK_DEFAULTS[family] | own.get("", {}) | own.get(ALGO, {})


def memory_limit():
    """Bytes of a device; of a CPU, the machine's, or less by ulimit(1)."""
    machine, most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), resource.RLIM_INFINITY
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit or (machine if allowed == most else min(machine, allowed))


def what_fits(args):
    """Where memory ran out: what the run needs before its updates, and the flag with which that
    should fit, a fifth being left to them."""
    data, rows, row, networks = (MEMORY.get(k, 0) for k in ("data", "rows", "row", "networks"))
    members = MEMORY.get("members", args.num_seeds)
    advice = "lower " + "the grid's number of values, " * bool(several(args)) + "--num-seeds, "
    advice += "--buffer-size, " * (rows > 0) + "--batch-size"
    devices = 1 if members % jax.device_count() else jax.device_count()
    total, replay = devices * memory_limit(), members * rows * row
    left = 0.8 * total - devices * data  # each device has a copy of it
    seeds = int(left / max(1, replay + networks) * args.num_seeds) // devices * devices
    fit = int((left - networks) / max(1, members * row))
    if 0 < seeds < args.num_seeds:
        advice = f"--num-seeds {seeds} should fit; else lower --batch-size"
    elif data / max(1, row) < fit < rows:  # some scripts' rings have room for the data
        advice = f"--buffer-size {fit} should fit; else lower --batch-size"
    sizes = ", ".join(f"{x / 2**30:.3g} GiB for the {name}" for name, x in (
        ("data", data), ("replay", replay), ("networks", networks)) if x)  # fmt: skip
    return f"of {total / 2**30:.3g} GiB it needs {sizes or 'more'}; {advice} or network sizes"


def command_line(main, args_type, argv=None):
    """Parse the flags, call `main(args)`; what the user can mend is one sentence, exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows progress too
    Run.dir = None
    MEMORY.clear()
    try:
        args, more = tyro.cli(args_type, args=argv, return_unknown_args=True)
        if more and not more[0].startswith("-"):
            flags = ", --".join(grid_flags(args_type)).replace("_", "-")
            raise UserError(f"'{more[0]}' is a value too many; several are for --{flags}")
        args = combine(tyro.cli(args_type, args=argv) if more else args)  # which says what is wrong
        need(args.evaluate or not args.video, "--video goes with --evaluate RUN_DIR")
        need(None in (args.resume, args.evaluate), "--resume and --evaluate exclude each other")
        ask(jax.devices, failing="JAX finds no device; see JAX_PLATFORMS: ")
        for run_dir in (args.start_from or None, args.resume, args.evaluate):
            args = args if run_dir is None else read_args(run_dir, argv, args_type())
        main(args)
        return 0
    except UserError as e:
        error, code = e, 2
    except OSError as e:
        then = REMEDY.get(e.errno, "mend that") + f", then --resume {shlex.quote(str(Run.dir))}"
        then = then if Run.dir else "mend that, or choose --out-dir"
        error, code = f"cannot use {e.filename or Run.dir}: {e.strerror or e}; {then}", 2
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if not any(word in str(e) for word in ("RESOURCE_EXHAUSTED", "ut of memory")):
            raise
        error, code = f"out of memory: {what_fits(args)} ({str(e).splitlines()[0][:150]})", 2
    except KeyboardInterrupt:
        error, code = "interrupted before training began; nothing was written", 130
    for simulator in multiprocessing.active_children():  # an evaluation under way ends
        simulator.kill()
    print(f"error: {error}", file=sys.stderr)
    return code


# ==== end shared: runs ====


# ---- this script's flags ----
JAX_ENVS = {}  # built-in environments beside the point mazes: name -> constructor
GUIDANCE = ("eta", "adaptive_eta", "beta", "normalize_grad", "grad_at")
GUIDANCE += ("online_cons_weight", "online_diag_weight")
SEARCH = tuple(name for name in Args.__dataclass_fields__ if name.startswith("qgbs_"))
# flags that may still change when a run without online phase is resumed, and with --evaluate
FREE_ALSO = (*GUIDANCE, "online_objective", "mvp_target", "q_agg_online", "learning_starts", "utd")
FREE_ALSO += ("buffer_size",)
EVALUATION_FLAGS = (*SEARCH, "eval_modes", "num_samples", "flow_steps")


def prepare(raw, args):
    """The dataset with --sparse rewards; refuses what has none or is too short."""
    if len(raw["rewards"]) < args.horizon:
        raise UserError(f"the dataset is shorter than one chunk of --horizon {args.horizon} steps")
    if args.sparse and raw["rewards"].max() > 0:
        raise UserError("--sparse is for rewards of at most 0; use --sparse False")
    return raw | ({"rewards": -(raw["rewards"] != 0).astype(np.float32)} if args.sparse else {})


@each_arm
def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    table = task_table(task, PAPER)
    args = fill(args, **table)
    own = dict(flowmap=("fmq", 1), flow=("mvp", 10))[args.actor]
    args = fill(args, online_objective=own[0], flow_steps=own[1])
    jumps = ("consistency", "consistency_warmup", "consistency_anneal_end", "time_embedding")
    check_numbers(args, zero=("learning_starts", *jumps[1:3], "qgbs_rounds"))
    flow, objective, modes = args.actor == "flow", args.online_objective, args.eval_modes
    for wrong, remedy in (
        (min(args.hidden_dims, default=0) < 1, "--hidden-dims needs layers of at least one unit"),
        (flow and objective == "fmq", "--actor flow has no jumps that --online-objective fmq could "
         "guide: use --online-objective mvp"),
        (args.consistency_anneal_end <= args.consistency_warmup,
         "--consistency-anneal-end must be larger than --consistency-warmup"),
        (args.offline_steps + args.online_steps == 0,
         "nothing to train: give --offline-steps or --online-steps"),
        (args.online_steps % args.horizon, "--online-steps must be a multiple of --horizon"),
        (not 0 < len(modes) == len(set(modes)),
         "--eval-modes needs at least one mode, and each only once"),
        (args.sparse and not task.dataset,
         f"--sparse is for OGBench's rewards, not for {task.name}; use --sparse False"),
    ):  # fmt: skip
        need(not wrong, remedy)
    unset = vars(Args()) | table
    for needed, given, names in (
        ("--actor flowmap", not flow, jumps),
        ("--online-objective mvp", objective == "mvp", ("mvp_target",)),
        ("--online-objective fmq", objective == "fmq", GUIDANCE),
        ("--adaptive-eta", args.adaptive_eta, ("beta",)),
        ("--eval-modes qgbs", "qgbs" in modes, SEARCH),
    ):  # fmt: skip
        idle = [n for n in names if getattr(args, n) != unset[n] and not (given or args.evaluate)]
        if idle:
            flag = "--" + idle[0].replace("_", "-")
            raise UserError(f"{flag} has no effect without {needed}; drop it or add that")
    return args


# endregion


if __name__ == "__main__":
    sys.exit(command_line(main, Args))
