"""Encode texts into vectors without padding, in batches of a limited number of tokens.

The texts are cut into slices, which are called windows. Within a window, texts are sorted by
length. The next window is tokenized while the model computes. The tokens of a batch are joined
in one row, which is pooled; sentence-transformers' own modules compute what follows. Models
other than MiniBERT, and models with modules that need padded tokens, use
``SentenceTransformer.encode``. Up to rounding, the vectors are the same.
"""

import copy
import ctypes
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer
from sentence_transformers.util import get_device_name, quantize_embeddings
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from minibert.data.load import is_unicode
from minibert.inference.batching import Batch, Tokenizer, check_texts, cut_windows, tokenizing_thread, turn
from minibert.inference.cpu import choose_dtype, prepack, supports_half_copies
from minibert.inference.load import PASSAGES, finite, load
from minibert.modeling_minibert import MiniBertModel
from minibert.packing_minibert import PREFERS_EXP2, Packing

DTYPES = ("auto", "float32", "bfloat16", "float16")
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
_FEW_TEXTS = 8  # with so few texts, another thread costs more time than it saves
_CPU_TOKENS, _GPU_TOKENS = 4096, 32768  # per batch
# Seconds between two calls of malloc_trim, which takes milliseconds and causes page faults.
TRIM_SECONDS = 20.0
_trimmed = time.monotonic()
_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class EncoderOptions(TypedDict, total=False):
    """Declare the options of :func:`encode`, for functions that pass the options on."""

    batch_tokens: int | None
    dtype: str
    normalize: bool
    truncate_dim: int | None
    prompt: str | None
    prompt_name: str | None
    device: str | None
    trust_remote_code: bool
    deterministic: bool


def encode(
    model: str | Path | SentenceTransformer,
    texts: str | Sequence[str],
    *,
    precision: Precision = "float32",
    convert_to_tensor: bool = False,
    show_progress: bool = False,
    **options: Unpack[EncoderOptions],
) -> Any:
    """Encode texts into a float32 array (texts, dimension), or one text into (dimension,).

    Memory use does not grow with the number of texts, apart from the result.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers
            model.
        texts: a sequence of texts, or a single text.
        precision: the type of the returned numbers: ``float32``, ``int8``, ``uint8``,
            ``binary`` or ``ubinary`` (one bit per dimension, packed). As in
            sentence-transformers, ``int8`` and ``uint8`` divide the range of each dimension
            among these texts, so that such vectors of two calls cannot be compared.
        convert_to_tensor: return a tensor on the device of the model, not an array.
        show_progress: show a progress bar on standard error.
        batch_tokens: the number of tokens to compute at once. The default depends on the
            device.
        dtype: the precision of the computation: ``float32``, ``bfloat16``, ``float16`` or
            ``auto``. ``auto`` chooses bfloat16 on a GPU that supports it, and on a CPU that
            multiplies at least a quarter faster in bfloat16. Otherwise, ``auto`` chooses
            float32. For an opened model, ``auto`` keeps the dtype of the model.
        normalize: scale vectors to length 1, even if the model does not normalize.
        truncate_dim: the number of dimensions to keep. The default is the setting of the
            model. Vectors are normalized after this only if ``normalize`` is True.
        prompt: a text to put before every text.
        prompt_name: the name of one of the model's prompts, as an alternative to ``prompt``.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. The default is the best one
            available.
        trust_remote_code: run Python code that comes with the model.
        deterministic: compute each text alone, so that its vector is the same, bit for bit,
            whatever other texts are encoded. This takes longer, most of all for short texts
            (docs/reliability.md).

    Example::

        vectors = encode("runs/quickstart/2-embed", ["read a table", "sort a list"])
        vectors @ vectors.T  # (2, 2) cosines: the vectors of this model have length 1

    Raises:
        FileNotFoundError: if the model does not exist or lacks a file.
        ValueError: if the model cannot be opened, an argument is not available, or a text is
            not a string or contains a lone surrogate.
    """
    encoder = Encoder(model, query_copies=False, **options)  # copies are only useful if the encoder is reused
    return encoder.encode(texts, precision=precision, convert_to_tensor=convert_to_tensor, show_progress=show_progress)


