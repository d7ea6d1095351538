"""The launcher: expansion, skipping, resuming, shared offline phases, failures, Ctrl-C, SLURM, the
.sh files."""

import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SCRIPTS, load_script
from helpers import assert_same_end, rows_without_time

LAUNCH = ROOT / "benchmark" / "launch.py"
FAKE = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path

import tyro


class UserError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "toy"
    seed: int = 0
    out_dir: str = "runs"
    resume: str | None = None
    evaluate: str | None = None
    steps: int | None = None  # as a script's: filled in by `main`
    pace: float = 0.0
    broken: bool = False


def train(args, task):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    directory = Path(args.resume or Path(args.out_dir) / f"{args.env_id}__fake__{args.seed}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    checkpoint = directory / "checkpoint.msgpack"
    for step in range(int(checkpoint.read_text()) if args.resume else 0, args.steps):
        time.sleep(args.pace)
        if args.broken and step == 1:
            sys.exit("error: it broke")
        with open(directory / "steps.txt", "a") as file:
            print(step, file=file)
        checkpoint.write_text(str(step + 1))
        memory = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        print("step", step, os.environ.get("CUDA_VISIBLE_DEVICES"), memory, flush=True)
        if stop:
            sys.exit(143)
    (directory / "result.json").write_text("{}")
    print("done")


def main(args):
    if args.env_id == "nowhere":
        raise UserError("unknown task 'nowhere'")
    train(dataclasses.replace(args, env_id=args.env_id + "-v0", steps=args.steps or 3), None)


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:
        args = Args(**json.loads((Path(args.resume) / "args.json").read_text()) |
                    {"resume": args.resume})
        train(args, None)
    else:
        main(args)
"""
# Under the name of a script with two phases, whose online flags the launcher knows. Like FQL's, the
# default of alpha depends on whether there is an online phase.
PHASES = """
import dataclasses, json, signal, sys, time
from pathlib import Path

import tyro


class UserError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "toy"
    seed: int = 0
    out_dir: str = "runs"
    resume: str | None = None
    evaluate: str | None = None
    start_from: str = ""
    offline_steps: int = 3
    online_steps: int = 0
    beta_online: float | None = None
    learning_starts: int = 0
    num_envs: int = 1
    utd: float = 1.0
    buffer_size: int = 9
    widths: tuple[int, ...] = (4, 4)
    layer_norm: bool = True
    alpha: float | None = None
    pace: float = 0.0
    breaks: int = -1  # before this step


def train(args, task):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    directory = Path(args.resume or Path(args.out_dir) / f"run-{time.time_ns()}")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    end, step = args.offline_steps + args.online_steps, 0
    if args.start_from:
        step = int((Path(args.start_from) / "offline.msgpack").read_text())
    if args.resume:
        step = int((directory / "checkpoint.msgpack").read_text())
    while step < end:
        time.sleep(args.pace)
        if step == args.breaks:
            sys.exit("error: it broke")
        with open(directory / "steps.txt", "a") as file:
            print(step, file=file)
        step += 1
        (directory / "checkpoint.msgpack").write_text(str(step))
        if step == args.offline_steps:
            (directory / "offline.msgpack").write_text(str(step))
        if stop and step < end:
            sys.exit(143)
    (directory / "result.json").write_text("{}")
    print("done")


def main(args):
    if args.alpha is None:
        args = dataclasses.replace(args, alpha=5.0 if args.online_steps else 3.0)
    if args.beta_online is None:
        args = dataclasses.replace(args, beta_online=args.alpha)
    train(args, None)


def stored(path, **more):
    values = json.loads((Path(path) / "args.json").read_text()) | more
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


if __name__ == "__main__":
    args = tyro.cli(Args)
    if args.resume:
        train(Args(**stored(args.resume, resume=args.resume)), None)
    elif args.start_from:
        main(tyro.cli(Args, default=Args(**stored(args.start_from, resume=None))))
    else:
        main(args)
"""
# the options that the sbatch manual page documents, among those a template may use
SBATCH = "account array constraint cpus-per-task gpus gres job-name mail-type mem nodes ntasks "
SBATCH += "open-mode output error partition qos requeue signal time"


@pytest.fixture
def launch(tmp_path):
    """Function (*words) -> argv of the launcher with the fake script, in a directory of its own."""
    algos = tmp_path / "algos"
    algos.mkdir()
    (algos / "fake.py").write_text(FAKE)
    (algos / "sac_flow.py").write_text(PHASES)

    def command(*words, out="runs", tasks=("toy",)):
        own = ["--algos-dir", algos, "--out", tmp_path / out, "--tasks", *tasks]
        return [sys.executable, str(LAUNCH), *map(str, own), *map(str, words)]

    return command


def call(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def steps(tmp_path):
    """{label-seed: steps in the order done} of all runs."""
    found = {}
    for path in tmp_path.glob("runs/*/*/*/*/steps.txt"):
        found[f"{path.parts[-5]}-{path.parts[-3][0]}"] = path.read_text().split()
    return found


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- expansion ----
def test_prints_the_product_as_commands(launch):
    words = ["--algos", "fake", "slow=fake --pace 1", "--seeds", 0, 7]
    out = call(launch(*words, "--", "--steps", 2, tasks=("toy", "maze --broken"))).stdout
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 8
    cells = set()
    for line in lines:
        assert line[0] == "python" and line[1].endswith("fake.py")
        flags = dict(itertools.pairwise(line))
        assert flags["--steps"] == "2"
        assert ("--broken" in line) == (flags["--env-id"] == "maze")
        cells.add((flags["--env-id"], flags["--seed"], "--pace" in line))
    assert len(cells) == 8
    homes = {line[line.index("--out-dir") + 1] for line in lines}
    assert len(homes) == 8
    assert sum("/slow/toy/" in home for home in homes) == 2


def test_commands_that_nobody_reads_on(launch):
    """`launch.py ... | head -1`: no traceback."""
    command = shlex.join(map(str, launch("--algos", "fake", "--seeds", *range(2_000))))
    done = call(["bash", "-c", f"set -o pipefail; {command} | head -1"])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1


def test_directory_follows_from_resolved_arguments(launch):
    def homes(*words, algos=("fake",)):
        out = call(launch("--seeds", 0, "--algos", *algos, *words)).stdout
        return [shlex.split(line)[-1] for line in out.splitlines()]

    plain = homes()
    assert homes("--", "--steps", 3) == plain  # the default, said aloud
    assert homes("--", "--steps", 4) != plain
    twice = homes("--", "--steps", 4, "--pace", 0.5)
    assert twice == homes("--", "--pace", 0.5, "--steps", 4)
    other = homes(algos=("other=fake",))
    assert other != plain and other[0].split("/")[-1] == plain[0].split("/")[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--algos", "nothing"], "no script"),
        (["--algos", "fake --pase 1"], "wrong flags"),
        (["--algos", "fake", "fake --pace 0"], "two runs are the same"),
        (["--algos", "fake --env-id nowhere"], "unknown task 'nowhere'"),
        (["--algos", "fake", "--", "--resume"], "wrong flags"),
        (["--algos", "fake", "--", "--evaluate", "runs/x"], "not to a launch"),
    ],
)
def test_refuses_in_one_sentence(launch, words, says):
    done = call(launch(*words))
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr


# ---- running ----
def test_runs_and_skips_what_is_finished(launch, tmp_path):
    command = launch("--algos", "fake", "--seeds", 0, 1, 2, "--workers", 2)
    first = call([*command, "--devices", "4", "5"])
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 runs: 3 finished now, 0 before, 0 failed, 0 left" in first.stdout
    assert steps(tmp_path) == {f"fake-{s}": ["0", "1", "2"] for s in range(3)}
    logs = [p.read_text() for p in tmp_path.glob("runs/fake/toy/*/log.txt")]
    assert {re.search(r"step 0 (\d)", log)[1] for log in logs} == {"4", "5"}

    second = call(command)
    assert second.returncode == 0 and "0 finished now, 3 before" in second.stdout
    assert steps(tmp_path) == {f"fake-{s}": ["0", "1", "2"] for s in range(3)}
    assert all(line.startswith("# finished: ") for line in call(command[:-2]).stdout.splitlines())
    facts = json.loads(next(tmp_path.glob("runs/fake/toy/0-*/launch.json")).read_text())
    assert facts["label"] == "fake" and "--seed" in facts["flags"]


def devices_of(tmp_path, label="fake"):
    """{seed: (CUDA_VISIBLE_DEVICES, share of the memory)} as the runs saw them."""
    logs = {p.parent.name[0]: p.read_text() for p in tmp_path.glob(f"runs/{label}/*/*/log.txt")}
    return {seed: re.search(r"step 0 (\S+) (\S+)", log).groups() for seed, log in logs.items()}


def test_runs_that_share_a_device_share_its_memory(launch, tmp_path):
    command = launch("--algos", "fake --pace 0.2", "--seeds", *range(4), "--devices", 4, 5)
    assert call([*command, "--workers", "4"]).returncode == 0
    seen = devices_of(tmp_path)
    assert seen == {"0": ("4", "0.450"), "1": ("5", "0.450"), "2": ("4", "0.450"),
                    "3": ("5", "0.450")}  # fmt: skip


@pytest.mark.parametrize(
    ("devices", "own", "share"),
    [((), {}, "0.450"), (("0", "1"), {}, "None"), ((), {"XLA_CLIENT_MEM_FRACTION": ".2"}, "None")],
)
def test_memory_is_limited_only_where_it_must_be(launch, tmp_path, devices, own, share):
    """Two runs on one device share it, on two they do not; the user's own limit stays."""
    words = ["--algos", "fake", "--seeds", 0, 1, "--workers", 2]
    words += ["--devices", *devices] if devices else []
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES")
    env = {k: v for k, v in os.environ.items() if k not in names} | own
    assert call(launch(*words), env=env).returncode == 0
    assert {memory for _, memory in devices_of(tmp_path).values()} == {share}


def test_failure_stops_nothing_else_and_is_listed(launch, tmp_path):
    algos = ("--algos", "bad=fake --broken", "fake")
    done = call(launch(*algos, "--seeds", 0, 1, "--workers", 1))
    assert done.returncode == 1
    assert "4 runs: 2 finished now, 0 before, 2 failed, 0 left" in done.stdout
    listed = done.stdout[done.stdout.index("4 runs:") :]
    assert listed.count("failed: bad toy seed") == 2 and "exit code 1: error: it broke" in listed
    for line in re.findall(r"log: (.*)", listed):
        assert "error: it broke" in Path(line).read_text()
    assert steps(tmp_path)["fake-1"] == ["0", "1", "2"]


def test_killed_run_is_resumed(launch, tmp_path):
    command = launch("--algos", "fake --pace 0.3", "--seeds", 0, "--workers", 1, "--", "--steps", 6)
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(steps(tmp_path).get("fake-0", [])) >= 2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 1 and "exit code -9" in out
    before = steps(tmp_path)["fake-0"]
    assert before != [str(i) for i in range(6)]

    cut = command.index("--workers")
    assert "--resume" in call(command[:cut] + command[cut + 2 :]).stdout
    again = call(command)
    assert again.returncode == 0 and "resumed from" in again.stdout
    assert steps(tmp_path)["fake-0"] == [str(i) for i in range(6)]  # each step once


def test_interrupt_checkpoints_and_the_same_command_goes_on(launch, tmp_path):
    words = ["--algos", "fake --pace 0.3", "--seeds", 0, 1, 2, "--workers", 2, "--", "--steps", 6]
    launcher = subprocess.Popen(launch(*words), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(steps(tmp_path)) == 2)
    launcher.send_signal(signal.SIGINT)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert "3 left" in out and "the same command goes on" in out and "failed:" not in out
    checkpoints = [p.read_text() for p in tmp_path.glob("runs/*/*/*/*/checkpoint.msgpack")]
    assert len(checkpoints) == 2 and all(0 < int(c) < 6 for c in checkpoints)
    again = call(launch(*words))
    assert again.returncode == 0 and "3 finished now" in again.stdout
    assert steps(tmp_path) == {f"fake-{s}": [str(i) for i in range(6)] for s in range(3)}


def test_leaves_alone_what_another_launcher_runs(launch, tmp_path):
    out = call(launch("--seeds", 0, "--algos", "fake")).stdout
    home = shlex.split(out)[-1]
    os.makedirs(home)
    with open(f"{home}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call(launch("--seeds", 0, "--algos", "fake", "--workers", 1))
    assert done.returncode == 1 and "another launcher is running it" in done.stdout
    assert steps(tmp_path) == {}


def test_progress_line_names_the_runs(launch):
    done = call(launch("--algos", "fake --pace 0.5", "--seeds", 0, "--workers", 1))
    assert re.search(r"0/1 done \| 1 running \| fake toy seed 0: ", done.stdout)


# ---- one offline phase for several runs ----
ARMS = ["a=sac_flow --online-steps 2", "b=sac_flow --online-steps 4 --utd 0.5 --beta-online 7"]
ARMS += ["c=sac_flow --online-steps 2 --no-layer-norm --widths 8"]


def runs_of(tmp_path, out="runs"):
    """{label-seed: (steps done, arguments)}; of each there is one directory."""
    found = {}
    for path in tmp_path.glob(f"{out}/*/*/*/*/steps.txt"):
        name = f"{path.parts[-5]}-{path.parts[-3][0]}"
        name += "*" * (name in found)
        args = json.loads(path.with_name("args.json").read_text())
        found[name] = path.read_text().split(), args
    return found


def test_shared_offline_phase(launch, tmp_path):
    """Two arms of one offline phase, one of another, on two workers; then once more."""
    command = launch("--algos", *ARMS, "--seeds", 0, 1, "--share-offline", "--workers", 2)
    done = call(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 runs: 10 finished now, 0 before, 0 failed, 0 left" in done.stdout
    found = runs_of(tmp_path)
    names = {f"{arm}-{s}" for arm in ("a", "b", "c", "sac_flow-offline") for s in (0, 1)}
    assert set(found) == names | {"sac_flow-offline-0*", "sac_flow-offline-1*"}
    for name, (steps, args) in found.items():
        online = {"a": ["3", "4"], "b": ["3", "4", "5", "6"], "c": ["3", "4"]}.get(name[0])
        assert steps == (online or ["0", "1", "2"]), name
        assert args["alpha"] == 5  # as of a run with both phases
        if online:  # as if made in one go
            (base,) = [x for x in found.values() if x[1]["out_dir"] in args["start_from"]]
            same = ("seed", "alpha", "widths", "layer_norm", "offline_steps", "env_id")
            assert [args[n] for n in same] == [base[1][n] for n in same]
    assert found["b-1"][1]["beta_online"] == 7 and found["b-1"][1]["utd"] == 0.5
    assert found["a-1"][1]["beta_online"] == 5 and found["a-1"][1]["utd"] == 1
    assert found["c-0"][1]["widths"] == [8] and not found["c-0"][1]["layer_norm"]

    again = call(command)
    assert again.returncode == 0 and "0 finished now" in again.stdout
    assert runs_of(tmp_path) == found
    assert "python" not in call(launch("--algos", *ARMS, "--seeds", 0, 1)).stdout  # nor in one go


def test_shared_commands_run_in_a_shell(launch, tmp_path):
    """What is printed, one line after the other, in a directory with a space."""
    words = ("--algos", *ARMS[:2], "fake", "--seeds", 0, "--share-offline")
    printed = call(launch(*words, out="all runs")).stdout
    first, *arms, other = printed.splitlines()
    assert "--online-steps" not in first and "--alpha 5.0" in first
    assert len(arms) == 2 and all(" --start-from " in line for line in arms)
    assert "--utd 0.5" in arms[1] and "--utd" not in arms[0] and "fake.py" in other
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    assert call(["bash", "-ec", printed], env=env).returncode == 0
    found = runs_of(tmp_path, "all runs")
    assert {name: steps[0] for name, (steps, _) in found.items()} == {
        "sac_flow-offline-0": "0", "a-0": "3", "b-0": "3", "fake-0": "0"
    }  # fmt: skip
    printed = call(launch(*words, out="all runs")).stdout.splitlines()
    assert len(printed) == 3 and all(line.startswith("# finished: ") for line in printed)


def test_shared_offline_phase_that_is_there(launch, tmp_path):
    """One of an earlier launch, under another label; one that is in this launch anyway."""
    assert (
        call(launch("--algos", "x=sac_flow --alpha 5", "--seeds", 0, "--workers", 1)).returncode
        == 0
    )
    words = ["--algos", *ARMS[:2], "y=sac_flow --alpha 6", "z=sac_flow --alpha 6 --online-steps 1"]
    done = call(launch(*words, "--seeds", 0, "--share-offline", "--workers", 2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 runs: 4 finished now, 1 before" in done.stdout
    found = runs_of(tmp_path)
    assert set(found) == {"x-0", "a-0", "b-0", "y-0", "z-0"}
    for arm, base in (("a", "x"), ("b", "x"), ("z", "y")):
        assert f"/{base}/toy/0-" in found[f"{arm}-0"][1]["start_from"]


def test_shared_offline_phase_is_interrupted(launch, tmp_path):
    """In the offline phase, then in the online one; the same command goes on, each step once."""
    words = ["--algos", *ARMS[:2], "--seeds", 0, "--share-offline", "--workers", 2]
    command = launch(*words, "--", "--pace", 0.3)
    for label in ("sac_flow-offline-0", "b-0"):
        launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_for(lambda label=label: label in runs_of(tmp_path))
        launcher.send_signal(signal.SIGINT)
        out, _ = launcher.communicate(timeout=30)
        assert launcher.returncode == 130 and "the same command goes on" in out, out
    again = call(command)
    assert again.returncode == 0 and "resumed from" in again.stdout, again.stdout
    found = {name: steps for name, (steps, _) in runs_of(tmp_path).items()}
    steps = [str(i) for i in range(7)]
    assert found == {"sac_flow-offline-0": steps[:3], "a-0": steps[3:5], "b-0": steps[3:]}


def test_failed_offline_phase_names_what_waits_for_it(launch, tmp_path):
    algos = ["--algos", "a=sac_flow --breaks 1", "b=sac_flow --breaks 1 --utd 2", "c=sac_flow"]
    words = [*algos, "--seeds", 0, "--share-offline", "--workers", 1, "--", "--online-steps", 2]
    done = call(launch(*words))
    assert done.returncode == 1 and "5 runs: 2 finished now, 0 before, 3 failed" in done.stdout
    listed = done.stdout[done.stdout.index("5 runs:") :].splitlines()
    failed = [line for line in listed if line.startswith("failed: ")]
    assert "exit code 1: error: it broke" in failed[0]
    base = "sac_flow-offline toy seed 0"
    assert failed[1:] == [f"failed: {x} toy seed 0: waited for {base}, which failed" for x in "ab"]
    assert set(runs_of(tmp_path)) == {"sac_flow-offline-0", "sac_flow-offline-0*", "c-0"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([ARMS[0], "--", "--start-from", "runs/x"], "has --start-from"),
        (["mine=copy --online-steps 2"], "without an entry in ONLINE"),
    ],
)
def test_sharing_is_refused(launch, tmp_path, words, says):
    (tmp_path / "algos" / "copy.py").write_text(PHASES)
    command = launch("--workers", 1, "--seeds", 0, "--share-offline", "--algos", *words)
    done = call(command, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["algos"]


@pytest.mark.slow
def test_slurm_element_is_an_offline_phase_with_its_runs(launch, tmp_path):
    """Their numbers stay when elements have finished, and a finished one ends at once."""
    file, seeds = tmp_path / "jobs.sh", ("--seeds", 0, 1)
    words = ["--algos", *ARMS, "fake", *seeds, "--share-offline", "--workers", 2]
    assert call(launch(*words, "--slurm", file)).returncode == 0
    assert "#SBATCH --array=0-5\n" in file.read_text()
    new = [{"a-0", "b-0", "sac_flow-offline-0"}, {"c-0", "sac_flow-offline-0*"}, {"fake-0"}]
    new += [{name.replace("0", "1") for name in names} for names in new]
    for index in (4, 0, 0, 1, 3, 2, 5):
        before = set(runs_of(tmp_path))
        done = call(["bash", file], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index)})
        assert done.returncode == 0, done.stdout + done.stderr
        started, new[index] = new[index], set()
        made = set(runs_of(tmp_path)) - before
        assert {name.rstrip("*") for name in made} == {name.rstrip("*") for name in started}


TWO_PHASES = [stem for stem in ("fmq", "gsflow", "sac_flow") if stem in SCRIPTS]


@pytest.mark.parametrize("stem", TWO_PHASES)
def test_online_flags_are_flags_of_the_script(stem):
    script, names = load_script(ROOT / "algos" / f"{stem}.py"), load_script(LAUNCH).ONLINE[stem]
    fields = set(script.Args.__dataclass_fields__)
    assert len(set(names)) == len(names) and set(names) <= fields
    assert {n for n in fields if "online" in n} <= set(names)
    # what may still change when a run without online phase is resumed is of the online phase
    if script.FREE_ALSO:
        assert set(script.FREE_ALSO) == set(names) - {"online_steps"}


SMALL = "--offline-steps 40 --eval-interval 40 --checkpoint-interval 40 --log-interval 20 "
SMALL += "--eval-episodes 2 --batch-size 16 --num-seeds 2"
OTHERWISE = {  # arms that between them set every online flag to something else, and small networks
    "gsflow": (
        "--hidden-dims 8 8 --prior-hidden-dims 8",
        "--online-steps 40 --num-envs 2 --utd 2 --buffer-size 2010 --balanced-sampling "
        "--behavior-temperature 0.5 --online-alpha 2 --online-td-temperature 0.5",
    ),
    "fmq": (
        "--hidden-dims 8 8 --num-samples 2 --horizon 4 --eval-modes one-step",
        "--online-steps 40 --learning-starts 8 --utd 2 --buffer-size 2010 --q-agg-online mean "
        "--eta 0.5 --beta 0.1 --no-normalize-grad --grad-at online --online-cons-weight 0.1 "
        "--online-diag-weight 0.1",
        "--online-steps 40 --learning-starts 8 --online-objective mvp --mvp-target reselect",
        "--online-steps 40 --learning-starts 8 --no-adaptive-eta",
    ),
    "sac_flow": (
        "--d-model 8 --critic-hidden-dims 8 --flow-steps 2",
        "--online-steps 40 --learning-starts 8 --num-envs 2 --utd 0.5 --buffer-size 500 "
        "--beta-online 3",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stem", TWO_PHASES)
def test_shared_runs_equal_runs_in_one_go(stem, data_dir, tmp_path):
    """Bit for bit, whatever online flag is another one: the offline phase reads none of them."""
    sizes, *arms = OTHERWISE[stem]
    flags = set(re.findall(r"--(?:no-(?=norm|adapt))?([a-z-]+)", " ".join(arms)))
    assert flags == {n.replace("_", "-") for n in load_script(LAUNCH).ONLINE[stem]}
    algos = [f"arm{i}={stem} {arm}" for i, arm in enumerate(arms)]
    tail = ["--", *SMALL.split(), *sizes.split(), "--dataset-dir", data_dir]
    for out, more in (("shared", ["--share-offline"]), ("whole", [])):
        words = ["--algos", *algos, "--tasks", "pointmaze-medium", "--seeds", 0, "--workers", 1]
        words += ["--out", tmp_path / out, *more, *tail]
        done = subprocess.run(
            [sys.executable, LAUNCH, *map(str, words)], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
    script = load_script(ROOT / "algos" / f"{stem}.py")
    (base,) = (path.parent for path in (tmp_path / "shared").glob("*-offline/*/*/*/args.json"))
    for i in range(len(arms)):
        whole, shared = (
            next((tmp_path / out).glob(f"arm{i}/*/*/*/args.json")).parent
            for out in ("whole", "shared")
        )
        assert whole.parent.relative_to(tmp_path / "whole") == shared.parent.relative_to(
            tmp_path / "shared"
        )
        assert_same_end(script, whole, shared)
        assert rows_without_time(whole) == rows_without_time(base) + rows_without_time(shared)
        args = [json.loads((run / "args.json").read_text())["args"] for run in (whole, shared)]
        assert args[1].pop("start_from") == str(base) and args[0].pop("start_from") == ""
        assert all(a.pop("out_dir") for a in args) and args[0] == args[1]


# ---- watching ----
def make_run(root, seed, log, rows=(), args=None, result=False):
    """A run's directory as a launcher leaves it -> its home."""
    home = root / "mine" / "toy" / f"{seed}-abcd1234"
    (home / "run").mkdir(parents=True)
    (home / "launch.json").write_text(json.dumps(dict(label="mine")))
    (home / "log.txt").write_text(log)
    (home / "run" / "args.json").write_text(json.dumps(dict(args=args or {})))
    lines = ["step,phase,seed,train/loss,eval/success_n1,eval/return_n1", *rows]
    (home / "run" / "metrics.csv").write_text("\n".join(lines))
    if result:
        (home / "run" / "result.json").write_text("{}")
    return home


def table(out, *words):
    """{first cell: all cells} of the printed table, cells being two spaces apart."""
    done = call([sys.executable, LAUNCH, "--status", out, "--once", *words])
    assert done.returncode == 0, done.stderr
    rows = [re.split(r" {2,}", line) for line in done.stdout.splitlines()]
    return done.stdout, {row[0]: row for row in rows}


def test_status_by_hand(tmp_path):
    command, steps = "\n$ python algos/fmq.py\n", dict(offline_steps=1000, online_steps=3000)
    rows = ["500,offline,0,1.0,,", "500,offline,1,1.0,,"]
    rows += ["1000,offline,0,1.0,0.25,7", "1000,offline,1,1.0,0.5,9", "1200,online,0,1.0,,"]
    log = command + "failed once\n" + command
    log += "offline 900/1,000  8.0/s  ETA 12 s\nonline 1,600/4,000  2.0/s  ETA 1,200 s\nother\n"
    running = make_run(tmp_path, 0, log, [*rows, "1300,onl"], steps)
    make_run(tmp_path, 1, command + "x 9/9  1.0/s  ETA 0 s\nerror: it broke\n", rows, steps)
    make_run(tmp_path, 2, command + "stopped; --resume x continues at 1,000\n", rows, steps)
    make_run(tmp_path, 3, command + "done: success 0.5\n", rows, steps, result=True)
    fresh = make_run(tmp_path, 4, command)
    with open(running / "lock", "w") as one, open(fresh / "lock", "w") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        fcntl.flock(two, fcntl.LOCK_EX)
        text, found = table(tmp_path)
    assert text.startswith("5 runs: 2 running, 1 failed, 1 stopped, 1 finished\n")
    last = "success_n1 0.38 at 1,000"  # the mean of two seeds, of the last evaluation
    # 2,400 steps are left, at 2 a second
    first = ["running", "1,600/4,000 40%", "2.0/s", "20 min", last]
    assert found["mine toy seed 0"][1:] == first
    assert found["mine toy seed 1"][1:] == ["failed", "1,200/4,000 30%", last]
    assert "\n  error: it broke\n" in text
    assert found["mine toy seed 2"][1:] == ["stopped", "1,200/4,000 30%", last]
    assert found["mine toy seed 3"][1:] == ["finished", "4,000/4,000 100%", last]
    assert found["mine toy seed 4"][1:] == ["running"]
    names = [line[:15] for line in text.splitlines() if line.startswith("mine")]
    assert names == [f"mine toy seed {i}" for i in (0, 4, 1, 2, 3)]


def test_status_of_runs_as_they_go(launch, tmp_path):
    algos = ("bad=fake --broken", "slow=fake --pace 0.3")
    words = ["--algos", *algos, "--seeds", 0, "--workers", 2, "--", "--steps", 12]
    launcher = subprocess.Popen(launch(*words), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: "bad-0" in steps(tmp_path) and "slow-0" in steps(tmp_path))
    text, found = table(tmp_path / "runs")
    assert found["slow toy seed 0"][1] == "running"
    launcher.communicate(timeout=60)
    text, found = table(tmp_path / "runs")
    assert text.startswith("2 runs: 1 failed, 1 finished") and "\n  error: it broke\n" in text
    assert found["bad toy seed 0"][1] == "failed" and found["slow toy seed 0"][1] == "finished"


def test_a_look_at_the_lock_hinders_no_launcher(tmp_path):
    """Whoever looks holds the lock for a moment; who wants to run tries again."""
    module = load_script(LAUNCH)
    with open(tmp_path / "lock", "w") as theirs, open(tmp_path / "lock", "w") as ours:
        assert module.take(theirs)
        assert module.is_held(tmp_path / "lock") and not module.take(ours, tries=2)
        threading.Timer(0.06, lambda: fcntl.flock(theirs, fcntl.LOCK_UN)).start()
        assert module.take(ours, tries=20)


def test_status_fits_a_terminal():
    module = load_script(LAUNCH)
    runs = [
        module.Status(f"a toy seed {i}", "failed" if i else "running", "x" * 99, 5, 10, 1.0, "")
        for i in range(9)
    ]
    lines = module.format_status(runs, 40, 8).splitlines()
    assert len(lines) == 8 and max(map(len, lines)) == 40
    assert lines[2].startswith("a toy seed 0  running  5/10 50%")  # 2: after the counts and titles
    assert lines[-1].startswith("... 12 more lines; --once")  # 1 + 1 + 9 + 8 lines, 7 are shown
    assert [module.duration(s) for s in (9.4, 89, 150, 3600, 90000)] == [
        "9 s", "89 s", "2 min", "1 h 00", "25 h 00"
    ]  # fmt: skip


def test_status_at_a_terminal_goes_on_until_interrupted(tmp_path):
    make_run(tmp_path, 3, "$ python\ndone\n", result=True)
    ours, theirs = pty.openpty()
    command = [sys.executable, LAUNCH, "--status", tmp_path]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # whatever this process ignores
    pipes = dict(stdout=theirs, stderr=subprocess.PIPE)
    watcher = subprocess.Popen(command, **pipes, preexec_fn=heard)
    shown = ""
    while shown.count("\x1b[H\x1b[J1 runs: 1 finished") < 2:
        shown += os.read(ours, 4096).decode()
    watcher.send_signal(signal.SIGINT)
    _, said = watcher.communicate(timeout=30)
    assert watcher.returncode == 0 and said == b""


def test_status_without_runs(tmp_path):
    done = call([sys.executable, LAUNCH, "--status", tmp_path])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no run of a launcher below")


@pytest.mark.parametrize("stem", SCRIPTS)
def test_status_understands_the_logs_of_the_scripts(stem):
    """The line of progress that each script prints, filled in."""
    text = (ROOT / "algos" / f"{stem}.py").read_text()
    line = re.search(r'print\((f"\{phase\.name\} .*ETA .*")\)', text)[1]
    phase, run = SimpleNamespace(name="online", end=4000), SimpleNamespace(step=1600)
    said = eval(line, dict(phase=phase, run=run, self=run, speed=1234.5, eta=1.9))
    assert load_script(LAUNCH).PROGRESS.match(said).groups() == ("1,600", "4,000", "1,234.5")


# ---- SLURM ----
def test_slurm_script(launch, tmp_path):
    file = tmp_path / "jobs with space.sh"
    command = launch("--algos", "fake", "x=fake --pace 0", "--seeds", 0, 1, "--slurm", file)
    assert call([*command, "--", "--steps", "2"]).returncode == 0
    text = file.read_text()
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    assert not re.search(r"@[A-Z]+@", text)
    options = re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)
    assert len(options) > 5 and set(options) <= set(SBATCH.split())
    assert "#SBATCH --array=0-3\n" in text
    head = text[: text.index("set -euo")]
    assert head.count("#SBATCH") == text.count("#SBATCH"), "directives end at the first command"
    assert (tmp_path / "runs").is_dir(), "sbatch does not make the directory of its logs"

    for index in (3, 1):  # one element is one run, whatever the others did
        done = call(["bash", file], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(index)})
        assert done.returncode == 0, done.stdout + done.stderr
    assert steps(tmp_path) == {"x-1": ["0", "1"], "x-0": ["0", "1"]}


def test_slurm_elements_of_several_runs(launch, tmp_path):
    """Four runs per element on two GPUs; the devices are those that SLURM gave."""
    file = tmp_path / "jobs.sh"
    words = ["--algos", "fake --pace 0.1", "--seeds", *range(5), "--slurm", file]
    assert call(launch(*words, "--workers", 4, "--devices", 0, 1)).returncode == 0
    text = file.read_text()
    assert "#SBATCH --array=0-1\n" in text and "#SBATCH --gpus=2\n" in text
    assert "#SBATCH --cpus-per-task=32\n" in text and "#SBATCH --mem=128G\n" in text
    assert not re.search(r"@[A-Z]+@", text)
    for index, runs in ((0, 4), (1, 5)):
        own = {"SLURM_ARRAY_TASK_ID": str(index), "CUDA_VISIBLE_DEVICES": "6,7"}
        done = call(["bash", file], env=os.environ | own)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(steps(tmp_path)) == runs
    seen = devices_of(tmp_path)
    assert seen.pop("4") == ("6", "None")  # alone in its element
    assert sorted(seen.values()) == [("6", "0.450")] * 2 + [("7", "0.450")] * 2


@pytest.mark.slow
def test_plan_counts_what_runs_would_cost(tmp_path):
    algos = ["gsflow", "fql=gsflow --prior gaussian --student deterministic"]
    words = ["--algos", *algos, "--tasks", "antmaze-large", "--seeds", "0", "1", "--out", tmp_path]
    words += [
        "--plan",
        "--gpus",
        "2",
        "--tflops",
        "100",
        "--share",
        "0.5",
        "--",
        "--num-seeds",
        "3",
    ]
    done = call([sys.executable, LAUNCH, *words])
    assert done.returncode == 0, done.stderr
    rows = [[x.strip() for x in r.split("|")[1:-1]] for r in done.stdout.splitlines() if "|" in r]
    costs = {row[0]: row[1:] for row in rows[2:]}
    # a million updates of three seeds: 61.8 and 12.0 GFLOP each (tests/test_speed.py)
    assert costs["gsflow"] == ["2", "6", "185", f"{2 * 3 * 61.8e15 / 50e12 / 3600:,.1f}"]
    assert costs["fql"][:3] == ["2", "6", "36"] and costs["all"][:2] == ["4", "12"]
    assert "counted, not measured" in done.stdout and "hours on 2 GPUs" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plan_counts_a_shared_phase_once(tmp_path):
    words = ["--algos", "fmq", "mvp=fmq --online-objective mvp", "--tasks", "cube-double-task4"]
    words += ["--seeds", "0", "--out", tmp_path, "--dry-run"]
    tables = []
    for more in ([], ["--share-offline"]):
        done = call([sys.executable, LAUNCH, *words, *more])
        rows = [x.split("|")[1:-1] for x in done.stdout.splitlines() if x.startswith("|")][2:]
        tables.append({row[0].strip(): [float(x) for x in row[1:]] for row in rows})
    whole, shared = tables
    assert whole["all"][:2] == [2, 4] and shared["all"][:2] == [3, 3]
    assert shared["fmq-offline"][:2] == shared["mvp"][:2] == shared["fmq"][:2] == [1, 1]
    assert shared["fmq-offline"][2] + shared["mvp"][2] == pytest.approx(whole["mvp"][2], rel=0.01)


# ---- commands in files ----
def launcher_calls(script, tmp_path, *words):
    """Arguments of each launch.py call in a shell script that is given `words`."""
    log = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"
    )
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", script, *words], env=env, check=True, timeout=60)
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["gsflow", "flowq", "fmq", "sac_flow"])
def test_table_scripts(stem, tmp_path, capsys, monkeypatch):
    script = ROOT / "benchmark" / f"{stem}.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if stem not in SCRIPTS:
        pytest.skip(f"algos/{stem}.py is not here")
    calls = launcher_calls(script, tmp_path)
    assert len(calls) >= 3
    module = load_script(LAUNCH)
    monkeypatch.chdir(tmp_path)
    for argv in calls:
        assert argv[0] == "benchmark/launch.py" and module.main(argv[1:]) == 0
        commands = capsys.readouterr().out.splitlines()
        begins = re.compile(rf"python \S*{stem}\.py --(env-id|start-from) ")
        assert commands and all(map(begins.match, commands))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, seeds, arms, most",
    [
        ((), "01234", 1, 60_000),
        (["--tune"], ["100"], 3, 30_000),
        (["--time"], ["900"], 1, 1000),
        (["--quarter"], ["0"], 1, 450_000),
    ],
)
def test_comparison_script(words, seeds, arms, most, tmp_path, capsys, monkeypatch):
    """Seven methods on each of three tasks, on one two more; tuning has half the updates, a
    quarter of an hour seven and a half times those of two minutes."""
    if len(SCRIPTS) < 4:
        pytest.skip("not all scripts are here")
    calls = launcher_calls(ROOT / "benchmark" / "compare.sh", tmp_path, *words)
    module, updates, homes = load_script(LAUNCH), [], set()
    monkeypatch.chdir(tmp_path)
    for argv, methods in zip(calls, (7, 9, 7), strict=True):
        assert module.main(argv[1:]) == 0
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        runs = [dict(itertools.pairwise(line)) for line in lines]
        assert len(runs) == methods * arms * len(seeds)
        assert {run["--seed"] for run in runs} == {*seeds}
        assert len({run["--out-dir"] for run in runs}) == len(runs)
        evaluations = 3 if words == ["--quarter"] else 1
        assert all(
            int(run["--eval-interval"]) * evaluations == int(run["--offline-steps"]) for run in runs
        )
        updates += [int(run["--offline-steps"]) for run in runs]
        homes |= {Path(run["--out-dir"]) for run in runs}
    if not words:  # the committed runs are of these settings: launched again, they are not repeated
        finished = ROOT / "benchmark" / "results" / "compare" / "finished"
        found = {"runs/compare" / path.relative_to(finished) for path in finished.glob("*/*/*")}
        assert found and found <= homes
    assert max(updates) == most and (words != ["--time"] or {*updates} == {most})


@pytest.mark.slow
@pytest.mark.parametrize("stem", SCRIPTS)
def test_table_scripts_count_what_they_would_cost(stem, tmp_path, capsys, monkeypatch):
    """`bash benchmark/METHOD.sh --dry-run`: a table per launch, and nothing is made."""
    calls = launcher_calls(ROOT / "benchmark" / f"{stem}.sh", tmp_path, "--dry-run")
    module, empty = load_script(LAUNCH), tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.syspath_prepend(ROOT / "benchmark")  # as where it is a script
    for argv in calls:
        assert argv[0] == "benchmark/launch.py" and module.main(argv[1:]) == 0
        out = capsys.readouterr().out
        assert f"{stem}.py" not in out
        lines = [line.replace(",", "") for line in out.splitlines() if line.startswith("|")]
        rows = [line.split("|")[1:-1] for line in lines]
        runs, updates, work, _ = map(float, rows[-1][1:])
        assert rows[-1][0].strip() == "all" and min(runs, updates, work) > 0
        totals = zip(*[map(float, row[1:]) for row in rows[2:-1]], strict=True)
        assert [sum(column) for column in totals][:2] == pytest.approx([runs, updates])
    assert not list(empty.iterdir())


def test_readme_launcher_commands(capsys, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    module = load_script(LAUNCH)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python benchmark/launch\.py([^\n]*)", text, re.M)
    assert lines
    for line in lines:
        words = shlex.split(line.split("  #")[0])
        if "--workers" in words:
            words[words.index("--workers") + 1] = "0"  # print, do not run
        expected = 2 if "--status" in words else 0  # nothing was launched here
        assert module.main(words) == expected, line


# ---- a real run ----
@pytest.mark.slow
def test_real_run(tmp_path):
    tiny = "--hidden-dims 8 8 --prior-hidden-dims 8 --batch-size 16 --offline-steps 40 "
    tiny += "--eval-interval 20 --eval-episodes 10 --updates-per-dispatch 20 --num-seeds 2"
    words = ["--algos", "gsflow", "--tasks", "multi-crescent", "--seeds", "3", "--workers", "1"]
    command = [sys.executable, LAUNCH, *words, "--out", tmp_path, "--", *tiny.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished gsflow multi-crescent seed 3" in done.stdout and "done: success" in done.stdout
    result = json.loads(next(tmp_path.glob("gsflow/*/3-*/*/result.json")).read_text())
    assert result["seeds"] == [3, 4] and result["steps"] == 40
    assert load_script(ROOT / "benchmark" / "report.py").main_of([str(tmp_path)]) == 0
    row = next(
        x for x in (tmp_path / "report" / "report.md").read_text().splitlines() if "gsflow" in x
    )
    cells = [cell.strip() for cell in row.split("|")][1:-1]
    assert cells[:5] == ["multi-crescent", "gsflow", "success", "2", "10"]
    assert (tmp_path / "report" / "curves_generated.png").stat().st_size > 5_000
