"""Sweeps all meshes of a slice and several batches for the lowest time per token that fits."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from experiments import plots, report
from experiments.plan import chips, costs, roofline, steps
from experiments.plan.chips import GIB, Topology
from experiments.plan.config import Config
from experiments.plan.costs import Memory
from experiments.plan.roofline import Roofline
from experiments.report import Column
from lm.devices import mesh as mesh_lib
from lm.devices.mesh import Sizes

SHOWN = 24


class Choice(NamedTuple):
    """One mesh and batch, with its estimated cost.

    Attributes:
      config: the config with this mesh and batch.
      mesh: sizes of the mesh.
      memory: see `costs.Memory`.
      roofline: see `roofline.Roofline`.
      fits: whether the estimated memory fits on a device.
    """

    config: Config
    mesh: Sizes
    memory: Memory
    roofline: Roofline
    fits: bool

    @property
    def tokens(self) -> int:
        """Number of tokens per step."""
        return tokens(self.config)

    @property
    def seconds_per_token(self) -> float:
        """Roofline seconds per token of the whole slice."""
        return self.roofline.seconds / self.tokens


def tokens(config: Config) -> int:
    """Returns the number of tokens that a step trains on or generates."""
    return config.batch * (config.length if config.step == 'train' else 1)


def evaluate(config: Config, sizes: Sizes) -> Choice:
    """Returns one choice with its estimated cost; compiles nothing.

    Raises:
      ValueError: the rows do not divide over `data`.
    """
    topology = chips.parse(config.topology)
    mesh = mesh_lib.abstract(**sizes._asdict())
    body = steps.model_config(config)
    step = steps.make(config, body, mesh)
    memory = costs.memory(body, config.batch, config.length, step.parts, mesh)
    counted = costs.count(body, config.batch, config.length, config.step, mesh)
    times = roofline.roofline(counted, topology, sizes._asdict())
    return Choice(config, sizes, memory, times, memory.total <= topology.chip.hbm_bytes)


def choices(config: Config) -> list[Choice]:
    """Returns all meshes and batches whose rows divide: those that fit first, fastest first.

    For training steps, sequences are also sharded over devices where their length allows it.

    Among choices whose times per token agree within a percent, the one with the lowest sum of
    compute, memory and network time comes first: it depends least on their overlap.
    """
    topology = chips.parse(config.topology)
    batches = config.batches or tuple(config.batch * 2**k // 4 for k in range(6))
    found = [
        evaluate(dataclasses.replace(config, batch=batch, mesh=flag(sizes), sweep=False), sizes)
        for sizes in meshes(topology.devices, config)
        for batch in sorted({b for b in batches if b >= 1})
        if batch % sizes.data == 0
    ]
    if not found:
        raise ValueError(f'--batches {batches}: none is a multiple of the data axis of any mesh')
    fastest = min(choice.seconds_per_token for choice in found)
    return sorted(
        found,
        key=lambda c: (
            not c.fits,
            round(c.seconds_per_token / fastest, 2),
            sum(c.roofline) / c.tokens,
        ),
    )


def meshes(devices: int, config: Config) -> list[Sizes]:
    """Returns the sizes of all meshes of `devices` devices that support the step."""
    divisors = [m for m in range(1, devices + 1) if devices % m == 0]
    cuts = [1] if config.step == 'decode' else divisors
    return [
        Sizes(devices // (sequence * model), sequence, model)
        for sequence in cuts
        if sequence == 1 or config.length % (2 * sequence) == 0
        for model in divisors
        if devices % (sequence * model) == 0
    ]


def flag(sizes: Sizes) -> str:
    """Returns mesh sizes in the syntax of `--mesh`."""
    return ','.join(
        f'{axis}={size}' for axis, size in sizes._asdict().items() if size > 1 or axis != 'sequence'
    )


def show(config: Config, found: Sequence[Choice], out: epath.Path) -> None:
    """Prints the table of choices and saves `sweep.png`."""
    rows = [
        {
            'mesh': ' x '.join(map(str, choice.mesh)),
            'batch': choice.config.batch,
            'fits': 'yes' if choice.fits else 'no',
            'memory': choice.memory.total / GIB,
            'ms': choice.roofline.seconds * 1e3,
            'us': choice.seconds_per_token * 1e6,
            'bound': choice.roofline.bound,
        }
        for choice in found[:SHOWN]
    ]
    columns = [
        Column('mesh', ' x '.join(mesh_lib.AXES)),
        Column('batch', 'batch', 'd'),
        Column('fits', 'fits'),
        Column('memory', 'GiB per device', '.2f'),
        Column('ms', 'ms per step', '.2f'),
        Column('us', 'us per token', '.4g'),
        Column('bound', 'bound'),
    ]
    topology = chips.parse(config.topology)
    notes = ['estimated, not compiled; times are rooflines of the slice, fastest first']
    if len(found) > SHOWN:
        notes.append(f'{len(found) - SHOWN} more in result.json')
    title = f'{config.preset}, {config.step}, length {config.length}, {topology.name}'
    report.table(rows, columns, title, notes)
    _plot(found, topology, title, out / 'sweep.png')


def _plot(found: Sequence[Choice], topology: Topology, title: str, path: epath.Path) -> None:
    fitting = [choice for choice in found if choice.fits]
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for choice in sorted(fitting or found, key=lambda c: (-c.mesh.data, c.config.batch)):
        x, y = lines.setdefault(flag(choice.mesh), ([], []))
        x.append(choice.config.batch)
        y.append(choice.seconds_per_token * 1e6)
    note = 'choices that fit' if fitting else 'no choice fits'
    plots.curves(
        path, lines, title=f'{title}: {note}', x_label='batch, rows over all devices',
        y_label='roofline, us per token of the slice', log_x=True, log_y=True, markers=True,
    )  # fmt: skip


def metrics(found: Sequence[Choice]) -> dict[str, float]:
    """Returns the metrics of all choices, for `result.json`."""
    result = {}
    for choice in found:
        where = {**choice.mesh._asdict(), 'batch': choice.config.batch}
        result[report.key('seconds_per_token', 'sweep', **where)] = choice.seconds_per_token
        result[report.key('bytes_per_device', 'sweep', **where)] = choice.memory.total
        result[report.key('fits', 'sweep', **where)] = float(choice.fits)
    return result
