"""A set of cache rows per KV head, in the form that `sparse_decode` reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.mask import WORD, pack_bits, unpack_bits


class SparseIndex(NamedTuple):
    """Which rows of a cache each KV head keeps: sorted blocks of rows, and a bit per row.

    Attributes:
      used: int32 `[B, K]`: blocks in use.
      block: int32 `[B, K, J]`: which blocks of rows, ascending; the rest repeats the last.
      bits: int32 `[B, K, J, rows / 32]`: which rows of the block are kept.
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
      kept_BKS: bool, which rows to keep; at least one per KV head, or that head reads nothing.
      rows: rows per block, a multiple of 32.
      blocks: room for this many blocks per KV head (J); blocks beyond are dropped, last first.

    Raises:
      ValueError: `rows` is no multiple of 32.
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
    """Returns bool `[B, K, rows]`: which rows of the cache an index keeps."""
    b, k, j = index.block.shape
    live = jnp.arange(j) < index.used[..., None]
    bits = unpack_bits(index.bits, index.rows) & live[..., None]
    n_blocks = -(-rows // index.rows)
    batch, head = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
    kept = jnp.zeros((b, k, n_blocks, index.rows), bool).at[batch, head, index.block].max(bits)
    return kept.reshape(b, k, -1)[..., :rows]
