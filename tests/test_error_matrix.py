"""Test what the commands do when something goes wrong: exit status, one sentence with a next step, nothing overwritten.

Each command meets a problem with its model, its data and its output once, and each problem occurs once or more. Each command
runs in a child process, forked from this process because the modules that it needs are imported here already. The child gives
up the capabilities of root, so that file permissions hold.
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

# Import here, once, the modules that the commands import when they run.
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
    """Run ``minibert LINE`` in the folder ``place`` in a child that first calls ``prepare``; ``stdout`` names another file."""
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
    """Run the command and return the exit status of the interpreter."""
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
    """Drop the capabilities of root, so that the permissions of its own files hold."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def at(target: str, number: int, call: int = 1) -> Callable[[], None]:
    """Return a step that makes the child signal itself at the n-th ``call`` of the function ``target`` (module:name)."""

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
    """Limit files to :data:`LIMIT` bytes; writing more fails as on a full disk, with another error number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))


def closed_streams() -> None:
    """Close standard input, output and error, as ``<&- >&- 2>&-`` does."""
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None


def little_memory() -> None:
    """Limit the process to 100 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 100_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# ----------------------------------------------------------------------------------------------------------- the world


def recipe(**more):
    stage = {"kind": "classify", "data": "labels.csv", "model": "model", "max_steps": 3, "max_length": 8, "batch_size": 4}
    return json.dumps({"name": "toy", "stages": [{**stage, **more}]})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Make a folder with a model, a BERT, texts, vectors and a run, by the commands themselves."""
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
    """Copy the world, for one test to damage."""
    return shutil.copytree(world, tmp_path / "world", symlinks=True)


def snapshot(place: Path) -> dict[str, object]:
    """Return a digest of every file below ``place``, by name."""

    def content(path: Path) -> object:
        if not path.is_file() or path.stat().st_size > 10**7 or not os.access(path, os.R_OK):
            return path.lstat().st_mode, path.is_file() and path.stat().st_size
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
MODELS = [  # a command that opens the model (or bert), the problem, and words of the sentence
    ("train recipe.yaml --output-dir out", damaged_weights, AGAIN),
    ("search model --passages texts.txt cat", absent, "no model folder model .*the Hub did not send"),
    ("search vectors cat", empty_weights, AGAIN),
    ("encode model texts.txt out", only_a_pickle, "only as a pickle .*if you trust it, save it as safetensors first"),
    ("encode model texts.txt out", larger_than_memory, "not enough memory.*smaller"),
    ("evaluate model labels.csv", own_code, "contains its own Python code, .*Training never runs it"),
    ("predict model texts.txt --out out.jsonl", closed, "Permission denied: .*model.safetensors.*permissions"),
    ("plot attention model 'the cat sleeps' --out out.html", larger_than_memory, "not enough memory.*smaller"),
    ("plot embeddings model texts.txt --out out.html", absurd_header, AGAIN),
    ("plot similarity model texts.txt --out out.html", empty_folder, "contains no (config.json|model.safetensors)"),
    ("plot tokens model 'the cat sleeps'", damaged_configuration, f"config.json is damaged .*{AGAIN}"),
    ("hub convert bert out", a_file, "is a file; give the folder|no model folder bert .*give a folder"),
    ("hub convert bert out", own_code, "is of the family evil, which cannot be converted"),
    ("hub export model out", damaged_weights, AGAIN),
    ("hub export model out --to onnx", absent, "no model folder model "),
    ("hub push model ann/model", own_code, "is a evil model; only a MiniBERT can be exported"),
    ("hub verify model", absent, "no model folder model .*give the folder of a model, or owner/name"),
    ("hub verify model", only_a_pickle, "can run code when opened; .*delete these files"),
    ("hub verify model", own_code, "code differs from the installed minibert.*read the code"),
]

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


DATA = [  # a command that reads data, the problem, and words of the sentence
    ("train recipe.yaml classify.data={} --output-dir out", data_wrong_columns, "one, two.* (Give data with|[Nn]ame|rename)"),
    (
        "quickstart tokenizer.data={} --output-dir out --query cat",
        data_empty_folder,
        "folder contains no data file; .*.parquet",
    ),
    ("search model --passages {} cat", data_not_utf8, "latin.csv is not UTF-8: line 2 cannot be decoded. Convert the file"),
    ("search vectors --queries {}", data_empty, "empty.csv is empty; give a file that holds data"),
    ("encode model {} out", data_no_json, "Row 1 of torn.jsonl is not a JSON "),
    ("encode model {} out", data_damaged, "damaged.parquet cannot be read as parquet: .*. Repair it, or save it again"),
    ("evaluate model {}", data_without_rows, "header.csv has no rows; give a file (or split )?that holds data"),
    (
        "predict model {} --out out.jsonl",
        data_no_json,
        r"torn.jsonl: row . is not a JSON object .* Correct it or remove the row",
    ),
    (
        "plot embeddings model {} --out out.html",
        data_no_table,
        "picture.png cannot be read: .png is not one of .parquet, .jsonl",
    ),
    ("plot similarity model {} --out out.html", data_closed, "Permission denied.*labels.csv.*Change its permissions"),
    ("evaluate model {}", data_absent, r"no file or folder nothing.csv \(looked from /.*world\)"),
]


# ------------------------------------------------------------------------------------------------ where results are to go

OVERRIDES = "tokenizer.data=texts.txt tokenizer.text_columns=[text] tokenizer.vocab_size=60 --query cat"
PLACES = {  # a command that writes to a place that takes nothing, and words of the sentence
    "train recipe.yaml --output-dir full": "File too large.*Use a disk that allows larger files",
    f"quickstart {OVERRIDES} --output-dir texts.txt/out": "texts.txt.*([Cc]hoose another|create it first)",
    "encode model texts.txt thesis": "thesis.* use an empty or new folder",
    "hub convert bert locked/out": "Permission denied.*([Cc]hoose another)",
    "hub export model full": "File too large.*Use a disk that allows larger files",
    "hub convert bert nowhere": "nowhere is a link to nothing.*choose another",
    "encode model texts.txt nowhere": "nowhere.*a link to nothing.*choose another",
    "hub pull ann/model full": "File too large.*Use a disk that allows larger files",
    "hub pull ann/model locked/out": "Permission denied.*([Cc]hoose another)",
    "hub pull ann/model thesis": "thesis.* (choose another|choose an empty or a new folder|name another)",
    "predict model texts.txt --out full.jsonl": "File too large.*Use a disk that allows larger files",
    "plot attention model 'the cat sleeps' --out thesis.html": "thesis.* (choose another|name another)",
    "plot embeddings model texts.txt --out locked/out.html": "Permission denied.*([Cc]hoose another)",
    "plot similarity model texts.txt --out texts.txt/out.html": "texts.txt.*([Cc]hoose another|create it first)",
    "plot training run --out thesis.png": "thesis.* (choose another|name another)",
}


# -------------------------------------------------------------------------------------------------- interrupted and killed

FORWARD = "minibert.modeling_minibert:MiniBertModel.forward"
MOMENTS = {  # a command, the function in which it is interrupted, the call of it, and what is said
    "train recipe.yaml --output-dir out": (FORWARD, 2, "Stopped at step 2 of 3.* To resume: minibert train recipe.yaml --out"),
    f"quickstart {OVERRIDES} --output-dir out": (
        "minibert.train.stages.tokenizer:train_tokenizer",
        1,
        "To resume: minibert quickstart",
    ),
    "search model --passages texts.txt cat": ("minibert.inference.encode:Encoder.encode_query", 1, "search again"),
    "search vectors cat": ("minibert.inference.encode:Encoder.encode_query", 1, "search again"),
    "encode model texts.txt out --rows-per-shard 4": (f"{FORWARD}_packed", 2, "To resume: minibert encode model texts.txt out"),
    "evaluate model labels.csv": ("minibert.modeling_minibert:MiniBertForSequenceClassification.forward", 1, "Nothing was"),
    "predict model texts.txt --out out.jsonl": (
        "minibert.modeling_minibert:MiniBertForSequenceClassification.forward",
        1,
        "--out was not written",
    ),
    "plot attention model 'the cat' --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot embeddings model texts.txt --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot similarity model texts.txt --out out.html": (FORWARD, 1, "Nothing was written"),
    "plot tokens model 'the cat'": ("minibert.plot:tokens", 1, "Nothing was written"),
    "plot training run --out out.html": ("minibert.plot:training", 1, "Nothing was written"),
    "hub convert bert out": ("minibert.hub.parity:differences", 1, "Nothing was written"),
    "hub export model out": ("minibert.hub.parity:differences", 1, "Nothing was written"),
    "hub push model ann/other": ("minibert.hub.push:build", 1, "push again to complete it"),
    "hub pull ann/model out": ("minibert.hub.pull:check_model", 1, "pull again to complete it"),
    "hub verify model": ("minibert.hub.verify:checks_of", 1, "Nothing was written"),
}


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="session")
def hub(world):
    """Serve the model as ann/model; a child that calls the fixture's value takes the server for the Hub."""
    with HubServer() as server:
        files = {file.name: file.read_bytes() for file in (world / "model").iterdir()}
        server.add_repo("ann/model", files)
        yield lambda home: server.patch(pytest.MonkeyPatch(), home)


