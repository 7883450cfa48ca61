"""Hostile models: none of their code runs, nothing eats memory, and no file outside of their folder is read unasked."""

import copy
import doctest
import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as kinds_of

from helpers import (
    edit_json,
    edit_weights,
    run_command,
    save_family,
    save_model,
    save_trained,
    write_recipe,
    write_vectors,
)
from minibert import cli, train_wordpiece
from minibert.data.load import as_dataset
from minibert.files import disk, terminal
from minibert.files.model_folder import check_model, check_paths, read_header
from minibert.hub import folders
from minibert.inference.encode import Encoder
from minibert.inference.load import find_model, load, open_tokenizer
from minibert.search.index import open_index
from minibert.search.vectors import VectorFolder, remove_vectors, shard_name
from minibert.train import checkpoint
from minibert.train.recipe import load_recipe
from minibert.train.run import run_recipe

TENSORS = {
    "layers.0.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layers.0.bias": np.ones(4, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


def stored(header, size=0, *, length=None):
    """Return the bytes of a safetensors file with this header before ``size`` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


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


def test_an_intact_file_passes(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt", "a": "b"})
    assert read_header(file) == {
        "layers.0.weight": ("F32", [3, 4]),
        "layers.0.bias": ("F16", [4]),
        "steps": ("I64", []),
        "empty": ("F32", [0, 3]),
    }


@pytest.mark.parametrize(
    "data",
    [
        b"\x01\x02\x03",
        stored({}, length=100),
        stored(b'{"a": ' * 100_000),
        stored({"a": tensor("F\n\x1b" * 500)}, 8),
        stored({"a": tensor(shape=[2**62] * 50)}, 8),
        stored({"a": tensor(offsets=(0, 80))}, 8),
        stored({"a": tensor(), "b": tensor()}, 8),
        stored({"a": tensor(), "b": tensor(offsets=(16, 24))}, 24),
        stored({"a": tensor()}, 7),
    ],
    ids=["short", "no header", "nested", "unknown dtype", "huge shape", "beyond the end", "overlap", "gap", "cut short"],
)
def test_a_damaged_header_is_refused_in_a_sentence(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged .*; save or download the model again.$") as caught:
        read_header(tmp_path / "model.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600  # the text of the file is escaped and cut


def test_a_large_header_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(stored(b"{", length=90_000_000))
    os.truncate(file, 100_000_000)
    with pytest.raises(ValueError, match="header has 90,000,000 bytes, and the limit is 16,000,000"):
        read_header(file)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_header(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    """Unpickled, it writes a file, which shows that it was: the pickles that tests write are there to be refused."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def all_doors(folder, tmp_path):
    """Return functions that open a model which the user names, by door."""
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "texts.csv").write_text("text,label\na text,0\na word,1\n")
    stage = {"kind": "classify", "data": str(tmp_path / "texts.csv"), "model": str(folder), "max_steps": 1, "max_length": 8}
    recipe.write_text(json.dumps({"name": "toy", "stages": [stage]}))
    return {
        "find_model": lambda: find_model(folder),
        "load": lambda: load(folder, device="cpu"),
        "checkpoint": lambda: folders.read_tensors(folders.checked_encoder(folder)),
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
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises((ValueError, OSError)):
        all_doors(model, tmp_path)[door]()
    assert not (tmp_path / "exploded").exists()


def test_with_the_flag_it_does_run(model, tmp_path):
    """Show that the tests around this can fail."""
    with_code(model, tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - the code is not a model
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
    with pytest.raises(ValueError, match=f"sets '{key}' to 'evil/kernels'"):
        find_model(model)


@pytest.mark.parametrize(
    ("file", "settings", "why"),
    [
        ("sentence_bert_config.json", {"model_kwargs": {"use_safetensors": False}}, "'use_safetensors' to False"),
        ("sentence_bert_config.json", {"model_args": {"weights_only": False}}, "'weights_only' to False"),
        ("sentence_bert_config.json", {"model_kwargs": {"attn_implementation": "evil/kernels"}}, "'attn_implementation' to"),
        ("sentence_bert_config.json", {"config_kwargs": {"num_hidden_layers": 9**9}}, "'num_hidden_layers' to 387420489"),
        ("sentence_bert_config.json", {"processor_kwargs": {"tokenizer_file": "/etc/passwd"}}, "'tokenizer_file' to"),
        ("sentence_bert_config.json", {"processing_kwargs": {"text": {"padding": "max_length"}}}, "'text' to"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method": "save_pretrained"}}}, "'method' to"),
        ("sentence_bert_config.json", {"max_seq_length": True}, "'max_seq_length' to True"),
        ("1_Dense/config.json", {"activation_function": "os.system"}, "'activation_function' to 'os.system'"),
        ("1_Dense/config.json", {"\x1b[31m": 1}, "'.x1b.31m' to 1"),
        ("1_Dense/config.json", {"in_features": 10**6, "out_features": 10**6}, "a module of more than 67,108,864 numbers"),
        ("config.json", {"transformers_weights": "pytorch_model.bin"}, "other weights than model.safetensors"),
        ("config.json", {"model_type": [[]]}, "'model_type' to"),
        ("config.json", {"model_type": True}, "'model_type' to True"),
        ("config.json", {"architectures": [10**30]}, "'architectures' to"),
        ("config.json", {"parts": [{"_attn_implementation": {"": "evil/kernels"}}]}, "code from the Hub"),
        ("config.json", {"quantization_config": {"quant_method": "no-such"}}, "weights of a package that is not installed"),
        ("config.json", {"auto_map": {"AutoModel": "evil/code--modeling.Evil"}}, "code of another repository"),
        ("tokenizer_config.json", {"model_max_length": "1000"}, "'model_max_length' to '1000'"),
        ("tokenizer_config.json", {"model_input_names": "a"}, "'model_input_names' to 'a'"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "a file that may be outside of the folder"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "evil/code--a.B"}}, "code of another repository"),
        ("adapter_config.json", {"base_model_name_or_path": "evil/base"}, "an adapter"),
        ("config_sentence_transformers.json", {"prompts": {"query": "x" * 20_000}}, "prompts of more than 10,000 characters"),
        ("config_sentence_transformers.json", {"prompts": ["query"]}, "prompts that are not texts by name"),
    ],
)
def test_settings_that_load_other_things_are_refused_by_name(model, tmp_path, file, settings, why):
    as_sentence_transformer(model, "1_Dense", kind="sentence_transformers.base.modules.dense.Dense")
    (model / "1_Dense" / "config.json").write_text('{"in_features": 8, "out_features": 4}')
    (model / file).write_text(
        json.dumps({**json.loads((model / file).read_text() if (model / file).exists() else "{}"), **settings})
    )
    doors = all_doors(model, tmp_path)
    for door in ("find_model", "load", "train"):
        with pytest.raises(ValueError, match=why):
            doors[door]()


def test_known_settings_of_known_modules_pass(tmp_path):
    """Every kind of module that the checks know, with the settings that the library itself saves."""
    tokenizer = train_wordpiece(["a text of a few words"] * 3, vocab_size=34, model_max_length=16, show_progress=False)
    encoder = save_model(tmp_path / "encoder", tokenizer, hidden_size=8, num_attention_heads=2)
    kinds = [kinds_of.WeightedLayerPooling(8, 2, 0), kinds_of.LSTM(8, 4), kinds_of.CNN(8, 4), kinds_of.Pooling(12, "mean")]
    kinds += [kinds_of.Dense(12, 6), kinds_of.LayerNorm(6), kinds_of.Dropout(0.1), kinds_of.Normalize()]
    modules = [kinds_of.Transformer(str(encoder), config_kwargs={"output_hidden_states": True}), *kinds]
    SentenceTransformer(modules=modules, prompts={"query": "ask: "}).save_pretrained(str(tmp_path / "model"))
    check_model(tmp_path / "model")
    edit_json(tmp_path / "model" / "sentence_bert_config.json", model_args={"add_pooling_layer": False}, max_seq_length=None)
    check_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"padding": {"strategy": {"Fixed": 10**9}}}, "sets padding.strategy to 1000000000, but the model reads up to 16"),
        ({"padding": {"pad_to_multiple_of": 0}}, "sets padding.pad_to_multiple_of to 0"),
        ({"padding": {"pad_id": 2**31}}, "the token id 2147483648"),
        ({"truncation": {"max_length": -1}}, "sets truncation.max_length to -1"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}}, "max_input_chars_per_word"),
        ({"model": {"type": "WordPiece", "vocab": {"a": 34}}}, "the token id 34, but the model has 34 tokens"),
        ({"model": 3}, "is not the file of a tokenizer"),
        ({"added_tokens": 10**9}, "is not the file of a tokenizer"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "the token id -1"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 99], "cls": ["[CLS]", 2]}}, "the token id 99"),
        # These are tried in a process of their own: damaged, an exponential search, a text that grows tenfold five times.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "could not be read with 2 GiB"),
        (
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
            "2 GiB",
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": 9 * [{"type": "Replace", "pattern": {"String": "a"}, "content": 10 * "a"}],
                }
            },
            "could not be read with 2 GiB",
        ),
    ],
)
def test_tokenizers_that_would_end_the_process_are_refused(model, settings, why):
    edit_json(model / "tokenizer.json", **settings)
    with pytest.raises(ValueError, match=f"tokenizer.json .*{why}"):
        find_model(model)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}),  # without [UNK]
        ("tokenizer_config.json", {"unk_token": ""}),  # looked up without end
    ],
)
def test_tokenizers_that_fail_at_an_unknown_word_are_refused(model, file, settings):
    edit_json(model / file, **settings)
    for door in (load, open_tokenizer):
        with pytest.raises(ValueError, match="cannot be opened"):
            door(model)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"module_input_name": "token_embeddings"}, "does not compute one vector"),
        ({"in_features": 4}, "cannot be opened"),
        ({"module_input_name": "evil"}, "cannot be opened .*KeyError"),
    ],
)
def test_modules_that_do_not_fit_together_are_refused(tmp_path, settings, why):
    model = with_dense(tmp_path / "model")
    edit_json(model / "2_Dense" / "config.json", **settings)
    with pytest.raises(ValueError, match=why):
        load(model, device="cpu")


