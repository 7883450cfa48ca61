"""minibert encode: input of every kind, bad rows, killed and resumed runs, several processes, and what is refused."""

import errno
import json
import os
import re
import shutil
import signal
import time
from itertools import takewhile

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from pyarrow import parquet
from sentence_transformers import SentenceTransformer

from helpers import run_command, save_model
from minibert import train_word_level
from minibert.data import files as files_module
from minibert.data.stream import open_stream
from minibert.files.disk import exclusive_lock
from minibert.inference import cpu
from minibert.inference.encode import encode
from minibert.inference.load import load
from minibert.search import encode_corpus as module
from minibert.search.encode_corpus import encode_corpus, missing_shards
from minibert.search.search import FolderSearcher, Searcher
from minibert.search.vectors import KEPT, Manifest, VectorFolder, read_manifest, shard_name, to_float

TEXTS = [f"the {color} {animal} sleeps" for color in ("red", "green", "blue") for animal in ("cat", "dog", "fish", "bird")]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_word_level(TEXTS, vocab_size=14)
    for seed, name in enumerate(("model", "other")):
        save_model(root / name, tokenizer, seed=seed, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return root


@pytest.fixture(scope="session")
def model(models):
    return models / "model"


@pytest.fixture(scope="session")
def expected(model):
    return encode(model, TEXTS, dtype="float32")


@pytest.fixture
def data(tmp_path):
    """Parquet in row groups of 5 rows."""
    file = tmp_path / "in.parquet"
    parquet.write_table(
        Dataset.from_dict({"text": TEXTS, "key": [f"k{row}" for row in range(12)]}).data.table, file, row_group_size=5
    )
    return file


@pytest.fixture
def run(model, tmp_path):
    """Run ``minibert encode`` with the tiny model in float32."""

    def run(data, *arguments, out=tmp_path / "out", model=model):
        return run_command("encode", model, data, out, "--dtype", "float32", *arguments)

    return run


def vectors_in(folder):
    opened = VectorFolder(folder)
    return np.concatenate([to_float(opened.read(shard), opened.manifest) for shard in opened.shards])


# --- input and output -----------------------------------------------------------------------------------------------------


def write(file, texts):
    rows = Dataset.from_dict({"number": range(len(texts)), "body": texts})
    if file.suffix == ".txt":
        file.write_text("\n".join(texts), encoding="utf-8")
    elif file.suffix in (".csv", ".tsv"):
        rows.to_csv(file, sep="," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".parquet":
        rows.to_parquet(file)
    else:
        rows.to_json(file, lines=file.suffix == ".jsonl")
    return file


def test_vectors_ids_and_texts_keep_the_order_of_the_input(run, tmp_path, expected):
    done = run(write(tmp_path / "in.tsv", TEXTS), "--rows-per-shard", 5, "--keep-text", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == len(TEXTS)
    folder = VectorFolder(tmp_path / "out")
    assert [shard.rows for shard in folder.shards] == [5, 5, 2] and folder.manifest.complete
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)
    assert folder.ids(range(12)) == list(range(12))
    assert folder.texts([11, 0, 5]) == [TEXTS[11], TEXTS[0], TEXTS[5]]
    assert [(row, block.shape) for row, block in folder.blocks(size=4)] == [
        (row, (size, 16)) for row, size in ((0, 4), (4, 1), (5, 4), (9, 1), (10, 2))
    ]


def test_a_vector_does_not_depend_on_the_size_of_its_shard(model, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_is_faster", lambda: False)  # so float32 is chosen
    encode_corpus(model, write(tmp_path / "in.txt", TEXTS), tmp_path / "out", rows_per_shard=1, show_progress=False)
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)


def test_a_folder_of_files_is_read_in_order_of_names(run, tmp_path, expected):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, start in enumerate(range(0, 12, 3)):
        write(folder / f"{number}.{('jsonl', 'csv')[number % 2]}", TEXTS[start : start + 3])
    assert run(folder, "--rows-per-shard", 4).exit_code == 0
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)


def test_a_hub_data_set_is_streamed(model, tmp_path, expected, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr("minibert.data.load.load_dataset", load_dataset)
    monkeypatch.setattr("minibert.data.load.HfApi.dataset_info", lambda self, name, revision: type("Info", (), {"sha": "abc"}))
    encode_corpus(model, "owner/texts:small", tmp_path / "out", rows_per_shard=5, dtype="float32", split="test")
    assert asked == [(("owner/texts", "small"), {"split": "test", "revision": "abc", "streaming": True})]
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)
    assert read_manifest(tmp_path / "out").source["revision"] == "abc"


def test_ids_are_those_of_a_column(run, data, tmp_path):
    assert run(data, "--id-column", "key", "--column", "text").exit_code == 0
    assert VectorFolder(tmp_path / "out").ids([3, 1]) == ["k3", "k1"]


def test_shards_are_read_by_pandas_and_datasets(run, data, tmp_path, expected):
    run(data, "--column", "text", "--keep-text", "--rows-per-shard", 7)
    frame = pd.read_parquet(sorted((tmp_path / "out").glob("*.parquet")))
    assert frame["text"].tolist() == TEXTS
    np.testing.assert_allclose(np.stack(frame["vector"]), expected, atol=1e-6)
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_allclose(rows.with_format("numpy")["vector"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "dtype", "width"), [("float16", "float16", 16), ("int8", "int8", 16), ("binary", "int8", 2)]
)
def test_vectors_are_stored_in_fewer_bits(run, data, tmp_path, expected, precision, dtype, width):
    assert run(data, "--column", "text", "--precision", precision, "--rows-per-shard", 5).exit_code == 0
    folder = VectorFolder(tmp_path / "out")
    stored = folder.read(folder.shards[0])
    assert (stored.dtype, stored.shape) == (np.dtype(dtype), (5, width))
    found = vectors_in(tmp_path / "out")
    if precision == "binary":
        np.testing.assert_array_equal(found > 0, expected > 0)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-3)