@pytest.fixture
def run_in(place, hub):
    """Return a function that runs a command in a copy of the world; commands on ann/... find the server."""

    def run_in(line, *prepare, **how):
        server = [lambda: hub(place.parent / "home")] if "ann/" in line else []
        return run(line, place, *server, *prepare, **how)

    return run_in


# These print their progress or their choices on standard error before the sentence.
TALKING = ("train", "quickstart", "search vectors", "plot tokens", "hub push")


def check_refused(done: Done, line: str, words: str) -> None:
    """Expect exit status 2, one sentence that holds ``words`` (a regular expression), and nothing on standard output."""
    assert done.status == 2, done
    assert "Traceback" not in done.err and done.err.count("Error:") == 1, done.err
    *before, sentence = done.err.splitlines()
    assert sentence.startswith("Error: ") and sentence.endswith((".", ")")), done.err
    assert not before or line.startswith(TALKING), done.err
    assert re.search(words, sentence), sentence
    assert done.out == ""


def check_kept(before: dict[str, object], place: Path, *new: str) -> None:
    """Expect what was there unchanged, and new files only below ``new``."""
    after = snapshot(place)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if not name.startswith(new)]


def fails_check(done: Done, words: str) -> None:
    """Expect a failed check on standard output and exit status 1, as ``hub verify`` reports them."""
    assert done.status == 1 and done.err == ""
    assert re.search(f"failed +(files|weights|tensors|code): .*({words})", done.out), done.out


