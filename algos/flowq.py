"""FlowQ: a flow policy trained towards pi_beta(a|s) exp(lambda Q(s, a)), offline.

Paper: "FlowQ: Energy-Guided Flow Policies for Offline Reinforcement Learning", arXiv 2505.14139.
Its velocity formula, algorithm box, hyperparameters and score tables were not available to us in
readable form.  The paper's are the target policy, a Gaussian guided path, the schedules t, t^2,
t^2/(1-t) and a learned one, and the claims about cost.  That the density at time t is p_t
exp(lambda(t) Q) we know from a third party's review alone; the losses below are our reconstruction,
and no default here is "the paper's setting".

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

c(t) says how much of the energy's slope the velocity takes up along the path, if the density at
time t shall be p_t exp(lambda h(t) Q); all of these forms are ours:

  form                c(t) in general          h = t           t^2             t^2/(1-t)
  score (S, default)  h (1-t)/t                1-t             t(1-t)          t
  drop-time (T)       h (1-t)                  t(1-t)          t^2(1-t)        t^2
  field (Gb)          h' (1-t)^2 - h (1-t)     (1-t)(1-2t)     t(1-t)(2-3t)    2t(1-t)
  posterior           (1-t)/t, and g the slope in x_t of Q' at clip(x_t + (1-t) u_base(s, x_t, t))
  weighted            0: L_policy = sum_i w_i mean (u(s_i, x_i, t_i) - (a_i - e_i))^2 instead, with
                      w_i ~ exp(min(lambda (Q'(s_i, a_i) - V(s_i)) / mean |Q'|, 5)), sum_i w_i = 1

S puts the score of the guided density into v = x/t + (1-t)/t score; T puts the guided mean into the
velocity of the Gaussian path and drops its time derivative; Gb keeps that and holds g fixed.  The
exact velocity of the guided path, every row weighted alike, cancels the guidance (see the tests),
so the paper must do something else.  Only weighted (as QIPO, ICLR 2025) samples the exact posterior
of a state; where lambda is large few rows bear the weight (train/row_share).
`python benchmark/flowq_toy.py` shows how far S, T and Gb are from it.

  learned h     c(t) = (1-t) r(t),  r = softplus(net(t)) / softplus(net(1)),  r = 1 at the start
                minimise sum_i w_i |a_i - e_i - u_base(s_i, x_i, t_i) - lambda c(t_i) g_i|^2 / A,
                lambda c g clipped as w; u_base: flow matching; V: regression on Q' (iql: its V)

One update is one Adam step for each net (their parameters are disjoint), then Q' <- tau Q +
(1 - tau) Q' and u_EMA <- 0.999 u_EMA + 0.001 u.  No sample of the policy enters L_policy, so its
cost does not grow with K; that of the td critic does.  lambda = 0 is flow matching, bit for bit.

Open in the paper, and what we took
  1. Velocity form and schedule: score and t, which lets go of the critic as t -> 1.
  2. Where grad Q is taken: the noisy action, clipped to the box (the gradient passes the clip
     unchanged); by flag its mean t a, the data action, or where the unguided velocity leads
     (denoised, as QGF, arXiv 2606.11087).
  3. Which Q, and its scale: mean of the two target critics over the batch mean of |Q|, as in
     Diffusion Actor-Critic.  That undoes a factor on the rewards but not an offset.
  4. lambda: nothing is published for OGBench.  Our pilot on the point maze says 30 or more; 30 is
     the start of a sweep elsewhere.
  5. Critic: td with sampled actions, as in Diffusion-QL; iql needs none.  K = 10, N = 50, argmax;
     N = 1 always beside it, because with N = 50 plain flow matching scores as well.
  6. Networks, learning rate, discount and target aggregation: FQL's on OGBench.
  7. EMA, how h is learned, and V in place of the log-normaliser in its weights: ours.  The path
     ends in the data point itself (no sigma_min); the last checkpoint is reported.

Modes
  python algos/flowq.py                                   pointmaze-medium, a few minutes
  python algos/flowq.py --guidance-lambda 0               the same without guidance
  python algos/flowq.py --env-id cube-single              full-size networks, for a GPU
  python algos/flowq.py --evaluate runs/RUN               load a checkpoint and evaluate it
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

ALGO = "flowq"
Values = float | tuple[float, ...]  # several: a grid, whose combinations train in one program


@dataclasses.dataclass(frozen=True)
class Args:
    online_steps, start_from = 0, None  # no fields, no flags: this method has no online phase

    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id, a short name (antmaze-large, cube-double-task3), a Gymnasium
    id (with --dataset), or FILE.py:NAME, a task file"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds (seed, seed+1, ...) in one vmapped program; of a grid: of each arm
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None  # run directory: evaluate its last checkpoint, train nothing
    video: bool = False  # with --evaluate: also record episodes (see benchmark/see.py)
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
    matmul_precision: Literal["default", "high", "highest"] = "default"  # of float32 matmuls

    # ---- environment and data ----
    env_backend: Literal["auto", "jax", "host"] = "auto"
    """jax: vmapped environment inside the program (point mazes); host: the official environment
    through gymnasium.vector; auto: jax where it exists, else host"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset: str | None = None  # transitions of your own: FILE.npz or FILE.hdf5 (see README)
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    normalize_obs: bool | None = None  # standardise observations, by the data (full-size runs: no)
    reward_transform: Literal[
        "none", "antmaze-cql", "antmaze-iql", "standardize", "return-range"
    ] = "none"
    """r, 4(r - 0.5), r - 1, (r - mean)/std, 1000 r/(range of returns); each needs its own lambda"""
    dataset_action_clip: float = 1e-5  # dataset actions are kept this far inside the box

    # ---- schedule ----
    offline_steps: int | None = None  # gradient steps
    log_interval: Annotated[int | None, tyro.conf.arg(aliases=["--updates-per-dispatch"])] = None
    """log the metrics' mean over this many steps"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end
    eval_episodes: int | None = None  # episodes per evaluation, seed and number of candidates
    eval_background: bool = True  # within a phase, simulators evaluate while training goes on
    eval_all_modes: bool = False  # all modes within a phase too, not just the first
    checkpoint_interval: int | None = None  # checkpoint every this many steps and at the end

    # ---- optimisation ----
    batch_size: int | None = None  # rows per gradient step
    learning_rate: Values | None = None  # Adam's step size
    actor_learning_rate: Values | None = None  # of the velocity nets, unless as the others'
    lr_decay: bool | None = None  # cosine decay to 0 over --offline-steps, which then cannot change
    grad_norm_clip: float = 0.0  # largest gradient norm of each network; 0: no limit
    tau: Values | None = None  # target critic: fraction of the new critic in each step
    ema_decay: Values = 0.999  # averaged policy, which acts and makes TD targets: share kept
    gamma: float | None = None  # discount
    n_step: int | None = None  # n-step TD targets, to success or episode end (full-size runs: 1)
    hidden_dims: tuple[int, ...] | None = None  # widths of all nets that the next two leave open
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of critic and value net
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of the velocity nets
    critic_layer_norm: bool = True  # LayerNorm after each activation of critic and value net
    activation: Literal["gelu", "mish"] = "gelu"  # of all networks (Diffusion-QL: mish)
    time_embedding: Literal["raw", "sinusoid"] = "raw"  # t, or Diffusion-QL's sinusoids of 1000 t

    # ---- algorithm ----
    guidance_lambda: Values | None = None  # lambda, weight of the energy; 0: flow matching alone
    guidance_warmup: int = 0  # updates over which lambda rises from 0: at first |Q| is no scale
    velocity_form: Literal["score", "drop-time", "field", "posterior", "weighted"] = "score"
    """how the guided density becomes a velocity: see the table at the top"""
    schedule: Literal["t", "t2", "t2_over_1mt", "learned"] = "t"  # h(t); learned: for score only
    schedule_warmup: int | None = None  # updates for which the learned schedule stays h(t) = t
    grad_at: Literal["noisy", "mean", "data", "denoised"] = "noisy"
    """action at which grad Q is taken: x_t, t a, a, or x_t carried to t = 1 without guidance"""
    guidance_q: Literal["mean", "min"] = "mean"  # how guidance and scale join both target critics
    q_norm: Literal["mean-abs", "none"] | None = None  # scale of Q: batch mean of |Q| at data, or 1
    guidance_clip: float | None = None  # largest length of a row's guidance; 0: no limit
    critic: Literal["td", "iql", "exact"] | None = None
    """td: targets with sampled actions; iql: expectile value net; exact: a task file's known Q"""
    expectile: Values | None = None  # of the value net of --critic iql
    q_agg: Literal["mean", "min"] | None = None  # how --critic td joins both target critics
    max_backup_samples: int = 1  # M, actions per next state, the best by each target critic counts
    flow_steps: int | None = None  # K, Euler steps from noise to action
    eval_candidates: int | None = None  # N: evaluate also with one of N actions by target critics
    eval_choice: Literal["argmax", "softmax"] = "argmax"  # the best, or by exp(Q) (Diffusion-QL)


