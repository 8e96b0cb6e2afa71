"""GPA contains its neighbours: each is a setting, and equals an independent implementation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import oracle
from gpa_optax import averaging, eval_params, gpa, gpa_adamw, iterates, single_worker_diloco
from helpers import ROOT
from helpers.loops import assert_close, run

STEPS = 200


@pytest.fixture
def params(rng):
    return {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.zeros(4)}


def gradient(t, params):
    """Of a quadratic with a minimum off 0, and noise that depends on the step alone."""
    noise = jax.random.normal(jax.random.key(t), ())
    return jax.tree.map(lambda p: 0.5 * (p - 1.0) + 0.1 * noise, params)


@pytest.mark.parametrize("mu_y", [0.0, 0.7, 0.95])
@pytest.mark.parametrize(
    "base",
    [optax.sgd(0.1, 0.9), optax.adamw(0.01, weight_decay=0.1), optax.lion(0.01), optax.lamb(0.01)],
    ids=["momentum", "adamw", "lion", "lamb"],
)
def test_mu_x_zero_is_the_base_optimizer(base, mu_y, params):
    found, opt_state = run(gpa(base, mu_x=0.0, mu_y=mu_y), params, gradient, STEPS)
    expected, _ = run(base, params, gradient, STEPS)
    for sequence in (found, *iterates(opt_state, found)):
        assert_close(sequence, expected)


def test_mu_y_zero_is_the_base_optimizer_with_an_ema(params):
    base, decay = optax.adamw(0.01, weight_decay=0.1), 0.95
    found, opt_state = run(gpa(base, mu_x=decay, mu_y=0.0), params, gradient, STEPS)

    expected, base_state, ema = params, base.init(params), params
    for t in range(STEPS):
        updates, base_state = base.update(gradient(t, expected), base_state, expected)
        expected = optax.apply_updates(expected, updates)
        ema = optax.incremental_update(expected, ema, 1 - decay)
    assert_close(found, expected)
    assert_close(eval_params(opt_state, found), ema)


@pytest.mark.parametrize("mu", [0.3, 0.9])
def test_equal_mus_are_nesterovs_method(mu, params):
    """Against the textbook recursion: a gradient step from the look-ahead point, then momentum.

    x_{k+1} = y_k - lr' g(y_k),  y_{k+1} = x_{k+1} + mu (x_{k+1} - x_k),  with lr' = (1 - mu) lr.
    """
    lr = 0.4
    found, opt_state = run(gpa(optax.sgd(lr), mu, mu), params, gradient, STEPS)

    x = y = params
    for t in range(STEPS):
        previous, grads = x, gradient(t, y)
        x = jax.tree.map(lambda y, g: y - (1 - mu) * lr * g, y, grads)
        y = jax.tree.map(lambda new, old: new + mu * (new - old), x, previous)
    assert_close(eval_params(opt_state, found), x)
    assert_close(found, y)


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_uniform_averaging_is_optax_schedule_free(beta, params):
    lr, base = 0.01, optax.adamw(0.01, b1=0.0, weight_decay=0.1)
    found, opt_state = run(
        gpa(base, averaging.uniform(), beta, base_params="y"), params, gradient, STEPS
    )
    theirs = optax.contrib.schedule_free(base, lr, b1=beta)  # gives y to its base
    expected, their_state = run(theirs, params, gradient, STEPS)
    assert_close(found, expected, 1e-4)
    x = optax.contrib.schedule_free_eval_params(their_state, expected)
    assert_close(eval_params(opt_state, found), x, 1e-4)


def test_lr_weighted_averaging_is_optax_schedule_free_with_warmup(params):
    warmup = 30
    lr = optax.warmup_constant_schedule(0.0, 0.05, warmup)
    base = optax.adam(lr, b1=0.0)
    found, opt_state = run(
        gpa(base, averaging.lr_weighted(lr, warmup), mu_y=0.9), params, gradient, STEPS
    )
    # Optax counts Schedule-Free's own steps from 1 and its base's from 0; this makes them agree.
    theirs = optax.contrib.schedule_free(base, lambda count: lr(count - 1), b1=0.9)
    expected, their_state = run(theirs, params, gradient, STEPS)
    assert_close(found, expected, 1e-4)
    x = optax.contrib.schedule_free_eval_params(their_state, expected)
    assert_close(eval_params(opt_state, found), x, 1e-4)


@pytest.mark.parametrize("warmup", [0, 20])
def test_agrees_with_the_schedulefree_package(warmup, rng):
    """AdamWScheduleFree from PyPI, in PyTorch: an implementation by the method's authors."""
    torch = pytest.importorskip("torch")
    schedulefree = pytest.importorskip("schedulefree")
    lr, beta = 0.02, 0.9
    start = rng.normal(size=6).astype(np.float32)
    noise = rng.normal(size=(STEPS, 6)).astype(np.float32)

    p = torch.nn.Parameter(torch.tensor(start))
    theirs = schedulefree.AdamWScheduleFree(
        [p], lr=lr, betas=(beta, 0.99), weight_decay=0.1, warmup_steps=warmup
    )
    theirs.train()
    for t in range(STEPS):
        p.grad = 0.5 * p.detach() + torch.tensor(noise[t])
        theirs.step()
    theirs.eval()

    schedule = optax.linear_schedule(lr / warmup, lr, warmup - 1) if warmup else lr
    optimizer = gpa_adamw(
        schedule,
        mu_x=averaging.lr_weighted(schedule, warmup),
        mu_y=beta,
        b1=0.0,
        b2=0.99,
        weight_decay=0.1,
        base_params="y",
    )
    params, opt_state = run(
        optimizer, jnp.asarray(start), lambda t, y: 0.5 * y + jnp.asarray(noise)[t], STEPS
    )
    assert_close(eval_params(opt_state, params), p.detach().numpy(), 1e-4)


