"""Encoding for hours: does memory grow, do files stay open, and do several threads with one model get the same vectors?

Rounds of mixed input go through the two ways that texts become vectors: :class:`Encoder` in this process, which lives as long
as the soak, and ``encode_corpus`` into a folder. Texts differ from round to round, so that nothing can hide in a cache; a few
stay, and must have the vectors of the first round in the last one.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertModel, train_wordpiece
from minibert.inference.encode import Encoder
from minibert.search.encode_corpus import encode_corpus

_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
_ODD = ("", " ", "\x00\x1b[0m", "🙂" * 300, "中文 " * 50, "a" * 20_000, "[SEP] [MASK]", "e\u0301\u200d\ufeff", "\t\r\n")
_TOLERANCE = 1e-5


def run(out: Path, work: Path, *, minutes: float, model: str | None, texts: int, threads: int, every: float, seed: int) -> None:
    """Encode for ``minutes``, note memory and open files every ``every`` seconds, print and write ``out``.

    Raises:
        SystemExit: with status 1 when vectors changed, differed between threads, or files were left open.
    """
    work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    disable_progress_bar()
    folder = Path(model) if model else _small_model(work / "model", rng)
    encoder = Encoder(folder, dtype="float32")
    fixed = list(_mixed(rng, 64))
    expected = encoder.encode(fixed)
    process, begin, samples, rounds, encoded = psutil.Process(), time.monotonic(), [], 0, 0
    worst: dict[str, float] = {"threads": 0.0, "last_and_first": 0.0}
    while not rounds or time.monotonic() - begin < 60 * minutes:
        batch = list(_mixed(rng, texts))
        encoder.encode(batch)
        _to_folder(work, folder, batch)
        worst["threads"] = max(worst["threads"], _among_threads(encoder, fixed, expected, threads))
        worst["last_and_first"] = max(worst["last_and_first"], _difference(encoder.encode(fixed), expected))
        rounds, encoded = rounds + 1, encoded + 2 * texts + (threads + 1) * len(fixed)
        if not samples or time.monotonic() - begin - samples[-1]["seconds"] >= every:
            samples.append(_sample(process, begin))
            print(
                "{seconds:>8,.0f} s  {megabytes:>8,.1f} MB  {files:>4} files  {threads:>3} threads".format(**samples[-1]),
                flush=True,
            )
    samples.append(_sample(process, begin))
    results = {
        "benchmark": "soak",
        "machine": describe(),
        "options": {"minutes": minutes, "model": model or "nano", "texts": texts, "threads": threads, "seed": seed},
        "malloc_arena_max": os.environ.get("MALLOC_ARENA_MAX"),  # read by glibc when the process starts
        "rounds": rounds,
        "texts_encoded": encoded,
        "largest_differences": worst,
        **trend(samples),
        "samples": samples,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key not in ("machine", "samples")}, indent=1))
    if max(worst.values()) > _TOLERANCE or results["files_growth"] > 0:
        raise SystemExit(1)


def trend(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth once the first fifth is over, in which allocators and pools fill: of files, and of memory as a straight line.

    >>> line = [{"seconds": 3600.0 * hour, "megabytes": 500.0 + hour, "files": 7, "threads": 3} for hour in range(11)]
    >>> trend(line)
    {'files_growth': 0, 'megabytes_growth': 8.0, 'megabytes_per_hour': 1.0}
    """
    settled = samples[len(samples) // 5 :]
    seconds, memory = np.array([[sample["seconds"], sample["megabytes"]] for sample in settled]).T
    slope = np.polyfit(seconds, memory, 1)[0] * 3600 if np.ptp(seconds) > 0 else 0.0
    return {
        "files_growth": settled[-1]["files"] - settled[0]["files"],
        "megabytes_growth": round(float(memory[-1] - memory[0]), 1),
        "megabytes_per_hour": round(float(slope), 2),
    }


def _sample(process: psutil.Process, begin: float) -> dict[str, float]:
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "megabytes": round(process.memory_info().rss / 2**20, 1),
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def _mixed(rng: random.Random, count: int) -> Iterator[str]:
    """Texts of made-up words, most short and some far longer than a model reads, with odd ones among them."""
    for _ in range(count):
        if rng.random() < 0.1:
            yield rng.choice(_ODD)
            continue
        words = int(min(2000, rng.lognormvariate(2.5, 1.2))) + 1
        yield " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(words))


def _to_folder(work: Path, model: Path, texts: list[str]) -> None:
    file, vectors = work / "texts.jsonl", work / "vectors"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()), encoding="utf-8")
    shutil.rmtree(vectors, ignore_errors=True)
    encode_corpus(model, file, vectors, dtype="float32", rows_per_shard=max(1, len(texts) // 4))


def _among_threads(encoder: Encoder, texts: list[str], expected: np.ndarray, threads: int) -> float:
    """Largest difference from ``expected`` when ``threads`` encode at once with one model, each in an order of its own."""

    def encode(number: int) -> float:
        order = np.random.default_rng(number).permutation(len(texts))
        return _difference(encoder.encode([texts[row] for row in order]), expected[order])

    with ThreadPoolExecutor(threads) as pool:
        return max(pool.map(encode, range(threads)))


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) if np.isfinite(found).all() else float("inf")


def _small_model(folder: Path, rng: random.Random) -> Path:
    tokenizer = train_wordpiece(_mixed(rng, 2000), vocab_size=4000, model_max_length=128, show_progress=False)
    config = MiniBertConfig.preset(
        "modern-6x384",
        **{"vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 256, "max_position_embeddings": 128},
    )
    torch.manual_seed(0)
    MiniBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
