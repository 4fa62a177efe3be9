"""Masks kept as positions and bits: their bounds against the mask in full."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import sparse
from lm.kernels.mask import Mask, blocks, first_run, pack_bits, span, unpack_bits, visible

B, L, S = 2, 13, 37


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_survive_packing(bits):
    bits = np.asarray(bits)
    words = pack_bits(jnp.asarray(bits))
    assert words.shape == (-(-len(bits) // 32),) and words.dtype == jnp.int32
    np.testing.assert_array_equal(unpack_bits(words, len(bits)), bits)


def random_mask(rng: np.random.Generator, kv_heads: int) -> Mask:
    """Every condition is given or not by chance; some keys are holes."""

    def sometimes(x):
        return jnp.asarray(x, jnp.int32) if rng.random() < 0.5 else None

    query = np.sort(rng.integers(0, 60, (B, L)))
    key = np.sort(rng.integers(0, 60, (B, kv_heads, S)))
    key = np.where(rng.random(key.shape) < 0.1 * rng.integers(2), -1, key)
    segments = [sometimes(np.sort(rng.integers(0, 3, (B, n)))) for n in (L, S)]
    if None in segments:
        segments = [None, None]
    return Mask(
        jnp.asarray(query), jnp.asarray(key), *segments,
        length=sometimes(rng.integers(L, S + 1, B)),
        ancestors=sometimes(pack_bits(jnp.asarray(rng.random((B, L, L)) < 0.5))),
        window=sometimes(rng.integers(1, 70)), causal=bool(rng.integers(2)),
    )  # fmt: skip


@pytest.mark.parametrize('seed', range(12))
def test_blocks_bound_the_mask(seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 1 + seed % 2)
    query, key = 4, 8
    bounds = jax.tree.map(np.asarray, blocks(mask, query, key))
    full = np.asarray(visible(mask))
    for i in range(-(-L // query)):
        for j in range(-(-S // key)):
            part = full[:, :, i * query : (i + 1) * query, j * key : (j + 1) * key]
            assert (bounds.some[:, :, i, j] | ~part.any((2, 3))).all()
            assert (~bounds.every[:, :, i, j] | part.all((2, 3))).all()
    assert not bounds.every[..., -1].any(), 'a partial block needs its mask'


def test_bounds_are_tight_for_plain_causal_attention():
    position = jnp.arange(64)[None]
    some, every = blocks(Mask(position, position[:, None], window=40), 16, 16)
    expected = np.tril(np.ones((4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -4)
    np.testing.assert_array_equal(some[0, 0], expected)
    np.testing.assert_array_equal(every[0, 0], np.eye(4, k=-1, dtype=bool))


def test_spans_and_runs():
    flags = jnp.asarray([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]], bool)
    np.testing.assert_array_equal(span(flags), [[1, 4], [0, 0], [2, 5]])
    np.testing.assert_array_equal(first_run(flags), [[1, 2], [0, 0], [2, 5]])


@pytest.mark.parametrize('share', [0.0, 0.02, 0.5, 1.0])
def test_kept_rows_survive_the_index(share):
    kept = jax.random.bernoulli(jax.random.key(0), share, (2, 3, 200))
    index = sparse.from_rows(kept, 64, 10)
    np.testing.assert_array_equal(sparse.kept_rows(index, 200), kept)
    block, used = np.asarray(index.block).reshape(6, -1), np.asarray(index.used).reshape(6)
    for of_head, count in zip(block, used, strict=True):
        assert (np.diff(of_head[:count]) > 0).all()
        assert (of_head[count:] == of_head[max(count - 1, 0)]).all()


def test_an_index_of_odd_blocks_is_refused():
    with pytest.raises(ValueError, match='multiple of 32'):
        sparse.from_rows(jnp.ones((1, 1, 64), bool), 40, 1)
