"""The ``distill`` stage: a smaller student learns from a larger, frozen teacher, on the common loop.

A student learns by one of three objectives, a module each: a classifier's logits and the labels (Hinton et al. 2015,
arXiv:1503.02531), DistilBERT's triple loss over masked words (Sanh et al. 2019, arXiv:1910.01108), or the vectors of an
embedding model with their similarities.
"""

from typing import Any

from minibert.train.stage import StageContext
from minibert.train.stages.distill.embedding import distill_embedding
from minibert.train.stages.distill.pretraining import distill_pretraining
from minibert.train.stages.distill.task import distill_task

_OBJECTIVES: dict[str, Any] = {
    "task": distill_task,
    "pretraining": distill_pretraining,
    "embedding": distill_embedding,
}


def distill(args: Any, context: StageContext) -> dict[str, Any]:
    """Train a student as ``args`` say; ``context.output_dir`` ends as its complete folder, without the teacher's weights.

    Args:
        args: a :class:`DistillTaskStage`, :class:`DistillPretrainingStage` or :class:`DistillEmbeddingStage`.

    Returns:
        The metrics of ``metrics.json``; with ``eval_data`` also the student's, as eval_accuracy and so on, and the teacher's
        on the same data, as teacher_accuracy and so on.

    Raises:
        ValueError: teacher and student do not fit together (labels, words, tokens, layers), or the data does not fit.
        OSError: a folder or Hub id holds no model, or no safetensors.
    """
    metrics: dict[str, Any] = _OBJECTIVES[args.objective](args, context)
    return metrics
