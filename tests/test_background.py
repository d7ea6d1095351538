"""Training goes on while simulators evaluate; what is written is as if it had waited."""

import gc
import json
import multiprocessing
import time

import pytest
from conftest import ROOT, load_script
from helpers import TINY, assert_same_end, launch, only_run, rows_without_time, start
from test_task_files import own_dataset

# A simulator whose third step waits until a file is there, then moves on (or, with another, dies).
SIMULATOR = """
import gymnasium, numpy as np, os, signal, time
from pathlib import Path

class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps, self.at = 0, np.random.default_rng(seed).normal(size=2)
        return self.at.astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        while self.steps == 3 and not Path(__file__).with_name("gate").exists():
            time.sleep(0.01)
        if Path(__file__).with_name("dies").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        self.at = self.at + 0.1 * action
        end = dict(success=float(self.at[0] > 0))
        return self.at.astype(np.float32), -1.0, False, self.steps % 6 == 0, end

def make_task(name, dataset_dir):
    return dict(make_env=Env)
"""
FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if isinstance(v, int)]
FLAGS += ["--hidden-dims", 8, 8, "--prior-hidden-dims", 8, "--flow-steps", 2, "--num-seeds", 2]
FLAGS += ["--offline-steps", 80, "--eval-interval", 20, "--log-interval", 10]
FLAGS += ["--eval-episodes", 3, "--checkpoint-interval", 20]


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "task.py").write_text(SIMULATOR)
    data = own_dataset(tmp_path / "mine.npz")
    return ["--env-id", f"{tmp_path / 'task.py'}:task", "--dataset", data, *FLAGS]


@pytest.fixture
def waited(gsflow, flags, tmp_path):
    """What a run that waits for its evaluations leaves."""
    (tmp_path / "gate").touch()
    launch(gsflow, *flags, "--no-eval-background", out_dir=tmp_path / "waited")
    (tmp_path / "gate").unlink()
    return only_run(tmp_path / "waited")


def test_training_goes_on(gsflow, flags, waited, tmp_path, monkeypatch):
    """The first evaluation, of step 20, cannot end before step 30 is over: the same rows, in the
    same order, and the same result."""
    dispatch, lengths = gsflow.Run.dispatch, []

    def watched(run, carry):
        out = dispatch(run, carry)
        if run.step in (20, 30):
            lengths.append((run.dir / "metrics.csv").read_text().count("\n"))
        if run.step == 30:
            (tmp_path / "gate").touch()
        return out

    monkeypatch.setattr(gsflow.Run, "dispatch", watched)
    out, _ = launch(gsflow, *flags, out_dir=tmp_path / "beside")
    run = only_run(tmp_path / "beside")
    assert lengths == [3, 3]  # names and both seeds at step 10, but nothing yet of step 20
    rows = rows_without_time(run)
    assert rows == rows_without_time(waited)
    assert [r["step"] for r in rows[::2]] == [str(s) for s in range(10, 81, 10)]
    assert [bool(r["eval/success"]) for r in rows[::2]] == [False, True] * 4
    assert_same_end(gsflow, run, waited)
    episodes = [json.loads((r / "result.json").read_text())["episodes"] for r in (run, waited)]
    assert episodes[0] == episodes[1]
    lines = [line for line in out.splitlines() if line.startswith("offline step")]
    assert [int(line.split()[2]) for line in lines] == [20, 40, 60, 80]


def test_killed_while_it_evaluates(gsflow, flags, waited, tmp_path):
    """The checkpoint of step 20 knows that its evaluation is missing, which the resumed run makes
    up for."""
    process = start("gsflow", *flags, out_dir=tmp_path / "killed")
    while not list(tmp_path.glob("killed/*/checkpoint.msgpack")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    run = only_run(tmp_path / "killed")
    facts = gsflow.load_checkpoint(run)[1]
    assert facts["step"] == 20 and facts["evals"] == []
    (pending,) = facts["pending"]
    assert pending[:3] == [20, "offline", [0, 1]]
    (tmp_path / "gate").touch()
    launch(gsflow, "--resume", run)
    assert rows_without_time(run) == rows_without_time(waited)
    assert_same_end(gsflow, run, waited)
    assert gsflow.load_checkpoint(run)[1]["pending"] == []


def test_simulator_dies_while_training_goes_on(gsflow, flags, tmp_path):
    """The sentence is the same as ever; the checkpoint before goes on."""
    (tmp_path / "gate").touch()
    (tmp_path / "dies").touch()
    _, err = launch(gsflow, *flags, out_dir=tmp_path / "runs", code=2)
    run = only_run(tmp_path / "runs")
    assert err.startswith("error: simulator") and "(exit -9)" in err and "Traceback" not in err
    assert f"--resume {run} goes on" in err and err.count("\n") == 1
    (tmp_path / "dies").unlink()
    gc.collect()  # the run that failed, which holds the lock
    launch(gsflow, "--resume", run)
    assert json.loads((run / "result.json").read_text())["steps"] == 80


def test_an_error_does_not_wait_for_an_evaluation(gsflow, flags, tmp_path, monkeypatch):
    """Its simulators, which would wait for ever here, are ended with the run."""
    dispatch, pools = gsflow.Run.dispatch, []

    def fails(run, carry):
        if run.step == 30:
            pools.append(run.thread)
            raise OSError(28, "No space left on device", "here")
        return dispatch(run, carry)

    monkeypatch.setattr(gsflow.Run, "dispatch", fails)
    _, err = launch(gsflow, *flags, out_dir=tmp_path / "runs", code=2)
    assert "cannot use here: No space left on device" in err
    pools[0].shutdown(wait=True)  # as at the interpreter's exit
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_benchmark_compares_both_ways(flags, tmp_path, capsys):
    """Its table, and that it notices what differs."""
    module = load_script(ROOT / "benchmark" / "background.py")
    (tmp_path / "gate").touch()
    assert module.main([*map(str, flags)]) == 0
    head, _, _, _, waits, beside = capsys.readouterr().out.splitlines()
    assert head.endswith("metrics and parameters the same")
    cells = [[c.strip() for c in row.split("|")[1:-1]] for row in (waits, beside)]
    assert [c[0] for c in cells] == [*module.WAYS] and cells[0][2] == "1.00"
    left = iter(([1, 1], [], [params], dict(device="", commit=None)) for params in (1.0, 2.0))
    module.run = lambda *_: next(left)
    assert module.main([*map(str, flags)]) == 1
    assert "metrics and parameters DIFFER" in capsys.readouterr().out
