"""How the flash kernels walk over blocks of queries and keys, and limits on their memory."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lm.kernels import blocks
from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.mosaic import logits
from lm.kernels.mosaic.block_mask import Rows
from lm.kernels.mosaic.tile import BOUNDS, LANES, column, lanes, round_up, visited
from lm.kernels.scoring import Terms


class Place(NamedTuple):
    """The place of one step: batch member, query head, KV head, blocks, and its row of bounds."""

    batch: jax.Array
    head: jax.Array
    kv_head: jax.Array
    query: jax.Array
    key: jax.Array
    row: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """How one call is cut into blocks.

    Attributes:
      batch, heads, kv_heads: as in the shapes.
      mask_heads: KV heads that the mask tells apart, all or 1.
      query_blocks, key_blocks: how many.
      ragged: the last block of queries is partial.
      head_size, sizes: of a block.
    """

    batch: int
    heads: int
    kv_heads: int
    mask_heads: int
    query_blocks: int
    key_blocks: int
    ragged: bool
    head_size: int
    sizes: BlockSizes

    def by_query(self, b, h, i, step, bounds_ref) -> Place:
        """The place in a grid (B, H, query blocks, steps over key blocks)."""
        kv_head = jax.lax.div(h, self.heads // self.kv_heads)
        row = self._mask_row(b, kv_head) * self.query_blocks + i
        return Place(b, h, kv_head, i, visited(bounds_ref, row, step), row)

    def by_key(self, b, kv_head, j, member, step, bounds_ref) -> Place:
        """The place in a grid (B, K, key blocks, H / K, steps over query blocks)."""
        h = kv_head * (self.heads // self.kv_heads) + member
        row = self._mask_row(b, kv_head) * self.key_blocks + j
        return Place(b, h, kv_head, visited(bounds_ref, row, step), j, row)

    def _mask_row(self, b, kv_head):
        return b * self.mask_heads + (kv_head if self.mask_heads > 1 else 0)


class Specs(NamedTuple):
    """Blocks of `[B, H, L, C]`, `[B, K, S, C]`, `[B, H, 1, L]`, of the mask's rows and the terms.

    `pl.BlockSpec`s, which take the place of arrays in trees of operands.
    """

    query: Any
    key: Any
    per_query: Any
    rows: Rows
    terms: Terms


def specs(walk: Walk, place: Callable[..., Place], rows: Rows, terms: Terms) -> Specs:
    """The blocks that each step reads and writes; `place` is a method of `walk`."""

    def spec(shape, index):
        # the last of the prefetched scalars is the window, which no index depends on
        return pl.BlockSpec(shape, lambda *args: index(place(*args[:-1])))

    def kv_head(at):
        return at.kv_head if walk.mask_heads > 1 else 0

    def keys_at(*args):
        at = place(*args[:-1])
        return at.batch, at.kv_head, at.key

    query, key, c = walk.sizes.query, walk.sizes.key, walk.head_size
    query_row = spec((None, 1, query), lambda at: (at.batch, 0, at.query))
    key_row = spec((None, 1, key), lambda at: (at.batch, 0, at.key))
    return Specs(
        query=spec((None, None, query, c), lambda at: (at.batch, at.head, at.query, 0)),
        key=spec((None, None, key, c), lambda at: (at.batch, at.kv_head, at.key, 0)),
        per_query=spec((None, None, 1, query), lambda at: (at.batch, at.head, 0, at.query)),
        rows=Rows(
            query_row,
            spec((None, None, 1, key), lambda at: (at.batch, kv_head(at), 0, at.key)),
            None if rows.query_segment is None else query_row,
            None if rows.key_segment is None else key_row,
        ),
        terms=logits.specs(terms, key, keys_at),
    )


def block_sizes(head_size: int, dtype) -> BlockSizes:
    """The default: 4.5 to 12.5 MiB of vector memory, for head sizes up to 256."""
    return BlockSizes(query=512, key=512 if head_size > LANES or dtype == jnp.float32 else 1024)


def plan(q_BLHC, k_BKSC, v_BKSC, mask: Mask, sizes: BlockSizes | None) -> Walk:
    """Checks the shapes of a call and cuts it into blocks no longer than its lengths need.

    Raises:
      ValueError: the sizes are no multiples of 128, the mask has ancestors, or dtypes differ.
    """
    b, l, h, c = q_BLHC.shape
    kv_heads, s = k_BKSC.shape[1:3]
    chex.assert_shape([k_BKSC, v_BKSC], (b, kv_heads, s, c))
    chex.assert_shape(mask.query_position, (b, l))
    chex.assert_is_divisible(h, kv_heads)
    if mask.ancestors is not None:
        raise ValueError('flash: the mask has ancestors; a draft tree needs the tree kernel')
    if not q_BLHC.dtype == k_BKSC.dtype == v_BKSC.dtype:
        raise ValueError(
            f'flash: q is {q_BLHC.dtype}, k {k_BKSC.dtype} and v {v_BKSC.dtype}; expected one dtype'
        )
    sizes = sizes or block_sizes(c, q_BLHC.dtype)
    for field, value in (('query', sizes.query), ('key', sizes.key)):
        if value % LANES:
            raise ValueError(
                f'flash: BlockSizes.{field} is {value}; expected a multiple of {LANES}, the lanes '
                'of a TPU'
            )
    query = min(sizes.query, round_up(l, LANES))
    key = min(sizes.key, round_up(s, LANES))
    return Walk(
        batch=b,
        heads=h,
        kv_heads=kv_heads,
        mask_heads=mask.key_position.shape[1],
        query_blocks=pl.cdiv(l, query),
        key_blocks=pl.cdiv(s, key),
        ragged=l % query != 0,
        head_size=c,
        sizes=dataclasses.replace(sizes, query=query, key=key),
    )


def check(kernel: str, walk: Walk, rows: int, vmem: int) -> None:
    """Raises ValueError where a call needs more scalar or vector memory than there is.

    `rows` blocks of each mask have their bounds in scalar memory, beside the window.
    """
    smem = 4 * (walk.batch * walk.mask_heads * rows * BOUNDS + 1)
    cut = f'blocks of {walk.sizes.query} queries and {walk.sizes.key} keys'
    bounds = f'bounds for {walk.batch} x {walk.mask_heads} (batch, KV heads of the mask) in {cut}'
    advice = 'raise query and key of BlockSizes, or lower the batch of a device'
    blocks.check(kernel, bounds, 'scalar memory', smem, blocks.SMEM, advice)
    advice = f'lower query or key of BlockSizes (at least {LANES})'
    blocks.check(kernel, cut, 'vector memory', vmem, blocks.VMEM, advice)


def held_rows(ref, held_row) -> jax.Array:
    """A block `[n, C]` with zeros in the rows that `held_row`, bool `[1, n]`, leaves out.

    For rows that hold nothing, or lie past the end of the array: 0 * NaN is NaN.
    """
    x = ref[...]
    held = lanes(column(held_row.astype(jnp.int32)), x.shape[1])
    return jnp.where(held == 1, x, jnp.zeros_like(x))
