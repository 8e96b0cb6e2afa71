"""GPA inside and around every optax wrapper, and under every JAX transformation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import GPAState, eval_params, gpa, iterates, single_worker_diloco
from helpers.loops import assert_close, run
from helpers.wrapped import AROUND, BASES, LR, MU_X, MU_Y, gradient, in_every_wrapper, make


@in_every_wrapper
def test_a_wrapper_around_gpa_changes_nothing(name, params):
    expected, expected_state = run(make(), params, gradient, 20)
    found, opt_state = run(AROUND[name](make()), params, gradient, 20)
    assert_close(found, expected)
    assert_close(eval_params(opt_state, found), eval_params(expected_state, expected))
    assert_close(iterates(opt_state, found), iterates(expected_state, expected), 1e-4)


def test_gradients_are_accumulated_by_multisteps(params):
    """Two half batches make one update, whose gradient is their mean."""
    expected, expected_state = run(make(), params, lambda t, p: gradient(t // 1, p), 10)

    def half(t, p):  # differs between the halves, its mean is gradient(t // 2)
        sign = jnp.where(t % 2 == 0, 1.0, -1.0)
        return jax.tree.map(lambda g: g + sign, gradient(t // 2, p))

    accumulated = optax.MultiSteps(make(), 2).gradient_transformation()
    found, opt_state = run(accumulated, params, half, 20)
    assert_close(found, expected, 1e-4)
    assert_close(eval_params(opt_state, found), eval_params(expected_state, expected), 1e-4)


def test_clipping_before_gpa_acts_on_its_gradients(params):
    clipped = optax.chain(optax.clip_by_global_norm(0.1), make())
    found, opt_state = run(clipped, params, gradient, 10)

    def clipped_gradient(t, p):
        grads, _ = optax.clip_by_global_norm(0.1).update(gradient(t, p), optax.EmptyState())
        return grads

    expected, expected_state = run(make(), params, clipped_gradient, 10)
    assert_close(eval_params(opt_state, found), eval_params(expected_state, expected))


def test_lookahead_belongs_inside(params):
    """Around GPA it would move y; as a base it moves z, and the average follows."""

    class Fast:  # lookahead updates a pair of params; a base optimizer has the fast ones only
        def __init__(self, lookahead):
            self.lookahead = lookahead

        def init(self, params):
            both = optax.LookaheadParams.init_synced(params)
            return both.slow, self.lookahead.init(both)

        def update(self, updates, state, params):
            slow, inner = state
            both, inner = self.lookahead.update(updates, inner, optax.LookaheadParams(params, slow))
            return both.fast, (optax.apply_updates(slow, both.slow), inner)

    fast = Fast(optax.lookahead(optax.sgd(LR), sync_period=3, slow_step_size=0.5))
    base = optax.GradientTransformation(fast.init, fast.update)
    found, opt_state = run(gpa(base, 0.0), params, gradient, 9)
    expected, _ = run(base, params, gradient, 9)
    assert_close(found, expected)
    assert_close(eval_params(opt_state, found), expected)


def test_flatten_around_a_single_array_and_a_state_of_numpy(params):
    one = params["a"]
    expected, expected_state = run(make(), one, gradient, 3)
    found, opt_state = run(optax.flatten(make()), one, gradient, 3)
    x = eval_params(expected_state, expected)
    assert_close(eval_params(opt_state, found), x)
    assert_close(eval_params(jax.device_get(opt_state), found), x)


def test_params_may_be_called_real_and_imaginary():
    class Pair(NamedTuple):
        real: jax.Array
        imaginary: jax.Array

    params = {"pair": Pair(jnp.ones(2), jnp.ones(2))}
    found, opt_state = run(make(), params, gradient, 3)
    assert_close(eval_params(opt_state, found), opt_state.x)


def test_shapes_of_params_suffice_to_read_the_average(params):
    """So that x can be exported from a checkpoint of the optimizer's state alone."""
    found, opt_state = run(make(), params, gradient, 3)
    abstract = jax.eval_shape(lambda: found)
    assert_close(eval_params(opt_state, abstract), eval_params(opt_state, found))


