"""Test the corpus of installed documentation: what it reads, what it leaves out, and that its splits share nothing."""

import sys

import pytest

from helpers import run_command, run_python
from minibert.data import docstrings
from minibert.data.docstrings import collect, find_roots, is_held_out, load_pairs, load_passages, read_documents

SOURCE = '''"""Tools for walking over {topic} trees.

The functions of this module visit every node of a {topic} tree once and never change the tree they are given.
"""
raise RuntimeError("documentation is read, not imported")


class {name}Walker:
    """Visit the nodes of a {topic} tree in order.

    A walker for {topic} remembers where it stopped, so that a visit of the {name} tree can be interrupted and continued later.

    >>> {name}Walker().walk()
    'doctest output'
    """

    def walk(self):
        """Short."""

    def _reset(self):
        """Set this object back to its first state.

        Every class of this package repeats the same sentence about setting itself back, word for word, as copies do.
        """
'''


def write_package(folder, count=60):
    package = folder / "orchard"
    (package / "tests").mkdir(parents=True)
    for number in range(count):
        name = "".join(chr(ord("a") + int(digit)) for digit in f"{number:03d}")
        (package / f"{name}.py").write_text(SOURCE.format(topic=f"{name} {name[::-1]}x", name=name.title()))
    (package / "__init__.py").write_text('"""Orchard."""')
    (package / "broken.py").write_text(
        '"""Not Python.\n\nThis file is a template that no parser understands at all."""\nclass {{'
    )
    (package / "latin.py").write_bytes(b'"""Bytes.\n\nThis file is written in another encoding: \xe9\xe8 than it says."""')
    (package / "tests" / "test_a.py").write_text(SOURCE.format(topic="test", name="Test"))
    return (("orchard", package),)


@pytest.fixture
def orchard(tmp_path, monkeypatch):
    roots = write_package(tmp_path)
    monkeypatch.setattr(docstrings, "find_roots", lambda: roots)
    return roots


def test_reads_names_summaries_and_descriptions_without_doctests(orchard):
    documents = {document.name: document for document in collect(orchard)}
    walker = documents["orchard.aab.AabWalker"]
    assert walker.title == "Visit the nodes of a aab baax tree in order."
    assert walker.body.startswith("A walker for aab baax remembers") and "doctest" not in walker.body
    assert not any("walk" in name.split(".")[-1] for name in documents), "a docstring without a body makes no pair"
    assert not any("test" in document.module for document in documents.values())


def test_splits_share_no_module_and_no_text(orchard):
    train, validation = load_pairs("train"), load_pairs("validation")
    assert train.column_names == validation.column_names == ["query", "answer"]
    assert len(train) > len(validation) > 0
    module_of = {document.name: document.module for document in collect(orchard)}
    modules = [{module_of[text.partition(":")[0]] for text in rows["answer"]} for rows in (train, validation)]
    assert not modules[0] & modules[1]
    for column in ("query", "answer"):
        texts = [*train[column], *validation[column]]
        assert len(set(texts)) == len(texts)
    passages = load_passages()
    assert len(passages) == len(train) + len(validation)
    assert sorted(passages["name"]) == sorted(text.partition(":")[0] for text in passages["text"])


def test_repeated_titles_and_bodies_are_left_out(orchard):
    names = [document.name for document in collect(orchard)]
    assert not any(name.endswith("_reset") for name in names), "a title of 60 things names none of them"
    assert len(set(names)) == len(names)


def test_a_mostly_copied_body_is_left_out():
    story = "the quick brown fox jumps over the lazy dog while a small cat looks on from the old garden wall"
    words = story.split()
    first = docstrings.Document("a", "a.f", "Tell a story of a fox.", " ".join(words))
    copy = docstrings.Document("b", "b.f", "Another title for it.", " ".join(["again", *words[:-1], "fence"]))
    other = docstrings.Document("c", "c.f", "Something else.", " ".join(reversed(words)))
    assert list(docstrings.without_repetition([first, copy, other])) == [first, other]


