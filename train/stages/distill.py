"""The ``distill`` stage: a smaller student learns what a larger teacher knows, on the common loop.

Three objectives: a classifier's logits beside the labels (Hinton et al. 2015, arXiv:1503.02531), DistilBERT's triple loss over
masked words (Sanh et al. 2019, arXiv:1910.01108), and the vectors of an embedding model with their similarities. What a frozen
teacher says of a row does not change between epochs, so where it can be kept it is computed once, and memory-mapped.
"""

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from datasets import Dataset
from numpy.lib.format import open_memmap
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from minibert.data.labels import SINGLE, read_labels
from minibert.data.load import check_columns, load, text_columns
from minibert.data.source import DataSource
from minibert.data.tokenized_corpus import Corpus, load_corpus
from minibert.evaluation.metrics import FIGURES, SMALLER_IS_BETTER
from minibert.files.model_folder import opening
from minibert.train.arguments import DistillStage
from minibert.train.checkpoint import readable_os_errors
from minibert.train.loop import fit, in_precision, processes
from minibert.train.rows import TokenRows, choose_metric, head_changes, in_eval_data
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length
from minibert.train.stages import classify, pretrain
from minibert.train.stages.embed import sentence_model

# Rows that a teacher computes between two writes: what an interrupted run does not compute again.
TAUGHT_AT_ONCE = 16384


def distill(args: DistillStage, context: StageContext) -> dict[str, Any]:
    """Train a student as ``args`` say; ``context.output_dir`` ends as its complete folder, without a trace of the teacher.

    Returns:
        The figures of ``metrics.json``; with ``eval_data`` also the student's, as eval_accuracy and so on, and the teacher's on
        the same data, as teacher_accuracy and so on.

    Raises:
        ValueError: teacher and student do not go together (labels, words, tokens, layers), or data that does not fit.
        OSError: a folder or Hub id that holds no model, or no safetensors.
    """
    objectives = {"task": distill_task, "pretraining": distill_pretraining, "embedding": distill_embedding}
    return objectives[args.objective](args, context)


# ------------------------------------------------------------------------------------------------------- pure functions


def choose_layers(wanted: int | Sequence[int], available: int) -> list[int]:
    """Numbers of the layers that a student starts from: so many, evenly from the first to the last, or those listed.

    >>> choose_layers(6, 12)  # those of DistilBERT
    [0, 2, 4, 7, 9, 11]
    >>> choose_layers(3, 6)
    [0, 3, 5]

    Raises:
        ValueError: the teacher has fewer layers.
    """
    if isinstance(wanted, int):
        numbers = [math.floor(place + 0.5) for place in np.linspace(0, available - 1, wanted)]
    else:
        numbers = list(wanted)
    if len(numbers) > available or max(numbers) >= available:
        raise ValueError(
            f"student_layers={wanted} asks for more than the teacher's {available} layers, which are counted from 0 to "
            f"{available - 1}; choose fewer."
        )
    return numbers


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T² · KL(teacher ‖ student)`` of logits (rows, classes) divided by ``temperature`` T, as a mean over the rows.

    The factor keeps the size of the gradient, which shrinks as 1 / T². No rows have no divergence.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        log_target=True,
        reduction="sum",
    )
    return divergence * (temperature**2 / max(1, len(student)))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between vectors (rows, C), as a mean over the rows."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared length of the difference of vectors (rows, C), as a mean over the rows."""
    return (student.float() - teacher.float()).square().sum(dim=-1).mean()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the cosines between all pairs of rows; vectors (rows, C) of the two may differ in length."""
    ours, theirs = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    return F.mse_loss(ours @ ours.t(), theirs @ theirs.t())  # (rows, rows)


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error of hidden states (B, L, C) of real tokens: embeddings against embeddings, and every layer of the
    student against the teacher's at the same share of its depth.

    Args:
        student, teacher: embeddings, then the output of each layer.
        mask: (B, L), 1 for real tokens.
    """
    real = mask.bool()
    layers, theirs = len(student) - 1, len(teacher) - 1
    errors = [
        F.mse_loss(states[real].float(), teacher[math.floor(number * theirs / layers + 0.5)][real].float())
        for number, states in enumerate(student)
    ]
    return torch.stack(errors).mean()


