"""The planner's tables for sharded sequences: ring-attention passes, and scaling with devices."""

from experiments import report
from experiments.plan import costs as costs_lib
from experiments.plan import roofline as roofline_lib
from experiments.plan import steps
from experiments.plan.chips import GIB, Topology
from experiments.plan.config import Config
from experiments.plan.costs import Costs
from experiments.report import Column
from lm.devices import mesh as mesh_lib
from lm.devices.mesh import Sizes
from lm.model.config import Config as ModelConfig


def passes(counted: Costs, topology: Topology) -> dict[str, float]:
    """Prints compute and communication of one layer's ring attention; returns the metrics."""
    metrics, rows = {}, []
    for one in dict.fromkeys(counted.ring):
        compute, network = one.compute(topology.chip), one.network(topology.chip)
        seconds = one.seconds(topology.chip)
        rows.append({
            'pass': one.name, 'hops': one.steps - 1, 'one': one.one_way / 1e6,
            'other': one.other_way / 1e6, 'compute': compute * 1e3, 'network': network * 1e3,
            'ms': seconds * 1e3, 'waits': (seconds - compute) / seconds,
        })  # fmt: skip
        metrics[report.key('ring_seconds', one.name)] = seconds
        metrics[report.key('ring_waits', one.name)] = (seconds - compute) / seconds
        metrics[report.key('ring_bytes', one.name)] = one.network_bytes
    columns = [
        Column('pass', 'one layer'),
        Column('hops', 'hops', 'd'),
        Column('one', 'MB one way', '.4g'),
        Column('other', 'MB other way', '.4g'),
        Column('compute', 'ms compute', '.4g'),
        Column('network', 'ms network', '.4g'),
        Column('ms', 'ms', '.4g'),
        Column('waits', 'waiting', '.1%'),
    ]
    notes = ['compute overlaps with sending the next block; devices form a ring of single links']
    report.table(rows, columns, 'Ring attention', notes)
    return metrics


def by_devices(
    config: Config, model: ModelConfig, sizes: Sizes, topology: Topology
) -> dict[str, float]:
    """Prints memory and time by the number of devices along `sequence`; returns the metrics."""
    metrics, rows = {}, []
    counts = [n for n in range(1, sizes.sequence + 1) if sizes.sequence % n == 0]
    for here in (sizes._replace(sequence=n) for n in counts):
        mesh = mesh_lib.abstract(**here._asdict())
        parts = steps.make(config, model, mesh).parts
        memory = costs_lib.memory(model, config.batch, config.length, parts, mesh)
        counted = costs_lib.count(model, config.batch, config.length, config.step, mesh)
        times = roofline_lib.roofline(counted, topology, here._asdict())
        attention = sum(one.seconds(topology.chip) for one in counted.ring)
        rows.append({
            'n': here.sequence, 'kept': memory.kept / GIB, 'rest': memory.activations / GIB,
            'total': memory.total / GIB, 'compute': times.compute * 1e3,
            'network': times.network * 1e3, 'attention': attention * 1e3 or None,
        })  # fmt: skip
        where = {'sequence': here.sequence}
        metrics[report.key('bytes_per_device', 'growth', **where)] = memory.total
        metrics[report.key('seconds', 'growth', **where)] = times.seconds
    columns = [
        Column('n', 'devices', 'd'),
        Column('kept', 'GiB between steps', '.4g'),
        Column('rest', 'activations', '.4g'),
        Column('total', 'total', '.4g'),
        Column('compute', 'ms compute', '.4g'),
        Column('network', 'ms network', '.4g'),
        Column('attention', 'ring attention', '.4g'),
    ]
    notes = ['per device, estimated; the sizes of data and model are fixed']
    report.table(rows, columns, 'By devices along sequence', notes)
    return metrics
