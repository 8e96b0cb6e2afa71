"""Images as a workload of the studies: what is seen of them, and that they are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import needs

needs("flax")

from benchmarks import ensemble
from benchmarks.ensemble import Member
from benchmarks.workloads import Data, ImageWorkload, convnet, convnet_params


@pytest.fixture(scope="module")
def images():
    """The brighter the higher the label, and the upper half more so."""
    rng = np.random.default_rng(0)

    def some(count):
        label = rng.integers(0, 10, count).astype(np.int32)
        image = rng.integers(0, 60, (count, 28, 28, 1)) + 10 * label[:, None, None, None]
        image[:, :14] += 5 * label[:, None, None, None]
        return {"image": image.astype(np.uint8), "label": label}

    return Data(some(640), some(1024))


@pytest.mark.parametrize("model", ["vit", "convnet"])
def test_images_are_learned(model, images):
    workload = ImageWorkload(model, batch_size=32)
    run = Member("annealed", 100, 0, 1e-2, warmup=0.2, workload=workload)
    [result] = ensemble.train([run], images)
    assert result.final < 1.8 < np.log(10)


def test_each_epoch_of_images_is_a_shuffle_and_shifts_stay_in_the_margin(images):
    rows = ImageWorkload("vit", batch_size=64).rows(images.train, seed=0, steps=25)
    number, top, left, flip = rows.reshape(-1, 4).T
    epochs = number[:1280].reshape(2, 640)
    assert [len(np.unique(epoch)) for epoch in epochs] == [640, 640]
    assert (epochs[0] != epochs[1]).any()
    for values, largest in ((top, 6), (left, 6), (flip, 1)):
        assert (values.min(), values.max()) == (0, largest)


def test_an_image_is_shifted_and_flipped_as_its_row_says(images):
    """The ViT's loss of a row is that of the image that NumPy cuts out."""
    task = ImageWorkload("vit").task()
    params = task.init(jax.random.key(0))
    params["head"]["kernel"] += 0.1 * jax.random.normal(jax.random.key(1), (48, 10))
    number, top, left = 3, 1, 5
    padded = np.pad(images.train["image"][number], ((3, 3), (3, 3), (0, 0)))
    cut = padded[top : top + 28, left : left + 28][:, ::-1]
    moved = {"image": np.stack([cut]), "label": images.train["label"][[number]]}
    centred = jnp.array([[0, 3, 3, 0]])
    expected = task.loss(params, jax.tree.map(jnp.asarray, moved), centred)
    train = jax.tree.map(jnp.asarray, images.train)
    found = task.loss(params, train, jnp.array([[number, top, left, 1]]))
    assert float(found) == pytest.approx(float(expected), abs=1e-6)
    assert abs(found - task.loss(params, train, jnp.array([[number, 3, 3, 0]]))) > 1e-3


def test_batch_norm_is_evaluated_at_the_statistics_of_what_was_seen(images):
    params = convnet_params(jax.random.key(0))
    seen, other = (jnp.asarray(images.train["image"][i : i + 64] / 127.5 - 1) for i in (0, 64))
    logits, statistics = convnet(params, seen)
    np.testing.assert_allclose(convnet(params, seen, statistics)[0], logits, atol=1e-5)
    of_one = convnet(params, other[:1], statistics)[0]
    np.testing.assert_allclose(convnet(params, other, statistics)[0][:1], of_one, atol=1e-5)
    assert float(jnp.abs(convnet(params, other)[0][:1] - of_one).max()) > 1e-3
