"""The tag stage: words and tags in, a tagger out; windows that lose no word, and the input that is refused."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, LargeList, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from helpers import in_iob2, write_rows
from minibert import train_word_level, train_wordpiece
from minibert.data.tags import entity_spans, read_tags, read_words, tokenize_windows
from minibert.evaluation.evaluate import evaluate
from minibert.evaluation.metrics import tag_metrics
from minibert.train.arguments import TagStage
from minibert.train.recipe import load_recipe
from minibert.train.rows import compute_outputs
from minibert.train.run import read_metrics, run_recipe
from minibert.train.stage import StageContext
from minibert.train.stages.tag import TagRows, measure
from minibert.train.stages.tag import tag as tag_stage

NAMES, PLACES, OTHER = ("ann", "bob", "cid"), ("rome", "oslo", "lima"), ("saw", "in", "and", "left")
PRESET = {
    "preset": "nano-1x3",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "max_position_embeddings": 24,
}


def sentences(count=60, longest=6):
    """Names and places among other words; a second name is the same person's."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        tokens, tags = [], []
        for kind in generator.integers(3, size=generator.integers(1, longest + 1)):
            if kind == 0:
                tokens += [str(generator.choice(NAMES)), "smith"]
                tags += ["B-PER", "I-PER"]
            else:
                tokens.append(str(generator.choice(PLACES if kind == 1 else OTHER)))
                tags.append("B-LOC" if kind == 1 else "O")
        yield {"tokens": tokens, "ner_tags": tags}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_level([" ".join([*NAMES, *PLACES, *OTHER, "smith"])], model_max_length=24).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that cuts most words into several subwords."""
    return train_wordpiece(["ab abc abcd abcde b bc bcd"] * 2, vocab_size=14, model_max_length=64)


@pytest.fixture
def tag(tmp_path, tokenizer_folder):
    """Run the stage on rows, written to files."""

    def run(rows, eval_rows=None, **changes):
        files = {}
        for name, some in (("data", rows), ("eval_data", eval_rows)):
            if some is not None:
                files[name] = str(tmp_path / f"{name}.parquet")
                (some if isinstance(some, Dataset) else Dataset.from_list(list(some))).to_parquet(files[name])
        values = {"kind": "tag", **files, "batch_size": 8, "learning_rate": 0.02, "model": PRESET, **changes}
        context = StageContext(tmp_path / "out", seed=3, tokenizer=tokenizer_folder)
        return tag_stage(TagStage.model_validate(values), context)

    return run


def test_learns_and_is_measured_on_every_word_of_long_sentences(tag, tmp_path):
    rows = list(sentences())
    long = {key: [value for row in rows[:15] for value in row[key]] for key in ("tokens", "ner_tags")}  # several windows
    assert len(long["tokens"]) > 2 * 24
    metrics = tag(rows, [*rows, long], epochs=8)
    assert metrics["eval_f1"] == metrics["eval_precision"] == metrics["eval_recall"] == metrics["eval_accuracy"] == 1.0
    assert metrics["eval_loss"] < 0.4
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert list(model.config.id2label.values()) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    measured = evaluate(tmp_path / "out", Dataset.from_list([long]))
    assert (measured["kind"], measured["words"]) == ("tagging", len(long["tokens"]))
    assert measured["systems"]["model"] == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}


def test_part_of_speech_tags_have_no_entities(tag):
    rows = [{"words": ["ann", "saw", "oslo"], "pos_tags": ["NOUN", "VERB", "NOUN"]}] * 8
    metrics = tag(rows, rows, epochs=6)
    assert metrics["eval_accuracy"] == metrics["eval_macro_f1"] == 1.0 and "eval_f1" not in metrics


def test_weights_of_tags(tag, tmp_path):
    """Nothing in a word tells its tag, so the tag that the loss prefers is predicted."""
    rows = [{"words": ["ann"] * 8, "pos_tags": ["NOUN" if place == row else "VERB" for place in range(8)]} for row in range(8)]
    assert tag(rows, rows, epochs=20)["eval_accuracy"] == 7 / 8
    shutil.rmtree(tmp_path / "out")
    assert tag(rows, rows, epochs=20, class_weights={"NOUN": 50.0})["eval_accuracy"] == 1 / 8
    with pytest.raises(ValueError, match="class_weights={'ADJ': 2.0} should be balanced, or positive numbers for NOUN, VERB"):
        tag(rows, class_weights={"ADJ": 2.0})


def test_numbered_tags_and_other_columns(tag, tmp_path):
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    rows = Dataset.from_list(
        [{"w": row["tokens"], "t": [names.index(name) for name in row["ner_tags"]]} for row in sentences()]
    )
    tag(rows, rows, token_column="w", tag_column="t", labels=names, metric_for_best="accuracy", epochs=0.2)
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"] == {str(at): n for at, n in enumerate(names)}


# ------------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize("max_length", [5, 6, 9, 16, 64])
def test_every_word_is_in_one_window_at_its_first_subword(pieces, max_length):
    generator = random.Random(max_length)
    words = ["a", "ab", "abcd", "bcdabcd", "\x7f", "", "[UNK]", "abcdeabcdeabcdeabcde"]
    some = [[generator.choice(words) for _ in range(generator.choice([0, 1, 3, 30]))] for _ in range(12)]
    windows = tokenize_windows(some, pieces, max_length)
    found = [[] for _ in some]
    for row, ids, numbers in zip(windows.rows, windows.ids, windows.words, strict=True):
        assert len(ids) == len(numbers) <= max_length
        for place in np.flatnonzero(numbers >= 0):
            found[row].append(int(numbers[place]))
            first = pieces(some[row][numbers[place]], add_special_tokens=False)["input_ids"][:1] or [pieces.unk_token_id]
            assert ids[place] == first[0]
    assert found == [list(range(len(row))) for row in some]


def test_long_sentences_are_read_from_their_start_whatever_a_tokenizer_cuts(pieces):
    some = [["abcd", "a", "b"] * 9]
    expected = tokenize_windows(some, pieces, 12)
    pieces.truncation_side = "left"
    try:
        found = tokenize_windows(some, pieces, 12)
        assert pieces.truncation_side == "left"
    finally:
        pieces.truncation_side = "right"
    assert found.ids == expected.ids and len(found.ids) > 2
    assert all((one == other).all() for one, other in zip(found.words, expected.words, strict=True))


def test_words_of_byte_level_vocabularies_keep_the_space_before_them():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["a cat saw the cat"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    windows = tokenize_windows([["a", "cat", "saw"]], tokenizer, 16)
    assert windows.ids == [tokenizer(" a cat saw")["input_ids"]]
    assert [word for word in windows.words[0].tolist() if word >= 0] == [0, 1, 2]


def test_words_of_two_windows_belong_to_the_one_where_they_stand_inside(pieces):
    windows = tokenize_windows([["a"] * 30], pieces, 18)  # 16 tokens without [CLS] and [SEP], 4 of them shared
    places = [np.flatnonzero(words >= 0).tolist() for words in windows.words]
    assert places == [list(range(1, 15)), list(range(3, 15)), list(range(3, 7))]


def test_a_batch_has_labels_where_words_begin(pieces):
    rows = TagRows.from_words([["abcd", "a"], ["b"]], [["x", "y"], ["y"]], ["x", "y"], pieces, 64)
    batch = rows.collate(np.array([1, 0]))
    expected = pieces([["b"], ["abcd", "a"]], is_split_into_words=True, padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in ("input_ids", "attention_mask"))
    assert batch["labels"].tolist()[0][:2] == [-100, 1] and set(batch["labels"].tolist()[0][2:]) == {-100}
    assert [label for label in batch["labels"].tolist()[1] if label >= 0] == [0, 1]


def test_the_evaluation_computes_what_the_loss_does(pieces):
    """One window per sentence: the mean loss over words is the model's own."""
    from minibert import MiniBertConfig, MiniBertForTokenClassification

    torch.manual_seed(0)
    shape = {name: value for name, value in PRESET.items() if name != "preset"}
    model = MiniBertForTokenClassification(
        MiniBertConfig.preset(PRESET["preset"], **shape, vocab_size=len(pieces), num_labels=2)
    ).eval()
    tags = [["x", "y", "y"], ["y"], ["x", "x"]]
    rows = TagRows.from_words([["abc", "a", "b"], ["bcd"], ["a", "ab"]], tags, ["x", "y"], pieces, 24)
    batch = rows.collate(np.arange(3))
    with torch.no_grad():
        metrics = measure(model, rows, tags, ["x", "y"], batch_size=2)
        assert metrics["loss"] == pytest.approx(float(model(**batch).loss), abs=1e-6)
        numbers, logits = compute_outputs(model, rows, 2)
    assert sorted(numbers.tolist()) == [0, 1, 2] and [len(part) for part in logits] == [2, 1]