@pytest.mark.parametrize(("line", "problem", "words"), MODELS)
def test_a_model_that_cannot_be_opened(run_in, place, line, problem, words):
    problem(place / ("bert" if line.startswith("hub convert") else "model"))
    before = snapshot(place)
    done = run_in(line, *([little_memory] if problem is larger_than_memory else []))
    if line.startswith("hub verify") and problem is not absent:
        fails_check(done, words)
    else:
        check_refused(done, line, words)
    check_kept(before, place, "out")
    assert not (place / "out.html").exists() and not (place / "exploded").exists()


@pytest.mark.parametrize(("line", "problem", "words"), DATA)
def test_data_that_cannot_be_read(run_in, place, line, problem, words):
    line = line.format(problem(place))
    before = snapshot(place)
    check_refused(run_in(line), line, words)
    check_kept(before, place, "out")
    assert not [file for file in place.glob("out*") if file.is_file()]


@pytest.mark.parametrize("line", PLACES)
def test_a_place_that_takes_nothing(run_in, place, line):
    (place / "locked").mkdir(mode=0o555)
    (place / "nowhere").symlink_to("deleted")
    before = snapshot(place)
    check_refused(run_in(line, *([full_disk] if "full" in line else [])), line, PLACES[line])
    check_kept(before, place, "full")
    if not line.startswith("train"):  # train leaves the stages that it had finished
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


