"""Train a classifier on labels and on the logits of a teacher."""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import ModelOutput

from minibert.data.labels import SINGLE
from minibert.inference.load import open_tokenizer
from minibert.inference.predict import class_names
from minibert.train.arguments import DistillTaskStage
from minibert.train.rows import TokenizedDataset, head_changes
from minibert.train.stage import StageContext, sequence_length
from minibert.train.stages.classify import measure as measure_classifier
from minibert.train.stages.classify import read_data
from minibert.train.stages.distill.student import Distillation, fit_student, load_student, soft_divergence
from minibert.train.stages.distill.teacher import TaughtRows, cached_teacher_outputs, fingerprint, load_teacher, same_tokens


class TaskDistillation(Distillation):
    """Compute ``alpha · T² · KL(teacher ‖ student) + (1 - alpha) · cross-entropy``."""

    def forward(self, labels: Tensor, teacher_logits: Tensor, **inputs: Any) -> ModelOutput:
        """Return the mean loss for ``labels`` (B,) and ``teacher_logits`` (B, classes)."""
        logits = self.student(**inputs).logits
        soft = soft_divergence(logits, teacher_logits, self.args.temperature)
        hard = F.cross_entropy(logits.float(), labels)
        return ModelOutput(loss=self.args.alpha * soft + (1 - self.args.alpha) * hard)


def distill_task(args: DistillTaskStage, context: StageContext) -> dict[str, Any]:
    """Train a classifier on labels and a teacher's logits. Return metrics of both models."""
    train, columns, labels, held_out = read_data(args, context)
    context.end_check()
    teacher = load_teacher(AutoModelForSequenceClassification, str(context.teacher), "a classifier")
    names = class_names(teacher.config)
    _check_labels(args, labels, teacher, names, str(context.teacher))
    teachers_number = np.array([names.index(name) for name in labels.names])  # for each class of the data

    tokenizer: Any = open_tokenizer(str(context.tokenizer))
    changes = head_changes(context, names)
    student = load_student(AutoModelForSequenceClassification, teacher, args, context, tokenizer, **changes)
    student.config.problem_type, student.config.text_columns = SINGLE, columns
    tokenizer.model_max_length = length = sequence_length(args.max_length, student.config, tokenizer)

    # The teacher has its own tokenizer, and reads at most as many tokens as the student.
    its_tokenizer = open_tokenizer(str(context.teacher))
    its_length = min(length, sequence_length(None, teacher.config, its_tokenizer))
    rows = read = TokenizedDataset.from_texts(train, columns, teachers_number[labels.values], tokenizer, length)
    if its_length != length or not same_tokens(tokenizer, its_tokenizer):
        read = TokenizedDataset.from_texts(train, columns, rows.labels, its_tokenizer, its_length)
    key = fingerprint(teacher, read.fingerprint, its_length)

    @torch.no_grad()
    def compute(some: range) -> np.ndarray:
        found = np.empty((len(some), len(names)), dtype=np.float32)
        for batch in read.batches(np.array(some), args.eval_batch_size):
            found[batch - some.start] = read.logits(teacher, batch).numpy()
        return found

    logits = cached_teacher_outputs(context.output_dir / "checkpoints", key, len(read), compute)

    measure = measure_teacher = None
    if held_out:
        rows_held_out, expected = held_out[0], teachers_number[held_out[1]]
        evaluate = partial(measure_classifier, problem_type=SINGLE, batch_size=args.eval_batch_size)
        measure, measure_teacher = (
            partial(evaluate, rows=TokenizedDataset.from_texts(rows_held_out, columns, expected, *reads))
            for reads in ((tokenizer, length), (its_tokenizer, its_length))
        )
    taught = TaughtRows(rows, "teacher_logits", logits, key)
    distillation = TaskDistillation(args, student, teacher)
    return fit_student(distillation, tokenizer, args, context, taught, measure, measure_teacher)


def _check_labels(args: DistillTaskStage, labels: Any, teacher: Any, names: list[str], source: str) -> None:
    """Refuse rows with several labels, and a teacher with different classes."""
    if labels.problem_type != SINGLE or teacher.config.problem_type not in (None, SINGLE):
        raise ValueError(
            "objective: task needs one label per row and a teacher for such labels, but column "
            f"{args.label_column!r} is {labels.problem_type}, and the teacher was trained for "
            f"{teacher.config.problem_type or SINGLE}. Change the data or the teacher."
        )
    if len(set(names)) != len(names) or set(names) != set(labels.names):
        raise ValueError(
            f"The teacher {source} has the classes {', '.join(names)}, but the data has "
            f"{', '.join(labels.names)}. If the classes mean the same, set labels: to the teacher's names in "
            "the order of the data. Otherwise, use a different teacher."
        )
