"""The distill stage: its losses by hand, a teacher that stays as it is, students that learn, and what is refused."""

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    PreTrainedTokenizerFast,
)

from helpers import read_rows, read_weights, write_recipe
from minibert import (
    MiniBertConfig,
    MiniBertForMaskedLM,
    MiniBertForSequenceClassification,
    MiniBertModel,
    train_word_level,
    train_wordpiece,
)
from minibert.inference.load import embedder, fingerprint, open_tokenizer
from minibert.train.arguments import OBJECTIVES, Recipe
from minibert.train.loop import StopRequest
from minibert.train.recipe import load_recipe
from minibert.train.run import _contexts, _function
from minibert.train.stage import StageContext
from minibert.train.stages.distill import embedding, pretraining, task
from minibert.train.stages.distill import student as student_module
from minibert.train.stages.distill import teacher as teacher_module
from minibert.train.stages.distill.vocabulary import keep_frequent_tokens

COLOURS = ("red", "green", "blue", "white", "black", "grey")
FRUITS = ("apple", "pear", "plum", "fig", "lime", "kiwi")
TEXTS = [f"{colour} {fruit}" + f" that is {colour}" * (at % 3) for colour in COLOURS for at, fruit in enumerate(FRUITS)]
SHAPE = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
RARELY = {"save_steps": 1000, "eval_steps": 1000}  # each takes longer than a step
STUDENT = {"preset": "bert-base", "num_hidden_layers": 1, **SHAPE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts, a tokenizer, and a teacher of four layers for each objective."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = train_word_level(TEXTS, model_max_length=24)
    tokenizer.save_pretrained(folder / "tokenizer")
    train_word_level(TEXTS[:6], model_max_length=24).save_pretrained(folder / "other-tokenizer")
    labels = [int(text.startswith(("red", "green", "blue"))) for text in TEXTS]
    Dataset.from_dict({"text": TEXTS, "label": labels}).to_parquet(folder / "labelled.parquet")
    names = np.array(["dull", "bright"])[labels].tolist()
    Dataset.from_dict({"text": TEXTS, "label": names}).to_parquet(folder / "named.parquet")
    Dataset.from_dict({"text": TEXTS}).to_parquet(folder / "texts.parquet")
    pairs = [(first, second, float(first.split()[0] == second.split()[0])) for first in TEXTS[:30:3] for second in TEXTS[::7]]
    columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*pairs))))
    Dataset.from_dict(columns).to_parquet(folder / "pairs.parquet")
    Dataset.from_dict({"query": TEXTS[:8], "answer": TEXTS[8:16]}).to_parquet(folder / "questions.parquet")
    torch.manual_seed(0)
    config = MiniBertConfig.preset(
        "bert-base", **SHAPE, num_hidden_layers=4, vocab_size=len(tokenizer), initializer_range=0.3, pad_token_id=0
    )
    classifier = MiniBertForSequenceClassification(config)
    classifier.config.id2label, classifier.config.label2id = {0: "0", 1: "1"}, {"0": 0, "1": 1}
    for kind, model in (("task", classifier), ("pretraining", MiniBertForMaskedLM(config))):
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    encoder = MiniBertModel(config)
    embedder(encoder, tokenizer, folder / "start", "mean", True).save_pretrained(str(folder / "embedding"))
    return folder


DATA = {"task": "labelled", "pretraining": "texts", "embedding": "texts"}


def arguments(folder, objective, **fields):
    values = {
        "kind": "distill",
        "objective": objective,
        "teacher": str(folder / objective),
        "data": str(folder / f"{DATA[objective]}.parquet"),
        "batch_size": 8,
        "learning_rate": 1e-2,
        "epochs": 2,
        "log_steps": 1,
        **({"cache_dir": str(folder / "cache"), "preprocessing_num_workers": 1} if objective == "pretraining" else {}),
        **fields,
    }
    return OBJECTIVES[objective].model_validate(values if "model" in fields else {"student_layers": 2, **values})


@pytest.fixture
def run(folder, tmp_path):
    """Run the stage as a recipe would; returns its metrics. The same ``name`` is the same output folder."""

    def run(objective, name="run", **fields):
        args = arguments(folder, objective, **fields)
        (context,) = _contexts(Recipe.model_construct(stages=[args], seed=3), tmp_path)
        context.output_dir = tmp_path / name
        context.output_dir.mkdir(exist_ok=True)
        return _function(args)(args, context)

    return run


def kept_outputs(folder):
    return np.concatenate([np.load(path) for path in sorted((folder / "checkpoints").glob("teacher-*.npy"))])


