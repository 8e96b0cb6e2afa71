# /// script
# requires-python = ">=3.11"
# dependencies = ["optimistix~=0.1.0", "optax"]
# ///
"""Optimistix: the solution of `OptaxMinimiser` is y; x comes out of its state."""

import jax.numpy as jnp
import optax
import optimistix as optx

from gpa_optax import check_step, end_at_x, eval_params, gpa_sgd

start = {"a": jnp.array(-1.5), "b": jnp.array([2.0, -1.0])}


def rosenbrock(params, scale):
    a, (b, c) = params["a"], params["b"]
    return (1 - a) ** 2 + scale * (b - a**2) ** 2 + (c - b) ** 2


def minimise(optimizer, steps):
    # A tolerance compares the updates and values of y. Reaching the number of steps is no error.
    solver = optx.OptaxMinimiser(optimizer, rtol=1e-9, atol=1e-9)
    return optx.minimise(rosenbrock, solver, start, args=5.0, max_steps=steps, throw=False)


# Optimistix gives every update `value_fn`, which GPA takes with base_params="y" alone: weight decay
# would be at y. Without decay that is all the same.
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), gpa_sgd(0.05, mu_x=0.9, mu_y=0.9, base_params="y")
)
steps = 300
solution = minimise(optimizer, steps)
opt_state, y = solution.state.opt_state, solution.value
x = eval_params(opt_state, y)

# A run of 10 updates and one of 11 are a step apart.
check_step(*((s.state.opt_state, s.value) for s in (minimise(optimizer, n) for n in (10, 11))))

ended = minimise(end_at_x(optimizer, steps), steps).value
for leaf in start:
    assert jnp.allclose(ended[leaf], x[leaf], atol=1e-6), (ended, x)
distance = max(float(jnp.max(jnp.abs(x[leaf] - y[leaf]))) for leaf in start)
assert distance > 1e-4, "x and y should differ"
at_x, at_y = float(rosenbrock(x, 5.0)), float(rosenbrock(y, 5.0))
assert at_x < 1e-2 * float(rosenbrock(start, 5.0)), at_x
print(f"value at the start {rosenbrock(start, 5.0):.3f}, at x {at_x:.2e}, at y {at_y:.2e}")
