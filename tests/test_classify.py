"""The classify stage: from a file to a classifier that transformers loads, and the input that it refuses."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from minibert import train_word_level
from minibert.train.arguments import ClassifyStage
from minibert.train.classify import classification_figures, read_labels
from minibert.train.classify import classify as classify_stage
from minibert.train.rows import TokenRows
from minibert.train.stage import StageContext

ANIMALS, THINGS = ("cat", "dog", "owl"), ("cup", "pen", "key")
PRESET = {"preset": "nano-1x3", "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


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
    made = TokenRows.from_texts(rows, ("a", "b"), np.array([1, 0, 1]), tokenizer, 32)
    for wanted in ([0], [2, 0], [0, 1, 2]):
        batch = made.collate(made.__getitems__(wanted))
        expected = tokenizer(rows[wanted]["a"], rows[wanted]["b"], padding=True, return_tensors="pt")
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert batch["labels"].tolist() == [[1, 0, 1][row] for row in wanted]
    other = TokenRows.from_texts(rows, ("b", "a"), np.array([1, 0, 1]), tokenizer, 32)
    assert made.fingerprint != other.fingerprint


def test_long_texts_are_cut(tokenizer):
    rows = Dataset.from_dict({"a": ["the " * 50], "b": ["cat " * 3]})
    made = TokenRows.from_texts(rows, ("a", "b"), np.array([1]), tokenizer, 12)
    assert made.lengths.tolist() == [12]
    assert tokenizer.convert_ids_to_tokens(made.ids.tolist()).count("cat") == 3  # the longer text is cut first


def test_figures():
    logits = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    figures = classification_figures(logits, np.array([0, 1, 2, 1]))
    assert figures["accuracy"] == 0.75
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).item())


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
    found, found_names = read_labels(rows, "label", given)
    assert found.tolist() == labels and found_names == names


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([0, 1, 0.5], {}, r"Row 3 has label=0.5; a label must be a whole number"),
        ([0, -1, 1], {}, r"Row 2 has label=-1; classes are numbered 0 to 1; correct it or remove the row"),
        ([0, 1, 2], {"labels": ["a", "b"]}, r"Row 3 has label=2; classes are numbered 0 to 1"),
        (["a", "b", "c"], {"labels": ["a", "b"]}, r"Row 3 has label='c'; it should be one of a, b"),
        (["a", "a", "a"], {}, r"single class 'a'"),
        ([0, None, 1], {}, r"no value in column 'label' of row 2"),
        ([[0], [1], [0]], {}, r"not classes"),
        ([0, 1, 1], {"label_column": "gold"}, r"no column 'gold'; it has text, label"),
        ([0, 1, 1], {"text_columns": ["body"]}, r"no column 'body'"),
        ([0, 1, 1], {"text_columns": ["label"]}, r"'label' of .* does not hold text"),
        ([0, 1, 1], {"max_length": 4000}, r"max_length=4000 exceeds the model's max_position_embeddings=128"),
        ([0, 1, 1], {"metric_for_best": "f2"}, r"metric_for_best='f2' is unknown; use one of accuracy, macro_f1, loss"),
    ],
)
def test_refusals_name_the_row_or_field(classify, tmp_path, labels, changes, message):
    rows = Dataset.from_dict({"text": ["the cat", "the dog", "the cup"], "label": labels})
    with pytest.raises(ValueError, match=message):
        classify(rows, **changes)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_refuses_data_without_usual_columns_and_unseen_labels_in_validation(classify):
    with pytest.raises(ValueError, match=r"none of the usual columns of text .*; it has body, label"):
        classify([{"body": "the cat", "label": 0}, {"body": "the cup", "label": 1}])
    with pytest.raises(ValueError, match=r"Row 2 has label=2; classes are numbered 0 to 1"):
        classify(sentences(), [{"text": "the cat", "label": 0}, {"text": "the cup", "label": 2}])
