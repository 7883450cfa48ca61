"""Write the model card from what was measured, by the template ``card.md``, and check the metadata of any card.

Nothing is guessed: the card leaves out a field that neither a file nor the publisher states.
"""

import json
import math
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from minibert.files.model_folder import check_paths, check_weights, code_files, read_header, read_settings, weight_files
from minibert.hub import folders, provenance

# The Hub's name of the task, by the ending of the class in config.json.
_TASKS = {
    "ForPreTraining": "fill-mask",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
_TEXT_TASKS = (
    *("feature-extraction", "fill-mask", "multiple-choice", "question-answering", "sentence-similarity", "summarization"),
    *("table-question-answering", "text-classification", "text-generation", "text-ranking", "token-classification"),
    *("translation", "zero-shot-classification"),
)
_ID = r"[\w.-]+(/[\w.-]+)?"
# Fields that the publisher may state: whether a text, a list of texts or either is meant, what a text must match, and the
# words for it.
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
# Fields that are found in the model's files.
_FOUND = {
    "library_name": ("text", r"[\w.-]+", "the name of a library, such as sentence-transformers"),
    "pipeline_tag": ("text", "|".join(_TEXT_TASKS), f"one of {', '.join(_TEXT_TASKS)}"),
}


def build_card(folder: str | Path, repo_id: str | None, *, origin: str | Path | None = None, **fields: Any) -> str:
    """Return the README.md of a model, made from its files and from the run that trained it.

    Args:
        folder: of the model, as training or conversion left it; its recipe and its evaluation are found next to it.
        repo_id: owner/name that it will have on the Hub; ``None`` leaves a placeholder in the examples.
        origin: the folder that training or conversion left, where ``folder`` is a copy made for publishing.
        fields: metadata that only the publisher knows, such as ``license="mit"`` or ``language=["en"]``; those in
            :data:`FIELDS`. They replace what is found.

    Raises:
        FileNotFoundError: the folder is not a finished model.
        ValueError: a field is unknown or has the wrong type, or a file of the model is damaged.
    """
    folder, repo_id = Path(folder), repo_id or "USER/NAME"
    validate_repo_id(repo_id)
    check_paths(folder)
    encoder, modules = folders.encoder_folder(folder), folders.modules(folder)
    config: dict[str, Any] = folders.read_json(encoder / "config.json")
    check_weights(encoder)
    record = provenance.read(Path(origin or folder))
    fields = {**record.fields, **fields}
    _check_fields(fields, FIELDS, others=False)
    architecture = (config.get("architectures") or ["Model"])[0]
    task = next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), "feature-extraction")
    task = "sentence-similarity" if modules else task
    title = repo_id.split("/")[-1]
    results = list(_results(record, task))
    tags = [str(config.get("model_type")), *["feature-extraction"] * bool(modules), *["custom_code"] * ("auto_map" in config)]
    found = {
        "library_name": "sentence-transformers" if modules else "transformers",
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys(source.path for source in provenance.training_data(record) if source.on_hub)) or None,
        "base_model": record.base_model,
        **fields,
        "tags": list(dict.fromkeys([*tags, *fields.get("tags", [])])),
    }
    data = ModelCardData(**found, model_name=title if results else None, eval_results=results or None)
    template = (resources.files("minibert.hub") / "card.md").read_text(encoding="utf-8")
    content = _content(folder, encoder, config, record)
    card = ModelCard.from_template(
        data,
        template_str=template,
        title=title,
        name=json.dumps(repo_id),
        task=task,
        architecture=architecture,
        pooling=_pooling(folder),
        dimension=vector_dimension(folder) if modules else None,
        labels=[_cell(name) for name in (config.get("id2label") or {}).values()] if task.endswith("-classification") else [],
        **content,
    )
    check_card(str(card))
    return str(card)


def vector_dimension(folder: Path) -> int:
    """Return how many numbers the vector of a text has, by the configurations of the modules."""
    for module in reversed(folders.modules(folder)[1:]):
        settings = read_settings(folder / module["path"] / "config.json")
        for name in ("out_features", "embedding_dimension", "word_embedding_dimension"):
            if name in settings:
                return int(settings[name])
    config = folders.read_json(folders.encoder_folder(folder) / "config.json")
    return int(config.get("hidden_size") or config.get("dim") or 0)


def longest_text(folder: Path) -> int | None:
    """Return how many tokens of a text a model reads: what its modules, its tokenizer and its positions all allow."""
    encoder = folders.encoder_folder(folder)
    config = read_settings(encoder / "config.json")
    lengths = [folders.max_length(folder), read_settings(encoder / "tokenizer_config.json").get("model_max_length")]
    if config.get("position_embedding_type") != "rotary" and config.get("max_position_embeddings"):
        numbered_from_pad = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
        lengths.append(config["max_position_embeddings"] - (config.get("pad_token_id", 1) + 1 if numbered_from_pad else 0))
    return min((int(length) for length in lengths if length and length < 1e9), default=None)


# ------------------------------------------------------------------------------------------------------------- content


