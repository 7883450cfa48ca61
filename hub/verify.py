"""Check the files, weights, code and card of a model, and open it in a fresh process."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from minibert import MiniBertConfig, configuration_minibert, modeling_minibert
from minibert.files.disk import expand_home, read_json, read_settings, sha256
from minibert.files.installation import version
from minibert.files.model_folder import (
    check_paths,
    code_files,
    encoder_folder,
    module_list,
    pickles,
    read_header,
    refuse_missing,
)
from minibert.hub import folders, isolated, parity
from minibert.hub.card import check_card, longest_text, vector_dimension
from minibert.hub.convert import TOKENIZERS, empty, full
from minibert.hub.families import CLASSES
from minibert.hub.remote import fetch, split_name
from minibert.inference.load import open_tokenizer, open_weights, weight_arguments

_LIBRARIES = ("sentence_transformers.", "torch.nn.")


@dataclass
class Check:
    """Store the result of one check.

    ``state`` is ``"ok"``, ``"failed"``, or ``"skipped"`` if an earlier check failed. ``text`` is a
    sentence about the result. ``detail`` is a diff against the installed code, or None.
    """

    name: str
    state: str
    text: str
    detail: str | None = None


@dataclass
class Verification:
    """Store the results of all checks. ``commit`` is None for a local folder."""

    model: str
    commit: str | None
    checks: list[Check]
    ok: bool


@dataclass
class Code:
    """Describe the Python code that could run when a model is opened.

    ``files`` maps the path of each file to its SHA-256. ``reasons`` are sentences about the
    differences from the installed version. ``diff`` is a unified diff.
    """

    files: dict[str, str]
    reasons: list[str]
    diff: str

    @property
    def state(self) -> str:
        """Return "none" without code, "installed" for unchanged code, otherwise "changed"."""
        return "changed" if self.reasons else "installed" if self.files else "none"


def verify(model: str | Path, *, trust_remote_code: bool = False, token: str | None = None) -> Verification:
    """Check a model folder, or the model ``USER/NAME[@REVISION]`` on the Hub.

    Args:
        model: model folder, or name of a model on the Hub.
        trust_remote_code: whether a fresh process may run code that differs from the installed
            version.
        token: access token of the Hub. The default is HF_TOKEN, or the stored login.

    Raises:
        FileNotFoundError: if the folder does not exist or is not a model folder.
        ValueError: if the name is malformed, or the model on the Hub has no safetensors file or
            arrived damaged.
        HubError: if the Hub refuses the request or cannot be reached.
    """
    folder, commit, others = expand_home(model), None, []
    if not folder.is_dir():
        name = str(model).partition("@")[0]
        if folder.exists() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
            refuse_missing(model, "give the folder of a model, or owner/name[@revision] on the Hub")
        repo_id, revision = split_name(str(model))
        commit, folder, files = fetch(repo_id, revision, token)
        others = sorted(files.keys() - set(folders.paths_in(folder)))
    elif not any((folder / name).exists() for name in ("config.json", "modules.json")):
        raise FileNotFoundError(
            f"{folder} is not a model folder: it contains no config.json. For a run, give the folder of a stage."
        )
    checks = checks_of(folder, trust=trust_remote_code, opens=True, other_files=others)
    return Verification(str(model), commit, checks, all(check.state == "ok" for check in checks))


def checks_of(
    folder: Path,
    *,
    trust: bool = False,
    opens: bool = False,
    other_files: Sequence[str] = (),
) -> list[Check]:
    """Check a model folder, and return one result for each check.

    If ``opens`` is True, also open the model in a fresh process. ``trust`` allows code that
    differs from the installed code. ``other_files`` are files on the Hub that ``folder`` lacks.
    """
    # Name of a check -> (its function, names of the checks that must pass first). Later checks
    # do not read a folder that failed.
    looks: dict[str, tuple[Callable[[], str], tuple[str, ...]]] = {
        "files": (lambda: _files(folder, other_files), ()),
        "weights": (lambda: _weights(folder), ("files",)),
        "code": (lambda: _judge(code_of(folder), folder, trust), ("files",)),
        "card": (lambda: _card(folder), ()),
        "opens": (lambda: _opens(folder, trust), ("files", "weights", "code")),
    }
    if not opens:
        del looks["opens"]
    checks: dict[str, Check] = {}
    for name, (look, needed) in looks.items():
        if failed := [other for other in needed if checks[other].state != "ok"]:
            checks[name] = Check(name, "skipped", f"Skipped, because these checks did not pass: {', '.join(failed)}.")
            continue
        try:
            checks[name] = Check(name, "ok", look())
        except Exception as error:  # libraries raise any exception for damaged files
            text = " ".join(str(error).replace(f"{folder}/", "").split())
            known = isinstance(error, ValueError | OSError)
            checks[name] = Check(name, "failed", text if known else f"{type(error).__name__}: {text}")
    if checks["code"].state != "skipped":
        with suppress(Exception):  # the failed check already says why
            checks["code"].detail = code_of(folder).diff or None
    return list(checks.values())


def _files(folder: Path, other_files: Sequence[str]) -> str:
    check_paths(folder, trust_remote_code=True)  # code is another check
    present = folders.paths_in(folder)
    if found := pickles([*present, *other_files]):
        raise ValueError(f"{', '.join(found)} can run code when opened; delete these files, since safetensors suffice.")
    return f"{len(present)} files, no pickle, and no path that leads out of the folder."


def _weights(folder: Path) -> str:
    encoder = folders.checked_encoder(folder)
    for file in folder.rglob("*.safetensors"):
        read_header(file)
    checkpoint = folders.read_tensors(encoder)
    model_class = _model_class(read_json(encoder / "config.json"))
    problems = _misfits(encoder, model_class, checkpoint) if model_class else {}
    if found := "; ".join(f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names):
        raise ValueError(f"The weights do not match config.json; {found}. Save the model again.")
    shapes = "of the expected shapes" if model_class else "(only the model's own code knows the expected shapes)"
    return f"{len(checkpoint)} tensors {shapes}, all finite."


def _model_class(config: dict[str, Any]) -> type[PreTrainedModel] | None:
    """Return the class named in config.json, or None if this class is not installed."""
    name = str((config.get("architectures") or ["MiniBertModel"])[0])
    if config.get("model_type") == MiniBertConfig.model_type:
        if not hasattr(modeling_minibert, name):
            raise ValueError(f"config.json has the class {name}, which MiniBERT does not have; correct the name.")
        return getattr(modeling_minibert, name)
    found = getattr(transformers, name, None) if config.get("model_type") in CONFIG_MAPPING else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _misfits(encoder: Path, model_class: type[PreTrainedModel], checkpoint: dict[str, Tensor]) -> dict[str, list[str]]:
    """Return problem -> names of the tensors that do not fit ``model_class``."""
    with parity.quiet():
        network, loaded = open_weights(model_class, encoder, output_loading_info=True, ignore_mismatched_sizes=True)
    pooler = "pooler." if "For" not in model_class.__name__ else "no such"  # a bare encoder may lack the pooler
    unknown: set[str] = set()
    if isinstance(network.config, MiniBertConfig):  # a checkpoint may contain tensors of other heads
        known = {full(name, kind) for kind in CLASSES for name in empty(network.config, kind).state_dict()}
        unknown = {name for name in loaded["unexpected_keys"] if not {name, full(name, "Model")} & known}
    pairs = dict(network._tied_weights_keys or {}) if network.config.tie_word_embeddings else {}
    both = [(target, source) for target, source in pairs.items() if {target, source} <= checkpoint.keys()]
    return {
        "missing": sorted(name for name in loaded["missing_keys"] if not name.removeprefix("minibert.").startswith(pooler)),
        "of another shape": [f"{name} is {[*found]}, not {[*shape]}" for name, found, shape in loaded["mismatched_keys"]],
        "unknown": sorted(unknown),
        "different despite tie_word_embeddings": [
            f"{target} and {source}" for target, source in both if not torch.equal(checkpoint[target], checkpoint[source])
        ],
    }


def _judge(code: Code, folder: Path, trust: bool) -> str:
    if code.state == "none":
        if "auto_map" in read_json(encoder_folder(folder) / "config.json"):
            raise ValueError("config.json lists code (auto_map) that is not in the folder; minibert hub push adds the code.")
        return "The model has no code."
    if code.state == "installed":
        return f"{', '.join(sorted(code.files))} are equal to the installed minibert {version()}."
    why = f"The code differs from the installed minibert {version()}: {'; '.join(code.reasons)}"
    if not trust:
        raise ValueError(f"{why}; read the code, and pass --trust-remote-code if you want to run it.")
    return f"{why}; you allowed it with --trust-remote-code."


def _card(folder: Path) -> str:
    if not (folder / "README.md").exists():
        raise ValueError("The model card README.md is missing; minibert hub push writes a card.")
    check_card((folder / "README.md").read_text(encoding="utf-8"))
    return "README.md has valid metadata."


def _opens(folder: Path, trust: bool) -> str:
    check_paths(folder, trust_remote_code=trust)
    if problems := "; ".join(_tokenizer_problems(folder)):
        raise ValueError(f"{problems}; save the model's own tokenizer into its folder.")
    try:
        outputs, opened = isolated.run(request_for(folder))
    except isolated.NotOpened as error:
        raise ValueError(f"The model cannot be opened in a fresh process without minibert: {error}") from None
    if wrong := [name for name, value in outputs.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"Outputs are not finite in a fresh process without minibert: {', '.join(wrong)}; try float32.")
    vectors, stated = outputs.get("SentenceTransformer.encode"), vector_dimension(folder)
    if vectors is not None and vectors.shape[-1] != stated:
        raise ValueError(
            f"The vectors have dimension {vectors.shape[-1]}, but the modules' configuration says {stated}; "
            "correct the configuration."
        )
    similarity = read_settings(folder / "config_sentence_transformers.json").get("similarity_fn_name")
    if similarity not in (*SentenceTransformer.SUPPORTED_SIMILARITY_FN_NAMES, None):  # an unknown name would mean cosine
        raise ValueError(
            f"similarity_fn_name={similarity!r} in config_sentence_transformers.json is unknown; use cosine or dot."
        )
    return f"In a fresh process without minibert: {', '.join(opened)}."


def _tokenizer_problems(folder: Path) -> Iterator[str]:
    encoder = encoder_folder(folder)
    config = read_json(encoder / "config.json")
    if not any(file for name in TOKENIZERS for file in encoder.glob(name)):
        yield "There is no tokenizer (tokenizer.json)"
        return
    tokenizer = open_tokenizer(encoder)
    rows, pad = int(config.get("vocab_size", 0)), config.get("pad_token_id")
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        yield f"the tokenizer's highest id is {highest}, but the model has vocab_size={rows}"
    if pad is not None and tokenizer.pad_token_id not in (None, pad):
        yield f"the tokenizer pads with {tokenizer.pad_token_id}, but the model has pad_token_id={pad}"
    positions = config.get("max_position_embeddings")
    longest = tokenizer.model_max_length
    if longest > 10**9:  # not set
        longest = folders.max_length(folder) or longest
    if positions and config.get("position_embedding_type") != "rotary" and longest > positions:
        yield f"the tokenizer allows {longest} tokens, but the model has max_position_embeddings={positions}"


def request_for(folder: Path) -> isolated.Request:
    """Return a request to open ``folder`` with ``AutoModel`` and its head."""
    encoder = encoder_folder(folder)
    config = read_json(encoder / "config.json")
    named = (config.get("architectures") or ["Model"])[0]
    head = "AutoModel" + (f"For{named.partition('For')[2]}" if "For" in named else "")
    return isolated.Request(
        model=str(folder.resolve()),
        transformer=str(encoder.resolve()) if encoder != folder else None,
        heads=list(dict.fromkeys(["AutoModel", head])),
        embeds=bool(module_list(folder)),
        arguments=weight_arguments("auto_map" in config),
        max_length=min(64, longest_text(folder) or 64),
    )


def code_of(folder: Path) -> Code:
    """Return the Python code of a model, and how it differs from the installed code."""
    encoder = encoder_folder(folder)
    installed = {file.name: file for file in code_files()}
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.py"))}
    reasons, diff = _foreign_names(folder, encoder), ""
    for path, file in files.items():
        own = installed.get(file.name) if file.parent in (encoder, folder) else None
        if own is None:
            reasons.append(f"{path} is not a file of minibert")
        elif file.read_bytes() != own.read_bytes():
            reasons.append(f"{path} was changed")
            before, after = (side.read_text("utf-8", "replace").splitlines(True) for side in (own, file))
            diff += "".join(difflib.unified_diff(before, after, f"installed/{own.name}", path))
    return Code({path: sha256(file) for path, file in files.items()}, reasons, diff)


def _foreign_names(folder: Path, encoder: Path) -> list[str]:
    """Return the settings that import unknown code."""
    config = read_json(encoder / "config.json")
    found = []
    known = configuration_minibert.AUTO_MAP
    mapped = config.get("auto_map") or {}
    if not isinstance(mapped, dict) or any(known.get(name) != value for name, value in mapped.items()):
        found.append(f"config.json sets auto_map to {mapped}")
    if config.get("custom_pipelines"):
        found.append("config.json sets custom_pipelines")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if read_settings(encoder / name).get("auto_map"):
            found.append(f"{name} refers to code")
    for module in module_list(folder):
        names = [str(module.get("type", ""))]
        if module["path"]:
            settings = read_settings(folder / module["path"] / "config.json")
            names += [str(settings.get("activation_function", _LIBRARIES[0]))]
        found += [f"modules.json refers to {name}" for name in names if not name.startswith(_LIBRARIES)]
    return found
