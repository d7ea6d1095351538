"""Return curves of finished or running SAC Flow runs, from their metrics.csv.

    python benchmark/sac_flow_curves.py --runs RUN RUN --out benchmark/results/sac_flow_cheetah.png

Left the stochastic policy's training return (`charts/episodic_return`, the mean of the last 20
episodes: the published curves' definition), right the deterministic evaluation (run with
`--eval-all-modes`); mean over a run's seeds, with the seeds as thin lines. Prints the last values.
"""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

PANELS = {"charts/episodic_return": "training return, last 20 episodes"}
PANELS |= {"eval/return_deterministic": "deterministic evaluation"}


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tuple[str, ...]  # run directories
    out: str = "benchmark/results/sac_flow_curves.png"  # the picture


def read(run, column):
    """(steps, values (seeds, steps)) of one column, where it was logged."""
    with open(Path(run) / "metrics.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r[column]]
    seeds = sorted({int(r["seed"]) for r in rows})
    series = {
        s: {int(r["step"]): float(r[column]) for r in rows if int(r["seed"]) == s} for s in seeds
    }
    steps = sorted(set.intersection(*(set(v) for v in series.values())))
    return steps, np.array([[series[s][step] for step in steps] for s in seeds])


def main(args):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4))
    for axis, (column, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for i, run in enumerate(args.runs):
            facts = json.loads((Path(run) / "args.json").read_text())
            steps, values = read(run, column)
            name = f"{facts['args']['policy']}, critic {facts['args']['critic']}"
            axis.plot(steps, values.T, c=f"C{i}", lw=0.6, alpha=0.4)
            axis.plot(steps, values.mean(axis=0), c=f"C{i}", label=f"{name}, {len(values)} seed(s)")
            each = ", ".join(f"{v:.0f}" for v in values[:, -1])
            print(f"{facts['task']}  {name}  {column} at step {steps[-1]:,}: {each}")
        axis.set(title=f"{facts['task']}: {title}", xlabel="environment steps")
        axis.legend()
    figure.tight_layout()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
