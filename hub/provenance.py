"""What is on record about a trained model: the recipe it comes from, its data, its figures, the machine that trained it."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from minibert.files.disk import to_yaml
from minibert.hub.remote import sha256

# What a published model keeps of its record; its recipe lies beside it.
RECORD, RECIPE = "record.json", "recipe.yaml"
# What a card tells of the figures and of the machine of a training.
METRICS = ("train_rows", "train_tokens", "steps", "epochs", "train_seconds")
ENVIRONMENT = ("accelerator", "processor", "cores", "processes", "versions")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DATA_FILES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt")
# Fields of a recipe that name data or models, by a path of the training machine or by an id on the Hub.
_NAMES = ("path", "model", "teacher", "tokenizer")
_DROPPED = ("cache_dir", "output_dir")


@dataclass
class Evaluation:
    """Figures on one split of a data set, for the model and for what was measured beside it.

    Attributes:
        data: what was read, as the recipe names it: path, config, split and revision; of several sources only their paths.
        rows: what was counted, such as {"queries": 1875}.
        systems: figures by name, for every system; that of the model is called "model".
    """

    data: dict[str, Any]
    systems: dict[str, dict[str, float]]
    rows: dict[str, int] = field(default_factory=dict)


@dataclass
class Record:
    """All that is known about how a model came to be; of one that no recipe trained, nothing.

    Attributes:
        stages: those that the model went through, with the tokenizer's, in order.
        metrics: figures of the last stage's training, as metrics.json has them.
        environment: processor, versions and processes of that training.
        base_model: id on the Hub of the weights that it started from.
        recipe: the whole recipe, without paths of the training machine.
        fields: what its publisher stated for the card, such as the licence.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    base_model: str | None = None
    teacher: str | None = None
    recipe: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    def data(self) -> Iterator[dict[str, Any]]:
        """Every source that the weights were trained on, once."""
        seen = []
        for stage in self.stages:
            for source in stage.get("data", ()) if stage["kind"] != "tokenizer" else ():
                if (source["path"], source.get("config")) not in seen:
                    seen.append((source["path"], source.get("config")))
                    yield source


def read(folder: Path) -> Record:
    """What is on record about the model in ``folder``: a stage of a run, a published model, or any other.

    Raises:
        ValueError: the record is damaged.
    """
    metrics, environment = _read(folder / "metrics.json"), _read(folder / "environment.json")
    converted = _read(folder / "conversion.json")
    record = Record(metrics=metrics, environment=environment, base_model=converted.get("base_model"))
    recipe = _recipe_of(folder)
    if recipe is None:
        return _published(folder) or record
    stages = recipe["stages"]
    number = int(folder.resolve().name.partition("-")[0]) - 1
    record.recipe = to_yaml(_public(recipe, {stage["name"] for stage in stages}))
    path = _ancestors(stages, number)
    record.stages = [stages[at] for at in path]
    run = folder.resolve().parent
    environments = [_read(_folder(run, stages, at) / "environment.json") for at in path]
    record.base_model = next((found for one in environments if (found := one.get("base_model"))), record.base_model)
    record.teacher = environment.get("teacher")
    record.evaluations = [*_of_training(stages[number], metrics)]
    commits = {name: commit for one in environments for name, commit in one.get("datasets", {}).items()}
    for at in range(number + 1, len(stages)):
        if stages[at]["kind"] == "evaluate" and _start(stages, at) == number:
            done = _folder(run, stages, at)
            record.evaluations += _of_stage(stages[at], _read(done / "metrics.json"))
            commits |= _read(done / "environment.json").get("datasets", {})
    record.evaluations = [*_last_of_each(record.evaluations)]
    for source in [*record.data(), *(evaluation.data for evaluation in record.evaluations if "split" in evaluation.data)]:
        source["revision"] = commits.get(source["path"]) or source.get("revision")
        source["on_hub"] = source["path"] in commits if environment else on_hub(source["path"])
        source["path"] = public_name(source["path"], known=source["on_hub"])
    return record


def write(record: Record, folder: Path, fields: dict[str, Any]) -> None:
    """Keep ``record`` in ``folder``, which holds the weights already, for :func:`read` to find it there, or nothing to keep.

    Args:
        fields: what the publisher states for the card.
    """
    names = {stage["name"] for stage in record.stages}
    kept = {
        "stages": [
            {"kind": stage["kind"], "name": stage["name"], "model": _public(stage.get("model"), names, "model")}
            | {"data": [_source(source, public=False) for source in stage.get("data", [])]}
            for stage in record.stages
        ],
        "metrics": {name: record.metrics[name] for name in METRICS if name in record.metrics},
        "environment": {name: record.environment[name] for name in ENVIRONMENT if name in record.environment},
        "evaluations": [{**asdict(one), "data": _source(one.data)} for one in record.evaluations],
        "base_model": record.base_model,
        "teacher": None if record.teacher is None else public_name(record.teacher),
        "fields": {**record.fields, **fields},
    }
    if record.recipe:
        (folder / RECIPE).write_text(record.recipe, encoding="utf-8")
    if any(kept.values()):
        text = json.dumps({"weights": _weights(folder), **kept}, indent=2, ensure_ascii=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def _source(source: dict[str, Any], *, public: bool = True) -> dict[str, Any]:
    """What a card says of one source of data.

    Args:
        public: its path may be published as it is.
    """
    path = source["path"] if public else public_name(source["path"], known=source.get("on_hub", False))
    known = {name: source[name] for name in ("config", "split", "revision", "on_hub") if source.get(name) is not None}
    return {"path": path, **known}


def _weights(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}


def _published(folder: Path) -> Record | None:
    """The record that a published model brings; None where it brings none, or its weights are others by now."""
    found = _read(folder / RECORD)
    if not found or found.get("weights") != _weights(folder):
        return None
    names = ("stages", "metrics", "environment", "base_model", "teacher", "fields")
    known = {name: found[name] for name in names if name in found}
    try:
        record = Record(**known, evaluations=[Evaluation(**one) for one in found.get("evaluations", [])])
        problem = "; ".join(_malformed(record))
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"{folder / RECORD} is damaged ({problem}); download the model again, or delete the file.")
    recipe = folder / RECIPE
    record.recipe = recipe.read_text(encoding="utf-8") if recipe.exists() else None
    return record


