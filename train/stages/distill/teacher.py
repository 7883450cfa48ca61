"""Load a frozen teacher, and cache the outputs of the teacher."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minibert.files.disk import atomic_write
from minibert.files.processes import processes
from minibert.inference.load import open_weights
from minibert.train.checkpoint import readable_os_errors
from minibert.train.rows import TokenizedDataset

# After an interruption, each process recomputes the outputs of at most this many rows.
ROWS_PER_FILE = 65536


def load_teacher(auto_class: Any, source: str, description: str) -> PreTrainedModel:
    """Load a frozen teacher. Raise ValueError with ``description`` if weights are missing."""
    teacher, report = open_weights(auto_class, source, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{source} is not {description}: the weights {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''} are missing. Give a teacher that was trained for this "
            "task, or train a teacher in an earlier stage."
        )
    frozen: PreTrainedModel = freeze(teacher)
    return frozen


def freeze(teacher: Any) -> Any:
    """Move ``teacher`` to the device of this process, without gradients."""
    return teacher.eval().requires_grad_(False).to(processes().device)


def same_tokens(first: Any, second: Any) -> bool:
    """Return True if two tokenizers give the same token ids for a text."""
    probe = "Ünïcode “probe”: don't STOP at 42.5%, x_y — 漢字 [MASK]"
    return bool(first.get_vocab() == second.get_vocab() and first(probe)["input_ids"] == second(probe)["input_ids"])


def fingerprint(model: nn.Module, *facts: Any) -> str:
    """Return a hash of the weights of ``model`` and of ``facts``."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_teacher_outputs(
    folder: Path,
    key: str,
    rows: int,
    compute: Callable[[range], Any],
) -> list[np.ndarray]:
    """Compute a teacher's outputs for all rows, or read them from ``folder``.

    Processes divide the work and must use the same ``folder``. A resumed run reuses complete
    files. A different teacher or different inputs need another ``key``, which is in the names
    of the files. The result is memory-mapped float32 arrays of ``ROWS_PER_FILE`` rows.
    """
    state = processes()
    paths = [folder / f"teacher-{key}-{start:010d}.npy" for start in range(0, rows, ROWS_PER_FILE)]
    if state.is_main_process:
        with readable_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    mine = list(enumerate(paths))[state.process_index :: state.num_processes]
    for number, path in tqdm(mine, desc="teacher", leave=False, disable=not state.is_main_process):
        if not path.exists():
            start = number * ROWS_PER_FILE
            outputs = np.asarray(compute(range(start, min(start + ROWS_PER_FILE, rows))), dtype=np.float32)
            with readable_os_errors(path), atomic_write(path) as part, part.open("wb") as file:
                np.save(file, outputs)
    state.wait_for_everyone()
    return [np.load(path, mmap_mode="r") for path in paths]


class TaughtRows:
    """Store rows of tokens with the teacher's outputs, the student's argument ``name``.

    ``outputs`` is None if the teacher runs at every step. A run resumes only with the same hash
    ``teacher``.
    """

    def __init__(self, rows: TokenizedDataset, name: str, outputs: list[np.ndarray] | None, teacher: str):
        self.rows, self.name, self.outputs = rows, name, outputs
        self.fingerprint = f"{rows.fingerprint}-{teacher}"

    def __len__(self) -> int:
        return len(self.rows)

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return inputs and labels for the student, with the teacher's outputs (rows, C)."""
        batch = self.rows.collate(rows)
        if self.outputs is not None:
            found = [self.outputs[row // ROWS_PER_FILE][row % ROWS_PER_FILE] for row in rows]
            batch[self.name] = torch.from_numpy(np.stack(found))
        return batch
