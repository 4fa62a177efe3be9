"""The decoder transformer as pure functions: the body, and what joins it with its tables.

    tokens_BL -- embed --> x_BLD -- body --> h_BLD -- unembed --> logits_BLV

The body knows nothing of tokens: other tables may stand before and after it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.attention.attention import attention
from lm.devices import mesh
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.model import cache as cache_lib
from lm.model import layers, rope, tables
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params

ACTIVATIONS = ('batch', 'length', 'embed')


def body(
    params: Params,
    config: Config,
    x_BLD: jax.Array,
    positions_BL: jax.Array,
    *,
    segments_BL: jax.Array | None = None,
    ancestors_BLW: jax.Array | None = None,
    nodes: int | None = None,
    cache: Cache | None = None,
    causal: bool = True,
) -> tuple[jax.Array, Cache | None]:
    """Runs the blocks and the final norm.

    Args:
      params: the `body` part of the parameters.
      x_BLD: vectors of L new nodes.
      positions_BL: int32, each node's position in its text.
      segments_BL: int32; without a cache, nodes of different segments do not see each other.
      ancestors_BLW: which nodes of a draft tree each new node sees, itself included, as packed
        bits (`lm.kernels.mask.pack_bits`); all those of no later position where not given. With
        it, one call verifies a draft tree.
      nodes: nodes of the tree, the last rows of the cache with the L new ones; L by default.
      cache: what the nodes also see; they are appended to it.
      causal: whether positions forbid looking ahead.

    Returns:
      Hidden states `[B, L, D]`, ready for `unembed`, and the longer cache.
    """
    mask = Mask(
        positions_BL, positions_BL[:, None], segments_BL, segments_BL, None, ancestors_BLW,
        causal=causal, nodes=nodes,
    )  # fmt: skip
    if cache is not None:
        cache = cache_lib.write_positions(cache, positions_BL)
        mask = dataclasses.replace(mask, query_segment=None, key_segment=None)
    x_BLD, cache = blocks(params, config, x_BLD, mask, cache)
    return final_norm(params, config, x_BLD), cache


def final_norm(params: Params, config: Config, x_BLD: jax.Array) -> jax.Array:
    """Returns hidden states, ready for `unembed`, from what the blocks left."""
    return layers.rms_norm(x_BLD, params['final_norm_D'], config.norm_epsilon, config.unit_offset)


def blocks(
    params: Params,
    config: Config,
    x_BLD: jax.Array,
    mask: Mask,
    cache: Cache | None = None,
    only: tuple[int, int] | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Runs all blocks, or those of a range, without the final norm.

    Args:
      params, config, x_BLD: see `body`.
      mask: over the new nodes alone; with a cache, its keys and length are the cache's own.
      cache: its last L rows in use are those of the new nodes, with their positions written
        (`cache.write_positions`) and their keys and values yet to be.
      only: first block and one past the last; reads and writes just their rows of the cache.

    Returns:
      The stream after the last block `[B, L, D]`, and the cache with the rows filled in.
    """
    positions_BL = mask.query_position
    start_B: Any = None if cache is None else cache.length_B - positions_BL.shape[1]
    scoring = Scoring(config.query_scale, config.attention_softcap)
    look = functools.partial(attention, scoring=scoring, ring=config.ring)

    def run_block(carry, inputs):
        (x_BLD, kv), (layer, block_params, frequencies, window) = carry, inputs
        x_BLD = mesh.constrain(x_BLD, ACTIVATIONS)
        layer_mask = _mask_of_layer(mask, cache, layer, None if config.window is None else window)

        def attend(q_BLHC, k_BLKC, v_BLKC):
            q_BLHC = rope.rotate(q_BLHC, positions_BL, frequencies)
            k_BKLC = rope.rotate(k_BLKC, positions_BL, frequencies).swapaxes(1, 2)
            v_BKLC = v_BLKC.swapaxes(1, 2)
            if kv is None:
                return look(q_BLHC, k_BKLC, v_BKLC, layer_mask), None
            k_NBKSC = cache_lib.write(kv[0], layer, start_B, k_BKLC)
            v_NBKSC = cache_lib.write(kv[1], layer, start_B, v_BKLC)
            out_BLHC = look(q_BLHC, k_NBKSC, v_NBKSC, layer_mask, layer=layer)
            return out_BLHC, (k_NBKSC, v_NBKSC)

        return block(block_params, config, x_BLD, attend), None

    if config.remat:
        run_block = jax.checkpoint(run_block)
    kv = None if cache is None else (cache.k_NBKSC, cache.v_NBKSC)
    carry = x_BLD, kv
    if isinstance(params['layers'], tuple):  # `weights_first.prepare`
        for inputs in list(zip(*_per_layer(params, config)))[slice(*(only or (None,)))]:
            carry, _ = run_block(carry, inputs)
    else:
        per_layer = _per_layer(params, config)
        if only is not None:
            per_layer = jax.tree.map(lambda x: x[slice(*only)], per_layer)
        carry, _ = jax.lax.scan(run_block, carry, per_layer, unroll=config.unroll)
    x_BLD, kv = carry
    if cache is not None and kv is not None:
        cache = dataclasses.replace(cache, k_NBKSC=kv[0], v_NBKSC=kv[1])
    return x_BLD, cache


