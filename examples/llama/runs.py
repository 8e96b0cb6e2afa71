"""Reads the folder of a run: the averaged weights, in the model and with the tokenizer that they
belong to. The corpus is not needed."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from examples import checkpoints
from examples.config import from_json
from examples.files import read_json
from examples.llama.config import TrainLlama
from examples.llama.model import Llama
from examples.metrics import History
from examples.sharding import make_mesh
from examples.train import build

Checkpoint = Literal["latest", "best"] | int


class Trained(NamedTuple):
    """The trained model of a run, at one of its checkpoints."""

    config: TrainLlama
    model: Llama
    """At the weights to evaluate, x, in the host's memory."""
    tokenizer: Tokenizer
    """Encodes as in training: adds no tokens of its own."""


def load(folder: Path, checkpoint: Checkpoint = "latest") -> Trained:
    """Reads a run, whatever devices it was trained on. A run that still trains is not disturbed.

    Args:
      folder: the run's.
      checkpoint: the last one, the one with the lowest validation loss, or that of a step.

    Raises:
      ValueError: if the folder is no run of a Llama or has no such checkpoint, or if the checkpoint
        is damaged.
    """
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    # Not `open_checkpoints`, which deletes what a trainer may be writing at the moment.
    options = ocp.CheckpointManagerOptions(create=False)
    path = (folder / "checkpoints").absolute()
    with contextlib.closing(ocp.CheckpointManager(path, options=options)) as manager:
        steps = manager.all_steps()
        step = choose(folder, steps, checkpoint)
        program = build(config, config.task(), make_mesh(1, [host()]))
        try:
            checkpoints.check(path / str(step), program.state)
        except checkpoints.DamagedError as error:
            others = sorted(set(steps) - {step})
            if not others:
                raise
            there = ", ".join(map(str, others))
            raise ValueError(f"{error} There are others: --checkpoint {there}.") from None
        state = checkpoints.restore(manager, step, program.state)
    x = program.optimizer.eval_params(state.opt_state, state.params)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(config.model, nnx.Rngs(0))))
    return Trained(config, nnx.merge(graph, x), tokenizer)


def read_config(folder: Path) -> TrainLlama:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json.")
    try:
        return from_json(TrainLlama, read_json(path)["config"])
    except KeyError as error:
        raise ValueError(
            f"{path} lacks {error.args[0]}: the run is not of a Llama, or was made by another "
            "version of these examples."
        ) from None


def read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: the command that trained writes it.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"{path} is damaged, it is no tokenizer: {error}.") from None
    tokenizer.post_processor = None  # which in other people's tokenizers adds tokens
    return tokenizer


def choose(folder: Path, steps: Sequence[int], checkpoint: Checkpoint) -> int:
    """The step that is asked for, of those that are there."""
    if not steps:
        raise ValueError(f"{folder} has no checkpoint yet.")
    if checkpoint == "latest":
        return max(steps)
    if checkpoint == "best":
        losses = {
            step: loss
            for step, loss in History.read(folder).losses()
            if step in steps and math.isfinite(loss)
        }
        if not losses:
            raise ValueError(
                f"--checkpoint best: no checkpoint in {folder} was evaluated; give latest."
            )
        return min(losses, key=losses.__getitem__)
    if checkpoint not in steps:
        there = ", ".join(str(step) for step in sorted(steps))
        raise ValueError(
            f"--checkpoint {checkpoint}: {folder} has no checkpoint of that step; it has {there}."
        )
    return checkpoint


def host() -> jax.Device:
    """The CPU, because an accelerator may be too small for the whole state, or busy."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.local_devices()[0]
