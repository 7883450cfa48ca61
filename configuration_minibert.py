"""The configuration of a MiniBERT encoder and its named presets.

This file travels with every checkpoint, next to ``modeling_minibert.py``; it may import only transformers and huggingface_hub.
"""

from collections.abc import Iterator
from typing import Any, Literal

import transformers

# Found by trying: with 5.3 configurations are no dataclasses yet. Checked before anything that an older version lacks.
OLDEST_TRANSFORMERS = "5.4"
if [int(part) for part in transformers.__version__.split(".")[:2]] < [int(part) for part in OLDEST_TRANSFORMERS.split(".")]:
    raise ImportError(
        f"MiniBERT needs transformers {OLDEST_TRANSFORMERS} or newer, but this is {transformers.__version__}; upgrade it with "
        "pip install -U transformers, or take the model as plain BERT (minibert hub export --to bert), which any version reads."
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402

# Every class a checkpoint offers, in the form ``trust_remote_code=True`` reads from config.json. It is written complete
# into each saved configuration, so that any head can be loaded from any checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_minibert.MiniBertConfig",
    "AutoModel": "modeling_minibert.MiniBertModel",
    "AutoModelForPreTraining": "modeling_minibert.MiniBertForPreTraining",
    "AutoModelForMaskedLM": "modeling_minibert.MiniBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_minibert.MiniBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_minibert.MiniBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_minibert.MiniBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_minibert.MiniBertForMultipleChoice",
}


