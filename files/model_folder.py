"""Look at a model's files before anything opens them: headers of weights, and names that could lead out of the folder.

Nothing here loads a tensor, runs code or follows a name: a folder that fails is refused with one sentence. What passes can
still be wrong, but opening it costs no more memory than its files, and reads no file outside of its folder. :func:`opening`,
in which every area opens its models, says what turns out wrong only then.
"""

import contextlib
import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from minibert.files.disk import read_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.bin.index.json")

# The format allows headers of 100 MB; the largest models that exist need a tenth of this, and a parsed header takes many
# times its size in memory.
HEADER_LIMIT = 16_000_000
_VALUES_LIMIT = 1_000_000  # of a header, a tensor has about eight
_SIZE_LIMIT = 2**63
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# A configuration may describe so many times the numbers that weights store, since layers can share them, or so many anyway.
_SHARED = 16
_SMALL = 2**28
# Files that opening a model reads; a link among them could show it any file of this machine.
_READ = (".json", ".jinja", ".model", ".py", ".safetensors", ".txt")
# A lock for each process that opens models: a forked one has no thread of its parent's that could ever give back the other.
_TURNS: dict[int, threading.RLock] = {}
# module.Class, with the folder of the module and the repository on the Hub that it is taken from before it, if any.
_CODE = re.compile(r"(?:[\w.-]+/[\w.-]+--)?(?:\w+/)*\w+\.\w+")


@cache
def code_files() -> tuple[Path, ...]:
    """Return the installed Python files that travel with a checkpoint: the modeling file and everything it imports."""
    from transformers.dynamic_module_utils import get_relative_import_files  # checking a recipe's folders needs no transformers

    spec = find_spec("minibert.modeling_minibert")
    assert spec is not None and spec.origin is not None
    return tuple(Path(file) for file in sorted([spec.origin, *get_relative_import_files(spec.origin)]))


class _Wrong(Exception):
    """What is wrong with a header."""


# ------------------------------------------------------------------------------------------------------------- weights


def check_file(path: Path) -> None:
    """Refuse a safetensors file whose header is not the exact description of the bytes behind it.

    Only the header is read, at most ``HEADER_LIMIT`` bytes.

    Raises:
        ValueError: with what is wrong, in one sentence.
        OSError: the file cannot be read.
    """
    read_header(path)


def read_header(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The type, such as F32, and the shape of every tensor in a safetensors file, checked as :func:`check_file` does."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _Wrong("it is not a regular file")
            header, size = _header(file, status.st_size)
            _check_tensors(header, size)
            return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    except (_Wrong, RecursionError) as error:
        why = "its header is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is damaged ({why}); save or download the model again.") from error


