"""Opening models for use, reading passages, and searching them from Python and from the command line."""

import errno
import functools
import json
import logging
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel

from helpers import edit_json, edit_weights, run_command, save_model, write_vectors
from minibert import MiniBertConfig, MiniBertForMaskedLM, MiniBertForSequenceClassification, MiniBertModel, train_word_level
from minibert.inference import bm25, cpu
from minibert.inference.load import fingerprint, load
from minibert.search.search import FolderSearcher, Searcher, read_passages, read_queries
from minibert.search.vectors import VectorFolder, write_manifest

WORD_TABLE = "embeddings.word_embeddings.weight"
PASSAGES = [
    "the cat sleeps on the sofa",
    "a list is sorted in place",
    "paris is the capital of france",
    "networks learn by gradient descent",
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A model without layers: its vectors are means of random word vectors, so texts that share words are close."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = train_word_level(PASSAGES, vocab_size=25)
    return save_model(folder, tokenizer, num_hidden_layers=0, initializer_range=1.0)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def run(saved):
    """Run ``minibert search`` with the tiny model."""
    return functools.partial(run_command, "search", saved)


@pytest.fixture
def passages_file(tmp_path):
    file = tmp_path / "passages.txt"
    file.write_text("\n\n".join(PASSAGES), encoding="utf-8")
    return file


def write_passages(folder, model, passages, *, keep=True, **fields):
    """Write a folder of the vectors of ``passages``, or add to it, and return its path."""
    texts, vectors = passages if keep else None, load(model).encode_document(passages)
    fields = {"model": str(model), "fingerprint": fingerprint(model), "rows_per_shard": 3, **fields}
    return write_vectors(folder, vectors, texts, **fields).folder


@pytest.fixture(scope="module", autouse=True)
def in_float32():
    """On a processor with AMX, scores would be of bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "bfloat16_is_faster", lambda: False)
        yield


@pytest.fixture(scope="module")
def vectors_once(saved, tmp_path_factory):
    return write_passages(tmp_path_factory.mktemp("vectors") / "passages", saved, PASSAGES, ids=["a", "b", "c", "d"])


@pytest.fixture
def vectors(vectors_once, tmp_path):
    """A folder of vectors of the passages, in two shards, not indexed yet."""
    return shutil.copytree(vectors_once, tmp_path / "vectors")


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """The command sends the package's log to a standard error that is closed when the command ends."""
    logger = logging.getLogger("minibert")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.fixture
def run_index():
    """Run ``minibert search`` in a folder of vectors."""
    return functools.partial(run_command, "search")


# --- opening a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_plain_folder_gets_the_pooling_of_its_config(folder, pooling):
    config = MiniBertConfig.from_pretrained(folder)
    config.pooling = pooling
    config.save_pretrained(folder)
    model = load(folder)
    inputs = model.tokenizer(PASSAGES[0], return_tensors="pt")
    hidden = MiniBertModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[0] if pooling == "cls" else hidden.mean(0), dim=0)
    torch.testing.assert_close(torch.tensor(model.encode(PASSAGES[0])), expected)


