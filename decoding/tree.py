"""Draft trees: candidate continuations of each text, of static size; their topology is data."""

import math

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class DraftTree:
    """T nodes per row, chosen independently of the draws that verify them.

    Node 0, the root, is the last token of the text; its keys are not cached yet. A node's parent
    precedes it, and the children of one node come in order of preference.

        token   [5 7 8 2]     5 - 7 - 2      children of the root: 7, then 8
        parent  [-1 0 0 1]      \\ 8
        depth   [0 1 1 2]

    Attributes:
      token_BT, parent_BT, depth_BT: int32; the root's parent is -1.
      valid_BT: bool; an invalid node counts as absent. The root is valid.
    """

    token_BT: jax.Array
    parent_BT: jax.Array
    depth_BT: jax.Array
    valid_BT: jax.Array


@flax.struct.dataclass
class WithoutReplacement(DraftTree):
    """Each node's children were drawn in turn, without replacement.

    Attributes:
      logprob_BTV: log-probabilities from which each node's first child was drawn. Child i is drawn
        from them with its earlier siblings' tokens removed and the rest renormalised. Whether there
        is a child i may depend on its earlier siblings, never on its own token. Unused at leaves.
    """

    logprob_BTV: jax.Array


@flax.struct.dataclass
class Independent(DraftTree):
    """K sequences, drawn independently: the root has K children, every other node at most one.

    Attributes:
      logprob_BTV: log-probabilities from which each node's child, or each of the root's children,
        was drawn.
    """

    logprob_BTV: jax.Array


def root_only(token_B: jax.Array) -> DraftTree:
    """Returns the tree of one node: plain decoding."""
    zeros = jnp.zeros_like(token_B)[:, None]
    return DraftTree(token_B[:, None], zeros - 1, zeros, zeros == 0)


def chain(token_BT: jax.Array, valid_BT: jax.Array) -> DraftTree:
    """Returns the tree of a single path from the root: T tokens, each the child of the one before.

    Args:
      token_BT: int32, the last token of each text first.
      valid_BT: bool; a path ends before its first token that is not valid.
    """
    valid_BT = jnp.cumprod(valid_BT, axis=1) > 0
    depth_BT = jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)
    return DraftTree(token_BT, depth_BT - 1, depth_BT, valid_BT)


def ancestors(tree: DraftTree, depth: int) -> jax.Array:
    """Returns bool `[B, T, T]`: whether node j is node i or an ancestor of it.

    Args:
      tree: see `DraftTree`.
      depth: at least that of the deepest node.
    """
    nodes = jnp.arange(tree.parent_BT.shape[1])
    reach = (tree.parent_BT[..., None] == nodes) | (nodes[:, None] == nodes)
    # reach covers paths of one step; squaring doubles them
    for _ in range(math.ceil(math.log2(max(depth, 1)))):
        reach = jnp.einsum('bij,bjk->bik', reach.astype(jnp.float32), reach.astype(jnp.float32)) > 0
    return reach


def child(tree: DraftTree, node_B: jax.Array, rank: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Returns the index of each node's child of a rank, int32 `[B]`, and whether it exists."""
    mine = (tree.parent_BT == node_B[:, None]) & tree.valid_BT
    is_it = mine & (jnp.cumsum(mine, axis=1) == rank + 1)
    return jnp.argmax(is_it, axis=1).astype(jnp.int32), jnp.any(is_it, axis=1)


def at(values_BT: jax.Array, node_B: jax.Array) -> jax.Array:
    """Returns each row's value at its node: `[B, T, ...]` -> `[B, ...]`."""
    # row by row, so that a sharded batch is not gathered
    return jax.vmap(lambda values_T, node: values_T[node])(values_BT, node_B)
