"""A grid in one program against its members as runs of their own, one after another.

    python benchmark/grid.py                                  # 12 members on the point maze
    python benchmark/grid.py --steps 2000 -- --hidden-dims 32 32 --batch-size 64

Every run is a process; the grid begins with an empty compilation cache of its own, the single runs
share another one, so that those whose programs are the same (alpha is a traced number, a learning
rate is not) compile once. What follows a lone `--` goes to every run. The last column compares the
parameters at the end, relative to the largest one of their array: rounding differs, and training
lets differences grow.
"""

import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

ALGOS = Path(__file__).resolve().parent.parent / "algos"


@dataclasses.dataclass(frozen=True)
class Args:
    algo: str = "gsflow"  # script in algos/
    grid: tuple[str, ...] = ("alpha=1,3,10", "learning-rate=0.001,0.0003")  # flags and values
    num_seeds: int = 2  # of each combination
    steps: int = 1_000  # updates, all offline


def run(script, directory, cache, flags):
    """One run in a process -> (seconds from start to end, of training, of compiling the update;
    its parameters at the end; args.json)."""
    command = [sys.executable, str(script.__file__), *map(str, flags), "--out-dir", str(directory)]
    env, start = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = [time.perf_counter() - start]
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    (made,) = directory.iterdir()
    seconds += [json.loads((made / "result.json").read_text())["train_seconds"]]
    with open(made / "metrics.csv", newline="") as file:
        seconds += [float(next(csv.DictReader(file))["time/compile_s"])]
    params = script.load_checkpoint(made)[0]["state"]["params"]
    return seconds, script.jax.tree.leaves(params), json.loads((made / "args.json").read_text())


def words(values):
    return [w for k, v in values.items() for w in ("--" + k.replace("_", "-"), *np.ravel(v))]


def main(args, extra):
    path = ALGOS / f"{args.algo}.py"
    spec = importlib.util.spec_from_file_location(f"cleanflow_{args.algo}", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    values = {k: v.split(",") for k, _, v in (text.partition("=") for text in args.grid)}
    common = ["--offline-steps", args.steps, "--eval-interval", args.steps, *extra]
    alone, worst = [], 0.0
    with tempfile.TemporaryDirectory() as root:
        root, flags = Path(root), [*common, *words(values), "--num-seeds", args.num_seeds]
        together, members, facts = run(script, root / "grid", root / "cache", flags)
        for numbers, seed in itertools.product(facts["arms"].values(), range(args.num_seeds)):
            flags = [*common, *words(numbers), "--seed", seed]
            seconds, params, _ = run(script, root / str(len(alone)), root / "caches", flags)
            for x, y in zip(members, params, strict=True):
                difference = np.abs(x[len(alone)] - y[0]).max()
                worst = max(worst, difference / max(np.abs(y).max(), 1e-12))
            alone.append(seconds)
    print(f"{args.algo}.py, {args.steps:,} updates, {', '.join(args.grid)}, {args.num_seeds} seeds"
          f"{'; ' * bool(extra) + ' '.join(extra)}; {facts['device']}, load "
          f"{os.getloadavg()[0]:.1f} at the end, commit {str(facts['commit'])[:7]}\n")  # fmt: skip
    print("| runs | seconds | ratio | training | compiling | largest difference |")
    print("|---|---|---|---|---|---|")
    rows = {f"{len(alone)} members in one program": (together, f"{worst:.1g}")}
    rows[f"{len(alone)} runs one after another"] = np.sum(alone, axis=0), ""
    for name, ((total, training, compiling), difference) in rows.items():
        times = (
            f"{total:,.0f}",
            f"{total / together[0]:.2f}",
            f"{training:,.0f}",
            f"{compiling:,.0f}",
        )
        print("| " + " | ".join((name, *times, difference)) + " |")


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(tyro.cli(Args, description=__doc__, args=sys.argv[1:cut]), sys.argv[cut + 1 :])
