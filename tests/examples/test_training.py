"""The trainer: what it stores it finds again, wherever and however it resumes."""

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from helpers.needs import TRAINER, needs

needs(*TRAINER)

from rich.console import Console

from examples import checkpoints, optimizers
from examples.config import from_json, to_json
from examples.files import read_json, write_json
from examples.llama.config import TrainLlama
from examples.llama.data import TextData
from examples.metrics import History, Report, records
from examples.run_folder import check_run, start_over, to_store
from examples.settings import NAMES, Settings, split
from examples.sharding import make_mesh
from examples.train import accumulate, build
from examples.vit.config import TrainViT
from gpa_optax import iterates
from helpers.loops import assert_same
from helpers.programs import (
    SMALL,
    built,
    llama,
    on_devices,
    saved,
    train,
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    with on_devices(1, monkeypatch):
        yield


def interrupt_after(step, monkeypatch):
    """Sends Ctrl-C, once, when that step was made."""
    stepped = Report.stepped

    def interrupting(self, done, *numbers):
        stepped(self, done, *numbers)
        if done == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Report, "stepped", interrupting)


@pytest.mark.parametrize("stop", [4, 6])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, monkeypatch, stop):
    """Also between checkpoints: params, optimizer state, data and key."""
    config = llama(tmp_path)
    train(config)
    other = dataclasses.replace(config, run=tmp_path / "other")
    with monkeypatch.context() as patch:
        interrupt_after(stop, patch)
        train(other)
    assert History.read(other.run).train_loss[-1][0] == stop
    assert "resumes from step" in train(other)
    assert_same(saved(config, 12), saved(other, 12))
    one, two = (History.read(folder) for folder in (config.run, other.run))
    assert one.train_loss == two.train_loss
    assert one.validation == two.validation
    assert [step for step, _ in two.train_loss] == list(range(1, 13))


def test_a_complete_run_is_left_as_it_is(tmp_path):
    config = llama(tmp_path)
    train(config)
    before = (config.run / "metrics.jsonl").read_bytes()
    train(config)
    assert (config.run / "metrics.jsonl").read_bytes() == before


def test_steps_after_the_last_checkpoint_are_made_again_after_a_crash(tmp_path):
    config = llama(tmp_path)
    train(config)
    whole = History.read(config.run)
    shutil.rmtree(config.run / "checkpoints" / "12")
    with (config.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')  # what a crash leaves
    train(config)
    again = History.read(config.run)
    assert again.train_loss == whole.train_loss
    assert again.validation == whole.validation


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1)])
def test_a_checkpoint_of_one_device_restores_on_eight_and_the_reverse(
    tmp_path, monkeypatch, before, after
):
    config = llama(tmp_path, settings={"learning_rate": 1e-3})
    parts = {1: 1, 8: 4}
    with on_devices(before, monkeypatch):
        train(dataclasses.replace(config, fsdp=parts[before]))
    here = saved(config, 8, before, parts[before])
    there = saved(config, 8, after, parts[after])
    assert_same(here, there)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(there)} == {after}
    whole = History.read(config.run)
    shutil.rmtree(config.run / "checkpoints" / "12")
    with on_devices(after, monkeypatch):
        train(dataclasses.replace(config, fsdp=parts[after]))
    rest = History.read(config.run)
    np.testing.assert_allclose(rest.train_loss, whole.train_loss, rtol=1e-5)


def test_the_last_checkpoints_are_kept_and_the_best(tmp_path, monkeypatch):
    """Also when the best was saved before the run was stopped."""
    config = llama(tmp_path, steps=24, keep=2)
    # The second evaluation after the start is the best by far.
    losses = iter([9.0, 3.0, 1.0, 5.0, 4.0, 3.0, 2.0])
    monkeypatch.setattr("examples.train.mean_metrics", lambda *_: {"loss": next(losses)})
    with monkeypatch.context() as patch:
        interrupt_after(13, patch)
        train(config)
    train(config)
    assert sorted(int(p.name) for p in (config.run / "checkpoints").iterdir()) == [8, 20, 24]


