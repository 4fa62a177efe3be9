"""How a flash kernel masks: which blocks it visits, and the mask of one block.

Positions and segments reach a kernel as rows of integers, one block at a time, and become a mask
by comparing a column with a row; nothing of size L x S is kept anywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.mask import Blocks, Mask, first_run, key_rows, span
from lm.kernels.mosaic.tile import column, lanes


class Rows(NamedTuple):
    """The integers that the mask of a block is made of; lengths padded to whole blocks.

    Attributes:
      query_position: int32 `[B, 1, L]`; -1 in the padding.
      key_position: int32 `[B, K or 1, 1, S]`; -1 where there is no key: empty rows, rows past
        `length`, padding.
      query_segment, key_segment: int32 `[B, 1, L]`, `[B, 1, S]`, or None.
    """

    query_position: jax.Array
    key_position: jax.Array
    query_segment: jax.Array | None
    key_segment: jax.Array | None


def rows(mask: Mask, query: int, key: int) -> Rows:
    """Lays out a mask for blocks of `query` queries and `key` keys."""
    positions = jnp.where(key_rows(mask), mask.key_position, -1)
    query_segment, key_segment = mask.query_segment, mask.key_segment
    if query_segment is not None and key_segment is not None:
        query_segment = pad(query_segment, -1, query, -1)[:, None]
        key_segment = pad(key_segment, -1, key, -1)[:, None]
    else:
        query_segment = key_segment = None
    query_position = pad(mask.query_position, -1, query, -1)[:, None]
    return Rows(query_position, pad(positions, -1, key, -1)[:, :, None], query_segment, key_segment)


def pad(x: jax.Array, axis: int, block: int, value) -> jax.Array:
    """Pads one axis to a multiple of `block`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


def bounds(flags: Blocks) -> tuple[jax.Array, jax.Array]:
    """Where a kernel that visits the blocks of the flags' last axis starts, stops, and masks.

    Returns:
      int32 `[B * (K or 1) * rows * 4]`, flat because scalar memory pads every other axis: the
      range of blocks to visit and the range, within it, of blocks that need no mask; and the
      steps that the longest row needs, at least 1 (int32 scalar), so that the results of a row
      that sees nothing are written too.
    """
    live = span(flags.some)
    whole = first_run(flags.every)
    steps = jnp.maximum(jnp.max(live[..., 1] - live[..., 0]), 1)
    return jnp.concatenate([live, whole], axis=-1).reshape(-1), steps


def by_key(flags: Blocks, ragged: bool) -> Blocks:
    """Returns the same flags with the key blocks as rows.

    With `ragged`, the last block of queries is partial, and needs the mask for its missing queries.
    """
    some, every = (jnp.swapaxes(x, -1, -2) for x in flags)
    return Blocks(some, every.at[..., -1].set(False) if ragged else every)


def visible(rows: Rows, window_ref, causal: bool, query_axis: int) -> jax.Array:
    """The mask of one block, bool, from references to its rows.

    Args:
      rows: references to `[1, queries]` and `[1, keys]`.
      window_ref: reference to the window, in scalar memory, or None.
      causal: see `Mask`.
      query_axis: 0 for `[queries, keys]`, 1 for `[keys, queries]`.
    """
    n_query, n_key = rows.query_position.shape[1], rows.key_position.shape[1]

    def query(ref):
        return ref[...] if query_axis else lanes(column(ref[...]), n_key)

    def key(ref):
        return lanes(column(ref[...]), n_query) if query_axis else ref[...]

    key_position = key(rows.key_position)
    seen = key_position >= 0
    if causal or window_ref is not None:
        query_position = query(rows.query_position)
        if causal:
            seen &= key_position <= query_position
        if window_ref is not None:
            seen &= query_position - key_position < window_ref[0]
    if rows.query_segment is not None:
        seen &= query(rows.query_segment) == key(rows.key_segment)
    shape = (n_key, n_query) if query_axis else (n_query, n_key)
    return jnp.broadcast_to(seen, shape)


def scalar(window) -> jax.Array | None:
    """The window as scalar memory takes it, int32 `[1]`."""
    return None if window is None else jnp.asarray(window, jnp.int32).reshape(1)
