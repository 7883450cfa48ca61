"""The classify stage: from a file to a classifier that transformers loads, and the input that it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, pipeline

from helpers import read_rows
from minibert import train_word_level
from minibert.data.labels import MULTI, REGRESSION, SINGLE, Labels, read_labels
from minibert.evaluation.metrics import classification_metrics
from minibert.train.arguments import ClassifyStage
from minibert.train.rows import TokenizedDataset
from minibert.train.stage import StageContext
from minibert.train.stages.classify import classify as classify_stage

ANIMALS, THINGS = ("cat", "dog", "owl"), ("cup", "pen", "key")
PRESET = {
    "preset": "nano-1x3",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
}


def sentences(count=90):
    """Sentences about animals (one) or things (zero)."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        label = int(generator.integers(2))
        noun = generator.choice((THINGS, ANIMALS)[label])
        yield {"text": " ".join(["the", *["very"] * int(generator.integers(4)), str(noun)]), "label": label}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_level([" ".join(["the very", *ANIMALS, *THINGS])]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)


@pytest.fixture
def classify(tmp_path, tokenizer_folder):
    """Run the stage on rows, written to files."""

    def run(rows, eval_rows=None, model=None, **changes):
        files = {}
        for name, some in (("data", rows), ("eval_data", eval_rows)):
            if some is not None:
                files[name] = str(tmp_path / f"{name}.parquet")
                (some if isinstance(some, Dataset) else Dataset.from_list(list(some))).to_parquet(files[name])
        values = {"kind": "classify", **files, "batch_size": 8, "learning_rate": 0.02, "log_steps": 5, **changes}
        values["model"] = model or PRESET
        context = StageContext(tmp_path / "out", seed=3, model=model, tokenizer=tokenizer_folder)
        return classify_stage(ClassifyStage.model_validate(values), context)

    return run


def test_learns_and_is_loaded_by_a_pipeline(classify, tmp_path):
    metrics = classify(sentences(), sentences(30), epochs=8, labels=["thing", "animal"])
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_macro_f1"] == 1.0 and metrics["eval_loss"] < 0.2
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    predict = pipeline("text-classification", model=str(tmp_path / "out"))
    assert [answer["label"] for answer in predict(["the very owl", "the pen"])] == ["animal", "thing"]


def test_pairs_with_string_labels_and_segments(classify, tmp_path):
    """The label depends on which of the two texts comes first, so both texts must arrive, in order."""
    rows = [
        {"premise": f"the {one}", "hypothesis": f"the {other}", "label": "up" if (one in ANIMALS) else "down"}
        for one in ANIMALS + THINGS
        for other in ANIMALS + THINGS
        if (one in ANIMALS) != (other in ANIMALS)
    ]
    metrics = classify(rows * 3, rows, epochs=15, model=None)
    assert metrics["eval_accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert model.config.id2label == {0: "down", 1: "up"}


def test_starts_from_an_earlier_model(classify, tmp_path):
    classify(sentences(), epochs=1)
    first = tmp_path / "first"
    (tmp_path / "out").rename(first)
    rows = [{**row, "label": row["label"] * 2} for row in sentences()]  # three classes now: a new head
    classify(rows, model=str(first), epochs=1, learning_rate=1e-12)
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (first, tmp_path / "out")]
    torch.testing.assert_close(models[0].get_input_embeddings().weight, models[1].get_input_embeddings().weight)
    assert models[1].config.num_labels == 3


def test_batches_are_padded_to_their_longest_row_and_hold_the_tokenizers_ids(tokenizer):
    rows = Dataset.from_dict({"a": ["the cat", "the very very dog", "cup"], "b": ["pen", "the key", "owl"]})
    made = TokenizedDataset.from_texts(rows, ("a", "b"), np.array([1, 0, 1]), tokenizer, 32)
    for wanted in ([0], [2, 0], [0, 1, 2]):
        batch = made.collate(np.array(wanted))
        expected = tokenizer(rows[wanted]["a"], rows[wanted]["b"], padding=True, return_tensors="pt")
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert batch["labels"].tolist() == [[1, 0, 1][row] for row in wanted]
    other = TokenizedDataset.from_texts(rows, ("b", "a"), np.array([1, 0, 1]), tokenizer, 32)
    assert made.fingerprint != other.fingerprint


