"""python -m examples.llama: trains a Llama; export, sample and plan are its other commands."""

import sys
from collections.abc import Sequence

from rich.console import Console

from examples.commands import run_command, train_command
from examples.llama.config import TrainLlama
from examples.llama.export import export
from examples.llama.sampling import sample
from examples.plan import plan

PROGRAM = "python -m examples.llama"


def main(arguments: Sequence[str], console: Console) -> int:
    match list(arguments):
        case ["export", *rest]:
            return export(rest, console)
        case ["sample", *rest]:
            return sample(rest, console)
        case ["plan", *rest]:
            return plan(TrainLlama, PROGRAM, rest, console)
        case [name, *_] if not name.startswith("-"):
            raise ValueError(
                f"There is no command {name}; there are export, sample and plan. To train, give "
                f"none: {PROGRAM} --steps 100."
            )
        case rest:
            return train_command(TrainLlama, PROGRAM, rest, console)


if __name__ == "__main__":
    sys.exit(run_command(main))
