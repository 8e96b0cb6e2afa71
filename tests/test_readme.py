"""The README's code runs as it stands, and what it says of the package is so."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gpa_optax

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_blocks_run_in_order():
    pytest.importorskip("flax")
    from flax import linen, nnx

    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"] + params["bias"] - 1.0) ** 2)

    batches = [jax.random.normal(jax.random.key(i), (4, 3)) for i in range(5)]
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    names = {
        "params": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)},
        "loss": loss,
        "grad": jax.grad(loss),
        "batches": batches,
        "validation_batch": batches[0],
        "steps": 1000,
        "adamw_learning_rate": 4e-3,
        "model": model,
        "model_loss": lambda model: jnp.mean(model(batches[0]) ** 2),
        "linen_model": linen.Dense(2),
    }
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert jnp.isfinite(names["validation_loss"])
    # After 200 steps of warmup, which weigh as a third of so many, and 301 more.
    assert float(names["mu_x"](500)) == pytest.approx(1 - 1 / (200 / 3 + 301), abs=1e-4)
    assert set(names["x"]) == {"kernel", "bias"}
    assert not jnp.allclose(names["eval_model"].kernel, model.kernel)


def test_every_public_name_is_documented_and_mentioned():
    for name in gpa_optax.__all__:
        assert getattr(gpa_optax, name).__doc__, name
    for name in ("gpa", "eval_params", "iterates", "gpa_sgd", "gpa_lion", "gpa_muon", "averaging"):
        assert f"`{name}" in README or f" {name}" in README, name
    for name in gpa_optax.averaging.__all__:
        assert getattr(gpa_optax.averaging, name).__doc__, name