def log_of(folder):
    return [line for line in read_rows(folder / "log.jsonl") if "loss" in line]


# Losses


def test_soft_divergence_by_hand():
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    p, q = 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1))  # of the first class, with T = 2
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert float(student_module.soft_divergence(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-6)
    assert float(student_module.soft_divergence(student[:0], teacher[:0], 2.0)) == 0


def test_distances_by_hand():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert float(student_module.cosine_distance(student, teacher)) == pytest.approx(0.5)
    assert float(embedding.squared_distance(student, teacher)) == pytest.approx((9 + 1 + 1) / 2)
    # Cosines among the student's are 1 and 0, among the teacher's 1 and 1; the lengths of the vectors may differ.
    assert float(embedding.similarity_error(student, torch.tensor([[2.0], [1.0]]))) == pytest.approx(0.5)


def test_hidden_states_are_compared_at_the_same_depth_and_without_padding():
    def states(*values):
        return [torch.tensor([[[value], [99.0 * value]]]) for value in values]

    mask = torch.tensor([[1, 0]])
    # Embeddings 1 and 3, layer 1 of 2 (2.0) against layer 2 of 4 (5.0), layer 2 (4.0) against layer 4 (4.0).
    error = embedding.hidden_error(states(1.0, 2.0, 4.0), states(3.0, 0.0, 5.0, 0.0, 4.0), mask)
    assert float(error) == pytest.approx((4 + 9 + 0) / 3)


def test_the_loss_of_a_task_is_the_formula_of_distilbert(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "task").eval()
    args = arguments(folder, "task", alpha=0.3, temperature=4.0)
    ids, labels, said = torch.randint(5, 15, (6, 7)), torch.tensor([0, 1, 1, 0, 1, 0]), torch.randn(6, 2)
    logits = model(ids).logits
    p, log_q = F.softmax(said / 4, -1), F.log_softmax(logits / 4, -1)
    expected = 0.3 * 16 * (p * (p.log() - log_q)).sum() / 6 + 0.7 * F.cross_entropy(logits, labels)
    loss = task.TaskDistillation(args, model)(labels=labels, teacher_logits=said, input_ids=ids).loss
    torch.testing.assert_close(loss, expected)


def test_the_triple_loss_is_the_sum_of_its_parts(folder):
    student, teacher = (AutoModelForMaskedLM.from_pretrained(folder / "pretraining").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    ids = torch.randint(5, 15, (1, 9))
    labels = torch.full((1, 9), -100)
    labels[0, [2, 5]] = torch.tensor([7, 8])
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "max_length_q": 5}
    packed["cu_seq_lens_q"] = torch.tensor([0, 4, 9], dtype=torch.int32)
    # The two pieces do not see each other, so each alone gives the same states.
    parts = [
        [model.minibert(ids[:, at]).last_hidden_state[0] for at in (slice(0, 4), slice(4, 9))] for model in (student, teacher)
    ]
    ours, theirs = (torch.cat(part) for part in parts)
    logits, known = student.lm_head(ours[[2, 5]]), teacher.lm_head(theirs[[2, 5]])
    p = F.softmax(known / 2, -1)
    kl = 4 * (p * (p.log() - F.log_softmax(logits / 2, -1))).sum() / 2
    words = F.cross_entropy(logits, torch.tensor([7, 8]))
    cosine = 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()
    for weight in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (5.0, 2.0, 1.0)):
        names = ("kl_weight", "mlm_weight", "cosine_weight")
        args = arguments(folder, "pretraining", **dict(zip(names, weight)))
        loss = pretraining.MaskedLMDistillation(args, student.train(), teacher)(labels=labels, input_ids=ids, **packed).loss
        student.eval()
        loss = pretraining.MaskedLMDistillation(args, student, teacher)(labels=labels, input_ids=ids, **packed).loss
        expected = weight[0] * kl + weight[1] * words + weight[2] * cosine
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_loss_of_vectors_is_the_sum_of_its_parts(folder):
    student, teacher = (SentenceTransformer(str(folder / "embedding"), device="cpu") for _ in range(2))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    inputs = dict(student.tokenizer(TEXTS[:5], padding=True, return_tensors="pt"))
    ours, theirs = student(dict(inputs))["sentence_embedding"], teacher(dict(inputs))["sentence_embedding"]
    states = [model[0].auto_model(**inputs, output_hidden_states=True).hidden_states for model in (student, teacher)]
    fields = {
        "vector_weight": 2.0,
        "similarity_weight": 3.0,
        "hidden_weight": 0.5,
        "matryoshka_dims": [4],
        "vector_loss": "mse",
    }
    args = arguments(folder, "embedding", **fields)
    similarity = (embedding.similarity_error(ours, theirs) + embedding.similarity_error(ours[:, :4], theirs)) / 2
    hidden = embedding.hidden_error(*states, inputs["attention_mask"])
    expected = 2 * (ours - theirs).square().sum(-1).mean() + 3 * similarity + 0.5 * hidden
    loss = embedding.EmbeddingDistillation(args, student.eval(), teacher.eval())(**inputs).loss
    torch.testing.assert_close(loss, expected)
    assert hidden.item() > 1e-4


