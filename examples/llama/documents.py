"""Which documents a reader reads, and in which order."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import grain

from examples.llama.sources import Corpus, Document, Shard

GROUP = 2**16  # characters in a group: tokenizing documents one by one takes longer
PLACE = ("epoch", "shard", "position", "number")  # the arguments of Documents.walk
HELD_OUT_FILES = 20  # with at least this many text files, whole files are held out


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a corpus, to train or to validate on: the texts of some shards that are `kept`."""

    corpus: Corpus
    shards: list[Shard]
    share: str = "all"
    kept: Callable[[str], bool] = lambda text: True


def hold_out(corpus: Corpus, fraction: float) -> tuple[Part, Part]:
    """The part to train on and the part to validate on, the same ones each time.

    Many files of text are split by file; otherwise equal documents fall on the same side.
    """
    share, rest = f"{fraction}", f"all but {fraction}"
    names = sorted({shard.name for shard in corpus.shards}, key=lambda name: (uniform(name), name))
    if corpus.texts_are_files and len(names) >= HELD_OUT_FILES:
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        held_out = set(names[:count])
        train = [shard for shard in corpus.shards if shard.name not in held_out]
        validation = [shard for shard in corpus.shards if shard.name in held_out]
        return Part(corpus, train, rest), Part(corpus, validation, share)
    return (
        Part(corpus, corpus.shards, rest, lambda text: uniform(text) >= fraction),
        Part(corpus, corpus.shards, share, lambda text: uniform(text) < fraction),
    )


def uniform(text: str) -> float:
    """A number in [0, 1) for the text, the same on every machine."""
    hashed = hashlib.blake2b(text.encode(errors="replace"), digest_size=8)
    return int.from_bytes(hashed.digest()) / 2**64


def digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


class Documents(grain.IterDataset):
    """What one of several readers reads of a part, in groups of documents, epoch after epoch.

    Each epoch has its own order of the shards. A reader has whole shards if there are enough of
    them, or their number is a multiple of `readers`; otherwise the readers take turns at the
    documents.
    """

    def __init__(
        self, part: Part, seed: int = 0, reader: int = 0, readers: int = 1, endless: bool = True
    ):
        super().__init__()
        self.seed, self.endless, self.kept = seed, endless, part.kept
        whole = len(part.shards) % readers == 0 or len(part.shards) >= 8 * readers
        self.shards = part.shards[reader::readers] if whole else part.shards
        self.turn, self.turns = (0, 1) if whole else (reader, readers)
        self.readers = readers
        files = [(name, size) for name, size, _ in part.corpus.files]
        self.identity = digest((files, part.share, seed, reader, readers))

    def __iter__(self) -> grain.DatasetIterator:
        return _DocumentsIterator(self)

    def walk(
        self, epoch: int = 0, shard: int = 0, position: int = 0, number: int = 0
    ) -> Iterator[tuple[Document, dict[str, int]]]:
        """Each document, with the arguments that resume the walk after it.

        `shard` and `number` count the shards and the documents of the epoch.
        """
        while True:
            order = list(range(len(self.shards)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            found = (shard, position) != (0, 0)
            while shard < len(order):
                for document in self.shards[order[shard]].read(position):
                    mine, number = number % self.turns == self.turn, number + 1
                    if mine and document.text and self.kept(document.text):
                        found, place = True, (epoch, shard, document.position, number)
                        yield document, dict(zip(PLACE, place, strict=True))
                shard, position = shard + 1, 0
            if not self.endless:
                return
            if not found:
                raise ValueError(
                    "--data.source has too few documents for its readers: give more text, or a "
                    f"--data.readers below {self.readers}."
                )
            epoch, shard, number = epoch + 1, 0, 0


class _DocumentsIterator(grain.DatasetIterator):
    def __init__(self, documents: Documents):
        super().__init__()
        self._documents = documents
        self.set_state({"identity": documents.identity, "place": {}})

    def __next__(self) -> list[Document]:
        group, size = [], 0
        for document, place in self._walk:
            self._place = place
            group.append(document)
            size += len(document.text)
            if size >= GROUP:
                break
        if not group:
            raise StopIteration
        return group

    def get_state(self) -> dict[str, Any]:
        return {"identity": self._documents.identity, "place": self._place}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["identity"] != self._documents.identity:
            raise ValueError(
                "The checkpoint's position in the data belongs to another text, --seed or "
                "--data.readers: resume with those, or start over in another --run."
            )
        self._place = state["place"]
        self._walk = self._documents.walk(**self._place)
