"""Tokenize a corpus into one array of token ids on disk, and cut the array into sequences.

Several processes tokenize the corpus. The arrays are memory-mapped, so that a corpus may be
larger than memory.
"""

import gc
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from minibert.data.load import load, text_column
from minibert.data.source import DataSource, joined_paths
from minibert.files import disk

_VERSION = 2  # the format of the files in the cache

_Blocks = Generator[tuple[np.ndarray, ...], None, None]


class TokenizedCorpus:
    """Store the token ids of all documents in one array, without special tokens.

    Attributes:
        folder: the cache folder of this corpus.
        fingerprint: a hash of the texts, the tokenizer and the sentence delimiters.
        tokens: (T,) token ids, memory-mapped.
        documents: (documents + 1,) start of each document in ``tokens``, and then T.
        sentences: (sentences + 1,) start of each sentence in ``tokens``, and then T. None if
            the documents were not split into sentences.
    """

    def __init__(self, folder: Path, blocks: _Blocks):
        """Open the corpus in ``folder``. If there is no corpus, write ``blocks`` first."""
        self.folder, self.fingerprint = folder, folder.name
        self.tokens, self.documents, *sentences = _kept(folder / "corpus", blocks)
        self.sentences = sentences[0] if sentences else None


def load_corpus(
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    split: str = "train",
    text_column: str | None = None,
    sample_by: str = "paragraph",
    sentence_delimiters: str | None = None,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> TokenizedCorpus:
    """Load the tokenized corpus of ``sources``. Tokenize the texts if they are not cached.

    The default of ``text_column`` is ``text``, or the only column of strings. A sentence ends
    at one of the characters ``sentence_delimiters``. If ``sentence_delimiters`` is None,
    documents are not split. The default of ``cache_dir`` is in the cache of ``datasets``.
    ``workers`` is the number of processes, by default one for each CPU.
    """
    parts = [load_documents(source, split, text_column, sample_by) for source in sources]
    facts = [_VERSION, tokenizer.backend_tokenizer.to_str(), sentence_delimiters, *(part._fingerprint for part in parts)]
    key = hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()
    root = disk.expand_home(cache_dir) if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "minibert-corpus"
    folder = root / key
    disk.refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = TokenizedCorpus(folder, _tokenize(parts, tokenizer, sentence_delimiters, folder, workers or os.cpu_count() or 1))
    if not corpus.documents[-1]:
        raise ValueError(f"{joined_paths(sources)} holds no text to train on; give texts with words.")
    return corpus


def split_sentences(text: str, delimiters: str) -> list[str]:
    r"""Split a text into sentences, at line breaks and after ``delimiters``.

    >>> split_sentences('He left. "Why?" she asked.\nNobody knew', ".!?")
    ['He left.', '"Why?"', 'she asked.', 'Nobody knew']
    """
    pieces = re.split(rf"(?<=[{re.escape(delimiters)}])([\"'”’)\]]*)\s+|\n+", text) if delimiters else text.split("\n")
    if delimiters:  # closing quotes were split off as separate pieces
        pieces = [head + (tail or "") for head, tail in zip(pieces[::2], [*pieces[1::2], ""], strict=True)]
    return [piece for piece in map(str.strip, pieces) if piece]


def load_documents(source: DataSource, split: str, column: str | None, sample_by: str) -> Dataset:
    """Return the rows of ``source`` as documents, in a single column ``text``.

    ``column`` is the column to read. The default is ``text`` or the only column of strings.
    """
    rows = load([source], split=split, sample_by=sample_by)
    column = text_column(rows, column, ["text"], option="text_column", where=source.path)
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _token_lists(batch: dict[str, list[str | None]], tokenizer: Any, delimiters: str | None) -> dict[str, list[Any]]:
    """Return the token ids of each document, and the number of tokens in each sentence."""
    documents = [[text] if delimiters is None else split_sentences(text, delimiters) for text in batch["text"] if text]
    flat = [sentence for document in documents for sentence in document]
    if not flat:
        return {"ids": [], "lengths": []}
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded = iter(tokenizer(flat, verbose=False, **options)["input_ids"])
    found = [[next(encoded) for _ in document] for document in documents]
    return {
        "ids": [np.fromiter((token for sentence in one for token in sentence), dtype=np.int32) for one in found],
        "lengths": [np.array([len(sentence) for sentence in one if sentence], dtype=np.int32) for one in found],
    }


def _tokenize(
    parts: list[Dataset],
    tokenizer: Any,
    delimiters: str | None,
    folder: Path,
    workers: int,
) -> _Blocks:
    """Yield blocks of tokens, ends of documents and, with ``delimiters``, ends of sentences."""
    with tempfile.TemporaryDirectory(prefix=".texts.", suffix=".part", dir=folder) as scratch:
        gc.freeze()  # otherwise, garbage collection would copy the memory that processes share
        try:
            with _sigterm_as_exit():
                tokenized = [
                    part.map(
                        _token_lists,
                        batched=True,
                        batch_size=200,
                        num_proc=min(workers, len(part)) if workers > 1 and len(part) > 1000 else None,
                        remove_columns=["text"],
                        fn_kwargs={"tokenizer": tokenizer, "delimiters": delimiters},
                        features=datasets.Features(dict.fromkeys(("ids", "lengths"), datasets.List(datasets.Value("int32")))),
                        new_fingerprint=f"{folder.name}-{number}",
                        cache_file_name=str(Path(scratch) / f"{number}.arrow"),
                        desc="tokenize",
                    )
                    for number, part in enumerate(parts)
                ]
        except Exception as error:
            # ``datasets`` waits for its processes. A timeout would hide the interruption.
            if isinstance(error.__context__, KeyboardInterrupt | SystemExit | OSError):
                raise error.__context__ from error
            raise
        finally:
            gc.unfreeze()
        arrays = 2 if delimiters is None else 3
        bound = np.zeros(1, np.int64)
        yield (np.zeros(0, np.uint16 if len(tokenizer) <= 2**16 else np.int32), bound, bound)[:arrays]
        total = 0
        for part in tokenized:
            for table in part.with_format("arrow").iter(batch_size=1000):
                ids, lengths = (table[name].combine_chunks() for name in ("ids", "lengths"))
                sizes = ids.value_lengths().to_numpy(zero_copy_only=False)
                tokens, sentences = ids.flatten().to_numpy(), lengths.flatten().to_numpy()
                ends = [total + np.cumsum(counts, dtype=np.int64) for counts in (sizes[sizes > 0], sentences)]
                yield (tokens, *ends)[:arrays]
                total += len(tokens)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Raise ``SystemExit`` on SIGTERM, so that worker processes also end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class MlmChunks:
    """Cut documents into chunks, and group chunks into rows of at most ``max_length`` tokens.

    Attributes:
        starts: (chunks,) the position of each chunk in the corpus.
        lengths: (chunks,) the number of tokens of each chunk, without special tokens.
        rows: (rows + 1,) the first chunk of each row, and then the number of chunks.
    """

    def __init__(self, corpus: TokenizedCorpus, max_length: int):
        def blocks() -> _Blocks:
            yield np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(1, np.int64)
            chunks = 0
            for bounds in _documents_in_blocks(corpus, 100_000):
                starts, lengths, counts = _cut(bounds, max_length)
                yield starts, lengths, chunks + np.cumsum(counts)
                chunks += len(starts)

        self.starts, self.lengths, self.rows = _kept(corpus.folder / f"chunks-{max_length}", blocks())


def _cut(bounds: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the start and length of each chunk, and the number of chunks in each row.

    >>> _cut(np.array([0, 9, 11, 13]), max_length=8)
    (array([ 0,  6,  9, 11]), array([6, 3, 2, 2], dtype=int32), array([1, 1, 2]))
    """
    body = max_length - 2  # [CLS] and [SEP]
    whole, rest = np.divmod(np.diff(bounds), body)
    full = np.repeat(bounds[:-1], whole) + body * (np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole))
    rest_starts, rest = (bounds[:-1] + whole * body)[rest > 0], rest[rest > 0]
    counts, used = [], max_length + 1
    for size in rest.tolist():
        if used + size + 2 > max_length:
            counts.append(0)
            used = 0
        counts[-1] += 1
        used += size + 2
    starts = np.concatenate([full, rest_starts])
    lengths = np.concatenate([np.full(len(full), body), rest]).astype(np.int32)
    return starts, lengths, np.array([1] * len(full) + counts)


class NspSpans:
    """Find spans of consecutive sentences that fit into ``max_length`` tokens.

    Attributes:
        bounds: (sentences + 1,) the start of each sentence, and then the end of the last
            sentence. A long sentence counts as several.
        first: (spans,) the first sentence of each span.
        last: (spans,) the sentence after each span.
        document: (spans,) the document of each span.
    """

    def __init__(self, corpus: TokenizedCorpus, max_length: int):
        assert corpus.sentences is not None
        sentences = corpus.sentences

        def blocks() -> _Blocks:
            nothing = np.zeros(0, np.int64)
            yield np.zeros(1, np.int64), nothing, nothing, nothing
            found = documents = 0
            for bounds in _documents_in_blocks(corpus, 1000):
                begin, end = np.searchsorted(sentences, bounds[[0, -1]])
                ends, first, last, document = _runs(np.asarray(sentences[begin : end + 1]), bounds, max_length)
                yield ends, first + found, last + found, document + documents
                found, documents = found + len(ends), documents + len(bounds) - 1

        self.bounds, self.first, self.last, self.document = _kept(corpus.folder / f"spans-{max_length}", blocks())


def _runs(sentences: np.ndarray, documents: np.ndarray, max_length: int) -> tuple[np.ndarray, ...]:
    """Return the ends of all sentences, and the start, end and document of each span.

    >>> _runs(np.array([0, 4, 9, 12]), np.array([0, 9, 12]), max_length=13)
    (array([ 4,  9, 12]), array([0]), array([2]), array([0]))
    """
    room = max_length - 3  # [CLS], [SEP] and [SEP]
    longest = room // 2
    lengths = np.diff(sentences)
    parts = -(-lengths // longest)
    offsets = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    bounds = np.append(np.repeat(sentences[:-1], parts) + longest * offsets, sentences[-1])
    of_document = np.searchsorted(documents, bounds[:-1], side="right") - 1
    sizes, owners = np.diff(bounds).tolist(), of_document.tolist()
    spans, begin, used = [], 0, 0
    for at in range(len(sizes) + 1):
        over = at == len(sizes) or owners[at] != owners[begin]
        if over or used + sizes[at] > room:
            # A single remaining sentence forms a span with the sentence before it.
            if at - begin == 1 and begin and owners[begin - 1] == owners[begin]:
                begin -= 1
            if at - begin > 1:
                spans.append((begin, at))
            begin, used = at, 0
        if at < len(sizes):
            used += sizes[at]
    first, last = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    return bounds[1:], first, last, of_document[first]


def _documents_in_blocks(corpus: TokenizedCorpus, size: int) -> Iterator[np.ndarray]:
    """Yield the bounds of at most ``size`` documents at a time."""
    for at in range(0, len(corpus.documents) - 1, size):
        yield np.asarray(corpus.documents[at : at + size + 1])


def _kept(folder: Path, blocks: _Blocks) -> list[np.ndarray]:
    """Memory-map the arrays in ``folder``. If ``folder`` is missing, write ``blocks`` first.

    Each block is a tuple with the next values of every array. The first block determines the
    dtypes.
    """
    disk.refuse_link(folder)
    disk.delete_unused_lock(folder.parent)
    with closing(blocks):
        if not folder.exists():
            kept = "the text is tokenized and cut again"
            with disk.exclusive_lock(folder.parent, "tokenizing into", kept=kept, wait=True):
                for killed in disk.leftovers(folder.parent):
                    disk.delete(killed)
                if not folder.exists():  # another process may have written it
                    with disk.readable_os_errors(folder, kept), disk.atomic_write(folder, folder=True) as part:
                        _write(part, blocks)
    return [
        # An empty file cannot be mapped.
        np.memmap(path, dtype=dtype, mode="r") if (path := folder / str(number)).stat().st_size else np.zeros(0, dtype)
        for number, dtype in enumerate(json.loads((folder / "dtypes.json").read_text()))
    ]


def _write(folder: Path, blocks: _Blocks) -> None:
    dtypes: list[str] = []
    for block in blocks:
        dtypes = dtypes or [part.dtype.str for part in block]
        for number, (part, dtype) in enumerate(zip(block, dtypes, strict=True)):
            with (folder / str(number)).open("ab") as file:
                file.write(part.astype(dtype, copy=False).tobytes())
    (folder / "dtypes.json").write_text(json.dumps(dtypes))
    for path in folder.iterdir():
        disk.sync(path)
