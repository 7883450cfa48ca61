"""Load local files, data sets of the Hub, or the docstrings of installed packages."""

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset, IterableDataset, ReadInstruction, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from minibert.data.columns import pick_columns
from minibert.data.docstrings import load_pairs
from minibert.data.files import SUFFIXES, kind_of, read_table, spooled
from minibert.data.labels import is_text
from minibert.data.source import INSTALLED_DOCS, DataSource, joined_paths, split_parts
from minibert.files.disk import expand_home

logger = logging.getLogger(__name__)

# Usual columns of the text to classify, or of the pair of texts.
TEXT_COLUMNS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("text",), ("sentence",))
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def load(sources: Sequence[DataSource], *, split: str = "train", sample_by: str = "line") -> Dataset:
    """Read ``sources`` and join their rows. Keep only the columns that all sources have.

    Args:
        sources: the data sets to read, such as files, folders or Hub data sets.
        split: the split to read from a source without its own ``split``. A file has no named
            splits, but a slice such as ``train[:100]`` also cuts the rows of a file.
        sample_by: the part of a text file that becomes a row. ``line`` is a line, ``paragraph``
            is the text up to an empty line, and ``document`` is the complete file.

    Raises:
        FileNotFoundError: if a path is neither a local file or folder nor a data set on the
            Hub.
        ValueError: if a file is empty, malformed or not UTF-8, if a split or column does not
            exist, or if the sources have no column in common.
    """
    parts = [_load_one(source, split, sample_by) for source in sources]
    if len(parts) == 1:
        return parts[0]
    shared = [name for name in parts[0].column_names if all(name in part.column_names for part in parts)]
    if not shared:
        found = "; ".join(f"{source.path}: {', '.join(part.column_names)}" for source, part in zip(sources, parts, strict=True))
        raise ValueError(f"The data sets share no column ({found}); rename columns with columns:.")
    return join([part.select_columns(shared) for part in parts])


def join(parts: list[Dataset]) -> Dataset:
    """Join the rows of data sets that have the same columns.

    If the data sets have different classes in a ClassLabel column, the column becomes a column
    of integers. Every other column gets the type of the column in the first data set.
    """
    features = parts[0].features.copy()
    for name, feature in features.items():
        if any(part.features[name] != feature for part in parts) and isinstance(feature, ClassLabel):
            features[name] = Value("int64")
    try:
        return concatenate_datasets([part.cast(features) if part.features != features else part for part in parts])
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"The data sets cannot be joined: the types of a column differ ({error}). Convert the column to one type."
        ) from error


def as_dataset(data: str | Path | Dataset, *, split: str) -> Dataset:
    """Return ``data`` if it is a data set. Otherwise, load the path or Hub id ``data``."""
    return data if isinstance(data, Dataset) else load([source_named(data)], split=split)


def source_named(data: str | Path) -> DataSource:
    """Return the source for a path, or for a Hub id such as owner/name or owner/name:config."""
    name = str(data)
    if not name:
        raise ValueError("The name of the data is empty; give a file, a folder, or the id (owner/name) of a Hub data set.")
    if not is_unicode(name):
        raise ValueError(f"The name {name!r} is not UTF-8; rename the file or folder.")
    return DataSource.model_validate(name)


def is_unicode(text: str) -> bool:
    r"""Return True if ``text`` has no lone surrogates, which tokenizers do not accept.

    >>> is_unicode("café"), is_unicode(b"caf\xe9".decode(errors="surrogateescape"))
    (True, False)
    """
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def check_columns(
    dataset: Dataset,
    wanted: Sequence[str],
    sources: Sequence[DataSource],
    *,
    filled: bool = True,
) -> None:
    """Raise a ValueError for missing columns and, if ``filled`` is True, for missing values."""
    where = joined_paths(sources)
    if missing := [name for name in wanted if name not in dataset.column_names]:
        raise ValueError(
            f"{where} has no column {', '.join(map(repr, missing))}; it has {', '.join(dataset.column_names)}. "
            "Name the columns in the recipe, or rename them with columns: {old: new}."
        )
    for name in wanted:
        if filled and dataset.data.column(name).null_count:
            row = next(row for row, value in enumerate(dataset[name]) if value is None)
            raise ValueError(f"{where} has no value in column {name!r} of row {row + 1}; add it or remove the row.")


def text_columns(dataset: Dataset) -> list[str]:
    """Return the names of all string columns, in the order of the data set."""
    return [name for name, feature in dataset.features.items() if is_text(feature)]


