"""What a test needs and is skipped without, with a reason that says so."""

import importlib.util

import optax
import pytest

# What the trainer of the examples imports.
TRAINER = ("grain", "orbax.checkpoint", "tokenizers", "tyro")


def needs(*modules):
    """Skips the module or test that calls it, unless all of these can be imported."""
    for module in modules:
        pytest.importorskip(module)


def needs_optax(version, what):
    """A mark that skips what an older optax lacks, and says so."""

    def numbers(text):
        return [int(part) for part in text.split(".")[:3]]

    return pytest.mark.skipif(
        numbers(optax.__version__) < numbers(version),
        reason=f"{what} needs optax {version}; this is optax {optax.__version__}",
    )


NEEDS_MUON = needs_optax("0.2.8", "gpa_muon")


def marked(mark, values, *which):
    """The values for `pytest.mark.parametrize`, marked where they are or hold one of `which`."""
    cases = [value if isinstance(value, tuple) else (value,) for value in values]
    return [
        pytest.param(*case, marks=mark if any(part in which for part in case) else ())
        for case in cases
    ]


def needs_plugin(name):
    found = importlib.util.find_spec(name.replace("-", "_"))
    return pytest.mark.skipif(not found, reason=f"needs {name}")


needs_libtpu = needs_plugin("libtpu")
needs_cuda_plugin = needs_plugin("jax-cuda13-plugin")
