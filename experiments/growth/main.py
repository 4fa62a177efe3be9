"""Computes and prints both tables, saving each row when it is done."""

import functools
from collections.abc import Sequence
from typing import Any

from etils import epath

from experiments import report, resume
from experiments.growth import fake, slices
from experiments.growth.config import Config
from experiments.plan.chips import GIB
from experiments.report import Column
from lm.training.metrics import ProgressLine

TOLERANCE = 1e-5


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Computes the rows that `out` does not hold yet; returns all metrics."""
    wanted = [(name, ways) for name in config.slices for ways in config.model_ways]
    make = fake.compiler(config)
    trained: list[dict[str, Any]] = []
    planned: list[dict[str, Any]] = []
    with ProgressLine('growth', len(config.meshes) + len(wanted)) as progress:
        for text in config.meshes:
            progress.update(len(trained), text)
            file = out / 'parts' / f'fake_{text.replace("=", "_").replace(",", "_")}.json'
            trained.append(resume.part_once(file, functools.partial(fake.row, config, text, make)))
        for name, ways in wanted:
            progress.update(len(trained) + len(planned), f'{name}, model={ways}')
            file = out / 'parts' / f'{slices.file_name(name, ways)}.json'
            plan = functools.partial(slices.row, config, name, ways, out)
            planned.append(resume.part_once(file, plan))
        progress.update(len(trained) + len(planned))
    return show_trained(config, trained) | show_planned(config, planned)


def show_trained(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prints the table of fake devices; returns its metrics."""
    columns = [
        Column('mesh', 'mesh'),
        Column('devices', 'devices', 'd'),
        Column('first_difference', 'loss difference, first step', '.1e'),
        Column('difference', 'all steps', '.1e'),
        Column('ratio', 'relative step time', '.2f'),
        Column('kept', 'MiB between steps', '.2f'),
        Column('step', 'extra MiB in a step', '.2f'),
        Column('sent', 'MB sent', '.2f'),
        Column('collectives', 'collectives of a step (axis)'),
    ]
    cells = [
        row | {'kept': row['kept_bytes'] / 2**20, 'step': row['step_bytes'] / 2**20,
               'sent': row['sent_bytes'] / 1e6}
        for row in rows
    ]  # fmt: skip
    worst = max(row['difference'] for row in rows)
    report.table(
        cells, columns,
        f'{config.small} in float32, {config.batch} x {config.small_length}, on fake CPU devices',
        [
            report.claim(worst <= TOLERANCE, f'all losses of {config.steps} steps equal those of '
                         f'{config.meshes[0]} within {TOLERANCE:g}, relative; AdamW divides by the '
                         'size of the gradients, which amplifies rounding errors'),
            f'step time: relative to {config.meshes[0]} in the same process; devices share its '
            f'cores ({rows[0]["ms"]:.1f} ms)',
            'MiB: per device, from memory_analysis; MB sent: per device, with ring collectives',
        ],
    )  # fmt: skip
    names = {name: name for name in ('loss', 'kept_bytes', 'step_bytes', 'sent_bytes')}
    names |= {'difference': 'loss_difference', 'first_difference': 'first_loss_difference'}
    names |= {'ratio': 'step_time_ratio'}
    return {
        report.key(name, 'fake', mesh=row['mesh']): float(row[field])
        for row in rows
        for field, name in names.items()
    }


def show_planned(config: Config, planned: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prints the table of slices; returns its metrics."""
    rows = [slices.summary(found) for found in planned]
    if not rows:
        return {}
    columns = [
        Column('slice', 'slice'),
        Column('mesh', 'mesh'),
        Column('chips', 'chips', 'd'),
        Column('kept', 'GiB between steps', '.3f'),
        Column('counted', 'GiB estimated', '.2f'),
        Column('compiled', 'compiled', '.2f'),
        Column('sent', 'GB sent estimated', '.2f'),
        Column('really', 'compiled', '.2f'),
        Column('compute', 'ms compute', '.1f'),
        Column('network', 'network', '.1f'),
        Column('ms', 'step', '.1f'),
        Column('rate', 'tokens/s', '.0f'),
    ]
    cells = [
        row
        | {'kept': row['kept_bytes'] / GIB, 'counted': row['counted_bytes'] / GIB}
        | {'compiled': _scaled(row['compiled_bytes'], GIB), 'sent': row['counted_sent'] / 1e9}
        | {'really': _scaled(row['compiled_sent'], 1e9), 'compute': row['compute_s'] * 1e3}
        | {'network': row['network_s'] * 1e3, 'ms': row['step_s'] * 1e3}
        | {'rate': row['tokens_per_chip_s']}
        for row in rows
    ]
    title = f'{config.preset}, training, {config.rows_per_chip} rows of {config.length} per chip'
    report.table(
        cells, columns, title,
        ['per chip; estimated: from the config alone; compiled: by the TPU compiler',
         'step time: maximum of compute, memory and network time in the planner\'s model, whose '
         'full output is in plans/'],
    )  # fmt: skip
    if any(row['collectives'] for row in rows):
        columns = [
            *columns[:2],
            Column('collectives', 'GB sent per chip, by collective (axis)'),
        ]
        report.table(rows, columns, 'Collectives of the compiled steps')
    fields = ('kept_bytes', 'counted_bytes', 'compiled_bytes', 'counted_sent', 'compiled_sent',
              'compute_s', 'network_s', 'step_s', 'tokens_per_chip_s')  # fmt: skip
    return {
        report.key(field, row['slice'], mesh=row['mesh']): float(row[field])
        for row in rows
        for field in fields
        if row[field] is not None
    }


def _scaled(amount: float | None, unit: float) -> float | None:
    return None if amount is None else amount / unit
