"""ViT in Flax NNX, as in big_vision and in AlgoPerf's ImageNet workload.

Patches get fixed 2-D sine and cosine positions and pass through pre-LayerNorm blocks of attention
and a GELU MLP, with biases. The tokens are then averaged (GAP) or pooled by an attention with one
learned query (MAP). Params start as in big_vision: Xavier kernels, a classifier of zeros.

AlgoPerf's ViT-S/16, the preset `s16`, has the GAP head and, between it and the classifier, a tanh
layer (`pre_logits`). big_vision's plain ViT-S/16 has no such layer: --model.no-pre-logits.

Letters in names of arrays are their axes: B batch, H height and W width in pixels, C channels,
L patches, P numbers in a patch, D model, N heads, E width of a head.

References:
  * Beyer et al., Better plain ViT baselines for ImageNet-1k, https://arxiv.org/abs/2205.01580
  * Dahl et al., Benchmarking Neural Network Training Algorithms, https://arxiv.org/abs/2306.07179
  * Zhai et al., Scaling Vision Transformers (MAP), https://arxiv.org/abs/2106.04560
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.layers import Linear
from examples.sharding import split_batch


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shapes and precision of a ViT."""

    image_size: int = 8
    """Height and width of the images in pixels."""
    channels: int = 1
    """Numbers in a pixel: 1 for gray, 3 for colors."""
    classes: int = 10
    """Classes of images."""
    patch: int = 2
    """Height and width of a patch in pixels."""
    dim: int = 64
    """Width of the residual stream."""
    layers: int = 4
    """Blocks of attention and MLP."""
    heads: int = 4
    """Heads of attention."""
    hidden: int = 256
    """Width within the MLPs."""
    dropout: float = 0.0
    """Part of the activations set to zero while training."""
    head: Literal["gap", "map"] = "gap"
    """How tokens become one vector: by their average (GAP) or a learned query's attention (MAP)."""
    pre_logits: bool = False
    """Whether a tanh layer stands between the head and the classifier, as in AlgoPerf."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; norms, softmax, the classifier and the loss are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the params. bfloat16 needs an optimizer that has a float32 copy, as GPA does."""
    remat: bool = False
    """Whether to compute each block again in the backward pass instead of keeping it in memory."""
    unroll: int = 1
    """Blocks per iteration of the scan over them: more compile more slowly and may run faster."""

    def __post_init__(self):
        for name in (
            "image_size", "channels", "classes", "patch", "dim", "layers", "heads", "hidden",
            "unroll",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                flag = "--model." + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}.")
        if self.image_size % self.patch:
            raise ValueError(
                f"--model.patch must divide the size of the images, which is {self.image_size}, "
                f"got {self.patch}."
            )
        if self.dim % self.heads:
            raise ValueError(
                f"--model.dim ({self.dim}) must be a multiple of --model.heads ({self.heads})."
            )
        if self.dim % 4 or self.dim < 8:
            raise ValueError(
                f"--model.dim must be a multiple of 4 and at least 8, for the sines and cosines of "
                f"the two axes, got {self.dim}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--model.dropout must be in [0, 1), got {self.dropout}.")


# `tiny` is for scikit-learn's digits; for 28x28 images use it with patches of 4. The others have
# the shapes of ViT-Ti/16 and ViT-S/16 (Table 2 of Zhai et al.) with AlgoPerf's head.
PRESETS = {
    "tiny": ViTConfig(unroll=4),
    "ti16": ViTConfig(
        224, 3, 1000, patch=16, dim=192, layers=12, heads=3, hidden=768,
        pre_logits=True, dtype="bfloat16",
    ),
    "s16": ViTConfig(
        224, 3, 1000, patch=16, dim=384, layers=12, heads=6, hidden=1536,
        pre_logits=True, dtype="bfloat16",
    ),
}  # fmt: skip


def patches(image_BxHxWxC: jax.Array, patch: int) -> jax.Array:
    """Cuts images into patches: row by row, and within a patch by row, column and channel."""
    batch, height, width, channels = image_BxHxWxC.shape
    tiles = image_BxHxWxC.reshape(
        batch, height // patch, patch, width // patch, patch, channels
    ).swapaxes(2, 3)
    return tiles.reshape(batch, -1, patch * patch * channels)


def positions(side: int, dim: int) -> np.ndarray:
    """Fixed positions of side * side patches (L, D): for the column, then for the row of a patch,
    the sines and the cosines at D / 4 wavelengths from 2 pi to 10,000 * 2 pi patches."""
    row_L, column_L = np.divmod(np.arange(side * side), side)
    frequency = 10_000.0 ** -np.linspace(0, 1, dim // 4)
    angles = [np.outer(axis_L, frequency) for axis_L in (column_L, row_L)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)


def precision(config: ViTConfig) -> dict[str, jnp.dtype]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def linear(config: ViTConfig, inputs: int, outputs: int, rngs: nnx.Rngs, **settings) -> Linear:
    settings = {"kernel_init": nnx.initializers.xavier_uniform()} | precision(config) | settings
    return Linear(inputs, outputs, rngs=rngs, **settings)


def norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.dim, rngs=rngs, **precision(config))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    return nnx.Dropout(rate, deterministic=key is None)(x, rngs=key)


