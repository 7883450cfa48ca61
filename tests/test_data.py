"""Test data named by path: what is read, and one clear sentence for what cannot be read."""

import datasets
import pytest

from minibert.data.load import as_dataset, check_columns, load, text_columns
from minibert.data.source import DataSource


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def source(value, **fields):
    made = DataSource.model_validate(str(value) if not isinstance(value, dict) else value)
    return made.model_copy(update=fields)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\nNA,1\nnull,0\n"),
        ("a.tsv", "text\tlabel\nNA\t1\nnull\t0\n"),
        ("a.jsonl", '{"text": "NA", "label": 1}\n{"text": "null", "label": 0}\n'),
        ("a.json", '[{"text": "NA", "label": 1}, {"text": "null", "label": 0}]'),
    ],
)
def test_every_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = load([source(tmp_path / name)], split="validation")  # a single file is taken whole
    assert rows["text"][:] == ["NA", "null"]
    assert rows["label"][:] == [1, 0]
    assert text_columns(rows) == ["text"]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_separator_at_the_end_of_every_row_shifts_no_column(tmp_path, name, separator):
    rows = ["id,text", "1,one,", "2,two,"]
    (tmp_path / name).write_text("\n".join(rows).replace(",", separator), encoding="utf-8")
    assert load([source(tmp_path / name)]).to_dict() == {"id": [1, 2], "text": ["one", "two"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "one\ntwo\n"), ("a.csv", "text\none\ntwo\n"), ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n')],
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load([source(tmp_path / name)]).to_dict() == {"text": ["one", "two"]}


def test_lines_of_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert load([source(tmp_path / "a.txt")])["text"][:] == ["one", "two"]
    datasets.Dataset.from_dict({"x": [1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    assert load([source(tmp_path / "a.parquet", limit=2)])["x"][:] == [1, 2]


def test_splits_of_a_folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "test" / "pos").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "dev", "unsupervised"):
        (folder / f"{name}.csv").write_text(f"text\n{name}\n", encoding="utf-8")
    (folder / "test" / "pos" / "1.csv").write_text("text\ntest\n", encoding="utf-8")
    (folder / "README.md").write_text("not data", encoding="utf-8")
    assert load([source(folder)])["text"][:] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert load([source(folder)], split="validation")["text"][:] == ["dev"]
    assert load([source(folder, split="test")])["text"][:] == ["test"]
    assert load([source(folder, split="unsupervised")])["text"][:] == ["unsupervised"]
    with pytest.raises(ValueError, match="no split 'other'; it has test, train, unsupervised, validation"):
        load([source(folder, split="other")])


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:40%]+train[50%:90%]", [0, 1, 2, 3, 5, 6, 7, 8]),
        ("training[40%:50%] + train[90%:]", [4, 9]),
        ("train[-2:]+two-parts", [8, 9, 20, 21]),
        ("train[8:]+dev[:1]", [8, 9, 10]),
    ],
)
def test_slices_of_splits(tmp_path, split, rows):
    for name, numbers in {"train": range(10), "dev": range(10, 20), "two-parts": range(20, 22)}.items():
        datasets.Dataset.from_dict({"x": list(numbers)}).to_parquet(tmp_path / f"{name}.parquet")
    assert load([source(tmp_path, split=split)])["x"][:] == rows
    assert load([source(tmp_path)], split=split)["x"][:] == rows


def test_a_slice_of_a_single_file(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n2\n3\n4\n", encoding="utf-8")
    assert load([source(tmp_path / "a.csv", split="train[:75%]")])["x"][:] == [1, 2, 3]
    assert load([source(tmp_path / "a.csv", split="train[75%:]")])["x"][:] == [4]
    assert load([source(tmp_path / "a.csv", split="train+test")])["x"][:] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="a.csv has no rows"):
        load([source(tmp_path / "a.csv", split="train[4:]")])


@pytest.mark.parametrize("split", ["train[90%]", "train[:1x]", "train[:101%]", "train+", "[:10]", "a b"])
def test_a_split_that_cannot_be_read(split):
    with pytest.raises(ValueError, match=r"split='.*' cannot be read at .*; give a name such as train, or a slice of it"):
        DataSource.model_validate({"path": "a.csv", "split": split})


