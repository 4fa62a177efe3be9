"""Gradients of attention over some of the keys, in plain XLA: one block of ring attention.

The counterpart of `mosaic.flash.backward`. Autodiff of `xla.attention` gives the gradients of a
whole softmax; here the normaliser is given, and may include other keys.
"""

import jax
import jax.numpy as jnp

from lm.kernels.mask import Mask, visible
from lm.kernels.scoring import Scoring, complete, terms


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of attention with respect to q, k and v, from its results and theirs.

    With P = exp(logits - lse) and delta = rowsum(dO * O) - d lse (Dao 2023, algorithm 2):

        dV = P^T dO    dS = P * (dO V^T - delta)    dQ = slope dS K    dK = slope dS^T Q

    where slope = scale / temperature, times 1 - tanh(scale q . k / cap)^2 under a cap.

    Args:
      q_BLHC, k_BKSC, v_BKSC, mask, scoring: see `reference.attention`.
      out_BLHC, lse_BLH: its results, over these keys or a superset.
      d_out_BLHC, d_lse_BLH: their cotangents; ignored for a query that sees no key.

    Returns:
      dq, dk, dv, in the shapes and dtypes of q, k, v.
    """
    b, l, h, c = q_BLHC.shape
    n_kv = k_BKSC.shape[1]
    dtype = q_BLHC.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def by_head(x):
        return x.reshape(b, l, n_kv, h // n_kv, *x.shape[3:])

    def product(form, *operands):
        return jnp.einsum(form, *operands, precision=precision, preferred_element_type=jnp.float32)

    delta_BLH = jnp.sum(d_out_BLHC.astype(jnp.float32) * out_BLHC, axis=-1) - d_lse_BLH
    q, d_out = by_head(q_BLHC), by_head(d_out_BLHC.astype(dtype))
    lse, delta = (jnp.moveaxis(by_head(x), 1, 3)[..., None] for x in (lse_BLH, delta_BLH))
    found = terms(mask, scoring)
    capped_BKGLS = scoring.capped(product('blkgc,bksc->bkgls', q, k_BKSC))
    s_BKGLS = complete(capped_BKGLS, found)
    seen = visible(mask)[:, :, None] & (lse > -jnp.inf)
    p = jnp.exp(jnp.where(seen, s_BKGLS - jnp.where(lse > -jnp.inf, lse, 0.0), -jnp.inf))
    ds = p * (product('blkgc,bksc->bkgls', d_out, v_BKSC) - jnp.where(lse > -jnp.inf, delta, 0.0))
    if scoring.softcap is not None:
        ds *= 1 - (capped_BKGLS / scoring.softcap) ** 2
    ds *= scoring.scale if found.factor is None else scoring.scale * found.factor[0]
    dq_BLKGC = product('bkgls,bksc->blkgc', ds.astype(dtype), k_BKSC)
    dk_BKSC = product('bkgls,blkgc->bksc', ds.astype(dtype), q)
    dv_BKSC = product('bkgls,blkgc->bksc', p.astype(dtype), d_out)
    return dq_BLKGC.reshape(b, l, h, c).astype(dtype), dk_BKSC.astype(dtype), dv_BKSC.astype(dtype)
