"""The choose stage and the choices of its models: columns and labels in every form, and the input that is refused."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
)

from helpers import read_rows, write_recipe, write_rows
from minibert import (
    MiniBertConfig,
    MiniBertForMultipleChoice,
    MiniBertForSequenceClassification,
    train_word_level,
)
from minibert.data.questions import choices_of, find_choice_columns
from minibert.inference.answers import choose_rows
from minibert.train.arguments import ChooseStage
from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe
from minibert.train.stage import StageContext
from minibert.train.stages import choose as stage

ANIMALS, THINGS = ("cat", "dog", "owl", "cow"), ("cup", "pen", "key", "box")
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SHAPE |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRESET = {"preset": "modern-6x384", "num_hidden_layers": 1, **SHAPE}


def questions(count=60, choices=3):
    """One of the choices is the kind of word that is asked for."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        label, animal = int(generator.integers(choices)), int(generator.integers(2))
        right, wrong = (ANIMALS, THINGS) if animal else (THINGS, ANIMALS)
        words = [str(generator.choice(wrong)) for _ in range(choices)]
        words[label] = str(generator.choice(right))
        yield {
            "question": f"which is {'an animal' if animal else 'a thing'} ?",
            "choices": [" ".join(["the", *["very"] * int(generator.integers(3)), word]) for word in words],
            "label": label,
        }


def swag(row):
    """The same row as SWAG lays it out."""
    endings = {f"ending{number}": choice for number, choice in enumerate(row["choices"])}
    return {"sent1": row["question"], "sent2": "it is", **endings, "label": row["label"]}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_level([" ".join(["which it is an animal a thing ? the very", *ANIMALS, *THINGS])]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)


@pytest.fixture
def choose(tmp_path, tokenizer_folder):
    """Run the stage on rows, written to files."""

    def run(rows, eval_rows=None, model=None, **changes):
        files = {"data": write_rows(tmp_path / "data.jsonl", rows)}
        if eval_rows is not None:
            files["eval_data"] = write_rows(tmp_path / "eval.jsonl", eval_rows)
        values = {"kind": "choose", **files, "batch_size": 8, "learning_rate": 5e-3, "log_steps": 5, "max_length": 24}
        values |= {"model": model or PRESET, **changes}
        context = StageContext(tmp_path / "out", seed=1, model=model, tokenizer=tokenizer_folder)
        return stage.choose(ChooseStage.model_validate(values), context)

    return run


def test_learns_through_a_recipe_and_keeps_its_best_checkpoint(tmp_path, tokenizer_folder):
    rows = [swag(row) for row in questions()]
    values = {"kind": "choose", "model": PRESET, "tokenizer": tokenizer_folder, "data": write_rows(tmp_path / "r.jsonl", rows)}
    values |= {"eval_data": values["data"], "epochs": 20, "batch_size": 10, "learning_rate": 5e-3, "eval_steps": 6}
    run = run_recipe(load_recipe(write_recipe(tmp_path, values)), output_dir=tmp_path / "run")
    metrics = read_metrics(run)["choose"]
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_loss"] < 0.4
    lines = read_rows(run / "1-choose/log.jsonl")
    figures = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert metrics["best_step"] == min(step for step, value in figures.items() if value == 1.0) < metrics["steps"]

    model = AutoModelForMultipleChoice.from_pretrained(run / "1-choose", trust_remote_code=False)
    opened = AutoTokenizer.from_pretrained(run / "1-choose", trust_remote_code=False)
    results = list(choose_rows(model, opened, rows, batch_size=4))
    for row, plain, result in zip(rows, questions(), results, strict=True):
        assert result["choice"] == row["label"] and result["text"] == plain["choices"][row["label"]]
        assert sum(result["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_columns_of_the_training_are_those_of_the_model(choose, tmp_path):
    rows = [{"ask": row["question"], "these": row["choices"], "gold": "ABC"[row["label"]]} for row in questions()]
    choose(rows, text_columns=["ask"], choice_columns=["these"], label_column="gold", epochs=10)
    model = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out", trust_remote_code=False)
    opened = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert ["ABC"[result["choice"]] for result in choose_rows(model, opened, rows)] == [row["gold"] for row in rows]
    usual = list(choose_rows(model, opened, questions()))  # these columns are not the model's, but the usual ones
    assert [result["choice"] for result in usual] == [row["label"] for row in questions()]


def test_rows_of_different_numbers_of_choices_are_predicted_and_choices_do_not_influence_each_other(tokenizer):
    torch.manual_seed(0)
    model = MiniBertForMultipleChoice(MiniBertConfig.preset("bert-base", **{**SHAPE, "vocab_size": 40, "num_hidden_layers": 1}))
    rows = [
        {"question": "which is a thing ?", "choices": ["the cup", "the very very cat", "box"][:count]} for count in (3, 1, 2)
    ]
    results = list(choose_rows(model, tokenizer, rows, batch_size=2))
    assert [len(result["probabilities"]) for result in results] == [3, 1, 2]
    for row, result in zip(rows, results, strict=True):
        batch = tokenizer([row["question"]] * len(row["choices"]), row["choices"], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{name: tensor[None] for name, tensor in batch.items()}).logits
        torch.testing.assert_close(torch.tensor(result["probabilities"]), logits.softmax(-1)[0], atol=1e-5, rtol=1e-5)


def test_batches_hold_every_choice_of_their_rows(tokenizer):
    rows = list(choices_of(questions(5), (["question"], ["choices"])))
    labels = np.array([row["label"] for row in questions(5)])
    made = stage.ChoiceRows(rows, labels, tokenizer, 24)
    assert len(made) == 5
    batch = made.collate(np.array([3, 1]))
    pairs = [pair for number in (3, 1) for pair in rows[number].pairs]
    expected = tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name].view(2, 3, -1)) for name in expected)
    assert batch["labels"].tolist() == labels[[3, 1]].tolist()
    other = stage.ChoiceRows(rows, (labels + 1) % 3, tokenizer, 24)
    assert made.fingerprint != other.fingerprint


