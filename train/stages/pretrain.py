"""Pretrain encoders on masked words and optionally next sentences (the ``pretrain`` stage)."""

import json
import math
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from minibert.data.load import load, text_column
from minibert.data.tokenized_corpus import MlmChunks, NspSpans, TokenizedCorpus, load_corpus
from minibert.files.processes import processes
from minibert.inference.load import open_tokenizer
from minibert.train.arguments import DistillPretrainingStage, MaskedWordArguments, PhaseArguments, PretrainStage
from minibert.train.loop import Phase, fit, seed_everything
from minibert.train.stage import StageContext, load_model, sequence_length

_BEGINNINGS = ("Ġ", "▁")  # begin words in byte-level and SentencePiece tokenizers


def pretrain(args: PretrainStage, context: StageContext) -> dict[str, Any]:
    """Pretrain a MiniBERT, and return training metrics and metrics of masked words."""
    check_documents(args, context)
    tokenizer: Any = open_tokenizer(str(context.tokenizer))
    masking = Masking(tokenizer, args)
    model = load_model(AutoModelForPreTraining if args.next_sentence else AutoModelForMaskedLM, args, context, tokenizer)
    refuse_unpacked(model.config, str(context.model))
    phases = args.phases or [PhaseArguments.model_validate({})]
    for phase in phases:
        sequence_length(phase.max_length or args.max_length, model.config, tokenizer)
    tokenizer.model_max_length = sequence_length(None, model.config, tokenizer)

    delimiters = args.sentence_delimiters if args.next_sentence else None
    corpus, *held_out = corpora(args, tokenizer, delimiters)
    rows_of = SentencePairs if args.next_sentence else PackedRows
    lengths = [phase.max_length or args.max_length or tokenizer.model_max_length for phase in phases]
    parts = []
    for phase, length in zip(phases, lengths, strict=True):
        rate = phase.learning_rate or args.learning_rate
        rows = rows_of(corpus, length, masking)
        parts.append(Phase(rows, phase.batch_size or args.batch_size, rate, phase.share))
    evaluate = None
    if held_out:
        evaluate = partial(measure, rows=rows_of(held_out[0], max(lengths), masking), batch_size=args.eval_batch_size)
    return fit(model, tokenizer, parts, args, context, evaluate, args.metric_for_best)


def check_documents(args: PretrainStage | DistillPretrainingStage, context: StageContext) -> None:
    """Read the documents and record their columns. :func:`corpora` tokenizes them."""
    for split, sources in (("train", args.data), ("validation", args.eval_data or [])):
        for source in sources:
            rows = load([source], split=split, sample_by=args.sample_by)
            column = text_column(rows, args.text_column, ["text"], option="text_column", where=source.path)
            context.note_columns([source], rows, {"text": column})
    context.end_check()


def refuse_unpacked(config: Any, name: str) -> None:
    """Raise ValueError if a model is not a MiniBERT. Other models read no packed sequences."""
    if config.model_type != "minibert":
        raise ValueError(
            f"{name} is a {config.model_type} model, which cannot read packed sequences. Convert the model "
            "with minibert hub convert SOURCE FOLDER and give FOLDER, or start from new weights with "
            "model: {preset: ...}."
        )


def corpora(
    args: PretrainStage | DistillPretrainingStage, tokenizer: Any, delimiters: str | None = None
) -> list[TokenizedCorpus]:
    """Return the tokenized training data and, if given, the tokenized evaluation data."""
    sources = {"train": args.data} | ({"validation": args.eval_data} if args.eval_data else {})
    with processes().main_process_first():  # other processes read the cached result
        return [
            load_corpus(
                data,
                tokenizer,
                split=split,
                text_column=args.text_column,
                sample_by=args.sample_by,
                sentence_delimiters=delimiters,
                cache_dir=args.cache_dir,
                workers=args.preprocessing_num_workers,
            )
            for split, data in sources.items()
        ]


