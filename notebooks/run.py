"""Executes the notebooks, each from a clean kernel.

python -m notebooks.run              # in their short form, which is thrown away: what CI does
python -m notebooks.run --write vit  # one of them in full; its outputs replace the stored ones

The cell that is tagged `parameters` tells how much a notebook computes. The short form sets these
variables to the values of `notebooks.SHORT`, in a cell that is put behind it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from notebooks import SHORT

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m notebooks.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(SHORT)}")
    parser.add_argument("--write", action="store_true", help="in full, and store the outputs")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(SHORT):
        parser.error(f"no notebook named {', '.join(sorted(unknown))}: give {', '.join(SHORT)}.")
    failed = []
    for name in options.names or SHORT:
        path = FOLDER / f"{name}.ipynb"
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        if not options.write:
            shorten(notebook, SHORT[name])
        try:
            execute(notebook)
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.write:
            nbformat.write(tidied(notebook), path)
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def shorten(notebook: nbformat.NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Puts a cell with these values behind the one that is tagged `parameters`."""
    (place,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs all cells in a new kernel of this Python, which imports this checkout, in a folder of
    its own.

    Raises:
      CellExecutionError: if a cell does.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
            # Else the kernel warns that others on the machine could read along.
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
        client.execute(env={**os.environ, "PYTHONPATH": str(FOLDER.parent.absolute())})


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what tells of the machine that ran it."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return notebook


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
