"""Fine-tune classifiers of texts or text pairs (the ``classify`` stage)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification

from minibert.data.columns import pick_columns
from minibert.data.labels import Labels, read_labels
from minibert.data.load import TEXT_COLUMNS, check_columns, load, text_columns
from minibert.evaluation.metrics import METRICS, classification_metrics
from minibert.train.arguments import ClassifyStage, DistillTaskStage
from minibert.train.loop import fit
from minibert.train.rows import TokenizedDataset, choose_metric, compute_outputs, head_changes, in_eval_data
from minibert.train.stage import StageContext, load_start


def classify(args: ClassifyStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a classifier, and return training and classification metrics."""
    train, columns, labels, held_out = read_data(args, context, args.problem_type)
    weights = labels.class_weights(args.class_weights)
    context.end_check()
    metric = choose_metric(args.metric_for_best, METRICS[labels.problem_type])

    tokenizer, model, max_length = load_start(
        AutoModelForSequenceClassification,
        args,
        context,
        problem_type=labels.problem_type,
        **head_changes(context, labels.names),
    )
    model.config.text_columns = columns  # prediction reads them from config.json

    evaluate = None
    if held_out:
        evaluated = TokenizedDataset.from_texts(held_out[0], columns, held_out[1], tokenizer, max_length)
        evaluate = partial(measure, rows=evaluated, problem_type=labels.problem_type, batch_size=args.eval_batch_size)
    rows = TokenizedDataset.from_texts(train, columns, labels.values, tokenizer, max_length)
    return fit(model, tokenizer, rows, args, context, evaluate, metric, weights)


def read_data(
    args: ClassifyStage | DistillTaskStage, context: StageContext, problem_type: str | None = None
) -> tuple[Dataset, list[str], Labels, tuple[Dataset, np.ndarray] | None]:
    """Return the training data, text columns, labels, and evaluation data with labels."""
    train = load(args.data, split="train")
    columns = find_text_columns(train, args.text_columns, args.label_column, args.data)
    labels = read_labels(train, args.label_column, args.labels, problem_type)
    single = {"label": args.label_column} if isinstance(args.label_column, str) else {}
    context.note_columns(args.data, train, {name: name for name in columns} | single, label=labels.first())
    held_out = None
    if args.eval_data:
        rows = load(args.eval_data, split="validation")
        find_text_columns(rows, columns, args.label_column, args.eval_data)
        with in_eval_data():
            held_out = rows, read_labels(rows, args.label_column, labels.names, labels.problem_type).values
    return train, columns, labels, held_out


def find_text_columns(
    rows: Dataset, wanted: Sequence[str] | None, label_column: str | Sequence[str], sources: Sequence[Any]
) -> list[str]:
    """Return ``wanted``, or detect text columns. Raise ValueError for missing values."""
    labels = [label_column] if isinstance(label_column, str) else list(label_column)
    found = [name for name in text_columns(rows) if name not in labels]
    where, every = sources[0].path, rows.column_names
    columns = pick_columns(found, wanted, TEXT_COLUMNS, option="text_columns", where=where, columns=every)
    check_columns(rows, [*columns, *labels], sources)
    return columns


def measure(model: nn.Module, rows: TokenizedDataset, problem_type: str, batch_size: int) -> dict[str, Any]:
    """Return the metrics of a classifier. Processes divide the work."""
    numbers, logits = compute_outputs(model, rows, batch_size)
    return classification_metrics(torch.cat(logits), rows.labels[numbers], problem_type)
