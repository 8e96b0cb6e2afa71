"""Checkpoints of a run, by orbax: the training state and the position in the data."""

import math
from pathlib import Path
from typing import Any

import grain
import jax
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
    it was saved from. `batches` is set to where it was.

    Raises:
      ValueError: if the data's position was saved by another number of processes.
    """
    items = {"state": ocp.args.StandardRestore(abstract_state)}
    if batches is not None:
        saved = {path.name for path in Path(manager.directory, str(step), "data").iterdir()}
        if f"process_{jax.process_index()}-of-{jax.process_count()}.json" not in saved:
            raise ValueError(
                f"The checkpoint of step {step} in {manager.directory} was written by another "
                f"number of processes than the {jax.process_count()} of now; resume with as many."
            )
        items["data"] = grain.checkpoint.CheckpointRestore(batches)
    return manager.restore(step, args=ocp.args.Composite(**items)).state
