"""Attention of one query per sequence against a ragged cache: a tree of one node."""

import jax

from lm.kernels.blocks import BlockSizes
from lm.kernels.mask import Mask
from lm.kernels.scoring import Scoring
from lm.kernels.triton.tree import block_sizes, shared_memory, tree

__all__ = ['block_sizes', 'decode', 'shared_memory']


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
    """`tree` for L = 1: Flash-Decoding (Dao et al. 2023).

    Raises:
      ValueError: more than one query, ancestors, or the errors of `tree`.
    """
    if q_BLHC.shape[1] != 1 or mask.ancestors is not None:
        raise ValueError(
            f'decode: {q_BLHC.shape[1]} queries per sequence, ancestors '
            f'{"given" if mask.ancestors is not None else "none"}; expected 1 and none: use tree'
        )
    return tree(q_BLHC, k, v, mask, scoring, layer=layer, sizes=sizes, interpret=interpret)
