"""The optimizers of the examples: each of their flags has an effect, or is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER)

from PIL import Image
from rich.console import Console

from examples import compare, optimizers
from examples.commands import train_command
from examples.config import parse_run
from examples.llama.config import TrainLlama
from examples.llama.data import TextData
from examples.settings import NAMES, Settings, without_effect
from examples.vit.config import TrainViT
from examples.vit.data import ImageData
from examples.vit.model import PRESETS
from helpers import programs

STEPS = 6
# For each setting another value than the one it has here.
USUAL = Settings(learning_rate=0.1, warmup=0.2, final=0.1, decay=0.3, clip=2.0, window=0.4,
                 sync_period=3, power=1.0)  # fmt: skip
OTHER = {
    "learning_rate": 0.2, "schedule": "cosine", "warmup": 0.4, "decay": 0.6, "final": 0.5,
    "weight_decay": 0.3, "clip": 1.0, "b1": 0.5, "b2": 0.7, "mu_y": 0.3, "mu_y_warmup": 0.5,
    "mu_x": 0.2, "window": 0.8, "average": "warmed-up", "power": 3.0, "base_params": "y",
    "sync_period": 2, "outer_learning_rate": 0.3, "outer_momentum": 0.3,
}  # fmt: skip


@functools.cache
def trained(name, settings):
    """Params and evaluated weights after each update, with given gradients."""
    optimizer = optimizers.named_optimizer(name, settings, STEPS)
    keys = iter(jax.random.split(jax.random.key(0), 3 * (STEPS + 1)))

    def tree():
        return {
            "blocks": {"kernel": jax.random.normal(next(keys), (1, 2, 2))},
            "scale": jax.random.normal(next(keys), (2,)),
        }

    with jax.disable_jit("muon" in name):  # it would be compiled each time
        return run(optimizer, tree)


def run(optimizer, tree):
    params = tree()
    opt_state = optimizer.init(params)
    seen = []
    for step in range(STEPS):
        grads = jax.tree.map(lambda leaf: leaf * (step + 1) / 5, tree())  # only some are clipped
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        seen.append((params, optimizer.eval_params(opt_state, params)))
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(seen)])


# Around these bases an average has the rules that it has around AdamW and SGD.
SLOW = [
    f"{method}-{base}" for method in ("ema", "diloco", "schedule-free") for base in ("muon", "lion")
]
CASES = [
    *(
        pytest.param(name, "linear", "annealed", None, marks=[pytest.mark.long] * (name in SLOW))
        for name in NAMES
    ),
    *(("sgd", schedule, "annealed", None) for schedule in ("wsd", "constant")),
    *(
        ("gpa-sgd", "linear", average, None)
        for average in ("warmed-up", "constant", "polynomial", "lr-weighted")
    ),
    ("gpa-sgd", "linear", "annealed", 0.6),
    ("ema-adamw", "linear", "constant", 0.6),
    ("schedule-free-adamw", "constant", "annealed", None),
]


@pytest.mark.parametrize(("name", "schedule", "average", "mu_x"), CASES)
def test_a_setting_is_without_effect_exactly_where_it_changes_nothing(
    name, schedule, average, mu_x
):
    settings = dataclasses.replace(USUAL, schedule=schedule, average=average, mu_x=mu_x)
    usual = trained(name, settings)
    changed = set()
    for field, value in OTHER.items():
        value = "polynomial" if value == getattr(settings, field) else value
        other = trained(name, dataclasses.replace(settings, **{field: value}))
        if not np.allclose(usual, other, rtol=1e-4, atol=1e-5):
            changed.add(field)
    assert set(OTHER) - changed == set(without_effect(name, settings))
    assert set(OTHER) == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--mu-x 0.3", "--mu-x 0.3 has no effect with --average lr-weighted: leave it out, or "
         "give it with --average annealed, warmed-up or constant."),
        ("--mu_x=5", "--mu-x 5.0 has no effect with --average lr-weighted: "),
        ("--window 0.05", "--window 0.05 has no effect with --average lr-weighted: "),
        ("--window -1", "--window must be positive, got -1.0."),
        ("--average annealed --mu-x .9 --window .1", "--window 0.1 has no effect with --mu-x 0.9: "
         "leave it out, or give it with no --mu-x."),
        ("--average annealed --power -3", "--power -3.0 has no effect with --average annealed: "),
        ("--final 7", "--final must be in [0, 1), got 7.0."),
        ("--final 0.3", "--final 0.3 has no effect with --schedule constant: leave it out, or give "
         "it with --schedule cosine, linear or wsd."),
        ("--decay 7", "--decay 7.0 has no effect with --schedule constant: "),
        ("--sync-period 0", "--sync-period 0 has no effect with gpa-adamw: leave it out, or give "
         "it with diloco-adamw."),
        ("--optimizer adamw --mu-y 0.5", "--mu-y 0.5 has no effect with adamw: leave it out, or "
         "give it with gpa-adamw or schedule-free-adamw."),
        ("--optimizer sgd --b2 0.95", "--b2 0.95 has no effect with sgd: "),
        ("--optimizer lion --evaluate-y", "--evaluate-y has no effect with lion, "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [TrainLlama, TrainViT])
def test_a_flag_without_effect_is_refused(kind, arguments, says, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse_run(kind, "test", arguments.split())
    # What is wrong with a flag by itself is tyro's to say, in a frame.
    said = capsys.readouterr().err + str(error.value)
    assert says.strip(".") in " ".join(said.split())


@pytest.mark.parametrize("workload", ["llama", "vit"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gpa-adamw.mu-x 0.3", "--gpa-adamw.mu-x 0.3 has no effect with --gpa-adamw.average lr-"),
        ("--adamw.sync-period 3", "--adamw.sync-period 3 has no effect with adamw: leave it out, "),
        ("--optimizers adamw --evaluate-y", "--evaluate-y has no effect without an optimizer that"),
    ],
)
def test_a_comparison_refuses_flags_without_effect_too(workload, arguments, says):
    with pytest.raises(ValueError, match=says):
        compare.parse_comparison(workload, arguments.split())


def test_flags_with_an_effect_are_taken():
    for arguments in ("--average polynomial --power 2", "--optimizer diloco-sgd --sync-period 4",
                      "--schedule wsd --decay 0.1", "--evaluate-y"):  # fmt: skip
        parse_run(TrainLlama, "test", arguments.split())
    compare.parse_comparison("vit", ["--gpa-adamw.b1", "0.9", "--evaluate-y"])


@pytest.fixture
def texts(tmp_path):
    programs.write_text(tmp_path / "text")
    rows = "".join(f'{{"text": "{number} steps, and then an average."}}\n' for number in range(99))
    (tmp_path / "rows.jsonl").write_text(rows)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--data.source text --data.column text", "--data.column text has no effect with "
         "--data.source text, whose files have no columns: leave it out."),
        ("--data.source text --data.validation rows.jsonl --data.held-out 0.2",
         "--data.held-out 0.2 has no effect with a validation set, rows.jsonl"),
        ("--data.source text --data.cache there", "--data.cache there has no effect with "
         "--data.tokenizer bytes: "),
    ],
)  # fmt: skip
def test_a_flag_without_effect_on_the_text_is_refused(texts, monkeypatch, arguments, says):
    monkeypatch.chdir(texts)
    arguments = [*arguments.split(), "--data.tokenizer", "bytes", "--run", "run"]
    (texts / "run").mkdir()
    with pytest.raises(ValueError, match=re.escape(says)):
        train_command(TrainLlama, "test", [*arguments, "--no-resume"], Console(quiet=True))
    assert [path.name for path in texts.glob("run*")] == ["run"]  # nothing was renamed


def test_flags_with_an_effect_on_the_text_are_taken(texts):
    for settings, flags in [
        (TextData(f"{texts}/rows.jsonl", tokenizer="bytes"), {"--data.cache"}),
        (TextData(f"{texts}/text", cache=texts), {"--data.column"}),
        (TextData(f"{texts}/text", validation=f"{texts}/rows.jsonl", cache=texts),
         {"--data.held-out"}),
    ]:  # fmt: skip
        assert set(settings.prepare(300).without_effect) == flags


def test_held_out_has_no_effect_on_images_with_a_validation_set(tmp_path):
    for split, number in [("train", 4), ("val", 2)]:
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(number):
                Image.new("RGB", (8, 8)).save(tmp_path / split / name / f"{index}.png")
    arguments = ["--data.source", str(tmp_path), "--data.held-out", "0.3"]
    with pytest.raises(ValueError, match=r"--data.held-out 0.3 has no effect with .* validation: "):
        train_command(TrainViT, "test", [*arguments, "--run", "r"], Console(quiet=True))
    assert ImageData().prepare().without_effect == {}


@pytest.mark.parametrize(
    ("flag", "given", "fitted"),
    [("--model.patch", 2, 4), ("--model.channels", 1, 3), ("--model.classes", 10, 2)],
)
def test_the_smallest_vit_adapts_to_the_images_what_was_not_given(tmp_path, flag, given, fitted):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (28, 28)).save(tmp_path / name / f"{index}.png")
    data = ImageData(str(tmp_path))
    images, field = data.prepare(), flag.removeprefix("--model.")
    adapted = TrainViT(data=data).fitted(images).model
    assert (adapted.image_size, adapted.channels, adapted.classes, adapted.patch) == (28, 3, 2, 4)
    arguments = ["--data.source", str(tmp_path), flag, str(given), "--run", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=f"{flag} {given} is not what .* {fitted}: "):
        train_command(TrainViT, "test", arguments, Console(quiet=True))
    other = dataclasses.replace(PRESETS["tiny"], image_size=28, **{field: 14})
    if field == "patch":
        assert TrainViT(data=data, model=other).fitted(images).model.patch == 14
    else:
        with pytest.raises(ValueError, match=f"and {flag}|, {flag}"):
            TrainViT(data=data, model=other).fitted(images)
