"""Test the metrics of a model: retrieval with its baselines, similarity, triplets, classes, clusters, and the command."""

import json
import random
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score

from helpers import edit_weights, read_weights, run_command, save_model, write_recipe, write_rows
from minibert import MiniBertForSequenceClassification, train_word_level
from minibert.evaluation import evaluate as module
from minibert.evaluation.evaluate import evaluate, metrics_table, retrieval, untrained
from minibert.inference.load import finite, load

ANSWERS = [
    "the cat sleeps on the sofa",
    "a list is sorted in place",
    "paris is the capital of france",
    "networks learn by gradient descent",
]
QUERIES = ["the cat sleeps on", "a list is sorted", "the capital of france", "networks learn by"]
PAIRS = {"query": [*QUERIES, QUERIES[0]], "answer": [*ANSWERS, ANSWERS[2]]}
METRICS = ["recall@1", "recall@10", "recall@100", "mrr@10", "ndcg@10"]


@pytest.fixture(scope="session")
def tokenizer():
    return train_word_level(ANSWERS, vocab_size=25)


SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="session")
def encoder(tokenizer, tmp_path_factory):
    """An encoder whose vectors are nearly the means of its word vectors, so texts that share words are close."""
    folder = save_model(tmp_path_factory.mktemp("models") / "encoder", tokenizer, **SHAPE)
    words = "embeddings.word_embeddings.weight"
    edit_weights(folder, **{words: torch.randn(read_weights(folder)[words].shape)})
    return folder


@pytest.fixture(scope="session")
def classifier(tokenizer, tmp_path_factory):
    labels = {"id2label": {0: "yes", 1: "perhaps", 2: "no"}, "label2id": {"yes": 0, "perhaps": 1, "no": 2}}
    folder = tmp_path_factory.mktemp("models") / "classifier"
    return save_model(folder, tokenizer, "ForSequenceClassification", **SHAPE, **labels)


class Ranker:
    """Stands in for a model: the similarity of query i and passage j is the number given for them."""

    similarity_fn_name = "cosine"

    def __init__(self, scores, queries, passages):
        self.scores, self.queries, self.passages = torch.tensor(scores), queries, passages
        self.model_card_data = self

    def encode_query(self, texts, **_):
        return torch.tensor([self.queries.index(text) for text in texts])

    def encode_document(self, texts, **_):
        return torch.tensor([self.passages.index(text) for text in texts])

    def similarity(self, queries, passages):
        return self.scores[queries][:, passages]

    def set_evaluation_metrics(self, *_, **__):
        pass


# --- retrieval ------------------------------------------------------------------------------------------------------------


def test_retrieval_metrics_by_hand():
    # "q" belongs to "a" and "c"; "r" to "b". Passages are ranked a b c for q, and c a b for r.
    ranker = Ranker([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0]], ["q", "r"], ["a", "b", "c"])
    result = retrieval(ranker, ["q", "r", "q", "q"], ["a", "b", "c", "a"], baselines=False)
    assert (result["queries"], result["passages"]) == (2, 3)
    ndcg_q = (1 + 1 / 2) / (1 + 1 / torch.log2(torch.tensor(3.0)).item())
    metrics = {
        "recall@1": (1 / 2 + 0) / 2,
        "recall@10": 1.0,
        "recall@100": 1.0,
        "mrr@10": (1 + 1 / 3) / 2,
        "ndcg@10": (ndcg_q + 1 / 2) / 2,
    }
    assert result["systems"] == {"model": pytest.approx(metrics)}


def test_limit_asks_fewer_queries_of_all_passages():
    ranker = Ranker([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [3.0, 1.0, 2.0]], ["q", "r", "s"], ["a", "b", "c"])
    result = retrieval(ranker, ["q", "r", "s"], ["a", "b", "c"], limit=1, baselines=False)
    assert (result["queries"], result["passages"]) == (1, 3)
    assert result["systems"]["model"]["mrr@10"] == pytest.approx(1 / 3)


