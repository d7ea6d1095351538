"""benchmark/fmq_samples.py: its table, what acts, and another run's critic."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import launch, only_run

sys.path.append(str(ROOT / "benchmark"))  # where fmq_samples.py finds gsflow_student.py
samples = load_script(ROOT / "benchmark" / "fmq_samples.py")
TINY = "--hidden-dims 8 8 --batch-size 16 --num-samples 3 --offline-steps 20 --eval-interval 20"
TINY += " --online-steps 0 --eval-episodes 1 --eval-modes one-step"


@pytest.fixture(scope="module")
def fmq():
    return load_script(ROOT / "algos" / "fmq.py")


@pytest.mark.slow
def test_a_run_taken_apart(fmq, data_dir, tmp_path, capsys):
    flags = [*TINY.split(), "--dataset-dir", data_dir]
    runs = []
    for seed in "01":
        launch(fmq, *flags, "--seed", seed, out_dir=tmp_path / seed)
        runs.append(str(only_run(tmp_path / seed)))
    capsys.readouterr()
    words, out = [runs[0], "--steps", "2", "--scales", "1", "0"], []
    for other in ([], ["--critic", runs[1]]):
        assert samples.main([*words, *other]) == 0
        out.append(capsys.readouterr().out)
    tables = [re.findall(r"^\| (\d) \| (\d) \| (.*) \|$", text, re.M) for text in out]
    assert [row[:2] for row in tables[0]] == [("2", "1"), ("2", "0")]
    for (_, scale, cells), (*_, other_cells) in zip(*tables, strict=True):
        spread, off, q, best = map(float, cells.split(" | "))
        assert (spread > 0) == (scale == "1") and off > 0 and best >= q
        mine, others = cells.split(" | "), other_cells.split(" | ")
        assert mine[:2] == others[:2] and mine[2:] != others[2:]  # the same actor, other values
        assert all(f"success_steps_2_noise_{scale}" in text for text in out)


def test_ways_differ_in_what_they_are_named_for(fmq):
    """An actor with x' = -x: K Euler steps shrink noise by (1 - 1/K)^K; the critic chooses."""
    args = fmq.Args(env_id="cube-double", actor="flow", num_samples=3, horizon=2, online_steps=2)
    args = fmq.resolve(args, fmq.parse_task(args.env_id))
    sign = lambda p, obs, chunk: jnp.stack([p * chunk.sum(-1)] * 2)
    nets = fmq.make_networks(args, 2)._replace(actor=lambda p, obs, x, r, t: -x, critic=sign)
    state = fmq.init_state(args, 3, 2, jnp.zeros(3), jnp.ones(3), 0)
    state = state.replace(params={"actor": None, "critic": 1.0})
    noise = np.asarray(jax.random.normal(jax.random.key(0), (3, 4)))
    for critic, choose in ((None, np.argmax), (-1.0, np.argmin)):
        policies = samples.make_policies(fmq, nets, args, [2, 4], [1.0, 0.5], critic)
        assert [*policies] == [f"steps_{k}_noise_{s}" for k in (2, 4) for s in ("1", "0.5")]
        for k in (2, 4):
            for scale in (1, 0.5):
                act = policies[f"steps_{k}_noise_{scale}"](state, jnp.zeros(3), jax.random.key(0))
                chunks = np.clip(scale * noise * (1 - 1 / k) ** k, -1, 1)
                np.testing.assert_allclose(act, chunks[choose(chunks.sum(-1))], atol=1e-6)


def test_bad_words(tmp_path, capsys):
    """One sentence and exit code 2."""
    for argv in (
        [],
        ["--steps", "1"],
        [str(tmp_path)],
        ["run", "--steps", "0"],
        ["run", "--scales", "x"],
        ["run", "--critic", "a", "b"],
    ):
        assert samples.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    assert samples.main(["--help"]) == 0 and "--critic" in capsys.readouterr().out
