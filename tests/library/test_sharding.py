"""On eight devices: x lies where its param lies, and the update moves nothing between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gpa_optax import eval_params, gpa, gpa_adamw

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

SPECS = {"w": PartitionSpec("data", "model"), "b": PartitionSpec("model"), "s": PartitionSpec()}


@pytest.fixture
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


@pytest.fixture
def params(rng):
    return {
        "w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(16,)), jnp.float32),
        "s": jnp.ones(()),
    }


def sharded(params, mesh):
    return {k: jax.device_put(p, NamedSharding(mesh, SPECS[k])) for k, p in params.items()}


def assert_sharded_like(tree, params):
    for leaf, p in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(p.sharding, p.ndim), (leaf.sharding, p.sharding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [True, False])
def test_x_is_sharded_like_its_param(jit, dtype, params, mesh):
    params = sharded(jax.tree.map(lambda p: p.astype(dtype), params), mesh)
    optimizer = gpa(optax.adamw(1e-2))
    opt_state = (jax.jit(optimizer.init) if jit else optimizer.init)(params)
    assert_sharded_like(opt_state.x, params)
    if dtype == jnp.bfloat16:
        assert_sharded_like(opt_state.y, params)
    updates, opt_state = jax.jit(optimizer.update)(params, opt_state, params)
    params = optax.apply_updates(params, updates)
    assert_sharded_like(opt_state.x, params)
    assert_sharded_like(eval_params(opt_state, params), params)


def test_the_compiled_update_has_no_collective(params, mesh):
    params = sharded(params, mesh)
    optimizer = gpa_adamw(1e-2)
    # Adam's moments start as zeros without a place; a training program puts them beside the params.
    opt_state = optimizer.init(params)
    placed = optax.tree.map_params(
        optimizer, lambda leaf, p: jax.device_put(leaf, p.sharding), opt_state, params
    )

    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step).lower(params, placed, params).compile().as_text()
    collective = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")
    assert not collective.search(compiled)
    # The search finds one where there is one.
    total = jax.jit(lambda params: sum(p.sum() for p in params.values()))
    assert collective.search(total.lower(params).compile().as_text())


def test_the_trajectory_on_eight_devices_is_that_of_one(params, mesh):
    # A large eps: Adam would blow up the rounding of gradients near 0, which sums in other orders.
    optimizer = gpa_adamw(1e-2, mu_x=0.9, eps=1e-2)

    def train(params):
        opt_state = optimizer.init(params)

        @jax.jit
        def step(params, opt_state):
            grads = jax.grad(lambda p: jnp.sum(jnp.tanh(p["w"] @ p["b"]) ** 2) * p["s"])(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        for _ in range(30):
            params, opt_state = step(params, opt_state)
        return params, eval_params(opt_state, params)

    for one, eight in zip(
        jax.tree.leaves(train(params)), jax.tree.leaves(train(sharded(params, mesh))), strict=True
    ):
        np.testing.assert_allclose(one, eight, atol=1e-5, rtol=1e-5)
