"""The kernels' functions in plain XLA: the default on CPU, and the fallback everywhere.

Like `reference`, these materialise the logits of every query and key; unlike it, they multiply in
the dtype of their operands. With `layer`, `k` and `v` are stacked caches `[N, B, K, S, C]`.
"""

import jax
import jax.numpy as jnp

from lm.kernels.mask import Mask, key_rows, tree_rows, visible
from lm.kernels.scoring import Scoring, complete, terms
from lm.kernels.sparse import SparseIndex, kept_rows

NOTHING = -1e30  # instead of -inf: a query that sees no key must not become NaN


def attention(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    layer: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.attention`; the result has the dtype of `q`, the LSE is f32."""
    k, v = _layer(k, layer), _layer(v, layer)
    if mask.length is not None:
        held_BKS = key_rows(mask)
        k, v = _silenced(k, held_BKS), _silenced(v, held_BKS)
    return _attend(q_BLHC, k, v, visible(mask), scoring, mask)


def sparse_decode(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: SparseIndex,
    scoring: Scoring,
    mask: Mask | None = None,
    *,
    layer: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.sparse_decode`."""
    k, v = _layer(k, layer), _layer(v, layer)
    read_BKS = kept_rows(index, k.shape[2])
    seen_BKLS = read_BKS[:, :, None]
    if mask is not None:
        nodes_B1S = tree_rows(mask)
        seen_BKLS = jnp.where(nodes_B1S[:, :, None], visible(mask), seen_BKLS)
        read_BKS = jnp.where(nodes_B1S, key_rows(mask), read_BKS)
    k, v = _silenced(k, read_BKS), _silenced(v, read_BKS)
    return _attend(q_BLHC, k, v, seen_BKLS, scoring, mask)


def column_sums(
    q_BLHC: jax.Array,
    k: jax.Array,
    lse_BLH: jax.Array,
    mask: Mask,
    row_mask_BL: jax.Array,
    scoring: Scoring,
    *,
    layer: jax.Array | int | None = None,
) -> jax.Array:
    """See `reference.column_sums`."""
    k_BKSC = _layer(k, layer)
    b, l, h = lse_BLH.shape
    n_kv = k_BKSC.shape[1]
    logits = _logits(q_BLHC, k_BKSC, scoring, mask)
    lse = jnp.transpose(lse_BLH.reshape(b, l, n_kv, h // n_kv), (0, 2, 3, 1))[..., None]
    counted = (visible(mask) & row_mask_BL[:, None, :, None])[:, :, None] & (lse > -jnp.inf)
    return jnp.sum(jnp.exp(jnp.where(counted, logits - lse, -jnp.inf)), axis=(2, 3))


def _layer(rows: jax.Array, layer: jax.Array | int | None) -> jax.Array:
    return rows if layer is None else rows[layer]


def _silenced(rows_BKSC: jax.Array, held_BKS: jax.Array) -> jax.Array:
    """Returns rows of a cache, with zeros for those without a key: 0 x NaN is NaN.

    So weights of 0 do not mask values, nor do logit gradients of 0 mask keys. If a layer is sliced
    from a stack, the select is fused into that copy.
    """
    return jnp.where(held_BKS[..., None], rows_BKSC, 0)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _logits(q_BLHC, k_BKSC, scoring, mask):
    b, l, h, c = q_BLHC.shape
    n_kv = k_BKSC.shape[1]
    products = jnp.einsum(
        'blkgc,bksc->bkgls', q_BLHC.reshape(b, l, n_kv, h // n_kv, c), k_BKSC,
        precision=_precision(q_BLHC), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return complete(scoring.capped(products), terms(mask, scoring))


def _attend(q_BLHC, k_BKSC, v_BKSC, seen_BKLS, scoring, mask):
    b, l, h, c = q_BLHC.shape
    logits = _logits(q_BLHC, k_BKSC, scoring, mask)
    logits = jnp.where(seen_BKLS[:, :, None], logits, NOTHING)
    # jax.nn.softmax has a gradient that saves one array of this size, not several
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BKSC.dtype)
    out = jnp.einsum('bkgls,bksc->blkgc', weights, v_BKSC, precision=_precision(v_BKSC))
    any_BLK1 = jnp.any(seen_BKLS, axis=-1).swapaxes(1, 2)[..., None]
    out = jnp.where(any_BLK1[..., None], out, 0)
    lse_BLKG = jnp.moveaxis(jax.nn.logsumexp(logits, axis=-1), 3, 1)
    lse_BLKG = jnp.where(any_BLK1, lse_BLKG, -jnp.inf)
    return out.reshape(b, l, h, c).astype(q_BLHC.dtype), lse_BLKG.reshape(b, l, h)
