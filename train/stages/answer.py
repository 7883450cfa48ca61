"""Fine-tune models for extractive question answering (the ``answer`` stage)."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from torchmetrics.functional.text import squad
from transformers import AutoModelForQuestionAnswering

from minibert.data.load import check_columns, load, text_columns
from minibert.data.questions import Window, WindowSizes, cut, window_sizes
from minibert.data.source import joined_paths
from minibert.files.processes import processes
from minibert.inference.answers import answer_rows
from minibert.train.arguments import AnswerStage
from minibert.train.loop import fit
from minibert.train.rows import TokenizedDataset, in_chunks, results_of
from minibert.train.stage import StageContext, load_start

logger = logging.getLogger(__name__)

_TEXTS = ("question", "context")

Answers = list[tuple[int, str]]


def answer(args: AnswerStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a question answering model, and return training and SQuAD metrics."""
    train = load(args.data, split="train")
    answers = read_answers(train, args.data)
    columns = {name: name for name in (*_TEXTS, "answers")}
    context.note_columns(args.data, train, columns, answers=[text for _, text in answers[0]])
    if args.eval_data:
        held_out = load(args.eval_data, split="validation")
        expected = read_answers(held_out, args.eval_data)
    context.end_check()
    # The head has two outputs, for first and last token. transformers calls outputs labels.
    tokenizer, model, max_length = load_start(AutoModelForQuestionAnswering, args, context, num_labels=2)
    sizes = window_sizes(tokenizer, max_length, args.doc_stride, args.max_question_length)
    threshold = args.null_threshold
    if threshold is None and not all(answers):
        threshold = 0.0
    # Prediction reads these values from config.json.
    model.config.question_answering = {
        **sizes._asdict(),
        "max_answer_length": args.max_answer_length,
        "null_threshold": threshold,
    }
    evaluate = None
    if args.eval_data:
        evaluate = partial(measure, rows=held_out, answers=expected, tokenizer=tokenizer, batch_size=args.eval_batch_size)
    rows = window_rows(train, answers, tokenizer, sizes)
    return fit(model, tokenizer, rows, args, context, evaluate, args.metric_for_best)


def read_answers(rows: Dataset, sources: Sequence[Any]) -> list[Answers]:
    """Return a list for each row with the start and the text of every answer."""
    check_columns(rows, [*_TEXTS, "answers"], sources)
    if not_text := sorted(set(_TEXTS) - set(text_columns(rows))):
        raise ValueError(f"Column {', '.join(map(repr, not_text))} of {sources[0].path} does not hold text; give strings.")
    where = joined_paths(sources)
    answers = []
    for number, (context, entry) in enumerate(zip(rows["context"], rows["answers"], strict=True), start=1):
        found: dict[str, Any] = entry if isinstance(entry, dict) else {}
        texts: Any = found.get("text")
        starts: Any = found.get("answer_start")
        lists = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
        pairs: list[Any] = list(zip(map(_whole, starts), texts)) if lists else [(None, None)]
        if any(start is None or not isinstance(text, str) for start, text in pairs):
            raise ValueError(
                f"Row {number} of {where} has answers={entry!r}; it should be {{text: [...], "
                "answer_start: [...]} with a string and the index of the first character of each answer. "
                "Use empty lists for a question without answer."
            )
        for start, text in pairs:
            if not text or start < 0 or context[start : start + len(text)] != text:
                there = context[max(0, start) : max(0, start) + max(1, len(text))]
                raise ValueError(
                    f"Row {number} of {where} has the answer {text!r} at character {start} of the context, "
                    f"but the context has {there!r} there; correct answer_start, or remove the row."
                )
        answers.append(pairs)
    return answers


def _whole(start: Any) -> int | None:
    """Return ``start`` as an integer, or None if ``start`` is not a whole number."""
    if isinstance(start, float) and start.is_integer():
        return int(start)
    return start if isinstance(start, int) and not isinstance(start, bool) else None


