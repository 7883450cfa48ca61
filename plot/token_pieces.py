"""Show the tokens of a text with their ids and words, and mark unknown tokens."""

from dataclasses import dataclass
from pathlib import Path

from minibert.files.disk import expand_home
from minibert.inference.load import find_model, open_tokenizer
from minibert.plot.page import check_text, plain, token_labels


@dataclass(frozen=True)
class Token:
    """Describe a token of a text.

    Attributes:
        token: the readable form of the token.
        id: the number of the token in the vocabulary.
        word: the number of the word that contains the token, from 1, or None for a special
            token.
        text: the characters of the text that the token represents.
        unknown: True if the vocabulary does not contain these characters.
    """

    token: str
    id: int
    word: int | None
    text: str
    unknown: bool


@dataclass(frozen=True, repr=False)
class Tokens:
    """Store the tokens of a text. ``print`` shows a table. The model reads ``limit`` tokens."""

    tokens: list[Token]
    limit: int

    def __repr__(self) -> str:
        table = [("id", "token", "word", "text")]
        for token in self.tokens:
            text = plain(token.text, 40) + ("  (not in the vocabulary)" if token.unknown else "")
            table.append((str(token.id), plain(token.token, 50), str(token.word or "-"), text))
        first, second, third, _ = (max(map(len, column)) for column in zip(*table))
        lines = [f"{id:>{first}}  {token:<{second}}  {word:>{third}}  {text}" for id, token, word, text in table]
        words = len({token.word for token in self.tokens} - {None})
        unknown = sum(token.unknown for token in self.tokens)
        lines.append(f"{len(self.tokens):,} tokens of {words:,} words, {unknown} unknown.")
        if len(self.tokens) > self.limit:
            lines.append(f"The model reads only the first {self.limit} of them.")
        return "\n".join(line.rstrip() for line in lines)


def tokens(model: str | Path, text: str, *, trust_remote_code: bool = False) -> Tokens:
    """Split ``text`` with the tokenizer of ``model``. Return all tokens, with special tokens.

    Args:
        model: a model folder, the id (owner/name) of a model on the Hub, or a folder that
            contains only a tokenizer.
        text: the text to split.
        trust_remote_code: run Python code that comes with a model other than MiniBERT.

    Example::

        print(plot.tokens("runs/quickstart/2-embed", "uncommonness"))

    Raises:
        FileNotFoundError: if the model does not exist.
        ValueError: if the text is empty.
    """
    check_text(text)
    folder = expand_home(model)
    if not (folder / "tokenizer_config.json").exists():  # the folder may hold only a tokenizer
        folder = find_model(model, trust_remote_code=trust_remote_code)
    tokenizer = open_tokenizer(folder, trust_remote_code=trust_remote_code)
    encoded = tokenizer(text, verbose=False)
    ids, fast = encoded["input_ids"], encoded.encodings[0]
    found = []
    for label, number, word, (start, end) in zip(token_labels(tokenizer, ids), ids, fast.word_ids, fast.offsets):
        unknown = number == tokenizer.unk_token_id
        found.append(Token(label, number, None if word is None else word + 1, text[start:end], unknown))
    return Tokens(found, tokenizer.model_max_length)
