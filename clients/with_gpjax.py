# /// script
# requires-python = ">=3.11"
# dependencies = ["gpjax~=1.0.0", "optax"]
# ///
"""GPJax: `fit` returns the model alone; `end_at_x` makes it that of x."""

import equinox as eqx
import gpjax as gpx
import jax
import jax.numpy as jnp
from watch import check_steps, watched

from gpa_optax import anytime_adamw, end_at_x, eval_params

jax.config.update("jax_enable_x64", True)  # GPJax' models are in float64

inputs = jnp.linspace(0.0, 6.0, 60)[:, None]
targets = jnp.sin(inputs) + 0.1 * jax.random.normal(jax.random.key(0), inputs.shape)
data = gpx.Dataset(X=inputs, y=targets)
prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=gpx.kernels.RBF())
start = prior * gpx.likelihoods.Gaussian()
optimizer = anytime_adamw(0.05, warmup_steps=10, weight_decay=0.0)
steps = 200


def objective(model, data):
    return -gpx.objectives.conjugate_mll(model, data)


def fit(optimizer, steps):
    return gpx.fit(
        model=start, objective=objective, train_data=data, optim=optimizer, num_iters=steps,
        verbose=False,
    )  # fmt: skip


found, history = fit(end_at_x(optimizer, steps), steps)

# The same run, one step longer: its last update is given what `steps` of them ended with.
seen = []
fit(watched(optimizer, seen), steps + 1)
check_steps(seen, start=10)
opt_state, y = seen[steps]
x = eval_params(opt_state, y)
for ours, theirs in zip(
    jax.tree.leaves(eqx.filter(found, eqx.is_array)), jax.tree.leaves(x), strict=True
):
    assert jnp.allclose(ours, theirs), (ours, theirs)
assert not all(
    jnp.allclose(ours, at_y, atol=1e-4)
    for ours, at_y in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
), "x and y should differ"

at_x = float(objective(found, data))
assert at_x < history[0] - 10, (at_x, history[0])
print(f"negative log likelihood at the start {history[0]:.3f}, at x {at_x:.3f}")
