"""Evaluate a model on labelled data: retrieval, triplets, similarity, classification, clustering or tagging.

The metrics come from the evaluators of sentence-transformers, from bm25s and from scikit-learn.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import evaluation
from sklearn import cluster, linear_model, model_selection
from sklearn.metrics import classification_report, v_measure_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minibert.data.columns import pick_columns
from minibert.data.labels import REGRESSION, SINGLE, read_labels, refuse_first
from minibert.data.load import SPLITS, TEXT_COLUMNS, as_dataset, read_collection, text_columns
from minibert.data.questions import texts_of
from minibert.data.source import split_parts
from minibert.data.tags import find_tag_columns, read_tags, read_words
from minibert.evaluation.metrics import classification_metrics, tag_metrics
from minibert.files.disk import expand_home, read_settings
from minibert.inference import predict
from minibert.inference.answers import max_length_of
from minibert.inference.load import find_folder, finite, load

SIMILARITY_COLUMNS = ("sentence1", "sentence2", "score")
LABEL_COLUMN = "label"
_LABELLED = (("text", LABEL_COLUMN), ("sentence", LABEL_COLUMN))
# The usual columns of the tasks of embedding models. The data's task is the one with the most columns, or else the first.
TASKS: dict[str, Sequence[Sequence[str]]] = {
    "retrieval": (("query", "answer"), ("question", "answer"), ("query", "passage"), ("anchor", "positive")),
    "triplets": (("anchor", "positive", "negative"), ("query", "positive", "negative")),
    "similarity": (SIMILARITY_COLUMNS,),
    "classification": _LABELLED,
    "clustering": _LABELLED,
}
Systems = Mapping[str, SentenceTransformer]  # the model and, as a baseline, an untrained copy
SEED = 0  # of untrained models, clusters and the rows that are held out
_BLOCK = 2**25  # scores (queries by passages) that are computed at once: 128 MB


def evaluate(
    model: str | Path | SentenceTransformer,
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    limit: int | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    baselines: bool = True,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return the metrics of ``model`` on ``data``.

    The predictions of a model with a head for classes or tags are compared with the labels.
    Every other model is measured by its vectors: retrieval, triplets, similarity,
    classification or clustering. ``docs/evaluation.md`` lists the columns of each task.

    Args:
        model: a model folder, an id on the Hub, or an opened sentence-transformers model.
        data: a file, a folder with a file per split or in the layout of BEIR, a Hub data set
            (owner/name or owner/name:config), or an opened data set.
        split: the split of a folder or Hub data set: by default ``validation``, or the only
            file in ``qrels``. A file or an opened data set is used completely.
        limit: the number of queries (each compared with all passages) or rows, from the start.
        task: one of :data:`TASKS`. By default, the head and the columns decide.
        columns: the names of columns by their use, such as ``{"query": "title"}``. The columns
            on which a recipe trained the model are known, besides the usual ones.
        baselines: also evaluate a copy with random weights and, for retrieval, BM25.
        batch_size: the number of texts to compute at once.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. The default is the best one.
        trust_remote_code: run Python code that comes with the model.
        show_progress: show a progress bar on standard error.

    Example::

        metrics = evaluate("runs/quickstart/2-embed", "questions.jsonl")  # rows of query and answer
        print(metrics["systems"]["model"]["mrr@10"], metrics["systems"]["bm25"]["mrr@10"])

    Returns:
        A dictionary with ``kind`` (the task), numbers of rows, and ``systems``: the metrics of
            ``model``, ``bm25`` and ``untrained``, from 0 to 1 except correlations and errors.

    Raises:
        FileNotFoundError: if the model or the data is neither a local path nor on the Hub.
        ValueError: if data cannot be read, lack a column or a value, or have unknown labels.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit} (--limit).")
    if task not in (None, *TASKS):
        raise ValueError(f"task={task!r} is unknown; use {', '.join(TASKS)} (--task).")
    opening: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    how: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress}
    path = None if isinstance(data, Dataset) else expand_home(data)
    if path and task in (None, "retrieval") and (path / "corpus.jsonl").exists():
        return search(_open(model, **opening), read_collection(path, split), limit, baselines, **how)
    split = split or "validation"
    rows = as_dataset(data, split=split)
    if not len(rows):
        raise ValueError("The data has no rows; give a file or split that holds data.")
    first_rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    trained = [] if isinstance(model, SentenceTransformer) else _trained_columns(model)
    if not isinstance(model, SentenceTransformer):
        heads = [predict.CLASSIFIER, predict.TAGGER] if task is None else [predict.CLASSIFIER]
        opened = predict.open_with_head(model, heads=heads, **opening) if task in (None, "classification") else None
        if opened:
            measure = classification if predict.head_of(opened[0].config) == predict.CLASSIFIER else tagging
            known = next((known for known in trained if {*known.values()} <= {*rows.column_names}), {})
            return measure(*opened, first_rows, columns or known, batch_size)
    kind, names = _choose_task(rows, task, columns or {}, trained)
    if kind == "classification":
        measured = {SPLITS.get(name, name) for name, _ in split_parts(split)}
        whole = path is None or (path.exists() and not path.is_dir()) or "train" in measured
        how["train"] = None if whole else as_dataset(data, split="train")
    encoder = _open(model, **opening)
    if kind == "retrieval":
        return retrieval(encoder, *_texts(rows, names), limit=limit, baselines=baselines, **how)
    measures: dict[str, Callable[..., dict[str, Any]]] = {"triplets": triplets, "similarity": similarity}
    measures |= {"classification": probe, "clustering": clustering}
    return measures[kind](_systems(encoder, baselines), first_rows, names, **how)


def retrieval(model: SentenceTransformer, queries: Sequence[str], answers: Sequence[str], **how: Any) -> dict[str, Any]:
    """Return the metrics of :func:`search`. ``answers[i]`` is an answer to ``queries[i]``. Equal texts count once."""
    passages = {answer: str(number) for number, answer in enumerate(dict.fromkeys(answers))}
    relevant: dict[str, set[str]] = {}
    for query, answer in zip(queries, answers, strict=True):
        relevant.setdefault(query, set()).add(passages[answer])
    texts = {number: passage for passage, number in passages.items()}
    return search(model, ({query: query for query in relevant}, texts, relevant), **how)


def search(
    model: SentenceTransformer, collection: tuple[Any, Any, Any], limit: int | None = None, baselines: bool = True, **how: Any
) -> dict[str, Any]:
    """Return recall@1, recall@10, recall@100, MRR@10 and nDCG@10 of a search.

    ``collection`` has queries by id, passages by id, and the ids of the passages relevant to
    each query. Recall is the fraction of these that were found. Evaluators of
    sentence-transformers get ``how``, such as ``batch_size``.
    """
    queries, passages, relevant = collection
    asked = {name: queries[name] for name in [name for name in queries if name in relevant][:limit]}
    options = {"corpus_chunk_size": max(1_000, _BLOCK // len(asked)), "precision_recall_at_k": [1, 10, 100], **how}
    evaluator = _checked(evaluation.InformationRetrievalEvaluator(asked, passages, relevant, **options))
    hits = _bm25_hits(list(asked.values()), passages, top_k=100) if baselines else []  # first, since bm25s may be missing
    of_model = f"{model.similarity_fn_name}_"
    systems = {name: _retrieval_metrics(evaluator(system), of_model) for name, system in _systems(model, baselines).items()}
    if baselines:
        of_bm25 = evaluator.compute_metrics(hits).items()
        by_words = _retrieval_metrics({name.replace("@k", f"@{k}"): of[k] for name, of in of_bm25 for k in of})
        systems = {"model": systems["model"], "bm25": by_words, **systems}
    return {"kind": "retrieval", "queries": len(asked), "passages": len(passages), "systems": systems}


def similarity(systems: Systems, data: Dataset, columns: Sequence[str], **how: Any) -> dict[str, Any]:
    """Return Spearman's correlation between a score and the cosine of two sentences. See :func:`search`."""
    first, second = _texts(data, columns[:2])
    scores = read_labels(data, columns[2], problem_type=REGRESSION).values.tolist()
    if len(set(scores)) < 2:
        raise ValueError("Every row has the same score; give rows with different scores.")
    evaluator = _checked(evaluation.EmbeddingSimilarityEvaluator(first, second, scores, similarity_fn_names=["cosine"], **how))
    found = {  # None where all cosines are equal: the correlation is undefined
        name: {"spearman": None if math.isnan(value := float(evaluator(system)["spearman_cosine"])) else value}
        for name, system in systems.items()
    }
    return {"kind": "similarity", "pairs": len(scores), "systems": found}


