"""A corpus of any size to a folder of vectors: ``minibert encode``.

The input is cut into pieces of ``rows_per_shard`` rows; piece ``k`` becomes shard ``k``, and belongs to process ``k`` modulo
the number of processes. A shard is there whole or not at all, and notes which rows it holds, so a run killed at any moment goes
on with the shards that are missing, and the manifest follows from the shards.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm
from typing_extensions import Unpack

from minibert.data.stream import Bad, Rows, Stream, open_stream
from minibert.files.disk import read_json
from minibert.files.processes import processes
from minibert.inference.batching import WINDOW_CHARACTERS, WINDOW_TEXTS
from minibert.inference.encode import Encoder, EncoderOptions
from minibert.inference.load import find_model, fingerprint
from minibert.search.vectors import (
    MANIFEST,
    PRECISIONS,
    Manifest,
    Shard,
    ShardWriter,
    clear_leftovers,
    exclusive_lock,
    holds_vectors,
    number_of,
    quantize,
    read_manifest,
    remove_vectors,
    shard_files,
    shard_name,
    shard_notes,
    write_manifest,
)

logger = logging.getLogger(__name__)

ON_BAD_ROW = ("refuse", "skip")
# Bad rows named in the manifest; the rest are counted.
_NAMED = 20
# Vectors that show the range of every dimension, for int8, and how much wider the range is taken.
_CALIBRATION, _MARGIN = WINDOW_TEXTS, 0.05


@dataclass(frozen=True)
class Summary:
    """What :func:`encode_corpus` did: ``manifest`` of the folder, ``written`` vectors in ``seconds`` by this call and all its
    processes, and what was chosen (see :attr:`minibert.inference.encode.Encoder.decisions`)."""

    manifest: Manifest
    written: int = 0
    seconds: float = 0.0
    decisions: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For machines."""
        manifest = self.manifest
        return {
            "rows": manifest.rows,
            "dimension": manifest.dimension,
            "precision": manifest.precision,
            "shards": len(manifest.shards),
            "skipped": manifest.skipped,
            "skipped_rows": manifest.skipped_rows,
            "written": self.written,
            "seconds": round(self.seconds, 3),
            "decisions": self.decisions,
        }

    def lines(self, explain: bool = False) -> Iterator[str]:
        """For people."""
        manifest = self.manifest
        if explain:
            yield from (f"{name}: {choice}" for name, choice in self.decisions.items())
        if not self.written:
            yield "Nothing was left to do." if manifest.rows else "No row could be used."
        else:
            rate = self.written / max(1e-9, self.seconds)
            yield f"{self.written:,} vectors were written in {self.seconds:,.1f} s, {rate:,.0f} per second."
        if manifest.skipped:
            first = ", ".join(f"{row} ({reason})" for row, reason in manifest.skipped_rows[:5])
            more = f" and {manifest.skipped - 5:,} more" if manifest.skipped > 5 else ""
            yield f"{manifest.skipped:,} rows were left out: {first}{more}."
        size = f"{manifest.dimension} dimensions in {manifest.precision}"
        shards = len(manifest.shards)
        yield f"{manifest.rows:,} vectors of {size}, in {shards:,} shard{'' if shards == 1 else 's'}."


