"""The attention that each cached key received: the score of cache-eviction policies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, blocks
from lm.kernels.scoring import Scoring
from lm.kernels.triton import block_mask, logits, tile
from lm.kernels.triton import rows as folded


def block_sizes(rows: int, group: int, head: int, dtype: jax.typing.DTypeLike) -> BlockSizes:
    """Returns the default block sizes of `column_sums`.

    Args:
      rows: rows of queries per key/value head, L H / K.
      group: query heads per key/value head, H / K.
      head: head size.
      dtype: of the operands.
    """
    most = BlockSizes(query=64, key=64, warps=4, stages=2)
    if jnp.dtype(dtype).itemsize > 2:
        most = tile.f32_sizes(head)
    query = max(min(tile.padded(rows), most.query), tile.padded(group))
    return dataclasses.replace(most, query=query)


def shared_memory(sizes: BlockSizes, head: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns about how many bytes of shared memory `column_sums` takes."""
    row = tile.padded(head) * jnp.dtype(dtype).itemsize
    return (sizes.key + sizes.stages * sizes.query) * row + 8 * sizes.query * sizes.stages


def column_sums(
    q_BLHC: jax.Array,
    k: jax.Array,
    lse_BLH: jax.Array,
    mask: Mask,
    row_mask_BL: jax.Array,
    scoring: Scoring,
    *,
    layer: jax.Array | int | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Sums exp(logits - lse) over queries and over the query heads of each key/value head.

    A second pass over the keys, after the one that found the LSE: one product more, no values
    read. As in `reference.column_sums`; H2O's score (Zhang et al. 2023) is its sum over steps.

    Args:
      q_BLHC: queries; head h reads key/value head `h // (H / K)`.
      k: `[B, K, S, C]`, or with `layer` a stack `[N, B, K, S, C]`, read in place; of q's dtype.
      lse_BLH: f32, the LSE that attention returned for these queries and this mask.
      mask: which keys each query sees; rows behind `length` are not read.
      row_mask_BL: bool, which queries count; a rejected draft node does not.
      layer: which of the stacked caches, int or int32 scalar.
      scoring: makes the logits, see `Scoring`.
      sizes: `query` rows (of L H / K) and `key` rows per block; see `block_sizes`.
      interpret: runs the kernel on the CPU.

    Returns:
      f32 `[B, K, S]`.

    Raises:
      ValueError: block sizes that Triton or the shared memory refuses, or that hold less than the
        H / K rows of one query; or dtypes that differ.
    """
    b, l, h, c = q_BLHC.shape
    layer_1, k = folded.stacked(layer, k)
    heads, s = k.shape[2:4]
    q_BKRC, group, width = folded.fold(q_BLHC, heads), h // heads, tile.padded(c)
    tile.check_operands('column_sums', q_BLHC, k)
    sizes = _checked(sizes, q_BKRC.shape[2], group, c, q_BLHC.dtype)
    lse_BKR = _counted(lse_BLH, row_mask_BL, heads)
    bounds = _live_queries(mask, sizes.query // group, sizes.key)
    terms = logits.operands(mask, scoring)
    mask = block_mask.operands(mask, s)
    q_spec = pl.BlockSpec((None, None, l * group, width), lambda _, h, b: (b, h, 0, 0))
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, group=group, columns=c, scoring=scoring.static),
        name='column_sums',
        grid=(pl.cdiv(s, sizes.key), heads, b),
        in_specs=[
            *tile.whole((bounds, layer_1, mask, terms, lse_BKR)),
            q_spec,
            folded.cache_spec(k, width),
        ],
        out_specs=pl.BlockSpec((None, None, sizes.key), lambda i, h, b: (b, h, i)),
        out_shape=jax.ShapeDtypeStruct((b, heads, s), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(bounds, layer_1, mask, terms, lse_BKR, q_BKRC, k)  # fmt: skip


def _counted(lse_BLH: jax.Array, row_mask_BL: jax.Array, heads: int) -> jax.Array:
    """Returns the LSE of rows, `[B, K, R]`, in base 2; +inf where a row does not count."""
    counted = row_mask_BL[..., None] & (lse_BLH > -jnp.inf)
    lse_BLH = jnp.where(counted, lse_BLH * tile.LOG2E, jnp.inf)
    return folded.fold(lse_BLH[..., None], heads)[..., 0]


def _live_queries(mask: Mask, nodes: int, key: int) -> jax.Array:
    """Returns `tile.ranges` of blocks of that many queries, for each block of keys."""
    some, every = (jnp.swapaxes(x, 2, 3) for x in blocks(mask, nodes, key))
    return tile.ranges(some, every)


def _checked(sizes: BlockSizes | None, rows: int, group: int, head: int, dtype) -> BlockSizes:
    """Returns the sizes, or the default ones, once they fit."""
    sizes = sizes or block_sizes(rows, group, head, dtype)
    tile.check_sizes('column_sums', sizes, shared_memory(sizes, head, dtype))
    if sizes.query < group:
        raise ValueError(
            f'column_sums: BlockSizes.query: {sizes.query}; expected at least the {group} query '
            'heads that share a key/value head'
        )
    return sizes


def _kernel(
    bounds_ref, layer_ref, mask, terms, lse_ref, q_ref, k_ref, out_ref,
    *, sizes, group, columns, scoring
):  # fmt: skip
    block, head, batch = (pl.program_id(i) for i in range(3))
    step = sizes.query // group * group  # whole queries
    start = block * sizes.key
    keys = block_mask.load_keys(mask, batch, head, start, sizes.key)
    loaded = logits.load(terms, batch, head, start, sizes.key)
    index = layer_ref[0], pl.ds(start, sizes.key)
    k = tile.load_rows(k_ref, index, columns, keys.held)

    # Keys are the rows of a tile: the sum over queries stays within a row.
    def body(block, masked, total, _):
        at = pl.ds(block * step, sizes.query)
        own = jnp.arange(sizes.query) < step
        row = block * step + jnp.arange(sizes.query)
        there = own & (row < q_ref.shape[0])
        lse = plgpu.load(lse_ref.at[batch, head, at], mask=there, other=jnp.inf)
        q = tile.load_rows(q_ref, (at,), columns, lse < jnp.inf)
        s = logits.complete(logits.capped(k, q, scoring), loaded, query_axis=1)
        if masked:
            node = jax.lax.div(row, jnp.full_like(row, group))
            queries = block_mask.load_queries(mask, batch, node)
            seen = block_mask.visible(mask, batch, queries, keys, query_axis=1)
            s = jnp.where(seen, s, -jnp.inf)
        return total + jnp.sum(jnp.exp2(s - lse[None, :]), axis=1)

    bounds = tile.load_range(bounds_ref, batch, head, block)
    total = tile.loop(bounds, body, jnp.zeros((sizes.key,), jnp.float32))
    plgpu.store(out_ref, total, mask=keys.row < mask.key_position.shape[2])
