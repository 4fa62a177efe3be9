"""The planner's results for slices of growing size, with a constant number of rows per chip."""

import contextlib
import re
from typing import Any

from etils import epath

from experiments import report
from experiments.growth.config import Config
from experiments.plan import chips
from experiments.plan import main as planner
from experiments.plan.config import Config as PlanConfig

_COLLECTIVE = re.compile(r'collectives/([\w-]+)/axis=([\w+]+)')


def row(config: Config, name: str, ways: int, out: epath.Path) -> dict[str, Any]:
    """Plans one slice; the planner's output is written to a file below `out`.

    Raises:
      ValueError: the slice's compiler is missing, or the rows do not divide over its devices.
    """
    count = chips.parse(name).devices
    mesh = f'data={count // ways}' + (f',model={ways}' if ways > 1 else '')
    plan = PlanConfig(
        config.preset, name, 'train', config.rows_per_chip * count, config.length, mesh,
        abstract=config.abstract,
    )  # fmt: skip
    page = out / 'plans' / f'{file_name(name, ways)}.txt'
    page.parent.mkdir(parents=True, exist_ok=True)
    with page.open('w') as file, contextlib.redirect_stdout(file):
        found = planner.plan(plan)
    return {
        'slice': name,
        'chips': count,
        'mesh': mesh,
        'tokens': plan.batch * plan.length,
        **found,
    }


def file_name(name: str, ways: int) -> str:
    """Returns a file name for a slice and its mesh."""
    return f'{name.replace(":", "_")}_model_{ways}'


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the cells of one row of the table from the planner's numbers.

    The step time is the maximum of compute, memory and network time; the network time is that of
    the compiled program if there is one, else the estimate.
    """
    sent = {k: v for k, v in found.items() if k.startswith('collective_bytes/')}
    counted = sum(v for k, v in found.items() if k.startswith('network_bytes/'))
    network = found.get(report.key('roofline_s', 'compiled_network'))
    compiled = network is not None
    network = found[report.key('roofline_s', 'network')] if network is None else network
    parts = {part: found[report.key('roofline_s', part)] for part in ('compute', 'memory')}
    parts['network'] = network
    bound = max(parts, key=lambda part: parts[part])
    total = report.key('bytes_per_device', 'compiled_total')
    return {
        'slice': found['slice'],
        'mesh': found['mesh'],
        'chips': found['chips'],
        'kept_bytes': sum(
            found[report.key('bytes_per_device', part)] for part in ('params', 'optimizer')
        ),
        'counted_bytes': sum(
            found[report.key('bytes_per_device', part)]
            for part in ('params', 'optimizer', 'cache', 'gradients', 'activations')
        ),
        'compiled_bytes': found.get(total),
        'counted_sent': counted,
        'compiled_sent': sum(sent.values()) if compiled else None,
        'compute_s': parts['compute'],
        'network_s': network,
        'step_s': parts[bound],
        'bound': bound,
        'tokens_per_chip_s': found['tokens'] / parts[bound] / found['chips'],
        'collectives': named(found) if compiled else None,
    }


def named(found: dict[str, Any]) -> str:
    """Returns kind, axis and GB sent per chip of each collective, largest first."""
    sent = {}
    for name in found:
        if match := _COLLECTIVE.fullmatch(name):
            sent[match[1], match[2]] = found[f'collective_bytes/{match[1]}/axis={match[2]}'] / 1e9
    largest = sorted(sent.items(), key=lambda item: -item[1])
    return ', '.join(f'{kind} ({axis}) {gb:.3g}' for (kind, axis), gb in largest)