class Masking:
    """Choose the tokens to predict, and replace them (Devlin et al. 2018, section 3.1).

    Attributes:
        special: (V,) True for special tokens, which are never masked.
        continues: (V,) True for tokens that continue a word. None if whole words are not masked
            together.
    """

    def __init__(self, tokenizer: Any, args: MaskedWordArguments):
        missing = [name for name in ("mask_token", "cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
        if missing:
            raise ValueError(f"The tokenizer has no {', '.join(missing)}; train a tokenizer with a tokenizer stage.")
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.mask, self.pad = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        self.words = np.flatnonzero(~self.special)
        self.continues = _continues(tokenizer) & ~self.special if args.whole_word_mask else None
        self.probability = args.mlm_probability
        self.mask_share, self.random_share = args.mask_replace_prob, args.random_replace_prob

    def __call__(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return masked ids (T,) and labels (T,). Labels are -100 at tokens not to predict."""
        draws = rng.random(len(ids))
        if self.continues is not None:
            draws = draws[np.cumsum(~self.continues[ids]) - 1]  # one draw per word
        ordinary = ~self.special[ids]
        chosen = ordinary & (draws < self.probability)
        if not chosen.any() and ordinary.any():  # a batch without labels has no mean loss
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
    """Return a (V,) mask of the tokens in the vocabulary that continue a word."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if model["type"] == "WordLevel":
        return np.zeros(len(tokens), dtype=bool)
    if prefix := model.get("continuing_subword_prefix"):
        return np.array([token.startswith(prefix) for token in tokens])
    begins = np.array([token.startswith(_BEGINNINGS) for token in tokens])
    if not begins.any():
        raise ValueError(
            "whole_word_mask needs a tokenizer that marks where words begin (## in WordPiece, Ġ or ▁ in "
            "BPE and Unigram), but this tokenizer does not; remove whole_word_mask."
        )
    return ~begins


def _generator() -> np.random.Generator:
    """Return a random generator, with a seed from the global generator of numpy."""
    return np.random.default_rng(np.random.randint(0, 2**32, size=4, dtype=np.uint32))


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return all positions of the ranges with the given starts and lengths.

    >>> _places(np.array([7, 0]), np.array([2, 3])).tolist()
    [7, 8, 0, 1, 2]
    """
    before = np.cumsum(lengths) - lengths
    places: np.ndarray = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return places


class PackedRows:
    """Store rows of document chunks. A token attends only to tokens of the same chunk."""

    def __init__(self, corpus: TokenizedCorpus, max_length: int, masking: Masking):
        self.corpus, self.masking, self.pieces = corpus, masking, MlmChunks(corpus, max_length)
        self.fingerprint = f"{corpus.fingerprint}-{max_length}"

    def __len__(self) -> int:
        return len(self.pieces.rows) - 1

    def collate(self, rows: np.ndarray) -> dict[str, Any]:
        """Join ``rows`` to one packed sequence (1, T). Add labels and the bounds of chunks."""
        rng, pieces = _generator(), self.pieces
        chosen = _places(pieces.rows[rows], pieces.rows[rows + 1] - pieces.rows[rows])
        # On a CPU, pieces of equal length share an attention call.
        chosen = chosen[np.argsort(pieces.lengths[chosen], kind="stable")]
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
    """Store rows of two segments of complete sentences, for next-sentence prediction.

    With a probability of 0.5, the second segment follows the first. Otherwise, the second segment
    comes from another document. The choice is random each time a row is read.
    """

    def __init__(self, corpus: TokenizedCorpus, max_length: int, masking: Masking):
        self.corpus, self.masking, self.max_length = corpus, masking, max_length
        self.spans = spans = NspSpans(corpus, max_length)
        if not len(spans.document) or spans.document[0] == spans.document[-1]:  # documents are sorted
            raise ValueError(
                f"next_sentence needs at least two documents with two or more sentences each, but the corpus "
                f"only has {len(np.unique(spans.document))} (of {len(corpus.documents) - 1} documents). "
                "Change sample_by or sentence_delimiters, or set next_sentence: false."
            )
        self.fingerprint = f"{corpus.fingerprint}-{max_length}-pairs"

    def __len__(self) -> int:
        return len(self.spans.first)

    def pair(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the ids of two segments, and whether the second follows (0) or not (1)."""
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
        """Return masked and padded inputs, with labels for words and for next sentences."""
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
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {**tensors, "next_sentence_label": follows}


def measure(model: Any, rows: PackedRows | SentencePairs, batch_size: int) -> dict[str, float]:
    """Return the metrics of a model. All calls mask the same words."""
    state = processes()
    numbers = range(state.process_index, math.ceil(len(rows) / batch_size), state.num_processes)
    sums = np.zeros(5)  # loss, right words, words; right pairs, pairs
    for number in tqdm(numbers, desc="evaluate", leave=False, disable=not state.is_main_process):
        seed_everything(0, number)
        chosen_rows = np.arange(number * batch_size, min(len(rows), (number + 1) * batch_size))
        batch = send_to_device(rows.collate(chosen_rows), state.device)
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
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 100.0)), "masked_accuracy": sums[1] / sums[2]}
    return metrics | ({"next_sentence_accuracy": sums[3] / sums[4]} if sums[4] else {})
