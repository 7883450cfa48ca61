"""Write folders that are complete or absent: under a temporary name, synced, then renamed.

A checkpoint is a folder ``step-00000120`` whose ``manifest.json`` lists the size of every
other file. A kill leaves no incomplete folder without ``.tmp`` in its name. The manifest
shows files that are missing or cut short later, but not a flipped bit.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minibert.files import disk

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp"
_KEPT = "what was saved before is untouched"

readable_os_errors = partial(disk.readable_os_errors, kept=_KEPT)
exclusive_lock = partial(disk.exclusive_lock, doing="training in", kept=_KEPT)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make ``target`` the folder that ``fill`` writes, or leave everything as it was."""
    temporary = target.with_name(f"{target.name}{_TEMPORARY}-{os.getpid()}")
    with readable_os_errors(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            fill(temporary)
            write_manifest(temporary)
            if target.exists():  # a rename cannot replace a folder that holds files
                os.replace(target, retired := temporary.with_name(f"{temporary.name}.retired"))
                os.replace(temporary, target)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, target)
            disk.sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Sync all files of ``folder``, then list their sizes in its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in files:
        disk.sync(path)
    disk.write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})
    disk.sync(folder)


def find_corruption(folder: Path) -> str | None:
    """Return a sentence about the first missing or truncated file, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest.items():
            if (folder / name).stat().st_size != size:
                return f"Checkpoint {folder} is damaged: {name} does not have the {size:,} bytes that were written."
    except FileNotFoundError as error:
        return f"Checkpoint {folder} is damaged: {Path(error.filename).name} is missing."
    except (OSError, ValueError, AttributeError) as error:
        return f"Checkpoint {folder} is damaged: it cannot be read ({error})."
    return None


def latest_valid(root: Path, kind: str = "step") -> tuple[Path | None, dict[Path, str]]:
    """Return the valid checkpoint with the highest step, and what is wrong with newer ones."""
    problems: dict[Path, str] = {}
    for folder in reversed(_steps(root, kind)):
        if (problem := find_corruption(folder)) is None:
            return folder, problems
        problems[folder] = problem
    return None, problems


def move_files(source: Path, target: Path) -> None:
    """Move the files of ``source`` over those of ``target``, each by one rename."""
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


def rotate(root: Path, keep: int, newest: Path) -> None:
    """Delete all but the ``keep`` checkpoints up to ``newest``, and later ones: they are damaged."""
    folders = _steps(root, "step")
    position = folders.index(newest) + 1
    for folder in (*folders[: max(0, position - keep)], *folders[position:]):
        shutil.rmtree(folder)


def clear_leftovers(root: Path) -> None:
    """Delete the incomplete folders of killed processes."""
    for folder in root.glob(f"*{_TEMPORARY}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _steps(root: Path, kind: str) -> list[Path]:
    numbers = {path: path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*")}
    return sorted(
        (path for path, number in numbers.items() if number.isdecimal()),
        key=lambda path: int(numbers[path]),
    )
