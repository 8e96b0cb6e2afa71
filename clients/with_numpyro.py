# /// script
# requires-python = ">=3.11"
# dependencies = ["numpyro~=0.22.0"]
# ///
"""NumPyro: `SVI` keeps the params unconstrained, and so is x; `svi.constrain_fn` maps it."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro

from gpa_optax import anytime_adamw, check_step, eval_params

data = 3.0 + 0.5 * jax.random.normal(jax.random.key(0), (100,))


def model(data):
    mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
    numpyro.sample("data", dist.Normal(mean, 0.5), obs=data)


def guide(data):
    center = numpyro.param("center", 0.0)
    width = numpyro.param("width", 1.0, constraint=dist.constraints.positive)
    numpyro.sample("mean", dist.Normal(center, width))


optimizer = anytime_adamw(0.05, warmup_steps=20, weight_decay=0.0)
svi = SVI(model, guide, optax_to_numpyro(optimizer), Trace_ELBO(num_particles=10))


def params_and_state(svi_state):
    _, (params, opt_state) = svi_state.optim_state
    return opt_state, params


# `run` gives y, mapped. x comes out of the state that it gives, too.
result = svi.run(jax.random.key(1), 500, data, progress_bar=False)
opt_state, params = params_and_state(result.state)
x = svi.constrain_fn(eval_params(opt_state, params))

after, _ = jax.jit(svi.update)(result.state, data)
check_step((opt_state, params), params_and_state(after))

# The posterior is known here.
precision = 1 / 10.0**2 + len(data) / 0.5**2
center, width = jnp.sum(data) / 0.5**2 / precision, precision**-0.5
unconstrained = eval_params(opt_state, params)
assert jnp.allclose(x["width"], jnp.exp(unconstrained["width"])) and unconstrained["width"] < 0
assert not jnp.allclose(x["width"], result.params["width"], rtol=1e-3), "x and y should differ"
assert jnp.allclose(x["center"], center, atol=0.01), (x["center"], center)
assert jnp.allclose(x["width"], width, rtol=0.1), (x["width"], width)
print(f"width of the posterior {width:.4f}, x {x['width']:.4f}, y {result.params['width']:.4f}")
print(f"x before `constrain_fn`: {unconstrained['width']:.4f}")
