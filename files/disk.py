"""Read, write and delete files of this package, with locks, atomic writes and readable errors."""

import contextlib
import json
import logging
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_JSON_LIMIT = 64_000_000  # bytes


def refuse_link(path: Path) -> None:
    """Raise ValueError if ``path``, a place for files of this package, is a link."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and minibert does not write its own files through links; delete the link.")


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str, *, kept: str, wait: bool = False) -> Iterator[None]:
    """Lock ``folder`` against other processes in a ``with`` block.

    If another process has the lock, raise ValueError. If ``wait`` is True, wait for the lock
    instead. In error messages, ``doing`` describes the activity of the processes, such as
    ``"training in"``, and ``kept`` states which data is not lost after a disk error.
    """
    refuse_link(file := folder / ".lock")
    lock = FileLock(file)
    try:
        with readable_os_errors(folder, kept):
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ValueError(f"Another process is {doing} {folder}; wait for it, stop it, or choose another folder.") from None
    try:
        yield
    finally:
        # Delete the file before the release. Afterwards it could be another process's lock.
        if file.exists() and not file.stat().st_size:  # a file with content is the user's
            file.unlink()
        lock.release()


def delete_unused_lock(folder: Path) -> None:
    """Delete the lock that a killed process has left in ``folder``."""
    if (folder / ".lock").exists():
        with contextlib.suppress(ValueError, OSError), exclusive_lock(folder, "using", kept=""):
            pass  # the end of the block deletes it


@contextlib.contextmanager
def readable_os_errors(target: Path, kept: str) -> Iterator[None]:
    """Convert disk errors to an OSError with advice. ``kept`` states which data is not lost."""
    try:
        yield
    except Timeout:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{target} could not be written ({reason}); {kept}. "
            "Free some disk space, restore its folder and permissions, or use another disk; "
            "then run the same command again to resume."
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a new file or folder, and rename it to ``path`` unless the ``with`` block fails."""
    for killed in () if folder else leftovers(path.parent, re.escape(path.name)):
        with contextlib.suppress(OSError), _in_use(killed, wait=False):  # fails while a process writes it
            delete(killed)
    part = temporary_path(path)
    part.mkdir(parents=True) if folder else part.touch(exist_ok=False)
    try:
        with contextlib.nullcontext() if folder else _in_use(part, wait=True):
            yield part
            sync(part)
            os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # libraries, and writes to an open file, name no file
            error.filename = str(path)
        raise
    finally:
        delete(part)


@contextlib.contextmanager
def _in_use(part: Path, *, wait: bool) -> Iterator[None]:
    """Lock a temporary file until its process ends. Raise OSError if it is locked and ``wait`` is False."""
    if sys.platform == "win32":  # no process can delete a file that another one has opened
        yield
        return
    with part.open("ab") as file:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def temporary_path(path: Path) -> Path:
    """Return an unpredictable path next to ``path``, for a file or folder to rename to ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def leftovers(folder: Path, names: str = ".+") -> list[Path]:
    """Return what killed processes left at temporary paths. ``names`` is a regular expression."""
    return [path for path in folder.glob(".*.part") if re.fullmatch(rf"\.{names}\.\w{{8}}\.part", path.name)]


def delete(path: Path, ours: Sequence[str] = ("*",)) -> None:
    """Delete a file, or the files in a folder whose names match the patterns ``ours``.

    Other files stay, with a warning. Links are not followed. ``path`` may be missing.
    """
    if path.is_file() and not path.is_symlink():
        path.unlink(missing_ok=True)
    for folder, _, files in os.walk(path, topdown=False) if not path.is_symlink() else ():
        for name in files:
            if any(fnmatchcase(name, pattern) for pattern in ours):
                Path(folder, name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds other files
            os.rmdir(folder)
    if os.path.lexists(path):
        logger.warning("%s stays, because minibert did not write all that it holds.", path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8. An existing file is replaced atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON. An existing file is replaced atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """Return the content of a JSON file in a model folder. Raise a ValueError above 64 MB."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} is not a model folder: it contains no {file.name}; give another folder.")
    check_regular(file)
    if file.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{file} is larger than {_JSON_LIMIT:,} bytes; save or download the model again.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); save or download the model again.") from error


def read_settings(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model, or {} if the file does not exist."""
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it is not a JSON object); save or download the model again.")
    return found


def check_regular(file: Path) -> None:
    """Raise ValueError if ``file`` is a pipe, a device or a folder. Reading a pipe would wait."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is not a regular file but a pipe, a device or a folder; replace it by a file.")


def expand_home(path: str | Path) -> Path:
    """Return ``path`` with a leading ``~`` replaced by the home folder.

    A file that has this very name comes first, and the name of an unknown user stays, for
    which ``Path.expanduser`` raises a RuntimeError.
    """
    if os.path.exists(path) and str(path).startswith("~"):
        return Path(os.path.abspath(path))  # otherwise, a library would expand it
    return Path(os.path.expanduser(path))


def sha256(file: Path) -> str:
    """Return the SHA-256 hash of a file as hexadecimal digits."""
    with file.open("rb") as content:
        return sha_fileobj(content).hex()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk with fsync."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class YamlLoader(yaml.SafeLoader):
    """Load YAML, and read 1e-4 as a number. PyYAML alone reads 1e-4 as text."""


class _YamlDumper(yaml.SafeDumper):
    """Dump YAML for :class:`YamlLoader`. A text such as 1e-4 gets quotes."""


for _reads_or_writes in (YamlLoader, _YamlDumper):
    _reads_or_writes.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def to_yaml(value: Any) -> str:
    r"""Return ``value`` as readable YAML that :class:`YamlLoader` reads back unchanged.

    >>> yaml.load(to_yaml({"data": ["\x85.csv", "1e5"], "rate": 1e-5}), Loader=YamlLoader)
    {'data': ['\x85.csv', '1e5'], 'rate': 1e-05}
    """
    readable = "\x85" not in json.dumps(value, ensure_ascii=False)  # PyYAML would read this line break back as a space
    text: str = yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, allow_unicode=readable)
    return text
