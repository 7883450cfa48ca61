"""Tokenize windows of texts and cut them into batches by tokens instead of by texts."""

import os
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np

from minibert.data.load import is_unicode
from minibert.packing_minibert import cut_evenly

# A window: texts that are tokenized and sorted by length together. A larger one finds
# more texts of equal length.
WINDOW_TEXTS, WINDOW_CHARACTERS = 4096, 2**24
# Characters per token, at least, up to which a text is read; the rest is cut off before
# tokenizing.
_CHARACTERS_PER_TOKEN = 16
_SPACE = re.compile(r"\s")
_TURNS: dict[tuple[str, int], threading.Lock] = {}  # by what is shared, and the process


class Batch(NamedTuple):
    """Token ids of several texts, end to end, shorter texts first."""

    ids: np.ndarray  # (T,)
    lengths: np.ndarray  # (texts,), each above 0
    rows: np.ndarray  # (texts,), their places in the window


@cache
def tokenizing_thread(process: int) -> ThreadPoolExecutor:
    """Return the one thread of this process that tokenizes.

    One is enough because the tokenizer already uses every core, and each further thread would
    keep unused memory. Threads do not survive a fork, so a forked process gets a new one.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")


def turn(shared: str) -> threading.Lock:
    """Return the lock for computing on a device, which takes every core: threads take turns.

    Each thread computes itself, instead of one thread for all: OpenMP keeps a team of
    threads for each thread that ever computed, and lets them fall asleep between two calls
    if there are more of them than cores.
    """
    return _TURNS.setdefault((shared, os.getpid()), threading.Lock())  # unlike a cache, it gives two threads the same lock


def cut_windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut ``texts`` into windows of ``WINDOW_TEXTS`` texts or ``WINDOW_CHARACTERS`` characters."""
    start = characters = 0
    for row, text in enumerate(texts):
        length = len(text) if isinstance(text, str) else 0  # anything else is refused with its window
        characters += length
        if row - start == WINDOW_TEXTS or (row > start and characters > WINDOW_CHARACTERS):
            yield texts[start:row]
            start, characters = row, length
    if start < len(texts):
        yield texts[start:]


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group texts into batches of at most ``batch_tokens`` tokens (or a text), the longest first.

    Returns the rows of each batch, shorter texts first; texts without a token are in
    none. Batches are few and of nearly equal size, since oneDNN keeps kernels for every
    number of rows.

    >>> [batch.tolist() for batch in cut_batches(np.array([3, 9, 0, 4, 2, 1]), 9)]
    [[1], [3], [5, 4, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    bounds = cut_evenly(lengths[order].tolist(), batch_tokens)
    return [order[start:end][::-1] for start, end in pairwise(bounds)]


def check_texts(texts: Sequence[str], first: int) -> None:
    """Refuse anything but text, with its number, which is ``first`` for the first."""
    for row, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"Text {row} is {type(text).__name__}, not a string: {shorten(repr(text), 80)}")
        if not is_unicode(text):
            raise ValueError(
                f"Text {row} holds a lone surrogate, which is not a character: {shorten(repr(text), 80)}; decode it with the "
                "encoding it was written in, or replace such characters."
            )


class Tokenizer:
    """Tokenize by the fast tokenizer below ``tokenizer``, without lists that nothing reads.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast``.
        config: the model's; a table of positions limits the length.
    """

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        self.max_length = tokenizer.model_max_length
        if config.position_embedding_type != "rotary":
            self.max_length = min(self.max_length, config.max_position_embeddings)

    def batches(self, texts: Sequence[str], batch_tokens: int, first: int, prompt: str) -> list[Batch]:
        """Tokenize the texts of a window, each after ``prompt``, and cut them into batches."""
        check_texts(texts, first)
        with turn("tokenizer"):
            encodings = self._tokenize(texts, prompt)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ends = lengths.cumsum()
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64, count=int(lengths.sum()))
        pieces = np.split(ids, ends[:-1])
        return [
            Batch(np.concatenate([pieces[row] for row in rows]), lengths[rows], rows.copy())
            for rows in cut_batches(lengths, batch_tokens)
        ]

    def _tokenize(self, texts: Sequence[str], prompt: str) -> list[Any]:
        fast = self.tokenizer.backend_tokenizer
        fast.no_padding()  # the last caller may have left other settings
        fast.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        limit = _CHARACTERS_PER_TOKEN * self.max_length
        if fast.pre_tokenizer is None or self.tokenizer.truncation_side != "right":
            limit = sys.maxsize  # the end of a text may decide its tokens
        encodings: list[Any] = fast.encode_batch_fast([prompt + cut_text(text, limit) for text in texts])
        short = [row for row, text in enumerate(texts) if len(text) > limit and len(encodings[row]) < self.max_length]
        while short:  # a text of long words or much white space needs more
            limit *= 4
            again = fast.encode_batch_fast([prompt + cut_text(texts[row], limit) for row in short])
            for row, encoding in zip(short, again, strict=True):
                encodings[row] = encoding
            short = [row for row in short if len(texts[row]) > limit and len(encodings[row]) < self.max_length]
        return encodings


def cut_text(text: str, limit: int) -> str:
    """Cut ``text`` at the first white space after ``limit`` characters, to keep words whole.

    >>> cut_text("one two three", 5)
    'one two'
    """
    if len(text) <= limit:
        return text
    space = _SPACE.search(text, limit)
    return text[: space.start()] if space else text
