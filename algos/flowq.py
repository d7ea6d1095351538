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
                minimise sum_i w_i |a_i - e_i - u_base(s_i, x_i, t_i) - lambda c(t_i) g_i|^2 / A
                u_base: plain flow matching; V: mean squared error to Q' (critic iql: its V)

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
from typing import Annotated, Any, Literal, NamedTuple

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


@dataclasses.dataclass(frozen=True)
class Args:
    online_steps = 0  # no field, no flag: this method has no online phase

    # ---- experiment ----
    env_id: str = "pointmaze-medium"
    """task: an OGBench single-task id, a short name (antmaze-large, cube-double-task3), a Gymnasium
    id (with --dataset), or FILE.py:NAME, a task file"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # train this many seeds (seed, seed+1, ...) in one vmapped program
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None
    """run directory: load its checkpoint, evaluate, print a table, train nothing"""
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """float32 matmuls: JAX's default (TF32 on recent GPUs), high or highest"""

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
    checkpoint_interval: int | None = None  # checkpoint every this many steps and at the end

    # ---- optimisation ----
    batch_size: int | None = None  # rows per gradient step
    learning_rate: float | None = None  # Adam's step size
    actor_learning_rate: float | None = None  # of the velocity nets, unless as the others'
    lr_decay: bool | None = None  # cosine decay to 0 over --offline-steps, which then cannot change
    grad_norm_clip: float = 0.0  # largest gradient norm of each network; 0: no limit
    tau: float | None = None  # target critic: fraction of the new critic in each step
    ema_decay: float = 0.999  # averaged policy, which acts and makes TD targets: share kept
    gamma: float | None = None  # discount
    n_step: int | None = None  # n-step TD targets, to success or episode end (full-size runs: 1)
    hidden_dims: tuple[int, ...] | None = None  # widths of all nets that the next two leave open
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of critic and value net
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of the velocity nets
    critic_layer_norm: bool = True  # LayerNorm after each activation of critic and value net
    activation: Literal["gelu", "mish"] = "gelu"  # of all networks (Diffusion-QL: mish)
    time_embedding: Literal["raw", "sinusoid"] = "raw"  # t, or Diffusion-QL's sinusoids of 1000 t

    # ---- algorithm ----
    guidance_lambda: float | None = None  # lambda, weight of the energy; 0: flow matching alone
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
    expectile: float | None = None  # of the value net of --critic iql
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
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows * jnp.minimum(1, limit / jnp.maximum(length, 1e-12)), (length > limit).mean()


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
    guidance = settings.guidance_lambda * guidance_weight(params, t, nets, args) * slope
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
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of seeds, which a
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
        return carry | {"state": state, "sums": add_sums(carry.get("sums"), metrics)}

    return learn


def train(args, task):
    """Train offline, from the start or from the checkpoint of --resume."""
    env = make_jax_env(task, args)
    raw, source = load_dataset(task, args)
    data = place(prepare(raw, args, task), args.num_seeds, copy=True)
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    nets = make_networks(args, act_dim, task)

    learn = make_learn(nets, args)
    inputs = (data, Settings(jnp.float32(args.guidance_lambda)))
    phases = [Phase("offline", 0, args.offline_steps, Program(learn, *inputs))]

    state = start_states(args, obs_dim, act_dim, *observation_scale(data, args))
    carry = dict(state=state, sums=zero_sums(learn, {"state": state}, *inputs))
    carry, step = resume(carry, phases, args)
    policies = evaluation_policies(nets, args)
    run = Run(args, task, source, raw, policies, step)
    evaluate = make_evaluate(task, env, policies, args)
    run.finish(train_loop(run, carry, phases, evaluate, nets))


