"""Read and write the record of a model: recipe, data, metrics and training machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minibert.data.source import INSTALLED_DOCS, split_parts
from minibert.files.disk import YamlLoader, read_settings, sha256, to_yaml, write_json, write_text

# The files of a published model's record. The record of a run is read from its stages.
RECORD, RECIPE = "record.json", "recipe.yaml"
_METRICS = ("train_rows", "train_tokens", "steps", "epochs", "train_seconds")
_ENVIRONMENT = ("accelerator", "processor", "cores", "processes", "versions")
# Usual names of splits. Another split of a local folder is named after its files.
_SPLITS = {"train", "validation", "test"}
# (path, split) of local data -> the name that is published instead.
_Local = dict[tuple[str, str | None], str]


class Source(BaseModel):
    """Describe a data source. Local data have a number instead of their path.

    ``revision`` is the commit of a data set on the Hub, and None for local data.
    """

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


class Stage(BaseModel):
    """Describe a training stage of a model: its kind, its name and its data sources."""

    kind: str
    name: str
    data: list[Source] = []


class Evaluation(BaseModel):
    """Store metrics of a model and of baselines, and row counts such as {"queries": 1875}."""

    data: Source
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] = {}
    rows: dict[str, int] = {}


class Record(BaseModel):
    """Store how a model was made. Without a recipe, most fields are empty.

    ``stages`` include the tokenizer's stage. ``base_model`` is the Hub id of the model from
    which training started. ``fields`` are the publisher's metadata for the card.
    """

    stages: list[Stage] = []
    metrics: dict[str, int | float] = {}
    environment: dict[str, str | int | dict[str, str]] = {}
    evaluations: list[Evaluation] = []
    base_model: str | None = None
    new_weights: bool = False
    teacher: str | None = None
    recipe: str | None = None
    fields: dict[str, Any] = {}


def read(folder: Path) -> Record:
    """Return the record of the model in ``folder``, which may be a stage of a training run."""
    folder = folder.resolve()
    metrics, environment = read_settings(folder / "metrics.json"), read_settings(folder / "environment.json")
    found: dict[str, Any] = {
        "metrics": {name: metrics[name] for name in _METRICS if isinstance(metrics.get(name), int | float)},
        "environment": {name: environment[name] for name in _ENVIRONMENT if environment.get(name)},
    }
    run = folder.parent
    if not (folder / "stage.json").exists() or not (run / RECIPE).exists():
        origin = read_settings(folder / "conversion.json").get("base_model")
        return _published(folder) or Record(**found, base_model=origin)
    recipe = read_recipe(run / RECIPE)
    private = {f"{number}-{stage['name']}": stage for number, stage in enumerate(recipe["stages"], start=1)}
    environments = {name: read_settings(run / name / "environment.json") for name in private}
    names, local = {stage["name"] for stage in private.values()}, _Local()
    stages = {name: _public(stage, environments[name], names, local) for name, stage in private.items()}
    path = [folder.name]
    while (before := environments[path[0]].get("started_from")) in stages.keys() - set(path):
        path.insert(0, before)
    evaluations = list(_of_training(stages[folder.name], metrics))
    for name, stage in stages.items():
        if stage["kind"] == "evaluate" and environments[name].get("started_from") == folder.name:
            evaluations += _of_stage(private[name], stage, read_settings(run / name / "metrics.json"))
    return Record(
        **found,
        stages=[Stage.model_validate(stages[name]) for name in path],
        evaluations=_merged(evaluations),
        base_model=next(filter(None, (environments[name].get("base_model") for name in path)), None),
        new_weights=any(isinstance(stages[name].get("model"), dict) for name in path),
        teacher=environment.get("teacher"),
        recipe=to_yaml({**recipe, "stages": list(stages.values())}),
    )


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the recipe of a run from its YAML file."""
    try:
        recipe: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=YamlLoader)
        recipe["stages"][0]["name"]
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged; restore it, or train the model again.") from error
    return recipe


