"""Measure what pretraining is worth: the same fine-tuning from a pretrained encoder, from new weights, and from BertModel.

Each task is a stage of ``minibert train`` with the same arguments, tokenizer, seed and order of rows for every start. The
third start is transformers' BertModel with the pretrained weights, so that it differs from the first in the code alone.
"""

import json
import shutil
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoTokenizer

from benchmarks.machine import describe
from benchmarks.train import NLI, PAIRS, RETRIEVAL_FIGURES, held_out_figures, sources
from minibert import MiniBertModel
from minibert.hub.export import export
from minibert.inference.load import fingerprint
from minibert.train.arguments import ClassifyStage, EmbedStage, PairSource, TagStage
from minibert.train.stage import StageContext
from minibert.train.stages.classify import classify
from minibert.train.stages.embed import embed
from minibert.train.stages.tag import tag

# Of runs that were written before it could be chosen.
_MIXTURE = {"question_passes": 3, "articles": 0, "skip_articles": 0, "hard_negatives": 0}
# Sets of titles and headings are read once, however often those of real questions are.
TITLES = ("wiki_sections", "wiki_leads", "reuters_titles", "scitldr", "tldr_pages")


def run(
    data: Path,
    pretrained: Path,
    out: Path,
    work: Path,
    *,
    tasks: list[str],
    starts: list[str],
    precision: str,
    pair_batch: int,
    pair_steps: int | None,
    pair_rate: float,
    question_passes: int,
    articles: int,
    skip_articles: int,
    hard_negatives: int,
    seed: int,
) -> None:
    """Fine-tune on every task from every start, print each result and write ``out``; finished runs of ``out`` are kept."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"runs": []}
    results |= {"benchmark": "transfer", "machine": describe()}
    folders = _starts(pretrained, work / "starts", starts, seed)
    pairs = {"pair_batch": pair_batch, "pair_steps": pair_steps, "pair_rate": pair_rate}
    texts = {"articles": articles, "skip_articles": skip_articles}
    mixture = {"question_passes": question_passes, **texts, "hard_negatives": hard_negatives}
    options = {"precision": precision, **pairs, **mixture, "seed": seed}
    for task in tasks:
        for start in starts:
            wanted = {"task": task, "start": start, **options}
            if any(wanted.items() <= (_MIXTURE | done).items() for done in results["runs"]):
                continue
            # Named after all it depends on, so that a run that was interrupted is continued, and no other one.
            identity = json.dumps([wanted, str(data.resolve()), fingerprint(folders[start])])
            folder = work / f"{task}-{start}-{sha256(identity.encode()).hexdigest()[:8]}"
            started = time.perf_counter()
            figures = TASKS[task](data, StageContext(folder, seed, str(folders[start]), str(folders[start])), options)
            figures = {**wanted, "seconds": round(time.perf_counter() - started, 1), **figures}
            results["runs"].append(figures)
            print(json.dumps(figures), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _starts(pretrained: Path, work: Path, starts: list[str], seed: int) -> dict[str, Path]:
    """Folders of the encoders to start from, each with the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    config = AutoConfig.from_pretrained(pretrained)
    folders = {"pretrained": pretrained, **{name: work / f"{name}-{seed}" for name in ("new", "bert")}}
    if "new" in starts:
        transformers.set_seed(seed)
        MiniBertModel(config).save_pretrained(folders["new"])
        tokenizer.save_pretrained(folders["new"])
    if "bert" in starts:
        shutil.rmtree(folders["bert"], ignore_errors=True)
        export(pretrained, folders["bert"])  # which names what BERT lacks, such as rotary positions
    return folders


def _classify(data: Path, context: StageContext, train: tuple[str, ...], held_out: str, **arguments: Any) -> dict[str, float]:
    stage = ClassifyStage(
        kind="classify", data=sources(data, train, "train"), eval_data=sources(data, (held_out,), "validation"), **arguments
    )
    metrics = classify(stage, context)
    return {"accuracy": metrics["eval_accuracy"], "macro_f1": metrics["eval_macro_f1"], "steps": metrics["steps"]}


def _nli(data: Path, context: StageContext, options: dict[str, Any]) -> dict[str, float]:
    return _classify(
        *(data, context, NLI, "snli"),
        **{"epochs": 1, "batch_size": 32, "learning_rate": 3e-4, "warmup_ratio": 0.1, "max_length": 128, "dropout": 0.1},
        **{"precision": options["precision"], "metric_for_best": "accuracy"},
    )


def _sst2(data: Path, context: StageContext, options: dict[str, Any]) -> dict[str, float]:
    return _classify(
        *(data, context, ("sst2",), "sst2"),
        **{"epochs": 2, "batch_size": 64, "learning_rate": 3e-4, "warmup_ratio": 0.1, "max_length": 128, "dropout": 0.1},
        **{"precision": options["precision"], "metric_for_best": "accuracy"},
    )


def _conll(data: Path, context: StageContext, options: dict[str, Any]) -> dict[str, float]:
    stage = TagStage(
        kind="tag",
        data=sources(data, ("conll2003",), "train"),
        eval_data=sources(data, ("conll2003",), "validation"),
        **{"epochs": 4, "batch_size": 32, "learning_rate": 5e-4, "warmup_ratio": 0.1, "max_length": 128, "dropout": 0.1},
        precision=options["precision"],
    )
    metrics = tag(stage, context)
    names = {f"entity_{name}": metrics[f"eval_{name}"] for name in ("f1", "precision", "recall")}
    return names | {"steps": metrics["steps"]}


def _retrieval(data: Path, context: StageContext, options: dict[str, Any]) -> dict[str, float]:
    questions = tuple(name for name in PAIRS if name not in TITLES)
    pairs = [
        PairSource(
            **source.model_dump(), hard_negatives=options["hard_negatives"] * (Path(source.path).name in RETRIEVAL_FIGURES)
        )
        for source in sources(data, questions * options["question_passes"] + TITLES, "train")
    ]
    if options["articles"]:
        split = f"train[{options['skip_articles']}:]"
        pairs.append(PairSource(path=str(data / "wiki_text"), split=split, limit=options["articles"], make_pairs=True))
    stage = EmbedStage(
        kind="embed",
        data=pairs,
        **{"learning_rate": options["pair_rate"], "warmup_ratio": 0.1, "max_length": 128, "dropout": 0.0, "pooling": "mean"},
        **{"precision": options["precision"], "batch_size": options["pair_batch"], "max_steps": options["pair_steps"]},
        one_source_per_batch=True,
        save_steps=200,
    )
    metrics = embed(stage, context)
    encoder = SentenceTransformer(str(context.output_dir), device="cuda" if torch.cuda.is_available() else "cpu")
    return {"steps": metrics["steps"], **held_out_figures(data, encoder, RETRIEVAL_FIGURES, queries=1500)}


TASKS = {"nli": _nli, "sst2": _sst2, "conll": _conll, "retrieval": _retrieval}


__all__ = ["TASKS", "run"]