def test_sentence_transformers_folder_opens_as_it_was_saved(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(str(tmp_path / "st"))
    torch.testing.assert_close(load(tmp_path / "st").encode(PASSAGES), model.encode(PASSAGES))


@pytest.mark.parametrize("head", [MiniBertForSequenceClassification, MiniBertForMaskedLM])
def test_the_encoder_of_a_model_with_a_head_is_opened(folder, head):
    head(MiniBertConfig.from_pretrained(folder)).save_pretrained(folder)
    assert load(folder).encode(PASSAGES).shape == (4, 32)


def test_a_pooler_that_is_not_there_is_not_missed(folder):
    for name in ("pooler.dense.weight", "pooler.dense.bias"):
        edit_weights(folder, **{name: None})
    assert load(folder).encode(PASSAGES).shape == (4, 32)


def test_dtype_is_passed_on(folder):
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def _pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def _edit_config(**fields):
    return lambda folder: edit_json(folder / "config.json", **fields)


def _stages(folder):
    (folder / "2-embed").mkdir()
    (folder / "config.json").rename(folder / "2-embed" / "config.json")


def _half_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("model.safetensors"), "contains no model.safetensors"),
        (_remove("config.json"), "is not a model folder: it contains no config.json"),
        (_remove("tokenizer.json"), "holds no tokenizer"),
        (_truncate, "model.safetensors is damaged"),
        (_empty_weights, "model.safetensors is damaged"),
        (_pickle, "only as a pickle .pytorch_model.bin."),
        (_shard, "lacks model-00001-of-00002.safetensors"),
        (_half_json, "config.json is damaged"),
        (_edit_config(model_type="other", auto_map={"AutoModel": "code.Model"}), "pass --trust-remote-code"),
        (_edit_config(hidden_size=16), "do not have the shapes in config.json"),
        (
            lambda folder: edit_weights(folder, **{"final_norm.weight": None}),
            "The weights in .* lack final_norm.weight; save or download the model again",
        ),
        (_stages, "give one of its folders 2-embed"),
    ],
)
def test_folder_that_cannot_be_opened_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load(folder)


def test_threads_that_open_models_at_once_take_turns(saved, monkeypatch):
    """While transformers builds a model it replaces a method of the base class; two at once left it replaced for good."""
    built = MiniBertModel.__init__
    tie_weights = PreTrainedModel.tie_weights

    def slowly(self, config):
        time.sleep(0.05 * len(threading.current_thread().name))  # they would begin together, and end one after the other
        built(self, config)

    monkeypatch.setattr(PreTrainedModel, "tie_weights", tie_weights)  # put back whatever happens here
    monkeypatch.setattr(MiniBertModel, "__init__", slowly)
    threads = [threading.Thread(target=load, args=(saved,), name=name) for name in ("a", "bbbb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert PreTrainedModel.tie_weights is tie_weights


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "a/b/c", "owner/not-on-the-hub"])
def test_missing_model_is_refused(model):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load(model)


def test_missing_model_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minibert.inference.load.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="no model folder runs/tiny .*, but there is a folder runs; fix the path"):
        load("runs/tiny")


def test_code_that_is_not_the_installed_code_is_named_once(folder, caplog, monkeypatch):
    load(folder)
    assert not caplog.messages
    for name in ("configuration_minibert.py", "modeling_minibert.py"):
        with (folder / name).open("a") as file:
            file.write("# changed\n")
    load(folder)
    monkeypatch.chdir(folder.parent)
    load(folder.name)  # the same by another path
    (message,) = caplog.messages
    assert message.startswith(f"{folder}/configuration_minibert.py and modeling_minibert.py differ from the installed code.")


# --- reading passages -----------------------------------------------------------------------------------------------------


def test_passages_come_from_the_only_column_of_texts_or_a_usual_one():
    assert read_passages(Dataset.from_dict({"id": [1, 2, 3, 4, 5], "body": ["b", None, " ", "a", "b"]})) == ["b", "a"]
    assert read_passages(Dataset.from_dict({"title": ["t"], "answer": ["a"]})) == ["a"]
    assert read_passages(Dataset.from_dict({"title": ["t"], "answer": ["a"]}), "title") == ["t"]


def test_passages_are_read_by_path(tmp_path):
    (tmp_path / "train.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("b\n", encoding="utf-8")
    assert read_passages(tmp_path) == read_passages(str(tmp_path)) == ["a"]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ({"title": ["t"], "body": ["b"]}, None, "not clear which column .* found title, body; name it .--column."),
        ({"id": [1]}, None, "No column of the data has texts; the columns are id"),
        ({"id": [1], "body": ["b"]}, "text", "Column 'text' is not there in the data; the columns are id, body"),
        ({"id": [1], "body": ["b"]}, "id", "Column 'id' does not hold texts"),
        ({"text": ["", " "]}, None, "Every passage in column 'text' is blank"),
    ],
)
def test_unclear_passages_are_refused(rows, column, message):
    with pytest.raises(ValueError, match=message):
        read_passages(Dataset.from_dict(rows), column)


