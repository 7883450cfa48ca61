"""Draw vectors as points in three dimensions, and similarities as a heat map."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from minibert.inference.answers import max_length_of
from minibert.inference.load import finite, load
from minibert.plot import page

# The maximum number of points with names, and of labels with a colour.
_NAMED, _KINDS = 60, 30
_SYMBOLS = ("circle", "diamond", "square")


class Space(NamedTuple):
    """Store a projection: the coordinates ``points`` (n, 3) and the names of the axes."""

    name: str
    points: np.ndarray
    axes: list[str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Embeddings(page.Picture):
    """Show texts or tokens as points in three dimensions.

    Attributes:
        spaces: the coordinates of all texts or tokens, for each diagram.
        names: the names of the points, drawn if there are at most 60 points.
        texts: for each point, the text that appears when the pointer is on the point.
        labels: the label of each point, which determines the colour. If None, all points have
            the same colour.
    """

    spaces: list[Space]
    names: list[str]
    texts: list[str]
    labels: list[str] | None = None

    def panels(self) -> list[page.Panel]:
        """Return a diagram for each space. Labels after the first 30 have one colour."""
        kinds: dict[str, list[int]] = {}
        for place, label in enumerate(self.labels or [""] * len(self.texts)):
            known = label in kinds or len(kinds) < _KINDS
            kinds.setdefault(label if known else "others", []).append(place)
        panels = []
        for space in self.spaces:
            traces = [
                go.Scatter3d(
                    **dict(zip("xyz", space.points[places].astype(np.float32).T)),
                    mode="markers",
                    marker={
                        "color": page.COLOURS[number % len(page.COLOURS)],
                        "symbol": _SYMBOLS[number // len(page.COLOURS) % len(_SYMBOLS)],
                        "size": 5 if len(self.names) <= 300 else 3,
                    },
                    name=page.markup(label, 30),
                    hovertext=[page.hover(self.texts[place]) for place in places],
                    hoverinfo="text+name",
                )
                for number, (label, places) in enumerate(kinds.items())
            ]
            few = len(self.names) <= _NAMED
            texts = [page.Text(*named) for named in zip(space.points, self.names)] if few else []
            title = space.name if len(self.spaces) > 1 else ""
            panels.append(page.Panel(title=title, axes=space.axes, traces=traces, texts=texts))
        return panels


def embeddings(
    model: str | Path,
    texts: Sequence[str],
    *,
    labels: Sequence[Any] | None = None,
    tokens: bool = False,
    method: str = "pca",
    trust_remote_code: bool = False,
) -> Embeddings:
    """Show texts or tokens as points in three dimensions.

    Args:
        model: a model folder, or the id (owner/name) of a model on the Hub.
        texts: three or more texts, or at least one text if ``tokens`` is True.
        labels: a label for each text, which determines the colour. By default, tokens have the
            colour of their text.
        tokens: show two diagrams of the tokens, before the first layer and after the last
            layer.
        method: the projection: ``pca`` (principal components), ``tsne``, or ``umap`` (requires
            umap-learn). ``pca`` does not change vectors of three dimensions.
        trust_remote_code: run Python code that comes with a model other than MiniBERT.

    Example::

        picture = plot.embeddings("runs/quickstart/2-embed", open("notes.txt").read().splitlines())
        picture.save("embeddings.html", force=True)

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if a text is empty, the labels do not fit, there are too few points, or the
            method is unknown.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts, start=1):
        page.check_text(text, f"Text {number}")
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"{len(texts)} text(s) need as many labels, got {len(labels)} (--label).")
    if method not in ("pca", "tsne", "umap"):
        raise ValueError(f"method must be one of pca, tsne, umap, got {method!r} (--method).")
    if method == "umap" and find_spec("umap") is None:
        raise ValueError("method umap needs the package umap-learn; pip install umap-learn, or use --method pca.")
    if len(texts) < (1 if tokens else 3):
        raise ValueError(f"{len(texts)} text(s) are too few; give three or more, or show tokens (--tokens).")
    names = None if labels is None else [str(label) for label in labels]
    if tokens:
        return _tokens(model, texts, names, method, trust_remote_code)
    vectors = finite(load(model, device="cpu", trust_remote_code=trust_remote_code).encode(texts))
    return Embeddings(
        title=f"{len(texts):,} texts in {page.name_of(model)}",
        spaces=[Space("texts", *project(vectors, method))],
        names=texts,
        texts=texts,
        labels=names,
    )


