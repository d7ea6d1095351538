"""The toy of the GoldenStart paper: sweep alpha for GSFlow and FQL, table and picture.

    python benchmark/multi_crescent.py                # both methods, three alphas, 4 seeds each

The paper reports that online GSFlow finds both modes of value 15, FQL one. Each row of the table is
one alpha (the same offline and online), trained on `--num-seeds` seeds at equal steps; a 15-mode
counts as found by a seed when at least 5% of its evaluation actions (T = 0) lie in it. The picture
shows, for the alpha of each method with the largest P(r = 15), the first seed after both phases.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tyro

SCRIPT = Path(__file__).resolve().parent.parent / "algos" / "gsflow.py"
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
