"""Encode a corpus of any size into a folder of vectors, for ``minibert encode``.

Every ``rows_per_shard`` rows of the input become one file, which is called a shard. Several
processes share the shards. A shard appears only when it is complete. After a kill, the next run
writes only the missing shards.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, islice, pairwise, tee
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm
from typing_extensions import Unpack

from minibert.data.files import Bad
from minibert.data.stream import Rows, Stream, open_stream
from minibert.files.disk import exclusive_lock, read_json, read_settings, sha256
from minibert.files.processes import processes
from minibert.inference.batching import WINDOW_CHARACTERS, WINDOW_TEXTS
from minibert.inference.encode import Encoder, EncoderOptions
from minibert.inference.load import PASSAGES, find_model, fingerprint
from minibert.search.vectors import (
    KEPT,
    MANIFEST,
    PRECISIONS,
    Manifest,
    Shard,
    ShardWriter,
    quantize,
    read_manifest,
    remove_vectors,
    shard_files,
    shard_name,
    shard_notes,
    write_manifest,
)

logger = logging.getLogger(__name__)

# The manifest lists this number of bad rows, and counts all bad rows.
_NAMED = 20
# The number of vectors that determine the int8 ranges, and the margin added to the ranges.
_CALIBRATION, _MARGIN = WINDOW_TEXTS, 0.05
_NO_END = 2**62  # no input has this row


class Summary(NamedTuple):
    """Store the result of :func:`encode_corpus`."""

    manifest: Manifest
    written: int  # the number of vectors that all processes wrote in this call
    seconds: float  # the time for encoding
    decisions: dict[str, str]  # the choices of the encoder, and how the processes shared the work


def encode_corpus(
    model: str | Path,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    column: str | None = None,
    id_column: str | None = None,
    split: str = "train",
    keep_text: bool = False,
    precision: str = "float32",
    rows_per_shard: int = 50_000,
    on_bad_row: str = "refuse",
    append: bool = False,
    force: bool = False,
    show_progress: bool = False,
    **options: Unpack[EncoderOptions],
) -> Summary:
    """Encode the texts of ``data`` into the folder ``out``, or resume an earlier call.

    Memory use does not grow with the number of rows. Processes that torchrun started share the
    work, and must use the same folder ``out``.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        data: a file, a folder, a Hub data set (owner/name or owner/name:config) to stream, or a
            data set in memory.
        out: the folder of vectors. It may be new, or contain the vectors of an earlier call.
        column: the text column. :func:`minibert.data.stream.open_stream` describes the default.
        id_column: the column of the ids. By default, the id of a row is the number of the row,
            from 0.
        split: the split of a folder or Hub data set. A file is read completely.
        keep_text: store the texts with the vectors.
        precision: the precision of the stored vectors: ``float32``, ``float16``, ``int8`` (256
            steps within the range of the first vectors) or ``binary`` (one bit per dimension).
        rows_per_shard: the number of input rows per shard. If a process is killed, it loses at
            most this number of rows.
        on_bad_row: the reaction to a row without a valid text or id. ``refuse`` raises an
            error. ``skip`` leaves the row out and records it in the manifest.
        append: encode the files that were added to ``data`` since the last call. In
            alphabetical order, the new files must come last.
        force: replace vectors that are complete, or that have another model, precision or
            input.
        options: the options of :func:`minibert.inference.encode.encode`. The default prompt is
            the prompt of the model for passages, if there is one.
        show_progress: show a progress bar on standard error.

    Example::

        model = "runs/quickstart/2-embed"
        done = encode_corpus(model, "notes.jsonl", "notes-vectors", keep_text=True)
        print(done.written, done.manifest.rows)

    Raises:
        FileNotFoundError, ValueError: if the model or the data cannot be opened, or if a row or
            the folder ``out`` cannot be used.
        OSError: if the disk is full or not writable. Complete shards are kept.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)} (--precision).")
    if on_bad_row not in ("refuse", "skip"):
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; use refuse or skip (--on-bad-row).")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard} (--rows-per-shard).")
    out = Path(out)
    _check_apart(data, out)
    stream = open_stream(data, column, id_column=id_column, split=split)
    folder = find_model(model, trust_remote_code=options.get("trust_remote_code", False))
    _check_similarity(folder, options)
    if options.get("prompt") is None and options.get("prompt_name") is None:
        prompts = read_settings(folder / "config_sentence_transformers.json").get("prompts") or {}
        options["prompt_name"] = next((name for name in PASSAGES if prompts.get(name)), None)
    asked = Manifest(
        model=str(model),
        fingerprint=fingerprint(folder),
        dimension=0,  # known when the model is open, like the next field
        normalized=False,
        precision=precision,
        source=stream.source,
        columns={"text": stream.column, "id": stream.id_column, "kept": keep_text},
        encoding={
            **{name: options.get(name) for name in ("prompt", "prompt_name", "truncate_dim")},
            "normalize": options.get("normalize", False),
            "dtype": options.get("dtype", "auto"),
        },
        rows_per_shard=rows_per_shard,
    )
    job = _Job(out, asked, folder, options, stream, on_bad_row == "skip", show_progress)
    count = job.state.num_processes
    out.mkdir(parents=True, exist_ok=True)
    lock = exclusive_lock(out, "encoding into", kept=KEPT)
    with lock if job.state.is_main_process else contextlib.nullcontext():
        job.prepare(append=append, force=force)
        if job.manifest.complete:
            return Summary(job.manifest, 0, 0.0, {})
        started, before = time.perf_counter(), sum(notes["rows"] for notes in job.notes.values())
        job.write()
        job.finish()
        shards = len(job.manifest.shards)
        shared = f"{count}, shards {shards}"
        if shards < count:
            shared += f"; {count - shards} had nothing to do, smaller --rows-per-shard would change that"
        decisions = {**job.encoder.decisions, "processes": shared}
        return Summary(job.manifest, job.manifest.rows - before, time.perf_counter() - started, decisions)


