"""What is published says of itself what is so, and is checked the same way everywhere."""

import ast
import datetime
import re
import sys
import tomllib
from importlib.metadata import requires

import pytest

import gpa_optax
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower()


def test_the_library_imports_jax_optax_and_numpy_alone():
    allowed = {"gpa_optax", "jax", "numpy", "optax", *sys.stdlib_module_names}
    for file in (ROOT / "gpa_optax").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}, line {node.lineno}"
                imported = {node.module.split(".")[0]}
            else:
                continue
            assert imported <= allowed, f"{file.name}, line {node.lineno}"


def test_jax_and_optax_are_declared_and_numpy_comes_with_jax():
    assert [name_of(requirement) for requirement in PROJECT["dependencies"]] == ["jax", "optax"]
    unconditional = [name for name in requires("jax") if "extra ==" not in name]
    assert "numpy" in map(name_of, unconditional)


def floors(*extras):
    """What is required at least of the library and some extras; the last to name one decides."""
    found = {}
    for requirement in PROJECT["dependencies"] + [r for extra in extras for r in EXTRAS[extra]]:
        if not requirement.startswith("gpa-optax["):
            name, floor = requirement.lower().split(">=")
            found[name] = floor
    return found


def test_every_dependency_has_a_floor_and_no_ceiling():
    for requirement in PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]:
        assert re.fullmatch(r"[\w.-]+>=[\d.]+|gpa-optax\[[\w,]+\]", requirement), requirement


@pytest.mark.parametrize(
    ("file", "extras"),
    [("oldest.txt", ("test",)), ("oldest-examples.txt", ("test", "examples", "bench"))],
)
def test_the_oldest_versions_that_are_tested_are_the_floors(file, extras):
    lines = (ROOT / ".ci" / file).read_text().splitlines()
    pinned = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    assert pinned.pop("jaxlib") == pinned["jax"]
    assert pinned == floors(*extras)


def test_the_version_is_the_same_everywhere():
    version = gpa_optax.__version__
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == version
    assert f"\nversion: {version}\ndate-released: {newest[2]}\n" in citation
    datetime.date.fromisoformat(newest[2])


def load_workflows():
    yaml = pytest.importorskip("yaml")
    return {path.name: yaml.safe_load(path.read_text()) for path in WORKFLOWS}


def test_the_workflows_run_what_ci_runs():
    """Each step of .ci/run is a target, and has a job; every target that is named exists."""
    tests = load_workflows()["tests.yml"]["jobs"]
    in_jobs = {*tests["check"]["strategy"]["matrix"]["target"], "test", "torch", "fashion-mnist"}
    in_run = set(re.findall(r"\bmake ([\w-]+)", (ROOT / ".ci" / "run").read_text()))
    assert in_jobs == in_run
    written = "\n".join(path.read_text() for path in WORKFLOWS)
    named = in_run | set(re.findall(r"(?:run|command): make ([\w-]+)", written))
    assert named <= set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))


def test_the_workflows_test_every_python_that_is_promised():
    pythons = load_workflows()["tests.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    promised = [
        found[1]
        for classifier in PROJECT["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", classifier))
    ]
    assert pythons == promised
    assert PROJECT["requires-python"] == f">={pythons[0]}"


def test_a_workflow_may_read_and_only_the_one_that_publishes_may_do_that():
    for name, workflow in load_workflows().items():
        assert workflow["permissions"] in ({}, {"contents": "read"}), name
        for job, steps in workflow["jobs"].items():
            publishes = (name, job) == ("publish.yml", "publish")
            allowed = {"id-token": "write"} if publishes else {"contents": "read"}
            assert steps.get("permissions", {"contents": "read"}) == allowed, (name, job)
            for step in steps["steps"]:
                uses = step.get("uses", "actions/none@v1")
                assert re.fullmatch(r"actions/[\w-]+@v\d+", uses) or (
                    publishes and uses == "pypa/gh-action-pypi-publish@release/v1"
                ), uses
