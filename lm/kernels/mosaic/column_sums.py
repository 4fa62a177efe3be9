"""How much attention each cached key received, per KV head.

A weight exp(logit - LSE) is only known once all keys of its query have been read, so this is a
pass of its own over q and K, after the attention. Grid (batch, KV head, blocks of keys, blocks
of queries): a block of sums stays in vector memory while the queries that see its keys go by.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import SMEM, VMEM, BlockSizes, check
from lm.kernels.mask import Mask, blocks, span
from lm.kernels.mosaic import block_mask, logits, rows, tile
from lm.kernels.mosaic.rows import Conditions, Keys
from lm.kernels.mosaic.tile import BOUNDS, LANES, bytes_of, round_up
from lm.kernels.scoring import Scoring, Terms

ROWS = 512  # per block of queries: enough to fill the matrix unit
NAME = 'column_sums'


def block_sizes(queries: int, group: int, channels: int, dtype) -> BlockSizes:
    """Returns the default sizes for that many queries of `group` query heads per KV head."""
    whole = LANES // math.gcd(group, LANES)  # queries whose rows fill the lanes
    query = max(1, ROWS // (group * whole)) * whole
    return BlockSizes(query, rows.default_keys(min(query, queries) * group, channels, dtype))


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
    """Returns f32 `[B, K, S]`: sum exp(logits - lse) over queries and the heads of a group.

    H2O (Zhang et al. 2023) keeps the keys with the greatest such sums over all steps.

    Args:
      k: `[B, K, S, C]`; or with `layer`, caches `[N, B, K, S, C]`, read in place.
      q_BLHC, lse_BLH: queries, and f32 of the same attention; a query with -inf counts for nothing.
      mask: see `Mask`.
      row_mask_BL: bool, which queries count: rejected drafts do not.
      layer: which layer of the caches; an int or an int32 scalar.
      scoring: makes the logits, see `Scoring`.
      sizes: queries and keys per block. None: `block_sizes`.
      interpret: run in the TPU interpreter, on any platform.

    Raises:
      ValueError: sizes that fast memory or the tiling does not allow; dtypes that differ.
    """
    if layer is None:
        k, layer = k[None], 0
    rows.one_dtype(NAME, q=q_BLHC, k=k)
    b, l, _, c = q_BLHC.shape
    kv_heads, s = k.shape[2:4]
    query, n_rows, lanes, key = _blocks(sizes, q_BLHC, k, mask)
    key_heads, key_blocks = mask.key_position.shape[1], pl.cdiv(s, key)
    live = blocks(mask, query, key)
    bounds, steps = block_mask.bounds(block_mask.by_key(live, ragged=False))
    used = span(jnp.any(live.some, axis=2))
    window, length_B = rows.scalars(mask)
    folded = _fold(q_BLHC, lse_BLH, mask, row_mask_BL, kv_heads, pl.cdiv(l, query), n_rows, lanes)
    kernel = functools.partial(
        _kernel, given=rows.conditions(mask), scoring=scoring.static, key=key,
        key_blocks=key_blocks, key_heads=key_heads,
    )  # fmt: skip
    keys, terms = rows.keys(mask), logits.operands(mask, scoring)

    def call(origin, length, bounds, used):
        grid, block = (length.shape[0], kv_heads, key_blocks, steps), (n_rows, lanes, key, c)
        return pl.pallas_call(
            kernel,
            grid_spec=_grid_spec(grid, block, folded[1].shape[1], keys, terms),
            out_shape=jax.ShapeDtypeStruct((grid[0], kv_heads, 1, s), jnp.float32),
            compiler_params=tile.compiler_params('parallel', 'parallel', 'parallel', 'arbitrary'),
            interpret=tile.interpreter(interpret),
            name=NAME,
        )(origin, window, length, bounds, used, *folded, keys, terms, rows.innermost(k))

    return tile.by_batch(call, layer, length_B, bounds.reshape(b, -1), used)[:, :, 0]


def _fold(q_BLHC, lse_BLH, mask: Mask, row_mask_BL, kv_heads, query_blocks, n_rows, lanes):
    """Returns queries `[B, K, R, C]`, fields int32 `[B, I, R]` and LSE f32 `[B, K, 1, R]` of rows.

    Rows that do not count have queries of zeros, and an LSE of inf: exp(logit - inf) is 0.
    """
    counted_BLH1 = (row_mask_BL[..., None] & (lse_BLH > -jnp.inf))[..., None]
    lse_BLH1 = jnp.where(counted_BLH1, lse_BLH[..., None], jnp.inf)
    lse_BKR1 = rows.fold(lse_BLH1, kv_heads, query_blocks * lanes, jnp.inf)
    q_BKRC = rows.fold(jnp.where(counted_BLH1, q_BLHC, 0), kv_heads, query_blocks * n_rows)
    fields_BIR = rows.fields(mask, q_BLHC.shape[2] // kv_heads, query_blocks * lanes)
    return q_BKRC, fields_BIR, lse_BKR1.swapaxes(2, 3)


def _blocks(sizes: BlockSizes | None, q_BLHC, k, mask: Mask) -> tuple[int, int, int, int]:
    """Returns queries per block, their rows, these in whole lanes, and keys, once they fit."""
    _, l, h, c = q_BLHC.shape
    kv_heads, s = k.shape[2:4]
    sizes = sizes or block_sizes(l, h // kv_heads, c, k.dtype)
    key = rows.key_block(NAME, sizes.key, s)
    query, n_rows, lanes = _query_block(sizes.query, l, h // kv_heads, q_BLHC.dtype)
    n_fields = jax.eval_shape(functools.partial(rows.fields, group=1, rows=l), mask).shape[1]
    check(
        NAME, f'blocks of {query} queries of {h // kv_heads} heads of a group and of {key} keys',
        'vector memory', _vector_memory(n_rows, key, c, k.dtype, n_fields), VMEM,
        f'lower query or key of BlockSizes (key at least {LANES})',
    )  # fmt: skip
    key_heads, key_blocks = mask.key_position.shape[1], pl.cdiv(s, key)
    n_scalars = key_heads * (BOUNDS * key_blocks + 2) + 1 + tile.FEW
    check(
        NAME, f'{key_blocks} blocks of {key} keys for {key_heads} KV heads', 'scalar memory',
        4 * n_scalars, SMEM, 'raise BlockSizes.key',
    )  # fmt: skip
    return query, n_rows, lanes, key


def _query_block(query: int, queries: int, group: int, dtype) -> tuple[int, int, int]:
    """Returns queries per block, their rows, and these padded to whole lanes."""
    if query >= queries:
        n_rows = round_up(queries * group, tile.sublanes(dtype))
        return queries, n_rows, round_up(n_rows, LANES)
    n_rows = query * group
    if n_rows % LANES:
        raise ValueError(
            f'{NAME}: BlockSizes.query: {query}, {n_rows} rows with the {group} query heads of a '
            f'KV head; expected a multiple of {LANES} rows'
        )
    return query, n_rows, n_rows


def _vector_memory(n_rows: int, key: int, channels: int, dtype, n_fields: int) -> int:
    """Returns about how many bytes of vector memory a step needs, and no fewer."""
    fetched = 2 * rows.cache_bytes(key, channels, dtype)  # one block in use, one on its way
    folded = 2 * bytes_of((n_rows, channels), dtype)
    columns = 3 * bytes_of((n_rows, 1), jnp.float32)
    live = 4 * bytes_of((n_rows, key), jnp.float32)  # logits, words of ancestors, weights
    return fetched + folded + columns + live + rows.fields_bytes(n_fields, n_rows)


def _grid_spec(grid, block, n_fields, keys: Keys, terms: Terms):
    n_rows, lanes, key, channels = block
    key_blocks = grid[2]
    key_heads = keys.position.shape[1]

    def query_block(b, h, j, step, bounds):
        row = rows.mask_row(b, h, key_heads) * key_blocks + j
        return tile.visited(bounds, row, step)

    def key_block(b, h, j, used):
        # blocks that nobody sees repeat one that is seen, and so are not fetched
        at = 2 * rows.mask_row(b, h, key_heads)
        return jnp.clip(j, used[at], jnp.maximum(used[at + 1] - 1, 0))

    def query_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, h, query_block(b, h, j, step, bounds), 0

    def fields_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, 0, query_block(b, h, j, step, bounds)

    def lse_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, h, 0, query_block(b, h, j, step, bounds)

    def position_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, h if key_heads > 1 else 0, 0, key_block(b, h, j, used)

    def offset_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, h, key_block(b, h, j, used)

    def segment_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[1] + b, 0, key_block(b, h, j, used)

    def cache_at(b, h, j, step, origin, window, length, bounds, used):
        return origin[0], origin[1] + b, h, key_block(b, h, j, used)

    segment = None if keys.segment is None else pl.BlockSpec((None, 1, key), segment_at)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=grid,
        in_specs=[
            pl.BlockSpec((None, None, n_rows, channels), query_at),
            pl.BlockSpec((None, n_fields, lanes), fields_at),
            pl.BlockSpec((None, None, 1, lanes), lse_at),
            Keys(pl.BlockSpec((None, None, 1, key), position_at), segment),
            logits.specs(terms, key, offset_at),
            rows.cache_spec(key, channels, cache_at),
        ],
        out_specs=pl.BlockSpec((None, None, 1, key), lambda b, h, j, *_: (b, h, 0, j)),
    )


def _kernel(
    origin_ref, window_ref, length_ref, bounds_ref, used_ref, q_ref, fields_ref, lse_ref, keys,
    terms, k_ref, sums_ref,
    *, given: Conditions, scoring: Scoring, key, key_blocks, key_heads,
):  # fmt: skip
    b, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    row = rows.mask_row(b, pl.program_id(1), key_heads) * key_blocks + block
    n_rows = q_ref.shape[0]

    @pl.when(step == 0)
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def update(masked: bool) -> None:
        lse_R1 = rows.upright(lse_ref[...])[:n_rows]
        s_RS = scoring.capped(rows.products(q_ref[...], k_ref[...]))
        weights_RS = jnp.exp(logits.complete(s_RS, terms) - lse_R1)
        if masked:
            keys_1S = jax.tree.map(lambda ref: ref[...], keys)
            fields_RI = rows.upright(fields_ref[...])[:n_rows]
            first, length, window = block * key, length_ref[b], window_ref[0]
            seen_RS = rows.seen(given, fields_RI, keys_1S, first, length, window)
            weights_RS = jnp.where(seen_RS, weights_RS, 0.0)
        sums_ref[...] += jnp.sum(weights_RS, axis=0, keepdims=True)

    tile.visit(bounds_ref, row, step, update)