def text_column(rows: Dataset, wanted: str | None, usual: Sequence[str], *, option: str, where: str = "the data") -> str:
    """Return the column ``wanted``, or the first usual column of strings, or the only column of strings."""
    names, every = [(name,) for name in usual], rows.column_names
    (column,) = pick_columns(text_columns(rows), wanted and [wanted], names, option=option, where=where, columns=every)
    return column


def _load_one(source: DataSource, split: str, sample_by: str) -> Dataset:
    if source.path == INSTALLED_DOCS:
        dataset = load_pairs(source.split or split)
    elif path := local_path(source):
        dataset = _load_local(path, source.split, split, sample_by)
    else:
        dataset = _load_hub(source, source.split or split)
    if not len(dataset):
        raise ValueError(f"{source.path} has no rows; give a file or split that holds data.")
    if source.columns:
        check_columns(dataset, list(source.columns), [source], filled=False)
        dataset = dataset.rename_columns(source.columns)
    return dataset if source.limit is None else dataset.select(range(min(source.limit, len(dataset))))


def _load_local(path: Path, split: str | None, default_split: str, sample_by: str) -> Dataset:
    parts = split_parts(split or default_split)
    if path.is_file():  # a single file has no splits, but a slice of it can be taken
        parts = list(dict.fromkeys(("file", rows) for _, rows in parts))
    else:
        parts = [(SPLITS.get(name, name), rows) for name, rows in parts]
    # Other usual splits may be used by other stages. Other names may be a mistake.
    groups = find_files(path, [name for name, _ in parts], "split:", None if split else SPLITS.values())
    if len({kind_of(file) for group in groups.values() for file in group}) > 1:
        raise ValueError(f"{path} contains several file formats; give one file, or a folder per format.")
    tables = {name: read_table(group, sample_by) for name, group in groups.items()}
    chosen = []
    for name, rows in parts:  # ``datasets`` refuses some characters that the name of a split in a folder may have
        (part,) = ReadInstruction.from_spec(f"split{rows}").to_absolute({"split": len(tables[name])})
        chosen.append(tables[name].select(range(part.from_, part.to) if part.to > part.from_ else []))
    return chosen[0] if len(chosen) == 1 else join(chosen)


def find_files(
    path: Path,
    splits: Sequence[str],
    option: str,
    expected: Collection[str] | None,
) -> dict[str, list[Path]]:
    """Return a dictionary from each split in ``splits`` to the data files of the split.

    If ``path`` is a file, every split has this file. In a folder, the name of a file or of a
    subfolder is the split, as in train-00000-of-00002.parquet or test/pos/1.txt. If no name is
    usual for a split, all files of the folder belong to ``train``.

    Log a warning if the folder has a split that is not in ``splits`` or ``expected``. If
    ``expected`` is None, log no warning. Errors and warnings contain ``option``.
    """
    if path.is_file():
        if not kind_of(path):
            raise ValueError(f"{path} cannot be read: {path.suffix} is not one of {SUFFIXES}. Convert it.")
        groups = {name: [path] for name in splits}
    else:
        files = sorted(file for file in path.rglob("*") if kind_of(file) and not file.name.startswith("."))
        groups = _by_split(path, files, in_words=True)
        groups = groups if groups.keys() >= set(splits) else _by_split(path, files, in_words=False)
        if not groups:
            raise ValueError(f"{path} contains no data file; the supported suffixes are {SUFFIXES}.")
        if not groups.keys() & set(SPLITS.values()):
            groups = {"train": sorted(file for group in groups.values() for file in group)}
    if missing := [name for name in splits if name not in groups]:
        raise ValueError(f"{path} has no split {missing[0]!r}; it has {', '.join(sorted(groups))} ({option}).")
    if expected is not None and (left_out := sorted(groups.keys() - set(splits) - set(expected))):
        found = "Only the split %s of the folder %s is read; left out: %s. Choose with %s."
        logger.warning(found, " + ".join(splits), path, ", ".join(left_out), option)
    groups = {name: groups[name] for name in splits}
    if empty := [file for group in groups.values() for file in group if not file.stat().st_size]:
        raise ValueError(f"{empty[0]} is empty; give a file that holds data.")
    return groups


