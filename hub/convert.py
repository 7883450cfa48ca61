"""Convert a BERT-family model into a MiniBERT with the same weights and the same outputs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from minibert import MiniBertConfig, modeling_minibert
from minibert.files.disk import expand_home, read_json, write_json
from minibert.files.model_folder import WEIGHTS, encoder_folder
from minibert.hub import folders, parity
from minibert.hub.families import FAMILIES, POOLED, Family
from minibert.inference.load import find_folder, fingerprint, open_config, open_tokenizer

# File with the tensors of the source that a MiniBERT does not use. They keep their names, so
# that an export can write them back.
UNUSED = "converted_from.safetensors"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
POSITIONS = "minibert.embeddings.position_embeddings.weight"
# Fields of a configuration that are copied unchanged.
CARRIED = (
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
    *("sentence_transformers", "sbert_ce_default_activation_function"),
    "output_hidden_states",  # which modules such as WeightedLayerPooling read
)
# Fields that do not affect the outputs, or that a conversion sets itself.
_DROPPED = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "num_labels"),
    *("_attn_implementation_internal", "gradient_checkpointing", *folders.OF_A_MACHINE),
)


@dataclass
class Report:
    """Store the result of a conversion or an export.

    Attributes:
        family: ``"onnx"``, or the BERT family that was read or written, such as ``"roberta"``.
        architecture: class name of the written model.
        unused: names of the tensors that the written model does not use.
        differences: output name -> largest absolute difference between the two models.
        cosine_int8: lowest and mean cosine similarity between quantized and exact vectors.
    """

    source: str
    output: str
    family: str
    architecture: str
    tensors: int
    parameters: int
    unused: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    cosine_int8: dict[str, float] | None = None


def convert(
    source: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Report:
    """Convert a BERT-family model into a MiniBERT, and write the MiniBERT into a new folder.

    Args:
        source: folder of a transformers or sentence-transformers model, or the model's id on
            the Hub.
        output_dir: new folder for the MiniBERT.
        dtype: dtype of the written weights, such as ``"bfloat16"``. By default every tensor
            keeps its dtype.
        revision: branch, tag or commit of a model on the Hub.

    Example::

        report = convert("my-bert", "my-minibert")
        print(report.differences)

    Raises:
        FileNotFoundError: if the model, its weights or its tokenizer are missing.
        ValueError: if MiniBERT cannot represent the model exactly, the tensors do not match
            the configuration, the weights are pickled, or the output folder is not empty.
        Mismatch: if the two models have different outputs. Nothing is written then.
    """
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    wanted = checked_dtype(dtype)
    folder = find_folder(source, revision)
    encoder = folders.checked_encoder(folder)
    raw = read_json(encoder / "config.json")
    family = _family(raw, encoder)
    checkpoint = folders.read_tensors(encoder)
    family_config = open_config(encoder)
    kind = _kind(raw, family)
    _check_config(raw, family_config, family, kind, encoder)
    config = _config(raw, family_config, family, kind, wanted)
    tokenizer = fitting_tokenizer(folder, config)
    found = _tensors(checkpoint, config, family_config, family, kind)
    tensors, unused = (rounded(part, wanted) for part in found)
    has_pooler = "minibert.pooler.dense.weight" in {full(name, kind) for name in tensors}
    with folders.new_folder(output_dir) as temporary:
        parameters = folders.write_tensors(temporary / WEIGHTS, tensors)
        if unused:
            folders.write_tensors(temporary / UNUSED, unused)
        config.save_pretrained(temporary)
        custom_object_save(empty(config, kind), temporary)  # the code that trust_remote_code=True runs
        folders.write_tokenizer(tokenizer, temporary)
        folders.copy_modules(folder, temporary)
        differences = parity.differences(
            (folder, getattr(transformers, family.class_name + kind)),
            (temporary, getattr(modeling_minibert, f"MiniBert{kind}")),
            f"The MiniBERT made of {source}",
            tokenizer,
            max_length=config.max_position_embeddings,
            segments=config.type_vocab_size,
            dtype=wanted,
            pooled=has_pooler and config.pooling == "cls" and kind not in POOLED,
        )
        # The card states the origin of the weights, except a local folder. Students record the fingerprint.
        origin = {"base_model": None if expand_home(source).exists() else str(source), "revision": revision}
        origin["fingerprint"] = fingerprint(folder)
        write_json(temporary / "conversion.json", {**origin, "differences": differences})
    return Report(
        source=str(source),
        output=str(output_dir),
        family=family.model_type,
        architecture=f"MiniBert{kind}",
        tensors=len(tensors),
        parameters=parameters,
        unused=sorted(unused),
        differences=differences,
    )


def checked_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return ``dtype`` as a torch dtype. Only float32, float16 and bfloat16 are accepted."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is unknown; use float32, float16 or bfloat16.")
    return found


def _family(raw: dict[str, Any], folder: Path) -> Family:
    """Return the family in a config.json, if MiniBERT supports it."""
    model_type = raw.get("model_type")
    possible = f"Families that can be converted: {', '.join(FAMILIES)}."
    if model_type == MiniBertConfig.model_type:
        raise ValueError(f"{folder} is a MiniBERT already; use it without conversion.")
    if raw.get("is_encoder_decoder") or model_type not in FAMILIES:
        raise ValueError(f"{folder} is of the family {model_type}, which cannot be converted. {possible}")
    if "auto_map" in raw:
        raise ValueError(f"{folder} has its own Python code (auto_map) and cannot be converted. {possible}")
    return FAMILIES[model_type]


def _kind(raw: dict[str, Any], family: Family) -> str:
    """Return the end of the checkpoint's class name, such as ``"ForMaskedLM"``."""
    known = [f"{family.class_name}{kind}" for kind in family.classes]
    named: str = (raw.get("architectures") or known[:1])[0]
    if named not in known:
        raise ValueError(f"The class {named} cannot be converted; use one of {', '.join(known)}.")
    return named.removeprefix(family.class_name)


