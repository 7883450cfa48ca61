"""Labels, numbers, tags, answers and choices for rows of text: the head of the model decides which."""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from pyarrow import parquet
from sentence_transformers.util import get_device_name
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minibert.data.labels import MULTI, REGRESSION, SINGLE
from minibert.data.load import TEXT_COLUMNS, as_dataset
from minibert.data.questions import texts_of
from minibert.data.tags import TOKEN_COLUMNS, cut_windows, entity_spans, holds_entities
from minibert.files.model_folder import opening
from minibert.inference.load import _encoder_folder, find_model

Row = Mapping[str, Any]

STANDARD_INPUT = "-"
OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")
CLASSIFIER, TAGGER, ANSWERER, CHOOSER = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
_HEADS = {
    CLASSIFIER: AutoModelForSequenceClassification,
    TAGGER: AutoModelForTokenClassification,
    ANSWERER: AutoModelForQuestionAnswering,
    CHOOSER: AutoModelForMultipleChoice,
}
# Rows read ahead, in batches: sorted by length they waste little on padding, and memory does not grow with the rows.
_BATCHES_AHEAD = 32
_ROWS_AT_ONCE = 1000
# Words of raw text: with the marks inside them (U.S, AT&T, well-known, 3.5); every other mark is a word of its own.
_WORD = re.compile(r"['’](?:s|re|ve|ll|d|m)\b|\w+(?:(?:[.&/@’'-](?!(?:s|re|ve|ll|d|m)\b)|(?<=\d)[,:](?=\d))\w+)*|[^\w\s]")


def predict(
    model: str | Path,
    data: str | Path | Dataset | Iterable[str] | Iterable[Row],
    *,
    columns: Sequence[str] | None = None,
    split: str = "train",
    batch_size: int = 64,
    threshold: float = 0.5,
    device: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Predictions of ``model`` for every row of ``data``, in order, beside the columns that were read.

    What is read, and what comes out beside it, follows from the head of the model:

    - **sequence classification** reads a text or a pair of them: ``label``, ``score`` (its probability) and
      ``probabilities`` of all classes by name; with several labels ``labels`` and ``probabilities``; in regression ``value``;
    - **token classification** reads ``text``, or ``tokens`` (lists of words): ``words`` (of a text), ``tags`` and ``scores``
      per word, and ``entities``, each with ``entity_group``, ``word``, ``score``, and ``start`` and ``end`` in characters of
      the text, or in words where words were given;
    - **question answering** reads ``question`` and ``context``: see :func:`minibert.inference.answers.answer_rows`;
    - **multiple choice** reads a question and its choices: see :func:`minibert.inference.answers.choose_rows`.

    Texts to classify that exceed the model's length are cut, as in training; sentences to tag and contexts are read whole,
    in windows that overlap.

    Args:
        model: a model folder, or the id of a model on the Hub.
        data: a file, a folder with a file per split, a Hub data set, ``"-"`` for lines of standard input, rows read already,
            or texts.
        columns: the columns to read; unset means those the model was trained with, or the usual ones.
        split: the split of a folder or Hub data set; everything else is taken whole.
        batch_size: texts (or windows of long ones) computed at once; memory does not grow with the number of rows.
        threshold: probability from which one of several labels is given.

    Example::

        for row in predict("runs/mine/2-classify", ["a good film"]):
            print(row["label"], row["score"])

    Raises:
        FileNotFoundError: for a model or data that is neither here nor on the Hub.
        ValueError: for a model without such a head, columns that are not there, or (while going on) a row without a text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} computes nothing; give at least 1 (--batch-size).")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is no probability to choose by; give one between 0 and 1 (--threshold).")
    rows, names, total = _read(data, split)  # before the model, which takes longer to open
    opened = open_with_head(model, device=device, trust_remote_code=trust_remote_code)
    if opened is None:
        raise ValueError(
            f"{model} has no head that predicts labels, tags, answers or choices; train one on top of it with a classify, tag, "
            "answer or choose stage, or use it as it is with minibert search."
        )
    predictions = _PREDICTORS[head_of(opened[0].config)](*opened, rows, names, columns, batch_size, threshold)
    return iter(tqdm(predictions, desc="predict", total=total, unit="row", disable=not show_progress))


