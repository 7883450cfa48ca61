"""Push to and pull from a Hub on the loopback interface: a pushed model is complete, proved, sent once and found again."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import minibert
from helpers import edit_json, edit_weights, read_weights, run_command, run_python, save_trained
from hub_server import HubServer
from minibert.files.disk import sha256
from minibert.files.model_folder import code_files
from minibert.hub import isolated, parity, remote
from minibert.hub import push as publish
from minibert.hub.push import build, push

CODE = {file.name for file in code_files()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_trained(tmp_path_factory.mktemp("source") / "model")


@dataclass
class Session:
    """A server, the caches of the one real push to it, and the push's result and reports."""

    server: object
    home: Path
    done: publish.Published
    said: list[str]


@pytest.fixture(scope="module")
def pushed(source, tmp_path_factory):
    """Push once with nothing replaced: both proofs run in processes of their own."""
    home = tmp_path_factory.mktemp("home")
    said = []
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.patch(monkeypatch, home)
        done = push(source, "ann/model", license="mit", language=["en"], report=said.append)
        yield Session(server, home, done, said)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Return the folder that is published of ``source``."""
    folder = tmp_path_factory.mktemp("built") / "model"
    build(source, folder, repo_id="ann/model")
    return folder


@pytest.fixture
def hub(building_hub, built, monkeypatch):
    """Return ``building_hub``; a push to it takes the folder ``built`` instead of building another."""
    monkeypatch.setattr(publish, "build", lambda source, target, **options: shutil.copytree(built, target))
    return building_hub


@pytest.fixture
def building_hub(hub_server, tmp_path, monkeypatch):
    """Return an empty server that this process takes for the Hub; proofs take no time."""
    hub_server.patch(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: hub_server.waits.append(seconds))
    hub_server.waits = []
    outputs = {"AutoModel.last_hidden_state": torch.ones(2, 3)}
    monkeypatch.setattr(isolated, "compute", lambda request: (outputs, ["AutoModel"]))
    monkeypatch.setattr(isolated, "run", lambda request, cache=None: (outputs, ["AutoModel"]))
    return hub_server


@pytest.fixture
def run(hub_server):
    """Return a function that runs ``minibert hub ...`` in this process and checks that it prints no token and no traceback."""

    def run(*arguments, status=0):
        done = run_command("hub", *arguments)
        assert done.exit_code == status, done.output
        for token in hub_server.tokens:
            assert token not in done.output
        assert "Traceback" not in done.output
        if status == 2:
            error = done.stderr[done.stderr.index("Error: ") :]
            assert error.count("Error: ") == 1
        return done

    return run


# Complete pushes


@pytest.mark.slow
def test_a_push_is_one_commit_of_a_complete_folder(pushed):
    files = pushed.server.files("ann/model")
    module_files = {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    written = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE.minibert"}
    written |= {"record.json"}  # holds the licence and the language, which only the publisher knows
    assert set(files) - {"2_Normalize/config.json"} == {*CODE, *module_files, *written, ".gitattributes"}
    config = json.loads(files["config.json"])
    assert config["auto_map"] == minibert.configuration_minibert.AUTO_MAP
    for name in CODE:
        assert files[name] == Path(minibert.modeling_minibert.__file__).with_name(name).read_bytes()
    assert files["LICENSE.minibert"].startswith(b"MIT License")  # of the code; only the owner of the weights can license them
    assert (
        b"license: mit" in files["README.md"]
        and b'SentenceTransformer("ann/model", trust_remote_code=True)' in files["README.md"]
    )
    assert len(pushed.server.commits("ann/model")) == 2  # one by the creation of the repository, one by the push
    assert pushed.done.commit == pushed.server.commits("ann/model")[-1]


@pytest.mark.slow
def test_the_token_is_written_nowhere(pushed):
    texts = [file.read_bytes() for file in pushed.home.rglob("*") if file.is_file()]
    texts += [*pushed.server.files("ann/model").values(), str(pushed.done).encode(), str(pushed.said).encode()]
    assert not [text for text in texts if b"hf_token" in text]


@pytest.mark.slow
def test_both_proofs_open_it_in_every_way_without_a_difference(pushed):
    assert pushed.done.difference == 0
    assert [way.split(" (")[0] for way in pushed.done.opened] == [
        *("AutoTokenizer", "AutoModel", "pipeline('feature-extraction')", "SentenceTransformer")
    ]
    assert [text.split()[0] for text in pushed.said] == ["Built", "Checked", "Uploaded", "Downloaded"]


READER = """
import sys
sys.modules["minibert"] = None
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
vectors = SentenceTransformer("ann/model", trust_remote_code=True).encode(["the quick fox", "a short text ."])
model = AutoModel.from_pretrained("ann/model", trust_remote_code=True, revision=sys.argv[1])
print(type(model).__module__.split(".")[0], vectors.shape, *vectors.ravel().tolist())
"""


@pytest.mark.slow
def test_a_reader_does_not_need_the_package(pushed, source, tmp_path):
    """Open the model as its page says: by name over the network, and by the hash of the commit."""
    environment = pushed.server.environment(tmp_path / "reader", token=None)
    printed = run_python(READER, pushed.done.commit, cwd=tmp_path, env=environment)
    package, shape, numbers = printed.split(" ", 1)[0], "(2, 32)", printed.split(") ")[1].split()
    assert package == "transformers_modules" and shape in printed
    expected = SentenceTransformer(str(source)).encode(["the quick fox", "a short text ."]).ravel().tolist()
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=1e-6)


IMPORTER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("isolated", sys.argv[1])
isolated = sys.modules["isolated"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(isolated)
isolated.compute = lambda request: __import__("minibert")
isolated._main()
"""


