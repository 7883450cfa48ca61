"""Write model cards, and check the metadata of existing cards.

The values of a card come from the model's files, the training record and the publisher.
Unknown fields are left out. The template is ``card.md``.
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
from huggingface_hub.utils import validate_repo_id

from minibert.files.disk import read_json, read_settings
from minibert.files.model_folder import check_weights, code_files, encoder_folder, module_list, read_header, weight_files
from minibert.hub import folders, provenance
from minibert.inference.load import pooling_mode

# Ending of the class name in config.json -> name of the task on the Hub.
_TASKS = {
    "ForPreTraining": "fill-mask",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
}
_ID = r"[\w.-]+(/[\w.-]+)?"
# Fields that the publisher may set -> (pattern of a valid text, description for messages).
FIELDS = {
    "license": (r"[a-z0-9][a-z0-9.+-]*", "the Hub's id of a licence, such as mit or apache-2.0"),
    "license_name": (r".+", "a name"),
    "license_link": (r".+", "an address or a file of the repository"),
    "language": (r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", "codes of languages such as en or de"),
    "datasets": (_ID, "ids of data sets on the Hub, such as owner/name"),
    "base_model": (_ID, "ids of models on the Hub, such as owner/name"),
    "tags": (r".+", "words"),
}


def build_card(folder: str | Path, repo_id: str | None, *, origin: str | Path | None = None, **fields: Any) -> str:
    """Return the text of a README.md that describes the model in ``folder``.

    ``origin`` is the folder with the record of the model's training or conversion. The default
    is ``folder``. If ``repo_id`` is None, examples use a placeholder. ``fields`` are metadata
    such as ``license="mit"``, and replace metadata from files. :data:`FIELDS` lists the names.
    """
    folder, repo_id = Path(folder), repo_id or "USER/NAME"
    validate_repo_id(repo_id)
    encoder, modules = folders.checked_encoder(folder), module_list(folder)
    config: dict[str, Any] = read_json(encoder / "config.json")
    check_weights(encoder)
    record = provenance.read(Path(origin or folder))
    fields = {**record.fields, **fields}
    if unknown := ", ".join(sorted(fields.keys() - FIELDS.keys())):
        raise ValueError(f"The card has no field {unknown}; its fields are {', '.join(FIELDS)}.")
    _check_fields(fields)
    architecture = (config.get("architectures") or ["Model"])[0]
    task = next((task for ending, task in _TASKS.items() if architecture.endswith(ending)), "feature-extraction")
    task = "sentence-similarity" if modules else task
    title = repo_id.split("/")[-1]
    results = list(_results(record, task))
    trained = [source for stage in record.stages if stage.kind != "tokenizer" for source in stage.data]
    tags = [str(config.get("model_type"))]
    tags += ["feature-extraction"] * bool(modules) + ["custom_code"] * ("auto_map" in config)
    found = {
        "library_name": "sentence-transformers" if modules else "transformers",
        "pipeline_tag": task,
        "datasets": list(dict.fromkeys(source.path for source in trained if source.revision)) or None,
        "base_model": record.base_model,
        **fields,
        "tags": list(dict.fromkeys([*tags, *_listed(fields.get("tags", []))])),
    }
    data = ModelCardData(**found, model_name=title if results else None, eval_results=results or None)
    template = (resources.files("minibert.hub") / "card.md").read_text(encoding="utf-8")
    return str(
        ModelCard.from_template(
            data,
            template_str=template,
            title=title,
            name=json.dumps(repo_id),
            task=task,
            architecture=architecture,
            pooling=_pooling(folder),
            dimension=vector_dimension(folder) if modules else None,
            labels=list(map(_cell, config.get("id2label", {}).values())) if task.endswith("-classification") else [],
            **_content(folder, encoder, config, record),
        )
    )


def vector_dimension(folder: Path) -> int:
    """Return the dimension of text vectors, read from configuration files."""
    for module in reversed(module_list(folder)[1:]):
        settings = read_settings(folder / module["path"] / "config.json")
        for name in ("out_features", "embedding_dimension", "word_embedding_dimension"):
            if name in settings:
                return int(settings[name])
    config = read_json(encoder_folder(folder) / "config.json")
    return int(config.get("hidden_size") or config.get("dim") or 0)


def longest_text(folder: Path) -> int | None:
    """Return a model's maximum sequence length in tokens, or None if it is unlimited."""
    encoder = encoder_folder(folder)
    config = read_settings(encoder / "config.json")
    lengths = [folders.max_length(folder), read_settings(encoder / "tokenizer_config.json").get("model_max_length")]
    if config.get("position_embedding_type") != "rotary" and config.get("max_position_embeddings"):
        numbered_from_pad = config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
        unused = config.get("pad_token_id", 1) + 1 if numbered_from_pad else 0
        lengths.append(config["max_position_embeddings"] - unused)
    return min((int(length) for length in lengths if length and length < 1e9), default=None)


def _content(folder: Path, encoder: Path, config: dict[str, Any], record: provenance.Record) -> dict[str, Any]:
    """Return the values of the card that describe the model's files."""
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
    """Return ``value`` as text for one cell of a Markdown table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _pooling(folder: Path) -> dict[str, Any] | None:
    """Return the pooling settings of the torch example, or None to omit it."""
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in module_list(folder)]
    if kinds[1:] not in (["Pooling"], ["Pooling", "Normalize"]):
        return None
    mode = pooling_mode(folder)
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


def check_card(text: str) -> None:
    """Raise ValueError if the metadata in a README.md is invalid."""
    try:
        data = ModelCard(text).data.to_dict()  # reads the results in model-index too
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The card's metadata cannot be read; correct it: {' '.join(str(error).split())}.") from error
    if not data:
        raise ValueError("The card has no metadata: README.md must begin with YAML between two '---' lines.")
    _check_fields(data)


def _check_fields(data: dict[str, Any]) -> None:
    problems = []
    for name, (pattern, words) in FIELDS.items():
        texts = _listed(data.get(name))
        valid = [text for text in texts if isinstance(text, str) and re.fullmatch(pattern, text)]
        if name in data and (not texts or len(valid) < len(texts)):
            problems.append(f"{name}={data[name]!r} should be {words}")
    if problems:
        raise ValueError(f"The card's metadata is invalid: {'; '.join(problems)}.")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
