"""DySpec: trees whose shape follows the acceptance that the draft model expects.

Xiong et al. 2024, "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure" (arXiv
2410.11744).

A slot (u, i) is the place of node u's i-th child. Its value is the probability that verification
tries it, if a drawn token y were accepted with the draft model's probability q(y),

    value(u, i) = P(u) (1 - q(y_1) - ... - q(y_i-1)),    P(u): product of q along the path to u,

It is known before the slot's own token is drawn. DySpec's greedy algorithm repeatedly fills the
most valuable slot, with one draft call each. Its threshold form fills all slots above a threshold,
one level per call. Here levels are drawn the same way, wide enough for any outcome, and the N - 1
most valuable slots of all levels are kept. These are the slots that the greedy algorithm fills, for
one call per level. The threshold applies as well.

Dropping slots after they were drawn is exact. Whether a slot is kept depends on its value and on
how many others are worth more. Its younger siblings and its descendants are worth no more, and lose
ties against it; the values of all other slots do not depend on its token. So whether a slot is kept
does not depend on its token. (Dropping nodes by the probability of their tokens would be biased.)
"""

import dataclasses

import jax
import jax.numpy as jnp

from decoding.drafter import Drafter
from decoding.drafts import levels
from decoding.drafts.draft_model import pick
from decoding.model import LM
from decoding.sample import Sampler
from decoding.tree import DraftTree, WithoutReplacement


def dynamic(
    lm: LM, nodes: int, depth: int, threshold: float = 0.0, sampler: Sampler | None = None
) -> Drafter:
    """Returns the drafter of trees of the most valuable slots.

    Args:
      lm: the draft model.
      nodes: of the tree, root included; if fewer slots exceed the threshold, the others are
        invalid.
      depth: maximum depth of a node; draft calls per round.
      threshold: slots of this value or less stay empty. This saves no time: a pass over a tree
        costs the same, however many nodes are valid.
      sampler: applied to the draft model's logits; by default their softmax.

    Raises:
      ValueError: nodes below 2 or more than a tree of this depth has, depth below 1 or above
        nodes - 1, threshold outside of [0, 1).
    """
    levels.check('nodes', nodes, least=2)
    levels.check('depth', depth, most=nodes - 1)
    if not 0 <= threshold < 1:
        raise ValueError(f'threshold: {threshold}; expected at least 0 and below 1')
    vocab_size = lm.model.vocab_size
    # A kept slot's ancestors and elder siblings are kept, too. This bounds the number of slots kept
    # per level and per node.
    most = [nodes - level for level in range(1, depth + 1)]
    ranks = [min(m, vocab_size) for m in most]
    sizes: tuple[int, ...] = ()
    for m, k in zip(most, ranks, strict=True):
        sizes += (min(m, k * (sizes[-1] if sizes else 1)),)
    levels.check('nodes', nodes, most=1 + sum(sizes))

    def draw(logprob_BMV, key_B, level, carry):
        mass_BM, worth = carry or (jnp.ones(logprob_BMV.shape[:2], logprob_BMV.dtype), ())
        token_BMA, perturbed_BMA = levels.top(logprob_BMV, key_B, ranks[level - 1])
        q_BMA = jnp.exp(jnp.take_along_axis(logprob_BMV, token_BMA, axis=2))
        value_BMA = slot_values(mass_BM, q_BMA)
        value_BMA = jnp.where(perturbed_BMA > -jnp.inf, value_BMA, 0)
        # a child's slots are worth no more than the child's own, despite rounding
        mass_BMA = jnp.minimum(mass_BM[..., None] * q_BMA, value_BMA)
        ranked_BMA = jnp.where(value_BMA > threshold, value_BMA, -jnp.inf)
        children = levels.keep(token_BMA, ranked_BMA, sizes[level - 1], (mass_BMA, ranked_BMA))
        mass_BM, ranked_BM = children.carry
        return children._replace(carry=(mass_BM, (*worth, ranked_BM)))

    def grown(draft, memory, text):
        drawn, memory, (_, worth) = levels.grow(
            draw, depth, WithoutReplacement, draft, memory, text
        )
        tree, index_BT = most_valuable(drawn, jnp.concatenate(worth, axis=1), nodes)
        return levels.Grown(tree, index_BT, memory)

    return levels.drafter(lm, sampler, grown, WithoutReplacement, sizes, ranks[0], nodes=nodes)


def slot_values(mass_BM: jax.Array, q_BMA: jax.Array) -> jax.Array:
    """Returns the value of each node's slots, `[B, M, A]`, non-increasing along A.

    Args:
      mass_BM: probability of the path to each node.
      q_BMA: probability of each child drawn, in the order drawn.
    """
    # elder siblings only: in a difference of sums, rounding would depend on the slot's own token
    before_BMA = jnp.cumsum(jnp.pad(q_BMA[..., :-1], ((0, 0), (0, 0), (1, 0))), axis=2)
    return mass_BM[..., None] * jax.lax.cummin(jnp.maximum(1 - before_BMA, 0), axis=2)


def most_valuable(drawn: DraftTree, value_BT: jax.Array, nodes: int) -> tuple[DraftTree, jax.Array]:
    """Returns the tree of the root and the most valuable slots, and each node's index in `drawn`.

    Args:
      drawn: a tree of at least `nodes` nodes.
      value_BT: of each node but the root; -inf leaves a slot empty. No value exceeds that of the
        parent or of elder siblings; ties go to the first.
      nodes: T of the result.
    """
    count = drawn.token_BT.shape[1]
    value_BT = jnp.pad(value_BT, ((0, 0), (1, 0)), constant_values=jnp.inf)
    value_BT = jnp.where(drawn.valid_BT, value_BT, -jnp.inf)
    best, place_BT = jax.lax.top_k(value_BT, nodes)
    place_BT = jnp.sort(jnp.where(best > -jnp.inf, place_BT, count), axis=1)
    valid_BT = place_BT < count
    stays = jnp.any(place_BT[..., None] == jnp.arange(count), axis=1)
    index = jnp.cumsum(stays, axis=1) - 1  # of each kept node, among the kept nodes
    place_BT = jnp.where(valid_BT, place_BT, 0)
    tree = jax.tree.map(lambda x: pick(x, place_BT), drawn)
    parent_BT = jnp.take_along_axis(index, jnp.maximum(tree.parent_BT, 0), axis=1)
    parent_BT = jnp.where(valid_BT & (jnp.arange(nodes) > 0), parent_BT, 0).at[:, 0].set(-1)
    return dataclasses.replace(tree, parent_BT=parent_BT, valid_BT=valid_BT), place_BT
