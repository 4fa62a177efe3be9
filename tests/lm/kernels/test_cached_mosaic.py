"""What is special about the TPU kernels that read a cache: blocks, steps and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import reference, sparse
from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, key_rows, pack_bits
from lm.kernels.mosaic.column_sums import column_sums
from lm.kernels.mosaic.decode import decode
from lm.kernels.mosaic.sparse_decode import sparse_decode
from lm.kernels.mosaic.tree import tree

SMALL = BlockSizes(query=32, key=128)


def random_inputs(queries, rows, heads, kv_heads, channels, dtype=jnp.float32):
    """Returns q, k, v and int32 rows in use: all of them, and about half."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, queries, heads, channels))
    k, v = rng.normal(size=(2, 2, kv_heads, rows, channels))
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray([rows, rows // 2 + queries])


def chain(queries, rows, length_B, **conditions):
    """Returns the mask of a chain: the last queries of the rows in use."""
    query = length_B[:, None] - queries + jnp.arange(queries)
    key = jnp.broadcast_to(jnp.arange(rows), (2, 1, rows))
    return Mask(query, key, length=length_B, **conditions)


def poisoned(x, mask):
    return jnp.where(key_rows(mask)[..., None], x, jnp.nan)


def assert_near(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.float32(a), e, atol=tolerance), actual, expected
    )


@pytest.mark.parametrize('channels,window', [(80, 100), (128, None)])
def test_decode_over_several_blocks(channels, window):
    q, k, v, length_B = random_inputs(1, 400, 4, 2, channels)
    mask = chain(1, 400, length_B, window=window)
    k, v = poisoned(k, mask), poisoned(v, mask)
    run = functools.partial(decode, scale=0.3, softcap=4.0, sizes=SMALL, interpret=True)
    expected = reference.attention(q, k, v, mask, scale=0.3, softcap=4.0)
    assert_near(jax.jit(run)(q, k, v, mask), expected)


def test_tree_that_grew_by_some_nodes():
    """40 nodes of which the last 6 are new: two words, over the edge of a block of keys."""
    q, k, v, length_B = random_inputs(6, 290, 8, 2, 64)
    reach = jnp.asarray(np.random.default_rng(1).random((2, 6, 40)) < 0.4)
    mask = chain(6, 290, length_B, ancestors=pack_bits(reach), nodes=40, causal=False)
    k, v = poisoned(k, mask), poisoned(v, mask)
    run = functools.partial(tree, scale=0.3, sizes=SMALL, interpret=True)
    assert_near(jax.jit(run)(q, k, v, mask), reference.attention(q, k, v, mask, scale=0.3))


def test_column_sums_over_several_blocks_of_queries():
    q, k, v, length_B = random_inputs(150, 300, 8, 2, 128)
    mask = chain(150, 300, length_B, window=40)
    counted = jnp.arange(150) % 3 > 0
    counted = jnp.stack([counted, ~counted])
    _, lse = reference.attention(q, k, v, mask, scale=0.3)
    expected = reference.column_sums(q, k, lse, mask, counted, scale=0.3)
    # neither queries that do not count nor rows that are not in use may reach the sums
    q = jnp.where(counted[..., None, None], q, jnp.nan)
    run = functools.partial(column_sums, scale=0.3, sizes=SMALL, interpret=True)
    actual = jax.jit(run)(q, poisoned(k, mask), lse, mask, counted)
    assert_near(actual, expected, tolerance=3e-5)


@pytest.mark.parametrize('channels,rows', [(64, 32), (128, 96)])
def test_sparse_decode_in_several_steps(channels, rows):
    """Blocks smaller than 128 rows are read as parts of such blocks where C is 64."""
    q, k, v, _ = random_inputs(1, 700, 4, 2, channels)
    kept = jax.random.bernoulli(jax.random.key(0), 0.1, k.shape[:3])
    kept = kept.at[0, 0].set(False).at[0, 1, 40:].set(False)
    index = sparse.from_rows(kept, rows, 600 // rows)
    kept = sparse.kept_rows(index, 700)[..., None]
    k, v = jnp.where(kept, k, jnp.nan), jnp.where(kept, v, jnp.nan)
    sizes = BlockSizes(key=3 * max(rows, 128 if channels == 64 else 0))
    run = functools.partial(sparse_decode, scale=0.3, sizes=sizes, interpret=True)
    expected = reference.sparse_decode(q, k, v, index, scale=0.3)
    assert np.isneginf(expected[1][0]).any() and np.isfinite(expected[1][1]).all()
    assert_near(jax.jit(run)(q, k, v, index), expected)


@pytest.mark.parametrize(
    'sizes,message',
    [
        (BlockSizes(key=100), 'key: 100; expected a multiple of 128'),
        (BlockSizes(key=2**17), 'MiB of vector memory'),
    ],
)
def test_sizes_are_refused_before_compiling(sizes, message):
    """Shapes only: nothing of this size is ever made."""
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, 4, 8, 128), jnp.float32), shape((1, 2, 2**17, 128), jnp.float32)
    mask = Mask(shape((1, 4), jnp.int32), shape((1, 1, 2**17), jnp.int32))
    settings = {'scale': 0.3, 'sizes': sizes}
    with pytest.raises(ValueError, match=f'^tree: .*{message}'):
        jax.eval_shape(functools.partial(tree, **settings), q, k, k, mask)
    lse, counted = shape((1, 4, 8), jnp.float32), shape((1, 4), jnp.bool_)
    with pytest.raises(ValueError, match=f'^column_sums: .*{message}'):
        jax.eval_shape(functools.partial(column_sums, **settings), q, k, lse, mask, counted)


def test_sizes_that_the_tiling_forbids():
    q, k, _, length_B = random_inputs(150, 300, 8, 2, 128)
    mask = chain(150, 300, length_B)
    with pytest.raises(ValueError, match=r'query: 10, 40 rows .* multiple of 128 rows'):
        sizes = BlockSizes(query=10)
        column_sums(q, k, q[..., 0], mask, mask.query_position > 0, scale=1.0, sizes=sizes)


def test_an_index_that_scalar_memory_cannot_hold():
    shape = jax.ShapeDtypeStruct
    q, k = shape((64, 1, 32, 128), jnp.bfloat16), shape((64, 8, 32768, 128), jnp.bfloat16)
    index = sparse.SparseIndex(
        *(shape((64, 8, *more), jnp.int32) for more in [(), (256,), (256, 4)])
    )
    with pytest.raises(ValueError, match=r'sparse_decode: .* MiB of scalar memory'):
        jax.eval_shape(functools.partial(sparse_decode, scale=1.0), q, k, k, index)
    index = sparse.from_rows(jnp.ones((1, 2, 256), bool), 64, 4)
    q, k = jnp.ones((1, 1, 2, 128)), jnp.ones((1, 2, 256, 128))
    with pytest.raises(ValueError, match='key: 96; expected a multiple of the 64 rows'):
        sparse_decode(q, k, k, index, scale=1.0, sizes=BlockSizes(key=96))
