"""The MiniBERT encoder and its heads: all of the architecture, read from top to bottom.

This file travels with every checkpoint, next to ``configuration_minibert.py``, and works without the minibert package.

Letters in shape comments: B batch, L length (padded), T real tokens of the whole batch, C hidden width, H heads,
D head width, V vocabulary. A tensor of shape (…, C) is either (B, L, C), padded, or (T, C), packed: every block below
works on both, and only attention needs to know which tokens belong together.

A first reading may go from here to "positions", "blocks" and "model", and come back to "products" and "dropout and attention"
for how a CPU computes them fast, and to "packing" for how padding is left out.
"""

import math
import platform
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init
from transformers.activations import ACT2FN, GELUActivation
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_minibert import MiniBertConfig

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]


def wide(tensor: Tensor) -> Tensor:
    """At least float32: norms, softmax and the residual stream lose too much in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


# -------------------------------------------------------------------------------------------------------- products


def onednn_dtypes() -> frozenset[torch.dtype]:
    """Dtypes that oneDNN multiplies in on this processor, with bias and GELU in the same call."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    half = (dtype for dtype, name in asked.items() if getattr(torch.ops.mkldnn, name, bool)())
    return frozenset([torch.float32, *half])


ONEDNN_DTYPES = onednn_dtypes()


def by_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """(…, in) -> (…, out): the product by oneDNN's own call. ``weight`` may be laid out for it."""
    after, form = ("gelu", "none") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, after, [], form)
    return product


@cache
def product_rates() -> dict[str, float]:
    """Billion operations per second of a product of a thousand rows on this CPU (of few, laying out the matrix would count), as
    torch multiplies in ``float32`` and ``bfloat16``, and as oneDNN does in float32 (``onednn``): the fastest of several in
    turns, timed once in a process, which takes some tens of milliseconds.

    What a processor has instructions for does not tell: an Intel Xeon whose host keeps AMX to itself has those for bfloat16,
    and takes twice as long with them as in float32. Nor is MKL, by which torch multiplies in float32, made for every maker's.
    """
    rows, width = 1024, 384
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        states, weight = (torch.ones(size, width, dtype=torch.float32, device="cpu") for size in (rows, width))
        half_states, half_weight = states.bfloat16(), weight.bfloat16()
        ways: dict[str, Callable[[], Tensor]] = {
            "float32": lambda: F.linear(states, weight),
            "bfloat16": lambda: F.linear(half_states, half_weight),
        }
        if torch.float32 in ONEDNN_DTYPES:
            ways["onednn"] = lambda: by_onednn(states, weight, None)
        seconds = dict.fromkeys(ways, math.inf)
        for _ in range(5):  # the first of which prepares
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {name: 2e-9 * rows * width**2 / took for name, took in seconds.items()}


def bfloat16_pays() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32, and by enough to give digits for it."""
    rates = product_rates()
    return rates["bfloat16"] > 1.25 * max(rates["float32"], rates.get("onednn", 0.0))


def onednn_pays() -> bool:
    """Whether oneDNN is so much faster in float32 that every process finds it so: the two round differently. Otherwise torch
    keeps its own products, which need no kernel for each number of rows."""
    rates = product_rates()
    return rates.get("onednn", 0.0) > 1.3 * rates["float32"]


def is_watched() -> bool:
    """Whether something follows every operation: a compiler, a trace, or a mode such as a counter of operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def is_plain(linear: nn.Linear) -> bool:
    """Whether ``linear`` is a matrix and a bias of a CPU that want no gradients, and nothing else: not quantized, adapted,
    hooked, offloaded or watched. Then :func:`multiply` may leave the module aside."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not (linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))
        and not is_watched()
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products with ``weight`` are computed in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


# Rows from which it matters how a CPU multiplies them: fewer take what reading, or widening, the matrix takes.
_MANY_ROWS = 64


def in_float32(linear: nn.Linear, inputs: Tensor) -> bool:
    """Whether ``inputs`` are multiplied in float32 though the matrix is kept in bfloat16: faster here, and more exact."""
    return (
        linear.weight.dtype == torch.bfloat16
        and is_plain(linear)  # before shapes are looked at, which would bind what is compiled to them
        and inputs.numel() >= _MANY_ROWS * inputs.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not bfloat16_pays()
    )


def narrow(tensor: Tensor, linear: nn.Linear) -> Tensor:
    """The dtype that ``linear`` multiplies in, so that a bfloat16 matrix meets bfloat16 inputs. Under autocast it is cast
    here once for all the layers that read it, where autocast would cast it for each."""
    weight = linear.weight  # a quantized layer keeps integers, or a method of this name, and takes what it gets
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return tensor
    return wide(tensor) if in_float32(linear, tensor) else tensor.to(compute_dtype(weight))


def multiply(linear: nn.Linear, states: Tensor, act: nn.Module | None = None) -> Tensor:
    """(…, in) -> (…, out): ``linear``, in the dtype that :func:`narrow` finds, and the activation after it. In half precision a
    CPU without gradients takes a sixth less time where that is GELU: ``nn.Linear`` writes its bias into every row before the
    product."""
    inputs = narrow(states, linear)
    if not is_plain(linear) or type(inputs) is not Tensor:
        return linear(inputs) if act is None else act(linear(inputs))
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    dtype = inputs.dtype
    if dtype == torch.float32:
        weight, bias = wide(weight), None if bias is None else wide(bias)
        direct = inputs.numel() >= _MANY_ROWS * inputs.shape[-1] and onednn_pays()
    else:
        direct = dtype in ONEDNN_DTYPES and dtype == weight.dtype  # under autocast it is not
    if not direct:
        product = F.linear(inputs, weight, bias)
        return product if act is None else act(product)
    fused = type(act) is GELUActivation and not (act._forward_hooks or act._forward_pre_hooks)
    product = by_onednn(inputs, weight, bias, gelu=fused)
    return product if act is None or fused else act(product)


def add(hidden_states: Tensor, update: Tensor) -> Tensor:
    """Their sum in float32: a CPU takes twice as long to add tensors of two dtypes as to widen one first."""
    return hidden_states + update if update.dtype == hidden_states.dtype else update.to(hidden_states.dtype).add_(hidden_states)


# ------------------------------------------------------------------------------------------- dropout and attention


def drop(states: Tensor, probability: float) -> Tensor:
    """Dropout, which on the CPU draws 16 random bits per element: torch draws a whole number each, one after another (see
    ``benchmarks/pieces.py``). The probability is rounded to a multiple of 2**-16."""
    if probability == 0.0 or states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(states, probability)
    dropped = round(probability * 2**16)
    words = torch.empty((states.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: states.numel()] >= dropped - 2**15
    return states * keep.view(states.shape).to(states.dtype).mul_(2**16 / (2**16 - dropped))


class MiniBertDropout(nn.Dropout):
    """:func:`drop` as a module."""

    def forward(self, states: Tensor) -> Tensor:
        return drop(states, self.p) if self.training else states


def eager_attention_forward(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out: three (B, H, L, D) -> (B, L, H, D) and the weights (B, H, L, L)."""
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = drop(F.softmax(scores, dim=-1).to(query.dtype), dropout)  # summed in float32 whatever the dtype
    return (weights @ value).transpose(1, 2).contiguous(), weights


