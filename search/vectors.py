"""A folder of vectors: Parquet shards beside a manifest. ``minibert encode`` writes it, ``minibert search`` reads it.

``manifest.json`` says which model made the vectors, from what, and what the shards hold; ``part-00000.parquet``, … have the
columns ``id``, ``text`` (where it was kept) and ``vector`` (a fixed-size list). Files are written under another name, synced,
then renamed: what has its name is whole.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from sentence_transformers.util import quantize_embeddings

from minibert.files import disk

FORMAT = 1
MANIFEST = "manifest.json"
PRECISIONS = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.int8()}
# What a shard says of itself, so that a manifest can be made anew from the shards alone.
_KEY = b"minibert"
_KEPT = "the shards before it are whole"


@dataclass(frozen=True)
class Shard:
    """A part of the vectors: ``rows`` of them, numbered from ``first_row``, made from ``input_rows`` of the input beginning
    at ``first_input_row``. They are fewer than those where rows of the input were left out."""

    file: str
    first_row: int
    rows: int
    first_input_row: int
    input_rows: int


@dataclass
class Manifest:
    """What a folder of vectors holds.

    Attributes:
        model: as it was named.
        fingerprint: of the model's weights, configuration and tokenizer, see :func:`minibert.inference.load.fingerprint`.
        dimension: of the vectors; binary ones take an eighth of it in bytes.
        precision: ``float32``, ``float16``, ``int8`` or ``binary``.
        normalized: whether the vectors had length 1 before they were stored in that precision.
        source: what was encoded.
        columns: names of the input's columns taken as ``text`` and as ``id`` (``None``: the number of the row), and whether the
            text is ``kept``.
        encoding: what else the vectors depend on, such as the prompt and the numbers computed with.
        rows_per_shard: rows of the input that a shard takes.
        rows: vectors in all shards.
        skipped: rows of the input left out; ``skipped_rows`` are the first of them, each a number and a reason.
        starts: the shard and the row of the input that the first files begin with, and those appended by each later call.
        complete: whether the whole input has been read.
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
    similarity: str = "cosine"
    rows: int = 0
    skipped: int = 0
    skipped_rows: list[list[Any]] = field(default_factory=list)
    starts: list[list[int]] = field(default_factory=lambda: [[0, 0]])
    complete: bool = False
    ranges: list[list[float]] | None = None
    shards: list[Shard] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Numbers in a stored vector."""
        return -(-self.dimension // 8) if self.precision == "binary" else self.dimension


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of ``folder``.

    Raises:
        FileNotFoundError: for a folder without one.
        ValueError: for one that is damaged or of a later format.
    """
    file = Path(folder) / MANIFEST
    if not file.exists():
        raise FileNotFoundError(
            f"{folder} is no folder of vectors: it holds no {MANIFEST}. Make one with: minibert encode MODEL INPUT {folder}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"{file} has format {content['format']}; this version reads format {FORMAT}: update minibert.")
        content["shards"] = [Shard(**shard) for shard in content["shards"]]
        if "starts" not in content:
            content["starts"] = _starts(content)
        manifest = Manifest(**{one.name: content[one.name] for one in fields(Manifest) if one.name in content})
        for part in (manifest, *manifest.shards):
            check_types(part)
        return manifest
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); encode into a new folder, or again with --force.") from error


def check_types(part: Any) -> None:
    """Refuse an instance of a dataclass, made of JSON, whose fields are not of the types it names; what lists and dictionaries
    hold is not looked at.

    Raises:
        TypeError: naming the first such field.
    """
    for one in fields(part):
        value = getattr(part, one.name)
        kinds = get_args(one.type) if isinstance(one.type, UnionType) else (one.type,)
        if not isinstance(value, tuple(get_origin(kind) or kind for kind in kinds)):
            raise TypeError(f"{one.name} is {value!r}")


def _starts(content: dict[str, Any]) -> list[list[int]]:
    """``starts`` of a manifest that only noted the last of them: shards that are not full are the last ones of a call."""
    ends = [shard for shard in content["shards"][:-1] if shard.input_rows < content["rows_per_shard"]]
    after = {(number_of(Path(shard.file)) + 1, shard.first_input_row + shard.input_rows) for shard in ends}
    return sorted(map(list, {(0, 0), (content.get("first_shard", 0), content.get("first_row", 0)), *after}))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder`` in one move."""
    with whole_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n", encoding="utf-8")


def quantize(vectors: np.ndarray, manifest: Manifest) -> np.ndarray:
    """(n, dimension) float32 vectors in the manifest's precision: (n, width)."""
    if manifest.precision.startswith("float"):
        return vectors.astype(manifest.precision)
    ranges = None if manifest.ranges is None else np.array(manifest.ranges, dtype=np.float32)
    quantized = quantize_embeddings(vectors, manifest.precision, ranges=ranges)  # type: ignore[arg-type]
    assert isinstance(quantized, np.ndarray)  # one matrix in, one out
    return quantized