def triplets(systems: Systems, data: Dataset, columns: Sequence[str], **how: Any) -> dict[str, Any]:
    """Return how often an anchor is more similar to the positive than to the negative. See :func:`search`."""
    anchors, positives, negatives = _texts(data, columns)
    differ = [positive != negative for positive, negative in zip(positives, negatives, strict=True)]
    equal = f"the {columns[1]} is the same text, as in {differ.count(False):,} of {len(data):,} rows"
    refuse_first(negatives, differ, columns[2], f"{equal}; correct or remove them")
    evaluator = _checked(evaluation.TripletEvaluator(anchors, positives, negatives, **how))
    accuracy = f"{systems['model'].similarity_fn_name}_accuracy"
    found = {name: {"accuracy": evaluator(system)[accuracy]} for name, system in systems.items()}
    return {"kind": "triplets", "triplets": len(anchors), "systems": found}


def probe(systems: Systems, data: Dataset, columns: Sequence[str], train: Dataset | None = None, **how: Any) -> dict[str, Any]:
    """Return accuracy and macro-F1 of a logistic regression on vectors of ``train``, or else of 80 % of ``data``."""
    parts = [train, data] if train else [data]
    classes = read_labels(parts[0], columns[1], problem_type=SINGLE).names
    labels = np.concatenate([read_labels(part, columns[1], classes, SINGLE).values for part in parts])
    texts = [text for part in parts for text in _texts(part, columns[:1])[0]]
    parting: Any = {"train_size": len(train), "shuffle": False} if train else {"test_size": 0.2, "stratify": labels}
    learned, held_out = model_selection.train_test_split(np.arange(len(texts)), random_state=SEED, **parting)
    found = {}
    for name, vectors in _vectors(systems, texts, **how).items():
        regression = linear_model.LogisticRegression(max_iter=1000).fit(vectors[learned], labels[learned])
        guesses = regression.predict(vectors[held_out])
        report = classification_report(labels[held_out], guesses, output_dict=True, zero_division=0)
        found[name] = {"accuracy": report["accuracy"], "macro_f1": report["macro avg"]["f1-score"]}
    return {"kind": "classification", "rows": len(held_out), "training_rows": len(learned), "systems": found}


