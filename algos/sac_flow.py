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

Online (--mode online, from scratch), every step of the environment
  critic        y = sg[r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log p')]
                L_critic = 1/2 sum_c mean (Q_c(s, a) - y)^2,  (s, a) and (s', a') in ONE pass
                through BatchRenorm critics without target network  (plain: with one, no 1/2)
  actor         L_actor = mean (alpha log p - min_c Q_c(s, a)),  every --policy-delay updates
  temperature   L_alpha = alpha (H - H_target),  H = -mean sg[log p]

Offline-to-online (the default of tasks with data), chunks of H actions played open loop
  critic        y = sg[sum_k gamma^k r_k + gamma^H mask (mean_c Q'_c(s', a') - alpha log p')]
                L_critic = mean valid (Q_c(s, a) - y)^2,  Q' <- tau Q + (1 - tau) Q'
  step A        critic, and flow matching mean valid (v(s, x_t, t) - (x_1 - x_0))^2
  step B        critic, and actor mean (alpha log p - mean_c Q_c(s, a)) + beta mean (a - a_data)^2
  Offline both steps are taken on each batch; online one step B per environment step.

Deviations from the released code (P: from the paper, where the released code differs from it)
  1. log p contains -log s_i at every step, of every policy; tanh's Jacobian in its stable form.
  2. Noise of its own for every step and call: released Flow-G reuses one key offline-to-online.
  3. Offline-to-online alpha is the constant 0, to which a sign error drives it there.
  4. No chunk crosses the replay's write pointer, and online rows never overwrite the dataset. The
     target critic follows the critic after its step (there: before).
  5. Evaluation also without noise, from A_0 = 0; checkpoints hold the state of BatchRenorm, which
     takes variances in two passes; attention over one token is two linear maps, the same function.
  6. With --num-envs above 1 on official environments, updates see new rows one step later, and
     acting sees those updates from the step after.
  7. The naive velocity joins time behind BatchRenorm, which cannot standardise a batch's constant:
     its running variance falls to 0, and acting sees times of +-12 (released: --renorm-time).
  P. Learned noise online and 0.05 / 0.02 offline-to-online instead of one sigma with drift
     correction; CrossQ critic, policy delay, Adam b1 0.5; widths 512 / 96; no clamp of Flow-G's
     candidate; post-norm blocks with self-attention; BC and RL interleaved offline; constant beta;
     no frozen pre-trained velocities inside Flow-G or Flow-T.

Modes
  python algos/sac_flow.py --policy flow-g                vmapped pendulum, a few minutes
  python algos/sac_flow.py --env-id HalfCheetah-v4        from scratch, the published settings
  python algos/sac_flow.py --env-id cube-double           offline, then online, in chunks
  python algos/sac_flow.py --evaluate runs/RUN            load a checkpoint and evaluate it
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

ALGO = "sac_flow"
Values = float | tuple[float, ...]  # several: a grid, whose combinations train in one program


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- experiment ----
    env_id: str = "phys2d/Pendulum-v0"
    """task: a Gymnasium id (HalfCheetah-v5), an OGBench single-task id, a short name
    (cube-double-task3, pointmaze-medium), or FILE.py:NAME, a task file"""
    mode: Literal["online", "offline-to-online"] | None = None
    """from scratch, or from a dataset and then online (default for tasks with data)"""
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds (seed, seed+1, ...) in one vmapped program; of a grid: of each arm
    out_dir: str = "runs"  # directory in which the run directory is created
    evaluate: str | None = None  # run directory: evaluate its checkpoint, train nothing
    video: bool = False  # with --evaluate: also record episodes (see benchmark/see.py)
    resume: str | None = None  # run directory: continue it exactly where its last checkpoint stands
    start_from: str = ""
    """run directory: a new run from the end of its offline phase; its flags are the defaults"""
    wandb_project: str | None = None  # also log to Weights & Biases (pip install wandb)
    matmul_precision: Literal["default", "high", "highest"] = "default"  # of float32 matmuls

    # ---- environment and data ----
    env_backend: Literal["auto", "jax", "host", "mjx"] = "auto"
    """vmapped inside the program (pendulum, point mazes), or the official one in processes of its
    own; auto: jax where it exists; mjx: MuJoCo tasks (v5) vmapped, for a GPU (slow on a CPU)"""
    success_timing: Literal["post", "pre"] = "post"  # OGBench: reward after the action or before
    dataset: str | None = None  # transitions of your own: FILE.npz or FILE.hdf5 (see README)
    dataset_dir: str = "~/.ogbench/data"  # OGBench datasets are here, or come here
    num_envs: int | None = None
    """parallel environments per seed; the updates of a block of steps (the fewest that a whole
    number of actor updates belongs to) come after it: the acting policy is up to a block old"""
    action_scale: float | None = None  # half width of the action box (default: the environment's)
    normalize_obs: bool | None = None  # offline-to-online: standardise by the dataset's moments
    sparse: bool | None = None  # tasks with data: every non-zero reward becomes -1

    # ---- schedule ----
    offline_steps: int | None = None  # offline-to-online: offline iterations
    online_steps: Annotated[int | None, tyro.conf.arg(aliases=["--total-timesteps"])] = None
    """environment steps, those before learning starts too, rounded up to whole blocks (num-envs)"""
    learning_starts: int | None = None
    """environment steps before the first online update, rounded up likewise: from scratch random
    ones (a block at least, where official environments run in parallel), else the policy's own"""
    log_interval: Annotated[int | None, tyro.conf.arg(aliases=["--updates-per-dispatch"])] = None
    """log the metrics' mean over this many steps"""
    eval_interval: Annotated[int | None, tyro.conf.arg(aliases=["--eval-freq"])] = None
    """evaluate every this many steps and at the end of each phase"""
    eval_episodes: int | None = None  # episodes per evaluation, mode of acting and seed
    eval_background: bool = True  # within a phase, simulators evaluate while training goes on
    eval_all_modes: bool = False  # all modes within a phase too, not just the first
    checkpoint_interval: int | None = None  # steps; official environments begin new episodes there
    offline_schedule: Literal["interleaved", "sequential"] | None = None
    """offline: flow matching and RL on each batch, or flow matching first and RL afterwards"""
    bc_fraction: float | None = None  # sequential: part of the offline steps for flow matching

    # ---- optimisation ----
    batch_size: int | None = None  # rows per gradient step
    actor_lr: Values | None = None  # Adam's step size for the policy
    critic_lr: Values | None = None  # Adam's step size for the critics
    alpha_lr: Values | None = None  # Adam's step size for the temperature
    adam_b1: Values | None = None  # Adam's b1 of all three (CrossQ: 0.5)
    tau: Values | None = None  # target critic: fraction of the new critic in each step
    gamma: Values | None = None  # discount per environment step
    policy_delay: int | None = None  # critic updates per actor update
    utd: float = 1.0  # critic updates per environment step (0.5: one after every second step)
    buffer_size: int = 1_000_000  # online rows that are kept per seed
    num_critics: int = 2  # critics, joined by min (online) or mean (offline-to-online)
    critic: Literal["brn", "plain", "layer"] | None = None
    """BatchRenorm without target network, or plain ReLU with one; offline-to-online: layer norm"""
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of the critics
    hidden_dim: int | None = None  # width of flow-g, mlp and gaussian policies
    d_model: int | None = None  # width of flow-t's residual stream

    # ---- algorithm ----
    policy: Literal["flow-g", "flow-t", "mlp", "gaussian"] | None = None
    """gated velocity, decoder-block velocity, plain MLP velocity, or SAC's Gaussian"""
    renorm_time: bool = False  # mlp from scratch: BatchRenorm over the time as well, as released
    flow_steps: int = 4  # K, Euler steps of the rollout
    noise: Literal["learned", "fixed"] | None = None  # of each Euler step: learned, or --sigma
    sigma: Values | None = None  # fixed noise: deviation in the actor's loss
    sigma_inference: Values | None = None  # fixed noise: deviation for targets, acting, evaluation
    drift_correction: bool = False
    """fixed noise: the paper's drift that keeps the flow's marginals, with noise sigma sqrt(1/K)"""
    autotune: bool | None = None  # learn the temperature alpha
    ent_coef: Values | None = None  # temperature alpha, the initial one with --autotune
    target_entropy: Values | None = None  # of the path's density; gaussian: of the action's
    horizon_length: int | None = None  # offline-to-online: H, actions per chunk
    beta: Values | None = None  # offline-to-online: weight of the distance to the data, offline
    beta_online: Values | None = None  # the same in the online phase
    bc_space: Literal["action", "pretanh"] | None = None  # flow matching of actions or their atanh


# What a task sets when no flag does: the mode's settings, over them the task's (the first matching
# prefix wins). Sources: [code] released code, [qc] Q-chunking, [ours] chosen here.
BOTH = dict(  # [code]
    online_steps=1_000_000, gamma=0.99, num_envs=1, actor_lr=3e-4, hidden_dim=512,
    log_interval=500, checkpoint_interval=100_000, normalize_obs=False, sparse=False,
)  # fmt: skip
PAPER = {
    "online": BOTH | dict(  # [code]
        learning_starts=50_000, batch_size=512, critic_lr=1e-3, alpha_lr=1e-3, adam_b1=0.5,
        policy_delay=3, critic="brn", critic_hidden_dims=(1024, 1024), policy="flow-g", d_model=96,
        noise="learned", autotune=True, ent_coef=0.2, eval_interval=25_000, eval_episodes=10,
        offline_steps=0, horizon_length=1, beta=0.0, beta_online=0.0,
    ),
    "offline-to-online": BOTH | dict(  # [code], [qc]
        offline_steps=1_000_000, learning_starts=5_000, batch_size=256, critic_lr=3e-4,
        alpha_lr=3e-4, adam_b1=0.9, tau=0.005, policy_delay=1, critic="layer",
        critic_hidden_dims=(512,) * 4, policy="flow-t", d_model=128, noise="fixed",
        autotune=False, action_scale=1.0, eval_interval=100_000, eval_episodes=50,
        horizon_length=5, bc_space="action", offline_schedule="interleaved", bc_fraction=0.25,
    ),
}  # fmt: skip
PLAIN = dict(adam_b1=0.9, tau=0.005, policy_delay=1, critic_hidden_dims=(512,) * 4)  # [code]
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. Fewer or smaller steps of the actor leave seeds of Flow-G at
    # returns of -500 to -1000 for the whole run.
    "phys2d/Pendulum": dict(
        online_steps=20_000, learning_starts=1_000, num_envs=4, batch_size=128, hidden_dim=64,
        d_model=32, critic_hidden_dims=(128, 128), actor_lr=1e-3, policy_delay=1,
        eval_interval=2_500, eval_episodes=50, checkpoint_interval=2_500,
    ),
    "pointmaze": dict(  # [ours] minutes on two CPU cores
        offline_steps=10_000, online_steps=10_000, learning_starts=500, actor_lr=1e-3,
        critic_lr=1e-3, tau=0.01, hidden_dim=128, d_model=64, critic_hidden_dims=(128, 128, 128),
        beta=10.0, normalize_obs=True, eval_interval=2_500, checkpoint_interval=2_500,
    ),
    "cube-double": dict(beta=300.0),  # reported for the paper, as is 100 for the next two
    "cube-triple": dict(beta=100.0),
    "cube-quadruple": dict(beta=100.0),
    "": {},
}  # fmt: skip


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
        stat = functools.partial(self.variable, "batch_stats")
        running = stat("mean", jnp.zeros, width), stat("var", jnp.ones, width)
        calls = stat("calls", jnp.zeros, (), jnp.int32)
        gain = self.param("gain", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        mean, var = (average.value for average in running)
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
            for average, new in zip(running, (m, v), strict=True):
                new = (1 - self.momentum) * jax.lax.stop_gradient(new)
                average.value = self.momentum * average.value + new
            calls.value += 1
        return gain * (x - mean) / jnp.sqrt(var + self.epsilon) + bias


class Norm(nn.Module):
    """The normalisation of that kind: brn, layer, or else none."""

    kind: str

    @nn.compact
    def __call__(self, x, train):
        if self.kind == "brn":
            return BatchRenorm()(x, train)
        return nn.LayerNorm()(x) if self.kind == "layer" else x


LECUN = nn.initializers.lecun_normal()
FAN_AVG = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")


class MLP(nn.Module):
    """Dense layers with activation and then a norm, and a linear head where `out_dim` is given."""

    hidden_dims: tuple[int, ...]
    out_dim: int | None = None
    activation: Callable = nn.relu
    norm: str = "none"  # brn also normalises the input
    kernel_init: Callable = LECUN

    @nn.compact
    def __call__(self, x, train=False):
        dense = functools.partial(nn.Dense, kernel_init=self.kernel_init)
        x = BatchRenorm()(x, train) if self.norm == "brn" else x
        for width in self.hidden_dims:
            x = Norm(self.norm)(self.activation(dense(width)(x)), train)
        return x if self.out_dim is None else dense(self.out_dim)(x)


class Critic(nn.Module):
    """Independent Q functions with stacked parameters: (obs, action) -> (num_critics, B)."""

    num_critics: int
    hidden_dims: tuple[int, ...]
    kind: str  # --critic

    @nn.compact
    def __call__(self, obs, actions, train):
        members = nn.vmap(
            MLP, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True},
            in_axes=None, out_axes=0, axis_size=self.num_critics,
        )  # fmt: skip
        style = dict(activation=nn.gelu, kernel_init=FAN_AVG) if self.kind == "layer" else {}
        net = members(self.hidden_dims, 1, norm=self.kind, **style)
        return net(jnp.concatenate([obs, actions], axis=-1), train).squeeze(-1)


