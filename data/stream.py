"""Rows of data of any size, a block at a time: local files of every kind we read, or a data set on the Hub, streamed.

Where :mod:`minibert.data.load` makes one memory-mapped table of the data, nothing here is copied to disk, and memory holds one
block. A row that cannot be used becomes a value that says why, so that who reads decides what becomes of it.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from datasets import Dataset, IterableDataset, load_dataset
from huggingface_hub import HfApi
from pyarrow import parquet

from minibert.data.columns import pick_columns
from minibert.data.load import (
    BUILDERS,
    CSV_OPTIONS,
    SPLITS,
    TOO_WIDE,
    as_dataset,
    check_hub_name,
    check_local,
    check_name,
    describe_groups,
    first_line_not_utf8,
    group_by_split,
    hub_errors,
    is_unicode,
    no_value_dropped,
    source_named,
)
from minibert.data.source import INSTALLED_DOCS, DataSource, split_parts

logger = logging.getLogger(__name__)

# Columns taken as the text when several hold strings.
USUAL_COLUMNS = ("text", "passage", "answer", "sentence")
_BLOCK = 512  # rows in memory
_PEEK = 100  # rows looked at to learn the columns of a file that does not list them

# Which rows are wanted: the first range (start, stop) of them that ends behind a row.
Wanted = Callable[[int], tuple[int, int]]


class Bad(NamedTuple):
    """Stands where a row has no usable value; ``reason`` follows the number of the row: "is empty"."""

    reason: str


class Rows(NamedTuple):
    """Consecutive rows, numbered from 0: ``first`` in all of the data, ``first_in_part`` in the file they are from.

    ``ids`` are values of the id column, or ``None`` without one. ``share`` of the data has been read so far.
    """

    first: int
    texts: list[str | Bad]
    ids: list[Any] | None
    part: str
    first_in_part: int
    share: float


class _Block(NamedTuple):
    """Rows of one part as they were found: ``columns`` has the values of every column read."""

    first: int
    columns: list[list[Any]]
    share: float


@dataclass
class _Part:
    """One file, or one data set. ``seen`` counts the rows that were read or passed over, in the end all of them."""

    name: str
    size: int
    blocks: Callable[["_Part", list[str], Wanted], Iterator[_Block]]
    content: Any  # path of the file, or the data set
    columns: Callable[[Any], dict[str, pa.DataType]]
    seen: int = 0

    @contextlib.contextmanager
    def plain_errors(self) -> Iterator[None]:
        """What a reader says about damage, with the name of the file."""
        try:
            yield
        except UnicodeDecodeError as error:
            if self.blocks not in (_read_text, _read_csv, _read_json):  # of the others no line can be named
                raise ValueError(f"{self.name} holds a text that is not UTF-8. Repair it, or save it again.") from error
            line = first_line_not_utf8(self.content)
            raise ValueError(
                f"{self.name} is not UTF-8: line {line} cannot be decoded. Convert the file, for example with iconv -t UTF-8."
            ) from error
        except pd.errors.ParserWarning as error:
            raise ValueError(f"{self.name} {TOO_WIDE}") from error
        except (OSError, pa.ArrowInvalid, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            # What the system or the Hub refuses is no damage; pyarrow's words about damage come without a number.
            if isinstance(error, OSError) and (error.errno is not None or not isinstance(self.content, Path)):
                raise
            kind = Path(self.name).suffix.lstrip(".")
            cause = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"{self.name} cannot be read as {kind}: {cause}. Repair it, or save it again.") from error


@dataclass
class Stream:
    """Data opened to be read in order.

    Attributes:
        source: what tells whether data is still the same; ``path`` is its name.
        column: that of the texts.
        id_column: that of the ids, or ``None``; ``id_type`` is their Arrow type.
        rows: how many there are, where that is known beforehand.
    """

    source: dict[str, Any]
    column: str
    id_column: str | None
    id_type: pa.DataType
    rows: int | None
    parts: list[_Part] = field(repr=False)
    listing: list[str] = field(repr=False)

    def begins_with(self, source: dict[str, Any]) -> bool:
        """Whether these files begin with all those that ``source`` identifies."""
        return "files" in source and digest(self.listing[: source["files"]]) == source["digest"]

    def read(self, wanted: Wanted = lambda row: (0, 2**63)) -> Iterator[Rows]:
        """The wanted rows in blocks, in order.

        Raises:
            ValueError: for a file that is damaged, not UTF-8, or without the column.
        """
        first, done, total = 0, 0, sum(part.size for part in self.parts) or 1
        names = list(dict.fromkeys([self.column, self.id_column or self.column]))
        for part in self.parts:
            part.seen = 0
            for block in self._blocks(part, names, _behind(wanted, first)):
                texts = [_text(text) for text in block.columns[0]]
                ids = [_id(value, self.id_type) for value in block.columns[-1]] if self.id_column else None
                share = (done + block.share * part.size) / total
                yield Rows(first + block.first, texts, ids, part.name, block.first, share)
            first += part.seen
            done += part.size

    def _blocks(self, part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
        """The wanted rows of one part, cut where ranges begin and end."""
        with part.plain_errors():
            known = part.columns(part.content)
            if missing := [name for name in names if name not in known]:
                raise ValueError(f"{part.name} has no column {missing[0]!r}; it has {', '.join(known)}.")
            for block in part.blocks(part, names, wanted):
                size, row = len(block.columns[0]), block.first
                while row < block.first + size:
                    start, stop = wanted(row)
                    start, stop = max(start, row), min(stop, block.first + size)
                    if start >= stop:
                        break
                    inside = slice(start - block.first, stop - block.first)
                    yield _Block(start, [values[inside] for values in block.columns], block.share)
                    row = stop


def open_stream(
    data: str | Path | Dataset, column: str | None = None, *, id_column: str | None = None, split: str = "train"
) -> Stream:
    """Open a file, a folder (all its files, or those of one split), a Hub data set, or rows read already.

    Args:
        column: that of the texts; the default is the only column of strings, or else the one named as in ``USUAL_COLUMNS``.
        id_column: that of values which name the rows.
        split: of a folder with a file per split, or of a Hub data set.

    Raises:
        FileNotFoundError: for data that is neither here nor on the Hub.
        ValueError: for files that are empty, of an unknown kind or damaged; a column that is not there, holds no texts, or
            could be one of several.
    """
    source, parts, listing = _find_parts(data, split)
    columns: dict[str, pa.DataType] = {}
    for part in parts[:1]:
        with part.plain_errors():
            columns = part.columns(part.content)
    strings = [name for name, kind in columns.items() if _is_string(kind)]
    usual = [(name,) for name in USUAL_COLUMNS]
    if column not in columns:  # rows of a named column that hold no text are reported one by one
        (column,) = pick_columns(strings, column and [column], usual, option="--column", columns=list(columns))
    if id_column is not None and id_column not in columns:
        raise ValueError(f"There is no column {id_column!r} to take ids from; there are {', '.join(columns)} (--id-column).")
    id_type = pa.int64() if id_column is None else columns[id_column]
    if id_column is not None and parts[0].blocks is _read_csv:
        id_type = pa.string()  # values of CSV are taken as they are written, so that 007 stays 007
    if not (pa.types.is_integer(id_type) or _is_string(id_type)):
        kind = f"numbers with a fraction ({id_type})" if pa.types.is_floating(id_type) else id_type
        raise ValueError(f"Column {id_column!r} holds {kind}; ids are strings or whole numbers (--id-column).")
    id_type = pa.string() if _is_string(id_type) else pa.int64()
    rows = sum(part.size for part in parts) if all(part.blocks in _COUNTED for part in parts) else None
    return Stream(source, column, id_column, id_type, rows, parts, listing)


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _text(value: Any) -> str | Bad:
    if isinstance(value, str):
        return (value if is_unicode(value) else _NOT_UNICODE) if value and not value.isspace() else Bad("is empty")
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
            return Bad("has an id that is no string")
        return value if is_unicode(value) else Bad("has an id that is not valid Unicode")
    if not isinstance(value, int) or isinstance(value, bool):
        return Bad("has an id that is no whole number")
    return value if -(2**63) <= value < 2**63 else Bad("has an id that is not between -2**63 and 2**63 - 1")


_NOT_UNICODE = Bad("is not valid Unicode")


def _behind(wanted: Wanted, first: int) -> Wanted:
    """``wanted`` for rows that are counted from ``first``."""

    def shifted(row: int) -> tuple[int, int]:
        start, stop = wanted(first + row)
        return start - first, stop - first

    return shifted


# ---------------------------------------------------------------------------------------------------------------- finding


def _find_parts(data: str | Path | Dataset, split: str) -> tuple[dict[str, Any], list[_Part], list[str]]:
    """What identifies the data, its parts in order, and a line for each file."""
    if isinstance(data, Dataset) or str(data) == INSTALLED_DOCS:
        table = as_dataset(data, split=split)
        source_id = {"path": "rows in memory" if data is table else str(data), "digest": table._fingerprint}
        return source_id, [_table_part(table)], []
    source = source_named(data)
    if any(rows for _, rows in split_parts(split)) or "+" in split:
        raise ValueError(f"split={split!r} is more or less than one split; name one, such as train (--split).")
    path = Path(source.path).expanduser()
    if not path.exists():
        return *_find_hub(source, split), []
    check_local(source)
    if path.is_file():
        files = [path]
    else:
        groups, name = group_by_split(path), SPLITS.get(split, split)
        if name not in groups:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(sorted(groups))} (--split).")
        files = groups[name]
        if left_out := describe_groups(groups, [name]):
            logger.warning("Of the folder %s, the split %s is read; left out: %s. Choose with --split.", path, name, left_out)
    if unknown := sorted({file.suffix for file in files} - _KINDS.keys()):
        raise ValueError(f"{files[0]} cannot be read: {', '.join(unknown)} is none of {', '.join(_KINDS)}.")
    if empty := [file for file in files if not file.stat().st_size]:
        raise ValueError(f"{empty[0]} is empty; give a file that holds data.")
    for file in files:
        check_name(str(file))
    root = path if path.is_dir() else path.parent
    listing = [f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files]
    source_id = {"path": str(data), "files": len(files), "digest": digest(listing)}
    if path.is_dir():
        source_id["split"] = split
    return source_id, [_file_part(file) for file in files], listing


def digest(listing: Sequence[str]) -> str:
    """What identifies files: their names and sizes."""
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _find_hub(source: DataSource, split: str) -> tuple[dict[str, Any], list[_Part]]:
    check_hub_name(source)
    with hub_errors(source):
        # The commit is pinned, so that rows have the same numbers when the work is resumed.
        revision = source.revision or HfApi().dataset_info(source.path).sha
        stream = load_dataset(source.path, source.config, split=split, revision=revision, streaming=True)
    name = source.path if source.config is None else f"{source.path}:{source.config}"
    known = (stream.info.splits or {}).get(split)
    rows = (known.num_examples if known else 0) or 0
    part = _Part(name, rows, _read_stream, stream, _stream_columns)
    return {"path": name, "split": split, "revision": revision}, [part]


def _file_part(file: Path) -> _Part:
    blocks, columns = _KINDS[file.suffix]
    part = _Part(str(file), file.stat().st_size, blocks, file, columns)
    if blocks is _read_parquet:
        with part.plain_errors():
            part.size = parquet.read_metadata(file).num_rows
    return part


def _table_part(table: Dataset) -> _Part:
    return _Part("the rows", len(table), _read_table, table, lambda table: _types(table.features.arrow_schema))


# ---------------------------------------------------------------------------------------------------------------- reading


def _types(schema: pa.Schema) -> dict[str, pa.DataType]:
    return dict(zip(schema.names, schema.types, strict=True))


_KINDS_OF_VALUES: tuple[tuple[type, pa.DataType], ...] = (
    (str, pa.string()),
    (bool, pa.bool_()),  # before int, which it is too
    (int, pa.int64()),
    (float, pa.float64()),
    (list, pa.list_(pa.null())),
    (dict, pa.struct([])),
    (type(None), pa.null()),
)


def _types_of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, pa.DataType]:
    """Columns of rows that bring no types: what the first value that is not missing suggests."""
    found: dict[str, pa.DataType] = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, pa.null()) == pa.null():
                found[name] = next((kind for of, kind in _KINDS_OF_VALUES if isinstance(value, of)), pa.binary())
    return found


def _parquet_columns(file: Path) -> dict[str, pa.DataType]:
    return _types(parquet.read_schema(file))


def _read_parquet(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    """Row groups without a wanted row are not read at all."""
    with parquet.ParquetFile(part.content) as file:
        if double := [name for name in names if file.schema_arrow.names.count(name) > 1]:
            raise ValueError(f"{part.name} has more than one column named {double[0]!r}; rename all but one.")
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if wanted(part.seen)[0] >= part.seen + size:
                part.seen += size
                continue
            for batch in file.iter_batches(batch_size=_BLOCK, row_groups=[group], columns=names, use_threads=False):
                yield _Block(part.seen, [batch.column(name).to_pylist() for name in names], part.seen / part.size)
                part.seen += len(batch)


def _lines(part: _Part, wanted: Wanted, *, blanks: bool) -> Iterator[tuple[int, list[str], float]]:
    """Blocks of wanted lines: (number of the first, lines, share read). Others are passed over undecoded."""
    block: list[str] = []
    start, stop = wanted(0)
    with part.content.open("rb") as file:
        for line in file:
            if not blanks and not line.strip():
                continue
            if part.seen >= stop:
                start, stop = wanted(part.seen)
            if part.seen >= start:
                block.append(line.decode("utf-8-sig" if part.seen == 0 else "utf-8").rstrip("\r\n"))
            part.seen += 1
            if block and (len(block) == _BLOCK or part.seen >= stop):
                yield part.seen - len(block), block, file.tell() / part.size
                block = []
    if block:
        yield part.seen - len(block), block, 1.0


def _read_text(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    for first, lines, share in _lines(part, wanted, blanks=True):
        yield _Block(first, [lines for _ in names], share)


def _is_array(file: Path) -> bool:
    """Whether a JSON file is one array, instead of an object per line."""
    with file.open("rb") as content:
        return content.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_columns(file: Path) -> dict[str, pa.DataType]:
    if _is_array(file):
        rows = _array(file)
    else:
        part = _Part(str(file), 1, _read_json, file, _json_columns)
        blocks = islice(_lines(part, lambda row: (0, _PEEK), blanks=False), 1)
        rows = [_parse(line) for _, lines, _ in blocks for line in lines]
    columns = _types_of_rows([row for row in rows[:_PEEK] if isinstance(row, dict)])
    if not columns:
        raise ValueError(
            f"{file} holds no JSON objects in its first {_PEEK} rows; give one object per line, such as "
            '{"text": "a text"}, or an array of objects.'
        )
    return columns


def _array(file: Path) -> list[Any]:
    """The rows of a JSON file that is one array."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as a JSON array: {error}. Repair it, or save it again.") from error
    return rows


