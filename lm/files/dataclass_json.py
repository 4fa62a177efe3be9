"""Configs from JSON: frozen dataclasses, every field's name and type checked.

read(Config, {'d_model': 64, 'window_pattern': [True, False]}, 'model config')
"""

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar('T')


def read(kind: type[T], fields: Any, name: str) -> T:
    """Returns the dataclass whose `dataclasses.asdict` went through JSON to become `fields`.

    A field may be a number, a string, a Boolean, a `Literal`, another such dataclass, or a tuple
    of one of these; `| None` where it is optional. Fields with a default may be absent.

    Args:
      kind: a dataclass.
      fields: the values of its fields.
      name: says in an error whose fields these are.

    Raises:
      ValueError: a field is unknown, missing or of another type, or the dataclass refuses a value;
        names the field.
    """
    if not isinstance(fields, dict):
        raise ValueError(f'{name}: expected an object of fields')
    known: dict[str, Any] = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    required = {field.name for field in known.values() if _is_required(field)}
    unknown, missing = sorted(set(fields) - set(known)), sorted(required - set(fields))
    if unknown or missing:
        raise ValueError(f'{name}: unknown fields {unknown}, missing fields {missing}')
    values = {
        field: _value(known[field].type, x, f'{name}: {field}') for field, x in fields.items()
    }
    return kind(**values)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, name: str) -> Any:
    """Returns a field's value as its type has it: JSON knows neither tuples nor dataclasses."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is types.UnionType:
        for part in parts:
            if _fits(part, value):
                return _value(part, value, name)
    elif typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_value(parts[0], item, name) for item in value)
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return read(typing.cast(type, kind), value, name)
    if not _fits(kind, value):
        expected = str(kind).removeprefix('typing.') if parts else kind.__name__
        raise ValueError(f'{name}: {value!r}; expected {expected}')
    return value


def _fits(kind: Any, value: Any) -> bool:
    """Returns whether a JSON value can stand in a field of this type."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is types.UnionType:
        return any(_fits(part, value) for part in parts)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple)
    if typing.get_origin(kind) is Literal:
        return value in parts
    if dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return type(value) in ((int, float) if kind is float else (kind,))
