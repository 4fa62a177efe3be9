"""Probabilities to integer cumulative frequencies: the last floats of the coder.

Encoder and decoder work on integers from here on, so a stream depends on the float probabilities
only through `quantize`, which needs no sort and breaks no ties.

Of the 2**P units (P is the precision), every symbol gets one, so that anything can be coded. The
other R = 2**P - V units are distributed by rounding cumulative sums down,

    cdf_v = floor(R * (p_0 + ... + p_{v-1})) + v

which sums to the right total in one pass, unlike rounding each probability by itself. The sums are
integers on a grid of 2**-28.

    p = [.5, .3, .2], P = 4, R = 13:
    cumulative sums   0   .5   .8    1
    floor(13 * .)     0    6   10   13
    cdf               0    7   12   16     frequencies 7, 5, 4
"""

from types import ModuleType
from typing import Any

import numpy as np

MAX_PRECISION = 16
MAX_SYMBOLS = 512

# Cumulative sums are on a grid of 2**-28, and are split into 13 high and 15 low bits.
_GRID = 28
_LOW = 15

Array = Any  # of numpy or jax: has `__array_namespace__`


def quantize(p_V: Array, precision: int) -> Array:
    """Returns cumulative frequencies of the distributions along the last axis.

    >>> quantize(np.array([0.5, 0.3, 0.2]), precision=4)
    array([ 0,  7, 12, 16], dtype=int32)

    p is first divided by its sum. Each frequency is within 1 unit of `p * (2**precision - V) + 1`,
    plus the rounding error of that sum in the dtype of p (below half a unit in float32). Coding
    with the frequencies costs at most `-log2(1 - V / 2**precision)` bits per symbol more than with
    p, plus the rounding.

    Takes numpy and jax arrays, traced ones too. Under jit no error can be raised: a p that is NaN
    or sums to 0 puts all mass on the last symbol, and negative entries give garbage.

    Args:
      p_V: `[..., V]`, float32 or float64, nonnegative; need not sum to 1.
      precision: the total is `2**precision`; at most 16.

    Returns:
      int32 `[..., V + 1]`: 0 first, `2**precision` last, strictly increasing.

    Raises:
      ValueError: V or the precision is out of range; or, for numpy arrays, an entry is negative
        or not finite, or all of them are 0.
    """
    xp = p_V.__array_namespace__()
    V = p_V.shape[-1]
    check_sizes(V, precision)
    if xp is np:
        _check_distribution(p_V)
    p_V = p_V / xp.sum(p_V, axis=-1, keepdims=True)
    # Multiplying by a power of two is exact, so only bits below the grid are lost: at most V units
    # of 2**-28, a thirtieth of a unit of the total.
    grid_V = xp.astype(p_V * 2.0**_GRID, xp.int32)
    sums_V = xp.minimum(xp.cumulative_sum(grid_V, axis=-1, dtype=xp.int32), 2**_GRID)
    rest = 2**precision - V
    # floor(sums * rest / 2**28) in two limbs. Both products stay below 2**31: the high limb is at
    # most 2**13 and the low one below 2**15, while rest < 2**16.
    high_V, low_V = sums_V >> _LOW, sums_V & (2**_LOW - 1)
    scaled_V = (high_V * rest + (low_V * rest >> _LOW)) >> (_GRID - _LOW)
    inner_V = scaled_V[..., :-1] + xp.arange(1, V, dtype=xp.int32)
    ends = (*p_V.shape[:-1], 1)
    first = xp.zeros(ends, dtype=xp.int32)
    last = xp.full(ends, 2**precision, dtype=xp.int32)
    return xp.concat([first, inner_V, last], axis=-1)


def logits_to_cdf(logits_V: Array, precision: int) -> Array:
    """Returns `quantize(softmax(logits))`; the softmax is computed in at least float32.

    Args:
      logits_V: `[..., V]`, any float dtype; -inf is probability 0.
      precision: as in `quantize`.

    Returns:
      int32 `[..., V + 1]`, as from `quantize`.

    Raises:
      ValueError: as in `quantize`.
    """
    xp: ModuleType = logits_V.__array_namespace__()
    logits_V = xp.astype(logits_V, xp.result_type(logits_V.dtype, xp.float32))
    weights_V = xp.exp(logits_V - xp.max(logits_V, axis=-1, keepdims=True))
    return quantize(weights_V, precision)


def check_sizes(V: int, precision: int) -> None:
    """Raises ValueError unless `V` symbols fit a CDF of `precision` bits."""
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f'precision {precision}: expected 1 to {MAX_PRECISION} bits')
    if not 1 <= V <= min(MAX_SYMBOLS, 2**precision):
        raise ValueError(
            f'{V} symbols: expected 1 to {MAX_SYMBOLS}, and at most 2**precision = {2**precision}'
        )


def _check_distribution(p_V: np.ndarray) -> None:
    if not np.all(np.isfinite(p_V)):
        raise ValueError('probabilities hold NaN or infinity; expected finite numbers')
    if np.any(p_V < 0):
        raise ValueError(f'probabilities hold {p_V.min()}; expected none below 0')
    if np.any(p_V.sum(axis=-1) <= 0):
        raise ValueError('probabilities sum to 0; expected at least one above 0')
