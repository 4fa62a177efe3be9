"""Proposals are in the text, and equal those of a search of the whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import Method, Outcome, Text
from decoding.drafts.lookup import SURVIVAL, lookup
from tests.decoding.trees import context_of, prompt_of

SIZE, LENGTH, BRANCHES, LONGEST = 48, 4, 3, 3


def text_of(rows: list[list[int]]) -> Text:
    token_BS = np.full((len(rows), SIZE), 7, np.int32)  # garbage after the texts
    for row, tokens in zip(token_BS, rows, strict=True):
        row[: len(tokens)] = tokens
    keys = jax.random.split(jax.random.key(0), len(rows))
    return Text(jnp.asarray(token_BS), jnp.asarray([len(r) for r in rows], jnp.int32), keys)


def matches(tokens: list[int]) -> dict[int, int]:
    """Finds where continuations start and how much matches before, by searching the whole text."""
    found: dict[int, int] = {}
    for size in range(min(LONGEST, len(tokens)), 0, -1):
        ends = [
            start
            for start in range(len(tokens) - 1, size - 1, -1)
            if tokens[start - size : start] == tokens[-size:]
        ]
        for start in ends[:BRANCHES]:
            found.setdefault(start, size)
    return dict(list(found.items())[:BRANCHES])


def prefixes(tokens: list[int]) -> dict[tuple[int, ...], float]:
    """Scores every prefix of the continuations."""
    scores: dict[tuple[int, ...], float] = {}
    for start, size in matches(tokens).items():
        continuation = tokens[start : start + LENGTH]
        for n in range(1, len(continuation) + 1):
            prefix = tuple(continuation[:n])
            scores[prefix] = scores.get(prefix, 0) + size * SURVIVAL ** (n - 1)
    return scores


def paths(tree, row: int) -> list[tuple[int, ...]]:
    """Returns the tokens from the root to each valid node; checks the tree's invariants."""
    token, parent, depth, valid = (
        np.asarray(x[row]) for x in (tree.token_BT, tree.parent_BT, tree.depth_BT, tree.valid_BT)
    )
    assert valid[0] and parent[0] == -1 and depth[0] == 0
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(token)):
        if valid[node]:
            assert parent[node] < node and valid[parent[node]]
            found.append((*found[parent[node]], int(token[node])))
            assert len(found[-1]) == depth[node]
        else:
            found.append(())
    drafted = [path for path, is_valid in zip(found, valid, strict=True) if is_valid][1:]
    assert len(set(drafted)) == len(drafted), 'a shared prefix appears twice'
    return drafted


@functools.cache
def method(nodes: int, buckets: int) -> Method:
    sizes = {'length': LENGTH, 'branches': BRANCHES, 'longest': LONGEST}
    made = lookup(nodes=nodes, buckets=buckets, **sizes).method
    return made._replace(
        init=jax.jit(lambda params, text: made.init(params, prompt_of(text, SIZE))),
        propose=jax.jit(made.propose),
        update=jax.jit(made.update),
    )


def propose(made: Method, rows: list[list[int]]):
    text = text_of(rows)
    return made.propose(None, made.init(None, text), context_of(text)).tree


def random_rows(seed: int, batch: int = 6) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = [1, 2, SIZE, *generator.integers(3, SIZE, batch - 3)]
    return [generator.integers(0, 4, n).tolist() for n in lengths]


@pytest.mark.parametrize('seed', range(8))
def test_proposals_equal_a_search_of_the_whole_text(seed):
    rows = random_rows(seed)
    all_of_it = 1 + BRANCHES * LENGTH
    tree = propose(method(all_of_it, 1 << 14), rows)
    for row, tokens in enumerate(rows):
        assert set(paths(tree, row)) == set(prefixes(tokens))


@pytest.mark.parametrize('seed', range(8))
def test_a_smaller_budget_keeps_the_best_prefixes(seed):
    rows, nodes = random_rows(seed), 6
    tree = propose(method(nodes, 1 << 14), rows)
    assert tree.token_BT.shape == (len(rows), nodes)
    for row, tokens in enumerate(rows):
        scores = prefixes(tokens)
        drafted = paths(tree, row)
        assert all(path[:-1] in {(), *drafted} for path in drafted)
        best = sorted(scores.values(), reverse=True)[: nodes - 1]
        np.testing.assert_allclose([scores[path] for path in drafted], best, rtol=1e-5)


@pytest.mark.parametrize('buckets', [1, 4])
def test_colliding_hashes_propose_only_what_follows_the_last_token(buckets):
    found = 0
    for seed in range(4):
        rows = random_rows(seed)
        tree = propose(method(1 + BRANCHES * LENGTH, buckets), rows)
        for row, tokens in enumerate(rows):
            for path in paths(tree, row):
                piece = [tokens[-1], *path]
                assert any(
                    tokens[i : i + len(piece)] == piece for i in range(len(tokens) - len(path))
                )
                found += 1
    assert found


@pytest.mark.parametrize('buckets', [4, 1 << 14])
def test_tables_grown_token_by_token_equal_tables_of_the_whole_text(buckets):
    made = method(6, buckets)
    whole = random_rows(3)
    lengths = [1] * len(whole)
    state = made.init(None, text_of([row[:1] for row in whole]))
    generator = np.random.default_rng(0)
    while lengths != [len(row) for row in whole]:
        steps = generator.integers(0, LENGTH + 2, len(whole))  # 0: a row that is finished
        lengths = [min(n + int(s), len(r)) for n, s, r in zip(lengths, steps, whole, strict=True)]
        text = text_of([row[:n] for row, n in zip(whole, lengths, strict=True)])
        state = made.update(None, state, Outcome(None, None, None, None, text, None))  # type: ignore[arg-type]
    np.testing.assert_array_equal(state.table, made.init(None, text_of(whole)).table)


def test_a_text_that_repeats_itself_is_continued():
    tree = propose(method(6, 1 << 14), [[1, 2, 3, 4, 5, 6, 1, 2, 3]])
    assert paths(tree, 0) == [(4,), (4, 5), (4, 5, 6), (4, 5, 6, 1)]


@pytest.mark.parametrize(
    'sizes', [{'nodes': 1}, {'length': 0}, {'branches': 0}, {'longest': 0}, {'buckets': 3}]
)
def test_sizes_out_of_range_are_named(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        lookup(**sizes)
