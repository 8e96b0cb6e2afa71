"""The studies ask for the runs that the protocol names, in its order; stored runs can be read."""

import math

import pytest

from helpers.needs import needs

needs("scipy", "matplotlib", "flax")

from benchmarks import evidence_tables, studies
from benchmarks.ensemble import Member, Result
from benchmarks.evidence import STORE
from benchmarks.members import MEMBERS
from benchmarks.store import Missing, Store
from benchmarks.studies import (
    CONFIRMING,
    FRESH,
    STUDIES,
    TUNING,
    UNTUNED,
    Run,
    Setting,
    missing,
    tuned,
)


class Imagined(dict):
    """Results of all members that were asked for, with a loss that a function gives."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def make(self, members):
        for member in members:
            curve = {"step": [member.steps], "loss": [self.loss(member)]}
            self[member] = Result(member, curve, self.loss(member), 0.0)

    def finish(self, study):
        """Until the study has all it needs; what it returns, and all that it asked for."""
        asked = []
        while True:
            try:
                return study(self), asked
            except Missing as more:
                asked += more.runs
                self.make(more.runs)


def bowl(best, warmup=0.2):
    """Lowest at a learning rate and a warmup; seeds are higher by as much as they are."""

    def loss(member: Member) -> float:
        away = math.log2(member.learning_rate / best)
        return 3 + 0.1 * away**2 + abs(member.warmup - warmup) + 1e-6 * member.seed

    return loss


@pytest.mark.parametrize("best", [1.1e-3, 4e-3, 5.5e-3, 1.15e-2, 9e-2])
def test_tuning_finds_the_best_rate_within_and_beyond_the_grid(best):
    results = Imagined(bowl(best))
    setting, asked = results.finish(lambda r: tuned(r, Run(1000), "adamw", studies.OCTAVES))
    assert abs(math.log2(setting.learning_rate / best)) <= 0.26
    assert setting.warmup == 0.2
    assert {member.seed for member in asked} == set(TUNING)
    # Both neighbours of the best were tried, half an octave away.
    tried = {m.learning_rate for m in asked if m.warmup == 0.2}
    for factor in (2**-0.5, 2**0.5):
        assert any(math.isclose(setting.learning_rate * factor, r, rel_tol=0.02) for r in tried)


def test_without_refinement_only_the_edges_are_left_behind():
    _, asked = Imagined(bowl(8e-3)).finish(
        lambda r: tuned(r, Run(1000), "adamw", studies.OCTAVES, refine=False)
    )
    assert {m.learning_rate for m in asked} == set(studies.OCTAVES)
    setting, asked = Imagined(bowl(3.2e-2)).finish(
        lambda r: tuned(r, Run(1000), "adamw", studies.OCTAVES, refine=False)
    )
    assert setting.learning_rate == pytest.approx(3.2e-2)
    assert max(m.learning_rate for m in asked) == pytest.approx(6.4e-2)


@pytest.mark.parametrize(
    ("study", "name"), [(study, name) for study in STUDIES for name in STUDIES[study]]
)
def test_every_condition_comes_to_contrasts_of_pairs_on_seeds_that_tuned_nothing(study, name):
    contrasts, asked = Imagined(bowl(8e-3)).finish(STUDIES[study][name])
    assert len({m.identity for m in asked}) == len(asked)  # none twice
    fresh = CONFIRMING if "confirmed" in name else FRESH
    for contrast in contrasts:
        seeds = [[run.member.seed for run in runs] for runs in contrast[1:]]
        assert seeds[0] == seeds[1] == list(fresh[: len(seeds[0])])
        assert len({run.member.steps for runs in contrast[1:] for run in runs}) == 1


def test_the_three_lowest_of_the_screen_are_confirmed():
    # In the mean of both lengths; at 4,000 steps alone their order would be another.
    best = {"annealed, mu_y 0.8": -0.3, "annealed, mu_y 0.95": -0.2, "anytime, mu_y 0.96": -0.1}
    more = {1000: {"annealed, mu_y 0.8": -0.3}, 4000: {"annealed, mu_y 0.8": 0.3}}

    def loss(member):
        forms = [(name, knobs) for name, (optimizer, knobs) in studies.SCREEN.items()
                 if optimizer == member.optimizer]  # fmt: skip
        name = next((n for n, knobs in forms if dict(member.knobs) == knobs), "")
        there = more.get(member.steps, {}).get(name, 0.0)
        return bowl(8e-3)(member) + best.get(name, 0.0) + there

    contrasts, _ = Imagined(loss).finish(studies.confirmed)
    assert [contrast.name for contrast in contrasts] == [*best, "Schedule-Free"]
    assert len(contrasts[0].contender) == 24


def test_the_one_liners_have_the_rule_and_no_search_of_their_own():
    for condition in STUDIES["blocks"].values():
        contrasts, _ = Imagined(bowl(8e-3)).finish(condition)
        base = contrasts[0].baseline[0].member
        for contrast in contrasts[:2]:
            member = contrast.contender[0].member
            assert member.learning_rate == pytest.approx(2 * base.learning_rate, rel=0.01)
            assert (member.warmup, member.knobs) == (0.2, ())


@pytest.mark.parametrize(("best", "baseline"), [(0.05, 0.05), (0.2, 0.2), (0.5, 0.5)])
def test_the_baseline_has_longer_warmups_where_they_are_better_and_the_rule_has_not(best, baseline):
    contrasts, asked = Imagined(bowl(8e-3, warmup=best)).finish(
        STUDIES["blocks"]["1,000 steps of 32"]
    )
    assert contrasts[0].baseline[0].member.warmup == baseline
    tried = {m.warmup for m in asked if m.optimizer == "adamw" and m.seed in TUNING}
    assert tried == ({0.05, 0.2} if best == 0.05 else {0.05, 0.2, 0.3, 0.5})
    by_name = {contrast.name: contrast.contender[0].member for contrast in contrasts}
    assert by_name["annealed_adamw"].warmup == 0.2
    assert by_name["gpa(optax.adamw)"].warmup == min(best, 0.2)


def test_what_is_missing_comes_in_the_order_of_its_worth_and_each_run_once():
    members = missing(Imagined(None))
    assert len({m.identity for m in members}) == len(members)
    first = missing(Imagined(None), ["blocks"])
    assert members[: len(first)] == first
    assert all(m.seed in TUNING for m in members)  # nothing fresh before the tuning


def test_rates_that_are_reached_in_two_ways_are_one_run():
    run = Run(1000)
    rates = (8e-3 * math.sqrt(2), 1.6e-2 / math.sqrt(2))
    first, second = (Setting("adamw", rate, 0.2).members(run, [2000])[0] for rate in rates)
    assert first.identity == second.identity


def test_all_that_is_stored_is_read_and_belongs_to_the_protocol():
    store = Store(STORE, kind=MEMBERS)
    assert len(store.records) >= 14
    for result in store:
        assert result.member.seed in (*TUNING, *FRESH, *CONFIRMING)
        assert result.curve["step"][-1] <= result.member.steps


def test_the_table_has_a_line_for_each_contender_and_says_what_it_saves():
    results = Imagined(bowl(8e-3))

    def make(members):
        """Losses fall by 1 over a run, so that 0.1 is a tenth of it."""
        for m in members:
            end = 3.0 + 1e-3 * m.seed - 0.1 * (m.optimizer == "annealed")
            end = math.inf if m.optimizer == "anytime" and m.seed == FRESH[3] else end
            curve = {"step": [m.steps / 2, m.steps], "loss": [end + 0.5, end]}
            results[m] = Result(m, curve, end, 0.0)

    results.make = make
    name, condition = next(iter(STUDIES["blocks"].items()))
    assert evidence_tables.table("blocks", results)[1] == []  # nothing is there yet
    results.finish(condition)
    headings, lines = evidence_tables.table("blocks", results)
    assert {len(line) for line in lines} == {len(headings)}
    # AdamW with a usual warmup is the baseline itself here, and has no line of its own.
    assert [line[0] for line in lines] == [f"{name}, 8 seeds", "", "", ""]
    baseline, annealed, anytime, _ = lines
    assert baseline[1] == "adamw"
    assert annealed[4].startswith("-0.1000 (")
    assert annealed[6].startswith("+10.0% (")
    assert anytime[4:] == ["diverged", "", "", ""]
    [_, by_seed, *_] = evidence_tables.seeds(results)[1]
    assert by_seed == ["", "annealed_adamw", ", ".join(f"{2.9 + 1e-3 * s:.3f}" for s in FRESH[:8])]


def test_every_trial_that_a_study_tunes_by_has_its_place_in_the_table_of_trials():
    made = {}
    for conditions in STUDIES.values():
        for condition in conditions.values():
            results = Imagined(bowl(8e-3))
            results.finish(condition)
            made |= results
    headings, lines = evidence_tables.tuning(made.values())
    assert all(len(line) == len(headings) for line in lines)
    named = {line[0] for line in lines}
    assert {*studies.CONDITIONS, *studies.SIZES} - named == {"batches of 8", "batches of 128"}
    assert {"1,000 steps of 8", "500 steps of 128"} <= named


def test_a_prediction_takes_three_conditions():
    results = Imagined(bowl(8e-3))
    assert evidence_tables.prediction(results).startswith("Fewer than three")
    for condition in STUDIES["transfer"].values():
        results.finish(condition)
    assert "`annealed_adamw` is predicted to save" in evidence_tables.prediction(results)


def savings_of(share):
    """Results whose one-liners are at AdamW's last loss after `1 - share(steps)` of the run."""
    results = Imagined(bowl(8e-3))

    def make(members):
        for m in members:
            saved = share(m.steps) if m.optimizer in ("annealed", "anytime") else 0.0
            steps = [round(part * m.steps) for part in (0.5, 0.6, 0.7, 0.8, 0.9, 1)]
            losses = [4 - (step / m.steps + saved) + 1e-4 * m.seed for step in steps]
            results[m] = Result(m, {"step": steps, "loss": losses}, losses[-1], 0.0)

    results.make = make
    return results