# The stage


@pytest.mark.parametrize("objective", ["task", "pretraining", "embedding"])
def test_a_student_learns_and_the_teacher_never_changes(run, folder, tmp_path, monkeypatch, objective):
    before, seen = read_weights(folder / objective), []
    freeze = teacher_module.freeze
    for module in (teacher_module, embedding):
        monkeypatch.setattr(module, "freeze", lambda teacher: seen.append(freeze(teacher)) or seen[-1])
    held_out = {"task": "labelled", "pretraining": "texts", "embedding": "pairs"}[objective]
    metrics = run(objective, epochs=12, dropout=0.0, eval_data=str(folder / f"{held_out}.parquet"), **RARELY)
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.7 * losses[0]
    (teacher,) = seen
    assert not teacher.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    state = teacher[0].auto_model.state_dict() if objective == "embedding" else teacher.state_dict()
    torch.testing.assert_close({name: state[name] for name in before}, before, atol=0, rtol=0)
    torch.testing.assert_close(read_weights(folder / objective), before, atol=0, rtol=0)

    # What is left is the student alone: nothing of the teacher or the loss, and its own number of parameters.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert metrics["parameters"] < metrics["teacher_parameters"]
    assert {name.partition(".")[0] for name in read_weights(tmp_path / "run")} <= {
        *("minibert", "classifier", "lm_head"),
        *("embeddings", "layers", "pooler"),
    }
    name = {"task": "accuracy", "pretraining": "loss", "embedding": "spearman"}[objective]
    assert f"eval_{name}" in metrics
    assert f"teacher_{name}" in metrics


@pytest.mark.slow
def test_a_student_comes_to_the_vectors_of_its_teacher(run, folder, tmp_path):
    teacher = SentenceTransformer(str(folder / "embedding"), device="cpu")
    expected = teacher.encode(TEXTS, convert_to_tensor=True)
    figures = {}
    for epochs in (1, 40):
        run("embedding", name=str(epochs), epochs=epochs, dropout=0.0, learning_rate=5e-3, **RARELY)
        student = SentenceTransformer(str(tmp_path / str(epochs)), device="cpu")
        vectors = student.encode(TEXTS, convert_to_tensor=True)
        figures[epochs] = float(F.cosine_similarity(vectors, expected).mean())
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    assert figures[40] > max(0.97, figures[1])
    assert [type(part).__name__ for part in student] == ["Transformer", "Pooling", "Normalize"]
    assert student.max_seq_length == 24
    assert not list((tmp_path / "40").glob(".*"))


def test_cached_vectors_give_the_gradients_of_computed_ones(folder):
    student, teacher = (SentenceTransformer(str(folder / "embedding"), device="cpu") for _ in range(2))
    student = student_module.from_layers(student[0].auto_model, arguments(folder, "embedding"), None)
    student = embedder(student, teacher.tokenizer, folder / "other-start", "mean", True, device="cpu")
    student.eval()  # no dropout
    inputs = dict(student.tokenizer(TEXTS[:6], padding=True, return_tensors="pt"))
    gradients, args = [], arguments(folder, "embedding")
    for vectors in (None, torch.from_numpy(teacher.encode(TEXTS[:6], batch_size=2))):
        student.zero_grad()
        embedding.EmbeddingDistillation(args, student, teacher.eval())(vectors, **inputs).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert all(value.abs().sum() > 0 for name, value in gradients[0].items() if "dense" in name)


