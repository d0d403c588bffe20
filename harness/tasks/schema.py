"""Checks rows against a declared schema; errors name the file, the row and the field.

The schemas are declared with `datasets.Features`, but the check is ours: the readers of `datasets` cast silently
(a number becomes a string, a missing column becomes null), and their errors name neither row nor field.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, List, Value

from cacheslide.errors import DataError


@dataclass(frozen=True)
class Schema:
    """The fields of one row that a loader relies on. Other fields in a file are dropped.

    Parameters
    ----------
    features : datasets.Features
        Name and type of every field.
    optional : frozenset of str
        Top-level fields that may be absent (then they are absent from the checked row as well).
    nullable : frozenset of str
        Top-level fields that must be present but may be null.
    """

    features: Features
    optional: frozenset[str] = frozenset()
    nullable: frozenset[str] = frozenset()

    def check(self, row: Any, where: str) -> dict[str, Any]:
        """Return the declared fields of `row`; raise `DataError` beginning with `where` at the first wrong one."""
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object with fields, found {_kind(row)}")
        checked = {}
        for name, feature in self.features.items():
            if name in self.optional and row.get(name) is None:
                continue
            if name not in row:
                raise DataError(f"{where}: field {name!r} is missing")
            if not (row[name] is None and name in self.nullable):
                _check(row[name], feature, name, where)
            checked[name] = row[name]
        return checked


def _check(value: Any, feature: Any, field: str, where: str) -> None:
    if isinstance(feature, Mapping):
        if not isinstance(value, Mapping):
            raise DataError(f"{where}: field {field!r} must be {_name(feature)}, found {_kind(value)}")
        for name, inner in feature.items():
            if name not in value:
                raise DataError(f"{where}: field '{field}.{name}' is missing")
            _check(value[name], inner, f"{field}.{name}", where)
    elif isinstance(feature, List):
        if not isinstance(value, list):
            raise DataError(f"{where}: field {field!r} must be {_name(feature)}, found {_kind(value)}")
        for i, item in enumerate(value):
            _check(item, feature.feature, f"{field}[{i}]", where)
    elif not _is_scalar(value, feature):
        raise DataError(f"{where}: field {field!r} must be {_name(feature)}, found {_kind(value)}")


def _is_scalar(value: Any, feature: Value) -> bool:
    if feature.dtype == "string":
        return isinstance(value, str)
    if feature.dtype == "bool":
        return isinstance(value, bool)
    if feature.dtype.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool)
    raise DataError(f"schema type {feature.dtype!r} is not supported")


def _name(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return "an object with " + ", ".join(feature)
    if isinstance(feature, List):
        return "a list of " + _name(feature.feature)
    return feature.dtype


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {"str": "string", "dict": "object"}.get(type(value).__name__, type(value).__name__)
