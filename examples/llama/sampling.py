"""Text from a trained Llama."""

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from examples.llama.model import Llama


def sample(
    model: Llama, tokenizer: Tokenizer, prompt: str, tokens: int, window: int, seed: int = 0
) -> str:
    """Continues the prompt, token by token; the model sees the last `window` tokens.

    The temperature is 0.7. Nothing is cached between tokens: the model is small.
    """
    start = tokenizer.encode(prompt).ids[-window:]
    graph, params = nnx.split(model)

    # One shape for every step: the text stands left in the window, the rest is padding that
    # causal attention keeps out of sight, and once the window is full its oldest token leaves.
    @jax.jit
    def extend(window_L: jax.Array, length: jax.Array, key: jax.Array):
        logits_LxV = nnx.merge(graph, params)(window_L[None])[0]
        token = jax.random.categorical(key, logits_LxV[length - 1] / 0.7)
        full = length == window
        window_L = jnp.where(full, jnp.roll(window_L, -1), window_L)
        length = jnp.where(full, length, length + 1)
        return window_L.at[length - 1].set(token), length, token

    window_L = jnp.zeros(window, jnp.int32).at[: len(start)].set(jnp.array(start))
    length, text = jnp.array(len(start)), list(start)
    for key in jax.random.split(jax.random.key(seed), tokens):
        window_L, length, token = extend(window_L, length, key)
        text.append(int(token))
    return tokenizer.decode(text)