def test_the_fresh_process_cannot_import_the_package(tmp_path):
    request = {"model": "m", "heads": [], "embeds": False, "arguments": {}, "max_length": 8}
    code = [sys.executable, "-c", IMPORTER, isolated.__file__]
    done = subprocess.run(code, input=json.dumps(request), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: import of minibert halted; None in sys.modules"


# What is built


def test_dtype_labels_shards_and_spare_tensors(tmp_path):
    folder = save_trained(tmp_path / "source", "ForSequenceClassification")
    save_file({"unused": torch.ones(3)}, folder / "converted_from.safetensors")
    build(folder, tmp_path / "built", dtype="bfloat16", max_shard_size=10_000)
    shards = sorted((tmp_path / "built").glob("model-*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 14_000 for file in shards)
    assert not (tmp_path / "built" / "model.safetensors").exists()
    loaded = minibert.MiniBertForSequenceClassification.from_pretrained(tmp_path / "built")
    assert loaded.dtype == torch.bfloat16 and loaded.config.id2label[2] == "good"
    for name, tensor in read_weights(folder).items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16())
    assert load_file(tmp_path / "built" / "converted_from.safetensors")["unused"].dtype == torch.bfloat16


def test_the_same_model_is_built_the_same_twice(source, tmp_path):
    for name in ("one", "two"):
        build(source, tmp_path / name, repo_id="ann/model")
    for file in (tmp_path / "one").rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


def test_as_bert_needs_no_code(source, tmp_path):
    build(source, tmp_path / "built", repo_id="ann/model", as_bert=True)
    assert not list((tmp_path / "built").rglob("*.py"))
    assert json.loads((tmp_path / "built" / "config.json").read_text())["model_type"] == "bert"
    assert "trust_remote_code" not in (tmp_path / "built" / "README.md").read_text()
    assert not list((tmp_path / "built").glob("LICENSE*"))  # without the code, its licence does not apply
    texts = ["the quick fox", "a short text ."]
    vectors, plain = (SentenceTransformer(str(folder)).encode(texts) for folder in (source, tmp_path / "built"))
    assert abs(vectors - plain).max() < 1e-5


def test_the_owners_licence_travels_with_the_model(source, tmp_path):
    own = shutil.copytree(source, tmp_path / "own")
    (own / "LICENSE").write_text("Every reader may use this model.")
    for as_bert, names in ((False, {"LICENSE", "LICENSE.minibert"}), (True, {"LICENSE"})):
        build(own, tmp_path / str(as_bert), repo_id="ann/model", as_bert=as_bert)
        assert {file.name for file in (tmp_path / str(as_bert)).glob("LICENSE*")} == names
        assert as_bert or (tmp_path / "False" / "LICENSE.minibert").read_text().startswith("MIT License")
        assert (tmp_path / str(as_bert) / "LICENSE").read_text() == "Every reader may use this model."


@pytest.mark.parametrize("name", ["LICENSE", "recipe.yaml", "additional_chat_templates", "additional_chat_templates/a.jinja"])
@pytest.mark.parametrize("as_bert", [False, True])
def test_a_link_is_not_published(source, tmp_path, name, as_bert):
    own, secret = shutil.copytree(source, tmp_path / "own"), tmp_path / "secret"
    secret.mkdir() if name.endswith("templates") else secret.write_text("a password")
    (own / name).parent.mkdir(exist_ok=True)
    (own / name).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name} is a link to {secret}"):
        build(own, tmp_path / "built", as_bert=as_bert)
    assert not (tmp_path / "built").exists()


def test_the_links_of_the_hubs_cache_are_published(source, tmp_path):
    blobs, snapshot = tmp_path / "models--ann--name" / "blobs", tmp_path / "models--ann--name" / "snapshots" / "0123abc"
    shutil.copytree(source, blobs)
    (blobs / "LICENSE").write_text("Every reader may use this model.")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    build(snapshot, tmp_path / "built")
    assert (tmp_path / "built" / "LICENSE").read_text() == "Every reader may use this model."


def test_a_run_gives_its_last_model_and_its_recipe(source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(source, run / "2-embed")
    stages = [("tokenizer", "tokenizer"), ("embed", "embed"), ("evaluate", "evaluate")]
    lines = [f"- {{kind: {kind}, name: {name}, data: [{{path: {tmp_path}/mine.csv}}]}}" for kind, name in stages]
    (run / "recipe.yaml").write_text("name: mine\nstages:\n" + "\n".join(lines))
    with pytest.raises(FileNotFoundError, match="The training of .*2-embed is not finished; resume it"):
        publish.model_folder(run)
    (run / "2-embed" / "stage.json").write_text('{"kind": "embed", "name": "embed", "data": []}')
    (run / "2-embed" / "log.jsonl").write_text("{}")
    (run / "2-embed" / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "2-embed" / "checkpoints" / "step-1" / "optimizer.safetensors").write_bytes(b"")
    assert publish.model_folder(run) == run / "2-embed"
    build(run / "2-embed", tmp_path / "built")
    assert "path: local data 1" in (tmp_path / "built" / "recipe.yaml").read_text()
    assert not [path for path in (tmp_path / "built").rglob("*") if "checkpoint" in str(path) or path.name == "log.jsonl"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config_sentence_transformers.json", "{place}/data"),
        ("config_sentence_transformers.json", "/home/somebody/x"),
        ("config_sentence_transformers.json", "C:\\\\Users\\\\somebody"),
    ],
)
def test_places_of_this_machine_are_not_published(source, tmp_path, file, text):
    folder = shutil.copytree(source, tmp_path / "söurce")  # escaped in JSON
    edit_json(folder / file, where=text.format(place=folder))
    with pytest.raises(ValueError, match=f"would show paths of this machine: {file} contains"):
        build(folder, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_headers_of_weights_are_searched_too(source, tmp_path, monkeypatch):
    monkeypatch.setenv("USER", "planted")
    folder = shutil.copytree(source, tmp_path / "source")
    save_file({"a": torch.ones(1)}, folder / "1_Pooling" / "a.safetensors", {"made": "in /data/planted/models"})
    with pytest.raises(ValueError, match="1_Pooling/a.safetensors contains /data/planted/models;"):
        build(folder, tmp_path / "built")


def test_paths_that_the_libraries_record_are_dropped(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(folder / name, _name_or_path=str(folder), name_or_path=str(folder))
    build(folder, tmp_path / "built")
    assert not [file for file in (tmp_path / "built").rglob("*.json") if str(tmp_path) in file.read_text()]


# Second pushes, branches, pull requests


def test_the_same_again_is_no_commit(hub, source, run):
    first = json.loads(run("push", source, "ann/model", "--json").stdout)
    again = json.loads(run("push", source, "ann/model", "--json").stdout)
    assert first["commit"] == again["commit"] and first["changes"] and not again["changes"]
    assert hub.count("commit") == 1 and len(hub.commits("ann/model")) == 2


def test_other_content_needs_force_and_the_difference_is_shown(hub, source, tmp_path, run):
    hub.add_repo("ann/model", {"config.json": b"{}", "old/pytorch_model.bin": b"x" * 2000, ".gitattributes": b""})
    error = run("push", source, "ann/model", status=2).stderr
    assert "ann/model already contains different files" in error and "--force" in error
    assert "changed  config.json  2 bytes -> 1." in error
    assert "removed  old/pytorch_model.bin  2.0 kB" in error and "added    model.safetensors" in error
    assert len(hub.commits("ann/model")) == 1
    run("push", source, "ann/model", "--force")
    assert "old/pytorch_model.bin" not in hub.files("ann/model") and "model.safetensors" in hub.files("ann/model")
    assert ".gitattributes" in hub.files("ann/model")  # which belongs to the Hub


def test_content_of_the_same_size_is_compared(hub, source, model_files, run):
    data = {name: bytearray(model_files[name]) for name in ("config.json", "model.safetensors")}
    for content in data.values():
        content[-1] ^= 1
    hub.add_repo("ann/model", {**model_files, **{name: bytes(content) for name, content in data.items()}})
    error = run("push", source, "ann/model", status=2).stderr
    assert [line.split()[:2] for line in error.splitlines()[2:]] == [["changed", name] for name in data]


def test_a_branch_is_created_and_main_left_alone(hub, source, run):
    main = hub.add_repo("ann/model", {"config.json": b"{}"})
    done = json.loads(run("push", source, "ann/model", "--revision", "v2", "--json").stdout)
    repo = hub.repos["models", "ann/model"]
    assert repo.refs == {"main": main, "v2": done["commit"]}
    assert set(hub.files("ann/model", "v2")) == set(done["files"])
    run("push", source, "ann/model", "--revision", "v2")
    run("push", source, "ann/model", "--force")
    run("push", source, "ann/model", "--revision", "v3")  # of what main holds already: a branch, but no commit
    assert len(repo.commits) == 3 and repo.refs["v3"] == repo.refs["main"]


def test_a_commit_made_during_the_proof_is_not_replaced(hub, source, run, monkeypatch):
    outputs = {"AutoModel.last_hidden_state": torch.ones(2, 3)}
    hub.add_repo("ann/model", {})

    def meanwhile(request, cache=None):
        hub.add_repo("ann/model", {"other.txt": b"other"})
        return outputs, ["AutoModel"]

    monkeypatch.setattr(isolated, "run", meanwhile)
    assert "the repository has changed in the meantime" in run("push", source, "ann/model", status=2).stderr
    assert set(hub.files("ann/model")) == {"other.txt"}


def test_a_pull_request_leaves_the_branch_alone(hub, source, run, tmp_path):
    main = hub.add_repo("ann/model", {"config.json": b"{}"})
    done = run("push", source, "ann/model", "--create-pr").stdout
    assert f"pull request: {hub.url}/ann/model/discussions/1" in done
    assert hub.repos["models", "ann/model"].refs["main"] == main
    assert "model.safetensors" in hub.files("ann/model", "refs/pr/1")
    run("pull", "ann/model@refs/pr/1", tmp_path / "out")


def test_private_is_kept_or_refused(hub, source, run):
    run("push", source, "ann/model", "--private")
    assert hub.repos["models", "ann/model"].private
    hub.add_repo("ann/open", {"config.json": b"{}"})
    assert "ann/open exists and is public" in run("push", source, "ann/open", "--private", "--force", status=2).stderr
    assert len(hub.commits("ann/open")) == 1


def test_a_dry_run_sends_nothing(hub, source, run):
    done = run("push", source, "ann/model", "--dry-run")
    assert hub.requests == []
    assert (
        "kB  model.safetensors" in done.stdout
        and "# model" in done.stdout
        and "opened without minibert: AutoModel" in done.stdout
    )


# Proofs that fail


def test_another_output_stops_the_upload_and_is_named(hub, source, run, monkeypatch):
    other = {"AutoModel.last_hidden_state": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.5, 1.0]])}
    monkeypatch.setattr(isolated, "run", lambda request, cache=None: (other, ["AutoModel"]))
    error = run("push", source, "ann/model", status=1).stderr
    assert "Greatest absolute difference: 0.5 at index (1, 1)" in error and "['AutoModel.last_hidden_state']" in error
    assert hub.count("create") == 0 and not hub.repos


