"""A set of cache rows per KV head, as an index for `sparse_decode`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.mask import WORD, Mask, pack_bits, tree_alone, unpack_bits
from lm.kernels.merge import merge


class SparseIndex(NamedTuple):
    """The rows of a cache that each KV head keeps: sorted blocks of rows, and a bit per row.

    Attributes:
      used: int32 `[B, K]`: number of blocks in use.
      block: int32 `[B, K, J]`: indices of blocks of rows, ascending, padded with the last one.
      bits: int32 `[B, K, J, rows / 32]`: the kept rows of each block.
    """

    used: jax.Array
    block: jax.Array
    bits: jax.Array

    @property
    def rows(self) -> int:
        """Rows per block."""
        return self.bits.shape[-1] * WORD


def from_rows(kept_BKS: jax.Array, rows: int, blocks: int) -> SparseIndex:
    """Returns the index that keeps the given rows of a cache.

    Args:
      kept_BKS: bool, rows to keep; a KV head that keeps none reads nothing.
      rows: rows per block, a multiple of 32.
      blocks: capacity in blocks per KV head (J); excess blocks are dropped, last first.

    Raises:
      ValueError: `rows` is not a multiple of 32.
    """
    if rows < 1 or rows % WORD:
        raise ValueError(f'sparse index: {rows} rows per block; expected a multiple of {WORD}')
    b, k, s = kept_BKS.shape
    kept = jnp.pad(kept_BKS, ((0, 0), (0, 0), (0, -s % rows))).reshape(b, k, -1, rows)
    used = jnp.any(kept, axis=-1)
    n = used.shape[-1]
    blocks = min(blocks, n)
    # used blocks first, each group in its own order
    order = jnp.argsort(~used, axis=-1, stable=True)[..., :blocks].astype(jnp.int32)
    count = jnp.minimum(jnp.sum(used, axis=-1, dtype=jnp.int32), blocks)
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[..., None], axis=-1)
    order = jnp.where(jnp.arange(blocks) < count[..., None], order, last)
    bits = jnp.take_along_axis(pack_bits(kept), order[..., None], axis=2)
    return SparseIndex(count, order, bits)


def kept_rows(index: SparseIndex, rows: int) -> jax.Array:
    """Returns the rows of the cache that an index keeps, bool `[B, K, rows]`."""
    b, k, j = index.block.shape
    live = jnp.arange(j) < index.used[..., None]
    bits = unpack_bits(index.bits, index.rows) & live[..., None]
    n_blocks = -(-rows // index.rows)
    batch, head = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
    kept = jnp.zeros((b, k, n_blocks, index.rows), bool).at[batch, head, index.block].max(bits)
    return kept.reshape(b, k, -1)[..., :rows]


def before(index: SparseIndex, row_B: jax.Array) -> SparseIndex:
    """Returns the index without the rows from `row_B` on, int32 `[B]`."""
    first_BKJ = index.block * index.rows
    first_BKJW = first_BKJ[..., None] + WORD * jnp.arange(index.bits.shape[-1])
    count = jnp.clip(row_B[:, None, None, None] - first_BKJW, 0, WORD)
    low = jnp.where(count == WORD, -1, (1 << jnp.minimum(count, WORD - 1)) - 1)
    return index._replace(bits=index.bits & low)


def with_nodes(
    committed: Callable[[SparseIndex], tuple[jax.Array, jax.Array]],
    nodes: Callable[[Mask], tuple[jax.Array, jax.Array]],
    index: SparseIndex,
    mask: Mask,
) -> tuple[jax.Array, jax.Array]:
    """Returns attention over kept committed rows and the nodes of a draft tree, and its LSE.

    The two sets of rows (`reference.sparse_decode`) are disjoint, so the two results merge exactly
    (`lm.kernels.merge`).

    Args:
      committed: attention over all rows of an index.
      nodes: attention under a mask.
      index, mask: see `reference.sparse_decode`.
    """
    parts = committed(before(index, mask.first_node_B)), nodes(tree_alone(mask))
    out, lse = merge(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    return out.astype(parts[0][0].dtype), lse
