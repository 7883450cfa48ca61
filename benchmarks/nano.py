"""The two nano recipes (1 layer, 1 head, width 3) and logistic regression on the words that they read.

Both sides are trained on the recipe's training rows; the best epoch here and the strength of regularisation there are chosen
on its validation rows; the test rows are measured once. The original nano-BERT reports accuracy 0.734 and F1 0.745 on IMDB,
0.693 and 0.597 on HateXplain. Half of the reviews are positive; of HateXplain's test posts 59 % are hateful or offensive.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer

from benchmarks.machine import describe
from minibert.data.load import load
from minibert.train.arguments import Recipe
from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe

# Name of a row of the table: the recipe, the folder of its data, and the fields that differ from the recipe.
SYSTEMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "imdb": ("nano_imdb", "imdb", ()),
    "imdb, first words": ("nano_imdb", "imdb", ("tokenizer.truncation_side=right",)),
    "imdb, usual norm": ("nano_imdb", "imdb", ("classify.model.layer_norm_eps=1e-12",)),
    "hatexplain": ("nano_hatexplain", "hatexplain", ()),
    "hatexplain, usual norm": ("nano_hatexplain", "hatexplain", ("classify.model.layer_norm_eps=1e-12",)),
}
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)


def run(data: Path, out: Path, work: Path, *, seeds: int) -> None:
    """Train every system with every seed, print accuracy and macro-F1 on validation and test, and write ``out``."""
    results: dict[str, Any] = {"benchmark": "nano", "machine": describe(), "seeds": seeds, "systems": {}}
    for name, (recipe_name, folder, overrides) in SYSTEMS.items():
        runs = []
        for seed in range(42, 42 + seeds):
            recipe = read_from(load_recipe(recipe_name, [*overrides, f"seed={seed}"]), data / folder)
            run_dir = run_recipe(recipe, output_dir=work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
            runs.append({"seed": seed, **figures(run_dir)})
            print_row(f"{name}, seed {seed}", runs[-1])
        systems: dict[str, Any] = {"nano": {"median": median(runs), "runs": runs}}
        if "norm" not in name:  # the words are the same
            systems["logistic_regression"] = logistic_regression(recipe, run_dir)
            print_row(f"{name}, words in logistic regression", systems["logistic_regression"])
        results["systems"][name] = systems
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read_from(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` with every source of its data in ``folder``."""
    for stage in recipe.stages:
        for source in (*getattr(stage, "data", ()), *(getattr(stage, "eval_data", None) or ())):
            source.path = str(folder)
    return recipe


def figures(run_dir: Path) -> dict[str, Any]:
    """Accuracy and macro-F1 on validation and test, and the seconds of training, of a finished run."""
    metrics = read_metrics(run_dir)
    trained, (tested,) = metrics["classify"], metrics["evaluate"].values()
    return {
        "validation": {key: trained[f"eval_{key}"] for key in ("accuracy", "macro_f1")},
        "test": {key: tested["systems"]["model"][key] for key in ("accuracy", "macro_f1")},
        "train_seconds": trained["train_seconds"],
        "parameters": trained["parameters"],
    }


def median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        split: {key: statistics.median(run[split][key] for run in runs) for key in runs[0][split]}
        for split in ("validation", "test")
    }


def logistic_regression(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Return which of the run's tokens a text holds, within the same 128 positions, in scikit-learn's logistic regression."""
    _, classify, evaluate = recipe.stages
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "1-tokenizer")
    parts = {
        "train": load(classify.data),
        "validation": load(classify.eval_data, split="validation"),
        "test": load(evaluate.data, split="test"),
    }
    words = {name: bag_of_words(tokenizer, list(rows["text"])) for name, rows in parts.items()}
    labels = {name: np.asarray(rows["label"]) for name, rows in parts.items()}

    def score(model: LogisticRegression, part: str) -> dict[str, float]:
        predicted = model.predict(words[part])
        return {
            "accuracy": float(accuracy_score(labels[part], predicted)),
            "macro_f1": float(f1_score(labels[part], predicted, average="macro")),
        }

    models = [LogisticRegression(C=strength, max_iter=1000).fit(words["train"], labels["train"]) for strength in STRENGTHS]
    best = max(models, key=lambda model: score(model, "validation")["accuracy"])
    return {"validation": score(best, "validation"), "test": score(best, "test"), "C": best.C}


def bag_of_words(tokenizer: Any, texts: list[str]) -> csr_matrix:
    """(texts, vocabulary) matrix of ones where a text holds a token."""
    ids = [np.unique(row) for row in tokenizer(texts, truncation=True)["input_ids"]]
    bounds = np.cumsum([0, *map(len, ids)])
    return csr_matrix((np.ones(bounds[-1]), np.concatenate(ids), bounds), shape=(len(texts), len(tokenizer)))


def print_row(name: str, row: dict[str, Any]) -> None:
    shown = [f"{split} {row[split]['accuracy']:.4f} / {row[split]['macro_f1']:.4f}" for split in ("validation", "test")]
    print(f"{name:48}{shown[0]:28}{shown[1]:24}", flush=True)
