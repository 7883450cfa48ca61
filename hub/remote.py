"""Look up, download and commit models on the Hub, with readable errors."""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import disable_progress_bars, get_session, validate_repo_id
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.sha import git_hash
from rich.filesize import decimal

from minibert.files.disk import sha256
from minibert.files.installation import version
from minibert.files.model_folder import pickles
from minibert.files.terminal import printable
from minibert.hub.folders import paths_in

# The only files that are downloaded. Pickles are never downloaded.
WANTED = ("*.json", "*.txt", "*.md", "*.model", "*.py", "*.jinja", "*.yaml", "*.safetensors", "LICENSE*", "NOTICE*")
_ATTEMPTS = 4
_LONGEST_WAIT = 60.0  # seconds; if the Hub asks for a longer pause, an error says so
_SILENCE = 60.0  # seconds without data; huggingface_hub would wait forever
_CHANGED = "; the repository has changed in the meantime, so check it and run the command again"
_LATER = "; run the command again later (files that have arrived are kept)"
# HTTP status of a refusal -> advice.
_ADVICE = {
    401: "; log in with `hf auth login`, or set HF_TOKEN",
    403: "; use a token with write permission, of an account that may write to {owner}",
    409: _CHANGED,
    412: _CHANGED,
    429: ", because of too many requests; run the command again {later}",
}
_Result = TypeVar("_Result")


class HubError(OSError):
    """Signal that the Hub refused a request or was unreachable."""


def split_name(name: str) -> tuple[str, str | None]:
    """Split ``USER/NAME[@REVISION]`` into repository and revision.

    >>> split_name("ann/model@v1"), split_name("ann/model")
    (('ann/model', 'v1'), ('ann/model', None))
    """
    repo_id, at, revision = name.partition("@")
    if repo_id.count("/") != 1 or (at and not re.fullmatch(r"[\w./-]+", revision)) or ".." in revision:
        raise ValueError(f"{name!r} is not a valid model name on the Hub; use USER/NAME or USER/NAME@REVISION.")
    validate_repo_id(repo_id)  # says which characters are allowed
    return repo_id, revision or None


def ask(
    what: str,
    repo_id: str,
    call: Callable[[], _Result],
    *,
    revision: str | None = None,
    attempts: int = _ATTEMPTS,
) -> _Result:
    """Return ``call()``. Repeat the call if the connection breaks or the Hub fails.

    ``what`` describes the call in error messages, for example ``"uploading to"``.
    """
    for attempt in range(attempts):
        hooks = get_session().event_hooks["request"]
        hooks.append(_limit)
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            cause = _cause(error)
            if cause is None:
                raise
            wait = _wait(cause, attempt)
            if wait is None or attempt + 1 == attempts:
                raise HubError(_sentence(cause, what, repo_id, revision)) from None
        finally:
            hooks.remove(_limit)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _limit(request: Any) -> None:
    """Set a timeout for a request that has none."""
    limits = request.extensions.setdefault("timeout", {})
    limits |= {phase: _SILENCE for phase in ("connect", "read", "write") if limits.get(phase) is None}


