"""Check the settings in a model's JSON files before a library opens the model.

Libraries pass such settings on as arguments. Some of them load other files, other packages or
code, or take memory without a limit. The modules of sentence-transformers therefore get known
settings of known types only, and the settings of transformers are searched for those that do
harm.
"""

import math
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from minibert.files.disk import read_settings

# Numbers that the settings of a module may describe, and characters of a prompt.
_MODULE_LIMIT = 2**26
_PROMPT_LIMIT = 10_000
# A configuration may describe _SHARED times as many numbers as the weights contain, since
# layers can share weights. Up to _SMALL numbers are always allowed.
_SHARED = 16
_SMALL = 2**28

_NUMBER = (int, float)
_WIDTHS = {"embedding_dimension": int, "word_embedding_dimension": int}
_NAMES = {"module_input_name": str, "module_output_name": str}
_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_POOLING = re.compile("cls|mean|max|mean_sqrt_len_tokens|weightedmean|lasttoken")
_ACTIVATION = re.compile(r"torch\.nn\.(modules\.(activation|linear)\.)?[A-Z]\w*")
_TO_MODEL = {"output_hidden_states": bool, "add_pooling_layer": bool, "dtype": str, "torch_dtype": str}
_TO_TOKENIZER = {"model_max_length": int, "padding_side": str, "do_lower_case": bool, "use_fast": bool}
# Module of sentence-transformers -> its settings -> their types. Null is always allowed.
_MODULES: dict[str, dict[str, Any]] = {
    "Transformer": {
        **{"max_seq_length": int, "query_length": int, "document_length": int},
        **{"do_lower_case": bool, "unpad_inputs": bool},
        **{f"{owner}_{suffix}": _TO_MODEL for owner in ("model", "config") for suffix in ("args", "kwargs")},
        **{f"{owner}_{suffix}": _TO_TOKENIZER for owner in ("tokenizer", "processor") for suffix in ("args", "kwargs")},
        "transformer_task": re.compile("feature-extraction"),
        "modality_config": {"text": {"method": re.compile("forward"), "method_output_name": str}},
        "module_output_name": str,
        "processing_kwargs": {},
    },
    "Pooling": {
        **{f"pooling_mode_{name}": bool for name in _POOLINGS},
        **{"pooling_mode": (_POOLING, [_POOLING]), "include_prompt": bool, **_WIDTHS},
    },
    "Dense": {
        **{"in_features": int, "out_features": int, "bias": bool, "use_residual": bool},
        **{"activation_function": _ACTIVATION, **_NAMES},
    },
    "Normalize": _NAMES,
    "LayerNorm": {"dimension": int},
    "Dropout": {"dropout": _NUMBER},
    "WeightedLayerPooling": {**_WIDTHS, "layer_start": int, "num_hidden_layers": int},
    "LSTM": {**_WIDTHS, "hidden_dim": int, "num_layers": int, "dropout": _NUMBER, "bidirectional": bool},
    "CNN": {
        **{"in_embedding_dimension": int, "in_word_embedding_dimension": int, "out_channels": int},
        **{"kernel_sizes": list, "stride_sizes": list},
    },
}
_MODULE_FILES = ("config.json", "cnn_config.json", "lstm_config.json")
_MODULE_CLASS = re.compile(r"sentence_transformers\.(models|(base|sentence_transformer)\.modules)(\.\w+)?\.(\w+)")

# Files of transformers whose settings can name code, and the kernels that replace attention.
_TRANSFORMERS_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# File -> settings that this package or the libraries read unchecked -> their types.
_USED: dict[str, dict[str, Any]] = {
    "config.json": {
        **dict.fromkeys(("model_type", "pooling", "problem_type", "position_embedding_type"), str),
        **dict.fromkeys(("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers"), int),
        **{"architectures": [str], "id2label": dict, "label2id": dict, "dtype": str, "torch_dtype": str},
    },
    "tokenizer_config.json": {"model_max_length": _NUMBER, "model_input_names": [str]},
}
_KERNELS = ("_implementation", "_implementation_internal")
_UNUSED_FILES = ("tokenizer_file", "special_tokens_map_file")  # old settings that no library opens
# module.Class, optionally after a folder, and optionally after owner/name-- on the Hub.
_CODE = re.compile(r"(?:[\w.-]+/[\w.-]+--)?(?:\w+/)*\w+\.\w+")


def check_modules(folder: Path, modules: list[dict[str, Any]], *, trust_remote_code: bool) -> None:
    """Raise ValueError if modules.json has an unknown module, or a module an unknown setting.

    With ``trust_remote_code``, other modules and settings are allowed.
    """
    for module in modules:
        name = module.get("type")
        found = _MODULE_CLASS.fullmatch(name) if isinstance(name, str) else None
        known = _MODULES.get(found[4]) if found else None
        place = folder / module["path"]
        if known is None and not trust_remote_code:
            refuse(
                folder / "modules.json",
                f"lists the module class {short(name)}, which is none of {', '.join(_MODULES)} of sentence-transformers",
            )
        if known is not None and not trust_remote_code:
            first = known is _MODULES["Transformer"]
            for file in place.glob("sentence_*_config.json") if first else map(place.joinpath, _MODULE_FILES):
                settings = read_settings(file)
                _check_known(file, settings, known)
                _check_product(file, settings)
    file = folder / "config_sentence_transformers.json"
    settings = read_settings(file)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        refuse(file, "has prompts that are not texts by name")
    if sum(len(text or "") for text in prompts.values()) > _PROMPT_LIMIT:
        refuse(file, f"has prompts of more than {_PROMPT_LIMIT:,} characters")


