"""The field's other averages are settings: the code of docs/averages.md, run against the recursion
of each method's paper.

The recursions are float64 NumPy and share no code with the library. They are written for one leaf,
keep x, y and z apart, count t from 1 as the papers do, and yield (x, y, z) after each update.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import averaging, gpa, iterates
from helpers import ROOT
from helpers.needs import needs_optax

# An older one lacks gpa_muon's arguments, and 0.2.6 never advances a schedule of weight decay.
pytestmark = needs_optax("0.2.8", "the code of the page")

PAGE = ROOT / "docs" / "averages.md"
SECTIONS = {
    name.strip(): re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for name, text in re.findall(r"^##? (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)
}
STEPS, WARMUP, PEAK = 90, 12, 0.05
NAMES = {
    "peak": PEAK,
    "warmup_steps": WARMUP,
    "steps": STEPS,
    "anneal_steps": 40,
    "every": 4,
    "checkpoints": 6,
    "merged": 25,
    "normalized": {"kernel": True, "bias": False},
}
RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)}
NOISE = {name: RNG.normal(size=(STEPS, *leaf.shape)) for name, leaf in START.items()}


def names_of(section, **given):
    """What the code of a section defines, after the lines that all of it takes as given."""
    names = dict(NAMES)
    for block in SECTIONS["Other averages"]:
        exec(block, names)
    names |= given
    for block in SECTIONS[section]:
        exec(block, names)
    return names


def run(optimizer, steps=STEPS):
    """x, y and z of each leaf after each update, at float64; gradients are of a noisy quadratic."""
    params = jax.tree.map(jnp.asarray, START)
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    found = {name: [] for name in START}
    for t in range(steps):
        gradient = {name: 0.5 * (y - 1) + NOISE[name][t] for name, y in params.items()}
        updates, opt_state = update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        trees = iterates(opt_state, params)
        for name in START:
            found[name].append([tree[name] for tree in trees])
    return {name: np.array(points) for name, points in found.items()}


def assert_is(optimizer, recursion, **arguments):
    """At every step, up to float32's rounding: optax' schedules divide counts in it."""
    found = run(optimizer)
    for name, start in START.items():

        def gradient(t, y, noise=NOISE[name]):
            return 0.5 * (y - 1) + noise[t - 1]

        expected = [*recursion(start, gradient, name=name, **arguments)]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-7)


def rates(schedule="constant"):
    """gamma_1, gamma_2, ...: a line from 0 up to the peak, and what comes after it."""
    t = np.arange(STEPS)
    warm, part = np.minimum(t / WARMUP, 1), np.clip((t - WARMUP) / (STEPS - WARMUP), 0, 1)
    after = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * part)) / 2}[schedule]
    return dict(enumerate(PEAK * warm * after, start=1))


class Adam:
    """The direction of Adam; without a first moment for b1 = 0."""

    def __init__(self, b1, b2, eps=1e-8):
        self.b1, self.b2, self.eps, self.m, self.v = b1, b2, eps, 0.0, 0.0

    def __call__(self, t, g):
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m, v = self.m / (1 - self.b1**t), self.v / (1 - self.b2**t)
        return m / (np.sqrt(v) + self.eps)


class Muon:
    """That of optax.contrib.muon: with Nesterov's momentum, whose bias it corrects."""

    def __init__(self, beta=0.95):
        self.beta, self.m = beta, 0.0

    def __call__(self, t, g):
        self.m = self.beta * self.m + (1 - self.beta) * g
        m, g = self.m / (1 - self.beta ** (t + 1)), g / (1 - self.beta**t)
        o = self.beta * m + (1 - self.beta) * g
        o = o / (np.linalg.norm(o) + 1e-8)
        for _ in range(5):
            a = o @ o.T
            o = 3.4445 * o + (-4.7750 * a + 2.0315 * a @ a) @ o
        return 0.2 * np.sqrt(max(g.shape)) * o


def schedule_free(start, gradient, name, gamma, beta, C=None, b2=0.999, weight_decay=0.1):
    """2405.15682, and with C its refinement of 2507.09846."""
    C = 1 / (1 - beta) if C is None else C
    x = y = z = start
    direction, total = Adam(0.0, b2), 0.0
    for t in range(1, STEPS + 1):
        z = z - gamma[t] * (direction(t, gradient(t, y)) + weight_decay * y)
        total += gamma[t] ** 2
        c = min(1, gamma[t] ** 2 / total * (1 - beta) * C) if total else 1
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
        yield x, y, z


