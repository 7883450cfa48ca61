"""Versions: what the first release saved loads for ever, and code that travels says which transformers it needs."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers import SETUP, run_python
from minibert import MiniBertModel, configuration_minibert
from minibert.configuration_minibert import OLDEST_TRANSFORMERS
from minibert.files.model_folder import code_files
from minibert.inference.load import load

# Written by version 0.1.0; never write them again. If one of these tests fails, it is the code that has to read them.
FIRST = Path(__file__).parent / "data" / "first-release"
HEADS = {"words": AutoModelForMaskedLM, "classes": AutoModelForSequenceClassification}


def expected(name):
    return json.loads((FIRST / name / "expected.json").read_text(encoding="utf-8"))


def test_vectors_of_the_first_release_stay_the_same():
    known = expected("embed")
    vectors = load(FIRST / "embed", device="cpu").encode(known["texts"], convert_to_tensor=True)
    torch.testing.assert_close(vectors, torch.tensor(known["vectors"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_the_first_release_stay_the_same(name, tmp_path):
    known = expected(name)
    tokenizer = AutoTokenizer.from_pretrained(FIRST / name, trust_remote_code=False)
    model, report = HEADS[name].from_pretrained(FIRST / name, output_loading_info=True, trust_remote_code=False)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = tokenizer(known["texts"], padding=True, truncation=True, return_tensors="pt")
    if not model.config.type_vocab_size:
        del batch["token_type_ids"]
    with torch.inference_mode():
        logits = model.eval()(**batch).logits
    logits = logits[:, 0] if logits.dim() == 3 else logits
    torch.testing.assert_close(logits, torch.tensor(known["logits"]), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)  # and this version writes what that one did
    assert stored(tmp_path) == stored(FIRST / name)


def stored(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def test_the_first_release_would_not_load_under_other_names():
    """That the tests above can fail: a renamed parameter is a missing one."""
    names = {name.replace("attention.query", "attention.q") for name in stored(FIRST / "embed")}
    assert names - set(MiniBertModel.from_pretrained(FIRST / "embed").state_dict())


# The code of a checkpoint, opened with a transformers that calls itself older or newer.
OPEN = """
import json, sys, transformers
found = {}
for version in sys.argv[2:]:
    transformers.__version__ = version
    try:
        found[version] = type(transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__
    except ImportError as error:
        found[version] = str(error)
json.dump(found, sys.stdout)
"""


def test_an_older_transformers_is_named_with_the_way_out(tmp_path, monkeypatch):
    folder = shutil.copytree(FIRST / "embed", tmp_path / "model")
    for file in code_files():
        shutil.copy(file, folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "code"))
    older, oldest = ("4.57.6", "5.3.0"), f"{OLDEST_TRANSFORMERS}.0.dev0"
    found = json.loads(run_python(OPEN, folder, *older, oldest, cwd=tmp_path))
    assert found.pop(oldest) == "MiniBertConfig"
    for version, message in found.items():
        assert message.startswith(f"MiniBERT needs transformers {OLDEST_TRANSFORMERS} or newer, but this is {version}; ")
        assert "pip install -U transformers" in message and "minibert hub export --to bert" in message


@pytest.mark.parametrize("version", ["5.10.1", "6.0.0"])
def test_versions_are_compared_as_numbers(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    assert runpy.run_path(configuration_minibert.__file__)["OLDEST_TRANSFORMERS"] == OLDEST_TRANSFORMERS


def test_the_package_itself_asks_for_no_older_one():
    (wanted,) = (Requirement(line) for line in SETUP["options"]["install_requires"].split() if line.startswith("transformers"))
    assert not wanted.specifier.contains("5.3.0")
    assert Requirement(f"transformers>={OLDEST_TRANSFORMERS}").specifier.contains(str(wanted.specifier).removeprefix(">="))
