"""The zigzag order of a batch's rows, in which causal attention costs every device the same.

If every device held one contiguous piece of a row, the first device's queries would see few keys
and the last one's would see all. Instead, a row is split into 2P chunks, and device r of P holds
chunks r and 2P - 1 - r, an early and a late one (as in Llama 3's training, Meta 2024, section
3.3.2). For P = 2:

    chunks of a row          0 1 2 3
    chunks on the devices    0 3 | 1 2

Positions and segments are data and move with their tokens, so that models need not know the order.
"""

import numpy as np


def apply(x_BL: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """Returns `x_BL` permuted into zigzag order along `axis`; unchanged for one device.

    Raises:
      ValueError: see `order`.
    """
    if devices == 1:
        return x_BL
    return np.take(x_BL, order(x_BL.shape[axis], devices), axis)


def undo(x_BL: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """Inverts `apply`, for arrays that it permuted or that were computed from those."""
    if devices == 1:
        return x_BL
    return np.take(x_BL, np.argsort(order(x_BL.shape[axis], devices)), axis)


def order(length: int, devices: int) -> np.ndarray:
    """Returns the permutation into zigzag order, int `[L]`: entry i is the position moved to i.

    Raises:
      ValueError: the length does not divide into two chunks per device.
    """
    check(length, devices)
    chunks = np.arange(length).reshape(2, devices, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def check(length: int, devices: int, name: str = 'rows') -> None:
    """Raises ValueError unless rows of this length divide into two chunks per device.

    The error calls the rows `name`.
    """
    if length % (2 * devices):
        raise ValueError(
            f'{name} of {length} tokens over sequence={devices} devices: expected a length that is '
            f'a multiple of {2 * devices}, two chunks for each device'
        )