def test_a_folder_that_does_not_open_is_not_uploaded(hub, source, run, monkeypatch):
    def fails(request, cache=None):
        raise isolated.NotOpened("ImportError: no such thing")

    monkeypatch.setattr(isolated, "run", fails)
    assert (
        "cannot be opened in a fresh process without minibert: ImportError" in run("push", source, "ann/model", status=1).stderr
    )
    assert not hub.repos


@pytest.mark.parametrize("value", [1.0 + 3e-6, float("nan")])
def test_differences_above_a_millionth_are_differences(monkeypatch, value):
    def answer(number):
        monkeypatch.setattr(isolated, "run", lambda request, cache: ({"vectors": torch.tensor([number])}, ["AutoModel"]))

    answer(value)
    with pytest.raises(parity.Mismatch, match=r"It computes different outputs .* item \['vectors'\]"):
        publish.prove(None, {"vectors": torch.ones(1)}, "It")
    answer(1 + 5e-7)
    assert publish.prove(None, {"vectors": torch.ones(1)}, "It")[1] < 1e-6


# Failures of the Hub and of the network


@pytest.mark.parametrize("phase", ["info", "lfs-upload", "commit", "download"])
def test_after_an_interruption_a_second_push_completes_it(hub, source, run, phase):
    """Reset every connection of one phase: readers never see half a model, and the next push finishes."""
    how = {"path": "safetensors"} if phase == "download" else {}
    fault = hub.fail(phase, after=100, times=1000, **how)
    error = run("push", source, "ann/model", status=2).stderr
    assert "The connection broke while" in error or "changed while" in error, error
    before = hub.repos.get(("models", "ann/model"))
    assert before is None or set(before.commits[before.refs["main"]]) in ({".gitattributes"}, set(hub.files("ann/model")))
    fault.times = 0
    run("push", source, "ann/model")
    assert "model.safetensors" in hub.files("ann/model")
    assert len(hub.commits("ann/model")) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, source, run):
    hub.fail("commit", done=True)
    done = json.loads(run("push", source, "ann/model", "--json").stdout)
    assert hub.commits("ann/model")[-1] == done["commit"] and len(hub.commits("ann/model")) == 2


