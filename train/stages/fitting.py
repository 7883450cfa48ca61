"""Train the model of a stage on the common loop."""

from collections.abc import Callable
from typing import Any

from torch import nn

from minibert.files.processes import processes
from minibert.train.arguments import LoopArguments
from minibert.train.loop import Phase, fit
from minibert.train.stage import StageContext


def fit_stage(
    model: nn.Module,
    tokenizer: Any,
    args: LoopArguments,
    context: StageContext,
    rows: Any,
    evaluate: Callable[[Any], dict[str, float]] | None,
    metric: str | None,
) -> dict[str, Any]:
    """Save ``tokenizer`` into the folder of the stage, train ``model`` there, and return the metrics.

    Args:
        rows: the training data, with a ``collate`` method that makes a batch; or a list of phases.
        evaluate: measures the model; None without evaluation data.
        metric: the metric of ``evaluate`` that picks the checkpoint kept as the result; None keeps the last.
    """
    if processes().is_main_process:
        tokenizer.save_pretrained(context.output_dir)
    phases = rows if isinstance(rows, list) else [Phase(rows, rows.collate, args.batch_size, args.learning_rate)]
    picks: dict[str, Any] = {"evaluate": evaluate, "metric_for_best": metric} if evaluate else {}
    return fit(model, phases, arguments=args, output_dir=context.output_dir, seed=context.seed, **picks)
