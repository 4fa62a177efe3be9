"""Cross-entropy against tables that differ from sequence to sequence, and are never held.

Tables of [B, V, D] would not fit: a chunk of rows `[B, C, D]` is drawn, used and forgotten, and
drawn again for the gradient.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.losses.cross_entropy import VOCABULARY_CHUNK, TokenLosses, chunking, interleaved, joined
from lm.model import layers, lexinvariant
from lm.model.config import Config


class _Learned(NamedTuple):
    """Rows of the learned table, and which symbols have drawn ones instead."""

    rows_CD: jax.Array
    drawn_B1C: jax.Array


class _Chunk(NamedTuple):
    """Rows of the tables: ids, drawn rows, and learned ones of a partially lexinvariant model."""

    ids_C: jax.Array
    drawn_BCD: jax.Array
    learned: _Learned | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def cross_entropy(
    config: Config,
    h_BLD: jax.Array,
    learned_VD: jax.Array | None,
    key_B: jax.Array,
    segments_BL: jax.Array,
    targets_BL: jax.Array,
    chunk: int = VOCABULARY_CHUNK,
) -> TokenLosses:
    """Cross-entropy of hidden states against targets, by the table of each token's segment.

    Work grows with the number of segments in the fullest row of the batch. Padding, segment 0, has
    a loss of 0.

    Args:
      config: of a lexinvariant model.
      h_BLD: hidden states.
      learned_VD: the learned table of a partially lexinvariant model, None otherwise.
      key_B: of the rows, as `lexinvariant.embed` had them.
      segments_BL: int32, the segment of each token in its row, from 1.
      targets_BL: ids.
      chunk: rows of the tables at a time.
    """
    return _forward(config, h_BLD, learned_VD, key_B, segments_BL, targets_BL, chunk)[0]


def _chunk(config: Config, learned_CnD, key_B, row_BV, index, n: int, size: int) -> _Chunk:
    ids_C = index + n * jnp.arange(size)  # as `cross_entropy.interleaved` has them
    known_C = jnp.minimum(ids_C, config.vocab_size - 1)  # there may be more than V
    drawn_BCD = lexinvariant.rows(config, key_B, row_BV, known_C)
    if learned_CnD is None:
        return _Chunk(ids_C, drawn_BCD, None)
    ids_BC = jnp.broadcast_to(known_C, drawn_BCD.shape[:2])
    choice_B1C = lexinvariant.is_drawn(config, key_B[:, None], ids_BC)[:, None]
    return _Chunk(ids_C, drawn_BCD, _Learned(learned_CnD[:, index], choice_B1C))


def _logits(config: Config, h_BLD: jax.Array, rows: _Chunk) -> jax.Array:
    logits = layers.einsum('bld,bcd->blc', h_BLD, rows.drawn_BCD, jnp.float32)
    if rows.learned is not None:
        fixed = layers.einsum('bld,cd->blc', h_BLD, rows.learned.rows_CD, jnp.float32)
        logits = jnp.where(rows.learned.drawn_B1C, logits, fixed)
    logits = layers.softcap(logits, config.logit_softcap)
    return jnp.where(rows.ids_C < config.vocab_size, logits, -jnp.inf)


def _chunked(learned_VD: jax.Array | None, n: int, chunk: int) -> jax.Array | None:
    return None if learned_VD is None else interleaved(learned_VD, n, chunk)


def _forward(config, h_BLD, learned_VD, key_B, segments_BL, targets_BL, chunk):
    n, chunk = chunking(config.vocab_size, chunk)
    learned_CnD = _chunked(learned_VD, n, chunk)

    def one_segment(segment, carry):
        keys_B = lexinvariant.of_segment(key_B, segment)
        row_BV = lexinvariant.order(config, keys_B)
        here_BL = segments_BL == segment

        def step(carry, index):
            highest, total, target = carry
            rows = _chunk(config, learned_CnD, keys_B, row_BV, index, n, chunk)
            logits = _logits(config, h_BLD, rows)
            new_highest = jnp.maximum(highest, logits.max(-1))
            new_total = total * jnp.exp(highest - new_highest)
            new_total += jnp.exp(logits - new_highest[..., None]).sum(-1)
            is_target = targets_BL[..., None] == rows.ids_C
            return (
                jnp.where(here_BL, new_highest, highest),
                jnp.where(here_BL, new_total, total),
                target + jnp.where(here_BL, jnp.where(is_target, logits, 0).sum(-1), 0),
            ), None

        return jax.lax.scan(step, carry, jnp.arange(n))[0]

    zero = jnp.zeros(targets_BL.shape, jnp.float32)
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    last = segments_BL.max() + 1
    highest, total, target = jax.lax.fori_loop(1, last, one_segment, start)
    real_BL = segments_BL > 0
    normalizer_BL = jnp.where(real_BL, highest + jnp.log(jnp.where(real_BL, total, 1)), 0)
    losses = TokenLosses(normalizer_BL - target, normalizer_BL)
    return losses, (h_BLD, learned_VD, key_B, segments_BL, targets_BL, normalizer_BL)


def _backward(config, chunk, saved, cotangent: TokenLosses):
    h_BLD, learned_VD, key_B, segments_BL, targets_BL, normalizer_BL = saved
    n, chunk = chunking(config.vocab_size, chunk)
    learned_CnD = _chunked(learned_VD, n, chunk)
    # d nats/d logit = p - [target], d log_normalizer/d logit = p
    p_weight = cotangent.nats + cotangent.log_normalizer

    def one_segment(segment, carry):
        keys_B = lexinvariant.of_segment(key_B, segment)
        row_BV = lexinvariant.order(config, keys_B)
        here_BL1 = (segments_BL == segment)[..., None]

        def step(carry, index):
            dh_BLD, d_learned_CnD = carry
            rows = _chunk(config, learned_CnD, keys_B, row_BV, index, n, chunk)
            logits = _logits(config, h_BLD, rows)
            d_logits = jnp.exp(logits - normalizer_BL[..., None]) * p_weight[..., None]
            is_target = targets_BL[..., None] == rows.ids_C
            d_logits -= jnp.where(is_target, cotangent.nats[..., None], 0.0)
            if config.logit_softcap is not None:
                finite = jnp.where(jnp.isfinite(logits), logits, 0.0)
                d_logits *= 1 - (finite / config.logit_softcap) ** 2
            d_logits = jnp.where(here_BL1, d_logits, 0).astype(h_BLD.dtype)
            dh, d_rows_CD = _through(h_BLD, rows, d_logits)
            if d_rows_CD is not None:
                d_learned_CnD = d_learned_CnD.at[:, index].add(d_rows_CD)
            return (dh_BLD + dh, d_learned_CnD), None

        return jax.lax.scan(step, carry, jnp.arange(n))[0]

    start = jnp.zeros(h_BLD.shape, jnp.float32)
    d_learned_CnD = None
    if learned_VD is not None:
        d_learned_CnD = jnp.zeros((chunk, n, h_BLD.shape[-1]), jnp.float32)
        d_learned_CnD = mesh.constrain(d_learned_CnD, ('vocab', None, 'embed'))
    last = segments_BL.max() + 1
    dh_BLD, d_learned_CnD = jax.lax.fori_loop(1, last, one_segment, (start, d_learned_CnD))
    d_learned_VD = None
    if learned_VD is not None:
        d_learned_VD = joined(d_learned_CnD, config.vocab_size).astype(learned_VD.dtype)
    return dh_BLD.astype(h_BLD.dtype), d_learned_VD, None, None, None


def _through(
    h_BLD: jax.Array, rows: _Chunk, d_logits: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the gradients of hidden states, f32, and of the learned rows."""
    if rows.learned is None:
        return layers.einsum('blc,bcd->bld', d_logits, rows.drawn_BCD, jnp.float32), None
    d_drawn = jnp.where(rows.learned.drawn_B1C, d_logits, 0)
    d_fixed = jnp.where(rows.learned.drawn_B1C, 0, d_logits)
    dh_BLD = layers.einsum('blc,cd->bld', d_fixed, rows.learned.rows_CD, jnp.float32)
    dh_BLD += layers.einsum('blc,bcd->bld', d_drawn, rows.drawn_BCD, jnp.float32)
    d_rows_CD = layers.einsum('blc,bld->cd', d_fixed, h_BLD, jnp.float32)
    return dh_BLD, mesh.constrain(d_rows_CD, ('vocab', 'embed'))


cross_entropy.defvjp(_forward, _backward)
