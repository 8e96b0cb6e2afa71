"""Rounding over many updates stays within what the documentation says; the benchmark runs."""

import json

import numpy as np
import pytest

from helpers.needs import needs

needs("grain", "tyro")

from benchmarks import long_runs

UNIT = 2.0**-24  # half a unit in the last place of float32, at 1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """20,000 updates, in all settings."""
    out = tmp_path_factory.mktemp("long_runs") / "results.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["long_runs", "--quick", "--out", str(out)])
        assert long_runs.main() == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def distances(results):
    """Setting, mu_x, dtype, sequence, mu_y -> distance at each moment, and the moments."""
    return results["distances"], np.array(results["steps"])


@pytest.mark.parametrize("mu_y", long_runs.MU_YS)
def test_where_the_loss_pulls_back_rounding_stays_bounded(distances, mu_y):
    found, _ = distances
    for sequence in long_runs.SEQUENCES:
        for dtype, unit in (("float32", UNIT), ("float64", 2.0**-53)):
            assert max(found["feedback"]["0.9967"][dtype][sequence][f"{mu_y:g}"]) < 20 * unit / (
                1 - mu_y
            ), (sequence, dtype)


# Not x of a uniform average, nor what comes of it: x stops where its step is below its last place.
@pytest.mark.parametrize("mu_y", long_runs.MU_YS)
@pytest.mark.parametrize(
    ("setting", "mu_x", "sequences"),
    [("given", "0.9967", "xyz"), ("given", "uniform", "z"), ("feedback", "0.9967", "xyz")],
)
def test_no_run_drifts_by_more_than_a_random_walk(distances, setting, mu_x, sequences, mu_y):
    found, steps = distances
    for sequence in sequences:
        measured = np.array(found[setting][mu_x]["float32"][sequence][f"{mu_y:g}"])
        assert (measured < UNIT * (2 + np.sqrt(steps)) / (1 - mu_y)).all(), sequence


def test_the_state_of_bfloat16_params_drifts_as_that_of_float32_ones(distances):
    found, _ = distances
    for by_dtype in found["given"].values():
        assert by_dtype["bfloat16"] == by_dtype["float32"]


def test_the_table_and_the_figure_are_made(results, tmp_path):
    headings, lines = long_runs.table(results)
    assert {len(line) for line in lines} == {len(headings)}
    long_runs.figure(results).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("mu_x", long_runs.MU_XS)
def test_200_000_given_updates_move_z_by_no_more_than_a_random_walk(mu_x):
    """A rounding with a direction shows after 50,000 updates only."""
    when = [20_000, 50_000, 100_000, 200_000]
    problem = long_runs.given(when[-1], 32)
    found = long_runs.library_run(problem, long_runs.MU_XS[mu_x], when, "float32")[:, 2]
    steps = np.cumsum(long_runs.LEARNING_RATE * problem.noise.astype(np.float64), axis=0)
    exact = problem.start - steps[np.array(when) - 1]
    distance = long_runs.rms(found - exact[:, None]) / long_runs.rms(exact)[:, None]
    for m, mu_y in enumerate(long_runs.MU_YS):
        assert (distance[:, m] < UNIT * (2 + np.sqrt(when)) / (1 - mu_y)).all(), mu_y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_oracle_and_the_library_start_alike_and_see_the_same_noise(dtype):
    problem = long_runs.given(40, 4)
    for mu_x in long_runs.MU_XS.values():
        exact = long_runs.oracle_run(problem, mu_x, [1, 40])
        found = long_runs.library_run(problem, mu_x, [1, 40], dtype)
        np.testing.assert_allclose(found, exact, rtol=3e-5)
    # The last of the given updates counts.
    changed = np.array(problem.noise)
    changed[-1] += 1
    other = long_runs.dataclasses.replace(problem, noise=changed)
    assert not np.allclose(long_runs.library_run(other, mu_x, [1, 40], dtype)[1], exact[1])
