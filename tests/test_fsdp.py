"""Weights sharded over two processes (FSDP2, gloo): the same training, less memory, the same files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from minibert import MiniBertConfig, MiniBertForMaskedLM
from minibert.train import loop
from minibert.train.arguments import EmbedStage, LoopArguments

ROWS = 21


def tiny_model():
    torch.manual_seed(0)
    return MiniBertForMaskedLM(
        MiniBertConfig(
            vocab_size=41,  # an odd number of rows does not split evenly
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def collate(rows):
    """Rows of 8 tokens; more of them are to be predicted the larger the row's number is."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 41, size=(ROWS, 8)))[rows]
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        labels[place, : 1 + row % 6] = ids[place, : 1 + row % 6]
    return {"input_ids": ids.where(labels == -100, torch.tensor(4)), "labels": labels}


def score(model):
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters()) and not model.training
    return {"loss": float(model(**collate(list(range(5)))).loss)}


def fit(folder, model=None, make=collate, **changes):
    values = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "log_steps": 1,
        "save_steps": 2,
        **changes,
    }
    return loop.fit(
        model or tiny_model(),
        train_dataset=range(ROWS),
        collate=make,
        arguments=LoopArguments(**values),
        output_dir=folder,
        seed=3,
        evaluate=score,
        metric_for_best="loss",
        greater_is_better=False,
    )


def figures(folder):
    return [
        [value for key, value in json.loads(line).items() if "second" not in key]
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "gradient_checkpointing": True, "epochs": 1}])
def test_gives_the_weights_of_replicated_training(tmp_path, start, changes):
    """With dropout, accumulation, clipping, decay and tied embeddings, and different numbers of labels per process."""

    def sharded():
        model = tiny_model()
        fit(tmp_path / "sharded", model, fsdp=True, **changes)
        weight = model.minibert.embeddings.word_embeddings.weight
        assert model.lm_head.decoder.weight is weight
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert weight.to_local().numel() in (21 * 16, 20 * 16)
        for layer in model.minibert.layers:
            assert type(layer).__name__ == "FSDPMiniBertLayer"

    assert start.finish(start(2, sharded)) == [0, 0]
    assert start.finish(start(2, lambda: fit(tmp_path / "replicated", **changes))) == [0, 0]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "replicated"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if not changes else 2e-3)
    assert all(value.dtype == torch.float32 for value in ours.values())
    for one, other in zip(figures(tmp_path / "sharded"), figures(tmp_path / "replicated"), strict=True):
        assert one == pytest.approx(other, abs=1e-5 if not changes else 2e-2)
    whole = MiniBertForMaskedLM.from_pretrained(tmp_path / "sharded")
    assert whole.lm_head.decoder.weight is whole.minibert.embeddings.word_embeddings.weight
    names = {path.name for path in (tmp_path / "sharded").iterdir()}
    assert names == {path.name for path in (tmp_path / "replicated").iterdir()}


def test_resumes_bit_for_bit(tmp_path, start):
    def interrupted():
        remaining = iter(range(9))

        def make(rows):
            if next(remaining, None) is None:
                raise RuntimeError("crash")
            return collate(rows)

        with pytest.raises(RuntimeError, match="crash"):
            fit(tmp_path / "parts", make=make, fsdp=True)

    assert start.finish(start(2, lambda: fit(tmp_path / "whole", fsdp=True))) == [0, 0]
    assert start.finish(start(2, interrupted)) == [0, 0]
    steps = sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir())
    assert steps[-1] == "step-00000004"
    assert start.finish(start(2, lambda: fit(tmp_path / "parts", fsdp=True))) == [0, 0]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")


def test_a_checkpoint_holds_whole_tensors(tmp_path, start):
    """As many, and of the same shapes, as one process alone writes."""
    assert start.finish(start(2, lambda: fit(tmp_path / "two", fsdp=True, max_steps=2))) == [0, 0]
    fit(tmp_path / "one", max_steps=2)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoints/step-00000002" / name) for run in ("two", "one"))
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="there is one; start with torchrun"):
        fit(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match="fsdp does not go together with precision: fp16; use bf16 or fp32"):
        LoopArguments(fsdp=True, precision="fp16")
    with pytest.raises(ValueError, match="fsdp does not go together with compile"):
        LoopArguments(fsdp=True, compile=True)
    with pytest.raises(ValueError, match="not there for embed"):
        EmbedStage.model_validate({"kind": "embed", "data": "pairs.csv", "fsdp": True})
