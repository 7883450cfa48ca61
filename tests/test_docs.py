"""Test what the README and the documentation show: examples run, command lines parse, links have a target."""

import contextlib
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import re
import shlex
import textwrap
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import threadpoolctl
import torch
import typer
from transformers import BertConfig, BertModel

from helpers import ROOT, save_model, write_rows
from minibert import train_wordpiece
from minibert.cli import app
from minibert.train.recipe import load_recipe

PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
SHOWN = re.compile(r"\s*```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page.

    Args:
        kind: the language after its first fence, such as python.
        text: its lines.
        reason: why it is not run, from a comment before it.
        shown: the ``text`` block right after it, with its output.
    """

    kind: str
    text: str
    reason: str | None
    shown: str | None


def blocks(page: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(page):
        after = SHOWN.match(page, match.end())
        found.append(Block(match["kind"], match["text"], match["reason"], after and after[1]))
    return found


def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page)


def examples(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.kind == "python" and not block.reason]


# Examples


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Make a folder with small stand-ins for the models and files that the pages name."""
    from minibert.search.encode_corpus import encode_corpus

    room = tmp_path_factory.mktemp("room")
    notes = ["read a table from a file", "invert a matrix", "sort a list", "a good film", "a bad one"]
    tokenizer = train_wordpiece(notes * 2, vocab_size=60)
    for name, kind in (("quickstart/2-embed", "Model"), ("mine/2-classify", "ForSequenceClassification")):
        folder = save_model(room / "runs" / name, tokenizer, kind, "modern-6x384")
        write_rows(folder / "log.jsonl", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(room / "my-bert")
    tokenizer.save_pretrained(room / "my-bert")
    write_rows(room / "questions.jsonl", [{"query": f"how to {note}", "answer": note} for note in notes[:3]])
    (room / "notes.txt").write_text("\n".join(notes), encoding="utf-8")
    write_rows(room / "notes.jsonl", [{"body": note} for note in notes])
    encode_corpus(room / "runs/quickstart/2-embed", room / "notes.jsonl", room / "notes-vectors", keep_text=True)
    return room


def run_page(examples: list[Block], room: Path, printed: Path) -> None:
    """Run a page's blocks in one session, in this process; write what each printed, and the error that stopped them."""
    os.chdir(room)
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)  # pools of threads do not survive a fork
    session: dict[str, object] = {"__name__": "__main__"}
    outputs, error = [], None
    for block in examples:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(block.text, "example", "exec"), session)
            except BaseException:
                error = f"{traceback.format_exc()}\nin:\n{block.text}"
        outputs.append(output.getvalue())
        if error:
            break
    printed.write_text(json.dumps([outputs, error]), encoding="utf-8")


def alike(shown: str, printed: str) -> bool:
    """Return True if words and integers are equal, and other numbers differ by at most 2 in the last digit shown."""
    number = re.compile(r"-?\d+\.\d*")
    words, others = (" ".join(number.sub("#", text).split()).replace("[ ", "[") for text in (shown, printed))
    close = (
        abs(float(one) - float(other)) <= 2.01 * 10.0 ** -max(2, len(one.partition(".")[2]))
        for one, other in zip(number.findall(shown), number.findall(printed))
    )
    return words == others and all(close)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if examples(page)])
def test_examples_run_and_print_what_is_shown(name, room, tmp_path):
    page = examples(PAGES[name])
    process = multiprocessing.get_context("fork").Process(target=run_page, args=(page, room, tmp_path / "printed.json"))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    outputs, error = json.loads((tmp_path / "printed.json").read_text(encoding="utf-8"))
    assert not error, error
    for block, output in zip(page, outputs, strict=True):
        if block.shown:
            assert alike(block.shown, output), f"{block.text}\nshows:\n{block.shown}\nbut prints:\n{output}"
        for value in re.findall(r"^print\(.*\)  # ([\d.]+)$", block.text, re.MULTILINE):
            assert value in output.split()