def open_with_head(
    model: str | Path, *, heads: Sequence[str] = (), device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The model and its tokenizer, or ``None`` when it has none of ``heads``, as the ends of class names are called.

    Without ``heads``, they are those that :func:`predict` knows.

    Raises:
        FileNotFoundError, ValueError: as :func:`minibert.inference.load.load` does.
    """
    folder = _encoder_folder(find_model(model, trust_remote_code=trust_remote_code))
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    head = head_of(AutoConfig.from_pretrained(folder, **kwargs))
    if head is None or head not in (heads or _HEADS):
        return None
    with opening(folder):
        opened, found = _HEADS[head].from_pretrained(folder, output_loading_info=True, **kwargs)
    if missing := sorted(found["missing_keys"]):  # they would be random numbers
        what = "classifier" if head == CLASSIFIER else "head"
        raise ValueError(f"The weights in {folder} lack {', '.join(missing[:3])} of the {what}; save or download it again.")
    return opened.to(device or get_device_name()).eval(), AutoTokenizer.from_pretrained(folder, **kwargs)


def max_length_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest sequence, in tokens, that the model was made for."""
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length))


def problem_type_of(config: Any) -> str:
    """What a sequence-classification head predicts; as in transformers, a single output without further word is a number."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)


def class_names(config: Any) -> list[str]:
    """Names of the classes (or tags), in order."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def head_of(config: Any) -> str | None:
    """Which of the heads that predict something a model has."""
    architecture = (config.architectures or [""])[0]
    return next((head for head in _HEADS if architecture.endswith(head)), None)


# -------------------------------------------------------------------------------------------------------------- what is read


def _read(data: Any, split: str) -> tuple[Iterator[Row], list[str], int | None]:
    """The rows, the names of their columns (none without rows), and their number where it is known."""
    if isinstance(data, str | Path | Dataset) and str(data) != STANDARD_INPUT:
        dataset = as_dataset(data, split=split)
        batches = dataset.iter(_ROWS_AT_ONCE)
        rows = (dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True))
        return rows, dataset.column_names, len(dataset)
    lines = _standard_input() if str(data) == STANDARD_INPUT else iter(data)
    first = list(islice(lines, 1))
    given = ({"text": row} if isinstance(row, str) else row for row in chain(first, lines))
    names = [] if not first else ["text"] if isinstance(first[0], str) else list(first[0])
    return given, names, len(data) if isinstance(data, Sequence) and not isinstance(data, str) else None


def _standard_input() -> Iterator[str]:
    """The lines of standard input, without a byte order mark.

    Raises:
        ValueError: where they are not UTF-8.
    """
    number = 0
    try:
        for number, line in enumerate(sys.stdin, start=1):
            yield (line.removeprefix("\ufeff") if number == 1 else line).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Standard input is not UTF-8 somewhere after line {number}; convert it, for example with iconv -t UTF-8."
        ) from error


def _choose_columns(found: Sequence[str], wanted: Sequence[str] | None, usual: Iterable[Sequence[str]], what: str) -> list[str]:
    """The columns wanted, the first of the ``usual`` ones that are all there, or the only one where one is enough.

    Raises:
        ValueError: listing the columns found.
    """
    shown = ", ".join(found)
    if wanted:
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"There is no column {', '.join(map(repr, missing))}; there are {shown}.")
        return list(wanted)
    usual = list(usual)
    columns = next((names for names in usual if set(names) <= set(found)), None)
    if columns is None and len(found) == 1 and any(len(names) == 1 for names in usual):
        columns = found
    if columns is None:
        choices = "; ".join(" + ".join(names) for names in usual)
        raise ValueError(f"The model reads {what} ({choices}), but there are the columns {shown}; name them with --column.")
    return list(columns)


def _ahead(rows: Iterable[Row], batch_size: int) -> Iterator[tuple[int, list[Row]]]:
    """Many rows at a time, with the number of the first of them, from 1."""
    rows, first = iter(rows), 1
    while some := list(islice(rows, batch_size * _BATCHES_AHEAD)):
        yield first, some
        first += len(some)


