"""Kill and resume the pretrain stage, with phases, masking and dropout, or resume it with another recipe."""

import json
import multiprocessing
import random
import time

import numpy as np
import pytest
import torch

from helpers import read_rows, read_weights, write_rows
from minibert import train_wordpiece
from minibert.files import disk
from minibert.train import checkpoint, loop
from minibert.train.arguments import Recipe
from minibert.train.run import read_metrics, run_recipe

WORDS = ["the", "cat", "dog", "bird", "fish", "saw", "heard", "liked", "small", "large", "house", "garden", "under", "behind"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, a tokenizer and the tokenized corpus."""
    folder, generator = tmp_path_factory.mktemp("survival"), np.random.default_rng(0)
    texts = [
        " ".join(" ".join(generator.choice(WORDS, generator.integers(3, 12))) + "." for _ in range(generator.integers(2, 7)))
        for _ in range(80)
    ]
    write_rows(folder / "corpus.jsonl", ({"text": text} for text in texts))
    train_wordpiece(texts, vocab_size=60, model_max_length=32).save_pretrained(folder / "tokenizer")
    run_recipe(recipe(folder, max_steps=1), output_dir=folder / "cached")
    return folder


def recipe(folder, **changes):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 32}
    stage = {
        "kind": "pretrain",
        "data": str(folder / "corpus.jsonl"),
        "cache_dir": str(folder / "cache"),
        "model": {"preset": "simple-4x256", **shape},
        "tokenizer": str(folder / "tokenizer"),
        "dropout": 0.1,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "max_steps": 14,
        "phases": [{"share": 9, "max_length": 16}, {"share": 5, "max_length": 32, "batch_size": 2}],
        "save_steps": 1,
        "log_steps": 3,
        "preprocessing_num_workers": 1,
        **changes,
    }
    return Recipe.model_validate({"name": "small", "stages": [stage]})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("next_sentence", [False, True])
def test_killed_at_random_moments_the_result_is_bit_identical(folder, tmp_path, processes, next_sentence, start, monkeypatch):
    if processes == 1 and next_sentence:
        run_recipe(recipe(folder, max_steps=1, next_sentence=True), output_dir=tmp_path / "cached")
    optimizer_step = loop._Run.optimizer_step

    def slowly(*args):
        time.sleep(0.02)
        return optimizer_step(*args)

    monkeypatch.setattr(loop._Run, "optimizer_step", slowly)

    def run(name):
        return start(processes, lambda: run_recipe(recipe(folder, next_sentence=next_sentence), output_dir=tmp_path / name))

    started = time.monotonic()
    assert start.finish(run("whole")) == [0] * processes
    whole_run = time.monotonic() - started
    generator, reached = random.Random(processes), []
    for _ in range(3):
        children = run("parts")
        time.sleep(generator.uniform(0.3, 0.7) * whole_run)
        for child in children:
            child.kill()
        start.finish(children)
        newest, problems = checkpoint.latest_valid(tmp_path / "parts/1-pretrain/checkpoints")
        assert not problems
        reached.append(newest.name if newest else "")
    assert reached == sorted(reached) and reached[-1], reached
    assert start.finish(run("parts")) == [0] * processes
    ours, theirs = (read_weights(tmp_path / name / "1-pretrain") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [[line["loss"] for line in read_rows(tmp_path / name / "1-pretrain/log.jsonl")] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("encode", {}), ("classify", {"max_steps": 2, "save_steps": 1}), ("embed", {"max_steps": 1, "eval_data": None})],
)
def test_killed_at_any_write_the_next_start_leaves_what_an_undisturbed_run_leaves(name, changes, tmp_path):
    """Every file is the same but for times, and no other file is there."""
    from boundaries import Survival, make_inputs, workflows  # imports everything

    (inputs := tmp_path / "inputs").mkdir()
    (child := multiprocessing.get_context("fork").Process(target=make_inputs, args=(inputs,))).start()
    child.join()
    survival = Survival(workflows(inputs, **changes)[name], tmp_path / "runs")
    assert len(survival.boundaries) > 20
    for number, boundary in enumerate(survival.boundaries, start=1):
        assert survival.stopped_at(number) == ([], []), boundary


def test_the_file_that_a_living_process_writes_is_no_leftover(tmp_path):
    with disk.atomic_write(tmp_path / "file") as part:
        part.write_text("slow")
        disk.write_text(tmp_path / "file", "fast")
        assert part.read_text() == "slow"
    assert (tmp_path / "file").read_text() == "slow" and len(list(tmp_path.iterdir())) == 1


def test_processes_that_tokenize_the_same_texts_wait_for_each_other(folder, tmp_path, start):
    changes = {"max_steps": 1, "cache_dir": str(tmp_path / "cache"), "next_sentence": True}
    runs = [start(1, lambda name=name: run_recipe(recipe(folder, **changes), output_dir=tmp_path / name)) for name in "ab"]
    assert [start.finish(run) for run in runs] == [[0], [0]]
    assert not list((tmp_path / "cache").rglob(".*"))


def interrupted(folder, out, monkeypatch, **changes):
    """A run that ends with an error after its fourth step."""
    optimizer_step = loop._Run.optimizer_step

    def crash(run, *args):
        if run.progress.step == 4:
            raise RuntimeError("crash")
        return optimizer_step(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "optimizer_step", crash)
        with pytest.raises(RuntimeError, match="crash"):
            run_recipe(recipe(folder, **changes), output_dir=out)


def test_a_changed_recipe_is_refused_unless_forced(folder, tmp_path, monkeypatch):
    """Also in the middle of the stage; the message lists what changed."""
    interrupted(folder, tmp_path, monkeypatch)
    phases = [{"share": 9, "max_length": 16}, {"share": 5, "max_length": 24, "batch_size": 2}]
    changed = recipe(folder, mlm_probability=0.3, phases=phases)
    with pytest.raises(ValueError) as caught:
        run_recipe(changed, output_dir=tmp_path)
    for part in (
        "stage 1 (pretrain) mlm_probability was 0.15 and is now 0.3; stage 1 (pretrain) phases was [",
        "'max_length': 32",
        "'max_length': 24",
        "use --force",
    ):
        assert part in str(caught.value)
    assert (tmp_path / "1-pretrain/checkpoints/step-00000004").exists()
    run_recipe(changed, output_dir=tmp_path, force=True)
    assert json.loads((tmp_path / "1-pretrain/stage.json").read_text())["mlm_probability"] == 0.3
    assert read_metrics(tmp_path)["pretrain"]["steps"] == 14


def test_other_text_under_the_same_name_is_noticed(folder, tmp_path, monkeypatch):
    """The recipe is the same; the corpus has a fingerprint."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text((folder / "corpus.jsonl").read_text())
    interrupted(folder, tmp_path / "run", monkeypatch, data=str(corpus))
    lines = corpus.read_text().splitlines(keepends=True)
    corpus.write_text("".join(lines[:-1]) + lines[0])
    with pytest.raises(ValueError, match=r"checkpoints of a different run; changed: .*data \(was \["):
        run_recipe(recipe(folder, data=str(corpus)), output_dir=tmp_path / "run")


def test_free_fields_may_change(folder, tmp_path, monkeypatch):
    run_recipe(recipe(folder), output_dir=tmp_path / "whole")
    interrupted(folder, tmp_path / "parts", monkeypatch)
    run_recipe(recipe(folder, save_steps=5, log_steps=1), output_dir=tmp_path / "parts")
    ours, theirs = (read_weights(tmp_path / name / "1-pretrain") for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
