"""The logits of one tile, in base 2: scale and cap, then bias, noise and temperature if given.

GPUs have their exponential in base 2, so that every logit is multiplied by log2(e) once, here. See
`lm.kernels.scoring`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lm.kernels import scoring as scoring_lib
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring, Terms
from lm.kernels.triton.tile import LOG2E, dot


def operands(mask: Mask | None, scoring: Scoring) -> Terms:
    """Returns the terms as arrays for a kernel, the offset in base 2."""
    found = scoring_lib.terms(mask, scoring)
    return found if found.offset is None else found._replace(offset=found.offset * LOG2E)


def load(terms: Any, batch, head, start, keys: int) -> Terms:
    """Loads the factor, a scalar, and the offsets `[keys]` of the keys from row `start` on."""
    factor = None if terms.factor is None else terms.factor[0]
    if terms.offset is None:
        return Terms(factor, None)
    heads, rows = terms.offset.shape[1:]
    head = jnp.minimum(head, heads - 1)  # offsets for all heads, or for each
    there = start + jnp.arange(keys) < rows
    view = terms.offset.at[batch, head, pl.ds(start, keys)]
    return Terms(factor, plgpu.load(view, mask=there, other=0.0))


def capped(a: jax.Array, b: jax.Array, scoring: Scoring) -> jax.Array:
    """Returns cap tanh(scale a . b / cap) of two tiles of queries and keys, in either order."""
    if scoring.softcap is None:
        return dot(a, b, trans_b=True) * (scoring.scale * LOG2E)
    cap = scoring.softcap
    return jnp.tanh(dot(a, b, trans_b=True) * (scoring.scale / cap)) * (cap * LOG2E)


def complete(s: jax.Array, loaded: Terms, query_axis: int = 0) -> jax.Array:
    """Returns s * factor + offset; the queries of a tile lie on the given axis of two."""
    if loaded.factor is not None:
        s = s * loaded.factor
    if loaded.offset is not None:
        s = s + jnp.expand_dims(loaded.offset, query_axis)
    return s


def slope(scoring: Scoring, terms: Any):
    """Returns the derivative of an uncapped logit by its product, scale * factor."""
    return scoring.scale if terms.factor is None else scoring.scale * terms.factor[0]
