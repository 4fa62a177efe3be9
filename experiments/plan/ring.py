"""What attention sends along `sequence`, and how much of it computing hides.

A pass is P steps of equal work on each of P devices, in zigzag order (`lm.attention.zigzag`), and P
- 1 hops between them. A step computes while the next block is under way, so that a hop costs time
only where it takes longer than a step. Devices are taken to lie on a ring, each a link from the
next:

keys       blocks of keys and values go one way; backward, their f32 gradients too, a hop more.
queries    queries go one way, results of the step before come back the other, as far as the
           queries have gone, by the shorter way round; backward, queries go with the cotangents of
           their results, and gradients of queries come back.
"""

from typing import NamedTuple

from experiments.plan.chips import Chip

_F32 = 4


class Pass(NamedTuple):
    """One pass of one layer on one device.

    Attributes:
      name: `forward` or `backward`.
      steps: devices along the axis.
      flops: of one step.
      one_way: bytes that a link carries the way round, in all steps.
      other_way: bytes that it carries the other way.
    """

    name: str
    steps: int
    flops: float
    one_way: float
    other_way: float

    @property
    def network_bytes(self) -> float:
        """Over all links and both ways, as many as a device sends or passes on."""
        return self.one_way + self.other_way

    def compute(self, chip: Chip) -> float:
        """Seconds that the steps take alone."""
        return self.steps * self.flops / chip.flops

    def network(self, chip: Chip) -> float:
        """Seconds that the hops take alone: both ways at once."""
        return max(self.one_way, self.other_way) / chip.link_bandwidth

    def seconds(self, chip: Chip) -> float:
        """Seconds of the pass: one step, and then steps or hops, whichever take longer."""
        step = self.compute(chip) / self.steps
        return step + max(self.compute(chip) - step, self.network(chip))


def passes(
    ring: str, steps: int, tokens: float, heads: float, kv_heads: float, head_dim: int,
    itemsize: int, flops: float,
) -> tuple[Pass, Pass]:  # fmt: skip
    """Returns the forward and the backward pass of one layer.

    Args:
      ring: `keys` or `queries`.
      steps: devices along the axis.
      tokens: of one device.
      heads, kv_heads: of one device.
      head_dim: channels of a head.
      itemsize: bytes of a channel.
      flops: of the forward pass on one device; the backward pass has 2.5 times as many: five
        products of matrices and not two.
    """
    hops = steps - 1
    if ring == 'keys':
        block = 2 * kv_heads * head_dim * tokens
        forward = hops * block * itemsize, 0.0
        backward = forward[0] + steps * block * _F32, 0.0
    else:
        queries, lse = heads * head_dim * tokens * itemsize, heads * tokens * _F32
        # links that results take: back, or on where that is the shorter way home
        back = sum(step for step in range(1, steps) if 2 * step <= steps)
        on = sum(steps - step for step in range(1, steps) if 2 * step > steps)
        results = queries + lse
        forward = hops * queries + on * results, back * results
        # queries go with the cotangents of their results, LSE and delta
        backward = hops * 2 * results + on * queries, back * queries
    return (
        Pass('forward', steps, flops / steps, *forward),
        Pass('backward', steps, 2.5 * flops / steps, *backward),
    )
