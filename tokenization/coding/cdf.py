"""Probabilities to integer cumulative frequencies: the last place where the coder sees floats.

From here on encoder and decoder work on integers, so a stream depends on the float
probabilities only through `quantize`, which needs no sort and breaks no ties.

Every symbol gets one unit of the `2**precision` so that anything can be coded; the other
`M = 2**precision - V` units are dealt out by systematic rounding: the running sums of the
probabilities, as integers on a grid of 2**-28, are scaled by M and rounded down. Rounding running
sums instead of single probabilities needs no second pass to repair the total.

    p = [.5, .3, .2], precision 4 (M = 13):
    running sums    0   .5   .8    1
    floor(13 * .)   0    6   10   13
    cdf             0    7   12   16     frequencies 7, 5, 4
"""

from types import ModuleType
from typing import Any

import numpy as np

MAX_PRECISION = 16
MAX_SYMBOLS = 512

# Running sums live on a grid of 2**-28 and are split into 13 high and 15 low bits.
_GRID = 28
_LOW = 15

Array = Any  # a numpy or a jax array: whatever has `__array_namespace__`


def quantize(p_V: Array, precision: int) -> Array:
    """Returns cumulative frequencies of the distributions along the last axis.

    Each frequency lies within 1 unit of `p * (2**precision - V) + 1`, where p is first divided by
    its sum, plus the rounding of that sum in the dtype of p (below half a unit in float32). The
    price against p is at most `-log2(1 - V / 2**precision)` bits per symbol plus the rounding.

    Works on numpy and on jax arrays, traced ones too. Under jit no error can be raised: p that is
    NaN or sums to 0 puts all mass on the last symbol, and negative entries give garbage.

    Args:
      p_V: `[..., V]`, float32 or float64, not negative; need not sum to 1.
      precision: total is `2**precision`; at most 16.

    Returns:
      int32 `[..., V + 1]`: 0 first, `2**precision` last, strictly increasing.

    Raises:
      ValueError: V or the precision is out of range; or, for numpy arrays, p is not a set of
        distributions.
    """
    xp = p_V.__array_namespace__()
    V = p_V.shape[-1]
    check_sizes(V, precision)
    if xp is np:
        _check_distribution(p_V)
    p_V = p_V / xp.sum(p_V, axis=-1, keepdims=True)
    # Multiplying by a power of two is exact, so only bits below the grid are lost: V units of
    # 2**-28 at most, a thirtieth of a unit of M.
    grid_V = xp.astype(p_V * 2.0**_GRID, xp.int32)
    sums_V = xp.minimum(xp.cumulative_sum(grid_V, axis=-1, dtype=xp.int32), 2**_GRID)
    M = 2**precision - V
    # floor(sums * M / 2**28) in two limbs. Both products stay below 2**31: the high limb is at
    # most 2**13 and the low one below 2**15, while M < 2**16.
    high_V, low_V = sums_V >> _LOW, sums_V & (2**_LOW - 1)
    scaled_V = (high_V * M + (low_V * M >> _LOW)) >> (_GRID - _LOW)
    inner_V = scaled_V[..., :-1] + xp.arange(1, V, dtype=xp.int32)
    ends = (*p_V.shape[:-1], 1)
    first = xp.zeros(ends, dtype=xp.int32)
    last = xp.full(ends, 2**precision, dtype=xp.int32)
    return xp.concat([first, inner_V, last], axis=-1)


def logits_to_cdf(logits_V: Array, precision: int) -> Array:
    """Returns `quantize(softmax(logits))`; the softmax is computed in at least float32.

    Args:
      logits_V: `[..., V]`, any float dtype; -inf stands for probability 0.
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
