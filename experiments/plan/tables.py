"""The planner's tables: memory, roofline, collectives and shardings of one step."""

import math
from collections import defaultdict
from typing import Any

import jax

from experiments import report
from experiments.plan import costs as costs_lib
from experiments.plan import roofline as roofline_lib
from experiments.plan.chips import GIB, Topology, axis_bandwidth
from experiments.plan.compile import Compiled, Refused
from experiments.plan.costs import Costs, Memory
from experiments.plan.steps import Step
from experiments.report import Column

LARGEST = 6  # number of collectives listed individually
_EXCESS, _EXCESS_BYTES = (
    1.25,
    2**28,
)  # compiled over estimated memory beyond which a note is printed
_COPIES = 3  # number of copies that such a note lists


def memory(
    counted: Memory, result: Compiled | Refused | None, topology: Topology
) -> tuple[str, dict[str, float]]:
    """Prints memory per device; returns the line that states whether it fits, and the metrics."""
    metrics = {
        report.key('bytes_per_device', name): size for name, size in counted._asdict().items()
    }
    made = result if isinstance(result, Compiled) else None
    total: float | None = counted.total if result is None else result.total
    limit = topology.chip.hbm_bytes
    lines: list[tuple[str, float | None, float | None]] = [
        ('parameters', counted.params, None),
        ('optimizer', counted.optimizer, None),
        ('cache', counted.cache, None),
        ('between steps', counted.kept, made and made.arguments),
        ('gradients and activations', counted.total - counted.kept, made and made.temporaries),
        ('program', None, made and made.code),
        ('total', counted.total, result and total),
        (f'{topology.chip.name} has', limit, limit),
    ]
    rows = [
        {'part': part, 'counted': _gib(count), 'compiled': _gib(size)}
        for part, count, size in lines
    ]
    columns = [
        Column('part', 'GiB per device'),
        Column('counted', 'estimated', '.4g'),
        Column('compiled', 'compiled', '.4g'),
    ]
    columns = columns if result else columns[:-1]
    report.table(rows, columns, 'Memory', _excess(counted.total, result))
    if made is not None:
        for name in ('arguments', 'temporaries', 'code', 'total'):
            metrics[report.key('bytes_per_device', f'compiled_{name}')] = getattr(made, name)
    fits = not isinstance(result, Refused) and (total or 0) <= limit
    needs = '' if total is None else f'{total / GIB:.4g} of '
    line = f'{"fits" if fits else "does not fit"}: {needs}{limit / GIB:.2f} GiB per device '
    line += '(estimated)' if result is None else '(compiled)'
    if isinstance(result, Refused):
        line += f'; compiler: {result.reason}'
    return line, metrics | {report.key('fits', 'step'): float(fits)}


def _excess(counted: float, result: Compiled | Refused | None) -> list[str]:
    """Returns a note if a program needs much more than estimated, with its largest copies."""
    total = result.total if result else None
    if total is None or total <= max(_EXCESS * counted, counted + _EXCESS_BYTES):
        return []
    excess = total - counted
    line = f'the compiled program needs {excess / GIB:.4g} GiB more than estimated, '
    line += f'{total / counted:.3g} times as much: something is off'
    # smaller copies cannot explain the excess
    copies = [c for c in getattr(result, 'copies', ())[:_COPIES] if c.size > excess / 10]
    if copies:
        named = [f'{copy.array}, {copy.size / GIB:.3g} GiB ({copy.source})' for copy in copies]
        line += f'; its largest copies: {"; ".join(named)}'
    return [line]


def _gib(size: float | None) -> float | None:
    return size / GIB if size else None


def roofline(
    counted: Costs,
    tokens: int,
    result: Compiled | Refused | None,
    topology: Topology,
    sizes: dict[str, int],
) -> dict[str, float]:
    """Prints amounts, rates and times of a step of `tokens` tokens; returns the metrics.

    `sizes` are the sizes of the mesh axes.
    """
    chip = topology.chip
    times = roofline_lib.roofline(counted, topology, sizes)
    bandwidth = axis_bandwidth(topology, sizes)
    rows: list[dict[str, Any]] = [
        _rate('compute', counted.device_flops, 'TFLOP', 1e12, chip.flops),
        _rate('memory', counted.hbm_bytes, 'GB', 1e9, chip.hbm_bandwidth),
    ]
    for axis, sent in counted.network_bytes.items():
        rows.append(_rate(f'network, {axis}', sent, 'GB', 1e9, bandwidth[axis]))
    if counted.ring:
        sent = sum(one.network_bytes for one in counted.ring)
        seconds = sum(one.network(chip) for one in counted.ring)
        rows.append(_rate('network, ring attention', sent, 'GB', 1e9, sent / seconds))
    metrics = {
        report.key('flops', 'model'): counted.model_flops,
        report.key('flops', 'device'): counted.device_flops,
        report.key('hbm_bytes', 'device'): counted.hbm_bytes,
        **{report.key('network_bytes', a): size for a, size in counted.network_bytes.items()},
        **{report.key('roofline_s', name): t for name, t in times._asdict().items()},
    }
    share = counted.model_flops / (times.seconds * topology.devices * chip.flops)
    notes = [
        f'bound by {times.bound}: no step is faster than {times.seconds * 1e3:.4g} ms, '
        f'{tokens / times.seconds:.4g} tokens/s; model FLOP/s utilisation at most {share:.1%}',
        f'the model needs {counted.model_flops / 1e12:.4g} TFLOP over all devices',
        'estimated from the config: the compiler\'s own "flops" counts scanned layers once',
    ]
    if isinstance(result, Compiled):
        sent_by: defaultdict[str, float] = defaultdict(float)
        for one in result.program.collectives:
            sent_by[one.axis] += one.network_bytes
        slowest = min(bandwidth.values())
        network = sum(size / bandwidth.get(axis, slowest) for axis, size in sent_by.items())
        metrics[report.key('roofline_s', 'compiled_network')] = network
        note = f'communication of the compiled program takes {network * 1e3:.4g} ms'
        beside = f', {network / times.network:.3g} times the estimate' if times.network else ''
        notes.append(note + beside)
    columns = [
        Column('what', 'per device'),
        Column('amount', 'amount', '.4g'),
        Column('unit', ''),
        Column('rate', 'peak per second', '.4g'),
        Column('ms', 'ms', '.4g'),
    ]
    report.table(rows, columns, 'Roofline of one step', notes)
    return metrics


