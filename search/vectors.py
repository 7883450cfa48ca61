"""Read and write folders of vectors, which contain Parquet shards and a manifest.

``manifest.json`` describes the model, the input and the shards. The shards
``part-00000.parquet``, ``part-00001.parquet``, … have the columns ``id`` and ``vector`` (a
fixed-size list). If texts are stored, the shards also have the column ``text``.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from pydantic import Field, TypeAdapter, ValidationError
from sentence_transformers.util import quantize_embeddings

from minibert.files.disk import atomic_write, check_regular, delete, leftovers, readable_os_errors, write_json

MANIFEST = "manifest.json"
_SHARD = r"part-(\d{5}|[1-9]\d{5,})\.parquet"  # names that shard_name returns
PRECISIONS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.int8()}
KEPT = "the shards before it are complete"
# The key of the metadata in a shard, from which a manifest can be restored.
_KEY = b"minibert"


@dataclass(frozen=True)
class Shard:
    """Describe a shard of vectors and the rows of the input that they come from."""

    file: str
    first_row: int  # the number of its first vector
    rows: int  # the number of vectors: fewer than input_rows if some rows were skipped
    first_input_row: int
    input_rows: int


@dataclass
class Manifest:
    """Describe a folder of vectors, as stored in ``manifest.json``.

    Attributes:
        model: the path or Hub id of the model, as given.
        fingerprint: a hash of the files that determine the vectors of the model.
        dimension: the dimension of the vectors. A binary vector takes one bit per dimension.
        precision: ``float32``, ``float16``, ``int8`` or ``binary``.
        normalized: True if the vectors had length 1 before they were stored.
        source: a description that identifies the input.
        columns: a dictionary. ``text`` is the name of the text column. ``id`` is the name of
            the id column, or None if the id is the row number. ``kept`` is True if the texts
            are stored.
        encoding: further options that affect the vectors, such as the prompt and the dtype.
        rows_per_shard: the number of input rows per shard.
        rows: the number of vectors in all shards.
        skipped: the number of skipped input rows.
        skipped_rows: the row number and the reason for each of the first skipped rows.
        starts: a pair for the first call, and for each call that appended files. The pair is
            the first shard and the first input row.
        complete: True if the input was read completely.
        ranges: for int8, the lowest and the highest value of each dimension.
        shards: the shards in the order of the input.
    """

    model: str
    fingerprint: str
    dimension: Annotated[int, Field(ge=1)]
    precision: Annotated[str, Field(pattern=f"^({'|'.join(PRECISIONS)})$")]
    normalized: bool
    source: dict[str, Any]
    columns: dict[str, Any]
    encoding: dict[str, Any]
    rows_per_shard: Annotated[int, Field(ge=1)]
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
        """Return the number of stored values per vector."""
        return -(-self.dimension // 8) if self.precision == "binary" else self.dimension

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the NumPy dtype of the stored values."""
        found: np.dtype[Any] = np.dtype(PRECISIONS[self.precision].to_pandas_dtype())
        return found


_READER = TypeAdapter(Manifest)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of ``folder``."""
    file = Path(folder) / MANIFEST
    if not file.exists():
        raise FileNotFoundError(
            f"There is no folder of vectors {folder} (looked from {Path.cwd()}, for its {MANIFEST}); "
            "create it with minibert encode, or search a file with --passages FILE."
        )
    check_regular(file)
    try:
        return _READER.validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise ValueError(
            f"{file} is damaged or of a later version ({reason}); encode into a new folder, or use --force."
        ) from error


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Yield the fields of a manifest that contradict its other fields."""
    rows = input_rows = 0
    for number, shard in enumerate(manifest.shards):
        expected = (shard_name(number), rows, input_rows)
        if (shard.file, shard.first_row, shard.first_input_row) != expected or not 0 <= shard.rows <= shard.input_rows:
            yield f"shards[{number}]={tuple(asdict(shard).values())}, which does not follow the shard before it"
        rows, input_rows = rows + shard.rows, input_rows + shard.input_rows
    if manifest.rows != rows:
        yield f"rows={manifest.rows}, but its shards hold {rows}"
    if manifest.precision == "int8" and [len(some) for some in manifest.ranges or ()] != [manifest.dimension] * 2:
        yield f"ranges that are not two lists of dimension={manifest.dimension} numbers"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder``. Replace an earlier manifest."""
    with readable_os_errors(folder / MANIFEST, KEPT):
        write_json(folder / MANIFEST, asdict(manifest))


def quantize(vectors: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Convert float32 vectors (n, dimension) to the precision of the manifest: (n, width)."""
    if manifest.precision.startswith("float"):
        return vectors.astype(manifest.precision)
    ranges = None if manifest.ranges is None else np.array(manifest.ranges, dtype=np.float32)
    return np.asarray(quantize_embeddings(vectors, manifest.precision, ranges=ranges))  # type: ignore[arg-type]


