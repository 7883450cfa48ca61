"""minibert.encode: the same vectors as sentence-transformers, whatever the batches, and what is left to it."""

import copy
import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from sentence_transformers.util import quantize_embeddings
from transformers import BertConfig, BertModel

import minibert
from helpers import TINY, save_model
from minibert import MiniBertConfig, MiniBertModel, train_word_level, train_wordpiece
from minibert.inference import batching, cpu
from minibert.inference import encode as module
from minibert.inference.batching import cut_windows
from minibert.inference.cpu import PrepackedLayer, PrepackedLinear, choose_dtype, prepack, supports_half_copies
from minibert.inference.encode import Encoder, encode
from minibert.inference.load import load
from minibert.kernels_minibert import ONEDNN_DTYPES
from minibert.modeling_minibert import MiniBertLayer
from minibert.packing_minibert import Packing, rounded

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "ran",
    "home",
    "and",
    "rain",
    "fell",
    "over",
    "green",
    "hills",
    "near",
    "old",
    "town",
]
rng = np.random.default_rng(0)
TEXTS = [" ".join(rng.choice(WORDS, size)) for size in rng.integers(1, 60, 30)] + ["", "  ", "unheard-of 中文 words"]


@pytest.fixture(scope="session")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=80, model_max_length=40)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer):
    """A model folder for each kind of positions and norms, and one of a BERT."""
    root = tmp_path_factory.mktemp("encoders")
    for name in ("search-8x768", "modern-6x384"):
        save_model(root / name, tokenizer, preset=name)
    BertModel(BertConfig(**{**TINY, "vocab_size": len(tokenizer)})).save_pretrained(root / "bert")
    tokenizer.save_pretrained(root / "bert")
    return root


class OwnPooling(Pooling):
    def forward(self, features, **kwargs):
        features["sentence_embedding"] = features["token_embeddings"].sum(dim=1)
        return features


class Offset(Normalize):
    def forward(self, features):
        return {**features, "sentence_embedding": features["sentence_embedding"] + 1}


def dense_of_tokens():
    return Dense(32, 32, module_input_name="token_embeddings")


def with_lengths(model):
    model[0].query_length = 5
    return model


def assemble(folder, *, pooling="mean", before=(), after=(Normalize,), pool=Pooling, **pool_options):
    transformer = Transformer(str(folder))
    pool = pool(transformer.get_embedding_dimension(), pooling_mode=pooling, **pool_options)
    modules = [transformer, *(kind() for kind in before), pool, *(kind() for kind in after)]
    return SentenceTransformer(modules=modules, device="cpu")


# The pooling, the modules after it, and other settings of a model.
HEADS = {
    "dense": ("mean", (lambda: Dense(32, 8),), {}),
    "two": (
        "cls",
        (Normalize, lambda: Dense(32, 48, activation_function=torch.nn.GELU()), lambda: Dense(48, 8, bias=False)),
        {},
    ),
    "names": (
        "mean",
        (
            lambda: Dense(32, 8, module_output_name="small"),
            lambda: Dense(8, 5, module_input_name="small", module_output_name="sentence_embedding"),
        ),
        {},
    ),
    "residual": ("mean", (Normalize, lambda: Dense(32, 32, use_residual=True), Dropout, lambda: LayerNorm(32), Normalize), {}),
    "max": ("max", (), {}),
    "sqrt": ("mean_sqrt_len_tokens", (Normalize,), {}),
    "weighted": ("weightedmean", (Normalize,), {}),
    "last": ("lasttoken", (), {}),
    "several": (("max", "cls", "mean", "weightedmean", "lasttoken"), (lambda: Dense(160, 12), Normalize, Normalize), {}),
    **{f"{mode} without prompt": (mode, (Normalize,), {"include_prompt": False}) for mode in Pooling.POOLING_MODES},
    "truncated": ("mean", (Normalize,), {"truncate_dim": 8}),
    "truncated dense": ("max", (Normalize, lambda: Dense(32, 16)), {"truncate_dim": 8}),
}


def with_head(folder, name, **options):
    pooling, after, settings = HEADS[name]
    torch.manual_seed(0)
    cut = settings.get("truncate_dim")
    model = assemble(folder, pooling=pooling, after=after, **{key: settings[key] for key in settings.keys() - {"truncate_dim"}})
    model.truncate_dim, model.prompts = cut, {"query": "two dogs ", "document": "rain fell "}
    return model


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_TEXTS", 7)


