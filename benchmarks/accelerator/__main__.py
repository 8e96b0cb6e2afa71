"""Measures this library on a GPU: whether its results are right, what an update and a training step
cost, and what GPA gains.

    python -m benchmarks.accelerator --minutes 8

Each part rewrites its file of results after each measurement; what a file in the folder has from
the same device, code and versions is not measured again. The parts share the time; time that one
does not need goes to the next ones.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

from benchmarks import QUICK
from benchmarks.accelerator.worker import NO_GPU, PARTS, work
from benchmarks.corpus import FOLDER as FOLDER_OF_TEXT

FOLDER = Path("benchmarks/results/accelerator")
# The part of a GPU's memory that JAX takes when it first uses it; the second is the older name.
MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# Seconds that a part may continue after its time, to end the measurement in progress.
GRACE = 60.0


def main() -> int:
    flags = parse()
    began = time.time()
    end, status = began + 60 * flags.minutes, 0
    context = multiprocessing.get_context("spawn")
    given = any(name in os.environ for name in MEMORY)
    for index, part in enumerate(flags.parts):
        share = PARTS[part].SHARE / sum(PARTS[other].SHARE for other in flags.parts[index:])
        deadline = time.time() + share * (end - time.time())
        if not given:
            os.environ[MEMORY[0]] = str(PARTS[part].MEMORY)
        process = context.Process(
            target=work,
            args=(part, flags.out, flags.corpus, flags.quick, flags.again, began, deadline),
        )
        process.start()
        process.join(max(0.0, deadline - time.time()) + GRACE)
        if process.exitcode == NO_GPU:  # the other parts would find none, too
            return NO_GPU
        if process.is_alive():
            process.kill()
            process.join()
            print(f"{time.time() - began:5.0f} s  {part:<6}  stopped: it did not end in time")
        status = status or int(process.exitcode != 0)
    return status


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default 8)")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default {FOLDER})")
    parser.add_argument(
        "--quick", action="store_true",
        help=f"the short form, also on a CPU; its results go to {QUICK / FOLDER.name}",
    )  # fmt: skip
    parser.add_argument(
        "--corpus", type=Path, default=FOLDER_OF_TEXT,
        help=f"what python -m benchmarks.corpus made, for the part gain (default {FOLDER_OF_TEXT})",
    )  # fmt: skip
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, in this order"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure also what the folder has already"
    )
    flags = parser.parse_args()
    flags.out = flags.out or (QUICK / FOLDER.name if flags.quick else FOLDER)
    return flags


if __name__ == "__main__":
    sys.exit(main())