DOCUMENTED = re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", PAGES["reference.md"], re.MULTILINE)


def example_of(name: str) -> str | None:
    """Return the example in a docstring, with the import that it needs."""
    module, _, own = name.rpartition(".")
    documented = getattr(importlib.import_module(module), own)
    found = re.search(r"^Example::\n\n((?: {4}.*\n|\n)+)", inspect.getdoc(documented) + "\n", re.MULTILINE)
    needed = "from minibert import plot" if module == "minibert.plot" else f"from {module} import {own}"
    return found and f"{needed}\n{textwrap.dedent(found[1])}"


def test_examples_of_the_reference_run(room, tmp_path):
    page = {name: example_of(name) for name in DOCUMENTED}
    given = {name for name, text in page.items() if text}
    using = {name for name in DOCUMENTED if name.startswith("minibert.inference.")} - {"minibert.search.vectors.Manifest"}
    assert using | {"minibert.encode", "minibert.predict"} <= given
    examples = [Block("python", text, None, None) for text in page.values() if text]
    process = multiprocessing.get_context("fork").Process(target=run_page, args=(examples, room, tmp_path / "printed.json"))
    process.start()
    process.join(300)
    outputs, error = json.loads((tmp_path / "printed.json").read_text(encoding="utf-8"))
    assert not error and len(outputs) == len(examples), error


def test_an_example_that_is_not_run_says_why():
    kinds = {block.kind for page in PAGES.values() for block in blocks(page) if block.kind.startswith("python")}
    assert kinds <= {"python"}, "say why in a comment before the block: <!-- not run: the reason -->"


def test_what_an_example_prints_is_compared():
    assert alike("tensor([0.84, 1.00]) of 3 texts", "tensor([ 0.85, 1.00])  of 3 texts")
    assert not alike("tensor([0.84, 1.00])", "tensor([0.88, 1.00])")
    assert not alike("3 texts", "4 texts")
    page = "<!-- not run: hours -->\n```python\nx\n```\n```python\nprint(1)\n```\n\n```text\n1\n```\n"
    assert [(block.reason, block.shown) for block in blocks(page)[:2]] == [("hours", None), (None, "1\n")]


# Command lines


def command_lines(page: str) -> list[str]:
    """Return every shell line in fenced or indented blocks; a backslash joins a line with the next."""
    shells = [block.text for block in blocks(page) if block.kind in ("", "console", "bash", "sh")]
    indented = re.findall(r"^ {4}.*\S.*$", prose(page), re.MULTILINE)
    text = "\n".join([*shells, *(line[4:] for line in indented)]).replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in text.splitlines()]


def words_of(line: str) -> list[str] | None:
    """Return the words of ``minibert …`` without launchers, pipes and comments; None for other programs."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>;&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word[0] in "|>;&":
            break
        words.append(word)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[:1] == ["torchrun"] or words[:2] == ["python", "-m"]:
        words = words[words.index("-m") + 1 :]
    return words if words[:1] == ["minibert"] else None


MINIBERT = [
    (name, line)
    for name, page in PAGES.items()
    for line in command_lines(page)
    if ("minibert" in line and not line.startswith("#") and words_of(line))
]


def parse(arguments: list[str]):
    """Parse ``arguments`` as the command does, without running it; raise the error that it would print."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        if name.startswith("-"):
            assert name in {option for parameter in command.params for option in parameter.opts} | {"--help"}
            return {}
        command = command.commands[name]
    return {} if "--help" in arguments else command.make_context(command.name, arguments).params