# ==== shared: training loop ====
def train_loop(run, carry, phases, evaluate, nets):
    """Run the phases dispatch by dispatch, each about a second, so that the bar moves and Ctrl-C is
    heard; what is computed and logged does not depend on how long they are. Between dispatches log,
    evaluate and save. Returns the last evaluation."""
    if run.step >= phases[-1].end:  # stopped between its last checkpoint and result.json
        return evaluate(carry["state"], run.step)
    for phase in (p for p in phases if run.step < p.end):
        if run.step == phase.start:
            carry = phase.enter(carry)
        run.begin(phase)
        while run.step < phase.end:
            n, start = run.iterations(), time.perf_counter()
            carry = phase.advance(carry, n)
            sums = jax.device_get(carry["sums"])
            run.note(n, sums, time.perf_counter() - start)
            log, evaluation, save = run.due()
            if log or evaluation:
                values = run.averages(sums, carry)
                zeros = jax.tree.map(jnp.zeros_like, carry["sums"])
                carry = carry | {"sums": place(zeros, len(run.seeds))}
            if evaluation:
                results = evaluate(carry["state"], run.step)
                values |= run.note_evaluation(results)
            if log or evaluation:
                run.log(values)
            stopping = run.stop.number is not None and run.step < phases[-1].end
            if save or stopping:
                carry = phase.restart(carry) if phase.restart else carry
                run.save(carry)
            if stopping:
                run.leave()
        run.end_phase(nets, carry["state"])
    return results


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
import importlib.metadata
import importlib.util
import json
import multiprocessing
import shlex
import shutil
import signal
import socket
import subprocess
import textwrap
import zlib
from types import MappingProxyType

from gymnasium.experimental.functional import FuncEnv
from tqdm import tqdm

# ==== end shared: imports ====


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

    @property
    def official(self):
        """Whether there is an environment for gymnasium.vector."""
        return bool(self.gym_id or "make_env" in self.parts)


def parse_task(env_id, dataset_dir="~/.ogbench/data"):
    """OGBench single-task id or short name, Gymnasium id, or FILE.py:NAME -> Task."""
    suite, _, name = env_id.partition("/")
    path, _, file_name = env_id.rpartition(":")
    if suite in TASK_FILES:
        short = f"{suite.replace('-', '_')}.py"
        path = Path(__file__).resolve().parent.parent / "benchmark" / "tasks" / short
        if not path.is_file():
            raise UserError(
                f"{env_id} needs benchmark/tasks/{short} of the CleanFlow repository: copy that "
                f"file and give --env-id {short}:{name or env_id}"
            )
        return load_task(env_id, path, name or env_id, dataset_dir)
    if path.endswith(".py"):
        return load_task(f"{Path(path).stem}/{file_name}", Path(path), file_name, dataset_dir)
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
    if env_id in tasks:
        return tasks[env_id]
    if env_id in gymnasium.registry or env_id in JAX_ENVS:
        return Task(env_id, env_id, "" if env_id in JAX_ENVS else env_id, success=False)
    names = [*tasks, *JAX_ENVS, *gymnasium.registry]
    close = difflib.get_close_matches(env_id, names, n=3, cutoff=0.3)
    raise UserError(f"unknown task '{env_id}'; close matches: {', '.join(close) or 'none'}")


