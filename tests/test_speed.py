"""speed.py: operation counts, batches gathered on the host, and one quick run."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, load_script

speed = load_script(ROOT / "benchmark" / "speed.py")
GFLOP = {  # per update at the paper's settings, worked out by hand from the layer sizes
    "GSFlow": 61.8,
    "FQL": 12.0,
    "FlowQ": 11.2,
    "FMQ offline": 46.1,
    "FMQ online": 46.4,
    "QC": 164.0,
    "SAC Flow-G Hopper": 15.5,
    "SAC Flow-T Hopper": 16.1,
    "SAC Flow-T cubes": 12.7,
}


def make_case(name, **flags):
    script, make, own = speed.METHODS[name]
    if script not in SCRIPTS:
        pytest.skip(f"algos/{script}.py is not here")
    return make(own | dict(num_seeds=1) | flags, 2_000)


@pytest.mark.parametrize("name", GFLOP)
def test_operation_count(name):
    case = make_case(name)
    params = jax.eval_shape(lambda: speed.start_carry(case)["state"].params)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    assert case.flops(one) / 1e9 == pytest.approx(GFLOP[name], rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", GFLOP)
def test_adapter_fits_its_script(name):
    """Traced, not run: both ways to update give a state of the same shapes, every policy acts."""
    case = make_case(name, **speed.QUICK[speed.METHODS[name][0]])
    carry = jax.tree.map(lambda x: x[0], speed.start_carry(case))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(jax.eval_shape(case.step, carry, case.data)) == shapes(carry)
    rows, index = jax.device_get(case.data), np.arange(case.args.batch_size)
    batches, key = [case.gather(rows, index)] * case.batches, jax.random.key(0)
    after = jax.eval_shape(case.update, carry["state"], batches, key)
    assert shapes(after) == shapes(carry["state"])
    for policy in case.policies.values():
        action = jax.eval_shape(policy, carry["state"], np.zeros(case.sizes[0], np.float32), key)
        assert action.shape[0] % case.sizes[1] == 0


def test_every_method_is_counted():
    assert set(GFLOP) == set(speed.METHODS)


@pytest.mark.parametrize("name", ["FMQ offline", "SAC Flow-T cubes"])
def test_windows_of_the_host_are_those_of_the_device(name):
    case = make_case(name, **speed.QUICK[speed.METHODS[name][0]])
    key, horizon = jax.random.key(0), 5
    batch = case.script.sample_chunks(key, case.data, None, 64, horizon, case.args.gamma)
    index = np.asarray(jax.random.randint(key, (64,), 0, 2_000 - horizon + 1))
    host = case.gather(jax.device_get(case.data), index)
    assert host.keys() == batch.keys()
    for k in batch:
        np.testing.assert_allclose(host[k], batch[k], rtol=1e-5, err_msg=k)


@pytest.mark.slow
def test_quick_table(capsys):
    args = speed.Args(methods=("FQL",), num_seeds=(1, 2), quick=True)
    assert speed.main(args) == 0
    out = capsys.readouterr().out
    rows = [[c.strip() for c in x.split("|")[1:-1]] for x in out.splitlines() if x.startswith("|")]
    names = [row[0] for row in rows[2:]]
    assert names[:3] == ["FQL update", "FQL update", "FQL action"]
    assert names[3:] == ["point maze steps, JAX", "point maze steps, OGBench"]
    assert all(len(row) == len(speed.COLUMNS) for row in rows)
    assert all(float(row[2]) > 0 and float(row[3].replace(",", "")) > 0 for row in rows[2:])
    assert re.fullmatch(r"\d+%", rows[2][speed.COLUMNS.index("of product rate")])
    assert "mean nothing" in out


def test_unknown_method_is_one_sentence(capsys):
    assert speed.main(speed.Args(methods=("nothing",))) == 2
    assert "no method nothing" in capsys.readouterr().out
