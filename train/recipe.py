"""Recipes: read one, check all of it, and run its stages, skipping what is finished and resuming what is not."""

import contextlib
import difflib
import importlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minibert.data import disk
from minibert.data.source import DataSource
from minibert.train.arguments import (
    AnswerStage,
    ChooseStage,
    ClassifyStage,
    DistillStage,
    EmbedStage,
    EvaluateStage,
    LoopArguments,
    ModelStage,
    NewModel,
    PairSource,
    PretrainStage,
    Recipe,
    TagStage,
    TokenizerStage,
)
from minibert.train.stage import StageContext

__all__ = ["Recipe", "StageContext", "load_recipe", "read_metrics", "run_recipe"]

logger = logging.getLogger(__name__)

# Kind of stage: its arguments, the module and function that run it, and whether one process does all of it.
_KINDS: dict[str, tuple[type[BaseModel], str, str, bool]] = {
    "tokenizer": (TokenizerStage, "minibert.train.recipe", "train_tokenizer", True),
    "pretrain": (PretrainStage, "minibert.train.pretrain", "pretrain", False),
    "classify": (ClassifyStage, "minibert.train.classify", "classify", False),
    "tag": (TagStage, "minibert.train.tag", "tag", False),
    "answer": (AnswerStage, "minibert.train.answer", "answer", False),
    "choose": (ChooseStage, "minibert.train.choose", "choose", False),
    "embed": (EmbedStage, "minibert.train.embed", "embed", False),
    "distill": (DistillStage, "minibert.train.distill", "distill", False),
    "evaluate": (EvaluateStage, "minibert.train.recipe", "evaluate_model", True),
}
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


# What PyYAML raises: errors of its own, and those of Python's conversions (2026-99-99, !!int "", brackets without end).
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides and check all of it.

    Args:
        path: a YAML file, or the name of a recipe that comes with the package, such as ``"tinybert"``.
        overrides: ``"stage.field=value"`` or ``"field=value"``; values are YAML, and ``stage.field.0.key`` reaches deeper.

    Raises:
        FileNotFoundError: when there is no such recipe.
        ValueError: listing every problem found, each in the words of the recipe.
    """
    raw = _read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a recipe: it must hold a mapping with name and stages.")
    problems = [problem for override in overrides if (problem := _override(raw, override))]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        # One mistake can fail several branches of a type; the user needs each sentence once.
        problems += dict.fromkeys(_in_words(problem, raw) for problem in error.errors())
    if len(problems) == 1:
        raise ValueError(f"{path}: {problems[0]}")
    if problems:
        raise ValueError(f"{path} has {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return recipe


def _read_yaml(path: str | Path) -> Any:
    file = Path(path)
    if not file.is_file():
        bundled = {recipe.name.removesuffix(".yaml"): recipe for recipe in resources.files("minibert.recipes").iterdir()}
        bundled = {name: recipe for name, recipe in bundled.items() if recipe.name.endswith(".yaml")}
        if str(path).removesuffix(".yaml") not in bundled:
            raise FileNotFoundError(
                f"There is no recipe {path}; give a YAML file or one of the bundled recipes: {', '.join(sorted(bundled))}."
            )
        text = bundled[str(path).removesuffix(".yaml")].read_bytes()
    else:
        text = file.read_bytes()
    try:
        return yaml.load(text, Loader=disk.YamlLoader)  # a subclass of SafeLoader
    except _YAML_ERRORS as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply one override to ``raw`` in place; return what is wrong with it, if anything."""
    target, equals, text = override.partition("=")
    if not equals or not target:
        return f"override {override!r} is not of the form stage.field=value."
    keys = target.split(".")
    place: Any = raw
    if len(keys) > 1:
        listed = raw.get("stages")
        stages = [stage for stage in listed if isinstance(stage, dict)] if isinstance(listed, list) else []
        names = [str(stage.get("name") or stage.get("kind")) for stage in stages]
        if keys[0] not in names:
            return f"override {override!r} names no stage of this recipe; its stages are {', '.join(names)}."
        place = stages[names.index(keys.pop(0))]
    try:
        value = yaml.load(text, Loader=disk.YamlLoader)
    except _YAML_ERRORS:
        return f"the value of override {override!r} is not YAML; quote it."
    for key in keys[:-1]:
        if isinstance(place, dict):
            place = place.setdefault(key, {})
        elif isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        else:
            return f"override {override!r} reaches into {key!r}, which holds no fields."
    if isinstance(place, dict):
        place[keys[-1]] = value
    elif isinstance(place, list) and keys[-1].isdigit() and int(keys[-1]) < len(place):
        place[int(keys[-1])] = value
    else:
        return f"override {override!r} sets a field of something that holds no fields."
    return None


