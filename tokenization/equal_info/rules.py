"""Intervals of an arithmetic coder in exact integers, and the rules that end a window.

A window of W bits names one of 2**W equal *cells* of the unit interval. Bounds are whole numbers of
units, 2**P units to a cell (P the bits of the CDF), so that the start interval is [0, 2**(W+P)),
and after byte s

    [low, low + size) -> [low + (size cdf[s] >> P), low + (size cdf[s+1] >> P))

without rounding errors that encoder and decoder could disagree on. A text of n bytes has an
interval I_n; a window ends at the latest where I_n+1 holds no whole cell any more. As W >= P, the
bounds after one byte are bounds of cells, so that a window holds at least one byte.

The rules:

- `PAPER`: all n bytes that leave a whole cell; the code is the shortest bit string whose dyadic
  interval lies in I_n, the lowest if there are two, padded with zeros to W bits. The decoder takes
  the longest string whose padded code is the window's. Not injective: measured, not repaired
  (Lester et al., Training LLMs over Neurally Compressed Text, 2024, section 3 and appendix D).
- `DELAY`: the fewest bytes that have the same padded code (appendix A of that paper); the other
  bytes wait for the next window. The decoder takes the first prefix with that code.
- `CANONICAL`: D(v) is the longest string whose interval contains the whole cell v. The encoder
  takes the largest n for which some cell of I_n lies in no child interval of I_n, and the lowest
  such cell: one that a bound between two children cuts. Injective by construction. There is such
  an n: a next byte that gets no whole cell lies in cells that either are cut within I_n, or reach
  out of I_n, and those are cut within the last I_m that holds them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding.next_byte import SYMBOLS
from tokenization.equal_info import limbs


class Interval(NamedTuple):
    """Intervals [low, low + size) in units of 2**-(W+P); uint32 limbs `[B, L]` each."""

    low_BL: jax.Array
    size_BL: jax.Array


Close = Callable[[Interval, jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]


class Rule(NamedTuple):
    """How a window ends.

    Attributes:
      name: for configs and tables.
      close: `(interval, cdf int32[B, 257], last bool[B], precision) -> (legal bool[B],
        code uint32[B, L])`: may the window end here, and with which code. `last` rows have read
        as many bytes as a window may; each interval holds at least one whole cell.
      reader: which prefix on the way down to cell v the decoder takes: the deepest of all, or
        the first or the last that has the code v.
    """

    name: str
    close: Close
    reader: Literal['deepest', 'first', 'last']


def whole(batch: int, window_bits: int, precision: int) -> Interval:
    """Returns the start interval for `batch` rows."""
    L = (window_bits + precision) // limbs.BITS + 1  # for W + P + 1 bits
    size_L = jnp.asarray(limbs.from_int(1 << (window_bits + precision), L))
    return Interval(jnp.zeros((batch, L), jnp.uint32), jnp.tile(size_L, (batch, 1)))


def bounds(interval: Interval, cdf_BV: jax.Array, precision: int) -> jax.Array:
    """Returns the bounds of the children at the given points of the CDF, `[B, V, L]`."""
    part = limbs.scale(interval.size_BL[:, None], cdf_BV.astype(jnp.uint32), precision)
    return limbs.add(interval.low_BL[:, None], part)


def child(interval: Interval, cdf_BV: jax.Array, byte_B: jax.Array, precision: int) -> Interval:
    """Returns the interval after one more byte."""
    ends_B2 = jnp.take_along_axis(cdf_BV, jnp.stack([byte_B, byte_B + 1], axis=1), axis=1)
    ends_B2L = bounds(interval, ends_B2, precision)
    return Interval(ends_B2L[:, 0], limbs.subtract(ends_B2L[:, 1], ends_B2L[:, 0]))


def descend(
    interval: Interval, cdf_BV: jax.Array, cell_BL: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array, Interval]:
    """Returns the byte whose interval holds the start of a cell, whether it holds all of the cell,
    and that interval."""
    start_BL = limbs.shift_left(cell_BL, precision)
    inner_BVL = bounds(interval, cdf_BV[:, 1:SYMBOLS], precision)
    byte_B = jnp.sum(~limbs.less(start_BL[:, None], inner_BVL), axis=1, dtype=jnp.int32)
    below = child(interval, cdf_BV, byte_B, precision)
    first_BL, end_BL = cells(below, precision)
    inside = ~limbs.less(cell_BL, first_BL) & limbs.less(cell_BL, end_BL)
    return byte_B, inside, below


def cells(interval: Interval, precision: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first of the cells that lie wholly inside, and the one after the last."""
    unit_L = jnp.asarray(limbs.from_int((1 << precision) - 1, interval.low_BL.shape[-1]))
    first_BL = limbs.shift_right(limbs.add(interval.low_BL, unit_L), precision)
    end_BL = limbs.shift_right(limbs.add(interval.low_BL, interval.size_BL), precision)
    return first_BL, end_BL


