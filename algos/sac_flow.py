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

Online (--mode online, tasks without data), every step of the environment
  critic        y = sg[r + gamma (1 - terminated) (min_c Q_c(s', a') - alpha log p')]
                L_critic = 1/2 sum_c mean (Q_c(s, a) - y)^2,  (s, a) and (s', a') in ONE pass
                through BatchRenorm critics without target network  (plain: with one, no 1/2)
  actor         L_actor = mean (alpha log p - min_c Q_c(s, a)),  every --policy-delay updates
  temperature   L_alpha = alpha (H - H_target),  H = -mean sg[log p]

Offline-to-online (--mode offline-to-online, tasks with data), chunks of H actions played open loop
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

ALGO = "sac_flow"


@dataclasses.dataclass(frozen=True)
class Args:
    # ---- experiment ----
    env_id: str = "phys2d/Pendulum-v0"
    """task: a Gymnasium id (phys2d/Pendulum-v0, HalfCheetah-v5), an OGBench single-task id, a short
    name (cube-double-task3, pointmaze-medium), or FILE.py:NAME, a task file"""
    mode: Literal["online", "offline-to-online"] | None = None
    """from scratch (tasks without data) or from a dataset and then online (tasks with data)"""
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
    env_backend: Literal["auto", "jax", "host", "mjx"] = "auto"
    """jax: vmapped environment inside the program (pendulum, point mazes); host: the official
    environment through gymnasium.vector; auto: jax where it exists, else host; mjx: MuJoCo tasks
    (v5) vmapped inside the program, for a GPU (far slower than host on a CPU)"""
    success_timing: Literal["post", "pre"] = "post"
    """OGBench: reward and success after the action (post, as published) or before it (pre)"""
    dataset: str | None = None  # transitions of your own: FILE.npz or FILE.hdf5 (see README)
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    num_envs: int | None = None
    """parallel environments per seed (published: 1); a block of steps of all, the fewest whose
    num-envs * utd updates each are a multiple of policy-delay, is followed by its updates, and only
    they change the policy that acts"""
    action_scale: float | None = None
    """half width of the action box (default: what the environment says)"""
    normalize_obs: bool | None = None
    """offline-to-online: standardise observations with the dataset's mean and deviation"""
    sparse: bool | None = None  # offline-to-online: every non-zero reward becomes -1

    # ---- schedule ----
    offline_steps: int | None = None  # offline-to-online: offline iterations (published: 1,000,000)
    online_steps: Annotated[int | None, tyro.conf.arg(aliases=["--total-timesteps"])] = None
    """environment steps, those before learning starts included, rounded up to whole blocks (see
    num-envs; published: 1,000,000)"""
    learning_starts: int | None = None
    """online steps before the first online update, rounded up to steps of all environments: random
    actions in --mode online (at least a block, if several official environments run while updates
    are made), the policy's own offline-to-online"""
    log_interval: Annotated[int | None, tyro.conf.arg(aliases=["--updates-per-dispatch"])] = (
        None  # log the metrics' mean over this many steps
    )
    eval_interval: Annotated[int | None, tyro.conf.arg(aliases=["--eval-freq"])] = None
    """evaluate every this many steps and at the end of each phase"""
    eval_episodes: int | None = None  # episodes per evaluation, mode of acting and seed
    checkpoint_interval: int | None = None
    """checkpoint every this many steps and at the end; official environments begin new episodes
    there"""
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
        autotune=True, ent_coef=0.2, log_interval=500, eval_interval=25_000, eval_episodes=10,
        checkpoint_interval=100_000, offline_steps=0, horizon_length=1, normalize_obs=False,
        sparse=False,
    ),
    "offline-to-online": dict(  # [code], [qc]
        offline_steps=1_000_000, online_steps=1_000_000, learning_starts=5_000, batch_size=256,
        gamma=0.99, num_envs=1, actor_lr=3e-4, critic_lr=3e-4, alpha_lr=3e-4, adam_b1=0.9,
        tau=0.005, policy_delay=1, hidden_dim=512, d_model=128,
        critic_hidden_dims=(512, 512, 512, 512), policy="flow-t", noise="fixed", autotune=False,
        action_scale=1.0, log_interval=500, eval_interval=100_000, eval_episodes=50,
        checkpoint_interval=100_000, horizon_length=5, normalize_obs=False, sparse=False,
        bc_space="action", offline_schedule="interleaved", bc_fraction=0.25,
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
    if args.mode == "online":
        loss = ((q - y) ** 2).sum(axis=0).mean() * (0.5 if args.critic == "brn" else 1.0)
    else:  # 0 where an episode ended inside the chunk
        loss = (batch["valid"][:, -1] * (q - y) ** 2).mean()
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


def actor_step(state, critic, batch, key, beta, nets, args):
    """One Adam step of the actor up the critic (params, stats), then one of the temperature."""
    alpha = temperature(state, args)
    grads, (info, stats) = jax.grad(actor_loss, has_aux=True)(
        state.params["actor"], state.stats["actor"], nets, args, batch, critic, alpha, beta, key
    )
    state = descend(state, "actor", grads, args)
    state = state.replace(stats=state.stats | {"actor": stats})
    if args.autotune:
        log_alpha = state.params["log_alpha"]
        grads = jax.grad(temperature_loss)(log_alpha, info["entropy"], args.target_entropy)
        state = descend(state, "log_alpha", grads, args)
    return state, info | {"alpha": alpha}


def clone_step(state, batch, key, nets, args):
    """One Adam step of the actor by flow matching."""
    actor = (state.params["actor"], state.stats["actor"], nets, args, batch, key)
    grads, (info, _) = jax.grad(flow_matching_loss, has_aux=True)(*actor)
    return descend(state, "actor", grads, args), info


def make_update(nets, args, clone=False):
    """update(state, batches, key, beta) -> (state, metrics): a critic step on each of policy_delay
    batches, then one of actor and temperature on the last (`clone`: one of flow matching).

    batch: obs, next_obs (B, D), actions (B, H * A), returns, discounts (B,), and of chunks also
    valid (B, H); see `sample` and `sample_chunks`. Offline-to-online both are one joint step: the
    actor climbs the critic as it was before.
    """

    def update(state, batches, key, beta):
        actor_key, *keys = jax.random.split(key, len(batches) + 1)
        infos = []
        for batch, critic_key in zip(batches, keys, strict=True):
            before = state
            state, info = critic_step(state, batch, critic_key, nets, args)
            infos.append(info)
        if clone:
            state, info = clone_step(state, batches[-1], actor_key, nets, args)
        else:
            at = state if args.mode == "online" else before
            critic = at.params["critic"], at.stats["critic"]
            state, info = actor_step(state, critic, batches[-1], actor_key, beta, nets, args)
        return state, jax.tree.map(lambda *x: sum(x) / len(x), *infos) | info

    return update


def make_policy(nets, args):
    """policy(state, obs, key, deterministic=False): raw observation (D,) -> the actions (H * A,) of
    the next H steps."""

    def policy(state, obs, key, deterministic=False):
        obs = ((obs - state.obs_mean) / state.obs_std)[None]
        actor = (state.params["actor"], state.stats["actor"], nets, args, obs)
        if deterministic:
            path, _ = rollout(*actor, None, args.sigma_inference)
            return args.action_scale * jnp.tanh(path.x[-1, 0])
        return sample_action(*actor, key, args.sigma_inference)[0][0]

    return policy


# ---- training ----
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of seeds, which a
# program's steps do not see. Always: state, a TrainState, and sums, the metrics since the last log.
# Online also: replay, a ring of C rows = {obs, next_obs (C, D), actions (C, A), rewards, masks,
# terminals (C,)} and added, their number so far; returns (E,) of the episodes under way; recent,
# the last 20 episodes' returns; and on JAX environments envs: their states, the chunks (E, H, A) of
# actions being played, and how many of each are taken (E,).
def block_steps(args):
    """Steps of all environments after which a whole number of actor updates is due. With one
    environment, three steps and then three critic updates and one of the actor equal step after
    step: the actor that acts is the same, and each update sees the rows that it would have seen."""
    return int(args.policy_delay // np.gcd(args.policy_delay, args.num_envs * args.utd))


def make_learn(nets, args, *updates):
    """learn(carry, data, beta, first=0) -> carry: draw policy_delay batches and take each of the
    `updates` on them; the first batch is that of critic update `first` of its block."""

    def draw(key, data, replay, number):
        if replay is not None:  # the rows that existed at the step of that critic update
            later = block_steps(args) - 1 - number // (args.num_envs * args.utd)
            replay = replay | {"added": replay["added"] - args.num_envs * later}
        if data is None:
            return sample(key, replay, args.batch_size, args.gamma, args.buffer_size)
        return sample_chunks(
            key, data, replay, args.batch_size, args.horizon_length, args.gamma,
            limit=args.buffer_size, stride=args.num_envs,
        )  # fmt: skip

    def learn(carry, data, beta, first=0):
        state, replay, batches, metrics = carry["state"], carry.get("replay"), [], {}
        for j in range(args.policy_delay):
            key = jax.random.split(purpose_key(state.seed, "update", state.step + j))[0]
            batch = draw(key, data, replay, first + j)
            for name in ("obs", "next_obs"):
                batch[name] = (batch[name] - state.obs_mean) / state.obs_std
            batches.append(batch)
        for update in updates:
            key = jax.random.split(purpose_key(state.seed, "update", state.step))[1]
            state, info = update(state, batches, key, beta)
            metrics |= info
        sums = add_sums(carry.get("sums"), metrics, args.policy_delay)
        return carry | {"state": state, "sums": sums}

    return learn


def make_learn_block(nets, args):
    """learn_block(carry, data, beta) -> carry: all updates of a block of the online phase."""
    learn = make_learn(nets, args, make_update(nets, args))
    groups = block_steps(args) * args.num_envs * args.utd // args.policy_delay

    def learn_block(carry, data, beta):
        def body(g, part):  # without the replay, which they only read
            after = learn(carry | part, data, beta, g * args.policy_delay)
            return {k: after[k] for k in part}

        return carry | jax.lax.fori_loop(0, groups, body, {k: carry[k] for k in ("state", "sums")})

    return learn_block


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
    update, clone = make_update(nets, args), make_update(nets, args, clone=True)
    offline = [("offline", 0, args.offline_steps, clone, update)]
    if args.offline_schedule == "sequential":
        middle = round(args.bc_fraction * args.offline_steps)
        offline = [("cloning", 0, middle, clone), ("offline", middle, args.offline_steps, update)]
    phases = []
    for name, start, end, *updates in offline:
        program = Program(make_learn(nets, args, *updates), data, jnp.float32(args.beta or 0))
        phases += [Phase(name, start, end, program)] * (start < end)
    if not args.online_steps:
        return phases
    act, random = make_act(nets, args), make_act(nets, args, random=True)
    chunks = dict(horizon=args.horizon_length, sparse=args.sparse)
    block = make_learn_block(nets, args), block_steps(args)
    play = Play(act, *block, **chunks, learn_first=args.num_envs > 1)
    warm_up = Play(random if args.mode == "online" else act, None, **chunks, count=False)
    first, steps = whole_blocks(args, env)
    inputs = data, jnp.float32(args.beta_online or 0)
    args = dataclasses.replace(args, online_steps=steps)
    return phases + online_phases(
        task, env, play, args, ring_rows(args), sizes, inputs, warm_up, first
    )


def start_carry(args, data, nets, state):
    """States of all seeds, and metric sums of all that a learn step of any phase reports."""
    carry, updates = {"state": state}, [make_update(nets, args)]
    if data is None:  # of an update from the replay, which is not there yet
        replay = lambda seed: make_replay(1, state.obs_mean.shape[-1], nets.dim)
        carry["replay"] = jax.vmap(replay)(state.seed)
    else:
        updates.append(make_update(nets, args, clone=True))
    learn = make_learn(nets, args, *updates)
    return dict(state=state, sums=zero_sums(learn, carry, data, jnp.float32(0)))


def train(args, task):
    """Online: random steps, then blocks of steps and their updates. Offline-to-online: offline,
    steps without updates, then the same blocks."""
    env = make_jax_env(task, args)
    args, sizes = fit_to_env(args, task, env)
    raw, source, data = None, "none: online from scratch", None
    mean, std = jnp.zeros(sizes[0]), jnp.ones(sizes[0])
    if args.mode == "offline-to-online":
        raw, source = load_dataset(task, args)
        if args.sparse:
            raw["rewards"] = -(raw["rewards"] != 0).astype(np.float32)
        data = place(device_rows(raw), args.num_seeds, copy=True)
        mean, std = observation_scale(data, args)
    nets = make_networks(args, sizes[1])
    phases = make_phases(task, env, data, nets, args, sizes)
    carry = start_carry(args, data, nets, start_states(args, *sizes, mean, std))
    carry, step = resume(carry, phases, args)
    policies = evaluation_policies(nets, args)
    run = Run(args, task, source, raw, policies, step)
    evaluate = make_evaluate(task, env, policies, args)
    run.finish(train_loop(run, carry, phases, evaluate, nets))


def evaluation_policies(nets, args):
    """How to act in evaluation: with the policy's noise (the published numbers' way) or without."""
    policy = make_policy(nets, args)
    return dict(stochastic=policy, deterministic=functools.partial(policy, deterministic=True))


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
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import shlex
import shutil
import signal
import subprocess
import textwrap
import urllib.request
import zlib
from types import MappingProxyType

from gymnasium.experimental.functional import FuncEnv
from tqdm import tqdm

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


def ask(function, *inputs, failing=""):
    """Call a function; what it raises for the user becomes one sentence."""
    try:
        return function(*inputs)
    except (ValueError, OSError, ImportError, SyntaxError, gymnasium.error.Error) as e:
        raise UserError(failing + " ".join(str(e).split())) from e


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
    for part in ("initial", "transition", "max_episode_steps") * ("env" in parts):
        need(hasattr(parts["env"], part), f"the 'env' of {path} lacks '{part}'; see README")
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
RANKS = dict(terminals=1, observations=2, actions=2, next_observations=2, rewards=1, masks=1)


def load_dataset(task, args):
    """Transitions of a task -> (dict of float32 arrays, source).

    Keys: observations, next_observations (N, D), actions (N, A), rewards, masks (0 after success),
    terminals (1 at an episode's last row), each (N,). From --dataset, from the task file, or from
    `dataset_dir`: an official or a collected file, else a download, else data collected here.
    """
    if args.dataset:
        path = Path(args.dataset).expanduser()
        data, source = read_file(path), f"own ({path.name})"
    elif "data" in task.parts:
        data, source = ask(task.parts["data"])
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
    return {k: np.asarray(data[k], np.float32) for k in RANKS}, source


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
    check(raw, what, "terminals", "observations", "actions", *(RANKS.keys() & raw))
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
        x, rank = np.asarray(data[key]), RANKS.get(key, 2)
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


def sample(key, replay, batch_size, gamma, limit):
    """Batch of obs, actions, returns, discounts, next_obs, i.i.d. and uniform over the `limit`
    newest rows of the ring."""
    rows, added = replay["rows"], replay["added"]
    count = jnp.minimum(added, limit)
    draw = jax.random.randint(key, (batch_size,), 0, count)
    index = (added - count + draw) % rows["rewards"].shape[0]
    batch = {k: rows[k][index] for k in ("obs", "actions", "next_obs")}
    return batch | dict(returns=rows["rewards"][index], discounts=gamma * rows["masks"][index])


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
    learn_first: bool = True  # official environments: learn while they take the block's first step


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
        ended = {"episodes": done, "success": done * out["success"], "return": done * returns}
        sums = sums | {k: sums[k] + v.astype(jnp.float32).sum() for k, v in ended.items()}
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
    """Blocks on official environments, E per seed: advance(carry, n) -> carry.

    The simulators take a step while the device makes the updates of a block, which see the rows
    before that step (`learn_first`); else the updates come after the block's last step.
    """

    seconds = property(lambda self: self.learn.seconds)  # that compiling took

    def __init__(self, make_envs, play, args, inputs):
        self.make_envs, self.play, self.args = make_envs, play, args
        self.learn = Program(play.learn, *inputs)
        split = lambda x: x.reshape(args.num_seeds, args.num_envs, *x.shape[1:])

        def act(state, obs, added, i):  # at the i-th step of a block
            chunks = jax.vmap(play.act)(state, split(obs), added + i * args.num_envs)
            return jax.lax.collapse(chunks, 0, 2)

        def keep(carry, step):
            put = jax.vmap(functools.partial(remember, play=play))
            return put(carry, *jax.tree.map(split, step)), None

        self.act, keep_all = jax.jit(act), lambda carry, steps: jax.lax.scan(keep, carry, steps)[0]
        self.keep = jax.jit(keep_all, donate_argnums=0)

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        args, replay, time = self.args, carry["replay"], int(carry["replay"]["added"][0])
        ids = [(args.seed + s, time, e) for s, e in np.ndindex(args.num_seeds, args.num_envs)]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.envs, self.chunks, self.taken = self.make_envs(), 0.0, np.zeros(len(ids), int)
        self.obs, _ = self.envs.reset(seed=seeds)
        # what was under way ends here: no window may join it with what comes
        terminals = replay["rows"]["terminals"]
        newest = (time - 1 - np.arange(args.num_envs)) % terminals.shape[1]
        terminals = terminals.at[:, newest].set(1.0)  # before the first row: never read
        replay = replay | {"rows": replay["rows"] | {"terminals": terminals}}
        return carry | {"replay": replay, "returns": jnp.zeros_like(carry["returns"])}

    def __call__(self, carry, n):
        play = self.play
        for _ in range(n):
            steps = []
            for i in range(play.steps):
                if (due := self.taken == 0).any():
                    new = self.act(carry["state"], self.obs, carry["replay"]["added"], i)
                    self.chunks = np.where(due[:, None, None], new, self.chunks)
                actions = self.chunks[np.arange(len(due)), self.taken]
                self.envs.step_async(actions)
                if play.learn and play.learn_first and i == 0:
                    carry = self.learn(carry, 1)  # returns before it is done
                obs = self.obs
                self.obs, reward, terminated, truncated, info = self.envs.step_wait()
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
    num_envs, count, start = args.num_envs, args.num_seeds * args.num_envs, args.offline_steps
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    make_envs = functools.cache(lambda: make_host_envs(task, args, count, same_step))

    def begin(seed):
        new = dict(replay=make_replay(rows - rows % num_envs, *sizes))
        new |= dict(returns=jnp.zeros(num_envs), recent=jnp.full(20, jnp.nan))
        if env is not None:  # the 1 keeps this key apart from that of the first step
            env_state = reset_envs(env, purpose_key(seed, "env", 0, 1), num_envs)
            chunks = jnp.zeros((num_envs, play.horizon, sizes[1]))
            new["envs"] = dict(state=env_state, chunks=chunks, taken=jnp.zeros(num_envs, jnp.int32))
        return new

    def phase(name, start, end, play):
        host = HostLoop(make_envs, play, args, inputs) if env is None else None
        loop, restart = host or Program(interact(env, play), *inputs), host and host.restart

        def enter(carry):
            if "replay" not in carry:
                new = jax.jit(jax.vmap(begin))(carry["state"].seed)
                carry = carry | place(new, args.num_seeds)
            return restart(carry) if restart else carry

        return Phase(name, start, end, loop, enter, num_envs * play.steps, restart)

    middle, end = start + min(warm_up_steps, args.online_steps), start + args.online_steps
    phases = [("warm-up", start, middle, warm_up), ("online", middle, end, play)]
    return [phase(*parts) for parts in phases if parts[1] < parts[2]]


# ==== end shared: online ====


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


# ---- this script's tasks and flags ----
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
ONLY_OFFLINE_TO_ONLINE = ("offline_steps", "horizon_length", "normalize_obs", "sparse", "beta")
ONLY_OFFLINE_TO_ONLINE += ("beta_online", "bc_space", "offline_schedule", "bc_fraction")


def resolve(args, task):
    """Fill what no flag set from the tables; refuse what is out of range or contradictory."""
    with_data = bool(task.dataset or args.dataset or "data" in task.parts)
    mode = "offline-to-online" if with_data else "online"
    if args.mode not in (None, mode):
        kind = "data" if with_data else "no data (--dataset FILE.npz gives it some)"
        raise UserError(f"{task.name} has {kind}: use --mode {mode}, or another --env-id")
    for name in ONLY_OFFLINE_TO_ONLINE if mode == "online" else ("critic",):
        if getattr(args, name) not in (None, PAPER["online"].get(name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no meaning with --mode {mode}; leave it out")
    if mode == "offline-to-online" and args.policy == "gaussian":
        raise UserError(
            "--policy gaussian exists with --mode online alone; use flow-g, flow-t, mlp"
        )

    defaults, table = PAPER[mode], task_table(task, PAPER[mode])
    if mode == "online":
        gaussian = (args.policy or table["policy"]) == "gaussian"
        args = fill(args, critic="plain" if gaussian else "brn")
        table = task_table(task, defaults | (PLAIN if args.critic == "plain" else {}))
        table |= {k: defaults.get(k) for k in ONLY_OFFLINE_TO_ONLINE}
    elif args.beta is None and "beta" not in table:
        table["beta"] = 100.0
        print(f"beta for {task.base} is not published: {table['beta']:g}; see --beta")
    if args.autotune and not args.ent_coef and mode == "offline-to-online":
        table["ent_coef"] = 0.2
    if args.drift_correction:
        table |= dict(sigma=0.10, sigma_inference=0.10)
    args = fill(args, mode=mode, **own_flags(table))
    args = fill(args, sigma=0.05, ent_coef=0.0, beta_online=args.beta)
    args = fill(args, sigma_inference=0.02 if with_data else args.sigma)

    check_numbers(args, unbounded=("target_entropy",), zero=("learning_starts",))
    if min(args.critic_hidden_dims, default=0) < 1:
        raise UserError("--critic-hidden-dims needs layers of at least one unit")
    if args.d_model % 4 or args.hidden_dim % 2:
        raise UserError("--d-model must be a multiple of 4 and --hidden-dim of 2")
    if args.offline_steps + args.online_steps == 0:
        raise UserError("nothing to train: give --offline-steps or --online-steps")
    if mode == "online" and args.online_steps <= args.learning_starts:
        raise UserError("nothing to train: --online-steps must exceed --learning-starts")
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


def whole_blocks(args, env):
    """(online steps before learning starts, all of them), rounded up: to steps of all environments,
    then to whole blocks. Where updates overlap with the first step of a block and there is no
    dataset, a block of rows must be there before."""
    up = lambda steps, unit: -(-steps // unit) * unit
    block = args.num_envs * block_steps(args)
    first = up(min(args.learning_starts, args.online_steps), args.num_envs)
    if env is None and args.num_envs > 1 and args.mode == "online":
        first = max(first, block)
    learning = max(args.online_steps - first, 1 if args.mode == "online" else 0)
    return first, first + up(learning, block)


def ring_rows(args):
    """Rows of the replay: those an update may see, and those that the rest of its block adds."""
    rows = min(args.online_steps, args.buffer_size)
    return rows + -rows % args.num_envs + block_steps(args) * args.num_envs


def entropy_ceiling(args, dim):
    """Largest entropy of a path with fixed noise; the action's Jacobian only lowers it."""
    step = jnp.log(step_std(args, args.sigma)) * args.flow_steps
    draws = (args.flow_steps + 1) / 2 * jnp.log(2 * jnp.pi * jnp.e)
    return float(dim * (draws + step + jnp.log(args.action_scale)))


def fit_to_env(args, task, env):
    """Settle what depends on the environment -> (args, (observation size, action size))."""
    try:
        spaces = env or ask(make_host_env, task, args.success_timing)
    except gymnasium.error.Error as e:  # say, a package that this environment needs
        raise UserError(" ".join(str(e).split())) from e
    obs, box, vector = spaces.observation_space, spaces.action_space, gymnasium.spaces.Box
    if env is None:
        spaces.close()
    if not all(isinstance(space, vector) and len(space.shape) == 1 for space in (obs, box)):
        raise UserError(f"{task.name} has observations {obs} and actions {box}: choose a task "
                        "where both are vectors")  # fmt: skip
    args = fill(args, action_scale=float(box.high[0]))
    scale = args.action_scale
    if not (scale < np.inf and np.allclose(box.low, -scale) and np.allclose(box.high, scale)):
        raise UserError(
            f"--action-scale is {scale:g}, but {task.name} has the box {box}: leave it out, or "
            "choose a task with one and the same scale in each dimension"
        )
    return fit_to_sizes(args, obs.shape[0], box.shape[0]), (obs.shape[0], box.shape[0])


def fit_to_sizes(args, obs_dim, act_dim):
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
    on_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", on_host)
    if rows * row > memory * jax.device_count():
        raise UserError(
            f"the replay of {args.num_seeds} seed(s) takes {rows * row / 1e9:.1f} GB, and the "
            f"device has {memory / 1e9:.1f}: lower --buffer-size or --num-seeds"
        )
    return args


# endregion


if __name__ == "__main__":
    sys.exit(command_line(main, Args))