def test_a_loss_that_is_no_number_is_never_the_best():
    losses = [2.5, float("nan"), 3.0, float("inf")]
    assert max(losses, key=lambda loss: checkpoints.quality({"loss": loss})) == 2.5


def test_the_position_in_the_data_is_put_together_from_all_processes(tmp_path):
    def write(process, content, count=2):
        (tmp_path / f"process_{process}-of-{count}.json").write_text(content)

    write(0, '{"0": {"used": 3}}')
    with pytest.raises(ValueError, match=r"Cannot read the position .*/process_1-of-2.json: .*No"):
        checkpoints.position(tmp_path)
    for content in ("", "[1, 2]", "\0\0\0"):
        write(1, content)
        with pytest.raises(ValueError, match=r"Cannot read the position .*/process_1-of-2.json: "):
            checkpoints.position(tmp_path)
    write(1, '{"0": {"used": 4}, "1": {"used": 3}}')
    with pytest.raises(ValueError, match=r"process_1-of-2.json contradicts the other files"):
        checkpoints.position(tmp_path)
    write(1, '{"0": {"used": 3}, "1": {"used": 5}}')
    assert checkpoints.position(tmp_path) == {"0": {"used": 3}, "1": {"used": 5}}
    with pytest.raises(ValueError, match=r"Cannot read the position in the data in .*0-of-1.json"):
        checkpoints.position(tmp_path / "absent")


def test_a_run_with_other_flags_is_not_mixed_with_this_one(tmp_path):
    config = llama(tmp_path)
    train(config)
    faster = dataclasses.replace(config.settings, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"started with --learning-rate 0.032, not 1.0"):
        train(dataclasses.replace(config, settings=faster))
    out = io.StringIO()
    start_over(config.run, Console(file=out, width=500))  # as --no-resume does
    assert f"{config.run} is {config.run}.1 now." in out.getvalue()
    train(dataclasses.replace(config, settings=faster))
    assert History.read(tmp_path / "run.1").done == History.read(config.run).done == 12
    # What does not change the result may change.
    train(dataclasses.replace(config, settings=faster, keep=5, log_every=3))


LASTING = {"schedule": "constant", "warmup": 3.0}


@pytest.mark.parametrize(
    ("optimizer", "settings", "longer"),
    [
        ("gpa-adamw", {"warmup": 0.3, "average": "lr-weighted"}, {"warmup": 4.0}),
        (
            "gpa-adamw",
            {"average": "warmed-up", "window": 0.25, "mu_y_warmup": 5.0},
            {"mu_x": 1 - 1 / 3},
        ),
        ("schedule-free-adamw", {}, {}),
        ("diloco-sgd", {"sync_period": 5}, {}),
    ],
)
def test_a_run_made_longer_is_the_long_run_bit_for_bit(tmp_path, optimizer, settings, longer):
    short = llama(tmp_path, optimizer=optimizer, settings=LASTING | settings)
    long = llama(
        tmp_path, optimizer=optimizer, settings=LASTING | settings | longer, steps=24,
        run=tmp_path / "long",
    )  # fmt: skip
    train(short)
    assert "resumes from step 12." in train(dataclasses.replace(long, run=short.run))
    train(long)
    assert_same(saved(long, 24), saved(dataclasses.replace(long, run=short.run), 24))
    timed = ("seconds_per_step", "input_seconds_per_step", "tokens_per_second")
    lines = [
        [
            {k: v for k, v in line.items() if k not in timed}
            for line in records(run / "metrics.jsonl")
        ]
        for run in (short.run, long.run)
    ]
    assert [line for line in lines[0] if "size" not in line] == lines[1][1:]
    assert read_json(short.run / "config.json")["config"]["steps"] == 24


