"""Llama in Flax NNX: RMSNorm, rotary positions, grouped-query attention and SwiGLU, no biases.

Letters in names of arrays are their axes: B batch, L length, D model, N query heads, K key and
value heads, H head, V vocabulary.
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
class LlamaConfig:
    """Shapes and precision of a Llama."""

    vocab_size: int = 512
    """Tokens that the tokenizer knows."""
    dim: int = 96
    """Width of the residual stream."""
    layers: int = 2
    """Blocks of attention and SwiGLU."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads, each shared by heads / kv_heads query heads."""
    hidden: int = 256
    """Width within SwiGLU."""
    tied: bool = True
    """Whether the output layer is the transposed embedding."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; norms, softmax and the loss are float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the params. bfloat16 needs an optimizer that has a float32 copy, as GPA does."""
    remat: bool = False
    """Whether to compute each block again in the backward pass instead of keeping it in memory."""
    unroll: int = 1
    """Blocks per iteration of the scan over them: more compile more slowly and may run faster."""

    def __post_init__(self):
        for name in ("dim", "layers", "heads", "kv_heads", "hidden", "unroll"):
            if getattr(self, name) < 1:
                flag = "--model." + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}.")
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"--model.dim ({self.dim}) must be a multiple of --model.heads ({self.heads}), and "
                f"that of --model.kv-heads ({self.kv_heads})."
            )
        if self.dim // self.heads % 2:
            raise ValueError(
                f"--model.dim / --model.heads must be even for rotary positions, got "
                f"{self.dim} / {self.heads}."
            )
        if self.vocab_size < 257:
            raise ValueError(
                f"--model.vocab-size must be at least 257 (all bytes and the end of a document), "
                f"got {self.vocab_size}."
            )


# The last three have the shapes of published models: JackFram/llama-160m, Llama 3.2 1B, Llama 3 8B.
PRESETS = {
    "tiny": LlamaConfig(unroll=2),
    "15m": LlamaConfig(4096, dim=384, layers=8, heads=6, kv_heads=6, hidden=1024),
    "160m": LlamaConfig(
        32_000, 768, 12, 12, 12, 3072, tied=False, norm_eps=1e-6, dtype="bfloat16"
    ),
    "1b": LlamaConfig(
        128_256, 2048, 16, 32, 8, 8192, rope_theta=500_000.0, dtype="bfloat16", remat=True
    ),
    "8b": LlamaConfig(
        128_256, 4096, 32, 32, 8, 14_336,
        tied=False, rope_theta=500_000.0, dtype="bfloat16", remat=True,
    ),
}  # fmt: skip


def training_flops(config: LlamaConfig, sequences: int, length: int) -> float:
    """Floating-point operations of a training step's matrix products: 6 for each token and each
    param in a product, and those of attention, where the causal mask leaves half of the square."""
    head = config.dim // config.heads
    block = (
        2 * config.dim * head * (config.heads + config.kv_heads) + 3 * config.dim * config.hidden
    )
    params = config.layers * block + config.vocab_size * config.dim
    attention = config.layers * 2 * config.dim * length / 2
    return 6.0 * sequences * length * (params + attention)


def rotate(x_BxLxNxH: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding: turns each pair (i, i + H / 2) by an angle that grows with L."""
    length, head = x_BxLxNxH.shape[1], x_BxLxNxH.shape[3]
    frequency = theta ** (-np.arange(0, head, 2) / head)
    angle = np.outer(np.arange(length), frequency)[:, None, :]
    cos, sin = (jnp.asarray(f(angle), x_BxLxNxH.dtype) for f in (np.cos, np.sin))
    first, second = jnp.split(x_BxLxNxH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def precision(config: LlamaConfig) -> dict[str, jnp.dtype]:
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def linear(config: LlamaConfig, inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> Linear:
    init = nnx.initializers.normal(std)
    return Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs, **precision(config))


def norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs, **precision(config))


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, out_std: float, rngs: nnx.Rngs):
        head = config.dim // config.heads
        self.heads, self.kv_heads, self.theta = config.heads, config.kv_heads, config.rope_theta
        self.query = linear(config, config.dim, config.heads * head, 0.02, rngs)
        self.key = linear(config, config.dim, config.kv_heads * head, 0.02, rngs)
        self.value = linear(config, config.dim, config.kv_heads * head, 0.02, rngs)
        self.out = linear(config, config.heads * head, config.dim, out_std, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        batch, length, _ = x_BxLxD.shape
        q_BxLxNxH = self.query(x_BxLxD).reshape(batch, length, self.heads, -1)
        k_BxLxKxH = self.key(x_BxLxD).reshape(batch, length, self.kv_heads, -1)
        v_BxLxKxH = self.value(x_BxLxD).reshape(batch, length, self.kv_heads, -1)
        q_BxLxNxH, k_BxLxKxH = rotate(q_BxLxNxH, self.theta), rotate(k_BxLxKxH, self.theta)
        mixed = jax.nn.dot_product_attention(q_BxLxNxH, k_BxLxKxH, v_BxLxKxH, is_causal=True)
        return self.out(mixed.reshape(batch, length, -1))


class SwiGLU(nnx.Module):
    def __init__(self, config: LlamaConfig, out_std: float, rngs: nnx.Rngs):
        self.gate = linear(config, config.dim, config.hidden, 0.02, rngs)
        self.up = linear(config, config.dim, config.hidden, 0.02, rngs)
        self.down = linear(config, config.hidden, config.dim, out_std, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BxLxD)) * self.up(x_BxLxD))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        # Outputs into the residual stream start smaller, so that its size does not grow with depth.
        out_std = 0.02 / (2 * config.layers) ** 0.5
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, out_std, rngs)
        self.mlp_norm = norm(config, rngs)
        self.mlp = SwiGLU(config, out_std, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.attention(self.attention_norm(x_BxLxD))
        return split_batch(x_BxLxD + self.mlp(self.mlp_norm(x_BxLxD)))


class Llama(nnx.Module):
    """Maps int32 tokens (B, L) to float32 logits (B, L, V)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(
            config.vocab_size, config.dim, embedding_init=init, rngs=rngs, **precision(config)
        )
        # Stacked: every param below `blocks` has the layer as its first axis.
        stack = nnx.split_rngs(splits=config.layers)(nnx.vmap(lambda rngs: Block(config, rngs)))
        self.blocks = stack(rngs)
        self.norm = norm(config, rngs)
        if not config.tied:
            self.head = linear(config, config.dim, config.vocab_size, 0.02, rngs)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        def run(block: Block, x_BxLxD: jax.Array) -> jax.Array:
            return block(x_BxLxD)

        run = nnx.remat(run) if self.config.remat else run
        scan = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, unroll=self.config.unroll)
        x_BxLxD = self.norm(scan(self.blocks, split_batch(self.embed(tokens_BxL))))
        logits = self.embed.attend(x_BxLxD) if self.config.tied else self.head(x_BxLxD)
        return logits.astype(jnp.float32)
