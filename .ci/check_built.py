"""The wheel holds the package alone, the sdist what git holds; built again, both are the same.

`python .ci/check_built.py dist`, in a checkout in which `dist` was built.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check_wheel(wheel: Path) -> None:
    info = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    metadata = {f"{info}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    package = {str(file.relative_to(ROOT)) for file in ROOT.glob("gpa_optax/*.py")}
    found = set(zipfile.ZipFile(wheel).namelist())
    check_equal(found, metadata | package | {"gpa_optax/py.typed"}, wheel)


def check_sdist(sdist: Path) -> None:
    name = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        found = {member.name.removeprefix(f"{name}/") for member in archive if not member.isdir()}
    known = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    check_equal(found, {*known, "PKG-INFO"}, sdist)


def check_equal(found: set[str], expected: set[str], archive: Path) -> None:
    if found != expected:
        more, less = sorted(found - expected), sorted(expected - found)
        sys.exit(f"{archive.name} holds also {more}, and lacks {less}")


def check_rebuilt(built: Path) -> None:
    """Builds both from the sdist, in another folder, time zone and mask, and compares the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = Path(folder, sdist.name.removesuffix(".tar.gz"))
        (source / "PKG-INFO").unlink()  # which the build adds
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", Path(folder, "again"), source],
            check=True,
            env=os.environ | {"TZ": "Pacific/Auckland"},
            umask=0o077,
            stdout=subprocess.DEVNULL,
        )
        for file in sorted(built.iterdir()):
            digest, again = (
                hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (file, Path(folder, "again", file.name))
            )
            if digest != again:
                sys.exit(f"{file.name} is {digest}, and {again} when it is built again")
            print(f"{digest}  {file.name}, twice")


if __name__ == "__main__":
    built = Path(sys.argv[1])
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    check_rebuilt(built)
