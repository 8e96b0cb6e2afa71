"""What Optax asks of every contributed optimizer, asked of ours.

The claims are those of `_common_test.py` and `_sharding_test.py` in `optax/contrib`, in this
project's words. Some of them are shown elsewhere, on more cases: extra arguments, scan and
`optax.tree.map_params` leaf by leaf in test_wrappers.py; MultiSteps, and that the second step
compiles nothing, in test_peers_reports.py; dtypes of updates and states in test_numerics.py;
schedules and injection of every argument in test_aliases.py.
"""

import ast
import functools
import inspect
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpa_optax
from gpa_optax import averaging, eval_params, gpa, gpa_adamw, gpa_lion, gpa_muon, gpa_sgd
from helpers.acceptance import (
    OPTIMIZERS,
    alone_and_around_every_base,
    each,
    make,
    matrix_and_vector,
    parabola,
    rosenbrock,
)


@alone_and_around_every_base
@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_and_vector])
def test_x_and_y_reach_the_minimum(name, target):
    optimizer = make(name)
    params, goal, loss = target(jnp.float32)
    # To map a state by the identity leaves it as it is.
    opt_state = optax.tree.map_params(optimizer, lambda leaf: leaf, optimizer.init(params))

    @jax.jit
    def train(params, opt_state):
        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), length=30_000)[0]

    params, opt_state = train(params, opt_state)
    for reached in (params, eval_params(opt_state, params)):
        for found, wanted in zip(jax.tree.leaves(reached), jax.tree.leaves(goal), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=3e-2, atol=3e-2)


@each
def test_injected_hyperparameters_make_the_same_step_and_state(name):
    factory, arguments = OPTIMIZERS[name]
    static = {"ns_steps", "base_params", "state_dtype", "sync_period"}
    static = tuple(static & {*inspect.signature(factory).parameters})
    if name == "gpa_adamw, b1=0":
        static += ("b1", "eps_root")
    if (
        "learning_rate" in arguments
    ):  # a number: a schedule has a state, and its injected value none
        arguments = arguments | {"learning_rate": 1e-2}
    optimizer = factory(**arguments)
    injected = optax.inject_hyperparams(factory, static)(**arguments)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = jax.tree.map(lambda p: -p, params)
    updates, opt_state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    found, found_state = jax.jit(injected.update)(grads, injected.init(params), params)
    for ours, theirs in ((found, updates), (found_state.inner_state, opt_state)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_and_params_may_pass_through_cond(name, dtype, x64):
    """Which refuses branches whose shapes, dtypes or weak types differ."""
    optimizer = make(name)
    params, _, loss = parabola(dtype)

    @jax.jit
    def step(skip, params, opt_state):
        def update():
            updates, new = optimizer.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), new

        return jax.lax.cond(skip, lambda: (params, opt_state), update)

    opt_state = optimizer.init(params)
    for skip in (False, True, False):
        params, opt_state = step(skip, params, opt_state)
        assert params.dtype == dtype
    stored = jnp.promote_types(dtype, jnp.float32)
    assert eval_params(opt_state, params).dtype == dtype
    state = opt_state.x if isinstance(opt_state, gpa_optax.GPAState) else opt_state.slow
    assert state.dtype == stored


@each
def test_a_schedule_is_taken_where_the_annotation_says_so(name):
    """By every argument that is annotated so: a constant schedule makes the constant's steps."""
    factory, arguments = OPTIMIZERS[name]
    numbers = {"learning_rate": 1e-2, "mu_x": 0.9, "mu_y": 0.5, "weight_decay": 0.1}
    numbers |= {"adam_learning_rate": 1e-2, "outer_learning_rate": 0.7}
    taking = {
        argument: numbers[argument]
        for argument, parameter in inspect.signature(factory).parameters.items()
        if parameter.annotation == optax.ScalarOrSchedule
        or argument == "adam_learning_rate"  # the same, or None
    }
    assert taking
    if optax.__version__.startswith("0.2.6"):  # which the library refuses a schedule of it
        taking.pop("weight_decay", None)
    params, _, loss = parabola(jnp.float32)
    reached = []
    for given in (taking, {key: optax.constant_schedule(value) for key, value in taking.items()}):
        optimizer, w = factory(**arguments | given), params
        opt_state = optimizer.init(w)
        for _ in range(10):
            updates, opt_state = optimizer.update(jax.grad(loss)(w), opt_state, w)
            w = optax.apply_updates(w, updates)
        reached.append(w)
    np.testing.assert_allclose(*reached, rtol=1e-6)


