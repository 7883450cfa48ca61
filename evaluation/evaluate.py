"""Evaluate a model on labelled data: retrieval, similarity, classification or tagging.

The metrics come from the evaluators of sentence-transformers, from bm25s and from scikit-learn.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, InformationRetrievalEvaluator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minibert.data.columns import pick_columns
from minibert.data.labels import REGRESSION, read_labels
from minibert.data.load import TEXT_COLUMNS, as_dataset, text_columns
from minibert.data.questions import texts_of
from minibert.data.tags import find_tag_columns, read_tags, read_words
from minibert.evaluation.metrics import classification_metrics, tag_metrics
from minibert.inference.answers import max_length_of
from minibert.inference.load import finite, load
from minibert.inference.predict import (
    CLASSIFIER,
    TAGGER,
    class_names,
    compute_logits,
    head_of,
    open_with_head,
    problem_type_of,
    tag_sentences,
)

RETRIEVAL_COLUMNS = (("query", "answer"), ("question", "answer"), ("query", "passage"), ("anchor", "positive"))
SIMILARITY_COLUMNS = ("sentence1", "sentence2", "score")
LABEL_COLUMN = "label"
UNTRAINED_SEED = 0
# A block of scores (queries by passages) takes at most 128 MB.
_BLOCK = 2**25


def evaluate(
    model: str | Path | SentenceTransformer,
    data: str | Path | Dataset,
    *,
    split: str = "validation",
    limit: int | None = None,
    baselines: bool = True,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return the metrics of ``model`` on ``data``.

    The head of the model and the columns of the data determine the task:

    - **classification**: a model with a sequence-classification head, a text column or a pair
      of text columns, and a column ``label``. A label is a list if a text has several classes,
      and a number for regression.
    - **tagging**: a model with a token-classification head, a column ``tokens`` (or words), and
      a column ``ner_tags`` (or tags, pos_tags, labels).
    - **similarity**: the columns ``sentence1``, ``sentence2`` and ``score``. The metric is
      Spearman's rank correlation between the cosine similarity and the score.
    - **retrieval**: the columns ``query`` and ``answer`` (or question and answer, query and
      passage, anchor and positive). Each query is compared with all different answers in
      ``data``. Every answer that occurs in a row with the query is relevant.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers
            model.
        data: a file, a folder with a file per split, a Hub data set (owner/name or
            owner/name:config), or an opened data set.
        split: the split of a folder or Hub data set. A file or an opened data set is used
            completely.
        limit: evaluate only this number of queries (or rows), from the start. Each query is
            still compared with the answers of all rows.
        baselines: for an embedding model, also evaluate a copy with random weights and, for
            retrieval, BM25.
        batch_size: the number of texts to compute at once.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. The default is the best one
            available.
        trust_remote_code: run Python code that comes with the model.
        show_progress: show a progress bar on standard error.

    Example::

        metrics = evaluate("runs/quickstart/2-embed", "questions.jsonl")  # rows of query and answer
        print(metrics["systems"]["model"]["mrr@10"], metrics["systems"]["bm25"]["mrr@10"])

    Returns:
        A dictionary with ``kind`` (the task), the number of rows, and ``systems``. The entry
            ``systems`` maps ``model``, ``bm25`` and ``untrained`` to a dictionary of metrics.
            Metrics lie between 0 and 1, except correlations and the mean squared error.

    Raises:
        FileNotFoundError: if the model or the data is neither a local path nor on the Hub.
        ValueError: if the data cannot be read, lacks a column or a value, or has labels that
            the model does not know.
    """
    data = as_dataset(data, split=split)
    if not len(data):
        raise ValueError("The data has no rows; give a file or split that holds data.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit} (--limit).")
    first_rows = data if limit is None else data.select(range(min(limit, len(data))))
    if not isinstance(model, SentenceTransformer):
        opened = open_with_head(model, heads=[CLASSIFIER, TAGGER], device=device, trust_remote_code=trust_remote_code)
        if opened:
            measure = classification if head_of(opened[0].config) == CLASSIFIER else tagging
            return measure(*opened, first_rows, batch_size=batch_size)
    columns = set(data.column_names)
    pair = next((pair for pair in RETRIEVAL_COLUMNS if columns.issuperset(pair)), None)
    if not pair and not columns.issuperset(SIMILARITY_COLUMNS):
        raise ValueError(
            f"{_name_columns(data)}, which is none of: query and answer (retrieval), "
            "sentence1, sentence2 and score (similarity), or texts and label with a model that has a classification "
            "head; rename the columns."
        )
    encoder = model
    if not isinstance(encoder, SentenceTransformer):
        encoder = load(encoder, device=device, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"baselines": baselines, "batch_size": batch_size, "show_progress": show_progress}
    if pair:
        return retrieval(encoder, *_texts(data, pair), limit=limit, **how)
    return similarity(encoder, first_rows, **how)


