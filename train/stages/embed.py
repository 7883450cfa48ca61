"""Train sentence embeddings with sentence-transformers (the ``embed`` stage)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel

from minibert.data.labels import REGRESSION, read_labels, refuse_first
from minibert.data.load import check_columns, join, load, text_columns
from minibert.data.source import DataSource, joined_paths
from minibert.data.text_pairs import make_pairs
from minibert.data.tokenized_corpus import load_documents
from minibert.evaluation.evaluate import SIMILARITY_COLUMNS
from minibert.evaluation.evaluate import evaluate as measure_model
from minibert.files.disk import read_settings
from minibert.files.processes import processes
from minibert.inference.load import PASSAGES, embedder, find_folder, open_config, pooling_mode
from minibert.inference.load import load as load_embedder
from minibert.train import checkpoint
from minibert.train.arguments import NEEDS, EmbedStage, NewModel
from minibert.train.loop import checkpoint_activations, in_precision
from minibert.train.sentence_trainer import train
from minibert.train.stage import StageContext, load_start
from minibert.train.stages.distill.teacher import freeze

# Minimal gap in similarity, relative to the positive. Closer passages may also be answers.
_MARGIN = 0.05
QUERY_COLUMNS = ("query", "question", "anchor", "sentence1", "premise")
SCORE_COLUMNS = ("score", "label", "similarity", "relevance")


def embed(args: EmbedStage, context: StageContext) -> dict[str, Any]:
    """Train a sentence-transformers model, and return its metrics.

    mnrl is the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652), cached
    as by Gao et al. 2021 (arXiv:2101.06983). gist is GISTEmbed (Solatorio 2024, arXiv:2402.16829),
    and margin_mse the loss of Hofstätter et al. 2020 (arXiv:2010.02666).
    """
    sources, evaluate = training_data(args, context), None
    if args.eval_data:
        evaluate = partial(measure, data=evaluation_data(args), dims=args.matryoshka_dims, batch_size=args.eval_batch_size)
    prompts = check_models(args, context)
    context.end_check()
    model = _starting_model(args, context, prompts)
    sources = _completed(sources, model, args, context)
    apart = {str(number): part for number, part in enumerate(sources.values())}
    pairs = apart if args.one_source_per_batch else join(list(sources.values()))
    metrics = train(model, pairs, _losses(args, context, model), args, context, evaluate)
    return {**metrics, "train_rows": sum(map(len, sources.values()))}


def training_data(args: EmbedStage, context: StageContext) -> dict[str, Dataset]:
    """Return training data with columns that are named by their use.

    If all rows of a batch come from one source, return a data set for each source. Otherwise,
    return a data set of the given pairs and a data set of the pairs that are made from texts.
    """
    if args.one_source_per_batch:
        groups = [[source] for source in args.data]
    else:
        groups = [[source for source in args.data if args.value_of(source, "make_pairs") == made] for made in (False, True)]
    found: dict[str, Dataset] = {}
    for number, group in enumerate(filter(None, groups)):
        loss = args.value_of(group[0], "loss")
        if args.value_of(group[0], "make_pairs"):
            documents = [load_documents(source, "train", args.text_column, args.sample_by) for source in group]
            dataset = make_pairs(join(documents), context.seed)
            columns = {name: name for name in dataset.column_names}
        else:
            dataset = load(group)
            columns = loss_columns(args, loss, dataset, group, args.needs_of(group[0]))
        if len(dataset) < 2:
            raise ValueError(f"Training needs at least two rows; {group[0].path} has one. Add rows.")
        context.note_columns(group, dataset, columns)
        found[f"{number} {Path(group[0].path).name}"] = _selected(dataset, columns, args, loss)
    return found


def evaluation_data(args: EmbedStage) -> Dataset:
    """Return the data that ``metric_for_best`` needs: pairs with scores, triplets or pairs."""
    sources, default = args.eval_data or [], "mnrl" if args.loss != "margin_mse" else args.loss
    loss = {"spearman": "cosent", "accuracy": "triplet"}.get(args.metric_for_best or "", default)
    held_out, needs = load(sources, split="validation"), set() if loss == default else {*NEEDS[loss]}
    return _selected(held_out, loss_columns(args, loss, held_out, sources, needs), args, loss)


def check_models(args: EmbedStage, context: StageContext) -> dict[str, str]:
    """Refuse models that do not fit the stage. Return the prompts of the trained model."""
    models = {"model": context.model, "guide": context.guide, "teacher": context.teacher}
    folders = {field: find_folder(name) for field, name in models.items() if name}
    settings = {field: read_settings(folder / "config_sentence_transformers.json") for field, folder in folders.items()}
    for field in sorted(folders.keys() - {"model"}):
        kind = settings[field].get("model_type", "SentenceTransformer")
        if kind != "SentenceTransformer" or not (folders[field] / "modules.json").exists():
            raise ValueError(f"{field}={models[field]} is not an embedding model; give one, such as an embed stage makes.")
    start, dims = args.model if isinstance(args.model, NewModel) else context.model, args.matryoshka_dims
    if dims and start:
        width = (start.config() if isinstance(start, NewModel) else open_config(start)).hidden_size
        if dims[0] > width:
            raise ValueError(f"matryoshka_dims={dims} go beyond the model's width of {width}; lower them.")
    saved = {name: text for name, text in (settings.get("model", {}).get("prompts") or {}).items() if text}
    given = {name: text for name, text in (("query", args.query_prompt), ("document", args.passage_prompt)) if text}
    if given and saved and not given.items() <= saved.items():
        raise ValueError(f"{context.model} already has prompts ({saved}); remove query_prompt and passage_prompt.")
    passage = next((saved[name] for name in PASSAGES if name in saved), "")
    return {**saved, "document": passage, **given}


def _completed(
    sources: dict[str, Dataset], model: SentenceTransformer, args: EmbedStage, context: StageContext
) -> dict[str, Dataset]:
    """Add hard negatives and the scores of a teacher. Drop pairs with too few hard negatives.

    Hard negatives are passages that ``model`` finds similar to the query, but clearly less
    similar than the positive. A resumed run reads both from the folder ``negatives``.
    """
    teacher, completed = load_embedder(context.teacher) if context.teacher else None, dict(sources)
    for number, (name, pairs) in enumerate(sources.items()):
        # All sources of a data set have the same number of hard negatives.
        source = args.data[number if args.one_source_per_batch else 0]
        wanted = args.value_of(source, "hard_negatives")
        scorer = teacher if args.value_of(source, "loss") == "margin_mse" else None
        if not wanted and not scorer:
            continue
        kept = context.output_dir / "negatives" / str(args.data.index(source) if args.one_source_per_batch else number)
        if processes().is_main_process and not kept.exists():
            found = pairs
            if wanted:
                with in_precision(args):
                    found = mine_hard_negatives(
                        pairs,
                        model,
                        num_negatives=wanted,
                        relative_margin=_MARGIN,
                        range_max=50 + wanted,
                        output_format="n-tuple",
                        batch_size=args.eval_batch_size,
                        verbose=False,
                    )
            if len(found) < 2:
                raise ValueError(
                    f"Only {len(found)} of {len(pairs)} pairs of {name.partition(' ')[2]} have {wanted} hard "
                    "negatives; lower hard_negatives, or start from a better embedding model."
                )
            if scorer:
                found = _with_scores(found, scorer, args.eval_batch_size)
            checkpoint.write_folder(kept, partial(Dataset.save_to_disk, found))
        processes().wait_for_everyone()
        completed[name] = Dataset.load_from_disk(kept)
    return completed


def _with_scores(rows: Dataset, teacher: SentenceTransformer, batch_size: int) -> Dataset:
    """Add the column ``score``: by how much the teacher finds the positive closer than each negative."""
    texts = [rows[name][:] for name in rows.column_names]
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": False}
    queries = teacher.encode_query(texts[0], **options)
    near, *far = (teacher.similarity_pairwise(queries, teacher.encode_document(part, **options)) for part in texts[1:])
    return rows.add_column("score", torch.stack([near - other for other in far], dim=1).tolist())


def loss_columns(
    args: EmbedStage, loss: str, dataset: Dataset, sources: Sequence[DataSource], needs: set[str]
) -> dict[str, str]:
    """Return the columns of two texts and of ``needs``, as named in the recipe or else by their names."""
    texts, names, where = text_columns(dataset), dataset.column_names, joined_paths(sources)
    in_batch, scored = not NEEDS[loss], NEEDS[loss] == ("score",)
    # A column of strings such as label may hold texts. Where scores are needed, it is a mistake.
    scores = [name for name in SCORE_COLUMNS if name in names and not (in_batch and name in texts)]
    usual = {"negative": None if in_batch or "negative" not in names else "negative", "score": next(iter(scores), None)}
    known = {use: getattr(args, f"{use}_column") or column for use, column in usual.items()}
    problems = [f"has a column {name!r}, so not all of its pairs are positives" for name in scores[:1] if in_batch]
    problems += [f"has no {use} for each pair (set {use}_column:)" for use in sorted(needs) if not known[use]]
    if problems:
        present = {use for use, column in known.items() if column in names}
        fitting = " or ".join(name for name, uses in NEEDS.items() if present == {*uses})
        raise ValueError(
            f"{where} {' and '.join(problems)}, which loss: {loss} needs. Its columns are {', '.join(names)}; change them, or "
            f"choose loss: {fitting}. For eval_data, metric_for_best decides."
        )
    named = [args.anchor_column, args.positive_column]
    given, extra = [name for name in named if name], {use: str(known[use]) for use in sorted(needs)}
    check_columns(dataset, [*given, *extra.values()], sources)
    found = [name for name in texts if name not in known.values()]
    free = sorted((name for name in found if name not in given), key=lambda name: name not in QUERY_COLUMNS)  # the query first
    unordered = not given and not scored and [name in QUERY_COLUMNS for name in free] != [True, False]
    if unordered or (len(given) < 2 and len(given) + len(free) != 2):
        raise ValueError(
            f"{where} needs two columns of strings, of which one has a usual name of queries ({', '.join(QUERY_COLUMNS)}); "
            f"its columns of strings are {', '.join(found) or 'none'}. Name them with anchor_column: and positive_column:."
        )
    rest = iter(free)
    uses = SIMILARITY_COLUMNS[:2] if scored else ("anchor", "positive")
    pair = {use: name or next(rest) for use, name in zip(uses, named, strict=True)}
    check_columns(dataset, list(pair.values()), sources)
    return {**pair, **extra}


def _selected(dataset: Dataset, columns: dict[str, str], args: EmbedStage, loss: str) -> Dataset:
    """Return ``columns``, named by their use, after a check of their values."""
    rows = dataset.select_columns(list(columns.values())).rename_columns({column: use for use, column in columns.items()})
    if "negative" in columns:
        good = [positive != negative for positive, negative in zip(rows["positive"][:], rows["negative"][:], strict=True)]
        refuse_first(rows["negative"][:], good, columns["negative"], "this is also its positive; correct or remove the row")
    if "score" not in columns:
        return rows
    numbers = read_labels(dataset, columns["score"], problem_type=REGRESSION).values
    # Cosines, and differences of cosines, are not larger.
    largest = {"cosine_mse": 1.0, "margin_mse": 2.0 if args.normalize else np.inf}.get(loss, np.inf)
    advice = f"loss: {loss} reaches at most {largest:g}; divide the scores, or choose another loss"
    refuse_first(numbers.tolist(), np.abs(numbers) <= largest, columns["score"], advice)
    return rows.remove_columns("score").add_column("score", numbers)


def _starting_model(args: EmbedStage, context: StageContext, prompts: dict[str, str]) -> SentenceTransformer:
    tokenizer, encoder, _ = load_start(AutoModel, args, context)
    # config.pooling belongs to the pooler, and stays for a classifier that is exported as BERT.
    start = pooling_mode(find_folder(context.model)) if context.model else None
    pooling = args.pooling or start or getattr(encoder.config, "pooling", "mean")
    model = embedder(encoder, tokenizer, context.output_dir / ".start", pooling, args.normalize, prompts=prompts)
    if args.loss == "margin_mse" and not args.normalize:
        model.similarity_fn_name = "dot"  # as the loss compares vectors
    if args.gradient_checkpointing:
        checkpoint_activations(model[0].auto_model)
    return model


def _losses(args: EmbedStage, context: StageContext, model: SentenceTransformer) -> Any:
    """Return the loss, or the loss of each source by its number if there are several."""
    guide = freeze(load_embedder(context.guide)) if context.guide else None
    scaled, gathered = {"scale": args.scale}, {"gather_across_devices": args.gather_across_devices}
    guided = {"guide": guide, "temperature": 1 / args.scale, **gathered}
    cached = {"mini_batch_size": args.mini_batch_size, "mini_batch_num_tokens": args.mini_batch_tokens}
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
    names, made = [args.value_of(source, "loss") for source in args.data], {}
    if args.matryoshka_dims and args.matryoshka_dims[0] < (model.get_embedding_dimension() or 0):
        model.truncate_dim = args.matryoshka_dims[0]
    for name in names:
        loss_class, options = classes[name]
        loss = loss_class(model, **options)
        made[name] = losses.MatryoshkaLoss(model, loss, args.matryoshka_dims) if args.matryoshka_dims else loss
    return {str(number): made[name] for number, name in enumerate(names)} if len(made) > 1 else made[names[0]]


def measure(model: SentenceTransformer, data: Dataset, dims: Sequence[int] | None, batch_size: int) -> dict[str, float | None]:
    """Return the metrics of the evaluation data, also with vectors that are cut to the smaller ``dims``."""
    metrics: dict[str, float | None] = {}
    for size in dims or [0]:
        with model.truncate_embeddings(size or None):
            found = measure_model(model, data, baselines=False, batch_size=batch_size)["systems"]["model"]
        metrics |= {f"{name}_{size}d" if metrics else name: value for name, value in found.items()}
    return metrics
