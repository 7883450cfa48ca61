"""The contract of the kernels: each computes what the torch expression in its docstring computes."""

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation

from helpers import no_dropout
from minibert import (
    MiniBertForMaskedLM,
    MiniBertModel,
    kernels_minibert,
    loss_minibert,
    modeling_minibert,
    packing_minibert,
)
from minibert.kernels_minibert import (
    ONEDNN_DTYPES,
    add,
    at_least_float32,
    dropout,
    is_unmodified_linear,
    linear,
    onednn_dtypes,
    onednn_linear,
)

half_products = pytest.mark.skipif(torch.bfloat16 not in ONEDNN_DTYPES, reason="oneDNN multiplies no half precision here")


# What each docstring says its function stands for.
TORCH = {
    "at_least_float32": lambda tensor: tensor.float(),
    "to_compute_dtype": lambda tensor, module: tensor.to(module.weight.dtype),
    "linear": lambda module, states, act=None: (act or nn.Identity())(module(states.to(module.weight.dtype))),
    "add": lambda hidden_states, update: hidden_states + update,
    "dropout": F.dropout,
    "MiniBertDropout": nn.Dropout,
    "eager_attention_forward": lambda module, query, key, value, mask, scaling, **kwargs: (
        F.scaled_dot_product_attention(query, key, value, mask, kwargs.get("dropout", 0.0), scale=scaling).transpose(1, 2),
        None,
    ),
}
FILES = (modeling_minibert, packing_minibert, kernels_minibert, loss_minibert)


def outputs(config, batch, labels, dtype, train, swapped):
    """Loss, gradients and hidden states of a masked-language model, with the torch expressions where ``swapped``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in TORCH.items() if swapped else ():
            for module in FILES:
                patch.setattr(module, name, function, raising=False)
        torch.manual_seed(0)
        model = MiniBertForMaskedLM(config).to(dtype).train(train)
        if not train:
            with torch.no_grad():
                result = model(**batch, labels=labels)
            return [result.loss, result.logits[batch["attention_mask"].bool()]]
        loss = model(**batch, labels=labels).loss
        loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_expressions_compute_the_same(dtype, implementation, packed, train, config, batch):
    config = no_dropout(config)
    config.unpad_inputs, config._attn_implementation = packed, implementation
    batch = {name: tensor[:5] for name, tensor in batch.items()}
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    ours, theirs = (outputs(config, batch, labels, dtype, train, swapped) for swapped in (False, True))
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        scale = other.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(one / scale, other / scale, atol=tolerance, rtol=0)


@pytest.mark.skipif(torch.float32 not in ONEDNN_DTYPES, reason="oneDNN's own call is not here")
@pytest.mark.parametrize("gelu", [False, True])
def test_onednn_computes_the_product_the_bias_and_gelu(gelu):
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(2, 7, 24), torch.randn(40, 24), torch.randn(40)
    expected = F.linear(inputs, weight, bias)
    torch.testing.assert_close(onednn_linear(inputs, weight, bias, gelu), F.gelu(expected) if gelu else expected)


def test_sums_of_two_dtypes_are_exact():
    states, update = torch.randn(5, 8), torch.randn(5, 8).bfloat16()
    assert add(states, update).equal(states + update)
    assert at_least_float32(update).equal(update.float()) and at_least_float32(states.double()).dtype == torch.float64


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_keeps_the_expected_share_and_sum(probability):
    torch.manual_seed(0)
    states = torch.ones(1000, 1003, requires_grad=True)
    dropped = dropout(states, probability)
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(probability, abs=0.002)  # four standard deviations of a million draws
    assert dropped[dropped != 0].unique().tolist() == pytest.approx([1 / (1 - probability)], rel=1e-4)
    assert (dropped.mean(dim=0) - 1).abs().mean() < 0.05  # no column is favoured
    dropped.sum().backward()
    torch.testing.assert_close(states.grad, dropped.detach())


@half_products
@pytest.mark.parametrize(("gelu", "bias"), [(False, True), (True, True), (True, False)])
def test_products_of_half_precision_are_those_of_the_module(gelu, bias, monkeypatch):
    torch.manual_seed(0)
    act = GELUActivation() if gelu else None
    module, inputs = torch.nn.Linear(24, 40, bias=bias).bfloat16(), torch.randn(2, 7, 24).bfloat16()
    exact = torch.nn.functional.linear(inputs.float(), module.weight.float(), None if not bias else module.bias.float())
    exact = torch.nn.functional.gelu(exact) if gelu else exact
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", None)
        product = linear(module, inputs, act)
        assert linear(module, inputs[:, :0], act).shape == (2, 0, 40)
    torch.testing.assert_close(product.float(), exact, atol=1e-2, rtol=1e-2)
    assert product.dtype == torch.bfloat16
    product = linear(module, inputs.clone().requires_grad_(), act)  # the module, which has a backward
    assert product.requires_grad
    torch.testing.assert_close(product.float(), exact, atol=2e-2, rtol=2e-2)


@half_products
def test_gelu_within_a_product_is_the_exact_one():
    """GELU differs from its approximation by tanh in bfloat16 only where it is small and negative."""
    module, inputs = torch.nn.Linear(1, 1, bias=False).bfloat16(), torch.linspace(-3.5, -1.5, 33).bfloat16()[:, None]
    torch.nn.init.ones_(module.weight)
    exact = torch.nn.functional.gelu(inputs.float())
    with torch.no_grad():
        product = linear(module, inputs, GELUActivation())
    torch.testing.assert_close(product.float(), exact, atol=1e-6, rtol=1e-2)
    tanh = torch.nn.functional.gelu(inputs.float(), approximate="tanh")
    assert not torch.allclose(tanh, exact, atol=1e-6, rtol=1e-2)


@half_products
def test_products_leave_to_the_module_what_only_it_can_do():
    class Adapted(torch.nn.Linear):
        pass

    inputs = torch.randn(3, 8)
    plain, adapted, hooked, replaced = torch.nn.Linear(8, 8), Adapted(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    replaced.forward = lambda inputs: inputs  # as Accelerate does to weights that are elsewhere
    half = inputs.bfloat16()
    with torch.no_grad():
        assert is_unmodified_linear(plain.bfloat16())
        assert not any(is_unmodified_linear(one.bfloat16()) for one in (adapted, hooked, replaced))
        without = torch.nn.functional.linear(half, hooked.weight, hooked.bias)
        assert (linear(hooked, half) - without > 0.9).all()
    assert not is_unmodified_linear(plain)  # gradients may be wanted


def test_products_of_other_processors_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert onednn_dtypes() == frozenset()


@half_products
def test_hooks_see_the_products_of_a_model_that_encodes(config):
    model = MiniBertModel(config).bfloat16().eval()
    seen = []
    model.layers[0].mlp.up.register_forward_hook(lambda module, inputs, output: seen.append("up"))
    model.layers[1].mlp.act.register_forward_hook(lambda module, inputs, output: seen.append("act"))
    with torch.no_grad():
        model(torch.randint(1, 101, (2, 5)))
    assert seen == ["up", "act"]
