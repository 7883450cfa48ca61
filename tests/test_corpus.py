"""Test the corpus on disk: it has every token once, and keeps the bounds of documents and sentences."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert import train_word_level
from minibert.data import tokenized_corpus as corpora
from minibert.data.source import DataSource
from minibert.data.tokenized_corpus import MlmChunks, NspSpans, TokenizedCorpus, load_corpus, split_sentences

DOCUMENTS = ["a cat sat. it slept!", "b", "", "one two three four five six. seven eight? nine ten", "a b c d e f g h i j"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_word_level(DOCUMENTS)


@pytest.fixture
def read(tmp_path, tokenizer):
    """Write documents as JSON lines and load them as a corpus."""
    import json

    def load(documents=DOCUMENTS, **options):
        file = tmp_path / "documents.jsonl"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        if not file.exists() or file.read_text() != lines:  # a new file would have another fingerprint
            file.write_text(lines)
        return load_corpus([DataSource(path=str(file))], tokenizer, cache_dir=tmp_path / "cache", **options)

    return load


def made(tmp_path, documents):
    """Return a corpus of documents, each given as the lengths of its sentences in tokens."""
    sentences = [size for document in documents for size in document]
    arrays = np.arange(sum(sentences), dtype=np.int32), np.cumsum([0, *map(sum, documents)]), np.cumsum([0, *sentences])
    return TokenizedCorpus(tmp_path, (block for block in [arrays]))


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_of_several_processes_stays_one(read, monkeypatch, number, raised):
    def interrupted(*_, **__):
        try:
            signal.raise_signal(number)
        finally:
            raise TimeoutError

    handlers = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    monkeypatch.setattr(Dataset, "map", interrupted)
    with pytest.raises(raised):
        read()
    assert signal.getsignal(signal.SIGTERM) is handlers[1]
    signal.signal(signal.SIGINT, handlers[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_sigterm_ends_the_processes_that_tokenize(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.jsonl").write_text('{"text": "a cat sat. it slept!"}\n' * 2000)
    script = f"""
import os, time
from transformers import AutoTokenizer
from minibert.data import tokenized_corpus
from minibert.data.source import DataSource

def never(batch, **_):
    os.write(1, b"at work\\n")  # at once, where two that print could mix their lines
    time.sleep(100)

