"""Test properties of any text and recipe: vectors are finite, of length 1 and independent; recipes are read or refused."""

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import save_model
from minibert import train_word_level, train_wordpiece
from minibert.files.disk import to_yaml
from minibert.inference.encode import Encoder
from minibert.train import arguments
from minibert.train.arguments import KINDS
from minibert.train.recipe import load_recipe
from minibert.train.run import _dump

# Where a machine decides whether a change is good it must decide the same tomorrow; elsewhere every run looks further.
settings.register_profile("minibert", deadline=None, derandomize="CI" in os.environ, database=None)
settings.load_profile("minibert")

CORPUS = ["The quick brown fox jumps over the lazy dog.", "Ünïcode is fine, and so are 中文 and ελληνικά — 🙂 too."] * 3

# Texts of any script, of control characters, and longer than the model reads.
TEXTS = st.one_of(
    st.text(),
    st.text("\x00\x01\x1b\x7f\u200b\u200d\u202e\ufeff\ufffd\t\r\n \u3000", min_size=1),
    st.text("abc 中é̈🙂ﷺ", min_size=1),
    st.builds(lambda text, times: text * times, st.text(min_size=1, max_size=4), st.integers(1, 5000)),
    st.sampled_from(["[CLS]", "[SEP] [MASK] [PAD]", "[UNK]" * 3, "", " ", "\x00", "a" * 100_000, "🙂" * 5000, "ﷺ" * 999]),
)


@pytest.fixture(scope="module", params=["search-8x768", "bert-base", "modern-6x384"])
def encoder(request, tmp_path_factory):
    """A model with each of the kinds of positions, and for one of them whole words as tokens."""
    train = train_word_level if request.param == "bert-base" else train_wordpiece
    tokenizer = train(CORPUS, vocab_size=20 if train is train_word_level else 90, model_max_length=24, show_progress=False)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    shape |= {"max_position_embeddings": 24, "initializer_range": 0.4}
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, tokenizer, preset=request.param, **shape)
    return Encoder(folder, dtype="float32", device="cpu", batch_tokens=64, normalize=True)


@settings(max_examples=15)
@given(text=TEXTS)
def test_any_text_has_a_finite_vector_of_length_1(encoder, text):
    vector = encoder.encode([text])[0]
    assert vector.shape == (24,) and np.isfinite(vector).all()
    assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < 1e-5


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXTS, min_size=2, max_size=12), rng=st.randoms(use_true_random=False))
def test_a_vector_depends_on_its_text_alone(encoder, texts, rng):
    alone = np.stack([encoder.encode([text])[0] for text in texts])
    np.testing.assert_allclose(encoder.encode(texts), alone, atol=1e-5, rtol=0)
    order = list(range(len(texts)))
    rng.shuffle(order)
    np.testing.assert_allclose(encoder.encode([texts[row] for row in order]), alone[order], atol=1e-5, rtol=0)
    # And as sentence-transformers batches, with padding.
    theirs = encoder.model.encode(texts, batch_size=5, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(theirs, alone, atol=1e-5, rtol=0)


def test_eight_threads_with_one_encoder_get_equal_vectors(encoder):
    texts = [["fox " * (number % 7) + "dog " * thread for number in range(30)] for thread in range(8)]
    alone = [encoder.encode(some) for some in texts]
    with ThreadPoolExecutor(8) as pool:
        for together, expected in zip(pool.map(encoder.encode, texts * 2), alone * 2, strict=True):
            np.testing.assert_array_equal(together, expected)


@settings(max_examples=15)
@given(text=TEXTS)
def test_token_ids_are_of_the_vocabulary_and_as_many_as_the_model_reads(encoder, text):
    tokenizer = encoder.model.tokenizer
    ids = tokenizer(text, truncation=True)["input_ids"]
    assert 2 <= len(ids) <= 24 and (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert all(0 <= token < len(tokenizer) for token in ids)


# ------------------------------------------------------------------------------------------------------------- recipes

WORDS = sorted({name for kind in KINDS.values() for name in kind.model_fields} | {"stages", "seed", "preset", "path"})
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4)),
    st.sampled_from([*KINDS, "bert-base", "a/b", "data.csv", "train[:10%]", 1, 0.1]),
)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=5), st.integers(), st.none(), st.booleans())
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)), max_leaves=12
)
STAGES = st.builds(
    lambda kind, more: {**more, "kind": kind, "data": "data.csv"},
    st.one_of(st.sampled_from(list(KINDS)), VALUES),
    st.dictionaries(KEYS, VALUES, max_size=4),
)
RECIPES = st.one_of(
    VALUES,
    st.builds(
        lambda stages, more: {"name": "toy", **more, "stages": stages},
        st.one_of(st.lists(st.one_of(STAGES, VALUES), max_size=3), VALUES),
        st.dictionaries(KEYS, VALUES, max_size=2),
    ),
)
PATHS = st.lists(
    st.one_of(st.sampled_from([*KINDS, *WORDS, "0", "1", "-1", "²", ""]), st.text(max_size=4)), min_size=1, max_size=5
)
OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds(lambda path, value: f"{'.'.join(path)}={value}", PATHS, st.one_of(st.text(max_size=12), SCALARS.map(str))),
    st.builds(lambda path, value: f"{'.'.join(path)}={yaml.safe_dump(value)}", PATHS, VALUES),
)


