"""The permuted table, and the bound on the cost of unknown symbols."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import lexinvariant, presets
from lm.model.config import Lexinvariant


def permuted(**fields):
    spec = Lexinvariant('permuted')
    return dataclasses.replace(presets.tiny(11), tied=True, lexinvariant=spec, **fields)


@pytest.mark.parametrize('d', [6, 16])
def test_rows_of_the_fixed_table_are_orthogonal_within_a_block(d):
    config = permuted(d_model=d)
    rows = lexinvariant.fixed_table(config, jnp.arange(2 * d))
    np.testing.assert_allclose(rows[:d] @ rows[:d].T, np.eye(d), atol=1e-6)
    np.testing.assert_allclose(rows[d:] @ rows[d:].T, np.eye(d), atol=1e-6)
    across = np.abs(rows[:d] @ rows[d:].T)  # the blocks differ
    assert across.max() < 0.99 and across.max() > 1e-3


def test_all_orders_of_the_fixed_table_are_equally_likely():
    config = permuted(vocab_size=4)
    row_BV = np.asarray(lexinvariant.order(config, jax.random.split(jax.random.key(7), 2400)))
    orders, times = np.unique(row_BV, axis=0, return_counts=True)
    assert orders.tolist() == [list(order) for order in itertools.permutations(range(4))]
    assert times.min() > 60 and times.max() < 140  # 100 each, give or take four deviations


def test_no_text_costs_more_than_its_renamings():
    random = np.random.default_rng(3)
    start, step = random.dirichlet(np.ones(4) * 0.3), random.dirichlet(np.ones(4) * 0.3, 4)

    def log_p(text):
        return np.log(start[text[0]]) + sum(np.log(step[a, b]) for a, b in itertools.pairwise(text))

    renamings = list(itertools.permutations(range(4)))
    largest = {}
    for text in itertools.product(range(4), repeat=5):
        renamed = [log_p([r[x] for x in text]) for r in renamings]
        regret = log_p(text) - (np.logaddexp.reduce(renamed) - np.log(24))
        k = len(set(text))
        assert regret <= lexinvariant.regret_bound(4, k) + 1e-12
        largest[k] = max(largest.get(k, -np.inf), regret)
    assert largest[2] > 0.5 * np.log(12)  # and the bound is not loose
    assert lexinvariant.regret_bound(4, 2) == pytest.approx(np.log(4 * 3))
