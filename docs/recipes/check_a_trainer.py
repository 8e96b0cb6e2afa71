"""Is GPA used rightly in a trainer that somebody else wrote, and how does x come out of it?"""

import itertools

import jax
import jax.numpy as jnp
import optax

from gpa_optax import anytime_adamw, check_step, end_at_x, eval_params

data = jax.random.normal(jax.random.key(0), (64, 4))
targets = data @ jnp.array([1.0, -2.0, 0.5, 0.0]) + 1.0
params = {"kernel": jnp.zeros(4), "bias": jnp.zeros(())}


def loss(params):
    return jnp.mean((data @ params["kernel"] + params["bias"] - targets) ** 2)


def fit(optimizer, params, steps, after_step=lambda opt_state, params: None):
    """A trainer: it returns the params, and lets somebody look on."""
    opt_state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, opt_state = update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        after_step(opt_state, params)
    return params


def check(optimizer):
    # 1. Keep copies of the state and the params after some steps; a trainer may donate its own.
    seen = []
    fit(optimizer, params, 8, lambda *now: seen.append(jax.tree.map(jnp.copy, now)))
    # 2. Compare two in a row, past the warmup, where the learning rate is not 0.
    for before, after in itertools.pairwise(seen[3:]):
        check_step(before, after)


optimizer = anytime_adamw(0.05, warmup_steps=2)
check(optimizer)
# 3. See it fail once: here the trainer scales the updates after GPA.
try:
    check(optax.chain(optimizer, optax.scale(0.5)))
except ValueError as error:
    message = str(error)
assert "Let gpa be the last transformation" in message

# `fit` returns the params alone, which are y. This lands them on x with the last update.
steps = 200
x = fit(end_at_x(optimizer, steps), params, steps)

kept = []
fit(optimizer, params, steps, lambda *now: kept.append(now))
expected = eval_params(*kept[-1])
assert jnp.allclose(x["kernel"], expected["kernel"], atol=1e-6)
assert not jnp.allclose(kept[-1][1]["kernel"], expected["kernel"], atol=1e-6)
assert loss(x) < 1e-2
