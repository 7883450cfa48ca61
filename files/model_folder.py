"""Check weights, pickles, code, links and paths of a model folder before opening the model.

The checks load no tensor and run no code. They make sure that opening the model reads only
files in the folder, and does not need much more memory than the size of the files. Open models
with :func:`opening`.
"""

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from minibert.files.disk import check_regular, expand_home, read_json, read_settings
from minibert.files.model_settings import check_code, check_modules, check_size, short

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Files that can run code when they are opened.
PICKLES = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.bin.index.json"),
    *("*.joblib", "*.npy", "*.h5"),
)

# Bytes. safetensors allows 100 MB, but a parsed header needs many times as much memory.
HEADER_LIMIT = 16_000_000
# Suffixes of the files that libraries read when they open a model. A link with such a suffix
# could lead to any file of this machine.
_READ = (".json", ".jinja", ".md", ".model", ".py", ".safetensors", ".txt")
# One lock per process id. A forked child would wait forever for a lock that the parent holds.
_LOCKS: dict[int, threading.RLock] = {}


@cache
def code_files() -> tuple[Path, ...]:
    """Return the paths of the Python files that are saved with every checkpoint."""
    from transformers.dynamic_module_utils import get_relative_import_files  # slow, and rarely needed

    spec = find_spec("minibert.modeling_minibert")
    assert spec is not None and spec.origin is not None
    return tuple(Path(file) for file in sorted([spec.origin, *get_relative_import_files(spec.origin)]))


def check_model(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Run all checks of this module on a model folder. Call it before opening the model."""
    check_paths(folder, trust_remote_code=trust_remote_code)
    check_weights(encoder_folder(folder))


def refuse_missing(model: str | Path, advice: str) -> NoReturn:
    """Raise FileNotFoundError for a missing model folder. The message ends with ``advice``."""
    path = expand_home(model)
    here = f"There is no model folder {model} (current folder: {Path.cwd()})"
    raise FileNotFoundError(f"{f'{model} is a file' if path.is_file() else here}; {advice}.")


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Return the header of a safetensors file: a dictionary from tensor name to (dtype, shape).

    A dtype is a string such as ``"F32"``. The tensors are not read. A damaged header raises a
    ValueError.
    """
    try:
        check_regular(file)
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
        if length > HEADER_LIMIT:
            raise SafetensorError(f"its header has {length:,} bytes, and the limit is {HEADER_LIMIT:,}")
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
        return {name: (found.get_dtype(), found.get_shape()) for name, found in slices.items()}
    except SafetensorError as error:
        why = ascii(" ".join(str(error).split()))[1:-1]  # text from the file is escaped and truncated
        raise ValueError(f"{file} is damaged ({why[:200]}); save or download the model again.") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, or an empty list if there are none."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        return []
    names = read_settings(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} lists no weights; save or download the model again.")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} lists {short(name)}, which is not a safetensors file; save the model again.")
        _check_name(folder / INDEX, name)
    return [folder / name for name in sorted(set(names.values()))]


def check_weights(folder: Path) -> None:
    """Check that ``folder`` contains safetensors weights and a configuration that fits them."""
    files = weight_files(folder)
    if not files:
        if names := pickles(file.name for file in folder.glob("*")):
            refuse_pickles(folder, names)
        raise FileNotFoundError(
            f"{folder} contains no {WEIGHTS}. Complete the training that writes this file, or save weights of "
            "another format with transformers: AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER)."
        )
    stored = 0
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} lacks {file.name}, a part of the weights; copy or download the model again.")
        stored += sum(math.prod(shape) for _, shape in read_header(file).values())
    check_size(folder / "config.json", stored)


def pickles(paths: Iterable[str]) -> list[str]:
    """Return the pickle files among ``paths``, sorted. Opening a pickle can run code.

    >>> pickles(["pytorch_model.bin", "1_Dense/model.safetensors"])
    ['pytorch_model.bin']
    """
    return sorted(path for path in paths if any(PurePosixPath(path).match(one) for one in PICKLES))


def refuse_pickles(folder: Path, names: list[str], opener: str = "AutoModel") -> NoReturn:
    """Raise a ValueError that explains how to save the pickle files as safetensors."""
    raise ValueError(
        f"{folder} contains weights only as a pickle ({', '.join(names)}), which can run code when it is "
        "opened; if you trust it, save it as safetensors first: "
        f"{opener}.from_pretrained({str(folder)!r}).save_pretrained(FOLDER)."
    )


