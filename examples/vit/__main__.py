"""python -m examples.vit: trains a ViT; plan is its other command."""

import sys
from functools import partial

from examples.commands import run_command, workload_command
from examples.plan import plan
from examples.vit.config import TrainViT

PROGRAM = "python -m examples.vit"
main = workload_command(TrainViT, PROGRAM, {"plan": partial(plan, TrainViT, PROGRAM)})

if __name__ == "__main__":
    sys.exit(run_command(main))
