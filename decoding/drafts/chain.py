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
    """Returns the drafter of `length` tokens, each drawn after the one before it.

    A tree in which no node has a sibling; `iid` makes the same of one sequence, for the verifiers
    of independent sequences.

    Args:
      lm: the draft model.
      length: tokens.
      sampler: how its logits become the distribution that tokens are drawn from; by default as they
        are.

    Raises:
      ValueError: length below 1.
    """
    levels.check('length', length)
    return branching(lm, (1,) * length, sampler)