def _check_apart(data: str | Path | Dataset, out: Path) -> None:
    """Raise a ValueError if the input and the output folder overlap."""
    if isinstance(data, Dataset) or not Path(data).exists():
        return
    here, there = Path(data).resolve(), out.resolve()
    if here == there or (here.is_dir() and here in there.parents) or there in here.parents:
        raise ValueError(f"The output {out} overlaps with the input {data}; choose another folder.")


def _check_similarity(folder: Path, options: EncoderOptions) -> None:
    """Refuse a model whose similarity is not that of a folder of vectors, which is searched by cosine."""
    settings = read_settings(folder / "config_sentence_transformers.json")
    name = settings.get("similarity_fn_name") or "cosine"
    modules = read_json(folder / "modules.json") if (folder / "modules.json").exists() else [{"type": "Normalize"}]
    cut = options.get("truncate_dim") or settings.get("truncate_dim")
    normalized = options.get("normalize") or (not cut and "Normalize" in modules[-1]["type"])
    if name != "cosine" and not normalized:
        raise ValueError(
            f"{folder} compares vectors by {name}, and a folder of vectors is searched by cosine. Encode with --normalize, "
            "where both give the same order, or search the file itself with minibert search --passages."
        )


def _differences(found: Manifest, asked: Manifest) -> list[str]:
    """Return the differences between two manifests, as parts of an error message."""
    differences = []
    if found.fingerprint != asked.fingerprint:
        model = f"{asked.model} as it is now" if found.model == asked.model else asked.model
        differences.append(f"of the model {found.model} ({found.fingerprint[:8]}), not {model} ({asked.fingerprint[:8]})")
    if {**found.source, "path": asked.source["path"]} != asked.source:
        differences.append(f"of the input {_input_name(found)}, not {_input_name(asked)}")
    names = ("precision", "columns", "rows_per_shard")
    then, now = ({**{name: getattr(one, name) for name in names}, **one.encoding} for one in (found, asked))
    for name, value in now.items():
        if then.get(name) != value and (name, value) != ("dtype", "auto"):
            differences.append(f"with {name}={then.get(name)!r}, not {value!r}")
    return differences