@dataclass(frozen=True)
class Plan:
    """Which rows of the input make which shard of which process.

    ``starts`` are the shard and the row that the first call began with, and each that appended: from there on shards take
    ``rows_per_shard`` rows each, and the last one what is left before the next start. Those in ``done`` are there.

    >>> plan = Plan(10, starts=((0, 0), (2, 15)), done=frozenset({0, 2}), process=1, processes=2)
    >>> plan.next_rows(0), plan.next_rows(15), plan.shard_of(14), plan.shard_of(36)
    ((10, 15), (25, 35), 1, 4)
    """

    rows_per_shard: int
    starts: tuple[tuple[int, int], ...] = ((0, 0),)
    done: frozenset[int] = frozenset()
    process: int = 0
    processes: int = 1

    def shard_of(self, row: int) -> int:
        first_shard, first_row = max(start for start in self.starts if start[1] <= row)
        return first_shard + (row - first_row) // self.rows_per_shard

    def rows_of(self, shard: int) -> tuple[int, int]:
        first_shard, first_row = max(start for start in self.starts if start[0] <= shard)
        start = first_row + (shard - first_shard) * self.rows_per_shard
        return start, min([start + self.rows_per_shard, *(row for _, row in self.starts if row > start)])

    def next_rows(self, row: int) -> tuple[int, int]:
        """The first range of rows of this process that ends behind ``row``."""
        shard = self.shard_of(row)
        while shard in self.done or shard % self.processes != self.process:
            shard += 1
        return self.rows_of(shard)


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
    """Encode the texts of ``data`` into ``out``, a folder of vectors, or go on where an earlier call was stopped.

    Memory does not grow with the number of rows. Started by torchrun, the processes share out the shards; ``out`` must be the
    same folder for all.

    Args:
        data: a file, a folder, a Hub data set (owner/name or owner/name:config), which is streamed, or rows read already.
        column: that of the texts; the default is as in :func:`minibert.data.stream.open_stream`.
        id_column: values to name the rows by; the default is their number in the input, from 0.
        keep_text: store the texts beside the vectors.
        precision: of the stored vectors: ``float32``, ``float16``, ``int8`` (256 steps within the range that the first rows
            show) or ``binary`` (a bit per dimension).
        rows_per_shard: rows of the input in a shard; what a kill costs at most.
        on_bad_row: ``refuse`` to go on at a row without a text, or ``skip`` it: its number appears in the manifest.
        append: ``data`` is that of before and more files behind it; encode these.
        force: replace vectors of another model, precision or input.
        options: as in :func:`minibert.inference.encode.encode`; the default prompt is the model's own for passages, if any.

    Example::

        done = encode_corpus("runs/quickstart/2-embed", "notes.jsonl", "notes-vectors", keep_text=True)
        for line in done.lines():
            print(line)

    Raises:
        FileNotFoundError, ValueError: as opening the model and the data does; for a row or a folder that cannot be used.
        OSError: the disk is full or not writable; shards that are whole stay.
    """
    _check(precision, on_bad_row, rows_per_shard)
    _check_apart(data, Path(out))
    stream = open_stream(data, column, id_column=id_column, split=split)
    asked = _Asked(model, stream, precision, keep_text, rows_per_shard, options)
    job = _Job(Path(out), asked, on_bad_row == "skip", show_progress)
    with job.alone():
        encoder = job.prepare(append=append, force=force)
        if job.manifest.complete:
            return Summary(job.manifest)
        started, before = time.perf_counter(), sum(notes["rows"] for notes in job.notes.values())
        encoder = encoder or job.open_model(job.manifest.encoding["dtype"])
        job.write(encoder)
        job.finish()
        decisions = {**encoder.decisions, "processes": job.shared()}
        return Summary(job.manifest, job.manifest.rows - before, time.perf_counter() - started, decisions)


def _check(precision: str, on_bad_row: str, rows_per_shard: int) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)} (--precision).")
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row={on_bad_row!r} is unknown; use refuse or skip (--on-bad-row).")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard} holds nothing; give at least 1 (--rows-per-shard).")


def _check_apart(data: str | Path | Dataset, out: Path) -> None:
    """Refuse to write where is read: vectors would be taken for input, and input deleted with the vectors it stands among."""
    if isinstance(data, Dataset) or not Path(data).exists():
        return
    here, there = Path(data).resolve(), out.resolve()
    if here == there or (here.is_dir() and here in there.parents) or there in here.parents:
        raise ValueError(f"The vectors would be written to {out}, where the input {data} is. Choose another folder, beside it.")


