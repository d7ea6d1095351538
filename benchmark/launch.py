"""Run algorithms x tasks x seeds: print the commands, run them with N workers, or on SLURM; watch.

    python benchmark/launch.py --algos gsflow --tasks pointmaze-medium --seeds 0 1 2
    python benchmark/launch.py --algos gsflow --tasks pointmaze-medium --seeds 0 1 2 --workers 2
    python benchmark/launch.py --algos gsflow --tasks antmaze-large cube-double --slurm jobs.sh
    python benchmark/launch.py --algos gsflow --tasks antmaze-large --workers 16 --devices 0 1 2 3
    python benchmark/launch.py --algos gsflow "fql=gsflow --prior gaussian --student deterministic"
        --tasks "antmaze-large --alpha 10" scene -- --num-seeds 4              (all in one line)
    python benchmark/launch.py --status runs                                  # Ctrl-C ends it only
    python benchmark/launch.py --share-offline --algos fmq "mvp=fmq --online-objective mvp"
        --tasks cube-double-task4 --workers 2                                 # one offline phase
    python benchmark/launch.py --pack --algos "a=gsflow --alpha 1" "b=gsflow --alpha 3"   # one run
    bash benchmark/gsflow.sh --dry-run        # what the runs would cost, counted; starts nothing

An algorithm is `[LABEL=]SCRIPT [FLAGS]`, a task `TASK [FLAGS]`; what follows a lone `--` goes to
every run. The flags are checked, and the task's defaults filled in, before anything starts.

Each run has a directory of its own, OUT/LABEL/TASK/SEED-HASH, where HASH stands for the resolved
arguments, in whatever way they were given. A run with a result.json there is finished and not run
again; one with a checkpoint is resumed; so the same command goes on after a crash, a Ctrl-C or a
time limit. Ctrl-C stops the runs at their next dispatch, with a checkpoint; twice stops them at
once. The log of a run is log.txt beside its run directory.

With --share-offline each run that has an offline and an online phase begins (--start-from) at the
end of a run of its offline phase alone, labelled SCRIPT-offline; runs whose flags differ in nothing
but those of ONLINE below begin at the same one, also at one of another launch with the same --out.
They are as if made in one go and have the same directories, and they wait until it has finished; in
a SLURM array an element is an offline phase with all runs that begin at its end.

With --pack the methods of one script that differ only in numbers of which a run can train several
(those that --help shows with more than one value), and are all combinations of these, become one
run, LABEL..LABEL, with one program for all; reports have a line for each as if they were alone.

--status OUT shows the runs that launchers have begun below OUT, anew every two seconds until a
Ctrl-C: progress, rate, ETA, the headline metric of the last evaluation, the last line of the log
where a run failed. It starts and changes nothing. The ETA takes the rate of the last dispatch, so
it leaves out evaluations and, before it begins, that an online phase is slower.
"""

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path
from typing import Annotated

import tyro

HERE = Path(__file__).resolve().parent
NOT_HASHED = ("seed", "out_dir", "resume", "evaluate", "video", "eval_background")
ONLINE = {  # the flags of a script that its offline phase does not read
    "gsflow": (
        "online_steps", "num_envs", "utd",  # steps of the environment, updates after each
        "buffer_size", "balanced_sampling",  # which online rows are kept and drawn
        "behavior_temperature",  # of exploration
        "online_alpha", "online_td_temperature",  # offline: alpha, offline_td_temperature
    ),
    "fmq": (
        "online_steps", "learning_starts", "utd",  # steps of the environment, updates after each
        "buffer_size",  # how many online rows are kept
        "online_objective", "q_agg_online",  # offline: the flow map's own loss, q_agg_offline
        "mvp_target",  # of --online-objective mvp
        "eta", "adaptive_eta", "beta", "normalize_grad", "grad_at",  # of the guided step, fmq's
        "online_cons_weight", "online_diag_weight",  # of what is added to fmq's loss
    ),
    "sac_flow": (
        "online_steps", "learning_starts", "num_envs", "utd",  # as above
        "buffer_size",  # how many online rows are kept
        "beta_online",  # offline: beta
    ),
}  # fmt: skip