def to_float(stored: np.ndarray, manifest: Manifest) -> np.ndarray:
    """(n, width) stored vectors as (n, dimension) float32: int8 as the middle of its step, a bit as plus or minus
    1 / sqrt(dimension)."""
    if manifest.precision == "binary":
        bits = np.unpackbits((stored.astype(np.int16) + 128).astype(np.uint8), axis=1, count=manifest.dimension)
        signs: np.ndarray = (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(manifest.dimension))
        return signs
    if manifest.precision == "int8":
        low, high = np.array(manifest.ranges, dtype=np.float32)
        middles: np.ndarray = (stored.astype(np.float32) + 128.5) * ((high - low) / 255) + low
        return middles
    return stored.astype(np.float32)


class VectorFolder:
    """A folder of vectors to read from, a block at a time: memory does not grow with their number.

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
        for shard in self.shards:
            if not (self.folder / shard.file).exists():
                raise FileNotFoundError(f"{folder} lacks {shard.file}, which its manifest names; encode again to make it anew.")

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def shards(self) -> list[Shard]:
        return self.manifest.shards

    @property
    def has_texts(self) -> bool:
        return bool(self.manifest.columns.get("kept"))

    def read(self, shard: Shard) -> np.ndarray:
        """(shard.rows, width): the vectors of one shard as they are stored."""
        with self._open(shard) as file:
            return _matrix(file.read(columns=["vector"]).column("vector"), self.manifest.width)

    def blocks(self, start: int = 0, size: int = 16384) -> Iterator[tuple[int, np.ndarray]]:
        """Stored vectors from row ``start`` on, at most ``size`` at a time: (number of the first row, (n, width))."""
        for shard in self.shards:
            if shard.first_row + shard.rows <= start:
                continue
            row = shard.first_row
            with self._open(shard) as file:
                for batch in file.iter_batches(batch_size=size, columns=["vector"]):
                    skip = min(max(0, start - row), len(batch))
                    if skip < len(batch):
                        yield row + skip, _matrix(batch.column("vector"), self.manifest.width)[skip:]
                    row += len(batch)

    def vectors(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """(len(rows), width): the stored vectors of these rows."""
        return _matrix(self._take("vector", rows), self.manifest.width)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """What names these rows: their number in the input, or the value of the input's id column."""
        return list(self._take("id", rows).to_pylist())

    def texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The texts of these rows.

        Raises:
            ValueError: if they were not kept.
        """
        if not self.has_texts:
            raise ValueError(f"{self.folder} holds no texts; encode with --keep-text to have them beside the vectors.")
        return list(self._take("text", rows).to_pylist())

    def _take(self, column: str, rows: Sequence[int] | np.ndarray) -> pa.ChunkedArray:
        """Values of ``column`` in these rows, in their order; only the row groups that hold them are read."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"{self.folder} holds rows 0 to {len(self) - 1}; asked for {wanted.min()} to {wanted.max()}.")
        parts, places = [], []
        for shard in self.shards:
            inside = np.flatnonzero((wanted >= shard.first_row) & (wanted < shard.first_row + shard.rows))
            if not len(inside):
                continue
            with self._open(shard) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                ends = shard.first_row + np.cumsum(sizes)
                groups = np.searchsorted(ends, wanted[inside], side="right")
                for group in np.unique(groups):
                    here = inside[groups == group]
                    values = file.read_row_group(int(group), columns=[column]).column(column)
                    parts.append(values.take(pa.array(wanted[here] - (ends[group] - sizes[group]))))
                    places.append(here)
        if not parts:
            return pa.chunked_array([], type=self._schema().field(column).type)
        order = np.argsort(np.concatenate(places), kind="stable")
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks]).take(pa.array(order))

    def _schema(self) -> pa.Schema:
        return parquet.read_schema(self.folder / self.shards[0].file) if self.shards else pa.schema({"id": pa.int64()})

    @contextlib.contextmanager
    def _open(self, shard: Shard) -> Iterator[parquet.ParquetFile]:
        file = self.folder / shard.file
        with damage_named(file), parquet.ParquetFile(file) as opened:
            if opened.metadata.num_rows != shard.rows:
                raise ValueError(f"{file} holds {opened.metadata.num_rows} rows, its manifest says {shard.rows}; encode again.")
            yield opened


@contextlib.contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Say of a Parquet file that cannot be read which one it is.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's word, such as a missing permission, not the content
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged ({reason}); delete it and encode again to make it anew.") from error


def _matrix(column: pa.ChunkedArray | pa.FixedSizeListArray, width: int) -> np.ndarray:
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    arrays = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in chunks]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays) if arrays else np.empty((0, width), dtype=np.float32)


