"""Runs the clients, each in an environment of its own that is made here: `make clients`.

`python clients/run.py [NAME ...]` runs those that are named, or all.
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENTS = {path.stem.removeprefix("with_"): path for path in sorted(ROOT.glob("clients/with_*.py"))}
ENVIRONMENTS = ROOT / ".venv-clients"


def header(program: Path) -> dict:
    """What a program says that it needs, in the form of PEP 723."""
    (lines,) = re.findall(r"(?m)^# /// script\n((?:# .*\n)+?)# ///$", program.read_text())
    return tomllib.loads(re.sub(r"(?m)^# ", "", lines))


def install(program: Path, python: Path) -> str:
    """Why the program's environment cannot be made; empty if it is there."""
    needs = header(program)
    oldest = needs["requires-python"].removeprefix(">=")
    if sys.version_info < tuple(map(int, oldest.split("."))):
        return f"needs Python {oldest}; give it as PYTHON"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    done = run(python, "-m", "pip", "install", "--quiet", *needs["dependencies"])
    return last_line(done.stderr) if done.returncode else ""


def versions(program: Path, python: Path) -> str:
    listed = run(python, "-m", "pip", "list", "--format", "freeze").stdout.split()
    of = dict(line.split("==") for line in listed if "==" in line)
    client = re.split(r"[~=]", header(program)["dependencies"][0])[0]
    return ", ".join(f"{name} {of[name]}" for name in (client, "jax", "optax"))


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # This library is taken from the checkout, and its requirements from what the clients take.
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | ours)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(CLIENTS))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(CLIENTS)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or CLIENTS:
        program, python = CLIENTS[name], ENVIRONMENTS / name / "bin" / "python"
        if why := install(program, python):
            failed += 1
            print(f"{name}: cannot be installed: {why}", flush=True)
            continue
        done = run(python, program)
        if done.returncode:
            failed += 1
            sys.stderr.write(done.stderr)
        shown = last_line(done.stderr if done.returncode else done.stdout)
        print(
            f"{name} ({versions(program, python)}): {'FAILED: ' * bool(done.returncode)}{shown}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
