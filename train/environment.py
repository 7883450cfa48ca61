"""Describe the machine, the libraries, the data and the start weights of a stage."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minibert.files import installation
from minibert.files.disk import expand_home
from minibert.train.stage import StageContext

_LIBRARIES = ("torch", "transformers", "sentence-transformers", "datasets", "accelerate")


def describe(stage: Any, context: StageContext, *, processes: int) -> dict[str, Any]:
    """Return the content of ``environment.json``, without host names and local paths."""
    versions = {name: version(name) for name in _LIBRARIES}
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "processes": processes,
        "versions": {"python": platform.python_version(), "minibert": installation.version(), **versions},
        "datasets": {
            source.path: source.commit
            for sources in (getattr(stage, "data", None), getattr(stage, "eval_data", None))
            for source in sources or ()
            if source.commit
        },
    }
    if torch.cuda.is_available():
        found["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    # Name the earlier stage that made the start weights, or the tokenizer for new weights.
    own_tokenizer = context.tokenizer if context.tokenizer != context.teacher else None
    start = context.model or own_tokenizer
    if start and Path(start).parent == context.output_dir.parent:
        found["started_from"] = Path(start).name
    # Only names on the Hub are recorded, so that publishing can tell them from local paths.
    for name, key in (("model", "base_model"), ("teacher", "teacher"), ("guide", "guide"), ("tokenizer", "tokenizer")):
        origin = getattr(context, name)
        if origin and not expand_home(origin).exists():
            found[key] = origin
    return found


def _processor() -> str:
    """Return the name of the processor, or its architecture if the name is unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