def join(*parts):
    """Concatenate features; a part with one row belongs to all rows."""
    rows = max(p.shape[0] for p in parts)
    return jnp.concatenate([jnp.broadcast_to(p, (rows, p.shape[1])) for p in parts], axis=-1)


class Policy(nn.Module):
    """What the policies share. `context(obs, train)` is computed once per rollout; `velocity
    (context, x, t, k, train)` gives v and the log deviation of the noise (None where it is not
    learned) at Euler step k, time t (1 or B, 1)."""

    act_dim: int
    width: int  # hidden_dim, or d_model of flow-t
    flow_steps: int
    input_norm: str  # from scratch brn; flows with none have layer norms or deeper MLPs
    learned_noise: bool
    renorm_time: bool

    def __call__(self, obs, x, train):
        """Touch every parameter, for the initialisation."""
        context, t = self.context(obs, train), jnp.zeros((1, 1))
        return [self.velocity(context, x, t, k, train) for k in range(self.flow_steps)]

    def context(self, obs, train):
        return obs

    def log_std(self, head, x, divisor=1):
        """Learned, within [-5, 2] and about -1.5 at first (its deviation then divided), or None."""
        learned = self.learned_noise
        return -5 + 3.5 * (jnp.tanh(head(x)) + 1) - jnp.log(divisor) if learned else None


