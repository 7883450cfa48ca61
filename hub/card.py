"""The model card: a template filled with what was measured, and a check of any card's metadata.

Nothing in it is guessed: a field that nobody stated and no file records is left out.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from minibert.files.model_folder import check_paths, check_weights, code_files, read_header, weight_files
from minibert.hub import folders, provenance

# Ending of the class in config.json: the Hub's name of the task, what the model is good for, and what it is not.
_TASKS = {
    "embed": (
        "sentence-similarity",
        "Vectors of texts whose cosine says how much the texts are alike: search, clustering, finding duplicates.",
        "deciding about people; texts of a kind or language that it was not trained on, before you measured it on yours.",
    ),
    "Model": (
        "feature-extraction",
        "A vector for every token, to train something on.",
        "use as it is: it has no task of its own.",
    ),
    "ForPreTraining": (
        "fill-mask",
        "A start for fine-tuning; it fills in masked words.",
        "use as it is, or as a source of facts.",
    ),
    "ForMaskedLM": (
        "fill-mask",
        "A start for fine-tuning; it fills in masked words.",
        "use as it is, or as a source of facts.",
    ),
    "ForSequenceClassification": (
        "text-classification",
        "Classifying texts like those it was trained on.",
        "other classes than its own, and decisions about people: it always answers, also about texts unlike any it has seen.",
    ),
    "ForTokenClassification": (
        "token-classification",
        "Tagging words of texts like those it was trained on.",
        "other tags than its own, and decisions about people.",
    ),
    "ForQuestionAnswering": (
        "question-answering",
        "Finding the answer to a question in a text that is given with it.",
        "questions without a text: it holds no knowledge, and finds a span in any text.",
    ),
    "ForMultipleChoice": (
        "multiple-choice",
        "Choosing one of several answers or endings.",
        "answers that need knowledge which is not in the texts.",
    ),
}
_PIPELINES = sorted(
    {tag for tag, *_ in _TASKS.values()}
    | {
        "summarization",
        "table-question-answering",
        "text-generation",
        "text-ranking",
        "translation",
        "zero-shot-classification",
    }
)


def build_card(
    folder: str | Path, repo_id: str | None, *, dtype: str | None = None, origin: str | Path | None = None, **fields: Any
) -> str:
    """The README.md of a model, from its files and from the run that trained it.

    Args:
        folder: of the model, as training or conversion left it: recipe and evaluation are found beside it.
        repo_id: owner/name that it will have on the Hub; ``None`` leaves a placeholder in the examples.
        dtype: of the published weights, where it is not that of the folder's, such as ``"bfloat16"``.
        origin: the folder that training or conversion left, where ``folder`` is what publishing made of it.
        fields: metadata that only the publisher knows, such as ``license="mit"`` or ``language=["en"]``; those in
            :data:`FIELDS`. They replace what is found.

    Raises:
        FileNotFoundError: the folder is no finished model.
        ValueError: a field is unknown or has the wrong type, or a file of the model is damaged.
    """
    folder = Path(folder)
    _check_fields(fields, known_only=True)
    if repo_id is not None:
        validate_repo_id(repo_id)
    model = _Model(folder, repo_id or "USER/NAME", dtype, Path(origin or folder))
    _check_fields(model.record.fields, known_only=True)
    fields = {**model.record.fields, **fields}
    template = resources.files("minibert.hub") / "card.md"
    card = ModelCard.from_template(
        _metadata(model, fields),
        template_str=template.read_text(encoding="utf-8"),
        title=model.name,
        summary=model.summary(),
        purpose=model.task[1],
        not_for=model.task[2],
        snippets=list(_snippets(model)),
        code_note=_code_note(model),
        training=_training(model),
        facts=list(_facts(model)),
        recipe=(model.record.recipe or "").rstrip(),
        tables=[_table(evaluation) for evaluation in model.record.evaluations],
        sizes=list(model.sizes()),
        limits=list(_limits(model)),
    )
    text = str(card)
    check_card(text)
    return text


# ----------------------------------------------------------------------------------------------------------- the model


class _Model:
    """What the files of a model say about it."""

    def __init__(self, folder: Path, repo_id: str, dtype: str | None, origin: Path):
        check_paths(folder)
        self.folder, self.repo_id, self.name = folder, repo_id, repo_id.split("/")[-1]
        self.modules = folders.modules(folder)
        self.encoder = folders.encoder_folder(folder)
        self.config: dict[str, Any] = folders.read_json(self.encoder / "config.json")
        architecture = (self.config.get("architectures") or ["Model"])[0]
        self.kind = (
            "embed" if self.modules else next((kind for kind in list(_TASKS)[2:] if architecture.endswith(kind)), "Model")
        )
        self.architecture = architecture
        self.task = _TASKS[self.kind]
        self.record = provenance.read(origin)
        check_weights(self.encoder)
        self.tensors = {name: entry for file in weight_files(self.encoder) for name, entry in read_header(file).items()}
        settings = self.encoder / "tokenizer_config.json"
        self.tokenizer: dict[str, Any] = folders.read_json(settings) if settings.exists() else {}

    @property
    def trusts(self) -> str:
        """What every opening function is given besides the name, where the model brings code."""
        return ", trust_remote_code=True" if "auto_map" in self.config else ""

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens; None where nothing says."""
        found = [folders.max_length(self.folder), self.tokenizer.get("model_max_length")]
        if self.config.get("position_embedding_type") != "rotary":
            found.append(self.config.get("max_position_embeddings"))
        return min((int(length) for length in found if length and length < 1e9), default=None)

    def summary(self) -> str:
        config, width = self.config, self.config.get("hidden_size") or self.config.get("dim")
        layers = config.get("num_hidden_layers") or config.get("n_layers")
        what = f"`{self.architecture}`: {layers} layer{'s' * (layers != 1)} of width {width}"
        does = f"turns texts into vectors of {self.dimension} numbers" if self.modules else f"does {self.task[0]}"
        labels = [_cell(name) for name in (config.get("id2label") or {}).values()] if self.kind in _LABELLED else []
        shown = f" Its labels: {', '.join(labels[:20])}{' and others' * (len(labels) > 20)}." if labels else ""
        return f"A text encoder, {what}, that {does}.{shown}"

    @property
    def dimension(self) -> int:
        """Numbers in a vector of a text."""
        for module in reversed(self.modules[1:]):
            file = self.folder / module["path"] / "config.json"
            found = folders.read_json(file) if file.exists() else {}
            for name in ("out_features", "embedding_dimension", "word_embedding_dimension"):
                if name in found:
                    return int(found[name])
        return int(self.config.get("hidden_size") or self.config.get("dim") or 0)

    def pooling(self) -> dict[str, Any] | None:
        """How token vectors become one, where a few lines of torch can say it: "mode" and "normalize"; else None."""
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in self.modules]
        if kinds[1:] not in (["Pooling"], ["Pooling", "Normalize"]):
            return None
        settings = folders.read_json(self.folder / self.modules[1]["path"] / "config.json")
        mode = settings.get("pooling_mode") or [name for name, on in settings.items() if on is True and "pooling_mode" in name]
        mode = {("pooling_mode_mean_tokens",): "mean", ("pooling_mode_cls_token",): "cls"}.get(tuple(mode), mode)
        overall = self.folder / "config_sentence_transformers.json"
        prompt = folders.read_json(overall).get("default_prompt_name") if overall.exists() else None
        return {"mode": mode, "normalize": "Normalize" in kinds} if mode in ("mean", "cls") and not prompt else None

    def sizes(self) -> Iterator[tuple[str, str]]:
        yield "parameters", f"{sum(math.prod(shape) for _, shape in self.tensors.values()):,}"
        yield "numbers", ", ".join(sorted({dtype for dtype, _ in self.tensors.values()}))
        yield "weights", f"{sum(file.stat().st_size for file in weight_files(self.encoder)) / 1e6:.1f} MB"
        yield "vocabulary", f"{self.config.get('vocab_size', 0):,}"
        if self.max_length:
            yield "longest text", f"{self.max_length:,} tokens"


