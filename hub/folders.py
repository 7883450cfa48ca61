"""Read model folders and their weights, and write new model folders atomically."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minibert.files import disk
from minibert.files.disk import exclusive_lock, read_json, read_settings, readable_os_errors, write_json
from minibert.files.model_folder import (
    PICKLES,
    check_paths,
    check_weights,
    encoder_folder,
    module_list,
    read_header,
    weight_files,
)

# Keys in sentence-transformers 5 -> keys, or modes of pooling, in sentence-transformers 6.
_RENAMED = {"word_embedding_dimension": "embedding_dimension", "in_word_embedding_dimension": "in_embedding_dimension"}
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Settings that say where files were on the machine of an author.
OF_A_MACHINE = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "is_local", "local_files_only")


def checked_encoder(folder: Path) -> Path:
    """Return the folder of the transformer. Refuse paths that lead out of ``folder``."""
    check_paths(folder, trust_remote_code=True)  # nothing is opened
    if (listed := module_list(folder)) and not str(listed[0].get("type", "")).endswith("Transformer"):
        raise ValueError(f"{folder / 'modules.json'} must begin with a Transformer; use another model.")
    return encoder_folder(folder)


def copy_modules(source: Path, target: Path) -> None:
    """Copy sentence-transformers modules to ``target``, but not the transformer's files.

    The written names and keys can be read by sentence-transformers 5.1 to 6.
    """
    check_paths(source, trust_remote_code=True)
    if not (listed := module_list(source)):
        return
    for module in listed[1:]:
        if (source / module["path"]).is_dir():
            shutil.copytree(source / module["path"], target / module["path"], ignore=shutil.ignore_patterns(*PICKLES))
        if (file := target / module["path"] / "config.json").exists():
            write_json(file, _earlier_keys(read_settings(file)))
    first, listed[0]["path"] = source / listed[0]["path"], ""
    for module in listed:
        if module["type"].startswith("sentence_transformers."):
            module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    write_json(target / "modules.json", listed)
    for file in (*first.glob("sentence_*_config.json"), source / "config_sentence_transformers.json"):
        if file.exists():
            shutil.copy(file, target / file.name)
    # Without this file, sentence-transformers 5.1 reads up to 512 tokens.
    if not any(target.glob("sentence_*_config.json")) or max_length(target) is None:
        length = read_settings(target / "tokenizer_config.json").get("model_max_length")
        write_json(target / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})


def _earlier_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a module with the keys of sentence-transformers 5."""
    modes, wanted = settings.pop("pooling_mode", None), dict(settings)
    for old, new in _RENAMED.items():
        if new in wanted:
            wanted[old] = wanted.pop(new)
    for mode in [modes] if isinstance(modes, str) else modes or ():
        wanted[next(key for key, name in _MODES.items() if name == mode)] = True
    return {**({key: wanted.get(key, False) for key in _MODES} if modes else {}), **wanted}


def max_length(folder: Path) -> int | None:
    """Return sentence-transformers' ``max_seq_length`` in tokens, or None if it is not set."""
    files = encoder_folder(folder).glob("sentence_*_config.json")
    return next(filter(None, (read_json(file).get("max_seq_length") for file in sorted(files))), None)


def paths_in(folder: Path) -> list[str]:
    """Return the sorted paths of all files below ``folder``, relative to ``folder``."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def set_fields(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file, and drop those of the machine of an author."""
    settings = {**read_settings(file), **fields}
    write_json(file, {name: value for name, value in settings.items() if name not in OF_A_MACHINE})


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer for transformers 4, and for libraries that read ``vocab.txt``."""
    tokenizer.save_pretrained(folder)
    known = read_settings(folder / "tokenizer_config.json").get("tokenizer_class")
    renamed = {"tokenizer_class": "PreTrainedTokenizerFast"} if known == "TokenizersBackend" else {}
    set_fields(folder / "tokenizer_config.json", **renamed)
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        tokenizer.backend_tokenizer.model.save(str(folder))


def read_tensors(folder: Path, name: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model, or of its file ``name``. Refuse NaN and infinity."""
    if name is None:
        check_weights(folder)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) if name is None else [folder / name]:
        read_header(file)
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{folder} holds NaN (not a number) or infinity in {name}; download or train the model again.")
    return dict(sorted(tensors.items()))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write ``tensors`` to a file, and return the number of parameters."""
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with readable_os_errors(file, "nothing was written"):
        save_file(state, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


_lock = partial(exclusive_lock, doing="writing", kept="nothing was written")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``target``, or deleted after an error."""
    check_output(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary_folder = TemporaryDirectory(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    with temporary_folder as place, _lock(Path(place)):
        temporary = Path(place, target.name)
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)


def check_output(target: Path) -> None:
    """Raise ValueError if ``target`` is not new or empty. Delete what killed processes left next to it."""
    for killed in disk.leftovers(target.parent, re.escape(target.name)):
        with _lock(killed):  # fails while another process writes
            disk.delete(killed)
    if target.is_symlink() and not target.exists():
        raise ValueError(f"The output folder {target} is a link to nothing; choose another folder, or delete the link.")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"The output folder {target} is not empty; choose another folder, or delete this one.")
