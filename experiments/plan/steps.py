"""The project's own training and decoding steps, to be lowered with abstract arguments."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from experiments import language_model
from experiments.plan.config import PRESETS, Config
from lm.devices import mesh as mesh_lib
from lm.model import cache as cache_lib
from lm.model import contract, params, stepped
from lm.model.cache import Cache
from lm.model.config import Config as ModelConfig
from lm.training import optimizer as optimizer_lib
from lm.training import state as state_lib
from lm.training import train

SCHEDULE = 1000  # steps of the learning-rate schedule; no array size depends on it
_CACHE_AXES = ('layers', 'batch', 'kv_heads', 'length', 'head')


class Step(NamedTuple):
    """A jitted step with its abstract arguments.

    Attributes:
      function: the jitted step; its first argument, or its cache, is donated.
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings.
      parts: the arguments that stay on the devices between steps, by name: `params`, `optimizer`,
        `cache`.
      batch: the arguments that are new in each step, by name.
    """

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    batch: dict[str, Any]


def model_config(config: Config) -> ModelConfig:
    """Returns the preset's model as it is trained or served: bf16 activations.

    Unless the config gives their dtype, parameters are bf16 for decoding, and f32 for training,
    since bf16 would round small updates away.
    """
    model = PRESETS[config.preset]()
    default = 'float32' if config.step == 'train' else 'bfloat16'
    return dataclasses.replace(
        model, dtype='bfloat16', param_dtype=config.param_dtype or default, ring=config.ring
    )


def make(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> Step:
    """Returns the config's step, sharded over `mesh` as in `lm.training.train.run`.

    Raises:
      ValueError: the rows do not divide over `data`.
    """
    if config.batch % mesh.shape['data']:
        raise ValueError(
            f'--batch {config.batch}: expected a multiple of the data={mesh.shape["data"]} devices'
        )
    make_step = _train if config.step == 'train' else _decode
    return make_step(model, config.batch, config.length, mesh)


def _train(model: ModelConfig, batch: int, length: int, mesh: Any) -> Step:
    weights = params.abstract(model, mesh)
    optimizer = optimizer_lib.make(optimizer_lib.OptimizerConfig(), SCHEDULE, params.leaves(model))
    everywhere = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, weights)
    placed = state_lib.optimizer_shardings(weights, opt_state, mesh)
    opt_state = jax.tree.map(_array, opt_state, placed)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    state = train.TrainState(step, weights, opt_state)
    rows = mesh_lib.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    names = ('tokens', 'targets', 'positions', 'segments')
    inputs: dict[str, Any] = dict.fromkeys(names, tokens)
    inputs['weights'] = jax.ShapeDtypeStruct((batch, length), jnp.float32, sharding=rows)
    loss = language_model.loss_fn(model, train.TrainConfig().z_loss)
    function = jax.jit(
        functools.partial(train.train_step, loss, optimizer, 0),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    return Step(function, (state, inputs), {'params': weights, 'optimizer': opt_state}, inputs)


def _decode(model: ModelConfig, batch: int, length: int, mesh: Any) -> Step:
    weights = params.abstract(model, mesh)
    lm, cache = stepped.model(model), cache_arrays(model, batch, length, mesh)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=mesh_lib.batch_sharding(mesh))

    def step(weights, tokens_BL, cache):
        nodes = contract.chain(tokens_BL, cache.length_B)
        memory = stepped.Memory(cache, None, cache.length_B)
        memory, seen = lm.step(weights, memory, nodes)
        return lm.head(weights, memory, seen.h_BTD), memory.cache

    function = jax.jit(
        step, donate_argnums=2, out_shardings=(None, jax.tree.map(lambda x: x.sharding, cache))
    )
    parts = {'params': weights, 'cache': cache}
    return Step(function, (weights, tokens, cache), parts, {'tokens': tokens})


def cache_arrays(model: ModelConfig, batch: int, rows: int, mesh: Mesh | AbstractMesh) -> Cache:
    """Returns an abstract cache, sharded over batch and KV heads where they divide."""
    shapes = jax.eval_shape(lambda: cache_lib.init(model, batch, rows))

    def place(leaf):
        axes = _CACHE_AXES[: leaf.ndim] if leaf.ndim > 1 else ('batch',)
        return _array(leaf, mesh_lib.sharding(mesh, axes, leaf.shape))

    return jax.tree.map(place, shapes)


def _array(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
