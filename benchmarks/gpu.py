"""Encoding and training on a GPU, compared with transformers' BertModel: the same weights, the same batches of mixed lengths.

Weights are new and tokens random, so nothing is downloaded. The peer pads, and is measured with each attention that is
there: torch's (sdpa) and, where the flash-attn package is installed, flash_attention_2. On a CPU it only shows that it runs.
"""

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertForMaskedLM
from minibert.hub.families import FAMILIES

_VOCABULARY = 30_522


def run(
    out: Path, *, presets: list[str], device: str, sequences: int, longest: int, masked: float, repeats: int, layers: int | None
) -> None:
    """Measure every preset, print ratios and the share of the card's own bfloat16 rate, and write ``out``."""
    rate = product_rate(device, repeats)
    results: dict[str, Any] = {"benchmark": "gpu", "machine": describe(), "bfloat16_flops_per_second": rate, "presets": {}}
    print(f"bfloat16 products: {rate / 1e12:,.1f} TFLOP/s")
    for preset in presets:
        found = _preset(preset, device, sequences, longest, masked, repeats, layers)
        flops = found.pop("training_flops_at_longest")
        found["utilisation_at_longest"] = flops / found["seconds"]["train, equal lengths"]["minibert"] / rate
        results["presets"][preset] = found
        for task, seconds in found["seconds"].items():
            times = "  ".join(f"{name} {1e3 * value:9.2f} ms" for name, value in seconds.items())
            print(f"{preset:>14}  {task:<22} {times}")
        print(f"{preset:>14}  ratios {found['ratios']}, worst cosine {found['worst_cosine']:.5f}")
        print(f"{preset:>14}  {found['utilisation_at_longest']:.1%} of the card's rate at length {longest}")
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def product_rate(device: str, repeats: int) -> float:
    """FLOP/s of one large bfloat16 product, the fastest of ``repeats``."""
    size = 8192 if device != "cpu" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _times({"product": lambda: left @ right}, device, repeats + 3)["product"]
    return 2 * size**3 / min(seconds)


def mixed_lengths(sequences: int, longest: int) -> Tensor:
    """(sequences,) lengths as passages have them: log-normal about an eighth of the longest, one of them the longest.

    >>> mixed_lengths(6, 512).max()
    tensor(512)
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(sequences).log_normal_(math.log(longest / 8), 0.8, generator=generator)
    drawn[0] = longest
    return drawn.long().clamp(8, longest)


def training_flops(model: nn.Module, config: MiniBertConfig, sequences: int, length: int, predicted: int) -> float:
    """Of one step at equal lengths, forward and twice that backward: matrices, attention, and words of masked places."""
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    tokens = sequences * length
    attention = 4 * config.num_hidden_layers * config.hidden_size * sequences * length**2
    words = 2 * predicted * config.hidden_size * (config.vocab_size + config.hidden_size)
    return 3.0 * (2 * layers * tokens + attention + words)


def _preset(
    preset: str, device: str, sequences: int, longest: int, masked: float, repeats: int, layers: int | None
) -> dict[str, Any]:
    shape = {"num_hidden_layers": layers} if layers else {}
    # BERT's own kind of layers whatever the preset, so that the peer can have the same weights.
    kept = MiniBertConfig.preset(preset)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    same = {name: getattr(kept, name) for name in sizes} | shape
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = MiniBertConfig.preset("bert-base", **same, **dropout, vocab_size=_VOCABULARY, max_position_embeddings=longest)
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"minibert": MiniBertForMaskedLM(config)}
    for attention in ["sdpa", *(["flash_attention_2"] if _has_flash(device) else [])]:
        models[f"bert, {attention}"] = _peer(models["minibert"], config, same | dropout, attention)
    lengths = {"mixed lengths": mixed_lengths(sequences, longest), "equal lengths": torch.full((sequences,), longest)}
    batches = {name: _batch(found, masked, device) for name, found in lengths.items()}
    seconds, memory, cosines = {}, {}, []
    for name, batch in batches.items():
        for task, call in (("encode", _encode), ("train", _train)):
            calls = {side: call(model, batch, device) for side, model in models.items()}
            if task == "encode":
                ours, *others = (call() for call in calls.values())
                cosines += [float((ours * other).sum(-1).min()) for other in others]
            times = _times(calls, device, repeats)
            seconds[f"{task}, {name}"] = {side: statistics.median(found) for side, found in times.items()}
            if device != "cpu":
                memory[f"{task}, {name}"] = {side: _peak(one) for side, one in calls.items()}
    predicted = int((batches["equal lengths"]["labels"] != -100).sum())
    return {
        "lengths": lengths["mixed lengths"].tolist(),
        "seconds": seconds,
        "peak_bytes": memory,
        "worst_cosine": min(cosines),
        "ratios": {
            task: round(min(value for side, value in found.items() if side != "minibert") / found["minibert"], 2)
            for task, found in seconds.items()
        },
        "training_flops_at_longest": training_flops(models["minibert"], config, sequences, longest, predicted),
    }


def _peer(ours: nn.Module, config: MiniBertConfig, same: dict[str, Any], attention: str) -> nn.Module:
    """Return transformers' model with the weights of ``ours``."""
    theirs = transformers.BertConfig(
        **same, vocab_size=_VOCABULARY, max_position_embeddings=config.max_position_embeddings, hidden_act=config.hidden_act
    )
    theirs._attn_implementation = attention
    model = transformers.BertForMaskedLM(theirs)
    weights, family = ours.state_dict(), FAMILIES["bert"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[family.minibert_name(name, "ForMaskedLM")])
    return model


def _batch(lengths: Tensor, masked: float, device: str) -> dict[str, Tensor]:
    longest = int(lengths.max())
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(1000, _VOCABULARY, mask.shape, generator=generator) * mask
    chosen = (torch.rand(mask.shape, generator=generator) < masked) & mask
    chosen[:, 0] = True  # so that there is a loss
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(chosen, ids, -100)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _encode(model: nn.Module, batch: dict[str, Tensor], device: str) -> Callable[[], Any]:
    """Vectors of a batch in bfloat16, mean of the tokens."""
    encoder: Any = model.base_model.to(device, torch.bfloat16).eval()
    mask = batch["attention_mask"]

    @torch.inference_mode()
    def call() -> Tensor:
        states = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    return call


def _train(model: nn.Module, batch: dict[str, Tensor], device: str) -> Callable[[], Any]:
    """One step of masked words: float32 weights, bfloat16 products, AdamW."""
    model.to(device, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device != "cpu")

    def call() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def _times(calls: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, in turns, after two that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if round_ > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _has_flash(device: str) -> bool:
    return device != "cpu" and importlib.util.find_spec("flash_attn") is not None
