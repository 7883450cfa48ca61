"""Encoding a corpus of generated passages: memory after every shard, speed, with one process and with two.

Passages are drawn from made-up words, so that the tokenizer has work as with text, and cost nothing to generate. The command
that users run is timed from outside; its memory is what the system says the process holds.
"""

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from pyarrow import parquet

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertModel, train_wordpiece

_GROUP = 10_000  # passages generated and written at once


def run(
    out: Path, work: Path, *, passages: int, model: str | None, words: int, rows_per_shard: int, repeats: int, precision: str
) -> None:
    """Encode ``passages`` once for memory, and an eighth of them ``repeats`` times for speed; print and write ``out``.

    Speed is that of one and of two processes of one thread each, in turns. One process of one thread tokenizes in
    another, and so keeps more than a core busy where one is free: it is also run with a single core for all it
    does.
    """
    work.mkdir(parents=True, exist_ok=True)
    corpus = _generate(work / f"passages-{passages}-{words}.parquet", passages, words)
    folder = model or str(_small_model(work / "model", corpus))
    whole = _encode(folder, corpus, work / "vectors", rows_per_shard, precision)
    part = _generate(work / f"passages-{passages // 8}-{words}.parquet", max(2, passages // 8), words)
    # As many shards for either process, so that neither waits.
    rows = -(-max(2, passages // 8) // 8)
    sides: dict[str, dict[str, Any]] = {
        "one_process_one_core": {"processes": 1, "pinned": True},
        "one_process_one_thread": {"processes": 1},
        "two_processes_one_thread_each": {"processes": 2},
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            done = _encode(folder, part, work / f"vectors-{name}", rows, precision, threads=1, **side)
            rates[name].append(done["passages_per_second"])
            print(f"{name.replace('_', ' ')}: {rates[name][-1]:,.0f} passages/s", flush=True)

    def ratio(name: str) -> float:
        pairs = zip(rates[name], rates["two_processes_one_thread_each"], strict=True)
        return round(statistics.median(two / one for one, two in pairs), 3)

    results = {
        "benchmark": "scale",
        "machine": describe(),
        "options": {"passages": passages, "words": words, "model": model or "nano", "rows_per_shard": rows_per_shard},
        "whole": whole,
        **rates,
        "ratio_two_processes_to_one_core": ratio("one_process_one_core"),
        "ratio_two_processes_to_one": ratio("one_process_one_thread"),
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Print the metrics: memory after every shard (every tenth of them where there are many), then speed."""
    memory = results["whole"]["megabytes_after_shard"]
    step = max(1, len(memory) // 10)
    lines = [f"{'shards written':>16}  {'resident MB':>12}"]
    lines += [f"{count:>16,}  {memory[count - 1]:>12,}" for count in sorted({1, *range(step, len(memory) + 1, step)})]
    lines.append(f"growth after the first shard: {memory[-1] - memory[0]:+,} MB")
    lines.append(f"{results['whole']['passages_per_second']:,.0f} passages/s with all threads")
    lines.append(f"two processes of one thread to one on one core: {results['ratio_two_processes_to_one_core']:.2f}")
    lines.append(f"two processes of one thread to one: {results['ratio_two_processes_to_one']:.2f}")
    return "\n".join(lines)


def _generate(file: Path, passages: int, words: int) -> Path:
    """Passages of ``words`` words on average, in a Parquet file that is made once."""
    if file.exists():
        return file
    temporary = file.with_suffix(".tmp")
    with parquet.ParquetWriter(temporary, pa.schema({"text": pa.string()})) as writer:
        for group in _passages(passages, words):
            writer.write_table(pa.table({"text": group}))
    temporary.replace(file)
    return file


def _passages(count: int, words: int) -> Iterator[list[str]]:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)])
    for start in range(0, count, _GROUP):
        lengths = rng.integers(words // 2, words + words // 2 + 1, min(_GROUP, count - start))
        ranks = np.minimum(rng.zipf(1.3, lengths.sum()) - 1, len(vocabulary) - 1)
        yield [" ".join(passage) for passage in np.split(vocabulary[ranks], lengths.cumsum()[:-1])]


def _small_model(folder: Path, corpus: Path) -> Path:
    """A new model of 4 layers and width 128: memory and sharing out do not depend on what it knows."""
    if not (folder / "model.safetensors").exists():
        texts = next(parquet.ParquetFile(corpus).iter_batches(batch_size=_GROUP)).column("text").to_pylist()
        tokenizer = train_wordpiece(texts, vocab_size=8000, model_max_length=128)
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
        config = MiniBertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pooling="mean", **shape)
        MiniBertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def _encode(
    model: str,
    corpus: Path,
    vectors: Path,
    rows_per_shard: int,
    precision: str,
    *,
    processes: int = 1,
    threads: int | None = None,
    pinned: bool = False,
) -> dict[str, Any]:
    """Run ``minibert encode``, if ``pinned`` on one core for all its threads.

    Return what it reports, and with one process the resident memory after every shard.
    """
    module = ["-m", "minibert", "encode", model, str(corpus), str(vectors), "--force", "--json"]
    module += ["--rows-per-shard", str(rows_per_shard), "--precision", precision]
    command = [sys.executable, *module]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, *module]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else dict(os.environ)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    if pinned:
        psutil.Process(child.pid).cpu_affinity([0])
    memory: list[int] = []
    if processes == 1:
        threading.Thread(target=_watch, args=(child.pid, vectors, memory), daemon=True).start()
    output, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {child.returncode}")
    figures = json.loads(output[output.index("{") :])
    return {
        "passages": figures["written"],
        "seconds": figures["seconds"],
        "passages_per_second": round(figures["written"] / figures["seconds"], 1),
        "decisions": figures["decisions"],
        "megabytes_after_shard": memory,
    }


def _watch(pid: int, vectors: Path, memory: list[int]) -> None:
    """Append the resident MB of process ``pid`` at every new shard, until it ends."""
    while (vectors / "manifest.json").exists() and json.loads((vectors / "manifest.json").read_text())["complete"]:
        time.sleep(0.01)  # the vectors of an earlier run, not yet replaced
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if len(list(vectors.glob("part-*.parquet"))) > len(memory):
                memory.append(process.memory_info().rss // 2**20)
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        pass
