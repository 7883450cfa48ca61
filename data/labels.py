"""Labels of texts in the forms people publish them: one class, several classes, or a number."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# Numbered classes may be so many at least, however few the rows are.
_CLASSES_OF_FEW_ROWS = 1000


class FoundNames(list[str]):
    """Names found as strings in the data, sorted. Beside them a number in other data is a name too, and not a position."""


class Labels(NamedTuple):
    """Labels of all rows.

    Attributes:
        problem_type: one of :data:`PROBLEM_TYPES`, as in a model's configuration.
        values: (rows,) classes, int64; (rows, classes) zeros and ones, float32; or (rows,) numbers, float32.
        names: of the classes in order, or the one of the number.
    """

    problem_type: str
    values: np.ndarray
    names: list[str]


def read_labels(
    rows: Dataset, column: str | Sequence[str], names: Sequence[str] | None = None, problem_type: str | None = None
) -> Labels:
    """Labels of all rows, from one column or, for several classes per row, from a column of 0 and 1 for each class.

    Args:
        names: of the classes in order; unset: the ClassLabel's, the strings found (sorted), the columns', or 0 … n-1. Where
            they are :class:`FoundNames`, numbers are read as names; beside all others they are positions.
        problem_type: unset means as :func:`detect_problem_type` says.

    Raises:
        ValueError: a label that is no class or number, with its row counted from 1; columns that do not fit the problem.
    """
    problem_type = problem_type or detect_problem_type(rows, column, names)
    if problem_type == MULTI:
        return Labels(MULTI, *_read_sets(rows, column, names))
    if not isinstance(column, str):
        raise ValueError(f"problem_type={problem_type} reads its labels from one column, not from {', '.join(column)}.")
    if problem_type == REGRESSION:
        if names and len(names) > 1:
            raise ValueError(f"Regression predicts one number, which has one name, not {', '.join(names)}; leave labels out.")
        return Labels(REGRESSION, _read_numbers(rows, column), list(names or [column]))
    return Labels(SINGLE, *_read_classes(rows, column, names))


def detect_problem_type(rows: Dataset, column: str | Sequence[str], names: Sequence[str] | None = None) -> str:
    """Lists, or several columns, are multi-label; fractions, unless classes are named, regression; all else is single-label.

    >>> detect_problem_type(Dataset.from_dict({"label": [0.0, 2.5]}), "label")
    'regression'
    """
    if not isinstance(column, str) or is_list(rows.features[column]):
        return MULTI
    feature = rows.features[column]
    if names is None and isinstance(feature, Value) and feature.dtype.startswith("float"):
        values = np.asarray(rows[column][:], dtype=float)
        if np.any(np.isfinite(values) & (values != np.floor(values))):
            return REGRESSION
    return SINGLE


def refuse_first(values: Sequence[Any], good: Any, column: str, advice: str) -> None:
    """Refuse the first of ``values`` that is not ``good`` (a bool each), with its row counted from 1."""
    good = np.asarray(good, dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"Row {row + 1} has {column}={values[row]!r}; {advice}.")


def is_text(feature: Any) -> bool:
    """Whether a column (or what its lists hold) is of strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_list(feature: Any) -> bool:
    """Whether a column holds lists, whatever the width of their offsets."""
    return isinstance(feature, List | LargeList)


def as_name(label: Any, feature: Any) -> Any:
    """A label as the name that it is in text: the ClassLabel's, or the number written out, whole ones without a fraction."""
    if isinstance(feature, ClassLabel):
        return feature.names[label] if isinstance(label, int) and 0 <= label < len(feature.names) else None
    whole = isinstance(label, float) and label.is_integer()
    return label if label is None or isinstance(label, str) else str(int(label) if whole else label)


