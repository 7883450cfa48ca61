"""Describe the data sets of recipes and of the command line."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from minibert.files.disk import expand_home

INSTALLED_DOCS = "installed-docs"
_HUB_WITH_CONFIG = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")
_SPLIT_PART = re.compile(r"([\w.-]+)(\[(?:-?\d+%?)?:(?:-?\d+%?)?\])?")


def split_parts(split: str) -> list[tuple[str, str]]:
    """Return the name and the slice of each split in a sum of splits.

    >>> split_parts("train[:45%]+train[50%:95%]")
    [('train', '[:45%]'), ('train', '[50%:95%]')]
    """
    parts = []
    for part in split.split("+"):
        match = _SPLIT_PART.fullmatch(part.strip())
        if not match or any(int(percent) > 100 for percent in re.findall(r"(\d+)%", match[2] or "")):
            raise ValueError(
                f"split={split!r} cannot be read at {part!r}; give a name such as train, or a slice of it "
                "such as train[:90%], train[90%:] or train[:1000]. Join several parts with +."
            )
        parts.append((match[1], match[2] or ""))
    return parts


def joined_paths(sources: Sequence["DataSource"]) -> str:
    """Return the paths of ``sources``, joined for a message."""
    return " + ".join(source.path for source in sources)


class DataSource(BaseModel):
    """Describe a data set: its path, and the rows and columns to read.

    A recipe may contain a string instead. The string is the ``path``. For a Hub data set, the
    string may also be ``owner/name:config``.

    >>> DataSource.model_validate("sentence-transformers/all-nli:pair-class").config
    'pair-class'
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(min_length=1, description="Local file or folder, id of a data set on the Hub, or installed-docs.")
    config: str | None = Field(None, description="Configuration of a Hub data set.")
    split: str | None = Field(
        None,
        description="Split to read, or a sum of slices such as train[:90%]+test[-1000:]. "
        "The default is train for training and validation for evaluation.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set.")
    columns: dict[str, str] | None = Field(None, description="Columns to rename: a mapping from old to new names.")
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="Read at most this many rows, from the start.")
    streaming: bool = Field(False, description="Fetch only the first limit rows of a Hub data set instead of all files.")

    # Set when the source is read. It is not a field, so that recipes remain unchanged.
    _commit: str | None = PrivateAttr(None)

    @property
    def commit(self) -> str | None:
        """Return the commit of a Hub data set after reading. Otherwise, return None."""
        return self._commit

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        here = expand_home(value).exists()  # the name of a file may contain a colon
        match = None if here else _HUB_WITH_CONFIG.fullmatch(value)
        return {"path": match[1], "config": match[2]} if match else {"path": value}

    @field_validator("split")
    @classmethod
    def _can_be_read(cls, split: str | None) -> str | None:
        if split is not None:
            split_parts(split)
        return split

    @model_validator(mode="after")
    def _streams_an_end(self) -> "DataSource":
        if self.streaming and self.limit is None:
            raise ValueError("streaming fetches only the first rows, so say how many with limit:.")
        if self.streaming and len(parts := split_parts(self.split or "train")) + sum(bool(rows) for _, rows in parts) > 1:
            raise ValueError(f"split={self.split!r} cannot be streamed, since it is a slice or a sum; give one split.")
        return self
