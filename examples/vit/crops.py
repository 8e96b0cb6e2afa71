"""Crops of images: at random to train, in the center to evaluate."""

import math

import numpy as np
from PIL import Image

# AlgoPerf's: the area and aspect ratio of training crops, and the part of the shorter side that
# evaluation sees.
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
CROP_TRIES = 10
CENTER_CROP = 224 / 256
# Random numbers of an image: two for the place of its crop, one for the flip, then pairs for the
# crop's shape.
DRAWS = 3 + 2 * CROP_TRIES


def shift(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Crops as large as the images, from these with a black margin of an eighth on each side."""
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
    width, height = image.size
    left, top, right, bottom = box
    # JPEG can be decoded at a half, quarter or eighth of its size, as long as the box stays larger.
    scale = size / min(right - left, bottom - top)
    image.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)
