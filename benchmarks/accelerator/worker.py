"""Runs one part in a process of its own, so that it has the device's memory to itself, and a part
that fails, or does not end, does no harm to the others."""

import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from benchmarks.accelerator import gain, right, step, timing, update
from benchmarks.accelerator.plan import Conditions, LeftOut, peaks_of
from benchmarks.accelerator.results import Bar, Results, device

NO_GPU = 2  # the exit status
PARTS: dict[str, ModuleType] = {"right": right, "update": update, "step": step, "gain": gain}


def work(
    name: str, folder: Path, corpus: Path, quick: bool, again: bool, began: float, deadline: float
) -> None:
    """Makes the measurements of a part that its file does not have yet.

    Ends the process with status 1 if the device computes something wrong, or a measurement fails,
    and with `NO_GPU` if there is none.

    Args:
      corpus: the folder that benchmarks.corpus made.
      began: when the whole command began; printed times count from there.
      deadline: no measurement begins after it.
    """
    part = PARTS[name]
    results, where = Results(folder, name, quick, again), device()
    gpu = where["platform"] != "cpu"
    if not gpu and not quick:
        print("JAX sees no GPU here. --quick rehearses all of it on a CPU.", file=sys.stderr)
        raise SystemExit(NO_GPU)

    def say(text: str) -> None:
        for line in text.splitlines():
            print(f"{time.time() - began:5.0f} s  {name:<6}  {line}", flush=True)

    say(f"{where['kind']}: {results.path}")
    under = Conditions(folder, corpus, quick, peaks_of(where["kind"]), deadline, say)
    left_out, failed = {}, False
    for measurement in part.measurements(quick):
        if results.has(measurement):
            say(f"{measurement}: measured before")
            continue
        try:
            if time.time() >= deadline:
                raise LeftOut("no time was left")
            say(f"{measurement} ...")
            found = part.measure(measurement, under)
            say(part.told(found))
        except LeftOut as reason:
            left_out[measurement] = str(reason)
            continue
        except Exception as error:
            traceback.print_exc()
            found, failed = {"failed": timing.reason(error)}, True
        results.add(measurement, found)
    bars = [bar for bar in part.bars(results.measurements) if bar.essential or gpu]
    results.finish(left_out, bars)
    for bar in bars:
        say(str(bar))
    for measurement, reason in left_out.items():
        say(f"left out: {measurement}: {reason}")
    if failed or wrong(bars):
        raise SystemExit(1)


def wrong(bars: list[Bar]) -> bool:
    return any(bar.essential and not bar.met for bar in bars)
