"""Real text that needs no download: the source code of the Python standard library."""

import dataclasses
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_FILE = "<|end|>"
# Tests and bundled packages are left out: not every distribution of Python ships them.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "_bundled",
    "__pycache__",
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized text. `train` and `validation` are int32 vectors, from different files."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    description: str


def standard_library(vocab_size: int, split_seed: int = 0) -> Corpus:
    """Splits the files of the running interpreter's standard library nine to one."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    if len(files) < 50:
        raise FileNotFoundError(
            f"{root} holds {len(files)} Python files, and the standard library has hundreds. "
            "Install it in source form (on Debian: libpython3-stdlib)."
        )
    random.Random(split_seed).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    held_out = len(files) // 10
    tokenizer = byte_pair_encoding(texts[held_out:], vocab_size)
    validation, train = (tokenize(tokenizer, part) for part in (texts[:held_out], texts[held_out:]))
    description = (
        f"{len(files)} files of Python's standard library: {len(train):,} tokens to train on, "
        f"{len(validation):,} to validate on"
    )
    return Corpus(tokenizer, train, validation, description)


def byte_pair_encoding(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on these texts; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All texts one after the other, each closed by the end-of-file token."""
    end = tokenizer.token_to_id(END_OF_FILE)
    encodings = tokenizer.encode_batch_fast(texts)  # without the offsets, which nobody asks for
    return np.concatenate([np.array([*encoding.ids, end], np.int32) for encoding in encodings])


def random_windows(tokens: np.ndarray, batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of shape (batch, length + 1), in an order that only the seed decides."""
    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    while True:
        yield windows[rng.integers(len(windows), size=batch)]


def even_windows(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` windows of shape (length + 1,), spread evenly over the text."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]
