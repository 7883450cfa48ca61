"""Read the labels of texts in the usual forms: one class, several classes, or a number."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")

# More numbered classes than rows are refused above this number.
_CLASSES_OF_FEW_ROWS = 1000


class Labels(NamedTuple):
    """Hold the labels of all rows.

    Attributes:
        problem_type: one of :data:`PROBLEM_TYPES`, as in a model's configuration.
        values: (rows,) classes, int64; (rows, classes) zeros and ones, float32; or (rows,) numbers, float32.
        names: the names of the classes in order, or the name of the number.
    """

    problem_type: str
    values: np.ndarray
    names: list[str]


def read_labels(
    rows: Dataset, column: str | Sequence[str], names: Sequence[str] | None = None, problem_type: str | None = None
) -> Labels:
    """Read the labels of all rows from one column, or from a column of 0 and 1 for each of several classes.

    Args:
        names: the names of the classes in order; the default is those of the ClassLabel, the strings found (sorted), the
            columns, or 0 … n-1. Where any label is among the names, all are read as names; else numbers are positions.
        problem_type: the default is that of :func:`detect_problem_type`.

    Raises:
        ValueError: for a label that is not a class or number, with its row counted from 1, and columns that do not fit the
            problem.
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
    """Return multi-label for lists or several columns, regression for fractions without named classes, else single-label.

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
    """Refuse the first of ``values`` that is not ``good`` (one bool each), with its row counted from 1."""
    good = np.asarray(good, dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"Row {row + 1} has {column}={values[row]!r}; {advice}.")


def is_text(feature: Any) -> bool:
    """Return True if a column, or its lists, hold strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_list(feature: Any) -> bool:
    """Return True if a column holds lists, with offsets of any width."""
    return isinstance(feature, List | LargeList)


def as_name(label: Any, feature: Any) -> Any:
    """Return a label as text: the name of the ClassLabel, or the number, without the fraction .0."""
    if isinstance(feature, ClassLabel):
        return feature.names[label] if isinstance(label, int) and 0 <= label < len(feature.names) else None
    whole = isinstance(label, float) and label.is_integer()
    return label if label is None or isinstance(label, str) else str(int(label) if whole else label)


def _read_classes(rows: Dataset, column: str, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    feature, values = rows.features[column], rows[column][:]
    known = list(names or (feature.names if isinstance(feature, ClassLabel) else ()))
    if not isinstance(feature, Value | ClassLabel):
        raise ValueError(f"Column {column!r} holds {feature}, not classes; a label is a number from 0 up, or a string.")
    named = [as_name(value, feature) for value in values]
    if is_text(feature) or set(named) & set(known):
        known = known or sorted(set(named))
        numbers = {name: number for number, name in enumerate(known)}
        refuse_first(values, [name in numbers for name in named], column, f"it should be one of {', '.join(known)}")
        labels = np.array([numbers[name] for name in named], dtype=np.int64)
    else:
        array = np.asarray(values)
        if array.dtype == object or array.ndim != 1 or array.dtype.kind not in "iufb":
            raise ValueError(f"Column {column!r} holds {feature}, not classes; a label is a number from 0 up, or a string.")
        refuse_first(values, np.isfinite(array) & (array == np.floor(array)), column, "a label must be a whole number")
        labels = array.astype(np.int64)
        count = len(known) if known else max(2, int(labels.max()) + 1)
        if not known:
            _refuse_far_numbers(count, len(labels), column)
        advice = f"classes are numbered 0 to {count - 1}"
        refuse_first(values, (labels >= 0) & (labels < count), column, f"{advice}; correct it or remove the row")
        known = known or list(map(str, range(count if np.any(labels != labels[0]) else 1)))
    if len(known) < 2:
        raise ValueError(f"Column {column!r} holds the single class {str(named[0])!r}; a classifier needs at least two.")
    return labels, known


def _refuse_far_numbers(count: int, rows: int, column: str) -> None:
    """Refuse ``count`` numbered classes if they are many more than ``rows`` could show."""
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
    if not (isinstance(inner, ClassLabel) or is_text(inner) or (isinstance(inner, Value) and "int" in inner.dtype)):
        raise ValueError(f"Column {column!r} holds {feature}; a list of classes holds their names, or their numbers from 0 up.")
    names = list(names or (inner.names if isinstance(inner, ClassLabel) else ()))
    named = [[as_name(label, inner) for label in labels] for labels in sets]
    used = {name for labels in named for name in labels}
    if is_text(inner) or used & set(names):
        names = names or sorted(used)
        refuse_first(sets, [set(labels) <= set(names) for labels in named], column, f"each should be one of {', '.join(names)}")
        sets = named
        order: dict[Any, int] = {name: number for number, name in enumerate(names)}
    else:
        count = len(names) or 1 + max((label for labels in sets for label in labels), default=0)
        if not names:
            _refuse_far_numbers(count, len(sets), column)
        order = {number: number for number in range(count)}
        numbered = f"classes are numbered 0 to {count - 1}"
        refuse_first(sets, [set(labels) <= order.keys() for labels in sets], column, numbered)
        names = names or list(map(str, range(count)))
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
