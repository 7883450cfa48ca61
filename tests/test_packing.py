"""Packed batches: the same vectors and gradients as padded ones, for any lengths."""

import copy

import numpy as np
import pytest
import torch

from helpers import TINY, no_dropout
from minibert import MiniBertConfig, MiniBertModel, packing_minibert
from minibert.packing_minibert import Packing


def test_padding_inside_attention_equals_buckets():
    # The road of devices whose variable-length kernel lacks a dtype or dropout, exercised here on the CPU.
    lengths, shape = [2, 5, 5], (12, 4, 8)
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape) for _ in range(3))
    runs = Packing.of_lengths(lengths).attend(query, key, value, 0.0, 0.3)
    padded = Packing(cu_seqlens=torch.tensor([0, 2, 7, 12], dtype=torch.int32), max_length=5).attend(
        query, key, value, 0.0, 0.3
    )
    torch.testing.assert_close(runs, padded)
    multiples = Packing.of_lengths([2, 4, 5])  # padded to 16
    assert multiples.buckets == [(3, 16)]
    bounds = torch.tensor([0, 2, 6, 11], dtype=torch.int32)
    query, key, value = (x[:11] for x in (query, key, value))
    exact = Packing(cu_seqlens=bounds, max_length=5).attend(query, key, value, 0.0, 0.3)
    torch.testing.assert_close(multiples.attend(query, key, value, 0.0, 0.3), exact)


def test_packing_for_accelerators_equals_packing_for_the_cpu(batch):
    mask = batch["attention_mask"].bool()
    torch.manual_seed(0)
    states = torch.randn(3, 6, 12, 4, 8)
    results = []
    for device in ("cuda", "cpu"):  # the arithmetic of the one, on tensors of the other
        packing = Packing.of_mask(mask, 6, 12, torch.device(device))
        query, key, value = (packing.pack(x) for x in states)
        context = packing.attend(query, key, value, 0.0, 0.3).flatten(1)
        results.append(packing.unpack(context, torch.zeros(6 * 12, 4 * 8)))
    torch.testing.assert_close(*results)


def test_blocks_are_few_and_nearly_equal():
    lengths = sorted(np.random.default_rng(0).integers(5, 300, 60).tolist())
    packing = Packing.of_lengths(lengths)
    sizes = [[sum(block.lengths) for block in packing.blocks(tokens)] for tokens in (2048, 4096, 2**14)]
    assert [len(found) for found in sizes] == [5, 3, 1]
    for found, tokens in zip(sizes, (2048, 4096, 2**14), strict=True):
        assert sum(found) == sum(lengths) and max(found) <= tokens and max(found) - min(found) <= 332  # a text, a step of 32
    assert [block.lengths for block in Packing.of_lengths([3, 9, 40]).blocks(8)] == [[3], [9], [40]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_sequences_change_no_answer(batch, dtype, monkeypatch):
    model = MiniBertModel(MiniBertConfig(**TINY)).eval().to(dtype)
    full = {name: value[:, :5] for name, value in batch.items()}  # every row real and in place
    full["attention_mask"] = torch.ones_like(full["attention_mask"])
    with torch.no_grad():
        expected = [model(**inputs).last_hidden_state for inputs in (batch, full)]
        calls = []
        compute = model.layers[0].forward
        model.layers[0].forward = lambda states, *args, **kw: calls.append(len(states)) or compute(states, *args, **kw)
        monkeypatch.setattr(packing_minibert, "_BYTES_AT_ONCE", 16 * model.config.intermediate_size * dtype.itemsize)
        found = [model(**inputs).last_hidden_state for inputs in (batch, full)]
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype is torch.float32 else 0.05, rtol=0)
    assert len(calls) > 3 and max(calls) <= 16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rows_added_to_round_up_change_nothing(config, dtype, tolerance):
    """40 tokens and more are rounded up; the rows added are nowhere to be seen, and have no gradient."""
    torch.manual_seed(0)
    model = MiniBertModel(no_dropout(config)).to(dtype)
    mask = (torch.arange(20) < torch.tensor([[20], [13], [2], [6]])).long()
    ids = torch.randint(1, 101, (4, 20))
    packed = Packing.of_mask(mask.bool(), 4, 20, ids.device)
    assert (int(mask.sum()), packed.num_filler_tokens) == (41, 1)
    assert packed.buckets == [(3, 16), (1, 32), (1, 16)]  # padded to multiples of 16, the row added as a sequence of its own
    padded = copy.deepcopy(model)
    padded.config.unpad_inputs = False
    outputs = [one(ids, mask).last_hidden_state[mask.bool()] for one in (model, padded)]
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    weights = torch.randn(outputs[0].shape)
    for output in outputs:
        (output * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), padded.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(
                ours.grad / scale, theirs.grad / scale, atol=4 * tolerance, rtol=0, msg=lambda m, n=name: f"{n} {m}"
            )


