"""An exported run is the same model in transformers; sampling continues a text."""

import dataclasses
import io
import itertools
import json
import os
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER, "safetensors", "tensorboardX")
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console
from tokenizers import processors

from examples import checkpoints
from examples.commands import run_command, start_or_resume
from examples.config import from_json, to_json
from examples.files import write_json
from examples.llama import tokenizing
from examples.llama.config import TrainLlama
from examples.llama.data import TextData
from examples.llama.export import export, write
from examples.llama.model import Llama, LlamaConfig
from examples.llama.runs import load
from examples.llama.sampling import generate, sample
from examples.metrics import History
from examples.run_folder import to_store
from examples.settings import Settings
from examples.sharding import make_mesh
from examples.train import build

LENGTH = 12
SMALL = LlamaConfig(vocab_size=300, dim=16, layers=3, heads=4, kv_heads=2, hidden=24)
CONFIGS = {
    "tied": SMALL,
    "untied": dataclasses.replace(SMALL, tied=False),
    "one-head-each": dataclasses.replace(SMALL, kv_heads=4),
    "rope-theta": dataclasses.replace(SMALL, rope_theta=50.0),
    "norm-eps": dataclasses.replace(SMALL, norm_eps=0.1),
}
TEXT = ["def one(x):\n    return x + 1\n", "Größe: 3 µm — ☃, tabs\tand  spaces .\n"] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizing.byte_pair_encoding(TEXT, 300)


@pytest.fixture(scope="module")
def letters():
    return tokenizing.single_bytes()


def numbers(abstract, seed=0):
    """Random leaves of these shapes, with nothing compiled; those of norms are around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        around = float("scale" in jax.tree_util.keystr(path))
        return jnp.asarray(rng.normal(around, 0.3, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def model_of(config):
    """With weights so large that every one of them matters."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0))))
    return nnx.merge(graph, numbers(nnx.to_pure_dict(params)))


def transformers_model(folder):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found, notes = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(notes.values()), notes
    return found


def transformers_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def tokens(seed=0, rows=2):
    return np.random.default_rng(seed).integers(0, 300, (rows, LENGTH))


def their_logits(found, tokens_BxL):
    import torch

    with torch.no_grad():
        return found(torch.tensor(tokens_BxL)).logits.float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_finds_the_same_logits(tmp_path, tokenizer, name):
    model = model_of(CONFIGS[name])
    write(tmp_path, model, tokenizer, LENGTH, "float32")
    found = transformers_model(tmp_path)
    ours = np.asarray(model(jnp.array(tokens())))
    assert np.ptp(ours) > 1
    np.testing.assert_allclose(their_logits(found, tokens()), ours, rtol=0, atol=1e-4)
    assert found.config.tie_word_embeddings is model.config.tied
    assert found.config.max_position_embeddings == LENGTH
    assert found.config.eos_token_id == tokenizer.token_to_id("<|end|>")


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_bfloat16_export_loads_in_bfloat16(tmp_path, tokenizer, param_dtype):
    import ml_dtypes

    model = model_of(dataclasses.replace(SMALL, param_dtype=param_dtype))
    write(tmp_path, model, tokenizer, LENGTH, "bfloat16")
    found = transformers_model(tmp_path)
    assert str(found.dtype) == "torch.bfloat16"
    ours = np.asarray(model.embed.embedding.get_value()).astype(ml_dtypes.bfloat16)
    theirs = found.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(theirs, ours.astype(np.float32))
    rough = np.abs(their_logits(found, tokens()) - np.asarray(model(jnp.array(tokens()))))
    assert 0 < rough.max() < 0.5


