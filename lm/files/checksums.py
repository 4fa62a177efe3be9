"""One checksum per leaf, sensitive to each of its bytes and computed on the leaf's devices.

The checksum of a leaf with words w_i (the bits of its elements) is sum_i w_i (2 i + 1) mod 2**32.
Every weight is odd, hence invertible: changing one word always changes the sum, and swapping two
words nearly always does. Addition mod 2**32 is associative and commutative, so the sum is the same
on every mesh, and a pod compares four bytes per leaf instead of reading the leaf.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# A leaf's record: dtype and shape as `float32[2, 3]`, and the sum.
Record = dict[str, Any]


def of(tree: Any) -> dict[str, Record]:
    """Returns the record of each leaf, by name; a collective, with one result for all processes."""
    leaves = jax.tree.leaves(tree)
    places = [getattr(leaf, 'sharding', None) for leaf in leaves]
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    whole = mesh and NamedSharding(mesh, PartitionSpec())
    sums = np.asarray(jax.jit(_sums, out_shardings=whole)(leaves))
    return {
        leaf: {'kind': kind, 'sum': int(value)}
        for (leaf, kind), value in zip(kinds(tree).items(), sums, strict=True)
    }


def differing(tree: Any, recorded: Mapping[str, Record]) -> list[str]:
    """Returns the names of the leaves of `tree` whose records differ from the given ones."""
    return [leaf for leaf, record in of(tree).items() if recorded.get(leaf) != record]


def kinds(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each leaf, such as `float32[2, 3]`, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(path): f'{np.dtype(x.dtype)}{list(x.shape)}' for path, x in leaves}


def name(path: Any) -> str:
    """Returns a leaf's path as `params/body/final_norm_D`; names, keys and indices alike."""
    entries = (getattr(e, 'name', getattr(e, 'key', getattr(e, 'idx', None))) for e in path)
    return '/'.join(map(str, entries))


def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        size = min(x.dtype.itemsize, 4)  # an 8-byte element becomes two words
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * size}'))
    position = jnp.zeros(x.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        position += index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(x.astype(jnp.uint32) * (2 * position + 1), dtype=jnp.uint32)
