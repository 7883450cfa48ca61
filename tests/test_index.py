"""The index of a folder of vectors: it finds the true neighbours, builds only what is missing and names damage."""

import errno
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from helpers import edit_json, write_vectors
from minibert.search import index as module
from minibert.search.index import NEIGHBOURS, index_folder, open_index
from minibert.search.vectors import (
    Shard,
    ShardWriter,
    VectorFolder,
    quantize,
    shard_name,
    to_float,
    write_manifest,
)

ROWS, WIDTH = 1200, 15  # an odd width: codes take the dimensions by pairs


def clustered(rows, seed, width=WIDTH):
    """Vectors of length 1 around 20 centres."""
    centres = np.random.default_rng(0).standard_normal((20, width), dtype=np.float32)
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(20, size=rows)] + 0.6 * rng.standard_normal((rows, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def best(queries, vectors, top_k):
    """Cosines and rows of the nearest by a full matrix."""
    cosines = queries @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    rows = np.argsort(-cosines, axis=1)[:, :top_k]
    return np.take_along_axis(cosines, rows, 1), rows


@pytest.fixture
def small(monkeypatch):
    """Lists are made from 1,000 vectors on."""
    monkeypatch.setattr(module, "EXACT_ROWS", 999)
    monkeypatch.setattr(module, "_SAMPLE", 200)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A folder with lists, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXACT_ROWS", 999)
        patch.setattr(module, "_SAMPLE", 200)
        folder = write_vectors(tmp_path_factory.mktemp("built") / "vectors", clustered(ROWS, 1))
        open_index(folder)
    return folder.folder


@pytest.fixture
def folder(built, tmp_path):
    return VectorFolder(shutil.copytree(built, tmp_path / "vectors"))


@pytest.fixture
def added(monkeypatch):
    """Names of the shards that are read to be indexed."""
    names, real = [], VectorFolder.read
    monkeypatch.setattr(VectorFolder, "read", lambda self, shard: names.append(shard.file) or real(self, shard))
    return names


def state(folder):
    return json.loads((index_folder(folder) / "index.json").read_text())


# --- answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
@pytest.mark.parametrize("lists", [False, True])
def test_the_nearest_are_those_of_the_full_matrix(tmp_path, small, precision, lists, monkeypatch):
    if not lists:
        monkeypatch.setattr(module, "EXACT_ROWS", ROWS)
    vectors, queries = clustered(ROWS, 1), clustered(50, 2)
    folder = write_vectors(tmp_path / "vectors", vectors, precision=precision)
    stored = to_float(quantize(vectors, folder.manifest), folder.manifest)
    index = open_index(folder)
    assert (index.state.lists is not None) == lists
    scores, rows = index.search(3 * queries, 10)  # the length of a query says nothing
    expected, _ = best(queries, stored, 10)
    if precision in ("float32", "float16") and not lists:
        np.testing.assert_allclose(scores, expected, atol=1e-3)
    # Scores are products with the vectors as they are stored, whatever the codes of the lists say.
    np.testing.assert_allclose(scores, np.einsum("nd,nkd->nk", queries, stored[rows]), atol=1e-5)
    assert np.mean(scores >= np.sort(queries @ stored.T)[:, -10:-9] - 1e-5) >= (0.97 if lists else 1)
    assert (np.diff(scores) <= 0).all()


def test_lists_on_request_are_passed_by(folder):
    queries = clustered(20, 3)
    scores, _ = open_index(folder, exact=True).search(queries, 10)
    np.testing.assert_allclose(scores, best(queries, clustered(ROWS, 1), 10)[0], atol=1e-6)


def test_exact_search_needs_no_faiss_and_keeps_the_lists_for_later(tmp_path, small, monkeypatch):
    vectors, queries = clustered(1500, 1), clustered(20, 3)
    first = open_index(write_vectors(tmp_path / "vectors", vectors[:1000])).state
    grown = write_vectors(tmp_path / "vectors", vectors)
    monkeypatch.setitem(sys.modules, "faiss", None)
    scores, _ = open_index(grown, exact=True).search(queries, 10)
    np.testing.assert_allclose(scores, best(queries, vectors, 10)[0], atol=1e-6)
    with pytest.raises(ModuleNotFoundError, match="faiss"):
        open_index(grown)
    monkeypatch.setitem(sys.modules, "faiss", faiss)
    assert open_index(grown).state.lists.trained_rows == first.lists.trained_rows == 1000


def test_lists_are_made_when_a_search_first_asks_for_them(tmp_path, small):
    folder = write_vectors(tmp_path / "vectors", clustered(1500, 1))
    assert open_index(folder, exact=True).state.lists is None
    assert open_index(folder).state.lists.trained_rows == 1500


def test_vectors_of_any_length_are_compared_by_cosine(tmp_path):
    vectors = clustered(100, 1) * np.linspace(0.1, 9, 100, dtype=np.float32)[:, None]
    vectors[7] = 0  # has no direction, and breaks nothing
    folder = write_vectors(tmp_path / "vectors", vectors, normalized=False)
    scores, rows = open_index(folder).search(clustered(5, 2), 3)
    vectors[7] = 1e-9
    np.testing.assert_allclose(scores, best(clustered(5, 2), vectors, 3)[0], atol=1e-5)
    assert 7 not in rows


def test_more_neighbours_than_vectors_are_all_of_them(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(4, 1), rows_per_shard=3)
    scores, rows = open_index(folder).search(clustered(2, 2), 99)
    assert scores.shape == (2, 4) and sorted(rows[0]) == [0, 1, 2, 3]


def test_recall_is_the_share_of_true_neighbours_found(folder, small):
    index, vectors = open_index(folder), clustered(ROWS, 1)
    sample = module.Sample(index)
    for probes in (1, 2):
        settings, hits = module.replace(index.state.lists, probes=probes), 0
        for row in sample.rows:
            true = best(vectors[row : row + 1], vectors, NEIGHBOURS + 1)[1][0]
            _, found = index._by_lists(vectors[row : row + 1], NEIGHBOURS + 1, settings)
            hits += len((set(true) - {row}) & (set(found[0]) - {row}))
        expected = hits / NEIGHBOURS / len(sample.rows)
        assert sample.recall(settings) == pytest.approx(expected, abs=1e-3)
    assert 0.3 < expected < 1  # few probes miss some, or this test could not fail


def test_settings_reach_the_recall_aimed_at(folder):
    lists = open_index(folder).state.lists
    assert lists.recall >= 0.99
    assert 1 <= lists.probes <= lists.lists == 128  # the power of 2 next to 4 * sqrt(ROWS)
    assert state(folder)["lists"]["recall"] == lists.recall


def test_equal_vectors_do_not_lower_recall(tmp_path, small):
    vectors = np.repeat(clustered(60, 1), 20, axis=0)
    assert open_index(write_vectors(tmp_path / "vectors", vectors)).state.lists.recall == 1


def test_a_shard_without_rows_is_passed_by(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(6, 1), rows_per_shard=3)
    with ShardWriter(folder.folder / shard_name(2), folder.manifest, pa.int64()):
        pass
    folder.manifest.shards.insert(1, Shard(shard_name(2), 3, 0, 3, 3))  # all its rows were left out
    rows = open_index(folder).search(clustered(6, 1), 1)[1]
    assert rows[:, 0].tolist() == list(range(6))


def test_vectors_are_mapped_not_read(folder):
    stored = open_index(folder)._stored
    assert not stored.flags.owndata and not stored.flags.writeable


# --- building as little as possible ---------------------------------------------------------------------------------------


def test_a_current_index_is_opened_as_it_is(folder, added):
    before = {file: file.stat().st_mtime_ns for file in index_folder(folder).iterdir()}
    open_index(folder)
    assert not added
    assert {file: file.stat().st_mtime_ns for file in index_folder(folder).iterdir()} == before


def test_a_copied_folder_keeps_its_index(folder, added):
    os.utime(folder.folder / folder.shards[0].file)  # as copying does: new times, the same content
    assert len(open_index(folder)) == ROWS and not added


@pytest.mark.parametrize("exact", [True, False])
def test_new_shards_are_added_alone(tmp_path, small, added, exact, monkeypatch):
    if exact:
        monkeypatch.setattr(module, "EXACT_ROWS", 10**6)
    vectors = clustered(1500, 1)
    folder = write_vectors(tmp_path / "vectors", vectors[:1000])
    open_index(folder)
    assert added == ["part-00000.parquet", "part-00001.parquet"]
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("the lists were trained again"))
    folder = write_vectors(tmp_path / "vectors", vectors)
    index = open_index(folder)
    assert added[2:] == ["part-00002.parquet"]
    queries = vectors[1000:1100]
    scores, rows = index.search(queries, 10)
    assert (rows[:, 0] == np.arange(1000, 1100)).all()
    assert np.mean(scores >= best(queries, vectors, 10)[0][:, -1:] - 1e-5) > 0.97


def test_a_folder_that_outgrows_exact_search_gets_lists(tmp_path, small, added):
    vectors = clustered(1500, 1)
    assert open_index(write_vectors(tmp_path / "vectors", vectors[:500])).state.lists is None
    assert open_index(write_vectors(tmp_path / "vectors", vectors)).state.lists.trained_rows == 1500
    assert len(added) == 3


def test_a_folder_that_outgrows_its_lists_gets_others(tmp_path, small, monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 1.2)
    vectors = clustered(1500, 1)
    assert open_index(write_vectors(tmp_path / "vectors", vectors[:1000])).state.lists.trained_rows == 1000
    assert open_index(write_vectors(tmp_path / "vectors", vectors)).state.lists.trained_rows == 1500


def _cut(name):
    def cut(folder):
        (file,) = index_folder(folder).glob(name)
        file.write_bytes(file.read_bytes()[:-50])

    return cut


def _remove(name):
    return lambda folder: next(index_folder(folder).glob(name)).unlink()


def _half_built(folder):
    """As a process killed while it wrote the lists leaves it."""
    (index_folder(folder) / "index.json").unlink()
    (index_folder(folder) / ".lists.faiss.0123abcd.part").write_bytes(b"half")


def _change_byte(name):
    def change(folder):
        (file,) = index_folder(folder).glob(name)
        content = bytearray(file.read_bytes())
        content[len(content) * 3 // 4] ^= 1
        file.write_bytes(content)

    return change


def _wrong_type(folder):
    edit_json(index_folder(folder) / "index.json", shards="x")


def _other_vectors(folder):
    """Encoded again with other weights: files of the same size."""
    for file in folder.folder.glob("part-*.parquet"):
        file.unlink()
    write_vectors(folder.folder, -clustered(ROWS, 1))


def _fewer_shards(folder):
    write_vectors(folder.folder, clustered(ROWS, 1)[:1000])


def _later_format(folder):
    edit_json(index_folder(folder) / "index.json", format=9)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_half_built, "was not finished, or is damaged"),
        (_cut("index.json"), "was not finished, or is damaged"),
        (_later_format, "was not finished, or is damaged"),
        (_wrong_type, "was not finished, or is damaged"),
        (_cut("vectors.bin"), "was not finished, or is damaged"),
        (_change_byte("lists.faiss"), "was not finished, or is damaged"),
        (_remove("lists.faiss"), "was not finished, or is damaged"),
        (_other_vectors, "have changed since they were indexed"),
        (_fewer_shards, "have changed since they were indexed"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_built_again(folder, small, added, caplog, damage, message):
    damage(folder)
    folder = VectorFolder(folder.folder)
    caplog.set_level(logging.WARNING, "minibert")
    index = open_index(folder)
    assert message in caplog.text and "The index is built again" in caplog.text
    assert len(added) == len(folder.shards)
    vectors = to_float(np.concatenate([folder.read(shard) for shard in folder.shards]), folder.manifest)
    assert (index.search(vectors[:100], 1)[1][:, 0] == np.arange(100)).all()
    assert not list(index_folder(folder).glob(".*.part"))


def test_a_process_that_searches_keeps_its_vectors_during_a_rebuild(folder, small):
    index, before = open_index(folder), clustered(ROWS, 1)
    _other_vectors(folder)
    open_index(VectorFolder(folder.folder))
    np.testing.assert_array_equal(index.vectors(np.arange(ROWS)), before)


def test_rebuilding_on_request(folder, small, added):
    open_index(folder, rebuild=True)
    assert len(added) == 3


def test_a_build_that_fails_leaves_the_earlier_index(folder, small, monkeypatch):
    vectors = np.concatenate([clustered(ROWS, 1), clustered(300, 2)])
    for file in folder.folder.glob("part-00002*"):  # the last shard was not full
        file.unlink()
    write_vectors(folder.folder, vectors[:1000])
    earlier = open_index(VectorFolder(folder.folder))
    grown = write_vectors(folder.folder, vectors)
    monkeypatch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(OSError, match=r"lists.faiss could not be written \(disk full\); the vectors are complete"):
        open_index(grown)
    assert len(open_index(VectorFolder(folder.folder), exact=True)) == len(grown)
    assert state(folder)["lists"]["rows"] == len(earlier) == 1000


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_a_folder_without_vectors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no vectors; encode an input"):
        open_index(write_vectors(tmp_path / "vectors", clustered(0, 1)))


def test_a_shard_that_is_missing_is_named(tmp_path):
    write_vectors(tmp_path / "vectors", clustered(ROWS, 1))
    (tmp_path / "vectors" / "part-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="lacks part-00001.parquet"):
        VectorFolder(tmp_path / "vectors")


def test_a_shard_that_is_damaged_is_named(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(ROWS, 1))
    shard = tmp_path / "vectors" / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="part-00001.parquet is damaged"):
        open_index(folder)


def _zero_start(content):
    return content[:4] + bytes(396) + content[400:]


def _zero_footer(content):
    return content[:-300] + bytes(200) + content[-100:-8] + content[-8:]


@pytest.mark.parametrize("damage", [_zero_start, _zero_footer])
def test_a_shard_whose_pages_are_damaged_is_named(tmp_path, damage):
    folder = write_vectors(tmp_path / "vectors", clustered(ROWS, 1))
    shard = tmp_path / "vectors" / "part-00001.parquet"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match="part-00001.parquet is damaged .* delete it and encode again"):
        folder.ids([600])


def test_a_shard_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = write_vectors(tmp_path / "vectors", clustered(10, 1))
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        folder.ids([1])


@pytest.mark.parametrize("name", ["index.json", "vectors.bin"])
def test_a_full_disk_names_what_it_did_not_take(tmp_path, monkeypatch, name):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write_vectors(tmp_path / "vectors", clustered(10, 1))
    monkeypatch.setattr(*((Path, "write_text") if name == "index.json" else (module, "sync")), full)
    with pytest.raises(OSError, match=rf"{name} could not be written \(No space left on device\); the vectors are complete"):
        open_index(folder)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoding": None}, "encoding: Input should be"),
        ({"rows": "abc"}, "rows: Input should be"),
        ({"shards": [{"file": 7}]}, "shards: 0: file: Input should be"),
        (b"\xff\xfe", "Invalid JSON"),
        ({"format": 9}, "format: Input should be 1"),
    ],
)
def test_a_manifest_that_is_damaged_is_named(tmp_path, wrong, message):
    write_vectors(tmp_path / "vectors", clustered(10, 1))
    file = tmp_path / "vectors" / "manifest.json"
    changed = wrong if isinstance(wrong, bytes) else json.dumps({**json.loads(file.read_text()), **wrong}).encode()
    file.write_bytes(changed)
    with pytest.raises(
        ValueError, match=f"manifest.json is damaged or of a later version .*{message}.*encode into a new folder"
    ):
        VectorFolder(tmp_path / "vectors")


