"""Attention over the cache rows that a `SparseIndex` keeps, and over the nodes of a draft tree.

The nodes lie side by side at the end of the cache: `tree` attends to them. Of the kept rows, whole
blocks are fetched, since a transfer of single rows would be mostly overhead, and rows that are not
kept are hidden. Grid (batch, KV head, steps); a step takes several blocks, so that its transfers
are long, each by an index map of its own that reads the list of blocks.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels import scoring as scoring_lib
from lm.kernels.blocks import SMEM, VMEM, BlockSizes, check
from lm.kernels.mask import WORD, Mask
from lm.kernels.mosaic import block_mask, logits, rows, tile, tree
from lm.kernels.mosaic.rows import Softmax
from lm.kernels.mosaic.tile import LANES, bytes_of, round_up
from lm.kernels.scoring import Scoring, Terms
from lm.kernels.sparse import SparseIndex, with_nodes

ROWS = 1024  # cache rows per step
NAME = 'sparse_decode'


def block_sizes(rows_per_block: int, n_rows: int = 1) -> BlockSizes:
    """Returns the default sizes for an index and `n_rows` rows of queries: whole blocks of it."""
    keys = min(ROWS, rows.LOGIT_BYTES // bytes_of((n_rows, 1), jnp.float32) * LANES)
    return BlockSizes(key=max(1, min(8, keys // rows_per_block)) * rows_per_block)


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
    """Returns softmax(logits) v over kept rows and nodes (`reference.sparse_decode`), and its LSE.

    Rows that are not seen may be NaN. Where C is no multiple of 128, 128 rows are fetched at least.

    Args:
      q_BLHC: the L new nodes; without a mask one query per batch row.
      k, v: `[B, K, S, C]`; or with `layer`, caches `[N, B, K, S, C]`, read in place.
      index: which rows each KV head keeps.
      layer: which layer of the caches; an int or an int32 scalar.
      scoring: makes the logits, see `Scoring`.
      mask: which nodes of a draft tree, or of a chain, each query sees.
      sizes: cache rows per step, in whole blocks of the index. None: `block_sizes`.
      interpret: run in the TPU interpreter, on any platform.

    Returns:
      `[B, L, H, C]` in q's dtype, zeros where nothing is seen; f32 `[B, L, H]`, there -inf.

    Raises:
      ValueError: sizes that fast memory or the tiling does not allow; dtypes that differ.
    """
    if layer is None:
        k, v, layer = k[None], v[None], 0
    rows.one_dtype(NAME, q=q_BLHC, k=k, v=v)
    terms = scoring_lib.terms(mask, scoring)

    def committed(index: SparseIndex):
        return _committed(q_BLHC, k, v, index, scoring.static, terms, layer, sizes, interpret)

    if mask is None:
        chex.assert_axis_dimension(q_BLHC, 1, 1)
        return committed(index)
    run = functools.partial(tree.tree, layer=layer, interpret=interpret)
    run = functools.partial(run, sizes=_node_sizes(q_BLHC, k, mask))
    return with_nodes(committed, lambda nodes: run(q_BLHC, k, v, nodes, scoring), index, mask)


def _node_sizes(q_BLHC, k, mask: Mask) -> BlockSizes:
    """Returns sizes for `tree` whose blocks are hardly larger than the nodes."""
    _, l, h, c = q_BLHC.shape
    n_rows = round_up(l * h // k.shape[2], tile.sublanes(q_BLHC.dtype))
    sizes = tree.block_sizes(n_rows, c, k.dtype)
    return BlockSizes(key=min(sizes.key, round_up(max(mask.tree_nodes, 1), LANES)))


def _committed(q_BLHC, k, v, index: SparseIndex, scoring, terms: Terms, layer, sizes, interpret):
    """Returns attention of all queries over all kept rows, and its LSE."""
    (b, l, h, c), kv_heads = q_BLHC.shape, k.shape[2]
    n_rows = round_up(l * h // kv_heads, tile.sublanes(q_BLHC.dtype))
    index, parts = _in_steps(index, sizes, n_rows, c, k.dtype)
    steps = index.block.shape[2] // parts
    q_BKRC, terms = rows.fold(q_BLHC, kv_heads, n_rows), _listed(terms, index, steps)
    caches = [rows.innermost(k)] * parts, [rows.innermost(v)] * parts

    def call(origin, used, block, bits):
        n = used.size // kv_heads
        longest = jnp.clip(pl.cdiv(jnp.max(used), parts), 1, steps)
        return pl.pallas_call(
            functools.partial(_kernel, scoring=scoring, parts=parts, steps=steps),
            grid_spec=_grid_spec(
                (n, kv_heads, longest), n_rows, c, index.rows, parts, steps, terms
            ),
            out_shape=[
                jax.ShapeDtypeStruct((n, kv_heads, n_rows, c), q_BLHC.dtype),
                jax.ShapeDtypeStruct((n, kv_heads, 1, n_rows), jnp.float32),
            ],
            compiler_params=tile.compiler_params('parallel', 'parallel', 'arbitrary'),
            interpret=tile.interpreter(interpret),
            name=NAME,
        )(origin, used, block, bits, q_BKRC, terms, *caches)

    out_BKRC, lse_BK1R = tile.by_batch(call, layer, *index)
    lse_BLH = rows.unfold(lse_BK1R.swapaxes(2, 3), (b, l, h, 1))[..., 0]
    return rows.unfold(out_BKRC, q_BLHC.shape), lse_BLH


def _in_steps(
    index: SparseIndex, sizes: BlockSizes | None, n_rows: int, channels: int, dtype
) -> tuple[SparseIndex, int]:
    """Returns the index cut into steps, and how many of its blocks a step takes, once they fit."""
    index = index if rows.fill_lanes(channels) else _widen(index)
    sizes = sizes or block_sizes(index.rows, n_rows)
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


def _listed(terms: Terms, index: SparseIndex, steps: int) -> Terms:
    """Returns the terms with the offsets of each step's rows side by side, `[B, K, steps, 1, S]`.

    Blocks of the index may be narrower than a vector register, and the offsets of all listed rows
    are few beside their keys and values.
    """
    if terms.offset is None:
        return terms
    b, kv_heads, _ = index.block.shape
    heads = terms.offset.shape[1]
    offset = block_mask.pad(terms.offset, 2, index.rows, 0.0).reshape(b, heads, -1, index.rows)
    offset = jnp.broadcast_to(offset, (b, kv_heads, *offset.shape[2:]))
    offset = jnp.take_along_axis(offset, index.block[..., None], axis=2)
    return terms._replace(offset=offset.reshape(b, kv_heads, steps, 1, -1))


def _vector_memory(n_rows: int, key: int, channels: int, dtype) -> int:
    """Returns about how many bytes of vector memory a step needs."""
    cached = 6 * rows.cache_bytes(key, channels, dtype)  # K and V: in use, on their way, joined
    folded = 4 * bytes_of((n_rows, channels), dtype)  # queries and results, two of each
    kept = bytes_of((n_rows, channels), jnp.float32) + 2 * bytes_of((n_rows, 1), jnp.float32)
    live = 3 * bytes_of((n_rows, key), jnp.float32)
    blanked = rows.cache_bytes(key, channels, jnp.float32)
    return cached + folded + kept + live + blanked


def _grid_spec(grid, n_rows, channels, rows_per_block, parts, steps, terms: Terms):
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

    def offset_at(b, h, step, origin, *_):
        return origin[1] + b, h, step, 0, 0

    factor = None if terms.factor is None else pl.BlockSpec(memory_space=pltpu.SMEM)
    offset = None
    if terms.offset is not None:
        offset = pl.BlockSpec((None, None, None, 1, parts * rows_per_block), offset_at)
    caches = [cache_at(part) for part in range(parts)]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, None, n_rows, channels), queries_at),
            Terms(factor, offset),
            caches,
            caches,
        ],
        out_specs=[
            pl.BlockSpec((None, None, n_rows, channels), results_at),
            pl.BlockSpec((None, None, 1, n_rows), results_at),
        ],
        scratch_shapes=[Softmax.scratch(n_rows, channels)],
    )


def _kernel(
    origin_ref, count_ref, block_ref, bits_ref, q_ref, terms, k_refs, v_refs, out_ref, lse_ref,
    softmax,
    *, scoring: Scoring, parts, steps,
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
        s_RS = scoring.capped(rows.products(q_ref[...], k))
        s_RS = logits.complete(s_RS, terms)
        s_RS = jnp.where(kept_1S, s_RS, rows.HIDDEN)
        softmax.add(s_RS, rows.blank(v, kept_1S, channels))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_RC, lse_R1 = softmax.finish()
        out_ref[...] = out_RC.astype(out_ref.dtype)
        lse_ref[...] = rows.flat(lse_R1)
