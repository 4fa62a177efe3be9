"""Attention over the cache rows that each KV head keeps, and over the nodes of a draft tree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import WORD, Mask
from lm.kernels.merge import merge
from lm.kernels.scoring import Scoring, Terms
from lm.kernels.sparse import SparseIndex, with_nodes
from lm.kernels.triton import logits, tile, tree
from lm.kernels.triton import rows as folded


def block_sizes(
    rows: int, head: int, dtype: jax.typing.DTypeLike, *, index: SparseIndex
) -> BlockSizes:
    """Returns the default block sizes of `sparse_decode`.

    Args:
      rows: rows of queries per key/value head, L H / K.
      head: head size.
      dtype: of the operands.
      index: whose blocks are cut into equal tiles of `key` rows.
    """
    most = BlockSizes(query=64, key=64 if head <= 128 else 32, warps=4, stages=2)
    if jnp.dtype(dtype).itemsize > 2:
        most = tile.f32_sizes(head)
    query = min(tile.padded(rows), most.query)
    key = min(index.rows & -index.rows, most.key)  # a power of two that divides a block
    b, heads, listed = index.block.shape
    parts = folded.splits(b * heads * pl.cdiv(rows, query), query, listed)
    return dataclasses.replace(most, query=query, key=key, splits=parts)


def shared_memory(sizes: BlockSizes, head: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns about how many bytes of shared memory `sparse_decode` takes."""
    row = tile.padded(head) * jnp.dtype(dtype).itemsize
    return (sizes.query + 2 * sizes.stages * sizes.key) * row


