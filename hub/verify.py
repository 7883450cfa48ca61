"""Check a model, in a folder or on the Hub, before it is used: what it consists of, whether it is whole, what it runs."""

import difflib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel

from minibert import MiniBertConfig, configuration_minibert, modeling_minibert
from minibert.files.model_folder import check_file, check_paths, check_weights, code_files
from minibert.hub import folders, isolated, releases
from minibert.hub.card import check_card
from minibert.hub.convert import empty, full
from minibert.hub.remote import copy_plain, fetch, is_pickle, same, sha256, split_name

_LIBRARIES = ("sentence_transformers.", "torch.nn.")
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan", None)


@dataclass
class Check:
    """One thing that was looked at.

    Attributes:
        state: ``"ok"``, ``"failed"``, or ``"skipped"`` where an earlier failure makes it meaningless.
        text: what was found, in a sentence.
        detail: the difference between code files, where there is one.
    """

    name: str
    state: str
    text: str
    detail: str | None = None


@dataclass
class Verification:
    """All checks of one model."""

    model: str
    commit: str | None
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.state == "ok" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass
class Code:
    """The Python code that opening a model could run.

    Attributes:
        files: sha256 of every file of code, by path.
        state: ``"ours"`` for that of a release of ours or the installed one, ``"changed"``, or ``"none"``.
        release: the version that it is of; None where it is of no release.
        reasons: why it is not ours, in the words of its files.
        diff: from the installed files to those of the model, as ``diff -u`` shows it.
    """

    files: dict[str, str] = field(default_factory=dict)
    state: str = "none"
    release: str | None = None
    reasons: list[str] = field(default_factory=list)
    diff: str | None = None

    def __str__(self) -> str:
        """Whose code it is, as the end of a sentence."""
        return "of no release of ours" if self.state == "changed" else f"of {releases.words(self.release)}"


class _Model:
    """A folder, and what the checks share about it; each part is read when it is asked for."""

    def __init__(self, folder: Path, *, trust: bool, other_files: list[str]):
        self.folder, self.trust, self.other_files = folder, trust, other_files

    @cached_property
    def encoder(self) -> Path:
        return folders.encoder_folder(self.folder)

    @cached_property
    def raw(self) -> dict[str, Any]:
        return dict(folders.read_json(self.encoder / "config.json"))

    @cached_property
    def code(self) -> Code:
        return code_of(self.folder)

    @cached_property
    def kind(self) -> str:
        """The class without its family's name, such as ``"ForMaskedLM"``."""
        named = str((self.raw.get("architectures") or ["Model"])[0])
        return f"For{named.partition('For')[2]}" if "For" in named else "Model"

    @cached_property
    def empty(self) -> PreTrainedModel | None:
        """The model without memory for weights, of classes that are installed; None for a family that only its code knows."""
        if self.raw.get("model_type") == MiniBertConfig.model_type:
            if not hasattr(modeling_minibert, f"MiniBert{self.kind}"):
                raise ValueError(f"config.json names the class {self.raw['architectures'][0]}, which MiniBERT lacks.")
            return empty(MiniBertConfig.from_pretrained(self.encoder), self.kind)
        if self.raw.get("model_type") not in CONFIG_MAPPING:
            return None
        config = CONFIG_MAPPING[self.raw["model_type"]].from_dict(self.raw)
        auto = getattr(transformers, "AutoModel" + ("" if self.kind == "Model" else self.kind))
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)


