"""Write files safely: one writer per folder, files that appear complete or not at all, readable errors, and YAML."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError

_JSON_LIMIT = 64_000_000  # bytes


@contextlib.contextmanager
def exclusive_lock(folder: Path, doing: str, *, kept: str, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing into ``folder`` until the block or this process ends.

    For messages, ``doing`` is what this process does there (``"training in"``), and
    ``kept`` what is not lost if the disk fails. ``wait`` waits for the other process
    instead of refusing.
    """
    lock = FileLock(folder / ".lock")
    try:
        with readable_os_errors(folder, kept):
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise ValueError(f"Another process is {doing} {folder}; wait for it, stop it, or choose another folder.") from None
    try:
        yield
    finally:
        # Before the release: later, it could remove the lock of the next process.
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def readable_os_errors(target: Path, kept: str) -> Iterator[None]:
    """Raise disk trouble as one OSError that says what to do, and what is not lost (``kept``)."""
    try:
        yield
    except Timeout:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{target} could not be written ({reason}); {kept}. "
            "Free or change the disk, then run the same command again to resume."
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block ends; after an error, it does not."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8, atomically."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace the content of ``path`` by ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """Read a JSON file of a model folder, of at most 64 MB."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} is not a model folder: it holds no {file.name}.")
    if file.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{file} is larger than {_JSON_LIMIT:,} bytes; it is not a file of a model.")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); save or download the model again.") from error


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as content:
        return sha_fileobj(content).hex()


def sync(path: Path) -> None:
    """Make the system write a file, or the names in a folder, to the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class YamlLoader(yaml.SafeLoader):
    """Read YAML, and 1e-4 as a number: PyYAML follows YAML 1.1, which reads it as text."""


class _YamlDumper(yaml.SafeDumper):
    """Write what :class:`YamlLoader` reads: a text such as 1e-4 gets quotes."""


for _reads_or_writes in (YamlLoader, _YamlDumper):
    _reads_or_writes.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def to_yaml(value: Any) -> str:
    r"""Write a value as readable text that :class:`YamlLoader` reads back as the same value.

    >>> yaml.load(to_yaml({"data": ["\x85.csv", "1e5"], "rate": 1e-5}), Loader=YamlLoader)
    {'data': ['\x85.csv', '1e5'], 'rate': 1e-05}
    """
    readable = "\x85" not in json.dumps(value, ensure_ascii=False)  # an end of line that PyYAML reads back as a space
    text: str = yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, allow_unicode=readable)
    return text
