"""Vectors as pictures: texts or tokens as points in three dimensions, and similarities of texts as a heat map."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from minibert.inference.load import load
from minibert.inference.predict import max_length_of
from minibert.plot.page import (
    COLOURS,
    INK,
    Picture,
    check_text,
    hover,
    markup,
    name_of,
    open_encoder,
    plain,
    ticks,
    token_labels,
)

METHODS = ("pca", "tsne", "umap")
# Points that have their name beside them, and kinds of labels that have a colour of their own.
_NAMED, _KINDS = 60, 30
_SYMBOLS = ("circle", "diamond", "square")
_MARKERS = ("o", "D", "s")
_SCALE = "Blues"


@dataclass(frozen=True)
class Panel:
    """Points of one space.

    Attributes:
        name: what the points are.
        points: (n, 3).
        axes: names of the three axes.
    """

    name: str
    points: np.ndarray
    axes: list[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Embeddings(Picture):
    """Texts or tokens as points in three dimensions.

    Attributes:
        panels: the same things in one or more spaces.
        names: of the points, shown beside them where they are few.
        texts: what a point shows when the pointer is over it.
        labels: of the points, for their colour; None for one colour.
    """

    panels: list[Panel]
    names: list[str]
    texts: list[str]
    labels: list[str] | None = None

    @property
    def kinds(self) -> list[tuple[str, list[int]]]:
        """Labels in the order they appear, the places of their points, and what is beyond the colours as one kind."""
        places: dict[str, list[int]] = {}
        for place, label in enumerate(self.labels or [""] * len(self.texts)):
            known = label in places or len(places) < _KINDS
            places.setdefault(label if known else "others", []).append(place)
        return list(places.items())

    def interactive(self) -> go.Figure:
        figure = go.Figure()
        named, size = len(self.names) <= _NAMED, 5 if len(self.names) <= 300 else 3
        for at, panel in enumerate(self.panels):
            scene = f"scene{at + 1 if at else ''}"
            for number, (label, places) in enumerate(self.kinds):
                x, y, z = panel.points[places].astype(np.float32).T
                marker = {"size": size, "color": _colour(number), "symbol": _SYMBOLS[number // len(COLOURS)]}
                figure.add_scatter3d(
                    x=x,
                    y=y,
                    z=z,
                    scene=scene,
                    mode="markers",
                    hovertext=[hover(self.texts[place]) for place in places],
                    hovertemplate="%{hovertext}<extra></extra>" if not label else "%{hovertext}<extra>%{fullData.name}</extra>",
                    marker=marker,
                    name=markup(label, 30),
                    legendgroup=str(number),
                    showlegend=at == 0 and self.labels is not None,
                )
        camera = {"eye": {"x": 1.1, "y": -1.75, "z": 0.85}, "center": {"x": 0, "y": 0, "z": -0.12}}
        axes = {"backgroundcolor": "#F7F7F7", "gridcolor": "#DDDDDD", "zerolinecolor": "#BBBBBB"}
        for at, panel in enumerate(self.panels):
            titles = {
                f"{axis}axis": {**axes, "tickfont": {"size": 9}, "title": {"text": name, "font": {"size": 11}}}
                for axis, name in zip("xyz", panel.axes)
            }
            beside = _names_beside(panel, self.names) if named else []
            space = {**titles, "aspectmode": "cube", "camera": camera, "annotations": beside}
            figure.update_layout({f"scene{at + 1 if at else ''}": space})
        figure.update_layout(
            template="plotly_white",
            font={"color": INK},
            margin={"l": 0, "r": 0, "t": 30, "b": 0},
            # The names beside points would stay where a click on the legend hides the points.
            legend={
                "orientation": "h",
                "y": 0,
                "yanchor": "top",
                "itemsizing": "constant",
                "itemclick": False if named else "toggle",
            },
        )
        self._arrange(figure)
        return figure

    def _arrange(self, figure: go.Figure) -> None:
        count, each = len(self.panels), 480
        wide: dict[str, Any] = {"height": 620}
        narrow: dict[str, Any] = {"height": each * count + 60}
        for at, panel in enumerate(self.panels):
            scene = f"scene{at + 1 if at else ''}"
            left, right = at / count, (at + 1) / count
            wide |= {f"{scene}.domain.x": [left, right], f"{scene}.domain.y": [0, 0.97]}
            narrow |= {f"{scene}.domain.x": [0, 1], f"{scene}.domain.y": [1 - right, 1 - left - 0.03]}
            if count > 1:
                figure.add_annotation(text=f"<b>{markup(panel.name)}</b>", xref="paper", yref="paper", showarrow=False)
                wide |= {f"annotations[{at}].x": (left + right) / 2, f"annotations[{at}].y": 1}
                narrow |= {f"annotations[{at}].x": 0.5, f"annotations[{at}].y": 1 - left}
        nothing: dict[str, Any] = {}
        figure.update_layout(
            meta={
                "wide": {"traces": nothing, "layout": wide},
                "narrow": {"traces": nothing, "layout": narrow},
                "numbers": [],
            }
        )
        for path, value in wide.items():
            figure.layout[path] = value

    def draw(self) -> Figure:
        figure = Figure(figsize=(6.2 * len(self.panels), 5.4), layout="constrained")
        for at, panel in enumerate(self.panels):
            axes: Any = figure.add_subplot(1, len(self.panels), at + 1, projection="3d")
            for number, (label, places) in enumerate(self.kinds):
                axes.scatter(
                    *panel.points[places].T,
                    color=_colour(number),
                    marker=_MARKERS[number // len(COLOURS)],
                    s=26 if len(self.names) <= 300 else 6,
                    label=plain(label, 30) or " ",
                    depthshade=False,
                )
            if len(self.names) <= _NAMED:
                for name, point in zip(self.names, panel.points):
                    axes.text(*point, f" {plain(name, 24)}", fontsize=7, color=INK)
            axes.set_xlabel(panel.axes[0], fontsize=8)
            axes.set_ylabel(panel.axes[1], fontsize=8)
            axes.set_zlabel(panel.axes[2], fontsize=8)
            axes.tick_params(labelsize=6)
            axes.set_box_aspect(None, zoom=0.95)
            axes.set_title(panel.name if len(self.panels) > 1 else "", fontsize=9)
        if self.labels is not None:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
        return figure


def _names_beside(panel: Panel, names: list[str]) -> list[dict[str, Any]]:
    """Annotations, as plotly's own texts of points hide each other and show tags."""
    return [
        {
            **dict(zip("xyz", map(float, point))),
            "text": markup(name, 20),
            "showarrow": False,
            "yshift": 11,
            "font": {"size": 10, "color": INK},
        }
        for name, point in zip(names, panel.points)
    ]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def embeddings(
    model: str | Path,
    texts: Sequence[str],
    *,
    labels: Sequence[Any] | None = None,
    tokens: bool = False,
    method: str = "pca",
    trust_remote_code: bool = False,
) -> Embeddings:
    """Texts as points in three dimensions, or the tokens of texts before and after the encoder.

    Vectors of width 3 are shown as they are, wider ones by their principal components, t-SNE or UMAP.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        labels: one per text, for the colours; without them, tokens of several texts have the colour of their text.
        tokens: show the tokens of the texts: what enters the first layer beside what leaves the last.
        method: ``pca``, ``tsne`` or ``umap`` (which needs ``pip install umap-learn``).

    Example::

        picture = plot.embeddings("runs/quickstart/2-embed", open("notes.txt").read().splitlines())
        picture.save("embeddings.html", force=True)

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: no or empty texts, labels of another number, too few points, an unknown method or one that is not installed.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("There are no texts to show; give some.")
    for number, text in enumerate(texts, start=1):
        check_text(text, f"Text {number}")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"{len(texts)} text(s) need as many labels, not {len(labels)}; give one for each.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)} (--method).")
    if method == "umap" and find_spec("umap") is None:
        raise ValueError("UMAP is a package of its own; install it (pip install umap-learn), or use --method pca or tsne.")
    if not tokens and len(texts) < 3:
        raise ValueError(f"{len(texts)} text(s) make no picture; give three or more, or show their tokens (--tokens).")
    names = None if labels is None else [str(label) for label in labels]
    if tokens:
        return _tokens(model, texts, names, method, trust_remote_code)
    vectors = load(model, device="cpu", trust_remote_code=trust_remote_code).encode(texts)
    return Embeddings(
        title=f"{len(texts):,} texts in {name_of(model)}",
        panels=[Panel("texts", *project(vectors, method))],
        names=texts,
        texts=texts,
        labels=names,
    )


def _tokens(model: str | Path, texts: list[str], labels: list[str] | None, method: str, trust_remote_code: bool) -> Embeddings:
    encoder, tokenizer = open_encoder(model, trust_remote_code=trust_remote_code)
    limit = max_length_of(encoder, tokenizer)
    before, after, names, shown, owners = [], [], [], [], []
    for number, text in enumerate(texts):
        inputs = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            output = encoder(**inputs, output_hidden_states=True)
        if not output.hidden_states:
            raise ValueError(f"{model} has no layers, so its tokens are the same before and after; show texts instead.")
        before.append(output.hidden_states[0][0])  # (length, width)
        after.append(output.last_hidden_state[0])
        found = token_labels(tokenizer, inputs["input_ids"][0].tolist())
        names += found
        shown += [f"{token} (token {place} of: {plain(text, 200)})" for place, token in enumerate(found, start=1)]
        owners += [number] * len(found)
    if labels is not None:
        colours: list[str] | None = [labels[owner] for owner in owners]
    else:
        colours = [f"{owner + 1}: {plain(texts[owner], 24)}" for owner in owners] if len(texts) > 1 else None
    return Embeddings(
        title=f"Tokens in {name_of(model)}: " + (plain(texts[0], 80) if len(texts) == 1 else f"{len(texts)} texts"),
        panels=[
            Panel("before the encoder", *project(torch.cat(before).float().numpy(), method)),
            Panel("after the encoder", *project(torch.cat(after).float().numpy(), method)),
        ],
        names=names,
        texts=shown,
        labels=colours,
    )


def project(vectors: np.ndarray, method: str = "pca") -> tuple[np.ndarray, list[str]]:
    """(n, width) -> (n, 3), and names of the axes. Width 3 stays as it is; fewer dimensions are filled up with zeros.

    Principal components have in their names the share of the variance that they hold.
    """
    count, width = vectors.shape
    vectors = np.asarray(vectors, dtype=np.float64)
    if width <= 3 and method == "pca":
        return np.pad(vectors, ((0, 0), (0, 3 - width))), [f"dimension {number}" for number in (1, 2, 3)]
    if method == "pca" and not np.ptp(vectors, axis=0).any():
        return np.zeros((count, 3)), [f"component {number}" for number in (1, 2, 3)]
    if method == "pca":
        pca = PCA(n_components=min(3, count, width), svd_solver="full" if count * width < 10**6 else "auto", random_state=0)
        points = pca.fit_transform(vectors)
        shares = [*pca.explained_variance_ratio_, 0.0, 0.0][:3]
        axes = [f"component {number} ({share:.0%})" for number, share in enumerate(shares, start=1)]
        return np.pad(points, ((0, 0), (0, 3 - points.shape[1]))), axes
    if count < 6:
        raise ValueError(f"--method {method} arranges neighbourhoods, of which {count} points have none; use pca.")
    if method == "tsne":
        settings: dict[str, Any] = {"init": "pca", "random_state": 0, "perplexity": min(30.0, (count - 1) / 3)}
        # In three dimensions the approximation is the slower one for some hundred points, and the usual step too long.
        settings |= {"method": "exact" if count <= 1000 else "barnes_hut", "learning_rate": max(10.0, count / 48)}
        points = TSNE(3, **settings).fit_transform(vectors)
    else:
        from umap import UMAP

        neighbours = min(15, count - 1)
        points = UMAP(neighbours, n_components=3, init="random", random_state=0, n_jobs=1).fit_transform(vectors)
    return np.asarray(points), [f"{'t-SNE' if method == 'tsne' else 'UMAP'} {number}" for number in (1, 2, 3)]


# -------------------------------------------------------------------------------------------------------------- similarity


@dataclass(frozen=True, eq=False, kw_only=True)
class Similarity(Picture):
    """Similarities between two lists of texts.

    Attributes:
        rows, columns: the texts.
        values: (rows, columns).
    """

    rows: list[str]
    columns: list[str]
    values: np.ndarray

    @property
    def labelled(self) -> bool:
        """Whether the numbers fit into the cells."""
        return self.values.size <= 150 and len(self.columns) <= 12

    def interactive(self) -> go.Figure:
        texts = [[f"{hover(row)}<br><b>and</b><br>{hover(column)}" for column in self.columns] for row in self.rows]
        figure = go.Figure(
            go.Heatmap(
                z=self.values,
                text=np.char.mod("%.2f", self.values.round(2) + 0.0),  # no -0.00
                texttemplate="%{text}" if self.labelled else "",
                hovertext=texts,
                hovertemplate="%{z:.4f}<br>%{hovertext}<extra></extra>",
                zmin=min(0.0, float(self.values.min())),
                zmax=float(self.values.max()),
                colorscale=_SCALE,
                colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
            )
        )
        height = max(180, min(2400, len(self.rows) * (30 if len(self.rows) <= 20 else 16)))
        axis = {"showgrid": False, "zeroline": False, "automargin": True, "tickfont": {"size": 10}}
        figure.update_layout(template="plotly_white", font={"color": INK}, margin={"l": 10, "r": 10, "t": 10, "b": 10})
        arranged = {}
        for name, width, most in (("wide", 34, 60), ("narrow", 14, 14)):
            across, down = _labels(self.columns, width, most), _labels(self.rows, width, 150)
            arranged[name] = {
                "traces": {},
                "layout": {
                    "height": height + (220 if name == "wide" else 120),
                    "xaxis.tickvals": list(across),
                    "xaxis.ticktext": list(across.values()),
                    "yaxis.tickvals": list(down),
                    "yaxis.ticktext": list(down.values()),
                },
            }
        figure.update_layout(
            {key.replace(".", "_"): value for key, value in arranged["wide"]["layout"].items()},
            xaxis={**axis, "tickangle": -45 if len(self.columns) <= 20 else -90},
            yaxis={**axis, "autorange": "reversed"},
            meta={**arranged, "numbers": []},
        )
        return figure

    def draw(self) -> Figure:
        rows, columns = self.values.shape
        side = 0.42 if max(rows, columns) <= 30 else 0.2
        figure = Figure(figsize=(min(20, side * columns + 3.5), min(20, side * rows + 2.6)), layout="constrained")
        axes = figure.subplots()
        lowest = min(0.0, float(self.values.min()))
        image = axes.imshow(self.values, cmap=_SCALE, vmin=lowest, aspect="auto", interpolation="nearest")
        across, down = _labels(self.columns, 32, 90), _labels(self.rows, 32, 90)
        size = 7.5 if side > 0.3 else 5.5
        axes.set_xticks(list(across), [plain(self.columns[place], 32) for place in across], fontsize=size, rotation=90)
        axes.set_yticks(list(down), [plain(self.rows[place], 32) for place in down], fontsize=size)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02).outline.set_visible(False)
        if self.labelled:
            middle = (lowest + float(self.values.max())) / 2
            for (row, column), value in np.ndenumerate(self.values):
                colour = "white" if value > middle else INK
                axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", fontsize=7, color=colour)
        return figure


def _labels(texts: list[str], width: int, most: int) -> dict[int, str]:
    return {place: markup(texts[place], width) for place in ticks(len(texts), most)}


def similarity(
    model: str | Path, rows: Sequence[str], columns: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> Similarity:
    """Similarities (the model's own measure, mostly cosine) of two lists of texts, or of one with itself.

    Example::

        plot.similarity("runs/quickstart/2-embed", ["sort a list", "read a file"]).save("similarity.png", force=True)

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a list or a text is empty.
    """
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in (rows, rows if columns is None else columns)]
    for which, texts in zip(("first", "second"), lists):
        if not texts:
            raise ValueError(f"The {which} list of texts is empty; give at least one text.")
        for number, text in enumerate(texts, start=1):
            check_text(text, f"Text {number} of the {which} list")
    opened = load(model, device="cpu", trust_remote_code=trust_remote_code)
    values = opened.similarity(*(opened.encode(texts, convert_to_tensor=True) for texts in lists))
    return Similarity(
        title=f"{str(opened.similarity_fn_name).capitalize()} similarities in {name_of(model)}",
        rows=lists[0],
        columns=lists[1],
        values=values.float().numpy(),
    )