def test_eager_attention_equals_the_kernel():
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, 4, 8) for _ in range(3))
    packing = Packing.of_lengths([2, 5, 5])
    # The smallest probability that takes the road with dropout drops nothing.
    torch.testing.assert_close(
        packing.attend(query, key, value, 1e-9, 0.3), packing.attend(query, key, value, 0.0, 0.3), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_sequences_of_nearly_equal_length_share_a_call(dropout):
    """Lengths 3 to 16 are one run, padded inside attention: the same vectors and gradients as one by one."""
    torch.manual_seed(0)
    lengths = [3, 7, 16, 40, 44, 58]  # each, and their sum, a number that is not rounded up
    together = Packing.of_lengths(lengths)
    assert together.buckets == [(3, 16), (2, 48), (1, 64)] and not together.num_filler_tokens
    tensors = [torch.randn(sum(lengths), 4, 8, requires_grad=True) for _ in range(3)]
    context = together.attend(*tensors, dropout, 0.3)
    parts = zip(*(tensor.split(lengths) for tensor in tensors), strict=True)
    alone = torch.cat([Packing.of_lengths([len(q)]).attend(q, k, v, dropout, 0.3) for q, k, v in parts])
    torch.testing.assert_close(context, alone, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(alone)
    for ours, theirs in zip(
        torch.autograd.grad((context * weights).sum(), tensors),
        torch.autograd.grad((alone * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_half_precision_attention_has_the_gradients_of_float32(dropout, monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(12, 4, 8).bfloat16() for _ in range(3)]

    def gradients(dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
        context = Packing.of_lengths([2, 5, 5]).attend(*inputs, dropout, 0.3)
        assert context.dtype == dtype
        (context.float() ** 2).sum().backward()
        return [x.grad.float() for x in inputs]

    exact = gradients(torch.float32)
    for large_from in (0, 10**9):  # all in half precision, and all in float32
        monkeypatch.setattr(packing_minibert, "_LARGE_SCORES", large_from)
        for ours, theirs in zip(gradients(torch.bfloat16), exact, strict=True):
            torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("lengths", [[7, 7, 7], [2, 5, 5], [1, 16, 16, 17, 30], [9] * 41])
@pytest.mark.parametrize("at_once", [1, 300, 2**20])  # a head, some sequences, all
def test_powers_of_two_and_torchs_kernel_agree(lengths, at_once, monkeypatch):
    torch.manual_seed(0)
    packing = Packing.of_lengths(lengths)
    qkv = torch.randn(3, sum(lengths) + packing.num_filler_tokens, 4, 8)
    exact = packing.attend(*qkv, 0.0, 0.3)
    monkeypatch.setattr(packing_minibert, "_SCORES_AT_ONCE", at_once)
    monkeypatch.setattr(packing_minibert, "suits_exp2", lambda query: query.dtype == torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        whole = packing.attend(*qkv.bfloat16(), 0.0, 0.3)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole[: sum(lengths)].float(), exact[: sum(lengths)], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("shift", [0.0, 60.0, -30.0, 500.0, -500.0])
def test_powers_of_two_are_exact_for_all_scores(shift, monkeypatch):
    """Scores of 60 and -30 are computed by powers of two; larger ones overflow, and torch's kernel takes over.

    That holds where only padding has such a score, too.
    """
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 16, 8).bfloat16()
    query[..., 0], key[..., 0] = 8.0, shift / 8  # softmax does not see what all scores have in common
    mask = (torch.arange(16) < torch.tensor([[16], [11]]))[:, None, None]
    exact = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, scale=1.0)
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    context = packing_minibert.exp2_attention_forward(query, key, value, mask, 1.0)
    torch.testing.assert_close(context.transpose(1, 2).float(), exact, atol=0.2, rtol=0.1)  # scores of 60 have steps of 0.25
    assert bool(calls) == (abs(shift) > 100)
    key[1, :, 11:, 0] = 1e4
    assert packing_minibert.exp2_attention_forward(query, key, value, mask, 1.0).isfinite().all()


def test_powers_of_two_are_for_many_scores_in_bfloat16_without_amx(monkeypatch):
    def chosen(shape, dtype=torch.bfloat16):
        return packing_minibert.suits_exp2(torch.empty(shape, dtype=dtype))

    monkeypatch.setattr(packing_minibert, "PREFERS_EXP2", True)
    assert chosen((64, 12, 64, 32)) and chosen((1, 12, 512, 32)) and chosen((1, 12, 96, 32)) and chosen((1, 12, 2048, 32))
    assert not chosen((1, 12, 16, 32))  # a query
    assert not chosen((1, 12, 4096, 32))  # its scores leave the cache
    assert not chosen((64, 12, 64, 32), torch.float32) and not chosen((64, 12, 64, 32), torch.float16)
    monkeypatch.setattr(packing_minibert, "PREFERS_EXP2", False)
    assert not chosen((64, 12, 64, 32))


def test_a_batch_of_empty_sequences_is_empty():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    packing = Packing.of_mask(mask, 2, 3, mask.device)
    states = packing.pack(torch.randn(2, 3, 4, 8))
    assert packing.attend(states, states, states, 0.0, 0.3).shape == (0, 4, 8)
