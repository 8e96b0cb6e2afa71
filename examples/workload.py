"""What a workload, such as a Llama on text, gives to the trainer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import grain
import jax
from flax import nnx

Batch = Mapping[str, Any]


class Task(NamedTuple):
    """A model and its loss."""

    new_model: Callable[[nnx.Rngs], nnx.Module]
    metrics: Callable[[nnx.Module, Batch, jax.Array | None], dict[str, jax.Array]]
    """Maps a model, a batch and a key for dropout (None: no dropout) to numbers for each example,
    among them its "loss"."""
    example: dict[str, jax.ShapeDtypeStruct]
    """Shapes and dtypes of one example."""
    unit: str
    """What throughput counts: tokens or images."""
    units: int
    """How many tokens or images an example has."""


class Data(Protocol):
    """Where examples come from; see `examples.llama.data` and `examples.vit.data`."""

    description: str
    files: Mapping[str, Any]
    """What has to be stored with a run to use its weights, as JSON, by name of file."""
    without_effect: Mapping[str, str]
    """The flags that have no effect on this data, such as --data.held-out, each with the reason."""

    def train(
        self, batch_size: int, seed: int, process_index: int, process_count: int, **how: Any
    ) -> grain.DatasetIterator:
        """The rows process_index, process_index + process_count, ... of each batch. The batches
        depend on `batch_size`, `seed` and `how` alone. The iterator states of all processes, merged
        into one dict, can be restored by each of any other number of processes."""

    def validation(
        self,
        count: int | None,
        batch_size: int,
        process_index: int,
        process_count: int,
        **how: Any,
    ) -> Any: ...
