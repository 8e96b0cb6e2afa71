"""The ViT workload: its configuration, presets and loss."""

import dataclasses
from functools import partial
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from examples.config import Distributed, OneRun, Training, check_master_copy
from examples.settings import Name, Settings, default_settings
from examples.vit.data import ImageData, Images
from examples.vit.model import PRESETS, ViT, ViTConfig
from examples.workload import Batch, Task

Preset = Literal["tiny", "ti16", "s16"]


@dataclasses.dataclass(frozen=True)
class ViTFlags(Training):
    """The flags of every command that trains ViTs."""

    preset: Preset = "tiny"
    """Size, which decides the other defaults: tiny (for images of 8 or 28 pixels), ti16, s16
    (AlgoPerf's ImageNet workload)."""
    label_smoothing: float = 0.0
    """Part of the probability that training spreads evenly over all classes."""
    data: ImageData = ImageData()
    model: ViTConfig = PRESETS["tiny"]
    distributed: Annotated[Distributed, tyro.conf.arg(name="")] = Distributed()

    workload = "vit"
    PRESETS = PRESETS
    data_options = {}  # noqa: RUF012

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must be in [0, 1), got {self.label_smoothing}.")

    def open_data(self) -> Images:
        return self.data.prepare()

    def fitted(self, images: Images) -> Self:
        """The flags with the model for these images: the preset `tiny` adapts to their size, the
        other presets require the size that they have.

        Raises:
          ValueError: if the model is not for such images.
        """
        height, width, channels = images.image_shape
        shape = {"image_size": height, "channels": channels, "classes": images.classes}
        if self.preset == "tiny" and height == width:
            default, model = PRESETS["tiny"], self.model
            patch = model.patch if height // model.patch <= 8 else height // 7
            adapted = {
                name: value
                for name, value in {**shape, "patch": patch}.items()
                if getattr(model, name) == getattr(default, name)  # else it was given
            }
            self = dataclasses.replace(self, model=dataclasses.replace(model, **adapted))
        wanted = {name: getattr(self.model, name) for name in shape}
        if wanted != shape or height != width:
            size = wanted["image_size"]
            raise ValueError(
                f"--data.source {self.data.source} has images of {height} x {width} x {channels} "
                f"in {images.classes} classes, and the model is for {size} x {size} x "
                f"{wanted['channels']} in {wanted['classes']}; set --data.image-size, "
                "--model.image-size, --model.channels and --model.classes."
            )
        return self

    def task(self) -> Task:
        size, channels = self.model.image_size, self.model.channels
        return Task(
            lambda rngs: ViT(self.model, rngs),
            partial(class_loss, label_smoothing=self.label_smoothing),
            {
                "image": jax.ShapeDtypeStruct((size, size, channels), jnp.float32),
                "label": jax.ShapeDtypeStruct((), jnp.int32),
            },
            "images",
            1,
        )

    @staticmethod
    def preset_values(preset: Preset) -> dict[str, Any]:
        """The defaults of a preset."""
        return {"preset": preset, "model": PRESETS[preset], **RUNS[preset]}

    @staticmethod
    def preset_settings(preset: Preset, optimizer: Name) -> Settings:
        """The defaults of an optimizer for a preset."""
        return default_settings(optimizer, LEARNING_RATES[preset], 0.1, small=preset == "tiny")


@dataclasses.dataclass(frozen=True)
class TrainViT(OneRun, ViTFlags):
    """Trains a ViT on images: scikit-learn's digits, Fashion-MNIST, your own folders, or a dataset
    of the Hugging Face hub.

    Ctrl-C saves a checkpoint and stops; the same command resumes from there. Other commands: plan
    (which has a --help of its own), and python -m examples.compare vit.
    """

    def __post_init__(self):
        super().__post_init__()
        check_master_copy(self.model.param_dtype, self.optimizer)


RUNS = {
    "tiny": {"steps": 500, "batch_size": 64, "validation_examples": None},
    "ti16": {
        "steps": 300_000, "batch_size": 1024, "validation_examples": None, "evaluate_every": 2500,
        "data": ImageData("hf:imagenet-1k", image_size=224),
    },
    "s16": {
        "steps": 300_000, "batch_size": 1024, "validation_examples": None, "evaluate_every": 2500,
        "data": ImageData("hf:imagenet-1k", image_size=224),
    },
}  # fmt: skip
# Peak learning rates for AdamW, where a search would start.
LEARNING_RATES = {"tiny": 4e-3, "ti16": 1e-3, "s16": 1e-3}


def class_loss(
    model: nnx.Module, batch: Batch, key: jax.Array | None, label_smoothing: float = 0.0
) -> dict[str, jax.Array]:
    """Cross-entropy in nats and accuracy of each image. Labels are smoothed while training."""
    logits = model(batch["image"], key)
    labels = jax.nn.one_hot(batch["label"], logits.shape[-1])
    if key is not None:
        labels = optax.smooth_labels(labels, label_smoothing)
    loss = optax.softmax_cross_entropy(logits, labels)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).astype(jnp.float32)}
