"""Times contenders that take turns on a device, each many times in a row.

Time is by the host's clock, from the first dispatch to the end of a row of many runs, each of which
starts from the results of the one before. So the device is never idle, and the time of dispatching
is hidden behind its work. A profile, which would give the device's own clock, is not used for this,
because it makes launches slower and runs no command buffers. It only shows, in addition, what the
kernels took.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels import kernels_that_ran, longest, profiled

WARM_UP = 2
OUT_OF_MEMORY = "out of memory"


class Contender(Protocol):
    """One of several that take turns."""

    name: str
    multiple: int
    """It is run this many times in a row, or a multiple of that."""

    def prepare(self) -> None:
        """Takes the memory that it needs."""

    def run(self) -> None:
        """Starts what is measured, once more."""

    def wait(self) -> None:
        """Waits until all that was started has ended."""

    def release(self) -> None:
        """Gives its memory back."""


def take_turns(
    contenders: Sequence[Contender], rounds: int, row: float, deadline: float, least: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of one run of each contender, in each round; and those that failed, and why.

    Args:
      contenders: each has the memory to itself while it is measured.
      rounds: every contender has one turn in each, in an order that reverses from round to round.
      row: seconds that a turn should last.
      deadline: time after which no round begins, once `least` are done.
    """
    lengths: dict[str, int] = {}
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    for number in range(rounds):
        if number >= least and time.time() > deadline:
            break
        for contender in contenders[:: 1 if number % 2 == 0 else -1]:
            name = contender.name
            if name in failed:
                continue
            try:
                contender.prepare()
                timed(contender, WARM_UP)
                if name not in lengths:
                    seconds = timed(contender, contender.multiple)
                    times_in_a_row = max(1, round(row / (seconds * contender.multiple)))
                    lengths[name] = contender.multiple * times_in_a_row
                times[name].append(timed(contender, lengths[name]))
            except Exception as error:  # out of memory, or a library that does not work
                failed[name] = reason(error)
                del times[name]
            finally:
                contender.release()
    return times, failed


def timed(contender: Contender, count: int) -> float:
    """Seconds of one run, of `count` in a row."""
    contender.wait()
    start = time.perf_counter()
    for _ in range(count):
        contender.run()
    contender.wait()
    return (time.perf_counter() - start) / count


def reason(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    memory = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    return OUT_OF_MEMORY if memory else f"{type(error).__name__}: {text[:300]}"


def quartiles(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in np.quantile(values, (0.25, 0.5, 0.75))]


class Repeated:
    """A compiled function of arrays, called again and again."""

    multiple = 1

    def __init__(
        self, name: str, compiled: Any, make: Callable[[], tuple], *rest: Any, carried: bool = True
    ):
        """
        Args:
          make: makes the first arguments.
          rest: the other arguments, the same in each call.
          carried: whether the results are the first arguments of the next call.
        """
        self.name, self.compiled, self.make, self.rest = name, compiled, make, rest
        self.carried = carried
        self.arguments = self.results = ()

    def prepare(self) -> None:
        self.arguments = self.results = self.make()

    def run(self) -> None:
        self.results = self.compiled(*self.arguments, *self.rest)
        if self.carried:
            self.arguments = self.results

    def wait(self) -> None:
        jax.block_until_ready(self.results)

    def release(self) -> None:
        self.arguments = self.results = ()

    def profile(self, count: int = 3) -> dict[str, Any]:
        """What a few calls make the device do, by the device's own clock."""

        def several() -> None:
            for _ in range(count):
                self.run()
            self.wait()

        try:
            self.prepare()
            several()
            ran = profiled(several)
            return {
                "calls": count,
                "kernels": kernels_that_ran(ran, self.compiled.as_text()) / count,
                "launches": len(ran) / count,
                "seconds": sum(one.seconds for one in ran) / count,
                "longest": longest(ran),
            }
        except Exception as error:  # without a profile the times still count
            return {"failed": reason(error)}
        finally:
            self.release()

    def memory(self) -> int:
        """Bytes that the compiled function needs for all of its arrays."""
        found = self.compiled.memory_analysis()
        given, made = found.argument_size_in_bytes, found.output_size_in_bytes
        return given + made - found.alias_size_in_bytes + found.temp_size_in_bytes


COPY = jax.jit(lambda array: (jnp.copy(array),))
PRODUCT = jax.jit(lambda a, b: (a @ b,))


def copy_of(size: int) -> Repeated:
    """A copy of that many bytes on the device, which moves twice as many."""
    shape = jax.ShapeDtypeStruct((size // 4,), jnp.float32)
    compiled = COPY.lower(shape).compile()
    return Repeated("copy", compiled, lambda: (jax.random.normal(jax.random.key(0), shape.shape),))


def product_of(size: int) -> Repeated:
    """A product of two square bfloat16 matrices."""
    shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)

    def matrix(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape.shape, jnp.bfloat16)

    # Scaled, so that the entries of product after product stay as large as they are.
    compiled, scaled = PRODUCT.lower(shape, shape).compile(), matrix(1) * size**-0.5
    return Repeated("product", compiled, lambda: (matrix(0),), scaled)
