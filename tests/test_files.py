"""Every command reads a file in the same way: its name is never a pattern, and all of its rows have the same columns."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from minibert.data import files
from minibert.data.load import as_dataset, load, text_columns
from minibert.data.source import DataSource
from minibert.data.stream import open_stream
from minibert.files.disk import atomic_write, expand_home
from minibert.inference.load import find_folder


def texts(path, column="text"):
    """Return the texts that training reads and those that encoding reads, which must be the same."""
    read = as_dataset(str(path), split="train")[column][:]
    streamed = [text for rows in open_stream(str(path), column).read() for text in rows.texts]
    assert [text if isinstance(text, str) else None for text in streamed] == read
    return read


@pytest.mark.parametrize(
    "name", ["data[1].csv", "star*.csv", "a::b.csv", "~$x.csv", "~/x.csv", "[x]/a.csv", "q?.csv", "{a,b}.csv", "X.CSV"]
)
def test_a_name_is_never_a_pattern(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("data1.csv", "star1.csv", "b.csv", "x.csv", "a.csv", "q1.csv"):
        (tmp_path / other).write_text("text\nof another file\n")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("text\nof the named file\n")
    assert texts(name) == ["of the named file"]


def test_the_name_of_an_unknown_user_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no model folder ~no-such-user"):
        find_folder("~no-such-user")
    assert expand_home("~").is_dir() and expand_home("~no-such-user/x") == Path("~no-such-user/x")


def test_a_replaced_file_is_read_again(tmp_path):
    file = tmp_path / "rows.csv"
    for text in ("old", "new"):
        file.write_text(f"text\n{text}\n")
        os.utime(file, (0, 0))
        assert texts(file) == [text]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
def test_lines_end_alike_everywhere(suffix, end, tmp_path):
    rows = {"jsonl": ['{"text": "a b"}', '{"text": "c\u2028d"}'], "txt": ["a b", "c\u2028d"]}.get(
        suffix, ["text", "a b", "c\u2028d"]
    )
    (tmp_path / f"rows.{suffix}").write_bytes("".join(row + end for row in rows).encode("utf-8-sig"))
    assert texts(tmp_path / f"rows.{suffix}") == ["a b", "c\u2028d"]


def test_a_quotation_mark_in_tsv_is_a_character(tmp_path):
    (tmp_path / "rows.tsv").write_text('text\tlabel\n" begins\tx\n"Great" she said\ty\nends "\tz\n')
    assert texts(tmp_path / "rows.tsv") == ['" begins', '"Great" she said', 'ends "']


@pytest.mark.parametrize(("separator", "named"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_of_csv_is_said(separator, named, tmp_path, caplog):
    rows = [["title", "text"], ["Bread", '"how, to; bake"'], ["Cars", "repair"]]
    (tmp_path / "rows.csv").write_text("".join(separator.join(row) + "\n" for row in rows))
    assert texts(tmp_path / "rows.csv") == ["how, to; bake", "repair"]
    assert f"separated by {named}" in caplog.text


def test_a_column_has_one_type_in_all_rows(tmp_path):
    numbers = [str(number % 5) for number in range(2000)]
    values = {"score": [*numbers, "0.5"], "code": [*numbers, "x7"], "late": [*[""] * 2000, "at last"], "flag": ["True"] * 2001}
    lines = [",".join(values), *map(",".join, zip(*values.values()))]
    (tmp_path / "rows.csv").write_text("\n".join([lines[0], "007".join(["0,", ",,True"]), *lines[1:]]) + "\n")
    rows = as_dataset(str(tmp_path / "rows.csv"), split="train")
    assert [rows.features[name].dtype for name in values] == ["float64", "string", "string", "bool"]
    assert (rows["score"][-1], rows["code"][0], rows["late"][-1]) == (0.5, "007", "at last")
    objects = [{"text": "a", "score": 1, "list": [], "more": {"a": 1}}] * 2000 + [
        {"text": "b", "score": 0.5, "list": [1], "more": {"b": "x"}}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, objects)))
    rows = as_dataset(str(tmp_path / "rows.jsonl"), split="train")
    assert rows[2000] == {"text": "b", "score": 0.5, "list": [1], "more": {"a": None, "b": "x"}}


def test_the_files_of_a_folder_may_have_different_columns(tmp_path):
    for suffix, first, second in (
        ("csv", "text,a,none\nx,1,\n", "b,text\nz,y\n"),
        ("jsonl", '{"text": "x", "a": 1, "none": null}\n', '{"text": "y", "b": "z"}\n'),
    ):
        (tmp_path / suffix).mkdir()
        (tmp_path / suffix / f"1.{suffix}").write_text(first)
        (tmp_path / suffix / f"2.{suffix}").write_text(second)
        rows = as_dataset(str(tmp_path / suffix), split="train").to_list()
        assert rows == [{"text": "x", "a": 1, "none": None, "b": None}, {"text": "y", "a": None, "none": None, "b": "z"}]


def test_a_column_without_a_type_is_left_out(tmp_path, caplog):
    rows = [{"text": "a", "meta": 1, "odd": "\ud800", "big": 2**70}, {"text": "b", "meta": "x", "odd": "y", "big": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert as_dataset(str(tmp_path / "rows.jsonl"), split="train").column_names == ["text"]
    assert all(f"column '{name}' is left out" in caplog.text for name in ("meta", "odd", "big"))


def test_a_column_that_cannot_be_a_column_is_left_out(tmp_path, caplog):
    pairs = pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))
    parquet.write_table(
        pa.table([["a"], ["b"], ["c"], pairs], names=["twice", "twice", "text", "pairs"]), tmp_path / "rows.parquet"
    )
    assert as_dataset(str(tmp_path / "rows.parquet"), split="train").column_names == ["text"]
    assert (
        "'twice' is left out, since there is another" in caplog.text
        and "'pairs' is left out, since it holds map" in caplog.text
    )


def test_every_kind_of_string_is_text(tmp_path):
    values = ["a text", None, "another"]
    kinds = {"view": pa.string_view(), "large": pa.large_string(), "plain": pa.string()}
    table = {name: pa.array(values, kind) for name, kind in kinds.items()} | {"codes": pa.array(values).dictionary_encode()}
    parquet.write_table(
        pa.table({**table, "odd": pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int64()))}), tmp_path / "rows.parquet"
    )
    for name in table:
        assert texts(tmp_path / "rows.parquet", name) == values
    assert text_columns(as_dataset(str(tmp_path / "rows.parquet"), split="train")) == list(table)


def test_classes_survive_where_all_files_agree(tmp_path):
    for number, names in enumerate([["no", "yes"], ["no", "yes"], ["yes", "no"]]):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / f"{number}" / "train.parquet")
        two = tmp_path / f"{number}" / "train-2.parquet"
        two.write_bytes((tmp_path / f"{max(0, number - 1)}" / "train.parquet").read_bytes())
    assert as_dataset(str(tmp_path / "1"), split="train").features["label"] == ClassLabel(names=["no", "yes"])
    assert as_dataset(str(tmp_path / "2"), split="train").features["label"] == Value("int64")


@pytest.mark.parametrize("train", ["Train.csv", "train_data.csv", "my-train.csv", "TRAINING.csv", "Train/a.csv"])
def test_test_files_are_left_out_of_training(train, tmp_path):
    for name in (train, train.lower().replace("training", "testing").replace("train", "Test")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text\n{name}\n")
    assert texts(tmp_path) == [train]
    assert load([DataSource(path=str(tmp_path), split="test")])["text"][0] != train


def test_a_folder_of_a_single_odd_name_is_all_train(tmp_path):
    (tmp_path / "test_driven.txt").write_text("a\n")
    (tmp_path / "notes.txt").write_text("b\n")
    assert texts(tmp_path) == ["b", "a"]


PIPES = {
    b"a line\nanother\n": (".txt", "a line"),
    b'{"text": "of json"}\n': (".jsonl", "of json"),
    b"text,label\nof csv,1\n": (".csv", "of csv"),
    b'text\tlabel\nof "tsv\t1\n': (".tsv", 'of "tsv'),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("content", PIPES)
def test_a_pipe_is_read_once(content, tmp_path, caplog):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    suffix, first = PIPES[content]
    assert texts(tmp_path / "pipe")[0] == first
    writer.join()
    assert f"read as those of a {suffix} file" in caplog.text


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv"])
def test_bytes_that_are_not_utf8_are_refused_alike(suffix, tmp_path):
    rows = {"jsonl": b'{"text": "caf\xe9"}\n', "txt": b"caf\xe9\n"}.get(suffix, b"text\ncaf\xe9\n")
    (tmp_path / f"rows.{suffix}").write_bytes(b"" + rows)
    for read in (lambda path: as_dataset(str(path), split="train"), lambda path: list(open_stream(str(path), "text").read())):
        with pytest.raises(ValueError, match=rf"rows.{suffix} is not UTF-8: line . cannot be decoded"):
            read(tmp_path / f"rows.{suffix}")


def test_a_filled_cache_may_be_read_only(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\none\n")
    assert texts(tmp_path / "a.csv") == ["one"]

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "FileLock", refuse)
    assert texts(tmp_path / "a.csv") == ["one"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Otherwise the cache would keep the new rows as those of the old content."""
    file, write_table = tmp_path / "a.csv", files._write_table
    before = f"text of {time.time_ns()}"  # no earlier test has cached it

    def changing(*arguments):
        file.write_text("text\ntwo\n")
        write_table(*arguments)

    file.write_text(f"text\n{before}\n")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_table", changing)
        with pytest.raises(ValueError, match="a.csv has changed while it was read; run the same command again"):
            as_dataset(str(file), split="train")
    file.write_text(f"text\n{before}\n")
    assert texts(file) == [before]


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: .*out.txt") as caught, atomic_write(tmp_path / "out.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())
