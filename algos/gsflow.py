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
  3. The CVAE has one hidden layer by declaration: of the released one's three, which all read the
     raw input, two never receive a gradient.
  4. Every random draw has a key of its own; there, the student and the CVAE share one.
  5. --alpha works: there it is overwritten by another flag.
  6. The target critic follows the critic after its Adam step (there: before) and lives outside
     the optimiser.  No logging-only forward pass in an update.
  7. Toy evaluation works, everything is seeded, and all rows of the replay are sampled.
  8. --success-timing post is explicit, because OGBench changed its default after publication.
  9. P: tanh squashing (paper: plain Gaussian); entropy term active offline too, as in the code.

Modes
  python algos/gsflow.py                                  offline on pointmaze-medium, minutes
  python algos/gsflow.py --env-id antmaze-large           offline, the paper's settings
  python algos/gsflow.py --env-id cube-double --online-steps 1000000     offline, then online
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

ALGO = "gsflow"


@dataclasses.dataclass(frozen=True)
class Args:
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
    env_backend: Literal["auto", "jax", "host", "mjx"] = "auto"
    """jax: vmapped environment inside the program (point mazes); host: the official environment
    through gymnasium.vector; auto: jax where it exists, else host; mjx: ant mazes vmapped inside
    the program, for a GPU (far slower than host on a CPU; evaluation stays official)"""
    success_timing: Literal["post", "pre"] = "post"
    """reward and success after the action (post, as published) or before it (pre, OGBench 1.2)"""
    dataset: str | None = None  # transitions of your own: FILE.npz or FILE.hdf5 (see README)
    dataset_dir: str = "~/.ogbench/data"
    """where OGBench datasets are looked for, downloaded to or collected into"""
    num_envs: int = 1
    """parallel environments per seed in the online phase; each step of all makes num-envs rows and
    num-envs * utd updates"""
    normalize_obs: bool | None = None  # standardise observations, by the data (papers: no)

    # ---- schedule ----
    offline_steps: int | None = None  # offline gradient steps (paper: 1,000,000)
    online_steps: int = 0
    """online environment steps after the offline phase (published protocol: 1,000,000)"""
    log_interval: Annotated[int | None, tyro.conf.arg(aliases=["--updates-per-dispatch"])] = None
    """log the metrics' mean over this many steps"""
    eval_interval: int | None = None  # evaluate every this many steps and at the end of each phase
    eval_episodes: int | None = None  # episodes per evaluation and seed
    eval_teacher: bool = False  # evaluate also the teacher's best of N actions by the critic
    checkpoint_interval: int | None = None  # checkpoint every this many steps and at the end

    # ---- optimisation ----
    batch_size: int = 256  # rows per gradient step
    learning_rate: float | None = None  # Adam's step size for all networks
    tau: float | None = None  # target critic: fraction of the new critic in each step
    gamma: float | None = None  # discount
    n_step: int | None = None  # n-step TD targets, to success or episode end (papers: 1)
    hidden_dims: tuple[int, ...] | None = None  # widths of all nets that the next two leave open
    critic_hidden_dims: tuple[int, ...] | None = None  # widths of the critic
    actor_hidden_dims: tuple[int, ...] | None = None  # widths of teacher and student
    critic_layer_norm: bool = True  # LayerNorm after each activation of the critic
    actor_layer_norm: bool = False  # LayerNorm after each activation of teacher and student
    q_agg: Literal["mean", "min"] | None = None  # how the TD target joins the two target critics
    utd: int = 1  # gradient steps per environment step
    buffer_size: int = 2_000_000
    """rows of dataset plus online data that are kept; the oldest, dataset first, give way"""
    balanced_sampling: bool = False  # online batches: half dataset, half new (else uniform)

    # ---- algorithm ----
    prior: Literal["cvae", "gaussian"] = "cvae"
    """noise of teacher and student: Q-guided CVAE (GSFlow) or N(0, I) (FQL)"""
    student: Literal["gaussian", "deterministic"] = "gaussian"
    """one-step policy: tanh-Gaussian with entropy control (GSFlow) or deterministic (FQL)"""
    alpha: float | None = None  # alpha1, weight of the distillation loss
    online_alpha: float | None = None  # alpha1 in the online phase (default: the task's or --alpha)
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
    entropy: Literal["tuned", "fixed", "online", "off"] = "tuned"
    """entropy term of the Gaussian student: alpha2 tuned (GSFlow), alpha2 fixed, tuned in the
    online phase alone, none"""
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
    offline_steps=1_000_000, log_interval=500, eval_interval=100_000, eval_episodes=50,
    checkpoint_interval=100_000,
    hidden_dims=(512, 512, 512, 512), learning_rate=3e-4, tau=0.005, gamma=0.99, n_step=1,
    normalize_obs=False, q_agg="mean", alpha=10.0, fql_alpha=10.0, num_candidates=10,
)  # fmt: skip
TASK_DEFAULTS = {
    # [ours] minutes on two CPU cores. The best of 10 noises follows value differences too small to
    # be real, drifts along the walls into corners without data and stays there; that of 4 does not.
    "pointmaze": dict(
        offline_steps=8_000, eval_interval=2_000, checkpoint_interval=2_000, learning_rate=1e-3,
        hidden_dims=(128, 128, 128), tau=0.01, n_step=10, normalize_obs=True, alpha=3.0,
        fql_alpha=3.0, num_candidates=4,
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


# ---- networks ----
class MLP(nn.Module):
    """Dense layers with activation (then LayerNorm, if asked for) and a linear head."""

    hidden_dims: tuple[int, ...]
    out_dim: int
    layer_norm: bool = False
    activation: Callable = nn.gelu  # the tanh form
    kernel_init: Callable = nn.initializers.glorot_uniform()

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
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None)
        members = nn.vmap(MLP, **axes, axis_size=2)
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

    act_dim: int  # A
    latent_dim: int  # L
    critic: Callable  # (params, obs, action) -> (2, B)
    velocity: Callable  # (params, obs, x_t, t (B, 1)) -> (B, A)
    student: Callable  # (params, obs, x) -> (mu, log_std), each (B, A); deterministic: log_std None
    encoder: Callable | None = None  # (params, obs, x) -> (mean, log_std), each (B, L)
    decoder: Callable | None = None  # (params, obs, z) -> x (B, A); None: the prior is N(0, I)


def make_modules(args, act_dim):
    """Flax modules of the settings in `args`; only those that these settings train."""
    actor = (args.actor_hidden_dims, act_dim, args.actor_layer_norm)
    critic = Critic(args.critic_hidden_dims, args.critic_layer_norm)
    modules = dict(critic=critic, velocity=MLP(*actor), student=MLP(*actor))
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
    functions = {name: module.apply for name, module in make_modules(args, act_dim).items()}
    if args.student == "deterministic":
        mean = functions["student"]
        functions["student"] = lambda params, obs, x: (mean(params, obs, x), None)
    return Networks(act_dim, args.latent_dim, **functions)


def init_params(args, obs_dim, act_dim, key):
    """Trainable parameters, one entry per group: critic, velocity, student, ..."""
    obs, action = jnp.zeros((1, obs_dim)), jnp.zeros((1, act_dim))
    inputs = dict.fromkeys(("critic", "student", "encoder"), (obs, action))
    inputs["velocity"] = (obs, action, jnp.zeros((1, 1)))
    inputs["decoder"] = (obs, jnp.zeros((1, args.latent_dim)))
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


def sample_prior(params, nets, obs, key):
    """Noise x (B, A) for teacher and student: decoded latents, or N(0, I) without a decoder."""
    if nets.decoder is None:
        return jax.random.normal(key, (*obs.shape[:-1], nets.act_dim))
    z = jax.random.normal(key, (*obs.shape[:-1], nets.latent_dim))
    return nets.decoder(params["decoder"], obs, z)


def sample_action(params, nets, obs, x, temperature, key):
    """One action per row and its log-probability (None for the deterministic student)."""
    mu, log_std = nets.student(params["student"], obs, x)
    if log_std is None:
        return jnp.clip(mu, -1, 1), None
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


def student_loss(params, nets, args, batch, x, teacher_action, alpha, key, entropy=1.0):
    """Distillation to the teacher, up the critic, entropy (`entropy` 0: without); one noise x for
    all three."""
    frozen = jax.lax.stop_gradient(params)
    obs = batch["obs"]
    mu, log_std = nets.student(params["student"], obs, x)
    if log_std is None:
        action, entropy_term, info = mu, 0.0, {}
        distill = jnp.mean((mu - teacher_action) ** 2)  # before the clip
    else:
        action, u = squashed_sample(mu, log_std, 1.0, key)
        log_prob = squashed_log_prob(u, mu, log_std)
        distill = jnp.mean((jnp.tanh(mu) - teacher_action) ** 2)  # the mode, not the sample
        entropy_term = entropy * jnp.exp(frozen["log_temperature"]) * log_prob.mean()
        info = {"entropy": -log_prob.mean(), "student_std": jnp.exp(log_std).mean()}
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
    entropy: jax.Array = 1.0  # factor of the entropy terms: 1 or 0


def phase_settings(args, phase):
    """Settings of "offline" and "online"."""
    own = dict(
        offline=(args.alpha, args.offline_td_temperature),
        online=(args.online_alpha, args.online_td_temperature),
    )
    entropy = args.entropy in ("tuned", "fixed", phase)
    return PhaseSettings(*map(jnp.float32, (*own[phase], entropy)))


def optimizer(args):
    """Adam without clipping, decay or schedule."""
    return optax.adam(args.learning_rate)


def init_state(args, obs_dim, act_dim, obs_mean, obs_std, seed):
    """Fresh state of one seed."""
    params = init_params(args, obs_dim, act_dim, purpose_key(seed, "init"))
    rest = dict(obs_mean=obs_mean, obs_std=obs_std, seed=seed, step=jnp.zeros((), jnp.int32))
    return TrainState(params, params["critic"], optimizer(args).init(params), **rest)


DRAWS = ("td_prior", "td_action", "flow_noise", "flow_time", "student_prior", "student_action")
DRAWS += ("candidates", "latent")


def make_update(nets, args):
    """update(state, batch, key, settings) -> (state, metrics): one joint step of critic, teacher,
    prior, student and temperature, then the target critic.

    batch: obs, next_obs (B, D), actions (B, A), returns, discounts (B,); see `sample`.
    """
    target_entropy = args.target_entropy
    if target_entropy is None:
        target_entropy = -args.target_entropy_scale * nets.act_dim

    def update(state, batch, key, settings):
        keys = dict(zip(DRAWS, jax.random.split(key, len(DRAWS)), strict=True))
        params, obs, next_obs = state.params, batch["obs"], batch["next_obs"]
        shape = batch["actions"].shape
        entropy = 1.0 if args.entropy == "tuned" else settings.entropy

        # TD target: current student and decoder, target critic
        x_next = sample_prior(params, nets, next_obs, keys["td_prior"])
        next_action, next_log_prob = sample_action(
            params, nets, next_obs, x_next, settings.td_temperature, keys["td_action"]
        )
        next_q = aggregate(nets.critic(state.target_critic, next_obs, next_action), args.q_agg)
        if args.soft_backup:
            next_q -= entropy * jnp.exp(params["log_temperature"]) * next_log_prob
        target = batch["returns"] + batch["discounts"] * next_q

        # Teacher's actions for the student's noise and for the candidates: one chain of Euler steps
        x = sample_prior(params, nets, obs, keys["student_prior"])
        if nets.decoder is None:
            teacher_action = flow_endpoint(params, nets, obs, x, args.flow_steps)
        else:
            candidates = jax.random.normal(keys["candidates"], (args.num_candidates, *shape))
            noises = jnp.concatenate([x[None], candidates])
            stacked_obs = jnp.broadcast_to(obs, (*noises.shape[:2], obs.shape[-1]))
            actions = flow_endpoint(params, nets, stacked_obs, noises, args.flow_steps)
            teacher_action, how = actions[0], args.candidate_q_agg
            x_adv = select_noise(params, nets, obs, candidates, actions[1:], how)

        def total_loss(params):
            x0 = jax.random.normal(keys["flow_noise"], shape)
            t = jax.random.uniform(keys["flow_time"], (shape[0], 1))
            student = (batch, x, teacher_action, settings.alpha, keys["student_action"])
            losses = [critic_loss(params, nets, batch, target)]
            losses += [flow_loss(params, nets, batch, x0, t)]
            losses += [student_loss(params, nets, args, *student, entropy)]
            if "entropy" in losses[2][1]:  # a Gaussian student
                loss, info = temperature_loss(params, losses[2][1]["entropy"], target_entropy)
                losses += [(entropy * (args.entropy != "fixed") * loss, info)]
            if nets.decoder is not None:
                latent_noise = jax.random.normal(keys["latent"], (shape[0], nets.latent_dim))
                losses += [prior_loss(params, nets, args, batch, x_adv, latent_noise)]
            info = functools.reduce(lambda a, b: a | b, (info for _, info in losses))
            return sum(loss for loss, _ in losses), info

        grads, info = jax.grad(total_loss, has_aux=True)(params)
        updates, opt_state = optimizer(args).update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        target_critic = optax.incremental_update(params["critic"], state.target_critic, args.tau)
        changes = dict(params=params, target_critic=target_critic, opt_state=opt_state)
        return state.replace(**changes, step=state.step + 1), info

    return update


def make_policy(nets):
    """policy(state, obs, key, temperature) = act(s; T): raw observation (D,) -> action (A,)."""

    def policy(state, obs, key, temperature):
        prior_key, action_key = jax.random.split(key)
        obs = (obs - state.obs_mean) / state.obs_std
        x = sample_prior(state.params, nets, obs, prior_key)
        return sample_action(state.params, nets, obs, x, temperature, action_key)[0]

    return policy


def make_teacher(nets, args):
    """policy(state, obs, key): of N noises from N(0, I) the teacher's action (A,) that the critic
    likes best, which is what the prior learns to lead to."""

    def policy(state, obs, key):
        obs = jnp.broadcast_to((obs - state.obs_mean) / state.obs_std, (1, len(obs)))
        noises = jax.random.normal(key, (args.num_candidates, 1, nets.act_dim))
        stacked = jnp.broadcast_to(obs, (len(noises), *obs.shape))
        actions = flow_endpoint(state.params, nets, stacked, noises, args.flow_steps)
        return select_noise(state.params, nets, obs, actions, actions, args.candidate_q_agg)[0]

    return policy


def evaluation_policies(nets, args):
    """Mode -> (state, obs, key) -> action: the student at the evaluation's temperature, and the
    teacher if asked for."""
    student = functools.partial(make_policy(nets), temperature=args.eval_temperature)
    return {"": student} | ({"teacher": make_teacher(nets, args)} if args.eval_teacher else {})


# ---- training ----
# What a dispatch changes, the carry, is a dict of arrays with a leading axis of seeds, which a
# program's steps do not see. Always: state, a TrainState, and sums, the metrics since the last log.
# Online also: replay, a ring of C rows = {obs, next_obs (C, D), actions (C, A), rewards, masks,
# terminals (C,)} and added, their number so far; returns (E,) of the episodes under way; recent,
# the last 20 episodes' returns; and on JAX environments envs: their states, the chunks (E, H, A) of
# actions being played, and how many of each are taken (E,).
def make_learn(nets, args):
    """learn(carry, data, settings) -> carry: sample a batch and update once."""
    update = make_update(nets, args)

    def learn(carry, data, settings):
        state = carry["state"]
        batch_key, update_key = jax.random.split(purpose_key(state.seed, "update", state.step))
        batch = sample(
            batch_key, data, carry.get("replay"), args.batch_size, args.n_step, args.gamma,
            args.buffer_size, args.num_envs, args.balanced_sampling,
        )  # fmt: skip
        for name in ("obs", "next_obs"):
            batch[name] = (batch[name] - state.obs_mean) / state.obs_std
        state, metrics = update(state, batch, update_key, settings)
        return carry | {"state": state, "sums": add_sums(carry.get("sums"), metrics)}

    return learn


def make_act(nets, args):
    """act(state, obs (E, D), time) -> exploring actions (E, 1, A) at online step `time`."""
    policy = make_policy(nets)

    def act(state, obs, time):
        keys = jax.random.split(purpose_key(state.seed, "act", time), len(obs))
        one = lambda obs, key: policy(state, obs, key, args.behavior_temperature)
        return jax.vmap(one)(obs, keys)[:, None]

    return act


def train(args, task):
    """Offline, then online: one step of all environments, then num_envs * utd updates."""
    env = make_jax_env(task, args)
    raw, source = load_dataset(task, args)
    data = place(device_data(raw, args.n_step, args.gamma), args.num_seeds, copy=True)
    sizes = data["obs"].shape[1], data["actions"].shape[1]
    args = fill(args, target_entropy=-args.target_entropy_scale * sizes[1])
    nets = make_networks(args, sizes[1])
    learn = make_learn(nets, args)
    play = Play(make_act(nets, args), repeat(learn, args.num_envs * args.utd))

    offline = (data, phase_settings(args, "offline"))
    phases = [Phase("offline", 0, args.offline_steps, Program(learn, *offline))]
    if args.online_steps:
        rows = min(args.online_steps, max(args.buffer_size, len(data["obs"]) + 1))
        online = (data, phase_settings(args, "online"))
        phases += online_phases(task, env, play, args, rows, sizes, online)

    state = start_states(args, *sizes, *observation_scale(data, args))
    carry = dict(state=state, sums=zero_sums(learn, {"state": state}, *offline))
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
    """n updates, one after another, as one function."""

    def learn_block(carry, *inputs):
        def body(_, part):  # without the replay, which they only read
            after = learn(carry | part, *inputs)
            return {k: after[k] for k in part}

        return carry | jax.lax.fori_loop(0, n, body, {k: carry[k] for k in ("state", "sums")})

    return learn_block


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
        state, envs, time = carry["state"], carry["envs"], carry["replay"]["added"]
        obs, taken = observe(env, envs["state"]), envs["taken"]
        chunks = envs["chunks"]
        if play.horizon == 1:
            chunks = play.act(state, obs, time)
        else:  # open loop: a new chunk where the last one is used up
            new = lambda: play.act(state, obs, time)
            new = jax.lax.cond((taken == 0).any(), new, lambda: chunks)
            chunks = jnp.where((taken == 0)[:, None, None], new, chunks)
        actions = chunks[jnp.arange(len(taken)), taken]
        key = purpose_key(state.seed, "env", time)
        env_state, out = step_envs(env, envs["state"], actions, key)
        taken = (taken + 1) % play.horizon * ~(out["terminated"] | out["truncated"])
        carry = remember(carry, obs, actions, out, play)
        return carry | {"envs": dict(state=env_state, chunks=chunks, taken=taken)}

    def block(carry, *inputs):
        carry = jax.lax.fori_loop(0, play.steps, env_step, carry)
        return play.learn(carry, *inputs) if play.learn else carry

    return block


class HostLoop:
    """Blocks on official environments, E per seed: advance(carry, n) -> carry.

    The simulators take a step while the device makes the updates of a block, which see the rows
    before that step (`learn_first`); else the updates come after the block's last step.
    """

    def __init__(self, make_envs, play, args, inputs):
        self.make_envs, self.play, self.args = make_envs, play, args
        self.act = jax.jit(jax.vmap(play.act))
        self.learn = Program(play.learn or (lambda carry, *_: carry), *inputs)
        keep = functools.partial(remember, play=play)
        self.remember = jax.jit(jax.vmap(keep), donate_argnums=0)

    @property
    def seconds(self):
        return self.learn.seconds

    def restart(self, carry):
        """Begin new episodes whose seeds depend on the step alone, so that a run that goes on from
        a checkpoint equals one that was never interrupted."""
        args, time = self.args, int(carry["replay"]["added"][0])
        shape = (args.num_seeds, args.num_envs)
        ids = [(args.seed + s, time, e) for s, e in np.ndindex(shape)]
        seeds = [int(np.random.SeedSequence(i).generate_state(1)[0]) for i in ids]
        self.envs = self.make_envs()
        self.obs = self.envs.reset(seed=seeds)[0].astype(np.float32).reshape(*shape, -1)
        self.taken, self.chunks = np.zeros(shape, int), 0.0
        # what was under way ends here: no window may join it with what comes
        rows, size = carry["replay"]["rows"], carry["replay"]["rows"]["terminals"].shape[1]
        newest = (time - 1 - np.arange(args.num_envs)) % size
        terminals = rows["terminals"].at[:, newest].set(1.0)  # before the first row: never read
        replay = carry["replay"] | {"rows": rows | {"terminals": terminals}}
        return carry | {"replay": replay, "returns": jnp.zeros_like(carry["returns"])}

    def __call__(self, carry, n):
        play = self.play
        for i in range(n * play.steps):
            if (due := self.taken == 0).any():
                new = self.act(carry["state"], self.obs, carry["replay"]["added"])
                self.chunks = np.where(due[..., None, None], np.asarray(new), self.chunks)
            taken = self.taken[..., None, None]
            actions = np.take_along_axis(self.chunks, taken, axis=2)[:, :, 0]
            self.envs.step_async(actions.reshape(self.envs.num_envs, -1))
            if play.learn and play.learn_first and i % play.steps == 0:
                carry = self.learn(carry, 1)  # returns before it is done
            obs, out = self.obs, self.outcome()
            part = {k: carry[k] for k in ("replay", "returns", "sums", "recent")}
            carry = carry | self.remember(part, obs, actions, out)
            ended = out["terminated"] | out["truncated"]
            self.taken = np.where(ended, 0, (self.taken + 1) % play.horizon)
            if play.learn and not play.learn_first and (i + 1) % play.steps == 0:
                carry = self.learn(carry, 1)
        return carry

    def outcome(self):
        """Wait for the simulators; what `step_envs` returns of a step, each (S, E, ...)."""
        obs, reward, terminated, truncated, info = self.envs.step_wait()
        obs = obs.astype(np.float32)
        next_obs, success = obs.copy(), np.zeros(len(reward), np.float32)
        for i in np.flatnonzero(terminated | truncated):  # there, obs already starts an episode
            next_obs[i] = info["final_obs"][i]
            if "success" in info["final_info"]:
                success[i] = info["final_info"]["success"][i]
        shape, self.obs = self.obs.shape, obs.reshape(self.obs.shape)
        out = dict(reward=reward.astype(np.float32), success=success, next_obs=next_obs)
        out |= dict(terminated=terminated, truncated=truncated & ~terminated)
        return {k: v.reshape(*shape[:2], *v.shape[1:]) for k, v in out.items()}


def online_phases(task, env, play, args, rows, sizes, inputs, warm_up=None, warm_up_steps=0):
    """The online phase on JAX environments (`env`) or official ones (None); before it, if asked
    for, one without updates. `rows`: the replay's; `sizes`: of observation and action."""
    num_envs, start = args.num_envs, args.offline_steps
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP
    count = args.num_seeds * num_envs
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

        def enter(carry):
            if "replay" not in carry:
                new = jax.jit(jax.vmap(begin))(carry["state"].seed)
                carry = carry | place(new, args.num_seeds)
            return host.restart(carry) if host else carry

        advance = host or Program(interact(env, play), *inputs)
        stride, restart = num_envs * play.steps, host.restart if host else None
        return Phase(name, start, end, advance, enter, stride, restart)

    middle, end = start + min(warm_up_steps, args.online_steps), start + args.online_steps
    phases = [phase("warm-up", start, middle, warm_up)] if middle > start else []
    return [*phases, *([phase("online", middle, end, play)] if end > middle else [])]


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


# ---- this script's flags ----
JAX_ENVS = {}  # built-in environments beside the point mazes: name -> constructor
FREE_ALSO = (  # flags that may still change when a run without online phase is resumed
    "online_alpha", "online_td_temperature", "behavior_temperature", "utd", "num_envs",
    "balanced_sampling", "buffer_size",
)  # fmt: skip
EVALUATION_FLAGS = ("eval_temperature", "eval_teacher")  # flags that may change with --evaluate


def resolve(args, task):
    """Fill what no flag set from the task table; refuse what is out of range or contradictory."""
    table = task_table(task, PAPER)
    if (args.prior, args.student) == ("gaussian", "deterministic"):
        online_alpha = table.get("fql_online_alpha", table["fql_alpha"])
        table["alpha"] = online_alpha if args.online_steps else table["fql_alpha"]
    args = fill(args, **own_flags(table))
    hidden = args.hidden_dims
    args = fill(args, online_alpha=args.alpha, critic_hidden_dims=hidden, actor_hidden_dims=hidden)
    check_numbers(args, unbounded=("log_std_min", "log_std_max", "target_entropy"))
    used = [args.offline_td_temperature] * (args.offline_steps > 0)
    used += [args.online_td_temperature] * (args.online_steps > 0)
    soft = args.student == "gaussian" and min(used, default=1) > 0
    layers = "needs layers of at least one unit"
    for wrong, remedy in (
        (min(args.critic_hidden_dims, default=0) < 1, f"--critic-hidden-dims {layers}"),
        (min(args.actor_hidden_dims, default=0) < 1, f"--actor-hidden-dims {layers}"),
        (min(args.prior_hidden_dims, default=0) < 1, f"--prior-hidden-dims {layers}"),
        (args.offline_steps + args.online_steps == 0,
         "nothing to train: give --offline-steps or --online-steps"),
        (args.online_steps % args.num_envs, "--online-steps must be a multiple of --num-envs"),
        (args.log_std_min > args.log_std_max, "--log-std-min must not exceed --log-std-max"),
        (args.init_temperature <= 0, "--init-temperature must be above 0"),
        (args.entropy != "tuned" and args.student == "deterministic",
         "--entropy is of the Gaussian student, but --student is deterministic; drop one"),
        (args.soft_backup and not soft, "--soft-backup needs the Gaussian student and TD "
         "temperatures above 0; add --offline-td-temperature 1"),
    ):  # fmt: skip
        if wrong:
            raise UserError(remedy)
    return args


# endregion


if __name__ == "__main__":
    sys.exit(command_line(main, Args))