# --------------------------------------------------------------------------------------------------------------- writing


def shard_name(number: int) -> str:
    """
    >>> shard_name(7), number_of(Path("vectors/part-00007.parquet"))
    ('part-00007.parquet', 7)
    """
    return f"part-{number:05d}.parquet"


def number_of(file: Path) -> int:
    return int(file.stem.removeprefix("part-"))


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, by name; other files, such as copies that somebody made of them, are nobody's business."""
    return sorted(file for file in folder.glob("part-*.parquet") if file.stem.removeprefix("part-").isdecimal())


def holds_vectors(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def remove_vectors(folder: Path) -> None:
    """Delete shards and manifest, and nothing else."""
    for file in (*shard_files(folder), folder / MANIFEST):  # in this order: a folder without manifest is not ours
        file.unlink(missing_ok=True)


class ShardWriter:
    """One shard on its way to disk, to be used in a ``with``; an exception in there leaves nothing behind.

    Args:
        file: where it will be.
        manifest: gives the precision and width of vectors, and whether texts are kept.
        id_type: Arrow type of the ids.
        about: what the shard says of itself, see :func:`shard_notes`; may be set until the end.
    """

    def __init__(self, file: Path, manifest: Manifest, id_type: pa.DataType, about: dict[str, Any] | None = None) -> None:
        self.file, self.manifest, self.about, self.rows = file, manifest, about or {}, 0
        columns = {"id": id_type, "text": pa.string(), "vector": pa.list_(PRECISIONS[manifest.precision], manifest.width)}
        if not manifest.columns["kept"]:
            del columns["text"]
        self.schema = pa.schema(columns)

    def __enter__(self) -> "ShardWriter":
        self._stack = contextlib.ExitStack()
        temporary = self._stack.enter_context(_renamed(self.file, _KEPT))
        with readable_os_errors(self.file):
            # Vectors do not compress; everything else does.
            codecs = {name: "none" if name == "vector" else "zstd" for name in self.schema.names}
            codecs["vector.list.element"] = codecs.pop("vector")
            self._writer = parquet.ParquetWriter(temporary, self.schema, compression=codecs, use_dictionary=False)
        return self

    def write(self, ids: Sequence[Any], texts: Sequence[str], vectors: np.ndarray) -> None:
        """Add rows, as one row group; ``vectors`` (n, width) in the manifest's precision."""
        if not len(vectors):
            return
        values = pa.array(np.ascontiguousarray(vectors).reshape(-1), type=PRECISIONS[self.manifest.precision])
        columns = {"id": ids, "text": texts, "vector": pa.FixedSizeListArray.from_arrays(values, self.manifest.width)}
        table = pa.table([pa.array(columns[name], self.schema.field(name).type) for name in self.schema.names], self.schema)
        with readable_os_errors(self.file):
            self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.rows += len(table)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            with readable_os_errors(self.file):
                if kind is None:
                    self._writer.add_key_value_metadata({_KEY: json.dumps(self.about)})
                self._writer.close()
        except BaseException as closing:
            self._stack.__exit__(type(closing), closing, closing.__traceback__)
            if kind is None:
                raise
        else:
            self._stack.__exit__(kind, error, trace)


def shard_notes(file: Path) -> dict[str, Any] | None:
    """What the writer of a shard noted in it, and its number of ``rows``; ``None`` for a file that is not whole."""
    try:
        metadata = parquet.read_metadata(file)
        return {**json.loads(metadata.metadata[_KEY]), "rows": metadata.num_rows}
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    except OSError as error:
        if error.errno is not None:  # the system's word, not the content
            raise
        return None


@contextlib.contextmanager
def whole_file(file: Path, kept: str = _KEPT) -> Iterator[Path]:
    """A temporary name to write under: synced and renamed to ``file`` at the end, deleted after an exception. Nothing but
    writing belongs in there, for its trouble is said to be the disk's, with what is ``kept``."""
    with _renamed(file, kept) as temporary, disk.readable_os_errors(file, kept):
        yield temporary


@contextlib.contextmanager
def _renamed(file: Path, kept: str) -> Iterator[Path]:
    temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with disk.readable_os_errors(file, kept):
            disk.sync(temporary)
            temporary.replace(file)
            disk.sync(file.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written."""
    for file in (*folder.glob("part-*.tmp-*"), *folder.glob(f"{MANIFEST}.tmp-*")):
        file.unlink(missing_ok=True)


def exclusive_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """:func:`minibert.files.disk.exclusive_lock` of a run that encodes."""
    return disk.exclusive_lock(folder, "encoding into", kept=_KEPT)


def readable_os_errors(file: Path) -> contextlib.AbstractContextManager[None]:
    """:func:`minibert.files.disk.readable_os_errors` of a run that encodes."""
    return disk.readable_os_errors(file, _KEPT)
