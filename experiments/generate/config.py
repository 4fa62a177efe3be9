"""Continues a prompt with any bundle, several tokens per pass; shows which of them were drafted.

    python -m experiments.run generate --bundle out/speculative-demo/bundles/target \\
        --draft out/speculative-demo/bundles/draft_10 --drafter recursive --prompt 'def main('
    python -m experiments.run generate --bundle DIR --prompt "..." --drafter lookup

Whatever the drafter, the text follows the law of plain sampling. The accepted tokens of each round
are coloured, two colours in turn; the token that the target drew after them is plain. Without a
terminal, the text alone is printed.
"""

import dataclasses
import math
from typing import Literal

import tyro

from experiments.settings import require

WITH_DRAFT_MODEL = ('chain', 'iid', 'recursive', 'recursive_branching', 'dynamic')


@dataclasses.dataclass(frozen=True)
class Config:
    """One text.

    Attributes:
      bundle: folder of the model.
      prompt: what is continued.
      drafter: how to draft; chain, iid, dynamic and the recursive ones need `draft`.
      draft: folder of a smaller bundle with the same tokenizer.
      nodes: drafted nodes per pass of the target; `auto` measures once what passes cost here, and
        takes the number that is worth most. Of a prime number `recursive` and `iid` make one chain.
      exit_layers: of the model, run by an early exit.
      longest: n-gram that lookup matches.
      max_tokens: drawn at most.
      temperature: divides the logits; 0 takes the most probable token.
      draft_temperature: of the draft where `temperature` is 0.
      top_k: keeps the k most probable tokens.
      top_p: keeps the smallest set of most probable tokens whose mass reaches p.
      stop: strings that end the text; they are printed. EOS of an imported tokenizer ends it, too.
      seed: of the draws; the same seed gives the same text.
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
