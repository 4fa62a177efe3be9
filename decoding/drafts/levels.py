"""Trees that a draft model grows level by level, and the drafters of such trees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from decoding import sample
from decoding.drafter import Context, Drafter, Method, Prompt, Proposal, Provenance, Text
from decoding.drafts import draft_model
from decoding.drafts.draft_model import Draft, State, Weights, pick
from decoding.model import LM
from decoding.sample import Sampler
from decoding.tree import DraftTree
from lm.model.contract import Memory

DRAFTS = 2  # tag of draft noise, independent of the verifier's (`sample.at_position`)


class Children(NamedTuple):
    """The next level, each node's children side by side in the order they were drawn.

    Attributes:
      parent_BM: int32, index in the level above.
      token_BM: int32.
      valid_BM: bool; children of invalid parents need not be marked invalid.
      carry: passed to the draw of the level below.
    """

    parent_BM: jax.Array
    token_BM: jax.Array
    valid_BM: jax.Array
    carry: Any = None


class Draw(Protocol):
    """Draws the children of a level's nodes from their log-probabilities.

    Level 1 is drawn from the root, with a carry of None.
    """

    def __call__(
        self, logprob_BMV: jax.Array, key_B: jax.Array, level: int, carry: Any
    ) -> Children: ...


class Grown(NamedTuple):
    """A tree, each node's index among those drawn, and the draft model's memory."""

    tree: DraftTree
    index_BT: jax.Array
    memory: Memory


class Grow(Protocol):
    """Grows a tree below the last token of each text."""

    def __call__(self, draft: Draft, memory: Memory, text: Text) -> Grown: ...


def drafter(
    lm: LM,
    sampler: Sampler | None,
    grown: Grow,
    trees: type[DraftTree],
    sizes: tuple[int, ...],
    branching: int,
    nodes: int | None = None,
) -> Drafter:
    """Returns the drafter of the trees that `grown` returns.

    Args:
      lm: the draft model.
      sampler: applied to the draft model's logits; by default their softmax.
      grown: see `Grow`.
      trees: class of the trees.
      sizes: number of nodes drawn at each level below the root.
      branching: maximum number of children per node.
      nodes: of the trees, root included; by default all that are drawn.
    """
    drawn = 1 + sum(sizes)
    nodes = drawn if nodes is None else nodes
    model = lm.model

    def init(weights: Weights, prompt: Prompt, /, **extra: Any) -> State:
        # dropped nodes and the token before the root need rows, too
        rows = prompt.rows + drawn - nodes + 1
        memory = draft_model.prefill(model, weights.params, prompt, rows)
        return State(memory, jnp.zeros((prompt.text.length_B.shape[0], nodes), jnp.int32))

    def propose(weights: Weights, state: State, context: Context, /, **extra: Any) -> Proposal:
        draft = Draft(model, *weights)
        tree, index_BT, memory = grown(draft, state.memory, context.text)
        return Proposal(tree, State(memory, index_BT))

    return Drafter(
        Method(
            init=init,
            propose=propose,
            update=functools.partial(draft_model.update, model),
            trees=trees,
            nodes=nodes,
            depth=len(sizes),
            branching=branching,
        ),
        Weights(lm.params, Sampler() if sampler is None else sampler),
        Provenance(lm, calls=len(sizes), size=model.size),
    )


def grow(
    draw: Draw, depth: int, trees: Callable[..., DraftTree], draft: Draft, memory: Memory,
    text: Text,
) -> tuple[DraftTree, Memory, Any]:  # fmt: skip
    """Grows a tree level by level; its nodes enter the memory in order.

    Args:
      draw: see `Draw`.
      depth: of the deepest level.
      trees: makes the tree of token, parent, depth, validity and log-probabilities.
      draft, memory, text: see `draft_model.begin`.

    Returns:
      The tree, the memory, and the last carry.
    """
    above, memory = draft_model.begin(draft, memory, text)
    token_BM = pick(text.token_BS, text.length_B[:, None] - 1)
    zeros = jnp.zeros_like(token_BM)
    nodes = [(token_BM, zeros - 1, zeros, zeros == 0)]
    logprobs = [above.logprob_BMV]
    first, carry = 0, None  # `first` is the first node of the level above
    for level in range(1, depth + 1):
        key_B = sample.at_position(text.key_B, text.length_B - 1, DRAFTS, level)
        children = draw(above.logprob_BMV, key_B, level, carry)
        carry = children.carry
        valid_BM = children.valid_BM & pick(nodes[-1][3], children.parent_BM)
        at_level = jnp.full_like(children.token_BM, level)
        nodes.append((children.token_BM, first + children.parent_BM, at_level, valid_BM))
        first += above.logprob_BMV.shape[1]
        if level < depth:
            above, memory = draft_model.extend(
                draft, memory, text, above, children.parent_BM, children.token_BM
            )
            logprobs.append(above.logprob_BMV)
    leaves = (*nodes[-1][0].shape, logprobs[0].shape[-1])
    logprobs.append(jnp.zeros(leaves, logprobs[0].dtype))
    fields = [jnp.concatenate(parts, axis=1) for parts in zip(*nodes, strict=True)]
    return trees(*fields, jnp.concatenate(logprobs, axis=1)), memory, carry


def whole(draw: Draw, depth: int, trees: Callable[..., DraftTree]) -> Grow:
    """Returns a `Grow` that keeps every node that `grow` draws."""

    def grown(draft: Draft, memory: Memory, text: Text) -> Grown:
        tree, memory, _ = grow(draw, depth, trees, draft, memory, text)
        index_BT = jnp.broadcast_to(jnp.arange(tree.token_BT.shape[1]), tree.token_BT.shape)
        return Grown(tree, index_BT, memory)

    return grown


def top(logprob_BMV: jax.Array, key_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws without replacement from each distribution: the Gumbel-top-k trick (Kool et al. 2019).

    Returns:
      Tokens `[B, M, count]` in the order drawn, and their perturbed log-probabilities; tokens
      outside of the support come last, with -inf.
    """
    noise_BMV = sample.gumbel(key_B, logprob_BMV.shape[1:], logprob_BMV.dtype)
    perturbed, token = jax.lax.top_k(logprob_BMV + noise_BMV, count)
    return token, perturbed


def keep(token_BMA: jax.Array, value_BMA: jax.Array, size: int, carry: tuple) -> Children:
    """Keeps the `size` children with the greatest values, ordered by parent, then rank.

    Args:
      token_BMA: each node's children in the order drawn.
      value_BMA: non-increasing along A; ties go to the first. -inf: no child.
      size: how many to keep.
      carry: arrays `[B, M, A]`; the kept children's entries are carried on.
    """
    b, _, k = token_BMA.shape
    flat = [x.reshape(b, -1) for x in (token_BMA, value_BMA, *carry)]
    kept_BM = jnp.sort(jax.lax.top_k(flat[1], size)[1], axis=1)
    token_BM, value_BM, *carried = (pick(x, kept_BM) for x in flat)
    return Children(kept_BM // k, token_BM, value_BM > -jnp.inf, tuple(carried))


def check(name: str, value: int, least: int = 1, most: int | None = None) -> None:
    """Raises ValueError unless least <= value <= most."""
    if value < least or (most is not None and value > most):
        upper = '' if most is None else f' and at most {most}'
        raise ValueError(f'{name}: {value}; expected at least {least}{upper}')
