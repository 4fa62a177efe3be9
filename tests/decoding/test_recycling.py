"""Trees of recycled successors, and the templates that shape them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import Drafter, Outcome, Text, Verdict
from decoding.drafts import template
from decoding.drafts.recycling import LEVELS, State, pool, recycling, write
from decoding.scores import Logits, top
from tests.decoding.trees import context_of, prompt_of

V, K = 11, 3
SHAPE = template.best_first([0.5, 0.3, 0.1], 9)


def small(**settings) -> Drafter:
    """Returns a drafter of few nodes, compiled."""
    made = recycling(V, template=SHAPE, ranks=K, **settings)
    return compiled(made)


def compiled(made: Drafter) -> Drafter:
    method = made.method
    fast = {'propose': jax.jit(method.propose), 'update': jax.jit(method.update)}
    return made._replace(method=method._replace(**fast))


def propose(made: Drafter, successors, root: list[int]):
    """Returns the tree below each root, as numpy arrays."""
    state = State(jnp.asarray(successors))
    tree = made.method.propose(None, state, context_of(text_of(root))).tree
    return jax.tree.map(np.asarray, tree)


def start(made: Drafter, root: list[int]):
    """Returns the matrix before the first round."""
    return made.method.init(made.params, prompt_of(text_of(root), 8)).successor_BVA


def text_of(tokens: list[int]) -> Text:
    token_BS = jnp.asarray(np.repeat(np.asarray(tokens, np.int32)[:, None], 4, axis=1))
    keys = jax.random.split(jax.random.key(0), len(tokens))
    return Text(token_BS, jnp.full(len(tokens), 2, jnp.int32), keys)


def outcome(tree, logits_BTV, path: list[list[int]], accepted: list[int]) -> Outcome:
    next_B = jnp.zeros(len(accepted), jnp.int32)
    verdict = Verdict(jnp.asarray(path, jnp.int32), jnp.asarray(accepted, jnp.int32), next_B)
    text, count_B = text_of([0] * len(accepted)), jnp.asarray(accepted) + 1
    return Outcome(tree, Logits(jnp.asarray(logits_BTV)), None, verdict, text, count_B)  # type: ignore[arg-type]


def matrix(seed: int, batch: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(V)[:K] for _ in range(batch * V)]
    return np.reshape(rows, (batch, V, K)).astype(np.int32)


def test_the_default_template_has_the_papers_levels():
    made = recycling(100)
    method = made.method
    assert (method.nodes, method.depth, method.branching) == (81, 6, 8)
    tree = propose(compiled(made), start(made, [1]), [1])
    assert np.bincount(tree.depth_BT[0]).tolist() == [1, *LEVELS]
    assert (tree.parent_BT[0, 1:] < np.arange(1, 81)).all()


@pytest.mark.parametrize('nodes', range(1, 7))
def test_no_template_of_its_size_is_likelier(nodes):
    rates = [0.6, 0.35, 0.2]
    made = template.best_first(rates, nodes)

    def value(paths) -> float:
        return sum(np.prod([rates[rank] for rank in path]) for path in paths)

    paths: dict[int, tuple[int, ...]] = {0: ()}
    for i in range(1, nodes):
        paths[i] = (*paths[made.parent[i]], made.rank[i])
    every = [p for d in range(1, nodes) for p in itertools.product(range(3), repeat=d)]
    every = sorted(every, key=lambda p: -value([p]))[:12]
    closed = [
        chosen
        for chosen in itertools.combinations(every, nodes - 1)
        if all(p[:-1] in {(), *chosen} for p in chosen)
    ]
    best = max(map(value, closed))
    assert value(path for path in paths.values() if path) == pytest.approx(best)


def test_levels_hold_their_likeliest_nodes():
    made = template.of_levels([0.5, 0.3], (2, 3))
    assert made.parent.tolist() == [-1, 0, 0, 1, 1, 2]
    assert made.rank.tolist() == [0, 0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match='level 2: 5 nodes'):
        template.of_levels([0.5, 0.3], (2, 5))


@pytest.mark.parametrize('rates', [[], [0.3, 0.5], [1.0], [0.5, 0.0]])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(ValueError, match='expected non-increasing rates'):
        template.best_first(rates, 4)


def test_trees_follow_the_matrix():
    made, successors = small(), matrix(1, 2)
    successors[0, 4], successors[1, 4, 0] = -1, -1
    tree = propose(made, successors, [3, 4])
    for row in range(2):
        for node in range(1, made.method.nodes):
            parent, rank = SHAPE.parent[node], SHAPE.rank[node]
            expected = int(successors[row, tree.token_BT[row, parent], rank])
            known = bool(tree.valid_BT[row, parent]) and expected >= 0
            assert bool(tree.valid_BT[row, node]) == known
            assert not known or int(tree.token_BT[row, node]) == expected
    assert (tree.token_BT >= 0).all()


def test_a_cold_start_drafts_nothing():
    made = small()
    tree = propose(made, start(made, [0, 5]), [0, 5])
    assert tree.valid_BT.sum(axis=1).tolist() == [1, 1]


def test_every_node_is_learnt_and_the_accepted_path_wins():
    made, before = small(), matrix(2, 2)
    tree = propose(made, before, [3, 4])
    # row 0 accepts two nodes, row 1 none; one node of row 1 does not exist
    last = int(np.flatnonzero(SHAPE.depth == 2)[0])
    path = [
        [0, int(SHAPE.parent[last]), last] + [last] * (made.method.depth - 2),
        [0] * (made.method.depth + 1),
    ]
    valid_BT = tree.valid_BT.copy()
    valid_BT[1, -1] = False
    tree = dataclasses.replace(tree, valid_BT=valid_BT)
    logits = np.random.default_rng(3).normal(size=(2, made.method.nodes, V)).astype(np.float32)
    state = made.method.update(
        None, State(jnp.asarray(before)), outcome(tree, logits, path, [2, 0])
    )
    after = np.asarray(state.successor_BVA)
    best = np.argsort(-logits, axis=-1)[..., :K]
    for row in range(2):
        winner: dict[int, int] = {}
        order = sorted(range(made.method.nodes), key=lambda node: (node in path[row], node))
        for node in order:
            if tree.valid_BT[row, node]:
                winner[int(tree.token_BT[row, node])] = node
        for token in range(V):
            expected = before[row, token]
            if token in winner:
                expected = best[row, winner[token]]
            np.testing.assert_array_equal(after[row, token], expected)


def test_a_warm_start_shares_what_all_rows_know():
    cold = jnp.full((2, V, K), -1, jnp.int32)
    tokens = jnp.asarray([[2, 6], [2, 9]])
    logits = jax.random.normal(jax.random.key(4), (2, 2, V))
    known = np.asarray(write(cold, tokens, top(logits, K), tokens >= 0))
    warm = np.asarray(pool(jnp.asarray(known)))
    np.testing.assert_array_equal(warm[[2, 6, 9]], known[[1, 0, 1], [2, 6, 9]])
    assert (np.delete(warm, [2, 6, 9], axis=0) == -1).all()
    made = small(warm_VA=warm)
    tree = propose(made, start(made, [6, 9, 0]), [6, 9, 0])
    first = int(np.flatnonzero(SHAPE.depth == 1)[0])
    assert tree.token_BT[:2, first].tolist() == [warm[6, 0], warm[9, 0]]
    assert tree.valid_BT[:, first].tolist() == [True, True, False]


@pytest.mark.parametrize('size', [11, 64, 67])
def test_top_equals_top_k_with_ties(size):
    x = np.random.default_rng(size).integers(0, 6, (50, size)).astype(np.float32)
    x[:, 3] = -np.inf
    x[25:, 5:] = -np.inf  # fewer finite entries than asked for
    expected = jax.lax.top_k(jnp.asarray(x), 8)[1]
    np.testing.assert_array_equal(jax.jit(top, static_argnums=(1, 2))(x, 8, 4), expected)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='rank 7'):
        recycling(100, ranks=4)
    with pytest.raises(ValueError, match='of 5 symbols'):
        recycling(5)
    with pytest.raises(ValueError, match='warm_VA of shape'):
        recycling(100, warm_VA=jnp.zeros((3, 8), jnp.int32))
