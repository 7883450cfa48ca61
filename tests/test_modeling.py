"""The encoder against itself: two roads, one answer."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import minibert
from helpers import TINY, no_dropout
from minibert import MiniBertConfig, MiniBertModel, loss_minibert
from minibert.modeling_minibert import rotary_angles, rotate, sinusoidal_table

HEADS = [name for name in minibert.__all__ if name.startswith("MiniBertFor")]


def labels_for(name, batch):
    """Inputs with labels for a head: the batch of five rows, and targets of the right shape."""
    rows, length = batch["input_ids"].shape
    words = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    words[:, ::2] = -100
    targets = {
        "MiniBertForMaskedLM": {"labels": words},
        "MiniBertForPreTraining": {"labels": words, "next_sentence_label": torch.arange(rows) % 2},
        "MiniBertForSequenceClassification": {"labels": torch.arange(rows) % 2},
        "MiniBertForTokenClassification": {"labels": torch.where(words == -100, -100, words % 2)},
        "MiniBertForQuestionAnswering": {"start_positions": torch.zeros(rows).long(), "end_positions": torch.ones(rows).long()},
        "MiniBertForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
    }
    if name == "MiniBertForMultipleChoice":
        batch = {key: value.view(3, 2, length) for key, value in batch.items()}
    return {**batch, **targets[name]}


def both_paths(model):
    padded = copy.deepcopy(model)
    padded.config.unpad_inputs = False
    return model, padded


# ------------------------------------------------------------------------------------------------ padding is never computed


def test_unpadded_equals_padded_forward(model, batch):
    unpadded, padded = both_paths(model)
    mask = batch["attention_mask"].bool()
    one, other = unpadded(**batch), padded(**batch)
    torch.testing.assert_close(one.last_hidden_state[mask], other.last_hidden_state[mask], atol=1e-5, rtol=0)
    texts = mask.any(dim=1)  # the row that is only padding has no meaning
    torch.testing.assert_close(one.pooler_output[texts], other.pooler_output[texts], atol=1e-5, rtol=0)
    assert one.last_hidden_state[~mask].eq(0).all()


@pytest.mark.parametrize("name", HEADS)
def test_unpadded_equals_padded_backward(name, config, batch):
    torch.manual_seed(0)
    unpadded, padded = both_paths(getattr(minibert, name)(no_dropout(config)).train())
    inputs = labels_for(name, {key: value[[0, 1, 2, 3, 4, 4]] for key, value in batch.items()})
    losses = [model(**inputs).loss for model in (unpadded, padded)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for (key, one), (_, other) in zip(unpadded.named_parameters(), padded.named_parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None, key
        else:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_arithmetic_grows_with_real_tokens_only(model):
    def flops(length, padding):
        ids = torch.ones(4, length + padding, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[1:, length:] = 0
        mask[0, length:] = 0
        ids_only = {"input_ids": ids, "attention_mask": mask}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**ids_only)
        return counter.get_total_flops()

    assert flops(8, 0) == flops(8, 4) == flops(8, 30)
    assert flops(16, 0) > 1.9 * flops(8, 0)
    exact = flops(32, 0)
    model.bfloat16()
    assert flops(32, 0) == exact  # what oneDNN would multiply by itself is counted, too
    model.float()
    model.config.unpad_inputs = False
    assert flops(8, 30) > 3 * flops(8, 0)


def test_every_row_alone_equals_the_row_in_the_batch(model, batch):
    together = model(**batch).last_hidden_state
    for row in range(2):
        real = int(batch["attention_mask"][row].sum())
        alone = model(**{key: value[row : row + 1, :real] for key, value in batch.items()}).last_hidden_state
        torch.testing.assert_close(alone[0], together[row, :real], atol=1e-5, rtol=0)


def test_order_of_the_batch_does_not_matter(model, batch):
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    shuffled = model(**{key: value[order] for key, value in batch.items()}).last_hidden_state
    torch.testing.assert_close(shuffled, model(**batch).last_hidden_state[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_ecosystem_inputs_equal_separate_sequences(model, implementation):
    model.set_attn_implementation(implementation)
    lengths = [5, 9, 1, 9]
    rows = [torch.randint(1, 101, (1, n)) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = model(
        input_ids=torch.cat(rows, dim=1),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=9,
        max_length_k=9,
    ).last_hidden_state
    alone = torch.cat([model(input_ids=row).last_hidden_state for row in rows], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_flattening_collator_of_transformers_feeds_the_model(model):
    from transformers import DataCollatorWithFlattening

    texts = [[7, 8, 9], [4, 5, 6, 7, 8]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    inputs = collate([{"input_ids": ids} for ids in texts])
    inputs.pop("labels", None)
    packed = model(**inputs).last_hidden_state
    alone = torch.cat([model(input_ids=torch.tensor([ids])).last_hidden_state for ids in texts], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- positions by hand


def test_sinusoidal_table_by_hand():
    table = sinusoidal_table(3, 5)
    assert table.shape == (3, 5)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(
        table[2, :2], torch.tensor([2.0]).sin().item() * torch.tensor([1.0, 0]) + torch.tensor([0, -0.41614684])
    )


def test_rotary_scores_depend_on_distance_only():
    query, key = torch.randn(1, 8), torch.randn(1, 8)

    def score(m, n):
        turned = [rotate(x, *(a[0] for a in rotary_angles(torch.tensor([p]), 8, 10000.0))) for x, p in ((query, m), (key, n))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 5), score(10, 12), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score(3, 5), score(3, 6))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_new_words_are_not_drowned_where_embeddings_are_normalised(norm_position):
    torch.manual_seed(0)
    shape = {**TINY, "norm_position": norm_position, "norm_embeddings": True, "scale_embeddings": False}
    model = MiniBertModel(MiniBertConfig.preset("modern-6x384", **shape)).eval()
    ids = torch.arange(5, 15)[None]
    words = model.embeddings(ids, None, torch.arange(10)[None], None)[0]
    expected = model.embeddings.word_embeddings(ids)[0]
    torch.testing.assert_close(words, torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-5))
    hidden = model(ids).last_hidden_state[0]  # each token still resembles its own word most
    alike = torch.cosine_similarity(hidden[:, None], words[None], dim=-1)
    assert alike.argmax(dim=1).tolist() == list(range(10))


# --------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_follows_the_seed_and_rests_outside_training(config, batch):
    model = MiniBertModel(config)

    def output(seed):
        torch.manual_seed(seed)
        return model(**batch).last_hidden_state

    model.train()
    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    model.eval()
    assert torch.equal(output(1), output(2))


# ------------------------------------------------------------------------------------------------------- heads and losses


def loss_and_gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows_at_once", [1000, 3])
@pytest.mark.parametrize("name", ["MiniBertForMaskedLM", "MiniBertForPreTraining"])
def test_masked_positions_only_equals_the_dense_loss(name, config, batch, rows_at_once, monkeypatch):
    monkeypatch.setattr(loss_minibert, "_LOGITS_AT_ONCE", {True: rows_at_once * 101})
    torch.manual_seed(0)
    model = getattr(minibert, name)(no_dropout(config)).train()
    with torch.no_grad():
        model.lm_head.bias.normal_()
    inputs = labels_for(name, batch)
    inputs.pop("next_sentence_label", None)
    logits = "logits" if name.endswith("LM") else "prediction_logits"
    dense, dense_gradients = loss_and_gradients(model, inputs)
    sparse, sparse_gradients = loss_and_gradients(model, inputs | {"return_logits": False})
    assert getattr(dense, logits).shape == (6, 12, 101)
    assert getattr(sparse, logits) is None
    torch.testing.assert_close(dense.loss, sparse.loss)
    assert dense_gradients.keys() == sparse_gradients.keys()
    for key, gradient in dense_gradients.items():
        torch.testing.assert_close(gradient, sparse_gradients[key], atol=1e-6, rtol=1e-4)


def test_masked_loss_under_autocast_equals_the_dense_loss(config, batch):
    torch.manual_seed(0)
    model = minibert.MiniBertForMaskedLM(no_dropout(config)).train()
    inputs = labels_for("MiniBertForMaskedLM", batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, dense_gradients = loss_and_gradients(model, inputs)
        sparse, sparse_gradients = loss_and_gradients(model, inputs | {"return_logits": False})
    torch.testing.assert_close(dense.loss, sparse.loss, atol=2e-3, rtol=1e-3)
    for key, gradient in dense_gradients.items():
        assert sparse_gradients[key].dtype == gradient.dtype
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, sparse_gradients[key] / scale, atol=3e-2, rtol=0)


def test_masked_loss_is_divided_by_the_items_of_all_accumulated_batches(config, batch):
    model = minibert.MiniBertForMaskedLM(no_dropout(config)).train()
    inputs = labels_for("MiniBertForMaskedLM", batch)
    labelled = int((inputs["labels"] != -100).sum())
    inputs["return_logits"] = False
    torch.testing.assert_close(model(**inputs, num_items_in_batch=torch.tensor(4 * labelled)).loss * 4, model(**inputs).loss)


def test_another_loss_function_is_given_the_logits(config, batch):
    model = minibert.MiniBertForMaskedLM(no_dropout(config)).train()
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + len(labels)
    inputs = labels_for("MiniBertForMaskedLM", batch)
    output = model(**inputs, return_logits=False)
    assert output.loss == (inputs["labels"] != -100).sum()
    assert output.logits.shape == (output.loss, 101)


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (torch.tensor([0, 1, 2, 0, 1, 2]), "single_label_classification"),
        (torch.rand(6, 3).round(), "multi_label_classification"),
        (torch.rand(6, 3), "regression"),
    ],
)
def test_problem_types(config, batch, labels, problem_type):
    config = MiniBertConfig(**{**config.to_dict(), "num_labels": 3, "problem_type": problem_type})
    model = minibert.MiniBertForSequenceClassification(config).eval()
    output = model(**batch, labels=labels)
    expected = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }[problem_type](output.logits, labels)
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_reads_real_tokens(config, batch, pooling):
    torch.manual_seed(0)
    model = MiniBertModel(MiniBertConfig(**{**config.to_dict(), "pooling": pooling})).eval()
    output = model(**batch)
    left_padded = output.last_hidden_state[2, 5:]
    vector = left_padded[0] if pooling == "cls" else left_padded.mean(dim=0)
    torch.testing.assert_close(output.pooler_output[2], torch.tanh(model.pooler.dense(vector)))


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_results(config, batch, dtype, tmp_path):
    torch.manual_seed(0)
    model = MiniBertModel(config).eval()
    model.save_pretrained(tmp_path)
    half = MiniBertModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert half.layers[0].attention.query.weight.dtype == dtype
    one, other = half(**batch), model(**batch)
    assert one.last_hidden_state.dtype == one.pooler_output.dtype == torch.float32
    mask = batch["attention_mask"].bool()
    cosine = nn.functional.cosine_similarity(one.last_hidden_state[mask], other.last_hidden_state[mask], dim=-1)
    assert cosine.min() > 0.999


def test_dynamic_quantization_to_int8(model, batch):
    expected = model(**batch).last_hidden_state
    found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)(**batch).last_hidden_state
    mask = batch["attention_mask"].bool()
    assert nn.functional.cosine_similarity(found[mask], expected[mask], dim=-1).min() > 0.98
    assert not torch.equal(found, expected)


def test_sdpa_equals_eager(model, batch):
    mask = batch["attention_mask"].bool()
    one = model(**batch).last_hidden_state[mask]
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**batch).last_hidden_state[mask], one, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_flex_attention_equals_sdpa(batch):
    # flex_attention wants heads of at least 16 numbers
    config = MiniBertConfig.preset("bert-base", vocab_size=101, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = MiniBertModel(config).eval()
    rows = {key: value[[0, 1, 4]] for key, value in batch.items()}
    mask = rows["attention_mask"].bool()
    with torch.no_grad():
        one = model(**rows).last_hidden_state[mask]
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**rows).last_hidden_state[mask], one, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------- what transformers expects of a model


def test_recorded_outputs(model, batch):
    model.set_attn_implementation("eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape == (6, 4, 12, 12)
    real = batch["attention_mask"][1].bool()
    torch.testing.assert_close(output.attentions[0][1, :, 0, real].sum(-1), torch.ones(4))
    assert output.attentions[0][1, :, :7, 7:].abs().max() < 1e-12
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state)


def test_embeddings_in_place_of_ids(model, batch):
    vectors = model.get_input_embeddings()(batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    torch.testing.assert_close(
        model(inputs_embeds=vectors, **inputs).last_hidden_state, model(**batch).last_hidden_state, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(config, batch, reentrant):
    torch.manual_seed(0)
    plain = minibert.MiniBertForMaskedLM(no_dropout(config)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    checkpointed.minibert.layers[0].mlp.up.register_forward_hook(lambda *_: calls.append(1))
    inputs = labels_for("MiniBertForMaskedLM", batch)
    for model in (plain, checkpointed):
        model(**inputs).loss.backward()
    assert len(calls) == 2  # once forward, once recomputed
    for (key, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("tied", [True, False])
def test_resized_vocabulary(config, tied, tmp_path):
    model = minibert.MiniBertForMaskedLM(MiniBertConfig(**{**config.to_dict(), "tie_word_embeddings": tied}))
    model.resize_token_embeddings(107)
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert model.config.vocab_size == words.num_embeddings == decoder.out_features == len(decoder.bias) == 107
    assert (words.weight is decoder.weight) == tied
    output = model(input_ids=torch.tensor([[105, 2, 3]]), labels=torch.tensor([[106, -100, -100]]))
    output.loss.backward()
    model.save_pretrained(tmp_path)
    again = minibert.MiniBertForMaskedLM.from_pretrained(tmp_path)
    model.eval(), again.eval()
    ids = torch.tensor([[106, 5, 7]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_tied_weights_are_stored_once(config, tmp_path):
    from safetensors import safe_open

    minibert.MiniBertForMaskedLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert "minibert.embeddings.word_embeddings.weight" in keys
    assert "lm_head.decoder.weight" not in keys


@pytest.mark.parametrize("name", HEADS)
def test_save_and_load(name, config, batch, tmp_path):
    torch.manual_seed(0)
    model = getattr(minibert, name)(config).eval()
    model.save_pretrained(tmp_path)
    again, report = getattr(minibert, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    inputs = labels_for(name, batch)
    inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    for one, other in zip(model(**inputs).to_tuple(), again.eval()(**inputs).to_tuple(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", HEADS)
def test_every_class_keeps_what_transformers_promises(name, config, batch):
    """Build from tensors alone, return tuples, record, and switch attention: as its common tests ask."""
    kind = getattr(minibert, name)
    torch.manual_seed(0)
    model = kind(config).eval()
    copied = kind.from_pretrained(None, config=copy.deepcopy(config), state_dict=model.state_dict()).eval()
    inputs = {key: value for key, value in labels_for(name, batch).items() if key in batch}
    with torch.no_grad():
        expected = model(**inputs)
        torch.testing.assert_close(copied(**inputs).to_tuple(), expected.to_tuple())
        torch.testing.assert_close(model(**inputs, return_dict=False), expected.to_tuple())
        model.set_attn_implementation("eager")
        recorded = model(**inputs, output_attentions=True, output_hidden_states=True)
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == len(recorded.hidden_states) == config.num_hidden_layers + 1
        model.config.output_hidden_states = False
    assert len(recorded.attentions) == config.num_hidden_layers
    for one, other in zip(expected.to_tuple(), recorded.to_tuple()):
        if name not in ("MiniBertForMaskedLM", "MiniBertForPreTraining", "MiniBertForTokenClassification"):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)  # the others have outputs at padding, too


def test_meta_device_initialisation(config, batch):
    with torch.device("meta"):
        model = MiniBertModel(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    assert torch.isfinite(model.eval()(**batch).last_hidden_state).all()
    assert model.embeddings.word_embeddings.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert model.embeddings.word_embeddings.weight[0].eq(0).all()


@pytest.mark.slow
def test_compiles_into_one_graph_with_dynamic_shapes(model):
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for rows, length in ((2, 7), (3, 11)):
        ids, mask = torch.randint(1, 101, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[0, 5:] = 0
        one = compiled(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(
            one, model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()], atol=1e-5, rtol=0
        )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_code_gives_the_same_vectors():
    model = MiniBertModel(MiniBertConfig.preset("modern-6x384", **TINY)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows, length in ((2, 7), (3, 11)):
        ids, mask = torch.randint(1, 101, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[0, 5:] = 0
        with torch.no_grad():
            ours, theirs = (one(ids, mask).last_hidden_state[mask.bool()] for one in (model, compiled))
        torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_exports(model):
    ids, mask = torch.randint(1, 101, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=40)
    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
    )
    ids, mask = torch.randint(1, 101, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 4:] = 0
    one = program.module()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(one, model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_a_sequence_longer_than_the_positions_is_refused():
    model = MiniBertModel(MiniBertConfig.preset("bert-base", **TINY))
    with pytest.raises(ValueError, match="has 41 tokens .* max_position_embeddings=40; tokenize with truncation"):
        model(input_ids=torch.ones(1, 41, dtype=torch.long))


def test_rotary_positions_have_no_end():
    model = MiniBertModel(MiniBertConfig.preset("modern-6x384", **TINY))
    assert model(input_ids=torch.ones(1, 41, dtype=torch.long)).last_hidden_state.shape == (1, 41, 32)


@pytest.mark.parametrize("token", [101, -1])
def test_an_id_outside_the_vocabulary_is_refused(model, token):
    with pytest.raises(ValueError, match=f"Token id {token} is not in the model's vocabulary of 101"):
        model(input_ids=torch.tensor([[1, token]]))


def test_ids_and_embeddings_exclude_each_other(model):
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), inputs_embeds=torch.zeros(1, 2, 32))