@pytest.mark.slow
def test_the_order_is_the_same_in_every_process(orchard):
    ((package, root),) = orchard
    code = f"""
from pathlib import Path
from minibert.cli import app
from minibert.data import docstrings
docstrings.find_roots = lambda: (({package!r}, Path({str(root)!r})),)
print([document.title for document in docstrings._split("train")])
"""
    assert run_python(code, env={"PYTHONHASHSEED": "1"}) == f"{list(load_pairs('train')['query'])}\n"


def test_objects_documented_by_a_call_are_found(tmp_path):
    (tmp_path / "docs.py").write_text(
        'add_newdoc("np.core", "zeros", """\n    zeros(shape, dtype=float)\n\n    Return an array filled with zeros.\n\n'
        '    The array has the given shape and every one of its elements is zero.\n""")\n'
        'add_docstr(torch.abs, r"""abs(input) -> Tensor\n\nComputes the absolute value.\n\n'
        'Each element of the input loses its sign, in place of {what}.""".format(**args))\n'
        'add_newdoc("np.core", "ndarray", ("item", """Copy one element to a Python scalar.\n\n'
        'The argument says which element that is, counted over all axes."""))\n'
    )
    zeros, absolute, item = read_documents(tmp_path / "docs.py", "docs")
    assert (zeros.name, zeros.title) == ("np.core.zeros", "Return an array filled with zeros.")
    assert (absolute.name, absolute.title) == ("torch.abs", "Computes the absolute value.")
    assert item.name == "np.core.ndarray.item"
    assert absolute.body == "Each element of the input loses its sign, in place of ."


def test_packages_are_found_and_read_without_being_imported(tmp_path, monkeypatch):
    write_package(tmp_path, count=1)
    (tmp_path / "orchard" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    roots = find_roots(["orchard", "surely_not_installed"])
    assert [name for name, _ in roots] == ["", "orchard"]
    assert {document.module for document in collect(roots[1:])} == {"orchard.aaa"}
    assert "orchard" not in sys.modules


def test_private_objects_are_no_passages(monkeypatch):
    names = ["numpy._core.sum", "numpy._core._Wrapper.sum"]  # compiled packages have private modules
    documents = {"train": [docstrings.Document("numpy._core", name, "A sum.", "Adds.") for name in names]}
    monkeypatch.setattr(docstrings, "_split", lambda split: documents.get(split, []))
    assert load_passages()["name"][:] == names[:1]


def test_about_one_module_in_twelve_is_held_out():
    share = sum(is_held_out(f"package.module_{number}") for number in range(5000)) / 5000
    assert abs(share - docstrings.HELD_OUT_PERCENT / 100) < 0.02  # five standard deviations


def test_refusals_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no split 'test'; use train or validation"):
        load_pairs("test")
    monkeypatch.setattr(docstrings, "find_roots", lambda: (("nothing", tmp_path),))
    with pytest.raises(ValueError, match="have no docstrings.*name a data set in the recipe"):
        load_pairs("train")


@pytest.mark.slow
def test_quickstart_trains_measures_reloads_and_answers(orchard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["hidden_size=8", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=8"]
    run = ["quickstart", "tokenizer.vocab_size=200", "embed.max_steps=1", *(f"embed.model.{field}" for field in small)]
    first = run_command(*run, "--query", "walking over aab trees")
    assert first.exit_code == 0, first.output
    for expected in ("bm25", "untrained", "vectors differ by at most", "walking over aab trees\n   1  "):
        assert expected in first.output
    assert (tmp_path / "runs" / "quickstart" / "2-embed" / "model.safetensors").exists()
    changed = run_command(*run, "embed.learning_rate=1")
    assert changed.exit_code == 2 and "learning_rate" in changed.output
    blank = run_command("quickstart", "--query", " ")
    assert blank.exit_code == 2 and "Query 1 is empty" in blank.output
