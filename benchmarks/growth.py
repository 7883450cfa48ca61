"""Measure how the cost of encoding grows: with texts, their length, tokens computed at once, and width.

Models have new weights, which cost what trained ones do, and texts are made-up words of one token each, so that lengths are
exact. The peer is transformers' BertModel with the same weights and numbers, through sentence-transformers.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.encode import new_bert
from benchmarks.machine import describe
from minibert import MiniBertConfig, train_word_level
from minibert.inference.encode import Encoder

WIDTH, LAYERS, POSITIONS = 256, 4, 512
# What one point of each curve encodes: (texts, tokens of each, tokens at once for us, width).
CURVES: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "texts in a call": {n: (n, 32, 4096, WIDTH) for n in (1, 4, 16, 64, 256, 1024)},
    "tokens of a text": {n: (max(8, 8192 // n), n, 4096, WIDTH) for n in (8, 16, 32, 64, 128, 256, 512)},
    "tokens computed at once": {n: (512, 32, n, WIDTH) for n in (32, 128, 512, 2048, 8192)},
    "width of the model": {n: (256, 32, 4096, n) for n in (64, 128, 256, 512, 1024)},
}
# What a point is divided by: the whole call, a text, or a token.
_PER = {"texts in a call": "call", "tokens of a text": "text", "tokens computed at once": "text", "width of the model": "text"}
_WORDS = ["".join((a, b, c)) for a in "bdfgklmnprstvz" for b in "aeiou" for c in "klmnprst"]


def run(out: Path, work: Path, *, repeats: int, dtype: str) -> None:
    """Measure every point of all curves, us and the peer in turns; print and write ``out``."""
    rng = np.random.default_rng(0)
    systems = {width: _systems(work / f"width-{width}", width, dtype) for width in sorted(_widths())}
    results: dict[str, Any] = {"benchmark": "growth", "machine": describe(), "dtype": dtype, "repeats": repeats, "curves": {}}
    for curve, points in CURVES.items():
        rows = []
        for value, (texts, tokens, at_once, width) in points.items():
            batch = [" ".join(rng.choice(_WORDS, tokens - 2)) for _ in range(texts)]  # [CLS] and [SEP] are tokens too
            ours, theirs = systems[width]
            ours.batch_tokens = at_once
            options = {"batch_size": max(1, at_once // tokens), "show_progress_bar": False}
            calls = {"minibert": partial(ours.encode, batch), "bert": partial(theirs.encode, batch, **options)}
            seconds = _times(calls, repeats)
            per = texts if _PER[curve] == "text" else 1
            rows.append({"value": value, **{name: 1e3 * statistics.median(found) / per for name, found in seconds.items()}})
            print(f"{curve:>26} {value:>6}" + "".join(f"  {name} {rows[-1][name]:>10.3f} ms" for name in calls), flush=True)
        results["curves"][curve] = {"milliseconds_per": _PER[curve], "points": rows, "slopes": slopes(rows)}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for curve, found in results["curves"].items():
        print(f"{curve:>26}: " + ", ".join(f"{name} grows as its power {slope:.2f}" for name, slope in found["slopes"].items()))


def slopes(rows: list[dict[str, float]]) -> dict[str, float]:
    """The power of the value that milliseconds grow with, over the upper half of the points, where fixed costs are small.

    >>> slopes([{"value": n, "minibert": 3.0 * n**2} for n in (1, 2, 4, 8)])
    {'minibert': 2.0}
    """
    upper = rows[len(rows) // 2 :] if len(rows) > 3 else rows
    values = np.log([row["value"] for row in upper])
    names = [name for name in rows[0] if name != "value"]
    return {name: round(float(np.polyfit(values, np.log([row[name] for row in upper]), 1)[0]), 2) for name in names}


def draw(results: Path, out: Path) -> None:
    """Both on logarithmic axes, where a power is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text(encoding="utf-8"))
    figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    names = {"minibert": "minibert.encode", "bert": "BertModel"}
    for axes, (curve, data) in zip(grid.flat, found["curves"].items(), strict=True):
        for name, label in names.items():
            values = [point["value"] for point in data["points"]]
            axes.plot(
                values,
                [point[name] for point in data["points"]],
                marker="o",
                label=f"{label}, power {data['slopes'][name]:.2f}",
            )
        axes.set(xscale="log", yscale="log", xlabel=curve, ylabel=f"milliseconds per {data['milliseconds_per']}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"Cost of encoding, {found['dtype']}, {found['machine']['threads']} threads of {found['machine']['processor']}"
    )
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _widths() -> set[int]:
    return {width for points in CURVES.values() for *_, width in points.values()}


def _systems(folder: Path, width: int, dtype: str) -> tuple[Encoder, SentenceTransformer]:
    tokenizer = train_word_level([" ".join(_WORDS)], vocab_size=len(_WORDS) + 5, model_max_length=POSITIONS)
    shape = {"hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": width // 32}
    sizes = {"vocab_size": len(tokenizer), "intermediate_size": 4 * width, "max_position_embeddings": POSITIONS}
    bert = new_bert(MiniBertConfig.preset("bert-base", **shape, **sizes, pooling="mean"), tokenizer, folder, dtype=dtype)
    return Encoder(folder, dtype=dtype, device="cpu"), bert


def _times(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds
