"""Create a student from layers of a teacher, and train it."""

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
from minibert.train.stage import StageContext, load_model


def choose_layers(wanted: int | Sequence[int], available: int) -> list[int]:
    """Return the numbers of the teacher layers to copy.

    ``wanted`` is a list of layers, or a number of layers to choose at equal distances.

    >>> choose_layers(6, 12)  # as in DistilBERT
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
            f"student_layers={wanted} is not possible: the teacher has {available} layers, numbered from 0 "
            f"to {available - 1}. Choose existing layers."
        )
    return numbers


def load_student(
    auto_class: Any, teacher: Any, args: DistillStage, context: StageContext, tokenizer: Any, **changes: Any
) -> Any:
    """Return a student with layers of ``teacher``, or the model of the stage, in float32."""
    if args.student_layers:
        return from_layers(teacher, args, context.teacher).float()
    return load_model(auto_class, args, context, tokenizer, **changes).float()


def from_layers(teacher: Any, args: DistillStage, source: str | None) -> Any:
    """Return a MiniBERT with copies of the teacher layers that ``args`` selects."""
    assert args.student_layers is not None
    kind = teacher.config.model_type
    if kind != "minibert":
        raise ValueError(
            f"student_layers needs a MiniBERT teacher, but {source} is a {kind} model. Convert the teacher "
            f"with minibert hub convert {source} FOLDER and set teacher: FOLDER, or set model: instead of "
            "student_layers."
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
    """Return ``T² · KL(teacher ‖ student)`` for logits (rows, classes), averaged over rows.

    Logits are divided by the temperature T. The factor T² avoids small gradients at high
    temperatures. The result is 0 if there are no rows.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        log_target=True,
        reduction="sum",
    )
    return divergence * (temperature**2 / max(1, len(student)))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the mean cosine between the rows of two tensors (rows, C)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


class Distillation(nn.Module):
    """Combine a student with a distillation loss. Only the student is trained and saved."""

    teacher: Any

    def __init__(self, args: Any, student: Any, teacher: Any = None):
        super().__init__()
        self.args, self.student = args, student
        # Outside of the submodules, the teacher is not trained or saved.
        object.__setattr__(self, "teacher", teacher)

    def save_pretrained(self, folder: Path) -> None:
        """Save the student in ``folder``."""
        options = {"create_model_card": False} if isinstance(self.student, SentenceTransformer) else {}
        self.student.save_pretrained(str(folder), **options)

    def activation_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """Enable gradient checkpointing for the student."""
        wrapped = isinstance(self.student, SentenceTransformer)
        checkpoint_activations(self.student[0].auto_model if wrapped else self.student)


def fit_student(
    distillation: Distillation,
    tokenizer: Any,
    args: Any,
    context: StageContext,
    rows: Any,
    measure: Callable[[Any], dict[str, Any]] | None,
    measure_teacher: Callable[[Any], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train the student with :func:`fit`, and return the metrics of both models.

    ``measure_teacher`` measures the teacher. The default is ``measure``, which is None without
    evaluation data. Names of teacher metrics begin with ``teacher_``.
    """
    evaluate, teacher_metrics = None, {}
    if measure is not None:
        teacher_metrics = (measure_teacher or measure)(distillation.teacher)
        choose_metric(args.metric_for_best, list(teacher_metrics))

        def evaluate(trained: Any) -> dict[str, Any]:
            return measure(trained.student)

    metrics = fit(distillation, tokenizer, rows, args, context, evaluate, args.metric_for_best)
    for name, model in (("parameters", distillation.student), ("teacher_parameters", distillation.teacher)):
        metrics[name] = sum(parameter.numel() for parameter in model.parameters())
    return metrics | {f"teacher_{name}": value for name, value in teacher_metrics.items()}