def test_blocks_of_passages_do_not_change_the_metrics(encoder, monkeypatch):
    passages = [*ANSWERS, *(f"passage {number}" for number in range(1_200))]
    data = Dataset.from_dict({"query": [f"{text} ?" for text in passages], "answer": passages})
    whole = evaluate(encoder, data, limit=20, baselines=False)
    monkeypatch.setattr(module, "_BLOCK", 1)  # blocks of 1,000 passages, the smallest
    assert evaluate(encoder, data, limit=20, baselines=False) == whole


def test_a_classifier_without_its_last_layer_is_refused(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "model")
    edit_weights(folder, **{"classifier.weight": None})
    with pytest.raises(ValueError, match="lack classifier.weight of the classifier"):
        evaluate(folder, Dataset.from_dict({"text": ANSWERS, "label": [0, 1, 2, 0]}))


def test_data_is_read_by_path(encoder, tmp_path):
    Dataset.from_dict(PAIRS).to_parquet(tmp_path / "validation.parquet")
    Dataset.from_dict(PAIRS).select([0]).to_parquet(tmp_path / "test.parquet")
    assert evaluate(encoder, tmp_path, baselines=False) == evaluate(encoder, Dataset.from_dict(PAIRS), baselines=False)
    assert evaluate(encoder, str(tmp_path), split="test", baselines=False)["queries"] == 1
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        evaluate(encoder, tmp_path / "absent.csv")


def test_baselines_are_measured_with_the_model(encoder):
    result = evaluate(encoder, Dataset.from_dict(PAIRS))
    assert result["kind"] == "retrieval"
    assert (result["queries"], result["passages"]) == (4, 4)
    assert list(result["systems"]) == ["model", "bm25", "untrained"]
    assert all(list(metrics) == METRICS for metrics in result["systems"].values())
    # Words decide here: the first query has two answers, of which one shares no word with it.
    assert result["systems"]["bm25"]["recall@1"] == pytest.approx((1 / 2 + 3) / 4)
    assert result["systems"]["bm25"]["recall@100"] == pytest.approx((1 / 2 + 3) / 4)
    assert result["systems"]["model"]["mrr@10"] == 1.0
    assert result["systems"]["untrained"] != result["systems"]["model"]
    assert list(evaluate(encoder, Dataset.from_dict(PAIRS), baselines=False)["systems"]) == ["model"]


@pytest.mark.parametrize(
    ("queries", "answers"),
    [(["the of", "a"], ["the", "of and"]), (["the of", "cat"], ["the cat", "of and"]), (["", "zebra"], ["cat", "dog"])],
)
def test_bm25_finds_nothing_where_no_word_is_shared(encoder, queries, answers):
    metrics = evaluate(encoder, Dataset.from_dict({"query": queries, "answer": answers}))["systems"]["bm25"]
    assert set(metrics.values()) == {0.0}


def test_bm25_knows_forms_of_a_word(encoder):
    data = Dataset.from_dict({"query": ["sorting lists", "cats sleep"], "answer": [ANSWERS[1], ANSWERS[0]]})
    assert evaluate(encoder, data)["systems"]["bm25"]["mrr@10"] == 1.0


@pytest.mark.parametrize("names", [("question", "answer"), ("anchor", "positive"), ("query", "passage")])
def test_usual_names_of_pairs_are_known(encoder, names):
    data = Dataset.from_dict(dict(zip(names, PAIRS.values(), strict=True)))
    assert evaluate(encoder, data, baselines=False)["systems"]["model"]["mrr@10"] == 1.0


def test_untrained_model_is_the_same_every_time_and_leaves_the_model_alone(encoder):
    model = load(encoder)
    before = model.encode(ANSWERS)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = untrained(model).encode(ANSWERS)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert (untrained(model).encode(ANSWERS) == first).all()
    assert abs(first - before).max() > 0.01
    assert (model.encode(ANSWERS) == before).all()