def test_a_failing_hub_is_asked_again(hub, source, run):
    for phase in ("create", "info", "preupload", "lfs-batch", "lfs-upload", "commit"):
        hub.fail(phase, 503, times=2)
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


@pytest.mark.parametrize("phase", ["create", "lfs-upload"])
def test_a_hub_that_never_answers_is_given_up(hub, source, run, monkeypatch, phase):
    """Keep silent after taking the connection and the request."""
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    fault = hub.fail(phase, delay=20, times=1000)
    assert f"The Hub ({hub.url}) did not answer in time while" in run("push", source, "ann/model", status=2).stderr
    assert remote._limit not in huggingface_hub.get_session().event_hooks["request"]  # the session is shared
    fault.times = 0
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


def test_a_time_limit_of_the_caller_stays(hub, source, run, monkeypatch):
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    huggingface_hub.get_session().timeout = 30
    hub.fail("commit", delay=0.5)
    run("push", source, "ann/model")


def test_a_connection_that_breaks_within_the_weights_is_made_again(hub, source, run):
    hub.fail("lfs-upload", after=90_000)
    run("push", source, "ann/model")
    assert [status for phase, _, _, status in hub.requests if phase == "lfs-upload"] == [0, 200]


# Xet, which huggingface_hub uses instead of LFS where hf_xet is installed


