"""Test the smallest encoder: its recipes keep their shape, and one layer of width 3 learns a sentiment from words."""

import random

import datasets
import pytest

from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe

GOOD, BAD = ("fine", "lovely", "splendid", "touching"), ("dull", "awful", "tedious", "clumsy")
PLAIN = ("the", "film", "has", "some", "actors", "who", "walk", "through", "rooms", "until", "it", "ends")
SPLITS = {"train": 600, "validation": 100, "test": 100}


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """A folder with a file per split: the verdict is at the end of many plain words, and every text has a word of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    for split, rows in SPLITS.items():
        labels = [number % 2 for number in range(rows)]
        texts = [
            " ".join([*rng.choices(PLAIN, k=rng.randint(4, 40)), f"{split}{number}", *rng.sample(GOOD if label else BAD, 2)])
            for number, label in enumerate(labels)
        ]
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(tmp_path / "reviews" / f"{split}.parquet")
    return tmp_path / "reviews"


@pytest.mark.parametrize("name", ["nano_imdb", "nano_hatexplain"])
def test_the_recipes_keep_to_the_nano_shape(name):
    tokenizer, classify, evaluate = load_recipe(name).stages
    config = classify.model.config()
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (1, 1, 3)
    assert config.max_position_embeddings == tokenizer.max_length == 128
    assert tokenizer.method == "word_level"
    # Nothing is learnt, and nothing chosen, on the test rows.
    assert [source.split for source in evaluate.data] == ["test"]
    assert not any("test" in (source.split or "") for source in [*tokenizer.data, *classify.data, *classify.eval_data])
    assert tokenizer.data == classify.data


@pytest.mark.slow
def test_three_numbers_per_word_are_enough_for_a_verdict(reviews, tmp_path):
    """The recipe as it is, on other data: texts longer than the positions, whose end decides."""
    paths = [f"{field}.path={reviews}" for field in ("tokenizer.data", "classify.data", "classify.eval_data", "evaluate.data")]
    changes = ["tokenizer.vocab_size=400", "tokenizer.max_length=16", "classify.epochs=5", "classify.batch_size=16"]
    splits = ["tokenizer.data.split=train", "classify.data.split=train", "classify.eval_data.split=validation"]
    run_dir = run_recipe(load_recipe("nano_imdb", [*paths, *splits, *changes]), output_dir=tmp_path / "run")
    (metrics,) = read_metrics(run_dir)["evaluate"].values()
    assert metrics["rows"] == SPLITS["test"]
    assert metrics["systems"]["model"]["accuracy"] > 0.95
