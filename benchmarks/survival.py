"""A pretraining run killed again and again and the same run left alone: are the weights the same, bit for bit?"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.machine import describe
from minibert.train import checkpoint

STAGE = "2-pretrain"


def run(out: Path, work: Path, *, kills: int, steps: int, processes: list[int], seed: int) -> None:
    """Kill a run of ``minibert train`` ``kills`` times by SIGKILL for each number of processes; print and write ``out``."""
    work.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(work, steps)
    results = {"benchmark": "survival", "machine": describe(), "recipe": recipe["stages"][1], "runs": []}
    for count in processes:
        results["runs"].append(_survive(work, count, kills, seed))
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if not all(one["identical"] for one in results["runs"]):
        raise SystemExit(1)


def _recipe(work: Path, steps: int) -> dict[str, Any]:
    """Write text of made-up words, in documents of sentences, and a recipe that has everything a resume must get right."""
    generator = np.random.default_rng(0)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = ["".join(generator.choice(syllables, generator.integers(1, 4))) for _ in range(2000)]
    odds = 1 / np.arange(1, len(words) + 1)
    with (work / "text.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(3000):
            lengths = generator.integers(4, 20, generator.integers(2, 12))
            text = " ".join(" ".join(generator.choice(words, length, p=odds / odds.sum())) + "." for length in lengths)
            file.write(json.dumps({"text": text}) + "\n")
    pretrain = {
        "kind": "pretrain",
        "data": str(work / "text.jsonl"),
        "cache_dir": str(work / "cache"),
        "model": {"preset": "simple-4x256", "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512},
        "next_sentence": True,
        "dropout": 0.1,
        "phases": [{"share": 7, "max_length": 32, "batch_size": 8}, {"share": 3, "max_length": 64, "batch_size": 4}],
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "schedule": "wsd",
        "max_steps": steps,
        "log_steps": 1,
        "save_steps": 2,
        "preprocessing_num_workers": 1,
    }
    tokenizer = {"kind": "tokenizer", "data": str(work / "text.jsonl"), "vocab_size": 2000, "max_length": 64}
    recipe = {"name": "survival", "stages": [tokenizer, pretrain]}
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return recipe


def _survive(work: Path, processes: int, kills: int, seed: int) -> dict[str, Any]:
    whole, parts = work / f"whole-{processes}", work / f"killed-{processes}"
    for earlier in (whole, parts):
        shutil.rmtree(earlier, ignore_errors=True)
    begun = time.perf_counter()
    child = _start(work, whole, processes)
    while not _step(whole) and child.poll() is None:
        time.sleep(0.05)
    start_up = time.perf_counter() - begun
    _must_succeed(child)
    uninterrupted = time.perf_counter() - begun

    generator, killed, leftovers, results = random.Random(seed), [], set(), []
    # Some kills hit the start-up, most the training, and all together should leave some of it to be done.
    latest = start_up + 1.5 * (uninterrupted - start_up) / kills
    begun = time.perf_counter()
    while len(killed) < kills:
        child, seconds = _start(work, parts, processes), generator.uniform(0.9 * start_up, latest)
        try:
            child.wait(seconds)  # it was faster than thought, and is done: the other kills hit a run from the beginning
            results.append(_compared(child, whole, parts))
            shutil.rmtree(parts)
            continue
        except subprocess.TimeoutExpired:
            _kill(child)
        newest, problems = checkpoint.latest_valid(parts / STAGE / "checkpoints")
        earlier, leftovers = leftovers, set((parts / STAGE / "checkpoints").glob(".*.part"))
        killed.append(
            {
                "seconds": round(seconds, 2),
                "step": _step(parts),
                "checkpoint": int(newest.name.removeprefix("step-")) if newest else None,
                "while_writing": bool(leftovers - earlier),
                "damaged": problems,
            }
        )
        print(f"{processes} processes, kill {len(killed)}: {killed[-1]}", flush=True)
    results.append(_compared(_start(work, parts, processes), whole, parts))
    result = {
        "processes": processes,
        "kills": len(killed),
        "steps": _step(whole),
        "steps_at_kills": [kill["step"] for kill in killed],
        "finished_runs": len(results),
        "identical": all(weights for weights, _ in results),
        "logs_identical": all(logs for _, logs in results),
        "seconds_uninterrupted": round(uninterrupted, 1),
        "seconds_killed": round(time.perf_counter() - begun, 1),
        "details": killed,
    }
    print({key: value for key, value in result.items() if key != "details"}, flush=True)
    return result


def _start(work: Path, out: Path, processes: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "minibert", "train", str(work / "recipe.yaml"), "--output-dir", str(out)]
    with (work / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _kill(child: subprocess.Popen) -> None:
    """SIGKILL for all processes of a run: torchrun's would outlive it, and train on."""
    parent = psutil.Process(child.pid)
    parent.suspend()  # so that it starts no more of them
    everyone = [parent, *parent.children(recursive=True)]
    for process in everyone:
        process.kill()
    child.wait()
    psutil.wait_procs(everyone)


def _must_succeed(child: subprocess.Popen) -> None:
    if child.wait():
        raise SystemExit(f"{' '.join(map(str, child.args))} ended with status {child.returncode}; see its log.")  # type: ignore[union-attr]


def _compared(child: subprocess.Popen, whole: Path, parts: Path) -> tuple[bool, bool]:
    """Wait for the end of a run; whether its weights, and the losses in its log, are those of ``whole``."""
    _must_succeed(child)
    return _same(whole, parts), _losses(whole) == _losses(parts)


def _lines(folder: Path) -> list[dict[str, Any]]:
    log = folder / STAGE / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _step(folder: Path) -> int:
    """The last step in the log, 0 before the first."""
    lines = _lines(folder)
    return lines[-1]["step"] if lines else 0


def _losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in _lines(folder)]


def _same(left: Path, right: Path) -> bool:
    ours, theirs = (load_file(folder / STAGE / "model.safetensors") for folder in (left, right))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
