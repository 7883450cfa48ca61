"""Read and write a folder of vectors, which ``minibert encode`` makes: Parquet shards and a manifest.

``manifest.json`` says which model made the vectors, from which input, and what the shards
hold. ``part-00000.parquet``, … have the columns ``id``, ``text`` (if it was kept) and
``vector`` (a fixed-size list). Files appear complete or not at all.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from pydantic import TypeAdapter, ValidationError
from sentence_transformers.util import quantize_embeddings

from minibert.files.disk import atomic_write, readable_os_errors, write_json

MANIFEST = "manifest.json"
PRECISIONS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.int8()}
KEPT = "the shards before it are complete"
# The metadata of a shard from which a manifest can be restored.
_KEY = b"minibert"


@dataclass(frozen=True)
class Shard:
    """``rows`` vectors, numbered from ``first_row``.

    They were made from ``input_rows`` rows of the input, from ``first_input_row`` on;
    ``rows`` is smaller if some were skipped.
    """

    file: str
    first_row: int
    rows: int
    first_input_row: int
    input_rows: int


@dataclass
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        model: as it was named.
        fingerprint: see :func:`minibert.inference.load.fingerprint`.
        dimension: of the vectors; binary ones take an eighth of it in bytes.
        precision: ``float32``, ``float16``, ``int8`` or ``binary``.
        normalized: True if the vectors had length 1 before they were stored.
        source: identifies the encoded input.
        columns: the input's columns taken as ``text`` and as ``id`` (``None``: the number
            of the row), and whether the text is ``kept``.
        encoding: everything else that the vectors depend on, such as the prompt and the
            dtype.
        rows_per_shard: rows of the input per shard.
        rows: vectors in all shards.
        skipped: number of skipped rows of the input.
        skipped_rows: the first of them, each a number and a reason.
        starts: the shard and the row of the input at which each (appending) call began.
        complete: True when the input has been read completely.
        ranges: lowest and highest value of every dimension, by which int8 was scaled.
        shards: in the order of the input.
    """

    model: str
    fingerprint: str
    dimension: int
    precision: str
    normalized: bool
    source: dict[str, Any]
    columns: dict[str, Any]
    encoding: dict[str, Any]
    rows_per_shard: int
    rows: int = 0
    skipped: int = 0
    skipped_rows: list[list[Any]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    complete: bool = False
    ranges: list[list[float]] | None = None
    shards: list[Shard] = field(default_factory=list)
    format: Literal[1] = 1

    @property
    def width(self) -> int:
        """Return how many numbers a stored vector has."""
        return -(-self.dimension // 8) if self.precision == "binary" else self.dimension

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of those numbers."""
        found: np.dtype[Any] = np.dtype(PRECISIONS[self.precision].to_pandas_dtype())
        return found


_READER = TypeAdapter(Manifest)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of ``folder``."""
    file = Path(folder) / MANIFEST
    if not file.exists():
        raise FileNotFoundError(
            f"There is no folder of vectors {folder} (looked from {Path.cwd()}, for its {MANIFEST}); "
            "make one with minibert encode, or let a model search a file with --passages FILE."
        )
    try:
        return _READER.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ValueError(
            f"{file} is damaged or of a later version ({reason}); encode into a new folder, or again with --force."
        ) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of ``folder``."""
    with readable_os_errors(folder / MANIFEST, KEPT):
        write_json(folder / MANIFEST, asdict(manifest))


def quantize(vectors: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Convert (n, dimension) float32 vectors to the manifest's precision: (n, width)."""
    if manifest.precision.startswith("float"):
        return vectors.astype(manifest.precision)
    ranges = None if manifest.ranges is None else np.array(manifest.ranges, dtype=np.float32)
    return np.asarray(quantize_embeddings(vectors, manifest.precision, ranges=ranges))  # type: ignore[arg-type]


def to_float(stored: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Convert (n, width) stored vectors to (n, dimension) float32.

    An int8 becomes the middle of its step, a bit plus or minus ``1 / sqrt(dimension)``.
    """
    if manifest.precision == "binary":
        bits = np.unpackbits((stored.astype(np.int16) + 128).astype(np.uint8), axis=1, count=manifest.dimension)
        signs: np.ndarray = (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(manifest.dimension))
        return signs
    if manifest.precision == "int8":
        low, high = np.array(manifest.ranges, dtype=np.float32)
        middles: np.ndarray = (stored.astype(np.float32) + 128.5) * ((high - low) / 255) + low
        return middles
    return stored.astype(np.float32, copy=False)


class VectorFolder:
    """A folder of vectors, read a block at a time: memory does not grow with their number.

    Example::

        folder = VectorFolder("notes-vectors")
        for first_row, vectors in folder.blocks():
            print(first_row, vectors.shape, folder.texts([first_row]))

    Raises:
        FileNotFoundError: for a folder without manifest, or one that lacks a shard.
        ValueError: for a damaged manifest or shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.shards = self.manifest.shards
        self.has_texts = bool(self.manifest.columns.get("kept"))
        for shard in self.shards:
            if not (self.folder / shard.file).exists():
                raise FileNotFoundError(f"{folder} lacks {shard.file}, which its manifest names; encode again to restore it.")

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, shard: Shard) -> np.ndarray:
        """Return the vectors of a shard as they are stored: (shard.rows, width)."""
        with self._open(shard) as file:
            return self._matrix(file.read(columns=["vector"]).column("vector").combine_chunks())

    def blocks(self, size: int = 16384) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of a row and up to ``size`` stored vectors from it on: (n, width)."""
        for shard in self.shards:
            row = shard.first_row
            with self._open(shard) as file:
                for batch in file.iter_batches(batch_size=size, columns=["vector"]):
                    yield row, self._matrix(batch.column("vector"))
                    row += len(batch)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the ids of these rows: their number in the input, or the value of its id column."""
        return self._take("id", rows)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the texts of these rows; refuse a folder that did not keep them."""
        if not self.has_texts:
            raise ValueError(f"{self.folder} holds no texts; encode with --keep-text to store them with the vectors.")
        return self._take("text", rows)

    def _take(self, column: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return ``column`` of these rows, in their order.

        ``pyarrow.dataset`` would read the column of every row for it; here, only the row
        groups that hold them are read.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.folder} holds rows 0 to {len(self) - 1}; asked for {wanted.min()} to {wanted.max()}.")
        values = np.empty(len(wanted), dtype=object)
        for shard in self.shards:
            first = shard.first_row
            if not ((wanted >= first) & (wanted < first + shard.rows)).any():
                continue
            with self._open(shard) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    here = (wanted >= first) & (wanted < first + size)
                    if here.any():
                        found = file.read_row_group(group, columns=[column]).column(column)
                        values[here] = found.take(pa.array(wanted[here] - first)).to_pylist()
                    first += size
        return list(values.tolist())

    def _matrix(self, column: pa.FixedSizeListArray) -> np.ndarray:
        stored: np.ndarray = column.flatten().to_numpy(zero_copy_only=False)
        return stored.reshape(-1, self.manifest.width)

    @contextlib.contextmanager
    def _open(self, shard: Shard) -> Iterator[parquet.ParquetFile]:
        """Open a shard and check it; the errors of reading it name the file."""
        file, width = self.folder / shard.file, self.manifest.width
        try:
            with parquet.ParquetFile(file) as opened:
                if (rows := opened.metadata.num_rows) != shard.rows:
                    raise ValueError(f"{file} holds {rows} rows, its manifest says {shard.rows}; encode again.")
                if (found := opened.schema_arrow.field("vector").type.list_size) != width:
                    raise ValueError(f"{file} holds vectors of {found} numbers, its manifest says {width}; encode again.")
                yield opened
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # such as a missing permission
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} is damaged ({reason}); delete it and encode again to restore it.") from error


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.parquet"


def shard_files(folder: Path) -> dict[int, Path]:
    """Return the shards of a folder by number, without other files such as copies of shards."""
    found = {file.stem.removeprefix("part-"): file for file in folder.glob("part-*.parquet")}
    return {int(number): file for number, file in found.items() if number.isdecimal()}


def remove_vectors(folder: Path) -> None:
    """Delete shards, complete or not, and the manifest, and nothing else."""
    # The manifest goes last: a folder without it is refused, because its files could be
    # anything.
    shards = [*shard_files(folder).values(), *folder.glob(".part-*.parquet.part")]
    for file in (*shards, folder / MANIFEST):
        file.unlink(missing_ok=True)


class ShardWriter:
    """Write one shard in a ``with`` block; after an exception in the block nothing is left.

    ``notes`` may be set until the end of the block; :func:`shard_notes` reads them.
    """

    def __init__(self, file: Path, manifest: Manifest, id_type: pa.DataType) -> None:
        self.file, self.manifest = file, manifest
        self.notes: dict[str, Any] = {}
        vector = pa.list_(PRECISIONS[manifest.precision], manifest.width)
        text = [("text", pa.string())] if manifest.columns["kept"] else []
        self.schema = pa.schema([("id", id_type), *text, ("vector", vector)])

    def __enter__(self) -> "ShardWriter":
        # Vectors do not compress; everything else does.
        codecs = {"id": "zstd", "text": "zstd", "vector.list.element": "none"}
        with readable_os_errors(self.file, KEPT), contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic_write(self.file))
            writer = parquet.ParquetWriter(part, self.schema, compression=codecs, use_dictionary=False)
            self._writer = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def write(self, ids: Sequence[Any], texts: Sequence[str], vectors: np.ndarray) -> None:
        """Add rows, as one row group; ``vectors`` (n, width) in the manifest's precision."""
        if not len(vectors):
            return
        lists = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), self.manifest.width)
        table = pa.table({"id": ids, "text": texts, "vector": lists}, self.schema)
        with readable_os_errors(self.file, KEPT):
            self._writer.write_table(table, row_group_size=len(table))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with readable_os_errors(self.file, KEPT):
            if kind is None:
                self._writer.add_key_value_metadata({_KEY: json.dumps(self.notes)})
            self._stack.__exit__(kind, error, trace)


def shard_notes(file: Path) -> dict[str, Any] | None:
    """Return the notes in a shard and its number of ``rows``; None for an incomplete file."""
    try:
        metadata = parquet.read_metadata(file)
        return {**json.loads(metadata.metadata[_KEY]), "rows": metadata.num_rows}
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    except OSError as error:
        if error.errno is not None:  # an error of the system, not of the content
            raise
        return None
