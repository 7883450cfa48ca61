"""Where people change a model, its inputs or torch's defaults, MiniBERT does what BertModel does."""

import copy
import threading

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.modules.module import register_module_forward_hook
from transformers import BertConfig, BertForMaskedLM

import minibert
from helpers import SENTENCES, TINY, run_python, save_trained
from minibert import MiniBertConfig
from minibert.hub.families import FAMILIES

HEADS = ("MiniBertModel", "MiniBertForMaskedLM", "MiniBertForSequenceClassification", "MiniBertForTokenClassification")


def build(name="MiniBertModel", *, dropout=0.0, **options):
    torch.manual_seed(0)
    config = MiniBertConfig(**{**TINY, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **options})
    return getattr(minibert, name)(config).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[9], [7], [5]])).long()
    return {"input_ids": torch.randint(5, TINY["vocab_size"], (3, 9)) * mask, "attention_mask": mask}


# ---------------------------------------------------------------------------------------------- replaced modules


def low_rank(linear):
    return nn.Sequential(nn.Linear(linear.in_features, 4, bias=False), nn.Linear(4, linear.out_features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["query", "up", "pooler", "classifier", "identity"])
def test_any_module_may_stand_in_place_of_a_linear_layer(place, dtype, inputs, tmp_path):
    model = build("MiniBertForSequenceClassification")
    layer = model.minibert.layers[0]
    if place in ("query", "up"):
        parent = layer.attention if place == "query" else layer.mlp
        setattr(parent, place, low_rank(getattr(parent, place)))
    elif place == "pooler":
        model.minibert.pooler.dense = low_rank(model.minibert.pooler.dense)
    else:
        width = model.config.hidden_size
        model.classifier = (
            nn.Identity() if place == "identity" else nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 2))
        )
    model = model.to(dtype)
    logits = model(**inputs).logits
    assert logits.shape == (3, model.config.hidden_size if place == "identity" else 2) and logits.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, atol=0.02, rtol=0.02)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert not any(again.load_state_dict(state))
    torch.testing.assert_close(again(**inputs).logits, logits)


def test_embeddings_may_be_wrapped(inputs):
    model = build()
    expected = model(**inputs).last_hidden_state

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, []

        def forward(self, ids):
            self.calls.append(tuple(ids.shape))
            return self.inner(ids)

    model.set_input_embeddings(Wrapped(model.get_input_embeddings()))
    model.embeddings.token_type_embeddings = Wrapped(model.embeddings.token_type_embeddings)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected)
    assert model.embeddings.token_type_embeddings.calls  # also for default segments


def test_new_embeddings_take_packed_input(inputs):
    model = build("MiniBertForMaskedLM")
    model.resize_token_embeddings(TINY["vocab_size"] + 7)
    inputs["input_ids"][0, 0] = TINY["vocab_size"] + 6
    packed = model(**inputs).logits
    padded = model(**inputs, unpad_inputs=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(packed[real], padded[real])
    with pytest.raises(ValueError, match="not in the model's vocabulary"):
        model(input_ids=torch.tensor([[TINY["vocab_size"] + 7]]))


# -------------------------------------------------------------------------------------------------------- dropout


def test_every_dropout_is_a_module(inputs):
    model = build("MiniBertForSequenceClassification", dropout=0.5).train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    assert model(**inputs).logits.isfinite().all()
    assert build(dropout=1.0).train()(**inputs).last_hidden_state.isfinite().all()


def test_random_numbers_do_not_depend_on_gradients(inputs, monkeypatch):
    """Gradient caching computes a batch without gradients, then again with them, from the same random state."""
    model = build(dropout=0.3).train()
    monkeypatch.setattr("minibert.packing_minibert._BYTES_AT_ONCE", 8 * 4 * TINY["intermediate_size"])  # several blocks
    state = torch.get_rng_state()
    with torch.no_grad():
        cached = model(**inputs).last_hidden_state
    torch.set_rng_state(state)
    torch.testing.assert_close(model(**inputs).last_hidden_state, cached)


# ----------------------------------------------------------------------------------------- offloading, meta tensors


@pytest.mark.parametrize("name", HEADS)
def test_offloading_changes_nothing(name, inputs, tmp_path):
    model = build(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
        offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
        assert torch.equal(offloaded(**inputs)[0], expected)
        offloaded = disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
        assert torch.equal(offloaded(**inputs)[0], expected)


@pytest.mark.parametrize("name", HEADS)
def test_meta_tensors_have_shapes_only(name):
    with torch.device("meta"):
        model = build(name)
        assert model(input_ids=torch.zeros(2, 5, dtype=torch.long))[0].device.type == "meta"


def test_fake_tensors_take_the_padded_path(inputs):
    from torch._subclasses import FakeTensorMode

    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in inputs.items()}
        assert model(**fake).last_hidden_state.shape == (3, 9, model.config.hidden_size)


# ---------------------------------------------------------------------------------------------------- masks, labels


@pytest.mark.parametrize("shape", [(1, 9), (3, 5), (3, 12), (2, 9), (4, 9), (9,)])
def test_a_mask_must_fit_the_batch(shape, inputs):
    model = build()
    with pytest.raises(ValueError, match=r"attention_mask has shape .* but the input has \(3, 9\)"):
        model(inputs["input_ids"], torch.ones(shape))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("unpad_inputs", [True, False])
def test_any_mask_value_but_zero_counts_as_one(pooling, unpad_inputs, inputs):
    model = build(pooling=pooling)
    expected = model(**inputs, unpad_inputs=unpad_inputs)
    scaled = inputs["attention_mask"] * torch.tensor([1, 2, 3, 1, 5, 1, 1, 4, 1])
    found = model(inputs["input_ids"], scaled, unpad_inputs=unpad_inputs)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)