# What a task sets when no flag does; the first matching prefix wins, "" is the rest. Sources:
# [fql] FQL's published settings, [dql] Diffusion-QL's, [ours] chosen here.
DEFAULTS = dict(
    offline_steps=1_000_000, log_interval=500, eval_interval=100_000, eval_episodes=50,
    batch_size=256, hidden_dims=(512, 512, 512, 512), learning_rate=3e-4, tau=0.005, gamma=0.99,
    n_step=1, normalize_obs=False, q_agg="mean", flow_steps=10,  # [fql], with the line before
    eval_candidates=50, critic="td", lr_decay=False,  # [dql]
    guidance_lambda=30.0, q_norm="mean-abs", guidance_clip=5.0, schedule_warmup=10_000,
    expectile=0.9, checkpoint_interval=100_000,  # [ours], with the line before
)  # fmt: skip
TASK_DEFAULTS = {
    "pointmaze": dict(  # [ours] minutes on two CPU cores
        offline_steps=10_000, eval_interval=5_000, checkpoint_interval=5_000, learning_rate=1e-3,
        hidden_dims=(128, 128, 128), tau=0.01, n_step=10, normalize_obs=True, guidance_lambda=100.0,
        schedule_warmup=3_000,
    ),
    "antmaze-giant": dict(gamma=0.995, q_agg="min"),  # [fql]
    "antmaze-large": dict(q_agg="min"),  # [fql]
    "humanoidmaze": dict(gamma=0.995),  # [fql]
    "antsoccer": dict(gamma=0.995),  # [fql]
    "": {},
}  # fmt: skip


