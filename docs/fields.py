"""Write docs/training.md: every field of a recipe, from the models that check it. Run: python docs/fields.py"""

import re
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from minibert.train import arguments

PAGE = Path(__file__).with_name("training.md")
HEAD = """# Training: recipes and their fields

A recipe is a YAML file: a name and a list of stages, run in order by `minibert train RECIPE.yaml [stage.field=value …]`.
A run lives in `runs/<name>/`: a copy of the recipe, and one folder per stage (`1-tokenizer/`, `2-embed/`, …) that is a
complete model with `metrics.json`, `log.jsonl` and `checkpoints/`. Finished stages are skipped on the next run; an
interrupted one continues at its last checkpoint; a recipe whose fields changed is refused with the list of changes unless
`--force` is given; results that were finished then lie in `N-name.replaced` until the run is. Under torchrun the same command
uses all processes.

This page is made by `python docs/fields.py` from the models that check a recipe.
"""
SHARED = (arguments.Stage, arguments.ModelStage, arguments.LoopArguments)


def page() -> str:
    """The whole page as Markdown."""
    stages = [
        model
        for model in vars(arguments).values()
        if isinstance(model, type) and issubclass(model, arguments.Stage) and model not in SHARED
    ]
    parts = [HEAD, section("Recipe", arguments.Recipe), section("A source of data", arguments.DataSource)]
    parts.append(section("Every stage", arguments.ModelStage, drop={"kind"}))
    shared = set(arguments.ModelStage.model_fields) | set(arguments.LoopArguments.model_fields)
    for model in stages:
        if issubclass(model, arguments.DistillStage) and model is not arguments.DistillStage:
            name = model.__annotations__["objective"].__args__[0]
            parts.append(section(f"Stage `distill`, objective `{name}`", model, set(arguments.DistillStage.model_fields)))
            continue
        extra = " It also has the fields of a training loop, below." if issubclass(model, arguments.LoopArguments) else ""
        parts.append(section(f"Stage `{model.__annotations__['kind'].__args__[0]}`", model, drop=shared, note=extra))
    parts.append(section("The training loop", arguments.LoopArguments))
    return "\n".join(parts)


def section(title: str, model: type[BaseModel], drop: set[str] | frozenset[str] = frozenset(), note: str = "") -> str:
    lines = [
        f"## {title}",
        "",
        f"{(model.__doc__ or '').strip().split(chr(10) * 2)[0]}{note}",
        "",
        "| field | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in model.model_fields.items():
        if name not in drop:
            default = (
                "required"
                if field.default in (PydanticUndefined, "")
                else f"`{'unset' if field.default is None else field.default}`"
            )
            meaning = re.sub(r"\s+", " ", field.description or "").replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
