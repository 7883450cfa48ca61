"""Answer questions with a span of a context, or with one of several choices."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from unicodedata import category

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minibert.data.questions import Window, choices_of, cut, find_choice_columns, texts_of, window_sizes
from minibert.inference.load import finite

MAX_ANSWER_LENGTH = 30  # tokens
JOINERS = "\u00ad\u200c\u200d\u2060"  # soft hyphen, zero-width joiners and word joiner: invisible parts of a word
# Spans per row that share the probability with "no answer". Further spans have almost none.
_SPANS = 20
# The number of batches whose rows are read at once.
_BATCHES_AHEAD = 32


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """Answer the question of every row from its context. Yield one result per row, in order.

    A long context is cut into overlapping windows. The window sizes, the maximum length of an
    answer and the threshold come from the model's configuration (``question_answering``). The
    result is "no answer" if the score of "no answer" exceeds the best score of a span by more
    than the threshold. Without a threshold, the best span always wins.

    ``batch_size`` is the number of windows to compute at once. Rows are read as needed.

    Yields:
        A dictionary. ``text`` equals ``context[start:end]``, and is empty for "no answer".
            ``start`` and ``end`` are the position of the text. ``score`` is the probability of
            the result, relative to the best spans and "no answer". ``no_answer_score`` is the
            probability of "no answer".
    """
    own = getattr(model.config, "question_answering", None) or {}
    limit = own.get("max_length") or max_length_of(model, tokenizer)
    sizes = window_sizes(tokenizer, limit, own.get("doc_stride"), own.get("max_question_length"))
    longest = own.get("max_answer_length", MAX_ANSWER_LENGTH)
    threshold = own.get("null_threshold")
    for first, some in rows_ahead(rows, batch_size):
        texts = list(texts_of(some, ("question", "context"), first))
        windows = cut(tokenizer, [question for question, _ in texts], [context for _, context in texts], sizes)
        found = find_spans(model, tokenizer, windows, len(texts), batch_size=batch_size, longest=longest)
        for (_, context), (spans, null_score) in zip(texts, found, strict=True):
            yield _answer(context, spans, null_score, math.inf if threshold is None else threshold)


def choice_columns_of(model: PreTrainedModel, found: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the text columns and the choice columns for the column names ``found``.

    If ``found`` contains the columns used in training, return the columns used in training.
    """
    own = getattr(model.config, "multiple_choice", None) or {}
    trained = [own.get("text_columns"), own.get("choice_columns")]
    if not set(found).issuperset(name for names in trained for name in names or ()):
        trained = []
    return find_choice_columns(found, *trained)


@torch.no_grad()
def choose_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 32,
) -> Iterator[dict[str, Any]]:
    """Pick one of the choices of every row. Yield one result per row, in order.

    Rows may have different numbers of choices. ``batch_size`` is the number of choices to
    compute at once. Rows are read as needed.

    Yields:
        A dictionary with ``choice`` (the index of the chosen text, from 0), ``text`` (the
            chosen text) and ``probabilities`` (a probability for each choice).
    """
    own = getattr(model.config, "multiple_choice", None) or {}
    limit = own.get("max_length") or max_length_of(model, tokenizer)
    columns = None
    model.eval()
    for first, some in rows_ahead(rows, batch_size):
        columns = columns or choice_columns_of(model, list(some[0]))
        asked = list(choices_of(some, columns, first))
        # Each pair has one choice, so its score does not depend on the other choices.
        firsts, seconds = zip(*(pair for row in asked for pair in row.pairs), strict=True)
        encoded = tokenizer(list(firsts), list(seconds), truncation=True, max_length=limit)
        logits = torch.empty(len(firsts), dtype=torch.float32, device="cpu")
        for numbers, inputs in padded_batches(model, tokenizer, encoded, batch_size):
            outputs = model(**{name: tensor.unsqueeze(1) for name, tensor in inputs.items()})  # (B, 1, L)
            logits[numbers] = finite(outputs.logits.float().cpu().squeeze(1))
        for row, scores in zip(asked, logits.split([len(row.choices) for row in asked]), strict=True):
            choice = int(scores.argmax())
            yield {"choice": choice, "text": row.choices[choice], "probabilities": scores.softmax(0).tolist()}


