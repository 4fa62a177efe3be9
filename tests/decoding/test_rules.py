"""The rules at one node, by enumeration in f64: distribution of the token, and acceptance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import optimal, rules

V = 5
WEIGHTS = st.lists(st.integers(0, 6), min_size=V, max_size=V).filter(any)
DISTRIBUTIONS = WEIGHTS.map(lambda w: np.asarray(w) / np.sum(w))


@pytest.fixture(autouse=True, scope='module')
def double_precision():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=(2, 3))
def recursive(target_V, draft_V, k, replacement):
    """Distribution of the emitted token and probability that it is a draft, over all tuples."""
    weight_N, target_NV, draft_NV = jnp.ones(1), target_V[None], draft_V[None]
    p_V = jnp.zeros(V)
    steps = jax.vmap(jax.vmap(rules.rejection_step, (None, None, 0)), (0, 0, None))
    for _ in range(k):
        accept_NV, target_NVV, draft_NVV = steps(target_NV, draft_NV, jnp.arange(V))
        drawn_NV = weight_N[:, None] * draft_NV
        p_V += jnp.sum(drawn_NV * accept_NV, axis=0)
        # if no token is left to draw, no draft is made
        none_left_N = jnp.sum(draft_NV, axis=1) == 0
        p_V += (weight_N * none_left_N) @ target_NV
        weight_N = (drawn_NV * (1 - accept_NV)).ravel()
        again_NVV = jnp.broadcast_to(draft_NV[:, None], draft_NVV.shape)
        target_NV = target_NVV.reshape(-1, V)
        draft_NV = (again_NVV if replacement else draft_NVV).reshape(-1, V)
    return p_V + weight_N @ target_NV, 1 - jnp.sum(weight_N)


@jax.jit
def k_seq(target_V, draft_V, k):
    plan = rules.k_seq_plan(target_V, draft_V, k)
    accept_V = draft_V * rules.k_seq_acceptance(target_V, draft_V, plan.rho)
    none_before = (1 - plan.beta) ** jnp.arange(4)
    none = (1 - plan.beta) ** k
    p_V = jnp.sum(jnp.where(jnp.arange(4) < k, none_before, 0)) * accept_V
    return p_V + none * plan.residual_V, 1 - none, plan.rho


@pytest.mark.parametrize('k', [1, 2, 3, 4])
@given(target_V=DISTRIBUTIONS, draft_V=DISTRIBUTIONS)
@settings(max_examples=25)
def test_the_emitted_token_follows_the_target(k, target_V, draft_V):
    for replacement in False, True:
        p_V, accepted = recursive(target_V, draft_V, k, replacement)
        np.testing.assert_allclose(p_V, target_V, atol=1e-12)
        if not replacement:  # drafts end with the support; this is not a rejection
            k_drawn = min(k, np.count_nonzero(draft_V))
            accepted = recursive(target_V, draft_V, k_drawn, False)[1]
        expected = optimal.recursive_acceptance(target_V, draft_V, k, replacement)
        np.testing.assert_allclose(accepted, expected, atol=1e-12)
    p_V, accepted, rho = k_seq(target_V, draft_V, k)
    np.testing.assert_allclose(p_V, target_V, atol=1e-12)
    expected = optimal.k_seq_acceptance(target_V, draft_V, k)
    np.testing.assert_allclose(accepted, expected, atol=1e-12)
    assert 1 <= rho <= k


@given(DISTRIBUTIONS, DISTRIBUTIONS)
def test_one_draft_is_standard_speculative_sampling(target_V, draft_V):
    overlap = np.minimum(target_V, draft_V).sum()
    for p_V, accepted in recursive(target_V, draft_V, 1, False), k_seq(target_V, draft_V, 1)[:2]:
        np.testing.assert_allclose(p_V, target_V, atol=1e-12)
        np.testing.assert_allclose(accepted, overlap, atol=1e-12)


@given(DISTRIBUTIONS)
def test_drafts_of_the_whole_support_are_always_accepted(target_V):
    draft_V = np.full(V, 1 / V)
    accepted = recursive(target_V, draft_V, V, False)[1]
    np.testing.assert_allclose(accepted, 1, atol=1e-12)


def test_equal_distributions_accept_and_disjoint_ones_leave_the_target():
    p_V, other_V = jnp.asarray([0.1, 0.2, 0.7, 0, 0]), jnp.asarray([0, 0, 0, 1.0, 0])
    for token in range(3):
        acceptance, residual_V, _ = rules.rejection_step(p_V, p_V, token)
        assert acceptance == 1
        np.testing.assert_array_equal(residual_V, p_V)  # all zero: falls back
    acceptance, residual_V, rest_V = rules.rejection_step(p_V, other_V, 3)
    assert acceptance == 0
    np.testing.assert_array_equal(residual_V, p_V)
    np.testing.assert_array_equal(rest_V, 0)
    acceptance, residual_V, rest_V = rules.rejection_step(p_V, rest_V, 2)  # nothing to draw from
    assert acceptance == 0
    np.testing.assert_array_equal(residual_V, p_V)
    plan = rules.k_seq_plan(p_V, p_V, 3)
    np.testing.assert_allclose(plan.rho, 1, atol=1e-4)  # acceptance is flat in it, 1 - (rho - 1)^3
    np.testing.assert_allclose(plan.residual_V.sum(), 1)
    plan = rules.k_seq_plan(p_V, other_V, 3)
    np.testing.assert_allclose((plan.beta, *plan.residual_V), (0, *p_V))


@pytest.mark.parametrize('seed', range(3))
def test_single_precision_and_a_large_vocabulary(seed):
    random = np.random.default_rng(seed)
    target_V = np.float32(random.dirichlet(np.full(30_000, 0.01)))
    draft_V = np.float32(0.9 * target_V + 0.1 * random.dirichlet(np.full(30_000, 0.01)))
    plan = rules.k_seq_plan(jnp.asarray(target_V), jnp.asarray(draft_V), 4)
    accept_V = draft_V * rules.k_seq_acceptance(target_V, draft_V, plan.rho)
    before = (1 - plan.beta) ** np.arange(5)
    p_V = before[:4].sum() * accept_V + before[4] * plan.residual_V
    assert np.abs(p_V - target_V).sum() < 1e-5
    acceptance = optimal.k_seq_acceptance(target_V, draft_V, 4)
    np.testing.assert_allclose(1 - before[4], acceptance, atol=1e-5)


def test_top_k_children_under_the_ratio_rule_are_biased():
    """Children that were never drawn: the emitted token does not follow the target."""
    target_V = np.asarray([0.05, 0.05, 0.1, 0.2, 0.6])
    p_V, rejected = np.zeros(V), 1.0
    residual_V, draft_V = jnp.asarray(target_V), jnp.asarray([0.4, 0.3, 0.1, 0.1, 0.1])
    for token in range(3):  # the three most probable, for certain
        accept, residual_V, draft_V = rules.rejection_step(residual_V, draft_V, token)
        p_V[token] += rejected * accept
        rejected *= 1 - accept
    p_V += rejected * np.asarray(residual_V)
    np.testing.assert_allclose(p_V.sum(), 1)
    assert np.abs(p_V - target_V).sum() / 2 > 0.1
