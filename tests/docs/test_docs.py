"""The code in the README and on the pages of the site runs, and their links lead somewhere."""

import re
import runpy
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpa_optax
from gpa_optax import averaging
from helpers.loops import run

PUBLIC = {"optax": optax} | {name: getattr(gpa_optax, name) for name in gpa_optax.__all__}
from helpers import ROOT, environment

DOCS = ROOT / "docs"
RECIPES = sorted(DOCS.glob("recipes/*.py"))
BORROWED = {
    "benchmarks",
    "benchmarks.md",
    "examples.md",
    "contributing.md",
    "changelog.md",
}  # copies
PAGES = [
    *ROOT.glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
    *(ROOT / "benchmarks" / "pages").glob("*.md"),
    *(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in BORROWED),
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


def test_the_front_page_runs_as_it_stands(capsys):
    run_blocks("README.md", {}, 1)
    assert float(capsys.readouterr().out) < 0.05  # from 0.7


def test_the_loop_of_getting_started_trains(names):
    start = names["loss"](names["params"], names["validation_batch"])
    names["steps"] = len(names["batches"])
    run_blocks("docs/getting_started.md", names, 1)
    assert names["validation_loss"] < start


def test_the_two_settings_of_the_choosing_page_are_what_it_says(names):
    steps, warmup, peak = 100, 20, 2 * names["adamw_learning_rate"]
    line = optax.linear_schedule(peak, 0.0, steps - warmup)
    rise = optax.linear_schedule(0.0, peak, warmup)
    falling = optax.join_schedules([rise, line], [warmup])
    staying = optax.warmup_constant_schedule(0.0, peak, warmup)
    window = averaging.annealed(averaging.from_horizon(0.05 * steps), falling, peak)
    by_hand = {
        "annealed": gpa_optax.gpa(adamw_without_momentum(falling), window, mu_y=0.9),
        "anytime": gpa_optax.gpa(
            adamw_without_momentum(staying), averaging.lr_weighted(staying, warmup), mu_y=0.9
        ),
    }
    names |= PUBLIC | {"steps": steps, "warmup_steps": warmup}
    for block, expected in zip(python_blocks("docs/choosing.md"), by_hand.values(), strict=True):
        exec(block, names)
        found = run(names["optimizer"], names["params"], lambda t, params: params, steps + 1)
        wanted = run(expected, names["params"], lambda t, params: params, steps + 1)
        for ours, theirs in zip(ends(*found), ends(*wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        x, y = ends(*found)
        # At a learning rate of 0 both meet; at a constant one they stay apart.
        assert np.allclose(x, y, rtol=1e-6) == (expected is by_hand["annealed"])


def adamw_without_momentum(schedule):
    return optax.adamw(schedule, b1=0.0, b2=0.95, weight_decay=0.1)


def ends(params, opt_state):
    """x and y of the kernel."""
    return gpa_optax.eval_params(opt_state, params)["kernel"], params["kernel"]


def test_the_migration_page_is_right_that_two_forms_are_the_same(names):
    names |= PUBLIC | {"mu_x": averaging.uniform(), "schedule": optax.linear_schedule(0.1, 0, 50)}
    wrapped, alias = python_blocks("docs/migration.md")[1].splitlines()
    sizes, found = [], []
    for line in (wrapped, alias):
        exec(line, names)
        params, opt_state = run(names["optimizer"], names["params"], lambda t, params: params, 20)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim))
        found.append(ends(params, opt_state))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert sizes == [24, 16]  # of 8 params: x, v and, in the first, m


def test_the_first_block_of_the_migration_page_takes_the_place_of_adamw(names):
    names |= PUBLIC | {"schedule": optax.linear_schedule(4e-3, 0.0, 1000)}
    for line in python_blocks("docs/migration.md")[0].splitlines():
        exec(line, names)
        params, opt_state = run(names["optimizer"], names["params"], lambda t, params: params, 20)
        assert np.isfinite(params["kernel"]).all()
    assert isinstance(opt_state, gpa_optax.GPAState)


def test_what_getting_started_says_of_injected_values(names):
    """The function of what is to change keeps everything else as it is written."""
    names |= PUBLIC | {"mu_x": averaging.uniform(), "mask": {"kernel": True, "bias": False}}
    page = (ROOT / "docs/getting_started.md").read_text()
    (block,) = re.findall(r"^  ```python\n(.*?)^  ```", page, re.DOTALL | re.MULTILINE)
    exec(textwrap.dedent(block), names)
    found, opt_state = run(names["optimizer"], names["params"], lambda t, params: params, 20)
    assert set(opt_state.hyperparams) == {"learning_rate"}
    expected, its_state = run(names["make"](1e-3), names["params"], lambda t, params: params, 20)
    for ours, theirs in zip(ends(found, opt_state), ends(expected, its_state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert sum(leaf.size for leaf in jax.tree.leaves(opt_state.inner_state) if leaf.ndim) == 16

    # And the alias itself: an injected 0 keeps a first moment, a static one does not.
    arguments = {"learning_rate": 1e-3, "mu_x": 0.9, "b1": 0.0, "mask": names["mask"]}
    inject = optax.inject_hyperparams
    for optimizer, size in (
        (inject(gpa_optax.gpa_adamw)(**arguments), 24),
        (inject(gpa_optax.gpa_adamw, static_args=("b1", "eps_root"))(**arguments), 16),
    ):
        state = optimizer.init(names["params"]).inner_state
        assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == size


def test_the_migration_page_gives_what_schedule_free_is(names):
    names |= PUBLIC
    *_, block = python_blocks("docs/migration.md")
    exec(block, names)
    start = names["params"]
    page = (ROOT / "docs/migration.md").read_text()
    (brief,) = re.findall(r"`(anytime_adamw\(2\.5e-3.*?\))`", page)
    params, its_state = run(eval(brief, names), start, lambda t, params: params, 600)
    brief = ends(params, its_state)
    found, opt_state = run(names["optimizer"], start, lambda t, params: params, 600)
    theirs = optax.contrib.schedule_free_adamw(2.5e-3, warmup_steps=500)
    expected, their_state = run(theirs, start, lambda t, params: params, 600)
    x, their_x = (
        gpa_optax.eval_params(opt_state, found),
        optax.contrib.schedule_free_eval_params(their_state, expected),
    )
    for ours, written_out in zip(brief, ends(found, opt_state), strict=True):
        np.testing.assert_allclose(ours, written_out, atol=1e-6)
    # Up to the one step by which Optax's weights are ahead.
    for ours, others in ((found, expected), (x, their_x)):
        moved = start["kernel"] - others["kernel"]
        np.testing.assert_allclose(start["kernel"] - ours["kernel"], moved, rtol=0.01)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe(recipe):
    text = recipe.read_text()
    for module in ("flax", "equinox", "orbax.checkpoint"):
        if re.search(rf"^(import|from) {module}\b", text, re.MULTILINE):
            pytest.importorskip(module)
    if "jax.config" not in text:
        runpy.run_path(str(recipe))
        return
    done = subprocess.run(  # what it sets has to be set before JAX starts
        [sys.executable, recipe],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_every_recipe_is_shown_on_a_page():
    shown = {
        name
        for page in DOCS.glob("recipes/*.md")
        for name in re.findall(r"```{literalinclude} ([\w.]+)\n", page.read_text())
    }
    assert shown == {recipe.name for recipe in RECIPES}


def test_every_program_of_a_client_is_on_the_page_of_other_libraries():
    """With the version that its header names; `make clients` runs them."""
    page = (DOCS / "recipes" / "other_trainers.md").read_text()
    linked = re.findall(r"\| ([^|]+) \| \[(with_\w+\.py)\]", page)
    programs = {path.name: path.read_text() for path in ROOT.glob("clients/with_*.py")}
    assert sorted(program for _, program in linked) == sorted(programs)
    for told, program in linked:
        for version in told.split(", "):
            assert re.search(rf"[~=]={re.escape(version)}\W", programs[program]), (program, version)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_prose_is_longer_than_120_characters(page):
    """Tables, code, formulas and what programs printed are no prose."""
    inside, long = False, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.strip().startswith(("```", "$$")):
            inside = not inside
        elif not inside and len(line) > 120 and not line.lstrip().startswith(tuple("|┃│├┏┡└")):
            long.append(number)
    assert not long