def test_two_gpas_and_frozen_leaves_in_one_partition(params):
    """Each leaf's average comes from the GPA that covers it; a frozen leaf is itself."""
    optimizer = optax.partition(
        {
            "slow": make(),
            "fast": optax.chain(gpa(optax.sgd(0.2), 0.5, 0.3)),
            "frozen": optax.set_to_zero(),
        },
        {"a": "slow", "b": {"c": "fast", "d": "frozen"}},
    )
    found, opt_state = run(optimizer, params, gradient, 20)
    slow, slow_state = run(make(), {"a": params["a"]}, gradient, 20)
    fast, fast_state = run(gpa(optax.sgd(0.2), 0.5, 0.3), {"c": params["b"]["c"]}, gradient, 20)
    expected = {
        "a": eval_params(slow_state, slow)["a"],
        "b": {"c": eval_params(fast_state, fast)["c"], "d": params["b"]["d"]},
    }
    assert_close(eval_params(opt_state, found), expected)
    for sequence, of_slow in zip(
        iterates(opt_state, found), iterates(slow_state, slow), strict=True
    ):
        assert_close(sequence["a"], of_slow["a"])
        assert_close(sequence["b"]["d"], params["b"]["d"])


def test_a_mask_may_be_a_prefix_of_the_params(params):
    optimizer = optax.chain(
        optax.masked(make(), {"a": True, "b": False}),
        optax.masked(optax.set_to_zero(), {"a": False, "b": True}),
    )
    found, opt_state = run(optimizer, params, gradient, 5)
    x = eval_params(opt_state, found)
    assert_close(x["b"], params["b"])
    assert not np.allclose(x["a"], found["a"])


def test_a_gpa_within_a_gpa_is_evaluated_at_the_outer_average(params):
    optimizer = gpa(make(), 0.5, 0.5)
    found, opt_state = run(optimizer, params, gradient, 10)
    assert isinstance(opt_state, GPAState)
    assert_close(eval_params(opt_state, found), opt_state.x)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("base_params", ["z", "y"])
@pytest.mark.parametrize("base", BASES)
def test_any_base_steps_at_z_with_the_gradient_of_y(base, base_params, params):
    """The three equations, with the base run by hand."""
    optimizer = gpa(BASES[base], MU_X, MU_Y, base_params=base_params)
    opt_state, y = optimizer.init(params), params
    x = z = params
    base_state = BASES[base].init(params)
    update, base_update = jax.jit(optimizer.update), jax.jit(BASES[base].update)
    for t in range(12):
        grads = gradient(t, y)
        seen = (
            z if base_params == "z" else jax.tree.map(lambda x, z: MU_Y * x + (1 - MU_Y) * z, x, z)
        )
        base_updates, base_state = base_update(grads, base_state, seen)
        z = optax.apply_updates(z, base_updates)
        x = jax.tree.map(lambda x, z: MU_X * x + (1 - MU_X) * z, x, z)
        updates, opt_state = update(grads, opt_state, y)
        y = optax.apply_updates(y, updates)
    found = iterates(opt_state, y)
    np.testing.assert_allclose(flat(found.z), flat(z), atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(flat(found.x), flat(x), atol=2e-4, rtol=2e-4)
    assert_close(eval_params(opt_state, y), found.x)


# Bases that evaluate the loss themselves, from the params that they are given.
EVALUATING = {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    ),
    "polyak": optax.polyak_sgd(0.1),
    "opaque sam": optax.contrib.sam(
        optax.sgd(0.1), optax.sgd(0.05), sync_period=2, opaque_mode=True
    ),
}


# Of optax 0.2.6 the program of a line search prints, and JAX's store of programs breaks it then.
@pytest.mark.usefixtures("programs_are_not_stored")
@pytest.mark.parametrize("base", EVALUATING)
def test_a_base_that_evaluates_the_loss_steps_from_y(base, params):
    """The three equations, with the base run by hand."""

    def loss(p):
        return sum(jnp.sum((leaf - 1) ** 2 * (1 + leaf**2)) for leaf in jax.tree.leaves(p))

    def told(p):
        value, grad = jax.value_and_grad(loss)(p)
        extra_args = {"value": value, "grad": grad, "value_fn": loss}
        if base == "opaque sam":
            extra_args = {"grad_fn": lambda p, _: jax.grad(loss)(p)}
        return grad, extra_args if base != "polyak" else {"value": value}

    inner = optax.with_extra_args_support(EVALUATING[base])
    optimizer = gpa(inner, MU_X, MU_Y, base_params="y")
    opt_state, base_state, y = optimizer.init(params), inner.init(params), params
    x = z = params
    for _ in range(6):
        grad, extra_args = told(y)
        base_updates, base_state = inner.update(grad, base_state, y, **extra_args)
        updates, opt_state = optimizer.update(grad, opt_state, y, **extra_args)
        z = optax.apply_updates(z, base_updates)
        x = jax.tree.map(lambda x, z: MU_X * x + (1 - MU_X) * z, x, z)
        y = optax.apply_updates(y, updates)
        assert_close(y, jax.tree.map(lambda x, z: MU_Y * x + (1 - MU_Y) * z, x, z), 1e-3)
    if "value_fn" in extra_args:
        with pytest.raises(ValueError, match=r'value_fn.*base_params="y"'):
            gpa(inner, MU_X, MU_Y).update(grad, opt_state, y, **extra_args)


