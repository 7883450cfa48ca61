"""MiniBERT: a compact BERT-like text encoder for the Hugging Face ecosystem.

Importing the package registers the models with transformers' ``Auto*`` classes. The
``minibert`` command postpones the registration, so that ``minibert --help`` answers at once.
Public names are imported when they are first used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.configuration_minibert import MiniBertConfig
    from minibert.inference.encode import Encoder, encode
    from minibert.inference.predict import predict
    from minibert.modeling_minibert import (
        MiniBertForMaskedLM,
        MiniBertForMultipleChoice,
        MiniBertForPreTraining,
        MiniBertForQuestionAnswering,
        MiniBertForSequenceClassification,
        MiniBertForTokenClassification,
        MiniBertModel,
        MiniBertPreTrainedModel,
    )
    from minibert.tokenization_minibert import train_word_level, train_wordpiece

__all__ = [
    "Encoder",
    "MiniBertConfig",
    "MiniBertForMaskedLM",
    "MiniBertForMultipleChoice",
    "MiniBertForPreTraining",
    "MiniBertForQuestionAnswering",
    "MiniBertForSequenceClassification",
    "MiniBertForTokenClassification",
    "MiniBertModel",
    "MiniBertPreTrainedModel",
    "encode",
    "predict",
    "train_word_level",
    "train_wordpiece",
]
# Public name -> module. The other classes are in modeling, the other functions in tokenization.
_MODULES = {"Encoder": "inference.encode", "encode": "inference.encode", "predict": "inference.predict"}


def __getattr__(name: str) -> Any:
    if name == "__version__":  # the version in setup.cfg at installation
        from minibert.files.installation import version

        return version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    others = "modeling_minibert" if name.startswith("MiniBert") else "tokenization_minibert"
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, others)}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register() -> None:
    """Register MiniBERT with transformers, so that models open without ``trust_remote_code``.

    Importing the package calls this function, except in the ``minibert`` command. There, the
    function is called when a subpackage such as ``minibert.inference`` is imported.
    """
    import transformers

    from minibert import modeling_minibert
    from minibert.configuration_minibert import AUTO_MAP, MiniBertConfig

    transformers.AutoConfig.register("minibert", MiniBertConfig, exist_ok=True)
    for auto_class, path in AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_minibert, path.split(".")[1])
            getattr(transformers, auto_class).register(MiniBertConfig, model_class, exist_ok=True)


def _is_own_command() -> bool:
    as_module = "-m" in sys.orig_argv[:-1] and sys.orig_argv[sys.orig_argv.index("-m") + 1] == __name__
    return as_module or os.path.splitext(os.path.basename(sys.argv[0]))[0] == __name__


if not _is_own_command():
    register()
