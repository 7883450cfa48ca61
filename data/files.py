"""Read the rows of local files. All commands read files through this module, so a file has the same rows for all of them.

The commands that encode read blocks of the values of some columns. All other commands read
tables of all columns.
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
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, islice
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
_SHOWN = {  # how the rows in a pipe begin
    ".parquet": rb"PAR1",
    ".jsonl": rb"[{\[]",
    ".tsv": rb"\w+(\t\w+)+([\r\n]|\Z)",
    ".csv": rb"(\w+([,;]\w+)+|text)([\r\n]|\Z)",
}
_MIXED = "its values have no common type"
_PARSING = (pd.errors.ParserWarning, pd.errors.ParserError, pd.errors.EmptyDataError)
Types = dict[str, Any]  # the Arrow type of each column; a string says why a column has none
Block = tuple[int, Iterator[list[list[Any]]]]  # the number of rows, and the values of each column


class Bad(NamedTuple):
    """Mark a value that cannot be used. ``reason`` states why, for example "is empty"."""

    reason: str


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
    with contextlib.nullcontext() if target.exists() else FileLock(lock):  # a filled cache may be read-only
        if not target.exists():
            with atomic_write(target) as part:
                _write_table(part, files, sample_by)
    table = MemoryMappedTable.from_file(str(target))
    for name, reason in json.loads(table.schema.metadata[_LEFT_OUT]).items():
        logger.warning("%s: column %r is left out, since %s.", files[0], name, reason)
    return Dataset(table, fingerprint=key[:16])


def _write_table(path: Path, files: Sequence[Path], sample_by: str) -> None:
    schema = _common_schema(files)
    bar = tqdm(desc=f"read {printable(files[0].name)}", unit=" rows", unit_scale=True, delay=2)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer, bar:
        for file in files:
            with plain_errors(file):
                for table in _TABLES[kind_of(file)](file, schema, sample_by):
                    for column in table.columns:
                        column.validate(full=True)  # else bytes that are not UTF-8 would fail much later
                    writer.write_table(table)
                    bar.update(len(table))


def _common_schema(files: Sequence[Path]) -> pa.Schema:
    """Return the columns of ``files`` with types that hold the values of all rows."""
    found: dict[str, dict[Any, None]] = {}  # the different types of each column
    declared: list[Features] = []
    for file in files:
        with plain_errors(file):
            for types in _TYPES[kind_of(file)](file):
                for name, kind in types.items():
                    found.setdefault(name, {})[kind] = None
            if kind_of(file) == "parquet":
                declared.append(_features(parquet.read_schema(file)))
    common = {name: _common_type(list(kinds), files[0]) for name, kinds in found.items()}
    features = _features(pa.schema([(name, kind) for name, kind in common.items() if not isinstance(kind, str)]))
    left_out = {name: kind if isinstance(kind, str) else f"it holds {kind}" for name, kind in common.items()}
    left_out = {name: reason for name, reason in left_out.items() if name not in features}
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
            features[field.name] = Features.from_arrow_schema(pa.schema([field], schema.metadata))[field.name]
    return features


def _common_type(kinds: Sequence[Any], file: Path) -> Any:
    """Return the type of a column whose blocks have the types ``kinds``, or why it has none."""
    if reasons := [kind for kind in kinds if isinstance(kind, str)]:
        return reasons[0]
    try:
        schemas = [pa.schema([("", kind)]) for kind in kinds]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return pa.string() if kind_of(file) == "csv" else _MIXED


# ----------------------------------------------------------------------------------------------------- files


def kind_of(file: Path) -> str:
    """Return the kind of a file, or an empty string for a suffix that is not read."""
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
    suffix = next((suffix for suffix, pattern in _SHOWN.items() if re.match(pattern, first)), ".txt")
    logger.warning("%s is a pipe; its rows are read as those of a %s file.", path, suffix)
    return copy.rename(copy.with_suffix(suffix))


@contextlib.contextmanager
def plain_errors(file: Path) -> Iterator[None]:
    """Convert the errors of libraries about a damaged file into a ValueError with the file name."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid, *_PARSING) as error:
        if getattr(error, "errno", None) is not None:  # pyarrow reports damage as an OSError without a number
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, pd.errors.ParserWarning):
            problem = (
                "has a row with more values than its first line has columns. Name every column "
                "in the first line, or put texts that contain the separator in quotes."
            )
        elif isinstance(error, UnicodeDecodeError) and kind_of(file) != "parquet":
            with file.open("rb") as lines:
                number = next(n for n, line in enumerate(lines, start=1) if line.decode(errors="ignore").encode() != line)
            problem = f"is not UTF-8: line {number} cannot be decoded. Convert the file, for example with iconv -t UTF-8."
        elif isinstance(error, UnicodeDecodeError) or "Invalid UTF8" in reason:
            problem = "holds a text that is not UTF-8. Repair it, or save it again."
        elif isinstance(error, pd.errors.EmptyDataError):
            problem = "has no rows; give a file that holds data."
        else:
            problem = f"cannot be read as {file.suffix.lstrip('.')}: {reason}. Repair it, or save it again."
        raise ValueError(f"{file} {problem}") from error