# --- searching ------------------------------------------------------------------------------------------------------------


def test_search_ranks_as_the_full_similarity_matrix_does(saved):
    searcher = Searcher(saved, PASSAGES)
    queries = ["capital of france", "gradient descent"]
    model = load(saved)
    similarities = model.similarity(model.encode(queries), model.encode(PASSAGES))
    found = searcher.search(queries, top_k=len(PASSAGES))
    for hits, row in zip(found, similarities, strict=True):
        assert [hit.number for hit in hits] == row.argsort(descending=True).tolist()
        assert [hit.score for hit in hits] == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-6)
        assert [hit.passage for hit in hits] == [PASSAGES[hit.number] for hit in hits]
    assert [hits[0].number for hits in found] == [2, 3]


def test_more_hits_than_passages_are_all_of_them(saved):
    assert len(Searcher(saved, PASSAGES).search(["cat"], top_k=99)[0]) == len(PASSAGES)


def test_bad_search_is_refused(saved):
    with pytest.raises(ValueError, match="passages must hold at least one text"):
        Searcher(saved, [])
    searcher = Searcher(saved, PASSAGES)
    with pytest.raises(ValueError, match="Query 2 is empty"):
        searcher.search(["cat", " "])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        searcher.search(["cat"], top_k=0)


# --- searching a folder of vectors ----------------------------------------------------------------------------------------


def test_a_folder_of_vectors_answers_as_its_passages_do(saved, vectors):
    queries = ["capital of france", "gradient descent", "the sofa"]
    for ours, theirs in zip(
        FolderSearcher(vectors).search(queries, 4), Searcher(saved, PASSAGES).search(queries, 4), strict=True
    ):
        assert [hit.passage for hit in ours] == [hit.passage for hit in theirs]
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
        assert [hit.id for hit in ours] == ["abcd"[hit.number] for hit in theirs]


def test_passages_that_are_added_are_found(saved, vectors):
    assert len(FolderSearcher(vectors).search(["tree"], 9)[0]) == 4
    write_passages(vectors, saved, [*PASSAGES[:3], "networks learn", "a sofa is sorted"], ids=list("abcde"))
    (vectors / "part-00001.parquet").unlink()  # it was not full
    write_passages(vectors, saved, [*PASSAGES[:3], "networks learn", "a sofa is sorted"], ids=list("abcde"))
    assert FolderSearcher(vectors).search(["a sofa is sorted"], 1)[0][0].id == "e"


def test_a_folder_without_texts_gives_ids(saved, tmp_path, run_index):
    folder = write_passages(tmp_path / "vectors", saved, PASSAGES, keep=False)
    (hit, *_) = FolderSearcher(folder).search(["capital of france"])[0]
    assert (hit.passage, hit.id) == (None, 2)
    result = run_index(folder, "capital of france", "--top-k", 1)
    assert result.stdout.strip().endswith("id 2")
    result = run_index(folder, "capital of france", "--hybrid")
    assert result.exit_code == 2
    assert "has no texts, which --hybrid needs" in result.stderr


def test_hybrid_search_finds_words_the_model_does_not_know(saved, tmp_path):
    # Both are unknown words to the tokenizer, so that the two passages have the same vector.
    passages = ["zzyzx is a town", "qwerty is a town", "the cat sleeps", "a list"]
    folder = write_passages(tmp_path / "vectors", saved, passages)
    assert [hit.number for hit in FolderSearcher(folder, hybrid=True).search(["qwerty"], 2)[0]] == [1, 0]
    hits = FolderSearcher(folder, hybrid=True).search(["qwerty", "the of"], 4)
    assert hits[0][0].score == pytest.approx(1 / 61 + 1 / 61) or hits[0][0].score == pytest.approx(1 / 61 + 1 / 62)
    assert len(hits[1]) == 4  # no word but stop words: the ranking by meaning remains


