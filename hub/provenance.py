"""Read and write the record of a model: its recipe, its data, its metrics, and the machine that trained it."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minibert.files.disk import YamlLoader, sha256, to_yaml, write_json, write_text
from minibert.files.model_folder import read_settings

# A published model keeps its record in these files; in a run, the record is read from the files of its stages.
RECORD, RECIPE = "record.json", "recipe.yaml"
# The parts of metrics.json and environment.json that a card shows.
_METRICS = ("train_rows", "train_tokens", "steps", "epochs", "train_seconds")
_ENVIRONMENT = ("accelerator", "processor", "cores", "processes", "versions")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt")
# Fields of a recipe that name data or models by a path of the training machine or by an id on the Hub, and those left out.
_NAMES = ("path", "model", "teacher", "tokenizer")
_DROPPED = ("cache_dir", "output_dir")


class Source(BaseModel):
    """A source of data: an id on the Hub, or the name of a local file without its folders."""

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    on_hub: bool = False


class Stage(BaseModel):
    """A stage that the model went through."""

    kind: str
    name: str
    data: list[Source] = []


class Evaluation(BaseModel):
    """Metrics of the model on one source of data (of several evaluated at once: their joined paths), and of its baselines.

    Attributes:
        rows: numbers of rows by what they hold, such as {"queries": 1875}.
    """

    data: Source
    metrics: dict[str, float]
    baselines: dict[str, dict[str, float]] = {}
    rows: dict[str, int] = {}


class Record(BaseModel):
    """The origin of a model; empty for a model that no recipe trained.

    Attributes:
        stages: those that the model went through, including the tokenizer's, in order.
        metrics: of the last stage's training, as metrics.json has them.
        environment: processor, versions and processes of that training.
        base_model: id on the Hub of the weights that it started from.
        new_weights: it started from random weights.
        recipe: the complete recipe, without paths of the training machine.
        fields: what its publisher stated for the card, such as the licence.
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
    """Return the record of the model in ``folder``: a stage of a run, a published model, or any other.

    Raises:
        ValueError: a file of the record is damaged.
    """
    metrics, environment = read_settings(folder / "metrics.json"), read_settings(folder / "environment.json")
    found: dict[str, Any] = {
        "metrics": {name: metrics[name] for name in _METRICS if isinstance(metrics.get(name), int | float)},
        "environment": {name: environment[name] for name in _ENVIRONMENT if environment.get(name)},
    }
    if (recipe := _recipe_of(folder)) is None:
        return _published(folder) or Record(**found, base_model=read_settings(folder / "conversion.json").get("base_model"))
    folder, stages = folder.resolve(), recipe["stages"]
    folders = [folder.parent / f"{number}-{stage['name']}" for number, stage in enumerate(stages, start=1)]
    at = folders.index(folder)
    environments = [read_settings(place / "environment.json") for place in folders]
    path = ancestors(stages, at)
    later = [
        number for number in range(at, len(stages)) if stages[number]["kind"] == "evaluate" and _start(stages, number) == at
    ]
    evaluations = [*_of_training(stages[at], metrics, environment)]
    evaluations += [
        one
        for number in later
        for one in _of_stage(stages[number], read_settings(folders[number] / "metrics.json"), environments[number])
    ]
    return Record(
        **found,
        stages=[
            Stage(
                **{name: stages[number][name] for name in ("kind", "name")},
                data=[_source(source, environments[number]) for source in stages[number].get("data") or []],
            )
            for number in path
        ],
        evaluations=_merged(evaluations),
        base_model=next((base for number in path if (base := environments[number].get("base_model"))), None),
        new_weights=any(isinstance(stages[number].get("model"), dict) for number in path),
        teacher=environment.get("teacher"),
        recipe=to_yaml(_public(recipe, {stage["name"] for stage in stages})),
    )


def write(record: Record, folder: Path, fields: dict[str, Any]) -> None:
    """Write ``record`` next to the weights in ``folder``, where :func:`read` finds it; an empty record writes nothing.

    Args:
        record: the record.
        folder: the model.
        fields: what the publisher states for the card.
    """
    record = record.model_copy(update={"fields": {**record.fields, **fields}})
    if record.recipe:
        write_text(folder / RECIPE, record.recipe)
    if kept := record.model_dump(exclude={"recipe"}, exclude_defaults=True):
        write_json(folder / RECORD, {"weights": _weights(folder), **kept})


