"""A small ViT that learns scikit-learn's handwritten digits: python -m examples.minimal_vit

One file to copy: Flax NNX, Optax and gpa_optax. `python -m examples.vit` is the program that also
resumes, shards, compares and reads other images. Here the length of the run is not decided
beforehand: the learning rate is constant after its warmup, and x is good at any step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from gpa_optax import anytime_adamw, eval_params

STEPS, WARMUP_STEPS, EVALUATE_EVERY = 500, 100, 100
LEARNING_RATE = 4e-3
BATCH_SIZE, VALIDATION_SIZE = 64, 360
SIZE, PATCH, CLASSES = 8, 2, 10  # pixels, pixels, digits
DIM, LAYERS, HEADS, HIDDEN = 64, 4, 4, 256
SEED = 0


class Block(nnx.Module):
    """Attention and an MLP, each behind a norm and around a residual stream."""

    def __init__(self, rngs):
        self.attention_norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.query_key_value = nnx.Linear(DIM, 3 * DIM, rngs=rngs)
        self.out = nnx.Linear(DIM, DIM, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.up = nnx.Linear(DIM, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, DIM, rngs=rngs)

    def __call__(self, x_BxLxD):
        batch, length, _ = x_BxLxD.shape
        qkv = self.query_key_value(self.attention_norm(x_BxLxD))
        q, k, v = jnp.split(qkv.reshape(batch, length, 3 * HEADS, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(q, k, v)
        x_BxLxD = x_BxLxD + self.out(mixed.reshape(batch, length, DIM))
        return x_BxLxD + self.down(jax.nn.gelu(self.up(self.mlp_norm(x_BxLxD))))


class ViT(nnx.Module):
    """Maps images (B, H, W) to logits (B, classes)."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(PATCH * PATCH, DIM, rngs=rngs)
        positions = nnx.initializers.normal(0.02)(rngs.params(), ((SIZE // PATCH) ** 2, DIM))
        self.positions = nnx.Param(positions)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.head = nnx.Linear(DIM, CLASSES, rngs=rngs)

    def __call__(self, image_BxHxW):
        side = SIZE // PATCH
        tiles = image_BxHxW.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3)
        x_BxLxD = self.embed(tiles.reshape(-1, side * side, PATCH * PATCH)) + self.positions
        for block in self.blocks:
            x_BxLxD = block(x_BxLxD)
        return self.head(self.norm(x_BxLxD).mean(axis=1))


def loss(model, images, labels):
    """Cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def kernels(params):
    """Weight decay is for these; norms, biases and positions have other names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" in jax.tree_util.keystr(path), params
    )


@nnx.jit
def train_step(model, optimizer, images, labels):
    value, grads = nnx.value_and_grad(loss)(model, images, labels)
    optimizer.update(model, grads)
    return value


@nnx.jit
def validate(model, optimizer, images, labels):
    """Loss and accuracy at x, the average; the model itself holds y."""
    averaged = nnx.clone(model)
    nnx.update(averaged, eval_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    return loss(averaged, images, labels), (averaged(images).argmax(-1) == labels).mean()


def main(steps=STEPS, warmup_steps=WARMUP_STEPS):
    digits, rng = load_digits(), np.random.default_rng(SEED)
    order = rng.permutation(len(digits.target))
    images, labels = (digits.images[order] / 8 - 1).astype(np.float32), digits.target[order]
    held_out = images[:VALIDATION_SIZE], labels[:VALIDATION_SIZE]
    model = ViT(nnx.Rngs(SEED))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(
            optax.clip_by_global_norm(1.0),
            anytime_adamw(LEARNING_RATE, warmup_steps, mask=kernels),
        ),
        wrt=nnx.Param,
    )
    accuracies = []
    for step in range(1, steps + 1):
        rows = rng.integers(VALIDATION_SIZE, len(labels), BATCH_SIZE)
        train_loss = train_step(model, optimizer, images[rows], labels[rows])
        if step % EVALUATE_EVERY == 0 or step == steps:
            validation_loss, accuracy = validate(model, optimizer, *held_out)
            accuracies.append(float(accuracy))
            print(
                f"step {step}: training {train_loss:.3f}, validation at x "
                f"{validation_loss:.3f}, accuracy {accuracy:.1%}"
            )
    return accuracies


if __name__ == "__main__":
    main()