@torch.inference_mode()
def compute_logits(model: PreTrainedModel, tokenizer: Any, inputs: Mapping[str, list[Any]], batch_size: int) -> list[Tensor]:
    """Logits for each of ``inputs`` (lists of token ids and so on): (classes,), or (longest, classes) for tokens."""
    lengths = list(map(len, inputs["input_ids"]))
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])  # like lengths waste no time on padding
    logits: list[Any] = [None] * len(order)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        # On the right whatever the tokenizer says elsewhere: the places of words are counted from the left.
        batch = tokenizer.pad(
            {name: [values[number] for number in numbers] for name, values in inputs.items()}, padding_side="right"
        )
        tensors = {name: torch.tensor(values, device=model.device) for name, values in batch.items()}
        for number, row in zip(numbers, model(**tensors).logits.float().cpu(), strict=True):
            logits[number] = row
    return logits


# ----------------------------------------------------------------------------------------------------- what each head predicts


def _classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    found: Sequence[str],
    wanted: Sequence[str] | None,
    batch_size: int,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    trained = getattr(model.config, "text_columns", None)
    usual = [trained, *(names for names in TEXT_COLUMNS if len(names) == len(trained))] if trained else TEXT_COLUMNS
    columns = _choose_columns(found, wanted, dict.fromkeys(map(tuple, usual)), "a text or a pair of texts") if found else []
    if len(columns) > 2:
        raise ValueError(f"A classifier reads one column or two, not {', '.join(columns)}.")
    problem_type, names = problem_type_of(model.config), class_names(model.config)

    def results() -> Iterator[dict[str, Any]]:
        for first, some in _ahead(rows, batch_size):
            texts = list(texts_of(some, columns, first))
            encoded = tokenizer(
                *(list(column) for column in zip(*texts, strict=True)),
                truncation=True,
                max_length=max_length_of(model, tokenizer),
            )
            for row, logits in zip(texts, compute_logits(model, tokenizer, encoded, batch_size), strict=True):
                yield {**dict(zip(columns, row, strict=True)), **label_of(logits, names, problem_type, threshold)}

    return results()


def label_of(logits: Tensor, names: Sequence[str], problem_type: str, threshold: float = 0.5) -> dict[str, Any]:
    """What ``logits`` (classes,) say, in words.

    >>> label_of(torch.tensor([0.0, 1000.0]), ["no", "yes"], "single_label_classification")
    {'label': 'yes', 'score': 1.0, 'probabilities': {'no': 0.0, 'yes': 1.0}}
    """
    if problem_type == REGRESSION:
        return {"value": float(logits[0])}
    probabilities = (logits.sigmoid() if problem_type == MULTI else logits.softmax(-1)).tolist()
    by_name = dict(zip(names, probabilities, strict=True))
    if problem_type == MULTI:
        return {"labels": [name for name in names if by_name[name] >= threshold], "probabilities": by_name}
    best = names[int(logits.argmax())]
    return {"label": best, "score": by_name[best], "probabilities": by_name}


