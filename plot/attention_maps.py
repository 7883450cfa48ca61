"""Attention as pictures: for each layer and head, who looks at whom, as a heat map and as lines between two columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from minibert.inference.predict import max_length_of
from minibert.plot.page import (
    COLOURS,
    INK,
    Picture,
    check_text,
    markup,
    name_of,
    open_encoder,
    plain,
    ticks,
    token_labels,
)

# Numbers in a page, 4 bytes each: with more, browsers become slow, so that heads are averaged.
_PAGE_WEIGHTS = 4_000_000
# Lines in a view; among more tokens than the root of it, only the strongest are drawn.
_LINES = 400
# Strengths in which lines are drawn.
_LEVELS = 10
_SCALE = "Blues"


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Picture):
    """Attention of one text, or of a pair.

    Attributes:
        tokens: n tokens as people read them.
        second: whether each token belongs to the second text.
        weights: (layers, heads, n, n) float32: how much a row's token takes from a column's; every row sums to 1.
        layers: numbers of the layers, from 1; heads: names of the heads.
    """

    tokens: list[str]
    second: list[bool]
    weights: np.ndarray
    layers: list[int]
    heads: list[str]

    @property
    def labels(self) -> list[str]:
        """Tokens for plotly; those of a second text have another colour."""
        texts = [markup(token, 14) for token in self.tokens]
        return [f'<span style="color:{COLOURS[1]}">{text}</span>' if other else text for text, other in zip(texts, self.second)]

    @property
    def lines_note(self) -> str:
        """What the view of lines leaves out."""
        return f"the {_LINES} strongest weights of the head" if len(self.tokens) ** 2 > _LINES else ""

    # The interactive form ---------------------------------------------------------------------------------------------

    def interactive(self) -> go.Figure:
        """One heat map and one set of lines per head, of which one is visible; the choice of a layer changes their data.

        So the two menus do not need to know each other's state.
        """
        figure = go.Figure()
        names = [f"{number + 1} {markup(token, 40)}" for number, token in enumerate(self.tokens)]
        for number, head in enumerate(self.heads):
            for trace in self._traces_of_head(number, names):
                figure.add_trace(trace.update(visible=number == 0, name=head))
        per_head = len(figure.data) // len(self.heads)
        self._add_columns_of_tokens(figure)
        traces = list(range(per_head * len(self.heads)))
        menus = [
            ("layer", [f"layer {number}" for number in self.layers], [self._data(at, names) for at in range(len(self.layers))]),
            (
                "head",
                self.heads,
                [{"visible": [at == trace // per_head for trace in traces]} for at in range(len(self.heads))],
            ),
        ]
        figure.update_layout(
            updatemenus=[
                {
                    "name": name,
                    "buttons": [
                        {"label": label, "method": "restyle", "args": [change, traces]}
                        for label, change in zip(labels, changes)
                    ],
                    "x": 0,
                    "xanchor": "left",
                    "y": 1,
                    "yanchor": "bottom",
                    "pad": {"b": 12, "l": 112 * place},
                    "bgcolor": "white",
                }
                for place, (name, labels, changes) in enumerate(menus)
            ]
        )
        self._arrange(figure, [number for number in traces if number % per_head == 0])
        return figure

    def _traces_of_head(self, head: int, names: list[str]) -> list[Any]:
        weights = self.weights[0, head]
        heat = go.Heatmap(
            z=weights,
            x=names,
            y=names,
            zmin=0,
            zmax=float(weights.max()),
            colorscale=_SCALE,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"size": 10}},
            hovertemplate="from %{y}<br>to %{x}<br>weight %{z:.4f}<extra></extra>",
        )
        x = np.tile(np.array([0, 1, 1], dtype=np.int8), _LINES)
        lines = [
            go.Scatter(
                x=x,  # longer than y, whose length counts
                y=y,
                xaxis="x2",
                yaxis="y2",
                mode="lines",
                line={"color": f"rgba(0, 114, 178, {level / _LEVELS})", "width": 1 + level / _LEVELS},
                hoverinfo="skip",
                showlegend=False,
            )
            for level, y in enumerate(line_ends(weights), start=1)
        ]
        return [heat, *lines]

    def _data(self, layer: int, names: list[str]) -> dict[str, list[Any]]:
        """What the choice of a layer changes: one value per trace, head after head."""
        change: dict[str, list[Any]] = {"z": [], "zmax": [], "y": []}
        for weights in self.weights[layer]:
            change["z"] += [weights, *[None] * _LEVELS]
            change["zmax"] += [float(weights.max()), *[None] * _LEVELS]
            change["y"] += [names, *line_ends(weights)]
        return change

    def _add_columns_of_tokens(self, figure: go.Figure) -> None:
        shown = ticks(len(self.tokens), 170)
        figure.add_annotation(
            text=self.lines_note, x=0.5, xref="x2", y=0, yref="y2 domain", yanchor="top", showarrow=False, font={"size": 11}
        )
        for x, position in ((-0.02, "middle left"), (1.02, "middle right")):
            figure.add_scatter(
                x=[x] * len(shown),
                y=shown,
                text=[self.labels[place] for place in shown],
                mode="text",
                textposition=position,
                textfont={"size": 11},
                xaxis="x2",
                yaxis="y2",
                hoverinfo="skip",
                showlegend=False,
            )

    def _arrange(self, figure: go.Figure, heat_maps: list[int]) -> None:
        """Heat map and lines beside each other, or below each other in a narrow window."""
        count = len(self.tokens)
        height, gap = min(2400, max(240, count * (18 if count <= 30 else 14))), 130
        both = 2 * height + gap
        axis = {"showgrid": False, "zeroline": False, "automargin": True, "tickfont": {"size": 10}, "fixedrange": True}
        figure.update_layout(
            template="plotly_white",
            font={"color": INK},
            margin={"l": 10, "r": 10, "t": 56, "b": 10},
            xaxis={
                **axis,
                "type": "category",
                "tickangle": -90,
                "title": {"text": "to"},
            },
            yaxis={
                **axis,
                "type": "category",
                "autorange": "reversed",
                "tickvals": ticks(count, 170),
                "ticktext": [self.labels[place] for place in ticks(count, 170)],
                "title": {"text": "from"},
            },
            xaxis2={**axis, "visible": False, "range": [-0.42, 1.42], "anchor": "y2"},
            yaxis2={**axis, "visible": False, "range": [count - 0.5, -0.5], "anchor": "x2"},
        )
        wide = {
            "height": height + 190,
            "xaxis.domain": [0, 0.46],
            "yaxis.domain": [0, 1],
            "xaxis2.domain": [0.56, 1],
            "yaxis2.domain": [0, 1],
            **self._ticks_below(48),
        }
        narrow = {
            "height": both + 190,
            "xaxis.domain": [0, 0.88],
            "yaxis.domain": [(height + gap) / both, 1],
            "xaxis2.domain": [0, 1],
            "yaxis2.domain": [0, height / both],
            **self._ticks_below(24),
        }
        bars = (
            {"colorbar.x": 0.465, "colorbar.y": 0.5, "colorbar.len": 1.0},
            {"colorbar.x": 0.89, "colorbar.y": 1 - height / both / 2, "colorbar.len": height / both},
        )
        figure.update_layout(
            {key.replace(".", "_"): value for key, value in wide.items()},
            meta={
                "wide": {"traces": bars[0], "layout": wide},
                "narrow": {"traces": bars[1], "layout": narrow},
                "numbers": heat_maps,
            },
        )
        figure.update_traces({key.replace(".", "_"): value for key, value in bars[0].items()}, selector={"type": "heatmap"})

    def _ticks_below(self, most: int) -> dict[str, Any]:
        places = ticks(len(self.tokens), most)
        return {"xaxis.tickvals": places, "xaxis.ticktext": [self.labels[place] for place in places]}

    # The still form ---------------------------------------------------------------------------------------------------

    def draw(self) -> Figure:
        """One head with its tokens and lines, or all heads as small heat maps."""
        return self._draw_one() if self.weights.shape[:2] == (1, 1) else self._draw_all()

    def _draw_one(self) -> Figure:
        count = len(self.tokens)
        side = min(20.0, max(3.4, 0.2 * count))
        figure = Figure(figsize=(2 * side + 3, side + 1.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        size = 8.0 if count <= 60 else 5.0
        image = self._draw_heat_map(left, 0, 0)
        figure.colorbar(image, ax=left, shrink=0.7, pad=0.02).outline.set_visible(False)
        self._label(left.xaxis, ticks(count, 100), size)
        self._label(left.yaxis, ticks(count, 100), size)
        left.tick_params(axis="x", labelrotation=90)
        left.set(xlabel="to", ylabel="from")
        self._draw_lines(right, size)
        return figure

    def _draw_all(self) -> Figure:
        layers, heads, count, _ = self.weights.shape
        columns = heads if layers > 1 and heads > 1 else min(layers * heads, 4)
        rows = -(-layers * heads // columns)
        cell = max(0.8, min(2.6, 14 / columns))
        figure = Figure(figsize=(max(6.0, cell * columns + 1.2), cell * rows + 1.2), layout="constrained")
        size = min(8.0, 72 * cell * 0.62 / count)  # points that a token has
        for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            if number >= layers * heads:
                axes.axis("off")
                continue
            layer, head = divmod(number, heads)
            self._draw_heat_map(axes, layer, head)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"layer {self.layers[layer]}, {self.heads[head]}" if cell > 1.5 else "", fontsize=7)
            if cell <= 1.5 and layer == 0:
                axes.set_title(self.heads[head], fontsize=8)
            if cell <= 1.5 and head == 0:
                axes.set_ylabel(f"layer {self.layers[layer]}", fontsize=8)
            if size >= 4 and number % columns == 0:
                self._label(axes.yaxis, range(count), size)
            if size >= 4 and number // columns == rows - 1:
                self._label(axes.xaxis, range(count), size)
                axes.tick_params(axis="x", labelrotation=90)
        return figure

    def _draw_heat_map(self, axes: Axes, layer: int, head: int) -> Any:
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes.imshow(self.weights[layer, head], cmap=_SCALE, vmin=0, aspect="equal", interpolation="nearest")

    def _label(self, axis: Any, places: Any, size: float) -> None:
        axis.set_ticks(list(places), [plain(self.tokens[place], 14) for place in places], fontsize=size)
        axis.set_tick_params(length=0)
        for place, label in zip(places, axis.get_ticklabels()):
            label.set_color(COLOURS[1] if self.second[place] else INK)

    def _draw_lines(self, axes: Axes, size: float) -> None:
        weights = self.weights[0, 0]
        for level, ends in enumerate(line_ends(weights), start=1):
            pairs = ends.reshape(-1, 3)[:, :2]
            segments = np.stack([np.broadcast_to([0.0, 1.0], pairs.shape), pairs], axis=-1)  # (lines, 2 ends, x and y)
            axes.add_collection(
                LineCollection(list(segments), colors=COLOURS[0], alpha=level / _LEVELS, linewidths=0.6 + level / _LEVELS)
            )
        for place in ticks(len(self.tokens), 100):
            for x, side in ((-0.02, "right"), (1.02, "left")):
                axes.text(
                    x,
                    place,
                    plain(self.tokens[place], 14),
                    ha=side,
                    va="center",
                    fontsize=size,
                    color=COLOURS[1] if self.second[place] else INK,
                )
        axes.set(xlim=(-0.5, 1.5), ylim=(len(self.tokens) - 0.5, -0.5))
        axes.axis("off")
        axes.set_title(self.lines_note, fontsize=8)


def attention(
    model: str | Path,
    text: str,
    second: str | None = None,
    *,
    layer: int | None = None,
    head: int | None = None,
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
) -> Attention:
    """Attention weights of ``model`` for a text or a pair, as the model returns them for ``output_attentions=True``.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        second: the second text of a pair.
        layer: show only this layer, counted from 1; head: only this head, counted from 1.
        max_tokens: read only so many tokens; the model's own limit is the most.

    Example::

        picture = plot.attention("runs/quickstart/2-embed", "read a table from a file")
        picture.save("attention.html", force=True)

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: an empty text, a layer or head that the model does not have, or a model without attention weights.
    """
    check_text(text)
    if second is not None:
        check_text(second, "The second text")
    pair = (text,) if second is None else (text, second)
    weights, tokens, of_second, notes = _record(model, pair, max_tokens, trust_remote_code)
    layers, heads = list(range(1, len(weights) + 1)), [f"head {number}" for number in range(1, weights.shape[1] + 1)]
    if layer is not None:
        place = _place("layer", layer, len(layers), model)
        weights, layers = weights[place : place + 1], [layer]
    if head is not None:
        place = _place("head", head, len(heads), model)
        weights, heads = weights[:, place : place + 1], heads[place : place + 1]
    if weights.size > _PAGE_WEIGHTS and len(heads) > 1:
        notes.append(
            f"{weights.size:,} weights are more than a page can hold, so each layer shows the mean of its {len(heads)} heads; "
            "choose a layer or a head to see single ones (--layer, --head)."
        )
        weights, heads = weights.mean(axis=1, keepdims=True), [f"mean of {len(heads)}"]
    where = "".join([f", layer {layer}" if layer else "", f", head {head}" if head else ""])
    return Attention(
        title=f"Attention in {name_of(model)}{where}: {' + '.join(plain(part, 60) for part in pair)}",
        notes=tuple(notes),
        tokens=tokens,
        second=of_second,
        weights=weights,
        layers=layers,
        heads=heads,
    )


def _record(
    model: str | Path, pair: tuple[str, ...], max_tokens: int | None, trust_remote_code: bool
) -> tuple[np.ndarray, list[str], list[bool], list[str]]:
    """Weights (layers, heads, n, n), the n tokens, whether each belongs to the second text, and what was cut."""
    if max_tokens is not None and max_tokens < 4:
        raise ValueError(f"max_tokens={max_tokens} leaves no words to look at; give 4 or more (--max-tokens).")
    encoder, tokenizer = open_encoder(model, trust_remote_code=trust_remote_code, attn_implementation="eager")
    limit = max_length_of(encoder, tokenizer)
    limit = min(limit, max_tokens or limit)
    whole = len(tokenizer(*pair, verbose=False)["input_ids"])
    inputs = tokenizer(*pair, truncation=True, max_length=limit, return_tensors="pt")
    with torch.inference_mode():
        recorded = encoder(**inputs, output_attentions=True).attentions
    if not recorded:
        raise ValueError(f"{model} has no layers that give attention weights, so there is nothing to draw.")
    ids = inputs["input_ids"][0].tolist()
    sequence = inputs.encodings[0].sequence_ids if inputs.encodings else [0] * len(ids)
    notes = [f"The text has {whole} tokens; the first {limit} are read."] if whole > limit else []
    if whole > limit and len(pair) > 1:
        notes = [f"The texts have {whole} tokens; {limit} are read, and the longer one is cut first."]
    weights = torch.cat(list(recorded)).float().numpy()
    return weights, token_labels(tokenizer, ids), [number == 1 for number in sequence], notes


def _place(what: str, number: int, count: int, model: str | Path) -> int:
    if not 1 <= number <= count:
        raise ValueError(f"{model} has no {what} {number}; its {what}s are 1 to {count} (--{what}).")
    return number - 1


def line_ends(weights: np.ndarray) -> list[np.ndarray]:
    """The strongest lines of (n, n) weights by strength, relative to the largest: for each level, weakest first, their ends.

    An entry holds start, end and a gap (not a number) for every line, one after the other; weights that would not be seen
    are in none.

    >>> [ends.tolist() for ends in line_ends(np.array([[1.0, 0.01], [0.5, 0.5]], dtype=np.float32))][4::5]
    [[1.0, 0.0, nan, 1.0, 1.0, nan], [0.0, 0.0, nan]]
    """
    flat = weights.ravel()
    strongest = np.sort(np.argpartition(flat, -_LINES)[-_LINES:]) if flat.size > _LINES else np.arange(flat.size)
    # Half a level more rounds; what rounds to nothing is not drawn.
    level = np.floor(flat[strongest] / max(float(flat.max()), 1e-30) * _LEVELS + 0.5).astype(int)
    rows, columns = np.unravel_index(strongest, weights.shape)
    ends = np.stack([rows, columns, np.full(len(rows), np.nan)], axis=1).astype(np.float32)
    return [ends[level == number].ravel() for number in range(1, _LEVELS + 1)]
