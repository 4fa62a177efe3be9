"""Distributions of drafters with a draft model: tokens, paths, and DySpec's slots."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import verify
from decoding.drafter import Text
from decoding.drafts import levels
from decoding.drafts.chain import chain
from decoding.drafts.dynamic import dynamic, slot_values
from decoding.drafts.iid import iid
from decoding.drafts.recursive import beam, branching, given_maximum
from decoding.scores import Probabilities
from lm.model import transformer
from lm.model.config import Config
from tests.decoding.trees import check_tree, context_of, prompt_of, texts, tiny


def test_gumbel_top_k_draws_without_replacement():
    p_V = np.asarray([0.5, 0.3, 0.15, 0.05, 0.0])
    n = 40_000
    keys = jax.random.split(jax.random.key(7), 1)
    logprob_BMV = jnp.broadcast_to(jnp.log(p_V), (1, n, 5)).astype(jnp.float32)
    token, perturbed = levels.top(logprob_BMV, keys, 5)
    token = np.asarray(token)[0]
    assert (np.asarray(perturbed)[..., 4] == -np.inf).all() and (token[:, 4] == 4).all()
    statistic = 0.0
    for order in itertools.permutations(range(4), 3):
        a, b, c = (p_V[i] for i in order)
        expected = n * a * b / (1 - a) * c / (1 - a - b)  # Plackett-Luce
        observed = (token[:, :3] == order).all(1).sum()
        statistic += (observed - expected) ** 2 / expected
    assert statistic < 50  # 23 degrees of freedom: 1 in 1000


def test_children_of_a_beam_have_their_parents_value_as_maximum():
    generator = np.random.default_rng(1)
    g_BMA = -np.sort(-generator.gumbel(size=(50, 4, 6)) * 5, axis=-1).astype(np.float32)
    g_BMA[:, 1, 3:] = -np.inf
    psi_BM = generator.normal(size=(50, 4)).astype(np.float32) * 30
    psi_BM[:, 2] = -np.inf
    result = np.asarray(given_maximum(jnp.asarray(g_BMA), jnp.asarray(psi_BM)))
    np.testing.assert_array_equal(result[..., 0], psi_BM)
    assert (result[:, 2] == -np.inf).all() and (result[:, 1, 3:] == -np.inf).all()
    assert np.isfinite(result[:, 1, :3]).all()
    # psi up to 0, as in a search: the plain formula, in f64
    psi_BM = -np.abs(generator.normal(size=(50, 4))).astype(np.float32)
    result = np.asarray(given_maximum(jnp.asarray(g_BMA), jnp.asarray(psi_BM)))
    g, psi = g_BMA.astype(np.float64), psi_BM.astype(np.float64)[..., None]
    with np.errstate(divide='ignore'):
        naive = -np.log(np.exp(-psi) - np.exp(-g[..., :1]) + np.exp(-g))
    np.testing.assert_allclose(result, naive, rtol=1e-4, atol=1e-4)


SMALL = Config(5, 16, 1, 2, 1, 8, 16, max_length=16)
SMALL_MODEL = tiny(SMALL, 2.0)
# the target: a distribution after each token, unlike any of the draft model's
TARGET_VV = np.random.default_rng(5).dirichlet([0.7] * 5, size=5)
PAIRINGS = {
    'branching': (branching(SMALL_MODEL, (3, 2)), verify.recursive_rejection),
    'beam': (beam(SMALL_MODEL, 3, 2), verify.recursive_rejection),
    'dynamic': (dynamic(SMALL_MODEL, 6, 2), verify.recursive_rejection),
    'iid': (iid(SMALL_MODEL, 3, 2), verify.k_seq),
}


@functools.cache
def many_rounds(name: str):
    """Trees and verdicts of 15000 rounds after one text."""
    drafter, verifier = PAIRINGS[name]
    method = drafter.method

    @jax.jit
    def one_round(weights, text):
        state = method.init(weights, prompt_of(text, 3 + method.nodes))
        tree = method.propose(weights, state, context_of(text)).tree
        logprob_BTV = jnp.log(jnp.asarray(TARGET_VV, jnp.float32))[tree.token_BT]
        target = Probabilities(logprob_BTV)
        return tree, verifier.verify(tree, target, text, method.depth, method.branching)

    n = 15_000
    token_BS = jnp.broadcast_to(jnp.asarray([2, 4, 0]), (n, 3))
    text = Text(token_BS, jnp.full(n, 2), jax.random.split(jax.random.key(3), n))
    tree, verdict = jax.device_get(one_round(drafter.params, text))
    check_tree(jax.tree.map(lambda x: x[:200], tree), method.depth, method.branching)
    return tree, verdict


@pytest.mark.parametrize('name', PAIRINGS)
def test_the_first_two_tokens_follow_the_target(name):
    tree, verdict = many_rounds(name)
    path_tokens = np.take_along_axis(tree.token_BT, verdict.path_BP, axis=1)
    accepted = verdict.accepted_B
    assert 0.1 < (accepted > 0).mean() < 0.99 and (accepted == 2).any()
    first = np.where(accepted > 0, path_tokens[:, 1], verdict.next_B)
    # after a round of one token, the next would follow the target: count its probabilities
    counts = np.zeros((5, 5))
    second = np.where(accepted > 1, path_tokens[:, 2], verdict.next_B)
    np.add.at(counts, (first[accepted > 0], second[accepted > 0]), 1)
    np.add.at(counts, first[accepted == 0], TARGET_VV[first[accepted == 0]])
    expected = len(first) * TARGET_VV[4][:, None] * TARGET_VV
    assert ((counts - expected) ** 2 / expected).sum() < 52  # 24 degrees of freedom: 1 in 1000


def test_a_level_of_a_beam_is_a_sample_of_paths_without_replacement():
    tree, _ = many_rounds('beam')
    after = [[2, 4], *([2, 4, token] for token in range(5))]
    token_NL = np.zeros((6, 3), np.int32)
    for row, ids in zip(token_NL, after, strict=True):
        row[: len(ids)] = ids
    logits_NLV = transformer.forward(SMALL_MODEL.params, SMALL, jnp.asarray(token_NL))
    q_NV = np.asarray(jax.nn.softmax(logits_NLV[jnp.arange(6), jnp.asarray([1, 2, 2, 2, 2, 2])]))
    q = (q_NV[0][:, None] * q_NV[1:]).reshape(-1).astype(np.float64)  # of the 25 paths of two
    # Plackett-Luce: the probability that a path is among the first three
    order = np.asarray(list(itertools.permutations(range(25), 3)))
    a, b, c = q[order].T
    drawn = a * b / (1 - a) * c / (1 - a - b)
    expected = np.bincount(order.reshape(-1), np.repeat(drawn, 3), minlength=25)
    parent = np.take_along_axis(tree.token_BT, tree.parent_BT[:, 4:], axis=1)
    paths = (5 * parent + tree.token_BT[:, 4:])[tree.valid_BT[:, 4:]]
    n = len(tree.token_BT)
    error = np.sqrt(expected * (1 - expected) / n)
    assert (abs(np.bincount(paths, minlength=25) / n - expected) < 4 * error).all()


THREE = tiny(Config(3, 16, 1, 2, 1, 8, 16, max_length=16), 5.0)


def values_of(tree, row: int) -> np.ndarray:
    """The value of each node's slot, from the log-probabilities."""
    token, parent = tree.token_BT[row], tree.parent_BT[row]
    q = np.exp(tree.logprob_BTV[row].astype(np.float64))
    mass, value = np.ones(len(token)), np.ones(len(token))
    for node in range(1, len(token)):
        up = parent[node]
        elders = [i for i in range(1, node) if parent[i] == up]
        value[node] = mass[up] * (1 - sum(q[up, token[i]] for i in elders))
        mass[node] = mass[up] * q[up, token[node]]
    return value


