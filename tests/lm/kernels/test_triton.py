"""Triton kernels: CUDA lowering, refused sizes, splits, small oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import reference
from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, pack_bits
from lm.kernels.merge import merge
from lm.kernels.scoring import Scoring
from lm.kernels.sparse import SparseIndex, from_rows
from lm.kernels.triton import column_sums, decode, flash, sparse_decode, tree

SMALL = BlockSizes(query=16, key=16, splits=3)


def normal(name: str, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(sum(name.encode())), shape)


def close(actual, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        size = np.max(np.abs(y), where=np.isfinite(y), initial=1e-6)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * size)


def packed_documents(b, l, s, heads):
    """Two documents per row, positions per KV head, empty rows, a window, a length."""
    r = np.random.RandomState(0)
    key = r.randint(-2, s, (b, heads, s))
    segment = np.sort(r.randint(0, 2, (b, s)), axis=1)
    return Mask(
        query_position=jnp.asarray(r.randint(0, s, (b, l))),
        key_position=jnp.asarray(key),
        query_segment=jnp.asarray(segment[:, :l]),
        key_segment=jnp.asarray(segment),
        length=jnp.asarray([s - 3, 0])[:b],
        window=jnp.int32(s // 2),
    )


def draft_tree(b, nodes, s):
    """A random tree after a prefix; the first sequence fills its cache."""
    r = np.random.RandomState(1)
    sees, depth = np.zeros((b, nodes, nodes), bool), np.zeros((b, nodes), int)
    for x in range(b):
        for i in range(nodes):
            parent = r.randint(-1, i) if i else -1
            if parent >= 0:
                sees[x, i], depth[x, i] = sees[x, parent], depth[x, parent] + 1
            sees[x, i, i] = True
    length = np.asarray([s, nodes + 5])[:b]
    row = np.arange(s) - (length - nodes)[:, None]
    key = np.take_along_axis(depth, np.clip(row, 0, nodes - 1), 1) + (length - nodes)[:, None]
    key = np.where(row < 0, np.arange(s), np.where(row < nodes, key, -1))
    return Mask(
        query_position=jnp.asarray((length - nodes)[:, None] + depth),
        key_position=jnp.asarray(key)[:, None],
        length=jnp.asarray(length),
        ancestors=pack_bits(jnp.asarray(sees)),
    )


def poisoned(x_BKSC, mask):
    unused = jnp.arange(x_BKSC.shape[-2]) >= mask.length[:, None]
    return jnp.where(unused[:, None, :, None], jnp.nan, x_BKSC)


def test_flash_and_its_gradients_over_many_small_blocks():
    b, l, h, k, s, c = 2, 37, 4, 2, 53, 24
    q, key, value = normal('q', b, l, h, c), normal('k', b, k, s, c), normal('v', b, k, s, c)
    mask = packed_documents(b, l, s, k)
    options = {'scoring': Scoring(0.3, 3.0)}

    @jax.jit
    def formula(q, key, value, d_out, d_lse):
        result, vjp = jax.vjp(
            lambda *x: reference.attention(*x, mask, **options), q, key, value
        )  # fmt: skip
        return result, vjp((d_out, jnp.where(result[1] > -jnp.inf, d_lse, 0)))

    @jax.jit
    def kernels(q, key, value, d_out, d_lse):
        run = {'sizes': BlockSizes(query=16, key=16), 'interpret': True, **options}
        out, lse = flash.forward(q, key, value, mask, **run)
        d_lse = jnp.where(lse > -jnp.inf, d_lse, 0)
        gradients = flash.backward(q, key, value, out, lse, d_out, d_lse, mask, **run)
        return (out, lse), gradients

    cotangents = normal('do', *q.shape), normal('dl', b, l, h)
    bad = poisoned(key, mask), poisoned(value, mask)
    close(kernels(q, *bad, *cotangents), formula(q, key, value, *cotangents))


def test_split_tree_and_column_sums_of_a_stacked_cache():
    b, nodes, h, k, s, c = 2, 35, 6, 2, 70, 16
    mask = draft_tree(b, nodes, s)
    q, key, value = normal('q', b, nodes, h, c), normal('k', b, k, s, c), normal('v', b, k, s, c)
    counts = normal('rows', b, nodes) > 0
    shown = jnp.where(counts[..., None, None], q, jnp.nan)

    @jax.jit
    def formula(key, value):
        out, lse = reference.attention(q, key, value, mask, scoring=Scoring(0.3))
        return out, lse, reference.column_sums(q, key, lse, mask, counts, scoring=Scoring(0.3))

    @jax.jit
    def kernels(key, value, layer):
        run = {'layer': layer, 'scoring': Scoring(0.3), 'sizes': SMALL, 'interpret': True}
        out, lse = tree.tree(q, key, value, mask, **run)
        return out, lse, column_sums.column_sums(shown, key, lse, mask, counts, **run)

    stack = [jnp.stack([jnp.full_like(x, jnp.nan), poisoned(x, mask)]) for x in (key, value)]
    close(kernels(*stack, jnp.int32(1)), formula(key, value))


def test_split_sparse_decode_reads_no_row_that_is_not_kept():
    b, h, k, s, c = 2, 3, 1, 90, 16
    q, key, value = normal('q', b, 1, h, c), normal('k', b, k, s, c), normal('v', b, k, s, c)
    kept = (normal('kept', b, k, s) > 0.5).at[0].set(False)
    index = from_rows(kept, 32, 3)
    unread = jnp.where(kept[..., None], 0.0, jnp.nan)
    call = functools.partial(
        sparse_decode.sparse_decode, scoring=Scoring(0.3), sizes=SMALL, interpret=True
    )  # fmt: skip
    formula = functools.partial(reference.sparse_decode, scoring=Scoring(0.3))
    actual = jax.jit(call)(q, key + unread, value + unread, index)
    close(actual, jax.jit(formula)(q, key, value, index))


def test_merged_halves_are_the_whole():
    b, l, h, k, s, c = 1, 5, 2, 1, 16, 8
    q, key, value = normal('q', b, l, h, c), normal('k', b, k, s, c), normal('v', b, k, s, c)
    position = jnp.broadcast_to(jnp.arange(s), (b, 1, s))
    mask = Mask(jnp.asarray([[-1, 3, 9, 12, 15]]), position)  # the first sees nothing
    attend = jax.jit(functools.partial(reference.attention, scoring=Scoring(0.3)))
    halves = [
        attend(
            q, key[:, :, at], value[:, :, at],
            Mask(mask.query_position, position[:, :, at]),
        )
        for at in (slice(0, 8), slice(8, 16))
    ]  # fmt: skip
    merged = merge(*(jnp.stack(x) for x in zip(*halves, strict=True)))
    close(merged, attend(q, key, value, mask))


def lowered(function, *arguments) -> str:
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=('cuda',)).as_text()


def shape(*sizes, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('head', [80, 128])
def test_all_kernels_lower_for_cuda_at_real_sizes(head, dtype):
    b, l, s, k, h, n = 2, 64, 32768, 8, 32, 4
    q, cache = shape(b, l, h, head, dtype=dtype), shape(n, b, k, s, head, dtype=dtype)
    flat, row = shape(b, k, s, head, dtype=dtype), shape(b, l, h, dtype=jnp.float32)
    mask = Mask(shape(b, l), shape(b, k, s), length=shape(b), window=shape())
    drafted = mask.replace(ancestors=shape(b, l, 2))
    one = q.update(shape=(b, 1, h, head))
    index = SparseIndex(shape(b, k), shape(b, k, 64), shape(b, k, 64, 2))
    capped = Scoring(1.0, 30.0)
    call, plain = '__gpu$xla.gpu.triton', Scoring(1.0)
    assert lowered(flash.forward, q, flat, flat, mask, capped).count(call) == 1
    assert lowered(flash.backward, q, flat, flat, q, row, q, row, mask, capped).count(call) == 2
    several = [
        (
            lambda q, k, m, i: tree.tree(q, k, k, m, plain, layer=i),
            *(q, cache, drafted, shape()),
        ),
        (
            lambda q, k, m, i: decode.decode(q, k, k, m, plain, layer=i),
            *(one, cache, mask.replace(query_position=shape(b, 1)), shape()),
        ),
        (
            lambda q, k, l, m, r, i: column_sums.column_sums(q, k, l, m, r, plain, layer=i),
            *(q, cache, row, drafted, shape(b, l, dtype=jnp.bool_), shape()),
        ),
        (
            lambda q, k, x, i: sparse_decode.sparse_decode(q, k, k, x, plain, layer=i),
            *(one, cache, index, shape()),
        ),
    ]
    for function, *arguments in several:
        text = lowered(function, *arguments)
        assert text.count(call) == 1
        # the layer is read where it lies
        assert f'tensor<{b}x{k}x{s}x{head}x' not in text


@pytest.mark.parametrize('head', [80, 128])
def test_all_kernels_lower_for_cuda_with_bias_noise_and_temperature(head):
    b, l, s, k, h, f32 = 2, 16, 4096, 8, 32, jnp.float32
    q, cache = shape(b, l, h, head, dtype=jnp.bfloat16), shape(b, k, s, head, dtype=jnp.bfloat16)
    mask = Mask(shape(b, l), shape(b, 1, s), length=shape(b), key_bias=shape(b, k, s, dtype=f32))
    drafted, lse = mask.replace(ancestors=shape(b, l, 1)), shape(b, l, h, dtype=f32)
    scoring = Scoring(1.0, 30.0, shape(dtype=f32), shape(b, 1, s, dtype=f32))
    index = SparseIndex(shape(b, k), shape(b, k, 64), shape(b, k, 64, 2))
    counted = shape(b, l, dtype=jnp.bool_)
    calls = [
        (1, flash.forward, (q, cache, cache, mask, scoring)),
        (2, flash.backward, (q, cache, cache, q, lse, q, lse, mask, scoring)),
        (1, tree.tree, (q, cache, cache, drafted, scoring)),
        (1, column_sums.column_sums, (q, cache, lse, drafted, counted, scoring)),
        (2, sparse_decode.sparse_decode, (q, cache, cache, index, scoring, drafted)),
    ]
    for kernels, function, arguments in calls:
        assert lowered(function, *arguments).count('__gpu$xla.gpu.triton') == kernels


def test_what_cannot_run_is_refused_in_one_line():
    q, kv = shape(1, 8, 2, 128, dtype=jnp.bfloat16), shape(1, 1, 64, 128, dtype=jnp.bfloat16)
    mask = Mask(shape(1, 8), shape(1, 1, 64))
    run = functools.partial(flash.forward, scoring=Scoring(1.0))
    with pytest.raises(ValueError, match=r'flash: .* need .* of shared memory') as error:
        jax.eval_shape(functools.partial(run, sizes=BlockSizes(512, 512)), q, kv, kv, mask)
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match=r'BlockSizes.key: 48; .* power of two'):
        jax.eval_shape(functools.partial(run, sizes=BlockSizes(64, 48)), q, kv, kv, mask)
    with pytest.raises(ValueError, match=r'one dtype'):
        jax.eval_shape(run, q, shape(*kv.shape, dtype=jnp.float32), kv, mask)
    index = SparseIndex(shape(1, 1), shape(1, 1, 2), shape(1, 1, 2, 1))
    sparse = functools.partial(
        sparse_decode.sparse_decode, scoring=Scoring(1.0), sizes=BlockSizes(16, 64)
    )
    with pytest.raises(ValueError, match=r'divisor of the 32 rows'):
        jax.eval_shape(sparse, q.update(shape=(1, 1, 2, 128)), kv, kv, index)
    with pytest.raises(ValueError, match=r'8 queries .* use tree'):
        jax.eval_shape(functools.partial(decode.decode, scoring=Scoring(1.0)), q, kv, kv, mask)