@pytest.mark.parametrize(
    ("settings", "steps", "says"),
    [
        ({"schedule": "linear"}, 24, "--steps 12, not 24, and its --schedule linear depends on"),
        ({"schedule": "wsd"}, 24, "--steps 12, not 24, and its --schedule wsd depends on"),
        ({"warmup": 0.3}, 24, "--steps 12 and --warmup 0.3, which is a fraction of --steps: "
         "to make it longer with the same schedule, give --warmup 4."),
        ({"average": "constant", "window": 0.25}, 24, "--window 0.25, which is a fraction of "
         "--steps: to make it longer with the same schedule, give --mu-x 0.66"),
        ({"mu_y_warmup": 0.5}, 24, "--mu-y-warmup 0.5, which is a fraction.*give --mu-y-warmup 6"),
        ({}, 6, "--steps 12, and cannot be made shorter, got 6; give the same flags"),
    ],
)  # fmt: skip
def test_a_run_whose_schedule_depends_on_its_length_is_not_made_longer(
    tmp_path, settings, steps, says
):
    config = llama(tmp_path, settings=LASTING | settings)
    config.run.mkdir()
    write_json(config.run / "config.json", to_store(config))  # as when it starts
    check_run(config)
    with pytest.raises(ValueError, match=says):
        train(dataclasses.replace(config, steps=steps))
    assert read_json(config.run / "config.json")["config"]["steps"] == 12


