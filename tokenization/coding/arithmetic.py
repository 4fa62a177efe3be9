"""An integer arithmetic coder for many rows at once: one `lax.scan` step per symbol.

The interval of a row is [base, base + range], held in its last 32 bits; a symbol with cumulative
frequencies [lower, upper) out of 2**precision narrows it to

    base + floor(size * lower / 2**precision)   and   base + floor(size * upper / 2**precision) - 1

with size = range + 1 (Delétang et al. 2024, appendix A, in integers; Lester et al. 2024, section
2.2). When the range has fallen below 2**16 the top 16 bits of the base are final but for a carry:
they leave as one word, at most one per symbol. A scan over symbols therefore records one integer
per row and step, and the carries are added afterwards (`tokenization.coding.streams`).

All sums are uint32 and exact, so streams are the same on every device. A stream is the shortest
bit string whose dyadic interval lies inside the final one: whatever bits follow it, it decodes to
the same symbols. It says nothing about its own length.
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
    """Intervals of B rows: the last 32 bits of the base, and the size minus 1; uint32."""

    base_B: jax.Array
    range_B: jax.Array


@struct.dataclass
class Decoder:
    """Intervals of B rows as seen from the code: code minus base, and the size minus 1; uint32.

    `read_B` (int32) counts the words taken from the row's window of words.
    """

    offset_B: jax.Array
    range_B: jax.Array
    read_B: jax.Array


def init_encoder(batch: int) -> Encoder:
    """Returns `batch` rows whose interval is everything."""
    return Encoder(jnp.zeros(batch, jnp.uint32), jnp.full(batch, 0xFFFFFFFF, jnp.uint32))


def init_decoder(batch: int) -> Decoder:
    """Returns `batch` rows that still need `fill` before their first symbol."""
    everything = jnp.full(batch, 0xFFFFFFFF, jnp.uint32)
    return Decoder(jnp.zeros(batch, jnp.uint32), everything, jnp.zeros(batch, jnp.int32))


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
      upper_B: cumulative frequency up to and with it: lower < upper <= 2**precision.
      precision: at most 16.

    Returns:
      The encoder, and a record uint32[B] for `streams.to_streams`: the word, whether it left, and
      whether a carry goes into the words that left before.
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
    """Returns int32[B]: the symbol of each row's CDF (`[B, V + 1]`) that the code lies in."""
    # Gathers are cheap on a CPU: a search there is 5 times as fast as a count over 256 symbols.
    return jax.lax.platform_dependent(
        decoder,
        cdf_BV,
        cpu=functools.partial(_bisect, precision=precision),
        default=functools.partial(_count_below, precision=precision),
    )


def _count_below(decoder: Decoder, cdf_BV: jax.Array, precision: int) -> jax.Array:
    # The ends decide nothing: 0 is never above the code and the total always is.
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
      upper_B: cumulative frequency up to and with it.
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
    """Returns int32[B] twice: the cumulative frequencies below and up to one symbol per row."""
    lower_B1 = jnp.take_along_axis(cdf_BV, symbol_B[:, None], 1)
    upper_B1 = jnp.take_along_axis(cdf_BV, symbol_B[:, None] + 1, 1)
    return lower_B1[:, 0], upper_B1[:, 0]


def _scale(range_B: jax.Array, frequency_B: jax.Array, precision: int) -> jax.Array:
    """Returns floor((range + 1) * frequency / 2**precision), modulo 2**32.

    The size has 33 bits: 17 high ones times a frequency, shifted, reach 2**32 only for the total
    at the full size; that 0 becomes right again by the `- 1` of every upper end. The 16 low ones
    times a frequency stay below 2**32.
    """
    frequency_B = frequency_B.astype(jnp.uint32)
    low_B = (range_B + 1) & 0xFFFF
    high_B = (range_B >> _WORD) + (low_B == 0)
    return (high_B * frequency_B << (_WORD - precision)) + (low_B * frequency_B >> precision)


def _widen(range_B: jax.Array, when_B: jax.Array) -> jax.Array:
    return jnp.where(when_B, range_B << _WORD | 0xFFFF, range_B)


@functools.partial(jax.jit, static_argnames='precision')
def _encode_scan(
    lower_TB: jax.Array, upper_TB: jax.Array, length_B: jax.Array, precision: int
) -> tuple[Encoder, jax.Array]:
    def step(encoder: Encoder, symbol: Any) -> tuple[Encoder, jax.Array]:
        t, lower_B, upper_B = symbol
        narrowed, record_B = encode_step(encoder, lower_B, upper_B, precision)
        active_B = t < length_B
        return select(active_B, narrowed, encoder), jnp.where(active_B, record_B, 0)

    T, B = lower_TB.shape
    return jax.lax.scan(step, init_encoder(B), (jnp.arange(T), lower_TB, upper_TB))


