"""What the measurements should give, on paper: operations and bytes against a GPU's peaks."""

from typing import NamedTuple


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
# What large copies and products reach of the peaks, as a rule.
REACHED_BANDWIDTH, REACHED_PRODUCTS = 0.9, 0.8


class Work(NamedTuple):
    """What something has to do at least."""

    bytes: float
    """Moved through the GPU's memory."""
    operations: float = 0.0
    """In matrix products."""
    dtype: str = "bfloat16"
    """Of the matrices."""

    def seconds(self, peaks: Peaks | None) -> float | None:
        """How long it should take, one after the other; None if nothing is known of the GPU."""
        if peaks is None:
            return None
        moving = self.bytes / (REACHED_BANDWIDTH * peaks.bandwidth)
        return moving + self.operations / (REACHED_PRODUCTS * getattr(peaks, self.dtype))


def peaks_of(kind: str) -> Peaks | None:
    """Of a device by the name that JAX gives it."""
    return next((peaks for name, peaks in PEAKS.items() if name in kind), None)
