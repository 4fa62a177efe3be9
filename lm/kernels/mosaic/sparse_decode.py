"""Attention of one query per batch row over the cache rows that a `SparseIndex` keeps.

Whole blocks of rows are fetched, for a transfer of single rows would be mostly overhead, and the
rows that are not kept are hidden. Grid (batch, KV head, steps); a step takes several blocks, so
that its transfers are long, each by an index map of its own that reads the list of blocks.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import SMEM, VMEM, BlockSizes, check
from lm.kernels.mask import WORD
from lm.kernels.mosaic import rows, tile
from lm.kernels.mosaic.rows import Softmax
from lm.kernels.mosaic.tile import LANES, bytes_of, round_up
from lm.kernels.sparse import SparseIndex

ROWS = 1024  # cache rows per step
NAME = 'sparse_decode'


def block_sizes(rows_per_block: int) -> BlockSizes:
    """Returns the default sizes for an index: a step's rows, in whole blocks."""
    return BlockSizes(key=max(1, min(8, ROWS // rows_per_block)) * rows_per_block)


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
    """Returns softmax(scale q . k) v over exactly the rows that an index keeps, and its LSE.

    Rows that are not kept may be NaN. Where C is no multiple of 128, 128 rows are fetched at least.

    Args:
      q_BLHC: one query per batch row, L = 1.
      k, v: `[B, K, S, C]`; or with `layer`, caches `[N, B, K, S, C]`, read in place.
      index: which rows each KV head keeps.
      layer: which layer of the caches; an int or an int32 scalar.
      scale, softcap: logits are scale q . k, or cap tanh(scale q . k / cap).
      sizes: cache rows per step, in whole blocks of the index. None: `block_sizes`.
      interpret: run in the TPU interpreter, on any platform.

    Returns:
      `[B, 1, H, C]` in q's dtype, zeros where nothing is kept; f32 `[B, 1, H]`, there -inf.

    Raises:
      ValueError: sizes that fast memory or the tiling does not allow; dtypes that differ.
    """
    chex.assert_axis_dimension(q_BLHC, 1, 1)
    if layer is None:
        k, v, layer = k[None], v[None], 0
    rows.one_dtype(NAME, q=q_BLHC, k=k, v=v)
    (b, _, h, c), kv_heads = q_BLHC.shape, k.shape[2]
    n_rows = round_up(h // kv_heads, tile.sublanes(q_BLHC.dtype))
    index, parts = _in_steps(index, sizes, n_rows, c, k.dtype)
    steps = index.block.shape[2] // parts
    q_BKRC = rows.fold(q_BLHC, kv_heads, n_rows)
    caches = [rows.innermost(k)] * parts, [rows.innermost(v)] * parts

    def call(origin, used, block, bits):
        n = used.size // kv_heads
        longest = jnp.clip(pl.cdiv(jnp.max(used), parts), 1, steps)
        return pl.pallas_call(
            functools.partial(_kernel, scale=scale, softcap=softcap, parts=parts, steps=steps),
            grid_spec=_grid_spec((n, kv_heads, longest), n_rows, c, index.rows, parts, steps),
            out_shape=[
                jax.ShapeDtypeStruct((n, kv_heads, n_rows, c), q_BLHC.dtype),
                jax.ShapeDtypeStruct((n, kv_heads, 1, n_rows), jnp.float32),
            ],
            compiler_params=tile.compiler_params('parallel', 'parallel', 'arbitrary'),
            interpret=tile.interpreter(interpret),
            name=NAME,
        )(origin, used, block, bits, q_BKRC, *caches)

    out_BKRC, lse_BK1R = tile.by_batch(call, layer, *index)
    lse_BLH = rows.unfold(lse_BK1R.swapaxes(2, 3), (b, 1, h, 1))[..., 0]
    return rows.unfold(out_BKRC, q_BLHC.shape), lse_BLH


def _in_steps(
    index: SparseIndex, sizes: BlockSizes | None, n_rows: int, channels: int, dtype
) -> tuple[SparseIndex, int]:
    """Returns the index cut into steps, and how many of its blocks a step takes, once they fit."""
    index = index if rows.fill_lanes(channels) else _widen(index)
    sizes = sizes or block_sizes(index.rows)
    parts = _parts(sizes, index)
    check(
        NAME, f'steps of {parts} blocks of {index.rows} rows', 'vector memory',
        _vector_memory(n_rows, parts * index.rows, channels, dtype), VMEM,
        'lower BlockSizes.key (at least the rows of a block)',
    )  # fmt: skip
    index = _whole_steps(index, parts)
    b, kv_heads, n_blocks = index.block.shape
    check(
        NAME, f'indices of {n_blocks} blocks of {index.rows} rows for {kv_heads} KV heads',
        'scalar memory', 4 * (sum(x.size for x in index) // b + tile.FEW), SMEM,
        'make an index of fewer blocks',
    )  # fmt: skip
    return index, parts


def _parts(sizes: BlockSizes, index: SparseIndex) -> int:
    """Returns how many blocks of the index a step takes."""
    if sizes.key % index.rows:
        raise ValueError(
            f'{NAME}: BlockSizes.key: {sizes.key}; expected a multiple of the {index.rows} rows '
            'of a block of the index'
        )
    return min(sizes.key // index.rows, index.block.shape[2])


def _widen(index: SparseIndex) -> SparseIndex:
    """Returns an index of the same rows in blocks of whole lanes; some may be listed twice."""
    if index.rows % LANES == 0:
        return index
    if LANES % index.rows:
        raise ValueError(f'{NAME}: {index.rows} rows per block; expected 32, 64 or 128 n')
    ratio, n_words = LANES // index.rows, index.rows // WORD
    place_BKJ = jax.lax.rem(index.block, ratio)
    words = [
        jnp.where(place_BKJ == w // n_words, index.bits[..., w % n_words], 0)
        for w in range(LANES // WORD)
    ]
    return SparseIndex(index.used, jax.lax.div(index.block, ratio), jnp.stack(words, axis=-1))


def _whole_steps(index: SparseIndex, parts: int) -> SparseIndex:
    """Returns the index lengthened to whole steps; blocks not in use have no bits."""
    j = index.block.shape[2]
    more = ((0, 0), (0, 0), (0, -j % parts))
    block_BKJ = jnp.pad(index.block, more, mode='edge')
    used_BKJ = jnp.arange(j) < index.used[..., None]
    bits_BKJW = jnp.where(used_BKJ[..., None], index.bits, 0)
    return SparseIndex(index.used, block_BKJ, jnp.pad(bits_BKJW, (*more, (0, 0))))


def _vector_memory(n_rows: int, key: int, channels: int, dtype) -> int:
    """Returns about how many bytes of vector memory a step needs."""
    cached = 6 * rows.cache_bytes(key, channels, dtype)  # K and V: in use, on their way, joined
    folded = 4 * bytes_of((n_rows, channels), dtype)  # queries and results, two of each
    kept = bytes_of((n_rows, channels), jnp.float32) + 2 * bytes_of((n_rows, 1), jnp.float32)
    live = 3 * bytes_of((n_rows, key), jnp.float32)
    blanked = rows.cache_bytes(key, channels, jnp.float32)
    return cached + folded + kept + live + blanked


def _grid_spec(grid, n_rows, channels, rows_per_block, parts, steps):
    kv_heads = grid[1]

    def cache_at(part):
        def at(b, h, step, origin, count, block, bits):
            listed = ((b * kv_heads + h) * steps + step) * parts + part
            return origin[0], origin[1] + b, h, block[listed]

        return rows.cache_spec(rows_per_block, channels, at)

    def queries_at(b, h, step, origin, *_):
        return origin[1] + b, h, 0, 0

    def results_at(b, h, step, *_):
        return b, h, 0, 0

    caches = [cache_at(part) for part in range(parts)]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=grid,
        in_specs=[pl.BlockSpec((None, None, n_rows, channels), queries_at), caches, caches],
        out_specs=[
            pl.BlockSpec((None, None, n_rows, channels), results_at),
            pl.BlockSpec((None, None, 1, n_rows), results_at),
        ],
        scratch_shapes=[Softmax.scratch(n_rows, channels)],
    )


def _kernel(
    origin_ref, count_ref, block_ref, bits_ref, q_ref, k_refs, v_refs, out_ref, lse_ref, softmax,
    *, scale, softcap, parts, steps,
):  # fmt: skip
    head = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    step = pl.program_id(2)
    channels = q_ref.shape[1]
    axis = 0 if rows.fill_lanes(channels) else 1  # along which the keys of a block lie
    n_keys = parts * k_refs[0].shape[axis]
    n_words = n_keys // WORD

    @pl.when(step == 0)
    def _():
        softmax.start()

    @pl.when(step * parts < count_ref[head])
    def _():
        key_1S = jax.lax.broadcasted_iota(jnp.int32, (1, n_keys), 1)
        first = (head * steps + step) * n_words
        word_1S = jnp.zeros((1, n_keys), jnp.int32)
        for w in range(n_words):
            word_1S = jnp.where(key_1S >= w * WORD, bits_ref[first + w], word_1S)
        kept_1S = ((word_1S >> (key_1S & (WORD - 1))) & 1) == 1
        k, v = (jnp.concatenate([ref[...] for ref in refs], axis) for refs in (k_refs, v_refs))
        s_RS = rows.logits(q_ref[...], k, scale, softcap)
        s_RS = jnp.where(kept_1S, s_RS, rows.HIDDEN)
        softmax.add(s_RS, rows.blank(v, kept_1S, channels))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_RC, lse_R1 = softmax.finish()
        out_ref[...] = out_RC.astype(out_ref.dtype)
        lse_ref[...] = rows.flat(lse_R1)
