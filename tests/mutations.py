"""Mutate good folders of models and vectors, and run commands on them in processes with limits.

A mutation draws from a ``random.Random``: Hypothesis gives one in the tests, and a benchmark seeds one with the number of
the folder. Every case runs in a fork of this process, which has imported the package already.
"""

import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

SECONDS, MEMORY = 60, 2 * 2**30
_TEXTS = ["the quick brown fox jumps over the lazy dog", "what is the capital of a short text ?", "others sleep , and one ."]
_HEADER = 8  # bytes of a safetensors file before its header

# Command -> its arguments. Folders and files: FOLDER is the mutated one, IN holds the data, OUT is new.
COMMANDS = {
    "search": "search FOLDER --passages IN/texts.txt fox",
    "search-vectors": "search FOLDER fox",
    "encode": "encode FOLDER IN/texts.txt OUT/vectors",
    "evaluate": "evaluate FOLDER IN/questions.csv --no-baselines",
    "evaluate-labels": "evaluate FOLDER IN/labels.csv --no-baselines",
    "predict": "predict FOLDER IN/texts.txt",
    "train-embed": "train IN/embed.yaml embed.model=FOLDER --output-dir OUT/run",
    "train-classify": "train IN/classify.yaml classify.model=FOLDER --output-dir OUT/run",
    "plot-attention": "plot attention FOLDER fox --out OUT/picture.html",
    "plot-embeddings": "plot embeddings FOLDER IN/texts.txt --out OUT/picture.html",
    "plot-tokens": "plot tokens FOLDER fox",
    "hub-convert": "hub convert FOLDER OUT/model",
    "hub-export": "hub export FOLDER OUT/model",
    "hub-push": "hub push FOLDER ann/model --dry-run",
    "hub-verify": "hub verify FOLDER",
    "hub-pull": "hub pull ann/model OUT/model",
}
_KINDS = {
    **dict.fromkeys(("search", "encode", "plot-embeddings", "hub-verify", "hub-pull"), ("embed", "bert")),
    **dict.fromkeys(("evaluate", "train-embed"), ("embed",)),
    **dict.fromkeys(("predict", "evaluate-labels"), ("classes",)),
    **dict.fromkeys(("train-classify", "plot-tokens"), ("classes", "bert")),
    **dict.fromkeys(("plot-attention", "hub-export", "hub-push"), ("embed", "classes")),
    "hub-convert": ("bert",),
    "search-vectors": ("vectors",),
}

