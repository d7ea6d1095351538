"""The scripts learn: short runs on the point maze that an untrained policy cannot match."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.optimised
FQL = ["--prior", "gaussian", "--student", "deterministic"]


@pytest.mark.slow
def test_untrained_policy_fails(gsflow):
    task = gsflow.parse_task("pointmaze-medium")
    args = gsflow.fill(gsflow.resolve(gsflow.Args(), task), target_entropy=-1.0)
    env = gsflow.make_jax_env(task, args)
    state = gsflow.start_states(args, 2, 2, 0.0, 1.0)
    policies = gsflow.evaluation_policies(gsflow.make_networks(args, 2), args)
    results = gsflow.make_evaluate(task, env, policies, args)(state, 0)
    assert results["success"].shape == (1, 50) and results["success"].mean() <= 0.02
    assert results["length"].mean() >= 990


@pytest.mark.slow
@pytest.mark.parametrize("method,steps", [("fql", 6_000), ("gsflow", 8_000)])
def test_point_maze_is_solved(tmp_path, method, steps):
    flags = ["--offline-steps", steps, "--eval-interval", 2_000, "--out-dir", tmp_path]
    flags += FQL if method == "fql" else []
    command = [sys.executable, str(ROOT / "algos" / "gsflow.py"), *map(str, flags)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    (run,) = tmp_path.iterdir()
    result = json.loads((run / "result.json").read_text())
    assert len(result["episodes"]["success"][0]) == 50
    assert result["eval/success"] >= 0.9
    assert result["eval/return"] > -500