def write(record: Record, folder: Path, fields: dict[str, Any]) -> None:
    """Write ``record``, with the card's metadata ``fields``, into the model's folder.

    If the record is empty, nothing is written.
    """
    record = record.model_copy(update={"fields": {**record.fields, **fields}})
    if record.recipe:
        write_text(folder / RECIPE, record.recipe)
    if kept := record.model_dump(exclude={"recipe"}, exclude_defaults=True):
        write_json(folder / RECORD, {"weights": _weights(folder), **kept})


def _weights(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}


def _published(folder: Path) -> Record | None:
    """Return the record of a published model, or None if its weights have changed."""
    found = read_settings(folder / RECORD)
    if not found or found.pop("weights", None) != _weights(folder):
        return None
    try:
        record = Record.model_validate(found)
    except ValidationError as error:
        problem = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{folder / RECORD} is damaged ({problem}); download the model again, or delete the file.") from error
    if (folder / RECIPE).exists():
        record.recipe = (folder / RECIPE).read_text(encoding="utf-8")
    return record


def _of_training(stage: dict[str, Any], metrics: dict[str, Any]) -> Iterator[Evaluation]:
    measured = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    measured = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    sources = [Source.model_validate(source) for source in stage.get("eval_data", [])]
    if measured and sources:
        joined = Source(path=" + ".join(source.path for source in sources))
        yield Evaluation(data=joined if len(sources) > 1 else sources[0], metrics=measured)


def _of_stage(private: dict[str, Any], stage: dict[str, Any], metrics: dict[str, Any]) -> Iterator[Evaluation]:
    """Yield the results of an ``evaluate`` stage, whose data had ``private`` names."""
    for source, public in zip(private["data"], stage["data"], strict=True):
        name = source["path"] if source.get("split") is None else f"{source['path']} {source['split']}"
        if found := metrics.get(name):
            systems = found["systems"].items()  # an undefined metric is None
            baselines = {name: {key: value for key, value in of.items() if value is not None} for name, of in systems}
            rows = {key: value for key, value in found.items() if isinstance(value, int)}
            yield Evaluation(data=public, metrics=baselines.pop("model"), baselines=baselines, rows=rows)


def _merged(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Merge evaluations on the same data. Later values win."""
    found: dict[tuple[str | None, ...], Evaluation] = {}
    for one in evaluations:
        key = (one.data.path, one.data.config, one.data.split)
        before = found.pop(key).metrics if key in found else {}
        found[key] = one.model_copy(update={"metrics": {**before, **one.metrics}})
    return list(found.values())


def _public(stage: dict[str, Any], environment: dict[str, Any], names: set[str], local: _Local) -> dict[str, Any]:
    """Return a stage without unset fields and local paths. ``names`` are of stages."""
    kept = {field: value for field, value in stage.items() if field != "cache_dir" and value is not None}
    from_hub = {environment.get(field) for field in ("base_model", "teacher", "guide", "tokenizer")}
    for field in kept.keys() & {"model", "teacher", "guide", "tokenizer"}:
        if isinstance(kept[field], str) and kept[field] not in names | from_hub:
            kept[field] = "local tokenizer" if field == "tokenizer" else "local model"
    commits = environment.get("datasets", {})
    for field in sorted(kept.keys() & {"data", "eval_data"}):
        default = "validation" if field == "eval_data" or stage["kind"] == "evaluate" else None
        sources = [{**source, **_public_source(source, commits, local, default)} for source in kept[field]]
        kept[field] = [{name: value for name, value in source.items() if value is not None} for source in sources]
    return kept


def _public_source(source: dict[str, Any], commits: dict[str, str], local: _Local, default: str | None) -> dict[str, Any]:
    """Return the public fields of a source. Only data sets of the Hub keep their name."""
    path, split = source["path"], source.get("split")
    commit = commits.get(path)
    if commit or path == INSTALLED_DOCS:
        return {"split": split or default, "revision": commit}
    if split and not {name for name, _ in split_parts(split)} <= _SPLITS:
        return {"path": local.setdefault((path, split), f"local data {len(local) + 1}"), "split": None}
    name = local.setdefault((path, None), f"local data {len(local) + 1}")
    return {"path": name, "split": split or default, "revision": None}
