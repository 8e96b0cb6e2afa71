"""A small Llama that learns Python from the standard library: python -m examples.minimal_llama

One file to copy: Flax NNX, Optax and gpa_optax. `python -m examples.llama` is the program that also
resumes, shards, compares and exports.
"""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gpa_optax import annealed_adamw, eval_params

STEPS, WARMUP_STEPS, EVALUATE_EVERY = 1000, 200, 100
LEARNING_RATE = 4e-3  # about twice what is good for AdamW
BATCH_SIZE, LENGTH, VALIDATION_SIZE = 16, 128, 64
VOCABULARY, DIM, LAYERS, HEADS, HIDDEN = 256, 128, 4, 4, 384  # tokens are bytes
SEED = 0


def rotate(x_BxLxNxH):
    """Rotary position embedding."""
    length, head = x_BxLxNxH.shape[1], x_BxLxNxH.shape[3]
    frequency = 10_000.0 ** (-np.arange(0, head, 2) / head)
    angle = np.outer(np.arange(length), frequency)[:, None, :]
    first, second = jnp.split(x_BxLxNxH, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def linear(inputs, outputs, rngs):
    init = nnx.initializers.normal(0.02)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)


class Block(nnx.Module):
    """Causal attention and SwiGLU, each behind a norm and around a residual stream."""

    def __init__(self, rngs):
        self.attention_norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.query_key_value = linear(DIM, 3 * DIM, rngs)
        self.out = linear(DIM, DIM, rngs)
        self.mlp_norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.gate = linear(DIM, HIDDEN, rngs)
        self.up = linear(DIM, HIDDEN, rngs)
        self.down = linear(HIDDEN, DIM, rngs)

    def __call__(self, x_BxLxD):
        batch, length, _ = x_BxLxD.shape
        qkv = self.query_key_value(self.attention_norm(x_BxLxD))
        q, k, v = jnp.split(qkv.reshape(batch, length, 3 * HEADS, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BxLxD = x_BxLxD + self.out(mixed.reshape(batch, length, DIM))
        h_BxLxD = self.mlp_norm(x_BxLxD)
        return x_BxLxD + self.down(jax.nn.silu(self.gate(h_BxLxD)) * self.up(h_BxLxD))


class Llama(nnx.Module):
    """Maps tokens (B, L) to logits (B, L, V)."""

    def __init__(self, rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(VOCABULARY, DIM, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(DIM, rngs=rngs)

    def __call__(self, tokens_BxL):
        x_BxLxD = self.embed(tokens_BxL)
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.embed.attend(self.norm(x_BxLxD))


def loss(model, tokens_BxL):
    """Cross-entropy of each byte after the first, in nats."""
    logits_BxLxV = model(tokens_BxL[:, :-1])
    labels_BxL = tokens_BxL[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, labels_BxL).mean()


def matrices(params):
    """Weight decay is for these; norms are vectors."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


@nnx.jit
def train_step(model, optimizer, tokens_BxL):
    value, grads = nnx.value_and_grad(loss)(model, tokens_BxL)
    optimizer.update(model, grads)
    return value


@nnx.jit
def validation_loss(model, optimizer, tokens_BxL):
    """At x, the average; the model itself holds y, where gradients are taken."""
    averaged = nnx.clone(model)
    nnx.update(averaged, eval_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    return loss(averaged, tokens_BxL)


def read_text():
    """The bytes of the standard library's modules: to train on, and every tenth to validate on."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = set(paths[::10])
    parts = [p for p in paths if p not in held_out], [p for p in paths if p in held_out]
    return [np.frombuffer(b"".join(p.read_bytes() for p in part), np.uint8) for part in parts]


def windows(text, count, rng):
    """Random pieces of the text, of LENGTH bytes and one more to predict."""
    starts = rng.integers(0, len(text) - LENGTH, count)
    return np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


def main(steps=STEPS, warmup_steps=WARMUP_STEPS):
    training, held_out = read_text()
    validation = windows(held_out, VALIDATION_SIZE, np.random.default_rng(SEED + 1))
    rng = np.random.default_rng(SEED)
    model = Llama(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(
            optax.clip_by_global_norm(1.0),
            annealed_adamw(LEARNING_RATE, steps, warmup_steps, mask=matrices),
        ),
        wrt=nnx.Param,
    )
    losses = []
    for step in range(1, steps + 1):
        train_loss = train_step(model, optimizer, windows(training, BATCH_SIZE, rng))
        if step % EVALUATE_EVERY == 0 or step == steps:
            losses.append(float(validation_loss(model, optimizer, validation)))
            print(f"step {step}: training {train_loss:.3f}, validation at x {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
