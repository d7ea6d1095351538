"""What several test files share: settings of tiny runs, the pieces that a run is made of, runs."""

import contextlib
import csv
import dataclasses
import io
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT

FQL = dict(prior="gaussian", student="deterministic")
TINY = dict(hidden_dims=(8, 8), prior_hidden_dims=(8,), batch_size=16, num_candidates=3)


def resolved(gsflow, act_dim, **flags):
    """(task, args) as the script resolves them, target entropy included."""
    flags = dict(env_id="multi-crescent") | flags
    task = gsflow.parse_task(flags["env_id"])
    args = gsflow.resolve(gsflow.Args(**flags), task)
    return task, gsflow.fill(args, target_entropy=-args.target_entropy_scale * act_dim)


def small_args(gsflow, act_dim=2, **flags):
    """Resolved arguments of a run with tiny networks."""
    return resolved(gsflow, act_dim, **(TINY | flags))[1]


def make_settings(gsflow, args, online=False):
    """The phase's traced scalars in the default float type."""
    alpha = args.online_alpha if online else args.alpha
    temperature = args.online_td_temperature if online else args.offline_td_temperature
    return gsflow.PhaseSettings(jnp.asarray(float(alpha)), jnp.asarray(float(temperature)))


def make_state(gsflow, args, obs_dim, act_dim, seed=0):
    """A fresh state in the default float type (float64 where that is enabled)."""
    dtype = jnp.zeros(()).dtype
    zeros, ones = jnp.zeros(obs_dim), jnp.ones(obs_dim)
    init = jax.jit(lambda seed: gsflow.init_state(args, obs_dim, act_dim, zeros, ones, seed))
    state = init(jnp.int32(seed))
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, state)


def random_params(params, seed=0, scale=0.3):
    """Move every parameter, biases included, away from its special initial value."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), params
    )


def random_batch(obs_dim, act_dim, batch_size, seed=0):
    """What `sample` returns, at random."""
    rng, shape = np.random.default_rng(seed), (batch_size, obs_dim)
    batch = dict(
        obs=rng.normal(size=shape),
        actions=rng.uniform(-1, 1, (batch_size, act_dim)),
        returns=rng.normal(size=batch_size),
        discounts=0.99 * (rng.random(batch_size) < 0.7),
        next_obs=rng.normal(size=shape),
    )
    return {k: jnp.asarray(v, jnp.zeros(()).dtype) for k, v in batch.items()}


def make_carry(gsflow, args, data, nets, settings):
    """The carry with which a run starts: states of all seeds and sums of metrics."""
    obs_dim, act_dim = data["obs"].shape[1], data["actions"].shape[1]
    state = gsflow.start_states(args, obs_dim, act_dim, jnp.zeros(obs_dim), jnp.ones(obs_dim))
    learn = gsflow.make_learn(nets, args)
    return dict(state=state, sums=gsflow.zero_sums(learn, {"state": state}, data, settings))


def end_of(script, run):
    """What a run's last checkpoint holds, but for its clock: all arrays by path, step, results."""
    tree, facts = script.load_checkpoint(run)
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
    return leaves, {name: facts[name] for name in ("step", "evals")}


def assert_same_end(script, *runs):
    """Two runs ended with the same bytes in every array."""
    (one, facts), (other, other_facts) = (end_of(script, run) for run in runs)
    assert facts == other_facts and one.keys() == other.keys()
    for path, x in one.items():
        same = x.dtype == other[path].dtype and x.tobytes() == other[path].tobytes()
        assert same, f"{path} differs: the runs ended elsewhere"


def with_changes(args, **changes):
    return dataclasses.replace(args, **changes)


# ---- runs ----


def launch(script, *flags, code=0, out_dir=None):
    """What a script's command line writes in this process, which saves the start of another:
    (stdout, stderr)."""
    flags = [*flags, "--out-dir", out_dir] if out_dir else flags
    streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            found = script.command_line(script.main, script.Args, [*map(str, flags)])
    except SystemExit as stop:
        found = stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = (stream.buffer.getvalue().decode() for stream in streams)
    assert found == code, f"exit code {found}\n{out}\n{err}"
    return out, err


def start(name, *flags, out_dir=None, **options):
    """The script as a process of its own; its output is readable from .stdout and .stderr."""
    flags = [*flags, "--out-dir", out_dir] if out_dir else flags
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, str(ROOT / "algos" / f"{name}.py"), *map(str, flags)]
    return subprocess.Popen(command, **pipes, **options)


def finish(process, code=0, timeout=600):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def only_run(directory):
    (run,) = Path(directory).iterdir()
    return run


def rows_without_time(run):
    """The rows of metrics.csv that are the same each time."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
