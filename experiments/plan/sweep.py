"""Every mesh of a slice by several batches: which gives a token soonest among those that fit."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath
from jax.sharding import AbstractMesh, AxisType

from experiments import plots, report
from experiments.plan import chips, costs, steps
from experiments.plan.chips import GIB, Topology
from experiments.plan.config import Config
from experiments.plan.costs import Memory, Roofline
from experiments.report import Column
from lm import mesh as mesh_lib

SHOWN = 24


class Choice(NamedTuple):
    """One mesh and batch, with what is counted for it.

    Attributes:
      config: of this choice alone.
      data, model: sizes of its mesh.
      memory: see `costs.Memory`.
      roofline: see `costs.Roofline`.
      fits: whether the counted memory is there.
    """

    config: Config
    data: int
    model: int
    memory: Memory
    roofline: Roofline
    fits: bool

    @property
    def tokens(self) -> int:
        """Of one step."""
        return tokens(self.config)

    @property
    def seconds_per_token(self) -> float:
        """Of the whole slice."""
        return self.roofline.seconds / self.tokens


def tokens(config: Config) -> int:
    """Returns how many tokens a step trains on or makes."""
    return config.batch * (config.length if config.step == 'train' else 1)


def abstract_mesh(data: int, model: int) -> AbstractMesh:
    """Returns a mesh without devices, enough to count with."""
    return AbstractMesh((data, model), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 2)


def evaluate(config: Config, data: int, model: int) -> Choice:
    """Returns one choice; nothing is compiled.

    Raises:
      ValueError: the rows do not divide over `data`.
    """
    topology = chips.parse(config.topology)
    mesh = abstract_mesh(data, model)
    body = steps.model_config(config)
    step = steps.make(config, body, mesh)
    memory = costs.memory(body, config.batch, config.length, step.parts, mesh)
    counted = costs.count(body, config.batch, config.length, config.step, mesh)
    roofline = costs.roofline(counted, topology, {'data': data, 'model': model})
    return Choice(config, data, model, memory, roofline, memory.total <= topology.chip.hbm_bytes)


def choices(config: Config) -> list[Choice]:
    """Returns every mesh and batch whose rows divide, those that fit first, fastest first.

    Of choices whose times per token are equal within a percent, the one whose compute, traffic
    and communication together take least comes first: it depends least on their overlap.
    """
    topology = chips.parse(config.topology)
    batches = config.batches or tuple(config.batch * 2**k // 4 for k in range(6))
    found = [
        evaluate(
            dataclasses.replace(
                config, batch=batch, mesh=f'data={data},model={model}', sweep=False
            ),
            data,
            model,
        )
        for data, model in factorisations(topology.devices)
        for batch in sorted({b for b in batches if b >= 1})
        if batch % data == 0
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


def factorisations(devices: int) -> list[tuple[int, int]]:
    """Returns all (data, model) whose product is the number of devices."""
    return [(devices // m, m) for m in range(1, devices + 1) if devices % m == 0]


def show(config: Config, found: Sequence[Choice], out: epath.Path) -> None:
    """Prints the table and saves `sweep.png`."""
    rows = [
        {
            'mesh': f'{choice.data} x {choice.model}',
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
        Column('mesh', 'data x model'),
        Column('batch', 'batch', 'd'),
        Column('fits', 'fits'),
        Column('memory', 'GiB per device', '.2f'),
        Column('ms', 'ms per step', '.2f'),
        Column('us', 'us per token', '.4g'),
        Column('bound', 'bound'),
    ]
    topology = chips.parse(config.topology)
    notes = ['counted, not compiled; time is the roofline of the slice, fastest first']
    if len(found) > SHOWN:
        notes.append(f'{len(found) - SHOWN} more in result.json')
    title = f'{config.preset}, {config.step}, length {config.length}, {topology.name}'
    report.table(rows, columns, title, notes)
    _plot(found, topology, title, out / 'sweep.png')


def _plot(found: Sequence[Choice], topology: Topology, title: str, path: epath.Path) -> None:
    fitting = [choice for choice in found if choice.fits]
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for choice in sorted(fitting or found, key=lambda c: (-c.data, c.config.batch)):
        x, y = lines.setdefault(f'data={choice.data}, model={choice.model}', ([], []))
        x.append(choice.config.batch)
        y.append(choice.seconds_per_token * 1e6)
    note = 'those that fit' if fitting else 'none fits'
    plots.curves(
        path, lines, title=f'{title}: {note}', x_label='batch, rows over all devices',
        y_label='roofline, us per token of the slice', log_x=True, log_y=True, markers=True,
    )  # fmt: skip


def metrics(found: Sequence[Choice]) -> dict[str, float]:
    """Returns the numbers of all choices, for `result.json`."""
    result = {}
    for choice in found:
        where = {'data': choice.data, 'model': choice.model, 'batch': choice.config.batch}
        result[report.key('seconds_per_token', 'sweep', **where)] = choice.seconds_per_token
        result[report.key('bytes_per_device', 'sweep', **where)] = choice.memory.total
        result[report.key('fits', 'sweep', **where)] = float(choice.fits)
    return result
