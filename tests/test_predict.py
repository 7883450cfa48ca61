"""Predictions for files: labels by name, tags with their places in the text, and input that is refused."""

import csv
import functools
import json
import random
from datetime import datetime

import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import BertConfig, pipeline

import minibert
from helpers import in_iob2, read_rows, run_command
from minibert.evaluation.evaluate import evaluate
from minibert.inference import predict as module

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = ["red apples fall", "green", "the red pears and the green apples of the garden", "apples"]


@pytest.fixture(scope="module")
def tokenizer():
    words = "red green apples pears fall garden the and of what who is in Ann Lee U S Oslo"
    return minibert.train_word_level([words], lowercase=False, model_max_length=24)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """Save a model with random weights and the head and classes wanted, and return its folder."""

    def save(head, names=(), family="MiniBert", text_columns=None, **changes):
        folder = tmp_path_factory.mktemp("models") / "model"
        torch.manual_seed(1)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}} if names else {}
        fields = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **labels, **changes}
        if family == "Bert":
            opened = getattr(transformers, f"Bert{head}")(BertConfig(**fields, initializer_range=0.5))
        else:
            config = minibert.MiniBertConfig.preset("bert-base", **fields, initializer_range=0.5)
            opened = getattr(minibert, f"MiniBert{head}")(config)
        if text_columns:
            opened.config.text_columns = text_columns
        opened.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def classifier(model):
    return model("ForSequenceClassification", ["bad", "fine", "good"])


@pytest.fixture(scope="module")
def tagger(model):
    return model("ForTokenClassification", ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return functools.partial(run_command, "predict")


@pytest.mark.parametrize("family", ["MiniBert", "Bert"])
def test_classes_are_those_of_the_ecosystems_pipeline(model, family):
    folder = model("ForSequenceClassification", ["bad", "fine", "good"], family)
    expected = pipeline("text-classification", model=folder, top_k=None)
    for batch_size in (1, 2, 64):  # sorting by length within a batch must not move a row
        rows = list(minibert.predict(folder, TEXTS, batch_size=batch_size))
        assert [row["text"] for row in rows] == TEXTS
        for row, answers in zip(rows, expected(TEXTS), strict=True):
            assert (row["label"], row["score"]) == (answers[0]["label"], pytest.approx(answers[0]["score"], abs=1e-5))
            assert row["probabilities"] == pytest.approx({one["label"]: one["score"] for one in answers}, abs=1e-5)


def test_pairs_are_read_in_order_and_from_the_columns_of_the_training(model):
    folder = model("ForSequenceClassification", ["no", "yes"], text_columns=["b", "a"])
    rows = [{"a": "red", "b": "green apples", "text": "pears"}]
    (trained,), (given,) = minibert.predict(folder, rows), minibert.predict(folder, rows, columns=["a", "b"])
    assert list(trained)[:2] == ["b", "a"] and list(given)[:2] == ["a", "b"] and trained["score"] != given["score"]
    (text,) = minibert.predict(model("ForSequenceClassification", ["no", "yes"], text_columns=["x"]), rows)
    assert next(iter(text)) == "text"  # trained on single texts, so the usual column of those


def test_several_labels_and_numbers(model):
    folder = model("ForSequenceClassification", ["a", "b", "c"], problem_type="multi_label_classification")
    for row in minibert.predict(folder, TEXTS, threshold=0.6):
        assert row["labels"] == [name for name, value in row["probabilities"].items() if value >= 0.6]
    everything = [value for row in minibert.predict(folder, TEXTS) for value in row["probabilities"].values()]
    assert min(everything) < 0.5 < max(everything)
    folder = model("ForSequenceClassification", ["stars"])
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    (row,) = minibert.predict(folder, ["red pears"])
    expected = opened(**tokenizer("red pears", return_tensors="pt")).logits.item()
    assert row == {"text": "red pears", "value": pytest.approx(expected)}


def test_evaluation_agrees_with_the_predictions(model, tagger):
    """Measured on its own predictions, every model is perfect."""
    several = model("ForSequenceClassification", ["a", "b", "c"], problem_type="multi_label_classification")
    rows = [{"text": row["text"], "label": row["labels"]} for row in minibert.predict(several, TEXTS)]
    figures = evaluate(several, Dataset.from_list(rows))["systems"]["model"]
    assert figures["micro_f1"] == figures["subset_accuracy"] == 1
    number = model("ForSequenceClassification", ["stars"])
    rows = [{"text": row["text"], "label": row["value"]} for row in minibert.predict(number, TEXTS)]
    figures = evaluate(number, Dataset.from_list(rows))["systems"]["model"]
    assert figures == {"spearman": pytest.approx(1), "pearson": pytest.approx(1), "mse": pytest.approx(0, abs=1e-8)}
    tokens = [{"tokens": text.split()} for text in TEXTS]
    rows = [{"tokens": row["tokens"], "tags": in_iob2(row["tags"])} for row in minibert.predict(tagger, tokens)]
    assert evaluate(tagger, Dataset.from_list(rows))["systems"]["model"]["f1"] == 1


# ------------------------------------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("family", ["MiniBert", "Bert"])
def test_entities_have_their_place_in_the_text(model, family):
    folder = model("ForTokenClassification", ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], family)
    texts = ["Ann Lee, of the U.S., is in Oslo.", "", "  the red\tpears "]
    entities = 0
    for text, row in zip(texts, minibert.predict(folder, texts), strict=True):
        assert row["words"] == [text[start:end] for start, end in module.split_words(text)]
        assert len(row["tags"]) == len(row["scores"]) == len(row["words"])
        for entity in row["entities"]:
            assert text[entity["start"] : entity["end"]] == entity["word"] and 0 < entity["score"] <= 1
            entities += 1
    assert entities
    words = row["words"]
    (same,) = minibert.predict(folder, [{"tokens": words}])
    assert same["tags"] == row["tags"] and same["scores"] == pytest.approx(row["scores"], abs=1e-5)
    assert [entity["word"] for entity in same["entities"]] == [
        " ".join(words[entity["start"] : entity["end"]]) for entity in same["entities"]
    ]