def schedule_free_plus(start, gradient, name, gamma, r, c_warmup, anneal, weight_decay):
    """2605.19095, with a learning rate that is given, in the order of its authors' code."""
    x = y = z = start
    direction, total = Adam(0.9, 0.95), 0.0
    for t in range(1, STEPS + 1):
        p = min(1, (t - 1) / anneal)
        beta = 1 - np.exp((1 - p) * np.log(1 - 0.9) + p * np.log(1 - 0.965))
        d = direction(t, gradient(t, y))
        z = z - gamma[t] ** 2 * weight_decay * y
        z = z - gamma[t] * d
        c = 1.0
        if t > c_warmup:
            w = t**r * max(gamma[s] for s in range(1, t + 1)) ** 2
            total += w
            c = w / total
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
        yield x, y, z


def amuse(start, gradient, name, gamma, beta_1, rho, T0, from_weights=False, weight_decay=0.1):
    """2605.22432; `from_weights`: beta_t as the authors' code has it."""
    x = y = z = start
    direction = Muon() if name == "kernel" else Adam(0.0, 0.999)
    total, c_T0 = 0.0, None
    for t in range(1, STEPS + 1):
        z = z - gamma[t] * (direction(t, gradient(t, y)) + weight_decay * z)
        total += gamma[t] ** 2
        c = gamma[t] ** 2 / total if total else 1.0
        x = (1 - c) * x + c * z
        beta = beta_1
        if t == T0:
            c_T0 = c
        if t > T0:
            S = (c * (1 - c_T0)) / (c_T0 * (1 - c)) if from_weights else (T0 - 1) / (t - 1)
            beta = 1 - S**rho * (1 - beta_1)
        y = (1 - beta) * z + beta * x
        yield x, y, z


def adamw_beside(start, gradient, gamma, weight_decay):
    """The iterates of AdamW, which no average disturbs."""
    theta, direction = start, Adam(0.9, 0.95)
    for t in range(1, STEPS + 1):
        d = direction(t, gradient(t, theta))
        theta = theta - gamma[t] * (d + weight_decay * theta)
        yield t, theta


def anytime_ema(start, gradient, name, gamma, f):
    """2602.03702."""
    w = start
    for t, theta in adamw_beside(start, gradient, gamma, weight_decay=0.0):
        w = 2 ** (-f / t) * w + (1 - 2 ** (-f / t)) * theta
        yield w, theta, theta


def power_function_ema(start, gradient, name, gamma, exponent):
    """2312.02696, equation 127."""
    average = start
    for t, theta in adamw_beside(start, gradient, gamma, weight_decay=1e-4):
        beta = (1 - 1 / t) ** (exponent + 1)
        average = beta * average + (1 - beta) * theta
        yield average, theta, theta


def wsm(start, gradient, name, gamma, merged):
    """2507.17634: the last iterates are kept, and merged equally when training has ended."""
    thetas = []
    for _, theta in adamw_beside(start, gradient, gamma, weight_decay=1e-4):
        thetas.append(theta)
        late = thetas[STEPS - merged :]
        yield sum(late) / len(late) if late else theta, theta, theta


def adamc(start, gradient, name, gamma, beta=0.9, weight_decay=0.1):
    """2506.02285 around the z of GPA, whose window shrinks with the learning rate."""
    x = y = z = start
    direction, peak = Adam(0.0, 0.95), max(gamma.values())
    for t in range(1, STEPS + 1):
        d = direction(t, gradient(t, y))
        decay = gamma[t] ** 2 / peak * weight_decay if name == "kernel" else 0.0
        z = z - gamma[t] * d - decay * z
        c = max(1 / t, 1 / max(1, 0.05 * STEPS * gamma[t] / peak))
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
        yield x, y, z


COSINE = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARMUP, STEPS)
METHODS = {
    "Schedule-Free": (schedule_free, {"gamma": rates(), "beta": 0.9}),
    "Refined Schedule-Free": (schedule_free, {"gamma": rates(), "beta": 0.95, "C": 100.0}),
    "ScheduleFree+": (
        schedule_free_plus,
        # The rate falls, so that the largest so far is not the present one.
        {"gamma": rates("cosine"), "r": 2, "c_warmup": 24, "anneal": 40, "weight_decay": 20.0},
    ),
    "AMUSE": (amuse, {"gamma": rates(), "beta_1": 0.6, "rho": 0.8, "T0": WARMUP}),
    "Anytime EMA": (anytime_ema, {"gamma": rates(), "f": 25.0}),
    "Power-function EMA": (power_function_ema, {"gamma": rates(), "exponent": 6.94}),
    "WSM": (wsm, {"gamma": rates(), "merged": 25}),
    "AdamC": (adamc, {"gamma": rates("cosine")}),
}


@pytest.mark.parametrize("section", METHODS)
def test_a_setting_is_the_recursion_of_its_paper(section, x64):
    recursion, arguments = METHODS[section]
    given = {"schedule": COSINE} if section == "ScheduleFree+" else {}
    assert_is(names_of(section, **given)["optimizer"], recursion, **arguments)


