"""Read and validate recipes."""

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from minibert.data.source import DataSource
from minibert.files import disk
from minibert.train.arguments import KINDS, OBJECTIVES, EmbedStage, PairSource, Recipe

# PyYAML also raises errors of Python's conversions (2026-99-99, !!int "", too many brackets).
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides and validate the result.

    Args:
        path: a YAML file, or the name of a bundled recipe such as ``"tinybert"``.
        overrides: strings such as ``"stage.field=value"`` or ``"field=value"``. The values are
            parsed as YAML.

    Raises:
        FileNotFoundError: if the recipe does not exist.
        ValueError: if the recipe is not valid. The message lists all problems.
    """
    raw = _read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a recipe; write a mapping with name and stages.")
    problems = [problem for override in overrides if (problem := _override(raw, override))]
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        # One mistake can fail several branches of a union. Repeated messages are dropped.
        problems += dict.fromkeys(_in_words(problem, raw) for problem in error.errors())
    if len(problems) == 1:
        raise ValueError(f"{path}: {problems[0]}")
    if problems:
        raise ValueError(f"{path} has {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return recipe


def _read_yaml(path: str | Path) -> Any:
    folder = resources.files("minibert.recipes")
    file: Any = Path(path)
    if not file.is_file():
        file = folder / f"{str(path).removesuffix('.yaml')}.yaml"
    if not file.is_file():
        names = sorted(recipe.name.removesuffix(".yaml") for recipe in folder.iterdir() if recipe.name.endswith(".yaml"))
        raise FileNotFoundError(
            f"There is no recipe {path}; give a YAML file or one of the bundled recipes: {', '.join(names)}."
        )
    text = file.read_bytes()
    try:
        return yaml.load(text, Loader=disk.YamlLoader)  # a subclass of SafeLoader
    except _YAML_ERRORS as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def _override(raw: dict[str, Any], override: str) -> str | None:
    """Apply an override to the recipe ``raw``, or return what is wrong with it."""
    target, equals, text = override.partition("=")
    if not equals or not target:
        return f"override {override!r} does not have the form stage.field=value."
    *path, last = target.split(".")
    place: Any = raw
    if path:
        listed = raw.get("stages")
        stages = [stage for stage in listed if isinstance(stage, dict)] if isinstance(listed, list) else []
        named = {str(stage.get("name") or stage.get("kind")): stage for stage in stages}
        stage = path.pop(0)
        if stage not in named:
            return f"override {override!r} names an unknown stage; the recipe has {', '.join(named)}."
        place = named[stage]
    try:
        value = yaml.load(text, Loader=disk.YamlLoader)
    except _YAML_ERRORS:
        return f"the value of override {override!r} is not valid YAML; put the value in quotes."
    if isinstance(value, dict) and text.rstrip().endswith(":"):
        value = text  # a prompt such as "query: "
    for key in path:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return f"override {override!r} sets a field of a value that has no fields; correct the name."
    place[last] = value
    return None


def _in_words(problem: Any, raw: dict[str, Any]) -> str:
    """Turn a pydantic error into a message that names the stage and the field."""
    location, prefix = list(problem["loc"]), ""
    model: type[BaseModel] | None = Recipe
    if location[:1] == ["stages"] and len(location) > 1:
        index = location[1]
        stage = raw["stages"][index]
        label = (stage.get("name") or stage.get("kind")) if isinstance(stage, dict) else None
        prefix = f"stage {index + 1}" + (f" ({label})" if label else "") + ": "
        tags = location[2:4] if location[2:3] == ["distill"] else location[2:3]  # kind and objective
        model = {**OBJECTIVES, **KINDS}[tags[-1]] if tags else None
        location = location[2 + len(tags) :]
    # The tags of the two forms of ``model`` are internal, so messages leave them out.
    keys = zip(location, [None, *location], strict=False)
    location = [key for key, before in keys if before != "model" or key not in ("text", "new")]
    field = ".".join(str(key) for key in location)
    value = problem["input"]
    match problem["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            tag = problem["ctx"]["discriminator"].strip("'")
            given = value.get(tag) if isinstance(value, dict) else value
            return f"{prefix}{tag}={given!r} is unknown; use one of {', '.join(KINDS if tag == 'kind' else OBJECTIVES)}."
        case "extra_forbidden":
            of_pairs = model is EmbedStage and "data" in location
            known = PairSource if of_pairs else DataSource if {"data", "eval_data"} & set(location) else model
            names = list(known.model_fields) if known else []
            close = difflib.get_close_matches(str(location[-1]), names, n=1)
            advice = f"did you mean {close[0]}?" if close else f"the fields are {', '.join(names)}."
            return f"{prefix}there is no field {field}; {advice}"
        case "missing":
            return f"{prefix}the field {field} is missing; add it."
        case "model_type" | "model_attributes_type":
            what = "a path or a mapping with path" if location else "a mapping with kind"
            return f"{prefix}{field}{'=' if field else ''}{value!r} is not valid: it should be {what}."
        case "value_error":
            return f"{prefix}{field + ': ' if field else ''}{problem['ctx']['error']}"
        case _:
            shown = value if isinstance(value, str | int | float | bool | None) else type(value).__name__
            return f"{prefix}{field}={shown!r} is not valid: {problem['msg'][0].lower()}{problem['msg'][1:]}."
