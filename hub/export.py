"""Export a MiniBERT as a plain transformers model with the same outputs."""

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from minibert import MiniBertConfig, modeling_minibert
from minibert.files.disk import read_json
from minibert.files.model_folder import WEIGHTS, encoder_folder
from minibert.hub import folders, parity
from minibert.hub.convert import CARRIED, POSITIONS, UNUSED, Report, empty, fitting_tokenizer, full
from minibert.hub.families import FAMILIES, POOLED, Family
from minibert.inference.load import find_folder, open_config
from minibert.modeling_minibert import sinusoidal_table

_SEGMENTS = "minibert.embeddings.token_type_embeddings.weight"


def export(model: str | Path, output_dir: str | Path, *, revision: str | None = None) -> Report:
    """Export a MiniBERT as a plain BERT model, and write the BERT model into a new folder.

    ``model`` is a folder, or the id of a model on the Hub. A MiniBERT that was converted from
    another family, such as RoBERTa, is exported as a model of that family.

    Example::

        export("my-minibert", "my-bert-again")

    Raises:
        FileNotFoundError: if the model, its weights or its tokenizer are missing.
        ValueError: if the model is not a MiniBERT, BERT cannot represent the model, the tensors
            do not match the configuration, or the output folder is not empty.
        Mismatch: if the two models have different outputs. Nothing is written then.
    """
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    folder, config, kind, checkpoint = open_minibert(model, revision)
    family = _family(config, kind)
    family_config = _config(config, family, kind)
    tokenizer = fitting_tokenizer(folder, config)
    tensors, unused = _tensors(checkpoint, encoder_folder(folder), config, family_config, family, kind)
    pooled = kind == "Model" and any("pooler" in name for name in tensors)
    with folders.new_folder(output_dir) as temporary:
        parameters = folders.write_tensors(temporary / WEIGHTS, tensors)
        family_config.save_pretrained(temporary)
        # Libraries such as CTranslate2 ask for this field, although it has its default.
        folders.set_fields(temporary / "config.json", position_embedding_type="absolute")
        folders.write_tokenizer(tokenizer, temporary)
        folders.copy_modules(folder, temporary)
        differences = parity.differences(
            (folder, getattr(modeling_minibert, f"MiniBert{kind}")),
            (temporary, getattr(transformers, family.class_name + kind)),
            f"The {family.model_type} made of {model}",
            tokenizer,
            max_length=config.max_position_embeddings,
            segments=getattr(family_config, "type_vocab_size", 0),
            pooled=pooled and config.pooling == "cls" and config.pooler_act == "tanh",
        )
    return Report(
        source=str(model),
        output=str(output_dir),
        family=family.model_type,
        architecture=f"{family.class_name}{kind}",
        tensors=len(tensors),
        parameters=parameters,
        unused=unused,
        differences=differences,
    )


def open_minibert(model: str | Path, revision: str | None) -> tuple[Path, MiniBertConfig, str, dict[str, Tensor]]:
    """Return a MiniBERT's folder, configuration, end of its class name, and tensors."""
    folder = find_folder(model, revision)
    encoder = folders.checked_encoder(folder)
    raw = read_json(encoder / "config.json")
    if raw.get("model_type") != MiniBertConfig.model_type:
        raise ValueError(f"{folder} is a {raw.get('model_type')} model; only a MiniBERT can be exported.")
    named = (raw.get("architectures") or ["MiniBertModel"])[0]
    if getattr(modeling_minibert, named, None) is None:
        raise ValueError(f"{folder} has the class {named}, which MiniBERT does not have; correct its config.json.")
    checkpoint = folders.read_tensors(encoder)
    return folder, cast(MiniBertConfig, open_config(encoder)), named.removeprefix("MiniBert"), checkpoint


def _family(config: MiniBertConfig, kind: str) -> Family:
    """Return the family of the model's origin, or BERT if the origin does not fit."""
    origin = (getattr(config, "converted_from", None) or {}).get("model_type", "bert")
    for family in (FAMILIES.get(origin, FAMILIES["bert"]), FAMILIES["bert"]):
        problems = _problems(config, kind, family)
        if not problems:
            return family
    raise ValueError(f"BERT does not support {', '.join(problems)}; export this model to ONNX (--to onnx).")


