"""How the commands print."""

from rich.console import Console


def say(console: Console, line: str) -> None:
    """Prints a line as it is: not coloured, and not wrapped at the width of the terminal."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