def theirs(decays, gradient, start, steps, lr, weight_decay, mu_x, mu_y, b1=0.9, b2=0.99):
    """y and z of the authors' PyTorch code, which never forms x: with d the direction of AdamW

    y' = mu_x y + (1 - mu_x) z + lr (mu_x mu_y - 1) d,   z' = z - lr d

    What decays: "d", which takes y in (before 2026-07), or, before these two, "z" or "y" itself
    (since then, with use_wd_on_y False and True).
    """
    y, z, m, v = start, start, np.zeros_like(start), np.zeros_like(start)
    for t in range(steps):
        g = gradient(t, y)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        d = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + 1e-8)
        if decays == "d":
            d = d + weight_decay * y
        elif decays == "z":
            z = z * (1 - lr * weight_decay)
        else:
            y = y * (1 - lr * weight_decay)
        y = mu_x * y + (1 - mu_x) * z + lr * (mu_x * mu_y - 1) * d
        z = z - lr * d
    return y, z


@pytest.mark.parametrize(
    ("decays", "weight_decay"), [("d", 0.5), ("d", 0.0), ("z", 0.0), ("y", 0.0)]
)
def test_the_authors_code_makes_the_same_steps_without_decay_and_with_decay_at_y_as_it_was(
    decays, weight_decay, rng
):
    lr, mu_x, mu_y, b1, b2 = 0.01, 0.95, 0.7, 0.9, 0.99
    start, noise = rng.normal(size=6), rng.normal(size=(STEPS, 6))
    y, z = theirs(
        decays, lambda t, y: 0.5 * y + noise[t], start, STEPS, lr, weight_decay, mu_x, mu_y
    )
    optimizer = gpa_adamw(
        lr, mu_x=mu_x, mu_y=mu_y, b1=b1, b2=b2, weight_decay=weight_decay, base_params="y"
    )
    found, opt_state = run(
        optimizer,
        jnp.asarray(start, jnp.float32),
        lambda t, y: 0.5 * y + jnp.asarray(noise, jnp.float32)[t],
        STEPS,
    )
    assert_close(found, y)
    assert_close(iterates(opt_state, found).z, z, 1e-4)
    assert_close(eval_params(opt_state, found), (y - (1 - mu_y) * z) / mu_y)


def test_the_migration_page_is_right_about_the_forms_of_weight_decay(x64):
    """Decay alone, by the oracle and the library, and by the authors' code."""
    page = (ROOT / "docs" / "migration.md").read_text()
    lines = re.findall(r"^\| (.*) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|$", page, re.MULTILINE)
    told = {form: [float(n) for n in numbers] for form, *numbers in lines}
    start, steps, lr, weight_decay, mu_x, mu_y = 0.12573, 4000, 1e-3, 0.1, 0.9967, 0.7

    def ours(base_params):
        exact = oracle.Oracle({"w": start}, oracle.adamw, base_params, weight_decay=weight_decay)
        for _ in range(steps):
            exact.step({"w": 0.0}, lr, mu_x, mu_y)
        judged = [exact.z["w"], exact.x["w"], exact.y["w"]]
        optimizer = gpa_adamw(
            lr, mu_x=mu_x, mu_y=mu_y, weight_decay=weight_decay, base_params=base_params
        )
        found, opt_state = run(optimizer, jnp.array(start), lambda t, y: 0.0 * y, steps)
        x, y, z = iterates(opt_state, found)
        np.testing.assert_allclose([z, x, y], judged, rtol=1e-10)
        return judged

    def authors(decays):
        y, z = theirs(
            decays, lambda t, y: 0.0, np.array(start), steps, lr, weight_decay, mu_x, mu_y
        )
        return [z, (y - (1 - mu_y) * z) / mu_y, y]

    found = {
        '`base_params="z"`, the default: the paper\'s three equations': ours("z"),
        '`base_params="y"`': ours("y"),
        "`GPAAdamW` before 2026-07": authors("d"),
        "`GPAAdamW` since, `use_wd_on_y=False`, its default": authors("z"),
        "`GPAAdamW` since, `use_wd_on_y=True`": authors("y"),
    }
    assert told.keys() == found.keys()
    for form, numbers in found.items():
        np.testing.assert_allclose(told[form], numbers, atol=5.1e-6, err_msg=form)


@pytest.mark.parametrize("sync_period", [1, 4])
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_single_worker_diloco_is_the_two_loops(inner, sync_period, params, x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    base = {"sgd": optax.sgd, "adamw": lambda lr: optax.adamw(lr, weight_decay=0.1)}[inner](0.02)
    optimizer = single_worker_diloco(base, sync_period, outer_learning_rate=0.6, outer_momentum=0.8)
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    loops = oracle.two_loop_diloco(
        params, gradient, oracle.BASES[inner], 0.02, sync_period, 0.6, 0.8, rounds=10
    )
    for t, (slow, fast) in enumerate(loops):
        updates, opt_state = update(gradient(t, params), opt_state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, fast, 1e-12)
        assert_close(eval_params(opt_state, params), slow, 1e-12)


def test_diloco_with_one_inner_step_of_sgd_is_gpa_with_equal_mus(params):
    """The outer Nesterov momentum is then the only momentum there is."""
    momentum, lr, outer = 0.9, 0.05, 0.7
    diloco = single_worker_diloco(optax.sgd(lr), 1, outer, momentum)
    found, _ = run(diloco, params, gradient, STEPS)
    as_gpa = gpa(optax.sgd(lr * outer / (1 - momentum)), mu_x=momentum, mu_y=momentum)
    expected, _ = run(as_gpa, params, gradient, STEPS)
    assert_close(found, expected, 1e-4)
