"""Train with every loss of the ``embed`` stage, and with the same loss by sentence-transformers alone.

Both sides start from the same weights, every second layer of a BERT encoder, and read the same rows in the same batches, with
the same learning rates, steps and precision: MiniBERT by ``minibert train``, ``BertModel`` by ``SentenceTransformerTrainer``.
Each training is a process of its own, in turns. Its seconds are those of the steps, without opening, saving and measuring the
model. Training splits are trained on, validation splits are measured.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import typer
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import mine_hard_negatives

from benchmarks.machine import commit, describe
from benchmarks.train import held_out_figures, sources
from minibert.data.load import load
from minibert.files.disk import atomic_write, to_yaml
from minibert.hub.convert import convert
from minibert.train.recipe import load_recipe

RETRIEVAL, SIMILARITY = "squad_sentences", "stsb"
FIGURES = {RETRIEVAL: "ndcg@10", SIMILARITY: "spearman"}
DIMS = [384, 64]
# Loss -> the loss of the library, for a model and the stage of the recipe.
PLAIN: dict[str, Callable[[SentenceTransformer, Any], Any]] = {
    "mnrl": lambda model, stage: losses.MultipleNegativesRankingLoss(model),
    "cosent": lambda model, stage: losses.CoSENTLoss(model),
    "cached_mnrl": lambda model, stage: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=stage.mini_batch_size),
    "gist": lambda model, stage: losses.GISTEmbedLoss(model, SentenceTransformer(stage.guide), temperature=1 / stage.scale),
    "angle": lambda model, stage: losses.AnglELoss(model),
    "cosine_mse": lambda model, stage: losses.CosineSimilarityLoss(model),
    "triplet": lambda model, stage: losses.TripletLoss(model, triplet_margin=stage.triplet_margin),
    "margin_mse": lambda model, stage: losses.MarginMSELoss(model),
}
SCORED = ("cosent", "angle", "cosine_mse")
MATRYOSHKA = "matryoshka"  # mnrl within it
SEEDS = {"mnrl": 3, "cosent": 3}  # of the others one
SYSTEMS = ("minibert", "sentence-transformers")


def run(data: Path, model: Path, out: Path, work: Path, *, names: list[str], queries: int, **options: Any) -> None:
    """Train both sides with the losses ``names``, print each result and a table, and write ``out``; rows in it are kept."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": []}
    options = {**options, "queries": queries}
    if results.get("options", options) != options:
        raise typer.BadParameter(f"{out} holds rows with other options ({results['options']}); give those, or another --out.")
    about = {"benchmark": "losses", "machine": describe(), "commit": commit(Path(__file__).parents[1]), "model": model.name}
    command = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    results |= {**about, "options": options, "command": f"python -m benchmarks losses {command}"}
    starts, guides = _models(model, work)

    def measure(folder: Path, name: str) -> dict[str, float]:
        wanted = list(FIGURES) if name == MATRYOSHKA else [SIMILARITY if name in SCORED else RETRIEVAL]
        return _measure(data, folder, wanted, DIMS if name == MATRYOSHKA else DIMS[:1], queries, options["max_length"])

    if "before" not in results:
        results["before"] = measure(starts["sentence-transformers"], MATRYOSHKA)
    for name in names:
        file = _training_rows(data, guides["minibert"], work, name, options["steps"] * options["batch_size"])
        for seed in range(SEEDS.get(name, 1)):
            for system in SYSTEMS:
                row: dict[str, Any] = {"loss": name, "seed": seed, "system": system}
                if any(row.items() <= done.items() for done in results["rows"]):
                    continue
                recipe = _recipe(name, seed, file, starts[system], guides[system], options)
                folder = work / f"{name}-{seed}-{system}"
                row |= _train(system, recipe, folder)
                row |= measure(folder / ("1-embed" if system == "minibert" else ""), name)
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
                out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def _models(model: Path, work: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the model to start from and the guide of each system. The guide is ``model`` with all of its layers."""
    starts = {system: work / f"start-{system}" for system in SYSTEMS}
    guides = {"minibert": work / "guide", "sentence-transformers": model}
    if not guides["minibert"].exists():  # the last one that is made
        shutil.rmtree(starts["minibert"], ignore_errors=True)
        encoder = SentenceTransformer(str(model), device="cpu")
        bert: Any = encoder.transformers_model
        bert.encoder.layer = bert.encoder.layer[1::2]
        bert.config.num_hidden_layers = len(bert.encoder.layer)
        encoder.save_pretrained(str(starts["sentence-transformers"]), create_model_card=False)
        convert(starts["sentence-transformers"], starts["minibert"])
        convert(model, guides["minibert"])
    return starts, guides


def _training_rows(data: Path, guide: Path, work: Path, name: str, count: int) -> Path:
    """Return the file that both systems read; its columns are in the order of the library's losses."""
    if name not in ("triplet", "margin_mse"):
        return data / (SIMILARITY if name in SCORED else RETRIEVAL) / "train.parquet"
    file = work / f"{name}-{count}.parquet"
    if not file.exists():
        pairs = load(sources(data, (RETRIEVAL,), "train")).select_columns(["query", "answer"])
        mined = mine_hard_negatives(
            pairs.select(range(min(count, len(pairs)))),
            SentenceTransformer(str(guide)),
            num_negatives=1,
            relative_margin=0.05,
            range_max=50,
            output_scores=True,
            verbose=False,
        )
        margins = [positive - negative for positive, negative in mined["scores"]]
        mined = mined.remove_columns("scores")
        with atomic_write(file) as part:
            (mined.add_column("score", margins) if name == "margin_mse" else mined).to_parquet(part)
    return file


def _recipe(name: str, seed: int, file: Path, start: Path, guide: Path, options: dict[str, Any]) -> dict[str, Any]:
    steps = options["steps"]
    stage = {
        **{"kind": "embed", "model": str(start.resolve()), "data": str(file.resolve()), "loss": name},
        **{"max_steps": steps, "save_steps": steps, "log_steps": 1, "metric_for_best": None},
        **{key: options[key] for key in ("batch_size", "learning_rate", "dropout", "max_length", "precision")},
    }
    own = {
        "cached_mnrl": {"mini_batch_size": options["batch_size"] // 2},
        "gist": {"guide": str(guide.resolve())},
        MATRYOSHKA: {"loss": "mnrl", "matryoshka_dims": DIMS},
    }
    return {"name": name, "seed": seed, "stages": [{**stage, **own.get(name, {})}]}


def _train(system: str, recipe: dict[str, Any], folder: Path) -> dict[str, float]:
    """Run ``recipe`` in a process of its own; return the seconds of its steps, the first and the last loss."""
    shutil.rmtree(folder, ignore_errors=True)
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(recipe), encoding="utf-8")
    plainly = "import sys; from benchmarks.losses import train_plainly; train_plainly(*sys.argv[1:])"
    command = ["-m", "minibert", "train", str(file), "--output-dir"] if system == "minibert" else ["-c", plainly, str(file)]
    with folder.with_suffix(".log").open("w", encoding="utf-8") as output:
        done = subprocess.run([sys.executable, *command, str(folder)], stdout=output, stderr=output)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}; see {output.name}.")
    (log,) = folder.glob("**/log.jsonl")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {"seconds": round(lines[-1]["seconds"], 2), "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}


def train_plainly(recipe: str, output_dir: str) -> None:
    """Train the model of the only stage of ``recipe``, a ``BertModel``, as the documentation of sentence-transformers does."""
    found = load_recipe(recipe)
    stage: Any = found.stages[0]
    dropout = {"hidden_dropout_prob": stage.dropout, "attention_probs_dropout_prob": stage.dropout}
    model = SentenceTransformer(stage.model, config_kwargs=dropout)
    model.max_seq_length = stage.max_length
    loss = PLAIN[stage.loss](model, stage)
    if stage.matryoshka_dims:
        loss = losses.MatryoshkaLoss(model, loss, stage.matryoshka_dims)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=stage.batch_size,
        max_steps=stage.max_steps,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        batch_sampler=stage.batch_sampler,
        bf16=stage.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # otherwise the trainer refuses bf16 without a GPU
        seed=found.seed,
        data_seed=found.seed,
        dataloader_pin_memory=torch.accelerator.is_available(),
        logging_steps=stage.log_steps,
        save_strategy="no",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_parquet(stage.data[0].path),
        loss=loss,
        callbacks=[_Clock(Path(output_dir) / "log.jsonl")],
    )
    trainer.train()
    model.save_pretrained(output_dir, create_model_card=False)