def _cause(error: BaseException) -> BaseException | None:
    """Return the error from the Hub or the network that caused ``error``, or None."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HTTPError | OfflineModeIsEnabled):
        found = found.__cause__
    return error if found is None and _is_of_storage(error) else found


def _is_of_storage(error: BaseException) -> bool:
    # hf_xet raises built-in exceptions, and exceptions of its own module.
    builtin = type(error) in (ConnectionError, TimeoutError, RuntimeError)
    return builtin or type(error).__module__.startswith("hf_xet")


def _wait(error: BaseException, attempt: int) -> float | None:
    """Return the seconds to wait before another attempt, or None to stop."""
    pause = 2.0**attempt
    if not isinstance(error, HfHubHTTPError):
        broken = type(error).__name__ in ("ReadError", "WriteError", "RemoteProtocolError")
        return pause if broken else None
    status, seconds = error.response.status_code, _retry_after(error) or 0.0
    again = status >= 500 or (status == 429 and seconds <= _LONGEST_WAIT)
    return max(seconds, pause) if again else None


def _retry_after(error: HfHubHTTPError) -> float | None:
    value = error.response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None


def _sentence(error: BaseException, what: str, repo_id: str, revision: str | None) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and the cache lacks a part of {repo_id}; unset the variable."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit {revision or 'main'}; use another, or leave it out."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub has no model {repo_id} that this login may see; check the name at {constants.ENDPOINT}, or use "
            "another login (`hf auth login` or HF_TOKEN)."
        )
    if isinstance(error, HfHubHTTPError):
        status, seconds = error.response.status_code, _retry_after(error)
        said = " ".join((error.server_message or "").split()).rstrip(".")
        later = "later" if seconds is None else f"in {seconds:.0f} seconds"
        advice = _LATER if status >= 500 else _ADVICE.get(status, "")
        advice = advice.format(owner=repo_id.split("/")[0], later=later)
        return f"The Hub refused {what} {repo_id} ({status}{said and f': {said}'}){advice}."
    if _is_of_storage(error):
        found = re.search(r" \(\d{3} [\w -]+\)", str(error))  # the rest can contain signed URLs
        return (
            f"The storage of the Hub (xet) failed{found[0] if found else ''} while {what} {repo_id}; run "
            "the command again later, or set HF_HUB_DISABLE_XET=1 to bypass this storage."
        )
    hub, name = f"The Hub ({constants.ENDPOINT})", type(error).__name__
    if name in ("ConnectError", "ProxyError", "UnsupportedProtocol", "InvalidURL"):
        return f"{hub} cannot be reached; check the connection, or HF_ENDPOINT if you set it."
    why = f"{hub} did not answer in time" if "Timeout" in name else "The connection broke"
    return f"{why} while {what} {repo_id}{_LATER}."


def connect(token: str | None, *, writing_to: str | None = None) -> HfApi:
    """Return a Hub client with ``token``. The default is HF_TOKEN, or the stored login."""
    given = token or get_token() or ""
    if not given.isascii() or not given.isprintable():  # the library's message would contain the token
        raise HubError("The Hub token contains invalid characters; log in with `hf auth login`, or correct HF_TOKEN.")
    if writing_to and constants.is_offline_mode():
        raise HubError(f"Writing to {writing_to} is not possible offline; unset HF_HUB_OFFLINE.")
    if writing_to and not given:
        raise HubError(
            f"Writing to {writing_to} needs a login; run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    if not sys.stderr.isatty():  # a log needs neither bars nor a notice of every attempt
        disable_progress_bars()
        hub_logging.set_verbosity_error()
    return HfApi(token=token, library_name="minibert", library_version=version())


def look_up(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """Return the newest commit of ``revision`` with its files. The default is main."""
    call = partial(api.model_info, repo_id, revision=revision, files_metadata=True)
    return ask("looking up", repo_id, call, revision=revision)


def download(api: HfApi, repo_id: str, revision: str | None, cache: Path | None = None) -> Path:
    """Download a model into ``cache``, by default the Hub's cache. Return its folder.

    Files that arrived before an interruption are not downloaded again.
    """

    def call() -> str:
        return api.snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=list(WANTED))

    return Path(ask("downloading", repo_id, call, revision=revision))


def commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    changes: "list[Change]",
    *,
    parent: str | None,
    branch: str,
    create_pr: bool,
) -> tuple[str, str | None]:
    """Upload ``changes`` as one commit on top of the commit ``parent``.

    Returns:
        The hash of the commit, and the address of the pull request if there is one.
    """
    operations = [
        CommitOperationDelete(one.path) if one.kind == "removed" else CommitOperationAdd(one.path, folder / one.path)
        for one in changes
    ]

    def call() -> tuple[str, str | None]:
        try:
            done = api.create_commit(
                repo_id,
                operations,
                commit_message=f"A model published by minibert {version()}",
                revision=branch,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return done.oid, done.pr_url
        except (HTTPError, OSError):
            # The Hub may have made the commit although its answer was lost.
            newest = None if create_pr else look_up(api, repo_id, branch)
            if newest is None or newest.sha == parent or compare(folder, files_of(newest)):
                raise
            return str(newest.sha), None

    # A second attempt could open a second pull request.
    return ask("uploading to", repo_id, call, revision=branch, attempts=1 if create_pr else _ATTEMPTS)


def fetch(repo_id: str, revision: str | None, token: str | None) -> tuple[str, Path, dict[str, RepoSibling]]:
    """Download a model. Return its commit, folder in the cache, and files on the Hub.

    In offline mode, the list of files is empty.
    """
    api, files = connect(token), {}
    info = None if constants.is_offline_mode() else look_up(api, repo_id, revision)
    if info is not None:
        files = files_of(info)
        if not any(path.endswith(".safetensors") for path in files):
            found = ", ".join(pickles(files))
            why = f"its weights are pickled ({found}), which can run code when opened"
            raise ValueError(
                f"{repo_id} cannot be used as a model: {why if found else 'it has no weights'}; ask its owner for safetensors."
            )
    # Download by the revision's name, so that the cache also knows the name when offline.
    folder = download(api, repo_id, revision)
    if info is not None and folder.name != info.sha:
        raise HubError(f"{repo_id} changed while downloading it; run the command again.")
    if damaged := [path for path in paths_in(folder) if path in files and not same(folder / path, files[path])]:
        raise ValueError(f"{', '.join(damaged)} of {repo_id} arrived damaged; delete {folder}, then run the command again.")
    return folder.name, folder, files


@dataclass(frozen=True)
class Change:
    """Describe a file that a commit adds, changes or removes. Sizes are in bytes."""

    path: str
    kind: str
    before: int | None
    after: int | None

    @property
    def text(self) -> str:
        """Return the change as a line of text.

        >>> Change("config.json", "changed", 900, 1000).text
        'changed  config.json  900 bytes -> 1.0 kB'
        """
        sizes = [decimal(size) for size in (self.before, self.after) if size is not None]
        return f"{self.kind:7}  {printable(self.path, kept='')}  {' -> '.join(sizes)}"


def files_of(info: ModelInfo) -> dict[str, RepoSibling]:
    """Return the files of a commit by path, without the Hub's own ``.gitattributes``."""
    files = {file.rfilename: file for file in info.siblings or ()}
    files.pop(".gitattributes", None)
    return files


def compare(folder: Path, remote: dict[str, RepoSibling]) -> list[Change]:
    """Return the changes that make the ``remote`` files equal to the files in ``folder``."""
    local, changes = paths_in(folder), []
    for path in local:
        known, size = remote.get(path), (folder / path).stat().st_size
        if known is None:
            changes.append(Change(path, "added", None, size))
        elif not same(folder / path, known):
            changes.append(Change(path, "changed", known.size, size))
    gone = sorted(remote.keys() - set(local))
    return changes + [Change(path, "removed", remote[path].size, None) for path in gone]


def same(file: Path, remote: RepoSibling) -> bool:
    """Return True if the hashes of ``file`` and ``remote`` are equal."""
    return sha256(file) == remote.lfs.sha256 if remote.lfs else git_hash(file.read_bytes()) == remote.blob_id
