"""Predict labels, numbers, tags, answers or choices, depending on the head of the model."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import pyarrow as pa
import regex
import torch
from datasets import Dataset
from pyarrow import parquet
from sentence_transformers.util import get_device_name
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minibert.data.columns import pick_columns
from minibert.data.files import read_lines
from minibert.data.labels import MULTI, REGRESSION, SINGLE
from minibert.data.load import TEXT_COLUMNS, as_dataset
from minibert.data.questions import texts_of
from minibert.data.tags import TOKEN_COLUMNS, entity_spans, holds_entities, tokenize_windows
from minibert.files.disk import atomic_write
from minibert.files.model_folder import encoder_folder
from minibert.inference.answers import (
    JOINERS,
    answer_rows,
    choice_columns_of,
    choose_rows,
    max_length_of,
    padded_batches,
    rows_ahead,
)
from minibert.inference.load import find_model, finite, open_config, open_tokenizer, open_weights

Row = Mapping[str, Any]

STANDARD_INPUT = "-"
OUTPUT_SUFFIXES = (".jsonl", ".csv", ".parquet")
_HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForMultipleChoice": AutoModelForMultipleChoice,
}
CLASSIFIER, TAGGER, ANSWERER, CHOOSER = _HEADS
_TAGGED = [(name,) for name in (*TOKEN_COLUMNS, "text", "sentence")]
_ASKED = ("question", "context")
_ROWS_AT_ONCE = 1000
# Values with the types of lists that may be empty. Other lists hold strings.
_EMPTY = {"entities": [{"entity_group": "", "word": "", "start": 0, "end": 0, "score": 0.0}], "scores": [0.0]}
# A word of raw text includes the marks inside it (U.S, AT&T, 3.5). Other marks are words.
_LETTER = rf"[\w\p{{M}}{JOINERS}]"
_WORD = regex.compile(
    rf"['’](?:s|re|ve|ll|d|m)\b|{_LETTER}+(?:(?:[.&/@’'-](?!(?:s|re|ve|ll|d|m)\b)|(?<=\d)[,:](?=\d)){_LETTER}+)*|\S"
)


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
    """Predict a result for every row of ``data``, in order.

    The head of the model determines the columns to read and the keys of the result. Each result
    also contains the columns that were read.

    - **sequence classification** reads a text or a pair of texts. The keys are ``label``,
      ``score`` (the probability of the label) and ``probabilities`` (of all classes, by name).
      For a multi-label model, the keys are ``labels`` and ``probabilities``. For regression,
      the key is ``value``.
    - **token classification** reads ``text``, or ``tokens`` (lists of words). The keys are
      ``tags`` and ``scores`` (a list with an element for each word), ``entities`` and, for a
      text, ``words``. An entity has the keys ``entity_group``, ``word``, ``score``, ``start``
      and ``end``. ``start`` and ``end`` count characters of a text, or words of a list.
    - **question answering** reads ``question`` and ``context``. See
      :func:`minibert.inference.answers.answer_rows` for the keys.
    - **multiple choice** reads a question and its choices. See
      :func:`minibert.inference.answers.choose_rows` for the keys.

    A text to classify is cut at the maximum length of the model, as in training. A sentence to
    tag, or the context of a question, is read completely, in overlapping windows.

    Args:
        model: a model folder, or the id of a model on the Hub.
        data: a file, a folder with a file per split, a Hub data set, ``"-"`` for lines of
            standard input, an opened data set, or an iterable of rows or texts.
        columns: the columns to read. The default is the columns used in training, or columns
            with usual names.
        split: the split of a folder or Hub data set. Data without splits is read completely.
        batch_size: the number of texts (or windows of long texts) to compute at once. Memory
            use does not grow with the number of rows.
        threshold: the probability from which a multi-label model assigns a label.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. The default is the best one
            available.
        trust_remote_code: run Python code that comes with the model.
        show_progress: show a progress bar on standard error.

    Example::

        for row in predict("runs/mine/2-classify", ["a good film"]):
            print(row["label"], row["score"])

    Raises:
        FileNotFoundError: if the model or the data is neither a local path nor on the Hub.
        ValueError: if the model has none of these heads, or if a column is missing. During
            iteration, if a row has no text.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold} (--threshold).")
    rows, names, total = _read(data, split)  # before opening the model, which takes longer
    opened = open_with_head(model, device=device, trust_remote_code=trust_remote_code)
    if opened is None:
        raise ValueError(
            f"{model} has no head that predicts labels, tags, answers or choices; train a head with a "
            "classify, tag, answer or choose stage, or use the model with minibert search."
        )
    network, tokenizer = opened
    head = head_of(network.config)
    run: Callable[[Iterable[Row]], Iterator[dict[str, Any]]]
    if head == CLASSIFIER:
        trained = getattr(network.config, "text_columns", None)
        usual = [trained, *(names for names in TEXT_COLUMNS if len(names) == len(trained))] if trained else TEXT_COLUMNS
        read = _columns(names, columns, usual)
        run = partial(_classify, network, tokenizer, columns=read, batch_size=batch_size, threshold=threshold)
    elif head == TAGGER:
        read = _columns(names, columns, _TAGGED)
        run = partial(_tag, network, tokenizer, column="".join(read), batch_size=batch_size)
    elif head == ANSWERER:
        asked = _columns(names, columns, [_ASKED])
        rows = ({name: row.get(column) for name, column in zip(_ASKED, asked, strict=True)} for row in rows)
        read = list(_ASKED)
        run = partial(answer_rows, network, tokenizer, batch_size=batch_size)
    else:
        if columns:
            raise ValueError("Multiple choice has no option for columns; rename the columns as in training.")
        found = {name for some in choice_columns_of(network, names) for name in some}
        read = [name for name in names if name in found]
        run = partial(choose_rows, network, tokenizer, batch_size=batch_size)
    given, shown = tee(rows)
    predictions = ({**{name: row.get(name) for name in read}, **result} for result, row in zip(run(given), shown, strict=False))
    return iter(tqdm(predictions, desc="predict", total=total, unit="row", disable=not show_progress))