def test_extra_arguments_reach_the_base_and_unknown_ones_are_ignored(params):
    plateau = optax.chain(
        optax.adam(LR), optax.contrib.reduce_on_plateau(patience=1, factor=0.5, cooldown=0)
    )
    optimizer = optax.chain(optax.clip(1e6), gpa(plateau, MU_X, MU_Y))
    opt_state = optimizer.init(params)
    for _ in range(8):  # a loss that does not fall
        _, opt_state = optimizer.update(
            gradient(0, params), opt_state, params, value=jnp.ones(()), unknown="ignored"
        )
    assert float(opt_state[1].base_state[1].scale) < 1

    for optimizer in (make(), gpa(optax.sgd(0.1))):
        optimizer.update(gradient(0, params), optimizer.init(params), params, value=1.0)

    diloco = single_worker_diloco(plateau, 3)
    opt_state = diloco.init(params)
    for _ in range(8):
        _, opt_state = diloco.update(
            gradient(0, params), opt_state, params, value=jnp.ones(()), unknown="ignored"
        )
    assert float(opt_state.inner_state[1].scale) < 1


def test_injected_hyperparameters_change_mid_run_without_moving_z(params):
    optimizer = optax.inject_hyperparams(
        lambda learning_rate, mu_x, mu_y: gpa(optax.sgd(learning_rate), mu_x, mu_y)
    )(LR, 0.9, 0.9)
    found, opt_state = run(optimizer, params, gradient, 10)
    before = iterates(opt_state, found)
    for mu_x, mu_y in ((0.2, 0.1), (0.99, 0.95), (0.5, 0.0)):
        opt_state.hyperparams.update(mu_x=jnp.asarray(mu_x), mu_y=jnp.asarray(mu_y))
        no_gradient = jax.tree.map(jnp.zeros_like, params)
        updates, opt_state = optimizer.update(no_gradient, opt_state, found)
        found = optax.apply_updates(found, updates)
        after = iterates(opt_state, found)
        assert_close(after.z, before.z)
        assert_close(
            after.y, jax.tree.map(lambda x, z: mu_y * x + (1 - mu_y) * z, after.x, after.z)
        )


def test_map_params_reaches_x_and_the_base_and_nothing_else(params):
    optimizer = optax.chain(optax.clip(1.0), make())
    opt_state = optimizer.init(params)
    specs = jax.tree.map(lambda p: p.shape, params)
    marked = optax.tree.map_params(
        optimizer,
        lambda leaf, spec: (leaf.shape, spec),
        opt_state,
        specs,
        transform_non_params=lambda leaf: "other",
        is_leaf=lambda leaf: isinstance(leaf, jax.Array),
    )
    gpa_state = marked[1]
    expected = jax.tree.map(lambda p: (p.shape, p.shape), params)
    assert gpa_state.x == expected
    assert gpa_state.base_state[0].mu == expected
    assert (gpa_state.count, gpa_state.last_mu_y, gpa_state.y) == ("other", "other", None)


def test_map_params_reaches_the_master_copy_when_the_state_dtype_is_given(params):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    optimizer = make(state_dtype=jnp.float32)
    zeroed = optax.tree.map_params(optimizer, jnp.zeros_like, optimizer.init(params))
    assert_close(zeroed.y, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))