def verify(model: str | Path, *, trust_remote_code: bool = False, token: str | None = None) -> Verification:
    """Check ``model``, a folder or a ``USER/NAME[@REVISION]`` on the Hub.

    Args:
        trust_remote_code: let the fresh process run code that is not that of the installed release.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the name is none, or there is nothing on the Hub that could be checked.
        HubError: the Hub refused, or could not be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "modules.json")):
            raise FileNotFoundError(
                f"{folder} is no model folder: it holds no config.json; of a run, name the folder of a stage."
            )
        return Verification(str(model), None, checks_of(folder, trust=trust_remote_code, opens=True))
    if folder.is_file():
        raise FileNotFoundError(
            f"{model} is a file; give the folder of the model that it belongs to, or owner/name on the Hub."
        )
    if str(model).startswith(("/", ".", "~")) or folder.exists() or str(model).partition("@")[0].count("/") != 1:
        raise FileNotFoundError(
            f"There is no model folder {model} (looked from {Path.cwd()}); give a folder, or owner/name[@revision] on the Hub."
        )
    repo_id, revision = split_name(str(model))
    commit, fetched, files = fetch(repo_id, revision, token)
    with tempfile.TemporaryDirectory(prefix="minibert-") as place:
        plain = Path(place, "model")
        copy_plain(fetched, plain, link=True)
        damaged = [path for path, file in files.items() if (plain / path).exists() and not same(plain / path, file)]
        others = [path for path in files if not (plain / path).exists()]
        checks = checks_of(plain, trust=trust_remote_code, opens=True, other_files=others)
    if damaged:
        checks.insert(
            0, Check("download", "failed", f"{', '.join(damaged)} in {fetched} is not what the Hub holds; delete it.")
        )
    return Verification(str(model), commit, checks)


def checks_of(folder: Path, *, trust: bool = False, opens: bool = False, other_files: list[str] | None = None) -> list[Check]:
    """All checks of ``folder``.

    Args:
        opens: also open it in a fresh process.
        other_files: files that belong to it, but are not in the folder.
    """
    model = _Model(folder, trust=trust, other_files=other_files or [])
    checks: list[Check] = []
    for name, look, needs in _CHECKS if opens else _CHECKS[:-1]:
        failed = [check.name for check in checks if check.state != "ok" and check.name in needs]
        if failed:
            checks.append(Check(name, "skipped", f"Not looked at, because of: {', '.join(failed)}."))
            continue
        try:
            checks.append(Check(name, "ok", look(model)))
        except Exception as error:  # damaged files make the libraries that read them raise anything: all of it is a finding
            checks.append(Check(name, "failed", _sentence(error, folder)))
        if name == "code" and "code" in vars(model):
            checks[-1].detail = model.code.diff
    return checks


def _sentence(error: BaseException, folder: Path) -> str:
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


# -------------------------------------------------------------------------------------------------------------- checks


def _files(model: _Model) -> str:
    check_paths(model.folder)
    present = [file.relative_to(model.folder).as_posix() for file in model.folder.rglob("*") if file.is_file()]
    if pickles := sorted(path for path in [*present, *model.other_files] if is_pickle(path)):
        raise ValueError(f"{', '.join(pickles)} can run code when opened; a model needs safetensors only, so delete them.")
    return f"{len(present)} files, no pickle, and no name that leads out of the folder."


def _weights(model: _Model) -> str:
    check_weights(model.encoder)
    files = sorted(model.folder.rglob("*.safetensors"))
    for file in files:
        check_file(file)
    return f"{len(files)} safetensors file{'s' * (len(files) != 1)} whose headers describe them exactly."


def _tensors(model: _Model) -> str:
    checkpoint = folders.Checkpoint(model.encoder)
    stored = {full(name, model.kind) if _is_ours(model) else name: name for name in checkpoint.names}
    problems = []
    if model.empty is not None:
        expected = {_named(name, model): list(value.shape) for name, value in model.empty.state_dict().items()}
        tied = {_named(name, model) for name in _tied(model)}
        optional = {name for name in expected if ".pooler." in f".{name}" and model.kind == "Model"}
        missing = sorted(set(expected) - set(stored) - tied - optional)
        wrong = [
            f"{name} is {checkpoint.shape(stored[name])}, not {expected[name]}"
            for name in sorted(set(expected) & set(stored))
            if checkpoint.shape(stored[name]) != expected[name]
        ]
        problems += [f"missing: {', '.join(missing)}"] * bool(missing) + [f"of another shape: {', '.join(wrong)}"] * bool(wrong)
        left = set(stored) - set(expected) if _is_ours(model) else set()
        if left and (unknown := sorted(left - _of_other_classes(model))):
            problems.append(f"unknown: {', '.join(unknown)}")
    count, infinite = 0, []
    for name in checkpoint.names:
        tensor = checkpoint[name]
        count += tensor.numel()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            infinite.append(name)
    if infinite:
        problems.append(f"not finite: {', '.join(infinite)}")
    if problems:
        raise ValueError(f"The weights are not those that config.json describes; {'; '.join(problems)}.")
    shapes = "of the expected shapes" if model.empty is not None else "(which shapes to expect only its own code knows)"
    return f"{len(stored)} tensors {shapes}, {count:,} numbers, all finite."


def _is_ours(model: _Model) -> bool:
    return model.raw.get("model_type") == MiniBertConfig.model_type


def _named(name: str, model: _Model) -> str:
    return full(name, model.kind) if _is_ours(model) else name


def _of_other_classes(model: _Model) -> set[str]:
    """Names that other heads have: a checkpoint may keep what its own class has no use for."""
    config = MiniBertConfig.from_pretrained(model.encoder)
    kinds = [path.split(".MiniBert")[1] for path in configuration_minibert.AUTO_MAP.values() if ".MiniBertConfig" not in path]
    return {full(name, kind) for kind in kinds for name in empty(config, kind).state_dict()}


def _tied(model: _Model) -> dict[str, str]:
    """Which tensor takes its values from which, as the configuration has it."""
    assert model.empty is not None
    keys = getattr(model.empty, "_tied_weights_keys", None)
    return dict(keys) if isinstance(keys, dict) and model.raw.get("tie_word_embeddings", True) else {}


def _ties(model: _Model) -> str:
    if model.empty is None:
        return "Which weights are shared only its own code knows."
    pairs = _tied(model)
    if not pairs:
        return "No weights are to be shared."
    checkpoint = folders.Checkpoint(model.encoder)
    both = [(target, source) for target, source in pairs.items() if {target, source} <= set(checkpoint.names)]
    if wrong := [
        f"{target} and {source}" for target, source in both if not torch.equal(checkpoint[target], checkpoint[source])
    ]:
        raise ValueError(f"tie_word_embeddings is set, but {'; '.join(wrong)} differ; unset it, or save the model again.")
    return f"{len(pairs)} tensors are shared, and stored once or equal."


def _tokenizer(model: _Model) -> str:
    if not any(file for name in ("tokenizer.json", "vocab.txt", "vocab.json", "*.model") for file in model.encoder.glob(name)):
        raise ValueError("There is no tokenizer (tokenizer.json); save the model's tokenizer into its folder.")
    tokenizer = AutoTokenizer.from_pretrained(model.encoder, trust_remote_code=False)
    entries, rows = len(tokenizer), int(model.raw.get("vocab_size", 0))
    problems = []
    if entries > rows:
        problems.append(f"the tokenizer has {entries} entries, but the model only vocab_size={rows}")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        problems.append(f"the tokenizer's highest id is {highest}, but the model has vocab_size={rows}")
    pad = model.raw.get("pad_token_id")
    if pad is not None and tokenizer.pad_token_id not in (None, pad):
        problems.append(f"the tokenizer pads with {tokenizer.pad_token_id}, but the model has pad_token_id={pad}")
    positions = model.raw.get("max_position_embeddings")
    limits = [limit for limit in (tokenizer.model_max_length, folders.max_length(model.folder)) if limit]
    rotary = model.raw.get("position_embedding_type") == "rotary"
    if positions and not rotary and min(limits) > positions:
        problems.append(f"texts of {min(limits)} tokens are allowed, but the model has max_position_embeddings={positions}")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return f"{entries:,} entries for {rows:,} rows of embeddings, texts of up to {min(limits):,} tokens."


def _card(model: _Model) -> str:
    file = model.folder / "README.md"
    if not file.exists():
        raise ValueError("There is no card (README.md); hub push writes one.")
    check_card(file.read_text(encoding="utf-8"))
    return "README.md has valid metadata."


def _modules(model: _Model) -> str:
    listed = folders.modules(model.folder)
    if not listed:
        return "It is no sentence-transformers model."
    width = int(model.raw.get("hidden_size") or model.raw.get("dim") or 0)
    problems = []
    for module in listed[1:]:
        kind, file = str(module.get("type", "")), model.folder / module["path"] / "config.json"
        settings = folders.read_json(file) if file.exists() else {}
        name = kind.rpartition(".")[2]
        given = settings.get(
            "embedding_dimension", settings.get("word_embedding_dimension", settings.get("in_features", width))
        )
        if given != width:
            problems.append(f"{name} expects vectors of {given} numbers, but is given {width}")
        if name == "Dense":
            width = int(settings.get("out_features", width))
            if not (model.folder / module["path"] / "model.safetensors").exists():
                problems.append(f"{module['path']} lacks model.safetensors")
        if name == "Pooling" and not settings:
            problems.append(f"{module['path']} lacks config.json")
    overall = model.folder / "config_sentence_transformers.json"
    settings = folders.read_json(overall) if overall.exists() else {}
    if settings.get("similarity_fn_name") not in _SIMILARITIES:
        problems.append(f"the similarity {settings['similarity_fn_name']!r} is unknown")
    prompts = settings.get("prompts") or {}
    if (default := settings.get("default_prompt_name")) is not None and default not in prompts:
        problems.append(f"the default prompt {default!r} is not among its prompts")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    kinds = ", ".join(str(module.get("type", "")).rpartition(".")[2] for module in listed)
    return f"{kinds} fit together: vectors of {width} numbers."


def _code(model: _Model) -> str:
    code = model.code
    if code.state == "none" and model.raw.get("auto_map"):
        raise ValueError("config.json names code (auto_map) that is not in the folder; hub push publishes the model with it.")
    if code.state == "none":
        return "It brings no code."
    if code.state == "ours":
        return f"{', '.join(sorted(code.files))} are those {code}."
    why = f"It brings code {code}: {'; '.join(code.reasons)}"
    if not model.trust:
        raise ValueError(f"{why}; read it, and to run it all the same pass --trust-remote-code.")
    return f"{why}; run because you trust it."


def _opens(model: _Model) -> str:
    if model.code.state == "changed" and not model.trust:
        raise ValueError("Not opened, since that would run its code; see above.")
    try:
        found, opened = isolated.run(request_for(model.folder))
    except isolated.NotOpened as error:
        raise ValueError(f"It cannot be opened in a fresh process without minibert: {error}") from None
    if wrong := [name for name, value in found.items() if not bool(torch.isfinite(value).all())]:
        raise ValueError(f"In a fresh process without minibert {', '.join(wrong)} is not finite.")
    return f"In a fresh process without minibert: {', '.join(opened)}."


def request_for(folder: Path, *, trust: bool | None = None) -> isolated.Request:
    """How to open the model in ``folder``: the class its configuration names, and all that the ecosystem offers for it.

    Args:
        trust: run code that it brings; the default is to run it where there is any.
    """
    encoder = folders.encoder_folder(folder)
    config = folders.read_json(encoder / "config.json")
    named = (config.get("architectures") or ["Model"])[0]
    head = "AutoModel" + (f"For{named.partition('For')[2]}" if "For" in named else "")
    positions = [config.get("max_position_embeddings"), folders.max_length(folder)]
    settings = encoder / "tokenizer_config.json"
    positions.append(folders.read_json(settings).get("model_max_length") if settings.exists() else None)
    if isinstance(config.get("pad_token_id"), int) and config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        positions[0] -= config["pad_token_id"] + 1
    return isolated.Request(
        model=str(folder.resolve()),
        transformer=str(encoder.resolve()) if encoder != folder else None,
        heads=list(dict.fromkeys(["AutoModel", head])),
        embeds=bool(folders.modules(folder)),
        trust="auto_map" in config if trust is None else trust,
        max_length=min([64, *(int(number) for number in positions if number)]),
        threads=torch.get_num_threads(),
    )


# Name, check, and the checks without which it would mean nothing.
_CHECKS: tuple[tuple[str, Callable[[_Model], str], tuple[str, ...]], ...] = (
    ("files", _files, ()),
    ("weights", _weights, ("files",)),
    ("tensors", _tensors, ("files", "weights")),
    ("tied weights", _ties, ("files", "weights", "tensors")),
    ("tokenizer", _tokenizer, ("files",)),
    ("code", _code, ("files",)),
    ("card", _card, ()),
    ("modules", _modules, ("files",)),
    ("opens", _opens, ("files", "weights", "tensors", "tokenizer", "code", "modules")),
)


# ---------------------------------------------------------------------------------------------------------------- code


def code_of(folder: Path) -> Code:
    """The code that opening ``folder`` with trust_remote_code could run, compared with that of every release of ours."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*.py"))}
    digests = {path: sha256(file) for path, file in files.items()}
    encoder = folders.encoder_folder(folder)
    reasons = [*_foreign_names(folder, encoder)]
    own = {file.name: file for file in code_files()}
    ours = {path: file.name for path, file in files.items() if file.name in own and file.parent in (encoder, folder)}
    reasons += [f"{path} is no file of ours" for path in files if path not in ours]
    installed = {path for path, name in ours.items() if digests[path] == sha256(own[name])}
    release = releases.release_of([(name, digests[path]) for path, name in ours.items()])
    if release is None and len(installed) < len(ours):
        reasons += _other_code(ours, digests, installed)
    runs = bool(files) or bool(reasons)
    differing = {path: name for path, name in ours.items() if path not in installed} if reasons else {}
    return Code(
        files=digests,
        state="changed" if reasons else "ours" if runs else "none",
        release=release,
        reasons=reasons,
        diff="".join(_diff(own[name], files[path], path) for path, name in differing.items()) or None,
    )


