"""DySpec: trees whose shape follows the acceptance that the draft model expects.

Xiong et al. 2024, "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure" (arXiv
2410.11744).

A slot is a place for a child: the i-th of a node u. Its value is the probability that the walk
tries it, were a drawn token y accepted with the draft model's own probability of it,

    value(u, i) = P(u) (1 - q(y_1) - ... - q(y_i-1)),    P(u): product of q along the path to u,

which is known before the slot's own token is drawn. DySpec's greedy algorithm fills the most
valuable slot over and over, one draft call each. Its threshold form fills all slots above a
threshold, one level per call. Here levels are drawn the same way, wide enough for any outcome, and
the N - 1 most valuable slots of all levels stay: those that the greedy algorithm fills, but with
one call per level; the threshold applies besides.

Why that is exact although slots are given up after they were drawn: whether a slot stays depends
on its value and on how many others are worth more. Its younger siblings and its descendants are
worth no more than itself, and come behind it in a tie. The values of all others do not depend on
its token. So no slot's token has a say in whether the slot stays. (What would be biased is to give
up nodes by how probable they turned out to be.)
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
      nodes: of the tree, root included; where fewer slots are worth it, the rest is not valid.
      depth: of the deepest node at most; draft calls per round.
      threshold: slots of this value or less stay empty. It saves no time where, as here, a pass
        over a tree costs the same whatever is in it.
      sampler: how its logits become the distribution that children are drawn from; by default as
        they are.

    Raises:
      ValueError: nodes below 2 or more than a tree of this depth has, depth below 1 or above
        nodes - 1, threshold outside of [0, 1).
    """
    levels.check('nodes', nodes, least=2)
    levels.check('depth', depth, most=nodes - 1)
    if not 0 <= threshold < 1:
        raise ValueError(f'threshold: {threshold}; expected at least 0 and below 1')
    vocab_size = lm.model.vocab_size
    # Who stays at a level has an ancestor at each level above, and may have only elder siblings
    # beside these: so many slots of a level, and of a node, can stay at most.
    most = [nodes - level for level in range(1, depth + 1)]
    ranks = [min(m, vocab_size) for m in most]
    sizes: tuple[int, ...] = ()
    for m, k in zip(most, ranks, strict=True):
        sizes += (min(m, k * (sizes[-1] if sizes else 1)),)
    levels.check('nodes', nodes, most=1 + sum(sizes))

    def draw(logprob_BMV, key_B, level, carry):
        mass_BM, worth = carry or (jnp.ones(logprob_BMV.shape[:2], logprob_BMV.dtype), ())
        token_BMK, perturbed_BMK = levels.top(logprob_BMV, key_B, ranks[level - 1])
        q_BMK = jnp.exp(jnp.take_along_axis(logprob_BMV, token_BMK, axis=2))
        value_BMK = slot_values(mass_BM, q_BMK)
        value_BMK = jnp.where(perturbed_BMK > -jnp.inf, value_BMK, 0)
        # a child's own slots are worth no more than its own, whatever rounding does
        mass_BMK = jnp.minimum(mass_BM[..., None] * q_BMK, value_BMK)
        ranked_BMK = jnp.where(value_BMK > threshold, value_BMK, -jnp.inf)
        children = levels.keep(token_BMK, ranked_BMK, sizes[level - 1], (mass_BMK, ranked_BMK))
        mass_BM, ranked_BM = children.carry
        return children._replace(carry=(mass_BM, (*worth, ranked_BM)))

    def grown(draft, memory, text):
        drawn, memory, (_, worth) = levels.grow(
            draw, depth, WithoutReplacement, draft, memory, text
        )
        tree, index_BT = most_valuable(drawn, jnp.concatenate(worth, axis=1), nodes)
        return levels.Grown(tree, index_BT, memory)

    return levels.drafter(lm, sampler, grown, WithoutReplacement, sizes, ranks[0], nodes=nodes)


def slot_values(mass_BM: jax.Array, q_BMK: jax.Array) -> jax.Array:
    """Returns the value of each node's slots; it does not increase along K.

    Args:
      mass_BM: probability of the path to each node.
      q_BMK: probability of each child drawn, in the order drawn.
    """
    # of the elders alone: a difference of sums would let the slot's own token into the rounding
    before_BMK = jnp.cumsum(jnp.pad(q_BMK[..., :-1], ((0, 0), (0, 0), (1, 0))), axis=2)
    return mass_BM[..., None] * jax.lax.cummin(jnp.maximum(1 - before_BMK, 0), axis=2)


def most_valuable(drawn: DraftTree, value_BT: jax.Array, nodes: int) -> tuple[DraftTree, jax.Array]:
    """Returns the tree of the root and its most valuable slots, and each node's place in `drawn`.

    Args:
      drawn: a tree of at least `nodes` nodes.
      value_BT: of each node but the root; -inf: stays empty. No node's exceeds its parent's or its
        elder siblings'; ties go to the first.
      nodes: T of the result.
    """
    count = drawn.token_BT.shape[1]
    value_BT = jnp.pad(value_BT, ((0, 0), (1, 0)), constant_values=jnp.inf)
    value_BT = jnp.where(drawn.valid_BT, value_BT, -jnp.inf)
    best, place_BT = jax.lax.top_k(value_BT, nodes)
    place_BT = jnp.sort(jnp.where(best > -jnp.inf, place_BT, count), axis=1)
    valid_BT = place_BT < count
    stays = jnp.any(place_BT[..., None] == jnp.arange(count), axis=1)
    index = jnp.cumsum(stays, axis=1) - 1  # of a node that stays, among those that stay
    place_BT = jnp.where(valid_BT, place_BT, 0)
    tree = jax.tree.map(lambda x: pick(x, place_BT), drawn)
    parent_BT = jnp.take_along_axis(index, jnp.maximum(tree.parent_BT, 0), axis=1)
    parent_BT = jnp.where(valid_BT & (jnp.arange(nodes) > 0), parent_BT, 0).at[:, 0].set(-1)
    return dataclasses.replace(tree, parent_BT=parent_BT, valid_BT=valid_BT), place_BT
