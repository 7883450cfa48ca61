"""The pretrain stage: what is masked, packed and paired; that it learns; what it refuses."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
)

from helpers import read_rows, read_weights, write_rows
from minibert import MiniBertForMaskedLM, MiniBertModel, train_word_level, train_wordpiece
from minibert.data.source import DataSource
from minibert.data.tokenized_corpus import load_corpus
from minibert.train.arguments import NewModel, PretrainStage, Recipe
from minibert.train.loop import seed_everything
from minibert.train.run import run_recipe
from minibert.train.stage import StageContext
from minibert.train.stages.pretrain import Masking, PackedRows, SentencePairs, pretrain

PRESET = {
    "preset": "simple-4x256",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}
WORDS = ["the", "cat", "dog", "bird", "fish", "saw", "heard", "liked", "small", "large", "house", "garden", "under", "behind"]


def documents(count=120):
    generator = np.random.default_rng(0)
    for _ in range(count):
        sentences = [
            " ".join(generator.choice(WORDS, generator.integers(3, 12))) + "." for _ in range(generator.integers(2, 7))
        ]
        yield " ".join(sentences)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus (corpus.jsonl) and a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrain")
    texts = list(documents())
    write_rows(folder / "corpus.jsonl", ({"text": text} for text in texts))
    train_wordpiece(texts, vocab_size=60, model_max_length=48).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def arguments(folder, **changes):
    values = {
        "kind": "pretrain",
        "data": str(folder / "corpus.jsonl"),
        "cache_dir": str(folder / "cache"),
        "model": PRESET,
        "batch_size": 8,
        "max_length": 32,
        "learning_rate": 5e-3,
        "log_steps": 5,
        "preprocessing_num_workers": 1,
        **changes,
    }
    return PretrainStage.model_validate(values)


@pytest.fixture
def run(folder, tmp_path):
    def run(**changes):
        args = arguments(folder, **changes)
        start = args.model if isinstance(args.model, str) else None
        return pretrain(args, StageContext(tmp_path / "out", 3, model=start, tokenizer=str(folder / "tokenizer")))

    return run


@pytest.fixture
def corpus(folder, tokenizer):
    source = DataSource(path=str(folder / "corpus.jsonl"))
    return load_corpus([source], tokenizer, sentence_delimiters=".!?", cache_dir=folder / "cache")


# ---------------------------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_shares_of_masking(folder, tokenizer, probability):
    """40,000 draws: a share of p is off by more than four standard deviations once in 16,000 tests."""
    masking = Masking(tokenizer, arguments(folder, mlm_probability=probability))
    ids = np.random.default_rng(1).integers(0, len(tokenizer), 40_000)
    seen, labels = masking(ids, np.random.default_rng(2))
    ordinary, chosen = ~masking.special[ids], labels != -100
    assert not (chosen & ~ordinary).any()
    assert np.array_equal(seen[~chosen], ids[~chosen])
    assert np.array_equal(labels[chosen], ids[chosen])

    def close(share, expected, count):
        return abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)

    count = int(chosen.sum())
    assert close(count / ordinary.sum(), probability, ordinary.sum())
    masked, kept = seen[chosen] == masking.mask, seen[chosen] == ids[chosen]
    words = (~masking.special).sum()
    assert close(masked.mean(), 0.8, count)
    assert close(kept.mean(), 0.1 + 0.1 / words, count)  # another word is the same one now and then
    replaced = seen[chosen][~masked & ~kept]
    assert not masking.special[replaced].any()
    assert len(np.unique(replaced)) == words


def test_whole_words_are_masked_together(folder, tokenizer):
    masking = Masking(tokenizer, arguments(folder, whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0))
    ids = np.array(tokenizer("garden behind house " * 500, truncation=False, verbose=False)["input_ids"])
    assert masking.continues[ids].mean() > 0.3  # this vocabulary cuts the words up
    _, labels = masking(ids, np.random.default_rng(0))
    word = np.cumsum(~masking.continues[ids])
    for number in np.unique(word):
        chosen = (labels != -100)[word == number]
        assert chosen.all() or not chosen.any()
    words = len(np.unique(word)) - 2
    share = len(np.unique(word[labels != -100])) / words
    assert abs(share - 0.15) < 4 * np.sqrt(0.15 * 0.85 / words)
    plain = Masking(tokenizer, arguments(folder))
    assert plain.continues is None


def bpe(pre_tokenizer):
    """A tokenizer of pairs of characters, trained on words that it cuts up."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        ["a garden behind the house"], trainers.BpeTrainer(vocab_size=26, special_tokens=special, show_progress=False)
    )
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.ByteLevel(), pre_tokenizers.Metaspace()])
def test_words_of_other_tokenizers_are_masked_whole(folder, pre_tokenizer):
    tokenizer = bpe(pre_tokenizer)
    masking = Masking(tokenizer, arguments(folder, whole_word_mask=True))
    ids = np.array([masking.cls, *tokenizer("garden behind house " * 300)["input_ids"], masking.sep])
    words = [word for word in "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])).replace("▁", "Ġ").split("Ġ") if word]
    assert words == ["garden", "behind", "house"] * 300 and len(ids) > 1500
    _, labels = masking(ids, np.random.default_rng(0))
    word = np.cumsum(~masking.continues[ids])
    chosen = [set((labels != -100)[word == number]) for number in np.unique(word)]
    assert all(len(one) == 1 for one in chosen) and {True} in chosen


def test_pieces_that_do_not_tell_words_apart(folder):
    words = train_word_level(["Ġorġ ġie d-dar"], lowercase=False)  # Maltese: no mark of a byte-level tokenizer
    assert not Masking(words, arguments(folder, whole_word_mask=True)).continues.any()
    with pytest.raises(ValueError, match="marks where words begin.*remove whole_word_mask"):
        Masking(bpe(None), arguments(folder, whole_word_mask=True))


def test_a_batch_always_has_a_label(folder, tokenizer):
    masking = Masking(tokenizer, arguments(folder, mlm_probability=1e-9))
    _, labels = masking(np.array([masking.cls, 10, 11, masking.sep]), np.random.default_rng(0))
    assert (labels != -100).sum() == 1 and labels[0] == labels[3] == -100


def test_masks_follow_the_seed_and_differ_between_steps(folder, tokenizer, corpus):
    rows = PackedRows(corpus, 32, Masking(tokenizer, arguments(folder)))

    def batch(*seed):
        seed_everything(*seed)
        return rows.collate(np.arange(8))

    assert torch.equal(batch(1, 2)["input_ids"], batch(1, 2)["input_ids"])
    assert not torch.equal(batch(1, 2)["input_ids"], batch(1, 3)["input_ids"])


# ------------------------------------------------------------------------------------------------------------------- rows


def test_packed_rows_have_no_padding_and_keep_documents_apart(folder, tokenizer, corpus):
    """A packed batch gives every piece the vectors it has on its own."""
    rows = PackedRows(corpus, 32, Masking(tokenizer, arguments(folder)))
    seed_everything(0)
    batch = rows.collate(np.arange(len(rows) - 20, len(rows)))
    batch.pop("labels")
    bounds = batch["cu_seq_lens_q"].tolist()
    assert len(bounds) - 1 > 20  # some rows hold several documents
    assert not (batch["input_ids"] == tokenizer.pad_token_id).any()
    torch.manual_seed(0)
    model = MiniBertModel(NewModel(**PRESET).config(vocab_size=len(tokenizer))).eval()
    with torch.no_grad():
        together = model(**batch).last_hidden_state[0]
        for begin, end in itertools.pairwise(bounds):
            piece = batch["input_ids"][:, begin:end]
            assert piece[0, 0] == tokenizer.cls_token_id and piece[0, -1] == tokenizer.sep_token_id
            torch.testing.assert_close(together[begin:end], model(piece).last_hidden_state[0], atol=1e-5, rtol=0)


def test_an_epoch_holds_every_token_once(folder, tokenizer, corpus):
    rows = PackedRows(corpus, 32, Masking(tokenizer, arguments(folder)))
    counts = np.zeros(len(tokenizer), dtype=int)
    for start in range(0, len(rows), 8):
        batch = rows.collate(np.arange(start, min(len(rows), start + 8)))
        ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        counts += np.bincount(ids.flatten().numpy(), minlength=len(tokenizer))
    counts[[tokenizer.cls_token_id, tokenizer.sep_token_id]] = 0
    assert np.array_equal(counts, np.bincount(corpus.tokens, minlength=len(tokenizer)))


def test_half_of_the_second_segments_follow_and_half_come_from_elsewhere(folder, tokenizer, corpus):
    pairs = SentencePairs(corpus, 32, Masking(tokenizer, arguments(folder)))
    tokens, sentences = np.array(corpus.tokens), set(np.array(pairs.spans.bounds).tolist())
    # Places instead of tokens: each segment then says where it comes from.
    corpus.tokens = np.arange(len(tokens))
    rng = np.random.default_rng(0)
    labels = []
    for row in list(range(len(pairs))) * 40:
        first, second, label = pairs.pair(row, rng)
        labels.append(label)
        assert len(first) > 0 and len(second) > 0 and len(first) + len(second) <= 29
        assert first[0] in sentences and second[0] in sentences and first[-1] + 1 in sentences
        owners = np.searchsorted(corpus.documents, [first[0], second[0]], side="right")
        assert (owners[0] == owners[1]) == (label == 0)
        if label == 0:
            assert second[0] == first[-1] + 1 and second[-1] + 1 in sentences
    assert len(labels) > 5000
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(len(labels))


def test_pairs_are_laid_out_as_berts(folder, tokenizer, corpus):
    pairs = SentencePairs(corpus, 32, Masking(tokenizer, arguments(folder)))
    seed_everything(4)
    batch = pairs.collate(np.arange(16))
    ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for row in range(16):
        size = int(batch["attention_mask"][row].sum())
        assert (ids[row, size:] == tokenizer.pad_token_id).all() and (batch["labels"][row, size:] == -100).all()
        separators = (ids[row] == tokenizer.sep_token_id).nonzero().flatten().tolist()
        assert ids[row, 0] == tokenizer.cls_token_id and separators[-1] == size - 1 and len(separators) == 2
        assert batch["token_type_ids"][row].tolist() == [0] * (separators[0] + 1) + [1] * (size - separators[0] - 1) + [0] * (
            ids.shape[1] - size
        )
    assert set(batch["next_sentence_label"].tolist()) == {0, 1}


# -------------------------------------------------------------------------------------------------------------- the stage


def test_learns_and_leaves_a_model_that_transformers_loads(run, folder, tmp_path, tokenizer):
    metrics = run(epochs=6, eval_data=str(folder / "corpus.jsonl"), metric_for_best="loss", dropout=0.0)
    uniform = np.log(len(tokenizer))
    assert metrics["eval_loss"] < 0.9 * uniform
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]))
    assert 0.0 < metrics["eval_masked_accuracy"] < 1.0
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, MiniBertForMaskedLM) and model.config.hidden_dropout_prob == 0.0
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(classifier.minibert.layers[0].mlp.up.weight, model.minibert.layers[0].mlp.up.weight)