# ---- networks ----
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
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        members = nn.vmap(MLP, **axes, axis_size=2)
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

    act_dim: int  # A
    action_limit: float  # actions are clipped to +- this
    critic: Callable  # (params, obs, action) -> (2, B)
    velocity: Callable  # (params, obs, x_t, t (B, 1)) -> (B, A)
    value: Callable | None = None  # (params, obs) -> (B,)
    base: Callable | None = None  # as velocity
    schedule: Callable | None = None  # (params, t (B, 1)) -> r(t) (B, 1)


def make_modules(args, act_dim):
    """Flax modules of the settings in `args`; only those that these settings train."""
    activation = nn.gelu if args.activation == "gelu" else jax.nn.mish  # gelu: the tanh form
    velocity = Velocity(args.actor_hidden_dims, act_dim, activation, args.time_embedding)
    critic = (args.critic_hidden_dims, activation, args.critic_layer_norm)
    modules = dict(velocity=velocity)
    if args.critic != "exact":
        modules["critic"] = Critic(*critic)
    learned, form = args.schedule == "learned", args.velocity_form
    if args.critic == "iql" or (args.critic == "td" and (learned or form == "weighted")):
        modules["value"] = Value(*critic)
    if learned or form == "posterior" or args.grad_at == "denoised":
        modules["base"] = velocity
    return modules | (dict(schedule=Schedule()) if learned else {})


