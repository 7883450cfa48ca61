"""The rules that keep the house standing: what lies where, who imports whom, what goes into the wheel, what stays light."""

import ast
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

from helpers import ROOT, SETUP
from minibert.files.model_folder import code_files

# Files that travel with a checkpoint.
CHECKPOINT = ("configuration_minibert", "kernels_minibert", "loss_minibert", "modeling_minibert", "packing_minibert")
# Each layer may import the layers before it and itself; areas of the same layer do not know each other. An area is a
# subpackage or a module at the root.
LAYERS = (
    {"configuration_minibert"},
    {"kernels_minibert"},
    {"packing_minibert"},
    {"loss_minibert"},
    {"modeling_minibert"},
    {"tokenization_minibert", "files", "recipes"},
    {"data"},
    {"inference"},
    {"evaluation"},
    {"train", "hub", "search", "plot"},
    {"cli"},
    {"__main__"},
)
SUBPACKAGES = (
    *("data", "evaluation", "files", "hub", "inference", "plot", "recipes", "search"),
    *("train", "train.stages", "train.stages.distill"),
)
FILES = sorted([*ROOT.glob("*.py"), *(path for name in SUBPACKAGES for path in ROOT.joinpath(*name.split(".")).glob("*.py"))])


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


def test_modules_lie_where_the_design_says():
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__"} | {
        area for layer in LAYERS for area in layer if area not in SUBPACKAGES
    }
    assert sorted(SETUP["options"]["packages"].split()) == ["minibert", *(f"minibert.{name}" for name in SUBPACKAGES)]
    outside = {"tests", "benchmarks", "docs", "build", "dist", "runs"}
    folders = (path.parent.relative_to(ROOT).parts for path in ROOT.glob("*/**/*.py"))
    assert {".".join(parts) for parts in folders if parts[0][0] != "." and parts[0] not in outside} == set(SUBPACKAGES)
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_every_file_says_what_it_is_for():
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]


def test_examples_in_docstrings_are_true():
    names = [module_name(path) for path in FILES if path.stem != "__main__"]
    failed = {
        name: doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)[0] for name in names
    }
    assert not [name for name, count in failed.items() if count]


# Imports


def wrong_imports(path: Path) -> set[str]:
    """Return the areas of minibert that a file imports although the layers forbid it."""
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = {own}
    for layer in LAYERS:
        if own in layer:
            break
        allowed |= layer
    areas = set()
    for level, module, name in imports(path):
        dotted = f"minibert.{module}".split(".") if level else module.split(".")
        if dotted[0] == "minibert":
            area = dotted[1] if len(dotted) > 1 else name
            known = any(area in layer for layer in LAYERS)
            areas.add(area if known else "modeling_minibert")  # a public name
    return areas - allowed - ({"modeling_minibert"} if own == "__init__" else set())


def test_imports_run_one_way():
    found = {module_name(path): wrong_imports(path) for path in FILES if path != ROOT / "__init__.py"}
    assert not {name: areas for name, areas in found.items() if areas}


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("inference/load.py", "def f():\n    import minibert.train.stage"),
        ("train/loop.py", "from minibert import hub"),
        ("data/load.py", "from minibert.inference.encode import Encoder"),
        ("files/disk.py", "from minibert.data import load"),
        ("packing_minibert.py", "from .loss_minibert import x"),
    ],
)
def test_the_rule_of_imports_can_fail(tmp_path, monkeypatch, where, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text(line, encoding="utf-8")
    assert wrong_imports(path)


def opens_models(path: Path) -> bool:
    """Return True if a file calls a library that opens a model, a tokenizer or a configuration."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    loads = any(isinstance(call, ast.Attribute) and ast.unparse(call) in ("torch.load", "Transformer.load") for call in calls)
    return loads or bool(names & {"from_pretrained", "SentenceTransformer", "CrossEncoder", "Transformer"})


def test_models_are_opened_in_one_module():
    """The script for processes without the package gets its arguments from that module."""
    found = {path.relative_to(ROOT).as_posix() for path in FILES if opens_models(path)}
    assert found == {"inference/load.py", "hub/isolated.py"}


def test_modules_call_each_other_by_full_name():
    relative = {path.stem for path in FILES if any(level for level, _, _ in imports(path))}
    assert relative == set(CHECKPOINT) - {"configuration_minibert", "kernels_minibert"}


def test_files_that_travel_with_a_checkpoint_need_only_what_everybody_has():
    assert [file.stem for file in code_files()] == sorted(CHECKPOINT)
    for file in code_files():
        absolute = {module.split(".")[0] for level, module, _ in imports(file) if not level}
        assert absolute - sys.stdlib_module_names <= {"torch", "transformers", "huggingface_hub"}
        # transformers' own copier reads the text of the file, docstrings included
        assert {f"{name}.py" for name in get_relative_imports(file)} <= {other.name for other in code_files()}


def test_the_encoder_is_read_in_one_sitting():
    lengths = {file.stem.split("_")[0]: len(file.read_text(encoding="utf-8").splitlines()) for file in code_files()}
    limits = {"modeling": 710, "packing": 410, "kernels": 180, "loss": 60, "configuration": 215}
    assert all(lengths[name] <= limit for name, limit in limits.items())
    lines = (ROOT / "modeling_minibert.py").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("class "))
    last_import = max(number for number, line in enumerate(lines) if line.startswith("from "))
    (head,) = (number for number, line in enumerate(lines) if line.startswith("class MiniBertLMHead"))
    assert first - last_import <= 60 and head - first <= 360


@pytest.mark.slow
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


@pytest.mark.slow
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
    """The wheel built from a copy of the repository, with other files next to it that must not slip in."""
    copy, out = tmp_path_factory.mktemp("source") / "minibert", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__"))
    for litter in ("runs/quickstart/config.json", "hub/notes.txt", "recipes/private.json", "notebook.ipynb"):
        (copy / litter).parent.mkdir(parents=True, exist_ok=True)
        (copy / litter).write_text("litter", encoding="utf-8")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), cwd=out)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.mark.slow
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


@pytest.mark.slow
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
    for requirement in (Requirement(line) for line in wanted if line and not line.startswith(SETUP["metadata"]["name"])):
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
