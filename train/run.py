"""Run the stages of a recipe in order: skip the finished ones and resume the interrupted one."""

import contextlib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from pydantic import BaseModel, ValidationError
from transformers import CONFIG_MAPPING

import minibert
from minibert.files import disk
from minibert.files.model_folder import check_model
from minibert.train import checkpoint
from minibert.train.arguments import DistillStage, EvaluateStage, LoopArguments, ModelStage, NewModel, Recipe, TokenizerStage
from minibert.train.environment import describe
from minibert.train.loop import check_precision
from minibert.train.recipe import KINDS
from minibert.train.stage import StageContext

logger = logging.getLogger(__name__)

# Fields that change how a stage runs but not what comes out: they may differ when a run is resumed.
_FREE_FIELDS = {
    "eval_batch_size",
    "log_steps",
    "num_workers",
    "save_steps",
    "save_total_limit",
    "trackers",
    "preprocessing_num_workers",
    "cache_dir",
    "max_skipped_steps",
}
# How long processes wait for the one that trains a tokenizer or evaluates; the libraries' ten minutes are too short.
_PATIENCE = timedelta(hours=12)


def run_recipe(recipe: Recipe, *, output_dir: str | Path | None = None, resume: bool = True, force: bool = False) -> Path:
    """Run the stages of ``recipe`` in order. Under torchrun every process calls this.

    Args:
        output_dir: folder of the run; the default is the recipe's own, else ``runs/<name>``.
        resume: continue an interrupted stage at its last checkpoint; ``False`` starts that stage over.
        force: run stages whose arguments changed since an earlier run, and those after them, again. Results that were
            finished lie in ``N-name.replaced`` until the run is finished.

    Returns:
        The folder of the run, with ``recipe.yaml`` and one folder per stage.

    Raises:
        ValueError: when the folder holds something else, or a run with other arguments and not ``force``.
    """
    minibert.register()
    # Without ``cpu``, Accelerate takes torchrun's processes on a machine without accelerator for unrelated ones.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    run_dir = Path(output_dir or recipe.output_dir or Path("runs") / recipe.name).expanduser()
    _check_models(recipe)
    for stage in recipe.stages:  # a missing package is better known before the first stage trains
        importlib.import_module(KINDS[stage.kind][1])
    if state.is_main_process:
        _open_run(run_dir, recipe, force)
    state.wait_for_everyone()
    model = tokenizer = None
    folders: dict[str, str] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        folder = _stage_folder(run_dir, number, stage.name)
        if isinstance(stage, TokenizerStage):
            tokenizer = str(folder)
            context = StageContext(folder, recipe.seed)
        else:
            context = _resolve(stage, folder, recipe.seed, model, tokenizer, folders)
        if state.is_main_process:
            done = "finished earlier, skipped" if (folder / "stage.json").exists() else str(folder)
            logger.info("Stage %d of %d, %s: %s", number, len(recipe.stages), stage.name, done)
        if not (folder / "stage.json").exists():
            _run_stage(stage, context, state, resume=resume)
        folders[stage.name] = str(folder)
        if not isinstance(stage, TokenizerStage | EvaluateStage):
            model = str(folder)
    if state.is_main_process:
        for folder in run_dir.glob("[0-9]*-*.replaced"):
            shutil.rmtree(folder, ignore_errors=True)
    return run_dir


def _resolve(
    stage: ModelStage, folder: Path, seed: int, model: str | None, tokenizer: str | None, folders: dict[str, str]
) -> StageContext:
    named = getattr(stage, "seed", None)
    seed = seed if named is None else named
    start = _named_model(stage.model, folders) if isinstance(stage.model, str) else model
    if isinstance(stage.model, NewModel):
        start = None
    teacher = _named_model(stage.teacher, folders) if isinstance(stage, DistillStage) else None
    if isinstance(stage, DistillStage) and stage.student_layers:
        start = teacher
    own = _named_model(stage.tokenizer, folders) if stage.tokenizer else None
    return StageContext(folder, seed, start, own or (tokenizer or teacher if start is None else start), teacher)