def has_cell(interval: Interval, precision: int) -> jax.Array:
    """Returns whether some whole cell lies inside, bool `[B]`."""
    return limbs.less(*cells(interval, precision))


def shortest_code(interval: Interval, precision: int) -> jax.Array:
    """Returns the lowest of the widest dyadic intervals inside, as its first cell `[B, L]`.

    Of m cells, 2**k <= m < 2**(k+1), the widest aligned block has 2**k or 2**(k-1) cells. Counted
    in blocks of 2**(k-1), it is the first even pair of blocks if that ends in time, or else the
    first block.
    """
    first_BL, end_BL = cells(interval, precision)
    one_BL = jnp.zeros_like(first_BL).at[:, 0].set(1)
    half_B = jnp.maximum(limbs.bit_length(limbs.subtract(end_BL, first_BL)) - 2, 0)
    ones_BL = limbs.subtract(limbs.shift_left_by(one_BL, half_B), one_BL)
    both_2BL = jnp.stack([limbs.add(first_BL, ones_BL), end_BL])
    block_BL, stop_BL = limbs.shift_right_by(both_2BL, half_B)
    even_BL = limbs.add(block_BL, block_BL & one_BL)
    after_BL = limbs.add(even_BL, 2 * one_BL)
    block_BL = jnp.where(limbs.less(stop_BL, after_BL)[:, None], block_BL, even_BL)
    return limbs.shift_left_by(block_BL, half_B)


def _close_greedy(
    interval: Interval, cdf_BV: jax.Array, last_B: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
    """Any n will do; its code is the shortest one."""
    del cdf_BV
    return jnp.ones_like(last_B), shortest_code(interval, precision)


def _close_canonical(
    interval: Interval, cdf_BV: jax.Array, last_B: jax.Array, precision: int
) -> tuple[jax.Array, jax.Array]:
    """Legal where a bound between children cuts a whole cell; after the last byte, anywhere."""
    inner_BVL = bounds(interval, cdf_BV[:, 1:SYMBOLS], precision)
    cell_BVL = limbs.shift_right(inner_BVL, precision)
    first_BL, end_BL = cells(interval, precision)
    cut_BV = jnp.any(limbs.low_bits(inner_BVL, precision) > 0, axis=-1)
    cut_BV &= ~limbs.less(cell_BVL, first_BL[:, None]) & limbs.less(cell_BVL, end_BL[:, None])
    lowest_B = jnp.argmax(cut_BV, axis=1)  # bounds ascend: the first one cuts the lowest cell
    code_BL = jnp.take_along_axis(cell_BVL, lowest_B[:, None, None], axis=1)[:, 0]
    code_BL = jnp.where(last_B[:, None], first_BL, code_BL)
    return jnp.any(cut_BV, axis=1) | last_B, code_BL


PAPER = Rule('paper', _close_greedy, 'last')
DELAY = Rule('delay', _close_greedy, 'first')
CANONICAL = Rule('canonical', _close_canonical, 'deepest')


def rule_by_name(name: str) -> Rule:
    """Returns one of the three rules; raises ValueError for another name."""
    rules = {rule.name: rule for rule in (PAPER, DELAY, CANONICAL)}
    if name not in rules:
        raise ValueError(f'window rule {name!r}: expected one of {", ".join(rules)}')
    return rules[name]


def code_bytes(codes_NL: np.ndarray, window_bits: int) -> np.ndarray:
    """Returns codes given as limbs in bytes, the highest first: uint8 `[N, W/8]`."""
    L = -(-window_bits // limbs.BITS)
    little = np.ascontiguousarray(codes_NL[:, :L]).astype('<u2').view(np.uint8)
    return little.reshape(len(codes_NL), 2 * L)[:, : window_bits // 8][:, ::-1]


def code_limbs(codes_NW: np.ndarray, L: int) -> np.ndarray:
    """Returns codes given in bytes, uint8 `[N, W/8]`, as limbs: uint32 `[N, L]`."""
    little = np.zeros((len(codes_NW), 2 * L), np.uint8)
    little[:, : codes_NW.shape[1]] = codes_NW[:, ::-1]
    return little.view('<u2').astype(np.uint32)
