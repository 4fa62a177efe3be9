"""Attention of the new nodes of a draft tree, or of a chain, against a cache.

The prefix is seen by length and positions, the nodes of the tree by packed ancestor bits, a word
per 32 nodes: no [L, S] mask exists. Grid (batch, KV head, steps over blocks of keys): the steps
start at the first live block of their row, and are as many as the longest row needs; a row that
ends before fetches nothing more.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import VMEM, BlockSizes, check
from lm.kernels.mask import Mask, blocks
from lm.kernels.mosaic import block_mask, logits, rows, tile
from lm.kernels.mosaic.rows import Conditions, Keys, Softmax
from lm.kernels.mosaic.tile import LANES, bytes_of, round_up
from lm.kernels.scoring import Scoring, Terms


def block_sizes(n_rows: int, channels: int, dtype) -> BlockSizes:
    """Returns the default sizes for `n_rows` rows: queries times query heads per KV head."""
    return BlockSizes(key=rows.default_keys(n_rows, channels, dtype))


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
    """Returns softmax(logits) v over the keys that each new node sees, and its LSE.

    Online softmax as in FlashAttention-2 (Dao 2023); trees of drafts as in SpecInfer (Miao et
    al. 2024).

    Args:
      q_BLHC: the L new nodes; their own keys are in the cache already.
      k, v: `[B, K, S, C]`; or with `layer`, caches `[N, B, K, S, C]`, read in place.
      mask: with `ancestors`, a tree; without, positions decide, as for a chain.
      layer: which layer of the caches; an int or an int32 scalar.
      scoring: makes the logits, see `Scoring`.
      sizes: keys per block; all L nodes are one block. None: `block_sizes`.
      interpret: run in the TPU interpreter, on any platform.

    Returns:
      `[B, L, H, C]` in q's dtype, zeros where a node sees no key; f32 `[B, L, H]`, there -inf.

    Raises:
      ValueError: sizes that need more fast memory than there is, or that the tiling forbids;
        dtypes that differ.
    """
    return attend('tree', q_BLHC, k, v, mask, scoring, layer, sizes, interpret)


def attend(name, q_BLHC, k, v, mask, scoring, layer, sizes, interpret):
    """`tree`, under the name that error messages and profiles show."""
    if layer is None:
        k, v, layer = k[None], v[None], 0
    rows.one_dtype(name, q=q_BLHC, k=k, v=v)
    b, l, h, c = q_BLHC.shape
    kv_heads, s = k.shape[2:4]
    n_rows = round_up(l * h // kv_heads, tile.sublanes(q_BLHC.dtype))
    sizes = sizes or block_sizes(n_rows, c, k.dtype)
    key = rows.key_block(name, sizes.key, s)
    fields_BIR = rows.fields(mask, h // kv_heads, round_up(n_rows, LANES))
    check(
        name, f'{l} queries of {h // kv_heads} heads of a group beside blocks of {key} keys',
        'vector memory', _vector_memory(n_rows, key, c, k.dtype, fields_BIR.shape[1]), VMEM,
        'lower the number of queries' + (' or BlockSizes.key' if key > LANES else ''),
    )  # fmt: skip
    keys, key_heads = rows.keys(mask), mask.key_position.shape[1]
    bounds, steps = block_mask.bounds(blocks(mask, l, key))
    window, length_B = rows.scalars(mask)
    terms = logits.operands(mask, scoring)
    operands = (
        rows.fold(q_BLHC, kv_heads, n_rows), fields_BIR, keys, terms,
        rows.innermost(k), rows.innermost(v),
    )  # fmt: skip
    kernel = functools.partial(
        _kernel, given=rows.conditions(mask), scoring=scoring.static, key=key, key_heads=key_heads
    )

    def call(origin, length, bounds):
        n = length.shape[0]
        grid = n, kv_heads, steps
        return pl.pallas_call(
            kernel,
            grid_spec=_grid_spec(grid, n_rows, c, key, fields_BIR.shape, keys, terms),
            out_shape=[
                jax.ShapeDtypeStruct((n, kv_heads, n_rows, c), q_BLHC.dtype),
                jax.ShapeDtypeStruct((n, kv_heads, 1, n_rows), jnp.float32),
            ],
            compiler_params=tile.compiler_params('parallel', 'parallel', 'arbitrary'),
            interpret=tile.interpreter(interpret),
            name=name,
        )(origin, window, length, bounds, *operands)

    out_BKRC, lse_BK1R = tile.by_batch(call, layer, length_B, bounds.reshape(b, -1))
    lse_BLH1 = rows.unfold(lse_BK1R.swapaxes(2, 3), (b, l, h, 1))
    return rows.unfold(out_BKRC, q_BLHC.shape), lse_BLH1[..., 0]


def _vector_memory(n_rows: int, key: int, channels: int, dtype, n_fields: int) -> int:
    """Returns about how many bytes of vector memory a step needs, and no fewer."""
    cached = 4 * rows.cache_bytes(key, channels, dtype)  # K and V, the next ones on their way
    folded = 4 * bytes_of((n_rows, channels), dtype)  # queries and results, likewise
    kept = bytes_of((n_rows, channels), jnp.float32) + 3 * bytes_of((n_rows, 1), jnp.float32)
    live = 4 * bytes_of((n_rows, key), jnp.float32)  # logits, words of ancestors, weights
    blanked = rows.cache_bytes(key, channels, jnp.float32)
    return cached + folded + kept + live + blanked + rows.fields_bytes(n_fields, n_rows)


def _grid_spec(grid, n_rows, channels, key, fields_shape, keys: Keys, terms: Terms):
    _, n_fields, field_rows = fields_shape
    key_heads = keys.position.shape[1]

    def block(b, h, step, bounds):
        return tile.visited(bounds, rows.mask_row(b, h, key_heads), step)

    def cache_at(b, h, step, origin, window, length, bounds):
        return origin[0], origin[1] + b, h, block(b, h, step, bounds)

    def position_at(b, h, step, origin, window, length, bounds):
        return origin[1] + b, h if key_heads > 1 else 0, 0, block(b, h, step, bounds)

    def offset_at(b, h, step, origin, window, length, bounds):
        return origin[1] + b, h, block(b, h, step, bounds)

    def segment_at(b, h, step, origin, window, length, bounds):
        return origin[1] + b, 0, block(b, h, step, bounds)

    def queries_at(b, h, step, origin, *_):
        return origin[1] + b, h, 0, 0

    def fields_at(b, h, step, origin, *_):
        return origin[1] + b, 0, 0

    def results_at(b, h, step, *_):
        return b, h, 0, 0

    segment = None if keys.segment is None else pl.BlockSpec((None, 1, key), segment_at)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, None, n_rows, channels), queries_at),
            pl.BlockSpec((None, n_fields, field_rows), fields_at),
            Keys(pl.BlockSpec((None, None, 1, key), position_at), segment),
            logits.specs(terms, key, offset_at),
            rows.cache_spec(key, channels, cache_at),
            rows.cache_spec(key, channels, cache_at),
        ],
        out_specs=[
            pl.BlockSpec((None, None, n_rows, channels), results_at),
            pl.BlockSpec((None, None, 1, n_rows), results_at),
        ],
        scratch_shapes=[
            Softmax.scratch(n_rows, channels),
            pltpu.VMEM((field_rows, n_fields), jnp.int32),
        ],
    )


def _kernel(
    origin_ref, window_ref, length_ref, bounds_ref, q_ref, fields_ref, keys, terms, k_ref,
    v_ref, out_ref, lse_ref, softmax, fields_RI_ref,
    *, given: Conditions, scoring: Scoring, key, key_heads,
):  # fmt: skip
    b, step = pl.program_id(0), pl.program_id(2)
    n_rows, channels = q_ref.shape
    row = rows.mask_row(b, pl.program_id(1), key_heads)
    first, length = tile.visited(bounds_ref, row, step) * key, length_ref[b]

    @pl.when(step == 0)
    def _():
        softmax.start()
        fields_RI_ref[...] = rows.upright(fields_ref[...])

    def update(masked: bool) -> None:
        s_RS = scoring.capped(rows.products(q_ref[...], k_ref[...]))
        s_RS = logits.complete(s_RS, terms)
        values = v_ref[...]
        if masked:
            keys_1S = jax.tree.map(lambda ref: ref[...], keys)
            fields_RI = fields_RI_ref[:n_rows]
            seen_RS = rows.seen(given, fields_RI, keys_1S, first, length, window_ref[0])
            s_RS = jnp.where(seen_RS, s_RS, rows.HIDDEN)
            values = rows.blank(values, rows.holds(keys_1S.position, first, length), channels)
        softmax.add(s_RS, values)

    tile.visit(bounds_ref, row, step, update)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_RC, lse_R1 = softmax.finish()
        out_ref[...] = out_RC.astype(out_ref.dtype)
        lse_ref[...] = rows.flat(lse_R1)
