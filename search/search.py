"""Search passages by meaning: those of a file, encoded here and now, or those of a folder of vectors, by its index."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from minibert.data.load import as_dataset, is_unicode, text_columns
from minibert.files import disk
from minibert.inference.encode import Encoder
from minibert.inference.load import find_model, fingerprint
from minibert.search.index import KEPT, alone_with_index, index_folder, open_index
from minibert.search.vectors import VectorFolder

if TYPE_CHECKING:
    from minibert.inference.bm25 import WordIndex

logger = logging.getLogger(__name__)

# Rows whose texts are read at once to index their words.
_CHUNK = 10_000
# Texts read at once for the index of words.
_CHUNK = 10_000
# How far down the rankings by meaning and by words are read before they are fused.
_FUSED_DEPTH = 100
# Reciprocal rank fusion adds 1 / (60 + rank); 60 is what its authors found, and what others use.
_FUSION = 60


class Hit(NamedTuple):
    """One passage found: its number in the passages (from 0), its similarity to the query, its text and, in a folder of
    vectors, its id. ``passage`` is ``None`` in a folder that kept no texts."""

    number: int
    score: float
    passage: str | None
    id: Any = None


def read_passages(data: str | Path | Dataset, column: str | None = None, *, split: str = "train") -> list[str]:
    """The passages in ``data``: the texts of one column, each once, without those that are missing or blank.

    Args:
        data: a file, a folder with a file per split, a Hub data set (owner/name or owner/name:config), or rows read already.
        column: the column to take; the default is the only column of strings, or else the one named ``text``, ``passage``,
            ``answer`` or ``sentence``.
        split: the split of a folder or Hub data set to read; everything else is taken whole.

    Raises:
        FileNotFoundError: for data that is neither here nor on the Hub.
        ValueError: for a column that is not there or holds no texts, a choice that is not clear, no passage at all, or
            data that cannot be read.
    """
    data = as_dataset(data, split=split)
    strings = text_columns(data)
    if column is None:
        usual = [name for name in ("text", "passage", "answer", "sentence") if name in strings]
        if not usual and len(strings) != 1:
            raise ValueError(
                f"The passages could be in more than one of the columns {', '.join(data.column_names)}; name one with --column."
                if strings
                else f"No column holds texts; the columns are {', '.join(data.column_names)}. Give data with one of strings."
            )
        column = (usual or strings)[0]
    elif column not in strings:
        raise ValueError(
            f"There is no column of texts named {column!r}; the columns of texts are {', '.join(strings) or 'none'} "
            f"(all columns: {', '.join(data.column_names)})."
        )
    passages = list(dict.fromkeys(text for text in data[column] if text and not text.isspace()))
    if not passages:
        raise ValueError(f"Every passage in column {column!r} is blank; give a file that holds texts.")
    return passages


def read_queries(data: str | Path | Dataset, column: str | None = None) -> list[str]:
    """The queries in ``data``, one per row: all of them, in their order.

    Args:
        data: a file (text: a query per line), a folder, a Hub data set, or rows read already.
        column: the column to take; the default is the only column of strings, or else the one named ``query``, ``question``
            or ``text``.

    Raises:
        FileNotFoundError: for data that is neither here nor on the Hub.
        ValueError: for a file that is empty, a column that is not there, a choice that is not clear, or a query that is blank.
    """
    data = as_dataset(data, split="train")
    strings = text_columns(data)
    if column is None:
        column = next((name for name in ("query", "question", "text") if name in strings), None)
        column = strings[0] if column is None and len(strings) == 1 else column
    if column not in strings:
        raise ValueError(
            f"There is no column of queries{f' named {column!r}' if column else ''}: the columns of texts are "
            f"{', '.join(strings) or 'none'}; name one of them query."
        )
    queries = [query or "" for query in data[column]]
    check_queries(queries)
    return queries


def check_queries(queries: Sequence[str]) -> None:
    """Refuse queries that ask nothing.

    Raises:
        ValueError: naming the first query that is empty, blank, or was not written in UTF-8.
    """
    for number, query in enumerate(queries, start=1):
        if not query.strip():
            raise ValueError(f"Query {number} is empty; say in words what to look for.")
        if not is_unicode(query):
            shown = shorten(repr(query), 80)
            raise ValueError(f"Query {number} is not UTF-8: {shown}; convert it, for example with iconv -f latin1 -t utf8.")


class Searcher:
    """Passages and their vectors, ready for queries.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers model.
        passages: texts to search; each is encoded once, here. Beside the vectors (``len(passages)`` x width numbers), memory
            does not grow with their number.

    Example::

        searcher = Searcher("runs/quickstart/2-embed", ["invert a matrix", "sort a list"])
        (hits,) = searcher.search(["how do I order items"], top_k=1)
        print(hits[0].passage, hits[0].score)

    Raises:
        ValueError: for no passages, and as :func:`minibert.inference.load.load` does.
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        passages: Sequence[str],
        *,
        device: str | None = None,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        if not len(passages):
            raise ValueError("There are no passages to search; give at least one.")
        self.passages = passages
        self.encoder = Encoder(model, device=device, trust_remote_code=trust_remote_code)
        self.vectors = torch.from_numpy(self.encoder.encode_document(passages, show_progress=show_progress))

    def search(self, queries: Sequence[str], top_k: int = 5) -> list[list[Hit]]:
        """The ``top_k`` passages most similar to each query, best first.

        Raises:
            ValueError: for an empty query, or ``top_k`` under 1.
        """
        check_queries(queries)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing; ask for at least 1 passage (--top-k).")
        if not queries:
            return []
        query_vectors = torch.from_numpy(self.encoder.encode_query(queries))
        found = semantic_search(query_vectors, self.vectors, top_k=top_k, score_function=self.encoder.model.similarity)
        return [[Hit(number := int(hit["corpus_id"]), hit["score"], self.passages[number]) for hit in hits] for hits in found]


