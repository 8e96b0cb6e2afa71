import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from helpers import QUICKLY, xla_flags

# Before JAX starts: the sharding tests need several devices. What is given overrides these.
os.environ["XLA_FLAGS"] = f"{xla_flags(devices=8)} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests of the examples compile the same training steps again and again, also in subprocesses.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.loops import double
from helpers.needs import NEEDS_MUON

# Random examples would make CI fail by chance where float32 meets a discontinuity.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("ci")


def pytest_report_header():
    """The versions that these tests ran on."""
    found = []
    for package in ("jax", "jaxlib", "optax", "flax", "equinox", "orbax-checkpoint", "numpy"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def pytest_collection_modifyitems(items):
    """The example in gpa_muon's docstring needs it, too."""
    for item in items:
        if item.name == "gpa_optax._aliases.gpa_muon":
            item.add_marker(NEEDS_MUON)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request):
    """Most programs take longer to optimize than to run, so the tests, and the processes that they
    start, do without. A module whose claims are about what optimization makes of a program, as
    kernels and bits, says so: OPTIMIZED = True."""
    if not QUICKLY or getattr(request.module, "OPTIMIZED", False):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Float64 for one test."""
    with double(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def params(rng):
    """A nested tree with a matrix, a vector and a scalar."""
    return {
        "a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "b": {"c": jnp.asarray(rng.normal(size=(5,)), jnp.float32), "d": jnp.ones(())},
    }


@pytest.fixture
def programs_are_not_stored():
    """The cache of compiled programs could not load those for machines that are not here."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    yield
    jax.config.update(name, before)