# --- similarity -----------------------------------------------------------------------------------------------------------


def test_similarity_is_the_rank_correlation_of_the_cosines(encoder):
    scores = [0.1, 0.9, 0.4, 0.3]
    data = Dataset.from_dict({"sentence1": QUERIES, "sentence2": ANSWERS[1:] + ANSWERS[:1], "score": scores})
    result = evaluate(encoder, data)
    assert (result["kind"], result["pairs"]) == ("similarity", 4)
    for system, model in (("model", load(encoder)), ("untrained", untrained(load(encoder)))):
        cosines = model.similarity_pairwise(model.encode(data["sentence1"]), model.encode(data["sentence2"]))
        assert result["systems"][system]["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic)


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_of_every_dtype_are_looked_at(dtype):
    vectors = torch.ones(2, 3, dtype=dtype)
    assert finite(vectors) is vectors
    vectors[1, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="The model computes NaN"):
        finite(vectors)


@pytest.mark.parametrize("data", [PAIRS, {"sentence1": QUERIES, "sentence2": ANSWERS, "score": [0, 1, 2, 3]}])
def test_a_model_that_computes_nan_gets_no_metrics(encoder, tmp_path, data):
    folder = shutil.copytree(encoder, tmp_path / "broken")
    bias = "layers.0.mlp.down.bias"
    edit_weights(folder, **{bias: torch.full_like(read_weights(folder)[bias], float("nan"))})
    with pytest.raises(FloatingPointError, match="The model computes NaN"):
        evaluate(folder, Dataset.from_dict(data))


def test_equal_cosines_correlate_with_nothing(encoder):
    data = Dataset.from_dict({"sentence1": ["a", "a"], "sentence2": ["list", "list"], "score": [0, 1]})
    assert evaluate(encoder, data, baselines=False)["systems"] == {"model": {"spearman": None}}


@pytest.mark.parametrize(
    ("scores", "message"),
    [([0.5, 0.5], "same score"), (["high", "low"], "Row 1 has score='high'"), ([1.0, None], "Row 2 has score=None")],
)
def test_scores_without_an_order_are_refused(encoder, scores, message):
    with pytest.raises(ValueError, match=message):
        evaluate(encoder, Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["a", "b"], "score": scores}))


# --- triplets -------------------------------------------------------------------------------------------------------------


def test_triplets_are_won_by_the_more_similar_text(encoder):
    negatives = [ANSWERS[1], ANSWERS[2], QUERIES[2], ANSWERS[0]]  # the third negative is the anchor itself
    data = Dataset.from_dict({"anchor": QUERIES, "positive": ANSWERS, "negative": negatives})
    result = evaluate(encoder, data)
    assert (result["kind"], result["triplets"]) == ("triplets", 4)
    for system, model in (("model", load(encoder)), ("untrained", untrained(load(encoder)))):
        anchors, *others = (torch.tensor(model.encode(data[name][:])) for name in data.column_names)
        near, far = (torch.cosine_similarity(anchors, other) for other in others)
        assert result["systems"][system]["accuracy"] == (near > far).double().mean()
    assert result["systems"]["model"]["accuracy"] == 0.75
    assert evaluate(encoder, data, task="retrieval", baselines=False)["kind"] == "retrieval"


def test_triplets_with_equal_texts_are_counted_and_refused(encoder):
    data = Dataset.from_dict({"anchor": QUERIES, "positive": ANSWERS, "negative": [ANSWERS[1], *ANSWERS[1:]]})
    with pytest.raises(ValueError, match="Row 2 has negative='a list.*the positive is the same text, as in 3 of 4 rows"):
        evaluate(encoder, data)


