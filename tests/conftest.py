"""Fixtures: the scripts as modules, and a compilation cache shared by all tests."""

import importlib.util
import os
import sys
from pathlib import Path

import cloudpickle
import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share a GPU
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def load_script(path):
    """Import a script by its path, once."""
    name = f"cleanflow_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and cloudpickle look modules up by name
        spec.loader.exec_module(module)
    # Worker processes cannot import it. Outside the `if`: benchmark/launch.py may have loaded it.
    cloudpickle.register_pickle_by_value(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def gsflow():
    return load_script(ROOT / "algos" / "gsflow.py")
