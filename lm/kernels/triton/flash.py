"""FlashAttention-2 (Dao 2023) for training and prefill: the forward pass; `backward` beside it."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask, blocks
from lm.kernels.scoring import Scoring
from lm.kernels.triton import block_mask, logits, tile
from lm.kernels.triton.flash_backward import backward

__all__ = ['backward', 'block_sizes', 'forward', 'shared_memory']


def block_sizes(head: int, dtype: jax.typing.DTypeLike) -> BlockSizes:
    """Returns the default block sizes of `forward` for a head size and a dtype."""
    if jnp.dtype(dtype).itemsize > 2:
        return tile.f32_sizes(head)
    if head <= 128:
        return BlockSizes(query=128, key=64, warps=8, stages=2)
    return BlockSizes(query=64, key=32, warps=4, stages=2)


def shared_memory(sizes: BlockSizes, head: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns about how many bytes of shared memory `forward` takes."""
    row = tile.padded(head) * jnp.dtype(dtype).itemsize
    return (sizes.query + 2 * sizes.stages * sizes.key) * row


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
    """Attention as in `reference.attention`, block by block of keys.

    Args:
      q_BLHC, k_BKSC, v_BKSC: of one dtype; query head h reads key/value head `h // (H / K)`.
      mask: which keys each query sees; dead blocks are not visited.
      scoring: makes the logits, see `Scoring`.
      sizes: `query` and `key` per block; see `block_sizes`.
      interpret: runs the kernel on the CPU.

    Returns:
      `[B, L, H, C]` in the dtype of `q_BLHC`, zeros where a query sees no key; LSE, f32
      `[B, L, H]`, there -inf.

    Raises:
      ValueError: block sizes that Triton or the shared memory refuses, or dtypes that differ.
    """
    b, l, h, c = q_BLHC.shape
    heads, s = k_BKSC.shape[1:3]
    sizes = sizes or block_sizes(c, q_BLHC.dtype)
    tile.check_operands('flash', q_BLHC, k_BKSC, v_BKSC)
    tile.check_sizes('flash', sizes, shared_memory(sizes, c, q_BLHC.dtype))
    bounds = tile.ranges(*blocks(mask, sizes.query, sizes.key))
    terms = logits.operands(mask, scoring)
    mask = block_mask.operands(mask, s)
    width, n = tile.padded(c), pl.cdiv(l, sizes.query)

    # Under a causal mask the last queries see the most keys: they go first.
    def rows(i, head, batch):
        return batch, n - 1 - i, head, 0

    def keys(i, head, batch):
        return batch, jax.lax.div(head, h // heads), 0, 0

    q_spec = pl.BlockSpec((None, sizes.query, None, width), rows)
    kv_spec = pl.BlockSpec((None, None, s, width), keys)
    return pl.pallas_call(
        functools.partial(
            _kernel, key=sizes.key, group=h // heads, columns=c, scoring=scoring.static
        ),
        name='flash_forward',
        grid=(n, h, b),
        in_specs=[pl.BlockSpec(), *tile.whole((mask, terms)), q_spec, kv_spec, kv_spec],
        out_specs=[q_spec, pl.BlockSpec((None, sizes.query, None), lambda *i: rows(*i)[:3])],
        out_shape=[
            jax.ShapeDtypeStruct(q_BLHC.shape, q_BLHC.dtype),
            jax.ShapeDtypeStruct((b, l, h), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=sizes.warps, num_stages=sizes.stages),
        interpret=interpret,
    )(bounds, mask, terms, q_BLHC, k_BKSC, v_BKSC)


def _kernel(
    bounds_ref, mask, terms, q_ref, k_ref, v_ref, out_ref, lse_ref, *, key, group, columns, scoring
):
    rows, width = q_ref.shape
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    head, batch = jax.lax.div(pl.program_id(1), group), pl.program_id(2)
    node = block * rows + jnp.arange(rows)
    there = node < mask.query_position.shape[1]
    q = tile.load_rows(q_ref, (slice(None),), columns, there)
    queries = block_mask.load_queries(mask, batch, node)

    def body(block, masked, state, _):
        start = block * key
        keys = block_mask.load_keys(mask, batch, head, start, key) if masked else None
        held = None if keys is None else keys.held
        k = tile.load_rows(k_ref, (pl.ds(start, key),), columns, held)
        v = tile.load_rows(v_ref, (pl.ds(start, key),), columns, held)
        s = logits.capped(q, k, scoring)
        s = logits.complete(s, logits.load(terms, batch, head, start, key))
        if keys is not None:
            s = jnp.where(block_mask.visible(mask, batch, queries, keys), s, -jnp.inf)
        return state.add(s, v)

    bounds = tile.load_range(bounds_ref, batch, head, block)
    state = tile.loop(bounds, body, tile.Softmax.start(rows, width))
    out, lse = state.finish()
    tile.store_rows(out_ref, out, columns, there)
    plgpu.store(lse_ref, lse, mask=there)
