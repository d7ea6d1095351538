"""Runs survive: kill and resume, damaged checkpoints, interrupts, bad input."""

import fcntl
import json
import os
import random
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_end, finish, launch, only_run, rows_without_time, start

TINY = "--hidden-dims 8 8 --prior-hidden-dims 8 --batch-size 16 --num-candidates 2 --flow-steps 2"
TINY = (TINY + " --eval-episodes 3 --updates-per-dispatch 20").split()
BANDIT = ["--env-id", "multi-crescent", *TINY]
BOTH_PHASES = [*BANDIT, "--offline-steps", 200, "--online-steps", 200, "--eval-interval", 100]


@pytest.fixture(scope="module")
def reference(gsflow, tmp_path_factory):
    """A run that nobody interrupted, two seeds, both phases."""
    directory = tmp_path_factory.mktemp("reference")
    launch(gsflow, *BOTH_PHASES, "--num-seeds", 2, out_dir=directory)
    return only_run(directory)


def test_a_run_leaves_what_it_should(reference):
    names = {path.name for path in reference.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.msgpack", "result.json"} <= names
    assert {"tb_seed0", "tb_seed1", "multi_crescent_offline.png"} <= names
    result = json.loads((reference / "result.json").read_text())
    for key in ("eval/success", "eval/return", "steps", "train_seconds", "updates_per_s"):
        assert np.isfinite(result[key])
    assert result["dataset_source"] == "generated" and result["steps"] == 400
    assert np.shape(result["episodes"]["return"]) == (2, 3)
    args = json.loads((reference / "args.json").read_text())["args"]
    assert args["alpha"] is not None and args["target_entropy"] == -1.0
    rows = rows_without_time(reference)
    assert [r["step"] for r in rows[::2]] == [str(s) for s in range(20, 401, 20)]


def kill_and_resume(flags, directory, kills, rng):
    """Train to the end through `kills` SIGKILLs, each a random moment after a new checkpoint, so
    while the next ones are computed and written. Returns how many kills there were."""
    process = start("gsflow", *flags, out_dir=directory)
    checkpoint, seen, done = None, None, 0
    while done < kills and process.poll() is None:
        checkpoint = checkpoint or next(directory.glob("*/checkpoint.msgpack"), None)
        stamp = checkpoint and checkpoint.exists() and checkpoint.stat().st_mtime_ns
        if not stamp or stamp == seen:
            time.sleep(0.0005)
            continue
        time.sleep(rng.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = checkpoint.exists() and checkpoint.stat().st_mtime_ns
        done += 1
        print(f"kill {done}: {len(list(directory.glob('*/*.tmp')))} half-written file(s)")
        process = start("gsflow", "--resume", only_run(directory))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 or "is complete" in err, err
    return done


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "host"])
def test_killed_and_resumed_equals_uninterrupted(gsflow, reference, data_dir, tmp_path, backend):
    """The last checkpoint (parameters, replay, environments) and all metrics are the same bytes.

    CLEANFLOW_KILLS=20 kills more often than the tests have time for.
    """
    if backend == "jax":
        flags = [*BOTH_PHASES, "--num-seeds", 2, "--checkpoint-interval", 2]
    else:  # the official point maze, stepped by gymnasium
        flags = [*TINY, "--env-backend", "host", "--eval-episodes", 2, "--eval-interval", 200]
        flags += ["--dataset-dir", data_dir]
        flags += ["--offline-steps", 40, "--online-steps", 160, "--checkpoint-interval", 5]
        (tmp_path / "reference").mkdir()
        launch(gsflow, *flags, out_dir=tmp_path / "reference")
        reference = only_run(tmp_path / "reference")
    (tmp_path / "killed").mkdir()
    kills = int(os.environ.get("CLEANFLOW_KILLS", 1))
    assert kill_and_resume(flags, tmp_path / "killed", kills, random.Random(0)) >= 1
    run = only_run(tmp_path / "killed")
    assert_same_end(gsflow, run, reference)
    assert rows_without_time(run) == rows_without_time(reference)


