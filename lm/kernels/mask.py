"""The keys that each query sees, as positions and bits, never as a dense [L, S] array."""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

WORD = 32  # bits per word of packed ancestors and of kept keys
UNLIMITED = np.iinfo(np.int32).max


@flax.struct.dataclass
class Mask:
    """The keys that each query sees: those that satisfy every condition given here.

    Attributes:
      query_position: int32 `[B, L]`.
      key_position: int32 `[B, K or 1, S]`; negative for a row without a key. Without `length`, keys
        and values there must still be finite.
      query_segment, key_segment: int32 `[B, L]`, `[B, S]`: queries see keys of the same segment.
      length: int32 `[B]`: number of cache rows in use; later rows are never read and may be NaN.
      ancestors: int32 `[B, L, ceil(nodes / 32)]`: the nodes of a draft tree that each query sees,
        itself included, as packed bits (`pack_bits`). The tree's keys are the last `nodes` rows in
        use; all queries see the older keys.
      nodes: number of nodes in the tree so far, at least the L new ones; L by default.
      window: a query sees keys fewer than this many positions behind; int or int32 scalar.
      causal: a query sees no key of a later position.
      key_bias: f32 `[B, K or 1, S]`, added to the logits of each key (`lm.kernels.scoring`); hides
        none. A row for m merged keys has bias log m (Bolya et al. 2023, ToMe). Finite for every row
        with a key.

    A chain of three new nodes after two cached keys, in a cache of six rows:

        query_position [2 3 4]   key_position [0 1 2 3 4 -1]   length 5

        visible  1 1 1 0 0 0
                 1 1 1 1 0 0
                 1 1 1 1 1 0
    """

    query_position: jax.Array
    key_position: jax.Array
    query_segment: jax.Array | None = None
    key_segment: jax.Array | None = None
    length: jax.Array | None = None
    ancestors: jax.Array | None = None
    window: jax.Array | int | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    nodes: int | None = flax.struct.field(pytree_node=False, default=None)
    key_bias: jax.Array | None = None

    @property
    def first_node_B(self) -> jax.Array:
        """The row of the draft tree's first node, int32 `[B]`."""
        rows, batch = self.key_position.shape[-1], self.query_position.shape[0]
        end = jnp.full(batch, rows, jnp.int32) if self.length is None else self.length
        return end - self.tree_nodes

    @property
    def tree_nodes(self) -> int:
        """The number of nodes in the draft tree."""
        return self.query_position.shape[1] if self.nodes is None else self.nodes


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs bool `[..., n]` into int32 `[..., ceil(n / 32)]`, lowest bit first."""
    n = bits.shape[-1]
    padding = [(0, 0)] * (bits.ndim - 1) + [(0, -n % WORD)]
    words = jnp.pad(bits, padding).reshape(*bits.shape[:-1], -1, WORD).astype(jnp.uint32)
    packed = jnp.sum(words << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(packed, jnp.int32)


def unpack_bits(words: jax.Array, n: int) -> jax.Array:
    """Inverse of `pack_bits`: bool `[..., n]`."""
    bits = (words[..., None] >> jnp.arange(WORD)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :n] == 1


def key_rows(mask: Mask) -> jax.Array:
    """Returns whether each row holds a key, bool `[B, K or 1, S]`."""
    holds = mask.key_position >= 0
    if mask.length is not None:
        holds &= jnp.arange(holds.shape[-1]) < mask.length[:, None, None]
    return holds


def visible(mask: Mask) -> jax.Array:
    """Returns the dense mask, bool `[B, K or 1, L, S]`: the definition, for the oracle."""
    query = mask.query_position[:, None, :, None]
    key = mask.key_position[:, :, None, :]
    result = jnp.broadcast_to(key_rows(mask)[:, :, None], _shape(query, key))
    if mask.causal:
        result &= key <= query
    if mask.window is not None:
        result &= query - key < mask.window
    if mask.query_segment is not None and mask.key_segment is not None:
        result &= mask.query_segment[:, None, :, None] == mask.key_segment[:, None, None, :]
    if mask.ancestors is not None:
        node_BS = jnp.arange(key.shape[-1]) - mask.first_node_B[:, None]
        bits_BLT = unpack_bits(mask.ancestors, mask.tree_nodes)
        index_BS = jnp.clip(node_BS, 0, mask.tree_nodes - 1)
        among_nodes = jnp.take_along_axis(bits_BLT, index_BS[:, None], axis=2)
        result &= (among_nodes | (node_BS < 0)[:, None])[:, None]
    return result


def tree_rows(mask: Mask) -> jax.Array:
    """Returns whether each row is from the draft tree's first node on, bool `[B, 1, S]`."""
    row_S = jnp.arange(mask.key_position.shape[-1])
    return row_S >= mask.first_node_B[:, None, None]


