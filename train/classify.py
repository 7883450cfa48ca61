"""The ``classify`` stage: a head on top of an encoder that tells classes of texts, or of pairs of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from minibert.data.load import TEXT_COLUMNS, check_columns, load, text_columns
from minibert.train.arguments import ClassifyStage
from minibert.train.loop import fit, processes
from minibert.train.rows import TokenRows, compute_outputs, refuse_first
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length

_METRICS = ("accuracy", "macro_f1", "loss")


def classify(args: ClassifyStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a classifier of texts or pairs; ``context.output_dir`` ends as a complete model folder.

    Returns:
        The figures of ``metrics.json``; with ``eval_data`` also eval_accuracy, eval_macro_f1 and eval_loss of the best model.

    Raises:
        ValueError: missing columns, a label that is no class (with its row), an unknown metric, no positions for a text.
    """
    if args.metric_for_best not in _METRICS:
        raise ValueError(f"metric_for_best={args.metric_for_best!r} is unknown; use one of {', '.join(_METRICS)}.")
    train = load(args.data, split="train")
    columns = find_text_columns(train, args.text_columns, args.label_column, args.data)
    labels, names = read_labels(train, args.label_column, args.labels)
    held_out = load(args.eval_data, split="validation") if args.eval_data else None

    tokenizer = load_tokenizer(context)
    changes: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    if context.model is not None:
        start = AutoConfig.from_pretrained(context.model, trust_remote_code=False)
        changes["ignore_mismatched_sizes"] = start.num_labels != len(names)  # only then does a new head replace the old one
    model = load_model(AutoModelForSequenceClassification, args, context, tokenizer, **changes)
    tokenizer.model_max_length = max_length = sequence_length(args.max_length, model.config, tokenizer)

    rows = TokenRows.from_texts(train, columns, labels, tokenizer, max_length)
    evaluate = None
    if held_out is not None and args.eval_data:
        find_text_columns(held_out, columns, args.label_column, args.eval_data)
        expected, _ = read_labels(held_out, args.label_column, names)
        evaluate = evaluator(TokenRows.from_texts(held_out, columns, expected, tokenizer, max_length), args.eval_batch_size)
    if processes().is_main_process:
        tokenizer.save_pretrained(context.output_dir)
    return fit(
        model,
        train_dataset=rows,
        collate=rows.collate,
        arguments=args,
        output_dir=context.output_dir,
        seed=context.seed,
        evaluate=evaluate,
        metric_for_best=args.metric_for_best if evaluate else None,
        greater_is_better=args.metric_for_best != "loss",
    )


# ---------------------------------------------------------------------------------------------------------------- the data


def find_text_columns(
    rows: Dataset, wanted: Sequence[str] | None, label_column: str, sources: Sequence[Any]
) -> tuple[str, ...]:
    """The columns to read, given or detected, checked to hold text beside a column of labels.

    Raises:
        ValueError: listing the columns found.
    """
    columns = tuple(wanted or next((pair for pair in TEXT_COLUMNS if set(pair) <= set(rows.column_names)), ()))
    if not columns:
        usual = "; ".join(" + ".join(pair) for pair in TEXT_COLUMNS)
        raise ValueError(
            f"{sources[0].path} has none of the usual columns of text ({usual}); "
            f"it has {', '.join(rows.column_names)}. Name one or two with text_columns."
        )
    check_columns(rows, [*columns, label_column], sources)
    if not_text := sorted(set(columns) - set(text_columns(rows))):
        raise ValueError(f"Column {', '.join(map(repr, not_text))} of {sources[0].path} does not hold text; choose others.")
    return columns


def read_labels(rows: Dataset, column: str, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    """Class numbers of all rows, and the classes' names: given, the ClassLabel's, the strings found (sorted), or 0 … n-1.

    Raises:
        ValueError: a label that is not a class, with its row counted from 1.
    """
    feature, values = rows.features[column], rows[column][:]
    found = list(feature.names) if isinstance(feature, ClassLabel) else None
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names = list(names or sorted(set(values)))
        numbers = {name: number for number, name in enumerate(names)}
        refuse_first(values, [value in numbers for value in values], column, f"it should be one of {', '.join(names)}")
        labels = np.array([numbers[value] for value in values], dtype=np.int64)
    else:
        array = np.asarray(values)
        if array.dtype == object or array.ndim != 1 or array.dtype.kind not in "iufb":
            raise ValueError(f"Column {column!r} holds {feature}, not classes; a label is a number from 0 up, or a string.")
        refuse_first(values, np.isfinite(array) & (array == np.floor(array)), column, "a label must be a whole number")
        labels = array.astype(np.int64)
        known = names or found
        count = len(known) if known else max(2, int(labels.max()) + 1)
        names = list(known or map(str, range(count)))
        advice = f"classes are numbered 0 to {count - 1}"
        refuse_first(values, (labels >= 0) & (labels < count), column, f"{advice}; correct it or remove the row")
        if found and names != found and set(names) == set(found):  # the same classes, numbered in another order
            labels = np.array([names.index(name) for name in found])[labels]
    if len(names) < 2:
        raise ValueError(f"Column {column!r} holds the single class {names[0]!r}; a classifier needs at least two.")
    return labels, list(names)


# ---------------------------------------------------------------------------------------------------------- the evaluation


def evaluator(rows: TokenRows, batch_size: int) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures a classifier on ``rows``: each process computes its share, all return the same figures."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        numbers, (logits,) = compute_outputs(model, rows, batch_size, "logits")
        return classification_figures(torch.cat(logits), rows.labels[numbers])

    return evaluate


def classification_figures(logits: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 over the classes that occur, and cross entropy of ``logits`` (rows, classes)."""
    predicted = logits.argmax(-1).numpy()
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "loss": float(nn.functional.cross_entropy(logits, torch.from_numpy(labels))),
    }