@pytest.mark.slow
def test_evaluation_and_logging_do_not_touch_training(gsflow, reference, tmp_path):
    flags = [*BOTH_PHASES, "--num-seeds", 2, "--eval-interval", 10]
    launch(gsflow, *flags, out_dir=tmp_path)
    states = [gsflow.load_checkpoint(r)[0] for r in (reference, only_run(tmp_path))]
    assert_same_tree(*[{k: v for k, v in s.items() if k != "sums"} for s in states])


def assert_same_tree(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


SHORT = [*BANDIT, "--offline-steps", 20, "--eval-interval", 20]


@pytest.fixture(scope="module")
def together(gsflow, tmp_path_factory):
    """20 offline steps of seeds 0 and 1."""
    directory = tmp_path_factory.mktemp("together")
    launch(gsflow, *SHORT, "--num-seeds", 2, out_dir=directory)
    return parameters(gsflow, directory)


def parameters(gsflow, directory):
    tree, _ = gsflow.load_checkpoint(only_run(directory))
    return jax.tree.leaves(jax.tree.map(np.asarray, tree["state"]["params"]))


@pytest.mark.slow
def test_a_vmapped_seed_equals_its_single_run(gsflow, together, tmp_path):
    launch(gsflow, *SHORT, "--seed", 1, out_dir=tmp_path)
    for a, b in zip(together, parameters(gsflow, tmp_path), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-5)
        assert a.ndim == 1 or np.all(a == 0) or not np.array_equal(a[0], a[1])


@pytest.mark.slow
def test_seeds_spread_over_devices_give_the_same(gsflow, together, tmp_path):
    two_devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    finish(start("gsflow", *SHORT, "--num-seeds", 2, out_dir=tmp_path, env=two_devices))
    facts = json.loads((only_run(tmp_path) / "args.json").read_text())
    assert facts["device"].startswith("2 x ")
    for a, b in zip(together, parameters(gsflow, tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_evaluate_repeats_the_final_evaluation(gsflow, reference):
    out, _ = launch(gsflow, "--evaluate", reference)
    result = json.loads((reference / "result.json").read_text())
    assert result["seeds"] == [0, 1]
    for i, seed in enumerate(result["seeds"]):
        expected = [f"{np.mean(result['episodes'][k][i]):.2f}" for k in ("success", "return")]
        assert [str(seed), *expected] == out.splitlines()[2 + i].split()[:3]


def test_evaluate_with_another_temperature(gsflow, reference):
    out, _ = launch(gsflow, "--evaluate", reference, "--eval-temperature", 1)
    assert len(out.splitlines()) == 5
    _, err = launch(gsflow, "--evaluate", reference, "--alpha", 1, code=2)
    assert "--alpha was" in err


def test_killed_between_last_checkpoint_and_result(gsflow, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    launch(gsflow, "--resume", tmp_path / "run")
    before, after = (
        json.loads((r / "result.json").read_text()) for r in (reference, tmp_path / "run")
    )
    assert before["episodes"] == after["episodes"]
    assert before["eval/success_last_three"] == after["eval/success_last_three"]
    _, err = launch(gsflow, "--resume", tmp_path / "run", code=2)
    assert "is complete" in err


def test_nohup_is_respected(gsflow, tmp_path, monkeypatch):
    """What ignores a closed terminal goes on doing so; Ctrl-C and SIGTERM are answered."""
    answered = []
    monkeypatch.setattr(gsflow.signal, "signal", lambda number, _: answered.append(number))
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        monkeypatch.setattr(gsflow.signal, "getsignal", lambda _, handler=handler: handler)
        argv = [*map(str, SHORT), "--out-dir", str(tmp_path)]
        assert gsflow.command_line(gsflow.main, gsflow.Args, argv) == 0
    both = [signal.SIGINT, signal.SIGTERM]
    assert answered == [*both, *both, signal.SIGHUP]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_group_of_a_run_with_official_environments(
    data_dir, tmp_path, number, code
):
    """Ctrl-C, a closed terminal and timeout(1) send it to all processes, but only the main one may
    answer: it needs its simulators for the checkpoint."""
    flags = [*TINY, "--env-backend", "host", "--offline-steps", 20, "--online-steps", 100_000]
    flags += ["--eval-episodes", 1, "--eval-interval", 20, "--checkpoint-interval", 20]
    flags += ["--dataset-dir", data_dir, "--num-envs", 2]
    process = start("gsflow", *flags, out_dir=tmp_path, start_new_session=True)
    while len(list(tmp_path.glob("*/checkpoint.*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, err = finish(process, code)
    assert f"--resume {only_run(tmp_path)}" in err and "Traceback" not in err
    assert "resource_tracker" not in err


@pytest.mark.parametrize(
    "number,code",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_interrupt_saves_and_says_how_to_resume(gsflow, tmp_path, number, code):
    flags = [*BANDIT, "--offline-steps", 10_000_000, "--eval-interval", 10_000_000]

    def send():  # to this process, where the run is
        while not list(tmp_path.glob("*/metrics.csv")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    _, err = launch(gsflow, *flags, out_dir=tmp_path, code=code)
    run = only_run(tmp_path)
    assert f"--resume {run}" in err and "Traceback" not in err
    facts = gsflow.load_checkpoint(run)[1]
    assert facts["step"] > 0
    total = 20 * (facts["step"] // 20 + 2)
    out, _ = launch(gsflow, "--resume", run, "--offline-steps", total)
    assert f"steps {total:,}" in out


@pytest.fixture(scope="module")
def shorter(gsflow, tmp_path_factory):
    """The run of `reference` with half of its online phase."""
    directory = tmp_path_factory.mktemp("shorter")
    launch(gsflow, *BOTH_PHASES, "--num-seeds", 2, "--online-steps", 100, out_dir=directory)
    return only_run(directory)


def test_more_online_steps_on_resume_equal_a_longer_run(gsflow, reference, shorter, tmp_path):
    run = shutil.copytree(shorter, tmp_path / "run")
    with open(run / "metrics.csv", "a") as file:
        file.write("320,online,0,1.0\n")  # as if it had gone on behind its last checkpoint
    launch(gsflow, "--resume", run, "--online-steps", 200)
    assert rows_without_time(run) == rows_without_time(reference)
    load = gsflow.load_checkpoint
    assert_same_tree(load(reference)[0], load(run)[0])


@pytest.mark.slow
def test_start_from_equals_one_go(gsflow, reference, tmp_path):
    """Offline alone, then a new run from its end: the bytes of both phases at once, and the rows of
    its phase. The old run stays as it was."""
    offline = [*BOTH_PHASES, "--num-seeds", 2, "--online-steps", 0]
    launch(gsflow, *offline, out_dir=tmp_path / "offline")
    run = only_run(tmp_path / "offline")
    assert (run / "offline.msgpack").read_bytes() == (run / "checkpoint.msgpack").read_bytes()
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    launch(gsflow, "--start-from", run, "--online-steps", 100, out_dir=tmp_path / "online")
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    new = only_run(tmp_path / "online")
    launch(gsflow, "--resume", new, "--online-steps", 200)  # as any run
    assert_same_end(gsflow, new, reference)
    rows = rows_without_time(reference)
    assert rows_without_time(new) == [r for r in rows if r["phase"] == "online"]
    args = json.loads((new / "args.json").read_text())["args"]
    assert args["start_from"] == str(run) and args["offline_steps"] == 200


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--start-from {bare}", "no intact offline.msgpack in {bare}"),
        ("--start-from {run} --actor-hidden-dims 9 9", "does not fit the arguments: ['state']"),
        ("--start-from {run} --offline-steps 300", "--offline-steps was 200"),
        ("--start-from {run} --seed 5", "--seed was 0"),
        ("--start-from {run} --online-steps 0", "is complete at step 200: add steps"),
    ],
)
def test_start_from_is_refused(gsflow, reference, tmp_path, capsys, flags, message):
    """One sentence, no run directory."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(reference / "args.json", bare)
    places = dict(run=reference, bare=bare)
    flags = [*flags.format(**places).split(), "--out-dir", str(tmp_path / "runs")]
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message.format(**places) in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_seed_that_diverges_leaves_the_others_alone(gsflow, tmp_path, capsys, monkeypatch):
    """It is named once, its metrics are empty from there on, and results are the others'."""
    make_update = gsflow.make_update

    def poisoned(nets, args):
        def update(state, *rest):
            state, info = make_update(nets, args)(state, *rest)
            bad = (state.seed == 1) & (state.step > 50)
            params, info = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), (state.params, info))
            return state.replace(params=params), info

        return update

    monkeypatch.setattr(gsflow, "make_update", poisoned)
    monkeypatch.setattr(gsflow.signal, "signal", lambda *_: None)
    flags = [*BANDIT, "--offline-steps", 100, "--eval-interval", 100, "--num-seeds", 3]
    flags = [*map(str, flags), "--out-dir", str(tmp_path)]
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 0
    run, out = only_run(tmp_path), capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert out.count("seed 1 diverged before step") == 1 == out.count("diverged")
    assert result["seeds"] == [0, 2] and list(result["diverged"]) == ["1"]
    assert 51 <= result["diverged"]["1"] <= 60
    assert np.shape(result["episodes"]["return"]) == (2, 3)
    returns = np.mean(result["episodes"]["return"])
    assert np.isclose(result["eval/return"], returns) and f"return {returns:.2f}" in out
    for row in rows_without_time(run):
        known = {k for k, v in row.items() if v} - {"step", "phase", "seed"}
        assert bool(known) == (row["seed"] != "1" or int(row["step"]) < 60)
    assert [r["eval/return"] != "" for r in rows_without_time(run)[-3:]] == [True, False, True]


def test_two_processes_do_not_write_one_run(gsflow, reference, tmp_path, capsys):
    run = shutil.copytree(reference, tmp_path / "run")
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = (run / "args.json").read_bytes()
        flags = ["--resume", str(run), "--online-steps", "220"]
        assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
        assert "in use by another process" in capsys.readouterr().err
        assert (run / "args.json").read_bytes() == before


def test_empty_metrics_and_what_args_json_keeps(gsflow, shorter, tmp_path):
    """A resume survives an emptied metrics.csv; args.json keeps how the run started."""
    run = shutil.copytree(shorter, tmp_path / "run")
    (run / "metrics.csv").write_bytes(b"")
    facts = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(facts | {"commit": "of the start"}))
    launch(gsflow, "--resume", run, "--online-steps", 200)
    facts = json.loads((run / "args.json").read_text())
    assert facts["commit"] == "of the start" and facts["args"]["online_steps"] == 200
    assert [r["step"] for r in facts["resumes"]] == [300]
    assert rows_without_time(run)[-1]["step"] == "400"


def test_damaged_checkpoints_are_noticed(gsflow, reference, tmp_path, capsys):
    path = tmp_path / "checkpoint.msgpack"
    intact = (reference / "checkpoint.msgpack").read_bytes()
    shutil.copytree(reference / "replay", tmp_path / "replay")
    before, facts = gsflow.load_checkpoint(reference)
    rng = random.Random(0)
    damaged = []
    for position in rng.sample(range(len(intact)), 200):
        flipped = bytes([intact[position] ^ rng.randrange(1, 256)])
        damaged.append(intact[:position] + flipped + intact[position + 1 :])
    cuts = [0, 1, 9, 10, 41, 42, 43, len(intact) // 2, len(intact) - 1]
    damaged += [intact[:cut] for cut in cuts]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(gsflow.UserError, match="no intact checkpoint"):
            gsflow.load_checkpoint(tmp_path)
    path.with_suffix(".previous").write_bytes(intact)
    after, facts_after = gsflow.load_checkpoint(tmp_path)
    assert facts_after == facts and "damaged" in capsys.readouterr().err
    assert_same_tree(before, after)


def test_disk_full_leaves_the_checkpoint_before(gsflow, tmp_path, monkeypatch, capsys):
    """The sentence names the remedy and the run, also of a failure that no file is known of."""
    gsflow.save_checkpoint(tmp_path, {"x": np.arange(3)}, {"step": 1})

    def main(args):
        gsflow.Run.dir = tmp_path
        gsflow.save_checkpoint(tmp_path, {"x": np.arange(4)}, {"step": 2})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert gsflow.command_line(main, gsflow.Args, []) == 2
    reason = "No space left on device; free some space, then --resume"
    assert capsys.readouterr().err == f"error: cannot use {tmp_path}: {reason} {tmp_path}\n"
    tree, facts = gsflow.load_checkpoint(tmp_path)
    assert facts["step"] == 1 and len(tree["x"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.msgpack"]


def test_out_of_memory_is_said_with_sizes(gsflow, tmp_path, monkeypatch, capsys):
    """Those of the arrays that are there, each noted before it is asked for."""
    arrays, resume = {}, gsflow.resume

    def enter_online(carry, phases, args):
        arrays.update(networks=carry, replay=phases[1].enter(carry)["replay"]["rows"])
        return resume(carry, phases, args)

    def full(*inputs):
        raise MemoryError("Out of memory allocating 7 bytes.\n\nMore about it")

    monkeypatch.setattr(gsflow, "resume", enter_online)
    monkeypatch.setattr(gsflow, "train_loop", full)
    monkeypatch.setattr(gsflow, "memory_limit", lambda: 2**20)
    monkeypatch.setattr(gsflow.signal, "signal", lambda *_: None)
    argv = [*map(str, BOTH_PHASES), "--num-seeds", "3", "--out-dir", str(tmp_path)]
    assert gsflow.command_line(gsflow.main, gsflow.Args, argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: of 0.000977 GiB it needs ")
    assert "(Out of memory allocating 7 bytes.)" in err and err.count("\n") == 1
    for name, tree in arrays.items():
        size = sum(x.nbytes for x in jax.tree.leaves(tree))
        assert f"{size / 2**30:.3g} GiB for the {name}" in err


@pytest.mark.parametrize(
    "seeds,devices,limit,advice",
    [  # in hundreds: data 20, a seed 40 + 10
        (5, 1, 275, "--num-seeds 4 should fit"),  # 20 + 4 * 50 = 0.8 * 275
        (5, 1, 274, "--num-seeds 3 should fit"),
        (8, 2, 275, "lower --num-seeds, "),  # all eight fit
        (8, 2, 274, "--num-seeds 6 should fit"),
        (1, 1, 75, "--buffer-size 75 should fit"),  # 20 + 10 + 0.4 * 75 = 0.8 * 75
        (1, 1, 62, "lower --num-seeds, "),  # no room for as many rows as the data have
        (4, 1, 1000, "lower --num-seeds, "),  # it is the updates
    ],
)
def test_what_fits(gsflow, monkeypatch, seeds, devices, limit, advice):
    known = dict(data=2000, row=40, rows=100, networks=1000 * seeds, members=seeds)
    monkeypatch.setattr(gsflow, "MEMORY", known)
    monkeypatch.setattr(gsflow, "memory_limit", lambda: 100 * limit)
    monkeypatch.setattr(gsflow.jax, "device_count", lambda: devices)
    text = gsflow.what_fits(gsflow.Args(num_seeds=seeds))
    assert f"; {advice}" in text


def test_divergence_stops_with_names_and_the_last_good_step(gsflow, tmp_path):
    flags = [*BANDIT, "--offline-steps", 4000, "--learning-rate", 1e30, "--eval-interval", 4000]
    _, err = launch(gsflow, *flags, out_dir=tmp_path, code=2)
    assert "not finite" in err and "critic_loss" in err and "Traceback" not in err


BAD_FLAGS = {
    "unknown task": ("--env-id antmaze-larg", "close matches: antmaze-large"),
    "task number": ("--env-id cube-double-task9", "close matches"),
    "nothing to do": ("--offline-steps 0", "nothing to train"),
    "negative steps": ("--offline-steps -5", "--offline-steps is -5"),
    "zero seeds": ("--num-seeds 0", "--num-seeds is 0"),
    "zero batch": ("--batch-size 0", "--batch-size is 0"),
    "zero interval": ("--eval-interval 0", "--eval-interval is 0"),
    "zero episodes": ("--eval-episodes 0", "--eval-episodes is 0"),
    "zero checkpoints": ("--checkpoint-interval 0", "--checkpoint-interval is 0"),
    "zero dispatch": ("--updates-per-dispatch 0", "--log-interval is 0"),
    "zero n-step": ("--n-step 0", "--n-step is 0"),
    "gamma": ("--gamma 1.5", "--gamma is 1.5, but must be between 0 and 1"),
    "tau": ("--tau -0.1", "--tau is -0.1"),
    "candidates": ("--num-candidates 0", "--num-candidates is 0"),
    "flow steps": ("--flow-steps 0", "--flow-steps is 0"),
    "no layers": ("--hidden-dims", "needs layers"),
    "empty layer": ("--critic-hidden-dims 64 0", "--critic-hidden-dims needs layers"),
    "negative rate": ("--learning-rate -1", "--learning-rate is -1"),
    "nan rate": ("--learning-rate nan", "--learning-rate is nan"),
    "negative alpha": ("--alpha -1", "--alpha is -1"),
    "std range": ("--log-std-min 1", "--log-std-min must not exceed"),
    "temperature": ("--init-temperature 0", "--init-temperature must be above 0"),
    "soft backup": ("--soft-backup", "add --offline-td-temperature 1"),
    "soft, fql": ("--soft-backup --student deterministic", "needs the Gaussian student"),
    "entropy": ("--student deterministic --entropy off", "--entropy is of the Gaussian student"),
    "num envs": ("--online-steps 10 --num-envs 3", "must be a multiple of --num-envs"),
    "backend": ("--env-id antmaze-large --env-backend jax", "has no jax environment"),
    "toy on host": ("--env-id multi-crescent --env-backend host", "has no host environment"),
    "resume nothing": ("--resume nowhere", "not a run directory"),
    "evaluate nothing": ("--evaluate nowhere", "not a run directory"),
    "empty resume": ("--resume=", "'' is not a run directory"),
    "empty evaluate": ("--evaluate=", "'' is not a run directory"),
    "big seed": ("--seed 3000000000", "--seed is 3000000000, but must be between"),
    "last seed": ("--seed 2147483647 --num-seeds 2", "must be between 0 and 2147483646"),
    "no task file": ("--env-id nowhere.py:x", "cannot load nowhere.py"),
    "no data file": ("--dataset nowhere.npz", "cannot read nowhere.npz"),
    "gymnasium without data": ("--env-id Hopper-v5", "give --dataset FILE.npz"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(gsflow, tmp_path, capsys, monkeypatch, name):
    """One sentence with the remedy on stderr, exit code 2, nothing written."""
    flags, message = BAD_FLAGS[name]
    monkeypatch.chdir(tmp_path)
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["--batch-size many", "--no-such-flag", "--prior wavelet"])
def test_flags_that_do_not_parse(gsflow, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        gsflow.command_line(gsflow.main, gsflow.Args, flags.split())
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def good_file(rows=40):
    rng = np.random.default_rng(0)
    xy = rng.normal(size=(rows, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    terminals = np.arange(rows) % 20 == 19
    return dict(observations=xy, actions=actions, terminals=terminals, qpos=xy, qvel=xy)


def changed(**changes):
    return lambda data: data | changes


BAD_DATA = {
    "NaN": (
        changed(observations=np.full((40, 2), np.nan, np.float32)),
        "'observations' is not floating point, or holds NaN",
    ),
    "infinite action": (
        changed(actions=np.full((40, 2), np.inf)),
        "'actions' is not floating point, or holds NaN",
    ),
    "text": (
        changed(observations=np.full((40, 2), "x")),
        "'observations' is not floating point, or holds NaN",
    ),
    "integers": (
        changed(actions=np.ones((40, 2), int)),
        "'actions' is not floating point, or holds NaN",
    ),
    "action range": (changed(actions=np.full((40, 2), 3.0)), "actions outside [-1, 1]"),
    "shape": (changed(observations=np.zeros(40)), "'observations' has shape (40,)"),
    "lengths": (changed(actions=np.zeros((39, 2))), "'actions' has shape (39, 2)"),
    "cut short": (changed(terminals=np.zeros(40, bool)), "looks cut short"),
    "missing key": (lambda d: {k: v for k, v in d.items() if k != "actions"}, "no 'actions'"),
    "other environment": (changed(observations=np.zeros((40, 3))), "another environment"),
    "positions": (changed(qpos=np.zeros((40, 3))), "'qpos' must have 2 numbers a row"),
    "no positions": (lambda d: {k: v for k, v in d.items() if k != "qpos"}, "no 'qpos'"),
    "short episodes": (changed(terminals=np.arange(40) % 5 == 4), "too few for --n-step"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_datasets(gsflow, tmp_path, capsys, monkeypatch, name):
    """A bad file is named with what is wrong; exit code 2, no run directory."""
    damage, message = BAD_DATA[name]
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "pointmaze-medium-navigate-v0.npz", **damage(good_file()))
    flags = ["--dataset-dir", str(tmp_path), "--offline-steps", "10"]
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_unreadable_datasets(gsflow, tmp_path, capsys, content):
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    if content is None:  # a real file that lost its end
        np.savez(path, **good_file())
        content = path.read_bytes()[:-100]
    path.write_bytes(content)
    flags = ["--dataset-dir", str(tmp_path), "--out-dir", str(tmp_path / "runs")]
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot read {path}") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_out_dir_that_is_a_file(gsflow, tmp_path, capsys):
    (tmp_path / "runs").write_text("")
    flags = [*BANDIT, "--offline-steps", "10", "--out-dir", str(tmp_path / "runs")]
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
    assert "choose --out-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--resume {run} --gamma 0.5", "--gamma was 0.99"),
        ("--resume {run} --seed 5", "--seed was 0"),
        ("--resume {run} --offline-steps 300", "--offline-steps was 200"),
        ("--resume {run}", "is complete at step 400"),
        ("--resume {run} --start-from {run}", "--start-from was ''"),
        ("--evaluate {run} --hidden-dims 9", "--hidden-dims was (8, 8)"),
    ],
)
def test_flags_that_do_not_fit_a_run(gsflow, reference, capsys, flags, message):
    before = sorted(path.name for path in reference.iterdir())
    flags = flags.format(run=reference).split()
    assert gsflow.command_line(gsflow.main, gsflow.Args, flags) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(path.name for path in reference.iterdir()) == before


@pytest.mark.slow
def test_resume_on_other_data_is_refused(gsflow, tmp_path):
    """The dataset's checksum is part of a run; the same file, or nothing."""
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    np.savez(path, **good_file())
    flags = [*TINY, "--dataset-dir", tmp_path, "--offline-steps", 20, "--eval-interval", 20]
    launch(gsflow, *flags, "--eval-episodes", 1, out_dir=tmp_path / "runs")
    run = only_run(tmp_path / "runs")
    launch(gsflow, "--resume", run, "--offline-steps", 40)
    np.savez(path, **good_file() | {"actions": np.zeros((40, 2), np.float32)})
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    _, err = launch(gsflow, "--resume", run, "--offline-steps", 60, code=2)
    assert "was started on other data (official)" in err and err.count("\n") == 1
    assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}


def test_checkpoint_of_another_method_or_network(gsflow, reference, tmp_path, capsys):
    facts = json.loads((reference / "args.json").read_text())
    for changes, message in (
        ({"algo": "flowq"}, "is a run of flowq.py"),
        ({"args": facts["args"] | {"actor_hidden_dims": [9]}}, "args.json was changed"),
        (
            {"args": facts["args"] | {"actor_hidden_dims": [9]}, "args_crc32": None},
            "does not fit the arguments",
        ),
        ({"args": {}}, "damaged or of another version"),
    ):
        (tmp_path / "args.json").write_text(json.dumps(facts | changes))
        checkpoint = (reference / "checkpoint.msgpack").read_bytes()
        (tmp_path / "checkpoint.msgpack").write_bytes(checkpoint)
        assert gsflow.command_line(gsflow.main, gsflow.Args, ["--evaluate", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