class Encoder:
    """Keep a model open to encode texts. See :func:`encode` for arguments not listed here.

    Args:
        query_copies: on a CPU, use float16 copies of the matrices for inputs of fewer than 32
            tokens, such as a query. The first query creates the copies and therefore takes
            longer. Copies are only made if ``dtype="auto"`` chooses float32.

    Attributes:
        model: the sentence-transformers model. Do not save a model that the encoder opened,
            since its matrices may be prepacked.
        dimension: the number of dimensions of the vectors.
        normalized: True if the vectors have length 1.
        packed: True if batches are computed without padding.
        decisions: a dictionary from the name of an option to the choice of the encoder and the
            reason.

    Example::

        encoder = Encoder("runs/quickstart/2-embed")
        passages = encoder.encode_document(["order items", "read a file"])
        encoder.similarity(encoder.encode_query("how do I sort a list"), passages)  # (1, 2)

    Raises:
        FileNotFoundError, ValueError: for the same reasons as :func:`encode`.
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        *,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        normalize: bool = False,
        truncate_dim: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        deterministic: bool = False,
        query_copies: bool = True,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)} (--dtype).")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens} (--batch-tokens).")
        if deterministic and batch_tokens not in (None, 1):
            raise ValueError(
                f"batch_tokens={batch_tokens} and deterministic=True are both given, but a text is computed alone."
            )
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name are both given; give only one (--prompt, --prompt-name).")
        if prompt is not None and not is_unicode(prompt):
            raise ValueError(f"The prompt {prompt!r} is not valid UTF-8; convert it (--prompt).")
        if device is not None:
            _check_device(device)
        self.decisions: dict[str, str] = {}
        self.model = self._open(model, dtype, device, trust_remote_code).eval()
        self.prompt = _find_prompt(self.model, prompt_name) if prompt is None else prompt
        self._prompt_given = prompt is not None or prompt_name is not None
        reason = _why_not_packed(self.model)
        self.packed = not reason
        self.decisions["path"] = f"sentence-transformers, since {reason}" if reason else "packed: no padding"
        with self.model.truncate_embeddings(None):
            width = self.model.get_embedding_dimension()
        assert width is not None  # sentence-embedding models have a dimension
        self.dimension = min(self.model.truncate_dim or width, width) if truncate_dim is None else truncate_dim
        if not 1 <= self.dimension <= width:
            raise ValueError(f"truncate_dim must be between 1 and {width}, got {self.dimension} (--truncate-dim).")
        self._cut = self.dimension if self.dimension < width else None
        scaled = self._cut is None and isinstance(self.model[-1], Normalize)
        self.normalized = normalize or scaled
        self._normalize = normalize and not scaled
        usual = _CPU_TOKENS if self.model.device.type == "cpu" else _GPU_TOKENS
        self.batch_tokens = 1 if deterministic else batch_tokens or usual  # a longer text is a batch of its own
        if self.packed:
            encoder = _encoder_of(self.model)
            self._pooling: Any = self.model[1]
            self._tokenizer = Tokenizer(self.model.tokenizer, encoder.config, self._pooling)
            owned = self.model is not model  # do not change a model that the caller opened
            if owned:
                encoder.pooler = None  # the vectors are pooled from the hidden states
            half_copies = (
                query_copies and not deterministic and dtype == "auto" and supports_half_copies(getattr(torch, self.dtype))
            )
            if owned and prepack(encoder, half_copies=half_copies):
                self.decisions["matrices"] = "prepacked for oneDNN" + ("; for a query in float16" if half_copies else "")
            if self.model.device.type == "cpu" and self.dtype == "bfloat16" and PREFERS_EXP2:
                self.decisions["attention"] = "powers of two, since this processor has no AMX"

    def _open(
        self, model: str | Path | SentenceTransformer, dtype: str, device: str | None, trust_remote_code: bool
    ) -> SentenceTransformer:
        if isinstance(model, SentenceTransformer):
            self.decisions["dtype"] = "the dtype of the opened model" if dtype == "auto" else f"{dtype}, as asked"
            if dtype != "auto":
                model = copy.deepcopy(model)  # of a MiniBERT, the modules after it stay in float32
                (model if _why_not_packed(model) else model[0]).to(getattr(torch, dtype))
            return model if device is None else model.to(device)
        wanted, reason = choose_dtype(dtype, device or get_device_name())
        opened = load(model, device=device, trust_remote_code=trust_remote_code, dtype=wanted)
        if dtype == "auto" and wanted != "float32" and _why_not_packed(opened):  # avoid pooling in half precision
            wanted, reason = "float32", "only a packed MiniBERT stays exact in half precision"
            opened = load(model, device=device, trust_remote_code=trust_remote_code, dtype=wanted)
        self.decisions["dtype"] = f"{wanted}, {reason}"
        return opened

    @property
    def dtype(self) -> str:
        """Return the precision of the computation, such as ``"float32"``."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        task: str | None = None,
        prompt_name: str | None = None,
        precision: Precision = "float32",
        convert_to_tensor: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Encode texts into an array (texts, dimension), in order, or one text into (dimension,).

        ``task`` may be ``query`` or ``document``, as for :meth:`encode_query` and
        :meth:`encode_document`. ``prompt_name`` replaces the prompt of the encoder. The other
        arguments are those of :func:`encode`.

        Raises:
            ValueError: if a text is not a string or contains a lone surrogate, or the
                ``prompt_name`` or ``precision`` is unknown.
        """
        if precision not in get_args(Precision):
            raise ValueError(f"precision={precision!r} is unknown; use one of {', '.join(get_args(Precision))}.")
        rows = [texts] if isinstance(texts, str) else texts
        vectors: Any = np.empty((len(rows), self.dimension), dtype=np.float32)
        done = 0
        with tqdm(desc="encode", total=len(rows), unit="text", disable=not show_progress) as bar:
            for window in self.windows(cut_windows(rows), task=task, prompt_name=prompt_name):
                vectors[done : done + len(window)] = window
                done += len(window)
                bar.update(len(window))
        if precision != "float32":
            vectors = quantize_embeddings(vectors, precision)
        if convert_to_tensor:
            vectors = torch.from_numpy(vectors).to(self.model.device)
        return vectors[0] if rows is not texts else vectors

    def encode_query(self, queries: str | Sequence[str], **options: Any) -> Any:
        """Encode queries with the model's prompt ``query``, unless another is given. See :meth:`encode`."""
        return self.encode(queries, task="query", **options)

    def encode_document(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Encode passages with the model's prompt ``document``, unless another is given. See :meth:`encode`."""
        return self.encode(texts, task="document", **options)

    def similarity(self, first: Any, second: Any) -> Tensor:
        """Compare vectors (n, dimension) with vectors (m, dimension) by the model's function: (n, m)."""
        return self.model.similarity(first, second)

    def _prompt_for(self, task: str | None) -> str | None:
        names = {"query": ["query"], "document": PASSAGES}.get(task or "", [])
        found = (self.model.prompts[name] for name in names if name in self.model.prompts)
        return self.prompt if self._prompt_given else next(found, self.prompt)

    def windows(
        self, windows: Iterable[Sequence[str]], *, task: str | None = None, prompt_name: str | None = None
    ) -> Iterator[np.ndarray]:
        """Encode lists of texts. Yield the float32 vectors (n, dimension) of each list.

        The next list is tokenized while the current list is computed. :meth:`encode` describes
        ``task`` and ``prompt_name``.
        """
        prompt = self._prompt_for(task) if prompt_name is None else _find_prompt(self.model, prompt_name)
        first = 0  # number of the first text of the window
        if not self.packed:
            for texts in windows:
                yield self._encode_padded(texts, first, prompt, task)
                first += len(texts)
            return
        waiting: deque[tuple[int, Future[list[Batch]]]] = deque()
        worker = tokenizing_thread(os.getpid())
        try:
            for texts in windows:
                arguments = (texts, self.batch_tokens, first, prompt or "")
                first += len(texts)
                if len(texts) <= _FEW_TEXTS and not waiting:
                    yield self._compute(self._tokenizer.batches(*arguments), len(texts))
                    continue
                waiting.append((len(texts), worker.submit(self._tokenizer.batches, *arguments)))
                if len(waiting) > 1:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:  # after an error or an interruption, the waiting windows are not needed
            for _, batches in waiting:
                batches.cancel()

    def _next(self, waiting: deque[tuple[int, Future[list[Batch]]]]) -> np.ndarray:
        count, batches = waiting.popleft()
        return self._compute(batches.result(), count)

    def _encode_padded(self, texts: Sequence[str], first: int, prompt: str | None, task: str | None) -> np.ndarray:
        check_texts(texts, first)
        if not len(texts):
            return np.empty((0, self.dimension), dtype=np.float32)
        options: dict[str, Any] = {"truncate_dim": self._cut, "normalize_embeddings": self._normalize}
        options |= {"prompt": prompt or "", "show_progress_bar": False}
        options |= {"task": task} if task else {}
        options |= {"batch_size": 1} if self.batch_tokens == 1 else {}
        vectors: np.ndarray = finite(np.asarray(self.model.encode(list(texts), **options), dtype=np.float32))
        return vectors

    @torch.inference_mode()
    def _compute(self, batches: Sequence[Batch], count: int) -> np.ndarray:
        """Compute vectors (count, dimension). A text without tokens is pooled to zeros."""
        device = self.model.device
        pooled = torch.zeros(count, self._pooling.get_embedding_dimension(), dtype=torch.float32, device=device)
        for batch in batches:
            with turn(str(device)):
                pooled.index_copy_(0, torch.from_numpy(batch.rows).to(device), self._vectors(batch))
        with turn(str(device)):  # a product of one row may round otherwise than one of many
            vectors = torch.cat([self._finish(rows) for rows in pooled.split(1 if self.batch_tokens == 1 else count)])
        trim_memory()
        found: np.ndarray = finite(vectors.cpu().numpy())
        return found

    def _finish(self, pooled: Tensor) -> Tensor:
        """Apply the modules after the pooling, and the options: (n, pooled width) -> (n, dimension)."""
        features = {"sentence_embedding": pooled}
        for module in list(self.model)[2:]:
            features = module(features)
        vectors = features["sentence_embedding"][:, : self._cut]
        return F.normalize(vectors, dim=-1) if self._normalize else vectors

    def _vectors(self, batch: Batch) -> Tensor:
        """Compute the pooled vectors (texts, C) of one batch."""
        device, lengths = self.model.device, batch.lengths
        starts = lengths.cumsum() - lengths
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(np.arange(len(batch.ids)) - starts.repeat(lengths))
        if device.type == "cpu":
            packing = Packing.of_lengths(lengths.tolist())
        else:
            ids, positions = ids.to(device), positions.to(device)
            bounds = torch.from_numpy(np.append(starts, len(batch.ids))).to(device, torch.int32)
            packing = Packing.of_cu_seqlens(bounds, int(lengths[-1]))
        hidden: Tensor = _encoder_of(self.model).forward_packed(ids, positions, packing)  # (T, C)
        if self._pooling.pooling_mode != "mean" or batch.prompt_length:
            features: dict[str, Any] = {"token_embeddings": hidden[None], "prompt_length": batch.prompt_length}
            if len(lengths) > 1:  # of a single text, sums are not added in a random order on a GPU
                features["cu_seq_lens_q"] = torch.from_numpy(np.append(starts, len(batch.ids))).to(device)
            pooled: Tensor = self._pooling(features)["sentence_embedding"]
            return pooled
        if len(lengths) == 1:
            return hidden.mean(dim=0, keepdim=True)
        rows, first = torch.arange(len(hidden), device=device), torch.from_numpy(starts).to(device)
        return F.embedding_bag(rows, hidden, first, mode="mean")  # the fastest mean of segments in torch


def trim_memory() -> None:
    """Return freed memory to the system, at most once in ``TRIM_SECONDS`` seconds.

    Without this call, glibc keeps memory that PyTorch has freed (``benchmarks/soak.py``).
    """
    global _trimmed
    if _malloc_trim is not None and time.monotonic() - _trimmed >= TRIM_SECONDS:
        _trimmed = time.monotonic()
        _malloc_trim(0)


def _check_device(device: str) -> None:
    """Raise a ValueError if ``device`` is not available."""
    try:
        torch.zeros(1, device=device).cpu()  # "meta" accepts tensors but returns none
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ImportError) as error:
        present = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [get_device_name()]
        raise ValueError(
            f"device={device!r} cannot be used here; use one of {', '.join(dict.fromkeys(['cpu', *present]))} (--device)."
        ) from error