# Whether the processor lacks AMX (torch before 2.8 cannot tell), which the small products of torch's attention kernel want.
WITHOUT_AMX = hasattr(torch.cpu, "get_capabilities") and not torch.cpu.get_capabilities().get("amx_bf16", True)
# Fewest scores for which whole products are faster, and most at once, which stay in the cache: of 2**24 each may take twice as
# long.
_WHOLE_SCORES, _SCORES_AT_ONCE = 2**16, 2**21
# What stands for 1 there, so that sums of powers up to 2**127 stay finite, and how small they may be to keep their digits.
_ONE, _SMALLEST_SUM = 2.0**-40, 2.0**-100


def whole_products_pay() -> bool:
    """Whether large products make attention in bfloat16 faster than torch's kernel, whose products are small ones."""
    return WITHOUT_AMX and bfloat16_pays()


def in_whole_products(query: Tensor) -> bool:
    """Whether :func:`whole_attention_forward` is the fastest for queries (B, H, L, D) on this processor."""
    scores = query.shape[2] ** 2  # of a head
    enough = query.shape[0] * query.shape[1] * scores >= _WHOLE_SCORES
    suited = query.dtype == torch.bfloat16 and enough and scores <= 2 * _SCORES_AT_ONCE
    return suited and not is_watched() and whole_products_pay()