def _malformed(record: Record) -> Iterator[str]:
    """What a record that came with a model holds and no record of ours does."""
    for name in ("metrics", "environment", "fields"):
        if not isinstance(getattr(record, name), dict):
            yield f"{name} is no mapping"
    for name in ("base_model", "teacher"):
        if not isinstance(getattr(record, name), str | None):
            yield f"{name} is no text"
    names = [text for stage in record.stages for text in (stage["kind"], stage["name"])]
    sources = [*record.data(), *(one.data for one in record.evaluations)]
    names += [text for source in sources for text in (source["path"], source.get("config"), source.get("split"))]
    if not all(isinstance(text, str | None) for text in names):
        yield "a name is no text"
    for one in record.evaluations:
        figures = [value for system in (one.systems["model"], *one.systems.values()) for value in system.values()]
        if not all(type(value) in (int, float) for value in (*one.rows.values(), *figures)):
            yield "a figure is no number"


def on_hub(name: str) -> bool:
    """Whether ``name`` looks like the id of something on the Hub, and is nothing here."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith(".") and not name.endswith(_DATA_FILES) and not _here(name)


def public_name(name: str, *, known: bool = False) -> str:
    """``name`` as it may be published: an id stays (one ``known`` to be one, or that looks so), a path loses its folders.

    >>> public_name("../data/of/somebody/reviews.csv"), public_name("sentence-transformers/all-nli")
    ('reviews.csv', 'sentence-transformers/all-nli')
    """
    if known or on_hub(name):
        return name
    return PurePosixPath(PureWindowsPath(name).as_posix()).name or "local data"


def _here(name: str) -> bool:
    return Path(name).expanduser().exists()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); train the model again, or delete the file.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it holds no mapping); train the model again, or delete the file.")
    return found


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe that ``folder`` is a finished stage of; None where it is none."""
    folder = folder.resolve()
    file = folder.parent / "recipe.yaml"
    if not file.exists() or not (folder / "stage.json").exists():
        return None
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}); train the model again.") from error
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    names = [f"{number}-{stage['name']}" for number, stage in enumerate(stages or [], start=1)]
    return recipe if folder.name in names else None


def _folder(run: Path, stages: list[dict[str, Any]], at: int) -> Path:
    return run / f"{at + 1}-{stages[at]['name']}"


def _start(stages: list[dict[str, Any]], at: int) -> int | None:
    """The stage whose model stage ``at`` begins with; None for new weights, or those of a folder or the Hub."""
    stage = stages[at]
    wanted = stage.get("teacher") if stage.get("student_layers") else stage.get("model")
    earlier = [number for number in range(at) if stages[number]["kind"] not in ("tokenizer", "evaluate")]
    if wanted is None:
        return earlier[-1] if earlier else None
    return next((number for number in earlier if stages[number]["name"] == wanted), None)


def _ancestors(stages: list[dict[str, Any]], at: int) -> list[int]:
    """The stages that the model of stage ``at`` went through, itself and the tokenizer's included, in order."""
    path, begin = [at], at
    while (before := _start(stages, begin)) is not None:
        path.append(begin := before)
    if stages[begin].get("tokenizer") is None and isinstance(stages[begin].get("model"), dict):
        path += [number for number in range(begin) if stages[number]["kind"] == "tokenizer"][-1:]
    return sorted(path)


def _of_training(stage: dict[str, Any], metrics: dict[str, Any]) -> Iterator[Evaluation]:
    figures = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    figures = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
    sources = stage.get("eval_data") or []
    if figures and len(sources) == 1:
        yield Evaluation({**sources[0], "split": sources[0].get("split") or "validation"}, {"model": figures})
    elif figures and sources:  # one figure for all of them
        yield Evaluation({"path": " + ".join(public_name(source["path"]) for source in sources)}, {"model": figures})


def _of_stage(stage: dict[str, Any], metrics: dict[str, Any]) -> Iterator[Evaluation]:
    for source in stage["data"]:
        name = source["path"] if source.get("split") is None else f"{source['path']} {source['split']}"
        if found := metrics.get(name):
            rows = {key: value for key, value in found.items() if isinstance(value, int)}
            yield Evaluation({**source, "split": source.get("split") or "validation"}, found["systems"], rows)


def _last_of_each(evaluations: list[Evaluation]) -> Iterator[Evaluation]:
    """Without those whose figures a later one has too, for the same rows."""
    for number, one in enumerate(evaluations):
        if not any(
            one.data == later.data and set(one.systems["model"]) <= set(later.systems["model"])
            for later in evaluations[number + 1 :]
        ):
            yield one


def _public(value: Any, stages: set[str], key: str = "") -> Any:
    """``value``, a part of a recipe, without fields left unset and what only the training machine understands."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name not in _DROPPED and inner is not None}
        return {name: _public(inner, stages, name) for name, inner in kept.items()}
    if isinstance(value, list):
        return [_public(inner, stages, key) for inner in value]
    return public_name(value) if isinstance(value, str) and key in _NAMES and value not in stages else value
