"""A saved folder in the hands of plain transformers and sentence-transformers, with the package and without it."""

import json
import textwrap

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline

import minibert
from helpers import run_python, save_model
from minibert import MiniBertConfig
from minibert.configuration_minibert import AUTO_MAP
from minibert.files.model_folder import code_files

CLASSES = {auto: path.split(".")[1] for auto, path in AUTO_MAP.items() if auto != "AutoConfig"}
CODE = {file.name for file in code_files()}
TEXTS = ["the cat sat on the mat", "a dog", "the mat sat"]


@pytest.fixture(scope="module")
def tokenizer():
    return minibert.train_wordpiece(TEXTS * 3, vocab_size=60, model_max_length=40)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """One saved folder per class, each with a tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    for name in CLASSES.values():
        save_model(root / name, tokenizer, name.removeprefix("MiniBert"), "modern-6x384")
    return root


def without_the_package(code, *arguments):
    """Run code in a fresh process where minibert cannot be imported; returns what it printed as JSON."""
    code = "import sys; sys.modules['minibert'] = None\n" + textwrap.dedent(code)
    return json.loads(run_python(code, *arguments, timeout=300).splitlines()[-1])


@pytest.mark.parametrize("auto", CLASSES)
def test_auto_classes_know_us_once_the_package_is_imported(auto, folders):
    model = getattr(transformers, auto).from_pretrained(folders / CLASSES[auto])
    assert type(model) is getattr(minibert, CLASSES[auto])


def test_a_saved_folder_is_complete(folders):
    for name in CLASSES.values():
        found = {path.name for path in (folders / name).iterdir()}
        assert {"config.json", "model.safetensors", *CODE} <= found
        assert json.loads((folders / name / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_every_head_loads_without_the_package(folders, tokenizer):
    found = without_the_package(
        """
        import json, sys, torch, transformers
        root, classes, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
        sums = {}
        for auto, name in classes.items():
            folder = f"{root}/{name}"
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
            assert "transformers_modules" in type(model).__module__
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            if name.endswith("MultipleChoice"):
                inputs = {key: value.unsqueeze(0) for key, value in inputs.items()}
            with torch.no_grad():
                sums[name] = [value.double().sum().item() for value in model(**inputs).to_tuple()]
        # any head loads from any folder: the map is complete
        other = transformers.AutoModelForTokenClassification.from_pretrained(
            f"{root}/MiniBertModel", trust_remote_code=True
        )
        assert type(other).__name__ == "MiniBertForTokenClassification"
        # and what was loaded this way is saved as complete as it was
        other.save_pretrained(f"{root}/again")
        print(json.dumps(sums))
        """,
        folders,
        json.dumps(CLASSES),
        json.dumps(TEXTS),
    )
    for auto, name in CLASSES.items():
        model = getattr(transformers, auto).from_pretrained(folders / name).eval()
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        if name.endswith("MultipleChoice"):
            inputs = {key: value.unsqueeze(0) for key, value in inputs.items()}
        with torch.no_grad():
            expected = [value.double().sum().item() for value in model(**inputs).to_tuple()]
        assert found[name] == pytest.approx(expected, abs=1e-4), name
    assert json.loads((folders / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in (folders / "again").glob("*.py")} == CODE


def test_sentence_transformers_without_the_package(folders, tokenizer):
    found = without_the_package(
        """
        import json, sys
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
        print(json.dumps(model.encode(json.loads(sys.argv[2])).tolist()))
        """,
        folders / "MiniBertModel",
        json.dumps(TEXTS),
    )
    model = minibert.MiniBertModel.from_pretrained(folders / "MiniBertModel").eval()
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-5, rtol=0)


def test_pipelines(folders):
    def build(task, name):
        return pipeline(task, model=str(folders / name), tokenizer=str(folders / name), device="cpu")

    words = build("fill-mask", "MiniBertForMaskedLM")("the [MASK] sat", top_k=2)
    assert len(words) == 2 and all(0 < word["score"] < 1 for word in words)
    label = build("text-classification", "MiniBertForSequenceClassification")("the cat")[0]
    assert label["label"] in ("LABEL_0", "LABEL_1") and 0.5 <= label["score"] <= 1
    tags = build("token-classification", "MiniBertForTokenClassification")("the cat sat")
    assert [tag["index"] for tag in tags] == list(range(1, len(tags) + 1))
    vectors = build("feature-extraction", "MiniBertModel")("the cat", return_tensors=True)
    assert vectors.shape[2] == 32


def test_automatic_device_map(folders):
    model = AutoModel.from_pretrained(folders / "MiniBertModel", device_map="cpu", dtype="auto")
    assert model.dtype == torch.float32 and model.device.type == "cpu"


def test_config_and_tokenizer_load_by_auto_classes(folders):
    assert type(AutoConfig.from_pretrained(folders / "MiniBertModel")) is MiniBertConfig
    assert AutoTokenizer.from_pretrained(folders / "MiniBertModel").model_input_names == [
        "input_ids",
        "token_type_ids",
        "attention_mask",
    ]


def test_the_package_is_not_slower_to_import_than_bert():
    """Counted in modules, not in seconds: whatever minibert pulls in, BertModel pulls in too."""
    ours, theirs = (
        int(run_python(code))
        for code in (
            "import sys, minibert; print(len([m for m in sys.modules if not m.startswith('minibert')]))",
            "import sys; from transformers import BertModel; print(len(sys.modules))",
        )
    )
    assert ours <= theirs + 10
