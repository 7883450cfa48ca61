"""Stop a command at every write, start it again, and compare what it leaves with a command that ran to its end.

A boundary is the moment before or after a call that changes files. Commands run in forks of a process that has imported
everything, so that each takes a fraction of a second. A fork that is stopped gets SIGKILL from itself.
"""

import builtins
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import faiss
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import HfApi
from pyarrow import parquet

import helpers
import minibert
from minibert.cli import app
from minibert.hub.convert import convert
from minibert.inference.load import embedder
from minibert.search import index
from minibert.search.encode_corpus import encode_corpus
from minibert.train.stages.distill import teacher

for area in ("data", "evaluation", "files", "hub", "inference", "search", "train"):  # once, and not in each fork
    for module in pkgutil.walk_packages([str(helpers.ROOT / area)], f"minibert.{area}."):
        importlib.import_module(module.name)

CALLS = (
    (os, ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")),
    (safetensors.torch, ("serialize_file",)),
    (parquet.ParquetWriter, ("write_table", "close")),
    (faiss, ("write_index",)),
    (HfApi, ("create_repo", "create_commit")),
)
TIMES = re.compile(r"second|time|date|state\.json")  # the manifest of a checkpoint has the size of state.json, which has times
RANDOM = re.compile(r"[0-9a-f]{8,}|tmp\w{8}|\.\w{8}(?=/|$)")


@dataclass
class Workflow:
    """Commands that run in an empty folder, in ``processes`` of which number ``victim`` is stopped."""

    commands: list[list[str]]
    copied: list[Path] = field(default_factory=list)  # into the folder before the first command
    processes: int = 1
    victim: int = 0
    hub: bool = False  # needs a server


class Boundaries:
    """Count the boundaries of this process, and kill it at boundary ``stop``.

    If ``folder`` is given, a boundary with the same files in this folder as at the one before is not counted again. What is
    written in a temporary folder does not count: the next start deletes it, whatever it holds.
    """

    def __init__(self, stop=0, folder=None):
        self.stop, self.folder, self.pid = stop, folder, os.getpid()
        self.names, self.files = [], None
        for place, names in CALLS:
            for name in names:
                setattr(place, name, self.counted(getattr(place, name), name))
        for place in (builtins, io):
            place.open = self.counted(place.open, "open", lambda path, mode="r", *_, **__: set(mode) & set("wax+"))

    def tick(self, name):
        if os.getpid() != self.pid:
            return
        earlier, self.files = self.files, self.folder and list_files(self.folder)
        if self.files is None or self.files != earlier or "create_" in name:
            self.names.append(name)
            if len(self.names) == self.stop:
                os.kill(self.pid, signal.SIGKILL)

    def counted(self, call, name, counts=lambda *_, **__: True):
        def counting(*args, **options):
            if not counts(*args, **options):
                return call(*args, **options)
            paths = [os.path.relpath(arg, self.folder) for arg in args if isinstance(arg, str | os.PathLike)]
            shown = " ".join([name, *(RANDOM.sub("*", path) for path in paths)])
            self.tick(f"before {shown}")
            result = call(*args, **options)
            self.tick(f"after {shown}")
            return result

        return counting


def run(workflow, folder, stop=0, server=None):
    """Run ``workflow`` in ``folder`` and return the exit statuses and the names of the victim's boundaries.

    With ``stop``, its victim is killed at this boundary, and then the other processes.
    """
    folder.mkdir(exist_ok=True)
    for path in workflow.copied:
        if not (folder / path.name).exists():
            shutil.copytree(path, folder / path.name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = folder.parent / "boundaries.json"
    for path in (names, folder.parent / "log"):
        path.unlink(missing_ok=True)

    def child(rank):
        log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        torch.set_num_threads(1)
        if workflow.processes > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workflow.processes, "LOCAL_WORLD_SIZE": workflow.processes}
            os.environ.update({name: str(value) for name, value in world.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
        if server:
            server.patch(pytest.MonkeyPatch(), folder.parent / "home")
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        tempfile.tempdir = str(folder.parent / "tmp")
        os.makedirs(tempfile.tempdir, exist_ok=True)
        index.EXACT_ROWS, teacher.ROWS_PER_FILE = 500, 16  # as large inputs do
        AcceleratorState._reset_state(reset_partial_state=True)
        boundaries = None
        if rank == workflow.victim:  # what other processes write would be counted as well
            boundaries = Boundaries(stop, folder if workflow.processes == 1 else None)
        for command in workflow.commands:
            if status := app(command, standalone_mode=False):
                sys.exit(status)
        if boundaries:
            found, boundaries.pid = json.dumps(boundaries.names), 0
            names.write_text(found)

    children = [multiprocessing.get_context("fork").Process(target=child, args=(n,)) for n in range(workflow.processes)]
    for process in children:
        process.start()
    children[workflow.victim].join(300)
    for process in children:
        if stop or children[workflow.victim].exitcode is None:
            process.kill()
        process.join()
    return [process.exitcode for process in children], json.loads(names.read_text()) if names.exists() else []


def list_files(folder):
    """Return the paths, sizes and times of change of all files in ``folder``, but not in temporary folders."""
    found = []
    for place, folders, names in os.walk(folder):
        found.append(place)
        if place.endswith(".part"):
            folders.clear()
            continue
        for name in names:
            about = os.stat(os.path.join(place, name))
            found.append((place, name, about.st_ino, about.st_size, about.st_mtime_ns))
    return found


class Survival:
    """A workflow in ``folder``: run it to its end, and then stopped at one boundary after another."""

    def __init__(self, workflow, folder, server=None):
        self.workflow, self.folder, self.server = workflow, folder, server
        folder.mkdir(parents=True, exist_ok=True)
        self.boundaries = self.complete(folder / "run")
        self.whole = read_tree(folder / "run")
        shutil.rmtree(folder / "run")

    def complete(self, folder):
        statuses, names = run(self.workflow, folder, server=self.server)
        if any(statuses):
            said = (self.folder / "log").read_text()
            if "is not empty; choose another" not in said:  # the refusal of a result that is complete
                raise ChildProcessError(f"status {statuses}: {said[-300:]}")
        if self.server:
            add_hub_files(self.server, folder)
        return names

    def stopped_at(self, boundary):
        """Return what is different, and what is left over, after a kill at ``boundary`` (from 1) and another start."""
        target = self.folder / "run"
        if self.server:
            self.server.repos.clear()
        try:
            statuses, _ = run(self.workflow, target, stop=boundary, server=self.server)
            # Of two processes, one may find a folder that the other has made, and reach fewer boundaries.
            if statuses[self.workflow.victim] != -signal.SIGKILL and self.workflow.processes == 1:
                raise ChildProcessError(f"not killed, status {statuses}")
            self.complete(target)
            return compare(self.whole, read_tree(target))
        except ChildProcessError as error:
            return [str(error)], []
        finally:
            shutil.rmtree(target)


def add_hub_files(server, folder):
    """Write the files that were pushed to ``server`` into ``folder``."""
    for name, data in server.files("ann/model").items():
        (file := folder / "hub" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def compare(whole, found):
    """Return the files that are different from those of ``whole`` or missing, and the files that are left over."""
    different = [name for name in whole if name not in found or found[name] != whole[name]]
    return different, sorted(found.keys() - whole.keys())


def read_tree(folder):
    """Return the content of each file in ``folder``, without times."""
    return {path.relative_to(folder).as_posix(): read(path) for path in sorted(folder.rglob("*"))}


def read(path):
    if path.is_dir():
        return None
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text(encoding="utf-8")
        with contextlib.suppress(ValueError):  # a file that was left over may end anywhere
            return [without_times(json.loads(part)) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # names of tied weights stand in the header in any order
        with contextlib.suppress(ValueError):
            length = int.from_bytes(content[:8], "little")
            return [json.loads(content[8 : 8 + length]), content[8 + length :]]
    return content


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if not TIMES.search(key)}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def make_inputs(folder, scale=1):
    """Write texts of made-up words in every form that a stage reads, and models to start from, ``scale`` times tiny."""
    generator = np.random.default_rng(0)
    words = [first + second + third for first in "bdfgk" for second in "aei" for third in "lmnrt"]
    rows = [{"text": " ".join(generator.choice(words, generator.integers(3, 12))) + "."} for _ in range(40 * scale)]
    for number, row in enumerate(rows):
        text, other = row["text"], rows[number - 1]["text"].rstrip(".")
        first, last = text.split()[0], text.rstrip(".").split()[-1]
        row["label"] = "much" if first < "f" else "little"
        row |= {"tokens": text.split(), "ner_tags": ["B-PER" if word < "d" else "O" for word in text.split()]}
        row |= {
            "question": f"{first} {last}",
            "context": text,
            "answers": {"text": [last], "answer_start": [text.rindex(last)]},
        }
        row |= {"query": f"{last} {first}", "answer": text}
        row |= {"choices": [text, other] if number % 2 else [other, text], "right": int(not number % 2)}
    for name, columns in COLUMNS.items():
        helpers.write_rows(folder / f"{name}.jsonl", ({column: row[column] for column in columns} for row in rows))
    helpers.write_rows(
        folder / "corpus.jsonl", ({"text": " ".join(row["text"] for row in rows[at : at + 4])} for at in range(0, len(rows), 4))
    )
    tokenizer = minibert.train_wordpiece([row["text"] for row in rows], vocab_size=100, model_max_length=32)
    tokenizer.save_pretrained(folder / "tokenizer")
    labels = {"id2label": {0: "little", 1: "much"}}
    helpers.save_model(folder / "classifier", tokenizer, "ForSequenceClassification", "bert-base", **labels)
    start = minibert.MiniBertModel(
        minibert.MiniBertConfig.preset("search-8x768", **{**helpers.TINY, "vocab_size": len(tokenizer)})
    )
    helpers.add_noise(start, 1.0)  # so that its vectors differ
    embedder(start, tokenizer, folder / ".start", "mean", True).save_pretrained(str(folder / "model"), create_model_card=False)
    helpers.save_family(folder / "bert")
    convert(folder / "bert", folder / "converted")
    many = [row["text"] for row in rows] * (15 if scale == 1 else 52_000 // len(rows))
    helpers.write_rows(folder / "many.jsonl", ({"text": text} for text in many))
    encode_corpus(folder / "model", folder / "many.jsonl", folder / "vectors", rows_per_shard=len(many) // 3, keep_text=True)


COLUMNS = {
    "texts": ["text"],
    "labels": ["text", "label"],
    "tags": ["tokens", "ner_tags"],
    "questions": ["question", "context", "answers"],
    "choices": ["question", "choices", "right"],
    "pairs": ["query", "answer"],
}


def workflows(inputs, scale=1, **changes):
    """Return every workflow on the inputs in a folder. Recipes train for ``scale`` times a few steps, with ``changes``."""

    def recipe(name, *stages):
        text = yaml.safe_dump({"name": name, "stages": list(stages)}, sort_keys=False)
        (inputs / f"{name}.yaml").write_text(text)
        return Workflow([["train", str(inputs / f"{name}.yaml"), "--output-dir", "out"]])

    def stage(kind, data, **fields):
        steps = {"max_steps": 3 * scale, "save_steps": 2, "log_steps": 1, "batch_size": 4, "learning_rate": 1e-2}
        model = {} if "student_layers" in fields else {"model": NEW, "tokenizer": str(inputs / "tokenizer")}
        data = {"data": str(inputs / f"{data}.jsonl"), "eval_data": str(inputs / f"{data}.jsonl"), "eval_steps": 1}
        return {"kind": kind, **data, **model, **steps, "dropout": 0.1, "save_total_limit": 1, **changes, **fields}

    tokenized = {"cache_dir": "corpus", "preprocessing_num_workers": 1, "next_sentence": True}
    halves = [{"share": 1, "max_length": 16}, {"share": 1, "max_length": 32, "batch_size": 2}]
    vectors = ["encode", str(inputs / "model"), str(inputs / "texts.jsonl"), "vectors", "--rows-per-shard", str(15 * scale)]
    vectors += ["--dtype", "float32"]
    tokenizer = {"kind": "tokenizer", "data": str(inputs / "texts.jsonl"), "vocab_size": 80}
    taught = {"teacher": str(inputs / "classifier"), "student_layers": 1, "objective": "task"}
    embedded = {"teacher": str(inputs / "model"), "student_layers": 1, "objective": "embedding", "eval_data": None}
    evaluated = {"kind": "evaluate", "model": str(inputs / "model"), "data": str(inputs / "pairs.jsonl"), "limit": 20}
    return {
        "tokenizer": recipe("tokenizer", tokenizer),
        "token cache": recipe("cache", stage("pretrain", "corpus", **tokenized, max_steps=1, eval_data=None)),
        "pretrain": recipe("pretrain", stage("pretrain", "corpus", **tokenized, phases=halves, gradient_accumulation_steps=2)),
        "classify": recipe("classify", stage("classify", "labels")),
        "tag": recipe("tag", stage("tag", "tags")),
        "answer": recipe("answer", stage("answer", "questions")),
        "choose": recipe("choose", stage("choose", "choices", label_column="right")),
        "embed": recipe("embed", stage("embed", "pairs", hard_negatives=1, model=str(inputs / "model"), tokenizer=None)),
        "distill, task": recipe("distill_task", stage("distill", "labels", **taught)),
        "distill, embedding": recipe("distill_embedding", stage("distill", "texts", **embedded)),
        "evaluate": recipe("evaluate", evaluated),
        "encode": Workflow([vectors]),
        "encode, first of two": Workflow([vectors], processes=2),
        "encode, second of two": Workflow([vectors], processes=2, victim=1),
        "index": Workflow([["search", "vectors", "bal bel", "--hybrid"]], copied=[inputs / "vectors"]),
        "push": Workflow([["hub", "push", str(inputs / "model"), "ann/model", "--license", "mit"]], hub=True),
        "convert": Workflow([["hub", "convert", str(inputs / "bert"), "out"]]),
        "export": Workflow([["hub", "export", str(inputs / "converted"), "out"]]),
    }


NEW = {"preset": "bert-base", **{name: value for name, value in helpers.TINY.items() if name != "vocab_size"}}
