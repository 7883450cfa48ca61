"""Publish a model: build and check a folder, upload it in one commit, check the download."""

import filecmp
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from rich.filesize import decimal
from torch import Tensor

from minibert import configuration_minibert
from minibert.files import installation
from minibert.files.disk import expand_home, read_json, readable_os_errors, write_text
from minibert.files.model_folder import code_files, encoder_folder, opening, refuse_missing
from minibert.hub import folders, isolated, parity, provenance, verify
from minibert.hub.card import build_card
from minibert.hub.convert import UNUSED, checked_dtype, fitting_tokenizer, rounded
from minibert.hub.export import export, open_minibert
from minibert.hub.remote import Change, ask, commit, compare, connect, download, files_of, look_up, split_name
from minibert.inference.load import weight_arguments

TOLERANCE = 1e-6
SHARD_SIZE = "5GB"
CODE_LICENCE = "LICENSE.minibert"


@dataclass
class Published:
    """Store the result of :func:`push`. ``files`` maps paths to sizes in bytes.

    ``opened`` are the classes and libraries with which a fresh process opened the model, and
    ``difference`` is the largest difference between its outputs and those of this process.
    ``changes`` is empty if the Hub already had all files.
    """

    source: str
    repo_id: str
    files: dict[str, int]
    card: str
    opened: list[str] = field(default_factory=list)
    difference: float = 0.0
    changes: list[Change] = field(default_factory=list)
    commit: str | None = None  # after a dry run
    pull_request: str | None = None


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
    """Publish ``model`` on the Hub as ``repo_id``. Unchanged files are not uploaded again.

    Args:
        model: folder of a MiniBERT or of a run. For a run, its last model is published.
        repo_id: ``USER/NAME`` on the Hub.
        private: whether to create the repository as private.
        revision: branch to write to. A missing branch is created. The default is main.
        create_pr: whether to open a pull request instead of writing to the branch.
        dtype: dtype of the weights, such as ``"bfloat16"``. By default the weights keep their
            dtype.
        as_bert: whether to publish an equivalent plain BERT model, which needs no code.
        max_shard_size: size limit for a file of weights, such as ``"500MB"``.
        dry_run: whether to build and check the folder without uploading it.
        force: whether to replace or remove existing files of the repository.
        token: access token of the Hub. The default is HF_TOKEN, or the stored login.
        report: function that is called with a sentence after every step.
        fields: metadata of the card, such as ``license="mit"``.

    Raises:
        FileNotFoundError: if the model is missing or its training is not finished.
        ValueError: if the model is not a MiniBERT, an argument is invalid, a file contains a
            path of this machine, or the repository contains different files.
        Mismatch: if a fresh process computes other outputs. The message says what was uploaded.
        HubError: if the Hub refuses the request or cannot be reached.
    """
    if at := split_name(repo_id)[1]:
        raise ValueError(f"{repo_id!r} contains a revision; give the branch with --revision {at} instead.")
    if create_pr and revision:
        raise ValueError("A pull request always targets main; leave out --revision or --create-pr.")
    if revision is not None and not re.fullmatch(r"(?!refs/|.*\.\.)[\w.-]+(/[\w.-]+)*", revision):
        raise ValueError(f"--revision={revision} is not a valid branch name; use a name such as v1 or dev.")
    checked_dtype(dtype)
    if not re.search("[1-9]", max_shard_size):
        raise ValueError(f"--max-shard-size={max_shard_size} is not a size; use a size such as 500MB or 5GB.")
    api = connect(token, writing_to=None if dry_run else repo_id)
    source = model_folder(model)
    with tempfile.TemporaryDirectory(prefix="minibert-") as place:
        folder = Path(place, "model")
        build(source, folder, repo_id=repo_id, dtype=dtype, as_bert=as_bert, max_shard_size=max_shard_size, **fields)
        files = {path: (folder / path).stat().st_size for path in folders.paths_in(folder)}
        done = Published(str(source), repo_id, files, (folder / "README.md").read_text(encoding="utf-8"))
        report(f"Built from {source}: {len(files)} files, {decimal(sum(files.values()))}.")
        request = verify.request_for(folder)
        here = folder if as_bert else source
        transformer = str(encoder_folder(here))
        own = replace(request, model=str(here), transformer=transformer, arguments=weight_arguments(False, dtype=dtype))
        with parity.quiet(), opening(source):
            expected, _ = isolated.compute(own)
        prove_here = partial(prove, request, expected, f"The folder built from {source}")
        if dry_run:
            done.opened, done.difference = prove_here()
            return done
        branch = revision or "main"
        parent, exists, done.changes = _compare(api, folder, repo_id, branch, private=private, overwrite=force or create_pr)
        done.commit = parent
        if done.changes:
            done.opened, done.difference = prove_here()
            report("Checked in a fresh process without minibert.")
        if parent is None:
            make = partial(api.create_repo, repo_id, private=private or None, exist_ok=True)
            ask("creating", repo_id, make)
        if not exists:
            make_branch = partial(api.create_branch, repo_id, branch=branch, revision=parent, exist_ok=True)
            ask("creating a branch of", repo_id, make_branch)
        if done.changes:
            done.commit, done.pull_request = commit(
                api, repo_id, folder, done.changes, parent=parent, branch=branch, create_pr=create_pr
            )
            report(f"Uploaded as commit {done.commit}.")
        else:
            report(f"Nothing to upload: commit {done.commit} already contains these files.")
        _prove_download(api, folder, done, request, expected)
        report("Downloaded the commit into an empty cache, and checked it again.")
    return done