def test_the_teacher_is_asked_once(run, folder, tmp_path, monkeypatch):
    """Its answers are computed in parts, survive an interruption, and are the rows' own."""
    monkeypatch.setattr(teacher_module, "ROWS_PER_FILE", 10)
    asked = []
    encode = SentenceTransformer.encode

    def counting(self, texts, *args, **kwargs):
        if len(texts) > 1:  # a model that is opened is tried with one text
            asked.append(len(texts))
            if len(asked) == 3:
                raise KeyboardInterrupt
        return encode(self, texts, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode", counting)
    with pytest.raises(KeyboardInterrupt):
        run("embedding")
    run("embedding")
    assert sum(asked) == len(set(TEXTS)) + 10  # the part that was interrupted is asked for again, and no other
    run("embedding", name="run")
    assert sum(asked) == len(set(TEXTS)) + 10
    teacher = SentenceTransformer(str(folder / "embedding"), device="cpu")
    expected = encode(teacher, list(dict.fromkeys(TEXTS)))
    np.testing.assert_allclose(kept_outputs(tmp_path / "run"), expected, atol=1e-6)


def test_kept_logits_are_those_of_the_rows(run, folder, tmp_path):
    run("task", max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "task").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "task")
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    np.testing.assert_allclose(kept_outputs(tmp_path / "run"), expected.numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["task", "pretraining", "embedding"])
def test_an_interrupted_run_resumes_bit_for_bit(run, folder, tmp_path, monkeypatch, objective):
    fields = {"max_steps": 6, "save_steps": 2, "hidden_weight": 1.0} if objective == "embedding" else {"max_steps": 6}
    run(objective, "whole", **fields)
    with monkeypatch.context() as patch:
        steps = iter(range(100))
        number = property(lambda self: 2 * (next(steps) >= 3), lambda self, value: None)  # a Ctrl-C in the fourth step
        patch.setattr(StopRequest, "number", number, raising=False)
        with pytest.raises(KeyboardInterrupt, match="Stopped at step 4 of 6"):
            run(objective, "broken", **fields)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    run(objective, "broken", **fields)
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["task", "pretraining", "embedding"])
def test_two_processes_share_the_work(start, run, folder, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(teacher_module, "ROWS_PER_FILE", 10)
    held_out = str(folder / ("pairs.parquet" if objective == "embedding" else f"{DATA[objective]}.parquet"))
    fields = {"max_steps": 3, "dropout": 0.0, "batch_size": 4, "eval_data": held_out}
    assert start.finish(start(2, lambda: run(objective, "two", **fields))) == [0, 0]
    assert start.finish(start(1, lambda: run(objective, "one", **fields | {"batch_size": 8}))) == [0]
    if objective != "pretraining":
        np.testing.assert_allclose(*(kept_outputs(tmp_path / name) for name in ("one", "two")), atol=1e-6)
    if objective == "task":  # its loss is a mean over rows; the others compare the rows of a process, or draw masks there
        one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
        for name in one.keys() - {
            f"minibert.layers.{layer}.attention.key.bias" for layer in (0, 1)
        }:  # gradient 0, but for noise
            torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def test_nobody_resumes_with_another_teacher(run, folder, tmp_path):
    shutil.copytree(folder / "task", tmp_path / "teacher")
    run("task", teacher=str(tmp_path / "teacher"), max_steps=2)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        model.classifier.weight.neg_()
    model.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="checkpoints of a different run; changed: data"):
        run("task", teacher=str(tmp_path / "teacher"), max_steps=2)


# Students


@pytest.mark.parametrize("layers", [2, [0, 3]])
def test_a_student_starts_from_the_teachers_layers(folder, layers):
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "task")
    student = student_module.from_layers(teacher, arguments(folder, "task", student_layers=layers, dropout=0.25), "teacher")
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name.replace("layers.1.", "layers.3.")], atol=0, rtol=0)
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_dropout_prob == 0.25
    assert teacher.config.num_hidden_layers == 4
    assert ours["classifier.weight"].data_ptr() != theirs["classifier.weight"].data_ptr()


def test_a_student_of_another_shape_with_words_of_its_own(run, folder, tmp_path):
    narrow = {**STUDENT, "hidden_size": 8, "intermediate_size": 16}
    other = str(folder / "other-tokenizer")
    for objective in ("task", "embedding"):
        run(objective, objective, model=narrow, tokenizer=other, max_steps=2)
        assert AutoTokenizer.from_pretrained(tmp_path / objective).vocab_size < 20
        assert read_weights(tmp_path / objective)[
            ("minibert." if objective == "task" else "") + "layers.0.attention.query.weight"
        ].shape == (8, 8)
    # The maps between the widths are trained along, and not kept.
    run("embedding", "maps", model=narrow, max_steps=2, hidden_weight=1.0)
    assert not [name for name in read_weights(tmp_path / "maps") if "map" in name]
    run("pretraining", "words", model=narrow, max_steps=2, cosine_weight=0.0)