# --- bad rows -------------------------------------------------------------------------------------------------------------

BAD = [{"t": "the cat"}, {"t": 3}, "no json", {"u": "the dog"}, {"t": None}, {"t": " "}, [1], {"t": "a bird"}]


@pytest.fixture
def bad(tmp_path):
    file = tmp_path / "bad.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in BAD]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_bad_rows_are_skipped_and_named(run, bad, tmp_path):
    done = run(bad, "--column", "t", "--on-bad-row", "skip", "--rows-per-shard", 3)
    assert done.exit_code == 0, done.output
    assert "6 rows were skipped: 1 (is of type int, not a string), 2 (is not a JSON object that can be read (E" in done.stdout
    assert "3 (has no text)" in done.stdout
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped_rows[3:] == [[4, "has no text"], [5, "is empty"], [6, "is not a JSON object"]]
    assert [(shard.first_row, shard.rows, shard.first_input_row) for shard in manifest.shards] == [
        (0, 1, 0),
        (1, 0, 3),
        (1, 1, 6),
    ]
    assert VectorFolder(tmp_path / "out").ids([0, 1]) == [0, 7]


def test_bad_rows_are_refused_by_number_and_the_run_goes_on_when_they_may_be_skipped(run, bad, tmp_path):
    done = run(bad, "--column", "t", "--rows-per-shard", 1)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"Row 1 of {bad} is of type int, not a string" in done.stderr
    assert "--on-bad-row skip" in done.stderr and len(done.stderr.splitlines()) == 1
    assert run(bad, "--column", "t", "--rows-per-shard", 1, "--on-bad-row", "skip").exit_code == 0
    assert VectorFolder(tmp_path / "out").ids([0, 1]) == [0, 7]


def test_a_bad_row_of_a_later_file_is_named_in_both_ways(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.txt").write_text("one\n\n")
    assert f"Row 3 of the input, row 1 of {folder / 'b.txt'} is empty" in run(folder).stderr


def test_a_text_of_a_million_characters_is_read(run, tmp_path, model):
    long = "the red cat " * 90_000
    (tmp_path / "in.csv").write_text(f"text\n{long}\n")
    assert run(tmp_path / "in.csv").exit_code == 0
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), encode(model, [long[:10_000]], dtype="float32"), atol=1e-6)


