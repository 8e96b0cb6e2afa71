# /// script
# requires-python = ">=3.11"
# dependencies = ["blackjax~=1.7.1", "optax"]
# ///
"""BlackJAX: variational inference samples from the params of its state, to which x is lent."""

import blackjax
import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from gpa_optax import anytime_adamw, check_step, eval_params

MEAN, DEVIATION = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5, 1.0, 2.0])


def log_density(position):
    return jnp.sum(norm.logpdf(position["a"], MEAN, DEVIATION))


optimizer = anytime_adamw(0.05, warmup_steps=10, weight_decay=0.0)
vi = blackjax.meanfield_vi(log_density, optimizer, num_samples=20, stl_estimator=False)
step = jax.jit(vi.step)
state = vi.init({"a": jnp.zeros(3)})
for t in range(400):
    before = state
    state, _ = step(jax.random.key(t), state)
    if t % 100 == 99:
        check_step((before.opt_state, (before.mu, before.rho)),
                   (state.opt_state, (state.mu, state.rho)))  # fmt: skip

# The params are the pair (mu, rho). The state to sample from is no state to resume training from.
mu, rho = eval_params(state.opt_state, (state.mu, state.rho))
samples = vi.sample(jax.random.key(0), state._replace(mu=mu, rho=rho), 20_000)["a"]
assert jnp.allclose(samples.mean(0), mu["a"], atol=0.05), (samples.mean(0), mu)
assert jnp.allclose(samples.std(0), jnp.exp(rho["a"]), rtol=0.05), (samples.std(0), rho)
assert not jnp.allclose(mu["a"], state.mu["a"], atol=1e-3), "x and y should differ"
assert jnp.allclose(mu["a"], MEAN, atol=0.2), mu
assert jnp.allclose(jnp.exp(rho["a"]), DEVIATION, rtol=0.1), rho
print(f"means {MEAN}, of samples at x {samples.mean(0)}, at y {state.mu['a']}")
