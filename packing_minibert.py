"""Pack the tokens of a batch without padding, and compute attention within each sequence.

This file is saved with every checkpoint. The letters in shapes are as in modeling_minibert.py.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cache, partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import module as torch_module

from .kernels_minibert import HALF_DTYPES, at_least_float32, eager_attention_forward, is_being_traced, is_transformed

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

# Bytes of the largest activation in the cache of a CPU, for computations without gradients.
_BYTES_AT_ONCE = 2**24
# Mean number of scores per bucket from which half precision is faster in training on a CPU.
_LARGE_SCORES = 2**18
# exp2 attention: fewest scores for which it is faster, and most scores that fit the cache.
_EXP2_SCORES, _SCORES_AT_ONCE = 2**16, 2**21
# exp2 attention: scale of values, so that sums stay finite, and the smallest precise sum.
_ONE, _SMALLEST_SUM = 2.0**-40, 2.0**-100
_CAPABILITIES = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch before 2.8 cannot tell
# torch's attention kernel multiplies small tiles, which only AMX makes fast in bfloat16.
PREFERS_EXP2 = bool(_CAPABILITIES.get("avx512_bf16")) and not _CAPABILITIES.get("amx_bf16", True)


def suits_exp2(query: Tensor) -> bool:
    """Return True if :func:`exp2_attention_forward` is the fastest kernel for ``query``."""
    scores = query.shape[2] ** 2  # of a head
    enough = query.shape[0] * query.shape[1] * scores >= _EXP2_SCORES
    return PREFERS_EXP2 and query.dtype == torch.bfloat16 and enough and scores <= 2 * _SCORES_AT_ONCE and not is_being_traced()


def exp2_attention_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Compute attention with powers of two instead of a softmax: (B, H, L, D) -> (B, L, H, D).

    ``mask`` (B, 1, 1, L) is False for padding. On a CPU, the function takes a third of the time
    of a softmax. It does not support gradients.
    """
    batch, heads, length, width = query.shape
    if heads > 1 and heads * length**2 > _SCORES_AT_ONCE:  # split a long sequence into heads
        masks = mask.expand(-1, heads, -1, -1).unsqueeze(2) if mask is not None else [None] * batch
        rows = zip(query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), masks, strict=True)  # each (H, 1, L, D)
        return torch.stack([exp2_attention_forward(*row, scaling).squeeze(2).transpose(0, 1) for row in rows])
    at_once = max(1, _SCORES_AT_ONCE // (heads * length**2))
    step = -(-batch // -(-batch // at_once))  # sequences in a part; all parts are nearly equal
    padded = rounded(step, bits=3)  # gives few shapes; filler sequences are ignored
    queries, keys = query.new_empty(padded, heads, length, width), query.new_empty(padded, heads, length, width)
    values = value.new_empty(padded, heads, length, width + 1)
    if mask is None:
        values[..., width:] = _ONE
    context = value.new_empty(batch, length, heads, width)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        q, k, v, real = query[part], key[part], value[part], None if mask is None else mask[part]
        count = len(q)
        torch.mul(q, scaling / math.log(2), out=queries[:count])
        keys[:count] = k
        if real is None:
            torch.mul(v, _ONE, out=values[:count, ..., :width])
        else:
            ones = real.transpose(2, 3) * values.new_tensor(_ONE)  # 0 for padding
            torch.mul(v, ones, out=values[:count, ..., :width])
            values[:count, ..., width:] = ones
        weights = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).exp2_()  # (padded * H, L, L)
        sums = torch.bmm(weights, values.flatten(0, 1)).view_as(values)[:count]
        smallest, largest = sums[..., width].aminmax()
        if smallest > _SMALLEST_SUM and largest < math.inf:
            torch.div(sums[..., :width], sums[..., width:], out=context[part].transpose(1, 2))
        else:  # such scores leave the range of the dtype
            context[part] = F.scaled_dot_product_attention(q, k, v, real, scale=scaling).transpose(1, 2)
    return context


@cache
def keep_freed_activations() -> None:
    """Make glibc reuse the memory of freed activations instead of returning it to the system.

    Freeing almost 32 MiB once raises glibc's threshold M_MMAP_THRESHOLD (see mallopt(3)).
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def rounded(count: int, bits: int = 5) -> int:
    """Round ``count`` up to a number with at most ``bits`` significant bits.

    With five bits, the result is at most a sixteenth larger than ``count``. Fewer different
    batch sizes need less memory on a CPU.

    >>> [rounded(count) for count in (7, 31, 33, 1472, 1473, 8000)]
    [7, 31, 34, 1472, 1536, 8192]
    """
    step = 1 << max(0, count.bit_length() - bits)
    return -(-count // step) * step


def bucket_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Group ascending ``lengths`` into buckets of nearly equal lengths.

    If n is the first length of a bucket, the largest possible length is the larger of two
    numbers: n rounded up to a multiple of 16, and n * 9 / 8 rounded down to a multiple of 16.

    >>> bucket_lengths([3, 7, 16, 17, 20, 200, 208, 225, 240, 241])
    [[3, 7, 16], [17, 20], [200, 208], [225, 240], [241]]
    """
    buckets: list[list[int]] = []
    last = 0
    for length in lengths:
        if not length:
            continue
        if not buckets or length < buckets[-1][0] or length > last:
            buckets.append([])
            last = max(-(-length // 16), (length + length // 8) // 16) * 16
        buckets[-1].append(length)
    return buckets


def cut_evenly(lengths: Sequence[int], limit: int) -> list[int]:
    """Return bounds that cut ``lengths`` into the fewest groups with sums of at most ``limit``.

    The sums of the groups are nearly equal. A length above the limit is a group of its own.

    >>> cut_evenly([9, 4, 3, 2, 1], 9)
    [0, 1, 2, 5]
    """
    ends = [0, *accumulate(lengths)]

    def cut(size: int) -> list[int]:
        bounds = [0]
        while bounds[-1] < len(lengths):
            bounds.append(max(bounds[-1] + 1, bisect_right(ends, ends[bounds[-1]] + size) - 1))
        return bounds

    fullest = cut(limit)
    if len(fullest) <= 2:
        return fullest
    sizes = range(min(limit, ends[-1] // (len(fullest) - 1)), limit + 1)
    return cut(sizes[bisect_left(sizes, True, key=lambda size: len(cut(size)) <= len(fullest))])


_arange = partial(torch.arange, device="cpu")  # torch's default device may be another


class PadRows(torch.autograd.Function):
    """Copy the rows of a packed tensor into a padded tensor: (T, …) -> (P, …).

    Row p of the result is ``rows[source_index[p]]``. ``padded_index`` (T,) lists rows of the
    result that are not padding. The backward pass ignores the gradients of padding.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, padded_index: Tensor, source_index: Tensor) -> Tensor:
        ctx.save_for_backward(padded_index)
        return rows.index_select(0, source_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class UnpadRows(torch.autograd.Function):
    """Select the rows ``padded_index`` (T,) of a padded tensor: (P, …) -> (T, …).

    ``padded_index`` must not contain a row twice, or the gradients are wrong.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, padded_index: Tensor) -> Tensor:
        ctx.save_for_backward(padded_index)
        ctx.size = len(rows)
        return rows.index_select(0, padded_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (padded_index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, padded_index, grad), None


class Packing:
    """Store which rows of a flattened (B * L) batch are real tokens, and compute attention.

    Args:
        lengths: length of every sequence, in the order of ``indices``. Empty on a GPU.
        indices: (T,) rows of the batch that are real tokens. None means all rows, in order.
        cu_seqlens: (sequences + 1,) int32 bounds of the sequences, for GPU kernels.
        max_length: length of the longest sequence, for GPU kernels.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (),
        indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
    ) -> None:
        self.lengths, self.indices, self.cu_seqlens, self.max_length = lengths, indices, cu_seqlens, max_length
        self.num_filler_tokens = rounded(sum(lengths)) - sum(lengths)  # they form a last sequence that is ignored
        buckets = [*bucket_lengths(lengths), *([[self.num_filler_tokens]] if self.num_filler_tokens else [])]
        equal = all(bucket[0] == bucket[-1] for bucket in buckets)
        # (sequences, padded length) of each bucket, for one attention call. In half precision,
        # lengths that are not a multiple of 16 take up to twice the time.
        self.buckets = [(len(bucket), bucket[-1] if equal else -(-bucket[-1] // 16) * 16) for bucket in buckets]
        self.masks: list[Tensor | None] = [None] * len(buckets)  # (sequences, 1, 1, length), False for padding
        self.padded_index: Tensor | None = None  # see PadRows; None if no bucket has padding
        self.source_index: Tensor | None = None
        if not equal:
            pairs = zip(buckets, self.buckets, strict=True)
            real = [_arange(length) < torch.tensor(bucket, device="cpu")[:, None] for bucket, (_, length) in pairs]
            flat = torch.cat([mask.flatten() for mask in real])
            self.padded_index = flat.nonzero().squeeze(1)
            self.source_index = (flat.cumsum(0) - 1) * flat
            self.masks = [None if mask.all() else mask[:, None, None] for mask in real]

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> "Packing":
        """Build a packing of concatenated sequences on a CPU. Sorted ``lengths`` save time."""
        return cls(lengths)

    @classmethod
    def of_mask(cls, mask: Tensor | None, batch: int, length: int, device: torch.device) -> "Packing":
        """Build a packing of the tokens for which ``mask`` is True. None means all tokens."""
        if device.type != "cpu":
            if mask is None:
                bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
                return cls(cu_seqlens=bounds, max_length=length)
            bounds = F.pad(mask.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
            indices = mask.flatten().nonzero().squeeze(1)  # a synchronisation, which sizes need
            return cls(indices=indices, cu_seqlens=bounds, max_length=length)
        if mask is None or bool(mask.all()):
            return cls([length] * batch)
        lengths = mask.sum(dim=1)
        order = torch.argsort(lengths, stable=True)  # so that sequences of nearly equal length are neighbours
        positions = mask[order].flatten().nonzero().squeeze(1)
        return cls(lengths[order].tolist(), order[positions // length] * length + positions % length)

    @classmethod
    def of_cu_seqlens(cls, cu_seqlens: Tensor, max_length: int) -> "Packing":
        """Build a packing of the sequences between the bounds ``cu_seqlens`` in one row."""
        if cu_seqlens.device.type != "cpu":
            return cls(cu_seqlens=cu_seqlens, max_length=max_length)
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        if order == list(range(len(lengths))):
            return cls(lengths)
        return cls([lengths[i] for i in order], torch.cat([_arange(bounds[i], bounds[i + 1]) for i in order]))

    def blocks(self, tokens: int) -> "list[Packing]":
        """Return smaller packings of at most ``tokens`` tokens, or of one longer sequence."""
        bounds = cut_evenly(self.lengths, tokens)
        if len(bounds) <= 2:
            return [self]
        blocks = [self.lengths[start:end] for start, end in pairwise(bounds)]
        indices = _arange(sum(self.lengths)) if self.indices is None else self.indices
        parts = zip(blocks, indices.split([sum(block) for block in blocks]), strict=True)
        return [Packing(block, rows) for block, rows in parts]

    def pack(self, tensor: Tensor) -> Tensor:
        """Select the rows of real tokens, and append rows of zeros: (B, L, …) -> (T, …)."""
        flat = tensor.flatten(0, 1)
        flat = flat if self.indices is None else flat[self.indices]
        fillers = self.num_filler_tokens
        return torch.cat([flat, flat.new_zeros(fillers, *flat.shape[1:])]) if fillers else flat

    def unpack(self, tensor: Tensor, padded: Tensor | None) -> Tensor:
        """Undo :meth:`pack`. If ``padded`` (B * L, C) is given, write the result into it."""
        tensor = tensor[: len(tensor) - self.num_filler_tokens]
        if padded is None:
            return tensor
        assert self.indices is not None
        place = padded.index_copy if tensor.requires_grad else padded.index_copy_
        return place(0, self.indices, tensor)

    def kernel_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of transformers' variable-length attention functions."""
        bounds, longest = self.cu_seqlens, self.max_length
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        """Compute attention within every sequence: (T, H, D) -> (T, H, D)."""
        if self.cu_seqlens is None:
            if not torch.is_autocast_enabled("cpu"):
                return self._attend_buckets(query, key, value, dropout, scaling)
            with torch.autocast("cpu", enabled=False):  # the queries have its dtype already
                return self._attend_buckets(query, key, value, dropout, scaling)
        if varlen_attn is not None and query.dtype in HALF_DTYPES and dropout == 0.0:
            bounds, longest = self.cu_seqlens, self.max_length
            query, key, value = (x.contiguous() for x in (query, key, value))
            return varlen_attn(query, key, value, bounds, bounds, longest, longest)  # type: ignore
        return self._attend_padded(query, key, value, dropout, scaling)

    def _attend_buckets(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        # torch's CPU kernel has no dropout, and a slow backward in half precision.
        dtype, training = query.dtype, torch.is_grad_enabled() and query.requires_grad
        eager = dropout > 0.0
        if training:
            scores = query.shape[1] * sum(count * length**2 for count, length in self.buckets)
            if dtype in HALF_DTYPES and scores >= _LARGE_SCORES * len(self.buckets):
                eager = True
            else:
                query, key, value = at_least_float32(query), at_least_float32(key), at_least_float32(value)

        def attend_bucket(bucket: tuple[int, int], mask: Tensor | None, *qkv: Tensor) -> Tensor:
            q, k, v = (x.view(*bucket, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (count, H, length, D)
            if eager:
                bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
                context, _ = eager_attention_forward(None, q, k, v, bias, scaling, dropout=dropout)
            elif not training and suits_exp2(q):
                context = exp2_attention_forward(q, k, v, mask, scaling)
            else:
                context = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2)
            return context.flatten(0, 1)  # (count * length, H, D)

        if self.padded_index is not None:
            query, key, value = (PadRows.apply(x, self.padded_index, self.source_index) for x in (query, key, value))
        if len(self.buckets) == 1:
            context = attend_bucket(self.buckets[0], self.masks[0], query, key, value)
        else:
            # The backward of split is one concatenation. Slices would add full-size gradients.
            sizes = [count * length for count, length in self.buckets]
            parts = list(zip(self.buckets, self.masks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True))
            fillers = [parts.pop()[4]] if self.num_filler_tokens else []  # any rows will do
            contexts = [attend_bucket(*part) for part in parts] + fillers
            context = torch.cat(contexts) if contexts else query
        return (context if self.padded_index is None else UnpadRows.apply(context, self.padded_index)).to(dtype)

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        """Compute attention with padding, for inputs that the GPU kernel does not support."""
        assert self.cu_seqlens is not None and self.max_length is not None
        positions = torch.arange(self.max_length, device=query.device)
        mask = positions < self.cu_seqlens.diff()[:, None]  # (sequences, longest)
        rows = (self.cu_seqlens[:-1, None] + positions).clamp_(max=query.shape[0] - 1)
        q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))  # (sequences, H, longest, D)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], dropout_p=dropout, scale=scaling)
        return context.transpose(1, 2)[mask]


def is_watched(model: Any) -> bool:
    """Return True if a user's hook is registered on the embeddings, a layer or a submodule."""
    watched = chain(model.embeddings.modules(), model.layers.modules())
    found = [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
    hooks = found + [hook for m in watched for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks.values()]
    # Hooks of libraries, such as FSDP's, do not depend on the shape of the states.
    modules = (str(getattr(getattr(hook, "func", hook), "__module__", "")).partition(".")[0] for hook in hooks)
    return any(name not in ("torch", "transformers", "accelerate", "peft") for name in modules)


def pack_batch(
    model: Any, inputs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_length: int | None, options: dict[str, Any]
) -> Packing | None:
    """Return the packing for a batch, or None if padding tokens must be computed too."""
    config = model.config
    records = any(options.get(name, getattr(config, name, False)) for name in ("output_attentions", "output_hidden_states"))
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(inputs) or is_watched(model)
    implementation = config._attn_implementation
    has_kernel = implementation == "sdpa" or ("flash" in implementation and inputs.device.type != "cpu")
    ready_mask = mask is not None and mask.dim() != 2
    if not config.unpad_inputs or not has_kernel or records or tracing or ready_mask:
        return None
    if cu_seqlens is not None:
        return Packing.of_cu_seqlens(cu_seqlens, int(max_length or cu_seqlens.diff().max()))
    batch, length = inputs.shape[:2]
    return Packing.of_mask(None if mask is None else mask.bool(), batch, length, inputs.device)


def packed_forward(
    model: Any, packing: Packing, given: tuple[Tensor | None, ...], batch: int, length: int, **kw: Any
) -> Tensor:
    """Encode a batch without padding tokens, and return padded hidden states (B, L, C)."""
    keep_freed_activations()
    # In training mode, blocks would draw other dropout masks than a pass with gradients.
    at_once = torch.is_grad_enabled() or model.training or packing.cu_seqlens is not None
    row = model.config.intermediate_size * model.dtype.itemsize
    blocks = [packing] if at_once else packing.blocks(1 << max(1, _BYTES_AT_ONCE // row).bit_length() - 1)
    in_place = len(blocks) == 1 and packing.indices is None
    padded: Tensor | None = None
    for block in blocks:
        packed = (None if x is None else block.pack(x.expand(batch, *x.shape[1:])) for x in given)
        states = model.encode_tokens(*packed, packing=block, **kw)
        if padded is None and not in_place:
            padded = states.new_zeros(batch * length, states.shape[-1])
        padded = block.unpack(states, padded)
    assert padded is not None
    return padded.view(batch, length, -1)