def whole_attention_forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention spelled out for a CPU without gradients, as many sequences at a time as the cache holds scores of: three
    (B, H, L, D), and a mask (B, 1, 1, L), False for padding -> (B, L, H, D).

    The softmax is left to the second product: powers of two of the scores multiply the values and a column of ones, whose
    product is what they sum to. That takes a third of the time of a softmax, and padding costs nothing: its values are zero.
    """
    batch, heads, length, width = query.shape
    if heads > 1 and heads * length**2 > _SCORES_AT_ONCE:  # a long sequence is as many of one head
        alone = mask.expand(-1, heads, -1, -1).unsqueeze(2) if mask is not None else [None] * batch
        rows = zip(query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), alone, strict=True)  # each (H, 1, L, D)
        return torch.stack([whole_attention_forward(*row, scaling).squeeze(2).transpose(0, 1) for row in rows])
    at_once = max(1, _SCORES_AT_ONCE // (heads * length**2))
    step = -(-batch // -(-batch // at_once))  # sequences in a part, all of them nearly equal
    padded = rounded(step, bits=3)  # few shapes; what the last sequences hold does not matter
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
            ones = real.transpose(2, 3) * values.new_tensor(_ONE)  # and 0 for padding
            torch.mul(v, ones, out=values[:count, ..., :width])
            values[:count, ..., width:] = ones
        weights = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).exp2_()  # (padded * H, L, L)
        sums = torch.bmm(weights, values.flatten(0, 1)).view_as(values)[:count]
        smallest, largest = sums[..., width].aminmax()
        if smallest > _SMALLEST_SUM and largest < math.inf:
            torch.div(sums[..., :width], sums[..., width:], out=context[part].transpose(1, 2))
        else:  # such scores are no powers of two in these numbers
            context[part] = F.scaled_dot_product_attention(q, k, v, real, scale=scaling).transpose(1, 2)
    return context


# --------------------------------------------------------------------------------------------------------- packing


# Bytes of the largest activation that a CPU computes at once where no gradients are kept: more leaves the cache.
_BYTES_AT_ONCE = 2**24
# glibc gives every freed block above its largest so far (up to 32 MiB) back to the system, and keeps smaller ones: freeing one
# of almost that size, which is never touched, keeps activations from being mapped anew at each layer (mallopt(3)).
torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
# Attention scores per run of sequences, on average, from which half precision is the faster on a CPU.
_LARGE_SCORES = 2**18


def rounded(count: int, bits: int = 5) -> int:
    """The next number with at most so many significant bits: with five, at most a sixteenth larger.

    On a CPU, GELU and the products in half precision are compiled for every number of rows and kept, among memory that is
    freed all the time and then cannot be given back: batches of ever new sizes are better rounded up to few.

    >>> [rounded(count) for count in (7, 31, 33, 1472, 1473, 8000)]
    [7, 31, 34, 1472, 1536, 8192]
    """
    step = 1 << max(0, count.bit_length() - bits)
    return -(-count // step) * step


def runs_of(lengths: Sequence[int]) -> list[list[int]]:
    """Runs of nearly equal ``lengths`` (ascending): up to the next multiple of 16 of the first of the run, or, of long ones, up
    to the last multiple of 16 that is at most an eighth longer.

    >>> runs_of([3, 7, 16, 17, 20, 200, 208, 225, 240, 241])
    [[3, 7, 16], [17, 20], [200, 208], [225, 240], [241]]
    """
    runs: list[list[int]] = []
    last = 0
    for length in lengths:
        if not length:
            continue
        if not runs or length < runs[-1][0] or length > last:
            runs.append([])
            last = max(-(-length // 16), (length + length // 8) // 16) * 16
        runs[-1].append(length)
    return runs


def cut_evenly(lengths: Sequence[int], limit: int) -> list[int]:
    """Bounds of groups of neighbouring ``lengths`` of at most ``limit`` in sum (but at least one), as few as that allows and of
    nearly equal sums: a small last one would cost almost what a full one does, and on a CPU more kernels.

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


class Spread(torch.autograd.Function):
    """Rows (T, …) to their places ``slots`` (T,) in a larger tensor (P, …): its row p is row ``sources[p]``. Whatever stands
    at the other places must not matter: their gradient is dropped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class Collect(torch.autograd.Function):
    """The rows at ``slots`` (T,), each named once: (P, …) -> (T, …). Its backward writes rows where that of indexing adds."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = len(rows)
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, slots, grad), None


