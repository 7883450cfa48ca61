"""Connect the processes that torchrun started, and check that workers can be started."""

import multiprocessing
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

# Processes wait while another process tokenizes, encodes its last shards or evaluates. This
# can take days.
_PATIENCE = timedelta(days=7)


def processes() -> "PartialState":
    """Return Accelerate's ``PartialState``: process index, number of processes, and device.

    The first call joins the process group of torchrun. Without torchrun there is one process.
    """
    import torch
    from accelerate import PartialState

    # Without ``cpu``, Accelerate would not connect the processes on a machine without an
    # accelerator.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def check_workers(count: int, field: str = "num_workers") -> None:
    """Raise OSError if worker processes are wanted that cannot share memory."""
    try:
        if count:
            multiprocessing.Lock()
    except OSError as error:
        raise OSError(f"{field}: {count} needs shared memory, but /dev/shm fails ({error.strerror}); set it to 0.") from error