# --- test collections -----------------------------------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path):
    """A folder in the layout of BEIR, with ids of digits."""
    write_rows(tmp_path / "queries.jsonl", [{"_id": f"00{n}", "text": text} for n, text in enumerate(QUERIES)])
    parts = [text.partition(" ") for text in ANSWERS]
    passages = [{"_id": f"0{n}", "title": title, "text": rest, "metadata": {}} for n, (title, _, rest) in enumerate(parts)]
    write_rows(tmp_path / "corpus.jsonl", passages)
    (tmp_path / "qrels").mkdir()
    write_scores(tmp_path, "test", "000\t00\t2", "000\t02\t1", "000\t01\t0", "001\t01\t1", "002\t02\t1", "003\t03\t1")
    return tmp_path


def write_scores(folder, split, *rows):
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows, ""]))


def test_a_collection_is_measured_as_its_pairs(encoder, collection):
    expected = evaluate(encoder, Dataset.from_dict(PAIRS))
    assert evaluate(encoder, collection) == expected
    assert evaluate(encoder, collection, limit=2) == evaluate(encoder, Dataset.from_dict(PAIRS), limit=2)
    assert evaluate(encoder, collection, task="retrieval", split="test") == expected


def test_the_split_names_the_scores(encoder, collection):
    write_scores(collection, "dev", "000\t00\t1")
    assert evaluate(encoder, collection, baselines=False)["queries"] == 1
    assert evaluate(encoder, collection, baselines=False, split="test")["queries"] == 4
    with pytest.raises(ValueError, match=r"no split 'train'; it has test, validation \(--split\)"):
        evaluate(encoder, collection, split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("000\t00\t0", "test.tsv has no score above 0"),
        ("000\t00\thigh", "test.tsv is not a table of query-id, corpus-id, score.*high"),
        ("7\t00\t1", "test.tsv has 1 ids that queries.jsonl lacks, such as '7'"),
        ("000\t9\t1", "test.tsv has 1 ids that corpus.jsonl lacks, such as '9'"),
    ],
)
def test_scores_that_fit_no_text_are_refused(encoder, collection, row, message):
    write_scores(collection, "test", row)
    with pytest.raises(ValueError, match=message):
        evaluate(encoder, collection)


def test_a_collection_without_ids_is_refused(encoder, collection):
    write_rows(collection / "corpus.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="corpus.jsonl has no column '_id'"):
        evaluate(encoder, collection)


def test_retrieval_uses_the_prompts_of_the_model(encoder):
    data = {"query": QUERIES, "answer": ["a list", "paris france", "the sofa", "gradient descent"]}
    prompts = {"query": "paris paris paris ", "document": "the the the "}
    model = load(encoder)
    plain = evaluate(model, Dataset.from_dict(data), baselines=False)
    model.prompts = dict(prompts)
    prompted = evaluate(model, Dataset.from_dict(data), baselines=False)
    model.prompts = {}
    texts = {"query": [prompts["query"] + text for text in data["query"]]}
    texts |= {"answer": [prompts["document"] + text for text in data["answer"]]}
    assert prompted == evaluate(model, Dataset.from_dict(texts), baselines=False)
    assert prompted != plain


# --- linear probes and clusters -------------------------------------------------------------------------------------------


def labelled(rows, seed):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(ANSWERS[row % 2].split(), k=3)) for row in range(rows)]
    return Dataset.from_dict({"text": texts, "label": [("cat", "list")[row % 2] for row in range(rows)]})


def test_a_probe_learns_from_the_split_train(encoder, tmp_path):
    train, held_out = labelled(40, seed=0), labelled(21, seed=1)
    train.to_parquet(tmp_path / "train.parquet")
    held_out.to_parquet(tmp_path / "validation.parquet")
    result = evaluate(encoder, tmp_path, limit=20)
    assert {key: result[key] for key in ("kind", "rows", "training_rows")} == {
        "kind": "classification",
        "rows": 20,
        "training_rows": 40,
    }
    model = load(encoder)
    probe = LogisticRegression(max_iter=1000).fit(model.encode(train["text"][:]), train["label"][:])
    accuracy = probe.score(model.encode(held_out["text"][:20]), held_out["label"][:20])
    assert result["systems"]["model"]["accuracy"] == pytest.approx(accuracy)
    assert list(result["systems"]) == ["model", "untrained"]
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(ValueError, match="no split 'train'"):
        evaluate(encoder, tmp_path)