def open_with_head(
    model: str | Path, *, heads: Sequence[str] = (), device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Open a model and its tokenizer. Return None if the model has none of the ``heads``.

    ``heads`` are endings of class names. The default is the heads that :func:`predict`
    supports.
    """
    folder = encoder_folder(find_model(model, trust_remote_code=trust_remote_code))
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    head = head_of(open_config(folder, **trust))
    if head is None or head not in (heads or _HEADS):
        return None
    opened, found = open_weights(_HEADS[head], folder, output_loading_info=True, **trust)
    if missing := sorted(found["missing_keys"]):  # these weights would be random
        what = "classifier" if head == CLASSIFIER else "head"
        raise ValueError(f"The weights in {folder} lack {', '.join(missing[:3])} of the {what}; save it again.")
    return opened.to(device or get_device_name()).eval(), open_tokenizer(folder, **trust)


def problem_type_of(config: Any) -> str:
    """Return the problem type of a classifier. The default for a single output is regression."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)


def class_names(config: Any) -> list[str]:
    """Return the names of the classes or tags of a model, in order."""
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def head_of(config: Any) -> str | None:
    """Return the head of a model as the ending of its class name, or None if unknown."""
    architecture = (config.architectures or [""])[0]
    return next((head for head in _HEADS if architecture.endswith(head)), None)


def _read(data: Any, split: str) -> tuple[Iterator[Row], list[str], int | None]:
    """Return the rows, the column names, and the number of rows or None."""
    if isinstance(data, str | Path | Dataset) and str(data) != STANDARD_INPUT:
        dataset = as_dataset(data, split=split)
        return iter(dataset), dataset.column_names, len(dataset)
    lines = _standard_input() if str(data) == STANDARD_INPUT else iter(data)
    given = ({"text": row} if isinstance(row, str) else row for row in lines)
    first = list(islice(given, 1))
    total = len(data) if isinstance(data, Sequence) and not isinstance(data, str) else None
    return chain(first, given), list(first[0]) if first else [], total


def _standard_input() -> Iterator[str]:
    """Yield the lines of standard input. Remove a byte order mark."""
    try:
        yield from read_lines(sys.stdin.buffer)
    except UnicodeDecodeError as error:
        raise ValueError("Standard input is not UTF-8; convert it, such as with iconv -t UTF-8.") from error


def _columns(found: list[str], wanted: Sequence[str] | None, usual: Sequence[Sequence[str]]) -> list[str]:
    """Return the names of the columns to read. If ``found`` is empty, return an empty list."""
    if not found:
        return []
    columns = pick_columns(found, wanted, usual, option="--column")
    if len(columns) not in {len(group) for group in usual}:
        known = " or ".join(" + ".join(group) for group in usual)
        raise ValueError(f"This model reads {known}, not {', '.join(columns)}; choose other columns (--column).")
    return columns


@torch.inference_mode()
def compute_logits(
    model: PreTrainedModel,
    tokenizer: Any,
    inputs: Mapping[str, list[Any]],
    batch_size: int,
) -> list[Tensor]:
    """Return the logits of each input: (classes,), or (padded length, classes) for tokens."""
    logits: list[Any] = [None] * len(inputs["input_ids"])
    for numbers, tensors in padded_batches(model, tokenizer, inputs, batch_size):
        for number, row in zip(numbers, finite(model(**tensors).logits.float().cpu()), strict=True):
            logits[number] = row
    return logits


def _classify(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Iterable[Row],
    *,
    columns: list[str],
    batch_size: int,
    threshold: float,
) -> Iterator[dict[str, Any]]:
    problem_type, names = problem_type_of(model.config), class_names(model.config)
    for first, some in rows_ahead(rows, batch_size):
        texts = map(list, zip(*texts_of(some, columns, first), strict=True))
        encoded = tokenizer(*texts, truncation=True, max_length=max_length_of(model, tokenizer))
        for logits in compute_logits(model, tokenizer, encoded, batch_size):
            yield label_of(logits, names, problem_type, threshold)


def label_of(
    logits: Tensor,
    names: Sequence[str],
    problem_type: str,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Convert ``logits`` (classes,) to a label, several labels or a value.

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
    model: PreTrainedModel, tokenizer: Any, rows: Iterable[Row], *, column: str, batch_size: int
) -> Iterator[dict[str, Any]]:
    marks_entities = holds_entities(class_names(model.config))
    for first, some in rows_ahead(rows, batch_size):
        given = [row.get(column) for row in some]
        for number, value in enumerate(given, start=first):
            if not all(isinstance(word, str) for word in (value if isinstance(value, list) else [value])):
                raise ValueError(
                    f"Row {number} has {value!r} in column {column!r}, not a text or a list of words; add it or remove the row."
                )
        places = [split_words(value) if isinstance(value, str) else [(n, n + 1) for n in range(len(value))] for value in given]
        sentences = [
            [value[start:end] for start, end in spans] if isinstance(value, str) else value
            for value, spans in zip(given, places, strict=True)
        ]
        tagged = tag_sentences(model, tokenizer, sentences, batch_size=batch_size)
        for value, spans, words, (tags, scores) in zip(given, places, sentences, tagged, strict=True):
            entities = []
            for kind, first_word, end in entity_spans(tags) if marks_entities else []:
                start, stop = spans[first_word][0], spans[end - 1][1]
                word = value[start:stop] if isinstance(value, str) else " ".join(value[start:stop])
                score = sum(scores[first_word:end]) / (end - first_word)
                entities.append({"entity_group": kind, "word": word, "start": start, "end": stop, "score": score})
            shown = {"words": words} if isinstance(value, str) else {}
            yield {**shown, "tags": tags, "scores": scores, "entities": entities}


def tag_sentences(
    model: PreTrainedModel, tokenizer: Any, sentences: Sequence[Sequence[str]], *, batch_size: int = 64
) -> list[tuple[list[str], list[float]]]:
    """Return the tags of all words in each sentence, and the probabilities of the tags."""
    names = class_names(model.config)
    windows = tokenize_windows(sentences, tokenizer, max_length_of(model, tokenizer))
    tagged: list[tuple[list[str], list[float]]] = [([], []) for _ in sentences]
    logits = compute_logits(model, tokenizer, {"input_ids": windows.ids}, batch_size) if windows.ids else []
    # Each word belongs to one window. The windows are in order, and therefore the words.
    for row, words, values in zip(windows.rows, windows.words, logits, strict=True):
        best = values[: len(words)][torch.from_numpy(words >= 0)].softmax(-1).max(-1)
        tagged[row][0].extend(names[number] for number in best.indices.tolist())
        tagged[row][1].extend(best.values.tolist())
    return tagged


def split_words(text: str) -> list[tuple[int, int]]:
    """Return the start and end of every word and punctuation mark, as in tagged corpora.

    >>> text = "AT&T's well-known U.S. arm (1,000 staff)."
    >>> [text[start:end] for start, end in split_words(text)]
    ['AT&T', "'s", 'well-known', 'U.S', '.', 'arm', '(', '1,000', 'staff', ')', '.']
    """
    return [match.span() for match in _WORD.finditer(text)]


def in_a_line(prediction: Row) -> str:
    r"""Format a prediction as one line: the result, the probability (if any) and the text.

    >>> in_a_line({"text": "so  good", "label": "yes", "score": 0.91234, "probabilities": {"no": 0.08766, "yes": 0.91234}})
    'yes\t0.9123\tso good'
    """
    row = {name: value for name, value in prediction.items() if name != "probabilities"}
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
        found = ["; ".join(f"{entity['entity_group']}: {entity['word']}" for entity in entities) or "-"]
        if not entities and not set(tags) <= {"O"}:
            found = [" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))]
    else:
        found = [row.pop("text") or "-", f"{row.pop('score'):.4f}"]
        row = {"question": row["question"]}
    given = [value if isinstance(value, str) else " ".join(value) for value in row.values() if isinstance(value, str | list)]
    return "\t".join(" ".join(text.split()) for text in [*found, *given])


def check_output(path: Path, suffixes: Sequence[str] = OUTPUT_SUFFIXES, *, force: bool) -> None:
    """Raise an error if ``path`` cannot be written. An existing file requires ``force``."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path} cannot be written: its name must end in one of {', '.join(suffixes)}.")
    if path.is_dir() or (os.path.lexists(path) and not force):
        raise FileExistsError(f"{path} exists already; choose another name, or replace it with --force.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into; create it first.")


def write(predictions: Iterable[Mapping[str, Any]], path: str | Path, *, force: bool = False) -> int:
    """Write ``predictions`` as JSON lines, CSV or Parquet. Return the number of predictions.

    In CSV, nested values are JSON. An earlier file is replaced only when the new file is
    complete. :func:`check_output` raises the errors for ``path``.
    """
    path = Path(path)
    check_output(path, force=force)
    rows, count = iter(predictions), 0
    first = list(islice(rows, 1))
    with atomic_write(path) as part, contextlib.ExitStack() as files:
        if path.suffix == ".parquet":
            known = {name: _EMPTY.get(name, [""]) if value == [] else value for row in first for name, value in row.items()}
            schema = pa.Table.from_pylist([known]).schema
            table = files.enter_context(parquet.ParquetWriter(part, schema, compression="zstd"))
        else:
            file = files.enter_context(part.open("w", encoding="utf-8", newline="" if path.suffix == ".csv" else None))
            if path.suffix == ".csv" and first:
                csv.writer(file).writerow(first[0])
        rows = chain(first, rows)
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            count += len(some)
            if path.suffix == ".parquet":
                table.write_table(pa.Table.from_pylist(some, schema=schema))
            elif path.suffix == ".csv":
                nested = ((_as_json(v) if isinstance(v, list | dict) else v for v in row.values()) for row in some)
                csv.writer(file).writerows(nested)
            else:
                file.writelines(_as_json(row) + "\n" for row in some)
    return count


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
