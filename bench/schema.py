"""Whether what a file holds is of the types that the code expects: an error names the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

__all__ = ["SchemaError", "checked"]

_MOST_TEXT = 2000


class SchemaError(ValueError):
    """A field holds something else than it should."""


def checked(hint: Any, value: Any, where: str) -> Any:  # noqa: PLR0911 (one for each kind)
    """The value as ``hint`` says: a dataclass of an object, a tuple of a list, and so on.

    Args:
        hint: A type: of text, numbers (not negative), lists, tuples, dictionaries by name,
            dataclasses, unions with ``None`` and ``Any``.
        value: What was read from JSON.
        where: What the value is called in errors.

    Raises:
        SchemaError: It is something else; the error names the field.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return checked(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if origin is dict:
        found = _of(dict, value, where)
        return {name: checked(arguments[1], each, f"{where}[{name!r}]") for name, each in found.items()}
    if origin in (list, tuple):
        found = _of(list, value, where)
        kinds = arguments if origin is tuple else arguments * len(found)
        if len(kinds) != len(found):
            raise SchemaError(f"{where}: expected {len(kinds)} items, got {len(found)}")
        pairs = enumerate(zip(kinds, found, strict=True))
        return origin(checked(kind, each, f"{where}[{i}]") for i, (kind, each) in pairs)
    if hint is float:
        number = _of((int, float), value, where)
        if not number >= 0:
            raise SchemaError(f"{where}: expected a number that is not negative, got {number}")
        return number
    if hint is str and isinstance(value, str) and len(value) > _MOST_TEXT:
        raise SchemaError(f"{where}: expected at most {_MOST_TEXT} characters, got {len(value)}")
    return _of(hint, value, where)


def _of(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
    raise SchemaError(f"{where}: expected {names}, got {type(value).__name__}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    found = _of(dict, value, where)
    hints = typing.get_type_hints(kind)
    known = dataclasses.fields(kind)
    needed = {field.name for field in known if field.default is dataclasses.MISSING}
    if missing := sorted(needed - found.keys()):
        raise SchemaError(f"{where}: expected {', '.join(missing)}, got none")
    if unknown := sorted(found.keys() - {field.name for field in known}):
        raise SchemaError(f"{where}: expected no {', '.join(map(repr, unknown))}")
    return kind(**{name: checked(hints[name], each, f"{where}.{name}") for name, each in found.items()})
