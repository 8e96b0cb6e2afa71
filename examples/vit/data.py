"""Images for the ViT: digits, IDX files, folders of images and data sets from the Hugging Face hub.

A batch is a pure function of the seed, its number and its size: from them follow the rows of the
shuffled data and the random numbers of the augmentation, of which each process takes its share. So
two processes see together what one would see alone, and the state of an iterator is one number,
from which any number of processes can continue.
Batches are made in threads ahead of their use; encoded images are decoded only then.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import io
import math
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import grain
import numpy as np

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
VALIDATION_NAMES = ("validation", "valid", "val", "test")
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# AlgoPerf's: of the channels on ImageNet, the area and aspect ratio of training crops, and the part
# of the shorter side that evaluation sees.
IMAGENET_MEAN = 255 * np.array((0.485, 0.456, 0.406), np.float32)
IMAGENET_STD = 255 * np.array((0.229, 0.224, 0.225), np.float32)
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
CROP_TRIES = 10
CENTER_CROP = 224 / 256


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Which images to learn from."""

    source: str = "digits"
    """"digits" (scikit-learn's), "fashion-mnist" (Debian's package dataset-fashion-mnist), a folder
    with IDX files (train-images-idx3-ubyte[.gz], ...), a folder with one folder of images a class
    (also within train/ and val/), or "hf:NAME", a data set of the Hugging Face hub."""
    image_size: int | None = None
    """Height and width that images of folders and of the hub get. They are then cropped at random
    (8-100 % of the area) to train, and in the center (224/256 of the shorter side) to evaluate.
    None keeps the images as they are, which must then be squares of one size."""
    augment: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """What happens to training images: random crops (of images that keep their size: after a margin
    of an eighth of it) and left-right flips. "auto" is crop-flip, and crop for digits and IDX files
    other than Fashion-MNIST, since a mirrored character is another one."""
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
        if self.source == "digits":
            images = digits()
        elif self.source == "fashion-mnist":
            images = fashion_mnist()
        elif self.source.startswith("hf:"):
            images = hub(self.source.removeprefix("hf:"), self.image_size)
        else:
            images = folder(Path(self.source).expanduser(), self.image_size)
        if self.image_size is not None and isinstance(images.train_part.examples, Arrays):
            raise ValueError(
                f"--data.image-size is for folders of images and hf:NAME; the images of "
                f"--data.source {self.source} keep their {images.image_shape[0]} pixels."
            )
        if self.augment != "auto":
            images = dataclasses.replace(images, augment=self.augment)
        if images.validation_part is None:
            train, validation = hold_out(images.train_part, self.held_out)
            images = dataclasses.replace(images, train_part=train, validation_part=validation)
        return images


