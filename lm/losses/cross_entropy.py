"""Cross-entropy and log-probabilities against a learned table, a chunk of rows at a time."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.losses import online_softmax
from lm.losses.online_softmax import VOCABULARY_CHUNK, Table, TokenLosses
from lm.model import layers


def chunked_cross_entropy(
    h_TD: jax.Array,
    table_VD: jax.Array,
    targets_T: jax.Array,
    softcap: float | None = None,
    chunk: int = VOCABULARY_CHUNK,
    rows: jax.Array | int | None = None,
) -> TokenLosses:
    """Returns the cross-entropy of `h . table` against targets, `chunk` rows at a time.

    See `lm.losses.online_softmax` for the formula, its derivative and an example.

    Args:
      h_TD: hidden states. Or `[B, L, D]` with targets `[B, L]`: flattening sharded sequences would
        gather them.
      table_VD: the output table.
      targets_T: ids.
      softcap: of the logits.
      chunk: rows of the table at a time.
      rows: the softmax runs over this many first rows, by default all; may be traced.
    """
    v = table_VD.shape[0]
    source = _Learned(*online_softmax.chunking(v, chunk), v, softcap)
    arrays = _Arrays(table_VD, rows)
    return online_softmax.token_losses(source, h_TD, arrays, targets_T)


def logprobs(
    h: jax.Array,
    table_VD: jax.Array,
    ids: jax.Array,
    softcap: float | None = None,
    rows: jax.Array | int | None = None,
) -> jax.Array:
    """Returns log-probabilities of ids `[...]` given hidden states `[..., D]`, f32, in nats.

    Only the logits of one chunk of the vocabulary exist at a time, forwards and backwards. If the
    mesh shards sequences, `h` is `[B, L, D]`; otherwise any leading dimensions will do.

    >>> p = jnp.exp(logprobs(jnp.ones((1, 2)), jnp.zeros((4, 2)), jnp.array([3])))
    >>> f'{p[0]:.4f}'  # four equal logits
    '0.2500'
    """
    return -table_losses(h, table_VD, ids, softcap, rows).nats


def table_losses(
    h: jax.Array,
    table_VD: jax.Array,
    ids: jax.Array,
    softcap: float | None = None,
    rows: jax.Array | int | None = None,
) -> TokenLosses:
    """Returns `chunked_cross_entropy` for ids of any shape; a mesh may shard sequences."""
    if mesh.in_use('sequence') > 1:
        return chunked_cross_entropy(h, table_VD, ids, softcap, rows=rows)
    flat = h.reshape(-1, h.shape[-1]), table_VD, ids.reshape(-1)
    losses = chunked_cross_entropy(*flat, softcap, rows=rows)
    return TokenLosses(*(x.reshape(ids.shape) for x in losses))


class _Arrays(NamedTuple):
    """The table or its gradient, and the number of rows in the softmax, or None."""

    table_VD: jax.Array
    rows: jax.Array | int | None


@dataclasses.dataclass(frozen=True)
class _Learned:
    """The one table of all tokens, as `online_softmax.Source`."""

    chunks: int
    chunk: int
    vocab_size: int
    softcap: float | None

    def size(self, arrays: _Arrays) -> jax.Array | int:
        return self.vocab_size if arrays.rows is None else arrays.rows

    def over_tables(self, step, carry, arrays: _Arrays):
        rows_OJD = online_softmax.interleaved(arrays.table_VD, self.chunks, self.chunk)

        def read(index):
            return index + self.chunks * jnp.arange(self.chunk), rows_OJD[:, index]

        def logits(h, rows_OD):
            return layers.einsum('...d,cd->...c', h, rows_OD, jnp.float32)

        def back(h, rows_OD, d_logits, index, gradient_OJD):
            dh = layers.einsum('...c,cd->...d', d_logits, rows_OD, jnp.float32)
            by_row = 'tc,td->cd' if h.ndim == 2 else 'blc,bld->cd'
            d_rows_OD = layers.einsum(by_row, d_logits, h, jnp.float32)
            d_rows_OD = mesh.constrain(d_rows_OD.astype(gradient_OJD.dtype), ('vocab', 'embed'))
            return dh, gradient_OJD.at[:, index].set(d_rows_OD)  # each chunk is visited once

        return step(Table(read, logits, back), carry)

    def no_gradient(self, arrays: _Arrays) -> jax.Array:
        rows_OJD = online_softmax.interleaved(arrays.table_VD, self.chunks, self.chunk)
        return mesh.constrain(jnp.zeros_like(rows_OJD), ('vocab', None, 'embed'))

    def gradient(self, total: jax.Array, arrays: _Arrays) -> _Arrays:
        return _Arrays(online_softmax.joined(total, self.vocab_size), None)
