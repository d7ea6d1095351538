"""SAC Flow's central claim: how gradients grow along the rollout, for each velocity.

    python benchmark/sac_flow_gradients.py         # trains what is not there yet; minutes on a CPU

The norm of dL/dA_k, k = 0..K, for a random linear L of the rollout's end A_K (so that neither tanh
nor the critic plays a part), averaged over observations, divided by that at A_K. Back-propagation
runs from right to left: a line that rises to the left is a gradient that grows. Three pictures:

  bandit     a critic with two equally good actions per dimension, +-0.8, so that the rollout must
             pull noise apart; after `--bandit-updates` steps of the script's actor loss
  pendulum   after training with the script's defaults (`--out-dir` keeps the runs), observations
             from the replay
  large      Hopper's sizes, fresh velocities with every kernel times 4, as an emulation of long
             training; norms with batch statistics, or nothing would be normalised

Thin lines are seeds. The table also says how far A_K lies from 0, where tanh saturates.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "sac_flow.py"
COLOURS = {"mlp": "tab:red", "flow-g": "tab:blue", "flow-t": "tab:green"}


@dataclasses.dataclass(frozen=True)
class Args:
    num_seeds: int = 3  # seeds of everything
    flow_steps: int = 4  # K
    bandit_updates: int = 400  # actor updates on the bandit
    rows: int = 512  # observations per seed
    out_dir: str = "runs/sac-flow-gradients"  # pendulum runs; finished ones are not run again
    results: str = "benchmark/results"  # where the table and the picture go


def load_script():
    spec = importlib.util.spec_from_file_location("sac_flow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sac_flow"] = module
    spec.loader.exec_module(module)
    return module


def measure(nets, args, params, stats, obs, key, train=False):
    """(mean norms of dL/dA_k, mean |A_K|) of one actor along noisy rollouts."""
    keys = jax.random.split(key)
    eps = jax.random.normal(keys[0], (args.flow_steps + 1, len(obs), nets.dim))
    weights = jax.random.normal(keys[1], eps.shape[1:])

    def end(moves):  # the script's rollout, with a place to differentiate at every A_k
        context, new = nets.context(params, stats, obs, train=train)
        x = eps[0] + moves[0]
        for k in range(args.flow_steps):
            t = jnp.full((1, 1), k / args.flow_steps)
            (v, log_std), new = nets.velocity(params, new, context, x, t, k, train=train)
            x = x + v / args.flow_steps + jnp.exp(log_std) * eps[k + 1] + moves[k + 1]
        return (weights * x).sum(), x

    grads, x = jax.grad(end, has_aux=True)(jnp.zeros_like(eps))
    return jnp.linalg.norm(grads, axis=-1).mean(axis=-1), jnp.abs(x).mean()


def resolve(sac, policy, bench, **flags):
    task, flags = sac.parse_task("Hopper-v4"), flags | dict(action_scale=1.0)
    args = sac.Args(env_id=task.name, policy=policy, flow_steps=bench.flow_steps, **flags)
    return sac.fill(sac.resolve(args, task), target_entropy=0.0)


def bandit(sac, policy, bench):
    """Norms after training on the bandit, all seeds."""
    args = resolve(sac, policy, bench, hidden_dim=64, d_model=16)
    adam = optax.adam(1e-2, b1=0.5)

    def critic(params, stats, obs, action, train=False):
        q = -30 * ((action - 0.8 * jnp.sign(action)) ** 2).sum(axis=-1)
        return jnp.stack([q, q]), stats

    nets = sac.make_networks(args, 2)._replace(critic=critic)

    def one_seed(seed):
        params, stats = nets.init(4, jax.random.key(seed))

        def step(i, carry):
            params, stats, moments = carry
            keys = jax.random.split(sac.purpose_key(seed, "update", i))
            batch = dict(obs=jax.random.normal(keys[0], (128, 4)))
            inputs = (stats, nets, args, batch, ({}, {}), 0.05, 0.0, keys[1])
            grads, (_, stats) = jax.grad(sac.actor_loss, has_aux=True)(params, *inputs)
            updates, moments = adam.update(grads, moments)
            return optax.apply_updates(params, updates), stats, moments

        start = (params["actor"], stats["actor"], adam.init(params["actor"]))
        params, stats, _ = jax.lax.fori_loop(0, bench.bandit_updates, step, start)
        obs = jax.random.normal(sac.purpose_key(seed, "env"), (bench.rows, 4))
        return measure(nets, args, params, stats, obs, sac.purpose_key(seed, "eval"))

    return jax.jit(jax.vmap(one_seed))(jnp.arange(bench.num_seeds))


def pendulum(sac, policy, bench):
    """Norms of the last checkpoint of a run, and the run's returns."""
    directory = Path(bench.out_dir) / f"{policy}-K{bench.flow_steps}"
    if not list(directory.glob("*/result.json")):
        flags = ["--policy", policy, "--num-seeds", bench.num_seeds]
        flags += ["--flow-steps", bench.flow_steps, "--out-dir", directory]
        print(f"training {policy} on the pendulum", flush=True)
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = sorted(directory.glob("*/result.json"))[-1].parent
    args = sac.read_args(run, [], sac.Args())
    args = sac.resolve(args, sac.parse_task(args.env_id))
    tree, _ = sac.load_checkpoint(run)
    state = sac.start_states(args, 3, 1, jnp.zeros(3), jnp.ones(3))
    state = sac.restore(state, tree["state"], run)
    count = int(tree["replay"]["added"][0])
    index = np.random.default_rng(0).integers(0, count, bench.rows)
    obs = jnp.asarray(tree["replay"]["rows"]["obs"][:, index])
    nets = sac.make_networks(args, 1)

    def one_seed(state, obs):
        actor = (state.params["actor"], state.stats["actor"])
        return measure(nets, args, *actor, obs, sac.purpose_key(state.seed, "eval"))

    returns = json.loads((run / "result.json").read_text())["eval/return_stochastic"]
    return *jax.jit(jax.vmap(one_seed))(state, obs), f"{returns:.0f}"


