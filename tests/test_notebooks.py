"""Test that the notebooks run from top to bottom, offline, each in an empty folder and a fresh process."""

import json
import re
from pathlib import Path

import pytest

import minibert
from helpers import run_python

FOLDER = Path(minibert.__file__).parent / "docs" / "notebooks"


def cells(path):
    """Return the kind and the text of every cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def test_these_notebooks_are_there():
    names = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert names == {"inside-an-encoder", "train-your-own-search", "distil-your-bert"}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    # Plain Python, no magic: so a cell is run as it is, and what it ends with is shown as a notebook would show it.
    script = (
        "import ast, sys\n"
        "for source in __import__('json').load(sys.stdin):\n"
        "    body = ast.parse(source).body\n"
        "    last = body.pop() if isinstance(body[-1], ast.Expr) else None\n"
        "    exec(compile(ast.Module(body, []), 'cell', 'exec'), globals())\n"
        "    shown = eval(compile(ast.Expression(last.value), 'cell', 'eval'), globals()) if last else None\n"
        "    for form in ('_repr_png_', '_repr_html_', '_repr_mimebundle_'):\n"
        "        if hasattr(shown, form):\n"
        "            print('picture of', len(getattr(shown, form)()))\n"
    )
    code = [source for kind, source in cells(path) if kind == "code"]
    printed = run_python(script, input=json.dumps(code), cwd=tmp_path, timeout=600)
    assert printed.count("picture of") == sum(source.splitlines()[-1].startswith(("plot.", ")")) for source in code)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    for kind, text in cells(path):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text) if kind == "markdown" else ():
            assert (path.parent / target).exists(), target
