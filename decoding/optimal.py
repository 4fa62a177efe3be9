"""Acceptance rates for small vocabularies, in numpy: of each rule, and the optimum.

All take the distributions at one position, `target_V` and `draft_V`, and k drafts, drawn
independently or without replacement (`replacement=False`; fewer than k if the draft's support has
fewer tokens).
"""

import numpy as np


def optimal_acceptance(
    target_V: np.ndarray, draft_V: np.ndarray, k: int, replacement: bool
) -> float:
    """Returns the greatest probability with which any exact rule emits one of its k drafts.

    Optimal transport with membership cost (Sun et al. 2023, SpecTr) is a maximum flow from tuples
    of drafts to the tokens in them. Its minimum cut picks a set S of tokens:

        min over S of  target(S) + 1 - P(all k drafts are in S)

    Time and memory grow as 2^V: for V up to about 16.
    """
    sets = 1 << len(target_V)
    members = (np.arange(sets)[:, None] >> np.arange(len(target_V))) & 1
    target_R, draft_R = members @ np.asarray(target_V), members @ np.asarray(draft_V)
    if replacement:
        inside_R = np.minimum(draft_R, 1) ** k
    else:
        inside_R = _inside_without_replacement(np.asarray(draft_V), draft_R, k)
    return float(np.min(target_R + 1 - inside_R))


def k_seq_acceptance(target_V: np.ndarray, draft_V: np.ndarray, k: int) -> float:
    """Returns K-SEQ's acceptance rate, 1 - (1 - beta)^k at the best rho (Sun et al. 2023).

    Between two neighbouring ratios target / draft, beta = a + b / rho; the best rho is where
    1 - (1 - beta)^k = rho beta.
    """
    target_V, draft_V = np.asarray(target_V, float), np.asarray(draft_V, float)
    ratio_V = np.divide(target_V, draft_V, out=np.full(len(draft_V), np.inf), where=draft_V > 0)

    def beta(rho: float) -> float:
        return float(np.sum(np.where(ratio_V >= rho, draft_V, target_V / rho)))

    low, high = 1.0, float(k)
    while high - low > 4 * np.finfo(float).eps:
        middle = (low + high) / 2
        if 1 - (1 - beta(middle)) ** k <= middle * beta(middle):
            high = middle
        else:
            low = middle
    return 1 - (1 - beta(high)) ** k


def recursive_acceptance(
    target_V: np.ndarray, draft_V: np.ndarray, k: int, replacement: bool
) -> float:
    """Returns the acceptance rate of recursive rejection (Jeon et al. 2024), over all tuples.

    A draft is rejected with probability sum [target - draft]_+; the next one meets this residual,
    renormalised. Time grows as V^k.
    """
    return 1 - _all_rejected(np.asarray(target_V), np.asarray(draft_V), k, replacement)


def _inside_without_replacement(draft_V: np.ndarray, draft_R: np.ndarray, k: int) -> np.ndarray:
    """Returns P(the first k draws without replacement are all in S), for every set S as bits."""
    k = min(k, int(np.count_nonzero(draft_V)))
    sets = np.arange(1 << len(draft_V))
    drawn_R = np.zeros(len(sets))  # P(the draws so far are the set S)
    drawn_R[0] = 1
    for _ in range(k):
        following_R = np.zeros_like(drawn_R)
        for x, p in enumerate(draft_V):
            before = sets[((sets >> x & 1) == 0) & (drawn_R > 0)]
            if p > 0:
                following_R[before | 1 << x] += drawn_R[before] * p / draft_R[sets[-1] ^ before]
        drawn_R = following_R
    inside_R = drawn_R
    for x in range(len(draft_V)):  # sum over subsets, one token at a time
        has_x = sets[(sets >> x & 1) == 1]
        inside_R[has_x] += inside_R[has_x ^ 1 << x]
    return inside_R


def _all_rejected(target_V: np.ndarray, draft_V: np.ndarray, k: int, replacement: bool) -> float:
    residual_V = np.maximum(target_V - draft_V, 0)
    rejected = residual_V.sum()
    if k == 0 or draft_V.sum() == 0:
        return 1.0
    if k == 1 or rejected == 0:
        return rejected
    residual_V = residual_V / rejected
    if replacement:
        return rejected * _all_rejected(residual_V, draft_V, k - 1, replacement)
    total = 0.0
    for x in np.flatnonzero(draft_V > target_V):  # the others are always accepted
        rest_V = np.where(np.arange(len(draft_V)) == x, 0, draft_V)
        rest_V = rest_V / max(rest_V.sum(), np.finfo(float).tiny)
        rejected_x = draft_V[x] - target_V[x]
        total += rejected_x * _all_rejected(residual_V, rest_V, k - 1, replacement)
    return total
