"""Fine-tune multiple choice, the ``choose`` stage: pick one of several choices."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForMultipleChoice

from minibert.data.load import check_columns, load
from minibert.data.questions import ChoiceColumns, Choices, choices_of, find_choice_columns
from minibert.files.processes import processes
from minibert.inference.answers import choose_rows
from minibert.train.arguments import ChooseStage
from minibert.train.rows import TokenizedDataset
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length
from minibert.train.stages.fitting import fit_stage


def choose(args: ChooseStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a model that scores choices; ``context.output_dir`` ends as a complete model folder.

    Returns:
        The metrics of ``metrics.json``; with ``eval_data`` also eval_accuracy and eval_loss of the best model.

    Raises:
        ValueError: missing columns, rows with different numbers of choices, a label that names no choice (names the row).
    """
    train = load(args.data, split="train")
    columns = find_choice_columns(train.column_names, args.text_columns, args.choice_columns)
    asked, labels = read_choices(train, columns, args.label_column, args.data)
    refuse_uneven(asked)
    evaluate = None
    if args.eval_data:
        held_out = load(args.eval_data, split="validation")
        find_choice_columns(held_out.column_names, columns.texts, columns.choices)
        _, expected = read_choices(held_out, columns, args.label_column, args.eval_data)

    tokenizer = load_tokenizer(context)
    # The head gives one score per choice; the problem type of an earlier classifier does not apply to it.
    changes: dict[str, Any] = {"num_labels": 1, "problem_type": None}
    if context.model is not None:
        start = AutoConfig.from_pretrained(context.model, trust_remote_code=False)
        # The head of a classifier has the same name but another shape: only then does a new one replace it.
        changes["ignore_mismatched_sizes"] = not (start.architectures or [""])[0].endswith("ForMultipleChoice")
    model = load_model(AutoModelForMultipleChoice, args, context, tokenizer, **changes)
    tokenizer.model_max_length = max_length = sequence_length(args.max_length, model.config, tokenizer)
    # Kept in config.json, so that files with the same columns are understood later.
    model.config.multiple_choice = {
        "max_length": max_length,
        "text_columns": list(columns.texts),
        "choice_columns": list(columns.choices),
    }

    rows = ChoiceRows.from_choices(asked, labels, tokenizer, max_length)
    if args.eval_data:
        evaluate = evaluator(held_out, columns, expected, tokenizer, args.eval_batch_size)
    return fit_stage(model, tokenizer, args, context, rows, evaluate, args.metric_for_best)


# ---------------------------------------------------------------------------------------------------------------- the data


def read_choices(
    rows: Dataset, columns: ChoiceColumns, label_column: str, sources: Sequence[Any]
) -> tuple[list[Choices], np.ndarray]:
    """Return the questions with their choices, and the number of the right choice of each.

    Raises:
        ValueError: a column has no value, or a label names no choice; names the row.
    """
    check_columns(rows, [*columns.texts, *columns.choices, label_column], sources)
    asked = list(choices_of(rows, columns))
    labels = []
    for number, (row, label) in enumerate(zip(asked, rows[label_column], strict=True), start=1):
        count = len(row.choices)
        if (choice := read_label(label, count)) is None:
            where = " + ".join(source.path for source in sources)
            raise ValueError(
                f"Row {number} of {where} has {label_column}={label!r}; with {count} choices it should be 0 to {count - 1}, or "
                f"A to {string.ascii_uppercase[min(count, 26) - 1]}."
            )
        labels.append(choice)
    return asked, np.array(labels, dtype=np.int64)


def read_label(label: Any, choices: int) -> int | None:
    """Return the number of a choice from 0, given as a number from 0, as its digits, or as a letter from A; else None.

    >>> [read_label(label, 4) for label in (3, "3", "D", "d", "E")]
    [3, 3, 3, 3, None]
    """
    if isinstance(label, str):
        text = label.strip()
        label = int(text) if text.isdecimal() else string.ascii_uppercase.find(text.upper()) if len(text) == 1 else None
    known = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < choices
    return label if known else None


def refuse_uneven(asked: Sequence[Choices]) -> None:
    """Refuse training rows with a single choice, or with different numbers of choices."""
    count = len(asked[0].choices)
    if count < 2:
        raise ValueError("Row 1 has a single choice, which leaves nothing to choose; give at least two.")
    for number, row in enumerate(asked, start=1):
        if len(row.choices) != count:
            raise ValueError(
                f"Row {number} has {len(row.choices)} choices, and those before it {count}; training needs the same number in "
                "every row, so complete or remove it."
            )


class ChoiceRows:
    """Questions, each tokenized with every one of its choices.

    Attributes:
        pairs: one row of tokens for each question and choice, the choices of a question one after the other.
        labels: (questions,) the right choice.
    """

    def __init__(self, pairs: TokenizedDataset, labels: np.ndarray):
        self.pairs, self.labels, self.choices = pairs, labels, len(pairs) // len(labels)

    @classmethod
    def from_choices(cls, asked: Sequence[Choices], labels: np.ndarray, tokenizer: Any, max_length: int) -> "ChoiceRows":
        """Tokenize, cutting the longer of question and choice first where both exceed ``max_length``."""
        firsts, seconds = zip(*(pair for row in asked for pair in row.pairs()), strict=True)
        texts = Dataset.from_dict({"first": firsts, "second": seconds})
        repeated = np.repeat(labels, len(texts) // len(labels))
        return cls(TokenizedDataset.from_texts(texts, ("first", "second"), repeated, tokenizer, max_length), labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.asarray(rows)

    @property
    def fingerprint(self) -> str:
        """Return a hash of all tokens and labels."""
        return self.pairs.fingerprint

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the inputs of the model, (rows, choices, longest) each, and labels (rows,)."""
        batch = self.pairs.collate((rows[:, None] * self.choices + np.arange(self.choices)).ravel())
        labels = batch.pop("labels").view(len(rows), self.choices)[:, 0]
        return {**{name: tensor.unflatten(0, (len(rows), self.choices)) for name, tensor in batch.items()}, "labels": labels}


# ---------------------------------------------------------------------------------------------------------- the evaluation


def evaluator(
    rows: Dataset, columns: ChoiceColumns, labels: np.ndarray, tokenizer: Any, batch_size: int
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that measures choices in ``rows``: each process computes its share, all return the same metrics."""

    def evaluate(model: Any) -> dict[str, float]:
        state = processes()
        mine = range(state.process_index, len(rows), state.num_processes)
        results = choose_rows(model, tokenizer, rows.select(mine), batch_size=batch_size)
        bar = tqdm(results, desc="evaluate", total=len(mine), leave=False, disable=not state.is_main_process)
        shares = gather_object([(number, result["probabilities"]) for number, result in zip(mine, bar, strict=True)])
        return choice_metrics([probabilities for _, probabilities in sorted(shares)], labels)

    return evaluate


def choice_metrics(probabilities: Sequence[Sequence[float]], labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Return the accuracy, and as loss the cross entropy of the right choices.

    >>> choice_metrics([[0.5, 0.5], [0.75, 0.25]], [0, 0])["accuracy"]
    1.0
    """
    right = [shares[label] for shares, label in zip(probabilities, labels, strict=True)]
    return {
        "accuracy": float(accuracy_score(labels, [int(np.argmax(shares)) for shares in probabilities])),
        "loss": float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()),
    }
