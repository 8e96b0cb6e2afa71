"""The studies keep to their protocol, and nothing of them is lost."""

import dataclasses
import json
import math

import pytest

pytest.importorskip("scipy")
from programs import llama, on_devices, train

from benchmarks import report, steps_to_target, transfer
from benchmarks.ingredients import VARIANTS, effects
from benchmarks.runs import Result, Store, evaluations, identity, one_run, settled, together
from benchmarks.steps_to_target import WORKLOADS, finals, parts, rows, shorter, trials
from examples.config import to_json
from examples.metrics import History


class Imagined(Store):
    """Has every run, with a loss that `loss` makes up of its configuration."""

    def __init__(self, loss):
        self.loss, self.asked = loss, {}

    def __contains__(self, config):
        return True

    def __getitem__(self, config):
        self.asked[identity(config)] = config
        steps = sorted(evaluations(config.steps))
        end = self.loss(config)
        return Result(config, {"step": steps, "loss": [end + 1 - s / steps[-1] for s in steps]})


def bowl(config):
    """Best at a learning rate of 1e-2; GPA is better, and longer runs are."""
    rate = config.settings.learning_rate
    gpa = config.optimizer.startswith("gpa")
    return (
        2.5 + math.log10(rate / 1e-2) ** 2 - 0.1 * gpa - config.steps / 10_000 + config.seed / 1e5
    )


def test_a_run_of_a_study_is_the_trainers(tmp_path, monkeypatch):
    config = llama(tmp_path, optimizer="gpa-adamw", batch_size=16)
    _, record = one_run(config)
    with on_devices(1, monkeypatch):
        train(config)
    stored = dict(History.read(config.run).losses())
    curve = dict(zip(record["curve"]["step"], record["curve"]["loss"], strict=True))
    assert curve[12] == pytest.approx(stored[12], abs=6e-7)  # the study keeps six decimals
    assert curve[4] == pytest.approx(stored[4], abs=6e-7)


def test_a_stored_run_is_found_again_whatever_changes_nothing_in_it(tmp_path):
    config = llama(tmp_path)
    record = {
        "workload": "llama",
        "config": to_json(config),
        "curve": {"step": [12], "loss": [2.0]},
    }
    Store(tmp_path / "store").write(config, record)
    store = Store(tmp_path / "store")
    assert store[config].loss == 2.0
    assert dataclasses.replace(config, run=tmp_path / "elsewhere", evaluate_every=3) in store
    assert dataclasses.replace(config, seed=1) not in store
    faster = dataclasses.replace(config.settings, learning_rate=1.0)
    assert dataclasses.replace(config, settings=faster) not in store


def test_a_flag_that_is_new_since_has_its_default_in_a_stored_run(tmp_path):
    config = llama(tmp_path)
    stored = to_json(config)
    del stored["settings"]["base_params"]
    (tmp_path / "store").mkdir()
    record = {"workload": "llama", "config": stored, "curve": {"step": [12], "loss": [2.0]}}
    (tmp_path / "store" / "old.json").write_text(json.dumps(record))
    assert config in Store(tmp_path / "store")


def test_a_run_that_diverged_counts_as_the_worst(tmp_path):
    config = llama(tmp_path)
    assert Result(config, {"step": [4], "loss": [1.0]}).loss == math.inf
    assert Result(config, {"step": [12], "loss": [math.nan]}).loss == math.inf


@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_challenger_has_eight_trials_and_each_base_three_more(workload):
    store = Imagined(bowl)
    for name in WORKLOADS[workload].contenders:
        tried = settled(trials(workload, name, store), store)
        assert len({identity(trial) for trial in tried}) == (8 if parts(name)[0] else 11)
        assert {trial.seed for trial in tried} == {steps_to_target.TRIAL_SEED}
        assert store[tried[0]].loss == min(store[trial].loss for trial in tried)


@pytest.mark.parametrize(("best", "fifth"), [(1e-3, 2e-3), (1.0, 6.4e-2), (9e-3, 1.13e-2)])
def test_the_fifth_learning_rate_is_beyond_an_edge_or_on_the_better_side(best, fifth):
    store = Imagined(lambda config: abs(math.log(config.settings.learning_rate / best)))
    tried = settled(trials("text", "gpa-adamw", store), store)
    (rate,) = {trial.settings.learning_rate for trial in tried} - {4e-3, 8e-3, 1.6e-2, 3.2e-2}
    assert rate == pytest.approx(fifth, rel=0.01)


def test_final_seeds_are_not_those_of_the_trials():
    store = Imagined(bowl)
    runs = settled(finals("text", store), store)
    for name, same in runs.items():
        assert [run.seed for run in same] == list(steps_to_target.SEEDS)
        assert steps_to_target.TRIAL_SEED not in {run.seed for run in same}
        assert len({run.settings for run in same}) == 1, name


def test_shorter_runs_are_made_where_the_target_is_reached_at_all():
    store = Imagined(bowl)
    _, runs = settled(shorter("text", store), store)
    assert set(runs) == {"gpa-adamw", "gpa-adamw, annealed", "gpa-muon"}
    assert [run.steps for run in runs["gpa-adamw"][0]] == [700, 800, 900]