def test_a_module_with_unknown_weights_is_refused(tmp_path):
    edit_weights(with_dense(tmp_path / "model") / "2_Dense", extra=torch.ones(1))
    done = run_command("hub", "push", tmp_path / "model", "ann/model", "--dry-run")
    assert done.exit_code == 2 and "cannot be opened ('RuntimeError: Error(s) in loading state_dict for Dense" in done.stderr


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path):
    """Not only the encoder's: every module's."""
    weights = with_dense(tmp_path / "model") / "2_Dense" / "model.safetensors"
    weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    done = run_command("hub", "push", tmp_path / "model", "ann/model", "--dry-run")
    assert done.exit_code == 2 and "2_Dense/model.safetensors is damaged (its header has 4,611,686" in done.stderr


def with_dense(folder):
    """Save a model with the modules Transformer, Pooling and Dense."""
    encoder = save_trained(folder.with_name("encoder"))
    modules = [kinds_of.Transformer(str(encoder)), kinds_of.Pooling(32, "mean"), kinds_of.Dense(32, 16)]
    SentenceTransformer(modules=modules).save_pretrained(str(folder))
    return folder


def test_a_tokenizer_that_leaves_out_the_mask_is_converted(tmp_path):
    save_family(tmp_path / "model")
    edit_json(tmp_path / "model" / "tokenizer_config.json", model_input_names=["input_ids"])
    assert run_command("hub", "convert", tmp_path / "model", tmp_path / "out").exit_code == 0


