"""Search texts by words with BM25, using the library bm25s."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import normalize

import bm25s
import numpy as np
import regex
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from minibert.inference.answers import JOINERS

_INVISIBLE = dict.fromkeys(map(ord, JOINERS))
_LETTERS = regex.compile(rf"[\w\p{{M}}{JOINERS}]{{2,}}")


def comparable_words(text: str) -> list[str]:
    """Return the words of at least two letters in a text, so that equal words are equal strings.

    >>> comparable_words("Ｃａｆｅ\u0301 a naïve soft\u00adware")
    ['café', 'naïve', 'software']
    """
    return [word.translate(_INVISIBLE) for word in _LETTERS.findall(normalize("NFKC", text).lower())]


class WordIndex:
    """Search texts with BM25. English words are stemmed, and stop words are left out.

    Stemming raises MRR@10 by about 0.02 on four English retrieval sets.
    """

    def __init__(self, index: bm25s.BM25) -> None:
        self._index = index
        self._stemmer = Stemmer.Stemmer("english")

    @classmethod
    def build(cls, texts: Iterable[str], *, show_progress: bool = False) -> "WordIndex":
        """Index texts, which are numbered from 0. Memory grows with the number of words."""
        options = {"stemmer": Stemmer.Stemmer("english"), "stopwords": "english"}
        tokenizer = bm25s.tokenization.Tokenizer(lower=False, splitter=comparable_words, **options)
        words = tokenizer.tokenize(
            texts, update_vocab=True, length=0, show_progress=False, return_as="tuple", allow_empty=False
        )
        if not any(words.ids):
            raise ValueError("The texts contain only stop words, so BM25 has nothing to search; add other texts.")
        index = bm25s.BM25()
        index.index(words, show_progress=show_progress)
        return cls(index)

    @classmethod
    def load(cls, folder: Path) -> "WordIndex":
        """Open an index that :meth:`save` wrote. The index is memory-mapped."""
        try:
            return cls(bm25s.BM25.load(folder, mmap=True, show_progress=False))
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise ValueError(f"{folder} is damaged ({error}).") from error

    def save(self, folder: Path) -> None:
        """Write the index to several files in ``folder``."""
        self._index.save(folder, show_progress=False)

    def __len__(self) -> int:
        return int(self._index.scores["num_docs"])

    def search(self, queries: Sequence[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and indices (n, min(top_k, texts)) of the best texts per query.

        An index is -1 if no further text shares a word with the query.
        """
        split = ([word for word in comparable_words(query) if word not in STOPWORDS_EN] for query in queries)
        words = [self._stemmer.stemWords(query) for query in split]
        numbers, scores = self._index.retrieve(words, k=min(top_k, len(self)), show_progress=False)
        return scores, np.where(scores > 0, numbers, -1)
