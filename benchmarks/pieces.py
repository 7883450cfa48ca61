"""Compare pieces of a training step (forward and backward) and of encoding with torch's own.

A step is also measured with and without the memory that training keeps.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertModel
from minibert.inference.cpu import PrepackedLinear, product_rates
from minibert.kernels_minibert import dropout, linear
from minibert.loss_minibert import FusedMaskedLMLoss
from minibert.packing_minibert import Packing, exp2_attention_forward
from minibert.train.loop import keep_memory


def run(out: Path, *, repeats: int) -> None:
    """Time each pair of pieces, interleaved; print medians in milliseconds and write ``out``."""
    torch.manual_seed(0)
    results = {"benchmark": "pieces", "machine": describe(), "repeats": repeats, "milliseconds": {}}
    pieces = (_dropout, _attention, _half_attention, _encoding_attention, _powers, _word_loss, _products, _mlps)
    pairs = {name: pair for piece in pieces for name, pair in piece().items()}
    started = time.perf_counter()
    results["product_gflops"] = {name: round(rate, 1) for name, rate in product_rates().items()}
    results["product_gflops_measured_in_ms"] = round(1000 * (time.perf_counter() - started), 1)
    rates = ", ".join(f"{rate:.0f} in {name}" for name, rate in results["product_gflops"].items())
    print(f"GFLOP/s: {rates}; measured in {results['product_gflops_measured_in_ms']} ms")
    for name, pair in pairs.items():
        seconds: dict[str, list[float]] = {side: [] for side in pair}
        for _ in range(repeats + 2):
            for side, piece in pair.items():
                started = time.perf_counter()
                piece()
                seconds[side].append(time.perf_counter() - started)
        _add(results, name, {side: times[2:] for side, times in seconds.items()})
    _add(results, "step of 256 texts of 128 tokens, bfloat16", _steps(min(repeats, 3)))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _add(results: dict[str, Any], name: str, seconds: dict[str, list[float]]) -> None:
    figures = {side: round(statistics.median(times) * 1000, 3) for side, times in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["minibert"], seconds["torch"], strict=True)]
    results["milliseconds"][name] = {**figures, "ratio_median": round(statistics.median(ratios), 3)}
    print(f"{name:44}" + "".join(f"{key:>14} {value:9.3f}" for key, value in results["milliseconds"][name].items()))


def _steps(repeats: int) -> dict[str, list[float]]:
    """Seconds of a training step in processes of their own, in turns: with freed memory kept, and as glibc does by itself."""
    seconds: dict[str, list[float]] = {"minibert": [], "torch": []}
    for _ in range(repeats):
        for side, times in seconds.items():
            command = [sys.executable, "-m", "benchmarks.pieces", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            times += json.loads(done.stdout)
    return seconds


def _time_steps(side: str) -> list[float]:
    if side == "minibert":
        keep_memory()
    torch.manual_seed(0)
    model = MiniBertModel(MiniBertConfig.preset("simple-4x256", vocab_size=1000)).train()
    ids = torch.randint(5, 1000, (256, 128))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids).last_hidden_state.float().square().mean().backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _backward(forward: Callable[[Tensor], Tensor], states: Tensor) -> Callable[[], None]:
    def piece() -> None:
        states.grad = None
        forward(states).sum().backward()

    return piece


def _half_attention() -> dict[str, dict[str, Callable[[], None]]]:
    """64 sequences of 128 tokens in bfloat16, as in pretraining: no padding on either side."""
    packing = Packing.of_lengths([128] * 64)
    packed = torch.randn(64 * 128, 4, 64).bfloat16().requires_grad_()
    padded = torch.randn(64, 4, 128, 64).bfloat16().requires_grad_()
    ours = _backward(lambda x: packing.attend(x, x, x, 0.0, 0.125).float(), packed)
    theirs = _backward(lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.125).float(), padded)
    return {"attention of 64 full sequences, bfloat16": {"minibert": ours, "torch": theirs}}


def _encoding_attention() -> dict[str, dict[str, Callable[[], None]]]:
    """Return both attentions of 4,096 tokens in sequences of equal length, 12 heads of width 32, in bfloat16.

    One uses powers of two, as processors without AMX do; the other is torch's kernel. Neither computes gradients.
    """
    pieces = {}
    for length in (16, 64, 256, 1024):
        packed = torch.randn(3, 4096, 12, 32).bfloat16().unflatten(1, (-1, length)).transpose(2, 3)
        contiguous = packed.contiguous()
        pieces[f"attention of 4,096 tokens by {length}, encoding"] = {
            "minibert": torch.no_grad()(lambda x=packed: exp2_attention_forward(*x, None, 0.18)),
            "torch": torch.no_grad()(lambda x=contiguous: F.scaled_dot_product_attention(*x, scale=0.18)),
        }
    return pieces


def _powers() -> dict[str, dict[str, Callable[[], None]]]:
    """Rows of 64 scores, as many as attention holds at once: a softmax, and the powers of two that stand in for it."""
    scores = torch.randn(2**15, 64).bfloat16()
    powers = torch.empty_like(scores)
    return {
        "softmax of 2**21 scores, bfloat16": {
            "minibert": lambda: torch.exp2(scores, out=powers),
            "torch": lambda: F.softmax(scores, dim=-1),
        }
    }


def _word_loss() -> dict[str, dict[str, Callable[[], None]]]:
    """Cross entropy of 1,230 masked words (15 % of 64 x 128) among 30,000, with the product that makes their logits."""
    hidden = torch.randn(1230, 256, requires_grad=True)
    weight = (torch.randn(30000, 256) * 0.02).requires_grad_()
    bias, labels = torch.zeros(30000, requires_grad=True), torch.randint(0, 30000, (1230,))

    def ours(states: Tensor) -> Tensor:
        weight.grad = bias.grad = None
        return FusedMaskedLMLoss.apply(states.bfloat16(), weight.bfloat16(), bias, labels)

    def theirs(states: Tensor) -> Tensor:
        weight.grad = bias.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = F.linear(states, weight, bias)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    return {"loss of 1230 words of 30000, bfloat16": {"minibert": _backward(ours, hidden), "torch": _backward(theirs, hidden)}}


def _dropout() -> dict[str, dict[str, Callable[[], None]]]:
    states = torch.randn(8400, 256, requires_grad=True)
    ours, theirs = _backward(lambda x: dropout(x, 0.1), states), _backward(lambda x: F.dropout(x, 0.1), states)
    return {"dropout of (8400, 256)": {"minibert": ours, "torch": theirs}}


def _attention() -> dict[str, dict[str, Callable[[], None]]]:
    """64 passages of 10 to 350 tokens, 4 heads of width 64: packed by us, padded to the longest for torch's SDPA."""
    lengths = torch.distributions.LogNormal(4.7, 0.6).sample((64,)).int().clamp(10, 350).sort().values
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    packing = Packing.of_lengths(lengths.tolist())
    packed = torch.randn(int(lengths.sum()) + packing.extra, 4, 64, requires_grad=True)
    padded = torch.randn(64, 4, longest, 64, requires_grad=True)
    pieces = {}
    for probability in (0.0, 0.1):
        pieces[f"attention of 64 passages, dropout {probability}"] = {
            "minibert": _backward(lambda x, p=probability: packing.attend(x, x, x, p, 0.125), packed),
            "torch": _backward(lambda x, p=probability: F.scaled_dot_product_attention(x, x, x, mask, p, scale=0.125), padded),
        }
    return pieces