def test_a_dense_module_computes_in_half_precision_too(tmp_path):
    vectors = [Encoder(with_dense(tmp_path / dtype), dtype=dtype).encode(["a text"])[0] for dtype in ("float32", "bfloat16")]
    assert np.dot(*vectors) / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1]) > 0.999


def test_an_unusual_tokenizer_that_works_passes(model):
    edit_json(model / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": " +"}, "content": " "})
    load(model, device="cpu").encode(["a  text"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modules.json", "tokenizer.json", "README.md"])
def test_pipes_are_refused_at_once(model, tmp_path, name):
    as_sentence_transformer(model, "1_Pooling")
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    for door in ("find_model", "load", "train"):
        with pytest.raises(ValueError, match=f"{name} is not a regular file"):
            all_doors(model, tmp_path)[door]()


def test_any_error_of_a_library_is_a_sentence(model):
    edit_json(model / "config.json", layer_norm_eps=None, hidden_act="no such")
    with pytest.raises(ValueError, match=r"cannot be opened|hidden_act") as caught:
        load(model, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"output_attentions": True, "attn_implementation": "sdpa"}, {"initializer_range": 10**9}, {"id2label": {"a": "b"}}],
)
def test_an_error_about_settings_is_one_line(model, tmp_path, settings):
    edit_json(model / "config.json", **settings)
    (tmp_path / "texts.txt").write_text("a text")
    done = run_command("hub", "export", model, tmp_path / "out")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")


def test_names_from_files_cannot_control_the_terminal(tmp_path):
    folder = write_vectors(tmp_path / "vectors", np.eye(3, dtype=np.float32), model="\x1b[31mred\x07").folder
    done = run_command("search", folder, "a text", color=True)
    assert done.exit_code == 2 and "\\u001b[31mred\\u0007" in done.stderr and "\x1b" not in done.stderr


# --------------------------------------------------------------------------------------------------- folders of vectors


@pytest.mark.parametrize("change", ["id", "text", "vector", "numbers as texts", "nested ids"])
def test_a_shard_without_its_columns_is_refused(tmp_path, change):
    folder = write_vectors(tmp_path / "vectors", np.eye(3, dtype=np.float32), ["a", "b", "c"]).folder
    table = parquet.read_table(folder / "part-00000.parquet")
    if change in table.column_names:
        table = table.drop_columns([change])
    else:
        name, value = ("text", 7) if change == "numbers as texts" else ("id", [7])
        table = table.set_column(table.column_names.index(name), name, pa.array([value] * 3))
    parquet.write_table(table, folder / "part-00000.parquet")
    with pytest.raises(ValueError, match="disagrees with its manifest about"):
        VectorFolder(folder).ids([0])


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.parquet", "index/index.json", "index/vectors.bin"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_pipes_and_devices_among_vectors_are_not_read(tmp_path, name, kind):
    folder = write_vectors(tmp_path / "vectors", np.eye(3, dtype=np.float32)).folder
    open_index(VectorFolder(folder))
    (folder / name).unlink()
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(kind)
    if name.startswith("index") and kind == "pipe":
        assert len(open_index(VectorFolder(folder))) == 3  # built again
    else:
        with pytest.raises(ValueError, match="is not a regular file|is a link"):
            open_index(VectorFolder(folder))


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
        for check in (check_paths, find_model, folders.checked_encoder):
            with pytest.raises(ValueError, match="outside of the folder|a module without a path"):
                check(model)


def test_a_model_that_begins_with_another_module_is_not_published(model):
    as_sentence_transformer(model, "1_Pooling")
    listed = json.loads((model / "modules.json").read_text())
    (model / "modules.json").write_text(json.dumps(listed[::-1]))
    with pytest.raises(ValueError, match="must begin with a Transformer"):
        folders.checked_encoder(model)


@pytest.mark.parametrize(
    "code", ["../evil.Evil", "/tmp/evil.Evil", "..evil.Evil", "evil", "a.b.Evil", "evil.Evil\n", 3, {"a": "b"}]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_outside_of_the_folder_is_refused(model, code, file):
    edit_json(model / file, auto_map={"AutoModel": code})
    with pytest.raises(ValueError, match="in its auto_map, which is not module.Class"):
        check_paths(model)


def test_code_of_another_repository_needs_the_flag(model):
    names = {
        "AutoModel": "modeling_a.B",
        "AutoConfig": "owner/name.v1--configuration_a.C",
        "AutoTokenizer": ["tokenization_a.D", None],
    }
    edit_json(model / "config.json", auto_map=names)
    with pytest.raises(ValueError, match="'owner/name.v1--configuration_a.C' in its auto_map, which is code of another"):
        check_paths(model)
    check_paths(model, trust_remote_code=True)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "model.bin", "a/../../x.safetensors", 3, None]
)
def test_parts_of_the_weights_outside_of_the_folder_are_refused(model, name):
    shutil.move(model / "model.safetensors", model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for check in (check_paths, find_model, folders.read_tensors):
        with pytest.raises(ValueError, match="outside of the folder|which is not a safetensors file"):
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
        with pytest.raises(ValueError, match=f"is a link to {secret}, outside of the folder"):
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
    with pytest.raises(ValueError, match="outside of the folder"):
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
        ("num_hidden_groups", 10**7),
        ("num_feedforward_networks", 10**7),
        ("part", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_configuration_far_larger_than_its_weights_is_refused_before_it_is_built(model, field, value):
    edit_json(model / "config.json", **{field: value})
    for check in (find_model, folders.read_tensors):
        with pytest.raises(ValueError, match="config.json describes a model of about 10.* parameters, but the weights contain"):
            check(model)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "", "3", "null", '{"weight_map": 3}', "[3]", "\xff"])
