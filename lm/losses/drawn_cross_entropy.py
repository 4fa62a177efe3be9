"""Cross-entropy against tables that differ by segment and are never materialised.

Tables of `[B, V, D]` would not fit in memory: a chunk of rows `[B, O, D]` is drawn, used and
dropped, and drawn again in the backward pass (`lm.losses.online_softmax` has the formulas).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.losses import online_softmax
from lm.losses.online_softmax import VOCABULARY_CHUNK, Table, TokenLosses
from lm.model import layers, lexinvariant
from lm.model.config import Config


def cross_entropy(
    config: Config,
    h_BLD: jax.Array,
    learned_VD: jax.Array | None,
    key_B: jax.Array,
    segments_BL: jax.Array,
    targets_BL: jax.Array,
    chunk: int = VOCABULARY_CHUNK,
) -> TokenLosses:
    """Returns the cross-entropy of hidden states against targets, by each segment's own table.

    Work grows with the number of segments in the row that has the most. Padding, segment 0, has a
    loss of 0.

    Args:
      config: of a lexinvariant model.
      h_BLD: hidden states.
      learned_VD: the learned table of a partially lexinvariant model, None otherwise.
      key_B: of the rows, the same as for `lexinvariant.embed`.
      segments_BL: int32, the segment of each token in its row, from 1.
      targets_BL: ids.
      chunk: rows of the tables at a time.
    """
    source = _Drawn(config, *online_softmax.chunking(config.vocab_size, chunk))
    arrays = _Arrays(learned_VD, key_B, segments_BL)
    return online_softmax.token_losses(source, h_BLD, arrays, targets_BL)


class _Arrays(NamedTuple):
    """The inputs of the tables, or their gradient, with None for keys and segments.

    The learned table is None if every row is drawn.
    """

    learned_VD: jax.Array | None
    key_B: Any
    segments_BL: Any


class _Learned(NamedTuple):
    """Rows of the learned table, and a mask of the symbols with drawn rows."""

    rows_OD: jax.Array
    is_drawn_B1O: jax.Array


class _Rows(NamedTuple):
    """A chunk of the B tables: drawn rows, and learned ones of a partially lexinvariant model."""

    drawn_BOD: jax.Array
    learned: _Learned | None


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The tables of all segments, as `online_softmax.Source`: segment s of each row at once."""

    config: Config
    chunks: int
    chunk: int

    @property
    def softcap(self) -> float | None:
        return self.config.logit_softcap

    def size(self, arrays: _Arrays) -> int:
        del arrays
        return self.config.vocab_size

    def over_tables(self, step, carry, arrays: _Arrays):
        learned_OJD = None
        if arrays.learned_VD is not None:
            learned_OJD = online_softmax.interleaved(arrays.learned_VD, self.chunks, self.chunk)

        def one_segment(segment, carry):
            keys_B = lexinvariant.of_segment(arrays.key_B, segment)
            row_BV = lexinvariant.order(self.config, keys_B)

            def read(index):
                ids_O = index + self.chunks * jnp.arange(self.chunk)
                return ids_O, self._rows(learned_OJD, keys_B, row_BV, index, ids_O)

            return step(Table(read, _logits, _back, arrays.segments_BL == segment), carry)

        return jax.lax.fori_loop(1, arrays.segments_BL.max() + 1, one_segment, carry)

    def _rows(self, learned_OJD, key_B, row_BV, index, ids_O) -> _Rows:
        known_O = jnp.minimum(ids_O, self.config.vocab_size - 1)  # the last chunk may pass V
        drawn_BOD = lexinvariant.rows(self.config, key_B, row_BV, known_O)
        if learned_OJD is None:
            return _Rows(drawn_BOD, None)
        ids_BO = jnp.broadcast_to(known_O, drawn_BOD.shape[:2])
        is_drawn_BO = lexinvariant.is_drawn(self.config, key_B[:, None], ids_BO)
        return _Rows(drawn_BOD, _Learned(learned_OJD[:, index], is_drawn_BO[:, None]))

    def no_gradient(self, arrays: _Arrays) -> jax.Array | None:
        if arrays.learned_VD is None:
            return None
        shape = (self.chunk, self.chunks, arrays.learned_VD.shape[-1])
        return mesh.constrain(jnp.zeros(shape, jnp.float32), ('vocab', None, 'embed'))

    def gradient(self, total: jax.Array | None, arrays: _Arrays):
        if total is None or arrays.learned_VD is None:
            return _Arrays(None, None, None)
        d_learned_VD = online_softmax.joined(total, self.config.vocab_size)
        return _Arrays(d_learned_VD.astype(arrays.learned_VD.dtype), None, None)


def _logits(h_BLD: jax.Array, rows: _Rows) -> jax.Array:
    logits = layers.einsum('bld,bcd->blc', h_BLD, rows.drawn_BOD, jnp.float32)
    if rows.learned is None:
        return logits
    learned = layers.einsum('bld,cd->blc', h_BLD, rows.learned.rows_OD, jnp.float32)
    return jnp.where(rows.learned.is_drawn_B1O, logits, learned)


def _back(h_BLD: jax.Array, rows: _Rows, d_logits: jax.Array, index, gradient_OJD):
    if rows.learned is None:
        dh_BLD = layers.einsum('blc,bcd->bld', d_logits, rows.drawn_BOD, jnp.float32)
        return dh_BLD, gradient_OJD
    d_drawn = jnp.where(rows.learned.is_drawn_B1O, d_logits, 0)
    d_learned = jnp.where(rows.learned.is_drawn_B1O, 0, d_logits)
    dh_BLD = layers.einsum('blc,cd->bld', d_learned, rows.learned.rows_OD, jnp.float32)
    dh_BLD += layers.einsum('blc,bcd->bld', d_drawn, rows.drawn_BOD, jnp.float32)
    d_rows_OD = layers.einsum('blc,bld->cd', d_learned, h_BLD, jnp.float32)
    d_rows_OD = mesh.constrain(d_rows_OD, ('vocab', 'embed'))
    return dh_BLD, gradient_OJD.at[:, index].add(d_rows_OD)  # every segment adds to it
