"""Search passages by meaning, either in memory or in a folder of vectors with an index."""

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from minibert.data.load import as_dataset, is_unicode, text_column
from minibert.data.stream import USUAL_COLUMNS
from minibert.files.disk import atomic_write, delete, delete_unused_lock, leftovers, read_settings, readable_os_errors
from minibert.inference.encode import Encoder
from minibert.inference.load import find_model, fingerprint
from minibert.search.index import KEPT, index_folder, index_lock, open_index
from minibert.search.vectors import VectorFolder

if TYPE_CHECKING:
    from minibert.inference.bm25 import WordIndex

logger = logging.getLogger(__name__)

# The number of rows of each ranking to fuse.
_FUSED_DEPTH = 100
# Reciprocal rank fusion adds 1 / (60 + rank), with 60 as in Cormack et al. (2009).
_FUSION = 60


class Hit(NamedTuple):
    """Represent a passage that a search has found."""

    number: int  # of the passage, from 0
    score: float  # the similarity to the query, or the result of fuse() in a hybrid search
    passage: str | None  # None if the folder of vectors has no texts
    id: Any = None  # in the folder; None for a passage in memory


def read_passages(data: str | Path | Dataset, column: str | None = None) -> list[str]:
    """Read the passages in ``data``, without blank passages and duplicates.

    Args:
        data: a file, a folder with a file per split, a Hub data set (owner/name or
            owner/name:config), or a data set in memory. The split ``train`` is read.
        column: the column of passages. The default is the first of ``text``, ``passage``,
            ``answer`` and ``sentence`` that exists, or else the only column of strings.
    """
    data = as_dataset(data, split="train")
    column = text_column(data, column, USUAL_COLUMNS, option="--column")
    passages = list(dict.fromkeys(text for text in data[column] if text and not text.isspace()))
    if not passages:
        raise ValueError(f"Every passage in column {column!r} is blank; give a file that holds texts.")
    return passages


def read_queries(data: str | Path | Dataset) -> list[str]:
    """Read the queries in ``data``, one per row, in the order of the rows.

    The column is the first of ``query``, ``question`` and ``text`` that exists, or else the
    only column of strings. :func:`read_passages` describes ``data``. A blank query raises a
    ValueError.
    """
    data = as_dataset(data, split="train")
    column = text_column(data, None, ["query", "question", "text"], option="query", where="the queries")
    queries = [query or "" for query in data[column]]
    check_queries(queries)
    return queries


def check_queries(queries: Sequence[str]) -> None:
    """Raise a ValueError if a query is blank or not valid Unicode."""
    for number, query in enumerate(queries, start=1):
        if not query.strip():
            raise ValueError(f"Query {number} is empty; write what to look for.")
        if not is_unicode(query):
            shown = shorten(repr(query), 80)
            raise ValueError(f"Query {number} is not UTF-8: {shown}; convert it, as with iconv -f latin1 -t utf8.")


