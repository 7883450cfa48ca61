"""Load the tokenizer and the model that a stage starts from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from datasets import Dataset

from minibert.data.source import joined_paths
from minibert.inference.load import check_complete, open_config, open_tokenizer, open_weights
from minibert.train.arguments import ModelStage, NewModel

logger = logging.getLogger(__name__)


@dataclass
class StageContext:
    """Store the output folder, the seed and the models of a stage.

    Models and tokenizers are folders or Hub ids. If ``model`` is None, the weights are new.
    """

    output_dir: Path
    seed: int
    model: str | None = None
    tokenizer: str | None = None
    teacher: str | None = None
    guide: str | None = None
    only_check: bool = False  # read and check the data, but train nothing
    data: list[dict[str, Any]] = field(default_factory=list)  # the columns that are used, for metrics.json

    def note_columns(self, sources: Sequence[Any], rows: Dataset, columns: Mapping[str, str], **first: Any) -> None:
        """Record the columns of ``rows`` that the stage uses, and the first row.

        ``columns`` maps the use of a column, such as query, to its name. ``first`` replaces
        values of the first row, for example a number by the name of the class.
        """
        values = {role: first.get(role, rows[0][column]) for role, column in columns.items()}
        shown = {role: shorten(str(value), 80, placeholder=" …") for role, value in values.items()}
        name = joined_paths(sources)
        self.data.append({"path": name, "rows": len(rows), "columns": dict(columns), "first_row": shown})

    def end_check(self) -> None:
        """Raise :class:`DataChecked` if the stage should only read and check its data."""
        if self.only_check:
            raise DataChecked


class DataChecked(Exception):
    """End a stage that should only read and check its data."""


def load_start(auto_class: Any, args: Any, context: StageContext, **changes: Any) -> tuple[Any, Any, int]:
    """Return the tokenizer and model of a stage, and the maximum number of tokens per text."""
    tokenizer: Any = open_tokenizer(str(context.tokenizer))
    model = load_model(auto_class, args, context, tokenizer, **changes)
    tokenizer.model_max_length = sequence_length(args.max_length, model.config, tokenizer)
    return tokenizer, model, tokenizer.model_max_length


def load_model(auto_class: Any, args: ModelStage, context: StageContext, tokenizer: Any, **changes: Any) -> Any:
    """Load the model of a stage, or create a model with new weights.

    ``changes`` are configuration fields that the stage sets, such as ``num_labels``.
    """
    from transformers import set_seed

    set_seed(context.seed)
    dropout = getattr(args, "dropout", None)
    if dropout is not None:
        changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if isinstance(args.model, NewModel):
        config = args.model.config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **changes)
        model = auto_class.from_config(config)
    else:
        if dropout is not None:
            config = open_config(str(context.model))
            if not hasattr(config, "hidden_dropout_prob"):
                raise ValueError(
                    f"dropout={dropout} cannot be set: {context.model} is a {config.model_type} model, "
                    "which has no hidden_dropout_prob; remove dropout from the recipe."
                )
        model = open_weights(auto_class, str(context.model), **changes)
        check_complete(model, str(context.model))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries, but the model only has "
            f"vocab_size={model.config.vocab_size}; remove vocab_size from the recipe, or use the "
            "tokenizer of the model."
        )
    return model


def sequence_length(wanted: int | None, config: Any, tokenizer: Any) -> int:
    """Return ``wanted`` after a check. If ``wanted`` is None, return the maximum length.

    The maximum is the smaller of ``model_max_length`` of the tokenizer and
    ``max_position_embeddings`` of the model.
    """
    special = tokenizer.num_special_tokens_to_add()
    if wanted is not None and wanted <= special:
        raise ValueError(
            f"max_length must be at least {special + 1}, because a sequence needs {special} special tokens "
            f"and a token of text; got {wanted}."
        )
    # Rotary positions have no table, so ``wanted`` may exceed max_position_embeddings.
    rotary = getattr(config, "position_embedding_type", None) == "rotary"
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        limit = int(tokenizer.model_max_length)
        return min(limit, positions or limit)
    if positions and wanted > positions and not rotary:
        raise ValueError(
            f"max_length={wanted} exceeds the model's max_position_embeddings={positions}; lower "
            "max_length, or increase max_position_embeddings of a new model."
        )
    return wanted