def read(content, overrides=()):
    """The recipe in a file of this ``content``, or ``None`` where it is refused as recipes are."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(content)
        try:
            return load_recipe(file, overrides)
        except ValueError as error:
            first, *others = str(error).splitlines()
            assert str(error).startswith(str(file)) and len(str(error)) < 100_000
            # One sentence, or a list of them that says how many they are.
            assert not others or re.search(r"has \d+ problems:$", first)
            return None


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(raw=RECIPES, overrides=st.lists(OVERRIDES, max_size=3))
@example({"name": "toy", "stages": "tokenizer"}, ["tokenizer.data=a.csv"])
@example({"name": "toy", "stages": [{"kind": ["tokenizer"]}]}, [])
def test_anything_nested_is_a_recipe_or_refused(raw, overrides):
    recipe = read(yaml.safe_dump(raw).encode(), overrides)
    assert recipe is None or isinstance(recipe, arguments.Recipe)


@settings(max_examples=100)
@given(content=st.one_of(st.binary(), st.text().map(str.encode), st.text("[]{}:&*!-?|>%@`\"' \t\nab1").map(str.encode)))
@example(b"a: &a [*a]")
@example(b"? [a, b]\n: c")
@example(b"a: 2026-99-99")
@example(b"[" * 3000)
@example(b'a: !!int ""')
@example(b"a: !!timestamp now")
@example(b"a: !!bool x")
def test_any_bytes_are_a_recipe_or_refused(content):
    assert read(content) is None


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.fixed_dictionaries(
        {},
        optional={
            "batch_size": st.integers(1, 10**9),
            "learning_rate": st.floats(1e-12, 1e3),
            "epochs": st.floats(0.001, 1e6),
            "warmup_ratio": st.floats(0, 1),
            "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
            "adam_betas": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list),
            "labels": st.lists(st.text(), min_size=1, max_size=3, unique=True),
            "text_columns": st.lists(st.text(), min_size=1, max_size=2),
            "model": st.one_of(st.text(min_size=1), st.just({"preset": "nano-1x3", "hidden_dropout_prob": 0.25})),
            "seed": st.integers(0, 2**63),
        },
    ),
    data=st.lists(st.text(min_size=1), min_size=1, max_size=2),
    seed=st.integers(0, 2**31),
)
@example(sizes={"labels": ["\x85"]}, data=["\x85"], seed=0)  # ends a line in YAML
@example(sizes={"labels": ["1e5"], "learning_rate": 1e-5}, data=["0E0"], seed=0)  # numbers to our YAML, not to YAML 1.1
def test_a_recipe_written_down_is_the_same_recipe(sizes, data, seed):
    stages = [{"kind": "tokenizer", "data": data}, {"kind": "classify", "data": data, "model": {"preset": "nano-1x3"}, **sizes}]
    recipe = read(to_yaml({"name": "toy", "seed": seed, "stages": stages}).encode())
    assert recipe is not None
    whole = {"name": recipe.name, "seed": recipe.seed, "stages": [_dump(stage) for stage in recipe.stages]}  # as a run keeps it
    assert read(to_yaml(whole).encode()) == recipe
    settings_given = [f"classify.{name}={to_yaml(value)}" for name, value in sizes.items()]
    plain = to_yaml({"name": "toy", "seed": seed, "stages": [stages[0], {**stages[1], **dict.fromkeys(sizes)}]})
    assert read(plain.encode(), settings_given) == recipe  # said on the command line instead
