"""Memory while a corpus is tokenized and read, against its size: generated text of two sizes, each in its own process."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.machine import describe


def run(out: Path, work: Path, *, megabytes: list[int]) -> None:
    """Write texts of each size, tokenize and read them, and report the peak memory of all processes involved."""
    rows = []
    for size in megabytes:
        folder = work / str(size)
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / "corpus.txt"
        if not text.exists() or text.stat().st_size < size * 2**20:
            _generate(text, size * 2**20)
        caches = {"HF_DATASETS_CACHE": str(folder / "datasets")}
        shutil.rmtree(folder / "datasets", ignore_errors=True)  # or nothing would be read or tokenized
        shutil.rmtree(folder / "cache", ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.corpus", str(text), str(folder / "cache")]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | caches)
        peak = _watch(child)
        output, _ = child.communicate()
        if child.returncode:
            raise SystemExit(f"reading {text} failed with status {child.returncode}")
        rows.append({"megabytes": size, "peak_private_megabytes": peak, **json.loads(output.splitlines()[-1])})
        print(json.dumps(rows[-1]), flush=True)
        out.write_text(
            json.dumps({"benchmark": "corpus", "machine": describe(), "runs": rows}, indent=1) + "\n", encoding="utf-8"
        )


def _generate(path: Path, size: int) -> None:
    """Paragraphs of words drawn from 50,000 made-up ones by Zipf's law, an empty line between them."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(50_000)])
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            ranks = np.minimum(rng.zipf(1.2, 200_000) - 1, len(words) - 1)
            for paragraph in np.split(words[ranks], 1000):
                file.write(". ".join(" ".join(sentence) for sentence in np.split(paragraph, 10)) + ".\n\n")


def _watch(child: subprocess.Popen) -> int:
    """Highest sum of the unshared, not file-backed memory of a process and its children, in MiB."""
    peak, process = 0, psutil.Process(child.pid)
    done = threading.Event()
    threading.Thread(target=lambda: (child.wait(), done.set()), daemon=True).start()
    while not done.is_set():
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(_private(one.pid) for one in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.01)  # a peak may be short
    return peak // 2**20


def _private(pid: int) -> int:
    """Bytes of a process that are its own and would need swap: pages of mapped files can be dropped at any time."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


def _read(text: str, cache: str) -> None:
    """Tokenize, then read a thousand batches; prints what was found as JSON."""
    from minibert import train_wordpiece
    from minibert.data.source import DataSource
    from minibert.data.tokenized_corpus import load_corpus
    from minibert.train.arguments import PretrainStage
    from minibert.train.loop import Phase, Steps
    from minibert.train.stages.pretrain import Masking, PackedRows

    with open(text, encoding="utf-8") as lines:
        tokenizer = train_wordpiece((line for line, _ in zip(lines, range(20_000), strict=False)), vocab_size=20_000)
    started = time.perf_counter()
    corpus = load_corpus([DataSource(path=text)], tokenizer, cache_dir=cache)
    tokenized = time.perf_counter() - started
    stage = PretrainStage(kind="pretrain", data=[DataSource(path=text)])
    rows = PackedRows(corpus, 128, Masking(tokenizer, stage))
    steps = Steps([Phase(rows, 64, 1e-3)], accumulation=1, seed=0, process=0, processes=1)
    started = time.perf_counter()
    for step in range(1000):
        steps[step]
    figures = {
        "tokens": int(corpus.documents[-1]),
        "rows": len(rows),
        "tokenize_seconds": round(tokenized, 1),
        "milliseconds_per_batch": round((time.perf_counter() - started), 3),
        "peak_resident_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    _read(*sys.argv[1:])


__all__ = ["run"]
