"""What a GPU does with these scripts, in ten minutes: one Markdown table and JSON.

    bash benchmark/gpu.sh                              # on a machine with a GPU
    bash benchmark/gpu.sh --fql ../fql                 # beside a checkout of the released FQL
    bash benchmark/gpu.sh --tiny                       # does it run? Tiny networks, any machine

Measured: updates/s of every method at its paper's settings, 1 to 128 members in one program, in
JAX's default precision (TF32 on such GPUs), in float32 and in bfloat16, and with CUDA graphs for
loops; training on antmaze-large with evaluations; SAC Flow's loop on HalfCheetah-v5; environment
steps/s of the point maze, of MJX and of its Warp version where that is installed; a profile of one
update; the released FQL's update.

Each measurement is a process of its own with a time limit; one that fails is a row that says so.
First all of them run in short, several at once, which fills the compilation cache in OUT; then one
after another, timed, until the minutes are over. OUT: gpu.md, gpu.json, a log of each measurement.
"""

import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Args:
    out: str = "runs/gpu"  # directory of table, JSON and logs
    minutes: float = 10.0  # for everything; what has not begun by then is listed as failed
    members: tuple[int, ...] = (1, 8, 32, 128)  # vmapped seeds of the updates
    fql: str | None = None
    """checkout of github.com/seohongpark/fql: times its update beside ours (its distrax and
    ml_collections may be absent)"""
    dataset_dir: str = "~/.ogbench/data"
    """antmaze-large is trained on its official or collected data, if they are here, else on random
    numbers of the same shape"""
    at_once: int = max(1, (os.cpu_count() or 1) - 2)  # processes that compile at the same time
    only: tuple[str, ...] = ()  # measurements of these names only; a wrong one lists them
    tiny: bool = False  # tiny networks and short timings, on any machine: numbers mean nothing
    part: Literal["train", "profile", "fql", "engines"] | None = None
    """(how it calls itself) one measurement that no other script makes"""


class Measurement(NamedTuple):
    """A command whose Markdown tables hold the rows wanted, and how to read one of them."""

    name: str
    command: tuple  # words after python
    limit: float  # seconds
    read: object  # {column: cell} -> (what, members, per second, note)
    short: tuple | None = None  # more words, so that it does little more than compile
    env: dict = {}  # noqa: RUF012  (never changed)


# ---- the list ----
def read_speed(suffix=""):
    def read(cells):
        notes = [f"{cells['ms each']} ms"]
        notes += [f"{cells['x one at a time']} x one at a time"] if cells["x one at a time"] else []
        notes += [f"{cells['GFLOP/s']} GFLOP/s"] if cells["GFLOP/s"] else []
        notes += [f"{cells['peak MiB']} MiB"] if cells["peak MiB"] else []
        return cells["what"] + suffix, cells["seeds or envs"], cells["per second"], ", ".join(notes)

    return read


def read_own(cells):
    return cells["what"], cells["members"], cells["per second"], cells["note"]


def read_loop(cells):
    return f"{cells['task']}, {cells['loop']}", 1, cells["env steps/s"], f"x {cells['ratio']}"


def read_mjx(cells):
    note = f"official, 1 process: {cells['official steps/s, 1 process']}/s"
    note += f"; compiled in {cells['compile s']} s"
    return f"{cells['task']}, MJX", cells["environments"], cells["MJX steps/s"], note


def own(part, args):
    words = ["benchmark/gpu.py", "--part", part, "--dataset-dir", args.dataset_dir]
    words += ["--fql", args.fql] if args.fql else []
    return (*words, *["--tiny"] * args.tiny)


FULL = dict(  # words of the commands
    speed="--seconds 0.3 --repeats 3",
    loop="--steps 1200 --hidden-dim 512 --critic-hidden-dims 1024 1024 --batch-size 512",
    maze="--num-envs 16384",
    mjx="--num-envs 1024 4096 --steps 20 --tasks HalfCheetah-v5 antmaze-large-singletask-task1-v0",
)
TINY = dict(
    speed="--quick",
    loop="--steps 60 --hidden-dim 16 --critic-hidden-dims 16 16 --batch-size 16",
    maze="",
    mjx="--num-envs 2 --steps 1 --tasks HalfCheetah-v5",
)
# what is measured in other precisions, and with the loops in CUDA graphs, too
VARIED = ("GSFlow", "FMQ offline", "SAC Flow-G Hopper")
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE"


