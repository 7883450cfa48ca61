"""Folders of models: find one, read its weights a tensor at a time, and write another that is whole or absent."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from minibert.files.disk import read_json as read_json
from minibert.files.model_folder import WEIGHTS as WEIGHTS  # also read as folders.WEIGHTS
from minibert.files.model_folder import (
    check_file,
    check_paths,
    check_weights,
    pickled,
    refuse_pickles,
    weight_files,
)

_WANTED = ["*.json", "*.txt", "*.model", "*.safetensors", "*.bin.index.json"]
_OTHER_BACKENDS = ["onnx/*", "openvino/*", "tf_model*", "flax_model*", "coreml/*"]
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def find(source: str | Path, revision: str | None = None) -> Path:
    """The folder ``source``, or the Hub model of that id, downloaded without what is not needed.

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
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_WANTED, ignore_patterns=_OTHER_BACKENDS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{here}, and the Hub did not give us one: {' '.join(str(error).split())}") from error


def modules(folder: Path) -> list[dict[str, Any]]:
    """The modules of a sentence-transformers model, or nothing for a model that is not one.

    Raises:
        ValueError: the first is not a transformer, or one lies outside of the folder.
    """
    check_paths(folder)
    if not (folder / "modules.json").exists():
        return []
    listed = read_json(folder / "modules.json")
    if not isinstance(listed, list) or not listed or not str(listed[0].get("type", "")).endswith("Transformer"):
        raise ValueError(f"The first of the modules in {folder / 'modules.json'} is no transformer; only those are handled.")
    return listed


def encoder_folder(folder: Path) -> Path:
    """Where the transformer of a model lies: ``folder``, or that of its first sentence-transformers module."""
    listed = modules(folder)
    return folder / listed[0]["path"] if listed else folder


def copy_modules(source: Path, target: Path) -> None:
    """Copy what makes a folder a sentence-transformers model but for its transformer, which ``target`` itself will hold.

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
    (target / "modules.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")
    for file in (*first.glob("sentence_*_config.json"), source / "config_sentence_transformers.json"):
        if file.exists():
            shutil.copy(file, target / file.name)


def max_length(folder: Path) -> int | None:
    """The longest sequence, in tokens, that sentence-transformers gives the model in ``folder``; None where it says none."""
    for file in sorted(encoder_folder(folder).glob("sentence_*_config.json")):
        if length := read_json(file).get("max_seq_length"):
            return int(length)
    return None


def name_tokenizer_class(folder: Path) -> None:
    """Give the tokenizer in ``folder`` the class name that every transformers knows, where its own is new in version 5."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the same, by the name it had before
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


class Checkpoint:
    """The tensors in a folder, read one at a time; ``names`` are those of all its files, or of the file ``name`` alone.

    Raises:
        FileNotFoundError: there are no weights, or a file of them is missing.
        ValueError: they are pickled or damaged.
    """

    def __init__(self, folder: Path, name: str = WEIGHTS):
        if name == WEIGHTS:
            check_weights(folder)
            files = weight_files(folder)
        else:
            files = [folder / name]
            check_file(files[0])
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
        with safe_open(self._files[name], framework="pt") as opened:
            shape: list[int] = opened.get_slice(name).get_shape()
            return shape


def write_tensors(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> int:
    """Write a safetensors file with one tensor in memory at a time, where the library wants all of them.

    Args:
        tensors: for every name what gives the tensor; called twice.

    Returns:
        The number of parameters.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = count = 0
    for name, load in tensors.items():
        tensor = load()
        count += tensor.numel()
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for load in tensors.values():
            out.write(load().contiguous().flatten().view(torch.uint8).numpy().data)
    return count


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends, and disappears when it fails.

    Raises:
        ValueError: ``target`` is a file, or a folder with something in it.
    """
    check_output(target)
    beside = f".{target.name}.tmp-{socket.gethostname()}-"
    _remove_left_over(target.parent, beside)
    temporary = target.with_name(f"{beside}{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_left_over(place: Path, beside: str) -> None:
    """Delete what killed processes of this machine left in ``place``: folders named by ``beside`` and the process."""
    for folder in place.iterdir() if place.is_dir() else ():
        number = folder.name.removeprefix(beside)
        if folder.name.startswith(beside) and number.isdigit() and not _runs(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name != "posix":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def check_output(target: Path) -> None:
    """Refuse a ``target`` that is a file or holds files."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"The output folder {target} is not empty; name another, or delete it.")
