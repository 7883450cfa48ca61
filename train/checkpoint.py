"""Write checkpoint folders atomically. A folder gets its final name when it is complete.

A checkpoint is a folder such as ``step-00000120``. The file ``manifest.json`` has the sizes of
all files in the folder. The sizes reveal missing and truncated files, but not changed bytes.
The name of an incomplete checkpoint is that of a temporary folder (``files.disk``).
"""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from minibert.files import disk
from minibert.files.processes import processes

logger = logging.getLogger(__name__)

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
    *("trainer_state.json", "optimizer.safetensors", "teacher-*.npy", "data-*.arrow", "dataset_info.json"),
    *("events.out.tfevents.*", "hparams.yml", ".*.part", ".lock"),
)

exclusive_lock = partial(disk.exclusive_lock, doing="training in", kept=_KEPT)


def save(root: Path, step: int, model: nn.Module, states: dict[str, Any], optimizer: Any = None, keep: int = 1) -> None:
    """Write the weights of ``model`` and the JSON files ``states`` to ``step-<step>`` in ``root``.

    Without ``optimizer``, the folder is ``best-<step>``. The last ``keep`` folders stay. Every
    process must call this function, and the main process writes.
    """
    kind = "step" if optimizer else "best"

    def fill(folder: Path) -> None:
        save_model(model, str(folder / "model.safetensors"))
        if optimizer:
            entries = optimizer.state_dict()["state"].items()
            tensors = {f"{number}.{key}": value.cpu() for number, entry in entries for key, value in entry.items()}
            save_file(tensors, folder / "optimizer.safetensors")
        for name, state in states.items():
            disk.write_json(folder / name, state)

    if processes().is_main_process:
        write_folder(written := root / f"{kind}-{step:08d}", fill)
        _delete_others(written, keep)
    processes().wait_for_everyone()  # a process that ends earlier would make torchrun stop the others


def _delete_others(newest: Path, keep: int) -> None:
    """Keep the checkpoint ``newest`` and others before it, together ``keep``. Later ones are damaged."""
    position = (folders := _steps(newest.parent, newest.name.partition("-")[0])).index(newest) + 1
    for folder in (*folders[: max(0, position - keep)], *folders[position:]):
        delete(folder)


def load_optimizer(folder: Path, optimizer: Any) -> None:
    """Load the state of ``optimizer``, except its learning rates, from a checkpoint."""
    state = {**optimizer.state_dict(), "state": {}}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        number, _, name = key.partition(".")
        state["state"].setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(state)


def newest(root: Path, keep: int) -> tuple[Path | None, Path | None]:
    """Return the newest valid checkpoint and the best weights. Log warnings about damaged ones.

    Checkpoints beyond ``keep``, which a killed process may have left, are deleted. Every process
    must call this function.
    """
    found: list[Any] = [None]
    if processes().is_main_process:
        delete_leftovers(root)
        found = [(latest_valid(root), latest_valid(root, kind="best"))]
    # All processes use this result, because some might not see every file yet.
    (folder, problems), (best, best_problems) = broadcast_object_list(found)[0]
    if processes().is_main_process:
        for problem in (*problems.values(), *best_problems.values()):
            logger.warning("%s This checkpoint is skipped.", problem)
        for valid, number in ((folder, keep), (best, 1)):
            if valid:
                _delete_others(valid, number)
        if folder:
            logger.warning("Resuming from %s.", folder)
        elif problems:
            logger.warning("No checkpoint in %s is valid; the run starts from the beginning.", root)
    return folder, best


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a new folder with ``fill``, and then replace ``target`` by the new folder.

    The folder gets a manifest. All files are synced to the disk before the folder gets its name.
    """
    retired = disk.temporary_path(target)
    with readable_os_errors(target):
        with disk.atomic_write(target, folder=True) as temporary:
            fill(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            for path in files:
                disk.sync(path)
            sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
            disk.write_json(temporary / MANIFEST, sizes)
            disk.sync(temporary)
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


def delete_leftovers(folder: Path) -> None:
    """Delete what killed processes have left at temporary paths in ``folder`` and its subfolders."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        for killed in disk.leftovers(place):
            delete(killed)


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
    """Return the newest valid folder ``<kind>-<step>``, and messages about others."""
    problems: dict[Path, str] = {}
    for folder in reversed(_steps(root, kind)):
        if (problem := find_corruption(folder)) is None:
            return folder, problems
        problems[folder] = problem
    return None, problems


def move_files(source: Path, target: Path) -> None:
    """Move all files from ``source`` to ``target``, each atomically."""
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


def _steps(root: Path, kind: str) -> list[Path]:
    return sorted(root.glob(f"{kind}-{'[0-9]' * 8}"))
