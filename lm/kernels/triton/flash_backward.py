"""The backward pass of FlashAttention-2 (Dao 2023): one kernel for dq, one for dk and dv."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, blocks
from lm.kernels.scoring import Scoring
from lm.kernels.triton import block_mask, logits, tile


def block_sizes(head: int, dtype: jax.typing.DTypeLike) -> BlockSizes:
    """Returns the default block sizes of `backward` for a head size and a dtype."""
    if jnp.dtype(dtype).itemsize > 2:
        return tile.f32_sizes(head)
    if head <= 128:
        return BlockSizes(query=64, key=64, warps=4, stages=2)
    return BlockSizes(query=32, key=32, warps=4, stages=2)


def shared_memory(sizes: BlockSizes, head: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns about how many bytes of shared memory `backward` takes."""
    still, moving = sorted([sizes.query, sizes.key])
    elements = (still + sizes.stages * moving) * tile.padded(head) + sizes.query * sizes.key
    return 2 * elements * jnp.dtype(dtype).itemsize


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
    """Gradients of `forward`, through both of its results.

    With P = exp(S - lse) recomputed tile by tile, and delta = rowsum(dO * O) - d lse:

        dV = P^T dO    dS = P * (dO V^T - delta)    dQ = slope dS K    dK = slope dS^T Q

    where slope = scale / temperature, times 1 - tanh(scale q . k / cap)^2 under a cap.

    Args:
      q_BLHC, k_BKSC, v_BKSC, mask, scoring, sizes, interpret: as for `forward`.
      out_BLHC, lse_BLH: its results.
      d_out_BLHC, d_lse_BLH: gradients of them.

    Returns:
      dq, dk and dv, in the dtypes of q, k and v; zeros for queries that see no key and for rows
      that hold none.

    Raises:
      ValueError: block sizes that Triton or the shared memory refuses, or dtypes that differ.
    """
    c = q_BLHC.shape[-1]
    sizes = sizes or block_sizes(c, q_BLHC.dtype)
    d_out_BLHC = d_out_BLHC.astype(q_BLHC.dtype)
    tile.check_operands('flash backward', q_BLHC, k_BKSC, v_BKSC)
    tile.check_sizes('flash backward', sizes, shared_memory(sizes, c, q_BLHC.dtype))
    seen = lse_BLH > -jnp.inf
    delta = jnp.sum(d_out_BLHC.astype(jnp.float32) * out_BLHC.astype(jnp.float32), axis=-1)
    # +inf makes every weight of a query that sees nothing 0
    lse = jnp.where(seen, lse_BLH * tile.LOG2E, jnp.inf)
    delta = jnp.where(seen, delta - d_lse_BLH, 0.0)
    rows_BHL = jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)
    some, every = blocks(mask, sizes.query, sizes.key)
    terms = logits.operands(mask, scoring)
    mask = block_mask.operands(mask, k_BKSC.shape[2])
    arguments = (mask, terms, q_BLHC, k_BKSC, v_BKSC, d_out_BLHC, *rows_BHL)
    settings = {'sizes': sizes, 'scoring': scoring.static, 'interpret': interpret}
    dq = _dq(tile.ranges(some, every), *arguments, **settings)
    by_key = tile.ranges(jnp.swapaxes(some, 2, 3), jnp.swapaxes(every, 2, 3))
    return dq, *_dkv(by_key, *arguments, **settings)