def test_the_word_index_is_built_once_and_follows_the_shards(saved, vectors, monkeypatch):
    built, real = [], bm25.WordIndex.build
    monkeypatch.setattr(bm25.WordIndex, "build", lambda *args, **kwargs: built.append(1) or real(*args, **kwargs))
    for _ in range(2):
        FolderSearcher(vectors, hybrid=True)
    assert len(built) == 1
    (words,) = (vectors / "index").glob("words-*")
    (words / "indices.csc.index.npy").write_bytes(b"")
    FolderSearcher(vectors, hybrid=True)  # damaged
    assert len(built) == 2
    (vectors / "part-00001.parquet").unlink()
    write_passages(vectors, saved, [*PASSAGES, "qwerty"], ids=list("abcde"))
    assert FolderSearcher(vectors, hybrid=True).search(["qwerty"], 1)[0][0].id == "e"
    assert len(built) == 3
    assert len(list((vectors / "index").glob("words-*"))) == 1


def test_of_two_that_need_the_word_index_one_builds_it(vectors, monkeypatch):
    built, real = [], bm25.WordIndex.build

    def slow(*args, **kwargs):
        built.append(1)
        time.sleep(0.5)
        return real(*args, **kwargs)

    monkeypatch.setattr(bm25.WordIndex, "build", slow)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: FolderSearcher(vectors, hybrid=True), range(2)))
    assert len(built) == 1
    assert [searcher.search(["cat"], 1)[0][0].id for searcher in both] == ["a", "a"]


def test_a_full_disk_is_named_and_leaves_no_half_word_index(vectors, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bm25.WordIndex, "save", full)
    with pytest.raises(OSError, match=r"words-[\w-]+ could not be written \(No space left on device\); the vectors"):
        FolderSearcher(vectors, hybrid=True)
    assert not list((vectors / "index").glob("words-*"))


def test_more_hits_than_rows_take_no_memory(vectors):
    assert len(FolderSearcher(vectors, hybrid=True).search(["cat"], 10**9)[0]) == len(PASSAGES)


def test_texts_of_stop_words_alone_are_refused_for_hybrid_search(saved, tmp_path):
    folder = write_passages(tmp_path / "vectors", saved, ["the of", "and a"])
    with pytest.raises(ValueError, match="only stop words"):
        FolderSearcher(folder, hybrid=True)


def test_the_model_may_have_moved_but_not_changed(saved, folder, vectors, tmp_path):
    manifest = VectorFolder(vectors).manifest
    manifest.model = str(tmp_path / "moved")
    write_manifest(vectors, manifest)
    with pytest.raises(FileNotFoundError, match="no model folder .*moved.* give its path with --model"):
        FolderSearcher(vectors)
    assert FolderSearcher(vectors, saved).search(["cat"], 1)
    with torch.no_grad():
        other = MiniBertModel.from_pretrained(folder)
        other.embeddings.word_embeddings.weight.mul_(1.5)
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="were made by .*moved, but .*model is another model or has changed since"):
        FolderSearcher(vectors, folder)
    shutil.copytree(folder, tmp_path / "moved")
    with pytest.raises(ValueError, match="moved is another model or has changed since: encode again"):
        FolderSearcher(vectors)


def make_student(folder, teachers, **fields):
    """Change the weights of a model, and record ``teachers`` in its settings."""
    edit_weights(folder, **{WORD_TABLE: load_file(folder / "model.safetensors")[WORD_TABLE] * 1.5})
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"teachers": teachers, **fields}))
    return folder


def test_queries_of_a_student_find_what_its_teacher_encoded(saved, folder, vectors):
    student = make_student(folder, ["0" * 64, fingerprint(saved)])
    done = run_command("search", vectors, "a list", "--model", student)
    assert done.exit_code == 0
    assert PASSAGES[1] in done.stdout.splitlines()[1]
    assert [line for line in done.stderr.splitlines() if "queries" in line] == [
        f"{student} encodes the queries: its teacher made the vectors in {vectors}."
    ]
    # The folder stays the teacher's, whose queries need no such word.
    assert VectorFolder(vectors).manifest.model == str(saved)
    assert "encodes the queries" not in run_command("search", vectors, "a list").stderr


