"""TokenRing (Wang et al. 2024, arXiv 2412.20501): queries go round one way, results come back.

Keys and values stay. At each step a device sends the queries that it has to the next one, attends
from them to its own keys, and sends what it found at the step before back to whose queries they
were: as many places back as those have come. Neither waits for the other, so that links that carry
both directions at once are used both ways. Backward, queries travel with the cotangents of their
results, and gradients of queries come back.

Steps are written out, since each sends results another distance: programs grow with the devices.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lm.ring_blocks import (
    KeyGradients,
    Keys,
    Known,
    Partial,
    Queries,
    Settings,
    attend,
    combine,
    gradients,
    nothing,
)
from lm.ring_hops import send


def forward(settings: Settings, axis: str, queries: Queries, keys: Keys, window: Any) -> Partial:
    """Returns attention of a device's queries over all keys; within a `shard_map` over `axis`."""
    devices, dtype = jax.lax.axis_size(axis), queries.q_BLHC.dtype
    total = attend(settings, queries, keys, window, nothing(queries))
    found: Partial | None = None
    for step in range(1, devices):
        queries = send(queries, axis)
        if found is not None:
            total = combine(total, send(found, axis, 1 - step))
        found = attend(settings, queries, keys, window, nothing(queries))
        found = found._replace(out_BLHC=found.out_BLHC.astype(dtype))
    return combine(total, send(found, axis, 1 - devices))


def backward(
    settings: Settings, axis: str, known: Known, keys: Keys, window: Any
) -> tuple[jax.Array, KeyGradients]:
    """Returns the gradients of a device's queries and of its keys and values, f32."""
    devices, dtype = jax.lax.axis_size(axis), known.queries.q_BLHC.dtype
    dq, found = gradients(settings, known, keys, window)
    dq_away: jax.Array | None = None
    for step in range(1, devices):
        known = send(known, axis)
        if dq_away is not None:
            dq += send(dq_away, axis, 1 - step)
        dq_away, found_here = gradients(settings, known, keys, window)
        dq_away = dq_away.astype(dtype)
        found = jax.tree.map(jnp.add, found, found_here)
    return dq + send(dq_away, axis, 1 - devices), found