def large(sac, policy, bench):
    """Norms of fresh velocities whose kernels are four times as large."""
    args = resolve(sac, policy, bench)
    nets = sac.make_networks(args, 3)

    def one_seed(seed):
        params, stats = nets.init(11, jax.random.key(seed))
        enlarge = lambda path, x: 4 * x if path[-1].key == "kernel" else x
        actor = jax.tree_util.tree_map_with_path(enlarge, params["actor"])
        obs = jax.random.normal(sac.purpose_key(seed, "env"), (bench.rows, 11))
        key = sac.purpose_key(seed, "eval")
        return measure(nets, args, actor, stats["actor"], obs, key, train=True)

    return jax.jit(jax.vmap(one_seed))(jnp.arange(bench.num_seeds))


def main(bench):
    from matplotlib.figure import Figure

    sac = load_script()
    titles = {bandit: f"bandit, {bench.bandit_updates} updates", pendulum: "pendulum, trained"}
    titles[large] = "Hopper's sizes, kernels times 4"
    head = f"Norm of dL/dA_0 over that of dL/dA_K, K = {bench.flow_steps}, "
    head += f"{bench.num_seeds} seeds, {bench.rows} observations each.\n\n"
    lines = ["| problem | velocity | growth, each seed | mean of abs A_K | return |"]
    lines += ["|---|---|---|---|---|"]
    figure = Figure(figsize=(13, 4))
    axes = figure.subplots(1, 3)
    for axis, (problem, title) in zip(axes, titles.items(), strict=True):
        for policy, colour in COLOURS.items():
            norms, size, *score = problem(sac, policy, bench)
            relative = np.asarray(norms / norms[:, -1:])
            each = ", ".join(f"{g:.2f}" for g in relative[:, 0])
            size = ", ".join(f"{s:.2g}" for s in np.asarray(size))
            lines.append(f"| {title} | {policy} | {each} | {size} | {''.join(score)} |")
            print(lines[-1], flush=True)
            axis.plot(relative.T, c=colour, lw=0.6, alpha=0.5)
            mean = np.exp(np.log(relative).mean(axis=0))
            axis.plot(mean, c=colour, marker="o", label=policy)
        axis.set(xlabel="rollout step k", title=title, yscale="log")
        axis.set_xticks(range(bench.flow_steps + 1))
    axes[0].set_ylabel("gradient norm at A_k over that at A_K")
    axes[0].legend()
    figure.tight_layout()
    results = Path(bench.results)
    results.mkdir(parents=True, exist_ok=True)
    figure.savefig(results / "sac_flow_gradients.png", dpi=120)
    (results / "sac_flow_gradients.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
