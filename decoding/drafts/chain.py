"""A chain: a draft model's continuation, token by token.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1;
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".
"""

from decoding.drafter import Drafter, Model
from decoding.drafts import levels
from decoding.drafts.recursive import branching
from decoding.sample import Sampler


def chain(model: Model, length: int, sampler: Sampler | None = None) -> Drafter:
    """Returns the drafter of `length` tokens, each drawn after the one before it.

    A tree in which no node has a sibling; `iid` makes the same of one sequence, for the verifiers
    of independent sequences.

    Args:
      model: the draft model.
      length: tokens.
      sampler: how its logits become the law that tokens are drawn from; by default as they are.

    Raises:
      ValueError: length below 1.
    """
    levels.check('length', length)
    return branching(model, (1,) * length, sampler)