def test_vmap_trains_an_ensemble(params):
    """Learning rates of its own for each member."""
    rates = jnp.array([0.01, 0.1, 0.3])

    def train(lr):
        found, opt_state = run(make(lr), params, gradient, 5)
        return eval_params(opt_state, found)

    found = jax.vmap(train)(rates)
    for i, lr in enumerate(rates):
        assert_close(jax.tree.map(lambda leaf: leaf[i], found), train(float(lr)))


def test_scan_over_steps_is_the_loop(params):
    optimizer = make()

    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = optimizer.update(gradient(t, params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (found, opt_state), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(20))
    expected, expected_state = run(optimizer, params, gradient, 20)
    assert_close(found, expected)
    assert_close(opt_state.x, expected_state.x)


def test_eval_shape_gives_the_state_without_making_it(params):
    optimizer = make()
    abstract = jax.eval_shape(optimizer.init, params)
    state = optimizer.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (s.shape, s.dtype)
    x = jax.eval_shape(eval_params, abstract, params)
    assert jax.tree.map(lambda a: a.shape, x) == jax.tree.map(lambda p: p.shape, params)


def test_checkpointed_losses_and_gradients_through_the_update(params):
    optimizer = make()

    @jax.checkpoint
    def loss(params):
        return sum(jnp.sum(jnp.sin(p) ** 2) for p in jax.tree.leaves(params))

    found, opt_state = run(optimizer, params, lambda t, p: jax.grad(loss)(p), 30)
    assert loss(eval_params(opt_state, found)) < loss(params)

    def unrolled(lr):  # a meta-gradient
        found, opt_state = run(gpa(optax.sgd(lr), MU_X, MU_Y), params, gradient, 3)
        return loss(eval_params(opt_state, found))

    slope = (unrolled(0.1 + 1e-2) - unrolled(0.1 - 1e-2)) / 2e-2
    assert jax.grad(unrolled)(0.1) == pytest.approx(float(slope), rel=0.02)


FREEZES = {
    "partition": lambda base, mask: optax.partition(
        {"train": gpa(base, MU_X, MU_Y), "freeze": optax.set_to_zero()},
        jax.tree.map(lambda frozen: "freeze" if frozen else "train", mask),
    ),
    "selective_transform": lambda base, mask: optax.selective_transform(
        gpa(base, MU_X, MU_Y), freeze_mask=mask
    ),
    "in the base": lambda base, mask: gpa(optax.chain(base, optax.freeze(mask)), MU_X, MU_Y),
    "masked, and the others zero": lambda base, mask: optax.chain(
        optax.masked(gpa(base, MU_X, MU_Y), jax.tree.map(lambda frozen: not frozen, mask)),
        optax.masked(optax.set_to_zero(), mask),
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("how", FREEZES)
def test_a_frozen_leaf_moves_no_bit_and_the_others_train_as_if_it_were_not_there(
    how, dtype, params
):
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    base = optax.adamw(LR, weight_decay=0.1)
    mask = {"a": True, "b": {"c": False, "d": False}}
    found, opt_state = run(FREEZES[how](base, mask), params, gradient, 20)
    alone, its_state = run(gpa(base, MU_X, MU_Y), {"b": params["b"]}, gradient, 20)
    x = eval_params(opt_state, found)
    for tree in (found, x, *iterates(opt_state, found)):
        np.testing.assert_array_equal(tree["a"], params["a"])
    assert_close(found["b"], alone["b"])
    assert_close(x["b"], eval_params(its_state, alone)["b"])
    assert not np.array_equal(x["b"]["c"], params["b"]["c"])


def test_a_transformation_after_gpa_leaves_x_where_the_params_are_not(params):
    """What docs/recipes/freezing.md warns of."""
    optimizer = optax.chain(make(), optax.freeze({"a": True, "b": False}))
    found, opt_state = run(optimizer, params, gradient, 20)
    np.testing.assert_array_equal(found["a"], params["a"])
    assert not np.allclose(eval_params(opt_state, found)["a"], params["a"], atol=0.01)


def test_masked_hands_on_the_gradients_of_the_leaves_that_it_leaves_out(params):
    """What docs/recipes/freezing.md warns of; optax's own documentation says so too."""
    masked = optax.masked(make(), {"a": False, "b": True})
    grads = gradient(0, params)
    updates, _ = masked.update(grads, masked.init(params), params)
    np.testing.assert_array_equal(updates["a"], grads["a"])
