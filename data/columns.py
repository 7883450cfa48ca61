"""Choose the text columns of a data set."""

from collections.abc import Sequence


def pick_columns(
    found: Sequence[str],
    wanted: Sequence[str] | None,
    usual: Sequence[Sequence[str]],
    *,
    option: str,
    where: str = "the data",
    columns: Sequence[str] | None = None,
) -> list[str]:
    """Return the names of the columns to read.

    If ``wanted`` is given, return ``wanted``. Otherwise, return the first group of names in
    ``usual`` whose names are all in ``found``. If there is no such group and one column is
    enough, return the only column in ``found``. Error messages name the setting ``option``, the
    data ``where`` and all ``columns``.

    >>> pick_columns(["title", "text"], None, [["question", "context"], ["text"]], option="--column")
    ['text']
    """
    every = columns if columns is not None else found
    shown = ", ".join(every) or "none"
    if wanted:
        if missing := [name for name in wanted if name not in found]:
            kind = "does not hold texts" if missing[0] in every else "is not there"
            texts = f"; the columns of texts are {', '.join(found) or 'none'}" if every != found else ""
            raise ValueError(f"Column {missing[0]!r} {kind} in {where}; the columns are {shown}{texts} ({option}).")
        return list(wanted)
    for group in usual:
        if set(group) <= set(found):
            return list(group)
    if len(found) == 1 and any(len(group) == 1 for group in usual):
        return list(found)
    if not found:
        raise ValueError(f"No column of {where} has texts; the columns are {shown}. Give data with texts.")
    names = "; ".join(" + ".join(group) for group in usual)
    raise ValueError(
        f"It is not clear which column of {where} to read: the usual columns are {names}, found {shown}; name it ({option})."
    )
