"""An approximate search for the greatest logits: a shortlist from fewer dimensions, then exact.

Inner products, not cosines: dividing rows by their norms would change which logit is greatest.
"""

import flax.struct
import jax
import jax.numpy as jnp

from decoding import large_vocabulary
from decoding.large_vocabulary import Table
from lm.model import layers


@flax.struct.dataclass
class Projection:
    """A table's rows in the few directions in which they are longest.

    Attributes:
      basis_DR: orthonormal.
      table: the rows' coordinates, `[V, R]`.
    """

    basis_DR: jax.Array
    table: Table


def project(table: Table, rank: int) -> Projection:
    """Returns the projection that keeps most of the rows' squared length (principal directions).

    Raises:
      ValueError: the rank is not 1 to D.
    """
    d = table.rows_VD.shape[1]
    if not 1 <= rank <= d:
        raise ValueError(f'rank {rank}: expected 1 to {d}, the width of the rows')
    exists = jnp.arange(table.rows_VD.shape[0]) < table.size
    rows_VD = jnp.where(exists[:, None], table.rows_VD, 0)
    products_DD = layers.einsum('vd,ve->de', rows_VD, rows_VD, jnp.float32)
    basis_DR = jnp.linalg.eigh(products_DD)[1][:, -rank:].astype(table.rows_VD.dtype)
    rows_VR = layers.einsum('vd,dr->vr', table.rows_VD, basis_DR)
    chunk = table.chunk * (d // rank)  # about as many bytes at a time
    return Projection(basis_DR, Table(rows_VR, table.size, None, table.never, chunk))


def search(
    table: Table, projection: Projection, h_BD: jax.Array, k: int, shortlist: int
) -> tuple[jax.Array, jax.Array]:
    """Returns k logits f32 `[B, k]` and their tokens int32: the greatest of a shortlist, exact.

    Each logit is exact; a token may be missing, which `recall` measures. A softmax over the result
    is not the model's distribution.

    Raises:
      ValueError: the shortlist is shorter than k, or longer than the vocabulary.
    """
    if shortlist < k:
        raise ValueError(f'shortlist {shortlist}: expected at least k, {k}')
    coarse_BR = layers.einsum('bd,dr->br', h_BD, projection.basis_DR)
    tokens_BS = large_vocabulary.search(projection.table, coarse_BR, shortlist).tokens_BK
    tokens_BS = jnp.sort(tokens_BS, axis=1)  # of equal logits the lower id is first
    rows_BSD = table.rows_VD[tokens_BS]
    logits_BS = layers.einsum('bd,bsd->bs', h_BD, rows_BSD, jnp.float32)
    logits_BK, best = jax.lax.top_k(layers.softcap(logits_BS, table.softcap), k)
    return logits_BK, jnp.take_along_axis(tokens_BS, best, axis=1)


def recall(tokens_BK: jax.Array, exact_BK: jax.Array) -> jax.Array:
    """Returns the share of the exact tokens that were found, f32 `[]`."""
    return jnp.mean(jnp.any(exact_BK[:, :, None] == tokens_BK[:, None], axis=2), dtype=jnp.float32)
