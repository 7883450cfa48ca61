"""Test the training loop: its steps, the files it leaves, and that no interruption changes the result."""

import contextlib
import doctest
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from helpers import read_rows, read_weights
from minibert import MiniBertConfig, MiniBertForMaskedLM, MiniBertForPreTraining, MiniBertForSequenceClassification
from minibert.inference import cpu
from minibert.train import checkpoint, loop
from minibert.train.arguments import LoopArguments
from minibert.train.stage import StageContext

ROWS = 29  # does not divide by anything used below: the last step of an epoch is always uneven


class Rows:
    """Rows of random tokens; the label says whether the first token is in the upper half."""

    def __init__(self, count=ROWS, make=None):
        self.make = make or collate
        generator = np.random.default_rng(0)
        self.ids = [generator.integers(5, 40, size=generator.integers(3, 9)) for _ in range(count)]

    def __len__(self):
        return len(self.ids)

    def collate(self, numbers):
        return self.make([self.ids[number] for number in numbers])


class Numbers:
    """Rows that are their own numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def collate(self, numbers):
        return {"labels": torch.tensor(numbers)}


def collate(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": (ids[:, 0] > 22).long()}


def slow_collate(rows):
    time.sleep(0.01)
    return collate(rows)


def tiny_model(dropout=0.1):
    torch.manual_seed(0)
    config = MiniBertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    return MiniBertForSequenceClassification(config)


def arguments(**changes):
    base = {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "epochs": 3,
        "learning_rate": 1e-2,
        "log_steps": 3,
        "save_steps": 2,
    }
    return LoopArguments(**{**base, **changes})


def fit(folder, model=None, rows=None, make=collate, evaluate=None, metric=None, class_weights=None, **changes):
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    rows, context = Rows(make=make) if rows is None else rows, StageContext(folder, 7)
    return loop.fit(model or tiny_model(), tokenizer, rows, arguments(**changes), context, evaluate, metric, class_weights)


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run with default arguments that nothing interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fit(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------- pure functions


def test_examples_in_docstrings():
    result = doctest.testmod(loop)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_rises_to_its_peak_and_never_leaves_the_range(schedule):
    rates = [loop.learning_rate(step, peak=2.0, warmup=5, total=20, schedule=schedule) for step in range(25)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(0 <= rate <= 2 for rate in rates)
    assert rates[-1] == (2 if schedule == "constant" else 0)


def test_norms_and_biases_do_not_decay():
    model = tiny_model()
    decayed, plain = loop.parameter_groups(model, 0.5)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert not any("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_phases_share_out_the_steps_and_each_row_comes_once_per_pass():
    def phase(rows, batch_size, share, rate):
        return loop.Phase(Numbers(rows), batch_size, rate, share)

    steps = loop.Steps([phase(90, 3, 0.9, 0.1), phase(40, 2, 0.1, 0.2)], accumulation=1, seed=3, process=0, processes=1)
    assert steps.per_epoch == round(1 / (0.9 / 30 + 0.1 / 20))  # of 30 steps over all rows in the one, 20 in the other
    steps.plan(100)
    assert [steps.locate(step) for step in (0, 89, 90, 99, 130)] == [(0, 0), (0, 89), (1, 0), (1, 9), (1, 40)]
    assert {len(steps[step].batches[0]["labels"]) for step in range(90)} == {3}
    assert {len(steps[step].batches[0]["labels"]) for step in range(90, 100)} == {2}
    seen = [row for step in range(30) for row in steps[step].batches[0]["labels"].tolist()]
    assert sorted(seen) == list(range(90)) and seen != list(range(90))
    assert sorted(row for step in range(90, 110) for row in steps.row_ids(step)) == list(range(40))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_every_row_once_per_epoch_and_disjoint_over_processes(processes, accumulation):
    """Whatever the split, the processes together see each row once, and agree on the number of micro-batches."""
    steps = [
        loop.Steps(
            [loop.Phase(Numbers(ROWS), batch_size=3, learning_rate=0.1)],
            accumulation=accumulation,
            seed=1,
            process=process,
            processes=processes,
        )
        for process in range(processes)
    ]
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps[0].per_epoch, (epoch + 1) * steps[0].per_epoch):
            items = [one[step] for one in steps]
            assert len({len(item.batches) for item in items}) == 1
            assert all(sum(item.terms) <= 3 * accumulation for item in items)
            for item in items:
                seen += [
                    row
                    for batch, terms in zip(item.batches, item.terms, strict=True)
                    if terms
                    for row in batch["labels"].tolist()
                ]
        assert sorted(seen) == list(range(ROWS))
        orders.append(seen)
    assert orders[0] != orders[1]


# ----------------------------------------------------------------------------------------------------- what a run leaves


def test_learns_and_leaves_a_complete_folder(tmp_path):
    model = tiny_model(dropout=0.0)
    metrics = fit(tmp_path, model, epochs=20, save_steps=None, warmup_ratio=0.1, schedule="cosine")
    lines = read_rows(tmp_path / "log.jsonl")
    rates = [loop.learning_rate(line["step"] - 1, peak=0.01, warmup=8, total=80, schedule="cosine") for line in lines]
    assert [line["learning_rate"] for line in lines] == rates
    assert lines[0]["loss"] > 0.6 and lines[-1]["loss"] < 0.3
    assert lines[-1]["step"] == metrics["steps"] == 80 and lines[-1]["epoch"] == 20
    assert set(lines[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds"}
    real = sum(len(row) for row in Rows().ids)
    assert metrics["train_tokens"] == 20 * real
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # save_total_limit
    reloaded = MiniBertForSequenceClassification.from_pretrained(tmp_path)
    batch = collate(Rows().ids[:3])
    torch.testing.assert_close(reloaded.eval()(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)
    assert {"config.json", "model.safetensors", "modeling_minibert.py", "configuration_minibert.py"} <= set(
        os.listdir(tmp_path)
    )


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    fit(tmp_path / "parts", tiny_model(0.0), batch_size=4, gradient_accumulation_steps=2)
    fit(tmp_path / "whole", tiny_model(0.0), batch_size=8, gradient_accumulation_steps=1)
    torch.testing.assert_close(read_weights(tmp_path / "parts"), read_weights(tmp_path / "whole"), rtol=0, atol=1e-5)


def test_one_step_is_that_of_adamw(tmp_path):
    """With a constant rate and no clipping, three steps equal three of torch's own, written out."""
    model, rows = tiny_model(0.0), Rows(8)
    optimizer = torch.optim.AdamW(loop.parameter_groups(model, 0.1), lr=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01 * (step + 1) / 3
        ids = loop.rows_of_step(step, rows=8, rows_per_step=4, seed=7)
        model(**rows.collate(ids)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = {"batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 0.0, "weight_decay": 0.1}
    fit(tmp_path, tiny_model(0.0), rows=rows, max_steps=3, warmup_steps=3, schedule="constant", **options)
    saved, expected = read_weights(tmp_path), model.state_dict()
    torch.testing.assert_close(saved, {name: expected[name] for name in saved}, rtol=0, atol=1e-6)


def test_workers_make_the_same_batches(tmp_path):
    """Also where making a batch is random: the noise belongs to the step, not to the worker."""

    def noisy(rows):
        random.shuffle(rows)
        batch = collate(rows)
        noise = torch.rand(batch["input_ids"].shape) + torch.from_numpy(np.random.rand(*batch["input_ids"].shape))
        batch["input_ids"][noise < 0.3] = 39
        return batch

    items = []
    for workers in (0, 2):
        phase = loop.Phase(Rows(make=noisy), batch_size=4, learning_rate=0.1)
        steps = loop.Steps([phase], accumulation=2, seed=1, process=0, processes=1)
        items.append(list(DataLoader(steps, batch_size=None, sampler=range(2, 9), num_workers=workers)))
    for left, right in zip(*items, strict=True):
        assert left.terms == right.terms and left.tokens == right.tokens
        for one, other in zip(left.batches, right.batches, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_dropout_belongs_to_the_step_whoever_made_the_batch(tmp_path, undisturbed):
    fit(tmp_path / "one", num_workers=1)
    assert_same(read_weights(undisturbed), read_weights(tmp_path / "one"))


def test_keeps_the_best_model(tmp_path):
    scores, kept = iter([0.1, 0.9, 0.4]), []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"accuracy": next(scores)}

    metrics = fit(tmp_path, evaluate=evaluate, metric="accuracy", eval_steps=None)
    assert metrics["eval_accuracy"] == 0.9 and metrics["best_step"] == 8
    saved = read_weights(tmp_path)
    assert all(torch.equal(saved[name], kept[1][name]) for name in saved)
    assert [line["eval_accuracy"] for line in read_rows(tmp_path / "log.jsonl") if "eval_accuracy" in line] == [0.1, 0.9, 0.4]


def test_a_lower_loss_is_better(tmp_path):
    scores = iter([3.0, 1.0, 2.0])
    metrics = fit(tmp_path, evaluate=lambda _: {"loss": next(scores)}, metric="loss")
    assert metrics["eval_loss"] == 1.0


class Scores:
    """Accuracies of a run without interruptions; afterwards, the same weights have the same accuracy."""

    def __init__(self, *scores):
        self.scores, self.known = iter(scores), {}

    def __call__(self, model):
        key = model.classifier.weight.numpy().tobytes()
        if key not in self.known:
            self.known[key] = next(self.scores)
        return {"accuracy": self.known[key]}


@pytest.mark.parametrize("batches", [9, 16, 17, 21, None])  # 16: after the best evaluation, before a checkpoint of it
def test_an_early_stop_keeps_the_best_and_a_resumed_run_stops_there_too(tmp_path, monkeypatch, batches):
    scores = Scores(0.1, 0.5, 0.4, 0.6, 0.3, 0.6)  # an equal score is not better
    options = {"evaluate": scores, "metric": "accuracy", "eval_steps": 2, "save_steps": 3, "epochs": 5, "patience": 2}
    whole = fit(tmp_path / "whole", **options)
    assert (whole["steps"], whole["best_step"], whole["stopped_early_at"], whole["eval_accuracy"]) == (12, 8, 12, 0.6)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        if batches is None:  # killed while it saves its result
            patch.setattr(checkpoint, "move_files", lambda *_: crashing_after(0)(()))
        fit(tmp_path / "parts", make=crashing_after(24 if batches is None else batches), **options)
    parts = fit(tmp_path / "parts", make=collate if batches else crashing_after(0), **options)
    assert_same(read_weights(tmp_path / "parts"), read_weights(tmp_path / "whole"))
    timed = {"train_seconds", "tokens_per_second"}
    assert {key: parts[key] for key in parts.keys() - timed} == {key: whole[key] for key in whole.keys() - timed}


def test_no_early_stop_before_the_patience_is_over_or_at_the_end(tmp_path):
    options = {"metric": "accuracy", "eval_steps": 2, "patience": 2}
    rising = fit(tmp_path / "rising", evaluate=Scores(0.1, 0.0, 0.2, 0.1, 0.3, 0.2), **options)
    assert (rising["steps"], rising["stopped_early_at"]) == (12, None)
    late = fit(tmp_path / "late", evaluate=Scores(0.1, 0.2, 0.3, 0.4, 0.3, 0.2), **options)
    assert (late["steps"], late["best_step"], late["stopped_early_at"]) == (12, 8, None)
    epochs = fit(tmp_path / "epochs", evaluate=Scores(0.2, 0.1), metric="accuracy", patience=1)
    assert (epochs["steps"], epochs["stopped_early_at"]) == (8, 8)


def test_undefined_metrics_are_not_waited_for(tmp_path):
    """An undefined correlation is never the best, and without a best there is nothing to go back to."""
    options = {"metric": "accuracy", "eval_steps": 2, "patience": 1}
    assert fit(tmp_path / "none", evaluate=lambda _: {"accuracy": None}, **options)["steps"] == 12
    metrics = fit(tmp_path / "later", evaluate=Scores(None, 0.5, None), **options)
    assert (metrics["best_step"], metrics["stopped_early_at"]) == (4, 6)


def test_class_weights_multiply_the_loss_of_a_label(tmp_path):
    model, options = tiny_model(0.0), {"max_steps": 1, "log_steps": 1, "gradient_accumulation_steps": 1}
    rows = Rows(6)
    batch = collate(rows.ids)
    losses = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
    expected = (losses * torch.tensor([1.0, 5.0])[batch["labels"]]).mean().item()
    for name, sizes in (("whole", (6, 1)), ("parts", (1, 6))):  # one row per batch has a weight as well
        options |= {"batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
        fit(tmp_path / name, tiny_model(0.0), rows=rows, class_weights=[1.0, 5.0], **options)
        assert read_rows(tmp_path / name / "log.jsonl")[0]["loss"] == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(read_weights(tmp_path / "parts"), read_weights(tmp_path / "whole"), rtol=0, atol=1e-5)
    fit(tmp_path / "ones", tiny_model(), class_weights=[1.0, 1.0])
    fit(tmp_path / "plain", tiny_model())
    torch.testing.assert_close(read_weights(tmp_path / "ones"), read_weights(tmp_path / "plain"), rtol=0, atol=1e-5)


def test_bfloat16_checkpointing_and_float32_in_a_row(tmp_path):
    """Stages of one process may differ in precision, and weights stay float32."""
    for name, changes in {"a": {"precision": "bf16"}, "b": {}, "c": {"gradient_checkpointing": True}}.items():
        fit(tmp_path / name, tiny_model(0.0), max_steps=3, **changes)
        assert {value.dtype for value in read_weights(tmp_path / name).values()} == {torch.float32}
    torch.testing.assert_close(read_weights(tmp_path / "b"), read_weights(tmp_path / "c"), rtol=0, atol=1e-5)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU trains here")
@pytest.mark.parametrize(("half", "said"), [(50.0, True), (300.0, False)])
def test_precision_of_a_cpu(monkeypatch, caplog, half, said):
    monkeypatch.setattr(cpu, "product_rates", lambda: {"float32": 100.0, "bfloat16": half})
    loop.check_precision("fp32")
    assert "is slower" not in caplog.text
    loop.check_precision("bf16")
    assert ("bf16 is slower than float32 on this processor" in caplog.text) == said
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        loop.check_precision("fp16")


# ------------------------------------------------------------------------------------------- interruptions and refusals


class Crash(Exception):
    pass


def crashing_after(batches):
    remaining = iter(range(batches))

    def make(rows):
        if next(remaining, None) is None:
            raise Crash
        return collate(rows)

    return make


@pytest.mark.parametrize("batches", [9, 19])  # the last one after a line of the log that is newer than the checkpoint
def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, undisturbed, batches):
    with pytest.raises(Crash):
        fit(tmp_path / "parts", make=crashing_after(batches))
    fit(tmp_path / "parts")
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))
    with (tmp_path / "parts/log.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # what a kill may leave
    fit(tmp_path / "parts")
    left, right = (
        [(line["step"], line["loss"]) for line in read_rows(folder / "log.jsonl")]
        for folder in (tmp_path / "parts", undisturbed)
    )
    assert left == right


def test_unreadable_lines_of_the_log_are_left_out(tmp_path):
    with pytest.raises(Crash):
        fit(tmp_path, make=crashing_after(9))
    kept = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(f'{{"st\n{kept}7\n{{"step": "2"}}\n')
    fit(tmp_path)
    assert [line["step"] for line in read_rows(tmp_path / "log.jsonl")] == [3, 6, 9, 12]


def test_a_finished_run_does_nothing_when_run_again(tmp_path):
    best = {"evaluate": lambda _: {"accuracy": 0.5}, "metric": "accuracy"}
    first = fit(tmp_path, **best)
    before = read_weights(tmp_path)
    again = fit(tmp_path, make=crashing_after(0), **best)
    assert again["eval_accuracy"] == first["eval_accuracy"] == 0.5 and again["train_seconds"] == first["train_seconds"]
    assert_same(read_weights(tmp_path), before)


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors does not have the"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda folder: os.truncate(folder / "manifest.json", 40), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, undisturbed, caplog, harm, word):
    with pytest.raises(Crash):
        fit(tmp_path / "parts", make=crashing_after(17))
    newest = max((tmp_path / "parts/checkpoints").iterdir())
    assert newest.name == "step-00000008"
    harm(newest)
    caplog.clear()
    fit(tmp_path / "parts")
    assert f"Checkpoint {newest} is damaged" in caplog.text and word in caplog.text
    assert "step-00000006" in caplog.text
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))


