"""Publish a model: build its complete folder, prove it, upload it in one commit, download that and prove it again."""

import getpass
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from minibert import MiniBertConfig, configuration_minibert
from minibert.files import installation
from minibert.files.model_folder import check_paths, check_weights, code_files
from minibert.hub import folders, isolated, parity, provenance, verify
from minibert.hub.card import build_card
from minibert.hub.convert import UNUSED, open_tokenizer
from minibert.hub.export import export, open_minibert
from minibert.hub.remote import Change, Hub, compare, sha256, split_name

TOLERANCE = 1e-6
SHARD_SIZE = "5GB"
CODE_LICENCE = "LICENSE.minibert"
# Fields that say where a file lay or how it was opened on this machine.
_OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "is_local", "local_files_only")
_TEXTS = (".json", ".txt", ".md", ".yaml", ".py", ".jinja")
_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class Published:
    """What :func:`push` did.

    Attributes:
        source: the folder that was published.
        files: sizes in bytes by path.
        opened: in which ways the model was opened in a fresh process, with equal outputs.
        difference: the largest difference from the outputs here.
        changes: what the commit changed; empty where the Hub had all of it.
        commit: hash of the commit that holds the model; None of a dry run.
    """

    source: str
    repo_id: str
    files: dict[str, int]
    card: str
    opened: list[str] = field(default_factory=list)
    difference: float = 0.0
    changes: list[Change] = field(default_factory=list)
    commit: str | None = None
    pull_request: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------------------- push


def push(
    model: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dtype: str | None = None,
    as_bert: bool = False,
    max_shard_size: str = SHARD_SIZE,
    dry_run: bool = False,
    force: bool = False,
    token: str | None = None,
    report: Callable[[str], None] = lambda text: None,
    **fields: Any,
) -> Published:
    """Publish ``model`` as ``repo_id``; what the Hub has already is not sent again.

    Args:
        model: a run (its last model is taken), a stage of one, or any folder of a MiniBERT.
        private: of a repository that is created.
        revision: branch to write to, created where it is missing; the default is main.
        create_pr: propose the commit as a pull request instead.
        dtype: of the weights, such as ``"bfloat16"``; the default keeps them as they are.
        as_bert: publish the plain BERT that computes the same, which needs no code.
        max_shard_size: such as ``"5GB"``; larger weights are split into files of at most this.
        dry_run: build and prove, but leave the Hub alone.
        force: replace what a repository holds.
        report: is told in a sentence what was done.
        fields: metadata of the card, such as ``license="mit"``; see :func:`minibert.hub.card.build_card`.

    Raises:
        FileNotFoundError: there is no such model, or it is not finished.
        ValueError: it is no MiniBERT, a name or size is wrong, a file names a path of this machine, or the repository holds
            something else.
        Mismatch: it computes something else in a fresh process; nothing was uploaded, unless the text says so.
        HubError: the Hub refused, or could not be reached.
    """
    repo_id = _check_arguments(repo_id, revision, create_pr, dtype)
    shard_size = parse_size(max_shard_size)
    hub = Hub(token)
    if not dry_run:
        hub.check_login(repo_id)
    source = model_folder(model)
    with tempfile.TemporaryDirectory(prefix="minibert-") as place:
        folder = Path(place, "model")
        build(source, folder, repo_id=repo_id, dtype=dtype, as_bert=as_bert, max_shard_size=shard_size, **fields)
        files = {path: (folder / path).stat().st_size for path in paths_in(folder)}
        done = Published(str(source), repo_id, files, (folder / "README.md").read_text(encoding="utf-8"))
        report(f"Built from {source}: {len(files)} files, {size_text(sum(files.values()))}.")
        expected = _expected(source, folder, dtype, as_bert)
        if dry_run:
            done.opened, done.difference = prove(folder, expected, f"The folder built from {source}")
            return done
        target = _Target(hub, repo_id, revision or "main", private=private, create_pr=create_pr, force=force)
        _send(target, folder, done, expected, report)
    return done


def _send(target: "_Target", folder: Path, done: Published, expected: "_Expected", report: Callable[[str], None]) -> None:
    """Prove, upload what the Hub lacks, and prove what it then has."""
    known = target.look(folder)
    if known is None or known.changes:
        done.opened, done.difference = prove(folder, expected, f"The folder built from {done.source}")
        report("Proved in a fresh process without minibert.")
        target.upload(folder, known, done)
        report(f"Uploaded as commit {done.commit}.")
    else:
        done.commit = target.keep(known)
        report(f"Nothing to upload: commit {done.commit} holds these files.")
    _prove_download(target.hub, folder, done, expected)
    report("Downloaded that commit into an empty cache, and proved it again.")