@pytest.mark.slow
def test_learns_which_sentence_follows(tmp_path, folder):
    """Documents that stay with their subject: what follows shares words with what came before."""
    generator = np.random.default_rng(5)
    file = tmp_path / "subjects.jsonl"
    with file.open("w") as out:
        for number in range(160):
            words = WORDS[:7] if number % 2 else WORDS[7:]
            out.write(json.dumps({"text": " ".join(" ".join(generator.choice(words, 4)) + "." for _ in range(4))}) + "\n")
    changes = {"epochs": 25, "batch_size": 32, "learning_rate": 1e-2, "dropout": 0.0}
    args = arguments(folder, data=str(file), eval_data=str(file), next_sentence=True, **changes)
    metrics = pretrain(args, StageContext(tmp_path / "out", 3, tokenizer=str(folder / "tokenizer")))
    # Half of the sentences from elsewhere are of the same subject, so three quarters is all there is to know.
    assert metrics["eval_next_sentence_accuracy"] > 0.65
    assert AutoModelForPreTraining.from_pretrained(tmp_path / "out").next_sentence.weight.shape == (2, 32)


def test_phases_have_their_own_lengths_batches_and_rates(run, tmp_path):
    metrics = run(
        max_steps=20,
        log_steps=1,
        schedule="constant",
        phases=[
            {"share": 9, "max_length": 16, "batch_size": 8},
            {"share": 1, "max_length": 48, "batch_size": 2, "learning_rate": 1e-3},
        ],
    )
    log = read_rows(tmp_path / "out" / "log.jsonl")
    assert metrics["steps"] == 20
    assert [line["learning_rate"] for line in log] == [5e-3] * 18 + [1e-3] * 2