def test_every_word_of_a_long_text_has_a_tag(tagger):
    generator = random.Random(0)
    words = [generator.choice(["Ann", "Lee", "Oslo", "of", "\x7f"]) for _ in range(100)]
    (row,) = minibert.predict(tagger, [{"tokens": words}])
    assert len(row["tags"]) == 100
    (start,) = minibert.predict(tagger, [{"tokens": words[:22]}])  # the first window, less what the second knows better
    assert row["tags"][:19] == start["tags"][:19]


# -------------------------------------------------------------------------------------------------- questions and choices


def test_answers_and_choices(model):
    asked = [{"question": "who is in Oslo", "context": "Ann Lee is in Oslo", "id": "1"}] * 2
    rows = list(minibert.predict(model("ForQuestionAnswering"), asked))
    assert len(rows) == 2 and all(row["context"][row["start"] : row["end"]] == row["text"] for row in rows)
    asked = [{"question": "what is red", "choices": ["apples", "the garden"]}]
    (row,) = minibert.predict(model("ForMultipleChoice"), asked)
    assert row["text"] == asked[0]["choices"][row["choice"]] and sum(row["probabilities"]) == pytest.approx(1)


def test_choices_are_shown_with_the_columns_that_were_read_and_no_others(model):
    """A file to predict may be one that was trained on, with labels, dates and whatever else."""
    asked = [
        {"question": "what is red", "choices": ["apples", "the garden"], "label": 1, "when": datetime.now(), "value": b"x"}
    ]
    (row,) = minibert.predict(model("ForMultipleChoice"), asked)
    assert list(row) == ["question", "choices", "choice", "text", "probabilities"]
    assert module.in_a_line(row).startswith(f"{row['choice']}\t{row['text']}\twhat is red")


# ------------------------------------------------------------------------------------------------------------------ files


def rows_of(file, suffix):
    if suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    if suffix == ".jsonl":
        return read_rows(file)
    nested = ("probabilities", "tags", "words", "scores", "entities", "labels")
    with file.open(encoding="utf-8", newline="") as lines:
        return [{k: json.loads(v) if k in nested else v for k, v in row.items()} for row in csv.DictReader(lines)]


@pytest.mark.parametrize("suffix", module.OUTPUT_SUFFIXES)
def test_files_hold_what_the_function_gives(classifier, tagger, model, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2)
    several = model("ForSequenceClassification", ["a", "b"], problem_type="multi_label_classification")
    for number, folder in enumerate([classifier, tagger, several]):
        texts = ["", *TEXTS, "Ann, in Oslo"]  # the first row has nothing to learn the types of lists from
        expected, file = list(minibert.predict(folder, texts)), tmp_path / f"{number}{suffix}"
        assert module.write(minibert.predict(folder, texts), file) == 6
        found = rows_of(file, suffix)
        if suffix == ".csv":
            expected = [{k: str(v) if k == "score" else v for k, v in row.items()} for row in expected]
        assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}{suffix}" for number in range(3)]


