"""The images of the ViT: every process count sees the same batches, runs continue bit for bit."""

import gzip
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.needs import needs

needs("grain", "PIL", "datasets", "sklearn")
import datasets
from PIL import Image

from examples.vit import crops, sources
from examples.vit.data import ImageData
from helpers import ROOT


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Where `datasets` keeps what it has loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Prepares what stands in for Fashion-MNIST: image n is full of n + 1, so that a batch tells
    which images it has."""

    def prepared(train=23, validation=7, images=None, **settings):
        for part, count in (("train", train), ("t10k", validation)):
            full = np.broadcast_to(1 + np.arange(count)[:, None, None], (count, 28, 28))
            write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", full if images is None else images)
            write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 5)
        monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)
        return ImageData("fashion-mnist", **settings).prepare()

    return prepared


def write_images(folder, classes=("cat", "dog"), count=6, size=(12, 12), suffix="png"):
    rng = np.random.default_rng(len(folder.name))
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{suffix}")
    return str(folder)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def rows(*batches):
    """The rows of batches in an order that does not depend on theirs."""
    return sorted(
        (label, image.tobytes())
        for batch in batches
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True)
    )


def numbers(batch):
    """Of which images of `fashion` a batch has rows."""
    return np.round(batch["image"].max(axis=(1, 2, 3)) * 127.5 + 126.5).astype(int).tolist()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "train", size=(40, 30), count=7, suffix="jpg")
    write_images(folder / "val", size=(30, 40), count=3, suffix="jpg")
    return ImageData(str(folder), image_size=16).prepare()


@pytest.fixture(scope="module")
def digits():
    return ImageData().prepare()


@pytest.fixture(params=["digits", "photos"])
def images(request):
    return request.getfixturevalue(request.param)


def test_batches_have_the_shapes_and_dtypes_of_the_contract(images):
    batch = next(images.train(8, seed=0))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {
        "image": ((8, *images.image_shape), np.float32),
        "label": ((8,), np.int32),
    }
    assert batch["label"].max() < images.classes == len(images.class_names)
    masked = next(iter(images.validation(None, 4, process_index=1, process_count=2)))
    assert masked["image"].shape == (2, *images.image_shape)
    assert (masked["mask"].shape, masked["mask"].dtype) == ((2,), np.float32)


def together(shares, count):
    """The batches that processes make together: of each its every so-manyth row, in order."""
    return [
        {
            name: np.stack([part[name] for part in parts], axis=1).reshape(-1, *leaf.shape[1:])
            for name, leaf in parts[0].items()
        }
        for parts in zip(*(take(share, count) for share in shares), strict=True)
    ]


@pytest.mark.parametrize("process_count", [2, 4])
def test_all_processes_together_see_the_batches_of_one(images, process_count):
    shares = [images.train(8, 5, index, process_count) for index in range(process_count)]
    assert_same(together(shares, 4), take(images.train(8, seed=5), 4))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_any_number_of_processes_continues_where_another_was(images, before, after):
    whole = take(images.train(8, seed=5), 7)
    shares = [images.train(8, 5, index, before) for index in range(before)]
    together(shares, 3)
    (state,) = {json.dumps(share.get_state()) for share in shares}  # each process has the same
    shares = [images.train(8, 5, index, after) for index in range(after)]
    for share in shares:
        share.set_state(json.loads(state))
    assert_same(together(shares, 4), whole[3:])


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("count", [None, 5])
def test_validation_has_each_image_once_whatever_the_process_count(photos, count, process_count):
    batches = [
        batch
        for index in range(process_count)
        for batch in photos.validation(count, 4, index, process_count)
    ]
    real = [{name: leaf[batch["mask"] == 1] for name, leaf in batch.items()} for batch in batches]
    assert len(rows(*real)) == (count or 6)
    assert len(set(rows(*real))) == (count or 6)
    assert {len(batch["label"]) for batch in batches} == {4 // process_count}
    assert len(batches) == 2 * process_count
    assert rows(*real) == rows(*[
        {name: leaf[batch["mask"] == 1] for name, leaf in batch.items()}
        for batch in photos.validation(count, 4)
    ])  # fmt: skip


def test_validation_can_be_iterated_again_and_sees_all_classes(tmp_path):
    images = ImageData(write_images(tmp_path / "x", "abcd", count=20), held_out=0.5).prepare()
    some = images.validation(20, 5)
    assert_same(list(some), list(some))
    assert {label for batch in some for label in batch["label"].tolist()} == {0, 1, 2, 3}
    assert len(list(images.validation(1000, 20))) == 2  # all there are


@pytest.mark.parametrize("steps", [0, 2, 5])  # an epoch of the photos has fewer than 2 batches
def test_a_fresh_iterator_continues_bit_for_bit(images, steps):
    iterator = images.train(8, seed=3)
    take(iterator, steps)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 4)
    again = images.train(8, seed=3)
    again.set_state(state)
    assert_same(take(again, 4), expected)
    used = images.train(8, seed=3)  # one that has read ahead elsewhere
    take(used, 3)
    used.set_state(state)
    assert_same(take(used, 4), expected)


def test_each_epoch_has_every_image_once_in_another_order(fashion):
    images = fashion(train=20, augment="none")
    seen = np.concatenate([numbers(batch) for batch in take(images.train(8, seed=0), 10)])
    epochs = seen.reshape(4, 20)  # ends of epochs are within batches
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_be_larger_than_the_data(fashion):
    images = fashion(train=3, augment="none")
    assert np.bincount(numbers(next(images.train(30, seed=0)))).tolist() == [10, 10, 10]


def test_seeds_change_the_order_and_the_augmentation(fashion):
    images = fashion(train=1, augment="crop")
    one, same, other = (take(images.train(16, seed), 1) for seed in (0, 0, 1))
    assert_same(one, same)
    assert not np.array_equal(one[0]["image"], other[0]["image"])
    images = fashion(augment="none")
    one, other = (numbers(next(images.train(16, seed))) for seed in (0, 1))
    assert one != other


def test_an_image_is_augmented_anew_each_time(fashion):
    image = np.arange(28 * 28).reshape(1, 28, 28) % 251

    def variants(augment):
        images = fashion(train=1, validation=1, images=image, augment=augment)
        pixels = np.round(next(images.train(2000, seed=0))["image"] * 127.5 + 127.5).astype(int)
        return {variant.tobytes() for variant in pixels[..., 0]}

    padded = np.pad(image[0], 3)
    shifted = [padded[y : y + 28, x : x + 28] for y in range(7) for x in range(7)]
    mirrored = [variant[:, ::-1] for variant in shifted]
    assert variants("none") == {image[0].tobytes()}
    assert variants("crop") == {variant.tobytes() for variant in shifted}
    both = {variant.tobytes() for variant in shifted + mirrored}
    assert variants("crop-flip") == variants("auto") == both
    batches = take(fashion(train=1, validation=1, images=image).train(16, seed=0), 2)
    assert not np.array_equal(*(batch["image"] for batch in batches))


def test_pixels_are_normalized_by_source(tmp_path, digits):
    from sklearn.datasets import load_digits

    every = next(iter(digits.validation(None, 359)))["image"]
    assert (every.min(), every.max()) == (-1, 1)
    originals = {image.tobytes() for image in load_digits().images.astype(np.float32)}
    assert {((image[..., 0] + 1) * 8).tobytes() for image in every} <= originals
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4), (124, 0, 255)).save(tmp_path / name / f"{number}.png")
    photo = next(ImageData(str(tmp_path), held_out=0.5).prepare().train(1, seed=0))["image"]
    expected = (np.array([124, 0, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(photo[0, 0 if photo[0, 0, 0, 0] > -2 else 2, 2], expected, atol=1e-5)


def test_digits_hold_out_a_fifth_of_each_class(digits):
    assert digits.image_shape == (8, 8, 1)
    assert digits.description == (
        "scikit-learn's digits: 1,438 images to train on (cropped), 359 to validate on, 8x8x1, "
        "10 classes"
    )
    train, held = digits.train_part, digits.validation_part
    assert not set(train.rows.tolist()) & set(held.rows.tolist())
    assert len(train) + len(held) == 1797
    labels = digits.train_part.examples.labels
    np.testing.assert_allclose(np.bincount(labels[held.rows]) / np.bincount(labels), 0.2, atol=0.01)
    again = ImageData().prepare()
    np.testing.assert_array_equal(again.validation_part.rows, held.rows)


def test_the_files_of_fashion_mnist_are_read(fashion):
    images = fashion(augment="none")
    assert (images.image_shape, images.classes) == ((28, 28, 1), 10)
    (batch,) = images.validation(None, 7)
    assert sorted(numbers(batch)) == list(range(7))
    assert batch["label"].tolist() == [number % 5 for number in numbers(batch)]


@pytest.mark.skipif(not sources.FASHION_MNIST.is_dir(), reason="needs dataset-fashion-mnist")
def test_fashion_mnist_is_debians():
    images = ImageData("fashion-mnist").prepare()
    assert images.image_shape == (28, 28, 1)
    assert (len(images.train_part), len(images.validation_part)) == (60_000, 10_000)
    assert (images.classes, images.augment) == (10, "crop-flip")
    assert np.bincount(images.train_part.examples.labels).tolist() == [6000] * 10
    assert next(images.train(64, seed=0))["image"].shape == (64, 28, 28, 1)


def test_folders_give_classes_by_name_and_labels_that_fit(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / part / name).mkdir(parents=True)
            for image in range(4):
                color = Image.new("RGB", (6, 6), (100 * number, 0, 0))
                color.save(tmp_path / part / name / f"{image}.PNG")
            (tmp_path / part / name / "notes.txt").write_text("not an image")
    images = ImageData(str(tmp_path), augment="none").prepare()
    assert images.class_names == ("ant", "bee", "cow")
    assert (len(images.train_part), len(images.validation_part)) == (12, 12)
    for batch in (next(images.train(12, seed=0)), *images.validation(None, 12)):
        red = batch["image"][:, 3, 3, 0] * 0.229 * 255 + 0.485 * 255
        np.testing.assert_allclose(red, 100 * batch["label"], atol=1e-3)


def test_folders_without_a_validation_part_hold_some_out(tmp_path):
    flat = ImageData(write_images(tmp_path / "flat", count=10)).prepare()
    assert (len(flat.train_part), len(flat.validation_part)) == (16, 4)
    write_images(tmp_path / "split" / "train", count=10)
    split = ImageData(str(tmp_path / "split"), held_out=0.5).prepare()
    assert (len(split.train_part), len(split.validation_part)) == (10, 10)


def test_gray_and_palette_images_become_rgb(tmp_path):
    for name, mode in (("a", "L"), ("b", "P")):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new(mode, (4, 4)).save(tmp_path / name / f"{number}.png")
    images = ImageData(str(tmp_path), held_out=0.5).prepare()
    assert next(images.train(4, seed=0))["image"].shape == (4, 4, 4, 3)


def test_random_crops_have_the_area_and_ratio_of_algoperf():
    draws = np.random.default_rng(0).random((2000, crops.DRAWS))
    boxes = np.array([crops.random_crop(500, 375, each) for each in draws])
    assert boxes.min() >= 0
    assert (boxes[:, 2].max(), boxes[:, 3].max()) == (500, 375)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / (500 * 375), width / height
    assert 0.079 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.35
    assert (boxes[:, 0] == 0).mean() < 0.1  # anywhere, not at the edge


def test_images_too_thin_for_any_crop_are_cropped_in_the_center():
    draws = np.random.default_rng(0).random(crops.DRAWS)
    assert crops.random_crop(1000, 10, draws) == crops.center_crop(1000, 10)


def test_evaluation_sees_224_of_256_of_the_shorter_side():
    assert crops.center_crop(512, 256) == (144, 16, 368, 240)


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path):
    ramp = np.linspace(0, 255, 1024).astype(np.uint8)
    pixels = np.stack([np.tile(ramp, (768, 1)), np.tile(ramp[:768, None], (1, 1024)),
                       np.full((768, 1024), 90, np.uint8)], axis=-1)  # fmt: skip
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    box = (101.0, 203.0, 701.0, 643.0)
    drafted, full = Image.open(tmp_path / "x.jpg"), Image.open(tmp_path / "x.png")
    small, exact = crops.resize(drafted, box, 64), crops.resize(full, box, 64)
    assert drafted.size == (256, 192)  # at an eighth the box would have 55 rows, too few for 64
    np.testing.assert_allclose(small.astype(int), exact, atol=4)
    column = np.linspace(101, 701, 129)[1::2] * 255 / 1023
    np.testing.assert_allclose(exact[32, 4:-4, 0], column[4:-4], atol=2)


def test_the_hub_gives_the_same_batches_as_a_folder(tmp_path):
    folder = tmp_path / "images"
    files = {part: [] for part in ("train", "val")}
    for part in files:
        write_images(folder / part)
        for label, name in enumerate(("cat", "dog")):
            files[part] += [(folder / part / name / f"{i}.png", label) for i in range(6)]
    features = datasets.Features(
        {"photo": datasets.Image(), "of": datasets.ClassLabel(names=["cat", "dog"])}
    )
    (tmp_path / "hub").mkdir()
    for part, named in (("train", "train"), ("val", "validation")):
        table = {
            "photo": [{"bytes": path.read_bytes(), "path": None} for path, _ in files[part]],
            "of": [label for _, label in files[part]],
        }
        datasets.Dataset.from_dict(table, features).to_parquet(
            tmp_path / "hub" / f"{named}-0.parquet"
        )
    for image_size in (None, 8):
        local = ImageData(str(folder), image_size=image_size).prepare()
        hub = ImageData(f"hf:{tmp_path / 'hub'}", image_size=image_size).prepare()
        assert (hub.classes, hub.class_names) == (2, ("cat", "dog"))
        assert_same(take(hub.train(5, seed=1), 6), take(local.train(5, seed=1), 6))
        assert_same(list(hub.validation(None, 5)), list(local.validation(None, 5)))


def test_a_program_that_stops_while_reading_ahead_ends_in_silence():
    program = (
        "from examples.vit.data import ImageData\n"
        "iterator = ImageData().prepare().train(64, seed=0)\n"
        "next(iterator)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def corrupt(folder, name, change):
    path = Path(folder) / name
    path.write_bytes(change(path.read_bytes()))
    return folder


def two_sizes(folder, part):
    write_images(folder / "train")
    write_images(folder / "val", size=(14, 14))
    (folder / "train/dog/3.png").rename(folder / "3.png")
    if part == "train":
        (folder / "val/dog/3.png").replace(folder / "train/dog/3.png")
    return str(folder)


def empty(folder, *names):
    for name in ("", *names):
        (folder / name).mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (lambda p: str(p / "absent"), "there is no folder"),
        (lambda p: empty(p / "x"), "Cannot load --data.source"),
        (lambda p: empty(p / "x", "cat"), "Cannot load --data.source"),
        (lambda p: write_images(p / "x", classes=("cat",)), "and one of class labels (of a folder"),
        (lambda p: two_sizes(p / "x", "train"), "dog/3.png has 14x14 pixels, others 12x12"),
        (lambda p: two_sizes(p / "x", "val"), "cat/0.png has 14x14 pixels, others 12x12"),
        (lambda p: write_images(p / "x", size=(12, 9)), "squares of one size, or get one by"),
        (lambda p: write_images(p / "x", count=1), "0.2 of 2 images leaves none to validate on"),
        (lambda p: corrupt(write_images(p / "x"), "dog/2.png", lambda b: b[:5]), "dog/2.png"),
    ],
)  # fmt: skip
def test_bad_sources_end_in_one_sentence(tmp_path, source, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        ImageData(source(tmp_path)).prepare()
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize("image_size", [None, 8])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_unreadable_image_is_named_when_its_turn_comes(tmp_path, suffix, image_size):
    folder = write_images(tmp_path / "x", size=(64, 64), suffix=suffix)
    corrupt(folder, f"dog/2.{suffix}", lambda content: content[: len(content) // 2])
    images = ImageData(folder, image_size=image_size).prepare()
    with pytest.raises(ValueError, match=f"Cannot read the image .*dog/2.{suffix}: "):
        take(images.train(12, seed=0), 2)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"image_size": 0}, "--data.image-size must be at least 1, got 0"),
        ({"image_size": 16}, "--data.image-size is for folders of images and hf:NAME"),
        ({"held_out": 0.0}, "--data.held-out must be between 0 and 1, got 0.0"),
        ({"held_out": 1.0}, "--data.held-out must be between 0 and 1, got 1.0"),
        ({"held_out": 0.999}, "--data.held-out 0.999 of 1797 images leaves none to train on"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        ImageData(**flags).prepare()


def test_a_hub_data_set_that_is_not_there_ends_in_one_sentence():
    with pytest.raises(ValueError, match=r"Cannot load --data\.source hf:/nowhere: "):
        ImageData("hf:/nowhere").prepare()


def test_without_debians_package_fashion_mnist_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(ValueError, match="apt install dataset-fashion-mnist"):
        ImageData("fashion-mnist").prepare()


@pytest.mark.parametrize("batch_size", [0, 6])
def test_batches_must_divide_among_the_processes(digits, batch_size):
    for make in (digits.train, digits.validation):
        with pytest.raises(ValueError, match="--batch-size must be a positive multiple"):
            make(*([batch_size, 0] if make == digits.train else [None, batch_size]), 0, 4)
    with pytest.raises(ValueError, match="At least 1 image"):
        digits.validation(0, 8)
