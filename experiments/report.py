"""Results of a run: metrics, tables, and the environment they were measured in."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text
from etils import epath

from lm.files import atomic, provenance

MISSING = '–'
_WIDTH = 160  # characters per line when the output is a file or a pipe


def write_json_atomic(path: epath.PathLike, obj: Any) -> None:
    """Writes `obj` as JSON with sorted keys, atomically (see `write_text_atomic`).

    Dataclasses become dicts, paths strings, NumPy and JAX scalars numbers, and arrays lists.

    Raises:
      TypeError: a value has no JSON form.
      ValueError: a number is not finite, which JSON cannot represent.
    """
    write_text_atomic(path, to_json(obj) + '\n')


def write_text_atomic(path: epath.PathLike, text: str) -> None:
    """Writes a text file atomically: a reader sees the old text or the new one.

    In a multi-process run, only process 0 writes; the others do not wait.
    """
    from lm.devices import processes  # late: it imports JAX

    if not processes.is_first():
        return
    with atomic.new_file(path) as partial:
        partial.write_text(text)


def to_json(obj: Any) -> str:
    """Returns the JSON text that `write_json_atomic` writes."""
    return json.dumps(_jsonable(obj), indent=2, sort_keys=True, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, '__name__')):
        return value.__name__
    return value.tolist() if hasattr(value, 'tolist') else value


def key(metric: str, row: str, **conditions: object) -> str:
    """Returns the key of a metric in `result.json`: `metric/row[/name=value...]`.

    `key('block_efficiency', 'recursive', budget=14, temperature=0.6)` is
    `'block_efficiency/recursive/budget=14/temperature=0.6'`. Conditions keep their order.

    Raises:
      ValueError: a part is empty or contains a slash or blank, or a metric or row contains `=`.
    """
    for part in (metric, row):
        if '=' in part:
            raise ValueError(f'{part!r}: a metric or row may not contain "="')
    parts = [metric, row]
    for name, value in conditions.items():
        parts.append(f'{name}={value:g}' if isinstance(value, float) else f'{name}={value}')
    for part in parts:
        if not part or part.endswith('=') or any(c == '/' or c.isspace() for c in part):
            raise ValueError(
                f'{part!r}: expected a non-empty part of a key, without slash or blank'
            )
    return '/'.join(parts)


def claim(holds: bool, what: str) -> str:
    """Returns a line that states whether our numbers reproduce a finding of a paper."""
    return f'{"shown" if holds else "NOT SHOWN at this scale"}: {what}'


def environment() -> dict[str, Any]:
    """Returns the environment of a measurement, except the accelerator (see `devices`).

    Keys: `commit` and `dirty` (None outside a git checkout), `date` (UTC), the versions `python`,
    `jax`, `jaxlib` and `numpy`, `platform`, `cpu`, and `cpu_cores` available to this process.
    """
    commit, dirty = provenance.commit()
    return {
        'commit': commit,
        'dirty': dirty,
        'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'numpy')},
        'platform': platform.platform(terse=True),
        'cpu': _cpu(),
        'cpu_cores': len(os.sched_getaffinity(0))
        if hasattr(os, 'sched_getaffinity')
        else os.cpu_count(),
    }


def devices() -> dict[str, Any]:
    """Returns JAX's `device` kind, `device_count` and `process_count`.

    Initialises JAX's backends: call it after `jax.distributed.initialize`, if at all.
    """
    import jax

    return {
        'device': jax.devices()[0].device_kind,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.machine()


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
      field: the key of a row's dict.
      header: the column's heading, with the unit.
      format: format spec of numbers, as in `format(value, '.3f')`; text is printed unchanged.
    """

    field: str
    header: str
    format: str = '.3f'

    def cell(self, row: Mapping[str, Any]) -> str:
        """Returns the text of this column in `row`; a dash where the row has no value."""
        value = row.get(self.field)
        if value is None:
            return MISSING
        return value if isinstance(value, str) else format(value, self.format)


def table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    title: str,
    footnotes: Sequence[str] = (),
    console: rich.console.Console | None = None,
) -> None:
    """Prints `rows` under `title`; columns of text are left-aligned, numbers right-aligned."""
    console = console or rich.console.Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    grid = rich.table.Table(title=rich.text.Text(title), title_justify='left')
    for column in columns:
        grid.add_column(
            rich.text.Text(column.header), justify='left' if _is_text(rows, column) else 'right'
        )
    for row in rows:
        grid.add_row(*(rich.text.Text(column.cell(row)) for column in columns))
    console.print(grid)
    for note in footnotes:
        console.print(f'  {note}', markup=False, highlight=False)


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], footnotes: Sequence[str] = ()
) -> str:
    """Returns the same table as GitHub Markdown, for a README."""
    lines = [
        [_escape(column.header) for column in columns],
        ['---' if _is_text(rows, column) else '---:' for column in columns],
        *([_escape(column.cell(row)) for column in columns] for row in rows),
    ]
    text = ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
    return text + ''.join(f'\n{note}\n' for note in footnotes)


def _is_text(rows: Sequence[Mapping[str, Any]], column: Column) -> bool:
    values = [row.get(column.field) for row in rows]
    return any(isinstance(value, str) for value in values)


def _escape(text: str) -> str:
    return text.replace('|', '\\|').replace('\n', ' ')
