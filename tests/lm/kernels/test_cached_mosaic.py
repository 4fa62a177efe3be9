"""TPU kernels that read a cache: blocks, steps and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention.attention import TREE_ROWS
from lm.kernels import reference, sparse
from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, key_rows
from lm.kernels.mosaic import tile
from lm.kernels.mosaic.column_sums import column_sums
from lm.kernels.mosaic.decode import decode
from lm.kernels.mosaic.sparse_decode import sparse_decode
from lm.kernels.mosaic.tree import tree
from lm.kernels.scoring import Scoring

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


def noise_of(k, temperature=1.7):
    """Returns a scoring with noise per KV head."""
    return Scoring(0.3, 4.0, temperature, jax.random.gumbel(jax.random.key(9), k.shape[:3]))


def poisoned(x, mask):
    return jnp.where(key_rows(mask)[..., None], x, jnp.nan)


def assert_near(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.float32(a), e, atol=tolerance), actual, expected
    )


@pytest.mark.parametrize('channels,window,terms', [(80, 100, True), (128, None, False)])
def test_decode_over_several_blocks(channels, window, terms):
    q, k, v, length_B = random_inputs(1, 400, 4, 2, channels)
    mask = chain(1, 400, length_B, window=window)
    k, v = poisoned(k, mask), poisoned(v, mask)
    scoring = noise_of(k) if terms else Scoring(0.3, 4.0)
    run = functools.partial(decode, scoring=scoring, sizes=SMALL, interpret=True)
    expected = reference.attention(q, k, v, mask, scoring)
    assert_near(jax.jit(run)(q, k, v, mask), expected)


@pytest.mark.parametrize('terms', [False, True])
def test_column_sums_over_several_blocks_of_queries(terms):
    q, k, v, length_B = random_inputs(150, 300, 8, 2, 128)
    scoring = noise_of(k) if terms else Scoring(0.3)
    mask = chain(150, 300, length_B, window=40)
    counted = jnp.arange(150) % 3 > 0
    counted = jnp.stack([counted, ~counted])
    _, lse = reference.attention(q, k, v, mask, scoring)
    expected = reference.column_sums(q, k, lse, mask, counted, scoring)
    # neither queries that do not count nor rows that are not in use may reach the sums
    q = jnp.where(counted[..., None, None], q, jnp.nan)
    run = functools.partial(column_sums, scoring=scoring, sizes=SMALL, interpret=True)
    actual = jax.jit(run)(q, poisoned(k, mask), lse, mask, counted)
    assert_near(actual, expected, tolerance=3e-5)


@pytest.mark.parametrize('terms', [False, True])
@pytest.mark.parametrize('channels,rows', [(64, 32), (128, 96)])
def test_sparse_decode_in_several_steps(channels, rows, terms):
    """Blocks smaller than 128 rows are read as parts of such blocks where C is 64."""
    q, k, v, _ = random_inputs(1, 700, 4, 2, channels)
    kept = jax.random.bernoulli(jax.random.key(0), 0.1, k.shape[:3])
    kept = kept.at[0, 0].set(False).at[0, 1, 40:].set(False)
    index = sparse.from_rows(kept, rows, 600 // rows)
    kept = sparse.kept_rows(index, 700)[..., None]
    k, v = jnp.where(kept, k, jnp.nan), jnp.where(kept, v, jnp.nan)
    sizes = BlockSizes(key=3 * max(rows, 128 if channels == 64 else 0))
    scoring = noise_of(k) if terms else Scoring(0.3)
    run = functools.partial(sparse_decode, scoring=scoring, sizes=sizes, interpret=True)
    expected = reference.sparse_decode(q, k, v, index, scoring)
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
    settings = {'scoring': Scoring(0.3), 'sizes': sizes}
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
        column_sums(
            q, k, q[..., 0], mask, mask.query_position > 0, scoring=Scoring(1.0), sizes=sizes
        )


def tree_shapes(nodes, heads, channels, dtype):
    """Returns shapes of q, k, v and a mask: a draft tree of `nodes` new nodes and one KV head."""
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, nodes, heads, channels), dtype), shape((1, 1, 8192, channels), dtype)
    bits = shape((1, nodes, nodes // 32), jnp.int32)
    positions = shape((1, nodes), jnp.int32), shape((1, 1, 8192), jnp.int32)
    return q, k, k, Mask(*positions, length=shape((1,), jnp.int32), ancestors=bits)


def test_a_tree_whose_ancestors_vector_memory_cannot_hold():
    """The compiler's own refusal takes many seconds."""
    message = '^tree: 1024 queries of 4 heads .* blocks of 128 keys .* MiB of vector memory'
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            functools.partial(tree, scoring=Scoring(1.0)), *tree_shapes(1024, 4, 128, jnp.bfloat16)
        )


