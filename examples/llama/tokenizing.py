"""Tokenizers: bytes, a byte-pair encoding of the corpus itself, or one that is given."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
# What other people's tokenizers call it. <|end|> comes last: in some it ends a turn of a dialogue.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", END)


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer that can encode any text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def single_bytes() -> Tokenizer:
    """A token for each byte, and one for the end: byte-pair encoding without a single pair."""
    tokens = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = byte_level(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.add_special_tokens([END])
    return tokenizer


def byte_pair_encoding(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on these texts; the same texts give the same tokenizer."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cached(path: Path, train: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer in this file, which is written if it is missing or broken."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises no narrower one
        tokenizer = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that share the folder may write at once: each writes its own file, and renames it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(tokenizer.to_str())
    os.replace(file.name, path)
    return tokenizer


def given(path: str, vocab_size: int) -> Tokenizer:
    """A tokenizer from a file, if the model's embedding has a row for each of its tokens."""
    if not Path(path).is_file():
        raise ValueError(
            f"--data.tokenizer {path} does not exist: give bpe, bytes, or the path of a "
            "tokenizer.json."
        )
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"--data.tokenizer {path} is not a tokenizer.json: {error}.") from None
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if needed > vocab_size:
        raise ValueError(
            f"--data.tokenizer {path} has {needed:,} tokens, more than --model.vocab-size "
            f"{vocab_size:,}: raise that to at least {needed}."
        )
    tokenizer.no_truncation()  # which the file may ask for, and padding
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer: Tokenizer, name: str) -> int:
    """The id of the token that closes a text."""
    for token in ENDS:
        if (id := tokenizer.token_to_id(token)) is not None:
            return id
    raise ValueError(
        f"--data.tokenizer {name} has no token for the end of a text: one of {', '.join(ENDS)}."
    )