def bert_and_minibert(**options):
    shared = {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", **options}
    shared = {name: value for name, value in shared.items() if name in BertConfig.__annotations__}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**shared, type_vocab_size=2))
    form = {"position_embedding_type": "learned", "norm_position": "post", "scale_embeddings": False, "pooling": "cls"}
    model = minibert.MiniBertForMaskedLM(MiniBertConfig(**shared, **form, type_vocab_size=2))
    tensors, family = bert.state_dict(), FAMILIES["bert"]
    model.load_state_dict({family.minibert_name(name, "ForMaskedLM"): tensor for name, tensor in tensors.items()})
    return bert.train(), model.train()


@pytest.mark.parametrize("return_logits", [True, False])
def test_labels_at_padding_count_as_in_bert(return_logits, inputs):
    bert, model = bert_and_minibert()
    expected = bert(**inputs, labels=inputs["input_ids"])
    found = model(**inputs, labels=inputs["input_ids"], return_logits=return_logits)
    expected.loss.backward()
    found.loss.backward()
    norms = [nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None]) for m in (bert, model)]
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


def test_an_answer_at_padding_keeps_the_loss_finite(inputs):
    model = build("MiniBertForQuestionAnswering")
    ends = torch.tensor([1, 8, 2])  # the second stands at padding
    assert model(**inputs, start_positions=ends, end_positions=ends).loss < 100


def test_logits_come_with_labels_unless_left_out(inputs):
    for name, field in (("MiniBertForMaskedLM", "logits"), ("MiniBertForPreTraining", "prediction_logits")):
        model = build(name).train()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        output = model(**inputs, labels=labels)
        assert getattr(output, field).shape == (3, 9, TINY["vocab_size"])
        short = model(**inputs, labels=labels, return_logits=False)
        assert getattr(short, field) is None
        torch.testing.assert_close(short.loss, output.loss)


# --------------------------------------------------------------------------------------------- process-wide defaults


@pytest.mark.parametrize("form", [{}, {"position_embedding_type": "rotary"}, {"position_embedding_type": "sinusoidal"}])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_torch_defaults_change_nothing(form, default, inputs):
    model = build("MiniBertForMaskedLM", **form).train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels, return_logits=False).loss
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        found = model(**inputs, labels=labels, return_logits=False).loss
        model.train(False)(**inputs)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_parts_of_a_model_may_have_another_dtype(inputs):
    model = build()
    expected = model(**inputs).last_hidden_state
    model.layers[0].to(torch.bfloat16)
    model.layers[1].mlp.double()
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, atol=0.05, rtol=0.05)


