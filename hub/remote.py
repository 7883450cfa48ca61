"""The one place that talks to the Hub: what a repository holds, one commit, one download. Every failure is a sentence."""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging

from minibert.files.model_folder import PICKLES

# What a model consists of; nothing else is downloaded, above all no pickle.
WANTED = ("*.json", "*.txt", "*.md", "*.model", "*.py", "*.jinja", "*.yaml", "*.safetensors", "LICENSE*", "NOTICE*")
_OWNED_BY_THE_HUB = (".gitattributes",)
_ATTEMPTS = 4
_LONGEST_WAIT = 60.0  # seconds; who is to wait longer is told so instead
_PATIENCE = 30.0  # seconds for the first answer
_SILENCE = 60.0  # seconds in which not one byte comes or goes; the library alone would wait for ever for what it writes
_Result = TypeVar("_Result")


class HubError(OSError):
    """What the Hub refused, or why it could not be asked, and what to do about it."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and the sha256 of its content or, of small texts, git's sha1."""

    path: str
    size: int
    digest: str


# --------------------------------------------------------------------------------------------------------------- names


def split_name(name: str) -> tuple[str, str | None]:
    """Repository and revision of a ``USER/NAME[@REVISION]``.

    >>> split_name("ann/model@v1"), split_name("ann/model")
    (('ann/model', 'v1'), ('ann/model', None))

    Raises:
        ValueError: the Hub refuses such a name.
    """
    repo_id, at, revision = name.partition("@")
    try:
        validate_repo_id(repo_id)
        problem = "" if repo_id.count("/") == 1 else "it lacks the owner before the slash"
    except HFValidationError as error:
        problem = " ".join(str(error).split()).split(": '")[0]
        problem = problem[0].lower() + problem[1:]
    if at and not revision:
        problem = "it has nothing behind the @"
    if revision and (not re.fullmatch(r"[\w./-]+", revision) or ".." in revision):
        problem = f"{revision} is no name of a branch, tag or commit"
    if problem:
        raise ValueError(
            f"{name!r} is no name of a model on the Hub: {problem}; use owner/name of letters, digits, '-', '_' and '.', "
            "with @REVISION behind it where it is to be read from a branch, tag or commit."
        )
    return repo_id, revision or None


# -------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def sentences(what: str, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do.

    Args:
        what: what was being done, such as ``"uploading"``.

    Raises:
        HubError: for every failure of the network or refusal of the Hub. The original is left out of the chain: its text may
            hold the header with the token.
    """
    try:
        with _quiet(), _limited():
            yield
    except (HTTPError, OSError, RuntimeError) as error:
        cause = _cause(error)
        if cause is None and _of_storage(error):
            raise HubError(_storage_sentence(error, what, repo_id)) from None
        if cause is None:
            raise
        raise HubError(_sentence(cause, what, repo_id, revision)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on every attempt, which the sentence at the end sums up; bars are for people."""
    level, hidden = hub_logging.get_verbosity(), not sys.stderr.isatty()
    hub_logging.set_verbosity_error()
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if hidden:
            enable_progress_bars()


@contextmanager
def _limited() -> Iterator[None]:
    """With a limit to the time that the Hub may be silent, for requests whose maker set none."""
    hooks = get_session().event_hooks["request"]
    hooks.append(_limit)
    try:
        yield
    finally:
        hooks.remove(_limit)


def _limit(request: Any) -> None:
    limits = request.extensions.setdefault("timeout", {})
    for phase, seconds in (("connect", _PATIENCE), ("read", _SILENCE), ("write", _SILENCE)):
        if limits.get(phase) is None:
            limits[phase] = seconds


def _cause(error: BaseException) -> BaseException | None:
    """The first error of the chain that comes from the Hub or the network; threads and caches wrap it in others."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError | OfflineModeIsEnabled):
        found = found.__cause__
    return found


def _of_storage(error: BaseException) -> bool:
    """Whether ``error`` comes from hf_xet, which raises Python's own classes, and its own of a module of that name."""
    return type(error) in (ConnectionError, TimeoutError, RuntimeError) or type(error).__module__.startswith("hf_xet")


