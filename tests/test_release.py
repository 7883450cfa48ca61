"""Check a release: one version everywhere, the declared Pythons, a complete source archive, extras that explain themselves."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from helpers import ROOT, SETUP, run_python
from minibert.files import installation

EXTRAS = SETUP["options.extras_require"]
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
# What is imported by another name than it is installed by.
MODULES = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "PyYAML": "yaml", "PyStemmer": "Stemmer"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def modules_of(extra: str) -> set[str]:
    """The modules that an extra brings, by the names they are imported by."""
    names = [re.match(r"[\w-]+", line)[0] for line in EXTRAS[extra].split("\n") if line]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


# One version


def test_the_version_is_the_same_everywhere():
    import minibert

    version = SETUP["metadata"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", version)
    assert minibert.__version__ == version
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == ("Unreleased" if "dev" in version else version)


def test_the_declared_pythons_are_tested():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]["run"]
    assert workflow["strategy"]["matrix"]["python"] == PYTHONS
    assert [step["run"] for step in workflow["steps"] if "run" in step] == [".ci/run"]
    assert SETUP["options"]["python_requires"] == f">={PYTHONS[0]}"


# The source archive


def test_the_source_archive_is_complete(tmp_path):
    copy = tmp_path / "minibert"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__"))
    (copy / "tests" / "__pycache__").mkdir()
    (copy / "tests" / "__pycache__" / "litter.pyc").write_text("litter", encoding="utf-8")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    subprocess.run(command, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        held = {name.partition("/")[2] for name in source.getnames()}
    here = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    built = {"PKG-INFO", "setup.cfg"} | {name for name in held if ".egg-info" in name}
    assert here - held == set()
    assert {name for name in held if (copy / name).is_file()} <= here | built
    assert "py.typed" in held and "hub/card.md" in held and "recipes/quickstart.yaml" in held


# Extras

# Commands without any extra, in turns, each with the extra that its message must name, or None where it works.
COMMANDS = {
    "train quickstart": "train",
    "quickstart": "train",
    "encode model notes.txt vectors --keep-text": None,
    "search model --passages notes.txt red": None,
    "search vectors red": None,
    "search vectors red --hybrid": "search",
    "evaluate model questions.csv": "search",
    "hub export model out --to onnx": "export",
    "plot tokens model red": "plot",
    "plot attention model red --out attention.html": "plot",
    "plot embeddings model red green --out embeddings.html": "plot",
    "plot similarity model red green --out similarity.html": "plot",
    "plot training runs/mine --out training.html": "plot",
}
# An interpreter in which some modules are not installed; it runs commands one after another.
WITHOUT = """
import importlib.machinery, json, sys
finder, missing = importlib.machinery.PathFinder, set(sys.argv[1].split(","))


class Without(finder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in missing else finder.find_spec(name, path, target)


sys.meta_path = [Without if one is finder else one for one in sys.meta_path]
exact_rows, sys.argv = int(sys.argv[2]), ["minibert"]
from typer.testing import CliRunner
from minibert.cli import app
from minibert.search import index
index.EXACT_ROWS = exact_rows

told = {}
for line in json.load(sys.stdin):
    done = CliRunner().invoke(app, line.split())
    told[line] = [done.exit_code, done.stderr, repr(done.exception)]
print(json.dumps(told))
"""


def without(missing: set[str], lines: list[str], cwd: Path, *, exact_rows: int = 50_000) -> dict[str, list]:
    """Exit status, standard error and exception of every command line where ``missing`` modules are not installed."""
    printed = run_python(WITHOUT, ",".join(sorted(missing)), str(exact_rows), input=json.dumps(lines), cwd=cwd)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture
def room(tmp_path):
    shutil.copytree(ROOT / "tests" / "data" / "first-release" / "embed", tmp_path / "model")
    (tmp_path / "notes.txt").write_text("red apples\n", encoding="utf-8")
    (tmp_path / "questions.csv").write_text("query,answer\nwhat is red,red apples\n", encoding="utf-8")
    return tmp_path


def test_every_module_of_an_extra_is_known_with_one_that_brings_it():
    assert installation.EXTRAS.keys() == set.union(*(modules_of(extra) for extra in ("train", "search", "plot", "export")))
    assert all(module in modules_of(extra) for module, extra in installation.EXTRAS.items())


@pytest.mark.slow
def test_the_package_alone_encodes_and_searches_and_names_the_extra_for_all_else(room):
    for line, (status, said, exception) in without(set(installation.EXTRAS), list(COMMANDS), room).items():
        assert status == (2 if COMMANDS[line] else 0), f"{line}: {said} {exception}"
        if extra := COMMANDS[line]:
            *_, last = said.strip().splitlines()
            assert re.fullmatch(rf"Error: .* needs .*, which the extra {extra} brings: pip install .*\[{extra}\]'.*\.", last), (
                line
            )


@pytest.mark.slow
def test_more_vectors_than_are_compared_one_by_one_need_the_extra_unless_exact_search_is_asked_for(room):
    lines = ["encode model notes.txt vectors", "search vectors red", "search vectors red --exact"]
    encoded, needs, exact = without(set(installation.EXTRAS), lines, room, exact_rows=0).values()
    assert (encoded[0], needs[0], exact[0]) == (0, 2, 0), (encoded, needs, exact)
    assert "Error: This command needs faiss, which the extra search brings: pip install " in needs[1]