@pytest.mark.parametrize("suffix", module.OUTPUT_SUFFIXES)
def test_an_interrupted_file_is_not_left_behind(tmp_path, suffix):
    def predictions():
        yield {"text": "red", "label": "good"}
        raise KeyboardInterrupt

    kept = tmp_path / f"kept{suffix}"
    kept.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        module.write(predictions(), kept, force=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_files_of_every_kind_are_read(classifier, command, tmp_path, suffix):
    file = tmp_path / f"texts{suffix}"
    data = Dataset.from_dict({"text": TEXTS, "label": [0] * len(TEXTS)})
    if suffix == ".txt":
        file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    else:
        {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[suffix](file)
    done = command(classifier, file, "--json")
    assert done.exit_code == 0, done.output
    expected = [json.dumps(row) for row in minibert.predict(classifier, TEXTS)]
    assert done.stdout.splitlines() == expected


def test_lines_of_standard_input_and_plain_output(classifier, tagger, command):
    done = command(classifier, "-", input="red apples\n\ngreen\n")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [line[2] for line in lines] == ["red apples", "", "green"]
    assert all(line[0] in ("bad", "fine", "good") and 0 < float(line[1]) <= 1 for line in lines)
    done = command(tagger, "-", input="Ann Lee is in Oslo.\n")
    assert done.exit_code == 0 and done.stdout.endswith("\tAnn Lee is in Oslo.\n")
    assert command(classifier, "-", input="").stdout == ""


def test_standard_input_in_other_encodings(classifier, command):
    done = command(classifier, "-", "--json", input="red apples\ngreen\n".encode("utf-8-sig"))
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["red apples", "green"]
    done = command(classifier, "-", input="red\ncaf\xe9\n".encode("latin-1"))
    assert done.exit_code == 2 and "Standard input is not UTF-8" in done.stderr and "iconv" in done.stderr


def test_out_is_replaced_only_when_asked(classifier, command, tmp_path):
    (tmp_path / "texts.txt").write_text("red\ngreen\n")
    assert "2 rows are in out.jsonl" in command(classifier, "texts.txt", "--out", "out.jsonl").output
    done = command(classifier, "texts.txt", "--out", "out.jsonl")
    assert done.exit_code == 2 and "out.jsonl exists already; choose another name, or replace it with --force" in done.output
    (tmp_path / "texts.txt").write_text("red\n")
    assert command(classifier, "texts.txt", "--out", "out.jsonl", "--force").exit_code == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_memory_does_not_grow_with_the_rows(classifier):
    """Rows are read as they are needed: after one prediction of very many, most were not touched."""
    read = []
    rows = ({"text": read.append(number) or "red"} for number in range(10**9))
    next(minibert.predict(classifier, rows, batch_size=2))
    assert len(read) <= 2 * 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{classifier}", "gone.txt"], "There is no file or folder gone.txt"),
        (["gone", "texts.txt"], "There is no model folder gone"),
        (
            ["{encoder}", "texts.txt"],
            "has no head that predicts labels, tags, answers or choices; train a head with a classify",
        ),
        (["{classifier}", "wide.csv"], "usual columns are premise + hypothesis"),
        (
            ["{classifier}", "wide.csv", "--column", "bodi"],
            "Column 'bodi' is not there in the data; the columns are id, body, title",
        ),
        (["{classifier}", "wide.csv", "--column", "id"], "Row 1 has 1 in column 'id', not a text"),
        (["{classifier}", "hole.jsonl"], "Row 2 has None in column 'text', not a text"),
        (["{tagger}", "hole.jsonl"], "Row 2 has None in column 'text', not a text or a list of words"),
        (
            ["{tagger}", "wide.csv", "--column", "body", "--column", "id"],
            "This model reads tokens or words or text or sentence, not body, id",
        ),
        (["{classifier}", "texts.txt", "--out", "out.xml"], "its name must end in one of .jsonl, .csv, .parquet"),
        (["{classifier}", "texts.txt", "--out", "no/out.csv"], "There is no folder no to write out.csv into"),
        (["{classifier}", "texts.txt", "--batch-size", "0"], "batch_size must be at least 1, got 0 (--batch-size)"),
        (["{classifier}", "texts.txt", "--threshold", "2"], "threshold must lie between 0 and 1, got 2.0 (--threshold)"),
        (
            ["{pairs}", "texts.txt"],
            "usual columns are a + b; premise + hypothesis; sentence1 + sentence2, found text; name it (--column)",
        ),
        (["{answerer}", "texts.txt"], "usual columns are question + context, found text; name it (--column)"),
        (["{chooser}", "texts.txt"], "it should be a list of texts, one per choice"),
    ],
)
def test_nonsense_is_one_sentence_and_status_2(model, classifier, tagger, command, tmp_path, arguments, message):
    (tmp_path / "texts.txt").write_text("red\n")
    (tmp_path / "wide.csv").write_text("id,body,title\n1,red,green\n")
    (tmp_path / "hole.jsonl").write_text('{"text": "red"}\n{"text": null}\n')
    kinds = {
        "{classifier}": lambda: classifier,
        "{tagger}": lambda: tagger,
        "{encoder}": lambda: model("Model"),
        "{pairs}": lambda: model("ForSequenceClassification", ["no", "yes"], text_columns=["a", "b"]),
        "{answerer}": lambda: model("ForQuestionAnswering"),
        "{chooser}": lambda: model("ForMultipleChoice"),
    }
    done = command(kinds.get(arguments[0], lambda: arguments[0])(), *arguments[1:])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("Error: ") == 1
    assert "Traceback" not in done.output and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "text", ["Mu\u0308ller n\u0e31mast\u0947 x\u200cy soft\u00adware", "\u0928\u092e\u0938\u094d\u0924\u0947 e\u0301"]
)
def test_a_word_keeps_its_marks_joiners_and_soft_hyphens(text):
    assert [text[start:end] for start, end in module.split_words(text)] == text.split()
