"""Verification: a sound model passes, every kind of damage fails the check that is for it, and nothing runs unasked."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import minibert
from helpers import edit_json, edit_weights, read_weights, run_command, save_trained
from minibert import modeling_minibert
from minibert.files.disk import sha256
from minibert.files.model_folder import code_files
from minibert.hub import isolated, remote, verify
from minibert.hub.push import build

NAMES = ["files", "weights", "code", "card", "opens"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An embedding model as it is published."""
    source, folder = (tmp_path_factory.mktemp(name) / "model" for name in ("source", "built"))
    build(save_trained(source), folder)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "model")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A masked-language model, whose weights are tied."""
    source, folder = (tmp_path_factory.mktemp(name) / "model" for name in ("words", "built"))
    build(save_trained(source, "ForMaskedLM"), folder)
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Requests for a fresh process, none of which is started."""
    requests = []

    def run(request, cache=None):
        requests.append(request)
        return {"AutoModel.last_hidden_state": torch.ones(2)}, ["AutoModel"]

    monkeypatch.setattr(isolated, "run", run)
    return requests


def failures(folder, **how):
    return {check.name: check.text for check in verify.checks_of(folder, **how) if check.state == "failed"}


# What is sound


@pytest.mark.slow
def test_a_published_model_passes_in_a_process_of_its_own(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)  # the process works elsewhere, so that a relative path must not reach it
    done = run_command("hub", "verify", "model")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"ok       {name}" for name in NAMES]
    assert "AutoModel (MiniBertModel), pipeline('feature-extraction'), SentenceTransformer." in lines[-1]
    assert f"packing_minibert.py are equal to the installed minibert {minibert.__version__}." in done.stdout


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForPreTraining", "ForQuestionAnswering", "ForMultipleChoice"])
def test_every_class_is_whole(kind, tmp_path):
    source = save_trained(tmp_path / "source", kind)
    build(source, tmp_path / "built", max_shard_size=20_000)
    assert failures(tmp_path / "built") == {}


def test_plain_models_are_known_too(tmp_path):
    source = save_trained(tmp_path / "source", "ForMaskedLM")
    build(source, tmp_path / "plain", as_bert=True)
    checks = {check.name: check.text for check in verify.checks_of(tmp_path / "plain")}
    assert failures(tmp_path / "plain") == {} and checks["code"] == "The model has no code."
    assert "of the expected shapes" in checks["weights"]
    edit_json(tmp_path / "plain" / "config.json", num_hidden_layers=3)
    assert "missing: bert.encoder.layer.2.attention" in failures(tmp_path / "plain")["weights"]


# What is damaged


def test_pickles_are_named_and_nothing_else_is_looked_at(folder, opened):
    (folder / "checkpoints").mkdir()
    torch.save({}, folder / "checkpoints" / "optimizer.pt")  # to be refused unopened
    found = verify.verify(folder)
    assert not found.ok and found.checks[0].text.startswith("checkpoints/optimizer.pt can run code when opened")
    assert {check.name for check in found.checks if check.state == "skipped"} == {"weights", "code", "opens"}
    assert not opened


def test_names_that_lead_out_of_the_folder(folder, opened):
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../other"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "is outside of the folder" in failures(folder, opens=True)["files"]
    shutil.copy(Path(__file__), folder.parent / "secret.txt")
    modules[1]["path"] = "1_Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "vocab.txt").symlink_to(folder.parent / "secret.txt")
    assert "is a link to" in failures(folder, opens=True)["files"]
    assert not opened


def test_weights_that_are_cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])
    found = failures(folder)
    assert list(found) == ["weights"] and "model.safetensors is damaged" in found["weights"]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"layers.0.attention.query.weight": None}, "missing: layers.0.attention.query.weight"),
        ({"layers.0.attention.query.weight": torch.ones(32, 31)}, r"query.weight is [32, 31], not [32, 32]"),
        (
            {"layers.0.attention.query.weight": torch.full((32, 32), float("inf"))},
            "infinity in layers.0.attention.query.weight",
        ),
        ({"layers.9.attention.query.weight": torch.ones(32, 32)}, "unknown: layers.9.attention.query.weight"),
    ],
)
def test_tensors(folder, tensors, sentence):
    stored = set(read_weights(folder))
    assert next(iter(tensors)).replace("9", "0") in stored  # else the case tests nothing
    edit_weights(folder, **tensors)
    found = failures(folder)
    assert list(found) == ["weights"] and sentence in found["weights"]