class Examples(Protocol):
    """Images that can be had in any order, and their labels."""

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
    """Encoded images: `files[row]` is a path, or a dict of bytes and a path as `datasets` has."""

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
        file = self.files[row]
        return str((file["path"] or f"number {row}") if isinstance(file, dict) else file)

    def open(self, row: int):
        """A Pillow image, of which only the header is read."""
        from PIL import Image

        file = self.files[row]
        if isinstance(file, dict):
            file = io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]
        try:
            return Image.open(file)
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


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of the examples, or all of them."""

    examples: Examples
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.examples.labels if self.rows is None else self.rows)

    def batch(self, places: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at these places of the part."""
        rows = places if self.rows is None else self.rows[places]
        return self.examples.load(rows, draws), self.examples.labels[rows]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train and to validate on; batches are dicts of `image`, float32 (b, H, W, C), and
    `label`, int32 (b,)."""

    name: str
    train_part: Part
    validation_part: Part | None
    """None until `ImageData.prepare` holds something out."""
    classes: int
    class_names: tuple[str, ...] | None
    augment: Literal["none", "crop", "crop-flip"]
    mean: np.ndarray
    std: np.ndarray
    """The model sees (image - mean) / std."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.train_part.examples.shape

    @property
    def files(self) -> dict[str, Any]:
        """What a run stores with its weights: the classes, and by what to know the images again."""
        parts = (self.train_part, self.validation_part)
        labels = [
            part.examples.labels if part.rows is None else part.examples.labels[part.rows]
            for part in parts
        ]
        digest = hashlib.sha256(np.concatenate(labels).astype(np.int32).tobytes()).hexdigest()
        return {
            "images.json": {
                "classes": self.class_names and list(self.class_names),
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
        """Batches without end, shuffled anew each epoch; of each, the rows process_index,
        process_index + process_count, ...

        `get_state` is the number of batches consumed, `set_state` continues bit for bit. An epoch
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


def digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            'The digits come with scikit-learn: pip install "gpa-optax[examples]".'
        ) from error
    data = load_digits()
    examples = Arrays(data.images.astype(np.uint8)[..., None], data.target.astype(np.int32))
    eight = np.float32(8)  # pixels are 0 ... 16
    return Images(
        "scikit-learn's digits", Part(examples), None, 10, tuple("0123456789"), "crop", eight, eight
    )


def fashion_mnist() -> Images:
    if not FASHION_MNIST.is_dir():
        raise ValueError(
            f"Fashion-MNIST is not in {FASHION_MNIST}: apt install dataset-fashion-mnist, or give "
            f"--data.source the folder that has its IDX files."
        )
    return dataclasses.replace(
        idx_files(FASHION_MNIST),
        name="Fashion-MNIST", class_names=FASHION_MNIST_CLASSES, augment="crop-flip",
    )  # fmt: skip


def folder(path: Path, image_size: int | None) -> Images:
    if not path.is_dir():
        raise ValueError(
            f"--data.source must be digits, fashion-mnist, hf:NAME or a folder, and there is no "
            f"folder {path}."
        )
    return idx_files(path) if any(path.glob("*-ubyte*")) else image_folder(path, image_size)


def idx_files(path: Path) -> Images:
    """Images and labels in the format of MNIST, also with several channels (4 axes)."""
    train = idx_examples(path, "train")
    if train is None:
        raise ValueError(f"There is no train-images-idx3-ubyte (or .gz) in {path}.")
    parts = (idx_examples(path, part) for part in ("t10k", *VALIDATION_NAMES))
    validation = next((part for part in parts if part is not None), None)
    classes = int(train.labels.max()) + 1
    if validation is not None and (
        validation.shape != train.shape or validation.labels.max() >= classes
    ):
        raise ValueError(
            f"The validation part of {path} must be like the training part, with shape "
            f"{train.shape} and labels below {classes}, got shape {validation.shape} and labels "
            f"to {validation.labels.max()}."
        )
    half = np.float32(127.5)
    validation = validation and Part(validation)
    return Images(
        f"IDX files in {path}", Part(train), validation, classes, None, "crop", half, half
    )


def idx_examples(path: Path, part: str) -> Arrays | None:
    def only(kind: str) -> Path | None:
        files = sorted(path.glob(f"*{part}-{kind}?idx*-ubyte*"))
        if len({file.name.removesuffix(".gz") for file in files}) > 1:
            raise ValueError(
                f"{path} must have one file of {part}-{kind}, got {files[0].name} and "
                f"{files[-1].name}."
            )
        return files[0] if files else None

    files = only("images"), only("labels")
    if None in files:
        if files == (None, None):
            return None
        raise ValueError(f"{path} must have both the images and the labels of the part {part}.")
    images, labels = (read_idx(file) for file in files)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] != images.shape[2] or not len(images):
        raise ValueError(f"{files[0]} must hold square images, got shape {images.shape}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{files[1]} must hold one label for each of {len(images)} images, got shape "
            f"{labels.shape}."
        )
    return Arrays(images, labels.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """An array of uint8: two zeros, the type 8, the number of axes, the axes (>u4), the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read {path}: {error}.") from error
    axes = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    start = 4 + 4 * axes
    if not axes or len(data) < start:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes.")
    shape = tuple(np.frombuffer(data, ">u4", axes, offset=4).tolist())
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} is corrupt: it has {len(data) - start:,} bytes of data where its header says "
            f"{'x'.join(map(str, shape))}."
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def image_folder(path: Path, image_size: int | None) -> Images:
    """One folder of images a class, in the folder itself or in its train/ and val/ (or test/)."""
    # Without folders in it, train/ is a class that is called so.
    split = path / "train" if folders(path / "train") else None
    classes = folders(split or path)
    if not classes:
        raise ValueError(f"{path} has neither IDX files nor one folder of images a class.")
    train, validation = read_classes(split or path, classes, image_size), None
    names = VALIDATION_NAMES if split else ()
    other = next((path / name for name in names if folders(path / name)), None)
    if other is not None:
        different = sorted(set(classes) ^ set(folders(other)))
        if different:
            raise ValueError(
                f"{split} and {other} must have the same classes; {different[0]} is in one alone."
            )
        validation = read_classes(other, classes, image_size)
    return photos(f"images in {path}", train, validation, classes)


def folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def read_classes(path: Path, classes: Sequence[str], image_size: int | None) -> Files:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            entry.path
            for entry in os.scandir(path / name)
            if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
        )
        if not found:
            raise ValueError(
                f"There are no images ({' '.join(sorted(IMAGE_SUFFIXES))}) in {path / name}."
            )
        files += found
        labels += [label] * len(found)
    return Files(files, np.array(labels, np.int32), image_size)