def _storage_sentence(error: BaseException, what: str, repo_id: str) -> str:
    status = re.search(r"\(\d{3} [\w -]+\)", str(error))  # no more of it: it can hold signed addresses
    return (
        f"The storage of the Hub (xet) failed{f' {status[0]}' if status else ''} while {what} {repo_id}; run the command again "
        "later, or with HF_HUB_DISABLE_XET=1, which does without it."
    )


def _sentence(error: BaseException, what: str, repo_id: str, revision: str | None) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and {repo_id} is not in the cache as a whole; unset it, so that the Hub can be asked."
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, what, repo_id, revision)
    kind = type(error).__name__
    if "Timeout" in kind:
        return (
            f"The Hub ({_endpoint()}) did not answer in time while {what} {repo_id}; run the command again later: files that "
            "have arrived are kept."
        )
    if kind in ("ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"):
        return f"The Hub ({_endpoint()}) cannot be reached; check the connection, or HF_ENDPOINT if you set it."
    return f"The connection broke while {what} {repo_id}; run the command again: files that have arrived are kept."


def _refusal(error: HfHubHTTPError, what: str, repo_id: str, revision: str | None) -> str:
    status = error.response.status_code
    said = _said(error)
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision or 'main'}; name another, or leave it out."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is open only to those its owner admits; ask at {_endpoint()}/{repo_id}, then log in."
    if isinstance(error, RepositoryNotFoundError) and get_token():
        return f"There is no model {repo_id} on the Hub that your token may see; check the name, or the token's rights."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no public model {repo_id} on the Hub; check the name, or if it is private log in with `hf auth login` "
            "or set HF_TOKEN."
        )
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id} changed while {what} it; run the command again."
    if status == 401:
        return f"The Hub does not accept this login (401) for {what} {repo_id}; log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return (
            f"The token may not do this (403): {what} {repo_id}{said}; use one with write permission, of an account that may "
            f"write to {repo_id.split('/')[0]}."
        )
    if status in (409, 412):
        return (
            f"{repo_id} was changed by somebody else at the same time ({status}){said}; look at it, and run the command again."
        )
    if status == 429:
        seconds = _retry_after(error)
        when = f"in {seconds:.0f} seconds" if seconds is not None else "later"
        return f"The Hub had too many requests from you (429); run the command again {when}."
    if status >= 500:
        return (
            f"The Hub failed ({status}) while {what} {repo_id}; run the command again later: files that have arrived are kept."
        )
    return f"The Hub refused ({status}) {what} {repo_id}{said}."


def _said(error: HfHubHTTPError) -> str:
    text = " ".join((error.server_message or "").split()).rstrip(".")
    return f" ({text})" if text else ""


def _retry_after(error: HfHubHTTPError) -> float | None:
    value = error.response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None


def _endpoint() -> str:
    return constants.ENDPOINT


def _patient(call: Callable[[], _Result]) -> _Result:
    """``call()``, again after a broken connection, a failing Hub or its wish to wait. For what may be done twice."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            wait = _wait(_cause(error), attempt)
            if wait is None or attempt == _ATTEMPTS:
                raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _wait(error: BaseException | None, attempt: int) -> float | None:
    """Seconds after which another attempt makes sense; None for never."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 429:
            seconds = _retry_after(error)
            return None if seconds is not None and seconds > _LONGEST_WAIT else max(seconds or 0.0, 2.0**attempt)
        return 2.0 ** (attempt - 1) if status >= 500 else None
    if isinstance(error, HTTPError) and type(error).__name__ in ("ReadError", "WriteError", "RemoteProtocolError"):
        return 2.0 ** (attempt - 1)
    return None


# ------------------------------------------------------------------------------------------------------------- reading