def test_a_separator_at_the_end_of_every_row_shifts_no_column(tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n1,one,\n2,two,\n")
    rows = next(open_stream(tmp_path / "in.csv", id_column="id").read())
    assert (rows.texts, rows.ids) == (["one", "two"], ["1", "2"])


@pytest.mark.parametrize("row", [3, 800])
def test_a_row_with_more_values_than_columns_is_refused(tmp_path, row):
    (tmp_path / "in.csv").write_text("id,text\n" + "1,one,\n" * row + "2,two,lost\n")
    with pytest.raises(ValueError, match="in.csv has a row with more values than its first line has columns"):
        list(open_stream(tmp_path / "in.csv", "text").read())
    (tmp_path / "in.csv").write_text("id,text\n" + "1,one\n" * row + "2,two,lost\n")
    with pytest.raises(ValueError, match=rf"in.csv cannot be read as csv: .* Expected 2 fields in line {row + 2}, saw 3"):
        list(open_stream(tmp_path / "in.csv", "text").read())


def test_half_a_pair_of_surrogates_is_a_bad_row(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n{"text": "bad \\ud800 one"}\n{"text": "pair \\ud83d\\ude00"}\n')
    done = run(tmp_path / "in.jsonl")
    assert done.exit_code == 2 and f"Row 1 of {tmp_path / 'in.jsonl'} is not valid Unicode" in done.stderr
    assert run(tmp_path / "in.jsonl", "--on-bad-row", "skip").exit_code == 0
    assert VectorFolder(tmp_path / "out").ids([0, 1]) == [0, 2]


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (["1", "true", "1.5", "-9223372036854775808"], [1, "whole number", "whole number", -(2**63)]),
        (["1", "9223372036854775808", str(2**70)], [1, "whole number", "whole number"]),
        (['"a"', '"\\udfff"', "1"], ["a", "string of valid Unicode", "string of valid Unicode"]),
    ],
)
def test_ids_that_cannot_be_stored_are_bad_rows(tmp_path, ids, found):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"text": "x", "id": {value}}}\n' for value in ids))
    rows = next(open_stream(tmp_path / "in.jsonl", id_column="id").read())
    for value, expected in zip(rows.ids, found, strict=True):
        if isinstance(value, files_module.Bad):
            assert value.reason.startswith(f"has an id that is not a {expected}")
        else:
            assert value == expected


def test_ids_of_csv_are_strings_as_they_are_written(run, tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n1,a b\n007,c d\n")
    assert run(tmp_path / "in.csv", "--id-column", "id").exit_code == 0
    assert VectorFolder(tmp_path / "out").ids([0, 1]) == ["1", "007"]


# --- killed and resumed ---------------------------------------------------------------------------------------------------


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("part-*.parquet")}