def measurements(args, methods):
    """What is measured, the most wanted first."""
    words = {k: v.split() for k, v in (TINY if args.tiny else FULL).items()}
    speed, once = ("benchmark/speed.py", *words["speed"]), ("--repeats", "1")
    few = [n for n in args.members if n in (args.members[0], 32)]

    def updates(method, members, suffix="", more=(), **env):
        command = (*speed, *more, "--parts", "update", "--methods", method, "--num-seeds", *members)
        short = ("--seconds", "0", *once)
        return Measurement(method + suffix, command, 90, read_speed(suffix), short, env)

    loop = ("benchmark/sac_flow_loop.py", "--tasks", "HalfCheetah-v5", *words["loop"], *once)
    maze = (*speed, "--parts", "env", *words["maze"])
    mjx = ("benchmark/mjx.py", *words["mjx"], "--repeats", "2")
    found = [updates(method, args.members) for method in methods]
    found += [
        Measurement("training", own("train", args), 120, read_own),
        Measurement("SAC Flow's loop", loop, 90, read_loop, ("--steps", "60")),
        Measurement("point maze", maze, 60, read_speed()),
    ]
    if args.fql:
        found.append(Measurement("released FQL", own("fql", args), 60, read_own))
    for method in [m for m in methods if m in VARIED]:
        for precision, name in (("highest", "float32"), ("BF16_BF16_F32", "bfloat16")):
            found.append(updates(method, few, f", {name}", ("--matmul-precision", precision)))
        flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}".strip()
        found.append(updates(method, few, ", loops in CUDA graphs", XLA_FLAGS=flags))
    found += [
        Measurement("profile", own("profile", args), 60, read_own),
        Measurement("MJX", mjx, 150, read_mjx, once),
        Measurement("engines", own("engines", args), 90, read_own),
    ]
    return [one for one in found if one.name in (args.only or one.name)]