class Hub:
    """The Hub as one account sees it.

    Args:
        token: the default is the one of the environment or of the last login.

    Raises:
        HubError: that can be no token.
    """

    def __init__(self, token: str | None = None):
        from minibert.files.installation import version

        self.token = token
        if not re.fullmatch(r"[!-~]*", token or get_token() or ""):  # the library would fail with the token in its message
            raise HubError("The token holds characters that no token has; log in with `hf auth login`, or correct HF_TOKEN.")
        self._api = HfApi(token=token, library_name="minibert", library_version=version())

    def commit(self, repo_id: str, revision: str | None = None) -> str:
        """The hash of the commit that ``revision`` (the default is main) means now.

        Raises:
            HubError: there is no such repository or revision, or the Hub cannot be asked.
        """
        with sentences("looking up", repo_id, revision):
            try:
                return str(_patient(lambda: self._api.model_info(repo_id, revision=revision, timeout=_PATIENCE)).sha)
            except RevisionNotFoundError:
                refs = _patient(lambda: self._api.list_repo_refs(repo_id))
                named = ", ".join(ref.name for ref in [*refs.branches, *refs.tags])
                raise HubError(
                    f"{repo_id} has no branch, tag or commit {revision or 'main'}; its branches and tags are {named}."
                ) from None

    def exists(self, repo_id: str) -> bool | None:
        """None: there is no such model; else whether it is private."""
        with sentences("looking up", repo_id):
            try:
                return bool(_patient(lambda: self._api.model_info(repo_id, timeout=_PATIENCE)).private)
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError) or not (self.token or get_token()):
                    raise
                return None

    def branches(self, repo_id: str) -> dict[str, str]:
        """The commit of every branch."""
        with sentences("looking up", repo_id):
            return {ref.name: ref.target_commit for ref in _patient(lambda: self._api.list_repo_refs(repo_id)).branches}

    def files(self, repo_id: str, commit: str) -> dict[str, RemoteFile]:
        """The files of a commit by their path, without those that are the Hub's own."""
        with sentences("listing", repo_id, commit):
            tree = _patient(lambda: list(self._api.list_repo_tree(repo_id, recursive=True, revision=commit)))
        files: list[Any] = [entry for entry in tree if hasattr(entry, "blob_id")]
        return {
            file.path: RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id)
            for file in files
            if file.path not in _OWNED_BY_THE_HUB
        }

    def download(self, repo_id: str, commit: str, cache: Path | None = None, revision: str | None = None) -> Path:
        """The folder of a commit in ``cache`` (the default is the common one), without files that no model needs.

        After an interruption only files that had not arrived whole are fetched again.

        Args:
            revision: what led to the commit, for the cache to know it when the Hub cannot be asked.

        Raises:
            HubError: it could not be completed.
        """
        with sentences("downloading", repo_id, commit):
            for wanted in dict.fromkeys((revision or commit, commit)):
                options = {"cache_dir": cache, "allow_patterns": list(WANTED), "token": self.token}
                found = Path(_patient(partial(snapshot_download, repo_id, revision=wanted, **options)))
                if found.name == commit:
                    break  # else the branch has moved on in the meantime
            return found

    def cached(self, repo_id: str, revision: str | None) -> Path | None:
        """The folder of ``revision`` in the common cache, where it is there as a whole and the Hub must not be asked."""
        if not constants.is_offline_mode():
            return None
        with sentences("looking up", repo_id, revision):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(WANTED)))

    # --------------------------------------------------------------------------------------------------- writing

    def check_login(self, repo_id: str) -> None:
        """Refuse to begin without a token, or without the network."""
        if constants.is_offline_mode():
            raise HubError(f"HF_HUB_OFFLINE is set, so that nothing can be written to {repo_id}; unset it.")
        if not (self.token or get_token()):
            raise HubError(
                f"Writing to {repo_id} needs a login; run `hf auth login`, or set HF_TOKEN to a token that may write."
            )

    def create(self, repo_id: str, *, private: bool) -> None:
        """Create the repository where it is missing."""
        with sentences("creating", repo_id):
            _patient(lambda: self._api.create_repo(repo_id, private=private or None, exist_ok=True))

    def create_branch(self, repo_id: str, branch: str, commit: str) -> None:
        """Create a branch that begins at ``commit``, where it is missing."""
        with sentences("creating a branch of", repo_id, commit):
            _patient(lambda: self._api.create_branch(repo_id, branch=branch, revision=commit, exist_ok=True))

    def upload(
        self,
        repo_id: str,
        folder: Path,
        *,
        parent: str,
        remove: list[str],
        change: list[str],
        revision: str | None = None,
        create_pr: bool = False,
        message: str,
    ) -> tuple[str, str | None]:
        """Make one commit on top of ``parent``: files of ``folder`` added or replaced, others removed.

        Readers see the commit before or the whole new one. Large files go first, and are kept by the Hub, so that an
        interrupted upload need not send them again.

        Returns:
            The hash of the commit, and the address of the pull request if that was wished for.
        """
        additions = [CommitOperationAdd(path, folder / path) for path in change]
        where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
        with sentences("uploading to", repo_id, revision):
            self._api.preupload_lfs_files(repo_id, additions, free_memory=False, **where)  # tries several times itself
            operations = [*additions, *(CommitOperationDelete(path) for path in remove)]
            return _patient(lambda: self._commit(repo_id, operations, message, parent, where, folder))

    def _commit(
        self, repo_id: str, operations: list[Any], message: str, parent: str, where: dict[str, Any], folder: Path
    ) -> tuple[str, str | None]:
        """One attempt; where the Hub made the commit but its answer was lost, that commit is the answer."""
        try:
            done = self._api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent, **where)
            return done.oid, done.pr_url
        except (HTTPError, OSError) as error:
            if where["create_pr"]:  # which leaves no trace in its branch, so that nobody knows whether to ask again
                raise HubError(_sentence(error, "uploading to", repo_id, None)) from None
            newest = self.commit(repo_id, where["revision"])
            if newest == parent or compare(folder, self.files(repo_id, newest)):
                raise
            return newest, None


