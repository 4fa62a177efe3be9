"""Intervals of an arithmetic coder in exact integers, and the rules that end a window.

The code of a W-bit window is the number of a *cell*, one of 2**W equal parts of the unit interval.
Interval bounds are integers in units of 2**-(W+P), so a cell has 2**P units, where P is the number
of bits of the CDF. The interval starts as [0, 2**(W+P)), and byte s updates it exactly,

    [low, low + size) -> [low + (size cdf[s] >> P), low + (size cdf[s+1] >> P))

so that encoder and decoder cannot disagree by a rounding error. Let I_n be the interval of the
first n bytes of a window. The window ends before byte n + 1 if I_n+1 holds no whole cell, or
earlier. As W >= P, the bounds of I_1 are bounds of cells, so a window holds at least one byte.

For example, W = P = 2 and three symbols a, b, c of probability 1/2, 1/4, 1/4 give 4 cells of 4
units:

    cells               |   0   |   1   |   2   |   3   |
    I_1                 |       a       |   b   |   c   |     a = [0, 8), b = [8, 12), c = [12, 16)
    I_2 after a         |  aa   |ab |ac |                     aa = [0, 4), ab = [4, 6), ac = [6, 8)

A window that starts with ab or ac ends after a, as ab and ac hold no whole cell. The rules:

- `PAPER`: the window takes all n bytes for which I_n holds a whole cell. Its code is the shortest
  bit string whose dyadic interval (all numbers that begin with these bits) lies in I_n, the lowest
  of equally short ones, padded with zeros to W bits. The decoder takes the longest string with
  this padded code. Not injective: measured, not repaired (Lester et al., Training LLMs over
  Neurally Compressed Text, 2024, section 3 and appendix D).
- `DELAY`: the window takes the fewest bytes with the same padded code (appendix A of that paper);
  the other bytes wait for the next window. The decoder takes the first prefix with that code.
- `CANONICAL`: D(v), the decoding of code v, is the longest string whose interval contains all of
  cell v. The encoder takes the largest n for which a bound between two children of I_n cuts a cell
  inside I_n, and the lowest such cell as its code. That cell lies in I_n and in no child of it, so
  that D(code) is exactly the n bytes. Above, D(0) = aa, D(1) = a, D(2) = b and D(3) = c, so aab
  becomes the codes 0 2, and ab the codes 1 2.
  Such an n exists: if the next byte gets no whole cell, then the cells that it touches are cut
  either within I_n or, if they reach out of I_n, within the last I_m that contains them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding.next_byte import SYMBOLS
from tokenization.equal_info import limbs


class Interval(NamedTuple):
    """Intervals [low, low + size) in units of 2**-(W+P); uint32 limbs `[B, Z]` each."""

    low_BZ: jax.Array
    size_BZ: jax.Array


Close = Callable[[Interval, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


class Rule(NamedTuple):
    """How a window ends.

    Attributes:
      name: for configs and tables.
      close: `(interval, cdf int32[B, 257], last bool[B], precision) -> (legal bool[B],
        code uint32[B, Z])`: whether the window may end here, and with which code. `last` marks
        rows that have read the maximum number of bytes; each interval holds a whole cell.
      reader: which prefix the decoder takes among those whose interval contains cell v: the
        'deepest', or the 'first' or 'last' whose code is v.
    """

    name: str
    close: Close
    reader: Literal['deepest', 'first', 'last']


def whole(batch: int, window_bits: int, precision: int) -> Interval:
    """Returns the start interval for `batch` rows."""
    Z = (window_bits + precision) // limbs.BITS + 1  # for W + P + 1 bits
    size_Z = jnp.asarray(limbs.from_int(1 << (window_bits + precision), Z))
    return Interval(jnp.zeros((batch, Z), jnp.uint32), jnp.tile(size_Z, (batch, 1)))


def bounds(interval: Interval, cdf_BV: jax.Array, precision: int) -> jax.Array:
    """Returns the bounds of the children at the given points of the CDF, `[B, V, Z]`."""
    part = limbs.scale(interval.size_BZ[:, None], cdf_BV.astype(jnp.uint32), precision)
    return limbs.add(interval.low_BZ[:, None], part)


def child(interval: Interval, cdf_BV: jax.Array, byte_B: jax.Array, precision: int) -> Interval:
    """Returns the interval after one more byte."""
    ends_B2 = jnp.take_along_axis(cdf_BV, jnp.stack([byte_B, byte_B + 1], axis=1), axis=1)
    ends_B2Z = bounds(interval, ends_B2, precision)
    return Interval(ends_B2Z[:, 0], limbs.subtract(ends_B2Z[:, 1], ends_B2Z[:, 0]))


def descend(
    interval: Interval, cdf_BV: jax.Array, cell_BZ: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array, Interval]:
    """Returns one step towards a cell: (byte, inside, interval).

    The byte is the one whose interval holds the start of the cell; `inside` says whether the
    interval holds the whole cell.
    """
    start_BZ = limbs.shift_left(cell_BZ, precision)
    inner_BVZ = bounds(interval, cdf_BV[:, 1:SYMBOLS], precision)
    byte_B = jnp.sum(~limbs.less(start_BZ[:, None], inner_BVZ), axis=1, dtype=jnp.int32)
    below = child(interval, cdf_BV, byte_B, precision)
    first_BZ, end_BZ = cells(below, precision)
    inside = ~limbs.less(cell_BZ, first_BZ) & limbs.less(cell_BZ, end_BZ)
    return byte_B, inside, below


def cells(interval: Interval, precision: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first cell that lies wholly inside, and the cell after the last such one."""
    unit_Z = jnp.asarray(limbs.from_int((1 << precision) - 1, interval.low_BZ.shape[-1]))
    first_BZ = limbs.shift_right(limbs.add(interval.low_BZ, unit_Z), precision)
    end_BZ = limbs.shift_right(limbs.add(interval.low_BZ, interval.size_BZ), precision)
    return first_BZ, end_BZ


