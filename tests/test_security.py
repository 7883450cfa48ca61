"""Hostile models: none of their code runs, nothing eats memory, and no file outside of their folder is read unasked."""

import copy
import json
import os
import pickle
import random
import resource
import shutil
import time

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from helpers import edit_json, run_python, save_model
from minibert import train_wordpiece
from minibert.files import model_folder
from minibert.files.model_folder import HEADER_LIMIT, check_file, check_model, check_paths, read_header
from minibert.hub import folders
from minibert.inference.load import find_model, load
from minibert.train.recipe import load_recipe
from minibert.train.run import run_recipe

TENSORS = {
    "layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers.0.bias": np.ones(4, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


def stored(header, size=0, *, length=None):
    """The bytes of a safetensors file with this header (a mapping, text or bytes) before ``size`` bytes."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.fixture
def write(tmp_path):
    def write(data):
        file = tmp_path / "model.safetensors"
        file.write_bytes(data)
        return file

    return write


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole model folder, as training leaves it."""
    folder = tmp_path_factory.mktemp("good") / "model"
    tokenizer = train_wordpiece(["a text of a few words"] * 3, vocab_size=34, model_max_length=16, show_progress=False)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return save_model(folder, tokenizer, "ForSequenceClassification", max_position_embeddings=16, **shape)


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------ headers


def test_what_safetensors_writes_passes(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt", "a": "b"})
    assert read_header(file) == {
        "layers.0.weight": ("F32", [3, 4]),
        "layers.0.bias": ("F16", [4]),
        "steps": ("I64", []),
        "empty": ("F32", [0, 3]),
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it has 0 bytes, which hold no header"),
        (b"\x01\x02\x03", "it has 3 bytes"),
        (stored({}, length=2**63), "header of 9,223,372,036,854,775,808 bytes, but ends"),
        (stored({}, length=100), "should begin with a header of 100 bytes, but ends 2 bytes later"),
        (stored("nonsense"), "its header is not JSON"),
        (stored(b"\xff\xfe{}"), "its header is not JSON"),
        (stored("[]"), "its header is no JSON object"),
        (stored("[" * 100_000), "nested too deeply"),
        (stored('{"a": ' * 100_000), "nested too deeply"),
        (stored("{" + "9" * 10_000 + "}"), "its header is not JSON"),
        (stored('{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % ("9" * 5000)), "its header is not JSON"),
        (stored('{"a": {}, "a": {}}'), "gives a name twice"),
        (stored({"a": 3}), "tensor 'a' is not described by dtype, shape and data_offsets"),
        (stored({"a": tensor(code="x")}, 8), "is not described by"),
        (stored({"__metadata__": {"a": 3}}), "__metadata__ is no object of strings"),
        (stored({"a": tensor("F99")}, 8), "has dtype 'F99', which is none of"),
        (stored({"a": tensor(["F32"])}, 8), "has dtype .*'F32'.*, which is none of"),
        (stored({"a": tensor(shape=(-2,))}, 8), "has shape .-2., which is no list of sizes"),
        (stored({"a": tensor(shape=(2.0,))}, 8), "no list of sizes"),
        (stored({"a": tensor(shape=(True, 2))}, 8), "no list of sizes"),
        (stored({"a": tensor(shape=[2**62] * 50)}, 8), "larger than any file"),
        (stored({"a": tensor(offsets=(8, 0))}, 8), "which are no beginning and end"),
        (stored({"a": tensor(offsets=(0, 4, 8))}, 8), "which are no beginning and end"),
        (stored({"a": tensor(offsets=(0, 2**64))}, 8), "which are no beginning and end"),
        (stored({"a": tensor(offsets=(0, 80))}, 8), "ends at byte 80, but the file holds 8"),
        (stored({"a": tensor(shape=(3,))}, 8), "is 8 bytes long, which is not F32 of shape .3."),
        (stored({"a": tensor(), "b": tensor()}, 8), "tensor 'b' overlaps 'a'"),
        (stored({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12), "tensor 'b' overlaps 'a'"),
        (stored({"a": tensor(), "b": tensor(offsets=(16, 24))}, 24), "tensor 'b' leaves 8 bytes behind 'a'"),
        (stored({"a": tensor(offsets=(8, 16))}, 16), "tensor 'a' leaves 8 bytes behind the header"),
        (stored({"a": tensor()}, 9), "its tensors take 8 bytes, but 9 follow the header"),
        (stored({"a": tensor()}, 7), "ends at byte 8, but the file holds 7"),
    ],
)
def test_a_header_that_is_not_right_is_refused_in_a_sentence(write, data, words):
    with pytest.raises(ValueError, match=words) as caught:
        check_file(write(data))
    assert str(caught.value).endswith("save or download the model again.") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600  # what a file says is not repeated at length


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening it to read does not wait
    with pytest.raises(ValueError, match="not a regular file"):
        check_file(tmp_path / "pipe")
    os.close(writer)
    with pytest.raises(OSError):
        check_file(tmp_path)


def mutated(data, chance):
    """``data`` with one to three changes: bits, numbers of the header, pieces cut out, doubled or moved, or an end missing."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data) or 1), chance.randint(1, 24)
        match chance.randrange(6):
            case 0 if data:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + length] = b""
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                del data[at:]
            case 4:
                digits = [place for place, byte in enumerate(data[8:400], start=8) if 48 <= byte < 58]
                if digits:
                    data[chance.choice(digits)] = chance.choice(b"0123456789-.e")
            case 5:
                data[:8] = chance.choice([0, 1, 7, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)]).to_bytes(8, "little")
    return bytes(data)


def test_ten_thousand_damaged_files_neither_crash_nor_hang_nor_eat_memory(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(TENSORS, whole)
    original, chance, file = whole.read_bytes(), random.Random(0), tmp_path / "model.safetensors"
    before, begin, passed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), 0
    for _ in range(10_000):
        file.write_bytes(mutated(original, chance))
        try:
            check_file(file)
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        passed += 1
        with safe_open(file, framework="np") as opened:  # what we let through, the library opens
            for name in opened.keys():  # noqa: SIM118
                opened.get_tensor(name)
    assert 0 < passed < 5_000  # changed numbers within a tensor are nobody's business
    assert time.process_time() - begin < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_what_the_library_refuses_we_refuse_too(tmp_path):
    whole, chance, file = tmp_path / "whole.safetensors", random.Random(1), tmp_path / "model.safetensors"
    save_file(TENSORS, whole)
    original, refused = whole.read_bytes(), 0
    for _ in range(500):
        file.write_bytes(mutated(original, chance))
        try:
            with safe_open(file, framework="np"):
                continue
        except SafetensorError:
            refused += 1
        with pytest.raises(ValueError):
            check_file(file)
    assert refused > 200


# The module alone: the libraries that its package imports would take more memory than what is measured.
LIMITED = """
import resource, runpy, sys
from pathlib import Path
check_file = runpy.run_path(sys.argv.pop(1))["check_file"]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        check_file(Path(name))
        sys.exit(f"{name} was accepted")
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000)
"""


def test_large_headers_take_little_memory(tmp_path):
    huge = {
        "sparse": None,
        "values": b"{" + b'"a":[' + b"[],".join([b""] * 3_000_000) + b"0]}",
        "names": b"{" + b",".join(b'"%x":{}' % number for number in range(800_000)) + b"}",
        "long": b'{"' + b"x" * (HEADER_LIMIT - 100) + b'":3}',
    }
    files = []
    for name, header in huge.items():
        files.append(tmp_path / f"{name}.safetensors")
        files[-1].write_bytes(stored(b"{", length=90_000_000) if header is None else stored(header))
    with files[0].open("r+b") as sparse:
        sparse.truncate(100_000_000)
    *sentences, megabytes = run_python(LIMITED, model_folder.__file__, *files).strip().splitlines()
    assert len(sentences) == len(huge) and "larger than the 16,000,000" in sentences[0]
    assert "more than 1,000,000 values" in sentences[1] and "more than 1,000,000 values" in sentences[2]
    assert int(megabytes) < 150


# ------------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Unpickled, it writes a file, which shows that it was: the pickles that tests write are there to be refused."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def all_doors(folder, tmp_path):
    """Everything of ours that opens a model named by its user, as functions."""
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "texts.csv").write_text("text,label\na text,0\na word,1\n")
    stage = {"kind": "classify", "data": str(tmp_path / "texts.csv"), "model": str(folder), "max_steps": 1, "max_length": 8}
    recipe.write_text(json.dumps({"name": "toy", "stages": [stage]}))
    return {
        "find_model": lambda: find_model(folder),
        "load": lambda: load(folder, device="cpu"),
        "checkpoint": lambda: folders.Checkpoint(folders.encoder_folder(folder)),
        "train": lambda: run_recipe(load_recipe(recipe), output_dir=tmp_path / "run"),
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("door", ["find_model", "load", "checkpoint", "train"])
def test_pickled_weights_are_never_opened(model, tmp_path, name, door):
    (model / "model.safetensors").unlink()
    with (model / name).open("wb") as file:  # to be refused unopened
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    with pytest.raises(ValueError, match=f"only as a pickle \\({name}\\), which can run code"):
        all_doors(model, tmp_path)[door]()
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_beside_the_weights_is_left_alone(model, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        with (model / name).open("wb") as file:  # to be left unopened
            pickle.dump(Bomb(tmp_path / "exploded"), file)
    load(model, device="cpu").encode(["a text"])
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_of_a_module_are_never_opened(model, tmp_path):
    as_sentence_transformer(model, "2_Dense")
    with (model / "2_Dense" / "pytorch_model.bin").open("wb") as file:  # to be refused unopened
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    with pytest.raises(ValueError, match="2_Dense/pytorch_model.bin"):
        load(model, device="cpu")
    assert not (tmp_path / "exploded").exists()


# --------------------------------------------------------------------------------------------------------------- code


def as_sentence_transformer(model, *paths, kind="sentence_transformers.sentence_transformer.modules.pooling.Pooling"):
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    others = [{"idx": at, "name": str(at), "path": path, "type": kind} for at, path in enumerate(paths, start=1)]
    (model / "modules.json").write_text(json.dumps([first, *others]))
    for path in paths:
        if ".." not in path and not path.startswith("/"):
            (model / path).mkdir(exist_ok=True)
            (model / path / "config.json").write_text('{"embedding_dimension": 8, "pooling_mode": "mean"}')


def with_code(model, tmp_path):
    """Make ``model`` one of an unknown type that brings code, which writes a file."""
    (model / "modeling_evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    edit_json(
        model / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"},
    )


@pytest.mark.parametrize("door", ["find_model", "load", "train"])
def test_code_of_others_does_not_run_without_the_flag(model, tmp_path, door, monkeypatch):
    with_code(model, tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked in the middle"))
    with pytest.raises((ValueError, OSError)):
        all_doors(model, tmp_path)[door]()
    assert not (tmp_path / "exploded").exists()


def test_with_the_flag_it_does_run(model, tmp_path):
    """That the tests beside this one can fail."""
    with_code(model, tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - it is no model
        load(model, device="cpu", trust_remote_code=True)
    assert (tmp_path / "exploded").exists()


def test_code_in_a_checkpoint_of_ours_does_not_run_here(model, tmp_path):
    (model / "modeling_minibert.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\n")
    load(model, device="cpu").encode(["a text"])
    assert not (tmp_path / "exploded").exists()


def test_a_module_class_from_elsewhere_is_not_imported_without_the_flag(model, tmp_path, monkeypatch):
    monkeypatch.chdir(model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    as_sentence_transformer(model, "1_Evil", kind="evil.Evil")
    with pytest.raises(ValueError):
        load(model, device="cpu")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_kernels_from_the_hub_are_not_asked_for(model, key):
    edit_json(model / "config.json", **{key: "evil/kernels"})
    with pytest.raises(ValueError, match=f"asks for 'evil/kernels' as its {key}"):
        find_model(model)


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "path", ["../other", "a/../../other", "/etc", "C:\\windows", "..\\other", "\\\\host\\share", "a\0b", 3]
)
def test_modules_outside_of_the_folder_are_refused(model, path):
    as_sentence_transformer(model, "1_Pooling")
    listed = json.loads((model / "modules.json").read_text())
    for place in (0, 1):
        changed = copy.deepcopy(listed)
        changed[place]["path"] = path
        (model / "modules.json").write_text(json.dumps(changed))
        for check in (check_paths, find_model, folders.modules):
            with pytest.raises(ValueError, match="outside of the folder|where its modules lie"):
                check(model)


@pytest.mark.parametrize(
    "code", ["../evil.Evil", "/tmp/evil.Evil", "..evil.Evil", "evil", "a.b.Evil", "evil.Evil\n", 3, {"a": "b"}]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_outside_of_the_folder_is_refused(model, code, file):
    edit_json(model / file, auto_map={"AutoModel": code})
    with pytest.raises(ValueError, match="in its auto_map, which is not module.Class"):
        check_paths(model)


def test_usual_code_names_pass(model):
    names = {
        "AutoModel": "modeling_a.B",
        "AutoConfig": "owner/name.v1--configuration_a.C",
        "AutoTokenizer": ["tokenization_a.D", None],
    }
    edit_json(model / "config.json", auto_map=names)
    check_paths(model)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "model.bin", "a/../../x.safetensors", 3, None]
)
def test_parts_of_the_weights_outside_of_the_folder_are_refused(model, name):
    shutil.move(model / "model.safetensors", model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for check in (check_paths, find_model, folders.Checkpoint):
        with pytest.raises(ValueError, match="outside of the folder|which is no safetensors file"):
            check(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling", "1_Pooling/secret"])
def test_links_out_of_the_folder_are_not_followed(model, tmp_path, name):
    as_sentence_transformer(model, "1_Pooling")
    secret = tmp_path / "secret"
    if (model / name).exists():
        shutil.move(model / name, secret)
    else:
        secret.write_text("a password")
    (model / name).symlink_to(secret)
    for check in (check_paths, find_model, lambda folder: folders.copy_modules(folder, tmp_path)):
        with pytest.raises(ValueError, match=f"is a link to {secret}, outside of its folder"):
            check(model)


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(model, tmp_path):
    (model / "config.json").rename(model / "kept.json")
    (model / "config.json").symlink_to("kept.json")
    check_model(model)
    repository = tmp_path / "hub" / "models--ann--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_model(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../other")
    with pytest.raises(ValueError, match="outside of its folder"):
        check_model(snapshot)


def test_a_link_to_the_folder_itself_and_other_links_beside_the_model_are_the_users(model, tmp_path):
    (tmp_path / "latest").symlink_to(model)
    (model / "notes").symlink_to("/etc/hostname")
    check_model(tmp_path / "latest")


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9),
        ("vocab_size", 10**11),
        ("intermediate_size", 10**11),
        ("max_position_embeddings", 10**12),
        ("type_vocab_size", 10**12),
        ("num_labels", 10**11),
        ("num_labels", 10**1000),
    ],
)
def test_a_configuration_far_larger_than_its_weights_is_refused_before_it_is_built(model, field, value):
    edit_json(model / "config.json", **{field: value})
    for check in (find_model, folders.Checkpoint):
        with pytest.raises(ValueError, match="config.json describes a model of about 10.* numbers, but its weights hold"):
            check(model)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "3", "null", '{"weight_map": 3}', "[3]", "\xff"])
def test_damaged_json_is_a_sentence(model, name, content):
    if name.endswith("index.json"):
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(content.encode("latin-1"))
    if name.endswith("config.json") and content == '{"weight_map": 3}':
        return  # that is no damage
    with pytest.raises((ValueError, OSError)) as caught:
        check_model(model)
    assert "\n" not in str(caught.value)
