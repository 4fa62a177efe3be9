"""What a drafter and a verifier are, and what passes between them and the loop.

One round of decoding (`decoding.generate`):

    propose   tree of T nodes below the last token of each text
    target    one forward pass over all T nodes
    verify    path down the tree, and one token after its end
    commit    the path's cache rows, the new tokens
    update    the drafter learns what happened
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

from decoding.tree import DraftTree
from lm.model.cache import Cache
from lm.model.config import Config
from lm.model.params import Params


class Model(NamedTuple):
    """A language model to decode with.

    Attributes:
      config, params: see `lm`.
      tokenizer: digest of its tokenizer; draft and target must agree on it. Empty: not known.
      bos: the input-only id that starts documents, never drawn; None if there is none.
    """

    config: Config
    params: Params
    tokenizer: str = ''
    bos: int | None = None


@flax.struct.dataclass
class Text:
    """What is known of each row.

    Attributes:
      token_BS: int32, prompt and continuation; behind `length_B`, anything.
      length_B: int32, at least 1. The last token, the root of the next tree, is at `length - 1`
        and not cached yet.
      key_B: each row's own key. Draws for the token at position t fold in t, so that a row's text
        does not depend on the rows beside it (`decoding.sample`).
    """

    token_BS: jax.Array
    length_B: jax.Array
    key_B: jax.Array


class Begun(NamedTuple):
    """The target's first layers, already run over the nodes of a tree.

    Attributes:
      x_BTD: the stream after `Drafter.shared_layers` layers.
      cache: the target's, T rows longer, with those layers' keys and values written.
    """

    x_BTD: jax.Array
    cache: Cache


class Verdict(NamedTuple):
    """What a verifier decided.

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
    """What a round came to, for the drafter to learn from.

    Attributes:
      tree: as it was proposed.
      logits_BTV: f32, the target's own, after each node.
      verdict: see `Verdict`.
      text: with the new tokens.
    """

    tree: DraftTree
    logits_BTV: jax.Array
    verdict: Verdict
    text: Text


class Drafter(NamedTuple):
    """A way to draft: three pure functions, and what is static about the trees they make.

    Make it once and use it for many calls: the functions are part of what is compiled.

    Attributes:
      init: (params, text, rows) -> state, for texts whose cached part is all but the last token;
        caches of a drafter's own need `rows` rows.
      propose: (params, state, text, target params, target cache) -> (tree, state, begun). The
        root's position is `text.length_B - 1`. `begun` is None where `shared_layers` is 0.
      update: (params, state, outcome) -> state.
      params: what the functions need beside their state: a draft model's parameters, say.
      trees: the class of trees that it makes; verifiers accept some classes only.
      nodes: T, the root included.
      depth: of the deepest node.
      branching: children of one node at most.
      calls: passes of a draft model per round.
      size: parameters run per draft call; the memory-bound speed-up sets them against the target's.
      model: draft model, to be checked against the target; None where there is none.
      shared_layers: of the target, run while drafting (`Begun`).
    """

    init: Callable[[Any, Text, int], Any]
    propose: Callable[[Any, Any, Text, Params, Cache], tuple[DraftTree, Any, Begun | None]]
    update: Callable[[Any, Any, Outcome], Any]
    params: Any
    trees: type[DraftTree]
    nodes: int
    depth: int
    branching: int
    calls: int = 0
    size: int = 0
    model: Model | None = None
    shared_layers: int = 0


class Verifier(NamedTuple):
    """An exact rule: whatever the drafter proposes, texts follow the target's law.

    Attributes:
      verify: (tree, logprob_BTV, text, depth, branching) -> Verdict. `logprob_BTV` is the
        target's law after each node, log-probabilities after the sampler's adjustments.
      trees: the class of trees for which the rule is exact.
      name: for tables.
    """

    verify: Callable[[DraftTree, jax.Array, Text, int, int], Verdict]
    trees: type[DraftTree]
    name: str
