"""Read labels for classification and regression from the columns of a data set."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value
from sklearn.utils.class_weight import compute_class_weight

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

# Above this number, there must not be more numbered classes than rows.
_CLASSES_OF_FEW_ROWS = 1000
_NUMBERS = ("int", "uint", "float", "bool")


class Labels(NamedTuple):
    """Store the labels of all rows.

    For single-label, ``values`` are int64 class numbers (rows,). For multi-label, they are
    float32 zeros and ones (rows, classes). For regression, they are float32 numbers (rows,).
    """

    problem_type: str  # SINGLE, MULTI or REGRESSION
    values: np.ndarray
    names: list[str]  # of the classes in order; for regression, the name of the label

    def first(self) -> Any:
        """Return the class name, the list of class names or the number of the first row."""
        value = self.values[0]
        if self.problem_type == MULTI:
            return [name for name, flag in zip(self.names, value, strict=True) if flag]
        return self.names[value] if self.problem_type == SINGLE else float(value)

    def class_weights(self, wanted: Any) -> list[float] | None:
        """Return a weight per class. ``wanted`` is ``"balanced"``, a mapping from names (others weigh 1), or None."""
        if wanted is None:
            return None
        if self.problem_type != SINGLE:
            raise ValueError(f"class_weights need one class per row, but the labels are {self.problem_type}; remove them.")
        if wanted == "balanced":
            used = np.unique(self.values)  # other classes never enter the loss
            weights = compute_class_weight(wanted, classes=used, y=self.values)
            wanted = dict(zip(np.take(self.names, used), weights, strict=True))
        given = {str(name): weight for name, weight in wanted.items()} if isinstance(wanted, dict) else {}
        positive = all(isinstance(weight, int | float) and 0 < weight < math.inf for weight in given.values())
        if not (given and positive and given.keys() <= set(self.names)):
            raise ValueError(f"class_weights={wanted!r} should be balanced, or positive numbers for {', '.join(self.names)}.")
        return [float(given.get(name, 1)) for name in self.names]


def read_labels(
    rows: Dataset,
    column: str | Sequence[str],
    names: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> Labels:
    """Read the labels of all rows from one or more columns.

    If there are several columns, each column belongs to a class and contains only 0 and 1.
    ``names`` are the names of the classes in order. For several columns, the default of
    ``names`` is the column names. :func:`number_labels` describes the default for one column.

    Several columns and columns of lists are multi-label by default. A column of fractions
    without ``names`` is regression. Every other column is single-label.
    """
    problem_type = problem_type or _detect_problem_type(rows, column, names)
    if not isinstance(column, str):
        if problem_type != MULTI:
            raise ValueError(
                f"problem_type={problem_type} reads its labels from one column, not from {', '.join(column)}; name one."
            )
        return _read_flags(rows, column, names)
    feature, values = rows.features[column], rows[column][:]
    if problem_type == REGRESSION:
        if names and len(names) > 1:
            raise ValueError(f"Regression predicts one number, got the names {', '.join(names)}; remove labels:.")
        advice = "a finite number belongs there; correct the value or remove the row"
        refuse_first(values, [_is_number(value) for value in values], column, advice)
        refuse_first(values, [not isinstance(value, str) for value in values], column, "write it as a number, not as a text")
        numbers = np.array(values, dtype=np.float32)
        return Labels(REGRESSION, numbers, list(names or [column]))
    if problem_type == MULTI:
        return _read_sets(values, feature, column, names)
    classes, known = number_labels([[value] for value in values], feature, column, names)
    labels = np.array(classes, dtype=np.int64).ravel()
    if len(known) < 2 or (not names and not isinstance(feature, ClassLabel) and np.ptp(labels) == 0):
        raise ValueError(f"Column {column!r} has only the class {str(values[0])!r}; a classifier needs at least two.")
    return Labels(SINGLE, labels, known)


def _is_number(value: Any) -> bool:
    """Return True for a finite number, and for a text of one: one wrong value makes texts of a whole CSV column."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _detect_problem_type(rows: Dataset, column: str | Sequence[str], names: Sequence[str] | None) -> str:
    if not isinstance(column, str) or is_list(rows.features[column]):
        return MULTI
    feature = rows.features[column]
    if names is None and isinstance(feature, Value) and feature.dtype.startswith("float"):
        values = np.asarray(rows[column][:], dtype=float)
        if np.any(np.isfinite(values) & (values != np.floor(values))):
            return REGRESSION
    return SINGLE