def _header(file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header of an open file of ``size`` bytes, and the number of bytes behind it."""
    if size < 8:
        raise _Wrong(f"it has {size} bytes, which hold no header")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise _Wrong(f"it should begin with a header of {length:,} bytes, but ends {size - 8:,} bytes later")
    if length > HEADER_LIMIT:
        raise _Wrong(f"its header of {length:,} bytes is larger than the {HEADER_LIMIT:,} that are read")
    data = file.read(length)
    if sum(data.count(separator) for separator in (b",", b"[", b"{", b":")) > _VALUES_LIMIT:
        raise _Wrong(f"its header holds more than {_VALUES_LIMIT:,} values")
    try:
        header = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise _Wrong(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _Wrong("its header is no JSON object")
    return header, size - 8 - length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Wrong("its header gives a name twice")
    return found


def _check_tensors(header: dict[str, Any], size: int) -> None:
    """Check that the tensors lie end to end in ``size`` bytes, each as long as its type and shape say; drop the rest."""
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise _Wrong("its __metadata__ is no object of strings")
    spans = sorted((*_span(_short(name), entry, size), _short(name)) for name, entry in header.items())
    position, before = 0, "the header"
    for begin, end, name in spans:
        if begin != position:
            problem = "overlaps" if begin < position else f"leaves {begin - position:,} bytes behind"
            raise _Wrong(f"tensor {name} {problem} {before}")
        position, before = end, name
    if position != size:
        raise _Wrong(f"its tensors take {position:,} bytes, but {size:,} follow the header")


def _span(name: str, entry: Any, size: int) -> tuple[int, int]:
    """First byte of a tensor and the byte after it, counted from the end of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _Wrong(f"tensor {name} has dtype {_short(dtype)}, which is none of {', '.join(_BITS)}")
    if not _sizes(shape):
        raise _Wrong(f"tensor {name} has shape {_short(shape)}, which is no list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Wrong(f"tensor {name} has data_offsets {_short(offsets)}, which are no beginning and end")
    begin, end = offsets
    if end > size:
        raise _Wrong(f"tensor {name} ends at byte {end:,}, but the file holds {size:,} behind its header")
    elements = 0 if 0 in shape else 1
    for length in shape if elements else ():
        elements *= length
        if elements > _SIZE_LIMIT:  # a product of many sizes could be a number of any length
            raise _Wrong(f"tensor {name} has shape {_short(shape)}, which is larger than any file")
    if elements * _BITS[dtype] != 8 * (end - begin):
        raise _Wrong(f"tensor {name} is {end - begin:,} bytes long, which is not {dtype} of shape {_short(shape)}")
    return begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < _SIZE_LIMIT for number in value)


def _short(value: Any) -> str:
    """``value`` as it would be printed, cut where it is long: it comes from the file."""
    text = ascii(value[:80] if isinstance(value, str) else value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in ``folder``: one, those its index names, or none.

    Raises:
        ValueError: the index is damaged, or names files outside of the folder.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        return []
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} lists no weights; save or download the model again.")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {_short(name)} as a part of the weights, which is no safetensors file.")
        _check_name(folder / INDEX, name)
    return [folder / name for name in sorted(set(names.values()))]


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors weights, or with a file of them missing, cut short or otherwise damaged.

    Raises:
        FileNotFoundError: there are no weights, or a part of them is missing.
        ValueError: they are pickled or damaged.
    """
    files = weight_files(folder)
    if not files:
        if pickles := pickled(folder):
            refuse_pickles(folder, pickles)
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}; was the training that writes it finished? Weights in the format of "
            "another library must be saved as safetensors first, with transformers: "
            "AutoModel.from_pretrained(MODEL).save_pretrained(FOLDER)."
        )
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{folder} lacks {file.name}, a part of its weights; copy or download the model again.")
        tensors |= read_header(file)
    if (folder / "config.json").exists():
        _check_sizes(folder / "config.json", tensors)


def _check_sizes(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Refuse a configuration of a model far larger than its weights, which would be built before anybody misses them."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged (it holds no mapping); save or download the model again.")

    def size(*names: str) -> int:
        return max([0, *(config[name] for name in names if type(config.get(name)) is int)])

    width, layers = size("hidden_size", "dim", "d_model"), size("num_hidden_layers", "n_layers", "num_layers", "n_layer")
    inner, labels = size("intermediate_size", "hidden_dim", "d_ff"), size("num_labels")
    tables = size("vocab_size") + size("max_position_embeddings") + size("type_vocab_size")
    # Also a layer or a label of no width takes memory.
    described = layers * (4 * width * width + 3 * width * inner + 10_000) + tables * width + labels * (width + 100)
    stored = sum(math.prod(shape) for _, shape in tensors.values())
    if described > max(_SHARED * stored, _SMALL):
        digits = int(described.bit_length() * math.log10(2))  # the number itself may be too long to print
        raise ValueError(
            f"{file} describes a model of about 10^{digits} numbers, but its weights hold {stored:,}; save or download the "
            "model again."
        )


def pickled(folder: Path) -> list[str]:
    """Names of the files in ``folder`` that are pickles, as far as their names say so."""
    return sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))


def refuse_pickles(folder: Path, names: list[str], opener: str = "AutoModel") -> NoReturn:
    raise ValueError(
        f"{folder} holds weights only as a pickle ({', '.join(names)}), which can run code when it is opened; if you trust it, "
        f"save it as safetensors first: {opener}.from_pretrained({str(folder)!r}).save_pretrained(FOLDER)."
    )


# --------------------------------------------------------------------------------------------------------------- names


def check_model(folder: Path) -> None:
    """All checks of this module: to be called before a model is opened.

    Raises: as :func:`check_paths` and :func:`check_weights` do.
    """
    check_paths(folder)
    check_weights(folder / next(_module_paths(folder)) if (folder / "modules.json").exists() else folder)


def check_paths(folder: Path) -> None:
    """Refuse a model folder in which a name leads out of it: modules, code, parts of the weights, or links.

    Links of the Hub's cache, which lead into the same repository's ``blobs``, are what they should be.

    Raises:
        ValueError: naming the file and the name in it.
    """
    encoder = folder
    places = [folder]
    if (folder / "modules.json").exists():
        paths = list(_module_paths(folder))
        places += [folder / path for path in paths]
        encoder = folder / paths[0]
    _check_links(places)
    for place in dict.fromkeys((folder, encoder)):
        for name in ("config.json", "tokenizer_config.json"):
            _check_code(place / name)
    weight_files(encoder)
    for place in places:
        if place != encoder and place != folder and (pickles := pickled(place)) and not weight_files(place):
            refuse_pickles(folder, [f"{place.relative_to(folder)}/{name}" for name in pickles], "SentenceTransformer")


def _module_paths(folder: Path) -> Iterator[str]:
    file = folder / "modules.json"
    listed = read_json(file)
    if not isinstance(listed, list) or not listed or not all(isinstance(module, dict) for module in listed):
        raise ValueError(f"{file} does not list a model's modules; save or download the model again.")
    for module in listed:
        path = module.get("path")
        if not isinstance(path, str):
            raise ValueError(f"{file} does not say where its modules lie; save or download the model again.")
        _check_name(file, path)
        yield path


def _check_code(file: Path) -> None:
    """Refuse an auto_map that names anything but Python files, and kernels from the Hub: transformers runs them unasked."""
    settings = read_json(file) if file.exists() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged (it holds no mapping); save or download the model again.")
    for key, value in settings.items():
        named = value.values() if isinstance(value, dict) else [value]
        if key.endswith(("_implementation", "_implementation_internal")) and any("/" in str(name) for name in named):
            raise ValueError(
                f"{file} asks for {_short(value)} as its {key}, code from the Hub that opening it would run; delete that line."
            )
    found = settings.get("auto_map")
    if found is None:
        return
    if not isinstance(found, dict | list):
        raise ValueError(f"{file} has an auto_map that is no mapping; save or download the model again.")
    for value in found.values() if isinstance(found, dict) else found:
        for code in value if isinstance(value, list) else [value]:
            if code is not None and not (isinstance(code, str) and _CODE.fullmatch(code)):
                raise ValueError(
                    f"{file} has {_short(code)} in its auto_map, which is not module.Class of a file there; do not use "
                    "this model, or ask who made it."
                )


def _check_name(file: Path, name: str) -> None:
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or "\0" in name:
        raise ValueError(
            f"{file} names {_short(name)}, which lies outside of the folder; do not use this model, or ask who made it."
        )


def _check_links(places: list[Path]) -> None:
    """Check that the files to read in ``places``, the model's folder and those of its modules, really lie there."""
    folder, *inner = places
    root = _root(folder)
    for file in _entries(folder, inner):
        target = Path(os.path.realpath(file))
        if file.is_symlink() and not target.is_relative_to(root):
            raise ValueError(f"{file} is a link to {target}, outside of its folder; copy the file itself there if it is meant.")


