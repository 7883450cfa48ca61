"""A converted checkpoint goes on learning from one's own pairs, and its original trained by sentence-transformers.

Both sides run the ``embed`` stage's arguments: the same rows in the same batches, loss, steps and precision; ours on the
converted model, theirs with ``SentenceTransformerTrainer`` on the original ``BertModel``. A short pair of runs gives the ratio
of time and says whether the results agree; a long one, ours alone, says what training is worth.
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import transformers
import typer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

from benchmarks.machine import describe
from benchmarks.train import PAIRS, RETRIEVAL, held_out_figures, sources
from minibert.hub.convert import convert
from minibert.train.arguments import EmbedStage
from minibert.train.recipe import load_recipe
from minibert.train.sentence_trainer import trainer_arguments
from minibert.train.stage import StageContext
from minibert.train.stages.embed import _losses, embed, training_data


def run(
    data: Path,
    model: Path,
    out: Path,
    work: Path,
    *,
    seeds: int,
    paired_steps: int,
    steps: int | None,
    batch: int,
    precision: str,
    queries: int | None,
) -> None:
    """Train the pairs and the long run, print each result and write ``out``, which keeps what an earlier call finished."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": []}
    options = {"paired_steps": paired_steps, "steps": steps, "batch": batch, "precision": precision, "queries": queries}
    if results.get("options", options) != options:
        raise typer.BadParameter(f"{out} holds runs with other options ({results['options']}); give those, or another --out.")
    results |= {"benchmark": "finetune", "machine": describe(), "options": options}
    start = work / "start"
    if not start.exists():
        convert(str(model), start)

    def record(system: str, seed: int, **figures: Any) -> None:
        results["runs"].append({"system": system, "seed": seed, **figures})
        print(json.dumps(results["runs"][-1]), flush=True)
        out.write_text(json.dumps(results | _ratios(results["runs"]), indent=1) + "\n", encoding="utf-8")

    def is_done(system: str, seed: int) -> bool:
        return any((row["system"], row["seed"]) == (system, seed) for row in results["runs"])

    if not is_done("original", 0):
        record("original", 0, **_measure(data, model, queries))
    for seed in range(seeds):
        for system in ("minibert", "bert") if seed % 2 else ("bert", "minibert"):
            if not is_done(system, seed):
                stage = _stage(data, batch, precision, paired_steps)
                folder = work / f"{system}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                train, source = (_train_ours, start) if system == "minibert" else (_train_theirs, model)
                seconds = train(stage, folder, seed, source)
                record(system, seed, seconds=seconds, **_measure(data, folder, queries))
    if steps != 0 and not is_done("minibert, long", 0):
        seconds = _train_ours(_stage(data, batch, precision, steps), work / "long", 0, start)
        record("minibert, long", 0, seconds=seconds, **_measure(data, work / "long", queries))
    _print_table(results["runs"], _ratios(results["runs"]))


def _stage(data: Path, batch: int, precision: str, steps: int | None) -> EmbedStage:
    """The stage of recipes/finetune_minilm.yaml on ``data``, without measuring on the way."""
    recipe = load_recipe("finetune_minilm").stages[0]
    assert isinstance(recipe, EmbedStage)
    changed = {"data": sources(data, PAIRS, "train"), "eval_data": None, "metric_for_best": None, "log_steps": 50}
    return recipe.model_copy(update={**changed, "batch_size": batch, "precision": precision, "max_steps": steps})


def _train_ours(stage: EmbedStage, folder: Path, seed: int, start: Path) -> float:
    started = time.perf_counter()
    embed(stage, StageContext(folder, seed, str(start), str(start)))
    return time.perf_counter() - started


def _train_theirs(stage: EmbedStage, folder: Path, seed: int, model: Path) -> float:
    started = time.perf_counter()
    encoder = SentenceTransformer(str(model), device="cpu")
    encoder.max_seq_length = stage.max_length
    context = StageContext(folder, seed)
    pairs = training_data(stage, context)
    arguments = trainer_arguments(stage, context)
    arguments.warmup_steps = stage.warmup_ratio  # the stage has a schedule of its own
    SentenceTransformerTrainer(
        model=encoder,
        args=arguments,
        train_dataset=datasets.DatasetDict(pairs) if stage.one_source_per_batch else next(iter(pairs.values())),
        loss=_losses(stage, context, encoder),
    ).train()
    encoder.save_pretrained(str(folder), create_model_card=False)
    return time.perf_counter() - started


def _measure(data: Path, folder: Path, queries: int | None) -> dict[str, float]:
    """MRR@10 on the four retrieval sets and Spearman's correlation on STS-B, all validation."""
    encoder = SentenceTransformer(str(folder), device="cpu")
    wanted = {**dict.fromkeys(RETRIEVAL, ("mrr@10",)), "stsb": ("spearman",)}
    return held_out_figures(data, encoder, wanted, queries=queries)


def _ratios(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Time of MiniBERT as a share of the original's, seed by seed."""
    seconds = {side: {run["seed"]: run["seconds"] for run in runs if run["system"] == side} for side in ("minibert", "bert")}
    ratios = [ours / seconds["bert"][seed] for seed, ours in seconds["minibert"].items() if seed in seconds["bert"]]
    return {"time_ratios": ratios, "time_ratio_median": statistics.median(ratios)} if ratios else {}


def _print_table(runs: list[dict[str, Any]], ratios: dict[str, Any]) -> None:
    names = [name for name in runs[0] if name not in ("system", "seed", "seconds")]
    print(f"{'':18}{'seconds':>9}" + "".join(f"{name:>30}" for name in names))
    for run in runs:
        print(f"{run['system']:18}{run.get('seconds', 0):>9.1f}" + "".join(f"{run[name]:>30.4f}" for name in names))
    if ratios:
        print(f"median paired ratio of time: {ratios['time_ratio_median']:.3f}")


__all__ = ["run"]