FACTORIES = [
    gpa,
    gpa_adamw,
    gpa_sgd,
    gpa_lion,
    gpa_muon,
    gpa_optax.single_worker_diloco,
    eval_params,
    gpa_optax.iterates,
    *(getattr(averaging, name) for name in averaging.__all__ if name.islower()),
]


@pytest.mark.parametrize("function", FACTORIES, ids=lambda function: function.__name__)
def test_a_docstring_has_optaxs_form(function):
    """A line of summary, the arguments in their order, what is returned and raised, an example."""
    doc = inspect.getdoc(function)
    summary, blank, *_ = doc.splitlines()
    assert summary.endswith((".", ":")) or ":math:" in summary, summary
    assert blank == ""
    sections = re.findall(r"^([A-Z]\w+):$", doc, re.MULTILINE)
    order = ["Args", "Returns", "Raises", "Examples", "References"]
    assert sections == [section for section in order if section in sections]
    parameters = [*inspect.signature(function).parameters]
    if parameters:
        arguments = re.search(r"^Args:\n((?:  .*\n|\n)+)", doc, re.MULTILINE)[1]
        assert re.findall(r"^  (\w+):", arguments, re.MULTILINE) == parameters
    assert ">>> " in doc


def test_a_state_is_a_named_tuple_with_every_field_described():
    for state in (gpa_optax.GPAState, gpa_optax.SingleWorkerDiLoCoState):
        described = re.findall(r"^  (\w+):", inspect.getdoc(state), re.MULTILINE)
        assert described == [*state._fields]
        assert issubclass(state, tuple)


MODULES = [file.stem for file in sorted(Path(gpa_optax.__file__).parent.glob("*.py"))]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_uses_public_names_of_jax_and_optax_that_are_not_deprecated(name):
    """So that it reads the same within Optax, where `optax._src` has them, and goes on to work."""
    source = (Path(gpa_optax.__file__).parent / f"{name}.py").read_text()
    assert "_src" not in source
    tree = ast.parse(source)
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used = {path for path in dotted if re.fullmatch(r"(jax|jnp|optax)(\.\w+)+", path)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("jax", "optax")):
            used |= {f"{node.module}.{alias.name}" for alias in node.names}
    roots = {"jax": jax, "jnp": jnp, "optax": optax}
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        for path in used:
            root, *names = path.split(".")
            functools.reduce(getattr, names, roots[root])


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a jax with sharding in types")
@each
def test_a_state_has_the_same_dtypes_and_shardings_at_init_and_afterwards_jitted_or_not(name):
    """With sharding in types, and params in float16, on eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    optimizer = make(name)

    def types(tree):
        return jax.tree.map(jax.typeof, tree)

    with jax.set_mesh(mesh):
        params = jnp.zeros((2, 8, 4), jnp.float16, out_sharding=sharding)
        opt_state = optimizer.init(params)
        form = types(opt_state)
        state = opt_state.x if isinstance(opt_state, gpa_optax.GPAState) else opt_state.slow
        assert jax.typeof(state).sharding == jax.typeof(params).sharding
        assert types(jax.jit(optimizer.init)(params)) == form
        for update in (optimizer.update, jax.jit(optimizer.update)):
            updates, new_state = update(params, opt_state, params)
            assert types(new_state) == form
            assert jax.typeof(updates) == jax.typeof(params)
            assert jax.typeof(eval_params(new_state, params)) == jax.typeof(params)
