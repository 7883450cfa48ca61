"""Training speed and quality: the two phases of the TinyBERT seed, with MiniBERT and with BertModel.

Phase 1 is natural language inference with three classes, phase 2 embeddings of questions and passages with in-batch
negatives. Both sides start from the same weights and see the same batches in the same order; ours goes through the stages
that ``minibert train`` runs. A run's time is everything from data in memory to trained weights, tokenization included.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.machine import describe
from minibert import MiniBertConfig, MiniBertForSequenceClassification, train_wordpiece
from minibert.data.load import load
from minibert.evaluation.evaluate import evaluate
from minibert.hub.families import FAMILIES
from minibert.train.arguments import ClassifyStage, DataSource, EmbedStage
from minibert.train.loop import rows_of_step
from minibert.train.sentence_trainer import trainer_arguments
from minibert.train.stage import StageContext
from minibert.train.stages.classify import classify
from minibert.train.stages.embed import embed

NLI = ("nli_new_protocols", "nli_cad", "sick")
PAIRS = (
    *(
        "natural_questions_qed",
        "squad_sentences",
        "medquad",
        "covid_qa",
        "covid_faq",
        "pubmedqa",
        "wikiqa",
        "trecqa",
        "stackfaq",
    ),
    *("wiki_sections", "wiki_leads", "reuters_titles", "scitldr", "tldr_pages"),
)
RETRIEVAL = ("natural_questions_qed", "squad_sentences", "medquad", "wiki_sections")
RETRIEVAL_FIGURES = dict.fromkeys(RETRIEVAL, ("mrr@10", "recall@10"))
NLI_BATCH = 32


def run(data: Path, out: Path, work: Path, *, preset: str, seeds: int, only_ours: bool, queries: int, **options: Any) -> None:
    """Train every pair, measure it, print a table and write ``out``."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = _tokenizer(data, work / "tokenizer", options["max_length"])
    results: dict[str, Any] = {
        "benchmark": "train",
        "machine": describe(),
        "options": {"preset": preset, "queries": queries, **options},
        "nli_batch": NLI_BATCH,
        "runs": [],
    }
    for seed in range(seeds):
        folder = work / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        _start(folder / "start", preset, tokenizer, seed)
        _nli_rows(data, folder, seed, options)
        sides: list[tuple[str, Callable[..., dict[str, float]]]] = [("minibert", _train_ours)]
        if not only_ours:
            # Who goes first alternates, so that a machine that slows down slows both.
            sides.insert(seed % 2, ("bert", _train_theirs))
        for side, train in sides:
            figures = {"system": side, "seed": seed, **train(data, folder, work / "tokenizer", seed, **options)}
            figures |= _measure(data, folder / side, queries, bool(options["pair_steps"]))
            results["runs"].append(figures)
            if "baselines" not in results and options["pair_steps"]:
                results["baselines"] = _baselines(data, folder / side, queries)
            print(json.dumps(figures), flush=True)
            out.write_text(json.dumps(results | _summary(results["runs"]), indent=1) + "\n", encoding="utf-8")
    _print_table(results["runs"], _summary(results["runs"]))


def sources(data: Path, names: tuple[str, ...], split: str) -> list[DataSource]:
    return [DataSource(path=str(data / name), split=split) for name in names]


def held_out_figures(
    data: Path, encoder: SentenceTransformer, wanted: dict[str, tuple[str, ...]], queries: int | None = None
) -> dict[str, float]:
    """Return the metrics of ``encoder`` on validation splits, as ``NAME_METRIC``.

    ``wanted`` names the metrics of each data set; ``queries`` limits the queries of a retrieval set.
    """
    figures = {}
    for name, keys in wanted.items():
        limit = queries if "spearman" not in keys else None
        found = evaluate(encoder, load(sources(data, (name,), "validation")), limit=limit, baselines=False)
        figures |= {f"{name}_{key}": found["systems"]["model"][key] for key in keys}
    return figures


