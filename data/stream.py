"""Read data of any size in blocks of rows, from files, the Hub or memory.

Unlike :mod:`minibert.data.load`, this module copies nothing to disk. An unusable value is
replaced by a :class:`Bad`. The caller can then refuse or skip the row.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset, IterableDataset
from pyarrow import parquet

from minibert.data.columns import pick_columns
from minibert.data.files import BLOCK, BLOCKS, PEEK, Bad, Block, first_types, kind_of, plain_errors, plain_types, types_of_rows
from minibert.data.load import SPLITS, as_dataset, find_files, is_unicode, local_path, open_hub_stream, source_named
from minibert.data.source import INSTALLED_DOCS, split_parts
from minibert.files.disk import sha256

# The text column, if several columns hold strings: the first of these names.
USUAL_COLUMNS = ("text", "passage", "answer", "sentence")


class Rows(NamedTuple):
    """Store consecutive rows of the data."""

    first: int  # the number of the first row in the complete data, from 0
    texts: list[str | Bad]
    ids: list[Any] | None  # the values of the id column, or None without an id column
    part: str  # the name of the file that contains the rows
    first_in_part: int  # the number of the first row in this file, from 0


class _Part(NamedTuple):
    """Describe a file or a data set. ``content`` is the path or the data set."""

    name: str
    content: Path | Dataset | IterableDataset

    def columns(self) -> dict[str, Any]:
        """Return the types of the columns, as the first rows show them."""
        if isinstance(self.content, Path):
            return first_types(self.content)
        features = self.content.features
        return types_of_rows(self.content.take(PEEK)) if features is None else plain_types(features.arrow_schema)

    def blocks(self, names: list[str]) -> Iterator[Block]:
        """Yield the values of the named columns in blocks."""
        if isinstance(self.content, Path):
            yield from BLOCKS[kind_of(self.content)](self.content, names)
            return
        for batch in self.content.select_columns(names).with_format(None).iter(batch_size=BLOCK):
            yield len(batch[names[0]]), iter([[list(batch[name]) for name in names]])


@dataclass
class Stream:
    """Read the rows of an opened data set in order."""

    source: dict[str, Any]  # identifies the data; the entry "path" names it
    column: str  # the text column
    id_column: str | None
    id_type: pa.DataType
    rows: int | None  # None if the number is known only after reading all rows
    parts: list[_Part] = field(repr=False)
    listing: list[str] = field(repr=False)  # the name and digest of each file

    def begins_with(self, source: dict[str, Any]) -> bool:
        """Return True if this stream starts with the files in ``source``, an earlier input."""
        return "files" in source and digest(self.listing[: source["files"]]) == source["digest"]

    def read(self, ranges: Iterable[range] = (range(2**63),)) -> Iterator[Rows]:
        """Yield blocks of the rows in the sorted ``ranges``. No block spans two ranges."""
        names = list(dict.fromkeys([self.column, self.id_column or self.column]))
        left, row = iter(ranges), 0
        wanted = next(left, None)
        for part in self.parts:
            begin, known = row, part.columns()
            with plain_errors(part.content) if isinstance(part.content, Path) else contextlib.nullcontext():
                if missing := [name for name in names if name not in known]:
                    raise ValueError(f"{part.name} has no column {missing[0]!r}; it has {', '.join(known)}.")
                for size, values in part.blocks(names):
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
    columns = parts[0].columns()
    kinds = {kind_of(part.content) if isinstance(part.content, Path) else "" for part in parts}
    strings = [name for name, kind in columns.items() if kind == pa.string()]
    usual = [(name,) for name in USUAL_COLUMNS]
    if column not in columns:  # rows without a text are reported one by one
        (column,) = pick_columns(strings, column and [column], usual, option="--column", columns=list(columns))
    if id_column is not None and id_column not in columns:
        raise ValueError(f"Column {id_column!r} is not in the data; the columns are {', '.join(columns)} (--id-column).")
    id_type = pa.int64() if id_column is None else columns[id_column]
    if id_column is not None and "csv" in kinds:
        id_type = pa.string()  # CSV values are kept as written, so that 007 stays 007
    if not (pa.types.is_integer(id_type) or id_type == pa.string()):
        kind = f"numbers with a fraction ({id_type})" if pa.types.is_floating(id_type) else id_type
        raise ValueError(f"Column {id_column!r} holds {kind}; ids are strings or whole numbers (--id-column).")
    rows: int | None = None
    if isinstance(parts[0].content, Dataset):
        rows = len(parts[0].content)
    elif kinds == {"parquet"}:
        rows = 0
        for part in parts:
            with plain_errors(part.content):
                rows += parquet.read_metadata(part.content).num_rows
    return Stream(source, column, id_column, pa.string() if id_type == pa.string() else pa.int64(), rows, parts, listing)


def _text(value: Any) -> str | Bad:
    if isinstance(value, Bad):
        return value
    if not isinstance(value, str):
        return Bad("has no text" if value is None else f"is of type {type(value).__name__}, not a string")
    if not value or value.isspace():
        return Bad("is empty")
    return value if is_unicode(value) else Bad("is not valid Unicode")


def _id(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, Bad):
        return value
    if value is None:
        return Bad("has no id")
    if kind == pa.string():
        known = isinstance(value, str) and is_unicode(value)
        return value if known else Bad("has an id that is not a string of valid Unicode")
    known = type(value) is int and -(2**63) <= value < 2**63
    return value if known else Bad("has an id that is not a whole number between -2**63 and 2**63 - 1")


def _find_parts(data: str | Path | Dataset, split: str) -> tuple[dict[str, Any], list[_Part], list[str]]:
    """Return :attr:`Stream.source`, the files, and the name and digest of each file."""
    if isinstance(data, Dataset) or str(data) == INSTALLED_DOCS:
        table = as_dataset(data, split=split)
        source_id = {"path": "rows in memory" if data is table else str(data), "digest": table._fingerprint}
        return source_id, [_Part("the rows", table)], []
    source = source_named(data)
    if any(rows for _, rows in split_parts(split)) or "+" in split:
        raise ValueError(f"split={split!r} does not name exactly one split; use a name such as train (--split).")
    path = local_path(source)
    if path is None:
        stream, commit = open_hub_stream(source, split)
        return {"path": str(data), "split": split, "revision": commit}, [_Part(str(data), stream)], []
    files = next(iter(find_files(path, [SPLITS.get(split, split)], "--split", expected=()).values()))
    for file in files:
        source_named(file)  # raises an error if the name is not UTF-8
    root = path if path.is_dir() else path.parent
    listing = [f"{file.relative_to(root).as_posix()} {sha256(file)}\n" for file in files]
    source_id = {"path": str(data), "files": len(files), "digest": digest(listing)}
    if path.is_dir():
        source_id["split"] = split
    return source_id, [_Part(str(file), file) for file in files], listing


def digest(listing: Sequence[str]) -> str:
    """Return the SHA-256 of ``listing``, a list of file names with digests of the contents."""
    return hashlib.sha256("".join(listing).encode()).hexdigest()
