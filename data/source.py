"""How a data set is named, in a recipe or on the command line. Light: what reads one is in ``minibert.data.load``."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

INSTALLED_DOCS = "installed-docs"
_HUB_WITH_CONFIG = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")


class DataSource(BaseModel):
    """Where rows come from. In YAML a plain string stands for ``path``, and ``owner/name:config`` names a Hub configuration.

    >>> DataSource.model_validate("sentence-transformers/all-nli:pair-class").config
    'pair-class'
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(min_length=1, description="Local file or folder, id of a data set on the Hub, or installed-docs.")
    config: str | None = Field(None, description="Configuration of a Hub data set.")
    split: str | None = Field(None, description="Split to read; unset means train for training and validation for evaluation.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set.")
    columns: dict[str, str] | None = Field(None, description="Columns to rename: name found in the data to name wanted.")
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="Read at most this many rows, from the start.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _HUB_WITH_CONFIG.fullmatch(value)
        return {"path": match[1], "config": match[2]} if match else {"path": value}
