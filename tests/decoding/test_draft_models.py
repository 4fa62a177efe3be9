"""Drafters with a draft model: their caches, and the shapes of their trees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import sample
from decoding.drafter import Outcome, Verdict
from decoding.drafts.chain import chain
from decoding.drafts.dynamic import dynamic
from decoding.drafts.iid import iid
from decoding.drafts.recursive import beam, branching
from decoding.sample import Sampler
from decoding.tree import WithoutReplacement
from lm.model import transformer
from lm.model.config import Config
from tests.decoding.trees import check_tree, context_of, path_of, prompt_of, texts, tiny

V = 17
CONFIG = Config(V, 16, 2, 2, 1, 8, 32, max_length=64, window=5, window_pattern=(True, False))
SAMPLER = Sampler(temperature=0.5, min_p=0.01, repetition_penalty=1.5)
LENGTH = 24  # of the texts' buffers
MODEL = tiny(CONFIG, 4.0, bos=3)
MAKERS = {
    'beam': lambda model, **k: beam(model, 4, 3, **k),
    'dynamic': lambda model, **k: dynamic(model, 8, 3, **k),
    'iid': lambda model, **k: iid(model, 2, 2, **k),
}


@pytest.fixture(scope='module', params=MAKERS)
def compiled(request):
    drafter = MAKERS[request.param](MODEL, sampler=SAMPLER)
    method = drafter.method

    def init(weights, text):
        return method.init(weights, prompt_of(text, LENGTH + method.nodes))

    def propose(weights, state, text):
        return method.propose(weights, state, context_of(text))

    return drafter, jax.jit(init), jax.jit(propose), jax.jit(method.update)


@jax.jit
def log_probs_after(token_RL, length_R, seen_RV):
    logits_RLV = transformer.forward(MODEL.params, CONFIG, token_RL)
    logits_RV = logits_RLV[jnp.arange(length_R.shape[0]), length_R - 1]
    return sample.log_probs(SAMPLER, logits_RV.at[:, 3].set(-jnp.inf), seen_RV)


def expected_log_probs(sequences: list[list[int]]) -> np.ndarray:
    """The log-probabilities after each sequence, by full forward passes of one shape."""
    token_RL, length_R = np.zeros((96, LENGTH), np.int32), np.ones(96, np.int32)
    seen_RV = np.zeros((96, V), bool)
    for i, ids in enumerate(sequences):
        token_RL[i, : len(ids)], length_R[i] = ids, len(ids)
        seen_RV[i, ids] = True
    return np.asarray(log_probs_after(token_RL, length_R, seen_RV))[: len(sequences)]


def made_up(tree, depth: int, how: int, generator) -> Verdict:
    """An arbitrary verdict: down to the deepest node, nowhere, or anywhere."""
    paths = []
    for parent, level, valid in zip(tree.parent_BT, tree.depth_BT, tree.valid_BT, strict=True):
        anywhere = generator.choice(np.flatnonzero(valid))
        deepest = np.argmax(np.where(valid, level, -1))
        paths.append(path_of(parent, [deepest, 0, anywhere][how]))
    path_BP = np.asarray([[0, *p] + [(p or [0])[-1]] * (depth - len(p)) for p in paths], np.int32)
    accepted_B = np.asarray([len(p) for p in paths], np.int32)
    next_B = generator.integers(V, size=len(paths), dtype=np.int32)
    return jax.tree.map(jnp.asarray, Verdict(path_BP, accepted_B, next_B))  # type: ignore[arg-type]


def poisoned(state):
    """The state with NaN in the unused rows of its cache."""
    cache = jax.tree.map(np.asarray, state.memory.cache)
    used_BS = np.arange(cache.position_NBKS.shape[-1]) < cache.length_B[:, None]
    used = used_BS[:, None, :, None]
    k, v = (np.where(used, x, np.float32(np.nan)) for x in (cache.k_NBKSC, cache.v_NBKSC))
    cache = dataclasses.replace(cache, k_NBKSC=k, v_NBKSC=v)
    return dataclasses.replace(state, memory=dataclasses.replace(state.memory, cache=cache))


def test_log_probabilities_are_those_of_a_full_forward_over_several_rounds(compiled):
    drafter, init, propose, update = compiled
    method = drafter.method
    rows = [[5], [1, 2, 3, 4], [7, 7, 0, 2, 16, 9, 11]]
    generator = np.random.default_rng(0)
    text = texts(rows, [0, 1, 2], LENGTH)
    state = init(drafter.params, text)
    for how in (2, 0, 1, 0, 2):
        proposed, state, partial = propose(drafter.params, poisoned(state), text)
        tree = jax.device_get(proposed)
        assert partial is None and isinstance(tree, method.trees)
        assert tree.token_BT.shape == (3, method.nodes)
        check_tree(tree, method.depth, method.branching)
        inner = tree.valid_BT & (tree.depth_BT < method.depth)
        sequences = [
            rows[b] + tree.token_BT[b, path_of(tree.parent_BT[b], node)].tolist()
            for b, node in np.argwhere(inner)
        ]
        np.testing.assert_array_equal(tree.token_BT[:, 0], [row[-1] for row in rows])
        actual = tree.logprob_BTV[inner]
        np.testing.assert_allclose(actual, expected_log_probs(sequences), rtol=2e-4, atol=2e-4)
        verdict = made_up(tree, method.depth, how, generator)
        before = text.length_B
        path_BP, accepted_B, next_B = map(np.asarray, verdict)
        for b, row in enumerate(rows):
            accepted = path_BP[b, 1 : accepted_B[b] + 1]
            new = [*tree.token_BT[b, accepted].tolist(), int(next_B[b])]
            # a text may get fewer tokens than the verdict has, as at a limit
            row += new[:1] if (b, how) == (1, 0) else new
        text = texts(rows, [0, 1, 2], LENGTH)
        outcome = Outcome(proposed, None, None, verdict, text, text.length_B - before)  # type: ignore[arg-type]
        state = update(drafter.params, state, outcome)
    assert propose._cache_size() == 1


def test_a_row_does_not_depend_on_the_rows_beside_it(compiled):
    drafter, init, propose, _ = compiled
    ours, trees = [4, 8, 15, 16, 2], []
    for place, others in ((0, [[1], [2, 3]]), (2, [[9, 9, 9, 9, 9, 9, 9, 9], [0, 1, 0]])):
        others.insert(place, ours)
        text = texts(others, [11 if row is ours else 5 + place for row in others], LENGTH)
        tree = propose(drafter.params, init(drafter.params, text), text).tree
        trees.append(jax.tree.map(lambda x, place=place: np.asarray(x)[place], tree))
    for field in ('token_BT', 'parent_BT', 'depth_BT', 'valid_BT'):
        np.testing.assert_array_equal(getattr(trees[0], field), getattr(trees[1], field))
    np.testing.assert_allclose(trees[0].logprob_BTV, trees[1].logprob_BTV, rtol=1e-5, atol=1e-5)


def test_a_greedy_sampler_compiles_nothing_and_leaves_one_path(compiled):
    drafter, init, propose, _ = compiled
    text = texts([[5], [1, 2, 3, 4], [7, 7, 0]], [0, 1, 2], LENGTH)
    greedy = drafter.params._replace(sampler=dataclasses.replace(SAMPLER, temperature=0.0))
    before = propose._cache_size()
    tree = propose(greedy, init(greedy, text), text).tree
    method = drafter.method
    assert propose._cache_size() == max(before, 1)
    tree = jax.device_get(tree)
    check_tree(tree, method.depth, method.branching)
    # only the chain of greatest tokens has any probability
    distinct = method.depth if method.trees is WithoutReplacement else method.nodes - 1
    np.testing.assert_array_equal(tree.valid_BT.sum(1) - 1, [distinct] * 3)


@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda: chain(MODEL, 0), 'length'),
        (lambda: iid(MODEL, 0, 2), 'sequences'),
        (lambda: branching(MODEL, ()), 'factors'),
        (lambda: branching(MODEL, (2, V + 1)), r'factors\[1\]: 18; .* at most 17'),
        (lambda: beam(MODEL, 0, 2), 'width'),
        (lambda: dynamic(MODEL, 1, 1), 'nodes'),
        (lambda: dynamic(MODEL, 19, 1), 'nodes: 19; .* at most 18'),
        (lambda: dynamic(MODEL, 4, 4), 'depth: 4; .* at most 3'),
        (lambda: dynamic(MODEL, 4, 2, 1.0), 'threshold'),
    ],
)
def test_bad_sizes_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