def _tag(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    found: Sequence[str],
    wanted: Sequence[str] | None,
    batch_size: int,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    usual = [(name,) for name in (*TOKEN_COLUMNS, "text", "sentence")]
    columns = _choose_columns(found, wanted, usual, "lists of words, or a text") if found else []
    if len(columns) > 1:
        raise ValueError(f"A tagger reads one column, not {', '.join(columns)}.")
    marks_entities = holds_entities(class_names(model.config))

    def results() -> Iterator[dict[str, Any]]:
        for first, some in _ahead(rows, batch_size):
            given = [_words_or_text(row, columns[0], number) for number, row in enumerate(some, start=first)]
            places = [split_words(value) if isinstance(value, str) else None for value in given]
            sentences = [
                [value[start:end] for start, end in spans] if isinstance(value, str) and spans is not None else list(value)
                for value, spans in zip(given, places, strict=True)
            ]
            tagged = tag_sentences(model, tokenizer, sentences, batch_size=batch_size)
            for value, spans, words, (tags, scores) in zip(given, places, sentences, tagged, strict=True):
                kinds = entity_spans(tags) if marks_entities else []
                entities = [_entity(value, spans, kind, start, end, scores) for kind, start, end in kinds]
                shown = {columns[0]: value} if spans is None else {columns[0]: value, "words": words}
                yield {**shown, "tags": tags, "scores": scores, "entities": entities}

    return results()


def tag_sentences(
    model: PreTrainedModel, tokenizer: Any, sentences: Sequence[Sequence[str]], *, batch_size: int = 64
) -> list[tuple[list[str], list[float]]]:
    """The tag of every word of ``sentences``, and its probability; long sentences are cut into windows that overlap."""
    names = class_names(model.config)
    windows = cut_windows(sentences, tokenizer, max_length_of(model, tokenizer))
    inputs = {"input_ids": windows.ids, **({"token_type_ids": windows.types} if windows.types is not None else {})}
    tagged: list[tuple[list[str], list[float]]] = [([], []) for _ in sentences]
    logits = compute_logits(model, tokenizer, inputs, batch_size) if windows.ids else []
    # Windows are in the order of the sentences and each word is in one of them, so words arrive in order.
    for row, words, values in zip(windows.rows, windows.words, logits, strict=True):
        best = values[: len(words)][torch.from_numpy(words >= 0)].softmax(-1).max(-1)
        tagged[row][0].extend(names[number] for number in best.indices.tolist())
        tagged[row][1].extend(best.values.tolist())
    return tagged


def split_words(text: str) -> list[tuple[int, int]]:
    """Where the words of ``text`` begin and end, punctuation apart, in the manner of the corpora that taggers learn from.

    >>> text = "AT&T's well-known U.S. arm (1,000 staff)."
    >>> [text[start:end] for start, end in split_words(text)]
    ['AT&T', "'s", 'well-known', 'U.S', '.', 'arm', '(', '1,000', 'staff', ')', '.']
    """
    return [match.span() for match in _WORD.finditer(text)]


def _words_or_text(row: Row, column: str, number: int) -> str | list[str]:
    value = row.get(column)
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        return value
    raise ValueError(
        f"Row {number} has {value!r} in column {column!r}, where a text or a list of words belongs; fill it or remove the row."
    )


def _entity(
    value: str | list[str], spans: list[tuple[int, int]] | None, kind: str, first: int, end: int, scores: Sequence[float]
) -> dict[str, Any]:
    if spans is not None and isinstance(value, str):
        start, stop = spans[first][0], spans[end - 1][1]
        word = value[start:stop]
    else:
        start, stop, word = first, end, " ".join(value[first:end])
    score = sum(scores[first:end]) / (end - first)
    return {"entity_group": kind, "word": word, "start": start, "end": stop, "score": score}


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    found: Sequence[str],
    wanted: Sequence[str] | None,
    batch_size: int,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    from minibert.inference.answers import answer_rows

    names = ("question", "context")
    columns = _choose_columns(found, wanted, [names], "a question and its context") if found else []
    if len(columns) not in (0, 2):
        raise ValueError(f"Question answering reads two columns, the question and its context, not {', '.join(columns)}.")
    asked, shown = tee({name: row.get(column) for name, column in zip(names, columns, strict=False)} for row in rows)
    results = answer_rows(model, tokenizer, asked, batch_size=batch_size)
    return ({**row, **result} for result, row in zip(results, shown, strict=False))


def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    found: Sequence[str],
    wanted: Sequence[str] | None,
    batch_size: int,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    from minibert.inference.answers import choice_columns_of, choose_rows

    if wanted:
        raise ValueError("Multiple choice finds its columns by their usual names, or those it was trained with; rename them.")
    columns = choice_columns_of(model, found)
    read = [name for name in found if name in (*columns.texts, *columns.choices)]
    asked, shown = tee(rows)
    results = choose_rows(model, tokenizer, asked, batch_size=batch_size)
    return ({**{name: row.get(name) for name in read}, **result} for result, row in zip(results, shown, strict=False))


_PREDICTORS: dict[str | None, Callable[..., Iterator[dict[str, Any]]]] = {
    CLASSIFIER: _classify,
    TAGGER: _tag,
    ANSWERER: _answer,
    CHOOSER: _choose,
}


# -------------------------------------------------------------------------------------------------------------- what comes out


def in_a_line(prediction: Row) -> str:
    """A prediction for people: what was found, its probability where there is one, then the text.

    >>> in_a_line({"text": "so  good", "label": "yes", "score": 0.91234, "probabilities": {"no": 0.08766, "yes": 0.91234}})
    'yes\\t0.9123\\tso good'
    """
    row = dict(prediction)
    if "choice" in row:
        found = [str(row.pop("choice")), row.pop("text")]
    elif "value" in row:
        found = [f"{row.pop('value'):.4f}"]
    elif "labels" in row:
        found = [", ".join(row.pop("labels")) or "-"]
    elif "label" in row:
        found = [row.pop("label"), f"{row.pop('score'):.4f}"]
    elif "tags" in row:
        entities, tags, _ = row.pop("entities"), row.pop("tags"), row.pop("scores")
        words = row.pop("words") if "words" in row and len(row) > 1 else next(iter(row.values()))
        tagged = zip(words, tags, strict=True)
        spans = [f"{entity['entity_group']}: {entity['word']}" for entity in entities]
        found = ["; ".join(spans) or "-"] if all(map(_is_iob, tags)) else [" ".join(f"{word}/{tag}" for word, tag in tagged)]
    else:
        found = [row.pop("text") or "-", f"{row.pop('score'):.4f}"]
        row = {"question": row["question"]}
    given = [value for value in row.values() if isinstance(value, str)]
    given += [" ".join(value) for value in row.values() if isinstance(value, list) and all(isinstance(x, str) for x in value)]
    return "\t".join(" ".join(text.split()) for text in [*found, *given])


def _is_iob(tag: str) -> bool:
    return tag == "O" or tag.startswith(("B-", "I-"))


# ------------------------------------------------------------------------------------------------------------------- the file


def check_output(path: Path, *, force: bool) -> None:
    """Refuse, before anything is computed, an output that cannot or must not be written.

    Raises:
        ValueError: for an unknown kind of file.
        FileExistsError: for a file that is there, without ``force``.
        FileNotFoundError: for a folder that is not there.
    """
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"{path} is of no kind that can be written; end its name in {', '.join(OUTPUT_SUFFIXES)}.")
    if path.is_dir() or (path.exists() and not force):
        raise FileExistsError(f"{path} exists already; choose another name, or replace it with --force.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into; make it first.")


