"""Map parameter and field names of BERT-family models to the names in MiniBERT.

:mod:`minibert.hub.convert` and :mod:`minibert.hub.export` use these tables.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import BertConfig, DistilBertConfig

from minibert import MiniBertConfig

# Endings of class names. "MiniBert" or the name of a family comes before them.
CLASSES = (
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
_WITHOUT_PRETRAINING = tuple(kind for kind in CLASSES if kind != "ForPreTraining")
POOLED = ("ForPreTraining", "ForSequenceClassification", "ForMultipleChoice")

# Names of modules: MiniBERT -> family. {} is the number of a layer.
_EMBEDDINGS = {
    "minibert.embeddings.word_embeddings": "{prefix}.embeddings.word_embeddings",
    "minibert.embeddings.position_embeddings": "{prefix}.embeddings.position_embeddings",
    "minibert.embeddings.norm": "{prefix}.embeddings.LayerNorm",
}
_BERT_ENCODER = {
    **_EMBEDDINGS,
    "minibert.embeddings.token_type_embeddings": "{prefix}.embeddings.token_type_embeddings",
    "minibert.layers.{}.attention.query": "{prefix}.encoder.layer.{}.attention.self.query",
    "minibert.layers.{}.attention.key": "{prefix}.encoder.layer.{}.attention.self.key",
    "minibert.layers.{}.attention.value": "{prefix}.encoder.layer.{}.attention.self.value",
    "minibert.layers.{}.attention.output": "{prefix}.encoder.layer.{}.attention.output.dense",
    "minibert.layers.{}.attention_norm": "{prefix}.encoder.layer.{}.attention.output.LayerNorm",
    "minibert.layers.{}.mlp.up": "{prefix}.encoder.layer.{}.intermediate.dense",
    "minibert.layers.{}.mlp.down": "{prefix}.encoder.layer.{}.output.dense",
    "minibert.layers.{}.mlp_norm": "{prefix}.encoder.layer.{}.output.LayerNorm",
    "minibert.pooler.dense": "{prefix}.pooler.dense",
}
_CLASSIFIERS = {"classifier": "classifier", "qa_outputs": "qa_outputs"}
_BERT_HEADS = {
    "lm_head": "cls.predictions",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head.decoder": "cls.predictions.decoder",
    "next_sentence": "cls.seq_relationship",
    **_CLASSIFIERS,
}
_ROBERTA_HEADS = {
    "lm_head": "lm_head",
    "lm_head.dense": "lm_head.dense",
    "lm_head.norm": "lm_head.layer_norm",
    "lm_head.decoder": "lm_head.decoder",
    **_CLASSIFIERS,
}
_DISTILBERT = {
    **_EMBEDDINGS,
    "minibert.layers.{}.attention.query": "{prefix}.transformer.layer.{}.attention.q_lin",
    "minibert.layers.{}.attention.key": "{prefix}.transformer.layer.{}.attention.k_lin",
    "minibert.layers.{}.attention.value": "{prefix}.transformer.layer.{}.attention.v_lin",
    "minibert.layers.{}.attention.output": "{prefix}.transformer.layer.{}.attention.out_lin",
    "minibert.layers.{}.attention_norm": "{prefix}.transformer.layer.{}.sa_layer_norm",
    "minibert.layers.{}.mlp.up": "{prefix}.transformer.layer.{}.ffn.lin1",
    "minibert.layers.{}.mlp.down": "{prefix}.transformer.layer.{}.ffn.lin2",
    "minibert.layers.{}.mlp_norm": "{prefix}.transformer.layer.{}.output_layer_norm",
    "lm_head": "vocab_projector",
    "lm_head.dense": "vocab_transform",
    "lm_head.norm": "vocab_layer_norm",
    "lm_head.decoder": "vocab_projector",
    **_CLASSIFIERS,
}

# Names of configuration fields: MiniBERT -> family.
_FIELDS = {name: name for name in MiniBertConfig.__annotations__ if name in BertConfig.__annotations__}
_DISTILBERT_FIELDS = {
    **{name: name for name in _FIELDS if name in DistilBertConfig.__annotations__},
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


@dataclass(frozen=True)
class Family:
    """Describe a model family of transformers, such as BERT, in terms of MiniBERT.

    Attributes:
        prefix: name of the encoder module in a model with a head.
        class_name: beginning of the family's class names, such as ``"Bert"``.
        modules: names of modules, MiniBERT -> family. ``{}`` is the number of a layer.
        of_class: ending of a class name -> a dictionary like ``modules``, with the modules that
            have another name in that class.
        fields: names of configuration fields, MiniBERT -> family.
        fixed: fields of MiniBertConfig that are constant in this family -> their values.
        classes: endings of the class names that can be converted.
        numbers_from_pad: whether positions begin at ``pad_token_id + 1``.
    """

    model_type: str
    prefix: str
    class_name: str
    modules: Mapping[str, str]
    of_class: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=lambda: _FIELDS)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = CLASSES
    numbers_from_pad: bool = False

    def family_name(self, key: str, kind: str) -> str | None:
        """Return the family's name for the parameter ``key`` of ``MiniBert{kind}``, or None.

        >>> FAMILIES["roberta"].family_name("minibert.layers.3.mlp.up.bias", "ForMaskedLM")
        'roberta.encoder.layer.3.intermediate.dense.bias'
        """
        found = _renamed(key, {**self.modules, **self.of_class.get(kind, {})})
        return found and found.replace("{prefix}", self.prefix)

    def minibert_name(self, key: str, kind: str) -> str | None:
        """Return MiniBERT's name for the family's parameter ``key``, or None."""
        modules = {**self.modules, **self.of_class.get(kind, {})}
        inverse = {name.replace("{prefix}", self.prefix): module for module, name in modules.items()}
        return _renamed(key, inverse)


def _renamed(key: str, modules: Mapping[str, str]) -> str | None:
    module, _, leaf = key.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    found = modules.get(module if number is None else module.replace(number[0], ".{}.", 1))
    return found and f"{found if number is None else found.replace('{}', number[1])}.{leaf}"


def _roberta(model_type: str, class_name: str) -> Family:
    return Family(
        model_type,
        "roberta",
        class_name,
        {**_BERT_ENCODER, **_ROBERTA_HEADS},
        of_class={
            "ForSequenceClassification": {"minibert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
        },
        fixed={"pooler_act": "tanh"},
        classes=_WITHOUT_PRETRAINING,
        numbers_from_pad=True,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family("bert", "bert", "Bert", {**_BERT_ENCODER, **_BERT_HEADS}, fixed={"pooler_act": "tanh"}),
        Family(
            "distilbert",
            "distilbert",
            "DistilBert",
            _DISTILBERT,
            of_class={
                "ForSequenceClassification": {"minibert.pooler.dense": "pre_classifier"},
                "ForMultipleChoice": {"minibert.pooler.dense": "pre_classifier"},
            },
            fields=_DISTILBERT_FIELDS,
            fixed={"type_vocab_size": 0, "layer_norm_eps": 1e-12, "pooler_act": "relu"},
            classes=_WITHOUT_PRETRAINING,
        ),
        _roberta("roberta", "Roberta"),
        _roberta("xlm-roberta", "XLMRoberta"),
        _roberta("camembert", "Camembert"),
    )
}