class Searcher:
    """Encode passages and search them by meaning, in memory.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers
            model.
        passages: the texts to search. The constructor encodes all passages.

    Example::

        searcher = Searcher("runs/quickstart/2-embed", ["invert a matrix", "sort a list"])
        (hits,) = searcher.search(["how do I order items"], top_k=1)
        print(hits[0].passage, hits[0].score)

    Raises:
        ValueError: if ``passages`` is empty, or the model cannot be opened.
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
        """Return the ``top_k`` most similar passages for each query, best first.

        Raises:
            ValueError: if a query is blank, or ``top_k`` is less than 1.
        """
        check_queries(queries)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k} (--top-k).")
        return self._find(queries, self.encoder.encode_query(queries), top_k) if queries else []

    def _find(self, queries: Sequence[str], vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        found = semantic_search(torch.from_numpy(vectors), self.vectors, top_k=top_k, score_function=self.encoder.similarity)
        return [[Hit(number := int(hit["corpus_id"]), hit["score"], self.passages[number]) for hit in hits] for hits in found]


class FolderSearcher(Searcher):
    """Search a folder of vectors written by ``minibert encode``.

    The constructor builds the index of the folder, or extends the index by new shards.

    Args:
        model: the path or Hub id of the model that made the vectors, or of a student that was
            distilled into its vector space. The default is the model in the manifest.
        exact: compare each query with all vectors, even if there are many.
        hybrid: search by meaning and by words (BM25), and combine the two rankings with
            :func:`fuse`.
        rebuild: build a new index, even if there is one.

    Example::

        searcher = FolderSearcher("notes-vectors", hybrid=True)
        for hit in searcher.search(["how do I order items"])[0]:
            print(hit.id, hit.score, hit.passage)

    Raises:
        FileNotFoundError: if the folder, the model or a shard does not exist.
        ValueError: if another model made the vectors, a file is damaged, or the folder has no
            vectors. With ``hybrid``, the folder must also have texts.
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
            raise ValueError(f"{folder} has no texts, which --hybrid needs; encode again with --keep-text.")
        if hybrid:
            from minibert.inference import bm25  # noqa: F401  # fails before the index is built
        if not self.folder.manifest.complete:
            count = f"{len(self.folder):,}"
            logger.warning("%s is not finished: minibert encode has written %s vectors so far.", folder, count)
        path = _find_model(self.folder, model, trust_remote_code)
        dimension = self.folder.manifest.dimension
        self.encoder = Encoder(path, truncate_dim=dimension, trust_remote_code=trust_remote_code)
        delete_unused_lock(index_folder(self.folder))
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
    """Return the folder of the model that made the vectors, or of its student. Refuse other models."""
    manifest = folder.manifest
    try:
        path = find_model(model or manifest.model, trust_remote_code=trust_remote_code)
    except FileNotFoundError as error:
        if model:
            raise
        raise FileNotFoundError(f"{error} This model made {folder.folder}; give its path with --model.") from error
    if fingerprint(path) != manifest.fingerprint:
        teachers = read_settings(path / "config_sentence_transformers.json").get("teachers")
        if isinstance(teachers, list) and manifest.fingerprint in teachers:
            logger.info("%s encodes the queries: its teacher made the vectors in %s.", path, folder.folder)
            return path
        raise ValueError(
            f"The vectors in {folder.folder} were made by {manifest.model}, but {path} is another model or "
            "has changed since: encode again, or give the original model with --model."
        )
    return path


def fuse(rankings: Sequence[np.ndarray], top_k: int) -> list[list[tuple[int, float]]]:
    """Combine rankings with reciprocal rank fusion.

    Each ranking contains the row numbers (n, k) found for n queries, best first. A row number
    of -1 is ignored. The score of a row is the sum of ``1 / (60 + rank)`` over all rankings.

    Returns:
        For each of the n queries, the best ``top_k`` rows with their scores.

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
    """Open the BM25 index of the texts in ``folder``. Build the index if shards have changed.

    ``shards`` contains the SHA-256 hashes of the shards.
    """
    from minibert.inference.bm25 import WordIndex

    home = index_folder(folder) / f"words-2-{sha256(' '.join(shards).encode()).hexdigest()[:16]}"
    with contextlib.suppress(ValueError):  # reported below, under the lock: another process may be building
        return WordIndex.load(home)
    with index_lock(folder):
        try:
            return WordIndex.load(home)
        except ValueError as error:
            if home.exists():
                logger.warning("%s The word index is built again.", error)
        for earlier in (*home.parent.glob(f"words-2-{'[0-9a-f]' * 16}"), *leftovers(home.parent, "words-2-.+")):
            delete(earlier, ("*.index.npy", "*.index.json"))
        rows = (range(shard.first_row, shard.first_row + shard.rows) for shard in folder.shards)
        built = WordIndex.build(chain.from_iterable(map(folder.texts, rows)), show_progress=show_progress)
        with readable_os_errors(home, KEPT), atomic_write(home, folder=True) as temporary:
            built.save(temporary)
        logger.info("BM25 index of %s texts.", f"{len(folder):,}")
        return WordIndex.load(home)
