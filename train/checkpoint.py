"""Write checkpoint folders atomically. A folder gets its final name when it is complete.

A checkpoint is a folder such as ``step-00000120``. The file ``manifest.json`` has the sizes of
all files in the folder. The sizes reveal missing and truncated files, but not changed bytes.
The name of an incomplete checkpoint is that of a temporary folder (``files.disk``).
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minibert.files import disk

MANIFEST = "manifest.json"
_KEPT = "files saved earlier are not changed"

readable_os_errors = partial(disk.readable_os_errors, kept=_KEPT)
# The names of all files that training and its libraries write into the folder of a stage.
_OURS = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "*_minibert.py", "modules.json"),
    *("config.json", "generation_config.json", "sentence_*_config.json", "config_sentence_transformers.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja"),
    *("stage.json", "environment.json", "metrics.json", "log.jsonl", "manifest.json", "state.json", "best.json"),
    *("losses.json", "trainer_state.json", "training_args.bin", "optimizer.safetensors", "optimizer.pt", "scheduler.pt"),
    *("scaler.pt", "rng_state*.pth", "teacher-*.npy", "data-*.arrow", "dataset_info.json", "events.out.tfevents.*"),
    *("hparams.yml", ".*.part", ".lock"),
)

exclusive_lock = partial(disk.exclusive_lock, doing="training in", kept=_KEPT)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a new folder with ``fill``, and then replace ``target`` by the new folder."""
    retired = disk.temporary_path(target)
    with readable_os_errors(target):
        with disk.atomic_write(target, folder=True) as temporary:
            fill(temporary)
            write_manifest(temporary)
            if target.exists():  # a rename cannot replace a folder with files
                os.replace(target, retired)
        delete(retired)
        disk.sync(target.parent)


def delete(folder: Path) -> None:
    """Delete the files in ``folder`` that training wrote. Other files stay, with a warning."""
    try:
        listed = list(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        listed = []
    disk.delete(folder, [*_OURS, *(Path(name).name for name in listed)])


def write_manifest(folder: Path) -> None:
    """Sync all files of ``folder`` to disk, and write the file sizes to ``manifest.json``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    for path in files:
        disk.sync(path)
    disk.write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})
    disk.sync(folder)


def find_corruption(folder: Path) -> str | None:
    """Return a message if a file is missing or truncated. Otherwise, return None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, size in manifest.items():
            if (folder / name).stat().st_size != size:
                return f"Checkpoint {folder} is damaged: {name} does not have the expected {size:,} bytes."
    except FileNotFoundError as error:
        return f"Checkpoint {folder} is damaged: {Path(error.filename).name} is missing."
    except (OSError, ValueError, AttributeError) as error:
        return f"Checkpoint {folder} is damaged: it cannot be read ({error})."
    return None


def latest_valid(root: Path, kind: str = "step") -> tuple[Path | None, dict[Path, str]]:
    """Return the newest valid folder ``<kind>-<step>``, and messages about damaged folders."""
    problems: dict[Path, str] = {}
    for folder in reversed(_steps(root, kind)):
        if (problem := find_corruption(folder)) is None:
            return folder, problems
        problems[folder] = problem
    return None, problems


def move_files(source: Path, target: Path) -> None:
    """Move all files from ``source`` to ``target``, and replace existing files atomically."""
    with readable_os_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            if path.name == MANIFEST:
                continue
            if path.is_dir():  # a rename cannot replace a folder with files
                delete(target / path.name)
            os.replace(path, target / path.name)
        delete(source)
        disk.sync(target)


def rotate(root: Path, keep: int, newest: Path, kind: str = "step") -> None:
    """Delete all checkpoints except ``newest`` and the last ``keep - 1`` before ``newest``."""
    folders = _steps(root, kind)
    position = folders.index(newest) + 1
    for folder in (*folders[: max(0, position - keep)], *folders[position:]):
        delete(folder)


def clear_leftovers(root: Path) -> None:
    """Delete the incomplete folders that killed processes left in ``root``."""
    for folder in disk.leftovers(root):
        delete(folder)


def _steps(root: Path, kind: str) -> list[Path]:
    numbers = {path: path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*")}
    return sorted(
        (path for path, number in numbers.items() if number.isdecimal()),
        key=lambda path: int(numbers[path]),
    )
