"""Training loops of a few lines, and how their params and states are compared."""

import chex
import jax
import optax


def double(on):
    """With float64, or without."""
    return jax.enable_x64(on) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(on)


def run(optimizer, params, gradient, steps):
    """`steps` jitted steps with gradient(t, params); returns the params and the state."""
    opt_state = optimizer.init(params)

    @jax.jit
    def step(t, params, opt_state):
        updates, opt_state = optimizer.update(gradient(t, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(steps):
        params, opt_state = step(t, params, opt_state)
    return params, opt_state


def assert_close(found, expected, tolerance=2e-5):
    """Trees of one structure, whose values differ by no more than the tolerance."""
    chex.assert_trees_all_close(found, expected, atol=tolerance, rtol=tolerance)


def assert_same(found, expected):
    """Trees of one structure with the same dtypes and values."""
    chex.assert_trees_all_equal_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)
