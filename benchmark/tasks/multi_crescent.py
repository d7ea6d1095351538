"""GSFlow's toy: a one-step bandit whose rewards lie on six thin crescents (arXiv 2603.14245).

    python algos/gsflow.py --env-id multi-crescent    one run, with a picture after each phase
    python benchmark/tasks/multi_crescent.py          both methods, three alphas, 4 seeds each

As a program it sweeps alpha for GSFlow and FQL and leaves a table and a picture. The paper reports
that online GSFlow finds both modes of value 15, FQL one. Each row of the table is one alpha (the
same offline and online), trained on `--num-seeds` seeds at equal steps; a 15-mode counts as found
by a seed when at least 5% of its evaluation actions (T = 0) lie in it. The picture shows, for the
alpha of each method with the largest P(r = 15), the first seed after both phases.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from gymnasium.experimental.functional import FuncEnv
from tqdm import tqdm

# ---- the task ----
ANGLES = np.arange(6) * np.pi / 3
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)
OFFSETS = np.array([(0.2828, 0), (0.2, 0.2), (-0.2, 0.2), (-0.2828, 0), (-0.2, -0.2), (0.2, -0.2)])
VALUES = np.array([10.0, 15.0, 5.0, 10.0, 15.0, 5.0])
DEFAULTS = {  # small networks; the alphas that find most of the 15-modes
    "gsflow": dict(
        offline_steps=2_000, eval_interval=2_000, eval_episodes=1_000, hidden_dims=(64, 64),
        alpha=10.0, fql_alpha=50.0,
    ),
}  # fmt: skip


def crescent_value(points):
    """Value of the crescent that contains each point (they never overlap), 0 outside of all."""
    points = jnp.asarray(points)[..., None, :]
    in_disc = jnp.linalg.norm(points - CENTRES, axis=-1) < 0.4
    in_bite = jnp.linalg.norm(points - CENTRES - OFFSETS, axis=-1) <= 0.4
    return jnp.where(in_disc & ~in_bite, VALUES, 0.0).max(-1)


def crescent_reward(action):
    return crescent_value(jnp.clip(action, -1, 1))


class MultiCrescentState(NamedTuple):
    value: jax.Array  # reward of the last transition
    done: jax.Array


class MultiCrescent(FuncEnv):
    """One step, observation 0, action in the box, reward of the crescent that it hits.

    10 is the best reward in the dataset (right and left), 15 (top right, bottom left) is not in it.
    """

    max_episode_steps = 1

    def __init__(self):
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def initial(self, rng: Any, params: Any = None) -> MultiCrescentState:
        return MultiCrescentState(jnp.zeros(()), jnp.asarray(False))

    def transition(self, state, action, rng=None, params=None) -> MultiCrescentState:
        return MultiCrescentState(crescent_reward(action), jnp.asarray(True))

    def observation(self, state, rng=None, params=None):
        return jnp.zeros(2)

    def reward(self, state, action, next_state, rng=None, params=None):
        return next_state.value

    def terminal(self, state, rng=None, params=None):
        return state.done

    def success(self, state):
        return state.value >= 10


def crescent_dataset(seed: int) -> dict:
    """Points scattered around the four crescents worth 5 and 10, kept where they hit a crescent."""
    rng = np.random.default_rng(seed)
    centres = CENTRES[[0, 2, 3, 5]]
    points = (centres[:, None] + np.sqrt(0.02) * rng.standard_normal((4, 500, 2))).reshape(-1, 2)
    kept = rng.permutation(points[np.asarray(crescent_value(points)) > 0])
    rewards = np.asarray(crescent_reward(kept), np.float32)
    zeros, ones = np.zeros((len(kept), 2), np.float32), np.ones(len(kept), np.float32)
    return dict(
        observations=zeros,
        actions=np.clip(kept, -(1 - 1e-5), 1 - 1e-5).astype(np.float32),
        rewards=rewards,
        masks=1 - ones,
        terminals=ones,
        next_observations=zeros.copy(),
    )


def make_task(name: str, dataset_dir: str) -> dict:
    """What a script needs to know of the task; there is one name, multi-crescent."""
    if name != "multi-crescent":
        raise ValueError(f"no task '{name}' in {Path(__file__).name}: use multi-crescent")
    return dict(
        env=MultiCrescent(),
        data=lambda: (crescent_dataset(seed=0), "generated"),
        defaults=DEFAULTS,
        after_phase=after_phase,
    )


# ---- the picture of a run ----
def after_phase(run_dir, phase, script, nets, args, state):
    """gsflow.py alone: draw the rewards, the data and what the first seed does."""
    if not hasattr(script, "sample_prior"):
        return

    def draws(params):  # prior noise, its teacher actions, the student's at T = 0 and T = 1
        obs, keys = jnp.zeros((1_000, 2)), jax.random.split(jax.random.key(0), 3)
        x = script.sample_prior(params, nets, obs, keys[0])
        teacher = script.flow_endpoint(params, nets, obs, x, args.flow_steps)
        mode, _ = script.sample_action(params, nets, obs, x, 0.0, keys[1])
        return x, teacher, mode, script.sample_action(params, nets, obs, x, 1.0, keys[2])[0]

    first_seed = jax.tree.map(lambda x: x[0], state.ema or state.params)  # what acts
    methods = {("cvae", "gaussian"): "GSFlow", ("gaussian", "deterministic"): "FQL"}
    method = methods.get((args.prior, args.student), f"{args.prior} prior, {args.student} student")
    alpha = args.alpha if phase == "offline" else args.online_alpha
    title = f"{method} {phase}, alpha {alpha:g}"
    draw_crescents(Path(run_dir) / f"multi_crescent_{phase}.png", jax.jit(draws)(first_seed), title)


def draw_crescents(path, draws, title):
    """One picture: reward map, box, data, prior noise, teacher's and student's actions."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    noise, teacher, mode, sampled = draws
    rewards = np.asarray(crescent_reward(mode))
    figure = Figure(figsize=(6, 5))
    FigureCanvasAgg(figure)
    axis, grid = figure.add_subplot(), np.linspace(-1.5, 1.5, 601)
    landscape = crescent_value(np.stack(np.meshgrid(grid, grid), axis=-1))
    colours = axis.contourf(grid, grid, landscape, [-1, 2.5, 7.5, 12.5, 17.5], cmap="Greens")
    figure.colorbar(colours, label="reward", ticks=[0, 5, 10, 15])
    axis.plot([-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1], c="black", lw=1)
    axis.scatter(*crescent_dataset(seed=0)["actions"].T, s=2, c="grey", label="data")
    axis.scatter(*noise.T, s=3, c="red", alpha=0.15, label="prior noise x")
    axis.scatter(*teacher.T, s=3, c="blue", alpha=0.15, label="teacher F(s, x)")
    axis.scatter(*sampled.T, s=3, c="orange", alpha=0.3, label="student, T = 1")
    axis.scatter(*mode[:50].T, s=60, c="black", marker="*", label="student, T = 0")
    shares = f"P(r >= 10) {(rewards >= 10).mean():.2f}, P(r = 15) {(rewards == 15).mean():.2f}"
    axis.set_title(f"{title}: mean reward {rewards.mean():.2f}, {shares}", fontsize=8)
    axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.55, -0.06), ncols=5)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    tqdm.write(f"picture: {path}")


