"""Attention of many queries for TPU, backward: FlashAttention-2 (Dao 2023), algorithm 2.

With P = exp(S - lse) recomputed block by block, and delta = rowsum(dO * O) - d lse:

    dV = P^T dO    dS = P * (dO V^T - delta)    dQ = slope dS K    dK = slope dS^T Q

where slope = scale / temperature, times 1 - tanh(scale q . k / cap)^2 under a cap.

Two kernels. dQ walks over blocks of keys, as the forward pass does. dK and dV walk over blocks of
queries, of all query heads that share a KV head, on transposed blocks [keys, queries], so that LSE
and delta stay rows and need no relayout.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.mask import blocks as block_flags
from lm.kernels.mosaic import block_mask, flash_grid, logits, tile
from lm.kernels.mosaic.flash_grid import Walk, held_rows
from lm.kernels.mosaic.tile import LANES, bytes_of, column, dot, lanes
from lm.kernels.scoring import Scoring, Terms


def backward(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    out_BLHC: jax.Array,
    lse_BLH: jax.Array,
    d_out_BLHC: jax.Array,
    d_lse_BLH: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of `forward` with respect to q, k and v, from its results and theirs.

    Args:
      q_BLHC, k_BKSC, v_BKSC, mask, scoring, sizes, interpret: as given to `forward`.
      out_BLHC, lse_BLH: the results of `forward`.
      d_out_BLHC, d_lse_BLH: their cotangents; those of a query that sees no key count for nothing.

    Returns:
      dq, dk, dv, in the shapes and dtypes of q, k, v; zeros in rows that hold no key.

    Raises:
      ValueError: see `forward`.
    """
    walk = flash_grid.plan(q_BLHC, k_BKSC, v_BKSC, mask, sizes)
    query, key = walk.sizes.query, walk.sizes.key
    rows = max(walk.query_blocks, walk.key_blocks)
    flash_grid.check('flash backward', walk, rows, _vmem(walk, q_BLHC.dtype))
    sees = lse_BLH > -jnp.inf
    delta_BLH = jnp.sum(d_out_BLHC.astype(jnp.float32) * out_BLHC, axis=-1) - d_lse_BLH
    operands = Operands(
        jnp.swapaxes(q_BLHC, 1, 2),
        k_BKSC,
        v_BKSC,
        jnp.swapaxes(d_out_BLHC.astype(q_BLHC.dtype), 1, 2),
        # exp(logits - inf) is 0: padding, and queries that see nothing, have no weight
        _per_query(jnp.where(sees, lse_BLH, jnp.inf), query, jnp.inf),
        _per_query(jnp.where(sees, delta_BLH, 0.0), query, 0.0),
        block_mask.rows(mask, query, key),
        logits.operands(mask, scoring, key),
    )
    flags, window = block_flags(mask, query, key), block_mask.scalar(mask.window)
    static = {'walk': walk, 'scoring': scoring.static, 'causal': mask.causal}
    by_query = block_mask.bounds(flags)
    by_key = block_mask.bounds(block_mask.by_key(flags, walk.ragged))
    dq_BHLC = _queries_call(operands, *by_query, window, walk, static, interpret)
    dk_BKSC, dv_BKSC = _keys_call(operands, *by_key, window, walk, static, interpret)
    return jnp.swapaxes(dq_BHLC, 1, 2), dk_BKSC, dv_BKSC


class Operands(NamedTuple):
    """The operands of both kernels; LSE and delta padded to whole blocks of queries."""

    q_BHLC: jax.Array
    k_BKSC: jax.Array
    v_BKSC: jax.Array
    d_out_BHLC: jax.Array
    lse_BH1L: jax.Array
    delta_BH1L: jax.Array
    rows: block_mask.Rows
    terms: Terms


def _per_query(x_BLH: jax.Array, block: int, value: float) -> jax.Array:
    return block_mask.pad(jnp.swapaxes(x_BLH, 1, 2), 2, block, value)[:, :, None]


def _specs(walk: Walk, place, operands: Operands) -> tuple[flash_grid.Specs, Operands]:
    x = flash_grid.specs(walk, place, operands.rows, operands.terms)
    per_query = x.per_query
    return x, Operands(x.query, x.key, x.key, x.query, per_query, per_query, x.rows, x.terms)


class Block(NamedTuple):
    """One block of the arrays, and which of its keys each query sees; None where all."""

    q_LC: jax.Array
    k_SC: jax.Array
    v_SC: jax.Array
    d_out_LC: jax.Array
    seen: jax.Array | None


def _load(x: Operands, window_ref, causal: bool, masked: bool, ragged: bool, query_axis: int):
    if not masked:
        return Block(x.q_BHLC[...], x.k_BKSC[...], x.v_BKSC[...], x.d_out_BHLC[...], None)
    seen = block_mask.visible(x.rows, window_ref, causal, query_axis)
    key_held = x.rows.key_position[...] >= 0
    k_SC, v_SC = (held_rows(ref, key_held) for ref in (x.k_BKSC, x.v_BKSC))
    if not ragged:
        return Block(x.q_BHLC[...], k_SC, v_SC, x.d_out_BHLC[...], seen)
    query_held = x.lse_BH1L[...] < jnp.inf
    q_LC, d_out_LC = (held_rows(ref, query_held) for ref in (x.q_BHLC, x.d_out_BHLC))
    return Block(q_LC, k_SC, v_SC, d_out_LC, seen)


