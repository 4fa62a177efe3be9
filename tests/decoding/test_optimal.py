"""The optimum against a linear program, and the rules against the optimum."""

import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from decoding import optimal

V = 4
DISTRIBUTIONS = st.lists(st.integers(0, 6), min_size=V, max_size=V).filter(any)
DISTRIBUTIONS = DISTRIBUTIONS.map(lambda w: np.asarray(w) / np.sum(w))


def tuples(draft, k, replacement):
    """All tuples of drafts, and their probabilities."""
    for drafts in itertools.product(range(len(draft)), repeat=k):
        p, left = 1.0, 1.0
        for i, x in enumerate(drafts):
            if replacement:
                p *= draft[x]
            elif x in drafts[:i]:
                p = 0
            elif p:
                p *= draft[x] / left
                left -= draft[x]
        if p > 0:
            yield drafts, p


def linear_program(target, draft, k, replacement):
    """The greatest probability that the emitted token is a draft, over all couplings."""
    flows, supply = [], []
    for i, (drafts, p) in enumerate(tuples(draft, k, replacement)):
        supply.append(p)
        flows += [(i, x) for x in set(drafts)]
    limits = np.zeros((len(supply) + len(target), len(flows)))
    for j, (i, x) in enumerate(flows):
        limits[i, j] = limits[len(supply) + x, j] = 1
    result = scipy.optimize.linprog(-np.ones(len(flows)), limits, [*supply, *target])
    return -result.fun


@pytest.mark.parametrize('replacement', [True, False])
@pytest.mark.parametrize('k', [1, 2, 3])
def test_the_bound_is_the_optimal_transport(k, replacement):
    random = np.random.default_rng(k)
    for _ in range(4):
        target, draft = random.dirichlet(np.full(V, 0.7), 2)
        bound = optimal.optimal_acceptance(target, draft, k, replacement)
        expected = linear_program(target, draft, k, replacement)
        np.testing.assert_allclose(bound, expected, atol=1e-7)


@given(DISTRIBUTIONS, DISTRIBUTIONS, st.integers(1, 4))
def test_no_rule_accepts_more_than_the_bound(target, draft, k):
    rounding = 1e-12
    iid = optimal.optimal_acceptance(target, draft, k, True)
    without = optimal.optimal_acceptance(target, draft, k, False)
    k_seq = optimal.k_seq_acceptance(target, draft, k)
    assert k_seq <= iid + rounding
    assert k_seq >= (1 - (1 - 1 / k) ** k) * iid - rounding
    assert optimal.recursive_acceptance(target, draft, k, True) <= iid + rounding
    assert optimal.recursive_acceptance(target, draft, k, False) <= without + rounding
    overlap = np.minimum(target, draft).sum()
    assert min(iid, without, k_seq) >= overlap - rounding
    if k == 1:
        np.testing.assert_allclose([iid, without, k_seq], overlap, atol=rounding)


def test_known_values():
    # SpecTr's rule misses a token that the draft never draws
    point, even = np.asarray([1.0, 0.0]), np.asarray([0.5, 0.5])
    np.testing.assert_allclose(optimal.k_seq_acceptance(point, even, 2), 0.75)
    np.testing.assert_allclose(optimal.optimal_acceptance(point, even, 2, True), 0.75)
    np.testing.assert_allclose(optimal.optimal_acceptance(point, even, 2, False), 1)
    np.testing.assert_allclose(optimal.recursive_acceptance(point, even, 2, False), 1)
    # means over Dirichlet(0.7) instances, V = 5, k = 3
    random = np.random.default_rng(0)
    pairs = [random.dirichlet(np.full(5, 0.7), 2) for _ in range(300)]
    means = [
        np.mean([rule(target, draft, 3, *rest) for target, draft in pairs])
        for rule, *rest in (
            (optimal.k_seq_acceptance,),
            (optimal.recursive_acceptance, True),
            (optimal.optimal_acceptance, True),
            (optimal.recursive_acceptance, False),
            (optimal.optimal_acceptance, False),
        )
    ]
    np.testing.assert_allclose(means, [0.649, 0.630, 0.686, 0.755, 0.833], atol=0.03)
