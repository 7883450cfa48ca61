"""Fine-tune models for multiple choice (the ``choose`` stage)."""

import string
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import AutoModelForMultipleChoice

from minibert.data.load import check_columns, load
from minibert.data.questions import Choices, choices_of, find_choice_columns
from minibert.data.source import joined_paths
from minibert.inference.answers import choose_rows
from minibert.inference.load import open_config
from minibert.train.arguments import ChooseStage
from minibert.train.loop import fit
from minibert.train.rows import TokenizedDataset, results_of
from minibert.train.stage import StageContext, load_start


def choose(args: ChooseStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a multiple choice model, and return training metrics, accuracy and loss."""
    train = load(args.data, split="train")
    columns = find_choice_columns(train.column_names, args.text_columns, args.choice_columns)
    asked, labels = read_choices(train, columns, args.label_column, args.data)
    refuse_uneven(asked)
    uses = {name: name for name in (*columns[0], *columns[1])} | {"right choice": args.label_column}
    context.note_columns(args.data, train, uses, **{"right choice": asked[0].choices[labels[0]]})
    if args.eval_data:
        held_out = load(args.eval_data, split="validation")
        find_choice_columns(held_out.column_names, *columns)
        _, expected = read_choices(held_out, columns, args.label_column, args.eval_data)
    context.end_check()

    # The head has one score per choice. The problem type of an earlier classifier is not used.
    changes: dict[str, Any] = {"num_labels": 1, "problem_type": None}
    if context.model is not None:
        start = open_config(context.model)
        # The head of a classifier has the same name but another shape. Create a new head.
        architecture = (start.architectures or [""])[0]
        changes["ignore_mismatched_sizes"] = not architecture.endswith("ForMultipleChoice")
    tokenizer, model, max_length = load_start(AutoModelForMultipleChoice, args, context, **changes)
    # Prediction reads these values from config.json, for files with the same columns.
    model.config.multiple_choice = {
        "max_length": max_length,
        "text_columns": columns[0],
        "choice_columns": columns[1],
    }
    evaluate = None
    if args.eval_data:
        evaluate = partial(measure, rows=held_out, labels=expected, tokenizer=tokenizer, batch_size=args.eval_batch_size)
    rows = ChoiceRows(asked, labels, tokenizer, max_length)
    return fit(model, tokenizer, rows, args, context, evaluate, args.metric_for_best)


def read_choices(
    rows: Dataset, columns: tuple[list[str], list[str]], label_column: str, sources: Sequence[Any]
) -> tuple[list[Choices], np.ndarray]:
    """Return the choices of each row, and the index of the right choice of each row."""
    check_columns(rows, [*columns[0], *columns[1], label_column], sources)
    asked = list(choices_of(rows, columns))
    labels = []
    for number, (row, label) in enumerate(zip(asked, rows[label_column], strict=True), start=1):
        count = len(row.choices)
        if (choice := read_label(label, count)) is None:
            where = joined_paths(sources)
            raise ValueError(
                f"Row {number} of {where} has {label_column}={label!r}; with {count} choices, it should be "
                f"0 to {count - 1}, or A to {string.ascii_uppercase[min(count, 26) - 1]}."
            )
        labels.append(choice)
    return asked, np.array(labels, dtype=np.int64)


def read_label(label: Any, choices: int) -> int | None:
    """Convert a number, digits or a letter to the index of a choice, or return None.

    >>> [read_label(label, 4) for label in (3, "3", "D", "d", "E")]
    [3, 3, 3, 3, None]
    """
    if isinstance(label, str):
        text = label.strip()
        letter = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else None
        label = int(text) if text.isdecimal() else letter
    known = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < choices
    return label if known else None


def refuse_uneven(asked: Sequence[Choices]) -> None:
    """Raise ValueError if rows have only one choice, or different numbers of choices."""
    count = len(asked[0].choices)
    if count < 2:
        raise ValueError("Row 1 has only one choice; give at least two choices in every row.")
    for number, row in enumerate(asked, start=1):
        if len(row.choices) != count:
            raise ValueError(
                f"Row {number} has {len(row.choices)} choices, but earlier rows have {count}. Training "
                "needs equal numbers of choices; complete or remove this row."
            )


class ChoiceRows:
    """Store tokenized pairs of a question and a choice.

    Attributes:
        pairs: one row for each pair of question and choice. Pairs of a question are adjacent.
        choices: number of choices of each question.
    """

    def __init__(self, asked: Sequence[Choices], labels: np.ndarray, tokenizer: Any, max_length: int):
        """Tokenize each question with each choice. The longer text of a pair is cut first."""
        firsts, seconds = zip(*(pair for row in asked for pair in row.pairs), strict=True)
        texts = Dataset.from_dict({"first": firsts, "second": seconds})
        self.choices = len(texts) // len(labels)
        repeated = np.repeat(labels, self.choices)
        self.pairs = TokenizedDataset.from_texts(texts, ("first", "second"), repeated, tokenizer, max_length)
        self.fingerprint = self.pairs.fingerprint

    def __len__(self) -> int:
        return len(self.pairs) // self.choices

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return model inputs, each (rows, choices, longest pair), and labels (rows,)."""
        batch = self.pairs.collate((rows[:, None] * self.choices + np.arange(self.choices)).ravel())
        labels = batch.pop("labels").view(len(rows), self.choices)[:, 0]
        inputs = {name: tensor.unflatten(0, (len(rows), self.choices)) for name, tensor in batch.items()}
        return {**inputs, "labels": labels}


def measure(model: Any, rows: Dataset, labels: np.ndarray, tokenizer: Any, batch_size: int) -> dict[str, float]:
    """Return :func:`choice_metrics` of a model."""
    results = results_of(rows, lambda mine: choose_rows(model, tokenizer, mine, batch_size=batch_size))
    return choice_metrics([result["probabilities"] for result in results], labels)


def choice_metrics(probabilities: Sequence[Sequence[float]], labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the accuracy and the loss. The loss is the cross entropy of the right choices.

    >>> choice_metrics([[0.5, 0.5], [0.75, 0.25]], [0, 0])["accuracy"]
    1.0
    """
    right = [shares[label] for shares, label in zip(probabilities, labels, strict=True)]
    return {
        "accuracy": float(accuracy_score(labels, [int(np.argmax(shares)) for shares in probabilities])),
        "loss": float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()),
    }
