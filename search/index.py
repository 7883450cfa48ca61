"""A FAISS index beside a folder of vectors, built when the folder is first searched and brought up to date when it has grown.

Up to ``EXACT_ROWS`` vectors a query is compared with all of them. Above, FAISS groups them into lists around centroids (IVF)
and compares a query with short codes (4-bit product quantization) of those in the nearest lists; the best of them are then
compared as they are stored. The vectors themselves are memory-mapped in both cases. FAISS is imported only for lists: comparing
with all vectors does without.

``index/`` in the folder holds a memory-mapped copy of every shard's vectors (Parquet cannot be mapped), the FAISS index with
the sample its recall is measured on, and ``index.json``, which names them all and is written last: what it does not name
does not count.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from tqdm.auto import tqdm

from minibert.files import disk
from minibert.search.vectors import Shard, VectorFolder, check_types, damage_named, to_float, whole_file

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT = "the vectors are whole"
# A query takes some milliseconds against so many vectors of 384; building lists takes as long as thousands of such queries.
EXACT_ROWS = 50_000
# Neighbours whose recall is measured, on so many stored vectors, and the recall that the settings are chosen for. A little
# above 0.99, for the sample is a sample.
NEIGHBOURS = 10
_SAMPLE = 1000
_TARGET = 0.992
# Queries are often further from their neighbours than passages from theirs, so codes alone never decide.
_LEAST_CANDIDATES, _MOST_CANDIDATES = 4, 32
_MAX_LISTS = 16_384
_TRAINING_VECTORS_PER_LIST = 40  # FAISS asks for 39
# Lists made for so many vectors serve this many times as many; then they are made anew.
_GROWTH = 4
_BLOCK = 16_384
_QUERIES = 1024


@dataclass(frozen=True)
class Part:
    """A shard as it was when it was indexed, and the mapped copy of its vectors."""

    shard: str
    first_row: int
    rows: int
    bytes: int
    modified: int
    sha256: str
    file: str
    file_bytes: int


@dataclass(frozen=True)
class Lists:
    """How vectors are searched by lists: ``probes`` of ``lists`` are looked through, and ``candidates`` (times the hits wanted)
    of what they hold are compared in full. ``recall`` is that of the best 10, on stored vectors, against exact search."""

    file: str
    file_bytes: int
    sample: str
    sample_bytes: int
    trained_rows: int
    lists: int
    probes: int
    candidates: int
    recall: float
    file_sha256: str | None = None  # None in indexes of earlier versions, which are trusted
    sample_sha256: str | None = None


class Sample(NamedTuple):
    """Stored vectors by row (n,), and their true neighbours, themselves among them: cosines and rows, both (n, 11)."""

    rows: np.ndarray
    scores: np.ndarray
    neighbours: np.ndarray


@dataclass(frozen=True)
class State:
    """What ``index.json`` says. Without ``lists``, search is exact."""

    fingerprint: str
    precision: str
    dimension: int
    rows: int = 0
    parts: list[Part] = field(default_factory=list)
    lists: Lists | None = None
    format: int = FORMAT

    def describe(self) -> str:
        """The kind of index and its recall, in a line."""
        if self.lists is None:
            return f"Exact search: each query is compared with all {self.rows:,} vectors (recall@{NEIGHBOURS} 1)."
        return (
            f"IVF-PQ index of {self.rows:,} vectors: {self.lists.probes} of {self.lists.lists:,} lists are searched and "
            f"{self.lists.candidates} candidates per hit compared in full; recall@{NEIGHBOURS} "
            f"{self.lists.recall:.4f} against exact search, on {_SAMPLE:,} stored vectors."
        )


class VectorIndex:
    """Nearest vectors of a folder by cosine.

    Memory: the codes of the lists (half a byte for two dimensions, beside the row's number; none below ``EXACT_ROWS``) and
    the block that is being compared. The vectors stay on disk, where the operating system keeps in memory what is used.

    Args:
        folder: the vectors.
        state: of the index on disk, as :func:`open_index` finds or makes it.
        exact: leave its lists unread; every search then compares with all vectors.

    Raises:
        ValueError: for files that cannot be read.
    """

    def __init__(self, folder: VectorFolder, state: State, *, exact: bool = False) -> None:
        self.folder, self.state = folder, state
        home = index_folder(folder)
        self._parts = [_mapped(home / part.file, part, folder) for part in state.parts]
        self._starts = np.array([part.first_row for part in state.parts], dtype=np.int64)
        self._ivf: Any = None
        if state.lists is not None and not exact:
            import faiss

            try:
                self._ivf = faiss.read_index(str(home / state.lists.file))
            except RuntimeError as error:
                raise ValueError(f"{home / state.lists.file} is damaged: {str(error).splitlines()[0]}") from error

    def __len__(self) -> int:
        return self.state.rows

    def search(self, queries: np.ndarray, top_k: int, *, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ``top_k`` rows nearest to each query, best first: cosines and row numbers, both (n, min(top_k, rows)).

        Where the lists searched hold fewer, row numbers end with -1.

        Args:
            queries: (n, dimension) float32, of any length.
            exact: compare with all vectors, whatever their number.
        """
        queries = _normalized(np.ascontiguousarray(queries, dtype=np.float32))
        top_k = min(top_k, len(self))
        found = [
            self._by_lists(some, top_k, lists) if lists else self._exact(some, top_k)
            for lists in [None if exact or self._ivf is None else self.state.lists]
            for some in (queries[start : start + _QUERIES] for start in range(0, len(queries), _QUERIES))
        ]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """(n, dimension) float32: the vectors of these rows, of length 1 unless quantized."""
        stored = np.empty((len(rows), self.folder.manifest.width), dtype=self._parts[0].dtype)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(part_of):
            here = part_of == number
            stored[here] = self._parts[number][rows[here] - self._starts[number]]
        return self._floats(stored)

    def blocks(self, first_row: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Vectors from a row on (the first of a shard): number of the first row, and (n, dimension) float32."""
        for start, part in zip(self._starts.tolist(), self._parts, strict=True):
            for offset in range(0, len(part) if start >= first_row else 0, _BLOCK):
                yield start + offset, self._floats(part[offset : offset + _BLOCK])

    def _floats(self, stored: np.ndarray) -> np.ndarray:
        manifest = self.folder.manifest
        vectors = stored if stored.dtype == np.float32 else to_float(stored, manifest)
        return vectors if manifest.normalized else _normalized(vectors)

    def _exact(self, queries: np.ndarray, top_k: int, *, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for start, block in self.blocks(first_row):
            found, places = torch.from_numpy(queries @ block.T).topk(min(top_k, len(block)))
            scores, rows = _best([scores, found.numpy()], [rows, places.numpy() + start], top_k)
        return scores, rows

    def _by_lists(self, queries: np.ndarray, top_k: int, settings: Lists) -> tuple[np.ndarray, np.ndarray]:
        self._ivf.nprobe = settings.probes
        wanted = min(settings.candidates * max(top_k, NEIGHBOURS), len(self))
        _, rows = self._ivf.search(_even(queries), wanted)
        return _best([self._compare(queries, rows)], [rows], top_k)

    def _compare(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, m) cosines of each query and its m rows; minus infinity where the row is -1."""
        if self._parts[0].dtype == np.float32 and self.folder.manifest.normalized:
            import faiss

            # FAISS multiplies straight from the mapped files, on all threads; rows of other shards are given as -1.
            scores = np.full(rows.shape, -np.inf, dtype=np.float32)
            for start, part in zip(self._starts.tolist(), self._parts, strict=True):
                here = (rows >= start) & (rows < start + len(part))
                ids, products = np.where(here, rows - start, -1), np.empty(rows.shape, dtype=np.float32)
                faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]  # missing in FAISS' own type stubs
                    *(faiss.swig_ptr(array) for array in (products, queries, part, ids)), part.shape[1], *rows.shape
                )
                scores = np.where(here, products, scores)
            return scores
        flat, places = np.unique(rows.clip(0), return_inverse=True)
        vectors = self.vectors(flat)[places.reshape(rows.shape)]  # (n, m, dimension)
        scores = np.matmul(vectors, queries[:, :, None])[:, :, 0]
        found: np.ndarray = np.where(rows < 0, np.float32(-np.inf), scores)
        return found


