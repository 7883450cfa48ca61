"""What is released: one version everywhere, the declared Pythons, a complete source archive, extras that explain themselves."""

import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from helpers import ROOT, SETUP, run_python
from minibert.hub import releases

EXTRAS = SETUP["options.extras_require"]
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
# What is imported by another name than it is installed by.
MODULES = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "PyYAML": "yaml", "PyStemmer": "Stemmer"}
# Typer and huggingface_hub bring these, so they are never missing.
ALWAYS = {"pydantic", "yaml"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def modules_of(extra: str) -> set[str]:
    """The modules that an extra brings, by the names they are imported by."""
    names = [re.match(r"[\w-]+", line)[0] for line in EXTRAS[extra].split("\n") if line]
    return {MODULES.get(name, name.replace("-", "_")) for name in names} - ALWAYS


# One version


def test_the_version_is_the_same_everywhere():
    import minibert

    version = SETUP["metadata"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert minibert.__version__ == version
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == version


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
    assert "py.typed" in held and {"hub/card.md", "hub/releases.json"} <= held and "recipes/quickstart.yaml" in held


# Extras

# Commands, each with the extra that a message must name. Inputs need not exist where opening them needs the extra too.
COMMANDS = {
    "train quickstart": "train",
    "quickstart": "train,search",
    "search model --passages notes.txt red": "search",
    "search vectors red": "search",
    "encode model notes.txt vectors": "search",
    "evaluate model notes.txt": "search",
    "predict model notes.txt": "search",
    "hub push model ann/model --dry-run": "search",
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
sys.argv = ["minibert"]
from typer.testing import CliRunner
from minibert.cli import app

told = {}
for line in json.load(sys.stdin):
    done = CliRunner().invoke(app, line.split())
    told[line] = [done.exit_code, done.stderr, repr(done.exception)]
print(json.dumps(told))
"""


def without(missing: set[str], lines: list[str], cwd: Path) -> dict[str, list]:
    """Exit status, standard error and exception of every command line where ``missing`` modules are not installed."""
    printed = run_python(WITHOUT, ",".join(sorted(missing)), input=json.dumps(lines), cwd=cwd)
    return json.loads(printed.splitlines()[-1])


@pytest.fixture
def room(tmp_path):
    shutil.copytree(ROOT / "tests" / "data" / "first-release" / "embed", tmp_path / "model")
    (tmp_path / "notes.txt").write_text("red apples\n", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_missing_extra_is_named_in_one_sentence(room):
    missing = set.union(*(modules_of(extra) for extra in ("train", "search", "plot", "export")))
    for line, (status, said, exception) in without(missing, list(COMMANDS), room).items():
        assert status == 2, f"{line}: {exception}"
        *_, last = said.strip().splitlines()
        assert re.fullmatch(rf"Error: .* needs .*; install (it|them): pip install 'minibert\[{COMMANDS[line]}\]'\.", last), line


@pytest.mark.slow
def test_an_extra_is_enough_for_its_commands(room):
    """Search without the modules that only other extras bring; what pip installs beside them is left in place."""
    missing = set.union(*(modules_of(extra) for extra in ("train", "plot", "export"))) - modules_of("search")
    lines = ["encode model notes.txt vectors", "search vectors red"]
    for line, (status, said, exception) in without(missing, lines, room).items():
        assert status == 0, f"{line}: {said} {exception}"


# The record of the code of every release


def test_earlier_releases_are_on_record_and_none_was_changed():
    known = releases.known()
    version, *earlier = re.findall(r"^## (\d\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert set(earlier) <= known.keys() <= {version, *earlier}
    for release, entry in known.items():
        assert entry.keys() == {"released", "configuration_minibert.py", "modeling_minibert.py"}, release
    for name in ("configuration_minibert.py", "modeling_minibert.py"):
        if version in known:  # else it is in development
            digest = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
            assert known[version][name] == digest, f"{name} is no longer that of {version}: set the next version"


@pytest.fixture
def recorder():
    file = ROOT / ".ci" / "record_release.py"
    if not file.exists():
        pytest.skip("the source archive is no place to release from")
    return runpy.run_path(str(file))


@pytest.fixture
def tree(tmp_path):
    """What the record of a release is made of."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "releases.json").write_text("{}", encoding="utf-8")
    (tmp_path / "setup.cfg").write_text("[metadata]\nversion = 0.9.0\n", encoding="utf-8")
    for name in ("configuration_minibert.py", "modeling_minibert.py"):
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    return tmp_path


def test_a_release_off_the_record_is_refused(recorder, tree):
    with pytest.raises(ValueError, match="The record of minibert 0.9.0 lacks configuration_minibert.py and modeling_minibert"):
        recorder["check"](tree)
    recorder["record"](tree, "2026-01-02")
    assert recorder["check"](tree) == "0.9.0"
    (tree / "setup.cfg").write_text("[metadata]\nversion = 0.10.0\n", encoding="utf-8")
    recorder["record"](tree, "2026-02-03")
    assert list(json.loads((tree / "hub" / "releases.json").read_text())) == ["0.9.0", "0.10.0"]


def test_released_code_does_not_change(recorder, tree):
    recorder["record"](tree, "2026-01-02")
    recorder["record"](tree, "2026-05-06")  # the same again changes nothing
    before = (tree / "hub" / "releases.json").read_text()
    assert "2026-01-02" in before and "2026-05-06" not in before
    (tree / "modeling_minibert.py").write_text("# other\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks modeling_minibert.py as it stands"):
        recorder["check"](tree)
    with pytest.raises(ValueError, match="0.9.0 was released on 2026-01-02 with other code; give .* the next version first"):
        recorder["record"](tree, "2026-05-06")
    assert (tree / "hub" / "releases.json").read_text() == before
