"""Continues a prompt with any bundle, with or without drafting; highlights the drafted tokens.

    python -m experiments.run generate --bundle out/speculative-demo/bundles/target \\
        --draft out/speculative-demo/bundles/draft_10 --drafter recursive --prompt 'def main('
    python -m experiments.run generate --bundle DIR --prompt "..." --drafter lookup

With any drafter, the text has exactly the distribution of ordinary sampling. The accepted tokens of
a round are coloured, in two alternating colours; the token that the target samples after them is
plain. If the output is not a terminal, there are no colours.
"""

import dataclasses
import math
from typing import Literal

import tyro

from experiments.settings import require

WITH_DRAFT_MODEL = ('chain', 'iid', 'recursive', 'recursive_branching', 'dynamic')


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the prompt, and the options of drafting and sampling.

    Attributes:
      bundle: folder of the model.
      prompt: the text to continue.
      drafter: drafting method; chain, iid, dynamic and the recursive ones need `draft`.
      draft: folder of a smaller bundle with the same tokenizer.
      nodes: drafted nodes per pass of the target. `auto` measures the cost of passes once on this
        machine and takes the best number. With a prime number, `recursive` and `iid` draft a chain.
      exit_layers: number of the model's layers that an early exit runs.
      longest: longest n-gram that lookup matches.
      max_tokens: maximal number of new tokens.
      temperature: divides the logits; 0 is greedy decoding.
      draft_temperature: temperature of the draft if `temperature` is 0.
      top_k: keeps the k most probable tokens.
      top_p: keeps the smallest set of most probable tokens whose mass reaches p.
      stop: strings that end the text, and are printed. The EOS of an imported tokenizer also does.
      seed: random seed; the same seed gives the same text.
    """

    bundle: str = tyro.MISSING
    prompt: str = tyro.MISSING
    drafter: Literal[
        'none', 'chain', 'iid', 'recursive', 'recursive_branching', 'dynamic', 'lookup',
        'recycling', 'early_exit',
    ] = 'none'  # fmt: skip
    draft: str | None = None
    nodes: int | Literal['auto'] = 14
    exit_layers: int = 1
    longest: int = 6
    max_tokens: int = 100
    temperature: float = 1.0
    draft_temperature: float = 0.25
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ('nodes', 'exit_layers', 'longest', 'max_tokens', 'top_k'):
            value = getattr(self, name)
            if value not in (None, 'auto'):
                require(name, value, 1 <= value < 2**31, 'at least 1, below 2**31')
        require('seed', self.seed, 0 <= self.seed < 2**32, '0 or more, below 2**32')
        finite = 0 <= self.temperature < math.inf
        require('temperature', self.temperature, finite, '0 or more, and finite')
        positive = 0 < self.draft_temperature < math.inf
        require('draft_temperature', self.draft_temperature, positive, 'above 0, and finite')
        if self.top_p is not None:
            require('top_p', self.top_p, 0 < self.top_p <= 1, 'above 0, at most 1')
        if self.draft is not None and self.drafter not in WITH_DRAFT_MODEL:
            drafters = ', '.join(WITH_DRAFT_MODEL)
            raise ValueError(f'--draft: {self.drafter} has no draft model; {drafters} have')


MESH = 'one'
SCALES = {'text': Config()}