@pytest.mark.parametrize("next_sentence", [False, True])
def test_gives_the_same_weights_when_run_again(run, tmp_path, next_sentence, folder):
    weights = []
    for name in ("one", "two"):
        context = StageContext(tmp_path / name, 3, tokenizer=str(folder / "tokenizer"))
        pretrain(arguments(folder, max_steps=4, next_sentence=next_sentence), context)
        weights.append(read_weights(tmp_path / name))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_runs_from_a_recipe_and_hands_its_encoder_on(folder, tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "stages": [
                {"kind": "tokenizer", "data": str(folder / "corpus.jsonl"), "vocab_size": 60, "max_length": 48},
                {**arguments(folder).model_dump(exclude_unset=True), "max_steps": 3},
                {"kind": "pretrain", "name": "longer", "data": str(folder / "corpus.jsonl"), "max_steps": 2, "max_length": 48},
            ],
        }
    )
    out = run_recipe(recipe, output_dir=tmp_path / "run")
    assert (out / "3-longer" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_refuses_next_sentences_in_a_single_document(run, tmp_path):
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "the cat saw. the dog heard. the bird liked."}\n')
    with pytest.raises(ValueError, match="at least two documents .* only has 1 .of 1 documents.*next_sentence: false"):
        run(data=str(file), next_sentence=True)
    assert run(data=str(file), max_steps=1)["steps"] == 1


