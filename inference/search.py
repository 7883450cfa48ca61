"""Search passages by meaning: encode them once, then answer any number of queries."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from minibert.data.load import as_dataset, text_columns
from minibert.inference.load import load

# Passages handed to the encoder at once: enough to sort by length within, few enough that their tokens stay small.
_CHUNK = 10_000


class Hit(NamedTuple):
    """One passage found: its number in the passages (from 0), its similarity to the query, and its text."""

    number: int
    score: float
    passage: str


def read_passages(data: str | Path | Dataset, column: str | None = None, *, split: str = "train") -> list[str]:
    """The passages in ``data``: the texts of one column, each once, without those that are missing or blank.

    Args:
        data: a file, a folder with a file per split, a Hub data set (owner/name or owner/name:config), or rows read already.
        column: the column to take; the default is the only column of strings, or else the one named ``text``, ``passage``,
            ``answer`` or ``sentence``.
        split: the split of a folder or Hub data set to read; everything else is taken whole.

    Raises:
        FileNotFoundError: for data that is neither here nor on the Hub.
        ValueError: for a column that is not there or holds no texts, a choice that is not clear, no passage at all, or
            data that cannot be read.
    """
    data = as_dataset(data, split=split)
    strings = text_columns(data)
    if column is None:
        usual = [name for name in ("text", "passage", "answer", "sentence") if name in strings]
        if not usual and len(strings) != 1:
            raise ValueError(
                f"The passages could be in more than one of the columns {', '.join(data.column_names)}; name one with --column."
                if strings
                else f"No column holds texts; the columns are {', '.join(data.column_names)}."
            )
        column = (usual or strings)[0]
    elif column not in strings:
        raise ValueError(
            f"There is no column of texts named {column!r}; the columns of texts are {', '.join(strings) or 'none'} "
            f"(all columns: {', '.join(data.column_names)})."
        )
    passages = list(dict.fromkeys(text for text in data[column] if text and not text.isspace()))
    if not passages:
        raise ValueError(f"Every passage in column {column!r} is blank; give a file that holds texts.")
    return passages


def check_queries(queries: Sequence[str]) -> None:
    """Refuse queries that ask nothing.

    Raises:
        ValueError: naming the first query that is empty or blank.
    """
    for number, query in enumerate(queries, start=1):
        if not query.strip():
            raise ValueError(f"Query {number} is empty; say in words what to look for.")


class Searcher:
    """Passages and their vectors, ready for queries.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers model.
        passages: texts to search; each is encoded once, here. Beside the vectors (``len(passages)`` x width numbers), memory
            does not grow with their number.
        batch_size: texts computed at once.

    Raises:
        ValueError: for no passages, and as :func:`minibert.inference.load.load` does.
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        passages: Sequence[str],
        *,
        batch_size: int = 32,
        device: str | None = None,
        trust_remote_code: bool = False,
        show_progress: bool = False,
    ) -> None:
        if not len(passages):
            raise ValueError("There are no passages to search; give at least one.")
        self.passages = passages
        self.model = (
            model if isinstance(model, SentenceTransformer) else load(model, device=device, trust_remote_code=trust_remote_code)
        )
        self.vectors = self._encode_all(batch_size, show_progress)  # (passages, width)

    def _encode_all(self, batch_size: int, show_progress: bool) -> torch.Tensor:
        vectors: torch.Tensor | None = None
        for start in range(0, len(self.passages), _CHUNK):
            part = self.model.encode_document(
                list(self.passages[start : start + _CHUNK]),
                batch_size=batch_size,
                show_progress_bar=show_progress,
                convert_to_tensor=True,
            )
            if vectors is None:
                vectors = torch.empty(len(self.passages), part.shape[1], dtype=part.dtype, device=part.device)
            vectors[start : start + len(part)] = part
        assert vectors is not None  # the constructor refuses an empty sequence
        return vectors

    def search(self, queries: Sequence[str], top_k: int = 5) -> list[list[Hit]]:
        """The ``top_k`` passages most similar to each query, best first.

        Raises:
            ValueError: for an empty query, or ``top_k`` under 1.
        """
        check_queries(queries)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} finds nothing; ask for at least 1 passage (--top-k).")
        if not queries:
            return []
        asked = self.model.encode_query(list(queries), show_progress_bar=False, convert_to_tensor=True)
        found = semantic_search(asked, self.vectors, top_k=top_k, score_function=self.model.similarity)
        return [[Hit(number := int(hit["corpus_id"]), hit["score"], self.passages[number]) for hit in hits] for hits in found]