def make_networks(args, act_dim, task=None):
    """The modules as plain functions; the exact critic is the task's own, as two that agree."""
    task = task or parse_task(args.env_id, args.dataset_dir)
    functions = {name: module.apply for name, module in make_modules(args, act_dim).items()}
    if args.critic == "exact":
        exact = task.parts["critic"]
        functions["critic"] = lambda params, obs, a: jnp.stack([exact(obs, a)] * 2)
    return Networks(act_dim, action_limit(task), **functions)


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters, one entry per net: velocity, critic, ..."""
    obs, action, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, act_dim)), jnp.zeros((1, 1))
    inputs = dict(velocity=(obs, action, t), critic=(obs, action), value=(obs,))
    inputs |= dict(base=inputs["velocity"], schedule=(t,))
    modules = make_modules(args, act_dim)
    keys = jax.random.split(key, len(inputs))  # a net's start does not depend on the others
    keys = dict(zip(inputs, keys, strict=True))
    return {name: module.init(keys[name], *inputs[name]) for name, module in modules.items()}


# ---- the method: guidance ----
# c(t) for each form and h(t). Products, never h(t) times (1-t)/t: those factors overflow at the
# ends of the path, their product does not.
GUIDANCE = {
    "score": {"t": lambda t: 1 - t, "t2": lambda t: t * (1 - t), "t2_over_1mt": lambda t: t},
    "drop-time": {"t": lambda t: t * (1 - t), "t2": lambda t: t**2 * (1 - t),
                  "t2_over_1mt": lambda t: t**2},
    "field": {"t": lambda t: (1 - t) * (1 - 2 * t), "t2": lambda t: t * (1 - t) * (2 - 3 * t),
              "t2_over_1mt": lambda t: 2 * t * (1 - t)},
    "posterior": {"t": lambda t: (1 - t) / jnp.maximum(t, 0.05)},  # has no h
}  # fmt: skip


def guidance_weight(params, t, nets, args):
    """c(t)."""
    if args.schedule == "learned":
        return (1 - t) * nets.schedule(params["schedule"], t)
    return GUIDANCE[args.velocity_form][args.schedule](t)


def aggregate(q, how):
    """Join the two critics' values: (2, ...) -> (...)."""
    return q.min(axis=0) if how == "min" else q.mean(axis=0)


def path_point(batch, eps, t):
    """x_t on the straight path from noise to the data action."""
    return t * batch["actions"] + (1 - t) * eps


def energy_slope(state, batch, eps, t, nets, args):
    """grad Q / scale where --grad-at says (B, A); Q at the data actions (B,); the scale."""
    obs, a, x = batch["obs"], batch["actions"], path_point(batch, eps, t)
    y = {"mean": t * a, "data": a}.get(args.grad_at, x)
    if args.grad_at == "denoised" or args.velocity_form == "posterior":
        unguided = lambda x: x + (1 - t) * nets.base(state.params["base"], obs, x, t)
        y, pull_back = jax.vjp(unguided, x)
    limit = nets.action_limit
    q = lambda a: aggregate(nets.critic(state.target_critic, obs, a), args.guidance_q)
    # the slope at the clipped action, not the slope of the clip: outside the box that would be 0
    slope = jax.grad(lambda y: q(y).sum())(jnp.clip(y, -limit, limit))
    if args.velocity_form == "posterior":
        (slope,) = pull_back(slope)
    data_q = q(a)
    scale = jnp.abs(data_q).mean() + 1e-6 if args.q_norm == "mean-abs" else 1.0
    return slope / scale, data_q, scale


