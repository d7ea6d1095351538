"""hlo.py: what a dispatch of each method compiles to, and that the counts see what they should."""

import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, SCRIPTS, load_script
from test_speed import GFLOP

sys.path.append(str(ROOT / "benchmark"))  # where hlo.py finds speed.py
hlo = load_script(ROOT / "benchmark" / "hlo.py")
pytestmark = pytest.mark.optimised  # as the program that trains is
# Loops whose number of iterations XLA does not know, of which a GPU's host reads the predicate
# before each iteration. One: that of the dispatch itself, whose length is an argument, so that one
# program serves any length. Inside of it all lengths are fixed: Euler steps, candidates, flow
# steps, Newton's iterations of the maze. A `while_loop` until something holds would be another.
UNKNOWN_LOOPS = 1
# Conditionals, of which the host reads the predicate too. Updates have none; on a JAX environment
# "has an episode ended?", and with chunks of actions "is a new one due?".
BRANCHES = {"GSFlow online, maze": 1, "FMQ online, maze": 2, "SAC Flow online, pendulum": 1}
QUICK = ("FQL", "FlowQ")
SLOW = pytest.mark.slow


def counted(step, carry, *inputs):
    """Counts of a dispatch of the scripts' `Program`."""
    program = load_script(ROOT / "algos" / "gsflow.py").Program(step, *inputs)
    executable = hlo.compile_program(program, carry, jax.devices()[0])
    return hlo.count(executable.as_text())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in QUICK else SLOW)
        for n in (*hlo.speed.METHODS, *hlo.speed.ONLINE)
    ],
)
def test_a_dispatch_needs_no_host(name):
    if hlo.speed.script_of(name) not in SCRIPTS:
        pytest.skip("its script is not here")
    counts = hlo.measure(name, hlo.Args(), jax.devices()[0])
    assert counts["host"] == 0, "something inside of a dispatch talks to the host"
    assert counts["unknown"] == UNKNOWN_LOOPS, "a loop whose length depends on data"
    assert counts["branches"] <= BRANCHES.get(name, 0), "one more conditional"
    assert 0 < counts["params"] < counts["peak"]
    if name in GFLOP:  # counted by hand from the layer sizes: the same work, none of it twice
        assert counts["flops"] / 1e9 == pytest.approx(GFLOP[name], rel=0.01)


def test_loops_and_launches_are_counted():
    def step(carry):
        inner = lambda i, x: jnp.tanh(x @ carry["w"])
        return carry | {"x": jax.lax.fori_loop(0, 7, inner, carry["x"])}

    carry = dict(x=jnp.ones((1, 4, 8)), w=jnp.ones((1, 8, 8)))
    counts = counted(step, carry)
    assert (counts["known"], counts["unknown"], counts["branches"]) == (1, 1, 0)
    assert counts["flops"] == 7 * 2 * 4 * 8 * 8
    assert counts["launches"] >= 7 and counts["host"] == 0


def test_a_loop_until_something_holds_is_seen():
    def step(carry):
        return {"x": jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: 2 * x, carry["x"])}

    assert counted(step, dict(x=jnp.ones((1, 4))))["unknown"] == 2


def test_a_conditional_is_seen():
    def step(carry):
        x = carry["x"]
        return {"x": jax.lax.cond(x.sum() > 9, lambda: jnp.sort(x), lambda: jnp.cumsum(x))}

    assert counted(step, dict(x=jnp.ones((1, 99))))["branches"] == 1


@pytest.mark.parametrize("kind", ["debug", "pure"])
def test_a_callback_is_seen(kind):
    def step(carry):
        if kind == "debug":
            jax.debug.callback(lambda x: None, carry["x"])
            return {"x": carry["x"] + 1}
        return {"x": jax.pure_callback(lambda x: x, carry["x"], carry["x"])}

    assert counted(step, dict(x=jnp.ones((1, 4))))["host"] >= 1


def test_host_transfers_and_library_products_in_text():
    text = """HloModule m
%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %y = (f32[4,16]{1,0}, s8[4]{0}) custom-call(%x, %i), custom_call_target="__cublas$gemm", \
backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}
  %t = f32[4,8]{1,0:S(5)} copy(%x)
  ROOT %r = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}
%cond (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %c = pred[] constant(false)
}
ENTRY %main (a: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[4,8]{1,0}) while(%a), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""
    counts = hlo.count(text)
    assert (counts["products"], counts["host"], counts["known"]) == (1, 1, 1)
    assert counts["calls"] == 0 and counts["launches"] == 3 * 2
    assert counts["flops"] == 3 * 2 * 4 * 16 * 8


def test_table(capsys):
    assert hlo.main(hlo.Args(methods=("nothing",))) == 2
    assert "no method nothing; there are: GSFlow" in capsys.readouterr().out
    assert hlo.main(hlo.Args(methods=("FQL",), tiny=True)) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert len(lines) == 3 and {line.count("|") for line in lines} == {len(hlo.COLUMNS) + 2}