def test_sources_are_joined_on_what_they_share(tmp_path):
    (tmp_path / "a.csv").write_text("query,answer,extra\nq1,a1,x\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("answer,question\na2,q2\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text("other\nx\n", encoding="utf-8")
    rows = load([source(tmp_path / "a.csv"), source(tmp_path / "b.csv", columns={"question": "query"})])
    assert rows.column_names == ["query", "answer"]
    assert rows["query"][:] == ["q1", "q2"]
    with pytest.raises(ValueError, match="share no column"):
        load([source(tmp_path / "a.csv"), source(tmp_path / "c.csv")])


def test_string_forms():
    assert source("owner/name:part").config == "part"
    assert source("owner/name").config is None
    assert source("C:/data/a.csv").path == "C:/data/a.csv"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.txt", b"fine\n\xff\xfe\n", "not UTF-8: line 2"),
        ("a.csv", b"text\nfine\nna\xefve\n", "not UTF-8: line 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "not UTF-8: line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "row 2 is not a JSON object"),
        ("a.csv", b"id,text\n1,one,\n\n2,two,lost\n", r"a\.csv has a row with more values than its first line has columns"),
        ("a.csv", b"text\none,,\n", r"a\.csv has a row with more values"),
        ("a.parquet", b"PAR0", "cannot be read as parquet"),
        ("a.docx", b"word", r"\.docx is not one of \.parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load([source(tmp_path / name)])
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("path", ["missing.csv", "./missing", "a/b/c", "/nowhere/at/all", "my notes", "~/missing", "a..b"])
def test_missing_paths_fail_without_asking_the_hub(path):
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        load([source(path)])


def test_a_name_that_the_hub_does_not_give_us():
    with pytest.raises(FileNotFoundError, match="neither a file or folder .* nor a data set"):
        load([source("nobody/nothing")])


def test_a_name_in_a_folder_that_is_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minibert.data.load.load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="no file or folder data/sick .*, but there is a folder data; fix the path"):
        load([source("data/sick")])


def test_a_colon_in_the_name_of_a_file_names_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "app:2024.txt").write_text("a line\n", encoding="utf-8")
    (tmp_path / "logs" / "app.txt").write_text("a line\n", encoding="utf-8")
    assert load([source("logs/app:2024.txt")])["text"][:] == ["a line"]
    with pytest.raises(ValueError, match="logs/app.txt is a file or folder here, which has no configuration 'small'; name it"):
        load([source("logs/app.txt:small")])


def test_a_name_that_is_not_utf8_is_one_sentence():
    with pytest.raises(ValueError, match=r"^The name 'caf\\udce9.txt' is not UTF-8; rename the file or folder\.$"):
        as_dataset("caf\udce9.txt", split="train")


def test_files_under_unusual_names_are_left_out_with_a_warning(tmp_path, caplog):
    for name in ("train", "more", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n", encoding="utf-8")
    assert load([source(tmp_path)])["text"][:] == ["train"]
    assert [record.getMessage() for record in caplog.records if record.name == "minibert.data.load"] == [
        f"Only the split train of the folder {tmp_path} is read; left out: more. Choose with split:."
    ]
    caplog.clear()
    load([source(tmp_path, split="train")])
    assert "left out" not in caplog.text


def test_wrong_columns_list_those_found(tmp_path):
    (tmp_path / "a.csv").write_text("query,answer\nq,\n", encoding="utf-8")
    where = [source(tmp_path / "a.csv")]
    rows = load(where)
    with pytest.raises(ValueError, match="no column 'premise', 'label'; it has query, answer"):
        check_columns(rows, ["premise", "label"], where)
    with pytest.raises(ValueError, match="no value in column 'answer' of row 1"):
        check_columns(rows, ["answer"], where)
    with pytest.raises(ValueError, match="no column 'question'"):
        load([source(tmp_path / "a.csv", columns={"question": "query"})])
