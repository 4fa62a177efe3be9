"""A baseline that the paper lacks: n-gram counts of the text itself, its symbols unknown."""

import collections

import numpy as np

_ORDER = 2


def nats(pieces_RL: np.ndarray, symbols: int, order: int = _ORDER) -> np.ndarray:
    """Returns the mean loss of counts so far at each position but the first, f64 `[L - 1]`.

    Orders 0 to `order` are interpolated with Witten-Bell smoothing, starting from a uniform
    distribution over `symbols`. Only the text itself is used, so the loss is invariant under any
    permutation of the symbols.
    """
    return np.mean([_nats(piece_L.tolist(), symbols, order) for piece_L in pieces_RL], axis=0)[1:]


def _nats(piece: list[int], symbols: int, order: int) -> list[float]:
    seen: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(
        collections.Counter
    )
    losses = []
    for at, symbol in enumerate(piece):
        contexts = [tuple(piece[at - n : at]) for n in range(min(order, at) + 1)]
        p = 1 / symbols
        for context in contexts:
            counts = seen[context]
            if counts:  # Witten-Bell: the weight of the lower order is the number of seen types
                p = (counts[symbol] + len(counts) * p) / (counts.total() + len(counts))
        losses.append(-np.log(p))
        for context in contexts:
            seen[context][symbol] += 1
    return losses
