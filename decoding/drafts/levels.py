"""Trees that a draft model grows level by level, and the drafters made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding import sample
from decoding.drafter import Drafter, Model, Text
from decoding.drafts import draft_model
from decoding.drafts.draft_model import State, Weights, pick
from decoding.sample import Sampler
from decoding.tree import DraftTree
from lm.model import params as params_lib
from lm.model import tables
from lm.model.cache import Cache
from lm.model.params import Params

DRAFTS = 2  # tag of draft noise, which must not be the noise that verifies (`sample.at_position`)


class Children(NamedTuple):
    """The next level, each node's children side by side in the order they were drawn.

    Attributes:
      parent_BM: int32, place in the level above.
      token_BM: int32.
      valid_BM: bool; children of invalid parents need not be marked.
      carry: whatever the drafter wants to know when it draws the level below.
    """

    parent_BM: jax.Array
    token_BM: jax.Array
    valid_BM: jax.Array
    carry: Any = None


Draw = Callable[[jax.Array, jax.Array, int, Any], Children]
Propose = Callable[[Model, Sampler, Cache, Text], tuple[DraftTree, jax.Array, Cache]]


def drafter(
    model: Model,
    sampler: Sampler | None,
    propose: Propose,
    trees: type[DraftTree],
    sizes: tuple[int, ...],
    branching: int,
    nodes: int | None = None,
) -> Drafter:
    """Returns the drafter that asks `propose(model, sampler, cache, text)` for trees.

    Args:
      model: the draft model.
      sampler: how its logits become the law that children are drawn from; by default as they are.
      propose: returns a tree, each node's row counted from the root's, and the cache.
      trees: class of the trees.
      sizes: nodes of each level below the root that `propose` draws.
      branching: children of one node at most.
      nodes: of the trees, root included; by default all those that are drawn.
    """
    drawn = 1 + sum(sizes)
    nodes = drawn if nodes is None else nodes
    # tracing must see the weights as arguments, never as constants
    bare = model._replace(params={})

    def run(weights: Weights, state: State, text: Text, target: Params, target_cache: Cache):
        del target, target_cache
        live = bare._replace(params=_with_tables(weights.params, state.tables))
        tree, row_BT, cache = propose(live, weights.sampler, state.cache, text)
        return tree, State(cache, text.length_B - 1, row_BT, state.tables), None

    def init(weights: Weights, text: Text, rows: int) -> State:
        own = tables.for_texts(weights.params['tables'], model.config, text.key_B)
        live = bare._replace(params=_with_tables(weights.params, own))
        cache = draft_model.prefill(live, text, rows + drawn - nodes)
        row_BT = jnp.zeros((text.length_B.shape[0], nodes), jnp.int32)
        return State(cache, text.length_B - 1, row_BT, own)

    return Drafter(
        init=init,
        propose=run,
        update=draft_model.update,
        params=Weights(model.params, Sampler() if sampler is None else sampler),
        trees=trees,
        nodes=nodes,
        depth=len(sizes),
        branching=branching,
        calls=len(sizes),
        size=params_lib.count(model.config),
        model=model,
    )


def grow(
    draw: Draw, depth: int, trees: Callable[..., DraftTree], model: Model, sampler: Sampler,
    cache: Cache, text: Text,
) -> tuple[DraftTree, Cache, Any]:  # fmt: skip
    """Grows a tree level by level; its nodes stand in the cache in their own order.

    Args:
      draw: (law_BMV of the nodes above, key_B, level, carry) -> their children. Above level 1
        is the root, with a carry of None.
      depth: of the deepest level.
      trees: makes the tree, from token, parent, depth, validity and law.
      model, sampler, cache, text: see `draft_model.begin`.

    Returns:
      The tree, the cache, and the last carry.
    """
    above, cache = draft_model.begin(model, sampler, cache, text)
    token_BM = pick(text.token_BS, text.length_B[:, None] - 1)
    zeros = jnp.zeros_like(token_BM)
    nodes = [(token_BM, zeros - 1, zeros, zeros == 0)]
    laws = [above.law_BMV]
    first, carry = 0, None  # `first` is the first node of the level above
    for level in range(1, depth + 1):
        key_B = sample.at_position(text.key_B, text.length_B - 1, DRAFTS, level)
        children = draw(above.law_BMV, key_B, level, carry)
        carry = children.carry
        valid_BM = children.valid_BM & pick(nodes[-1][3], children.parent_BM)
        at_level = jnp.full_like(children.token_BM, level)
        nodes.append((children.token_BM, first + children.parent_BM, at_level, valid_BM))
        first += above.law_BMV.shape[1]
        if level < depth:
            above, cache = draft_model.extend(
                model, sampler, cache, text, above, children.parent_BM, children.token_BM
            )
            laws.append(above.law_BMV)
    leaves = (*nodes[-1][0].shape, laws[0].shape[-1])
    laws.append(jnp.zeros(leaves, laws[0].dtype))
    fields = [jnp.concatenate(parts, axis=1) for parts in zip(*nodes, strict=True)]
    return trees(*fields, jnp.concatenate(laws, axis=1)), cache, carry


def whole(draw: Draw, depth: int, trees: Callable[..., DraftTree]) -> Propose:
    """Returns what proposes all that `grow` grew."""

    def propose(model, sampler, cache, text):
        tree, cache, _ = grow(draw, depth, trees, model, sampler, cache, text)
        row_BT = jnp.broadcast_to(jnp.arange(tree.token_BT.shape[1]), tree.token_BT.shape)
        return tree, row_BT, cache

    return propose


def top(law_BMV: jax.Array, key_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws without replacement from each law: the Gumbel-top-k trick (Kool et al. 2019).

    Returns:
      Tokens `[B, M, count]` in the order drawn, and their perturbed log-probabilities; tokens
      outside of the support come last, with -inf.
    """
    noise_BMV = sample.gumbel(key_B, law_BMV.shape[1:], law_BMV.dtype)
    perturbed, token = jax.lax.top_k(law_BMV + noise_BMV, count)
    return token, perturbed


def keep(token_BMK: jax.Array, value_BMK: jax.Array, size: int, carry: tuple) -> Children:
    """Keeps the `size` children of the greatest values, in the order parent, rank.

    Args:
      token_BMK: each node's children in the order drawn.
      value_BMK: does not increase along K; ties go to the first. -inf: no child.
      size: how many to keep.
      carry: arrays `[B, M, K]`, of which the children's entries are carried on.
    """
    b, _, k = token_BMK.shape
    flat = [x.reshape(b, -1) for x in (token_BMK, value_BMK, *carry)]
    kept_BM = jnp.sort(jax.lax.top_k(flat[1], size)[1], axis=1)
    token_BM, value_BM, *carried = (pick(x, kept_BM) for x in flat)
    return Children(kept_BM // k, token_BM, value_BM > -jnp.inf, tuple(carried))


def check(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Raises ValueError unless least <= value <= most."""
    if value < least or (most is not None and value > most):
        upper = '' if most is None else f' and at most {most}'
        raise ValueError(f'{name}: {value}; expected at least {least}{upper}')


def _with_tables(params: Params, own: Params | None) -> Params:
    return params if own is None else {**params, 'tables': own}