@pytest.mark.parametrize("place", ["stage", "phase"])
def test_refuses_sequences_longer_than_the_positions(run, place):
    changes = {"max_length": 64} if place == "stage" else {"phases": [{"max_length": 16}, {"max_length": 64}]}
    with pytest.raises(ValueError, match="max_length=64 exceeds the model's max_position_embeddings=48"):
        run(**changes)


def test_refuses_a_tokenizer_without_mask(run, folder, tokenizer, tmp_path):
    tokenizer = type(tokenizer).from_pretrained(folder / "tokenizer")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="no mask_token"):
        Masking(tokenizer, arguments(folder))


def test_refuses_a_model_that_cannot_read_packed_sequences(run, tmp_path, tokenizer):
    from transformers import BertForMaskedLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model, which cannot read packed sequences"):
        run(model=str(tmp_path / "bert"))


def test_refuses_shares_above_one(folder):
    with pytest.raises(ValueError, match="must be at most 1"):
        arguments(folder, mask_replace_prob=0.9, random_replace_prob=0.2)


def test_refuses_to_pick_by_next_sentences_without_them(folder):
    with pytest.raises(ValueError, match="next_sentence_accuracy needs next_sentence: true, or choose another metric"):
        arguments(folder, metric_for_best="next_sentence_accuracy")
    assert arguments(folder, metric_for_best="next_sentence_accuracy", next_sentence=True).next_sentence