def test_weights_go_through_xet_where_it_is_there(hub, source, model_files, run, monkeypatch):
    pytest.importorskip("hf_xet")
    hub.use_xet(monkeypatch)
    run("push", source, "ann/model")
    assert hub.files("ann/model")["model.safetensors"] == model_files["model.safetensors"]
    assert hub.count("xet-storage") >= 2 and hub.count("lfs-batch") == hub.count("lfs-upload") == 0
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


@pytest.mark.parametrize(
    ("phase", "status", "said"), [("xet-token", 404, "404 Not Found"), ("xet-storage", 400, "400 Bad Request")]
)
def test_a_storage_that_refuses_is_one_sentence(hub, source, run, monkeypatch, phase, status, said):
    pytest.importorskip("hf_xet")
    hub.use_xet(monkeypatch)
    fault = hub.fail(phase, status, times=1000)
    error = run("push", source, "ann/model", status=2).stderr
    assert f"The storage of the Hub (xet) failed ({said}) while uploading to ann/model" in error and "xet_for" not in error
    assert "HF_HUB_DISABLE_XET=1" in error and "model.safetensors" not in hub.files("ann/model")
    fault.times = 0
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


def test_a_download_needs_no_xet(hub, model_files, tmp_path, run, monkeypatch):
    pytest.importorskip("hf_xet")
    hub.use_xet(monkeypatch)
    hub.add_repo("ann/model", model_files)
    run("pull", "ann/model", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model_files["model.safetensors"]


def test_a_wish_to_wait_is_followed(hub, source, run):
    hub.fail("create", 429, headers={"Retry-After": "7"})
    run("push", source, "ann/model")
    assert hub.waits == [7]


@pytest.mark.parametrize(
    ("phase", "status", "sentence"),
    [
        ("info", 401, "The Hub refused looking up ann/model (401: as the test wants it); log in with `hf auth login`"),
        ("create", 403, "The Hub refused creating ann/model (403: as the test wants it); use a token with write permission"),
        ("commit", 409, "(409: as the test wants it); the repository has changed in the meantime"),
        ("create", 429, "because of too many requests; run the command again in 3600 seconds."),
        ("commit", 500, "The Hub refused uploading to ann/model (500: as the test wants it); run the command again later"),
        ("create", 400, "The Hub refused creating ann/model (400: as the test wants it)."),
    ],
)
def test_refusals_are_one_sentence(hub, source, run, phase, status, sentence):
    hub.fail(phase, status, headers={"Retry-After": "3600"} if status == 429 else {}, times=1000)
    assert sentence in run("push", source, "ann/model", status=2).stderr


def test_logins(hub, source, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "(401: Invalid credentials" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfAnnThatReadsOnly")
    assert "(403: You don't have the rights" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfAnnForTestsOnly")
    assert "may write to bob" in run("push", source, "bob/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_bad\x7fn\u00e4me")
    error = run("push", source, "ann/model", status=2).stderr
    assert "hf_bad" not in error and "token contains invalid characters" in error
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a login; run `hf auth login`, or set HF_TOKEN" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    assert (
        "Writing to ann/model is not possible offline; unset HF_HUB_OFFLINE"
        in run("push", source, "ann/model", status=2).stderr
    )
    assert not hub.repos


def test_a_card_that_the_hub_refuses(hub, source, run):
    hub.card_errors = ['"license" must be one of [mit]']
    assert '"license" must be one of' in run("push", source, "ann/model", "--license", "mit", status=2).stderr
    assert "model.safetensors" not in hub.files("ann/model")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model", "noslash"], "'noslash' is not a valid model name on the Hub; use USER/NAME"),
        (["model", "ann/a b"], "Repo id must use alphanumeric"),
        (["model", "a/b/c"], "'a/b/c' is not a valid model name on the Hub"),
        (["model", "ann/x@v1"], "give the branch with --revision v1"),
        (["model", "ann/x", "--revision", "a b"], "--revision=a b is not a valid branch name"),
        (["model", "ann/x", "--revision", "v1", "--create-pr"], "always targets main"),
        (["model", "ann/x", "--dtype", "int8"], "dtype=int8 is unknown; use float32, float16 or bfloat16"),
        (["model", "ann/x", "--max-shard-size", "big"], "--max-shard-size=big is not a size; use a size such as 500MB"),
        (["model", "ann/x", "--license", "My Own!"], "license='My Own!' should be"),
        (["nothing", "ann/x"], "There is no model folder nothing"),
    ],
)
def test_bad_input(building_hub, source, run, monkeypatch, arguments, sentence):
    monkeypatch.chdir(source.parent)
    assert sentence in run("push", *arguments, status=2).stderr
    assert not building_hub.repos


