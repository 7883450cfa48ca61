"""CPU kernels that compute what their torch namesakes compute, only faster.

This file travels with every checkpoint and holds nothing of the architecture. Each docstring states the torch expression that
its function stands for; a test swaps every function for that expression and compares the outputs of the model.
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
    """Return the dtypes that oneDNN multiplies in on this processor with bias and GELU in the same call."""
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return frozenset()
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    half = (dtype for dtype, name in checks.items() if getattr(torch.ops.mkldnn, name, bool)())
    return frozenset([torch.float32, *half])


ONEDNN_DTYPES = onednn_dtypes()


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """Return ``F.gelu(F.linear(inputs, weight, bias))``, or without ``gelu`` the product alone: (…, in) -> (…, out).

    ``weight`` may be prepacked, which is why :mod:`minibert.inference.cpu` calls this directly.
    """
    activation, form = ("gelu", "none") if gelu else ("none", "")
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, activation, [], form)
    return product


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return ``tensor.float()``, or a float64 tensor as it is.

    Norms, softmax and the residual stream lose too many digits in half precision.
    """
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def is_being_traced() -> bool:
    """Return True if something follows every operation: a compiler, a trace, or a mode such as a counter of operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed(tensor: Tensor) -> bool:
    """Return True if values of ``tensor`` cannot be read: on the meta device, in a subclass, or within ``torch.func``."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"
    return not plain or torch._C._functorch.peek_interpreter_stack() is not None


def is_hooked(module: nn.Module) -> bool:
    """Return True if calling ``module`` does more than its own ``forward``: hooks, global ones too, or a replaced forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
    )


def is_unmodified_linear(module: nn.Module) -> bool:
    """Return True for a plain ``nn.Linear`` on the CPU, in no-grad mode, without hooks, adapters, quantization or tracing."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not is_hooked(module)
        and not is_being_traced()
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with ``weight``: ``weight.dtype``, or under autocast that of autocast."""
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return weight.dtype
    return torch.get_autocast_dtype(device)


def to_compute_dtype(tensor: Tensor, module: nn.Module) -> Tensor:
    """Return ``tensor.to(module.weight.dtype)``, cast once for all layers that read it.

    A bfloat16 matrix needs bfloat16 inputs. Autocast would cast the tensor again for each of those layers. Another module in
    place of a linear layer gets the dtype of its first parameter.
    """
    weight = module.weight if isinstance(module, nn.Linear) else next(module.parameters(), None)
    # A quantized layer keeps integers, or has a method of this name, and takes its inputs as they are.
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        return tensor
    return tensor.to(compute_dtype(weight))


def linear(module: nn.Module, states: Tensor, act: nn.Module | None = None) -> Tensor:
    """Return ``act(module(states.to(module.weight.dtype)))``, or without ``act`` the product alone: (…, in) -> (…, out).

    In half precision, without gradients, a CPU saves a sixth of the time if oneDNN adds the bias and computes GELU while the
    result is in registers: ``nn.Linear`` writes its bias into every row before the product. Any other module is called.
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

    A CPU takes twice as long to add tensors of two dtypes as to cast one of them first.
    """
    return hidden_states + update if update.dtype == hidden_states.dtype else update.to(hidden_states.dtype).add_(hidden_states)


def dropout(states: Tensor, probability: float) -> Tensor:
    """Return ``F.dropout(states, probability)``, with the probability rounded to a multiple of 2**-16.

    On the CPU torch draws a full random number per element, one after another; this draws 16 bits
    (``benchmarks/pieces.py`` compares the times).
    """
    dropped = round(probability * 2**16)
    if dropped in (0, 2**16) or states.device.type != "cpu" or is_being_traced() or is_transformed(states):
        return F.dropout(states, probability)
    words = torch.empty((states.numel() + 3) // 4, dtype=torch.int64, device=states.device).random_(-(2**63), None)
    keep = words.view(torch.int16)[: states.numel()] >= dropped - 2**15
    return states * keep.view(states.shape).to(states.dtype).mul_(2**16 / (2**16 - dropped))


class MiniBertDropout(nn.Dropout):
    """Apply :func:`dropout` in training and nothing in evaluation."""

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
    """Compute ``F.scaled_dot_product_attention`` step by step: three (B, H, L, D) -> (B, L, H, D) and weights (B, H, L, L)."""
    scores = (query * scaling) @ key.transpose(2, 3)  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).to(query.dtype)  # the softmax itself sums in float32
    weights = dropout(weights, kwargs.get("dropout", 0.0))
    return (weights @ value).transpose(1, 2).contiguous(), weights
