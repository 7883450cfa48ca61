"""Measure the model of a recipe on data sets."""

from typing import Any

from minibert.data.load import load
from minibert.evaluation.evaluate import evaluate
from minibert.inference import bm25  # noqa: F401  # its absence shows before the first stage trains
from minibert.train.arguments import EvaluateStage
from minibert.train.stage import StageContext


def evaluate_model(args: EvaluateStage, context: StageContext) -> dict[str, Any]:
    """Return the metrics of the model on each data set of the ``evaluate`` stage, by the path of the data set."""
    metrics = {}
    for source in args.data:
        data = load([source], split="validation")
        name = source.path if source.split is None else f"{source.path} {source.split}"
        metrics[name] = evaluate(
            str(context.model), data, limit=args.limit, baselines=args.baselines, batch_size=args.batch_size
        )
    return metrics
