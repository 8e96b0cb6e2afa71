"""Ctrl-C and SIGTERM: the run saves a checkpoint and stops."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp


class End(NamedTuple):
    """How training ended."""

    done: int
    """Updates made in all."""
    stopped_by: signal.Signals | None
    """What stopped it before the last one, if anything did."""

    @property
    def status(self) -> int:
        """The exit status of the command. Whoever sends SIGTERM wants the run to end, and it did,
        with nothing lost. Ctrl-C should also end a script that would continue with something else.
        """
        return 130 if self.stopped_by == signal.SIGINT else 0


@dataclasses.dataclass
class Stop:
    """Whether to save and stop.

    With several processes only SIGTERM counts, and orbax makes them agree on the step.
    """

    manager: ocp.CheckpointManager
    received: signal.Signals | None = None
    """The signal that requested the stop."""

    def requested(self, done: int) -> bool:
        if jax.process_count() > 1 and self.manager.reached_preemption(done):
            self.received = signal.SIGTERM
        return self.received is not None

    def receive(self, number: int, frame: Any) -> None:
        """The handler. A second Ctrl-C interrupts at once; SIGTERM may come from several senders,
        and a second one changes nothing."""
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            # Not print: what is interrupted may be printing.
            os.write(
                2, b"\nStopping after this step; Ctrl-C stops at once, without a checkpoint.\n"
            )
            self.received = signal.Signals(number)


@contextlib.contextmanager
def stop_requests(manager: ocp.CheckpointManager) -> Iterator[Stop]:
    stop = Stop(manager)
    if jax.process_count() > 1:
        yield stop
        return
    before = {
        number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
