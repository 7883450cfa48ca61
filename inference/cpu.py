"""Layers laid out for encoding on a CPU.

A product with a matrix as it is brings it into oneDNN's layout at every call. Done once, and with queries, keys and values in
one product, a query takes less time, and thousands of texts a little (``benchmarks/pieces.py`` has the products by themselves).
A query is a few hundred short operations, and what surrounds them counts as much: nothing is looked up here, in no submodule,
that can be known before.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from minibert import modeling_minibert
from minibert.modeling_minibert import MiniBertLayer, MiniBertModel, Packing, add, by_onednn, is_plain, rotate, wide

# Rows below which reading a float32 matrix takes longer than multiplying by it.
_FEW_ROWS = 32


@torch.no_grad()
def lay_out(model: MiniBertModel, halve: bool = False) -> bool:
    """Replace the layers of ``model`` by :class:`LaidOutLayer`; whether that was possible here.

    The model then gives the vectors it gave, up to rounding, but can neither be saved nor trained, nor leave the CPU. A layer
    that is more than its matrices (quantized, adapted, hooked) stays as it is.

    Args:
        halve: multiply fewer than 32 rows (a query) by float16 copies of float32 matrices, which :func:`can_halve` must allow.
    """
    if model.device.type != "cpu" or model.dtype not in modeling_minibert.ONEDNN_DTYPES:
        return False
    if model.dtype == torch.bfloat16 and not modeling_minibert.bfloat16_pays():  # its own layers compute in float32
        return False
    model.requires_grad_(False)  # the products here have no backward
    layer: Any
    for number, layer in enumerate(model.layers):
        if _can_replace(layer):
            model.layers[number] = LaidOutLayer(layer, halve=halve)
    return True


def _can_replace(layer: nn.Module) -> bool:
    """Whether all that ``layer`` does is what :class:`LaidOutLayer` does."""
    if type(layer) is not MiniBertLayer:
        return False
    attention, mlp = layer.attention, layer.mlp
    linears = [attention.query, attention.key, attention.value, attention.output, mlp.up, mlp.gate, mlp.down]
    changed = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in layer.modules())
    return not changed and all(is_plain(linear) for linear in linears if linear is not None)


def can_halve(dtype: torch.dtype) -> bool:
    """Whether torch has FBGEMM's product of float32 rows and a float16 matrix here, and that would read less."""
    return dtype == torch.float32 and torch.backends.quantized.engine in ("x86", "fbgemm")


class LaidOutLinear:
    """(…, in) -> (…, sum of outs) as ``linears`` compute it, and the GELU after it if asked for. It keeps no other copy of the
    matrices, and is no module: a blocked tensor has no storage to save or to move.

    With ``halve``, the first product of few rows makes a copy in float16, by which FBGEMM multiplies few rows from then on,
    with sums in float32: what the matrix loses by it is an eighth of what it would lose by bfloat16.
    """

    def __init__(self, *linears: nn.Linear, gelu: bool = False, halve: bool = False):
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.dtype = weight.dtype
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = torch.cat(biases) if biases else None
        self.gelu = gelu
        self.halve = halve and bool(weight.abs().max() <= torch.finfo(torch.float16).max)
        self.half: Any = None

    def __call__(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.dtype)
        if not self.halve or inputs.numel() >= _FEW_ROWS * inputs.shape[-1]:
            return by_onednn(inputs, self.weight, self.bias, self.gelu)
        if self.half is None:
            self.half = torch.ops.quantized.linear_prepack_fp16(self.weight.to_dense(), self.bias)
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(inputs, self.half)
        return F.gelu(product) if self.gelu else product


class LaidOutLayer(MiniBertLayer):
    """What ``layer`` computes when nothing is trained: (…, C) -> (…, C)."""

    def __init__(self, layer: MiniBertLayer, halve: bool = False):
        nn.Module.__init__(self)  # without the parameters of a layer
        attention, mlp = layer.attention, layer.mlp
        self.heads, self.head_dim, self.scaling = attention.num_heads, attention.head_dim, attention.scaling
        fused = mlp.gate is None and type(mlp.act) is GELUActivation
        linear = partial(LaidOutLinear, halve=halve)
        self.project = linear(attention.query, attention.key, attention.value)
        self.output = linear(attention.output)
        self.up, self.down = linear(mlp.up, gelu=fused), linear(mlp.down)
        self.gate = None if mlp.gate is None else linear(mlp.gate)
        self.act: Any = None if fused else mlp.act
        self.norm_first = layer.norm_first
        self.attention_norm, self.mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packing: Packing | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = attention_mask, packing, rotary
        if self.norm_first:
            hidden_states = add(hidden_states, self._attend(self.attention_norm(hidden_states), *given))
            return add(hidden_states, self._transform(self.mlp_norm(hidden_states)))
        hidden_states = self.attention_norm(add(hidden_states, self._attend(hidden_states, *given)))
        hidden_states = self.mlp_norm(add(hidden_states, self._transform(hidden_states)))
        return hidden_states

    def _attend(
        self, states: Tensor, mask: Tensor | None, packing: Packing | None, rotary: tuple[Tensor, Tensor] | None
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
        raise NotImplementedError("This model was laid out for encoding and cannot be saved; save the one it was made of.")


def _norm(norm: nn.LayerNorm) -> partial[Tensor]:
    """``norm`` of float32 states, its parameters widened once."""
    return partial(
        F.layer_norm, normalized_shape=norm.normalized_shape, weight=wide(norm.weight), bias=wide(norm.bias), eps=norm.eps
    )