# ----------------------------------------------------------------------------------------------------------------- the tags


def test_entity_figures_are_those_of_a_library():
    """The metrics are scikit-learn's over spans; nervaluate's strict ones must be the same, on any sequence of tags."""
    nervaluate = pytest.importorskip("nervaluate")
    generator = random.Random(0)
    names = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true = [in_iob2([generator.choice(names) for _ in range(generator.randint(1, 12))]) for _ in range(200)]
    found = [[name if generator.random() < 0.6 else generator.choice(names) for name in tags] for tags in true]
    strict = nervaluate.Evaluator(true, found, tags=["PER", "LOC"], loader="list").evaluate()["overall"]["strict"]
    metrics = tag_metrics(true, found)
    assert 0.1 < metrics["f1"] < 0.9
    for name in ("precision", "recall", "f1"):
        assert metrics[name] == pytest.approx(getattr(strict, name))


def test_entities_need_type_and_both_ends():
    true = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert tag_metrics(true, true)["f1"] == 1
    assert tag_metrics(true, [["B-PER", "O", "O", "B-LOC"]])["f1"] == 0.5
    assert tag_metrics(true, [["B-LOC", "I-LOC", "O", "B-LOC"]])["f1"] == 0.5
    nothing = tag_metrics([["O", "B-PER"]], [["O", "O"]])
    assert (nothing["f1"], nothing["precision"], nothing["accuracy"]) == (0, 0, 0.5)
    assert tag_metrics([["B-PER", "O"]], [["O", "O"]])["recall"] == 0


