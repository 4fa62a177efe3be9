"""Attention over sequences sharded over devices: no device ever holds all keys of a row.

Either keys and values travel around the ring of devices (`lm.attention.ring_keys`), or queries do
(`lm.attention.ring_queries`). Both forms are exact, and their backward passes are rings as well.
The residuals are only a device's own queries, keys, values, output and log-sum-exp (LSE).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lm.attention import ring_keys, ring_queries
from lm.attention.per_device import Axes, per_device
from lm.attention.ring_blocks import (
    CHUNKS,
    Keys,
    Known,
    Queries,
    Scalars,
    Settings,
    join,
    split,
)
from lm.devices import mesh as mesh_lib
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring, key_terms

AXIS = 'sequence'  # the mesh axis that shards sequences
LENGTHS = Axes('batch', 'length')
Ring = Literal['keys', 'queries']


class _Form(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


_FORMS = {
    'keys': _Form(ring_keys.forward, ring_keys.backward),
    'queries': _Form(ring_queries.forward, ring_queries.backward),
}


def is_cut(q_BLHC: jax.Array, k_BKSC: jax.Array) -> bool:
    """Returns whether the current mesh shards the sequences of these arrays.

    A length that does not divide into two chunks per device is replicated: short sequences that are
    not rows of a batch (`lm.training.train.put` refuses rows of such a length).
    """
    devices, length = mesh_lib.in_use(AXIS), q_BLHC.shape[1]
    return devices > 1 and length == k_BKSC.shape[-2] and length % (CHUNKS * devices) == 0


def refuse(what: str) -> None:
    """Raises ValueError on a mesh that shards sequences; `what` names the unsupported feature."""
    devices = mesh_lib.in_use(AXIS)
    if devices > 1:
        raise ValueError(
            f'{what}: not supported on a mesh with {AXIS}={devices}, which shards sequences; '
            f'use one with {AXIS}=1'
        )


def attention(
    q_BLHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    mask: Mask,
    scoring: Scoring,
    settings: Settings,
    ring: Ring = 'keys',
) -> tuple[jax.Array, jax.Array]:
    """Returns attention over sequences that the current mesh shards (`is_cut`), and its LSE.

    Batch rows and heads are sharded as for any kernel (`lm.attention.per_device`). Any order of the
    sequence gives the same result; the order of `lm.attention.zigzag` gives every device the same
    amount of causal work.

    Args:
      q_BLHC, k_BKSC, v_BKSC: as many keys as queries, S = L.
      mask: over new keys only, without a cache or a draft tree.
      scoring: makes the logits; bias and noise travel with their keys.
      settings: see `lm.attention.ring_blocks`.
      ring: whether keys (with their values) or queries travel.

    Returns:
      Output `[B, L, H, C]` in the dtype of `q`, and LSE `[B, L, H]` in f32.

    Raises:
      ValueError: `ring` is unknown.
    """
    if ring not in _FORMS:
        raise ValueError(f'ring {ring!r}: expected one of {", ".join(_FORMS)}')
    queries, keys = Axes('batch', 'length', 'heads', None), Axes('batch', 'kv_heads', 'length')
    mask = dataclasses.replace(mask, key_bias=key_terms(mask, scoring))
    places = dataclasses.replace(jax.tree.map(lambda _: LENGTHS, mask), key_position=keys)
    if mask.key_bias is not None:
        places = dataclasses.replace(places, key_bias=keys)
    if mask.window is not None:
        places = dataclasses.replace(places, window=Axes())
    return per_device(
        functools.partial(_attention, settings, ring),
        (q_BLHC, k_BKSC, v_BKSC, mask, scoring.temperature), None,
        (queries, keys, keys, places, None if scoring.temperature is None else Axes()),
        (queries, Axes('batch', 'length', 'heads')),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings, ring, q_BLHC, k_BKSC, v_BKSC, mask, temperature):
    queries, keys = _parts(q_BLHC, k_BKSC, v_BKSC, mask)
    scalars = Scalars(mask.window, temperature)
    found = _FORMS[ring].forward(settings, AXIS, queries, keys, scalars)
    return join(found.out_BLHC, 1).astype(q_BLHC.dtype), join(found.lse_BLH, 1)


def _forward(settings, ring, *operands):
    out_BLHC, lse_BLH = _attention(settings, ring, *operands)
    return (out_BLHC, lse_BLH), (*operands, out_BLHC, lse_BLH)


def _backward(settings, ring, residuals, cotangents):
    q_BLHC, k_BKSC, v_BKSC, mask, temperature, out_BLHC, lse_BLH = residuals
    d_out_BLHC, d_lse_BLH = cotangents
    product_BLHC = d_out_BLHC.astype(jnp.float32) * out_BLHC
    delta_BLH = jnp.sum(product_BLHC, axis=-1) - d_lse_BLH
    queries, keys = _parts(q_BLHC, k_BKSC, v_BKSC, mask)
    of_queries = (split(x, 1) for x in (d_out_BLHC.astype(q_BLHC.dtype), lse_BLH, delta_BLH))
    known = Known(queries, *of_queries)
    scalars = Scalars(mask.window, temperature)
    dq, of_keys = _FORMS[ring].backward(settings, AXIS, known, keys, scalars)
    dk_BKSC, dv_BKSC = (join(x, 2).astype(k_BKSC.dtype) for x in of_keys)
    # bias and temperature are constants
    return join(dq, 1).astype(q_BLHC.dtype), dk_BKSC, dv_BKSC, None, None


_attention.defvjp(_forward, _backward)


def _parts(q_BLHC, k_BKSC, v_BKSC, mask: Mask) -> tuple[Queries, Keys]:
    def segments(x_BL):
        return None if x_BL is None else split(x_BL, 1)

    queries = Queries(split(q_BLHC, 1), split(mask.query_position, 1), segments(mask.query_segment))
    keys = Keys(
        split(k_BKSC, 2), split(v_BKSC, 2), split(mask.key_position, 2),
        segments(mask.key_segment), None if mask.key_bias is None else split(mask.key_bias, 2),
    )  # fmt: skip
    return queries, keys