def clustering(systems: Systems, data: Dataset, columns: Sequence[str], **how: Any) -> dict[str, Any]:
    """Return the V-measure of k-means on the vectors of texts, with a cluster per label. See :func:`search`."""
    labels = read_labels(data, columns[1], problem_type=SINGLE).values
    clusters = len(np.unique(labels))
    if not 1 < clusters < len(data):
        raise ValueError(f"{len(data)} rows have {clusters} labels; clustering needs at least 2, and more rows than labels.")
    means = cluster.MiniBatchKMeans(clusters, batch_size=500, n_init="auto", random_state=SEED)
    vectors = _vectors(systems, _texts(data, columns[:1])[0], **how)
    found = {name: {"v_measure": v_measure_score(labels, means.fit_predict(points))} for name, points in vectors.items()}
    return {"kind": "clustering", "rows": len(data), "clusters": clusters, "systems": found}


def classification(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, columns: Mapping[str, str], batch_size: int
) -> dict[str, Any]:
    """Return accuracy and macro-F1, or the metrics of a multi-label or regression model. See :func:`evaluate`."""
    # A regression model may be evaluated on similarity data, whose numbers are in score.
    problem_type = predict.problem_type_of(model.config)
    numbers = problem_type == REGRESSION and LABEL_COLUMN not in data.column_names
    column = columns.get(LABEL_COLUMN, SIMILARITY_COLUMNS[2] if numbers else LABEL_COLUMN)
    pick_columns(data.column_names, [column], [], option="--column label=NAME")
    texts = [name for name in text_columns(data) if name != column]
    wanted = [name for use, name in columns.items() if use != LABEL_COLUMN]
    names = pick_columns(texts, wanted, TEXT_COLUMNS, option="--column text=NAME", columns=data.column_names)
    labels = read_labels(data, column, predict.class_names(model.config), problem_type).values
    encoded = tokenizer(*_texts(data, names), truncation=True, max_length=max_length_of(model, tokenizer))
    logits = torch.stack(predict.compute_logits(model.eval(), tokenizer, encoded, batch_size))
    metrics = classification_metrics(logits, labels, problem_type)
    metrics.pop("loss", None)
    return {"kind": "classification", "rows": len(labels), "systems": {"model": metrics}}


