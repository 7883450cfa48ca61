"""Compute the masked-word loss with less memory. This file is saved with every checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels_minibert import at_least_float32, compute_dtype
from .packing_minibert import rounded

# Number of logits per block, on a CPU (True) or elsewhere. A CPU's block must fit the cache.
_LOGITS_AT_ONCE = {True: 2**21, False: 2**27}


class FusedMaskedLMLoss(torch.autograd.Function):
    """Compute the sum of the cross entropies of ``hidden @ weight.T + bias`` and ``labels``.

    The forward pass also computes the gradients, a block of rows at a time, as in Liger kernel
    (Hsu et al. 2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the first N rows of ``hidden`` (T, C), given N ``labels``."""
        rows = max(1, _LOGITS_AT_ONCE[hidden.device.type == "cpu"] // weight.shape[0])
        loss, count = torch.zeros((), dtype=bias.dtype, device=hidden.device), labels.shape[0]
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
        ones = grad_logits.new_ones(1, hidden.shape[0])  # on a CPU a product sums columns ten times as fast as sum() does
        grad_bias = (ones @ grad_logits).view(-1).to(bias.dtype)
        ctx.save_for_backward(grad_logits @ weight, grad_logits.t() @ hidden, grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would treat the saved gradients as constants
            raise RuntimeError("The loss without logits has no second derivative; call the model with return_logits=True.")
        return *((grad * saved).to(saved.dtype) for saved in ctx.saved_tensors), None


def masked_lm_loss(transform: Callable[[Tensor], Tensor], decoder: nn.Linear, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of ``decoder(transform(hidden_states))``, summed over labels."""
    if hidden_states.device.type == "cpu":
        hidden_states = F.pad(hidden_states, (0, 0, 0, rounded(len(labels)) - len(labels)))
    weight, bias, dtype = decoder.weight, at_least_float32(decoder.bias), compute_dtype(decoder.weight)
    loss: Tensor = FusedMaskedLMLoss.apply(transform(hidden_states).to(dtype), weight.to(dtype), bias, labels)
    return loss
