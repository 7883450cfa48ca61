"""Helpers that several test files share: tiny models with their tokenizers, files of rows, recipes, weights, processes."""

import configparser
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from typer.testing import CliRunner

import minibert
from minibert import MiniBertConfig, train_word_level
from minibert.cli import app
from minibert.data.tags import entity_spans
from minibert.hub.families import FAMILIES

ROOT = Path(minibert.__file__).parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
# The shape every test model has, to be combined with a preset's switches.
TINY = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
FAMILY_HEADS = [(name, kind) for name, family in FAMILIES.items() for kind in family.classes]
SENTENCES = ["the quick brown fox jumps over the lazy dog", "what is the capital of a short text ?", "others sleep , and one ."]


# Commands and processes


def run_command(*arguments, **options):
    """Run ``minibert ARGUMENTS`` in this process and return what typer's runner recorded."""
    return CliRunner().invoke(app, [*map(str, arguments)], **options)


def run_python(code, *arguments, **options):
    """Run ``code`` in a fresh process that must succeed and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Files


def write_rows(path, rows):
    """Write ``rows`` as JSON lines and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_recipe(folder, *stages, **fields):
    """Write a recipe of ``stages`` into ``folder`` and return its path."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "stages": list(stages), **fields}), encoding="utf-8")
    return path


def edit_json(path, **fields):
    """Set fields of a JSON file; None drops a field."""
    found = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def read_weights(folder):
    return load_file(folder / "model.safetensors")


def write_vectors(folder, vectors, texts=None, *, ids=None, precision="float32", rows_per_shard=500, **fields):
    """Write a folder of vectors without encoding, or add to it, and return it; ``fields`` are those of the manifest."""
    import numpy as np
    import pyarrow as pa

    from minibert.search.vectors import Manifest, Shard, ShardWriter, VectorFolder, quantize, shard_name, write_manifest

    folder.mkdir(exist_ok=True)
    manifest = Manifest(
        dimension=vectors.shape[1],
        precision=precision,
        columns={"kept": texts is not None},
        rows_per_shard=rows_per_shard,
        rows=len(vectors),
        ranges=np.stack([vectors.min(0), vectors.max(0)]).tolist() if precision == "int8" else None,
        **{"model": "a-model", "fingerprint": "f" * 64, "normalized": True, "complete": True, "source": {}, "encoding": {}}
        | fields,
    )
    ids = pa.array(range(len(vectors)) if ids is None else ids)
    for number, start in enumerate(range(0, len(vectors), rows_per_shard)):
        rows = slice(start, min(start + rows_per_shard, len(vectors)))
        if not (folder / shard_name(number)).exists():
            with ShardWriter(folder / shard_name(number), manifest, ids.type) as writer:
                writer.write(ids[rows], texts[rows] if texts else [], quantize(vectors[rows], manifest))
        manifest.shards.append(Shard(shard_name(number), start, rows.stop - start, start, rows.stop - start))
    write_manifest(folder, manifest)
    return VectorFolder(folder)


def edit_weights(folder, **tensors):
    """Set tensors of a model; None drops a tensor."""
    state = {key: value for key, value in {**read_weights(folder), **tensors}.items() if value is not None}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


# Models


def save_model(folder, tokenizer, kind="Model", preset="search-8x768", seed=0, **fields):
    """Save a tiny random model of a preset with its tokenizer and return the folder."""
    config = MiniBertConfig.preset(preset, **{**TINY, "vocab_size": len(tokenizer), **fields})
    torch.manual_seed(seed)
    getattr(minibert, f"MiniBert{kind}")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_trained(folder, kind="Model", **fields):
    """Save a model as a training stage leaves it; the kind Model brings its sentence-transformers modules."""
    from sentence_transformers import SentenceTransformer  # takes seconds, which few test files need to spend
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}} if kind == "ForSequenceClassification" else {}
    tokenizer = train_word_level(SENTENCES, vocab_size=26, model_max_length=24)
    save_model(folder, tokenizer, kind, "bert-base", **labels, **fields)
    if kind == "Model":
        modules = [Transformer(str(folder)), Pooling(TINY["hidden_size"], pooling_mode="mean"), Normalize()]
        prompts = {"query": "what is "}
        SentenceTransformer(modules=modules, prompts=prompts, similarity_fn_name="cosine").save_pretrained(str(folder))
        (folder / "README.md").unlink()
    return folder


def family_tokenizer(family):
    """Return a tokenizer of whole words with the special tokens of a family (``FAMILIES``) in its order."""
    bert = not family.numbers_from_pad
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    first, last, unknown = special[1 if bert else 0], special[2], special[3]
    words = dict.fromkeys(" ".join(SENTENCES).split())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    segment = ":1" if bert else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last if bert else f'{last} {last}'} $B{segment} {last}{segment}",
        special_tokens=[(token, i) for i, token in enumerate(special)],
    )
    segments = ["token_type_ids"] if family.model_type == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", *segments, "attention_mask"],
        pad_token=special[0 if bert else 1],
        unk_token=unknown,
        cls_token=first,
        sep_token=last,
        mask_token=special[4],
        model_max_length=1000,
    )


def save_family(folder, name="bert", kind="Model", *, noise=0.05, **fields):
    """Save a tiny random model of a family and return it; every weight and bias is non-trivial."""
    family = FAMILIES[name]
    tokenizer = family_tokenizer(family)
    fields = {**TINY, "vocab_size": len(tokenizer) + 3, **fields}
    if name == "distilbert":
        fields["hidden_dim"] = fields.pop("intermediate_size")
        fields["seq_classif_dropout"] = 0.3
    elif family.numbers_from_pad:
        fields = {"type_vocab_size": 1, **fields, "max_position_embeddings": fields["max_position_embeddings"] + 2}
    labels = {} if kind.endswith("Answering") else {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    torch.manual_seed(0)
    model = getattr(transformers, family.class_name + kind)(CONFIG_MAPPING[name](**fields, **labels)).eval()
    add_noise(model, noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def add_noise(model, scale=0.05):
    """Make every parameter non-trivial, biases and norms included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def no_dropout(config):
    """Return a copy of ``config`` without dropout."""
    return MiniBertConfig(**{**config.to_dict(), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})


def in_iob2(tags):
    """Return ``tags`` with a B- at the start of every entity."""
    tags = list(tags)
    for kind, start, _ in entity_spans(tags):
        tags[start] = f"B-{kind}"
    return tags