class _Asked:
    """What the caller wants, to be held against what a folder holds."""

    def __init__(
        self,
        model: str | Path,
        stream: Stream,
        precision: str,
        keep_text: bool,
        rows_per_shard: int,
        options: EncoderOptions,
    ) -> None:
        self.model, self.stream, self.precision = str(model), stream, precision
        self.keep_text, self.rows_per_shard = keep_text, rows_per_shard
        self.folder = find_model(model, trust_remote_code=options.get("trust_remote_code", False))
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options = {**options, "prompt_name": _document_prompt(self.folder)}
        self.opening = options
        self.fingerprint = fingerprint(self.folder)
        self.dtype = options.get("dtype", "auto")
        # What vectors depend on beside the model.
        self.options: dict[str, Any] = {
            "normalize": options.get("normalize", False),
            "prompt": options.get("prompt"),
            "prompt_name": options.get("prompt_name"),
        }

    @property
    def columns(self) -> dict[str, Any]:
        return {"text": self.stream.column, "id": self.stream.id_column, "kept": self.keep_text}

    def differences(self, found: Manifest) -> list[str]:
        """Why the vectors of ``found`` are not those asked for: what it holds, and what was asked for."""
        differences = []
        if found.fingerprint != self.fingerprint:
            model = f"{self.model} as it is now" if found.model == self.model else self.model
            differences.append(f"of the model {found.model} ({found.fingerprint[:8]}), not {model} ({self.fingerprint[:8]})")
        if found.precision != self.precision:
            differences.append(f"in {found.precision}, not {self.precision}")
        if (here := _without_path(self.stream.source)) != (there := _without_path(found.source)):
            which = sorted(name for name in {*here, *there} if here.get(name) != there.get(name) and name != "digest")
            how = "".join(f", {name} {there.get(name)}, now {here.get(name)}" for name in which)
            path, was = self.stream.source["path"], found.source["path"]
            differences.append(f"of the input {was}, not {path}{' as it is now' if path == was else ''}{how}")
        if found.columns != self.columns:
            differences.append(f"of the columns {found.columns}, not {self.columns}")
        if found.rows_per_shard != self.rows_per_shard:
            differences.append(f"in shards of {found.rows_per_shard} rows, not {self.rows_per_shard} (--rows-per-shard)")
        options = self.options if self.dtype == "auto" else {**self.options, "dtype": self.dtype}
        return differences + [
            f"with {name}={found.encoding.get(name)!r}, not {value!r}"
            for name, value in options.items()
            if found.encoding.get(name) != value
        ]


def _document_prompt(folder: Path) -> str | None:
    """Name of the prompt that ``SentenceTransformer.encode_document`` puts before passages; None for a model without one."""
    file = folder / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") or {} if file.exists() else {}
    name = next((name for name in ("document", "passage", "corpus") if name in prompts), None)
    return name if prompts.get(name) else None


def _without_path(source: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name != "path"}


class _Window(NamedTuple):
    """Usable rows of one shard, to be encoded together. ``last`` of the shard, which has the ``notes`` then; they come from
    ``rows`` of the input, and a ``share`` of the whole input has been read behind them."""

    shard: int
    texts: list[str]
    ids: list[Any]
    last: bool
    notes: dict[str, Any]
    rows: int
    share: float