def test_parts_of_a_batch_give_the_gradient_of_the_batch(tmp_path):
    whole, parts = (llama(tmp_path, accumulate=n) for n in (1, 4))
    (one, state, batch), (four, same, batches) = built(whole), built(parts)
    assert batches["tokens"].shape == (4, 2, 17)
    state, metrics = one.step(state, batch)
    same, again = four.step(same, batches)
    assert float(metrics["loss"]) == pytest.approx(float(again["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(again["grad_norm"]), rel=1e-5)


def test_bfloat16_gradients_are_added_in_float32():
    def value_and_grad(params, part, key):
        return jnp.float32(0), part

    parts = jnp.full(512, 1 + 2**-7, jnp.bfloat16)
    _, grads = accumulate(value_and_grad, None, parts, jax.random.split(jax.random.key(0), 512))
    assert grads.dtype == jnp.float32
    assert float(grads) == 1 + 2**-7  # in bfloat16 the sum would stall


def test_everything_shaped_like_a_param_is_split_as_it(tmp_path):
    config = llama(tmp_path, fsdp=4, model=dataclasses.replace(SMALL, dim=64, hidden=128))
    program, state, batch = built(config, devices=8)
    places = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert places["['blocks']['mlp']['up']['kernel']"] == jax.P(None, None, "fsdp")
    assert places["['blocks']['mlp']['down']['kernel']"] == jax.P(None, "fsdp")
    assert places["['norm']['scale']"] == jax.P()
    gpa = state.opt_state[1]
    copies = [gpa.x, *(leaf.nu for leaf in [gpa.base_state[0]])]
    for copy in copies:
        for path, leaf in jax.tree_util.tree_leaves_with_path(copy):
            assert leaf.sharding.spec == places[jax.tree_util.keystr(path)]
    with jax.set_mesh(program.mesh):
        state, _ = program.step(state, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        assert leaf.sharding.spec == places[jax.tree_util.keystr(path)]


def test_a_step_makes_no_new_buffers_for_the_state(tmp_path):
    """Donated: the state goes out where it came in."""
    program, state, batch = built(llama(tmp_path))
    memory = program.step.lower(program.state, program.batch).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes >= 0.99 * size
    program.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_bfloat16_params_train_with_the_master_copy_in_the_state(tmp_path):
    model = dataclasses.replace(SMALL, param_dtype="bfloat16")
    slow = {"learning_rate": 3e-4}  # steps that bfloat16 would round away
    program, state, batch = built(llama(tmp_path, model=model, settings=slow, steps=60))
    exact, same, _ = built(llama(tmp_path, settings=slow, steps=60))
    losses = []
    for _ in range(60):
        state, metrics = program.step(state, batch)
        same, wanted = exact.step(same, batch)
        losses.append((float(metrics["loss"]), float(wanted["loss"])))
    first, last = losses[0], losses[-1]
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(state.params))
    y = iterates(state.opt_state, state.params).y
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(y))
    assert last[0] - first[0] == pytest.approx(last[1] - first[1], rel=0.2)


def test_the_preset_15m_trains(tmp_path):
    """The largest that a test trains; what is larger is compiled by `plan`."""
    values = TrainLlama.preset_values("15m")
    config = llama(tmp_path, steps=3, evaluate_every=3, preset="15m", model=values["model"])
    train(config)
    history = History.read(config.run)
    assert history.size["params"] == 15_735_168
    assert history.train_loss[0][1] == pytest.approx(np.log(4096), abs=0.3)
    assert history.train_loss[-1][1] < history.train_loss[0][1]


def test_metrics_are_stored_for_people_and_for_programs(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    config = llama(tmp_path, evaluate_y=True)
    printed = train(config)
    assert "step 12 of 12" in printed
    history = History.read(config.run)
    assert set(history.validation) == {"x", "y"}
    assert [step for step, _ in history.losses()] == [0, 4, 8, 12]
    assert history.size["params"] == sum(x.size for x in jax.tree.leaves(built(config)[1].params))
    assert history.seconds_per_step > 0
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").open()]
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(lines[-2])
    stored = json.loads((config.run / "config.json").read_text())
    assert stored["versions"]["jax"] == jax.__version__
    assert from_json(TrainLlama, stored["config"]) == config
    # TensorBoard's format: length, checksum, event, checksum.
    (events,) = (config.run / "tensorboard").iterdir()
    content, tags = events.read_bytes(), set()
    while content:
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        tags |= {value.tag for value in event.summary.value}
        content = content[16 + length :]
    assert {"loss", "tokens_per_second", "validation/x/loss", "validation/y/loss"} <= tags


@pytest.mark.parametrize(
    "config",
    [
        TrainLlama(run=Path("a/b"), data=TextData("x.txt", cache=Path("c"), validation=None)),
        TrainLlama(validation_examples=None, settings=Settings(mu_x=0.9)),
        TrainViT(label_smoothing=0.1),
    ],
)
def test_a_stored_configuration_is_read_back(config):
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("schedule", "numbers"),
    [
        ("cosine", {0: 0.0, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("constant", {0: 0.0, 10: 1.0, 100: 1.0}),
        ("wsd", {0: 0.0, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    ],
)
@pytest.mark.parametrize("warmup", [0.1, 10.0])
def test_schedules(schedule, numbers, warmup):
    settings = Settings(1.0, schedule=schedule, warmup=warmup, decay=0.2)
    learning_rate = optimizers.schedule(settings, 100)
    for step, value in numbers.items():
        assert float(learning_rate(step)) == pytest.approx(value, abs=1e-6), step


# A window of 10 of 100 steps, a learning rate that grows in 20 and falls to a half in 40 more.
@pytest.mark.parametrize(
    ("average", "weights"),
    [
        ("annealed", {0: 1.0, 4: 1 / 2, 20: 1 / 10, 60: 1 / 5, 99: 1.0}),
        ("warmed-up", {0: 1.0, 4: 1 / 5, 20: 1 / 10, 99: 1 / 10}),
        ("constant", {0: 1 / 10, 99: 1 / 10}),
        ("polynomial", {0: 1.0, 4: 1 / 5, 99: 1 / 100}),
        ("lr-weighted", {1: 1.0, 2: 4 / 5, 20: 1 / (sum((i / 20) ** 2 for i in range(20)) + 1)}),
    ],
)
def test_averages(average, weights):
    settings = Settings(1.0, schedule="linear", warmup=0.2, window=0.1, average=average)
    mu_x = optimizers.average(settings, optimizers.schedule(settings, 100), 100)
    for step, weight in weights.items():
        now = mu_x(step) if callable(mu_x) else mu_x
        assert 1 - float(now) == pytest.approx(weight, abs=1e-5), step


def test_the_smallest_presets_have_the_recipe_of_the_readme():
    for kind in (TrainLlama, TrainViT):
        adamw, gpa = (kind.preset_settings("tiny", name) for name in ("adamw", "gpa-adamw"))
        assert adamw.schedule == "linear"
        assert gpa.learning_rate == 2 * adamw.learning_rate
        assert (gpa.warmup, gpa.b1, gpa.mu_y) == (0.2, 0.0, 0.9)
        assert (gpa.schedule, gpa.average) == ("constant", "lr-weighted")
    large = TrainLlama.preset_settings("8b", "gpa-adamw")
    assert (large.schedule, large.average) == ("cosine", "annealed")


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory):
    """A model of one layer: its config, its first state, and the loss of a batch."""
    model = dataclasses.replace(SMALL, layers=1)
    config = llama(tmp_path_factory.mktemp("by_heart"), model=model)
    _, state, batch = built(config)
    graph = nnx.graphdef(config.task().new_model(nnx.Rngs(0)))

    def loss(params):
        rows = {"tokens": batch["tokens"][0]}
        return config.task().metrics(nnx.merge(graph, params), rows, None)["loss"].mean()

    return config, state.params, jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_a_batch_by_heart(name, by_heart):
    """With the gradients of one program for all, so that only their updates are compiled."""
    config, params, value_and_grad = by_heart
    settings = dataclasses.replace(config.preset_settings("tiny", name), sync_period=4)
    optimizer = optimizers.named_optimizer(name, settings, 80)

    @jax.jit
    def step(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    first = float(value_and_grad(params)[0])
    for done in range(1, 81):
        params, opt_state = step(params, opt_state, value_and_grad(params)[1])
        if done == 55:  # at the end of the schedule x and y meet
            x = optimizer.eval_params(opt_state, params)
            same = jax.tree.map(lambda a, b: bool((a == b).all()), x, params)
    assert first == pytest.approx(np.log(300), abs=0.2)
    assert value_and_grad(optimizer.eval_params(opt_state, params))[0] < first - 1.0
    plain = split(name)[0] == ""
    assert all(jax.tree.leaves(same)) == plain, "only a plain optimizer is evaluated at its params"


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_any_optimizer_keeps_the_shapes_and_dtypes_of_the_state(name, tmp_path):
    config = llama(tmp_path, optimizer=name)
    program = build(config, config.task(), make_mesh(1, jax.devices()[:1]))
    with jax.set_mesh(program.mesh):
        after, _ = jax.eval_shape(program.step, program.state, program.batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, program.state)


def test_norms_do_not_decay_and_muon_takes_each_layers_matrices(tmp_path):
    _, state, _ = built(llama(tmp_path))
    decaying = optimizers.decays(state.params)
    assert decaying["embed"]["embedding"]
    assert decaying["blocks"]["mlp"]["up"]["kernel"]
    assert not decaying["norm"]["scale"]
    assert not decaying["blocks"]["mlp_norm"]["scale"]
    matrices = optimizers.hidden_matrices(state.params)
    assert matrices["embed"]["embedding"] is None
    assert matrices["blocks"]["mlp_norm"]["scale"] is None
    # A layer's update does not depend on the gradient of another layer.
    optimizer = optimizers.named_optimizer("muon", Settings(1.0, warmup=0.0, weight_decay=0.0), 100)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), state.params)
    scaled = jax.tree.map(lambda g: g, grads)
    up = scaled["blocks"]["mlp"]["up"]["kernel"]
    scaled["blocks"]["mlp"]["up"]["kernel"] = up.at[1].multiply(-1.0)
    updates = []
    for tree in (grads, scaled):
        opt_state = optimizer.init(state.params)
        for _ in range(2):
            update, opt_state = optimizer.update(tree, opt_state, state.params)
        updates.append(update["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(updates[0][0], updates[1][0], atol=1e-5)
    np.testing.assert_allclose(updates[0][1], -updates[1][1], atol=1e-5)
    singular = np.linalg.svd(updates[0][0], compute_uv=False)
    assert singular.max() < 2 * singular.min()
