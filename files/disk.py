"""What all who write here share: one writer in a folder, what is written is kept and read back as it was, and trouble with the
disk is said in one sentence."""

import contextlib
import errno
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from safetensors import SafetensorError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: Path, doing: str, *, kept: str) -> Iterator[None]:
    """Keep other processes from writing into ``folder``; the system lets go of it when this one ends, however that happens.

    Who kills torchrun but not its processes has those still at work, and two runs would mix what they write.

    Args:
        doing: what this process does there, for the message of others: ``"training in"``.
        kept: as :func:`one_sentence` has it.

    Raises:
        ValueError: another process is at work there; says which.
    """
    if fcntl is None:
        yield
        return
    path = folder / ".lock"
    with one_sentence(path, kept):
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers that it forks do not hold it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                who = file.read() or "of another run"  # which has not written its number yet
                raise ValueError(
                    f"Process {who} is {doing} {folder}; wait for it, stop it, or choose another folder."
                ) from None
            # Some file systems have no locks.
        file.truncate(0)
        file.write(f"{os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_sentence(target: Path, kept: str) -> Iterator[None]:
    """Disk trouble, which safetensors reports as an error of its own, as one OSError that says what to do.

    Args:
        kept: what is not lost, as a clause.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{target} could not be written ({reason}); {kept}. "
            "Free or change the disk, then run the same command again to resume."
        ) from error


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class YamlLoader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number (YAML 1.1, which PyYAML follows, takes it for a string)."""


class _YamlDumper(yaml.SafeDumper):
    """What :class:`YamlLoader` reads: a text such as 1e-4 gets quotes."""


for _reads_or_writes in (YamlLoader, _YamlDumper):
    _reads_or_writes.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def to_yaml(value: Any) -> str:
    """A recipe, or a part of one, as text that people can read, and that :class:`YamlLoader` reads back as the same.

    >>> yaml.load(to_yaml({"data": ["\x85.csv", "1e5"], "rate": 1e-5}), Loader=YamlLoader)
    {'data': ['\x85.csv', '1e5'], 'rate': 1e-05}
    """
    readable = "\x85" not in json.dumps(value, ensure_ascii=False)  # an end of line that PyYAML reads back as a space
    text: str = yaml.dump(value, Dumper=_YamlDumper, sort_keys=False, allow_unicode=readable)
    return text
