"""The adapter of an early exit: one attention block, in place of the layers above (Kangaroo)."""

import dataclasses

import jax
import jax.numpy as jnp

from lm.attention.attention import attention
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.model import cache as cache_lib
from lm.model import layers as layers_lib
from lm.model import rope, tables, transformer
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params


def init(key: jax.Array, config: Config) -> Params:
    """Returns an adapter: one attention block without MLP, and the norm before the output table.

    It starts as a plain early exit: attention adds nothing until `wo` is trained.

    Args:
      key: for the initial values.
      config: of the target.
    """
    d, h, k, c = config.d_model, config.n_heads, config.n_kv_heads, config.head_dim
    dtype = jnp.dtype(config.param_dtype)
    one = jnp.full(d, 0.0 if config.unit_offset else 1.0, dtype)
    shapes = {'wq_DHC': (d, h, c), 'wk_DKC': (d, k, c), 'wv_DKC': (d, k, c)}
    keys = jax.random.split(key, len(shapes))
    normal = {
        name: (jax.random.normal(key, shape) * d**-0.5).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    wo_HCD = jnp.zeros((h, c, d), dtype)
    return {'attention_norm_D': one, **normal, 'wo_HCD': wo_HCD, 'final_norm_D': one}


def adapt(
    adapter: Params,
    config: Config,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    *,
    segments_BL: jax.Array | None = None,
    cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Returns hidden states ready for `unembed`, and the adapter's longer cache of one layer.

    Args:
      adapter: see `init`.
      config: of the target.
      x_BLD: the stream after the target's first layers, of L new nodes.
      positions_BL, segments_BL: as for `transformer.body`.
      cache: what the nodes also see; they are appended to it.
    """

    def norm(x, name):
        return layers_lib.rms_norm(x, adapter[name], config.norm_epsilon, config.unit_offset)

    frequencies = jnp.asarray(rope.frequencies(one_layer(config)))[0]
    y_BLD = norm(x_BLD, 'attention_norm_D')
    q_BLHC = layers_lib.einsum('bld,dhc->blhc', y_BLD, adapter['wq_DHC'])
    k_BLKC = layers_lib.einsum('bld,dkc->blkc', y_BLD, adapter['wk_DKC'])
    v_BLKC = layers_lib.einsum('bld,dkc->blkc', y_BLD, adapter['wv_DKC'])
    q_BLHC = rope.rotate(q_BLHC, positions_BL, frequencies)
    k = rope.rotate(k_BLKC, positions_BL, frequencies).swapaxes(1, 2)
    v = v_BLKC.swapaxes(1, 2)
    mask = Mask(positions_BL, positions_BL[:, None], segments_BL, segments_BL)
    if cache is not None:
        start_B = cache.length_B
        cache = cache_lib.write_positions(cache, positions_BL)
        k = cache_lib.write(cache.k_NBKSC, 0, start_B, k)
        v = cache_lib.write(cache.v_NBKSC, 0, start_B, v)
        cache = dataclasses.replace(cache, k_NBKSC=k, v_NBKSC=v)
        mask = Mask(positions_BL, cache.position_NBKS[0], length=cache.length_B)
    layer = None if cache is None else 0
    out_BLHC = attention(
        q_BLHC, k, v, mask, Scoring(config.head_dim**-0.5), layer=layer, ring=config.ring
    )
    x_BLD += layers_lib.einsum('blhc,hcd->bld', out_BLHC, adapter['wo_HCD'])
    return norm(x_BLD, 'final_norm_D'), cache


def loss(
    adapter: Params,
    params: Params,
    config: Config,
    layers: int,
    batch: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross-entropy of the adapter to the target, `-sum p_target log p_adapter`.

    Args:
      adapter: what is trained.
      params, config: the target, which stays as it is.
      layers: E, layers of the target below the adapter.
      batch: packed text as `lm.data.documents` makes it: `tokens`, `positions`, `segments`,
        `weights`.

    Returns:
      The mean in nats per token, and sums for metrics, as `lm.losses.next_token.next_token_loss`.
    """
    positions_BL, segments_BL = batch['positions'], batch['segments']
    body, table = params['body'], params['tables']
    mask = Mask(positions_BL, positions_BL[:, None], segments_BL, segments_BL)
    x_BLD = tables.embed(table, config, batch['tokens'])
    exit_BLD, _ = transformer.blocks(body, config, x_BLD, mask, only=(0, layers))
    x_BLD, _ = transformer.blocks(body, config, exit_BLD, mask, only=(layers, config.n_layers))
    target_BLV = tables.unembed(table, config, transformer.final_norm(body, config, x_BLD))
    exit_BLD, target_BLV = jax.lax.stop_gradient((exit_BLD, target_BLV))
    h_BLD, _ = adapt(adapter, config, exit_BLD, positions_BL, segments_BL=segments_BL)
    logprob_BLV = jax.nn.log_softmax(tables.unembed(table, config, h_BLD))
    nats_BL = -jnp.sum(jax.nn.softmax(target_BLV) * logprob_BLV, axis=-1)
    weights = batch['weights']
    nats = jnp.sum(nats_BL * weights)
    return nats / jnp.maximum(weights.sum(), 1.0), {'nats': nats, 'tokens': weights.sum()}


def one_layer(config: Config) -> Config:
    """Returns the shape of the adapter's attention and of its cache: it sees all keys."""
    return dataclasses.replace(config, n_layers=1, window=None)
