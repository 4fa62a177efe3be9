"""A chain: a draft model's continuation, token by token.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1;
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".
"""

from decoding.drafter import Drafter
from decoding.drafts import levels
from decoding.drafts.recursive import branching
from decoding.model import LM
from decoding.sample import Sampler


def chain(lm: LM, length: int, sampler: Sampler | None = None) -> Drafter:
    """Returns the drafter of chains of `length` tokens, each drawn given the one before.

    No node of its trees has a sibling. `iid` with one sequence drafts the same, for K-SEQ.

    Args:
      lm: the draft model.
      length: tokens.
      sampler: applied to the draft model's logits; by default their softmax.

    Raises:
      ValueError: length below 1.
    """
    levels.check('length', length)
    return branching(lm, (1,) * length, sampler)
