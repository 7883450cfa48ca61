"""Measure how far the vector of a text depends on its batch, the threads, the dtype and the processor.

Each setting is computed in a process of its own, whose environment says which instructions the libraries may use.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.machine import describe
from minibert.inference.encode import Encoder

TEXTS = {"natural_questions_qed": "answer", "squad_sentences": "answer", "medquad": "answer", "stsb": "sentence1"}
_NO_AVX512 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
# What differs -> (options of one setting, options of the other, environment of the other).
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "alone or in a batch, float32": ({"deterministic": True}, {}, {}),
    "alone or in a batch, bfloat16": ({"deterministic": True, "dtype": "bfloat16"}, {"dtype": "bfloat16"}, {}),
    "another order of the texts, float32": ({}, {"reverse": True}, {}),
    "half of the texts, float32": ({}, {"half": True}, {}),
    "one thread or two, float32": ({}, {"threads": 1}, {}),
    "one thread or two, bfloat16": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "threads": 1}, {}),
    "bfloat16 or float32": ({"dtype": "bfloat16"}, {}, {}),
    "a processor without AVX-512 (emulated), float32": ({}, {}, _NO_AVX512),
    "deterministic, half of the texts, float32": ({"deterministic": True}, {"deterministic": True, "half": True}, {}),
    "deterministic, half of the texts, bfloat16": (
        {"deterministic": True, "dtype": "bfloat16"},
        {"deterministic": True, "dtype": "bfloat16", "half": True},
        {},
    ),
    "deterministic, one thread or two, float32": ({"deterministic": True}, {"deterministic": True, "threads": 1}, {}),
}


def run(model: Path, data: Path, out: Path, *, per_set: int, rounds: int) -> None:
    """Compare the vectors of each pair of settings, and time ``deterministic``; print and write ``out``."""
    texts = [text for name, column in TEXTS.items() for text in _sample(data / name / "validation.parquet", column, per_set)]
    results: dict[str, Any] = {"benchmark": "bits", "machine": describe(), "model": model.name, "texts": len(texts)}
    known: dict[str, np.ndarray] = {}

    def vectors(options: dict[str, Any], environment: dict[str, str]) -> np.ndarray:
        key = json.dumps([options, environment], sort_keys=True)
        if key not in known:
            known[key] = _in_a_process(model, texts, options, environment)
        return known[key]

    results["pairs"] = {}
    for name, (one, other, environment) in PAIRS.items():
        first, second = vectors(one, {}), vectors(other, environment)
        rows = slice(None, None, 2) if other.get("half") else slice(None)
        results["pairs"][name] = found = _difference(first[rows], second)
        print(f"{name:50}" + "  ".join(f"{key} {value:.2g}" for key, value in found.items()), flush=True)
    results["price"] = _price(model, texts, rounds)
    print(json.dumps(results["price"]))
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _sample(file: Path, column: str, count: int) -> list[str]:
    found: list[str] = pd.read_parquet(file)[column].drop_duplicates().sample(count, random_state=0).tolist()
    return found


def _difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    worst = np.abs(first - second).max(axis=1)
    cosines = (first.astype(np.float64) * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    return {
        "texts with other bits": int((worst > 0).sum()),
        "worst difference": float(worst.max()),
        "mean difference": float(worst.mean()),
        "worst cosine distance": float(1 - cosines.min()),
    }


def _in_a_process(model: Path, texts: list[str], options: dict[str, Any], environment: dict[str, str]) -> np.ndarray:
    request = json.dumps({"model": str(model), "texts": texts, **options})
    code = "from benchmarks.bits import answer; answer()"
    done = subprocess.run(
        [sys.executable, "-c", code], input=request.encode(), stdout=-1, env=os.environ | environment, check=True
    )
    return np.frombuffer(done.stdout, dtype=np.float32).reshape(-(-len(texts) // (2 if options.get("half") else 1)), -1)


def answer() -> None:
    """Read a request from standard input, and write the vectors to standard output."""
    request = json.load(sys.stdin)
    texts, torch_threads = request.pop("texts"), request.pop("threads", None)
    if torch_threads:
        torch.set_num_threads(torch_threads)
    reverse, half = request.pop("reverse", False), request.pop("half", False)
    texts = texts[::2] if half else texts[::-1] if reverse else texts
    encoder = Encoder(request.pop("model"), **{"dtype": "float32", **request})
    found = encoder.encode(texts)
    sys.stdout.buffer.write((found[::-1] if reverse else found).tobytes())


def _price(model: Path, texts: list[str], rounds: int) -> dict[str, Any]:
    """Time ``deterministic`` compared with batches, in turns: of short, of long and of all texts."""
    words = {text: len(text.split()) for text in texts}
    parts = {
        "short": sorted(texts, key=words.__getitem__)[: len(texts) // 4],
        "long": sorted(texts, key=words.__getitem__)[-len(texts) // 4 :],
    }
    price: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        encoders = [Encoder(model, dtype=dtype, deterministic=alone) for alone in (False, True)]
        for part, some in {**parts, "all": texts}.items():
            seconds: list[list[float]] = [[], []]
            for _ in range(rounds + 1):
                for encoder, found in zip(encoders, seconds, strict=True):
                    start = time.perf_counter()
                    encoder.encode(some)
                    found.append(time.perf_counter() - start)
            usual, alone = (statistics.median(found[1:]) for found in seconds)
            mean = statistics.mean(words[text] for text in some)
            price[f"{dtype}, {part}"] = {"words of a text": round(mean, 1), "times as long": round(alone / usual, 2)}
    return price
