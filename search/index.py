"""Find the nearest vectors with an index, which the first search of a folder builds.

With up to ``EXACT_ROWS`` vectors, each query is compared with all vectors. With more vectors, a
FAISS index of the type IVF-PQ selects candidates, and each query is compared with the
candidates. Later searches add new shards to the index.

The subfolder ``index`` contains the FAISS index in ``lists.faiss``, a copy of all vectors in
``vectors.bin``, and a description in ``index.json``.
"""

import contextlib
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter
from sklearn.preprocessing import normalize
from tqdm.auto import tqdm

from minibert.files.disk import (
    atomic_write,
    check_regular,
    exclusive_lock,
    readable_os_errors,
    refuse_link,
    sha256,
    sync,
    write_json,
)
from minibert.search.vectors import Shard, VectorFolder, to_float

logger = logging.getLogger(__name__)

KEPT = "the vectors are complete"
# An exact search takes milliseconds. Building lists takes as long as thousands of searches.
EXACT_ROWS = 50_000
# Recall is measured with the nearest 10 neighbours of stored vectors. The target exceeds the
# promised 0.99, because real queries differ from stored vectors.
NEIGHBOURS = 10
_SAMPLE = 1000
_TARGET = 0.992
# Codes alone never decide, because queries are often further from neighbours than passages.
_CANDIDATES = (4, 8, 16, 32)
_MAX_LISTS = 16_384
_TRAINING_VECTORS_PER_LIST = 40  # FAISS asks for 39
# Lists are trained again when the number of vectors has grown by this factor.
_GROWTH = 4
_BLOCK = 16_384
_QUERIES = 1024
_STATE, _VECTORS, _LISTS = "index.json", "vectors.bin", "lists.faiss"


@dataclass(frozen=True)
class IndexedShard:
    """Describe a shard when it was indexed. ``modified`` is a time stamp in nanoseconds."""

    file: str
    rows: int
    bytes: int
    modified: int
    sha256: str


@dataclass(frozen=True)
class Lists:
    """Describe the FAISS index of the first ``rows`` vectors, and the settings of a search."""

    sha256: str  # of the index file
    rows: int
    trained_rows: int  # the number of vectors in the folder when the centroids were trained
    lists: int  # the number of lists into which FAISS divides the vectors
    probes: int  # the number of lists that a search reads
    candidates: int  # the number of vectors to compare with the query for each result
    recall: float  # the fraction of the 10 nearest vectors that a search finds


@dataclass(frozen=True)
class State:
    """Describe an index, as stored in ``index.json``. If ``lists`` is None, search is exact."""

    shards: list[IndexedShard] = field(default_factory=list)
    lists: Lists | None = None
    format: Literal[1] = 1


_READER = TypeAdapter(State)


