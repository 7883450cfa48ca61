"""Data sets from the Hub, served on the loopback interface: by name, configuration, split and revision, streamed or not."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from minibert.data.load import as_dataset, load
from minibert.data.source import DataSource
from minibert.hub.card import build_card
from minibert.train.recipe import load_recipe
from minibert.train.run import run_recipe

NLI, QUESTIONS = "sentence-transformers/all-nli", "sentence-transformers/natural-questions"
LABELS = ["entailment", "neutral", "contradiction"]
THINGS = ["boat", "house", "river", "train", "garden", "letter", "winter", "bridge"]
# What the real repositories say about themselves, cut down to what is used.
NLI_CARD = """---
configs:
- config_name: pair
  data_files:
  - {split: train, path: pair/train-*}
- config_name: pair-class
  data_files:
  - {split: train, path: pair-class/train-*}
  - {split: dev, path: pair-class/dev-*}
dataset_info:
- config_name: pair-class
  features:
  - {name: premise, dtype: string}
  - {name: hypothesis, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': entailment, '1': neutral, '2': contradiction}}}
---
"""
QUESTIONS_CARD = """---
configs:
- config_name: pair
  data_files:
  - {split: train, path: pair/train-*}
---
"""


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def inference_pairs(count):
    things = [THINGS[row % len(THINGS)] for row in range(count)]
    return parquet(
        premise=[f"A {thing} stands number {row}." for row, thing in enumerate(things)],
        hypothesis=[f"There is {'a' if row % 3 == 0 else 'no'} {thing}." for row, thing in enumerate(things)],
        label=pa.array([row % 3 for row in range(count)], pa.int64()),
    )


def questions(count, word="is"):
    return parquet(
        query=[f"where {word} the {THINGS[row % len(THINGS)]} {row}" for row in range(count)],
        answer=[f"The {THINGS[row % len(THINGS)]} {row} stands by the road." for row in range(count)],
    )


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path):
    """A Hub with the two data sets of the TinyBERT recipe, by their real names, files, splits and columns."""
    files = {"README.md": NLI_CARD.encode(), "pair/train-00000-of-00001.parquet": parquet(anchor=["a"], positive=["b"])}
    files |= {f"pair-class/train-0000{part}-of-00003.parquet": inference_pairs(16) for part in range(3)}
    files |= {"pair-class/dev-00000-of-00001.parquet": inference_pairs(9)}
    hub_server.add_repo(NLI, files, kind="dataset")
    files = {"README.md": QUESTIONS_CARD.encode(), "pair/train-00000-of-00001.parquet": questions(32)}
    hub_server.add_repo(QUESTIONS, files, kind="dataset")
    hub_server.patch(monkeypatch, tmp_path / "home")
    return hub_server


def last_commit(hub, name):
    return hub.commits(name, kind="dataset")[-1]


def test_the_recipes_data_sets_have_their_columns_and_labels(hub):
    pairs = as_dataset(f"{NLI}:pair-class", split="train")
    assert pairs.column_names == ["premise", "hypothesis", "label"] and len(pairs) == 48
    assert pairs.features["label"].names == LABELS
    assert len(load([DataSource(path=NLI, config="pair-class", split="dev")])) == 9
    assert as_dataset(f"{NLI}:pair", split="train").column_names == ["anchor", "positive"]
    found = as_dataset(QUESTIONS, split="train")
    assert found.column_names == ["query", "answer"] and len(found) == 32


def test_slices_sums_renamed_columns_and_a_limit(hub):
    source = DataSource(path=NLI, config="pair-class", split="train[:25%]+dev", columns={"premise": "text"}, limit=20)
    rows = load([source])
    assert rows.column_names == ["text", "hypothesis", "label"] and len(rows) == 20
    assert rows[12]["text"] == "A boat stands number 0."  # the first row of dev


@pytest.mark.parametrize("streaming", [False, True])
def test_a_revision_is_pinned_and_recorded(hub, streaming):
    first = last_commit(hub, QUESTIONS)
    files = hub.files(QUESTIONS, kind="dataset") | {"pair/train-00000-of-00001.parquet": questions(32, "was")}
    second = hub.add_repo(QUESTIONS, files, kind="dataset")
    hub.add_repo(QUESTIONS, hub.files(QUESTIONS, first, kind="dataset"), kind="dataset", ref="old")
    for revision, word, commit in ((None, "was", second), (first, "is", first), ("old", "is", None)):
        source = DataSource(path=QUESTIONS, revision=revision, limit=3, streaming=streaming)
        assert source.commit is None
        assert load([source])["query"][:2] == [f"where {word} the boat 0", f"where {word} the house 1"]
        assert source.commit == (commit or last_commit(hub, QUESTIONS))
        assert "commit" not in source.model_dump()  # a recipe says what its author wrote


def test_streamed_rows_are_the_first_ones_with_their_types(hub):
    whole = as_dataset(f"{NLI}:pair-class", split="train")
    source = DataSource(path=NLI, config="pair-class", limit=30, streaming=True)
    rows = load([source])
    assert rows.features == whole.features
    assert rows.to_dict() == whole.select(range(30)).to_dict()


def test_what_is_streamed_is_not_downloaded_whole(hub, tmp_path):
    load([DataSource(path=NLI, config="pair-class", limit=2, streaming=True)])
    fetched = {path for phase, _, path, _ in hub.requests if phase == "download"}
    assert any("pair-class/train-00000" in path for path in fetched)
    assert not any("train-00002" in path or "dev-" in path for path in fetched)  # datasets fetches one file in advance


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streaming": True}, "say how many with limit:"),
        ({"streaming": True, "limit": 5, "split": "train[:50%]"}, "split='train\\[:50%\\]' cannot be streamed"),
        ({"streaming": True, "limit": 5, "split": "train+dev"}, "is a slice or a sum"),
    ],
)
def test_what_cannot_be_streamed_is_said_at_once(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataSource(path=NLI, **fields)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"path": "ann/nothing"}, FileNotFoundError, "ann/nothing is neither a file .* nor a data set"),
        ({"path": NLI, "config": "triples"}, ValueError, "configuration triples .*pair-class"),
        ({"path": QUESTIONS, "split": "validation"}, ValueError, "train"),
        ({"path": QUESTIONS, "revision": "v9"}, FileNotFoundError, "v9|not"),
    ],
)
def test_names_that_are_not_there(hub, fields, error, words, streaming):
    source = DataSource(**fields, **({"streaming": True, "limit": 1} if streaming else {}))
    with pytest.raises(error, match=words) as caught:
        load([source])
    assert "\n" not in str(caught.value)


def test_a_hub_that_fails_is_one_sentence(hub):
    hub.fail("info", 500, times=50)
    with pytest.raises((ValueError, OSError), match=QUESTIONS) as caught:
        as_dataset(QUESTIONS, split="train")
    assert "\n" not in str(caught.value) and "hf_" not in str(caught.value)


def test_what_was_read_once_is_there_without_a_network(hub, monkeypatch):
    before = as_dataset(QUESTIONS, split="train")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.stop()
    assert as_dataset(QUESTIONS, split="train").to_dict() == before.to_dict()
    with pytest.raises((ValueError, OSError), match=NLI):
        as_dataset(f"{NLI}:pair-class", split="train")


def test_the_tinybert_recipe_trains_on_them_by_name(hub, tmp_path):
    """The bundled recipe, with its data as it stands; only sizes and steps are small."""
    small = "{preset: search-8x768, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 8}"
    overrides = [f"classify.model={small}", "tokenizer.vocab_size=80"]
    for stage in ("classify", "embed"):
        overrides += [f"{stage}.max_steps=2", f"{stage}.batch_size=4", f"{stage}.max_length=16"]
    run = run_recipe(load_recipe("tinybert", overrides), output_dir=tmp_path / "run")
    commits = {NLI: last_commit(hub, NLI), QUESTIONS: last_commit(hub, QUESTIONS)}
    recorded = json.loads((run / "1-tokenizer" / "environment.json").read_text())["datasets"]
    assert recorded == commits
    assert json.loads((run / "2-classify" / "config.json").read_text())["label2id"].keys() == set(LABELS)
    card = build_card(run / "3-embed", "ann/tinybert")
    assert f"datasets:\n- {NLI}\n- {QUESTIONS}\n" in card
    assert all(commit in card for commit in commits.values())
    card = build_card(run / "2-classify", "ann/tinybert")
    assert f"    dataset:\n      name: {NLI}\n      type: {NLI}\n      config: pair-class\n      split: dev\n" in card
    assert f"      revision: {commits[NLI]}\n" in card