def test_the_table_says_how_many_steps_were_saved():
    found = {row.name: row for row in rows("text", Imagined(bowl))}
    # Losses fall by 1 over a run, so 0.1 is reached a tenth of a run earlier; of shorter runs each
    # tenth costs 0.01, so that the shortest one, of 70 %, is good enough.
    assert found["gpa-adamw"].difference.mean == pytest.approx(-0.1)
    assert found["gpa-adamw"].saved.mean == pytest.approx(0.1)
    assert found["gpa-adamw"].saved_strictly.mean == pytest.approx(0.3)
    assert found["ema-adamw"].saved_strictly is None


def curve(config, losses):
    return Result(config, {"step": [250, 500, 750, 1000], "loss": losses})


def test_steps_are_interpolated_between_evaluations():
    run = curve(WORKLOADS["text"].config, [4.0, 3.0, 2.0, 1.0])
    assert steps_to_target.first_passage(run, 2.5) == 625
    assert steps_to_target.saved_as_in_the_paper(run, 2.5) == 0.375
    assert steps_to_target.first_passage(run, 0.5) is None
    assert steps_to_target.saved_as_in_the_paper(run, 0.5) == 0


def test_the_strict_reading_is_interpolated_between_lengths():
    config = WORKLOADS["text"].config

    def ends(*losses):
        return [
            Result(dataclasses.replace(config, steps=steps), {"step": [steps], "loss": [loss]})
            for steps, loss in zip((700, 800, 900, 1000), losses, strict=True)
        ]

    def saved(*losses):
        *short, whole = ends(*losses)
        return steps_to_target.saved_strictly(short, whole, 2.0)

    assert saved(2.3, 2.2, 2.1, 1.9) == pytest.approx(0.05)
    assert saved(2.3, 2.1, 1.9, 1.8) == pytest.approx(0.15)
    assert saved(1.9, 1.8, 1.7, 1.6) == pytest.approx(0.3)
    assert saved(2.3, 2.2, 2.1, 2.05) == 0


def test_what_is_around_a_base_is_tuned_with_the_schedule_that_suits_the_base():
    store = Imagined(lambda config: bowl(config) - 0.01 * (config.settings.schedule == "linear"))
    for name in WORKLOADS["text"].contenders:
        schedules = {t.settings.schedule for t in settled(trials("text", name, store), store)}
        if name in ("gpa-adamw", "schedule-free-adamw"):
            assert schedules == {"constant"}
        else:
            assert schedules == ({"linear"} if parts(name)[0] else {"cosine", "linear", "wsd"})


@pytest.mark.parametrize(("best", "rates"), [(8e-3, 3), (2.1e-3, 5), (3e-2, 5)])
def test_where_the_recipe_is_tried_adamw_is_tuned_and_gpa_is_not(best, rates):
    """AdamW is best at 8e-3 on text, and somewhere else on a condition."""

    def loss(config):
        there = 8e-3 if config.model.dim == 64 else best
        return 2 + math.log(config.settings.learning_rate / there) ** 2

    store = Imagined(loss)
    name = "a Llama of 0.25M parameters"
    base = settled(transfer.tuned(transfer.CONDITIONS[name], store), store)
    tried = [c for c in store.asked.values() if c.model.dim == 96]
    assert {c.optimizer for c in tried} == {"adamw"}
    assert len(tried) == rates
    runs = settled(transfer.on_condition(name, store), store)
    for adamw, gpa in zip(runs["adamw"], runs["gpa-adamw"], strict=True):
        assert adamw.seed == gpa.seed != steps_to_target.TRIAL_SEED
        assert adamw.settings == base
        assert gpa.settings.learning_rate == 2 * base.learning_rate


def test_the_other_text_is_what_modules_say_about_themselves():
    text = next(text for text in transfer.docstrings(("numpy",)) if "N-dimensional" in text)
    assert "import numpy as np" in text


def test_studies_side_by_side_ask_together_and_return_each():
    def study(count):
        for number in range(count):
            yield [(count, number)]
        return count

    both = together({"a": study(1), "b": study(3)})
    assert [next(both), next(both), next(both)] == [[(1, 0), (3, 0)], [(3, 1)], [(3, 2)]]
    with pytest.raises(StopIteration) as stop:
        next(both)
    assert stop.value.value == {"a": 1, "b": 3}


def test_an_ingredient_is_compared_with_the_same_seeds():
    found = effects(Imagined(lambda config: bowl(config) + 0.03 * (config.settings.mu_y == 0.8)))
    assert set(found) == {"", *VARIANTS}
    assert found["mu_y = 0.8"][1].mean == pytest.approx(0.03)
    assert found["weight decay at y"][1].mean == pytest.approx(0.0)


def test_figures_are_drawn_of_every_study():
    for name, draw, numbers in report.figures(Imagined(bowl)):
        assert numbers, name
        draw(numbers).canvas.draw()


def test_a_figure_is_stale_when_a_number_changes():
    def worse(config):
        return bowl(config) + 0.01 * (config.seed == 3)

    numbers, other = ({"text": rows("text", Imagined(loss))} for loss in (bowl, worse))
    before = report.digest(report.saved_figure, numbers)
    assert report.digest(report.saved_figure, numbers) == before
    other = {
        "text": rows("text", Imagined(lambda config: bowl(config) + 0.01 * (config.seed == 3)))
    }
    assert report.digest(report.saved_figure, other) != before
