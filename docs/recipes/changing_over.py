"""A run in progress: from AdamW to GPA and back, with the moments and the learning rate."""

import jax
import jax.numpy as jnp
import optax

from gpa_optax import averaging, eval_params, gpa

params = {
    "first": jax.random.normal(jax.random.key(0), (8, 32)) / 3,
    "last": jnp.zeros((32, 1)),
}


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((jnp.tanh(inputs @ params["first"]) @ params["last"] - targets) ** 2)


def make_batch(key, size=16):
    inputs = jax.random.normal(key, (size, 8))
    noise = jax.random.normal(key, (size, 1))
    return inputs, jnp.sin(inputs[:, :1] + inputs[:, 1:2]) + noise


def train(optimizer, params, opt_state, steps):
    @jax.jit
    def train_step(params, opt_state, batch):
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in steps:
        batch = make_batch(jax.random.fold_in(jax.random.key(1), step))
        params, opt_state = train_step(params, opt_state, batch)
    return params, opt_state


schedule = optax.warmup_constant_schedule(0.0, 1e-2, 100)
base = optax.adamw(schedule, weight_decay=0.1)
with_adamw = optax.chain(optax.clip_by_global_norm(1.0), base)
params, opt_state = train(with_adamw, params, with_adamw.init(params), range(300))


def into_gpa(optimizer, params, opt_state):
    """The state for `optimizer`, a chain of clipping and GPA, from that of clipping and AdamW."""
    _, adamw_state = opt_state
    clip_state, gpa_state = optimizer.init(params)
    # In the dtypes of GPA's base, which are wider than AdamW's where params are bfloat16.
    base_state = jax.tree.map(
        lambda new, old: old.astype(new.dtype), gpa_state.base_state, adamw_state
    )
    return clip_state, gpa_state._replace(base_state=base_state)


# At mu_y = 0 the params are AdamW's: the next steps show that nothing of it was lost.
beside = optax.chain(optax.clip_by_global_norm(1.0), gpa(base, averaging.uniform(), mu_y=0.0))
same, _ = train(beside, params, into_gpa(beside, params, opt_state), range(300, 350))
plain, _ = train(with_adamw, params, opt_state, range(300, 350))
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), same, plain)))

# In: the average begins here, at the present params, and the learning rate goes on.
with_gpa = optax.chain(optax.clip_by_global_norm(1.0), gpa(base, averaging.uniform(), mu_y=0.7))
opt_state = into_gpa(with_gpa, params, opt_state)
params, opt_state = train(with_gpa, params, opt_state, range(300, 600))
x = eval_params(opt_state, params)
validation = make_batch(jax.random.key(2), 4096)
at_x, at_y = loss(x, validation), loss(params, validation)
print(f"validation loss: {at_x:.3f} at x, {at_y:.3f} at y")
assert at_x < at_y

# Out: AdamW goes on from x (or, from the params, at y) with the base's moments and step counts.
clip_state, gpa_state = opt_state
opt_state = clip_state, gpa_state.base_state
params, opt_state = train(with_adamw, x, opt_state, range(600, 610))
assert opt_state[1][0].count == 610
print(f"validation loss after 10 steps of AdamW from x: {loss(params, validation):.3f}")
