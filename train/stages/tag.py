"""Fine-tune taggers of words (the ``tag`` stage). The first token of a word has the tag."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from minibert.data.labels import SINGLE, Labels
from minibert.data.load import load
from minibert.data.tags import find_tag_columns, holds_entities, read_tags, read_words, tokenize_windows
from minibert.evaluation.metrics import tag_metrics
from minibert.train.arguments import TagStage
from minibert.train.loop import fit
from minibert.train.rows import TokenizedDataset, choose_metric, compute_outputs, head_changes, in_chunks, in_eval_data
from minibert.train.stage import StageContext, load_start

_ENTITY_METRICS = ("f1", "precision", "recall", "accuracy", "loss")
_TAG_METRICS = ("accuracy", "macro_f1", "loss")


def tag(args: TagStage, context: StageContext) -> dict[str, Any]:
    """Fine-tune a tagger, and return training metrics, tag metrics and the loss per word."""
    train = load(args.data, split="train")
    columns = find_tag_columns(train, args.token_column, args.tag_column, args.data[0].path)
    sentences = read_words(train, columns[0])
    tags, names = read_tags(train, columns[1], sentences, args.labels)
    if not any(sentences):
        raise ValueError(f"{args.data[0].path} has no words in any row; give data with words.")
    context.note_columns(args.data, train, {"words": columns[0], "tags": columns[1]}, tags=tags[0])
    if args.eval_data:
        held_out = load(args.eval_data, split="validation")
        find_tag_columns(held_out, *columns, args.eval_data[0].path)
        with in_eval_data():
            held_out_sentences = read_words(held_out, columns[0])
            expected, _ = read_tags(held_out, columns[1], held_out_sentences, names)
    numbers = np.array([names.index(name) for name in chain.from_iterable(tags)])
    weights = Labels(SINGLE, numbers, names).class_weights(args.class_weights)
    context.end_check()
    metric = choose_metric(args.metric_for_best, _ENTITY_METRICS if holds_entities(names) else _TAG_METRICS)
    changes = head_changes(context, names)
    tokenizer, model, max_length = load_start(AutoModelForTokenClassification, args, context, **changes)

    evaluate = None
    if args.eval_data:
        evaluated = TagRows.from_words(held_out_sentences, expected, names, tokenizer, max_length)
        evaluate = partial(measure, rows=evaluated, expected=expected, names=names, batch_size=args.eval_batch_size)
    rows = TagRows.from_words(sentences, tags, names, tokenizer, max_length)
    return fit(model, tokenizer, rows, args, context, evaluate, metric, weights)


class TagRows(TokenizedDataset):
    """Store tagged sentences. A long sentence is cut into overlapping windows.

    ``labels`` has the number of a tag at the first token of each word, and -100 at all other
    tokens. If a word is in two windows, only one window has the tag.
    """

    @classmethod
    def from_words(
        cls,
        sentences: Sequence[Sequence[str]],
        tags: Sequence[Sequence[str]],
        names: Sequence[str],
        tokenizer: Any,
        max_length: int,
    ) -> "TagRows":
        """Split sentences into labelled windows of at most ``max_length`` tokens."""
        words = []

        def chunks() -> Iterator[tuple[Any, Any]]:
            for some in in_chunks(len(sentences)):
                windows = tokenize_windows(sentences[some], tokenizer, max_length)
                words.extend(windows.words)
                yield windows.ids, None

        made = cls(chunks(), tokenizer.pad_token_id)
        made.labels = np.full(len(made.ids), -100, dtype=np.int64)
        numbers = {name: number for number, name in enumerate(names)}
        made.labels[np.concatenate(words) >= 0] = [numbers[name] for name in chain.from_iterable(tags)]
        return made

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return model inputs and labels, each of shape (windows, longest window)."""
        batch, mask, taken = self.pad(rows)
        batch["labels"] = np.full(mask.shape, -100, dtype=np.int64)
        batch["labels"][mask] = self.labels[taken]
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def measure(
    model: nn.Module, rows: TagRows, expected: Sequence[Sequence[str]], names: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Return the metrics of a tagger on all words. Processes divide the work."""
    numbers, logits = compute_outputs(model, rows, batch_size)
    of_tokens = torch.empty(len(rows.labels), len(names), dtype=torch.float32, device="cpu")
    done = 0
    for part in logits:  # (windows, longest, tags)
        _, mask, taken = rows.pad(numbers[done : done + len(part)])
        of_tokens[torch.from_numpy(taken)] = part[torch.from_numpy(mask)]
        done += len(part)
    labelled = torch.from_numpy(rows.labels >= 0)
    found = iter(of_tokens[labelled].argmax(-1).tolist())
    metrics = tag_metrics(expected, [[names[next(found)] for _ in tags] for tags in expected])
    loss = nn.functional.cross_entropy(of_tokens[labelled], torch.from_numpy(rows.labels)[labelled])
    return {**metrics, "loss": float(loss)}
