"""The averaged weights of a run as a Hugging Face checkpoint, which transformers, vLLM, llama.cpp
and others load: safetensors, config.json and the tokenizer. PyTorch is not needed."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx, traverse_util
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from examples.files import write_json
from examples.llama import tokenizing
from examples.llama.model import Llama, LlamaConfig
from examples.llama.runs import Checkpoint, load

DType = Literal["float32", "bfloat16"]
LIMIT = 5 * 10**9  # bytes of weights in a file, as in transformers
# Our params and theirs; braces stand for the layer, which is the first axis of ours.
NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
    "blocks.attention_norm.scale": "model.layers.{}.input_layernorm.weight",
    "blocks.attention.query.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.attention.key.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.attention.value.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.attention.out.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.mlp.gate.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.mlp.up.kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks.mlp.down.kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the averaged weights of a run as a Hugging Face Llama checkpoint: safetensors,
    config.json and the tokenizer. transformers loads it with AutoModelForCausalLM and
    AutoTokenizer.from_pretrained(OUT)."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write: a new one, or empty."""
    checkpoint: Checkpoint = "latest"
    """The latest, the best by validation loss, or the one of a step."""
    dtype: DType | None = None
    """Precision of the weights in the files; default: that of the run, --model.param-dtype."""


def export(arguments: Sequence[str], console: Console) -> int:
    """The command."""
    config = tyro.cli(Export, prog="python -m examples.llama export", args=arguments)
    with new_folder(config.out) as folder:
        with console.status("Reading the run"):
            trained = load(config.run, config.checkpoint)
        dtype = config.dtype or trained.config.model.param_dtype
        with console.status("Writing"):
            write(folder, trained.model, trained.tokenizer, trained.config.length, dtype)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(trained.model, nnx.Param)))
    console.print(
        f"{config.out}: {size:,} params in {dtype}, the averaged weights of {config.run} "
        f"(checkpoint: {config.checkpoint}).",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return 0


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name when it is complete, and is removed if something fails before.

    Raises:
      ValueError: if `out` exists and is not an empty folder.
    """
    target = out.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{out} exists already, and nothing is overwritten; give another folder.")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(
    folder: Path,
    model: Llama,
    tokenizer: Tokenizer,
    length: int,
    dtype: DType,
    limit: int = LIMIT,
) -> None:
    """Writes a model and its tokenizer into an empty folder.

    Args:
      folder: the empty folder.
      model: at the weights to write.
      tokenizer: one with a token for the end of a text.
      length: tokens of a sequence in training: the longest that the model knows.
      dtype: of the weights in the files.
      limit: bytes of weights in a file, at most, unless a single tensor has more.
    """
    end = tokenizing.end_of_text(tokenizer, "of the run")
    # Documents follow each other in training, so the end of one begins the next.
    ids = {"bos_token_id": end, "eos_token_id": end}
    write_json(folder / "config.json", config_of(model.config, length, dtype) | ids)
    write_weights(folder, tensors(model), dtype, limit)
    # Batches of texts of different lengths need some padding; the mask hides it.
    write_json(folder / "generation_config.json", ids | {"pad_token_id": end})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.id_to_token(end),
            "eos_token": tokenizer.id_to_token(end),
            "model_max_length": length,
            # Without these, transformers 4 changes what it decodes, and gives generate() types of
            # tokens that it refuses.
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def config_of(config: LlamaConfig, length: int, dtype: DType) -> dict[str, Any]:
    """The model's shapes, under the names that LlamaConfig has in transformers 4 and 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.dim // config.heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # version 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # version 5
        "max_position_embeddings": length,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,  # version 4
        "dtype": dtype,  # version 5
    }


def tensors(model: Llama) -> dict[str, np.ndarray]:
    """The params as transformers names and shapes them: a tensor for each layer, and linear maps as
    (out, in). They share memory with the model's params where those are on the host."""
    params = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep=".")
    found = {}
    for name, param in params.items():
        value = np.asarray(param)
        if name.endswith("kernel"):
            value = value.swapaxes(-1, -2)
        layers = value if name.startswith("blocks.") else [value]
        found |= {NAMES[name].format(layer): value for layer, value in enumerate(layers)}
    return found


def write_weights(folder: Path, weights: Mapping[str, np.ndarray], dtype: DType, limit: int):
    """model.safetensors, or several numbered files with an index."""
    width = jnp.dtype(dtype).itemsize
    files: list[list[str]] = [[]]
    size = 0
    for name, value in weights.items():
        if files[-1] and size + value.size * width > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += value.size * width
    index = {}
    for number, names in enumerate(files, start=1):
        numbered = f"model-{number:05}-of-{len(files):05}.safetensors"
        file = "model.safetensors" if len(files) == 1 else numbered
        # safetensors writes memory as it lies: a transposed view must be copied.
        part = {name: np.ascontiguousarray(weights[name], jnp.dtype(dtype)) for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors denies others access
        index |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(value.size for value in weights.values()) * width
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": index},
        )
