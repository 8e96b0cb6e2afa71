"""What the measurements should give, on paper: operations and bytes against a GPU's peaks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from examples.llama.model import LlamaConfig, training_flops


class Peaks(NamedTuple):
    """Of a GPU, from its data sheet: bytes and floating-point operations a second."""

    bandwidth: float
    bfloat16: float
    float32: float
    """Products of float32 matrices, which XLA computes in TF32."""


# NVIDIA's data sheets of the SXM parts, without sparsity.
PEAKS = {
    "H100": Peaks(3.35e12, 989e12, 494e12),
    "H200": Peaks(4.8e12, 989e12, 494e12),
}
# The part of the peaks that large copies and products reach, as a rule.
REACHED_BANDWIDTH, REACHED_PRODUCTS = 0.9, 0.8


class Work(NamedTuple):
    """What something has to do at least."""

    bytes: float
    """Moved through the GPU's memory."""
    operations: float = 0.0
    """In matrix products."""
    dtype: str = "bfloat16"
    """Of the matrices."""

    def more(self, moved: float) -> "Work":
        """The same work with `moved` more bytes."""
        return self._replace(bytes=self.bytes + moved)

    def seconds(self, peaks: Peaks | None) -> float | None:
        """How long it should take, if moving and computing do not overlap; None if the GPU is not
        known."""
        if peaks is None:
            return None
        moving = self.bytes / (REACHED_BANDWIDTH * peaks.bandwidth)
        return moving + self.operations / (REACHED_PRODUCTS * getattr(peaks, self.dtype))


def peaks_of(kind: str) -> Peaks | None:
    """Of a device by the name that JAX gives it."""
    return next((peaks for name, peaks in PEAKS.items() if name in kind), None)


def backward(config: LlamaConfig, sequences: int, length: int, params: int) -> Work:
    """The work of a forward and backward pass.

    Bytes are those of the large arrays. XLA keeps attention's scores in memory: in float32 for the
    softmax, in the precision of the computation after it. Written, copied by the scan over blocks
    to where the backward pass finds them, read again, and with their derivatives, they are some 64
    bytes a score. Logits, with float32 for the loss and its derivative, are 34 bytes each. What a
    block keeps, ten arrays of the model's width and three of SwiGLU's, is moved six times.
    """
    width, tokens = jnp.dtype(config.dtype).itemsize, sequences * length
    scores = config.layers * sequences * config.heads * length**2
    kept = config.layers * tokens * (10 * config.dim + 3 * config.hidden)
    moved = 64 * scores + 34 * tokens * config.vocab_size + 6 * kept * width
    # Params are read and cast, for each of the passes; gradients are written.
    moved += params * (4 + 2 * width + 4)
    return Work(moved, training_flops(config, sequences, length), config.dtype)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """The conditions under which a part measures."""

    folder: Path
    """For results."""
    corpus: Path
    quick: bool
    peaks: Peaks | None
    deadline: float
    """By the clock of `time.time`: nothing begins after it."""
    say: Callable[[str], None]
    """Reports the progress."""


class LeftOut(Exception):
    """Why something is not measured now."""