# ----------------------------------------------------------------------------------------------------- students in the loop


@dataclass
class DistillationOutput(ModelOutput):
    """What the loop asks for."""

    loss: Tensor | None = None


class Distillation(nn.Module):
    """A student under the loss of its objective, as :func:`fit` trains it; what is saved is the student alone."""

    def __init__(self, args: DistillStage, student: Any, teacher: Any = None):
        super().__init__()
        self.args, self.student = args, student
        self._teacher = (teacher,)  # in a tuple it is no part of this module: not trained, not saved, in evaluation mode

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def save_pretrained(self, folder: Path) -> None:
        if isinstance(self.student, SentenceTransformer):
            self.student.save_pretrained(str(folder), create_model_card=False)
        else:
            self.student.save_pretrained(folder)

    def activation_checkpointing_enable(self, options: dict[str, Any]) -> None:
        encoder: Any = self.student[0].auto_model if isinstance(self.student, SentenceTransformer) else self.student
        # transformers renamed it; older versions know only the second name.
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable(options)


class TaskDistillation(Distillation):
    """``alpha · T² · KL(teacher ‖ student) + (1 - alpha) · cross-entropy``, as a mean over the rows."""

    def forward(self, labels: Tensor, teacher_logits: Tensor, **inputs: Any) -> DistillationOutput:
        """``labels`` (B,) are classes and ``teacher_logits`` (B, classes)."""
        logits = self.student(**inputs).logits
        soft = soft_divergence(logits, teacher_logits, self.args.temperature)
        hard = F.cross_entropy(logits.float(), labels)
        return DistillationOutput(loss=self.args.alpha * soft + (1 - self.args.alpha) * hard)


class MaskedLMDistillation(Distillation):
    """DistilBERT's three losses: the teacher's distribution and the word itself at masked positions, and the direction of the
    last hidden state at every token."""

    def forward(self, labels: Tensor, **inputs: Any) -> DistillationOutput:
        """``labels`` (1, T) hold the word at masked positions and -100 elsewhere; rows are packed."""
        args, chosen = self.args, labels != -100
        states = self.student.minibert(**inputs).last_hidden_state  # (1, T, C)
        logits = self.student.lm_head(states[chosen])  # (masked, V)
        with torch.no_grad():
            known = self.teacher.minibert(**inputs).last_hidden_state
            known_logits = self.teacher.lm_head(known[chosen]) if args.kl_weight else None
        loss = states.new_zeros(())
        if known_logits is not None:
            loss = loss + args.kl_weight * soft_divergence(logits, known_logits, args.temperature)
        if args.mlm_weight:
            words = F.cross_entropy(logits.float(), labels[chosen], reduction="sum") / max(1, len(logits))
            loss = loss + args.mlm_weight * words
        if args.cosine_weight:
            loss = loss + args.cosine_weight * cosine_distance(states[0], known[0])
        return DistillationOutput(loss=loss)


class EmbeddingDistillation(Distillation):
    """The teacher's vectors, the similarities between them, and its hidden states, each with its weight.

    Where the two differ in width, a linear map that is trained along and not kept stands between them.
    """

    def __init__(self, args: DistillStage, student: Any, teacher: Any):
        super().__init__(args, student, teacher)
        dimensions = [model.get_embedding_dimension() for model in (student, teacher)]
        self.vector_map = _between(*dimensions) if args.vector_weight else nn.Identity()
        self.state_map: nn.Module = nn.Identity()
        if args.hidden_weight:
            self.state_map = _between(*(model[0].auto_model.config.hidden_size for model in (student, teacher)))

    def forward(self, teacher_vectors: Tensor | None = None, **inputs: Any) -> DistillationOutput:
        """``teacher_vectors`` (B, C) were computed before, or are computed here from the same inputs."""
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
        return DistillationOutput(loss=loss)


def _between(ours: int, theirs: int) -> nn.Module:
    return nn.Identity() if ours == theirs else nn.Linear(ours, theirs, bias=False)