def test_folders_that_are_no_finished_model(building_hub, source, tmp_path, run):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    (folder / "checkpoints").mkdir()
    assert "training of" in run("push", folder, "ann/x", status=2).stderr
    (folder / "checkpoints").rmdir()
    name, tensor = next(iter(read_weights(folder).items()))
    edit_weights(folder, **{name: tensor * float("nan")})
    assert f"infinity in {name}" in run("push", folder, "ann/x", status=2).stderr
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in run("push", folder, "ann/x", status=2).stderr
    (folder / "config.json").unlink()
    run("push", folder, "ann/x", status=2)
    assert not building_hub.repos


# Pull


@pytest.fixture
def model_files(built):
    return {file.relative_to(built).as_posix(): file.read_bytes() for file in built.rglob("*") if file.is_file()}


def test_pull_is_one_commit_without_pickles(hub, model_files, tmp_path, run):
    commit = hub.add_repo("ann/model", {**model_files, "pytorch_model.bin": b"\0pickle", "photo.png": b"\0"})
    hub.add_repo("ann/model", {"config.json": b"{}"}, ref="other")
    done = run("pull", f"ann/model@{commit[:10]}", tmp_path / "out").stdout
    assert f"ann/model at commit {commit}" in done and "left out: photo.png, pytorch_model.bin" in done
    digest = sha256(tmp_path / "out" / "modeling_minibert.py")
    assert f"sha256 {digest}  modeling_minibert.py" in done and "its code is that of the installed minibert" in done
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == set(model_files)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not [path for phase, _, path, _ in hub.requests if phase == "download" and "pytorch_model" in path]
    assert "is not empty" in run("pull", "ann/model", tmp_path / "out", status=2).stderr