def _check_arguments(repo_id: str, revision: str | None, create_pr: bool, dtype: str | None) -> str:
    problems = []
    name, behind = split_name(repo_id)
    if behind:
        problems.append(f"{repo_id!r} names a revision; give the branch with --revision {behind}")
    if create_pr and revision:
        problems.append("a pull request is made against main; leave out --revision, or --create-pr")
    if revision and (not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision) or ".." in revision or revision.startswith("refs/")):
        problems.append(f"--revision={revision} is no name of a branch")
    if dtype is not None and dtype not in _DTYPES:
        problems.append(f"--dtype={dtype} is unknown; use one of {', '.join(_DTYPES)}")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return name


@dataclass
class _Known:
    """What a branch holds.

    Attributes:
        commit: its newest; of a branch that is missing, that of main, where it would begin.
        exists: whether the branch is there.
        changes: what must change for it to hold the folder.
    """

    commit: str
    exists: bool
    changes: list[Change]


@dataclass
class _Target:
    """Where a push goes, and what it may do there."""

    hub: Hub
    repo_id: str
    branch: str
    private: bool
    create_pr: bool
    force: bool

    def look(self, folder: Path) -> _Known | None:
        """What is there; None where the repository is missing.

        Raises:
            ValueError: it must not be replaced, or is public although it should be private.
        """
        is_private = self.hub.exists(self.repo_id)
        if is_private is None:
            return None
        if self.private and not is_private:
            raise ValueError(
                f"{self.repo_id} exists and is public, so that --private cannot hold; make it private in its settings on the "
                "Hub first, or push to another name."
            )
        branches = self.hub.branches(self.repo_id)
        commit = branches.get(self.branch, branches["main"])
        files = self.hub.files(self.repo_id, commit)
        known = _Known(commit, self.branch in branches, compare(folder, files))
        # A branch that is still at main's commit has nothing of its own to lose.
        own = self.branch == "main" or commit != branches["main"]
        if known.changes and files and own and not (self.force or self.create_pr):
            listed = "\n".join(f"  {change_text(change)}" for change in known.changes)
            raise ValueError(
                f"{self.repo_id} holds something else already; look at what would change, and if it is meant push again with "
                f"--force, or propose it with --create-pr.\n{listed}"
            )
        return known

    def upload(self, folder: Path, known: _Known | None, done: Published) -> None:
        """Make the commit on top of what was looked at, so that what came in between is not replaced unseen."""
        if known is None:
            self.hub.create(self.repo_id, private=self.private)
            known = self.look(folder)
            assert known is not None
        self.keep(known)
        done.changes = known.changes
        done.commit, done.pull_request = self.hub.upload(
            self.repo_id,
            folder,
            parent=known.commit,
            change=[change.path for change in known.changes if change.kind != "removed"],
            remove=[change.path for change in known.changes if change.kind == "removed"],
            revision=None if self.branch == "main" else self.branch,
            create_pr=self.create_pr,
            message=f"A model published by minibert {installation.version()}",
        )

    def keep(self, known: _Known) -> str:
        """Create the branch where it is missing; returns the commit that it is at."""
        if not known.exists:
            self.hub.create_branch(self.repo_id, self.branch, known.commit)
        return known.commit


def _prove_download(hub: Hub, folder: Path, done: Published, expected: "_Expected") -> None:
    what = f"Commit {done.commit} of {done.repo_id}, which is on the Hub,"
    with tempfile.TemporaryDirectory(prefix="minibert-") as place:
        fetched = hub.download(done.repo_id, str(done.commit), Path(place))
        for path in paths_in(folder):
            if not (fetched / path).exists() or sha256(fetched / path) != sha256(folder / path):
                raise parity.Mismatch(f"{what} holds another {path} than was sent; push again, and report it if that recurs.")
        done.opened, done.difference = prove(
            folder, expected, what, hub_name=(done.repo_id, str(done.commit)), cache=Path(place)
        )


# --------------------------------------------------------------------------------------------------------------- proof


@dataclass
class _Expected:
    """What the model computes in this process, and how to ask for the same in another."""

    request: isolated.Request
    outputs: dict[str, Tensor]


def _expected(source: Path, folder: Path, dtype: str | None, as_bert: bool) -> _Expected:
    """The outputs here: those of the source or, of a plain BERT, which was compared with it already, its own."""
    request = verify.request_for(folder)
    opened = folder if as_bert else source
    own = isolated.Request(
        **{**asdict(request), "model": str(opened), "transformer": str(folders.encoder_folder(opened)), "trust": False}
    )
    own.dtype = dtype
    with parity.quiet():
        return _Expected(request, isolated.compute(own)[0])


