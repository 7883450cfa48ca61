"""Model cards: every figure is one that was measured, nothing names the training machine, and the examples run as printed."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from helpers import SETUP, edit_json, run_python, save_model, write_recipe, write_rows
from minibert import train_wordpiece
from minibert.hub import provenance
from minibert.hub import push as publish
from minibert.hub.card import build_card, check_card
from minibert.hub.convert import convert
from minibert.inference.load import load
from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe

WORDS = ["boat", "house", "river", "train", "garden", "letter", "winter", "bridge"]
SHAPE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
POSITIONS = {"max_position_embeddings": 48}
HEADS = {
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "Model": "feature-extraction",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every step that leaves a trace in a card, on a few rows in files of this machine."""
    folder = tmp_path_factory.mktemp("of-somebody")
    data = {"pairs": [], "reviews": []}
    for row in range(24):
        word = WORDS[row % len(WORDS)]
        data["pairs"].append({"query": f"where is the {word} {row}", "answer": f"the {word} {row} stands by the road"})
        data["reviews"].append({"text": f"a {'good' if row % 2 else 'bad'} {word}", "label": "good" if row % 2 else "b|ad"})
    pairs, reviews = (write_rows(folder / f"{name}.jsonl", rows) for name, rows in data.items())
    loop = {"max_steps": 2, "batch_size": 4, "max_length": 24}
    new = {"preset": "search-8x768", **SHAPE, **POSITIONS}
    stages = [
        {"kind": "tokenizer", "data": [pairs, reviews], "vocab_size": 90, "max_length": 24},
        {
            "kind": "classify",
            "model": new,
            "data": reviews,
            "eval_data": reviews,
            **loop,
        },
        {"kind": "embed", "data": pairs, "eval_data": pairs, **loop},
        {"kind": "evaluate", "data": [pairs, {"path": pairs, "split": "train[:50%]"}]},
    ]
    return run_recipe(load_recipe(write_recipe(folder, *stages)), output_dir=folder / "run")


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A folder of untrained models, one for each head, by the names they would have on the Hub."""
    root = tmp_path_factory.mktemp("hub")
    texts = [f"the {word} of anna weber stands in bern, who wrote it in 1931?" for word in WORDS]
    tokenizer = train_wordpiece(texts, vocab_size=75, model_max_length=48, show_progress=False)
    for head in HEADS:
        save_model(root / "ann" / head, tokenizer, head, "bert-base", **SHAPE, **POSITIONS)
    return root


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# --------------------------------------------------------------------------------------------------------------- facts


def test_a_search_model(run):
    card = build_card(run / "3-embed", "ann/search")
    found, metrics = metadata(card), read_metrics(run)
    assert (found["library_name"], found["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert {"minibert", "feature-extraction", "custom_code"} == set(found["tags"])
    assert not {"license", "language", "base_model", "datasets"} & found.keys()  # neither stated nor found
    results = {(one.dataset_split, one.metric_type): one.metric_value for one in ModelCard(card).data.eval_results}
    for split, name in (("validation", "pairs.jsonl"), ("train[:50%]", "pairs.jsonl train[:50%]")):
        measured = next(value for key, value in metrics["evaluate"].items() if key.endswith(name))["systems"]
        assert {key: value for (of, key), value in results.items() if of == split} == measured["model"]
        for system in measured.values():
            assert f"{system['mrr@10']:.4f}" in card
    assert "| metric | this model | bm25 | untrained |" in card
    assert f"| parameters | {metrics['embed']['parameters']:,} |" in card
    weights = (run / "3-embed" / "model.safetensors").stat().st_size
    assert f"| weights | {weights / 1e6:.1f} MB |" in card and "| dtype | F32 |" in card
    assert f"| time of training | {metrics['embed']['train_seconds']:,.0f} s |" in card
    assert f"torch {torch.__version__}" in card and f"transformers {transformers.__version__}" in card
    environment = json.loads((run / "3-embed" / "environment.json").read_text())
    assert environment["cores"] > 0 and f"| processor | {environment['processor']} |" in card
    assert "Texts longer than 24 tokens lose their end." in card and "does not tell upper and lower case apart" in card


def test_a_classifier_and_its_awkward_label(run):
    card = build_card(run / "2-classify", "ann/reviews")
    found, metrics = metadata(card), read_metrics(run)["classify"]
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-classification")
    (result,) = found["model-index"][0]["results"]  # what is evaluated later is another stage's model
    assert result["dataset"] == {"name": "local data 2", "type": "local data 2", "split": "validation"}
    assert {one["type"]: one["value"] for one in result["metrics"]} == {
        name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")
    }
    assert "Its labels: b\\|ad, good." in card and "It knows its 2 labels and no others." in card


def test_the_recipe_is_attached_as_it_ran(run):
    card = build_card(run / "3-embed", None)
    attached = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    ran = yaml.safe_load((run / "recipe.yaml").read_text())
    for stage, original in zip(attached["stages"], ran["stages"], strict=True):
        for name, value in stage.items():
            assert name == "data" or name == "eval_data" or value == original[name]
        assert {name for name, value in original.items() if value is not None} == stage.keys()
        assert all(source["path"] in ("local data 1", "local data 2") for source in stage["data"])


def test_a_copy_is_described_by_the_run_it_comes_from(run, tmp_path):
    shutil.copytree(run / "3-embed", tmp_path / "copy", ignore=shutil.ignore_patterns("*.jsonl", "checkpoints", "stage.json"))
    assert "No recipe is on record" in build_card(tmp_path / "copy", "ann/copy")
    assert build_card(tmp_path / "copy", "ann/x", origin=run / "3-embed") == build_card(run / "3-embed", "ann/x")


def test_a_published_copy_keeps_its_record(run, tmp_path):
    """A model that is pulled and pushed again has the same metrics, recipe, hardware and licence."""
    stated = {"license": "mit", "language": ["en"], "tags": ["mine"]}
    publish.build(run / "3-embed", tmp_path / "published", repo_id="ann/toy", **stated)
    copy = shutil.copytree(tmp_path / "published", tmp_path / "elsewhere" / "pulled")
    publish.build(copy, tmp_path / "again", repo_id="ann/toy")
    for name in ("README.md", "record.json", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_text() == (copy / name).read_text()
    card = (tmp_path / "again" / "README.md").read_text()
    assert metadata(card)["license"] == "mit" and "| metric | this model | bm25 | untrained |" in card
    assert metadata(build_card(copy, "bob/toy", license="apache-2.0"))["license"] == "apache-2.0"
    publish.build(copy, tmp_path / "half", repo_id="bob/half", dtype="bfloat16")  # whose weights are others, from these
    assert ModelCard((tmp_path / "half" / "README.md").read_text()).data.eval_results
    assert str(tmp_path) not in (copy / "record.json").read_text() and "of-somebody" not in (copy / "record.json").read_text()


def test_figures_of_other_weights_are_nobodys(run, tmp_path):
    publish.build(run / "2-classify", tmp_path / "published")
    assert ModelCard(build_card(tmp_path / "published", "ann/x")).data.eval_results
    state = load_file(tmp_path / "published" / "model.safetensors")
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    card = build_card(tmp_path / "published", "ann/x")
    assert "No recipe is on record" in card and "model-index" not in metadata(card)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": [{"kind": "embed"}]}, "stages.0.name: Field required"),
        ({"base_model": 3}, "base_model: Input should be a valid string"),
        ({"evaluations": [{"data": {"path": "a"}, "metrics": {"f1": "good"}}]}, "evaluations.0.metrics.f1: .*number"),
    ],
)
def test_a_malformed_record_of_others_is_a_sentence(heads, tmp_path, changes, words):
    folder = shutil.copytree(heads / "ann" / "Model", tmp_path / "model")
    provenance.write(provenance.Record(base_model="a/b"), folder, {})
    file = folder / "record.json"
    assert metadata(build_card(folder, "ann/x"))["base_model"] == "a/b"
    edit_json(file, **changes)
    with pytest.raises(ValueError, match=f"record.json is damaged .*{words}.*; download the model again, or delete"):
        build_card(folder, "ann/x")


def test_a_converted_model(tmp_path):
    tokenizer = train_wordpiece(["a text of a few words"] * 3, vocab_size=34, model_max_length=16, show_progress=False)
    transformers.BertModel(transformers.BertConfig(vocab_size=34, **SHAPE)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    convert(tmp_path / "bert", tmp_path / "ours")
    file = tmp_path / "ours" / "conversion.json"
    card = build_card(tmp_path / "ours", "ann/ours")
    assert "It was not trained: its weights were converted (bert)" in card and "base_model" not in metadata(card)
    assert str(tmp_path) not in file.read_text()
    edit_json(file, base_model="owner/bert")  # had it come from the Hub
    card = build_card(tmp_path / "ours", "ann/ours")
    assert metadata(card)["base_model"] == "owner/bert" and "converted from `owner/bert` (bert)" in card
    assert "trust_remote_code" not in build_card(tmp_path / "bert", "ann/bert")  # which needs none


def test_what_is_no_finished_model_is_refused(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="contains no config.json"):
        build_card(tmp_path, "ann/model")
    with pytest.raises(ValueError, match="Repo id"):
        build_card(run / "3-embed", "ann/mo del")
    folder = shutil.copytree(run / "2-classify", tmp_path / "damaged")
    (folder / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="metrics.json is damaged"):
        build_card(folder, "ann/model")


# ------------------------------------------------------------------------------------------------------------- snippets

# Runs every example of every card given, in a process that cannot have the package.
RUN = """
import contextlib, io, json, sys
sys.modules["minibert"] = None
found = []
for code in json.load(sys.stdin):
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, space)
    vectors = space.get("vectors")
    found.append({"printed": printed.getvalue(), "vectors": None if vectors is None else vectors.tolist()})