class FolderSearcher:
    """A folder of vectors that ``minibert encode`` wrote, ready for queries.

    Its index is built here if need be, or extended by new shards; see :func:`minibert.search.index.open_index`.

    Args:
        folder: with a ``manifest.json``.
        model: of the queries: where the model that made the vectors is now, or that model opened (which nothing can check);
            the default is where the manifest says.
        exact: compare queries with all vectors, however many.
        hybrid: fuse the ranking by meaning with BM25's by words (reciprocal rank fusion); scores are then sums of
            ``1 / (60 + rank)``.
        rebuild: build the index from nothing.

    Example::

        searcher = FolderSearcher("notes-vectors", hybrid=True)
        for hit in searcher.search(["how do I order items"])[0]:
            print(hit.id, hit.score, hit.passage)

    Raises:
        FileNotFoundError: for a folder or model that is not there, or a missing shard.
        ValueError: for a model that did not make these vectors, a folder without vectors or (``hybrid``) without texts, and
            damaged files.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | SentenceTransformer | None = None,
        *,
        exact: bool = False,
        hybrid: bool = False,
        rebuild: bool = False,
        device: str | None = None,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        self.folder, self.exact = VectorFolder(folder), exact
        manifest = self.folder.manifest
        if hybrid and not self.folder.has_texts:
            raise ValueError(
                f"{folder} holds no texts, which --hybrid searches by their words; encode again with --keep-text, or leave "
                "--hybrid out."
            )
        if hybrid:
            from minibert.inference import bm25  # noqa: F401  # a missing bm25s is better known before the index is built
        if not manifest.complete:
            logger.warning(
                "%s is not finished: minibert encode has written %s vectors so far.", folder, f"{len(self.folder):,}"
            )
        if not isinstance(model, SentenceTransformer):
            model = find_model_of(self.folder, model, trust_remote_code=trust_remote_code)
        self.encoder = Encoder(model, device=device, trust_remote_code=trust_remote_code)
        if self.encoder.dimension != manifest.dimension:
            raise ValueError(
                f"{folder} holds vectors of {manifest.dimension} dimensions, but the model computes {self.encoder.dimension}."
            )
        self.index = open_index(self.folder, exact=exact, rebuild=rebuild, show_progress=show_progress)
        self.words = (
            _open_words(self.folder, [part.sha256 for part in self.index.state.parts], show_progress) if hybrid else None
        )

    def search(self, queries: Sequence[str], top_k: int = 5) -> list[list[Hit]]:
        """The ``top_k`` passages most similar to each query, best first.

        Raises:
            ValueError: for an empty query, or ``top_k`` under 1.
        """
        check_queries(queries)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing; ask for at least 1 passage (--top-k).")
        if not queries:
            return []
        query_vectors = self.encoder.encode_query(queries)
        depth = max(top_k, _FUSED_DEPTH) if self.words else top_k
        scores, rows = self.index.search(query_vectors, depth, exact=self.exact)
        if self.words:
            scores, rows = fuse([rows, self.words.search(queries, depth)[1]], top_k)
        return self._hits(scores, rows)

    def _hits(self, scores: np.ndarray, rows: np.ndarray) -> list[list[Hit]]:
        found = np.unique(rows[rows >= 0])
        ids = dict(zip(found.tolist(), self.folder.ids(found), strict=True))
        texts = dict(zip(found.tolist(), self.folder.texts(found), strict=True)) if self.folder.has_texts else {}
        return [
            [Hit(row, score, texts.get(row), ids[row]) for score, row in zip(row_scores, row_numbers, strict=True) if row >= 0]
            for row_scores, row_numbers in zip(scores.tolist(), rows.tolist(), strict=True)
        ]


def find_model_of(folder: VectorFolder, model: str | Path | None = None, *, trust_remote_code: bool = False) -> Path:
    """The folder of the model that made the vectors: ``model``, or what the manifest names.

    Raises:
        FileNotFoundError: for a model that is not there.
        ValueError: for another model.
    """
    manifest = folder.manifest
    try:
        path = find_model(model or manifest.model, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        if model:
            raise
        raise FileNotFoundError(f"{error} It made the vectors in {folder.folder}: say where it is with --model.") from error
    if fingerprint(path) != manifest.fingerprint:
        raise ValueError(
            f"The vectors in {folder.folder} were made by {manifest.model}, and {model} is another model: "
            f"search with --model {manifest.model}, or encode again with {model}."
            if model and str(model) != manifest.model
            else f"The vectors in {folder.folder} were made by {manifest.model}, and {manifest.model} has changed since: "
            "encode again, or name the model as it was with --model."
        )
    return path


def fuse(rankings: Sequence[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Reciprocal rank fusion: the sum of ``1 / (60 + rank)`` over the rankings that hold a row.

    Args:
        rankings: row numbers, best first, (n, k) each; -1 is nothing.

    Returns:
        scores and rows, both (n, top_k) or of as many columns as the rankings have together, best first, filled up with -1;
        of equal scores the one of the earlier ranking leads.

    >>> scores, rows = fuse([np.array([[7, 8, 9]]), np.array([[8, 5, -1]])], top_k=3)
    >>> rows.tolist(), scores.round(4).tolist()
    ([[8, 7, 5]], [[0.0325, 0.0164, 0.0161]])
    """
    count, top_k = len(rankings[0]), min(top_k, sum(ranking.shape[1] for ranking in rankings))
    scores, rows = np.zeros((count, top_k)), np.full((count, top_k), -1, dtype=np.int64)
    for query in range(count):
        total: dict[int, float] = {}
        for ranking in rankings:
            for rank, row in enumerate(ranking[query].tolist(), start=1):
                if row >= 0:
                    total[row] = total.get(row, 0.0) + 1 / (_FUSION + rank)
        best = sorted(total.items(), key=lambda item: -item[1])[:top_k]
        for place, (row, score) in enumerate(best):
            scores[query, place], rows[query, place] = score, row
    return scores, rows


