"""Runs of fmq.py survive: kill and resume in both phases, evaluation, branches, bad flags."""

import json
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import assert_same_end, launch, only_run, rows_without_time, start

MODES = ("best_of_n", "one_step", "qgbs")
TINY = "--hidden-dims 8 8 --batch-size 16 --num-samples 2 --learning-starts 20 --horizon 4"
TINY = (TINY + " --eval-episodes 2 --log-interval 40").split()
STEPS = ["--offline-steps", 120, "--online-steps", 120, "--eval-interval", 120]


@pytest.fixture(scope="module")
def fmq():
    return load_script(ROOT / "algos" / "fmq.py")


def carry_of(fmq, run):
    return fmq.load_checkpoint(run)[0]


def actor(fmq, run):
    return jax.tree.leaves(carry_of(fmq, run)["state"]["params"]["actor"])


@pytest.fixture(scope="module")
def reference(fmq, data_dir, tmp_path_factory):
    """A run that nobody interrupted, two seeds, both phases."""
    directory = tmp_path_factory.mktemp("reference")
    flags = [*TINY, *STEPS, "--dataset-dir", data_dir, "--num-seeds", 2]
    launch(fmq, *flags, out_dir=directory)
    return only_run(directory)


@pytest.mark.slow
def test_a_run_leaves_what_it_should(fmq, reference):
    result = json.loads((reference / "result.json").read_text())
    for mode in MODES:
        for kind in ("success", "return", "length"):
            assert np.isfinite(result[f"eval/{kind}_{mode}"])
        assert np.shape(result["episodes"][f"return_{mode}"]) == (2, 2)
    assert result["steps"] == 240 and "eval/success_best_of_n_last_three" in result
    rows = rows_without_time(reference)
    assert [r["step"] for r in rows[::2]] == ["40", "80", "120", "140", "160", "200", "240"]
    offline, online = rows[0], rows[-1]
    # what only the other phase has is left out
    assert float(offline["train/diagonal_loss"]) > 0 and offline["train/fmq_loss"] == ""
    assert float(online["train/fmq_loss"]) > 0 and online["train/diagonal_loss"] == ""
    assert 0 < float(online["train/radius"]) <= 2 and float(online["train/drift"]) > 0
    state = carry_of(fmq, reference)["state"]
    np.testing.assert_array_equal(state["step"], [220, 220])  # online, none in the first 20 steps
    assert state["pessimistic"].all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "host"])
def test_killed_and_resumed_equals_uninterrupted(fmq, reference, data_dir, tmp_path, backend):
    """A kill in each phase; parameters, frozen actor, replay, plans and metrics are the same."""
    flags = [*TINY, *STEPS, "--dataset-dir", data_dir]
    if backend == "jax":
        flags += ["--num-seeds", 2, "--checkpoint-interval", 8]
    else:  # the official point maze, stepped by gymnasium
        flags += ["--eval-episodes", 1, "--eval-modes", "one-step"]
        flags += ["--env-backend", "host", "--checkpoint-interval", 40]
        (tmp_path / "reference").mkdir()
        launch(fmq, *flags, out_dir=tmp_path / "reference")
        reference = only_run(tmp_path / "reference")
    directory, rng = tmp_path / "killed", random.Random(0)
    directory.mkdir()
    process, done = start("fmq", *flags, out_dir=directory), 0
    for phase in ("offline", "online"):
        while process.poll() is None:
            tables = [path.read_text() for path in directory.glob("*/metrics.csv")]
            begun = any(f",{phase}," in t for t in tables)
            if begun and list(directory.glob("*/checkpoint.msgpack")):
                time.sleep(rng.uniform(0, 0.02))
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                process = start("fmq", "--resume", only_run(directory))
                break
            time.sleep(0.001)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 or "is complete" in err, err
    assert done >= 1
    runs = only_run(directory), reference
    assert_same_end(fmq, *runs)
    assert rows_without_time(runs[0]) == rows_without_time(runs[1])