def test_a_probe_without_training_data_holds_out_a_fifth_of_each_class(encoder, tmp_path, monkeypatch):
    measured = []
    report = module.classification_report
    monkeypatch.setattr(
        module, "classification_report", lambda *given, **how: measured.append(given[0]) or report(*given, **how)
    )
    data = labelled(80, seed=0).select([*range(0, 80, 2), *range(1, 21, 2)])
    data.to_parquet(tmp_path / "rows.parquet")
    result = evaluate(encoder, tmp_path / "rows.parquet", baselines=False)
    assert (result["rows"], result["training_rows"]) == (10, 40)
    assert sorted(measured[0]) == [0] * 8 + [1] * 2
    assert evaluate(encoder, data, baselines=False) == result


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("classification", ["a", "a", "a", "a"], "only the class 'a'"),
        ("classification", ["a", "b", "c", "c"], "least populated classes? in y ha"),
        ("classification", [0.5, 1, 1, 0], "Row 1 has the label 0.5"),
        ("clustering", ["a", "a", "a", "a"], "only the class 'a'"),
        ("clustering", ["a", "b", "c", "d"], "4 rows have 4 labels; clustering needs"),
    ],
)
def test_labels_that_allow_no_measure_are_refused(encoder, task, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(encoder, Dataset.from_dict({"text": ANSWERS, "label": labels}), task=task)


def test_clusters_are_compared_with_the_labels(encoder):
    data = labelled(60, seed=0)
    result = evaluate(encoder, data, task="clustering")
    assert (result["kind"], result["rows"], result["clusters"]) == ("clustering", 60, 2)
    means = MiniBatchKMeans(2, batch_size=500, n_init="auto", random_state=0)
    chosen = means.fit_predict(load(encoder).encode(data["text"][:]))
    assert result["systems"]["model"]["v_measure"] == pytest.approx(v_measure_score(data["label"][:], chosen))
    assert result["systems"]["model"] != result["systems"]["untrained"]


# --- columns and tasks ----------------------------------------------------------------------------------------------------


def test_columns_are_named_by_their_use(encoder, classifier):
    data = Dataset.from_dict({"title": QUERIES, "query": ANSWERS, "answer": ANSWERS, "gold": [0, 1, 2, 0]})
    renamed = evaluate(encoder, data, columns={"query": "title"}, baselines=False)
    assert renamed == evaluate(encoder, Dataset.from_dict({"query": QUERIES, "answer": ANSWERS}), baselines=False)
    assert evaluate(encoder, data, baselines=False)["systems"]["model"]["recall@1"] == 1.0
    expected = evaluate(classifier, Dataset.from_dict({"text": QUERIES, "label": [0, 1, 2, 0]}))
    assert evaluate(classifier, data, columns={"text": "title", "label": "gold"}) == expected
    for wrong in ({"qeury": "title"}, {"query": "absent"}):
        with pytest.raises(ValueError, match="columns title, query, answer, gold, which is none of"):
            evaluate(encoder, data, columns=wrong)


def test_the_task_with_most_columns_is_measured(encoder):
    data = {"query": QUERIES, "answer": ANSWERS, "sentence1": QUERIES, "sentence2": ANSWERS, "score": [0, 1, 2, 3]}
    assert evaluate(encoder, Dataset.from_dict(data), baselines=False)["kind"] == "similarity"
    assert evaluate(encoder, Dataset.from_dict(data), task="retrieval", baselines=False)["kind"] == "retrieval"
    with pytest.raises(ValueError, match=r"which is none of: triplets: anchor, positive, negative\."):
        evaluate(encoder, Dataset.from_dict(data), task="triplets")
    with pytest.raises(ValueError, match="task='search' is unknown; use retrieval, triplets,"):
        evaluate(encoder, Dataset.from_dict(data), task="search")


def test_a_model_knows_the_columns_that_trained_it(encoder, classifier, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    uses = [{"anchor": "body", "positive": "absent"}, {"anchor": "title", "positive": "body"}]
    (folder / "metrics.json").write_text(json.dumps({"data": [{"columns": columns} for columns in uses]}))
    data = Dataset.from_dict({"title": QUERIES, "body": ANSWERS})
    expected = evaluate(encoder, Dataset.from_dict({"query": QUERIES, "answer": ANSWERS}), baselines=False)
    assert evaluate(folder, data, baselines=False) == expected
    for damaged in ({"data": [1]}, {"data": 1}, {"data": [{"columns": [1]}]}):
        (folder / "metrics.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="columns title, body, which is none of"):
            evaluate(folder, data)
    folder = shutil.copytree(classifier, tmp_path / "classifier")
    (folder / "metrics.json").write_text(json.dumps({"data": [{"columns": {"title": "title", "label": "gold"}}]}))
    labels = [0, 1, 2, 0]
    two = Dataset.from_dict({"title": QUERIES, "text": ANSWERS, "gold": labels, "label": [1, 1, 1, 1]})
    assert evaluate(folder, two) == evaluate(classifier, Dataset.from_dict({"text": QUERIES, "label": labels}))


def test_a_classifier_is_also_an_encoder(classifier):
    data = Dataset.from_dict({"text": ANSWERS * 2, "label": ["a", "b"] * 4})
    assert evaluate(classifier, data, task="clustering", baselines=False)["kind"] == "clustering"


# --- classification -------------------------------------------------------------------------------------------------------


def _predictions(classifier, tokenizer, *columns):
    model = MiniBertForSequenceClassification.from_pretrained(classifier).eval()
    return [model(**tokenizer(*row, return_tensors="pt")).logits.argmax().item() for row in zip(*columns, strict=True)]


def _macro_f1(labels, predicted):
    scores = []
    for class_ in {*labels, *predicted}:
        hits = sum(label == guess == class_ for label, guess in zip(labels, predicted, strict=True))
        scores.append(2 * hits / (labels.count(class_) + predicted.count(class_)))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("names", [("text",), ("premise", "hypothesis")])
def test_classification_counts_right_answers(classifier, tokenizer, names):
    columns = (QUERIES, ANSWERS)[: len(names)]
    labels = _predictions(classifier, tokenizer, *columns)
    data = Dataset.from_dict({**dict(zip(names, columns, strict=True)), "label": labels})
    result = evaluate(classifier, data, batch_size=3)
    assert (result["kind"], result["rows"]) == ("classification", 4)
    assert result["systems"] == {"model": {"accuracy": 1.0, "macro_f1": 1.0}}
    predicted = list(labels)
    labels[0] = (labels[0] + 1) % 3
    wrong = data.remove_columns("label").add_column("label", labels)
    metrics = evaluate(classifier, wrong)["systems"]["model"]
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx(_macro_f1(labels, predicted))
    assert evaluate(classifier, wrong, limit=1)["systems"]["model"]["accuracy"] == 0.0


def test_labels_by_name_mean_the_models_classes(classifier, tokenizer):
    names = [("yes", "perhaps", "no")[label] for label in _predictions(classifier, tokenizer, ANSWERS)]
    data = Dataset.from_dict({"text": ANSWERS, "label": names})
    assert evaluate(classifier, data)["systems"]["model"]["accuracy"] == 1.0
    # The same names under other numbers, as another data set may have them.
    numbered = data.cast(Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes", "perhaps"])}))
    assert evaluate(classifier, numbered)["systems"]["model"]["accuracy"] == 1.0


@pytest.mark.parametrize("label", [3, -1, "maybe", None])
def test_label_that_is_no_class_of_the_model_is_refused(classifier, label):
    labels = ["yes", label] if isinstance(label, str) else [0, label]
    with pytest.raises(ValueError, match=r"Row 2 has the label .* in 'label'; the classes are .*yes, perhaps, no"):
        evaluate(classifier, Dataset.from_dict({"text": ["a", "b"], "label": labels}))
    with pytest.raises(ValueError, match=r"Row 1 has the label 0\.5"):
        evaluate(classifier, Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.0]}))


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_columns_of_no_known_kind_are_listed(encoder, classifier):
    with pytest.raises(ValueError, match="columns title, label, which is none of: retrieval: query, answer; triplets"):
        evaluate(encoder, Dataset.from_dict({"title": ["a"], "label": [0]}))
    with pytest.raises(ValueError, match="Column 'label' is not there in the data; the columns are query, answer"):
        evaluate(classifier, Dataset.from_dict(PAIRS))
    with pytest.raises(ValueError, match="usual columns are premise .* found title, body, label"):
        evaluate(classifier, Dataset.from_dict({"title": ["a"], "body": ["a"], "label": [0]}))


def test_rows_without_text_are_refused(encoder):
    with pytest.raises(ValueError, match="Row 2 has None in column 'answer'"):
        evaluate(encoder, Dataset.from_dict({"query": ["a", "b"], "answer": ["a", None]}))
    with pytest.raises(ValueError, match="no rows"):
        evaluate(encoder, Dataset.from_dict({"query": [], "answer": []}))
    with pytest.raises(ValueError, match=r"limit must be at least 1, got 0 \(--limit\)"):
        evaluate(encoder, Dataset.from_dict(PAIRS), limit=0)


# --- the command ----------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_or_json(encoder, tmp_path):
    Dataset.from_dict(PAIRS).to_parquet(tmp_path / "validation.parquet")
    Dataset.from_dict({"query": ["cat"], "answer": ["list"]}).to_parquet(tmp_path / "train.parquet")
    expected = evaluate(encoder, Dataset.from_dict(PAIRS))
    table = run_command("evaluate", encoder, tmp_path)
    assert table.exit_code == 0, table.output
    assert table.stdout.strip() == metrics_table(expected).strip()
    assert f"{expected['systems']['bm25']['mrr@10']:.4f}" in table.stdout.splitlines()[3]
    as_json = run_command("evaluate", encoder, tmp_path, "--json")
    assert json.loads(as_json.stdout) == {"model": str(encoder), "data": str(tmp_path), **expected}
    other = run_command("evaluate", encoder, tmp_path, "--split", "train", "--no-baselines", "--json")
    answer = json.loads(other.stdout)
    assert (answer["passages"], list(answer["systems"])) == (1, ["model"])


def test_command_names_task_and_columns(encoder, tmp_path):
    labelled(20, seed=0).rename_columns({"text": "title", "label": "gold"}).to_parquet(tmp_path / "rows.parquet")
    named = ("--column", "text=title", "--column", "label=gold")
    done = run_command("evaluate", encoder, tmp_path / "rows.parquet", "--task", "clustering", *named)
    assert done.stdout.startswith("clustering: 20 rows, 2 clusters\n"), done.output
    for wrong in (("--task", "search"), ("--column", "title")):
        refused = run_command("evaluate", encoder, tmp_path / "rows.parquet", *wrong)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)


def test_stage_measures_the_named_task(encoder, tmp_path):
    labelled(20, seed=0).to_parquet(rows := tmp_path / "rows.parquet")
    stage = {"kind": "evaluate", "model": str(encoder), "data": str(rows), "task": "clustering", "baselines": False}
    done = run_command("train", write_recipe(tmp_path, stage), "--output-dir", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    (measured,) = (value for value in json.loads(done.stdout)["stages"]["evaluate"].values())
    assert (measured["kind"], measured["rows"]) == ("clustering", 20)


def test_wrong_columns_are_one_sentence_and_status_2(encoder, tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("title,body\na,b\n")
    result = run_command("evaluate", encoder, file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "columns title, body" in result.stderr
    assert len(result.stderr.splitlines()) == 1
