"""Search passages by meaning: those of a file, or those of a folder of vectors by its index."""

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from minibert.data.columns import pick_columns
from minibert.data.load import as_dataset, is_unicode, text_columns
from minibert.files.disk import readable_os_errors
from minibert.inference.encode import Encoder
from minibert.inference.load import find_model, fingerprint
from minibert.search.index import KEPT, index_folder, index_lock, open_index
from minibert.search.vectors import VectorFolder

if TYPE_CHECKING:
    from minibert.inference.bm25 import WordIndex

logger = logging.getLogger(__name__)

# Depth to which the rankings by meaning and by words are read before they are fused.
_FUSED_DEPTH = 100
# Reciprocal rank fusion adds 1 / (60 + rank); 60 is the constant of its paper (Cormack et
# al., 2009).
_FUSION = 60


class Hit(NamedTuple):
    """A passage found.

    ``number`` is its place in the passages, from 0, and ``score`` its similarity to the
    query. ``passage`` is None in a folder without texts; ``id`` is given only in a folder
    of vectors.
    """

    number: int
    score: float
    passage: str | None
    id: Any = None


def read_passages(data: str | Path | Dataset, column: str | None = None) -> list[str]:
    """Read the passages in ``data``: each text of one column once, without blank ones.

    Args:
        data: a file, a folder with a file per split (``train`` is read), a Hub data set
            (owner/name or owner/name:config), or a data set in memory.
        column: the default is the only column of strings, or else the one named ``text``,
            ``passage``, ``answer`` or ``sentence``.
    """
    data = as_dataset(data, split="train")
    usual = [["text"], ["passage"], ["answer"], ["sentence"]]
    wanted = None if column is None else [column]
    (column,) = pick_columns(text_columns(data), wanted, usual, option="--column", columns=data.column_names)
    passages = list(dict.fromkeys(text for text in data[column] if text and not text.isspace()))
    if not passages:
        raise ValueError(f"Every passage in column {column!r} is blank; give a file that holds texts.")
    return passages


def read_queries(data: str | Path | Dataset) -> list[str]:
    """Read the queries in ``data``, one per row, in their order.

    They are in the only column of strings, or else in the one named ``query``,
    ``question`` or ``text``. ``data`` and errors are as in :func:`read_passages`; blank
    queries are refused.
    """
    data = as_dataset(data, split="train")
    found, usual = text_columns(data), [["query"], ["question"], ["text"]]
    where, columns = "the queries", data.column_names
    (column,) = pick_columns(found, None, usual, option="query", where=where, columns=columns)
    queries = [query or "" for query in data[column]]
    check_queries(queries)
    return queries


def check_queries(queries: Sequence[str]) -> None:
    """Refuse a query that is empty, blank, or not UTF-8."""
    for number, query in enumerate(queries, start=1):
        if not query.strip():
            raise ValueError(f"Query {number} is empty; write what to look for.")
        if not is_unicode(query):
            shown = shorten(repr(query), 80)
            raise ValueError(f"Query {number} is not UTF-8: {shown}; convert it, as with iconv -f latin1 -t utf8.")


