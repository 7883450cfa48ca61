"""Draw the attention of each head as a heat map, and as lines between tokens."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from matplotlib.figure import Figure

from minibert.inference.answers import max_length_of
from minibert.inference.load import finite, load
from minibert.plot import page

# Browsers are slow with more weights in a page, so heads are averaged.
_PAGE_WEIGHTS = 4_000_000
# The number of lines per head, and of line widths that show the strength.
_LINES, _LEVELS = 400, 10


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(page.Picture):
    """Show the attention of one text, or of a pair of texts.

    Attributes:
        tokens: n tokens in readable form.
        second: True for each token that belongs to the second text.
        weights: (layers, heads, n, n) float32. A row contains the attention of one token to all
            tokens.
        layers: the numbers of the layers, from 1.
        heads: the names of the heads.
    """

    tokens: list[str]
    second: list[bool]
    weights: np.ndarray
    layers: list[int]
    heads: list[str]

    @property
    def labels(self) -> list[tuple[str, str]]:
        """Return the tokens with their colours. A second text has a different colour."""
        colours = [page.COLOURS[1] if second else page.INK for second in self.second]
        return list(zip(self.tokens, colours))

    def panels(self, layer: int = 0, head: int = 0) -> list[page.Panel]:
        """Return the heat map and the lines of a head. Layers and heads are counted from 0."""
        count, weights, labels = len(self.tokens), self.weights[layer, head], self.labels
        shown = "from %{y}<br>to %{x}<br>weight %{z:.4f}<extra></extra>"
        heat = page.heat_map(weights, self.tokens, self.tokens, shown)
        lines = [
            go.Scatter(
                x=np.tile(np.array([0, 1, np.nan], dtype=np.float32), len(ends) // 3),
                y=ends,
                mode="lines",
                line={"color": page.COLOURS[0], "width": 0.6 + level / _LEVELS},
                opacity=level / _LEVELS,
                hoverinfo="skip",
            )
            for level, ends in enumerate(line_ends(weights), start=1)
        ]
        places = page.ticks(count, 100)
        texts = [page.Text((0, at), *labels[at], "right") for at in places]
        texts += [page.Text((1, at), *labels[at], "left") for at in places]
        note = f"the {_LINES} strongest weights of the head" if count**2 > _LINES else ""
        return [
            page.Panel(traces=[heat], axes=("to", "from"), columns=labels, rows=labels),
            page.Panel(traces=lines, title=note, texts=texts, frame=((-0.42, 1.42), (count - 0.5, -0.5))),
        ]

    def interactive(self) -> go.Figure:
        """Return a plotly figure of one head, with menus to choose the layer and the head."""
        heads = range(len(self.heads))
        drawn = [[panel.traces for head in heads for panel in self.panels(at, head)] for at in range(len(self.layers))]
        menus: dict[str, Any] = {"layer": {}, "head": {}}
        for number, panels in zip(self.layers, drawn):
            traces = [trace for panel in panels for trace in panel]
            changes = {key: [getattr(trace, key, None) for trace in traces] for key in ("x", "y", "z", "zmax")}
            menus["layer"][f"layer {number}"] = changes
        for number, head in enumerate(self.heads):
            menus["head"][head] = {"visible": [at // (1 + _LEVELS) == number for at in range(len(traces))]}
        figure = page.page_figure(self.panels(), menus)
        for at, panel in enumerate(drawn[0][2:]):
            figure.add_traces([trace.update(visible=False) for trace in panel], 1, at % 2 + 1)
        return figure

    def draw(self) -> Figure:
        """Draw one head with tokens and lines, or several heads as small heat maps."""
        layers, heads, count, _ = self.weights.shape
        if layers * heads == 1:
            side = min(20.0, max(3.4, 0.2 * count))
            return page.image_figure(self.panels(), (side + 1.5, side + 0.7))
        columns = heads if layers > 1 and heads > 1 else min(layers * heads, 4)
        maps = []
        for at in range(layers * heads):
            layer, head = divmod(at, heads)
            heat = page.heat_map(self.weights[layer, head], self.tokens, self.tokens, "")
            title = f"layer {self.layers[layer]}, {self.heads[head]}"
            below = self.labels if at + columns >= layers * heads else ()
            beside = self.labels if at % columns == 0 else ()
            maps.append(page.Panel(traces=[heat], title=title, columns=below, rows=beside))
        cell = max(0.8, min(2.6, 14 / columns))
        return page.image_figure(maps, (cell, cell), columns)


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
    """Show the attention weights of ``model``, as ``output_attentions=True`` returns them.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        text: the text that the model reads.
        second: the second text of a pair.
        layer: show only this layer, counted from 1.
        head: show only this head, counted from 1.
        max_tokens: the maximum number of tokens, at least 4. The limit of the model applies as
            well.
        trust_remote_code: run Python code that comes with a model other than MiniBERT.

    Example::

        picture = plot.attention("runs/quickstart/2-embed", "read a table from a file")
        picture.save("attention.html", force=True)

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if a text is empty, the model does not have the layer or the head, or the
            model has no attention weights.
    """
    if max_tokens is not None and max_tokens < 4:
        raise ValueError(f"max_tokens must be at least 4 to include words, got {max_tokens} (--max-tokens).")
    page.check_text(text)
    if second is not None:
        page.check_text(second, "The second text")
    pair = (text,) if second is None else (text, second)
    opened = load(model, device="cpu", trust_remote_code=trust_remote_code)
    encoder: Any = opened.transformers_model
    tokenizer = opened.tokenizer
    encoder.set_attn_implementation("eager")
    limit = min(max_length_of(encoder, tokenizer), max_tokens or sys.maxsize)
    inputs = tokenizer(*pair, truncation=True, max_length=limit, return_tensors="pt")
    with torch.inference_mode():
        recorded = encoder(**inputs, output_attentions=True).attentions
    if not recorded:
        raise ValueError(f"{model} has no layers that return attention weights; choose another model.")
    weights = finite(torch.cat(list(recorded)).float()).numpy()  # (layers, heads, n, n)
    notes = []
    if (count := len(tokenizer(*pair, verbose=False)["input_ids"])) > limit:
        notes.append(f"Of {count} tokens, only {limit} are read. In a pair, the longer text is cut first.")
    layers, heads = list(range(1, len(weights) + 1)), [f"head {number}" for number in range(1, weights.shape[1] + 1)]
    for what, number, count in (("layer", layer, len(layers)), ("head", head, len(heads))):
        if number is not None and not 1 <= number <= count:
            raise ValueError(f"{model} has no {what} {number}; its {what}s are 1 to {count} (--{what}).")
    if layer is not None:
        weights, layers = weights[layer - 1 : layer], [layer]
    if head is not None:
        weights, heads = weights[:, head - 1 : head], heads[head - 1 : head]
    if weights.size > _PAGE_WEIGHTS and len(heads) > 1:
        notes.append(
            f"{weights.size:,} weights are too many for a page, so each layer shows the mean of its "
            f"{len(heads)} heads; choose a layer or a head to see single heads (--layer, --head)."
        )
        weights, heads = weights.mean(axis=1, keepdims=True), [f"mean of {len(heads)}"]
    where = "".join([f", layer {layer}" if layer else "", f", head {head}" if head else ""])
    return Attention(
        title=f"Attention in {page.name_of(model)}{where}: {' + '.join(page.plain(part, 60) for part in pair)}",
        notes=tuple(notes),
        tokens=page.token_labels(tokenizer, inputs["input_ids"][0].tolist()),
        second=[number == 1 for number in inputs.encodings[0].sequence_ids],
        weights=weights,
        layers=layers,
        heads=heads,
    )


def line_ends(weights: np.ndarray) -> list[np.ndarray]:
    """Return the end points of lines for the highest ``weights`` (n, n), in ten groups.

    The groups are sorted by weight, the lowest weights first. A line is a start, an end and
    NaN. Weights below 5 % of the highest weight have no line.

    >>> [ends.tolist() for ends in line_ends(np.array([[1.0, 0.01], [0.5, 0.5]], dtype=np.float32))][4::5]
    [[1.0, 0.0, nan, 1.0, 1.0, nan], [0.0, 0.0, nan]]
    """
    flat = weights.ravel()
    strongest = np.sort(np.argpartition(flat, -_LINES)[-_LINES:]) if flat.size > _LINES else np.arange(flat.size)
    level = np.floor(flat[strongest] / max(float(flat.max()), 1e-30) * _LEVELS + 0.5).astype(int)
    rows, columns = np.unravel_index(strongest, weights.shape)
    ends = np.stack([rows, columns, np.full(len(rows), np.nan)], axis=1).astype(np.float32)
    return [ends[level == number].ravel() for number in range(1, _LEVELS + 1)]
