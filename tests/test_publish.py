"""Publishing, against a Hub on the loopback interface: what is pushed is complete, proved, sent once and found again."""

import json
import shutil
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
from minibert.files.model_folder import code_files
from minibert.hub import isolated, parity, remote, verify
from minibert.hub import push as publish
from minibert.hub.push import build, push

CODE = {file.name for file in code_files()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_trained(tmp_path_factory.mktemp("source") / "model")


@dataclass
class Session:
    """A server, what the one real push to it returned and said, and the caches it used."""

    server: object
    home: Path
    done: publish.Published
    said: list[str]


@pytest.fixture(scope="module")
def pushed(source, tmp_path_factory):
    """One push with nothing left out: both proofs are in processes of their own."""
    home = tmp_path_factory.mktemp("home")
    said = []
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.patch(monkeypatch, home)
        done = push(source, "ann/model", license="mit", language=["en"], report=said.append)
        yield Session(server, home, done, said)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """What is published of it."""
    folder = tmp_path_factory.mktemp("built") / "model"
    build(source, folder, repo_id="ann/model")
    return folder


@pytest.fixture
def hub(building_hub, built, monkeypatch):
    """The same with a folder that was built before."""
    monkeypatch.setattr(publish, "build", lambda source, target, **options: shutil.copytree(built, target))
    return building_hub


@pytest.fixture
def building_hub(hub_server, tmp_path, monkeypatch):
    """An empty server that this process takes for the Hub, and proofs that take no time: they are not the subject."""
    hub_server.patch(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: hub_server.waits.append(seconds))
    hub_server.waits = []
    outputs = {"AutoModel.last_hidden_state": torch.ones(2, 3)}
    monkeypatch.setattr(isolated, "compute", lambda request: (outputs, ["AutoModel"]))
    monkeypatch.setattr(isolated, "run", lambda request, cache=None: (outputs, ["AutoModel"]))
    return hub_server


@pytest.fixture
def run(hub_server):
    """Run ``minibert hub ...`` in this process. Whatever it prints, the token is not in it, nor a traceback."""

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


# The whole way


def test_a_push_is_one_commit_of_a_complete_folder(pushed):
    files = pushed.server.files("ann/model")
    module_files = {"modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"}
    written = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE.minibert"}
    written |= {"record.json"}  # of the licence and the language, which only the publisher knows
    assert set(files) - {"2_Normalize/config.json"} == {*CODE, *module_files, *written, ".gitattributes"}
    config = json.loads(files["config.json"])
    assert config["auto_map"] == minibert.configuration_minibert.AUTO_MAP
    for name in CODE:
        assert files[name] == Path(minibert.modeling_minibert.__file__).with_name(name).read_bytes()
    assert files["LICENSE.minibert"].startswith(b"MIT License")  # of the code; that of the weights is for their owner to give
    assert (
        b"license: mit" in files["README.md"]
        and b'SentenceTransformer("ann/model", trust_remote_code=True)' in files["README.md"]
    )
    assert len(pushed.server.commits("ann/model")) == 2  # that of the creation, and ours
    assert pushed.done.commit == pushed.server.commits("ann/model")[-1]


def test_the_token_is_written_nowhere(pushed):
    texts = [file.read_bytes() for file in pushed.home.rglob("*") if file.is_file()]
    texts += [*pushed.server.files("ann/model").values(), str(pushed.done).encode(), str(pushed.said).encode()]
    assert not [text for text in texts if b"hf_token" in text]


def test_both_proofs_open_it_in_every_way_without_a_difference(pushed):
    assert pushed.done.difference == 0
    assert [way.split(" (")[0] for way in pushed.done.opened] == [
        *("AutoTokenizer", "AutoModel", "pipeline('feature-extraction')", "SentenceTransformer")
    ]
    assert [text.split()[0] for text in pushed.said] == ["Built", "Proved", "Uploaded", "Downloaded"]


READER = """
import sys
sys.modules["minibert"] = None
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
vectors = SentenceTransformer("ann/model", trust_remote_code=True).encode(["the quick fox", "a short text ."])
model = AutoModel.from_pretrained("ann/model", trust_remote_code=True, revision=sys.argv[1])
print(type(model).__module__.split(".")[0], vectors.shape, *vectors.ravel().tolist())
"""


def test_a_reader_needs_nothing_of_ours(pushed, source, tmp_path):
    """As on the model's page: by name over the network, and by the hash of the commit."""
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
    request = {"model": "m", "heads": [], "embeds": False, "trust": False, "max_length": 8, "out": str(tmp_path / "out")}
    printed = run_python(IMPORTER, isolated.__file__, input=json.dumps(request))
    assert json.loads(printed) == {"error": "ModuleNotFoundError: import of minibert halted; None in sys.modules"}


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
    assert remote.compare(tmp_path / "one", {}) == remote.compare(tmp_path / "two", {})
    for file in (tmp_path / "one").rglob("*.*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


def test_as_bert_needs_no_code(source, tmp_path):
    build(source, tmp_path / "built", repo_id="ann/model", as_bert=True)
    assert not list((tmp_path / "built").rglob("*.py"))
    assert json.loads((tmp_path / "built" / "config.json").read_text())["model_type"] == "bert"
    assert "trust_remote_code" not in (tmp_path / "built" / "README.md").read_text()
    assert not list((tmp_path / "built").glob("LICENSE*"))  # no code of ours, so nothing that our licence is of
    texts = ["the quick fox", "a short text ."]
    ours, plain = (SentenceTransformer(str(folder)).encode(texts) for folder in (source, tmp_path / "built"))
    assert abs(ours - plain).max() < 1e-5


def test_the_owners_licence_travels_with_the_model(source, tmp_path):
    own = shutil.copytree(source, tmp_path / "own")
    (own / "LICENSE").write_text("Whoever may read this may use it.")
    for as_bert, names in ((False, {"LICENSE", "LICENSE.minibert"}), (True, {"LICENSE"})):
        build(own, tmp_path / str(as_bert), repo_id="ann/model", as_bert=as_bert)
        assert {file.name for file in (tmp_path / str(as_bert)).glob("LICENSE*")} == names
        assert (tmp_path / str(as_bert) / "LICENSE").read_text() == "Whoever may read this may use it."


def test_a_run_gives_its_last_model_and_its_recipe(source, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(source, run / "2-embed")
    stages = [("tokenizer", "tokenizer"), ("embed", "embed"), ("evaluate", "evaluate")]
    lines = [f"- {{kind: {kind}, name: {name}, data: [{{path: {tmp_path}/mine.csv}}]}}" for kind, name in stages]
    (run / "recipe.yaml").write_text("name: mine\nstages:\n" + "\n".join(lines))
    with pytest.raises(FileNotFoundError, match="Stage 2-embed of the run .* is not finished; resume it"):
        publish.model_folder(run)
    (run / "2-embed" / "stage.json").write_text("{}")
    (run / "2-embed" / "log.jsonl").write_text("{}")
    (run / "2-embed" / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "2-embed" / "checkpoints" / "step-1" / "optimizer.safetensors").write_bytes(b"")
    assert publish.model_folder(run) == run / "2-embed"
    build(run / "2-embed", tmp_path / "built")
    assert "path: mine.csv" in (tmp_path / "built" / "recipe.yaml").read_text()
    assert not [path for path in (tmp_path / "built").rglob("*") if "checkpoint" in str(path) or path.name == "log.jsonl"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config_sentence_transformers.json", "{place}/data"),
        ("1_Pooling/config.json", "/home/somebody/x"),
        ("config_sentence_transformers.json", "C:\\\\Users\\\\somebody"),
    ],
)
def test_places_of_this_machine_are_not_published(source, tmp_path, file, text):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    edit_json(folder / file, where=text.format(place=folder))
    with pytest.raises(ValueError, match=f"would name places of this machine: {file} names"):
        build(folder, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_what_the_libraries_note_about_this_machine_is_dropped(source, tmp_path):
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
    assert "ann/model holds something else already" in error and "--force" in error
    assert "changed  config.json  2 bytes -> 1." in error
    assert "removed  old/pytorch_model.bin  2.0 KB" in error and "added    model.safetensors" in error
    assert len(hub.commits("ann/model")) == 1
    run("push", source, "ann/model", "--force")
    assert "old/pytorch_model.bin" not in hub.files("ann/model") and "model.safetensors" in hub.files("ann/model")
    assert ".gitattributes" in hub.files("ann/model")  # which belongs to the Hub


def test_other_content_of_the_same_size_is_other_content(hub, source, model_files, run):
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


def test_what_came_in_between_is_not_replaced(hub, source, run, monkeypatch):
    """Somebody commits while the proof runs, which takes a while."""
    outputs = {"AutoModel.last_hidden_state": torch.ones(2, 3)}
    hub.add_repo("ann/model", {})

    def meanwhile(request, cache=None):
        hub.add_repo("ann/model", {"theirs.txt": b"theirs"})
        return outputs, ["AutoModel"]

    monkeypatch.setattr(isolated, "run", meanwhile)
    assert "changed by somebody else at the same time (412)" in run("push", source, "ann/model", status=2).stderr
    assert set(hub.files("ann/model")) == {"theirs.txt"}


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
        "KB  model.safetensors" in done.stdout
        and "# model" in done.stdout
        and "opened without minibert: AutoModel" in done.stdout
    )


# Proofs that fail


def test_another_output_stops_the_upload_and_is_named(hub, source, run, monkeypatch):
    other = {"AutoModel.last_hidden_state": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.5, 1.0]])}
    monkeypatch.setattr(isolated, "run", lambda request, cache=None: (other, ["AutoModel"]))
    error = run("push", source, "ann/model", status=1).stderr
    assert "AutoModel.last_hidden_state[1, 1] is 1 here and 1.5 there" in error
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
def test_differences_above_a_millionth_are_differences(value):
    with pytest.raises(parity.Mismatch, match=r"vectors\[0\] is 1 here"):
        publish._largest_difference({"vectors": torch.ones(1)}, {"vectors": torch.tensor([value])}, "It")
    assert publish._largest_difference({"v": torch.ones(1)}, {"v": torch.tensor([1 + 5e-7])}, "It") < 1e-6


