"""The contracts of drafters and verifiers, and the data that the loop passes between them.

One round of decoding (`decoding.rounds`):

    propose   a tree of T nodes below the last token of each text
    step      one pass of the target over all T nodes
    verify    a path down the tree, and one token after its end
    keep      the path's nodes stay in the target's memory, the new tokens join the text
    update    the drafter learns what happened
"""

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

from decoding.model import LM
from decoding.scores import Scores
from decoding.tree import DraftTree
from lm.model.contract import NOTHING, Ask, Memory, Seen


@flax.struct.dataclass
class Text:
    """The texts of a batch.

    Attributes:
      token_BS: int32, prompt and continuation; behind `length_B`, anything.
      length_B: int32, at least 1. The last token, at `length - 1`, is the root of the next tree;
        the target has not read it yet.
      key_B: each row's own key. The draw of the token at position t folds in t, so that a row's
        text does not depend on the rows beside it (`decoding.sample`).
    """

    token_BS: jax.Array
    length_B: jax.Array
    key_B: jax.Array


class Prompt(NamedTuple):
    """The prompts, and the target's pass over them.

    Attributes:
      token_BL: int32, the prompts, padded on the right.
      text: see `Text`.
      rows: that a memory of the drafter's own needs: the longest text, and one tree.
      params, memory: the target's; the memory holds all but each text's last token.
      seen: of all L tokens, with the layers that `Method.ask` names.
    """

    token_BL: jax.Array
    text: Text
    rows: int
    params: Any
    memory: Memory
    seen: Seen


class Context(NamedTuple):
    """The inputs of a draft: the texts, and the target's parameters and memory."""

    text: Text
    params: Any
    memory: Memory


class PartialPass(NamedTuple):
    """Nodes of a tree that have run through the target's first `Method.shared_layers` layers.

    Attributes:
      x_BTD: the stream after these layers.
      memory: the target's, with the nodes' rows of these layers.
    """

    x_BTD: jax.Array
    memory: Memory


class Proposal(NamedTuple):
    """A tree, the drafter's state, and the part of the target's pass that drafting already ran."""

    tree: DraftTree
    state: Any
    partial: PartialPass | None = None


class Verdict(NamedTuple):
    """The decision of a verifier.

    Attributes:
      path_BP: int32 `[B, depth + 1]`: accepted nodes from the root (0) down; repeats its last
        node where it is shorter.
      accepted_B: int32: accepted nodes below the root.
      next_B: int32: the token drawn after the last of them.
    """

    path_BP: jax.Array
    accepted_B: jax.Array
    next_B: jax.Array


class Outcome(NamedTuple):
    """The outcome of a round, for the drafter to learn from.

    Attributes:
      tree: as it was proposed.
      scores: the target's own, after each node.
      seen: of the target's pass, with the layers that `Method.ask` names; not those that already
        ran while drafting (`PartialPass`).
      verdict: see `Verdict`.
      text: with the new tokens.
      count_B: int32, how many those are; 0 for rows that were done.
    """

    tree: DraftTree
    scores: Scores
    seen: Seen
    verdict: Verdict
    text: Text
    count_B: jax.Array


class Init(Protocol):
    """Returns a drafter's state before the first round."""

    def __call__(self, params: Any, prompt: Prompt, /, **extra: Any) -> Any: ...


class Propose(Protocol):
    """Returns a tree whose root is the last token of each text."""

    def __call__(self, params: Any, state: Any, context: Context, /, **extra: Any) -> Proposal: ...


class Update(Protocol):
    """Returns a drafter's state after a round."""

    def __call__(self, params: Any, state: Any, outcome: Outcome, /, **extra: Any) -> Any: ...


class Method(NamedTuple):
    """The static part of a drafter: three pure functions, and the sizes of their trees.

    Attributes:
      init, propose, update: see the protocols of these names.
      trees: class of the trees; verifiers accept some classes only.
      nodes: T, the root included.
      depth: of the deepest node.
      branching: children of one node at most.
      shared_layers: layers of the target that run while drafting (`PartialPass`).
      ask: extra results of the target's passes that the drafter needs.
    """

    init: Init
    propose: Propose
    update: Update
    trees: type[DraftTree]
    nodes: int
    depth: int
    branching: int
    shared_layers: int = 0
    ask: Ask = NOTHING


class Provenance(NamedTuple):
    """Where drafts come from; for checks and for metrics.

    Attributes:
      model: draft model, to be checked against the target; None if there is none.
      calls: passes of a draft model per round.
      size: parameters that one such pass reads.
    """

    model: LM | None = None
    calls: int = 0
    size: int = 0


class Drafter(NamedTuple):
    """A way to draft.

    Make it once and use it for many calls: the method is part of the compiled program.

    Attributes:
      method: see `Method`.
      params: arrays that its functions need: a draft model's parameters, say.
      provenance: see `Provenance`.
    """

    method: Method
    params: Any = None
    provenance: Provenance = Provenance()


class Verify(Protocol):
    """Returns which path of a tree stands, and the token after it.

    Args:
      tree: as proposed.
      distribution: the target's after each node, adjusted by the sampler (`scores.Distribution`);
        `scores.Probabilities` for a rule that is `dense`.
      text: see `Text`.
      depth, branching: of the tree, static.
    """

    def __call__(
        self, tree: DraftTree, distribution: Any, text: Text, depth: int, branching: int,
        **extra: Any,
    ) -> Verdict: ...  # fmt: skip


class Verifier(NamedTuple):
    """An exact rule: whatever the drafter proposes, texts follow the target's distribution.

    Attributes:
      verify: see `Verify`.
      trees: the class of trees for which the rule is exact.
      name: for tables.
      dense: whether it needs the probability of every token (`scores.Probabilities`).
    """

    verify: Verify
    trees: type[DraftTree]
    name: str
    dense: bool = False
