"""Tasks of one's own: README's example, FILE.py:NAME, --dataset; a script copied alone."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script
from helpers import launch, only_run

TINY = {
    "gsflow": "--hidden-dims 8 --prior-hidden-dims 8 --num-candidates 2 --flow-steps 2",
    "flowq": "--hidden-dims 8 --flow-steps 2 --eval-candidates 2",
    "fmq": "--hidden-dims 8 --num-samples 2 --horizon 2 --eval-modes best-of-n",
    "sac_flow": "--hidden-dim 8 --d-model 8 --critic-hidden-dims 8 --flow-steps 2",
}
SHORT = "--batch-size 8 --offline-steps 20 --eval-interval 20 --eval-episodes 2 --log-interval 10"
ONLINE = "--online-steps 20 --checkpoint-interval 10"


def flags_of(script):
    online = "" if script == "flowq" else ONLINE
    online += " --learning-starts 4" if script in ("fmq", "sac_flow") else ""
    return [*TINY[script].split(), *SHORT.split(), *online.split()]


def run_file(path, *flags):
    """What the file prints as a process of its own."""
    command = [sys.executable, str(path), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The task file that README shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (text,) = [b for b in blocks if b.startswith("# my_task.py")]
    path = tmp_path_factory.mktemp("task") / "my_task.py"
    path.write_text(text)
    return path


# What these compile takes most of their time: one script quickly, the others where all is run.
QUICK_ONE = [s if s == "flowq" else pytest.param(s, marks=pytest.mark.slow) for s in SCRIPTS]


@pytest.mark.parametrize("script", QUICK_ONE)
def test_readme_example_runs(script, example, tmp_path):
    module = load_script(ROOT / "algos" / f"{script}.py")
    launch(module, "--env-id", f"{example}:reach", *flags_of(script), out_dir=tmp_path)
    run = only_run(tmp_path)
    assert run.name.startswith("my_task-reach")
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == (20 if script == "flowq" else 40)
    assert any(k.startswith("eval/success") for k in result)
    out, _ = launch(module, "--evaluate", run)
    assert f"{example}:reach" in out + (run / "args.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_alone_in_an_empty_folder(script, process, tmp_path, monkeypatch):
    """Help, a run, its continuation and its evaluation need nothing of the repository."""
    monkeypatch.chdir(tmp_path)
    path = shutil.copy(ROOT / "algos" / f"{script}.py", tmp_path / f"my_{script}.py")
    if process:
        assert "--env-id" in run_file(path, "--help")
        call = lambda *flags: run_file(path, *flags)
    else:
        module = load_script(path)
        monkeypatch.setattr(module, "AUTO_COLLECT", 2_000)
        call = lambda *flags: launch(module, *flags)[0]
    call(*flags_of(script), "--env-id", "pointmaze-medium", "--out-dir", "out")
    run = only_run("out")
    more = "--offline-steps" if script == "flowq" else "--online-steps"
    call("--resume", run, more, 40)
    assert json.loads((run / "result.json").read_text())["steps"] == (
        40 if script == "flowq" else 60
    )
    assert "pointmaze-medium" in call("--evaluate", run)
    assert "resumes" in json.loads((run / "args.json").read_text())


BAD_FILES = {
    "no_function": ("x = 1\n", "no function make_task"),
    "no_dict": ("def make_task(name, dataset_dir):\n    return 3\n", "must return a dict"),
    "no_env": ("def make_task(name, dataset_dir):\n    return {}\n", "'env' or 'make_env'"),
    "unknown": (
        "def make_task(name, dataset_dir):\n    return dict(make_env=None, colour=1)\n",
        "'colour'"),
    "raises": (
        "def make_task(name, dataset_dir):\n    raise ValueError('no such task: ' + name)\n",
        "no such task: reach"),
    "imports": ("import no_such_package\n", "no_such_package"),
    "syntax": ("def make_task(:\n", "cannot load"),
    "not_an_env": (
        "def make_task(name, dataset_dir):\n    return dict(env=object())\n", "does not work"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_task_files(gsflow, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, message = BAD_FILES[name]
    (tmp_path / "task.py").write_text(text)
    assert gsflow.command_line(gsflow.main, gsflow.Args, ["--env-id", "task.py:reach"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(os.listdir(tmp_path)) in (["task.py"], ["__pycache__", "task.py"])


def own_dataset(path, rows=40, **changes):
    rng = np.random.default_rng(0)
    data = dict(observations=rng.normal(size=(rows, 2)), actions=rng.uniform(-1, 1, (rows, 2)))
    data |= dict(next_observations=rng.normal(size=(rows, 2)), rewards=-np.ones(rows))
    data |= dict(masks=np.ones(rows), terminals=(np.arange(rows) % 10 == 9) * 1.0)
    np.savez(path, **{k: v for k, v in (data | changes).items() if v is not None})
    return path


def test_own_dataset(gsflow, tmp_path):
    path = own_dataset(tmp_path / "mine.npz")
    args = gsflow.Args(dataset=str(path))
    data, source = gsflow.load_dataset(gsflow.parse_task("pointmaze-medium"), args)
    assert source == "own (mine.npz)"
    with np.load(path) as file:
        for key in file.files:
            np.testing.assert_array_equal(data[key], file[key].astype(np.float32))


BAD_ROWS = {
    "nan": (dict(observations=np.full((40, 2), np.nan)), "NaN"),
    "huge": (dict(observations=np.full((40, 2), 1e30)), "million"),
    "actions": (dict(actions=np.full((40, 2), 2.0)), r"outside \[-1, 1\]"),
    "no terminals": (dict(terminals=None), "no 'terminals'"),
    "scalar terminals": (dict(terminals=np.float32(1)), "'terminals' has shape"),
    "no end": (dict(terminals=np.zeros(40)), "cut short"),
    "only ends": (dict(terminals=np.ones(40)), "every row"),
    "bool actions": (dict(actions=np.ones((40, 2), bool)), "floating"),
    "other size": (dict(observations=np.zeros((40, 3)), next_observations=np.zeros((40, 3))),
                   "another environment"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_of_an_own_dataset(gsflow, name, tmp_path):
    changes, message = BAD_ROWS[name]
    args = gsflow.Args(dataset=str(own_dataset(tmp_path / "mine.npz", **changes)))
    with pytest.raises(gsflow.UserError, match=message):
        gsflow.load_dataset(gsflow.parse_task("pointmaze-medium"), args)


def test_worker_processes_load_the_task_file(gsflow, tmp_path):
    """An environment of a task file steps in gymnasium's processes, which load the file anew."""
    (tmp_path / "task.py").write_text(
        "import gymnasium\n\n\ndef make_task(name, dataset_dir):\n"
        "    return dict(make_env=lambda: gymnasium.make('Pendulum-v1'), success=False)\n"
    )
    task = gsflow.parse_task(f"{tmp_path / 'task.py'}:swing")
    envs = gsflow.make_host_envs(
        task, gsflow.Args(), 2, gsflow.gymnasium.vector.AutoresetMode.DISABLED
    )
    try:
        assert envs.reset(seed=[1, 2])[0].shape == (2, 3)
    finally:
        envs.close()


def test_files_of_the_repository_are_found(gsflow):
    assert gsflow.parse_task("multi-crescent").success
    assert load_script(ROOT / "algos" / "flowq.py").parse_task("energy-toy").parts["critic"]