def load_file(path):
    """Import a Python file by its path; its own imports must be installed packages."""
    try:
        spec = importlib.util.spec_from_file_location(f"cleanflow_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError) as e:
        raise UserError(f"cannot load {path}: {e}") from e
    return module


def ask(function, *inputs):
    """Call a function of a task file; what it raises for the user becomes one sentence."""
    try:
        return function(*inputs)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(" ".join(str(e).split())) from e


def load_task(task_name, path, name, dataset_dir):
    """make_task(name, dataset_dir) of a task file -> Task; see README for what it returns."""
    make_task = getattr(load_file(path), "make_task", None)
    if make_task is None:
        raise UserError(f"{path} has no function make_task(name, dataset_dir); see README")
    parts = ask(make_task, name, dataset_dir)
    if not isinstance(parts, dict) or not {"env", "make_env"} & set(parts):
        raise UserError(f"make_task of {path} must return a dict with 'env' or 'make_env'")
    known = ("env", "make_env", "data", "success", "score", "defaults", "critic", "after_phase")
    if unknown := sorted(set(parts) - set(known)):
        raise UserError(f"make_task of {path} returns '{unknown[0]}', but may return {known}")
    lacks = [m for m in ("initial", "transition", "max_episode_steps") if "env" in parts
             and not hasattr(parts["env"], m)]  # fmt: skip
    if lacks:
        raise UserError(f"the environment 'env' of {path} lacks '{lacks[0]}'; see README")
    source = (str(Path(path).resolve()), name, dataset_dir)
    success = parts.get("success", True)
    return Task(task_name, task_name, success=success, source=source, parts=parts)


def make_jax_env(task, args):
    """The task's environment as pure functions, or None where only the official one exists."""
    maze, backend = task.base.removeprefix("pointmaze-"), args.env_backend
    if backend == "mjx" and task.gym_id:
        path = Path(__file__).resolve().parent.parent / "benchmark" / "tasks" / "mjx.py"
        if not path.is_file():
            raise UserError(f"--env-backend mjx needs {path.name} of the CleanFlow repository")
        return ask(load_file(path).make_env, task.gym_id, args.success_timing)
    if backend in ("auto", "jax") and task.parts.get("env"):
        return task.parts["env"]
    if backend in ("auto", "jax") and task.base in JAX_ENVS:
        return JAX_ENVS[task.base]()
    if backend in ("auto", "jax") and task.base != maze and maze in MAZES:
        return PointMaze(maze, task.index, args.success_timing)
    if backend in ("jax", "mjx") or not task.official:
        raise UserError(f"{task.name} has no {backend} environment; drop --env-backend")
    return None


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
        done.any(), lambda: reset_envs(env, reset_keys[0], t.shape[0]), lambda: (next_states, t)
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


def make_host_env(task, success_timing):
    """The official environment (or a task file's); in a worker process Ctrl-C is left to the main
    process."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's spaces set off warnings
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if task.source:  # loaded here again: a worker cannot import what the main process loaded
        path, name, dataset_dir = task.source
        return SeededReset(ask(load_file(path).make_task(name, dataset_dir)["make_env"]))
    import ogbench  # noqa: F401  registers the environments

    options = dict(success_timing=success_timing) if task.dataset else {}
    return SeededReset(gymnasium.make(task.gym_id, **options))


def make_host_envs(task, args, num_envs, autoreset):
    """`num_envs` official environments in processes of their own."""
    make = functools.partial(make_host_env, task._replace(parts={}), args.success_timing)
    return gymnasium.vector.AsyncVectorEnv(
        [make] * num_envs,
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
AUTO_COLLECT = 200_000  # transitions collected when a download fails
ACTION_LIMIT = 1 - 1e-5  # dataset actions are kept just inside the box


def load_dataset(task, args):
    """Transitions of a task -> (dict of arrays, source).

    Keys: observations, next_observations (N, D), actions (N, A), rewards, masks (0 after success),
    terminals (1 at an episode's last row), each (N,). From --dataset, from the task file, or from
    `dataset_dir`: an official or a collected file, else a download, else data collected here.
    """
    if args.dataset:
        raw, source = read_file(Path(args.dataset).expanduser()), f"own ({Path(args.dataset).name})"
        if "rewards" not in raw and not task.dataset:
            raise UserError(f"{args.dataset}: no 'rewards' in it")
    elif "data" in task.parts:
        raw, source = ask(task.parts["data"])
    elif task.dataset:
        raw, source = ogbench_file(task, Path(args.dataset_dir).expanduser())
    else:
        raise UserError(f"{task.name} comes without data: give --dataset FILE.npz")
    data = transitions(raw) if "next_observations" not in raw else dict(raw)
    maze = task.base.removeprefix("pointmaze-")
    if task.base != maze and maze in MAZES:
        env = PointMaze(maze, task.index)
    else:
        env = task.parts.get("env") or make_host_env(task, args.success_timing)
    if "rewards" not in raw:
        relabel(task, env, data)
    data = {k: np.asarray(v, np.float32) for k, v in data.items()}
    boxed = np.isfinite(env.action_space.high).all()
    check_transitions(data, args.dataset or source, boxed)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    if sizes != (data["observations"].shape[1], data["actions"].shape[1]):
        raise UserError(
            f"the dataset belongs to another environment: {task.name} has observations and actions "
            f"of {sizes[0]} and {sizes[1]} entries; put the right {task.dataset}.npz in place"
        )
    if hasattr(env, "close"):
        env.close()
    return data, source


def ogbench_file(task, directory):
    """Raw arrays of an OGBench dataset -> (dict, source)."""
    official = directory / f"{task.dataset}.npz"
    collected = directory / f"{task.dataset}.collected.npz"
    maze = task.base.removeprefix("pointmaze-")
    if not official.exists() and not collected.exists():
        if task.base != maze and maze in MAZES:  # quicker than any download
            kind = task.dataset.removeprefix(f"{task.base}-").removesuffix("-v0")
            data = collect_pointmaze(maze, AUTO_COLLECT, dataset_type=kind)
            return data, f"collected ({AUTO_COLLECT:,} transitions, in this script)"
        if not download(task.dataset, directory):
            collect(task.dataset, directory)
    if official.exists():
        return read_file(official), "official"
    return read_file(collected), f"collected ({collected.name})"


def transitions(raw):
    """Rows with their successors; an episode's last row has none and is dropped."""
    keep = np.flatnonzero(~raw["terminals"].astype(bool))
    data = {k: v[keep] for k, v in raw.items() if len(v) == len(raw["terminals"])}
    data["next_observations"] = raw["observations"][keep + 1]
    data["terminals"] = raw["terminals"][keep + 1]
    return data


def relabel(task, env, data):
    """Rewards and masks of the task, from the simulator's positions, as OGBench computes them."""
    if isinstance(env, PointMaze):  # the same, without its simulator
        distance = np.linalg.norm(data["qpos"] - env.goal_xy, axis=-1)
        data["masks"] = (distance > env.goal_tol).astype(np.float32)
        data["rewards"] = -data["masks"]
    else:
        from ogbench.relabel_utils import relabel_dataset

        relabel_dataset(task.gym_id, env, data)


def read_file(path):
    """Read and check a dataset, FILE.npz or FILE.hdf5: observations (N, D), actions (N, A),
    terminals (N,) in OGBench's layout, or transitions, with rewards, masks, next_observations."""
    try:
        if path.suffix in (".hdf5", ".h5"):
            import h5py

            with h5py.File(path) as file:
                raw = {k: v[()] for k, v in file.items() if isinstance(v, h5py.Dataset)}
        else:
            with np.load(path) as file:
                raw = {k: file[k] for k in file.files if k != "metadata"}
    except ImportError as e:
        raise UserError(f"reading {path} needs h5py: pip install h5py") from e
    except Exception as e:
        raise UserError(f"cannot read {path} ({e}); delete it and start again") from e

    def bad(what):
        raise UserError(f"{path}: {what}; delete the file and download or collect it again")

    if "next_observations" in raw and "masks" not in raw and "terminals" in raw:  # D4RL's names
        raw["masks"] = 1.0 - raw["terminals"].astype(np.float32)
        raw["terminals"] = np.maximum(raw["terminals"], raw.get("timeouts", 0)).astype(np.float32)
        raw["terminals"][-1:] = 1
    needed = [("terminals", 1), ("observations", 2), ("actions", 2)]
    needed += [("qpos", 2)] * ("rewards" not in raw) + [("rewards", 1)] * ("rewards" in raw)
    for key, _ in needed:
        if key not in raw:
            bad(f"no '{key}' in it")
    for key, ndim in needed:
        if raw[key].ndim != ndim or len(raw[key]) != len(raw["terminals"]) or len(raw[key]) < 2:
            bad(f"'{key}' has shape {raw[key].shape}")
        if (
            raw[key].dtype.kind not in ("f" if ndim == 2 else "fb")
            or not np.isfinite(raw[key]).all()
        ):
            bad(f"'{key}' is not floating point, or holds NaN or infinity")
    if not raw["terminals"][-1]:
        bad("the last row does not end an episode, so the file looks cut short")
    if raw["terminals"].all():
        bad("every row ends an episode")
    return raw


def check_transitions(data, source, boxed):
    """Refuse what would train into nonsense: shapes, NaN, magnitudes."""
    keys = ("observations", "actions", "rewards", "masks", "terminals", "next_observations")
    rows = len(data.get("observations", ()))
    for key in keys:
        if key not in data or len(data[key]) != rows or rows < 2:
            raise UserError(f"the data ({source}) hold no '{key}', or not one for each row")
        if not (np.abs(data[key]) < 1e6).all():
            raise UserError(f"the data ({source}): '{key}' holds NaN or numbers beyond a million")
    if boxed and np.abs(data["actions"]).max() > 1 + 1e-5:
        raise UserError(f"the data ({source}) hold actions outside [-1, 1]")


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


# ==== shared: evaluation ====
def metric_names(task, policies):
    """What one evaluation measures, by mode of acting: score and success where the task has them,
    return, length."""
    kinds = ["score"] * ("score" in task.parts) + ["success"] * task.success + ["return", "length"]
    return [f"{kind}_{mode}".rstrip("_") for mode in policies for kind in kinds]


def summary(results):
    """Mean over seeds and episodes, with the deviation over seeds where there are several."""
    parts = []
    for name, values in results.items():
        per_seed = values.mean(axis=1)
        spread = f" ± {per_seed.std():.2f}" if len(per_seed) > 1 else ""
        parts.append(f"{name} {per_seed.mean():.2f}{spread}")
    return "  ".join(parts)


def make_evaluate(task, env, policies, args):
    """Function (state of all seeds, step) -> {metric: (num_seeds, episodes)} of one evaluation.

    `policies` maps each mode to `policy(state, obs (D,), key) -> (H * A,)`, the actions of the next
    H steps; a mode's metrics end in its name. `env` is the JAX environment or None (official).
    """
    seeds = [args.seed + i for i in range(args.num_seeds)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    slots = max(1, min(args.eval_episodes, (cores or 1) // args.num_seeds))
    env = None if args.env_backend == "mjx" else env  # reported numbers are the official engine's

    @functools.cache  # made at the first evaluation and kept
    def host_envs():
        disabled = gymnasium.vector.AutoresetMode.DISABLED
        return make_host_envs(task, args, slots * args.num_seeds, disabled)

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
            if score := task.parts.get("score"):
                result["score"] = np.vectorize(score, otypes=[float])(result["return"])
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


def evaluate_only(args, task):
    """--evaluate: rebuild the networks of a run and evaluate its last checkpoint as it did."""
    tree, facts = load_checkpoint(args.evaluate)
    env = make_jax_env(task, args)
    spaces = env or make_host_env(task, args.success_timing)
    obs_dim, act_dim = spaces.observation_space.shape[0], spaces.action_space.shape[0]
    state = start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    state = restore(state, tree["state"], args.evaluate)
    policies = evaluation_policies(make_networks(args, act_dim), args)
    results = make_evaluate(task, env, policies, args)(state, facts["step"])
    print_evaluation(task, args, policies, facts["step"], results)
    return results


# ==== end shared: evaluation ====


# ==== shared: runs ====
PURPOSES = ("init", "update", "act", "env", "eval")
MAGIC = b"CLEANFLOW1"
REMEDY = {errno.ENOSPC: "free some space", errno.EFBIG: "raise the limit on file sizes"}
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


def zero_sums(learn, carry, *inputs):
    """Sums of metrics before the first update, for all seeds; `carry` is what `learn` needs."""
    one = jax.tree.map(lambda x: x[0], carry)
    seeds = len(carry["state"].seed)
    shapes = jax.eval_shape(learn, one, *inputs)["sums"]
    return place(jax.tree.map(lambda s: jnp.zeros((seeds, *s.shape), s.dtype), shapes), seeds)


def add_sums(sums, metrics, updates=1):
    """Add one update's metrics (None: start with them); fetched once per dispatch."""
    if sums is None:
        sums = {k: jnp.zeros(()) for k in ("count", "episodes", "return", "success")}
        sums["train"] = {k: jnp.zeros(()) for k in metrics}
    train = {k: v + updates * metrics.get(k, 0.0) for k, v in sums["train"].items()}
    return sums | {"train": train, "count": sums["count"] + updates}


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
            f"cannot write {path}: {e.strerror}; {REMEDY.get(e.errno, 'mend that')}, then "
            f"--resume {shlex.quote(str(path.parent))}"
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
    raise UserError(
        f"no intact checkpoint in {run_dir}; if it is a run stopped before its first, start anew"
    )


def restore(template, tree, run_dir):
    """Put a loaded checkpoint into the structure, shapes and device layout of `template`.

    A replay's ring may have become longer, for more online steps (it then has not wrapped yet), and
    it stays as long as it was for fewer.
    """

    def lengthen(ring, longer):
        missing = max(0, longer.shape[1] - ring.shape[1])
        return np.pad(ring, [(0, 0), (0, missing), *[(0, 0)] * (ring.ndim - 2)])

    layout = jax.tree.map(lambda x: x.sharding, template)
    try:
        if "replay" in tree and "replay" in template:
            rows = jax.tree.map(lengthen, tree["replay"]["rows"], template["replay"]["rows"])
            tree["replay"]["rows"] = rows
            template = template | {"replay": template["replay"] | {"rows": rows}}
        loaded = flax.serialization.from_state_dict(template, tree)
        fits = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype, template, loaded
        )
        if not all(jax.tree.leaves(fits)):
            raise ValueError("shapes differ")
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise UserError(f"the checkpoint in {run_dir} does not fit its args.json: {e}") from e
    return jax.tree.map(jax.device_put, loaded, layout)


def start_states(args, obs_dim, act_dim, mean, std):
    """Fresh states of all seeds on the device(s)."""
    seeds = jnp.arange(args.num_seeds, dtype=jnp.int32) + args.seed
    init = jax.vmap(lambda s, m, d: init_state(args, obs_dim, act_dim, m, d, s), (0, None, None))
    return place(jax.jit(init)(seeds, mean, std), args.num_seeds)


def resume(carry, phases, args):
    """--resume: (the carry of the run's last checkpoint, its step); else the one given and 0."""
    if not args.resume:
        return carry, 0
    tree, facts = load_checkpoint(args.resume)
    step, end = facts["step"], phases[-1].end
    if step > end or (step == end and (Path(args.resume) / "result.json").exists()):
        raise UserError(
            f"{args.resume} is complete at step {step:,}: give more steps or --evaluate"
        )
    phase = next(p for p in phases if step <= p.end)  # in which the checkpoint was made
    carry = restore(phase.enter(carry), tree, args.resume)
    return (phase.restart(carry) if phase.restart else carry), step


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
    """A run directory: args.json, metrics.csv, TensorBoard events, checkpoint, result.json; and
    what the training loop asks between dispatches."""

    def __init__(self, args, task, source, data, policies, step=0):
        self.args, self.task, self.step, self.saved = args, task, step, step
        self.seeds = [args.seed + i for i in range(args.num_seeds)]
        self.evals, self.csv, self.columns, self.wandb = [], None, None, None
        self.metrics = metric_names(task, policies)  # of an evaluation; the first is the headline
        self.train_seconds, self.updates_per_s, self.stop = 0.0, 0.0, StopSignal()
        packages = ("jax", "jaxlib", "flax", "optax", "numpy", "gymnasium", "ogbench", "mujoco")
        commit, git = "", ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        if shutil.which("git"):
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        checksum = None  # of data from a file, which may be another one when the run is resumed
        if data is not None and "in this script" not in source:
            names = ("observations", "actions", "rewards")
            checksum = functools.reduce(
                lambda crc, k: zlib.crc32(np.ascontiguousarray(data[k]), crc), names, 0
            )
        self.facts = dict(
            algo=ALGO, task=task.name, dataset_source=source, dataset_crc32=checksum,
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}", commit=commit or None,
            versions={p: importlib.metadata.version(p) for p in packages},
            args=dataclasses.asdict(args),
        )  # fmt: skip
        self.resume() if args.resume else self.create()
        self.write_json("args.json", self.facts)
        self.header(data)

    def create(self):
        args, stamp = self.args, time.strftime("%Y%m%d-%H%M%S")
        name = self.task.name.removesuffix("-v0").replace("/", "-")
        self.dir = Path(args.out_dir) / f"{name}__{ALGO}__{args.seed}__{stamp}"
        try:
            while self.dir.exists():
                self.dir = self.dir.with_name(self.dir.name + "x")
            self.dir.mkdir(parents=True)
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"cannot create {self.dir}: {reason}; choose --out-dir") from e
        self.lock()

    def resume(self):
        """Keep what args.json says of the start; drop the metrics after the checkpoint."""
        self.dir = Path(self.args.resume)
        self.lock()
        before = json.loads((self.dir / "args.json").read_text())
        if before.get("dataset_crc32") != self.facts["dataset_crc32"]:
            raise UserError(
                f"{self.dir} was started on other data ({before.get('dataset_source')}): put that "
                f"file back, or start a new run"
            )
        now = {k: self.facts[k] for k in ("commit", "device", "versions")} | {"step": self.step}
        resumes = [*before.get("resumes", []), now]
        self.facts = before | {"args": self.facts["args"], "resumes": resumes}
        self.cut_metrics()

    def lock(self):
        """Two processes must not write one run."""
        self.lock_file = open(self.dir / ".lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(f"{self.dir} is in use by another process; wait for it to end") from e

    def write_json(self, name, content):
        write_file(self.dir / name, (json.dumps(content, indent=2) + "\n").encode())

    def cut_metrics(self):
        """On resume, drop the rows after the checkpoint: they will be written again."""
        path = self.dir / "metrics.csv"
        if not path.is_file() or not path.stat().st_size:
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

    def begin(self, phase):
        """A phase starts, or goes on after a resume."""
        self.phase, self.quiet = phase, not sys.stderr.isatty()
        self.bar = tqdm(
            total=phase.end, initial=self.step, desc=phase.name, unit="step", disable=self.quiet
        )
        self.rate, self.log_seconds = 8.0, 0.0
        self.compiled, self.said, self.before = (
            phase.advance.seconds,
            time.perf_counter(),
            self.step,
        )

    def iterations(self):
        """How many the next dispatch makes: about a second's, up to the next thing that is due."""
        target = min([self.phase.end] + [(self.step // m + 1) * m for m in self.intervals()])
        return max(1, min(-(-(target - self.step) // self.phase.stride), int(self.rate)))

    def intervals(self):
        return self.args.log_interval, self.args.eval_interval, self.args.checkpoint_interval

    def note(self, n, sums, seconds):
        """A dispatch of n iterations is done: time, bar or line; stop if the training diverged."""
        phase = self.phase
        compiling, self.compiled = phase.advance.seconds - self.compiled, phase.advance.seconds
        if compiling:
            tqdm.write(f"{phase.name}: compiled in {compiling:.1f} s")
        seconds -= compiling
        self.before, self.step, self.rate = self.step, self.step + n * phase.stride, n / seconds
        self.train_seconds, self.log_seconds = (
            self.train_seconds + seconds,
            self.log_seconds + seconds,
        )
        self.bar.update(self.step - self.before)
        if self.quiet and time.perf_counter() - self.said > 10:  # no terminal: lines, not a bar
            self.said, speed = time.perf_counter(), self.rate * phase.stride
            eta = (phase.end - self.step) / speed
            print(f"{phase.name} {self.step:,}/{phase.end:,}  {speed:,.1f}/s  ETA {eta:,.0f} s")
        broken = [k for k, v in sums["train"].items() if not np.isfinite(v).all()]
        if broken:
            rates = [k for k in vars(self.args) if k.endswith(("_lr", "learning_rate"))]
            raise UserError(
                f"training diverged before step {self.step:,}: {', '.join(broken)} not finite; "
                f"step {self.saved:,} is the last good one in {self.dir}; try a lower "
                + " or ".join("--" + rate.replace("_", "-") for rate in rates)
            )

    def due(self):
        """Whether to log, to evaluate, to save."""
        over = self.step >= self.phase.end
        return [over or self.step // m > self.before // m for m in self.intervals()]

    def averages(self, sums, carry):
        """Metrics since the last log, one value per seed; what nothing is known of is NaN."""
        count, episodes = np.asarray(sums["count"]), np.asarray(sums["episodes"])
        mean = lambda total, n: np.where(n > 0, total / np.maximum(n, 1), np.nan)
        self.updates_per_s = float(count.flat[0] / self.log_seconds)
        values = {f"train/{k}": mean(v, count) for k, v in sums["train"].items()}
        values |= {f"online/{k}": mean(sums[k], episodes) for k in ("return", "success")}
        if "recent" in carry:  # the last episodes' returns, as many as there were
            recent = np.asarray(carry["recent"])
            values["charts/episodic_return"] = mean(
                np.nansum(recent, axis=1), (~np.isnan(recent)).sum(axis=1)
            )
        values["time/updates_per_s"] = self.updates_per_s
        values["time/train_seconds"] = self.train_seconds
        values["time/compile_s"], self.log_seconds = self.phase.advance.seconds, 0.0
        return values | {f"eval/{k}": np.nan for k in self.metrics}

    def note_evaluation(self, results):
        self.evals.append(results[self.metrics[0]].mean(axis=1).tolist())
        tqdm.write(f"{self.phase.name} step {self.step:>9,}  {summary(results)}")
        return {f"eval/{k}": v.mean(axis=1) for k, v in results.items()}

    def log(self, values):
        """One CSV row and TensorBoard point per seed; values are (num_seeds,) or scalars."""
        try:
            if self.csv is None:
                self.open_logs(values)
            table = csv.DictWriter(self.csv, self.columns, extrasaction="ignore")
            if self.csv.tell() == 0:
                table.writeheader()
            for i, seed in enumerate(self.seeds):
                row = {k: float(np.broadcast_to(v, len(self.seeds))[i]) for k, v in values.items()}
                row = {k: v for k, v in row.items() if not np.isnan(v)}  # nothing to report yet
                table.writerow(dict(step=self.step, phase=self.phase.name, seed=seed, **row))
                for name, value in row.items():
                    self.writers[i].add_scalar(name, value, self.step)
                if self.wandb:
                    self.wandb.log({f"{k}/seed{seed}": v for k, v in row.items()}, self.step)
            self.csv.flush()
        except OSError as e:
            raise UserError(
                f"cannot write metrics: {e.strerror}; {REMEDY.get(e.errno, 'mend that')}, then "
                f"--resume {self.quoted}"
            ) from e

    def open_logs(self, values):
        from tensorboard.summary import Writer

        names = ["step", "phase", "seed", *values]  # online runs know of more, later
        names += [] if "charts/episodic_return" in values else ["charts/episodic_return"]
        self.columns = self.columns or names
        self.csv = open(self.dir / "metrics.csv", "a", newline="")
        self.writers = [Writer(str(self.dir / f"tb_seed{s}")) for s in self.seeds]
        if project := self.args.wandb_project:
            import wandb

            name = self.dir.name
            self.wandb = wandb.init(project=project, id=name, config=self.facts, resume="allow")

    @property
    def quoted(self):
        return shlex.quote(str(self.dir))

    def save(self, carry):
        save_checkpoint(self.dir, carry, dict(step=self.step))
        self.saved = self.step

    def leave(self):
        """Ctrl-C or a signal: all is saved."""
        self.bar.close()
        print(f"stopped; --resume {self.quoted} continues at {self.saved:,}", file=sys.stderr)
        raise SystemExit(128 + self.stop.number)

    def end_phase(self, nets, state):
        self.bar.close()
        if draw := self.task.parts.get("after_phase"):
            script = sys.modules[__name__]
            ask(draw, self.dir, self.phase.name, script, nets, self.args, state)

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


class StopSignal:
    """First Ctrl-C, SIGTERM or SIGHUP: finish the dispatch and save. Second: stop at once."""

    def __init__(self):
        self.number = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self)

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
    advance: Callable
    enter: Callable = lambda carry: carry  # from the carry of the phase before
    stride: int = 1
    restart: Callable | None = None  # host environments begin new episodes at each checkpoint


def check_numbers(args, unbounded=(), zero=()):
    """Counts are at least 1 (steps, seed and those in `zero`: 0), other numbers at least 0, gamma
    and tau at most 1."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name in unbounded:
            continue
        may_be_0 = ("seed", "offline_steps", "online_steps", *zero)
        low = 0 if isinstance(value, float) or name in may_be_0 else 1
        high = {"gamma": 1, "tau": 1, "seed": 2**31 - 1}.get(name, np.inf)
        if not low <= value <= high:
            bound = f"at least {low}" if high == np.inf else f"between {low} and {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be {bound}")
    if args.seed + args.num_seeds > 2**31:
        raise UserError("--seed plus --num-seeds must stay below 2^31")


def fill(args, **values):
    """Set those of `values` that no flag has set."""
    unset = {k: v for k, v in values.items() if getattr(args, k) is None}
    return dataclasses.replace(args, **unset)


def task_table(task, defaults):
    """What a task sets when no flag does: `defaults`, then the task's, then those of its file."""
    family = next(prefix for prefix in TASK_DEFAULTS if task.base.startswith(prefix))
    own = task.parts.get("defaults", {})
    return defaults | TASK_DEFAULTS[family] | own.get("", {}) | own.get(ALGO, {})


def own_flags(table):
    """The part of a table that this script has flags for."""
    return {k: v for k, v in table.items() if k in Args.__dataclass_fields__}


def command_line(main, args_type, argv=None):
    """Parse the flags, call `main(args)`; what the user can mend is one sentence, exit code 2."""
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows progress too
    try:
        args = tyro.cli(args_type, args=argv)
        if "" in (args.resume, args.evaluate):
            raise UserError("--resume and --evaluate need the directory of a run, but got ''")
        if args.resume or args.evaluate:
            args = read_args(args.resume or args.evaluate, argv, args_type())
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (jax.errors.JaxRuntimeError, MemoryError) as e:
        if not any(word in str(e) for word in ("RESOURCE_EXHAUSTED", "ut of memory")):
            raise
        print(f"error: out of memory; fewer --num-seeds, smaller networks, --batch-size or "
              f"--buffer-size ({str(e).splitlines()[0][:150]})", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted before training began; nothing was written", file=sys.stderr)
        return 130
    return 0


# ==== end shared: runs ====


# ---- this script's flags ----
JAX_ENVS = {}  # built-in environments beside the point mazes: name -> constructor
FREE_ALSO = ()  # flags that may still change when a run is resumed
EVALUATION_FLAGS = ("eval_candidates", "eval_choice", "flow_steps")  # may change with --evaluate


def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    given, args = args, fill(args, **own_flags(task_table(task, DEFAULTS)))
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
        if wrong:
            raise UserError(remedy)
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
