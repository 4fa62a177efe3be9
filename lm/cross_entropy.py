"""Cross-entropy of hidden states against a table, a chunk of its rows at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import layers

VOCABULARY_CHUNK = 1024


class TokenLosses(NamedTuple):
    """Per token, f32 `[T]`: `-log p(target)` in nats, and the log of the softmax's normaliser."""

    nats: jax.Array
    log_normalizer: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_cross_entropy(
    h_TD: jax.Array,
    table_VD: jax.Array,
    targets_T: jax.Array,
    softcap: float | None = None,
    chunk: int = VOCABULARY_CHUNK,
) -> TokenLosses:
    """Cross-entropy of `h . table` against targets, `chunk` rows of the table at a time.

    Logits of `[T, chunk]` are all that ever exists; the backward pass computes them again. So
    memory does not grow with V, but for the table's own gradient. Sums run in f32.

    Hidden states may as well be `[B, L, D]`, with targets `[B, L]`: sequences that are cut over
    devices cannot be laid end to end without being joined.
    """
    losses, _ = _forward(h_TD, table_VD, targets_T, softcap, chunk)
    return losses


def _chunks(table_VD: jax.Array, chunk: int) -> tuple[jax.Array, int]:
    """Returns the table as `[n, chunk, D]`, zero rows appended, and the chunk size used."""
    v, d = table_VD.shape
    chunk = min(chunk, v)
    n = -(-v // chunk)
    padded = jnp.pad(table_VD, ((0, n * chunk - v), (0, 0))) if n * chunk != v else table_VD
    return padded.reshape(n, chunk, d), chunk


def _chunk_logits(h_TD, rows_CD, first, vocab_size, softcap):
    logits = layers.softcap(layers.einsum('...d,cd->...c', h_TD, rows_CD, jnp.float32), softcap)
    exists = first + jnp.arange(rows_CD.shape[0]) < vocab_size
    return jnp.where(exists, logits, -jnp.inf)


def _forward(h_TD, table_VD, targets_T, softcap, chunk):
    rows_nCD, chunk = _chunks(table_VD, chunk)
    v = table_VD.shape[0]

    def step(carry, inputs):
        highest, total, target = carry
        index, rows_CD = inputs
        logits = _chunk_logits(h_TD, rows_CD, index * chunk, v, softcap)
        new_highest = jnp.maximum(highest, logits.max(-1))
        total = total * jnp.exp(highest - new_highest)
        total += jnp.exp(logits - new_highest[..., None]).sum(-1)
        local = targets_T - index * chunk
        here = (local >= 0) & (local < chunk)
        index_T1 = jnp.clip(local, 0, chunk - 1)[..., None]
        picked = jnp.take_along_axis(logits, index_T1, -1)[..., 0]
        return (new_highest, total, jnp.where(here, picked, target)), None

    zero = jnp.zeros(h_TD.shape[:-1], jnp.float32)
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    indices = jnp.arange(rows_nCD.shape[0])
    (highest, total, target), _ = jax.lax.scan(step, start, (indices, rows_nCD))
    log_normalizer = highest + jnp.log(total)
    losses = TokenLosses(log_normalizer - target, log_normalizer)
    return losses, (h_TD, table_VD, targets_T, log_normalizer)


def _backward(softcap, chunk, saved, cotangent: TokenLosses):
    h_TD, table_VD, targets_T, log_normalizer = saved
    rows_nCD, chunk = _chunks(table_VD, chunk)
    v, d = table_VD.shape
    # d nats/d logit = p - [target], d log_normalizer/d logit = p
    p_weight = cotangent.nats + cotangent.log_normalizer
    by_row = 'tc,td->cd' if h_TD.ndim == 2 else 'blc,bld->cd'

    def step(dh_TD, inputs):
        index, rows_CD = inputs
        logits = _chunk_logits(h_TD, rows_CD, index * chunk, v, softcap)
        d_logits = jnp.exp(logits - log_normalizer[..., None]) * p_weight[..., None]
        is_target = (targets_T - index * chunk)[..., None] == jnp.arange(chunk)
        d_logits -= jnp.where(is_target, cotangent.nats[..., None], 0.0)
        if softcap is not None:
            slope = 1 - (jnp.where(jnp.isfinite(logits), logits, 0.0) / softcap) ** 2
            d_logits *= slope
        d_logits = d_logits.astype(h_TD.dtype)
        dh_TD += layers.einsum('...c,cd->...d', d_logits, rows_CD, jnp.float32)
        d_rows_CD = layers.einsum(by_row, d_logits, h_TD, jnp.float32)
        return dh_TD, d_rows_CD.astype(table_VD.dtype)

    indices = jnp.arange(rows_nCD.shape[0])
    start = jnp.zeros(h_TD.shape, jnp.float32)
    dh_TD, d_rows = jax.lax.scan(step, start, (indices, rows_nCD))
    return dh_TD.astype(h_TD.dtype), d_rows.reshape(-1, d)[:v], None


chunked_cross_entropy.defvjp(_forward, _backward)