def test_without_a_valid_checkpoint_the_run_says_so_and_starts_again(tmp_path, undisturbed, caplog):
    with pytest.raises(Crash):
        fit(tmp_path / "parts", make=crashing_after(9))
    for folder in (tmp_path / "parts/checkpoints").iterdir():
        os.truncate(folder / "model.safetensors", 1000)
    caplog.clear()
    fit(tmp_path / "parts")
    assert caplog.text.count("is damaged") == 2 and "is valid; the run starts from the beginning." in caplog.text
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))


def test_a_damaged_best_model_is_named_and_the_next_best_is_kept(tmp_path, caplog):
    scores = {4: 0.9, 8: 0.5, 12: 0.7}
    options = {"metric": "accuracy", "evaluate": lambda _: {"accuracy": scores[steps.pop(0)]}}
    steps = [4, 8, 12]
    with pytest.raises(Crash):
        fit(tmp_path, make=crashing_after(13), **options)
    (best,) = (tmp_path / "checkpoints").glob("best-*")
    assert best.name == "best-00000004"
    os.truncate(best / "model.safetensors", 1000)
    caplog.clear()
    metrics = fit(tmp_path, **options)
    assert f"Checkpoint {best} is damaged: model.safetensors does not have" in caplog.text
    assert metrics["best_step"] == 12 and metrics["eval_accuracy"] == 0.7