def number_labels(
    lists: Sequence[Sequence[Any]], feature: Any, column: str, names: Sequence[str] | None = None
) -> tuple[list[list[int]], list[str]]:
    """Return the class numbers of the labels in ``lists``, and the names of all classes.

    ``lists`` has the labels of each row, and ``feature`` is the type of a label. Labels are
    class names if labels are strings, or if any label is in ``names``. Otherwise, labels are
    class numbers. If ``names`` is None, use the names of the ClassLabel. Without a ClassLabel,
    use the sorted strings of the column, or the numbers from 0 to the largest label.
    """
    is_class = isinstance(feature, ClassLabel)
    if not (is_class or is_text(feature) or (isinstance(feature, Value) and feature.dtype.startswith(_NUMBERS))):
        raise ValueError(f"Column {column!r} holds {feature}, not classes; use strings or numbers from 0.")
    names = list(names or (feature.names if is_class else ()))
    keys = [[_name(label, feature) for label in labels] for labels in lists]
    used = {key for labels in keys for key in labels}
    numbers: dict[Any, int]
    if is_text(feature) or used & set(names):
        names = names or sorted(used - {None})
        numbers = {name: number for number, name in enumerate(names)}
        allowed = f"are {', '.join(names)}"
    else:
        keys = [list(labels) for labels in lists]
        whole = (int(key) for labels in keys for key in labels if key is not None and float(key).is_integer())
        count = len(names) or 1 + max(whole, default=0)
        if not names and count > max(len(lists), _CLASSES_OF_FEW_ROWS):
            raise ValueError(
                f"Column {column!r} has the label {count - 1}, which needs {count} classes for "
                f"{len(lists)} rows; number the classes from 0, use their names, or give labels: with all names."
            )
        numbers = {number: number for number in range(count)}
        allowed = f"are numbered 0 to {count - 1}" + (f" ({', '.join(names)})" if names else "")
        names = names or list(map(str, range(count)))
    for row, labels in enumerate(keys):
        for place, key in enumerate(labels):
            if key not in numbers:
                raise ValueError(
                    f"Row {row + 1} has the label {lists[row][place]!r} in {column!r}; the classes "
                    f"{allowed}. Correct it or remove the row."
                )
    return [[numbers[key] for key in labels] for labels in keys], names


def is_text(feature: Any) -> bool:
    """Return True if the column type ``feature`` is a string type."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_list(feature: Any) -> bool:
    """Return True if the column type ``feature`` is a list type."""
    return isinstance(feature, List | LargeList)


def _name(label: Any, feature: Any) -> Any:
    """Return the class name of a label as a string, or None if the label is not valid."""
    if isinstance(feature, ClassLabel):
        known = isinstance(label, int) and 0 <= label < len(feature.names)
        return feature.names[label] if known else None
    if label is None or isinstance(label, str):
        return label
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def refuse_first(values: Sequence[Any], good: Any, column: str, advice: str) -> None:
    """Raise a ValueError for the first of ``values`` whose entry in ``good`` is False."""
    good = np.asarray(good, dtype=bool)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"Row {row + 1} has {column}={values[row]!r}; {advice}.")


def _read_sets(
    sets: Sequence[Sequence[Any]],
    feature: Any,
    column: str,
    names: Sequence[str] | None,
) -> Labels:
    if not is_list(feature):
        raise ValueError(
            f"Column {column!r} holds {feature}, one label per row; {MULTI} needs lists of classes, "
            "or several columns of 0 and 1."
        )
    flags = [labels for labels in sets if labels is not None and len(labels) > 1 and {*labels} <= {0, 1}]
    if len(flags) == len(sets) and any(sorted(set(labels)) != list(labels) for labels in flags):
        raise ValueError(
            f"Column {column!r} holds indicator lists such as {list(sets[0])!r}, with 0 or 1 for each class; give the "
            "classes of each row, such as [0, 2], or a column of 0 and 1 for each class."
        )
    refuse_first(sets, [labels is not None for labels in sets], column, "give its classes, or remove the row")
    unique = [len(set(labels)) == len(labels) for labels in sets]
    refuse_first(sets, unique, column, "a list names each class once; remove repetitions")
    classes, known = number_labels(sets, feature.feature, column, names)
    if not known:
        raise ValueError(f"Column {column!r} has no class in any row; give at least one.")
    values = np.zeros((len(sets), len(known)), dtype=np.float32)
    for row, numbers in enumerate(classes):
        values[row, numbers] = 1
    return Labels(MULTI, values, known)


def _read_flags(rows: Dataset, columns: Sequence[str], names: Sequence[str] | None) -> Labels:
    if names and len(names) != len(columns):
        raise ValueError(f"{len(columns)} label columns need as many names, got {len(names)}; name each column once.")
    values = np.zeros((len(rows), len(columns)), dtype=np.float32)
    for number, column in enumerate(columns):
        flags = rows[column][:]
        good = [flag in (0, 1) for flag in flags]
        refuse_first(flags, good, column, "each column of labels must hold 0 or 1")
        values[:, number] = flags
    return Labels(MULTI, values, list(names or columns))