def test_labels_are_compared_by_name_and_not_by_number(run, folder, tmp_path):
    """The teacher counts its classes the other way round."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "task")
    model.config.id2label, model.config.label2id = {0: "dull", 1: "bright"}, {"dull": 0, "bright": 1}
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(folder / "task").save_pretrained(tmp_path / "teacher")
    for name, fields in {"strings": {"data": "named"}, "named": {"data": "labelled", "labels": ["dull", "bright"]}}.items():
        data = str(folder / f"{fields.pop('data')}.parquet")
        run("task", name, teacher=str(tmp_path / "teacher"), data=data, eval_data=data, max_steps=2, **fields)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["id2label"] == {"0": "dull", "1": "bright"}
    torch.testing.assert_close(read_weights(tmp_path / "strings"), read_weights(tmp_path / "named"), atol=0, rtol=0)


def test_triplets_have_a_score_too(run, tmp_path):
    (tmp_path / "triplets.csv").write_text("anchor,positive,negative\na cat,the cat,a dog\nthe dog,a dog,a cat\n")
    metrics = run("embedding", max_steps=1, eval_data=str(tmp_path / "triplets.csv"))
    assert metrics["eval_score"] == metrics["eval_accuracy"]


def test_options_of_vectors(run, folder, tmp_path):
    eval_data = [str(folder / "pairs.parquet"), str(folder / "questions.parquet")]
    fields = {"matryoshka_dims": [8, 4], "pooling": "cls", "normalize": False, "vector_loss": "mse", "max_length": 6}
    metrics = run("embedding", max_steps=2, eval_data=eval_data, gradient_checkpointing=True, precision="bf16", **fields)
    assert metrics["eval_score"] == pytest.approx((metrics["eval_pairs_spearman"] + metrics["eval_questions_ndcg@10"]) / 2)
    assert {"eval_score_4d", "eval_pairs_spearman_8d", "teacher_score", "teacher_questions_mrr@10"} <= metrics.keys()
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert (len(student), student[1].pooling_mode, student.max_seq_length) == (2, "cls", 6)


def test_prompts_stay_with_the_student(run, folder, tmp_path):
    teacher = SentenceTransformer(
        str(folder / "embedding"), device="cpu", prompts={"fruit": "red apple "}, default_prompt_name="fruit"
    )
    teacher.save_pretrained(str(tmp_path / "teacher"))
    run("embedding", teacher=str(tmp_path / "teacher"), student_layers=4, dropout=0.0, max_steps=1)
    assert log_of(tmp_path / "run")[0]["loss"] < 1e-5  # the same model reads the same texts, the prompt before each
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert (student.prompts["fruit"], student.default_prompt_name) == ("red apple ", "fruit")


# The teacher's space


def settings_of(folder):
    return json.loads((folder / "config_sentence_transformers.json").read_text())


def kinds_of(model):
    return [type(module).__name__ for module in model]


def test_a_student_that_keeps_its_projection_gives_the_teachers_vectors(run, folder, tmp_path):
    fields = {"model": {**STUDENT, "hidden_size": 8, "intermediate_size": 16}, "vector_loss": "mse", "dropout": 0.0}
    run("embedding", epochs=12, keep_projection=True, **fields, **RARELY)
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.7 * losses[0]
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    teacher = SentenceTransformer(str(folder / "embedding"), device="cpu")
    assert kinds_of(student) == ["Transformer", "Pooling", "Dense", "Normalize"]
    ours, theirs = (model.encode(TEXTS, convert_to_tensor=True) for model in (student, teacher))
    # What was trained is what is saved: the loss at the end is that of the student's own vectors.
    error = embedding.squared_distance(ours, theirs) + embedding.similarity_error(ours, theirs)
    assert float(error) == pytest.approx(np.mean(losses[-4:]), rel=0.2)
    assert settings_of(tmp_path / "run")["teachers"] == [fingerprint(folder / "embedding")]
    run("embedding", "map", max_steps=1, **fields)  # a map that is thrown away leaves the student outside of this space
    assert "teachers" not in settings_of(tmp_path / "map")
    assert kinds_of(SentenceTransformer(str(tmp_path / "map"), device="cpu")) == ["Transformer", "Pooling", "Normalize"]


@pytest.mark.parametrize("ends", [["Normalize"], ["Dense", "Normalize"], ["Normalize", "Dense"], []])
def test_a_student_ends_as_its_teacher_does(run, folder, tmp_path, ends):
    teacher = SentenceTransformer(str(folder / "embedding"), device="cpu")
    modules = {"Normalize": teacher[2], "Dense": Dense(16, 12)}
    teacher = SentenceTransformer(modules=[teacher[0], teacher[1], *(modules[name] for name in ends)], device="cpu")
    teacher.save_pretrained(str(tmp_path / "teacher"))
    run("embedding", teacher=str(tmp_path / "teacher"), max_steps=1, keep_projection=True)
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    # Vectors of 16 numbers need no map; those of 12 do, and have length 1 only if the teacher's have.
    expected = ["Dense"] * ("Dense" in ends) + ["Normalize"] * (ends[-1:] == ["Normalize"])
    assert kinds_of(student) == ["Transformer", "Pooling", *expected]
    assert student.get_embedding_dimension() == teacher.get_embedding_dimension()


def test_a_student_records_whose_vectors_it_has(run, folder, tmp_path):
    shutil.copytree(folder / "embedding", tmp_path / "teacher")
    (tmp_path / "teacher" / "conversion.json").write_text(json.dumps({"fingerprint": "a" * 64}))
    run("embedding", teacher=str(tmp_path / "teacher"), max_steps=1)
    assert settings_of(tmp_path / "run")["teachers"] == [fingerprint(tmp_path / "teacher"), "a" * 64]
    run("embedding", "similar", max_steps=1, vector_weight=0.0)  # only the similarities among its vectors are the teacher's
    assert "teachers" not in settings_of(tmp_path / "similar")
    SentenceTransformer(str(tmp_path / "run"), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert "teachers" not in settings_of(tmp_path / "again")  # as after any further training


# A smaller vocabulary

WORDS = [*TEXTS, "greenish limes and greyish figs", "a kiwi, a fig: that is whiteness?", "blackish plums; 2 apples"]


@pytest.fixture(scope="module")
def spelling(folder, tmp_path_factory):
    """A teacher of the shape of the others whose tokens are pieces of words."""
    with warnings.catch_warnings(action="ignore"):
        words = train_wordpiece([*WORDS, "unseen words with jolly queues"], vocab_size=140, min_frequency=1).get_vocab()
    # As in BERT, the special tokens come after tokens that no text has.
    vocab = {"[unused0]": 0, **{token: number + 1 for token, number in words.items()}}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=24)
    config = MiniBertConfig.preset("bert-base", **SHAPE, num_hidden_layers=2, vocab_size=len(tokenizer), pad_token_id=1)
    place = tmp_path_factory.mktemp("spelling") / "teacher"
    embedder(MiniBertModel(config), tokenizer, folder / "start", "mean", True).save_pretrained(str(place))
    (place.parent / "words.txt").write_text("\n\n".join(WORDS))
    return place


def counts_of(tokenizer, texts):
    ids = np.concatenate([tokenizer(text)["input_ids"] for text in texts])
    return np.bincount(ids, minlength=len(tokenizer))


def with_processor(tokenizer, kind):
    """Give the tokenizer a post-processor that names its special tokens in another way."""
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[SEP]", "[CLS]")]
    if kind != "template":
        tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(*ends)
    if kind == "sequence":
        parts = [tokenizer.backend_tokenizer.post_processor]
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(parts)
    return tokenizer


@pytest.mark.parametrize("kind", ["template", "bert", "sequence"])
def test_the_most_frequent_tokens_stay_and_no_word_becomes_unknown(spelling, tmp_path, kind):
    tokenizer = with_processor(open_tokenizer(spelling), kind)
    tokenizer.add_tokens(["kiwi"])
    counts = counts_of(tokenizer, WORDS)
    tokenizer(WORDS, padding="max_length", truncation=True, max_length=9)  # leaves its settings behind
    smaller, kept = keep_frequent_tokens(tokenizer, counts, 62)
    assert len(smaller) == len(kept) == 62
    tokens = tokenizer.convert_ids_to_tokens(kept)
    assert smaller.convert_ids_to_tokens(range(62)) == tokens
    assert {*tokenizer.all_special_tokens, "kiwi"} <= {*tokens}
    dropped = [number for number in range(len(tokenizer)) if number not in kept]
    plain = [
        n for n, token in zip(kept, tokens) if len(token.removeprefix("##")) > 1 and token not in tokenizer.all_special_tokens
    ]
    assert max(counts[dropped]) <= min(counts[number] for number in plain if tokens[kept.index(number)] != "kiwi")
    assert max(counts[dropped]) > 0  # words are spelled with other tokens than before
    smaller.save_pretrained(tmp_path)
    reopened = open_tokenizer(tmp_path)
    for text in [*WORDS, "a greenapple"]:
        assert "[UNK]" not in smaller.tokenize(text)
        ids = smaller(text)["input_ids"]
        assert (ids[0], ids[-1]) == (smaller.cls_token_id, smaller.sep_token_id)
        assert smaller.decode(ids, skip_special_tokens=True) == tokenizer.decode(
            tokenizer(text)["input_ids"], skip_special_tokens=True
        )
        assert reopened(text)["input_ids"] == ids
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_a_token_whose_characters_the_teacher_lacks_stays():
    vocab = ["[UNK]", "a", "##a", "b", "##b", "aab", "##ab", "aßb", "baa"]  # nothing spells ß
    model = models.WordPiece({token: number for number, token in enumerate(vocab)}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="[UNK]")
    counts = np.array([0, 1, 1, 1, 1, 9, 8, 1, 1])
    smaller, kept = keep_frequent_tokens(tokenizer, counts, 7)
    assert [vocab[number] for number in kept] == ["[UNK]", "a", "##a", "b", "##b", "aab", "aßb"]
    assert [smaller.tokenize(word) for word in ("baab", "aßb")] == [["b", "##a", "##a", "##b"], ["aßb"]]


def test_a_student_with_fewer_tokens_has_the_teachers_embeddings(run, spelling, tmp_path):
    fields = {"teacher": str(spelling), "data": str(spelling.parent / "words.txt"), "student_vocab_size": 62}
    run("embedding", **fields, max_length=12, max_steps=1, learning_rate=1e-12, student_layers=[1])
    tokenizer, theirs = open_tokenizer(tmp_path / "run"), open_tokenizer(spelling)
    kept = theirs.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(62)))
    ours, before = read_weights(tmp_path / "run"), read_weights(spelling)
    word, position = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position"))
    torch.testing.assert_close(ours[word], before[word][kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[position], before[position][:12], atol=1e-6, rtol=0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"], config["pad_token_id"]) == (62, 12, 0)
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert student.max_seq_length == 12
    assert settings_of(tmp_path / "run")["teachers"] == [fingerprint(spelling)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"student_vocab_size": 20},
            r"student_vocab_size=20 is not possible: the teacher has 1\d\d tokens, of which .* are \d\d\.",
        ),
        ({"student_vocab_size": 2000}, "student_vocab_size=2000 is not possible"),
        ({"student_vocab_size": 62, "hidden_weight": 1.0}, "remove tokenizer and student_vocab_size to use the teacher's"),
        ({"student_vocab_size": 12, "teacher": None}, "WordPiece tokenizer, but this is WordLevel; remove this field"),
        ({"student_vocab_size": 62, "tokenizer": "x"}, "set student_layers, and remove tokenizer"),
        ({"student_vocab_size": 62, "model": STUDENT}, "set student_layers, and remove tokenizer"),
        ({"keep_projection": True, "vector_weight": 0.0}, "increase vector_weight, or remove one field"),
    ],
)
def test_refused_students(run, folder, spelling, fields, message):
    fields = {"teacher": str(spelling), "data": str(spelling.parent / "words.txt"), **fields}
    if fields["teacher"] is None:
        fields["teacher"] = str(folder / "embedding")
    with pytest.raises(ValueError, match=message):
        run("embedding", max_steps=1, **fields)


def distinct_texts(args, folder):
    return embedding.read_texts(args, StageContext(folder, 0))


def test_texts_are_distinct_lines_of_any_column(folder, tmp_path):
    rows = [{"a": "one\ntwo\n", "b": "two", "n": 1}, {"a": None, "b": " three ", "n": 2}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "more.txt").write_text("four\n\none\n")
    data = [str(tmp_path / "rows.parquet"), str(tmp_path / "more.txt")]
    assert distinct_texts(arguments(folder, "embedding", data=data), tmp_path) == ["one\ntwo", "two", "three", "four", "one"]
    lines = arguments(folder, "embedding", data=data, split_lines=True)
    assert distinct_texts(lines, tmp_path) == ["one", "two", "three", "four"]


# Refusals


@pytest.mark.parametrize(
    ("objective", "fields", "message"),
    [
        ("task", {"student_layers": 5}, "student_layers=5 is not possible: the teacher has 4 layers"),
        ("task", {"student_layers": [1, 4]}, "numbered from 0 to 3"),
        ("task", {"labels": ["yes", "no"]}, "has the classes 0, 1, but the data has yes, no.* set labels:"),
        ("task", {"data": "named"}, "has the classes 0, 1, but the data has bright, dull"),
        ("task", {"teacher": "pretraining"}, "pretraining is not a classifier: the weights classifier"),
        ("task", {"metric_for_best": "bleu"}, "Input should be 'accuracy', 'macro_f1' or 'loss'"),
        ("pretraining", {"teacher": "task"}, "task is not a model that predicts masked words: the weights lm_head"),
        ("pretraining", {"teacher": "bert"}, "is a bert model, which cannot read packed sequences. Convert the model with"),
        ("pretraining", {"tokenizer": "other-tokenizer"}, "have different tokenizers.* use objective: task or embedding"),
        (
            "pretraining",
            {"model": {**STUDENT, "hidden_size": 8}},
            "has hidden_size=8, but the teacher has 16.*cosine_weight: 0",
        ),
        ("pretraining", {"text_columns": ["text", "label"]}, "at most 1 item"),
        (
            "embedding",
            {"model": STUDENT, "tokenizer": "other-tokenizer", "hidden_weight": 1.0},
            "different tokenizers. Set hidden_weight: 0",
        ),
        ("embedding", {"teacher": "bert"}, "minibert hub convert .*bert FOLDER and set teacher: FOLDER, or set model:"),
        ("embedding", {"text_columns": ["title"]}, "Column 'title' is not there in .*; the columns are text"),
        ("embedding", {"data": "labelled", "text_columns": ["label"]}, "Column 'label' does not hold texts"),
        ("embedding", {"matryoshka_dims": [8, 16]}, "below the student's vector size 16"),
        ("embedding", {"eval_data": "pairs", "metric_for_best": "mrr"}, "metric_for_best='mrr' is not measured.*spearman"),
        ("embedding", {"eval_data": "texts"}, "which is none of: retrieval: query, answer"),
    ],
)
def test_refusals(run, folder, objective, fields, message):
    fields = dict(fields)
    if fields.get("teacher") == "bert" and not (folder / "bert").exists():
        shape = {**SHAPE, "num_hidden_layers": 2, "vocab_size": 24}
        BertModel(BertConfig(**shape)).save_pretrained(folder / "bert")
        AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "bert")
    for name, value in fields.items():
        if name in ("teacher", "tokenizer"):
            fields[name] = str(folder / value)
        elif name in ("data", "eval_data"):
            fields[name] = str(folder / f"{value}.parquet")
    with pytest.raises(ValueError, match=message):
        run(objective, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": STUDENT, "student_layers": 2}, "model and student_layers are both set"),
        ({"alpha": 0.1}, r"stage 1 \(distill\): there is no field alpha; the fields are .*hidden_weight"),
        ({"objective": "task", "sample_by": "line"}, "there is no field sample_by; .* temperature"),
        ({"vector_weight": 0.0, "similarity_weight": 0.0}, "are all 0, so nothing is learned"),
        ({"objective": "words"}, "objective='words' is unknown; use one of task, pretraining, embedding"),
        ({"objective": None}, "objective=None is unknown; use one of task"),
    ],
)
def test_contradicting_fields(tmp_path, fields, message):
    stage = {"kind": "distill", "objective": "embedding", "teacher": "x", "data": "y", "student_layers": 2, **fields}
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path, stage))


# Recipes


def test_a_recipe_resolves_teacher_student_and_tokenizer(tmp_path):
    def context(**fields):
        earlier = [{"kind": "classify", "name": name, "data": "x", "model": "start"} for name in ("big", "before")]
        stage = {"kind": "distill", "objective": "task", "data": "x", "teacher": "big", **fields}
        return _contexts(Recipe.model_validate({"name": "a", "seed": 1, "stages": [*earlier, stage]}), tmp_path)[-1]

    folder, big, before = tmp_path / "3-distill", str(tmp_path / "1-big"), str(tmp_path / "2-before")
    assert context(student_layers=2) == StageContext(folder, 1, big, big, big)
    assert context(model=STUDENT) == StageContext(folder, 1, None, big, big)
    assert context(model=STUDENT, tokenizer="words").tokenizer == "words"
    assert context() == StageContext(folder, 1, before, before, big)
    stage = {"kind": "distill", "objective": "task", "data": "x", "teacher": "big"}
    assert Recipe.model_validate({"name": "a", "stages": [{**stage, "student_layers": 3}]})
    assert Recipe.model_validate({"name": "a", "stages": [{**stage, "model": STUDENT}]})
    with pytest.raises(ValueError, match="has no model; .* or student_layers: 3"):
        Recipe.model_validate({"name": "a", "stages": [stage]})


@pytest.mark.parametrize(("name", "objective", "layers"), [("distil", "task", 6), ("distil_minilm", "embedding", 3)])
def test_bundled_recipes(name, objective, layers):
    stage = next(stage for stage in load_recipe(name).stages if stage.kind == "distill")
    assert (stage.objective, stage.student_layers) == (objective, layers)