def _read_classes(rows: Dataset, column: str, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    feature, values = rows.features[column], rows[column][:]
    if not isinstance(feature, Value | ClassLabel):
        raise ValueError(f"Column {column!r} holds {feature}, not classes; a label is a number from 0 up, or a string.")
    found = list(feature.names) if isinstance(feature, ClassLabel) else None
    if is_text(feature) or isinstance(names, FoundNames):
        named = [as_name(value, feature) for value in values]
        names = list(names) if names else FoundNames(sorted(set(named)))
        numbers = {name: number for number, name in enumerate(names)}
        refuse_first(values, [name in numbers for name in named], column, f"it should be one of {', '.join(names)}")
        labels = np.array([numbers[name] for name in named], dtype=np.int64)
    else:
        array = np.asarray(values)
        if array.dtype == object or array.ndim != 1 or array.dtype.kind not in "iufb":
            raise ValueError(f"Column {column!r} holds {feature}, not classes; a label is a number from 0 up, or a string.")
        refuse_first(values, np.isfinite(array) & (array == np.floor(array)), column, "a label must be a whole number")
        labels = array.astype(np.int64)
        known = names or found
        count = len(known) if known else max(2, int(labels.max()) + 1)
        if not known:
            _refuse_far_numbers(count, len(labels), column)
        names = list(known or map(str, range(count)))
        advice = f"classes are numbered 0 to {count - 1}"
        refuse_first(values, (labels >= 0) & (labels < count), column, f"{advice}; correct it or remove the row")
        if found and names != found and set(names) == set(found):  # the same classes, numbered in another order
            labels = np.array([names.index(name) for name in found])[labels]
        if not known and np.all(labels == labels[0]):
            names = [str(labels[0])]
    if len(names) < 2:
        raise ValueError(f"Column {column!r} holds the single class {names[0]!r}; a classifier needs at least two.")
    return labels, names


def _refuse_far_numbers(count: int, rows: int, column: str) -> None:
    """Refuse ``count`` numbered classes where they are many more than ``rows`` could show."""
    if count > max(rows, _CLASSES_OF_FEW_ROWS):
        raise ValueError(
            f"Column {column!r} holds the number {count - 1}, which makes {count} classes of {rows} rows; number the classes "
            "from 0 up, write their names, or give labels: with all names in order."
        )


def _read_numbers(rows: Dataset, column: str) -> np.ndarray:
    feature, values = rows.features[column], rows[column][:]
    if not isinstance(feature, Value) or np.asarray(values).dtype.kind not in "iufb":
        raise ValueError(f"Column {column!r} holds {feature}; regression needs a number in every row.")
    numbers = np.asarray(values, dtype=np.float32)
    refuse_first(values, np.isfinite(numbers), column, "regression needs a finite number in every row")
    return numbers


def _read_sets(rows: Dataset, column: str | Sequence[str], names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    if not isinstance(column, str):
        return _read_flags(rows, column, names)
    feature, sets = rows.features[column], rows[column][:]
    if not is_list(feature):
        raise ValueError(
            f"Column {column!r} holds {feature}, one label per row; {MULTI} needs lists of classes, "
            "or several columns of 0 and 1."
        )
    inner = feature.feature
    refuse_first(sets, [None not in labels for labels in sets], column, "a list of classes has no empty places")
    if is_text(inner) or (isinstance(names, FoundNames) and isinstance(inner, Value | ClassLabel)):
        named = [[as_name(label, inner) for label in labels] for labels in sets]
        names = list(names) if names else FoundNames(sorted({name for labels in named for name in labels}))
        advice = f"each should be one of {', '.join(names)}"
        refuse_first(sets, [set(labels) <= set(names) for labels in named], column, advice)
        sets = named
        order: dict[Any, int] = {name: number for number, name in enumerate(names)}
    elif isinstance(inner, ClassLabel) or (isinstance(inner, Value) and "int" in inner.dtype):
        found = list(inner.names) if isinstance(inner, ClassLabel) else None
        count = len(names or found or ()) or 1 + max((label for labels in sets for label in labels), default=0)
        if not (names or found):
            _refuse_far_numbers(count, len(sets), column)
        advice = f"classes are numbered 0 to {count - 1}"
        names = list(names or found or map(str, range(count)))
        same = found and set(names) == set(found)  # maybe numbered in another order
        order = {number: names.index(found[number]) if found and same else number for number in range(count)}
    else:
        raise ValueError(f"Column {column!r} holds {feature}; a list of classes holds their names, or their numbers from 0 up.")
    refuse_first(sets, [set(labels) <= order.keys() for labels in sets], column, advice)
    refuse_first(sets, [len(set(labels)) == len(labels) for labels in sets], column, "a list names each class once")
    if not names:
        raise ValueError(f"Column {column!r} names no class in any row; a classifier needs at least one.")
    values = np.zeros((len(sets), len(names)), dtype=np.float32)
    for row, labels in enumerate(sets):
        values[row, [order[label] for label in labels]] = 1
    return values, names


def _read_flags(rows: Dataset, columns: Sequence[str], names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    if names and len(names) != len(columns):
        raise ValueError(f"{len(columns)} columns of labels have {len(names)} names; give one name for each, or none.")
    values = np.zeros((len(rows), len(columns)), dtype=np.float32)
    for number, column in enumerate(columns):
        flags = rows[column][:]
        refuse_first(flags, [flag in (0, 1) for flag in flags], column, "with several columns each holds 0 or 1")
        values[:, number] = flags
    return values, list(names or columns)