def test_amuse_has_the_growth_of_its_authors_code(x64):
    names, (block, _) = names_of("AMUSE"), SECTIONS["AMUSE"]
    exec(block[block.index("optimizer = ") :], names)  # with the second of the page's mu_y
    recursion, arguments = METHODS["AMUSE"]
    assert_is(names["optimizer"], recursion, **arguments, from_weights=True)


def test_all_code_of_the_page_is_tested():
    with_code = {name for name, blocks in SECTIONS.items() if blocks}
    assert with_code == {"Other averages", "LAWA", *METHODS}


def test_what_the_page_says_of_schedules_that_are_nearly_alike(x64):
    counts = np.arange(3000)
    refined = names_of("Refined Schedule-Free", schedule=lambda count: PEAK, warmup_steps=0)
    a = (1 - refined["beta"]) * refined["C"]
    late = counts + 1 >= 10 * a
    nearly = averaging.polynomial(a - 1).weight(counts)
    np.testing.assert_allclose(nearly[late], refined["mu_x"].weight(counts[late]), rtol=0.05)
    assert abs(nearly[30] / refined["mu_x"].weight(30) - 1) > 0.05

    anytime = names_of("Anytime EMA")["mu_x"]
    nearly = averaging.polynomial(16.3).weight(counts)
    np.testing.assert_allclose(nearly[1000:], anytime.weight(counts[1000:]), rtol=0.002)

    # AMUSE at t = 10 T_0: the formula, and the authors' code.
    amuse = names_of("AMUSE", warmup_steps=1000, schedule=optax.linear_schedule(0.0, 1.0, 1000))
    first = names_of("AMUSE", warmup_steps=1000)
    exec(SECTIONS["AMUSE"][0], first)
    assert f"{first['mu_y'](9999):.2f} {amuse['mu_y'](9999):.2f}" == "0.94 0.97"

    # Karras et al., equation 123.
    for exponent, deviation in ((6.94, 0.10), (16.97, 0.05)):
        found = np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))
        assert found == pytest.approx(deviation, abs=1e-4)


@pytest.mark.parametrize("every", [1, 4])
def test_the_window_beside_lawa_lags_as_far_behind_and_leaves_no_more_noise(every, x64):
    checkpoints, steps = 6, 400
    names = NAMES | {"every": every, "checkpoints": checkpoints, "schedule": 0.1}
    exec(SECTIONS["Other averages"][0], names)
    exec(SECTIONS["LAWA"][0], names)
    weight = np.asarray(jax.vmap(names["mu_x"].weight)(np.arange(steps)))
    kept = np.append(np.cumprod((1 - weight)[:0:-1])[::-1], 1.0)
    of_window = (weight * kept)[::-1]  # the weight of each iterate in x, by its age
    of_lawa = np.zeros(steps)
    of_lawa[: every * checkpoints : every] = 1 / checkpoints
    assert of_window.sum() == pytest.approx(1.0) == of_lawa.sum()
    age = np.arange(steps)
    assert of_window @ age == pytest.approx(every * (checkpoints - 1) / 2, rel=1e-6)
    assert of_lawa @ age == pytest.approx(every * (checkpoints - 1) / 2)
    noise = np.sum(of_window**2), np.sum(of_lawa**2)
    assert noise[1] == pytest.approx(1 / checkpoints)
    assert noise[0] == pytest.approx(noise[1]) if every == 1 else noise[0] < noise[1]

    # And in GPA, behind iterates that move at a steady pace.
    optimizer = gpa(optax.sgd(1.0), names["mu_x"], mu_y=0.0)
    params, update = jnp.zeros(()), jax.jit(optimizer.update)
    opt_state = optimizer.init(params)
    for _ in range(steps):
        updates, opt_state = update(-1.0, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert float(params - opt_state.x) == pytest.approx(of_lawa @ age, rel=1e-6)


def test_merging_equally_is_a_line_to_0(x64):
    """WSM's theorem: with the same gradients, x ends where SGD does whose rate falls along w_i."""
    merged, start = 25, jnp.zeros(3)
    mu_x = averaging.lr_weighted(0.1, 0, start=STEPS - merged)
    falls = optax.linear_schedule(0.1, 0.1 / merged, merged - 1, STEPS - merged)
    ends = []
    for optimizer in (gpa(optax.sgd(0.1), mu_x, mu_y=0.0), optax.sgd(falls)):
        params, opt_state = start, optimizer.init(start)
        for gradient in NOISE["bias"]:
            updates, opt_state = optimizer.update(jnp.asarray(gradient), opt_state, params)
            params = optax.apply_updates(params, updates)
        ends.append((params, opt_state))
    (_, averaged), (decayed, _) = ends
    np.testing.assert_allclose(averaged.x, decayed, atol=1e-6)