@pytest.mark.parametrize("preset", ["search-8x768", "modern-6x384"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("after", [(), (Normalize,)])
def test_vectors_are_those_of_sentence_transformers(folders, small_windows, preset, pooling, after):
    model = assemble(folders / preset, pooling=pooling, after=after)
    encoder = Encoder(model, batch_tokens=64)
    assert encoder.packed and encoder.normalized == bool(after)
    np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_a_folder_is_opened_in_the_chosen_numbers(folders):
    folder = folders / "search-8x768"
    exact = encode(str(folder), TEXTS, dtype="float32")
    np.testing.assert_allclose(exact, assemble(folder).encode(TEXTS), atol=1e-5)
    half = Encoder(folder, dtype="bfloat16")
    assert half.dtype == "bfloat16" and "as asked" in half.decisions["dtype"]
    vectors = half.encode(TEXTS)
    assert vectors.dtype == np.float32 and 0 < np.abs(vectors - exact).max() < 0.05
    assert (vectors * exact).sum(axis=1).min() > 0.999
    assert minibert.encode is encode and encode(folder, "the cat", dtype="float32").shape == (32,)
    assert encode(folder, [], dtype="float32").shape == (0, 32)


def test_batches_of_any_size_give_the_same(folders):
    model = assemble(folders / "modern-6x384")
    expected = encode(model, TEXTS)
    for batch_tokens in (1, 41, 300):
        np.testing.assert_allclose(encode(model, TEXTS, batch_tokens=batch_tokens), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["search-8x768", "bert"])
def test_a_text_has_the_same_bits_in_any_company_if_that_is_asked(folders, name):
    encoder = Encoder(folders / name, dtype="float32", deterministic=True)
    together = encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        assert np.array_equal(encoder.encode([text])[0], together[row])
        assert np.array_equal(encoder.encode([TEXTS[-1], text, *TEXTS[:3]])[1], together[row])
    np.testing.assert_allclose(together, encode(folders / name, TEXTS, dtype="float32"), atol=1e-5)


def test_prompts_are_put_before_texts(folders):
    model = assemble(folders / "search-8x768")
    model.prompts = {"query": "two dogs "}
    for options in ({"prompt": "rain fell "}, {"prompt_name": "query"}):
        np.testing.assert_allclose(encode(model, TEXTS, **options), model.encode(TEXTS, **options), atol=1e-5)
    model.default_prompt_name = "query"
    np.testing.assert_allclose(encode(model, TEXTS), model.encode(TEXTS), atol=1e-5)
    assert np.abs(encode(model, TEXTS) - encode(model, TEXTS, prompt="")).max() > 1e-3
    with pytest.raises(ValueError, match="no prompt named 'nope'; it has"):
        encode(model, TEXTS, prompt_name="nope")


def test_queries_and_passages_get_their_prompts(folders):
    for model in (assemble(folders / "search-8x768"), assemble(folders / "search-8x768", include_prompt=False)):
        model.prompts = {"query": "two dogs ", "passage": "rain fell "}
        encoder = Encoder(model)
        np.testing.assert_allclose(encoder.encode_query(TEXTS), model.encode_query(TEXTS), atol=1e-5)
        np.testing.assert_allclose(encoder.encode_document(TEXTS), model.encode_document(TEXTS), atol=1e-5)
        np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    given = Encoder(model, prompt="green hills ")
    np.testing.assert_allclose(given.encode_query(TEXTS), model.encode(TEXTS, prompt="green hills "), atol=1e-5)


def test_rates_are_measured_once():
    rates = cpu.product_rates()
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0 and cpu.product_rates() is rates


def test_vectors_of_length_one_on_request(folders):
    model = assemble(folders / "search-8x768", after=())
    assert np.abs(np.linalg.norm(encode(model, TEXTS), axis=1) - 1).max() > 0.1
    vectors = encode(model, TEXTS, normalize=True)
    np.testing.assert_allclose(vectors, model.encode(TEXTS, normalize_embeddings=True), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda root: assemble(root / "bert"), "not a MiniBERT"),
        (lambda root: with_lengths(assemble(root / "search-8x768")), "options of its own"),
        (lambda root: assemble(root / "search-8x768", before=(dense_of_tokens,)), "not pooled from the last layer"),
        (lambda root: assemble(root / "search-8x768", pool=OwnPooling), "not pooled from the last layer"),
        (lambda root: assemble(root / "search-8x768", after=(Offset,)), "its module Offset may need padded tokens"),
        (lambda root: assemble(root / "search-8x768", after=(dense_of_tokens,)), "its module Dense may need padded tokens"),
    ],
)
def test_other_models_are_left_to_sentence_transformers(folders, small_windows, make, reason):
    model = make(folders)
    encoder = Encoder(model, prompt="rain ")
    assert not encoder.packed and reason in encoder.decisions["path"]
    assert encoder.encode(TEXTS).shape == (len(TEXTS), encoder.dimension)
    np.testing.assert_allclose(encoder.encode(TEXTS), model.encode(TEXTS, prompt="rain "), atol=1e-5)
    assert [part.shape for part in encoder.windows([[], ["cat"]])] == [(0, encoder.dimension), (1, encoder.dimension)]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_computed_without_padding(folders, small_windows, monkeypatch, name):
    model = with_head(folders / "modern-6x384", name)
    expected = {
        "encode": model.encode(TEXTS, prompt=None),
        "encode_query": model.encode_query(TEXTS),
        "encode_document": model.encode_document(TEXTS, normalize_embeddings=True),
    }
    tokens, forward = [], MiniBertModel.forward_packed

    def counted(self, ids, *rest):
        tokens.append(len(ids))
        return forward(self, ids, *rest)

    monkeypatch.setattr(MiniBertModel, "forward_packed", counted)
    monkeypatch.setattr(SentenceTransformer, "encode", None)
    for normalize in (False, True):
        encoder = Encoder(model, batch_tokens=64, normalize=normalize)
        assert encoder.packed and encoder.dimension == expected["encode"].shape[1]
        for method, vectors in expected.items():
            if normalize == (method == "encode_document"):
                tokens.clear()
                np.testing.assert_allclose(getattr(encoder, method)(TEXTS), vectors, atol=1e-5)
                prompt = model.prompts.get(method.removeprefix("encode_"), "")
                real = model.tokenizer([prompt + text for text in TEXTS], truncation=True, padding=False)["input_ids"]
                assert sum(tokens) == sum(map(len, real))
        if encoder.normalized:
            np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-5)
        else:
            assert np.abs(np.linalg.norm(encoder.encode(TEXTS), axis=1) - 1).max() > 1e-3


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_deterministic_if_that_is_asked(folders, name):
    encoder = Encoder(with_head(folders / "modern-6x384", name), deterministic=True)
    together = encoder.encode_query(TEXTS)
    for row in (0, 7, 30, 31):
        assert np.array_equal(encoder.encode_query(TEXTS[row]), together[row])
        assert np.array_equal(encoder.encode_query([*TEXTS[3:20], TEXTS[row]])[-1], together[row])


