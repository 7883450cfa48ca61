"""Folders that are complete or absent: written under a temporary name, synced, renamed, and checked by hash when read.

A checkpoint is a folder ``step-00000120`` whose ``manifest.json`` lists the SHA-256 of every other file. Whatever kills the
process, the folders without ``.tmp`` in their names are whole; whatever damages a disk later, the hashes tell.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from minibert.files import disk

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp"
_KEPT = "what was saved before is untouched"


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make ``target`` the folder that ``fill`` writes, or leave everything as it was.

    Raises:
        OSError: the disk is full or not writable; an earlier folder of that name, and its neighbours, are untouched.
    """
    temporary = target.with_name(f"{target.name}{_TEMPORARY}-{os.getpid()}")
    with readable_os_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            seal(temporary)
            if target.exists():  # a rename cannot replace a folder that holds files
                os.replace(target, retired := temporary.with_name(f"{temporary.name}.retired"))
                os.replace(temporary, target)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, target)
            disk.sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def seal(folder: Path) -> None:
    """Write the manifest of ``folder`` over all the files in it, and sync them: from now on :func:`damage` can judge it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    manifest = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (*files, folder / MANIFEST, folder):
        disk.sync(path)


def move_files(source: Path, target: Path) -> None:
    """Move the files of ``source`` over those of ``target``, each by one rename, then drop ``source`` and its manifest."""
    with readable_os_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            if path.name == MANIFEST:
                continue
            if path.is_dir():  # a rename cannot replace a folder that holds files
                shutil.rmtree(target / path.name, ignore_errors=True)
            os.replace(path, target / path.name)
        shutil.rmtree(source)
        disk.sync(target)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder made by :func:`write_folder`, in one sentence, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if _sha256(folder / name) != digest:
                return f"Checkpoint {folder} is damaged: {name} does not have the contents that were written."
    except FileNotFoundError as error:
        return f"Checkpoint {folder} is damaged: {Path(error.filename).name} is missing."
    except (OSError, ValueError, AttributeError) as error:
        return f"Checkpoint {folder} is damaged: it cannot be read ({error})."
    return None


def newest_good(root: Path, kind: str = "step") -> tuple[Path | None, list[str]]:
    """The checkpoint with the highest step that is whole, and a sentence about each damaged one that is newer."""
    problems: list[str] = []
    for folder in reversed(_steps(root, kind)):
        if (problem := damage(folder)) is None:
            return folder, problems
        problems.append(problem)
    return None, problems


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def rotate(root: Path, keep: int, newest: Path) -> None:
    """Delete all but the ``keep`` checkpoints up to ``newest``; later ones can only be damaged leftovers, and go as well."""
    folders = _steps(root)
    position = folders.index(newest) + 1
    for folder in (*folders[: max(0, position - keep)], *folders[position:]):
        shutil.rmtree(folder)


def clear_leftovers(root: Path) -> None:
    """Delete what killed processes left half-written."""
    for folder in root.glob(f"*{_TEMPORARY}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _steps(root: Path, kind: str = "step") -> list[Path]:
    return sorted(path for path in root.glob(f"{kind}-????????") if path.is_dir())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def readable_os_errors(target: Path) -> AbstractContextManager[None]:
    """:func:`minibert.files.disk.readable_os_errors` of a training run."""
    return disk.readable_os_errors(target, _KEPT)


def exclusive_lock(folder: Path) -> AbstractContextManager[None]:
    """:func:`minibert.files.disk.exclusive_lock` of a training run."""
    return disk.exclusive_lock(folder, "training in", kept=_KEPT)