def test_tied_weights(words, tmp_path):
    folder = shutil.copytree(words, tmp_path / "model")
    table = read_weights(folder)["minibert.embeddings.word_embeddings.weight"]
    edit_weights(folder, **{"lm_head.decoder.weight": table.clone()})
    assert failures(folder) == {}
    edit_weights(folder, **{"lm_head.decoder.weight": table + 1})
    text = failures(folder)["weights"]
    assert (
        "different despite tie_word_embeddings: lm_head.decoder.weight and minibert.embeddings.word_embeddings.weight" in text
    )


@pytest.mark.parametrize(
    ("name", "fields", "check", "sentence"),
    [
        ("config.json", {"pad_token_id": 3}, "opens", "the tokenizer pads with 0, but the model has pad_token_id=3"),
        ("tokenizer_config.json", {"model_max_length": 99}, "opens", "tokenizer allows 99 tokens, but the model has"),
        ("config.json", {"hidden_size": "x"}, "files", "sets 'hidden_size' to 'x'"),
        (
            "config.json",
            {"architectures": ["MiniBertForNo"]},
            "weights",
            "the class MiniBertForNo, which MiniBERT does not have",
        ),
        ("config.json", {"num_hidden_layers": 10**9}, "weights", "describes a model of about 10^13 parameters, but the"),
        ("config.json", {"auto_map": ["x.Y"]}, "code", "config.json sets auto_map to ['x.Y']"),
    ],
)
def test_settings_that_do_not_fit(folder, opened, name, fields, check, sentence):
    edit_json(folder / name, **fields)
    found = failures(folder, opens=True)
    assert sentence in found.get(check, found) and not opened


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("1_Pooling/config.json", {"embedding_dimension": 7}, "vectors have dimension 32, but the modules' configuration"),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "best"},
            "similarity_fn_name='best' in config_sentence_transformers.json is unknown",
        ),
        ("config_sentence_transformers.json", {"default_prompt_name": "no"}, "Default prompt name 'no' not found"),
    ],
)
def test_modules_that_do_not_fit_are_found_by_opening_them(folder, name, fields, sentence):
    edit_json(folder / name, **fields)
    assert sentence in failures(folder, opens=True)["opens"]


def test_vocabulary_and_missing_parts(folder, opened):
    state = read_weights(folder)
    edit_json(folder / "config.json", vocab_size=20)
    edit_weights(folder, **{"embeddings.word_embeddings.weight": state["embeddings.word_embeddings.weight"][:20].clone()})
    assert "has the token id 20, but the model has 20 tokens" in failures(folder, opens=True)["weights"]
    (folder / "tokenizer.json").unlink()
    (folder / "README.md").unlink()
    found = failures(folder, opens=True)
    assert "There is no tokenizer" in found["opens"] and not opened
    assert found["card"] == "The model card README.md is missing; minibert hub push writes a card."
    (folder / "README.md").write_text("---\nlicense: My Own\n---\n")
    assert "license='My Own'" in failures(folder)["card"]


# Code


def add_code(folder, marker):
    """Code in the model's files that leaves a trace when it runs."""
    file = folder / "modeling_minibert.py"
    file.write_text(file.read_text() + f"\nopen({str(marker)!r}, 'w').close()\n")


def test_changed_code_is_shown_and_does_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    add_code(folder, marker)
    done = run_command("hub", "verify", folder)
    assert done.exit_code == 1 and not marker.exists()
    assert "failed   code: The code differs from the installed minibert" in done.stdout
    assert (
        "--- installed/modeling_minibert.py\n+++ modeling_minibert.py\n" in done.stdout and f"+open('{marker}'" in done.stdout
    )
    assert "skipped  opens: Skipped, because these checks did not pass: code." in done.stdout


@pytest.mark.slow
def test_trusted_code_runs(folder, tmp_path):
    marker = tmp_path / "ran"
    add_code(folder, marker)
    trusted = run_command("hub", "verify", folder, "--trust-remote-code", "--json")
    assert trusted.exit_code == 0, trusted.output
    found = json.loads(trusted.stdout)
    assert found["ok"] and marker.exists() and found["checks"][2]["detail"].count("+open(") == 1


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        (
            "config.json",
            {"auto_map": {"AutoModel": "bob/other--modeling_minibert.MiniBertModel"}},
            "bob/other--modeling_minibert",
        ),
        ("config.json", {"custom_pipelines": {"x": {"impl": "pipe.P"}}}, "config.json sets custom_pipelines"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "tok.T"]}}, "tokenizer_config.json refers to code"),
    ],
)
def test_code_that_only_a_name_leads_to(folder, opened, name, fields, reason):
    edit_json(folder / name, **fields)
    assert reason in failures(folder, opens=True)["code"] and not opened