def test_the_saving_over_length_is_fitted_and_drawn():
    results = savings_of(lambda steps: 0.2 - 0.03 * math.log2(steps / 1000))
    assert evidence_tables.over_length(results) == {}
    assert evidence_tables.trend_text(results).startswith("Fewer than three")
    for condition in STUDIES["length"].values():
        results.finish(condition)
    told = " ".join(evidence_tables.trend_text(results).split())
    assert "+20.0% (+20.0% to +20.0%) at 1,000 steps" in told
    assert "-3.0% (-3.0% to -3.0%) for each doubling of the steps" in told
    assert "parameters" not in told
    results.finish(STUDIES["size"]["0.25M parameters, 2,400 steps"])
    told = " ".join(evidence_tables.trend_text(results).split())
    assert "for each doubling of the parameters" in told
    found = evidence_tables.over_length(results)
    assert [*found] == ["0.125M parameters", "0.246M parameters"]
    assert all([*forms] == [*UNTUNED] for forms in found.values())
    for gains in found["0.125M parameters"].values():
        assert [gain.steps for gain in gains] == [1000, 2000, 4000, 8000]
        assert all(gain.loss.mean < 0 for gain in gains)
        assert [round(gain.steps_saved.saved, 2) for gain in gains] == [0.2, 0.17, 0.14, 0.11]
    figure = evidence_tables.length_figure(found)
    assert [axes.get_title() for axes in figure.axes[:2]] == [*found]


def test_a_run_that_diverged_counts_as_infinitely_bad_and_stops_no_table():
    results = savings_of(lambda steps: 0.1)
    make = results.make

    def diverging(members):
        make(members)
        for m in members:
            if m.optimizer == "anytime" and m.seed == FRESH[3]:
                curve = {name: values[:2] for name, values in results[m].curve.items()}
                results[m] = Result(m, curve, math.inf, 0.0)

    results.make = diverging
    for study in ("blocks", "transfer"):
        for condition in STUDIES[study].values():
            results.finish(condition)
    *_, annealed, anytime, bad = evidence_tables.brief(results)[1][0]
    assert annealed.startswith("+10% (")
    assert (anytime, bad[:5]) == ("diverged", "-50% ")
    assert "`anytime_adamw` is predicted to save -50%" in evidence_tables.prediction(results)
    assert "anytime_adamw" not in next(iter(evidence_tables.curves(results).values()))