def _open_words(folder: VectorFolder, shards: Sequence[str], show_progress: bool) -> "WordIndex":
    """BM25 over the folder's texts, memory-mapped, built if it is not that of these shards.

    How rare a word is depends on all texts, so new shards mean a new index.
    """
    from minibert.inference.bm25 import WordIndex

    home = index_folder(folder) / f"words-{sha256(' '.join(shards).encode()).hexdigest()[:16]}"
    if home.exists():
        with contextlib.suppress(ValueError):  # which is told once nobody else can be replacing it
            return WordIndex.load(home)
    with alone_with_index(folder):
        if home.exists():  # somebody else may just have built it
            try:
                return WordIndex.load(home)
            except ValueError as error:
                logger.warning("%s The word index is built anew.", error)
        temporary = home.with_name(f"{home.name}.tmp-{os.getpid()}")
        for earlier in home.parent.glob("words-*"):
            shutil.rmtree(earlier)
        try:
            built = WordIndex.build(_texts_of(folder), show_progress=show_progress)
            with disk.readable_os_errors(home, KEPT):
                built.save(temporary)
                temporary.replace(home)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        logger.info("BM25 index of %s texts.", f"{len(folder):,}")
        return WordIndex.load(home)


def _texts_of(folder: VectorFolder) -> Iterator[str]:
    for start in range(0, len(folder), _CHUNK):
        yield from folder.texts(np.arange(start, min(start + _CHUNK, len(folder))))