def test_damaged_json_is_a_sentence(model, name, content):
    if name.endswith("index.json"):
        (model / "model.safetensors").unlink()
    (model / name).write_bytes(content.encode("latin-1"))
    if name.endswith("config.json") and content == '{"weight_map": 3}':
        return  # a valid object
    with pytest.raises((ValueError, OSError)) as caught:
        check_model(model)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ what we write and delete


@pytest.fixture
def secret(tmp_path):
    """A file of the user's that must not change."""
    (tmp_path / "secret").write_text("mine")
    yield tmp_path / "secret"
    assert (tmp_path / "secret").read_text() == "mine"


@pytest.fixture
def vectors(tmp_path):
    return write_vectors(tmp_path / "vectors", np.eye(4, dtype=np.float32), ["cat", "dog", "fish", "bird"])


def test_a_lock_is_no_link_and_no_file_of_the_users(tmp_path, secret):
    lock = tmp_path / ".lock"
    lock.symlink_to(secret)
    with pytest.raises(ValueError, match=".lock is a link"), disk.exclusive_lock(tmp_path, "writing", kept=""):
        pass
    lock.unlink()
    lock.write_text("of another program")
    with disk.exclusive_lock(tmp_path, "writing", kept=""):
        pass
    assert lock.read_text() == "of another program"