class Attention(nnx.Module):
    """Multi-head attention of queries (B, Q, D) over tokens (B, L, D)."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.query = linear(config, config.dim, config.dim, rngs)
        self.key = linear(config, config.dim, config.dim, rngs)
        self.value = linear(config, config.dim, config.dim, rngs)
        self.out = linear(config, config.dim, config.dim, rngs)

    def __call__(self, queries_BxQxD: jax.Array, x_BxLxD: jax.Array) -> jax.Array:
        def split(x):
            return x.reshape(*x.shape[:2], self.heads, -1)

        q_BxQxNxE = split(self.query(queries_BxQxD))
        k_BxLxNxE, v_BxLxNxE = split(self.key(x_BxLxD)), split(self.value(x_BxLxD))
        mixed_BxQxNxE = jax.nn.dot_product_attention(q_BxQxNxE, k_BxLxNxE, v_BxLxNxE)
        return self.out(mixed_BxQxNxE.reshape(queries_BxQxD.shape))


class MLP(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.rate = config.dropout
        bias_init = nnx.initializers.normal(1e-6)
        self.up = linear(config, config.dim, config.hidden, rngs, bias_init=bias_init)
        self.down = linear(config, config.hidden, config.dim, rngs, bias_init=bias_init)

    def __call__(self, x_BxLxD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.down(dropout(jax.nn.gelu(self.up(x_BxLxD)), self.rate, key))


class Block(nnx.Module):
    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BxLxD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        y_BxLxD = self.attention_norm(x_BxLxD)
        x_BxLxD = x_BxLxD + dropout(self.attention(y_BxLxD, y_BxLxD), self.rate, keys[0])
        y_BxLxD = self.mlp(self.mlp_norm(x_BxLxD), keys[1])
        return split_batch(x_BxLxD + dropout(y_BxLxD, self.rate, keys[2]))


class MAP(nnx.Module):
    """Multi-head attention pooling: a learned query asks all tokens, an MLP refines the answer."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.param_dtype)
        probe_1xD = nnx.initializers.xavier_uniform()(rngs.params(), (1, config.dim), dtype)
        # A vector, because some optimizers take every matrix for a linear map.
        self.probe = nnx.Param(probe_1xD[0])
        self.attention = Attention(config, rngs)
        self.norm = norm(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        batch, _, dim = x_BxLxD.shape
        probe_Bx1xD = jnp.broadcast_to(self.probe.astype(x_BxLxD.dtype), (batch, 1, dim))
        y_Bx1xD = self.attention(probe_Bx1xD, x_BxLxD)
        return (y_Bx1xD + self.mlp(self.norm(y_Bx1xD)))[:, 0]


class ViT(nnx.Module):
    """Maps images (B, H, W, C) to float32 logits (B, classes)."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        # One product of matrices: the same function as a convolution with the patch as its stride,
        # twice as fast on a CPU, and its kernel is a matrix to Muon and to FSDP.
        lecun, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros
        numbers = config.patch**2 * config.channels
        self.embed = linear(config, numbers, config.dim, rngs, kernel_init=lecun)
        # Stacked: every param below `blocks` has the layer as its first axis.
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)
        self.norm = norm(config, rngs)
        if config.head == "map":
            self.pool = MAP(config, rngs)
        if config.pre_logits:
            self.pre_logits = linear(config, config.dim, config.dim, rngs, kernel_init=lecun)
        self.head = linear(
            config, config.dim, config.classes, rngs, kernel_init=zeros, dtype=jnp.float32
        )

    def __call__(self, image_BxHxWxC: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """With a key the config's dropout applies; without one the model is deterministic."""
        config = self.config
        key = key if config.dropout else None
        first, rest = (None, None) if key is None else jax.random.split(key)
        keys = None if rest is None else jax.random.split(rest, config.layers)

        patches_BxLxP = patches(image_BxHxWxC, config.patch)
        position_LxD = jnp.asarray(
            positions(config.image_size // config.patch, config.dim), jnp.dtype(config.dtype)
        )
        x_BxLxD = split_batch(self.embed(patches_BxLxP) + position_LxD)
        x_BxLxD = self.norm(self.encode(dropout(x_BxLxD, config.dropout, first), keys))
        x_BxD = self.pool(x_BxLxD) if config.head == "map" else x_BxLxD.mean(axis=1)
        if config.pre_logits:
            x_BxD = jnp.tanh(self.pre_logits(x_BxD))
        return self.head(x_BxD)

    def encode(self, x_BxLxD: jax.Array, keys: jax.Array | None) -> jax.Array:
        def run(block: Block, key: jax.Array | None, x_BxLxD: jax.Array) -> jax.Array:
            return block(x_BxLxD, key)

        run = nnx.remat(run) if self.config.remat else run
        scan = nnx.scan(
            run, in_axes=(0, 0, nnx.Carry), out_axes=nnx.Carry, unroll=self.config.unroll
        )
        return scan(self.blocks, keys, x_BxLxD)
