"""Draw diagrams as an interactive page (plotly) and as an image (matplotlib)."""

import html
import io
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from datasets import ClassLabel
from matplotlib import font_manager
from matplotlib.figure import Figure
from plotly.subplots import make_subplots
from transformers import PreTrainedTokenizerBase

from minibert.data.columns import pick_columns
from minibert.data.files import kind_of
from minibert.data.load import as_dataset, text_column
from minibert.files.disk import atomic_write, expand_home
from minibert.inference.predict import check_output

SUFFIXES = (".html", ".png")
# Okabe and Ito's colours for any kind of colour vision, without yellow, and four more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#882255", "#44AA99", "#332288")
INK = "#222222"
_SCALE = "Blues"
# The names of plotly's lines and markers in matplotlib.
_LINES = {"solid": "-", "dash": "--", "dot": ":"}
_MARKERS = {"circle": "o", "diamond": "D", "square": "s"}
# Fonts for scripts that matplotlib's own font lacks, if they are installed.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari")

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 1240px; margin: 0 auto; padding: 8px 10px; font-family: system-ui, 'DejaVu Sans', Arial, sans-serif; }}
h1 {{ font-size: 1.15rem; overflow-wrap: anywhere; }}
p {{ font-size: 0.9rem; color: #555; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
{notes}
<main>
{body}
</main>
</html>
"""


class Text(NamedTuple):
    """Place a text to the right of a point, or to the left with ``side="right"``."""

    point: Sequence[float]
    text: str
    colour: str = INK
    side: str = "left"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Describe a diagram that plotly and matplotlib draw from the same data.

    Attributes:
        traces: the plotly traces: one heat map, or lines and points in two or three dimensions.
        axes: the names of the axes, x first.
        texts: the texts to draw next to points.
        columns: the text and the colour of each column of a heat map.
        rows: the text and the colour of each row of a heat map.
        frame: the limits of x and of y. If the limits are given, the axes are invisible.
    """

    traces: Sequence[Any]
    title: str = ""
    axes: Sequence[str] = ("", "")
    texts: Sequence[Text] = ()
    columns: Sequence[tuple[str, str]] = ()
    rows: Sequence[tuple[str, str]] = ()
    frame: tuple[tuple[float, float], tuple[float, float]] | None = None


def heat_map(cells: np.ndarray, columns: Sequence[str], rows: Sequence[str], hover_text: str) -> go.Heatmap:
    """Return a heat map. ``hover_text`` is a template in the syntax of plotly."""
    x, y = ([f"{at} {hover(text)}" for at, text in enumerate(texts, start=1)] for texts in (columns, rows))
    return go.Heatmap(
        z=cells,
        x=x,
        y=y,
        zmin=min(0.0, float(cells.min())),
        zmax=float(cells.max()),
        colorscale=_SCALE,
        colorbar={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "ypad": 30, "len": 0.12, "thickness": 9},
        hovertemplate=hover_text,
    )


def page_figure(panels: Sequence[Panel], menus: Mapping[str, Mapping[str, Any]] | None = None) -> go.Figure:
    """Draw diagrams of the same type in a plotly figure with up to two columns.

    ``menus`` maps the name of each menu to a dictionary. The dictionary maps each item of the
    menu to the changes of the traces, as in plotly's ``restyle``.
    """
    kind, columns = panels[0].traces[0].type, min(2, len(panels))
    rows = -(-len(panels) // columns)
    each = {"scatter3d": 560, "scatter": 190}.get(kind, min(2400, max(240, 18 * len(panels[0].rows))))
    height = rows * (each + 62) - 62
    cells: list[Any] = [{"type": "scene" if kind == "scatter3d" else "xy"} for _ in panels]
    cells += [None] * (rows * columns - len(panels))
    figure = make_subplots(
        rows,
        columns,
        specs=[cells[at : at + columns] for at in range(0, len(cells), columns)],
        subplot_titles=[markup(panel.title) for panel in panels],
        horizontal_spacing=0.06,
        vertical_spacing=62 / height,
    )
    for at, panel in enumerate(panels):
        place = {"row": at // columns + 1, "col": at % columns + 1}
        figure.add_traces(panel.traces, place["row"], place["col"])
        texts = [
            {
                **dict(zip("xyz", map(float, text.point))),
                "text": markup(text.text, 20),
                "showarrow": False,
                "font": {"size": 10, "color": text.colour},
                "xanchor": text.side,
                "xshift": 6 if text.side == "left" else -6,
            }
            for text in panel.texts
        ]
        if kind == "scatter3d":
            look = {"backgroundcolor": "#F5F5F5", "gridcolor": "#DDDDDD"}
            axes: dict[str, Any] = {f"{letter}axis": {**look, "title": name} for letter, name in zip("xyz", panel.axes)}
            camera = {"eye": {"x": 1.2, "y": -1.9, "z": 0.9}, "center": {"x": 0, "y": 0, "z": -0.12}}
            figure.update_scenes(**axes, aspectmode="cube", camera=camera, annotations=texts, **place)
            continue
        figure.layout.annotations += tuple({**text, "xref": f"x{at + 1}", "yref": f"y{at + 1}"} for text in texts)
        if panel.frame:
            figure.update_xaxes(visible=False, fixedrange=True, range=panel.frame[0], **place)
            figure.update_yaxes(visible=False, fixedrange=True, range=panel.frame[1], **place)
        elif kind == "heatmap":
            title = {"text": panel.axes[0], "standoff": 5}
            figure.update_xaxes(type="category", title=title, **_labels(panel.columns, 48), **place)
            figure.update_yaxes(type="category", title=panel.axes[1], autorange="reversed", **_labels(panel.rows, 170), **place)
        else:
            figure.update_xaxes(matches="x", **place)
    named: dict[str, Any] = {}
    for trace in figure.data:
        trace.legendgroup = trace.name
        trace.showlegend = bool(trace.name) and named.setdefault(trace.name, trace) is trace
    margin = {"l": 40, "r": 10, "t": 90 if menus else 60, "b": 20 + 22 * min(8, len(named))}
    return figure.update_layout(
        template="plotly_white",
        font={"color": INK, "size": 11},
        height=height + margin["t"] + margin["b"] + (110 if kind == "heatmap" else 0),
        margin=margin,
        updatemenus=[
            {
                "name": name,
                "buttons": [{"label": label, "method": "restyle", "args": [change]} for label, change in items.items()],
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "pad": {"b": 32, "l": 112 * at},
                "bgcolor": "white",
            }
            for at, (name, items) in enumerate((menus or {}).items())
        ],
        # A click on the legend would hide points, but not their texts.
        legend={"orientation": "h", "y": -0.05, "yanchor": "top", "itemclick": False if panels[0].texts else "toggle"},
    )


def _labels(texts: Sequence[tuple[str, str]], most: int) -> dict[str, Any]:
    shown = ticks(len(texts), most)
    labels = [f'<span style="color:{colour}">{markup(text, 30)}</span>' for text, colour in texts]
    return {"tickvals": shown, "ticktext": [labels[at] for at in shown], "automargin": True, "showgrid": False}


def image_figure(panels: Sequence[Panel], cell: tuple[float, float], columns: int = 2) -> Figure:
    """Draw diagrams in a figure. ``cell`` is the size of each in inches."""
    kind, columns = panels[0].traces[0].type, min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(5.0, cell[0] * columns), cell[1] * rows + 0.9), layout="constrained")
    named: dict[str, Any] = {}
    for at, panel in enumerate(panels, start=1):
        space = "3d" if kind == "scatter3d" else None
        shared = figure.axes[0] if kind == "scatter" and at > 1 else None
        axes: Any = figure.add_subplot(rows, columns, at, projection=space, sharex=shared)
        axes.set(**{f"{letter}label": name for letter, name in zip("xyz", panel.axes)})
        axes.set_title(panel.title, fontsize=min(9.0, 5 * cell[0]))
        if kind == "heatmap" and not panel.frame:
            _draw_cells(axes, panel, min(cell))
            continue
        for trace in panel.traces:
            (line,) = axes.plot(
                *(trace[letter] for letter in "xyz"[: len(panel.axes)]),
                color=trace.line.color or trace.marker.color,
                alpha=trace.opacity,
                linestyle=_LINES[trace.line.dash or "solid"] if "lines" in trace.mode else "none",
                linewidth=trace.line.width,
                marker=_MARKERS[trace.marker.symbol or "circle"] if "markers" in trace.mode else "",
                markersize=trace.marker.size,
            )
            named.setdefault(html.unescape(trace.name or ""), line)
        for text in panel.texts:
            axes.text(*text.point, f"  {plain(text.text, 20)}  ", color=text.colour, ha=text.side, va="center")
        if panel.frame:
            axes.set(xlim=panel.frame[0], ylim=panel.frame[1])
            axes.axis("off")
        elif space:
            axes.set_box_aspect(None, zoom=0.95)
        else:
            axes.grid(color="#E5E5E5", linewidth=0.6)
    named.pop("", None)
    if named:
        fitting = max(1, int(figure.get_figwidth() * 14 / (8 + max(map(len, named)))))
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=fitting)
    return figure


def _draw_cells(axes: Any, panel: Panel, inches: float) -> None:
    """Draw a heat map. Leave out labels that would be too small to read."""
    image = axes.imshow(panel.traces[0].z, cmap=_SCALE, vmin=0, interpolation="nearest")
    if any(panel.axes):
        axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02).outline.set_visible(False)
    axes.spines[:].set_visible(False)
    for axis, labels in ((axes.xaxis, panel.columns), (axes.yaxis, panel.rows)):
        shown = ticks(len(labels), 100)
        size = min(8.0, 45 * inches / max(1, len(shown)))
        if size < 4:
            shown = []
        axis.set_ticks(shown, [plain(labels[at][0], 24) for at in shown], fontsize=size)
        axis.set_tick_params(length=0)
        for at, label in zip(shown, axis.get_ticklabels()):
            label.set_color(labels[at][1])
    axes.tick_params(axis="x", labelrotation=90)


