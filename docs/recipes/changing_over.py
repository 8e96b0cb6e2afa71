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
adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1)
with_adamw = optax.chain(optax.clip_by_global_norm(1.0), adamw)
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
beside = optax.chain(optax.clip_by_global_norm(1.0), gpa(adamw, averaging.uniform(), mu_y=0.0))
same, _ = train(beside, params, into_gpa(beside, params, opt_state), range(300, 350))
plain, _ = train(with_adamw, params, opt_state, range(300, 350))
assert all(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.allclose(a, b, atol=1e-6), same, plain)))

# In: the average begins here, at the present params, and the learning rate continues. mu_y is the
# momentum, in place of b1, whose moment stands in the state all the same.
base = optax.adamw(schedule, b1=0.0, b2=0.95, weight_decay=0.1)
with_gpa = optax.chain(optax.clip_by_global_norm(1.0), gpa(base, averaging.uniform(), mu_y=0.9))
opt_state = into_gpa(with_gpa, params, opt_state)
params, opt_state = train(with_gpa, params, opt_state, range(300, 600))
x = eval_params(opt_state, params)
validation = make_batch(jax.random.key(2), 4096)
at_x, at_y = loss(x, validation), loss(params, validation)
print(f"validation loss: {at_x:.3f} at x, {at_y:.3f} at y")
assert at_x < at_y

# Out: AdamW continues from x (or, from the params, at y) with the second moment and step counts.
# With b1=0 the base kept the last gradient as its first moment: AdamW begins with none.
clip_state, gpa_state = opt_state
moments, *rest = gpa_state.base_state
moments = moments._replace(mu=jax.tree.map(jnp.zeros_like, moments.mu))
params, opt_state = train(with_adamw, x, (clip_state, (moments, *rest)), range(600, 610))
assert opt_state[1][0].count == 610
after = loss(params, validation)
print(f"validation loss after 10 steps of AdamW from x: {after:.3f}")
assert after < 1.1 * at_x
