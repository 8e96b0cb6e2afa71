"""Checkpoints with Orbax: params and opt_state are everything, and a run resumes bit for bit."""

import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from gpa_optax import annealed_adamw, eval_params

optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), annealed_adamw(2e-2, steps=50, warmup_steps=10)
)


def initial_state():
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
    return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}


@jax.jit
def train_step(state):
    params = state["params"]
    batch = jax.random.normal(jax.random.fold_in(jax.random.key(0), state["step"]), (32, 4))
    grads = jax.grad(lambda p: jnp.mean((batch @ p["kernel"] + p["bias"]) ** 2))(params)
    updates, opt_state = optimizer.update(grads, state["opt_state"], params)
    params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}


def open_checkpoints(folder):
    options = ocp.CheckpointManagerOptions(save_interval_steps=20, max_to_keep=2)
    return ocp.CheckpointManager(folder, options=options)


with tempfile.TemporaryDirectory() as folder:
    state = initial_state()
    with open_checkpoints(folder) as checkpoints:
        for step in range(1, 41):
            state = train_step(state)
            checkpoints.save(step, args=ocp.args.StandardSave(state))  # if it is time to
        checkpoints.wait_until_finished()  # they are written in the background
    saved_x = eval_params(state["opt_state"], state["params"])

    # Another process: the form of the state comes from the same code that made the first one.
    # Without it Orbax gives dicts, from which no optimizer can resume.
    with open_checkpoints(folder) as checkpoints:
        abstract = jax.eval_shape(initial_state)
        # Where the arrays shall lie; with a mesh, their NamedShardings.
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract
        )
        step = checkpoints.latest_step()
        restored = checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))

x = eval_params(restored["opt_state"], restored["params"])
assert step == 40
assert all(map(jnp.array_equal, jax.tree.leaves(x), jax.tree.leaves(saved_x)))
for _ in range(10):
    state, restored = train_step(state), train_step(restored)
assert all(map(jnp.array_equal, jax.tree.leaves(restored), jax.tree.leaves(state)))
print(f"restored step {step}; 10 steps later both runs are the same, bit for bit")