def test_temporary_files_are_new_unpredictable_and_cleared(tmp_path, secret, monkeypatch):
    (tmp_path / ".out.txt.part").symlink_to(secret)
    (tmp_path / ".out.txt.0123abcd.part").write_text("of a killed process")
    (tmp_path / ".out.txt.notes.part").write_text("of the user")
    names = set()
    for _ in range(2):
        with disk.atomic_write(tmp_path / "out.txt") as part:
            names.add(part.name)
            part.write_text("new")
    assert len(names) == 2 and (tmp_path / "out.txt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "out.txt", ".out.txt.part", ".out.txt.notes.part"}
    monkeypatch.setattr(disk.secrets, "token_hex", lambda _: "0123abcd")
    (tmp_path / ".out.txt.0123abcd.part").symlink_to(secret)
    with pytest.raises(FileExistsError):
        disk.write_text(tmp_path / "out.txt", "other")


def test_a_result_replaces_a_link_only_if_it_may(model, tmp_path, secret):
    (tmp_path / "texts.txt").write_text("a text\n")
    for target in (secret, tmp_path / "missing"):
        (tmp_path / "out.csv").symlink_to(target)
        assert run_command("predict", model, tmp_path / "texts.txt", "--out", tmp_path / "out.csv").exit_code == 2
        assert run_command("predict", model, tmp_path / "texts.txt", "--out", tmp_path / "out.csv", "--force").exit_code == 0
        assert not (tmp_path / "missing").exists()
        (tmp_path / "out.csv").unlink()


@pytest.mark.parametrize("name", ["index", "index/vectors.bin", "index/lists.faiss", "index/.lock", "index/words-2-x"])
def test_an_index_has_no_links(vectors, secret, name):
    link = vectors.folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret.parent if name == "index" else secret)
    before = set(secret.parent.iterdir())
    with pytest.raises(ValueError, match=f"{name} is a link"):
        open_index(vectors)
    assert set(secret.parent.iterdir()) == before