class UserError(Exception):
    """Something the user can mend; shown as one sentence, exit code 2."""


@dataclasses.dataclass(frozen=True)
class Args:
    algos: tuple[str, ...] = ("gsflow",)
    """scripts in algos/, each as [LABEL=]NAME [FLAGS]; the label names the method in reports"""
    tasks: tuple[str, ...] = ("pointmaze-medium",)  # tasks, each as TASK [FLAGS]
    seeds: tuple[int, ...] = (0, 1, 2)
    """first seed of each run (with `-- --num-seeds N` a run trains N seeds: leave gaps of N)"""
    out: str = "runs"  # directory that holds the runs
    workers: int = 0
    """run the commands, so many at a time (0: only print them); with --slurm: per array element"""
    devices: tuple[str, ...] = ()
    """CUDA_VISIBLE_DEVICES of the workers, in turn (e.g. 0 1 2 3); with more workers than devices
    several runs share one, each with its part of the memory"""
    slurm: str | None = None  # write a SLURM array script to this file and run nothing
    slurm_template: str = str(HERE / "slurm_array.sh")  # template of that script
    index: int | None = None  # only the runs of this element of the SLURM array
    algos_dir: str = str(HERE.parent / "algos")  # where the scripts are
    status: str | None = None  # show the runs below this directory and start nothing
    once: bool = False  # with --status: print the table once (also done where there is no terminal)
    share_offline: bool = False
    """runs that differ only in what matters online start from the end of one offline phase"""
    pack: bool = False  # methods that differ only in numbers of a grid become one run each
    plan: Annotated[bool, tyro.conf.arg(aliases=["--dry-run"])] = False
    """count the runs, their updates and, from their arithmetic, what they would cost; starts
    nothing"""
    gpus: int = 8  # with --plan: GPUs
    tflops: float = 67.0  # with --plan: a GPU's peak rate (an H100's in float32; in TF32: 495)
    share: float = 0.3  # with --plan: the part of it that runs are assumed to reach


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to be made: `home` is the directory that holds its run directory and its log."""

    label: str
    script: Path
    task: str
    seed: int
    flags: tuple[str, ...]
    home: Path
    given: object  # what the flags set, an Args of the script
    args: object  # and that with the rest filled in
    base: "Job | None" = None  # the run of its offline phase, at whose end this one starts
    online_flags: tuple[str, ...] = ()  # what it then sets
    for_others: bool = False  # nobody asked for it but those that start from it
    labels: tuple[tuple[str, str], ...] = ()  # of a packed one: (arm, its label)

    def __str__(self):
        return f"{self.label} {self.task} seed {self.seed}"

    @property
    def log(self):
        return self.home / "log.txt"

    def find(self):
        """What is there of this run -> ("finished" | "resume" | "new", its run directory)."""
        finished = sorted(self.home.glob("*/result.json"))
        if finished:
            return "finished", finished[-1].parent
        files = [
            f for end in ("msgpack", "previous") for f in self.home.glob(f"*/checkpoint.{end}")
        ]
        if files:
            return "resume", max(files, key=lambda f: f.stat().st_mtime).parent
        return "new", None

    def command(self):
        """Its words; of a base that has not finished a shell finds the directory, afterwards."""
        (state, directory), flags = self.find(), self.flags
        if state == "resume":
            flags = ["--resume", str(directory)]
        elif self.base:
            there, start = self.base.find()
            if there != "finished":
                ended = f"{shlex.quote(str(self.base.home))}/*/result.json"
                start = f'"$(dirname "$(ls {ended} | tail -n 1)")"'
            own = ["--out-dir", str(self.home)]
            flags = ["--start-from", str(start), *self.online_flags, *own]
        return [sys.executable, os.path.relpath(self.script), *flags]


# ---- from arguments to jobs ----
def load_script(path):
    """Import a script by its path, once."""
    name = f"cleanflow_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def resolve(script, flags, where):
    """The arguments that the flags set, and those with which the script would train; a refusal is
    a UserError."""
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(refusal):
            given = tyro.cli(script.Args, args=list(flags), prog=where)
    except SystemExit as e:  # tyro has said which flag is wrong
        print(refusal.getvalue(), file=sys.stderr)
        raise UserError(f"{where}: wrong flags, see above") from e
    try:
        given = getattr(script, "combine", lambda given: given)(given)  # of the values of a grid
    except script.UserError as e:
        raise UserError(f"{where}: {e}") from e
    if given.resume or given.evaluate:
        raise UserError("--resume and --evaluate belong to the scripts, not to a launch")
    return given, settle(script, given, where)


def settle(script, given, where):
    """The arguments with which the script's `main`, called with `given`, calls its `train`."""
    found, train = [], script.train
    script.train = lambda args, task: found.append(args)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            script.main(given)
        return found[0]
    except script.UserError as e:
        raise UserError(f"{where}: {e}") from e
    finally:
        script.train = train