def _dq(bounds, mask, terms, q, k, v, d_out, lse, delta, *, sizes, scoring, interpret):
    b, l, h, c = q.shape
    heads, s = k.shape[1:3]
    width, n = tile.padded(c), pl.cdiv(l, sizes.query)

    # Under a causal mask the last queries see the most keys: they go first.
    def rows(i, head, batch):
        return batch, n - 1 - i, head, 0

    def keys(i, head, batch):
        return batch, jax.lax.div(head, h // heads), 0, 0

    q_spec = pl.BlockSpec((None, sizes.query, None, width), rows)
    kv_spec = pl.BlockSpec((None, None, s, width), keys)
    row_spec = pl.BlockSpec((None, None, sizes.query), lambda i, h, b: (b, h, n - 1 - i))
    return pl.pallas_call(
        functools.partial(_dq_kernel, key=sizes.key, group=h // heads, columns=c, scoring=scoring),
        name='flash_dq',
        grid=(n, h, b),
        in_specs=[
            pl.BlockSpec(),
            *tile.whole((mask, terms)),
            q_spec,
            kv_spec,
            kv_spec,
            q_spec,
            row_spec,
            row_spec,
        ],
        out_specs=q_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(bounds, mask, terms, q, k, v, d_out, lse, delta)


def _dq_kernel(
    bounds_ref, mask, terms, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dq_ref,
    *, key, group, columns, scoring
):  # fmt: skip
    rows, width = q_ref.shape
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    head, batch = jax.lax.div(pl.program_id(1), group), pl.program_id(2)
    node = block * rows + jnp.arange(rows)
    there = node < mask.query_position.shape[1]
    q = tile.load_rows(q_ref, (slice(None),), columns, there)
    d_out = tile.load_rows(d_out_ref, (slice(None),), columns, there)
    lse = plgpu.load(lse_ref, mask=there, other=jnp.inf)[:, None]
    delta = plgpu.load(delta_ref, mask=there, other=0.0)[:, None]
    queries = block_mask.load_queries(mask, batch, node)

    def body(block, masked, dq, _):
        start = block * key
        keys = block_mask.load_keys(mask, batch, head, start, key) if masked else None
        held = None if keys is None else keys.held
        k = tile.load_rows(k_ref, (pl.ds(start, key),), columns, held)
        v = tile.load_rows(v_ref, (pl.ds(start, key),), columns, held)
        seen = None if keys is None else block_mask.visible(mask, batch, queries, keys)
        capped = logits.capped(q, k, scoring)
        s = logits.complete(capped, logits.load(terms, batch, head, start, key))
        d_weight = tile.dot(d_out, v, trans_b=True)
        _, ds = _weights(s, capped, d_weight, lse, delta, seen, scoring.softcap)
        return dq + tile.dot(ds.astype(k.dtype), k)

    bounds = tile.load_range(bounds_ref, batch, head, block)
    dq = tile.loop(bounds, body, jnp.zeros((rows, width), jnp.float32))
    tile.store_rows(dq_ref, dq * logits.slope(scoring, terms), columns, there)


def _weights(s, capped, d_weight, lse, delta, seen, softcap):
    """Returns P = exp(S - lse) of a tile, and dS up to the factor `logits.slope`."""
    weight = jnp.exp2((s if seen is None else jnp.where(seen, s, -jnp.inf)) - lse)
    ds = weight * (d_weight - delta)
    if softcap is not None:
        tanh = capped / (softcap * tile.LOG2E)
        ds = ds * (1 - tanh * tanh)
    return weight, ds


def _dkv(bounds, mask, terms, q, k, v, d_out, lse, delta, *, sizes, scoring, interpret):
    b, l, h, c = q.shape
    heads, s = k.shape[1:3]
    width, group = tile.padded(c), h // heads
    # all query heads that share the key/value head
    q_spec = pl.BlockSpec((None, l, group, width), lambda i, head, batch: (batch, 0, head, 0))
    kv_spec = pl.BlockSpec(
        (None, None, sizes.key, width), lambda i, head, batch: (batch, head, i, 0)
    )
    row_spec = pl.BlockSpec((None, group, l), lambda i, head, batch: (batch, head, 0))
    return pl.pallas_call(
        functools.partial(_dkv_kernel, query=sizes.query, columns=c, scoring=scoring),
        name='flash_dkv',
        grid=(pl.cdiv(s, sizes.key), heads, b),
        in_specs=[
            pl.BlockSpec(),
            *tile.whole((mask, terms)),
            q_spec,
            kv_spec,
            kv_spec,
            q_spec,
            row_spec,
            row_spec,
        ],
        out_specs=[kv_spec, kv_spec],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(bounds, mask, terms, q, k, v, d_out, lse, delta)


def _dkv_kernel(
    bounds_ref, mask, terms, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, dk_ref, dv_ref,
    *, query, columns, scoring
):  # fmt: skip
    rows, width = k_ref.shape
    block, head, batch = (pl.program_id(i) for i in range(3))
    keys = block_mask.load_keys(mask, batch, head, block * rows, rows)
    k = tile.load_rows(k_ref, (slice(None),), columns, keys.held)
    v = tile.load_rows(v_ref, (slice(None),), columns, keys.held)
    loaded = logits.load(terms, batch, head, block * rows, rows)
    length, group = q_ref.shape[:2]

    # Tiles have keys as rows: then no product needs a weight or a gradient transposed.
    def body(block, masked, state, member):
        start = block * query
        node = start + jnp.arange(query)
        there = node < length
        at = pl.ds(start, query)
        whole = None if length % query == 0 else there
        q = tile.load_rows(q_ref, (at, member), columns, whole)
        d_out = tile.load_rows(d_out_ref, (at, member), columns, whole)
        lse = plgpu.load(lse_ref.at[member, at], mask=there, other=jnp.inf)[None, :]
        delta = plgpu.load(delta_ref.at[member, at], mask=there, other=0.0)[None, :]
        seen = None
        if masked:
            queries = block_mask.load_queries(mask, batch, node)
            seen = block_mask.visible(mask, batch, queries, keys, query_axis=1)
        capped = logits.capped(k, q, scoring)
        s = logits.complete(capped, loaded, query_axis=1)
        d_weight = tile.dot(v, d_out, trans_b=True)
        weight, ds = _weights(s, capped, d_weight, lse, delta, seen, scoring.softcap)
        dk, dv = state
        dk = dk + tile.dot(ds.astype(q.dtype), q)
        return dk, dv + tile.dot(weight.astype(d_out.dtype), d_out)

    zeros = jnp.zeros((rows, width), jnp.float32)
    bounds = tile.load_range(bounds_ref, batch, head, block)
    dk, dv = tile.loop(bounds, body, (zeros, zeros), group)
    there = block * rows + jnp.arange(rows) < mask.key_position.shape[2]
    tile.store_rows(dk_ref, dk * logits.slope(scoring, terms), columns, there)
    tile.store_rows(dv_ref, dv, columns, there)