def tree_alone(mask: Mask) -> Mask:
    """Returns the mask that hides all keys except those of the draft tree."""
    key_position = jnp.where(tree_rows(mask), mask.key_position, -1)
    return dataclasses.replace(mask, key_position=key_position)


class Blocks(NamedTuple):
    """Bounds of a mask per block of queries and block of keys, by which kernels skip work.

    Attributes:
      some: bool `[B, K or 1, L blocks, S blocks]`: false if no query of the block sees any key of
        the block; true if one might.
      every: bool, same shape: true if every query sees every key, so that no mask is needed.
    """

    some: jax.Array
    every: jax.Array


def blocks(mask: Mask, query: int, key: int) -> Blocks:
    """Bounds the mask by each block's least and greatest positions and segments.

    Args:
      mask: see `Mask`.
      query: queries per block; the last block may be partial.
      key: keys per block; a partial last block is never `every`.
    """
    rows = mask.key_position.shape[-1]
    holds = key_rows(mask)
    q_min = _reduce(mask.query_position, query, jnp.min, UNLIMITED)[:, None, :, None]
    q_max = _reduce(mask.query_position, query, jnp.max, -UNLIMITED)[:, None, :, None]
    k_min = _reduce(jnp.where(holds, mask.key_position, UNLIMITED), key, jnp.min, UNLIMITED)
    k_max = _reduce(jnp.where(holds, mask.key_position, -1), key, jnp.max, -1)
    whole = _reduce(holds, key, jnp.all, False)[:, :, None]
    k_min, k_max = k_min[:, :, None], k_max[:, :, None]
    some = jnp.broadcast_to(k_max >= 0, _shape(q_min, k_max))
    every = jnp.broadcast_to(whole, some.shape)
    if mask.causal:
        some, every = some & (k_min <= q_max), every & (k_max <= q_min)
    if mask.window is not None:
        some &= q_min - k_max < mask.window
        every &= q_max - k_min < mask.window
    if mask.query_segment is not None and mask.key_segment is not None:
        q_low = _reduce(mask.query_segment, query, jnp.min, UNLIMITED)[:, None, :, None]
        q_high = _reduce(mask.query_segment, query, jnp.max, -UNLIMITED)[:, None, :, None]
        k_low = _reduce(mask.key_segment, key, jnp.min, UNLIMITED)[:, None, None]
        k_high = _reduce(mask.key_segment, key, jnp.max, -UNLIMITED)[:, None, None]
        some &= (q_low <= k_high) & (k_low <= q_high)
        every &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if mask.ancestors is not None:
        last_key = jnp.minimum((jnp.arange(some.shape[-1]) + 1) * key, rows)
        every &= (last_key <= mask.first_node_B[:, None])[:, None, None]
    return Blocks(some, every)


def span(flags: jax.Array) -> jax.Array:
    """Returns int32 `[..., 2]`: the first true of the last axis, and one past the last true.

    (0, 0) if there is none.
    """
    n = flags.shape[-1]
    first = jnp.argmax(flags, axis=-1)
    end = n - jnp.argmax(flags[..., ::-1], axis=-1)
    found = jnp.any(flags, axis=-1)
    return jnp.stack([first, end], axis=-1).astype(jnp.int32) * found[..., None]


def first_run(flags: jax.Array) -> jax.Array:
    """Returns int32 `[..., 2]`: start and end of the first run of trues in the last axis."""
    first = jnp.argmax(flags, axis=-1)
    n = flags.shape[-1]
    ended = ~flags & (jnp.arange(n) > first[..., None])
    end = jnp.where(jnp.any(ended, axis=-1), jnp.argmax(ended, axis=-1), n)
    found = jnp.any(flags, axis=-1)
    return jnp.stack([first, end], axis=-1).astype(jnp.int32) * found[..., None]


def _shape(query: jax.Array, key: jax.Array) -> tuple[int, ...]:
    return np.broadcast_shapes(query.shape, key.shape)


def _reduce(x: jax.Array, block: int, reduce, padding) -> jax.Array:
    """Reduces the last axis block by block, `[..., n]` to `[..., ceil(n / block)]`."""
    pad = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    x = jnp.pad(x, pad, constant_values=padding)
    return reduce(x.reshape(*x.shape[:-1], -1, block), axis=-1)