def is_pickle(path: str) -> bool:
    """Whether the name of a file says that opening it can run code.

    >>> is_pickle("pytorch_model.bin"), is_pickle("1_Dense/model.safetensors")
    (True, False)
    """
    return any(PurePosixPath(path).match(pattern) for pattern in (*PICKLES, "*.joblib", "*.npy", "*.h5"))


def fetch(repo_id: str, revision: str | None, token: str | None) -> tuple[str, Path, dict[str, RemoteFile]]:
    """Commit, folder in the cache, and the files that the Hub says there are (none are known without the network).

    Raises:
        ValueError: it is no model, or its weights are pickled.
        HubError: it cannot be had.
    """
    hub = Hub(token)
    if (cached := hub.cached(repo_id, revision)) is not None:
        return cached.name, cached, {}
    commit = hub.commit(repo_id, revision)
    files = hub.files(repo_id, commit)
    if not any(path.endswith(".safetensors") for path in files):
        pickles = [path for path in files if is_pickle(path)]
        why = (
            f"its weights are pickled ({', '.join(pickles)}), which can run code when they are opened"
            if pickles
            else "it holds no weights"
        )
        raise ValueError(f"{repo_id} is no model that can be used: {why}; ask its owner for safetensors.")
    return commit, hub.download(repo_id, commit, revision=revision or "main"), files


# --------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Change:
    """A file that a commit would add, change or remove, with its sizes in bytes before and after."""

    path: str
    kind: str
    before: int | None
    after: int | None


def compare(folder: Path, remote: dict[str, RemoteFile]) -> list[Change]:
    """What must change in ``remote`` for it to hold exactly the files of ``folder``."""
    changes = []
    local = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    for path, file in local.items():
        known = remote.get(path)
        size = file.stat().st_size
        if known is None:
            changes.append(Change(path, "added", None, size))
        elif known.size != size or not same(file, known):
            changes.append(Change(path, "changed", known.size, size))
    changes += [Change(path, "removed", file.size, None) for path, file in sorted(remote.items()) if path not in local]
    return changes


def same(file: Path, remote: RemoteFile) -> bool:
    """Whether ``file`` has the content of ``remote``."""
    return (sha256(file) if len(remote.digest) == 64 else _git_sha1(file)) == remote.digest


def sha256(file: Path) -> str:
    """The sha256 of a file's content, read in pieces."""
    return _digest(file, hashlib.sha256())


def _git_sha1(file: Path) -> str:
    return _digest(file, hashlib.sha1(b"blob %d\0" % file.stat().st_size))


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def copy_plain(source: Path, target: Path, *, link: bool) -> None:
    """Copy a folder of the cache, in which every file is a link, as a folder of files.

    Args:
        link: share the content where the file system can, for a copy that is only read.
    """
    for file in source.rglob("*"):
        if not file.is_file():
            continue
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        try:
            if link:
                os.link(file.resolve(), copied)
                continue
        except OSError:
            pass
        shutil.copy(file, copied)