def _named_model(name: str, folders: dict[str, str]) -> str:
    """The folder of the earlier stage ``name``; a folder or an id on the Hub stays."""
    return folders.get(name) or os.path.expanduser(name)


def _check_models(recipe: Recipe) -> None:
    """Look at the models and tokenizers that stages name, before anything is written or downloaded.

    Raises:
        FileNotFoundError, NotADirectoryError: for what is neither a folder nor can be an id on the Hub.
        ValueError: for a folder whose weights are damaged or pickled, or that brings code of its own.
    """
    names = {stage.name for stage in recipe.stages}
    kinds = {"model": "model", "teacher": "model", "tokenizer": "tokenizer"}
    asked = ((kind, getattr(stage, field, None)) for stage in recipe.stages for field, kind in kinds.items())
    for kind, name in dict.fromkeys((kind, name) for kind, name in asked if isinstance(name, str) and name not in names):
        folder = Path(name).expanduser()
        if folder.is_dir():
            if kind == "model":
                check_model(folder)
            _check_code(folder)
        elif folder.exists():
            raise NotADirectoryError(
                f"{name} is a file; give the folder of a {kind}, or the id (owner/name) of one on the Hub."
            )
        elif name.count("/") > 1 or name.startswith(("/", ".", "~")) or ("/" in name and folder.parent.is_dir()):
            raise FileNotFoundError(
                f"There is no {kind} folder {name} (looked from {Path.cwd()}); give a folder, the id (owner/name) of a {kind} "
                "on the Hub, or the name of an earlier stage."
            )


def _check_code(folder: Path) -> None:
    if not (folder / "config.json").exists():  # what is missing is said where it is read
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error}); save or download the model again.") from error
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder} brings Python code of its own, which training never runs; start from a model whose class transformers "
            "or this package has."
        )


def _run_stage(stage: Any, context: StageContext, state: Any, *, resume: bool) -> None:
    _, module, function, alone = KINDS[stage.kind]
    state.wait_for_everyone()  # nobody starts before everybody saw that the stage is not finished
    if state.is_main_process:
        if not resume:
            shutil.rmtree(context.output_dir, ignore_errors=True)
        context.output_dir.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    if state.is_main_process or not alone:
        try:
            metrics = getattr(importlib.import_module(module), function)(stage, context)
        except BaseException:
            with contextlib.suppress(OSError):  # of a stage that left nothing every argument may still change
                context.output_dir.rmdir()
            raise
    state.wait_for_everyone()
    if state.is_main_process:
        _write(context.output_dir / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False))
        found = describe(stage, context, processes=1 if alone else state.num_processes)
        _write(context.output_dir / "environment.json", json.dumps(found, indent=2, ensure_ascii=False))
        # Written last: a folder with this file is a finished stage.
        _write(context.output_dir / "stage.json", json.dumps(_dump(stage), indent=2, ensure_ascii=False))
    state.wait_for_everyone()


