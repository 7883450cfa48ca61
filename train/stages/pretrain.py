"""The ``pretrain`` stage: masked language modelling from raw text, alone or with next-sentence prediction."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from minibert.data.source import DataSource
from minibert.data.tokenized_corpus import Corpus, Pieces, Spans, load_corpus
from minibert.files.processes import processes
from minibert.train.arguments import DistillPretrainingStage, PhaseArguments, PretrainStage
from minibert.train.loop import Phase, seed_everything
from minibert.train.stage import StageContext, load_model, load_tokenizer, sequence_length
from minibert.train.stages.fitting import fit_stage

_BEGINNINGS = ("Ġ", "▁")  # the space before a word, as byte-level and SentencePiece tokenizers write it


def pretrain(args: PretrainStage, context: StageContext) -> dict[str, Any]:
    """Pretrain an encoder on a corpus; ``context.output_dir`` ends as a complete model folder with its word-prediction head.

    Returns:
        The figures of ``metrics.json``; with ``eval_data`` also eval_loss, eval_perplexity and eval_masked_accuracy (and
        eval_next_sentence_accuracy) of the best model.

    Raises:
        ValueError: no text, a single document where next sentences are wanted, a length above the model's positions, a
            tokenizer without [MASK], or a model that is no MiniBERT.
    """
    tokenizer = load_tokenizer(context)
    masking = Masking.of(tokenizer, args)
    model = load_model(AutoModelForPreTraining if args.next_sentence else AutoModelForMaskedLM, args, context, tokenizer)
    refuse_unpacked(model.config, str(context.model))
    phases = args.phases or [PhaseArguments.model_validate({})]
    for phase in phases:
        sequence_length(phase.max_length or args.max_length, model.config, tokenizer)
    tokenizer.model_max_length = sequence_length(None, model.config, tokenizer)

    delimiters = args.sentence_delimiters if args.next_sentence else None
    corpus = tokenize_corpus(args, args.data, "train", tokenizer, delimiters)
    rows_of = SentencePairs if args.next_sentence else PackedRows
    lengths = [phase.max_length or args.max_length or tokenizer.model_max_length for phase in phases]
    parts = []
    for phase, length in zip(phases, lengths, strict=True):
        rows, rate = rows_of(corpus, length, masking), phase.learning_rate or args.learning_rate
        parts.append(Phase(rows, rows.collate, phase.batch_size or args.batch_size, rate, phase.share))
    evaluate = None
    if args.eval_data:
        held_out = tokenize_corpus(args, args.eval_data, "validation", tokenizer, delimiters)
        evaluate = evaluator(rows_of(held_out, max(lengths), masking), args.eval_batch_size)
    return fit_stage(model, tokenizer, args, context, parts, evaluate, args.metric_for_best)


def refuse_unpacked(config: Any, name: str) -> None:
    """Refuse a model that cannot read packed sequences, which is any but a MiniBERT.

    Raises:
        ValueError: it is another model.
    """
    if config.model_type != "minibert":
        raise ValueError(
            f"{name} is a {config.model_type} model, which cannot read packed sequences; convert it first with: minibert hub "
            "convert SOURCE FOLDER, and give that folder, or start from new weights: model: {preset: ...}."
        )


def tokenize_corpus(
    args: PretrainStage | DistillPretrainingStage,
    sources: list[DataSource],
    split: str,
    tokenizer: Any,
    sentence_delimiters: str | None = None,
) -> Corpus:
    """Tokenize documents, or find them tokenized in the cache."""
    with processes().main_process_first():  # the other processes find the result
        return load_corpus(
            sources,
            tokenizer,
            split=split,
            text_column=args.text_column,
            sample_by=args.sample_by,
            sentence_delimiters=sentence_delimiters,
            cache_dir=args.cache_dir,
            workers=args.preprocessing_num_workers,
        )


# --------------------------------------------------------------------------------------------------------------- masking


class Masking:
    """Which tokens to predict, and what the model sees in their place (Devlin et al. 2018, section 3.1).

    Args:
        special: (V,) True for ids that are never masked nor put in place of a word.
        continues: (V,) True for pieces that continue a word: whole words are masked; None masks each token by itself.
        probability: share of the tokens to predict.
        mask_share, random_share: of these, how many become [MASK] and how many another word; the rest stays.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: np.ndarray,
        continues: np.ndarray | None,
        probability: float,
        mask_share: float = 0.8,
        random_share: float = 0.1,
    ):
        self.cls, self.sep, self.mask, self.pad = (
            tokenizer.cls_token_id,
            tokenizer.sep_token_id,
            tokenizer.mask_token_id,
            tokenizer.pad_token_id,
        )
        self.special, self.continues, self.words = special, continues, np.flatnonzero(~special)
        self.probability, self.mask_share, self.random_share = probability, mask_share, random_share

    @classmethod
    def of(cls, tokenizer: Any, args: PretrainStage | DistillPretrainingStage) -> "Masking":
        """What the recipe says, for a tokenizer.

        Raises:
            ValueError: when the tokenizer lacks [MASK], [CLS] or [SEP], or does not tell words apart that are masked whole.
        """
        missing = [name for name in ("mask_token", "cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
        if missing:
            raise ValueError(
                f"The tokenizer has no {', '.join(missing)}, which pretraining needs; train one with a tokenizer stage."
            )
        special = np.zeros(len(tokenizer), dtype=bool)
        special[tokenizer.all_special_ids] = True
        continues = None
        if args.whole_word_mask:
            continues = _continues(tokenizer) & ~special
        return cls(tokenizer, special, continues, args.mlm_probability, args.mask_replace_prob, args.random_replace_prob)

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) as the model sees them, and labels (T,): the word where it is to be predicted, -100 elsewhere."""
        draws = rng.random(len(ids))
        if self.continues is not None:
            draws = draws[np.cumsum(~self.continues[ids]) - 1]  # one draw per word; a cut word goes with what precedes it
        ordinary = ~self.special[ids]
        chosen = ordinary & (draws < self.probability)
        if not chosen.any() and ordinary.any():  # a batch without labels has no mean
            chosen[rng.choice(np.flatnonzero(ordinary))] = True
        places = np.flatnonzero(chosen)
        labels = np.full(len(ids), -100, dtype=np.int64)
        labels[places] = ids[places]
        fate = rng.random(len(places))
        seen = ids.astype(np.int64)
        seen[places[fate < self.mask_share]] = self.mask
        other = places[(fate >= self.mask_share) & (fate < self.mask_share + self.random_share)]
        seen[other] = rng.choice(self.words, size=len(other))
        return seen, labels


def _continues(tokenizer: Any) -> np.ndarray:
    """(V,) True for pieces that continue a word: marked so (WordPiece), or without the mark of a beginning (BPE, Unigram).

    Raises:
        ValueError: for a tokenizer whose pieces do not tell.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if model["type"] == "WordLevel":
        return np.zeros(len(tokens), dtype=bool)
    if prefix := model.get("continuing_subword_prefix"):
        return np.array([token.startswith(prefix) for token in tokens])
    begins = np.array([token.startswith(_BEGINNINGS) for token in tokens])
    if not begins.any():
        raise ValueError(
            "whole_word_mask: the pieces of this tokenizer do not say where a word begins (as ## does in WordPiece, Ġ or ▁ "
            "elsewhere); leave whole_word_mask out."
        )
    return ~begins


def _generator() -> np.random.Generator:
    """Fresh random numbers that follow from the loop's seeding of numpy."""
    return np.random.default_rng(np.random.randint(0, 2**32, size=4, dtype=np.uint32))


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Places ``start, start + 1, ...`` up to ``start + length`` of all pieces, end to end.

    >>> _places(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    before = np.cumsum(lengths) - lengths
    places: np.ndarray = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return places


# ------------------------------------------------------------------------------------------------------------------- rows


class PackedRows:
    """Rows for masked language modelling: pieces of documents, without padding, that do not see each other."""

    def __init__(self, corpus: Corpus, max_length: int, masking: Masking):
        self.corpus, self.masking, self.pieces = corpus, masking, Pieces(corpus, max_length)
        self.fingerprint = f"{corpus.fingerprint}-{max_length}"

    def __len__(self) -> int:
        return len(self.pieces.rows) - 1

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.asarray(rows)  # rows stay on disk; collate fetches all of a batch at once

    def collate(self, rows: np.ndarray) -> dict[str, Any]:
        """One row (1, T) that holds all pieces, each between [CLS] and [SEP], with the bounds that keep them apart."""
        rng, pieces = _generator(), self.pieces
        chosen = _places(pieces.rows[rows], pieces.rows[rows + 1] - pieces.rows[rows])
        chosen = chosen[np.argsort(pieces.lengths[chosen], kind="stable")]  # equal lengths share an attention call on a CPU
        sizes = pieces.lengths[chosen] + 2
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        ids = np.empty(bounds[-1], dtype=np.int64)
        ends = np.zeros(bounds[-1], dtype=bool)
        ends[bounds[:-1]] = ends[bounds[1:] - 1] = True
        ids[bounds[:-1]], ids[bounds[1:] - 1] = self.masking.cls, self.masking.sep
        ids[~ends] = self.corpus.tokens[_places(pieces.starts[chosen], sizes - 2)]
        seen, labels = self.masking(ids, rng)
        positions = np.arange(len(ids)) - np.repeat(bounds[:-1], sizes)
        batch = {"input_ids": seen, "position_ids": positions, "labels": labels}
        tensors: dict[str, Any] = {name: torch.from_numpy(array)[None] for name, array in batch.items()}
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        longest = int(sizes.max())
        return {
            **tensors,
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }


class SentencePairs:
    """Rows for masked language modelling with next-sentence prediction: two segments of whole sentences each.

    The second segment is what follows the first in its document or, half of the time, comes from another document. Where
    the first ends and which other document it is are drawn anew each time a row is read.
    """

    def __init__(self, corpus: Corpus, max_length: int, masking: Masking):
        self.corpus, self.masking, self.max_length = corpus, masking, max_length
        self.spans = spans = Spans(corpus, max_length)
        if not len(spans.document) or spans.document[0] == spans.document[-1]:  # they are in order
            raise ValueError(
                f"next_sentence needs two documents or more with at least two sentences each, and the corpus has "
                f"{len(np.unique(spans.document))} of {len(corpus.documents) - 1}; separate its documents (see sample_by and "
                "sentence_delimiters), or set next_sentence: false."
            )
        self.fingerprint = f"{corpus.fingerprint}-{max_length}-pairs"

    def __len__(self) -> int:
        return len(self.spans.first)

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.asarray(rows)

    def pair(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Ids of two segments, and 0 where the second follows the first, 1 where it does not (as in BERT)."""
        spans, tokens, bounds = self.spans, self.corpus.tokens, self.spans.bounds
        begin, end = spans.first[row], spans.last[row]
        middle = rng.integers(begin + 1, end)
        first = tokens[bounds[begin] : bounds[middle]]
        if rng.random() < 0.5:
            return first, tokens[bounds[middle] : bounds[end]], 0
        other = rng.integers(len(self))
        while spans.document[other] == spans.document[row]:
            other = rng.integers(len(self))
        start = bounds[rng.integers(spans.first[other], spans.last[other])]
        room = self.max_length - 3 - len(first)
        return first, tokens[start : min(bounds[spans.last[other]], start + room)], 1

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Inputs (rows, longest), masked, with both tasks' labels."""
        rng, masking = _generator(), self.masking
        pairs = [self.pair(row, rng) for row in rows.tolist()]
        sizes = np.array([len(first) + len(second) + 3 for first, second, _ in pairs])
        real = np.arange(sizes.max()) < sizes[:, None]  # (rows, longest)
        ids = np.full(real.shape, masking.pad, dtype=np.int64)
        segments = np.zeros(real.shape, dtype=np.int64)
        for row, (first, second, _) in enumerate(pairs):
            middle = len(first) + 2
            ids[row, : sizes[row]] = [masking.cls, *first, masking.sep, *second, masking.sep]
            segments[row, middle : sizes[row]] = 1
        labels = np.full(real.shape, -100, dtype=np.int64)
        ids[real], labels[real] = masking(ids[real], rng)
        batch = {"input_ids": ids, "attention_mask": real.astype(np.int64), "token_type_ids": segments, "labels": labels}
        follows = torch.tensor([follows for *_, follows in pairs])
        return {**{name: torch.from_numpy(array) for name, array in batch.items()}, "next_sentence_label": follows}


# ------------------------------------------------------------------------------------------------------------- evaluation


def evaluator(rows: PackedRows | SentencePairs, batch_size: int) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures a model on ``rows``, always under the same masks; processes share the batches."""

    def evaluate(model: Any) -> dict[str, float]:
        state = processes()
        numbers = range(state.process_index, math.ceil(len(rows) / batch_size), state.num_processes)
        sums = np.zeros(5)  # loss, right words, words; right pairs, pairs
        for number in tqdm(numbers, desc="evaluate", leave=False, disable=not state.is_main_process):
            seed_everything(0, number)
            batch = send_to_device(
                rows.collate(np.arange(number * batch_size, min(len(rows), (number + 1) * batch_size))), state.device
            )
            labels, follows = batch.pop("labels"), batch.pop("next_sentence_label", None)
            output = model.minibert(**batch)
            chosen = labels != -100
            for states, expected in zip(output.last_hidden_state[chosen].split(1024), labels[chosen].split(1024), strict=True):
                logits = model.lm_head(states)
                loss = F.cross_entropy(logits, expected, reduction="sum")
                sums[:3] += [float(loss), int((logits.argmax(-1) == expected).sum()), len(expected)]
            if follows is not None:
                right = model.next_sentence(output.pooler_output).argmax(-1) == follows
                sums[3:] += [int(right.sum()), len(follows)]
        sums = np.sum(gather_object([sums]), axis=0)
        loss = sums[0] / sums[2]
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 100.0)), "masked_accuracy": sums[1] / sums[2]}
        return figures | ({"next_sentence_accuracy": sums[3] / sums[4]} if sums[4] else {})

    return evaluate