def to_float(stored: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Convert stored vectors (n, width) to float32 vectors (n, dimension).

    An int8 value becomes the middle of the range that it represents. A bit becomes plus or
    minus ``1 / sqrt(dimension)``.
    """
    if manifest.precision == "binary":
        bits = np.unpackbits((stored.astype(np.int16) + 128).astype(np.uint8), axis=1, count=manifest.dimension)
        return np.asarray((bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(manifest.dimension)))
    if manifest.precision == "int8":
        low, high = np.array(manifest.ranges, dtype=np.float32)
        return np.asarray((stored.astype(np.float32) + 128.5) * ((high - low) / 255) + low)
    return stored.astype(np.float32, copy=False)


class VectorFolder:
    """Read a folder of vectors in blocks. Memory use does not grow with the number of vectors.

    Example::

        folder = VectorFolder("notes-vectors")
        for first_row, vectors in folder.blocks():
            print(first_row, vectors.shape, folder.texts([first_row]))

    Raises:
        FileNotFoundError: if the folder has no manifest or lacks a shard.
        ValueError: if the manifest or a shard is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.shards = self.manifest.shards
        self.has_texts = bool(self.manifest.columns.get("kept"))
        if problem := next(_contradictions(self.manifest), None):
            advice = "Encode into a new folder, or again with --force."
            raise ValueError(f"{self.folder / MANIFEST} is damaged: it has {problem}. {advice}")
        for shard in self.shards:
            if not (self.folder / shard.file).exists():
                raise FileNotFoundError(f"{folder} lacks {shard.file}; encode again to restore it.")
            check_regular(self.folder / shard.file)

    def __len__(self) -> int:
        return self.manifest.rows

    def read(self, shard: Shard) -> np.ndarray:
        """Return the vectors of a shard as they are stored: (shard.rows, width)."""
        with self._open(shard) as file:
            return self._matrix(file.read(columns=["vector"]).column("vector").combine_chunks())

    def blocks(self, size: int = 16384) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a row number, and up to ``size`` stored vectors (n, width) from this row on."""
        for shard in self.shards:
            row = shard.first_row
            with self._open(shard) as file:
                for batch in file.iter_batches(batch_size=size, columns=["vector"]):
                    yield row, self._matrix(batch.column("vector"))
                    row += len(batch)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the ids of ``rows``: values of the id column, or row numbers in the input."""
        return self._take("id", rows)

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the texts of ``rows``. Raise a ValueError if the folder has no texts."""
        if not self.has_texts:
            raise ValueError(f"{self.folder} has no texts; encode with --keep-text to store texts.")
        return self._take("text", rows)

    def _take(self, column: str, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the values of ``column`` in ``rows``, in the order of ``rows``."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            given = f"{wanted.min()} to {wanted.max()}"
            raise IndexError(f"rows must lie between 0 and {len(self) - 1} in {self.folder}, got {given}.")
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
        """Open a shard, and check the number and the width of its vectors."""
        file, width = self.folder / shard.file, self.manifest.width
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
                types = {column.name: column.type for column in opened.schema_arrow}
                vector = types.get("vector")
                for fact, found, expected in (
                    ("rows", opened.metadata.num_rows, shard.rows),
                    ("a column of ids", "id" in types and not pa.types.is_nested(types["id"]), True),
                    ("a column of texts (columns.kept)", types.get("text") == pa.string(), self.has_texts),
                    ("numbers per vector (dimension)", getattr(vector, "list_size", None), width),
                    (
                        "numbers of this type (precision)",
                        getattr(vector, "value_type", None),
                        PRECISIONS[self.manifest.precision],
                    ),
                ):
                    if found != expected:
                        raise ValueError(
                            f"{file} disagrees with its manifest about {fact}: {found}, not {expected}; encode again."
                        )
                yield opened
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # an error of the system, such as a missing permission
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} is damaged ({reason}); delete it and encode again.") from error


def shard_name(number: int) -> str:
    """Return the file name of the shard with this number."""
    return f"part-{number:05d}.parquet"


def shard_files(folder: Path) -> dict[int, Path]:
    """Return a dictionary from shard number to file for all shards in ``folder``."""
    found = {file: re.fullmatch(_SHARD, file.name) for file in folder.glob("part-*.parquet")}
    return {int(name[1]): file for file, name in found.items() if name}


def remove_vectors(folder: Path) -> None:
    """Delete the manifest and all shards, complete or incomplete. Keep all other files."""
    # Delete the manifest last: other files in a folder without manifest are never deleted.
    for file in (*shard_files(folder).values(), *leftovers(folder, _SHARD), folder / MANIFEST):
        delete(file)


class ShardWriter:
    """Write one shard in a ``with`` block. If the block raises an exception, no file remains.

    The attribute ``notes`` is a dictionary of metadata, which the block may change.
    """

    def __init__(self, file: Path, manifest: Manifest, id_type: pa.DataType) -> None:
        self.file, self.manifest = file, manifest
        self.notes: dict[str, Any] = {}
        vector = pa.list_(PRECISIONS[manifest.precision], manifest.width)
        text = [("text", pa.string())] if manifest.columns["kept"] else []
        self.schema = pa.schema([("id", id_type), *text, ("vector", vector)])

    def __enter__(self) -> "ShardWriter":
        # Vectors cannot be compressed. The other columns can.
        codecs = {"id": "zstd", "text": "zstd", "vector.list.element": "none"}
        with readable_os_errors(self.file, KEPT), contextlib.ExitStack() as stack:
            part = stack.enter_context(atomic_write(self.file))
            options: dict[str, Any] = {"use_dictionary": False, "write_page_checksum": True}
            writer = parquet.ParquetWriter(part, self.schema, compression=codecs, **options)
            self._writer = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def write(self, ids: Sequence[Any], texts: Sequence[str], vectors: np.ndarray) -> None:
        """Add rows to the shard. ``vectors`` (n, width) have the precision of the manifest."""
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
    """Return the metadata of a shard with the number of ``rows``, or None if it is damaged."""
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            metadata = opened.metadata
            for _ in opened.iter_batches():
                pass  # compares the checksum of every page
        return {**json.loads(metadata.metadata[_KEY]), "rows": metadata.num_rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the system, not of the file
            raise
        return None
