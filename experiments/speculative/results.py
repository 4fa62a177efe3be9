"""Keys, tables, findings and plots of the comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments import plots, report
from experiments.report import Column
from experiments.speculative import drafters
from experiments.speculative.config import Config

METRICS = (
    'block_efficiency', 'block_efficiency_error', 'memory_bound_speedup', 'acceptance',
    'tokens_per_s', 'plain_tokens_per_s', 'speedup',
)  # fmt: skip
_CELLS = {
    'block_efficiency': ('tokens/pass', '.2f'),
    'memory_bound_speedup': ('bound', '.2f'),
    'tokens_per_s': ('tokens/s', '.0f'),
    'speedup': ('speed-up', '.2f'),
}
FOOTNOTES = (
    'tokens/pass: block efficiency, tokens per pass of the target. bound: the speed-up if '
    'decoding is bound by reading weights, tokens/pass over 1 + draft passes x their fraction of '
    "the target's parameters.",
    'tokens/s: over all rows, including prefill. speed-up: over plain decoding of the same prompts '
    'in the same run; medians.',
)
_WALKS = 20  # minimal number of walks at a depth for its rate to be plotted
Rows = Sequence[Mapping[str, Any]]


def flat(rows: Rows, main: int) -> dict[str, float]:
    """Returns `metric/drafter/budget=N/temperature=T/batch=B` -> number.

    At fixed lengths, `length=L` replaces `budget=N`. `draft=R` is added if the draft model is not
    the grid's, and `task=NAME` if the row is of one task.
    """
    return {
        report.key(metric, row['drafter'], **_conditions(row, main)): row[metric]
        for row in rows
        for metric in METRICS
        if row[metric] is not None
    }


def _conditions(row: Mapping[str, Any], main: int) -> dict[str, Any]:
    conditions = {
        row['kind']: row['size'], 'temperature': row['temperature'], 'batch': row['batch'],
    }  # fmt: skip
    if row['ratio'] != main:
        conditions['draft'] = row['ratio']
    if 'task' in row:
        conditions['task'] = row['task']
    return conditions


def tables(rows: Rows, width: int) -> list[tuple[str, list[dict[str, Any]], list[Column]]]:
    """Returns title, rows and columns of one table per size, batch, draft model and task."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        group = tuple(row.get(name) for name in ('kind', 'size', 'batch', 'ratio', 'task'))
        groups.setdefault(group, []).append(row)
    result = []
    for (kind, size, batch, ratio, task), members in groups.items():
        shape = (
            f'budget of {size} nodes' if kind == 'budget'
            else f'length {size}, at most {width} nodes per level'
        )  # fmt: skip
        title = f'{shape}, batch {batch}, draft model 1:{ratio}' + (f', {task}' if task else '')
        temperatures = list(dict.fromkeys(row['temperature'] for row in members))
        columns = [Column('name', 'drafter')] + [
            Column(f'{metric}{t}', f'T={t:g} {header}' if not i else header, form)
            for t in temperatures
            for i, (metric, (header, form)) in enumerate(_CELLS.items())
        ]
        lines: dict[str, dict[str, Any]] = {}
        for row in members:
            line = lines.setdefault(row['drafter'], {'name': drafters.NAMES[row['drafter']]})
            line |= {f'{metric}{row["temperature"]}': row[metric] for metric in _CELLS}
        result.append((title, list(lines.values()), columns))
    return result


def claims(rows: Rows) -> list[str]:
    """Returns a line per budget and temperature: is RSD above SpecTr, and SpecTr above a chain?

    The line states if a difference is smaller than its standard error.
    """
    first = [
        row for row in rows
        if row['kind'] == 'budget' and 'task' not in row
        and (row['batch'], row['ratio']) == (rows[0]['batch'], rows[0]['ratio'])
    ]  # fmt: skip
    lines = []
    for size in dict.fromkeys(row['size'] for row in first):
        for temperature in dict.fromkeys(row['temperature'] for row in first):
            by_name = {
                row['drafter']: row for row in first
                if (row['size'], row['temperature']) == (size, temperature)
            }  # fmt: skip
            place = f'budget {size}, temperature {temperature:g}'
            for better, worse in (
                ('recursive', 'iid'), ('recursive_branching', 'iid'), ('iid', 'chain'),
            ):  # fmt: skip
                if better in by_name and worse in by_name:
                    lines.append(f'{place}: {_claim(by_name[better], by_name[worse])}')
    return lines


def _claim(better: Mapping[str, Any], worse: Mapping[str, Any]) -> str:
    a, b = better['block_efficiency'], worse['block_efficiency']
    errors = [row['block_efficiency_error'] for row in (better, worse)]
    verdict = 'shown' if a > b else 'NOT SHOWN at this scale'
    known = 'error unknown'
    if None not in errors:
        error = np.hypot(*errors)
        verdict += ', within the error' if abs(a - b) < error else ''
        known = f'error {error:.2f}'
    names = [drafters.NAMES[row['drafter']] for row in (better, worse)]
    return f'{verdict}: {names[0]} above {names[1]} ({a:.2f} and {b:.2f}, {known})'


def plot(out: epath.Path, config: Config, rows: Rows) -> None:
    """Saves acceptance by depth, and block efficiency by budget."""
    temperature, batch = config.temperatures[-1], config.batches[0]
    ratio = rows[0]['ratio']
    chosen = [
        row for row in rows
        if (row['temperature'], row['batch'], row['ratio']) == (temperature, batch, ratio)
        and row['kind'] == 'budget' and 'task' not in row
    ]  # fmt: skip
    if not chosen:
        return
    depths, budgets = {}, {}
    for name in config.drafters:
        mine = [row for row in chosen if row['drafter'] == name]
        budgets[drafters.NAMES[name]] = (
            [row['size'] for row in mine], [row['block_efficiency'] for row in mine]
        )  # fmt: skip
        rates = np.array(mine[-1]['acceptance_by_depth'])
        known = max(int((np.array(mine[-1]['walks_by_depth']) >= _WALKS).sum()), 1)
        depths[drafters.NAMES[name]] = (list(range(1, known + 1)), rates[:known].tolist())
    where = f'temperature {temperature:g}, batch {batch}'
    plots.curves(
        out / 'acceptance_by_depth.png', depths, markers=True,
        title=f'Acceptance by depth, {config.budgets[-1]} nodes, {where}', x_label='depth',
        y_label='acceptance rate: fraction of walks that take a child',
    )  # fmt: skip
    plots.curves(
        out / 'block_efficiency.png', budgets, markers=True,
        title=f'Block efficiency, {where}', x_label='draft nodes per pass of the target',
        y_label='tokens per pass',
    )  # fmt: skip