def _in_words(problem: Any, raw: dict[str, Any]) -> str:
    """One pydantic problem as a sentence that names the stage and field as the recipe does."""
    location, prefix = list(problem["loc"]), ""
    model: type[BaseModel] | None = Recipe
    if location[:1] == ["stages"] and len(location) > 1:
        index = location[1]
        stage = raw["stages"][index]
        label = (stage.get("name") or stage.get("kind")) if isinstance(stage, dict) else None
        prefix = f"stage {index + 1}" + (f" ({label})" if label else "") + ": "
        model = _KINDS[location[2]][0] if len(location) > 2 else None  # the third entry is the tag of the union
        location = location[3:]
    # Tags of the two forms of ``model`` are ours, not the user's.
    location = [key for at, key in enumerate(location) if not (at and location[at - 1] == "model" and key in ("text", "new"))]
    field = ".".join(str(key) for key in location)
    value = problem["input"]
    match problem["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            kind = value.get("kind") if isinstance(value, dict) else value
            return f"{prefix}kind={kind!r} is unknown; use one of {', '.join(_KINDS)}."
        case "extra_forbidden":
            of_pairs = model is EmbedStage and "data" in location
            known = PairSource if of_pairs else DataSource if {"data", "eval_data"} & set(location) else model
            names = list(known.model_fields) if known else []
            close = difflib.get_close_matches(str(location[-1]), names, n=1)
            advice = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(names)}."
            return f"{prefix}there is no field {field}; {advice}"
        case "missing":
            return f"{prefix}the field {field} is missing."
        case "model_type" | "model_attributes_type":
            what = "a path, or a mapping with path" if location else "a mapping with kind"
            return f"{prefix}{field}{'=' if field else ''}{value!r} is refused: it should be {what}."
        case "value_error":
            return f"{prefix}{field + ': ' if field else ''}{problem['ctx']['error']}"
        case _:
            shown = value if isinstance(value, str | int | float | bool | None) else type(value).__name__
            return f"{prefix}{field}={shown!r} is refused: {problem['msg'][0].lower()}{problem['msg'][1:]}."


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
    import torch
    from accelerate import PartialState

    import minibert

    minibert.register()
    # Without ``cpu``, Accelerate takes torchrun's processes on a machine without accelerator for unrelated ones.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    run_dir = Path(output_dir or recipe.output_dir or Path("runs") / recipe.name).expanduser()
    _check_models(recipe)
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
    from minibert.hub.safetensors_check import check_model  # its package needs torch, which reading a recipe does not

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
    from transformers import CONFIG_MAPPING

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
    from minibert.train.environment import describe  # needs torch, which reading a recipe does not

    _, module, function, alone = _KINDS[stage.kind]
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
    from minibert.train import checkpoint  # these need torch, which reading a recipe does not
    from minibert.train.loop import check_precision

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
                locks.enter_context(checkpoint.alone_in(folder))  # refuses while another run trains there
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


def train_tokenizer(args: TokenizerStage, context: StageContext) -> dict[str, Any]:
    """The ``tokenizer`` stage: train on every text of the data and save. Returns the sizes reached."""
    from minibert.data.load import check_columns, load, text_columns
    from minibert.tokenization_minibert import train_word_level, train_wordpiece

    parts = []
    for source in args.data:  # one by one: they need not share a column
        dataset = load([source])
        columns = args.text_columns or text_columns(dataset)
        check_columns(dataset, columns, [source], filled=False)
        if not columns:
            raise ValueError(f"{source.path} has no column of strings; it has {', '.join(dataset.column_names)}.")
        parts.append(dataset.select_columns(columns))
    values = (value for part in parts for batch in part.iter(1000) for column in batch.values() for value in column if value)
    texts = (" ".join(value) if isinstance(value, list) else value for value in values)  # lists of words, where taggers learn
    train = train_wordpiece if args.method == "wordpiece" else train_word_level
    options = {} if args.min_frequency is None else {"min_frequency": args.min_frequency}
    tokenizer = train(
        texts,
        vocab_size=args.vocab_size,
        lowercase=args.lowercase,
        model_max_length=args.max_length,
        truncation_side=args.truncation_side,
        show_progress=True,
        **options,
    )
    tokenizer.save_pretrained(context.output_dir)
    return {"rows": sum(len(part) for part in parts), "vocab_size": len(tokenizer)}


def evaluate_model(args: EvaluateStage, context: StageContext) -> dict[str, Any]:
    """The ``evaluate`` stage: figures of the model on each data set, by the data set's path."""
    from minibert.data.load import load
    from minibert.inference.evaluate import evaluate

    figures = {}
    for source in args.data:
        data = load([source], split="validation")
        name = source.path if source.split is None else f"{source.path} {source.split}"
        figures[name] = evaluate(
            str(context.model), data, limit=args.limit, baselines=args.baselines, batch_size=args.batch_size
        )
    return figures
