"""Compare this checkout with an earlier one: encoding, single queries, training steps and memory, asked in turns in one run.

Both checkouts run in the environment of this one, each in a process of its own that stays open, so what the machine does
meanwhile meets both alike. Every ratio is the median over pairs of neighbouring answers.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.encode import read_texts
from benchmarks.machine import commit, describe

_WORKER = """
import inspect, json, statistics, sys, time
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from minibert import MiniBertConfig, MiniBertForMaskedLM
from minibert.hub.convert import convert
from minibert.inference.encode import Encoder
from pathlib import Path

model, work, texts = Path(sys.argv[1]), Path(sys.argv[2]), json.load(open(sys.argv[3]))
convert(str(model), work / "converted", dtype="float32")
encoder = Encoder(work / "converted", device="cpu")
opened = SentenceTransformer(str(work / "converted"), device="cpu")
torch.manual_seed(0)
learner = MiniBertForMaskedLM(MiniBertConfig(vocab_size=8192)).train()
# Without logits, as the training loop asks; an earlier checkout leaves them out of training by itself.
without = {"return_logits": False} if "return_logits" in inspect.signature(learner.forward).parameters else {}
optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)
ids = torch.randint(5, 8192, (16, 128))

def single():
    seconds = []
    for text in texts[:60]:
        started = time.perf_counter()
        encoder.encode([" ".join(text.split()[:8])])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)

def step():
    for _ in range(3):
        learner(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **without).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

tasks = {
    "encode": lambda: encoder.encode(texts),
    "sentence_transformer": lambda: opened.encode(texts, show_progress_bar=False),
    "single_query": single,
    "training_step": step,
}
np.save(work / "vectors.npy", np.asarray(encoder.encode(texts)))
print("ready", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    answer = tasks[line.strip()]()
    print(json.dumps(answer if line.strip() == "single_query" else time.perf_counter() - started), flush=True)
"""

_PEAK = """
import json, resource, sys
from minibert.inference.encode import Encoder
Encoder(sys.argv[1], device="cpu").encode(json.load(open(sys.argv[2])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

TASKS = ("encode", "sentence_transformer", "single_query", "training_step")


def run(checkout: Path, model: Path, out: Path, *, texts: Path | None, limit: int, rounds: int) -> None:
    """Ask both checkouts ``rounds`` times in turns, print the ratios and write ``out``."""
    with TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "texts.json").write_text(json.dumps(read_texts(texts, limit)), encoding="utf-8")
        environments = {
            "before": _environment(work / "before", checkout),
            "after": _environment(work / "after", Path(__file__).parents[1]),
        }
        peaks: dict[str, list[int]] = {name: [] for name in environments}
        seconds = _in_turns(environments, model, work, rounds)
        for _ in range(3):
            for name, environment in environments.items():
                command = [sys.executable, "-c", _PEAK, str(work / name / "converted"), str(work / "texts.json")]
                done = subprocess.run(command, env=environment, cwd=work, check=True, capture_output=True, text=True)
                peaks[name].append(int(done.stdout.split()[-1]))
        vectors = [np.load(work / name / "vectors.npy") for name in environments]
    rows: dict[str, dict[str, float]] = {}
    for task in TASKS:
        pairs = zip(seconds["after"][task], seconds["before"][task], strict=True)
        ratios = [after / before for after, before in pairs]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[task] = {"ratio": round(quartiles[1], 3), "first_quartile": round(quartiles[0], 3)}
        rows[task]["third_quartile"] = round(quartiles[2], 3)
    rows["peak_memory"] = {"ratio": round(statistics.median(peaks["after"]) / statistics.median(peaks["before"]), 3)}
    results = {
        "benchmark": "before",
        "machine": describe(),
        "before": commit(checkout),
        "after": commit(Path(__file__).parents[1]),
        "model": model.name,
        "texts": limit,
        "rounds": rounds,
        "largest_difference_of_a_vector": float(np.abs(vectors[0] - vectors[1]).max()),
        "after_over_before": rows,
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for task, row in rows.items():
        print(f"{task:22}" + "".join(f"{key:>18} {value:.3f}" for key, value in row.items()))


def _environment(folder: Path, checkout: Path) -> dict[str, str]:
    """Return environment variables with which ``minibert`` is the package in ``checkout``."""
    (folder / "path").mkdir(parents=True)
    (folder / "path" / "minibert").symlink_to(checkout.resolve(), target_is_directory=True)
    return {**os.environ, "PYTHONPATH": str(folder / "path")}


def _in_turns(
    environments: dict[str, dict[str, str]], model: Path, work: Path, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every task in every checkout; rounds begin with each in turn."""
    workers: dict[str, Any] = {}
    for name, environment in environments.items():
        workers[name] = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(model.resolve()), str(work / name), str(work / "texts.json")],
            env=environment,
            cwd=work,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    for worker in workers.values():
        while (line := worker.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError("A checkout stopped before it was ready; its error stands above.")
    seconds: dict[str, dict[str, list[float]]] = {name: {task: [] for task in TASKS} for name in workers}
    for number in range(rounds + 1):
        for task in TASKS:
            for name in sorted(workers, reverse=bool(number % 2)):
                workers[name].stdin.write(task + "\n")
                workers[name].stdin.flush()
                answer = json.loads(workers[name].stdout.readline())
                if number:  # the first round warms up
                    seconds[name][task].append(answer)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds
