"""The statistics of the studies say what they claim, on made-up runs whose truth is known."""

import numpy as np
import pytest

from helpers.needs import needs

needs("scipy")

from benchmarks.statistics import (
    against_itself,
    bootstrap,
    detectable,
    estimate,
    exchanged,
    holm,
    prediction_interval,
    signed_saving,
    step_at,
    trend,
)

STEPS = np.arange(0, 1001, 50)[1:]


def runs(rng, seeds=6, speed=1.0, shared=None, noise=0.01):
    """Curves of losses that fall with the root of the steps, times `speed`; one row a seed."""
    shared = np.zeros(seeds) if shared is None else shared
    mean = 2.0 + 20.0 / np.sqrt(speed * STEPS)
    return mean + shared[:, None] + noise * rng.normal(size=(seeds, 1))


def saving(contender, baseline):
    return signed_saving(STEPS, contender, baseline)


def p_value(found, null):
    """The part of a null distribution that is at least as far from 0."""
    return np.mean(np.abs(null) >= abs(found) * (1 - 1e-9))


def test_the_saving_is_the_part_of_the_steps_that_a_faster_run_does_not_need(rng):
    for speed in (1.25, 2.0):
        found = saving(runs(rng, speed=speed, noise=0), runs(rng, noise=0))
        assert found == pytest.approx(1 - 1 / speed, abs=0.005)  # interpolated in lines
    assert saving(runs(rng, noise=0), runs(rng, noise=0)) == 0


def test_the_saving_of_a_worse_contender_is_negative_and_that_of_the_exchanged_pair(rng):
    for _ in range(50):
        one, other = runs(rng, noise=0.05), runs(rng, noise=0.05)
        assert saving(one, other) == -saving(other, one)
    assert saving(runs(rng, speed=0.8, noise=0), runs(rng, noise=0)) == pytest.approx(
        -0.2, abs=0.005
    )


def test_the_saving_is_read_off_the_mean_curve_from_where_it_stays_below():
    steps, baseline = [100, 200, 300, 400], [[4.0, 3.0, 2.5, 2.0]]
    assert signed_saving(steps, [[3.0, 1.9, 2.2, 1.8]], baseline) == pytest.approx(1 - 350 / 400)
    # One seed alone passes at 200; the mean of both is there at the end.
    two = [[3.0, 1.0, 1.0, 1.0], [5.0, 5.0, 4.0, 3.0]]
    assert signed_saving(steps, two, baseline * 2) == 0
    assert step_at(steps, [1.0, 1.0, 1.0, 1.0], 2.0) == 100
    assert step_at(steps, [3.0, 3.0, 3.0, 3.0], 2.0) == 400


def test_of_two_alike_the_saving_is_none_on_average_where_a_first_passage_a_seed_shows_some(rng):
    def unsigned(contender, baseline):
        """As the paper reads it: by seed, and never negative."""
        ends = baseline[:, -1]
        return np.mean(
            [
                1 - step_at(STEPS, curve, end) / 1000
                for curve, end in zip(contender, ends, strict=True)
            ]
        )

    pairs = [(runs(rng), runs(rng)) for _ in range(400)]
    signed = [saving(*pair) for pair in pairs]
    assert abs(np.mean(signed)) < 3 * np.std(signed) / 20
    assert np.mean([unsigned(*pair) for pair in pairs]) > 0.01


def test_the_bootstrap_covers_a_mean_about_as_often_as_it_says(rng):
    covered = 0
    for _ in range(200):
        low, high = bootstrap(np.mean, rng.normal(size=20), resamples=400)
        covered += low < 0 < high
    assert 0.87 < covered / 200 < 0.98


