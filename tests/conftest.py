"""Fixtures: the scripts as modules, and a compilation cache shared by all tests."""

import importlib.util
import os
import sys
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU
import jax  # reads these variables

SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def load_script(path):
    """Import a script by its path, once."""
    name = f"cleanflow_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", str(path)) != str(path):
        name = f"{name}_{path.parent.name}"  # benchmark/mjx.py and benchmark/tasks/mjx.py
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and cloudpickle look modules up by name
        spec.loader.exec_module(module)
    # Worker processes cannot import it. Outside the `if`: benchmark/launch.py may have loaded it.
    cloudpickle.register_pickle_by_value(sys.modules[name])
    return sys.modules[name]


def pytest_configure(config):
    """XLA's older emitters compile these small programs in half the time (what they compile is a
    tenth slower). The quick part uses them, in the processes it starts too; where everything is
    run, the compiler is the users'."""
    if config.getoption("markexpr") == "not slow":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item):
    """Nearly all the time goes into compiling tiny networks, which takes half as long without the
    compiler's optimisations. Tests marked `optimised` calculate more than they compile."""
    plain = item.get_closest_marker("optimised") is None
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(plain))  # for processes
    jax.config.update("jax_disable_most_optimizations", plain)


@pytest.fixture(scope="session")
def gsflow():
    return load_script(ROOT / "algos" / "gsflow.py")


@pytest.fixture(scope="session")
def data_dir(gsflow, tmp_path_factory):
    """A directory with two episodes of pointmaze-medium under the official name, which are there
    sooner than the 200,000 transitions that a script collects."""
    directory = tmp_path_factory.mktemp("data")
    data = gsflow.collect_pointmaze("medium", 2_000)
    np.savez(directory / "pointmaze-medium-navigate-v0.npz", **data)
    return directory