def assert_same(one, other):
    """The same shards with the same rows; products of matrices may differ in the last digit from process to process."""
    assert sorted(contents(one)) == sorted(contents(other))
    first, second = VectorFolder(one), VectorFolder(other)
    assert first.manifest.complete and first.shards == second.shards
    assert first.ids(range(len(first))) == second.ids(range(len(second)))
    np.testing.assert_allclose(vectors_in(one), vectors_in(other), atol=1e-3 if first.manifest.precision == "int8" else 1e-6)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_ends_as_if_left_alone(model, data, tmp_path, start, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = {"column": "text", "rows_per_shard": 2, "dtype": "float32"}
    encode_corpus(model, data, whole, **options)
    write_parts, kills = module.ShardWriter.write, 0
    monkeypatch.setattr(module.ShardWriter, "write", lambda *arguments: (time.sleep(0.05), write_parts(*arguments)))
    for delay in (0.0, 0.02, 0.06, 0.13):
        (child,) = start(1, lambda: encode_corpus(model, data, out, **options))
        until = time.monotonic() + 30
        shards = len(contents(out))
        while child.is_alive() and len(contents(out)) == shards and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills >= 2
    before = {file: file.stat().st_mtime_ns for file in out.glob("part-*.parquet")}
    assert before
    summary = encode_corpus(model, data, out, **options)
    assert summary.written == len(TEXTS) - 2 * len(before)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert_same(out, whole)
    assert encode_corpus(model, data, out, **options).written == 0


def test_a_half_written_shard_is_made_again(run, data, tmp_path):
    options = ("--column", "text", "--rows-per-shard", 4)
    run(data, *options)
    out = tmp_path / "out"
    good = contents(out)
    (out / shard_name(1)).write_bytes(good[shard_name(1)][:-9])
    (out / shard_name(2)).unlink()
    (out / f".{shard_name(2)}.0123abcd.part").write_bytes(b"half")
    done = run(data, *options, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["written"] == 8
    assert contents(out) == good


def test_ctrl_c_says_how_to_resume(run, data, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.ShardWriter, "write", interrupt)
    monkeypatch.setattr("sys.argv", ["minibert", "encode", "model", "in", "out"])
    done = run(data, "--column", "text")
    assert done.exit_code == 130 and "To resume: minibert encode model in out" in done.stderr


def test_a_full_disk_is_one_sentence_and_leaves_whole_shards(run, data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    write = parquet.ParquetWriter.write_table
    calls = iter((write, full))
    monkeypatch.setattr(parquet.ParquetWriter, "write_table", lambda *a, **k: next(calls)(*a, **k))
    done = run(data, "--column", "text", "--rows-per-shard", 6)
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    assert "part-00001.parquet could not be written (No space left on device)" in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert list(contents(tmp_path / "out")) == [shard_name(0)]
    monkeypatch.undo()
    assert run(data, "--column", "text", "--rows-per-shard", 6).exit_code == 0
    assert vectors_in(tmp_path / "out").shape == (12, 16)


def test_new_files_are_appended(run, tmp_path, expected):
    folder, options = tmp_path / "in", ("--rows-per-shard", 4)
    folder.mkdir()
    write(folder / "1.txt", TEXTS[:6])
    run(folder, *options)
    before = contents(tmp_path / "out")
    write(folder / "2.txt", TEXTS[6:])
    assert "of the input" in run(folder, *options).stderr
    done = run(folder, *options, "--append", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["written"] == 6
    assert before.items() <= contents(tmp_path / "out").items()
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)
    assert VectorFolder(tmp_path / "out").ids([5, 6, 11]) == [5, 6, 11]
    write(folder / "0.txt", TEXTS[:1])
    assert "names of new files must come last" in run(folder, *options, "--append").stderr


# --- several processes ----------------------------------------------------------------------------------------------------


def test_processes_share_the_shards(model, data, tmp_path, start):
    options = {"column": "text", "rows_per_shard": 2, "dtype": "float32", "precision": "int8"}
    encode_corpus(model, data, tmp_path / "one", **options)
    both = start(2, lambda: encode_corpus(model, data, tmp_path / "two", **options))
    assert start.finish(both) == [0, 0]
    assert_same(tmp_path / "one", tmp_path / "two")


def test_more_processes_than_shards(model, data, tmp_path, start, expected):
    def work():
        summary = encode_corpus(model, data, tmp_path / "out", column="text", rows_per_shard=12, dtype="float32")
        assert "2, shards 1; 1 had nothing to do" in summary.decisions["processes"]

    assert start.finish(start(2, work)) == [0, 0]
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)


def test_all_processes_stop_when_the_first_refuses(model, models, data, tmp_path, start):
    encode_corpus(model, data, tmp_path / "out", column="text", dtype="float32")

    def work():
        with pytest.raises(ValueError, match="The first process could not begin|has vectors of the model"):
            encode_corpus(models / "other", data, tmp_path / "out", column="text", dtype="float32")

    assert start.finish(start(2, work)) == [0, 0]


def planned(rows_per_shard, stop, **options):
    """Return the shards that are missing up to a row, as {number: rows}."""
    starts = options.pop("starts", [(0, 0)])
    manifest = Manifest("model", "", 8, "float32", True, {}, {}, {}, rows_per_shard=rows_per_shard, starts=starts)
    return dict(takewhile(lambda shard: shard[1].start < stop, missing_shards(manifest, **options)))


def test_every_missing_row_belongs_to_one_process():
    for count in (1, 3):
        parts = [planned(4, 39, starts=[(0, 0), (2, 7)], done={0, 4}, process=process, count=count) for process in range(count)]
        assert all(shard % count == process for process, part in enumerate(parts) for shard in part)
        rows = sorted(row for part in parts for shard in part.values() for row in shard)
        assert rows == [*range(4, 15), *range(19, 39)]


@pytest.mark.parametrize("suffix", ["txt", "csv", "tsv", "jsonl", "json", "parquet"])
def test_only_wanted_rows_are_read_whatever_the_file(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files_module, "BLOCK", 3)
    write(tmp_path / f"a.{suffix}", TEXTS[:7])
    write(tmp_path / f"b.{suffix}", TEXTS[7:])
    shards = planned(2, 12, done={0}, process=1, count=2).values()
    blocks = list(open_stream(tmp_path).read(shards))
    rows = [block.first + place for block in blocks for place in range(len(block.texts))]
    assert rows == [2, 3, 6, 7, 10, 11]
    assert [text for block in blocks for text in block.texts] == [TEXTS[row] for row in rows]
    assert all(block.first_in_part == block.first - 7 * block.part.endswith(f"b.{suffix}") for block in blocks)


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused_with_both_names(run, models, data, tmp_path):
    run(data, "--column", "text")
    other = write(tmp_path / "other.parquet", TEXTS[:4])
    for change, message in [
        ({"model": models / "other"}, rf"vectors of the model {models / 'model'} .*, not {models / 'other'} "),
        ({"precision": "int8"}, "with precision='float32', not 'int8'"),
        ({"data": other}, rf"of the input {data} \(1, \w+\), not {other} \(1, \w+\)"),
        ({"id-column": "key"}, "with columns=.*'id': None.*, not .*'id': 'key'"),
        ({"rows-per-shard": 3}, "with rows_per_shard=50000, not 3"),
        ({"prompt": "query: "}, "with prompt=None, not 'query: '"),
        ({"truncate-dim": 8}, "with truncate_dim=None, not 8"),
    ]:
        options = {"data": data, **change}
        arguments = [word for name, value in options.items() if name not in ("data", "model") for word in (f"--{name}", value)]
        column = ("--column", "body" if options["data"] == other else "text")
        done = run(options["data"], *column, *arguments, **({"model": options["model"]} if "model" in options else {}))
        assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
        assert re.search(message, done.stderr), done.stderr
    (tmp_path / "out" / "index").mkdir()  # of minibert search
    forced = run(data, "--column", "text", "--precision", "int8", "--force")
    assert forced.exit_code == 0, forced.output
    assert read_manifest(tmp_path / "out").precision == "int8"


def test_the_same_files_elsewhere_are_the_same_input(run, data, tmp_path):
    run(data, "--column", "text")
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(data, tmp_path / "moved" / data.name)
    assert "Nothing was left to do" in run(moved, "--column", "text").stdout


def test_an_input_that_changes_meanwhile_is_no_complete_folder(run, data, monkeypatch):
    finish = module._Job.finish
    monkeypatch.setattr(module._Job, "finish", lambda job: (data.write_bytes(data.read_bytes() + b"\n"), finish(job)))
    done = run(data, "--column", "text")
    assert done.exit_code == 2 and "has changed while it was encoded; encode again with --force." in done.stderr


def test_two_runs_in_one_folder_are_refused(model, data, tmp_path, start):
    out = tmp_path / "out"
    out.mkdir()
    with exclusive_lock(out, "encoding into", kept=KEPT):

        def work():
            with pytest.raises(ValueError, match="^Another process is encoding into .*out; wait for it"):
                encode_corpus(model, data, out, column="text")

        assert start.finish(start(1, work)) == [0]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "in.csv is empty"),
        (b"text\n", [], "has no rows"),
        (b"a,b\nx,y\n", [], "found a, b; name it (--column)"),
        (b"a,b\nx,y\n", ["--column", "c"], "Column 'c' is not there in the data; the columns are a, b"),
        (b"text\nx\n", ["--id-column", "c"], "Column 'c' is not in the data; the columns are text"),
        (b"text\nna\xefve\n", [], "in.csv is not UTF-8: line 2 cannot be decoded"),
        (b"text\nx\ny,z\n", [], "in.csv cannot be read as csv"),
        (b"text\nx\n", ["--precision", "int4"], "precision='int4' is unknown; use one of float32, float16, int8, binary"),
        (b"text\nx\n", ["--on-bad-row", "warn"], "on_bad_row='warn' is unknown; use refuse or skip"),
        (b"text\nx\n", ["--rows-per-shard", "0"], "rows_per_shard must be at least 1, got 0"),
        (b"text\nx\n", ["--split", "train[:5]"], "does not name exactly one split"),
        (b"text\nx\n", ["--prompt-name", "nope"], "The model has no prompt named 'nope'"),
    ],
)
def test_wrong_input_is_one_sentence_and_status_2(run, tmp_path, content, arguments, message):
    (tmp_path / "in.csv").write_bytes(content)
    done = run(tmp_path / "in.csv", *arguments)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_folder_with_other_things_in_it_is_not_written_to(run, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "has files that are not vectors (thesis.tex)" in run(data, "--column", "text", "--force").stderr
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").touch()
    assert "File exists" in run(data, "--column", "text", out=tmp_path / "file").stderr


def test_input_and_output_are_kept_apart(run, data, tmp_path):
    """Vectors beneath the input would be read as input; input beneath the vectors would be deleted with them."""
    run(data, "--column", "text", "--keep-text")
    before = contents(tmp_path / "out")
    shard = tmp_path / "out" / "part-00000.parquet"
    for given, out in ((data, data), (tmp_path, tmp_path / "inside"), (shard, tmp_path / "out")):
        done = run(given, "--column", "text", "--force", out=out)
        assert done.exit_code == 2 and "choose another folder" in done.stderr
    assert contents(tmp_path / "out") == before and not (tmp_path / "inside").exists()


def test_force_keeps_the_vectors_until_the_new_input_is_seen_to_be_usable(run, data, tmp_path):
    run(data, "--column", "text")
    before = contents(tmp_path / "out")
    empty, nothing = tmp_path / "empty.csv", tmp_path / "null.jsonl"
    empty.write_text("text\n")
    nothing.write_text('{"text": null}\n{"text": "words"}\n')
    for bad in (empty, nothing):
        assert run(bad, "--column", "text", "--force").exit_code == 2
        assert contents(tmp_path / "out") == before


def test_force_goes_on_with_a_run_of_the_same(run, data, tmp_path):
    options = ("--column", "text", "--rows-per-shard", 4)
    run(data, *options)
    (tmp_path / "out" / "part-00002.parquet").unlink()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    assert json.loads(run(data, *options, "--force", "--json").stdout)["written"] == 4
    killed = tmp_path / "out" / ".part-00009.parquet.0123abcd.part"
    killed.write_bytes(b"half")
    assert json.loads(run(data, *options, "--force", "--json").stdout)["written"] == 12 and not killed.exists()


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_a_manifest_of_another_program_stays(run, data, tmp_path, options):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "my site"}')
    done = run(data, "--column", "text", *options)
    assert done.exit_code == 2 and "manifest.json" in done.stderr
    assert (tmp_path / "out" / "manifest.json").read_text() == '{"name": "my site"}'


