"""MiniBERT: a compact BERT-like text encoder for the Hugging Face ecosystem.

Public names load on first use, and the ``Auto*`` classes learn about MiniBERT when transformers loads them: importing this
package costs nothing until a model is needed, which keeps ``minibert --help`` instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .configuration_minibert import MiniBertConfig
    from .modeling_minibert import (
        MiniBertForMaskedLM,
        MiniBertForMultipleChoice,
        MiniBertForPreTraining,
        MiniBertForQuestionAnswering,
        MiniBertForSequenceClassification,
        MiniBertForTokenClassification,
        MiniBertModel,
        MiniBertPreTrainedModel,
    )
    from .tokenization_minibert import train_word_level, train_wordpiece

__all__ = [
    "MiniBertConfig",
    "MiniBertForMaskedLM",
    "MiniBertForMultipleChoice",
    "MiniBertForPreTraining",
    "MiniBertForQuestionAnswering",
    "MiniBertForSequenceClassification",
    "MiniBertForTokenClassification",
    "MiniBertModel",
    "MiniBertPreTrainedModel",
    "train_word_level",
    "train_wordpiece",
]
# Where a name lives; the classes not named here are in the modeling file.
_MODULES = {
    "MiniBertConfig": "configuration_minibert",
    "train_word_level": "tokenization_minibert",
    "train_wordpiece": "tokenization_minibert",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'modeling_minibert')}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_config(module: Any) -> None:
    from .configuration_minibert import MiniBertConfig

    module.AutoConfig.register("minibert", MiniBertConfig, exist_ok=True)


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_models(module: Any) -> None:
    from . import modeling_minibert
    from .configuration_minibert import AUTO_MAP, MiniBertConfig

    for auto_class, path in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_minibert, path.split(".")[1])
            getattr(module, auto_class).register(MiniBertConfig, model_class, exist_ok=True)