def tagging(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, columns: Mapping[str, str], batch_size: int
) -> dict[str, Any]:
    """Return entity-level F1 and the accuracy of the word tags. See :func:`evaluate`."""
    if columns.keys() - {"words", "tags"}:
        raise ValueError(f"A tagger reads words and tags, got {', '.join(columns)}; name them with --column words=NAME.")
    words, tagged = find_tag_columns(data, columns.get("words"), columns.get("tags"), "The data")
    sentences = read_words(data, words)
    tags, _ = read_tags(data, tagged, sentences, predict.class_names(model.config))
    found = predict.tag_sentences(model.eval(), tokenizer, sentences, batch_size=batch_size)
    metrics = tag_metrics(tags, [sentence for sentence, _ in found])
    return {"kind": "tagging", "rows": len(tags), "words": sum(map(len, tags)), "systems": {"model": metrics}}


def untrained(model: SentenceTransformer) -> SentenceTransformer | None:
    """Return a copy of ``model`` with random weights, or None if it has no transformer."""
    if model.transformers_model is None:
        return None
    blank = copy.deepcopy(model)
    encoder: Any = blank.transformers_model
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
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


def _checked(evaluator: Any) -> Any:
    """Make an evaluator of sentence-transformers refuse vectors that are not numbers."""
    embed = evaluator.embed_inputs
    evaluator.embed_inputs = lambda *texts, **options: finite(embed(*texts, **options))
    return evaluator


def _open(model: Any, **how: Any) -> SentenceTransformer:
    return model if isinstance(model, SentenceTransformer) else load(model, **how)


def _systems(model: SentenceTransformer, baselines: bool) -> Systems:
    blank = untrained(model) if baselines else None
    return {"model": model, **({"untrained": blank} if blank else {})}


def _vectors(systems: Systems, texts: list[str], **how: Any) -> dict[str, np.ndarray]:
    return {name: finite(system.encode(texts, **how)) for name, system in systems.items()}


def _trained_columns(model: str | Path) -> list[dict[str, str]]:
    """Return the columns that the stage noted for each data set, if a stage of a recipe trained ``model``."""
    with contextlib.suppress(TypeError, ValueError, LookupError, AttributeError):  # another program may write such a file
        noted = read_settings(find_folder(model) / "metrics.json")["data"]
        return [{use: str(name) for use, name in used["columns"].items()} for used in noted]
    return []


def _choose_task(
    data: Dataset, task: str | None, columns: Mapping[str, str], trained: Sequence[Mapping[str, str]]
) -> tuple[str, list[str]]:
    """Return the task and its columns. ``columns`` and ``trained`` have names of columns by their use."""
    found = [
        (kind, list(named.values()))
        for known in (*trained, {})
        for kind in (TASKS if task is None else [task])
        for uses in TASKS[kind]
        if columns.items() <= (named := {use: {**known, **columns}.get(use, use) for use in uses}).items()
        if {*named.values()} <= {*data.column_names}
    ]
    if not found:
        usual = "; ".join(f"{kind}: {', '.join(groups[0])}" for kind, groups in TASKS.items() if task in (None, kind))
        every = ", ".join(data.column_names)
        raise ValueError(
            f"The data has the columns {every}, which is none of: {usual}. Name yours: --column query=title (recipes: columns)."
        )
    return max(found, key=lambda one: len(one[1]))


def _retrieval_metrics(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    return {name: float(metrics[prefix + name]) for name in ("recall@1", "recall@10", "recall@100", "mrr@10", "ndcg@10")}


def _bm25_hits(queries: list[str], passages: Mapping[str, str], *, top_k: int) -> list[Any]:
    """Return the list of the best passages for each query, found with BM25."""
    from minibert.inference.bm25 import WordIndex  # slow to import, and used only here

    try:
        index = WordIndex.build(passages.values())
    except ValueError:
        return [[] for _ in queries]
    scores, numbers = index.search(queries, top_k)
    ids = list(passages)
    found = (zip(*query, strict=True) for query in zip(numbers.tolist(), scores.tolist(), strict=True))
    # A passage that shares no word has the number -1.
    return [[{"corpus_id": ids[number], "score": score} for number, score in query if number >= 0] for query in found]


def _texts(data: Dataset, names: Sequence[str]) -> list[list[str]]:
    """Return the list of texts of each column in ``names``."""
    rows = texts_of(data.select_columns(list(names)), names)
    return list(map(list, zip(*rows, strict=True)))
