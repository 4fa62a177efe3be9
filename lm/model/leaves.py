"""Declarations of parameters: a `Leaf` per array, in nested dicts of the parameters' structure.

Initial values, shapes, shardings, counts, weight decay and the input and output axes of matrices
all derive from this declaration. Other networks (a hypernetwork, an adapter) declare theirs
likewise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.devices import mesh as mesh_lib

Params = dict[str, Any]
Leaves = dict[str, Any]


class Leaf(NamedTuple):
    """One parameter.

    Attributes:
      shape: its shape.
      axes: a logical axis per dimension; `lm.devices.mesh.RULES` maps them to mesh axes.
      scale: standard deviation of a normal initial value, or
      constant: the initial value itself, if `scale` is None.
      matrix: for a linear map, its input dimensions and its output dimensions; None otherwise.
        Optimizers that orthogonalise updates (Muon) read it.
      decay: whether weight decay applies.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    scale: float | None
    constant: float = 0.0
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    decay: bool = False


def matrix(
    shape: tuple[int, ...], axes: tuple[str, ...], scale: float | None, inputs: int = 1
) -> Leaf:
    """Returns a decayed linear map, whose first `inputs` dimensions are contracted.

    >>> matrix((8, 2, 4), ('embed', 'heads', 'head'), 0.1).matrix
    ((0,), (1, 2))
    """
    dimensions = tuple(range(len(shape)))
    return Leaf(shape, axes, scale, 0.0, (dimensions[:inputs], dimensions[inputs:]), decay=True)


def stacked(leaf: Leaf, n: int) -> Leaf:
    """Returns the leaf of N layers, stacked along a new first dimension."""
    moved = leaf._replace(shape=(n, *leaf.shape), axes=('layers', *leaf.axes))
    if leaf.matrix is None:
        return moved
    inputs, outputs = (tuple(i + 1 for i in side) for side in leaf.matrix)
    return moved._replace(matrix=(inputs, outputs))


def map_leaves(function: Callable[[Leaf], Any], tree: Leaves) -> dict[str, Any]:
    """Returns the tree with `function` applied to each `Leaf`."""
    return jax.tree.map(function, tree, is_leaf=is_leaf)


def is_leaf(x: Any) -> bool:
    """Returns whether `x` is a `Leaf`; to JAX it is a tuple of several leaves."""
    return isinstance(x, Leaf)


def initial(tree: Leaves, dtype: str, key: jax.Array) -> Params:
    """Returns initial values; each depends only on the key and its own name."""

    def make(path, leaf: Leaf):
        if leaf.scale is None:
            return jnp.full(leaf.shape, leaf.constant, dtype)
        # fold_in by name: adding another leaf does not change this one's values
        name_hash = sum(ord(x) * 31**i for i, x in enumerate(jax.tree_util.keystr(path))) % 2**31
        noise = jax.random.normal(jax.random.fold_in(key, name_hash), leaf.shape, jnp.float32)
        return (noise * leaf.scale).astype(dtype)

    return jax.tree_util.tree_map_with_path(make, tree, is_leaf=is_leaf)


def abstract(tree: Leaves, dtype: str, mesh: Mesh | None = None) -> Params:
    """Returns shapes and dtypes, with shardings if a mesh is given."""

    def make(leaf: Leaf):
        sharding = mesh and mesh_lib.sharding(mesh, leaf.axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)

    return map_leaves(make, tree)


def placed(tree: Leaves, mesh: Mesh) -> Params:
    """Returns the `NamedSharding` of each leaf on `mesh`."""
    return map_leaves(lambda leaf: mesh_lib.sharding(mesh, leaf.axes, leaf.shape), tree)


def size(tree: Any) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=is_leaf))
