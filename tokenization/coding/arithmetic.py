"""A batched integer arithmetic coder: one `lax.scan` step codes one symbol of every row.

A row's interval is [base, base + range], of which the last 32 bits are kept. With size = range + 1
and precision P, a symbol whose cumulative frequencies are [lower, upper) out of 2**P updates it to

    base'          = base + floor(size * lower / 2**P)
    base' + range' = base + floor(size * upper / 2**P) - 1

(Delétang et al. 2024, appendix A, in integers; Lester et al. 2024, section 2.2). Once the range is
below 2**16, the top 16 bits of the base are final except for a carry. They are emitted as one
word, at most one per symbol, and the interval is widened by 16 bits:

    P = 2, a symbol with [lower, upper) = [1, 2)    base      range
    start                                           00000000  ffffffff
    after 1 symbol                                  40000000  3fffffff
    after 8 symbols, the range is below 2**16       55550000  0000ffff
    the word 5555 is emitted                        00000000  ffffffff

A scan over symbols therefore records one integer per row and step; the carries are added
afterwards (`tokenization.coding.streams`).

All sums are exact, in uint32, so streams are identical on every device. A stream is the shortest
bit string whose dyadic interval (all numbers that begin with these bits) lies inside the final
one, so it decodes to the same symbols whatever bits follow it. It does not hold its own length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokenization.coding import streams

_WORD = 16


@struct.dataclass
class Encoder:
    """Intervals of B rows: the last 32 bits of the base, and range = size - 1; uint32."""

    base_B: jax.Array
    range_B: jax.Array


@struct.dataclass
class Decoder:
    """Intervals of B rows relative to the code: offset = code - base, range = size - 1; uint32.

    `read_B` (int32) counts the words of each row that have been read.
    """

    offset_B: jax.Array
    range_B: jax.Array
    read_B: jax.Array


def init_encoder(batch: int) -> Encoder:
    """Returns `batch` rows with the full interval."""
    return Encoder(jnp.zeros(batch, jnp.uint32), jnp.full(batch, 0xFFFFFFFF, jnp.uint32))


def init_decoder(batch: int) -> Decoder:
    """Returns `batch` rows; `fill` them before the first symbol."""
    full = jnp.full(batch, 0xFFFFFFFF, jnp.uint32)
    return Decoder(jnp.zeros(batch, jnp.uint32), full, jnp.zeros(batch, jnp.int32))


def fill(decoder: Decoder, words_BW: jax.Array | np.ndarray) -> Decoder:
    """Returns the decoder with the first two words of each row read."""
    first_B, second_B = jnp.asarray(words_BW[:, 0]), jnp.asarray(words_BW[:, 1])
    return Decoder(first_B << _WORD | second_B, decoder.range_B, decoder.read_B + 2)


def encode_step(
    encoder: Encoder, lower_B: jax.Array, upper_B: jax.Array, precision: int
) -> tuple[Encoder, jax.Array]:
    """Narrows each row's interval to one symbol.

    Args:
      encoder: B rows.
      lower_B: cumulative frequency below the symbol.
      upper_B: the same including the symbol: lower < upper <= 2**precision.
      precision: at most 16.

    Returns:
      The encoder, and a record uint32[B] for `streams.to_streams`: the word, whether it was
      emitted, and whether a carry goes into the words before it.
    """
    below_B = _scale(encoder.range_B, lower_B, precision)
    range_B = _scale(encoder.range_B, upper_B, precision) - 1 - below_B
    base_B = encoder.base_B + below_B
    carry_B = base_B < below_B
    emit_B = range_B >> _WORD == 0
    record_B = jnp.where(emit_B, base_B >> _WORD | streams.EMIT, 0) | jnp.where(
        carry_B, streams.CARRY, 0
    )
    base_B = jnp.where(emit_B, base_B << _WORD, base_B)
    return Encoder(base_B, _widen(range_B, emit_B)), record_B.astype(jnp.uint32)


def find_symbol(decoder: Decoder, cdf_BV: jax.Array, precision: int) -> jax.Array:
    """Returns int32[B]: the symbol of each row's CDF (`[B, V + 1]`) whose interval has the code."""
    # Gathers are cheap on a CPU: there a binary search is 5 times as fast as counting 256 bounds.
    return jax.lax.platform_dependent(
        decoder,
        cdf_BV,
        cpu=functools.partial(_bisect, precision=precision),
        default=functools.partial(_count_below, precision=precision),
    )


