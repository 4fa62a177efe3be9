"""Attention over keys that each carry their own position."""

import chex
import flax.struct
import jax
import jax.numpy as jnp

from lm import layers


@flax.struct.dataclass
class Mask:
    """Which keys each query sees: those for which every condition given here holds.

    Attributes:
      query_position: int32 `[B, L]`.
      key_position: int32 `[B, K or 1, S]`; negative marks a row that holds no key.
      query_segment, key_segment: int32 `[B, L]`, `[B, S]`: equal ones see each other.
      ancestors: bool `[B, L, L]`: which of the new nodes, a draft tree, each one sees; older keys
        are seen by all. New node i is key `first_node + i`.
      first_node: int32 `[B]`.
      window: a query sees keys less than this far behind; an int or an int32 scalar.
      causal: a query sees no key of a later position.

    A chain of three new nodes after two cached keys, in a cache of six rows:

        query_position [2 3 4]   key_position [0 1 2 3 4 -1]

        visible  1 1 1 0 0 0
                 1 1 1 1 0 0
                 1 1 1 1 1 0
    """

    query_position: jax.Array
    key_position: jax.Array
    query_segment: jax.Array | None = None
    key_segment: jax.Array | None = None
    ancestors: jax.Array | None = None
    first_node: jax.Array | None = None
    window: jax.Array | int | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)


def visible(mask: Mask) -> jax.Array:
    """Returns the mask in full, bool `[B, K or 1, L, S]`."""
    query = mask.query_position[:, None, :, None]
    key = mask.key_position[:, :, None, :]
    result = jnp.broadcast_to(key >= 0, jnp.broadcast_shapes(query.shape, key.shape))
    if mask.causal:
        result &= key <= query
    if mask.window is not None:
        result &= query - key < mask.window
    if mask.query_segment is not None and mask.key_segment is not None:
        result &= mask.query_segment[:, None, :, None] == mask.key_segment[:, None, None, :]
    if mask.ancestors is not None and mask.first_node is not None:
        node_BS = jnp.arange(key.shape[-1]) - mask.first_node[:, None]
        index_BS = jnp.clip(node_BS, 0, mask.ancestors.shape[-1] - 1)
        among_nodes = jnp.take_along_axis(mask.ancestors, index_BS[:, None], axis=2)
        result &= (among_nodes | (node_BS < 0)[:, None])[:, None]
    return result


def attention(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Returns softmax(scale q . k) v, `[B, L, H, C]`, in the dtype of `q`.

    Query head h reads key/value head `h // (H / K)`. Softmax in f32. A query that sees no key
    gives zeros.
    """
    b, l, h, c = q_BLHC.shape
    k, s = k_BKSC.shape[1:3]
    chex.assert_shape([k_BKSC, v_BKSC], (b, k, s, c))
    chex.assert_shape(mask.query_position, (b, l))
    chex.assert_is_divisible(h, k)
    q_BLKGC = q_BLHC.reshape(b, l, k, h // k, c)
    precision = jax.lax.Precision.HIGHEST if q_BLHC.dtype == jnp.float32 else None
    logits = jnp.einsum(
        'blkgc,bksc->bkgls', q_BLKGC, k_BKSC, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    seen = visible(mask)[:, :, None]
    logits = jnp.where(seen, layers.softcap(logits * scale, softcap), -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    weights = jnp.exp(logits - jax.lax.stop_gradient(highest))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = (weights / jnp.maximum(total, 1e-30)).astype(v_BKSC.dtype)
    out = jnp.einsum('bkgls,bksc->blkgc', weights, v_BKSC, precision=precision)
    return out.reshape(b, l, h, c).astype(q_BLHC.dtype)
