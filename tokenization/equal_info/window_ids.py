"""The codes of Equal-Info windows as ids of 8 or 16 bits, the tokens of a language model."""

import numpy as np

from tokenization.tokenizer import check_ids


def to_ids(codes: np.ndarray, bits_per_token: int) -> np.ndarray:
    """Returns the codes of a document's windows as ids of 8 or 16 bits, int32 `[T]`.

    Windows are concatenated, highest bits first, so a 16-bit id may hold bits of two windows (for
    example if W = 24). The last id is padded with zeros.

    >>> to_ids(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8), bits_per_token=16)
    array([ 258,  772, 1286, 1800, 2304], dtype=int32)
    """
    if bits_per_token not in (8, 16):
        raise ValueError(f'bits_per_token {bits_per_token}: expected 8 or 16')
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    size = bits_per_token // 8
    return np.pad(flat, (0, -len(flat) % size)).view(f'>u{size}').astype(np.int32)


def from_ids(ids: np.ndarray, bits_per_token: int, window_bits: int) -> np.ndarray:
    """Returns the codes, uint8 `[windows, W / 8]`; the inverse of `to_ids`.

    Raises:
      ValueError: an id is out of range, or the ids do not hold whole windows.
    """
    ids = check_ids(ids, 1 << bits_per_token)
    flat = ids.astype(f'>u{bits_per_token // 8}').view(np.uint8)
    windows, rest = divmod(len(flat), window_bits // 8)
    if rest >= bits_per_token // 8 or flat[len(flat) - rest :].any():
        raise ValueError(f'{len(ids)} ids of {bits_per_token} bits are not whole windows')
    return flat[: len(flat) - rest].reshape(windows, window_bits // 8)
