"""Train sentence embeddings on pairs with sentence-transformers (the ``embed`` stage)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel

from minibert.data.load import check_columns, join, load, text_columns
from minibert.data.source import DataSource, joined_paths
from minibert.data.text_pairs import make_pairs
from minibert.data.tokenized_corpus import load_documents
from minibert.evaluation.evaluate import retrieval
from minibert.files.processes import processes
from minibert.inference.load import embedder, find_folder, pooling_mode
from minibert.train import checkpoint
from minibert.train.arguments import EmbedStage
from minibert.train.loop import checkpoint_activations, in_precision
from minibert.train.sentence_trainer import train
from minibert.train.stage import StageContext, load_start

# Minimal gap in similarity, relative to the positive. Closer passages may also be answers.
_MARGIN = 0.05
QUERY_COLUMNS = ("query", "question", "anchor", "sentence1", "premise")
SCORE_COLUMNS = ("score", "label", "similarity", "relevance")


def embed(args: EmbedStage, context: StageContext) -> dict[str, Any]:
    """Train a sentence-transformers model, and return training and retrieval metrics.

    The loss is the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652), or
    the cached form of this loss (Gao et al. 2021, arXiv:2101.06983).
    """
    sources, held_out = training_pairs(args, context), None
    if args.eval_data:
        held_out = load(args.eval_data, split="validation")
        columns = pair_columns(args, held_out, args.eval_data)
        names = dict(zip(columns, ("anchor", "positive"), strict=True))
        held_out = held_out.select_columns(columns).rename_columns(names)
    context.end_check()
    evaluate = partial(measure, pairs=held_out, batch_size=args.eval_batch_size) if held_out else None
    model = _starting_model(args, context)
    sources = _with_negatives(sources, model, args, context.output_dir / "negatives")
    pairs = sources if args.one_source_per_batch else join(list(sources.values()))
    metrics = train(model, pairs, _loss(args, model), args, context, evaluate)
    return {**metrics, "train_rows": sum(map(len, sources.values()))}


def training_pairs(args: EmbedStage, context: StageContext) -> dict[str, Dataset]:
    """Return training data with columns ``anchor``, ``positive`` and, if given, ``negative``.

    With ``one_source_per_batch``, return a data set for each source. Otherwise, return a data
    set of the given pairs and a data set of the pairs that are made from texts.
    """
    if args.one_source_per_batch:
        groups = [[source] for source in args.data]
    else:
        groups = [[source for source in args.data if args.makes_pairs_of(source) == made] for made in (False, True)]
    found: dict[str, Dataset] = {}
    for number, group in enumerate(filter(None, groups)):
        if args.makes_pairs_of(group[0]):
            documents = [load_documents(source, "train", args.text_column, args.sample_by) for source in group]
            dataset = make_pairs(join(documents), context.seed)
            columns = dataset.column_names
        else:
            dataset = load(group)
            columns = pair_columns(args, dataset, group)
        if args.negative_column:
            check_columns(dataset, [args.negative_column], group)
            columns.append(args.negative_column)
        if len(dataset) < 2:
            raise ValueError(f"In-batch negatives need at least two rows; {group[0].path} has one. Add rows.")
        names = dict(zip(columns, ("anchor", "positive", "negative"), strict=False))
        context.note_columns(group, dataset, dict(zip(names.values(), names, strict=True)))
        found[f"{number} {Path(group[0].path).name}"] = dataset.select_columns(columns).rename_columns(names)
    return found


def _with_negatives(
    sources: dict[str, Dataset], model: SentenceTransformer, args: EmbedStage, folder: Path
) -> dict[str, Dataset]:
    """Add hard negatives to all pairs, and drop pairs with too few hard negatives.

    Hard negatives are passages that ``model`` finds similar to the query, but clearly less
    similar than the positive. A resumed run reads the hard negatives from ``folder``.
    """
    mined = dict(sources)
    for number, (name, pairs) in enumerate(sources.items()):
        # All sources of a data set have the same number of hard negatives.
        source = args.data[number if args.one_source_per_batch else 0]
        wanted = args.hard_negatives_of(source)
        if not wanted:
            continue
        kept = folder / str(args.data.index(source) if args.one_source_per_batch else number)
        if processes().is_main_process and not kept.exists():
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
            checkpoint.write_folder(kept, partial(Dataset.save_to_disk, found))
        processes().wait_for_everyone()
        mined[name] = Dataset.load_from_disk(kept)
    return mined


def pair_columns(args: EmbedStage, dataset: Dataset, sources: Sequence[DataSource]) -> list[str]:
    """Return the columns of queries and of passages, as named in the recipe or else by their names."""
    named = [args.anchor_column, args.positive_column]
    where = joined_paths(sources)
    advice = "Name them with anchor_column: and positive_column:."
    if scores := [name for name in SCORE_COLUMNS if name in dataset.column_names and name not in text_columns(dataset)]:
        raise ValueError(
            f"{where} has a column {scores[0]!r}, so not all of its pairs are positives. Give the pairs that belong together, "
            "without that column."
        )
    given = [name for name in named if name]
    check_columns(dataset, given, sources)
    found = [name for name in text_columns(dataset) if name != args.negative_column]
    free = [name for name in found if name not in given]
    if len(given) == 2:
        return given
    if len(free) + len(given) != 2:
        raise ValueError(
            f"{where} needs two columns of strings, queries and passages; its columns of strings are "
            f"{', '.join(found) or 'none'}. {advice}"
        )
    if given:
        columns = [args.anchor_column or free[0], args.positive_column or free[0]]
    else:
        columns = sorted(free, key=lambda name: name not in QUERY_COLUMNS)  # the query first
        if [name in QUERY_COLUMNS for name in columns] != [True, False]:
            raise ValueError(
                f"The columns {' and '.join(free)} of {where} do not say which of them holds the queries (usual are "
                f"{', '.join(QUERY_COLUMNS)}). {advice}"
            )
    check_columns(dataset, columns, sources)
    return columns


def _starting_model(args: EmbedStage, context: StageContext) -> SentenceTransformer:
    tokenizer, encoder, _ = load_start(AutoModel, args, context)
    # config.pooling belongs to the pooler, and stays for a classifier that is exported as BERT.
    start = pooling_mode(find_folder(context.model)) if context.model else None
    pooling = args.pooling or start or getattr(encoder.config, "pooling", "mean")
    model = embedder(encoder, tokenizer, context.output_dir / ".start", pooling, args.normalize)
    if args.gradient_checkpointing:
        checkpoint_activations(model[0].auto_model)
    return model


def _loss(args: EmbedStage, model: SentenceTransformer) -> Any:
    options: dict[str, Any] = {"scale": args.scale, "gather_across_devices": args.gather_across_devices}
    if args.loss == "cached_mnrl":
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **options)
    return MultipleNegativesRankingLoss(model, **options)


def measure(model: SentenceTransformer, pairs: Dataset, batch_size: int) -> dict[str, float]:
    """Return the metrics of retrieval with the evaluation pairs."""
    found = retrieval(model, list(pairs["anchor"]), list(pairs["positive"]), baselines=False, batch_size=batch_size)
    return dict(found["systems"]["model"])
