"""Text for training: any corpus, tokenized and packed while it is read, never loaded as a whole.

Several readers, each with its own share of the corpus, produce one stream of sequences each:

    documents, in another order each epoch -> tokens -> packed sequences -> shuffled in windows

A batch takes equally many rows from each reader, in turn, and process p of n runs the readers p,
p + n, and so on. So the rows of a batch do not depend on how many processes there are. A checkpoint
holds the position of each reader by its number, and other processes than those that saved it can
take over the readers. (Each process could also read everything and keep its own rows; but reading
and tokenizing would then not become faster with more processes, and a run on many of them would
wait for its text.)
"""

import dataclasses
import functools
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tokenizers import Tokenizer

from examples.llama import tokenizing
from examples.llama.documents import Documents, Part, digest, hold_out
from examples.llama.sources import Document, open_corpus, open_hub

SAMPLE = 10**8  # characters that a tokenizer is trained on, at most


@dataclasses.dataclass(frozen=True)
class TextData:
    """The text, and how it becomes tokens."""

    source: str = "stdlib"
    """Where it comes from: stdlib (Python's standard library, nothing to download); a file, folder
    or quoted glob of .txt, .jsonl or .parquet; hf:NAME or hf:NAME:CONFIG of the Hugging Face
    hub."""
    column: str = "text"
    """Field of .jsonl, .parquet and hub datasets that holds the text."""
    validation: str | None = None
    """Another source to validate on (default: the validation split of a hub dataset that has one,
    else a part of --data.source that is held out)."""
    held_out: float = 0.1
    """Part of --data.source that is held out where there is nothing else to validate on."""
    tokenizer: str = "bpe"
    """bpe (byte-pair encoding, trained on the source), bytes, or the path of a tokenizer.json."""
    shuffle: int | None = None
    """Sequences that each reader shuffles at a time (default: as many as make 262,144 tokens, but
    at least 64)."""
    readers: int | None = None
    """Parts of the source that are read side by side, with equally many sequences of each in a
    batch. Their number decides the order of the data, and how many processes can share the reading:
    any number that divides it (default: the largest of 1, 2, 4 and 8 that divides --batch-size)."""
    cache: Path = Path("runs/cache")
    """Folder for tokenizers that were trained."""

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"--data.held-out must be between 0 and 1, got {self.held_out}.")
        for name in ("shuffle", "readers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--data.{name} must be at least 1, got {getattr(self, name)}.")

    def prepare(self, vocab_size: int) -> "Text":
        """Finds the text, and the tokenizer for a model that knows `vocab_size` tokens.

        Raises ValueError, in one sentence, for flags that cannot work: no text to train or to
        validate on, no such column, a tokenizer with more tokens than the model.
        """
        train, validation = self._parts()
        for part in (train, validation):
            if has_text(part):
                continue
            if not has_text(Part(part.corpus, part.corpus.shards)):
                raise ValueError(f"There is no text in {part.corpus.description}: give another.")
            raise ValueError(
                f"--data.source {self.source} has too few documents to hold out --data.held-out "
                f"{self.held_out} of them: give more, or a --data.validation."
            )
        tokenizer, name = self._tokenizer(vocab_size, train)
        tokenizer.encode_special_tokens = True  # "<|end|>" in a document is text like any other
        end = tokenizing.end_of_text(tokenizer, self.tokenizer)
        if train.corpus is validation.corpus:
            description = f"{train.corpus.description}, {self.held_out:.0%} held out"
        else:
            description = (
                f"{train.corpus.description}, validation on {validation.corpus.description}"
            )
        description += f"; {name}, {tokenizer.get_vocab_size():,} tokens"
        return Text(tokenizer, end, description, self, train, validation)

    def _parts(self) -> tuple[Part, Part]:
        if self.source.startswith("hf:"):
            splits = open_hub(self.source, self.column, "--data.source")
            if "train" not in splits:
                raise ValueError(
                    f"--data.source {self.source} has no split train; its splits are "
                    f"{', '.join(splits)}."
                )
            corpus, other = splits["train"], splits.get("validation")
        else:
            corpus, other = open_corpus(self.source, self.column, "--data.source"), None
        if self.validation is not None and self.validation.startswith("hf:"):
            splits = open_hub(self.validation, self.column, "--data.validation")
            other = splits.get("validation") or splits.get("test") or next(iter(splits.values()))
        elif self.validation is not None:
            other = open_corpus(self.validation, self.column, "--data.validation")
        if other is not None:
            return Part(corpus, corpus.shards), Part(other, other.shards)
        return hold_out(corpus, self.held_out)

    def _tokenizer(self, vocab_size: int, train: Part) -> tuple[Tokenizer, str]:
        if self.tokenizer not in ("bpe", "bytes"):
            return tokenizing.given(self.tokenizer, vocab_size), self.tokenizer
        if vocab_size < 257:
            raise ValueError(
                "--model.vocab-size must be at least 257 (all bytes and the end of a text), got "
                f"{vocab_size}."
            )
        if self.tokenizer == "bytes":
            return tokenizing.single_bytes(), "single bytes"

        def sample() -> Iterator[str]:
            size = 0
            for document, _ in Documents(train, endless=False).walk():
                yield document.text
                size += len(document.text)
                if size >= SAMPLE:
                    return

        what = (train.corpus.files, train.share, self.column, vocab_size, SAMPLE)
        return tokenizing.cached(
            self.cache / f"bpe-{vocab_size}-{digest(what)}.json",
            lambda: tokenizing.byte_pair_encoding(sample(), vocab_size),
        ), "byte-pair encoding"


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus with its tokenizer; sequences are of `length` tokens and one more to predict."""

    tokenizer: Tokenizer
    end: int
    """The token that closes a document."""
    description: str
    settings: TextData
    training: Part
    held_out: Part

    @property
    def without_effect(self) -> dict[str, str]:
        settings, found = self.settings, {}
        if all(part.corpus.texts_are_files for part in (self.training, self.held_out)):
            found["--data.column"] = f"--data.source {settings.source}, whose files have no columns"
        if self.training.corpus is not self.held_out.corpus:
            found["--data.held-out"] = f"a validation set, {self.held_out.corpus.description}"
        if settings.tokenizer != "bpe":
            found["--data.cache"] = f"--data.tokenizer {settings.tokenizer}"
        return found

    @property
    def files(self) -> dict[str, Any]:
        """What a run stores with its weights: tokenizer.json."""
        return {"tokenizer.json": json.loads(self.tokenizer.to_str())}

    def train(
        self, batch_size: int, seed: int, process_index: int, process_count: int, length: int
    ) -> grain.DatasetIterator:
        """Endless {"tokens": int32 (batch_size // process_count, length + 1)}, prefetched: of each
        batch the rows process_index, process_index + process_count, ...

        The iterator state is small, can be stored as JSON, and says what was taken so far: the
        position of each reader of this process, by the reader's number. The states of all
        processes, merged into one dict, can be restored by each of any other number of processes.

        Raises:
          ValueError: if the processes cannot share the batch and the readers evenly.
        """
        readers = self._readers(batch_size, process_count)
        shuffle = self.settings.shuffle or max(64, 2**18 // length)
        streams = {}
        for reader in range(process_index, readers, process_count):
            documents = Documents(self.training, seed, reader, readers)
            next(documents.walk())  # raises if there is no document for this reader
            # Windows differ in size between readers, so that they are not all refilled at one time.
            window = max(1, shuffle * (2 * readers - reader) // (2 * readers))
            windows = Packed(self._tokens(documents), window * (length + 1)).random_map(
                functools.partial(shuffled_rows, length + 1),
                seed=random.Random(f"{seed} {reader}").getrandbits(31),
            )
            streams[reader] = grain.experimental.FlatMapIterDataset(windows, Rows())
        batches = InTurn(streams, batch_size // readers)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=8))

    def validation(
        self,
        count: int | None,
        batch_size: int,
        process_index: int,
        process_count: int,
        length: int,
    ) -> "Validation":
        """`count` sequences (None: all; fewer if there are fewer), spread evenly over the first
        million tokens of the held-out text, or over all of it if it is shorter.

        They do not depend on the seed of the training or on the number of processes.
        """
        tokens = self._tokens(Documents(self.held_out, endless=False))
        rows = Packed(tokens, length + 1)
        if next(iter(rows), None) is None:
            raise ValueError(
                f"--length must be below the {sum(map(len, tokens)):,} tokens that there are to "
                f"validate on, got {length}."
            )
        if count is not None:
            rows = evenly(itertools.islice(rows, max(2 * count, 2**20 // length)), count)
        return Validation(rows, batch_size, process_index, process_count)

    def _readers(self, batch_size: int, process_count: int) -> int:
        readers = self.settings.readers
        if batch_size % process_count:
            raise ValueError(
                f"--batch-size must be a multiple of the {process_count} processes, got "
                f"{batch_size}."
            )
        # Not from the number of processes, on which the order of the data must not depend.
        default = " (the default)" if readers is None else ""
        readers = math.gcd(batch_size, 8) if readers is None else readers
        if batch_size % readers or readers % process_count:
            raise ValueError(
                f"--data.readers must divide --batch-size {batch_size} and be a multiple of the "
                f"number of processes ({process_count}), got {readers}{default}."
            )
        return readers

    def _tokens(self, documents: Documents) -> grain.IterDataset:
        return documents.map(functools.partial(tokenize, self.tokenizer, self.end))


def shuffled_rows(size: int, vector: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows of a window. (grain's WindowShuffleIterDataset needs 0.06 to 4 ms for each row.)"""
    return rng.permutation(vector.reshape(-1, size))


class Rows(grain.experimental.FlatMapTransform):
    """Yields a window row by row. To resume within a window, it is read and shuffled again."""

    def flat_map(self, rows: np.ndarray) -> np.ndarray:
        return rows


class InTurn(grain.IterDataset):
    """Batches with `rows` rows of each reader: the first of each, the second of each, ...

    grain.IterDataset.mix takes the same rows, but its state counts the rows of all its readers, and
    so it cannot be restored with another number of processes.
    """

    def __init__(self, readers: dict[int, grain.IterDataset], rows: int):
        super().__init__(list(readers.values()))
        self.numbers, self.rows = [str(number) for number in readers], rows

    def __iter__(self) -> grain.DatasetIterator:
        readers = {
            number: reader.__iter__()
            for number, reader in zip(self.numbers, self._parents, strict=True)
        }
        return _InTurnIterator(readers, self.rows)


class _InTurnIterator(grain.DatasetIterator):
    def __init__(self, readers: dict[str, grain.DatasetIterator], rows: int):
        super().__init__(list(readers.values()))
        self._readers, self._rows = readers, rows

    def __next__(self) -> dict[str, np.ndarray]:
        readers = self._readers.values()
        return {"tokens": np.stack([next(r) for _ in range(self._rows) for r in readers])}

    def get_state(self) -> dict[str, Any]:
        return {number: reader.get_state() for number, reader in self._readers.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        missing = sorted(self._readers.keys() - state.keys(), key=int)
        if missing:
            raise ValueError(
                f"The checkpoint holds no place in the data for reader {missing[0]}: give "
                "--data.readers as it was when the run was started, or start over in another --run."
            )
        for number, reader in self._readers.items():
            reader.set_state(state[number])


class Packed(grain.IterDataset):
    """Vectors of any size, one after the other, cut into vectors of one size; the rest is dropped.

    grain.experimental.ConcatThenSplitIterDataset cannot resume from a state that was stored as
    JSON, as in a checkpoint (it compares lists with tuples; grain 0.2.18), and takes ten times as
    long.
    """

    def __init__(self, vectors: grain.IterDataset, size: int):
        super().__init__(vectors)
        self.size = size

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(self._parent.__iter__(), self.size)


class _PackedIterator(grain.DatasetIterator):
    """The state says how far the current vector is used, and from where to read it again."""

    def __init__(self, vectors: grain.DatasetIterator, size: int):
        super().__init__(vectors)
        self._vectors, self._size = vectors, size
        self._vector, self._used, self._before = np.zeros(0, np.int32), 0, vectors.get_state()

    def __next__(self) -> np.ndarray:
        parts, missing = [], self._size
        while missing:
            if self._used == len(self._vector):
                self._before = self._vectors.get_state()
                self._vector, self._used = next(self._vectors), 0
            parts.append(self._vector[self._used : self._used + missing])
            self._used += len(parts[-1])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before, self._used = state["before"], state["used"]
        self._vectors.set_state(self._before)
        self._vector = next(self._vectors) if self._used else np.zeros(0, np.int32)


def has_text(part: Part) -> bool:
    return next(Documents(part, endless=False).walk(), None) is not None


def tokenize(tokenizer: Tokenizer, end: int, documents: list[Document]) -> np.ndarray:
    """The tokens of all documents, one after the other."""
    encodings = tokenizer.encode_batch_fast(  # without the offsets, which nothing uses
        [document.text for document in documents], add_special_tokens=False
    )
    tokens = []
    for document, encoding in zip(documents, encodings, strict=True):
        tokens += encoding.ids
        if document.ends:
            tokens.append(end)
    return np.array(tokens, np.int32)


def evenly(rows: Iterable[np.ndarray], count: int) -> list[np.ndarray]:
    """`count` of the rows, evenly spaced. At most twice as many are in memory at a time."""
    kept, stride = [], 1
    for i, row in enumerate(rows):
        if i % stride == 0:
            kept.append(row)
        if len(kept) == 2 * count:
            kept, stride = kept[::2], 2 * stride
    count = min(count, len(kept))
    return [kept[i] for i in np.linspace(0, len(kept) - 1, count).round().astype(int)]


@dataclasses.dataclass(frozen=True)
class Validation:
    """The rows of one process in batches of {"tokens", "mask"}; can be iterated again and again."""

    rows: Iterable[np.ndarray]
    batch_size: int
    process_index: int
    process_count: int

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        local = self.batch_size // self.process_count
        rows = iter(self.rows)
        while batch := list(itertools.islice(rows, self.batch_size)):
            mask = np.arange(self.batch_size) < len(batch)
            batch += [np.zeros_like(batch[0])] * (self.batch_size - len(batch))
            mine = slice(self.process_index * local, (self.process_index + 1) * local)
            yield {"tokens": np.stack(batch[mine]), "mask": mask[mine].astype(np.float32)}