class AnswerRows(TokenizedDataset):
    """Store windows of contexts. The labels are the first and the last token of an answer."""

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return model inputs, with ``start_positions`` and ``end_positions`` (rows,) each."""
        batch = super().collate(rows)
        first, last = batch.pop("labels").unbind(dim=1)
        return {**batch, "start_positions": first, "end_positions": last}


def window_rows(rows: Dataset, answers: Sequence[Answers], tokenizer: Any, sizes: WindowSizes) -> AnswerRows:
    """Return training windows, each labelled with the first answer of the row or ``[CLS]``."""
    labels: list[tuple[int, int]] = []
    lost = 0

    def chunks() -> Iterator[tuple[Any, Any]]:
        nonlocal lost
        for some in in_chunks(len(rows)):
            texts = rows[some]
            windows = cut(tokenizer, texts["question"], texts["context"], sizes)
            for row, group in groupby(windows, key=lambda window: window.row):
                pieces = list(group)
                wanted = answers[some.start + row][:1]
                places = [find_tokens(pieces, first, first + len(text)) for first, text in wanted]
                if None in places:
                    raise ValueError(
                        f"Row {some.start + row + 1} has the answer {wanted[0][1]!r}, but the tokenizer "
                        "makes no token of this answer; correct the answer, or remove the row."
                    )
                found = places[0] if places and places[0] else [(0, 0)] * len(pieces)
                lost += bool(wanted) and not any(first for first, _ in found)
                labels.extend(found)
            types = [window.token_type_ids for window in windows]
            yield [window.input_ids for window in windows], None if types[0] is None else types

    made = AnswerRows(chunks(), tokenizer.pad_token_id)
    made.labels = np.array(labels, dtype=np.int64)
    if lost and processes().is_main_process:
        logger.warning(
            "%d of %d answers do not fit completely into one window, and count as unanswerable; raise "
            "doc_stride (%d) or max_length (%d).",
            *(lost, len(rows), sizes.doc_stride, sizes.max_length),
        )
    return made


def find_tokens(windows: Sequence[Window], start: int, end: int) -> list[tuple[int, int]] | None:
    """Find the tokens of the characters from ``start`` to ``end`` in each window of a row.

    Returns:
        The positions of the first and the last token in each window. If a window lacks some of
        the characters, both are 0. If no token covers the characters, the result is None.
    """
    found: list[tuple[int, int] | None] = []
    places: list[tuple[int, int]] = []  # characters of the answer's tokens
    for window in windows:
        # Tokens may overlap or leave out characters, but both columns of offsets are sorted.
        first = int(np.searchsorted(window.offsets[:, 1], start, side="right"))
        last = int(np.searchsorted(window.offsets[:, 0], end, side="left")) - 1
        found.append((first, last) if first <= last else None)
        if first <= last:
            places.append((int(window.offsets[first, 0]), int(window.offsets[last, 1])))
    if not places:
        return None
    whole = min(first for first, _ in places), max(last for _, last in places)
    held = iter(places)
    return [
        (window.first + tokens[0], window.first + tokens[1]) if tokens and next(held) == whole else (0, 0)
        for window, tokens in zip(windows, found, strict=True)
    ]


def measure(model: Any, rows: Dataset, answers: Sequence[Answers], tokenizer: Any, batch_size: int) -> dict[str, float]:
    """Return :func:`answer_metrics` of a model."""
    asked = rows.select_columns(list(_TEXTS))
    results = results_of(asked, lambda mine: answer_rows(model, tokenizer, mine, batch_size=batch_size))
    return answer_metrics([result["text"] for result in results], [[text for _, text in row] for row in answers])


def answer_metrics(given: Sequence[str], expected: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return exact match and F1 as in SQuAD (Rajpurkar et al. 2018, arXiv:1806.03822).

    ``given`` has the predicted text of each row, and ``expected`` its correct answers, of which the
    best match counts. An empty text, or an empty list, means no answer. If some rows have no
    answer, rows with and without an answer are also measured separately.

    >>> answer_metrics(["the cat", "a big dog"], [["cat", "the cats"], ["big dogs"]])
    {'exact_match': 0.5, 'f1': 0.75}
    """
    groups = {"": list(range(len(given)))}
    if not all(expected):
        groups["has_answer_"] = [row for row, texts in enumerate(expected) if texts]
        groups["no_answer_"] = [row for row, texts in enumerate(expected) if not texts]
    metrics: dict[str, float] = {}
    for name, rows in groups.items():
        if rows:
            measured = squad(
                [{"id": str(row), "prediction_text": given[row]} for row in rows],
                [{"id": str(row), "answers": {"text": list(expected[row]) or [""]}} for row in rows],
            )
            metrics |= {f"{name}{key}": float(measured[key]) / 100 for key in ("exact_match", "f1")}
    return metrics