def hub(name: str, image_size: int | None) -> Images:
    """A data set of the Hugging Face hub that has an image and a class label in each row."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--data.source hf:{name} needs Hugging Face datasets: pip install "
            f'"gpa-optax[examples,hub]".'
        ) from error
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:  # of the network, of the hub, or of what the data set's code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"Cannot load --data.source hf:{name}: {reason[0]}") from error
    if "train" not in parts:
        raise ValueError(f"--data.source hf:{name} has no part train, only {', '.join(parts)}.")
    features = parts["train"].features
    image = next((k for k, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((k for k, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(
            f"--data.source hf:{name} must have a column of images and one of class labels, got "
            f"{', '.join(features)}."
        )

    def examples(part) -> Files:
        labels = part.with_format("numpy", columns=[label])[:][label].astype(np.int32)
        # Bytes, because the pipeline decodes in its own threads and once it knows the crop.
        encoded = part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return Files(Column(encoded, image), labels, image_size)

    others = (examples(parts[name]) for name in VALIDATION_NAMES if name in parts)
    # A label of -1 means that it is kept secret, as in some test parts.
    validation = next((other for other in others if other.labels.min() >= 0), None)
    return photos(f"hf:{name}", examples(parts["train"]), validation, features[label].names)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a data set by row, without loading the others or all of its rows."""

    rows: Any
    name: str

    def __getitem__(self, row: int) -> Any:
        return self.rows[row][self.name]


def photos(name: str, train: Files, validation: Files | None, classes: Sequence[str]) -> Images:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'Reading images needs Pillow: pip install "gpa-optax[examples]".'
        ) from error
    train.check_sizes(train.shape)
    if validation is not None:
        validation.check_sizes(train.shape)
    return Images(
        name, Part(train), validation and Part(validation), len(classes), tuple(classes),
        "crop-flip", IMAGENET_MEAN, IMAGENET_STD,
    )  # fmt: skip


def hold_out(part: Part, held_out: float) -> tuple[Part, Part]:
    """Splits into rows to train and to validate on, class by class and always the same."""
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
    return tuple(Part(part.examples, np.sort(order[mask])) for mask in (~held, held))


def check_batch_size(batch_size: int, process_count: int):
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"--batch-size must be a positive multiple of the number of processes "
            f"({process_count}), got {batch_size}."
        )


def read_ahead(batches: Any) -> grain.IterDataset:
    # Two, so that one can begin while the other waits for its last image.
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
    """Can be iterated again and again."""

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


# Of an image: two for the place of its crop, one for the flip, then pairs for the crop's shape.
DRAWS = 3 + 2 * CROP_TRIES


def shift(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Crops of the images' own size, after a black margin of an eighth of it on each side."""
    count, height, width, _ = images.shape
    margin = max(1, height // 8)
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    top, left = (draws[:, :2] * (2 * margin + 1)).astype(int).T
    return np.moveaxis(windows[np.arange(count), top, left], 1, -1)


def random_crop(width: int, height: int, draws: np.ndarray) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of random area and aspect ratio, as the Inception networks
    were trained with; the center when none of ten tries fits."""
    area, ratio = draws[3:].reshape(2, CROP_TRIES)
    area = (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * area) * width * height
    ratio = np.exp(np.log(CROP_RATIO[0]) + np.log(CROP_RATIO[1] / CROP_RATIO[0]) * ratio)
    widths, heights = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if not fits.any():
        return center_crop(width, height)
    w, h = widths[fits.argmax()], heights[fits.argmax()]
    left, top = np.floor(draws[0] * (width - w + 1)), np.floor(draws[1] * (height - h + 1))
    return left, top, left + w, top + h


def center_crop(width: int, height: int) -> tuple[float, float, float, float]:
    side = CENTER_CROP * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def resize(image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """The box of a Pillow image, as RGB of size x size pixels."""
    from PIL import Image

    width, height = image.size
    left, top, right, bottom = box
    # JPEG can be decoded at a half, quarter or eighth of its size, as long as the box stays larger.
    scale = size / min(right - left, bottom - top)
    image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)
