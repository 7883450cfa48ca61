"""Find the folder of a model, read its weights a tensor at a time, and write a folder that is complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibert.files.disk import exclusive_lock, readable_os_errors, write_json
from minibert.files.disk import read_json as read_json
from minibert.files.model_folder import WEIGHTS as WEIGHTS  # also read as folders.WEIGHTS
from minibert.files.model_folder import check_paths, check_weights, pickled, read_header, refuse_pickles, weight_files

_WANTED = ["*.json", "*.txt", "*.model", "*.safetensors", "*.bin.index.json"]


def find(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder ``source``, or download the model of that id on the Hub and return its folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(
            f"{source} is a file; give the folder of the model that it belongs to, or the id of one on the Hub."
        )
    here = f"There is no model folder {source} (looked from {Path.cwd()})"
    if folder.exists() or str(source).count("/") > 1 or str(source).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{here}; give a folder, or the id of a model on the Hub.")
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{here}, and the Hub did not provide it: {' '.join(str(error).split())}") from error


def modules(folder: Path) -> list[dict[str, Any]]:
    """Return the modules of a sentence-transformers model, or an empty list for any other model.

    Raises:
        ValueError: the first is not a transformer, or one lies outside of the folder.
    """
    check_paths(folder)
    if not (folder / "modules.json").exists():
        return []
    listed: list[dict[str, Any]] = read_json(folder / "modules.json")
    if not str(listed[0].get("type", "")).endswith("Transformer"):
        raise ValueError(f"The first module in {folder / 'modules.json'} must be a transformer; only such models are handled.")
    return listed


def encoder_folder(folder: Path) -> Path:
    """Return the folder of a model's transformer: ``folder``, or that of its first sentence-transformers module."""
    listed = modules(folder)
    return folder / listed[0]["path"] if listed else folder


def copy_modules(source: Path, target: Path) -> None:
    """Copy the sentence-transformers modules but for the transformer, which ``target`` itself will hold.

    Raises:
        ValueError: the weights of a module are pickled, or lie outside of the folder.
    """
    listed = modules(source)
    if not listed:
        return
    for path in [module["path"] for module in listed[1:] if (source / module["path"]).is_dir()]:
        if pickles := pickled(source / path):
            refuse_pickles(source, [f"{path}/{name}" for name in pickles], "SentenceTransformer")
        shutil.copytree(source / path, target / path)
    first, listed[0]["path"] = source / listed[0]["path"], ""
    write_json(target / "modules.json", listed)
    for file in (*first.glob("sentence_*_config.json"), source / "config_sentence_transformers.json"):
        if file.exists():
            shutil.copy(file, target / file.name)


def max_length(folder: Path) -> int | None:
    """Return the longest sequence, in tokens, that sentence-transformers allows the model in ``folder``, if it says so."""
    files = sorted(encoder_folder(folder).glob("sentence_*_config.json"))
    return next((int(length) for file in files if (length := read_json(file).get("max_seq_length"))), None)


def paths_in(folder: Path) -> list[str]:
    """Return the paths of all files below ``folder``, relative to it and sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def name_tokenizer_class(folder: Path) -> None:
    """Give the tokenizer in ``folder`` the class name that transformers before version 5 knows as well."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


class Checkpoint:
    """Read the tensors of a folder one at a time.

    Args:
        folder: of the model.
        name: read this file of it alone.

    Attributes:
        names: of all tensors, sorted.

    Raises:
        FileNotFoundError: there are no weights, or a file of them is missing.
        ValueError: they are pickled or damaged.
    """

    def __init__(self, folder: Path, name: str = WEIGHTS):
        files = [folder / name]
        if name == WEIGHTS:
            check_weights(folder)
            files = weight_files(folder)
        else:
            read_header(files[0])
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        self.names = sorted(self._files)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        with safe_open(self._files[name], framework="pt") as opened:
            shape: list[int] = opened.get_slice(name).get_shape()
            return shape


def write_tensors(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> int:
    """Write a safetensors file, and return its number of parameters.

    Args:
        file: to write.
        tensors: a function for every name that reads the tensor. A tensor of :class:`Checkpoint` stays on the disk until then.
    """
    state = {name: load().contiguous() for name, load in tensors.items()}
    with readable_os_errors(file, "nothing was written"):
        save_file(state, file, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``target`` when the block ends, and is deleted when the block fails.

    Raises:
        ValueError: ``target`` is a file, or a folder with something in it, or another process is writing it.
    """
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