def _compare(
    api: HfApi, folder: Path, repo_id: str, branch: str, *, private: bool, overwrite: bool
) -> tuple[str | None, bool, list[Change]]:
    """Return the newest commit, whether the branch exists, and the changes to upload.

    The commit is main's if the branch is missing, and None if the repository is missing. Raise
    ValueError if existing files would change and ``overwrite`` is False.
    """
    if not ask("looking up", repo_id, partial(api.repo_exists, repo_id)):
        return None, branch == "main", compare(folder, {})
    newest = main = look_up(api, repo_id)
    if private and not main.private:
        raise ValueError(
            f"{repo_id} exists and is public; make it private in its settings on the Hub first, or push to another name."
        )
    exists = branch == "main" or ask("looking up", repo_id, partial(api.revision_exists, repo_id, branch))
    if exists and branch != "main":
        newest = look_up(api, repo_id, branch)
    changes = compare(folder, files_of(newest))
    # A branch that is still at main's commit has no files of its own to lose.
    own = branch == "main" or newest.sha != main.sha
    if changes and files_of(newest) and own and not overwrite:
        listed = "\n".join(f"  {change.text}" for change in changes)
        raise ValueError(
            f"{repo_id} already contains different files. To make the changes below, push again with "
            f"--force, or open a pull request with --create-pr.\n{listed}"
        )
    return newest.sha, exists, changes


def prove(
    request: isolated.Request, expected: dict[str, Tensor], what: str, cache: Path | None = None
) -> tuple[list[str], float]:
    """Open a model in a fresh process, and compare the outputs with ``expected``.

    Returns:
        The classes and libraries that opened the model, and the largest difference of outputs.
    """
    try:
        found, opened = isolated.run(request, cache=cache)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    except isolated.NotOpened as error:
        raise parity.Mismatch(f"{what} cannot be opened in a fresh process without minibert: {error}") from None
    except AssertionError as error:
        raise parity.Mismatch(f"{what} computes different outputs in a fresh process: {' '.join(str(error).split())}") from None
    return opened, max(float((found[name] - value).abs().max()) for name, value in expected.items() if value.numel())


def _prove_download(
    api: HfApi,
    folder: Path,
    done: Published,
    request: isolated.Request,
    expected: dict[str, Tensor],
) -> None:
    what = f"Commit {done.commit} of {done.repo_id}, which is on the Hub,"
    with tempfile.TemporaryDirectory(prefix="minibert-") as place:
        fetched = download(api, done.repo_id, done.commit, Path(place))
        _, differing, missing = filecmp.cmpfiles(folder, fetched, done.files, shallow=False)
        if wrong := ", ".join(differing + missing):
            raise parity.Mismatch(f"{what} differs from the sent files in {wrong}; push again, or report this bug.")
        by_name = replace(request, model=done.repo_id, revision=done.commit)
        done.opened, done.difference = prove(by_name, expected, what, Path(place))


def model_folder(model: str | Path) -> Path:
    """Return the folder to publish, which is that of the last model of a run."""
    folder = expand_home(model)
    if not folder.is_dir():
        refuse_missing(model, "give the folder of a run, of a stage or of a model")
    unfinished = (folder / "checkpoints").is_dir()
    if (folder / provenance.RECIPE).exists() and not (folder / "config.json").exists():
        stages = enumerate(provenance.read_recipe(folder / provenance.RECIPE)["stages"], start=1)
        others = ("tokenizer", "evaluate")
        models = [f"{at}-{stage['name']}" for at, stage in stages if stage["kind"] not in others]
        if not models:
            raise ValueError(f"The recipe of {folder} trains no model; give the folder of a model.")
        folder, unfinished = folder / models[-1], True
    if unfinished and not (folder / "stage.json").exists():
        raise FileNotFoundError(
            f"The training of {folder} is not finished; resume it with minibert train, or give an earlier stage's folder."
        )
    return folder