def sparse_decode(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: SparseIndex,
    scoring: Scoring,
    mask: Mask | None = None,
    *,
    layer: jax.Array | int | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.sparse_decode`: Flash-Decoding (Dao et al. 2023) over listed blocks of rows.

    Rows that are not kept are not fetched. Nodes are left to `tree`.

    Args:
      q_BLHC: the L new nodes; without a mask one query per sequence. Head h reads key/value head
        `h // (H / K)`.
      k, v: `[B, K, S, C]`, or with `layer` a stack `[N, B, K, S, C]`, read in place; of q's dtype.
      index: which rows each key/value head keeps.
      layer: which of the stacked caches, int or int32 scalar.
      scoring: makes the logits, see `Scoring`.
      mask: which nodes of a draft tree, or of a chain, each query sees.
      sizes: `query` rows (of L H / K) and `key` rows per tile, which must divide `index.rows`;
        `splits` of the listed blocks; see `block_sizes`.
      interpret: runs the kernel on the CPU.

    Returns:
      `[B, L, H, C]` in the dtype of `q_BLHC`, zeros where nothing is seen; LSE, f32 `[B, L, H]`,
      there -inf.

    Raises:
      ValueError: more than one query without a mask; block sizes that Triton or the shared memory
        refuses or that do not divide the index's; dtypes that differ.
    """
    terms = logits.operands(mask, scoring)

    def committed(index: SparseIndex):
        return _committed(q_BLHC, k, v, index, scoring.static, terms, layer, sizes, interpret)

    if mask is not None:
        run = functools.partial(tree.tree, layer=layer, interpret=interpret)
        run = functools.partial(run, sizes=_node_sizes(q_BLHC, k, mask))
        return with_nodes(committed, lambda nodes: run(q_BLHC, k, v, nodes, scoring), index, mask)
    if q_BLHC.shape[1] != 1:
        raise ValueError(
            f'sparse_decode: {q_BLHC.shape[1]} queries per sequence and no mask; expected 1'
        )
    return committed(index)


def _node_sizes(q_BLHC, k, mask: Mask) -> BlockSizes:
    """Returns the default sizes of `tree`, split over no more blocks than the nodes lie in."""
    b, l, h, c = q_BLHC.shape
    heads, s = k.shape[-3:-1]
    sizes = tree.block_sizes(l * h // heads, c, q_BLHC.dtype, keys=s, groups=b * heads)
    blocks = pl.cdiv(max(mask.tree_nodes, 1) - 1, sizes.key) + 1
    return dataclasses.replace(sizes, splits=min(sizes.splits, blocks))


def _committed(q_BLHC, k, v, index: SparseIndex, scoring, terms: Terms, layer, sizes, interpret):
    """Returns attention of all queries over all kept rows, and its LSE."""
    b, l, _, c = q_BLHC.shape
    layer_1, k, v = folded.stacked(layer, k, v)
    heads = k.shape[2]
    q_BKRC = folded.fold(q_BLHC, heads)
    rows, width = q_BKRC.shape[2], tile.padded(c)
    tile.check_operands('sparse_decode', q_BLHC, k, v)
    sizes = _checked(sizes, rows, c, q_BLHC.dtype, index)
    shapes, specs = folded.partial_results(q_BKRC, sizes.query, width, sizes.splits)
    q_spec = pl.BlockSpec((None, None, sizes.query, width), lambda i, _, h, b: (b, h, i, 0))
    kv_spec = folded.cache_spec(k, width)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, key=sizes.key, queries=rows, columns=c, scoring=scoring),
        name='sparse_decode',
        grid=(pl.cdiv(rows, sizes.query), sizes.splits, heads, b),
        in_specs=[*tile.whole((layer_1, index, terms)), q_spec, kv_spec, kv_spec],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(layer_1, index, terms, q_BKRC, k, v)  # fmt: skip
    out, lse = merge(out, lse)
    return folded.unfold(out, l).astype(q_BLHC.dtype), folded.unfold(lse, l)


def _checked(
    sizes: BlockSizes | None, rows: int, head: int, dtype, index: SparseIndex
) -> BlockSizes:
    """Returns the sizes, or the default ones, once they fit."""
    sizes = sizes or block_sizes(rows, head, dtype, index=index)
    tile.check_sizes('sparse_decode', sizes, shared_memory(sizes, head, dtype))
    if index.rows % sizes.key:
        raise ValueError(
            f'sparse_decode: BlockSizes.key: {sizes.key}; expected a divisor of the {index.rows} '
            'rows per block of the index'
        )
    return sizes


def _kernel(
    layer_ref,
    index,
    terms,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    *,
    key,
    queries,
    columns,
    scoring,
):
    rows, width = q_ref.shape
    head, batch = pl.program_id(2), pl.program_id(3)
    there = pl.program_id(0) * rows + jnp.arange(rows) < queries
    q = tile.load_rows(q_ref, (slice(None),), columns, there)
    layer = layer_ref[0]
    block_rows = index.bits.shape[3] * WORD
    tiles = block_rows // key

    def body(i, state):
        listed = jax.lax.div(i, tiles)
        within = (i - listed * tiles) * key + jnp.arange(key)
        start = index.block[batch, head, listed] * block_rows + (i - listed * tiles) * key
        word = plgpu.load(index.bits.at[batch, head, listed, within >> 5])
        kept = (word >> (within & (WORD - 1))) & 1 == 1
        kept = kept & (start + jnp.arange(key) < k_ref.shape[1])
        k = tile.load_rows(k_ref, (layer, pl.ds(start, key)), columns, kept)
        v = tile.load_rows(v_ref, (layer, pl.ds(start, key)), columns, kept)
        s = logits.capped(q, k, scoring)
        s = logits.complete(s, logits.load(terms, batch, head, start, key))
        return state.add(jnp.where(kept[None, :], s, -jnp.inf), v)

    count = index.used[batch, head] * tiles
    first, end = folded.share(0, count, pl.program_id(1), pl.num_programs(1))
    state = jax.lax.fori_loop(first, end, body, tile.Softmax.start(rows, width))
    out, lse = state.finish()
    tile.store_rows(out_ref, out, columns, there)
    plgpu.store(lse_ref, lse, mask=there)