def prove(
    folder: Path,
    expected: _Expected,
    what: str,
    *,
    hub_name: tuple[str, str] | None = None,
    cache: Path | None = None,
) -> tuple[list[str], float]:
    """Open the model in a fresh process without this package, and compare its outputs with those here.

    Args:
        hub_name: id and commit to open it by, from ``cache``, instead of its folder.

    Returns:
        The ways in which it was opened, and the largest difference.

    Raises:
        Mismatch: it cannot be opened there, or computes something else.
    """
    request = expected.request
    if hub_name:
        request = isolated.Request(**{**asdict(request), "model": hub_name[0], "revision": hub_name[1]})
    try:
        found, opened = isolated.run(request, cache=cache)
    except isolated.NotOpened as error:
        raise parity.Mismatch(f"{what} cannot be opened in a fresh process without minibert: {error}") from None
    return opened, _largest_difference(expected.outputs, found, what)


def _largest_difference(here: dict[str, Tensor], there: dict[str, Tensor], what: str) -> float:
    """The largest difference, or :class:`Mismatch` that names the first output that differs by more than the tolerance."""
    largest = 0.0
    for name, expected in here.items():
        found = there.get(name)
        if found is None or found.shape != expected.shape:
            shape = "missing" if found is None else f"of shape {list(found.shape)}, not {list(expected.shape)},"
            raise parity.Mismatch(f"{what} computes something else in a fresh process: {name} is {shape} there.")
        if not expected.numel():
            continue
        differences = (expected - found).abs()
        wrong = ~(differences <= TOLERANCE * expected.abs().clamp(min=1))  # what is no number is wrong too
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            raise parity.Mismatch(
                f"{what} computes something else in a fresh process: {name}{list(first)} is {float(expected[first]):.6g} here "
                f"and {float(found[first]):.6g} there."
            )
        largest = max(largest, float(differences.max()))
    return largest


# --------------------------------------------------------------------------------------------------------------- build


def model_folder(model: str | Path) -> Path:
    """The folder to publish: ``model`` itself, or the last model of the run that it is.

    Raises:
        FileNotFoundError: there is none, or its training is not finished.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        raise FileNotFoundError(f"{model} is a file; give the folder of a run, of a stage or of a model.")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no model folder {model} (looked from {Path.cwd()}); give the folder of a run, of a stage or of a model."
        )
    if (folder / "recipe.yaml").exists() and not (folder / "config.json").exists():
        return _last_stage(folder)
    if (folder / "checkpoints").is_dir() and not (folder / "stage.json").exists():
        raise FileNotFoundError(f"The training of {folder} is not finished; resume it with minibert train, then push.")
    return folder


def _last_stage(run: Path) -> Path:
    try:
        stages = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["stages"]
        numbered = [(f"{number}-{stage['name']}", stage["kind"]) for number, stage in enumerate(stages, start=1)]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'recipe.yaml'} is damaged; name the folder of the stage to publish instead.") from error
    names = [name for name, kind in numbered if kind not in ("tokenizer", "evaluate")]
    if not names:
        raise FileNotFoundError(f"The run {run} has no stage that makes a model; add one to its recipe.")
    if not (run / names[-1] / "stage.json").exists():
        raise FileNotFoundError(
            f"Stage {names[-1]} of the run {run} is not finished; resume it with minibert train, or name an earlier stage."
        )
    return run / names[-1]


def build(
    source: Path,
    target: Path,
    *,
    repo_id: str | None = None,
    dtype: str | None = None,
    as_bert: bool = False,
    max_shard_size: int = 5 * 10**9,
    **fields: Any,
) -> None:
    """Write everything that a model on the Hub consists of into ``target``; see :func:`push`.

    Raises:
        ValueError: it is no complete MiniBERT, or a file names a path or the user of this machine.
    """
    check_paths(source)
    check_weights(folders.encoder_folder(source))
    with folders.new_folder(target) as temporary, tempfile.TemporaryDirectory(prefix="minibert-") as place:
        if as_bert:
            plain = Path(place, "minibert")
            plain.mkdir()
            _write_model(source, plain, dtype)
            temporary.rmdir()
            export(plain, temporary)
        else:
            _write_model(source, temporary, dtype)
            for file in code_files():
                shutil.copy(file, temporary / file.name)
        _shard(temporary, max_shard_size)
        for name in ("config.json", "tokenizer_config.json"):
            _forget_this_machine(temporary / name)
        _write_licences(source, temporary, with_code=not as_bert)
        (temporary / "README.md").write_text(build_card(temporary, repo_id, origin=source, **fields), encoding="utf-8")
        provenance.write(provenance.read(source), temporary, fields)
        check_private(temporary, [source, source.parent, temporary, Path(place), Path.cwd()])
        if failed := [check for check in verify.checks_of(temporary) if check.state == "failed"]:
            raise ValueError(f"{source} is not ready: {'; '.join(f'{check.name}: {check.text}' for check in failed)}")


def _write_model(source: Path, target: Path, dtype: str | None) -> None:
    """Weights, configuration, tokenizer and sentence-transformers modules of a MiniBERT."""
    folder, config, _, checkpoint = open_minibert(source, None)
    encoder = folders.encoder_folder(folder)
    tokenizer = open_tokenizer(encoder, config, folders.max_length(folder))
    wanted = _DTYPES[dtype] if dtype else None
    folders.write_tensors(target / folders.WEIGHTS, {name: _reader(checkpoint, name, wanted) for name in checkpoint.names})
    if (encoder / UNUSED).exists():
        spare = folders.Checkpoint(encoder, UNUSED)
        folders.write_tensors(target / UNUSED, {name: _reader(spare, name, wanted) for name in spare.names})
    if wanted is not None:
        config.dtype = wanted
    config.auto_map = dict(configuration_minibert.AUTO_MAP)
    assert isinstance(config, MiniBertConfig)
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    folders.name_tokenizer_class(target)
    folders.copy_modules(folder, target)


def _reader(checkpoint: folders.Checkpoint, name: str, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = checkpoint[name]
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    return read


def _shard(folder: Path, limit: int) -> None:
    """Split weights of more than ``limit`` bytes into files that hold at most so many, a tensor at least, with their index."""
    file = folder / folders.WEIGHTS
    if file.stat().st_size <= limit:
        return
    checkpoint = folders.Checkpoint(folder)
    shards: list[list[str]] = []
    sizes: list[int] = []
    for name in checkpoint.names:
        tensor = checkpoint[name]
        size = tensor.numel() * tensor.element_size()
        if not shards or sizes[-1] + size > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    if len(shards) == 1:
        return
    places: dict[str, str] = {}
    count = 0
    for number, names in enumerate(shards, start=1):
        part = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        count += folders.write_tensors(folder / part, {name: _reader(checkpoint, name, None) for name in names})
        places |= dict.fromkeys(names, part)
    index = {"metadata": {"total_parameters": count, "total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{folders.WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    file.unlink()


def _forget_this_machine(file: Path) -> None:
    if file.exists():
        fields = {name: value for name, value in folders.read_json(file).items() if name not in _OF_THIS_MACHINE}
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_licences(source: Path, target: Path, with_code: bool) -> None:
    """The model's own licence, which only its publisher can give, and beside our code ours, which is of the code alone."""
    if (source / "LICENSE").exists():
        shutil.copy(source / "LICENSE", target / "LICENSE")
    if with_code:
        shutil.copy(_code_licence(), target / CODE_LICENCE)


