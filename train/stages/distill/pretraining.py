"""Train a language model with the three losses of DistilBERT."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForMaskedLM
from transformers.utils import ModelOutput

from minibert.inference.load import open_config, open_tokenizer
from minibert.train.arguments import DistillPretrainingStage
from minibert.train.stage import StageContext, sequence_length
from minibert.train.stages.distill.student import Distillation, cosine_distance, fit_student, load_student, soft_divergence
from minibert.train.stages.distill.teacher import fingerprint, load_teacher, same_tokens
from minibert.train.stages.pretrain import Masking, PackedRows, check_documents, corpora, measure, refuse_unpacked


class MaskedLMDistillation(Distillation):
    """Compute the three losses of DistilBERT (Sanh et al. 2019, section 2).

    At masked positions, the student learns the correct word and the teacher's distribution of
    words. At all tokens, it learns the direction of the teacher's last hidden state.
    """

    def forward(self, labels: Tensor, **inputs: Any) -> ModelOutput:
        """Return the loss of a packed sequence. Unmasked tokens have the label -100."""
        args, masked = self.args, labels != -100
        states = self.student.minibert(**inputs).last_hidden_state  # (1, T, C)
        logits = self.student.lm_head(states[masked])  # (masked, V)
        with torch.no_grad():
            teacher_states = self.teacher.minibert(**inputs).last_hidden_state
            teacher_logits = self.teacher.lm_head(teacher_states[masked]) if args.kl_weight else None
        loss = states.new_zeros(())
        if teacher_logits is not None:
            loss = loss + args.kl_weight * soft_divergence(logits, teacher_logits, args.temperature)
        if args.mlm_weight:
            words = F.cross_entropy(logits.float(), labels[masked], reduction="sum") / max(1, len(logits))
            loss = loss + args.mlm_weight * words
        if args.cosine_weight:
            loss = loss + args.cosine_weight * cosine_distance(states[0], teacher_states[0])
        return ModelOutput(loss=loss)


def distill_pretraining(args: DistillPretrainingStage, context: StageContext) -> dict[str, Any]:
    """Train a language model on a teacher's outputs. Return metrics of both models."""
    check_documents(args, context)
    source = str(context.teacher)
    refuse_unpacked(open_config(source), f"The teacher {source}")
    teacher = load_teacher(AutoModelForMaskedLM, source, "a model that predicts masked words")
    tokenizer: Any = open_tokenizer(str(context.tokenizer))
    if not same_tokens(tokenizer, open_tokenizer(source)):
        raise ValueError(
            f"objective: pretraining needs equal vocabularies, but the teacher {source} and "
            f"{context.tokenizer} have different tokenizers. Set tokenizer: to the teacher, or use "
            "objective: task or embedding."
        )
    masking = Masking(tokenizer, args)
    student = load_student(AutoModelForMaskedLM, teacher, args, context, tokenizer)
    refuse_unpacked(student.config, f"The student {context.model}")
    widths = student.config.hidden_size, teacher.config.hidden_size
    if args.cosine_weight and widths[0] != widths[1]:
        raise ValueError(
            f"The student has hidden_size={widths[0]}, but the teacher has {widths[1]}. The cosine loss "
            f"needs equal sizes; give the student hidden_size={widths[1]}, or set cosine_weight: 0."
        )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"The student has vocab_size={student.config.vocab_size}, but the teacher has "
            f"{teacher.config.vocab_size}; give the student the vocab_size of the teacher."
        )
    length = min(sequence_length(args.max_length, model.config, tokenizer) for model in (student, teacher))
    tokenizer.model_max_length = sequence_length(None, student.config, tokenizer)

    corpus, *held_out = corpora(args, tokenizer)
    rows = PackedRows(corpus, length, masking)
    # A run must not resume with another teacher.
    rows.fingerprint = f"{rows.fingerprint}-{fingerprint(teacher)}"
    evaluate = None
    if held_out:
        evaluate = partial(measure, rows=PackedRows(held_out[0], length, masking), batch_size=args.eval_batch_size)
    distillation = MaskedLMDistillation(args, student, teacher)
    return fit_student(distillation, tokenizer, args, context, rows, evaluate)
