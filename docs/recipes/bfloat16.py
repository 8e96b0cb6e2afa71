"""bfloat16 params: GPA's state holds x and y in float32, and no small step is lost."""

import jax
import jax.numpy as jnp
import optax

from gpa_optax import eval_params, gpa, iterates


def train(optimizer, params, steps):
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state):
        # Forward and backward pass run in bfloat16, on the params as they are.
        grads = jax.grad(lambda w: jnp.sum((w - 3) ** 2) / 2)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = train_step(params, opt_state)
    return params, opt_state


start = jnp.ones(8, jnp.bfloat16)
base = optax.sgd(1e-3)  # steps of 0.002 at w = 1, where the next bfloat16 number is 1.0078

# Plain SGD rounds each of its steps away.
stuck, _ = train(base, start, 1000)
assert jnp.array_equal(stuck, start)

# The base optimizer of GPA runs at the float32 master copy.
params, opt_state = train(gpa(base, mu_x=0.9), start, 1000)
x = eval_params(opt_state, params)
exact = iterates(opt_state, params)
print(f"after 1,000 small steps from 1 towards 3: SGD {stuck[0]}, GPA {x[0]}")
assert params.dtype == x.dtype == jnp.bfloat16
assert exact.x.dtype == exact.y.dtype == exact.z.dtype == jnp.float32
assert jnp.abs(exact.x - (3 - 2 * 0.999**1000)).max() < 0.05  # where exact arithmetic takes SGD
assert jnp.array_equal(exact.y.astype(jnp.bfloat16), params)
