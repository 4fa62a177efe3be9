"""Query heads folded into rows, and keys split into parts: for kernels of few queries.

All G query heads that read one KV head become rows of one matrix, so that K and V are fetched
once per KV head. Row `l G + g` is query l, head g of the group. A part of the keys leaves a partial
result, with its LSE: `lm.kernels.merge`.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

MULTIPROCESSORS = 132  # of the largest cards (H100, H200)


def fold(q_BLHC: jax.Array, heads: int) -> jax.Array:
    """Returns `[B, K, R, C]`, R = L H / K, of `[B, L, H, C]` and K = `heads`."""
    b, l, h, c = q_BLHC.shape
    q_BLKGC = q_BLHC.reshape(b, l, heads, h // heads, c)
    return jnp.swapaxes(q_BLKGC, 1, 2).reshape(b, heads, -1, c)


def unfold(x_BKR: jax.Array, queries: int) -> jax.Array:
    """Returns `[B, L, H, ...]` of `[B, K, R, ...]` and L = `queries`."""
    b, k, r, *rest = x_BKR.shape
    x_BLKG = jnp.swapaxes(x_BKR.reshape(b, k, queries, r // queries, *rest), 1, 2)
    return x_BLKG.reshape(b, queries, -1, *rest)


def stacked(layer: jax.Array | int | None, *caches: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the layer as int32 `[1]`, and caches `[N, B, K, S, C]`; one layer is a stack of 1."""
    if layer is None:
        layer, caches = 0, tuple(x[None] for x in caches)
    return jnp.asarray(layer, jnp.int32).reshape(1), *caches


def splits(programs: int, rows: int, blocks: int) -> int:
    """Returns into how many parts to split the keys of each program so that a card is filled.

    Args:
      programs: how many there are without a split.
      rows: of queries per program; the fewer, the more programs share a multiprocessor.
      blocks: of keys; no part is smaller than one.
    """
    wanted = MULTIPROCESSORS * max(1, min(4, 128 // rows))
    return max(1, min(wanted // programs, blocks))


def share(first, end, part, parts) -> tuple[jax.Array, jax.Array]:
    """Returns the first and the end of one part's equal share of a range."""
    size = jax.lax.div(end - first + parts - 1, parts)
    first = jnp.minimum(first + part * size, end)
    return first, jnp.minimum(first + size, end)


def cache_spec(k: jax.Array, width: int) -> pl.BlockSpec:
    """Returns the specification of one batch member's and KV head's keys, in all layers.

    The grid ends with (KV heads, batch). The kernel picks the layer: none is copied out.
    """
    shape = (k.shape[0], None, None, k.shape[3], width)
    return pl.BlockSpec(shape, lambda *i: (0, i[-1], i[-2], 0, 0))


def partial_results(
    q_BKRC: jax.Array, rows: int, width: int, parts: int
) -> tuple[list[jax.ShapeDtypeStruct], list[pl.BlockSpec]]:
    """Returns shapes and specifications of the partial results: f32 out `[X, B, K, R, C]`, LSE.

    The grid is (blocks of rows, parts, KV heads, batch).
    """

    def index(i, part, head, batch):
        return part, batch, head, i, 0

    b, k, r, c = q_BKRC.shape
    shapes = [(parts, b, k, r, c), (parts, b, k, r)]
    specs = [
        pl.BlockSpec((None, None, None, rows, width), index),
        pl.BlockSpec((None, None, None, rows), lambda *i: index(*i)[:4]),
    ]
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], specs
