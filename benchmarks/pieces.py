"""The pieces of a training step that we do otherwise than torch, beside torch's own, forward and backward."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe
from minibert.modeling_minibert import Packing, drop


def run(out: Path, *, repeats: int) -> None:
    """Time each pair of pieces, interleaved; print medians in milliseconds and write ``out``."""
    torch.manual_seed(0)
    results = {"benchmark": "pieces", "machine": describe(), "repeats": repeats, "milliseconds": {}}
    for name, pair in {**_dropout(), **_attention()}.items():
        seconds: dict[str, list[float]] = {side: [] for side in pair}
        for _ in range(repeats + 2):
            for side, piece in pair.items():
                started = time.perf_counter()
                piece()
                seconds[side].append(time.perf_counter() - started)
        figures = {side: round(statistics.median(times[2:]) * 1000, 3) for side, times in seconds.items()}
        ratios = [ours / theirs for ours, theirs in zip(seconds["minibert"][2:], seconds["torch"][2:], strict=True)]
        results["milliseconds"][name] = {**figures, "ratio_median": round(statistics.median(ratios), 3)}
        print(f"{name:44}" + "".join(f"{key:>14} {value:9.3f}" for key, value in results["milliseconds"][name].items()))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _backward(forward: Callable[[Tensor], Tensor], states: Tensor) -> Callable[[], None]:
    def piece() -> None:
        states.grad = None
        forward(states).sum().backward()

    return piece


def _dropout() -> dict[str, dict[str, Callable[[], None]]]:
    states = torch.randn(8400, 256, requires_grad=True)
    ours, theirs = _backward(lambda x: drop(x, 0.1), states), _backward(lambda x: F.dropout(x, 0.1), states)
    return {"dropout of (8400, 256)": {"minibert": ours, "torch": theirs}}


def _attention() -> dict[str, dict[str, Callable[[], None]]]:
    """64 passages of 10 to 350 tokens, 4 heads of width 64: packed by us, padded to the longest for torch's SDPA."""
    lengths = torch.distributions.LogNormal(4.7, 0.6).sample((64,)).int().clamp(10, 350).sort().values
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    packing = Packing(None, lengths.tolist(), None, longest)
    packed = torch.randn(int(lengths.sum()), 4, 64, requires_grad=True)
    padded = torch.randn(64, 4, longest, 64, requires_grad=True)
    pieces = {}
    for dropout in (0.0, 0.1):
        pieces[f"attention of 64 passages, dropout {dropout}"] = {
            "minibert": _backward(lambda x, p=dropout: packing.attend(x, x, x, p, 0.125), packed),
            "torch": _backward(lambda x, p=dropout: F.scaled_dot_product_attention(x, x, x, mask, p, scale=0.125), padded),
        }
    return pieces