@pytest.mark.parametrize(("name", "line"), MINIBERT, ids=[f"{name}: {line[:60]}" for name, line in MINIBERT])
def test_command_lines_parse(name, line, tmp_path):
    words = words_of(line)[1:]
    parameters = parse(words)
    if words[0] not in ("train", "quickstart") or "--help" in words:
        return
    recipe, changes = parameters.get("recipe", "quickstart"), parameters["overrides"] or []
    if recipe.endswith(".yaml") and not recipe.startswith("recipes/"):  # the reader's own: the page shows it
        shown = [block.text for block in blocks(PAGES[name]) if block.kind == "yaml" and "stages:" in block.text]
        if not shown:
            return
        (tmp_path / "mine.yaml").write_text(shown[0], encoding="utf-8")
        recipe = str(tmp_path / "mine.yaml")
    assert load_recipe(str(ROOT / recipe) if recipe.startswith("recipes/") else recipe, changes).stages


def test_there_are_command_lines_and_wrong_ones_are_seen():
    assert len(MINIBERT) > 10
    assert words_of("torchrun --nproc_per_node 2 -m minibert train x.yaml   # two") == ["minibert", "train", "x.yaml"]
    assert words_of('minibert search vectors "a b" --json > answers.jsonl')[1:] == ["search", "vectors", "a b", "--json"]
    with pytest.raises(KeyError):
        parse(["fly"])
    with pytest.raises(Exception, match="--colour"):
        parse(["search", "model", "--colour", "red"])
    with pytest.raises(Exception, match="Missing parameter: output_dir"):
        parse(["hub", "pull", "ann/model"])


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_sentences_exist(name):
    for code in re.findall(r"`((?:python -m )?minibert [a-z][^`]*)`", prose(PAGES[name])):
        words = code.replace("python -m ", "").split()[1:]
        command = typer.main.get_command(app)
        while hasattr(command, "commands") and words and re.fullmatch("[a-z]+", words[0]):
            assert words[0] in command.commands, f"{name}: {code}"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert {word.strip("[],.;:") for word in words if word.startswith("--")} <= known, f"{name}: {code}"


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_recipes_and_benchmarks_exist(name):
    page = PAGES[name]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    code = "\n".join([*command_lines(page), *re.findall(r"`([^`\n]+)`", prose(page))])
    for target in re.findall(r"^make ([a-z]+)", code, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for recipe in re.findall(r"\brecipes/\w+\.yaml", page):
        assert (ROOT / recipe).exists(), recipe
    for benchmark in re.findall(r"python -m benchmarks (\w+)", page):
        assert (ROOT / "benchmarks" / f"{benchmark}.py").exists(), benchmark


RECIPES = [
    (name, block.text)
    for name, page in PAGES.items()
    for block in blocks(page)
    if block.kind == "yaml" and re.search(r"^stages:", block.text, re.MULTILINE)
]


@pytest.mark.parametrize(("name", "text"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes_are_recipes(name, text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(str(tmp_path / "mine.yaml")).stages


# Links


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{count}" if count else slug)
    return set(found)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    here = ROOT if name == "README.md" else ROOT / "docs"
    for target, anchor in re.findall(r"\]\((?!https?://|mailto:)([^)#\s]*)#?([^)\s]*)\)", prose(PAGES[name])):
        file = here / target if target else here / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert file.suffix == ".md" and anchor in anchors(file.read_text(encoding="utf-8")), f"{name}: {target}#{anchor}"


def test_anchors_are_those_of_github():
    assert anchors("# A `word`, twice\n## A word twice\n### [Out](x.md): `hub export`") == {
        "a-word-twice",
        "a-word-twice-1",
        "out-hub-export",
    }


def test_every_page_is_in_the_table_of_contents():
    listed = {line for block in blocks(PAGES["index.md"]) if block.kind == "{toctree}" for line in block.text.split("\n")}
    assert {Path(name).stem for name in PAGES} - {"README", "index"} == {line for line in listed if line and line[0] != ":"}


def test_the_page_of_recipe_fields_is_up_to_date():
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs" / "fields.py")
    fields = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fields)
    assert PAGES["training.md"] == fields.page(), "run: python docs/fields.py"
