"""The answer stage and the answers of its models: windows, offsets, unanswerable questions, and the input that is refused."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertConfig, BertForQuestionAnswering, BertModel

from helpers import read_rows, write_recipe, write_rows
from minibert import MiniBertConfig, MiniBertForQuestionAnswering, MiniBertModel, train_word_level, train_wordpiece
from minibert.data.questions import Window, WindowSizes, cut, window_sizes
from minibert.inference.answers import answer_rows, best_spans, find_spans
from minibert.train import rows as rows_module
from minibert.train.arguments import AnswerStage
from minibert.train.recipe import load_recipe
from minibert.train.run import read_metrics, run_recipe
from minibert.train.stage import StageContext
from minibert.train.stages import answer as stage

NAMES, PLACES = ("ann", "bob", "eve", "tom"), ("rome", "oslo", "lima", "bonn")
SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
SHAPE |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PRESET = {"preset": "modern-6x384", "num_hidden_layers": 2, **SHAPE}


def questions(unanswerable=False):
    """Yield questions about where a person lives; half of the answers are far into the context."""
    generator = np.random.default_rng(0)
    for name in NAMES:
        for place in PLACES:
            before = "well , " * int(generator.integers(8))
            context = f"{before}{name} lives in  {place} ."
            yield {
                "question": f"where lives {name} ?",
                "context": context,
                "answers": {"text": [place], "answer_start": [context.index(place)]},
            }
        if unanswerable:
            context = f"{before}{name} has no home ."
            yield {"question": f"where lives {name} ?", "context": context, "answers": {"text": [], "answer_start": []}}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_level([" ".join(["where lives in has no home well ? , .", *NAMES, *PLACES])]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer that splits words, and keeps letters with and without accents apart."""
    text = "the answer is a cat or an owl — Ünïcode straße 東京 наука 𝒳 42 percent , unbelievable"
    return train_wordpiece([text] * 2, vocab_size=90, lowercase=False)


