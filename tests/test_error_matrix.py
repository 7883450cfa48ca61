"""Every command with everything that goes wrong: exit status, one sentence with a next step, and nothing overwritten.

The commands run as they are, each in a child that is forked from this process, where what they import is loaded already:
what costs seconds as a new process costs a fraction of one here. A child gives up what root may do, so that permissions hold.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import BertConfig, BertModel

from helpers import edit_json, save_model
from hub_server import HubServer
from minibert import cli, train_wordpiece

# What the commands import when they run, so that no child has to.
for _module in (
    *("hub.convert", "hub.export", "hub.onnx", "hub.push", "hub.verify", "search.encode_corpus", "evaluation.evaluate"),
    *("plot", "inference.predict", "search.search", "train.stages.classify", "train.stages.embed", "train.recipe"),
):
    importlib.import_module(f"minibert.{_module}")
for _module in ("faiss", "matplotlib.pyplot", "plotly.graph_objects", "sklearn.decomposition"):
    importlib.import_module(_module)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="forks, and limits as Linux does")

TEXTS = ["the cat sleeps on the sofa", "a dog sleeps on the mat", "stocks fell today", "gold rose after the news"] * 3
SECONDS = 60
LIMIT = 1000  # bytes of a file, where the disk is full


# -------------------------------------------------------------------------------------------------------- the children


class Done(NamedTuple):
    status: int  # -9 is killed
    out: str
    err: str


def run(line: str, place: Path, *prepare: Callable[[], object], stdout: str | None = None) -> Done:
    """What ``minibert LINE`` does in the folder ``place``, after a child called ``prepare``; ``stdout`` names another file."""
    streams = [place.parent / f"{place.name}.{name}" for name in ("stdout", "stderr")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            gc.freeze()  # a collection would touch, and so copy, every page of the parent
            _redirect(stdout or str(streams[0]), str(streams[1]))
            status = _command(line, place, prepare)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"minibert {line} did not end; it said: {streams[1].read_text()}")
        time.sleep(0.005)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = (file.read_text(encoding="utf-8") if file.exists() else "" for file in streams)
    return Done(status, out, err)


def _redirect(stdout: str, stderr: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, (name, how) in enumerate(((os.devnull, os.O_RDONLY), (stdout, flags), (stderr, flags))):
        os.dup2(os.open(name, how), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    for logger in [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
        for handler in logger.handlers:  # they hold the standard error of when they were made
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr  # setStream would flush the old one first, which may be closed by now


def _command(line: str, place: Path, prepare: tuple[Callable[[], object], ...]) -> int:
    """The status with which the interpreter would end."""
    from accelerate.state import AcceleratorState

    try:
        torch.set_num_threads(1)  # the threads of a parallel loop did not survive the fork
        threadpool_limits(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
        _be_nobody()
        os.chdir(place)
        sys.argv = ["minibert", *shlex.split(line)]
        for step in prepare:
            step()
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _be_nobody() -> None:
    """Give up what root may do beyond others: its own files keep their permissions against it then."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def at(target: str, number: int, call: int = 1) -> Callable[[], None]:
    """Have the child send itself the signal ``number`` when the function ``target`` (module:name) is called, the n-th time."""

    def prepare() -> None:
        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function, count = getattr(owner, name), 0

        @functools.wraps(function)
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), number)
                time.sleep(0.05)  # the handler runs between two instructions of the main thread
            return function(*arguments, **options)

        setattr(owner, name, wrapped)

    return prepare


def full_disk() -> None:
    """Files end at :data:`LIMIT` bytes; writing on fails as on a full disk, with another number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def little_memory() -> None:
    """Memory for 100 MB more than what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ----------------------------------------------------------------------------------------------------------- the world


