"""Run the stages of a recipe in order. Skip or resume those of an earlier run."""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import minibert
from minibert.files import disk
from minibert.files.model_folder import check_weights
from minibert.files.processes import processes
from minibert.inference.load import checked_folder
from minibert.train import checkpoint
from minibert.train.arguments import EvaluateStage, LoopArguments, NewModel, Recipe, TokenizerStage
from minibert.train.environment import describe
from minibert.train.loop import check_precision
from minibert.train.stage import DataChecked, StageContext

logger = logging.getLogger(__name__)

_MODELS = ("model", "teacher", "guide")
# Functions that only the main process runs. Other functions are named like the kind.
_ALONE = {"tokenizer": "train_tokenizer", "evaluate": "evaluate_model"}


def run_recipe(
    recipe: Recipe,
    *,
    output_dir: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Run the stages of ``recipe`` in order. Under torchrun, call this in every process.

    Args:
        recipe: a recipe from :func:`load_recipe`.
        output_dir: folder of the run. The default is ``output_dir`` of the recipe, or
            ``runs/<name>`` if the recipe has none.
        force: if arguments of a stage have changed, run this stage and all later stages again.
            Finished results stay in ``N-name.replaced`` until the run is finished.

    Returns:
        The folder of the run, with ``recipe.yaml`` and one folder per stage.

    Raises:
        ValueError: if the folder is not a run of this recipe, or if arguments have changed and
            ``force`` is False.
    """
    minibert.register()
    state = processes()
    run_dir = disk.expand_home(output_dir or recipe.output_dir or Path("runs") / recipe.name)
    _check_models(recipe)
    for stage in recipe.stages:  # report missing packages before the first stage trains
        _function(stage)
    contexts = _contexts(recipe, run_dir)
    if state.is_main_process:
        _check_data(recipe, contexts, run_dir, force)
        _open_run(run_dir, recipe, force)
    state.wait_for_everyone()
    for number, (stage, context) in enumerate(zip(recipe.stages, contexts, strict=True), start=1):
        finished = (context.output_dir / "stage.json").exists()
        if state.is_main_process:
            done = "already finished, skipped" if finished else str(context.output_dir)
            logger.info("Stage %d of %d, %s: %s", number, len(contexts), stage.name, done)
            disk.delete_unused_lock(context.output_dir)
        if not finished:
            _run_stage(stage, context, state)
    if state.is_main_process:
        for folder in run_dir.glob("[0-9]*-*.replaced"):
            checkpoint.delete(folder)
    return run_dir


def _contexts(recipe: Recipe, run_dir: Path) -> list[StageContext]:
    """Return the folder, seed, model and tokenizer of each stage."""
    folders: dict[str, str] = {}

    def named(name: str) -> str:  # the name of an earlier stage, or a folder or Hub id
        return folders.get(name) or str(disk.expand_home(name))

    contexts = []
    model = tokenizer = None  # of earlier stages
    for number, stage in enumerate(recipe.stages, start=1):
        seed = getattr(stage, "seed", None)
        context = StageContext(_stage_folder(run_dir, number, stage.name), recipe.seed if seed is None else seed)
        contexts.append(context)
        if isinstance(stage, TokenizerStage):
            tokenizer = str(context.output_dir)
        else:
            context.teacher, context.guide = (
                named(name) if (name := getattr(stage, field, None)) else None for field in _MODELS[1:]
            )
            if getattr(stage, "student_layers", None):
                context.model = context.teacher
            elif not isinstance(stage.model, NewModel):
                context.model = named(stage.model) if stage.model else model
            context.tokenizer = named(stage.tokenizer) if stage.tokenizer else context.model or tokenizer or context.teacher
            model = model if isinstance(stage, EvaluateStage) else str(context.output_dir)
        folders[stage.name] = str(context.output_dir)
    return contexts


def _check_models(recipe: Recipe) -> None:
    """Raise an error for models and tokenizers that cannot be used."""
    names = {stage.name for stage in recipe.stages}
    for field in (*_MODELS, "tokenizer"):
        asked = {name for stage in recipe.stages if isinstance(name := getattr(stage, field, None), str)}
        for name in sorted(asked - names):
            folder = checked_folder(name)
            if field != "tokenizer":
                check_weights(folder)


def _check_data(recipe: Recipe, contexts: list[StageContext], run_dir: Path, force: bool) -> None:
    """Check the data of all stages that will run, and print the columns that they use."""
    if not run_dir.exists():
        run_dir.mkdir(parents=True, exist_ok=True)  # an error of the disk shows before data are read
    unfinished = {str(context.output_dir) for context in contexts if not (context.output_dir / "stage.json").exists()}
    try:
        for stage, context in zip(recipe.stages, contexts, strict=True):
            if (context.output_dir / "stage.json").exists() and not force:
                continue
            missing: dict[str, Any] = {field: None for field in _MODELS if getattr(context, field) in unfinished}
            checked = replace(context, only_check=True, data=[], **missing)
            with contextlib.suppress(DataChecked):
                _function(stage)(stage, checked)
            for used in checked.data:
                shown = "; ".join(f"{use} ({used['columns'][use]}): {value}" for use, value in used["first_row"].items())
                logger.info("%s reads %s rows of %s. First row: %s", stage.name, f"{used['rows']:,}", used["path"], shown)
    finally:
        with contextlib.suppress(OSError):  # only an empty folder
            run_dir.rmdir()


def _function(stage: Any) -> Callable[[Any, StageContext], dict[str, Any]]:
    module, name = stage.kind, _ALONE.get(stage.kind, stage.kind)
    if stage.kind == "distill":
        module, name = f"distill.{stage.objective}", f"distill_{stage.objective}"
    function: Callable[..., Any] = getattr(importlib.import_module(f"minibert.train.stages.{module}"), name)
    return function


def _run_stage(stage: Any, context: StageContext, state: Any) -> None:
    alone = stage.kind in _ALONE
    state.wait_for_everyone()  # every process has checked that the stage is not finished
    if state.is_main_process:
        for path in (context.output_dir, *context.output_dir.rglob("*")):
            disk.refuse_link(path)
        context.output_dir.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    lock = checkpoint.exclusive_lock(context.output_dir) if state.is_main_process else contextlib.nullcontext()
    try:
        with lock:
            if state.is_main_process:
                checkpoint.delete_leftovers(context.output_dir)
            metrics = _function(stage)(stage, context) if state.is_main_process or not alone else {}
            state.wait_for_everyone()
            if state.is_main_process:
                data = {"data": context.data} if context.data else {}
                disk.write_json(context.output_dir / "metrics.json", {**metrics, **data})
                found = describe(stage, context, processes=1 if alone else state.num_processes)
                disk.write_json(context.output_dir / "environment.json", found)
                # stage.json is written last, because it marks a finished stage.
                disk.write_json(context.output_dir / "stage.json", _dump(stage))
    except BaseException:
        with contextlib.suppress(OSError):  # without files, it can change without --force
            context.output_dir.rmdir()
        raise
    state.wait_for_everyone()


def _open_run(run_dir: Path, recipe: Recipe, force: bool) -> None:
    """Create the folder of a run, or check that an existing folder belongs to this run.

    If ``force`` is True, set aside the folders of the first changed stage and all later stages.
    """
    record = run_dir / "recipe.yaml"
    earlier: list[dict[str, Any]] = []
    changes: list[tuple[int, str]] = []
    if record.exists():
        old = _read_record(record)
        if old["name"] != recipe.name:
            raise ValueError(f"{run_dir} is a run of recipe {old['name']!r}; choose another --output-dir.")
        earlier, changes = old["stages"], list(_changes(old, recipe, run_dir))
        if changes and not force:
            raise ValueError(
                f"{run_dir} is a run with different arguments: {'; '.join(text for _, text in changes)}. "
                f"Choose another --output-dir, or use --force to run stage {changes[0][0]} and all later "
                "stages again (this replaces the folders of these stages)."
            )
    elif run_dir.exists() and (not run_dir.is_dir() or {*run_dir.iterdir()} - {*disk.leftovers(run_dir)}):
        raise ValueError(f"{run_dir} exists and is not a run of a recipe; choose another --output-dir.")
    again = changes[0][0] if changes else len(recipe.stages) + 1  # first stage to run again
    for number, stage in enumerate(recipe.stages, start=1):
        folder = _stage_folder(run_dir, number, stage.name)
        if isinstance(stage, LoopArguments) and (number >= again or not (folder / "stage.json").exists()):
            check_precision(stage.precision)
    replaced = [_stage_folder(run_dir, n, stage["name"]) for n, stage in enumerate(earlier, start=1) if n >= again]
    with contextlib.ExitStack() as locks:
        for folder in replaced:
            if folder.exists():
                locks.enter_context(checkpoint.exclusive_lock(folder))  # fails while another run uses it
        for folder in replaced:
            if (folder / "stage.json").exists():  # a finished stage is kept until the run is finished
                checkpoint.delete(folder.with_name(f"{folder.name}.replaced"))
                folder.rename(folder.with_name(f"{folder.name}.replaced"))
            else:
                checkpoint.delete(folder)
    run_dir.mkdir(parents=True, exist_ok=True)
    stages = [_dump(stage) for stage in recipe.stages]
    disk.write_text(record, disk.to_yaml({"name": recipe.name, "seed": recipe.seed, "stages": stages}))


def _changes(old: dict[str, Any], recipe: Recipe, run_dir: Path) -> Iterator[tuple[int, str]]:
    """Yield the stage number and the text of each change to a started stage."""
    for number, before in enumerate(old["stages"], start=1):
        if not _stage_folder(run_dir, number, before["name"]).exists():
            continue
        where = f"stage {number} ({before['name']})"
        if number > len(recipe.stages):
            yield number, f"{where} is removed"
            continue
        stage = recipe.stages[number - 1]
        after = _dump(stage)
        if (before["kind"], before["name"]) != (after["kind"], after["name"]):
            yield number, f"{where} is now {after['name']} (kind {after['kind']})"
            continue
        if "seed" in after:
            before = {**before, "seed": old["seed"] if before.get("seed") is None else before["seed"]}
            after = {**after, "seed": recipe.seed if after["seed"] is None else after["seed"]}
        for name in sorted((before.keys() & after.keys()) - stage.free_fields()):
            if before[name] != after[name]:
                yield number, f"{where} {name} was {before[name]!r} and is now {after[name]!r}"


def _dump(stage: BaseModel) -> dict[str, Any]:
    values = stage.model_dump(mode="json")
    return {"kind": values.pop("kind"), "name": values.pop("name"), **values}


def _stage_folder(run_dir: Path, number: int, name: str) -> Path:
    return run_dir / f"{number}-{name}"


def _read_record(record: Path) -> dict[str, Any]:
    """Return the recipe of an earlier run. Raise ValueError if the file is damaged."""
    try:
        found = yaml.load(record.read_text(encoding="utf-8"), Loader=disk.YamlLoader)
        valid = isinstance(found["name"], str) and all({"kind", "name"} <= stage.keys() for stage in found["stages"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, LookupError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{record} is damaged; restore it, or choose another --output-dir.")
    return dict(found)


def read_metrics(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Return the metrics of the finished stages of a run, by name."""
    metrics = {}
    for number, stage in enumerate(_read_record(Path(run_dir) / "recipe.yaml")["stages"], start=1):
        folder = _stage_folder(Path(run_dir), number, stage["name"])
        if not (folder / "stage.json").exists():
            continue
        try:
            metrics[stage["name"]] = dict(disk.read_json(folder / "metrics.json"))
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / 'metrics.json'} is missing or damaged; restore this file, or delete {folder} "
                "and run the recipe again."
            ) from error
    return metrics