def _check_config(
    raw: dict[str, Any],
    config: PreTrainedConfig,
    family: Family,
    kind: str,
    folder: Path,
) -> None:
    wanted: dict[str, Any] = {"position_embedding_type": "absolute", "embedding_size": config.hidden_size}
    wanted |= dict.fromkeys(("is_decoder", "add_cross_attention", "pruned_heads", "quantization_config"))
    problems = [f"{name}={raw[name]!r}" for name, value in wanted.items() if raw.get(name) and raw[name] != value]
    if family.numbers_from_pad and kind == "ForMaskedLM" and config.hidden_act != "gelu":
        problems.append(f"hidden_act={config.hidden_act!r} (this family's masked-word head always uses 'gelu')")
    if family.numbers_from_pad and config.pad_token_id is None:
        problems.append("pad_token_id=None (this family numbers positions from the padding id)")
    if problems:
        raise ValueError(f"{folder} has settings that MiniBERT lacks: {', '.join(problems)}; use another model.")


def _config(
    raw: dict[str, Any],
    family_config: PreTrainedConfig,
    family: Family,
    kind: str,
    dtype: torch.dtype | None,
) -> MiniBertConfig:
    fields = {field: getattr(family_config, name) for field, name in family.fields.items()} | dict(family.fixed)
    if family.numbers_from_pad:
        fields["max_position_embeddings"] -= fields["pad_token_id"] + 1
    if family.model_type == "distilbert" and kind in POOLED:
        fields["classifier_dropout"] = family_config.seq_classif_dropout
    carried = {name: getattr(family_config, name) for name in CARRIED if getattr(family_config, name, None) is not None}
    mapped = {*family.fields.values(), *family.fields, *CARRIED, *_DROPPED}
    fields |= {
        "position_embedding_type": "learned",
        "norm_position": "post",
        "scale_embeddings": False,
        # The pooler's, not the sentence's: a Pooling module alone decides the sentence vector.
        "pooling": "mean" if kind == "Model" and family.model_type == "distilbert" else "cls",
        "architectures": [f"MiniBert{kind}"],
        "dtype": dtype or raw.get("dtype") or raw.get("torch_dtype"),
        # The family, and its fields that MiniBERT does not have. An export writes them back.
        "converted_from": {"model_type": family.model_type, **{name: raw[name] for name in sorted(raw) if name not in mapped}},
    }
    return MiniBertConfig(**fields, **carried)


