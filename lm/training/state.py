"""The state that training carries from step to step, and its shardings on a mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@flax.struct.dataclass
class TrainState:
    """Everything a step changes; `step` counts the updates applied to `params`."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state before the first step; optimizer arrays are sharded like `params`."""
    shardings = optimizer_shardings(params, jax.eval_shape(optimizer.init, params), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), everywhere), params, opt_state)


def optimizer_shardings(params: Any, opt_state: Any, mesh: Mesh) -> Any:
    """Returns the optimizer's shardings: an array in its parameter's shape has the same sharding.

    Args:
      params: arrays, or their shapes with shardings.
      opt_state: shapes of the optimizer's state; moments have their parameters' names.
      mesh: the other arrays, such as Adafactor's row and column statistics, are replicated over it.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = (path[i:] for i in range(len(path)))
        param = next((known[name] for name in names if name in known), None)
        return param.sharding if param is not None and param.shape == leaf.shape else everywhere

    return jax.tree_util.tree_map_with_path(place, opt_state)