def index_folder(folder: VectorFolder) -> Path:
    """Where the index of a folder of vectors lies."""
    return folder.folder / "index"


def open_index(folder: VectorFolder, *, exact: bool = False, rebuild: bool = False, show_progress: bool = False) -> VectorIndex:
    """The index of ``folder``: the one on disk where it is current, else extended by the shards it lacks, or built.

    It is built from nothing where there is none, where a shard that it holds has changed or is gone, where one of its files
    is damaged or missing, and where the folder has outgrown it.

    Args:
        exact: make and read no lists, whatever the number of vectors; those there are stay for later searches.
        rebuild: build it from nothing in any case.
        show_progress: show a bar while it is built.

    Raises:
        FileNotFoundError: for a shard that is missing.
        ModuleNotFoundError: for more than ``EXACT_ROWS`` vectors, unless ``exact``, where FAISS is not installed.
        ValueError: for a folder without vectors, or a shard that is damaged or not what the manifest says.
        OSError: for an index that cannot be written.
    """
    manifest, home = folder.manifest, index_folder(folder)
    if not len(folder):
        raise ValueError(
            f"{folder.folder} holds no vectors yet; let minibert encode write some."
            if not manifest.complete
            else f"{folder.folder} holds no vectors, so there is nothing to search; was what it encodes empty?"
        )
    if manifest.precision == "int8" and not manifest.ranges:
        raise ValueError(f"The manifest of {folder.folder} lacks the ranges of int8 vectors; encode again.")
    with_lists = manifest.rows > EXACT_ROWS and not exact
    if with_lists:
        import faiss  # noqa: F401  # a missing FAISS is better known before the vectors are mapped

    def current(index: VectorIndex) -> bool:
        return len(index.state.parts) == len(folder.shards) and (index.state.lists is not None or not with_lists)

    earlier, _ = (None, None) if rebuild else _open_earlier(folder, exact)
    if earlier and current(earlier):
        return earlier
    with alone_with_index(folder):
        earlier, problem = (None, None) if rebuild else _open_earlier(folder, exact)
        if problem:
            logger.warning("%s The index is built anew.", problem)
        if not earlier or not current(earlier):
            _clear(home, earlier.state if earlier else None)
            earlier = _build(folder, earlier, with_lists, show_progress)
            _clear(home, earlier.state)
    logger.info((replace(earlier.state, lists=None) if exact else earlier.state).describe())
    return earlier


