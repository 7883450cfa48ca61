"""A corpus as one long row of token ids on disk, cut into sequences for pretraining.

Tokenizing happens once, in several processes; what comes out is memory-mapped, so that a corpus may be larger than memory.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from numpy.lib.format import open_memmap

from minibert.data.columns import pick_columns
from minibert.data.load import check_columns, load, text_columns
from minibert.data.source import DataSource
from minibert.files import disk

_VERSION = 1  # of the files in the cache
_BOUNDS = ("documents", "sentences")


class TokenizedCorpus:
    """Documents as token ids, end to end, without special tokens.

    Attributes:
        tokens: (T,) ids, memory-mapped.
        documents: (documents + 1,) bounds in ``tokens``.
        sentences: (sentences + 1,) bounds in ``tokens``, or None where sentences were not looked for.
        fingerprint: changes with the texts, the tokenizer and the way of splitting.
    """

    def __init__(self, folder: Path):
        self.folder, self.fingerprint = folder, folder.name
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.documents = np.load(folder / "documents.npy", mmap_mode="r")
        sentences = folder / "sentences.npy"
        self.sentences = np.load(sentences, mmap_mode="r") if sentences.exists() else None


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
    """The corpus that ``sources`` hold: from the cache, or tokenized and put there.

    Args:
        text_column: column of documents; unset means ``text``, or the only column of strings.
        sample_by: how text files become documents: each ``line``, each ``paragraph`` (up to an empty line), or each file
            (``document``).
        sentence_delimiters: characters that end a sentence where white space follows; None looks for no sentences.
        cache_dir: folder of all such caches; unset means a folder beside those of ``datasets``.
        workers: processes that tokenize; unset means one per processor.

    Raises:
        ValueError: when the data has no column of texts to choose, or holds no text.
    """
    parts = [load_documents(source, split, text_column, sample_by) for source in sources]
    key = hashlib.blake2b(digest_size=12)
    for fact in (
        _VERSION,
        tokenizer.backend_tokenizer.to_str(),
        sentence_delimiters,
        *(part._fingerprint for part in parts),
    ):
        key.update(repr(fact).encode())
    root = Path(cache_dir).expanduser() if cache_dir else Path(datasets.config.HF_DATASETS_CACHE) / "minibert-corpus"
    folder = root / key.hexdigest()
    if not (folder / "corpus.json").exists():
        _tokenize(parts, tokenizer, sentence_delimiters, folder, workers or os.cpu_count() or 1)
    corpus = TokenizedCorpus(folder)
    if not corpus.documents[-1]:
        raise ValueError(
            f"{' + '.join(source.path for source in sources)} holds no text to train on; give a corpus with words."
        )
    return corpus


def split_sentences(text: str, delimiters: str) -> list[str]:
    """Cut a text after each delimiter (and the quotes or brackets that close after it) with white space behind it, and at
    line breaks.

    >>> split_sentences('He left. "Why?" she asked.\\nNobody knew', ".!?")
    ['He left.', '"Why?"', 'she asked.', 'Nobody knew']
    """
    pieces = re.split(rf"(?<=[{re.escape(delimiters)}])([\"'”’)\]]*)\s+|\n+", text) if delimiters else text.split("\n")
    if delimiters:  # the closing quotes were split off as their own pieces
        pieces = [head + (tail or "") for head, tail in zip(pieces[::2], [*pieces[1::2], ""], strict=True)]
    return [piece for piece in map(str.strip, pieces) if piece]


def load_documents(source: DataSource, split: str, column: str | None, sample_by: str) -> Dataset:
    """The rows of ``source`` as documents, in one column ``text``.

    Args:
        column: of the texts; None means ``text``, or the only column of strings.
        sample_by: as in :func:`minibert.data.load.load`.

    Raises:
        ValueError: for a source without that column.
    """
    rows = load([source], split=split, sample_by=sample_by)
    found = text_columns(rows)
    where = {"where": source.path, "columns": rows.column_names, "option": "text_column"}
    (column,) = pick_columns(found, column and [column], [("text",)], **where)
    check_columns(rows, [column], [source], filled=False)
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def _token_lists(batch: dict[str, list[str | None]], tokenizer: Any, delimiters: str | None) -> dict[str, list[Any]]:
    """Ids and sentence lengths of documents."""
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


def _tokenize(parts: list[Dataset], tokenizer: Any, delimiters: str | None, folder: Path, workers: int) -> None:
    """Fill ``folder``, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        scratch, whole = Path(temporary) / "scratch", Path(temporary) / "whole"
        scratch.mkdir()
        whole.mkdir()
        gc.freeze()  # or every process would copy all that it shares with this one when it looks for garbage
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
                        cache_file_name=str(scratch / f"{number}.arrow"),
                        desc="tokenize",
                    )
                    for number, part in enumerate(parts)
                ]
        except Exception as error:
            # datasets asks its processes once more while an interruption passes, and that this takes too long replaces it.
            if isinstance(error.__context__, KeyboardInterrupt | SystemExit):
                raise error.__context__ from error
            raise
        finally:
            gc.unfreeze()
        counts = np.zeros(3, dtype=np.int64)  # documents, sentences, tokens
        for documents, sentences, ids in _blocks(tokenized):
            counts += [len(documents), len(sentences), len(ids)]
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
        bounds = [_new_array(whole / f"{name}.npy", size + 1, np.int64) for name, size in zip(_BOUNDS, counts, strict=False)]
        tokens = _new_array(whole / "tokens.npy", counts[2], dtype)
        filled = np.zeros(3, dtype=np.int64)
        for block in _blocks(tokenized):
            for array, sizes, place in zip(bounds, block, filled, strict=False):
                array[place + 1 : place + 1 + len(sizes)] = filled[2] + np.cumsum(sizes, dtype=np.int64)
            tokens[filled[2] : filled[2] + len(block[2])] = block[2]
            filled += [len(part) for part in block]
        for array in (*bounds, tokens):
            array.flush()
        if delimiters is None:
            (whole / "sentences.npy").unlink()
        (whole / "corpus.json").write_text(json.dumps({"documents": int(counts[0]), "tokens": int(counts[2])}))
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` in here: the processes that tokenize would outlive this one if it just ended."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what a signal does
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _new_array(path: Path, size: int, dtype: Any) -> np.memmap:
    """A memory-mapped array of zeros; it keeps one element if it would be empty, which cannot be mapped.

    Raises:
        OSError: for a disk without room for it.
    """
    with disk.readable_os_errors(path, "the tokenized text is made anew"):
        array = open_memmap(path, mode="w+", dtype=dtype, shape=(max(1, int(size)),))
        if hasattr(os, "posix_fallocate"):  # else a full disk would be told by a signal, which ends the process without a word
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _blocks(parts: list[Dataset]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of documents that have tokens: tokens per document, tokens per sentence, and the ids."""
    for part in parts:
        for table in part.with_format("arrow").iter(batch_size=1000):
            ids, lengths = (table[name].combine_chunks() for name in ("ids", "lengths"))
            sizes = ids.value_lengths().to_numpy(zero_copy_only=False)
            yield sizes[sizes > 0], lengths.flatten().to_numpy(), ids.flatten().to_numpy()


# ------------------------------------------------------------------------------------------------------------- sequences


class MlmChunks:
    """Documents cut into pieces, and the short last pieces of documents put together into rows.

    Attributes (kept beside the corpus and memory-mapped, as it is):
        starts, lengths: (pieces,) place and size of each piece in the corpus.
        rows: (rows + 1,) bounds in the pieces; the pieces of a row fit into it together with two special tokens each.
    """

    def __init__(self, corpus: TokenizedCorpus, max_length: int):
        def blocks() -> Iterator[tuple[np.ndarray, ...]]:
            yield np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(1, np.int64)
            pieces = 0
            for bounds in _documents_in_blocks(corpus, 100_000):
                starts, lengths, counts = _cut(bounds, max_length)
                yield starts, lengths, pieces + np.cumsum(counts)
                pieces += len(starts)

        self.starts, self.lengths, self.rows = _kept(corpus.folder / f"pieces-{max_length}", blocks())


def _cut(bounds: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces of documents, and how many pieces each row holds.

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
    """Runs of two or more consecutive sentences of a document that fit into a sequence as a pair of segments.

    Attributes (kept beside the corpus and memory-mapped, as it is):
        bounds: (sentences + 1,) places in the corpus; a sentence longer than half a sequence counts as several.
        first, last: (spans,) sentences of each span, from ``first`` up to but not including ``last``.
        document: (spans,) the document of each span.
    """

    def __init__(self, corpus: TokenizedCorpus, max_length: int):
        assert corpus.sentences is not None
        sentences = corpus.sentences

        def blocks() -> Iterator[tuple[np.ndarray, ...]]:
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
    """Ends of the sentences between the bounds ``sentences``, and the spans of them: first, last and document.

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
            # A single sentence that is left over at the end of a document takes the one before it as well.
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
    """The bounds of ``size`` documents after the other; the last bound of a block is the first of the next."""
    for at in range(0, len(corpus.documents) - 1, size):
        yield np.asarray(corpus.documents[at : at + size + 1])


def _kept(folder: Path, blocks: Iterator[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    """Arrays of which every block has a part, end to end: written to ``folder`` the first time, and memory-mapped.

    They have an entry for every few words of the text, so those of a large corpus would fill the memory.
    """
    if not folder.exists():
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            first = next(blocks)  # all have its types
            dtypes = [part.dtype.str for part in first]
            with ExitStack() as stack:
                files = [stack.enter_context((whole / str(number)).open("wb")) for number in range(len(first))]
                for block in chain([first], blocks):
                    for file, part, dtype in zip(files, block, dtypes, strict=True):
                        file.write(part.astype(dtype, copy=False).tobytes())
            (whole / "dtypes.json").write_text(json.dumps(dtypes))
            try:
                whole.rename(folder)
            except OSError:
                if not folder.exists():  # if it does, another process was first, with the same
                    raise
    return [
        # An empty file cannot be mapped.
        np.memmap(path, dtype=dtype, mode="r") if (path := folder / str(number)).stat().st_size else np.zeros(0, dtype)
        for number, dtype in enumerate(json.loads((folder / "dtypes.json").read_text()))
    ]
