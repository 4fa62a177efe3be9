"""The sampling distribution, against sorting in numpy; draws keyed by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding import sample
from decoding.sample import Sampler

V = 6


def formula(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """One row, in f64, by sorting."""
    x = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    p = np.exp((x - x.max()) / temperature)
    if top_k is not None:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    if top_p is not None and top_p < 1:
        greatest = np.sort(p / p.sum())[::-1]
        last = greatest[np.argmax(np.cumsum(greatest) >= top_p)]
        p = np.where(p / p.sum() >= last, p, 0)
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


# Few values, so that ties are common; values of p between the possible masses.
LOGITS = st.lists(st.sampled_from([-7.0, -1.0, 0.0, 0.25, 3.0]), min_size=V, max_size=V)


@given(
    LOGITS,
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.none() | st.integers(1, V + 1),
    st.none() | st.sampled_from([1e-6, 0.331, 0.777, 0.987, 1.0]),
    st.none() | st.sampled_from([1e-3, 0.211, 1.0]),
)
def test_equals_the_formula(logits, temperature, top_k, top_p, min_p):
    sampler = Sampler(temperature, top_k, top_p, min_p)
    p = np.exp(jax.jit(sample.log_probs)(sampler, jnp.asarray(logits)))
    expected = formula(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(p == 0, expected == 0)


def test_settings_may_differ_from_row_to_row():
    logits = jax.random.normal(jax.random.key(0), (3, 2, V))
    sampler = Sampler(
        jnp.asarray([[0.0], [0.5], [2.0]]), jnp.asarray([[2], [4], [3]]), top_p=jnp.asarray([[0.9]])
    )
    p = np.exp(jax.jit(sample.log_probs)(sampler, logits))
    for (row, i), (t, k) in zip(np.ndindex(3, 2), [(0, 2)] * 2 + [(0.5, 4)] * 2 + [(2, 3)] * 2):
        np.testing.assert_allclose(p[row, i], formula(logits[row, i], t, k, 0.9), rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.0, 1e-45, 1e-30, 1e-4])
def test_low_temperatures_and_huge_logits_are_no_nan(temperature):
    logits = jnp.asarray([[3e38, -3e38, 3e38, -jnp.inf], [-1.0, -jnp.inf, 0.0, -0.5]])
    p = jax.jit(sample.log_probs)(Sampler(temperature, 2, 0.5, 0.5), logits)
    assert not np.isnan(p).any()
    greedy = [[0, -np.inf, -np.inf, -np.inf], [-np.inf, -np.inf, 0, -np.inf]]
    if temperature == 0:
        np.testing.assert_array_equal(p, greedy)
    np.testing.assert_array_equal(p[1], greedy[1])


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = jnp.asarray([2.0, -1.0, 2.0, -1.0])
    seen = jnp.asarray([True, True, False, False])
    p = sample.log_probs(Sampler(repetition_penalty=1.6), logits, seen)
    expected = jax.nn.log_softmax(jnp.asarray([1.25, -1.6, 2.0, -1.0]))
    np.testing.assert_allclose(p, expected, rtol=1e-6)
    with pytest.raises(ValueError, match='seen'):
        sample.log_probs(Sampler(repetition_penalty=1.6), logits)


def test_steps_left_out_are_not_in_the_graph():
    def loops(sampler):
        return str(jax.make_jaxpr(sample.log_probs)(sampler, jnp.zeros((2, V)))).count('scan[')

    plain, top_k, both = (loops(s) for s in (Sampler(0.5), Sampler(1, 3), Sampler(1, 3, 0.5)))
    assert (plain, top_k, both) == (0, 1, 2)
    assert 'sort' not in str(
        jax.make_jaxpr(sample.log_probs)(Sampler(1, 3, 0.5, 0.5), jnp.zeros((2, V)))
    )


def test_works_in_double_precision():
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, V)))
        p = np.exp(sample.log_probs(Sampler(0.7, 4, 0.8, 0.1), logits))
        expected = [formula(row, 0.7, 4, 0.8, 0.1) for row in logits]
        np.testing.assert_allclose(p, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', float('nan')),
        ('temperature', jnp.asarray([1.0, -1.0])),
        ('top_k', 0),
        ('top_k', 1.5),
        ('top_p', 0.0),
        ('top_p', 1.01),
        ('min_p', 0),
        ('repetition_penalty', 0.0),
    ],
)
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf'^{field} is .*; expected [^\n]*$'):
        sample.check(Sampler(**{field: value}))


def test_good_settings_and_traced_ones_are_let_through():
    sample.check(Sampler())
    sample.check(Sampler(0, 1, 1, 1, 0.5))
    jax.jit(lambda t: sample.check(Sampler(t)) or t)(-1.0)


def test_a_draw_depends_on_its_own_key_and_position_only():
    keys = jax.random.split(jax.random.key(1), 3)
    p = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (3, 50)))
    position = jnp.asarray([7, 8, 8])
    together = sample.draw(p, keys, position)
    for i in range(3):
        alone = sample.draw(p[i : i + 1], keys[i : i + 1], position[i : i + 1])
        assert alone[0] == together[i]
    many = jnp.arange(2000)
    same_p, same_key = jnp.broadcast_to(p[0], (2000, 50)), jnp.broadcast_to(keys[0], (2000,))
    drawn = jax.jit(sample.draw)(same_p, same_key, many)
    counts = np.bincount(drawn, minlength=50)
    assert np.abs(counts / 2000 - np.exp(p[0])).sum() < 0.3