def test_a_head_stays_in_float32(folders, tmp_path):
    model = with_head(folders / "search-8x768", "two")
    expected = model.encode(TEXTS)
    model.save(str(tmp_path), create_model_card=False)
    for opened in (model, tmp_path):
        encoder = Encoder(opened, dtype="bfloat16")
        assert encoder.packed and encoder.dtype == "bfloat16"
        assert all(parameter.dtype == torch.float32 for module in list(encoder.model)[1:] for parameter in module.parameters())
        found = encoder.encode(TEXTS)
        assert 0 < np.abs(found - expected).max() < 0.05
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_truncated_vectors_are_those_of_sentence_transformers(folders, tmp_path):
    for name in ("search-8x768", "bert"):
        model = assemble(folders / name)
        for normalize in (False, True):
            encoder = Encoder(model, truncate_dim=8, normalize=normalize)
            expected = model.encode(TEXTS, truncate_dim=8, normalize_embeddings=normalize)
            np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
            assert encoder.dimension == 8 and encoder.normalized == normalize and model.truncate_dim is None
        model.truncate_dim = 8  # as trained; more dimensions are there all the same
        assert encode(model, TEXTS[:2], truncate_dim=16).shape == (2, 16)
        assert Encoder(model, truncate_dim=32).normalized
        model.truncate_dim = 99
        assert Encoder(model).dimension == 32 and Encoder(model).normalized