@pytest.mark.parametrize("teachers", [["0" * 64], [], None, 7, {"a": 1}, [["x"]]])
def test_students_of_other_teachers_are_refused(folder, vectors, teachers):
    with pytest.raises(ValueError, match="is another model or has changed since"):
        FolderSearcher(vectors, make_student(folder, teachers))


def test_a_folder_that_is_still_being_encoded_is_searched_with_a_word_of_it(saved, tmp_path, caplog):
    folder = write_passages(tmp_path / "vectors", saved, PASSAGES, complete=False)
    assert FolderSearcher(folder).search(["cat"], 1)
    assert "is not finished: minibert encode has written 4 vectors so far" in caplog.text


# --- reading queries ------------------------------------------------------------------------------------------------------


def test_queries_come_one_per_row_repeated_ones_too(tmp_path):
    (tmp_path / "queries.txt").write_text("b\na\nb\n", encoding="utf-8")
    assert read_queries(tmp_path / "queries.txt") == ["b", "a", "b"]
    assert read_queries(Dataset.from_dict({"answer": ["x"], "question": ["a"]})) == ["a"]
    assert read_queries(Dataset.from_dict({"id": [1], "body": ["a"]})) == ["a"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"title": ["t"], "body": ["b"]}, "not clear which column of the queries .* found title, body; name it .query."),
        ({"id": [1]}, "No column of the queries has texts"),
        ({"query": ["a", None]}, "Query 2 is empty"),
    ],
)
def test_unclear_queries_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        read_queries(Dataset.from_dict(rows))


# --- the command ----------------------------------------------------------------------------------------------------------


def test_a_file_is_searched(run, tmp_path):
    file = tmp_path / "passages.jsonl"
    Dataset.from_dict({"number": range(len(PASSAGES)), "body": PASSAGES}).to_json(file)
    result = run("--passages", file, "--json", "--top-k", 1, "capital of france", "gradient descent")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert [answer["query"] for answer in answers] == ["capital of france", "gradient descent"]
    assert [[hit["passage"] for hit in answer["hits"]] for answer in answers] == [[PASSAGES[2]], [PASSAGES[3]]]


def test_hits_are_printed_best_first(run, passages_file):
    result = run("--passages", passages_file, "the cat", "--top-k", "2")
    query, first, second = result.stdout.strip().splitlines()
    assert query == "the cat"
    assert first.endswith(PASSAGES[0])
    assert float(first.split()[1]) >= float(second.split()[1])


def test_queries_are_read_from_standard_input_until_an_empty_line(run, passages_file):
    result = run("--passages", passages_file, "--json", "--top-k", "1", input="the cat\ngradient descent\n\nparis\n")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["hits"][0]["passage"] for answer in answers] == [PASSAGES[0], PASSAGES[3]]
    assert run("--passages", passages_file, input="").exit_code == 0


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        (None, "cat", "There is no file or folder"),
        (b"", "cat", "is empty"),
        (b"\n\n", "cat", "is blank"),
        (b"fine\nna\xefve\n", "cat", "is not UTF-8: line 2"),
        (b"fine\n", "  ", "Query 1 is empty"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run, tmp_path, content, query, message):
    file = tmp_path / "in.txt"
    if content is not None:
        file.write_bytes(content)
    result = run("--passages", file, query)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_column_that_is_not_there_lists_those_that_are(run, tmp_path):
    file = tmp_path / "in.csv"
    file.write_text("title,body\na,b\n")
    result = run("--passages", file, "--column", "text", "cat")
    assert result.exit_code == 2
    assert "title, body" in result.stderr


def test_model_that_is_not_there_is_status_2(passages_file):
    result = run_command("search", "no/where/at/all", "--passages", passages_file, "cat")
    assert result.exit_code == 2
    assert "There is no model folder no/where/at/all" in result.stderr


