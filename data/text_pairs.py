"""Make pairs of query and passage from texts, to train a search model without real queries."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

from minibert.data.tokenized_corpus import split_sentences

_FEWEST_WORDS = 5  # shorter sentences give no useful query
_KEPT = (0.15, 0.5)  # the lowest and highest share of the words of a sentence in a query
_NEIGHBOUR = 0.3  # the probability that a neighbouring sentence belongs to the passage


def pairs_of(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield a query and a passage for each sentence that has at least five words.

    The query consists of some words of the sentence. The passage is the sentence, sometimes
    together with a neighbouring sentence. Words are deleted as in TSDAE (Wang et al. 2021,
    arXiv:2104.06979). In contrast to TSDAE, the remaining words are used as a search query.

    >>> list(pairs_of("The quick brown fox jumps over the lazy dog. Why?", random.Random(1)))
    [('The quick jumps', 'The quick brown fox jumps over the lazy dog.')]
    """
    for paragraph in text.split("\n"):
        sentences = split_sentences(paragraph, ".!?")
        for number, sentence in enumerate(sentences):
            words = sentence.split()
            if len(words) < _FEWEST_WORDS:
                continue
            kept = sorted(rng.sample(range(len(words)), max(3, round(len(words) * rng.uniform(*_KEPT)))))
            first = number - (number > 0 and rng.random() < _NEIGHBOUR)
            last = number + (rng.random() < _NEIGHBOUR)
            yield " ".join(words[place].strip("\"'()[],.;:!?") for place in kept), " ".join(sentences[first : last + 1])


def make_pairs(documents: Dataset, seed: int) -> Dataset:
    """Make pairs from the column ``text``. Return the columns ``anchor`` and ``positive``."""

    def of_batch(batch: dict[str, list[str | None]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        found = [
            pair
            for text, number in zip(batch["text"], numbers, strict=True)
            for pair in pairs_of(text or "", random.Random(f"{seed} {number}"))
        ]
        return {"anchor": [query for query, _ in found], "positive": [passage for _, passage in found]}

    pairs = documents.map(
        of_batch, batched=True, with_indices=True, batch_size=100, remove_columns=documents.column_names, desc="make pairs"
    )
    if not len(pairs):
        raise ValueError(
            f"Pairs are made of sentences of at least {_FEWEST_WORDS} words, but the data has none; "
            "give texts with complete sentences, or pairs of texts without make_pairs."
        )
    return pairs