@strict
class MiniBertConfig(PreTrainedConfig):
    """Shape and switches of a MiniBERT encoder. The plain defaults are the preset ``search-8x768``.

    Args:
        vocab_size: Number of entries of the word embedding table.
        hidden_size: Width of the residual stream; a multiple of ``num_attention_heads``.
        num_hidden_layers: Number of encoder layers.
        num_attention_heads: Number of attention heads per layer.
        intermediate_size: Width of the MLP between its two projections.
        hidden_act: Activation of the MLP; any name in ``transformers.activations.ACT2FN``.
        gated_mlp: Multiply the activation with a second projection (GeGLU and relatives, Shazeer 2020, arXiv:2002.05202).
        max_position_embeddings: Longest sequence, in tokens. Rotary positions have no table and accept longer ones.
        position_embedding_type: ``"learned"`` (BERT), ``"sinusoidal"`` (Vaswani et al. 2017, arXiv:1706.03762) or
            ``"rotary"`` (Su et al. 2021, arXiv:2104.09864).
        rope_theta: Base of the rotary wavelengths.
        norm_position: ``"post"`` normalises after each residual sum (BERT); ``"pre"`` normalises each block's input and
            once more after the last layer (Xiong et al. 2020, arXiv:2002.04745).
        scale_embeddings: Multiply word embeddings by the square root of ``hidden_size``, so that sinusoids do not drown
            them.
        type_vocab_size: Number of segments; 0 means none and ``token_type_ids`` are ignored.
        pooling: The vector that stands for a text in heads and in sentence embeddings: ``"cls"`` (first token) or ``"mean"``.
        pooler_act: Activation of the pooler before a classifier: ``"tanh"`` (BERT) or ``"relu"`` (Sanh et al. 2019,
            arXiv:1910.01108).
        hidden_dropout_prob: Dropout on embeddings and on each block's output.
        attention_probs_dropout_prob: Dropout on attention weights.
        classifier_dropout: Dropout before a classifier; ``None`` means ``hidden_dropout_prob``.
        initializer_range: Standard deviation of the normal distribution that fills new matrices.
        layer_norm_eps: Epsilon of every layer norm.
        unpad_inputs: Compute real tokens only (same result). ``False`` keeps the padded ``(batch, length)`` computation.
        pad_token_id, bos_token_id, eos_token_id: Special token ids, as in transformers.
        tie_word_embeddings: Share the word embedding matrix with the masked-LM decoder.

    Raises:
        ValueError: when fields contradict each other; the message lists every problem.
    """

    model_type = "minibert"
    _auto_class = "AutoConfig"

    vocab_size: int = 30000
    hidden_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 12
    intermediate_size: int = 1600
    hidden_act: str = "relu"
    gated_mlp: bool = False
    max_position_embeddings: int = 350
    position_embedding_type: Literal["learned", "sinusoidal", "rotary"] = "sinusoidal"
    rope_theta: float | int = 10000.0
    norm_position: Literal["post", "pre"] = "pre"
    scale_embeddings: bool = True
    type_vocab_size: int = 2
    pooling: Literal["cls", "mean"] = "mean"
    pooler_act: Literal["tanh", "relu"] = "tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    unpad_inputs: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.auto_map = dict(AUTO_MAP)
        problems = list(self._problems())
        if problems:
            raise ValueError("This MiniBERT configuration cannot be built: " + " ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} must be at least 1."
        for name in ("num_hidden_layers", "type_vocab_size"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name)} must not be negative."
        if self.num_attention_heads >= 1 and self.hidden_size % self.num_attention_heads:
            yield (
                f"hidden_size={self.hidden_size} does not split over num_attention_heads={self.num_attention_heads}; "
                "choose a width that is a multiple of the number of heads."
            )
        elif self.position_embedding_type == "rotary" and self.hidden_size // max(self.num_attention_heads, 1) % 2:
            yield (
                f"rotary positions turn pairs of numbers, but hidden_size={self.hidden_size} over "
                f"num_attention_heads={self.num_attention_heads} gives heads of odd width; make it even."
            )
        if self.hidden_act not in ACT2FN:
            yield f"hidden_act={self.hidden_act!r} is unknown; use one of {', '.join(sorted(ACT2FN))}."
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                yield f"{name}={value} must lie in [0, 1)."
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < max(self.vocab_size, 1):
            yield f"pad_token_id={self.pad_token_id} is not in a vocabulary of vocab_size={self.vocab_size}."

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MiniBertConfig":
        """Build a named preset, with some fields replaced.

        >>> MiniBertConfig.preset("simple-4x256", num_hidden_layers=2).num_hidden_layers
        2

        Raises:
            ValueError: for an unknown preset or field name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; use one of {', '.join(PRESETS)}.")
        known = cls.__dataclass_fields__.keys() | {"num_labels"}
        if unknown := sorted(overrides.keys() - known):
            raise ValueError(
                f"MiniBertConfig has no field {', '.join(map(repr, unknown))}; its fields are {', '.join(sorted(FIELDS))}."
            )
        return cls(**{**PRESETS[name], **overrides})


# The fields defined here, without those every transformers configuration has.
FIELDS = tuple(name for name in MiniBertConfig.__annotations__)

_BERT = {
    "vocab_size": 30522,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "position_embedding_type": "learned",
    "norm_position": "post",
    "scale_embeddings": False,
    "pooling": "cls",
}
PRESETS: dict[str, dict[str, Any]] = {
    "search-8x768": {},
    "nano-1x3": {
        "hidden_size": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 12,
        "max_position_embeddings": 128,
        "position_embedding_type": "learned",
        "scale_embeddings": False,
        "type_vocab_size": 0,
    },
    "simple-4x256": {
        **_BERT,
        "vocab_size": 30000,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "pooling": "mean",
    },
    "bert-base": {**_BERT, "num_hidden_layers": 12},
    "distil-6x768": {**_BERT, "num_hidden_layers": 6, "type_vocab_size": 0},
    "modern-6x384": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1024,
        "hidden_act": "gelu",
        "gated_mlp": True,
        "max_position_embeddings": 1024,
        "position_embedding_type": "rotary",
        "scale_embeddings": False,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-5,
    },
}

__all__ = ["AUTO_MAP", "FIELDS", "PRESETS", "MiniBertConfig"]