def _content(folder: Path, encoder: Path, config: dict[str, Any], record: provenance.Record) -> dict[str, Any]:
    """Return values of the template that describe the model's files."""
    tensors = [tensor for file in weight_files(encoder) for tensor in read_header(file).values()]
    settings, tokenizer = (read_settings(encoder / name) for name in ("tokenizer_config.json", "tokenizer.json"))
    normalizer = json.dumps(tokenizer.get("normalizer"))
    longest = longest_text(folder)
    sizes = {
        "parameters": f"{sum(math.prod(shape) for _, shape in tensors):,}",
        "dtype": ", ".join(sorted({dtype for dtype, _ in tensors})),
        "weights": f"{sum(file.stat().st_size for file in weight_files(encoder)) / 1e6:.1f} MB",
        "vocabulary": f"{config.get('vocab_size', 0):,}",
    }
    return {
        "record": record,
        "facts": dict(_facts(record)),
        "sizes": sizes | ({"longest text": f"{longest:,} tokens"} if longest else {}),
        "layers": config.get("num_hidden_layers") or config.get("n_layers"),
        "width": config.get("hidden_size") or config.get("dim"),
        "trust": ", trust_remote_code=True" if "auto_map" in config else "",
        "code_files": [file.name for file in code_files()],
        "converted_from": (config.get("converted_from") or {}).get("model_type"),
        "max_length": longest,
        "max_seq_length": folders.max_length(folder),
        "cut_side": "beginning" if settings.get("truncation_side") == "left" else "end",
        "lowercase": '"lowercase": true' in normalizer or '"type": "Lowercase"' in normalizer,
    }


def _facts(record: provenance.Record) -> Iterator[tuple[str, str]]:
    labels = {"train_rows": "rows", "train_tokens": "tokens", "steps": "optimizer steps", "epochs": "epochs"}
    yield from ((label, f"{record.metrics[name]:,}") for name, label in labels.items() if name in record.metrics)
    if "train_seconds" in record.metrics:
        yield "time of training", f"{record.metrics['train_seconds']:,.0f} s"
    for name, value in record.environment.items():
        yield name, _cell(", ".join(map(" ".join, value.items())) if isinstance(value, dict) else value)


def _cell(value: Any) -> str:
    """Return ``value`` as text that fits into one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _pooling(folder: Path) -> dict[str, Any] | None:
    """Return how token vectors become a text's vector ("mode" and "normalize"), where a few lines of torch can say it."""
    modules = folders.modules(folder)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[1:] not in (["Pooling"], ["Pooling", "Normalize"]):
        return None
    settings = read_settings(folder / modules[1]["path"] / "config.json")
    mode = settings.get("pooling_mode") or [name for name, on in settings.items() if on is True and "pooling_mode" in name]
    mode = {("pooling_mode_mean_tokens",): "mean", ("pooling_mode_cls_token",): "cls"}.get(tuple(mode), mode)
    prompt = read_settings(folder / "config_sentence_transformers.json").get("default_prompt_name")
    return {"mode": mode, "normalize": "Normalize" in kinds} if mode in ("mean", "cls") and not prompt else None


def _results(record: provenance.Record, task: str) -> Iterator[EvalResult]:
    for evaluation in record.evaluations:
        data = evaluation.data
        for name, value in evaluation.metrics.items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type=task,
                    dataset_type=data.path,
                    dataset_name=data.path,
                    dataset_config=data.config,
                    dataset_split=data.split,
                    dataset_revision=data.revision,
                    metric_type=name,
                    metric_value=value,
                )


# --------------------------------------------------------------------------------------------------------------- check


def check_card(text: str) -> None:
    """Refuse a card whose metadata the Hub would refuse, as far as that is known without asking it.

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
        raise ValueError("The card's metadata is not a mapping; write one field: value on each line.")
    _check_fields(data, FIELDS | _FOUND)
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


def _check_fields(data: dict[str, Any], known: dict[str, tuple[str, str, str]], *, others: bool = True) -> None:
    problems = []
    for name, value in data.items():
        if name not in known:
            if not others:
                problems.append(f"there is no field {name!r}; the fields are {', '.join(known)}")
            continue
        form, pattern, words = known[name]
        listed = value if isinstance(value, list) else [value]
        wrong = (form == "text" and isinstance(value, list)) or (form == "list" and not isinstance(value, list))
        if wrong or not listed or not all(isinstance(text, str) and re.fullmatch(pattern, text) for text in listed):
            shape = {"text": "a text", "list": "a list of texts", "either": "a text or a list of texts"}[form]
            problems.append(f"{name}={value!r} should be {shape}: {words}")
    if problems:
        raise ValueError(f"The card's metadata is refused: {'; '.join(problems)}.")


def _wrong_result(result: EvalResult) -> Iterator[str]:
    for name in ("task_type", "dataset_type", "dataset_name", "metric_type"):
        if not isinstance(getattr(result, name), str) or not getattr(result, name):
            yield f"{name}={getattr(result, name)!r} should be a text"
    value = result.metric_value
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value != value:
        yield f"the value of {result.metric_type!r} is {value!r}, which should be a number"