# Failures of the Hub and of the way there

PHASES = ["create", "info", "refs", "tree", "validate", "preupload", "lfs-batch", "lfs-upload", "commit", "head", "download"]


@pytest.mark.parametrize("phase", PHASES)
def test_after_an_interruption_a_second_push_completes_it(hub, source, run, phase):
    """The connection is reset for good in one phase; nobody ever sees half a model, and the next push finishes."""
    how = {"path": "safetensors"} if phase in ("head", "download") else {}
    fault = hub.fail(phase, after=100, times=1000, **how)
    error = run("push", source, "ann/model", status=2).stderr
    assert "The connection broke while" in error or "changed while" in error, error
    before = hub.repos.get(("models", "ann/model"))
    assert before is None or set(before.commits[before.refs["main"]]) in ({".gitattributes"}, set(files_of(hub)))
    fault.times = 0
    run("push", source, "ann/model")
    assert "model.safetensors" in hub.files("ann/model")
    assert len(hub.commits("ann/model")) == 2


def files_of(hub):
    return hub.files("ann/model")


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, source, run):
    hub.fail("commit", done=True)
    done = json.loads(run("push", source, "ann/model", "--json").stdout)
    assert hub.commits("ann/model")[-1] == done["commit"] and len(hub.commits("ann/model")) == 2