@pytest.mark.parametrize("ours", [True, False], ids=["minibert", "bert"])
def test_starts_from_a_classifier_and_from_a_chooser(choose, tmp_path, tokenizer, ours):
    kind = {"num_labels": 3, "problem_type": "single_label_classification"}
    fields = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **SHAPE, **kind}
    config = MiniBertConfig.preset("bert-base", **fields) if ours else BertConfig(**fields)
    torch.manual_seed(0)
    classifier = (MiniBertForSequenceClassification if ours else BertForSequenceClassification)(config)
    classifier.save_pretrained(tmp_path / "start")
    choose(list(questions()), model=str(tmp_path / "start"), max_steps=1, learning_rate=1e-12)
    first = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(first) is (MiniBertForMultipleChoice if ours else BertForMultipleChoice)
    torch.testing.assert_close(first.get_input_embeddings().weight, classifier.get_input_embeddings().weight)
    (tmp_path / "out").rename(tmp_path / "first")
    choose(list(questions()), model=str(tmp_path / "first"), max_steps=1, learning_rate=1e-12)
    second = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out", trust_remote_code=False)
    torch.testing.assert_close(first.classifier.weight, second.classifier.weight)  # the same head goes on


@pytest.mark.parametrize(
    ("found", "texts", "choices"),
    [
        (["context", "question", "choices"], ("context", "question"), ("choices",)),
        (["ctx", "endings", "label"], ("ctx",), ("endings",)),
        (["question", "choice2", "choice1", "label"], ("question",), ("choice1", "choice2")),
        (
            ["sent1", "sent2", *(f"ending{number}" for number in (10, 9, 1))],
            ("sent1", "sent2"),
            ("ending1", "ending9", "ending10"),
        ),
    ],
)
def test_usual_columns(found, texts, choices):
    assert find_choice_columns(found) == (list(texts), list(choices))


def test_the_second_text_begins_every_choice():
    (row,) = choices_of([swag(next(iter(questions(1))))], find_choice_columns(["sent1", "sent2", "ending0", "ending1"]))
    assert [second.split()[:3] for _, second in row.pairs] == [["it", "is", "the"]] * 2


GOOD = {"question": "which is a thing ?", "choices": ["the cup", "the cat"], "label": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["the cup"]}, r"Row 2 has 1 choices, but earlier rows have 2. Training needs equal numbers"),
        ({"choices": []}, r"Row 2 has choices=\[\]; it should be a list of texts"),
        ({"choices": ["a", None]}, r"Row 2 has choices=\['a', None\]; it should be a list of texts"),
        ({"label": 2}, r"Row 2 of .* has label=2; with 2 choices, it should be 0 to 1, or A to B"),
        ({"label": -1}, r"Row 2 of .* has label=-1"),
        ({"label": None}, r"no value in column 'label' of row 2"),
        ({"question": None}, r"no value in column 'question' of row 2"),
    ],
)
def test_refusals_name_the_row(choose, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        choose([GOOD, {**GOOD, **row}])
    assert not (tmp_path / "out/model.safetensors").exists()


def test_refuses_labels_and_columns_that_are_not_there(choose, tokenizer):
    for label in ("C", "first", "1.5", ""):
        with pytest.raises(ValueError, match=r"Row 1 of .* has label=.*; with 2 choices, it should be 0 to 1, or A to B"):
            choose([{**GOOD, "label": label}])
    with pytest.raises(ValueError, match=r"Row 1 has only one choice"):
        choose([{**GOOD, "choices": ["the cup"]}])
    with pytest.raises(ValueError, match=r"usual columns are context \+ question; .*found text, choices, label; name it"):
        choose([{"text": "which ?", "choices": ["a", "b"], "label": 0}])
    with pytest.raises(ValueError, match=r"usual columns are choices; endings; .*; name it \(choice_columns\)"):
        choose([{"question": "which ?", "label": 0}])
    with pytest.raises(ValueError, match=r"Column 'these' is not there in the data; the columns are question, choices, label"):
        choose([GOOD], choice_columns=["these"])
    with pytest.raises(ValueError, match=r"Column 'choices' is not there in the data; the columns are question, label"):
        choose([GOOD], [{"question": "which ?", "label": 0}])
    with pytest.raises(ValueError, match=r"Row 2 of .*eval.jsonl has label=5"):
        choose([GOOD], [GOOD, {**GOOD, "label": 5}])
    with pytest.raises(ValueError, match=r"Row 1 has None in column 'question', not a text"):
        model = MiniBertForMultipleChoice(MiniBertConfig.preset("nano-1x3", vocab_size=40))
        list(choose_rows(model, tokenizer, [{**GOOD, "question": None}]))
