"""Compute metrics of predictions with scikit-learn and scipy, for evaluation and training."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, mean_squared_error, precision_recall_fscore_support
from torch import Tensor, nn

from minibert.data.labels import MULTI, REGRESSION, SINGLE
from minibert.data.tags import entity_spans, holds_entities

# The metrics of each problem type. By default, the first metric selects the best checkpoint.
METRICS = {
    SINGLE: ("accuracy", "macro_f1", "loss"),
    MULTI: ("micro_f1", "macro_f1", "subset_accuracy", "loss"),
    REGRESSION: ("spearman", "pearson", "mse"),
}
SMALLER_IS_BETTER = ("loss", "perplexity", "mse")


def classification_metrics(logits: Tensor, labels: np.ndarray, problem_type: str = SINGLE) -> dict[str, float | None]:
    """Return the metrics of a problem type.

    ``logits`` have the shape (rows, classes), or (rows, 1) for regression. ``labels`` have the
    form of :attr:`minibert.data.labels.Labels.values`.

    - Single label: accuracy, macro-F1 over the classes that occur, and cross entropy.
    - Multi-label: micro-F1, macro-F1 over all classes, the fraction of rows with exactly the
      right classes, and binary cross entropy. A class is predicted above a probability of 0.5.
    - Regression: Spearman's and Pearson's correlation, and the mean squared error. A
      correlation is None, which means undefined, if the logits or the labels are constant.
    """
    if problem_type == REGRESSION:
        predicted = logits.squeeze(-1).double().numpy()
        varied = np.ptp(predicted) > 0 and np.ptp(labels) > 0
        return {
            "spearman": float(spearmanr(labels, predicted).statistic) if varied else None,
            "pearson": float(pearsonr(labels, predicted).statistic) if varied else None,
            "mse": float(mean_squared_error(labels, predicted)),
        }
    if problem_type == MULTI:
        chosen = (logits > 0).numpy()
        return {
            "micro_f1": float(f1_score(labels, chosen, average="micro", zero_division=0)),
            "macro_f1": float(f1_score(labels, chosen, average="macro", zero_division=0)),
            "subset_accuracy": float(accuracy_score(labels, chosen)),
            "loss": float(nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels))),
        }
    predicted = logits.argmax(-1).numpy()
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "loss": float(nn.functional.cross_entropy(logits, torch.from_numpy(labels))),
    }


def tag_metrics(expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return entity-level precision, recall and F1, and the accuracy of the word tags.

    A predicted entity is right if its type, its first word and its last word are right. Tags
    that are not IOB2, such as parts of speech, have no entities. The metrics are then the
    accuracy and the macro-F1 over the tags that occur.

    >>> tag_metrics([["B-PER", "I-PER", "O"]], [["B-PER", "I-PER", "B-LOC"]])["precision"]
    0.5
    """
    words = [tag for tags in expected for tag in tags]
    guesses = [tag for tags in predicted for tag in tags]
    accuracy = float(accuracy_score(words, guesses))
    if not holds_entities([*words, *guesses]):
        return {"accuracy": accuracy, "macro_f1": float(f1_score(words, guesses, average="macro", zero_division=0))}
    true, found = (
        {(row, *span) for row, tags in enumerate(sentences) for span in entity_spans(tags)}
        for sentences in (expected, predicted)
    )
    spans = sorted(true | found)
    precision, recall, f1, _ = precision_recall_fscore_support(
        [span in true for span in spans] or [False],
        [span in found for span in spans] or [False],
        average="binary",
        zero_division=0,
    )
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": accuracy}