def training_data(record: Record) -> list[Source]:
    """Return every source that the weights were trained on, once."""
    found = (source for stage in record.stages if stage.kind != "tokenizer" for source in stage.data)
    return list({(source.path, source.config): source for source in found}.values())


def public_name(name: str, *, on_hub: bool = False) -> str:
    """Return ``name`` as it may be published: an id on the Hub as it is, a path without its folders.

    >>> public_name("../private/data/reviews.csv"), public_name("sentence-transformers/all-nli")
    ('reviews.csv', 'sentence-transformers/all-nli')
    """
    is_id = _HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(_DATA_FILES)
    if on_hub or (is_id and not Path(name).exists()):
        return name
    return PurePosixPath(PureWindowsPath(name).as_posix()).name or "local data"


# --------------------------------------------------------------------------------------------------- published models


def _weights(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}


def _published(folder: Path) -> Record | None:
    """Return the record that a published model brings, unless its weights were changed since."""
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


# -------------------------------------------------------------------------------------------------------- runs


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    """Return the recipe that ``folder`` is a finished stage of, if any."""
    folder = folder.resolve()
    file = folder.parent / "recipe.yaml"
    if not file.exists() or not (folder / "stage.json").exists():
        return None
    try:
        recipe = yaml.load(file.read_text(encoding="utf-8"), Loader=YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}); train the model again.") from error
    stages = (recipe.get("stages") if isinstance(recipe, dict) else None) or []
    return recipe if folder.name in [f"{number}-{stage['name']}" for number, stage in enumerate(stages, start=1)] else None


def _start(stages: list[dict[str, Any]], at: int) -> int | None:
    """Return the stage whose model stage ``at`` begins with; None for new weights, or those of a folder or the Hub."""
    stage = stages[at]
    wanted = stage.get("teacher") if stage.get("student_layers") else stage.get("model")
    earlier = [number for number in range(at) if stages[number]["kind"] not in ("tokenizer", "evaluate")]
    if wanted is None:
        return earlier[-1] if earlier else None
    return next((number for number in earlier if stages[number]["name"] == wanted), None)


def ancestors(stages: list[dict[str, Any]], at: int) -> list[int]:
    """Return the stages that the model of stage ``at`` went through, itself and the tokenizer's included, in order."""
    path, begin = [at], at
    while (before := _start(stages, begin)) is not None:
        path.append(begin := before)
    if stages[begin].get("tokenizer") is None and isinstance(stages[begin].get("model"), dict):
        path += [number for number in range(begin) if stages[number]["kind"] == "tokenizer"][-1:]
    return sorted(path)


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


def _of_stage(stage: dict[str, Any], metrics: dict[str, Any], environment: dict[str, Any]) -> Iterator[Evaluation]:
    for source in stage["data"]:
        name = source["path"] if source.get("split") is None else f"{source['path']} {source['split']}"
        if found := metrics.get(name):
            baselines = dict(found["systems"])
            rows = {key: value for key, value in found.items() if isinstance(value, int)}
            data = _source(source, environment, "validation")
            yield Evaluation(data=data, metrics=baselines.pop("model"), baselines=baselines, rows=rows)


def _merged(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Merge the evaluations on the same data; the last value of a metric counts."""
    found: dict[tuple[str | None, ...], Evaluation] = {}
    for one in evaluations:
        key = (one.data.path, one.data.config, one.data.split)
        before = found.pop(key).metrics if key in found else {}
        found[key] = one.model_copy(update={"metrics": {**before, **one.metrics}})
    return list(found.values())


def _public(value: Any, stages: set[str], key: str = "") -> Any:
    """Return a part of a recipe without unset fields, and without what only the training machine understands."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name not in _DROPPED and inner is not None}
        return {name: _public(inner, stages, name) for name, inner in kept.items()}
    if isinstance(value, list):
        return [_public(inner, stages, key) for inner in value]
    return public_name(value) if isinstance(value, str) and key in _NAMES and value not in stages else value