@pytest.mark.parametrize("name", ["search-8x768", "bert"])
def test_vectors_come_in_the_form_asked_for(folders, name):
    model = assemble(folders / name)
    encoder = Encoder(model, truncate_dim=16)
    vectors = encoder.encode(TEXTS)
    for precision in ("int8", "uint8", "binary", "ubinary"):
        found = encoder.encode(TEXTS, precision=precision)
        expected = quantize_embeddings(vectors, precision)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert np.array_equal(encode(model, TEXTS, truncate_dim=16, precision=precision), expected)
    one = encoder.encode_query(TEXTS[0], convert_to_tensor=True, precision="ubinary")
    assert one.dtype == torch.uint8 and one.shape == (2,)
    tensor = encoder.encode_document(TEXTS, convert_to_tensor=True)
    assert torch.equal(tensor, torch.from_numpy(vectors))
    assert torch.equal(encoder.similarity(vectors[0], tensor), model.similarity(vectors[0], vectors))
    assert encoder.encode([], convert_to_tensor=True).shape == (0, 16)
    with pytest.raises(ValueError, match="from a single embedding"):
        encoder.encode(TEXTS[0], precision="int8")


def test_a_prompt_is_chosen_by_call_encoder_task_and_model_in_this_order(folders, tmp_path):
    model = assemble(folders / "search-8x768")
    model.prompts = {"query": "two dogs ", "document": "", "passage": "rain fell ", "other": "old town "}
    model.default_prompt_name = "other"

    def prompt_of(encoder, method, **options):
        found = getattr(encoder, method)(["the cat"], **options)
        prompts = ["", "green hills ", *filter(None, model.prompts.values())]
        return prompts[np.argmin([np.abs(found - model.encode(["the cat"], prompt=prompt)).max() for prompt in prompts])]

    model.save_pretrained(str(tmp_path))
    encoder = Encoder(tmp_path)
    assert prompt_of(encoder, "encode") == "old town "
    assert prompt_of(encoder, "encode_query") == "two dogs " == prompt_of(encoder, "encode", prompt_name="query")
    assert prompt_of(encoder, "encode_document") == "rain fell " == encoder.model.prompts["document"]
    assert np.array_equal(*[next(encoder.windows([["a cat"]], task="document")), encoder.encode_document(["a cat"])])
    given = Encoder(model, prompt="green hills ")
    assert prompt_of(given, "encode_query") == prompt_of(given, "encode") == "green hills "
    assert prompt_of(given, "encode_query", prompt_name="passage") == "rain fell "
    assert prompt_of(Encoder(model), "encode_document") == ""  # of an opened model, the library's own choice
    with pytest.raises(ValueError, match="no prompt named 'nope'"):
        encoder.encode_query("a", prompt_name="nope")


def test_a_bert_stays_in_float32_unless_asked(folders, monkeypatch):
    monkeypatch.setattr(module, "choose_dtype", lambda dtype, device: ("bfloat16", "for the test"))
    assert Encoder(folders / "bert").dtype == "float32"
    assert Encoder(folders / "modern-6x384").dtype == "bfloat16"


def test_texts_without_a_token_get_the_vector_they_get_elsewhere(folders, tmp_path):
    words = train_word_level(TEXTS[:5], vocab_size=20)
    MiniBertModel(MiniBertConfig.preset("nano-1x3", vocab_size=len(words))).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = assemble(tmp_path)
    texts = ["", "the cat", "   ", "the"]
    np.testing.assert_allclose(encode(model, texts), model.encode(texts), atol=1e-5)
    assert encode(model, ["", " "]).shape == (2, 3)
    model = assemble(tmp_path, after=(lambda: Dense(3, 2), Normalize))
    np.testing.assert_allclose(encode(model, texts), model.encode(texts), atol=1e-5)


# --- long texts -----------------------------------------------------------------------------------------------------------


def test_of_a_long_text_only_the_start_is_tokenized(folders, monkeypatch):
    model = assemble(folders / "search-8x768")
    seen = []
    start = batching.cut_text

    def spy(text, limit):
        seen.append(len(start(text, limit)))
        return start(text, limit)

    monkeypatch.setattr(batching, "cut_text", spy)
    long = "the cat sat " * 20_000
    np.testing.assert_allclose(encode(model, [long]), model.encode([long]), atol=1e-5)
    assert seen and max(seen) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "x" * 50_000,  # one word
        " " * 50_000 + "the cat sat on a mat",  # nothing at the start
        "cat" + " \n" * 50_000 + "dogs ran home",
        "中" * 5_000,  # no white space, a token per character
        ("y" * 3_000 + " ") * 60,  # words longer than the cut
    ],
)
def test_a_cut_never_changes_a_vector(folders, text):
    model = assemble(folders / "search-8x768")
    np.testing.assert_allclose(encode(model, [text, "the cat"]), model.encode([text, "the cat"]), atol=1e-5)


