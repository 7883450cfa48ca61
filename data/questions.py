"""Prepare the inputs of question answering and multiple choice."""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.data.columns import pick_columns

logger = logging.getLogger(__name__)

# Usual columns of the texts that a choice continues or answers.
CHOICE_TEXTS = (("context", "question"), ("sent1", "sent2"), ("question",), ("context",), ("ctx",))
CHOICE_LISTS = ("choices", "endings", "options")
_NUMBERED = re.compile(r"(choice|ending|option)_?(\d+)")
_LONGEST_QUESTION = 64  # tokens, as in BERT
_warned: set[int] = set()  # the values of max_question_length in logged warnings


class WindowSizes(NamedTuple):
    """Configure how a long context is cut into overlapping windows. All sizes are in tokens."""

    max_length: int  # of a window, with question and special tokens
    doc_stride: int  # the number of context tokens that two neighbouring windows share
    max_question_length: int  # a longer question is cut


class Window(NamedTuple):
    """Store the tokens of ``[CLS] question [SEP] part of the context [SEP]``."""

    row: int  # the index of the question, from 0
    input_ids: np.ndarray  # (tokens,) int32
    token_type_ids: np.ndarray | None  # (tokens,) int32, or None if the tokenizer has no segments
    first: int  # the position in input_ids of the first context token
    offsets: np.ndarray  # (context tokens, 2) int32: the start and end of each token, in characters of the context


def window_sizes(
    tokenizer: Any, max_length: int, doc_stride: int | None = None, max_question_length: int | None = None
) -> WindowSizes:
    """Return window sizes, and check that each window has room for the context.

    The default of ``doc_stride`` is a third of ``max_length``. The default of
    ``max_question_length`` is also a third of ``max_length``, but at most 64.
    """
    stride = max_length // 3 if doc_stride is None else doc_stride
    question = min(_LONGEST_QUESTION, max_length // 3) if max_question_length is None else max_question_length
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if question + special + stride >= max_length:
        raise ValueError(
            f"max_length={max_length} leaves no room: max_question_length={question}, {special} special "
            f"tokens and doc_stride={stride} fill it; increase max_length or lower one of these."
        )
    return WindowSizes(max_length, stride, question)


def cut(tokenizer: Any, questions: Sequence[str], contexts: Sequence[str], sizes: WindowSizes) -> list[Window]:
    """Tokenize the questions and contexts, and cut long contexts into overlapping windows."""
    if not tokenizer.is_fast:
        raise ValueError("Questions need a fast tokenizer; save a tokenizer.json with the model.")
    encoded = tokenizer(
        _cut_questions(tokenizer, questions, sizes.max_question_length),
        list(contexts),
        truncation="only_second",
        max_length=sizes.max_length,
        stride=sizes.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    if any(ids[0] != tokenizer.cls_token_id for ids in encoded["input_ids"]):
        raise ValueError('Questions need a tokenizer that begins a text with [CLS], for "no answer".')
    types = encoded.get("token_type_ids")
    windows = []
    for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
        sequence = encoded.sequence_ids(number)  # 0 question, 1 context, None special
        count = sequence.count(1)
        first = sequence.index(1) if count else len(sequence)
        offsets = encoded["offset_mapping"][number][first : first + count]
        windows.append(
            Window(
                row,
                np.array(encoded["input_ids"][number], dtype=np.int32),
                None if types is None else np.array(types[number], dtype=np.int32),
                first,
                np.array(offsets, dtype=np.int32).reshape(-1, 2),
            )
        )
    return windows


def _cut_questions(tokenizer: Any, questions: Sequence[str], longest: int) -> list[str]:
    """Return the questions, each cut to at most ``longest`` tokens."""
    encoded = tokenizer(
        list(questions), add_special_tokens=False, truncation=True, max_length=longest + 1, return_offsets_mapping=True
    )
    short = []
    for question, offsets in zip(questions, encoded["offset_mapping"], strict=True):
        if len(offsets) > longest:
            question = question[: offsets[longest - 1][1]]
            if longest not in _warned:
                _warned.add(longest)
                logger.warning("Questions over max_question_length=%d tokens are cut; the first is %r …", longest, question)
        short.append(question)
    return short


def texts_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str], first: int = 1) -> Iterator[tuple[str, ...]]:
    """Yield the texts in columns ``names`` of each row. Errors number rows from ``first``."""
    for number, row in enumerate(rows, start=first):
        for name in names:
            if not isinstance(row.get(name), str):
                raise ValueError(
                    f"Row {number} has {row.get(name)!r} in column {name!r}, not a text; its columns are {', '.join(row)}. "
                    "Add a text or remove the row."
                )
        yield tuple(row[name] for name in names)


class Choices(NamedTuple):
    """Store the choices of a row, and the pair of texts to encode for each choice."""

    choices: list[str]
    pairs: list[tuple[str, str]]


def find_choice_columns(
    found: Collection[str], texts: Sequence[str] | None = None, choices: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return the names of the text columns and of the choice columns.

    Choices are in one column of lists, or in a separate column for each choice. If ``texts`` or
    ``choices`` is None, look for columns with usual names in ``found``.

    >>> find_choice_columns(["question", "choices", "label"])
    (['question'], ['choices'])
    >>> find_choice_columns(["sent1", "sent2", "ending1", "ending0", "label"])
    (['sent1', 'sent2'], ['ending0', 'ending1'])
    """
    names = list(found)
    usual = [*((name,) for name in CHOICE_LISTS), _numbered(found) or ("ending0", "ending1")]
    return (
        pick_columns(names, texts, CHOICE_TEXTS, option="text_columns"),
        pick_columns(names, choices, usual, option="choice_columns"),
    )


def _numbered(found: Collection[str]) -> list[str]:
    """Return columns such as ending0 and ending1, in the order of their numbers."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name in found:
        if match := _NUMBERED.fullmatch(name):
            groups.setdefault(match[1], []).append((int(match[2]), name))
    return next(([name for _, name in sorted(group)] for group in groups.values() if len(group) > 1), [])


def choices_of(
    rows: Iterable[Mapping[str, Any]], columns: tuple[Sequence[str], Sequence[str]], first: int = 1
) -> Iterator[Choices]:
    """Yield the choices of every row, and a pair of texts for each choice.

    ``columns`` are the text columns and the choice columns. With two text columns, the second
    text is put before each choice. Error messages number the rows from ``first``.

    >>> row = {"sent1": "It rains.", "sent2": "She", "endings": ["sings.", "swims."]}
    >>> next(choices_of([row], (["sent1", "sent2"], ["endings"]))).pairs
    [('It rains.', 'She sings.'), ('It rains.', 'She swims.')]
    """
    texts, (name, *more) = columns
    for number, row in enumerate(rows, start=first):
        ((text, *start),) = texts_of([row], texts, number)
        if more:
            choices: Any = list(next(texts_of([row], [name, *more], number)))
        else:
            choices = row.get(name)
            if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f"Row {number} has {name}={choices!r}; it should be a list of texts, one per choice.")
        begin = [word for word in start if word]
        yield Choices(choices, [(text, " ".join([*begin, choice])) for choice in choices])