def test_a_manifest_without_a_shard_means_nothing(run, tmp_path):
    file = tmp_path / "in.txt"
    file.write_text("\n".join(TEXTS[:2]) + "\n")
    assert run(file).exit_code == 0
    (tmp_path / "out" / "part-00000.parquet").unlink()
    file.write_text("\n".join(TEXTS[:3]) + "\n")
    assert run(file, "--keep-text").exit_code == 0
    assert vectors_in(tmp_path / "out").shape == (3, 16)


def test_a_lost_shard_of_an_appending_call_is_made_again_in_its_place(run, tmp_path, expected):
    """Appending calls cut the input at other rows than a single call would."""
    folder, options = tmp_path / "in", ("--rows-per-shard", 4)
    folder.mkdir()
    for count, (start, stop) in enumerate(((0, 6), (6, 9), (9, 12))):
        write(folder / f"{count}.txt", TEXTS[start:stop])
        assert run(folder, *options, "--append").exit_code == 0
    whole = VectorFolder(tmp_path / "out").shards
    assert read_manifest(tmp_path / "out").starts == [(0, 0), (2, 6), (3, 9)]
    shard = tmp_path / "out" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:200])
    done = run(folder, *options)
    assert done.exit_code == 0, done.output
    assert VectorFolder(tmp_path / "out").shards == whole
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)


