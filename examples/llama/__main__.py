"""python -m examples.llama: trains a Llama; export, sample and plan are its other commands."""

import sys
from functools import partial

from examples.commands import run_command, workload_command
from examples.llama.config import TrainLlama
from examples.llama.export import export
from examples.llama.sampling import sample
from examples.plan import plan

PROGRAM = "python -m examples.llama"
OTHERS = {"export": export, "sample": sample, "plan": partial(plan, TrainLlama, PROGRAM)}
main = workload_command(TrainLlama, PROGRAM, OTHERS)

if __name__ == "__main__":
    sys.exit(run_command(main))
