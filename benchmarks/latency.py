"""One short query at a time, the time from nothing to the first vector, and memory: MiniBERT and sentence-transformers."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from sentence_transformers import SentenceTransformer

from benchmarks.encode import read_texts
from benchmarks.machine import describe
from minibert.hub.convert import convert
from minibert.inference.encode import Encoder

QUERY = "how do I read a table from a comma separated file"  # 12 tokens with the two special ones
OURS = "Encoder kept open, auto"
THEIRS = "sentence-transformers, BertModel"

# Each runs in a process of its own: import, load, one vector; then a thousand texts, for the memory they need on top.
_PROCESS = """
import json, resource, sys, time
started = time.perf_counter()
{imports}
model = {load}
model.encode({query!r})
first = time.perf_counter() - started
# what the loaded model needs; the peak before encoding may be that of loading, so it is measured from here
open("/proc/self/clear_refs", "w").write("5")
def resident(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024
loaded = resident("VmRSS")
texts = json.load(open(sys.argv[2]))
model.encode(texts)
print(json.dumps({{"start_seconds": first, "loaded_mib": loaded, "peak_above_model_mib": resident("VmHWM") - loaded}}))
"""


def run(model: Path, out: Path, work: Path, *, queries: int, starts: int, texts: Path | None, limit: int) -> None:
    """Ask ``queries`` single queries of every system in turn, start each ``starts`` times, and write ``out``."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = work / model.name
    work.mkdir(parents=True, exist_ok=True)
    folders = {dtype: work / f"minibert-{dtype}" for dtype in ("float32", "bfloat16")}
    for dtype, folder in folders.items():
        if not folder.exists():
            convert(str(model), folder, dtype=dtype)
    theirs = SentenceTransformer(str(model), device="cpu")
    systems: dict[str, Callable[[str], Any]] = {THEIRS: lambda query: theirs.encode(query, show_progress_bar=False)}
    for dtype, folder in folders.items():
        opened = SentenceTransformer(str(folder), device="cpu")
        systems[f"SentenceTransformer.encode, MiniBERT, {dtype}"] = lambda query, opened=opened: opened.encode(
            query, show_progress_bar=False
        )
    encoder = Encoder(folders["float32"], device="cpu")
    systems[OURS] = lambda query: encoder.encode([query])
    rows = _latency(systems, queries)
    read = read_texts(texts, limit)
    for name, cosine in _worst_cosines(systems, [" ".join(text.split()[:8]) for text in read]).items():
        rows[name]["worst_cosine"] = cosine
    given = work / "texts.json"
    given.write_text(json.dumps(read), encoding="utf-8")
    for name, measured in _starts(model, folders, given, starts).items():
        rows[name] |= measured
    results = {"benchmark": "latency", "machine": describe(), "model": model.name, "queries": queries, "starts": starts}
    out.write_text(json.dumps({**results, "systems": rows}, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name:46}" + "".join(f"{key:>22} {value:{'.7f' if 'cosine' in key else '8.2f'}}" for key, value in row.items()))


def _latency(systems: dict[str, Callable[[str], Any]], queries: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(queries + 20):
        for name, ask in systems.items():
            started = time.perf_counter()
            ask(QUERY)
            if number >= 20:
                seconds[name].append(time.perf_counter() - started)
    rows = {}
    for name, times in seconds.items():
        ratios = [ours / reference for ours, reference in zip(times, seconds[THEIRS], strict=True)]
        rows[name] = {
            "p50_ms": round(1000 * float(np.percentile(times, 50)), 3),
            "p99_ms": round(1000 * float(np.percentile(times, 99)), 3),
            "ratio": round(statistics.median(ratios), 3),
        }
    return rows


def _worst_cosines(systems: dict[str, Callable[[str], Any]], queries: list[str]) -> dict[str, float]:
    """The vector furthest from theirs, of queries of a few words, each encoded alone."""
    vectors = {name: np.stack([np.asarray(ask(query)).ravel() for query in queries]) for name, ask in systems.items()}
    vectors = {name: found / np.linalg.norm(found, axis=1, keepdims=True) for name, found in vectors.items()}
    return {name: round(float((found * vectors[THEIRS]).sum(axis=1).min()), 7) for name, found in vectors.items()}


def _starts(model: Path, folders: dict[str, Path], texts: Path, starts: int) -> dict[str, dict[str, float]]:
    plain = "from sentence_transformers import SentenceTransformer"
    loads = {THEIRS: (plain, "SentenceTransformer(sys.argv[1], device='cpu')", model)}
    for dtype, folder in folders.items():
        call = "SentenceTransformer(sys.argv[1], device='cpu', trust_remote_code=True)"
        loads[f"SentenceTransformer.encode, MiniBERT, {dtype}"] = (plain, call, folder)
    ours = "from minibert.inference.encode import Encoder"
    loads[OURS] = (ours, "Encoder(sys.argv[1], device='cpu')", folders["float32"])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    for _ in range(starts):
        for name, (imports, load, folder) in loads.items():
            source = _PROCESS.format(imports=imports, load=load, query=[QUERY])
            done = subprocess.run([sys.executable, "-c", source, folder, texts], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} failed: {done.stderr[-500:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]} for name, rows in found.items()
    }