def test_texts_cut_on_the_left_are_read_whole(folders):
    model = assemble(folders / "search-8x768")
    model.tokenizer.truncation_side = "left"
    long = "the cat sat " * 1000 + "rain fell"
    np.testing.assert_allclose(encode(model, [long]), model.encode([long]), atol=1e-5)


# --- memory, choices, refusals --------------------------------------------------------------------------------------------


def test_windows_are_taken_one_ahead_of_the_vectors(folders):
    taken = 0

    def windows():
        nonlocal taken
        for _ in range(10):
            taken += 1
            yield ["the cat"] * 3

    vectors = Encoder(assemble(folders / "search-8x768")).windows(windows())
    for count in range(1, 4):
        assert next(vectors).shape == (3, 32)
        assert taken <= count + 1
    vectors.close()


def test_windows_hold_few_texts_and_few_characters(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(batching, "WINDOW_CHARACTERS", 10)
    texts = ["a", "b", "c", "d", "e" * 9, "f", "g" * 50, "h"]
    windows = list(cut_windows(texts))
    assert [text for window in windows for text in window] == texts
    assert [len(window) for window in windows] == [3, 2, 1, 1, 1]


def test_a_model_goes_with_its_last_user(folders):
    assemble(folders / "search-8x768").save_pretrained(str(folders / "modules"))
    gc.disable()  # cycles would go too, some time or other
    try:
        for folder in (folders / "search-8x768", folders / "modules"):
            for opened in (load, Encoder):
                model = opened(folder)
                model.encode(["the cat"])
                gone = weakref.ref(model if opened is load else model.model)
                del model
                assert gone() is None
    finally:
        gc.enable()


def test_free_memory_is_handed_back_now_and_then(folders, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(module, "_malloc_trim", calls.append)
    monkeypatch.setattr(module, "_trimmed", 0.0)
    for _ in range(3):
        encode(assemble(folders / "search-8x768"), ["the cat"])
    assert calls == [0]
    monkeypatch.setattr(module, "TRIM_SECONDS", 0.0)
    encode(assemble(folders / "search-8x768"), ["the cat"])
    assert calls == [0, 0]


def test_whoever_asks_one_thread_tokenizes_and_batches_are_computed_in_turns(folders, monkeypatch):
    encoder = Encoder(assemble(folders / "search-8x768"))
    tokenizing, computing, inside, most = set(), set(), [], []
    vectors_of, batches_of = Encoder._vectors, batching.Tokenizer.batches

    def batches(self, *arguments):
        tokenizing.add(threading.get_ident())
        return batches_of(self, *arguments)

    def vectors(self, batch):
        computing.add(threading.get_ident())
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.01)
        found = vectors_of(self, batch)
        inside.pop()
        return found

    monkeypatch.setattr(batching.Tokenizer, "batches", batches)
    monkeypatch.setattr(Encoder, "_vectors", vectors)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder.encode, [TEXTS] * 8))
    assert len(tokenizing) == 1 and len(computing) == 4 and set(most) == {1}
    assert all(np.array_equal(vectors, found[0]) for vectors in found)
    np.testing.assert_allclose(encoder.encode(TEXTS[:2]), found[0][:2], atol=2e-2)
    assert len(tokenizing) == 2 and threading.get_ident() in tokenizing  # a query or two are not worth another thread
    parent = os.getpid()
    held = [batching._TURNS["cpu", parent], batching._TURNS["tokenizer", parent]]
    monkeypatch.setattr(batching.os, "getpid", lambda: -1)  # as in a child process, which has no thread of its parent
    with held[0], held[1], ThreadPoolExecutor(1) as pool:  # nor waits for them
        assert np.array_equal(pool.submit(encoder.encode, TEXTS).result(60), found[0]) and len(tokenizing) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_processor_without_the_instructions_computes_all_the_same(folders, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN_DTYPES", frozenset())
    encoder = Encoder(folders / "search-8x768", dtype=dtype)
    assert encoder.dtype == dtype and "matrices" not in encoder.decisions
    exact = Encoder(folders / "search-8x768", dtype="float32").encode(TEXTS)
    assert (encoder.encode(TEXTS) * exact).sum(axis=1).min() > 0.999


@pytest.mark.parametrize("whole", [True, False])
def test_the_attention_chosen_is_said(folders, whole, monkeypatch):
    monkeypatch.setattr(module, "PREFERS_EXP2", whole)
    said = {
        dtype: Encoder(folders / "search-8x768", dtype=dtype).decisions.get("attention") for dtype in ("bfloat16", "float32")
    }
    assert said == {"bfloat16": "powers of two, since this processor has no AMX" if whole else None, "float32": None}


needs_onednn = pytest.mark.skipif(torch.float32 not in ONEDNN_DTYPES, reason="oneDNN's own call is not here")


@pytest.mark.parametrize("name", ["search-8x768", "modern-6x384"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float32", 1e-5, marks=needs_onednn),
        pytest.param(
            "float16",
            2e-3,
            marks=pytest.mark.skipif(torch.float16 not in ONEDNN_DTYPES, reason="processor without float16"),
        ),
        pytest.param(
            "bfloat16",
            2e-2,
            marks=pytest.mark.skipif(torch.bfloat16 not in ONEDNN_DTYPES, reason="processor without bfloat16"),
        ),
    ],
)
def test_matrices_laid_out_anew_give_the_vectors_of_the_model(folders, tmp_path, monkeypatch, name, dtype, tolerance):
    monkeypatch.setattr(cpu, "bfloat16_is_faster", lambda: True)
    opened = assemble(folders / name)
    opened.save(str(tmp_path / name))
    encoder = Encoder(tmp_path / name, dtype=dtype)
    assert encoder.decisions["matrices"] == "prepacked for oneDNN"
    assert all(type(layer) is PrepackedLayer for layer in encoder.model[0].auto_model.layers)
    expected = opened.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=tolerance)
    np.testing.assert_allclose(encoder.model.encode(TEXTS), expected, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == "float32" else getattr(torch, dtype)):
        assert np.isfinite(encoder.encode(TEXTS)).all()
    with pytest.raises(NotImplementedError, match="cannot be saved"):
        encoder.model.save(str(tmp_path / "again"))