@functools.partial(jax.jit, static_argnames='precision')
def _decode_scan(
    cdf_TBV: jax.Array, words_BW: jax.Array, length_B: jax.Array, precision: int
) -> jax.Array:
    B, T = words_BW.shape[0], words_BW.shape[1] - 2
    shared = cdf_TBV.shape[:2] == (1, 1)

    def step(decoder: Decoder, t_and_cdf: Any) -> tuple[Decoder, jax.Array]:
        t, cdf_BV = t_and_cdf
        if shared:
            cdf_BV = jnp.broadcast_to(cdf_TBV[0], (B, cdf_TBV.shape[-1]))
        symbol_B = find_symbol(decoder, cdf_BV, precision)
        lower_B, upper_B = bounds(cdf_BV, symbol_B)
        # A row past its end goes on reading zeros; only its symbols are masked.
        narrowed = decode_step(decoder, lower_B, upper_B, words_BW, precision)
        return narrowed, jnp.where(t < length_B, symbol_B, 0)

    each = (jnp.arange(T), None if shared else cdf_TBV)
    return jax.lax.scan(step, fill(init_decoder(B), words_BW), each)[1]


def encode_symbols(
    lower_TB: np.ndarray, upper_TB: np.ndarray, length_B: np.ndarray, precision: int
) -> tuple[list[bytes], np.ndarray]:
    """Returns the streams of B rows of symbols that are given by their cumulative frequencies.

    Args:
      lower_TB: integers `[T, B]`: cumulative frequency below symbol t of row b.
      upper_TB: integers `[T, B]`: cumulative frequency up to and with it.
      length_B: symbols of each row; what a row holds beyond is not read.
      precision: frequencies are out of 2**precision; at most 16.

    Returns:
      B streams, padded with zero bits to whole bytes, and their lengths in bits, int64[B].

    Raises:
      ValueError: shapes, lengths or frequencies are out of range.
    """
    lower_TB, upper_TB = np.asarray(lower_TB), np.asarray(upper_TB)
    length_B = np.asarray(length_B)
    if lower_TB.shape != upper_TB.shape:
        raise ValueError(f'lower has shape {lower_TB.shape}, upper {upper_TB.shape}')
    T, B = lower_TB.shape
    _check(T, B, length_B, precision)
    used_TB = np.arange(T)[:, None] < length_B
    bad_TB = used_TB & ((lower_TB < 0) | (lower_TB >= upper_TB) | (upper_TB > 1 << precision))
    if bad_TB.any():
        t, b = np.argwhere(bad_TB)[0]
        raise ValueError(
            f'symbol {t} of row {b}: frequencies {lower_TB[t, b]} to {upper_TB[t, b]}; expected '
            f'0 <= lower < upper <= {1 << precision}'
        )
    encoder, record_TB = _encode_scan(lower_TB, upper_TB, length_B, precision)
    base_B, range_B = np.asarray(encoder.base_B), np.asarray(encoder.range_B)
    return streams.to_streams(np.asarray(record_TB), base_B, range_B)


def decode_symbols(
    cdf_TBV: np.ndarray | jax.Array, codes: list[bytes], length_B: np.ndarray, precision: int
) -> np.ndarray:
    """Returns the symbols of B streams, int32 `[T, B]`, zero after the end of a row.

    Args:
      cdf_TBV: int32 `[T, B, V + 1]`: the CDF of every symbol; `[1, 1, V + 1]`: one for all, and T
        is the greatest length.
      codes: B streams from `encode_symbols`; bits after the end of one change nothing.
      length_B: symbols of each row.
      precision: frequencies are out of 2**precision; at most 16.

    Raises:
      ValueError: shapes or lengths are out of range.
    """
    T, B, _ = cdf_TBV.shape
    length_B = np.asarray(length_B)
    if (T, B) == (1, 1):
        T, B = int(length_B.max(initial=0)), len(codes)
    if len(codes) != B:
        raise ValueError(f'{len(codes)} streams; expected {B}, one per row of the CDFs')
    _check(T, B, length_B, precision)
    # At most one word per symbol after the first two.
    words_BW = streams.to_words(codes)[:, : T + 2]
    words_BW = np.pad(words_BW, ((0, 0), (0, T + 2 - words_BW.shape[1])))
    return np.asarray(_decode_scan(cdf_TBV, words_BW, length_B, precision))


def _check(T: int, B: int, length_B: np.ndarray, precision: int) -> None:
    if not 1 <= precision <= _WORD:
        raise ValueError(f'precision {precision}: expected 1 to {_WORD} bits')
    if length_B.shape != (B,):
        raise ValueError(f'lengths have shape {length_B.shape}; expected ({B},), one per row')
    if B and not 0 <= length_B.min() <= length_B.max() <= T:
        raise ValueError(f'lengths from {length_B.min()} to {length_B.max()}; expected 0 to {T}')