def build(
    source: Path,
    target: Path,
    *,
    repo_id: str | None = None,
    dtype: str | None = None,
    as_bert: bool = False,
    max_shard_size: str = SHARD_SIZE,
    **fields: Any,
) -> None:
    """Write all files of a published model into ``target``. See :func:`push`."""
    refuse_links(source)
    with folders.new_folder(target) as temporary, tempfile.TemporaryDirectory(prefix="minibert-") as place:
        weights, plain = folders.checked_encoder(source), Path(place, "bert")
        if as_bert:
            export(source, plain)
            shutil.copytree(plain, temporary, dirs_exist_ok=True)
            weights = plain
        else:
            _, config, _, _ = open_minibert(source, None)
            config.auto_map = dict(configuration_minibert.AUTO_MAP)
            config.save_pretrained(temporary)
            folders.write_tokenizer(fitting_tokenizer(source, config), temporary)
            folders.copy_modules(source, temporary)
            for file in code_files():
                shutil.copy(file, temporary)
            shutil.copy(installation.ROOT / "LICENSE", temporary / CODE_LICENCE)
        tensors = rounded(folders.read_tensors(weights), checked_dtype(dtype))
        with readable_os_errors(temporary, "nothing was sent"):
            save_torch_state_dict(tensors, temporary, max_shard_size=max_shard_size)
        if (weights / UNUSED).exists():
            unused = folders.read_tensors(weights, UNUSED)
            folders.write_tensors(temporary / UNUSED, rounded(unused, checked_dtype(dtype)))
        folders.set_fields(temporary / "config.json", **({"dtype": dtype} if dtype else {}))
        if (source / "LICENSE").exists():  # the licence of the weights
            shutil.copy(source / "LICENSE", temporary)
        write_text(temporary / "README.md", build_card(temporary, repo_id, origin=source, **fields))
        provenance.write(provenance.read(source), temporary, fields)
        check_private(temporary, [source, source.parent, temporary, Path(place), Path.cwd()])
        if failed := [check for check in verify.checks_of(temporary) if check.state == "failed"]:
            raise ValueError(f"{source} cannot be published: {'; '.join(f'{check.name}: {check.text}' for check in failed)}")


def refuse_links(source: Path) -> None:
    """Refuse links out of the Hub's cache among files that are published unread."""
    templates, snapshots = source / "additional_chat_templates", source.resolve().parent
    blobs = snapshots.parent / "blobs" if snapshots.name == "snapshots" else None
    for file in (source / "LICENSE", source / provenance.RECIPE, templates, *templates.glob("*")):
        if file.is_symlink() and file.resolve().parent != blobs:
            raise ValueError(f"{file} is a link to {file.resolve()}; to publish this file, copy it into the folder.")


def check_private(folder: Path, places: Iterable[Path]) -> None:
    """Raise ValueError if a file contains a home directory or a path in ``places``."""
    users = "|".join(re.escape(name) for name in ("home", "Users", os.environ.get("USER"), expand_home("~").name) if name)
    # Matches before a path, but not before the path of a URL.
    patterns = [rf"(?:(?<![\w.:/])(?:/[\w.-]+)*/(?:{users})|[A-Za-z]:[/\\]+Users)[/\\]+[\w.-]+"]
    roots = [expand_home(place).resolve() for place in places]
    patterns += [re.escape(str(root)) + r"\b" for root in roots if len(root.parts) > 1]
    private = re.compile("|".join(patterns))
    found = [
        f"{path} contains {match[0]}" for path in folders.paths_in(folder) if (match := private.search(_text(folder / path)))
    ]
    if found:
        raise ValueError(
            f"The published files would show paths of this machine: {'; '.join(found)}; remove them from the model's files."
        )


def _text(file: Path) -> str:
    """Return the text in a file. Of weights, this is the header."""
    if file.suffix == ".json":
        return json.dumps(read_json(file), ensure_ascii=False)  # a path may be escaped in the file
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little") if file.suffix == ".safetensors" else -1
        return content.read(length).decode("utf-8", "replace")
