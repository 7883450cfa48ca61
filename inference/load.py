"""Open models, tokenizers and configurations, after checking the files of the model.

All opening goes through this module. It alone decides which arguments the libraries get, so
that nothing in a model's folder can replace them.
"""

import filecmp
import hashlib
import logging
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from minibert import MiniBertConfig, modeling_minibert
from minibert.files.disk import delete, expand_home, read_json, read_settings
from minibert.files.model_folder import (
    check_paths,
    check_weights,
    code_files,
    encoder_folder,
    opening,
    refuse_missing,
    weight_files,
)
from minibert.files.processes import processes
from minibert.files.tokenizer_files import check_tokenizer

logger = logging.getLogger(__name__)

# The files of a model to download. Weights in other formats are never used.
_WANTED_FILES = ["*.json", "*.txt", "*.model", "*.py", "*.safetensors"]
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
# Files that determine the vectors of a model, unlike the card, the pictures and the code.
_DECIDING = (
    *("*.safetensors", "config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "merges.txt", *_TOKENIZERS),
)
PASSAGES = ("document", "passage", "corpus")  # names of a prompt for passages; the first one that is not empty is used
_TEXT = "A short text, 42!"  # to try a model and a tokenizer
_warned: set[Path] = set()  # folders for which a warning was logged


def load(
    model: str | Path,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
) -> SentenceTransformer:
    """Open ``model`` as a sentence-transformers model.

    If the folder has no ``modules.json``, the vectors are pooled and scaled to length 1. The
    pooling is the setting ``pooling`` in ``config.json``, or else the mean.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        device: a device such as ``"cpu"`` or ``"cuda:1"``. The default is the best one
            available.
        trust_remote_code: run Python code that comes with the model. Models of this package and
            of transformers do not need such code.
        dtype: the dtype of the weights and the computation. The default is the dtype in the
            configuration of the model.

    Example::

        model = load("runs/quickstart/2-embed")
        passages = model.encode(["invert a matrix", "order items"])
        model.similarity(model.encode(["sort a list"]), passages)  # (1, 2)

    Raises:
        FileNotFoundError: if the model is neither a folder nor on the Hub, or the folder has no
            weights or no tokenizer.
        ValueError: if the weights are damaged, incomplete or pickled, or do not fit the
            configuration. Also if the model needs code that is not trusted.
    """
    folder = find_model(model, trust_remote_code=trust_remote_code)
    with opening(folder):
        if (folder / "modules.json").exists():
            weights = weight_arguments(trust_remote_code, dtype=dtype)
            opened = SentenceTransformer(str(folder), device=device, model_kwargs=weights, trust_remote_code=trust_remote_code)
        else:
            encoder = _transformer(folder, trust_remote_code, dtype)
            mode = getattr(encoder.config, "pooling", "mean")
            modules = [encoder, Pooling(encoder.get_embedding_dimension(), pooling_mode=mode), Normalize()]
            opened = SentenceTransformer(modules=modules, device=device, similarity_fn_name="cosine")
    check_complete(opened.transformers_model, folder)
    check_usable(opened.tokenizer, folder)
    opened.prompts["document"] = next(filter(None, map(opened.prompts.get, PASSAGES)), "")  # the library reads this name
    positions = getattr(opened[0].config, "max_position_embeddings", None)
    if positions and getattr(opened[0].config, "position_embedding_type", None) != "rotary":
        opened.max_seq_length = min(opened.max_seq_length or positions, positions)
    if isinstance(opened.transformers_model, modeling_minibert.MiniBertModel):
        for module in list(opened)[1:]:
            module.float()  # the hidden states of a MiniBERT are float32 in any dtype
    with opening(folder):  # settings that contradict each other show in the first vector
        if opened.encode([_TEXT], show_progress_bar=False).ndim != 2:
            raise ValueError(f"{folder} does not compute one vector for a text; use another model.")
    # A reference cycle with the card would keep the weights until a full collection.
    opened.model_card_data.model = cast(SentenceTransformer, weakref.proxy(opened))
    return opened


def open_config(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the configuration of ``model``, a folder or an id on the Hub."""
    folder = checked_folder(model, trust_remote_code)
    with opening(folder):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config


def open_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``model``, which may be a folder with only a tokenizer."""
    folder = checked_folder(model, trust_remote_code)
    with opening(folder):
        # Without trust_remote_code=False, transformers would ask a question on the terminal.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_usable(tokenizer, folder)
    return tokenizer


def check_usable(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise ValueError if ``tokenizer`` cannot read a text with an unknown word."""
    with opening(folder):
        # A call of the tokenizer itself would change how it is saved.
        getattr(tokenizer, "backend_tokenizer", tokenizer).encode(_TEXT)
        tokenizer.convert_tokens_to_ids("\0")


def open_weights(
    model_class: Any,
    model: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    **changes: Any,
) -> Any:
    """Open ``model`` as ``model_class``, such as ``AutoModel``.

    ``changes`` are other arguments of ``from_pretrained``, or fields of the configuration. With
    ``output_loading_info=True``, a pair of the model and a report is returned.
    """
    folder = checked_folder(model, trust_remote_code)
    check_weights(folder)
    arguments = weight_arguments(trust_remote_code, dtype=dtype, attn_implementation=attn_implementation)
    with opening(folder):
        return model_class.from_pretrained(folder, **changes, **arguments)


def weight_arguments(
    trust_remote_code: bool, *, dtype: str | torch.dtype | None = None, attn_implementation: str | None = None
) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` with which no pickle is read, and no code runs unless trusted."""
    return {
        **({"dtype": dtype} if dtype else {}),
        "use_safetensors": True,
        "weights_only": True,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attn_implementation,
    }


def embedder(
    encoder: Any, tokenizer: Any, start: Path, pooling: Any, normalize: bool, projection: int | None = None, **options: Any
) -> SentenceTransformer:
    """Return a sentence-transformers model of ``encoder``, pooling and optional normalization.

    ``start`` is a temporary folder. If the pooled vectors have another size than ``projection``, a
    linear map to this size follows. ``options`` are passed to :class:`SentenceTransformer`.
    """
    state = processes()
    if state.is_main_process:
        encoder.save_pretrained(start)
        tokenizer.save_pretrained(start)
    state.wait_for_everyone()
    with opening(start):
        transformer = _transformer(start, False)
    state.wait_for_everyone()
    if state.is_main_process:
        delete(start, ("*.json", "*.safetensors", "*.py", "*.txt", "*.model", "*.jinja"))
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, pooling_mode=pooling)]
    if projection not in (None, width):
        modules.append(Dense(width, projection, bias=False, activation_function=None))
    return SentenceTransformer(modules=modules + [Normalize()] * normalize, **{"similarity_fn_name": "cosine"} | options)


def _transformer(folder: Path, trust_remote_code: bool, dtype: str | torch.dtype | None = None) -> Transformer:
    trusting = {"trust_remote_code": trust_remote_code}
    weights = weight_arguments(trust_remote_code, dtype=dtype)
    module: Transformer = Transformer(str(folder), model_kwargs=weights, processor_kwargs=trusting, config_kwargs=trusting)
    return module


def checked_folder(model: str | Path, trust_remote_code: bool = False) -> Path:
    """Find a model, check its settings, tokenizer and links, and return the folder of the transformer.

    Raises: the same errors as :func:`load`. The weights are not checked.
    """
    folder = find_folder(model)
    check_paths(folder, trust_remote_code=trust_remote_code)
    encoder = encoder_folder(folder)
    check_tokenizer(encoder)
    # For a known model type, the installed class is used, not the code in the folder.
    config = read_settings(encoder / "config.json")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise ValueError(
            f"{folder} contains its own Python code, which would run when the model is opened. Training never runs it. "
            "Other commands do if you read the code, trust it, and pass --trust-remote-code (trust_remote_code=True)."
        )
    return encoder


def find_model(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Find a model in a folder or on the Hub, check its files, and return its folder.

    Raises: the same errors as :func:`load`.
    """
    folder = find_folder(model)
    encoder = checked_folder(folder, trust_remote_code)
    check_weights(encoder)
    if not any(file for name in _TOKENIZERS for file in encoder.glob(name)):
        raise FileNotFoundError(f"{folder} holds no tokenizer (tokenizer.json); save it in this folder.")
    if read_json(encoder / "config.json").get("model_type") == MiniBertConfig.model_type:
        _compare_code(encoder)
    return folder


def finite(values: Any) -> Any:
    """Return ``values``, a tensor or an array, after checking that all of them are numbers.

    Raises:
        FloatingPointError: if any is NaN or infinite.
    """
    if not bool((values.isfinite() if isinstance(values, torch.Tensor) else np.isfinite(values)).all()):
        raise FloatingPointError(
            "The model computes NaN (not a number) or infinity, so its results mean nothing. Compute in float32, or save or "
            "train the model again."
        )
    return values


def find_folder(model: str | Path, revision: str | None = None) -> Path:
    """Return ``model`` if it is a folder. Otherwise, download the model from the Hub."""
    folder, name = expand_home(model), str(model)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") > 1 or name.startswith(("/", ".", "~")):
        refuse_missing(model, "give the folder of a model, or the id (owner/name) of one on the Hub")
    here = f"There is no model folder {model} (looked from {Path.cwd()})"
    if "/" in name and folder.parent.is_dir():  # probably a typo
        raise FileNotFoundError(
            f"{here}, but there is a folder {folder.parent}; fix the path. If you mean the Hub, "
            "run from a directory without a folder of that name."
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{here}, and the Hub did not send a model of this name ({reason}); check the name.") from error


def _compare_code(folder: Path) -> None:
    """Log one warning if the code of a checkpoint differs from the installed code.

    The installed code is used in any case.
    """
    differing = [
        file.name
        for file in code_files()
        if (folder / file.name).exists() and not filecmp.cmp(folder / file.name, file, shallow=False)
    ]
    if differing and folder.resolve() not in _warned:
        _warned.add(folder.resolve())
        logger.warning(
            "%s %s from the installed code. The installed code is used, and may compute other vectors.",
            f"{folder / differing[0]}{''.join(f' and {name}' for name in differing[1:])}",
            "differ" if len(differing) > 1 else "differs",
        )


def pooling_mode(folder: Path) -> str | None:
    """Return a model's pooling, such as ``"mean"``, or None if there are several or none."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").exists() else []
    paths = [str(module["path"]) for module in modules if str(module.get("type", "")).endswith(".Pooling")]
    mode = Pooling.load_config(str(folder), subfolder=paths[0]).get("pooling_mode") if paths else None
    return mode if isinstance(mode, str) else None


def check_complete(model: PreTrainedModel | None, source: str | Path) -> None:
    """Raise a ValueError if weights of the encoder are missing. The pooler may be missing.

    ``source`` is the folder or Hub id of ``model``.
    """
    if model is None:
        return
    encoder: Any = model.base_model
    folder = encoder_folder(find_folder(source))
    stored: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
        stored |= {name.removeprefix(f"{encoder.base_model_prefix}.") for name in names}
    missing = [name for name in encoder.state_dict() if name not in stored]
    if missing and not isinstance(encoder, modeling_minibert.MiniBertModel):  # transformers also knows earlier names
        report = open_weights(type(encoder), folder, config=encoder.config, device_map="meta", output_loading_info=True)[1]
        missing = sorted(report["missing_keys"])
    if missing := [name for name in missing if not name.startswith("pooler.")]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"The weights in {source} lack {shown}; save or download the model again.")


def fingerprint(model: Path) -> str:
    """Return the SHA-256 of the files that determine the vectors of a model.

    The files are the weights, configurations, tokenizer and list of modules. Two folders with
    the same files have the same fingerprint.
    """
    modules = read_json(model / "modules.json") if (model / "modules.json").exists() else []
    folders = sorted({model, *(model / module["path"] for module in modules)})
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(file for pattern in _DECIDING for file in folder.glob(pattern)):
            digest.update(f"{file.relative_to(model).as_posix()} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