def test_a_folder_is_indexed_once_and_its_hits_printed(run_index, vectors):
    result = run_index(vectors, "the cat", "--top-k", 2)
    assert result.exit_code == 0, result.output
    assert result.stderr.strip() == "Exact search: each query is compared with all 4 vectors (recall@10 1)."
    query, first, _ = result.stdout.strip().splitlines()
    assert query == "the cat" and first.endswith(PASSAGES[0])
    assert run_index(vectors, "the cat").stderr == ""


def test_queries_of_a_file_are_answered_line_by_line(run_index, vectors, run, passages_file, tmp_path):
    file = tmp_path / "queries.jsonl"
    file.write_text('{"query": "capital of france"}\n{"query": "gradient descent"}\n', encoding="utf-8")
    of_folder = run_index(vectors, "--queries", file, "--json", "--top-k", 1)
    of_passages = run("--passages", passages_file, "--queries", file, "--json", "--top-k", 1)
    for result in (of_folder, of_passages):
        assert result.exit_code == 0, result.output
        answers = [json.loads(line) for line in result.stdout.splitlines()]
        assert [answer["query"] for answer in answers] == ["capital of france", "gradient descent"]
        assert [answer["hits"][0]["passage"] for answer in answers] == [PASSAGES[2], PASSAGES[3]]
    assert json.loads(of_folder.stdout.splitlines()[0])["hits"][0]["id"] == "c"


def test_queries_for_a_folder_are_read_from_standard_input(run_index, vectors):
    result = run_index(vectors, "--json", input="the cat\ngradient descent\n")
    assert [json.loads(line)["query"] for line in result.stdout.splitlines()] == ["the cat", "gradient descent"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--queries", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--queries", "{tmp}/blank.jsonl"], "Query 1 is empty"),
        (["--queries", "{tmp}/none.txt"], "There is no file or folder"),
        (["--queries", "{tmp}/blank.jsonl", "cat"], "on the command line and with --queries"),
        (["--column", "text", "cat"], "--column can only be used with --passages"),
        (["--model", "{tmp}/none", "cat"], "There is no model folder"),
        (["  "], "Query 1 is empty"),
        (["cat", "caf\udce9"], "Query 2 is not UTF-8: 'caf\\udce9'; convert it"),
    ],
)
def test_bad_input_for_a_folder_is_one_sentence_and_status_2(run_index, vectors, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"query": " "}\n')
    result = run_index(vectors, *(option.format(tmp=tmp_path) for option in options))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_options_of_a_folder_are_refused_for_passages(run, passages_file):
    for option in (["--hybrid"], ["--exact"], ["--rebuild"], ["--model", "x"]):
        result = run("--passages", passages_file, *option, "cat")
        assert result.exit_code == 2
        assert f"{option[0]} needs a folder of vectors" in result.stderr


def test_a_model_or_nothing_is_no_folder_of_vectors(run_index, saved, tmp_path):
    for target in (saved, tmp_path / "nowhere"):
        result = run_index(target, "cat")
        assert result.exit_code == 2
        assert f"There is no folder of vectors {target}" in result.stderr and "--passages FILE" in result.stderr


def test_a_missing_shard_is_status_2(run_index, vectors):
    (vectors / "part-00001.parquet").unlink()
    result = run_index(vectors, "cat")
    assert result.exit_code == 2
    assert "lacks part-00001.parquet" in result.stderr


def test_words_are_compared_without_regard_to_their_form():
    from minibert.inference.bm25 import WordIndex

    texts = ["caf\u00e9 noir", "\u0928\u092e\u0938\u094d\u0924\u0947 world", "soft\u00adware", "other words"]
    queries = ["cafe\u0301", "\u0928\u092e\u0938\u094d\u0924\u0947", "software", "\uff23\uff41\uff46\u00c9"]
    assert WordIndex.build(texts).search(queries, 1)[1].ravel().tolist() == [0, 1, 2, 0]