def _tokens(model: str | Path, texts: list[str], labels: list[str] | None, method: str, trust_remote_code: bool) -> Embeddings:
    opened = load(model, device="cpu", trust_remote_code=trust_remote_code)
    encoder: Any = opened.transformers_model
    tokenizer = opened.tokenizer
    limit = max_length_of(encoder, tokenizer)
    before, after, names, shown, kinds = [], [], [], [], []
    for number, text in enumerate(texts):
        inputs = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode():
            output = encoder(**inputs, output_hidden_states=True)
        if not output.hidden_states:
            raise ValueError(f"{model} has no transformer layers, so tokens have no vectors in context; draw texts instead.")
        before.append(output.hidden_states[0][0])  # (length, width)
        after.append(finite(output.last_hidden_state[0]))
        found = page.token_labels(tokenizer, inputs["input_ids"][0].tolist())
        names += found
        shown += [f"{token} (token {place} of: {page.plain(text, 200)})" for place, token in enumerate(found, start=1)]
        kinds += [labels[number] if labels else f"{number + 1}: {page.plain(text, 24)}"] * len(found)
    return Embeddings(
        title=f"Tokens in {page.name_of(model)}: " + (page.plain(texts[0], 80) if len(texts) == 1 else f"{len(texts)} texts"),
        spaces=[
            Space(f"{when} the encoder", *project(torch.cat(vectors).float().numpy(), method))
            for when, vectors in (("before", before), ("after", after))
        ],
        names=names,
        texts=shown,
        labels=kinds if labels or len(texts) > 1 else None,
    )


def project(vectors: np.ndarray, method: str = "pca") -> tuple[np.ndarray, list[str]]:
    """Project vectors (n, width) to points (n, 3). Return the points and the names of the axes.

    ``pca`` only adds zeros to vectors of up to three dimensions. For longer vectors, the names
    of the axes contain the explained variance.
    """
    count, width = vectors.shape
    vectors = np.asarray(vectors, dtype=np.float64)
    if method == "pca":
        points, axes = vectors, [f"dimension {number}" for number in (1, 2, 3)]
        if width > 3:
            pca = PCA(n_components=min(3, count), random_state=0)
            with np.errstate(invalid="ignore"):  # equal vectors have no variance
                points = pca.fit_transform(vectors)
            shares = [*np.nan_to_num(pca.explained_variance_ratio_), 0.0, 0.0][:3]
            axes = [f"component {number} ({share:.0%})" for number, share in enumerate(shares, start=1)]
        return np.pad(points, ((0, 0), (0, 3 - points.shape[1]))), axes
    if count < 6:
        raise ValueError(f"--method {method} needs at least 6 points, got {count}; use --method pca.")
    if method == "umap":
        from umap import UMAP

        points = UMAP(min(15, count - 1), n_components=3, init="random", random_state=0, n_jobs=1).fit_transform(vectors)
        return np.asarray(points), [f"UMAP {number}" for number in (1, 2, 3)]
    # With some hundred points in 3-D, the approximation is slower, and usual steps too long.
    points = TSNE(
        n_components=3,
        init="pca",
        random_state=0,
        perplexity=min(30.0, (count - 1) / 3),
        method="exact" if count <= 1000 else "barnes_hut",
        learning_rate=max(10.0, count / 48),
    ).fit_transform(vectors)
    return points, [f"t-SNE {number}" for number in (1, 2, 3)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Similarity(page.Picture):
    """Show the similarity of each text in ``rows`` to each text in ``columns``."""

    rows: list[str]
    columns: list[str]
    values: np.ndarray

    def panels(self) -> list[page.Panel]:
        """Return a heat map. On a page, the cells of a small heat map show their values."""
        columns, rows = ([(text, page.INK) for text in texts] for texts in (self.columns, self.rows))
        shown = "%{z:.4f}<br>%{y}<br><b>and</b><br>%{x}<extra></extra>"
        heat = page.heat_map(self.values, self.columns, self.rows, shown)
        if self.values.size <= 150 and len(self.columns) <= 12:
            heat.update(text=np.char.mod("%.2f", self.values.round(2) + 0.0), texttemplate="%{text}")  # no -0.00
        return [page.Panel(traces=[heat], columns=columns, rows=rows)]


def similarity(
    model: str | Path, rows: Sequence[str], columns: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> Similarity:
    """Compare every text in ``rows`` with every text in ``columns`` (by default, ``rows``).

    The model defines the similarity function, which is usually the cosine.

    Example::

        picture = plot.similarity("runs/quickstart/2-embed", ["sort a list", "read a file"])
        picture.save("similarity.html", force=True)

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if a list or a text is empty.
    """
    lists = [[texts] if isinstance(texts, str) else list(texts) for texts in (rows, rows if columns is None else columns)]
    for which, texts in zip(("first", "second"), lists):
        if not texts:
            raise ValueError(f"The {which} list of texts is empty; give at least one text.")
        for number, text in enumerate(texts, start=1):
            page.check_text(text, f"Text {number} of the {which} list")
    opened = load(model, device="cpu", trust_remote_code=trust_remote_code)
    values = opened.similarity(*(finite(opened.encode(texts, convert_to_tensor=True)) for texts in lists))
    return Similarity(
        title=f"{str(opened.similarity_fn_name).capitalize()} similarities in {page.name_of(model)}",
        rows=lists[0],
        columns=lists[1],
        values=values.float().numpy(),
    )