def check_paths(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError if a path, a link or a setting of a model leads out of its folder.

    Files that libraries read must be regular files, and settings must be known. With
    ``trust_remote_code``, modules and settings of the model's own code are allowed. Links
    within one repository of the Hub's cache are allowed.
    """
    listed = module_list(folder)
    places = [folder / module["path"] for module in listed] or [folder]
    _check_links(folder, places)
    for place in dict.fromkeys((folder, places[0])):
        check_code(place, trust_remote_code=trust_remote_code)
    check_modules(folder, listed, trust_remote_code=trust_remote_code)
    weight_files(places[0])
    for place in places[1:]:
        if place in (folder, places[0]):
            continue
        for file in (files := weight_files(place)):
            read_header(file)
        if not files and (found := pickles(file.relative_to(folder).as_posix() for file in place.glob("*"))):
            refuse_pickles(folder, found, "SentenceTransformer")


def module_list(folder: Path) -> list[dict[str, Any]]:
    """Return the modules in modules.json, or [] if there is no such file.

    Raises:
        ValueError: if the file lists no modules, or a path that leads out of ``folder``.
    """
    file = folder / "modules.json"
    if not file.exists():
        return []
    listed = read_json(file)
    if not isinstance(listed, list) or not listed or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"{file} does not list a model's modules; save or download the model again.")
    for module in listed:
        if not isinstance(module.get("path"), str):
            raise ValueError(f"{file} lists a module without a path; save or download the model again.")
        _check_name(file, module["path"])
    return listed


def _check_name(file: Path, name: str) -> None:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name:
        raise ValueError(
            f"{file} refers to {short(name)}, which is outside of the folder; do not use this model, or ask its author."
        )


def _check_links(folder: Path, modules: list[Path]) -> None:
    root = folder.resolve()
    for parent in root.parents:  # in the Hub's cache: models--owner--name/snapshots/commit
        if parent.name == "snapshots" and re.match(r"(models|datasets|spaces)--", parent.parent.name):
            root = parent.parent
            break
    for file in _files_to_read(folder, modules):
        target = Path(os.path.realpath(file))
        if file.is_symlink() and not target.is_relative_to(root):
            raise ValueError(
                f"{file} is a link to {target}, outside of the folder; if you trust this file, copy it into the folder."
            )
        if file.exists() and not (file.is_dir() and file.suffix not in _READ):
            check_regular(file)


def _files_to_read(folder: Path, modules: list[Path]) -> Iterator[Path]:
    # Links with other suffixes are allowed, since the folder may be a working directory.
    yield from (file for file in folder.iterdir() if file.suffix in _READ)
    for place in dict.fromkeys(modules):
        between = place.relative_to(folder).parents  # parent folders could be links
        yield from (folder / path for path in (place.relative_to(folder), *between) if path.parts)
        if place != folder:
            for found, folders, files in os.walk(place):  # follows no links
                yield from (Path(found, name) for name in (*folders, *files))


def encoder_folder(folder: Path) -> Path:
    """Return the folder of the transformer, which may be a subfolder of ``folder``."""
    if listed := module_list(folder):
        return folder / listed[0]["path"]
    if not (folder / "config.json").exists() and (stages := sorted(file.parent.name for file in folder.glob("*/config.json"))):
        raise FileNotFoundError(f"{folder} is not a model folder; give one of its folders {', '.join(stages)}.")
    return folder


@contextlib.contextmanager
def opening(model: str | Path) -> Iterator[None]:
    """Let one thread at a time open a model in the ``with`` block.

    transformers cannot open models in several threads at once. Libraries raise any exception
    for settings and weights that do not fit. Such an exception becomes a ValueError with one
    sentence.
    """
    try:
        with _LOCKS.setdefault(os.getpid(), threading.RLock()):
            yield
    except (OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error  # libraries write paragraphs
    except BaseException as error:  # the tokenizers library panics with a BaseException
        if "ignore_mismatched_sizes" in str(error):
            why = "its weights do not have the shapes in config.json"
        else:
            why = short(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise ValueError(f"{model} cannot be opened ({why}); save or download the model again.") from error