@pytest.mark.slow
def test_a_vmapped_seed_equals_its_single_run(fmq, reference, data_dir, tmp_path):
    launch(fmq, *TINY, *STEPS, "--dataset-dir", data_dir, "--seed", 1, out_dir=tmp_path)
    for a, b in zip(actor(fmq, reference), actor(fmq, only_run(tmp_path)), strict=True):
        np.testing.assert_allclose(a[1], b[0], atol=1e-5)
    assert any(not np.allclose(a[0], a[1]) for a in actor(fmq, reference))


@pytest.mark.slow
def test_evaluate_with_several_jumps(fmq, reference):
    """The ablation of the number of jumps on one checkpoint: other chunks from the same noise."""
    lengths = {}
    for steps in ("1", "3"):
        argv = ["--evaluate", str(reference), "--flow-steps", steps, "--eval-modes", "one-step"]
        lengths[steps] = fmq.main(fmq.read_args(reference, argv, fmq.Args()))
    stored = json.loads((reference / "result.json").read_text())["episodes"]
    for name, values in lengths["1"].items():  # the run's own number
        np.testing.assert_array_equal(values, stored[name])
    assert set(lengths["3"]) == set(lengths["1"])


@pytest.mark.slow
def test_evaluate_repeats_the_final_evaluation(fmq, reference):
    out, _ = launch(fmq, "--evaluate", reference)
    result = json.loads((reference / "result.json").read_text())
    lines = [line.split() for line in out.splitlines()]
    assert result["seeds"] == [0, 1]
    for mode in MODES:
        header = next(i for i, line in enumerate(lines) if f"success_{mode}" in line)
        for i, seed in enumerate(result["seeds"]):
            names = [f"{kind}_{mode}" for kind in ("success", "return", "length")]
            expected = [f"{np.mean(result['episodes'][name][i]):.2f}" for name in names]
            assert lines[header + 1 + i] == [str(seed), *expected]


@pytest.mark.slow
def test_two_branches_from_one_offline_checkpoint(fmq, data_dir, tmp_path):
    """An offline run, copied and continued with either objective: same start, own ends."""
    flags = [*TINY, "--offline-steps", 80, "--online-steps", 0, "--eval-interval", 80]
    flags += ["--dataset-dir", data_dir, "--eval-modes", "one-step"]
    launch(fmq, *flags, out_dir=tmp_path / "runs")
    run = only_run(tmp_path / "runs")
    before = actor(fmq, run)
    ends = {}
    for objective in ("fmq", "mvp"):
        branch = shutil.copytree(run, tmp_path / objective)
        more = ["--online-steps", 80, "--online-objective", objective]
        launch(fmq, "--resume", branch, *more)
        state = carry_of(fmq, branch)["state"]
        ends[objective] = jax.tree.leaves(state["params"]["actor"])
        frozen = jax.tree.leaves(state["offline_actor"])
        assert all(np.array_equal(a, b) for a, b in zip(before, frozen, strict=True))
        assert state["pessimistic"] == (objective == "fmq")
        _, err = launch(fmq, "--resume", branch, "--eta", 0.5, "--online-steps", 160, code=2)
        assert "--eta was 2.0" in err and "cannot change" in err
    assert not any(np.array_equal(a, b) for a, b in zip(*ends.values(), strict=True))


@pytest.mark.slow
def test_start_from_equals_one_go(fmq, reference, data_dir, tmp_path):
    """Offline alone, then a new run from its end, against both phases at once."""
    flags = [*TINY, *STEPS, "--dataset-dir", data_dir, "--online-steps", 0, "--num-seeds", 2]
    launch(fmq, *flags, out_dir=tmp_path / "offline")
    run = only_run(tmp_path / "offline")
    launch(fmq, "--start-from", run, "--online-steps", 120, out_dir=tmp_path / "online")
    new = only_run(tmp_path / "online")
    assert_same_end(fmq, reference, new)
    assert rows_without_time(reference) == rows_without_time(run) + rows_without_time(new)


