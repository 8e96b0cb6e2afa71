"""Freezing: three ways in which a frozen leaf stays, also in x, and two in which it does not."""

import jax
import jax.numpy as jnp
import optax

from gpa_optax import averaging, eval_params, gpa

params = {
    "body": jax.random.normal(jax.random.key(0), (8, 16)) / 3,
    "head": jnp.zeros((16, 1)),
}
inputs = jax.random.normal(jax.random.key(1), (256, 8))
targets = jnp.sin(inputs[:, :1] + inputs[:, 1:2])


def loss(params):
    return jnp.mean((jnp.tanh(inputs @ params["body"]) @ params["head"] - targets) ** 2)


def train(optimizer, steps=200):
    """The params after some steps, and x."""

    @jax.jit
    def train_step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    y, opt_state = params, optimizer.init(params)
    for _ in range(steps):
        y, opt_state = train_step(y, opt_state)
    return y, eval_params(opt_state, y)


frozen = {"body": True, "head": False}
schedule = optax.warmup_constant_schedule(0.0, 2e-2, 40)
base = optax.adamw(schedule, b1=0.0, b2=0.95, weight_decay=0.1)
average = averaging.lr_weighted(schedule, 40)
averaged = gpa(base, average, mu_y=0.9)
ways = {
    # A frozen leaf has neither x nor moments.
    "partition": optax.partition(
        {"train": averaged, "freeze": optax.set_to_zero()}, {"body": "freeze", "head": "train"}
    ),
    # The same by a mask, which says what is frozen.
    "selective_transform": optax.selective_transform(averaged, freeze_mask=frozen),
    # At the end of the base, after its weight decay: the frozen leaf keeps its buffers.
    "in the base": gpa(optax.chain(base, optax.freeze(frozen)), average, mu_y=0.9),
}
start, ends = loss(params), []
for name, optimizer in ways.items():
    y, x = train(optimizer)
    assert jnp.array_equal(y["body"], params["body"])
    assert jnp.array_equal(x["body"], params["body"])
    ends.append(x["head"])
    print(f"{name}: loss {start:.3f} at the start, {loss(x):.3f} at x")
    assert loss(x) < 0.5 * start
assert all(jnp.allclose(end, ends[0], atol=1e-6) for end in ends)

# Not after GPA. The params stay, but GPA knows nothing of it, and x does not.
y, x = train(optax.chain(averaged, optax.freeze(frozen)))
assert jnp.array_equal(y["body"], params["body"])
print(f"freeze after gpa: x of the frozen leaf is off by {abs(x['body'] - y['body']).max():.3f}")
assert not jnp.allclose(x["body"], params["body"], atol=1e-3)

# Not by optax.masked: the gradients of the other leaves pass through it as they are.
masked = optax.masked(averaged, {"body": False, "head": True})
gradients = jax.grad(loss)(params | {"head": jnp.ones((16, 1))})
updates, _ = masked.update(gradients, masked.init(params), params)
assert jnp.array_equal(updates["body"], gradients["body"])
