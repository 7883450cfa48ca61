"""Speed up encoding on a CPU: choose the dtype, and prepack the matrices of the layers.

Prepacking converts each matrix to the layout of oneDNN once, instead of in every product.
Queries, keys and values are computed in one product. ``benchmarks/pieces.py`` measures the time
saved.
"""

import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from minibert.kernels_minibert import ONEDNN_DTYPES, add, at_least_float32, is_hooked, is_unmodified_linear, onednn_linear
from minibert.modeling_minibert import MiniBertLayer, MiniBertModel, rotate
from minibert.packing_minibert import Packing

# With fewer rows, reading a float32 matrix takes longer than the product.
_FEW_ROWS = 32


@cache
def product_rates() -> dict[str, float]:
    """Measure how fast this CPU multiplies in ``float32`` and ``bfloat16``, once per process.

    The result maps both dtypes to billions of operations per second. Each rate is the fastest
    of five products. For float32, the faster of torch and oneDNN counts.
    """
    # The list of instructions is not enough: a Xeon whose host hides AMX is slow in bfloat16.
    rows, width = 1024, 384
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        states, weight = (torch.ones(size, width, dtype=torch.float32, device="cpu") for size in (rows, width))
        half_states, half_weight = states.bfloat16(), weight.bfloat16()
        products: list[tuple[str, Callable[[], Tensor]]] = [
            ("float32", lambda: F.linear(states, weight)),
            ("bfloat16", lambda: F.linear(half_states, half_weight)),
        ]
        if torch.float32 in ONEDNN_DTYPES:
            products.append(("float32", lambda: onednn_linear(states, weight, None)))
        seconds = {"float32": math.inf, "bfloat16": math.inf}
        for _ in range(5):  # the first run warms up
            for name, product in products:
                started = time.perf_counter()
                product()
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {name: 2e-9 * rows * width**2 / took for name, took in seconds.items()}


def bfloat16_is_faster() -> bool:
    """Return True if this CPU multiplies bfloat16 at least a quarter faster than float32."""
    rates = product_rates()
    return rates["bfloat16"] > 1.25 * rates["float32"]


def choose_dtype(dtype: str, device: str) -> tuple[str, str]:
    """Return the dtype to compute in on ``device``, and the reason for the choice.

    >>> choose_dtype("float32", "cpu")
    ('float32', 'as asked')
    """
    if dtype != "auto":
        return dtype, "as asked"
    kind = torch.device(device).type  # Accelerate calls the CPU cpu:0
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "which this GPU computes natively") if native else ("float32", "this GPU has no bfloat16")
    if kind != "cpu":
        return "float32", f"bfloat16 is not known to be faster on {kind}"
    rates = product_rates()
    times = f"{rates['bfloat16'] / rates['float32']:.1f} times as fast"
    if bfloat16_is_faster():
        return "bfloat16", f"in which this processor multiplies {times} as in float32"
    return "float32", f"since this processor multiplies bfloat16 {times}"


@torch.no_grad()
def prepack(model: MiniBertModel, half_copies: bool = False) -> bool:
    """Replace the layers of ``model`` by prepacked layers. Return False if not supported.

    The model then computes the same vectors, up to rounding. The model can no longer be saved,
    trained or moved to another device. A layer is not replaced if it is quantized, or has
    adapters or hooks.

    If ``half_copies`` is True, inputs of fewer than 32 tokens use float16 copies of the
    matrices.
    """
    if model.device.type != "cpu" or model.dtype not in ONEDNN_DTYPES:
        return False
    model.requires_grad_(False)  # the prepacked products have no backward pass
    layer: Any
    for number, layer in enumerate(model.layers):
        if _can_replace(layer):
            model.layers[number] = PrepackedLayer(layer, half_copies=half_copies)
    return True


def _can_replace(layer: nn.Module) -> bool:
    """Return True if :class:`PrepackedLayer` computes exactly the same as ``layer``."""
    if type(layer) is not MiniBertLayer:
        return False
    attention, mlp = layer.attention, layer.mlp
    linears = [attention.query, attention.key, attention.value, attention.output, mlp.up, mlp.gate, mlp.down]
    changed = any(map(is_hooked, layer.modules()))
    return not changed and all(is_unmodified_linear(linear) for linear in linears if linear is not None)