@pytest.fixture
def answer(tmp_path, tokenizer_folder):
    """Run the stage on rows, written to files."""

    def run(rows, eval_rows=None, model=None, **changes):
        files = {"data": write_rows(tmp_path / "data.jsonl", rows)}
        if eval_rows is not None:
            files["eval_data"] = write_rows(tmp_path / "eval.jsonl", eval_rows)
        values = {"kind": "answer", **files, "batch_size": 8, "learning_rate": 5e-3, "log_steps": 5, "max_length": 24}
        values |= {"model": model or PRESET, **changes}
        context = StageContext(tmp_path / "out", seed=1, model=model, tokenizer=tokenizer_folder)
        return stage.answer(AnswerStage.model_validate(values), context)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer_folder):
    """A model that learned its few questions, some without an answer, through a recipe; its run."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "rows.jsonl", questions(unanswerable=True))
    fields = {"max_length": 20, "doc_stride": 6, "epochs": 40, "batch_size": 10, "learning_rate": 5e-3, "eval_steps": 8}
    values = {"kind": "answer", "model": PRESET, "tokenizer": tokenizer_folder, "data": data, "eval_data": data, **fields}
    return run_recipe(load_recipe(write_recipe(folder, values)), output_dir=folder / "run")


# Windows


WORDS = st.lists(st.sampled_from(["cat", "owl", "unbelievable", "Ünïcode", "straße", "東京", "наука", "𝒳", "—", ",", "é", "☃"]))
MARKS = {"東京", "—", ","}  # words of their own, also without spaces
GAPS = st.sampled_from([" ", "  ", "\n", "\u00a0", " \t"])


@st.composite
def contexts(draw):
    """A context of words with odd spaces, and the place of some words of it."""
    words = draw(WORDS.filter(bool))
    context, places = draw(st.sampled_from(["", " "])), []
    for word, following in zip(words, [*words[1:], ","]):
        places.append((len(context), len(context) + len(word)))
        context += word + ("" if MARKS & {word, following} and draw(st.booleans()) else draw(GAPS))
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(len(words) - 1, first + 1)))
    return context, places[first][0], places[last][1]


@settings(max_examples=150, deadline=None)
@given(contexts(), st.integers(20, 40))
def test_offsets_give_the_gold_answer_back_and_windows_cover_the_context(pieces, case, max_length):
    context, start, end = case
    rows = Dataset.from_dict({"question": ["the answer is"], "context": [context]})
    sizes = WindowSizes(max_length, 8, 6)
    windows = cut(pieces, rows["question"], rows["context"], sizes)
    whole = pieces(context, add_special_tokens=False, return_offsets_mapping=True)
    joined, seen = [], 0
    for window in windows:
        assert len(window.input_ids) <= max_length and window.offsets[:, 0].tolist() == sorted(window.offsets[:, 0])
        joined += window.input_ids[window.first :][: len(window.offsets)][seen:].tolist()
        seen = 8  # each later window repeats the last 8 tokens of the window before it
    assert joined == whole["input_ids"]

    places = stage.find_tokens(windows, start, end)
    found = [
        context[window.offsets[first - window.first, 0] : window.offsets[last - window.first, 1]]
        for window, (first, last) in zip(windows, places, strict=True)
        if first
    ]
    assert set(found) == ({context[start:end]} if found else set())
    tokens = sum(1 for low, high in whole["offset_mapping"] if high > start and low < end)
    assert found or tokens > sizes.doc_stride  # only an answer longer than the overlap can be cut in every window
    made = stage.window_rows(rows, [[(start, context[start:end])]], pieces, sizes)
    assert [tuple(label) for label in made.labels.tolist()] == places


def test_batches_hold_the_tokenizers_ids_and_the_places_of_the_answers(tokenizer):
    rows = Dataset.from_list(list(questions(unanswerable=True)))
    answers = [list(zip(row["answer_start"], row["text"])) for row in rows["answers"]]
    made = stage.window_rows(rows, answers, tokenizer, window_sizes(tokenizer, 40))
    some = [4, 0, 3]  # the first has no answer
    batch = made.collate(np.array(some))
    expected = tokenizer(rows[some]["question"], rows[some]["context"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected) and "labels" not in batch
    for row, first, last in zip(some, batch["start_positions"].tolist(), batch["end_positions"].tolist()):
        text = rows[row]["answers"]["text"]
        span = tokenizer.decode(made.ids[made.starts[row] :][first : last + 1])
        assert span == text[0] if text else (first, last) == (0, 0)
    other = stage.window_rows(rows, [[], *answers[1:]], tokenizer, window_sizes(tokenizer, 40))
    assert made.fingerprint != other.fingerprint


def test_long_questions_are_cut_and_the_context_is_not(tokenizer, caplog):
    question, context = "where " * 30, "well " * 9 + "rome"
    with caplog.at_level(logging.WARNING):
        windows = cut(tokenizer, [question], [context], WindowSizes(16, 2, 5))
        cut(tokenizer, ["lives " * 30, "has " * 30], [context, context], WindowSizes(16, 2, 5))
    assert caplog.text.count("max_question_length=5 tokens are cut") == 1 and "'where where" in caplog.text
    assert all(window.first == 7 for window in windows)  # [CLS], five tokens, [SEP]
    assert windows[-1].offsets[-1, 1] == len(context)


def test_sizes_that_leave_no_room():
    class Tokenizer:
        def num_special_tokens_to_add(self, pair):
            return 3

    assert window_sizes(Tokenizer(), 384) == WindowSizes(384, 128, 64)
    assert window_sizes(Tokenizer(), 48, doc_stride=0) == WindowSizes(48, 0, 16)
    with pytest.raises(ValueError, match=r"max_length=30 leaves no room: max_question_length=10, 3 special tokens and doc_s"):
        window_sizes(Tokenizer(), 30, doc_stride=17)


# Spans


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))
def test_best_spans_are_those_of_trying_all(length, longest, count, seed):
    generator = torch.Generator().manual_seed(seed)
    starts, ends = torch.randn(2, 2, length, generator=generator)
    allowed = torch.rand(2, length, generator=generator) < 0.7
    scores, first, last = best_spans(starts, ends, allowed, longest=longest, count=count)
    for row in range(2):
        every = {
            (i, j): float(starts[row, i] + ends[row, j])
            for i in range(length)
            for j in range(i, min(length, i + longest))
            if allowed[row, i] and allowed[row, j]
        }
        found = [(int(i), int(j)) for score, i, j in zip(scores[row], first[row], last[row], strict=True) if score > -math.inf]
        assert found == sorted(every, key=lambda span: -every[span])[:count]


class Oracle(torch.nn.Module):
    """Stands for a model: logits that a test writes down for token ids, wherever they stand."""

    def __init__(self, start, end, cls=0.0):
        super().__init__()
        self.config, self.device, self.start, self.end, self.cls = BertConfig(), torch.device("cpu"), start, end, cls

    def forward(self, input_ids, attention_mask, token_type_ids):
        def logits(table):
            scores = torch.tensor([[table.get(token, -5.0) for token in row] for row in input_ids.tolist()])
            scores[:, 0] = self.cls
            return scores

        return type("Output", (), {"start_logits": logits(self.start), "end_logits": logits(self.end)})


def oracle(start, end, **settings):
    model = Oracle(start, end)
    model.config.question_answering = settings
    return model


def test_spans_lie_in_the_context_and_not_in_the_question_or_special_tokens(tokenizer):
    ids = tokenizer.get_vocab()
    table = {ids["ann"]: 9.0, ids["[SEP]"]: 8.0, ids["[PAD]"]: 8.0, ids["rome"]: 2.0, ids["lima"]: 1.0}
    rows = [
        {"question": "where lives ann ?", "context": " well , in rome  or lima ."},
        {"question": "where lives ann ?", "context": "oslo"},
    ]
    first, second = answer_rows(oracle(table, table, max_answer_length=1), tokenizer, rows)
    assert first["text"] == "rome" and rows[0]["context"][first["start"] : first["end"]] == "rome"
    assert second["text"] == "oslo" and second["score"] + second["no_answer_score"] == pytest.approx(1)
    (longer,) = answer_rows(oracle({ids["rome"]: 3.0}, {ids["lima"]: 3.0}, max_answer_length=3), tokenizer, rows[:1])
    assert longer["text"] == "rome  or lima"


def test_windows_compete_and_their_lowest_null_score_counts(tokenizer):
    ids = tokenizer.get_vocab()
    context = "well , " * 12 + "in rome " + "well , " * 12 + "in lima ."
    row = {"question": "where ?", "context": context}

    class TwoNulls(Oracle):
        def forward(self, input_ids, **others):
            output = super().forward(input_ids, **others)  # of the parent: calling the module would come back here
            holds = (input_ids == ids["rome"]).any(dim=1)
            output.start_logits[:, 0] = torch.where(holds, 1.0, 30.0)
            return output

    model = TwoNulls({ids["rome"]: 4.0, ids["lima"]: 3.0}, {ids["rome"]: 4.0, ids["lima"]: 3.0})
    sizes = {"max_length": 20, "doc_stride": 5}
    model.config.question_answering = sizes
    (found,) = answer_rows(model, tokenizer, [row])
    assert found["text"] == "rome" and found["no_answer_score"] < found["score"]
    model.config.question_answering = {**sizes, "null_threshold": -6.5}
    (found,) = answer_rows(model, tokenizer, [row])
    assert found["text"] == "rome"
    model.config.question_answering = {**sizes, "null_threshold": -7.5}  # 1 + 0 is more than 4 + 4 - 7.5
    (found,) = answer_rows(model, tokenizer, [row])
    assert (found["text"], found["start"], found["end"], found["score"]) == ("", 0, 0, found["no_answer_score"])


def test_a_span_seen_in_two_windows_has_its_better_score(tokenizer):
    scores = iter([5.0, 2.0])  # the longer window is computed first

    def model(**inputs):
        logits = torch.full(inputs["input_ids"].shape, -9.0)
        logits[:, 2] = next(scores)
        return SimpleNamespace(start_logits=logits, end_logits=logits)

    places = np.array([[0, 4], [5, 9], [10, 14]], dtype=np.int32)
    windows = [Window(0, np.arange(5 + more), None, 2, places[: 2 + more]) for more in (1, 0)]
    model.eval, model.device = lambda: model, "cpu"
    (found,) = find_spans(model, tokenizer, windows, 1, batch_size=1, longest=1)
    assert found[0][0] == (10.0, 0, 4)


def test_contexts_without_words_have_no_answer_and_rows_are_read_as_needed(tokenizer):
    model = Oracle({}, {})
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"question": "where ?", "context": "" if number % 2 else "rome"}

    results = answer_rows(model, tokenizer, rows(), batch_size=2)
    assert [next(results)["text"] for _ in range(3)] == ["rome", "", "rome"]
    assert len(read) <= 64


# The stage


def test_learns_its_questions_through_a_recipe(trained, tmp_path):
    metrics = read_metrics(trained)["answer"]
    for name in ("exact_match", "f1", "has_answer_f1", "has_answer_exact_match", "no_answer_f1", "no_answer_exact_match"):
        assert metrics[f"eval_{name}"] == 1.0
    folder = trained / "1-answer"
    model = AutoModelForQuestionAnswering.from_pretrained(folder, trust_remote_code=False)
    own = {"max_length": 20, "doc_stride": 6, "max_question_length": 6, "max_answer_length": 30, "null_threshold": 0.0}
    assert model.config.question_answering == own
    opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert opened.model_max_length == 20
    rows = list(questions(unanswerable=True))
    for row, result in zip(rows, answer_rows(model, opened, rows, batch_size=3), strict=True):
        assert result["text"] == "".join(row["answers"]["text"])
        assert row["context"][result["start"] : result["end"]] == result["text"]
        assert (result["no_answer_score"] >= result["score"]) == (not result["text"])


def test_the_best_checkpoint_is_kept(trained):
    lines = read_rows(trained / "1-answer/log.jsonl")
    figures = {line["step"]: line["eval_f1"] for line in lines if "eval_f1" in line}
    metrics = read_metrics(trained)["answer"]
    assert len(figures) > 5 and metrics["eval_f1"] == max(figures.values())
    assert metrics["best_step"] == min(step for step, value in figures.items() if value == max(figures.values()))
    assert metrics["best_step"] < metrics["steps"]


def test_without_unanswerable_questions_there_is_always_an_answer(answer, tmp_path):
    metrics = answer(list(questions()), list(questions()), max_steps=2)
    assert "eval_f1" in metrics and "eval_has_answer_f1" not in metrics
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert model.config.question_answering["null_threshold"] is None


@pytest.mark.parametrize("kind", ["minibert", "bert", "bert with three classes"])
def test_starts_from_encoders_of_ours_and_of_transformers(answer, tmp_path, tokenizer, kind):
    torch.manual_seed(0)
    fields = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, **SHAPE}
    if kind == "minibert":
        encoder = MiniBertModel(MiniBertConfig.preset("bert-base", **fields))
    else:
        encoder = BertModel(BertConfig(**fields, num_labels=3 if "three" in kind else 2))
    encoder.save_pretrained(tmp_path / "start")
    answer(list(questions()), list(questions()), model=str(tmp_path / "start"), max_steps=1, learning_rate=1e-12)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(model) is (MiniBertForQuestionAnswering if kind == "minibert" else BertForQuestionAnswering)
    torch.testing.assert_close(model.get_input_embeddings().weight, encoder.get_input_embeddings().weight)
    assert model.qa_outputs.out_features == 2


def test_processes_share_the_evaluation(trained, monkeypatch):
    rows = Dataset.from_list(list(questions(unanswerable=True)))
    answers = [list(zip(row["answer_start"], row["text"])) for row in rows["answers"]]
    model = AutoModelForQuestionAnswering.from_pretrained(trained / "1-answer", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(trained / "1-answer", trust_remote_code=False)
    shares = []

    def gather(share):  # here the processes come one after the other, and only the last one sees what all computed
        shares.append(share)
        return [pair for part in shares for pair in part]

    monkeypatch.setattr(rows_module, "gather_object", gather)
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3, is_main_process=False)
        monkeypatch.setattr(rows_module, "processes", lambda state=state: state)
        if index < 2:
            with pytest.raises(KeyError):
                stage.measure(model, rows, answers, tokenizer, batch_size=3)
    assert stage.measure(model, rows, answers, tokenizer, batch_size=3)["f1"] == 1.0
    assert [len(share) for share in shares] == [7, 7, 6]


def test_answers_in_no_window_are_counted(answer, caplog):
    rows = list(questions())
    context = "ann lives in " + "rome " * 20
    rows.append({**rows[0], "context": context, "answers": {"text": [context[13:-1]], "answer_start": [13]}})
    with caplog.at_level(logging.WARNING):
        answer(rows, max_steps=1)
    assert "1 of 17 answers do not fit completely into one window" in caplog.text


def test_figures_are_those_of_squad():
    figures = stage.answer_metrics(["The cat.", "dog", "", ""], [["cat", "x"], ["a big dog"], [], ["owl"]])
    assert figures["has_answer_exact_match"] == pytest.approx(1 / 3)
    assert figures["has_answer_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert figures["no_answer_exact_match"] == figures["no_answer_f1"] == 1.0
    assert figures["exact_match"] == pytest.approx(2 / 4)


GOOD = {"question": "where ?", "context": "in rome .", "answers": {"text": ["rome"], "answer_start": [3]}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answers": {"text": ["rome"], "answer_start": [2]}},
            r"Row 2 of .* has the answer 'rome' at character 2 .* ' rom' there",
        ),
        ({"answers": {"text": ["rome"], "answer_start": [-1]}}, r"Row 2 of .* has the answer 'rome' at character -1"),
        ({"answers": {"text": ["rome"], "answer_start": [99]}}, r"Row 2 .* has '' there; correct answer_start, or remove"),
        ({"answers": {"text": [""], "answer_start": [0]}}, r"Row 2 of .* has the answer '' at character 0"),
        (
            {"answers": {"text": ["rome"], "answer_start": []}},
            r"Row 2 of .* has answers=.*; it should be {text: .*empty lists",
        ),
        ({"answers": {"text": [None], "answer_start": [3]}}, r"Row 2 of .* a string and the index"),
        ({"answers": {"text": ["rome"], "answer_start": [None]}}, r"Row 2 of .* a string and the index"),
        ({"answers": None}, r"no value in column 'answers' of row 2"),
        ({"question": None}, r"no value in column 'question' of row 2"),
        (
            {"context": "in \u0007 .", "answers": {"text": ["\u0007"], "answer_start": [3]}},
            r"Row 2 .* tokenizer makes no token",
        ),
    ],
)
def test_refusals_name_the_row(answer, tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        answer([GOOD, {**GOOD, **row}])
    assert not (tmp_path / "out/model.safetensors").exists()


def test_places_of_answers_are_whole_numbers_however_written():
    places = [{"text": ["rome"], "answer_start": [3.0]}, {"text": [], "answer_start": []}]
    rows = Dataset.from_list([{**GOOD, "answers": answers} for answers in places])
    assert stage.read_answers(rows, [SimpleNamespace(path="qa")]) == [[(3, "rome")], []]
    for wrong in (3.5, "3", math.nan):
        rows = Dataset.from_list([{**GOOD, "answers": {"text": ["rome"], "answer_start": [wrong]}}])
        with pytest.raises(ValueError, match=r"Row 1 of qa has answers=.*; it should be .* the index of the first"):
            stage.read_answers(rows, [SimpleNamespace(path="qa")])


def test_refuses_data_of_another_kind_and_sizes_without_room(answer, tokenizer):
    with pytest.raises(ValueError, match=r"no column 'context'; it has question, answers"):
        answer([{"question": "where ?", "answers": GOOD["answers"]}])
    with pytest.raises(ValueError, match=r"Row 1 of .* has answers='rome'; it should be"):
        answer([{**GOOD, "answers": "rome"}])
    with pytest.raises(ValueError, match=r"Column 'question' of .* does not hold text"):
        answer([{**GOOD, "question": 7}])
    with pytest.raises(ValueError, match=r"max_length=24 leaves no room: .* doc_stride=20 fill it"):
        answer([GOOD], doc_stride=20)
    with pytest.raises(ValueError, match=r"Row 70 has None in column 'context', not a text"):
        list(answer_rows(Oracle({}, {}), tokenizer, [GOOD] * 69 + [{**GOOD, "context": None}], batch_size=2))
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, got 0"):
        list(answer_rows(Oracle({}, {}), tokenizer, [GOOD], batch_size=0))
    with pytest.raises(ValueError, match=r"Row 1 has None in column 'question', not a text; its columns are text"):
        list(answer_rows(Oracle({}, {}), tokenizer, [{"text": "rome"}]))
