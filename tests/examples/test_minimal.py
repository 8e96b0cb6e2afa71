"""The examples in one file each: they learn, and they stay short."""

import ast

import pytest

from helpers import ROOT

pytest.importorskip("flax", minversion="0.12.0")
from helpers.needs import needs

needs("sklearn")


FOLDER = ROOT / "examples"
NAMES = ["minimal_llama", "minimal_vit"]


def test_the_minimal_llama_learns(monkeypatch):
    from examples import minimal_llama

    for name, value in {"EVALUATE_EVERY": 20, "BATCH_SIZE": 8, "VALIDATION_SIZE": 16}.items():
        monkeypatch.setattr(minimal_llama, name, value)
    losses = minimal_llama.main(steps=40, warmup_steps=8)
    assert losses[1] < losses[0] < 4.5  # of the 5.55 that a guess among 256 bytes has
    assert losses[1] < 3.6


def test_the_minimal_vit_learns(monkeypatch):
    from examples import minimal_vit

    monkeypatch.setattr(minimal_vit, "BATCH_SIZE", 32)
    assert minimal_vit.main(steps=150, warmup_steps=30)[-1] > 0.6  # a guess is right in 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_minimal_example_has_150_lines_at_most_and_imports_nothing_of_the_trainer(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 150
    modules = {
        module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (getattr(node, "module", None), *(a.name for a in node.names))
        if module
    }
    assert "gpa_optax" in modules
    assert not any(module.startswith("examples") for module in modules)
    assert f"({name}.py)" in (FOLDER / "README.md").read_text()