def recipe(**more):
    stage = {"kind": "classify", "data": "labels.csv", "model": "model", "max_steps": 3, "max_length": 8, "batch_size": 4}
    return json.dumps({"name": "toy", "stages": [{**stage, **more}]})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a model, a BERT, texts, vectors and a run, made by the commands themselves."""
    place = tmp_path_factory.mktemp("world") / "world"
    place.mkdir()
    tokenizer = train_wordpiece(TEXTS, vocab_size=60, model_max_length=16, show_progress=False)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    save_model(place / "model", tokenizer, "ForSequenceClassification", "bert-base", **shape)
    BertModel(BertConfig(**shape)).save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "bert")
    rows = [f"{text},{number % 2},{number / 2}" for number, text in enumerate(TEXTS)]
    (place / "labels.csv").write_text("text,label,number\n" + "\n".join(rows) + "\n")
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (place / "recipe.yaml").write_text(recipe())
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("years of work")
    for name in ("thesis.html", "thesis.jsonl", "thesis.png"):
        (place / name).write_text("years of work")
    for line in ("encode model texts.txt vectors --keep-text", "train recipe.yaml --output-dir run"):
        done = run(line, place)
        assert done.status == 0, done
    return place


@pytest.fixture
def place(world, tmp_path):
    """A copy of the world, to spoil."""
    return shutil.copytree(world, tmp_path / "world", symlinks=True)


def snapshot(place: Path) -> dict[str, object]:
    """What every file below ``place`` holds, by name."""

    def content(path: Path) -> object:
        if not path.is_file() or path.stat().st_size > 10**7 or not os.access(path, os.R_OK):
            return path.stat().st_mode, path.is_file() and path.stat().st_size
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return {str(path.relative_to(place)): content(path) for path in sorted(place.rglob("*"))}


# ------------------------------------------------------------------------------------------------ what goes wrong with models


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def absent(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def damaged_configuration(folder: Path) -> None:
    cut(folder / "config.json")


def damaged_weights(folder: Path) -> None:
    cut(folder / "model.safetensors")


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def absurd_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


class Bomb:
    """Unpickled, it writes a file into the folder of the command."""

    def __reduce__(self) -> tuple[object, ...]:
        return (open, ("exploded", "w"))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))  # written for every command to refuse unopened


def own_code(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text("open('exploded', 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "modeling_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    edit_json(folder / "config.json", model_type="evil", auto_map=classes)


def closed(path: Path) -> None:
    (path / "model.safetensors" if path.is_dir() else path).chmod(0)


def larger_than_memory(folder: Path) -> None:
    """Words for 200 MB, in a file that takes no space."""
    file = folder / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = json.loads(file.read_bytes()[8 : 8 + length]), file.read_bytes()[8 + length :]
    name = next(name for name in header if "word_embeddings" in name)
    width, words = header[name]["shape"][1], 200_000_000 // 4 // header[name]["shape"][1]
    header[name] |= {"shape": [words, width], "data_offsets": [len(data), len(data) + words * width * 4]}
    gap = 0
    tensors = sorted((entry for key, entry in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"])
    for entry in tensors:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entry["data_offsets"], gap = [gap, gap + size], gap + size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + gap)
    edit_json(folder / "config.json", vocab_size=words)


AGAIN = "save or download the model again"
PROBLEMS_OF_MODELS = {  # and what is said of each
    absent: "no model folder (model|bert) .*give a folder, or",
    a_file: "is a file; give the folder|no model folder (model|bert) .*give a folder",
    empty_folder: "holds no (config.json|model.safetensors)",
    damaged_configuration: f"config.json is damaged .*{AGAIN}",
    damaged_weights: AGAIN,
    empty_weights: AGAIN,
    absurd_header: AGAIN,
    only_a_pickle: "only as a pickle .*which can run code when it is opened; if you trust it, save it as safetensors first",
    own_code: "brings Python code of its own, .*(read that code, and if you trust it|start from a model whose class)",
    closed: "Permission denied: .*model.safetensors.*permissions",
    larger_than_memory: "not enough memory.*smaller",
}
MODELS = {  # commands that open a model, which is the folder model, or bert
    "train": "train recipe.yaml --output-dir out",
    "search": "search model --passages texts.txt cat",
    "search in vectors": "search vectors cat",
    "encode": "encode model texts.txt out",
    "evaluate": "evaluate model labels.csv",
    "predict": "predict model texts.txt --out out.jsonl",
    "plot attention": "plot attention model 'the cat sleeps' --out out.html",
    "plot embeddings": "plot embeddings model texts.txt --out out.html",
    "plot similarity": "plot similarity model texts.txt --out out.html",
    "plot tokens": "plot tokens model 'the cat sleeps'",
    "hub convert": "hub convert bert out",
    "hub export": "hub export model out",
    "hub export onnx": "hub export model out --to onnx",
    "hub push": "hub push model ann/model",
    "hub verify": "hub verify model",
}

# -------------------------------------------------------------------------------------------------- what goes wrong with data


def data_absent(place: Path) -> str:
    return "nothing.csv"


def data_no_table(place: Path) -> str:
    (place / "picture.png").write_bytes(b"\x89PNG\r\n")
    return "picture.png"


def data_empty(place: Path) -> str:
    (place / "empty.csv").write_bytes(b"")
    return "empty.csv"


def data_without_rows(place: Path) -> str:
    (place / "header.csv").write_text("text,label\n")
    return "header.csv"


def data_empty_folder(place: Path) -> str:
    (place / "folder").mkdir()
    return "folder"


def data_not_utf8(place: Path) -> str:
    (place / "latin.csv").write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    return "latin.csv"


def data_damaged(place: Path) -> str:
    (place / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    return "damaged.parquet"


def data_no_json(place: Path) -> str:
    (place / "torn.jsonl").write_text('{"text": "a cat", "label": 0}\n{"text": "a d')
    return "torn.jsonl"


def data_closed(place: Path) -> str:
    (place / "labels.csv").chmod(0)
    return "labels.csv"


def data_wrong_columns(place: Path) -> str:
    (place / "numbers.csv").write_text("one,two\n1,2\n3,4\n")
    return "numbers.csv"


PROBLEMS_OF_DATA = {
    data_absent: r"no file or folder nothing.csv \(looked from /.*world\)",
    data_no_table: "picture.png cannot be read: .png is none of .parquet, .jsonl",
    data_empty: "empty.csv is empty; give a file that holds data",
    data_without_rows: "header.csv has no rows; give a file (or split )?that holds data",
    data_empty_folder: "folder holds no data file; files of these kinds are read: .parquet",
    data_not_utf8: "latin.csv is not UTF-8: line 2 cannot be decoded. Convert the file",
    data_damaged: "damaged.parquet cannot be read as parquet: .*. Repair it, or save it again",
    data_no_json: "torn.jsonl cannot be read as jsonl: .*. Repair it, or save it again|Row 1 of torn.jsonl is no JSON .* mend it",
    data_closed: "Permission denied.*labels.csv.*Change its permissions",
    data_wrong_columns: "one, two.* (Give data with|[Nn]ame|rename)|name one",
}
DATA = {
    "train": "train recipe.yaml classify.data={} --output-dir out",
    "quickstart": "quickstart tokenizer.data={} --output-dir out --query cat",
    "search": "search model --passages {} cat",
    "search queries": "search vectors --queries {}",
    "encode": "encode model {} out",
    "evaluate": "evaluate model {}",
    "predict": "predict model {} --out out.jsonl",
    "plot embeddings": "plot embeddings model {} --out out.html",
    "plot similarity": "plot similarity model {} --out out.html",
}


# ------------------------------------------------------------------------------------------------ where results are to go

OVERRIDES = "tokenizer.data=texts.txt tokenizer.text_columns=[text] tokenizer.vocab_size=60 --query cat"
FOLDERS = {  # commands that write a folder
    "train": "train recipe.yaml --output-dir {}",
    "quickstart": f"quickstart {OVERRIDES} --output-dir {{}}",
    "encode": "encode model texts.txt {}",
    "hub convert": "hub convert bert {}",
    "hub export": "hub export model {}",
    "hub pull": "hub pull ann/model {}",
}
FILES = {  # and a file, after its suffix
    "predict": "predict model texts.txt --out {}.jsonl",
    "plot attention": "plot attention model 'the cat sleeps' --out {}.html",
    "plot embeddings": "plot embeddings model texts.txt --out {}.html",
    "plot similarity": "plot similarity model texts.txt --out {}.html",
    "plot tokens": "plot tokens model 'the cat sleeps' --out {}.html",
    "plot training": "plot training run --out {}.png",
}
PROBLEMS_OF_PLACES = {
    "thesis": "thesis.* (choose another|choose an empty or a new folder|name another)",
    "texts.txt/out": "texts.txt.*(Correct the path|Choose another|make it first)",
    "locked/out": "Permission denied.*([Cc]hoose another)",
    "full": "File too large.*(Choose a place that takes larger files|resume)",
}


# -------------------------------------------------------------------------------------------------- interrupted and killed

FORWARD = "minibert.modeling_minibert:MiniBertModel.forward"
MOMENTS = {  # a command, the function in which it is interrupted, the call of it, and what is said
    "train recipe.yaml --output-dir out": (FORWARD, 2, "Stopped at step 2 of 3.* To resume: minibert train recipe.yaml --out"),
    f"quickstart {OVERRIDES} --output-dir out": ("minibert.train.recipe:train_tokenizer", 1, "To resume: minibert quickstart"),
    "search model --passages texts.txt cat": (FORWARD, 1, "search again"),
    "search vectors cat": (FORWARD, 1, "search again"),
    "encode model texts.txt out --rows-per-shard 4": (f"{FORWARD}_packed", 2, "To resume: minibert encode model texts.txt out"),
    "evaluate model labels.csv": ("minibert.modeling_minibert:MiniBertForSequenceClassification.forward", 1, "Nothing was"),
    "predict model texts.txt --out out.jsonl": (
        "minibert.modeling_minibert:MiniBertForSequenceClassification.forward",
        1,
        "out.jsonl was not written",
    ),
    "plot attention model 'the cat' --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot embeddings model texts.txt --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot similarity model texts.txt --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot tokens model 'the cat' --out out.html": ("minibert.plot:tokens", 1, "Nothing was written"),
    "plot training run --out out.html": ("minibert.plot:training", 1, "Nothing was written"),
    "hub convert bert out": ("minibert.hub.parity:differences", 1, "Nothing was written"),
    "hub export model out": ("minibert.hub.parity:differences", 1, "Nothing was written"),
    "hub push model ann/other": ("minibert.hub.push:build", 1, "push again to complete it"),
    "hub pull ann/model out": ("minibert.hub.pull:check_paths", 1, "pull again to complete it"),
    "hub verify model": ("minibert.hub.verify:checks_of", 1, "Nothing was written"),
}


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="session")
def hub(world):
    """A server with the model as ann/model; call it in a child, to take it for the Hub."""
    with HubServer() as server:
        files = {file.name: file.read_bytes() for file in (world / "model").iterdir()}
        server.add_repo("ann/model", files)
        yield lambda home: server.patch(pytest.MonkeyPatch(), home)


@pytest.fixture
def run_in(place, hub):
    """Run a command in a copy of the world; those on ann/... find the server."""

    def run_in(line, *prepare, **how):
        server = [lambda: hub(place.parent / "home")] if "ann/" in line else []
        return run(line, place, *server, *prepare, **how)

    return run_in


# These say on standard error how far they are, or what they chose; then comes the sentence.
TALKING = ("train", "quickstart", "search vectors", "plot tokens", "hub push")


def check_refused(done: Done, line: str, words: str) -> None:
    """Exit status 2 after one sentence that holds ``words`` (a regular expression), and nothing on standard output."""
    assert done.status == 2, done
    assert "Traceback" not in done.err and done.err.count("Error:") == 1, done.err
    *before, sentence = done.err.splitlines()
    assert sentence.startswith("Error: ") and sentence.endswith((".", ")")), done.err
    assert not before or line.startswith(TALKING), done.err
    assert re.search(words, sentence), sentence
    assert done.out == ""


def check_kept(before: dict[str, object], place: Path, *new: str) -> None:
    """What was there is as it was, and what is new is below ``new``."""
    after = snapshot(place)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if not name.startswith(new)]


def fails_check(done: Done, words: str) -> None:
    """``hub verify`` reports what it finds on standard output, with exit status 1."""
    assert done.status == 1 and done.err == ""
    assert re.search(f"failed +(files|weights|tensors|code): .*({words})", done.out), done.out


# Where a command says something else, or what is wrong with the weights does not matter to it.
ELSE = {
    ("train", absent): "couldn't connect .*Check your internet connection",  # a name without slash can be a model of the Hub
    ("search in vectors", larger_than_memory): "changed since: encode again, or name the model as it was",
    **dict.fromkeys(
        [(f"hub {name}", absent) for name in ("convert", "export", "export onnx")],
        "no model folder (model|bert) .*To enable repo look-ups and downloads online, set",
    ),
    **dict.fromkeys([("hub push", problem) for problem in (absent, a_file)], "give the folder of a run, of a stage or of a"),
    ("hub push", own_code): "not a MiniBERT but evil; it does not need an export",
    ("hub convert", own_code): "is of the family evil, which cannot be converted. Convertible are bert",
    ("hub export", own_code): "not a MiniBERT but evil; it does not need an export",
    ("hub export onnx", own_code): "not a MiniBERT but evil; it does not need an export",
    ("hub verify", absent): "no model folder model .*give a folder, or owner/name",
    ("hub verify", empty_folder): "no config.json; of a run, name the folder of a stage",
    ("hub verify", only_a_pickle): "can run code when opened; .*delete them",
    ("hub verify", own_code): "code is not that of the installed minibert.*read it",
    ("hub verify", closed): "Permission denied",
    ("hub verify", larger_than_memory): "Cannot allocate memory",
}


@pytest.mark.parametrize("problem", PROBLEMS_OF_MODELS, ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("command", MODELS)
def test_a_model_that_is_not_right(run_in, place, command, problem):
    line, words = MODELS[command], ELSE.get((command, problem), PROBLEMS_OF_MODELS[problem])
    problem(place / ("bert" if command == "hub convert" else "model"))
    before = snapshot(place)
    done = run_in(line, *([little_memory] if problem is larger_than_memory else []))
    if command == "hub verify" and problem not in (absent, a_file, empty_folder):
        fails_check(done, words)
    elif command == "plot tokens" and problem not in (absent, a_file, empty_folder, damaged_configuration):
        assert (done.status, done.err) == (0, "")  # the tokenizer is all it opens
    else:
        check_refused(done, line, words)
    check_kept(before, place, "out")
    assert not (place / "out.html").exists() and not (place / "exploded").exists()


@pytest.mark.parametrize("problem", PROBLEMS_OF_DATA, ids=lambda problem: problem.__name__)
@pytest.mark.parametrize("command", DATA)
def test_data_that_are_not_right(run_in, place, command, problem):
    line = DATA[command].format(problem(place))
    before = snapshot(place)
    check_refused(run_in(line), line, PROBLEMS_OF_DATA[problem])
    check_kept(before, place, "out")
    assert not [file for file in place.glob("out*") if file.is_file()]


@pytest.mark.parametrize("problem", PROBLEMS_OF_PLACES)
@pytest.mark.parametrize("command", {**FOLDERS, **FILES})
def test_a_place_that_takes_nothing(run_in, place, command, problem):
    line = {**FOLDERS, **FILES}[command].format(problem)
    (place / "locked").mkdir(mode=0o555)
    before = snapshot(place)
    check_refused(run_in(line, *([full_disk] if problem == "full" else [])), line, PROBLEMS_OF_PLACES[problem])
    check_kept(before, place, "full")
    if problem == "full" and command != "train":  # which leaves what it had finished
        assert not [file for file in place.glob("*full*") if file.is_file()]


@pytest.mark.parametrize("line", MOMENTS)
def test_interrupted(run_in, place, line):
    function, call, words = MOMENTS[line]
    before = snapshot(place)
    done = run_in(line, at(function, signal.SIGINT, call))
    assert done.status == 130 and "Traceback" not in done.err, done
    assert re.search(words, done.err.splitlines()[-1]), done.err
    check_kept(before, place, "out", "vectors/index")
    if "To resume" not in words:
        assert not list(place.glob("*out*"))


# Seen to finish after a kill: all but those that take seconds, or write nothing.
KILLED = [line for line in MOMENTS if not line.startswith(("quickstart", "hub push", "hub verify"))]


@pytest.mark.parametrize("line", KILLED)
def test_killed_and_run_again(run_in, place, line):
    function, call, _ = MOMENTS[line]
    before = snapshot(place)
    assert run_in(line, at(function, signal.SIGKILL, call)).status == -signal.SIGKILL
    check_kept(before, place, "out", ".out", "vectors/index")
    assert not list(place.glob("out.*"))  # a file is whole or absent
    done = run_in(line)
    assert done.status == 0, done
    check_kept(before, place, "out", ".out", "vectors/index")


@pytest.mark.parametrize(
    "line",
    [
        "predict model texts.txt",
        "search vectors cat",
        "search model --passages texts.txt cat --json",
        "evaluate model labels.csv",
        "plot tokens model 'the cat'",
        "encode model texts.txt out",
        "hub convert bert out",
    ],
)
def test_nowhere_to_print_to(run_in, line):
    done = run_in(line, stdout="/dev/full")
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(f"Error: [Errno {errno.ENOSPC}] No space left on device. Free some space")


WRONG = [
    *("train nothing.yaml", "quickstart embed.nothing=3", "search nothing cat", "encode nothing texts.txt out"),
    *("evaluate model nothing.csv", "predict model nothing.csv", "plot attention a/b/c text --out out.html"),
    *("plot embeddings model nothing.csv --out out.html", "plot training nothing --out out.html"),
    *("plot similarity model nothing.csv --out out.html", "plot tokens a/b/c text", "hub convert a/b/c out"),
    *("hub export a/b/c out", "hub push a/b/c ann/model", "hub pull nothing out", "hub verify a/b/c"),
]


@pytest.mark.parametrize("line", WRONG)
def test_debug_shows_the_traceback(run_in, line):
    plain, debug = run_in(line), run_in(f"{line} --debug")
    check_refused(plain, line, "nothing|a/b/c")
    assert debug.status == 1 and "Traceback (most recent call last)" in debug.err


def test_every_command_is_in_the_matrix():
    def names(app, prefix=""):
        for info in app.registered_commands:
            yield f"{prefix}{info.name or info.callback.__name__}"
        for group in app.registered_groups:
            yield from names(group.typer_instance, f"{group.name} ")

    for lines in (WRONG, MOMENTS):
        assert not [name for name in names(cli.app) if not any(line.startswith(f"{name} ") for line in lines)]