def _rate(what: str, amount: float, unit: str, scale: float, rate: float) -> dict[str, Any]:
    ms = amount / rate * 1e3
    return {
        'what': what, 'amount': amount / scale, 'unit': unit, 'rate': rate / scale, 'ms': ms,
    }  # fmt: skip


def collectives(result: Compiled) -> dict[str, float]:
    """Prints the compiled program's collectives by kind and axis; returns the metrics."""
    totals: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for one in result.program.collectives:
        total = totals[one.kind, one.axis]
        total[0] += one.times
        total[1] += one.size * one.times
        total[2] += one.network_bytes
    rows = [
        {'kind': kind, 'axis': axis, 'times': times, 'size': size / 1e9, 'sent': sent / 1e9}
        for (kind, axis), (times, size, sent) in sorted(totals.items(), key=lambda x: -x[1][2])
    ]
    columns = [
        Column('kind', 'collective'),
        Column('axis', 'axis'),
        Column('times', 'count', '.0f'),
        Column('size', 'total GB', '.4g'),
        Column('sent', 'GB sent', '.4g'),
    ]
    notes = [
        'per device and step, over all loop iterations; GB sent: with ring collectives',
        *result.program.remarks,
    ]
    report.table(rows, columns, 'Collectives of the compiled program', notes)
    _largest(result)
    metrics = {report.key('compile_s', 'step'): result.seconds}
    for (kind, axis), (times, _, sent) in totals.items():
        metrics[report.key('collectives', kind, axis=axis)] = times
        metrics[report.key('collective_bytes', kind, axis=axis)] = sent
    return metrics


def _largest(result: Compiled) -> None:
    """Prints the collectives that send most, with their source operations."""
    rows = [
        {
            'kind': one.kind,
            'axis': one.axis,
            'times': one.times,
            'size': one.size / 1e6,
            'sent': one.network_bytes / 1e9,
            'source': '/'.join(one.source.split('/')[-4:]),
        }
        for one in result.program.collectives[:LARGEST]
    ]
    columns = [
        Column('kind', 'collective'),
        Column('axis', 'axis'),
        Column('times', 'count', 'd'),
        Column('size', 'MB each', '.4g'),
        Column('sent', 'GB sent', '.4g'),
        Column('source', 'source'),
    ]
    report.table(rows, columns, 'Largest collectives')


def shardings(step: Step) -> None:
    """Prints the sharding of each leaf of the arguments; each AdamW moment is one row."""
    trees = (*step.parts.items(), ('batch', step.batch))
    rows = [row for part, tree in trees for row in _sharding_rows(part, tree)]
    columns = [
        Column('name', 'leaf'),
        Column('shape', 'shape'),
        Column('dtype', 'dtype'),
        Column('cut', 'sharded over'),
        Column('shard', 'shape per device'),
        Column('mib', 'MiB per device', '.4g'),
    ]
    report.table(rows, columns, 'Sharding of each leaf')


def _sharding_rows(part: str, tree: Any) -> list[dict[str, Any]]:
    rows = []
    moments: defaultdict[str, list[Any]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(key, 'key', getattr(key, 'name', key))) for key in path]
        moment = {'mu', 'nu'} & set(names) if part == 'optimizer' else set()
        if moment:
            moments[moment.pop()].append(leaf)
        else:
            rows.append(_sharding_row('.'.join([part, *names]), leaf))
    like = 'as params'  # moments are sharded like parameters, see steps.make
    for name, leaves in moments.items():
        rows.append({
            'name': f'{part}.{name}', 'shape': like, 'dtype': leaves[0].dtype.name, 'cut': like,
            'shard': like, 'mib': costs_lib.bytes_per_device(leaves) / 2**20,
        })  # fmt: skip
    return rows


def _sharding_row(name: str, leaf: Any) -> dict[str, Any]:
    by_axis = [axes if isinstance(axes, tuple) else (axes,) for axes in leaf.sharding.spec]
    sizes = leaf.sharding.mesh.shape
    cut = [f'{i}: {axis}' for i, axes in enumerate(by_axis) for axis in axes
           if axis and sizes[axis] > 1]  # fmt: skip
    shard: tuple[int, ...] = leaf.sharding.shard_shape(leaf.shape)
    return {
        'name': name,
        'shape': ' x '.join(map(str, leaf.shape)),
        'dtype': leaf.dtype.name,
        'cut': ', '.join(cut) or 'replicated',
        'shard': ' x '.join(map(str, shard)),
        'mib': math.prod(shard) * leaf.dtype.itemsize / 2**20,
    }
