"""The mask of one tile: positions, segments and packed bits, read as the tile needs them.

A kernel gets the mask as a `Mask` whose fields are references (`operands`); there is no [L, S]
array.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels.mask import WORD, Mask


def operands(mask: Mask, rows: int) -> Mask:
    """Returns the mask as arrays for a kernel: with a length, at most `rows`, and a window [1].

    Without the bias, which comes apart (`logits.operands`).
    """
    length = jnp.full(mask.query_position.shape[:1], rows) if mask.length is None else mask.length
    window = mask.window
    both = mask.query_segment is not None and mask.key_segment is not None
    return dataclasses.replace(
        mask,
        length=jnp.minimum(length, rows).astype(jnp.int32),
        window=None if window is None else jnp.asarray(window, jnp.int32).reshape(1),
        query_segment=mask.query_segment if both else None,
        key_segment=mask.key_segment if both else None,
        key_bias=None,
    )


class Queries(NamedTuple):
    """The mask's data on the queries of a tile, each `[rows]`."""

    node: jax.Array  # which query of the sequence
    position: jax.Array
    segment: jax.Array | None


class Keys(NamedTuple):
    """The mask's data on the keys of a tile, each `[keys]` but `start`."""

    start: jax.Array  # int32 scalar: the first of `row`
    row: jax.Array  # in the cache, one after another
    position: jax.Array
    segment: jax.Array | None

    @property
    def held(self) -> jax.Array:
        """Which rows hold a key; nothing else may be read."""
        return self.position >= 0


def load_queries(mask: Any, batch, node: jax.Array) -> Queries:
    """Loads positions and segments of queries; beyond the last query they mean nothing."""
    nodes = mask.query_position.shape[1]
    node = jnp.minimum(node, nodes - 1)
    position = plgpu.load(mask.query_position.at[batch, node])
    segment = None
    if mask.query_segment is not None:
        segment = plgpu.load(mask.query_segment.at[batch, node])
    return Queries(node, position, segment)


def load_keys(mask: Any, batch, head, start, keys: int) -> Keys:
    """Loads positions and segments of the keys from row `start` on; negative where none is."""
    row = start + jnp.arange(keys)
    used = row < mask.length[batch]
    head = jnp.minimum(head, mask.key_position.shape[1] - 1)  # positions for all, or for each
    at = pl.ds(start, keys)
    position = plgpu.load(mask.key_position.at[batch, head, at], mask=used, other=-1)
    segment = None
    if mask.key_segment is not None:
        segment = plgpu.load(mask.key_segment.at[batch, at], mask=used, other=0)
    return Keys(start, row, position, segment)


def visible(mask: Any, batch, queries: Queries, keys: Keys, query_axis: int = 0) -> jax.Array:
    """Returns `lm.kernels.mask.visible` for one tile; queries lie on the given axis of two."""

    def q(x):
        return jnp.expand_dims(x, 1 - query_axis)

    def k(x):
        return jnp.expand_dims(x, query_axis)

    seen = k(keys.held)
    if mask.causal:
        seen = seen & (k(keys.position) <= q(queries.position))
    if mask.window is not None:
        behind = q(queries.position) - k(keys.position)
        seen = seen & (behind < mask.window[0])
    if queries.segment is not None and keys.segment is not None:
        seen = seen & (q(queries.segment) == k(keys.segment))
    if mask.ancestors is not None:
        node = keys.row - (mask.length[batch] - mask.tree_nodes)
        word = _ancestor_words(mask, batch, queries, keys, node, q, k)
        bit = (word >> k(node & (WORD - 1))) & 1
        seen = seen & (k(node < 0) | (bit == 1))
    return seen


def _ancestor_words(mask: Any, batch, queries: Queries, keys: Keys, node, q, k) -> jax.Array:
    """Returns for each query and key of a tile the word of ancestors that holds the key's bit.

    The keys of a tile follow one another: few words hold their bits, and selecting among those is
    cheaper than a gather of one word for each query and key.
    """
    words = mask.ancestors.shape[2]
    count = min(words, pl.cdiv(keys.row.shape[0] - 1, WORD) + 1)
    first = (keys.start - (mask.length[batch] - mask.tree_nodes)) >> 5
    first = jnp.clip(first, 0, words - count)
    result = q(plgpu.load(mask.ancestors.at[batch, queries.node, first]))
    for i in range(1, count):
        word = q(plgpu.load(mask.ancestors.at[batch, queries.node, first + i]))
        result = jnp.where(k(node >> 5) == first + i, word, result)
    return result
