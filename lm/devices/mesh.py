"""Device meshes, and the table that maps logical axes to mesh axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

AXES = ('data', 'sequence', 'model')

# Logical axis -> mesh axes, in order of precedence. Axes that are not listed are replicated.
RULES: dict[str, tuple[str, ...]] = {
    'batch': ('data',),
    'length': ('sequence',),
    'vocab': ('model',),
    'heads': ('model',),
    'kv_heads': ('model',),
    'ff': ('model',),
    # fully sharded data parallelism: all-gathered where a layer needs it
    'embed': ('data', 'sequence'),
}


class Sizes(NamedTuple):
    """Number of devices along each axis of a mesh, in the order of `AXES`."""

    data: int
    sequence: int
    model: int


def make(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `AXES` over `devices` (default: all); jit propagates shardings (Auto)."""
    devices = jax.devices() if devices is None else devices
    shape = parse(text, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse(text: str | None, devices: int) -> Sizes:
    """Returns the sizes for a flag such as `data=2,sequence=2,model=2`, `auto` or nothing.

    `auto`, or no text, puts all devices on the data axis. If `data` is missing, it takes the
    remaining devices; if `data` is given, `model` does. Sequences are sharded only if `sequence` is
    given.

    Raises:
      ValueError: an unknown or duplicate axis, a size that is not a positive integer, or a product
        that differs from the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in [] if text in (None, '', 'auto') else text.split(','):
        axis, _, size = part.partition('=')
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            known = ', '.join(f'{axis}=SIZE' for axis in AXES)
            raise ValueError(f'--mesh {text!r}: {part!r} is not one of {known}')
        if axis in sizes:
            raise ValueError(f'--mesh {text!r}: duplicate axis {axis}')
        sizes[axis] = int(size)
    left_out = 'model' if 'data' in sizes else 'data'
    rest = devices // math.prod(sizes.values())
    result = Sizes(**dict.fromkeys(AXES, 1) | {left_out: max(rest, 1)} | sizes)
    if math.prod(result) != devices:
        named = ' x '.join(
            f'{axis}={size}'
            for axis, size in zip(AXES, result)
            if size > 1 or axis in sizes or axis != 'sequence'
        )
        raise ValueError(f'--mesh {text!r}: {named}, but {devices} devices')
    return result


def abstract(
    data: int, model: int = 1, sequence: int = 1, device: AbstractDevice | None = None
) -> AbstractMesh:
    """Returns a mesh without devices, for planning; `device` describes the hardware."""
    kinds = (AxisType.Auto,) * len(AXES)
    return AbstractMesh((data, sequence, model), AXES, axis_types=kinds, abstract_device=device)


def sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array with these logical axes.

    A mesh axis shards at most one dimension, the first that maps to it. If the mesh axes of a
    dimension do not divide it, it is sharded over the leading ones that do, or replicated: one KV
    head on two devices, for example. Mesh axes of size 1 are left out.
    """
    used: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = [n for n in RULES.get(axis or '', ()) if mesh.shape[n] > 1 and n not in used]
        while size % math.prod(mesh.shape[n] for n in names):
            names = names[:-1]
        spec.append(tuple(names) if len(names) > 1 else names[0] if names else None)
        used |= set(names)
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains `x` to the sharding of its logical axes on the current mesh (`jax.set_mesh`).

    Does nothing without a mesh or on one device. Activations need the constraint: parameters are
    sharded over `data`, too, and XLA might otherwise shard activations like them and not like the
    batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape).spec)


def batch_sharding(mesh: Mesh | AbstractMesh, rank: int = 2) -> NamedSharding:
    """Returns the sharding of a batch's arrays: rows over `data`, positions over `sequence`."""
    cut = rank > 1 and mesh.shape['sequence'] > 1
    return NamedSharding(mesh, PartitionSpec('data', 'sequence') if cut else PartitionSpec('data'))


def in_use(axis: str) -> int:
    """Returns the number of devices along an axis of the current mesh (`jax.set_mesh`).

    1 without a mesh, and inside `shard_map`, where each device computes on its own shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    return mesh.shape[axis]