def test_an_entity_that_starts_without_b_is_refused():
    rows = Dataset.from_dict({"tokens": [["a"] * 3], "tags": [["O", "I-PER", "I-PER"]]})
    with pytest.raises(ValueError, match=r"Row 1 has 'I-PER' at word 2 .* or convert IOB1 tags to IOB2"):
        read_tags(rows, "tags", rows["tokens"])
    assert entity_spans(["I-PER", "I-LOC", "O", "I-LOC"]) == [("PER", 0, 1), ("LOC", 1, 2), ("LOC", 3, 4)]


def test_numbers_beside_tags_found_as_strings_are_names():
    words = [["a", "b"]]
    _, names = read_tags(Dataset.from_dict({"tags": [["2", "1", "x"]]}), "tags", [["a", "b", "c"]])
    assert read_tags(Dataset.from_dict({"tags": [[2, 1]]}), "tags", words, names) == ([["2", "1"]], ["1", "2", "x"])
    with pytest.raises(ValueError, match=r"Row 1 has the label 0 in 'tags'; the classes are 1, 2, x"):
        read_tags(Dataset.from_dict({"tags": [[1, 0]]}), "tags", words, names)
    assert read_tags(Dataset.from_dict({"tags": [[1, 0]]}), "tags", words, ["N", "V"])[0] == [["V", "N"]]


