# /// script
# requires-python = ">=3.11"
# dependencies = ["diffrax~=0.7.2", "equinox~=0.13.8", "optax"]
# ///
"""Equinox with Diffrax: a neural ODE in a loop that donates its model and the optimizer's state."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from gpa_optax import anytime_adamw, check_step, eval_params


class Field(eqx.Module):
    """The right side of an ODE."""

    mlp: eqx.nn.MLP

    def __call__(self, t, state, args):
        return self.mlp(state)


TIMES = jnp.linspace(0.0, 2.0, 9)


def solve(field, start):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 2.0, 0.1, start,
        saveat=diffrax.SaveAt(ts=TIMES), stepsize_controller=diffrax.ConstantStepSize(),
    ).ys  # fmt: skip


def rotation(t, state, args):
    return jnp.array([-state[1], state[0]])


starts = jax.random.normal(jax.random.key(0), (16, 2))
targets = jax.vmap(lambda start: solve(rotation, start))(starts)


def loss(field):
    return jnp.mean((jax.vmap(lambda start: solve(field, start))(starts) - targets) ** 2)


optimizer = anytime_adamw(0.02, warmup_steps=10)


@eqx.filter_jit(donate="all")
def step(field, opt_state):
    value, grads = eqx.filter_value_and_grad(loss)(field)
    params = eqx.filter(field, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return eqx.apply_updates(field, updates), opt_state, value


field = Field(eqx.nn.MLP(2, 2, 16, 1, activation=jnp.tanh, key=jax.random.key(1)))
opt_state = optimizer.init(eqx.filter(field, eqx.is_inexact_array))
first = float(loss(field))


def averaged(field, opt_state):
    """The model at x; its arrays are the state's, which the next step donates."""
    params, static = eqx.partition(field, eqx.is_inexact_array)
    return eqx.combine(eval_params(opt_state, params), static)


def copied(field, opt_state):
    return jax.tree.map(jnp.copy, (opt_state, eqx.filter(field, eqx.is_inexact_array)))


for t in range(150):
    before = copied(field, opt_state)
    field, opt_state, _ = step(field, opt_state)
    if t % 30 == 29:
        check_step(before, copied(field, opt_state))

at_x, at_y = float(eqx.filter_jit(loss)(averaged(field, opt_state))), float(loss(field))
assert abs(at_x - at_y) > 1e-2 * at_x, "x and y should differ"
assert at_x < 0.05 * first, (at_x, first)

# What a model at x is trained on with, without a copy: the donated arrays are the state's.
try:
    step(averaged(field, opt_state), opt_state)
except (ValueError, jax.errors.JaxRuntimeError) as error:
    message = str(error)
assert "donate" in message, message
print(f"loss at the start {first:.4f}, at x {at_x:.5f}, at y {at_y:.5f}")