@pytest.mark.parametrize("width", [WIDTH - 1, 2 * WIDTH])
def test_vectors_of_another_width_are_refused(tmp_path, width):
    folder = write_vectors(tmp_path / "vectors", clustered(10, 1, width))
    folder.manifest.dimension = WIDTH
    with pytest.raises(
        ValueError,
        match=f"part-00000.parquet .* numbers per vector .dimension.: {width}, not {WIDTH}",
    ):
        open_index(folder)


def test_vectors_that_are_no_numbers_are_refused(tmp_path):
    vectors = clustered(10, 1)
    vectors[6, 3] = np.nan
    with pytest.raises(ValueError, match="not finite .row 6."):
        open_index(write_vectors(tmp_path / "vectors", vectors))


def test_an_index_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = write_vectors(tmp_path / "vectors", clustered(10, 1))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"index could not be written \(Permission denied\); the vectors are complete"):
        open_index(folder)
    monkeypatch.undo()
    open_index(folder)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(open_index(folder)) == 10  # an index that is current needs no writing


def test_int8_without_ranges_is_refused(tmp_path):
    folder = write_vectors(tmp_path / "vectors", clustered(10, 1), precision="int8")
    folder.manifest.ranges = None
    write_manifest(folder.folder, folder.manifest)
    with pytest.raises(ValueError, match="it has ranges that are not two lists of dimension"):
        VectorFolder(folder.folder)
