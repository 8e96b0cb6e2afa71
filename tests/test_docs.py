"""The code in the README and on the pages of the site runs, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gpa_optax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPES = sorted(DOCS.glob("recipes/*.py"))
PAGES = [
    ROOT / "README.md",
    *ROOT.glob("benchmarks/README.md"),
    *ROOT.glob("examples/README.md"),
    *ROOT.glob("CONTRIBUTING.md"),
    *(page for page in DOCS.rglob("*.md") if page.name not in ("benchmarks.md", "examples.md")),
]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def names():
    """What the pages take as given: a model, batches, and AdamW's learning rate."""

    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"] + params["bias"] - 1.0) ** 2)

    batches = [jax.random.normal(jax.random.key(i), (4, 3)) for i in range(5)]
    return {
        "params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
        "loss": loss,
        "grad": jax.grad(loss),
        "batches": batches,
        "validation_batch": batches[0],
        "steps": 1000,
        "adamw_learning_rate": 4e-3,
    }


def run_blocks(page: str, names: dict, count: int) -> None:
    blocks = python_blocks(page)
    assert len(blocks) == count, page
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_the_loop_of_the_front_page_trains(page, names):
    start = names["loss"](names["params"], names["validation_batch"])
    run_blocks(page, names, 2 if page == "README.md" else 1)
    assert names["validation_loss"] < start


def test_the_recipe_is_the_average_that_the_page_describes(names):
    run_blocks("README.md", names, 2)
    # After 200 steps of warmup, which weigh as a third of so many, and 301 more.
    assert float(names["mu_x"](500)) == pytest.approx(1 - 1 / (200 / 3 + 301), abs=1e-4)


def test_the_optimizers_of_the_migration_page_are_the_same_before_and_after(names):
    from gpa_optax import averaging, gpa, gpa_adamw

    names |= {"optax": __import__("optax"), "gpa": gpa, "averaging": averaging}
    names |= {"gpa_adamw": gpa_adamw}
    run_blocks("docs/migration.md", names, 2)
    assert isinstance(names["optimizer"].init(names["params"]), gpa_optax.GPAState)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    for module in ("flax", "equinox", "orbax.checkpoint"):
        if re.search(rf"^(import|from) {module}\b", recipe.read_text(), re.MULTILINE):
            pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, recipe],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_recipe_is_shown_on_a_page():
    shown = {
        name
        for page in DOCS.glob("recipes/*.md")
        for name in re.findall(r"```{literalinclude} (\S+)", page.read_text())
    }
    assert shown == {recipe.name for recipe in RECIPES}


def test_the_reference_has_every_public_name_and_no_other():
    documented = set()
    for page in DOCS.glob("api/*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if kind in ("automodule", "currentmodule"):
                module = name
            else:
                documented.add(f"{module}.{name.removesuffix('()')}")
    public = {f"gpa_optax.{name}" for name in gpa_optax.__all__} - {"gpa_optax.averaging"}
    public |= {f"gpa_optax.averaging.{name}" for name in gpa_optax.averaging.__all__}
    assert documented == public
    for name in public:
        assert eval(name).__doc__, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} in {page}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            # As GitHub and MyST make anchors of headings.
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{link} in {page}"