def _count_below(decoder: Decoder, cdf_BV: jax.Array, precision: int) -> jax.Array:
    # The ends need no comparison: 0 is never above the code, and the total always is.
    edge_BV = _scale(decoder.range_B[:, None], cdf_BV[:, 1:-1], precision)
    return jnp.sum(edge_BV <= decoder.offset_B[:, None], axis=-1, dtype=jnp.int32)


def _bisect(decoder: Decoder, cdf_BV: jax.Array, precision: int) -> jax.Array:
    V = cdf_BV.shape[-1] - 1
    symbol_B = jnp.zeros(cdf_BV.shape[0], jnp.int32)
    for bit in reversed(range((V - 1).bit_length())):
        higher_B = symbol_B | (1 << bit)
        inside_B = jnp.minimum(higher_B, V - 1)
        edge_B1 = jnp.take_along_axis(cdf_BV, inside_B[:, None], 1, mode='promise_in_bounds')
        scaled_B = _scale(decoder.range_B, edge_B1[:, 0], precision)
        symbol_B = jnp.where((scaled_B <= decoder.offset_B) & (higher_B < V), higher_B, symbol_B)
    return symbol_B


def decode_step(
    decoder: Decoder, lower_B: jax.Array, upper_B: jax.Array, words_BW: jax.Array, precision: int
) -> Decoder:
    """Narrows each row's interval to the symbol that `find_symbol` found.

    Args:
      decoder: B rows.
      lower_B: cumulative frequency below the symbol.
      upper_B: the same including the symbol.
      words_BW: 16-bit words of each row's code; zeros are read past the end.
      precision: at most 16.
    """
    below_B = _scale(decoder.range_B, lower_B, precision)
    range_B = _scale(decoder.range_B, upper_B, precision) - 1 - below_B
    offset_B = decoder.offset_B - below_B
    take_B = range_B >> _WORD == 0
    word_B1 = jnp.take_along_axis(words_BW, decoder.read_B[:, None], 1, mode='fill', fill_value=0)
    offset_B = jnp.where(take_B, offset_B << _WORD | word_B1[:, 0], offset_B)
    return Decoder(offset_B, _widen(range_B, take_B), decoder.read_B + take_B)


def select(active_B: jax.Array, new: Any, old: Any) -> Any:
    """Returns a state (leaves `[B]`) with the rows of `new` where active, else of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(active_B, n, o), new, old)


def bounds(cdf_BV: jax.Array, symbol_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cumulative frequencies below and including one symbol per row, both int32[B]."""
    lower_B1 = jnp.take_along_axis(cdf_BV, symbol_B[:, None], 1)
    upper_B1 = jnp.take_along_axis(cdf_BV, symbol_B[:, None] + 1, 1)
    return lower_B1[:, 0], upper_B1[:, 0]


def _scale(range_B: jax.Array, frequency_B: jax.Array, precision: int) -> jax.Array:
    """Returns floor((range + 1) * frequency / 2**precision), modulo 2**32.

    The size has up to 33 bits. The product of its 17 high bits and a frequency, shifted, reaches
    2**32 only for the total at the full size; there it wraps to 0, which the `- 1` of every upper
    end corrects. The product of its 16 low bits and a frequency stays below 2**32.
    """
    frequency_B = frequency_B.astype(jnp.uint32)
    low_B = (range_B + 1) & 0xFFFF
    high_B = (range_B >> _WORD) + (low_B == 0)
    return (high_B * frequency_B << (_WORD - precision)) + (low_B * frequency_B >> precision)


def _widen(range_B: jax.Array, when_B: jax.Array) -> jax.Array:
    return jnp.where(when_B, range_B << _WORD | 0xFFFF, range_B)
