"""TokenRing (Wang et al. 2024, arXiv 2412.20501): queries travel one way, results the other.

Keys and values stay. At each step a device sends its current queries to the next device, attends
from them to its own keys, and returns the previous step's result to the owner of those queries: as
many hops back as they had come. The two transfers are independent, so that full-duplex links are
used in both directions. In the backward pass, queries travel with the cotangents of their results,
and the gradients of queries return.

Steps are unrolled, since each returns results over a different distance: the size of the program
grows with the number of devices.
"""

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
    combine,
    gradients,
    nothing,
)
from lm.attention.ring_hops import send


def forward(
    settings: Settings, axis: str, queries: Queries, keys: Keys, scalars: Scalars
) -> Partial:
    """Returns attention of a device's queries over all keys, inside a `shard_map` over `axis`."""
    dtype = queries.q_BLHC.dtype
    total = attend(settings, queries, keys, scalars, nothing(queries))
    for step in range(1, jax.lax.axis_size(axis)):
        queries = send(queries, axis)
        found = attend(settings, queries, keys, scalars, nothing(queries))
        # in transit while the next step attends, which does not depend on it
        found = send(found._replace(out_BLHC=found.out_BLHC.astype(dtype)), axis, -step)
        total = combine(total, found)
    return total


def backward(
    settings: Settings, axis: str, known: Known, keys: Keys, scalars: Scalars
) -> tuple[jax.Array, KeyGradients]:
    """Returns the gradients of a device's queries and of its keys and values, f32."""
    dtype = known.queries.q_BLHC.dtype
    zeros = jnp.zeros(known.queries.q_BLHC.shape, jnp.float32)
    dq, found = gradients(settings, known, keys, scalars, zeros)
    for step in range(1, jax.lax.axis_size(axis)):
        known = send(known, axis)
        dq_there, found_here = gradients(settings, known, keys, scalars, zeros)
        dq += send(dq_there.astype(dtype), axis, -step)
        found = jax.tree.map(jnp.add, found, found_here)
    return dq, found
