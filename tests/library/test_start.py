"""The first update decides where an optimizer starts: weights may be loaded after `init`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from gpa_optax import eval_params, gpa, gpa_adamw, iterates, single_worker_diloco
from helpers.loops import assert_same, double
from helpers.wrapped import AROUND, gradient, in_every_wrapper, make

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
OPTIMIZERS = {
    "z": gpa_adamw(0.1, weight_decay=0.1),
    "y": gpa_adamw(0.1, weight_decay=0.1, base_params="y"),
    "narrow x": gpa_adamw(0.1, state_dtype=jnp.bfloat16),
    "diloco": single_worker_diloco(optax.adamw(0.1), 2),
}


def trained(optimizer, opt_state, params, steps=5):
    """Params, state and what is evaluated, after some steps from a state that was made before."""
    update = jax.jit(optimizer.update)
    for t in range(steps):
        updates, opt_state = update(gradient(t, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state, eval_params(opt_state, params)


def initialized_and_loaded(dtype=jnp.float32):
    loaded = {"a": jnp.full((3, 2), 5, dtype), "b": {"c": jnp.arange(1, 5).astype(dtype)}}
    return jax.tree.map(jnp.zeros_like, loaded), loaded


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_first_step_is_adamws(dtype):
    optimizer = gpa_adamw(1e-4, weight_decay=0.0)
    opt_state = optimizer.init({"w": jnp.zeros(3, dtype)})
    found, opt_state, x = trained(optimizer, opt_state, {"w": jnp.full(3, 5, dtype)}, 1)
    expected = np.full(3, 5 - 1e-4)
    for params in (found, x):
        np.testing.assert_array_equal(params["w"], expected.astype(np.float32).astype(dtype))
    for sequence in iterates(opt_state, found):
        np.testing.assert_allclose(sequence["w"], expected, rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_made_before_the_weights_were_loaded_is_as_good_as_one_made_after(name, dtype):
    optimizer, (initial, loaded) = OPTIMIZERS[name], initialized_and_loaded(dtype)
    found = trained(optimizer, optimizer.init(initial), loaded)
    assert_same(found, trained(optimizer, optimizer.init(loaded), loaded))


@in_every_wrapper
def test_so_it_is_in_every_wrapper(name):
    optimizer, (initial, loaded) = AROUND[name](make()), initialized_and_loaded()
    found = trained(optimizer, optimizer.init(initial), loaded)
    assert_same(found, trained(optimizer, optimizer.init(loaded), loaded))


def test_multisteps_starts_at_the_params_of_its_first_update():
    optimizer, (initial, loaded) = optax.MultiSteps(make(), 3), initialized_and_loaded()
    optimizer = optimizer.gradient_transformation()
    _, opt_state, _ = trained(optimizer, optimizer.init(initial), initial, 2)  # no update yet
    params, opt_state, x = trained(optimizer, opt_state, loaded, 1)

    def is_a_tenth_of_the_way(x, z, start):  # mu_x is 0.9
        assert (np.abs(z - start) > 0.05).all()
        np.testing.assert_allclose(x - start, 0.1 * (z - start), atol=1e-6)

    jax.tree.map(is_a_tenth_of_the_way, x, iterates(opt_state, params).z, loaded)


@pytest.mark.parametrize("name", ["z", "diloco"])
def test_before_the_first_update_the_params_are_evaluated(name):
    optimizer, (initial, loaded) = OPTIMIZERS[name], initialized_and_loaded(jnp.bfloat16)
    opt_state = optax.chain(optax.clip(1.0), optimizer).init(initial)
    assert_same(eval_params(opt_state, loaded), loaded)
    assert_same(jax.jit(eval_params)(opt_state, loaded), loaded)
    if name == "z":
        for sequence in iterates(opt_state, loaded):
            assert_same(sequence, jax.tree.map(jnp.float32, loaded))


def test_an_ensemble_starts_at_the_params_of_its_first_update():
    optimizer, (initial, loaded) = make(), initialized_and_loaded()
    stack = lambda tree: jax.tree.map(lambda p: jnp.stack([p, p + 1]), tree)  # noqa: E731
    opt_state, params = jax.vmap(optimizer.init)(stack(initial)), stack(loaded)
    assert_same(eval_params(opt_state, params), params)
    updates, opt_state = jax.vmap(optimizer.update)(gradient(0, params), opt_state, params)
    params = optax.apply_updates(params, updates)
    one = jax.tree.map(lambda p: p[1], stack(loaded))
    expected = trained(optimizer, optimizer.init(one), one, 1)[0]
    jax.tree.map(
        lambda found, right: np.testing.assert_allclose(found[1], right, rtol=1e-6),
        params,
        expected,
    )


def test_in_nnx_weights_may_be_loaded_after_the_optimizer_was_made():
    def losses(load_first):
        model, checkpoint = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        steps = [
            lambda: nnx.Optimizer(model, gpa_adamw(0.01), wrt=nnx.Param),
            lambda: nnx.update(model, nnx.state(checkpoint)),
        ]
        made = [step() for step in (steps[::-1] if load_first else steps)]
        optimizer = made[1] if load_first else made[0]
        x = eval_params(optimizer, nnx.state(model, nnx.Param))
        assert_same(jax.tree.leaves(x), jax.tree.leaves(nnx.state(model, nnx.Param)))
        for _ in range(3):
            grads = nnx.grad(lambda m: jnp.mean((m(jnp.ones((4, 3))) - 1) ** 2))(model)
            optimizer.update(model, grads)
        return jax.tree.leaves(eval_params(optimizer, nnx.state(model, nnx.Param)))

    assert_same(losses(load_first=False), losses(load_first=True))


def test_in_linen_weights_may_be_loaded_after_the_train_state_was_made():
    model = nn.Dense(2)
    initial, loaded = (model.init(jax.random.key(i), jnp.ones((1, 3))) for i in range(2))

    def x(state):
        for t in range(3):
            state = state.apply_gradients(grads=gradient(t, state.params))
        return eval_params(state, state.params)

    made = TrainState.create(apply_fn=model.apply, params=initial, tx=make())
    fresh = TrainState.create(apply_fn=model.apply, params=loaded, tx=make())
    assert_same(x(made.replace(params=loaded)), x(fresh))


def diloco(base):
    return single_worker_diloco(base, 4)


@pytest.mark.parametrize(
    ("make", "init_dtype", "dtype"),
    [
        (gpa, jnp.float32, jnp.bfloat16),
        (gpa, jnp.bfloat16, jnp.float32),
        *((make, jnp.float32, wide) for make in (gpa, diloco) for wide in ("float64", "complex64")),
    ],
)
def test_params_that_were_cast_after_init_are_refused_while_tracing(make, init_dtype, dtype):
    with double(dtype == "float64"):
        optimizer = make(optax.adamw(0.1))
        opt_state = optimizer.init({"w": jnp.ones(3, init_dtype)})
        params = {"w": jnp.ones(3, dtype)}
        with pytest.raises(TypeError, match=rf"params\['w'\] has dtype {np.dtype(dtype)}, and "):
            jax.jit(optimizer.update)(params, opt_state, params)
