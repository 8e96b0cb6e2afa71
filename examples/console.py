"""What the commands say."""

from rich.console import Console


def say(console: Console, line: str) -> None:
    """A line as it is: not coloured, and not broken where the terminal ends."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