if __name__ == "__main__":
    tokenized_corpus._token_lists = never
    tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}, trust_remote_code=False)
    tokenized_corpus.load_corpus([DataSource(path={str(tmp_path / "texts.jsonl")!r})], tokenizer, cache_dir="cache", workers=2)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        begun = [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.terminate()
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert len(begun) >= 2 and not any(Path(f"/proc/{number}").exists() for number in begun)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_full_disk_is_one_sentence_and_nothing_stays_on_it(read, tmp_path, monkeypatch):
    def full(*_):
        yield np.zeros(10), np.zeros(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(corpora, "_tokenize", full)
    with pytest.raises(OSError, match="could not be written .No space left on device.; the text is tokenized and cut again"):
        read()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ("Version 1.5 is out... Really.", ["Version 1.5 is out...", "Really."]),
        ("A heading\n\nA line\n", ["A heading", "A line"]),
        ("  \n ", []),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text, ".!?") == sentences
    assert split_sentences("a; b. c", ";") == ["a;", "b. c"]


def test_holds_every_token_in_its_document_and_sentence(read, tokenizer):
    for delimiters in (None, ".!?"):
        corpus = read(sentence_delimiters=delimiters)
        bounds = corpus.documents.tolist()
        texts = [tokenizer.decode(corpus.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        assert texts == [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in DOCUMENTS if text]
    bounds = corpus.sentences.tolist()
    assert [tokenizer.decode(corpus.tokens[a:b]) for a, b in itertools.pairwise(bounds)] == [
        "a cat sat.",
        "it slept!",
        "b",
        "one two three four five six.",
        "seven eight?",
        "nine ten",
        "a b c d e f g h i j",
    ]
    assert read().sentences is None


def test_several_processes_give_the_same_corpus(read, tmp_path):
    documents = [f"a {text}" for text in DOCUMENTS * 300]
    one = read(documents, workers=1)
    tokens = np.array(one.tokens)
    shutil.rmtree(one.folder / "corpus")  # an interrupted tokenization leaves no corpus in its folder
    two = read(documents, workers=2)
    assert two.folder == one.folder
    assert np.array_equal(two.tokens, tokens) and np.array_equal(two.documents, one.documents)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_is_tokenized_once(read, monkeypatch):
    first = read()
    monkeypatch.setattr(corpora, "_token_lists", lambda *_, **__: pytest.fail("tokenized again"))
    assert read().fingerprint == first.fingerprint
    with pytest.raises(pytest.fail.Exception):
        read(sentence_delimiters=".")
    with pytest.raises(pytest.fail.Exception):
        read([*DOCUMENTS, "new"])


@pytest.mark.parametrize(("sample_by", "documents"), [("line", 5), ("paragraph", 3), ("document", 2)])
def test_text_files_become_documents(tmp_path, tokenizer, sample_by, documents):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1.txt").write_text("a cat sat.\nit slept!\n\none two\nthree\n")
    (tmp_path / "texts" / "2.txt").write_text("b\n")
    source = DataSource(path=str(tmp_path / "texts"))
    corpus = load_corpus([source], tokenizer, sample_by=sample_by, cache_dir=tmp_path / "cache")
    assert len(corpus.documents) - 1 == documents


@pytest.mark.parametrize("documents", [["", ""], ["  ", "\n"]])
@pytest.mark.parametrize("delimiters", [None, "."])
def test_refuses_a_corpus_without_words(read, documents, delimiters):
    with pytest.raises(ValueError, match="holds no text to train on"):
        read(documents, sentence_delimiters=delimiters)


def test_refuses_columns_that_are_not_clear(tmp_path, tokenizer):
    file = tmp_path / "two.jsonl"
    file.write_text('{"title": "a", "body": "b", "year": 1}\n')

    def load(**options):
        return load_corpus([DataSource(path=str(file))], tokenizer, cache_dir=tmp_path / "cache", **options)

    with pytest.raises(ValueError, match="columns are text, found title, body, year|found title, body; name it .text_column"):
        load()
    with pytest.raises(ValueError, match="Column 'content' is not there in .*; the columns are title, body, year"):
        load(text_column="content")
    with pytest.raises(ValueError, match="Column 'year' does not hold texts"):
        load(text_column="year")
    assert len(load(text_column="body").tokens) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(4, 20))
def test_pieces_hold_every_token_once_and_rows_fit(tmp_path_factory, sizes, max_length):
    corpus = made(tmp_path_factory.mktemp("corpus"), [[size] for size in sizes])
    pieces = MlmChunks(corpus, max_length)
    tokens = [at for start, size in zip(pieces.starts, pieces.lengths, strict=True) for at in range(start, start + size)]
    assert sorted(tokens) == list(range(sum(sizes)))
    owners = np.searchsorted(corpus.documents, pieces.starts, side="right")
    ends = np.searchsorted(corpus.documents, pieces.starts + pieces.lengths - 1, side="right")
    assert np.array_equal(owners, ends)  # no piece crosses the end of its document
    assert pieces.rows[0] == 0 and pieces.rows[-1] == len(pieces.starts) and (np.diff(pieces.rows) > 0).all()
    for begin, end in itertools.pairwise(pieces.rows):
        assert (pieces.lengths[begin:end] + 2).sum() <= max_length


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(5, 24))
def test_spans_are_neighbouring_sentences_that_fit(tmp_path_factory, documents, max_length):
    corpus = made(tmp_path_factory.mktemp("corpus"), documents)
    spans = NspSpans(corpus, max_length)
    for first, last, document in zip(spans.first, spans.last, spans.document, strict=True):
        assert last - first >= 2
        assert spans.bounds[last] - spans.bounds[first] <= max_length - 3
        assert corpus.documents[document] <= spans.bounds[first]
        assert spans.bounds[last] <= corpus.documents[document + 1]
    covered = {at for f, la in zip(spans.first, spans.last, strict=True) for at in range(spans.bounds[f], spans.bounds[la])}
    for number, document in enumerate(documents):
        places = set(range(corpus.documents[number], corpus.documents[number + 1]))
        assert places <= covered or len(document) == 1 or not places & covered
        if len(document) > 1:
            assert places <= covered


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 4))
def test_what_is_found_block_by_block_is_what_the_whole_gives(tmp_path_factory, documents, size):
    whole, cut = (made(tmp_path_factory.mktemp("corpus"), documents) for _ in range(2))
    expected = NspSpans(whole, 16)
    with pytest.MonkeyPatch.context() as patch:
        in_blocks = corpora._documents_in_blocks
        patch.setattr(corpora, "_documents_in_blocks", lambda corpus, _: in_blocks(corpus, size))
        spans, pieces = NspSpans(cut, 16), MlmChunks(cut, 16)
    for name in ("bounds", "first", "last", "document"):
        assert np.array_equal(getattr(spans, name), getattr(expected, name))
    tokens = [at for start, length in zip(pieces.starts, pieces.lengths, strict=True) for at in range(start, start + length)]
    assert sorted(tokens) == list(range(cut.documents[-1])) and pieces.rows[-1] == len(pieces.starts)
    for begin, end in itertools.pairwise(pieces.rows):
        assert begin < end and (pieces.lengths[begin:end] + 2).sum() <= 16


def test_pieces_and_spans_are_made_once_and_stay_on_disk(tmp_path, monkeypatch):
    corpus = made(tmp_path, [[5, 7], [30], [2, 2, 2]])
    first = MlmChunks(corpus, 16), NspSpans(corpus, 16)
    monkeypatch.setattr(corpora, "_documents_in_blocks", lambda *_: pytest.fail("made again"))
    again = MlmChunks(corpus, 16), NspSpans(corpus, 16)
    for before, after in zip(first, again, strict=True):
        for name, array in vars(before).items():
            assert isinstance(array, np.memmap)
            assert np.array_equal(array, getattr(after, name))
    with pytest.raises(pytest.fail.Exception):
        MlmChunks(corpus, 12)  # another length is cut again
