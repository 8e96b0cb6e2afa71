"""The optimizers and the problems of what Optax asks of a contributed optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gpa_optax
from gpa_optax import gpa, gpa_adamw, gpa_lion, gpa_muon, gpa_sgd
from helpers.needs import NEEDS_MUON, marked

FALLING = optax.exponential_decay(0.05, 2000, 0.7)  # signs and orthogonal steps do not shrink

# The bases that Optax' tests put into its wrappers, with rates of which GPA makes good use.
BASES = {
    "sgd": optax.sgd(2e-3),
    "sgd with momentum": optax.sgd(2e-3, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "adamax": optax.adamax(1e-2),
    "adamaxw": optax.adamaxw(1e-2),
    "adan": optax.adan(1e-2),
    "amsgrad": optax.amsgrad(1e-2),
    "lamb": optax.lamb(1e-2),
    "lion": optax.lion(FALLING),
    "noisy_sgd": optax.noisy_sgd(2e-3, eta=1e-4, key=0),
    "novograd": optax.novograd(1e-2),
    "optimistic gradient descent": optax.optimistic_gradient_descent(1e-3, alpha=0.7, beta=0.1),
    "rmsprop": optax.rmsprop(FALLING),
    "rmsprop with momentum": optax.rmsprop(FALLING, momentum=0.9),
    "adabelief": optax.adabelief(1e-2),
    "radam": optax.radam(1e-2),
    "sm3": optax.sm3(1e-1),
    "yogi": optax.yogi(1e-2),
}
OPTIMIZERS = {
    "gpa_adamw": (gpa_adamw, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "gpa_adamw, b1=0": (gpa_adamw, {"learning_rate": 1e-2, "b1": 0.0, "weight_decay": 0.0}),
    "gpa_sgd": (gpa_sgd, {"learning_rate": 2e-3}),
    "gpa_lion": (gpa_lion, {"learning_rate": FALLING, "weight_decay": 0.0}),
    "gpa_muon": (gpa_muon, {"learning_rate": FALLING}),
    "gpa around rmsprop": (gpa, {"base_optimizer": BASES["rmsprop"]}),
    "gpa around adabelief": (gpa, {"base_optimizer": BASES["adabelief"]}),
    "single_worker_diloco": (
        gpa_optax.single_worker_diloco,
        {"inner_optimizer": optax.adam(1e-2), "sync_period": 32},
    ),
}
ALL = OPTIMIZERS | {
    f"gpa around {name}": (gpa, {"base_optimizer": base}) for name, base in BASES.items()
}
each = pytest.mark.parametrize("name", marked(NEEDS_MUON, OPTIMIZERS, "gpa_muon"))
alone_and_around_every_base = pytest.mark.parametrize("name", marked(NEEDS_MUON, ALL, "gpa_muon"))


def make(name, **changes):
    factory, arguments = ALL[name]
    return factory(**arguments | changes)


def parabola(dtype):
    """A bowl, from a start that is right in one of its three coordinates."""
    goal = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), goal, lambda w: jnp.sum((w - goal) ** 2)


def rosenbrock(dtype):
    """A narrow curved valley, whose floor falls slowly towards (1, 1)."""
    return (
        jnp.zeros(2, dtype),
        jnp.ones(2, dtype),
        lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
    )


def matrix_and_vector(dtype):
    """Two bowls, one of which Muon takes for a matrix."""
    goal = {
        "matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype),
        "vector": jnp.array([1.0, -1.0, 2.0], dtype),
    }

    def loss(w):
        return sum(jnp.sum((w[name] - goal[name]) ** 2) for name in goal)

    return jax.tree.map(jnp.zeros_like, goal), goal, loss
