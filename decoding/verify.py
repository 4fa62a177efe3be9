"""The exact rules: which drafted path is accepted, and which token is drawn after it.

Let p be the target's distribution after a node, and q the one its children were drawn from.

    greedy walk           any tree, temperature 0
        follow the child argmax p; without one, emit argmax p
    target-only walk      any tree; gives exactly the tokens of plain sampling
        draw y from p; follow the child y; without one, emit y. Children are accepted with
        probability sum p(x) over their tokens x
    recursive rejection   WithoutReplacement (Jeon et al. 2024, RSD; Chen et al. 2024, Sequoia)
        accept child x with probability min(1, p(x) / q(x)); if it is rejected, p becomes the
        residual [p - q]_+ / sum, q becomes (q without x) / sum; after the last, emit y from p
    speculative sampling  WithoutReplacement, one child per node (Leviathan et al. 2023)
        the same
    K-SEQ                 Independent (Sun et al. 2023, SpecTr)
        follow the first of k children accepted with probability min(1, p(x) / (rho q(x))); without
        one, emit y from [p - min(q, p / rho) (1 - (1 - beta)^k) / beta]_+ / sum, where
        beta = sum min(q, p / rho) and rho is the smallest with 1 - (1 - beta)^k <= rho beta

Each rule is exact for the class of trees that it names, and for no other: recursive rejection over
top-k children, for example, is biased. A tree of another class is refused by its type.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from decoding import rules, sample
from decoding.drafter import Method, Text, Verdict, Verifier
from decoding.scores import Distribution, Probabilities
from decoding.tree import DraftTree, Independent, WithoutReplacement, at, child

ACCEPTANCE = 1  # tag of the uniforms for acceptance; the draw of a token has none
ONE_CHILD = 'speculative sampling is for one child per node, not {}: use recursive rejection'


def _greedy(
    tree: DraftTree, distribution: Distribution, text: Text, depth: int, branching: int, **extra
) -> Verdict:
    def choose(node_B, level):
        return distribution.greatest(node_B)

    return _follow(tree, depth, choose)


def _target_only(
    tree: DraftTree, distribution: Distribution, text: Text, depth: int, branching: int, **extra
) -> Verdict:
    def choose(node_B, level):
        return distribution.draw(node_B, text.key_B, text.length_B + level)

    return _follow(tree, depth, choose)


def _recursive(
    tree: DraftTree, distribution: Probabilities, text: Text, depth: int, branching: int, **extra
) -> Verdict:
    if not isinstance(tree, WithoutReplacement):
        raise _refusal(recursive_rejection, type(tree))
    logprob_BTV = distribution.logprob_BTV

    def both(node_B):
        draft_BV = jnp.exp(at(tree.logprob_BTV, node_B)).astype(logprob_BTV.dtype)
        return jnp.exp(at(logprob_BTV, node_B)), draft_BV

    def candidate(walk, rank_B):
        child_B, exists_B = child(tree, walk.node_B, rank_B[:, None])
        return child_B, exists_B & (rank_B < branching) & (walk.accepted_B < depth)

    # One draft per row and step, at any depth: rows need not wait for each other.
    def step(state):
        walk, rank_B, (child_B, exists_B), target_BV, draft_BV = state
        token_B = at(tree.token_BT, child_B)
        acceptance_B, residual_BV, rest_BV = jax.vmap(rules.rejection_step)(
            target_BV, draft_BV, token_B
        )
        uniform_BA = _uniforms(text, walk.accepted_B, branching, acceptance_B.dtype)
        accept_B = exists_B & (at(uniform_BA, rank_B) < acceptance_B)
        reject_B = exists_B & ~accept_B
        walk = walk.descend(child_B, accept_B)
        rank_B = jnp.where(accept_B, 0, rank_B + reject_B)
        new_target_BV, new_draft_BV = both(child_B)
        target_BV = jnp.where(reject_B[:, None], residual_BV, target_BV)
        target_BV = jnp.where(accept_B[:, None], new_target_BV, target_BV)
        draft_BV = jnp.where(accept_B[:, None], new_draft_BV, rest_BV)
        following = candidate(walk, rank_B)
        following = following[0], following[1] & exists_B
        return walk, rank_B, following, target_BV, draft_BV

    walk = _at_root(tree.token_BT.shape[0], depth)
    rank_B = jnp.zeros_like(walk.accepted_B)
    start = (walk, rank_B, candidate(walk, rank_B), *both(walk.node_B))
    final = jax.lax.while_loop(lambda state: jnp.any(state[2][1]), step, start)
    return _emit(final[0], final[3], text)


def _speculative(
    tree: DraftTree, distribution: Probabilities, text: Text, depth: int, branching: int, **extra
) -> Verdict:
    if not isinstance(tree, WithoutReplacement):
        raise _refusal(speculative_sampling, type(tree))
    if branching > 1:
        raise ValueError(ONE_CHILD.format(branching))
    return _recursive(tree, distribution, text, depth, branching)


def _k_seq(
    tree: DraftTree, distribution: Probabilities, text: Text, depth: int, branching: int, **extra
) -> Verdict:
    if not isinstance(tree, Independent):
        raise _refusal(k_seq, type(tree))
    logprob_BTV = distribution.logprob_BTV
    children = jax.vmap(child, (None, 1, 0), 1)
    rank_A = jnp.arange(branching)

    def step(state):
        level, walk, node_BA, alive_BA, target_BV = state
        alive_B = jnp.any(alive_BA, axis=1)
        # the survivors have the same tokens, and so the same distributions after them
        draft_BV = jnp.exp(at(tree.logprob_BTV, walk.node_B)).astype(target_BV.dtype)
        plan = jax.vmap(rules.k_seq_plan)(target_BV, draft_BV, jnp.sum(alive_BA, axis=1))
        token_BA = jnp.take_along_axis(tree.token_BT, node_BA, axis=1)
        acceptance_BA = rules.k_seq_acceptance(
            jnp.take_along_axis(target_BV, token_BA, axis=1),
            jnp.take_along_axis(draft_BV, token_BA, axis=1),
            plan.rho[:, None],
        )
        uniform_BA = _uniforms(text, walk.accepted_B, branching, acceptance_BA.dtype)
        accept_BA = alive_BA & (uniform_BA < acceptance_BA)
        first_B, accept_B = jnp.argmax(accept_BA, axis=1), jnp.any(accept_BA, axis=1)
        chosen_B = at(node_BA, first_B)
        walk = walk.descend(chosen_B, accept_B)
        target_BV = jnp.where((alive_B & ~accept_B)[:, None], plan.residual_V, target_BV)
        new_target_BV = jnp.exp(at(logprob_BTV, chosen_B))
        target_BV = jnp.where(accept_B[:, None], new_target_BV, target_BV)
        survives_BA = alive_BA & (token_BA == at(token_BA, first_B)[:, None])
        node_BA, exists_BA = children(tree, node_BA, jnp.zeros_like(rank_A))
        alive_BA = survives_BA & exists_BA & accept_B[:, None] & (level + 1 < depth)
        return level + 1, walk, node_BA, alive_BA, target_BV

    batch = tree.token_BT.shape[0]
    walk = _at_root(batch, depth)
    node_BA, alive_BA = children(tree, jnp.zeros((batch, branching), jnp.int32), rank_A)
    alive_BA &= depth > 0
    start = jnp.asarray(0, jnp.int32), walk, node_BA, alive_BA, jnp.exp(logprob_BTV[:, 0])
    final = jax.lax.while_loop(lambda state: jnp.any(state[3]), step, start)
    return _emit(final[1], final[4], text)


greedy_walk = Verifier(_greedy, DraftTree, 'greedy walk')
target_only_walk = Verifier(_target_only, DraftTree, 'target-only walk')
recursive_rejection = Verifier(_recursive, WithoutReplacement, 'recursive rejection', dense=True)
speculative_sampling = Verifier(
    _speculative, WithoutReplacement, 'speculative sampling', dense=True
)
k_seq = Verifier(_k_seq, Independent, 'K-SEQ', dense=True)


def default_for(trees: type[DraftTree]) -> Verifier:
    """Returns the default verifier for a class of trees, exact at any temperature."""
    return _exact_for(trees)[0]


def check_pairing(method: Method, verifier: Verifier, sampler: sample.Sampler | None = None):
    """Refuses a verifier that would not preserve the target's distribution.

    Raises:
      TypeError: the verifier is not exact for the drafter's trees.
      ValueError: speculative sampling with several children per node; or a greedy walk if the
        sampler's temperature is known and not 0.
    """
    if not issubclass(method.trees, verifier.trees):
        raise _refusal(verifier, method.trees, f' ({_module(method.propose)})')
    if verifier is speculative_sampling and method.branching > 1:
        raise ValueError(ONE_CHILD.format(method.branching))
    if verifier is greedy_walk and sampler is not None:
        temperature = sampler.temperature
        if not isinstance(temperature, jax.core.Tracer) and np.any(np.asarray(temperature) != 0):
            raise ValueError(
                f'a greedy walk is for temperature 0, not {temperature}: '
                f'use {default_for(method.trees).name}'
            )


class _Walk(NamedTuple):
    """How far down the tree each row is: the path from the root, and its length below the root."""

    path_BP: jax.Array
    accepted_B: jax.Array

    @property
    def node_B(self) -> jax.Array:
        return at(self.path_BP, self.accepted_B)

    def descend(self, node_B: jax.Array, where_B: jax.Array) -> '_Walk':
        accepted_B = self.accepted_B + where_B
        is_new = (jnp.arange(self.path_BP.shape[1]) == accepted_B[:, None]) & where_B[:, None]
        return _Walk(jnp.where(is_new, node_B[:, None], self.path_BP), accepted_B)

    def verdict(self, next_B: jax.Array) -> Verdict:
        behind = jnp.arange(self.path_BP.shape[1]) > self.accepted_B[:, None]
        path_BP = jnp.where(behind, self.node_B[:, None], self.path_BP)
        return Verdict(path_BP, self.accepted_B, next_B)


def _at_root(batch: int, depth: int) -> _Walk:
    return _Walk(jnp.zeros((batch, depth + 1), jnp.int32), jnp.zeros(batch, jnp.int32))


def _follow(tree: DraftTree, depth: int, choose: Callable[[jax.Array, jax.Array], jax.Array]):
    """Descends as long as a child has the token that `choose(node_B, depth)` returns."""

    def step(state):
        level, walk, running_B, next_B = state
        node_B = walk.node_B
        token_B = choose(node_B, level)
        is_it = (tree.parent_BT == node_B[:, None]) & (tree.token_BT == token_B[:, None])
        is_it &= tree.valid_BT & (running_B & (level < depth))[:, None]
        found_B = jnp.any(is_it, axis=1)
        walk = walk.descend(jnp.argmax(is_it, axis=1).astype(jnp.int32), found_B)
        return level + 1, walk, found_B, jnp.where(running_B, token_B, next_B)

    batch = tree.token_BT.shape[0]
    running_B, next_B = jnp.ones(batch, bool), jnp.zeros(batch, jnp.int32)
    start = jnp.asarray(0, jnp.int32), _at_root(batch, depth), running_B, next_B
    _, walk, _, next_B = jax.lax.while_loop(lambda state: jnp.any(state[2]), step, start)
    return walk.verdict(next_B)


def _uniforms(text: Text, depth_B: jax.Array, k: int, dtype) -> jax.Array:
    """Returns the uniforms `[B, k]` that decide on drafts of the token after each row's depth."""
    key_B = sample.at_position(text.key_B, text.length_B + depth_B, ACCEPTANCE)
    return jax.vmap(lambda key: jax.random.uniform(key, (k,), dtype))(key_B)


def _emit(walk: _Walk, probability_BV: jax.Array, text: Text) -> Verdict:
    """Draws the token after the path of each row."""
    position_B = text.length_B + walk.accepted_B
    return walk.verdict(sample.draw(jnp.log(probability_BV), text.key_B, position_B))


def _module(function: Any) -> str:
    return getattr(function, 'func', function).__module__  # of a functools.partial, too


def _exact_for(trees: type[DraftTree]) -> list[Verifier]:
    verifiers = recursive_rejection, k_seq, target_only_walk
    return [verifier for verifier in verifiers if issubclass(trees, verifier.trees)]


def _refusal(verifier: Verifier, trees: type[DraftTree], drafter: str = '') -> TypeError:
    return TypeError(
        f'{verifier.name} is exact for {verifier.trees.__name__} trees only, and the drafter'
        f'{drafter} makes {trees.__name__} ones: use '
        + ' or '.join(exact.name for exact in _exact_for(trees))
    )