# ---- the sweep ----
SCRIPT = Path(__file__).resolve().parent / "../../algos/gsflow.py"
METHODS = {"GSFlow": [], "FQL": ["--prior", "gaussian", "--student", "deterministic"]}


@dataclasses.dataclass(frozen=True)
class Args:
    alphas: tuple[float, ...] = (3.0, 10.0, 50.0)  # distillation weights to try
    num_seeds: int = 4  # seeds of each setting, vmapped
    offline_steps: int = 2_000  # gradient steps on the dataset
    online_steps: int = 6_000  # environment steps, one update each
    out_dir: str = "runs/multi-crescent"  # where the runs go; finished ones are not run again
    results: str = "benchmark/results"  # where the table and the picture go


def run(method, alpha, args):
    """Train one setting, or find it finished -> its run directory."""
    directory = Path(args.out_dir) / f"{method}-{alpha:g}"
    finished = sorted(directory.glob("*/result.json"))
    if finished:
        return finished[-1].parent
    flags = ["--env-id", "multi-crescent", "--alpha", alpha, "--num-seeds", args.num_seeds]
    flags += ["--offline-steps", args.offline_steps, "--online-steps", args.online_steps]
    flags += ["--eval-interval", args.offline_steps, "--out-dir", directory, *METHODS[method]]
    print(f"{method}, alpha {alpha:g}", flush=True)
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted(directory.glob("*/result.json"))[-1].parent


def statistics(directory, args):
    """Row of the table: mean reward after each phase, shares of rewards, seeds with a 15-mode."""
    lines = (directory / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    offline = [float(r["eval/return"]) for r in rows if int(r["step"]) == args.offline_steps]
    rewards = np.array(json.loads((directory / "result.json").read_text())["episodes"]["return"])
    found = (rewards == 15).mean(axis=1)
    return dict(
        offline=np.mean(offline),
        online=rewards.mean(),
        deviation=rewards.mean(axis=1).std(),
        good=(rewards >= 10).mean(),
        best=found.mean(),
        seeds=int((found >= 0.05).sum()),
    )


def picture(runs, path):
    """Tile the runs' own pictures: a row a method, a column a phase."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(12, 10))
    axes = figure.subplots(len(runs), 2)
    for row, directory in zip(axes, runs, strict=True):
        for axis, phase in zip(row, ("offline", "online"), strict=True):
            axis.imshow(imread(directory / f"multi_crescent_{phase}.png"))
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(args):
    lines = [
        "| method | alpha | reward offline | online | P(r >= 10) | P(r = 15) | seeds with 15 |",
        "|---|---|---|---|---|---|---|",
    ]
    best = []
    for method in METHODS:
        settings = []
        for alpha in args.alphas:
            directory = run(method, alpha, args)
            s = statistics(directory, args)
            settings.append((s["best"], directory))
            lines.append(
                f"| {method} | {alpha:g} | {s['offline']:.2f} | {s['online']:.2f} ± "
                f"{s['deviation']:.2f} | {s['good']:.2f} | {s['best']:.2f} | "
                f"{s['seeds']} of {args.num_seeds} |"
            )
        best.append(max(settings, key=lambda setting: setting[0])[1])
    results = Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    steps = f"{args.offline_steps:,} offline + {args.online_steps:,} online steps"
    head = f"multi-crescent, {steps}, {args.num_seeds} seeds, 1,000 actions each at T = 0.\n\n"
    (results / "multi_crescent.md").write_text(head + "\n".join(lines) + "\n")
    picture(best, results / "multi_crescent.png")
    print(head + "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