def _check_known(file: Path, settings: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in settings.items():
        kind = known.get(key)
        if isinstance(kind, dict) and isinstance(value, dict):
            _check_known(file, value, kind)
            continue
        if not _fits(value, kind) and not (value is None and key in known):
            refuse(file, f"sets {short(key)} to {short(value)}, which is not an allowed setting")


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and kind.fullmatch(value) is not None
    if isinstance(kind, list):
        return isinstance(value, list) and all(_fits(part, kind[0]) for part in value)
    if isinstance(kind, tuple):
        return any(_fits(value, one) for one in kind)
    return isinstance(kind, type) and isinstance(value, kind) and (type(value) is not bool or kind is bool)


def _check_product(file: Path, settings: dict[str, Any]) -> None:
    """Refuse sizes that would take much memory, since the size of a layer is a product of them."""
    numbers = [len(value) if isinstance(value, list) else value for value in settings.values() if isinstance(value, int | list)]
    numbers += [size for value in settings.values() if isinstance(value, list) for size in value if isinstance(size, int)]
    if any(number < 0 for number in numbers) or math.prod(max(1, number) for number in numbers) > _MODULE_LIMIT:
        refuse(file, f"describes a module of more than {_MODULE_LIMIT:,} numbers, or of a negative size")


def check_code(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError if the settings of transformers name kernels, other weights or other code.

    ``folder`` is the folder of the transformer. With ``trust_remote_code``, code of another
    repository is allowed.
    """
    if (folder / "adapter_config.json").exists():
        refuse(folder, "holds an adapter (adapter_config.json), which loads another model", "merge it into its model first")
    for name in _TRANSFORMERS_FILES:
        file = folder / name
        settings = read_settings(file)
        for key, value in _items(settings):
            if key.endswith(_KERNELS) and "/" in str(value):
                why = "code from the Hub, which would run when the model is opened"
            elif key == "transformers_weights":
                why = "other weights than model.safetensors"
            elif key.endswith("_file") and key not in _UNUSED_FILES and isinstance(value, str):
                why = "a file that may be outside of the folder"
            elif key == "quantization_config" and value is not None and not _is_installed(value):
                why = "weights of a package that is not installed"
            else:
                continue
            refuse(file, f"sets {short(key)} to {short(value)}, {why}", "delete this line if you trust the rest")
        used = _USED.get(name, {})
        _check_known(file, {key: value for key, value in settings.items() if key in used}, used)
        _check_auto_map(file, settings.get("auto_map") or {}, trust_remote_code)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of nested dictionaries and lists."""
    if isinstance(value, dict):
        yield from value.items()
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _items(part)


def _is_installed(quantization: Any) -> bool:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    package = method.replace("-", "_") if isinstance(method, str) else ""
    return package.isidentifier() and find_spec(package) is not None


def _check_auto_map(file: Path, found: Any, trust_remote_code: bool) -> None:
    if not isinstance(found, dict | list):
        refuse(file, "has an auto_map that is not a mapping")
    for value in found.values() if isinstance(found, dict) else found:
        for code in value if isinstance(value, list) else [value]:
            if code is None:
                continue
            if not isinstance(code, str) or not _CODE.fullmatch(code):
                refuse(file, f"has {short(code)} in its auto_map, which is not module.Class of a file in the folder")
            if "--" in code and not trust_remote_code:
                refuse(file, f"has {short(code)} in its auto_map, which is code of another repository")


def check_size(file: Path, stored: int) -> None:
    """Raise ValueError if ``file`` describes far more than ``stored`` parameters."""
    numbers = [(key, value) for key, value in _items(read_settings(file)) if type(value) is int and value > 0]

    def largest(*endings: str) -> int:
        return max([0, *(value for key, value in numbers if key.endswith(endings))])

    width = largest("hidden_size", "dim", "d_model", "embedding_size", "bottleneck_size", "n_embd")
    inner, labels = largest("intermediate_size", "hidden_dim", "d_ff"), largest("num_labels")
    tables = largest("vocab_size") + largest("positions", "position_embeddings") + largest("type_vocab_size")
    # Some families have several groups or networks in each layer.
    repeated = math.prod(value for key, value in numbers if key.endswith(("groups", "group_num", "networks", "experts")))
    layers = largest("layers", "layer") * repeated
    # Layers and labels take memory even where the width is zero.
    described = layers * (4 * width * width + 3 * width * inner + 10_000) + tables * width + labels * (width + 100)
    if described > max(_SHARED * stored, _SMALL):
        digits = int(described.bit_length() * math.log10(2))  # the number itself may be too long to print
        refuse(
            file,
            f"describes a model of about 10^{digits} parameters, but the weights contain {stored:,}",
            "save or download the model again",
        )


def refuse(file: Path, why: str, advice: str = "do not use this model, or ask its author") -> NoReturn:
    """Raise a ValueError with what is wrong in a file of a model."""
    raise ValueError(f"{file} {why}; {advice}.")


def short(value: Any) -> str:
    """Return the untrusted ``value`` as short, escaped text for an error message."""
    text = ascii(value[:80] if isinstance(value, str) else value[:8] if isinstance(value, list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