def expand(args, extra):
    """Algorithms x tasks x seeds -> jobs, in this order: seed by seed, tasks inside."""
    jobs = []
    for seed in args.seeds:
        for task_words in map(shlex.split, args.tasks):
            for algo in args.algos:
                name, *algo_flags = shlex.split(algo)
                label, _, stem = name.rpartition("=")
                path = Path(args.algos_dir) / f"{stem}.py"
                if not path.is_file():
                    known = ", ".join(sorted(p.stem for p in path.parent.glob("*.py")))
                    raise UserError(f"no script {path}; there are: {known}")
                flags = ["--env-id", *task_words, *algo_flags, *extra, "--seed", str(seed)]
                jobs.append(make_job(label or stem, path, flags, seed, Path(args.out)))
    homes = [job.home for job in jobs]
    for job in jobs:
        if homes.count(job.home) > 1:
            raise UserError(f"two runs are the same: {job}; give another --seeds or label")
    return jobs


def make_job(label, path, flags, seed, out):
    """A job whose directory follows from the arguments it resolves to."""
    given, args = resolve(load_script(path), flags, f"{label} {flags[1]}")
    resolved = dataclasses.asdict(args)
    task = resolved["env_id"].removesuffix("-v0").replace("/", "-")
    if resolved["seed"] != seed:
        raise UserError("give seeds with --seeds, not as a flag of the runs")
    hashed = {k: v for k, v in resolved.items() if k not in NOT_HASHED} | {"script": path.stem}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]
    home = out / label / task / f"{seed}-{digest}"
    return Job(label, path, task, seed, (*flags, "--out-dir", str(home)), home, given, args)


def pack(jobs, out):
    """Put the jobs that can be arms of one run together."""
    groups = {}
    for job in jobs:
        free = dict.fromkeys(load_script(job.script).grid_flags(type(job.given)))
        key = job.script, dataclasses.replace(job.given, **free)
        groups.setdefault(key, []).append(job)
    return [job for group in groups.values() for job in pack_group(group, out)]


def pack_group(group, out):
    """Jobs that differ only in numbers of which a run can have several -> [one job], or themselves
    where they are not all combinations of their values."""
    first, script, values = group[0], load_script(group[0].script), {}
    for name in script.grid_flags(script.Args):
        if len({getattr(job.given, name) for job in group}) > 1:  # None: what the task sets
            values[name] = tuple(dict.fromkeys(getattr(job.args, name) for job in group))
    if math.prod(map(len, values.values())) != len(group) or len(group) == 1:
        return group
    words = [*first.flags[:-2], *as_flags(script.Args, values)]  # without --out-dir
    label = f"{first.label}..{group[-1].label}"
    packed = make_job(label, first.script, words, first.seed, out)
    arms, labels = {arm: name for name, arm in script.arms(packed.args).items()}, {}
    for job in group:
        if job.args not in arms:  # a task's default depends on one of these numbers
            return group
        labels[arms[job.args]] = job.label
    return [dataclasses.replace(packed, labels=tuple(labels.items()))]