class _Job:
    """One process's part in filling a folder."""

    manifest: Manifest

    def __init__(self, out: Path, asked: _Asked, skip: bool, show_progress: bool) -> None:
        self.out, self.asked, self.stream, self.skip = out, asked, asked.stream, skip
        self.state = processes()
        self.show_progress = show_progress and self.state.is_main_process
        self.notes: dict[int, dict[str, Any]] = {}  # of the shards that are there, by number

    def open_model(self, dtype: str) -> Encoder:
        """The model, in numbers that all processes compute with."""
        options: EncoderOptions = {**self.asked.opening, "dtype": dtype}
        if self.state.num_processes > 1:
            options["device"] = options.get("device") or str(self.state.device)
        # Without copies, no vector depends on where the corpus is cut.
        return Encoder(self.asked.folder, query_copies=False, **options)

    # --- the folder

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The first process holds the folder against other runs."""
        if not self.state.is_main_process:
            yield
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"The folder {self.out} cannot be made: {error.strerror}. Choose another one.") from error
        with exclusive_lock(self.out):
            yield

    def prepare(self, *, append: bool, force: bool) -> Encoder | None:
        """Agree on what is there and what is to be done; the first process returns the model if it had to open it for that."""
        encoder, refusal = None, None
        if self.state.is_main_process:
            try:
                encoder = self._look(append, force)
            except (ValueError, OSError) as error:
                refusal = error
        agreed = [None if refusal or not self.state.is_main_process else (self.manifest, self.notes)]
        broadcast_object_list(agreed)
        if refusal:
            raise refusal
        if agreed[0] is None:
            raise ValueError("The first process could not begin; its error stands above.")
        self.manifest, self.notes = agreed[0]
        return encoder

    def _look(self, append: bool, force: bool) -> Encoder | None:
        clear_leftovers(self.out)
        known = holds_vectors(self.out)
        # A manifest alone, of a run that ended before its first shard, binds nobody.
        if known and shard_files(self.out) and self._goes_on(append, force):
            return None
        others = sorted(file.name for file in self.out.iterdir() if not file.name.startswith("."))
        if others and not known:
            shown = shorten(", ".join(others), 60)
            raise ValueError(f"{self.out} holds other things ({shown}); choose an empty or a new folder.")
        asked, encoder = self.asked, self.open_model(self.asked.dtype)
        self.manifest = Manifest(
            model=asked.model,
            fingerprint=asked.fingerprint,
            dimension=encoder.dimension,
            precision=asked.precision,
            normalized=encoder.normalized,
            source=self.stream.source,
            columns=asked.columns,
            encoding={**asked.options, "dtype": encoder.dtype},
            rows_per_shard=asked.rows_per_shard,
        )
        if asked.precision == "int8":
            self.manifest.ranges = self._calibrate(encoder)
        self._check_first_rows()
        remove_vectors(self.out)
        write_manifest(self.out, self.manifest)
        return encoder

    def _check_first_rows(self) -> None:
        """Refuse an input that fails at its first rows before vectors that it is to replace are gone."""
        notes: dict[str, Any] = {"skipped": 0, "skipped_rows": []}
        first = next(iter(self.stream.read()), None)
        if first is None:
            raise ValueError(f"{self.stream.source['path']} has no rows; give a file or split that holds data.")
        deque(self._usable(first, notes), maxlen=0)

    def _goes_on(self, append: bool, force: bool) -> bool:
        """Whether the folder holds what was asked for, or its beginning: then room is made for what is to be appended.

        Raises:
            ValueError: for a folder that holds something else, unless ``force`` says to begin anew.
        """
        try:
            self.manifest = manifest = read_manifest(self.out)
        except ValueError:
            if force:  # which needs nothing of what is damaged
                return False
            raise
        differences = self.asked.differences(manifest)
        if force and (differences or manifest.complete):
            return False
        if differences and (not append or self.asked.differences(replace(manifest, source=self.stream.source))):
            raise ValueError(
                f"{self.out} holds vectors {'; '.join(differences)}. Choose another folder, or replace them with --force."
            )
        self._find_shards()
        if differences:
            self._make_room()
        return True

    def _make_room(self) -> None:
        """Behind the shards that are there, for the files that the input has beside those encoded before."""
        manifest = self.manifest
        if not manifest.complete or not self.stream.begins_with(manifest.source):
            reason = "does not begin with what was encoded before: new files must be last by name"
            reason = (
                reason if manifest.complete else "can be appended once what it was before is encoded: leave out the new files"
            )
            raise ValueError(f"The input {self.stream.source['path']} {reason}.")
        last = manifest.shards[-1]
        manifest.starts.append([len(manifest.shards), last.first_input_row + last.input_rows])
        manifest.source, manifest.complete = self.stream.source, False
        write_manifest(self.out, manifest)

    def _find_shards(self) -> None:
        """Note the shards that are whole; delete the others."""
        for file in shard_files(self.out):
            notes = shard_notes(file)
            if notes is None or notes["fingerprint"] != self.manifest.fingerprint:
                logger.warning("%s is half written or damaged, and is made anew.", file)
                file.unlink()
            else:
                self.notes[number_of(file)] = notes
        named = {number_of(Path(shard.file)) for shard in self.manifest.shards}
        if missing := sorted(named - self.notes.keys()):
            logger.warning("%s is made anew, since it is gone.", ", ".join(map(shard_name, missing)))
        if named != self.notes.keys():
            self.manifest.complete = False
        self._list_shards()

    def _calibrate(self, encoder: Encoder) -> list[list[float]]:
        """Range of every dimension, from the vectors of the first rows, with a margin."""
        texts = chain.from_iterable([text for text in rows.texts if isinstance(text, str)] for rows in self.stream.read())
        vectors = encoder.encode(list(islice(texts, _CALIBRATION)))
        if not len(vectors):
            raise ValueError(f"{self.stream.source['path']} has no row with a text in column {self.stream.column!r}.")
        low, high = vectors.min(axis=0), vectors.max(axis=0)
        margin = _MARGIN * (high - low)
        return [(low - margin).tolist(), (high + margin).tolist()]

    # --- the work

    def write(self, encoder: Encoder) -> None:
        """Write this process's shards."""
        manifest = self.manifest
        plan = Plan(
            manifest.rows_per_shard,
            tuple((shard, row) for shard, row in manifest.starts),
            frozenset(self.notes),
            self.state.process_index,
            self.state.num_processes,
        )
        waiting: deque[_Window] = deque()

        def texts() -> Iterator[list[str]]:
            for window in self._windows(plan):
                waiting.append(window)
                yield window.texts

        pairs = ((waiting.popleft(), vectors) for vectors in encoder.windows(texts()))
        with self._progress() as progress:
            for number, group in groupby(pairs, key=lambda pair: pair[0].shard):
                with ShardWriter(self.out / shard_name(number), manifest, self.stream.id_type) as writer:
                    for window, vectors in group:
                        writer.write(window.ids, window.texts, quantize(vectors, manifest))
                        progress(window, plan)
                        if window.last:
                            writer.about = window.notes
                            break  # the shard is whole now, not when the next one begins
                self.notes[number] = {**window.notes, "rows": writer.rows}
                if self.state.is_main_process:
                    self._list_shards()

    def _windows(self, plan: Plan) -> Iterator[_Window]:
        """The rows of this process, in windows that end where shards do."""
        texts: list[str] = []
        ids: list[Any] = []
        notes: dict[str, Any] = {}
        rows = characters = 0
        block: Rows | None = None
        for block in self.stream.read(plan.next_rows):
            shard, stop = plan.shard_of(block.first), block.first + len(block.texts)
            if not notes:
                notes = {
                    "fingerprint": self.manifest.fingerprint,
                    "first_input_row": block.first,
                    "skipped": 0,
                    "skipped_rows": [],
                }
            for row, text, name in self._usable(block, notes):
                texts.append(text)
                ids.append(row if name is None else name)
                characters += len(text)
            rows += len(block.texts)
            notes["input_rows"] = stop - notes["first_input_row"]
            last = stop == plan.rows_of(shard)[1]
            if last or len(texts) >= WINDOW_TEXTS or characters > WINDOW_CHARACTERS:
                yield _Window(shard, texts, ids, last, notes, rows, block.share)
                texts, ids, rows, characters = [], [], 0, 0
                notes = {} if last else notes
        if notes and block is not None:
            yield _Window(plan.shard_of(block.first), texts, ids, True, notes, rows, 1.0)

    def _usable(self, block: Rows, notes: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
        """(number, text, id) of the rows of a block, without the unusable ones, which are noted.

        Raises:
            ValueError: naming the first unusable row, where they are refused.
        """
        for place, text in enumerate(block.texts):
            name = None if block.ids is None else block.ids[place]
            bad = next((value for value in (text, name) if isinstance(value, Bad)), None)
            if bad is None:
                assert isinstance(text, str)  # all else is Bad
                yield block.first + place, text, name
                continue
            if not self.skip:
                where = f"{block.first_in_part + place} of {block.part}"
                number = "" if block.first == block.first_in_part else f"{block.first + place} of the input, row "
                raise ValueError(
                    f"Row {number}{where} {bad.reason} (rows are counted from 0); mend it, or leave such rows out with "
                    "--on-bad-row skip."
                )
            notes["skipped"] += 1
            if len(notes["skipped_rows"]) < _NAMED:
                notes["skipped_rows"].append([block.first + place, bad.reason])

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[_Window, Plan], None]]:
        """A bar over the rows of this process; how many there are is guessed from the bytes read where it is not known."""
        share = 1 / self.state.num_processes
        done = round(share * sum(notes["input_rows"] for notes in self.notes.values()))
        total = None if self.stream.rows is None else round(share * self.stream.rows)
        with tqdm(desc="encode", initial=done, total=total, unit="row", disable=not self.show_progress) as bar:

            def progress(window: _Window, plan: Plan) -> None:
                if self.stream.rows is None and window.share:
                    behind = window.notes["first_input_row"] + window.notes["input_rows"]
                    bar.total = max(bar.n + window.rows, round(share * behind / window.share))
                bar.update(window.rows)

            yield progress

    # --- the end

    def finish(self) -> None:
        """When all processes are done, the first one writes the manifest of the whole.

        Raises:
            ValueError: for an input without rows.
            OSError: for a shard that another process wrote and this one does not find.
        """
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            numbers = [number_of(file) for file in shard_files(self.out)]
            if not numbers:
                (self.out / MANIFEST).unlink()
                raise ValueError(f"{self.stream.source['path']} has no rows; give a file or split that holds data.")
            if gone := sorted(set(range(max(numbers) + 1)) - set(numbers)):
                raise OSError(
                    f"{self.out} lacks {shard_name(gone[0])}; the folder must be the same for all processes. "
                    "Run the same command again to make what is missing."
                )
            self._list_shards(complete=True)
        self.state.wait_for_everyone()
        self.manifest = read_manifest(self.out)

    def _list_shards(self, complete: bool = False) -> None:
        """Write the manifest anew, with the shards from the first one to the last before one that is missing."""
        manifest, number = self.manifest, 0
        manifest.shards, manifest.rows, manifest.skipped, manifest.skipped_rows = [], 0, 0, []
        while (file := self.out / shard_name(number)).exists():
            if (notes := self.notes.get(number) or shard_notes(file)) is None:
                break
            self.notes[number] = notes
            manifest.shards.append(
                Shard(file.name, manifest.rows, notes["rows"], notes["first_input_row"], notes["input_rows"])
            )
            manifest.rows += notes["rows"]
            manifest.skipped += notes["skipped"]
            manifest.skipped_rows += notes["skipped_rows"][: _NAMED - len(manifest.skipped_rows)]
            number += 1
        manifest.complete = manifest.complete or complete
        write_manifest(self.out, manifest)

    def shared(self) -> str:
        """How the work was shared out, for people."""
        count, shards = self.state.num_processes, len(self.manifest.shards)
        idle = f"; {count - shards} had nothing to do, smaller --rows-per-shard would change that" if shards < count else ""
        return f"{count}, shards {shards}{idle}"
