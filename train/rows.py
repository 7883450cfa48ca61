"""Hold tokenized rows and compute outputs of models for them; the fine-tuning stages train and measure with both."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from minibert.files.processes import processes
from minibert.train.stage import StageContext

TOKENIZED_AT_ONCE = 4096


class TokenizedDataset:
    """Keep tokenized rows end to end in one array, so that making a batch takes a few numpy calls.

    Attributes:
        ids: (tokens of all rows,) int32.
        types: (tokens of all rows,) int8, the segments; None if the model has none.
        starts: (rows + 1,), the position of the first token of each row, and the number of tokens.
        labels: (rows,) or (rows, values).
    """

    INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # of the model; the rest of a batch is for its loss

    def __init__(self, ids: np.ndarray, types: np.ndarray | None, starts: np.ndarray, labels: np.ndarray, pad_token_id: int):
        self.ids, self.types, self.starts, self.labels, self.pad_token_id = ids, types, starts, labels, pad_token_id

    @classmethod
    def from_texts(
        cls, rows: Dataset, columns: Sequence[str], labels: np.ndarray, tokenizer: Any, max_length: int
    ) -> "TokenizedDataset":
        """Tokenize ``columns`` (one, or two for pairs), cutting the longer text first where a row exceeds ``max_length``."""
        ids, types = [], []
        lengths: list[int] = []
        quiet = not processes().is_main_process
        starts = tqdm(range(0, len(rows), TOKENIZED_AT_ONCE), desc="tokenize", disable=quiet, leave=False)
        for start in starts:
            some = rows[start : start + TOKENIZED_AT_ONCE]
            encoded = tokenizer(
                *(list(some[column]) for column in columns),
                truncation=True,
                max_length=max_length,
                return_attention_mask=False,
            )
            lengths += map(len, encoded["input_ids"])
            ids.append(np.fromiter(chain.from_iterable(encoded["input_ids"]), dtype=np.int32))
            if "token_type_ids" in encoded:
                types.append(np.fromiter(chain.from_iterable(encoded["token_type_ids"]), dtype=np.int8))
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        return cls(np.concatenate(ids), np.concatenate(types) if types else None, ends, labels, tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitems__(self, rows: Sequence[int]) -> np.ndarray:
        return np.asarray(rows)  # rows stay here; collate fetches all of a batch at once

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row."""
        return np.diff(self.starts)

    @property
    def fingerprint(self) -> str:
        """Return a hash of all tokens and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.starts, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the inputs of the model for ``rows``, (rows, length of the longest) each, and their labels."""
        batch, _, _ = self.pad(rows)
        batch["labels"] = self.labels[rows]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def pad(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Return the inputs of the model for ``rows``, the mask of real tokens, and the positions of these in ``ids``."""
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        taken = (starts[:, None] + np.arange(lengths.max()))[mask]
        batch = {"input_ids": np.full(mask.shape, self.pad_token_id, dtype=np.int64), "attention_mask": mask.astype(np.int64)}
        batch["input_ids"][mask] = self.ids[taken]
        if self.types is not None:
            batch["token_type_ids"] = np.zeros(mask.shape, dtype=np.int64)
            batch["token_type_ids"][mask] = self.types[taken]
        return batch, mask, taken


def compute_outputs(
    model: nn.Module, rows: TokenizedDataset, batch_size: int, *names: str
) -> tuple[np.ndarray, list[list[Tensor]]]:
    """Compute outputs of ``model`` for all rows: each process computes a share of the batches, and all get all outputs.

    Args:
        names: names of the outputs, such as ``"logits"``.

    Returns:
        The numbers of the rows, in the order in which they were computed, and for each name one float32 tensor per batch,
        (rows of the batch, ...). Tensors of padded tokens are as long as the longest row of their batch.
    """
    state = processes()
    # Batches of similar lengths need little padding; the longest come first, so that memory runs out at once or never.
    order = np.argsort(-rows.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = []
    bar = tqdm(
        batches[state.process_index :: state.num_processes], desc="evaluate", leave=False, disable=not state.is_main_process
    )
    for batch in bar:
        inputs = send_to_device(rows.collate(batch), state.device)
        inputs = {name: value for name, value in inputs.items() if name in rows.INPUTS}
        outputs = model(**inputs)
        mine.append((batch, [outputs[name].float().cpu() for name in names]))
    gathered = gather_object(mine)
    return np.concatenate([batch for batch, _ in gathered]), [
        [tensors[at] for _, tensors in gathered] for at in range(len(names))
    ]


def head_changes(context: StageContext, names: Sequence[str]) -> dict[str, Any]:
    """Return the configuration fields of a head for the classes ``names``; a head of another size is replaced."""
    changes: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    if context.model is not None:
        start = AutoConfig.from_pretrained(context.model, trust_remote_code=False)
        changes["ignore_mismatched_sizes"] = start.num_labels != len(names)  # only then does a new head replace the old one
    return changes


def choose_metric(wanted: str | None, metrics: Sequence[str]) -> str:
    """Return the metric that picks the checkpoint to keep: ``wanted``, or the first of ``metrics``.

    Raises:
        ValueError: ``wanted`` is not one of ``metrics``; the message lists them.
    """
    if wanted is not None and wanted not in metrics:
        raise ValueError(f"metric_for_best={wanted!r} is unknown here; use one of {', '.join(metrics)}.")
    return wanted or metrics[0]


@contextmanager
def in_eval_data() -> Iterator[None]:
    """Name the evaluation data in a refusal: its labels must be those of the training data."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"eval_data, whose labels must all be known from data: {error}") from error