class VectorIndex:
    """Find the vectors of a folder that have the highest cosine with a query.

    The vectors stay on disk. Memory contains at most a compressed copy of a quarter of a byte
    per dimension.

    Args:
        state: the description of the index in ``index.json``.
        exact: compare each query with all vectors.
    """

    def __init__(self, folder: VectorFolder, state: State, *, exact: bool = False) -> None:
        self.folder, self.state = folder, state
        home, manifest = index_folder(folder), folder.manifest
        shape = (len(self), manifest.width)
        self._stored = np.asarray(np.memmap(home / _VECTORS, manifest.dtype, "r", shape=shape))
        self._faiss: Any = None
        if state.lists is not None and not exact:
            import faiss

            if sha256(home / _LISTS) != state.lists.sha256:
                raise ValueError(f"{home / _LISTS} is damaged.")
            self._faiss = faiss.read_index(str(home / _LISTS))

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.state.shards)

    def describe(self) -> str:
        """Return a line of text about the kind of search and the recall."""
        lists = self.state.lists
        if self._faiss is None or lists is None:
            return f"Exact search: each query is compared with all {len(self):,} vectors (recall@{NEIGHBOURS} 1)."
        return (
            f"IVF-PQ index of {len(self):,} vectors: {lists.probes} of {lists.lists:,} lists are searched "
            f"and {lists.candidates} candidates per hit compared in full; recall@{NEIGHBOURS} "
            f"{lists.recall:.4f} against exact search, on {_SAMPLE:,} stored vectors."
        )

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and row numbers of the ``top_k`` nearest vectors, best first.

        Both arrays have the shape (n, min(top_k, number of vectors)). A row number of -1 means
        that no further vector was found.

        Args:
            queries: (n, dimension) float32, not necessarily normalized.
            top_k: the number of rows to return for each query.
        """
        queries = normalize(np.ascontiguousarray(queries, dtype=np.float32))
        top_k, lists = min(top_k, len(self)), None if self._faiss is None else self.state.lists
        blocks = (queries[start : start + _QUERIES] for start in range(0, len(queries), _QUERIES))
        found = [self._by_lists(some, top_k, lists) if lists else self._exact(some, top_k) for some in blocks]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the float32 vectors (n, dimension) of ``rows``. Their length is about 1."""
        return self._floats(self._stored[rows])

    def blocks(self, first_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a row number, and float32 vectors (n, dimension) from this row on."""
        for start in range(first_row, len(self), _BLOCK):
            yield start, self._floats(self._stored[start : start + _BLOCK])

    def _floats(self, stored: np.ndarray) -> np.ndarray:
        vectors = to_float(stored, self.folder.manifest)
        return vectors if self.folder.manifest.normalized else normalize(vectors)

    def _exact(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start, block in self.blocks():
            found, places = torch.from_numpy(queries @ block.T).topk(min(top_k, len(block)))
            scores, rows = _best([scores, found.numpy()], [rows, places.numpy() + start], top_k)
        return scores, rows

    def _by_lists(self, queries: np.ndarray, top_k: int, settings: Lists) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        faiss.extract_index_ivf(self._faiss).nprobe = settings.probes
        _, rows = self._faiss.search(queries, min(settings.candidates * max(top_k, NEIGHBOURS), len(self)))
        scores = np.empty(rows.shape, dtype=np.float32)
        if self._stored.dtype == np.float32 and self.folder.manifest.normalized:
            # FAISS reads the vectors directly from the mapped file, in all threads.
            arrays = [faiss.swig_ptr(array) for array in (scores, queries, self._stored, rows)]
            faiss.fvec_inner_products_by_idx(*arrays, queries.shape[1], *rows.shape)  # type: ignore[attr-defined]
        else:
            for number, query in enumerate(queries):
                scores[number] = self.vectors(rows[number]) @ query
        scores[rows < 0] = -np.inf
        return _best([scores], [rows], top_k)


def index_folder(folder: VectorFolder) -> Path:
    """Return the folder that contains the index of a folder of vectors. It has no links."""
    home = folder.folder / "index"
    for path in (home, *home.glob("*")):
        refuse_link(path)
    return home


def open_index(
    folder: VectorFolder,
    *,
    exact: bool = False,
    rebuild: bool = False,
    show_progress: bool = False,
) -> VectorIndex:
    """Open the index of ``folder``. Build the index or add new shards if necessary.

    The index is built again if an indexed shard was changed or removed, or if a file of the
    index is damaged or missing.

    If ``exact`` is True, a search compares all vectors. If ``rebuild`` is True, the index is
    built again in any case.
    """
    rows = len(folder)
    if not rows:
        raise ValueError(f"{folder.folder} holds no vectors; encode an input with texts, or wait for a shard.")
    with_lists = rows > EXACT_ROWS and not exact
    if with_lists:
        import faiss  # noqa: F401  # fails before the vectors are copied

    def is_current(index: VectorIndex) -> bool:
        lists = index.state.lists
        listed = not with_lists or (lists is not None and lists.rows == rows)
        return listed and len(index.state.shards) == len(folder.shards)

    with contextlib.suppress(ValueError):  # reported below, under the lock: another process may be building
        if not rebuild and (index := _open_existing(folder, exact)) and is_current(index):
            return index
    with index_lock(folder):
        index = None
        try:
            index = None if rebuild else _open_existing(folder, exact)
        except ValueError as error:
            logger.warning("%s The index is built again.", error)
        if index is None or not is_current(index):
            index = _build(folder, index, with_lists, show_progress)
    logger.info(index.describe())
    return index


@contextlib.contextmanager
def index_lock(folder: VectorFolder) -> Iterator[None]:
    """Wait until no other process builds the index of ``folder``, and lock the index."""
    home = index_folder(folder)
    with readable_os_errors(home, KEPT):
        home.mkdir(exist_ok=True)
    with exclusive_lock(home, "building", kept=KEPT, wait=True):
        yield


def _open_existing(folder: VectorFolder, exact: bool) -> VectorIndex | None:
    """Return the index on disk, or None. Raise a ValueError if the index cannot be used."""
    home = index_folder(folder)
    if not any((home / name).exists() for name in (_STATE, _VECTORS)):
        return None
    try:
        for file in home.iterdir():
            check_regular(file)
        state = _READER.validate_json((home / _STATE).read_bytes())
        index = VectorIndex(folder, state, exact=exact)
    except (OSError, ValueError) as error:
        raise ValueError(f"The index in {home} was not finished, or is damaged.") from error
    if len(state.shards) > len(folder.shards) or not all(
        _is_unchanged(folder, *pair) for pair in zip(state.shards, folder.shards)
    ):
        raise ValueError(f"The vectors in {folder.folder} have changed since they were indexed.")
    return index


def _is_unchanged(folder: VectorFolder, indexed: IndexedShard, shard: Shard) -> bool:
    found = (folder.folder / shard.file).stat()
    if (shard.file, shard.rows, found.st_size) != (indexed.file, indexed.rows, indexed.bytes):
        return False
    # A copied folder has new time stamps. The content is read only in this case.
    return found.st_mtime_ns == indexed.modified or sha256(folder.folder / shard.file) == indexed.sha256


def _build(
    folder: VectorFolder,
    before: VectorIndex | None,
    with_lists: bool,
    show_progress: bool,
) -> VectorIndex:
    """Add new vectors to the index ``before``. If ``before`` is None, build an index."""
    home = index_folder(folder)
    if before is None:
        for name in (_STATE, _VECTORS, _LISTS):  # a searching process keeps its open files
            (home / name).unlink(missing_ok=True)
    state = _add_vectors(folder, before.state if before else State(), show_progress)
    index = VectorIndex(folder, state, exact=True)
    if with_lists:
        _add_to_lists(index, before, show_progress)
    with readable_os_errors(home / _STATE, KEPT):
        write_json(home / _STATE, asdict(index.state))
    return index


def _add_vectors(folder: VectorFolder, state: State, show_progress: bool) -> State:
    """Append the vectors of new shards to the vectors of the index. Return the new state."""
    file, shards, manifest = index_folder(folder) / _VECTORS, list(state.shards), folder.manifest
    rows = sum(shard.rows for shard in shards)
    with readable_os_errors(file, KEPT), file.open("ab") as target:
        target.truncate(rows * manifest.width * manifest.dtype.itemsize)  # a killed process may have written more
    for shard in tqdm(folder.shards[len(shards) :], "mapping shards", disable=not show_progress, unit="shard"):
        source = folder.folder / shard.file
        seen, vectors = source.stat(), folder.read(shard)
        if vectors.dtype.kind == "f" and not (finite := np.isfinite(vectors).all(axis=1)).all():
            row = int(np.argmin(finite))
            raise ValueError(f"{source} holds a vector that is not finite (row {row}); encode again.")
        with readable_os_errors(file, KEPT), file.open("ab") as target:
            target.write(np.ascontiguousarray(vectors).data)
        shards.append(IndexedShard(shard.file, shard.rows, seen.st_size, seen.st_mtime_ns, sha256(source)))
    with readable_os_errors(file, KEPT):
        sync(file)
    return replace(state, shards=shards)


def _add_to_lists(index: VectorIndex, before: VectorIndex | None, show_progress: bool) -> None:
    """Extend the FAISS lists of ``before``, or train new lists if it is None or too small."""
    import faiss

    home, rows, lists = index_folder(index.folder), len(index), index.state.lists
    if before is None or lists is None or rows > _GROWTH * lists.trained_rows:
        if lists:
            logger.info("The folder has grown to %s vectors; the lists are trained again.", f"{rows:,}")
        index._faiss, first, trained = _train(index), 0, rows
    else:
        index._faiss, first, trained = before._faiss, lists.rows, lists.trained_rows
    with tqdm(desc="indexing vectors", total=rows, initial=first, disable=not show_progress, unit="vector") as bar:
        for _, block in index.blocks(first):
            index._faiss.add(block)
            bar.update(len(block))
    number = faiss.extract_index_ivf(index._faiss).nlist
    lists = choose_settings(index, Lists("", rows, trained, number, 0, 0, 0.0))
    with readable_os_errors(home / _LISTS, KEPT), atomic_write(home / _LISTS) as part:
        try:
            faiss.write_index(index._faiss, str(part))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[-1]) from error
    index.state = replace(index.state, lists=replace(lists, sha256=sha256(home / _LISTS)))


def _train(index: VectorIndex) -> Any:
    """Return an IVF-PQ index without vectors, trained on a random sample of the vectors."""
    import faiss

    width = index.folder.manifest.dimension
    # The power of 2 closest to four times the square root of the number of vectors.
    lists = min(1 << round(math.log2(4 * math.sqrt(len(index)))), _MAX_LISTS)
    # Codes of 4 bits for 2 dimensions, compared in registers ("fast scan"). At equal recall,
    # they are several times as fast as 8-bit codes or graphs (HNSW), and much faster to build.
    # An odd width is padded with a column of zeros.
    kind = f"Pad{width + width % 2},IVF{lists},PQ{(width + 1) // 2}x4fs"
    empty = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    wanted = min(len(index), lists * _TRAINING_VECTORS_PER_LIST)
    rows = np.random.default_rng(0).choice(len(index), wanted, replace=False)
    empty.train(index.vectors(np.sort(rows)))
    return empty


class Sample:
    """Measure the recall of a search, with random vectors of the index as queries.

    For binary vectors, a query is a random vector that has the signs of a stored vector.
    """

    def __init__(self, index: VectorIndex) -> None:
        count = min(_SAMPLE, len(index))
        self.index = index
        self.rows = np.sort(np.random.default_rng(1).choice(len(index), count, replace=False))
        vectors = index.vectors(self.rows)
        if index.folder.manifest.precision == "binary":
            noise = np.random.default_rng(2).standard_normal(vectors.shape, dtype=np.float32)
            vectors = vectors * np.abs(noise)
        self.queries = normalize(vectors)
        self.scores = self._neighbours(*index._exact(self.queries, NEIGHBOURS + 1))

    def _neighbours(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the best 10 scores of each query, without the score of the query with itself."""
        scores = np.where(rows == self.rows[:, None], -np.inf, scores)
        return np.asarray(-np.sort(-scores, axis=1)[:, :NEIGHBOURS])

    def recall(self, settings: Lists) -> float:
        """Return the fraction of the nearest vectors that a search with ``settings`` finds."""
        found = self._neighbours(*self.index._by_lists(self.queries, NEIGHBOURS + 1, settings))
        return float((found >= self.scores[:, -1:] - 1e-5).mean())


def choose_settings(index: VectorIndex, lists: Lists) -> Lists:
    """Return ``lists`` with small ``probes`` and ``candidates`` that reach the target recall."""
    sample = Sample(index)

    @cache
    def recall(probes: int, candidates: int = _CANDIDATES[-1]) -> float:
        return sample.recall(replace(lists, probes=probes, candidates=candidates))

    steps = np.unique(np.geomspace(1, lists.lists, 64).round().astype(int)).tolist()
    probes = steps[bisect_left(steps[:-1], _TARGET, key=recall)]
    least = min(_TARGET, recall(probes))
    candidates = next(number for number in _CANDIDATES if recall(probes, number) >= least)
    return replace(lists, probes=probes, candidates=candidates, recall=recall(probes, candidates))


def _best(scores: list[np.ndarray], rows: list[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge rankings (n, k) and keep the ``top_k`` best. Equal scores keep their order."""
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
