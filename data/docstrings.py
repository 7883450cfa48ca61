"""Build query-answer pairs from the docstrings of the installed Python packages.

The pairs are the corpus of the quickstart. Source files are parsed and never imported, so none
of their code runs. The query is the first sentence of a docstring, and the answer is the rest.
Some modules are held out for validation. A pair that repeats an earlier pair is left out.
"""

import ast
import functools
import hashlib
import importlib.machinery
import itertools
import os
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from tqdm.auto import tqdm

# These packages follow the standard library, if installed. The best documented come first.
PACKAGES = (
    *("numpy", "pandas", "scipy", "sklearn", "torch", "networkx", "datasets", "sentence_transformers", "transformers"),
    *("tokenizers", "huggingface_hub", "accelerate", "safetensors", "sympy", "mpmath", "pyarrow", "matplotlib", "statsmodels"),
    *("requests", "aiohttp", "flask", "django", "sqlalchemy", "jinja2", "pydantic", "click", "typer", "rich", "tqdm", "joblib"),
    *("fsspec", "psutil", "yaml", "dateutil", "anyio", "pygments", "dill", "filelock", "packaging", "hypothesis", "pytest"),
    *("_pytest", "narwhals", "setuptools", "pip"),
)
SKIPPED_FOLDERS = {"test", "tests", "testing", "_test", "_tests", "__pycache__", "site-packages", "_vendor"}
SKIPPED_FOLDERS |= {"idlelib", "lib2to3"}
# A third of all source text, mostly near-copies or internals. Reading it takes ten seconds.
SKIPPED_PATHS = {("transformers", "models"), ("torch", "_inductor"), ("torch", "_dynamo"), ("pygments", "lexers")}
HELD_OUT_PERCENT = 8
MAX_PAIRS = 40_000
MAX_ANSWER_CHARACTERS = 1_000
SEED = 42
_RUN = 6  # words


class Document(NamedTuple):
    """Store a docstring. ``title`` is the first sentence, and ``body`` is the rest."""

    module: str
    name: str
    title: str
    body: str


def load_pairs(split: str = "train") -> Dataset:
    """Return the query-answer pairs of one split, in a fixed random order.

    ``split`` is ``train`` or ``validation``. No module is in both splits. The columns are
    ``query`` and ``answer``. An answer begins with the name of the documented object.
    """
    rows = [{"query": title, "answer": f"{name}: {body}"} for _, name, title, body in _split(split)]
    return Dataset.from_list(rows)


def load_passages() -> Dataset:
    """Return the docstrings of all public objects, in the columns ``text`` and ``name``."""
    rows = [
        {"text": f"{name}: {title} {body}", "name": name}
        for module, name, title, body in [*_split("train"), *_split("validation")]
        if not any(part.startswith("_") for part in name.removeprefix(module).split("."))
    ]
    return Dataset.from_list(rows)


def _split(split: str) -> list[Document]:
    if split not in ("train", "validation"):
        raise ValueError(f"The data set installed-docs has no split {split!r}; use train or validation.")
    held_out = split == "validation"
    documents = [document for document in collect(find_roots()) if is_held_out(document.module) == held_out]
    if not documents:
        raise ValueError(
            f"The packages installed in this environment have no docstrings for the split {split}; "
            "install packages such as numpy or scipy, or name a data set in the recipe."
        )
    random.Random(SEED).shuffle(documents)
    return documents


def find_roots(packages: Iterable[str] = PACKAGES) -> tuple[tuple[str, Path], ...]:
    """Return names (``""`` for the standard library) and folders of installed packages."""
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    for package in packages:
        spec = importlib.machinery.PathFinder.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            roots.append((package, Path(folder)))
    return tuple(roots)


@functools.lru_cache(maxsize=1)  # the stages of a recipe share the result
def collect(roots: tuple[tuple[str, Path], ...]) -> tuple[Document, ...]:
    """Return the different docstrings of the packages from :func:`find_roots`."""
    found: list[Document] = []
    files = [(package, root, path) for package, root in roots for path in source_files(root)]
    for package, root, path in tqdm(files, desc="Reading installed documentation", unit="file", mininterval=0.5):
        names = [package, *path.relative_to(root).with_suffix("").parts]
        found += read_documents(path, ".".join(name for name in names if name and name != "__init__"))
    return tuple(itertools.islice(without_repetition(found), MAX_PAIRS))