@pytest.mark.slow
def test_q_chunking_runs(fmq, data_dir, tmp_path):
    flags = [*TINY, *STEPS, "--dataset-dir", data_dir, "--actor", "flow", "--flow-steps", 2]
    launch(fmq, *flags, out_dir=tmp_path)
    row = rows_without_time(only_run(tmp_path))[-1]
    assert float(row["train/diagonal_loss"]) > 0 and "train/consistency_loss" not in row
    assert all(row[f"eval/success_{mode}"] for mode in MODES)


BAD_FLAGS = {
    "unknown task": ("--env-id cube-tripel", "close matches: cube-triple"),
    "flow with fmq": ("--actor flow --online-objective fmq", "use --online-objective mvp"),
    "nothing to do": ("--offline-steps 0 --online-steps 0", "nothing to train"),
    "steps and chunks": ("--online-steps 7", "--online-steps must be a multiple of --horizon"),
    "curriculum": ("--consistency-warmup 9 --consistency-anneal-end 9", "must be larger than"),
    "no horizon": ("--horizon 0", "--horizon is 0, but must be at least 1"),
    "no samples": ("--num-samples 0", "--num-samples is 0"),
    "no critics": ("--num-critics 0", "--num-critics is 0"),
    "no layers": ("--hidden-dims", "needs layers"),
    "negative radius": ("--eta -1", "--eta is -1.0, but must be at least 0"),
    "negative beta": ("--beta -0.1", "--beta is -0.1"),
    "no beam": ("--qgbs-beam 0", "--qgbs-beam is 0"),
    "gamma": ("--gamma 1.5", "--gamma is 1.5, but must be between 0 and 1"),
    "backend": ("--env-id cube-double --env-backend jax", "has no jax environment"),
    "no modes": ("--eval-modes", "--eval-modes needs at least one mode"),
    "mode twice": ("--eval-modes qgbs qgbs", "each only once"),
    "consistency of a flow": ("--actor flow --consistency semigroup", "without --actor flowmap"),
    "times of a flow": ("--actor flow --time-embedding raw", "--time-embedding has no effect"),
    "no jumps": ("--flow-steps 0", "--flow-steps is 0, but must be at least 1"),
    "beta of a fixed radius": ("--no-adaptive-eta --beta 1", "--beta has no effect without"),
    "radius of mvp": ("--online-objective mvp --eta 1", "without --online-objective fmq"),
    "radius of a flow": ("--actor flow --grad-at online", "without --online-objective fmq"),
    "target of fmq": ("--mvp-target reselect", "without --online-objective mvp"),
    "search that is not done": ("--eval-modes one-step --qgbs-beam 2", "without --eval-modes qgbs"),
    "sparse": ("--env-id Pendulum-v1 --sparse True", "use --sparse False"),
    "resume nothing": ("--resume nowhere", "not a run directory"),
    "evaluate nothing": ("--evaluate nowhere", "not a run directory"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(fmq, tmp_path, capsys, monkeypatch, name):
    """One sentence with the remedy on stderr, exit code 2, nothing written."""
    flags, message = BAD_FLAGS[name]
    monkeypatch.chdir(tmp_path)
    assert fmq.command_line(fmq.main, fmq.Args, flags.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["pointmaze-medium", "cube-double-task4"])
@pytest.mark.parametrize("flags", [{}, dict(online_objective="mvp"), dict(actor="flow")])
def test_resolved_flags_are_accepted_again(fmq, task, flags):
    """What the task table filled in counts as not given when a run is resumed."""
    task = fmq.parse_task(task)
    args = fmq.resolve(fmq.Args(**flags), task)
    assert fmq.resolve(args, task) == args
    searched = dict(eval_modes=("one-step",), qgbs_beam=2, evaluate="run")  # of a run that had both
    assert fmq.resolve(fmq.Args(**flags, **searched), task).qgbs_beam == 2


@pytest.mark.parametrize("flags", ["--consistency shortcut", "--actor gaussian", "--eval-modes x"])
def test_flags_that_do_not_parse(fmq, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        fmq.command_line(fmq.main, fmq.Args, flags.split())
    assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
