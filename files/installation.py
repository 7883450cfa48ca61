"""Say which distribution of this package is installed, and how to install what it lacks."""

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
    """Return the installed version, or ``unknown`` in a source tree that was never installed."""
    try:
        return distribution(NAME).version
    except PackageNotFoundError:
        return "unknown"


def missing(needs: str, extra: str) -> str:
    """Return a sentence that says how ``extra`` is installed beside this package, which is a checkout or a wheel."""
    command = f"pip install '{NAME}[{extra}]'" if _is_wheel() else f"pip install -e '.[{extra}]' (in {ROOT})"
    return " ".join(filter(None, [f"{needs}, which the extra {extra} brings: {command}.", foreign()]))


def foreign() -> str | None:
    """Return a sentence about another project's distribution ``minibert``, or ``None`` where there is none."""
    for found in distributions(name="minibert"):
        if file := _init_of(found):  # our own, from before it was renamed, recorded no such file: it was editable
            where = "whose files replace ours" if file == ROOT / "__init__.py" else f"in {file.parent}"
            again = f"pip install --force-reinstall --no-deps {NAME}" if _is_wheel() else f"pip install -e . (in {ROOT})"
            return (
                f"This environment also holds minibert {found.version}, another project of the same import name, {where}; run: "
                f"pip uninstall minibert, then: {again}."
            )
    return None


def _is_wheel() -> bool:
    try:
        return _init_of(distribution(NAME)) == ROOT / "__init__.py"
    except PackageNotFoundError:
        return False


def _init_of(found: Distribution) -> Path | None:
    """Return where a distribution put ``minibert/__init__.py``; an editable one puts it nowhere."""
    recorded = (file for file in found.files or () if file.as_posix() == "minibert/__init__.py")
    return next((Path(str(file.locate())).resolve() for file in recorded), None)