def _per_layer(params: Params, config: Config) -> tuple[Any, ...]:
    """Returns what differs between layers, stacked: index, parameters, RoPE and window.

    Windows and frequencies are data, so that one scanned block serves layers of both kinds.
    """
    unlimited = jnp.iinfo(jnp.int32).max
    windows = [config.window if w else unlimited for w in config.windowed_layers]
    return (
        np.arange(config.n_layers),
        params['layers'],
        rope.frequencies(config),
        np.asarray(windows, np.int32),
    )


def _mask_of_layer(mask: Mask, cache: Cache | None, layer, window) -> Mask:
    """Returns the mask with a layer's own window, over its own rows of the cache."""
    if cache is None:
        return dataclasses.replace(mask, window=window)
    keys = cache.position_NBKS[layer]
    return dataclasses.replace(mask, key_position=keys, length=cache.length_B, window=window)


def block(p: Params, config: Config, x_BLD: jax.Array, attend: Any) -> tuple[jax.Array, Any]:
    """One block: attention and gated MLP, each behind a norm, added to the stream.

    `attend(q_BLHC, k_BLKC, v_BLKC) -> (out_BLHC, state)` decides what the nodes see.
    """

    def norm(x, name):
        return layers.rms_norm(x, p[name], config.norm_epsilon, config.unit_offset)

    y_BLD = norm(x_BLD, 'attention_norm_ND')
    q_BLHC, k_BLKC, v_BLKC = layers.project(y_BLD, p, 'wq_NDHC', 'wk_NDKC', 'wv_NDKC')
    if config.qkv_bias:
        q_BLHC += p['bq_NHC'].astype(q_BLHC.dtype)
        k_BLKC += p['bk_NKC'].astype(k_BLKC.dtype)
        v_BLKC += p['bv_NKC'].astype(v_BLKC.dtype)
    if config.qk_norm:
        q_BLHC, k_BLKC = norm(q_BLHC, 'q_norm_NC'), norm(k_BLKC, 'k_norm_NC')
    out_BLHC, state = attend(q_BLHC, k_BLKC, v_BLKC)
    y_BLD = layers.einsum('blhc,hcd->bld', out_BLHC, p['wo_NHCD'])
    x_BLD += norm(y_BLD, 'post_attention_norm_ND') if config.post_norm else y_BLD
    y_BLD = layers.gated_mlp(norm(x_BLD, 'mlp_norm_ND'), p, config.activation)
    x_BLD += norm(y_BLD, 'post_mlp_norm_ND') if config.post_norm else y_BLD
    return x_BLD, state


def forward(
    params: Params,
    config: Config,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None = None,
    segments_BL: jax.Array | None = None,
) -> jax.Array:
    """Returns logits f32 `[B, L, V]` of whole texts; positions count from 0 by default."""
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    x_BLD = tables.embed(params['tables'], config, tokens_BL)
    h_BLD, _ = body(params['body'], config, x_BLD, positions_BL, segments_BL=segments_BL)
    return tables.unembed(params['tables'], config, h_BLD)


def step(
    params: Params,
    config: Config,
    tokens_BL: jax.Array,
    cache: Cache,
    *,
    positions_BL: jax.Array | None = None,
    ancestors_BLW: jax.Array | None = None,
    nodes: int | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs L new nodes against a cache: prefill, decoding and the verification of draft trees.

    Args:
      tokens_BL: the new nodes' tokens.
      cache: what each row has read so far; rows may have different lengths.
      positions_BL: by default the nodes continue each row as a chain.
      ancestors_BLW, nodes: see `body`.

    Returns:
      Logits f32 `[B, L, V]` after each node, and the cache with L more rows. To take nodes back
      afterwards, `cache.truncate` it.
    """
    if positions_BL is None:
        positions_BL = cache.length_B[:, None] + jnp.arange(tokens_BL.shape[1])
    x_BLD = tables.embed(params['tables'], config, tokens_BL)
    h_BLD, longer = body(
        params['body'], config, x_BLD, positions_BL, ancestors_BLW=ancestors_BLW, nodes=nodes,
        cache=cache,
    )  # fmt: skip
    assert longer is not None
    return tables.unembed(params['tables'], config, h_BLD), longer
