"""What the members of a study learn: text, text after pretraining on other text, or images.

A workload loads its data, says which rows an update sees, and defines the task: the initial params
and the losses, as functions of arrays. `benchmarks.ensemble` trains it with any optimizer.

This module imports jax, flax, optax and NumPy only, until images are loaded.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

from benchmarks import corpus
from benchmarks.corpus import Text
from examples.llama.model import Llama, LlamaConfig
from examples.vit.model import ViT, ViTConfig

HELD_OUT = 4096  # rows to evaluate on at the end of a run
ON_THE_WAY = 512  # rows to evaluate on before the end
PART = 32  # rows that are evaluated at a time; on a CPU 64 take a sixth longer
PRETRAINED = "pretrained-python-512.npz"
MARGIN = 3  # of black pixels, from which shifted images are cut
SEEN = 512  # training images, at which BatchNorm takes its statistics
SMALL_LLAMA = LlamaConfig(512, dim=64, layers=2, heads=2, kv_heads=1, hidden=176, unroll=2)
SMALL_VIT = ViTConfig(28, patch=7, dim=48, layers=3, heads=3, hidden=192, unroll=3)
# The ConvNet's channels in and out, and the stride.
CONVOLUTIONS = {"first": (1, 16, 2), "second": (16, 32, 2), "third": (32, 64, 2)}


class Data(NamedTuple):
    """The arrays of a workload."""

    train: Any
    held_out: Any
    start: optax.Params | None = None
    """Params to start from instead of random ones."""


class Task(NamedTuple):
    """What is learned, as functions of arrays."""

    init: Callable[[jax.Array], optax.Params]
    """Random params, from a key."""
    loss: Callable[[optax.Params, Any, jax.Array], jax.Array]
    """Mean loss of the rows of an update in the training data."""
    held_out_loss: Callable[[optax.Params, Any], jax.Array]
    """Mean loss of held-out parts."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A Llama on text. No window of the text is read twice in a run."""

    model: LlamaConfig = SMALL_LLAMA
    text: Text = "python"
    length: int = 64
    """Tokens that a window predicts."""
    batch_size: int = 32
    """Windows in an update."""
    pretrained: bool = False
    """Whether to start from what benchmarks.pretrain made, and to read the text in its tokens."""

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values."""
        return different(dataclasses.asdict(self), dataclasses.asdict(Workload()))

    @property
    def corpus(self) -> tuple[Text, int, str | None]:
        """Text, vocabulary, and whose tokenizer it has, if not its own."""
        return self.text, self.model.vocab_size, "python" if self.pretrained else None

    def lacks(self, folder: Path) -> str | None:
        """The file that it needs and that is not in the folder."""
        names = [f"{corpus.name(*self.corpus)}.json", *([PRETRAINED] if self.pretrained else [])]
        return next((name for name in names if not (folder / name).exists()), None)

    def load(self, folder: Path) -> Data:
        tokens = corpus.load(folder, *self.corpus)
        start = None
        if self.pretrained:
            start = traverse_util.unflatten_dict(dict(np.load(folder / PRETRAINED)), sep="/")
        return Data(tokens.train, tokens.held_out, start)

    def rows(self, train: np.ndarray, seed: int, steps: int) -> np.ndarray:
        """Where the windows of each step begin in the tokens: int32 (steps, windows)."""
        there, needed = (len(train) - 1) // self.length, steps * self.batch_size
        if needed > there:
            raise ValueError(
                f"{steps:,} steps of {self.batch_size} windows need {needed:,} windows, and "
                f"{len(train):,} tokens have {there:,} of {self.length}: train for at most "
                f"{there // self.batch_size:,} steps, or make a larger corpus."
            )
        return (shuffled(seed, there)[:needed] * self.length).reshape(steps, self.batch_size)

    def parts(self, data: Data, count: int) -> np.ndarray:
        """The first `count` held-out windows, the same for all members: int32 (parts, windows of a
        part, length + 1). They are fewer where the text has fewer."""
        tokens, length = data.held_out, self.length
        there = (len(tokens) - 1) // length
        if there < ON_THE_WAY:
            raise ValueError(
                f"To evaluate takes {ON_THE_WAY} held-out windows of {length} tokens, and "
                f"{len(tokens):,} tokens have {there}: hold out more."
            )
        places = shuffled(0, there)[: min(count, there // PART * PART)] * length
        windows = tokens[places[:, None] + np.arange(length + 1)].astype(np.int32)
        return windows.reshape(-1, PART, length + 1)

    def task(self) -> Task:
        graph = nnx.graphdef(nnx.eval_shape(lambda: Llama(self.model, nnx.Rngs(0))))

        def init(key: jax.Array) -> optax.Params:
            return nnx.to_pure_dict(nnx.state(Llama(self.model, nnx.Rngs(key)), nnx.Param))

        def of_windows(params: optax.Params, windows: jax.Array) -> jax.Array:
            logits = nnx.merge(graph, params)(windows[:, :-1])
            return cross_entropy(logits, windows[:, 1:])

        def loss(params: optax.Params, tokens: jax.Array, starts: jax.Array) -> jax.Array:
            windows = tokens[starts[:, None] + jnp.arange(self.length + 1)]
            return of_windows(params, windows.astype(jnp.int32))

        def held_out_loss(params: optax.Params, parts: jax.Array) -> jax.Array:
            return jax.lax.map(functools.partial(of_windows, params), parts).mean()

        return Task(init, loss, held_out_loss)


@dataclasses.dataclass(frozen=True)
class ImageWorkload:
    """A classifier of some of Fashion-MNIST's images, shifted and flipped at random."""

    model: Literal["vit", "convnet"]
    batch_size: int = 64
    images: int = 10_240
    """Images of an epoch."""

    def changes(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lacks(self, folder: Path) -> str | None:
        from examples.vit.sources import FASHION_MNIST

        return None if FASHION_MNIST.is_dir() else str(FASHION_MNIST)

    def load(self, folder: Path) -> Data:
        """Of the training images those that a fixed shuffle has first; all test images."""
        from examples.vit.sources import Arrays, open_source

        source = open_source("fashion-mnist", None)
        some = shuffled(0, len(source.train.labels))[: self.images]
        assert isinstance(source.train, Arrays)
        assert isinstance(source.validation, Arrays)
        train = {"image": source.train.images[some], "label": source.train.labels[some]}
        held_out = {"image": source.validation.images, "label": source.validation.labels}
        return Data(train, held_out)

    def rows(self, train: Mapping[str, np.ndarray], seed: int, steps: int) -> np.ndarray:
        """Number, shift and flip of the images of each step: int32 (steps, images, 4). Each epoch
        has an order of its own."""
        rng, there = np.random.default_rng(seed), len(train["label"])
        count = steps * self.batch_size
        epochs = [rng.permutation(there) for _ in range(math.ceil(count / there))]
        number = np.concatenate(epochs)[:count]
        top, left = rng.integers(0, 2 * MARGIN + 1, (2, count))
        rows = np.stack([number, top, left, rng.integers(0, 2, count)], axis=-1)
        return rows.astype(np.int32).reshape(steps, self.batch_size, 4)

    def parts(self, data: Data, count: int) -> dict[str, np.ndarray]:
        """Held-out images and labels in parts; and training images as they are, at which BatchNorm
        takes the statistics that an evaluation needs."""
        some = shuffled(0, len(data.held_out["label"]))[: count // PART * PART].reshape(-1, PART)
        held_out = {name: values[some] for name, values in data.held_out.items()}
        return {**held_out, "seen": data.train["image"][:SEEN]}

    def task(self) -> Task:
        if self.model == "vit":
            graph = nnx.graphdef(nnx.eval_shape(lambda: ViT(SMALL_VIT, nnx.Rngs(0))))

            def init(key: jax.Array) -> optax.Params:
                return nnx.to_pure_dict(nnx.state(ViT(SMALL_VIT, nnx.Rngs(key)), nnx.Param))

            def apply(params: optax.Params, images: jax.Array, statistics: Any = None) -> Any:
                return nnx.merge(graph, params)(images), None
        else:
            init, apply = convnet_params, convnet

        def loss(params: optax.Params, train: Any, rows: jax.Array) -> jax.Array:
            numbers, top, left, flip = rows.T
            images = train["image"][numbers]
            shape, margins = images.shape[1:], ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
            images = jax.vmap(lambda i, *at: jax.lax.dynamic_slice(i, (*at, 0), shape))(
                jnp.pad(images, margins), top, left
            )
            images = jnp.where(flip[:, None, None, None] == 1, images[:, :, ::-1], images)
            return cross_entropy(apply(params, normalized(images))[0], train["label"][numbers])

        def held_out_loss(params: optax.Params, parts: Any) -> jax.Array:
            _, statistics = apply(params, normalized(parts["seen"]))

            def of_part(part: tuple[jax.Array, jax.Array]) -> jax.Array:
                logits, _ = apply(params, normalized(part[0]), statistics)
                return cross_entropy(logits, part[1])

            return jax.lax.map(of_part, (parts["image"], parts["label"])).mean()

        return Task(init, loss, held_out_loss)


def convnet_params(key: jax.Array) -> optax.Params:
    keys = dict(zip([*CONVOLUTIONS, "head"], jax.random.split(key, 4), strict=True))
    he = jax.nn.initializers.he_normal()
    params: dict[str, Any] = {
        name: {
            "kernel": he(keys[name], (9 * inputs, outputs)),
            "scale": jnp.ones(outputs),
            "bias": jnp.zeros(outputs),
        }
        for name, (inputs, outputs, _) in CONVOLUTIONS.items()
    }
    params["head"] = {"kernel": he(keys["head"], (64, 10)), "bias": jnp.zeros(10)}
    return params


def convnet(params: Any, x: jax.Array, statistics: Any = None) -> tuple[jax.Array, Any]:
    """Three convolutions with BatchNorm: the logits, and mean and variance of each, which are those
    of the batch unless they are given."""
    found = {}
    for name, (_, _, stride) in CONVOLUTIONS.items():
        own, (_, height, width, _) = params[name], x.shape
        # As one product of matrices, which on a CPU is many times as fast as XLA's convolution.
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [
            padded[:, top : top + height : stride, left : left + width : stride]
            for top in range(3)
            for left in range(3)
        ]
        x = jnp.concatenate(shifted, axis=-1) @ own["kernel"]
        axes = (0, 1, 2)
        mean, variance = statistics[name] if statistics else (x.mean(axes), x.var(axes))
        found[name] = mean, variance
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * own["scale"] + own["bias"]
        x = jax.nn.relu(x)
    return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], found


def normalized(images: jax.Array) -> jax.Array:
    return images / 127.5 - 1


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.lru_cache(maxsize=8)
def shuffled(seed: int, count: int) -> np.ndarray:
    """An order of `count` rows. Cached, because members of a group share few seeds."""
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


def different(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not the defaults, at any depth."""
    return {
        name: different(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != defaults[name]
    }