def test_long_texts_are_cut(tokenizer):
    rows = Dataset.from_dict({"a": ["the " * 50], "b": ["cat " * 3]})
    made = TokenizedDataset.from_texts(rows, ("a", "b"), np.array([1]), tokenizer, 12)
    assert made.lengths.tolist() == [12]
    assert tokenizer.convert_ids_to_tokens(made.ids.tolist()).count("cat") == 3  # the longer text is cut first


def test_figures():
    logits = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    metrics = classification_metrics(logits, np.array([0, 1, 2, 1]))
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).item())


@pytest.mark.parametrize(
    ("values", "feature", "given", "labels", "names"),
    [
        ([0, 2, 1], Value("int64"), None, [0, 2, 1], ["0", "1", "2"]),
        ([0.0, 1.0], Value("float64"), None, [0, 1], ["0", "1"]),
        ([True, False], Value("bool"), None, [1, 0], ["0", "1"]),
        (["yes", "no"], Value("string"), None, [1, 0], ["no", "yes"]),
        (["yes", "no"], Value("string"), ["yes", "no"], [0, 1], ["yes", "no"]),
        ([0, 1], ClassLabel(names=["yes", "no"]), None, [0, 1], ["yes", "no"]),
        ([0, 1], ClassLabel(names=["yes", "no"]), ["no", "yes"], [1, 0], ["no", "yes"]),
        ([1, 0], Value("int64"), ["no", "yes"], [1, 0], ["no", "yes"]),
    ],
)
def test_labels_in_every_form(values, feature, given, labels, names):
    rows = Dataset.from_dict({"label": values}, features=Features({"label": feature}))
    problem, found, found_names = read_labels(rows, "label", given)
    assert problem == SINGLE and found.tolist() == labels and found_names == names


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([0, 1, 0.5], {"labels": ["a", "b"]}, r"Row 3 has the label 0.5 in 'label'; the classes are numbered 0 to 1"),
        ([0, 1, 0.5], {"problem_type": SINGLE}, r"Row 3 has the label 0.5 in 'label'; the classes are numbered 0 to 1"),
        ([0, -1, 1], {}, r"Row 2 has the label -1 .* numbered 0 to 1. Correct it or remove the row"),
        ([0, 1, 2], {"labels": ["a", "b"]}, r"Row 3 has the label 2 in 'label'; the classes are numbered 0 to 1"),
        (["a", "b", "c"], {"labels": ["a", "b"]}, r"Row 3 has the label 'c' in 'label'; the classes are a, b"),
        (["a", "a", "a"], {}, r"only the class 'a'"),
        ([0, 0, 0], {}, r"only the class '0'; a classifier needs at least two"),
        ([0, 1, 5000], {}, r"has the label 5000, which needs 5001 classes for 3 rows; .* or give labels"),
        ([[0], [1, 5000], []], {}, r"has the label 5000, which needs 5001 classes for 3 rows; .* or give labels"),
        ([0, None, 1], {}, r"no value in column 'label' of row 2"),
        ([[0], [1], [0]], {"problem_type": SINGLE}, r"not classes"),
        ([[0], [1, 0], []], {"problem_type": SINGLE}, r"holds List.*, not classes"),
        ([0, 1, 0], {"problem_type": MULTI}, r"one label per row; multi_label_classification needs lists of classes"),
        ([["a"], ["b", "c"], []], {"labels": ["a", "b"]}, r"Row 2 has the label 'c' in 'label'; the classes are a, b"),
        ([[0], [1, -1], []], {}, r"Row 2 has the label -1 in 'label'; the classes are numbered 0 to 1"),
        ([[0, 1, 1], [0], [1]], {}, r"Row 1 has label=\[0, 1, 1\]; a list names each class once"),
        ([["a"], ["b", None], []], {}, r"Row 2 has the label None in 'label'"),
        ([["a"], None, []], {}, r"no value in column 'label' of row 2"),
        ([[0.5], [1.0], [0.0]], {}, r"Row 1 has the label 0.5 in 'label'"),
        ([0.5, float("nan"), 1], {}, r"Row 2 has label=nan; a finite number belongs there"),
        (["1", "b", "2"], {"problem_type": REGRESSION}, r"Row 2 has label='b'; a finite number belongs there"),
        (["1", "3", "2"], {"problem_type": REGRESSION}, r"Row 1 has label='1'; write it as a number, not as a text"),
        ([0.5, 2.5, 1], {"problem_type": REGRESSION, "labels": ["a", "b"]}, r"Regression predicts one number"),
        ([0, 1, 2], {"label_column": ["label", "more"]}, r"no column 'more'"),
        ([0, 1, 2], {"labels": ["a", "b", "a"]}, r"labels\n.* a is given more than once; give each name once"),
        ([0, 1, 1], {"label_column": ["label", "label"]}, r"label_column\n.* label is given more than once"),
        ([0, 1, 1], {"epochs": float("inf")}, r"epochs\n.*finite number"),
        ([0, 1, 1], {"weight_decay": float("nan")}, r"weight_decay\n.*finite number"),
        ([0, 1, 2], {"label_column": ["label"]}, r"Row 3 has label=2; each column of labels must hold 0 or 1"),
        ([0, 1, 1], {"label_column": ["label"], "problem_type": SINGLE}, r"reads its labels from one column, not from label"),
        ([0.5, 2.5, 1], {"metric_for_best": "accuracy"}, r"use one of spearman, pearson, mse"),
        ([0, 1, 1], {"label_column": "gold"}, r"no column 'gold'; it has text, label"),
        ([0, 1, 1], {"text_columns": ["body"]}, r"Column 'body' is not there"),
        ([0, 1, 1], {"text_columns": ["label"]}, r"Column 'label' does not hold texts"),
        ([0, 1, 1], {"max_length": 4000}, r"max_length=4000 exceeds the model's max_position_embeddings=128"),
        (
            [0, 1, 1],
            {"class_weights": {"0": 1.0, "two": 3.0}},
            r"class_weights={'0': 1.0, 'two': 3.0} should be balanced, or positive numbers for 0, 1",
        ),
        (
            [0, 1, 1],
            {"class_weights": {"0": 0.0}},
            r"class_weights={'0': 0.0} should be balanced, or positive numbers for 0, 1",
        ),
        ([0, 1, 1], {"class_weights": {0: -1}}, r"or positive numbers for 0, 1"),
        ([0, 1, 1], {"class_weights": {0: float("nan")}}, r"or positive numbers for 0, 1"),
        ([0, 1, 1], {"class_weights": {0: float("inf")}}, r"or positive numbers for 0, 1"),
        ([0, 1, 1], {"class_weights": {0: "2"}}, r"or positive numbers for 0, 1"),
        ([0, 1, 1], {"class_weights": {}}, r"class_weights={} should be balanced"),
        ([0, 1, 1], {"class_weights": "equal"}, r"class_weights='equal' should be balanced, or positive numbers for 0, 1"),
        ([0.5, 2.5, 1], {"class_weights": "balanced"}, r"class_weights need one class per row, but the labels are regression"),
        ([[0], [1], []], {"class_weights": "balanced"}, r"the labels are multi_label_classification; remove them"),
        ([0, 1, 1], {"patience": 2}, r"patience needs eval_data and metric_for_best; set both, or remove patience"),
        ([0, 1, 1], {"metric_for_best": "f2"}, r"metric_for_best='f2' is not measured; use one of accuracy, macro_f1, loss"),
    ],
)
def test_refusals_name_the_row_or_field(classify, tmp_path, labels, changes, message):
    rows = Dataset.from_dict({"text": ["the cat", "the dog", "the cup"], "label": labels})
    with pytest.raises(ValueError, match=message):
        classify(rows, **changes)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_several_labels_per_row(classify, tmp_path):
    """Each noun brings its class, so a text of two nouns has two, and one of none has none."""
    rows = [
        {"text": f"the {one} the {other}", "label": [name for name in ("animal", "thing") if name in (kind_one, kind_other)]}
        for one, kind_one in (("cat", "animal"), ("cup", "thing"), ("very", None))
        for other, kind_other in (("dog", "animal"), ("pen", "thing"), ("very", None))
    ]
    metrics = classify(rows * 8, rows, epochs=25, learning_rate=0.02, batch_size=8, eval_steps=75)
    assert metrics["eval_micro_f1"] == metrics["eval_macro_f1"] == metrics["eval_subset_accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert (model.config.problem_type, model.config.id2label) == (MULTI, {0: "animal", 1: "thing"})


def test_a_number_per_row(classify, tmp_path):
    """The number of animals in a text, from 0 to 1 by halves."""
    rows = [
        {"sentence1": f"the {one}", "sentence2": f"the {other}", "score": ((one in ANIMALS) + (other in ANIMALS)) / 2}
        for one in ANIMALS + THINGS
        for other in ANIMALS + THINGS
    ]
    metrics = classify(rows * 2, rows, epochs=15, learning_rate=0.01, eval_steps=135, label_column="score")
    assert metrics["eval_spearman"] > 0.85 and metrics["eval_pearson"] > 0.85 and metrics["eval_mse"] < 0.04
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert (model.config.problem_type, model.config.id2label) == (REGRESSION, {0: "score"})


def test_the_smallest_error_is_kept(classify, tmp_path):
    rows = [{"text": f"the {noun}", "label": 0.5 + (noun in ANIMALS)} for noun in ANIMALS + THINGS] * 4
    metrics = classify(rows, rows, epochs=4, metric_for_best="mse", eval_steps=1, save_steps=1)
    log = read_rows(tmp_path / "out/log.jsonl")
    errors = [line["eval_mse"] for line in log if "eval_mse" in line]
    assert len(errors) == 12 and metrics["eval_mse"] == min(errors) < max(errors)


@pytest.mark.parametrize(
    ("columns", "given", "values", "names"),
    [
        ({"label": [["b"], [], ["b", "a"]]}, None, [[0, 1], [0, 0], [1, 1]], ["a", "b"]),
        ({"label": [["b"], [], ["b", "a"]]}, ["b", "a"], [[1, 0], [0, 0], [1, 1]], ["b", "a"]),
        ({"label": [[2], [], [0, 1]]}, None, [[0, 0, 1], [0, 0, 0], [1, 1, 0]], ["0", "1", "2"]),
        ({"toxic": [0, 1], "rude": [True, False]}, None, [[0, 1], [1, 0]], ["toxic", "rude"]),
    ],
)
def test_sets_of_labels_in_every_form(columns, given, values, names):
    rows = Dataset.from_dict(columns)
    wanted = "label" if "label" in columns else list(columns)
    assert [x.tolist() if isinstance(x, np.ndarray) else x for x in read_labels(rows, wanted, given)] == [MULTI, values, names]


def test_numbers_beside_names_found_as_strings_are_names():
    """A CSV file of the labels 1 and 2 holds numbers, even where that of training, which also had x, held strings."""
    found = read_labels(Dataset.from_dict({"label": ["2", "1", "x"]}), "label").names
    for values in ([2, 1], [2.0, 1.0], ["2", "1"]):
        assert read_labels(Dataset.from_dict({"label": values}), "label", found).values.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"Row 2 has the label 0 in 'label'; the classes are 1, 2, x"):
        read_labels(Dataset.from_dict({"label": [1, 0]}), "label", found)
    named = Dataset.from_dict({"label": [0, 1]}, features=Features({"label": ClassLabel(names=["x", "1"])}))
    assert read_labels(named, "label", found).values.tolist() == [2, 0]

    found = read_labels(Dataset.from_dict({"label": [["2"], ["1", "x"]]}), "label").names
    assert read_labels(Dataset.from_dict({"label": [[2], [1, 2]]}), "label", found).values.tolist() == [[0, 1, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match=r"Row 1 has the label 0 in 'label'; the classes are 1, 2, x"):
        read_labels(Dataset.from_dict({"label": [[0], [1]]}), "label", found)


@pytest.mark.parametrize("family", ["minibert", "bert"])
def test_balanced_weights_find_a_rare_class(classify, tokenizer, tmp_path, family):
    """Nothing in a text tells its class, so the class that the loss prefers is predicted; the model keeps no trace of that."""
    start = None
    if family == "bert":  # a model that computes its loss by itself
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(start := tmp_path / "bert")
    rows = [{"text": "the cat", "label": int(number % 6 == 0)} for number in range(60)]
    results = {}
    for name, weights in (("plain", None), ("balanced", "balanced"), ("named", {1: 50.0})):
        metrics = classify(rows, rows, model=start and str(start), epochs=3, batch_size=12, class_weights=weights)
        results[name] = metrics["eval_accuracy"], metrics["eval_loss"]
        assert "weights" not in (tmp_path / "out/config.json").read_text()
        shutil.rmtree(tmp_path / "out")
    assert (results["plain"][0], results["named"][0]) == (pytest.approx(5 / 6), pytest.approx(1 / 6))
    assert results["plain"][1] < 0.5 and results["balanced"][1] == pytest.approx(0.693, abs=0.05)  # not weighted


def test_weights_of_classes():
    labels = Labels(SINGLE, np.array([0, 0, 0, 2]), ["a", "b", "c"])  # b is never seen
    assert labels.class_weights(None) is None
    assert labels.class_weights("balanced") == pytest.approx([4 / 2 / 3, 1, 4 / 2 / 1])
    assert labels.class_weights({"c": 3, "a": 0.5}) == [0.5, 1, 3]


def test_lists_of_wide_offsets_are_lists():
    rows = Dataset.from_dict({"label": [["b"], ["a", "b"]]}, features=Features({"label": LargeList(Value("string"))}))
    assert read_labels(rows, "label").values.tolist() == [[0, 1], [1, 1]]


def test_named_sets_may_be_numbered_in_another_order():
    features = Features({"label": List(ClassLabel(names=["yes", "no"]))})
    rows = Dataset.from_dict({"label": [[0], [1, 0]]}, features=features)
    assert read_labels(rows, "label").values.tolist() == [[1, 0], [1, 1]]
    assert read_labels(rows, "label", ["no", "yes"]).values.tolist() == [[0, 1], [1, 1]]


def test_figures_of_several_labels():
    logits = torch.tensor([[0.1, -1.0], [1.0, 1.0], [-1.0, -0.1]])
    metrics = classification_metrics(logits, np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32), MULTI)
    assert metrics["subset_accuracy"] == pytest.approx(1 / 3)
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # two right, one too many, one missed
    assert metrics["macro_f1"] == pytest.approx((1 + 0) / 2)