class Packing:
    """Which rows of a flattened (B * L) batch are real tokens, and how to attend among them.

    Args:
        indices: (T,) rows of the flattened batch, sequence after sequence; None when every row is real and in place.
        lengths: number of tokens of every sequence, in packed order, as Python numbers; None when ``cu_seqlens`` rules.
            Rows without a meaning follow, ``extra`` of them, up to a :func:`rounded` number of rows.
        cu_seqlens: (sequences + 1,) int32 bounds of the sequences, for variable-length kernels.
        max_length: tokens of the longest sequence.
    """

    def __init__(self, indices: Tensor | None, lengths: Sequence[int] | None, cu_seqlens: Tensor | None, max_length: int):
        self.indices, self.cu_seqlens, self.max_length = indices, cu_seqlens, max_length
        self.lengths = lengths = lengths or []
        self.extra = rounded(sum(lengths)) - sum(lengths)
        # (sequences, length to pad to) of every run of nearly equal lengths: a run shares one attention call
        runs = [*runs_of(lengths), *([[self.extra]] if self.extra else [])]
        equal = all(run[0] == run[-1] for run in runs)
        # In half precision torch's attention takes up to twice the time for lengths that are no multiple of 16.
        self.runs = [(len(run), run[-1] if equal else -(-run[-1] // 16) * 16) for run in runs]
        self.masks: list[Tensor | None] = [None] * len(runs)  # (sequences, 1, 1, length), False where a shorter one has ended
        self.slots: Tensor | None = None  # (T,) places of the tokens when every run is padded
        self.sources: Tensor | None = None  # (padded T,) token that stands at each place, 0 for padding
        if not equal:
            real = [torch.arange(length) < torch.tensor(run)[:, None] for run, (_, length) in zip(runs, self.runs, strict=True)]
            places = torch.cat([one.flatten() for one in real])
            self.slots = places.nonzero().squeeze(1)
            self.sources = (places.cumsum(0) - 1) * places
            self.masks = [None if one.all() else one[:, None, None] for one in real]

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, batch: int, length: int, device: torch.device) -> "Packing":
        """Pack the True positions of a (B, L) mask; None means that all are real."""
        if device.type != "cpu":
            if attention_mask is None:
                return cls(None, None, torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device), length)
            bounds = F.pad(attention_mask.sum(dim=1).cumsum(0, dtype=torch.int32), (1, 0))
            indices = attention_mask.flatten().nonzero().squeeze(1)  # the only synchronisation of the forward pass
            return cls(indices, None, bounds, length)
        if attention_mask is None or bool(attention_mask.all()):
            return cls(None, [length] * batch, None, length)
        seqlens = attention_mask.sum(dim=1)
        # On a CPU sequences of nearly equal length share one attention call, so they are packed in order of length.
        order = torch.argsort(seqlens, stable=True)
        slots = attention_mask[order].flatten().nonzero().squeeze(1)
        indices = order[slots // length] * length + slots % length
        return cls(indices, seqlens[order].tolist(), None, length)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_length: int) -> "Packing":
        """Packed ecosystem input: one row that holds the sequences between the bounds ``cu_seqlens``."""
        if cu_seqlens.device.type != "cpu":
            return cls(None, None, cu_seqlens, max_length)
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        indices = None  # of rows that are in place
        if order != list(range(len(lengths))):
            indices = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in order])
        return cls(indices, [lengths[i] for i in order], None, max_length)

    def blocks(self, tokens: int) -> "list[Packing]":
        """The same sequences in blocks of at most so many tokens, nearly equal; a longer sequence is a block of its own."""
        bounds = cut_evenly(self.lengths, tokens)
        if len(bounds) <= 2:
            return [self]
        blocks = [self.lengths[start:end] for start, end in pairwise(bounds)]
        indices = torch.arange(sum(self.lengths)) if self.indices is None else self.indices
        parts = zip(blocks, indices.split([sum(block) for block in blocks]), strict=True)
        return [Packing(rows, block, None, block[-1]) for block, rows in parts]

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, L, …) -> (T, …), with the extra rows zero."""
        flat = tensor.flatten(0, 1)
        flat = flat if self.indices is None else flat[self.indices]
        return torch.cat([flat, flat.new_zeros(self.extra, *flat.shape[1:])]) if self.extra else flat

    def unpack(self, tensor: Tensor, padded: Tensor | None) -> Tensor:
        """Write the real rows of (T, C) to their places in ``padded`` (B * L, C); without it every row is in place."""
        tensor = tensor[: len(tensor) - self.extra]
        if padded is None:
            return tensor
        assert self.indices is not None
        place = padded.index_copy if tensor.requires_grad else padded.index_copy_
        return place(0, self.indices, tensor)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        """Attention of every sequence with itself: three (T, H, D) -> (T, H, D)."""
        if self.cu_seqlens is None:
            if not torch.is_autocast_enabled("cpu"):
                return self._attend_runs(query, key, value, dropout, scaling)
            with torch.autocast("cpu", enabled=False):  # whose dtype is that of the queries already
                return self._attend_runs(query, key, value, dropout, scaling)
        half = query.dtype in (torch.bfloat16, torch.float16)
        if varlen_attn is not None and half and dropout == 0.0:
            bounds, longest = self.cu_seqlens, self.max_length
            query, key, value = (x.contiguous() for x in (query, key, value))
            return varlen_attn(query, key, value, bounds, bounds, longest, longest)  # type: ignore[return-value]
        return self._attend_padded(query, key, value, dropout, scaling)

    def _attend_runs(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        # torch's CPU kernel has no dropout, and its backward is slow in half precision. Spelled out, large products are
        # fastest in half precision and small ones in float32 (see benchmarks/pieces.py).
        dtype, training = query.dtype, torch.is_grad_enabled() and query.requires_grad
        spelled_out = dropout > 0.0
        if training:
            scores = query.shape[1] * sum(count * length**2 for count, length in self.runs)
            if dtype in (torch.bfloat16, torch.float16) and scores >= _LARGE_SCORES * len(self.runs):
                spelled_out = True
            else:
                query, key, value = wide(query), wide(key), wide(value)

        def attend_run(run: tuple[int, int], mask: Tensor | None, *qkv: Tensor) -> Tensor:
            q, k, v = (x.view(*run, *x.shape[1:]).transpose(1, 2) for x in qkv)  # (count, H, length, D)
            if spelled_out:
                bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(q.dtype)
                context, _ = eager_attention_forward(None, q, k, v, bias, scaling, dropout)  # (count, length, H, D)
            elif not training and in_whole_products(q):
                context = whole_attention_forward(q, k, v, mask, scaling)
            else:
                context = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2)
            return context.flatten(0, 1)  # (count * length, H, D)

        if self.slots is not None:
            query, key, value = (Spread.apply(x, self.slots, self.sources) for x in (query, key, value))
        if len(self.runs) == 1:
            context = attend_run(self.runs[0], self.masks[0], query, key, value)
        elif self.runs:
            # One split per tensor: its backward is one concatenation, where slices would each add into a full-size gradient.
            sizes = [count * length for count, length in self.runs]
            parts = list(zip(self.runs, self.masks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True))
            rest = [parts.pop()[4]] if self.extra else []  # anything will do for rows without a meaning
            context = torch.cat([attend_run(*part) for part in parts] + rest)
        else:
            context = query
        return (context if self.slots is None else Collect.apply(context, self.slots)).to(dtype)

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float) -> Tensor:
        """For devices whose variable-length kernel lacks this dtype or dropout: pad inside attention only."""
        assert self.cu_seqlens is not None
        seqlens = self.cu_seqlens.diff()
        slots = torch.arange(self.max_length, device=query.device)
        mask = slots < seqlens[:, None]  # (n, longest)
        rows = (self.cu_seqlens[:-1, None] + slots).clamp_(max=query.shape[0] - 1)
        query, key, value = (x[rows].transpose(1, 2) for x in (query, key, value))  # (n, H, longest, D)
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None], dropout_p=dropout, scale=scaling
        )
        return context.transpose(1, 2)[mask]


# ------------------------------------------------------------------------------------------------------- positions


def sinusoidal_table(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """(length, width) sines and cosines of Vaswani et al. 2017, section 3.5, interleaved."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * frequencies  # (length, ceil(width / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of Su et al. 2021, each (…, 1, D) for positions of shape (…)."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device) / head_dim
    angles = position_ids[..., None].float() * theta**-exponents  # (…, D / 2)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D / 2) of (…, H, D) by its position's angle, in float32."""
    first, second = states.float().chunk(2, dim=-1)
    turned = states.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(states.dtype)


