"""The Llama workload: its configuration, presets and loss."""

import dataclasses
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from examples.config import Distributed, OneRun, Training, check_master_copy
from examples.llama.data import Text, TextData
from examples.llama.model import PRESETS, Llama, LlamaConfig
from examples.settings import Name, Settings, default_settings
from examples.workload import Batch, Task

Preset = Literal["tiny", "15m", "160m", "1b", "8b"]


@dataclasses.dataclass(frozen=True)
class LlamaFlags(Training):
    """The flags of every command that trains Llamas."""

    preset: Preset = "tiny"
    """Size, which decides the other defaults: tiny (0.25M parameters), 15m, 160m
    (JackFram/llama-160m), 1b (Llama 3.2 1B), 8b (Llama 3 8B)."""
    length: int = 64
    """Tokens in a sequence."""
    data: TextData = TextData()
    model: LlamaConfig = PRESETS["tiny"]
    distributed: Annotated[Distributed, tyro.conf.arg(name="")] = Distributed()

    def __post_init__(self):
        super().__post_init__()
        if self.length < 1:
            raise ValueError(f"--length must be at least 1, got {self.length}.")

    workload = "llama"
    PRESETS = PRESETS

    @property
    def data_options(self) -> dict[str, int]:
        return {"length": self.length}

    def open_data(self) -> Text:
        return self.data.prepare(self.model.vocab_size)

    def fitted(self, data: Text) -> Self:
        return self

    def task(self) -> Task:
        return Task(
            lambda rngs: Llama(self.model, rngs),
            next_token,
            {"tokens": jax.ShapeDtypeStruct((self.length + 1,), jnp.int32)},
            "tokens",
            self.length,
        )

    @staticmethod
    def preset_values(preset: Preset) -> dict[str, Any]:
        """The defaults of a preset."""
        return {"preset": preset, "model": PRESETS[preset], **RUNS[preset]}

    @staticmethod
    def preset_settings(preset: Preset, optimizer: Name) -> Settings:
        """The defaults of an optimizer for a preset."""
        small = preset == "tiny"
        warmup = 0.15 if small else 0.05
        return default_settings(optimizer, LEARNING_RATES[preset], warmup, small)


@dataclasses.dataclass(frozen=True)
class TrainLlama(OneRun, LlamaFlags):
    """Trains a Llama on text: Python's standard library, your own files, or a dataset of the
    Hugging Face hub.

    Ctrl-C saves a checkpoint and stops; the same command resumes from there. Other commands:
    export, sample, plan (each has a --help), and python -m examples.compare llama.
    """

    def __post_init__(self):
        super().__post_init__()
        check_master_copy(self.model.param_dtype, self.optimizer)


# Batches of the larger presets: half a million to four million tokens, as for models of that size.
RUNS = {
    "tiny": {"steps": 1000, "batch_size": 40, "length": 64},
    "15m": {"steps": 5000, "batch_size": 32, "length": 256},
    "160m": {
        "steps": 20_000, "batch_size": 256, "length": 2048, "validation_examples": 2048,
        "evaluate_every": 1000,
    },
    "1b": {
        "steps": 50_000, "batch_size": 512, "length": 4096, "validation_examples": 2048,
        "evaluate_every": 1000,
    },
    "8b": {
        "steps": 100_000, "batch_size": 512, "length": 8192, "validation_examples": 2048,
        "evaluate_every": 1000,
    },
}  # fmt: skip
# Peak learning rates for AdamW. tiny's was tuned (examples/README.md); 8b's is that of Llama 3
# (arXiv 2407.21783, table 3); the others lie between and are where a search would start.
LEARNING_RATES = {"tiny": 1.6e-2, "15m": 2e-3, "160m": 1e-3, "1b": 5e-4, "8b": 3e-4}


def next_token(model: nnx.Module, batch: Batch, key: jax.Array | None) -> dict[str, jax.Array]:
    """Cross-entropy of each token after the first, in nats, averaged over each sequence."""
    tokens_BxL = batch["tokens"]
    logits_BxLxV = model(tokens_BxL[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxL[:, 1:])
    return {"loss": losses.mean(axis=1)}
