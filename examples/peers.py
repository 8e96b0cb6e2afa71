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
import io
import os
import re
import signal
import sys
import threading
import time

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
    native_stderr = open(read, "rb")  # noqa: SIM115, for as long as the process lives
    threading.Thread(target=pass_on, args=(native_stderr,), daemon=True, name="stderr").start()


def pass_on(native_stderr: io.BufferedReader) -> None:
    """Passes messages on to stderr, but those of a coordination service that gives up."""
    page = ""
    coordination = False
    for line in native_stderr:
        text = line.decode(errors="replace")
        if NATIVE.match(text):
            coordination = FATAL in text or any(name in text for name in COORDINATION)
        if not coordination:
            sys.stderr.write(text)
            continue
        page += text
        if FATAL in text:
            time.sleep(1)  # until all of the page is there, of which nobody says where it ends
            os.set_blocking(native_stderr.fileno(), False)
            page += (native_stderr.read() or b"").decode(errors="replace")
            say(sentence(page))
            leave(1)


def sentence(page: str) -> str:
    """What a page of the coordination service means, and what to do."""
    if "RegisterTask" in page:
        return (
            "The processes did not meet in time: start all of them, each with the address of "
            "process 0 as --coordinator."
        )
    lines = [line for block in UNHEALTHY.findall(page) for line in block.split()]
    gone = {int(re.search(r"\d+$", line)[0]) for line in lines}
    gone |= {int(number) for number in TIMEOUT.findall(page)}
    if not gone and "Failed to send RPC to coordination service" in page:
        gone = {0}  # which runs the service
    numbers = ", ".join(map(str, sorted(gone)))
    who = f"Process {numbers} is" if len(gone) == 1 else f"Processes {numbers} are"
    return (
        f"{who if gone else 'Another process is'} gone, killed or ended by an error that it tells "
        "itself: start all processes again with the same command, and the run goes on from its "
        "last checkpoint."
    )


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
