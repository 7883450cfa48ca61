"""Find the installed version of this package, and the commands that install missing extras."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

NAME = "minibert-hf"  # "minibert" on the package index is another project
ROOT = Path(__file__).resolve().parents[1]
# The extra that brings a module. Everything else that is imported comes with the package.
EXTRAS = {
    **{"bm25s": "search", "Stemmer": "search", "faiss": "search", "torchmetrics": "train"},
    **{"plotly": "plot", "matplotlib": "plot", "onnx": "export", "onnxscript": "export", "onnxruntime": "export"},
}


def version() -> str:
    """Return the installed version, or "unknown" if the package is not installed."""
    try:
        return distribution(NAME).version
    except PackageNotFoundError:
        return "unknown"


def missing(needs: str, extra: str) -> str:
    """Return a sentence that begins with ``needs`` and tells how to install ``extra``."""
    command = f"pip install '{NAME}[{extra}]'" if _is_wheel() else f"pip install -e '.[{extra}]' (in {ROOT})"
    return " ".join(filter(None, [f"{needs}, which the extra {extra} brings: {command}.", foreign()]))


def foreign() -> str | None:
    """Return a warning if another project named ``minibert`` is installed, else None."""
    for found in distributions(name="minibert"):
        if file := _init_of(found):  # None for an editable install of this package under its old name
            where = "whose files replace this package's" if file == ROOT / "__init__.py" else f"in {file.parent}"
            again = f"pip install --force-reinstall --no-deps {NAME}" if _is_wheel() else f"pip install -e . (in {ROOT})"
            return (
                f"This environment also has minibert {found.version}, another project with the same import name, {where}; "
                f"run: pip uninstall minibert, then: {again}."
            )
    return None


def _is_wheel() -> bool:
    try:
        return _init_of(distribution(NAME)) == ROOT / "__init__.py"
    except PackageNotFoundError:
        return False


def _init_of(found: Distribution) -> Path | None:
    """Return the path of the installed ``__init__.py``, or None for an editable install."""
    recorded = (file for file in found.files or () if file.as_posix() == "minibert/__init__.py")
    return next((Path(str(file.locate())).resolve() for file in recorded), None)