def _products() -> dict[str, dict[str, Callable[[], None]]]:
    """One product of 4,096 rows without gradients, where this processor decides how it is computed."""
    pieces = {}
    for dtype in (torch.float32, torch.bfloat16):
        module, states = nn.Linear(384, 1536).to(dtype), torch.randn(4096, 384)

        @torch.no_grad()
        def ours(module: nn.Linear = module, states: Tensor = states) -> None:
            linear(module, states)

        @torch.no_grad()
        def theirs(module: nn.Linear = module, states: Tensor = states) -> None:
            module(states.to(module.weight.dtype))

        name = str(dtype).removeprefix("torch.")
        pieces[f"product of 4,096 rows, matrix in {name}"] = {"minibert": ours, "torch": theirs}
    return pieces


def _mlps() -> dict[str, dict[str, Callable[[], None]]]:
    """Return ways to compute the MLPs of six layers of width 384, for the rows of one query and of a full batch.

    The matrices are the modules' own, prepacked, or (for a query in float32) copies in float16. None computes gradients.
    """
    pieces, act = {}, GELUActivation()
    for dtype, rows in ((torch.bfloat16, 12), (torch.bfloat16, 4096), (torch.float32, 12)):
        linears = [(nn.Linear(384, 1536).to(dtype), nn.Linear(1536, 384).to(dtype)) for _ in range(6)]
        states = torch.randn(rows, 384).to(dtype)

        @torch.no_grad()
        def own(linears: list[Any] = linears, states: Tensor = states) -> None:
            for up, down in linears:
                linear(down, linear(up, states, act))

        @torch.no_grad()
        def laid_out(linears: list[Any], states: Tensor = states) -> None:
            for up, down in linears:
                down(up(states))

        @torch.no_grad()
        def theirs(linears: list[Any] = linears, states: Tensor = states) -> None:
            for up, down in linears:
                down(F.gelu(up(states)))

        name = f"6 MLPs of {rows} rows, {str(dtype).removeprefix('torch.')}"
        pieces[name] = {"minibert": own, "torch": theirs}
        for halve in (False, True) if dtype == torch.float32 else (False,):
            packed = partial(PrepackedLinear, half_copies=halve)
            ready = [(packed(up, gelu=True), packed(down)) for up, down in linears]
            how = "float16 copies" if halve else "prepacked"
            pieces[f"{name}, {how}"] = {"minibert": partial(laid_out, ready), "torch": theirs}
    return pieces


if __name__ == "__main__":
    print(json.dumps(_time_steps(sys.argv[1])))
