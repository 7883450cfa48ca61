"""The rules that keep the house standing: what lies where, who imports whom, what goes into the wheel, what stays light."""

import ast
import configparser
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(importlib.import_module("minibert.configuration_minibert").__file__).parent
ROOT_MODULES = {"__init__", "__main__", "cli", "configuration_minibert", "modeling_minibert", "tokenization_minibert"}
SUBPACKAGES = (*("train", "train.stages", "hub", "evaluation", "files", "inference", "plot", "search", "data", "recipes"),)
FILES = sorted([*ROOT.glob("*.py"), *(path for name in SUBPACKAGES for path in (ROOT / name).glob("*.py"))])
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")


def module_name(path: Path) -> str:
    return ".".join(("minibert", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[int, str, str]]:
    """Every import of a file, wherever it stands, as (level of a relative import, module, imported name or '')."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", alias.name) for alias in node.names]
    return found


def run(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=check, cwd=cwd)


# Layout


def test_the_root_holds_these_modules_and_no_others():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_MODULES


def test_tests_are_no_package():
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_packages_listed_by_hand_are_the_directories_with_code():
    listed = SETUP["options"]["packages"].split()
    assert listed == ["minibert", *(f"minibert.{name}" for name in SUBPACKAGES)]
    outside = {"tests", "benchmarks", "docs", "build", "dist", "runs"}
    directories = {
        path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/**/*.py") if "." not in path.parts[len(ROOT.parts)]
    }
    assert {name for name in directories if name.split("/")[0] not in outside} == set(SUBPACKAGES)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_examples_in_docstrings_are_true(path):
    if path.stem != "__main__":
        failed, _ = doctest.testmod(importlib.import_module(module_name(path)), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert failed == 0


# Imports

# Which areas of the package an area may import; an area is a subpackage or a module at the root.
MODEL = {"configuration_minibert", "modeling_minibert", "tokenization_minibert"}
MAY_IMPORT = {
    "configuration_minibert": set(),
    "modeling_minibert": {"configuration_minibert"},
    "tokenization_minibert": {"configuration_minibert"},
    "recipes": set(),
    "data": {"data"},
    "train": {"train", "data", "recipes", *MODEL},
    "hub": {"hub", "data", *MODEL},
    "inference": {"inference", "data", *MODEL},
    "cli": {"cli", "train", "hub", "inference", "data", "recipes", *MODEL},
    "__main__": {"cli"},
    "__init__": {"inference", *MODEL},
}


# What a stage may call of inference, to measure the model it trains as it will be used.
EVALUATION = ("minibert.evaluation.evaluate", "minibert.inference.answers", "minibert.evaluation.metrics")
# What everybody who opens a model calls first.
CHECKS = "minibert.files.model_folder"


def areas_imported(path: Path) -> set[str]:
    """The areas of minibert that a file imports; a public name counts as the model's, evaluation by a stage as nothing."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    areas = set()
    for level, module, name in imports(path):
        dotted = (f"minibert.{module}" if level else module).split(".")
        if dotted[0] != "minibert":
            continue
        if own == "train" and ".".join([*dotted, name]).startswith(EVALUATION):
            continue
        if own in ("train", "inference") and ".".join([*dotted, name]).startswith(CHECKS):
            continue
        area = dotted[1] if len(dotted) > 1 else name
        areas.add("modeling_minibert" if len(dotted) == 1 and area not in MAY_IMPORT else area)
    return areas


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    area = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert areas_imported(path) <= MAY_IMPORT[area]


@pytest.mark.parametrize(
    ("where", "line", "allowed"),
    [
        ("train/loop.py", "from minibert.inference.load import load", False),
        ("train/loop.py", "from minibert.inference import load", False),
        ("train/loop.py", "from minibert.evaluation.evaluate import evaluate", True),
        ("train/loop.py", "from minibert.inference import evaluate", True),
        ("train/loop.py", "from minibert import MiniBertModel", True),
        ("search/search.py", "def f():\n    import minibert.train.stage", False),
        ("search/search.py", "from minibert.data.load import load", True),
        ("data/load.py", "from minibert.train.arguments import Recipe", False),
        ("data/load.py", "from minibert import MiniBertConfig", False),
        ("hub/push.py", "from minibert import inference", False),
        ("tokenization_minibert.py", "from minibert.cli import app", False),
        ("configuration_minibert.py", "import minibert.modeling_minibert", False),
    ],
)
def test_the_rule_of_imports_can_fail(tmp_path, monkeypatch, where, line, allowed):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(line, encoding="utf-8")
    assert (areas_imported(path) <= MAY_IMPORT[where.split("/")[0].removesuffix(".py")]) == allowed


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_modules_call_each_other_by_full_name(path):
    relative = {(level, module) for level, module, _ in imports(path) if level}
    assert relative == ({(1, "configuration_minibert")} if path.stem == "modeling_minibert" else set())


@pytest.mark.parametrize("name", ["configuration_minibert", "modeling_minibert"])
def test_files_that_travel_with_a_checkpoint_need_only_what_everybody_has(name):
    path = ROOT / f"{name}.py"
    absolute = {module.split(".")[0] for level, module, _ in imports(path) if not level}
    assert absolute - sys.stdlib_module_names <= {"torch", "transformers", "huggingface_hub"}
    # What transformers' own copier finds; it reads the text of the file, docstrings included.
    assert get_relative_imports(path) == (["configuration_minibert"] if name == "modeling_minibert" else [])


def test_the_modeling_file_is_in_memory_once():
    from minibert import MiniBertModel

    loaded = {module.__name__ for module in list(sys.modules.values()) if _file_of(module) == ROOT / "modeling_minibert.py"}
    assert loaded == {MiniBertModel.__module__} == {"minibert.modeling_minibert"}


def _file_of(module) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def test_a_checkpoint_loads_as_the_installed_class_even_from_the_repository_root(tmp_path):
    script = (
        "import sys, minibert\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        "config = minibert.MiniBertConfig.preset('nano-1x3', vocab_size=9)\n"
        "minibert.MiniBertModel(config).save_pretrained(sys.argv[1])\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model) is minibert.MiniBertModel, type(model)\n"
        "print([name for name in sys.modules if name.endswith('modeling_minibert')])"
    )
    answer = run("-c", script, str(tmp_path / "model"), cwd=ROOT)
    assert answer.stdout.strip() == "['minibert.modeling_minibert']"


# Light


@pytest.mark.parametrize(
    "command", [["-m", "minibert"], [shutil.which("minibert", path=Path(sys.executable).parent)]], ids=["-m", "script"]
)
def test_help_comes_at_once(command, tmp_path):
    answer = run("-X", "importtime", *command, "--help", cwd=tmp_path)
    assert "quickstart" in answer.stdout
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in answer.stderr.splitlines() if "|" in line}
    assert "minibert" in imported and "typer" in imported
    assert not imported & {"torch", "transformers", "datasets", "sentence_transformers", "numpy", "pydantic", "sklearn"}


