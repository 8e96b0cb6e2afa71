"""The studies keep to their protocol, and nothing of them is lost."""

import dataclasses
import math

import pytest

from helpers.needs import needs

needs("scipy", "matplotlib")

from benchmarks import report, steps_to_target, steps_to_target_tables, transfer
from benchmarks.ensemble import evaluations
from benchmarks.ingredients import VARIANTS, effects
from benchmarks.runs import RUNS, Result, changes, identity, stored, train_config
from benchmarks.steps_to_target import WORKLOADS, finals, parts, rows, shorter, trials
from benchmarks.store import Missing, Store, together
from examples.metrics import History
from helpers.programs import llama, on_devices, train


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
    result = train_config(config)
    with on_devices(1, monkeypatch):
        train(config)
    trainers = dict(History.read(config.run).losses())
    curve = dict(zip(result.curve["step"], result.curve["loss"], strict=True))
    assert curve[12] == pytest.approx(trainers[12], abs=1e-7)
    assert curve[4] == pytest.approx(trainers[4], abs=1e-7)


def test_a_stored_run_is_found_again_whatever_changes_nothing_in_it(tmp_path):
    config = llama(tmp_path, seed=7)
    paths = [tmp_path / "vit.jsonl", tmp_path / "llama.jsonl"]
    made = Result(config, {"step": [12], "loss": [2.0]}, "forty files", 1.5)
    Store(*paths, kind=RUNS).add([made])
    store = Store(*paths, kind=RUNS)
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["llama.jsonl"]
    found = store[config]
    assert (found.loss, found.data, found.seconds) == (2.0, "forty files", 1.5)
    assert (found.config.settings, found.config.model) == (config.settings, config.model)
    assert dataclasses.replace(config, run=tmp_path / "elsewhere", evaluate_every=3) in store
    assert dataclasses.replace(config, seed=1) not in store
    faster = dataclasses.replace(config.settings, learning_rate=1.0)
    assert dataclasses.replace(config, settings=faster) not in store


def test_a_line_holds_only_what_is_not_default(tmp_path):
    flags = changes(llama(tmp_path, seed=7))
    assert flags["seed"] == 7
    assert "settings.base_params" not in flags  # so a flag that is new since has its default


def test_all_that_is_stored_is_read():
    store = stored()
    assert len([*store]) == len(store.records) == 699


def test_a_run_that_diverged_counts_as_the_worst(tmp_path):
    config = llama(tmp_path)
    assert Result(config, {"step": [4], "loss": [1.0]}).loss == math.inf
    assert Result(config, {"step": [], "loss": []}).loss == math.inf


@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_challenger_has_eight_trials_and_each_base_three_more(workload):
    store = Imagined(bowl)
    for name in WORKLOADS[workload].contenders:
        tried = trials(workload, name, store)
        assert len({identity(trial) for trial in tried}) == (8 if parts(name)[0] else 11)
        assert {trial.seed for trial in tried} == {steps_to_target.TRIAL_SEED}
        assert store[tried[0]].loss == min(store[trial].loss for trial in tried)


@pytest.mark.parametrize(("best", "fifth"), [(1e-3, 2e-3), (1.0, 6.4e-2), (9e-3, 1.13e-2)])
def test_the_fifth_learning_rate_is_beyond_an_edge_or_on_the_better_side(best, fifth):
    store = Imagined(lambda config: abs(math.log(config.settings.learning_rate / best)))
    tried = trials("text", "gpa-adamw", store)
    (rate,) = {trial.settings.learning_rate for trial in tried} - {4e-3, 8e-3, 1.6e-2, 3.2e-2}
    assert rate == pytest.approx(fifth, rel=0.01)


def test_final_seeds_are_not_those_of_the_trials():
    store = Imagined(bowl)
    runs = finals("text", store)
    for name, same in runs.items():
        assert [run.seed for run in same] == list(steps_to_target.SEEDS)
        assert steps_to_target.TRIAL_SEED not in {run.seed for run in same}
        assert len({run.settings for run in same}) == 1, name


def test_shorter_runs_are_made_where_the_target_is_reached_at_all():
    store = Imagined(bowl)
    runs = shorter("text", store)
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
        schedules = {t.settings.schedule for t in trials("text", name, store)}
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
    base = transfer.tuned(transfer.CONDITIONS[name], store)
    tried = [c for c in store.asked.values() if c.model.dim == 96]
    assert {c.optimizer for c in tried} == {"adamw"}
    assert len(tried) == rates
    runs = transfer.on_condition(name, store)
    for adamw, gpa in zip(runs["adamw"], runs["gpa-adamw"], strict=True):
        assert adamw.seed == gpa.seed != steps_to_target.TRIAL_SEED
        assert adamw.settings == base
        assert gpa.settings.learning_rate == 2 * base.learning_rate


def test_the_other_text_is_what_modules_say_about_themselves():
    text = next(text for text in transfer.docstrings(("numpy",)) if "N-dimensional" in text)
    assert "import numpy as np" in text


def test_studies_side_by_side_ask_together_and_return_each():
    def study(*runs):
        def needs():
            raise Missing(runs)

        return needs if runs else lambda: "all there"

    with pytest.raises(Missing) as missing:
        together({"a": study(1), "b": study(), "c": study(2, 3)})
    assert missing.value.runs == [1, 2, 3]
    assert together({"a": study(), "b": study()}) == {"a": "all there", "b": "all there"}


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
    before = report.digest(steps_to_target_tables.saved_figure, numbers)
    assert report.digest(steps_to_target_tables.saved_figure, numbers) == before
    other = {
        "text": rows("text", Imagined(lambda config: bowl(config) + 0.01 * (config.seed == 3)))
    }
    assert report.digest(steps_to_target_tables.saved_figure, other) != before
