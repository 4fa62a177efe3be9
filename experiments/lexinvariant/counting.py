"""A yardstick that the paper lacks: what counting alone makes of a text in unknown symbols."""

import collections

import numpy as np

_ORDER = 2


def nats(pieces_NL: np.ndarray, symbols: int, order: int = _ORDER) -> np.ndarray:
    """Returns the mean loss at each position but the first, f64 `[L - 1]`, of counts so far.

    Orders 0 to `order` are interpolated after Witten and Bell, from a uniform law over `symbols`.
    Nothing is known but the text itself, so the loss is the same after any renaming of symbols.
    """
    return np.mean([_nats(piece_L.tolist(), symbols, order) for piece_L in pieces_NL], axis=0)[1:]


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
            if counts:  # as much weight for what is new as there were new symbols so far
                p = (counts[symbol] + len(counts) * p) / (counts.total() + len(counts))
        losses.append(-np.log(p))
        for context in contexts:
            seen[context][symbol] += 1
    return losses
