"""Partial results of attention over disjoint keys, merged by their log-sum-exp."""

import jax
import jax.numpy as jnp


def merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges attention over disjoint sets of keys into attention over their union.

    lse = log sum_x exp(lse_x) and out = sum_x exp(lse_x - lse) out_x: the last step of
    Flash-Decoding (Dao et al. 2023), and of ring attention.

    Args:
      out: `[X, ..., C]`, the result for each of X sets of keys.
      lse: f32 `[X, ...]`; -inf for a query that sees no key of the set; its `out` must be finite.

    Returns:
      f32 `[..., C]` and `[...]`; zeros and -inf for a query that sees no key at all.
    """
    highest = jnp.max(lse, axis=0)
    highest = jnp.where(highest > -jnp.inf, highest, 0.0)
    weight = jnp.exp(lse - highest)
    total = jnp.sum(weight, axis=0)
    some = jnp.where(total > 0, total, 1.0)
    merged = jnp.sum(weight[..., None] * out.astype(jnp.float32), axis=0) / some[..., None]
    return merged, jnp.where(total > 0, jnp.log(some) + highest, -jnp.inf)
