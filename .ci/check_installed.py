"""Run in an environment that holds nothing but the built package and what it declares."""

import importlib.metadata
import importlib.util
import sys

import jax
import jax.numpy as jnp
import optax

import gpa_optax

assert "site-packages" in gpa_optax.__file__, f"not the installed package: {gpa_optax.__file__}"
for name in ("flax", "torch", "matplotlib", "pytest"):
    assert importlib.util.find_spec(name) is None, f"{name} is there: the environment is not empty"
assert importlib.metadata.version("gpa-optax") == gpa_optax.__version__
assert importlib.util.find_spec("examples") is None, "the wheel holds more than the package"
files = [str(file) for file in importlib.metadata.files("gpa-optax")]
assert "gpa_optax/py.typed" in files
assert all(file.startswith(("gpa_optax/", "gpa_optax-")) for file in files), files

optimizer = optax.chain(optax.clip_by_global_norm(1.0), gpa_optax.gpa(optax.adamw(0.1), mu_x=0.9))
params = {"w": jnp.ones(3)}
opt_state = optimizer.init(params)
for _ in range(100):
    updates, opt_state = jax.jit(optimizer.update)(params, opt_state, params)
    params = optax.apply_updates(params, updates)
assert float(jnp.abs(gpa_optax.eval_params(opt_state, params)["w"]).max()) < 0.5
for alias in (gpa_optax.gpa_adamw, gpa_optax.gpa_sgd, gpa_optax.gpa_lion, gpa_optax.gpa_muon):
    alias(0.1).init(params)
gpa_optax.single_worker_diloco(optax.sgd(0.1), 4).init(params)
print(
    f"gpa-optax {gpa_optax.__version__} works in Python {sys.version.split()[0]} with "
    f"jax {jax.__version__}, optax {optax.__version__}"
)
