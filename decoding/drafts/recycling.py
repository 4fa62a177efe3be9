"""Token Recycling (Luo et al. 2024, arXiv 2408.08696): drafts the last known successors.

A matrix holds each token's k most probable successors, from the target's last pass over that token,
on an accepted or a rejected path. A template tree is filled from it.
"""

import flax.struct
import jax
import jax.numpy as jnp

from decoding import tree as tree_lib
from decoding.drafter import Context, Drafter, Method, Outcome, Prompt, Proposal, Verdict
from decoding.drafts import template as template_lib
from decoding.drafts.template import Template
from decoding.tree import DraftTree

RANKS = 8
# level sizes of the paper's template: 80 nodes below the root
LEVELS = (8, 21, 25, 15, 8, 3)


@flax.struct.dataclass
class State:
    """The known successors of each token.

    Attributes:
      successor_BVA: int32 `[B, V, k]`, most probable first; -1 for tokens not seen yet. Each row of
        a batch has its own, so that neither its text nor its number of rounds depends on the other
        rows. A row takes 4 k V bytes: 4 MB at V = 128,000.
    """

    successor_BVA: jax.Array


def recycling(
    vocab_size: int,
    *,
    template: Template | None = None,
    ranks: int = RANKS,
    warm_VA: jax.Array | None = None,
) -> Drafter:
    """Returns the drafter; its trees do not depend on the draws that verify them.

    Args:
      vocab_size: of the target.
      template: shape of the tree; by default the paper's level sizes. For another number of nodes,
        `template.best_first(template.acceptance_of(ranks), nodes)`.
      ranks: k, successors kept per token; at least the template's.
      warm_VA: int32 `[V, k]`, successors known from earlier calls (`pool`); by default none, a
        cold start. The paper keeps its matrix from one question to the next.

    Raises:
      ValueError: the template asks for ranks that are not kept, or `warm_VA` has another shape.
    """
    if template is None:
        template = template_lib.of_levels(template_lib.acceptance_of(RANKS), LEVELS)
    _check(vocab_size, template, ranks, warm_VA)

    def init(params: jax.Array | None, prompt: Prompt, /, **extra) -> State:
        b = prompt.text.length_B.shape[0]
        if params is None:
            return State(jnp.full((b, vocab_size, ranks), -1, jnp.int32))
        return State(jnp.broadcast_to(params, (b, vocab_size, ranks)))

    def propose(params, state: State, context: Context, /, **extra) -> Proposal:
        text = context.text
        batch = jnp.arange(text.length_B.shape[0])[:, None]
        root_B = tree_lib.at(text.token_BS, text.length_B - 1)
        drafted = template_lib.fill(template, root_B, lambda x: state.successor_BVA[batch, x])
        return Proposal(drafted, state)

    def update(params, state: State, outcome: Outcome, /, **extra) -> State:
        newest_BT = _newest(outcome.tree, outcome.verdict)
        best_BTA = outcome.scores.top(ranks)
        return State(write(state.successor_BVA, outcome.tree.token_BT, best_BTA, newest_BT))

    method = Method(
        init=init,
        propose=propose,
        update=update,
        trees=DraftTree,
        nodes=len(template.parent),
        depth=int(template.depth.max()),
        branching=max(int(template.rank.max()) + 1, 1),
    )
    return Drafter(method, None if warm_VA is None else jnp.asarray(warm_VA, jnp.int32))


def write(
    successor_BVA: jax.Array, token_BT: jax.Array, best_BTA: jax.Array, write_BT: jax.Array
) -> jax.Array:
    """Returns the matrix with the successors of T tokens replaced.

    Args:
      successor_BVA: see `State`.
      token_BT: int32.
      best_BTA: int32, the target's k most probable tokens after each of them.
      write_BT: bool: which of them are written; at most one per distinct token.
    """
    b, v, _ = successor_BVA.shape
    target_BT = jnp.where(write_BT, token_BT, v)  # out of range: dropped
    return successor_BVA.at[jnp.arange(b)[:, None], target_BT].set(best_BTA, mode='drop')


def pool(successor_BVA: jax.Array) -> jax.Array:
    """Returns the successors of all rows of a batch merged, int32 `[V, k]`, for a warm start.

    If several rows have seen a token, the last one's are taken.
    """
    met_BV = successor_BVA[..., 0] >= 0
    rows = jnp.arange(met_BV.shape[0])[:, None]
    last_V = jnp.argmax(jnp.where(met_BV, rows + 1, 0), axis=0)
    return successor_BVA[last_V, jnp.arange(met_BV.shape[1])]


def _newest(drafted: DraftTree, verdict: Verdict) -> jax.Array:
    """Returns bool `[B, T]`: for each token in the tree, the one node whose logits are kept.

    Nodes of the accepted path win over rejected ones, and later nodes over earlier ones.
    """
    t = drafted.token_BT.shape[1]
    nodes = jnp.arange(t)
    on_path_BT = jnp.any(verdict.path_BP[..., None] == nodes, axis=1)
    priority_BT = jnp.where(drafted.valid_BT, nodes + t * on_path_BT, -1)
    same_BTT = drafted.token_BT[:, None] == drafted.token_BT[..., None]
    beaten_BT = jnp.any(same_BTT & (priority_BT[:, None] > priority_BT[..., None]), axis=-1)
    return drafted.valid_BT & ~beaten_BT


def _check(vocab_size: int, template: Template, ranks: int, warm_VA: jax.Array | None) -> None:
    if template.rank.max() >= ranks:
        raise ValueError(
            f'recycling: the template asks for rank {template.rank.max()}; {ranks} are kept'
        )
    if not ranks <= vocab_size:
        raise ValueError(f'recycling: {ranks} successors kept of {vocab_size} symbols')
    if warm_VA is not None and warm_VA.shape != (vocab_size, ranks):
        raise ValueError(
            f'recycling: warm_VA of shape {warm_VA.shape}; expected {(vocab_size, ranks)}'
        )