def test_an_index_leaves_the_files_of_others(vectors):
    from minibert.search.search import _open_words

    notes = [
        vectors.folder / "index" / name for name in ("notes.md", "words-of-mine/notes.md", "words-2-" + "0" * 16 + "/notes.md")
    ]
    for file in notes:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("notes")
    open_index(vectors, rebuild=True)
    _open_words(vectors, ["a"], False)
    _open_words(vectors, ["b"], False)
    assert all(file.read_text() == "notes" for file in notes)
    assert len(list(vectors.folder.glob("index/words-2-*/params.index.json"))) == 1


def test_only_shards_of_ours_are_deleted(vectors):
    others = ["part-7.parquet", "part-000001.parquet", "part-00001-copy.parquet", ".part-x.parquet.part", "notes.md"]
    for name in (*others, f".{shard_name(9)}.0123abcd.part"):
        (vectors.folder / name).write_text("notes")
    remove_vectors(vectors.folder)
    assert sorted(path.name for path in vectors.folder.iterdir()) == sorted(others)


def test_a_new_folder_leaves_what_has_the_name_of_an_earlier_temporary_folder(tmp_path, secret):
    (tmp_path / ".out.part" / "out").mkdir(parents=True)
    (tmp_path / ".out.part" / "out" / "notes.md").write_text("notes")
    (tmp_path / ".out.0123abcd.part" / "out").mkdir(parents=True)
    with folders.new_folder(tmp_path / "out") as temporary:
        (temporary / "model").write_text("model")
    assert (tmp_path / ".out.part" / "out" / "notes.md").exists() and not (tmp_path / ".out.0123abcd.part").exists()


def test_checkpoints_go_by_the_names_of_their_files(tmp_path, secret, caplog):
    for step in (1, 2):
        checkpoint.write_folder(tmp_path / f"step-{step:08d}", lambda folder: (folder / "state.json").write_text("{}"))
    (tmp_path / "step-00000001" / "notes.md").write_text("notes")
    (tmp_path / "step-00000001" / "secret").symlink_to(secret)
    (tmp_path / "notes.tmp-1").mkdir()
    (tmp_path / "step-00000000").symlink_to(tmp_path / "notes.tmp-1")
    (tmp_path / ".step-00000003.0123abcd.part").mkdir()
    checkpoint.save(tmp_path, 2, torch.nn.Linear(1, 1), {"state.json": {}}, torch.optim.SGD([torch.zeros(1)]))
    checkpoint.newest(tmp_path, keep=1)
    assert not (tmp_path / ".step-00000003.0123abcd.part").exists()
    assert (tmp_path / "notes.tmp-1").exists() and (tmp_path / "step-00000000").is_symlink()
    assert {path.name for path in (tmp_path / "step-00000001").iterdir()} == {"notes.md", "secret"}
    assert "step-00000001 stays" in caplog.text


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch):
    """The command train sends the package's log to a standard error that is closed when the command ends."""
    logger = logging.getLogger("minibert")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


def tokenizer_recipe(folder, **changes):
    (folder / "texts.txt").write_text("\x1b[2Ja text of\x9b some words\n" * 3)
    stage = {"kind": "tokenizer", "data": str(folder / "texts.txt"), "vocab_size": 30, **changes}
    return write_recipe(folder, stage)


def test_a_stage_leaves_the_files_of_others(tmp_path):
    run = tmp_path / "run"
    for size in (30, 32):
        run_recipe(load_recipe(tokenizer_recipe(tmp_path, vocab_size=size)), output_dir=run, force=True)
        (run / "1-tokenizer" / "notes.md").write_text("notes")
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "1-tokenizer", "1-tokenizer.replaced"}
    assert [path.name for path in (run / "1-tokenizer.replaced").iterdir()] == ["notes.md"]
    done = run_command("train", tokenizer_recipe(tmp_path, vocab_size=34), "--output-dir", run, "--force")
    assert done.exit_code == 2 and "1-tokenizer.replaced'. Move its files" in done.stderr
    (run / "1-tokenizer" / "stage.json").unlink()  # as if the stage had not been finished
    run_recipe(load_recipe(tokenizer_recipe(tmp_path, vocab_size=34)), output_dir=run, force=True)
    assert (run / "1-tokenizer" / "notes.md").exists()