# ---- running ----
def table_rows(text):
    """Rows of the Markdown tables in a text, as {column: cell}; other lines may stand between."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    lines = [cells for cells in lines if cells]
    rule = [set("".join(cells)) <= set("-: ") for cells in lines] + [False]
    rows, columns = [], ()
    for i, cells in enumerate(lines):
        if rule[i + 1]:
            columns = cells
        elif not rule[i]:
            rows.append(dict(zip(columns, cells, strict=False)))
    return rows


class Runner:
    """Runs measurements; knows how much time is left."""

    def __init__(self, args, out):
        self.args, self.out, self.end = args, out, time.monotonic() + 60 * args.minutes

    @property
    def left(self):
        return max(0.0, self.end - time.monotonic())

    def start(self, one, words=()):
        """A process that writes into the measurement's log."""
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(self.out / "jax-cache")} | one.env
        env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *map(str, one.command), *map(str, words)]
        with open(self.log(one), "w") as log:
            print("$", shlex.join(command), file=log, flush=True)
            return subprocess.Popen(
                command, cwd=HERE.parent, env=env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def log(self, one):
        return self.out / f"{re.sub('[^a-z0-9]+', '-', one.name.lower())}.log"

    def compile_all(self, todo):
        """Fill the compilation cache: short runs, several at once, in at most 40% of the time."""
        waiting, running = [one for one in todo if one.short], {}
        end, total = time.monotonic() + 0.4 * self.left, len(waiting)
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < self.args.at_once:
                    one = waiting.pop(0)
                    running[one.name] = self.start(one, one.short)
                for name in [n for n, process in running.items() if process.poll() is not None]:
                    running.pop(name)
                    done = total - len(waiting) - len(running)
                    print(f"compiled {done}/{total}, {self.left:.0f} s left", flush=True)
                time.sleep(0.1)
        finally:
            for process in running.values():
                stop(process)

    def measure(self, one):
        """The rows of a measurement, and one that says what went wrong, if something did."""
        limit = min(one.limit * (10 if self.args.tiny else 1), self.left)  # CPUs take their time
        if limit < 5:
            return [dict(what=one.name, failed="no time left")]
        process, reason = self.start(one), ""
        try:
            code = process.wait(limit)
            reason = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"not done in {limit:.0f} s"
        finally:  # a Ctrl-C, too
            if process.poll() is None:
                stop(process)
        text = self.log(one).read_text(errors="replace")
        names, rows = ("what", "members", "per_second", "note"), []
        for cells in table_rows(text):
            with contextlib.suppress(KeyError):  # another table
                rows.append(dict(zip(names, one.read(cells), strict=True)))
        if reason or not rows:
            last = [x.strip() for x in text.splitlines() if x.strip()][-1]
            rows.append(dict(what=one.name, failed=f"{reason or 'no rows'}: {last[:200]}"))
        return rows


def stop(process):
    """End a process and those that it has started, of which it is the session's leader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def markdown(facts, rows):
    """The report: what machine, then one table."""
    lines = [f"{facts['device']}, jax {facts['jax']}, commit {facts['commit']}", ""]
    if facts["tiny"]:
        lines[1:1] = ["Tiny networks: these numbers mean nothing."]
    lines += ["| measurement | members | per second | note |", "|---|---|---|---|"]
    for row in rows:
        note = f"failed: {row['failed']}" if "failed" in row else row["note"]
        cells = row["what"], row.get("members", ""), row.get("per_second", ""), note
        lines.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def methods():
    import speed  # imports JAX, but touches no device

    return speed.known_methods()


def machine():
    """What JAX finds here, asked in another process, so that this one takes no memory of it."""
    code = "import jax; d = jax.devices(); print(f'{len(d)} x {d[0].device_kind}', d[0].platform)"
    code += "; print(jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return None
    device, version = done.stdout.strip().splitlines()[-2:]
    return *device.rsplit(" ", 1), version


def main(args):
    if args.part:
        return PARTS[args.part](args)
    if args.fql and not (Path(args.fql) / "agents" / "fql.py").is_file():
        print(f"error: no agents/fql.py in {args.fql}; clone github.com/seohongpark/fql there")
        return 2
    args = dataclasses.replace(args, fql=args.fql and str(Path(args.fql).resolve()))
    args = dataclasses.replace(args, members=(1, 2)) if args.tiny else args
    names = [one.name for one in measurements(dataclasses.replace(args, only=()), methods())]
    if wrong := set(args.only) - set(names):
        print(f"error: no measurement {', '.join(wrong)}; there are: {', '.join(names)}")
        return 2
    todo, found = measurements(args, methods()), machine()
    if found is None or (found[1] == "cpu" and not args.tiny):
        print('error: JAX finds no GPU here; pip install "jax[cuda12]==VERSION", or --tiny')
        return 2
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    facts = dict(device=found[0], jax=found[2], commit=commit or "unknown", tiny=args.tiny)
    runner, rows = Runner(args, out), []
    if not args.tiny:
        runner.compile_all(todo)
    for i, one in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {one.name}, {runner.left:.0f} s left", flush=True)
        rows += runner.measure(one)
        (out / "gpu.md").write_text(markdown(facts, rows))  # each time: a cut run keeps its rows
        (out / "gpu.json").write_text(json.dumps(facts | dict(rows=rows), indent=2) + "\n")
    print(f"\n{(out / 'gpu.md').read_text()}\n{out / 'gpu.md'}, {out / 'gpu.json'}")
    return 0


# ---- measurements of its own ----
def show(*rows):
    """Print rows as a table: (what, members, per second, note)."""
    print("| what | members | per second | note |\n|---|---|---|---|")
    for what, members, rate, note in rows:
        rate = "" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        print(f"| {what} | {members} | {rate} | {note} |", flush=True)
    return 0


def train(args):
    """A training run with evaluations: updates/s, and the seconds of the last evaluation, which are
    what lies between two evaluations and is not training."""
    import numpy as np
    import speed

    env_id = "pointmaze-medium" if args.tiny else "antmaze-large"
    names = [f"antmaze-large-navigate-v0{end}.npz" for end in ("", ".collected")]
    files = [Path(args.dataset_dir).expanduser() / name for name in names]
    steps, every = (40, 20) if args.tiny else (9_000, 3_000)
    flags = ["--env-id", env_id, "--offline-steps", steps, "--eval-interval", every]
    flags += ["--log-interval", every, "--dataset-dir", args.dataset_dir]
    if args.tiny:
        flags += ["--hidden-dims", 16, 16, "--prior-hidden-dims", 16, "--batch-size", 16]
        flags += ["--eval-episodes", 2]
    with tempfile.TemporaryDirectory() as folder:
        data = next((f"{f.name}" for f in files if f.is_file() and not args.tiny), "random data")
        if data == "random data":
            size, count = ((2, 2), 2_000) if args.tiny else ((29, 8), 1_000_000)
            np.savez(f"{folder}/random.npz", **speed.random_rows(count, *size))
            flags += ["--dataset", f"{folder}/random.npz"]
        command, took = [sys.executable, "algos/gsflow.py", *map(str, flags)], []
        for way in ("--eval-background", "--no-eval-background"):  # the second one has the figures
            out, said = f"{folder}/{way}", {}
            process = subprocess.Popen(
                [*command, way, "--out-dir", out],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            for line in process.stdout:
                print(line, end="", flush=True)
                if found := re.match(r"offline step\s+([\d,]+)  ", line):  # an evaluation is done
                    said[int(found[1].replace(",", ""))] = time.monotonic()
            if process.wait():
                return 1
            took.append(max(said.values()) - min(said.values()))
        run = next(Path(out).glob("*/result.json")).parent
        result = json.loads((run / "result.json").read_text())
        with open(run / "metrics.csv", newline="") as file:
            trained = {int(r["step"]): float(r["time/train_seconds"]) for r in csv.DictReader(file)}
    last, before = sorted(said)[-1], sorted(said)[-2]
    learning = trained[last] - trained[before]
    evaluation = said[last] - said[before] - learning
    episodes = len(next(iter(result["episodes"].values()))[0])
    note = f"{data}; an evaluation of {episodes} episodes takes {evaluation:.1f} s; from the "
    note += f"first to the last {took[1]:.1f} s, {took[0]:.1f} s where training goes on meanwhile"
    return show((f"GSFlow trains on {env_id}", 1, (last - before) / learning, note))


def profile(args):
    """Time that a device spends on the kernels of an update, beside the clock's."""
    import jax
    import speed

    rows, iterations = [], 5 if args.tiny else 50
    for name in ("GSFlow", "FMQ online", "SAC Flow-G Hopper"):
        script, make_case, flags = speed.METHODS[name]
        case = make_case(flags | (speed.QUICK[script] if args.tiny else {}), 10_000)
        program, carry = case.script.Program(case.step, case.data), speed.start_carry(case)
        carry = jax.block_until_ready(program(program(carry, 1), iterations))
        start = time.perf_counter()
        carry = jax.block_until_ready(program(carry, iterations))
        updates = iterations * case.updates
        each = (time.perf_counter() - start) / updates
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(program(carry, iterations))
            files = sorted(Path(folder).rglob("*.xplane.pb"))
            kernels = device_events(jax.profiler.ProfileData.from_file(str(files[0])))
        if kernels:
            busy = sum(sum(times) for times in kernels.values()) / updates
            count = sum(map(len, kernels.values())) / updates
            top = sorted(kernels, key=lambda k: -sum(kernels[k]))[:5]
            shares = [f"{k} {sum(kernels[k]) / updates / busy:.0%}" for k in top]
            note = (
                f"{count:.0f} kernels take {1e6 * busy:.0f} of {1e6 * each:.0f} us of an update: "
            )
            note += ", ".join(shares)
        else:
            cost = program.executable.cost_analysis() or {}
            note = f"no kernels in the trace; XLA counts {cost.get('flops', 0):.3g} FLOP"
        rows.append((f"{name}, profile", 1, 1 / each, note))
    return show(*rows)


def device_events(data):
    """{kernel: seconds of each of its runs}: events of a GPU's streams, or of XLA's threads on a
    CPU."""
    found = {}
    for plane in data.planes:
        for line in plane.lines:
            gpu = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            if gpu or (plane.name == "/host:CPU" and "XLA" in line.name):
                for event in line.events:  # without the runtime's own, and what holds others
                    if not re.match(r"while|call|conditional|.*::", event.name):
                        found.setdefault(event.name, []).append(1e-9 * event.duration_ns)
    return found


def released_fql(args):
    """The released FQL's update as its `main.py` makes it, a call on a batch that NumPy gathers;
    beside ours, many in one dispatch."""
    import jax
    import numpy as np
    import speed

    try:
        import distrax  # noqa: F401
    except ImportError:  # other methods' policies use it
        sys.modules["distrax"] = types.SimpleNamespace(Transformed=object)
    try:
        import ml_collections  # noqa: F401
    except ImportError:
        holder = types.SimpleNamespace(placeholder=lambda kind: None)
        sys.modules["ml_collections"] = types.SimpleNamespace(ConfigDict=dict, config_dict=holder)
    sys.path.insert(0, args.fql)
    from agents.fql import FQLAgent, get_config

    bench = speed.Args(seconds=0.05 if args.tiny else 1.0, repeats=1 if args.tiny else 3)
    rows, rng = speed.random_rows(10_000, 29, 8), np.random.default_rng(0)
    config = get_config()
    if args.tiny:
        small = dict(actor_hidden_dims=(16, 16), value_hidden_dims=(16, 16), batch_size=16)
        config.update(small)
    agent = FQLAgent.create(0, rows["observations"][:1], rows["actions"][:1], config)

    def updates(n):
        nonlocal agent
        for _ in range(n):
            index = rng.integers(len(rows["rewards"]), size=config["batch_size"])
            agent, info = agent.update({k: v[index] for k, v in rows.items()})
        return info

    theirs = speed.per_call(updates, bench)
    small = speed.QUICK["gsflow"] if args.tiny else {}
    ours = speed.time_dispatched(speed.gsflow_case(speed.FQL | small, 10_000), bench)
    jax.block_until_ready(agent.network.params)
    note = f"ours, many updates in one dispatch: {1 / ours:,.0f}/s, x {theirs / ours:.2f}"
    return show(("released FQL, one update a call", 1, 1 / theirs, note))


def engines(args):
    """Engine steps/s of HalfCheetah's bare model: MJX in JAX, and in Warp where it is installed."""
    import gymnasium
    import jax
    import speed
    from mujoco import mjx

    model, rows = gymnasium.make("HalfCheetah-v5").unwrapped.model, []
    count, steps = (2, 2) if args.tiny else (4_096, 100)
    for impl in ("jax",) if args.tiny else ("jax", "warp"):
        sizes = dict(naconmax=16 * count, njmax=64) if impl == "warp" else {}
        try:
            on_device = mjx.put_model(model, impl=impl)
            data = mjx.make_data(model, impl=impl, **sizes)
            tilt = lambda key, data=data: data.replace(
                qpos=data.qpos + 0.01 * jax.random.normal(key, data.qpos.shape)
            )
            batch = jax.vmap(tilt)(jax.random.split(jax.random.key(0), count))
            step = jax.vmap(mjx.step, in_axes=(None, 0))
            run = jax.jit(
                lambda m, d, step=step: jax.lax.fori_loop(0, steps, lambda i, d: step(m, d), d)
            )
            seconds = speed.fastest(lambda run=run, m=on_device, b=batch: run(m, b), 1)
        except Exception as e:  # Warp is optional, and says in many ways that it is not there
            rows.append((f"engine, {impl}", count, None, f"not measured: {str(e).splitlines()[0]}"))
            continue
        rows.append((f"engine, {impl}", count, count * steps / seconds, "bare steps"))
    return show(*rows)


PARTS = dict(train=train, profile=profile, fql=released_fql, engines=engines)

if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
