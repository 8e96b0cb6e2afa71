"""The code in the README and on the pages of the site runs, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run

import gpa_optax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPES = sorted(DOCS.glob("recipes/*.py"))
BORROWED = {"benchmarks.md", "examples.md", "contributing.md", "changelog.md"}  # copies
PAGES = [
    *ROOT.glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
    *(page for page in DOCS.rglob("*.md") if page.name not in BORROWED),
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


def test_the_annealed_window_of_the_choosing_page_closes_at_the_end(names):
    names |= {"optax": optax, "averaging": gpa_optax.averaging, "gpa_adamw": gpa_optax.gpa_adamw}
    names |= {"peak": 4e-3, "steps": 100}
    run_blocks("docs/choosing.md", names, 1)
    params, opt_state = run(names["optimizer"], names["params"], lambda t, params: params, 101)
    x = gpa_optax.eval_params(opt_state, params)
    assert not np.array_equal(params["kernel"], names["params"]["kernel"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), x, params)


def test_the_migration_page_is_right_that_two_forms_are_the_same(names):
    names |= {"optax": optax} | {name: getattr(gpa_optax, name) for name in gpa_optax.__all__}
    before, wrapped, alias = python_blocks("docs/migration.md")[0].splitlines()
    ends = []
    for line in (wrapped, alias):
        exec(line, names)
        ends.append(run(names["optimizer"], names["params"], lambda t, params: params, 20)[0])
    jax.tree.map(np.testing.assert_array_equal, *ends)
    exec(before, names)
    plain, _ = run(names["optimizer"], names["params"], lambda t, params: params, 20)
    assert not np.array_equal(plain["kernel"], ends[0]["kernel"])


def test_the_migration_page_gives_what_schedule_free_is(names):
    names |= {"optax": optax} | {name: getattr(gpa_optax, name) for name in gpa_optax.__all__}
    run_blocks("docs/migration.md", names, 2)
    start = names["params"]
    found, opt_state = run(names["optimizer"], start, lambda t, params: params, 600)
    theirs = optax.contrib.schedule_free_adamw(2.5e-3, warmup_steps=500)
    expected, their_state = run(theirs, start, lambda t, params: params, 600)
    x, their_x = (
        gpa_optax.eval_params(opt_state, found),
        optax.contrib.schedule_free_eval_params(their_state, expected),
    )
    # Up to the one step by which Optax's weights are ahead.
    for ours, others in ((found, expected), (x, their_x)):
        moved = start["kernel"] - others["kernel"]
        np.testing.assert_allclose(start["kernel"] - ours["kernel"], moved, rtol=0.01)


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
