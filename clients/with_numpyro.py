# /// script
# requires-python = ">=3.11"
# dependencies = ["numpyro~=0.22.0", "optax"]
# ///
"""NumPyro: `SVI` keeps the params unconstrained, and so is x; `svi.constrain_fn` maps it."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

from gpa_optax import anytime_adamw, check_step, end_at_x, eval_params

data = 3.0 + 0.5 * jax.random.normal(jax.random.key(0), (100,))


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    numpyro.sample("data", dist.Normal(mean, 0.5), obs=data)


def guide(data):
    center = numpyro.param("center", 0.0)
    width = numpyro.param("width", 1.0, constraint=dist.constraints.positive)
    numpyro.sample("mean", dist.Normal(center, width))


optimizer = anytime_adamw(0.05, warmup_steps=20, weight_decay=0.0)
key, steps, loss = jax.random.key(1), 500, Trace_ELBO(num_particles=10)

svi = SVI(model, guide, optax_to_numpyro(optimizer), loss)
result = svi.run(key, steps, data, progress_bar=False)  # result.params are y, constrained
_, (params, opt_state) = result.state.optim_state
x = svi.constrain_fn(eval_params(opt_state, params))

# Or `run` ends at x by itself.
ended = SVI(model, guide, optax_to_numpyro(end_at_x(optimizer, steps)), loss)
found = ended.run(key, steps, data, progress_bar=False).params
for name in x:
    assert jnp.allclose(found[name], x[name]), (found, x)

next_state, _ = jax.jit(svi.update)(result.state, data)
_, (next_params, next_opt_state) = next_state.optim_state
check_step((opt_state, params), (next_opt_state, next_params))

# The posterior is known here.
precision = 1 / 10.0**2 + len(data) / 0.5**2
center, width = jnp.sum(data) / 0.5**2 / precision, precision**-0.5
unconstrained = eval_params(opt_state, params)
assert jnp.allclose(x["width"], jnp.exp(unconstrained["width"]))
assert unconstrained["width"] < 0
assert not jnp.allclose(x["width"], result.params["width"], rtol=1e-3), "x and y should differ"
assert jnp.allclose(x["center"], center, atol=0.01), (x["center"], center)
assert jnp.allclose(x["width"], width, rtol=0.1), (x["width"], width)
print(
    f"width of the posterior {width:.4f}, x {x['width']:.4f}, y {result.params['width']:.4f}, "
    f"x before constrain_fn {unconstrained['width']:.4f}"
)