def write(predictions: Iterable[Mapping[str, Any]], path: str | Path, *, force: bool = False) -> int:
    """Write ``predictions`` as JSON lines, CSV (nested values as JSON) or Parquet, and return their number.

    The file appears under its name once it is whole; until then, and after an error, what was there stays.

    Raises: as :func:`check_output` does.
    """
    path = Path(path)
    check_output(path, force=force)
    part = path.with_name(f".{path.name}.part")
    try:
        count = _WRITERS[path.suffix](iter(predictions), part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _write_jsonl(predictions: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in predictions:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_csv(predictions: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        for row in predictions:
            if not count:
                writer.writerow(row)
            values = row.values()
            writer.writerow([json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in values])
            count += 1
    return count


def _write_parquet(predictions: Iterator[Mapping[str, Any]], path: Path) -> int:
    count = 0
    first = list(islice(predictions, 1))
    schema = pa.schema([(name, _arrow_type(value, name)) for row in first for name, value in row.items()])
    rows = chain(first, predictions)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
_ENTITY = {"entity_group": "", "word": "", "start": 0, "end": 0, "score": 0.0}


def _arrow_type(value: Any, name: str = "") -> pa.DataType:
    """The column for ``value``: a list that is empty in the first row is known by its name."""
    if isinstance(value, dict):
        return pa.struct([(key, _arrow_type(inner, key)) for key, inner in value.items()])
    if isinstance(value, list):
        known = {"entities": _ENTITY, "scores": 0.0}
        return pa.list_(_arrow_type(value[0] if value else known.get(name, "")))
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(type(value), pa.string())
