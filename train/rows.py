"""Tokenize rows, and compute model outputs for tokenized rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from minibert.files.processes import processes
from minibert.inference.load import open_config
from minibert.train.stage import StageContext

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # other tensors of a batch are for the loss


class TokenizedDataset:
    """Store tokenized rows with labels, and make padded batches of rows.

    Attributes:
        ids: (tokens,) int32 token ids of all rows.
        types: (tokens,) int8 segment of each token. None if the model has no segments.
        starts: (rows + 1,) index in ``ids`` of the first token of each row, and then the number
            of all tokens.
        labels: (rows,) or (rows, values). A subclass may have a label for every token.
    """

    labels: np.ndarray

    def __init__(self, chunks: Iterable[tuple[Any, Any]], pad_token_id: int):
        """Join ``chunks``. A chunk has token ids and segments. The segments may be None."""
        ids, types = [], []
        lengths: list[int] = []
        for some_ids, some_types in chunks:
            lengths += map(len, some_ids)
            ids.append(np.fromiter(chain.from_iterable(some_ids), dtype=np.int32))
            if some_types is not None:
                types.append(np.fromiter(chain.from_iterable(some_types), dtype=np.int8))
        self.ids, self.types = np.concatenate(ids), np.concatenate(types) if types else None
        self.starts, self.pad_token_id = np.cumsum([0, *lengths], dtype=np.int64), pad_token_id

    @classmethod
    def from_texts(
        cls,
        rows: Dataset,
        columns: Sequence[str],
        labels: np.ndarray,
        tokenizer: Any,
        max_length: int,
    ) -> "TokenizedDataset":
        """Tokenize a column of texts, or two columns as pairs. Cut the longer text first."""

        def chunks() -> Iterator[tuple[Any, Any]]:
            for some in in_chunks(len(rows)):
                encoded = tokenizer(
                    *(list(rows[some][column]) for column in columns),
                    truncation=True,
                    max_length=max_length,
                    return_attention_mask=False,
                )
                yield encoded["input_ids"], encoded.get("token_type_ids")

        made = cls(chunks(), tokenizer.pad_token_id)
        made.labels = labels
        return made

    def __len__(self) -> int:
        return len(self.starts) - 1

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
        """Return labels and model inputs of ``rows``. Pad inputs to the longest row."""
        batch, _, _ = self.pad(rows)
        batch["labels"] = self.labels[rows]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def pad(self, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Return padded inputs, the mask of real tokens, and token indices in ``ids``."""
        starts, lengths = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        taken = (starts[:, None] + np.arange(lengths.max()))[mask]
        batch = {
            "input_ids": np.full(mask.shape, self.pad_token_id, dtype=np.int64),
            "attention_mask": mask.astype(np.int64),
        }
        batch["input_ids"][mask] = self.ids[taken]
        if self.types is not None:
            batch["token_type_ids"] = np.zeros(mask.shape, dtype=np.int64)
            batch["token_type_ids"][mask] = self.types[taken]
        return batch, mask, taken

    def batches(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        """Split row numbers into batches of similar lengths. The longest rows come first."""
        order = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return [order[start : start + size] for start in range(0, len(order), size)]

    def logits(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Return the logits of ``model`` for a batch of row numbers, on the CPU in float32."""
        inputs = {name: value for name, value in self.collate(rows).items() if name in _INPUTS}
        logits: Tensor = model(**send_to_device(inputs, processes().device)).logits
        return logits.float().cpu()


def in_chunks(rows: int) -> Iterator[slice]:
    """Yield slices of at most 1024 row numbers below ``rows``. Show a progress bar."""
    quiet = not processes().is_main_process
    for start in tqdm(range(0, rows, 1024), desc="tokenize", disable=quiet, leave=False):
        yield slice(start, start + 1024)


def compute_outputs(model: nn.Module, rows: TokenizedDataset, batch_size: int) -> tuple[np.ndarray, list[Tensor]]:
    """Compute the logits of all rows. Processes divide the work.

    Returns:
        The row numbers in the order of computation, and a list of float32 logits, with a tensor
        (rows of the batch, ...) for each batch. The result is equal in all processes.
    """
    state = processes()
    batches = rows.batches(np.arange(len(rows)), batch_size)
    mine = batches[state.process_index :: state.num_processes]
    bar = tqdm(mine, desc="evaluate", leave=False, disable=not state.is_main_process)
    found = gather_object([(batch, rows.logits(model, batch)) for batch in bar])
    return np.concatenate([batch for batch, _ in found]), [logits for _, logits in found]


def results_of(rows: Dataset, compute: Callable[[Dataset], Iterable[Any]]) -> list[Any]:
    """Return a list with the result of ``compute`` for each row. Processes divide the work."""
    state = processes()
    mine = range(state.process_index, len(rows), state.num_processes)
    quiet = not state.is_main_process
    bar = tqdm(compute(rows.select(mine)), desc="evaluate", total=len(mine), leave=False, disable=quiet)
    found = dict(gather_object(list(zip(mine, bar, strict=True))))
    return [found[number] for number in range(len(rows))]


def head_changes(context: StageContext, names: Sequence[str]) -> dict[str, Any]:
    """Return the configuration fields of a classification head for the classes ``names``."""
    changes: dict[str, Any] = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: at for at, name in enumerate(names)},
    }
    if context.model is not None:
        start = open_config(context.model)
        # A new head replaces a head with another number of classes.
        changes["ignore_mismatched_sizes"] = start.num_labels != len(names)
    return changes


def choose_metric(wanted: str | None, metrics: Sequence[str]) -> str:
    """Return ``wanted`` if it is in ``metrics``, or the first metric if ``wanted`` is None."""
    if wanted is not None and wanted not in metrics:
        raise ValueError(f"metric_for_best={wanted!r} is not measured; use one of {', '.join(metrics)}.")
    return wanted or metrics[0]


@contextmanager
def in_eval_data() -> Iterator[None]:
    """Mention ``eval_data`` in the errors that the ``with`` block raises."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"eval_data may only contain labels that also occur in data: {error}") from error