_LABELLED = ("ForSequenceClassification", "ForTokenClassification")


# ------------------------------------------------------------------------------------------------------------ metadata


def _metadata(model: _Model, fields: dict[str, Any]) -> ModelCardData:
    data = list(model.record.data())
    tags = ["minibert"] if model.config.get("model_type") == "minibert" else [str(model.config.get("model_type"))]
    tags += ["feature-extraction"] * bool(model.modules) + ["custom_code"] * bool(model.trusts)
    found: dict[str, Any] = {
        "library_name": "sentence-transformers" if model.modules else "transformers",
        "pipeline_tag": model.task[0],
        "tags": tags,
        "datasets": list(dict.fromkeys(source["path"] for source in data if source.get("on_hub"))) or None,
        "base_model": model.record.base_model,
    }
    found |= fields
    found["tags"] = list(dict.fromkeys([*tags, *(fields.get("tags") or [])]))
    results = list(_results(model))
    return ModelCardData(**found, model_name=model.name if results else None, eval_results=results or None)


def _results(model: _Model) -> Iterator[EvalResult]:
    seen = set()
    for evaluation in reversed(model.record.evaluations):  # a stage that evaluates measures with more care than training
        data = evaluation.data
        for name, value in evaluation.systems["model"].items():
            key = (data["path"], data.get("config"), data.get("split"), name)
            if key in seen or not math.isfinite(value):
                continue
            seen.add(key)
            yield EvalResult(
                task_type=model.task[0],
                dataset_type=data["path"],
                dataset_name=data["path"],
                dataset_config=data.get("config"),
                dataset_split=data.get("split"),
                dataset_revision=data.get("revision"),
                metric_type=name,
                metric_value=value,
            )


