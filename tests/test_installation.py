"""The distribution is minibert-hf: messages say how to add to it, and a foreign minibert in the same environment is named."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import minibert
from minibert.cli import app
from minibert.files import installation
from minibert.files.installation import ROOT


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder on the path of modules, and a function that installs a distribution there, as far as its metadata go."""
    (tmp_path / "minibert").symlink_to(ROOT)
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version, recorded="minibert/__init__.py", folder=tmp_path):
        about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (about / "RECORD").write_text(f"{recorded},,\n", encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        return folder

    return install


def test_the_version_is_that_of_the_distribution(installed, monkeypatch):
    assert minibert.__version__ == importlib.metadata.version("minibert-hf")
    installed("minibert-hf", "9.8.7")
    assert minibert.__version__ == "9.8.7"
    monkeypatch.setattr(installation, "NAME", "minibert-never-installed")
    assert minibert.__version__ == "unknown"


def test_a_missing_extra_is_named_as_the_package_was_installed(installed):
    assert installation.missing("It needs faiss", "search") == (
        f"It needs faiss, which the extra search brings: pip install -e '.[search]' (in {ROOT})."
    )
    installed("minibert-hf", "9.8.7")
    assert installation.missing("It needs faiss", "search") == (
        "It needs faiss, which the extra search brings: pip install 'minibert-hf[search]'."
    )


def test_another_project_of_that_name_is_named(installed, tmp_path):
    other = installed("minibert", "0.2.2", folder=tmp_path / "other")
    said = (
        f"This environment also has minibert 0.2.2, another project with the same import name, in {other / 'minibert'}; "
        f"run: pip uninstall minibert, then: pip install -e . (in {ROOT})."
    )
    version = CliRunner().invoke(app, ["--version"])
    assert (version.stdout, version.stderr) == (f"minibert {minibert.__version__}\n", f"Warning: {said}\n")
    assert installation.missing("It needs faiss", "search").endswith(f"brings: pip install -e '.[search]' (in {ROOT}). {said}")
    assert f"Warning: {said}\n" in CliRunner().invoke(app, ["quickstart", "--query", " "]).stderr


def test_another_project_that_wrote_over_our_files_is_named(installed):
    installed("minibert-hf", "9.8.7")
    installed("minibert", "0.2.2")
    assert (
        "whose files replace this package's; run: pip uninstall minibert, then: pip install --force-reinstall"
        in installation.foreign()
    )


def test_our_own_earlier_editable_installation_is_not_taken_for_another_project(installed):
    installed("minibert", "0.1.0", recorded="__editable__.minibert-0.1.0.pth")
    assert installation.foreign() is None


def test_importing_names_nobody(installed, tmp_path):
    installed("minibert", "0.2.2", folder=tmp_path / "other")
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'other')!r}); import minibert; print(minibert.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("minibert\n", "")


def test_nothing_here_installs_or_asks_for_another_project():
    pages = [
        path
        for folder in ("*", "docs/*", "docs/notebooks/*", ".ci/*", "*/*.py", "train/stages/*.py")
        for path in ROOT.glob(folder)
    ]
    wrong = r"minibert\[|pip install \W*minibert(?![-\w])|(version|distribution|requires)\(.minibert.\)"
    for path in pages:
        if path.suffix in ("", ".cfg", ".ipynb", ".md", ".py") and path.is_file():
            assert not re.search(wrong, path.read_text(encoding="utf-8")), path
