"""Answer questions by a span of a context, found window by window, or by one of several choices."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minibert.data.questions import ChoiceColumns, Window, choices_of, cut, find_choice_columns, texts_of, window_sizes

MAX_ANSWER_LENGTH = 30  # tokens
# Spans of a row that share the probability with "no answer"; the other spans have almost none.
_SPANS = 20
# Batches of rows read at once.
_BATCHES_AHEAD = 32


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    doc_stride: int | None = None,
    max_question_length: int | None = None,
    max_answer_length: int | None = None,
    null_threshold: float | None = None,
    n_best: int = 1,
) -> Iterator[dict[str, Any]]:
    """Answer the question of every row from its context, one result per row, in order.

    Sizes and threshold that are not given are those the model was trained with, which its configuration keeps.

    Args:
        model: a model with a question-answering head, and its tokenizer.
        rows: each with a ``question`` and a ``context``; read as needed.
        batch_size: windows computed at once.
        max_length, doc_stride, max_question_length: see :class:`minibert.data.questions.WindowSizes`.
        max_answer_length: longest answer, in tokens.
        null_threshold: "no answer" wins if its score (a logit) exceeds that of the best span by more; ``math.inf``, the
            default of a model without a threshold, never lets it win.
        n_best: more than 1 adds ``n_best``, a list of up to that many spans with their scores.

    Yields:
        ``text``, ``start`` and ``end``, with ``text == context[start:end]``, empty for "no answer"; ``score``, the
        probability of this result among the best spans and "no answer"; ``no_answer_score``, the probability of no answer.

    Raises:
        ValueError: sizes that leave no room for the context; a row without a question or context, with its number.
    """
    own = getattr(model.config, "question_answering", None) or {}
    sizes = window_sizes(
        tokenizer,
        max_length or own.get("max_length") or max_length_of(model, tokenizer),
        own.get("doc_stride") if doc_stride is None else doc_stride,
        own.get("max_question_length") if max_question_length is None else max_question_length,
    )
    longest = own.get("max_answer_length", MAX_ANSWER_LENGTH) if max_answer_length is None else max_answer_length
    if longest < 1:
        raise ValueError(f"max_answer_length must be at least 1, got {longest}.")
    threshold = own.get("null_threshold") if null_threshold is None else null_threshold
    threshold = math.inf if threshold is None else threshold
    for first, some in rows_ahead(rows, batch_size):
        texts = list(texts_of(some, ("question", "context"), first))
        windows = cut(tokenizer, [question for question, _ in texts], [context for _, context in texts], sizes)
        found = find_spans(model, windows, len(texts), batch_size=batch_size, max_answer_length=longest, pad=_pad(tokenizer))
        for (_, context), (spans, null_score) in zip(texts, found, strict=True):
            yield _answer(context, spans, null_score, threshold, n_best)


def choice_columns_of(
    model: PreTrainedModel,
    found: Sequence[str],
    text_columns: Sequence[str] | None = None,
    choice_columns: Sequence[str] | None = None,
) -> ChoiceColumns:
    """Return the columns given, else those of the training if all are ``found``, else those of the usual names.

    Raises:
        ValueError: listing the columns found.
    """
    own = getattr(model.config, "multiple_choice", None) or {}
    trained = own if set(own.get("text_columns", ())) | set(own.get("choice_columns", ())) <= set(found) else {}
    return find_choice_columns(
        found, text_columns or trained.get("text_columns"), choice_columns or trained.get("choice_columns")
    )


def choose_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    text_columns: Sequence[str] | None = None,
    choice_columns: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Pick one of the choices of every row, one result per row, in order. Rows may differ in their number of choices.

    Args:
        model: a model with a multiple-choice head, and its tokenizer.
        rows: each with a question and its choices; read as needed.
        batch_size: choices computed at once.
        max_length: longest question with a choice, in tokens; the longer of the two is cut. Unset means the model's.
        text_columns, choice_columns: see :func:`minibert.data.questions.find_choice_columns`; unset means those the model
            was trained with, or the usual ones.

    Yields:
        ``choice``, counted from 0; ``text``, that choice; ``probabilities``, one per choice.

    Raises:
        ValueError: columns that are not found; a row without a question or choices, with its number.
    """
    own = getattr(model.config, "multiple_choice", None) or {}
    max_length = max_length or own.get("max_length") or max_length_of(model, tokenizer)
    columns = None
    for first, some in rows_ahead(rows, batch_size):
        columns = columns or choice_columns_of(model, list(some[0]), text_columns, choice_columns)
        asked = list(choices_of(some, columns, first))
        pairs = [pair for row in asked for pair in row.pairs()]
        logits = _choice_logits(model, tokenizer, pairs, batch_size, max_length)
        for row, scores in zip(asked, logits.split([len(row.choices) for row in asked]), strict=True):
            choice = int(scores.argmax())
            yield {"choice": choice, "text": row.choices[choice], "probabilities": scores.softmax(0).tolist()}


# -------------------------------------------------------------------------------------------------------------------- spans


