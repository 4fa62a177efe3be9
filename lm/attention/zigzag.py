"""The zigzag order of a batch's rows: causal attention costs every device of `sequence` the same.

Cut in one piece per device, the first device's queries would see few keys, and the last one's all.
Here a row is cut into 2P chunks, of which device r of P holds chunks r and 2P - 1 - r, an early one
and a late one (the order of Llama 3's training, Meta 2024, section 3.3.2). For P = 2:

    chunks of a row                0 1 2 3
    as they lie on the devices     0 3 | 1 2

Positions and segments are data and move with their tokens, so that models need not know.
"""

import numpy as np


def order(length: int, devices: int) -> np.ndarray:
    """Returns which position of a row lies at each place, int `[L]`.

    Raises:
      ValueError: the rows do not divide into two chunks per device.
    """
    check(length, devices)
    chunks = np.arange(length).reshape(2, devices, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def check(length: int, devices: int, name: str = 'rows') -> None:
    """Raises ValueError unless rows of this length divide into two chunks per device.

    The error says that of `name`.
    """
    if length % (2 * devices):
        raise ValueError(
            f'{name} of {length} tokens over sequence={devices} devices: expected a length that is '
            f'a multiple of {2 * devices}, two chunks for each device'
        )


def apply(x_BL: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """Returns `x_BL` with its positions in zigzag order; as it is on one device.

    Raises:
      ValueError: see `order`.
    """
    if devices == 1:
        return x_BL
    return np.take(x_BL, order(x_BL.shape[axis], devices), axis)


def undo(x_BL: np.ndarray, devices: int, axis: int = 1) -> np.ndarray:
    """Returns what `apply` reordered, or what was computed from it, in the order of the text."""
    if devices == 1:
        return x_BL
    return np.take(x_BL, np.argsort(order(x_BL.shape[axis], devices)), axis)
