"""Matrices in the layout that oneDNN multiplies in, for models that only encode, on a CPU.

A product with a matrix as it is brings it into that layout at every call. Done once, and with queries, keys and values in one
product, a query takes less time (``benchmarks/pieces.py`` has the products by themselves), and thousands of texts a little.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minibert import modeling_minibert
from minibert.modeling_minibert import MiniBertModel, by_onednn

_PROJECTIONS = ("query", "key", "value")


def block_weights(model: MiniBertModel) -> bool:
    """Lay out the matrices of all layers of ``model`` in place; whether that was possible here.

    The model then gives the vectors it gave, up to rounding, but can neither be saved nor trained, nor leave the CPU.
    """
    if model.device.type != "cpu" or model.dtype not in modeling_minibert.ONEDNN_DTYPES:
        return False
    model.requires_grad_(False)  # the products here have no backward
    for layer in model.layers:
        _project_together(layer.attention)
        mlp: Any = layer.mlp
        fuse = mlp.gate is None and model.config.hidden_act == "gelu"
        for module in layer.modules():
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:  # not one that is quantized or adapted
                    setattr(module, name, BlockedLinear(child, gelu=fuse and child is mlp.up))
        if isinstance(mlp.up, BlockedLinear) and fuse:
            mlp.act = nn.Identity()
    return True


def _project_together(attention: Any) -> None:
    """Queries, keys and values of ``attention`` by one product: three cost a query twice as much."""
    linears = [getattr(attention, name) for name in _PROJECTIONS]
    if any(type(linear) is not nn.Linear for linear in linears):
        return
    whole = nn.Linear(linears[0].in_features, 3 * linears[0].out_features, device="meta")
    whole.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    whole.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    together = attention.together = BlockedLinear(whole)
    attention.project = lambda hidden_states: together(hidden_states).chunk(3, dim=-1)
    for name in _PROJECTIONS:
        setattr(attention, name, None)


class BlockedLinear(nn.Module):
    """(…, in) -> (…, out) as ``linear`` computes it, and its GELU if asked for. It keeps no other copy of the matrix."""

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        # No parameters: a blocked tensor has no storage to save or to move.
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.gelu = gelu

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.to(self.weight.dtype)  # autocast may have narrowed them
        return by_onednn(inputs, self.weight, self.bias, self.gelu)

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("This model was laid out for encoding and cannot be saved; save the one it was made of.")