def test_leftovers_of_a_kill_while_writing_are_no_checkpoints(tmp_path):
    with pytest.raises(Crash):
        fit(tmp_path, make=crashing_after(9))
    folder = tmp_path / "checkpoints/step-00000004"
    shutil.copytree(folder, tmp_path / "checkpoints/.step-00000006.0123abcd.part")
    shutil.copytree(folder, tmp_path / "checkpoints/.step-00000004.0123abcd.part")
    assert checkpoint.latest_valid(tmp_path / "checkpoints") == (folder, {})
    fit(tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*.part"))


@contextlib.contextmanager
def files_up_to(size):
    """Writing beyond ``size`` bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, undisturbed):
    with pytest.raises(Crash):
        fit(tmp_path / "parts", make=crashing_after(9))
    message = r"step-00000006 could not be written \(.*\); files saved earlier are not changed"
    with files_up_to(20_000), pytest.raises(OSError, match=message):  # the optimizer's file is larger
        fit(tmp_path / "parts")
    assert [path.name for path in sorted((tmp_path / "parts/checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    fit(tmp_path / "parts")
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))


def test_full_disk_while_the_result_is_written(tmp_path):
    """A run that was finished but for that finishes without training again, and an earlier result stays until then."""
    fit(tmp_path)
    before = read_weights(tmp_path)
    with files_up_to(10_000), pytest.raises(OSError, match=r"final could not be written \(.*\); files saved earlier"):
        fit(tmp_path, make=crashing_after(0))
    assert_same(read_weights(tmp_path), before)
    assert not list((tmp_path / "checkpoints").glob("final*"))
    (tmp_path / "model.safetensors").unlink()
    fit(tmp_path, make=crashing_after(0))
    assert_same(read_weights(tmp_path), before)


def test_full_disk_while_the_log_is_written(tmp_path, monkeypatch):
    open_file = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "log.jsonl" and "a" in args:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match=r"log.jsonl could not be written \(No space left on device\); .*Free some disk space"):
        fit(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, undisturbed, monkeypatch):
    """Rights are simulated: they do not hold for root."""
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if "step-00000004" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        mkdir(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OSError, match=r"step-00000004 could not be written \(Permission denied\); files saved earlier"):
            fit(tmp_path / "parts")
    fit(tmp_path / "parts")
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))


class Poisoned(Rows):
    """Row 11 holds a token that nothing else holds."""

    def __init__(self):
        super().__init__()
        self.ids[11] = np.array([4, 4, 4])


def poisoned_model(finite_gradient):
    """Return a model whose loss of a batch with token 4, and unless ``finite_gradient`` its gradient, is not a number."""
    model = tiny_model()

    def poison(_module, _args, kwargs, output):
        if (kwargs["input_ids"] == 4).any():
            output.loss = output.loss + float("nan") if finite_gradient else output.loss * float("nan")

    model.register_forward_hook(poison, with_kwargs=True)
    return model


@pytest.mark.parametrize("finite_gradient", [False, True])
def test_a_loss_that_is_not_finite_stops_with_step_rate_and_rows(tmp_path, finite_gradient):
    bad = next(step for step in range(4) if 11 in loop.rows_of_step(step, rows=ROWS, rows_per_step=8, seed=7))
    with pytest.raises(FloatingPointError, match=rf"step {bad + 1} of 12, learning rate 0\.0\d*, rows .*\b11\b") as caught:
        fit(tmp_path, poisoned_model(finite_gradient), rows=Poisoned(), save_steps=1, log_steps=100)
    assert str(loop.rows_of_step(bad, rows=ROWS, rows_per_step=8, seed=7)[0]) in str(caught.value)
    folder, problems = checkpoint.latest_valid(tmp_path / "checkpoints")
    assert not problems and (folder is None if bad == 0 else folder.name == f"step-{bad:08d}")
    assert not (tmp_path / "model.safetensors").exists()


def test_control_c_saves_and_says_so(tmp_path, undisturbed):
    handler = signal.getsignal(signal.SIGINT)  # a shell that starts jobs in the background lets them ignore it
    calls = iter(range(100))

    def interrupt(rows):
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return collate(rows)

    with pytest.raises(KeyboardInterrupt, match="^Stopped at step 3 of 12, saved up to step 3.$"):
        fit(tmp_path / "parts", make=interrupt, save_steps=1000)
    assert signal.getsignal(signal.SIGINT) is handler
    fit(tmp_path / "parts", save_steps=1000)
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    with pytest.raises(Crash):
        fit(tmp_path, make=crashing_after(9))
    with pytest.raises(ValueError, match=r"different run; changed: learning_rate \(was 0.01, now 0.001\)"):
        fit(tmp_path, learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"changed: .*rows \(was \[29\], now \[20\]\)"):
        fit(tmp_path, rows=Rows(20))
    fit(tmp_path, log_steps=1, save_total_limit=5)  # these do not change the weights


def test_workers_without_shared_memory_are_refused(tmp_path, monkeypatch):
    def refuse():
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("multiprocessing.Lock", refuse)
    with pytest.raises(OSError, match=r"^num_workers: 1 needs shared memory, .*\(Read-only file system\); set it to 0"):
        fit(tmp_path, num_workers=1)


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path, undisturbed, start):
    """Until the first is gone, even if it left no time to clean up and has workers of its own."""

    def locked(**fields):
        with checkpoint.exclusive_lock(tmp_path / "parts"):  # as a run locks the folder of each stage
            fit(tmp_path / "parts", **fields)

    (tmp_path / "parts").mkdir()
    (first,) = start(1, lambda: locked(make=slow_collate, epochs=300, num_workers=1))
    while not list((tmp_path / "parts").glob("checkpoints/step-????????")):
        time.sleep(0.02)
    with pytest.raises(ValueError, match=r"^Another process is training in .*parts; wait for it, stop it, or"):
        locked()
    assert first.is_alive()
    first.kill()
    first.join()
    shutil.rmtree(tmp_path / "parts/checkpoints", ignore_errors=True)  # of another number of epochs
    locked()
    assert_same(read_weights(tmp_path / "parts"), read_weights(undisturbed))
    assert not (tmp_path / "parts/.lock").exists()


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="training data has no rows"):
        fit(tmp_path, rows=Rows(0))
    with pytest.raises(ValueError, match="trackers: nonsense is unknown or not installed"):
        fit(tmp_path, trackers=["nonsense"])
    with pytest.raises(ValueError, match="metric_for_best='f1' is not measured; use one of accuracy"):
        fit(tmp_path, evaluate=lambda _: {"accuracy": 1.0}, metric="f1")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written"):
        fit(tmp_path / "file" / "run")


# ----------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, start):
    fit(tmp_path / "one", tiny_model(0.0), batch_size=4)
    assert start.finish(start(2, lambda: fit(tmp_path / "two", tiny_model(0.0), batch_size=2))) == [0, 0]
    torch.testing.assert_close(read_weights(tmp_path / "one"), read_weights(tmp_path / "two"), rtol=0, atol=1e-5)
    one, two = ([line["loss"] for line in read_rows(tmp_path / name / "log.jsonl")] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-6)


def test_two_processes_stop_early_together(tmp_path, start):
    options = {"metric": "accuracy", "eval_steps": 2, "patience": 1, "batch_size": 2}
    job = start(2, lambda: fit(tmp_path, evaluate=Scores(0.2, 0.4, 0.3), **options))
    assert start.finish(job) == [0, 0]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["best_step"], metrics["stopped_early_at"]) == (4, 6)


def masked_words(rows):
    """The longer a row, the more of its words are to be predicted: processes and micro-batches differ in number."""
    batch = collate(rows)
    ids, place = batch["input_ids"], torch.arange(batch["input_ids"].shape[1])
    lengths = batch["attention_mask"].sum(1, keepdim=True)
    chosen = place < (lengths - 3) ** 2 // 3 + 1
    return {
        **batch,
        "input_ids": ids.where(~chosen, torch.tensor(4)),
        "labels": ids.where(chosen & (ids > 0), torch.tensor(-100)),
    }


def masked_pairs(rows):
    return {**masked_words(rows), "next_sentence_label": torch.tensor([int(len(row) % 2) for row in rows])}


@pytest.mark.parametrize(
    ("head", "make", "weights"),
    [
        (MiniBertForSequenceClassification, collate, None),
        (MiniBertForSequenceClassification, collate, [0.5, 3.0]),
        (MiniBertForMaskedLM, masked_words, None),
        (MiniBertForPreTraining, masked_pairs, None),
    ],
)
def test_loss_and_gradients_of_two_processes_are_those_of_one(tmp_path, start, head, make, weights, step=3):
    """The last step of an epoch is uneven; without averaging over steps, AdamW's first average is the gradient itself."""

    def one_step(folder, batch_size):
        torch.manual_seed(0)
        config = tiny_model(0.0).config
        options = {"adam_betas": (0.0, 0.9), "max_grad_norm": 0.0, "learning_rate": 1e-12, "weight_decay": 0.0, "log_steps": 1}
        return fit(
            folder,
            head(config),
            make=make,
            class_weights=weights,
            batch_size=batch_size,
            max_steps=step + 1,
            save_steps=1,
            **options,
        )

    one_step(tmp_path / "one", 4)
    assert start.finish(start(2, lambda: one_step(tmp_path / "two", 2))) == [0, 0]
    rows = loop.rows_of_step(step, rows=ROWS, rows_per_step=8, seed=7)
    counts = [int((make([Rows().ids[row] for row in part])["labels"] != -100).sum()) for part in np.array_split(rows, 4)]
    assert head is MiniBertForSequenceClassification or len(set(counts)) > 1, counts
    one, two = (
        load_file(tmp_path / name / f"checkpoints/step-{step + 1:08d}/optimizer.safetensors") for name in ("one", "two")
    )
    gradients = [key for key in one if key.endswith("exp_avg")]
    assert gradients and max(float(one[key].abs().max()) for key in gradients) > 1e-2
    for key in gradients:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-6)
    one, two = (read_rows(tmp_path / name / "log.jsonl")[-1]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_the_result_is_bit_identical(tmp_path, processes, start):
    """With dropout and accumulation. SIGKILL leaves no time to clean up, and may hit while a checkpoint is written."""

    def run(folder):
        return start(processes, lambda: fit(tmp_path / folder, make=slow_collate, save_steps=1, epochs=2, batch_size=2))

    started = time.monotonic()
    assert start.finish(run("whole")) == [0] * processes
    whole_run = time.monotonic() - started
    generator, reached = random.Random(processes), []
    for _ in range(3):
        children = run("parts")
        time.sleep(generator.uniform(0.25, 0.6) * whole_run)
        for child in children:
            child.kill()
        start.finish(children)
        folder, problems = checkpoint.latest_valid(tmp_path / "parts/checkpoints")
        assert not problems
        reached.append(folder.name if folder else "")
    assert reached == sorted(reached) and reached[-1], reached
    assert start.finish(run("parts")) == [0] * processes
    assert_same(read_weights(tmp_path / "parts"), read_weights(tmp_path / "whole"))
    assert not list((tmp_path / "parts/checkpoints").glob(".*.part"))


@pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_memory_that_training_frees_is_not_mapped_again(tmp_path, start):
    def pages(name):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(2**24)  # 64 MiB: 16,384 pages
        (tmp_path / name).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))

    def job():
        pages("by itself")
        fit(tmp_path / "run", epochs=1)
        pages("kept")

    assert start.finish(start(1, job)) == [0]
    # A heap that grows for the first of them has every page of it once; huge pages make that fewer.
    assert int((tmp_path / "kept").read_text()) < int((tmp_path / "by itself").read_text()) / 4