_NO_OBJECT = Bad("is no JSON object")


def _parse(line: str) -> dict[str, Any] | Bad:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return _NO_OBJECT
    except RecursionError:
        return Bad("is nested too deeply")
    except ValueError:  # Python converts no number of thousands of digits
        return Bad("holds a number of too many digits")
    return row if isinstance(row, dict) else _NO_OBJECT


def _read_json(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    """One object per line; an array is read whole."""
    if _is_array(part.content):
        rows = [row if isinstance(row, dict) else _NO_OBJECT for row in _array(part.content)]
        blocks: Iterator[tuple[int, list[Any], float]] = iter([(0, rows, 1.0)])
        part.seen = len(rows)
    else:
        parsed = _lines(part, wanted, blanks=False)
        blocks = ((first, [_parse(line) for line in lines], share) for first, lines, share in parsed)
    for first, rows, share in blocks:
        yield _Block(first, [[row if isinstance(row, Bad) else row.get(name) for row in rows] for name in names], share)


def _csv_options(file: Path) -> dict[str, Any]:
    return {**CSV_OPTIONS, "sep": "\t" if file.suffix == ".tsv" else ",", "encoding": "utf-8-sig"}


def _csv_columns(file: Path) -> dict[str, pa.DataType]:
    with no_value_dropped():
        found = pd.read_csv(file, nrows=_PEEK, **_csv_options(file))
    numbers = pd.api.types.is_numeric_dtype
    return {str(name): pa.float64() if numbers(found[name]) else pa.string() for name in found.columns}


def _read_csv(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    """Every value as it is written; what is empty is missing."""
    with part.content.open("rb") as file:
        # All columns, also those that nobody asked for: of some of them pandas would not say that a row has too many values.
        chunks = pd.read_csv(file, chunksize=_BLOCK, dtype=object, **_csv_options(part.content))
        while True:
            with no_value_dropped():
                chunk = next(chunks, None)
            if chunk is None:
                return
            columns = [chunk[name].astype(object).where(chunk[name].notna(), None).tolist() for name in names]
            yield _Block(part.seen, columns, min(1.0, file.tell() / part.size))
            part.seen += len(chunk)


def _read_table(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    table = part.content.select_columns(names).with_format(None)
    while part.seen < len(table):
        start, stop = wanted(part.seen)
        start, stop = max(start, part.seen), min(stop, len(table), max(start, part.seen) + _BLOCK)
        if start >= len(table):
            part.seen = len(table)
            return
        rows = table[start:stop]
        yield _Block(start, [rows[name] for name in names], stop / len(table))
        part.seen = stop


def _stream_columns(stream: IterableDataset) -> dict[str, pa.DataType]:
    if stream.features is not None:
        return _types(stream.features.arrow_schema)
    return _types_of_rows(list(stream.take(_PEEK)))


def _read_stream(part: _Part, names: list[str], wanted: Wanted) -> Iterator[_Block]:
    part.seen = min(wanted(0)[0], 2**62)
    for rows in part.content.skip(part.seen).select_columns(names).iter(batch_size=_BLOCK):
        size = len(rows[names[0]])
        yield _Block(part.seen, [list(rows[name]) for name in names], min(1.0, part.seen / part.size) if part.size else 0.0)
        part.seen += size


# Suffix of a file to what reads it and what tells its columns: the kinds that data.load reads.
_TEXT = {"text": pa.string()}
_READERS = {
    "parquet": (_read_parquet, _parquet_columns),
    "json": (_read_json, _json_columns),
    "csv": (_read_csv, _csv_columns),
    "text": (_read_text, lambda file: _TEXT),
}
_KINDS = {suffix: _READERS[builder] for suffix, (builder, _) in BUILDERS.items()}
# Readers whose parts have a size in rows.
_COUNTED = (_read_parquet, _read_table)
