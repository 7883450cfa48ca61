"""Read data of any size in blocks of rows, from files, the Hub or memory.

Unlike :mod:`minibert.data.load`, this module copies nothing to disk. An unusable value is
replaced by a :class:`Bad`. The caller can then refuse or skip the row.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import parquet

from minibert.data.columns import pick_columns
from minibert.data.load import (
    BUILDERS,
    CSV_OPTIONS,
    SPLITS,
    as_dataset,
    find_files,
    is_unicode,
    local_path,
    no_value_dropped,
    open_hub_stream,
    refuse_unreadable,
    source_named,
)
from minibert.data.source import INSTALLED_DOCS, split_parts

# The text column, if several columns hold strings: the first of these names.
USUAL_COLUMNS = ("text", "passage", "answer", "sentence")
_BLOCK = 512  # rows in memory
_PEEK = 100  # rows used to find the columns of a file without a schema
_Block = tuple[int, Iterator[list[list[Any]]]]
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Bad(NamedTuple):
    """Mark a value that cannot be used. ``reason`` states why, for example "is empty"."""

    reason: str


class Rows(NamedTuple):
    """Store consecutive rows of the data.

    Attributes:
        first: the number of the first row in the complete data, from 0.
        texts: the values of the text column.
        ids: the values of the id column, or None without an id column.
        part: the name of the file that contains the rows.
        first_in_part: the number of the first row in the file ``part``, from 0.
    """

    first: int
    texts: list[str | Bad]
    ids: list[Any] | None
    part: str
    first_in_part: int


class _Part(NamedTuple):
    """Describe a file or a data set. ``content`` is the path or the data set."""

    name: str
    kind: str
    content: Any


@dataclass
class Stream:
    """Read the rows of an opened data set in order.

    Attributes:
        source: a dictionary that identifies the data. The entry ``path`` names the data.
        column: the name of the text column.
        id_column: the name of the id column, or None.
        id_type: the Arrow type of the ids.
        rows: the number of rows, or None if the number is known only after reading all rows.
    """

    source: dict[str, Any]
    column: str
    id_column: str | None
    id_type: pa.DataType
    rows: int | None
    parts: list[_Part] = field(repr=False)
    listing: list[str] = field(repr=False)

    def begins_with(self, source: dict[str, Any]) -> bool:
        """Return True if this stream starts with the files in ``source``, an earlier input."""
        return "files" in source and digest(self.listing[: source["files"]]) == source["digest"]

    def read(self, ranges: Iterable[range] = (range(2**63),)) -> Iterator[Rows]:
        """Yield blocks of the rows in the sorted ``ranges``. No block spans two ranges."""
        names = list(dict.fromkeys([self.column, self.id_column or self.column]))
        left, row = iter(ranges), 0
        wanted = next(left, None)
        for part in self.parts:
            columns, blocks = _READERS[part.kind]
            begin = row
            with _plain_errors(part):
                known = columns(part.content)
                if missing := [name for name in names if name not in known]:
                    raise ValueError(f"{part.name} has no column {missing[0]!r}; it has {', '.join(known)}.")
                for size, values in blocks(part.content, names):
                    stop = row + size
                    for found in values if wanted and wanted.start < stop else ():
                        end = row + len(found[0])
                        while wanted and wanted.start < end:
                            first = max(row, wanted.start)
                            inside = slice(first - row, wanted.stop - row)
                            texts = [_text(text) for text in found[0][inside]]
                            ids = [_id(value, self.id_type) for value in found[-1][inside]] if self.id_column else None
                            yield Rows(first, texts, ids, part.name, first - begin)
                            if wanted.stop > end:
                                break
                            wanted = next(left, None)
                        row = end
                    if wanted is None:
                        return
                    row = stop


@contextlib.contextmanager
def _plain_errors(part: _Part) -> Iterator[None]:
    """Convert reading errors into errors of one sentence that name the file."""
    damage = (OSError, UnicodeDecodeError, pa.ArrowInvalid, pd.errors.ParserWarning, pd.errors.ParserError)
    try:
        yield
    except (*damage, pd.errors.EmptyDataError) as error:
        # pyarrow reports damage as an OSError without errno. Others are not about damage.
        if isinstance(error, OSError) and (error.errno is not None or not isinstance(part.content, Path)):
            raise
        refuse_unreadable([Path(part.name)], error)


def open_stream(
    data: str | Path | Dataset,
    column: str | None = None,
    *,
    id_column: str | None = None,
    split: str = "train",
) -> Stream:
    """Open a file, a folder, a Hub data set or a data set in memory for reading in blocks.

    ``column`` is the text column. The default is the first of ``text``, ``passage``, ``answer``
    and ``sentence`` that exists, or the only column of strings. If ``id_column`` is None, the
    rows have no ids.
    """
    source, parts, listing = _find_parts(data, split)
    with _plain_errors(parts[0]):
        columns = _READERS[parts[0].kind][0](parts[0].content)
    strings = [name for name, kind in columns.items() if _is_string(kind)]
    usual = [(name,) for name in USUAL_COLUMNS]
    if column not in columns:  # rows without a text are reported one by one
        (column,) = pick_columns(strings, column and [column], usual, option="--column", columns=list(columns))
    if id_column is not None and id_column not in columns:
        raise ValueError(f"Column {id_column!r} is not in the data; the columns are {', '.join(columns)} (--id-column).")
    id_type = pa.int64() if id_column is None else columns[id_column]
    if id_column is not None and parts[0].kind == "csv":
        id_type = pa.string()  # CSV values are kept as written, so that 007 stays 007
    if not (pa.types.is_integer(id_type) or _is_string(id_type)):
        kind = f"numbers with a fraction ({id_type})" if pa.types.is_floating(id_type) else id_type
        raise ValueError(f"Column {id_column!r} holds {kind}; ids are strings or whole numbers (--id-column).")
    rows: int | None = None
    if isinstance(parts[0].content, Dataset):
        rows = len(parts[0].content)
    elif all(part.kind == "parquet" for part in parts):
        rows = 0
        for part in parts:
            with _plain_errors(part):
                rows += parquet.read_metadata(part.content).num_rows
    return Stream(source, column, id_column, pa.string() if _is_string(id_type) else pa.int64(), rows, parts, listing)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _text(value: Any) -> str | Bad:
    if isinstance(value, str):
        if not value or value.isspace():
            return Bad("is empty")
        return value if is_unicode(value) else Bad("is not valid Unicode")
    if isinstance(value, Bad):
        return value
    return Bad("has no text") if value is None else Bad(f"is of type {type(value).__name__}, not a string")


def _id(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, Bad):
        return value
    if value is None:
        return Bad("has no id")
    if kind == pa.string():
        if not isinstance(value, str):
            return Bad("has an id that is not a string")
        return value if is_unicode(value) else Bad("has an id that is not valid Unicode")
    if not isinstance(value, int) or isinstance(value, bool):
        return Bad("has an id that is not a whole number")
    return value if -(2**63) <= value < 2**63 else Bad("has an id that is not between -2**63 and 2**63 - 1")


def _find_parts(data: str | Path | Dataset, split: str) -> tuple[dict[str, Any], list[_Part], list[str]]:
    """Return :attr:`Stream.source`, the files, and the name and size of each file."""
    if isinstance(data, Dataset) or str(data) == INSTALLED_DOCS:
        table = as_dataset(data, split=split)
        source_id = {"path": "rows in memory" if data is table else str(data), "digest": table._fingerprint}
        return source_id, [_Part("the rows", "table", table)], []
    source = source_named(data)
    if any(rows for _, rows in split_parts(split)) or "+" in split:
        raise ValueError(f"split={split!r} does not name exactly one split; use a name such as train (--split).")
    path = local_path(source)
    if path is None:
        stream, commit = open_hub_stream(source, split)
        return {"path": str(data), "split": split, "revision": commit}, [_Part(str(data), "table", stream)], []
    files = next(iter(find_files(path, [SPLITS.get(split, split)], "--split", expected=()).values()))
    for file in files:
        source_named(file)  # raises an error if the name is not UTF-8
    root = path if path.is_dir() else path.parent
    listing = [f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files]
    source_id = {"path": str(data), "files": len(files), "digest": digest(listing)}
    if path.is_dir():
        source_id["split"] = split
    return source_id, [_Part(str(file), BUILDERS[file.suffix][0], file) for file in files], listing


def digest(listing: Sequence[str]) -> str:
    """Return the SHA-256 hash of ``listing``, a list of file names with sizes."""
    return hashlib.sha256("".join(listing).encode()).hexdigest()


# Each kind of data has two functions. The first returns the types of the columns. The second
# yields blocks: the number of rows, and a generator of the values of each column, so that
# unwanted blocks are not read.


def _types(schema: pa.Schema) -> dict[str, pa.DataType]:
    return dict(zip(schema.names, schema.types, strict=True))


def _types_of_rows(rows: Iterable[dict[str, Any]]) -> dict[str, pa.DataType]:
    """Return the type of each column, inferred from the first value that is not null."""
    found: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, pa.null()) == pa.null():
                found[name] = pa.infer_type([value])
    return found


def _parquet_blocks(path: Path, names: list[str]) -> Iterator[_Block]:
    with parquet.ParquetFile(path) as file:
        if double := [name for name in names if file.schema_arrow.names.count(name) > 1]:
            raise ValueError(f"{path} has more than one column named {double[0]!r}; rename all but one.")
        for group in range(file.num_row_groups):
            batches = file.iter_batches(_BLOCK, [group], names, use_threads=False)
            values = ([batch.column(name).to_pylist() for name in names] for batch in batches)
            yield file.metadata.row_group(group).num_rows, values


def _lines(path: Path) -> Iterator[list[bytes]]:
    with path.open("rb") as file:
        if file.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
            file.seek(0)
        while lines := list(islice(file, _BLOCK)):
            yield lines


def _text_blocks(path: Path, names: list[str]) -> Iterator[_Block]:
    return ((len(lines), _text_values(lines, names)) for lines in _lines(path))


def _text_values(lines: list[bytes], names: list[str]) -> Iterator[list[list[Any]]]:
    yield [[line.decode().rstrip("\r\n") for line in lines]] * len(names)


def _json_columns(path: Path) -> dict[str, pa.DataType]:
    rows = next(_json_rows(path), [])
    parsed = map(_parse, rows[:_PEEK])
    columns = _types_of_rows(row for row in parsed if isinstance(row, dict))
    if not columns:
        raise ValueError(
            f"{path} holds no JSON objects in its first {_PEEK} rows; give one object per line, such as "
            '{"text": "a text"}, or an array of objects.'
        )
    return columns


def _json_rows(path: Path) -> Iterator[list[Any]]:
    """Yield blocks of rows. A JSON array is one block. In other files, each line is a row."""
    with path.open("rb") as file:
        is_array = file.read(1024).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
    if not is_array:
        for lines in _lines(path):
            if rows := [line for line in lines if line.strip()]:
                yield rows
        return
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a JSON array: {error}. Repair it, or save it again.") from error
    yield rows


def _parse(row: Any) -> dict[str, Any] | Bad:
    if isinstance(row, bytes):
        text = row.decode()
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            row = None
        except RecursionError:
            return Bad("is nested too deeply")
        except ValueError:  # Python does not convert numbers with thousands of digits
            return Bad("holds a number of too many digits")
    return row if isinstance(row, dict) else Bad("is not a JSON object")


def _json_blocks(path: Path, names: list[str]) -> Iterator[_Block]:
    return ((len(rows), _json_values(rows, names)) for rows in _json_rows(path))


def _json_values(raw: list[Any], names: list[str]) -> Iterator[list[list[Any]]]:
    rows = [_parse(row) for row in raw]
    yield [[row if isinstance(row, Bad) else row.get(name) for row in rows] for name in names]


def _csv_options(path: Path) -> dict[str, Any]:
    return {**CSV_OPTIONS, "sep": "\t" if path.suffix == ".tsv" else ",", "encoding": "utf-8-sig"}


def _csv_columns(path: Path) -> dict[str, pa.DataType]:
    with no_value_dropped():
        found = pd.read_csv(path, nrows=_PEEK, **_csv_options(path))
    numbers = pd.api.types.is_numeric_dtype
    return {str(name): pa.float64() if numbers(found[name]) else pa.string() for name in found.columns}


def _csv_blocks(path: Path, names: list[str]) -> Iterator[_Block]:
    # Read all columns: otherwise, pandas does not report a row with too many values.
    with pd.read_csv(path, chunksize=_BLOCK, dtype=object, **_csv_options(path)) as chunks:
        while True:
            with no_value_dropped():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield len(chunk), _csv_values(chunk, names)


def _csv_values(chunk: pd.DataFrame, names: list[str]) -> Iterator[list[list[Any]]]:
    """Yield the values of the columns as strings, with None for an empty value."""
    yield [chunk[name].astype(object).where(chunk[name].notna(), None).tolist() for name in names]


def _table_columns(table: Dataset | IterableDataset) -> dict[str, pa.DataType]:
    if table.features is not None:
        return _types(table.features.arrow_schema)
    return _types_of_rows(table.take(_PEEK))


def _table_blocks(table: Dataset | IterableDataset, names: list[str]) -> Iterator[_Block]:
    # Arrow tables of a data set in memory are views. A stream without schema has no tables.
    table = table.select_columns(names).with_format("arrow" if isinstance(table, Dataset) else None)
    for batch in table.iter(batch_size=_BLOCK):
        yield len(batch[names[0]]), _table_values(batch, names)


def _table_values(batch: Any, names: list[str]) -> Iterator[list[list[Any]]]:
    columns = batch.to_pydict() if isinstance(batch, pa.Table) else batch
    yield [list(columns[name]) for name in names]


_Columns = Callable[[Any], dict[str, pa.DataType]]
_Blocks = Callable[[Any, list[str]], Iterator[_Block]]
_READERS: dict[str, tuple[_Columns, _Blocks]] = {
    "parquet": (lambda file: _types(parquet.read_schema(file)), _parquet_blocks),
    "json": (_json_columns, _json_blocks),
    "csv": (_csv_columns, _csv_blocks),
    "text": (lambda _: {"text": pa.string()}, _text_blocks),
    "table": (_table_columns, _table_blocks),
}
