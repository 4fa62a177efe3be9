"""Attention of many queries for TPU, forward: FlashAttention-2 (Dao 2023), algorithm 1.

One step of the grid attends from a block of queries of one head to a block of keys; the running
maximum, sum and weighted sum stay in vector memory. The steps of a block of queries run over its
live blocks of keys only, and as many as the longest such row needs: a sliding window costs steps
in proportion to the window. Blocks in which every query sees every key skip the mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.mask import blocks as block_flags
from lm.kernels.mosaic import block_mask, flash_grid, logits, tile
from lm.kernels.mosaic.flash_backward import backward
from lm.kernels.mosaic.flash_grid import Walk, block_sizes, held_rows
from lm.kernels.mosaic.tile import LANES, bytes_of, dot, lanes
from lm.kernels.scoring import Scoring

__all__ = ['backward', 'block_sizes', 'forward']

LOWEST = -1e30  # the running maximum before any key: finite, so that exp(-inf - LOWEST) is 0


def forward(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(logits) v over the keys that each query sees, and the LSE of its logits.

    Args:
      q_BLHC: queries, bf16 or f32; head h reads key/value head `h // (H / K)`.
      k_BKSC, v_BKSC: keys and values, in the dtype of `q`. Rows that hold no key may be NaN.
      mask: which keys each query sees, without `ancestors`: trees have a kernel of their own.
      scoring: makes the logits, see `Scoring`.
      sizes: queries and keys per block, multiples of 128; None for `block_sizes`.
      interpret: run on any platform, slowly, with reads out of bounds as NaN.

    Returns:
      `[B, L, H, C]` in the dtype of `q`, zeros where a query sees no key; f32 `[B, L, H]`, the
      log of the sum of exp(logits), -inf there.

    Raises:
      ValueError: the sizes need more memory than a chip has, or do not fit its lanes; the mask
        has ancestors.
    """
    walk = flash_grid.plan(q_BLHC, k_BKSC, v_BKSC, mask, sizes)
    query, key = walk.sizes.query, walk.sizes.key
    flash_grid.check('flash', walk, walk.query_blocks, _vmem(walk, q_BLHC.dtype))
    bounds, steps = block_mask.bounds(block_flags(mask, query, key))
    b, l, h, c = q_BLHC.shape
    rows = block_mask.rows(mask, query, key)
    terms = logits.operands(mask, scoring, key)
    specs = flash_grid.specs(walk, walk.by_query, rows, terms)
    out_BHLC, lse_BH1L = pl.pallas_call(
        functools.partial(_kernel, walk=walk, scoring=scoring.static, causal=mask.causal),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, h, walk.query_blocks, steps),
            in_specs=[specs.query, specs.key, specs.key, specs.rows, specs.terms],
            out_specs=[specs.query, specs.per_query],
            scratch_shapes=[pltpu.VMEM((query, n), jnp.float32) for n in (LANES, LANES, c)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, h, l, c), q_BLHC.dtype),
            jax.ShapeDtypeStruct((b, h, 1, l), jnp.float32),
        ],
        compiler_params=tile.compiler_params('parallel', 'parallel', 'parallel', 'arbitrary'),
        interpret=tile.interpreter(interpret),
        name='flash_forward',
    )(
        bounds, block_mask.scalar(mask.window), jnp.swapaxes(q_BLHC, 1, 2), k_BKSC, v_BKSC, rows,
        terms,
    )  # fmt: skip
    return jnp.swapaxes(out_BHLC, 1, 2), jnp.swapaxes(lse_BH1L[:, :, 0], 1, 2)


def _kernel(
    bounds_ref, window_ref, q_ref, k_ref, v_ref, rows, terms,
    out_ref, lse_ref, highest_ref, total_ref, sum_ref,
    *, walk: Walk, scoring: Scoring, causal: bool,
):  # fmt: skip
    b, h, i, step = (pl.program_id(axis) for axis in range(4))
    row = walk.by_query(b, h, i, step, bounds_ref).row

    @pl.when(step == 0)
    def _():
        highest_ref[...] = jnp.full_like(highest_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def update(masked: bool) -> None:
        s_LS = scoring.capped(dot(q_ref[...], k_ref[...], (1, 1)))
        s_LS = logits.complete(s_LS, terms)
        v_SC = v_ref[...]
        if masked:
            seen_LS = block_mask.visible(rows, window_ref, causal, query_axis=0)
            s_LS = jnp.where(seen_LS, s_LS, -jnp.inf)
            v_SC = held_rows(v_ref, rows.key_position[...] >= 0)
        before = highest_ref[...]
        highest = jnp.maximum(before, jnp.max(s_LS, axis=1, keepdims=True))
        weights_LS = jnp.exp(s_LS - lanes(highest, s_LS.shape[1]))
        shrink = jnp.exp(before - highest)
        highest_ref[...] = highest
        total_ref[...] = shrink * total_ref[...] + jnp.sum(weights_LS, axis=1, keepdims=True)
        added = dot(weights_LS.astype(v_SC.dtype), v_SC, (1, 0))
        sum_ref[...] = lanes(shrink, added.shape[1]) * sum_ref[...] + added

    tile.visit(bounds_ref, row, step, update)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out_ref[...] = (sum_ref[...] / lanes(total, sum_ref.shape[1])).astype(out_ref.dtype)
        lse = jnp.where(some, highest_ref[...] + jnp.log(total), -jnp.inf)
        lse_ref[...] = lse.T[:1]


def _vmem(walk: Walk, dtype) -> int:
    """Bytes of vector memory that the kernel needs; the compiler used 50% to 100% of them."""
    query, key, c = walk.sizes.query, walk.sizes.key, walk.head_size
    f32 = jnp.float32
    moved = 2 * bytes_of((query, c), dtype) + 2 * bytes_of((key, c), dtype)
    moved += 3 * bytes_of((1, query), f32) + 3 * bytes_of((1, key), f32)
    kept = 2 * bytes_of((query, LANES), f32) + bytes_of((query, c), f32)
    # logits and weights; f32 operands of a product are split into bf16 ones besides
    live = (3 if dtype == f32 else 2) * bytes_of((query, key), f32)
    return 2 * moved + kept + live
