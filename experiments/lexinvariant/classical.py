"""Classical attack on a substitution cipher: frequency ranks, then hill climbing on bigrams.

The initial key maps symbols to the plain symbols of the same frequency rank. The meanings of two
symbols are swapped if that makes the text's bigrams more probable, until no swap does (Jakobsen
1995).
"""

import numba
import numpy as np

from lm.data.documents import Documents

_SMOOTHING = 0.1
_SHUFFLED = 0.3  # fraction of the key that a restart shuffles


def statistics(documents: Documents, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities of symbols, `[V]`, and of a symbol given the previous, `[V, V]`."""
    bigrams = np.zeros((symbols, symbols))
    for i in range(len(documents)):
        ids = documents[i]
        np.add.at(bigrams, (ids[:-1], ids[1:]), 1)
    single = bigrams.sum(0) + _SMOOTHING
    smooth = bigrams + _SMOOTHING * single / single.sum() * symbols
    return np.log(single / single.sum()), np.log(smooth / smooth.sum(1, keepdims=True))


def attack(
    cipher: np.ndarray, single_V: np.ndarray, bigram_VV: np.ndarray, climbs: int, seed: int
) -> dict[int, int]:
    """Returns the plain symbol inferred for each cipher symbol: the best key of several restarts.

    Args:
      cipher: ids of the ciphertext.
      single_V, bigram_VV: see `statistics`.
      climbs: number of restarts; the first starts from the frequency ranks, unshuffled.
      seed: random seed of the restarts.
    """
    symbols = len(single_V)
    counts_V = np.bincount(cipher, minlength=symbols)
    by_cipher = np.argsort(-counts_V, kind='stable')
    by_plain = np.argsort(-single_V, kind='stable')
    counts_VV = np.zeros((symbols, symbols))
    np.add.at(counts_VV, (cipher[:-1], cipher[1:]), 1)
    seen = np.flatnonzero(counts_V)
    random = np.random.default_rng(seed)
    best_score, best = -np.inf, None
    for climb in range(climbs):
        key = np.empty(symbols, np.int64)
        key[by_cipher] = by_plain
        if climb:
            some = random.permutation(symbols)[: max(2, int(_SHUFFLED * symbols))]
            key[some] = key[random.permutation(some)]
        score = _climb(key, seen, counts_VV, bigram_VV, random.permutation(symbols))
        score += single_V[key[cipher[0]]]
        if score > best_score:
            best_score, best = score, key
    assert best is not None
    return {int(symbol): int(best[symbol]) for symbol in seen}


@numba.njit(cache=True)
def _score(key, seen, counts_VV, bigram_VV):
    total = 0.0
    for a in seen:
        for b in seen:
            if counts_VV[a, b]:
                total += counts_VV[a, b] * bigram_VV[key[a], key[b]]
    return total


@numba.njit(cache=True)
def _local(symbol, other, key, seen, counts_VV, bigram_VV):
    """Sums the terms of the score that involve either of two symbols."""
    total = 0.0
    for a in seen:
        for s in (symbol, other):
            total += counts_VV[s, a] * bigram_VV[key[s], key[a]]
            if a != symbol and a != other:
                total += counts_VV[a, s] * bigram_VV[key[a], key[s]]
    return total


@numba.njit(cache=True)
def _climb(key, seen, counts_VV, bigram_VV, order):
    """Swaps meanings in place as long as a swap improves the score; returns the score."""
    improved = True
    while improved:
        improved = False
        for a in seen:
            for b in order:
                if a == b:
                    continue
                before = _local(a, b, key, seen, counts_VV, bigram_VV)
                key[a], key[b] = key[b], key[a]
                if _local(a, b, key, seen, counts_VV, bigram_VV) > before + 1e-9:
                    improved = True
                else:
                    key[a], key[b] = key[b], key[a]
    return _score(key, seen, counts_VV, bigram_VV)
