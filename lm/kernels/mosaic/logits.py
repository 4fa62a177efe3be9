"""Bias, noise and temperature in a TPU kernel: two optional operands.

The offset of each key comes as a row of f32, in blocks such as those of the key positions; the
factor is a scalar. See `lm.kernels.scoring.Terms`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.kernels import scoring as scoring_lib
from lm.kernels.mask import Mask
from lm.kernels.mosaic import block_mask
from lm.kernels.mosaic.tile import column, lanes
from lm.kernels.scoring import Scoring, Terms


def operands(mask: Mask | None, scoring: Scoring, key: int = 1) -> Terms:
    """Returns factor `[1]` and offset `[B, K or 1, 1, S]`, padded to whole blocks of `key` keys."""
    found = scoring_lib.terms(mask, scoring)
    if found.offset is None:
        return found
    return found._replace(offset=block_mask.pad(found.offset, 2, key, 0.0)[:, :, None])


def specs(terms: Terms, key: int, at: Callable[..., Any]) -> Terms:
    """Returns the specs of `operands`; `at` gives batch, KV head and block of keys of a step."""
    factor = offset = None
    if terms.factor is not None:
        factor = pl.BlockSpec(memory_space=pltpu.SMEM)
    if terms.offset is not None:
        heads = terms.offset.shape[1]

        def offset_at(*step):
            b, kv_head, block = at(*step)
            return b, kv_head if heads > 1 else 0, 0, block

        offset = pl.BlockSpec((None, None, 1, key), offset_at)
    return Terms(factor, offset)


def complete(capped: jax.Array, terms: Terms, query_axis: int = 0) -> jax.Array:
    """In a kernel: capped * factor + offset, from references.

    Args:
      capped: f32 `[queries, keys]`; `[keys, queries]` where `query_axis` is 1.
      terms: references to `[1]` and to `[1, keys]`.
      query_axis: along which the queries lie.
    """
    if terms.factor is not None:
        capped = capped * terms.factor[0]
    if terms.offset is not None:
        offset = terms.offset[...]
        capped = capped + (lanes(column(offset), capped.shape[1]) if query_axis else offset)
    return capped


def slope(scoring: Scoring, terms: Terms):
    """In a kernel: the derivative of an uncapped logit by its product, scale * factor."""
    return scoring.scale if terms.factor is None else scoring.scale * terms.factor[0]
