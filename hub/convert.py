"""Turn a BERT-family model into a MiniBERT of the same weights, and prove that it computes the same."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from minibert import MiniBertConfig, modeling_minibert
from minibert.files.disk import write_json
from minibert.hub import folders, parity
from minibert.hub.families import FAMILIES, POOLED, REFUSED, Family

# Holds the tensors that a MiniBERT does not use, by their names in the source, so that export can write them back.
UNUSED = "converted_from.safetensors"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
POSITIONS = "minibert.embeddings.position_embeddings.weight"
# Fields of a configuration that are copied unchanged.
CARRIED = (
    *("id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
    *("sentence_transformers", "sbert_ce_default_activation_function"),
)
# Fields that do not change the outputs, or are rewritten.
_DROPPED = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "num_labels"),
    *("_attn_implementation_internal", "gradient_checkpointing"),
)


@dataclass
class Report:
    """The result of a conversion or an export.

    Attributes:
        source: the model that was read.
        output: the folder that was written.
        family: of the plain model, such as ``"bert"``; ``"onnx"`` for a graph.
        architecture: name of the written class.
        tensors: how many were written.
        parameters: numbers in the written weights.
        unused: names of the tensors that the written model does not use; a conversion keeps them in a file of their own.
        differences: the largest absolute difference of every output between both models on the built-in texts.
        cosine_int8: the lowest and the mean cosine between vectors of the quantized and the exact graph on these texts.
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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def convert(
    source: str | Path,
    output_dir: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Report:
    """Write ``source`` as a MiniBERT into ``output_dir``: weights, tokenizer, labels, sentence-transformers modules.

    Of the two models that are compared at the end, one is in memory at a time.

    Args:
        source: folder, or id of a model on the Hub; plain transformers or sentence-transformers.
        output_dir: new or empty folder.
        dtype: of the written weights, such as ``"bfloat16"``; the default keeps that of each tensor.
        revision: branch, tag or commit of a model on the Hub.

    Example::

        report = convert("my-bert", "my-minibert")
        print(report.differences)

    Raises:
        FileNotFoundError: there is no such model, or it lacks weights or tokenizer.
        ValueError: it cannot be expressed exactly, its tensors are not those of its configuration, its weights are pickled, or
            the output folder is not empty.
        Mismatch: the result computes something else; nothing was written.
    """
    output_dir = Path(output_dir)
    folders.check_output(output_dir)
    wanted = _dtype(dtype)
    folder = folders.find(source, revision)
    encoder = folders.encoder_folder(folder)
    raw = folders.read_json(encoder / "config.json")
    family = _family(raw, encoder)
    checkpoint = folders.Checkpoint(encoder)
    family_config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    kind = _kind(raw, family, checkpoint)
    _check_config(raw, family_config, family, kind, encoder)
    config = _config(raw, family_config, family, kind, folder, wanted)
    tokenizer = open_tokenizer(encoder, config, folders.max_length(folder))
    tensors, unused = _tensors(checkpoint, config, family_config, family, kind, wanted)
    has_pooler = "minibert.pooler.dense.weight" in {full(name, kind) for name in tensors}
    with folders.new_folder(output_dir) as temporary:
        parameters = folders.write_tensors(temporary / folders.WEIGHTS, tensors)
        if unused:
            folders.write_tensors(temporary / UNUSED, unused)
        config.save_pretrained(temporary)
        custom_object_save(empty(config, kind), temporary)  # the code that trust_remote_code=True runs
        tokenizer.save_pretrained(temporary)
        folders.name_tokenizer_class(temporary)
        folders.copy_modules(folder, temporary)
        differences = parity.differences(
            (folder, getattr(transformers, family.class_name + kind)),
            (temporary, getattr(modeling_minibert, f"MiniBert{kind}")),
            tokenizer,
            max_length=config.max_position_embeddings,
            segments=config.type_vocab_size,
            dtype=wanted,
            pooled=has_pooler and config.pooling == "cls" and kind not in POOLED,
        )
        parity.check(differences, f"The MiniBERT made of {source}")
        # The card names the origin of the weights, unless that is a folder of this machine.
        origin = {"base_model": None if Path(source).expanduser().exists() else str(source), "revision": revision}
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


# ---------------------------------------------------------------------------------------------------------- checks


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is unknown; use float32, float16 or bfloat16.")
    return found


def _family(raw: dict[str, Any], folder: Path) -> Family:
    """Return the family of a config.json, or refuse it by name."""
    model_type = raw.get("model_type")
    possible = f"Convertible are {', '.join(FAMILIES)}."
    if raw.get("is_encoder_decoder"):
        raise ValueError(f"{folder} is an encoder-decoder ({model_type}); MiniBERT is an encoder. {possible}")
    if model_type == MiniBertConfig.model_type:
        raise ValueError(f"{folder} is a MiniBERT already; there is nothing to convert.")
    if model_type in REFUSED:
        raise ValueError(f"{model_type} cannot be expressed exactly: {REFUSED[model_type]}. {possible}")
    if model_type not in FAMILIES:
        raise ValueError(f"{folder} is of the family {model_type}, which cannot be converted. {possible}")
    if "auto_map" in raw:
        raise ValueError(
            f"{folder} brings Python code of its own, so that it computes something else than {model_type}. {possible}"
        )
    return FAMILIES[model_type]


def _kind(raw: dict[str, Any], family: Family, checkpoint: folders.Checkpoint) -> str:
    """Return the class of the checkpoint without the family's name, such as ``"ForMaskedLM"``."""
    known = [f"{family.class_name}{kind}" for kind in family.classes]
    named: str | None = (raw.get("architectures") or [None])[0]
    if named is None:
        heads = {kind for kind in family.classes if any(_belongs(name, kind, family) for name in checkpoint.names)}
        if not heads:
            return "Model"
        raise ValueError(
            "Its config.json names no architectures, but the weights hold a head; add the class they are of, one of "
            f"{', '.join(known)}."
        )
    if named.endswith(("LMHeadModel", "ForCausalLM")):
        raise ValueError(f"{named} is a decoder; MiniBERT is an encoder. Convertible are {', '.join(known)}.")
    if named not in known:
        raise ValueError(f"{named} has a head that MiniBERT lacks; convertible are {', '.join(known)}.")
    return named.removeprefix(family.class_name)


def _belongs(name: str, kind: str, family: Family) -> bool:
    """Return True for a tensor of the head of the class ``kind``."""
    target = family.minibert_name(name, kind)
    return target is not None and kind != "Model" and not target.startswith("minibert.")


def _check_config(raw: dict[str, Any], config: PreTrainedConfig, family: Family, kind: str, folder: Path) -> None:
    problems = []
    if raw.get("position_embedding_type", "absolute") != "absolute":
        problems.append(f"position_embedding_type={raw['position_embedding_type']!r} (only 'absolute' is known)")
    for name in ("is_decoder", "add_cross_attention"):
        if raw.get(name):
            problems.append(f"{name}={raw[name]} (MiniBERT is an encoder)")
    for name in ("pruned_heads", "quantization_config"):
        if raw.get(name):
            problems.append(f"{name} is set (every layer must be complete and in floating point)")
    if raw.get("embedding_size", config.hidden_size) != config.hidden_size:
        problems.append(f"embedding_size={raw['embedding_size']} differs from hidden_size={config.hidden_size}")
    act = getattr(config, family.fields["hidden_act"])
    if family.numbers_from_pad and kind == "ForMaskedLM" and act != "gelu":
        problems.append(f"hidden_act={act!r} (the word head of this family always has 'gelu', MiniBERT's that of the layers)")
    if family.numbers_from_pad and config.pad_token_id is None:
        problems.append("pad_token_id is missing (positions are numbered from it)")
    if problems:
        raise ValueError(f"{folder} uses what MiniBERT lacks: {'; '.join(problems)}.")


# --------------------------------------------------------------------------------------------- configuration, tokenizer


def _config(
    raw: dict[str, Any], family_config: PreTrainedConfig, family: Family, kind: str, folder: Path, dtype: torch.dtype | None
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
        "pooling": _pooling(folder, kind, family),
        "architectures": [f"MiniBert{kind}"],
        "dtype": dtype or raw.get("dtype") or raw.get("torch_dtype"),
        # The family, with its fields that MiniBERT lacks: export writes them back.
        "converted_from": {"model_type": family.model_type, **{name: raw[name] for name in sorted(raw) if name not in mapped}},
    }
    return MiniBertConfig(**fields, **carried)


def _pooling(folder: Path, kind: str, family: Family) -> str:
    """Return "cls" for heads and for BERT's pooler, else the pooling of the sentence-transformers modules."""
    if kind != "Model":
        return "cls"
    for module in folders.modules(folder):
        if module["type"].endswith("Pooling"):
            given = folders.read_json(folder / module["path"] / "config.json")
            if given.get("pooling_mode", "mean") == "cls" or given.get("pooling_mode_cls_token"):
                return "cls"
            return "mean"
    return "mean" if family.model_type == "distilbert" else "cls"


def open_tokenizer(folder: Path, config: MiniBertConfig, max_length: int | None) -> Any:
    """Open the tokenizer in ``folder``, limited to the length that sentence-transformers and the positions allow.

    Raises:
        FileNotFoundError: there is none that transformers can open.
        ValueError: it has more entries than the embeddings have rows.
    """
    # Without any of these files, transformers returns an empty tokenizer.
    if not any(file for name in TOKENIZERS for file in folder.glob(name)):
        raise FileNotFoundError(f"{folder} holds no tokenizer ({', '.join(TOKENIZERS)}); save the model's tokenizer into it.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise FileNotFoundError(f"{folder} holds no tokenizer that transformers can open ({error}).") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {folder} has {len(tokenizer)} entries but the embeddings only {config.vocab_size}; give the "
            "model its own tokenizer, or call resize_token_embeddings before you convert."
        )
    tokenizer.model_max_length = min(max_length or tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer


# --------------------------------------------------------------------------------------------------------- tensors


def empty(config: MiniBertConfig, kind: str) -> PreTrainedModel:
    """Return a model of the class MiniBert``kind`` on the device "meta": without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = getattr(modeling_minibert, f"MiniBert{kind}")(config)
        return model


def full(name: str, kind: str) -> str:
    """Return the name of a tensor as it is in a model with a head."""
    return f"minibert.{name}" if kind == "Model" and not name.startswith("minibert.") else name


def _tensors(
    checkpoint: folders.Checkpoint,
    config: MiniBertConfig,
    family_config: PreTrainedConfig,
    family: Family,
    kind: str,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Callable[[], Tensor]]]:
    """Return a function that reads each tensor of the MiniBERT, and of each unused one, after a check that none is unknown.

    Clears ``config.tie_word_embeddings`` if the tensors to share differ.
    """
    stored = {_plain(name, family): name for name in checkpoint.names}
    left = set(stored)
    tied = {}
    if kind in ("ForMaskedLM", "ForPreTraining"):
        config.tie_word_embeddings &= _shared(checkpoint, stored, family, kind)
        if config.tie_word_embeddings:
            tied = dict(modeling_minibert.MiniBertMaskedLMBase._tied_weights_keys)
    offset = family_config.pad_token_id + 1 if family.numbers_from_pad else 0
    tensors: dict[str, Callable[[], Tensor]] = {}
    unused: dict[str, Callable[[], Tensor]] = {}
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
            if kind != "Model" or not target.startswith("minibert.pooler."):  # an encoder may have none
                missing.append(names[0] or f"a counterpart of {key}")
            continue
        shape = checkpoint.shape(stored[found])
        rows = slice(None)
        if target == POSITIONS and offset:
            # Positions start after the padding's id, so the first rows of the table are never looked up.
            rows, shape = slice(offset, None), [shape[0] - offset, *shape[1:]]
            unused[found] = partial(_read, checkpoint, stored[found], slice(0, offset), dtype)
        if shape != list(parameter.shape):
            wrong.append(f"{found} is {shape}, not {list(parameter.shape)}")
        tensors[key] = partial(_read, checkpoint, stored[found], rows, dtype)
    unknown = []
    for name in sorted(name for name in left if not name.endswith(_BUFFERS)):
        beside = _of_another_class(name, kind, family)
        if beside is None:
            unknown.append(name)
        elif kind != "Model" and beside not in tensors:  # kept, as the source keeps it
            tensors[beside] = partial(_read, checkpoint, stored[name], slice(None), dtype)
        else:
            unused[name] = partial(_read, checkpoint, stored[name], slice(None), dtype)
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("unknown", unknown), ("missing", missing), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"The weights are not those of a {family.class_name}{kind}; {'; '.join(problems)}.")
    return tensors, unused


def _read(checkpoint: folders.Checkpoint, name: str, rows: slice, dtype: torch.dtype | None) -> Tensor:
    tensor = checkpoint[name][rows]
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _of_another_class(name: str, kind: str, family: Family) -> str | None:
    """Return the MiniBERT name of a tensor that the class ``kind`` does not use; None if no class of the family has it."""
    target = next((found for other in (kind, *family.classes) if (found := family.minibert_name(name, other))), None)
    # A part of the encoder that its configuration does not describe, such as a further layer, is unknown too.
    further = target is not None and target.startswith("minibert.") and not target.startswith("minibert.pooler.")
    return None if further else target


def _plain(name: str, family: Family) -> str:
    """Return the present name of a tensor in a model with a head."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        name = name.replace(old, new)
    bare = name.startswith(("embeddings.", "encoder.", "transformer.", "pooler."))
    return f"{family.prefix}.{name}" if bare else name


def _shared(checkpoint: folders.Checkpoint, stored: dict[str, str], family: Family, kind: str) -> bool:
    """Return True if the decoder's weights are absent or equal to those that tying would share."""
    for target, source in modeling_minibert.MiniBertMaskedLMBase._tied_weights_keys.items():
        names = [family.family_name(name, kind) for name in (target, source)]
        if names[0] != names[1] and all(name in stored for name in names):
            one, other = (checkpoint[stored[name]] for name in names if name)
            if not torch.equal(one, other):
                return False
    return True


__all__ = ["UNUSED", "Report", "convert"]