def propose_once(drafter, text):
    return jax.jit(
        lambda weights, text: (
            drafter.method.propose(
                weights, drafter.method.init(weights, prompt_of(text, 32)), context_of(text)
            ).tree
        )
    )(drafter.params, text)


def test_dynamic_trees_have_the_most_valuable_slots():
    text = texts([[0], [1, 2], [2, 2, 1], [0, 1, 1, 0]], [0, 1, 2, 3], 5)
    # all 12 slots of two levels, each with the draw it has in any tree
    everything = jax.device_get(propose_once(dynamic(THREE, 13, 2), text))
    assert everything.valid_BT.all()
    threshold = 0.05
    tree = jax.device_get(propose_once(dynamic(THREE, 7, 2, threshold), text))
    worth = []
    for row in range(4):
        value, parent = values_of(everything, row), everything.parent_BT[row]
        chosen = tree.valid_BT[row].sum() - 1
        worth.append((value[1:] > threshold).sum())
        assert chosen == min(6, worth[-1])
        best = 0.0
        for slots in itertools.combinations(range(1, 13), chosen):
            have = {0, *slots}
            # a slot can only be filled after its parent and its elder sibling
            elder_is_in = all(i - 1 in have or parent[i - 1] != parent[i] for i in slots)
            if elder_is_in and all(parent[i] in have for i in slots):
                best = max(best, value[list(slots)].sum())
        ours = values_of(tree, row)[tree.valid_BT[row]][1:]
        np.testing.assert_allclose(ours.sum(), best, rtol=1e-5)
    assert min(worth) < 6 < max(worth)


def test_a_dynamic_tree_of_two_nodes_is_a_chain_of_one():
    text = texts([[0], [1, 2], [2, 2, 1], [0, 1, 1, 0]], [0, 1, 2, 3], 5)
    for ours, theirs in zip(
        jax.tree.leaves(propose_once(dynamic(THREE, 2, 1), text)),
        jax.tree.leaves(propose_once(chain(THREE, 1), text)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_slot_values_never_increase():
    q_BMA = np.random.default_rng(0).dirichlet([0.01] * 40, size=(3, 5)).astype(np.float32)
    value = np.asarray(slot_values(jnp.ones((3, 5)), jnp.asarray(q_BMA)))
    assert (np.diff(value, axis=2) <= 0).all() and (value >= 0).all()
    np.testing.assert_array_equal(value[..., 0], 1)
