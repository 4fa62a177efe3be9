"""Approximate top-k logits: a shortlist by a low-rank projection, then exact logits.

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
    """A table's rows in their leading principal directions.

    Attributes:
      basis_DE: orthonormal.
      table: the rows' coordinates, `[V, E]`.
    """

    basis_DE: jax.Array
    table: Table


def project(table: Table, rank: int) -> Projection:
    """Returns the projection that keeps the most of the rows' squared length (uncentred PCA).

    Raises:
      ValueError: the rank is not 1 to D.
    """
    d = table.rows_VD.shape[1]
    if not 1 <= rank <= d:
        raise ValueError(f'rank {rank}: expected 1 to {d}, the width of the rows')
    exists = jnp.arange(table.rows_VD.shape[0]) < table.size
    rows_VD = jnp.where(exists[:, None], table.rows_VD, 0)
    products_DD = layers.einsum('vd,ve->de', rows_VD, rows_VD, jnp.float32)
    basis_DE = jnp.linalg.eigh(products_DD)[1][:, -rank:].astype(table.rows_VD.dtype)
    rows_VE = layers.einsum('vd,dr->vr', table.rows_VD, basis_DE)
    chunk = table.chunk * (d // rank)  # about as many bytes at a time
    return Projection(basis_DE, Table(rows_VE, table.size, None, table.never, chunk))


def search(
    table: Table, projection: Projection, h_BD: jax.Array, k: int, shortlist: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the k greatest logits of a shortlist, f32 `[B, k]`, and their tokens, int32.

    The logits are exact; tokens may be missing (see `recall`). A softmax over the result is not the
    model's distribution.

    Raises:
      ValueError: the shortlist is shorter than k, or longer than the vocabulary.
    """
    if shortlist < k:
        raise ValueError(f'shortlist {shortlist}: expected at least k, {k}')
    coarse_BE = layers.einsum('bd,dr->br', h_BD, projection.basis_DE)
    tokens_BM = large_vocabulary.search(projection.table, coarse_BE, shortlist).tokens_BA
    tokens_BM = jnp.sort(tokens_BM, axis=1)  # ties put the lower id first
    rows_BMD = table.rows_VD[tokens_BM]
    logits_BM = layers.einsum('bd,bsd->bs', h_BD, rows_BMD, jnp.float32)
    logits_BA, best = jax.lax.top_k(layers.softcap(logits_BM, table.softcap), k)
    return logits_BA, jnp.take_along_axis(tokens_BM, best, axis=1)


def recall(tokens_BA: jax.Array, exact_BA: jax.Array) -> jax.Array:
    """Returns the fraction of the exact top-k tokens that were found, f32 `[]`."""
    return jnp.mean(jnp.any(exact_BA[:, :, None] == tokens_BA[:, None], axis=2), dtype=jnp.float32)
