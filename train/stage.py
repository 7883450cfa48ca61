"""Load the tokenizer and the model that a stage starts from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minibert.files.model_folder import opening
from minibert.train.arguments import ModelStage, NewModel


@dataclass
class StageContext:
    """The inputs of a stage that come from the recipe and its other stages.

    Models are folders or Hub ids; a ``model`` of None means new weights.
    """

    output_dir: Path
    seed: int
    model: str | None = None
    tokenizer: str | None = None
    teacher: str | None = None


def load_tokenizer(context: StageContext) -> Any:
    """Load the tokenizer of a stage."""
    from transformers import AutoTokenizer

    # Without trust_remote_code, a checkpoint that carries code asks a question on the
    # terminal.
    try:
        return AutoTokenizer.from_pretrained(context.tokenizer, trust_remote_code=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{context.tokenizer} holds no tokenizer that can be opened ({str(error).splitlines()[0]}); save or train it again."
        ) from error


def load_start(auto_class: Any, args: Any, context: StageContext, **changes: Any) -> tuple[Any, Any, int]:
    """Return the tokenizer and the model of a stage, and its longest sequence in tokens."""
    tokenizer = load_tokenizer(context)
    model = load_model(auto_class, args, context, tokenizer, **changes)
    tokenizer.model_max_length = sequence_length(args.max_length, model.config, tokenizer)
    return tokenizer, model, tokenizer.model_max_length


def load_model(auto_class: Any, args: ModelStage, context: StageContext, tokenizer: Any, **changes: Any) -> Any:
    """Load, or build from new weights, the model of a stage.

    ``changes`` are configuration fields that the stage decides, such as ``num_labels``.
    """
    from transformers import AutoConfig, set_seed

    set_seed(context.seed)
    dropout = getattr(args, "dropout", None)
    if dropout is not None:
        changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if isinstance(args.model, NewModel):
        config = args.model.config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **changes)
        model = auto_class.from_config(config)
    else:
        if dropout is not None:
            config = AutoConfig.from_pretrained(str(context.model), trust_remote_code=False)
            if not hasattr(config, "hidden_dropout_prob"):
                raise ValueError(
                    f"dropout={dropout} cannot be set: {context.model} is a {config.model_type} model, "
                    "which names its dropout otherwise; leave dropout out of the recipe."
                )
        with opening(str(context.model)):
            model = auto_class.from_pretrained(context.model, trust_remote_code=False, use_safetensors=True, **changes)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries but the model's vocabulary only "
            f"vocab_size={model.config.vocab_size}; leave vocab_size out of the recipe or use the "
            "tokenizer that the model was trained with."
        )
    return model


def sequence_length(wanted: int | None, config: Any, tokenizer: Any) -> int:
    """Return ``wanted``, or the shorter of the tokenizer's length and the model's positions."""
    special = tokenizer.num_special_tokens_to_add()
    if wanted is not None and wanted <= special:
        raise ValueError(
            f"max_length must be at least {special + 1}, which leaves room for {special} special tokens and text, got {wanted}."
        )
    # Rotary positions have no table that could be too short.
    rotary = getattr(config, "position_embedding_type", None) == "rotary"
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        limit = int(tokenizer.model_max_length)
        return min(limit, positions or limit)
    if positions and wanted > positions and not rotary:
        raise ValueError(
            f"max_length={wanted} exceeds the model's max_position_embeddings={positions}; shorten "
            "max_length, or give the model more positions."
        )
    return wanted