def _encoder_of(model: SentenceTransformer) -> Any:
    """Return the transformers model in the first module of ``model``."""
    return model[0].auto_model


def _find_prompt(model: SentenceTransformer, name: str | None) -> str | None:
    """Return the prompt ``name``, or else the model's default prompt, or None."""
    if name is not None and name not in model.prompts:
        known = ", ".join(model.prompts) or "none"
        raise ValueError(f"The model has no prompt named {name!r}; it has {known} (--prompt-name).")
    return model.prompts.get(name or model.default_prompt_name or "")


def _why_not_packed(model: SentenceTransformer) -> str | None:
    """Return why ``model`` cannot encode without padding, or None if it can."""
    transformer, *rest = list(model)
    if not isinstance(transformer, Transformer) or not isinstance(transformer.auto_model, MiniBertModel):
        return "the model is not a MiniBERT (minibert hub convert makes one of a BERT)"
    config = transformer.auto_model.config
    if not config.unpad_inputs or config._attn_implementation != "sdpa":
        return "its configuration asks for padded inputs or another attention"
    own = (transformer.processing_kwargs, transformer.query_length, transformer.document_length, transformer.query_expansion)
    if not transformer.tokenizer.is_fast or any(own):
        return "its tokenizer is slow or has options of its own"
    if not rest or type(rest[0]) is not Pooling:
        return "its vectors are not pooled from the last layer"
    for module in rest[1:]:
        of_tokens = getattr(module, "module_input_name", "") == "token_embeddings"
        if type(module) not in (Dense, Dropout, LayerNorm, Normalize) or of_tokens:
            return f"its module {type(module).__name__} may need padded tokens"
    return None
