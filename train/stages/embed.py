"""Train sentence embeddings with sentence-transformers (the ``embed`` stage)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel

from minibert.data.labels import REGRESSION, is_list, read_labels, refuse_first
from minibert.data.load import check_columns, join, load, text_columns
from minibert.data.source import DataSource, joined_paths
from minibert.data.text_pairs import make_pairs
from minibert.data.tokenized_corpus import load_documents
from minibert.evaluation.evaluate import SIMILARITY_COLUMNS, retrieval, similarity
from minibert.files.disk import read_settings
from minibert.files.processes import processes
from minibert.inference.load import embedder, find_folder, open_config, pooling_mode
from minibert.inference.load import load as load_embedder
from minibert.train import checkpoint
from minibert.train.arguments import IN_BATCH, SCORED, EmbedStage, NewModel
from minibert.train.loop import checkpoint_activations, in_precision
from minibert.train.sentence_trainer import train
from minibert.train.stage import StageContext, load_start
from minibert.train.stages.distill.teacher import freeze

# Minimal gap in similarity, relative to the positive. Closer passages may also be answers.
_MARGIN = 0.05
QUERY_COLUMNS = ("query", "question", "anchor", "sentence1", "premise")
SCORE_COLUMNS = ("score", "label", "similarity", "relevance")
# What each loss needs besides two texts.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # as encode_document looks for them
_NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(IN_BATCH, ()),
    **dict.fromkeys(SCORED, ("score",)),
    "triplet": ("negative",),
    "margin_mse": ("negative", "score"),
}


def embed(args: EmbedStage, context: StageContext) -> dict[str, Any]:
    """Train a sentence-transformers model, and return its metrics.

    mnrl is the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652), cached
    as by Gao et al. 2021 (arXiv:2101.06983). gist is GISTEmbed (Solatorio 2024, arXiv:2402.16829),
    and margin_mse the loss of Hofstätter et al. 2020 (arXiv:2010.02666).
    """
    sources, evaluate = training_data(args, context), None
    if args.eval_data:
        held_out = evaluation_data(args)
        evaluate = partial(measure, data=held_out, dims=args.matryoshka_dims, batch_size=args.eval_batch_size)
    prompts = check_models(args, context)
    context.end_check()
    model = _starting_model(args, context, prompts)
    sources = _completed(sources, model, args, context)
    pairs = {str(number): part for number, part in enumerate(sources.values())} if args.separate else join([*sources.values()])
    metrics = train(model, pairs, _losses(args, context, model), args, context, evaluate)
    return {**metrics, "train_rows": sum(map(len, sources.values()))}


def training_data(args: EmbedStage, context: StageContext) -> dict[str, Dataset]:
    """Return training data with columns that are named by their use.

    If all rows of a batch come from one source, return a data set for each source. Otherwise,
    return a data set of the given pairs and a data set of the pairs that are made from texts.
    """
    if args.separate:
        groups = [[source] for source in args.data]
    else:
        groups = [[source for source in args.data if args.makes_pairs_of(source) == made] for made in (False, True)]
    found: dict[str, Dataset] = {}
    for number, group in enumerate(filter(None, groups)):
        loss = args.loss_of(group[0])
        if args.makes_pairs_of(group[0]):
            documents = [load_documents(source, "train", args.text_column, args.sample_by) for source in group]
            dataset = make_pairs(join(documents), context.seed)
            columns = {name: name for name in dataset.column_names}
        else:
            dataset = load(group)
            needs = {*_NEEDS[loss]} - ({"score"} if args.teacher and loss == "margin_mse" else set())
            if loss in IN_BATCH and args.negative_column:
                needs.add("negative")
            elif args.hard_negatives_of(group[0]):
                needs.discard("negative")
            columns = loss_columns(args, loss, dataset, group, needs)
        if len(dataset) < 2:
            raise ValueError(f"Training needs at least two rows; {group[0].path} has one. Add rows.")
        context.note_columns(group, dataset, columns)
        found[f"{number} {Path(group[0].path).name}"] = _selected(dataset, columns, args, loss)
    return found


def evaluation_data(args: EmbedStage) -> Dataset:
    """Return pairs with scores, triplets or pairs. The metric that selects the checkpoint must fit."""
    sources = args.eval_data or []
    held_out, loss, metric = load(sources, split="validation"), args.loss, args.metric_for_best
    if loss in SCORED or {*SIMILARITY_COLUMNS} <= {*held_out.column_names}:
        loss = "cosent"
    measured = {"cosent": "spearman", "triplet": "accuracy"}.get(loss, "mrr@10, ndcg@10, recall@1, recall@10 or recall@100")
    if metric and metric not in measured:
        where = joined_paths(sources)
        raise ValueError(f"metric_for_best={metric} is not measured on {where}; set it to {measured}, or to null.")
    needs = {*_NEEDS[loss]} if loss in ("cosent", "triplet") else set()
    return _selected(held_out, loss_columns(args, loss, held_out, sources, needs), args, loss)


def check_models(args: EmbedStage, context: StageContext) -> dict[str, str]:
    """Refuse models that do not fit the stage, and return the prompts to train with."""
    for field, name in (("guide", context.guide), ("teacher", context.teacher)):
        if not name or context.is_unfinished(name):
            continue
        folder = find_folder(name)
        kind = read_settings(folder / "config_sentence_transformers.json").get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer" or not (folder / "modules.json").exists():
            raise ValueError(
                f"{field}={name} is not an embedding model; give a model of sentence-transformers, or of an embed stage."
            )
    start, dims = args.model if isinstance(args.model, NewModel) else context.start or context.model, args.matryoshka_dims
    if dims and start:
        width = (start.config() if isinstance(start, NewModel) else open_config(start)).hidden_size
        if dims[0] > width:
            raise ValueError(f"matryoshka_dims={dims} exceeds the {width} numbers of a vector; give at most {width}.")
    saved: dict[str, str] = {}
    if context.model and not context.is_unfinished(context.model):
        saved = read_settings(find_folder(context.model) / "config_sentence_transformers.json").get("prompts") or {}
    saved = {name: text for name, text in saved.items() if text}
    query, passage = saved.get("query"), next((saved[name] for name in _PASSAGE_PROMPTS if name in saved), None)
    if saved and (args.query_prompt not in (None, query) or args.passage_prompt not in (None, passage)):
        raise ValueError(
            f"{context.model} already has the prompts {saved}; remove query_prompt and passage_prompt to keep them."
        )
    own = {"query": args.query_prompt or query, "document": args.passage_prompt or passage}
    return saved | {name: text for name, text in own.items() if text}


def _completed(
    sources: dict[str, Dataset], model: SentenceTransformer, args: EmbedStage, context: StageContext
) -> dict[str, Dataset]:
    """Add hard negatives and a teacher's scores. Drop pairs with too few hard negatives.

    Hard negatives are passages that ``model`` finds similar to the query, but clearly less
    similar than the positive. A resumed run reads both from the folder ``negatives``.
    """
    folder, completed = context.output_dir / "negatives", dict(sources)
    teacher = load_embedder(context.teacher) if context.teacher else None
    for number, (name, pairs) in enumerate(sources.items()):
        # All sources of a data set have the same number of hard negatives and the same loss.
        source = args.data[number if args.separate else 0]
        wanted, taught = args.hard_negatives_of(source), args.loss_of(source) == "margin_mse" and teacher
        if not wanted and not taught:
            continue
        kept = folder / str(args.data.index(source) if args.separate else number)
        if processes().is_main_process and not kept.exists():
            found = pairs
            with in_precision(args):
                if wanted:
                    found = mine_hard_negatives(
                        pairs,
                        model,
                        num_negatives=wanted,
                        relative_margin=_MARGIN,
                        range_max=50 + wanted,
                        query_prompt_name="query",
                        corpus_prompt_name="document",
                        output_format="n-tuple",
                        batch_size=args.eval_batch_size,
                        verbose=False,
                    )
                if taught and len(found):
                    found = _with_scores(found, teacher, args)
            if len(found) < 2:
                raise ValueError(
                    f"Only {len(found)} of {len(pairs)} pairs of {name.partition(' ')[2]} have {wanted} hard "
                    "negatives; lower hard_negatives, or start from a better embedding model."
                )
            checkpoint.write_folder(kept, partial(Dataset.save_to_disk, found))
        processes().wait_for_everyone()
        completed[name] = Dataset.load_from_disk(kept)
    return completed


def _with_scores(rows: Dataset, teacher: SentenceTransformer, args: EmbedStage) -> Dataset:
    """Add the column ``score``: for each negative, how much closer the teacher finds the positive."""
    options: dict[str, Any] = {"batch_size": args.eval_batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    queries = teacher.encode_query(rows["anchor"][:], **options)
    found = [
        teacher.similarity_pairwise(queries, teacher.encode_document(rows[name][:], **options)).float().cpu().numpy()
        for name in rows.column_names[1:]
    ]
    margins = np.stack([found[0] - scores for scores in found[1:]], axis=1)
    _check_size(margins.ravel(), "margin_mse", args, "teacher")
    return rows.add_column("score", list(margins))


def loss_columns(
    args: EmbedStage, loss: str, dataset: Dataset, sources: Sequence[DataSource], needs: set[str]
) -> dict[str, str]:
    """Return the columns of two texts and of ``needs`` by their use, as named in the recipe or else by their names."""
    names, texts, where = dataset.column_names, text_columns(dataset), joined_paths(sources)
    in_batch = loss in IN_BATCH
    scores = [name for name in SCORE_COLUMNS if name in names and not (in_batch and name in texts)]
    usual = "negative" if "negative" in names and not in_batch else None
    known = {"negative": args.negative_column or usual, "score": args.score_column or next(iter(scores), None)}
    has = {use for use, column in known.items() if column in names}
    allowed = ", ".join(name for name, uses in _NEEDS.items() if {*uses} == has)
    if in_batch and scores:
        raise ValueError(
            f"{where} has a column {scores[0]!r}, so not all of its pairs are positives. Give the pairs that belong together, "
            f"without that column, or choose a loss for these columns: {allowed}."
        )
    if missing := [use for use in _NEEDS[loss] if use in needs and not known[use]]:
        raise ValueError(
            f"loss: {loss} also needs a column of {' and of '.join(missing)}s; the columns of {where} are {', '.join(names)}. "
            f"Name it with {' and '.join(f'{use}_column:' for use in missing)}, or choose a loss for these columns: {allowed}."
        )
    given = [name for name in (args.anchor_column, args.positive_column) if name]
    extra = {use: column for use, column in known.items() if use in needs and column}
    check_columns(dataset, [*given, *extra.values()], sources)
    found = [name for name in texts if name not in known.values()]
    free = [name for name in found if name not in given]
    columns = given
    if len(given) < 2:
        advice = "Name them with anchor_column: and positive_column:."
        if len(free) + len(given) != 2:
            raise ValueError(
                f"{where} needs two columns of strings, queries and passages; its columns of strings are "
                f"{', '.join(found) or 'none'}. {advice}"
            )
        columns = sorted(free, key=lambda name: name not in QUERY_COLUMNS)  # the query first
        if given:
            columns = [args.anchor_column or free[0], args.positive_column or free[0]]
        elif loss not in SCORED and [name in QUERY_COLUMNS for name in columns] != [True, False]:
            raise ValueError(
                f"The columns {' and '.join(free)} of {where} do not say which of them holds the queries (usual are "
                f"{', '.join(QUERY_COLUMNS)}). {advice}"
            )
        check_columns(dataset, columns, sources)
    uses = SIMILARITY_COLUMNS[:2] if loss in SCORED else ("anchor", "positive")
    return {**dict(zip(uses, columns, strict=True)), **extra}


def _selected(dataset: Dataset, columns: dict[str, str], args: EmbedStage, loss: str) -> Dataset:
    """Return ``columns``, named by their use, after a check of the values."""
    rows = dataset.select_columns([*columns.values()]).rename_columns({column: use for use, column in columns.items()})
    if "negative" in columns:
        positives, negatives = rows["positive"][:], rows["negative"][:]
        differ = [positive != negative for positive, negative in zip(positives, negatives, strict=True)]
        refuse_first(negatives, differ, columns["negative"], "its positive is the same text; correct it or remove the row")
    if "score" not in columns:
        return rows
    column = columns["score"]
    if loss == "margin_mse" and is_list(dataset.features[column]):
        lists = dataset[column][:]
        refuse_first(lists, [len(pair or ()) == 2 for pair in lists], column, "give the scores of positive and negative")
        numbers = np.subtract(*np.array(lists, dtype=np.float32).T)
        refuse_first(lists, np.isfinite(numbers), column, "finite numbers belong there")
    else:
        numbers = read_labels(dataset, column, problem_type=REGRESSION).values
    if loss in SCORED and np.ptp(numbers) == 0:
        raise ValueError(f"Every row has {column}={numbers[0]:g}; give rows with different scores.")
    _check_size(numbers, loss, args, column)
    return rows.remove_columns("score").add_column("score", numbers)


def _check_size(numbers: np.ndarray, loss: str, args: EmbedStage, column: str) -> None:
    """Refuse scores that cosines, or differences of cosines, cannot reach."""
    largest = 1 if loss == "cosine_mse" else 2 if loss == "margin_mse" and args.normalize else np.inf
    advice = f"loss: {loss} with vectors of length 1 reaches at most {largest}; divide the scores, or choose another loss"
    refuse_first(numbers, np.abs(numbers) <= largest, column, advice)


def _starting_model(args: EmbedStage, context: StageContext, prompts: dict[str, str]) -> SentenceTransformer:
    tokenizer, encoder, _ = load_start(AutoModel, args, context)
    # config.pooling belongs to the pooler, and stays for a classifier that is exported as BERT.
    start = pooling_mode(find_folder(context.model)) if context.model else None
    pooling = args.pooling or start or getattr(encoder.config, "pooling", "mean")
    # margin_mse compares dot products.
    compared = "dot" if args.loss == "margin_mse" and not args.normalize else "cosine"
    options: dict[str, Any] = {"prompts": prompts, "similarity_fn_name": compared}
    model = embedder(encoder, tokenizer, context.output_dir / ".start", pooling, args.normalize, **options)
    if args.gradient_checkpointing:
        checkpoint_activations(model[0].auto_model)
    return model


def _losses(args: EmbedStage, context: StageContext, model: SentenceTransformer) -> Any:
    """Return the loss, or the loss of each source by its number if there are several."""
    guide = freeze(load_embedder(context.guide)) if context.guide else None
    if args.matryoshka_dims and args.matryoshka_dims[0] < (model.get_embedding_dimension() or 0):
        model.truncate_dim = args.matryoshka_dims[0]
    names = [args.loss_of(source) for source in args.data]
    made = {name: _loss(name, args, model, guide) for name in dict.fromkeys(names)}
    return {str(number): made[name] for number, name in enumerate(names)} if len(made) > 1 else made[names[0]]


def _loss(name: str, args: EmbedStage, model: SentenceTransformer, guide: SentenceTransformer | None) -> Any:
    scaled = {"scale": args.scale}
    gathered = {"gather_across_devices": args.gather_across_devices}
    cached = {"mini_batch_size": args.mini_batch_size, "mini_batch_num_tokens": args.mini_batch_tokens}
    guided = {"guide": guide, "temperature": 1 / args.scale, **gathered}
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "mnrl": (losses.MultipleNegativesRankingLoss, {**scaled, **gathered}),
        "cached_mnrl": (losses.CachedMultipleNegativesRankingLoss, {**scaled, **gathered, **cached}),
        "gist": (losses.GISTEmbedLoss, guided),
        "cached_gist": (losses.CachedGISTEmbedLoss, {**guided, **cached}),
        "cosent": (losses.CoSENTLoss, scaled),
        "angle": (losses.AnglELoss, scaled),
        "cosine_mse": (losses.CosineSimilarityLoss, {}),
        "triplet": (losses.TripletLoss, {"triplet_margin": args.triplet_margin}),
        "margin_mse": (losses.MarginMSELoss, {}),
    }
    loss_class, options = classes[name]
    loss = loss_class(model, **options)
    return losses.MatryoshkaLoss(model, loss, args.matryoshka_dims) if args.matryoshka_dims else loss


def measure(model: SentenceTransformer, data: Dataset, dims: Sequence[int] | None, batch_size: int) -> dict[str, float | None]:
    """Return the metrics of the evaluation data, also with vectors truncated to the smaller ``dims``."""
    metrics: dict[str, float | None] = {}
    columns = [data[name][:] for name in data.column_names]
    for size in dims or [None]:
        with model.truncate_embeddings(size):
            if "score" in data.column_names:
                found = similarity(model, data, baselines=False, batch_size=batch_size)["systems"]["model"]
            elif "negative" in data.column_names:
                evaluator = TripletEvaluator(*columns, batch_size=batch_size, similarity_fn_names=["cosine"], write_csv=False)
                found = {"accuracy": evaluator(model)["cosine_accuracy"]}
            else:
                found = retrieval(model, *columns, baselines=False, batch_size=batch_size)["systems"]["model"]
        end = f"_{size}d" if metrics else ""
        metrics |= {f"{name}{end}": value for name, value in found.items()}
    return metrics