def test_double_precision_is_kept():
    model = build(position_embedding_type="rotary").double()
    ids = torch.randint(5, TINY["vocab_size"], (2, 6))
    packed, padded = model(ids).last_hidden_state, model(ids, unpad_inputs=False).last_hidden_state
    assert packed.dtype == torch.float64
    torch.testing.assert_close(packed, padded, atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------- derivatives


def test_functional_derivatives_of_a_padded_batch(inputs):
    model = build("MiniBertForSequenceClassification")
    labels = torch.tensor([0, 1, 0])
    weights = {name: value.detach() for name, value in model.named_parameters()}
    gradients = grad(lambda w: functional_call(model, w, (), {**inputs, "labels": labels}).loss)(weights)
    model(**inputs, labels=labels).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, atol=1e-6, rtol=1e-4)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["attention_mask"]
    assert jacrev(lambda e: model(inputs_embeds=e, attention_mask=mask).logits)(embedded).shape == (3, 2, *embedded.shape)
    moved = vmap(lambda d: model(inputs_embeds=embedded + d, attention_mask=mask).logits)(torch.zeros(4, 1, 1, 1))
    torch.testing.assert_close(moved[3], model(**inputs).logits)


def test_a_second_derivative_is_right_or_refused(inputs):
    model = build("MiniBertForMaskedLM").train()
    model.set_attn_implementation("eager")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def second(**options):
        loss = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], labels=labels, **options).loss
        (first,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), embedded)[0]

    trained = second()
    model.eval()
    torch.testing.assert_close(trained, second())
    with pytest.raises(RuntimeError, match="second derivative"):
        second(return_logits=False)


# ----------------------------------------------------------------------------------------------- hooks, copies, threads


def test_a_hook_sees_padded_states(inputs):
    expected = (3, 9, TINY["hidden_size"])
    for choose in (
        lambda m: m.embeddings,
        lambda m: m.get_input_embeddings(),
        lambda m: m.layers[1],
        lambda m: m.layers[0].mlp,
        lambda m: m.layers[0].attention.query,
    ):
        model, shapes = build(), []
        handle = choose(model).register_forward_hook(lambda _, __, out, shapes=shapes: shapes.append(tuple(out.shape)))
        model(**inputs)
        handle.remove()
        assert shapes == [expected]
    shapes = []
    handle = register_module_forward_hook(
        lambda module, _, out: shapes.append(tuple(out.shape)) if type(module).__name__ == "MiniBertLayer" else None
    )
    model(**inputs)
    handle.remove()
    assert set(shapes) == {expected}


def test_gradient_checkpointing_with_frozen_embeddings_stays_packed(inputs, monkeypatch):
    """As PEFT trains: the hook that makes embeddings require gradients belongs to transformers and follows no shapes."""
    model = build().train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    seen = []
    compute = type(model.layers[0]).forward
    monkeypatch.setattr(type(model.layers[0]), "forward", lambda s, x, *a, **k: seen.append(x.dim()) or compute(s, x, *a, **k))
    model(**inputs).last_hidden_state.sum().backward()
    assert set(seen) == {2}


def test_a_model_opened_from_its_own_code_can_be_hashed(tmp_path):
    build().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['minibert'] = None\n"
        "from datasets.fingerprint import Hasher\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(Hasher.hash(model))"
    )
    assert len({run_python(code, tmp_path) for _ in range(2)}) == 1


def test_prefix_tuning_adds_keys_and_values(inputs):
    from transformers import DynamicCache

    model = build()
    heads, width = TINY["num_attention_heads"], TINY["hidden_size"] // TINY["num_attention_heads"]
    prefix = torch.randn(TINY["num_hidden_layers"], 2, 3, heads, 4, width)
    mask = torch.cat([torch.ones(3, 4, dtype=torch.long), inputs["attention_mask"]], dim=1)

    def run(scale):
        cache = DynamicCache([(k * scale, v * scale) for k, v in prefix])
        return model(inputs["input_ids"], mask, past_key_values=cache)

    assert run(1.0).last_hidden_state.shape == (3, 9, TINY["hidden_size"])
    assert not torch.allclose(run(1.0).pooler_output, run(0.0).pooler_output)


def test_two_threads_share_no_tokenizer(tmp_path):
    """One encodes while the other does: truncation and padding are settings of a tokenizer."""
    from sentence_transformers import SentenceTransformer

    folder = save_trained(tmp_path)
    encoder, model = minibert.Encoder(folder, dtype="float32"), SentenceTransformer(str(folder), device="cpu")
    texts = [SENTENCES[at % 3][: 5 + at] for at in range(40)]
    expected, wrong = encoder.encode(texts), []

    def work(encode):
        for _ in range(10):
            if abs(encode(texts) - expected).max() > 1e-5:
                wrong.append(encode)

    threads = [threading.Thread(target=work, args=[one]) for one in (encoder.encode, lambda t: model.encode(t))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