def test_other_files_in_the_folder_are_left_alone(run, data, tmp_path):
    run(data, "--column", "text", "--rows-per-shard", 5)
    stray = tmp_path / "out" / "part-00000 (copy).parquet"
    stray.write_bytes(b"mine")
    (tmp_path / "out" / "part-00001.parquet").unlink()
    for extra in ([], ["--force"]):
        assert run(data, "--column", "text", "--rows-per-shard", 5, *extra).exit_code == 0
    assert stray.read_bytes() == b"mine" and len(VectorFolder(tmp_path / "out")) == 12


def test_nothing_is_appended_behind_a_gap(run, tmp_path):
    folder, options = tmp_path / "in", ("--rows-per-shard", 4)
    folder.mkdir()
    write(folder / "0.txt", TEXTS[:6])
    run(folder, *options)
    (tmp_path / "out" / "part-00000.parquet").unlink()
    write(folder / "1.txt", TEXTS[6:])
    assert "the earlier input must be encoded completely" in run(folder, *options, "--append").stderr


def test_passages_get_the_prompt_that_the_model_has_for_them(run, data, model, tmp_path):
    opened = SentenceTransformer(str(model), trust_remote_code=False, prompts={"query": "red ", "document": "blue cat "})
    opened.save(str(tmp_path / "prompted"), create_model_card=False)
    assert run(data, "--column", "text", model=tmp_path / "prompted").exit_code == 0
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), opened.encode_document(TEXTS), atol=1e-6)
    assert read_manifest(tmp_path / "out").encoding["prompt_name"] == "document"