# ----------------------------------------------------------------------------------------------------------- sentences


def _training(model: _Model) -> str:
    known = model.record
    if not known.stages:
        family = (model.config.get("converted_from") or {}).get("model_type")
        origin = f" from `{known.base_model}`" if known.base_model else ""
        if family:
            return f"It was not trained: its weights were converted{origin} ({family}), and compute the same."
        return "No recipe is on record for this model."
    parts = [f"`{stage['name']}` ({stage['kind']}) on {_sources(stage.get('data', []))}" for stage in known.stages]
    begun = f"from `{known.base_model}`" if known.base_model else "from new weights"
    taught = f" Its teacher was `{known.teacher}`." if known.teacher else ""
    if not known.base_model and not isinstance(_first(known.stages).get("model"), dict):
        begun = "from weights of a local folder"
    return f"By a recipe of MiniBERT, {begun}, in these stages: {'; '.join(parts)}.{taught}"


def _first(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return next((stage for stage in stages if stage["kind"] != "tokenizer"), {})


def _sources(sources: list[dict[str, Any]]) -> str:
    names = []
    for source in sources:
        name = f"`{provenance.public_name(source['path'], known=source.get('on_hub', False))}`"
        name += f" {source['config']}" if source.get("config") else ""
        name += f", split {source['split']}" if source.get("split") else ""
        names.append(name + (f" at {source['revision']}" if source.get("revision") else ""))
    return " and ".join(names) or "no data"


def _facts(model: _Model) -> Iterator[tuple[str, str]]:
    metrics, environment = model.record.metrics, model.record.environment
    for name, label in (("train_rows", "rows"), ("train_tokens", "tokens"), ("steps", "optimizer steps"), ("epochs", "epochs")):
        if isinstance(metrics.get(name), int | float):
            yield label, f"{metrics[name]:,}"
    if isinstance(metrics.get("train_seconds"), int | float):
        yield "time of training", f"{metrics['train_seconds']:,.0f} s"
    for name, label in (
        ("accelerator", "accelerator"),
        ("processor", "processor"),
        ("cores", "cores"),
        ("processes", "processes"),
    ):
        if environment.get(name):
            yield label, _cell(environment[name])
    if versions := environment.get("versions"):
        yield "versions", _cell(", ".join(f"{name} {version}" for name, version in versions.items()))


def _table(evaluation: provenance.Evaluation) -> dict[str, Any]:
    systems = list(evaluation.systems)
    names = list(evaluation.systems["model"])
    rows = [[f"`{name}`", *(_number(evaluation.systems[system].get(name)) for system in systems)] for name in names]
    counted = ", ".join(f"{count:,} {what}" for what, count in evaluation.rows.items())
    head = f"On {_sources([evaluation.data])}{f' ({counted})' if counted else ''}:"
    return {"head": head, "systems": [{"model": "this model"}.get(system, system) for system in systems], "rows": rows}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _limits(model: _Model) -> Iterator[str]:
    if model.max_length:
        side = "beginning" if model.tokenizer.get("truncation_side") == "left" else "end"
        yield f"Of texts longer than {model.max_length:,} tokens the {side} is not read."
    tokenizer = model.encoder / "tokenizer.json"
    normalizer = folders.read_json(tokenizer).get("normalizer") if tokenizer.exists() else None
    if '"lowercase": true' in json.dumps(normalizer) or '"type": "Lowercase"' in json.dumps(normalizer):
        yield "Upper and lower case are the same to it."
    if model.kind in _LABELLED and model.config.get("id2label"):
        yield f"It knows its {len(model.config['id2label'])} labels and no others."
    measured = list(dict.fromkeys(f"`{evaluation.data['path']}`" for evaluation in model.record.evaluations))
    yield (
        f"It was measured on {', '.join(measured)} alone; " if measured else "It was not measured; "
    ) + "what it does with other texts and languages, and whom it treats unfairly, is not known."


def _code_note(model: _Model) -> str:
    if not model.trusts:
        return ""
    files = ", ".join(f"`{file.name}`" for file in code_files())
    return f"`trust_remote_code=True` runs code of this repository ({files}); read it first, and pin that with `revision=`."


def _cell(value: Any) -> str:
    """``value`` in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


# ------------------------------------------------------------------------------------------------------------ examples


def _snippets(model: _Model) -> Iterator[tuple[str, str]]:
    name, trust = json.dumps(model.repo_id), model.trusts
    if model.modules:
        yield (
            "sentence-transformers",
            (
                "from sentence_transformers import SentenceTransformer\n\n"
                f"model = SentenceTransformer({name}{trust})\n"
                'vectors = model.encode(["How do I sort a list?", "Put a list in order.", "It is raining."])\n'
                "print(model.similarity(vectors, vectors))"
            ),
        )
        if pooling := model.pooling():
            yield "transformers", _embed_snippet(name, trust, pooling, folders.max_length(model.folder))
        return
    yield "transformers", _EXAMPLES[model.task[0]](name, trust)


def _embed_snippet(name: str, trust: str, pooling: dict[str, Any], max_length: int | None) -> str:
    longest = f", max_length={max_length}" if max_length else ""
    mean = 'mask = batch["attention_mask"].unsqueeze(-1)\nvectors = (hidden * mask).sum(1) / mask.sum(1)\n'
    return (
        _opening("AutoModel", name, trust)
        + 'texts = ["How do I sort a list?", "Put a list in order.", "It is raining."]\n'
        + f'batch = tokenizer(texts, padding=True, truncation=True{longest}, return_tensors="pt")\n'
        + "with torch.inference_mode():\n    hidden = model(**batch).last_hidden_state  # (texts, tokens, width)\n"
        + (mean if pooling["mode"] == "mean" else "vectors = hidden[:, 0]\n")
        + ("vectors = torch.nn.functional.normalize(vectors, dim=-1)\n" if pooling["normalize"] else "")
        + "print(vectors @ vectors.T)"
    )


def _opening(auto_class: str, name: str, trust: str) -> str:
    return (
        f"import torch\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name}{trust})\n"
        f"model = {auto_class}.from_pretrained({name}{trust}).eval()\n"
    )


def _pipeline(task: str, name: str, trust: str, call: str, options: str = "") -> str:
    return f'from transformers import pipeline\n\nrun = pipeline("{task}", model={name}{trust}{options})\nprint(run({call}))'


def _features(name: str, trust: str) -> str:
    return (
        _opening("AutoModel", name, trust)
        + 'batch = tokenizer(["How do I sort a list?"], return_tensors="pt")\n'
        + "with torch.inference_mode():\n    print(model(**batch).last_hidden_state.shape)  # (texts, tokens, width)"
    )


def _answer(name: str, trust: str) -> str:
    return (
        _opening("AutoModelForQuestionAnswering", name, trust)
        + 'question, text = "Who wrote it?", "The book was written by Anna Weber in 1931."\n'
        + 'batch = tokenizer(question, text, truncation="only_second", return_tensors="pt")\n'
        + "with torch.inference_mode():\n    output = model(**batch)\n"
        + "scores = (output.start_logits[0, :, None] + output.end_logits[0, None, :]).triu()\n"
        + "context = torch.tensor([at == 1 for at in batch.sequence_ids(0)])\n"
        + 'scores = scores.masked_fill(~(context[:, None] & context[None, :]).triu(), float("-inf"))\n'
        + "start, end = divmod(int(scores.argmax()), len(scores))\n"
        + 'print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))'
    )


def _choose(name: str, trust: str) -> str:
    return (
        _opening("AutoModelForMultipleChoice", name, trust)
        + 'question, choices = "It rains, so we take", ["an umbrella.", "a spoon."]\n'
        + 'batch = tokenizer([question] * len(choices), choices, padding=True, truncation=True, return_tensors="pt")\n'
        + "with torch.inference_mode():\n"
        + "    scores = model(**{key: value.unsqueeze(0) for key, value in batch.items()}).logits[0]\n"
        + "print(choices[int(scores.argmax())])"
    )


_EXAMPLES: dict[str, Callable[[str, str], str]] = {
    "feature-extraction": _features,
    "fill-mask": lambda name, trust: _pipeline("fill-mask", name, trust, 'f"It is {run.tokenizer.mask_token} today."'),
    "text-classification": lambda name, trust: _pipeline(
        "text-classification", name, trust, '"I would watch it again.", top_k=None'
    ),
    "token-classification": lambda name, trust: _pipeline(
        "token-classification", name, trust, '"Anna Weber lives in Bern."', ', aggregation_strategy="simple"'
    ),
    "question-answering": _answer,
    "multiple-choice": _choose,
}


# --------------------------------------------------------------------------------------------------------------- check

_ID = r"[\w.-]+(/[\w.-]+)?"
# Fields of a card that the publisher may give: whether one text or a list of them is meant (or either), what a text must
# match, and the words for it.
FIELDS: dict[str, tuple[str, str, str]] = {
    "license": ("either", r"[a-z0-9][a-z0-9.+-]*", "the Hub's id of a licence, such as mit or apache-2.0"),
    "license_name": ("text", r".+", "a name"),
    "license_link": ("text", r".+", "an address or a file of the repository"),
    "language": ("either", r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", "codes of languages such as en or de"),
    "datasets": ("either", _ID, "ids of data sets on the Hub, such as owner/name"),
    "base_model": ("either", _ID, "ids of models on the Hub, such as owner/name"),
    "base_model_relation": ("text", r"adapter|finetune|merge|quantized", "adapter, finetune, merge or quantized"),
    "tags": ("list", r".+", "words"),
    "metrics": ("list", r".+", "names of metrics"),
}
_FOUND = {
    "library_name": ("text", r"[\w.-]+", "the name of a library, such as sentence-transformers"),
    "pipeline_tag": ("text", "|".join(_PIPELINES), f"one of {', '.join(_PIPELINES)}"),
}


def check_card(text: str) -> None:
    """Refuse a card whose metadata the Hub would not take, as far as that can be told without asking it.

    Args:
        text: of README.md: metadata in YAML between two lines ---, then Markdown.

    Raises:
        ValueError: naming the field, what it holds and what is allowed.
    """
    block = REGEX_YAML_BLOCK.search(text)
    if not block:
        raise ValueError("The card has no metadata: README.md must begin with YAML between two lines ---.")
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        raise ValueError(f"The card's metadata is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError("The card's metadata is no mapping of fields; write one field: value on each line.")
    _check_fields(data)
    try:
        found = ModelCard(text).data
        results = found.eval_results if isinstance(found, ModelCardData) else None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The card's model-index cannot be read ({' '.join(str(error).split())}); it is a list of name and results, each "
            "with task, dataset and metrics."
        ) from error
    problems = [problem for result in results or () for problem in _wrong_result(result)]
    if problems:
        raise ValueError(f"The card's model-index is refused: {'; '.join(dict.fromkeys(problems))}.")


def _check_fields(data: dict[str, Any], *, known_only: bool = False) -> None:
    problems = []
    for name, value in data.items():
        if name not in (FIELDS if known_only else FIELDS | _FOUND):
            if known_only:
                problems.append(f"there is no field {name!r}; the fields are {', '.join(FIELDS)}")
            continue
        form, pattern, words = (FIELDS | _FOUND)[name]
        listed = value if isinstance(value, list) else [value]
        wrong = isinstance(value, list) if form == "text" else not isinstance(value, list) if form == "list" else False
        if wrong or not listed or not all(isinstance(one, str) and re.fullmatch(pattern, one) for one in listed):
            shape = {"text": "a text", "list": "a list of texts", "either": "a text or a list of texts"}[form]
            problems.append(f"{name}={value!r} should be {shape}: {words}")
    if problems:
        raise ValueError(f"The card's metadata is refused: {'; '.join(problems)}.")


def _wrong_result(result: EvalResult) -> Iterator[str]:
    for name in ("task_type", "dataset_type", "dataset_name", "metric_type"):
        if not isinstance(getattr(result, name), str) or not getattr(result, name):
            yield f"{name}={getattr(result, name)!r} should be a text"
    for name in ("dataset_config", "dataset_split", "dataset_revision", "metric_name"):
        if not isinstance(getattr(result, name), str | None):
            yield f"{name}={getattr(result, name)!r} should be a text"
    value = result.metric_value
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | str)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        yield f"the value of {result.metric_type!r} is {value!r}, which should be a number"
