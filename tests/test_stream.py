"""Test reading in blocks: damage and misuse give one sentence with the file and the row."""

import errno
import json

import pyarrow as pa
import pytest
from datasets import Dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from pyarrow import parquet

from minibert.data.stream import open_stream


def read(*arguments, **options):
    """Return the texts, or the ids where an id column is given."""
    stream = open_stream(*arguments, **options)
    return [value for rows in stream.read() for value in (rows.texts if rows.ids is None else rows.ids)]


def test_two_columns_of_a_name_are_refused(tmp_path):
    file = tmp_path / "in.parquet"
    parquet.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "text", "other"]), file)
    with pytest.raises(ValueError, match="in.parquet has more than one column named 'text'; rename all but one"):
        read(file, "text")
    assert read(file, "other") == ["c"]


def damaged(file):
    """Fill the pages of a Parquet file with zeros, but keep its footer."""
    Dataset.from_dict({"text": [f"text {row}" for row in range(100)]}).to_parquet(file)
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    return file


def test_damaged_pages_are_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"in.parquet cannot be read as parquet: .*\. Repair it, or save it again\.$"):
        read(damaged(tmp_path / "in.parquet"))


@pytest.mark.parametrize("content", [b"PAR0", b"PAR1PAR1", b"PAR1" + bytes(50) + b"PAR1"])
def test_a_damaged_footer_too(tmp_path, content):
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="in.parquet cannot be read as parquet"):
        read(tmp_path / "in.parquet")


def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch):
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "in.parquet")

    def refuse(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error", "in.parquet")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        read(tmp_path / "in.parquet")


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    words = pa.array([b"fine", b"\xff\xfe"]).view(pa.string())
    parquet.write_table(pa.table({"text": words}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match="in.parquet holds a text that is not UTF-8"):
        read(tmp_path / "in.parquet")


def test_json_that_python_does_not_convert_is_a_bad_row(tmp_path):
    deep = '{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
    long = '{"text": "x", "more": ' + "9" * 5000 + "}"
    (tmp_path / "in.jsonl").write_text("\n".join(['{"text": "fine"}', deep, long, '{"text": ', "3"]))
    first, *bad = read(tmp_path / "in.jsonl")
    assert first == "fine"
    for found, reason in zip(bad, ("maximum recursion", "Exceeds the limit", "Expecting value", ""), strict=True):
        assert found.reason.startswith("is not a JSON object") and reason in found.reason
    for row in (deep, long, '{"text": '):
        (tmp_path / "in.json").write_text(f"[{row}]")
        with pytest.raises(ValueError, match="in.json cannot be read as a JSON array: "):
            read(tmp_path / "in.json")


@pytest.mark.parametrize("content", ['{\n  "text":\n  "a"\n}\n', '["a", "b"]', "a\nb\n", "\n\n", "[]", "{}"])
def test_json_without_objects_is_refused(tmp_path, content):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(ValueError, match="in.json holds no JSON objects in its first 100 rows; give one object per line"):
        read(tmp_path / "in.json")


@pytest.mark.parametrize(
    ("value", "found"), [(1.5, r"numbers with a fraction \(double\)"), (True, "bool"), ([1], "list"), ({"a": 1}, "struct")]
)
def test_a_column_of_something_else_holds_no_ids(tmp_path, value, found):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a", "key": value}))
    with pytest.raises(ValueError, match=f"Column 'key' holds {found}.*; ids are strings or whole numbers"):
        read(tmp_path / "in.jsonl", id_column="key")


@pytest.mark.parametrize("name", ["my notes", "./missing", "missing.txt"])
def test_what_can_be_no_id_on_the_hub_is_a_missing_file(name):
    with pytest.raises(FileNotFoundError, match=rf"^There is no file or folder {name} "):
        open_stream(name)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(ValueError, match="^The data set owner/name could not be read from the Hub: Name or service not known"):
        open_stream("owner/name")


def test_a_colon_in_the_name_of_a_file_names_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "app:2024.txt").write_text("a line\n")
    (tmp_path / "logs" / "app.txt").write_text("a line\n")
    assert read("logs/app:2024.txt") == ["a line"]
    with pytest.raises(ValueError, match="logs/app.txt is a file or folder here, which has no configuration 'small'; name it"):
        open_stream("logs/app.txt:small")


def test_a_name_that_is_not_utf8_is_one_sentence():
    with pytest.raises(ValueError, match=r"^The name 'caf\\udce9.txt' is not UTF-8; rename the file or folder\.$"):
        open_stream("caf\udce9.txt")


def test_neither_is_one_in_a_folder(tmp_path):
    try:
        (tmp_path / "caf\udce9.txt").write_text("a\n")
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(ValueError, match=r"caf\\udce9.txt' is not UTF-8; rename the file or folder\.$"):
        open_stream(tmp_path)


def test_files_that_are_left_out_are_told(tmp_path, caplog):
    for name in ("train.txt", "more.txt", "test-1.txt", "test/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    assert read(tmp_path) == ["train.txt"]
    left_out = "more, test. Choose with --split."
    assert caplog.messages == [f"Only the split train of the folder {tmp_path} is read; left out: {left_out}"]
    caplog.clear()
    assert read(tmp_path / "test") == ["test/2.txt"]
    assert not caplog.messages
