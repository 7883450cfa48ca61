"""Train an embedding model on a teacher's vectors of unlabelled texts."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from minibert.data.columns import pick_columns
from minibert.data.load import load, text_columns
from minibert.data.source import DataSource
from minibert.evaluation.evaluate import evaluate
from minibert.files.disk import read_settings, write_json
from minibert.files.processes import processes
from minibert.inference.load import embedder, find_folder, open_tokenizer
from minibert.inference.load import fingerprint as fingerprint_of_folder
from minibert.inference.load import load as load_embedder
from minibert.train.arguments import DistillEmbeddingStage
from minibert.train.loop import in_precision
from minibert.train.rows import TokenizedDataset
from minibert.train.stage import StageContext, sequence_length
from minibert.train.stages.distill.student import Distillation, cosine_distance, fit_student, load_student
from minibert.train.stages.distill.teacher import TaughtRows, cached_teacher_outputs, fingerprint, freeze, same_tokens
from minibert.train.stages.distill.vocabulary import keep_frequent_tokens

# The score is the mean of these metrics over the data sets.
_MAIN_METRIC = {"similarity": "spearman", "retrieval": "ndcg@10", "triplets": "accuracy", "classification": "accuracy"}


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared distance between the rows of two tensors (rows, C)."""
    return (student.float() - teacher.float()).square().sum(dim=-1).mean()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of the student's cosines between all pairs of rows."""
    first, second = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return F.mse_loss(first @ first.t(), second @ second.t())  # (rows, rows)


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean squared error of hidden states (B, L, C) where ``mask`` (B, L) is 1.

    ``student`` and ``teacher`` contain the embeddings and then the output of each layer. A student
    layer is compared with the teacher layer at the same relative depth.
    """
    real = mask.bool()
    depth = (len(teacher) - 1) / (len(student) - 1)
    errors = [
        F.mse_loss(states[real].float(), teacher[math.floor(number * depth + 0.5)][real].float())
        for number, states in enumerate(student)
    ]
    return torch.stack(errors).mean()


class EmbeddingDistillation(Distillation):
    """Compute the weighted losses of vectors, similarities and hidden states.

    If vectors of student and teacher have different sizes, a linear layer converts the vectors
    of the student. The layer is trained but not saved: with ``keep_projection``, the student itself
    ends in such a layer. Hidden states are converted likewise.
    """

    def __init__(self, args: DistillEmbeddingStage, student: Any, teacher: Any):
        super().__init__(args, student, teacher)
        self.vector_map: nn.Module = nn.Identity()
        self.state_map: nn.Module = nn.Identity()
        if args.vector_weight:
            self.vector_map = _map_between(*(model.get_embedding_dimension() for model in (student, teacher)))
        if args.hidden_weight:
            self.state_map = _map_between(*(model[0].auto_model.config.hidden_size for model in (student, teacher)))

    def forward(self, teacher_vectors: Tensor | None = None, labels: Tensor | None = None, **inputs: Any) -> ModelOutput:
        """Return the loss of a batch of texts. ``labels`` are not used.

        If ``teacher_vectors`` (B, C) are None, the teacher computes them.
        """
        args, hidden = self.args, self.args.hidden_weight > 0
        vectors, states = vectors_and_states(self.student, inputs, hidden)
        if teacher_vectors is None or hidden:
            with torch.no_grad():
                teacher_vectors, teacher_states = vectors_and_states(self.teacher, inputs, hidden)
        loss = vectors.new_zeros((), dtype=torch.float32)
        if args.vector_weight:
            distance = cosine_distance if args.vector_loss == "cosine" else squared_distance
            loss = loss + args.vector_weight * distance(self.vector_map(vectors), teacher_vectors)
        if args.similarity_weight:
            prefixes = [vectors, *(vectors[:, :size] for size in args.matryoshka_dims or ())]
            errors = torch.stack([similarity_error(prefix, teacher_vectors) for prefix in prefixes])
            loss = loss + args.similarity_weight * errors.mean()
        if hidden:
            mapped = [self.state_map(state) for state in states]
            loss = loss + args.hidden_weight * hidden_error(mapped, teacher_states, inputs["attention_mask"])
        return ModelOutput(loss=loss)


def _map_between(student: int, teacher: int) -> nn.Module:
    return nn.Identity() if student == teacher else nn.Linear(student, teacher, bias=False)


def vectors_and_states(model: Any, inputs: dict[str, Tensor], hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the text vectors (B, C) and, if ``hidden``, the states (B, L, C) of all layers."""
    if not hidden:
        return model(dict(inputs))["sentence_embedding"], ()
    output = model[0].auto_model(**inputs, output_hidden_states=True, return_dict=True)
    features: dict[str, Any] = {**inputs, "token_embeddings": output.last_hidden_state}
    for module in list(model)[1:]:
        features = module(features)
    return features["sentence_embedding"], output.hidden_states


