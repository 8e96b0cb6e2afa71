"""Which of the packages import which: gpa_optax <- planning <- examples <- benchmarks."""

import ast
import sys

import pytest

from helpers import ROOT

ORDER = ["gpa_optax", "planning", "examples", "benchmarks"]


def imported(path):
    """The top-level packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_those_before_it_and_never_the_tests(package):
    later = {*ORDER[ORDER.index(package) + 1 :], "tests"}
    tests = {"helpers"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    paths = list((ROOT / package).rglob("*.py"))
    assert paths
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in paths
        if (found := {name for name in imported(path) if name in later | tests})
    }
    assert wrong == {}


def test_the_library_imports_jax_and_optax_alone():
    own = {"gpa_optax", "jax", "optax", "numpy"}  # NumPy is jax's own
    found = {name for path in (ROOT / "gpa_optax").rglob("*.py") for name in imported(path)}
    assert found <= own | set(sys.stdlib_module_names)
