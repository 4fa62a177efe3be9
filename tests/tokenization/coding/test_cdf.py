"""The integer CDF: valid, close to the probabilities, the same in numpy and JAX."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenization.coding import cdf

SIZES = [(2, 14), (256, 14), (256, 16), (512, 16), (512, 9)]


def distributions(V: int) -> np.ndarray:
    """Distributions that are hard to round: one-hot, uniform, tiny tails, steps, geometric."""
    one_hot = np.eye(V)[[0, V // 2, V - 1]]
    tiny = np.full((2, V), 1e-30)
    tiny[0, 0] = tiny[1, -1] = 1
    steps = np.where(np.arange(V) % 2, 1.0, 3.0)
    geometric = 0.5 ** np.minimum(np.arange(V), 1000.0)
    rng = np.random.default_rng(0)
    random = np.concatenate([rng.dirichlet(np.full(V, a), size=5) for a in (0.01, 1.0, 100.0)])
    rows = [*one_hot, np.ones(V), *tiny, steps, geometric, geometric[::-1], *random]
    return np.stack([row / row.sum() for row in rows])


def assert_valid(cdf_JV: np.ndarray, precision: int) -> None:
    assert cdf_JV.dtype == np.int32
    assert (cdf_JV[:, 0] == 0).all() and (cdf_JV[:, -1] == 2**precision).all()
    assert (np.diff(cdf_JV) >= 1).all()


@pytest.mark.parametrize(('V', 'precision'), SIZES)
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_frequencies_are_within_one_unit_of_the_probabilities(V, precision, dtype):
    p_JV = distributions(V).astype(dtype)
    found = [cdf.quantize(p_JV, precision)]
    if dtype == np.float32:
        found.append(np.asarray(jax.jit(cdf.quantize, static_argnums=1)(p_JV, precision)))
    for cdf_JV in found:
        assert_valid(cdf_JV, precision)
        exact_JV = p_JV.astype(np.float64) * (2**precision - V) + 1
        assert np.abs(np.diff(cdf_JV) - exact_JV).max() < 1.5


@pytest.mark.parametrize(('V', 'precision'), SIZES)
def test_price_is_that_of_the_reserved_mass(V, precision):
    p_JV = distributions(V)
    q_JV = np.diff(cdf.quantize(p_JV, precision)) / 2**precision
    kl_J = np.sum(p_JV * np.log2(np.maximum(p_JV, 1e-300) / q_JV), axis=-1)
    # The mean over p of a frequency's relative rounding error is at most V units of the total.
    free = 2**precision - V
    reserved = precision - math.log2(free) if free else math.log2(V)
    assert (kl_J <= reserved + V / 2**precision).all()


@hypothesis.given(st.data())
def test_any_weights_give_a_valid_cdf(data):
    V = data.draw(st.sampled_from([1, 3, 256, 512]))
    precision = data.draw(st.sampled_from([9, 14, 16]))
    exponents = data.draw(st.lists(st.integers(-40, 40), min_size=V, max_size=V))
    weights_V = np.exp2(np.array(exponents, np.float64))
    for weights in (weights_V, weights_V.astype(np.float32)):
        assert_valid(cdf.quantize(weights, precision)[None], precision)


@pytest.mark.parametrize('precision', [14, 16])
def test_numpy_and_jax_agree_on_dyadic_probabilities(precision):
    rng = np.random.default_rng(0)
    counts_JV = rng.multinomial(2**12, np.full(256, 1 / 256), size=20)
    p_JV = counts_JV / 2.0**12
    traced = jax.jit(lambda p: cdf.quantize(p, precision))(jnp.asarray(p_JV, jnp.float32))
    np.testing.assert_array_equal(cdf.quantize(p_JV, precision), traced)


def test_sums_of_float32_beyond_one_do_not_break_the_total():
    p_V = np.full(512, np.float32(1 / 512) * np.float32(1 + 2e-7), np.float32)
    cdf_V = jax.jit(cdf.quantize, static_argnums=1)(p_V, 16)
    assert_valid(np.asarray(cdf_V)[None], 16)
    np.testing.assert_array_equal(np.diff(cdf_V), 128)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_logits(dtype):
    logits_V = jnp.asarray([0.0, -jnp.inf, 3.0, 3.0], dtype)
    cdf_V = np.asarray(cdf.logits_to_cdf(logits_V, 14))
    p_V = np.exp([0, -np.inf, 3, 3]) / (1 + 2 * np.exp(3))
    assert np.abs(np.diff(cdf_V) - (p_V * (2**14 - 4) + 1)).max() < 1.01
    shifted_V = cdf.logits_to_cdf(logits_V.astype(jnp.float32) + 1000, 14)
    np.testing.assert_array_equal(cdf_V, shifted_V)


def test_a_small_example():
    assert cdf.quantize(np.array([0.5, 0.3, 0.2]), 4).tolist() == [0, 7, 12, 16]


@pytest.mark.parametrize(
    ('p', 'message'),
    [([0.5, np.nan], 'NaN'), ([0.5, -0.5], '-0.5'), ([0.0, 0.0], 'sum to 0'), ([], '0 symbols')],
)
def test_bad_probabilities_are_refused_on_the_host(p, message):
    with pytest.raises(ValueError, match=message):
        cdf.quantize(np.array(p), 14)


@pytest.mark.parametrize(('V', 'precision'), [(513, 16), (256, 7), (2, 17), (2, 0)])
def test_sizes_out_of_range_are_refused(V, precision):
    with pytest.raises(ValueError, match='expected 1 to'):
        cdf.quantize(np.ones(V), precision)


def test_nan_under_jit_still_gives_a_valid_cdf():
    cdf_V = jax.jit(lambda p: cdf.quantize(p, 14))(jnp.full(256, jnp.nan))
    assert_valid(np.asarray(cdf_V)[None], 14)