@contextmanager
def _image_settings() -> Iterator[None]:
    """Disable formulas in texts, and add fonts for non-Latin writing systems."""
    more = sorted({*_MORE_FONTS} & {*font_manager.get_font_names()})
    settings: Any = {
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["sans-serif", *more],
        "font.size": 8,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a missing glyph is drawn as a box
        yield


@dataclass(frozen=True, eq=False, kw_only=True)
class Picture(ABC):
    """Store the data of a picture, and draw it as a page (plotly) or an image (matplotlib).

    Attributes:
        title: one line that describes the picture.
        notes: sentences that readers need, for example about data that was left out.
    """

    title: str
    notes: tuple[str, ...] = ()
    #: Width and height of a panel in an image, in inches.
    cell = (6.2, 4.6)

    @abstractmethod
    def panels(self) -> list[Panel]:
        """Return the diagrams of the picture."""

    def interactive(self) -> go.Figure:
        """Return a plotly figure of the diagrams, without the title."""
        return page_figure(self.panels())

    def draw(self) -> Figure:
        """Return a matplotlib figure of the diagrams, without the title."""
        return image_figure(self.panels(), self.cell)

    def page(self) -> str:
        """Return a complete HTML page, which needs no network."""
        notes = "\n".join(f"<p>{html.escape(plain(note))}</p>" for note in self.notes)
        config = {"responsive": True, "displaylogo": False}
        body = self.interactive().to_html(config=config, full_html=False)
        return _PAGE.format(title=html.escape(plain(self.title)), notes=notes, body=body)

    @_image_settings()
    def static(self) -> Figure:
        """Return a matplotlib figure of the diagrams, with the title and the notes."""
        figure = self.draw()
        characters = round(figure.get_figwidth() * 11)
        lines = [textwrap.fill(plain(line), characters) for line in (self.title, *self.notes)]
        figure.suptitle("\n".join(lines), fontsize=10, color=INK)
        figure.draw_without_rendering()  # labels that are created later would parse formulas
        return figure

    @_image_settings()
    def image(self) -> bytes:
        """Return the image as the content of a PNG file."""
        buffer = io.BytesIO()
        self.static().savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        return buffer.getvalue()

    _repr_png_ = image  # for notebooks, which can store an image

    def save(self, out: str | Path, *, force: bool = False) -> Path:
        """Write the picture as a page (``.html``) or image (``.png``). Return the path."""
        out = expand_home(out)
        check_output(out, SUFFIXES, force=force)
        with atomic_write(out) as part:
            part.write_bytes(self.page().encode() if out.suffix == ".html" else self.image())
        return out


def plain(text: str, width: int | None = None) -> str:
    r"""Return ``text`` on one line, without invisible characters, cut to ``width`` characters.

    >>> plain("one\n two\tthree", 9)
    'one two …'
    """
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if width is None or len(text) <= width else text[: width - 1] + "…"


def markup(text: str, width: int | None = None) -> str:
    """Cut ``text`` to ``width`` characters on one line, and escape HTML and formulas.

    >>> markup("<s> & $x$")
    '&lt;s&gt; &amp; &#36;x&#36;'
    """
    return html.escape(plain(text, width), quote=False).replace("$", "&#36;")


def hover(text: str) -> str:
    """Return up to eight lines of ``text`` for the box at the pointer."""
    return "<br>".join(map(markup, textwrap.wrap(plain(text), 60, max_lines=8, placeholder=" …")))


def check_text(text: str, name: str = "The text") -> None:
    """Raise a ValueError if ``text`` is empty or blank."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is empty; give a text that contains words.")


def read_texts(
    given: Sequence[str],
    *,
    column: str | None = None,
    label_column: str | None = None,
    split: str,
    limit: int,
) -> tuple[list[str], list[str] | None]:
    """Return the texts ``given``, or texts and labels if ``given`` is the name of a data set.

    A single text is the name of a data set if it is an existing path. It is also a name if it
    has no spaces, and contains a slash or ends in the suffix of a data file.

    ``column`` is the text column. The default is the first usual text column, or else the only
    column of strings. ``label_column`` is the column of labels. The default is ``label``, if
    this column exists. A data set of more than ``limit`` rows is sampled with a fixed seed.
    """
    name = given[0]
    known = "/" in name or bool(kind_of(Path(name)))
    if len(given) > 1 or not (expand_home(name).exists() or (known and " " not in name)):
        if column or label_column:
            raise ValueError("Texts have no columns; give a file, or leave out --column and --label-column.")
        return list(given), None
    rows = as_dataset(name, split=split)
    if label_column is not None:
        pick_columns(rows.column_names, [label_column], [], option="--label-column", where=name)
    elif "label" in rows.column_names:
        label_column = "label"
    texts = rows if column or not label_column else rows.remove_columns(label_column)
    column = text_column(texts, column, ("text", "sentence", "passage", "query", "sentence1"), option="--column", where=name)
    rows = rows.filter(lambda text: bool(text and text.strip()), input_columns=column)
    if not len(rows):
        raise ValueError(f"Every text in column {column!r} of {name} is blank; choose a column with words.")
    if len(rows) > limit:
        rows = rows.select(sorted(np.random.default_rng(0).choice(len(rows), limit, replace=False)))
    if label_column is None:
        return list(rows[column]), None
    labels, feature = rows[label_column], rows.features[label_column]
    if isinstance(feature, ClassLabel):
        labels = [None if label is None else feature.int2str(label) for label in labels]
    return list(rows[column]), [str(label) for label in labels]


def ticks(count: int, most: int) -> list[int]:
    """Return at most ``most`` evenly spaced integers from 0, all below ``count``.

    >>> ticks(7, 4)
    [0, 2, 4, 6]
    """
    return list(range(0, count, max(1, -(-count // most))))


def name_of(model: str | Path) -> str:
    """Return the last two names in a path, or the id of a model on the Hub."""
    return "/".join(Path(model).parts[-2:])


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the tokens of ``ids`` in readable form.

    Byte-level tokens are decoded, with ``▁`` instead of the first space. Special tokens and
    incomplete characters are not decoded.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    byte_level = type(decoder).__name__ == "ByteLevel"
    labels = []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids))):
        readable = token
        if byte_level and number not in tokenizer.all_special_ids:
            decoded = tokenizer.convert_tokens_to_string([token])
            if "\ufffd" not in decoded:
                readable = decoded.replace(" ", "▁", 1)
        labels.append(plain(readable) or repr(token))
    return labels
