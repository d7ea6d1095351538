"""What holds for every script: shared blocks, dependencies, --help, layout."""

import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, load_script

BLOCK = re.compile(r"^# ==== shared: (.+?) ====\n(.*?)^# ==== end shared: \1 ====", re.S | re.M)
SECTIONS = ("\nclass Args", "\nTASK_DEFAULTS", "\n# ---- networks ----", "\n# ---- the method")
SECTIONS += ("\n# ---- training ----", "\n# ---- main ----", "\n# region support", "\n# endregion")
ALIASES = {"updates_per_dispatch", "total_timesteps", "eval_freq"}
METHOD_LINES = {"sac_flow": 850}  # above the region; others 700


def source(script):
    return (ROOT / "algos" / f"{script}.py").read_text()


def test_shared_blocks_are_byte_identical():
    seen = {}
    for script in SCRIPTS:
        text = source(script)
        assert text.count("\n# ==== shared:") == len(BLOCK.findall(text)), (
            f"{script}: unclosed block"
        )
        for name, body in BLOCK.findall(text):
            first, expected = seen.setdefault(name, (script, body))
            assert body == expected, f"block '{name}' differs between {first}.py and {script}.py"
    assert "runs" in seen and "data" in seen


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_stand_in_order(script):
    text = source(script)
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)
    method, support = text.split("\n# region support")
    assert method.count("\n") < METHOD_LINES.get(script, 700)
    for name in re.findall(r"# ==== shared: (.+?) ====", method):
        assert name == "training loop", f"block '{name}' belongs below the line"
    after = [line for line in support.split("\n# endregion")[1].splitlines() if line.strip()]
    assert after == ['if __name__ == "__main__":', "    sys.exit(command_line(main, Args))"]


def test_sync_shared_copies_and_checks(tmp_path):
    """`--check` names a block that differs; the copy makes it the same again."""
    for part in ("algos", "benchmark"):
        (tmp_path / part).mkdir()
    for script in SCRIPTS:
        (tmp_path / "algos" / f"{script}.py").write_text(source(script))
    tool = tmp_path / "benchmark" / "sync_shared.py"
    tool.write_text((ROOT / "benchmark" / "sync_shared.py").read_text())

    def run(*arguments):
        command = [sys.executable, str(tool), *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("--check").returncode == 0
    changed = source("gsflow").replace("CELL, RADIUS = 4.0", "CELL, RADIUS = 5.0")
    (tmp_path / "algos" / "gsflow.py").write_text(changed)
    check = run("--check")
    assert check.returncode == 1 and "block 'point mazes' differs" in check.stdout
    assert run("gsflow").returncode == 0 and run("--check").returncode == 0
    assert "CELL, RADIUS = 5.0" in (tmp_path / "algos" / "fmq.py").read_text()
    assert run("nothing").returncode == 2


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


@pytest.mark.parametrize("script", SCRIPTS)
def test_imports_no_sibling(script):
    local = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for node in ast.walk(ast.parse(source(script))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not local & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_dependencies_match_requirements(script):
    lines = (ROOT / "requirements.txt").read_text().split("# Task files")[0].splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    block = source(script).split("# /// script\n")[1].split("# ///\n")[0]
    assert re.findall(r'#   "(.+?)",', block) == pinned


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_flag(script):
    command = [sys.executable, str(ROOT / "algos" / f"{script}.py"), "--help"]
    out = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": "", "COLUMNS": "200"}
    )
    assert out.returncode == 0, out.stderr
    for field in dataclasses.fields(load_script(ROOT / "algos" / f"{script}.py").Args):
        flag = "--" + field.name.replace("_", "-")
        entry = re.search(rf"{flag}[ ,][^\n]*\n?[^\n]*", out.stdout)
        assert entry, f"{flag} is not in --help"
        words = re.sub(r"\(default.*|[│{}|]|--\S+|[A-Z]{3,}", " ", entry.group()).split()
        assert len(words) >= 1, f"{flag} has no explanation"


def test_readme_commands_use_flags_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "benchmark").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    lines = re.findall(r"python algos/(\w+)\.py([^\n`#]*)", text)
    assert {script for script, _ in lines} == set(SCRIPTS), "README runs a script that is not there"
    for script, rest in lines:
        known = {f.name for f in dataclasses.fields(load_script(ROOT / f"algos/{script}.py").Args)}
        for flag in re.findall(r"--([a-z-]+)", rest):
            assert flag.removeprefix("no-").replace("-", "_") in known | {"help"} | ALIASES, (
                f"--{flag}"
            )


def test_ci_runs_the_readme_lines():
    script = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    assert "pip install -q -r requirements.txt" in script
    assert "pip install -r requirements.txt" in readme
    assert script.rstrip().splitlines()[-1] == 'pytest -m "slow or not slow"'
    assert "\n`pytest` runs" in readme and 'pytest -m "slow or not slow"' in readme