@pytest.mark.parametrize(
    ("names", "recorded"), [({"document": "", "passage": "blue cat "}, "passage"), ({"other": "blue cat "}, None)]
)
def test_a_folder_has_the_vectors_that_encode_document_gives(model, data, tmp_path, names, recorded):
    opened = SentenceTransformer(str(model), prompts={"query": "red "} | names, default_prompt_name="query")
    opened.save(str(tmp_path / "prompted"), create_model_card=False)
    expected = opened.encode(TEXTS, prompt=names.get("passage", ""))
    for precision in ("float32", "int8"):
        encode_corpus(tmp_path / "prompted", data, tmp_path / precision, column="text", precision=precision, dtype="float32")
        np.testing.assert_allclose(vectors_in(tmp_path / precision), expected, atol=0.01 if precision == "int8" else 1e-6)
        assert read_manifest(tmp_path / precision).encoding["prompt_name"] == recorded
    searcher = Searcher(tmp_path / "prompted", TEXTS)
    (found,), (other,) = (search.search(["dog"], top_k=12) for search in (FolderSearcher(tmp_path / "float32"), searcher))
    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in other], atol=1e-3)


def test_truncated_vectors_are_searched_by_truncated_queries(run, model, data, tmp_path):
    assert run(data, "--column", "text", "--truncate-dim", 6).exit_code == 0
    opened = load(model)
    opened.truncate_dim = 6
    np.testing.assert_allclose(vectors_in(tmp_path / "out"), opened.encode(TEXTS), atol=1e-6)
    assert not read_manifest(tmp_path / "out").normalized
    expected = opened.similarity(opened.encode([TEXTS[3]]), opened.encode(TEXTS)).sort(descending=True).values[0]
    (hits,) = FolderSearcher(tmp_path / "out").search([TEXTS[3]], top_k=12)
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-3)
    refused = run(data, "--column", "text", "--truncate-dim", 17, out=tmp_path / "wide")
    assert refused.exit_code == 2 and "truncate_dim must be between 1 and 16, got 17 (--truncate-dim)" in refused.stderr


