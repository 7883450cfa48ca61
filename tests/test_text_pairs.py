"""Pairs of plain text: every sentence once, a query of its own words in order, the same for the same seed."""

import random

import pytest
from datasets import Dataset

from minibert.data.text_pairs import make_pairs, pairs_of

SENTENCES = [" ".join(f"w{number}x{place}" for place in range(12)) + "." for number in range(200)]
TEXT = " ".join(SENTENCES[:100]) + "\n" + " ".join(SENTENCES[100:])


def is_subsequence(words, of):
    rest = iter(of)
    return all(word in rest for word in words)


def test_each_sentence_is_asked_for_by_some_of_its_words():
    pairs = list(pairs_of(TEXT, random.Random(0)))
    assert len(pairs) == len(SENTENCES)
    for (query, passage), sentence in zip(pairs, SENTENCES, strict=True):
        assert is_subsequence(query.split(), sentence.rstrip(".").split()) and 3 <= len(query.split()) <= 6
        assert sentence in passage


def test_passages_have_the_sentences_beside_them_now_and_then():
    sizes = [passage.count(".") for _, passage in pairs_of(TEXT, random.Random(0))]
    assert set(sizes) == {1, 2, 3}
    # with 0.3 on either side: 0.49 alone; 200 sentences spread by 0.035
    assert abs(sizes.count(1) / len(sizes) - 0.49) < 0.14
    assert not any(SENTENCES[99] in passage and SENTENCES[100] in passage for _, passage in pairs_of(TEXT, random.Random(0)))


def test_short_sentences_and_marks_are_left_out():
    pairs = list(pairs_of('Too short. "(One), two; three: four, five six?!"', random.Random(2)))
    assert len(pairs) == 1 and set(pairs[0][0]) <= set("abcdefghijklmnopqrstuvwxyzO ")
    assert list(pairs_of("Too short. \n\n Why?", random.Random(0))) == []


def test_the_same_for_the_same_seed_and_documents_apart():
    documents = Dataset.from_dict({"text": [TEXT, None, "", TEXT], "other": [1, 2, 3, 4]})
    made = make_pairs(documents, 7)
    assert made.column_names == ["anchor", "positive"] and len(made) == 2 * len(SENTENCES)
    assert made[:] == make_pairs(documents, 7)[:]
    assert made[:] != make_pairs(documents, 8)[:]
    assert made[: len(SENTENCES)]["anchor"] != made[len(SENTENCES) :]["anchor"]


def test_texts_without_sentences_are_refused():
    with pytest.raises(
        ValueError, match="sentences of at least 5 words, but the data has none; give texts with complete sentences"
    ):
        make_pairs(Dataset.from_dict({"text": ["one two", None]}), 0)