def retrieval(
    model: SentenceTransformer,
    queries: Sequence[str],
    answers: Sequence[str],
    *,
    limit: int | None = None,
    baselines: bool = True,
    batch_size: int = 64,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return recall@1, recall@10, recall@100, MRR@10 and nDCG@10 of a search.

    ``answers[i]`` is an answer to ``queries[i]``. Recall is the fraction of a query's answers
    that were found. Equal texts count once. See :func:`evaluate` for arguments and result.
    """
    if baselines:
        from minibert.inference import bm25  # noqa: F401  # fails before anything is encoded
    passages = {answer: str(number) for number, answer in enumerate(dict.fromkeys(answers))}
    relevant: dict[str, set[str]] = {}
    for query, answer in zip(queries, answers, strict=True):
        relevant.setdefault(query, set()).add(passages[answer])
    asked = list(relevant)[:limit]
    evaluator = _CheckedRetrieval(
        queries={query: query for query in asked},
        corpus={number: passage for passage, number in passages.items()},
        relevant_docs=relevant,
        corpus_chunk_size=max(1_000, _BLOCK // len(asked)),
        precision_recall_at_k=[1, 10, 100],
        batch_size=batch_size,
        show_progress_bar=show_progress,
        write_csv=False,
    )
    systems = {"model": _retrieval_metrics(evaluator(model), f"{model.similarity_fn_name}_")}
    if baselines:
        of_bm25 = evaluator.compute_metrics(_bm25_hits(asked, list(passages), top_k=100))
        flat = {name.replace("@k", f"@{k}"): value for name, by_k in of_bm25.items() for k, value in by_k.items()}
        systems["bm25"] = _retrieval_metrics(flat)
        if blank := untrained(model):
            systems["untrained"] = _retrieval_metrics(evaluator(blank), f"{model.similarity_fn_name}_")
    return {"kind": "retrieval", "queries": len(asked), "passages": len(passages), "systems": systems}


def similarity(
    model: SentenceTransformer, data: Dataset, *, baselines: bool = True, batch_size: int = 64, show_progress: bool = False
) -> dict[str, Any]:
    """Return Spearman's correlation between ``score`` and the cosine between two sentences.

    See :func:`evaluate` for the arguments and the result.
    """
    first, second = _texts(data, SIMILARITY_COLUMNS[:2])
    scores = read_labels(data, "score", problem_type=REGRESSION).values.tolist()
    if len(set(scores)) < 2:
        raise ValueError("Every row has the same score; give rows with different scores.")
    evaluator = _CheckedSimilarity(
        first,
        second,
        scores,
        main_similarity="cosine",
        similarity_fn_names=["cosine"],
        batch_size=batch_size,
        show_progress_bar=show_progress,
        write_csv=False,
    )
    measured = {"model": model, "untrained": untrained(model) if baselines else None}
    systems = {  # None where all cosines are equal: the correlation is undefined
        name: {"spearman": None if math.isnan(value := float(evaluator(system)["spearman_cosine"])) else value}
        for name, system in measured.items()
        if system is not None
    }
    return {"kind": "similarity", "pairs": len(scores), "systems": systems}


def classification(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, *, batch_size: int = 64
) -> dict[str, Any]:
    """Return accuracy and macro-F1, or the metrics of a multi-label or regression model.

    See :func:`evaluate` for the arguments and the result.
    """
    # A regression model may be evaluated on similarity data, whose numbers are in score.
    problem_type = problem_type_of(model.config)
    numbers = problem_type == REGRESSION and LABEL_COLUMN not in data.column_names
    column = SIMILARITY_COLUMNS[2] if numbers else LABEL_COLUMN
    if column not in data.column_names:
        raise ValueError(f"{_name_columns(data)}, and no column {column!r}; rename the column of the true labels.")
    texts = [name for name in text_columns(data) if name != column]
    names = pick_columns(texts, None, TEXT_COLUMNS, option="rename the columns", columns=data.column_names)
    labels = read_labels(data, column, class_names(model.config), problem_type).values
    encoded = tokenizer(*_texts(data, names), truncation=True, max_length=max_length_of(model, tokenizer))
    logits = torch.stack(compute_logits(model.eval(), tokenizer, encoded, batch_size))
    metrics = classification_metrics(logits, labels, problem_type)
    metrics.pop("loss", None)
    return {"kind": "classification", "rows": len(labels), "systems": {"model": metrics}}


def tagging(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, *, batch_size: int = 64
) -> dict[str, Any]:
    """Return entity-level F1 and the accuracy of the word tags. See :func:`evaluate`."""
    columns = find_tag_columns(data, None, None, "The data")
    sentences = read_words(data, columns[0])
    tags, _ = read_tags(data, columns[1], sentences, class_names(model.config))
    found = tag_sentences(model.eval(), tokenizer, sentences, batch_size=batch_size)
    metrics = tag_metrics(tags, [sentence for sentence, _ in found])
    return {"kind": "tagging", "rows": len(tags), "words": sum(map(len, tags)), "systems": {"model": metrics}}


def untrained(model: SentenceTransformer) -> SentenceTransformer | None:
    """Return a copy of ``model`` with random weights, or None if it has no transformer."""
    if model.transformers_model is None:
        return None
    blank = copy.deepcopy(model)
    encoder: Any = blank.transformers_model
    with torch.random.fork_rng():
        torch.manual_seed(UNTRAINED_SEED)
        encoder.load_state_dict(type(encoder)(copy.deepcopy(encoder.config)).state_dict())
        for layer in (layer for module in list(blank.children())[1:] for layer in module.modules()):
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
    return blank.eval()


def metrics_table(result: dict[str, Any]) -> str:
    """Format the result of :func:`evaluate` as a text table with one system per row."""
    counts = ", ".join(f"{value:,} {name}" for name, value in result.items() if isinstance(value, int))
    names = list(result["systems"]["model"])
    lines = [f"{result['kind']}: {counts}", "".join([f"{'':12}", *(f"{name:>12}" for name in names)])]
    for system, metrics in result["systems"].items():
        values = [metrics[name] for name in names]
        shown = (f"{'undefined':>12}" if value is None else f"{value:12.4f}" for value in values)
        lines.append("".join([f"{system:12}", *shown]))
    return "\n".join(lines)


class _Finite:
    """Make an evaluator of sentence-transformers refuse vectors that are not numbers."""

    def embed_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Return the vectors of texts. Raise FloatingPointError if any is NaN or infinite."""
        return finite(super().embed_inputs(*args, **kwargs))  # type: ignore[misc]  # of the evaluator


class _CheckedRetrieval(_Finite, InformationRetrievalEvaluator): ...


class _CheckedSimilarity(_Finite, EmbeddingSimilarityEvaluator): ...


def _retrieval_metrics(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {name: float(metrics[prefix + name]) for name in ("recall@1", "recall@10", "recall@100", "mrr@10", "ndcg@10")}


def _bm25_hits(queries: list[str], passages: list[str], *, top_k: int) -> list[Any]:
    """Return the list of the best passages for each query, found with BM25."""
    from minibert.inference.bm25 import WordIndex  # slow to import, and used only here

    try:
        index = WordIndex.build(passages)
    except ValueError:
        return [[] for _ in queries]
    scores, numbers = index.search(queries, top_k)
    found = (zip(*query, strict=True) for query in zip(numbers.tolist(), scores.tolist(), strict=True))
    # A passage that shares no word has the number -1.
    return [[{"corpus_id": str(number), "score": score} for number, score in query if number >= 0] for query in found]


def _texts(data: Dataset, names: Sequence[str]) -> list[list[str]]:
    """Return the list of texts of each column in ``names``."""
    rows = texts_of(data.select_columns(list(names)), names)
    return list(map(list, zip(*rows, strict=True)))


def _name_columns(data: Dataset) -> str:
    return f"The data has the columns {', '.join(data.column_names)}"
