# /// script
# requires-python = ">=3.11"
# dependencies = ["flowjax~=19.1.2", "optax"]
# ///
"""flowjax: `fit_to_data` returns the distribution alone; `end_at_x` makes it that of x."""

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from flowjax.distributions import Normal
from flowjax.train import fit_to_data
from watch import check_steps, watched

from gpa_optax import anytime_adamw, end_at_x, eval_params

data = jnp.array([1.0, -2.0]) + 0.5 * jax.random.normal(jax.random.key(0), (500, 2))
start = Normal(jnp.zeros(2), jnp.ones(2))
optimizer = anytime_adamw(0.1, warmup_steps=10, weight_decay=0.0)
epochs, batches = 60, 4  # of 100 rows in 90 % of the data
steps = epochs * batches


def fit(optimizer, epochs):
    # All updates have to be made, and the last params returned: not those of the best epoch, and
    # without an early end.
    return fit_to_data(
        jax.random.key(1), start, data, optimizer=optimizer, max_epochs=epochs,
        max_patience=epochs, batch_size=100, return_best=False, show_progress=False,
    )  # fmt: skip


found, losses = fit(end_at_x(optimizer, steps), epochs)

# The same run, one epoch longer: its next update is given what these steps ended with.
seen = []
fit(watched(optimizer, seen), epochs + 1)
check_steps(seen, start=10)
opt_state, y = seen[steps]
x = eval_params(opt_state, y)
found_params = eqx.filter(
    found, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
)
for ours, theirs, at_y in zip(*map(jax.tree.leaves, (found_params, x, y)), strict=True):
    assert jnp.allclose(ours, theirs, atol=1e-6), (ours, theirs)
    assert not jnp.allclose(ours, at_y, atol=1e-4), "x and y should differ"

mean, scale = found.loc, found.scale
assert jnp.allclose(mean, data.mean(0), atol=0.05), mean
assert jnp.allclose(scale, data.std(0), atol=0.05), scale
assert losses["val"][-1] < losses["val"][0]
print(f"mean {mean}, standard deviation {scale}; of the data {data.mean(0)}, {data.std(0)}")
