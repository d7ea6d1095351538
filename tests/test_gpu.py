"""gpu.sh: rows of other scripts' tables, failures and limits that lose nothing, a tiny run."""

import json
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SCRIPTS, load_script

sys.path.append(str(ROOT / "benchmark"))  # where gpu.py finds speed.py
gpu = load_script(ROOT / "benchmark" / "gpu.py")


def measurement(tmp_path, code, name="one", limit=30.0):
    """A measurement by a script with this code."""
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    return gpu.Measurement(name, (file,), limit, gpu.read_own)


TABLE = """print("before")
print("| what | members | per second | note |")
print("|---|---|---|---|\\na warning")
print("| a, b | 8 | 1,234 | fine |", flush=True)
"""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("", None),
        ("raise SystemExit('out of memory')", "exit code 1: out of memory"),
        ("import time; print('slow', flush=True); time.sleep(60)", "not done in 6 s: slow"),
    ],
)
def test_rows_before_a_failure_stay(tmp_path, code, says):
    runner = gpu.Runner(gpu.Args(minutes=1), tmp_path)
    rows = runner.measure(measurement(tmp_path, TABLE + code, limit=6.0))
    assert rows[0] == dict(what="a, b", members="8", per_second="1,234", note="fine")
    assert rows[1:] == ([dict(what="one", failed=says)] if says else [])


def test_no_rows_is_a_failure(tmp_path):
    runner = gpu.Runner(gpu.Args(minutes=1), tmp_path)
    rows = runner.measure(measurement(tmp_path, "print('| x |')\nprint('nothing')"))
    assert rows == [dict(what="one", failed="no rows: nothing")]


def test_what_has_no_time_left_is_listed(tmp_path):
    runner = gpu.Runner(gpu.Args(minutes=0.05), tmp_path)
    rows = runner.measure(measurement(tmp_path, TABLE))
    assert rows == [dict(what="one", failed="no time left")]


def test_compiling_ends_in_time(tmp_path):
    """Several at once, at most 40% of the minutes, and nothing is left running."""
    runner = gpu.Runner(gpu.Args(minutes=0.1, at_once=2), tmp_path)
    code = "import time, pathlib; pathlib.Path(__file__ + '.began').touch(); time.sleep(99)"
    todo = [measurement(tmp_path, code, name) for name in "abc"]
    todo = [one._replace(short=("more",)) for one in todo[:2]] + todo[2:]
    start = time.monotonic()
    runner.compile_all(todo)
    assert time.monotonic() - start < 5
    began = {path.name for path in tmp_path.glob("*.began")}
    assert began == {"a.py.began", "b.py.began"}  # c has no short form


def test_report_is_one_table():
    facts = dict(device="1 x H100", jax="0", commit="abc", tiny=False)
    rows = [dict(what="a", members=1, per_second="9", note="x | y"), dict(what="b", failed="it")]
    lines = gpu.markdown(facts, rows).splitlines()
    assert lines[0] == "1 x H100, jax 0, commit abc" and lines[1] == ""
    assert lines[4:] == ["| a | 1 | 9 | x / y |", "| b |  |  | failed: it |"]


def test_the_list_fits_the_scripts():
    """Every command parses, the tiny ones and the others."""
    for tiny in (False, True):
        args = gpu.Args(tiny=tiny, members=(1, 32), fql="fql")
        found = gpu.measurements(args, gpu.methods())
        names = [one.name for one in found]
        assert len(set(names)) == len(names) and {"training", "profile", "MJX"} <= set(names)
        for file in {one.command[0] for one in found}:
            module = load_script(ROOT / file)
            for one in (x for x in found if x.command[0] == file):
                words = [*map(str, one.command[1:]), *map(str, one.short or ())]
                assert gpu.tyro.cli(module.Args, args=words)


def test_refusals(tmp_path, capsys):
    assert gpu.main(gpu.Args(fql=str(tmp_path))) == 2
    assert "no agents/fql.py" in capsys.readouterr().out
    assert gpu.main(gpu.Args(only=("nothing",), tiny=True, out=str(tmp_path))) == 2
    assert "no measurement nothing; there are: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif("gsflow" not in SCRIPTS, reason="algos/gsflow.py is not here")
def test_tiny_run(tmp_path):
    only = ["FQL", "training", "point maze", "profile"]
    command = ["bash", str(ROOT / "benchmark" / "gpu.sh"), "--tiny", "--out", str(tmp_path)]
    command += ["--minutes", "30", "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = found["rows"]
    assert found["tiny"] and not [row for row in rows if "failed" in row], rows
    whats = [row["what"] for row in rows]
    assert whats[:2] == ["FQL update"] * 2 and "point maze steps, JAX" in whats
    assert all(float(row["per_second"].replace(",", "")) > 0 for row in rows)
    training = next(row for row in rows if row["what"].startswith("GSFlow trains"))
    seconds = re.search(
        r"random data; an evaluation of 2 episodes takes ([\d.]+) s; from the first to the last "
        r"([\d.]+) s, ([\d.]+) s where",
        training["note"],
    )
    assert all(float(x) > 0 for x in seconds.groups())
    table = (tmp_path / "gpu.md").read_text()
    assert "mean nothing" in table and table.count("\n| ") == len(rows) + 1
    assert "[4/4] profile, " in done.stdout