def best_spans(
    starts: Tensor,
    ends: Tensor,
    allowed: Tensor,
    *,
    longest: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best spans of at most ``longest`` tokens, scored by the sum of two logits.

    ``starts`` and ``ends`` are (B, L) logits of the first and the last token of a span.
    ``allowed`` (B, L) is True for tokens that may be part of an answer.

    Returns:
        The scores, first tokens and last tokens of up to ``count`` spans, best first. Each is a
            tensor (B, spans). A score of -inf marks a missing span.

    >>> logits, context = torch.tensor([[9.0, 1.0, 3.0, 2.0]]), torch.tensor([[False, True, True, True]])
    >>> [x.tolist() for x in best_spans(logits, logits, context, longest=2, count=2)]
    [[[6.0, 5.0]], [[2, 2]], [[2, 3]]]
    """
    starts = starts.masked_fill(~allowed, -math.inf)
    ends = F.pad(ends.masked_fill(~allowed, -math.inf), (0, longest - 1), value=-math.inf)
    scores = starts[:, :, None] + ends.unfold(1, longest, 1)  # (B, L, longest): first token, length of the span - 1
    best = scores.flatten(1).topk(min(count, scores[0].numel()))
    first = best.indices // longest
    return best.values, first, first + best.indices % longest


@torch.no_grad()
def find_spans(
    model: PreTrainedModel,
    tokenizer: Any,
    windows: Sequence[Window],
    rows: int,
    *,
    batch_size: int,
    longest: int,
) -> list[tuple[list[tuple[float, int, int]], float]]:
    """Return the best spans of each row, and the score of "no answer".

    Returns:
        A pair for each of the ``rows`` rows. The first element is a list of spans of at most
            ``longest`` tokens, best first. A span is (score, start, end), counted in
            characters. The second element is the lowest score of ``[CLS]`` in any window, as in
            BERT's evaluation (Devlin et al. 2018, section 4.3).
    """
    model.eval()
    spans: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
    nulls = [math.inf] * rows
    encoded = {"input_ids": [window.input_ids.tolist() for window in windows]}
    if types := [window.token_type_ids.tolist() for window in windows if window.token_type_ids is not None]:
        encoded["token_type_ids"] = types
    for numbers, inputs in padded_batches(model, tokenizer, encoded, batch_size):
        batch = [windows[number] for number in numbers]
        outputs = model(**inputs)
        starts, ends = finite(outputs.start_logits.float()), finite(outputs.end_logits.float())
        places = torch.arange(starts.shape[1])
        firsts = torch.tensor([window.first for window in batch])[:, None]
        lasts = firsts + torch.tensor([len(window.offsets) for window in batch])[:, None]
        allowed = ((places >= firsts) & (places < lasts)).to(starts.device)
        best = best_spans(starts, ends, allowed, longest=longest, count=_SPANS)
        columns = [tensor.tolist() for tensor in (starts[:, 0] + ends[:, 0], *best)]
        for window, null_score, *candidates in zip(batch, *columns, strict=True):
            nulls[window.row] = min(nulls[window.row], null_score)
            known = spans[window.row]
            for score, first, last in zip(*candidates, strict=True):
                if score == -math.inf:
                    break
                place = int(window.offsets[first - window.first, 0]), int(window.offsets[last - window.first, 1])
                if place[0] < place[1]:  # two windows may contain the same characters
                    known[place] = max(score, known.get(place, -math.inf))
    ranked = [sorted((-score, *place) for place, score in known.items())[:_SPANS] for known in spans]
    return [([(-score, start, end) for score, start, end in row], null) for row, null in zip(ranked, nulls, strict=True)]


def _answer(
    context: str,
    spans: Sequence[tuple[float, int, int]],
    null_score: float,
    threshold: float,
) -> dict[str, Any]:
    scores = [null_score, *(score for score, _, _ in spans)]
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    start = end = best = 0
    if spans and null_score - spans[0][0] <= threshold:
        best, (_, start, end) = 1, spans[0]
        while end < len(context) and (category(context[end])[0] == "M" or context[end] in JOINERS):
            end += 1  # the marks of the last letter, which a tokenizer's normalizer may have taken away
    return {
        "text": context[start:end],
        "start": start,
        "end": end,
        "score": shares[best],
        "no_answer_score": shares[0],
    }


def rows_ahead(rows: Iterable[Any], batch_size: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield lists of rows, each with the number of its first row, counted from 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size} (--batch-size).")
    rows, first = iter(rows), 1
    while some := list(islice(rows, batch_size * _BATCHES_AHEAD)):
        yield first, some
        first += len(some)


def padded_batches(
    model: PreTrainedModel, tokenizer: Any, inputs: Mapping[str, list[Any]], batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield batches of similar length, longest first: input indices and tensors (B, L)."""
    ids = inputs["input_ids"]
    order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        some = {name: [values[number] for number in numbers] for name, values in inputs.items()}
        batch = tokenizer.pad(some, padding_side="right")  # positions of words are counted from the left
        yield numbers, {name: torch.tensor(values, device=model.device) for name, values in batch.items()}


def max_length_of(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the maximum number of tokens that the tokenizer and the model support."""
    limit = int(tokenizer.model_max_length)
    return min(limit, getattr(model.config, "max_position_embeddings", limit))
