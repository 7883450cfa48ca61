"""Encoding for a long time in many threads: does memory grow, do files stay open, are vectors those of one thread?

Threads encode with one :class:`Encoder` all the time. Meanwhile the main thread opens, converts and searches models, and
encodes a corpus into a folder. Texts differ from round to round, so that nothing can hide in a cache; a few stay, and must
have the same vectors always.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertModel, train_wordpiece
from minibert.hub.convert import convert
from minibert.inference.encode import Encoder
from minibert.search.encode_corpus import encode_corpus
from minibert.search.search import FolderSearcher, Searcher

_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
_ODD = ("", " ", "\x00\x1b[0m", "🙂" * 300, "中文 " * 50, "a" * 20_000, "[SEP] [MASK]", "e\u0301\u200d\ufeff", "\t\r\n")


def run(out: Path, work: Path, *, minutes: float, model: str | None, texts: int, threads: int, every: float, seed: int) -> None:
    """Encode for ``minutes``, note memory and open files every ``every`` seconds, print and write ``out``.

    Raises:
        SystemExit: with status 1 when vectors changed, files were left open, or a signal did not end the work.
    """
    work.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    disable_progress_bar()
    folder = Path(model) if model else _small_model(work / "model", rng)
    bert = _small_bert(work / "bert", folder)
    encoder = Encoder(folder, dtype="float32")
    fixed = list(_mixed(rng, 64))
    expected = encoder.encode(fixed)
    process, begin, samples, rounds = psutil.Process(), time.monotonic(), [], 0
    stop, differences, encoded = threading.Event(), [0.0] * threads, [0] * threads
    arguments = (encoder, fixed, expected, stop, differences, encoded)
    workers = [threading.Thread(target=_encode_until, args=(number, *arguments)) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        while not rounds or time.monotonic() - begin < 60 * minutes:
            _meanwhile(work, folder, bert, list(_mixed(rng, texts)))
            rounds += 1
            if not samples or time.monotonic() - begin - samples[-1]["seconds"] >= every:
                samples.append(now := _sample(process, begin))
                print(
                    "{seconds:>8,.0f} s  {megabytes:>8,.1f} MB  {files:>4} files  {threads:>3} threads".format(**now),
                    flush=True,
                )
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    samples.append(_sample(process, begin))
    results = {
        "benchmark": "soak",
        "machine": describe(),
        "options": {"minutes": minutes, "model": model or "nano", "texts": texts, "threads": threads, "seed": seed},
        "malloc_arena_max": os.environ.get("MALLOC_ARENA_MAX"),  # read by glibc when the process starts
        "rounds": rounds,
        "texts_encoded": sum(encoded),
        "largest_difference": max(differences),
        **trend(samples),
        "seconds_to_end": {} if minutes < 1 else {name: _seconds_to_end(name, work) for name in ("SIGINT", "SIGTERM")},
        "samples": samples,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in results.items() if key not in ("machine", "samples")}, indent=1))
    if max(differences) or results["files_growth"] > 0 or max(results["seconds_to_end"].values(), default=0) > 2:
        raise SystemExit(1)


def _encode_until(
    number: int,
    encoder: Encoder,
    texts: list[str],
    expected: np.ndarray,
    stop: threading.Event,
    differences: list[float],
    encoded: list[int],
) -> None:
    """Encode fixed texts and new ones, until ``stop`` is set. Note the largest difference from ``expected``."""
    rng = random.Random(number)
    while not stop.is_set():
        found = encoder.encode(texts)
        differences[number] = max(differences[number], _difference(found, expected))
        encoder.encode(new := list(_mixed(rng, 64)))
        encoded[number] += len(texts) + len(new)


def _meanwhile(work: Path, folder: Path, bert: Path, texts: list[str]) -> None:
    """Encode a corpus into a folder and search it, convert a model, open the result and search with it."""
    _to_folder(work, folder, texts)
    FolderSearcher(work / "vectors", trust_remote_code=False).search(["a query", "another"], top_k=3)
    shutil.rmtree(work / "converted", ignore_errors=True)
    convert(bert, work / "converted")
    Searcher(work / "converted", [text for text in texts if text.strip()][:50]).search(["a query"], top_k=3)


def _seconds_to_end(name: str, work: Path) -> float:
    """Start a soak, send it a signal in the middle, and return the seconds until it has ended."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "soak",
        "--minutes",
        "0.5",
        "--work",
        work / name,
        "--out",
        work / f"{name}.json",
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(25)
    child.send_signal(getattr(signal, name))
    start = time.monotonic()
    child.wait(timeout=60)
    return round(time.monotonic() - start, 2)


def trend(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth of open files, and of memory: its mean in the last two minutes by that of minutes 2 to 4.

    >>> line = [{"seconds": 30.0 * at, "megabytes": 500.0 + at, "files": 7, "threads": 3} for at in range(21)]
    >>> trend(line)
    {'files_growth': 0, 'memory_growth': 1.024}
    """
    first = [sample for sample in samples if 120 <= sample["seconds"] <= 240] or samples[:1]
    last = [sample for sample in samples if sample["seconds"] >= samples[-1]["seconds"] - 120]
    memory = [float(np.mean([sample["megabytes"] for sample in part])) for part in (first, last)]
    return {
        "files_growth": int(last[-1]["files"] - first[0]["files"]),
        "memory_growth": round(memory[1] / memory[0], 3),
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


def _small_bert(folder: Path, tokenizer: Path) -> Path:
    shutil.copytree(
        tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "config.json"), dirs_exist_ok=True
    )
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=4000, **size)).save_pretrained(folder)
    return folder
