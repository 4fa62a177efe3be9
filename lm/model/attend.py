"""Attention as an argument of `lm.model.transformer.blocks`: the keys that a layer's nodes see.

An `Attend` takes the queries, keys and values of one layer, before RoPE, and a carry that passes
from layer to layer. This file has the two that every model needs: `among`, over the new nodes
alone, and `cached`, over a key/value cache. Cache policies and other mixers are functions of the
same type.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lm.attention.attention import attention, attention_and_lse, column_sums
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.model import cache as cache_lib
from lm.model import rope
from lm.model.cache import Cache
from lm.model.config import Config


class Layer(NamedTuple):
    """The properties of a layer besides its parameters; data, so that one scan serves all.

    Attributes:
      number: of the layer, from 0.
      frequencies: of RoPE, f32 `[C / 2]`.
      window: int32, distance below which keys are seen; None if no layer has a window.
    """

    number: jax.Array | int
    frequencies: jax.Array
    window: jax.Array | None


class Attended(NamedTuple):
    """Attention's output, `[B, L, H, C]`, and the carry for the next layer."""

    out_BLHC: jax.Array
    carry: Any


class Attend(Protocol):
    """Returns attention's output for the queries of one layer."""

    def __call__(
        self, layer: Layer, q_BLHC: jax.Array, k_BLKC: jax.Array, v_BLKC: jax.Array, carry: Any,
        **extra: Any,
    ) -> Attended: ...  # fmt: skip


class OverCache(Protocol):
    """Makes the attention of a pass over a cache; see `cached` for the arguments.

    The carry is `Rows`: its keys and values become the cache's, and its mass is reported.
    """

    def __call__(
        self, config: Config, mask: Mask, cache: Cache, counted_BL: jax.Array | None = None,
        **extra: Any,
    ) -> Attend: ...  # fmt: skip


class Rows(NamedTuple):
    """The carry of `cached`; a pass over the layers fills it.

    Attributes:
      k_NBKSC, v_NBKSC: of the cache.
      mass_NBKS: f32, attention that each row received; None if not asked for.
    """

    k_NBKSC: jax.Array
    v_NBKSC: jax.Array
    mass_NBKS: jax.Array | None = None


def among(config: Config, mask: Mask) -> Attend:
    """Returns attention among the new nodes, without a carry.

    Args:
      config: of the model: scale, soft cap and ring of its attention.
      mask: over the new nodes.
    """
    look: Any = functools.partial(attention, scoring=_scoring(config), ring=config.ring)

    def attend(layer, q_BLHC, k_BLKC, v_BLKC, carry, **extra):
        q_BLHC, k_BKLC = _rotated(layer, mask, q_BLHC, k_BLKC)
        seen = dataclasses.replace(mask, window=layer.window)
        return Attended(look(q_BLHC, k_BKLC, v_BLKC.swapaxes(1, 2), seen), carry)

    return attend


def cached(
    config: Config, mask: Mask, cache: Cache, counted_BL: jax.Array | None = None, **extra: Any
) -> Attend:
    """Returns attention over a cache, after writing the new nodes into it; the carry is `Rows`.

    Args:
      config: see `among`.
      mask: queries, and ancestors of a draft tree; keys, length and window are the cache's own.
      cache: its last L rows are those of the new nodes, with their positions written.
      counted_BL: bool, the nodes whose attention `mass_NBKS` counts; all by default.
    """
    scoring = _scoring(config)
    if counted_BL is None:
        counted_BL = jnp.ones(mask.query_position.shape, bool)
    start_B = cache.length_B - mask.query_position.shape[1]

    def attend(layer, q_BLHC, k_BLKC, v_BLKC, carry, **extra):
        q_BLHC, k_BKLC = _rotated(layer, mask, q_BLHC, k_BLKC)
        k_NBKSC = cache_lib.write(carry.k_NBKSC, layer.number, start_B, k_BKLC)
        v_NBKSC = cache_lib.write(carry.v_NBKSC, layer.number, start_B, v_BLKC.swapaxes(1, 2))
        seen = dataclasses.replace(
            mask, key_position=cache.position_NBKS[layer.number], length=cache.length_B,
            window=layer.window, query_segment=None, key_segment=None,
        )  # fmt: skip
        out_BLHC, lse_BLH = attention_and_lse(
            q_BLHC, k_NBKSC, v_NBKSC, seen, scoring, layer=layer.number, ring=config.ring
        )
        mass_NBKS = carry.mass_NBKS
        if mass_NBKS is not None:
            mass_BKS = column_sums(
                q_BLHC, k_NBKSC, lse_BLH, seen, counted_BL, scoring, layer=layer.number
            )
            mass_NBKS = mass_NBKS.at[layer.number].set(mass_BKS)
        return Attended(out_BLHC, Rows(k_NBKSC, v_NBKSC, mass_NBKS))

    return attend


def _scoring(config: Config) -> Scoring:
    return Scoring(config.query_scale, config.attention_softcap)


def _rotated(layer: Layer, mask: Mask, q_BLHC: jax.Array, k_BLKC: jax.Array):
    """Returns rotated queries, and rotated keys with the head axis first: `[B, K, L, C]`."""
    q_BLHC = rope.rotate(q_BLHC, mask.query_position, layer.frequencies)
    k_BLKC = rope.rotate(k_BLKC, mask.query_position, layer.frequencies)
    return q_BLHC, k_BLKC.swapaxes(1, 2)
