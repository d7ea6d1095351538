"""benchmark/bfloat16.py: what rounding does to the choice among candidates."""

import re
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_script
from helpers import launch, only_run, small_args

sys.path.append(str(ROOT / "benchmark"))  # where bfloat16.py finds gsflow_student.py
tool = load_script(ROOT / "benchmark" / "bfloat16.py")
TINY = "--hidden-dims 8 8 --prior-hidden-dims 8 --batch-size 16 --num-candidates 2 --flow-steps 2"
TINY += " --offline-steps 10 --eval-interval 10 --eval-episodes 1"


def test_products_round_their_inputs_alone():
    a, b = np.float32([[1 + 2**-8, 3.0]]), np.float32([[1.0], [2**-9]])  # 1 + 2^-8 rounds to 1
    layer = lambda: float(nn.Dense(1, use_bias=False).apply(dict(params=dict(kernel=b)), a)[0, 0])
    with tool.rounded_products():
        assert layer() == 1 + 3 * 2**-9  # in bfloat16 the sum would round to 1
    assert layer() == 1 + 2**-8 + 3 * 2**-9


def test_values_closer_than_bfloat16_tell_apart_are_shared(gsflow):
    """Values 64 + 0.1 a: bfloat16 has steps of 0.5 there, so that all candidates tie and the first
    wins; in float32 the last one does. The teacher leaves the noise as it is."""
    args = small_args(gsflow, flow_steps=1, candidate_q_agg="mean")
    nets = gsflow.make_networks(args, 1)._replace(
        velocity=lambda p, obs, x, t: jnp.zeros_like(x),
        critic=lambda p, obs, a: jnp.stack([p + a[..., 0] * jnp.asarray(0.1, a.dtype)] * 2),
    )
    noises = jnp.float32([-0.5, 0.0, 0.5]).reshape(3, 1, 1)
    actor, critic = dict(velocity={}), jnp.float32(64)
    rows = {(r["form"], r["bfloat16 in"]): r for r in tool.compare(
        gsflow, nets, args, actor, critic, jnp.zeros((1, 2)), noises)}  # fmt: skip
    assert len(rows) == 6
    for key, row in rows.items():
        tie = key in (("everything", "critic"), ("everything", "both"))
        assert row["equal best"] == (3 if tie else 1) and row["same choice"] == (not tie)
        np.testing.assert_allclose(row["value lost"], 0.1 if tie else 0.0, atol=1e-4)
        np.testing.assert_allclose(row["value gained"], 0.05, atol=1e-4)


@pytest.mark.slow
def test_of_a_run(gsflow, tmp_path, capsys):
    launch(gsflow, *TINY.split(), out_dir=tmp_path)
    capsys.readouterr()
    args = tool.Args(str(only_run(tmp_path)), candidates=(3,), states=50)
    assert tool.main(args) == 0
    rows = re.findall(r"^\| (?:products|everything) \| .*\|$", capsys.readouterr().out, re.M)
    cells = np.array([[float(x) for x in row.split("|")[4:-1]] for row in rows])
    assert cells.shape == (6, 4) and (cells[:, 0] <= 1).all() and (cells[:, 3] >= 1).all()
    assert (cells[:, 1] >= 0).all() and (cells[:, 1] <= 1 + cells[:, 2]).all()


def test_bad_runs(tmp_path, capsys):
    assert tool.main(tool.Args(str(tmp_path))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