def shorten(rows, limit):
    """Rows no longer than `limit` (0: any length), direction kept -> (rows, share shortened)."""
    if limit == 0:
        return rows, jnp.zeros(())
    length = jnp.sqrt(jnp.maximum((rows**2).sum(-1, keepdims=True), 1e-24))  # 0 has a gradient
    return rows * jnp.minimum(1, limit / length), (length > limit).mean()


def row_weights(params, batch, q, scale, settings, nets):
    """w (B,) ~ exp(lambda (Q - V) / scale), and the share of the batch that they amount to."""
    if nets.value is None:  # exact critic; right where there is one state, as in the toy
        log_weight = settings.guidance_lambda * q / scale
    else:  # V stands for the log-normaliser of each state
        advantage = q - nets.value(params["value"], batch["obs"])
        log_weight = jnp.minimum(settings.guidance_lambda * advantage / scale, 5)
    weight = jax.lax.stop_gradient(jax.nn.softmax(log_weight))
    return weight, 1 / (len(q) * (weight**2).sum())


# ---- the method: losses ----
def policy_loss(params, state, batch, eps, t, settings, nets, args):
    """Flow matching, its target pulled up the energy's slope or its rows weighted; t is (B, 1)."""
    plain, x = batch["actions"] - eps, path_point(batch, eps, t)
    slope, q, scale = energy_slope(state, batch, eps, t, nets, args)
    guidance, clipped, weight, info = jnp.zeros_like(plain), jnp.zeros(()), 1.0, {}
    if args.velocity_form == "weighted":
        weight, info["row_share"] = row_weights(params, batch, q, scale, settings, nets)
        weight = len(q) * weight[:, None]
    else:
        c = guidance_weight(params, t, nets, args)
        guidance, clipped = shorten(settings.guidance_lambda * c * slope, args.guidance_clip)
    target = jax.lax.stop_gradient(plain + guidance)  # last, so that lambda = 0 changes no bit
    velocity = nets.velocity(params["velocity"], batch["obs"], x, t)
    loss = jnp.mean(weight * (velocity - target) ** 2)

    plain_length, length = (jnp.linalg.norm(v, axis=-1) for v in (plain, guidance))
    cosine = (plain * guidance).sum(-1) / jnp.maximum(plain_length * length, 1e-12)
    info |= dict(policy_loss=loss, flow_norm=plain_length.mean(), guidance_norm=length.mean())
    info |= dict(guidance_ratio=length.mean() / plain_length.mean(), guidance_cosine=cosine.mean())
    return loss, info | dict(guidance_clipped=clipped, q_abs=jnp.abs(q).mean())


def critic_loss(params, batch, target, nets):
    """Sum of both critics' mean squared errors to the fixed target (B,)."""
    q = nets.critic(params["critic"], batch["obs"], batch["actions"])
    loss = jnp.mean((q - target) ** 2, axis=-1).sum()
    return loss, {"critic_loss": loss, "q": q.mean(), "td_target": target.mean()}


def value_loss(params, state, batch, nets, args):
    """V(s): under iql the expectile of the smaller target Q, else the mean of the guidance's Q."""
    how, expectile = ("min", args.expectile) if args.critic == "iql" else (args.guidance_q, 0.5)
    q = aggregate(nets.critic(state.target_critic, batch["obs"], batch["actions"]), how)
    error = q - nets.value(params["value"], batch["obs"])
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
    row_weight, row_share = row_weights(params, batch, q, scale, settings, nets)
    base = nets.base(params["base"], batch["obs"], path_point(batch, eps, t), t)
    residual = jax.lax.stop_gradient(batch["actions"] - eps - base)
    c = guidance_weight(params, t, nets, args)
    guidance, _ = shorten(settings.guidance_lambda * c * slope, args.guidance_clip)
    loss = (row_weight * ((residual - guidance) ** 2).mean(axis=-1)).sum()
    info = dict(schedule_loss=loss, row_share=row_share)
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
    return jnp.clip(x, -nets.action_limit, nets.action_limit)


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