def as_flags(args_type, values):
    """{argument: value} -> the words that set them."""
    types, words = typing.get_type_hints(args_type), []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if types[name] is bool:
            words += ["--" + flag if value else "--no-" + flag]
        else:
            words += ["--" + flag, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def offline_phase(job, out):
    """The run of a job's offline phase alone -> (Job, words that set what differs online), or None
    where the job has not both phases."""
    script, stem, given = load_script(job.script), job.script.stem, job.given
    if not (getattr(job.args, "online_steps", 0) and getattr(job.args, "offline_steps", 0)):
        return None
    grid = any(isinstance(v, tuple) and float in map(type, v) for v in vars(given).values())
    if stem not in ONLINE or given.start_from or grid:
        why = "has a grid" if grid else "has --start-from"
        why = why if stem in ONLINE else "is of a script without an entry in ONLINE"
        raise UserError(f"{job} {why}: leave --share-offline out")
    default = vars(script.Args())
    given = dataclasses.replace(given, **{n: default[n] for n in ONLINE[stem]})
    given = dataclasses.replace(given, online_steps=0, out_dir=default["out_dir"])

    def differing():
        alone = vars(settle(script, given, str(job))).items()
        return {n: getattr(job.args, n) for n, v in alone if getattr(job.args, n) != v}

    # what a task sets may depend on whether there is an online phase, as FQL's alpha does
    wrong = {n: v for n, v in differing().items() if n not in (*ONLINE[stem], "out_dir")}
    given = dataclasses.replace(given, **wrong)
    online = {n: v for n, v in differing().items() if n != "out_dir"}
    if wrong := online.keys() - ONLINE[stem]:
        raise UserError(f"{job}: {', '.join(wrong)} cannot be shared; leave --share-offline out")
    own = {n: v for n, v in vars(given).items() if v != default[n]}
    words = as_flags(script.Args, dict(env_id=given.env_id, seed=given.seed) | own)
    base = make_job(f"{stem}-offline", job.script, words, job.seed, out)
    base = dataclasses.replace(base, for_others=True)
    return base, tuple(as_flags(script.Args, online))


def share_offline(jobs, out):
    """Put before the jobs with both phases the runs of their offline phase, once each; one that is
    among the jobs, or has finished below `out` under whatever label, serves as well."""
    bases, shared = {(job.task, job.home.name): job for job in jobs}, {}
    for job in jobs:
        if found := offline_phase(job, out):
            base, words = found
            key = base.task, base.home.name
            for home in sorted(out.glob("/".join(["*", *key]))):
                if any(home.glob("*/result.json")) and any(home.glob("*/offline.msgpack")):
                    known = dataclasses.replace(base, label=home.parent.parent.name, home=home)
                    bases.setdefault(key, known)
            base = bases.setdefault(key, base)
            shared[base] = None
            job = dataclasses.replace(job, base=base, online_flags=words)
        shared[job] = None
    return list(shared)


def elements(jobs, args):
    """The jobs of each element of a SLURM array: --workers of them, or those that share an offline
    phase. What has finished meanwhile changes nothing here."""
    if not args.share_offline:
        size = max(1, args.workers)
        return [jobs[i : i + size] for i in range(0, len(jobs), size)]
    groups = {}
    for job in jobs:
        groups.setdefault(job.base or job, []).append(job)
    return list(groups.values())


def without_idle(jobs):
    """Jobs that have begun go on without their base; a base that nobody needs falls away."""
    jobs = [
        dataclasses.replace(job, base=None) if job.base and job.find()[0] != "new" else job
        for job in jobs
    ]
    needed = {job.base for job in jobs}
    return [job for job in jobs if job in needed or not job.for_others]


def print_commands(jobs):
    """One line a run; those that are finished as comments."""
    lines = []
    for job in jobs:
        state, directory = job.find()
        words = ["python", *job.command()[1:]]
        command = " ".join(w if w.startswith('"$(') else shlex.quote(w) for w in words)
        lines.append(f"# finished: {directory}" if state == "finished" else command)
    try:
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    except BrokenPipeError:  # head(1) has read enough; what Python writes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_slurm(path, template, jobs, args, extra):
    """Fill the template for an array of `elements`."""
    own, workers = dataclasses.asdict(args), max(1, args.workers)
    words = []
    for name in ("algos", "tasks", "seeds", "out", "algos_dir", "devices"):
        values = own[name] if isinstance(own[name], tuple) else [own[name]]
        words += ["--" + name.replace("_", "-"), *map(str, values)] if values else []
    words += ["--share-offline"] * args.share_offline + ["--pack"] * args.pack
    Path(args.out).mkdir(parents=True, exist_ok=True)  # SLURM does not make it for its logs
    fill = dict(
        LAST=str(len(elements(jobs, args)) - 1),
        WORKERS=str(workers),
        GPUS=str(max(1, len(args.devices))),
        CPUS=str(8 * workers),
        MEMORY=f"{32 * workers}G",
        OUT=str(Path(args.out).resolve()),
        DIRECTORY=shlex.quote(os.getcwd()),
        PYTHON=shlex.quote(sys.executable),
        LAUNCHER=shlex.quote(os.path.relpath(__file__)),
        ARGUMENTS=shlex.join([*words, "--", *extra]),
    )
    text = Path(template).read_text()
    for word, value in fill.items():
        text = text.replace(f"@{word}@", value)
    Path(path).write_text(text)
    print(f"{path}: an array of {len(jobs)} runs; look through it, then: sbatch {path}")


def print_plan(jobs, args):
    """What the runs that are not finished would cost, one line per method: updates of all seeds,
    operations, hours."""
    import speed  # beside this file

    known, rows = {}, {}  # what a run costs depends on neither its seed nor, nearly, its task
    for job in (job for job in jobs if job.find()[0] != "finished"):
        resolved = dataclasses.replace(job.args, offline_steps=0) if job.base else job.args
        setting = job.script.stem, dataclasses.replace(resolved, seed=0, env_id="", out_dir="")
        if setting not in known:
            online = getattr(resolved, "online_steps", 0) * getattr(resolved, "utd", 1)
            arms = getattr(load_script(job.script), "arms", lambda args: {"": args})(resolved)
            updates = len(arms) * resolved.num_seeds * (resolved.offline_steps + online)
            work = len(arms) * speed.run_flops(job.script.stem, next(iter(arms.values())))
            known[setting] = updates, work
        rows.setdefault(job.label, []).append(known[setting])
    rate = args.tflops * args.share * 1e12
    print(f"counted, not measured: products only, no evaluation; assumed {args.share:.0%} of "
          f"{args.tflops:g} TFLOP/s")  # fmt: skip
    print("| method | runs | million updates | PFLOP a run | GPU hours |\n|---|---|---|---|---|")
    for label, costs in [*rows.items(), ("all", [cost for own in rows.values() for cost in own])]:
        updates, work = (sum(x) for x in zip(*costs, strict=True)) if costs else (0, 0)
        mean, hours = work / max(1, len(costs)), work / rate / 3600
        row = label, len(costs), f"{updates / 1e6:,.6g}", f"{mean / 1e15:.3g}", f"{hours:,.1f}"
        print("| " + " | ".join(map(str, row)) + " |")
    print(f"{hours / args.gpus:,.1f} hours on {args.gpus} GPUs")


# ---- running ----
class Launch:
    """Runs jobs with a number of workers; one line of progress; a failure stops nothing else."""

    def __init__(self, jobs, workers, devices):
        self.jobs, self.workers, self.devices = jobs, workers, devices
        self.runs_per_device = -(-min(workers, len(jobs)) // max(1, len(devices)))
        self.running = {}  # worker -> (job, process, lock, start)
        self.finished, self.before, self.stopped, self.failed = [], [], [], []
        self.waiting = list(jobs)
        self.signals, self.said, self.wide = 0, 0.0, sys.stdout.isatty()

    def on_signal(self, number, frame):
        self.signals += 1
        for _, process, _, _ in self.running.values():
            process.terminate()  # the scripts treat SIGTERM as a Ctrl-C
        if self.signals == 1:
            self.say(f"stopping {len(self.running)} runs, with checkpoints; again: at once")

    def say(self, text):
        """A line that stays."""
        print(f"\r\x1b[K{text}" if self.wide else text, flush=True)

    def show_progress(self):
        """A line that is overwritten; where there is no terminal, one line a minute."""
        done = len(self.finished) + len(self.before)
        parts = [f"{done}/{len(self.jobs)} done"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        line = ", ".join(parts) + f" | {len(self.running)} running"
        for job, *_ in self.running.values():
            line += f" | {job}: {last_line(job.log)[:60]}"
        if self.wide:
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif time.monotonic() - self.said > 60:
            self.said = time.monotonic()
            print(line, flush=True)

    def start(self, job, worker):
        """Begin or resume a job, unless it is finished or another launcher has it."""
        state, directory = job.find()
        if state == "finished":
            self.before.append(job)
            return
        job.home.mkdir(parents=True, exist_ok=True)
        lock = open(job.home / "lock", "w")  # held by the run itself, until it ends
        if not take(lock, tries=4):
            lock.close()
            self.fail(job, f"another launcher is running it, see {job.log}")
            return
        facts = dict(label=job.label, script=job.script.stem, flags=job.flags)
        facts |= dict(arms=dict(job.labels)) if job.labels else {}
        (job.home / "launch.tmp").write_text(json.dumps(facts, indent=2) + "\n")
        (job.home / "launch.tmp").replace(job.home / "launch.json")  # a --status may be reading it
        env = self.environment(worker)
        with open(job.log, "a") as log:
            print(f"\n$ {shlex.join(job.command())}", file=log, flush=True)
            # a session of its own: a Ctrl-C at the terminal reaches it once, through us
            process = subprocess.Popen(
                job.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=env, pass_fds=[lock.fileno()], start_new_session=True,
            )  # fmt: skip
        self.running[worker] = (job, process, lock, time.monotonic())
        self.say(f"started {job}" + (f", resumed from {directory}" if state == "resume" else ""))

    def environment(self, worker):
        """The worker's device and, where several runs share it, the most they may take of its
        memory; a tenth is left to CUDA itself."""
        env = dict(os.environ)
        if self.devices:
            env["CUDA_VISIBLE_DEVICES"] = self.devices[worker % len(self.devices)]
        names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # not both, says JAX
        if self.runs_per_device > 1 and not any(name in env for name in names):
            env[names[0]] = f"{0.9 / self.runs_per_device:.3f}"
        return env

    def collect(self, worker):
        """Note how a job ended."""
        job, process, lock, start = self.running.pop(worker)
        lock.close()
        if job.find()[0] == "finished" and process.returncode == 0:
            self.finished.append(job)
            seconds = time.monotonic() - start
            self.say(f"finished {job} in {seconds:,.0f} s: {last_line(job.log)}")
        elif self.signals:
            self.stopped.append(job)
        else:
            reason = f"exit code {process.returncode}: {last_line(job.log)}"
            self.fail(job, reason)
            self.say(f"failed {job}, {reason}")

    def fail(self, job, reason):
        """Note a failure, of the runs that would start from this one too."""
        self.failed.append((job, reason))
        for other in [other for other in self.waiting if other.base == job]:
            self.waiting.remove(other)
            self.fail(other, f"waited for {job}, which failed")

    def next(self):
        """Take the first job that need not wait for another one, or None."""
        done = {None, *self.finished, *self.before}
        for job in self.waiting:
            if job.base in done:
                self.waiting.remove(job)
                return job

    def __call__(self):
        """Run everything -> exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        while self.running or (self.waiting and not self.signals):
            for worker in range(self.workers):
                while worker not in self.running and not self.signals and (job := self.next()):
                    self.start(job, worker)
            for worker in [w for w, r in self.running.items() if r[1].poll() is not None]:
                self.collect(worker)
            self.show_progress()
            time.sleep(0.2)
        return self.summary(len(self.waiting) + len(self.stopped))

    def summary(self, left):
        """What happened, the failures with their logs, how to go on -> exit code."""
        self.say(
            f"{len(self.jobs)} runs: {len(self.finished)} finished now, {len(self.before)} before, "
            f"{len(self.failed)} failed, {left} left"
        )
        for job, reason in self.failed:
            print(f"failed: {job}: {reason}")
            if job.log.is_file():
                print(f"  log: {job.log}")
        if left:
            print("stopped; the same command goes on where the runs stand")
        return 130 if left else int(bool(self.failed))


def take(lock, tries=1):
    """Lock an open file unless another process holds it; several tries outlast a --status."""
    for _ in range(tries):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05 * (tries > 1))
    return False


def last_lines(path):
    """The last lines of a log (4 KB), empty ones left out, since its last command."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [x.strip() for x in file.read().decode(errors="replace").splitlines() if x.strip()]
    begins = [i + 1 for i, line in enumerate(lines) if line.startswith("$ ")]
    return lines[begins[-1] :] if begins else lines


def last_line(path):
    """The last line of a log that is not empty; a log begins with the command."""
    return ["starting", *last_lines(path)][-1]


# ---- watching ----
PROGRESS = re.compile(r"\w+ ([\d,]+)/([\d,]+)  ([\d,.]+)/s  ETA ")  # a line of a script's log
STATES = ("running", "failed", "stopped", "finished")
TITLES = ("run", "state", "progress", "rate", "ETA", "last evaluation")


@dataclasses.dataclass(frozen=True)
class Status:
    """What the files of a run say; `step`, `total` and `rate` (steps/s) are None where unknown."""

    name: str
    state: str  # one of STATES
    line: str  # the last one of the log
    step: int | None
    total: int | None
    rate: float | None
    value: str  # headline metric of the last evaluation

    def row(self):
        """The texts below TITLES."""
        progress = rate = eta = ""
        if self.step is not None:
            progress = f"{self.step:,}"
            if self.total:
                progress += f"/{self.total:,} {self.step / self.total:.0%}"
        if self.rate and self.state == "running":
            rate = f"{self.rate:,.1f}/s"
            eta = duration((self.total - self.step) / self.rate) if self.total else ""
        return self.name, self.state, progress, rate, eta, self.value


def duration(seconds):
    """Rounded: 80 s, 25 min, 3 h 05."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if seconds > 90 else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02}"


def read_status(home):
    """The Status of the run in this directory of a launcher's, or None where it has not begun."""
    log, directories = home / "log.txt", sorted(home.glob("*/args.json"))
    if not log.is_file():
        return None
    facts, lines = json.loads((home / "launch.json").read_text()), last_lines(log)
    name = f"{facts['label']} {home.parent.name} seed {home.name.partition('-')[0]}"
    step = total = rate = None
    value = ""
    if directories:
        args = json.loads(directories[-1].read_text()).get("args", {})
        total = (args.get("offline_steps") or 0) + (args.get("online_steps") or 0) or None
        step, value = last_evaluation(directories[-1].with_name("metrics.csv"))
    if said := [m for m in map(PROGRESS.match, lines) if m]:
        done, end, rate = (float(x.replace(",", "")) for x in said[-1].groups())
        step, total = max(step or 0, int(done)), total or int(end)
    state = "failed"
    if next(home.glob("*/result.json"), None):
        state, step = "finished", total
    elif is_held(home / "lock"):
        state = "running"
    elif lines and lines[-1].startswith("stopped;"):
        state = "stopped"
    return Status(name, state, lines[-1] if lines else "starting", step, total, rate, value)


def is_held(path):
    """Does a run hold this lock?"""
    if not path.is_file():
        return False
    with open(path, "a") as lock:  # NFS locks only what is open for writing
        return not take(lock)


def last_evaluation(path):
    """metrics.csv -> (last step or None, 'success 0.44 at 10,000': the mean over seeds, or '')."""
    if not path.is_file():
        return None, ""
    with open(path, newline="") as file:
        rows = [r for r in csv.DictReader(file) if None not in r.values()]  # no half-written line
    name = next((k for k in (rows[0] if rows else ()) if k.startswith("eval/")), None)
    evaluated = [r for r in rows if name and r[name]]
    if not evaluated:
        return int(rows[-1]["step"]) if rows else None, ""
    step = evaluated[-1]["step"]
    values = [float(r[name]) for r in evaluated if r["step"] == step]
    text = f"{name.removeprefix('eval/')} {sum(values) / len(values):.2f} at {int(step):,}"
    return int(rows[-1]["step"]), text


def format_status(runs, width, height):
    """A table of Status, running ones first, in at most `height` lines of `width` characters."""
    count = {state: sum(r.state == state for r in runs) for state in STATES}
    head = f"{len(runs)} runs: " + ", ".join(f"{n} {state}" for state, n in count.items() if n)
    table = [TITLES]
    for run in sorted(runs, key=lambda r: (STATES.index(r.state), r.name)):
        table += [run.row()] + ([f"  {run.line}"] if run.state == "failed" else [])
    rows = [row for row in table if isinstance(row, tuple)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(TITLES))]
    lines = [head]
    for row in table:
        cells = [row] if isinstance(row, str) else map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    if len(lines) > height:
        left = len(lines) - height + 1
        lines = [*lines[: height - 1], f"... {left} more lines; --once prints them all"]
    return "\n".join(line[:width] for line in lines)


def watch(out, once):
    """Show the table of runs below `out`, again and again at a terminal -> exit code."""
    live = sys.stdout.isatty() and not once
    size, clear = os.terminal_size((1000, sys.maxsize)), ""
    while True:
        homes = sorted(path.parent for path in Path(out).rglob("launch.json"))
        runs = [run for run in map(read_status, homes) if run]
        if not runs:
            raise UserError(f"no run of a launcher below {out}; give the --out of a launch")
        if live:
            size, clear = shutil.get_terminal_size(), "\x1b[H\x1b[J"
        print(clear + format_status(runs, size.columns, size.lines - 1), flush=True)
        if not live:
            return 0
        time.sleep(2)


# ---- main ----
def main(argv):
    """Split off what follows a lone --, expand, then print, write or run -> exit code."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, extra = tyro.cli(Args, description=__doc__, args=argv[:cut]), argv[cut + 1 :]
    try:
        if args.status:
            with contextlib.suppress(KeyboardInterrupt):
                return watch(args.status, args.once)
            return 0
        jobs = expand(args, extra)
        if args.pack and args.share_offline:
            raise UserError("--pack and --share-offline exclude each other")
        jobs = pack(jobs, Path(args.out)) if args.pack else jobs
        jobs = share_offline(jobs, Path(args.out)) if args.share_offline else jobs
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    devices = args.devices
    if args.index is not None:
        own, visible = elements(jobs, args)[args.index :], os.environ.get("CUDA_VISIBLE_DEVICES")
        jobs = own[0] if own else []
        if devices and visible:  # the ones that SLURM has given to this element
            devices = tuple(visible.split(","))
    if args.slurm and not args.plan:
        write_slurm(args.slurm, args.slurm_template, jobs, args, extra)
        return 0
    jobs = without_idle(jobs)
    if args.plan:
        print_plan(jobs, args)
    elif args.workers:
        return Launch(jobs, args.workers, devices)()
    else:
        print_commands(jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
