"""The end of a run in several processes: when one of them is gone, the others end with a sentence.

JAX's coordination service, which process 0 runs, notices a process that is gone: process 0 by its
closed connections, any other when nothing was heard of it for SILENCE seconds. In each process that
is left it then writes a page of its log to the native stderr and aborts. Nothing of JAX's API
changes that: the native client has a callback, but none that Python could be called by. So the
native stderr is read here and passed on line by line, and where that page begins the process says
who is gone and ends.

A collective with a process that is gone fails at once on CPUs and waits forever elsewhere; both end
in the same way. A process that fails alone has to be gone for the others to notice, and so ends
without the barrier at which JAX would wait for them.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable

from rich.console import Console

SILENCE = 25  # seconds
NATIVE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d")  # how each native message begins
COORDINATION = ("coordination_service", "preemption_sync_manager")
FATAL = "the JAX distributed service detected fatal errors"
# By what the page names those that are gone.
UNHEALTHY = re.compile(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)")
TIMEOUT = re.compile(r"Task (\d+) heartbeat timeout")


def say(message: str) -> None:
    """Also in the processes whose command's console is quiet."""
    console = Console(stderr=True)
    console.print(message, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)


def watch_the_others() -> None:
    """Must be called before JAX connects the processes."""
    read, write = os.pipe()
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # what Python says goes on directly
    os.dup2(write, 2)
    os.close(write)
    # abort() waits for its signal's handler. sleep() is one that sleeps for the signal's number, 6,
    # in seconds: time for the thread to read what was written before, whatever this thread holds.
    native = ctypes.CDLL(None)
    native.signal(signal.SIGABRT, native.sleep)
    lines = open(read, errors="replace")  # noqa: SIM115, as long as the process lives
    threading.Thread(target=pass_on, args=(lines,), daemon=True, name="native stderr").start()


def pass_on(lines: Iterable[str]) -> None:
    """Passes native messages on to stderr, but those of a coordination service that gives up."""
    page: list[str] = []
    coordination = False
    for line in lines:
        if NATIVE.match(line):
            coordination = FATAL in line or any(name in line for name in COORDINATION)
        if FATAL in line:
            threading.Timer(1, end_because, [page]).start()  # by then the page is complete
        if coordination:
            page.append(line)
        else:
            sys.stderr.write(line)


def end_because(page: Iterable[str]) -> None:
    say(
        f"{who_is_gone(''.join(page))} gone, killed or ended by an error that it tells itself: "
        "start all processes again with the same command, and the run goes on from its last "
        "checkpoint."
    )
    leave(1)


def who_is_gone(page: str) -> str:
    """The beginning of a sentence, from what the coordination service writes."""
    lines = [line for block in UNHEALTHY.findall(page) for line in block.split()]
    named = {int(re.search(r"\d+$", line)[0]) for line in lines}
    named |= {int(number) for number in TIMEOUT.findall(page)}
    if not named and "Failed to send RPC to coordination service" in page:
        named = {0}  # which runs the service
    if not named:
        return "Another process of this run is"
    numbers = ", ".join(map(str, sorted(named)))
    return f"Process {numbers} of this run is" if len(named) == 1 else f"Processes {numbers} are"


def wait_for_news() -> None:
    """After a failure that may come from another process that is gone: if it does, the process ends
    here, as soon as it is known which one."""
    time.sleep(SILENCE + 3)


def leave(status: int) -> None:
    """Ends this process at once: at its exit JAX would wait for the others, which wait for it."""
    Console().show_cursor()  # which a progress display hides
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
