"""Estimates a step's cost, compiles it for the slice, and prints both side by side."""

import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from experiments import report
from experiments.plan import chips, compile, costs, ring_tables, steps, sweep, tables
from experiments.plan.compile import Compiled, Refused
from experiments.plan.config import Config
from experiments.plan.sweep import Choice
from lm.devices import mesh as mesh_lib

CHECKED = 3  # maximal number of compiled choices in a sweep
TOLERANCE = 1.05


def main(config: Config, out: epath.Path) -> dict[str, float]:
    """Prints the tables; returns the metrics. A step that does not fit is not an error."""
    if not config.sweep:
        return plan(config)
    found = sweep.choices(config)
    sweep.show(config, found, out)
    return sweep.metrics(found) | best([choice for choice in found if choice.fits])


def best(fitting: Sequence[Choice]) -> dict[str, float]:
    """Prints the fastest of these choices; returns its metrics.

    Estimated times are lower bounds of compiled ones. Choices are compiled in the order of their
    estimates until the fastest compiled one is within 5% of the next estimate.
    """
    compiled: list[tuple[float, Choice, dict[str, float]]] = []
    for tried, choice in enumerate(fitting):
        fastest = min((seconds for seconds, *_ in compiled), default=math.inf)
        if tried == CHECKED or fastest <= TOLERANCE * choice.seconds_per_token:
            break
        metrics = plan(choice.config)
        if metrics[report.key('fits', 'step')]:
            compiled.append((seconds_per_token(choice, metrics), choice, metrics))
        if choice.config.abstract:
            break
    if not compiled:
        print(f'does not fit: {len(fitting)} fit as estimated, none of {CHECKED} as compiled')
        return {}
    seconds, choice, metrics = min(compiled, key=lambda x: x[0])
    several = f'the fastest of {len(compiled)} compiled' if len(compiled) > 1 else 'compiled'
    by = 'estimated' if choice.config.abstract else several
    print(
        f'best: --mesh {choice.config.mesh} --batch {choice.config.batch}: '
        f'{seconds * 1e6:.4g} us per token ({by})'
    )
    named = {**choice.mesh._asdict(), 'batch': choice.config.batch}
    return metrics | {report.key('best', name): value for name, value in named.items()}


def seconds_per_token(choice: Choice, metrics: dict[str, float]) -> float:
    """Returns a choice's roofline, with the network time of its compiled program if it has one."""
    network = metrics.get(report.key('roofline_s', 'compiled_network'), 0.0)
    return max(choice.seconds_per_token, network / choice.tokens)


def plan(config: Config) -> dict[str, float]:
    """Plans one mesh and batch."""
    topology = chips.parse(config.topology)
    sizes = mesh_lib.parse(config.mesh, topology.devices)
    body = steps.model_config(config)
    mesh: Any = mesh_lib.abstract(**sizes._asdict())
    step = steps.make(config, body, mesh)
    counted = costs.count(body, config.batch, config.length, config.step, mesh)
    memory = costs.memory(body, config.batch, config.length, step.parts, mesh)
    label = f'{config.preset} {config.step}, batch {config.batch} x {config.length}'
    label += f', {topology.name}, {sweep.flag(sizes).replace(",", " ")}'
    result: Compiled | Refused | None = None
    if not config.abstract:
        mesh = mesh_lib.make(config.mesh, compile.devices(topology))
        result = compile.compile_step(steps.make(config, body, mesh), mesh, label)
    print(f'{label}; activations {body.dtype}, parameters {body.param_dtype}')
    fits, metrics = tables.memory(memory, result, topology)
    tokens = sweep.tokens(config)
    metrics |= tables.roofline(counted, tokens, result, topology, sizes._asdict())
    if counted.ring:
        metrics |= ring_tables.passes(counted, topology)
        metrics |= ring_tables.by_devices(config, body, sizes, topology)
    if isinstance(result, Compiled):
        metrics |= tables.collectives(result)
    tables.shardings(step)
    print(fits)
    return metrics
