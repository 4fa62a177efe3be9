"""Attention of one query over the rows of a cache that each KV head keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import WORD
from lm.kernels.merge import merge
from lm.kernels.sparse import SparseIndex
from lm.kernels.triton import rows as folded
from lm.kernels.triton import tile


def block_sizes(
    rows: int, head: int, dtype: jax.typing.DTypeLike, *, index: SparseIndex
) -> BlockSizes:
    """Returns the default block sizes of `sparse_decode`.

    Args:
      rows: query heads per key/value head, H / K.
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
    *,
    layer: jax.Array | int | None = None,
    scale: float,
    softcap: float | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.sparse_decode`: Flash-Decoding (Dao et al. 2023) over listed blocks of rows.

    Rows that are not kept are not fetched.

    Args:
      q_BLHC: one query per sequence, L = 1; head h reads key/value head `h // (H / K)`.
      k, v: `[B, K, S, C]`, or with `layer` a stack `[N, B, K, S, C]`, read in place; of q's dtype.
      index: which rows each key/value head keeps.
      layer: which of the stacked caches, int or int32 scalar.
      scale, softcap: logits are scale q . k, or cap tanh(scale q . k / cap).
      sizes: `query` heads (of H / K) and `key` rows per tile, which must divide `index.rows`;
        `splits` of the listed blocks; see `block_sizes`.
      interpret: runs the kernel on the CPU.

    Returns:
      `[B, 1, H, C]` in the dtype of `q_BLHC`, zeros where nothing is kept; LSE, f32 `[B, 1, H]`,
      there -inf.

    Raises:
      ValueError: more than one query; block sizes that Triton or the shared memory refuses or that
        do not divide the index's; dtypes that differ.
    """
    b, l, _, c = q_BLHC.shape
    layer_1, k, v = folded.stacked(layer, k, v)
    heads = k.shape[2]
    q_BKRC = folded.fold(q_BLHC, heads)
    rows, width = q_BKRC.shape[2], tile.padded(c)
    tile.check_operands('sparse_decode', q_BLHC, k, v)
    sizes = _checked(sizes, rows, c, q_BLHC.dtype, index)
    if l != 1:
        raise ValueError(f'sparse_decode: {l} queries per sequence; expected 1')
    shapes, specs = folded.partial_results(q_BKRC, sizes.query, width, sizes.splits)
    q_spec = pl.BlockSpec((None, None, sizes.query, width), lambda i, _, h, b: (b, h, i, 0))
    kv_spec = folded.cache_spec(k, width)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, key=sizes.key, heads=rows, columns=c, scale=scale,
                          softcap=softcap),
        name='sparse_decode',
        grid=(pl.cdiv(rows, sizes.query), sizes.splits, heads, b),
        in_specs=[*tile.whole((layer_1, index)), q_spec, kv_spec, kv_spec],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(layer_1, index, q_BKRC, k, v)  # fmt: skip
    out, lse = merge(out, lse)
    return folded.unfold(out, 1).astype(q_BLHC.dtype), folded.unfold(lse, 1)


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
    layer_ref, index, q_ref, k_ref, v_ref, out_ref, lse_ref, *, key, heads, columns, scale, softcap
):
    rows, width = q_ref.shape
    head, batch = pl.program_id(2), pl.program_id(3)
    there = pl.program_id(0) * rows + jnp.arange(rows) < heads
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
        s = tile.logits(q, k, scale=scale, softcap=softcap)
        return state.add(jnp.where(kept[None, :], s, -jnp.inf), v)

    count = index.used[batch, head] * tiles
    first, end = folded.share(0, count, pl.program_id(1), pl.num_programs(1))
    state = jax.lax.fori_loop(first, end, body, tile.Softmax.start(rows, width))
    out, lse = state.finish()
    tile.store_rows(out_ref, out, columns, there)
    plgpu.store(lse_ref, lse, mask=there)
