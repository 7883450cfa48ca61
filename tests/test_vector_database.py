"""The documented examples of search and of a vector database, run as they are written."""

import importlib
import re

import numpy as np
import pytest

from helpers import ROOT, save_model, write_vectors
from minibert import train_word_level
from minibert.inference import cpu
from minibert.inference.load import fingerprint, load
from minibert.search.search import FolderSearcher

PAGE = ROOT / "docs" / "encoding-and-search.md"
NOTES = ["how a list is sorted", "how do i read a table", "the cat sleeps", "sort the table", "paris is a city"]


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The folder that the page's examples name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cpu, "bfloat16_is_faster", lambda: False)  # on a processor with AMX, scores would be of bfloat16
    tokenizer = train_word_level(NOTES, vocab_size=20)
    model = save_model(tmp_path / "model", tokenizer, num_hidden_layers=0, initializer_range=1.0)
    ids = [f"note-{row}" for row in range(len(NOTES))]
    fields = {"model": "model", "fingerprint": fingerprint(model), "ids": ids, "rows_per_shard": 3}
    return write_vectors(tmp_path / "notes-vectors", load(model).encode_document(NOTES), NOTES, **fields).folder


def examples(word):
    return [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if word in block]


@pytest.mark.slow
def test_the_example_loads_a_database_that_answers_as_minibert_does(notes, capsys):
    qdrant = pytest.importorskip("qdrant_client")
    (example,) = examples("qdrant_client")
    printed = []
    for _ in range(2):  # a second run changes nothing
        names = {}
        exec(example, names)
        names["client"].close()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    hits = FolderSearcher(notes).search(["how do I sort a list"], 3)[0]
    lines = [line.split(maxsplit=2) for line in printed[0].splitlines()]
    assert [(id, text) for _, id, text in lines] == [(hit.id, hit.passage) for hit in hits]
    np.testing.assert_allclose([float(score) for score, *_ in lines], [hit.score for hit in hits], atol=1e-4)
    client = qdrant.QdrantClient(path="notes-qdrant")
    assert client.count("notes").count == len(NOTES)
    client.close()


def test_the_example_of_search_from_python_runs(notes, capsys):
    (example,) = examples("FolderSearcher")
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_page_gives_the_constants_of_the_code():
    page, index = PAGE.read_text(encoding="utf-8"), importlib.import_module("minibert.search.index")
    assert f"up to {index.EXACT_ROWS:,} " in page and f"{index._SAMPLE:,} of the stored vectors" in page
    assert index._GROWTH == 4 and "fourfold growth" in page