def distill_embedding(args: DistillEmbeddingStage, context: StageContext) -> dict[str, Any]:
    """Train an embedding model on a teacher's vectors. Return metrics of both models."""
    texts = read_texts(args, context)
    held_out = [(name, load([source], split="validation")) for name, source in _named(args.eval_data or [])]
    context.end_check()
    teacher: SentenceTransformer = freeze(load_embedder(str(context.teacher)))
    prompt = teacher.prompts.get(teacher.default_prompt_name or "") or ""  # encode() adds it
    prompted = Dataset.from_dict({"text": [prompt + text for text in texts]})
    student, length = _student(args, context, teacher, prompted)
    # The teacher reads at most as many tokens as the student.
    teacher.max_seq_length = min(length, teacher.max_seq_length or length)

    key = fingerprint(teacher, texts, teacher.max_seq_length, args.eval_batch_size, args.precision)

    def compute(some: range) -> Any:
        with in_precision(args):
            return teacher.encode(texts[some.start : some.stop], batch_size=args.eval_batch_size, show_progress_bar=False)

    # Hidden states are too large for the cache, so the teacher runs at every step.
    vectors = (
        None if args.hidden_weight else cached_teacher_outputs(context.output_dir / "checkpoints", key, len(texts), compute)
    )
    dims = args.matryoshka_dims or ()
    measured = partial(measure, held_out=held_out, dims=dims, batch_size=args.eval_batch_size) if held_out else None
    rows = TokenizedDataset.from_texts(prompted, ["text"], np.zeros(len(texts)), student.tokenizer, length)
    taught = TaughtRows(rows, "teacher_vectors", vectors, key)
    distillation = EmbeddingDistillation(args, student, teacher)
    metrics = fit_student(distillation, student.tokenizer, args, context, taught, measured)
    if args.vector_weight and isinstance(distillation.vector_map, nn.Identity) and processes().is_main_process:
        # Queries of the student find texts that the teacher encoded, or the model that the teacher was converted from.
        file, folder = context.output_dir / "config_sentence_transformers.json", find_folder(str(context.teacher))
        found = [fingerprint_of_folder(folder), read_settings(folder / "conversion.json").get("fingerprint")]
        write_json(file, {**read_settings(file), "teachers": [one for one in found if one]})
    return {**metrics, "train_texts": len(texts)}


def read_texts(args: DistillEmbeddingStage, context: StageContext) -> list[str]:
    """Return the distinct texts of all sources in order. Sources may have different columns."""
    texts: dict[str, None] = {}
    for source in args.data:
        dataset = load([source], sample_by=args.sample_by)
        found, every = text_columns(dataset), dataset.column_names
        columns = pick_columns(
            found, args.text_columns, [found] if found else [], option="text_columns", where=source.path, columns=every
        )
        context.note_columns([source], dataset, {name: name for name in columns})
        if context.only_check:  # the texts themselves are read once, when the stage runs
            continue
        for batch in dataset.select_columns(columns).iter(1000):
            for column in columns:
                for value in batch[column]:
                    parts = value.splitlines() if value and args.split_lines else [value or ""]
                    texts.update((part.strip(), None) for part in parts if part.strip())
    if len(texts) < 2 and not context.only_check:
        raise ValueError("Distillation compares texts with each other; give at least two different texts.")
    return list(texts)


def _named(sources: Sequence[DataSource]) -> list[tuple[str, DataSource]]:
    """Return each source with a short, unique name."""
    names = [Path(source.path).stem for source in sources]
    return [
        (f"{name}-{number}" if names.count(name) > 1 else name, source)
        for number, (name, source) in enumerate(zip(names, sources, strict=True), start=1)
    ]


