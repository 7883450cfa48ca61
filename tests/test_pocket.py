"""The texts of the recipe pocket: nothing that is measured is trained on."""

import json

import pytest
from datasets import Dataset

from benchmarks import pocket
from minibert.train.recipe import load_recipe

LONG_RUN = "the river rises in the hills and runs for many miles through the old town to the sea"


@pytest.fixture
def data(tmp_path):
    """All data sets with one text each, and some that must be left out."""
    rows = {
        name: [dict.fromkeys(columns, f"a text of {name} that may be learned from by all")]
        for name, columns in pocket.SETS.items()
    }
    for name, column in pocket.PAGES.items():
        for row in rows[name]:
            row.setdefault(column, "A page")
    rows["natural_questions_qed"] += [{"query": "Where is the house?", "answer": "By the sea."}]
    rows["stsb"] += [{"sentence1": "A story that wikiqa holds", "sentence2": "a sentence"}]
    rows["wiki_text"] += [
        {"title": "The River", "text": "A page whose title stands in a validation split, so nothing of it is read."},
        {"title": "Other", "text": f"A paragraph of another page, which is kept.\nIn it, {LONG_RUN}.\nA short line"},
    ]
    held_out = {
        "natural_questions_qed/validation": [{"query": "where is the HOUSE", "answer": LONG_RUN, "title": "the river"}],
        "wikiqa/train": [{"query": "a story, that wikiqa holds!", "answer": "x"}],
    }
    for name, some in {**{f"{name}/train": some for name, some in rows.items()}, **held_out}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Dataset.from_list(some).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def test_texts_of_other_splits_and_their_pages_are_left_out(data, tmp_path):
    out = tmp_path / "out" / "texts.parquet"
    pocket.prepare(data, out, lines=(100, 100))
    dataset = Dataset.from_parquet(str(out))
    assert dataset.column_names == ["text"]
    texts = dataset["text"]
    assert len(texts) == len(set(texts)) == len(pocket.SETS) + 3  # each set has a text of its own
    assert {"By the sea.", "a sentence", "A paragraph of another page, which is kept."} <= {*texts}
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["natural_questions_qed"]["left out by text"] == report["stsb"]["left out by text"] == 1
    assert report["wiki_text"] == {"texts": 2, "left out by title": 1, "left out by words": 1}
    pocket.prepare(data, out, lines=(1, 0))
    assert len(Dataset.from_parquet(str(out))) == len(texts) - 2


def test_no_set_is_both_learned_and_unseen():
    assert not {*pocket.SETS} & {*pocket.UNSEEN}
    assert {*pocket.RETRIEVAL} <= {*pocket.SETS}


def test_the_recipe_has_the_shape_of_the_model_in_the_box():
    (stage,) = load_recipe("pocket", ["distill.data=texts.parquet"]).stages
    assert (stage.student_layers, stage.student_vocab_size, stage.max_length) == ([1, 3, 5], 6800, 256)
    assert (stage.vector_loss, stage.eval_data) == ("mse", None)
