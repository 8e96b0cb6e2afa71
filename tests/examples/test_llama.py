"""The Llama model is what its presets say, and nothing looks ahead."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import needs

needs("grain")
from flax import nnx

from examples.llama.model import PRESETS, Llama, LlamaConfig, rotate
from helpers.programs import SMALL


@pytest.fixture
def model():
    return Llama(SMALL, nnx.Rngs(0))


TOKENS = jnp.arange(24).reshape(2, 12) * 7 % 300


def logits_and_grads(model, config):
    """Of this model's params, computed as `config` says."""
    graph = nnx.graphdef(Llama(config, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def loss(params):
        logits = nnx.merge(graph, params)(TOKENS)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, grads


def test_the_model_is_causal(model):
    logits = model(TOKENS)
    assert logits.shape == (2, 12, 300)
    assert logits.dtype == jnp.float32
    changed = model(TOKENS.at[0, 7].set(99))
    np.testing.assert_allclose(logits[0, :7], changed[0, :7], atol=1e-5)
    np.testing.assert_allclose(logits[1], changed[1], atol=1e-5)
    assert not np.allclose(logits[0, 7:], changed[0, 7:], atol=1e-3)


def test_rotary_positions_depend_on_distance_alone(rng):
    """The product of a rotated query and key is a function of how far apart they stand."""
    q, k = (np.tile(rng.normal(size=8), (1, 10, 1, 1)) for _ in range(2))
    q, k = rotate(jnp.asarray(q), 10_000.0)[0, :, 0], rotate(jnp.asarray(k), 10_000.0)[0, :, 0]
    products = np.asarray(q @ k.T)
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert products[0, 0] != pytest.approx(products[0, 1], abs=1e-3)


def test_the_blocks_run_one_after_the_other(model):
    """The scan over stacked blocks is a loop over layers."""
    x = model.embed(TOKENS)
    graph, stacked = nnx.split(model.blocks)
    for layer in range(SMALL.layers):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], stacked))(x)
    np.testing.assert_allclose(model(TOKENS), model.embed.attend(model.norm(x)), atol=1e-5)


def test_layers_start_different(model):
    kernel = model.blocks.mlp.up.kernel[...]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("changes", [{"remat": True}, {"unroll": 2}, {"remat": True, "unroll": 2}])
def test_how_the_layers_are_compiled_changes_nothing(model, changes):
    logits, grads = logits_and_grads(model, SMALL)
    again, same = logits_and_grads(model, dataclasses.replace(SMALL, **changes))
    np.testing.assert_allclose(logits, again, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_computes_nearly_the_same_from_float32_params(model):
    logits, _ = logits_and_grads(model, SMALL)
    narrow, same = logits_and_grads(model, dataclasses.replace(SMALL, dtype="bfloat16"))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(logits, narrow, atol=0.02)
    assert not np.array_equal(logits, narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(same)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("preset", "published"),
    # From the config.json of JackFram/llama-160m, and Llama 3's papers: 1.24 and 8.03 billion.
    [("160m", 162_417_408), ("1b", 1_235_814_400), ("8b", 8_030_261_248)],
)
def test_presets_have_the_sizes_of_published_models(preset, published):
    model = nnx.eval_shape(lambda: Llama(PRESETS[preset], nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == published


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"heads": 3},
            r"--model.dim \(96\) must be a multiple of --model.heads",
        ),
        ({"dim": 12}, "must be even for rotary positions, got 12 / 4"),
        ({"vocab_size": 100}, "--model.vocab-size must be at least 257"),
        ({"layers": 0}, "--model.layers must be at least 1, got 0"),
        ({"unroll": 0}, "--model.unroll must be at least 1, got 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        LlamaConfig(**changes)
