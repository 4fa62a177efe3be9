"""Reads JSON objects from untrusted files: size is bounded, every field is checked."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

MOST = 2**31  # limit of whole numbers
MOST_BYTES = 100_000_000  # limit of a file, and safetensors' own limit of a header


def read(file: epath.PathLike) -> dict[str, Any]:
    """Returns the object in a JSON file; raises as `read_value`, and refuses other values."""
    return _object(read_value(file), str(file))


def read_value(file: epath.PathLike) -> Any:
    """Returns the value in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is too large, or refused as in `parse`; names the file.
    """
    file = epath.Path(file)
    if not file.is_file():
        raise FileNotFoundError(f'{file}: no such file')
    size = file.stat().length
    if size > MOST_BYTES:
        raise ValueError(f'{file}: {size:,} bytes of JSON; expected at most {MOST_BYTES:,}')
    return _value(file.read_bytes(), str(file))


def parse(data: bytes | str, name: str) -> dict[str, Any]:
    """Parses a JSON object; `name` says in errors where `data` is from.

    Raises:
      ValueError: invalid JSON, nested too deeply, a duplicate key, NaN or Infinity, or a value that
        is not an object.
    """
    return _object(_value(data, name), name)


class Fields:
    """The fields of one object. Reading records each problem and continues.

    Attributes:
      values: the fields.
      problems: one line per field that is missing or invalid.
    """

    def __init__(self, values: Mapping[str, Any], problems: list[str] | None = None):
        self.values = dict(values)
        self.problems = [] if problems is None else problems

    def given(self, name: str) -> bool:
        """Returns whether a field is present and not null."""
        return self.values.get(name) is not None

    def refuse(self, name: str, expected: str) -> None:
        """Records that a field is not as expected."""
        self.problems.append(f'{name}: {short(self.values.get(name))}; expected {expected}')

    def count(self, name: str, least: int = 1) -> int:
        """Returns a whole number from `least` to 2**31 - 1."""
        value = self.values.get(name)
        if type(value) is int and least <= value < MOST:
            return value
        self.refuse(name, f'a whole number, {least} to {MOST - 1}')
        return max(least, 2)

    def number(self, name: str, least: float = 0.0) -> float:
        """Returns a positive number, `least` or more."""
        value: Any = self.values.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and least <= value < 1e30 and value > 0:
            return float(value)
        self.refuse(name, f'a number, {least:g} or more' if least else 'a positive number')
        return max(least, 1.0)

    def one_of(self, name: str, known: Mapping[str, Any]) -> Any:
        """Returns the value of `known` that a word stands for."""
        value = self.values.get(name)
        if isinstance(value, str) and value in known:
            return known[value]
        self.refuse(name, ' or '.join(known))
        return next(iter(known.values()))

    def flag(self, name: str) -> bool:
        """Returns whether a field is true."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            self.refuse(name, 'true or false')
        return value is True

    def part(self, name: str) -> dict[str, Any]:
        """Returns an object; empty if the field is missing or null."""
        value = self.values.get(name)
        if value is None or isinstance(value, dict):
            return value or {}
        self.refuse(name, 'an object')
        return {}


def short(value: Any) -> str:
    """Returns a value as error messages show it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{name}: damaged: expected a JSON object')
    return value


def _value(data: bytes | str, name: str) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{name}: damaged: {error}') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError('duplicate key')
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f'{constant} is not valid JSON')
