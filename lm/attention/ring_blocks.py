"""One step of ring attention: a device's current queries attend to its current block of keys.

A device holds two chunks of each row (`lm.attention.zigzag`), so a block is four pairs of chunks. A
pair in which no query sees a key is skipped. The decision is made from positions and segments; no
order is assumed. Under a causal mask in zigzag order, every device skips two of four pairs at every
step but the first, where it skips one and two are half masked.
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lm.kernels import mosaic, triton, xla, xla_backward
from lm.kernels.mask import UNLIMITED, Mask, blocks, key_rows
from lm.kernels.scoring import Scoring

CHUNKS = 2  # per device
# indices of query chunks, and of key chunks
PAIRS = tuple(np.indices((CHUNKS, CHUNKS)).reshape(2, -1))
Tree = TypeVar('Tree')


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static settings.

    Attributes:
      implementation: `xla`, `mosaic` or `triton`: the kernels used on each device.
      interpret: whether Pallas kernels run in interpret mode.
      scoring: scale and cap alone; the rest is data.
      causal: see `Mask`.
    """

    implementation: str
    interpret: bool
    scoring: Scoring
    causal: bool


class Queries(NamedTuple):
    """Queries of this device, or received from another: each array `[CHUNKS, ...]`."""

    q_BLHC: jax.Array
    position_BL: jax.Array
    segment_BL: jax.Array | None


class Keys(NamedTuple):
    """A block of keys and values: each array `[CHUNKS, ...]`."""

    k_BKSC: jax.Array
    v_BKSC: jax.Array
    position_BKS: jax.Array
    segment_BS: jax.Array | None
    bias_BKS: jax.Array | None  # and noise: all that is added to the logits


class Scalars(NamedTuple):
    """Data that all devices share: the window of a mask and the temperature of a scoring."""

    window: jax.Array | int | None
    temperature: jax.Array | float | None


class Partial(NamedTuple):
    """Attention over some of the keys, f32, each array `[CHUNKS, ...]`; LSE -inf: none is seen."""

    out_BLHC: jax.Array
    lse_BLH: jax.Array


class Known(NamedTuple):
    """Queries with what their backward pass needs: each array `[CHUNKS, ...]`.

    d_out is the cotangent of the output, lse is over all keys, and delta is
    rowsum(dO * O) - d LSE; the last two are f32.
    """

    queries: Queries
    d_out_BLHC: jax.Array
    lse_BLH: jax.Array
    delta_BLH: jax.Array


class KeyGradients(NamedTuple):
    """Gradients of a block of keys and values; f32, since they are summed over devices."""

    dk_BKSC: jax.Array
    dv_BKSC: jax.Array