def _input_name(manifest: Manifest) -> str:
    path, *details = (str(value)[:12] if name != "path" else value for name, value in manifest.source.items())
    return f"{path} ({', '.join(details)})"


def missing_shards(
    manifest: Manifest,
    done: set[int],
    process: int = 0,
    count: int = 1,
) -> Iterator[tuple[int, range]]:
    """Yield the number and the rows of each missing shard that ``process`` has to write.

    ``done`` contains the numbers of the complete shards. ``process`` is the index of this
    process, from 0. ``count`` is the number of processes. The iterator never ends, because the
    length of the input is unknown.

    >>> manifest = Manifest("model", "", 384, "float32", True, {}, {}, {}, rows_per_shard=10, starts=[(0, 0), (2, 15)])
    >>> list(islice(missing_shards(manifest, {0, 2}, process=1, count=2), 3))
    [(1, range(10, 15)), (3, range(25, 35)), (5, range(45, 55))]
    """
    for (shard, row), (_, end) in pairwise([*manifest.starts, (0, _NO_END)]):
        while row < end:
            rows = range(row, min(row + manifest.rows_per_shard, end))
            if shard not in done and shard % count == process:
                yield shard, rows
            shard, row = shard + 1, rows.stop


class _Window(NamedTuple):
    """Store rows of one shard that are encoded together."""

    shard: int
    texts: list[str]
    ids: list[Any]
    notes: dict[str, Any]  # the metadata to store in the shard
    last: bool  # no rows of the shard follow


