"""Where arrays live: a mesh with the axes `data` and `fsdp`, and the rules, all in one place.

Batches are split over both axes. Params, and everything in the optimizer's state that is shaped
like a param (x, y, moments, momenta), are split over `fsdp` by the same rule and replicated over
`data`: GPA reads a param and its x on the device that holds both, and adds no communication.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))
MICROBATCHES = PartitionSpec(None, ("data", "fsdp"))


def make_mesh(fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of these), of which `fsdp` share a copy of the state.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"--fsdp must divide the number of devices, which is {len(devices)}, got {fsdp}."
        )
    # Not jax.make_mesh: on most TPUs it refuses an fsdp that is a part of an axis of their torus.
    grid = mesh_utils.create_device_mesh(
        (len(devices) // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition(path: jax.tree_util.KeyPath, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest axis that `fsdp` divides, but never the one that stacks the blocks: the
    scan over blocks then gathers one block at a time. Leaves (of one block) that would have less
    than a page (4 KiB) per device are replicated, because moving them costs more than it saves."""
    stacked = any(getattr(key, "key", getattr(key, "name", None)) == "blocks" for key in path)
    axes = [axis for axis in range(int(stacked), len(shape)) if shape[axis] % fsdp == 0]
    if fsdp == 1 or not axes or np.prod(shape[int(stacked) :]) < 1024 * fsdp:
        return PartitionSpec()
    widest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * widest, "fsdp")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of a tree of params or of any state that holds such trees."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition(path, leaf.shape, mesh.shape["fsdp"])),
        tree,
    )


def placed(abstract: Any, mesh: Mesh) -> Any:
    """The same shapes and dtypes, with their shardings."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, mesh),
    )


def batch_shapes(example: Any, batch_size: int, parts: int, mesh: Mesh) -> Any:
    """Shapes and places of a batch (parts, rows of a part, ...).

    Raises:
      ValueError: if the devices cannot share the parts evenly.
    """
    if batch_size // parts % mesh.size:
        raise ValueError(
            f"--batch-size / --accumulate must be a multiple of the {mesh.size} devices, got "
            f"{batch_size} / {parts}."
        )
    place, shape = NamedSharding(mesh, MICROBATCHES), (parts, batch_size // parts)
    return {
        name: jax.ShapeDtypeStruct((*shape, *leaf.shape), leaf.dtype, sharding=place)
        for name, leaf in example.items()
    }


def place(batch: Mapping[str, Any], mesh: Mesh, parts: int | None = None) -> dict[str, jax.Array]:
    """Brings this process's rows of a batch to its devices, for a train step in `parts` parts, or
    for an evaluation (None)."""

    def move(rows: np.ndarray) -> jax.Array:
        if parts is None:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), rows)
        rows = rows.reshape(parts, len(rows) // parts, *rows.shape[1:])
        if jax.process_count() > 1:
            return in_order(rows, mesh)
        return jax.make_array_from_process_local_data(NamedSharding(mesh, MICROBATCHES), rows)

    return {name: move(rows) for name, rows in batch.items()}


def in_order(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """A batch (parts, rows of a part, ...) of which process p of n has the rows p, p + n, ...:
    split over the mesh, with the rows in the order that they have with one process.

    So dropout acts on the same rows with any number of processes. One all-to-all moves each row
    once, which costs little beside the step itself.
    """
    by_process, merge = merging()
    with jax.set_mesh(by_process):
        split = NamedSharding(by_process, PartitionSpec(None, "device", "process"))
        merged = merge(jax.make_array_from_process_local_data(split, rows[:, :, None]))
    # Moves nothing, unless the mesh has its devices in another order, as on some TPUs.
    return jax.device_put(merged, NamedSharding(mesh, MICROBATCHES))


@functools.cache
def merging() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """A mesh of all devices by process, and what merges an axis of rows with one of processes."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(jax.process_count(), -1)
    by_process = Mesh(grid, ("process", "device"), axis_types=(AxisType.Auto, AxisType.Auto))
    split = NamedSharding(by_process, PartitionSpec(None, ("process", "device")))

    def merge(batch: jax.Array) -> jax.Array:
        return batch.reshape(len(batch), -1, *batch.shape[3:])

    return by_process, jax.jit(merge, out_shardings=split)


def split_batch(x: jax.Array) -> jax.Array:
    """Keeps activations split by their batch axis: a hint for the partitioner, which otherwise may
    follow the weights. Without a mesh (one device, sampling) it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, BATCH)
