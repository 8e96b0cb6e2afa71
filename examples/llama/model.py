"""Llama in Flax NNX: RMSNorm, rotary positions, grouped-query attention and SwiGLU, no biases.

Letters in names of arrays are their axes: B batch, L length, D model, N query heads, K key and
value heads, H head, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
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
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""


def rotate(x_BxLxNxH: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding: turns each pair (i, i + H / 2) by an angle that grows with L."""
    length, head = x_BxLxNxH.shape[1], x_BxLxNxH.shape[3]
    frequency = theta ** (-np.arange(0, head, 2) / head)
    angle = np.outer(np.arange(length), frequency)[:, None, :]
    cos, sin = (jnp.asarray(f(angle), x_BxLxNxH.dtype) for f in (np.cos, np.sin))
    first, second = jnp.split(x_BxLxNxH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def linear(inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, out_std: float, rngs: nnx.Rngs):
        head = config.dim // config.heads
        self.heads, self.kv_heads, self.theta = config.heads, config.kv_heads, config.rope_theta
        self.query = linear(config.dim, config.heads * head, 0.02, rngs)
        self.key = linear(config.dim, config.kv_heads * head, 0.02, rngs)
        self.value = linear(config.dim, config.kv_heads * head, 0.02, rngs)
        self.out = linear(config.heads * head, config.dim, out_std, rngs)

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
        self.gate = linear(config.dim, config.hidden, 0.02, rngs)
        self.up = linear(config.dim, config.hidden, 0.02, rngs)
        self.down = linear(config.hidden, config.dim, out_std, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BxLxD)) * self.up(x_BxLxD))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        # Outputs into the residual stream start smaller, so that its size does not grow with depth.
        out_std = 0.02 / (2 * config.layers) ** 0.5
        self.attention_norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        self.attention = Attention(config, out_std, rngs)
        self.mlp_norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        self.mlp = SwiGLU(config, out_std, rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.attention(self.attention_norm(x_BxLxD))
        return x_BxLxD + self.mlp(self.mlp_norm(x_BxLxD))


class Llama(nnx.Module):
    """Maps int32 tokens (B, L) to float32 logits (B, L, V); the embeddings are tied."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocab_size, config.dim, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        x_BxLxD = self.embed(tokens_BxL)
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.embed.attend(self.norm(x_BxLxD)).astype(jnp.float32)