def _problems(config: MiniBertConfig, kind: str, family: Family) -> list[str]:
    wanted: dict[str, Any] = {"norm_position": "post", "gated_mlp": False, "scale_embeddings": False}
    wanted |= {name: value for name, value in family.fixed.items() if name != "pooler_act"}
    if kind in POOLED:
        wanted |= {"pooling": "cls", "pooler_act": family.fixed["pooler_act"]}
    if family.numbers_from_pad and kind == "ForMaskedLM":
        wanted["hidden_act"] = "gelu"  # the masked-word head of these families always uses it
    problems = [f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if config.position_embedding_type == "rotary":
        problems.append("position_embedding_type='rotary'")
    if kind not in family.classes:
        problems.append(f"the class MiniBert{kind}")
    if family.numbers_from_pad and config.pad_token_id is None:
        problems.append("pad_token_id=None")
    return problems


def _config(config: MiniBertConfig, family: Family, kind: str) -> PreTrainedConfig:
    origin = dict(getattr(config, "converted_from", None) or {})
    fields = origin if origin.pop("model_type", None) == family.model_type else {}
    fields |= {name: getattr(config, field) for field, name in family.fields.items()}
    fields |= {name: getattr(config, name) for name in CARRIED if getattr(config, name, None) is not None}
    if family.numbers_from_pad:
        fields["max_position_embeddings"] += config.pad_token_id + 1  # type: ignore[operator]
    if family.model_type == "distilbert" and kind in POOLED and config.classifier_dropout is not None:
        fields["seq_classif_dropout"] = config.classifier_dropout
    if "type_vocab_size" in family.fields and not config.type_vocab_size:
        fields["type_vocab_size"] = 2  # rows of zeros, since tokenizers number the segments of pairs
    return CONFIG_MAPPING[family.model_type](**fields, architectures=[family.class_name + kind], dtype=config.dtype)


def _tensors(
    checkpoint: dict[str, Tensor],
    encoder: Path,
    config: MiniBertConfig,
    family_config: PreTrainedConfig,
    family: Family,
    kind: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the exported tensors, and names of tensors that cannot be exported."""
    tied = modeling_minibert.MiniBertMaskedLMBase._tied_weights_keys if config.tie_word_embeddings else {}
    expected = {full(name, kind) for name in empty(config, kind).state_dict()} - set(tied)
    stored = {full(name, kind): name for name in checkpoint}
    if missing := [
        name for name in sorted(expected - set(stored)) if kind != "Model" or not name.startswith("minibert.pooler.")
    ]:
        raise ValueError(f"The weights do not fit MiniBert{kind}; missing: {', '.join(missing)}. Save the model again.")
    tensors: dict[str, Tensor] = {}
    left_out, unknown = [], []
    for source, name in stored.items():
        found = next((found for other in (kind, *family.classes) if (found := family.family_name(source, other))), None)
        if found is None and source not in expected:
            unknown.append(name)
        elif found is None or (found in tensors and source not in expected):
            left_out.append(name)  # for example a pooler, if the family has none
        else:
            tensors[_bare(found, kind, family)] = checkpoint[name]
    if unknown:
        raise ValueError(f"The weights do not fit MiniBert{kind}; unknown: {', '.join(unknown)}. Save the model again.")

    def plain(source: str) -> str:
        return _bare(str(family.family_name(source, kind)), kind, family)

    width = config.hidden_size
    if config.position_embedding_type == "sinusoidal":
        tensors[plain(POSITIONS)] = sinusoidal_table(config.max_position_embeddings, width)
    if "type_vocab_size" in family.fields and not config.type_vocab_size:
        tensors[plain(_SEGMENTS)] = torch.zeros(family_config.type_vocab_size, width)
    spare = folders.read_tensors(encoder, UNUSED) if (encoder / UNUSED).exists() else {}
    if family.numbers_from_pad:
        # The first rows are never used. They are copied from the source, or zeros.
        rows, count = tensors[plain(POSITIONS)], family_config.pad_token_id + 1
        first = spare.get(f"{family.prefix}.embeddings.position_embeddings.weight", rows[:0])
        if len(first) != count:
            first = rows.new_zeros(count, width)
        tensors[plain(POSITIONS)] = torch.cat([first.to(rows.dtype), rows])
    for name, tensor in spare.items():
        tensors.setdefault(_bare(name, kind, family), tensor)
    return tensors, left_out


def _bare(name: str, kind: str, family: Family) -> str:
    return name.removeprefix(f"{family.prefix}.") if kind == "Model" else name
