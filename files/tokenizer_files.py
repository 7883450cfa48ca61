"""Check a tokenizer's files before the tokenizers library reads them.

The library ends the process, or works for minutes, on some damaged or hostile files. Files of
the usual kinds are checked here. Other kinds and large files are first opened in a process
whose memory and time are limited.
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from minibert.files.disk import read_settings
from minibert.files.model_settings import refuse, short

_LARGE = 4_000_000  # bytes
_MEMORY, _SECONDS = 2 * 2**30, 20  # limits of the process
_LENGTH_LIMIT = 2**17  # tokens, if the model does not say how many positions it has
_ID_LIMIT = 2**22
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")
# Parts that are cheap for any text and have no settings that could end the process.
_PARTS = (
    *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Strip", "StripAccents"),
    *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
    *("BertProcessing", "RobertaProcessing", "TemplateProcessing", "Sequence"),
    *("BPEDecoder", "ByteFallback", "Fuse", "WordPiece"),
)
_OPEN = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
except ImportError:  # Windows
    pass
from tokenizers import Tokenizer
for text in ("", "A short text, 42!", "a" * 2000 + "!", "\\u00e9\\u4e2d " * 500):
    Tokenizer.from_file(sys.argv[1]).encode(text)
"""


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError if the tokenizer in ``folder`` cannot be opened safely.

    Lengths and ids must fit the sizes in ``config.json``, if there is one.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return
    settings = read_settings(file)
    config = read_settings(folder / "config.json")
    sizes = [config.get(name) for name in ("max_position_embeddings", "vocab_size")]
    positions, rows = (size if type(size) is int and size > 0 else None for size in sizes)
    _check_lengths(file, settings, positions or _LENGTH_LIMIT)
    limit = rows or _ID_LIMIT
    if wrong := [number for number in _ids(settings) if not 0 <= number < limit]:
        refuse(file, f"has the token id {short(wrong[0])}, but the model has {limit:,} tokens", "use the model's own tokenizer")
    parts = list(_parts([settings.get(name) for name in _STEPS]))
    usual = settings["model"].get("type") in _MODELS and all(_is_usual(part) for part in parts)
    found = file.stat()
    if not usual or found.st_size > _LARGE:
        _try(file, found.st_size, found.st_mtime_ns)


def _check_lengths(file: Path, settings: dict[str, Any], limit: int) -> None:
    truncation, padding, model = (settings.get(name) or {} for name in ("truncation", "padding", "model"))
    tokens = settings.get("added_tokens") or []
    parts = (truncation, padding, model)
    if not model or not all(isinstance(part, dict) for part in parts) or not isinstance(tokens, list):
        refuse(file, "is not the file of a tokenizer", "save or download it again")
    strategy = padding.get("strategy")
    lengths = {
        "truncation.max_length": truncation.get("max_length"),
        "padding.strategy": strategy.get("Fixed") if isinstance(strategy, dict) else None,
        "padding.pad_to_multiple_of": padding.get("pad_to_multiple_of"),
        "model.max_input_chars_per_word": model.get("max_input_chars_per_word"),
    }
    for name, length in lengths.items():
        if length is not None and not (type(length) is int and 0 < length <= max(limit, 100)):
            refuse(file, f"sets {name} to {short(length)}, but the model reads up to {limit:,} tokens", "correct this length")


def _ids(settings: dict[str, Any]) -> Iterator[int]:
    """Yield the token ids in the file. A list of tokens stands for the ids of its places."""
    vocab = settings["model"].get("vocab")
    found = [*vocab.values()] if isinstance(vocab, dict) else [len(vocab) - 1] if isinstance(vocab, list) else []
    found += [token.get("id") for token in settings.get("added_tokens") or [] if isinstance(token, dict)]
    found.append((settings.get("padding") or {}).get("pad_id"))
    for part in _parts(settings.get("post_processor")):
        found += [part[name][-1] for name in ("sep", "cls") if isinstance(part.get(name), list) and part[name]]
        tokens = part.get("special_tokens")
        for token in tokens.values() if isinstance(tokens, dict) else ():
            found += token["ids"] if isinstance(token, dict) and isinstance(token.get("ids"), list) else []
    yield from (number for number in found if type(number) is int)


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a tokenizer, also those within a sequence of steps."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _parts(part)


def _is_usual(part: dict[str, Any]) -> bool:
    """Return True for a step that takes time and memory in proportion to the text."""
    pattern, content = part.get("pattern"), part.get("content", "")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if part["type"] == "Replace":
        return isinstance(text, str) and isinstance(content, str) and len(content) <= len(text)
    return part["type"] in _PARTS or (part["type"] == "Split" and isinstance(text, str))


@lru_cache(maxsize=64)  # a command opens the same tokenizer several times
def _try(file: Path, size: int, changed: int) -> None:
    """Open a tokenizer in a process with limits. Refuse the tokenizer if the process fails."""
    code = _OPEN.format(memory=_MEMORY, seconds=_SECONDS)
    try:
        failed = subprocess.run([sys.executable, "-I", "-c", code, file], capture_output=True, timeout=2 * _SECONDS).returncode
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        refuse(file, f"could not be read with {_MEMORY / 2**30:.0f} GiB of memory in {_SECONDS} seconds")