@contextlib.contextmanager
def alone_with_index(folder: VectorFolder) -> Iterator[None]:
    """Keep other processes from building what belongs to the index of ``folder``: of two that find it out of date, one does.

    Raises:
        OSError: where nothing can be written.
    """
    home, lock = index_folder(folder), contextlib.ExitStack()
    try:
        with disk.readable_os_errors(home, KEPT):
            home.mkdir(exist_ok=True)
        lock.enter_context(disk.exclusive_lock(home, "building", kept=KEPT, wait=True))
    except OSError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            f"{home} holds no current index and cannot be written; make it writable, or search a copy of {folder.folder}."
        ) from error
    with lock:
        yield


def _read_state(home: Path) -> State | None:
    try:
        content = json.loads((home / "index.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return None
        lists = content.pop("lists")
        parts = [Part(**part) for part in content.pop("parts")]
        state = State(**content, parts=parts, lists=Lists(**lists) if lists else None)
        for part in (state, *parts, *([state.lists] if state.lists else [])):
            check_types(part)
        return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # missing or damaged: as if it were not there


def _open_earlier(folder: VectorFolder, exact: bool) -> tuple[VectorIndex | None, str | None]:
    """The index on disk, if all that ``index.json`` names is there and the shards it has seen are still those of the folder;
    else what is wrong with it, if there is one at all."""
    home, manifest = index_folder(folder), folder.manifest
    state = _read_state(home)
    if state is None:
        begun = home.exists() and any(home.glob("*.arrow*"))
        return None, f"The index in {home} was not finished, or is damaged." if begun else None
    # Of the mapped vectors only the size is looked at: reading them all would take longer than the search.
    named: list[tuple[str, int, str | None]] = [(part.file, part.file_bytes, None) for part in state.parts]
    if lists := state.lists:
        named += [
            (lists.file, lists.file_bytes, lists.file_sha256),
            (lists.sample, lists.sample_bytes, lists.sample_sha256),
        ]
    for name, size, digest in named:
        file = home / name
        if not file.exists() or file.stat().st_size != size or (digest is not None and _sha256(file) != digest):
            return None, f"{file} is missing or damaged."
    pairs = zip(state.parts, folder.shards, strict=False)
    if (
        (state.fingerprint, state.precision, state.dimension) != (manifest.fingerprint, manifest.precision, manifest.dimension)
        or len(state.parts) > len(folder.shards)
        or not all(_unchanged(folder, *pair) for pair in pairs)
    ):
        return None, f"The vectors in {folder.folder} have changed since they were indexed."
    try:
        return VectorIndex(folder, state, exact=exact), None
    except ValueError as error:
        return None, str(error)


def _unchanged(folder: VectorFolder, part: Part, shard: Shard) -> bool:
    found = (folder.folder / shard.file).stat()
    if (shard.file, shard.first_row, shard.rows, found.st_size) != (part.shard, part.first_row, part.rows, part.bytes):
        return False
    # A copied folder has new times; only then is the content read.
    return found.st_mtime_ns == part.modified or _sha256(folder.folder / shard.file) == part.sha256


def _clear(home: Path, state: State | None) -> None:
    """Delete what ``state`` does not name: files of earlier indexes, and what a killed process left."""
    named = {"index.json", ".lock"}
    if state is not None:
        named |= {part.file for part in state.parts}
        named |= {state.lists.file, state.lists.sample} if state.lists else set()
    for file in home.iterdir():
        if file.is_file() and file.name not in named:
            file.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- building


def _build(folder: VectorFolder, before: VectorIndex | None, with_lists: bool, show_progress: bool) -> VectorIndex:
    """Add the shards that the index ``before`` lacks (all, if there is none), and write what comes of it."""
    manifest, home = folder.manifest, index_folder(folder)
    state = before.state if before else State(manifest.fingerprint, manifest.precision, manifest.dimension)
    new = folder.shards[len(state.parts) :]
    shards = tqdm(new, "mapping shards", disable=not show_progress, unit="shard")
    parts = [*state.parts, *(_map_shard(folder, shard) for shard in shards)]
    # Until its lists are there, an index answers exactly, which is what their recall is measured against.
    index = VectorIndex(folder, replace(state, rows=manifest.rows, parts=parts, lists=None))
    if with_lists:
        if before and state.lists and manifest.rows > _GROWTH * state.lists.trained_rows:
            logger.info("The folder has grown to %s vectors; the lists are made anew.", f"{manifest.rows:,}")
            before = None
        index.state = replace(index.state, lists=_make_lists(index, before, show_progress))
    elif state.lists:  # they lack the new vectors, so the index on disk stays without those, for a later search to add
        index.state = replace(index.state, lists=state.lists)
        return index
    with whole_file(home / "index.json", KEPT) as temporary:
        temporary.write_text(json.dumps(asdict(index.state), indent=1) + "\n", encoding="utf-8")
    return index


def _map_shard(folder: VectorFolder, shard: Shard) -> Part:
    """Copy the vectors of a shard to where they can be memory-mapped."""
    source, width = folder.folder / shard.file, folder.manifest.width
    target = index_folder(folder) / f"{Path(shard.file).stem}.arrow"
    seen = source.stat()
    kind = _vector_type(source)
    if kind is None or kind.list_size != width:
        raise ValueError(
            f"{source} holds {'no vectors' if kind is None else f'vectors of {kind.list_size} numbers'}, its manifest says "
            f"{width}; encode again."
        )
    vectors = folder.read(shard)
    if vectors.dtype.kind == "f" and not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise ValueError(f"{source} holds a vector that is no number (row {int(np.argmin(finite))} of it); encode again.")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    table = pa.table({"vector": column})
    with whole_file(target, KEPT) as temporary, pa.ipc.new_file(str(temporary), table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))
    return Part(
        shard.file,
        shard.first_row,
        shard.rows,
        seen.st_size,
        seen.st_mtime_ns,
        _sha256(source),
        target.name,
        target.stat().st_size,
    )


def _vector_type(file: Path) -> pa.FixedSizeListType | None:
    try:
        with damage_named(file):
            kind = parquet.read_schema(file).field("vector").type
    except KeyError:
        return None
    return kind if isinstance(kind, pa.FixedSizeListType) else None


def _mapped(file: Path, part: Part, folder: VectorFolder) -> np.ndarray:
    """(rows, width): the vectors of a shard, memory-mapped."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        column = table.column("vector").combine_chunks()  # one chunk, so nothing is copied; none, if all its rows were skipped
        vectors: np.ndarray = column.flatten().to_numpy(zero_copy_only=True)
        return vectors.reshape(part.rows, folder.manifest.width)
    except (pa.ArrowInvalid, KeyError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error}).") from error


def _make_lists(index: VectorIndex, before: VectorIndex | None, show_progress: bool) -> Lists:
    """Train lists on a sample, or take those of the index ``before``; add the vectors it lacks; choose how many lists to
    search and how much of them to compare in full; write lists and sample."""
    home, rows = index_folder(index.folder), len(index)
    if before and (earlier := before.state.lists):
        index._ivf, lists, trained_rows, rows_before = before._ivf, earlier.lists, earlier.trained_rows, len(before)
        sample_before = home / earlier.sample
    else:
        index._ivf, lists, trained_rows, rows_before = _train(index), number_of_lists(rows), rows, 0
        sample_before = None
    with tqdm(desc="indexing vectors", total=rows, initial=rows_before, disable=not show_progress, unit="vector") as bar:
        for _, block in index.blocks(rows_before):
            index._ivf.add(_even(block))
            bar.update(len(block))
    sample = _extend_sample(index, sample_before, rows_before)
    made = Lists(f"lists-{rows}.faiss", 0, f"sample-{rows}.npz", 0, trained_rows, lists, 0, 0, 0.0)
    made = choose_settings(index, made, sample)
    with whole_file(home / made.sample, KEPT) as temporary, temporary.open("wb") as file:
        np.savez(file, **sample._asdict())
    import faiss

    with whole_file(home / made.file, KEPT) as temporary:
        try:
            faiss.write_index(index._ivf, str(temporary))
        except RuntimeError as error:
            raise OSError(str(error).splitlines()[-1]) from error
    return replace(
        made,
        file_bytes=(home / made.file).stat().st_size,
        sample_bytes=(home / made.sample).stat().st_size,
        file_sha256=_sha256(home / made.file),
        sample_sha256=_sha256(home / made.sample),
    )


def number_of_lists(rows: int) -> int:
    """Lists that so many vectors are grouped into: the power of 2 next to four times the square root.

    >>> [number_of_lists(rows) for rows in (60_000, 1_000_000, 1_000_000_000)]
    [1024, 4096, 16384]
    """
    return min(1 << round(math.log2(4 * math.sqrt(rows))), _MAX_LISTS)


def _train(index: VectorIndex) -> Any:
    """An IVF-PQ index without vectors, whose lists and codes fit a random sample of them."""
    import faiss

    lists, width = number_of_lists(len(index)), _even(np.empty((0, index.state.dimension), dtype=np.float32)).shape[1]
    rng = np.random.default_rng(0)
    wanted = min(len(index), lists * _TRAINING_VECTORS_PER_LIST)
    sample = _even(index.vectors(np.sort(rng.choice(len(index), wanted, replace=False))))
    # Codes of 4 bits for 2 dimensions each, compared in registers ("fast scan"): at equal recall several times the speed of
    # 8-bit codes or of graphs (HNSW), and a fraction of their time to build.
    ivf = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(width), width, lists, width // 2, 4, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.niter, ivf.cp.min_points_per_centroid = 10, 1  # more rounds change recall in the third digit
    ivf.pq.cp.min_points_per_centroid = 1
    ivf.train(sample)
    return ivf


def _extend_sample(index: VectorIndex, earlier: Path | None, rows_before: int) -> Sample:
    """Random stored vectors and their nearest neighbours by exact search, a vector being the nearest to itself.

    Of an ``earlier`` sample only the rows from ``rows_before`` on are compared anew.
    """
    before = None if earlier is None else _read_sample(earlier)
    if before is None:
        rows = np.sort(np.random.default_rng(1).choice(len(index), min(_SAMPLE, len(index)), replace=False))
        scores, neighbours = index.search(_sample_queries(index, rows), NEIGHBOURS + 1, exact=True)
        return Sample(rows, scores, neighbours)
    after = index._exact(_sample_queries(index, before.rows), NEIGHBOURS + 1, first_row=rows_before)
    return Sample(before.rows, *_best([before.scores, after[0]], [before.neighbours, after[1]], NEIGHBOURS + 1))


def _read_sample(file: Path) -> Sample | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return Sample(**stored)
    except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
        logger.warning("%s is damaged (%s) and is made anew.", file, error)
        return None


def _sample_queries(index: VectorIndex, rows: np.ndarray) -> np.ndarray:
    """(n, dimension): the vectors of a sample as queries, of length 1. Of bits they are random vectors that round to them,
    for queries are not rounded."""
    vectors = index.vectors(rows)
    if index.state.precision == "binary":
        vectors = vectors * np.abs(np.random.default_rng(2).standard_normal(vectors.shape, dtype=np.float32))
    return _normalized(vectors)


def choose_settings(index: VectorIndex, lists: Lists, sample: Sample) -> Lists:
    """``lists`` with about the fewest probes, then the fewest candidates, that find enough of the sample's true neighbours."""

    def tried(probes: int, candidates: int) -> Lists:
        settings = replace(lists, probes=probes, candidates=candidates)
        return replace(settings, recall=sample_recall(index, settings, sample))

    most, few = _MOST_CANDIDATES, 0
    best = tried(1, most)
    while best.recall < _TARGET and best.probes < lists.lists:
        few, best = best.probes, tried(2 * best.probes, most)
    while best.recall >= _TARGET and best.probes - few > max(1, best.probes // 8):
        middle = tried((few + best.probes) // 2, most)
        few, best = (few, middle) if middle.recall >= _TARGET else (middle.probes, best)
    while best.candidates > _LEAST_CANDIDATES:
        fewer = tried(best.probes, best.candidates // 2)
        if fewer.recall < min(_TARGET, best.recall):
            break
        best = fewer
    return best


def sample_recall(index: VectorIndex, settings: Lists, sample: Sample) -> float:
    """Share of the true neighbours that are found with these settings, equally near ones counting the same."""
    queries = _sample_queries(index, sample.rows)
    found, rows = index._by_lists(queries, sample.scores.shape[1], settings)
    # The vector itself is the neighbour that is always found, so it does not count.
    found = -np.sort(-np.where(rows == sample.rows[:, None], -np.inf, found), axis=1)[:, :NEIGHBOURS]
    true = np.where(sample.neighbours == sample.rows[:, None], -np.inf, sample.scores)
    least = -np.sort(-true, axis=1)[:, found.shape[1] - 1 : found.shape[1]]
    return float((found >= least - 1e-5).mean())


def _best(scores: list[np.ndarray], rows: list[np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``top_k`` best of several rankings, (n, k) each, best first; of equal scores that of the earlier one leads."""
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)


def _normalized(vectors: np.ndarray) -> np.ndarray:
    """``vectors`` with length 1; those of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32, copy=False)


def _even(vectors: np.ndarray) -> np.ndarray:
    """``vectors`` with a column of zeros more if their number is odd: codes take the dimensions by pairs."""
    return np.ascontiguousarray(np.pad(vectors, ((0, 0), (0, 1))) if vectors.shape[1] % 2 else vectors)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
