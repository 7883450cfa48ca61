"""Read model folders and their weights, and write new model folders atomically."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minibert.files.disk import exclusive_lock, read_json, readable_os_errors, write_json
from minibert.files.model_folder import (
    PICKLES,
    WEIGHTS,
    check_paths,
    check_weights,
    read_header,
    read_settings,
    weight_files,
)


def modules(folder: Path) -> list[dict[str, Any]]:
    """Return the modules in modules.json, or [] if the model has no such file.

    Raises:
        ValueError: if the first module is not a transformer, or a module's path leads out of
            ``folder``.
    """
    check_paths(folder)
    if not (folder / "modules.json").exists():
        return []
    listed: list[dict[str, Any]] = read_json(folder / "modules.json")
    if not str(listed[0].get("type", "")).endswith("Transformer"):
        raise ValueError(f"{folder / 'modules.json'} must begin with a Transformer; use another model.")
    return listed


def encoder_folder(folder: Path) -> Path:
    """Return the folder with the transformer's files: ``folder`` or one of its subfolders."""
    listed = modules(folder)
    return folder / listed[0]["path"] if listed else folder


def copy_modules(source: Path, target: Path) -> None:
    """Copy sentence-transformers modules to ``target``, but not the transformer's files."""
    listed = modules(source)
    if not listed:
        return
    for path in [module["path"] for module in listed[1:] if (source / module["path"]).is_dir()]:
        shutil.copytree(source / path, target / path, ignore=shutil.ignore_patterns(*PICKLES))
    first, listed[0]["path"] = source / listed[0]["path"], ""
    write_json(target / "modules.json", listed)
    for file in (*first.glob("sentence_*_config.json"), source / "config_sentence_transformers.json"):
        if file.exists():
            shutil.copy(file, target / file.name)


def max_length(folder: Path) -> int | None:
    """Return sentence-transformers' ``max_seq_length`` in tokens, or None if it is not set."""
    files = encoder_folder(folder).glob("sentence_*_config.json")
    return next(filter(None, (read_json(file).get("max_seq_length") for file in sorted(files))), None)


def pooling_mode(folder: Path) -> str | None:
    """Return a model's pooling, such as ``"mean"``, or None if there are several or none."""
    for module in modules(folder):
        if str(module.get("type", "")).endswith("Pooling"):
            settings = read_settings(folder / module["path"] / "config.json")
            earlier = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
            modes = [earlier.get(name, name) for name, on in settings.items() if on is True and "pooling_mode" in name]
            return settings.get("pooling_mode") or (modes[0] if len(modes) == 1 else None)
    return None


def paths_in(folder: Path) -> list[str]:
    """Return the sorted paths of all files below ``folder``, relative to ``folder``."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def name_tokenizer_class(folder: Path) -> None:
    """Change the class in tokenizer_config.json so that transformers 4 opens the tokenizer."""
    file = folder / "tokenizer_config.json"
    settings = read_settings(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def read_tensors(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Return the tensors of the model in ``folder``, or of its file ``name``."""
    if name == WEIGHTS:
        check_weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) if name == WEIGHTS else [folder / name]:
        read_header(file)
        tensors |= load_file(file)
    return dict(sorted(tensors.items()))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write ``tensors`` to a safetensors file, and return the number of parameters."""
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with readable_os_errors(file, "nothing was written"):
        save_file(state, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``target``, or deleted after an error."""
    check_output(target)
    place = target.with_name(f".{target.name}.part")
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / target.name
    try:
        with exclusive_lock(place, "writing", kept="nothing was written"):
            shutil.rmtree(temporary, ignore_errors=True)  # left over from a killed process
            temporary.mkdir()
            try:
                yield temporary
                if target.exists():
                    target.rmdir()
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        with suppress(OSError):  # the folder contains the lock of another process
            place.rmdir()


def check_output(target: Path) -> None:
    """Raise ValueError if ``target`` is a file or a folder that is not empty."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"The output folder {target} is not empty; choose another folder, or delete this one.")
