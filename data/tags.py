"""Read sentences of tagged words, and tokenize the sentences."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset

from minibert.data.columns import pick_columns
from minibert.data.labels import is_list, is_text, number_labels, refuse_first

# Usual names of the column of words, and of the column of tags.
TOKEN_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "pos_tags", "labels")


def holds_entities(tags: Iterable[str]) -> bool:
    """Return True if any of the tags begins with B- or I-, which mark entities."""
    return any(tag.startswith(("B-", "I-")) for tag in tags)


def entity_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the type, start and end of every entity. As in conlleval, I- can start an entity.

    >>> entity_spans(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-ORG"])
    [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5), ('ORG', 5, 6)]
    """
    spans: list[tuple[str, int, int]] = []
    for at, tag in enumerate(tags):
        kind = tag[2:]
        if tag == "O":
            continue
        if tag.startswith("I-") and spans and spans[-1][0] == kind and spans[-1][2] == at:
            spans[-1] = (kind, spans[-1][1], at + 1)
        else:
            spans.append((kind, at, at + 1))
    return spans


def find_tag_columns(rows: Dataset, tokens: str | None, tags: str | None, where: str) -> tuple[str, str]:
    """Return the names of the word column and the tag column. Detect names that are None."""
    every = rows.column_names
    usual = [(name,) for name in TOKEN_COLUMNS]
    (words,) = pick_columns(every, tokens and [tokens], usual, option="token_column", where=where)
    others, usual = [name for name in every if name != words], [(name,) for name in TAG_COLUMNS]
    (found,) = pick_columns(others, tags and [tags], usual, option="tag_column", where=where, columns=every)
    return words, found


def read_words(rows: Dataset, column: str) -> list[list[str]]:
    """Return the list of words in ``column`` for every row."""
    feature = rows.features[column]
    if not (is_list(feature) and is_text(feature.feature)):
        raise ValueError(f"Column {column!r} holds {feature}; tagging needs a list of words in every row.")
    sentences: list[list[str]] = rows[column][:]
    complete = [words is not None and None not in words for words in sentences]
    refuse_first(sentences, complete, column, "no word may be missing. Correct the row")
    return sentences


def read_tags(
    rows: Dataset, column: str, words: Sequence[Sequence[str]], names: Sequence[str] | None = None
) -> tuple[list[list[str]], list[str]]:
    """Return the tags of all words in every row, and the names of all tags.

    Entity tags must follow the IOB2 scheme. ``names`` lists all tags in order. If ``names`` is
    None, a ClassLabel column has the names of the ClassLabel. A column of strings has the tags
    that occur, with entity tags in the order O, B-LOC, I-LOC, B-PER, and so on.
    """
    feature, sentences = rows.features[column], rows[column][:]
    inner = feature.feature if is_list(feature) else None
    if inner is None or not (names or is_text(inner) or isinstance(inner, ClassLabel)):
        raise ValueError(
            f"Column {column!r} holds {feature}; tagging needs a list of tags in every row: strings, "
            "or numbers with their names in order (labels: [O, B-…, …])."
        )
    complete = [tags is not None and len(tags) == len(given) for tags, given in zip(sentences, words, strict=True)]
    refuse_first(sentences, complete, column, "every word of the row needs a tag")
    numbers, known = number_labels(sentences, inner, column, names)
    tagged = [[known[number] for number in row] for row in numbers]
    if holds_entities(known):
        _check_iob2(tagged, column)
        if not names and is_text(inner):
            kinds = sorted({tag[2:] for tag in known if tag != "O"})
            known = ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
    return tagged, known


def _check_iob2(sentences: list[list[str]], column: str) -> None:
    for row, tags in enumerate(sentences, start=1):
        for number, (before, tag) in enumerate(pairwise(["O", *tags]), start=1):
            begins = tag.startswith("B-") or (tag.startswith("I-") and before in (tag, f"B-{tag[2:]}"))
            if tag != "O" and not (begins and tag[2:]):
                raise ValueError(
                    f"Row {row} has {tag!r} at word {number} in {column!r}, which is not IOB2: every entity starts with B-, "
                    "and I- continues an entity of the same type. Correct the row, or convert IOB1 tags to IOB2."
                )


class Windows(NamedTuple):
    """Store tokenized sentences. A long sentence is cut into several overlapping windows."""

    ids: list[list[int]]  # the token ids of each window
    words: list[np.ndarray]  # (tokens,) int64 for each window: the index of the word at its first token, else -1
    rows: list[int]  # the index of the sentence of each window


def tokenize_windows(sentences: Sequence[Sequence[str]], tokenizer: Any, max_length: int) -> Windows:
    """Tokenize words, and cut long sentences into windows that overlap by a quarter.

    If a word is in two windows, only the window with more context around the word counts. The
    unknown token replaces a word without tokens, such as a control character. A sentence
    without words has no window.
    """
    if not tokenizer.is_fast:
        raise ValueError("Tagging needs a fast tokenizer; save a tokenizer.json with the model.")
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(f"max_length={max_length} leaves no room for words; give at least 8.")
    overlap = room // 4
    windows = Windows([], [], [])
    # In vocabularies such as that of GPT-2, a word has other tokens alone than inside a text.
    inside = tokenizer("a a", add_special_tokens=False)["input_ids"]
    alone = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    space = " " if list(inside[1:]) != list(alone[1:]) else ""
    different = list(dict.fromkeys(["a", *(word for words in sentences for word in words)]))
    # Words of a sentence are tokenized one by one, so each different word is tokenized only once.
    encoded = tokenizer([[space + word] for word in different], is_split_into_words=True)
    special = np.array([place is None for place in encoded.sequence_ids(0)])
    head, tail = np.argmin(special), np.argmin(special[::-1])
    before, after = encoded["input_ids"][0][:head], encoded["input_ids"][0][len(special) - tail :]
    pieces = (ids[head : len(ids) - tail] for ids in encoded["input_ids"])
    tokens_of = {word: ids or [tokenizer.unk_token_id] for word, ids in zip(different, pieces, strict=True)}
    for row, words in enumerate(sentences):
        tokens = [token for word in words for token in tokens_of[word]]
        numbers = np.repeat(np.arange(len(words)), [len(tokens_of[word]) for word in words])
        begins = np.diff(numbers, prepend=-1) > 0
        for start in range(0, max(len(tokens) - overlap, 1), room - overlap):
            here = slice(start, start + room)
            mine = begins[here].copy()
            if start:
                mine[: overlap // 2] = False
            if start + room < len(tokens):
                mine[room - overlap + overlap // 2 :] = False
            if mine.any():  # otherwise, the window lies inside one long word
                windows.ids.append([*before, *tokens[here], *after])
                windows.words.append(np.pad(np.where(mine, numbers[here], -1), (head, tail), constant_values=-1))
                windows.rows.append(row)
    return windows