class NaiveVelocity(Policy):
    """--policy mlp: a plain network, whose rollout is a residual RNN."""

    def setup(self):
        online = self.input_norm == "brn"
        depth, act, init = (2, nn.relu, LECUN) if online else (4, nn.gelu, FAN_AVG)
        self.norm = Norm(self.input_norm)
        self.body = MLP((self.width,) * depth, None, act, kernel_init=init)
        self.head = nn.Dense(self.act_dim, kernel_init=init)
        self.noise_head = nn.Dense(self.act_dim)

    def velocity(self, obs, x, t, k, train):
        before, behind = ([t], []) if self.renorm_time else ([], [t])
        x = self.body(join(self.norm(join(obs, x, *before), train), *behind))
        return self.head(x), self.log_std(self.noise_head, x)


class GatedVelocity(Policy):
    """--policy flow-g: v = g (vhat - x), as in a GRU; g is 0.993 at first, whatever the input."""

    def setup(self):
        w, d, constant = self.width, self.act_dim, nn.initializers.constant
        gate, deep, act, init = (w // 2,), (w,) * 4, nn.gelu, FAN_AVG
        if self.input_norm == "brn":
            gate, deep, act, init = (w,), (w,), nn.swish, LECUN
        self.norm, self.time = Norm(self.input_norm), MLP((64,), 32, nn.swish)
        self.candidate = MLP(deep, d, act, kernel_init=init)
        self.gate = MLP(gate, None, nn.swish, kernel_init=init)
        self.gate_head = nn.Dense(d, kernel_init=constant(0.0), bias_init=constant(5.0))
        self.noise = MLP((w, w), d)  # of the state alone, so the same for all steps

    def context(self, obs, train):
        return obs, self.log_std(self.noise, obs)

    def velocity(self, context, x, t, k, train):
        obs, log_std = context
        if self.input_norm == "brn":
            angles = t * jnp.exp(-jnp.log(1e4) * jnp.arange(16) / 15)
            t = self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        inputs = join(self.norm(join(obs, x), train), t)
        gate = nn.sigmoid(self.gate_head(self.gate(inputs)))
        return gate * (self.candidate(inputs) - x), log_std


class DecoderVelocity(Policy):
    """--policy flow-t: a transformer decoder whose one token is x and whose one memory is s.

    A softmax over one key is 1, whatever the query: self-attention is W_o W_v x, cross-attention
    W_o' W_v' m, and queries, keys, masks and heads would have no effect. The product W_o W_v stays
    two matrices, because Adam treats them as two.
    """

    num_blocks: int = 2

    def setup(self):
        d, blocks = self.width, range(self.num_blocks)
        kind = "brn" if self.input_norm == "brn" else "layer"
        dense = lambda: [nn.Dense(d) for _ in blocks]
        self.obs_norm = Norm(self.input_norm)
        self.token_norms = [Norm(self.input_norm) for _ in range(self.flow_steps)]
        self.memory, self.token = MLP((d // 2,), d, nn.silu), nn.Dense(d)
        self.time = MLP((d // 4, d // 2), d, nn.silu)
        self.self_value, self.self_out = dense(), dense()
        self.cross_value, self.cross_out = dense(), dense()
        self.feed_forward = [MLP((4 * d,), d, nn.gelu) for _ in blocks]
        self.norms = [[Norm(kind) for _ in range(3)] for _ in blocks]
        self.head, self.noise_head = nn.Dense(self.act_dim), nn.Dense(self.act_dim)

    def context(self, obs, train):
        m = self.memory(self.obs_norm(obs, train))
        return [o(v(m)) for v, o in zip(self.cross_value, self.cross_out, strict=True)]

    def velocity(self, memories, x, t, k, train):
        x = self.token(self.token_norms[k](x, train)) + self.time(t)
        for b, memory in enumerate(memories):  # post-norm
            norms = self.norms[b]
            x = norms[0](x + self.self_out[b](self.self_value[b](x)), train)
            x = norms[1](x + memory, train)
            x = norms[2](x + self.feed_forward[b](x), train)
        # this policy's noise is added to the velocity, so a step of 1/K scales it too
        return self.head(x), self.log_std(self.noise_head, x, self.flow_steps)


class GaussianPolicy(Policy):
    """--policy gaussian: mean and clipped log deviation of SAC's action before tanh."""

    @nn.compact
    def context(self, obs, train):
        narrow = self.width // 2
        x = MLP((narrow, self.width, narrow), norm=self.input_norm)(obs, train)
        return nn.Dense(self.act_dim)(x), jnp.clip(nn.Dense(self.act_dim)(x), -20, 2)


class Networks(NamedTuple):
    """Functions of (params, stats, inputs..., train) -> (output, stats), the state of BatchRenorm;
    tests put hand-made ones in their place."""

    dim: int  # actions of a whole chunk, which actor and critic see as one
    critic: Callable  # obs, action -> (num_critics, B)
    context: Callable | None = None  # obs -> what the velocity needs; gaussian: mean and log_std
    velocity: Callable | None = None  # context, x, t, k -> (v, log_std or None)
    init: Callable | None = None  # obs_dim, key -> (params, stats), dicts of the groups


def make_networks(args, act_dim):
    """Actor and critic as plain functions."""
    kinds = {"mlp": NaiveVelocity, "flow-g": GatedVelocity, "flow-t": DecoderVelocity}
    width = args.d_model if args.policy == "flow-t" else args.hidden_dim
    norm = args.critic if args.policy == "gaussian" else "brn" if args.mode == "online" else "none"
    dim, kind = args.horizon_length * act_dim, kinds.get(args.policy, GaussianPolicy)
    actor = kind(dim, width, args.flow_steps, norm, args.noise == "learned", args.renorm_time)
    critic = Critic(args.num_critics, args.critic_hidden_dims, args.critic)

    def function(module, method=None):
        def apply(params, stats, *inputs, train=False):
            variables, mutable = {"params": params, "batch_stats": stats}, ["batch_stats"]
            out, new = module.apply(variables, *inputs, train, method=method, mutable=mutable)
            return out, new.get("batch_stats", stats)

        return apply

    def init(obs_dim, key):
        inputs, keys = (jnp.zeros((1, obs_dim)), jnp.zeros((1, dim)), False), jax.random.split(key)
        groups = dict(actor=actor.init(keys[0], *inputs), critic=critic.init(keys[1], *inputs))
        if args.autotune:
            groups["log_alpha"] = {"params": jnp.log(jnp.float32(args.ent_coef))}
        params = {name: v["params"] for name, v in groups.items()}
        return params, {name: v.get("batch_stats", {}) for name, v in groups.items()}

    parts = function(critic), function(actor, "context"), function(actor, "velocity")
    return Networks(dim, *parts, init)


# ---- the method: sampling ----
class Rollout(NamedTuple):
    """Every Gaussian draw x = mean + exp(log_std) eps behind one action, each (draws, B, A): A_0
    and the K noisy Euler steps of a flow, or the Gaussian policy's one draw. The last x is u."""

    x: jax.Array
    mean: jax.Array
    log_std: jax.Array
    eps: jax.Array


def rollout(params, stats, nets, args, obs, eps, sigma, train=False):
    """Path of the actor from the noise `eps` (draws, B, A) -> (Rollout, stats)."""
    context, stats = nets.context(params, stats, obs, train=train)
    zeros = jnp.zeros_like(eps[0])
    mean, log_std = context if args.policy == "gaussian" else (zeros, zeros)
    path = [(mean + jnp.exp(log_std) * eps[0], mean, log_std)]
    for k in range(args.flow_steps):  # unrolled: flow-t has a norm for each step
        x, dt = path[-1][0], 1 / args.flow_steps
        t, time = k * dt, jnp.full((1, 1), k * dt)
        (v, log_std), stats = nets.velocity(params, stats, context, x, time, k, train=train)
        if log_std is None:
            log_std = jnp.log(step_std(args, sigma))
        if args.drift_correction:  # + sigma^2 / 2 times the score of the flow at time t
            v = v + sigma**2 / 2 * (t * v - x) / (1 - t)
        mean, log_std = x + dt * v, jnp.broadcast_to(log_std, x.shape)
        path.append((mean + jnp.exp(log_std) * eps[k + 1], mean, log_std))
    x, mean, log_std = (jnp.stack(parts) for parts in zip(*path, strict=True))
    return Rollout(x, mean, log_std, eps), stats


def step_std(args, sigma):
    """Actual deviation of fixed noise in one Euler step."""
    return sigma * args.flow_steps**-0.5 if args.drift_correction else sigma


def path_log_prob(path, scale):
    """log density of a path and its action scale * tanh(u), (draws, B, A) -> (B,): eps^2 / 2 is the
    exact term of the drawn x, and log(1 - tanh^2) is stable for any u."""
    draws = -0.5 * path.eps**2 - path.log_std - 0.5 * jnp.log(2 * jnp.pi)
    u = path.x[-1]
    jacobian = jnp.log(scale) + 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return (draws.sum(axis=0) - jacobian).sum(axis=-1)


def sample_action(params, stats, nets, args, obs, key, sigma, train=False):
    """Actions (B, A), log density of their paths (B,), the paths, the actor's stats. `sigma` is the
    deviation of fixed noise; without a key there is no noise at all."""
    shape = (args.flow_steps + 1, len(obs), nets.dim)
    eps, sigma = (jnp.zeros(shape), 0.0) if key is None else (jax.random.normal(key, shape), sigma)
    path, stats = rollout(params, stats, nets, args, obs, eps, sigma, train)
    action = args.action_scale * jnp.tanh(path.x[-1])
    return action, path_log_prob(path, args.action_scale), path, stats


# ---- the method: losses ----
# loss(params, stats, ...) -> (loss, (metrics, stats)): those of the group that the loss trains.
def aggregate(q, args):
    """Join the critics' values: the smallest online, the mean offline-to-online."""
    return q.mean(axis=0) if args.critic == "layer" else q.min(axis=0)


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
    if args.critic == "layer":  # 0 where an episode ended inside the chunk
        loss = (batch["valid"][:, -1] * (q - y) ** 2).mean()
    else:
        loss = ((q - y) ** 2).sum(axis=0).mean() * (0.5 if args.critic == "brn" else 1.0)
    return loss, ({"critic_loss": loss, "q": q.mean(), "td_target": y.mean()}, stats)


def actor_loss(params, stats, nets, args, batch, critic, alpha, beta, key):
    """Up the critic (params, stats), entropy, and offline-to-online the distance to the data."""
    actor = params, stats, nets, args
    action, log_prob, path, stats = sample_action(*actor, batch["obs"], key, args.sigma, train=True)
    q, _ = nets.critic(*critic, batch["obs"], action)
    loss = jnp.mean(alpha * log_prob - aggregate(q, args))
    step_std = jnp.exp(path.log_std[-1]).mean()
    info = {"entropy": -log_prob.mean(), "actor_q": q.mean(), "step_std": step_std}
    if args.mode == "offline-to-online":
        info["data_distance"] = jnp.mean((action - batch["actions"]) ** 2)
        loss += beta * info["data_distance"]
    return loss, ({"actor_loss": loss, **info}, stats)


def flow_matching_loss(params, stats, nets, args, batch, key):
    """Behaviour cloning: the velocity of straight paths from N(0, I) to the data."""
    # pretanh is the rollout's own space: tanh(x1) is what is played
    x1 = jnp.arctanh(batch["actions"]) if args.bc_space == "pretanh" else batch["actions"]
    noise_key, time_key = jax.random.split(key)
    x0 = jax.random.normal(noise_key, x1.shape)
    t = jax.random.uniform(time_key, (len(x1), 1))
    context, _ = nets.context(params, stats, batch["obs"], train=True)
    (v, _), _ = nets.velocity(params, stats, context, (1 - t) * x0 + t * x1, t, 0, train=True)
    valid = jnp.repeat(batch["valid"], x1.shape[1] // batch["valid"].shape[1], axis=1)
    loss = jnp.mean(valid * (v - (x1 - x0)) ** 2)
    return loss, ({"bc_loss": loss}, stats)


def temperature_loss(log_alpha, stats, entropy, target_entropy):
    """Raise alpha while the entropy is below its target, lower it above."""
    loss = jnp.exp(log_alpha) * jax.lax.stop_gradient(entropy - target_entropy)
    return loss, ({}, stats)


# ---- the method: one update ----
@flax.struct.dataclass
class TrainState:
    """Everything that training changes. Keys are functions of (seed, step), so none is stored."""

    params: Any  # actor, critic and, if it is learned, log_alpha
    stats: Any  # BatchRenorm's running statistics, likewise
    target_critic: Any  # empty where there is none
    opt_state: Any
    obs_mean: jax.Array
    obs_std: jax.Array
    seed: jax.Array
    step: jax.Array  # critic updates
    arm: Any = None  # of a grid: which of a flag's values are this member's


def optimizer(args, name):
    """Adam of a group, without clipping, decay or schedule."""
    rates = dict(actor=args.actor_lr, critic=args.critic_lr, log_alpha=args.alpha_lr)
    return optax.adam(rates[name], b1=args.adam_b1)


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params, stats = make_networks(args, act_dim).init(obs_dim, purpose_key(seed, "init"))
    target = {} if args.critic == "brn" else params["critic"]
    opt_state = {name: optimizer(args, name).init(p) for name, p in params.items()}
    return TrainState(params, stats, target, opt_state, obs_mean, obs_std, seed, jnp.int32(0))


def descend(state, name, args, loss, *inputs):
    """One Adam step of the group `name` down its loss -> (state, metrics)."""
    params, opt_state = state.params[name], state.opt_state[name]
    grads, (info, stats) = jax.grad(loss, has_aux=True)(params, state.stats[name], *inputs)
    updates, opt_state = optimizer(args, name).update(grads, opt_state, params)
    return state.replace(
        params=state.params | {name: optax.apply_updates(params, updates)},
        stats=state.stats | {name: stats},
        opt_state=state.opt_state | {name: opt_state},
    ), info


def temperature(state, args):
    """alpha, learned or constant."""
    return jnp.exp(state.params["log_alpha"]) if args.autotune else jnp.float32(args.ent_coef)


def critic_step(state, batch, key, nets, args):
    """One Adam step of the critics and, where there is one, a small step of their target."""
    actor = state.params["actor"], state.stats["actor"], nets, args
    next_action, log_prob, *_ = sample_action(*actor, batch["next_obs"], key, args.sigma_inference)
    target = None if args.critic == "brn" else (state.target_critic, state.stats["critic"])
    inputs = target, nets, args, batch, next_action, temperature(state, args) * log_prob
    state, info = descend(state, "critic", args, critic_loss, *inputs)
    if target:
        target = optax.incremental_update(state.params["critic"], state.target_critic, args.tau)
    return state.replace(target_critic=target or {}, step=state.step + 1), info


def actor_step(state, critic, batch, key, beta, nets, args):
    """One Adam step of the actor up the critic (params, stats), then one of the temperature."""
    alpha = temperature(state, args)
    inputs = nets, args, batch, critic, alpha, beta, key
    state, info = descend(state, "actor", args, actor_loss, *inputs)
    if args.autotune:
        inputs = info["entropy"], args.target_entropy
        state, _ = descend(state, "log_alpha", args, temperature_loss, *inputs)
    return state, info | {"alpha": alpha}


def make_update(nets, args, clone=False):
    """update(state, batches, key, beta) -> (state, metrics): a critic step on each of policy_delay
    batches, then one of actor and temperature on the last (`clone`: one of flow matching). A batch
    is what `sample_chunks` returns. Offline-to-online both are one joint step: the actor climbs the
    critic as it was before."""

    def update(state, batches, key, beta):
        actor_key, *keys = jax.random.split(key, len(batches) + 1)
        infos = []
        for batch, critic_key in zip(batches, keys, strict=True):
            before = state
            state, info = critic_step(state, batch, critic_key, nets, args)
            infos.append(info)
        if clone:
            inputs = nets, args, batch, actor_key
            state, info = descend(state, "actor", args, flow_matching_loss, *inputs)
        else:
            judge = state if args.mode == "online" else before
            critic = judge.params["critic"], judge.stats["critic"]
            state, info = actor_step(state, critic, batch, actor_key, beta, nets, args)
        return state, jax.tree.map(lambda *x: sum(x) / len(x), *infos) | info

    return update


def make_policy(nets, args):
    """policy(state, obs, key, deterministic=False): raw observation (D,) -> the actions (H * A,) of
    the next H steps."""

    def policy(state, obs, key, deterministic=False):
        obs = ((obs - state.obs_mean) / state.obs_std)[None]
        actor, key = (state.params["actor"], state.stats["actor"]), None if deterministic else key
        return sample_action(*actor, nets, args, obs, key, args.sigma_inference)[0][0]

    return policy


# ---- training ----
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of members, which a
# program's steps do not see: state, a TrainState; sums, the metrics since the last log; online also
# replay, a ring of C rows {obs, next_obs (C, D), actions (C, A), rewards, masks, terminals (C,)}
# and added, their number so far; returns (E,) of the episodes under way; recent, the last 20
# episodes' returns; and on JAX environments envs: their states, the chunks (E, H, A) of actions
# being played, and how many of each are taken (E,).
def make_learn(nets, args, *updates):
    """learn(carry, data, beta) -> carry: draw policy_delay batches, take each of the `updates`."""

    def learn(carry, data, beta):
        state, replay, batches, metrics = carry["state"], carry.get("replay"), [], {}
        for step in (state.step + j for j in range(args.policy_delay)):
            key = jax.random.split(purpose_key(state.seed, "update", step))[0]
            seen = replay and replay | {"added": visible_rows(args, replay, step)}
            batch = sample_chunks(
                key, data, seen, args.batch_size, args.horizon_length, args.gamma,
                limit=args.buffer_size, stride=args.num_envs,
            )  # fmt: skip
            scaled = {k: (batch[k] - state.obs_mean) / state.obs_std for k in ("obs", "next_obs")}
            batches.append(batch | scaled)
        for update in updates:
            key = jax.random.split(purpose_key(state.seed, "update", state.step))[1]
            state, info = update(state, batches, key, beta)
            metrics |= info
        sums = add_sums(carry["sums"], metrics, args.policy_delay)
        return carry | {"state": state, "sums": sums}

    return learn


def make_act(nets, args, random=False):
    """act(state, obs (E, D), time) -> chunks (E, H, A) at online step `time`, the policy's or
    `random` ones, uniform over the action box."""
    policy = make_policy(nets, args)

    def act(state, obs, time):
        key, rows = purpose_key(state.seed, "act", time), len(obs)
        if random:
            actions = jax.random.uniform(key, (rows, 1, nets.dim), minval=-1, maxval=1)
            return args.action_scale * actions
        chunks = jax.vmap(policy, in_axes=(None, 0, 0))(state, obs, jax.random.split(key, rows))
        return chunks.reshape(rows, args.horizon_length, -1)

    return act


def make_phases(task, env, data, nets, args, sizes):
    """The offline phases and, if asked for, the online ones: without updates, then with them."""
    update, clone = (per_arm(make_update, nets, args, clone) for clone in (False, True))
    offline = [("offline", 0, args.offline_steps, clone, update)]
    if args.offline_schedule == "sequential":
        middle = round(args.bc_fraction * args.offline_steps)
        offline = [("cloning", 0, middle, clone), ("offline", middle, args.offline_steps, update)]
    phases = []
    for name, start, end, *updates in offline:
        learn = per_arm(make_learn, nets, args, *updates)
        program = Program(learn, data, jnp.float32(args.beta))
        phases += [Phase(name, start, end, program)] * (start < end)
    act, (steps, groups) = per_arm(make_act, nets, args), block_size(args)
    learn, overlap = per_arm(make_learn, nets, args, update), args.num_envs > 1
    learn = repeat(learn, groups)
    play = Play(act, learn, steps, args.horizon_length, args.sparse, learn_first=overlap)
    first_act = per_arm(make_act, nets, args, True) if args.mode == "online" else act
    warm_up = play._replace(act=first_act, learn=None, steps=1, count=False)
    first, steps = whole_blocks(args, env)
    rows, args = ring_rows(args), dataclasses.replace(args, online_steps=steps)
    inputs = data, jnp.float32(args.beta_online)
    return phases + online_phases(task, env, play, args, rows, sizes, inputs, warm_up, first)


def train(args, task):
    """From scratch: random steps, then blocks of steps and their updates. From data: updates, steps
    of the policy without updates, then the same blocks."""
    env = make_jax_env(task, args)
    args, sizes = fit_to_env(args, task, env)
    raw, source, data = None, "none: online from scratch", None
    mean, std = jnp.zeros(sizes[0]), jnp.ones(sizes[0])
    if args.mode == "offline-to-online":
        raw, source = load_dataset(task, args)
        if args.sparse:
            raw["rewards"] = -(raw["rewards"] != 0).astype(np.float32)
        data = place(device_rows(raw), len(members(args)), copy=True)
        mean, std = observation_scale(data, args)
    nets = make_networks(args, sizes[1])
    phases = make_phases(task, env, data, nets, args, sizes)
    carry = start_carry(args, data, nets, start_states(args, *sizes, mean, std))
    carry, progress = resume(carry, phases, args)
    policies = evaluation_policies(nets, args)
    run = Run(args, task, source, raw, policies, progress)
    evaluate = make_evaluate(task, env, policies, args)
    run.finish(train_loop(run, carry, phases, evaluate, nets))


def evaluation_policies(nets, args):
    """How to act in evaluation: with the policy's noise (the published numbers' way) or without."""
    policy = per_arm(make_policy, nets, args)
    return dict(stochastic=policy, deterministic=functools.partial(policy, deterministic=True))


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


# ---- this script's tasks and flags ----
from fractions import Fraction

from gymnasium.envs.phys2d.pendulum import PendulumFunctional


class Pendulum(PendulumFunctional):
    """Gymnasium's functional pendulum with the time limit of its registered version.

    Swing up and balance; it never terminates. A good policy returns about -150, a random one
    about -1200.
    """

    max_episode_steps = 200


JAX_ENVS = {"phys2d/Pendulum-v0": Pendulum}  # built-in environments beside the point mazes
FREE_ALSO = ()  # flags that may still change when a run without online phase is resumed
EVALUATION_FLAGS = ()  # flags that may change with --evaluate
ONLY_FROM_DATA = ("dataset", "offline_steps", "horizon_length", "normalize_obs", "beta")
ONLY_FROM_DATA += ("beta_online", "bc_space", "offline_schedule", "bc_fraction")


@each_arm
def resolve(args, task):
    """Fill what no flag set from the tables; refuse what is out of range or contradictory."""
    has_data = bool(task.dataset or args.dataset or "data" in task.parts)
    mode = args.mode or ("offline-to-online" if has_data else "online")
    from_data = mode == "offline-to-online"
    if from_data and not has_data:
        raise UserError(f"{task.name} has no data: give --dataset FILE.npz, or use --mode online")
    for name in () if from_data else ONLY_FROM_DATA:
        if getattr(args, name) not in (None, PAPER[mode].get(name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no meaning with --mode {mode}; leave it out")

    table = task_table(task, PAPER[mode])
    args = fill(args, mode=mode, policy=table["policy"])
    gaussian, drift = args.policy == "gaussian", args.drift_correction
    args = fill(args, critic="plain" if gaussian else table["critic"])
    if not from_data:
        table = task_table(task, PAPER[mode] | (PLAIN if args.critic == "plain" else {}))
        table |= {k: PAPER[mode].get(k) for k in ONLY_FROM_DATA}
    elif args.beta is None and "beta" not in table:
        table["beta"] = 100.0
        print(f"beta for {task.base} is not published: {table['beta']:g}; see --beta")
    args = fill(args, **table)
    sigma, ent_coef = 0.10 if drift else 0.05, 0.2 if args.autotune else 0.0
    args = fill(args, sigma=sigma, ent_coef=ent_coef, beta_online=args.beta)
    args = fill(args, sigma_inference=0.02 if from_data and not drift else args.sigma)
    if gaussian:  # its one draw is the first, without Euler steps
        args = dataclasses.replace(args, flow_steps=0)

    check_numbers(args, unbounded=("target_entropy",), zero=("learning_starts", "flow_steps"))
    fixed, fraction, widths = args.noise == "fixed", args.bc_fraction or 0, args.critic_hidden_dims
    steps, rows = args.offline_steps + args.online_steps, args.num_envs * args.horizon_length
    never = not from_data and args.online_steps <= args.learning_starts
    late = args.renorm_time and (from_data or args.policy != "mlp")
    dense = args.sparse and not has_data
    odd, cold = args.d_model % 4 or args.hidden_dim % 2, args.autotune and not args.ent_coef
    wrong = {
        "--policy gaussian exists with --mode online alone": from_data and gaussian,
        f"--critic {args.critic} has no meaning here": from_data != (args.critic == "layer"),
        "--critic-hidden-dims needs layers of units": min(widths, default=0) < 1,
        "--flow-steps must be at least 1": args.flow_steps < 1 and not gaussian,
        "--d-model must be a multiple of 4 and --hidden-dim of 2": odd,
        "nothing to train: give --offline-steps or --online-steps": steps == 0,
        "nothing to train: --online-steps must exceed --learning-starts": never,
        "--buffer-size must hold --horizon-length rows per environment": args.buffer_size < rows,
        f"--utd is {args.utd:g}, but must be at least 0.001": args.utd < 0.001,
        f"--bc-fraction is {fraction:g}, but must be between 0 and 1": fraction > 1,
        "--sparse is for tasks with data, whose rewards are at most 0": dense,
        "--renorm-time is for --policy mlp with --mode online alone": late,
        "--policy gaussian learns its deviation; leave out --noise": gaussian and (fixed or drift),
        "--drift-correction needs fixed noise; add --noise fixed": drift and not fixed,
        "--sigma and --sigma-inference must be above 0": not min(args.sigma, args.sigma_inference),
        "--autotune starts from --ent-coef, which must be above 0": cold,
    }
    for sentence, is_wrong in wrong.items():
        need(not is_wrong, sentence)
    return args


def update_rate(args):
    """Critic updates per step of all environments, a fraction."""
    return args.num_envs * Fraction(args.utd).limit_denominator(1000)


def block_size(args):
    """(steps of all environments, actor updates) of the shortest block with a whole number of both.
    With one environment, three steps and then three critic updates and one of the actor equal step
    after step: the same actor acts, and each update sees the rows that it would have seen."""
    actor_rate = update_rate(args) / args.policy_delay
    return actor_rate.denominator, actor_rate.numerator


def visible_rows(args, replay, step):
    """Rows that existed when critic update number `step`, in the middle of a block, was due."""
    (steps, groups), rate = block_size(args), update_rate(args)
    offline = args.policy_delay * args.offline_steps  # updates before
    offline *= 2 if args.offline_schedule == "interleaved" else 1
    number = (step - offline) % (groups * args.policy_delay)  # of the update in its block
    due = ((number + 1) * rate.denominator - 1) // rate.numerator  # at which of its steps
    return replay["added"] - args.num_envs * (steps - 1 - due)


def whole_blocks(args, env):
    """(online steps before learning starts, all of them), rounded up: to steps of all environments,
    then to whole blocks. Where updates overlap with the first step of a block and there is no
    dataset, a block of rows must be there before."""
    up = lambda steps, unit: -(-steps // unit) * unit
    block, online = args.num_envs * block_size(args)[0], args.mode == "online"
    first = up(min(args.learning_starts, args.online_steps), args.num_envs)
    first = max(first, block) if env is None and args.num_envs > 1 and online else first
    return first, first + up(max(args.online_steps - first, int(online)), block)


def ring_rows(args):
    """Rows of the replay: those an update may see, and those that the rest of its block adds."""
    rows = min(args.online_steps, args.buffer_size)
    return rows + -rows % args.num_envs + args.num_envs * block_size(args)[0]


def start_carry(args, data, nets, state):
    """States of all seeds, and metric sums of all that a learn step of any phase reports."""
    kinds = (False,) if data is None else (False, True)
    updates = (per_arm(make_update, nets, args, clone) for clone in kinds)
    learn = per_arm(make_learn, nets, args, *updates)
    if data is None:  # a row in its place: of what is learned only the names are taken
        data = make_replay(1, state.obs_mean.shape[-1], nets.dim)["rows"]
    return dict(state=state, sums=zero_sums(learn, {"state": state}, data, jnp.float32(0)))


def entropy_ceiling(args, dim):
    """Largest entropy of a path with fixed noise; the action's Jacobian only lowers it."""
    step = jnp.log(step_std(args, args.sigma)) * args.flow_steps
    draws = (args.flow_steps + 1) / 2 * jnp.log(2 * jnp.pi * jnp.e)
    return float(dim * (draws + step + jnp.log(args.action_scale)))


def fit_to_env(args, task, env):
    """Settle what depends on the environment -> (args, (observation size, action size))."""
    spaces = env or ask(make_host_env, task, args.success_timing)
    obs, box = spaces.observation_space, spaces.action_space
    if env is None:
        spaces.close()
    if not all(isinstance(s, gymnasium.spaces.Box) and len(s.shape) == 1 for s in (obs, box)):
        raise UserError(f"{task.name} has {obs} and {box}: choose a task where both are vectors")
    args = fill(args, action_scale=float(box.high[0]))
    scale = args.action_scale
    if not (scale < np.inf and np.allclose(box.low, -scale) and np.allclose(box.high, scale)):
        raise UserError(
            f"--action-scale is {scale:g}, but {task.name} has the box {box}: leave it out, or "
            "choose a task with one and the same scale in each dimension"
        )
    return fit_to_sizes(args, obs.shape[0], box.shape[0]), (obs.shape[0], box.shape[0])


@each_arm
def fit_entropy(args, act_dim):
    """What depends on the size of the action: the target entropy."""
    if not args.autotune:
        return args
    if args.mode == "offline-to-online" and args.target_entropy is None:
        raise UserError("--autotune needs --target-entropy with --mode offline-to-online")
    asked, ceiling = args.target_entropy, entropy_ceiling(args, args.horizon_length * act_dim)
    args = fill(args, target_entropy=-float(act_dim) if args.policy == "gaussian" else 0.0)
    if args.noise == "fixed" and args.target_entropy >= ceiling:
        reach = f"--target-entropy {args.target_entropy:g} cannot be reached with fixed noise"
        reach += f", whose entropy is at most {ceiling:.4f}: "
        if asked is None:
            raise UserError(f"{reach}lower it, raise --sigma, or ask for it by that flag")
        print(f"{reach}alpha can only grow")
    return args


def fit_to_sizes(args, obs_dim, act_dim):
    """What depends on the sizes of observation and action: target entropy, memory."""
    args, number = fit_entropy(args, act_dim), len(members(args))
    size = 4e-9 * number * ring_rows(args) * (2 * obs_dim + act_dim + 3)
    on_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = 1e-9 * (jax.devices()[0].memory_stats() or {}).get("bytes_limit", on_host)
    if size > memory * jax.device_count():
        raise UserError(
            f"the replay of {number} seed(s) takes {size:.1f} GB, and the device has "
            f"{memory:.1f}: lower --buffer-size or --num-seeds"
        )
    return args


# endregion


if __name__ == "__main__":
    sys.exit(command_line(main, Args))
