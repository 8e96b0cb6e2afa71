"""FSDP: params and optimizer state split over eight devices, and x lies with its param."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gpa_optax import annealed_adamw, eval_params

jax.config.update("jax_num_cpu_devices", 8)  # stands in for eight accelerators
mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))


def sharding_of(leaf):
    """Splits the first axis that the devices divide; scalars and small leaves are on each."""
    axes = [axis for axis, size in enumerate(leaf.shape) if size % mesh.size == 0]
    spec = [None] * axes[0] + ["fsdp"] if axes else []
    return NamedSharding(mesh, PartitionSpec(*spec))


def initial_params(key):
    first, last = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (16, 256)) / 4,
        "last": jax.random.normal(last, (256, 4)) / 16,
        "bias": jnp.zeros(4),
    }


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean(
        (jnp.tanh(inputs @ params["first"]) @ params["last"] + params["bias"] - targets) ** 2
    )


steps = 50
optimizer = annealed_adamw(2e-2, steps, warmup_steps=steps // 5)

# Made where they belong: no device ever holds all of it. The state's leaves have the shapes of
# their params, and so the same rule places x and the moments.
params_shardings = jax.tree.map(sharding_of, jax.eval_shape(initial_params, jax.random.key(0)))
params = jax.jit(initial_params, out_shardings=params_shardings)(jax.random.key(0))
state_shardings = jax.tree.map(sharding_of, jax.eval_shape(optimizer.init, params))
opt_state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)


@functools.partial(
    jax.jit, donate_argnums=(0, 1), out_shardings=(params_shardings, state_shardings, None)
)
def train_step(params, opt_state, batch):
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


inputs = jax.random.normal(jax.random.key(1), (512, 16))
batch = jax.device_put((inputs, jnp.sin(inputs[:, :4])), NamedSharding(mesh, PartitionSpec("fsdp")))
losses = []
for _ in range(steps):
    params, opt_state, value = train_step(params, opt_state, batch)
    losses.append(float(value))  # waits for the step: a CPU must not run several at once

x = eval_params(opt_state, params)
loss_at_x = jax.jit(loss)(x, batch)
print(f"loss: {losses[0]:.3f} at the start, {loss_at_x:.3f} at x")
assert loss_at_x < 0.5 * losses[0]
assert len(jax.devices()) == 8
for leaf, param in zip(jax.tree.leaves(x), jax.tree.leaves(params), strict=True):
    assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim)
assert x["first"].addressable_shards[0].data.shape == (2, 256)
