"""Texts to vectors, fast: no padding anywhere, batches by tokens instead of by texts, tokenization ahead of the model.

Texts are taken in windows, sorted by length in there, and laid end to end in one row per batch, which MiniBERT computes as it
is; what comes out is pooled from that row. Vectors are those of ``SentenceTransformer.encode``. Models that are not MiniBERT,
or have modules other than pooling and normalization on top, are left to sentence-transformers.
"""

import contextlib
import copy
import ctypes
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import get_device_name
from torch import Tensor
from tqdm.auto import tqdm

from minibert import modeling_minibert
from minibert.data.load import is_unicode
from minibert.inference.cpu import can_halve, lay_out
from minibert.inference.load import load
from minibert.modeling_minibert import MiniBertModel, Packing, cut_evenly

DTYPES = ("auto", "float32", "bfloat16", "float16")
# A window: texts tokenized and sorted by length together. More of them find more of equal length.
WINDOW_TEXTS, WINDOW_CHARACTERS = 4096, 2**24
# Characters of a text per token that the model reads, at least, before the rest of the text is cut off unread.
_CHARACTERS_PER_TOKEN = 16
_FEW_TEXTS = 8  # so few are tokenized sooner than handed to another thread
_SPACE = re.compile(r"\s")
_PARALLELISM = "TOKENIZERS_PARALLELISM"
# How often free memory is handed back: that takes milliseconds, and fetching it again some more.
TRIM_SECONDS = 20.0
_trimmed = time.monotonic()
_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
# Tokens computed at once.
_BATCH_TOKENS = {"cpu": 4096, "gpu": 32768}
_TURNS: dict[tuple[str, int], threading.Lock] = {}  # of what is computed, in which process


