"""One run twice: training waits for its evaluations, and goes on meanwhile (`--eval-background`).

    python benchmark/background.py --env-id antmaze-large --offline-steps 40000 \\
        --eval-interval 10000 --hidden-dims 128 128 128 --batch-size 64

Flags are those of algos/gsflow.py, or of the script that --algo names. Prints the seconds from
start to end and of training, and checks that both left the same metrics and the same parameters.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ALGOS = Path(__file__).resolve().parent.parent / "algos"
WAYS = {"training waits": "--no-eval-background", "training goes on": "--eval-background"}


def run(script, directory, flags):
    """A run in a process -> (seconds from start to end, of training; what it leaves)."""
    command = [sys.executable, script.__file__, *flags, "--out-dir", str(directory)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = [time.perf_counter() - start]
    if done.returncode:
        sys.exit(done.stderr)
    (made,) = directory.iterdir()
    seconds += [json.loads((made / "result.json").read_text())["train_seconds"]]
    with open(made / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in r.items() if "time/" not in k} for r in csv.DictReader(file)]
    params = script.jax.tree.leaves(script.load_checkpoint(made)[0]["state"]["params"])
    return seconds, rows, params, json.loads((made / "args.json").read_text())


def main(argv):
    """The table; returns the exit code."""
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    algo = argv[1] if argv[:1] == ["--algo"] else "gsflow"
    flags = argv[2:] if argv[:1] == ["--algo"] else argv
    spec = importlib.util.spec_from_file_location(f"cleanflow_{algo}", ALGOS / f"{algo}.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with tempfile.TemporaryDirectory() as root:
        found = {k: run(script, Path(root) / flag, [*flags, flag]) for k, flag in WAYS.items()}
    (waits, rows, params, facts), (_, other_rows, other_params, _) = found.values()
    same = rows == other_rows and all(map(np.array_equal, params, other_params))
    print(f"{algo}.py {' '.join(flags)}; {facts['device']}, {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f} at the end, commit {str(facts['commit'])[:7]}; metrics and "
          f"parameters {'the same' if same else 'DIFFER'}\n")  # fmt: skip
    print("| evaluation | seconds | ratio | training |")
    print("|---|---|---|---|")
    for name, ((total, training), *_) in found.items():
        print(f"| {name} | {total:,.0f} | {waits[0] / total:.2f} | {training:,.0f} |")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