def test_figures_of_numbers():
    metrics = classification_metrics(torch.tensor([[1.0], [2.0], [9.0]]), np.array([1, 2, 3], dtype=np.float32), REGRESSION)
    assert metrics["spearman"] == pytest.approx(1) and 0.9 < metrics["pearson"] < 1 and metrics["mse"] == 12
    same = classification_metrics(torch.tensor([[1.0], [1.0]]), np.array([1, 2], dtype=np.float32), REGRESSION)
    assert same["spearman"] is same["pearson"] is None


def test_refuses_data_without_usual_columns_and_unseen_labels_in_validation(classify):
    with pytest.raises(ValueError, match=r"not clear which column of .* found title, body, label; name it \(text_columns\)"):
        classify([{"title": "cat", "body": "the cat", "label": 0}, {"title": "cup", "body": "the cup", "label": 1}])
    with pytest.raises(ValueError, match=r"Row 2 has the label 2 in 'label'; the classes are 0, 1"):
        classify(sentences(), [{"text": "the cat", "label": 0}, {"text": "the cup", "label": 2}])
    with pytest.raises(ValueError, match=r"eval_data may only contain labels that also occur in data: Row 1 has the label 'c'"):
        classify([{"text": "the cat", "label": ["a"]}] * 2, [{"text": "the cat", "label": ["c"]}])


def test_refuses_dropout_where_the_model_names_it_otherwise(classify, tokenizer, tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "distil")
    with pytest.raises(ValueError, match="is a distilbert model, which has no hidden_dropout_prob"):
        classify(sentences(), model=str(tmp_path / "distil"), dropout=0.1)