def test_explain_says_what_was_chosen(run, data):
    shown = run(data, "--column", "text", "--explain").stdout
    assert "dtype: float32, as asked" in shown and "path: packed: no padding" in shown and "processes: 1, shards 1" in shown


# What a folder of vectors says must be true


def test_a_flipped_bit_in_a_shard_is_found(run, data, tmp_path, expected):
    """The checksums of its pages are compared when a shard is read, and when a run is resumed."""
    run(data, "--rows-per-shard", 5, "--keep-text")
    shard = tmp_path / "out" / "part-00001.parquet"
    good = shard.read_bytes()
    for place in (len(good) // 3, len(good) // 2):
        damaged = bytearray(good)
        damaged[place] ^= 4
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="part-00001.parquet is damaged .*checksum|part-00001.parquet is damaged"):
            vectors_in(tmp_path / "out")
        run(data, "--rows-per-shard", 5, "--keep-text")
        np.testing.assert_allclose(vectors_in(tmp_path / "out"), expected, atol=1e-6)


CONTRADICTIONS = {
    "rows": 11,
    "dimension": 15,
    "precision": "float16",
    "rows_per_shard": 0,
    "shards": [["part-00001.parquet", 0, 12, 0, 12]],
}


@pytest.mark.parametrize("name", [*CONTRADICTIONS, "kept"])
def test_a_manifest_that_contradicts_its_shards_is_refused(run, data, tmp_path, name):
    run(data)
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text())
    if name == "kept":
        manifest["columns"]["kept"] = True
    elif name == "shards":
        manifest["shards"][0]["first_row"] = 1
    else:
        manifest[name] = CONTRADICTIONS[name]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=name):
        vectors_in(tmp_path / "out")


def test_a_resumed_run_keeps_the_dtype_that_auto_chose(data, tmp_path, model, monkeypatch):
    asked, opened = [], module.Encoder
    monkeypatch.setattr(module, "Encoder", lambda *a, **k: asked.append(k["dtype"]) or opened(*a, **k))
    monkeypatch.setattr("minibert.inference.encode.choose_dtype", lambda *_: ("bfloat16", "measured"))
    encode_corpus(model, data, tmp_path / "out", rows_per_shard=5)
    chosen = read_manifest(tmp_path / "out").encoding
    assert (chosen["dtype"], chosen["auto_dtype"]) == ("bfloat16", True)
    (tmp_path / "out" / "part-00001.parquet").unlink()
    monkeypatch.setattr("minibert.inference.encode.choose_dtype", lambda *_: ("float32", "measured"))
    encode_corpus(model, data, tmp_path / "out", rows_per_shard=5)
    assert asked == ["auto", "bfloat16"] and read_manifest(tmp_path / "out").encoding == chosen


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "manhattan"])
def test_another_similarity_needs_normalized_vectors(data, tmp_path, model, similarity):
    opened = SentenceTransformer(str(model), device="cpu", similarity_fn_name=similarity)
    SentenceTransformer(modules=list(opened)[:2], similarity_fn_name=similarity).save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"compares vectors by {similarity}, and a folder of vectors is searched by cosine"):
        encode_corpus(tmp_path / "model", data, tmp_path / "out")
    assert encode_corpus(tmp_path / "model", data, tmp_path / "out", normalize=True).written == 12
    SentenceTransformer(modules=list(load(model)), similarity_fn_name=similarity).save(str(tmp_path / "normalizing"))
    with pytest.raises(ValueError, match=f"compares vectors by {similarity}"):
        encode_corpus(tmp_path / "normalizing", data, tmp_path / "other", truncate_dim=6)
    assert encode_corpus(tmp_path / "normalizing", data, tmp_path / "other").written == 12