def _entries(folder: Path, inner: list[Path]) -> Iterator[Path]:
    # Other links beside a model are nobody's business: its folder may be one that people work in.
    yield from (file for file in folder.iterdir() if file.suffix in _READ)
    for place in dict.fromkeys(inner):
        for step in range(len(place.relative_to(folder).parts), 0, -1):  # the folders on the way could be links
            yield Path(folder, *place.relative_to(folder).parts[:step])
        if place != folder:
            for found, folders, files in os.walk(place):  # follows no links
                yield from (Path(found, name) for name in (*folders, *files))


def _root(folder: Path) -> Path:
    """What links may lead to: the folder, or in the Hub's cache (models--owner--name/snapshots/commit) its repository."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and re.match(r"(models|datasets|spaces)--", parent.parent.name):
            return parent.parent
    return folder


@contextlib.contextmanager
def opening(model: str | Path) -> Iterator[None]:
    """Open ``model`` in here, which one thread does at a time; a configuration that does not fit its weights is said in one
    sentence.

    While transformers builds a model, it replaces ``tie_weights`` of the class that all models share by a function that does
    nothing; of two threads that do so at once, one may put that back for good, and every later model is left untied.

    Raises:
        ValueError: naming the model.
    """
    try:
        with _TURNS.setdefault(os.getpid(), threading.RLock()):
            yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights in {model} do not have the shapes its config.json describes; save or download the model again."
        ) from error
