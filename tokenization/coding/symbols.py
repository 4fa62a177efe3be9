"""Arithmetic coding of whole arrays of symbols, from their CDFs to streams and back.

For probabilities that depend on the symbols before, as those of a language model do, see
`tokenization.coding.byte_coder`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenization.coding import arithmetic, streams

_MAX_PRECISION = 16


def encode_symbols(
    lower_TB: np.ndarray, upper_TB: np.ndarray, length_B: np.ndarray, precision: int
) -> tuple[list[bytes], np.ndarray]:
    """Returns the streams of B rows of symbols, given as cumulative frequencies.

    Args:
      lower_TB: integers `[T, B]`: cumulative frequency below symbol t of row b.
      upper_TB: integers `[T, B]`: the same including the symbol.
      length_B: symbols of each row; later entries of the row are ignored.
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

    >>> cdf_V = np.array([0, 1, 3, 4])  # three symbols, out of 2**2
    >>> symbol_TB = np.array([[1], [1], [0], [2]])
    >>> length_B = np.array([4])
    >>> lower_TB, upper_TB = cdf_V[symbol_TB], cdf_V[symbol_TB + 1]
    >>> codes, bits_B = encode_symbols(lower_TB, upper_TB, length_B, precision=2)
    >>> codes, bits_B  # 011011, as the symbols' interval is [27/64, 28/64)
    ([b'l'], array([6]))
    >>> decode_symbols(cdf_V[None, None], codes, length_B, precision=2).ravel()
    array([1, 1, 0, 2], dtype=int32)

    Args:
      cdf_TBV: int32 `[T, B, V + 1]`: the CDF of every symbol; or `[1, 1, V + 1]`, one CDF for all,
        in which case T is the greatest length.
      codes: B streams from `encode_symbols`; bits after the end of a stream change nothing.
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


@functools.partial(jax.jit, static_argnames='precision')
def _encode_scan(
    lower_TB: jax.Array, upper_TB: jax.Array, length_B: jax.Array, precision: int
) -> tuple[arithmetic.Encoder, jax.Array]:
    def step(encoder: arithmetic.Encoder, symbol: Any) -> tuple[arithmetic.Encoder, jax.Array]:
        t, lower_B, upper_B = symbol
        narrowed, record_B = arithmetic.encode_step(encoder, lower_B, upper_B, precision)
        active_B = t < length_B
        return arithmetic.select(active_B, narrowed, encoder), jnp.where(active_B, record_B, 0)

    T, B = lower_TB.shape
    return jax.lax.scan(step, arithmetic.init_encoder(B), (jnp.arange(T), lower_TB, upper_TB))


@functools.partial(jax.jit, static_argnames='precision')
def _decode_scan(
    cdf_TBV: jax.Array, words_BW: jax.Array, length_B: jax.Array, precision: int
) -> jax.Array:
    B, T = words_BW.shape[0], words_BW.shape[1] - 2
    shared = cdf_TBV.shape[:2] == (1, 1)

    def step(decoder: arithmetic.Decoder, t_and_cdf: Any) -> tuple[arithmetic.Decoder, jax.Array]:
        t, cdf_BV = t_and_cdf
        if shared:
            cdf_BV = jnp.broadcast_to(cdf_TBV[0], (B, cdf_TBV.shape[-1]))
        symbol_B = arithmetic.find_symbol(decoder, cdf_BV, precision)
        lower_B, upper_B = arithmetic.bounds(cdf_BV, symbol_B)
        # A row past its end keeps reading zeros; only its symbols are masked.
        narrowed = arithmetic.decode_step(decoder, lower_B, upper_B, words_BW, precision)
        return narrowed, jnp.where(t < length_B, symbol_B, 0)

    each = (jnp.arange(T), None if shared else cdf_TBV)
    return jax.lax.scan(step, arithmetic.fill(arithmetic.init_decoder(B), words_BW), each)[1]


def _check(T: int, B: int, length_B: np.ndarray, precision: int) -> None:
    if not 1 <= precision <= _MAX_PRECISION:
        raise ValueError(f'precision {precision}: expected 1 to {_MAX_PRECISION} bits')
    if length_B.shape != (B,):
        raise ValueError(f'lengths have shape {length_B.shape}; expected ({B},), one per row')
    if B and not 0 <= length_B.min() <= length_B.max() <= T:
        raise ValueError(f'lengths from {length_B.min()} to {length_B.max()}; expected 0 to {T}')
