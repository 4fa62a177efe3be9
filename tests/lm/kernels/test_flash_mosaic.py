"""Flash attention on TPU: many blocks, the steps they cost, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention.flash import flash
from lm.kernels import reference
from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, blocks, key_rows, pack_bits
from lm.kernels.mosaic import block_mask, tile
from lm.kernels.scoring import Scoring

SMALL = BlockSizes(query=128, key=128)


def random_inputs(queries, rows, heads, kv_heads, channels, batch):
    """Returns q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(0)
    q, d_out = rng.normal(size=(2, batch, queries, heads, channels))
    k, v = rng.normal(size=(2, batch, kv_heads, rows, channels))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, d_out)]


def aligned(queries, rows, batch, **conditions):
    """Returns the mask of the last `queries` positions of `rows`."""
    query = jnp.broadcast_to(jnp.arange(rows - queries, rows), (batch, queries))
    return Mask(query, jnp.broadcast_to(jnp.arange(rows), (batch, 1, rows)), **conditions)


def everything_at_once():
    """Per-head positions with holes, ragged lengths, segments and a window."""
    rng = np.random.default_rng(1)
    position = np.sort(rng.integers(0, 400, (2, 2, 390)), axis=-1)
    position[rng.random(position.shape) < 0.2] = -1
    return Mask(
        jnp.broadcast_to(jnp.arange(140, 400), (2, 260)),
        jnp.asarray(position),
        jnp.asarray(np.sort(rng.integers(0, 3, (2, 260)))),
        jnp.asarray(np.sort(rng.integers(0, 3, (2, 390)))),
        length=jnp.asarray([390, 170]),
        window=jnp.asarray(130),
    )


def with_terms(mask):
    """Returns a mask with a bias per KV head, and noise and a temperature."""
    bias, noise = np.random.default_rng(2).normal(size=(2, *mask.key_position.shape))
    bias, noise = jnp.asarray(bias, jnp.float32), jnp.asarray(noise[:, :1], jnp.float32)
    return mask.replace(key_bias=bias), Scoring(0.3, 5.0, 1.7, noise)


CASES = {
    'causal': (aligned(300, 300, 1), Scoring(0.3), (300, 300, 2, 1, 64)),
    'all keys': (aligned(140, 300, 1, causal=False), Scoring(0.3), (140, 300, 1, 1, 80)),
    'everything': (everything_at_once(), Scoring(0.3, 5.0), (260, 390, 2, 2, 64)),
    'terms': (*with_terms(everything_at_once()), (260, 390, 4, 2, 64)),
    'unmasked terms': (*with_terms(aligned(140, 300, 1, causal=False)), (140, 300, 1, 1, 64)),
}


@pytest.mark.parametrize('case', CASES)
def test_results_and_gradients_over_many_blocks(case):
    mask, scoring, shape = CASES[case]
    q, k, v, d_out = random_inputs(*shape, batch=mask.query_position.shape[0])
    held = key_rows(mask)[..., None]
    poisoned = [jnp.where(held, x, jnp.nan) for x in (k, v)]

    def ours(q, k, v):
        return flash(
            q, k, v, mask, scoring, sizes=SMALL, backend='mosaic', interpret=True
        )  # fmt: skip

    def theirs(q, k, v):
        return reference.attention(q, k, v, mask, scoring)

    def with_gradients(call):
        def value(q, k, v):
            out, lse = call(q, k, v)
            finite = jnp.where(lse > -jnp.inf, lse, 0.0)
            return jnp.sum(out * d_out) + jnp.sum(finite * d_out[..., 0]), (out, lse)

        return jax.jit(jax.grad(value, (0, 1, 2), has_aux=True))

    actual = with_gradients(ours)(q, *poisoned)
    expected = with_gradients(theirs)(q, jnp.where(held, k, 0), jnp.where(held, v, 0))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e[np.isfinite(e)]).max())


def test_steps_and_unmasked_blocks_follow_the_mask():
    """16 blocks a side: a row visits what it can see, and masks only the edges of that."""
    causal, window = aligned(2048, 2048, 1), aligned(2048, 2048, 1, window=512)
    bounds, steps = block_mask.bounds(blocks(causal, 128, 128))
    assert steps == 16
    live_from, live_to, whole_from, whole_to = np.asarray(bounds).reshape(-1, 4).T
    np.testing.assert_array_equal(live_to, 1 + np.arange(16))
    np.testing.assert_array_equal(whole_to - whole_from, np.arange(16))
    assert not live_from.any()

    flags = blocks(window, 128, 128)
    for walk in flags, block_mask.by_key(flags, ragged=False):
        bounds, steps = block_mask.bounds(walk)
        assert steps == 5  # four of the window, and the one in which it ends
        visited = [[int(tile.visited(bounds, row, step)) for step in range(5)]
                   for row in range(16)]  # fmt: skip
        for row, keys in enumerate(visited):
            live = np.flatnonzero(np.asarray(walk.some)[0, 0, row])
            assert set(keys) == set(live)


def test_what_nobody_sees_costs_one_step():
    mask = aligned(256, 256, 2).replace(query_position=jnp.full((2, 256), -1))
    bounds, steps = block_mask.bounds(blocks(mask, 128, 128))
    assert steps == 1 and not bounds.any()


@pytest.mark.parametrize('mistake,expected', [
    ({'sizes': BlockSizes(query=128, key=100)}, 'key is 100; expected a multiple of 128'),
    ({'sizes': BlockSizes(query=4096, key=4096)}, 'MiB of vector memory, .* lower query or key'),
    ({'ancestors': True}, 'tree kernel'),
    ({'dtype': jnp.bfloat16}, 'expected one dtype'),
])  # fmt: skip
def test_is_refused_before_compiling(mistake, expected):
    q, k, v, _ = random_inputs(8192, 8192, 1, 1, 64, batch=1)
    mask = aligned(8192, 8192, 1)
    if 'ancestors' in mistake:
        mask = mask.replace(ancestors=pack_bits(jnp.ones((1, 8192, 32), bool)))
    q = q.astype(mistake.get('dtype', q.dtype))
    with pytest.raises(ValueError, match=expected):
        flash(q, k, v, mask, scoring=Scoring(1.0), sizes=mistake.get('sizes'), backend='mosaic')