def test_the_bootstrap_keeps_pairs_together(rng):
    shared = rng.normal(size=8)
    low, high = bootstrap(lambda a, b: np.mean(a - b), shared + 1, shared)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_the_baseline_against_itself_has_the_spread_of_two_of_its_own_studies(rng):
    """Found by drawing from the runs of one study, as if it were drawn from all that there are."""
    studies = np.array([saving(runs(rng, 24), runs(rng, 24)) for _ in range(400)])
    drawn = np.concatenate(
        [against_itself(saving, runs(rng, 24), resamples=100) for _ in range(20)]
    )
    assert np.std(drawn) == pytest.approx(np.std(studies), rel=0.15)
    assert np.mean(drawn) == pytest.approx(0, abs=3 * np.std(drawn) / 40)


def test_exchanging_pairs_uses_what_they_share_and_its_p_value_is_uniform(rng):
    p_values = []
    for _ in range(200):
        shared = rng.normal(size=6)  # the same batches: the seeds differ more than the optimizers
        one, other = runs(rng, shared=shared), runs(rng, shared=shared)
        p_values.append(p_value(saving(one, other), exchanged(saving, one, other)))
    assert 0.01 < np.mean(np.array(p_values) <= 0.05) < 0.1
    assert 0.4 < np.mean(p_values) < 0.65
    faster, shared = 1.2, rng.normal(size=6)
    one, other = (
        runs(rng, speed=faster, shared=shared, noise=0.001),
        runs(rng, shared=shared, noise=0.001),
    )
    null = exchanged(saving, one, other)
    assert len(null) == 64
    assert np.mean(null) == pytest.approx(0, abs=1e-12)
    assert p_value(saving(one, other), null) == 2 / 64
    many = runs(rng, seeds=24)
    assert len(exchanged(saving, many, many + 0.01 * rng.normal(size=(24, 1)), resamples=50)) == 50


def test_a_trend_is_found_with_its_uncertainty(rng):
    """Savings of 20 % less 4 % for each doubling, with seeds that differ."""
    features = [(1, k) for k in range(4)]

    def sample():
        return [(0.2 - 0.04 * k + 0.01 * rng.normal(size=8), np.zeros(8)) for k in range(4)]

    inside, widths = [], []
    for _ in range(100):
        found = trend(lambda a, b: a.mean() - b.mean(), features, sample(), resamples=200)
        inside.append(
            [low < true < high for (_, low, high), true in zip(found, (0.2, -0.04), strict=True)]
        )
        widths.append(found[1][2] - found[1][1])
    assert np.mean(inside) == pytest.approx(0.9, abs=0.07)  # of few seeds somewhat too short
    # The slope's standard error is the noise of a mean over the root of the sum of squares.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.01 / 8**0.5 / 5**0.5, rel=0.15)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_finds_something_in_nothing_in_5_percent_of_the_families_at_most(rng):
    found = [min(holm(rng.uniform(size=5))) < 0.05 for _ in range(2000)]
    assert np.mean(found) < 0.065
    assert np.mean([min(rng.uniform(size=5)) < 0.05 for _ in range(2000)]) > 0.2


def test_the_paired_interval_is_students(rng):
    mean, low, high, p = estimate([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2)
    # t of two degrees of freedom at 97.5 % is 4.3027; the standard error is 0.1 / sqrt(3).
    assert (high - low) / 2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert estimate([0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0)


def test_a_prediction_interval_holds_the_next_value_as_often_as_it_says(rng):
    draws = rng.normal(size=(4000, 9))
    inside = [low < d[8] < high for d in draws for low, high in [prediction_interval(d[:8])]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    means = [low < 0 < high for d in draws for low, high in [prediction_interval(d[:8])]]
    assert np.mean(means) > 0.99  # of a mean it would be far too wide


def test_a_detectable_difference_is_found_in_four_of_five_studies(rng):
    spread = rng.normal(size=6)
    spread = 0.01 * (spread - spread.mean()) / spread.std(ddof=1)
    least = detectable(spread)
    studies = least + 0.01 * rng.normal(size=(2000, 6))
    assert np.mean([estimate(study).p < 0.05 for study in studies]) == pytest.approx(0.8, abs=0.03)
