"""Draw how a text is split into tokens: their ids, the words they belong to, and what the vocabulary lacks."""

import html
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from minibert.files.disk import read_json
from minibert.inference.load import find_model
from minibert.plot.page import Picture, check_text, name_of, plain, token_labels

_STYLE = """<style>
.token { display: inline-block; margin: 0 1px 4px 0; padding: 4px 8px; border: 2px solid transparent; text-align: center;
    font: 15px 'DejaVu Sans Mono', Menlo, Consolas, monospace; color: #222; background: #EEE; white-space: pre; }
.token small { display: block; font-size: 10px; }
.odd { background: #FBE3D3; }
.even { background: #DCEBF7; }
.unknown { border-color: #C62828; color: #C62828; }
</style>"""


@dataclass(frozen=True)
class Token:
    """A token.

    Attributes:
        token: as people read it; id: its number in the vocabulary.
        word: number of the word it belongs to, from 1; None for special tokens.
        text: the part of the text that it stands for.
        unknown: True if the vocabulary lacks that part.
    """

    token: str
    id: int
    word: int | None
    text: str
    unknown: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens(Picture):
    """The tokens of a text; a notebook shows their page."""

    tokens: list[Token]

    @property
    def summary(self) -> str:
        """The number of tokens, words and unknown tokens."""
        words = len({token.word for token in self.tokens} - {None})
        return f"{len(self.tokens):,} tokens of {words:,} words, {sum(token.unknown for token in self.tokens)} unknown."

    def table(self) -> str:
        """Return lines of text: id, token, word, and the text that the token stands for."""
        table = [("id", "token", "word", "text")]
        for token in self.tokens:
            text = plain(token.text, 40) + ("  (not in the vocabulary)" if token.unknown else "")
            table.append((str(token.id), plain(token.token, 50), str(token.word or "-"), text))
        first, second, third, _ = (max(map(len, column)) for column in zip(*table))
        lines = [f"{id:>{first}}  {token:<{second}}  {word:>{third}}  {text}" for id, token, word, text in table]
        return "\n".join(line.rstrip() for line in lines)

    def body(self) -> str:
        """Return the tokens as HTML boxes; the pointer shows word and text."""
        boxes = []
        for token in self.tokens:
            word = "special token" if token.word is None else f"word {token.word}, stands for: {token.text}"
            kind = "token" if token.word is None else f"token {'odd' if token.word % 2 else 'even'}"
            if token.unknown:
                word, kind = f"{word} (not in the vocabulary)", f"{kind} unknown"
            box = f"{html.escape(plain(token.token, 50))}<small>{token.id}</small>"
            boxes.append(f'<span class="{kind}" title="{html.escape(plain(word, 200))}">{box}</span>')
        return "\n".join([_STYLE, *boxes])

    _repr_html_ = body


def tokens(model: str | Path, text: str, *, trust_remote_code: bool = False) -> Tokens:
    """Return the tokens into which the tokenizer of ``model`` splits ``text``, with special tokens.

    Args:
        model: a model folder, the id (owner/name) of a model on the Hub, or a folder that holds
            only a tokenizer.

    Example::

        print(plot.tokens("runs/quickstart/2-embed", "uncommonness").table())

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the text is empty.
    """
    check_text(text)
    tokenizer = _open_tokenizer(model, trust_remote_code)
    encoded = tokenizer(text, verbose=False)
    ids, fast = encoded["input_ids"], encoded.encodings[0]
    found = []
    for label, number, word, (start, end) in zip(token_labels(tokenizer, ids), ids, fast.word_ids, fast.offsets):
        unknown = number == tokenizer.unk_token_id
        found.append(Token(label, number, None if word is None else word + 1, text[start:end], unknown))
    notes = ["Words are in turns blue and orange, special tokens grey, unknown tokens red; ids are below."]
    if len(found) > tokenizer.model_max_length:
        notes.append(f"The model reads only the first {tokenizer.model_max_length} of them.")
    return Tokens(title=f"Tokens of {name_of(model)}: {plain(text, 80)}", notes=tuple(notes), tokens=found)


def _open_tokenizer(model: str | Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = Path(model).expanduser()
    if not (folder / "tokenizer_config.json").exists():  # a folder that holds only a tokenizer is not a model folder
        folder = find_model(model, trust_remote_code=trust_remote_code)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists():
            read_json(folder / name)  # names a damaged file, which transformers would not
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