@dataclass
class _Job:
    """Write the shards of one process. ``asked`` describes the vectors that the caller wants."""

    out: Path
    asked: Manifest
    model: Path
    options: EncoderOptions
    stream: Stream
    skip: bool
    show_progress: bool
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)  # of complete shards, by number

    def __post_init__(self) -> None:
        self.state, self.manifest = processes(), self.asked

    @cached_property
    def encoder(self) -> Encoder:
        """Return the opened model. All processes use the dtype in the manifest."""
        options: EncoderOptions = {**self.options, "dtype": self.manifest.encoding["dtype"]}
        if self.state.num_processes > 1:
            options["device"] = options.get("device") or str(self.state.device)
        # Without float16 copies, vectors do not depend on the bounds of the shards.
        return Encoder(self.model, query_copies=False, **options)

    def prepare(self, *, append: bool, force: bool) -> None:
        """Prepare the output folder in the main process, and share its manifest with the others."""
        refusal = None
        if self.state.is_main_process:
            try:
                if not self._resume(append, force):
                    self._begin()
            except (ValueError, OSError) as error:
                refusal = error
        agreed = [None if refusal or not self.state.is_main_process else (self.manifest, self.notes)]
        broadcast_object_list(agreed)
        if refusal:
            raise refusal
        if agreed[0] is None:
            raise ValueError("The first process could not begin; see its error above.")
        self.manifest, self.notes = agreed[0]

    def _resume(self, append: bool, force: bool) -> bool:
        """Return True to complete the vectors in the folder, or False to write new vectors."""
        if not (self.out / MANIFEST).exists():
            return False
        try:
            manifest = read_manifest(self.out)
        except ValueError:
            if force and shard_files(self.out):  # without a shard, the file may be another program's
                return False
            raise
        if not shard_files(self.out):  # an earlier run ended before its first shard
            return False
        differences = _differences(manifest, self.asked)
        if force and (differences or manifest.complete):
            return False
        apart_from_input = _differences(replace(manifest, source=self.stream.source), self.asked)
        if differences and (apart_from_input or not append):
            raise ValueError(f"{self.out} has vectors {'; '.join(differences)}. Use another folder or --force.")
        self.manifest = manifest
        self._find_shards()
        if not differences:
            return True
        if not manifest.complete or not self.stream.begins_with(manifest.source):
            raise ValueError(
                f"The input {self.stream.source['path']} cannot be appended: the earlier input must be "
                "encoded completely, and the names of new files must come last."
            )
        last = manifest.shards[-1]
        manifest.starts.append((len(manifest.shards), last.first_input_row + last.input_rows))
        manifest.source, manifest.complete = self.stream.source, False
        write_manifest(self.out, manifest)
        return True

    def _begin(self) -> None:
        """Check the model and the first rows, and delete old vectors."""
        others = sorted(file.name for file in self.out.iterdir() if not file.name.startswith("."))
        if others and MANIFEST not in others:
            shown = shorten(", ".join(others), 60)
            raise ValueError(f"{self.out} has files that are not vectors ({shown}); use an empty or new folder.")
        encoder, asked = self.encoder, self.asked.encoding
        encoding = {**asked, "dtype": encoder.dtype, "auto_dtype": asked["dtype"] == "auto"}
        self.manifest = replace(self.asked, encoding=encoding, dimension=encoder.dimension, normalized=encoder.normalized)
        if self.manifest.precision == "int8":
            self.manifest.ranges = self._calibrate()
        first = next(iter(self.stream.read()), None)
        if first is None:
            raise ValueError(f"{self.stream.source['path']} has no rows; give a file or split that holds data.")
        list(self._usable(first, {"skipped": 0, "skipped_rows": []}))  # raises an error for a bad row
        remove_vectors(self.out)
        write_manifest(self.out, self.manifest)

    def _find_shards(self) -> None:
        """Read the metadata of complete shards, and delete incomplete or damaged shards."""
        for number, file in shard_files(self.out).items():
            notes = shard_notes(file)
            if notes is None or notes["fingerprint"] != self.manifest.fingerprint:
                logger.warning("%s is incomplete or damaged, and is written again.", file)
                file.unlink()
            else:
                self.notes[number] = notes
        if self.notes.keys() != set(range(len(self.manifest.shards))):
            self.manifest.complete = False
        self._list_shards()

    def _calibrate(self) -> list[list[float]]:
        """Return the lowest and the highest value to store as int8, for each dimension."""
        rows = chain.from_iterable(block.texts for block in self.stream.read())
        texts = islice((text for text in rows if isinstance(text, str)), _CALIBRATION)
        vectors = self.encoder.encode_document(list(texts))
        if not len(vectors):
            path, column = self.stream.source["path"], self.stream.column
            raise ValueError(f"{path} has no text in column {column!r}; choose another column (--column).")
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        margin = _MARGIN * (high - low)
        return [(low - margin).tolist(), (high + margin).tolist()]

    def write(self) -> None:
        """Encode and write the shards of this process."""
        windows, copies = tee(self._windows())
        pairs = zip(windows, self.encoder.windows((window.texts for window in copies), task="document"), strict=False)
        count = self.state.num_processes
        done = sum(notes["input_rows"] for notes in self.notes.values()) // count
        total = None if self.stream.rows is None else self.stream.rows // count
        quiet = not (self.show_progress and self.state.is_main_process)
        with tqdm(desc="encode", initial=done, total=total, unit="row", disable=quiet) as bar:
            for number, group in groupby(pairs, key=lambda pair: pair[0].shard):
                file = self.out / shard_name(number)
                with ShardWriter(file, self.manifest, self.stream.id_type) as writer:
                    for window, vectors in group:
                        writer.write(window.ids, window.texts, quantize(vectors, self.manifest))
                        writer.notes = window.notes
                        bar.update(len(window.texts))
                        if window.last:
                            break  # complete the shard now, not when the next shard begins
                if self.state.is_main_process:
                    self._list_shards()

    def _windows(self) -> Iterator[_Window]:
        """Yield groups of rows for this process to encode. A group belongs to one shard."""
        place = self.state.process_index, self.state.num_processes
        shards, copies = tee(missing_shards(self.manifest, set(self.notes), *place))
        shard, rows = next(shards)
        texts: list[str] = []
        ids: list[Any] = []
        notes: dict[str, Any] = {}
        for block in self.stream.read(rows for _, rows in copies):
            while rows.stop <= block.first:
                shard, rows = next(shards)
            if not notes:
                notes = {"fingerprint": self.manifest.fingerprint, "first_input_row": block.first}
                notes |= {"input_rows": 0, "skipped": 0, "skipped_rows": []}
            for row, text, name in self._usable(block, notes):
                texts.append(text)
                ids.append(row if name is None else name)
            notes["input_rows"] += len(block.texts)
            last = block.first + len(block.texts) == rows.stop
            if last or len(texts) >= WINDOW_TEXTS or sum(map(len, texts)) > WINDOW_CHARACTERS:
                yield _Window(shard, texts, ids, notes, last)
                texts, ids, notes = [], [], {} if last else notes
        if notes:
            yield _Window(shard, texts, ids, notes, True)

    def _usable(self, block: Rows, notes: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
        """Yield the number, text and id of each row. Skip a bad row or raise a ValueError."""
        for place, text in enumerate(block.texts):
            name = None if block.ids is None else block.ids[place]
            bad = next((value for value in (text, name) if isinstance(value, Bad)), None)
            if bad is None:
                assert isinstance(text, str)  # any other value is a Bad
                yield block.first + place, text, name
                continue
            if not self.skip:
                where = f"{block.first_in_part + place} of {block.part}"
                if block.first != block.first_in_part:
                    where = f"{block.first + place} of the input, row {where}"
                advice = "correct it, or skip such rows with --on-bad-row skip"
                raise ValueError(f"Row {where} {bad.reason} (rows are counted from 0); {advice}.")
            notes["skipped"] += 1
            if len(notes["skipped_rows"]) < _NAMED:
                notes["skipped_rows"].append([block.first + place, bad.reason])

    def finish(self) -> None:
        """Wait for all processes, and complete the manifest in the main process."""
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            numbers = shard_files(self.out).keys()
            if missing := sorted(set(range(max(numbers) + 1)) - numbers):
                lost = self.out / shard_name(missing[0])
                raise OSError(f"{lost} is missing; run again, with the same folder for all processes.")
            for part, line in zip(self.stream.parts, self.stream.listing):
                if isinstance(part.content, Path) and sha256(part.content) not in line:
                    raise ValueError(f"{part.name} has changed while it was encoded; encode again with --force.")
            self._list_shards(complete=True)
        self.state.wait_for_everyone()
        self.manifest = read_manifest(self.out)

    def _list_shards(self, complete: bool = False) -> None:
        """Write the manifest with all shards before the first missing shard."""
        manifest, number = self.manifest, 0
        manifest.shards, manifest.rows, manifest.skipped, manifest.skipped_rows = [], 0, 0, []
        while (file := self.out / shard_name(number)).exists():
            if (notes := self.notes.get(number) or shard_notes(file)) is None:
                break
            self.notes[number] = notes
            counts = (notes["rows"], notes["first_input_row"], notes["input_rows"])
            manifest.shards.append(Shard(file.name, manifest.rows, *counts))
            manifest.rows += notes["rows"]
            manifest.skipped += notes["skipped"]
            manifest.skipped_rows += notes["skipped_rows"][: _NAMED - len(manifest.skipped_rows)]
            number += 1
        manifest.complete = manifest.complete or complete
        write_manifest(self.out, manifest)