# ---------------------------------------------------------------------------------------------------------- blocks


class MiniBertLayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the dtype of its parameters."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.layer_norm(wide(hidden_states), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


class MiniBertEmbeddings(nn.Module):
    """Words, positions and segments, summed in float32."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        if config.type_vocab_size > 0:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        normed = config.norm_position == "post" or config.norm_embeddings
        self.norm = MiniBertLayerNorm(width, eps=config.layer_norm_eps) if normed else nn.Identity()
        self.dropout = MiniBertDropout(config.hidden_dropout_prob)
        self.position_embedding_type = config.position_embedding_type
        self.max_positions = config.max_position_embeddings
        self.scale = math.sqrt(width) if config.scale_embeddings else None

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        """Ids of shape (…), or ``inputs_embeds`` (…, C) in place of the word vectors -> (…, C)."""
        states = wide(self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        if self.scale is not None:
            states = states * self.scale
        if hasattr(self, "token_type_embeddings"):
            if token_type_ids is None:
                states = states + self.token_type_embeddings.weight[0]
            else:
                states = states + self.token_type_embeddings(token_type_ids)
        if self.position_embedding_type == "learned":
            states = states + self.position_embeddings(position_ids)
        elif self.position_embedding_type == "sinusoidal":
            # Refilled at every call: a stored table would lose its digits when the model is cast to half precision.
            table = sinusoidal_table(self.max_positions, states.shape[-1], states.device)
            states = states + F.embedding(position_ids, table)
        return self.dropout(self.norm(states))


class MiniBertAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False  # read by transformers' attention functions
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packing: Packing | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (x.view(shape) for x in self.project(hidden_states))  # (…, H, D)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        dropout = self.dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        if packing is not None and implementation == "sdpa":
            context, weights = packing.attend(query, key, value, dropout, self.scaling), None
        else:
            if packing is not None:  # a variable-length kernel of transformers: one row that holds all sequences
                query, key, value = query[None], key[None], value[None]
                bounds, longest = packing.cu_seqlens, packing.max_length
                kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, L, D)
            context, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        context = context.reshape(hidden_states.shape)
        return multiply(self.output, context), weights

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """(…, C) -> queries, keys and values of all heads, three (…, C)."""
        inputs = narrow(hidden_states, self.query)  # once for all three
        return tuple(multiply(linear, inputs) for linear in (self.query, self.key, self.value))


class MiniBertMLP(nn.Module):
    """Two projections around an activation, optionally gated."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size) if config.gated_mlp else None
        self.act = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inputs = narrow(hidden_states, self.up)
        if self.gate is None:
            inner = multiply(self.up, inputs, self.act)
        else:
            inner = multiply(self.gate, inputs, self.act) * multiply(self.up, inputs)
        return multiply(self.down, inner)


