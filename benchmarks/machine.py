"""Describe what a number was measured on: processor, threads and versions."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "accelerate", "tokenizers", "numpy")


def describe() -> dict[str, object]:
    """Processor, device, threads and package versions, to be written with every number."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": models[0] if models else platform.processor(),
        "bfloat16_instructions": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def commit(checkout: Path) -> str:
    """Return the short name of the commit of ``checkout``."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, check=True, capture_output=True, text=True)
    return done.stdout.strip()