def test_a_model_that_the_caller_opened_stays_as_it_is(folders):
    opened = assemble(folders / "search-8x768")
    before = {name: tensor.clone() for name, tensor in opened.state_dict().items()}
    assert "matrices" not in Encoder(opened).decisions
    for dtype in ONEDNN_DTYPES:  # on a copy
        assert "matrices" in Encoder(opened, dtype=str(dtype).removeprefix("torch.")).decisions
    after = opened.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert opened[0].auto_model.pooler is not None


@needs_onednn
def test_other_processors_and_other_layers_keep_their_matrices(folders, monkeypatch):
    model = MiniBertModel.from_pretrained(folders / "search-8x768").eval()
    adapted = type("Adapted", (torch.nn.Linear,), {})
    model.layers[1].mlp.up.__class__ = adapted
    hooked = copy.deepcopy(model)
    hooked.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert prepack(hooked) and not any(type(layer) is PrepackedLayer for layer in hooked.layers)
    offloaded = copy.deepcopy(model)
    offloaded.layers[0].attention.forward = lambda *given, **named: given
    assert prepack(offloaded) and type(offloaded.layers[0]) is MiniBertLayer
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "ONEDNN_DTYPES", frozenset())
        assert not prepack(model)
    layers, ids = list(model.layers), torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    assert prepack(model)
    assert (
        type(model.layers[0]) is PrepackedLayer and list(model.layers)[1:2] == layers[1:2] and type(layers[1]) is MiniBertLayer
    )
    found = model(ids).last_hidden_state
    assert not found.requires_grad  # such products have no backward
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.parametrize("preset", ["search-8x768", "modern-6x384", "simple-4x256"])  # all kinds of norms and MLPs
def test_layers_laid_out_compute_what_they_computed(preset, batch):
    torch.manual_seed(0)
    model = MiniBertModel(MiniBertConfig.preset(preset, **TINY)).eval()
    packed = {"input_ids": torch.arange(1, 13)[None], "position_ids": torch.tensor([[0, 1, 2, *range(9)]])}
    bounds = torch.tensor([0, 3, 12], dtype=torch.int32)
    inputs = [batch, {**packed, "cu_seq_lens_q": bounds, "max_length_q": 9}, {**batch, "output_hidden_states": True}]
    with torch.no_grad():
        before = [copy.deepcopy(model)(**given) for given in inputs]
        gpu = model.forward_packed(packed["input_ids"][0], packed["position_ids"][0], Packing(cu_seqlens=bounds, max_length=9))
        assert prepack(model) and all(type(layer) is PrepackedLayer for layer in model.layers)
        after = [model(**given) for given in inputs]
        alone = model.forward_packed(packed["input_ids"][0], packed["position_ids"][0], Packing.of_lengths([3, 9]))
    real = batch["attention_mask"].bool()
    for old, new in zip(before, after, strict=True):
        rows = real if old.last_hidden_state.shape[:2] == real.shape else torch.ones(1, 12, dtype=torch.bool)
        torch.testing.assert_close(new.last_hidden_state[rows], old.last_hidden_state[rows], atol=1e-5, rtol=1e-5)
    assert len(after[2].hidden_states) == len(before[2].hidden_states) == model.config.num_hidden_layers + 1
    for old, new in zip(before[2].hidden_states, after[2].hidden_states, strict=True):
        torch.testing.assert_close(new[real], old[real], atol=1e-5, rtol=1e-5)
    for found in (alone, gpu):  # as minibert.encode asks on a CPU and on a GPU
        torch.testing.assert_close(found, before[1].last_hidden_state[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Token id 101 is not in the model's vocabulary"):
        model.forward_packed(torch.tensor([101]), torch.tensor([0]), Packing.of_lengths([1]))


@pytest.mark.skipif(not supports_half_copies(torch.float32), reason="torch without FBGEMM")
@needs_onednn
def test_a_query_is_multiplied_by_matrices_in_float16(folders, monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_is_faster", lambda: False)
    chosen, exact = Encoder(folders / "modern-6x384"), Encoder(folders / "modern-6x384", dtype="float32")
    assert "for a query in float16" in chosen.decisions["matrices"] and "float16" not in exact.decisions["matrices"]
    assert "float16" not in Encoder(folders / "modern-6x384", query_copies=False).decisions["matrices"]

    def copies(encoder):
        layers = encoder.model[0].auto_model.layers
        return [
            linear.half is not None for layer in layers for linear in vars(layer).values() if type(linear) is PrepackedLinear
        ]

    query, many = "the cat sat", ["two dogs ran home " * 5] * 4
    np.testing.assert_array_equal(chosen.encode(many), exact.encode(many))
    assert not any(copies(chosen))  # encoding a corpus needs no memory for them
    found, expected = chosen.encode([query]), exact.encode([query])
    assert all(copies(chosen)) and not any(copies(exact))
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_array_equal(
        encode(folders / "modern-6x384", [query]), Encoder(folders / "modern-6x384", dtype="float32").encode([query])
    )
    np.testing.assert_array_equal(chosen.encode(many), exact.encode(many))


@pytest.mark.skipif(not supports_half_copies(torch.float32), reason="torch without FBGEMM")
@needs_onednn
def test_only_matrices_that_float16_can_hold_are_kept_in_it():
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(16, 8), torch.randn(2, 3, 16)
    rounded_linear = copy.deepcopy(linear)
    rounded_linear.weight.data = linear.weight.data.half().float()
    with torch.no_grad():
        laid_out = PrepackedLinear(linear, gelu=True, half_copies=True)
        torch.testing.assert_close(laid_out(states), torch.nn.functional.gelu(rounded_linear(states)), atol=1e-6, rtol=1e-6)
        many = torch.randn(4, 8, 16)  # 32 rows
        torch.testing.assert_close(laid_out(many), torch.nn.functional.gelu(linear(many)), atol=1e-6, rtol=1e-6)
        linear.weight.data[0, 0] = 7e4
        laid_out = PrepackedLinear(linear, half_copies=True)
        torch.testing.assert_close(laid_out(states), linear(states))
        assert laid_out.half is None
    assert not supports_half_copies(torch.bfloat16)


def test_windows_that_nobody_asks_for_any_more_are_not_tokenized(folders, monkeypatch):
    encoder = Encoder(assemble(folders / "search-8x768"))
    seen, started, go = [], threading.Event(), threading.Event()

    def batches(self, texts, *rest):
        seen.append(texts[0])
        started.set()
        assert go.wait(60)
        return []

    monkeypatch.setattr(batching.Tokenizer, "batches", batches)

    def windows():
        yield ["first"] * 9
        assert started.wait(60)  # the one thread is busy with it, so what is asked for next waits
        yield ["second"] * 9

    def interrupted():
        yield from windows()
        raise KeyboardInterrupt

    asked = encoder.windows(interrupted())
    monkeypatch.setattr(encoder, "_next", lambda waiting: None)
    next(asked)
    with pytest.raises(KeyboardInterrupt):
        next(asked)
    go.set()
    batching.tokenizing_thread(os.getpid()).submit(int).result()  # the thread has done what it had to do
    assert seen == ["first"]


@pytest.mark.parametrize(("half", "expected"), [(300.0, "bfloat16"), (110.0, "float32"), (50.0, "float32")])
def test_the_faster_numbers_are_chosen_and_said(monkeypatch, half, expected):
    """Faster by enough, since digits are given for it."""
    monkeypatch.setattr(cpu, "product_rates", lambda: {"float32": 100.0, "bfloat16": half})
    assert choose_dtype("auto", "cpu:0") == choose_dtype("auto", "cpu")
    dtype, reason = choose_dtype("auto", "cpu")
    assert dtype == expected and f"{half / 100:.1f} times as fast" in reason
    assert choose_dtype("bfloat16", "cpu") == ("bfloat16", "as asked")


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a", None], {}, "Text 1 is NoneType, not a string: None"),
        (["a"], {"dtype": "int8"}, "dtype='int8' is unknown; use one of auto, float32"),
        (["a"], {"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        (["a"], {"batch_tokens": 64, "deterministic": True}, "batch_tokens=64 and deterministic=True are both given"),
        (["a"] * 4096 + [None], {}, "Text 4096 is NoneType"),  # the first of a window
        (["a"] * 5000 + [None], {}, "Text 5000 is NoneType"),
        (["a", "\ud800"], {}, r"Text 1 holds a lone surrogate, which is not a character: '.*ud800'; decode the text"),
        (["a"], {"prompt": "caf\udce9 "}, r"The prompt 'caf.*udce9 ' is not valid UTF-8"),
        (["a"], {"prompt": "a", "prompt_name": "zzz"}, "prompt and prompt_name are both given"),
        (["a"], {"truncate_dim": 0}, "truncate_dim must be between 1 and 32, got 0 .--truncate-dim"),
        (["a"], {"truncate_dim": 33}, "truncate_dim must be between 1 and 32, got 33"),
        (["a"], {"precision": "int4"}, "precision='int4' is unknown; use one of float32, int8, uint8, binary, ubinary"),
    ],
)
def test_wrong_arguments_are_refused(folders, texts, options, message):
    with pytest.raises(ValueError, match=message):
        encode(assemble(folders / "search-8x768"), texts, **options)


def test_texts_are_numbered_whatever_the_path_they_take(folders, small_windows):
    padded = Encoder(assemble(folders / "bert"))
    assert not padded.packed
    with pytest.raises(ValueError, match="Text 8 is int"):
        padded.encode(["a"] * 8 + [8])


@pytest.mark.parametrize("device", ["foo", "", "meta", "hpu", "cuda:99", "mps:7"])
def test_a_device_that_is_not_here_is_refused_before_the_model_is_opened(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot be used here; use one of cpu.* .--device."):
        Encoder("no-such-model", device=device)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=40), st.integers(1, 60))
def test_batches_hold_every_text_once_and_are_few(lengths, batch_tokens):
    lengths = np.array(lengths, dtype=np.int64)
    batches = batching.cut_batches(lengths, batch_tokens)
    assert sorted(row for batch in batches for row in batch.tolist()) == np.flatnonzero(lengths).tolist()
    assert all(len(batch) == 1 or lengths[batch].sum() <= batch_tokens for batch in batches)
    assert all((np.diff(lengths[batch]) >= 0).all() for batch in batches)
    fewest, room = 0, 0  # each as full as it may be
    for length in sorted(lengths[lengths > 0].tolist(), reverse=True):
        if length > room:
            fewest, room = fewest + 1, batch_tokens
        room -= length
    assert len(batches) == fewest


def test_windows_of_any_texts_make_batches_of_few_sizes():
    rng = np.random.default_rng(0)
    windows = [rng.integers(5, rng.integers(20, 60), 4096) for _ in range(20)]
    sizes = {rounded(int(window[batch].sum())) for window in windows for batch in batching.cut_batches(window, 4096)}
    assert sizes <= {3840, 3968, 4096}