def _by_split(root: Path, files: Sequence[Path], *, in_words: bool) -> dict[str, list[Path]]:
    """Group files by the usual split that is named in their path, or else by the first name.

    ``in_words`` also accepts a split as a word of a longer name, such as train_data.csv.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        *folders, _ = file.relative_to(root).parts
        names = [*folders, re.sub(r"-\d+-of-\d+$", "", file.stem)]
        words = [word.lower() for name in names for word in (re.split(r"[\W_]+", name) if in_words else [name])]
        groups.setdefault(next((SPLITS[word] for word in words if word in SPLITS), names[0]), []).append(file)
    return groups


def read_collection(folder: Path, split: str | None) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]]]:
    """Return queries by id, passages by id, and ids of relevant passages from a folder in the layout of BEIR.

    Without ``split``, read the only file of scores, or else validation. A score above 0 means relevant.
    """
    names, texts = ("queries", "corpus"), []
    for name in names:
        source = source_named(folder / f"{name}.jsonl")
        rows = load([source])
        check_columns(rows, ["_id", "text"], [source])
        texts.append({str(row["_id"]): f"{row.get('title') or ''} {row['text']}".strip() for row in rows})
    files = list((folder / "qrels").glob("*.tsv"))
    if split or len(files) != 1:
        part = SPLITS.get(split or "validation") or str(split)
        files = find_files(folder / "qrels", [part], "--split", None)[part]
    types = {"query-id": str, "corpus-id": str, "score": float}
    how: Any = {"sep": "\t", "usecols": list(types), "dtype": types, "na_filter": False}
    try:
        scores = pd.concat([pd.read_csv(file, **how) for file in files])
    except ValueError as error:
        raise ValueError(f"{files[0]} is not a table of {', '.join(types)}, separated by tabs: {error}. Correct it.") from error
    relevant = scores[scores["score"] > 0].groupby("query-id")["corpus-id"].agg(set).to_dict()
    if not relevant:
        raise ValueError(f"{files[0]} has no score above 0, so no passage is relevant; give one for each query.")
    for name, known, used in zip(names, texts, (relevant.keys(), set().union(*relevant.values())), strict=True):
        if unknown := sorted(used - known.keys()):
            raise ValueError(f"{files[0]} has {len(unknown):,} ids that {name}.jsonl lacks, such as {unknown[0]!r}; add them.")
    return texts[0], texts[1], relevant


def local_path(source: DataSource) -> Path | None:
    """Return the local path of ``source``, or None if the source may be on the Hub."""
    path = expand_home(source.path)
    if path.exists() and source.config is not None:
        raise ValueError(
            f"{source.path} is a file or folder here, which has no configuration {source.config!r}; name it "
            f"without {':' + source.config!r}. If you mean the Hub, run from a directory without {source.path}."
        )
    if path.exists():
        return spooled(path)
    missing = f"There is no file or folder {source.path} (looked from {Path.cwd()})"
    if "/" in source.path and path.parent.is_dir() and not kind_of(path):
        raise FileNotFoundError(
            f"{missing}, but there is a folder {path.parent}; fix the path. If you mean the data set "
            "on the Hub, run from a directory without a folder of that name."
        )
    with contextlib.suppress(HFValidationError):
        validate_repo_id(source.path)
        if not kind_of(path):
            return None
    raise FileNotFoundError(f"{missing}; correct the path.")


@contextlib.contextmanager
def hub_errors(source: DataSource) -> Iterator[None]:
    """Convert errors of the Hub into errors of one sentence that name the data set."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{source.path} is neither a file or folder (looked from {Path.cwd()}) nor a data set that the Hub "
            f"returned: {' '.join(str(error).split())}"
        ) from error
    except (HTTPError, DatasetsError, RuntimeError, ValueError) as error:
        where = source.path + (f", configuration {source.config}" if source.config else "")
        raise ValueError(f"The data set {where} could not be read from the Hub: {' '.join(str(error).split())}") from error


def open_hub_stream(source: DataSource, split: str) -> tuple[IterableDataset, str]:
    """Return a stream of the rows of a Hub data set, and the commit of the data set."""
    with hub_errors(source):
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        return load_dataset(source.path, source.config, split=split, revision=commit, streaming=True), str(commit)


def _load_hub(source: DataSource, split: str) -> Dataset:
    if source.streaming:
        stream, source._commit = open_hub_stream(source, split)
        with hub_errors(source):
            return Dataset.from_list(list(stream.take(source.limit)), features=stream.features)
    with hub_errors(source):
        dataset = load_dataset(source.path, source.config, split=split, revision=source.revision)
    if files := dataset.cache_files:  # the cache folder of ``datasets`` is named after the commit
        named = Path(files[0]["filename"]).parent.name
        source._commit = named if re.fullmatch(r"[0-9a-f]{40}", named) else None
    return dataset
