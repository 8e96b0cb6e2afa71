"""python -m examples.vit: trains a ViT; plan is its other command."""

import sys
from collections.abc import Sequence

from rich.console import Console

from examples.commands import run_command, train_command
from examples.plan import plan
from examples.vit.config import TrainViT

PROGRAM = "python -m examples.vit"


def main(arguments: Sequence[str], console: Console) -> int:
    match list(arguments):
        case ["plan", *rest]:
            return plan(TrainViT, PROGRAM, rest, console)
        case [name, *_] if not name.startswith("-"):
            raise ValueError(
                f"There is no command {name}; there is plan. To train, give none: "
                f"{PROGRAM} --steps 100."
            )
        case rest:
            return train_command(TrainViT, PROGRAM, rest, console)


if __name__ == "__main__":
    sys.exit(run_command(main))
