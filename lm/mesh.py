"""Device meshes and the one table that maps logical axes to mesh axes."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'model')

# Logical axis -> mesh axis. What is missing here is replicated.
RULES = {
    'batch': 'data',
    'vocab': 'model',
    'heads': 'model',
    'kv_heads': 'model',
    'ff': 'model',
    'embed': 'data',  # fully sharded data parallelism: gathered where a layer needs it
}


def start() -> None:
    """Joins the other hosts where the environment names several; else does nothing.

    Several are named by TPU_WORKER_HOSTNAMES (set on the VMs of a TPU slice) or by
    JAX_COORDINATOR_ADDRESS. Call it once, before any other use of JAX.
    """
    # libtpu writes a warning into this variable on machines that are no TPU VM
    hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
    on_pod = len(hosts) > 1 and not any(' ' in host for host in hosts)
    if on_pod or 'JAX_COORDINATOR_ADDRESS' in os.environ:
        # JAX would take SIGTERM for itself; `lm.preemption` handles it, on any number of hosts
        jax.config.update('jax_enable_preemption_service', False)
        jax.distributed.initialize()


def parse(text: str | None, devices: int) -> tuple[int, int]:
    """Returns (data, model) sizes for a flag such as `data=4,model=2`, `auto` or nothing.

    `auto` (and nothing) puts every device on the data axis; a size left out fills up.

    Raises:
      ValueError: an unknown axis, a size that is no number, or a product that is not the number
        of devices.
    """
    sizes: dict[str, int] = {}
    for part in [] if text in (None, '', 'auto') else text.split(','):
        axis, _, size = part.partition('=')
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise ValueError(f'--mesh {text!r}: {part!r} is not one of data=SIZE, model=SIZE')
        sizes[axis] = int(size)
    if 'data' in sizes:
        model = sizes.get('model', max(devices // sizes['data'], 1))
    else:
        model = sizes.get('model', 1)
    data = sizes.get('data', max(devices // model, 1))
    if data * model != devices:
        raise ValueError(f'--mesh {text!r}: data={data} x model={model}, but {devices} devices')
    return data, model


def make(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a ('data', 'model') mesh over all devices, with axes that jit shards by itself."""
    devices = jax.devices() if devices is None else devices
    shape = parse(text, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Returns the sharding of an array with these logical axes.

    A dimension that its mesh axis does not divide is replicated: one KV head on two devices, say.
    """
    used: set[str] = set()
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        name = RULES.get(axis or '')
        fits = name is not None and name not in used and size % mesh.shape[name] == 0
        spec.append(name if fits else None)
        used |= {name} if fits and name else set()
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: rows over their mesh axis."""
    return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Returns `x`, laid out over the mesh in use (`jax.set_mesh`) by its logical axes.

    Without a mesh in use, or on one device, does nothing. Activations need it: parameters are
    sharded over `data`, too, and the compiler may otherwise follow them and not the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape).spec)
