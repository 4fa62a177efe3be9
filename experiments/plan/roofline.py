"""The least time that a step can take, by what it computes, moves and sends."""

from typing import NamedTuple

import numpy as np

from experiments.plan.chips import Topology, axis_bandwidth
from experiments.plan.costs import Costs


class Roofline(NamedTuple):
    """Seconds that compute, memory traffic and communication take alone (Williams et al. 2009)."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Of one step, if the three overlap fully: no step is faster."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        return self._fields[int(np.argmax(self))]


def roofline(costs: Costs, topology: Topology, sizes: dict[str, int]) -> Roofline:
    """Returns the seconds of a step on a mesh of such sizes; its axes communicate in turn.

    So does ring attention, from device to device over one link each way.
    """
    bandwidth = axis_bandwidth(topology, sizes)
    chip = topology.chip
    network = sum(sent / bandwidth[axis] for axis, sent in costs.network_bytes.items())
    network += sum(one.network(chip) for one in costs.ring)
    return Roofline(costs.device_flops / chip.flops, costs.hbm_bytes / chip.hbm_bandwidth, network)
