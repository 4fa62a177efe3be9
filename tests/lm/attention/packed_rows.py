"""Rows of packed documents, for tests."""

import numpy as np


def packed(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions of packed documents; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    segment = np.sort(rng.integers(1, 4, size=(rows, length)), axis=1)
    segment[-1, length // 2 :] = 0
    start = np.concatenate([np.ones((rows, 1), bool), np.diff(segment) != 0], axis=1)
    index = np.arange(length)
    position = index - np.maximum.accumulate(np.where(start, index, 0), axis=1)
    return segment.astype(np.int32), np.where(segment > 0, position, 0).astype(np.int32)