class Searcher:
    """Passages and their vectors in memory, ready for queries.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened
            sentence-transformers model.
        passages: texts to search; each is encoded once, here. Memory holds their vectors.

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
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        if not len(passages):
            raise ValueError("passages must hold at least one text, got none.")
        self.passages = passages
        self.encoder = Encoder(model, trust_remote_code=trust_remote_code)
        self.vectors = torch.from_numpy(self.encoder.encode_document(passages, show_progress=show_progress))

    def search(self, queries: Sequence[str], top_k: int = 5) -> list[list[Hit]]:
        """Return the ``top_k`` passages most similar to each query, best first.

        Raises:
            ValueError: for an empty query, or ``top_k`` below 1.
        """
        check_queries(queries)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k} (--top-k).")
        return self._find(queries, self.encoder.encode_query(queries), top_k) if queries else []

    def _find(self, queries: Sequence[str], vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        similarity = self.encoder.model.similarity
        found = semantic_search(torch.from_numpy(vectors), self.vectors, top_k=top_k, score_function=similarity)
        return [[Hit(number := int(hit["corpus_id"]), hit["score"], self.passages[number]) for hit in hits] for hits in found]


class FolderSearcher(Searcher):
    """A folder of vectors that ``minibert encode`` wrote, ready for queries.

    Its index is built here, or extended by new shards.

    Args:
        model: where the model that made the vectors is now; the default is as the
            manifest says.
        exact: compare queries with all vectors, however many.
        hybrid: fuse the rankings by meaning and by words (BM25) by reciprocal rank;
            scores are then sums of ``1 / (60 + rank)``.
        rebuild: build the index from nothing.

    Example::

        searcher = FolderSearcher("notes-vectors", hybrid=True)
        for hit in searcher.search(["how do I order items"])[0]:
            print(hit.id, hit.score, hit.passage)

    Raises:
        FileNotFoundError: for a folder, model or shard that is not there.
        ValueError: for a model that did not make these vectors, a folder without vectors
            or (``hybrid``) without texts, and damaged files.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | Path | None = None,
        *,
        exact: bool = False,
        hybrid: bool = False,
        rebuild: bool = False,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        self.folder = VectorFolder(folder)
        if hybrid and not self.folder.has_texts:
            raise ValueError(f"{folder} holds no texts for --hybrid; encode again with --keep-text, or leave it out.")
        if hybrid:
            from minibert.inference import bm25  # noqa: F401  # fails here rather than after the index was built
        if not self.folder.manifest.complete:
            count = f"{len(self.folder):,}"
            logger.warning("%s is not finished: minibert encode has written %s vectors so far.", folder, count)
        path = _find_model(self.folder, model, trust_remote_code)
        self.encoder = Encoder(path, trust_remote_code=trust_remote_code)
        self.index = open_index(self.folder, exact=exact, rebuild=rebuild, show_progress=show_progress)
        shards = [shard.sha256 for shard in self.index.state.shards]
        self.words = _open_words(self.folder, shards, show_progress) if hybrid else None

    def _find(self, queries: Sequence[str], vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        depth = max(top_k, _FUSED_DEPTH) if self.words else top_k
        scores, rows = self.index.search(vectors, depth)
        if self.words:
            ranked = fuse([rows, self.words.search(queries, depth)[1]], top_k)
        else:
            ranked = [list(zip(*pair)) for pair in zip(rows.tolist(), scores.tolist())]
        found = sorted({row for query in ranked for row, _ in query if row >= 0})
        ids = dict(zip(found, self.folder.ids(found)))
        texts = dict(zip(found, self.folder.texts(found))) if self.folder.has_texts else {}
        return [[Hit(row, score, texts.get(row), ids[row]) for row, score in query if row >= 0] for query in ranked]


def _find_model(folder: VectorFolder, model: str | Path | None, trust_remote_code: bool) -> Path:
    """Return the folder of the model that made the vectors: ``model``, or the one of the manifest."""
    manifest = folder.manifest
    try:
        path = find_model(model or manifest.model, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        if model:
            raise
        raise FileNotFoundError(f"{error} It made the vectors in {folder.folder}: say where it is with --model.") from error
    if fingerprint(path) != manifest.fingerprint:
        raise ValueError(
            f"The vectors in {folder.folder} were made by {manifest.model}, and {path} is another model or "
            "has changed since: encode again, or name the model as it was with --model."
        )
    return path


def fuse(rankings: Sequence[np.ndarray], top_k: int) -> list[list[tuple[int, float]]]:
    """Fuse rankings by the sum of ``1 / (60 + rank)`` over those that hold a row.

    ``rankings`` are (n, k) row numbers each, best first; -1 stands for no row.

    Returns:
        the best ``top_k`` rows and their scores for each of the n queries.

    >>> fuse([np.array([[7, 8, 9]]), np.array([[8, 5, -1]])], top_k=2)
    [[(8, 0.03252247488101534), (7, 0.01639344262295082)]]
    """
    fused = []
    for query in zip(*(ranking.tolist() for ranking in rankings), strict=True):
        total: Counter[int] = Counter()
        for rank, row in chain.from_iterable(enumerate(rows, start=1) for rows in query):
            if row >= 0:
                total[row] += 1 / (_FUSION + rank)  # type: ignore[assignment]  # counters add floats as well
        fused.append([(row, float(score)) for row, score in total.most_common(top_k)])
    return fused


def _open_words(folder: VectorFolder, shards: Sequence[str], show_progress: bool) -> "WordIndex":
    """Open BM25 over the folder's texts, or build it if it is not that of ``shards`` (their SHA-256).

    The weight of a word depends on all texts, so new shards need a new index.
    """
    from minibert.inference.bm25 import WordIndex

    home = index_folder(folder) / f"words-{sha256(' '.join(shards).encode()).hexdigest()[:16]}"
    with contextlib.suppress(ValueError):  # reported below, under the lock: another process may be building
        return WordIndex.load(home)
    with index_lock(folder):
        try:
            return WordIndex.load(home)
        except ValueError as error:
            if home.exists():
                logger.warning("%s The word index is built again.", error)
        for earlier in home.parent.glob("words-*"):
            shutil.rmtree(earlier)
        rows = (range(shard.first_row, shard.first_row + shard.rows) for shard in folder.shards)
        built = WordIndex.build(chain.from_iterable(map(folder.texts, rows)), show_progress=show_progress)
        with readable_os_errors(home, KEPT), TemporaryDirectory(prefix="words-", dir=home.parent) as temporary:
            built.save(Path(temporary) / "index")
            (Path(temporary) / "index").replace(home)
        logger.info("BM25 index of %s texts.", f"{len(folder):,}")
        return WordIndex.load(home)
