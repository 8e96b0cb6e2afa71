"""What an update costs: state, temporaries, and kernels on machines that are not here."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.kernels import kernels
from gpa_optax import gpa, gpa_adamw, single_worker_diloco
from helpers import ROOT
from helpers.needs import needs_cuda_plugin, needs_libtpu

OPTIMIZED = True  # see quick_compilation in conftest.py

SEQUENTIAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SHAPES = {"embedding": (512, 256), "matrices": (4, 256, 512), "scale": (256,)}
SIZE = sum(map(math.prod, SHAPES.values()))
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "gpa": gpa(optax.adamw(1e-3)),
    "gpa b1=0": gpa_adamw(1e-3, b1=0.0),
    "diloco": single_worker_diloco(optax.adamw(1e-3), 32),
}


def params(dtype):
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}


def compiled(optimizer, dtype):
    """One update on the CPU, with params and state donated."""

    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    arguments = params(dtype), jax.eval_shape(optimizer.init, params(dtype)), params(dtype)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


@pytest.mark.parametrize(
    ("name", "dtype", "state"),
    [
        ("adamw", jnp.float32, 8),  # m, v
        ("gpa", jnp.float32, 12),  # and x: one buffer more
        ("gpa b1=0", jnp.float32, 8),  # x instead of m
        ("diloco", jnp.float32, 16),  # the slow weights and their momentum: two more
        ("adamw", jnp.bfloat16, 4),
        ("gpa", jnp.bfloat16, 16),  # all in float32: m, v, x, and y
        ("gpa b1=0", jnp.bfloat16, 12),
        ("diloco", jnp.bfloat16, 12),  # m, v narrow
    ],
)
def test_bytes_of_state_per_param(name, dtype, state):
    optimizer = OPTIMIZERS[name]
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params(dtype)))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.ndim) == state * SIZE
    # The compiled program takes as much, with params, gradients and some scalars.
    arguments = compiled(optimizer, dtype).memory_analysis().argument_size_in_bytes
    assert 0 <= arguments - (state + 2 * jnp.dtype(dtype).itemsize) * SIZE < 64


def temporaries(dtype=jnp.float32):
    """Of an update on the CPU, and the largest leaf in float32, in bytes."""
    memory = compiled(OPTIMIZERS["gpa"], dtype).memory_analysis()
    return memory.temp_size_in_bytes, 4 * max(map(math.prod, SHAPES.values()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_on_the_cpu_keeps_no_array_besides_params_and_state(dtype):
    temporary, _ = temporaries(dtype)
    assert temporary < 4096


def test_with_the_sequential_scheduler_temporaries_are_within_the_largest_leaf():
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/library"))
    environment = os.environ | {"XLA_FLAGS": SEQUENTIAL, "PYTHONPATH": paths}
    code = "import test_costs; print(*test_costs.temporaries())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    temporary, largest = map(int, done.stdout.split())
    assert temporary <= largest


@pytest.mark.usefixtures("programs_are_not_stored")
@pytest.mark.parametrize("name", ["gpa", "gpa b1=0"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("h100:1", marks=needs_cuda_plugin),
        *(pytest.param(t, marks=needs_libtpu) for t in ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")),
    ],
)
def test_on_accelerators_an_update_is_one_kernel_for_each_leaf(target, dtype, name):
    pytest.importorskip("tyro")
    from benchmarks.compiled_cost import cost
    from benchmarks.updates import Update
    from planning.machines import find

    found = cost(Update(OPTIMIZERS[name]), params(dtype), jnp.dtype(dtype), find(target))
    assert found["kernels_per_leaf"] == 1
    assert found["temporary_bytes"] < 64 * 1024
    assert found["in_place"] == 1
    scalars = 1e-4 * found["floor"]
    assert found["moved"] == pytest.approx(found["floor"], abs=scalars)
    # The hardware pads small leaves.
    assert found["argument_bytes"] == pytest.approx(found["computed_bytes"], rel=0.01)


def test_kernels_in_a_loop_count_as_often_as_it_turns():
    def function(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=7)[0]

    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    once = kernels(jax.jit(lambda x: jnp.tanh(x @ x)).lower(matrix).compile().as_text())
    found = kernels(jax.jit(function).lower(matrix).compile().as_text())
    assert once.number > 0
    assert found.number >= 7 * once.number
