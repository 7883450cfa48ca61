"""Measure a model on data sets (the ``evaluate`` stage)."""

from typing import Any

from minibert.data.load import load
from minibert.evaluation.evaluate import evaluate
from minibert.inference import bm25  # noqa: F401  # reports a missing package before training
from minibert.train.arguments import EvaluateStage
from minibert.train.stage import StageContext


def evaluate_model(args: EvaluateStage, context: StageContext) -> dict[str, Any]:
    """Return a dictionary from the path of each data set to the metrics of the model."""
    parts = [load([source], split="validation") for source in args.data]
    for source, data in zip(args.data, parts, strict=True):
        context.note_columns([source], data, {name: name for name in data.column_names})
    context.end_check()
    used, context.data = context.data, []  # kept with the metrics of each data set
    metrics = {}
    for source, data, columns in zip(args.data, parts, used, strict=True):
        name = source.path if source.split is None else f"{source.path} {source.split}"
        how: Any = {"limit": args.limit, "task": args.task, "baselines": args.baselines, "batch_size": args.batch_size}
        metrics[name] = {**evaluate(str(context.model), data, **how), "data": columns}
    return metrics
