"""The byte n-gram as a `NextByteModel`: jitted binary searches in the trie's sorted keys."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokenization.coding.next_byte import SYMBOLS, NextByteModel

UNLIMITED = (1 << 31) - 1


@struct.dataclass
class NGramState:
    """The last bytes of B rows, and the tables.

    The tables are part of the state so that jitted functions get them as arguments, not as
    constants of hundreds of megabytes compiled into the program.

    Attributes:
      history_BL: the last `order` bytes, most recent first, int32.
      length_B: how many of them there are, int32.
      children: sorted keys of each level of the trie, uint32.
      rows_RV: lower bounds of the CDF of every node, uint16 `[nodes, 256]`.
    """

    history_BL: jax.Array
    length_B: jax.Array
    children: tuple[jax.Array, ...]
    rows_RV: jax.Array


def model(
    children: Sequence[np.ndarray], rows_RV: np.ndarray, precision: int, digest: str
) -> NextByteModel:
    """Returns the model of `NGram.model`; a mark is the pair (history, length)."""
    order = len(children) - 1
    keys, rows = tuple(map(jnp.asarray, children)), jnp.asarray(rows_RV)

    def start(batch: int) -> NGramState:
        history, length = jnp.zeros((batch, order), jnp.int32), jnp.zeros(batch, jnp.int32)
        return NGramState(history, length, keys, rows)

    def cdf(state: NGramState) -> jax.Array:
        lower = state.rows_RV[_node(state)].astype(jnp.int32)
        return jnp.pad(lower, ((0, 0), (0, 1)), constant_values=1 << precision)

    def step(state: NGramState, byte: jax.Array) -> NGramState:
        history = jnp.concatenate([byte[:, None], state.history_BL[:, :-1]], axis=1)
        return dataclasses.replace(
            state, history_BL=history, length_B=jnp.minimum(state.length_B + 1, order)
        )

    def mark(state: NGramState) -> tuple[jax.Array, jax.Array]:
        return state.history_BL, state.length_B

    def rewind(state: NGramState, mark: tuple[jax.Array, jax.Array]) -> NGramState:
        return dataclasses.replace(state, history_BL=mark[0], length_B=mark[1])

    return NextByteModel(start, cdf, step, mark, rewind, precision, UNLIMITED, digest)


def _node(state: NGramState) -> jax.Array:
    """Returns the node of the longest context that was seen in training, int32 `[B]`."""
    node = jnp.zeros_like(state.length_B)  # within its level
    row = node  # among all levels
    alive = jnp.ones_like(node, bool)
    base = 1
    for level, keys in enumerate(state.children[1:], start=1):
        if not len(keys):
            break
        byte = state.history_BL[:, level - 1]
        key = (node * SYMBOLS + byte).astype(jnp.uint32)
        index = jnp.minimum(jnp.searchsorted(keys, key), len(keys) - 1).astype(jnp.int32)
        alive &= (state.length_B >= level) & (keys[index] == key)
        node = jnp.where(alive, index, node)
        row = jnp.where(alive, base + index, row)
        base += len(keys)
    return row
