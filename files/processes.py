"""Say which of the cooperating processes this one is."""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

# Processes wait for each other while one tokenizes, encodes its last shards or evaluates,
# which can take days.
_PATIENCE = timedelta(days=7)


def processes() -> "PartialState":
    """Return Accelerate's state of the processes that torchrun started: this one's index, their number, its device.

    The first call joins the process group; without torchrun there is one process.
    """
    import torch
    from accelerate import PartialState

    # Without ``cpu``, Accelerate takes the processes on a machine without accelerator for
    # unrelated ones.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