def _weights(x: Block, terms: Terms, lse, delta, *, query_axis: int, scoring: Scoring):
    """P and dS of one block, as [queries, keys], or transposed where `query_axis` is 1.

    dS is divided by scale * factor (`logits.slope`), which the sums over blocks are multiplied by.
    """

    def products(of_queries, of_keys):
        return dot(of_keys, of_queries, (1, 1)) if query_axis else dot(of_queries, of_keys, (1, 1))

    softcap = scoring.softcap
    s = scoring.scale * products(x.q_LC, x.k_SC)
    if softcap is not None:
        bent = jnp.tanh(s / softcap)
        s = softcap * bent
    s = logits.complete(s, terms, query_axis)
    if x.seen is not None:
        s = jnp.where(x.seen, s, -jnp.inf)
    p = jnp.exp(s - lse)
    ds = p * (products(x.d_out_LC, x.v_SC) - delta)
    return p, ds if softcap is None else ds * (1 - bent * bent)


def _queries_call(operands, bounds, steps, window, walk, static, interpret) -> jax.Array:
    b, h, l, c = operands.q_BHLC.shape
    specs, in_specs = _specs(walk, walk.by_query, operands)
    query = walk.sizes.query
    return pl.pallas_call(
        functools.partial(_queries_kernel, **static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, h, walk.query_blocks, steps),
            in_specs=[in_specs],
            out_specs=specs.query,
            scratch_shapes=[
                pltpu.VMEM((query, LANES), jnp.float32),
                pltpu.VMEM((query, LANES), jnp.float32),
                pltpu.VMEM((query, c), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b, h, l, c), operands.q_BHLC.dtype),
        compiler_params=tile.compiler_params('parallel', 'parallel', 'parallel', 'arbitrary'),
        interpret=tile.interpreter(interpret),
        name='flash_backward_queries',
    )(bounds, window, operands)


def _queries_kernel(
    bounds_ref, window_ref, x: Operands, dq_ref, lse_ref, delta_ref, sum_ref,
    *, walk: Walk, scoring: Scoring, causal: bool,
):  # fmt: skip
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    row = walk.by_query(b, h, i, step, bounds_ref).row

    @pl.when(step == 0)
    def _():
        lse_ref[...] = column(x.lse_BH1L[...])
        delta_ref[...] = column(x.delta_BH1L[...])
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def update(masked: bool) -> None:
        # values read past the last query stay in their own rows, which are never written
        block = _load(x, window_ref, causal, masked, ragged=False, query_axis=0)
        lse, delta = (lanes(ref[...], block.k_SC.shape[0]) for ref in (lse_ref, delta_ref))
        _, ds_LS = _weights(block, x.terms, lse, delta, query_axis=0, scoring=scoring)
        sum_ref[...] += dot(ds_LS.astype(block.k_SC.dtype), block.k_SC, (1, 0))

    tile.visit(bounds_ref, row, step, update)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = (logits.slope(scoring, x.terms) * sum_ref[...]).astype(dq_ref.dtype)


def _keys_call(operands, bounds, steps, window, walk, static, interpret):
    b, kv_heads, s, c = operands.k_BKSC.shape
    specs, in_specs = _specs(walk, walk.by_key, operands)
    gradient = jax.ShapeDtypeStruct((b, kv_heads, s, c), operands.k_BKSC.dtype)
    return pl.pallas_call(
        functools.partial(_keys_kernel, **static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, kv_heads, walk.key_blocks, walk.heads // kv_heads, steps),
            in_specs=[in_specs],
            out_specs=[specs.key, specs.key],
            scratch_shapes=[pltpu.VMEM((walk.sizes.key, c), jnp.float32)] * 2,
        ),
        out_shape=[gradient, gradient],
        compiler_params=tile.compiler_params(
            'parallel', 'parallel', 'parallel', 'arbitrary', 'arbitrary'
        ),
        interpret=tile.interpreter(interpret),
        name='flash_backward_keys',
    )(bounds, window, operands)


def _keys_kernel(
    bounds_ref, window_ref, x: Operands, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref,
    *, walk: Walk, scoring: Scoring, causal: bool,
):  # fmt: skip
    b, kv_head, j, member, step = (pl.program_id(axis) for axis in range(5))
    row = walk.by_key(b, kv_head, j, member, step, bounds_ref).row

    @pl.when((member == 0) & (step == 0))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def update(masked: bool) -> None:
        block = _load(x, window_ref, causal, masked, walk.ragged, query_axis=1)
        lse, delta = x.lse_BH1L[...], x.delta_BH1L[...]
        p_SL, ds_SL = _weights(block, x.terms, lse, delta, query_axis=1, scoring=scoring)
        dv_sum_ref[...] += dot(p_SL.astype(block.d_out_LC.dtype), block.d_out_LC, (1, 0))
        dk_sum_ref[...] += dot(ds_SL.astype(block.q_LC.dtype), block.q_LC, (1, 0))

    tile.visit(bounds_ref, row, step, update)

    last = (member == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)

    @pl.when(last)
    def _():
        dk_ref[...] = (logits.slope(scoring, x.terms) * dk_sum_ref[...]).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _vmem(walk: Walk, dtype) -> int:
    """Bytes of vector memory that either kernel needs; the compiler used 50% to 100% of them."""
    query, key, c = walk.sizes.query, walk.sizes.key, walk.head_size
    f32 = jnp.float32
    moved = 3 * bytes_of((query, c), dtype) + 4 * bytes_of((key, c), dtype)
    moved += 4 * bytes_of((1, query), f32) + 3 * bytes_of((1, key), f32)
    kept = 2 * bytes_of((max(query, key), max(c, LANES)), f32) + bytes_of((query, c), f32)
    live = (6 if dtype == f32 else 4) * bytes_of((query, key), f32)
    return 2 * moved + kept + live