def encode(
    model: str | Path | SentenceTransformer,
    texts: str | Sequence[str],
    *,
    batch_tokens: int | None = None,
    dtype: str = "auto",
    normalize: bool = False,
    prompt: str | None = None,
    prompt_name: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> np.ndarray:
    """Vectors of ``texts``, (texts, dimension) in float32, or (dimension,) of a single text.

    Beside the vectors, memory does not grow with the number of texts.

    Args:
        model: a model folder, the id of a model on the Hub, or an opened sentence-transformers model.
        batch_tokens: tokens computed at once; the default suits the device.
        dtype: numbers to compute with: ``float32``, ``bfloat16``, ``float16``, or ``auto``, which is bfloat16 where the
            processor multiplies faster in it (timed once in a process) and else float32. An opened model is by default taken
            as it is.
        normalize: give vectors of length 1, also where the model has no such module.
        prompt: words to put before every text; ``prompt_name`` names one that the model brings.
        device: such as ``"cpu"`` or ``"cuda:1"``; the default is the best one present.

    Example::

        vectors = encode("runs/quickstart/2-embed", ["read a table", "sort a list"])
        vectors @ vectors.T  # (2, 2) cosines: the vectors of this model have length 1

    Raises:
        FileNotFoundError, ValueError: as :func:`minibert.inference.load.load` does, for an unknown ``dtype`` or
            ``prompt_name``, a device that is not here, and a text that is no string or holds a lone surrogate.
    """
    encoder = Encoder(
        model,
        batch_tokens=batch_tokens,
        dtype=dtype,
        normalize=normalize,
        prompt=prompt,
        prompt_name=prompt_name,
        device=device,
        trust_remote_code=trust_remote_code,
        query_copies=False,  # which pay for who asks again
    )
    if isinstance(texts, str):
        vector: np.ndarray = encoder.encode([texts])[0]
        return vector
    return encoder.encode(texts, show_progress=show_progress)


class EncoderOptions(TypedDict, total=False):
    """The options of :func:`encode` that decide how a model is used, for functions that pass them on."""

    batch_tokens: int | None
    dtype: str
    normalize: bool
    prompt: str | None
    prompt_name: str | None
    device: str | None
    trust_remote_code: bool


class Batch(NamedTuple):
    """Token ids of several texts, end to end, shorter texts first."""

    ids: np.ndarray  # (T,)
    lengths: np.ndarray  # (texts,), each above 0
    rows: np.ndarray  # (texts,) their places in the window


class Encoder:
    """A model ready to encode any number of texts; arguments as in :func:`encode`.

    Args:
        query_copies: where ``dtype="auto"`` takes float32, multiply fewer than 32 tokens (a query) by copies of the matrices in
            float16, which take half the time to read. They are made at the first query, which waits for that.

    Attributes:
        model: the sentence-transformers model, which cannot be saved if it was opened here: its matrices may be laid out anew.
        dimension: of the vectors.
        normalized: whether the vectors have length 1.
        packed: whether batches are computed without padding, by this module.
        choices: what was chosen, and why, by name of the option.
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        *,
        batch_tokens: int | None = None,
        dtype: str = "auto",
        normalize: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        query_copies: bool = True,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)} (--dtype).")
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} computes nothing; give at least 1 (--batch-tokens).")
        if prompt is not None and prompt_name is not None:
            raise ValueError(
                f"prompt={prompt!r} and prompt_name={prompt_name!r} both say what to put before the texts; give one of the two "
                "(--prompt, --prompt-name)."
            )
        if prompt is not None and not is_unicode(prompt):
            raise ValueError(f"The prompt {prompt!r} is not UTF-8; convert it (--prompt).")
        if device is not None:
            _check_device(device)
        self.choices: dict[str, str] = {}
        self.model = self._open(model, dtype, device, trust_remote_code).eval()
        self.prompt = _find_prompt(self.model, prompt, prompt_name)
        reason = _why_not_packed(self.model, self.prompt)
        self.packed = not reason
        self.choices["path"] = f"sentence-transformers, since {reason}" if reason else "packed: no padding"
        cut = self.model.truncate_dim is not None
        self.normalized = normalize or (not cut and any(isinstance(module, Normalize) for module in self.model))
        self._normalize = normalize
        dimension = self.model.get_embedding_dimension()
        assert dimension is not None  # of every model that gives sentence embeddings
        self.dimension = dimension
        self.batch_tokens = batch_tokens or self._suitable_batch()
        if self.packed:
            self._tokenizer = _Tokenizer(self.model, self.prompt)
            owned = self.model is not model  # what a caller opened stays as it is
            if owned:
                _encoder_of(self.model).pooler = None  # computed for nobody: vectors are pooled from the tokens
            halve = query_copies and dtype == "auto" and can_halve(getattr(torch, self.dtype))
            if owned and lay_out(_encoder_of(self.model), halve=halve):
                self.choices["matrices"] = "laid out for oneDNN" + ("; for a query in float16" if halve else "")
            if self.model.device.type == "cpu" and self.dtype == "bfloat16" and modeling_minibert.whole_products_pay():
                self.choices["attention"] = "whole products, since this processor has no AMX"

    def _open(
        self, model: str | Path | SentenceTransformer, dtype: str, device: str | None, trust_remote_code: bool
    ) -> SentenceTransformer:
        if isinstance(model, SentenceTransformer):
            self.choices["dtype"] = "that of the opened model" if dtype == "auto" else f"{dtype}, as asked"
            model = model if dtype == "auto" else copy.deepcopy(model).to(getattr(torch, dtype))
            return model if device is None else model.to(device)
        wanted, reason = choose_dtype(dtype, device or get_device_name())
        opened = load(model, device=device, trust_remote_code=trust_remote_code, dtype=wanted)
        if dtype == "auto" and wanted != "float32" and _why_not_packed(opened, None):  # pooled in half precision: too inexact
            wanted, reason = "float32", "only a packed MiniBERT stays exact in less"
            opened = load(model, device=device, trust_remote_code=trust_remote_code, dtype=wanted)
        self.choices["dtype"] = f"{wanted}, {reason}"
        return opened

    @property
    def dtype(self) -> str:
        """The numbers computed with."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def _suitable_batch(self) -> int:
        return _BATCH_TOKENS["cpu" if self.model.device.type == "cpu" else "gpu"]

    def explain(self) -> str:
        """What was chosen, and why, a line each."""
        return "\n".join(f"{name}: {choice}" for name, choice in self.choices.items())

    def encode(self, texts: Sequence[str], *, show_progress: bool = False) -> np.ndarray:
        """(texts, dimension) float32 vectors, in the order of ``texts``.

        Raises:
            ValueError: naming the first text that is no string or holds a lone surrogate.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        done = 0
        with tqdm(desc="encode", total=len(texts), unit="text", disable=not show_progress) as bar:
            for window in self.windows(cut_windows(texts)):
                vectors[done : done + len(window)] = window
                done += len(window)
                bar.update(len(window))
        return vectors

    def windows(self, windows: Iterable[Sequence[str]]) -> Iterator[np.ndarray]:
        """(n, dimension) float32 vectors of every window of ``n`` texts; the next window is tokenized meanwhile.

        Raises:
            ValueError: naming the first text that is no string or holds a lone surrogate.
        """
        first = 0  # number of the window's first text
        if not self.packed:
            for texts in windows:
                yield self._encode_padded(texts, first)
                first += len(texts)
            return
        waiting: deque[tuple[int, Future[list[Batch]]]] = deque()
        worker = _tokenizing(os.getpid())
        try:
            for texts in windows:
                if len(texts) <= _FEW_TEXTS and not waiting:
                    yield self._finish(self._tokenizer.batches(texts, self.batch_tokens, first), len(texts))
                    first += len(texts)
                    continue
                waiting.append((len(texts), worker.submit(self._tokenizer.batches, texts, self.batch_tokens, first)))
                first += len(texts)
                if len(waiting) > 1:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:  # an error or an interruption leaves windows that nobody asks for any more
            for _, batches in waiting:
                batches.cancel()

    def _next(self, waiting: deque[tuple[int, Future[list[Batch]]]]) -> np.ndarray:
        count, batches = waiting.popleft()
        return self._finish(batches.result(), count)

    def _finish(self, batches: Sequence[Batch], count: int) -> np.ndarray:
        vectors = self._compute(batches, count)
        trim_memory()
        return vectors

    def _encode_padded(self, texts: Sequence[str], first: int) -> np.ndarray:
        _check_texts(texts, first)
        if not len(texts):
            return np.empty((0, self.dimension), dtype=np.float32)
        return self.model.encode(
            list(texts),
            prompt=self.prompt or "",
            normalize_embeddings=self._normalize,
            show_progress_bar=False,
            convert_to_numpy=True,
        ).astype(np.float32)

    @torch.inference_mode()
    def _compute(self, batches: Sequence[Batch], count: int) -> np.ndarray:
        """(count, dimension): the vectors of a window, from its batches. A text without a token gets zeros."""
        device = self.model.device
        vectors = torch.zeros(count, self.dimension, device=device)
        for batch in batches:
            with _turn(str(device), os.getpid()):
                vectors.index_copy_(0, torch.from_numpy(batch.rows).to(device), self._vectors(batch))
        if self.normalized:
            vectors = F.normalize(vectors, dim=-1)
        return vectors.cpu().numpy()

    def _vectors(self, batch: Batch) -> Tensor:
        """(texts, C): the pooled vectors of one batch."""
        device, lengths = self.model.device, batch.lengths
        starts = lengths.cumsum() - lengths
        ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(np.arange(len(batch.ids)) - starts.repeat(lengths))
        bounds = None  # which a CPU does not need
        if device.type != "cpu":
            ids, positions = ids.to(device), positions.to(device)
            bounds = torch.from_numpy(np.append(starts, len(batch.ids))).to(device, torch.int32)
        packing = Packing(None, lengths.tolist() if bounds is None else None, bounds, int(lengths[-1]))
        hidden: Tensor = _encoder_of(self.model).forward_packed(ids, positions, packing)  # (T, C)
        first = torch.from_numpy(starts).to(device)
        if self.model[1].pooling_mode == "cls":
            return hidden[first]
        if len(lengths) == 1:
            return hidden.mean(dim=0, keepdim=True)
        rows = torch.arange(len(hidden), device=device)
        return F.embedding_bag(rows, hidden, first, mode="mean")  # the fastest mean of pieces that torch has


@cache
def _tokenizing(process: int) -> ThreadPoolExecutor:
    """The one thread of this process that tokenizes, whoever asks: the tokenizer takes every core as it is, and what an
    allocator keeps free it keeps for each thread. A forked process, which has no thread of its parent's, gets its own.
    Only a few texts are tokenized by who brings them."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")


