"""Text from a trained Llama."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer

from examples.llama import tokenizing
from examples.llama.model import Llama
from examples.llama.runs import Checkpoint, load


@dataclasses.dataclass(frozen=True)
class Sample:
    """Continues a text with the averaged weights of a run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = "def "
    """The text; an empty one asks for a document from its start."""
    checkpoint: Checkpoint = "latest"
    """The latest, the best by validation loss, or the one of a step."""
    tokens: int = 200
    """Tokens to add; fewer if the document ends before."""
    temperature: float = 0.7
    """0 always takes the likeliest token, 1 draws with the model's own probabilities."""
    seed: int = 0
    """Decides what is drawn."""

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, got {self.tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}.")


def sample(arguments: Sequence[str], console: Console) -> int:
    """The command."""
    config = tyro.cli(Sample, prog="python -m examples.llama sample", args=arguments)
    with console.status("Reading the run"):
        trained = load(config.run, config.checkpoint)
    model = jax.device_put(trained.model, jax.local_devices()[0])
    with console.status("Writing"):
        text = generate(
            model,
            trained.tokenizer,
            config.prompt,
            config.tokens,
            trained.config.length,
            config.seed,
            config.temperature,
        )
    console.out(text, highlight=False)
    return 0


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    window: int,
    seed: int = 0,
    temperature: float = 0.7,
) -> str:
    """The prompt and what follows, up to the end of the document.

    Each token is drawn from what the model predicts after the last `window` tokens. Nothing is
    cached: once the window is full, a cache would have to be computed anew for each token.

    Args:
      model: at the weights to sample from.
      tokenizer: one with a token for the end of a text.
      prompt: the beginning; empty for a new document.
      tokens: how many to add, at most.
      window: tokens that the model was trained on at a time.
      seed: decides what is drawn. With more tokens the text begins in the same way and continues.
      temperature: 0 takes the likeliest token; the higher, the more random.
    """
    end = tokenizing.end_of_text(tokenizer, "of the run")
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    text = list(start)
    graph, params = nnx.split(model)
    key = jax.random.key(seed)
    for step in range(tokens):
        seen = text[-window:]
        # Padding at the end, which causal attention keeps out of sight, gives all steps one shape.
        tokens_L = np.pad(np.array(seen, np.int32), (0, window - len(seen)))
        token = int(draw(graph, params, tokens_L, len(seen), key, step, temperature))
        if token == end:
            break
        text.append(token)
    # Not the decoded continuation alone, which some tokenizers begin without its space.
    return prompt + tokenizer.decode(text)[len(tokenizer.decode(start)) :]


@functools.partial(jax.jit, static_argnums=0)
def draw(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_L: jax.Array,
    length: jax.Array,
    key: jax.Array,
    step: jax.Array,
    temperature: jax.Array,
) -> jax.Array:
    """The token after the first `length` of these."""
    logits_V = nnx.merge(graph, params)(tokens_L[None])[0, length - 1]
    drawn = jax.random.categorical(jax.random.fold_in(key, step), logits_V / temperature)
    return jnp.where(temperature > 0, drawn, logits_V.argmax())
