"""The embed stage: it learns, it resumes bit for bit, and what it leaves is a model the ecosystem opens."""

import contextlib
import itertools
import json
import logging
import pickle
import shutil
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import AutoTokenizer

from helpers import edit_json, read_rows, read_weights, run_python, write_recipe
from minibert import MiniBertConfig, MiniBertModel, train_word_level
from minibert.evaluation.evaluate import SIMILARITY_COLUMNS
from minibert.inference.load import embedder
from minibert.modeling_minibert import MiniBertLayer
from minibert.train import sentence_trainer
from minibert.train.arguments import EmbedStage
from minibert.train.recipe import load_recipe
from minibert.train.run import run_recipe
from minibert.train.stage import StageContext
from minibert.train.stages import embed as embed_module
from minibert.train.stages.embed import embed, training_data

COLOURS = ("red", "green", "blue", "white", "black", "grey")
FRUITS = ("apple", "pear", "plum", "fig", "lime", "kiwi")
PAIRS = [(f"{colour} {fruit}", f"{fruit} that is {colour}") for colour, fruit in itertools.product(COLOURS, FRUITS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    rows = [f"{query},{answer},{query} stone" for query, answer in PAIRS]
    (folder / "pairs.csv").write_text("\n".join(["query,answer,stone", *rows]), encoding="utf-8")
    others = PAIRS[7:] + PAIRS[:7]  # of another colour and fruit
    scored = [f"{query},{answer},1.0" for query, answer in PAIRS]
    scored += [f"{query},{other},0.{len(other) % 4}" for (query, _), (_, other) in zip(PAIRS, others, strict=True)]
    (folder / "scored.csv").write_text("\n".join(["sentence1,sentence2,score", *scored]), encoding="utf-8")
    (folder / "two.csv").write_text("\n".join(["query,answer", *(f"{query},{answer}" for query, answer in PAIRS)]))
    triplets = [f"{query},{answer},{other},0.5" for (query, answer), (_, other) in zip(PAIRS, others, strict=True)]
    (folder / "triplets.csv").write_text("\n".join(["query,positive,negative,score", *triplets]), encoding="utf-8")
    train_word_level([text for pair in PAIRS for text in pair] + ["plain stone"], vocab_size=21).save_pretrained(
        folder / "tokenizer"
    )
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Run the stage; returns its metrics. The same ``name`` is the same output folder."""
    columns = {"anchor_column": "query", "positive_column": "answer"}

    def run(name="run", **fields):
        stage = {
            "kind": "embed",
            "data": str(folder / "pairs.csv"),
            **(columns if "eval_data" in fields or not fields.get("make_pairs") else {}),
            "model": {"preset": "search-8x768", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
            | {"intermediate_size": 16, "max_position_embeddings": 12},
            "batch_size": 8,
            "learning_rate": 1e-2,
            "epochs": 2,
            "log_steps": 1,
            "save_steps": 2,
            **fields,
        }
        models = {field: stage[field] for field in ("model", "guide", "teacher") if isinstance(stage.get(field), str)}
        context = StageContext(tmp_path / name, seed=3, tokenizer=str(folder / "tokenizer"), **models)
        context.output_dir.mkdir(exist_ok=True)
        return embed(EmbedStage.model_validate(stage), context)

    return run


def test_it_learns_and_leaves_a_model(run, folder, tmp_path):
    metrics = run(epochs=8, eval_data=str(folder / "pairs.csv"), max_length=9, save_steps=20, eval_steps=20)
    assert metrics["steps"] == 40
    assert metrics["eval_mrr@10"] > 0.5  # by chance it is 0.08
    lines = [line for line in read_rows(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert [line["step"] for line in lines] == list(range(1, 41))
    model = SentenceTransformer(str(tmp_path / "run"))
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model.max_seq_length == 9
    vectors = model.encode(["red apple", "blue plum"], convert_to_tensor=True)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    assert not list((tmp_path / "run").glob(".*"))


def test_one_progress_bar_is_shown(run, monkeypatch):
    bars = []
    monkeypatch.setattr(sentence_trainer.ProgressCallback, "on_train_begin", lambda self, *_, **__: bars.append(type(self)))
    with contextlib.suppress(Exception):
        run(epochs=1)
    assert bars == [sentence_trainer._StageCallback]


@pytest.mark.slow
def test_the_model_opens_in_a_process_without_the_package(run, tmp_path):
    run(max_steps=1)
    script = (
        "import sys; sys.modules['minibert'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tmp_path / 'run')!r}, trust_remote_code=True)\n"
        "print(model.encode(['red apple', 'blue plum']).tolist())"
    )
    vectors = SentenceTransformer(str(tmp_path / "run"), device="cpu").encode(
        ["red apple", "blue plum"], convert_to_tensor=True
    )
    torch.testing.assert_close(torch.tensor(json.loads(run_python(script))), vectors, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (4, {}),  # inside an epoch
        (6, {}),  # at the end of one
        (4, {"one_source_per_batch": True, "hard_negatives": 1, "max_steps": 12, "batch_size": 2}),
        (4, {"loss": "cosent", "matryoshka_dims": [16, 4], "max_steps": 12}),
        (4, {"loss": "cached_gist", "mini_batch_size": 3, "max_steps": 12}),
        (4, {"data": [{"path": "scored", "loss": "cosent"}, {"path": "two", "loss": "gist"}], "max_steps": 12}),
        (8, {"batch_sampler": "batch_sampler", "schedule": "wsd", "precision": "bf16", "log_steps": 5}),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(run, folder, fields_of, guide, tmp_path, monkeypatch, step, more):
    fields = {"eval_data": str(folder / "pairs.csv"), "gradient_accumulation_steps": 2, "epochs": 4, **more}
    monkeypatch.setattr(embed_module, "_MARGIN", None)  # before training all texts are alike
    if "one_source_per_batch" in more:
        fields["data"] = [str(folder / "pairs.csv")] * 2
    if more.get("loss") == "cosent":
        fields |= fields_of("cosent")
    if "data" in more:
        fields["data"] = [{**source, "path": str(folder / f"{source['path']}.csv")} for source in more["data"]]
        fields |= {"anchor_column": None, "positive_column": None, "eval_data": str(folder / "two.csv")}
    if "gist" in str(more):
        fields["guide"] = guide
    whole = run("whole", **fields)
    original = sentence_trainer._StageCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == step:
            self.stop.number = signal.SIGINT
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(sentence_trainer._StageCallback, "on_step_end", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"Stopped at step {step} of 12, after saving a checkpoint"):
        run("broken", **fields)
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    monkeypatch.setattr(sentence_trainer._StageCallback, "on_step_end", original)
    resumed = run("broken", **fields)
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in read_rows(tmp_path / "broken" / "log.jsonl")]
    assert timeless == [
        {k: v for k, v in line.items() if k != "seconds"} for line in read_rows(tmp_path / "whole" / "log.jsonl")
    ]
    assert {k: v for k, v in resumed.items() if k != "train_seconds"} == {
        k: v for k, v in whole.items() if k != "train_seconds"
    }


def test_a_run_killed_while_it_saves_its_result_trains_no_further(run, tmp_path, monkeypatch):
    """The only checkpoint that is kept is of the last step, and names of dead processes disappear."""
    whole = run("whole", save_total_limit=1, warmup_ratio=1.0, trackers=["tensorboard"])
    assert [line["learning_rate"] for line in read_rows(tmp_path / "whole" / "log.jsonl")] == pytest.approx(
        [1e-2 * step / 10 for step in range(1, 11)]
    )
    assert list((tmp_path / "whole").rglob("events.out.tfevents*"))
    monkeypatch.setattr(sentence_trainer.checkpoint, "move_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("broken", save_total_limit=1, warmup_ratio=1.0)
    monkeypatch.undo()
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000010"]
    (checkpoints / ".final.0123abcd.part").mkdir()
    resumed = run("broken", save_total_limit=1, warmup_ratio=1.0)
    assert {**resumed, "train_seconds": 0} == {**whole, "train_seconds": 0}
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)
    assert not (checkpoints / ".final.0123abcd.part").exists()


class _Trap:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_checkpoints_hold_no_pickles_and_none_is_opened(run, tmp_path, monkeypatch):
    whole = run("whole", epochs=4)
    original = sentence_trainer._StageCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 7:
            self.stop.number = signal.SIGTERM
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(sentence_trainer._StageCallback, "on_step_end", interrupt)
    with pytest.raises(SystemExit):
        run("broken", epochs=4)
    monkeypatch.undo()
    newest = tmp_path / "broken" / "checkpoints" / "step-00000007"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json", "manifest.json"}
    assert {path.name for path in newest.iterdir()} == names
    for path in newest.iterdir():
        assert not path.read_bytes().startswith((b"PK", b"\x80"))
    marker = tmp_path / "opened"
    for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth") + (
        "training_args.bin",
        "pytorch_model.bin",
    ):
        torch.save(_Trap(marker), newest / name)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / "optimizer.pt", weights_only=True)
    monkeypatch.setattr(torch, "load", lambda *_, **__: marker.touch())
    resumed = run("broken", epochs=4)
    assert not marker.exists()
    assert {**resumed, "train_seconds": 0} == {**whole, "train_seconds": 0}
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)


@pytest.mark.parametrize("rows", ["same,{0}", "{0},same"])
def test_batches_that_teach_nothing_are_refused(run, tmp_path, rows):
    (tmp_path / "same.csv").write_text("query,answer\n" + "".join(rows.format(f"text {at}") + "\n" for at in range(64)))
    with pytest.raises(ValueError, match=r"An epoch would read only 8 of 64 rows, in batches of 1\.0 rows on average"):
        run(data=str(tmp_path / "same.csv"))
    with pytest.raises(ValueError, match=r"in batches of 1\.0 rows"):
        run("one", batch_size=1)
    metrics = run("plain", max_steps=1)
    assert (metrics["rows_per_epoch"], metrics["rows_left_out"], metrics["mean_batch_size"]) == (36, 0, 7.2)


COLUMNS = {
    "answer,question": ({}, ["question", "answer"]),
    "query,answer": ({}, ["query", "answer"]),
    "title,body": ({}, "one has a usual name of queries .query, .*; its columns of strings are title, body"),
    "query,question": ({}, "its columns of strings are query, question"),
    "query,answer,notes": ({}, "its columns of strings are query, answer, notes"),
    "query": ({}, "its columns of strings are query"),
    "title,body,notes": ({"anchor_column": "notes", "positive_column": "title"}, ["notes", "title"]),
    "title,text": ({"anchor_column": "text"}, ["text", "title"]),
    "question,answer": ({"anchor_column": "nope"}, "has no column 'nope'; it has question, answer"),
    "passage,anchor": ({"positive_column": "passage"}, ["anchor", "passage"]),
    "query,answer,score": ({"anchor_column": "query", "positive_column": "answer"}, "has a column 'score', so not all of"),
    "premise,hypothesis,label": ({}, "has a column 'label', so not all of.* choose loss: cosent or angle or cosine_mse."),
}
LOSS_COLUMNS = [
    ("cosent", "sentence1,sentence2,score", {}, ["sentence1", "sentence2", "score"]),
    ("angle", "body,title,label", {}, ["body", "title", "label"]),
    (
        "cosine_mse",
        "answer,query,rank",
        {"score_column": "rank"},
        ["query", "answer", "rank"],
    ),
    (
        "cosent",
        "query,answer",
        {},
        "has no score for each pair .*which loss: cosent needs. .* query, answer; .*loss: mnrl or cached",
    ),
    ("cosent", "query,answer,rank", {"score_column": "nope"}, "has no column 'nope'; it has query, answer, rank"),
    ("triplet", "query,positive,negative", {}, ["query", "positive", "negative"]),
    (
        "triplet",
        "anchor,text,wrong",
        {"negative_column": "wrong"},
        ["anchor", "text", "wrong"],
    ),
    ("triplet", "query,answer,score", {}, "has no negative for each pair .set negative_column:.*choose loss: cosent or angle"),
    (
        "margin_mse",
        "query,positive,negative",
        {},
        "has no score for each pair .set score_column:.* choose loss: triplet.",
    ),
    ("margin_mse", "query,answer", {}, "has no negative for each pair .* and has no score for each"),
    ("margin_mse", "anchor,text", {"teacher": "x", "hard_negatives": 1}, ["anchor", "text"]),
]


@pytest.mark.parametrize(("loss", "header", "fields", "expected"), LOSS_COLUMNS)
def test_the_loss_chooses_the_columns(loss, header, fields, expected):
    numbers = ("score", "label", "rank")
    data = Dataset.from_dict({name: [1, 0] if name in numbers else [f"{name} a", f"{name} b"] for name in header.split(",")})
    stage = EmbedStage(kind="embed", data="pairs.csv", loss=loss, **fields)
    needs = stage.needs_of(stage.data[0])
    if isinstance(expected, list):
        found = embed_module.loss_columns(stage, loss, data, stage.data, needs)
        uses = SIMILARITY_COLUMNS if loss in ("cosent", "angle", "cosine_mse") else ("anchor", "positive", "negative")
        assert found == dict(zip(uses, expected, strict=False))
    else:
        with pytest.raises(ValueError, match=expected):
            embed_module.loss_columns(stage, loss, data, stage.data, needs)


@pytest.mark.parametrize(("header", "fields", "expected"), [(header, *rest) for header, rest in COLUMNS.items()])
def test_columns_are_not_guessed(header, fields, expected):
    names = header.split(",")
    values = {name: [1, 0] if name in ("score", "label") else [f"{name} a", f"{name} b"] for name in names}
    data, stage = Dataset.from_dict(values), EmbedStage(kind="embed", data="pairs.csv", **fields)
    if isinstance(expected, list):
        assert list(embed_module.loss_columns(stage, "mnrl", data, stage.data, set()).values()) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            list(embed_module.loss_columns(stage, "mnrl", data, stage.data, set()).values())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, tmp_path, caplog):
    run("whole")
    run("broken")
    newest = tmp_path / "broken" / "checkpoints" / "step-00000010"
    (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="minibert"):
        run("broken")
    assert f"{newest} is damaged: optimizer.safetensors" in caplog.text
    assert "Resuming from" in caplog.text
    assert "step-00000008" in caplog.text
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)


def test_the_best_weights_are_kept(run, folder, tmp_path, monkeypatch):
    measured = iter([0.2, 0.9, 0.3, 0.1])

    def retrieval(*args, **kwargs):
        return {"systems": {"model": {"recall@1": 0.0, "mrr@10": next(measured)}}}

    monkeypatch.setattr(embed_module, "measure_model", retrieval)
    metrics = run(epochs=4, eval_data=str(folder / "pairs.csv"), save_steps=5, save_total_limit=4)
    assert (metrics["eval_mrr@10"], metrics["best_step"]) == (0.9, 10)
    kept = read_weights(tmp_path / "run" / "checkpoints" / "step-00000010")
    final = {f"0.model.{name}": tensor for name, tensor in read_weights(tmp_path / "run").items()}
    torch.testing.assert_close(final, kept, atol=0, rtol=0)


@pytest.mark.parametrize("eval_steps", [None, 5])
def test_an_early_stop_is_resumed_as_one(run, folder, tmp_path, monkeypatch, eval_steps):
    """Also by a run that was killed after its best evaluation, or while it saved its result."""
    measured = {}

    def retrieval(model, *args, **kwargs):  # equal weights have equal metrics
        key = model[0].auto_model.embeddings.word_embeddings.weight.sum().item()
        return {"systems": {"model": {"mrr@10": measured.setdefault(key, [0.2, 0.9, 0.3, 0.1][len(measured) % 4])}}}

    monkeypatch.setattr(embed_module, "measure_model", retrieval)
    fields = {"epochs": 6, "eval_data": str(folder / "pairs.csv"), "patience": 2, "eval_steps": eval_steps, "save_steps": 4}
    whole = run("whole", **fields)
    assert (whole["steps"], whole["best_step"], whole["stopped_early_at"], whole["eval_mrr@10"]) == (20, 10, 20, 0.9)
    original = sentence_trainer._StageCallback.on_log

    def crash(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 10:
            raise ZeroDivisionError

    monkeypatch.setattr(sentence_trainer._StageCallback, "on_log", crash)
    with pytest.raises(ZeroDivisionError):
        run("broken", **fields)
    monkeypatch.setattr(sentence_trainer._StageCallback, "on_log", original)
    assert sorted(path.name for path in (tmp_path / "broken/checkpoints").iterdir())[0] == "best-00000010"
    move = sentence_trainer.checkpoint.move_files
    monkeypatch.setattr(sentence_trainer.checkpoint, "move_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("broken", **fields)
    monkeypatch.setattr(sentence_trainer.checkpoint, "move_files", move)
    resumed = run("broken", **fields)
    assert {**resumed, "train_seconds": 0} == {**whole, "train_seconds": 0}
    torch.testing.assert_close(read_weights(tmp_path / "broken"), read_weights(tmp_path / "whole"), atol=0, rtol=0)
    steps = [[line["step"] for line in read_rows(tmp_path / name / "log.jsonl")] for name in ("broken", "whole")]
    assert steps[0] == steps[1] and max(steps[1]) == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "cached_mnrl", "mini_batch_size": 4},
        {"negative_column": "stone"},
        {"anchor_column": "answer", "positive_column": "query"},
        {"gradient_checkpointing": True, "batch_sampler": "batch_sampler"},
        {"precision": "bf16", "schedule": "constant", "warmup_steps": 1, "pooling": "cls", "normalize": False},
    ],
)
def test_options(run, tmp_path, fields):
    metrics = run(max_steps=2, **fields)
    assert metrics["steps"] == 2
    model = SentenceTransformer(str(tmp_path / "run"))
    assert model[1].pooling_mode == fields.get("pooling", "mean")
    assert len(model) == (2 if fields.get("normalize") is False else 3)


def test_batches_of_one_source(run, folder, tmp_path, monkeypatch):
    (tmp_path / "other.csv").write_text(
        "query,answer\n" + "\n".join(f"{answer},{query}" for query, answer in PAIRS), encoding="utf-8"
    )
    seen = []
    original = SentenceTransformerTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs["anchor_attention_mask"].sum(dim=1).tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SentenceTransformerTrainer, "compute_loss", compute_loss)
    metrics = run(data=[str(folder / "pairs.csv"), str(tmp_path / "other.csv")], one_source_per_batch=True, epochs=1)
    assert metrics["train_rows"] == 2 * len(PAIRS)
    # Queries of the first source have four tokens with the special ones, those of the other six.
    assert sorted(len(set(lengths)) for lengths in seen) == [1] * 10
    assert {lengths[0] for lengths in seen} == {4, 6}


def test_it_learns_from_plain_text(run, folder, tmp_path):
    texts = [f"{fruit} that is {colour} {fruit}. plain" for colour, fruit in itertools.product(COLOURS, FRUITS)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    metrics = run(
        make_pairs=True,
        data=str(tmp_path / "texts.txt"),
        eval_data=str(folder / "pairs.csv"),
        epochs=6,
        eval_steps=15,
        save_steps=15,
        seed=3,
    )
    assert metrics["train_rows"] == len(texts)
    assert metrics["eval_mrr@10"] > 0.4  # of questions it has never seen; by chance it is 0.08


def test_plain_text_comes_from_files_of_any_kind(tmp_path):
    (tmp_path / "texts.txt").write_text("one two three four five\n", encoding="utf-8")
    table = pa.table({"text": pa.array(["six seven eight nine ten"], pa.large_string())})
    pq.write_table(table, tmp_path / "texts.parquet")
    sources = [str(tmp_path / name) for name in ("texts.txt", "texts.parquet")]
    stage = EmbedStage(kind="embed", data=sources, make_pairs=True)
    (pairs,) = training_data(stage, StageContext(tmp_path, 0)).values()
    assert pairs["positive"][:] == ["one two three four five", "six seven eight nine ten"]


@pytest.mark.parametrize("apart", [False, True])
def test_questions_and_plain_text_in_one_stage(run, folder, tmp_path, apart):
    (tmp_path / "texts.txt").write_text("\n\n".join(f"{number} two three four five" for number in range(7)), encoding="utf-8")
    data = [str(folder / "pairs.csv"), {"path": str(tmp_path / "texts.txt"), "make_pairs": True}]
    stage = EmbedStage(kind="embed", data=data, one_source_per_batch=apart, anchor_column="query", positive_column="answer")
    pairs, made = training_data(stage, StageContext(tmp_path, 0)).values()
    assert pairs["anchor"][:] == [query for query, _ in PAIRS] and len(made) == 7
    assert made["positive"][:] == [f"{number} two three four five" for number in range(7)]
    metrics = run(data=data, one_source_per_batch=apart, epochs=1)
    assert metrics["train_rows"] == len(PAIRS) + 7 and metrics["steps"] > 0


def test_a_source_may_be_of_pairs_where_the_stage_makes_them(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("one two three four five\n\nsix seven eight nine ten\n", encoding="utf-8")
    data = [str(tmp_path / "texts.txt"), {"path": str(folder / "pairs.csv"), "make_pairs": False}]
    columns = {"anchor_column": "query", "positive_column": "answer"}
    stage = EmbedStage(kind="embed", data=data, make_pairs=True, **columns)
    first, second = training_data(stage, StageContext(tmp_path, 0)).values()
    assert {len(first), len(second)} == {2, len(PAIRS)}


def test_hard_negatives_are_passages_like_the_right_one_and_mined_once(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "_MARGIN", None)  # before training all texts are alike
    run(hard_negatives=2, max_steps=1, batch_size=2)
    mined = Dataset.load_from_disk(tmp_path / "run" / "negatives" / "0")
    assert mined.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    answers = dict(PAIRS)
    for row in mined:
        assert row["positive"] == answers[row["anchor"]]
        assert {row["negative_1"], row["negative_2"]} <= set(answers.values()) - {row["positive"]}
    monkeypatch.setattr(embed_module, "mine_hard_negatives", None)  # not needed again
    run(hard_negatives=2, max_steps=2, batch_size=2)


def test_a_source_may_ask_for_hard_negatives_itself(run, folder, tmp_path, monkeypatch):
    """Texts are too many to mine where questions are worth it; a source that is read twice is mined once."""
    monkeypatch.setattr(embed_module, "_MARGIN", None)
    mined, mine = [], embed_module.mine_hard_negatives
    monkeypatch.setattr(embed_module, "mine_hard_negatives", lambda pairs, *a, **k: mined.append(k) or mine(pairs, *a, **k))
    (tmp_path / "texts.txt").write_text("\n\n".join(f"{number} two three four five" for number in range(9)), encoding="utf-8")
    pairs = {"path": str(folder / "pairs.csv"), "hard_negatives": 2}
    texts = {"path": str(tmp_path / "texts.txt"), "make_pairs": True}
    metrics = run(data=[texts, pairs, pairs], epochs=1, batch_size=2)
    assert [call["num_negatives"] for call in mined] == [2]
    assert [folder.name for folder in (tmp_path / "run" / "negatives").iterdir()] == ["1"]
    assert metrics["train_rows"] == 9 + 2 * len(PAIRS)


@pytest.fixture(scope="module")
def guide(folder):
    """Return the folder of an embedding model."""
    config = MiniBertConfig.preset("search-8x768", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=21)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = embedder(MiniBertModel(config), tokenizer, folder / ".start", "mean", True)
    model.save_pretrained(str(folder / "guide"), create_model_card=False)
    return str(folder / "guide")


LOSSES = {
    "mnrl": ("pairs", "mrr@10"),
    "cached_mnrl": ("pairs", "mrr@10"),
    "gist": ("pairs", "mrr@10"),
    "cached_gist": ("pairs", "mrr@10"),
    "cosent": ("scored", "spearman"),
    "angle": ("scored", "spearman"),
    "cosine_mse": ("scored", "spearman"),
    "triplet": ("triplets", "accuracy"),
    "margin_mse": ("triplets", "mrr@10"),
}


@pytest.fixture
def fields_of(folder, guide):
    """Return the fields with which a stage trains and evaluates with a loss."""

    def fields_of(loss):
        name, _ = LOSSES[loss]
        data = str(folder / f"{name}.csv")
        columns = {} if name == "pairs" else {"anchor_column": None, "positive_column": None}
        return {"loss": loss, "data": data, "eval_data": data, **columns, **({"guide": guide} if "gist" in loss else {})}

    return fields_of


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_without_computing_padding(run, fields_of, tmp_path, monkeypatch, loss):
    shapes, forward = set(), MiniBertLayer.forward
    monkeypatch.setattr(MiniBertLayer, "forward", lambda self, x, *a, **k: shapes.add(x.dim()) or forward(self, x, *a, **k))
    metric = f"eval_{LOSSES[loss][1]}"
    metrics = run(**fields_of(loss), epochs=6, eval_steps=15, matryoshka_dims=[4, 16, 4])
    lines = read_rows(tmp_path / "run" / "log.jsonl")
    trained = [line["loss"] for line in lines if "loss" in line]
    assert sum(trained[-9:]) < sum(trained[:9])
    assert metrics[metric] == max(line[metric] for line in lines if metric in line)
    assert metrics[metric] != metrics[f"{metric}_4d"]
    assert shapes == {2}  # (tokens, width)


def test_cached_losses_take_a_number_of_tokens(run, fields_of, monkeypatch):
    sizes, forward = [], embed_module.losses.CachedMultipleNegativesRankingLoss.embed_minibatch
    monkeypatch.setattr(
        embed_module.losses.CachedMultipleNegativesRankingLoss,
        "embed_minibatch",
        lambda self, begin, end, **k: sizes.append(end - begin) or forward(self, begin=begin, end=end, **k),
    )
    run(**fields_of("cached_mnrl"), mini_batch_tokens=13, max_steps=1)
    assert set(sizes) == {3, 2}  # queries of 4 tokens, answers of 6


@pytest.mark.parametrize(("dims", "kept"), [([8, 4], 8), ([16, 4], None)])
def test_the_model_cuts_vectors_to_the_largest_prefix(run, fields_of, tmp_path, dims, kept):
    metrics = run(**fields_of("mnrl"), matryoshka_dims=dims, max_steps=2)
    model = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert model.truncate_dim == kept and model.encode(["red apple"]).shape == (1, dims[0])
    held_out = Dataset.from_dict({"query": [query for query, _ in PAIRS], "answer": [answer for _, answer in PAIRS]})
    with model.truncate_embeddings(4):
        cut = embed_module.measure_model(model, held_out, baselines=False)["systems"]["model"]
    assert metrics["eval_mrr@10_4d"] == cut["mrr@10"]


def test_sources_of_different_losses(run, folder, guide, tmp_path, monkeypatch):
    seen = []
    for name in ("CoSENTLoss", "GISTEmbedLoss"):
        cls = getattr(embed_module.losses, name)
        spied = lambda self, features, labels, name=name, forward=cls.forward: (  # noqa: E731
            seen.append((name, len(list(features)), labels is None)) or forward(self, features, labels)
        )
        monkeypatch.setattr(cls, "forward", spied)
    data = [{"path": str(folder / "scored.csv"), "loss": "cosent"}, str(folder / "two.csv")]
    metrics = run(data=data, loss="gist", guide=guide, anchor_column=None, positive_column=None, epochs=1)
    assert {name for name, *_ in seen} == {"CoSENTLoss", "GISTEmbedLoss"}
    assert {(name, labelled) for name, _, labelled in seen} == {("CoSENTLoss", False), ("GISTEmbedLoss", True)}
    assert metrics["train_rows"] == 3 * len(PAIRS)


PROMPTS = {"query_prompt": "plain ", "passage_prompt": "stone "}


def test_prompts_are_trained_mined_evaluated_and_saved(run, folder, tmp_path, monkeypatch):
    texts, original = [], SentenceTransformer.preprocess
    monkeypatch.setattr(embed_module, "_MARGIN", None)

    def preprocess(self, inputs, prompt=None, **kwargs):
        texts.extend((prompt or "") + text for text in inputs)
        return original(self, inputs, prompt=prompt, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "preprocess", preprocess)
    fields = {"hard_negatives": 1, "batch_size": 2, "eval_data": str(folder / "pairs.csv"), "max_steps": 1}
    run(**fields, **PROMPTS)
    assert texts and all(text.startswith("stone " if " that is " in text else "plain ") for text in texts)
    model = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    assert model.prompts == {"query": "plain ", "document": "stone "}
    assert (model.encode_query(["red apple"]) == model.encode(["plain red apple"])).all()
    texts.clear()
    run("again", **fields, model=str(tmp_path / "run"))  # a model keeps its prompts
    assert all(text.startswith("stone " if " that is " in text else "plain ") for text in texts)
    assert SentenceTransformer(str(tmp_path / "again"), device="cpu").prompts == model.prompts
    run("same", **fields, **PROMPTS, model=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="already has prompts .*'plain '.*; remove query_prompt and passage_prompt"):
        run("other", **fields, query_prompt="red ", model=str(tmp_path / "run"))


@pytest.mark.parametrize("negatives", [0, 2])
def test_a_teacher_scores_triplets_once(run, folder, guide, tmp_path, monkeypatch, negatives):
    monkeypatch.setattr(embed_module, "_MARGIN", None)
    data = {"hard_negatives": 2} if negatives else {"data": str(folder / "triplets.csv"), "positive_column": "positive"}
    run(loss="margin_mse", teacher=guide, max_steps=1, **data)
    teacher = SentenceTransformer(guide, device="cpu")
    rows = Dataset.load_from_disk(tmp_path / "run" / "negatives" / "0")
    vectors = {name: teacher.encode(rows[name][:], convert_to_tensor=True) for name in rows.column_names if name != "score"}
    near, *far = (teacher.similarity_pairwise(vectors["anchor"], vectors[name]) for name in list(vectors)[1:])
    assert len(far) == (negatives or 1)
    torch.testing.assert_close(torch.tensor(rows["score"][:]), torch.stack([near - other for other in far], 1))
    monkeypatch.setattr(embed_module, "_with_scores", None)  # not needed again
    run(loss="margin_mse", teacher=guide, max_steps=2, **data)


def test_cached_and_plain_losses_agree(run, tmp_path):
    still = {"max_steps": 2, "model": {"preset": "nano-1x3", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}}
    plain = run("plain", **still)
    cached = run("cached", **still, loss="cached_mnrl", mini_batch_size=3)
    assert plain["train_loss"] == pytest.approx(cached["train_loss"], rel=1e-5)


SCORED = {"loss": "cosent", "anchor_column": None, "positive_column": None}


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("query,label\na,1\nb,2\n", {}, "has a column 'label', so not all of its pairs are positives"),
        ("query,answer\na,b\n", {}, "at least two rows"),
        ("query,answer\na,b\nc,d\n", {"negative_column": "hard"}, "no column 'hard'; it has query, answer"),
        ("query,answer\na,b\nc,d\n", {"anchor_column": "question"}, "no column 'question'; it has query, answer"),
        ("query,answer\na,b\nc,\n", {}, "no value in column 'answer' of row 2"),
        ("query,answer\na,b\nc,d\n", {"hard_negatives": 5}, "Only 0 of 2 pairs of wrong.csv have 5 hard negatives; lower"),
        ("query,answer\na,b\nc,d\n", {"hard_negatives": 1, "negative_column": "b"}, "remove one of the two fields"),
        ("query,answer\na,b\nc,d\n", {"make_pairs": True}, "columns are text, found query, answer; name it .text_column."),
        ("text\na b\nc d\n", {"make_pairs": True}, "sentences of at least 5 words, but the data has none"),
        ("text\na b c d e\n", {"make_pairs": True}, "at least two rows; .*wrong.csv has one"),
        (
            "text\na b\nc d\n",
            {"make_pairs": True, "anchor_column": "text"},
            "make_pairs makes queries and passages itself; remove anchor_column",
        ),
        (
            "text\na b\nc d\n",
            {"data": [{"path": "a.csv", "make_pairs": True}], "positive_column": "b"},
            "remove anchor_column and positive_column",
        ),
        (
            "text\na b\nc d\n",
            {"data": ["a.csv", {"path": "b.csv", "make_pairs": True}], "negative_column": "text"},
            "make_pairs makes queries and passages itself; remove negative_column",
        ),
        ("query,answer\na,b\nc,d\n", {"text_column": "query"}, "text_column and sample_by need make_pairs"),
        ("query,answer\na,b\nc,d\n", {"sample_by": "line"}, "text_column and sample_by need make_pairs"),
        ("sentence1,sentence2,score\na,b,0.5\nc,d,low\n", SCORED, "Row 2 has score='low'; a finite number belongs there"),
        ("sentence1,sentence2,score\na,b,1\nc,d,NaN\n", SCORED, "no value in column 'score' of row 2|a finite number belongs"),
        ("sentence1,sentence2,score\na,b,inf\nc,d,1\n", SCORED, "Row 1 has score=inf; a finite number belongs there"),
        (
            "sentence1,sentence2,score\na,b,0.5\nc,d,5.0\n",
            {**SCORED, "loss": "cosine_mse"},
            "Row 2 has score=5.0; loss: cosine_mse reaches at most 1; divide the scores",
        ),
        (
            "query,positive,negative,score\na,b,c,9.5\nc,d,e,1.0\n",
            {**SCORED, "loss": "margin_mse"},
            "Row 1 has score=9.5; loss: margin_mse reaches at most 2",
        ),
        (
            "query,positive,negative\na,b,c\nc,same,same\n",
            {**SCORED, "loss": "triplet"},
            "Row 2 has negative='same'; this is also its positive",
        ),
        (
            "query,answer\na,b\nc,d\n",
            {"loss": "tsdae"},
            "tsdae needs a decoder class, which .*; choose one of mnrl,",
        ),
        ("query,answer\na,b\nc,d\n", {"loss": "gists"}, "'gists' is unknown; choose one of mnrl, cached_mnrl,"),
        ("query,answer\na,b\nc,d\n", {"loss": "gist"}, "set guide: to an embedding model"),
        (
            "query,answer\na,b\nc,d\n",
            {"loss": "cosent", "hard_negatives": 1},
            "takes at most 0 hard_negatives per pair, got 1",
        ),
        (
            "query,answer\na,b\nc,d\n",
            {"loss": "triplet", "hard_negatives": 2},
            "takes at most 1 hard_negatives per pair, got 2",
        ),
        (
            "text\na b\nc d\n",
            {"loss": "margin_mse", "make_pairs": True},
            "makes no negative and no score for loss: margin",
        ),
        ("query,answer\na,b\nc,d\n", {**SCORED, "query_prompt": "x"}, "remove query_prompt and passage_prompt"),
        ("query,answer\na,b\nc,d\n", {"matryoshka_dims": [8, 17]}, "matryoshka_dims=.17, 8. go beyond the model's width of 16"),
        ("query,answer\na,b\nc,d\n", {"matryoshka_dims": [8, 0]}, "greater than 0"),
        ("query,answer\na,b\nc,d\n", {"max_length": 13}, "max_length=13 exceeds the model's max_position_embeddings=12"),
    ],
)
def test_refusals(run, tmp_path, text, fields, message):
    (tmp_path / "wrong.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run(**{"data": str(tmp_path / "wrong.csv")} | fields)


@pytest.mark.parametrize(("field", "loss"), [("guide", "gist"), ("teacher", "margin_mse")])
@pytest.mark.parametrize("kind", ["encoder", "cross-encoder"])
def test_a_guide_or_teacher_that_is_no_embedder_is_refused(run, folder, guide, tmp_path, field, loss, kind):
    shutil.copytree(guide, tmp_path / "other")
    if kind == "encoder":
        (tmp_path / "other" / "modules.json").unlink()
    else:
        edit_json(tmp_path / "other" / "config_sentence_transformers.json", model_type="CrossEncoder")
    data = {"data": str(folder / "triplets.csv"), "positive_column": "positive"} if field == "teacher" else {}
    with pytest.raises(ValueError, match=f"{field}=.*other is not an embedding model"):
        run(**data, loss=loss, **{field: str(tmp_path / "other")})


def test_models_are_checked_before_the_first_stage(folder, guide, tmp_path):
    first = {"kind": "tokenizer", "data": str(folder / "pairs.csv")}
    made = {"kind": "embed", "name": "made", "data": str(folder / "two.csv"), "model": guide, "max_steps": 1}
    recipe = write_recipe(tmp_path, first, made, {**made, "name": "last", "model": "made", "loss": "gist", "guide": "made"})
    shutil.copytree(guide, tmp_path / "plain", ignore=shutil.ignore_patterns("modules.json"))
    too_wide, no_model = ["last.matryoshka_dims=[17]", f"last.model={guide}"], [f"last.guide={tmp_path / 'plain'}"]
    for changes, message in (
        (too_wide, "beyond the model's width of 16"),
        (no_model, "guide=.*plain is not an embedding model"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(load_recipe(recipe, changes), output_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    run_recipe(load_recipe(recipe), output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "3-last" / "stage.json").exists()


@pytest.mark.parametrize("log_steps", [1, 100])
def test_a_loss_that_is_not_a_number_stops_the_run(run, tmp_path, log_steps):
    with pytest.raises(FloatingPointError, match="learning rate 1e\\+3.*Lower learning_rate"):
        run(learning_rate=1e30, max_grad_norm=0, schedule="constant", log_steps=log_steps)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    assert not (tmp_path / "run" / "model.safetensors").exists()
