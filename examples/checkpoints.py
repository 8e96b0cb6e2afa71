"""Checkpoints of a run, by orbax: the training state and the position in the data."""

import json
import math
from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping


def open_checkpoints(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints in a folder; the last `keep` are kept and the best, by validation loss."""
    best = {"get_metric_fn": quality, "n": 1, "keep_checkpoints_without_metrics": False}
    policy = keeping.AnyPreservationPolicy([keeping.LatestN(keep), keeping.BestN(**best)])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=quality,  # without it the losses are not stored, and a resumed run knows no best
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def quality(metrics: dict[str, float]) -> float:
    """More is better, and what is no number is worst."""
    return -metrics["loss"] if math.isfinite(metrics["loss"]) else -math.inf


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    batches: grain.DatasetIterator,
    loss: float | None,
) -> None:
    """Copies the state to the host and returns; a thread writes it while training goes on."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(batches)
        ),
        metrics=None if loss is None else {"loss": loss},
    )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    abstract_state: Any,
    batches: grain.DatasetIterator | None = None,
) -> Any:
    """The state of that step, placed as `abstract_state` says: on one device or on many, whatever
    it was saved from. `batches` is set to where it was, whatever number of processes saved it.

    Raises:
      ValueError: if the position in the data is not whole, or is one in other data.
    """
    if batches is not None:
        batches.set_state(position(Path(manager.directory, str(step), "data")))
        batches.start_prefetch()
    return manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    ).state


def position(folder: Path) -> dict[str, Any]:
    """The position in the data: what each process saved of its own share, as one.

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