def _student(
    args: DistillEmbeddingStage, context: StageContext, teacher: SentenceTransformer, texts: Dataset
) -> tuple[SentenceTransformer, int]:
    """Return the student and the maximum number of tokens that the student reads."""
    own = context.tokenizer != context.teacher
    tokenizer: Any = open_tokenizer(str(context.tokenizer)) if own else copy.deepcopy(teacher.tokenizer)
    source = _encoder(teacher, "student_layers") if args.student_layers else None
    encoder = load_student(AutoModel, source, args, context, tokenizer)
    length = sequence_length(args.max_length, encoder.config, tokenizer)
    if args.max_length is None and teacher.max_seq_length:
        length = min(length, teacher.max_seq_length)
    tokenizer.model_max_length = length
    if args.student_vocab_size:
        ids = TokenizedDataset.from_texts(texts, ["text"], np.zeros(len(texts)), tokenizer, length).ids
        counts, embeddings = np.bincount(ids, minlength=len(tokenizer)), encoder.embeddings
        tokenizer, kept = keep_frequent_tokens(tokenizer, counts, args.student_vocab_size)
        embeddings.word_embeddings.weight = nn.Parameter(embeddings.word_embeddings.weight[kept])
        encoder.config.update({"vocab_size": len(kept), "pad_token_id": tokenizer.pad_token_id})
        if encoder.config.position_embedding_type == "learned":
            embeddings.position_embeddings.weight = nn.Parameter(embeddings.position_embeddings.weight[:length])
            encoder.config.max_position_embeddings = length
    pooling = args.pooling or next((module.pooling_mode for module in teacher if isinstance(module, Pooling)), None)
    student = embedder(
        encoder,
        tokenizer,
        context.output_dir / ".start",
        pooling if pooling in ("cls", "mean") else "mean",
        isinstance(teacher[-1], Normalize) if args.normalize is None else args.normalize,
        teacher.get_embedding_dimension() if args.keep_projection else None,
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
        similarity_fn_name=teacher.similarity_fn_name,
        device=str(processes().device),
    )
    for name, parameter in student.named_parameters():
        if ".pooler." in name:  # has no gradients, for which processes would wait
            parameter.requires_grad_(False)
    if args.hidden_weight:
        _encoder(teacher, "hidden_weight")
        if not same_tokens(tokenizer, teacher.tokenizer):
            raise ValueError(
                "hidden_weight compares hidden states of equal tokens, but teacher and student have "
                "different tokenizers. Set hidden_weight: 0, or remove tokenizer and "
                "student_vocab_size to use the teacher's."
            )
    width = student.get_embedding_dimension()
    if args.matryoshka_dims and (max(args.matryoshka_dims) >= (width or 0) or not args.similarity_weight):
        raise ValueError(
            f"matryoshka_dims={args.matryoshka_dims} needs similarity_weight above 0 (got {args.similarity_weight}) and "
            f"sizes below the student's vector size {width}; change the field that does not fit."
        )
    return student, length


def _encoder(model: SentenceTransformer, field: str) -> Any:
    encoder: Any = getattr(model[0], "auto_model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"{field} needs a transformer as teacher, but the first module of this teacher is "
            f"{type(model[0]).__name__}. Remove this field and set model: for the student, to learn only "
            "the teacher's vectors."
        )
    return encoder


def measure(
    model: SentenceTransformer, held_out: Sequence[tuple[str, Dataset]], dims: Sequence[int], batch_size: int
) -> dict[str, Any]:
    """Return the metrics of a model, also with vectors truncated to ``dims``."""
    metrics: dict[str, float | None] = {}
    for size in (None, *dims):
        scores, end = [], "" if size is None else f"_{size}d"
        with model.truncate_embeddings(size):
            for name, data in held_out:
                found = evaluate(model, data, baselines=False, batch_size=batch_size)
                values = found["systems"]["model"]
                start = f"{name}_" if len(held_out) > 1 else ""
                metrics |= {f"{start}{metric}{end}": value for metric, value in values.items()}
                scores.append(values[_MAIN_METRIC[found["kind"]]])
        metrics[f"score{end}"] = None if None in scores else sum(scores) / len(scores)
    return metrics