@pytest.mark.parametrize('channels', [64, 80, 128, 256])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_trees_of_as_many_rows_as_attention_sends_are_taken(channels, dtype):
    for heads in (1, 8):
        shapes = tree_shapes(TREE_ROWS // heads, heads, channels, dtype)
        jax.eval_shape(functools.partial(tree, scoring=Scoring(1.0)), *shapes)


def test_a_batch_that_scalar_memory_cannot_hold(monkeypatch):
    """Three batch rows, of which it holds two; the caches stay whole."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(3, 1, 2, 64)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 3, 1, 200, 64)), jnp.float32)
    length_B = jnp.asarray([200, 150, 40])
    position = jnp.broadcast_to(jnp.arange(200), (3, 1, 200))
    mask = Mask(length_B[:, None] - 1, position, length=length_B, window=120)
    index = sparse.from_rows(jnp.asarray(rng.random((3, 1, 200)) < 0.1), 128, 2)
    counted = jnp.ones((3, 1), bool)
    settings = {'scoring': Scoring(0.3)}
    expected = reference.attention(q, k[1], v[1], mask, **settings)
    sums = reference.column_sums(q, k[1], expected[1], mask, counted, **settings)
    kept = reference.sparse_decode(q, k[1], v[1], index, **settings)
    settings |= {'layer': 1, 'sizes': SMALL, 'interpret': True}
    cases = [  # words of a batch row: bounds and a length; those of 2 blocks; blocks and bits
        (4 + 1, decode, (q, k, v, mask), expected),
        (2 * 4 + 2 + 1, column_sums, (q, k, expected[1], mask, counted), sums),
        (1 + 2 + 2 * 4, sparse_decode, (q, k, v, index), kept),
    ]
    for words, kernel, operands, result in cases:
        for room, n_calls in ((3 * words, 1), (3 * words - 1, 2)):
            monkeypatch.setattr(tile, 'SMEM', 4 * (tile.FEW + room))
            run = lambda *x, kernel=kernel: kernel(*x, **settings)  # noqa: E731
            assert str(jax.make_jaxpr(run)(*operands)).count('pallas_call[') == n_calls
        assert_near(jax.jit(run)(*operands), result)


def test_an_index_that_scalar_memory_cannot_hold():
    shape = jax.ShapeDtypeStruct
    q, k = shape((64, 1, 32, 128), jnp.bfloat16), shape((64, 8, 2**20, 128), jnp.bfloat16)
    index = sparse.SparseIndex(
        *(shape((64, 8, *more), jnp.int32) for more in [(), (4096,), (4096, 4)])
    )
    with pytest.raises(ValueError, match=r'sparse_decode: .* 4096 blocks .* scalar memory'):
        jax.eval_shape(functools.partial(sparse_decode, scoring=Scoring(1.0)), q, k, k, index)
    index = sparse.from_rows(jnp.ones((1, 2, 256), bool), 64, 4)
    q, k = jnp.ones((1, 1, 2, 128)), jnp.ones((1, 2, 256, 128))
    with pytest.raises(ValueError, match='key: 96; expected a multiple of the 64 rows'):
        sparse_decode(q, k, k, index, scoring=Scoring(1.0), sizes=BlockSizes(key=96))
