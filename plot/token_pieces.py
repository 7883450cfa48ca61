"""How a text is split into tokens, as a picture: their ids, the words they belong to, and what the vocabulary lacks."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minibert.files.disk import read_json
from minibert.inference.load import find_model
from minibert.plot.page import INK, UNKNOWN, Picture, check_text, hover, markup, name_of, plain, token_labels

# Characters that a line of boxes holds, and tokens that a picture holds.
_LINE, _MOST = 52, 1000
_WORDS, _SPECIAL = ("#DCEBF7", "#FBE3D3"), "#EEEEEE"


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        token: as people read it; id: its number in the vocabulary.
        word: number of the word it belongs to, from 1; None for special tokens.
        text: the part of the text that it stands for.
        unknown: whether the vocabulary lacks that part.
    """

    token: str
    id: int
    word: int | None
    text: str
    unknown: bool

    @property
    def colour(self) -> str:
        """Words alternate between two colours."""
        return _SPECIAL if self.word is None else _WORDS[self.word % 2]

    @property
    def label(self) -> str:
        return plain(self.token, _LINE - 2)

    @property
    def width(self) -> int:
        """Characters that its box takes."""
        return max(len(self.label), len(str(self.id))) + 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens(Picture):
    """The tokens of a text."""

    tokens: list[Token]

    @property
    def summary(self) -> str:
        """How many there are of what."""
        words = len({token.word for token in self.tokens} - {None})
        return f"{len(self.tokens):,} tokens of {words:,} words, {sum(token.unknown for token in self.tokens)} unknown."

    @property
    def page_width(self) -> int:
        return 760

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [asdict(token) for token in self.tokens]

    def table(self) -> str:
        """Lines of text: id, token, word and what it stands for."""
        rows = [("id", "token", "word", "text")]
        for token in self.tokens:
            text = plain(token.text, 40) + ("  (not in the vocabulary)" if token.unknown else "")
            rows.append((str(token.id), token.label, "-" if token.word is None else str(token.word), text))
        widths = [max(len(row[place]) for row in rows) for place in range(3)]
        return "\n".join(
            f"{row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        )

    def boxes(self) -> Iterator[tuple[Token, float, int]]:
        """Every token, with the left end of its box in characters, and its line."""
        left, line = 0.0, 0
        for token in self.tokens:
            if left and left + token.width > _LINE:
                left, line = 0.0, line + 1
            yield token, left, line
            left += token.width

    def interactive(self) -> go.Figure:
        figure = go.Figure()
        boxes = list(self.boxes())
        for token, left, line in boxes:
            figure.add_shape(
                type="rect",
                x0=left,
                x1=left + token.width - 0.15,
                y0=line - 0.42,
                y1=line + 0.42,
                fillcolor=token.colour,
                line={"color": UNKNOWN if token.unknown else token.colour, "width": 2},
                layer="below",
            )
        for below, size in ((False, 12), (True, 9)):
            figure.add_scatter(
                x=[left + (token.width - 0.15) / 2 for token, left, _ in boxes],
                y=[line + (0.24 if below else -0.12) for _, _, line in boxes],
                text=[str(token.id) if below else markup(token.label) for token, _, _ in boxes],
                mode="text",
                textfont={
                    "family": "'DejaVu Sans Mono', Menlo, Consolas, monospace",
                    "size": size,
                    "color": [UNKNOWN if token.unknown else INK for token, _, _ in boxes],
                },
                hovertext=[_explain(token) for token, _, _ in boxes],
                hovertemplate="%{hovertext}<extra></extra>",
                showlegend=False,
            )
        lines = boxes[-1][2] + 1
        figure.update_layout(
            template="plotly_white",
            height=46 * lines + 20,
            margin={"l": 2, "r": 2, "t": 10, "b": 10},
            xaxis={"visible": False, "range": [-0.3, _LINE + 0.3], "fixedrange": True},
            yaxis={"visible": False, "range": [lines - 0.4, -0.6], "fixedrange": True},
        )
        return figure

    def draw(self) -> Figure:
        boxes = list(self.boxes())
        lines = boxes[-1][2] + 1
        figure = Figure(figsize=(7.6, 0.48 * lines + 0.75), layout="constrained")
        axes = figure.subplots()
        for token, left, line in boxes:
            edge = UNKNOWN if token.unknown else token.colour
            axes.add_patch(Rectangle((left, line - 0.42), token.width - 0.15, 0.84, facecolor=token.colour, edgecolor=edge))
            middle, colour = left + (token.width - 0.15) / 2, UNKNOWN if token.unknown else INK
            axes.text(middle, line - 0.1, token.label, fontsize=9, color=colour, ha="center", va="center", family="monospace")
            axes.text(
                middle, line + 0.26, str(token.id), fontsize=6, color=colour, ha="center", va="center", family="monospace"
            )
        axes.set(xlim=(-0.3, _LINE + 0.3), ylim=(lines - 0.4, -0.6))
        axes.axis("off")
        return figure


def _explain(token: Token) -> str:
    kind = "special token" if token.word is None else f"word {token.word}"
    lacks = "<br>the vocabulary lacks it" if token.unknown else ""
    text = f"<br>stands for: {hover(token.text)}" if token.text else ""
    return f"<b>{markup(token.token)}</b><br>id {token.id}, {kind}{text}{lacks}"


def tokens(model: str | Path, text: str, *, trust_remote_code: bool = False) -> Tokens:
    """How the tokenizer of ``model`` splits ``text``, the special tokens that the model reads included.

    Args:
        model: a model folder, the id (owner/name) of a model on the Hub, or a folder that holds a tokenizer only.

    Example::

        print(plot.tokens("runs/quickstart/2-embed", "uncommonness").table())

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the text is empty.
    """
    check_text(text)
    tokenizer = _open_tokenizer(model, trust_remote_code)
    encoded = tokenizer(text, verbose=False)
    ids = encoded["input_ids"]
    fast = encoded.encodings[0] if encoded.encodings else None
    words = [None] * len(ids) if fast is None else fast.word_ids
    spans = [(0, 0)] * len(ids) if fast is None else fast.offsets
    found = [
        Token(
            token=label,
            id=number,
            word=None if word is None else word + 1,
            text=text[start:end],
            unknown=number == tokenizer.unk_token_id,
        )
        for label, number, word, (start, end) in zip(token_labels(tokenizer, ids), ids, words, spans)
    ]
    notes = ["Words are in turns blue and orange, special tokens grey, unknown ones red; below each token is its id."]
    if len(found) > tokenizer.model_max_length:
        notes.append(f"The model reads the first {tokenizer.model_max_length} of them only.")
    if len(found) > _MOST:
        notes.append(f"The first {_MOST:,} are shown.")
    return Tokens(title=f"Tokens of {name_of(model)}: {plain(text, 80)}", notes=tuple(notes), tokens=found[:_MOST])


def _open_tokenizer(model: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = Path(model).expanduser()
    if not (folder / "tokenizer_config.json").exists():  # else a tokenizer alone will do
        folder = find_model(model, trust_remote_code=trust_remote_code)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists():
            read_json(folder / name)  # which says what is damaged, where transformers would not
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
