"""Roofline of a step: the minimal time for its compute, memory traffic and communication."""

from typing import NamedTuple

import numpy as np

from experiments.plan.chips import Topology, axis_bandwidth
from experiments.plan.costs import Costs


class Roofline(NamedTuple):
    """Seconds of compute, memory traffic and communication, each alone (Williams et al. 2009)."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Lower bound of the step time: the three overlap fully."""
        return max(self)

    @property
    def bound(self) -> str:
        """Name of the bottleneck, the largest of the three."""
        return self._fields[int(np.argmax(self))]


def roofline(costs: Costs, topology: Topology, sizes: dict[str, int]) -> Roofline:
    """Returns the roofline of a step on a mesh of these sizes.

    The axes communicate one after another, and so does ring attention, over one link in each
    direction.
    """
    bandwidth = axis_bandwidth(topology, sizes)
    chip = topology.chip
    network = sum(sent / bandwidth[axis] for axis, sent in costs.network_bytes.items())
    network += sum(one.network(chip) for one in costs.ring)
    return Roofline(costs.device_flops / chip.flops, costs.hbm_bytes / chip.hbm_bandwidth, network)
