"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values travel around the ring.

Queries stay. At each step a device sends its current block of keys and values to the next device
and meanwhile attends to it; after P - 1 hops over P devices every query has met every key. In the
backward pass, a block's gradients travel with it and take one more hop to return to its owner.
"""

import functools

import jax
import jax.numpy as jnp

from lm.attention.ring_blocks import (
    KeyGradients,
    Keys,
    Known,
    Partial,
    Queries,
    Scalars,
    Settings,
    attend,
    gradients,
    nothing,
)
from lm.attention.ring_hops import send


def forward(
    settings: Settings, axis: str, queries: Queries, keys: Keys, scalars: Scalars
) -> Partial:
    """Returns attention of a device's queries over all keys, inside a `shard_map` over `axis`."""

    def step(carry: tuple[Keys, Partial], _):
        keys, partial = carry
        arriving = send(keys, axis)
        return (arriving, attend(settings, queries, keys, scalars, partial)), None

    hops = jax.lax.axis_size(axis) - 1
    (keys, partial), _ = jax.lax.scan(step, (keys, nothing(queries)), None, length=hops)
    return attend(settings, queries, keys, scalars, partial)


def backward(
    settings: Settings, axis: str, known: Known, keys: Keys, scalars: Scalars
) -> tuple[jax.Array, KeyGradients]:
    """Returns the gradients of a device's queries and of its keys and values, f32."""
    block_gradients = functools.partial(gradients, settings, known)
    add = functools.partial(jax.tree.map, jnp.add)

    def step(carry: tuple[Keys, KeyGradients, jax.Array], _):
        keys, found, dq = carry
        # the gradients of earlier devices are in transit while this one computes its own
        arriving, found = send(keys, axis), send(found, axis)
        dq, found_here = block_gradients(keys, scalars, dq)
        return (arriving, add(found, found_here), dq), None

    arriving = send(keys, axis)
    dq, found = block_gradients(keys, scalars, jnp.zeros(known.queries.q_BLHC.shape, jnp.float32))
    between = jax.lax.axis_size(axis) - 2
    (keys, found, dq), _ = jax.lax.scan(step, (arriving, found, dq), None, length=between)
    found = send(found, axis)
    dq, found_here = block_gradients(keys, scalars, dq)
    return dq, send(add(found, found_here), axis)