@pytest.mark.parametrize("phase", ["create", "info", "tree", "preupload", "lfs-batch", "lfs-upload", "commit"])
def test_a_failing_hub_is_asked_again(hub, source, run, phase):
    hub.fail(phase, 503, times=2)
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


@pytest.mark.parametrize("phase", ["create", "refs", "tree", "validate", "preupload", "lfs-batch", "lfs-upload", "commit"])
def test_a_hub_that_never_answers_is_given_up(hub, source, run, monkeypatch, phase):
    """It takes the connection, and all that is sent, and is silent; files that arrived before are not sent twice."""
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    fault = hub.fail(phase, delay=20, times=1000)
    assert f"The Hub ({hub.url}) did not answer in time while" in run("push", source, "ann/model", status=2).stderr
    assert remote._limit not in huggingface_hub.get_session().event_hooks["request"]  # a session is not ours to change for good
    fault.times = 0
    run("push", source, "ann/model")
    assert len(hub.commits("ann/model")) == 2


def test_a_limit_of_the_users_own_stays(hub, source, run, monkeypatch):
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    huggingface_hub.get_session().timeout = 30
    hub.fail("commit", delay=0.5)
    run("push", source, "ann/model")


@pytest.mark.parametrize("after", [0, 1000, 90_000])
def test_a_connection_that_breaks_within_the_weights_is_made_again(hub, source, run, after):
    hub.fail("lfs-upload", after=after)
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
    ("phase", "status", "said"),
    [("xet-token", 404, "404 Not Found"), ("xet-token", 403, "403 Forbidden"), ("xet-storage", 400, "400 Bad Request")],
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
    """The Hub names xet for each file that it can give so; where it does not, plain HTTP serves."""
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
        ("info", 401, "The Hub does not accept this login (401)"),
        ("create", 403, "The token may not do this (403): creating ann/model (as the test wants it); use one with write"),
        ("create", 404, "The Hub refused (404) creating ann/model"),
        ("commit", 409, "was changed by somebody else at the same time (409)"),
        ("commit", 412, "was changed by somebody else at the same time (412)"),
        ("create", 429, "too many requests from you (429); run the command again in 3600 seconds."),
        ("commit", 500, "The Hub failed (500) while uploading to ann/model; run the command again later"),
        ("create", 400, "The Hub refused (400) creating ann/model (as the test wants it)."),
    ],
)
def test_refusals_are_one_sentence(hub, source, run, phase, status, sentence):
    hub.fail(phase, status, headers={"Retry-After": "3600"} if status == 429 else {}, times=1000)
    assert sentence in run("push", source, "ann/model", status=2).stderr


