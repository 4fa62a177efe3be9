"""Device meshes and the one table that maps logical axes to mesh axes."""

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

# Logical axis -> mesh axes, the first of them first. What is missing here is replicated.
RULES: dict[str, tuple[str, ...]] = {
    'batch': ('data',),
    'length': ('sequence',),
    'vocab': ('model',),
    'heads': ('model',),
    'kv_heads': ('model',),
    'ff': ('model',),
    # fully sharded data parallelism: gathered where a layer needs it
    'embed': ('data', 'sequence'),
}


class Sizes(NamedTuple):
    """How many devices lie along each axis of a mesh, in the order of `AXES`."""

    data: int
    sequence: int
    model: int


def parse(text: str | None, devices: int) -> Sizes:
    """Returns the sizes for a flag such as `data=2,sequence=2,model=2`, `auto` or nothing.

    `auto` (and nothing) puts every device on the data axis; `data` left out fills up, or `model`
    where `data` is given. Sequences are cut only where `sequence` is given.

    Raises:
      ValueError: an unknown axis or one given twice, a size that is no number, or a product that
        is not the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in [] if text in (None, '', 'auto') else text.split(','):
        axis, _, size = part.partition('=')
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            known = ', '.join(f'{axis}=SIZE' for axis in AXES)
            raise ValueError(f'--mesh {text!r}: {part!r} is not one of {known}')
        if axis in sizes:
            raise ValueError(f'--mesh {text!r}: {axis} is given twice')
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


def make(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `AXES` over all devices, with axes that jit shards by itself."""
    devices = jax.devices() if devices is None else devices
    shape = parse(text, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract(
    data: int, model: int = 1, sequence: int = 1, device: AbstractDevice | None = None
) -> AbstractMesh:
    """Returns a mesh without devices, enough to count with; `device` says what it stands for."""
    kinds = (AxisType.Auto,) * len(AXES)
    return AbstractMesh((data, sequence, model), AXES, axis_types=kinds, abstract_device=device)


def sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array with these logical axes.

    A mesh axis cuts one dimension, the first that asks for it. A dimension that its mesh axes do
    not divide is cut over the first of them, or replicated: one KV head on two devices, say. Mesh
    axes of one device are not named.
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


def batch_sharding(mesh: Mesh | AbstractMesh, rank: int = 2) -> NamedSharding:
    """Returns the sharding of a batch's arrays: by rows, and along them where sequences are cut."""
    cut = rank > 1 and mesh.shape['sequence'] > 1
    return NamedSharding(mesh, PartitionSpec('data', 'sequence') if cut else PartitionSpec('data'))


def in_use(axis: str) -> int:
    """Returns how many devices lie along an axis of the mesh in use (`jax.set_mesh`).

    1 without a mesh, and within a `shard_map`, where each device computes its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return 1
    return mesh.shape[axis]


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Returns `x`, laid out over the mesh in use (`jax.set_mesh`) by its logical axes.

    Without a mesh in use, or on one device, does nothing. Activations need it: parameters are
    sharded over `data`, too, and the compiler may otherwise follow them and not the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape).spec)
