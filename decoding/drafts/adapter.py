"""The adapter of an early exit: one attention block in place of the layers above.

Liu et al. 2024, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting" (arXiv
2404.18911).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.losses.loss import Loss, Sum
from lm.model import leaves as leaves_lib
from lm.model import params as params_lib
from lm.model import stepped, transformer
from lm.model.config import Config
from lm.model.contract import Ask, Model, Nodes
from lm.model.leaves import Params


def init(key: jax.Array, config: Config) -> Params:
    """Returns the initial parameters: a body of one attention block, without an MLP.

    It starts as a plain early exit: attention adds nothing until `wo_NHCD` is trained.

    Args:
      key: for the initial values.
      config: of the target.
    """
    return leaves_lib.initial(leaves(config), config.param_dtype, key)


def leaves(config: Config) -> dict[str, Any]:
    """Returns the nested dict of `Leaf`s of an adapter.

    Args:
      config: of the target.
    """
    body = params_lib.leaves(one_layer(config))['body']
    names = ('attention_norm_ND', 'wq_NDHC', 'wk_NDKC', 'wv_NDKC', 'wo_NHCD')
    layers = {name: body['layers'][name] for name in names}
    layers['wo_NHCD'] = layers['wo_NHCD']._replace(scale=None)  # starts at zero
    return {**body, 'layers': layers}


def model(config: Config) -> Model:
    """Returns the adapter under the contract: its nodes are vectors, and it has no head.

    Args:
      config: of the target, whose head reads the adapter's hidden states.
    """
    return stepped.model(one_layer(config), mlp=None)


def as_params(adapter: Params) -> Params:
    """Returns an adapter as the parameters of its `model`."""
    return {'body': adapter, 'tables': {}}


def one_layer(config: Config) -> Config:
    """Returns the config of the adapter's block, which sees all keys and adds plain attention."""
    return Config(
        config.vocab_size, config.d_model, 1, config.n_heads, config.n_kv_heads, config.head_dim,
        config.d_ff, config.max_length, norm_epsilon=config.norm_epsilon,
        unit_offset=config.unit_offset, rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling, dtype=config.dtype, param_dtype=config.param_dtype,
        ring=config.ring,
    )  # fmt: skip


def loss(
    adapter: Params, params: Params, config: Config, layers: int, batch: dict[str, jax.Array]
) -> Loss:
    """Returns the adapter's cross-entropy to the target, `-sum p_target log p_adapter`.

    Args:
      adapter: the trained parameters.
      params, config: the target, which is not trained.
      layers: E, layers of the target below the adapter.
      batch: packed text as `lm.data.batches` makes it: `tokens`, `positions`, `segments`,
        `weights`.

    Returns:
      The mean in nats per token; reports `nats_per_token`.
    """
    nodes, segments_BL = Nodes(batch['tokens'], batch['positions']), batch['segments']
    seen = transformer.read(params, config, nodes, segments_BL, ask=Ask((layers - 1,)))
    seen = jax.lax.stop_gradient(seen)
    nodes = nodes._replace(x_BTD=seen.layers[layers - 1])
    own = transformer.read(as_params(adapter), one_layer(config), nodes, segments_BL, mlp=None)
    logits = functools.partial(transformer.head, params, config)
    target_BLV = jax.nn.softmax(jax.lax.stop_gradient(logits(seen.h_BTD)))
    nats_BL = -jnp.sum(target_BLV * jax.nn.log_softmax(logits(own.h_BTD)), axis=-1)
    weights = batch['weights']
    nats = jnp.sum(nats_BL * weights)
    count = weights.sum()
    return Loss(nats / jnp.maximum(count, 1.0), {'nats_per_token': Sum(nats, count)})
