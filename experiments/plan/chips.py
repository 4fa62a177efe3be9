"""Chips and slices: hardware figures for the planner.

Peak rates and links are Google's published figures per chip: cloud.google.com/tpu/docs/v4, v5e, v5p
and v6e, "System architecture". They give inter-chip bandwidth over all links and both directions
(v5e 400 GB/s over 4 links, v5p 1,200 GB/s over 6, v6e 800 GB/s over 4); v4 has 6 links of 50 GB/s
each way (Jouppi et al. 2023, "TPU v4", table 4). The largest grids are the pods on the same pages:
v4 has 4,096 chips, v5p 8,960 (Google Cloud joins up to 16x16x24 = 6,144 in one slice), v5e and v6e
256. The links of v5e and v6e are fixed: no side exceeds 16. Memory is the limit for programs, a
little below the chip's memory; libtpu's compiler states it when it rejects a program. The figures
of `cpu` are nominal.
"""

import math
import re
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device.

    Attributes:
      name: the chip's part of a topology's name.
      hbm_bytes: memory available to programs.
      flops: peak bf16 FLOP/s.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one inter-chip link in one direction.
      dimensions: dimensions of the torus, with two links each.
      ring: a side of a slice closes into a ring if its length is a multiple of this.
      largest: chips along each side of the largest slice.
    """

    name: str
    hbm_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    ring: int
    largest: tuple[int, ...]


CHIPS = (
    Chip('v4', 30.75 * GIB, 275e12, 1200e9, 50e9, 3, 4, (16, 16, 16)),
    Chip('v5e', 15.75 * GIB, 197e12, 819e9, 50e9, 2, 16, (16, 16)),
    Chip('v5p', 95.74 * GIB, 459e12, 2765e9, 100e9, 3, 4, (16, 20, 28)),
    Chip('v6e', 31.25 * GIB, 918e12, 1638e9, 100e9, 2, 16, (16, 16)),
    Chip('cpu', 16 * GIB, 1e11, 20e9, 5e9, 1, 2, (1024,)),
)


class Topology(NamedTuple):
    """A slice: chips in a grid.

    Attributes:
      chip: kind of chip.
      shape: number of chips along each side.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of chips; each is one JAX device."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Name in the syntax of `--topology`."""
        return f'{self.chip.name}:{"x".join(map(str, self.shape))}'


def parse(text: str) -> Topology:
    """Parses the name of a slice, such as `v5e:4x4`, `v5p:2x2x4` or `cpu:8`.

    Raises:
      ValueError: the chip is unknown, the shape is invalid for it, or the slice is too large.
    """
    name, _, sides = text.partition(':')
    known = {chip.name: chip for chip in CHIPS}
    if name not in known:
        raise ValueError(
            f'--topology {text!r}: unknown chip {name!r}; there are {", ".join(known)}, '
            'as in v5e:4x4, v5p:2x2x2 or cpu:8'
        )
    chip = known[name]
    form = 'x'.join(['SIDE'] * chip.dimensions)
    shape = [int(side) for side in sides.split('x')] if re.fullmatch(r'\d+(x\d+)*', sides) else []
    if len(shape) != chip.dimensions or min(shape) < 1:
        raise ValueError(f'--topology {text!r}: {name} slices are written {name}:{form}')
    topology = Topology(chip, tuple(shape))
    # three-dimensional slices are assembled from cubes, so only the number of chips is limited
    largest = Topology(chip, chip.largest)
    past = chip.dimensions < 3 and max(shape) > max(chip.largest)
    if past or topology.devices > largest.devices:
        raise ValueError(
            f'--topology {text!r}: the largest {name} slice is {largest.name}, '
            f'{largest.devices} devices'
        )
    return topology


def axis_bandwidth(topology: Topology, sizes: dict[str, int]) -> dict[str, float]:
    """Returns the send bandwidth of a device along each mesh axis, in bytes/s.

    Assumes the best placement: the larger axis takes sides of the slice, longest first, until it
    fits; the other takes the remaining sides, or shares one. An axis that fills sides that close
    into rings sends in both directions at once; any other is limited by the single link at its end.
    """
    sides = sorted(topology.shape, reverse=True)
    result = {}
    for axis, size in sorted(sizes.items(), key=lambda item: -item[1]):
        taken: list[int] = []
        while sides and math.prod(taken) < size:
            taken.append(sides.pop(0))
        taken = taken or [min(topology.shape)]
        closed = math.prod(taken) == size and all(s % topology.chip.ring == 0 for s in taken)
        links = len(taken) * (2 if closed else 1)
        result[axis] = links * topology.chip.link_bandwidth
    return result
