"""Speed of masked-language-model pretraining: MiniBERT's loop and transformers' Trainer with BertForMaskedLM.

Both sides have the same shape, vocabulary, number of sequences in a step and length, and train on the same texts. The peer
runs twice, at the same precision and at its defaults (float32). Runs are short and repeated in turns, so that a machine
that slows down slows all. A run's first steps are left out of its time.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.machine import describe
from minibert import MiniBertConfig, train_wordpiece
from minibert.data.load import load
from minibert.data.source import DataSource
from minibert.train.arguments import PretrainStage
from minibert.train.stage import StageContext
from minibert.train.stages.pretrain import pretrain

WARM_UP = 4  # steps that are not timed


def run(
    data: str | None, out: Path, work: Path, *, preset: str, length: int, batch: int, steps: int, repeats: int, seed: int = 0
) -> None:
    """Time every side ``repeats`` times; print tokens per second, the ratios, and write ``out``."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    work.mkdir(parents=True, exist_ok=True)
    texts = _texts(data, needed=max(20_000_000, batch * (steps + WARM_UP + 2) * length * 8))  # enough for 30,000 words
    corpus = work / "corpus.parquet"
    Dataset.from_dict({"text": texts}).to_parquet(corpus)
    tokenizer = train_wordpiece(texts, vocab_size=30000, model_max_length=512)
    tokenizer.save_pretrained(work / "tokenizer")
    sides = {
        "minibert bf16": lambda: _ours(corpus, work, preset, length, batch, steps, "bf16", seed),
        "bert bf16": lambda: _theirs(texts, tokenizer, work, preset, length, batch, steps, True, seed),
        "minibert fp32": lambda: _ours(corpus, work, preset, length, batch, steps, "fp32", seed),
        "bert fp32 (Trainer's default)": lambda: _theirs(texts, tokenizer, work, preset, length, batch, steps, False, seed),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            figures = side()
            rates[name].append(figures["tokens_per_second"])
            print(f"{name:32} {figures['tokens_per_second']:10.0f} tokens/s", flush=True)
    two = [_two_processes(corpus, work, preset, length, batch, steps, seed) for _ in range(repeats)]

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)

    results = {
        "benchmark": "pretrain",
        "machine": describe(),
        "options": {"preset": preset, "length": length, "batch": batch, "steps": steps, "vocab_size": len(tokenizer)},
        "tokens_per_second": rates,
        "ratio_to_bert_bf16": ratio("minibert bf16", "bert bf16"),
        "ratio_fp32_to_bert_fp32": ratio("minibert fp32", "bert fp32 (Trainer's default)"),
        "ratio_bf16_to_bert_default": ratio("minibert bf16", "bert fp32 (Trainer's default)"),
        "two_processes_one_thread_each": two,
        "ratio_two_processes_to_one": round(statistics.median(two) / statistics.median(rates["minibert bf16"]), 3),
    }
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, value in results.items():
        if name.startswith(("ratio", "two")):
            print(f"{name}: {value}")


def _texts(data: str | None, needed: int) -> list[str]:
    """Documents of at least ``needed`` characters: of ``data``, or of the documentation installed here."""
    rows = load([DataSource(path=data or "installed-docs")])
    column = "text" if "text" in rows.column_names else rows.column_names[-1]
    texts, size = [], 0
    for text in rows[column]:
        texts.append(text)
        size += len(text)
        if size > needed:
            break
    while size < needed:  # a small corpus is read several times
        texts += texts
        size *= 2
    return texts


def _stage(corpus: Path, work: Path, preset: str, length: int, batch: int, steps: int, precision: str) -> dict[str, Any]:
    return {
        "kind": "pretrain",
        "data": str(corpus),
        "model": {"preset": preset, "max_position_embeddings": 512},
        "batch_size": batch,
        "max_length": length,
        "max_steps": steps + WARM_UP,
        "log_steps": 1,
        "save_steps": 10**6,
        "precision": precision,
        "cache_dir": str(work / "cache"),
    }


def _ours(corpus: Path, work: Path, preset: str, length: int, batch: int, steps: int, precision: str, seed: int):
    folder = work / "minibert"
    shutil.rmtree(folder, ignore_errors=True)
    stage = PretrainStage.model_validate(_stage(corpus, work, preset, length, batch, steps, precision))
    pretrain(stage, StageContext(folder, seed, tokenizer=str(work / "tokenizer")))
    return {"tokens_per_second": _rate(folder / "log.jsonl")}


def _rate(log: Path, processes: int = 1) -> float:
    """Tokens per second after the warm-up, from a log with a line per step."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    seconds = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(lines)]
    tokens = [line["tokens_per_second"] * took for line, took in zip(lines[1:], seconds, strict=True)]
    return sum(tokens[WARM_UP - 1 :]) / sum(seconds[WARM_UP - 1 :])


def _two_processes(corpus: Path, work: Path, preset: str, length: int, batch: int, steps: int, seed: int) -> float:
    """Tokens per second of two processes with half a batch and one thread each."""
    folder = work / "two"
    shutil.rmtree(folder, ignore_errors=True)
    stage = _stage(corpus, work, preset, length, batch // 2, steps, "bf16") | {"tokenizer": str(work / "tokenizer")}
    recipe = work / "two.yaml"
    recipe.write_text(json.dumps({"name": "two", "seed": seed, "stages": [stage]}), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "minibert",
        "train",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(recipe), "--output-dir", str(folder)], env=environment, check=True, capture_output=True)
    return _rate(folder / "1-pretrain" / "log.jsonl")


class _Clock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def _theirs(
    texts: list[str], tokenizer: Any, work: Path, preset: str, length: int, batch: int, steps: int, bf16: bool, seed: int
):
    """Run transformers' Trainer on sequences of ``length`` tokens, as its run_mlm example groups them."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
        if len(ids) > (steps + WARM_UP) * batch * length:
            break
    rows = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    transformers.set_seed(seed)
    config = MiniBertConfig.preset(preset, vocab_size=len(tokenizer))
    shared = {name: getattr(config, name) for name in BertConfig.__annotations__ if hasattr(config, name)}
    clock = _Clock()
    arguments = TrainingArguments(
        output_dir=str(work / "bert"),
        per_device_train_batch_size=batch,
        max_steps=steps + WARM_UP,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=10**6,
        seed=seed,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    Trainer(
        model=BertForMaskedLM(BertConfig(**shared)),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[clock],
    ).train()
    seconds = clock.times[-1] - clock.times[WARM_UP - 1]
    return {"tokens_per_second": (len(clock.times) - WARM_UP) * batch * length / seconds}


__all__ = ["run"]
