"""The formula of each kernel in f32, straight from the equation: the oracle of the tests.

Every function here materialises all L x S logits.
"""

import jax
import jax.numpy as jnp

from lm.kernels.mask import Mask, visible
from lm.kernels.scoring import Scoring
from lm.kernels.sparse import SparseIndex, kept_rows

HIGHEST = jax.lax.Precision.HIGHEST


def logits(
    q_BLHC: jax.Array, k_BKSC: jax.Array, scoring: Scoring, bias: jax.Array | None = None
) -> jax.Array:
    """((cap tanh(scale q . k / cap)) + bias + noise) / temperature, f32 `[B, K, G, L, S]`.

    Bias and noise are `[B, K or 1, S]`. They and the temperature are constants for autodiff.
    """
    b, l, h, c = q_BLHC.shape
    k = k_BKSC.shape[1]
    q_BLKGC = q_BLHC.reshape(b, l, k, h // k, c).astype(jnp.float32)
    s_BKGLS = scoring.scale * jnp.einsum(
        'blkgc,bksc->bkgls', q_BLKGC, k_BKSC.astype(jnp.float32), precision=HIGHEST
    )
    if scoring.softcap is not None:
        s_BKGLS = scoring.softcap * jnp.tanh(s_BKGLS / scoring.softcap)
    for added in (bias, scoring.noise):
        if added is not None:
            s_BKGLS += jax.lax.stop_gradient(added)[:, :, None, None, :]
    if scoring.temperature is not None:
        s_BKGLS /= jax.lax.stop_gradient(scoring.temperature)
    return s_BKGLS


def attention(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask: Mask,
    scoring: Scoring,
) -> tuple[jax.Array, jax.Array]:
    """o = sum_s exp(logits_s - lse) v_s and lse = log sum_s exp(logits_s), over visible keys s.

    Query head h reads key/value head `h // (H / K)`.

    Returns:
      f32 `[B, L, H, C]`, zeros for a query that sees no key; f32 `[B, L, H]`, -inf for such a
      query.
    """
    s_BKGLS = logits(q_BLHC, k_BKSC, scoring, mask.key_bias)
    return _softmax_sum(s_BKGLS, visible(mask), v_BKSC, q_BLHC.shape)


def column_sums(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    lse_BLH: jax.Array,
    mask: Mask,
    row_mask_BL: jax.Array,
    scoring: Scoring,
) -> jax.Array:
    """Returns f32 `[B, K, S]`: the attention that each key received, sum exp(logits - lse).

    The sum is over the queries in `row_mask_BL` and the query heads that share the key/value head;
    H2O's score (Zhang et al. 2023) is its sum over steps. Summed over S it is the number of queries
    in the mask that see any key, times H / K.
    """
    b, l, h = lse_BLH.shape
    k = k_BKSC.shape[1]
    s_BKGLS = logits(q_BLHC, k_BKSC, scoring, mask.key_bias)
    lse_BKGL1 = jnp.transpose(lse_BLH.reshape(b, l, k, h // k), (0, 2, 3, 1))[..., None]
    counted = visible(mask)[:, :, None] & row_mask_BL[:, None, None, :, None]
    counted &= lse_BKGL1 > -jnp.inf
    mass = jnp.where(counted, jnp.exp(jnp.where(counted, s_BKGLS - lse_BKGL1, 0.0)), 0.0)
    return jnp.sum(mass, axis=(2, 3))


def sparse_decode(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    index: SparseIndex,
    scoring: Scoring,
    mask: Mask | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attention` over an index's kept rows and, with a mask, over the nodes of a tree.

    Without a mask, one query (L = 1) sees exactly the kept rows. With one, the last `mask.nodes`
    rows in use hold the nodes of a draft tree (or chain). Two sets of rows are seen by query l of
    KV head k:

        committed rows: s < first node, and the index keeps (k, s), whatever the row's position
        nodes:          s >= first node, and `visible(mask)` holds for (k, l, s), kept or not

    So positions, windows and segments apply to nodes only; bias and noise to both.
    """
    bias = None if mask is None else mask.key_bias
    s_BKGLS = logits(q_BLHC, k_BKSC, scoring, bias)
    seen_BKLS = kept_rows(index, k_BKSC.shape[2])[:, :, None]
    if mask is not None:
        is_node_B11S = jnp.arange(k_BKSC.shape[2]) >= mask.first_node_B[:, None, None, None]
        seen_BKLS = jnp.where(is_node_B11S, visible(mask), seen_BKLS)
    return _softmax_sum(s_BKGLS, seen_BKLS, v_BKSC, q_BLHC.shape)


def _softmax_sum(s_BKGLS, visible_BKLS, v_BKSC, shape):
    seen = visible_BKLS[:, :, None]
    s_BKGLS = jnp.where(seen, s_BKGLS, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(s_BKGLS, axis=-1, keepdims=True, initial=-1e30))
    weights = jnp.where(seen, jnp.exp(s_BKGLS - highest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    # a row that no query sees has weight 0, and 0 * NaN is NaN
    read = jnp.any(seen, axis=(2, 3))[..., None]
    v_BKSC = jnp.where(read, v_BKSC, 0).astype(jnp.float32)
    out = jnp.einsum('bkgls,bksc->blkgc', weights, v_BKSC, precision=HIGHEST)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + highest, -jnp.inf)
    lse_BLKG = jnp.moveaxis(lse[..., 0], 3, 1)
    return out.reshape(shape), lse_BLKG.reshape(shape[:3])