def _turn(what: str, process: int) -> threading.Lock:
    """Held while a batch is computed on a device, or by a tokenizer, which take all there is: threads that encode at once take
    turns. They compute themselves, not one thread for all: OpenMP keeps helpers for each thread that ever computed, as the
    one that loaded the model has, and lets them fall asleep between two calls once there are more of them than cores."""
    return _TURNS.setdefault((what, process), threading.Lock())  # which, unlike a cache, gives two threads the same one


def trim_memory() -> None:
    """Hand back to the system what the allocator keeps free, at most every ``TRIM_SECONDS``.

    Tensors of ever other sizes leave holes between them, which glibc keeps (``benchmarks/soak.py`` shows it); other
    allocators are left alone.
    """
    global _trimmed
    if _malloc_trim is not None and time.monotonic() - _trimmed >= TRIM_SECONDS:
        _trimmed = time.monotonic()
        _malloc_trim(0)


def choose_dtype(dtype: str, device: str) -> tuple[str, str]:
    """The numbers to compute with on ``device``, and why.

    >>> choose_dtype("float32", "cpu")
    ('float32', 'as asked')
    """
    if dtype != "auto":
        return dtype, "as asked"
    kind = torch.device(device).type  # Accelerate calls a processor cpu:0
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "which this GPU computes natively") if native else ("float32", "this GPU has no bfloat16")
    if kind != "cpu":
        return "float32", f"bfloat16 is not known to pay on {kind}"
    rates = dict(modeling_minibert.product_rates())
    half = rates.pop("bfloat16")
    times = f"{half / max(rates.values()):.1f} times as fast"
    if modeling_minibert.bfloat16_pays():
        return "bfloat16", f"in which this processor multiplies {times} as in float32"
    return "float32", f"since this processor multiplies bfloat16 {times}"