def _open_run(run_dir: Path, recipe: Recipe, force: bool) -> None:
    """Create the folder of a run, or check that what is there is this run and clear away what ``force`` gives up."""
    record = run_dir / "recipe.yaml"
    earlier: list[dict[str, Any]] = []
    changes: list[tuple[int, str]] = []
    if record.exists():
        old = _read_record(record)
        if old["name"] != recipe.name:
            raise ValueError(f"{run_dir} holds a run of the recipe {old['name']!r}; choose another --output-dir.")
        earlier, changes = old["stages"], list(_changes(old, recipe, run_dir))
        if changes and not force:
            raise ValueError(
                f"{run_dir} holds a run with other arguments: {'; '.join(text for _, text in changes)}. Choose another "
                f"--output-dir, or run stage {changes[0][0]} and those after it again with --force (replaces their folders)."
            )
    elif run_dir.exists() and (not run_dir.is_dir() or any(path.name != "recipe.yaml.part" for path in run_dir.iterdir())):
        raise ValueError(f"{run_dir} exists and is not a run of a recipe; choose another --output-dir.")
    again = changes[0][0] if changes else len(recipe.stages) + 1  # the first stage whose result is given up
    for number, stage in enumerate(recipe.stages, start=1):
        finished = number < again and (_stage_folder(run_dir, number, stage.name) / "stage.json").exists()
        if isinstance(stage, LoopArguments) and not finished:
            check_precision(stage)
    given_up = [_stage_folder(run_dir, n, stage["name"]) for n, stage in enumerate(earlier, start=1) if n >= again]
    with contextlib.ExitStack() as locks:
        for folder in given_up:
            if folder.exists():
                locks.enter_context(checkpoint.exclusive_lock(folder))  # refuses while another run trains there
        for folder in given_up:
            _set_aside(folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    whole = {"name": recipe.name, "seed": recipe.seed, "stages": [_dump(stage) for stage in recipe.stages]}
    _write(record, disk.to_yaml(whole))


def _set_aside(folder: Path) -> None:
    """Make room for another result of a stage: a finished one is kept until the new run is finished."""
    if (folder / "stage.json").exists():
        replaced = folder.with_name(f"{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _changes(old: dict[str, Any], recipe: Recipe, run_dir: Path) -> Iterator[tuple[int, str]]:
    """Number of the stage and a description, for every change to a stage that was already started."""
    for number, before in enumerate(old["stages"], start=1):
        if not _stage_folder(run_dir, number, before["name"]).exists():
            continue
        where = f"stage {number} ({before['name']})"
        if number > len(recipe.stages):
            yield number, f"{where} is no longer there"
            continue
        stage = recipe.stages[number - 1]
        before, after = _in_todays_fields(before, stage), _dump(stage)
        if (before["kind"], before["name"]) != (after["kind"], after["name"]):
            yield number, f"{where} is now {after['name']} (kind {after['kind']})"
            continue
        if "seed" in after:
            before = {**before, "seed": old["seed"] if before.get("seed") is None else before["seed"]}
            after = {**after, "seed": recipe.seed if after["seed"] is None else after["seed"]}
        for name in sorted((before.keys() | after.keys()) - _FREE_FIELDS):
            if before.get(name) != after.get(name):
                yield number, f"{where} {name} was {before.get(name)!r} and is {after.get(name)!r}"


def _in_todays_fields(before: dict[str, Any], stage: BaseModel) -> dict[str, Any]:
    """The arguments of an earlier run, where a field that this version added was at its default."""
    try:
        return _dump(type(stage).model_validate(before))
    except ValidationError:  # of another kind, or with what is no longer accepted
        return {name: field.default for name, field in type(stage).model_fields.items()} | before


def _dump(stage: BaseModel) -> dict[str, Any]:
    values = stage.model_dump(mode="json")
    return {"kind": values.pop("kind"), "name": values.pop("name"), **values}


def _stage_folder(run_dir: Path, number: int, name: str) -> Path:
    return run_dir / f"{number}-{name}"


def _write(path: Path, text: str) -> None:
    """Replace a file in one step: a crash or a full disk leaves the old one."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read_record(record: Path) -> dict[str, Any]:
    """The recipe that a run was begun with.

    Raises:
        ValueError: for a file that is damaged.
    """
    try:
        found = yaml.load(record.read_text(encoding="utf-8"), Loader=disk.YamlLoader)
        whole = isinstance(found["name"], str) and all({"kind", "name"} <= stage.keys() for stage in found["stages"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, LookupError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{record} is damaged, and without it nobody knows what run this is; put it back, or choose another --output-dir."
        )
    return dict(found)


def read_metrics(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """The figures of every finished stage of a run, by the stage's name.

    Raises:
        ValueError: naming a file that is damaged.
    """
    figures = {}
    for number, stage in enumerate(_read_record(Path(run_dir) / "recipe.yaml")["stages"], start=1):
        folder = _stage_folder(Path(run_dir), number, stage["name"])
        if not (folder / "stage.json").exists():
            continue
        try:
            figures[stage["name"]] = dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / 'metrics.json'} is gone or damaged; put it back, or delete {folder} and run the recipe again."
            ) from error
    return figures
