"""Timing model of ring attention along `sequence`: communication, and its overlap with compute.

A pass has P steps of equal work on each of P devices, in zigzag order (`lm.attention.zigzag`), and
P - 1 hops between them. A step computes while the next block is in flight, so a hop costs time only
if it takes longer than a step. Devices are assumed to form a ring, with one link between
neighbours. The two variants:

keys       Blocks of keys and values travel one way around the ring. In the backward pass, their f32
           gradients travel with them, and take one hop more.
queries    Queries travel one way. The results of the previous step return to their origin by the
           shorter way around the ring. In the backward pass, queries travel with the cotangents of
           their results, and gradients of queries return.
"""

from typing import NamedTuple

from experiments.plan.chips import Chip

_F32 = 4


class Pass(NamedTuple):
    """One pass of one layer on one device.

    Attributes:
      name: `forward` or `backward`.
      steps: number of devices along the axis.
      flops: FLOPs of one step.
      one_way: bytes that a link carries in the ring's direction, in all steps.
      other_way: bytes that it carries in the opposite direction.
    """

    name: str
    steps: int
    flops: float
    one_way: float
    other_way: float

    @property
    def network_bytes(self) -> float:
        """Bytes that a device sends or forwards, in both directions."""
        return self.one_way + self.other_way

    def compute(self, chip: Chip) -> float:
        """Seconds of all steps, without communication."""
        return self.steps * self.flops / chip.flops

    def network(self, chip: Chip) -> float:
        """Seconds of all hops, without compute; both directions are used at once."""
        return max(self.one_way, self.other_way) / chip.link_bandwidth

    def seconds(self, chip: Chip) -> float:
        """Seconds of the pass: one step, then the longer of remaining steps and hops."""
        step = self.compute(chip) / self.steps
        return step + max(self.compute(chip) - step, self.network(chip))


def passes(
    ring: str, steps: int, tokens: float, heads: float, kv_heads: float, head_dim: int,
    itemsize: int, flops: float,
) -> tuple[Pass, Pass]:  # fmt: skip
    """Returns the forward and the backward pass of one layer.

    Args:
      ring: `keys` or `queries`.
      steps: number of devices along the axis.
      tokens: tokens per device.
      heads, kv_heads: heads per device.
      head_dim: channels per head.
      itemsize: bytes per channel.
      flops: FLOPs of the forward pass on one device; the backward pass has 2.5 times as many, since
        it has five matmuls instead of two.
    """
    hops = steps - 1
    if ring == 'keys':
        block = 2 * kv_heads * head_dim * tokens
        forward = hops * block * itemsize, 0.0
        backward = forward[0] + steps * block * _F32, 0.0
    else:
        queries, lse = heads * head_dim * tokens * itemsize, heads * tokens * _F32
        # hops that results take: back the way they came, or onward if that is shorter
        back = sum(step for step in range(1, steps) if 2 * step <= steps)
        on = sum(steps - step for step in range(1, steps) if 2 * step > steps)
        results = queries + lse
        forward = hops * queries + on * results, back * results
        # queries travel with the cotangents of their results, the LSE and delta
        backward = hops * 2 * results + on * queries, back * queries
    return (
        Pass('forward', steps, flops / steps, *forward),
        Pass('backward', steps, 2.5 * flops / steps, *backward),
    )