def cut_windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut ``texts`` into windows that are not too large, whatever the length of a text."""
    start = characters = 0
    for row, text in enumerate(texts):
        length = len(text) if isinstance(text, str) else 0  # what is no string is refused with its window
        characters += length
        if row - start == WINDOW_TEXTS or (row > start and characters > WINDOW_CHARACTERS):
            yield texts[start:row]
            start, characters = row, length
    if start < len(texts):
        yield texts[start:]


def cut_batches(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Texts of ``lengths`` in batches of at most ``batch_tokens`` tokens (but at least a text), the longest first; those
    within a batch ascend. Texts without a token are in none.

    They are as few as that allows and of nearly the same size, whatever the window holds: oneDNN keeps kernels for every
    number of rows that it meets.

    >>> [batch.tolist() for batch in cut_batches(np.array([3, 9, 0, 4, 2, 1]), 9)]
    [[1], [3], [5, 4, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    bounds = cut_evenly(lengths[order].tolist(), batch_tokens)
    return [order[start:end][::-1] for start, end in pairwise(bounds)]


class _Tokenizer:
    """The fast tokenizer below a model's own, without the lists that nothing here reads."""

    def __init__(self, model: SentenceTransformer, prompt: str | None) -> None:
        self.tokenizer, self.prompt = model.tokenizer, prompt or ""
        config = _encoder_of(model).config
        self.parallel = model.device.type != "cpu" or torch.get_num_threads() > 1
        self.max_length = self.tokenizer.model_max_length
        if config.position_embedding_type != "rotary":  # a table of positions ends
            self.max_length = min(self.max_length, config.max_position_embeddings)

    def batches(self, texts: Sequence[str], batch_tokens: int, first: int) -> list[Batch]:
        """The texts of a window, which are numbered from ``first``, tokenized, in batches.

        Raises:
            ValueError: naming the first text that is no string or holds a lone surrogate.
        """
        _check_texts(texts, first)
        with _turn("tokenizer", os.getpid()):
            encodings = self._tokenize(texts)
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ends = lengths.cumsum()
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64, count=int(lengths.sum()))
        pieces = np.split(ids, ends[:-1])
        return [
            Batch(np.concatenate([pieces[row] for row in rows]), lengths[rows], rows.copy())
            for rows in cut_batches(lengths, batch_tokens)
        ]

    def _tokenize(self, texts: Sequence[str]) -> list[Any]:
        fast = self.tokenizer.backend_tokenizer
        fast.no_padding()  # whoever used the tokenizer last may have left it otherwise
        fast.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        limit = _CHARACTERS_PER_TOKEN * self.max_length
        if fast.pre_tokenizer is None or self.tokenizer.truncation_side != "right":
            limit = sys.maxsize  # what stands far behind may matter
        with contextlib.nullcontext() if self.parallel else _one_thread():
            encodings: list[Any] = fast.encode_batch_fast([self.prompt + _start(text, limit) for text in texts])
        short = [row for row, text in enumerate(texts) if len(text) > limit and len(encodings[row]) < self.max_length]
        while short:  # of a text of long words or much white space, more is needed
            limit *= 4
            again = fast.encode_batch_fast([self.prompt + _start(texts[row], limit) for row in short])
            for row, encoding in zip(short, again, strict=True):
                encodings[row] = encoding
            short = [row for row in short if len(texts[row]) > limit and len(encodings[row]) < self.max_length]
        return encodings


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within, the library tokenizes in one thread: by itself it takes one for every core, also where the process has but one to
    compute with, as when several share a machine. Whoever set its variable is obeyed; only one thread at a time comes here."""
    if _PARALLELISM in os.environ:
        yield
        return
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ.pop(_PARALLELISM, None)


def _start(text: str, limit: int) -> str:
    """``text`` up to the first white space behind ``limit`` characters: a cut inside a word could change its tokens.

    >>> _start("one two three", 5)
    'one two'
    """
    if len(text) <= limit:
        return text
    space = _SPACE.search(text, limit)
    return text[: space.start()] if space else text


def _check_texts(texts: Sequence[str], first: int) -> None:
    for row, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise ValueError(f"Text {row} is {type(text).__name__}, not a string: {shorten(repr(text), 80)}")
        if not is_unicode(text):
            raise ValueError(
                f"Text {row} holds a lone surrogate, which is no character: {shorten(repr(text), 80)}; decode it by the "
                "encoding it was written in, or replace such characters."
            )


def _check_device(device: str) -> None:
    """Refuse a device that this computer, or this PyTorch, does not have, before a model is read for it."""
    try:
        torch.zeros(1, device=device).cpu()  # whatever the kind of device: "meta" takes numbers, but gives none back
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ImportError) as error:
        present = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or [get_device_name()]
        raise ValueError(
            f"device={device!r} cannot be used here; use one of {', '.join(dict.fromkeys(['cpu', *present]))} (--device)."
        ) from error


def _encoder_of(model: SentenceTransformer) -> Any:
    """The transformer that the first module holds."""
    return model[0].auto_model


def _find_prompt(model: SentenceTransformer, prompt: str | None, name: str | None) -> str | None:
    """The prompt that sentence-transformers would put before every text."""
    if prompt is not None:
        return prompt
    if name is not None and name not in model.prompts:
        known = ", ".join(model.prompts) or "none"
        raise ValueError(f"The model has no prompt named {name!r}; it has {known} (--prompt-name).")
    name = name or model.default_prompt_name
    return model.prompts.get(name) if name is not None else None


def _why_not_packed(model: SentenceTransformer, prompt: str | None) -> str | None:
    """What this module cannot compute about ``model``, or ``None``."""
    transformer, *rest = list(model)
    if not isinstance(transformer, Transformer) or not isinstance(transformer.auto_model, MiniBertModel):
        return "the model is no MiniBERT (minibert hub convert makes one of a BERT)"
    config = transformer.auto_model.config
    if not config.unpad_inputs or config._attn_implementation != "sdpa":
        return "its configuration asks for padded inputs or another attention"
    if not transformer.tokenizer.is_fast or transformer.processing_kwargs:
        return "its tokenizer is slow or has options of its own"
    if not rest or not isinstance(rest[0], Pooling) or rest[0].pooling_mode not in ("mean", "cls"):
        return "its pooling is neither mean nor cls"
    if prompt and not rest[0].include_prompt:
        return "its pooling leaves the prompt out"
    if not all(isinstance(module, Normalize) for module in rest[1:]) or model.truncate_dim is not None:
        return "its vectors are changed after the pooling"
    return None
