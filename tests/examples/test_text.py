"""Text is streamed, tokenized, packed and shuffled; the same for any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.needs import needs

needs("datasets", "grain", "tokenizers")
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.llama import sources, tokenizing
from examples.llama.data import TextData, evenly
from examples.llama.documents import Documents, Part, hold_out
from examples.llama.sources import open_corpus, open_hub
from helpers import ROOT

FORMATS = ["txt", "jsonl", "parquet", "hub"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr("examples.llama.documents.GROUP", 200)


def texts(count, words=60):
    """Documents that say which they are in every word."""
    return [" ".join(f"{i}é{j}" for j in range(words)) + "\n" for i in range(count)]


def corpus(folder, format, documents, files=4):
    """Writes the documents, dealt to some files (a .txt file for each); returns the source."""
    folder.mkdir(exist_ok=True)
    if format == "txt":
        for i, text in enumerate(documents):
            (folder / f"{i:03}.txt").write_bytes(text.encode())
        return str(folder)
    for i in range(files):
        rows = [{"id": j, "text": text} for j, text in enumerate(documents[i::files])]
        if format == "jsonl":
            (folder / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=3)
    if format == "hub":
        return f"hf:{folder}"
    return str(folder)


def opened(source):
    if source.startswith("hf:"):
        return open_hub(source, "text", "--data.source")["train"]
    return open_corpus(source, "text", "--data.source")


def everything(source):
    """A part with all of the source."""
    whole = opened(source)
    return Part(whole, whole.shards)


def prepared(source, tmp_path, vocab_size=300, **settings):
    settings = {"tokenizer": "bytes", "shuffle": 16, **settings}
    return TextData(source=source, cache=tmp_path / "cache", **settings).prepare(vocab_size)


def rows(batch):
    return sorted(map(bytes, batch["tokens"]))


def take(iterator, count):
    return [next(iterator)["tokens"] for _ in range(count)]


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_its_documents(tmp_path, format):
    documents = texts(30)
    part = everything(corpus(tmp_path / "c", format, documents))
    read = [document for document, _ in Documents(part, endless=False).walk()]
    assert sorted(document.text for document in read) == sorted(documents)
    assert all(document.ends for document in read)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("readers", [1, 3])
def test_a_walk_continues_after_any_document(tmp_path, format, readers, monkeypatch):
    monkeypatch.setattr(sources, "SPAN", 2000)
    monkeypatch.setattr(sources, "PIECE", 300)
    part = everything(corpus(tmp_path / "c", format, texts(20), files=2))
    walk = Documents(part, seed=3, reader=1 % readers, readers=readers).walk()
    read = [next(walk) for _ in range(50)]  # more than an epoch
    for i in range(0, 40, 3):
        place = json.loads(json.dumps(read[i][1]))
        walk = Documents(part, seed=3, reader=1 % readers, readers=readers).walk(**place)
        assert [next(walk) for _ in range(5)] == read[i + 1 : i + 6]


@pytest.mark.parametrize("line", ["", "\n", " äöü€😀\n", "\r\n" * 9])
@pytest.mark.parametrize("span", [37, 100, 1001])
def test_a_long_file_is_cut_without_loss(tmp_path, line, span, monkeypatch):
    monkeypatch.setattr(sources, "SPAN", span)
    monkeypatch.setattr(sources, "PIECE", 30)
    text = "".join("é€😀x"[: i % 5] + line * (i % 7 == 0) for i in range(500))
    (tmp_path / "a.txt").write_bytes(text.encode())
    shards = opened(str(tmp_path / "a.txt")).shards
    assert len(shards) == -(-len(text.encode()) // span)
    read = [document for shard in shards for document in shard.read(0)]
    assert "".join(document.text for document in read) == text
    assert [document.ends for document in read] == [False] * (len(read) - 1) + [True]
    assert all(len(document.text.encode()) <= 2 * 30 + 3 for document in read)


@pytest.mark.parametrize("span", [7, 100, 389, 390, 391])
def test_a_long_file_of_lines_is_cut_between_them(tmp_path, span, monkeypatch):
    monkeypatch.setattr(sources, "SPAN", span)
    documents = [*texts(20, words=7), "", "\n\n"]
    source = corpus(tmp_path / "c", "jsonl", documents, files=1)
    shards = opened(source).shards
    assert len(shards) > 3
    read = [document.text for shard in shards for document in shard.read(0)]
    assert read == documents


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("readers", [1, 4])
def test_an_epoch_has_each_document_once_in_another_order(tmp_path, format, readers):
    documents = texts(30)
    part = everything(corpus(tmp_path / "c", format, documents, files=5))
    epochs = {0: [], 1: []}
    for reader in range(readers):
        for document, place in Documents(part, 0, reader, readers).walk():
            if place["epoch"] == 2:
                break
            epochs[place["epoch"]].append(document.text)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(documents)
    assert epochs[0] != epochs[1]


def together(parts, count):
    """The batches that processes make together: of each its every so-manyth row, in order."""
    for local in zip(*(take(part, count) for part in parts), strict=True):
        yield np.stack(local, axis=1).reshape(-1, local[0].shape[-1])


@pytest.mark.parametrize("format", FORMATS)
def test_the_rows_of_a_batch_do_not_depend_on_the_processes(tmp_path, format):
    text = prepared(corpus(tmp_path / "c", format, texts(100)), tmp_path)
    whole = take(text.train(8, 0, 0, 1, 10), 40)
    for count in (2, 4, 8):
        parts = [text.train(8, 0, index, count, 10) for index in range(count)]
        for batch, expected in zip(together(parts, 40), whole, strict=True):
            np.testing.assert_array_equal(batch, expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_any_number_of_processes_continues_where_another_was(tmp_path, before, after):
    """Each of them takes over readers, wherever those are in a document and in a window."""
    text = prepared(corpus(tmp_path / "c", "txt", texts(60)), tmp_path)
    whole = take(text.train(16, 0, 0, 1, 10), 30)
    parts = [text.train(16, 0, index, before, 10) for index in range(before)]
    list(together(parts, 13))
    state = {}
    for part in parts:
        state |= json.loads(json.dumps(part.get_state()))
    parts = [text.train(16, 0, index, after, 10) for index in range(after)]
    for part in parts:
        part.set_state(state)
    np.testing.assert_array_equal(list(together(parts, 17)), whole[13:])


@pytest.mark.parametrize("format", FORMATS)
def test_a_state_continues_bit_by_bit(tmp_path, format):
    """At any point, into a new iterator and one that was used, past the end of an epoch."""
    text = prepared(corpus(tmp_path / "c", format, texts(40, words=20)), tmp_path)
    iterator, states, batches = text.train(8, 1, 0, 1, 30), [], []
    for _ in range(60):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator)["tokens"])
    assert '"epoch": 1' in states[-5]
    used = text.train(8, 1, 0, 1, 30)
    for i in (0, 7, 17, 41):
        for again in (used, text.train(8, 1, 0, 1, 30)):
            again.set_state(json.loads(states[i]))
            assert json.dumps(again.get_state()) == states[i] or i == 0
            np.testing.assert_array_equal(take(again, 5), batches[i : i + 5])
            twice = text.train(8, 1, 0, 1, 30)  # what continues can be continued
            twice.set_state(json.loads(json.dumps(again.get_state())))
            np.testing.assert_array_equal(take(twice, 5), batches[i + 5 : i + 10])


def test_a_state_is_small_however_much_is_shuffled(tmp_path):
    text = prepared(corpus(tmp_path / "c", "txt", texts(60)), tmp_path, shuffle=2000)
    iterator = text.train(8, 0, 0, 1, 10)
    take(iterator, 20)
    assert len(json.dumps(iterator.get_state())) < 3000


def test_another_process_reads_the_same_and_continues(tmp_path):
    source = corpus(tmp_path / "c", "txt", texts(60))
    text = prepared(source, tmp_path, tokenizer="bpe")
    iterator = text.train(8, 0, 0, 1, 20)
    take(iterator, 3)
    code = (
        "import json, sys; from pathlib import Path; from examples.llama.data import TextData\n"
        "text = TextData(source=sys.argv[1], shuffle=16, cache=Path(sys.argv[2])).prepare(300)\n"
        "iterator = text.train(8, 0, 0, 1, 20)\n"
        "iterator.set_state(json.loads(sys.argv[3]))\n"
        "print(json.dumps([next(iterator)['tokens'].tolist() for _ in range(3)]))\n"
        "iterator.close()"
    )
    # An empty cache: the tokenizer is trained again.
    state = json.dumps(iterator.get_state())
    done = subprocess.run(
        [sys.executable, "-c", code, source, str(tmp_path / "other"), state],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(json.loads(done.stdout), take(iterator, 3))


def test_a_state_of_another_text_is_refused(tmp_path):
    source = corpus(tmp_path / "c", "txt", texts(60))
    state = prepared(source, tmp_path).train(8, 0, 0, 1, 10).get_state()
    with pytest.raises(ValueError, match="another text, --seed or"):
        prepared(source, tmp_path).train(8, 1, 0, 1, 10).set_state(state)
    with pytest.raises(ValueError, match="another text"):
        prepared(source, tmp_path, held_out=0.2).train(8, 0, 0, 1, 10).set_state(state)
    with pytest.raises(ValueError, match=r"--seed or --data\.readers: resume"):
        prepared(source, tmp_path, readers=4).train(8, 0, 0, 1, 10).set_state(state)
    with pytest.raises(ValueError, match="no place in the data for reader 8: give "):
        prepared(source, tmp_path, readers=16).train(16, 0, 0, 1, 10).set_state(state)
    Path(source, "000.txt").write_text("another")
    with pytest.raises(ValueError, match="another text"):
        prepared(source, tmp_path).train(8, 0, 0, 1, 10).set_state(state)


def test_the_seed_decides_the_order(tmp_path):
    text = prepared(corpus(tmp_path / "c", "jsonl", texts(60)), tmp_path)
    first, same, other = (take(text.train(8, seed, 0, 1, 10), 3) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    orders = [
        [document.text for document, _ in Documents(text.training, seed, endless=False).walk()]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_has_as_many_rows_of_each_reader(tmp_path):
    text = prepared(corpus(tmp_path / "c", "txt", texts(80)), tmp_path, held_out=0.1, readers=4)
    shares = []
    for reader in range(4):
        walk = Documents(text.training, 0, reader, 4, endless=False).walk()
        shares.append({document.text.split("é")[0] for document, _ in walk})
    assert sum(map(len, shares)) == len(set.union(*shares)) == 72
    for batch in take(text.train(8, 0, 0, 1, 50), 5):
        words = [text.tokenizer.decode(list(row)).split()[1].split("é")[0] for row in batch]
        assert sorted(next(i for i, s in enumerate(shares) if w in s) for w in words) == [
            0, 0, 1, 1, 2, 2, 3, 3,
        ]  # fmt: skip


def test_sequences_are_the_documents_one_after_the_other(tmp_path):
    source = corpus(tmp_path / "c", "jsonl", texts(30), files=1)
    text = prepared(source, tmp_path, readers=1, shuffle=1)
    tokens = np.concatenate(take(text.train(4, 0, 0, 1, 13), 40)).ravel()
    expected = []
    for document, _ in Documents(text.training, 0).walk():
        expected += [*text.tokenizer.encode(document.text).ids, text.end]
        if len(expected) >= len(tokens):
            break
    np.testing.assert_array_equal(tokens, expected[: len(tokens)])


def test_a_window_is_shuffled(tmp_path):
    source = corpus(tmp_path / "c", "jsonl", texts(30), files=1)
    ordered, shuffled = (
        take(prepared(source, tmp_path, readers=1, shuffle=n).train(8, 0, 0, 1, 13), 2)
        for n in (1, 16)
    )
    assert not np.array_equal(ordered, shuffled)
    assert rows({"tokens": np.concatenate(ordered)}) == rows({"tokens": np.concatenate(shuffled)})


def test_a_source_can_be_a_folder_a_glob_or_a_file(tmp_path):
    (tmp_path / "a[1]").mkdir()
    corpus(tmp_path / "a[1]" / "b", "txt", texts(3))
    (tmp_path / "a[1]" / "c.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a[1]" / "d.md").write_text("not read")
    folder = str(tmp_path / "a[1]")
    assert len(opened(folder).files) == 4
    assert len(opened(f"{tmp_path}/*/b/00[12].txt").files) == 2
    assert len(opened(f"{tmp_path}/**/*").files) == 4
    assert len(opened(f"{folder}/c.jsonl").files) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_held_out_is_not_trained_on(tmp_path, format):
    documents = [text for text in texts(40) for _ in range(2 if format != "txt" else 1)]
    text = prepared(corpus(tmp_path / "c", format, documents), tmp_path, held_out=0.2)
    train, validation = (
        {document.text for document, _ in Documents(part, endless=False).walk()}
        for part in (text.training, text.held_out)
    )
    assert not train & validation
    assert train | validation == set(documents)
    assert 3 <= len(validation) <= 15
    if format == "txt":
        assert len(validation) == 8


def test_files_are_held_out_whole_and_the_same_ones_at_another_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 50)
    parts = [
        hold_out(opened(corpus(tmp_path / name, "txt", texts(25))), 0.2) for name in ("a", "b")
    ]
    names = [[{shard.name for shard in part.shards} for part in pair] for pair in parts]
    assert names[0] == names[1]
    assert not names[0][0] & names[0][1]
    assert len(names[0][1]) == 5


def test_only_the_last_piece_of_a_file_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 50)
    text = prepared(corpus(tmp_path / "c", "txt", texts(25)), tmp_path, shuffle=1, readers=1)
    tokens = np.concatenate(take(text.train(5, 0, 0, 1, 99), 20)).ravel()
    files = text.tokenizer.decode(list(tokens), skip_special_tokens=False).split("<|end|>")
    assert len(files) > 10
    assert set(files[1:-1]) <= set(texts(25))


def test_the_standard_library_is_there_without_a_download(tmp_path):
    text = prepared("stdlib", tmp_path, vocab_size=257)
    assert "Python's standard library" in text.description
    assert len(text.training.shards) > 400
    folders = {folder for shard in text.training.shards for folder in Path(shard.name).parts}
    assert not folders & {"test", "site-packages"}
    batch = next(text.train(4, 0, 0, 1, 64))["tokens"]
    assert batch.shape == (4, 65)
    assert batch.dtype == np.int32
    assert "import" in "".join(
        document.text for document, _ in Documents(text.held_out, endless=False).walk()
    )


def test_a_corpus_is_read_only_as_far_as_it_is_needed(tmp_path):
    lines = [json.dumps({"text": text}) for text in texts(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": broken']) + "\n")
    text = prepared(str(tmp_path / "a.jsonl"), tmp_path, readers=2)
    iterator = text.train(4, 0, 0, 1, 10)
    take(iterator, 20)
    with pytest.raises(ValueError, match=r"a.jsonl, line at byte [\d,]+: not JSON"):
        take(iterator, 100_000)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_a_tokenizer_gives_the_text_back(tmp_path, tokenizer):
    source = corpus(tmp_path / "c", "txt", texts(30))
    text = prepared(source, tmp_path, tokenizer=tokenizer)
    written = "def f(x):\n    return 'äöü €' * x  # \t\x00\n <|end|> "
    tokens = text.tokenizer.encode(written).ids
    assert text.tokenizer.decode(tokens) == written
    assert text.end not in tokens  # what a document says does not close it
    assert max(tokens) < 300
    again = Tokenizer.from_str(text.tokenizer.to_str())
    again.encode_special_tokens = True
    assert again.encode(written).ids == tokens
    if tokenizer == "bytes":
        assert len(tokens) == len(written.encode())


def test_a_trained_tokenizer_is_kept_for_the_same_text_and_size(tmp_path, monkeypatch):
    trained = []
    train = tokenizing.byte_pair_encoding

    def counted(texts, vocab_size):
        trained.append(vocab_size)
        return train(texts, vocab_size)

    monkeypatch.setattr(tokenizing, "byte_pair_encoding", counted)
    source = corpus(tmp_path / "c", "txt", texts(30))
    first = prepared(source, tmp_path, tokenizer="bpe").tokenizer.to_str()
    assert prepared(source, tmp_path, tokenizer="bpe").tokenizer.to_str() == first
    assert trained == [300]
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(first[: len(first) // 2])
    assert prepared(source, tmp_path, tokenizer="bpe").tokenizer.to_str() == first
    assert kept.read_text() == first
    assert trained == [300, 300]
    prepared(source, tmp_path, tokenizer="bpe", vocab_size=310)
    prepared(source, tmp_path, tokenizer="bpe", held_out=0.3)
    prepared(source, tmp_path, tokenizer="bpe", validation=source)
    Path(source, "000.txt").write_text("longer than before " * 100)
    prepared(source, tmp_path, tokenizer="bpe")
    assert trained == [300, 300, 310, 300, 300, 300]


def test_a_tokenizer_is_trained_on_the_training_part_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tokenizing,
        "byte_pair_encoding",
        lambda texts, size: seen.extend(texts) or tokenizing.single_bytes(),
    )
    text = prepared(corpus(tmp_path / "c", "jsonl", texts(40)), tmp_path, tokenizer="bpe")
    walk = Documents(text.training, endless=False).walk()
    assert sorted(seen) == sorted(document.text for document, _ in walk)
    assert len(seen) < 40


def test_a_tokenizer_is_trained_on_a_sample_of_a_large_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.llama.data.SAMPLE", 2000)
    seen = []
    monkeypatch.setattr(
        tokenizing,
        "byte_pair_encoding",
        lambda texts, size: seen.extend(texts) or tokenizing.single_bytes(),
    )
    prepared(corpus(tmp_path / "c", "jsonl", texts(40)), tmp_path, tokenizer="bpe")
    assert 2000 <= sum(map(len, seen)) < 2000 + len(seen[-1]) + 1


def word_level(path, *tokens):
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(path))
    return str(path)


def test_a_given_tokenizer_is_used_without_its_truncation_and_padding(tmp_path):
    path = word_level(tmp_path / "t.json", "?", "[PAD]", "é", "0", "</s>")
    text = prepared(corpus(tmp_path / "c", "txt", texts(30)), tmp_path, 5, tokenizer=path)
    assert text.end == 4
    tokens = np.concatenate(take(text.train(4, 0, 0, 1, 50), 10)).ravel()
    assert (tokens == 4).sum() == pytest.approx(len(tokens) / 61, abs=3)
    assert 1 not in tokens


@pytest.mark.parametrize("count", [5, 7, 100])
def test_validation_is_the_same_for_any_number_of_processes(tmp_path, count):
    text = prepared(corpus(tmp_path / "c", "jsonl", texts(60, words=20)), tmp_path, held_out=0.2)
    whole = list(text.validation(count, 4, 0, 1, 10))
    parts = [list(text.validation(count, 4, i, 2, 10)) for i in range(2)]
    assert {batch["tokens"].shape for batch in whole} == {(4, 11)}
    for part in parts:
        assert {batch["tokens"].shape for batch in part} == {(2, 11)}
    for name in ("tokens", "mask"):
        joined = [np.concatenate([a[name], b[name]]) for a, b in zip(*parts, strict=True)]
        np.testing.assert_array_equal(joined, [batch[name] for batch in whole])
    mask = np.concatenate([batch["mask"] for batch in whole])
    np.testing.assert_array_equal(mask, np.arange(len(mask)) < count)
    assert mask.dtype == np.float32


def test_all_of_the_validation_part_can_be_had_and_had_again(tmp_path):
    text = prepared(corpus(tmp_path / "c", "jsonl", texts(60, words=20)), tmp_path, held_out=0.2)
    walk = Documents(text.held_out, endless=False).walk()
    tokens = [[*text.tokenizer.encode(document.text).ids, text.end] for document, _ in walk]
    expected = np.concatenate(tokens)
    validation = text.validation(None, 4, 0, 1, 10)
    for _ in range(2):
        found = np.concatenate([batch["tokens"][batch["mask"] > 0] for batch in validation])
        assert len(found) == len(expected) // 11
        np.testing.assert_array_equal(found.ravel(), expected[: found.size])


def test_validation_is_spread_over_the_held_out_part(tmp_path):
    text = prepared(corpus(tmp_path / "c", "txt", texts(100)), tmp_path, held_out=0.5)
    (batch,) = text.validation(40, 40, 0, 1, 20)
    words = {text.tokenizer.decode(list(row)).split()[1].split("é")[0] for row in batch["tokens"]}
    assert len(words) > 30


def test_rows_are_chosen_evenly():
    for total in (3, 7, 8, 9, 100, 1000):
        chosen = evenly(range(total), 7)
        assert len(chosen) == min(total, 7)
        assert len(set(chosen)) == len(chosen)
        steps = np.diff(chosen)
        assert chosen[0] == 0
        assert max(steps) <= 2 * min(steps)
        assert chosen[-1] >= total - 1 - max(steps)


def test_a_source_of_its_own_to_validate_on(tmp_path):
    source = corpus(tmp_path / "c", "txt", texts(30))
    other = corpus(tmp_path / "v", "jsonl", [f"validation {i}" for i in range(30)])
    text = prepared(source, tmp_path, validation=other)
    assert len(text.training.shards) == 30
    for batch in text.validation(None, 4, 0, 1, 5):
        for row in batch["tokens"][batch["mask"] > 0]:
            assert "é" not in text.tokenizer.decode(list(row))


def test_the_validation_split_of_a_hub_dataset_is_what_to_validate_on(tmp_path):
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {i}"}) for i in range(9)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    text = prepared(f"hf:{tmp_path}", tmp_path)
    for part, split in ((text.training, "train"), (text.held_out, "validation")):
        read = {document.text for document, _ in Documents(part, endless=False).walk()}
        assert read == {f"{split} {i}" for i in range(9)}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"source": "{tmp}/nowhere"}, "--data.source {tmp}/nowhere does not exist"),
        ({"source": "{tmp}/*.text"}, "does not exist"),
        ({"source": "{tmp}/empty"}, "holds no file that ends in .txt, .jsonl, .parquet"),
        ({"source": "{tmp}/binary.bin"}, "holds no file that ends in .txt"),
        ({"source": "{tmp}/blank.txt"}, "There is no text in {tmp}/blank.txt"),
        ({"source": "{tmp}/one.txt"}, "--data.source {tmp}/one.txt has too few documents"),
        ({"validation": "{tmp}/nowhere"}, "--data.validation {tmp}/nowhere does not exist"),
        ({"validation": "{tmp}/blank.txt"}, "There is no text in {tmp}/blank.txt"),
        ({"column": "body"}, "--data.column body is not in"),
        ({"column": "id"}, "is not text but 0"),
        ({"source": "{tmp}/broken.jsonl"}, "broken.jsonl, line at byte 14: not JSON"),
        ({"source": "{tmp}/list.jsonl"}, "not a JSON object"),
        ({"source": "{tmp}/bad.parquet"}, "bad.parquet cannot be read as Parquet"),
        ({"source": "hf:{tmp}/nowhere"}, "--data.source hf:{tmp}/nowhere cannot be opened"),
        ({"held_out": 0.0}, "--data.held-out must be between 0 and 1"),
        ({"held_out": 1.0}, "--data.held-out must be between 0 and 1"),
        ({"shuffle": 0}, "--data.shuffle must be at least 1"),
        ({"readers": 0}, "--data.readers must be at least 1"),
        ({"tokenizer": "gpt"}, "--data.tokenizer gpt does not exist"),
        ({"tokenizer": "{tmp}/blank.txt"}, "is not a tokenizer.json"),
        ({"tokenizer": "{tmp}/large.json"}, "has 9 tokens, more than --model.vocab-size 8"),
        ({"tokenizer": "{tmp}/endless.json"}, "has no token for the end of a text"),
        ({"tokenizer": "bytes"}, "--model.vocab-size must be at least 257"),
        ({"tokenizer": "bpe"}, "--model.vocab-size must be at least 257"),
    ],
)
def test_bad_flags_end_in_one_sentence(tmp_path, settings, named):
    source = corpus(tmp_path / "c", "jsonl", texts(40))
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.bin").write_bytes(b"text")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "one.txt").write_text("one short text")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_text("not Parquet")
    word_level(tmp_path / "large.json", "?", "[PAD]", "</s>", *"abcdef")
    word_level(tmp_path / "endless.json", "?", "[PAD]", *"abcdef")
    word_level(tmp_path / "fits.json", "?", "[PAD]", "</s>", *"abcde")
    settings = {"source": source, "tokenizer": str(tmp_path / "fits.json"), **settings}
    settings = {
        name: value.format(tmp=tmp_path) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(ValueError, match=r".*") as error:
        TextData(**settings, cache=tmp_path / "cache").prepare(8)
    assert named.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("readers", "batch_size", "processes", "named"),
    [
        (None, 6, 4, "--batch-size must be a multiple of the 4 processes, got 6"),
        (3, 8, 1, "--data.readers must divide --batch-size 8"),
        (2, 8, 4, r"a multiple of the number of processes \(4\), got 2\."),
        (None, 48, 16, r"a multiple of the number of processes \(16\), got 8 \(the default\)"),
        (64, 64, 1, "too few documents for its readers"),
    ],
)
def test_readers_that_do_not_fit_are_named_at_once(tmp_path, readers, batch_size, processes, named):
    text = prepared(corpus(tmp_path / "c", "jsonl", texts(30)), tmp_path, readers=readers)
    with pytest.raises(ValueError, match=named):
        text.train(batch_size, 0, 0, processes, 10)


def test_readers_fit_the_batch_and_the_processes(tmp_path):
    source = corpus(tmp_path / "c", "txt", texts(60))
    for readers, batch_size, processes in [(None, 40, 8), (None, 7, 1), (None, 6, 2), (3, 24, 3)]:
        text = prepared(source, tmp_path, readers=readers)
        for index in range(processes):
            batch = next(text.train(batch_size, 0, index, processes, 10))["tokens"]
            assert batch.shape == (batch_size // processes, 11)


def test_a_length_that_validation_cannot_fill_is_named(tmp_path):
    text = prepared(corpus(tmp_path / "c", "txt", texts(30)), tmp_path)
    with pytest.raises(ValueError, match=r"--length must be below the [\d,]+ tokens") as error:
        text.validation(10, 4, 0, 1, 10**6)
    tokens = int(str(error.value).split()[5].replace(",", ""))
    assert len(list(text.validation(10, 1, 0, 1, tokens - 1))) == 1
    with pytest.raises(ValueError, match="--length must be below"):
        text.validation(10, 4, 0, 1, tokens)


def test_halves_of_surrogate_pairs_do_not_stop_a_run(tmp_path):
    lines = [json.dumps({"text": f"{i} \ud83d"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    text = prepared(str(tmp_path / "a.jsonl"), tmp_path)
    assert "?" in text.tokenizer.decode(list(next(text.train(2, 0, 0, 1, 20))["tokens"][0]))
