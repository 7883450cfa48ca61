"""What all pictures share: an interactive and a still form, a file that opens without network, and texts shown as they are."""

import html
import io
import os
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
import plotly.io
from matplotlib import font_manager
from matplotlib.figure import Figure
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minibert.data.load import as_dataset, text_columns
from minibert.files.model_folder import opening
from minibert.inference.load import _encoder_folder, find_model

SUFFIXES = (".html", ".png")
# Okabe and Ito's colours, which people with any kind of colour vision tell apart, without yellow, and four more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#882255", "#44AA99", "#332288")
INK, RULE, UNKNOWN = "#222222", "#D8D8D8", "#C62828"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
_DOTS_PER_INCH = 130
# Scripts that matplotlib's own font lacks; those of these fonts that are installed fill in.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0; font-family: {font}; color: {ink}; background: #fff; }}
main {{ max-width: {width}px; margin: 0 auto; padding: 8px 10px; }}
h1 {{ font-size: 1.15rem; margin: 0.3rem 0; overflow-wrap: anywhere; }}
p {{ font-size: 0.9rem; margin: 0.3rem 0; color: #555; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{notes}
{figure}
</main>
</body>
</html>
"""
# A figure that has two arrangements in its ``meta`` takes the one that the window has room for, also when that changes.
# The height goes to the element: a figure with a height of its own would keep its width too.
_ARRANGE = """
const figure = document.getElementById("{plot_id}");
const all = figure.layout.meta;
let arranged = null;
const arrange = () => {
    const wanted = all && window.innerWidth < 760 ? "narrow" : "wide";
    if (wanted === arranged) return;
    arranged = wanted;
    const {height, ...layout} = all ? all[wanted].layout : figure.layout;
    figure.style.height = height + "px";
    Plotly.update(
        figure,
        all ? all[wanted].traces : {},
        {...(all ? layout : {}), width: null, height: null, autosize: true},
        all ? all.numbers : []
    );
};
window.addEventListener("resize", arrange);
arrange();
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Picture(ABC):
    """Facts, and how they are drawn.

    Attributes:
        title: one line about what is shown.
        notes: what the reader must know to read it rightly, such as what was left out; one sentence each.
    """

    title: str
    notes: tuple[str, ...] = ()

    @property
    def page_width(self) -> int:
        """Pixels that the page takes at most."""
        return 1240

    @abstractmethod
    def interactive(self) -> go.Figure:
        """The plotly figure, without title and notes: a page has them above it."""

    @abstractmethod
    def draw(self) -> Figure:
        """The matplotlib figure without title."""

    def static(self) -> Figure:
        """The matplotlib figure."""
        with _as_written():
            figure = self.draw()
            characters = round(figure.get_figwidth() * 11)
            lines = [self.title, *self.notes]
            figure.suptitle("\n".join(textwrap.fill(plain(line), characters) for line in lines), fontsize=10, color=INK)
            figure.draw_without_rendering()  # labels that come into being later would read formulas into texts
        return figure

    def page(self) -> str:
        """A whole HTML page that needs no network."""
        figure = plotly.io.to_html(
            self.interactive(),
            full_html=False,
            include_plotlyjs=True,
            config={"responsive": True, "displaylogo": False},
            post_script=_ARRANGE,
        )
        notes = "\n".join(f"<p>{html.escape(plain(note))}</p>" for note in self.notes)
        title = html.escape(plain(self.title))
        return _PAGE.format(title=title, notes=notes, figure=figure, font=FONT, ink=INK, width=self.page_width)

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write an interactive page (``.html``) or an image (``.png``).

        Raises:
            FileExistsError: ``out`` exists, and not ``force``.
            ValueError: for another suffix.
            OSError: the folder is not there or cannot be written to.
        """
        out = check_output(out, force=force)
        data = self._repr_png_() if out.suffix.lower() == ".png" else self.page().encode("utf-8")
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            part.write_bytes(data)
            part.replace(out)
        finally:
            part.unlink(missing_ok=True)
        return out

    def _repr_png_(self) -> bytes:
        """How a notebook shows a picture: as an image, which its file can hold."""
        buffer = io.BytesIO()
        with _as_written():
            self.static().savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
        return buffer.getvalue()


@contextmanager
def _as_written() -> Iterator[None]:
    """matplotlib settings under which a text between dollar signs is no formula, and rare scripts are drawn if possible."""
    installed = set(font_manager.get_font_names())
    more = [name for name in _MORE_FONTS if name in installed]
    settings: Any = {
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["sans-serif", *more],
        "font.sans-serif": ["DejaVu Sans"],
        "font.monospace": ["DejaVu Sans Mono"],
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it is drawn as a box
        yield


def check_output(out: str | Path, *, force: bool) -> Path:
    """Refuse a file that should not be written, before anything is computed.

    Raises: as :meth:`Picture.save` does.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {out} ends in none of {', '.join(SUFFIXES)}: a page to explore, or an image.")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder; name a file.")
    if out.exists() and not force:
        raise FileExistsError(f"--out {out} exists; name another file, or replace it with --force.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder {out.parent} of --out {out} does not exist; make it first.")
    return out


# ------------------------------------------------------------------------------------------------------------------- texts


def plain(text: str, width: int | None = None) -> str:
    """``text`` in one line, without characters that cannot be seen, cut to ``width`` of them.

    >>> plain("one\\n two\\tthree", 9)
    'one two …'
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def markup(text: str, width: int | None = None) -> str:
    """:func:`plain` text for plotly, which would read tags and formulas in it.

    >>> markup("<s> & $x$")
    '&lt;s&gt; &amp; &#36;x&#36;'
    """
    return html.escape(plain(text, width), quote=False).replace("$", "&#36;")


def hover(text: str) -> str:
    """A long text for plotly's hover box: some lines of it."""
    return "<br>".join(map(markup, textwrap.wrap(plain(text), 60, max_lines=8, placeholder=" …")))


def check_text(text: str, name: str = "The text") -> None:
    """Refuse a text without anything to see.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is empty; give words to look at.")


def read_texts(
    given: Sequence[str],
    *,
    column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> tuple[list[str], list[str] | None]:
    """Texts given as they are, or those in the one file, folder or Hub data set that is named, with their labels.

    What ends in no known suffix, is no path here and holds a blank, or is one of several, is a text.

    Args:
        column: of the texts; unset means the only one, or the one with a usual name.
        label_column: unset means ``label``, where there is one.
        limit: at most so many rows, drawn at random but always the same, in the order of the file.

    Raises:
        FileNotFoundError, ValueError: as :func:`minibert.data.load.load` does, or a column is not there.
    """
    if not _names_data(given):
        if column or label_column:
            raise ValueError("Texts have no columns; name a file, or leave out --column and --label-column.")
        return list(given), None
    rows = as_dataset(given[0], split=split)
    strings = text_columns(rows)
    if label_column is not None and label_column not in rows.column_names:
        raise ValueError(f"{given[0]} has no column {label_column!r}; it has {', '.join(rows.column_names)} (--label-column).")
    label_column = label_column or ("label" if "label" in rows.column_names else None)
    candidates = [name for name in strings if name != label_column]
    usual = [name for name in ("text", "sentence", "passage", "query", "sentence1") if name in candidates]
    wanted = column or (candidates[0] if len(candidates) == 1 else next(iter(usual), None))
    if wanted not in strings:
        raise ValueError(
            f"Which column of {given[0]} holds the texts? It has {', '.join(strings) or 'none'} of texts; name one (--column)."
        )
    rows = rows.filter(lambda text: bool(text and text.strip()), input_columns=wanted)
    if limit is not None and len(rows) > limit:
        rows = rows.select(sorted(np.random.default_rng(0).choice(len(rows), limit, replace=False)))
    if not len(rows):
        raise ValueError(f"Every text in column {wanted!r} of {given[0]} is blank; give texts.")
    labels = None
    if label_column is not None:
        names = getattr(rows.features[label_column], "names", None)
        labels = [str(names[value] if names and isinstance(value, int) else value) for value in rows[label_column]]
    return list(rows[wanted]), labels


def _names_data(given: Sequence[str]) -> bool:
    if len(given) != 1:
        return False
    name = given[0]
    if len(name) < 4096 and "\n" not in name and Path(name).expanduser().exists():
        return True
    return " " not in name and (Path(name).suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt") or "/" in name)


def ticks(count: int, most: int) -> list[int]:
    """Places of at most ``most`` evenly spaced labels for ``count`` things.

    >>> ticks(7, 4)
    [0, 2, 4, 6]
    """
    return list(range(0, count, max(1, -(-count // most))))


# ------------------------------------------------------------------------------------------------------------------ models


def open_encoder(
    model: str | Path, *, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bare encoder of ``model`` on the CPU, and its tokenizer.

    Raises: as :func:`minibert.inference.load.load` does.
    """
    folder = _encoder_folder(find_model(model, trust_remote_code=trust_remote_code))
    with opening(folder):
        encoder = AutoModel.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    return encoder.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def name_of(model: str | Path) -> str:
    """The end of a path, or the id on the Hub."""
    return "/".join(Path(model).parts[-2:])


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as people read them: byte-level ones are decoded, with ``▁`` where a space was.

    A token that is only a part of a character, or special, stays as it is.
    """
    labels = []
    for token, special in zip(tokenizer.convert_ids_to_tokens(list(ids)), (i in tokenizer.all_special_ids for i in ids)):
        readable = token
        if not special and token and not token.isascii():
            decoded = tokenizer.convert_tokens_to_string([token])
            if token[0] == "Ġ":
                readable = "▁" + decoded.lstrip(" ")
            elif _is_byte_level(tokenizer) and "\ufffd" not in decoded:
                readable = decoded
        labels.append(plain(readable) or repr(token))
    return labels


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
