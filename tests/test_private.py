"""Published and exported files tell nothing about the machine and the data of their publisher."""

import re
import shutil
import tempfile
from pathlib import Path

import pytest

from helpers import ROOT, edit_json, save_family, save_trained, write_recipe, write_rows
from minibert.files.disk import read_settings
from minibert.hub import provenance
from minibert.hub.convert import convert
from minibert.hub.export import export
from minibert.hub.push import build
from minibert.train.recipe import load_recipe
from minibert.train.run import run_recipe

ENVIRONMENT = {"HF_TOKEN": "hf_plantedtoken", "PLANTED": "planted-value", "USER": "planted-user", "LOGNAME": "planted-user"}
HOST = "planted-host"
WORDS = ["boat", "house", "river", "train", "garden", "letter", "winter", "bridge"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Train, publish, convert and export in a folder full of planted names. Return the folder of the outputs and the names."""
    root = tmp_path_factory.mktemp("planted-root") / "ümläut"
    planted = {name: root / f"planted-{name}" for name in ("home", "work", "temporary", "elsewhere")}
    for folder in planted.values():
        folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in {**ENVIRONMENT, "HOME": planted["home"], "TMPDIR": planted["temporary"]}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr("getpass.getuser", lambda: ENVIRONMENT["USER"])
        for function in ("socket.gethostname", "platform.node"):
            monkeypatch.setattr(function, lambda: HOST)
        monkeypatch.chdir(planted["work"])
        run = _train(planted["home"])
        Path("models").mkdir()
        save_family(Path("models/umbrella"))
        shutil.copytree(run / "2-embed", "models/trained")
        for name in ("config.json", "tokenizer_config.json"):
            for model in ("umbrella", "trained"):
                place = f"{Path.cwd()}/models/umbrella"
                edit_json(Path("models", model, name), _name_or_path=place, name_or_path=place, tokenizer_file=place)
        out = planted["elsewhere"] / "out"
        convert("models/umbrella", out / "converted")
        export("models/trained", out / "exported")
        _export_onnx("models/trained", out / "graph")
        monkeypatch.chdir(planted["elsewhere"])  # where the relative paths of the recipe lead nowhere
        for stage in ("2-embed", "4-classify", "5-distill"):
            build(run / stage, out / stage, repo_id="ann/model")
        build(run / "2-embed", out / "bert", repo_id="ann/model", as_bert=True)
        build(out / "converted", out / "published", repo_id="ann/model")
    names = [*ENVIRONMENT.values(), HOST, *("clients", "acme", "umbrella", "quarterly", "payroll"), str(ROOT)]
    return out, [*names, "planted-root", root.name, *map(str, planted.values())]


def _train(home):
    """Run every kind of stage that leaves a trace in a card, on data that only this machine has."""
    Path("clients/acme").mkdir(parents=True)
    rows = [{"query": f"where is the {word}", "answer": f"the {word} stands by the road"} for word in WORDS * 2]
    for name in ("train", "quarterly"):
        write_rows(Path(f"clients/acme/{name}.jsonl"), rows)
    write_rows(home / "payroll.jsonl", [{"text": f"a {word}", "label": number % 2} for number, word in enumerate(WORDS * 2)])
    save_trained(Path("clients/umbrella"))
    texts, pairs = str(home / "payroll.jsonl"), "clients/acme"
    loop = {"max_steps": 2, "batch_size": 4, "max_length": 24}
    stages = [
        {"kind": "tokenizer", "data": [pairs, texts], "vocab_size": 90, "max_length": 24},
        {
            "kind": "embed",
            "model": "clients/umbrella",
            "data": pairs,
            "eval_data": {"path": pairs, "split": "quarterly"},
            **loop,
        },
        {"kind": "evaluate", "data": [{"path": pairs, "split": split} for split in ("quarterly", "train[:50%]")]},
        {"kind": "classify", "model": "clients/umbrella", "data": texts, "eval_data": texts, **loop},
        {
            "kind": "distill",
            "objective": "embedding",
            "teacher": "clients/umbrella",
            "model": "clients/umbrella",
            "data": texts,
            **loop,
        },
    ]
    return run_recipe(load_recipe(write_recipe(home, *stages)), output_dir=home / "runs" / "toy")


def _export_onnx(model, output):
    try:
        from minibert.hub.onnx import export_onnx

        export_onnx(model, output, quantize="int8")
    except ValueError as error:
        if "Export to ONNX needs" not in str(error):
            raise


def _unescaped(data):
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), data.decode("utf-8", "replace"))


def test_no_file_holds_a_planted_name(outputs):
    out, planted = outputs
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len({file.parent for file in files}) > 6
    found = {}
    for file in files:
        data = file.read_bytes()
        text = _unescaped(data)
        if names := [name for name in planted if name.encode() in data or name in text]:
            found[file.relative_to(out).as_posix()] = names
    assert not found


def test_a_student_is_published_with_the_fingerprint_of_its_teacher(outputs):
    settings = read_settings(outputs[0] / "5-distill" / "config_sentence_transformers.json")
    (teacher,) = settings["teachers"]
    assert re.fullmatch("[0-9a-f]{64}", teacher)


def test_names_on_the_hub_stay():
    data = [{"path": "ann/data"}, {"path": "installed-docs"}, {"path": "clients/acme", "split": "train[:9]"}]
    stage = {
        "kind": "distill",
        "name": "small",
        "model": "ann/bert",
        "teacher": "first",
        "tokenizer": "clients/acme",
        "data": data,
    }
    made = {"base_model": "ann/bert", "datasets": {"ann/data": "c" * 40}}
    public = provenance._public(stage, made, {"first", "small"}, {})
    assert [public[name] for name in ("model", "teacher", "tokenizer")] == ["ann/bert", "first", "local tokenizer"]
    assert public["data"] == [
        {"path": "ann/data", "revision": "c" * 40},
        {"path": "installed-docs"},
        {"path": "local data 1", "split": "train[:9]"},
    ]
