"""Compare the outputs of two models on built-in texts, with one model in memory at a time."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from minibert.files.disk import read_settings
from minibert.files.model_folder import module_list
from minibert.hub.isolated import TEXTS
from minibert.inference.load import load, open_weights

TOLERANCE = 1e-4
LONG = "The quick brown fox jumps over the lazy dog, and 12 others sleep. " * 800
PAIRS = (
    ("What is the capital of Italy?", "Rome has been the capital since 1871."),
    ("A question without an answer", ""),
    ("Überraschung 🙂", "Два слова"),
    ("One sentence.", "Another, which is a good deal longer than the first one, so that there is some padding."),
)


class Mismatch(ArithmeticError):
    """Signal that the outputs of two models differ although they should be equal."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars, log messages and warnings of libraries within the block."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if bars:
            transformers_logging.enable_progress_bar()


def batches(tokenizer: Any, max_length: int) -> list[dict[str, Tensor]]:
    """Tokenize short texts, pairs of texts, and a single text of ``max_length`` tokens."""
    kinds: list[tuple[list[str], list[str] | None]] = [
        (TEXTS, None),
        ([first for first, _ in PAIRS], [second for _, second in PAIRS]),
        ([LONG], None),
    ]
    # A tokenizer's settings could leave out the mask.
    options = {"truncation": True, "max_length": max_length, "return_attention_mask": True, "return_tensors": "pt"}
    return [dict(tokenizer(first, second, padding=len(first) > 1, **options)) for first, second in kinds]


@torch.inference_mode()
def outputs(
    model: PreTrainedModel,
    inputs: list[dict[str, Tensor]],
    *,
    segments: int,
    pooled: bool,
) -> dict[str, Tensor]:
    """Return the float32 outputs of ``model`` for all batches, without rows of padding tokens.

    ``segments`` is the number of segments. Below 2, the model gets no ``token_type_ids``. If
    ``pooled`` is False, ``pooler_output`` is left out.
    """
    found = {}
    choices = type(model).__name__.endswith("MultipleChoice")
    for number, batch in enumerate(inputs):
        if segments < 2:
            batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
        mask = batch["attention_mask"].bool()
        # The logits of a long text over the vocabulary would need more memory than the model,
        # so only the encoder computes the long text.
        network = model.base_model if len(mask) == 1 else model
        if choices and network is model:
            batch = {name: value[: len(value) // 2 * 2].unflatten(0, (-1, 2)) for name, value in batch.items()}
        for name, value in network(**batch).items():
            if not isinstance(value, Tensor) or (name == "pooler_output" and not pooled):
                continue
            found[f"{name} {number}"] = (value[mask] if value.shape[:2] == mask.shape else value).float().clone()
    return found


def embeddings(folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the text vectors of a sentence-transformers model, or {} for any other model."""
    kind = read_settings(folder / "config_sentence_transformers.json").get("model_type")
    pools = any(module["type"].endswith(".Pooling") for module in module_list(folder))
    if not pools or kind not in (None, "SentenceTransformer"):
        return {}
    model = load(folder, device="cpu", dtype=dtype or torch.float32).float()
    vectors = model.encode([*TEXTS, LONG], convert_to_tensor=True, show_progress_bar=False)
    return {"sentence_embedding": vectors.float()}


def differences(
    source: tuple[Path, type[PreTrainedModel]],
    result: tuple[Path, type[PreTrainedModel]],
    what: str,
    tokenizer: Any,
    *,
    max_length: int,
    segments: int,
    dtype: torch.dtype | None = None,
    pooled: bool,
) -> dict[str, float]:
    """Return the largest absolute difference of each output between two models, in float32.

    ``source`` and ``result`` are pairs of a model folder and a model class. The weights of both
    models are rounded to ``dtype`` first. ``max_length`` is the number of positions. ``what`` is
    as in :func:`compare`, and ``segments`` and ``pooled`` are as in :func:`outputs`.
    """
    inputs = batches(tokenizer, min(tokenizer.model_max_length, max_length))
    found = []
    for folder, model_class in (source, result):
        with quiet():
            model = open_weights(model_class, folder, dtype=dtype or torch.float32).float().eval()
            computed = outputs(model, inputs, segments=segments, pooled=pooled)
            del model
            computed |= embeddings(folder, dtype)
        found.append(computed)
    return compare(found[0], found[1], what)


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> dict[str, float]:
    """Return the largest difference of each output over all batches.

    Raise :class:`Mismatch`, which names the model ``what``, if a difference is NaN or above the
    tolerance.
    """
    worsts: dict[str, float] = {}
    for key, value in expected.items():
        name = key.split()[0]
        worst = float((value - found[key]).abs().max())
        worsts[name] = max(worsts.get(name, 0.0), worst) if worst == worst else float("nan")
    if wrong := [f"{name} differs by {worst:.1e}" for name, worst in worsts.items() if not worst <= TOLERANCE]:
        raise Mismatch(
            f"{what} gives different outputs: {', '.join(wrong)} (allowed: {TOLERANCE:.0e}). "
            "Nothing was written; please report this model."
        )
    return worsts
