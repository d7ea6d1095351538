"""A disk that errs: a file of a run with a changed byte or without its end is noticed or harmless.
Nothing wrong is ever loaded in silence, and no error is a traceback."""

import contextlib
import io
import random
import shutil

import jax
import numpy as np
import pytest
from helpers import launch, only_run
from test_runs import BANDIT

BYTES = {  # 200 changed bytes, 50 cuts, by what a file's name begins with
    "checkpoint.msgpack": (40, 10),
    "checkpoint.previous": (20, 5),
    "offline.msgpack": (30, 8),
    "0-10.msgpack": (10, 3),  # rows of the replay that both checkpoints need
    "10-20.msgpack": (10, 2),  # and that only the last one does
    "args.json": (50, 12),
    "metrics.csv": (15, 4),
    "result.json": (15, 3),
    "events": (10, 3),
}


@pytest.fixture(scope="module")
def finished(gsflow, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    flags = ["--offline-steps", 20, "--eval-interval", 20, "--checkpoint-interval", 10]
    flags += ["--online-steps", 20]
    launch(gsflow, *BANDIT, *flags, out_dir=directory)
    run = only_run(directory)
    assert sum(b for b, _ in BYTES.values()) == 200 and sum(c for _, c in BYTES.values()) == 50
    unknown = [p.name for p in run.rglob("*") if p.is_file() and not p.name.startswith((*BYTES,))]
    pictures = [f"multi_crescent_{phase}.png" for phase in ("offline", "online")]
    assert sorted(unknown) == [".lock", *pictures], "what is in these files?"
    return run


def damaged(content, kind, rng):
    """The content with one byte changed, or without its end."""
    position = rng.randrange(len(content))
    if kind == "cut":
        return content[:position]
    changed = bytes([content[position] ^ rng.randrange(1, 256)])
    return content[:position] + changed + content[position + 1 :]


def leaves(tree):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def same(one, other):
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all(
        x.dtype == other[k].dtype and np.array_equal(x, other[k], equal_nan=x.dtype.kind == "f")
        for k, x in one.items()
    )


def resumed(gsflow, run):
    """All that --resume reads and opens -> (arguments, arrays, facts, stderr)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        args = gsflow.read_args(run, ["--resume", str(run)], gsflow.Args())
        tree, facts = gsflow.load_checkpoint(run)
        task = gsflow.parse_task(args.env_id)
        data, source = gsflow.load_dataset(task, args)
        opened = gsflow.Run(args, task, source, data, {"": None}, facts)
        opened.csv.close(), opened.lock_file.close()
        [writer.close() for writer in opened.writers]
    stored = gsflow.read_args(run, ["--resume", str(run)], gsflow.Args())  # as it is written now
    assert stored == args
    return vars(args) | {"resume": None}, tree, facts, err.getvalue()


@pytest.mark.parametrize("kind", ["byte", "cut"])
@pytest.mark.parametrize("name", BYTES)
def test_damage_is_noticed_or_does_no_harm(gsflow, finished, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(gsflow.signal, "signal", lambda *_: None)
    intact = resumed(gsflow, shutil.copytree(finished, tmp_path / "intact"))
    before = gsflow.load_checkpoint(finished)[0]
    previous = shutil.copytree(finished, tmp_path / "previous")
    (previous / "checkpoint.msgpack").unlink()
    older, older_facts = gsflow.load_checkpoint(previous)
    assert not same(before, older) and older_facts["step"] == 30
    rng, (path,) = random.Random(name + kind), finished.rglob(f"{name}*")
    content, noticed = path.read_bytes(), 0
    times = BYTES[name][kind == "cut"]
    for i in range(times):
        run = shutil.copytree(finished, tmp_path / str(i))
        file = run / path.relative_to(finished)
        file.write_bytes(damaged(content, kind, rng))
        if name == "offline.msgpack":  # what --start-from reads
            with pytest.raises(gsflow.UserError, match="no intact offline"):
                gsflow.load_checkpoint(run, "offline")
            noticed += 1
        try:
            args, tree, facts, err = resumed(gsflow, run)
        except gsflow.UserError as e:
            assert name in ("args.json", "0-10.msgpack") and str(run) in str(e)
            noticed += 1
            continue
        assert args == intact[0]
        if name in ("checkpoint.msgpack", "10-20.msgpack"):
            assert f"NOTICE: {file} is damaged" in err
            assert same(tree, older) and facts == older_facts
            noticed += 1
        else:
            assert same(tree, before) and facts == intact[2] and err == ""
        shutil.rmtree(run)
    if name.endswith(".msgpack") or (name, kind) == ("args.json", "cut"):
        assert noticed == times
    if (name, kind) == ("args.json", "byte"):
        assert noticed > times / 2  # the others lie in what is only told: versions, commit, device


def test_both_checkpoints_damaged(gsflow, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    for file in ("checkpoint.msgpack", "checkpoint.previous"):
        (run / file).write_bytes(b"CLEANFLOW1" + (run / file).read_bytes()[11:])
    _, err = launch(gsflow, "--resume", run, "--online-steps", 40, code=2)
    assert err.count("NOTICE") == 2 and err.splitlines()[-1].startswith("error: no intact")


@pytest.mark.slow
def test_resume_after_damage_goes_on(gsflow, finished, tmp_path):
    """From the checkpoint before, whose steps are repeated, with an empty table of metrics."""
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoint.msgpack").write_bytes(b"nothing")
    (run / "metrics.csv").write_bytes(b"\xff" * 7)
    launch(gsflow, "--resume", run, "--online-steps", 40)
    assert gsflow.load_checkpoint(run)[1]["step"] == 60


def test_evaluation_does_without_the_replay(gsflow, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("replay"))
    out, err = launch(gsflow, "--evaluate", run)
    assert "step 40, " in out and err == ""
