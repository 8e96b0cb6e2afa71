"""Where images come from: arrays in memory, or files that are decoded when they are needed."""

import concurrent.futures
import dataclasses
import functools
import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from examples.vit.crops import center_crop, random_crop, resize, shift

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
VALIDATION_NAMES = ("validation", "valid", "val", "test")
# AlgoPerf's means and standard deviations of the channels on ImageNet.
IMAGENET_MEAN = 255 * np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = 255 * np.array((0.229, 0.224, 0.225), np.float32)


class Examples(Protocol):
    """Images that can be loaded in any order, and their labels."""

    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that `load` gives."""

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
        """uint8 images (b, H, W, C), cropped by uniform random numbers (b, DRAWS) if any."""


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Images in memory: uint8 (n, H, W, C)."""

    images: np.ndarray
    labels: np.ndarray

    @property
    def shape(self):
        return self.images.shape[1:]

    def load(self, rows, draws):
        return self.images[rows] if draws is None else shift(self.images[rows], draws)


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded images: `files[row]` is a dict of bytes and a path, as `datasets` has them."""

    files: Sequence[Any]
    labels: np.ndarray
    image_size: int | None
    """Height and width after decoding; None keeps them."""

    @functools.cached_property
    def shape(self):
        size = self.image_size
        return (*((size, size) if size else self.open(0).size[::-1]), 3)

    @functools.cached_property
    def pool(self):
        return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")

    def name(self, row: int) -> str:
        return self.files[row]["path"] or f"number {row}"

    def open(self, row: int):
        """A Pillow image, of which only the header is read."""
        file = self.files[row]
        try:
            return Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]))
        except OSError as error:
            raise ValueError(f"Cannot read the image {self.name(row)}: {error}.") from error

    def check_sizes(self, shape: tuple[int, int, int]):
        """Raises a ValueError unless all images have this shape, where they keep their own."""
        for row in range(len(self.labels) if self.image_size is None else 0):
            with self.open(row) as image:
                width, height = image.size
            if (height, width) != shape[:2] or width != height:
                raise ValueError(
                    f"The images must be squares of one size, or get one by --data.image-size: "
                    f"{self.name(row)} has {width}x{height} pixels, others {shape[1]}x{shape[0]}."
                )

    def load(self, rows, draws):
        each = [None] * len(rows) if draws is None else draws
        images = np.stack(list(self.pool.map(self.decode, rows.tolist(), each)))
        return shift(images, draws) if draws is not None and self.image_size is None else images

    def decode(self, row: int, draws: np.ndarray | None) -> np.ndarray:
        with self.open(row) as image:
            try:
                if self.image_size is None:
                    return np.asarray(image.convert("RGB"))
                box = center_crop(*image.size) if draws is None else random_crop(*image.size, draws)
                return resize(image, box, self.image_size)
            except (OSError, SyntaxError) as error:  # Pillow raises the latter for broken PNG files
                raise ValueError(f"Cannot read the image {self.name(row)}: {error}.") from error


class Source(NamedTuple):
    """Images to train on, and to validate on if there are any, with what describes them."""

    name: str
    train: Examples
    validation: Examples | None
    class_names: Sequence[str]
    augment: str
    mean: Any
    std: Any
    """The model sees (image - mean) / std."""


def open_source(source: str, image_size: int | None) -> Source:
    """Raises a ValueError, in one sentence, if there is no such source."""
    if source == "digits":
        return digits()
    if source == "fashion-mnist":
        return fashion_mnist()
    if source.startswith("hf:"):
        return photos(source, image_size, source.removeprefix("hf:"))
    path = Path(source).expanduser()
    if not path.is_dir():
        raise ValueError(
            f"--data.source must be digits, fashion-mnist, hf:NAME or a folder, and there is no "
            f"folder {path}."
        )
    return photos(source, image_size, "imagefolder", data_dir=str(path))


def digits() -> Source:
    from sklearn.datasets import load_digits  # takes a second, and is for these images alone

    data = load_digits()
    examples = Arrays(data.images.astype(np.uint8)[..., None], data.target.astype(np.int32))
    eight = np.float32(8)  # pixels are 0 ... 16
    return Source(
        "scikit-learn's digits", examples, None, tuple("0123456789"), "crop", eight, eight
    )


def fashion_mnist() -> Source:
    if not FASHION_MNIST.is_dir():
        raise ValueError(
            f"Fashion-MNIST is not in {FASHION_MNIST}: apt install dataset-fashion-mnist."
        )

    def read(name: str, header: int) -> np.ndarray:
        content = gzip.decompress((FASHION_MNIST / f"{name}-ubyte.gz").read_bytes())
        return np.frombuffer(content, np.uint8, offset=header)

    def examples(part: str) -> Arrays:
        images = read(f"{part}-images-idx3", 16).reshape(-1, 28, 28, 1)
        return Arrays(images, read(f"{part}-labels-idx1", 8).astype(np.int32))

    half = np.float32(127.5)
    return Source(
        "Fashion-MNIST", examples("train"), examples("t10k"), FASHION_MNIST_CLASSES, "crop-flip",
        half, half,
    )  # fmt: skip


def photos(source: str, image_size: int | None, *load: str, **how: str) -> Source:
    """Images with one class label each, which `datasets` loads from the Hugging Face hub or from a
    folder."""
    import datasets  # which takes a second

    try:
        parts = datasets.load_dataset(*load, **how)
    except Exception as error:  # of the network, of the hub, or of what the data set's code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Cannot load --data.source {source}: {reason[0].rstrip('.')}.") from error
    if "train" not in parts:
        raise ValueError(f"--data.source {source} has no part train, only {', '.join(parts)}.")
    features = parts["train"].features
    image = next((k for k, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((k for k, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(
            f"--data.source {source} must have a column of images and one of class labels (of a "
            f"folder: one folder of images a class), got {', '.join(features)}."
        )

    def examples(part: Any) -> Files:
        labels = part.with_format("numpy", columns=[label])[:][label].astype(np.int32)
        # Encoded, because the pipeline decodes in its own threads, once it knows the crop.
        encoded = part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return Files(Column(encoded, image), labels, image_size)

    train = examples(parts["train"])
    train.check_sizes(train.shape)
    others = (examples(parts[name]) for name in VALIDATION_NAMES if name in parts)
    # A label of -1 means that it is kept secret, as in some test parts.
    validation = next((other for other in others if other.labels.min() >= 0), None)
    if validation is not None:
        validation.check_sizes(train.shape)
    name = source if source.startswith("hf:") else f"images in {source}"
    classes = tuple(features[label].names)
    return Source(name, train, validation, classes, "crop-flip", IMAGENET_MEAN, IMAGENET_STD)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a data set by row, without loading the others or all of its rows."""

    rows: Any
    name: str

    def __getitem__(self, row: int) -> Any:
        return self.rows[row][self.name]