def best_spans(starts: Tensor, ends: Tensor, allowed: Tensor, *, longest: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best spans of at most ``longest`` tokens, scored by the sum of their two logits.

    Args:
        starts, ends: (B, L) logits of an answer's first and last token.
        allowed: (B, L), True where an answer may lie.

    Returns:
        Scores, first and last tokens, each (B, up to ``count``), best first; a score of -inf means no span.

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
    model: PreTrainedModel, windows: Sequence[Window], rows: int, *, batch_size: int, max_answer_length: int, pad: int
) -> list[tuple[list[tuple[float, int, int]], float]]:
    """Find the best spans of each row over all its windows, and its score of "no answer".

    Returns:
        For each row its spans as (score, start, end) in characters, best first, and the lowest score that ``[CLS]`` has in any
        window, as in BERT's own evaluation (Devlin et al. 2018, section 4.3).
    """
    model.eval()
    spans: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
    nulls = [math.inf] * rows
    for batch in _by_length(windows, [len(window.input_ids) for window in windows], batch_size):
        inputs = _inputs([window.input_ids for window in batch], [window.token_type_ids for window in batch], pad)
        outputs = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
        places = torch.arange(starts.shape[1])
        firsts = torch.tensor([window.first for window in batch])[:, None]
        lasts = firsts + torch.tensor([len(window.offsets) for window in batch])[:, None]
        allowed = ((places >= firsts) & (places < lasts)).to(starts.device)
        best = best_spans(starts, ends, allowed, longest=max_answer_length, count=_SPANS)
        columns = [tensor.tolist() for tensor in (starts[:, 0] + ends[:, 0], *best)]
        for window, null_score, *candidates in zip(batch, *columns, strict=True):
            nulls[window.row] = min(nulls[window.row], null_score)
            known = spans[window.row]
            for score, first, last in zip(*candidates, strict=True):
                if score == -math.inf:
                    break
                place = int(window.offsets[first - window.first, 0]), int(window.offsets[last - window.first, 1])
                if place[0] < place[1]:  # the same characters may be seen in two windows
                    known[place] = max(score, known.get(place, -math.inf))
    ranked = [sorted((-score, *place) for place, score in known.items())[:_SPANS] for known in spans]
    return [([(-score, start, end) for score, start, end in row], null) for row, null in zip(ranked, nulls, strict=True)]


def _answer(
    context: str, spans: Sequence[tuple[float, int, int]], null_score: float, threshold: float, n_best: int
) -> dict[str, Any]:
    null, *shares = torch.tensor([null_score, *(score for score, _, _ in spans)], dtype=torch.float64).softmax(0).tolist()
    found = [
        {"text": context[start:end], "start": start, "end": end, "score": share}
        for (_, start, end), share in zip(spans, shares, strict=True)
    ]
    nothing = not spans or null_score - spans[0][0] > threshold
    answer = {"text": "", "start": 0, "end": 0, "score": null} if nothing else found[0]
    result = {**answer, "no_answer_score": null}
    return result if n_best == 1 else {**result, "n_best": found[:n_best]}


# ------------------------------------------------------------------------------------------------------------------ choices


@torch.no_grad()
def _choice_logits(
    model: PreTrainedModel, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int, max_length: int
) -> Tensor:
    """Compute (pairs,) logits; a pair is a question with one choice, whose score does not depend on the other choices."""
    model.eval()
    firsts, seconds = zip(*pairs, strict=True)
    encoded = tokenizer(list(firsts), list(seconds), truncation=True, max_length=max_length, return_attention_mask=False)
    ids, types = encoded["input_ids"], encoded.get("token_type_ids", [None] * len(pairs))
    logits = torch.empty(len(pairs))
    for batch in _by_length(range(len(pairs)), list(map(len, ids)), batch_size):
        inputs = _inputs([ids[number] for number in batch], [types[number] for number in batch], _pad(tokenizer))
        inputs = {name: tensor.unsqueeze(1).to(model.device) for name, tensor in inputs.items()}  # (B, 1, L)
        logits[batch] = model(**inputs).logits.float().cpu().squeeze(1)
    return logits


# ------------------------------------------------------------------------------------------------------------------ batches


def rows_ahead(rows: Iterable[Any], batch_size: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield many rows at a time, with the number (from 1) of the first; sorted by length they need little padding."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    rows, first = iter(rows), 1
    while some := list(islice(rows, batch_size * _BATCHES_AHEAD)):
        yield first, some
        first += len(some)


def _by_length(items: Sequence[Any], lengths: Sequence[int], batch_size: int) -> Iterator[list[Any]]:
    """Yield batches of similar lengths, the longest first, so that memory runs out at once or never."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield [items[number] for number in order[start : start + batch_size]]


def _inputs(ids: Sequence[Any], types: Sequence[Any], pad: int) -> dict[str, Tensor]:
    """Pad sequences at their end, whatever the side of the tokenizer, into inputs (B, L)."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in ids]
    inputs = {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }
    if types[0] is not None:
        inputs["token_type_ids"] = pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in types], batch_first=True)
    return inputs


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id or 0


def max_length_of(model: PreTrainedModel, tokenizer: Any) -> int:
    """Return the longest sequence, in tokens, that the model was made for."""
    limit = int(tokenizer.model_max_length)
    return min(limit, getattr(model.config, "max_position_embeddings", limit))