def vectors_and_states(model: Any, inputs: dict[str, Tensor], hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Vectors (B, C) of a batch and, where ``hidden``, the states (B, L, C) of the embeddings and of each layer."""
    if not hidden:
        return model(dict(inputs))["sentence_embedding"], ()
    output = model[0].auto_model(**inputs, output_hidden_states=True, return_dict=True)
    features: dict[str, Any] = {**inputs, "token_embeddings": output.last_hidden_state}
    for module in list(model)[1:]:
        features = module(features)
    return features["sentence_embedding"], output.hidden_states


# --------------------------------------------------------------------------------------------------------------- teachers


def load_teacher(auto_class: Any, source: str, what: str) -> PreTrainedModel:
    """A frozen model in evaluation mode, on the device of this process.

    Args:
        what: it should be, for the message.

    Raises:
        OSError: no model, or none in safetensors.
        ValueError: its weights lack a part, such as a head that was never trained, or do not fit its configuration.
    """
    with opening(source):
        teacher, report = auto_class.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} is not {what}: its weights lack {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. "
            "Give a teacher that was trained for it, or train one in an earlier stage."
        )
    frozen: PreTrainedModel = freeze(teacher)
    return frozen


def freeze(teacher: Any) -> Any:
    """``teacher`` in evaluation mode, without gradients, on the device of this process."""
    return teacher.eval().requires_grad_(False).to(processes().device)


def from_layers(teacher: Any, args: DistillStage, source: str | None) -> Any:
    """A copy of a MiniBERT ``teacher`` with some of its layers (Sanh et al. 2019 take every other one), trainable, in float32.

    Raises:
        ValueError: the teacher is no MiniBERT, or has fewer layers.
    """
    assert args.student_layers is not None
    kind = teacher.config.model_type
    if kind != "minibert":
        raise ValueError(
            f"student_layers takes layers of a MiniBERT, and the teacher {source} is a {kind} model; convert it with: minibert "
            f"hub convert {source} FOLDER, and give teacher: FOLDER, or give model: instead of student_layers."
        )
    chosen = choose_layers(args.student_layers, teacher.config.num_hidden_layers)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.dtype = len(chosen), None
    if args.dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = args.dropout
    student = type(teacher)(config)
    state = {}
    for name, tensor in teacher.state_dict().items():
        if layer := re.fullmatch(r"((?:minibert\.)?layers\.)(\d+)(\..+)", name):
            places = [place for place, number in enumerate(chosen) if number == int(layer[2])]
            state.update({f"{layer[1]}{place}{layer[3]}": tensor for place in places})
        else:
            state[name] = tensor
    student.load_state_dict(state)
    return student


def same_tokens(ours: Any, theirs: Any) -> bool:
    """Whether two tokenizers make the same ids of a text."""
    probe = "Ünïcode “probe”: don't STOP at 42.5%, x_y — 漢字 [MASK]"
    return bool(ours.get_vocab() == theirs.get_vocab() and ours(probe)["input_ids"] == theirs(probe)["input_ids"])


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """Changes when a weight of ``model`` or a fact does."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def taught(folder: Path, key: str, rows: int, compute: Callable[[range], np.ndarray]) -> np.ndarray:
    """What a teacher says of all rows, (rows, C) float32, memory-mapped from ``folder``: found there, or computed and kept.

    Processes share the work, and a run that is interrupted keeps what was done; all processes must see the same folder.

    Args:
        key: of the teacher, the texts and all else that the result follows from.
        compute: (rows of the range, C).
    """
    state, whole = processes(), folder / f"teacher-{key}.npy"
    if state.is_main_process:
        with readable_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    missing = not whole.exists()
    state.wait_for_everyone()  # everybody has looked before it appears
    if missing:
        ranges = [range(start, min(start + TAUGHT_AT_ONCE, rows)) for start in range(0, rows, TAUGHT_AT_ONCE)]
        parts = [folder / f"teacher-{key}-{part.start:010d}-{part.stop:010d}.npy" for part in ranges]
        mine = list(zip(ranges, parts, strict=True))[state.process_index :: state.num_processes]
        for numbers, path in tqdm(mine, desc="teacher", leave=False, disable=not state.is_main_process):
            if not path.exists():
                _save(path, [np.asarray(compute(numbers), dtype=np.float32)], len(numbers))
        state.wait_for_everyone()
        if state.is_main_process:
            _save(whole, (np.load(path, mmap_mode="r") for path in parts), rows)
            for path in parts:
                path.unlink()
        state.wait_for_everyone()
    mapped: np.ndarray = np.load(whole, mmap_mode="r")
    return mapped


def _save(path: Path, blocks: Any, rows: int) -> None:
    """Write blocks of rows, one after the other, as one array that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with readable_os_errors(path):
        array, start = None, 0
        for block in blocks:
            if array is None:
                array = open_memmap(part, mode="w+", dtype=np.float32, shape=(rows, block.shape[1]))
            array[start : start + len(block)] = block
            start += len(block)
        assert array is not None and start == rows
        array.flush()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)


def teacher_figures(folder: Path, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures of the teacher, measured once and kept in ``folder``. Every process must call this."""
    state, path = processes(), folder / f"teacher-{key}.json"
    found = path.exists()
    state.wait_for_everyone()
    if found:
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    with torch.no_grad():
        figures = measure()
    if state.is_main_process:
        with readable_os_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")
            part.write_text(json.dumps(figures), encoding="utf-8")
            part.replace(path)
    state.wait_for_everyone()
    return figures


class TaughtRows:
    """Rows of tokens, each beside what the teacher said of it.

    Args:
        name: of the teacher's numbers among the arguments of the student.
        said: (rows, C), or None where the teacher is asked at every step.
        teacher: its fingerprint, which becomes part of the rows': nobody resumes with another teacher.
        labelled: whether rows have labels of their own.
    """

    def __init__(self, rows: TokenRows, name: str, said: np.ndarray | None, teacher: str, labelled: bool):
        self.rows, self.name, self.said, self.labelled = rows, name, said, labelled
        self.fingerprint = f"{rows.fingerprint}-{teacher}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return self.rows.__getitems__(rows)

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch = self.rows.collate(rows)
        if not self.labelled:
            del batch["labels"]
        if self.said is not None:
            batch[self.name] = torch.from_numpy(np.array(self.said[rows]))
        return batch


def _of_student(measure: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
    return lambda distillation: measure(distillation.student)


def _finish(
    distillation: Distillation, metrics: dict[str, Any], teacher: nn.Module, figures: dict[str, float] | None
) -> dict[str, Any]:
    """``metrics`` of the loop with the size of the student alone, and the teacher's beside it."""

    def size(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    return {
        **metrics,
        "parameters": size(distillation.student),
        "teacher_parameters": size(teacher),
        **{f"teacher_{name}": value for name, value in (figures or {}).items()},
    }


# ------------------------------------------------------------------------------------------------------------------- task


def _task_student(
    args: DistillStage, context: StageContext, teacher: PreTrainedModel, names: list[str]
) -> tuple[PreTrainedModel, Any, int]:
    """The student, its tokenizer, and how many tokens it reads."""
    tokenizer = load_tokenizer(context)
    if args.student_layers:
        student = from_layers(teacher, args, context.teacher)
    else:
        changes = head_changes(context, names)
        student = load_model(AutoModelForSequenceClassification, args, context, tokenizer, problem_type=SINGLE, **changes)
    student = student.float()
    student.config.problem_type = SINGLE
    tokenizer.model_max_length = length = sequence_length(args.max_length, student.config, tokenizer)
    return student, tokenizer, length


def distill_task(args: DistillStage, context: StageContext) -> dict[str, Any]:
    """Objective ``task``: a classifier learns from labels and from a classifier that knows the same ones."""
    train = load(args.data, split="train")
    columns = classify.find_text_columns(train, args.text_columns, args.label_column, args.data)
    held_out = load(args.eval_data, split="validation") if args.eval_data else None
    metric = choose_metric(args.metric_for_best, FIGURES[SINGLE])
    teacher = load_teacher(AutoModelForSequenceClassification, str(context.teacher), "a classifier")
    labels, names, order = _shared_labels(train, args, teacher, str(context.teacher))

    student, tokenizer, length = _task_student(args, context, teacher, names)
    student.config.text_columns = list(columns)

    # The teacher has words of its own, and reads as much as the student does.
    theirs = AutoTokenizer.from_pretrained(context.teacher, trust_remote_code=False)
    their_length = min(length, sequence_length(None, teacher.config, theirs))
    rows = TokenRows.from_texts(train, columns, labels, tokenizer, length)
    read = rows
    if their_length != length or not same_tokens(tokenizer, theirs):
        read = TokenRows.from_texts(train, columns, labels, theirs, their_length)
    key = fingerprint(teacher, read.fingerprint, their_length)
    folder = context.output_dir / "checkpoints"
    logits = taught(folder, key, len(read), lambda some: _logits(teacher, read, np.arange(some.start, some.stop), args))

    evaluate, figures = None, None
    if held_out is not None and args.eval_data:
        classify.find_text_columns(held_out, columns, args.label_column, args.eval_data)
        with in_eval_data():
            expected = order[read_labels(held_out, args.label_column, names_of(names, order), SINGLE).values]
        measure = classify.evaluator(
            TokenRows.from_texts(held_out, columns, expected, tokenizer, length), SINGLE, args.eval_batch_size
        )
        theirs_held_out = TokenRows.from_texts(held_out, columns, expected, theirs, their_length)
        figures = teacher_figures(
            folder,
            fingerprint(teacher, theirs_held_out.fingerprint),
            lambda: classify.evaluator(theirs_held_out, SINGLE, args.eval_batch_size)(teacher),
        )
        evaluate = _of_student(measure)

    if processes().is_main_process:
        tokenizer.save_pretrained(context.output_dir)
    taught_rows = TaughtRows(rows, "teacher_logits", logits, key, labelled=True)
    distillation = TaskDistillation(args, student)
    metrics = fit(
        distillation,
        train_dataset=taught_rows,
        collate=taught_rows.collate,
        arguments=args,
        output_dir=context.output_dir,
        seed=context.seed,
        evaluate=evaluate,
        metric_for_best=metric if evaluate else None,
        greater_is_better=metric not in SMALLER_IS_BETTER,
    )
    return _finish(distillation, metrics, teacher, figures)


def _shared_labels(train: Dataset, args: DistillStage, teacher: Any, source: str) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Labels (rows,) numbered as the teacher numbers them, its names of them, and its number of each of the data's.

    Raises:
        ValueError: the data is no single-label classification, or its labels have not the names that the teacher's have.
    """
    labels = read_labels(train, args.label_column, args.labels)
    if labels.problem_type != SINGLE or teacher.config.problem_type not in (None, SINGLE):
        raise ValueError(
            f"objective: task needs one label per row, and a teacher of such labels; column {args.label_column!r} is "
            f"{labels.problem_type} and the teacher {teacher.config.problem_type or SINGLE}."
        )
    names = [teacher.config.id2label[number] for number in range(teacher.config.num_labels)]
    if len(set(names)) != len(names) or set(names) != set(labels.names):
        raise ValueError(
            f"The teacher {source} tells {', '.join(names)} apart, and the data {', '.join(labels.names)}; give labels: with "
            "the teacher's names in the order of the data's classes if they mean the same, or another teacher."
        )
    order = np.array([names.index(name) for name in labels.names])
    return order[labels.values], names, order


def names_of(names: Sequence[str], order: np.ndarray) -> list[str]:
    """The teacher's ``names`` in the order in which the data has them.

    >>> names_of(["no", "yes"], np.array([1, 0]))
    ['yes', 'no']
    """
    return [names[number] for number in order]


@torch.no_grad()
def _logits(teacher: Any, rows: TokenRows, numbers: np.ndarray, args: DistillStage) -> np.ndarray:
    """Logits (rows, classes) of the rows ``numbers``."""
    found = np.empty((len(numbers), teacher.config.num_labels), dtype=np.float32)
    order = np.argsort(-rows.lengths[numbers], kind="stable")  # batches of like lengths waste no time on padding
    for start in range(0, len(order), args.eval_batch_size):
        places = order[start : start + args.eval_batch_size]
        batch = rows.collate(numbers[places])
        inputs = send_to_device({name: batch[name] for name in rows.INPUTS if name in batch}, processes().device)
        found[places] = teacher(**inputs).logits.float().cpu().numpy()
    return found


# ------------------------------------------------------------------------------------------------------------ pretraining


def distill_pretraining(args: DistillStage, context: StageContext) -> dict[str, Any]:
    """Objective ``pretraining``: DistilBERT's triple loss over the packed rows of the ``pretrain`` stage."""
    metric = choose_metric(args.metric_for_best, ("loss", "perplexity", "masked_accuracy"))
    if args.text_columns and len(args.text_columns) > 1:
        raise ValueError(f"Documents are read from one column, not from {', '.join(args.text_columns)}; name one.")
    their_config = AutoConfig.from_pretrained(str(context.teacher), trust_remote_code=False)
    _must_be_minibert(their_config, f"The teacher {context.teacher}")
    teacher = load_teacher(AutoModelForMaskedLM, str(context.teacher), "a model that predicts masked words")
    tokenizer, theirs = load_tokenizer(context), AutoTokenizer.from_pretrained(context.teacher, trust_remote_code=False)
    if not same_tokens(tokenizer, theirs):
        raise ValueError(
            f"objective: pretraining compares words, and the teacher {context.teacher} has other words than "
            f"{context.tokenizer}; give the teacher's as tokenizer. With other words objective: task and embedding still work."
        )
    masking = pretrain.Masking.of(tokenizer, args)
    if args.student_layers:
        student = from_layers(teacher, args, context.teacher)
    else:
        student = load_model(AutoModelForMaskedLM, args, context, tokenizer)
        _must_be_minibert(student.config, f"The student {context.model}")
    student = student.float()
    widths = student.config.hidden_size, teacher.config.hidden_size
    if args.cosine_weight and widths[0] != widths[1]:
        raise ValueError(
            f"Hidden states of width {widths[0]} have no cosine with the teacher's of width {widths[1]}; give the student that "
            "hidden_size, or set cosine_weight: 0."
        )
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"The student predicts vocab_size={student.config.vocab_size} words and the teacher {teacher.config.vocab_size}; "
            "give the student the teacher's vocab_size."
        )
    length = min(sequence_length(args.max_length, model.config, tokenizer) for model in (student, teacher))
    tokenizer.model_max_length = sequence_length(None, student.config, tokenizer)

    key = fingerprint(teacher)
    rows = pretrain.PackedRows(_corpus(args, args.data, "train", tokenizer), length, masking)
    rows.fingerprint = f"{rows.fingerprint}-{key}"
    evaluate, figures = None, None
    if args.eval_data:
        held_out = pretrain.PackedRows(_corpus(args, args.eval_data, "validation", tokenizer), length, masking)
        measure = pretrain.evaluator(held_out, args.eval_batch_size)
        facts = held_out.fingerprint, args.mlm_probability, args.whole_word_mask, args.eval_batch_size
        figures = teacher_figures(context.output_dir / "checkpoints", fingerprint(teacher, *facts), lambda: measure(teacher))
        evaluate = _of_student(measure)

    if processes().is_main_process:
        tokenizer.save_pretrained(context.output_dir)
    distillation = MaskedLMDistillation(args, student, teacher)
    metrics = fit(
        distillation,
        train_dataset=rows,
        collate=rows.collate,
        arguments=args,
        output_dir=context.output_dir,
        seed=context.seed,
        evaluate=evaluate,
        metric_for_best=metric if evaluate else None,
        greater_is_better=metric == "masked_accuracy",
    )
    return _finish(distillation, metrics, teacher, figures)


def _must_be_minibert(config: Any, what: str) -> None:
    if config.model_type != "minibert":
        raise ValueError(
            f"{what} is a {config.model_type} model, which cannot read packed sequences; convert it first with: minibert "
            "hub convert SOURCE FOLDER, and give that folder."
        )


def _corpus(args: DistillStage, sources: list[DataSource], split: str, tokenizer: Any) -> Corpus:
    with processes().main_process_first():  # one tokenizes, the others find the result
        return load_corpus(
            sources,
            tokenizer,
            split=split,
            text_column=args.text_columns[0] if args.text_columns else None,
            sample_by=args.sample_by,
            cache_dir=args.cache_dir,
            workers=args.preprocessing_num_workers,
        )


# -------------------------------------------------------------------------------------------------------------- embedding


def distill_embedding(args: DistillStage, context: StageContext) -> dict[str, Any]:
    """Objective ``embedding``: texts without labels, and the vectors that a sentence-transformers model gives them."""
    texts = read_texts(args)
    held_out = [(name, load([source], split="validation")) for name, source in _named(args.eval_data or [])]
    with opening(str(context.teacher)):
        teacher = freeze(
            SentenceTransformer(
                str(context.teacher),
                device=str(processes().device),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        )
    student, tokenizer, length = _embedding_student(args, context, teacher)
    _check_embedding(args, student, teacher, tokenizer)
    teacher.max_seq_length = min(length, teacher.max_seq_length or length)  # it reads as much as the student does

    key = fingerprint(teacher, texts, teacher.max_seq_length, args.eval_batch_size, args.precision)
    folder = context.output_dir / "checkpoints"

    def compute(some: range) -> np.ndarray:
        with in_precision(args):
            return np.asarray(
                teacher.encode(texts[some.start : some.stop], batch_size=args.eval_batch_size, show_progress_bar=False)
            )

    # Hidden states are too many to keep, and with them come the vectors.
    vectors = None if args.hidden_weight else taught(folder, key, len(texts), compute)
    evaluate, figures, metric = None, None, "score"
    if held_out:
        measure = evaluator(held_out, args.matryoshka_dims or (), args.eval_batch_size)
        facts = [(name, data._fingerprint) for name, data in held_out], args.matryoshka_dims
        figures = teacher_figures(folder, fingerprint(teacher, teacher.max_seq_length, facts), lambda: measure(teacher))
        metric = choose_metric(args.metric_for_best or metric, list(figures))
        evaluate = _of_student(measure)

    prompt = teacher.prompts.get(teacher.default_prompt_name or "") or ""  # encode() puts it before every text
    rows = TokenRows.from_texts(
        Dataset.from_dict({"text": [prompt + text for text in texts]}), ["text"], np.zeros(len(texts)), tokenizer, length
    )
    taught_rows = TaughtRows(rows, "teacher_vectors", vectors, key, labelled=False)
    distillation = EmbeddingDistillation(args, student, teacher)
    metrics = fit(
        distillation,
        train_dataset=taught_rows,
        collate=taught_rows.collate,
        arguments=args,
        output_dir=context.output_dir,
        seed=context.seed,
        evaluate=evaluate,
        metric_for_best=metric if evaluate else None,
    )
    return {**_finish(distillation, metrics, teacher, figures), "train_texts": len(texts)}


def read_texts(args: DistillStage) -> list[str]:
    """The distinct texts of the data, in order; sources need not share a column.

    Raises:
        ValueError: a source without a column of strings, or fewer than two texts.
    """
    found: dict[str, None] = {}
    for source in args.data:
        dataset = load([source], sample_by=args.sample_by)
        columns = args.text_columns or text_columns(dataset)
        check_columns(dataset, columns, [source], filled=False)
        if not columns or (not_text := set(columns) - set(text_columns(dataset))):
            which = f"; {', '.join(map(repr, sorted(not_text)))} does not hold text" if columns else ""
            raise ValueError(
                f"{source.path} needs columns of strings{which}; it has {', '.join(dataset.column_names)}. "
                "Name some with text_columns:."
            )
        for batch in dataset.select_columns(columns).iter(1000):
            for column in columns:
                for value in batch[column]:
                    parts = value.splitlines() if value and args.split_lines else [value or ""]
                    found.update((part.strip(), None) for part in parts if part.strip())
    if len(found) < 2:
        raise ValueError("Texts are compared with each other, so at least two different ones are needed.")
    return list(found)


def _named(sources: Sequence[DataSource]) -> list[tuple[str, DataSource]]:
    """Each source with a short name of its own."""
    names = [Path(source.path).name.removesuffix(Path(source.path).suffix) for source in sources]
    twice = {name for name in names if names.count(name) > 1}
    return [
        (f"{name}-{number}" if name in twice else name, source)
        for number, (name, source) in enumerate(zip(names, sources, strict=True), start=1)
    ]


def _embedding_student(
    args: DistillStage, context: StageContext, teacher: SentenceTransformer
) -> tuple[SentenceTransformer, Any, int]:
    """The student, its tokenizer, and the longest text in tokens."""
    own = context.tokenizer != context.teacher
    tokenizer = load_tokenizer(context) if own else copy.deepcopy(teacher.tokenizer)
    if args.student_layers:
        encoder = from_layers(_encoder(teacher, "student_layers"), args, context.teacher)
    else:
        encoder = load_model(AutoModel, args, context, tokenizer)
    encoder = encoder.float()
    length = sequence_length(args.max_length, encoder.config, tokenizer)
    if args.max_length is None and teacher.max_seq_length:
        length = min(length, teacher.max_seq_length)
    tokenizer.model_max_length = length
    theirs = next((module.pooling_mode for module in teacher if isinstance(module, Pooling)), "mean")
    pooling = args.pooling or (theirs if theirs in ("cls", "mean") else "mean")
    if hasattr(encoder.config, "pooling"):
        encoder.config.pooling = pooling
    normalize = any(isinstance(module, Normalize) for module in teacher) if args.normalize is None else args.normalize
    student = sentence_model(
        encoder,
        tokenizer,
        context.output_dir / ".start",
        pooling,
        normalize,
        prompts=teacher.prompts,
        default_prompt_name=teacher.default_prompt_name,
        similarity_fn_name=teacher.similarity_fn_name,
        device=str(processes().device),
    )
    for name, parameter in student.named_parameters():
        if ".pooler." in name:  # it takes no part, and processes would wait for its gradients
            parameter.requires_grad_(False)
    return student, tokenizer, length


def _encoder(model: SentenceTransformer, wanted_by: str) -> Any:
    encoder: Any = getattr(model[0], "auto_model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(
            f"{wanted_by} needs a transformer as teacher, and this one begins with {type(model[0]).__name__}; its vectors "
            "alone can still be learned: leave that field out and give the student a model:."
        )
    return encoder


def _check_embedding(args: DistillStage, student: SentenceTransformer, teacher: SentenceTransformer, tokenizer: Any) -> None:
    """Refuse what teacher and student cannot do together."""
    if args.hidden_weight:
        _encoder(teacher, "hidden_weight")
        if not same_tokens(tokenizer, teacher.tokenizer):
            raise ValueError(
                "hidden_weight compares hidden states token by token, and teacher and student have different tokenizers; set "
                "hidden_weight: 0 (vectors and similarities still work), or leave tokenizer out to take the teacher's."
            )
    width = student.get_embedding_dimension()
    if args.matryoshka_dims and (max(args.matryoshka_dims) >= (width or 0) or not args.similarity_weight):
        raise ValueError(
            f"matryoshka_dims={args.matryoshka_dims} are prefixes, shorter than the student's {width} numbers, and learn with "
            "a similarity_weight above 0."
        )


# What a data set counts with in the score.
_MAIN = {"similarity": "spearman", "retrieval": "ndcg@10"}


def evaluator(
    held_out: Sequence[tuple[str, Dataset]], dims: Sequence[int], batch_size: int
) -> Callable[[SentenceTransformer], dict[str, float]]:
    """A function that measures vectors on data sets by name, as ``minibert evaluate`` does, at full length and as prefixes."""

    def measure(model: SentenceTransformer) -> dict[str, float]:
        from minibert.evaluation.evaluate import evaluate

        figures: dict[str, float] = {}
        for size in (None, *dims):
            scores, end = [], "" if size is None else f"_{size}d"
            with model.truncate_embeddings(size):
                for name, data in held_out:
                    found = evaluate(model, data, baselines=False, batch_size=batch_size)
                    values = found["systems"]["model"]
                    start = f"{name}_" if len(held_out) > 1 else ""
                    figures |= {f"{start}{figure}{end}": value for figure, value in values.items()}
                    scores.append(values[_MAIN[found["kind"]]])
            figures[f"score{end}"] = sum(scores) / len(scores)
        return figures

    return measure
