"""Continues a prompt with any bundle, several tokens per pass; shows which of them were drafted.

    python -m experiments.run generate --bundle out/speculative-demo/bundles/target \\
        --draft out/speculative-demo/bundles/draft_10 --drafter recursive --prompt 'def main('
    python -m experiments.run generate --bundle DIR --prompt "..." --drafter lookup

Whatever the drafter, the text follows the law of plain sampling. The accepted tokens of each round
are coloured, two colours in turn; the token that the target drew after them is plain. Without a
terminal, the text alone is printed.
"""

import dataclasses
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Config:
    """One text.

    Attributes:
      bundle: folder of the model.
      prompt: what is continued.
      drafter: how to draft; chain, iid, dynamic and the recursive ones need `draft`.
      draft: folder of a smaller bundle with the same tokenizer.
      nodes: drafted nodes per pass of the target.
      exit_layers: of the model, run by an early exit.
      longest: n-gram that lookup matches.
      max_tokens: drawn at most.
      temperature: divides the logits; 0 takes the most probable token.
      draft_temperature: of the draft where `temperature` is 0.
      top_k: keeps the k most probable tokens.
      top_p: keeps the smallest set of most probable tokens whose mass reaches p.
      stop: strings that end the text; they are printed.
      seed: of the draws; the same seed gives the same text.
    """

    bundle: str = tyro.MISSING
    prompt: str = tyro.MISSING
    drafter: Literal[
        'none', 'chain', 'iid', 'recursive', 'recursive_branching', 'dynamic', 'lookup',
        'recycling', 'early_exit',
    ] = 'none'  # fmt: skip
    draft: str | None = None
    nodes: int = 14
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
        for name in ('nodes', 'exit_layers', 'longest', 'max_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name}: {getattr(self, name)}; expected at least 1')
        if not self.draft_temperature > 0:
            raise ValueError(f'--draft_temperature: {self.draft_temperature}; expected above 0')


SCALES = {'text': Config()}
