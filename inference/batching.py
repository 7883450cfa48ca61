"""Cut texts into slices, tokenize them, and batch texts of similar length."""

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

# A window is tokenized and sorted by length. A larger window has more texts of equal length.
WINDOW_TEXTS, WINDOW_CHARACTERS = 4096, 2**24
# A text is cut before tokenizing, after at least this number of characters per token.
_CHARACTERS_PER_TOKEN = 16
_SPACE = re.compile(r"\s")
_TURNS: dict[tuple[str, int], threading.Lock] = {}  # by resource and process


class Batch(NamedTuple):
    """Store the token ids of several texts in one array, shorter texts first."""

    ids: np.ndarray  # (T,)
    lengths: np.ndarray  # (texts,), each above 0
    rows: np.ndarray  # (texts,), the positions of the texts in the window
    prompt_length: int  # the number of first tokens of each text to leave out of the pooling


@cache
def tokenizing_thread(process: int) -> ThreadPoolExecutor:
    """Return the executor that tokenizes all texts of a process in a single thread.

    ``process`` is the id of the process. A forked process needs an executor of its own.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")


def turn(shared: str) -> threading.Lock:
    """Return the lock of a resource that the threads of a process share, such as a device.

    A thread holds the lock while it computes. One computation already uses every core, so a
    second computation at the same time would save no time.
    """
    return _TURNS.setdefault((shared, os.getpid()), threading.Lock())  # is atomic, unlike a cache


def cut_windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield slices of ``texts`` with a limited number of texts and of characters."""
    start = characters = 0
    for row, text in enumerate(texts):
        length = len(text) if isinstance(text, str) else 0  # check_texts refuses anything else later
        characters += length
        if row - start == WINDOW_TEXTS or (row > start and characters > WINDOW_CHARACTERS):
            yield texts[start:row]
            start, characters = row, length
    if start < len(texts):
        yield texts[start:]


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group texts into batches of at most ``batch_tokens`` tokens.

    ``lengths`` contains the number of tokens of each text. Return the row numbers of each
    batch. The longest texts are in the first batch. Within a batch, shorter texts come first. A
    text of more than ``batch_tokens`` tokens is a batch of its own. A text without tokens is
    left out.

    >>> [batch.tolist() for batch in cut_batches(np.array([3, 9, 0, 4, 2, 1]), 9)]
    [[1], [3], [5, 4, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    bounds = cut_evenly(lengths[order].tolist(), batch_tokens)
    return [order[start:end][::-1] for start, end in pairwise(bounds)]


def check_texts(texts: Sequence[str], first: int) -> None:
    """Raise a ValueError for an invalid text, numbered from ``first``."""
    for row, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            shown = shorten(repr(text), 80)
            raise ValueError(f"Text {row} is {type(text).__name__}, not a string: {shown}; give texts only.")
        if not is_unicode(text):
            raise ValueError(
                f"Text {row} holds a lone surrogate, which is not a character: {shorten(repr(text), 80)}; "
                "decode the text with its original encoding, or replace the surrogate."
            )


class Tokenizer:
    """Tokenize texts into batches with a fast tokenizer, as ``config`` and ``pooling`` of the model ask."""

    def __init__(self, tokenizer: Any, config: Any, pooling: Any) -> None:
        self.tokenizer, self.pooling = tokenizer, pooling
        self.max_length = tokenizer.model_max_length
        if config.position_embedding_type != "rotary":
            self.max_length = min(self.max_length, config.max_position_embeddings)

    def batches(self, texts: Sequence[str], batch_tokens: int, first: int, prompt: str) -> list[Batch]:
        """Tokenize ``prompt + text`` for each text into batches of at most ``batch_tokens``.

        Error messages number the texts from ``first``.
        """
        check_texts(texts, first)
        with turn("tokenizer"):
            encodings = self._tokenize(texts, prompt)
            prompt_length = 0
            if prompt and not self.pooling.include_prompt:  # a special token at the end is not of the prompt
                ids = self.tokenizer.backend_tokenizer.encode(prompt).ids
                prompt_length = len(ids) - sum(last in self.tokenizer.all_special_ids for last in ids[-1:])
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ends = lengths.cumsum()
        every = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64, count=int(lengths.sum()))
        pieces = np.split(every, ends[:-1])
        return [
            Batch(np.concatenate([pieces[row] for row in rows]), lengths[rows], rows.copy(), prompt_length)
            for rows in cut_batches(lengths, batch_tokens)
        ]

    def _tokenize(self, texts: Sequence[str], prompt: str) -> list[Any]:
        fast = self.tokenizer.backend_tokenizer
        fast.no_padding()  # another caller may have changed the settings
        fast.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        limit = _CHARACTERS_PER_TOKEN * self.max_length
        if fast.pre_tokenizer is None or self.tokenizer.truncation_side != "right":
            limit = sys.maxsize  # the end of a text may determine the tokens
        encodings: list[Any] = fast.encode_batch_fast([prompt + cut_text(text, limit) for text in texts])
        short = [row for row, text in enumerate(texts) if len(text) > limit and len(encodings[row]) < self.max_length]
        while short:  # long words or much white space need more characters
            limit *= 4
            again = fast.encode_batch_fast([prompt + cut_text(texts[row], limit) for row in short])
            for row, encoding in zip(short, again, strict=True):
                encodings[row] = encoding
            short = [row for row in short if len(texts[row]) > limit and len(encodings[row]) < self.max_length]
        return encodings


def cut_text(text: str, limit: int) -> str:
    """Cut ``text`` at the first white space after ``limit`` characters.

    >>> cut_text("one two three", 5)
    'one two'
    """
    if len(text) <= limit:
        return text
    space = _SPACE.search(text, limit)
    return text[: space.start()] if space else text