def test_logins(hub, source, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept this login (401)" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfAnnThatReadsOnly")
    assert "The token may not do this (403)" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_tokenOfAnnForTestsOnly")
    assert "may write to bob" in run("push", source, "bob/model", status=2).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_bad\x7fn\u00e4me")
    error = run("push", source, "ann/model", status=2).stderr
    assert "hf_bad" not in error and "characters that no token has" in error
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a login; run `hf auth login`, or set HF_TOKEN" in run("push", source, "ann/model", status=2).stderr
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so that nothing can be written" in run("push", source, "ann/model", status=2).stderr
    assert not hub.repos


def test_a_card_that_the_hub_refuses(hub, source, run):
    hub.card_errors = ['"license" must be one of [mit]']
    assert '"license" must be one of' in run("push", source, "ann/model", "--license", "mit", status=2).stderr
    assert "model.safetensors" not in hub.files("ann/model")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model", "noslash"], "'noslash' is no name of a model on the Hub: it lacks the owner"),
        (["model", "ann/a b"], "is no name of a model on the Hub: repo id must use alphanumeric"),
        (["model", "ann/-x"], "is no name of a model on the Hub"),
        (["model", "a/b/c"], "is no name of a model on the Hub"),
        (["model", "ann/x@v1"], "give the branch with --revision v1"),
        (["model", "ann/x", "--revision", "a b"], "--revision=a b is no name of a branch"),
        (["model", "ann/x", "--revision", "v1", "--create-pr"], "made against main"),
        (["model", "ann/x", "--dtype", "int8"], "--dtype=int8 is unknown; use one of float32, float16, bfloat16"),
        (["model", "ann/x", "--max-shard-size", "big"], "--max-shard-size=big is no size; give one such as 500MB"),
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
    assert f"not finite: {name}" in run("push", folder, "ann/x", status=2).stderr
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
    digest = remote.sha256(tmp_path / "out" / "modeling_minibert.py")
    assert f"sha256 {digest}  modeling_minibert.py" in done and f"its code is that {verify.code_of(tmp_path / 'out')}" in done
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == set(model_files)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not [path for phase, _, path, _ in hub.requests if phase == "download" and "pytorch_model" in path]
    assert "is not empty" in run("pull", "ann/model", tmp_path / "out", status=2).stderr