def make_policy(nets, args):
    """policy(state, obs, key, candidates): of so many actions one (A,) that the target critics
    choose, for one raw observation (D,)."""

    def policy(state, obs, key, candidates):
        obs = jnp.broadcast_to((obs - state.obs_mean) / state.obs_std, (candidates, *obs.shape))
        noise = jax.random.normal(key, (candidates, nets.act_dim))
        actions = flow_endpoint(state.ema, nets, obs, noise, args)
        q = nets.critic(state.target_critic, obs, actions).min(axis=0)
        if args.eval_choice == "softmax":
            return actions[jax.random.categorical(jax.random.fold_in(key, 1), q)]
        return actions[q.argmax()]

    return policy


def evaluation_policies(nets, args):
    """Modes of evaluation, (state, obs, key) -> action: one sample, the best of several."""
    counts = sorted({1, args.eval_candidates})
    return {f"n{n}": functools.partial(make_policy(nets, args), candidates=n) for n in counts}


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
    arm: Any = None  # of a grid: which of a flag's values are this member's


class Settings(NamedTuple):
    """Traced scalars, so that another lambda recompiles nothing and several can be vmapped."""

    guidance_lambda: jax.Array


def optimizer(args, name):
    """Adam for one net, with clipping and decay where asked for."""
    rates = dict(schedule=1e-3, velocity=args.actor_learning_rate, base=args.actor_learning_rate)
    rate = rates.get(name, args.learning_rate)
    if args.lr_decay:
        rate = optax.cosine_decay_schedule(rate, args.offline_steps)
    adam = optax.adam(rate)
    if args.grad_norm_clip:
        return optax.chain(optax.clip_by_global_norm(args.grad_norm_clip), adam)
    return adam


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    opt_state = {name: optimizer(args, name).init(p) for name, p in params.items()}
    rest = dict(obs_mean=obs_mean, obs_std=obs_std, seed=seed, step=jnp.zeros((), jnp.int32))
    return TrainState(params, params.get("critic"), params["velocity"], opt_state, **rest)


DRAWS = ("flow_noise", "flow_time", "td_noise")


def make_update(nets, args):
    """update(state, batch, key, settings) -> (state, metrics): one step of every net, then the
    target critic and the averaged policy.

    batch: obs, next_obs (B, D), actions (B, A), returns, discounts (B,).
    """

    def update(state, batch, key, settings):
        keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
        shape = batch["actions"].shape
        eps = jax.random.normal(keys["flow_noise"], shape)
        t = jax.random.uniform(keys["flow_time"], (shape[0], 1), maxval=1 - 1e-3)
        if args.guidance_warmup:
            share = jnp.minimum(1, state.step / args.guidance_warmup)
            settings = settings._replace(guidance_lambda=share * settings.guidance_lambda)
        drawn = (state, batch, eps, t, settings, nets, args)

        def total_loss(params):
            losses = [policy_loss(params, *drawn)]
            if "critic" in params:
                target = td_target(params, state, batch, keys["td_noise"], nets, args)
                losses += [critic_loss(params, batch, target, nets)]
            if "value" in params:
                losses += [value_loss(params, state, batch, nets, args)]
            if "base" in params:
                losses += [base_loss(params, batch, eps, t, nets)]
            if "schedule" in params:
                losses += [schedule_loss(params, *drawn)]
            info = functools.reduce(lambda a, b: a | b, (info for _, info in losses))
            return sum(loss for loss, _ in losses), info

        grads, info = jax.grad(total_loss, has_aux=True)(state.params)
        params, opt_state = {}, {}
        for name, old in state.params.items():
            moments = state.opt_state[name]
            step, opt_state[name] = optimizer(args, name).update(grads[name], moments, old)
            params[name] = optax.apply_updates(old, step)
        if "schedule" in params:  # waits until base flow and value net mean something
            keep = lambda old, new: jnp.where(state.step < args.schedule_warmup, old, new)
            for new, old in ((params, state.params), (opt_state, state.opt_state)):
                new["schedule"] = jax.tree.map(keep, old["schedule"], new["schedule"])
        target_critic = state.target_critic
        if "critic" in params:
            target_critic = optax.incremental_update(params["critic"], target_critic, args.tau)
        ema = optax.incremental_update(params["velocity"], state.ema, 1 - args.ema_decay)
        changes = dict(params=params, target_critic=target_critic, ema=ema, opt_state=opt_state)
        return state.replace(**changes, step=state.step + 1), info

    return update


