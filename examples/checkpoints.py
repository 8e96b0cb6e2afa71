"""Checkpoints of a run, by orbax: the training state and the position in the data. Each holds the
digests of its files (digests.py), and is checked before it is restored."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

from examples.digests import DIGESTS, DamagedError, WithDigests, check_digests
from examples.files import free_name


def check(folder: Path, abstract_state: Any) -> None:
    """Checks that a checkpoint is as it was written, and one of this model.

    Args:
      folder: the checkpoint's, with its step as name.
      abstract_state: shapes and dtypes that are expected.

    Raises:
      DamagedError: if not, in one sentence that names the checkpoint and what is wrong.
    """
    check_digests(folder)
    stored = described(ocp.StandardCheckpointHandler().metadata(epath.Path(folder, "state")))
    expected = described(abstract_state)
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise DamagedError(
                f"The checkpoint {folder} is of another model or optimizer: {name} is "
                f"{stored.get(name, 'missing')} there, and {expected.get(name, 'nothing')} here."
            )


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}"
        f"[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def newest_good(folder: Path, abstract_state: Any, say: Callable[[str], None]) -> int:
    """The step of the newest checkpoint that passes `check`; 0 if there is none at all.

    Damaged ones are moved to a folder beside this one, and `say` reports why. Of several processes
    only one reads the checkpoints.

    Raises:
      DamagedError: if there are checkpoints and all are damaged; they stay where they are.
    """
    step, error = 0, DamagedError(f"No checkpoint in {folder} can be restored.")
    if jax.process_index() == 0:
        try:
            step = set_aside(folder, abstract_state, say)
        except DamagedError as newest:
            step, error = -1, newest
    if jax.process_count() > 1:
        # On CPUs a collective times out after half a minute, and reading large checkpoints takes
        # longer. This barrier waits as long as all processes are alive.
        wait = ocp.multihost.get_barrier_sync_fn()
        wait(key=f"checked {folder}", timeout_ms=24 * 60 * 60 * 1000)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step < 0:
        raise error
    return step


def set_aside(folder: Path, abstract_state: Any, say: Callable[[str], None]) -> int:
    found = folder.iterdir() if folder.exists() else []
    steps = sorted((int(path.name) for path in found if path.name.isdecimal()), reverse=True)
    good, damaged = 0, {}
    for step in steps:
        path = folder / str(step)
        try:
            if not good:
                check(path, abstract_state)
                good = step
            # Of the older ones orbax reads only the losses at this point. One whose deletion was
            # cut short lacks files, which does no harm.
            elif (path / "metrics" / "metrics").exists() and (path / DIGESTS).exists():
                check_digests(path, "metrics/")
        except DamagedError as error:
            damaged[path] = error
    if damaged and not good:
        newest, *others = damaged.values()
        rest = "No other can be restored either; " if others else ""
        raise DamagedError(
            f"{newest} {rest}--no-resume renames the folder of the run and starts over."
        )
    aside = folder.with_name(f"{folder.name}.damaged")
    for path, error in damaged.items():
        aside.mkdir(exist_ok=True)
        place = free_name(aside / path.name)
        path.rename(place)
        say(f"{error} It is {place} now.")
    return good


def open_checkpoints(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints in a folder. The last `keep` and the best by validation loss are kept."""
    best = {"get_metric_fn": quality, "n": 1, "keep_checkpoints_without_metrics": False}
    policy = keeping.AnyPreservationPolicy([keeping.LatestN(keep), keeping.BestN(**best)])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=quality,  # without it the losses are not stored, and a resumed run knows no best
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        temporary_path_class=WithDigests,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def quality(metrics: dict[str, float]) -> float:
    """Higher is better, and a non-finite loss is worst."""
    return -metrics["loss"] if math.isfinite(metrics["loss"]) else -math.inf


@contextlib.contextmanager
def opened(folder: Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """As `open_checkpoints`; closed at the end, once pending writes have finished."""
    manager = open_checkpoints(folder, keep)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            manager.close()
        raise
    manager.close()


@contextlib.contextmanager
def writing(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns errors of the writing thread into a sentence: what failed, and what is still kept."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # a collective with a process that is gone
        raise
    except Exception as error:  # of orbax, tensorstore or the system, of many types
        others = " Another process of the run may have ended." if jax.process_count() > 1 else ""
        raise OSError(
            f"A checkpoint could not be written to {manager.directory} ({reason(error)}).{others} "
            f"{kept(manager)}."
        ) from error


def reason(error: BaseException) -> str:
    """The error in one line, where orbax and tensorstore put many around what the system said."""
    return " ".join(str(error).split()) or type(error).__name__


def kept(manager: ocp.CheckpointManager) -> str:
    last = manager.latest_step()
    if last is None:
        return "There is no checkpoint yet"
    return f"The last checkpoint, {manager.directory / str(last)}, is kept"


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until all is written. Raises OSError if that failed."""
    with writing(manager):
        manager.wait_until_finished()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    batches: grain.DatasetIterator,
    loss: float | None,
) -> None:
    """Copies the state to the host and returns; a thread writes it while training continues."""
    items = {
        "state": ocp.args.StandardSave(state),
        "data": grain.checkpoint.CheckpointSave(batches),
    }
    with writing(manager):
        manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics=None if loss is None else {"loss": loss},
        )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    abstract_state: Any,
    batches: grain.DatasetIterator | None = None,
) -> Any:
    """The state of a step whose checkpoint passed `check`, placed as `abstract_state` says: on one
    device or many, whatever it was saved from. `batches` is set to the saved position in the data,
    however many processes saved it.

    Raises:
      ValueError: if the position in the data is incomplete, or belongs to other data.
    """
    if batches is not None:
        batches.set_state(position(Path(manager.directory, str(step), "data")))
        batches.start_prefetch()
    return manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    ).state


def position(folder: Path) -> dict[str, Any]:
    """The position in the data, merged from what each process saved for its own share.

    Raises:
      ValueError: if a part is missing, damaged, or contradicts another.
    """
    parts = sorted(folder.glob("process_*-of-*.json"))
    count = int(parts[0].stem.rpartition("-")[2]) if parts else 1
    whole: dict[str, Any] = {}
    for path in (folder / f"process_{process}-of-{count}.json" for process in range(count)):
        try:
            part = json.loads(path.read_text())
            agrees = all(whole.get(name, value) == value for name, value in part.items())
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"Cannot read the position in the data in {path}: {error}.") from error
        if not agrees:
            raise ValueError(f"{path} contradicts the other files beside it.")
        whole |= part
    return whole
