# /// script
# requires-python = ">=3.11"
# dependencies = ["keras~=3.15.1", "jax", "optax"]
# ///
"""Keras on JAX: an optimizer that holds an optax one, and a callback that evaluates at x.

Give the adapter neither `weight_decay` nor `use_ema`: both act on the params, outside of GPA.
"""

import itertools
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gpa_optax import anytime_adamw, check_step, eval_params


class Optax(keras.optimizers.Optimizer):
    """Any optax transformation; its learning rate is its own."""

    def __init__(self, transformation, **kwargs):
        super().__init__(learning_rate=0.0, **kwargs)
        self.transformation = transformation

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        state = self.transformation.init([v.value for v in variables])
        leaves, self.form = jax.tree.flatten(state)
        self.leaves = [
            self.add_variable(a.shape, lambda *_, a=a, **__: jnp.copy(a), a.dtype) for a in leaves
        ]

    def _backend_update_step(self, grads, variables, learning_rate):
        params = [v.value for v in variables]
        updates, state = self.transformation.update(grads, self.opt_state, params)
        for variable, update in zip(variables, updates, strict=True):
            variable.assign_add(update)
        for variable, leaf in zip(self.leaves, jax.tree.leaves(state), strict=True):
            variable.assign(leaf)

    @property
    def opt_state(self):
        return jax.tree.unflatten(self.form, [v.value for v in self.leaves])


class EvaluateAtX(keras.callbacks.Callback):
    """Lends x to the model while it is evaluated: a copy, because the evaluation donates."""

    def on_test_begin(self, logs=None):
        variables = self.model.trainable_variables
        self.y = [v.value for v in variables]
        for v, x in zip(
            variables, eval_params(self.model.optimizer.opt_state, self.y), strict=True
        ):
            v.assign(jnp.copy(x))

    def on_test_end(self, logs=None):
        for v, y in zip(self.model.trainable_variables, self.y, strict=True):
            v.assign(y)


def copied(model):
    params = [v.value for v in model.trainable_variables]
    return jax.tree.map(jnp.copy, (model.optimizer.opt_state, params))


class Watch(keras.callbacks.Callback):
    """Keeps the states and params of all steps."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.model.jax_state_sync()
        self.seen.append(copied(self.model))


keras.utils.set_random_seed(0)
inputs = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
targets = np.sin(inputs.sum(1, keepdims=True))
model = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)])
model.compile(Optax(anytime_adamw(0.02, warmup_steps=10), global_clipnorm=1.0), "mse")
watch = Watch()
history = model.fit(
    inputs, targets, batch_size=64, epochs=50, verbose=0,
    validation_data=(inputs, targets), callbacks=[EvaluateAtX(), watch],
).history  # fmt: skip

for before, after in itertools.pairwise(watch.seen[10:21]):
    check_step(before, after)


def loss(params):
    outputs, _ = model.stateless_call(
        params, [v.value for v in model.non_trainable_variables], inputs
    )
    return float(np.mean((np.asarray(outputs) - targets) ** 2))


# The last evaluation was at x, and y is back in the model.
opt_state, y = watch.seen[-1]
at_x, at_y = loss(eval_params(opt_state, y)), loss(y)
assert np.isclose(history["val_loss"][-1], at_x, rtol=1e-4), (history["val_loss"][-1], at_x)
assert not np.isclose(at_x, at_y, rtol=1e-3), "x and y should differ"
assert all(map(jnp.array_equal, copied(model)[1], y))
assert at_x < 0.1 * np.mean(targets**2), at_x

# For export, when training is over: x stays in the model.
for variable, x in zip(model.trainable_variables, eval_params(opt_state, y), strict=True):
    variable.assign(x)
assert np.isclose(model.evaluate(inputs, targets, verbose=0), at_x, rtol=1e-4)
print(f"val_loss of fit {history['val_loss'][-1]:.5f}, loss at x {at_x:.5f}, at y {at_y:.5f}")