_ESCAPE = "\x1b]0;title\x07\x1b[31mred"
_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**9, 10**30, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "a", "a" * 100_000, _ESCAPE, "\0", "\ud800", "/etc/passwd", "../x", "/dev/zero", "owner/name", "owner/name--a.B"),
    *([], {}, [1, "a", None], {"a": 1}, {"0": None}, [[[[]]]]),
]
# File -> keys that libraries read, with values that are dangerous or of a wrong type.
_SETTINGS = {
    "config.json": {
        "auto_map": [
            {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
            {"AutoTokenizer": ["evil.Evil", None]},
            "evil.Evil",
        ],
        "attn_implementation": ["owner/name", "eager", "sdpa", "flash_attention_2", "paged|sdpa", {"": "owner/name"}],
        "_attn_implementation": ["owner/name", "flex_attention", "a"],
        "experts_implementation": ["owner/name", "eager"],
        "transformers_weights": ["pytorch_model.bin", "/etc/passwd", "model.safetensors"],
        "quantization_config": [{"quant_method": name} for name in ("bitsandbytes", "gptq", "torchao", "torch", "os", "fp8")],
        "model_type": ["evil", "bert", "minibert", "gpt2", "t5", "distilbert", "clip", "albert", "roberta", "modernbert"],
        "architectures": [["evil"], ["BertForMaskedLM"], "BertModel", ["MiniBertForTokenClassification"], [""]],
        "dtype": ["float16", "bfloat16", "float64", "int8", "complex64", "save", "float8_e4m3fn", "Tensor"],
        "torch_dtype": ["float16", "auto"],
        "hidden_act": ["relu", "silu", "softmax", "linear", "tanh", "xielu", "evil"],
        "id2label": [{"0": "a"}, {"a": "b"}, {"0": _ESCAPE, "1": "b", "2": "c"}, ["a", "b"], {"9": "a", "8": "b", "7": "c"}],
        "label2id": [{"a": 9}, {"a": "b"}],
        "problem_type": ["regression", "multi_label_classification", "single_label_classification", "evil"],
        "num_labels": [1, 2, 1000],
        "pooling": ["cls", "mean", "max", "lasttoken", "evil"],
        "num_hidden_groups": [10**9, 0, 1],
        "num_hidden_layers": [10**9, 0, 1, 200],
        "num_attention_heads": [1, 3, 32, 64],
        "hidden_size": [16, 33, 64],
        "layer_norm_eps": [0, -1, 1e30, "a"],
        "pad_token_id": [-1, 25, 26, 10**6],
        "position_embedding_type": ["rotary", "relative_key", "absolute", "sinusoidal", "learned", "evil"],
        "norm_position": ["pre", "post"],
        "is_decoder": [True],
        "add_cross_attention": [True],
        "use_cache": [True],
        "chunk_size_feed_forward": [1, 7, -1],
        "output_attentions": [True],
        "output_hidden_states": [True],
        "return_dict": [False],
        "torchscript": [True],
        "tie_word_embeddings": [False],
        "pruned_heads": [{"0": [0, 1]}, {"0": [9]}, {"a": "b"}],
        "task_specific_params": [{"text-classification": {"top_k": -1}}],
        "custom_pipelines": [{"text-classification": {"impl": "evil.Evil", "pt": ["AutoModel"]}}],
        "text_config": [{"hidden_size": 10**9}, {"model_type": "evil"}],
        "rope_parameters": [{"rope_type": "yarn", "factor": 0}, {"rope_theta": 0}],
    },
    "tokenizer.json": {
        "truncation": [{"direction": "Right", "max_length": n, "strategy": "LongestFirst", "stride": 0} for n in (1, 2, 9**9)],
        "padding": [
            {"strategy": one, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 9, "pad_type_id": 7, "pad_token": "a"}
            for one in ("BatchLongest", {"Fixed": 30}, {"Fixed": 9**9})
        ],
        "normalizer": [
            {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "aa"},
            {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
            {"type": "Prepend", "prepend": "a" * 10_000},
            {"type": "Sequence", "normalizers": 30 * [{"type": "Prepend", "prepend": "b"}]},
            {"type": "evil"},
        ],
        "pre_tokenizer": [
            {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
            {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
            {"type": "CharDelimiterSplit", "delimiter": "o"},
            {"type": "FixedLength", "length": 0},
        ],
        "post_processor": [
            {"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["[CLS]", 2]},
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "B", "type_id": 9}}],
                "pair": [],
                "special_tokens": {},
            },
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        ],
        "added_tokens": [
            [{"id": at, "content": text, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}]
            for at, text in ((2**31, "a"), (99, "fox"), (25, ""), (0, "fox"), (5, "[CLS]"))
        ],
        "model": [
            {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
            {
                "type": "WordPiece",
                "vocab": {},
                "unk_token": "a",
                "continuing_subword_prefix": "",
                "max_input_chars_per_word": 9,
            },
            {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "dropout": 2.0},
            {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 7},
            {"type": "Unigram", "vocab": [], "unk_id": None},
        ],
        "decoder": [{"type": "evil"}, {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}],
        "version": ["9.9"],
    },
    "tokenizer_config.json": {
        "auto_map": [{"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, {"AutoTokenizer": "owner/name--evil.Evil"}],
        "tokenizer_class": [
            "evil",
            "BertTokenizer",
            "GPT2Tokenizer",
            "T5Tokenizer",
            "PreTrainedTokenizerFast",
            "LlamaTokenizer",
        ],
        "vocab_file": ["/etc/passwd", "vocab.txt"],
        "tokenizer_file": ["/etc/passwd", "../x"],
        "model_max_length": [0, -1, 1, 2, 10**9, 10**30, 1e30],
        "model_input_names": [["input_ids"], ["a"], []],
        "added_tokens_decoder": [{"99": {"content": "fox"}}, {"a": {"content": "b"}}, {"5": "a"}],
        "extra_special_tokens": [{"a": "b"}, ["a"]],
        "additional_special_tokens": [["a", "fox"], [1]],
        "unk_token": [None, {"content": "fox", "__type": "AddedToken"}, ["a"]],
        "pad_token": [None, "fox", {"content": "zebra", "__type": "AddedToken"}],
        "mask_token": [None, "zebra"],
        "cls_token": [None, "zebra"],
        "padding_side": ["left", "evil"],
        "truncation_side": ["left", "evil"],
        "chat_template": ["{% for a in range(10**9) %}a{% endfor %}", "{{", {"a": "b"}],
        "split_special_tokens": [True],
        "backend": ["evil", "sentencepiece", "mistral-common"],
        "is_fast": [False],
        "processor_class": ["evil", "AutoProcessor", "CLIPProcessor"],
        "response_schema": [{"a": 1}],
        "from_slow": [True],
        "add_prefix_space": [True],
        "do_lower_case": [True],
        "gguf_file": ["a.gguf"],
    },
    "special_tokens_map.json": {"pad_token": ["zebra", 7], "a": ["b"]},
    "sentence_bert_config.json": {
        "model_kwargs": [{"use_safetensors": False}, {"attn_implementation": "owner/name"}, {"a": 1}, {"dtype": "evil"}],
        "model_args": [{"weights_only": False}, {"state_dict": {}}, {"dtype": "float16"}, {"output_hidden_states": True}],
        "config_kwargs": [{"num_hidden_layers": 10**9}, {"dtype": "int8"}, {"output_hidden_states": True}],
        "config_args": [{"trust_remote_code": True}],
        "processor_kwargs": [{"tokenizer_file": "/etc/passwd"}, {"model_max_length": 10**9}, {"use_fast": False}],
        "tokenizer_args": [{"padding_side": "left"}, {"padding_side": "evil"}, {"do_lower_case": True}],
        "max_seq_length": [0, -1, 1, 2, 3, 100, 10**9, "a"],
        "do_lower_case": [True],
        "transformer_task": ["evil", "fill-mask", "any-to-any"],
        "modality_config": [
            {"text": {"method": "save_pretrained", "method_output_name": "a"}},
            {"image": {"method": "forward"}},
        ],
        "module_output_name": ["evil", "sentence_embedding"],
        "query_length": [0, 10**9],
        "backend": ["onnx"],
        "model_name_or_path": ["/etc"],
    },
    "modules.json": {},
    "config_sentence_transformers.json": {
        "prompts": [{"query": "a" * 5000}, {"query": 7}, ["a"], {"evil": _ESCAPE}, {"query": ""}],
        "default_prompt_name": ["query", "evil", 7],
        "similarity_fn_name": ["dot", "evil", "euclidean", 7],
        "model_type": ["SparseEncoder", "CrossEncoder", "evil"],
        "truncate_dim": [1, 0, -1, 10**9],
        "modules": ["evil"],
        "backend": ["onnx"],
    },
    "1_Pooling/config.json": {
        "pooling_mode": ["cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ["mean", "cls"], [], "evil"],
        "embedding_dimension": [16, 33, 0],
        "include_prompt": [False],
    },
    "2_Dense/config.json": {
        "activation_function": ["os.system", "torch.nn.Softmax", "torch.nn.modules.activation.ReLU", "torch.nn.Linear"],
        "in_features": [16, 33, 10**6],
        "out_features": [16, 10**6],
        "bias": [False],
        "use_residual": [True],
        "module_input_name": ["token_embeddings", "evil", "input_ids"],
        "module_output_name": ["token_embeddings", "evil"],
    },
    "adapter_config.json": {"base_model_name_or_path": ["/etc", "owner/name"], "peft_type": ["LORA"]},
    "processor_config.json": {"processor_class": ["evil", "CLIPProcessor"], "auto_map": [{"AutoProcessor": "evil.Evil"}]},
    "preprocessor_config.json": {"image_processor_type": ["evil", "CLIPImageProcessor"], "processor_class": ["BertProcessor"]},
    "generation_config.json": {"max_length": [10**9], "do_sample": ["a"], "transformers_version": [7]},
    "model.safetensors.index.json": {"weight_map": [{"a": "model.safetensors"}, {"a": "../x.safetensors"}, {"a": "/dev/zero"}]},
    "manifest.json": {
        "model": ["/etc", "owner/name", _ESCAPE, "../x"],
        "dimension": [31, 33, 10**9, 0],
        "precision": ["int8", "binary", "float16", "evil"],
        "rows": [1, 4, 10**12],
        "rows_per_shard": [1, 0],
        "ranges": [[[0.0] * 32, [1.0] * 32], [[0.0], [1.0]], [[math.nan] * 32, [0.0] * 32]],
        "shards": [[], [{"file": "../x.parquet", "first_row": 0, "rows": 3, "first_input_row": 0, "input_rows": 3}]],
        "encoding": [{"prompt": "a", "dtype": "evil"}, {"dtype": "float16"}, {"prompt_name": "evil"}, {"normalize": 7}],
        "columns": [{"kept": False}, {"kept": True, "text": 7}],
        "fingerprint": ["0" * 64],
        "format": [2],
    },
    "index/index.json": {"lists": [{"a": 1}, {"rows": 10**9}], "shards": [[]], "rows": [10**12, 1], "dimension": [1, 10**9]},
}
_MODULES = [
    f"sentence_transformers.models.{name}" for name in ("Dense", "Pooling", "Normalize", "Transformer", "Dropout", "CLIPModel")
]
_MODULES += [
    f"sentence_transformers.models.{name}" for name in ("Router", "Asym", "BoW", "WordEmbeddings", "StaticEmbedding", "LSTM")
]
_MODULES += ["evil.Evil", "os.system", "torch.nn.Linear", "sentence_transformers.SentenceTransformer", "minibert.hub.push.push"]


def build(work):
    """Build the good folders and the data in ``work``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    from helpers import run_command, save_family, save_trained, write_recipe, write_rows

    good, data = work / "good", work / "in"
    data.mkdir(parents=True)
    (data / "texts.txt").write_text("\n".join(_TEXTS))
    rows = [f"{text.replace(',', '')},{at}" for at, text in enumerate(_TEXTS)]
    (data / "labels.csv").write_text("\n".join(["text,label", *rows]))
    (data / "questions.csv").write_text("\n".join(["query,answer", *(row.replace(",0", ",fox") for row in rows)]))
    write_rows(data / "pairs.jsonl", [{"anchor": text, "positive": text[4:]} for text in _TEXTS])
    common = {"model": "unset", "max_steps": 1, "batch_size": 2}
    for kind, file in (("embed", "pairs.jsonl"), ("classify", "labels.csv")):
        write_recipe(data, {"kind": kind, "data": str(data / file), **common}).rename(data / f"{kind}.yaml")
    encoder = save_trained(work / "encoder")
    modules = [Transformer(str(encoder)), Pooling(32, pooling_mode="mean"), Dense(32, 16), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "what is "}, similarity_fn_name="cosine")
    model.save_pretrained(str(good / "embed"))
    save_trained(good / "classes", "ForSequenceClassification")
    save_family(good / "bert")
    for folder in (good / "embed", good / "classes", good / "bert"):
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    for command in (
        ["encode", good / "embed", data / "texts.txt", good / "vectors", "--keep-text"],
        ["search", good / "vectors", "fox"],
    ):
        assert run_command(*command).exit_code == 0


class Marker:
    """Write a file when unpickled, which shows that the pickle was opened."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return (open, (self.file, "w"))


def mutate(folder, rng, marker):
    """Mutate ``folder`` by one to three operations, and return their descriptions. Code in it would write ``marker``."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change = rng.choice([_change_json] * 8 + [_change_tensors] * 3 + [_change_bytes, _change_kind, _plant])
        with_code = rng.random() < 0.05
        done.append(change(folder, rng, marker))
        if with_code:
            done.append(_plant(folder, rng, marker))
    return done


def _files(folder, *suffixes):
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink() and file.suffix in suffixes)


def _shown(value):
    text = ascii(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _change_json(folder, rng, marker):
    known = sorted(name for name in _SETTINGS if (folder / name).is_file())
    file = (
        folder / rng.choice(known + known[:1] + (rng.random() < 0.1) * sorted(_SETTINGS)) if known else folder / "config.json"
    )
    name = file.relative_to(folder).as_posix()
    try:
        content = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, OSError, RecursionError):
        return _change_bytes(folder, rng, marker)
    nested = rng.random()
    if name == "modules.json" and isinstance(content, list) and content and nested < 0.7:
        at = rng.randrange(len(content))
        key = rng.choice(["type", "path", "name", "idx"])
        content[at][key] = value = rng.choice(_MODULES if key == "type" else ["", "1_Pooling", "2_Dense", "../x", *_VALUES])
        done = f"{at}.{key} = {_shown(value)}"
    elif nested < 0.02:
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"a":' * 100_000)
        return f"{name}: nested deeply"
    elif isinstance(content, dict) and nested < 0.5 and _SETTINGS[name]:
        key = rng.choice(sorted(_SETTINGS[name]))
        content[key] = value = rng.choice(_SETTINGS[name][key] * 3 + _VALUES)
        done = f"{key} = {_shown(value)}"
    else:
        done = _change_any(content, rng)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return f"{name}: {done}"


def _change_any(content, rng):
    """Replace, delete or shift an existing value, also a nested one."""
    place, path = content, []
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place)) if isinstance(place, list) else ()
        if not keys:
            return "unchanged"
        key = rng.choice(keys)
        path.append(str(key))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    if rng.random() < 0.15:
        del place[key]
        return f"without {'.'.join(path)[:80]}"
    old = place[key]
    near = [old * 2, old + 1, old - 1, -old, str(old)] if type(old) in (int, float) else []
    place[key] = value = rng.choice(_VALUES + near * 3)
    return f"{'.'.join(path)[:80]} = {_shown(value)}"


def _change_bytes(folder, rng, marker):
    files = _files(folder, ".json", ".safetensors", ".parquet", ".bin", ".py")
    if not files:
        return "no file"
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    how = rng.choice(["truncate", "empty", "flip", "append", "latin"])
    if how == "truncate":
        content = content[: rng.randrange(len(content) + 1)]
    elif how == "empty":
        content.clear()
    elif how == "flip":
        for _ in range(min(len(content), 5)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        content += b"\xff\x00 more" * (1 if how == "append" else 1000)
    file.write_bytes(content)
    return f"{file.relative_to(folder)}: bytes, {how}"


def _change_kind(folder, rng, marker):
    files = _files(folder, ".json", ".safetensors", ".parquet", ".bin", ".py")
    if not files:
        return "no file"
    file = rng.choice(files)
    how = rng.choice(["pipe", "folder", "link out", "link to itself", "link to /dev/zero", "unreadable", "missing"])
    outside = folder.parent / f"outside-{file.name}"
    shutil.copy(file, outside)
    if how == "unreadable":
        file.chmod(0)
    else:
        file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how.startswith("link"):
        file.symlink_to({"link out": outside, "link to itself": file, "link to /dev/zero": "/dev/zero"}[how])
    return f"{file.relative_to(folder)}: {how}"


def _change_tensors(folder, rng, marker):
    files = _files(folder, ".safetensors")
    if not files:
        return _change_vectors(folder, rng, marker)
    from safetensors.numpy import load, save

    file = rng.choice(files)
    content = file.read_bytes()
    try:
        tensors = load(content)
        name = rng.choice(sorted(tensors))
    except Exception:
        return _change_bytes(folder, rng, marker)
    value = tensors[name]
    how = rng.choice(["dtype", "shape", "drop", "rename", "values", "more", "lie"])
    what = how
    if how == "dtype":
        what = rng.choice(["float16", "float64", "int64", "int8", "bool"])
        for key in sorted(tensors) if rng.random() < 0.5 else [name]:
            tensors[key] = tensors[key].astype(what)
    elif how == "shape":
        changed = (
            [value[:-1], value.repeat(2, 0), value.ravel(), value[None], value[:0], value.T.copy()]
            if value.ndim
            else [value[None]]
        )
        tensors[name] = rng.choice(changed)
        what = f"shape {tensors[name].shape}"
    elif how in ("drop", "rename"):
        del tensors[name]
        if how == "rename":
            tensors[rng.choice(["evil", _ESCAPE, f"{name}.a", "a" * 5000])] = value
    elif how == "values":
        what = rng.choice(["nan", "inf", "1e38", "0"])
        for key in sorted(tensors) if rng.random() < 0.5 else [name]:
            tensors[key] = tensors[key] * 0 + float(what)
    elif how == "more":
        tensors |= {f"extra.{at}": value for at in range(1000)}
    content = save(tensors, {"format": "pt"})
    if how == "lie":
        length = int.from_bytes(content[:_HEADER], "little")
        header = json.loads(content[_HEADER : _HEADER + length])
        key, changed = rng.choice(
            [
                ("shape", [2**40]),
                ("shape", [-1]),
                ("data_offsets", [0, 2**50]),
                ("dtype", "F8_E4M3"),
                ("dtype", "evil"),
                ("shape", [0]),
            ]
        )
        header[name][key] = changed
        text = json.dumps(header).encode()
        size = rng.choice([len(text), len(text), 2**62, 90_000_000])
        content, what = size.to_bytes(_HEADER, "little") + text + content[_HEADER + length :], f"lie about {key}"
    file.write_bytes(content)
    return f"{file.relative_to(folder)}: {name[:60]!a}, {what}"


def _change_vectors(folder, rng, marker):
    """Change a shard of a folder of vectors: its columns, types, rows or values."""
    import pyarrow as pa
    from pyarrow import parquet

    files = _files(folder, ".parquet")
    try:
        table = parquet.read_table(files[0])
    except Exception:
        return _change_bytes(folder, rng, marker)
    how = rng.choice(["drop", "rename", "rows", "nan", "type", "metadata", "null", "more"])
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    rows, column = table.num_rows, table[name]
    if how == "drop":
        table = table.drop_columns([name])
    elif how == "rename":
        table = table.rename_columns([_ESCAPE if one == name else one for one in table.column_names])
    elif how == "rows":
        table = rng.choice([table[:0], table[:1], pa.concat_tables([table] * 3)])
    elif how == "nan":
        vectors = pa.FixedSizeListArray.from_arrays(pa.array([rng.choice([math.nan, math.inf])] * 16 * rows, pa.float32()), 16)
        table = (
            table.set_column(table.column_names.index("vector"), "vector", vectors) if "vector" in table.column_names else table
        )
    elif how == "type":
        wrong = rng.choice(
            [pa.array([_ESCAPE] * rows), pa.array([[1.0]] * rows), pa.array([7] * rows), pa.array([b"a"] * rows)]
        )
        table = table.set_column(at, name, wrong)
    elif how == "null":
        table = table.set_column(at, name, pa.nulls(rows, column.type))
    elif how == "metadata":
        table = table.replace_schema_metadata({b"minibert": rng.choice([b"", b"{", b"[]", b'{"format": 9}', b"\xff"])})
    else:
        table = table.append_column("more", pa.array(["x" * 10_000_000] * rows))
    parquet.write_table(table, files[0])
    return f"{files[0].name}: {name!a}, {how}"


def _plant(folder, rng, marker):
    """Add a file whose opening or running writes ``marker``, and sometimes settings that name it."""
    code = f"open({str(marker)!r}, 'w')\nclass Evil: pass\n"
    name = rng.choice(
        [
            *("pytorch_model.bin", "2_Dense/pytorch_model.bin", "training_args.bin", "optimizer.pt", "evil.py", "conftest.py"),
            *("modeling_minibert.py", "sitecustomize.py", "transformers.py", "index/lists.faiss", "vocab.txt", "README.md"),
        ]
    )
    file = folder / name
    if (file.exists() and not file.is_file()) or not file.parent.is_dir():
        return f"{name}: not possible"
    if name.endswith(".py"):
        file.write_text(code)
        config = folder / "config.json"
        if name == "evil.py" and config.is_file():
            types = {
                "model_type": rng.choice(["evil", "bert", "minibert"]),
                "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
            }
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                config.write_text(json.dumps({**json.loads(config.read_text()), **types}))
    elif name.endswith((".txt", ".md")):
        file.write_text(rng.choice(["", _ESCAPE, "---\n- [\n---\n", "a\nb\n", "\0" * 1000]))
    else:
        with file.open("wb") as content:  # to be left unopened
            pickle.dump(Marker(marker), content)
        without = file.with_name("model.safetensors")
        if name.endswith("pytorch_model.bin") and without.is_file() and rng.random() < 0.7:
            without.unlink()
    return f"{name}: planted"


def run_case(command, number, work, rng, server=None):
    """Mutate a copy of a good folder, run ``command`` on it, and return the outcome and what was changed and printed."""
    kinds = _KINDS[command]
    kind = kinds[number % len(kinds)]
    place = work / f"case-{command}"
    shutil.rmtree(place, ignore_errors=True)
    folder, marker = place / "folder", place / "marker"
    shutil.copytree(work / "good" / kind, folder)
    (place / "out").mkdir()
    changes = mutate(folder, rng, marker)
    values = {"FOLDER": folder, "IN": work / "in", "OUT": place / "out"}
    arguments = [re.sub(r"\b(FOLDER|IN|OUT)\b", lambda found: str(values[found[1]]), one) for one in COMMANDS[command].split()]
    if command == "hub-pull":
        server.repos.clear()
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        server.add_repo("ann/model", {path: content for path, content in files.items() if len(content) < 10**7})
    status, seconds, out, err = _in_a_fork(arguments, place, server if command == "hub-pull" else None)
    outcome = judge(command, status, out, err, marker)
    err = err.replace(str(work), "WORK")
    shutil.rmtree(place, ignore_errors=True)
    return {
        "outcome": outcome,
        "kind": kind,
        "changes": changes,
        "seconds": round(seconds, 1),
        "status": status,
        "error": err if len(err) < 3000 else f"{err[:1000]} ... {err[-2000:]}",
    }


def _in_a_fork(arguments, place, server):
    """Run the command line in a fork with limits, and return status, seconds, standard output and error."""
    files = [place / "stdout", place / "stderr"]
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(at, "w" if at else "r", closefd=False) for at in range(3))
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            os.chdir(place / "out")
            if server:
                import pytest

                server.patch(pytest.MonkeyPatch(), place / "home")
            from minibert.cli import app

            sys.argv = ["minibert", *arguments]
            app(arguments, prog_name="minibert", color=True)  # escapes of a message are not removed
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
    status = _wait(pid)
    texts = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    return status, time.monotonic() - begin, *texts


def _wait(pid):
    """Return the exit status of a process, or None after a limit of seconds, after which its group is killed."""
    end = time.monotonic() + SECONDS
    status = None
    try:
        while time.monotonic() < end:
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(code)
            time.sleep(0.005)
    finally:
        try:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError, PermissionError):
            pass
    return status


def judge(command, status, out, err, marker):
    """Return what happened: ``ok`` and ``refused`` are allowed, all others are findings."""
    if marker.exists():
        return "code ran"
    if status is None:
        return "hang"
    if re.search("not enough memory|can't allocate|Cannot allocate|MemoryError|bad_alloc|memory allocation", err):
        return "memory"
    if status < 0:
        return "abort"
    if "Traceback (most" in err or "panicked at" in err or status == 70:
        return "traceback"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", err + out):
        return "control characters"
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    refused = status in (1, 2) and len(errors) == 1 and err.rstrip().endswith(errors[0].rstrip())
    if status == 0 or refused or (command == "hub-verify" and status == 1):
        return "refused" if status else "ok"
    return "not one sentence"