def test_pull_reports_changed_code(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", {**model_files, "modeling_minibert.py": b"# other\n"})
    assert "its code is of no release of ours; minibert hub verify shows" in run("pull", "ann/model", tmp_path / "out").stdout
    assert json.loads(run("pull", "ann/model", tmp_path / "two", "--json").stdout)["code_is"] == "changed"


def test_a_broken_download_goes_on_where_it_stopped(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    hub.fail("download", after=20_000, path="model.safetensors")
    run("pull", "ann/model", tmp_path / "out")
    fetched = [(path.rpartition("/")[2], status) for phase, _, path, status in hub.requests if phase == "download"]
    assert fetched.count(("model.safetensors", 0)) == fetched.count(("model.safetensors", 200)) == 1
    assert len(fetched) == len(model_files) + 1  # the others came once
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model_files["model.safetensors"]


def test_a_file_that_is_not_what_the_hub_holds_is_not_handed_out(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    run("pull", "ann/model", tmp_path / "one")
    (blob,) = (path.resolve() for path in (tmp_path / "home").rglob("snapshots/*/tokenizer.json"))
    blob.write_bytes(blob.read_bytes()[:-1] + b" ")
    assert "tokenizer.json of ann/model arrived damaged; delete" in run("pull", "ann/model", tmp_path / "two", status=2).stderr
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("phase", ["info", "tree", "head", "download"])
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
    assert "There is no model ann/none on the Hub that your token may see" in run("pull", "ann/none", out, status=2).stderr
    assert (
        "has no branch, tag or commit v9; its branches and tags are main." in run("pull", "ann/model@v9", out, status=2).stderr
    )
    assert "nothing behind the @" in run("pull", "ann/model@", out, status=2).stderr
    assert "its weights are pickled (pytorch_model.bin)" in run("pull", "ann/pickled", out, status=2).stderr
    assert "damaged" in run("pull", "ann/damaged", out, status=2).stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no public model ann/hidden" in run("pull", "ann/hidden", out, status=2).stderr
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and ann/other is not in the cache" in run("pull", "ann/other", out, status=2).stderr
    assert not out.exists() and commit


def test_without_the_network(hub, model_files, tmp_path, run, monkeypatch):
    hub.add_repo("ann/model", model_files)
    run("pull", "ann/model", tmp_path / "one")
    asked = len(hub.requests)
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    run("pull", "ann/model", tmp_path / "two")
    assert len(hub.requests) == asked
    assert (tmp_path / "two" / "config.json").read_bytes() == model_files["config.json"]
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    huggingface_hub.close_session()
    assert "cannot be reached; check the connection" in run("pull", "ann/model", tmp_path / "three", status=2).stderr
    hub.start()


def test_a_slow_hub_is_waited_for(hub, model_files, tmp_path, run):
    hub.add_repo("ann/model", model_files)
    for phase in ("info", "tree", "download"):
        hub.fail(phase, delay=0.2)
    begin = time.monotonic()
    run("pull", "ann/model", tmp_path / "out")
    assert time.monotonic() - begin > 0.6
