"""Images for the ViT, in batches: those of a source (sources.py), cropped (crops.py), normalized.

A batch is a pure function of the seed, its number and its size: they determine the rows of the
shuffled data and the random numbers of the augmentation, of which each process takes its share. So
two processes together see what one would see alone, and the iterator state is one number, from
which any number of processes can resume.

Threads make batches ahead of their use; encoded images are decoded only then.
"""

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterator
from typing import Any, Literal

import grain
import numpy as np

from examples.vit.crops import DRAWS
from examples.vit.sources import Arrays, Examples, open_source


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Which images to learn from."""

    source: str = "digits"
    """"digits" (scikit-learn's), "fashion-mnist" (Debian's package dataset-fashion-mnist), a folder
    with a folder of images for each class (also within train/ and val/), or "hf:NAME", a data set
    of the Hugging Face hub."""
    image_size: int | None = None
    """Height and width that images of folders and of the hub get. They are then cropped at random
    (8-100 % of the area) to train, and in the center (224/256 of the shorter side) to evaluate.
    None keeps the images as they are, which must then be squares of one size."""
    augment: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """What happens to training images: random crops (of images that keep their size: after a margin
    of an eighth of it is added) and left-right flips. "auto" is crop-flip, but crop for digits,
    since a mirrored character is another character."""
    held_out: float = 0.2
    """Part of each class that is held out where a source has no images for validation."""

    def __post_init__(self):
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--data.image-size must be at least 1, got {self.image_size}.")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"--data.held-out must be between 0 and 1, got {self.held_out}.")

    def prepare(self) -> "Images":
        """Finds the images and checks what can be checked without decoding them.

        Raises:
          ValueError: if there is nothing to train or to validate on, in one sentence.
        """
        source = open_source(self.source, self.image_size)
        if self.image_size is not None and isinstance(source.train, Arrays):
            raise ValueError(
                f"--data.image-size is for folders of images and hf:NAME; the images of "
                f"--data.source {self.source} keep their {source.train.shape[0]} pixels."
            )
        if source.validation is None:
            parts = split_by_class(Subset(source.train), self.held_out)
        else:
            parts = Subset(source.train), Subset(source.validation)
        augment = source.augment if self.augment == "auto" else self.augment
        return Images(source.name, *parts, source.class_names, augment, source.mean, source.std)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some rows of the examples, or all of them."""

    examples: Examples
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.examples.labels if self.rows is None else self.rows)

    def batch(self, places: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at these places of the subset."""
        rows = places if self.rows is None else self.rows[places]
        return self.examples.load(rows, draws), self.examples.labels[rows]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train and to validate on; batches are dicts of `image`, float32 (b, H, W, C), and
    `label`, int32 (b,)."""

    name: str
    train_part: Subset
    validation_part: Subset
    class_names: tuple[str, ...]
    augment: Literal["none", "crop", "crop-flip"]
    mean: np.ndarray
    std: np.ndarray
    """The model sees (image - mean) / std."""

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.train_part.examples.shape

    @property
    def without_effect(self) -> dict[str, str]:
        if self.train_part.examples is self.validation_part.examples:
            return {}
        return {"--data.held-out": f"{self.name}, which has images for validation"}

    @property
    def files(self) -> dict[str, Any]:
        """What a run stores with its weights: the classes, and what identifies the images."""
        parts = (self.train_part, self.validation_part)
        labels = [
            part.examples.labels if part.rows is None else part.examples.labels[part.rows]
            for part in parts
        ]
        digest = hashlib.sha256(np.concatenate(labels).astype(np.int32).tobytes()).hexdigest()
        return {
            "images.json": {
                "classes": list(self.class_names),
                "train": len(labels[0]),
                "validation": len(labels[1]),
                "labels": digest[:16],
            }
        }

    @property
    def description(self) -> str:
        how = {"none": "not augmented", "crop": "cropped", "crop-flip": "cropped and flipped"}
        return (
            f"{self.name}: {len(self.train_part):,} images to train on ({how[self.augment]}), "
            f"{len(self.validation_part):,} to validate on, "
            f"{'x'.join(map(str, self.image_shape))}, {self.classes} classes"
        )

    def train(
        self, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """Batches without end, reshuffled each epoch; of each, the rows process_index,
        process_index + process_count, ...

        `get_state` gives the number of batches consumed; `set_state` resumes bit for bit. An epoch
        may end within a batch.

        Args:
          batch_size: rows over all processes, a multiple of `process_count`.
          seed: of the order and the augmentation.
          process_index: which process this is.
          process_count: how many share the batches.
        """
        check_batch_size(batch_size, process_count)
        batches = TrainBatches(self, batch_size, seed, process_index, process_count)
        return iter(read_ahead(batches))

    def validation(
        self,
        count: int | None,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> "ValidationBatches":
        """The same `count` images each time (None, or more than there are: all), not augmented.

        Batches have `mask` too, float32 (b,): 0 for the rows that fill the last batch.
        """
        check_batch_size(batch_size, process_count)
        if count is not None and count < 1:
            raise ValueError(f"At least 1 image is needed to validate on, got {count}.")
        available = len(self.validation_part)
        count = available if count is None else min(count, available)
        return ValidationBatches(self, count, batch_size, process_index, process_count)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        images = np.subtract(images, self.mean, dtype=np.float32)
        images /= self.std
        return images


def split_by_class(part: Subset, held_out: float) -> tuple[Subset, Subset]:
    """Splits into rows to train and to validate on, class by class and always in the same way."""
    labels = part.examples.labels
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    place = np.concatenate([np.arange(size) for size in sizes])  # of a row within its class
    held = place < np.round(held_out * sizes)[labels[order]]
    if held.all() or not held.any():
        raise ValueError(
            f"--data.held-out {held_out} of {len(labels)} images leaves none to "
            f"{'train' if held.all() else 'validate'} on."
        )
    return tuple(Subset(part.examples, np.sort(order[mask])) for mask in (~held, held))


def check_batch_size(batch_size: int, process_count: int):
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"--batch-size must be a positive multiple of the number of processes "
            f"({process_count}), got {batch_size}."
        )


def read_ahead(batches: Any) -> grain.IterDataset:
    # Two threads, so that one can begin a batch while the other waits for its last image.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)
    return grain.MapDataset.source(batches).to_iter_dataset(options)


@dataclasses.dataclass(frozen=True)
class TrainBatches:
    """Batch k of a run, for any k."""

    images: Images
    batch_size: int
    seed: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        part, augment = self.images.train_part, self.images.augment
        mine = slice(self.process_index, None, self.process_count)
        places = shuffled_places(k * self.batch_size, self.batch_size, len(part), self.seed)[mine]
        draws = np.random.default_rng((self.seed, 1, k)).random((self.batch_size, DRAWS))[mine]
        images, labels = part.batch(places, None if augment == "none" else draws)
        if augment == "crop-flip":
            flipped = draws[:, 2] < 0.5
            images[flipped] = images[flipped, :, ::-1]
        return {"image": self.images.normalize(images), "label": labels}


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """Batches of validation images, which can be iterated again and again."""

    images: Images
    count: int
    batch_size: int
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        part = self.images.validation_part
        # Classes often come one after the other, and `count` should see all of them.
        order = shuffled(len(part), seed=0, epoch=0)[: self.count]
        number = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        number = number[self.process_index :: self.process_count]
        images, labels = part.batch(order[np.minimum(number, self.count - 1)], None)
        mask = (number < self.count).astype(np.float32)
        return {"image": self.images.normalize(images), "label": labels, "mask": mask}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(read_ahead(self))


@functools.lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def shuffled_places(start: int, count: int, total: int, seed: int) -> np.ndarray:
    """`count` places from `start` on in an endless sequence of shuffled epochs of `total`."""
    epochs, places = np.divmod(np.arange(start, start + count), total)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places[here] = shuffled(total, seed, int(epoch))[places[here]]
    return places
