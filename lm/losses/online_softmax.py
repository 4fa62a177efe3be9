"""Cross-entropy by an online softmax over chunks of a table's rows: a scan and its gradient.

Only the logits of one chunk, `[..., O]`, exist at a time; the backward pass recomputes them. Memory
does not grow with V, except for the gradient of the table. For a token with hidden state h, logits
z_v = softcap(h . row_v) and target t,

    log_normalizer = log sum_v exp z_v          nats = log_normalizer - z_t

The forward scan carries the running maximum m, s = sum exp(z - m), and z_t; if a chunk raises m to
m', s is multiplied by exp(m - m'). With p_v = exp(z_v - log_normalizer), the derivatives are

    d nats / d z_v = p_v - [v = t]              d log_normalizer / d z_v = p_v

Two tokens with target 0, and logits (0, 0) and (1, -1) over two rows. The table is the identity,
so that hidden states are logits, and their gradient is p - onehot:

>>> from lm.losses.cross_entropy import chunked_cross_entropy
>>> def nats(h_TD):
...     return chunked_cross_entropy(h_TD, jnp.eye(2), jnp.array([0, 0])).nats
>>> h_TD = jnp.array([[0.0, 0.0], [1.0, -1.0]])
>>> [f'{x:.4f}' for x in nats(h_TD)]  # log 2, and log(1 + exp(-2))
['0.6931', '0.1269']
>>> [[f'{x:.4f}' for x in row] for row in jax.grad(lambda h_TD: nats(h_TD).sum())(h_TD)]
[['-0.5000', '0.5000'], ['-0.1192', '0.1192']]

A `Source` supplies the rows: a learned table (`lm.losses.cross_entropy`), or tables drawn per
segment (`lm.losses.drawn_cross_entropy`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lm.devices import mesh
from lm.model import layers

VOCABULARY_CHUNK = 1024


class TokenLosses(NamedTuple):
    """Per token, f32: `-log p(target)` in nats, and the log normaliser of the softmax."""

    nats: jax.Array
    log_normalizer: jax.Array


class Table(NamedTuple):
    """One table as the scan reads it.

    Attributes:
      read: index of a chunk -> its ids `[O]`, and its rows in the form that `logits` takes.
      logits: (h, rows) -> f32 `[..., O]`, before the soft cap.
      back: (h, rows, d_logits, index, gradient) -> (gradient of h, f32; the source's gradient with
        this chunk's added).
      here: bool, in the targets' shape: the tokens that use this table; None for all.
    """

    read: Callable[[jax.Array], tuple[jax.Array, Any]]
    logits: Callable[[jax.Array, Any], jax.Array]
    back: Callable[[jax.Array, Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    here: jax.Array | None = None


class Source(Protocol):
    """Supplies rows; hashable and static, its arrays are passed in."""

    @property
    def chunks(self) -> int:
        """The number of chunks per table."""
        ...

    @property
    def softcap(self) -> float | None:
        """The soft cap of the logits, or None."""
        ...

    def size(self, arrays: Any) -> jax.Array | int:
        """Returns the number of ids in the softmax; later ids have probability 0."""
        ...

    def over_tables(self, step: Callable[[Table, Any], Any], carry: Any, arrays: Any) -> Any:
        """Returns `carry` after `carry = step(table, carry)` for each table."""
        ...

    def no_gradient(self, arrays: Any) -> Any:
        """Returns the gradient of the arrays before the first chunk, as `Table.back` takes it."""
        ...

    def gradient(self, total: Any, arrays: Any) -> Any:
        """Returns the gradient of the arrays, with None for integers and keys."""
        ...


def chunking(vocab_size: int, chunk: int) -> tuple[int, int]:
    """Returns the number of chunks of a table, and rows per chunk; without padding if possible.

    Chunk i of n has the rows i, i + n, i + 2n and so on. So every chunk includes rows of every
    device, and each device reads its own; a chunk of contiguous rows would have to be broadcast.
    """
    chunk = min(chunk, vocab_size)
    least = -(-vocab_size // chunk)
    n = next((n for n in range(least, 2 * least) if vocab_size % n == 0), None)
    return (least, chunk) if n is None else (n, vocab_size // n)


def interleaved(table_VD: jax.Array, n: int, chunk: int) -> jax.Array:
    """Returns the table as `[O, J, D]`, padded with zero rows: chunk i is `[:, i]`. No copy."""
    v, d = table_VD.shape
    padded = jnp.pad(table_VD, ((0, n * chunk - v), (0, 0))) if n * chunk != v else table_VD
    return mesh.constrain(padded.reshape(chunk, n, d), ('vocab', None, None))


def joined(rows_OJD: jax.Array, vocab_size: int) -> jax.Array:
    """Inverse of `interleaved`."""
    table_VD = rows_OJD.reshape(-1, rows_OJD.shape[-1])[:vocab_size]
    return mesh.constrain(table_VD, ('vocab', 'embed'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_losses(source: Source, h: jax.Array, arrays: Any, targets: jax.Array) -> TokenLosses:
    """Returns the losses of targets `[...]` given hidden states `[..., D]`.

    Differentiable in `h` and in the source's arrays. Tokens without a table have a loss of 0.
    """
    return _forward(source, h, arrays, targets)[0]


def _forward(source: Source, h, arrays, targets):
    def one_table(table: Table, carry):
        def step(carry, index):
            highest, total, target = carry
            ids_O, rows = table.read(index)
            logits = _logits(source, table, h, rows, ids_O, arrays)
            new_highest = jnp.maximum(highest, logits.max(-1))
            new_total = total * jnp.exp(highest - new_highest)
            new_total += jnp.exp(logits - new_highest[..., None]).sum(-1)
            # a sum, not an index: each device has some of the columns
            is_target = targets[..., None] == ids_O
            new = new_highest, new_total, target + jnp.where(is_target, logits, 0.0).sum(-1)
            if table.here is None:
                return new, None
            return tuple(jnp.where(table.here, a, b) for a, b in zip(new, carry)), None

        return jax.lax.scan(step, carry, jnp.arange(source.chunks))[0]

    zero = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full_like(zero, -jnp.inf), zero, zero)
    highest, total, target = source.over_tables(one_table, start, arrays)
    unread = total == 0
    log_normalizer = jnp.where(unread, 0, highest + jnp.log(jnp.where(unread, 1, total)))
    losses = TokenLosses(log_normalizer - target, log_normalizer)
    return losses, (h, arrays, targets, log_normalizer)


def _backward(source: Source, saved, cotangent: TokenLosses):
    h, arrays, targets, log_normalizer = saved
    p_weight = cotangent.nats + cotangent.log_normalizer

    def one_table(table: Table, carry):
        def step(carry, index):
            dh, gradient = carry
            ids_O, rows = table.read(index)
            logits = _logits(source, table, h, rows, ids_O, arrays)
            d_logits = jnp.exp(logits - log_normalizer[..., None]) * p_weight[..., None]
            is_target = targets[..., None] == ids_O
            d_logits -= jnp.where(is_target, cotangent.nats[..., None], 0.0)
            if source.softcap is not None:
                finite = jnp.where(jnp.isfinite(logits), logits, 0.0)
                d_logits *= 1 - (finite / source.softcap) ** 2
            if table.here is not None:
                d_logits = jnp.where(table.here[..., None], d_logits, 0)
            more, gradient = table.back(h, rows, d_logits.astype(h.dtype), index, gradient)
            return (dh + more, gradient), None

        return jax.lax.scan(step, carry, jnp.arange(source.chunks))[0]

    start = jnp.zeros(h.shape, jnp.float32), source.no_gradient(arrays)
    dh, total = source.over_tables(one_table, start, arrays)
    return dh.astype(h.dtype), source.gradient(total, arrays), None


def _logits(source: Source, table: Table, h, rows, ids_O, arrays) -> jax.Array:
    logits = layers.softcap(table.logits(h, rows), source.softcap)
    return jnp.where(ids_O < source.size(arrays), logits, -jnp.inf)


token_losses.defvjp(_forward, _backward)