def split(x: jax.Array, axis: int) -> jax.Array:
    """Splits `axis` of a device's array into a leading axis of chunks: `[CHUNKS, ...]`."""
    shape = (*x.shape[:axis], CHUNKS, x.shape[axis] // CHUNKS, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def join(x: jax.Array, axis: int) -> jax.Array:
    """Inverts `split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def nothing(queries: Queries) -> Partial:
    """Returns attention over no keys, the identity of `combine`."""
    out = jnp.zeros(queries.q_BLHC.shape, jnp.float32)
    return Partial(out, jnp.full(out.shape[:-1], -jnp.inf))


def combine(one: Partial, other: Partial) -> Partial:
    """Merges attention over two sets of keys (`lm.kernels.merge`, but pairwise and in place)."""
    lse = jnp.logaddexp(one.lse_BLH, other.lse_BLH)
    some = jnp.where(lse > -jnp.inf, lse, 0.0)
    here, there = (jnp.exp(x.lse_BLH - some)[..., None] * x.out_BLHC for x in (one, other))
    return Partial(here + there, lse)


def attend(
    settings: Settings, queries: Queries, keys: Keys, scalars: Scalars, so_far: Partial
) -> Partial:
    """Returns `so_far` extended by the keys of one block."""

    def pair(so_far: Partial, place: Any):
        query, partial = _chunk(queries, place[0]), _chunk(so_far, place[0])
        key = _chunk(keys, place[1])
        mask = _mask(settings, query, key, scalars)
        partial = jax.lax.cond(
            may_see(mask),
            lambda: combine(partial, _forward(settings, query, key, mask, scalars)),
            lambda: partial,
        )
        return _with_chunk(so_far, partial, place[0]), None

    return jax.lax.scan(pair, so_far, PAIRS)[0]


def gradients(
    settings: Settings, known: Known, keys: Keys, scalars: Scalars, dq_BLHC: jax.Array
) -> tuple[jax.Array, KeyGradients]:
    """Returns `dq_BLHC` plus the contribution of one block of keys, and gradients of the block.

    `dq_BLHC` is f32 `[CHUNKS, ...]`. The block's gradients come from these queries only.
    """

    def pair(found: tuple[jax.Array, KeyGradients], place: Any):
        query, key = _chunk(known, place[0]), _chunk(keys, place[1])
        before = _chunk(found[0], place[0]), _chunk(found[1], place[1])
        mask = _mask(settings, query.queries, key, scalars)

        def more():
            added = _backward(settings, query, key, mask, scalars)
            return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), before, added)

        dq, of_keys = jax.lax.cond(may_see(mask), more, lambda: before)
        return (
            _with_chunk(found[0], dq, place[0]),
            _with_chunk(found[1], of_keys, place[1]),
        ), None

    zeros = (jnp.zeros(x.shape, jnp.float32) for x in (keys.k_BKSC, keys.v_BKSC))
    return jax.lax.scan(pair, (dq_BLHC, KeyGradients(*zeros)), PAIRS)[0]


def _chunk(tree: Tree, index: jax.Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _with_chunk(tree: Tree, chunk: Tree, index: jax.Array) -> Tree:
    """Returns the arrays with one chunk replaced; in place if the old arrays are not used again."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, y: put(x, y, index, 0), tree, chunk)


def may_see(mask: Mask) -> jax.Array:
    """Returns whether any query may see any key, a bool scalar; false only if none does.

    Beyond the kernels' test of a block, the greatest (segment, position) of the queries must reach
    the least of the keys: documents packed in a row each restart at position 0.
    """
    queries, keys = mask.query_position.shape[1], mask.key_position.shape[2]
    some_BK = blocks(mask, queries, keys).some[..., 0, 0]
    if not mask.causal or mask.query_segment is None or mask.key_segment is None:
        return jnp.any(some_BK)
    last = jnp.max(mask.query_segment, axis=1, keepdims=True)
    reach = _where(mask.query_segment == last, mask.query_position, -UNLIMITED).max(1)[:, None]
    held_BKS, segment = key_rows(mask), mask.key_segment[:, None]
    segment_BKS = _where(held_BKS, segment, UNLIMITED)
    first = jnp.min(segment_BKS, axis=2, keepdims=True)
    begin = _where(segment_BKS == first, mask.key_position, UNLIMITED).min(2)
    first = first[..., 0]
    return jnp.any(some_BK & ((first < last) | ((first == last) & (begin <= reach))))


def _where(condition: jax.Array, x: jax.Array, otherwise: int) -> jax.Array:
    return jnp.where(condition, x, otherwise)


def _mask(settings: Settings, query: Queries, key: Keys, scalars: Scalars) -> Mask:
    return Mask(
        query.position_BL, key.position_BKS, query.segment_BL, key.segment_BS,
        window=scalars.window, causal=settings.causal, key_bias=key.bias_BKS,
    )  # fmt: skip


def _forward(
    settings: Settings, query: Queries, key: Keys, mask: Mask, scalars: Scalars
) -> Partial:
    scoring = dataclasses.replace(settings.scoring, temperature=scalars.temperature)
    operands = (query.q_BLHC, key.k_BKSC, key.v_BKSC, mask, scoring)
    if settings.implementation == 'xla':
        out_BLHC, lse_BLH = xla.attention(*operands)
    else:
        kernels = {'mosaic': mosaic, 'triton': triton}[settings.implementation]
        out_BLHC, lse_BLH = kernels.flash.forward(*operands, interpret=settings.interpret)
    return Partial(out_BLHC.astype(jnp.float32), lse_BLH)


def _backward(
    settings: Settings, known: Known, key: Keys, mask: Mask, scalars: Scalars
) -> tuple[jax.Array, KeyGradients]:
    # kernels use the output only for delta = rowsum(dO * O) - d LSE: pass O = 0, d LSE = -delta
    operands = (
        known.queries.q_BLHC, key.k_BKSC, key.v_BKSC, jnp.zeros_like(known.d_out_BLHC),
        known.lse_BLH, known.d_out_BLHC, -known.delta_BLH, mask,
        dataclasses.replace(settings.scoring, temperature=scalars.temperature),
    )  # fmt: skip
    if settings.implementation == 'xla':
        dq, dk, dv = xla_backward.backward(*operands)
    else:
        kernels = {'mosaic': mosaic, 'triton': triton}[settings.implementation]
        dq, dk, dv = kernels.flash.backward(*operands, interpret=settings.interpret)
    return dq, KeyGradients(dk, dv)
