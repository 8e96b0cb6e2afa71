"""Small runs of the examples, for the tests of them."""

import contextlib
import dataclasses
import io
import random
import socket
from pathlib import Path

import jax
import numpy as np

from helpers.needs import TRAINER, needs

needs(*TRAINER)
from rich.console import Console

from examples import checkpoints, commands, sharding
from examples.commands import start_or_resume
from examples.llama.config import TrainLlama
from examples.llama.data import TextData
from examples.llama.model import LlamaConfig
from examples.train import build

SMALL = LlamaConfig(vocab_size=300, dim=16, layers=2, heads=4, kv_heads=2, hidden=32)


def write_text(folder: Path) -> Path:
    """Forty files of words, the same in each test."""
    words = [
        "the",
        "a",
        "of",
        "average",
        "step",
        "loss",
        "params",
        "takes",
        "gives",
        "moves",
        "slowly",
        "fast",
        "evaluation",
    ]
    chooser = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(40):
        text = " ".join(chooser.choice(words) for _ in range(400))
        (folder / f"{number:02}.txt").write_text(text + "\n")
    return folder


def llama(folder: Path, **changes) -> TrainLlama:
    """A run on the text in `folder / "text"`, which lasts a second."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    optimizer = changes.get("optimizer", "gpa-adamw")
    settings = dataclasses.replace(
        TrainLlama.preset_settings("tiny", optimizer), **changes.pop("settings", {})
    )
    values = {
        "run": folder / "run",
        "settings": settings,
        "steps": 12,
        "batch_size": 8,
        "length": 16,
        "evaluate_every": 4,
        "validation_examples": 16,
        "log_every": 1,
        "model": SMALL,
        "data": TextData(str(folder / "text"), shuffle=16, cache=folder / "cache"),
    }
    return TrainLlama(**values | changes)


def train(config) -> str:
    """Runs it here; returns what it printed."""
    out = io.StringIO()
    start_or_resume(config, Console(file=out, width=120), config.open_data())
    return out.getvalue()


@contextlib.contextmanager
def on_devices(count: int, monkeypatch):
    """The trainer sees only so many devices."""
    with monkeypatch.context() as patch:
        patch.setattr(
            commands, "make_mesh", lambda fsdp: sharding.make_mesh(fsdp, jax.devices()[:count])
        )
        yield


def built(config, devices: int = 1):
    """The program of a run on so many devices, its first state, and a batch."""
    mesh = sharding.make_mesh(config.fsdp, jax.devices()[:devices])
    program = build(config, config.task(), mesh)
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (config.batch_size, config.length + 1)
    )
    batch = {"tokens": tokens.astype(np.int32)}
    with jax.set_mesh(mesh):
        return program, program.initial(), sharding.place(batch, mesh, config.accumulate)


def saved(config, step, devices=1, fsdp=1):
    """The state in a run's checkpoint of that step."""
    config = dataclasses.replace(config, fsdp=fsdp)
    program = build(config, config.task(), sharding.make_mesh(fsdp, jax.devices()[:devices]))
    with checkpoints.opened(config.run / "checkpoints", keep=100) as manager:
        return checkpoints.restore(manager, step, program.state)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
