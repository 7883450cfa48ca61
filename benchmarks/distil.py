"""Measure what students keep of their teacher: vectors on data none was trained on, sizes, and texts per second, side by side.

All are encoded by the same code (:class:`Encoder`, which ``minibert.encode`` is), in turns, so that the ratios of speed are
those of the models alone.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import transformers
from sentence_transformers import SentenceTransformer

from benchmarks.encode import read_texts
from benchmarks.machine import describe
from benchmarks.train import held_out_figures
from minibert.inference.encode import Encoder

# Validation data, and the figure that a student is to keep.
KEPT = {"stsb": ("spearman",), "natural_questions_qed": ("ndcg@10",), "squad_sentences": ("ndcg@10",)}


def run(data: Path, teacher: Path, students: list[Path], out: Path, *, queries: int | None, limit: int, repeats: int) -> None:
    """Measure ``teacher`` and ``students`` on the validation data of ``KEPT``, time them in turns, write ``out``."""
    transformers.logging.set_verbosity_error()
    folders = [teacher, *students]
    rows: list[dict[str, Any]] = [{"model": _name(folder), "role": "student"} for folder in folders]
    rows[0]["role"] = "teacher"
    for row, folder in zip(rows, folders, strict=True):
        encoder = SentenceTransformer(str(folder), device="cpu")
        row |= _sizes(encoder) | held_out_figures(data, encoder, KEPT, queries=queries)
        row |= {f"{name}_kept": row[name] / rows[0][name] for name in _figure_names()}
    for row, seconds in zip(rows, seconds_in_turns(folders, read_texts(None, limit), repeats), strict=True):
        row["texts_per_second"] = limit / statistics.median(seconds)
        row["seconds"] = seconds
        row["speed_of_teacher"] = statistics.median(a / b for a, b in zip(rows[0]["seconds"], seconds, strict=True))
    options = {"queries": queries, "texts": limit, "repeats": repeats}
    results = {"benchmark": "distil", "machine": describe(), "options": options, "models": rows}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _print_table(rows)


def _name(folder: Path) -> str:
    """The run of a stage folder, or the folder's own name."""
    return folder.parent.name if folder.name[:1].isdigit() else folder.name


def _figure_names() -> list[str]:
    return [f"{name}_{figure}" for name, figures in KEPT.items() for figure in figures]


def _sizes(encoder: SentenceTransformer) -> dict[str, int]:
    model = encoder[0].auto_model
    everything, layers = (sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.layers))
    return {"layers": model.config.num_hidden_layers, "parameters": everything, "encoder_parameters": layers}


def seconds_in_turns(folders: list[Path], texts: list[str], repeats: int) -> list[list[float]]:
    """Seconds of every model for the same texts, in turns, after a round that is not counted."""
    encoders = [Encoder(folder, device="cpu") for folder in folders]
    seconds: list[list[float]] = [[] for _ in encoders]
    for turn in range(repeats + 1):
        for encoder, taken in zip(encoders, seconds, strict=True):
            started = time.perf_counter()
            encoder.encode(texts)
            if turn:
                taken.append(time.perf_counter() - started)
    return seconds


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = _figure_names()
    print(f"{'':28}{'layers':>8}{'encoder':>12}" + "".join(f"{name:>32}" for name in names) + f"{'speed':>8}")
    for row in rows:
        kept = "".join(f"{row[name]:>22.4f} ({row[f'{name}_kept']:6.1%})" for name in names)
        print(f"{row['model']:28}{row['layers']:>8}{row['encoder_parameters']:>12,}{kept}{row['speed_of_teacher']:>7.2f}x")


__all__ = ["run"]
