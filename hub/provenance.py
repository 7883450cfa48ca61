"""Read and write the record of a model: recipe, data, metrics and training machine."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minibert.files.disk import YamlLoader, read_settings, sha256, to_yaml, write_json, write_text

# The files of a published model's record. The record of a run is read from its stages.
RECORD, RECIPE = "record.json", "recipe.yaml"
_METRICS = ("train_rows", "train_tokens", "steps", "epochs", "train_seconds")
_ENVIRONMENT = ("accelerator", "processor", "cores", "processes", "versions")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt")
# Fields of a recipe that contain a path or an id on the Hub, and fields that are not published.
_NAMES = ("path", "model", "teacher", "tokenizer")
_DROPPED = ("cache_dir", "output_dir")


class Source(BaseModel):
    """Describe a data source: an id on the Hub, or a file name without its folders."""

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    on_hub: bool = False


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
    path = [folder]
    while name := read_settings(path[0] / "environment.json").get("started_from"):
        if (before := run / str(name)) in path:
            break
        path.insert(0, before)
    stages = [read_settings(place / "stage.json") for place in path]
    environments = [read_settings(place / "environment.json") for place in path]
    evaluations = list(_of_training(stages[-1], metrics, environment))
    for place in sorted(run.glob("*/stage.json")):
        evaluations += _of_stage(place.parent, folder.name)
    return Record(
        **found,
        stages=[
            Stage(
                kind=stage["kind"],
                name=stage["name"],
                data=[_source(source, made) for source in stage.get("data") or []],
            )
            for stage, made in zip(stages, environments, strict=True)
        ],
        evaluations=_merged(evaluations),
        base_model=next(filter(None, (made.get("base_model") for made in environments)), None),
        new_weights=any(isinstance(stage.get("model"), dict) for stage in stages),
        teacher=environment.get("teacher"),
        recipe=to_yaml(_public(recipe, {stage["name"] for stage in recipe["stages"]})),
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


def datasets(record: Record) -> list[str]:
    """Return the Hub ids of the data sets that the model was trained on."""
    sources = [source for stage in record.stages if stage.kind != "tokenizer" for source in stage.data]
    return list(dict.fromkeys(source.path for source in sources if source.on_hub))


def public_name(name: str, *, on_hub: bool = False) -> str:
    """Return an id on the Hub unchanged, and a path without its folders.

    >>> public_name("../private/data/reviews.csv"), public_name("sentence-transformers/all-nli")
    ('reviews.csv', 'sentence-transformers/all-nli')
    """
    is_id = _HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(_DATA_FILES)
    if on_hub or (is_id and not Path(name).exists()):
        return name
    return PurePosixPath(PureWindowsPath(name).as_posix()).name or "local data"


def _weights(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}


def _published(folder: Path) -> Record | None:
    """Return the record in a published model's files, or None if the weights have changed."""
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


def _source(source: dict[str, Any], environment: dict[str, Any], split: str | None = None) -> Source:
    commit = environment.get("datasets", {}).get(source["path"])
    return Source(
        path=public_name(source["path"], on_hub=commit is not None),
        config=source.get("config"),
        split=source.get("split") or split,
        revision=commit or source.get("revision"),
        on_hub=commit is not None,
    )


def _of_training(stage: dict[str, Any], metrics: dict[str, Any], environment: dict[str, Any]) -> Iterator[Evaluation]:
    measured = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    measured = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    sources = [_source(source, environment, "validation") for source in stage.get("eval_data") or []]
    if measured and sources:
        joined = Source(path=" + ".join(source.path for source in sources))
        yield Evaluation(data=joined if len(sources) > 1 else sources[0], metrics=measured)


def _of_stage(folder: Path, model: str) -> Iterator[Evaluation]:
    """Yield the results in ``folder`` if it belongs to an evaluation of the stage ``model``."""
    stage, environment = read_settings(folder / "stage.json"), read_settings(folder / "environment.json")
    if stage["kind"] != "evaluate" or environment.get("started_from") != model:
        return
    metrics = read_settings(folder / "metrics.json")
    for source in stage["data"]:
        name = source["path"] if source.get("split") is None else f"{source['path']} {source['split']}"
        if found := metrics.get(name):
            systems = found["systems"].items()  # an undefined metric is None
            baselines = {name: {key: value for key, value in of.items() if value is not None} for name, of in systems}
            rows = {key: value for key, value in found.items() if isinstance(value, int)}
            data = _source(source, environment, "validation")
            yield Evaluation(data=data, metrics=baselines.pop("model"), baselines=baselines, rows=rows)


def _merged(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Merge evaluations on the same data. Later values replace earlier values of a metric."""
    found: dict[tuple[str | None, ...], Evaluation] = {}
    for one in evaluations:
        key = (one.data.path, one.data.config, one.data.split)
        before = found.pop(key).metrics if key in found else {}
        found[key] = one.model_copy(update={"metrics": {**before, **one.metrics}})
    return list(found.values())


def _public(value: Any, stages: set[str], key: str = "") -> Any:
    """Return a part of a recipe without unset fields and local paths."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name not in _DROPPED and inner is not None}
        return {name: _public(inner, stages, name) for name, inner in kept.items()}
    if isinstance(value, list):
        return [_public(inner, stages, key) for inner in value]
    return public_name(value) if isinstance(value, str) and key in _NAMES and value not in stages else value
