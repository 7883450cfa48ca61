"""Find the folder of a model, read its weights a tensor at a time, and write a folder that is complete or absent."""

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
    """Return the modules of a sentence-transformers model; none of any other model.

    Raises:
        ValueError: the first is not a transformer, or one lies outside of the folder.
    """
    check_paths(folder)
    if not (folder / "modules.json").exists():
        return []
    listed: list[dict[str, Any]] = read_json(folder / "modules.json")
    if not str(listed[0].get("type", "")).endswith("Transformer"):
        raise ValueError(f"The first module in {folder / 'modules.json'} must be a transformer.")
    return listed


def encoder_folder(folder: Path) -> Path:
    """Return the folder of a model's transformer: ``folder``, or that of its first sentence-transformers module."""
    listed = modules(folder)
    return folder / listed[0]["path"] if listed else folder


def copy_modules(source: Path, target: Path) -> None:
    """Copy the sentence-transformers modules but for the transformer, which ``target`` will hold."""
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
    """Return the longest sequence, in tokens, that sentence-transformers allows, if it says so."""
    files = encoder_folder(folder).glob("sentence_*_config.json")
    return next(filter(None, (read_json(file).get("max_seq_length") for file in sorted(files))), None)


def pooling_mode(folder: Path) -> str | None:
    """Return the mode of the first pooling of a sentence-transformers model, if it has one of one mode."""
    for module in modules(folder):
        if str(module.get("type", "")).endswith("Pooling"):
            settings = read_settings(folder / module["path"] / "config.json")
            earlier = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
            modes = [earlier.get(name, name) for name, on in settings.items() if on is True and "pooling_mode" in name]
            return settings.get("pooling_mode") or (modes[0] if len(modes) == 1 else None)
    return None


def paths_in(folder: Path) -> list[str]:
    """Return the paths of all files below ``folder``, relative to it and sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def name_tokenizer_class(folder: Path) -> None:
    """Give the tokenizer in ``folder`` the class name that transformers 4 knows as well."""
    file = folder / "tokenizer_config.json"
    settings = read_settings(file)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


def read_tensors(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Return the tensors of a model, or of another file; the system reads a tensor when it is used."""
    if name == WEIGHTS:
        check_weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) if name == WEIGHTS else [folder / name]:
        read_header(file)
        tensors |= load_file(file)
    return dict(sorted(tensors.items()))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file, and return its number of parameters."""
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with readable_os_errors(file, "nothing was written"):
        save_file(state, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` when the block ends, and is deleted when the block fails."""
    check_output(target)
    place = target.with_name(f".{target.name}.part")
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / target.name
    try:
        with exclusive_lock(place, "writing", kept="nothing was written"):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            temporary.mkdir()
            try:
                yield temporary
                if target.exists():
                    target.rmdir()
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        with suppress(OSError):  # another process has its lock in there
            place.rmdir()


def check_output(target: Path) -> None:
    """Refuse a ``target`` that is a file or holds files."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"The output folder {target} is not empty; name another, or delete it.")