def _tokenizer(data: Path, folder: Path, max_length: int) -> Any:
    """30,000 word pieces of both phases' training texts, trained once."""
    if not folder.exists():
        texts = [
            text
            for name, columns in [
                *((name, ("premise", "hypothesis")) for name in NLI),
                *((n, ("query", "answer")) for n in PAIRS),
            ]
            for column in columns
            for text in load(sources(data, (name,), "train"))[column]
        ]
        train_wordpiece(texts, vocab_size=30000, model_max_length=max_length).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def _start(folder: Path, preset: str, tokenizer: Any, seed: int) -> None:
    """The same new weights as a MiniBERT and as a BERT folder."""
    transformers.set_seed(seed)
    config = MiniBertConfig.preset(preset, vocab_size=len(tokenizer), num_labels=3)
    ours = MiniBertForSequenceClassification(config)
    ours.save_pretrained(folder / "minibert")
    shared = {name: getattr(config, name) for name in BertConfig.__annotations__ if hasattr(config, name)}
    theirs = BertForSequenceClassification(BertConfig(**shared, num_labels=3))
    bert, kind = FAMILIES["bert"], "ForSequenceClassification"
    theirs.load_state_dict({bert.family_name(key, kind): value for key, value in ours.state_dict().items()}, strict=True)
    theirs.save_pretrained(folder / "bert")
    for name in ("minibert", "bert"):
        tokenizer.save_pretrained(folder / name)


def _arguments(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both sides are trained with: phase 1 and phase 2."""
    shared = {"precision": options["precision"], "max_length": options["max_length"], "warmup_ratio": 0.1, "weight_decay": 0.01}
    nli = {**shared, "batch_size": NLI_BATCH, "max_steps": options["nli_steps"], "learning_rate": 3e-4}
    pairs = {**shared, "batch_size": options["pair_batch"], "max_steps": options["pair_steps"], "learning_rate": 5e-4}
    return nli, pairs


def _nli_rows(data: Path, folder: Path, seed: int, options: dict[str, Any]) -> DataSource:
    """As many inference pairs as the steps of phase 1 read, so that a short run is an epoch of a small data set."""
    file = folder / "nli.parquet"
    if not file.exists():
        rows = load(sources(data, NLI, "train")).select_columns(["premise", "hypothesis", "label"])
        count = min(len(rows), options["nli_steps"] * NLI_BATCH)
        rows.shuffle(seed=seed).select(range(count)).to_parquet(str(file))
    return DataSource(path=str(file))


def _train_ours(data: Path, folder: Path, tokenizer: Path, seed: int, **options: Any) -> dict[str, float]:
    nli, pairs = _arguments(options)
    stage = ClassifyStage(kind="classify", data=[_nli_rows(data, folder, seed, options)], log_steps=100, **nli)
    started = time.perf_counter()
    classify(stage, StageContext(folder / "minibert/nli", seed, str(folder / "start/minibert"), str(tokenizer)))
    between = time.perf_counter()
    if not options["pair_steps"]:
        return {"nli_seconds": between - started}
    embedding = EmbedStage(kind="embed", data=sources(data, PAIRS, "train"), log_steps=100, pooling="mean", **pairs)
    embed(embedding, StageContext(folder / "minibert/pairs", seed, str(folder / "minibert/nli"), str(tokenizer)))
    return {"nli_seconds": between - started, "pairs_seconds": time.perf_counter() - between}


class _SameOrder(CrossEncoderTrainer):
    """Batches in the order of the rows, which were put into our loop's order before."""

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def _train_theirs(data: Path, folder: Path, tokenizer: Path, seed: int, **options: Any) -> dict[str, float]:
    nli, pairs = _arguments(options)
    started = time.perf_counter()
    rows = load([_nli_rows(data, folder, seed, options)])
    order = [rows_of_step(step, rows=len(rows), rows_per_step=NLI_BATCH, seed=seed) for step in range(options["nli_steps"])]
    model = CrossEncoder(str(folder / "start/bert"), num_labels=3, max_length=options["max_length"], device="cpu")
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder / "bert/checkpoints"),
        per_device_train_batch_size=NLI_BATCH,
        max_steps=nli["max_steps"],
        learning_rate=nli["learning_rate"],
        weight_decay=nli["weight_decay"],
        warmup_steps=nli["warmup_ratio"],
        bf16=nli["precision"] == "bf16",
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        dataloader_pin_memory=False,
    )
    _SameOrder(
        model=model, args=arguments, train_dataset=rows.select(np.concatenate(order)), loss=CrossEntropyLoss(model)
    ).train()
    model.save_pretrained(str(folder / "bert/nli"))
    between = time.perf_counter()
    if not options["pair_steps"]:
        return {"nli_seconds": between - started}

    stage = EmbedStage(kind="embed", data=sources(data, PAIRS, "train"), log_steps=100, **pairs)
    transformer = Transformer(str(folder / "bert/nli"), max_seq_length=options["max_length"])
    encoder = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean"), Normalize()], device="cpu"
    )
    arguments = trainer_arguments(stage, StageContext(folder / "bert", seed))
    arguments.warmup_steps = stage.warmup_ratio  # the stage has a schedule of its own
    SentenceTransformerTrainer(
        model=encoder,
        args=arguments,
        train_dataset=load(stage.data).select_columns(["query", "answer"]),
        loss=MultipleNegativesRankingLoss(encoder),
    ).train()
    encoder.save_pretrained(str(folder / "bert/pairs"), create_model_card=False)
    return {"nli_seconds": between - started, "pairs_seconds": time.perf_counter() - between}