# ---- training ----
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of members, which a
# program's steps do not see: state, a TrainState, and sums, the metrics since the last log.
def make_learn(nets, args):
    """learn(carry, data, settings) -> carry: sample a batch and update once."""
    update = make_update(nets, args)

    def learn(carry, data, settings):
        state = carry["state"]
        batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
        index = jax.random.randint(batch_key, (args.batch_size,), 0, len(data["obs"]))
        batch = {k: v[index] for k, v in data.items()}
        for name in ("obs", "next_obs"):
            batch[name] = (batch[name] - state.obs_mean) / state.obs_std
        state, metrics = update(state, batch, update_key, settings)
        return carry | {"state": state, "sums": add_sums(carry["sums"], metrics)}

    return learn


def train(args, task):
    """Train offline, from the start or from the checkpoint of --resume."""
    env = make_jax_env(task, args)
    raw, source = load_dataset(task, args)
    data = place(prepare(raw, args, task), len(members(args)), copy=True)
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    nets = make_networks(args, act_dim, task)

    learn = per_arm(make_learn, nets, args)
    inputs = (data, Settings(jnp.float32(args.guidance_lambda)))
    phases = [Phase("offline", 0, args.offline_steps, Program(learn, *inputs))]
    state = start_states(args, obs_dim, act_dim, *observation_scale(data, args))
    carry = dict(state=state, sums=zero_sums(learn, {"state": state}, *inputs))
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


