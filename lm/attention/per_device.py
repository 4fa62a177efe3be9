"""Runs a kernel that the compiler cannot cut on each device's own batch rows and heads."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lm.devices import mesh as mesh_lib

Axes = PartitionSpec  # of logical axes here; a leaf of a pytree
(HEADS,) = mesh_lib.RULES['heads']


def per_device(
    kernel: Callable[..., Any],
    operands: tuple[Any, ...],
    layer: jax.Array | int | None,
    axes: tuple[Any, ...],
    out_axes: Any,
) -> Any:
    """Returns `kernel(*operands, layer=layer)`, computed part by part over the mesh in use.

    jit cuts XLA operations by itself; a Pallas kernel it would run whole on every device. Parts
    are rows of the batch over one mesh axis and heads over another, where they divide; and pieces
    of sequences, where the axes name their 'length' and the kernel itself communicates. Where the
    KV heads are fewer than the devices of their axis, each device copies out the one that its query
    heads read, and results per KV head are summed over the devices that share it.

    Args:
      kernel: any function of arrays; its queries have the axis 'heads', its keys 'kv_heads'.
      operands: pytrees of arrays; one whose first axis is 'layers' is a stack that `layer` indexes.
      layer: an index, or None where nothing is stacked.
      axes: a pytree like `operands`, with the logical axes of each array's first dimensions.
      out_axes: a pytree like the result, with its logical axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return _call(kernel, operands, layer)
    sizes = _sizes(operands, axes)
    heads, kv_heads = sizes['heads'], sizes['kv_heads']
    devices = mesh.shape[HEADS]
    one_each = kv_heads % devices != 0 and devices % kv_heads == 0 and heads % devices == 0
    cut = {'batch', 'length', 'heads'} if one_each else {'batch', 'length'}
    if kv_heads % devices == 0:
        cut |= {'heads', 'kv_heads'}

    def spec(axes: Axes, shape: tuple[int, ...] | None = None) -> PartitionSpec:
        kept = [axis if axis in cut else None for axis in axes]
        shape = tuple(sizes.get(axis or '', 1) for axis in axes) if shape is None else shape
        return mesh_lib.sharding(mesh, kept, shape[: len(kept)]).spec

    def on_device(layer, *operands):
        if not one_each:
            return _call(kernel, operands, layer)
        head = jax.lax.axis_index(HEADS) * kv_heads // devices
        operands = jax.tree.map(lambda a, x: _take_head(x, a, layer, head), axes, operands)
        result = _call(kernel, operands, None if layer is None else 0)
        return jax.tree.map(lambda a, x: _add_heads(x, a, head, kv_heads), out_axes, result)

    specs = jax.tree.map(lambda a, x: spec(a, jnp.shape(x)), axes, operands)
    # replication is not tracked through a kernel: check_vma would refuse it
    mapped = jax.shard_map(
        on_device, in_specs=(PartitionSpec(), *specs), out_specs=jax.tree.map(spec, out_axes),
        check_vma=False,
    )  # fmt: skip
    return mapped(layer, *operands)


def _call(kernel, operands, layer):
    return kernel(*operands) if layer is None else kernel(*operands, layer=layer)


def _sizes(operands: Any, axes: Any) -> dict[str, int]:
    """Returns the size of each logical axis, the greatest where an operand broadcasts along it."""
    sizes: dict[str, int] = {}
    for names, x in zip(jax.tree.leaves(axes), jax.tree.leaves(operands), strict=True):
        for axis, size in zip(names, jnp.shape(x), strict=False):
            sizes[axis] = max(size, sizes.get(axis, 1))
    return sizes


def _take_head(x: jax.Array, axes: Axes, layer, head) -> jax.Array:
    """Returns the part of one KV head, with a leading axis of 1 where `x` is a stack."""
    for index, axis in enumerate(axes):
        if axis == 'layers':
            x = jax.lax.dynamic_slice_in_dim(x, layer, 1, index)
        elif axis == 'kv_heads' and x.shape[index] > 1:
            x = jax.lax.dynamic_slice_in_dim(x, head, 1, index)
    return x


def _add_heads(x: jax.Array, axes: Axes, head, kv_heads: int) -> jax.Array:
    """Sums results per KV head over the devices; other results are returned as they are."""
    if 'kv_heads' not in axes:
        return x
    index = axes.index('kv_heads')
    shape = (*x.shape[:index], kv_heads, *x.shape[index + 1 :])
    whole = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, head, index)
    return jax.lax.psum(whole, HEADS)
