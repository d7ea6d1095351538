"""Does a run survive SIGKILL? Each script trains in small, with JAX and with official environments,
is killed at random moments and resumed until it is over, again and again until it was killed often
enough. Its last checkpoint (every array) and metrics.csv (but for times) must have the bytes of a
run that nobody killed.

    python tests/kills.py                           # all, 20 kills each; exit code 1 if some differ
    python tests/kills.py --only fmq-host --kills 3 # some

Not part of pytest, whose test_runs.py kills one run once. Half of the kills fall on a random moment
of a process's first seconds, which start with imports, the others right behind a new checkpoint.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import ROOT, load_script
from helpers import assert_same_end, finish, only_run, rows_without_time, start

TINY = "--batch-size 8 --eval-episodes 1 --eval-interval 100 --log-interval 10 --flow-steps 2"
TINY += " --checkpoint-interval 4 --env-id pointmaze-medium --offline-steps 100"
NETWORKS = "--hidden-dims 8 8 --critic-hidden-dims 8"
FLAGS = {  # online, the ring of sac_flow.py's rows wraps; flowq.py has no such phase
    "gsflow": f"{NETWORKS} --prior-hidden-dims 8 --num-candidates 2 --online-steps 100",
    "flowq": f"{NETWORKS} --offline-steps 200",
    "fmq": "--hidden-dims 8 8 --horizon 2 --learning-starts 20 --online-steps 100",
    "sac_flow": "--hidden-dim 8 --critic-hidden-dims 8 --d-model 8 --online-steps 100"
    " --learning-starts 20 --horizon-length 2 --buffer-size 40",
}
CASES = [f"{script}-{kind}" for script in FLAGS for kind in ("jax", "host")]


def stamp(directory):
    """Of the last checkpoint; None between the two moves that put it in its place."""
    try:
        return [path.stat().st_mtime_ns for path in directory.glob("*/checkpoint.msgpack")]
    except FileNotFoundError:
        return None


def train_and_kill(script, flags, directory, kills, rng):
    """Train to the end through at most `kills` SIGKILLs -> (run directory, how many there were)."""
    done, process = 0, start(script, *flags, out_dir=directory)
    while done < kills:
        seen, limit = stamp(directory), time.time() + rng.choice((rng.uniform(0, 6), 600))
        while time.time() < limit and stamp(directory) == seen and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.5))))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done += 1
        runs = [path.parent for path in directory.glob("*/checkpoint.[mp]*")]  # or .previous
        again = ["--resume", runs[0]] if runs else flags
        if not runs:
            for path in directory.iterdir():
                shutil.rmtree(path)
        process = start(script, *again, out_dir=None if runs else directory)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0 or "is complete" in err, err
    return only_run(directory), done


def trial(case, kills, directory, rng):
    """(kills, runs, None or what differs) of a script and a kind of environments."""
    script, kind = case.split("-")
    flags = [*TINY.split(), "--env-backend", kind, "--dataset-dir", directory]
    flags += ["--num-seeds", 1 + (kind == "jax")]
    flags += FLAGS[script].split()
    reference, module, done, runs = directory / f"{case}-whole", load_script(path(script)), 0, 0
    try:
        finish(start(script, *flags, out_dir=reference))
        while done < kills:
            runs += 1
            killed = directory / f"{case}-{runs}"
            killed.mkdir()
            run, count = train_and_kill(script, flags, killed, kills - done, rng)
            done += count
            assert_same_end(module, run, only_run(reference))
            same = rows_without_time(run) == rows_without_time(only_run(reference))
            assert same, "metrics.csv differs"
    except AssertionError as e:
        return done, runs, str(e)
    return done, runs, None


def path(script):
    return ROOT / "algos" / f"{script}.py"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="SCRIPT-KIND")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiling takes most of the time
    failed = 0
    print("script    env   kills  runs  same  seconds", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        data = load_script(path("gsflow")).collect_pointmaze("medium", 2_000)
        np.savez(Path(directory) / "pointmaze-medium-navigate-v0.npz", **data)
        for case in args.only:
            begin = time.perf_counter()
            rng = random.Random(f"{args.seed} {case}")
            kills, runs, wrong = trial(case, args.kills, Path(directory), rng)
            script, kind = case.split("-")
            seconds, same = time.perf_counter() - begin, "NO" if wrong else "yes"
            print(
                f"{script:<9} {kind:<5} {kills:>5} {runs:>5} {same:>5} {seconds:>8.0f}", flush=True
            )
            if wrong:
                failed += 1
                print(f"  {wrong.strip()[-500:]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
