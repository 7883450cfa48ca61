"""Write docs/training.md: every field of a recipe, from the models that check it. Run it as python docs/fields.py."""

import re
from collections.abc import Sequence
from inspect import cleandoc
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from minibert.train import arguments

PAGE = Path(__file__).with_name("training.md")
HEAD = """# Training: recipes and their fields

A recipe is a YAML file: a name and a list of stages, run in order by `minibert train RECIPE.yaml [stage.field=value …]`.
A run lives in `runs/<name>/`: a copy of the recipe, and one folder per stage (`1-tokenizer/`, `2-embed/`, …) that is a
complete model with `metrics.json`, `log.jsonl` and `checkpoints/`. The next run skips finished stages and continues an
interrupted one at its last checkpoint. A recipe whose fields changed is refused with the list of changes unless `--force` is
given; finished results then stay in `N-name.replaced` until the run is finished. Under torchrun the same command uses all
processes: each holds the complete model, and they share the data. Checkpoints are protected against kills, crashes and full
disks; a file that is missing or cut short is found and the checkpoint before it used, a flipped bit is not found. A loss that
is not a number stops the run.

Before the first stage trains, the data of all stages are read and checked. Each stage prints which columns it uses
and the first row as it understands it; `metrics.json` records both as `data`. Data are files of the kinds `.parquet`,
`.jsonl`, `.json`, `.csv`, `.tsv` and `.txt`, folders of them, data sets on the Hub, or a pipe. A name is never a
pattern. A column has one type in all rows, and a column without one is left out with a warning. Columns of CSV may
also be separated by semicolons or tabs, which is said; a quotation mark in TSV is a character.

This page is made by `python docs/fields.py` from the models that check a recipe.
"""
LOSSES = """
The loss chooses the columns. It is a class of sentence-transformers, and padding is not computed with any of them.

| `loss` | columns | learns |
| --- | --- | --- |
| `mnrl`, `cached_mnrl` | query, passage; `negative_column` if given | passages of other rows of the batch are wrong |
| `gist`, `cached_gist` | the same | the same, without passages that the `guide` finds closer than the right one |
| `cosent`, `angle` | two sentences, score | the order of the scores, so their range does not matter |
| `cosine_mse` | two sentences, score from -1 to 1 | the cosine is the score |
| `triplet` | query, positive, negative | the positive is closer than the negative by `triplet_margin` |
| `margin_mse` | query, positive, negative, score | the positive beats the negative by the score, that of a teacher |

The temperature of `gist` is 1 / `scale`. A `teacher` computes the scores of `margin_mse`. `triplet`, and `margin_mse` with a
`teacher`, also take negatives that `hard_negatives` mines. Any loss trains the prefixes in `matryoshka_dims`, and each is
measured (`spearman_64d`). Pairs with scores need nothing but their file:

```yaml
  - {kind: embed, model: MODEL, loss: cosent, data: sts/train.csv, eval_data: sts/validation.csv}
```

Sources may have a loss each. A batch then comes from one source, and `columns` renames what its loss would not find.
`metric_for_best` says what `eval_data` holds, so questions may be trained on and sentence pairs measured:

```yaml
  - kind: embed
    model: MODEL
    data: [questions.jsonl, {path: sts/train.csv, loss: cosent}]
    eval_data: sts/validation.csv
    metric_for_best: spearman
    query_prompt: "query: "        # before queries, in training, mining, evaluation and encode_query
    passage_prompt: "passage: "    # before passages; sentences of scored pairs have none
```
"""
SHARED = (arguments.Stage, arguments.ModelStage, arguments.TrainStage)


def page() -> str:
    """The whole page as Markdown."""
    stages = [
        model
        for model in vars(arguments).values()
        if isinstance(model, type) and issubclass(model, arguments.Stage) and model not in SHARED
    ]
    parts = [HEAD, section("Recipe", arguments.Recipe), section("A source of data", arguments.DataSource)]
    parts.append(section("Every stage", arguments.ModelStage))
    for model in stages:
        if issubclass(model, arguments.DistillStage) and model is not arguments.DistillStage:
            name = model.__annotations__["objective"].__args__[0]
            parts.append(section(f"Stage `distill`, objective `{name}`", model, [arguments.DistillStage]))
            continue
        extra = " It also has the fields of a training loop, below." if issubclass(model, arguments.LoopArguments) else ""
        shared = [arguments.Stage, arguments.ModelStage, arguments.LoopArguments]
        parts.append(section(f"Stage `{model.__annotations__['kind'].__args__[0]}`", model, shared, note=extra))
        if model is arguments.EmbedStage:
            parts.append(LOSSES)
    parts.append(section("The training loop", arguments.LoopArguments))
    return "\n".join(parts)


def section(title: str, model: type[BaseModel], bases: Sequence[type[BaseModel]] = (), note: str = "") -> str:
    """Return the table of the fields of ``model``, without those of its ``bases`` that have the same description there."""
    inherited = {
        name: field.description for base in bases if issubclass(model, base) for name, field in base.model_fields.items()
    }
    prose, _, _ = cleandoc(model.__doc__ or "").partition(">>>")
    lines = [
        f"## {title}",
        "",
        f"{prose.strip()}{note}",
        "",
        "| field | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in model.model_fields.items():
        if name not in inherited or field.description != inherited[name]:
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