def test_bfloat16_params_export_as_float32_exactly(tmp_path, tokenizer):
    model = model_of(dataclasses.replace(SMALL, param_dtype="bfloat16"))
    write(tmp_path, model, tokenizer, LENGTH, "float32")
    found = transformers_model(tmp_path)
    ours = np.asarray(model(jnp.array(tokens())))
    np.testing.assert_allclose(their_logits(found, tokens()), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_large_weights_are_spread_over_files(tmp_path, tokenizer, tied):
    model = model_of(dataclasses.replace(SMALL, tied=tied))
    write(tmp_path, model, tokenizer, LENGTH, "float32", limit=8000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    embedding = 300 * 16 * 4  # a tensor is never cut, even if it alone has more than the limit
    assert all(file.stat().st_size < max(8000, embedding) + 2000 for file in files)
    sizes = [file.stat().st_size for file in files]
    assert all(size + after > 8000 for size, after in itertools.pairwise(sizes))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert index["metadata"]["total_size"] == 4 * params
    found = transformers_model(tmp_path)
    ours = np.asarray(model(jnp.array(tokens())))
    np.testing.assert_allclose(their_logits(found, tokens()), ours, rtol=0, atol=1e-4)


def test_others_may_read_the_files_that_others_may_read(tmp_path, tokenizer):
    write(tmp_path, model_of(SMALL), tokenizer, LENGTH, "float32")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_exported_tokenizer_encodes_alike_and_decodes_back(tmp_path, tokenizer):
    write(tmp_path, model_of(SMALL), tokenizer, LENGTH, "float32")
    found = transformers_tokenizer(tmp_path)
    for text in (*TEXT[:2], "", " 🦙 don't , you 're .\r\n\n  "):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert found(text)["input_ids"] == ids
        assert found.decode(ids) == text
    assert found.eos_token == found.bos_token == "<|end|>"
    assert found.model_max_length == LENGTH


@pytest.mark.parametrize("prompt", ["def ", "☃", "a"])
def test_greedy_sampling_writes_what_transformers_generates(tmp_path, tokenizer, prompt):
    model = model_of(SMALL)
    write(tmp_path, model, tokenizer, LENGTH, "float32")
    found, their_tokenizer = transformers_model(tmp_path), transformers_tokenizer(tmp_path)
    inputs = their_tokenizer(prompt, return_tensors="pt")
    count = LENGTH - inputs["input_ids"].shape[1]
    theirs = found.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    ours = generate(model, tokenizer, prompt, count, LENGTH, temperature=0.0)
    assert ours == their_tokenizer.decode(theirs, skip_special_tokens=True)
    assert len(ours) > len(prompt)


class Told:
    """Instead of a model: says what it saw last, and always predicts the same token."""

    def __init__(self, monkeypatch, *answers):
        self.seen, self.answers = [], list(answers)
        monkeypatch.setattr("examples.llama.sampling.draw", self)

    def __call__(self, graph, params, tokens_L, length, key, step, temperature):
        self.seen.append((len(tokens_L), list(tokens_L[:length])))
        return self.answers[step % len(self.answers)]


def test_the_model_sees_the_last_tokens_of_the_window(letters, monkeypatch):
    ids = letters.encode("abcdefgh").ids
    x, y = letters.encode("xy").ids
    told = Told(monkeypatch, x, y)
    text = generate(model_of(SMALL), letters, "abcdefgh", 4, window=10)
    assert text == "abcdefghxyxy"
    assert told.seen == [
        (10, ids),
        (10, [*ids, x]),
        (10, [*ids, x, y]),
        (10, [*ids[1:], x, y, x]),
    ]


def test_a_prompt_longer_than_the_window_is_printed_whole(letters, monkeypatch):
    ids = letters.encode("abcdefgh").ids
    told = Told(monkeypatch, ids[0])
    assert generate(model_of(SMALL), letters, "abcdefgh", 1, window=3) == "abcdefgha"
    assert told.seen == [(3, ids[-3:])]


def test_sampling_stops_at_the_end_of_the_document(letters, monkeypatch):
    (x,) = letters.encode("x").ids
    told = Told(monkeypatch, x, x, letters.token_to_id("<|end|>"), x)
    assert generate(model_of(SMALL), letters, "a", 50, window=8) == "axx"
    assert len(told.seen) == 3


def test_an_empty_prompt_begins_a_document(letters, monkeypatch):
    (x,) = letters.encode("x").ids
    told = Told(monkeypatch, x)
    assert generate(model_of(SMALL), letters, "", 2, window=8) == "xx"
    assert told.seen[0] == (8, [letters.token_to_id("<|end|>")])


def test_padding_is_out_of_sight(tokenizer):
    model = model_of(SMALL)
    for window in (8, 40):
        assert generate(model, tokenizer, "abc", 5, window, temperature=0.0) == generate(
            model, tokenizer, "abc", 5, 20, temperature=0.0
        )


def test_sampling_is_decided_by_its_seed(tokenizer):
    model = Llama(SMALL, nnx.Rngs(0))  # hardly prefers any token, and may end the document
    first = [generate(model, tokenizer, "def ", 30, LENGTH, seed) for seed in range(4)]
    again = [generate(model, tokenizer, "def ", 30, LENGTH, seed) for seed in range(4)]
    assert first == again
    assert len(set(first)) == 4
    assert all(text.startswith("def ") for text in first)
    assert first[0].startswith(generate(model, tokenizer, "def ", 3, LENGTH, 0).rstrip("\ufffd"))


def test_a_higher_temperature_is_more_random(tokenizer):
    model = model_of(SMALL)
    greedy = generate(model, tokenizer, "def ", 8, LENGTH, temperature=0.0)

    def different(temperature):
        return {generate(model, tokenizer, "def ", 8, LENGTH, i, temperature) for i in range(6)}

    assert different(1e-3) == {greedy}
    assert len(different(1.0)) > 2


# Runs.


def config_of(folder, source, **changes):
    return dataclasses.replace(
        TrainLlama(
            run=folder,
            steps=12,
            batch_size=8,
            length=LENGTH,
            evaluate_every=4,
            validation_examples=8,
            evaluate_y=True,
            keep=3,
            data=TextData(source=str(source), tokenizer="bytes", cache=folder.parent / "cache"),
            model=dataclasses.replace(SMALL, vocab_size=257),
            settings=Settings(learning_rate=0.02, schedule="constant", mu_x=0.9),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of GPA-AdamW with its state split over four of eight devices, and its corpus."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for i, text in enumerate(TEXT):
        (folder / "text" / f"{i}.txt").write_text(f"{i} {text}" * 3)
    config = config_of(folder / "run", folder / "text", fsdp=4)
    start_or_resume(config, Console(quiet=True), config.open_data())
    return config


def command(function, *arguments):
    """Runs a command as main does; returns its exit status and what it printed."""
    console = Console(record=True, width=400, file=io.StringIO())
    status = 0

    def call(arguments, _):
        return function([str(argument) for argument in arguments], console)

    try:
        status = run_command(call, arguments)
    except SystemExit as error:
        status = error.code
    return status, console.export_text()


def test_an_exported_run_is_x_and_not_y(trained, tmp_path):
    torch = pytest.importorskip("torch")
    assert command(export, trained.run, tmp_path / "out")[0] == 0
    found = transformers_model(tmp_path / "out")
    losses = []
    for batch in trained.open_data().validation(8, 8, 0, 1, length=LENGTH):
        tokens_BxL = torch.tensor(batch["tokens"]).long()
        with torch.no_grad():
            logits = found(tokens_BxL[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits.mT, tokens_BxL[:, 1:]).item())
    history = History.read(trained.run)
    assert np.mean(losses) == pytest.approx(history.last("x")["loss"], abs=1e-5)
    assert abs(np.mean(losses) - history.last("y")["loss"]) > 1e-3


def test_a_run_is_restored_on_one_device(trained):
    config, model, tokenizer = load(trained.run)
    assert config == dataclasses.replace(trained, run=trained.run)
    assert tokenizer.get_vocab_size() == 257
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(len(leaf.sharding.device_set) == 1 for leaf in leaves)
    raw = ocp.StandardCheckpointer().restore(trained.run.absolute() / "checkpoints/12/state")
    y = raw["params"]["blocks"]["mlp"]["up"]["kernel"]
    x = model.blocks.mlp.up.kernel.get_value()
    assert x.shape == y.shape
    assert not np.allclose(x, y, atol=1e-4)


def test_a_checkpoint_can_be_chosen(trained):
    def embedding(checkpoint):
        return np.asarray(load(trained.run, checkpoint).model.embed.embedding.get_value())

    losses = dict(History.read(trained.run).losses())
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    np.testing.assert_array_equal(embedding("latest"), embedding(12))
    np.testing.assert_array_equal(embedding("best"), embedding(best))
    assert not np.array_equal(embedding(4), embedding(8))


def test_best_is_by_validation_loss(trained, tmp_path):
    lines = (trained.run / "metrics.jsonl").read_text().splitlines()
    better = json.dumps({"step": 8, "validation": {"x": {"loss": 0.0}}})
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (copy / name).write_text((trained.run / name).read_text())
    (copy / "checkpoints").symlink_to(trained.run / "checkpoints")
    (copy / "metrics.jsonl").write_text("\n".join([*lines, better]) + "\n")
    best, eighth = load(copy, "best").model, load(trained.run, 8).model
    np.testing.assert_array_equal(
        best.embed.embedding.get_value(), eighth.embed.embedding.get_value()
    )


@pytest.mark.parametrize(
    "optimizer", ["adamw", "schedule-free-adamw", "diloco-lion", "ema-sgd", "gpa-muon"]
)
def test_runs_of_every_kind_of_optimizer_are_read_back(trained, tmp_path, optimizer):
    config = dataclasses.replace(trained, run=tmp_path, optimizer=optimizer)
    program = build(config, config.task(), make_mesh(1, jax.devices()[:1]))
    state = numbers(program.state)
    with checkpoints.opened(tmp_path / "checkpoints", keep=1) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    write_json(tmp_path / "config.json", to_store(config))
    (tmp_path / "tokenizer.json").write_text((trained.run / "tokenizer.json").read_text())
    expected = program.optimizer.eval_params(state.opt_state, state.params)
    found = nnx.to_pure_dict(nnx.state(load(tmp_path).model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_corpus_is_not_needed(trained, tmp_path, monkeypatch):
    def missing(*_):
        raise AssertionError("the corpus was opened")

    monkeypatch.setattr(TextData, "prepare", missing)
    assert command(export, trained.run, tmp_path / "out")[0] == 0
    status, text = command(sample, trained.run, "def ", "--tokens", 5)
    assert status == 0
    assert text.startswith("def ")


def test_reading_a_run_changes_nothing_in_it(trained):
    unfinished = trained.run / "checkpoints" / "16.orbax-checkpoint-tmp-1"
    unfinished.mkdir()

    def listing():
        return sorted((path, path.stat().st_mtime_ns) for path in trained.run.rglob("*"))

    before = listing()
    load(trained.run)
    after = listing()
    unfinished.rmdir()
    assert before == after


def test_the_sample_command_is_decided_by_its_flags(trained):
    flags = trained.run, "Größe [red] :smile: ", "--tokens", 20, "--seed"
    one, other = command(sample, *flags, 1), command(sample, *flags, 2)
    assert one == command(sample, *flags, 1)
    assert one != other
    assert one[1].startswith("Größe [red] :smile: ")
    greedy = [command(sample, *flags, seed, "--temperature", 0) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_given_tokenizers_template_is_left_out(trained, tmp_path):
    """Training put no token before a text, so neither do export and sampling."""
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text((trained.run / "config.json").read_text())
    (copy / "checkpoints").symlink_to(trained.run / "checkpoints")
    given = load(trained.run).tokenizer
    given.post_processor = processors.TemplateProcessing("<|end|> $A", None, [("<|end|>", 0)])
    given.save(str(copy / "tokenizer.json"))
    assert command(export, copy, tmp_path / "out")[0] == 0
    found = transformers_tokenizer(tmp_path / "out")
    assert found("abc")["input_ids"] == load(trained.run).tokenizer.encode("abc").ids


def test_resuming_with_another_tokenizer_is_refused(trained, tokenizer):
    class Changed:
        description = "the text as it is today"
        files: ClassVar = {"tokenizer.json": json.loads(tokenizer.to_str())}

    before = (trained.run / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="started with other data, as its tokenizer"):
        start_or_resume(trained, Console(quiet=True), Changed())
    assert (trained.run / "tokenizer.json").read_text() == before


# Errors: one sentence, and nothing is left behind.


def test_nothing_is_overwritten(trained, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    status, text = command(export, trained.run, out)
    assert (status, text) == (2, "")
    with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
        export([str(trained.run), str(out)], Console(quiet=True))
    with pytest.raises(ValueError, match="exists already"):
        export([str(trained.run), str(out / "notes")], Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "notes").read_text() == "mine"


def test_an_empty_folder_is_filled_and_parents_are_made(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert command(export, trained.run, out, "--dtype", "bfloat16")[0] == 0
        assert (out / "model.safetensors").exists()
    assert sorted(os.listdir(tmp_path)) == ["a", "empty"]
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_failed_export_leaves_nothing(trained, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint of that step"):
        export([str(trained.run), str(tmp_path / "out"), "--checkpoint", "5"], Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", [export, sample])
def test_what_is_no_run_is_named_in_one_sentence(trained, tmp_path, function):
    stored = json.loads((trained.run / "config.json").read_text())
    other = json.loads(json.dumps(stored))
    del other["config"]["settings"]["mu_y"]

    def fails(config, tokenizer, match, *flags):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        for name, content in (("config.json", config), ("tokenizer.json", tokenizer)):
            if content is not None:
                (folder / name).write_text(content)
        with pytest.raises(ValueError, match=match) as caught:
            function([str(folder), str(tmp_path / "out"), *flags], Console(quiet=True))
        assert str(caught.value).count("\n") == 0

    tokenizer = (trained.run / "tokenizer.json").read_text()
    fails(None, None, "is not the folder of a run: it has no config.json")
    fails(json.dumps(other), None, "lacks mu_y: .* another version")
    fails(json.dumps({"config": {"patch": 4}}), None, "lacks .*: the run is not of a Llama")
    fails(json.dumps(stored), None, "has no tokenizer.json")
    fails(None, tokenizer, "has no checkpoint yet")
    (tmp_path / "run" / "checkpoints").symlink_to(trained.run / "checkpoints")
    fails(None, None, "no checkpoint of that step; it has 4, 8, 12", "--checkpoint", "7")
    fails(None, None, "--checkpoint best: no checkpoint in", "--checkpoint", "best")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--tokens", "0"], ["--temperature", "-1"], ["--seed", "x"]])
def test_sample_refuses_senseless_flags(trained, flags, capsys):
    assert command(sample, trained.run, "a", *flags)[0] == 2
    assert flags[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize("function", [export, sample])
def test_help_names_every_argument(function, capsys):
    with pytest.raises(SystemExit):
        function(["--help"], Console())
    shown = capsys.readouterr().out
    assert f"python -m examples.llama {function.__name__}" in shown
    assert "RUN" in shown
    for line in shown.split("╭")[1:]:
        assert "(default" in line or "(required)" in line


# What a run stores of its flags.


@dataclasses.dataclass(frozen=True)
class Inner:
    path: Path | None = None
    pair: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 1e-3
    name: str | None = None
    flag: bool | None = None
    place: Path = Path("a/b")


@pytest.mark.parametrize(
    "config",
    [
        Outer(),
        Outer(Inner(Path("x"), (3,)), 2.5, "n", False, Path("/c")),
        Outer(Inner(None, ())),
        TrainLlama(run=Path("runs/a"), resume=True, validation_examples=None),
        TrainLlama(data=TextData(source="a/*.txt", readers=2, cache=Path("c"))),
    ],
)
def test_stored_flags_are_read_back(config):
    stored = json.loads(json.dumps(to_json(config)))
    assert from_json(type(config), stored) == config