def has_cell(interval: Interval, precision: int) -> jax.Array:
    """Returns whether some whole cell lies inside, bool `[B]`."""
    return limbs.less(*cells(interval, precision))


def shortest_code(interval: Interval, precision: int) -> jax.Array:
    """Returns the first cell of the widest dyadic interval inside, the lowest of equals, `[B, Z]`.

    If the interval holds m cells, 2**k <= m < 2**(k+1), the widest aligned block has 2**k or
    2**(k-1) cells. Counted in blocks of 2**(k-1), it is the first pair that starts at an even block
    if that pair lies inside, else the first block.
    """
    first_BZ, end_BZ = cells(interval, precision)
    one_BZ = jnp.zeros_like(first_BZ).at[:, 0].set(1)
    half_B = jnp.maximum(limbs.bit_length(limbs.subtract(end_BZ, first_BZ)) - 2, 0)
    ones_BZ = limbs.subtract(limbs.shift_left_by(one_BZ, half_B), one_BZ)
    both_2BZ = jnp.stack([limbs.add(first_BZ, ones_BZ), end_BZ])
    block_BZ, stop_BZ = limbs.shift_right_by(both_2BZ, half_B)
    even_BZ = limbs.add(block_BZ, block_BZ & one_BZ)
    after_BZ = limbs.add(even_BZ, 2 * one_BZ)
    block_BZ = jnp.where(limbs.less(stop_BZ, after_BZ)[:, None], block_BZ, even_BZ)
    return limbs.shift_left_by(block_BZ, half_B)


def _close_greedy(
    interval: Interval, cdf_BV: jax.Array, last_B: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
    """A window may end anywhere; its code is the shortest one."""
    del cdf_BV
    return jnp.ones_like(last_B), shortest_code(interval, precision)


def _close_canonical(
    interval: Interval, cdf_BV: jax.Array, last_B: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
    """Legal if a bound between children cuts an inner cell, and always after the last byte."""
    inner_BVZ = bounds(interval, cdf_BV[:, 1:SYMBOLS], precision)
    cell_BVZ = limbs.shift_right(inner_BVZ, precision)
    first_BZ, end_BZ = cells(interval, precision)
    cut_BV = jnp.any(limbs.low_bits(inner_BVZ, precision) > 0, axis=-1)
    cut_BV &= ~limbs.less(cell_BVZ, first_BZ[:, None]) & limbs.less(cell_BVZ, end_BZ[:, None])
    lowest_B = jnp.argmax(cut_BV, axis=1)  # bounds increase: the first one cuts the lowest cell
    code_BZ = jnp.take_along_axis(cell_BVZ, lowest_B[:, None, None], axis=1)[:, 0]
    code_BZ = jnp.where(last_B[:, None], first_BZ, code_BZ)
    return jnp.any(cut_BV, axis=1) | last_B, code_BZ


PAPER = Rule('paper', _close_greedy, 'last')
DELAY = Rule('delay', _close_greedy, 'first')
CANONICAL = Rule('canonical', _close_canonical, 'deepest')


def rule_by_name(name: str) -> Rule:
    """Returns one of the three rules; raises ValueError for another name."""
    rules = {rule.name: rule for rule in (PAPER, DELAY, CANONICAL)}
    if name not in rules:
        raise ValueError(f'window rule {name!r}: expected one of {", ".join(rules)}')
    return rules[name]


def code_bytes(codes_JZ: np.ndarray, window_bits: int) -> np.ndarray:
    """Returns codes, given as limbs, in bytes, highest first: uint8 `[J, W/8]`."""
    Z = -(-window_bits // limbs.BITS)
    little = np.ascontiguousarray(codes_JZ[:, :Z]).astype('<u2').view(np.uint8)
    return little.reshape(len(codes_JZ), 2 * Z)[:, : window_bits // 8][:, ::-1]


def code_limbs(codes_JW: np.ndarray, Z: int) -> np.ndarray:
    """Returns codes, given in bytes, uint8 `[J, W/8]`, as limbs: uint32 `[J, Z]`."""
    little = np.zeros((len(codes_JW), 2 * Z), np.uint8)
    little[:, : codes_JW.shape[1]] = codes_JW[:, ::-1]
    return little.view('<u2').astype(np.uint32)
