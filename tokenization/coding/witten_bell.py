"""Witten-Bell interpolation: from the counts of a byte n-gram to its probabilities.

The formula and the layout of the arrays are in `tokenization.coding.ngram`.
"""

from collections.abc import Sequence

import numpy as np

from tokenization.coding import cdf
from tokenization.coding.next_byte import SYMBOLS

_CHUNK = 1 << 14  # rows quantised at a time: 33 MB of float64


def lower_bounds(
    children: Sequence[np.ndarray],
    pairs: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
    precision: int,
) -> np.ndarray:
    """Returns the quantised CDF of every node, level after level, without its last bound.

    Args:
      children, pairs, counts: as in `ngram.NGram`.
      precision: bits of the CDF, at most 16, so that lower bounds fit uint16.

    Returns:
      uint16 `[nodes of all levels, 256]`.
    """
    rows = np.empty((sum(map(len, children)), SYMBOLS), np.uint16)
    parent_RV = np.full((1, SYMBOLS), 1 / SYMBOLS)
    base = 0
    for keys, pair, count in zip(children, pairs, counts):
        p_RV = np.empty((len(keys), SYMBOLS))
        for start in range(0, len(keys), _CHUNK):
            stop = min(start + _CHUNK, len(keys))
            lower_RV = parent_RV[keys[start:stop] >> 8]
            p_RV[start:stop] = _interpolate(pair, count, start, stop, lower_RV)
            bounds = cdf.quantize(p_RV[start:stop], precision)
            rows[base + start : base + stop] = bounds[:, :SYMBOLS]
        parent_RV, base = p_RV, base + len(keys)
    return rows


def totals(pair: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns N(c) and T(c) of every node c of one level, float64 (exact below 2**53)."""
    node = pair >> 8
    return np.bincount(node, weights=count), np.bincount(node).astype(np.float64)


def find(keys: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of each key in the sorted `keys`, and whether it is found.

    >>> find(np.array([2, 5, 7]), np.array([5, 6]))
    (array([1, 2]), array([ True, False]))
    """
    if not len(keys):
        return np.zeros(len(key), np.int64), np.zeros(len(key), bool)
    index = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return index, keys[index] == key


def _interpolate(
    pair: np.ndarray, count: np.ndarray, start: int, stop: int, lower_RV: np.ndarray
) -> np.ndarray:
    """Returns p(. | c) of the nodes `start` to `stop` of a level, given each p(. | c')."""
    first, last = np.searchsorted(pair, np.array([start << 8, stop << 8], np.uint64))
    count_RV = np.zeros((stop - start, SYMBOLS))
    count_RV.reshape(-1)[pair[first:last] - np.uint32(start << 8)] = count[first:last]
    types_R1 = np.count_nonzero(count_RV, axis=1)[:, None].astype(np.float64)
    total_R1 = count_RV.sum(axis=1, keepdims=True)  # integers: exact in any order
    return (count_RV + types_R1 * lower_RV) / (total_R1 + types_R1)