class MiniBertLayer(GradientCheckpointingLayer):
    """Attention and MLP, each around a residual sum, with the norm after the sum or before the block."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.attention = MiniBertAttention(config)
        self.attention_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MiniBertMLP(config)
        self.mlp_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = MiniBertDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.norm_first:
            update, _ = self.attention(self.attention_norm(hidden_states), attention_mask, **kwargs)
            hidden_states = add(hidden_states, self.dropout(update))
            return add(hidden_states, self.dropout(self.mlp(self.mlp_norm(hidden_states))))
        update, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.attention_norm(add(hidden_states, self.dropout(update)))
        return self.mlp_norm(add(hidden_states, self.dropout(self.mlp(hidden_states))))


class MiniBertPooler(nn.Module):
    """One vector per text, (B, L, C) -> (B, C): the first or the mean real token, then a dense layer and tanh or ReLU."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.pooling = config.pooling
        self.act = ACT2FN[config.pooler_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None or attention_mask.dim() != 2:
            pooled = hidden_states[:, 0] if self.pooling == "cls" else hidden_states.mean(dim=1)
        elif self.pooling == "cls":
            first = attention_mask.long().argmax(dim=1)  # not always 0: padding may be on the left
            pooled = hidden_states[torch.arange(first.shape[0], device=first.device), first]
        else:
            mask = attention_mask.to(hidden_states.dtype).unsqueeze(-1)  # (B, L, 1)
            pooled = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return wide(multiply(self.dense, pooled, self.act))


# ----------------------------------------------------------------------------------------------------------- model


class MiniBertPreTrainedModel(PreTrainedModel):
    """What every MiniBERT class shares with transformers: loading, initialisation, capabilities."""

    config_class = MiniBertConfig
    base_model_prefix = "minibert"
    # Saved folders carry the code files (and, from the configuration, the map of all classes), so that they load
    # with trust_remote_code=True where the package is not installed.
    _auto_class = "AutoModel"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MiniBertEmbeddings", "MiniBertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": MiniBertLayer, "attentions": MiniBertAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # Linear, Embedding and LayerNorm
        if isinstance(module, MiniBertLMHead):
            init.zeros_(module.bias)


class MiniBertModel(MiniBertPreTrainedModel):
    """The encoder: token ids in, one contextual vector per token out, and one pooled vector per text."""

    def __init__(self, config: MiniBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = MiniBertEmbeddings(config)
        self.layers = nn.ModuleList([MiniBertLayer(config) for _ in range(config.num_hidden_layers)])
        norm_last = config.norm_position == "pre"
        self.final_norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps) if norm_last else nn.Identity()
        self.pooler = MiniBertPooler(config) if add_pooling_layer else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch.

        Args:
            input_ids: (B, L) token ids, or None when ``inputs_embeds`` (B, L, C) takes their place.
            attention_mask: (B, L), 1 for real tokens and 0 for padding, default all real; or a ready (B, 1, L, L) mask.
            token_type_ids: (B, L) segments, default 0.
            position_ids: (B, L) or (1, L), default 0 … L - 1.
            cu_seq_lens_q, max_length_q: bounds and longest length of the sequences packed into a single row (B = 1), as
                transformers' flattening collator gives them.

        Returns:
            ``last_hidden_state`` (B, L, C), float32 also for half-precision weights, and ``pooler_output`` (B, C).
            Rows of padding tokens have no meaning.

        Raises:
            ValueError: both or neither of ids and embeddings; a sequence longer than the positions; an id that is not in
                the vocabulary (checked on the CPU only, where the check is free of synchronisation).
        """
        inputs = self._check_inputs(input_ids, position_ids, inputs_embeds)
        batch, length = inputs.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs.device).unsqueeze(0)
        packing = None
        if self._can_pack(inputs, attention_mask, kwargs):
            if cu_seq_lens_q is not None:
                packing = Packing.from_cu_seqlens(cu_seq_lens_q, int(max_length_q or cu_seq_lens_q.diff().max()))
            else:
                real = None if attention_mask is None else attention_mask.bool()
                packing = Packing.from_mask(real, batch, length, inputs.device)
        given = (input_ids, token_type_ids, position_ids, inputs_embeds)
        if packing is None:
            embedded = self.embeddings(*given)  # (B, L, C)
            mask = self._padded_mask(embedded, attention_mask, cu_seq_lens_q)
            hidden_states = self._layers(embedded, position_ids, mask, **kwargs)
        else:
            hidden_states = self._packed(given, packing, batch, length, **kwargs)
        pooled = self.pooler(hidden_states, attention_mask) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _layers(self, hidden_states: Tensor, position_ids: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Embedded tokens (…, C) through all layers."""
        rotary = None
        if self.config.position_embedding_type == "rotary":
            head_dim = self.config.hidden_size // self.config.num_attention_heads
            rotary = rotary_angles(position_ids, head_dim, self.config.rope_theta)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, rotary=rotary, **kwargs)
        return self.final_norm(hidden_states)

    def _packed(self, given: tuple[Tensor | None, ...], packing: Packing, batch: int, length: int, **kwargs: Any) -> Tensor:
        """Ids, segments, positions and embeddings (B, L, …) as given -> (B, L, C), where only real tokens are computed."""
        training = torch.is_grad_enabled() or packing.cu_seqlens is not None
        row = self.config.intermediate_size * compute_dtype(self.embeddings.word_embeddings.weight).itemsize
        blocks = [packing] if training else packing.blocks(1 << max(1, _BYTES_AT_ONCE // row).bit_length() - 1)
        whole = len(blocks) == 1 and packing.indices is None
        padded: Tensor | None = None
        for block in blocks:
            ids, segments, positions, embeds = (None if x is None else block.pack(x.expand(batch, *x.shape[1:])) for x in given)
            assert positions is not None
            states = self._layers(self.embeddings(ids, segments, positions, embeds), positions, None, packing=block, **kwargs)
            if padded is None and not whole:
                padded = states.new_zeros(batch * length, states.shape[-1])
            padded = block.unpack(states, padded)
        assert padded is not None
        return padded.view(batch, length, -1)

    def forward_packed(self, input_ids: Tensor, position_ids: Tensor, packing: Packing) -> Tensor:
        """What :meth:`forward` makes of sequences laid end to end, for callers who know them: ids and positions (T,) ->
        ``last_hidden_state`` (T, C).

        Raises:
            ValueError: an id that is not in the vocabulary (checked on the CPU only).
        """
        given = (input_ids[None], None, position_ids[None], None)
        self._check_inputs(given[0], given[2], None)
        return self._packed(given, packing, 1, len(input_ids))[0]

    def _can_pack(self, inputs: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """Whether only real tokens are computed: not where every padded position must exist or shapes must be static."""
        records = any(
            kwargs.get(name, getattr(self.config, name, False)) for name in ("output_attentions", "output_hidden_states")
        )
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or inputs.device.type == "meta"
        implementation = self.config._attn_implementation
        kernel = implementation == "sdpa" or ("flash" in implementation and inputs.device.type != "cpu")
        ready_mask = attention_mask is not None and attention_mask.dim() != 2
        return self.config.unpad_inputs and kernel and not (records or tracing or ready_mask)

    def _padded_mask(self, hidden_states: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Any:
        """The attention mask of the padded computation, in the form the chosen implementation wants."""
        only_same_document = None
        if cu_seqlens is not None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            document = torch.bucketize(positions, cu_seqlens[1:].to(positions.dtype), right=True)

            def only_same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return document[query] == document[key]

        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            and_mask_function=only_same_document,
        )

    def _check_inputs(self, input_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Refuse wrong inputs; return the one given of ids and embeddings."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        limit, table = self.config.max_position_embeddings, self.config.position_embedding_type != "rotary"
        if table and position_ids is None and inputs.shape[1] > limit:
            raise ValueError(
                f"The input has {inputs.shape[1]} tokens but this model has max_position_embeddings={limit}; "
                f"tokenize with truncation=True, max_length={limit}, or train a model with more positions."
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return inputs
        if input_ids is not None and input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(x) for x in torch.aminmax(input_ids))
            size = self.embeddings.word_embeddings.num_embeddings
            if low < 0 or high >= size:
                raise ValueError(
                    f"Token id {low if low < 0 else high} is not in the model's vocabulary of {size} entries; "
                    "use the tokenizer this model was trained with, or call resize_token_embeddings."
                )
        return inputs


# ----------------------------------------------------------------------------------------------------------- heads


# Elements of a block of logits: on a CPU (True) it should stay in the cache.
_LOGITS_AT_ONCE = {True: 2**21, False: 2**27}


class WordLoss(torch.autograd.Function):
    """Sum of the cross entropies of ``hidden @ weight.T + bias`` (T, V) with ``labels`` (T,), in float32; rows of
    ``hidden`` beyond the labels count nothing.

    Loss and gradients come out of one pass over blocks of rows, so that the logits of one block only exist at a time: they
    are larger than everything else in a step and, on a CPU, would leave the cache (Liger kernel, Hsu et al. 2024,
    arXiv:2410.10989, fuses the two in this way).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """``hidden`` (T, C) and ``weight`` (V, C) in the dtype to multiply in; ``bias`` (V,) in float32."""
        rows = max(1, _LOGITS_AT_ONCE[hidden.device.type == "cpu"] // weight.shape[0])
        loss, count = torch.zeros((), device=hidden.device), labels.shape[0]
        grad_logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)  # (T, V)
        targets = F.pad(labels, (0, hidden.shape[0] - labels.shape[0]))[:, None]  # (T, 1)
        for block, expected, grad in zip(hidden.split(rows), targets.split(rows), grad_logits.split(rows), strict=True):
            scores = F.log_softmax(torch.add(block @ weight.t(), bias), dim=-1)  # (rows, V), float32
            real = min(labels.shape[0], block.shape[0])
            loss -= scores[:real].gather(1, expected[:real]).sum()
            scores.exp_().scatter_add_(1, expected, scores.new_full(expected.shape, -1.0))
            grad.copy_(scores)
            labels = labels[real:]
        grad_logits[count:] = 0
        ones = grad_logits.new_ones(1, hidden.shape[0])  # a product sums columns ten times as fast as sum() does on a CPU
        grad_bias = (ones @ grad_logits).view(-1).to(bias.dtype)
        ctx.save_for_backward(grad_logits @ weight, grad_logits.t() @ hidden, grad_bias)
        return loss

    @staticmethod
    @once_differentiable  # the gradients are numbers already: a second derivative is refused, not silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *((grad * saved).to(saved.dtype) for saved in ctx.saved_tensors), None


class MiniBertLMHead(nn.Module):
    """Hidden states (…, C) -> word logits (…, V)."""

    def __init__(self, config: MiniBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = MiniBertLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def transform(self, hidden_states: Tensor) -> Tensor:
        """What precedes the product with the words: (…, C) -> (…, C)."""
        return self.norm(multiply(self.dense, hidden_states, self.act))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return wide(multiply(self.decoder, self.transform(hidden_states)))

    def loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Sum of the cross entropies of (T, C) with ``labels`` (T,), without the logits in memory."""
        if hidden_states.device.type == "cpu":
            hidden_states = F.pad(hidden_states, (0, 0, 0, rounded(len(labels)) - len(labels)))
        weight, dtype = self.decoder.weight, compute_dtype(self.decoder.weight)
        return WordLoss.apply(self.transform(hidden_states).to(dtype), weight.to(dtype), wide(self.decoder.bias), labels)


class MiniBertMaskedLMBase(MiniBertPreTrainedModel):
    """What the two classes with a word-prediction head share."""

    _tied_weights_keys = {
        "lm_head.decoder.weight": "minibert.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings
        self.lm_head.bias = new_embeddings.bias

    def predict_words(self, hidden_states: Tensor, labels: Tensor | None, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits. While training only the labelled positions are computed, and no logits are returned."""
        if labels is not None and self.training:
            labelled = labels.flatten() != -100
            hidden_states, labels = hidden_states.flatten(0, 1)[labelled], labels.flatten()[labelled]
            plain = type(self.lm_head.decoder) is nn.Linear and self.loss_function is LOSS_MAPPING["ForMaskedLM"]
            if plain and not torch.compiler.is_compiling():
                count = kwargs.get("num_items_in_batch", max(1, len(labels)))
                return self.lm_head.loss(hidden_states, labels) / count, None
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits


class MiniBertForMaskedLM(MiniBertMaskedLMBase):
    """Predict masked words (Devlin et al. 2018, arXiv:1810.04805)."""

    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.minibert = MiniBertModel(config, add_pooling_layer=False)
        self.lm_head = MiniBertLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """``labels`` (B, L): the word at each masked position, -100 elsewhere. Logits are (B, L, V), and None while training
        with labels."""
        outputs = self.minibert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        loss, logits = self.predict_words(outputs.last_hidden_state, labels, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


@dataclass
class MiniBertForPreTrainingOutput(ModelOutput):
    """Loss and logits of the two pretraining tasks."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MiniBertForPreTraining(MiniBertMaskedLMBase):
    """Predict masked words, and whether the second segment follows the first (Devlin et al. 2018)."""

    _auto_class = "AutoModelForPreTraining"
    accepts_loss_kwargs = False  # the loss is a mean already: Trainer must divide it by the accumulation steps

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"  # transformers derives it from the class name, which names no loss here
        self.minibert = MiniBertModel(config)
        self.lm_head = MiniBertLMHead(config)
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Any,
    ) -> MiniBertForPreTrainingOutput:
        """``labels`` as in :class:`MiniBertForMaskedLM`; ``next_sentence_label`` (B,): 0 follows, 1 does not. The loss is
        the sum of the given tasks' means."""
        outputs = self.minibert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        loss, logits = self.predict_words(outputs.last_hidden_state, labels)
        follows = wide(multiply(self.next_sentence, outputs.pooler_output))  # (B, 2)
        if next_sentence_label is not None:
            next_loss = F.cross_entropy(follows, next_sentence_label.view(-1))
            loss = next_loss if loss is None else loss + next_loss
        return MiniBertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=follows,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniBertClassifierBase(MiniBertPreTrainedModel):
    """What the heads share that put dropout and one linear layer on the encoder."""

    def __init__(self, config: MiniBertConfig, outputs: int | None, add_pooling_layer: bool):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.minibert = MiniBertModel(config, add_pooling_layer=add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = MiniBertDropout(dropout)
        assert outputs is not None  # a configuration always numbers its labels
        self.classifier = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def classify(self, states: Tensor) -> Tensor:
        return wide(multiply(self.classifier, self.dropout(states)))


class MiniBertForSequenceClassification(MiniBertClassifierBase):
    """Classify a text or a pair: one label, several labels, or a number, as ``config.problem_type`` says."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """``labels`` (B,) classes or numbers, or (B, num_labels) for several labels. Logits are (B, num_labels)."""
        outputs = self.minibert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classify(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MiniBertForTokenClassification(MiniBertClassifierBase):
    """Label every token, for example with named entities."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """``labels`` (B, L), -100 where no label counts. Logits are (B, L, num_labels)."""
        outputs = self.minibert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = self.classify(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MiniBertForQuestionAnswering(MiniBertPreTrainedModel):
    """Find the answer to a question as a span of the context."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MiniBertConfig):
        super().__init__(config)
        self.minibert = MiniBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """``start_positions`` and ``end_positions`` (B,): first and last token of the answer. Logits are (B, L) each, and
        so low at padding that it is never an answer: the loss does not depend on how far a batch was padded."""
        outputs = self.minibert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        logits = wide(multiply(self.qa_outputs, outputs.last_hidden_state))  # (B, L, 2)
        if attention_mask is not None and attention_mask.dim() == 2:
            logits = logits.masked_fill(~attention_mask.bool().unsqueeze(-1), torch.finfo(logits.dtype).min)
        start_logits, end_logits = (x.contiguous() for x in logits.unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MiniBertForMultipleChoice(MiniBertClassifierBase):
    """Choose among several continuations: each is encoded with the question, and the highest score wins."""

    _auto_class = "AutoModelForMultipleChoice"
    accepts_loss_kwargs = False  # the loss is a mean already: Trainer must divide it by the accumulation steps

    def __init__(self, config: MiniBertConfig):
        super().__init__(config, 1, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Inputs are (B, choices, L); ``labels`` (B,) is the right choice. Logits are (B, choices)."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None:
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        flat = (
            None if x is None else x.flatten(0, 1)
            for x in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.minibert(*flat, return_dict=True, **kwargs)
        logits = self.classify(outputs.pooler_output).view(-1, inputs.shape[1])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "MiniBertForMaskedLM",
    "MiniBertForMultipleChoice",
    "MiniBertForPreTraining",
    "MiniBertForQuestionAnswering",
    "MiniBertForSequenceClassification",
    "MiniBertForTokenClassification",
    "MiniBertModel",
    "MiniBertPreTrainedModel",
]