def test_help_takes_less_than_a_second(tmp_path):
    times = []
    for _ in range(3):  # the time of the processor, so that a busy machine does not count against us
        before = os.times()
        run("-m", "minibert", "--help", cwd=tmp_path)
        after = os.times()
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(times) < 1


def test_importing_changes_no_settings_and_prints_nothing(tmp_path):
    script = (
        "import logging, os\n"
        "import torch, transformers\n"
        "before = dict(os.environ), logging.root.level, list(logging.root.handlers), torch.get_num_threads()\n"
        "import minibert, minibert.modeling_minibert, minibert.tokenization_minibert\n"
        "assert before == (dict(os.environ), logging.root.level, list(logging.root.handlers), torch.get_num_threads())"
    )
    answer = run("-c", script, cwd=tmp_path)
    assert (answer.stdout, answer.stderr) == ("", "")


def test_every_public_name_is_there():
    minibert = importlib.import_module("minibert")
    assert set(minibert.__all__) <= set(dir(minibert))
    for name in minibert.__all__:
        assert getattr(minibert, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'MiniBertForNothing'"):
        _ = minibert.MiniBertForNothing


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel built from a copy of the repository, with litter beside it that must not slip in."""
    copy, out = tmp_path_factory.mktemp("source") / "minibert", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__"))
    for litter in ("runs/quickstart/config.json", "hub/notes.txt", "recipes/private.json", "notebook.ipynb"):
        (copy / litter).parent.mkdir(parents=True, exist_ok=True)
        (copy / litter).write_text("litter", encoding="utf-8")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), cwd=out)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    data = {
        path
        for package, patterns in SETUP["options.package_data"].items()
        for pattern in patterns.split()
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    assert {path.name for path in data} >= {"py.typed", "quickstart.yaml", "tinybert.yaml"}
    expected = {f"minibert/{path.relative_to(ROOT).as_posix()}" for path in {*FILES, *data}}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_is_licensed_and_brings_the_command(wheel):
    (information,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{information}/licenses/LICENSE").startswith(b"MIT License")
    assert "minibert = minibert.cli:main" in wheel.read(f"{information}/entry_points.txt").decode()
    metadata = wheel.read(f"{information}/METADATA").decode()
    assert re.search("^License(-Expression)?: MIT$", metadata, re.MULTILINE) and "Requires-Python: >=3.10" in metadata


# The tested versions


def test_every_dependency_has_a_tested_version_that_is_allowed():
    pinned: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (>=|<) "3\.\d+")?', line), line
            pinned.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    wanted = SETUP["options"]["install_requires"].split("\n") + [
        line for group in SETUP["options.extras_require"].values() for line in group.split("\n")
    ]
    for requirement in (Requirement(line) for line in wanted if line and not line.startswith("minibert")):
        for pin in pinned[canonicalize_name(requirement.name)]:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert version in requirement.specifier, pin


def test_build_requirements_are_met_by_the_development_environment():
    """The wheel above is built without isolation, so what builds it must come with ``.[dev]``."""
    build = re.findall(
        r'"([\w-]+)[^"]*"', re.search(r"requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    )
    wanted = {Requirement(line).name for line in SETUP["options.extras_require"]["dev"].split("\n") if line}
    assert build and set(build) <= wanted
