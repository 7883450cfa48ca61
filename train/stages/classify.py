"""The ``classify`` stage: a head on top of an encoder that tells classes of texts, or of pairs of texts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification

from minibert.data.labels import read_labels
from minibert.data.load import TEXT_COLUMNS, check_columns, load, text_columns
from minibert.evaluation.metrics import FIGURES, SMALLER_IS_BETTER, classification_figures
from minibert.train.arguments import ClassifyStage
from minibert.train.loop import fit, processes
from minibert.train.rows import TokenRows, choose_metric, compute_outputs, head_changes, in_eval_data
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length


def classify(args: ClassifyStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a classifier of texts or pairs; ``context.output_dir`` ends as a complete model folder.

    Returns:
        The figures of ``metrics.json``; with ``eval_data`` also those of :func:`classification_figures`, of the best model,
        as eval_accuracy and so on.

    Raises:
        ValueError: missing columns, a label that is no class (with its row), an unknown metric, no positions for a text.
    """
    train = load(args.data, split="train")
    columns = find_text_columns(train, args.text_columns, args.label_column, args.data)
    labels = read_labels(train, args.label_column, args.labels, args.problem_type)
    metric = choose_metric(args.metric_for_best, FIGURES[labels.problem_type])
    held_out = load(args.eval_data, split="validation") if args.eval_data else None

    tokenizer = load_tokenizer(context)
    model = load_model(
        AutoModelForSequenceClassification,
        args,
        context,
        tokenizer,
        problem_type=labels.problem_type,
        **head_changes(context, labels.names),
    )
    tokenizer.model_max_length = max_length = sequence_length(args.max_length, model.config, tokenizer)
    model.config.text_columns = list(columns)  # kept in config.json, so that files with the same columns are understood later

    rows = TokenRows.from_texts(train, columns, labels.values, tokenizer, max_length)
    evaluate = None
    if held_out is not None and args.eval_data:
        find_text_columns(held_out, columns, args.label_column, args.eval_data)
        with in_eval_data():
            expected = read_labels(held_out, args.label_column, labels.names, labels.problem_type)
        evaluated = TokenRows.from_texts(held_out, columns, expected.values, tokenizer, max_length)
        evaluate = evaluator(evaluated, labels.problem_type, args.eval_batch_size)
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
        metric_for_best=metric if evaluate else None,
        greater_is_better=metric not in SMALLER_IS_BETTER,
    )


# ---------------------------------------------------------------------------------------------------------------- the data


def find_text_columns(
    rows: Dataset, wanted: Sequence[str] | None, label_column: str | Sequence[str], sources: Sequence[Any]
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
    check_columns(rows, [*columns, *([label_column] if isinstance(label_column, str) else label_column)], sources)
    if not_text := sorted(set(columns) - set(text_columns(rows))):
        raise ValueError(f"Column {', '.join(map(repr, not_text))} of {sources[0].path} does not hold text; choose others.")
    return columns


# ---------------------------------------------------------------------------------------------------------- the evaluation


def evaluator(rows: TokenRows, problem_type: str, batch_size: int) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures a classifier on ``rows``: each process computes its share, all return the same figures."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        numbers, (logits,) = compute_outputs(model, rows, batch_size, "logits")
        return classification_figures(torch.cat(logits), rows.labels[numbers], problem_type)

    return evaluate