def fitting_tokenizer(folder: Path, config: MiniBertConfig) -> Any:
    """Load the tokenizer of a model with a maximum length that suits the model."""
    encoder = encoder_folder(folder)
    # Without any of these files, transformers returns an empty tokenizer.
    if not any(file for name in TOKENIZERS for file in encoder.glob(name)):
        raise FileNotFoundError(f"{encoder} has no tokenizer ({', '.join(TOKENIZERS)}); save the model's tokenizer there.")
    tokenizer: Any = open_tokenizer(encoder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer in {encoder} has {len(tokenizer)} entries, but the model's embeddings have only "
            f"{config.vocab_size}; use the model's own tokenizer, or call resize_token_embeddings first."
        )
    tokenizer.model_max_length = min(folders.max_length(folder) or tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer


def empty(config: MiniBertConfig, kind: str) -> PreTrainedModel:
    """Build a ``MiniBert{kind}`` model on the meta device, without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = getattr(modeling_minibert, f"MiniBert{kind}")(config)
        return model


def full(name: str, kind: str) -> str:
    """Return a tensor's name with the prefix ``minibert.``, as in a model with a head."""
    return f"minibert.{name}" if kind == "Model" and not name.startswith("minibert.") else name


def _tensors(
    checkpoint: dict[str, Tensor],
    config: MiniBertConfig,
    family_config: PreTrainedConfig,
    family: Family,
    kind: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the MiniBERT's tensors, and those of the source that it does not use.

    Set ``config.tie_word_embeddings`` to False if tied tensors differ in the source.
    """
    stored = {_plain(name, family): tensor for name, tensor in checkpoint.items()}
    left = set(stored)
    tied = {}
    if kind in ("ForMaskedLM", "ForPreTraining"):
        config.tie_word_embeddings &= _shared(stored, family, kind)
        if config.tie_word_embeddings:
            tied = dict(modeling_minibert.MiniBertMaskedLMBase._tied_weights_keys)
    offset = family_config.pad_token_id + 1 if family.numbers_from_pad else 0
    tensors: dict[str, Tensor] = {}
    unused: dict[str, Tensor] = {}
    missing, wrong = [], []
    for key, parameter in empty(config, kind).state_dict().items():
        target = full(key, kind)
        names = [family.family_name(target, kind)]
        names += [family.family_name(other, kind) for other, source in tied.items() if source == target]
        found = next((name for name in names if name in stored), None)
        left -= set(names)
        if target in tied:
            continue
        if found is None:
            if kind != "Model" or not target.startswith("minibert.pooler."):  # the pooler is optional
                missing.append(names[0] or f"a counterpart of {key}")
            continue
        tensor = stored[found]
        if target == POSITIONS and offset:
            # Positions start after the padding id, so the first rows are never used.
            unused[found], tensor = tensor[:offset], tensor[offset:]
        if tensor.shape != parameter.shape:
            wrong.append(f"{found} is {[*tensor.shape]}, not {[*parameter.shape]}")
        tensors[key] = tensor
    unknown = []
    for name in sorted(name for name in left if not name.endswith(_BUFFERS)):
        beside = _of_another_class(name, kind, family)
        if beside is None:
            unknown.append(name)
        elif kind != "Model" and beside not in tensors:  # the source stores this unused tensor too
            tensors[beside] = stored[name]
        else:
            unused[name] = stored[name]
    problems = {"unknown": unknown, "missing": missing, "of another shape": wrong}
    if listed := [f"{what}: {', '.join(names)}" for what, names in problems.items() if names]:
        raise ValueError(f"The weights do not fit {family.class_name}{kind}; {'; '.join(listed)}. Save the model again.")
    return tensors, unused


def rounded(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Cast floating-point tensors to ``dtype``. If ``dtype`` is None, change nothing."""
    if dtype is None:
        return tensors
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def _of_another_class(name: str, kind: str, family: Family) -> str | None:
    """Return MiniBERT's name for a tensor of another class, or None if unknown."""
    target = next((found for other in (kind, *family.classes) if (found := family.minibert_name(name, other))), None)
    # Encoder tensors that the configuration does not describe are unknown too, for example an
    # additional layer.
    further = target is not None and target.startswith("minibert.") and not target.startswith("minibert.pooler.")
    return None if further else target


def _plain(name: str, family: Family) -> str:
    """Replace an outdated name, and add the prefix of models with a head."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        name = name.replace(old, new)
    bare = name.startswith(("embeddings.", "encoder.", "transformer.", "pooler."))
    return f"{family.prefix}.{name}" if bare else name


def _shared(stored: dict[str, Tensor], family: Family, kind: str) -> bool:
    """Return False if two tied tensors are both stored and differ."""
    for target, source in modeling_minibert.MiniBertMaskedLMBase._tied_weights_keys.items():
        one, other = (stored.get(str(family.family_name(name, kind))) for name in (target, source))
        if one is not None and other is not None and not torch.equal(one, other):
            return False
    return True
