"""Make a student from layers of its teacher, and train it under the loss of its objective."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from minibert.train.arguments import DistillStage
from minibert.train.loop import checkpoint_activations, fit
from minibert.train.rows import choose_metric
from minibert.train.stage import StageContext


def choose_layers(wanted: int | Sequence[int], available: int) -> list[int]:
    """Return the layers that a student starts from: so many, spread evenly, or those listed.

    >>> choose_layers(6, 12)  # those of DistilBERT
    [0, 2, 4, 7, 9, 11]
    >>> choose_layers(3, 6)
    [0, 3, 5]
    """
    if isinstance(wanted, int):
        numbers = [math.floor(place + 0.5) for place in np.linspace(0, available - 1, wanted)]
    else:
        numbers = list(wanted)
    if len(numbers) > available or max(numbers) >= available:
        raise ValueError(
            f"student_layers={wanted} asks for more than the teacher's {available} layers, which are "
            f"counted from 0 to {available - 1}; choose fewer."
        )
    return numbers


def from_layers(teacher: Any, args: DistillStage, source: str | None) -> Any:
    """Copy a MiniBERT ``teacher`` with some of its layers, trainable, in float32."""
    assert args.student_layers is not None
    kind = teacher.config.model_type
    if kind != "minibert":
        raise ValueError(
            f"student_layers takes layers of a MiniBERT, and the teacher {source} is a {kind} model; "
            f"convert it with: minibert hub convert {source} FOLDER, and give teacher: FOLDER, or give "
            "model: instead of student_layers."
        )
    chosen = choose_layers(args.student_layers, teacher.config.num_hidden_layers)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.dtype = len(chosen), None
    if args.dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = args.dropout
    student, weights = type(teacher)(config), teacher.state_dict()

    def teachers_name(name: str) -> str:
        return re.sub(r"\blayers\.(\d+)", lambda layer: f"layers.{chosen[int(layer[1])]}", name)

    student.load_state_dict({name: weights[teachers_name(name)] for name in student.state_dict()})
    return student


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T² · KL(teacher ‖ student)`` of logits (rows, classes) over T, as a mean over rows.

    The factor keeps the size of the gradient, which shrinks as 1 / T². It is 0 without
    rows.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        log_target=True,
        reduction="sum",
    )
    return divergence * (temperature**2 / max(1, len(student)))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the cosine between vectors (rows, C), as a mean over the rows."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


class Distillation(nn.Module):
    """A student under the loss of its objective; the student alone is saved."""

    teacher: Any

    def __init__(self, args: Any, student: Any, teacher: Any = None):
        super().__init__()
        self.args, self.student = args, student
        # Not set through nn.Module: the teacher is not trained, saved, or put into
        # training mode.
        object.__setattr__(self, "teacher", teacher)

    def save_pretrained(self, folder: Path) -> None:
        """Save the student into ``folder``."""
        options = {"create_model_card": False} if isinstance(self.student, SentenceTransformer) else {}
        self.student.save_pretrained(str(folder), **options)

    def activation_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Recompute the student's activations in the backward pass."""
        wrapped = isinstance(self.student, SentenceTransformer)
        checkpoint_activations(self.student[0].auto_model if wrapped else self.student)


def fit_student(
    distillation: Distillation,
    tokenizer: Any,
    args: Any,
    context: StageContext,
    rows: Any,
    measure: Callable[[Any], dict[str, float]] | None,
    measure_teacher: Callable[[Any], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Train the student of ``distillation`` with :func:`fit`.

    ``measure`` measures a model (None without evaluation data), and ``measure_teacher``
    the teacher, if it reads other tokens.

    Returns:
        The metrics and size of the student, and those of the teacher.
    """
    evaluate, teacher_metrics = None, {}
    if measure is not None:
        teacher_metrics = (measure_teacher or measure)(distillation.teacher)
        choose_metric(args.metric_for_best, list(teacher_metrics))

        def evaluate(trained: Any) -> dict[str, float]:
            return measure(trained.student)

    metrics = fit(distillation, tokenizer, rows, args, context, evaluate, args.metric_for_best)
    for name, model in (("parameters", distillation.student), ("teacher_parameters", distillation.teacher)):
        metrics[name] = sum(parameter.numel() for parameter in model.parameters())
    return metrics | {f"teacher_{name}": value for name, value in teacher_metrics.items()}