def supports_half_copies(dtype: torch.dtype) -> bool:
    """Return True if FBGEMM can multiply rows of ``dtype`` by a float16 matrix."""
    return dtype == torch.float32 and torch.backends.quantized.engine in ("x86", "fbgemm")


class PrepackedLinear:
    """Apply several linear layers in a single product: (…, in) -> (…, sum of the widths).

    Only the prepacked matrix is stored, which can be neither saved nor moved.

    If ``gelu`` is True, GELU is applied to the result. If ``half_copies`` is True, inputs of
    fewer than 32 rows are multiplied by a float16 copy of the matrix, with sums in float32.
    """

    def __init__(self, *linears: nn.Linear, gelu: bool = False, half_copies: bool = False):
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.dtype = weight.dtype
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = torch.cat(biases) if biases else None
        self.gelu = gelu
        self.half_copies = half_copies and bool(weight.abs().max() <= torch.finfo(torch.float16).max)
        self.half: Any = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Multiply ``inputs`` by the matrix, and add the bias: (…, in) -> (…, out)."""
        inputs = inputs.to(self.dtype)
        if not self.half_copies or inputs.numel() >= _FEW_ROWS * inputs.shape[-1]:
            return onednn_linear(inputs, self.weight, self.bias, self.gelu)
        if self.half is None:
            self.half = torch.ops.quantized.linear_prepack_fp16(self.weight.to_dense(), self.bias)
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(inputs, self.half)
        return F.gelu(product) if self.gelu else product


class PrepackedLayer(MiniBertLayer):
    """Compute the same as ``layer`` in evaluation mode, but faster: (…, C) -> (…, C)."""

    def __init__(self, layer: MiniBertLayer, half_copies: bool = False):
        nn.Module.__init__(self)  # MiniBertLayer.__init__ would create parameters
        attention, mlp = layer.attention, layer.mlp
        self.heads, self.head_dim, self.scaling = attention.num_heads, attention.head_dim, attention.scaling
        fused = mlp.gate is None and type(mlp.act) is GELUActivation
        linear = partial(PrepackedLinear, half_copies=half_copies)
        self.project = linear(attention.query, attention.key, attention.value)
        self.output = linear(attention.output)
        self.up, self.down = linear(mlp.up, gelu=fused), linear(mlp.down)
        self.gate = None if mlp.gate is None else linear(mlp.gate)
        self.act: Any = None if fused else mlp.act
        self.norm_first = layer.norm_first
        self.attention_norm, self.mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Apply attention and MLP to the hidden states (…, C)."""
        if self.norm_first:
            hidden_states = add(hidden_states, self._attend(self.attention_norm(hidden_states), attention_mask, **kwargs))
            return add(hidden_states, self._transform(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(add(hidden_states, self._attend(hidden_states, attention_mask, **kwargs)))
        hidden_states = self.mlp_norm(add(hidden_states, self._transform(hidden_states)))
        return hidden_states

    def _attend(
        self,
        states: Tensor,
        mask: Tensor | None,
        packing: Packing | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Tensor:
        query, key, value = self.project(states).view(*states.shape[:-1], 3, self.heads, self.head_dim).unbind(-3)  # (…, H, D)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if packing is not None:
            context = packing.attend(query, key, value, 0.0, self.scaling)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, H, L, D)
            context = F.scaled_dot_product_attention(query, key, value, mask, scale=self.scaling).transpose(1, 2)
        output: Tensor = self.output(context.reshape(states.shape))
        return output

    def _transform(self, states: Tensor) -> Tensor:
        inner = self.up(states)
        if self.gate is not None:
            inner = self.act(self.gate(states)) * inner
        elif self.act is not None:
            inner = self.act(inner)
        output: Tensor = self.down(inner)
        return output

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("A prepacked model cannot be saved; save the original model.")


def _norm(norm: nn.LayerNorm) -> partial[Tensor]:
    """Return a function that computes ``norm`` with parameters of at least float32."""
    weight, bias = at_least_float32(norm.weight), at_least_float32(norm.bias)
    return partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=weight, bias=bias, eps=norm.eps)