# ------------------------------------------------------------------------------------------------ kinds of file


def plain_types(schema: pa.Schema) -> Types:
    """Return the usual types of the columns."""
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
    yield {**plain_types(schema), **double}


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


def _parquet_tables(path: Path, schema: pa.Schema, _: str) -> Iterator[pa.Table]:
    with parquet.ParquetFile(path) as file:
        present = set(file.schema_arrow.names)
        names = [name for name in schema.names if name in present]
        for batch in file.iter_batches(BLOCK, columns=names, use_threads=False):
            columns = [batch[name] if name in present else pa.nulls(len(batch)) for name in schema.names]
            yield pa.table(columns, schema.names).cast(schema)


def read_lines(stream: Any) -> Iterator[str]:
    """Yield the lines of an opened binary file without their ends, which are LF, CR or CRLF.

    The lines must be UTF-8. A byte order mark at the start is not part of the first line.
    """
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline=None) as text:
        for line in text:
            yield line.removesuffix("\n")


def _in_blocks(lines: Iterator[str]) -> Iterator[list[str]]:
    while block := list(islice(lines, BLOCK)):
        yield block


def _text_types(_: Path) -> Iterator[Types]:
    yield {"text": pa.string()}


def _text_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    return ((len(lines), iter([[lines] * len(names)])) for lines in _in_blocks(read_lines(path.open("rb"))))


def _text_tables(path: Path, schema: pa.Schema, sample_by: str) -> Iterator[pa.Table]:
    """Yield the lines of a text file, the paragraphs, which end at an empty line, or the complete text."""
    texts = read_lines(path.open("rb"))
    if sample_by != "line":
        groups = groupby(texts, key=lambda line: sample_by == "document" or bool(line.strip()))
        texts = ("\n".join(lines) for filled, lines in groups if filled)
    return (pa.table([block], schema=schema) for block in _in_blocks(texts))


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
        for lines in _in_blocks(read_lines(path.open("rb"))):
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
    try:
        row = json.loads(row) if isinstance(row, str) else row
    except (ValueError, RecursionError) as error:
        return Bad(f"is not a JSON object that can be read ({error})")
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


def _json_tables(path: Path, schema: pa.Schema, _: str) -> Iterator[pa.Table]:
    for rows in _json_objects(path):
        yield pa.table([pa.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema)


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
    """Yield blocks of rows. Texts such as "NA" stay texts, and no column becomes an index."""
    if path.suffix.lower() == ".tsv":  # a quotation mark in TSV is a character, as GLUE and others publish it
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    else:
        options["sep"] = _separator(path, path.stat().st_mtime_ns)
    options |= {"keep_default_na": False, "na_values": [""], "index_col": False, "low_memory": False, "encoding": "utf-8-sig"}
    # All columns are read: of some alone, pandas reports no row with too many values.
    with pd.read_csv(path, chunksize=rows, **options) as chunks:
        while True:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # instead of dropping values beyond the last column
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _csv_blocks(path: Path, names: list[str]) -> Iterator[Block]:
    """Yield the values of the columns as strings, with None for an empty value."""
    for chunk in _csv_chunks(path, BLOCK, dtype=object):
        wanted = (chunk[name].astype(object).where(chunk[name].notna(), None).tolist() for name in names)
        yield len(chunk), (list(columns) for columns in [wanted])


def _csv_types(path: Path) -> Iterator[Types]:
    for chunk in _csv_chunks(path):
        empty = {name: pa.null() if len(chunk) else pa.string() for name in chunk.columns if chunk[name].isna().all()}
        yield {**plain_types(pa.Schema.from_pandas(chunk, preserve_index=False)), **empty}


def _csv_tables(path: Path, schema: pa.Schema, _: str) -> Iterator[pa.Table]:
    written = {field.name: object for field in schema if field.type in (pa.string(), pa.null())}  # so that 007 stays 007
    fields = list(zip(schema.names, schema.types, strict=True))
    for chunk in _csv_chunks(path, dtype=written):
        missing = pa.nulls(len(chunk))  # in a column that only another file has
        columns = [pa.array(chunk[name], kind) if name in chunk else missing.cast(kind) for name, kind in fields]
        yield pa.table(columns, schema=schema)


# Each kind has a function for the types of all columns in each block, one for all columns with
# the types of a schema, and one for the values of the named columns, as they are written.
_TYPES = {"parquet": _parquet_types, "json": _json_types, "csv": _csv_types, "text": _text_types}
_TABLES = {"parquet": _parquet_tables, "json": _json_tables, "csv": _csv_tables, "text": _text_tables}
BLOCKS = {"parquet": _parquet_blocks, "json": _json_blocks, "csv": _csv_blocks, "text": _text_blocks}
_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
SUFFIXES = ", ".join(_KINDS)


def first_types(file: Path) -> Types:
    """Return the types of the columns, as the first rows show them."""
    with plain_errors(file):
        if kind_of(file) == "parquet":
            return plain_types(parquet.read_schema(file))
        return _json_columns(file) if kind_of(file) == "json" else next(_TYPES[kind_of(file)](file), {})
