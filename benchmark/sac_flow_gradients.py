"""SAC Flow's central claim: how the actor's gradient grows along the rollout, per velocity.

    python benchmark/sac_flow_gradients.py                      # trains mlp, flow-g, flow-t first
    python benchmark/sac_flow_gradients.py --runs RUN RUN RUN   # of runs that are there

For each run's last checkpoint: observations from its replay, one noisy rollout each, and the norm
of dL/dA_k for L = -min_c Q(s, tanh(A_K)), the actor's loss without entropy, at k = 0..K. The figure
shows the mean norm at A_k over that at A_K, seeds as thin lines; back-propagation goes from right
to left, so a line that rises to the left is a gradient that grows. `--kernel-scale` repeats the
measurement with every kernel of the velocity multiplied, as longer training enlarges them.
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
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "sac_flow.py"
COLOURS = {"mlp": "tab:red", "flow-g": "tab:blue", "flow-t": "tab:green"}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tuple[str, ...] = ()  # finished or stopped runs; none: train on the pendulum first
    num_seeds: int = 3  # seeds of each training
    flow_steps: int = 4  # Euler steps of each training
    rows: int = 1024  # observations per seed
    kernel_scale: tuple[float, ...] = (1.0, 2.0)  # factors of the velocity's kernels, a panel each
    out_dir: str = "runs/sac-flow-gradients"  # where trainings go; finished ones are not run again
    results: str = "benchmark/results"  # where the table and the picture go


def load_script():
    spec = importlib.util.spec_from_file_location("sac_flow", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sac_flow"] = module
    spec.loader.exec_module(module)
    return module


def train(policy, bench):
    """Train on the pendulum with the script's defaults, or find it finished -> run directory."""
    directory = Path(bench.out_dir) / f"{policy}-K{bench.flow_steps}"
    if not list(directory.glob("*/result.json")):
        flags = ["--policy", policy, "--num-seeds", bench.num_seeds]
        flags += ["--flow-steps", bench.flow_steps, "--out-dir", directory]
        print(f"training {policy}", flush=True)
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted(directory.glob("*/result.json"))[-1].parent


def gradient_norms(sac, state, obs, key, nets, args):
    """Mean norm of dL/dA_k, k = 0..K, for one seed."""
    obs = (obs - state.obs_mean) / state.obs_std
    actor = (state.params["actor"], state.stats["actor"])
    eps = jax.random.normal(key, (args.flow_steps + 1, len(obs), nets.dim))

    def loss(moves):  # the script's rollout, with a place to differentiate at every A_k
        context, _ = nets.context(*actor, obs)
        x = eps[0] + moves[0]
        for k in range(args.flow_steps):
            t = jnp.full((1, 1), k / args.flow_steps)
            (v, log_std), _ = nets.velocity(*actor, context, x, t, k)
            std = args.sigma if log_std is None else jnp.exp(log_std)
            x = x + v / args.flow_steps + std * eps[k + 1] + moves[k + 1]
        action = args.action_scale * jnp.tanh(x)
        q, _ = nets.critic(state.params["critic"], state.stats["critic"], obs, action)
        return -sac.aggregate(q, args).sum()

    grads = jax.grad(loss)(jnp.zeros_like(eps))
    return jnp.linalg.norm(grads, axis=-1).mean(axis=-1)


def measure(sac, directory, bench):
    """(policy, task, step, {factor: norms (seeds, K + 1)}) of a run's checkpoint."""
    args = sac.read_args(directory, [], sac.Args())
    task = sac.find_task(args.env_id)
    args = sac.resolve(args, task)
    obs_dim, act_dim = sac.open_env(task, sac.make_jax_env(task, args), args)
    tree, facts = sac.load_checkpoint(directory)
    state = sac.start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    state = sac.restore(state, tree["state"], directory)
    nets = sac.make_networks(args, act_dim)
    rng, added = np.random.default_rng(0), int(tree["replay"]["added"][0])
    rows = tree["replay"]["rows"]["obs"]
    index = rng.integers(0, min(added, rows.shape[1]), bench.rows)
    obs = jnp.asarray(rows[:, index])
    keys = jax.random.split(jax.random.key(0), len(obs))

    @jax.jit
    def norms(state, factor):
        enlarge = lambda path, x: factor * x if path[-1].key == "kernel" else x
        actor = jax.tree_util.tree_map_with_path(enlarge, state.params["actor"])
        state = state.replace(params=state.params | {"actor": actor})
        one = lambda s, o, k: gradient_norms(sac, s, o, k, nets, args)
        return jax.vmap(one)(state, obs, keys)

    return args, facts["step"], {f: np.asarray(norms(state, f)) for f in bench.kernel_scale}


def main(bench):
    from matplotlib.figure import Figure

    sac = load_script()
    runs = bench.runs or [train(policy, bench) for policy in COLOURS]
    measured = [(measure(sac, run, bench), run) for run in runs]
    args, step, _ = measured[0][0]
    head = f"{args.env_id}, checkpoint at step {step:,}, K = {args.flow_steps}, "
    head += f"{args.num_seeds} seeds, {bench.rows} observations each.\n\n"
    lines = ["| velocity | kernels | ‖dL/dA_0‖ / ‖dL/dA_K‖, mean over seeds | each seed | return |"]
    lines += ["|---|---|---|---|---|"]
    figure = Figure(figsize=(5 * len(bench.kernel_scale), 4))
    axes = np.atleast_1d(figure.subplots(1, len(bench.kernel_scale), sharey=True))
    for (args, _, norms), run in measured:
        result = Path(run) / "result.json"
        score = json.loads(result.read_text())["eval/return_stochastic"] if result.exists() else "?"
        for axis, factor in zip(axes, bench.kernel_scale, strict=True):
            relative = norms[factor] / norms[factor][:, -1:]
            growth = relative[:, 0]
            each = ", ".join(f"{g:.2f}" for g in growth)
            score_text = score if isinstance(score, str) or factor != 1 else f"{score:.0f}"
            lines.append(
                f"| {args.policy} | x {factor:g} | {growth.mean():.2f} | {each} | "
                f"{score_text if factor == 1 else ''} |"
            )
            colour = COLOURS[args.policy]
            axis.plot(relative.T, c=colour, lw=0.6, alpha=0.5)
            axis.plot(relative.mean(axis=0), c=colour, marker="o", label=args.policy)
            title = "as trained" if factor == 1 else f"velocity's kernels times {factor:g}"
            axis.set(xlabel="rollout step k", title=title, yscale="log")
            axis.set_xticks(range(args.flow_steps + 1))
    axes[0].set_ylabel("gradient norm at A_k over that at A_K")
    axes[0].legend()
    figure.tight_layout()
    results = Path(bench.results)
    results.mkdir(parents=True, exist_ok=True)
    figure.savefig(results / "sac_flow_gradients.png", dpi=120)
    (results / "sac_flow_gradients.md").write_text(head + "\n".join(lines) + "\n")
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