# One command for each way of writing: checkpoints, shards, an index, a file, a folder.
@pytest.mark.parametrize("line", [line for line in MOMENTS if re.match("train|encode|search v|predict|hub convert", line)])
def test_killed_and_run_again(run_in, place, line):
    function, call, _ = MOMENTS[line]
    before = snapshot(place)
    assert run_in(line, at(function, signal.SIGKILL, call)).status == -signal.SIGKILL
    check_kept(before, place, "out", ".out", "vectors/index")
    assert not list(place.glob("out.*"))  # a file is complete or absent
    done = run_in(line)
    assert done.status == 0, done
    check_kept(before, place, "out", ".out", "vectors/index")


@pytest.mark.parametrize("line", ["predict model texts.txt", "search vectors cat", "encode model texts.txt out"])
def test_nowhere_to_print_to(run_in, line):
    done = run_in(line, stdout="/dev/full")
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(f"Error: [Errno {errno.ENOSPC}] No space left on device. Free some space")


@pytest.mark.parametrize("line", ["search vectors", "predict model -", "predict model texts.txt", "encode model texts.txt out"])
def test_closed_streams(run_in, line):
    assert run_in(line, closed_streams).status == 0


@pytest.mark.parametrize("line", ["plot tokens model caf\udce9", "plot attention model caf\udce9 --out out.html"])
def test_a_text_that_is_not_utf8(run_in, line):
    check_refused(run_in(line), "plot tokens", "A text is not UTF-8; convert it")


def test_a_full_disk_that_a_library_hides_is_named():
    """A library that could not write fails again while it closes the file."""
    with pytest.raises(ValueError) as hidden:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise ValueError("I/O operation on closed file")
    assert re.fullmatch(".*No space left on device. Free some space, or .* TMPDIR .*", cli._sentence(hidden.value, ""))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1000, 8000, 60_000])
@pytest.mark.parametrize("line", [line for line in MOMENTS if re.match("train|encode|search v|predict|hub convert", line)])
def test_after_a_full_disk_the_same_command_finishes(run_in, place, line, limit):
    """Wherever the disk was full, nothing is lost, nothing is left, and the result is that of an undisturbed command."""
    before = snapshot(place)

    def result():
        found = {name: digest for name, digest in snapshot(place).items() if name not in before}
        for path in (place / "out", place / "out.jsonl", place / "vectors/index"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return {
            name: digest
            for name, digest in found.items()
            if not re.search("(log|metrics|state|environment|step-[0-9]+.manifest)[.]json", name)
        }

    done = run_in(line, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    if done.status:
        check_refused(done, line, "raise the limit|Free some disk space")
        check_kept(before, place, "out", "vectors/index")
        done = run_in(line)
    assert done.status == 0 and not list(place.rglob(".*.part"))
    resumed = result()
    assert run_in(line).status == 0
    assert result() == resumed


@pytest.mark.parametrize("line", ["search nothing cat", "plot tokens a/b/c text", "hub verify a/b/c"])
def test_debug_shows_the_traceback(run_in, line):
    done = run_in(f"{line} --debug")
    assert done.status == 1 and "Traceback (most recent call last)" in done.err


def test_every_command_is_interrupted():
    def names(app, prefix=""):
        for info in app.registered_commands:
            yield f"{prefix}{info.name or info.callback.__name__}"
        for group in app.registered_groups:
            yield from names(group.typer_instance, f"{group.name} ")

    assert not [name for name in names(cli.app) if not any(line.startswith(f"{name} ") for line in MOMENTS)]