def source_files(root: Path) -> list[Path]:
    """Return the sorted Python files in ``root``, without tests and bundled packages."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in SKIPPED_FOLDERS and (Path(folder).name, name) not in SKIPPED_PATHS
        ]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def is_held_out(module: str) -> bool:
    """Return True if the docstrings of a module belong to the validation split."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_documents(path: Path, module: str) -> Iterator[Document]:
    """Parse a source file, and yield each docstring that has a title and a body."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, and files for another version of Python
            return
    for name, docstring in docstrings(tree, module):
        title, body = title_and_body(docstring)
        if title and body:
            yield Document(module, name, title, body)


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    r"""Yield the name and the docstring of every documented object in a module.

    >>> list(docstrings(ast.parse("class A:\n  def b(self):\n    'Does b.'"), "m"))
    [('m.A.b', 'Does b.')]
    """
    pending: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if text := ast.get_docstring(node):
            yield name, text
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                pending.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                yield from _documented_by_call(child.value)


def _documented_by_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    # numpy and torch document compiled functions by calls of add_newdoc and add_docstr.
    if "doc" not in ast.unparse(call.func) or len(call.args) < 2:
        return
    *target, text = call.args
    if isinstance(text, ast.Tuple) and len(text.elts) == 2:  # add_newdoc("numpy", "ndarray", ("copy", """..."""))
        target.append(text.elts[0])
        text = text.elts[1]
    literals = [part.value for part in ast.walk(text) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    name = ".".join(ast.unparse(part).strip("'") for part in target)
    if literals and _DOTTED.fullmatch(name):
        yield name, max(literals, key=len).strip()


_DOTTED = re.compile(r"[\w.]+")
_CODE_FENCE = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_DOCTEST = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", re.MULTILINE)  # up to the next empty line: the output goes too
_DIRECTIVE = re.compile(r"^[ \t]*(?:\.\.|!!!) .*(?:\n[ \t]+\S.*)*", re.MULTILINE)
_UNDERLINE = re.compile(r"^[ \t]*([-=~^*+#])\1{2,}[ \t]*$", re.MULTILINE)
_EXAMPLES = re.compile(r"^[ \t]*(examples?|usage|references|see also|notes?)[ \t]*:{0,2}[ \t]*$", re.MULTILINE | re.IGNORECASE)
_ROLE = re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_FIELD = re.compile(r"^[ \t]*:(?:param|arg|type|keyword|raises?|var|ivar|returns?|rtype)\b[ \t]*([^:\n]*):", re.MULTILINE)
_MARKUP = re.compile(r"`+|\*{2,}|\[\[|\]\]|\\+|\|")
_TEMPLATE = re.compile(r"[{%]\(?\w*\)?[s}]")  # placeholders of docstrings that are filled at run time
_SIGNATURE = re.compile(r"^[\w.]+\s*\(.*?\)(?:\s*->\s*[^\n]*)?\n", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?](?=\s+[A-Z`\"'(]|$)")


def plain_text(text: str) -> str:
    r"""Return the prose of a docstring, without examples, code, directives and markup.

    >>> plain_text("Uses :func:`~os.walk` on ``top``.\n\n>>> 1 + 1\n2\n\nReturns\n-------\nA list.")
    'Uses os.walk on top. Returns A list.'
    """
    for pattern in (_CODE_FENCE, _DOCTEST, _DIRECTIVE, _UNDERLINE, _EXAMPLES, _TEMPLATE):
        text = pattern.sub("", text)
    text = _FIELD.sub(r"\1:", _ROLE.sub(r"\1", text))
    return " ".join(_MARKUP.sub("", text).split())


def title_and_body(docstring: str) -> tuple[str, str]:
    """Return the first sentence and the rest of a docstring as plain text.

    If one of the two texts is too short or is not prose, return two empty strings.

    >>> title_and_body("Return the larger of two numbers. Ties go to the first one, as they do in every sorting function.")
    ('Return the larger of two numbers.', 'Ties go to the first one, as they do in every sorting function.')
    """
    docstring = _SIGNATURE.sub("", docstring, count=1).strip()
    head, _, rest = docstring.partition("\n\n")
    head = plain_text(head)
    end = _SENTENCE_END.search(head)
    title, tail = (head[: end.end()], head[end.end() :]) if end else (head, "")
    body = " ".join([*tail.split(), *plain_text(rest).split()])
    body = body[:MAX_ANSWER_CHARACTERS].rsplit(" ", 1)[0] if len(body) > MAX_ANSWER_CHARACTERS else body
    readable = 3 <= len(title.split()) <= 40 and len(body.split()) >= 8 and _is_prose(title) and _is_prose(body)
    return (title, body) if readable else ("", "")


def _is_prose(text: str) -> bool:
    letters = re.findall("[A-Za-z ]", text)
    return len(letters) > 0.75 * len(text)


def without_repetition(documents: Sequence[Document]) -> Iterator[Document]:
    """Yield the documents, without copies of earlier documents.

    A document is left out if the title, the name or half of the six-word sequences occurred
    before, or if more than four documents have the same title.
    """
    keys = [_words(document.title) for document in documents]
    uses = Counter(keys)
    seen: set[object] = set()
    for document, key in zip(documents, keys, strict=True):
        words = _words(document.body)
        runs = {hash(words[start : start + _RUN]) for start in range(max(1, len(words) - _RUN + 1))}
        new = key not in seen and document.name not in seen
        if new and uses[key] <= 4 and len(runs & seen) < 0.5 * len(runs):
            seen |= {key, document.name}
            yield document
        seen |= runs


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z]+", text.lower()))