@pytest.mark.parametrize("name", ["1-tokenizer", "1-tokenizer/tokenizer.json", "1-tokenizer/checkpoints"])
def test_a_stage_has_no_links(tmp_path, secret, name):
    link = tmp_path / "run" / name
    run_recipe(load_recipe(tokenizer_recipe(tmp_path)), output_dir=tmp_path / "run")
    (tmp_path / "run" / "1-tokenizer" / "stage.json").unlink()
    if name == "1-tokenizer":
        shutil.move(link, tmp_path / "elsewhere")
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere" if name == "1-tokenizer" else secret)
    with pytest.raises(ValueError, match=f"{name} is a link"):
        run_recipe(load_recipe(tokenizer_recipe(tmp_path)), output_dir=tmp_path / "run")


@pytest.mark.parametrize("place", [".", "{}", "{}.lock"])
def test_the_cache_of_rows_has_no_links(tmp_path, secret, monkeypatch, place):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.txt").write_text("a text\n")
    as_dataset(str(tmp_path / "rows.txt"), split="train")
    (table,) = (tmp_path / "cache" / "minibert-rows").glob("*.arrow")
    link = tmp_path / "cache" / "minibert-rows" / place.format(table.name)
    if place == ".":
        shutil.move(link, tmp_path / "elsewhere")
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere" if place == "." else secret)
    with pytest.raises(ValueError, match="is a link"):
        as_dataset(str(tmp_path / "rows.txt"), split="train")


# ----------------------------------------------------------------------------------------------------- what a terminal gets

HOSTILE = "\x1b]0;x\x07\x1b[2J\x7f\x9b31m\u202egood"
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_control_characters_are_escaped_and_json_keeps_its_value():
    assert not doctest.testmod(terminal).failed
    every = "".join(map(chr, [*range(0xA1), *range(0x2020, 0x2070), 0xD800]))
    shown = terminal.printable(every)
    assert not HIDDEN.search(shown) and shown.encode() and "\t\n" in shown and "\xa0" in shown
    assert json.loads(terminal.printable(json.dumps(every, ensure_ascii=False))) == every
    assert "\n" not in terminal.printable("a\nb", kept="")


def test_commands_print_only_through_the_function_that_escapes():
    source = Path(cli.__file__).read_text(encoding="utf-8")
    assert source.count("typer.echo(") == 1 and not re.search(r"\b(print|secho|stdout\.write)\(", source)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_labels_and_texts_are_escaped(model, tmp_path, options):
    edit_json(model / "config.json", id2label={"0": HOSTILE, "1": HOSTILE + "1"}, label2id={HOSTILE: 0, HOSTILE + "1": 1})
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": HOSTILE}) + "\n")
    done = run_command("predict", model, tmp_path / "texts.jsonl", *options)
    assert done.exit_code == 0 and "good" in done.stdout and not HIDDEN.search(done.stdout)
    assert not options or json.loads(done.stdout)["text"] == HOSTILE


def test_names_in_errors_are_escaped(model, tmp_path):
    evil = model.rename(tmp_path / HOSTILE.replace("/", ""))
    edit_json(evil / "config.json", auto_map=f"{HOSTILE} name")
    done = run_command("hub", "verify", evil)
    assert done.exit_code == 1 and not HIDDEN.search(done.output)
    (tmp_path / "texts.txt").write_text("a text\n")
    done = run_command("predict", tmp_path / f"{HOSTILE}2", tmp_path / "texts.txt")
    assert done.exit_code == 2 and "\\u001b" in done.stderr and not HIDDEN.search(done.output)


def test_code_in_a_diff_is_escaped(model):
    with (model / "modeling_minibert.py").open("a") as code:
        code.write(f"# {HOSTILE}\n")
    done = run_command("hub", "verify", model)
    assert "+# \\u001b]0;x" in done.stdout and not HIDDEN.search(done.stdout)


def test_rows_in_logs_are_escaped(tmp_path):
    done = run_command("train", tokenizer_recipe(tmp_path), "--output-dir", tmp_path / "run")
    assert done.exit_code == 0 and "First row" in done.stderr
    assert not HIDDEN.search("\n".join(line for line in done.stderr.splitlines() if "First row" in line))
    record = logging.getLogger("transformers").makeRecord("transformers", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    assert not HIDDEN.search(logging.lastResort.format(record))
