"""Attention of a few new nodes against a cache, split over its keys: Flash-Decoding (Dao 2023).

Every row of the cache is fetched for all query heads that share a key/value head at once, by each
block of up to 128 rows of queries. A draft tree's mask is its packed bits; no [L, S] array exists.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, blocks
from lm.kernels.merge import merge
from lm.kernels.scoring import Scoring
from lm.kernels.triton import block_mask, logits, tile
from lm.kernels.triton import rows as folded


def block_sizes(
    rows: int, head: int, dtype: jax.typing.DTypeLike, *, keys: int, groups: int
) -> BlockSizes:
    """Returns the default block sizes of `tree` and `decode`.

    Args:
      rows: rows of queries per key/value head, L H / K.
      head: head size.
      dtype: of the operands.
      keys: rows of the cache, S.
      groups: batch times key/value heads, B K.
    """
    if jnp.dtype(dtype).itemsize > 2:
        sizes = tile.f32_sizes(head)
        query, key = min(tile.padded(rows), sizes.query), sizes.key
        warps, stages = sizes.warps, sizes.stages
    else:
        query = min(tile.padded(rows), 128 if head <= 128 else 64)
        key, warps, stages = 64 if head <= 128 else 32, 4 if query <= 64 else 8, 2
    programs = groups * pl.cdiv(rows, query)
    return BlockSizes(query, key, folded.splits(programs, query, pl.cdiv(keys, key)), warps, stages)


def shared_memory(sizes: BlockSizes, head: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns about how many bytes of shared memory `tree` takes."""
    row = tile.padded(head) * jnp.dtype(dtype).itemsize
    return (sizes.query + 2 * sizes.stages * sizes.key) * row


def tree(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    layer: jax.Array | int | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.attention` of L new nodes, against a cache that holds their keys already.

    Args:
      q_BLHC: queries of the nodes; head h reads key/value head `h // (H / K)`.
      k, v: `[B, K, S, C]`, or with `layer` a stack `[N, B, K, S, C]`, read in place; of q's dtype.
      mask: which keys each node sees: by position, or also by `ancestors`; rows behind `length`
        are not read.
      layer: which of the stacked caches, int or int32 scalar.
      scoring: makes the logits, see `Scoring`.
      sizes: `query` rows (of L H / K) and `key` rows per block, `splits` of the live keys; see
        `block_sizes`.
      interpret: runs the kernel on the CPU.

    Returns:
      `[B, L, H, C]` in the dtype of `q_BLHC`, zeros where a node sees no key; LSE, f32
      `[B, L, H]`, there -inf.

    Raises:
      ValueError: block sizes that Triton or the shared memory refuses, or dtypes that differ.
    """
    b, l, h, c = q_BLHC.shape
    layer_1, k, v = folded.stacked(layer, k, v)
    heads, s = k.shape[2:4]
    q_BKRC = folded.fold(q_BLHC, heads)
    rows, width = q_BKRC.shape[2], tile.padded(c)
    sizes = sizes or block_sizes(rows, c, q_BLHC.dtype, keys=s, groups=b * heads)
    tile.check_operands('tree', q_BLHC, k, v)
    tile.check_sizes('tree', sizes, shared_memory(sizes, c, q_BLHC.dtype))
    bounds = tile.ranges(*blocks(mask, l, sizes.key))
    terms = logits.operands(mask, scoring)
    mask = block_mask.operands(mask, s)
    shapes, specs = folded.partial_results(q_BKRC, sizes.query, width, sizes.splits)
    q_spec = pl.BlockSpec((None, None, sizes.query, width), lambda i, _, h, b: (b, h, i, 0))
    kv_spec = folded.cache_spec(k, width)
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, key=sizes.key, group=h // heads, columns=c, scoring=scoring.static
        ),
        name='tree',
        grid=(pl.cdiv(rows, sizes.query), sizes.splits, heads, b),
        in_specs=[*tile.whole((bounds, layer_1, mask, terms)), q_spec, kv_spec, kv_spec],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(bounds, layer_1, mask, terms, q_BKRC, k, v)
    out, lse = merge(out, lse)
    return folded.unfold(out, l).astype(q_BLHC.dtype), folded.unfold(lse, l)


def _kernel(
    bounds_ref, layer_ref, mask, terms, q_ref, k_ref, v_ref, out_ref, lse_ref,
    *, key, group, columns, scoring
):  # fmt: skip
    rows, width = q_ref.shape
    head, batch = pl.program_id(2), pl.program_id(3)
    row = pl.program_id(0) * rows + jnp.arange(rows)
    there = row < mask.query_position.shape[1] * group
    q = tile.load_rows(q_ref, (slice(None),), columns, there)
    queries = block_mask.load_queries(mask, batch, jax.lax.div(row, jnp.full_like(row, group)))
    layer = layer_ref[0]

    def body(block, masked, state, _):
        start = block * key
        keys = block_mask.load_keys(mask, batch, head, start, key) if masked else None
        held = None if keys is None else keys.held
        k = tile.load_rows(k_ref, (layer, pl.ds(start, key)), columns, held)
        v = tile.load_rows(v_ref, (layer, pl.ds(start, key)), columns, held)
        s = logits.capped(q, k, scoring)
        s = logits.complete(s, logits.load(terms, batch, head, start, key))
        if keys is not None:
            s = jnp.where(block_mask.visible(mask, batch, queries, keys), s, -jnp.inf)
        return state.add(s, v)

    first, free, free_end, end = tile.load_range(bounds_ref, batch, head, 0)
    first, end = folded.share(first, end, pl.program_id(1), pl.num_programs(1))
    bounds = first, jnp.clip(free, first, end), jnp.clip(free_end, first, end), end
    out, lse = tile.loop(bounds, body, tile.Softmax.start(rows, width)).finish()
    tile.store_rows(out_ref, out, columns, there)
    plgpu.store(lse_ref, lse, mask=there)