def _other_code(ours: dict[str, str], digests: dict[str, str], installed: set[str]) -> list[str]:
    """Why files named as ours, by path, are not the code of one release: which were changed, or of which each is."""
    known = {path: releases.releases_of(name, digests[path]) for path, name in ours.items()}
    if changed := [path for path in ours if not known[path] and path not in installed]:
        return [f"{path} was changed" for path in changed]
    return [f"{path} is that of {releases.words(found[-1] if found else None)}" for path, found in known.items()]


def _foreign_names(folder: Path, encoder: Path) -> list[str]:
    """What the settings would have imported that is neither ours nor a library's."""
    found = []
    known = configuration_minibert.AUTO_MAP
    raw = folders.read_json(encoder / "config.json")
    mapped = raw.get("auto_map") or {}
    values = mapped.items() if isinstance(mapped, dict) else [("auto_map", mapped)]
    found += [f"config.json names {value} for {name}" for name, value in values if known.get(name) != value]
    if raw.get("custom_pipelines"):
        found.append("config.json names custom_pipelines")
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (encoder / name).exists() and folders.read_json(encoder / name).get("auto_map"):
            found.append(f"{name} names code")
    for module in folders.modules(folder):
        settings = folder / module["path"] / "config.json"
        given = folders.read_json(settings) if settings.exists() and module["path"] else {}
        names = [str(module.get("type", "")), str(given.get("activation_function", _LIBRARIES[0]))]
        found += [f"modules.json names {name}" for name in names if not name.startswith(_LIBRARIES)]
    return found


def _diff(installed: Path, file: Path, path: str) -> str:
    before, after = (one.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) for one in (installed, file))
    return "".join(difflib.unified_diff(before, after, f"installed/{installed.name}", path))


__all__ = ["Check", "Verification", "verify"]
