"""Several sequences, drawn independently.

Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport" (arXiv 2310.15141):
the i.i.d. draft sequences that its K-SEQ verifies.
"""

import jax.numpy as jnp

from decoding.drafter import Drafter
from decoding.drafts import levels
from decoding.drafts.levels import Children
from decoding.model import LM
from decoding.sample import Sampler
from decoding.tree import Independent


def iid(lm: LM, sequences: int, length: int, sampler: Sampler | None = None) -> Drafter:
    """Returns the drafter of K i.i.d. sequences below the root; some may be equal.

    The tree has 1 + K * length nodes.

    Args:
      lm: the draft model.
      sequences: K.
      length: tokens of each.
      sampler: applied to the draft model's logits; by default their softmax.

    Raises:
      ValueError: sequences or length below 1.
    """
    levels.check('sequences', sequences)
    levels.check('length', length)

    def draw(logprob_BMV, key_B, level, carry):
        del level, carry
        # all start at the root, each with its own noise; below, each continues its own last node
        parent = jnp.arange(sequences) % logprob_BMV.shape[1]
        token_BA1, _ = levels.top(logprob_BMV[:, parent], key_B, 1)
        token_BA = token_BA1[..., 0]
        parent_BA = jnp.broadcast_to(parent, token_BA.shape)
        return Children(parent_BA, token_BA, jnp.ones_like(token_BA, bool))

    grown = levels.whole(draw, length, Independent)
    sizes = (sequences,) * length
    return levels.drafter(lm, sampler, grown, Independent, sizes, sequences)