def test_pull_reports_changed_code(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", {**model_files, "modeling_minibert.py": b"# other\n"})
    assert "; minibert hub verify shows the differences" in run("pull", "ann/model", tmp_path / "out").stdout
    assert json.loads(run("pull", "ann/model", tmp_path / "two", "--json").stdout)["code_is"] == "changed"


def test_a_broken_download_goes_on_where_it_stopped(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    hub.fail("download", after=20_000, path="model.safetensors")
    run("pull", "ann/model", tmp_path / "out")
    fetched = [(path.rpartition("/")[2], status) for phase, _, path, status in hub.requests if phase == "download"]
    assert fetched.count(("model.safetensors", 0)) == fetched.count(("model.safetensors", 200)) == 1
    assert len(fetched) == len(model_files) + 1  # the others came once
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model_files["model.safetensors"]


def test_a_file_damaged_in_the_cache_is_refused(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    run("pull", "ann/model", tmp_path / "one")
    (blob,) = (path.resolve() for path in (tmp_path / "home").rglob("snapshots/*/tokenizer.json"))
    blob.write_bytes(blob.read_bytes()[:-1] + b" ")
    assert "tokenizer.json of ann/model arrived damaged; delete" in run("pull", "ann/model", tmp_path / "two", status=2).stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("phase", ["info", "download"])
def test_an_interrupted_pull_leaves_nothing(hub, model_files, tmp_path, run, phase):
    hub.add_repo("ann/model", model_files)
    fault = hub.fail(phase, after=10, times=1000)
    run("pull", "ann/model", tmp_path / "out", status=2)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    fault.times = 0
    run("pull", "ann/model", tmp_path / "out")


def test_what_cannot_be_pulled(hub, model_files, tmp_path, run, monkeypatch):
    commit = hub.add_repo("ann/model", model_files)
    hub.add_repo("ann/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\0"})
    hub.add_repo("ann/hidden", model_files, private=True)
    hub.add_repo("ann/damaged", {**model_files, "model.safetensors": model_files["model.safetensors"][:-1]})
    out = tmp_path / "out"
    assert "The Hub has no model ann/none that this login may see" in run("pull", "ann/none", out, status=2).stderr
    assert "has no branch, tag or commit v9; use another, or leave it out." in run("pull", "ann/model@v9", out, status=2).stderr
    assert "'ann/model@' is not a valid model name on the Hub; use USER/NAME" in run("pull", "ann/model@", out, status=2).stderr
    assert "its weights are pickled (pytorch_model.bin)" in run("pull", "ann/pickled", out, status=2).stderr
    assert "damaged" in run("pull", "ann/damaged", out, status=2).stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "The Hub has no model ann/hidden that this login may see" in run("pull", "ann/hidden", out, status=2).stderr
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and the cache lacks a part of ann/other" in run("pull", "ann/other", out, status=2).stderr
    assert not out.exists() and commit


def test_without_the_network(hub, model_files, tmp_path, run, monkeypatch):
    hub.add_repo("ann/model", model_files)
    run("pull", "ann/model", tmp_path / "one")
    (snapshot,) = (tmp_path / "home").rglob("snapshots/*")
    (snapshot / "other.bin").write_bytes(b"")  # as another program may download it
    asked = len(hub.requests)
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    run("pull", "ann/model", tmp_path / "two")
    assert len(hub.requests) == asked
    assert (tmp_path / "two" / "config.json").read_bytes() == model_files["config.json"]
    assert not (tmp_path / "two" / "other.bin").exists()
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    huggingface_hub.close_session()
    assert "cannot be reached; check the connection" in run("pull", "ann/model", tmp_path / "three", status=2).stderr
    hub.start()


def test_a_branch_that_moves_during_a_pull_is_refused(hub, model_files, tmp_path, run, monkeypatch):
    hub.add_repo("ann/model", model_files)
    look_up = remote.look_up

    def then_commit(*arguments):
        found = look_up(*arguments)
        hub.add_repo("ann/model", {**model_files, "new.txt": b""})
        return found

    monkeypatch.setattr(remote, "look_up", then_commit)
    assert "ann/model changed while downloading it" in run("pull", "ann/model", tmp_path / "out", status=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_slow_hub_is_waited_for(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    for phase in ("info", "tree", "download"):
        hub.fail(phase, delay=0.2)
    begin = time.monotonic()
    run("pull", "ann/model", tmp_path / "out")
    assert time.monotonic() - begin > 0.6