json.dump(found, sys.stdout)
"""


@pytest.mark.slow
def test_the_examples_run_as_printed(run, heads, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    for name in ("2-classify", "3-embed"):
        shutil.copytree(run / name, heads / "ann" / name)
    cards = {path.name: build_card(path, f"ann/{path.name}") for path in sorted((heads / "ann").iterdir())}
    codes = [(name, code) for name, card in cards.items() for code in snippets(card)]
    assert len(codes) == len(HEADS) + 3  # the search model has two
    asked = json.dumps([code for _, code in codes])
    results = json.loads(run_python(RUN, input=asked, cwd=heads))
    ran = [(name, code, result) for (name, code), result in zip(codes, results, strict=True)]
    assert all(result["printed"].strip() for *_, result in ran)
    expected = load(run / "3-embed", device="cpu").encode(["How do I sort a list?", "Put a list in order.", "It is raining."])
    vectors = [result["vectors"] for name, _, result in ran if name == "3-embed"]
    assert len(vectors) == 2
    for found in vectors:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    printed = {name: result["printed"] for name, _, result in ran}
    assert "'label': 'b|ad'" in printed["2-classify"] and "token_str" in printed["ForMaskedLM"]
    assert printed["ForMultipleChoice"].strip() in ("an umbrella.", "a spoon.")


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_its_task(heads, head):
    found = metadata(build_card(heads / "ann" / head, f"ann/{head}"))
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", HEADS[head])


def test_the_template_is_in_the_package():
    assert "card.md" in SETUP["options.package_data"]["minibert.hub"].split()


# ------------------------------------------------------------------------------------------------------------ metadata


def test_what_only_the_publisher_knows(heads):
    fields = {"license": "mit", "language": ["en", "de-CH"], "datasets": "ann/data", "base_model": ["a/b"], "tags": ["mine"]}
    found = metadata(build_card(heads / "ann" / "Model", "ann/model", **fields))
    assert {name: found[name] for name in fields if name != "tags"} == {name: fields[name] for name in fields if name != "tags"}
    assert found["tags"] == ["minibert", "custom_code", "mine"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"license": 3}, "license=3 should be the Hub's id of a licence, such as mit"),
        ({"license": "MIT License"}, "license='MIT License' should be"),
        ({"language": "English"}, "language='English' should be codes of languages"),
        ({"language": False}, "language=False should be"),
        ({"datasets": ["a/b", "a/b/c"]}, "datasets=.*ids of data sets on the Hub"),
        ({"base_model": {"a": "b"}}, "base_model=.*ids of models on the Hub"),
        ({"tags": []}, "tags=\\[\\] should be"),
        ({"licence": "mit"}, "no field licence; its fields are license, "),
        ({"license": 3, "tags": []}, "license=3 .*; tags=\\[\\]"),
    ],
)
def test_fields_of_the_wrong_type_are_named(heads, fields, words):
    with pytest.raises(ValueError, match=words):
        build_card(heads / "ann" / "Model", "ann/model", **fields)


RESULT = {"task": {"type": "fill-mask"}, "dataset": {"name": "a", "type": "a"}, "metrics": [{"type": "loss", "value": 0.5}]}


def card_of(**fields):
    return f"---\n{yaml.safe_dump(fields)}---\n\n# A model\n"


def index_of(**changes):
    return card_of(**{"model-index": [{"name": "a", "results": [{**RESULT, **changes}]}]})


def test_cards_of_others_pass():
    check_card(card_of(license="apache-2.0", pipeline_tag="text-ranking", widget=[{"text": "a"}], co2_eq_emissions=3))
    check_card(index_of())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# A model\n", "has no metadata"),
        ("---\na: [\n---\n", "cannot be read"),
        ("---\n- a\n---\n", "cannot be read"),
        ("---\nlanguage: no\n---\n", "language=False should be"),  # YAML takes the code of Norwegian for a refusal
        (card_of(**{"model-index": "a"}), "cannot be read"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_named(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        check_card(text)
    assert "\n" not in str(caught.value)
