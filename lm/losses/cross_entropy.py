"""Cross-entropy of hidden states against a table, a chunk of its rows at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.model import layers

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


def chunking(vocab_size: int, chunk: int) -> tuple[int, int]:
    """Returns how many chunks a table is read in, and rows of each: without padding where possible.

    Chunk i of n has the rows i, i + n, i + 2n and so on. So the rows of one device are a part of
    every chunk, and each device reads its own; of chunks of neighbouring rows, each would have to
    be sent to all.
    """
    chunk = min(chunk, vocab_size)
    least = -(-vocab_size // chunk)
    n = next((n for n in range(least, 2 * least) if vocab_size % n == 0), None)
    return (least, chunk) if n is None else (n, vocab_size // n)


def interleaved(table_VD: jax.Array, n: int, chunk: int) -> jax.Array:
    """Returns the table as `[C, n, D]`, zero rows appended: chunk i is `[:, i]`. No copy."""
    v, d = table_VD.shape
    padded = jnp.pad(table_VD, ((0, n * chunk - v), (0, 0))) if n * chunk != v else table_VD
    return mesh.constrain(padded.reshape(chunk, n, d), ('vocab', None, None))


def joined(rows_CnD: jax.Array, vocab_size: int) -> jax.Array:
    """Returns the table that `interleaved` took apart."""
    table_VD = rows_CnD.reshape(-1, rows_CnD.shape[-1])[:vocab_size]
    return mesh.constrain(table_VD, ('vocab', 'embed'))


def _chunk_logits(h_TD, rows_CD, ids_C, vocab_size, softcap):
    logits = layers.softcap(layers.einsum('...d,cd->...c', h_TD, rows_CD, jnp.float32), softcap)
    return jnp.where(ids_C < vocab_size, logits, -jnp.inf)


def _forward(h_TD, table_VD, targets_T, softcap, chunk):
    v = table_VD.shape[0]
    n, chunk = chunking(v, chunk)
    rows_CnD = interleaved(table_VD, n, chunk)

    def step(carry, index):
        highest, total, target = carry
        ids_C = index + n * jnp.arange(chunk)
        logits = _chunk_logits(h_TD, rows_CnD[:, index], ids_C, v, softcap)
        new_highest = jnp.maximum(highest, logits.max(-1))
        total = total * jnp.exp(highest - new_highest)
        total += jnp.exp(logits - new_highest[..., None]).sum(-1)
        # a sum and no look-up: each device has some of the columns
        target += jnp.where(targets_T[..., None] == ids_C, logits, 0.0).sum(-1)
        return (new_highest, total, target), None

    zero = jnp.zeros(h_TD.shape[:-1], jnp.float32)
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    (highest, total, target), _ = jax.lax.scan(step, start, jnp.arange(n))
    log_normalizer = highest + jnp.log(total)
    losses = TokenLosses(log_normalizer - target, log_normalizer)
    return losses, (h_TD, table_VD, targets_T, log_normalizer)


def _backward(softcap, chunk, saved, cotangent: TokenLosses):
    h_TD, table_VD, targets_T, log_normalizer = saved
    v = table_VD.shape[0]
    n, chunk = chunking(v, chunk)
    rows_CnD = interleaved(table_VD, n, chunk)
    # d nats/d logit = p - [target], d log_normalizer/d logit = p
    p_weight = cotangent.nats + cotangent.log_normalizer
    by_row = 'tc,td->cd' if h_TD.ndim == 2 else 'blc,bld->cd'

    def step(carry, index):
        dh_TD, d_rows_CnD = carry
        rows_CD = rows_CnD[:, index]
        ids_C = index + n * jnp.arange(chunk)
        logits = _chunk_logits(h_TD, rows_CD, ids_C, v, softcap)
        d_logits = jnp.exp(logits - log_normalizer[..., None]) * p_weight[..., None]
        d_logits -= jnp.where(targets_T[..., None] == ids_C, cotangent.nats[..., None], 0.0)
        if softcap is not None:
            slope = 1 - (jnp.where(jnp.isfinite(logits), logits, 0.0) / softcap) ** 2
            d_logits *= slope
        d_logits = d_logits.astype(h_TD.dtype)
        dh_TD += layers.einsum('...c,cd->...d', d_logits, rows_CD, jnp.float32)
        d_rows_CD = layers.einsum(by_row, d_logits, h_TD, jnp.float32)
        d_rows_CD = mesh.constrain(d_rows_CD.astype(table_VD.dtype), ('vocab', 'embed'))
        return (dh_TD, d_rows_CnD.at[:, index].set(d_rows_CD)), None

    empty = mesh.constrain(jnp.zeros_like(rows_CnD), ('vocab', None, 'embed'))
    start = (jnp.zeros(h_TD.shape, jnp.float32), empty)
    (dh_TD, d_rows_CnD), _ = jax.lax.scan(step, start, jnp.arange(n))
    return dh_TD.astype(h_TD.dtype), joined(d_rows_CnD, v), None


chunked_cross_entropy.defvjp(_forward, _backward)