def test_lists_of_wide_offsets_are_lists():
    wide = LargeList(Value("string"))
    rows = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [["N", "V"]]}, features=Features({"tokens": wide, "tags": wide}))
    assert read_tags(rows, "tags", read_words(rows, "tokens")) == ([["N", "V"]], ["N", "V"])


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"tokens": [["a"], ["a", "b"]], "tags": [["O"], ["O"]]},
            {},
            r"Row 2 has tags=\['O'\]; every word of the row needs a tag",
        ),
        ({"tokens": [["a"], ["b"]], "tags": [["B-X"], ["L-X"]]}, {}, r"Row 2 has 'L-X' at word 1 in 'tags', which is not IOB2"),
        (
            {"tokens": [["a", "b"], ["a", "b"]], "tags": [["B-X", "O"], ["O", "I-X"]]},
            {},
            r"Row 2 has 'I-X' at word 2 in 'tags', which is not IOB2: every entity starts with B-",
        ),
        ({"tokens": [["a"], ["b"]], "tags": [["B-X"], ["B-Y"]]}, {"labels": ["O", "B-X"]}, r"Row 2 has the label 'B-Y' in"),
        (
            {"tokens": [["a"], ["b"]], "tags": [[0], [1]]},
            {},
            r"'tags' holds .*; tagging needs a list of tags in every row: strings, or numbers with their names",
        ),
        ({"tokens": [["a"], ["b"]], "tags": [[0], [3]]}, {"labels": ["O", "B-X"]}, r"Row 2 has the label 3 .* 0 to 1"),
        ({"tokens": [["a"]], "tags": [["O"]]}, {"labels": ["O", "O"]}, r"labels\n.* O is given more than once"),
        ({"tokens": [["a"], None], "tags": [["O"], ["O"]]}, {}, r"Row 2 has tokens=None; no word may be missing"),
        ({"tokens": [["a"], ["a", None]], "tags": [["O"], ["O", "O"]]}, {}, r"Row 2 has tokens=\['a', None\]"),
        ({"tokens": [["a"], ["b"]], "tags": [["O"], None]}, {}, r"Row 2 has tags=None; every word of the row needs a tag"),
        ({"tokens": ["a", "b"], "tags": [["O"], ["O"]]}, {}, r"'tokens' holds .*; tagging needs a list of words"),
        ({"tokens": [["a"], ["b"]], "tags": ["O", "O"]}, {}, r"'tags' holds .*; tagging needs a list of tags"),
        (
            {"tokens": [["a"]], "gold": [["O"]], "silver": [["O"]]},
            {},
            r"usual columns are ner_tags; .*found tokens, gold, silver",
        ),
        ({"tokens": [["a"]], "tags": [["O"]]}, {"token_column": "w"}, r"Column 'w' is not there .*token_column"),
        ({"tokens": [[], []], "tags": [[], []]}, {"labels": ["O", "B-X"]}, r"has no words in any row"),
        ({"tokens": [["a"]], "tags": [["B-X"]]}, {"metric_for_best": "macro_f1"}, r"use one of f1, precision, recall"),
        ({"tokens": [["a"]], "tags": [["B-X"]]}, {"max_length": 400}, r"max_length=400 exceeds the model's"),
        ({"tokens": [["a"]], "tags": [["B-X"]]}, {"max_length": 2}, r"max_length must be at least 3"),
    ],
)
def test_refusals_name_the_row_or_field(tag, tmp_path, columns, changes, message):
    strings = List(Value("string"))  # which nothing shows where every list is empty
    empty = columns["tokens"] == [[], []]
    rows = Dataset.from_dict(columns, features=Features({"tokens": strings, "tags": strings}) if empty else None)
    with pytest.raises(ValueError, match=message):
        tag(rows, **changes)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_tags_only_in_validation_are_refused(tag):
    rows = [{"tokens": ["ann"], "tags": ["B-PER"]}]
    with pytest.raises(
        ValueError,
        match=r"eval_data may only contain labels that also occur in data: Row 2 has the label 'B-LOC' in 'tags'; the classes",
    ):
        tag(rows, [*rows, {"tokens": ["oslo"], "tags": ["B-LOC"]}])


def test_a_recipe_tags_and_classifies_from_one_encoder(tmp_path):
    """Stages one after the other, from YAML: a tokenizer, a tagger, and on its encoder several labels and a number."""
    rows = list(sentences(40))
    Dataset.from_list(rows).to_parquet(tmp_path / "tags.parquet")
    kinds = [sorted({name[2:] for name in row["ner_tags"] if name != "O"}) for row in rows]
    texts = write_rows(
        tmp_path / "texts.jsonl",
        ({"text": " ".join(row["tokens"]), "kinds": own, "share": len(own) / 2} for row, own in zip(rows, kinds, strict=True)),
    )
    loop = {"batch_size": 8, "learning_rate": 0.01}
    recipe = {
        "name": "heads",
        "stages": [
            {"kind": "tokenizer", "data": texts, "text_columns": ["text"], "method": "word_level"},
            {
                "kind": "tag",
                "model": {**PRESET, "max_position_embeddings": 64},
                "data": str(tmp_path / "tags.parquet"),
                "eval_data": str(tmp_path / "tags.parquet"),
                **loop,
            },
            {"kind": "classify", "name": "kinds", "data": texts, "eval_data": texts, "label_column": "kinds", **loop},
            {"kind": "classify", "name": "share", "data": texts, "eval_data": texts, "label_column": "share", **loop},
        ],
    }
    (tmp_path / "heads.yaml").write_text(yaml.safe_dump(recipe))
    run = run_recipe(load_recipe(tmp_path / "heads.yaml", ["tag.epochs=3"]), output_dir=tmp_path / "run")
    metrics = read_metrics(run)
    assert {"eval_f1", "eval_loss"} <= metrics["tag"].keys()
    assert {"eval_micro_f1", "eval_subset_accuracy"} <= metrics["kinds"].keys()
    assert {"eval_spearman", "eval_mse"} <= metrics["share"].keys()
    configs = [json.loads((run / folder / "config.json").read_text()) for folder in ("3-kinds", "4-share")]
    assert [config["problem_type"] for config in configs] == ["multi_label_classification", "regression"]
    assert AutoTokenizer.from_pretrained(run / "2-tag", trust_remote_code=False).model_max_length == 64