class _Clock(transformers.TrainerCallback):
    """Log loss and seconds since the start of the steps, as the ``embed`` stage does."""

    def __init__(self, file: Path):
        self.file, self.start = file, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.start = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        if "loss" in logs:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"loss": logs["loss"], "seconds": time.perf_counter() - self.start}) + "\n")


def _measure(data: Path, folder: Path, names: list[str], dims: list[int], queries: int, max_length: int) -> dict[str, float]:
    """Return the metrics of validation splits, with vectors truncated to ``dims``."""
    figures = {}
    for dim in dims:
        encoder = SentenceTransformer(str(folder), truncate_dim=dim)
        encoder.max_seq_length = max_length
        found = held_out_figures(data, encoder, {name: (FIGURES[name],) for name in names}, queries=queries)
        figures |= {f"{FIGURES[name]} ({dim})": found[f"{name}_{FIGURES[name]}"] for name in names}
    return figures


def table(results: dict[str, Any]) -> str:
    """Return the results as a table in Markdown: a mean and, of several seeds, the standard deviation."""
    lines = [
        "| loss | figure (dimensions) | before | MiniBERT | BertModel | seconds of MiniBERT | of BertModel | ratio |",
        "|" + " --- |" * 8,
    ]
    for name in dict.fromkeys(row["loss"] for row in results["rows"]):
        sides = [[row for row in results["rows"] if (row["loss"], row["system"]) == (name, system)] for system in SYSTEMS]
        ours, theirs = ([row["seconds"] for row in side] for side in sides)
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        times = f"{_spread(ours, 1)} | {_spread(theirs, 1)} | {ratio:.2f}"
        for figure in (figure for figure in results["before"] if figure in sides[0][0]):
            shown = [_spread([row[figure] for row in side], 3) for side in sides]
            lines.append(f"| {name} | {figure} | {results['before'][figure]:.3f} | {' | '.join(shown)} | {times} |")
            times = " |  | "
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


__all__ = ["run", "table", "train_plainly"]
