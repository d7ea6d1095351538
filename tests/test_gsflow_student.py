"""benchmark/gsflow_student.py: the table of a run, and all ways to act."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import launch, make_state, only_run, small_args

student = load_script(ROOT / "benchmark" / "gsflow_student.py")
TINY = "--hidden-dims 8 8 --prior-hidden-dims 8 --batch-size 16 --num-candidates 4 --flow-steps 2"
TINY += " --offline-steps 20 --eval-interval 20 --eval-episodes 2 --ema-decay 0.9"


@pytest.mark.slow
def test_a_run_taken_apart(gsflow, data_dir, tmp_path, capsys):
    flags = [*TINY.split(), "--prior", "gaussian", "--dataset-dir", data_dir]
    launch(gsflow, *flags, out_dir=tmp_path)
    run = only_run(tmp_path)
    capsys.readouterr()
    assert student.main([str(run), "--eval-episodes", "1"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (normal|prior) \| [\d.]+ \| (\w+) \| (.*) \|$", out, re.M)
    assert float(re.search(r"\| normal \| ([\d.]+)", out)[1]) == pytest.approx(1, abs=0.02)
    assert [row[:2] for row in rows] == [("normal", "teacher"), ("normal", "student")]
    for _, actor, cells in rows:
        values = np.array([float(x) for x in cells.split(" | ") if x.strip()])
        assert np.isfinite(values).all() and len(values) == (5 if actor == "student" else 3)
        assert values[0] > 0 and values[-1] >= values[-2]  # the best of 4 is no worse than the mean
    for actor in ("student", "teacher"):
        for choice in ("one", "best"):
            assert f"success_normal_{actor}_{choice}" in out


def test_ways_differ_in_what_they_are_named_for(gsflow):
    """Networks that give themselves away: prior 0.1, student noise + 0.2, teacher + 0.4."""
    args = small_args(gsflow, num_candidates=3, student="deterministic", flow_steps=1)
    nets = gsflow.make_networks(args, 2)._replace(
        decoder=lambda p, obs, z: jnp.full((*obs.shape[:-1], 2), 0.1),
        student=lambda p, obs, x: (x + 0.2, None),
        velocity=lambda p, obs, x, t: jnp.full_like(x, 0.4),
        critic=lambda p, obs, a: jnp.stack([a.sum(-1)] * 2),
    )
    state = make_state(gsflow, args, 3, 2)
    policies = student.make_policies(gsflow, nets, args)
    act = {m: p(state, jnp.zeros(3), jax.random.key(0)) for m, p in policies.items()}
    for choice in ("one", "best"):
        np.testing.assert_allclose(act[f"prior_student_{choice}"], 0.3, atol=1e-6)
        np.testing.assert_allclose(act[f"prior_teacher_{choice}"], 0.5, atol=1e-6)
    noise_key, _ = jax.random.split(jax.random.key(0))
    noises = np.asarray(jax.random.normal(noise_key, (3, 2)))
    expected = np.clip(noises + 0.2, -1, 1)
    best = expected[expected.sum(-1).argmax()]
    np.testing.assert_allclose(act["normal_student_best"], best, atol=1e-6)
    one = np.clip(np.asarray(jax.random.normal(noise_key, (1, 2)))[0] + 0.4, -1, 1)
    np.testing.assert_allclose(act["normal_teacher_one"], one, atol=1e-6)


def test_bad_runs(tmp_path, capsys):
    for argv in ([], ["--eval-episodes", "3"], [str(tmp_path)]):
        assert student.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert student.main(["--help"]) == 0 and "best of N" in capsys.readouterr().out
