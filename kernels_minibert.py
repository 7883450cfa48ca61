"""Provide faster CPU versions of torch functions. This file is saved with every checkpoint.

The docstring of a kernel contains an equivalent torch expression. A test compares a model that
uses the kernels with a model that uses the expressions.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.activations import GELUActivation

HALF_DTYPES = (torch.bfloat16, torch.float16)


def onednn_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes in which this CPU computes a linear layer with one oneDNN call."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    half = (dtype for dtype, name in checks.items() if getattr(torch.ops.mkldnn, name, bool)())
    return frozenset([torch.float32, *half])


ONEDNN_DTYPES = onednn_dtypes()


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return ``F.linear(inputs, weight, bias)``, and apply ``F.gelu`` if ``gelu`` is True.

    Shapes are (…, in) -> (…, out). ``weight`` may be prepacked by oneDNN.
    """
    activation, form = ("gelu", "none") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, activation, [], form)
    return product


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor.float()``. A float64 tensor is returned unchanged."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def is_being_traced() -> bool:
    """Return True inside ``torch.compile``, ``torch.jit.trace`` or a ``TorchDispatchMode``."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed(tensor: Tensor) -> bool:
    """Return True for a meta tensor, a tensor subclass, or any tensor inside ``torch.func``."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    return not plain or torch._C._functorch.peek_interpreter_stack() is not None


def is_hooked(module: nn.Module) -> bool:
    """Return True if forward hooks apply to ``module``, or its ``forward`` was replaced."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def is_unmodified_linear(module: nn.Module) -> bool:
    """Return True for an unmodified ``nn.Linear`` on a CPU if gradients and tracing are off."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not is_hooked(module)
        and not is_being_traced()
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return autocast's dtype, or ``weight.dtype`` if autocast is off."""
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return weight.dtype
    return torch.get_autocast_dtype(device)


def to_compute_dtype(tensor: Tensor, module: nn.Module) -> Tensor:
    """Return ``tensor.to(module.weight.dtype)``. Under autocast, use autocast's dtype instead.

    Call the function once if several layers read ``tensor``. If ``module`` is not an
    ``nn.Linear``, the dtype of the first parameter of ``module`` is used.
    """
    weight = module.weight if isinstance(module, nn.Linear) else next(module.parameters(), None)
    # A quantized layer has an integer weight or a method ``weight``. Its inputs are not cast.
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return tensor
    return tensor.to(compute_dtype(weight))


def linear(module: nn.Module, states: Tensor, act: nn.Module | None = None) -> Tensor:
    """Return ``act(module(states.to(module.weight.dtype)))``: (…, in) -> (…, out).

    If ``act`` is None, no activation is applied. In half precision without gradients, a CPU
    computes product, bias and GELU in one oneDNN call, which takes a sixth less time.
    """
    inputs = to_compute_dtype(states, module)
    direct = inputs.dtype in HALF_DTYPES and inputs.dtype in ONEDNN_DTYPES and type(inputs) is Tensor
    # Under autocast the matrix has another dtype than the inputs.
    if not direct or not is_unmodified_linear(module) or inputs.dtype != module.weight.dtype:
        product = module(inputs)
        return product if act is None else act(product)
    fused = type(act) is GELUActivation and not is_hooked(act)
    product = onednn_linear(inputs, module.weight, module.bias, gelu=fused)  # type: ignore[arg-type]
    return product if act is None or fused else act(product)


def add(hidden_states: Tensor, update: Tensor) -> Tensor:
    """Return ``hidden_states + update``.

    ``update`` is cast first, since a CPU adds tensors of two dtypes slowly.
    """
    return hidden_states + update if update.dtype == hidden_states.dtype else update.to(hidden_states.dtype).add_(hidden_states)


def dropout(states: Tensor, probability: float) -> Tensor:
    """Return ``F.dropout(states, probability)``, with 16 random bits per element on a CPU.

    On a CPU, torch's own dropout takes longer. The probability is rounded to a multiple of
    2**-16 there.
    """
    dropped = round(probability * 2**16)
    if dropped in (0, 2**16) or states.device.type != "cpu" or is_being_traced() or is_transformed(states):
        return F.dropout(states, probability)
    words = torch.empty((states.numel() + 3) // 4, dtype=torch.int64, device=states.device).random_(-(2**63), None)
    keep = words.view(torch.int16)[: states.numel()] >= dropped - 2**15
    return states * keep.view(states.shape).to(states.dtype).mul_(2**16 / (2**16 - dropped))


class MiniBertDropout(nn.Dropout):
    """Apply :func:`dropout` in training mode, and return the input in evaluation mode."""

    def forward(self, states: Tensor) -> Tensor:
        return dropout(states, self.p) if self.training else states


def eager_attention_forward(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return ``F.scaled_dot_product_attention`` (B, L, H, D) and its weights (B, H, L, L)."""
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(query.dtype)  # the softmax itself sums in float32
    weights = dropout(weights, kwargs.get("dropout", 0.0))
    return (weights @ value).transpose(1, 2).contiguous(), weights
