"""Attention of one query per batch row against a cache: `tree` of a single node."""

import chex
import jax

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.mosaic.tree import attend
from lm.kernels.scoring import Scoring


def decode(
    q_BLHC: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scoring: Scoring,
    *,
    layer: jax.Array | int | None = None,
    sizes: BlockSizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns softmax(logits) v over the keys that one query per row sees, and its LSE.

    Arguments, results and errors are those of `mosaic.tree.tree`, with L = 1. Rows may be of
    different lengths: blocks past a row's end, or before its window, are neither fetched nor
    computed.
    """
    chex.assert_axis_dimension(q_BLHC, 1, 1)
    return attend('decode', q_BLHC, k, v, mask, scoring, layer, sizes, interpret)