def _measure(data: Path, folder: Path, queries: int, retrieval: bool) -> dict[str, float]:
    """Accuracy on SNLI validation, and retrieval among the distinct answers of each validation split."""
    snli = evaluate(folder / "nli", load(sources(data, ("snli",), "validation")))
    figures = {"snli_accuracy": snli["systems"]["model"]["accuracy"]}
    if retrieval:
        encoder = SentenceTransformer(str(folder / "pairs"), device="cpu")
        figures |= held_out_figures(data, encoder, RETRIEVAL_FIGURES, queries=queries)
    return figures


def _baselines(data: Path, folder: Path, queries: int) -> dict[str, float]:
    """MRR@10 of BM25 and of our untrained encoder on the same queries."""
    encoder = SentenceTransformer(str(folder / "pairs"), device="cpu")
    figures = {}
    for name in RETRIEVAL:
        systems = evaluate(encoder, load(sources(data, (name,), "validation")), limit=queries)["systems"]
        figures |= {f"{name}_{system}_mrr@10": systems[system]["mrr@10"] for system in ("bm25", "untrained")}
    return figures


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and the median of the paired ratios of time."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for figures in runs:
        sides.setdefault(figures["system"], []).append(figures)
    names = [name for name in runs[0] if name not in ("system", "seed")]
    spread = {
        side: {
            name: {
                "mean": statistics.mean(figures[name] for figures in of_side),
                "stdev": statistics.stdev(figures[name] for figures in of_side) if len(of_side) > 1 else None,
            }
            for name in names
        }
        for side, of_side in sides.items()
    }
    by_seed = {side: {figures["seed"]: figures for figures in of_side} for side, of_side in sides.items()}
    paired = [seed for seed in by_seed.get("minibert", {}) if seed in by_seed.get("bert", {})]
    ratios = {
        name: statistics.median(by_seed["minibert"][seed][name] / by_seed["bert"][seed][name] for seed in paired)
        for name in ("nli_seconds", "pairs_seconds")
        if paired and name in runs[0]
    }
    if len(ratios) > 1:
        totals = [
            sum(by_seed["minibert"][seed][name] for name in ratios) / sum(by_seed["bert"][seed][name] for name in ratios)
            for seed in paired
        ]
        ratios["both_phases_seconds"] = statistics.median(totals)
    return {"summary": spread, "time_ratio_median": ratios}


def _print_table(runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    spread = summary["summary"]
    print(f"\n{'':38}" + "".join(f"{side:>22}" for side in spread))
    for name in next(iter(spread.values())):
        cells = [figures[name] for figures in spread.values()]
        print(f"{name:38}" + "".join(f"{c['mean']:14.4f} ± {c['stdev'] or 0.0:5.4f}" for c in cells))
    for name, ratio in summary["time_ratio_median"].items():
        print(f"median paired ratio of {name}: {ratio:.3f}")


__all__ = ["run"]