def test_code_that_is_named_but_not_there(folder, opened):
    for file in folder.glob("*.py"):
        file.unlink()
    assert "lists code (auto_map) that is not in the folder" in failures(folder, opens=True)["code"] and not opened


def test_code_in_modules_and_further_files(folder, opened):
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "custom.Module"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "custom.py").write_text("print('hello')\n")
    text = failures(folder, opens=True)["code"]
    assert "modules.json refers to custom.Module" in text and "custom.py is not a file of minibert" in text
    edit_json(folder / "2_Normalize/config.json", activation_function="os.system")
    assert "modules.json refers to os.system" in failures(folder, opens=True)["code"]
    assert not opened


def test_the_installed_code_is_ours(folder):
    code = verify.code_of(folder)
    assert code.state == "installed" and set(code.files) == {file.name for file in code_files()}
    assert code.files["modeling_minibert.py"] == sha256(Path(modeling_minibert.__file__))


# Opening


def test_what_does_not_open_or_gives_no_numbers(folder, monkeypatch):
    def fails(request, cache=None):
        raise isolated.NotOpened("KeyError: 'x'")

    monkeypatch.setattr(isolated, "run", fails)
    assert "cannot be opened in a fresh process without minibert: KeyError" in failures(folder, opens=True)["opens"]
    monkeypatch.setattr(isolated, "run", lambda request, cache=None: ({"AutoModel.x": torch.tensor([float("nan")])}, []))
    assert "not finite in a fresh process without minibert: AutoModel.x" in failures(folder, opens=True)["opens"]


def test_the_request_follows_the_model(folder, words, opened):
    verify.verify(folder)
    verify.verify(words)
    embeds, masked = opened
    assert (embeds.heads, embeds.embeds, embeds.arguments["trust_remote_code"], embeds.max_length) == (
        ["AutoModel"],
        True,
        True,
        24,
    )
    assert (masked.heads, masked.embeds) == (["AutoModel", "AutoModelForMaskedLM"], False)


# Models on the Hub


@pytest.fixture
def hub(hub_server, tmp_path, monkeypatch, opened):
    hub_server.patch(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    return hub_server


@pytest.fixture
def contents(built):
    return {file.relative_to(built).as_posix(): file.read_bytes() for file in built.rglob("*") if file.is_file()}


def test_a_model_on_the_hub(hub, contents, opened):
    commit = hub.add_repo("ann/model", contents)
    hub.add_repo("ann/model", {"config.json": b"{}"})
    done = run_command("hub", "verify", f"ann/model@{commit}", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"] and found["commit"] == commit and [check["name"] for check in found["checks"]] == NAMES
    assert len(opened) == 1


def test_a_pickle_on_the_hub_is_named_but_not_fetched(hub, contents):
    hub.add_repo("ann/model", {**contents, "pytorch_model.bin": b"\0"})
    found = verify.verify("ann/model")
    assert not found.ok and "pytorch_model.bin can run code" in found.checks[0].text
    assert not [path for phase, _, path, _ in hub.requests if phase == "download" and "pytorch" in path]


def test_a_damaged_cache_is_found(hub, contents, tmp_path):
    hub.add_repo("ann/model", contents)
    assert verify.verify("ann/model").ok
    (blob,) = (path.resolve() for path in (tmp_path / "home").rglob("snapshots/*/model.safetensors"))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    os.chmod(blob, 0o644)
    blob.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="model.safetensors of ann/model arrived damaged; delete .*snapshots"):
        verify.verify("ann/model")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "There is no model folder nothing"),
        ("./nothing", "There is no model folder ./nothing"),
        ("ann/nothing", "The Hub has no model ann/nothing"),
    ],
)
def test_wrong_input_is_status_2(hub, name, sentence):
    done = run_command("hub", "verify", name)
    assert done.exit_code == 2 and sentence in done.stderr


def test_a_run_is_no_model(tmp_path):
    done = run_command("hub", "verify", tmp_path)
    assert done.exit_code == 2 and "For a run, give the folder of a stage" in done.stderr


def test_a_hidden_model_needs_a_login(hub, contents, monkeypatch):
    hub.add_repo("ann/model", contents, private=True)
    assert verify.verify("ann/model").ok
    monkeypatch.delenv("HF_TOKEN")
    done = run_command("hub", "verify", "ann/model")
    assert done.exit_code == 2 and "use another login (`hf auth login` or HF_TOKEN)" in done.stderr