# ==== shared: n-step targets ====
def n_step_targets(rows, index, newest, n, gamma, stride=1):
    """n-step return, bootstrap factor and last row of the windows that start at `index` (M,).

    R = sum_{k<n} gamma^k r_k; a window stops at success (mask 0), at an episode's end and at the
    `newest` row of a ring. `rows` holds rewards, masks, terminals (C,); consecutive rows of an
    episode lie `stride` apart. The target is R + discount * Q(next_obs[last]).
    """
    returns, discounts = jnp.zeros(index.shape), jnp.ones(index.shape)
    alive, last, size = jnp.ones(index.shape, bool), index, len(rows["rewards"])
    for k in range(n):
        row = (index + k * stride) % size
        returns += jnp.where(alive, discounts * rows["rewards"][row], 0.0)
        discounts = jnp.where(alive, discounts * gamma * rows["masks"][row], discounts)
        last = jnp.where(alive, row, last)
        ends = (rows["masks"][row] == 0) | (rows["terminals"][row] > 0)
        alive &= ~ends & (row // stride != newest // stride)
    return returns, discounts, last


def device_data(data, n, gamma):
    """Put a dataset on the device with its n-step targets worked out once."""
    rows, size = device_rows(data), len(data["rewards"])
    targets = jax.jit(lambda rows, i: n_step_targets(rows, i, size - 1, n, gamma))
    returns, discounts, last = targets(rows, jnp.arange(size))
    data = dict(obs=rows["obs"], actions=rows["actions"], next_obs=rows["next_obs"][last])
    return data | dict(returns=returns, discounts=discounts)


# ==== end shared: n-step targets ====


# ---- this script's data ----
def action_limit(task):
    """1, or infinity where the task's environment has no box: the toy's modes stand on its edge."""
    env = task.parts.get("env")
    return 1.0 if env is None or np.isfinite(env.action_space.high).all() else np.inf


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
        if not np.ptp(returns):
            raise UserError(
                f"--reward-transform return-range divides by the range of the episodes' returns, "
                f"but all of them are {returns[0]:g} here; choose another one"
            )
        return 1000 * rewards / np.ptp(returns)
    return rewards


def prepare(raw, args, task):
    """The dataset on the device, with its n-step targets: see `device_data`."""
    rewards = transform_rewards(raw, args.reward_transform)
    data = device_data(raw | {"rewards": rewards}, args.n_step, args.gamma)
    limit = action_limit(task) - args.dataset_action_clip
    return data | {"actions": jnp.asarray(np.clip(raw["actions"], -limit, limit), jnp.float32)}


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
FREE_ALSO = ()  # flags that may still change when a run is resumed
EVALUATION_FLAGS = ("eval_candidates", "eval_choice", "flow_steps")  # may change with --evaluate


@each_arm
def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    given, args = args, fill(args, **task_table(task, DEFAULTS))
    args = fill(args, critic_hidden_dims=args.hidden_dims, actor_hidden_dims=args.hidden_dims)
    args = fill(args, actor_learning_rate=args.learning_rate)
    check_numbers(args, zero=("schedule_warmup", "guidance_warmup"))
    learns, learned = args.critic != "exact", args.schedule == "learned"
    begun = read_args(args.resume, [], Args()) if args.resume else args
    layers = "needs layers of at least one unit"
    for wrong, remedy in (
        (min(args.critic_hidden_dims, default=0) < 1, f"--critic-hidden-dims {layers}"),
        (min(args.actor_hidden_dims, default=0) < 1, f"--actor-hidden-dims {layers}"),
        (not args.ema_decay < 1, "--ema-decay must be below 1"),
        (not args.expectile < 1, "--expectile must be below 1"),
        (not args.dataset_action_clip < 1, "--dataset-action-clip must be below 1"),
        (args.offline_steps == 0, "nothing to train: give --offline-steps"),
        (not learns and "critic" not in task.parts,
         "--critic exact needs a task file that knows its Q; drop --critic"),
        (learned and args.velocity_form != "score",
         "--schedule learned needs --velocity-form score"),
        (learned and args.guidance_lambda == 0,
         "--schedule learned needs --guidance-lambda above 0: nothing is guided"),
        (args.lr_decay and begun.offline_steps != args.offline_steps,
         f"--lr-decay ends at --offline-steps, {begun.offline_steps} in {args.resume}, which "
         "cannot change; start a new run"),
    ):  # fmt: skip
        need(not wrong, remedy)
    for needed, fulfilled, names in (
        ("--critic td, the only one that samples actions", args.critic == "td",
         ("q_agg", "max_backup_samples")),
        ("--critic iql", args.critic == "iql", ("expectile",)),
        ("--schedule learned", learned, ("schedule_warmup",)),
        ("--velocity-form score, drop-time or field",
         args.velocity_form not in ("posterior", "weighted"), ("schedule", "grad_at")),
        ("a form with the slope of Q", args.velocity_form != "weighted", ("guidance_clip",)),
        ("--eval-candidates above 1", args.eval_candidates > 1, ("eval_choice",)),
        ("a critic that learns, --critic td or iql", learns,
         ("reward_transform", "gamma", "n_step", "tau", "guidance_q", "critic_hidden_dims",
          "critic_layer_norm")),
    ):  # fmt: skip
        idle = [n for n in names if not fulfilled and getattr(given, n) != getattr(Args, n)]
        if idle and not (args.resume or args.evaluate):  # there, no flag is new
            raise UserError(f"--{idle[0].replace('_', '-')} needs {needed}; drop it")
    return args


# endregion


if __name__ == "__main__":
    sys.exit(command_line(main, Args))