def _code_licence() -> Path:
    beside = code_files()[0].with_name("LICENSE")
    if beside.exists():
        return beside
    (found,) = [file for file in distribution(installation.NAME).files or () if file.name == "LICENSE"]
    return Path(str(found.locate()))


def check_private(folder: Path, places: Iterable[Path]) -> None:
    """Refuse a folder in which a text names ``places``, a home directory, or the user of this machine within a path.

    Raises:
        ValueError: naming the files and what stands there.
    """
    begin = r"(?<![\w.:/])"  # of a path, not of the part of an address behind its host
    user = re.escape(getpass.getuser())
    patterns = [re.escape(str(place.expanduser().resolve())) + r"\b" for place in places if len(place.resolve().parts) > 1]
    patterns += [begin + re.escape(str(Path.home())) + r"[/\\]+[\w.-]+", begin + r"/(?:home|Users)/[\w.-]+"]
    patterns += [r"[A-Za-z]:[/\\]+Users[/\\]+[\w.-]+", begin + rf"(?:/[\w.-]+)*/{user}/[\w.-]+"]
    private = re.compile("|".join(patterns))
    found = []
    for file in sorted(folder.rglob("*")):
        if file.suffix in _TEXTS and (match := private.search(file.read_text(encoding="utf-8"))):
            found.append(f"{file.relative_to(folder).as_posix()} names {match[0]}")
    if found:
        raise ValueError(
            f"The published files would name places of this machine: {'; '.join(found)}; remove that from the model's files."
        )


# --------------------------------------------------------------------------------------------------------------- texts


def paths_in(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def parse_size(text: str) -> int:
    """Bytes of a size such as ``"5GB"``.

    >>> parse_size("5GB"), parse_size("200 MB")
    (5000000000, 200000000)

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--max-shard-size={text} is no size; give one such as 500MB or 5GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def size_text(size: int) -> str:
    """A size in bytes for people.

    >>> size_text(12), size_text(1_234_567)
    ('12 bytes', '1.2 MB')
    """
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def change_text(change: Change) -> str:
    """A line of the list of what changes.

    >>> change_text(Change("config.json", "changed", 900, 1000))
    'changed  config.json  900 bytes -> 1.0 KB'
    """
    sizes = [size_text(size) for size in (change.before, change.after) if size is not None]
    return f"{change.kind:7}  {change.path}  {' -> '.join(sizes)}"


__all__ = ["Published", "build", "push"]
