"""Read the rows of local files. All commands read files through this module, so a file has the same rows for all of them.

``READERS`` has the functions for each kind of file. The commands that encode read blocks
of the values of some columns. All other commands read tables of all columns.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, config
from datasets.table import MemoryMappedTable
from filelock import FileLock
from pyarrow import parquet
from tqdm.auto import tqdm

from minibert.files.disk import atomic_write, refuse_link, sha256
from minibert.files.terminal import printable

logger = logging.getLogger(__name__)

BLOCK = 512  # rows in memory
PEEK = 100  # rows that show the columns of a file without a schema
_FORMAT = 2  # of the cached tables
_LEFT_OUT = b"left_out"  # key of the schema's metadata: column -> why it is not in the table
_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []  # copies of pipes, until the process ends
_MIXED = "its values have no common type"
Types = dict[str, Any]  # the Arrow type of each column; a string says why a column has none
Block = tuple[int, Iterator[list[list[Any]]]]  # the number of rows, and the values of each column


class Bad(NamedTuple):
    """Mark a value that cannot be used. ``reason`` states why, for example "is empty"."""

    reason: str


class Reader(NamedTuple):
    """Read one kind of file.

    Attributes:
        columns: returns the types of the columns, as the first rows show them.
        blocks: yields the values of the named columns, as they are written.
        types: yields the types of all columns in each block.
        tables: yields all columns of each block with the types of a schema.
    """

    columns: Callable[[Path], Types]
    blocks: Callable[[Path, list[str]], Iterator[Block]]
    types: Callable[[Path], Iterable[Types]]
    tables: Callable[[Path, pa.Schema], Iterator[pa.Table]]


def read_table(files: Sequence[Path], sample_by: str = "line") -> Dataset:
    """Return all rows of ``files``, which are of one kind, as a memory-mapped table.

    The cache of ``datasets`` keeps the table under a digest of the contents, so a file that
    was replaced is read again. Every column has one type in all rows. A column whose values
    have no common type is left out with a warning.
    """
    contents = [(file.suffix.lower(), sha256(file)) for file in files]
    key = hashlib.sha256(repr((_FORMAT, sample_by, contents)).encode()).hexdigest()
    target = Path(config.HF_DATASETS_CACHE) / "minibert-rows" / f"{key[:32]}.arrow"
    target.parent.mkdir(parents=True, exist_ok=True)
    for place in (target.parent, target, lock := target.with_suffix(".arrow.lock")):
        refuse_link(place)
    with FileLock(lock):
        if not target.exists():
            with atomic_write(target) as part:
                _write_table(part, files, sample_by)
    table = MemoryMappedTable.from_file(str(target))
    for name, reason in json.loads(table.schema.metadata[_LEFT_OUT]).items():
        logger.warning("%s: column %r is left out, since %s.", files[0], name, reason)
    return Dataset(table, fingerprint=key[:16])


def _write_table(path: Path, files: Sequence[Path], sample_by: str) -> None:
    reader, schema = READERS[kind_of(files[0])], _common_schema(files)
    bar = tqdm(desc=f"read {printable(files[0].name)}", unit=" rows", unit_scale=True, delay=2)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer, bar:
        for file in files:
            with plain_errors(file):
                whole = kind_of(file) == "text" and sample_by != "line"
                for table in _samples(file, sample_by) if whole else reader.tables(file, schema):
                    for column in table.columns:
                        column.validate(full=True)  # else bytes that are not UTF-8 would fail much later
                    writer.write_table(table)
                    bar.update(len(table))


def _common_schema(files: Sequence[Path]) -> pa.Schema:
    """Return the columns of ``files`` with types that hold the values of all rows."""
    found: Types = {}
    declared: list[Features] = []
    for file in files:
        reader = READERS[kind_of(file)]
        with plain_errors(file):
            for types in reader.types(file):
                for name, kind in types.items():
                    found[name] = _common_type(found.get(name, kind), kind, file)
            if reader is READERS["parquet"]:
                declared.append(_features(parquet.read_schema(file)))
    left_out = {name: kind for name, kind in found.items() if isinstance(kind, str)}
    features = _features(pa.schema([(name, kind) for name, kind in found.items() if name not in left_out]))
    left_out |= {name: f"it holds {kind}" for name, kind in found.items() if name not in left_out and name not in features}
    for name in features if declared else ():  # names of classes survive where all files have the same
        known = declared[0].get(name)
        if isinstance(known, ClassLabel) and all(some.get(name) == known for some in declared):
            features[name] = known
    schema = features.arrow_schema
    return schema.with_metadata({**schema.metadata, _LEFT_OUT: json.dumps(left_out)})


def _features(schema: pa.Schema) -> Features:
    """Return the features of the columns that ``datasets`` can represent."""
    features = Features()
    for field in schema:
        with contextlib.suppress(TypeError, ValueError):
            features[field.name] = Features.from_arrow_schema(pa.schema([field]))[field.name]
    known = b"huggingface" in (schema.metadata or {})
    return Features.from_arrow_schema(schema) if known and len(features) == len(schema) else features


def _common_type(left: Any, right: Any, file: Path) -> Any:
    """Return the type of a column whose blocks have the types ``left`` and ``right``, or why it has none."""
    if left == right or isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else right
    try:
        return pa.unify_schemas([pa.schema([("", left)]), pa.schema([("", right)])], promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return pa.string() if kind_of(file) == "csv" else _MIXED


# ----------------------------------------------------------------------------------------------------- files


def kind_of(file: Path) -> str:
    """Return the key of ``READERS`` for a file, or an empty string for a suffix that is not read."""
    return _KINDS.get(file.suffix.lower(), "")


def spooled(path: Path) -> Path:
    """Return ``path``, or a copy of what a pipe holds, since a pipe can be read only once.

    A pipe has no suffix, so its first bytes show the kind of its rows. A warning names it.
    """
    if path.is_dir() or kind_of(path) or not (path.is_fifo() or path.is_socket() or path.parts[:2] == ("/", "dev")):
        return path
    if path.is_char_device():
        raise ValueError(f"{path} is a device, not a file; give a file, a folder or a pipe.")
    return _copy_of_pipe(path)


@cache
def _copy_of_pipe(path: Path) -> Path:
    _SCRATCH.append(tempfile.TemporaryDirectory(prefix="minibert-"))
    copy = Path(_SCRATCH[-1].name) / "pipe"
    with path.open("rb") as pipe, copy.open("wb") as file:
        shutil.copyfileobj(pipe, file)
    with copy.open("rb") as file:
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    line = re.split(rb"[\r\n]", first)[0]
    if first.startswith(b"PAR1"):
        suffix = ".parquet"
    elif first.startswith((b"{", b"[")):
        suffix = ".jsonl"
    elif re.fullmatch(rb"\w+(\t\w+)+", line):
        suffix = ".tsv"
    else:
        suffix = ".csv" if re.fullmatch(rb"\w+([,;]\w+)+|text", line) else ".txt"
    logger.warning("%s is a pipe; its rows are read as those of a %s file.", path, suffix)
    return copy.rename(copy.with_suffix(suffix))


@contextlib.contextmanager
def plain_errors(file: Path) -> Iterator[None]:
    """Convert the errors of libraries about a damaged file into a ValueError with the file name."""
    parsing = (pd.errors.ParserWarning, pd.errors.ParserError, pd.errors.EmptyDataError)
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, *parsing) as error:
        if isinstance(error, OSError) and error.errno is not None:  # pyarrow reports damage as an OSError without a number
            raise
        _refuse_other_encodings(file)
        raise ValueError(_why_unreadable(file, error)) from error


def _refuse_other_encodings(file: Path) -> None:
    """Raise a ValueError for the first line that is not UTF-8. Read one line at a time."""
    if kind_of(file) == "parquet":
        return
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not UTF-8: line {number} cannot be decoded. Convert the file, for example with iconv -t UTF-8."
                ) from error


def _why_unreadable(file: Path, error: BaseException) -> str:
    if isinstance(error, pd.errors.ParserWarning):
        return (
            f"{file} has a row with more values than its first line has columns. Name every column "
            "in the first line, or put texts that contain the separator in quotes."
        )
    reason = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError) or "Invalid UTF8" in reason:
        return f"{file} holds a text that is not UTF-8. Repair it, or save it again."
    if isinstance(error, pd.errors.EmptyDataError):
        return f"{file} has no rows; give a file that holds data."
    return f"{file} cannot be read as {file.suffix.lstrip('.')}: {reason.rstrip('.')}. Repair it, or save it again."


# ------------------------------------------------------------------------------------------------ kinds of file


def _types(schema: pa.Schema) -> Types:
    return {field.name: _plain_type(field.type) for field in schema}


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the usual type of the same values, without a view, a dictionary or long offsets."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    shorter = {pa.string_view(): pa.string(), pa.large_string(): pa.string(), pa.binary_view(): pa.binary()}
    return shorter.get(kind, kind)


def _parquet_types(file: Path) -> Iterator[Types]:
    schema = parquet.read_schema(file)
    double = {name: "there is another column of its name" for name in schema.names if schema.names.count(name) > 1}
    yield {**_types(schema), **double}


def types_of_rows(rows: Iterable[dict[str, Any]]) -> Types:
    """Return the type of each column, inferred from the first value that is not null."""
    found: Types = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, pa.null()) == pa.null():
                found[name] = pa.infer_type([value])
    return found


def _parquet_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    with parquet.ParquetFile(path) as file:
        if double := [name for name in names if file.schema_arrow.names.count(name) > 1]:
            raise ValueError(f"{path} has more than one column named {double[0]!r}; rename all but one.")
        for group in range(file.num_row_groups):
            batches = file.iter_batches(BLOCK, [group], names, use_threads=False)
            values = ([batch.column(name).to_pylist() for name in names] for batch in batches)
            yield file.metadata.row_group(group).num_rows, values


def _parquet_tables(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with parquet.ParquetFile(path) as file:
        names = [name for name in schema.names if name in file.schema_arrow.names]
        for batch in file.iter_batches(BLOCK, columns=names, use_threads=False):
            columns = {name: batch.column(name) for name in names}
            missing = {name: pa.nulls(len(batch)) for name in schema.names if name not in columns}
            yield pa.table({**columns, **missing}).select(schema.names).cast(schema)


def read_lines(stream: Any) -> Iterator[str]:
    """Yield the lines of an opened binary file without their ends, which are LF, CR or CRLF.

    The lines must be UTF-8. A byte order mark at the start is not part of the first line.
    """
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None) as text:
        for line in text:
            yield line.removesuffix("\n")


def _line_blocks(path: Path) -> Iterator[list[str]]:
    lines = read_lines(path.open("rb"))
    while block := list(islice(lines, BLOCK)):
        yield block


def _text_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    return ((len(lines), iter([[lines] * len(names)])) for lines in _line_blocks(path))


def _text_tables(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    return (pa.table([lines], schema=schema) for lines in _line_blocks(path))


def _samples(path: Path, sample_by: str) -> Iterator[pa.Table]:
    """Yield the paragraphs of a text file, which end at an empty line, or the complete text."""
    whole: list[str] = []
    for line in chain.from_iterable(_line_blocks(path)):
        if line.strip() or sample_by == "document":
            whole.append(line)
        elif whole:
            yield pa.table({"text": ["\n".join(whole)]})
            whole = []
    if whole:
        yield pa.table({"text": ["\n".join(whole)]})


def _json_columns(path: Path) -> Types:
    rows = next(_json_rows(path), [])
    parsed = map(_parse, rows[:PEEK])
    columns = types_of_rows(row for row in parsed if isinstance(row, dict))
    if not columns:
        raise ValueError(
            f"{path} holds no JSON objects in its first {PEEK} rows; give one object per line, such as "
            '{"text": "a text"}, or an array of objects.'
        )
    return columns


def _json_rows(path: Path) -> Iterator[list[Any]]:
    """Yield blocks of rows. A JSON array is one block. In other files, each line is a row."""
    with path.open("rb") as file:
        is_array = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not is_array:
        for lines in _line_blocks(path):
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
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except json.JSONDecodeError:
            row = None
        except RecursionError:
            return Bad("is nested too deeply")
        except ValueError:  # Python does not convert numbers of thousands of digits
            return Bad("holds a number of too many digits")
    return row if isinstance(row, dict) else Bad("is not a JSON object")


def _json_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    return ((len(rows), _json_values(rows, names)) for rows in _json_rows(path))


def _json_values(raw: list[Any], names: list[str]) -> Iterator[list[list[Any]]]:
    rows = [_parse(row) for row in raw]
    yield [[row if isinstance(row, Bad) else row.get(name) for row in rows] for name in names]


def _json_objects(path: Path) -> Iterator[list[dict[str, Any]]]:
    done = 0
    for rows in _json_rows(path):
        parsed = []
        for number, row in enumerate(map(_parse, rows), start=done + 1):
            if isinstance(row, Bad):
                raise ValueError(f"{path}: row {number} {row.reason}. Correct it or remove the row.")
            parsed.append(row)
        yield parsed
        done += len(rows)


def _json_types(path: Path) -> Iterator[Types]:
    for rows in _json_objects(path):
        names = dict.fromkeys(name for row in rows for name in row)
        yield {name: _inferred([row.get(name) for row in rows]) for name in names}


def _inferred(values: list[Any]) -> Any:
    try:
        return pa.array(values).type
    except UnicodeEncodeError:
        return "a text in it is not valid Unicode"
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return _MIXED


def _json_tables(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    for rows in _json_objects(path):
        yield pa.table([pa.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema)


def _csv_options(path: Path) -> dict[str, Any]:
    """Return how pandas reads a file: texts such as "NA" stay texts, and no column becomes an index."""
    options = {"keep_default_na": False, "na_values": [""], "index_col": False, "low_memory": False, "encoding": "utf-8-sig"}
    if path.suffix.lower() == ".tsv":  # a quotation mark in TSV is a character, as GLUE and others publish it
        return {**options, "sep": "\t", "quoting": csv.QUOTE_NONE}
    return {**options, "sep": _separator(path, path.stat().st_mtime_ns)}


@cache
def _separator(path: Path, _: int) -> str:
    """Return the separator of a CSV file: the comma, or the semicolon or tab of a first line without a comma."""
    with path.open("rb") as file:
        first = re.sub(rb'"[^"]*"', b"", re.split(rb"[\r\n]", file.read(65536))[0])
    for separator in (";", "\t") if b"," not in first else ():
        if separator.encode() in first:
            logger.warning("%s: the columns are separated by %s.", path, "semicolons" if separator == ";" else "tabs")
            return separator
    return ","


def _csv_chunks(path: Path, rows: int = 20 * BLOCK, **options: Any) -> Iterator[pd.DataFrame]:
    # All columns are read: of some alone, pandas reports no row with too many values.
    with pd.read_csv(path, chunksize=rows, **_csv_options(path), **options) as chunks:
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # instead of dropping values beyond the last column
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _csv_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    return ((len(chunk), _csv_values(chunk, names)) for chunk in _csv_chunks(path, BLOCK, dtype=object))


def _csv_values(chunk: pd.DataFrame, names: list[str]) -> Iterator[list[list[Any]]]:
    """Yield the values of the columns as strings, with None for an empty value."""
    yield [chunk[name].astype(object).where(chunk[name].notna(), None).tolist() for name in names]


def _csv_types(path: Path) -> Iterator[Types]:
    for chunk in _csv_chunks(path):
        empty = {name: pa.null() if len(chunk) else pa.string() for name in chunk.columns if chunk[name].isna().all()}
        yield {**_types(pa.Schema.from_pandas(chunk, preserve_index=False)), **empty}


def _csv_tables(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    written = {field.name: object for field in schema if field.type == pa.string()}  # so that 007 stays 007
    for chunk in _csv_chunks(path, dtype=written):
        columns = [pa.nulls(len(chunk)) if pa.types.is_null(kind) else chunk[name] for name, kind in _types(schema).items()]
        yield pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


_TEXT = {"text": pa.string()}
READERS = {
    "parquet": Reader(
        lambda file: _types(parquet.read_schema(file)),
        _parquet_blocks,
        _parquet_types,
        _parquet_tables,
    ),
    "json": Reader(_json_columns, _json_blocks, _json_types, _json_tables),
    "csv": Reader(lambda file: next(_csv_types(file), {}), _csv_blocks, _csv_types, _csv_tables),
    "text": Reader(lambda _: _TEXT, _text_blocks, lambda _: [_TEXT], _text_tables),
}
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
SUFFIXES = ", ".join(_KINDS)
