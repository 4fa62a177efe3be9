"""Walks down whole trees: tokens against plain sampling, counts of tokens, refused pairings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decoding import sample, verify
from decoding.drafter import Method, Text
from decoding.scores import Probabilities
from decoding.tree import DraftTree, Independent, WithoutReplacement

# A table language model: the distribution of a token given the one before it.


def table(seed, v, temperature=1.0):
    logits = np.random.default_rng(seed).normal(size=(v, v)) / temperature
    return jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))


def texts(batch, seed=0, length=3):
    key_B = jax.random.split(jax.random.key(seed), batch)
    return Text(jnp.zeros((batch, 8), jnp.int32), jnp.full(batch, length, jnp.int32), key_B)


def random_tree(seed, batch, nodes, v, depth):
    """Any topology, duplicate children and invalid nodes among them."""
    random = np.random.default_rng(seed)
    parent, level = np.full((batch, nodes), -1), np.zeros((batch, nodes), int)
    for b, i in np.ndindex(batch, nodes):
        if i:
            parent[b, i] = random.choice(np.flatnonzero(level[b, :i] < depth))
            level[b, i] = level[b, parent[b, i]] + 1
    token = random.integers(0, v, (batch, nodes))
    valid = (random.random((batch, nodes)) < 0.8) | (parent < 0)
    arrays = (jnp.asarray(x, jnp.int32) for x in (token, parent, level))
    return DraftTree(*arrays, jnp.asarray(valid))


def emitted(tree, verdict):
    """The tokens of one round, a list for each row."""
    path, token = np.asarray(verdict.path_BP), np.asarray(tree.token_BT)
    for b, accepted in enumerate(np.asarray(verdict.accepted_B)):
        assert (path[b, accepted:] == path[b, accepted]).all()
        assert path[b, 0] == 0
        nodes = path[b, 1 : accepted + 1]
        np.testing.assert_array_equal(tree.parent_BT[b, nodes], path[b, :accepted])
        assert tree.valid_BT[b, nodes].all()
        yield [*token[b, nodes], verdict.next_B[b]]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def run(verifier, tree, logprob_VV, text, depth, branching):
    return verifier.verify(tree, Probabilities(logprob_VV[tree.token_BT]), text, depth, branching)


@functools.partial(jax.jit, static_argnums=2)
def plain_draws(logprob_VV, text, n):
    """The next n tokens of each row, for each token before them."""

    def of_position(i):
        draw = functools.partial(sample.draw, key_B=text.key_B, position_B=text.length_B + i)
        rows = jnp.broadcast_to(
            logprob_VV[:, None], (len(logprob_VV), len(text.key_B), len(logprob_VV))
        )
        return jax.vmap(draw)(rows)

    return jax.vmap(of_position)(jnp.arange(n)).transpose(2, 0, 1)


@pytest.mark.parametrize('temperature', [0.0, 0.3, 1.0])
def test_a_target_only_walk_emits_the_tokens_of_plain_sampling(temperature):
    v, depth, batch = 4, 3, 8
    logits = jax.random.normal(jax.random.key(2), (v, v))
    logprob_VV = sample.log_probs(sample.Sampler(temperature), logits)
    accepted, text = 0, texts(batch)
    drawn_BPV = np.asarray(plain_draws(logprob_VV, text, depth + 1))
    for seed in range(4):
        tree = random_tree(seed, batch, 24, v, depth)
        verdict = run(verify.target_only_walk, tree, logprob_VV, text, depth, 8)
        accepted += verdict.accepted_B.sum()
        for b, tokens in enumerate(emitted(tree, verdict)):
            last = tree.token_BT[b, 0]
            for i, token in enumerate(tokens):
                last = drawn_BPV[b, i, last]
                assert last == token
            is_child = (tree.parent_BT[b] == verdict.path_BP[b, -1]) & tree.valid_BT[b]
            assert last not in np.asarray(tree.token_BT[b])[is_child]
        if temperature == 0:
            greedy = run(verify.greedy_walk, tree, logprob_VV, text, depth, 8)
            jax.tree.map(np.testing.assert_array_equal, verdict, greedy)
    assert accepted > 4 * batch / 2  # the trees do get walked


def noise(key_B, position, *shape):
    keys = sample.at_position(key_B, jnp.full(len(key_B), position), 2)
    return sample.gumbel(keys, shape)


@functools.partial(jax.jit, static_argnums=(3, 4))
def drafted(logprob_VV, key_B, root_B, branching, limit=None):
    """A tree by Gumbel top-k, level by level; `limit(token)`: whether siblings may follow it."""
    batch, v = len(root_B), logprob_VV.shape[0]
    token, parent, level, valid = [root_B], [jnp.full(batch, -1)], [0], [jnp.ones(batch, bool)]
    noise_BTV = noise(key_B, 0, sum(np.cumprod((1, *branching))), v)
    nodes = [0]
    for depth, width in enumerate(branching):
        following = []
        for node in nodes:
            order = jnp.argsort(-(logprob_VV[token[node]] + noise_BTV[:, node]), axis=1)
            more = valid[node]
            for rank in range(width):
                following.append(len(token))
                token.append(order[:, rank])
                parent.append(jnp.full(batch, node))
                valid.append(more)
                level.append(depth + 1)
                if limit is not None:
                    more &= limit(order[:, rank])
        nodes = following
    token_BT, parent_BT = (jnp.stack(x, 1).astype(jnp.int32) for x in (token, parent))
    depth_BT = jnp.broadcast_to(jnp.asarray(level, jnp.int32), token_BT.shape)
    return WithoutReplacement(
        token_BT, parent_BT, depth_BT, jnp.stack(valid, 1), logprob_VV[token_BT]
    )


@functools.partial(jax.jit, static_argnums=(3, 4))
def sequences(logprob_VV, key_B, root_B, k, depth):
    """K chains side by side, node by level and sequence."""
    batch, v = len(root_B), logprob_VV.shape[0]
    noise_BTAV = noise(key_B, 0, depth, k, v)
    levels = [jnp.broadcast_to(root_B[:, None], (batch, k))]
    for i in range(depth):
        levels.append(jnp.argmax(logprob_VV[levels[-1]] + noise_BTAV[:, i], axis=2))
    token_BT = jnp.concatenate([root_B[:, None], *levels[1:]], 1).astype(jnp.int32)
    nodes = np.arange(1 + k * depth)
    parent = np.where(nodes == 0, -1, np.maximum(nodes - k, 0))
    parent_BT, depth_BT = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), token_BT.shape)
        for x in (parent, (nodes + k - 1) // k)
    )
    return Independent(token_BT, parent_BT, depth_BT, depth_BT >= 0, logprob_VV[token_BT])


def few(token):
    """No more siblings after an even token."""
    return token % 2 == 1


CASES = {
    'a full tree': (verify.recursive_rejection, (3, 2), None),
    'fewer children after some tokens': (verify.recursive_rejection, (3, 2), few),
    'a chain': (verify.speculative_sampling, (1, 1), None),
    'K-SEQ': (verify.k_seq, 3, None),
}


@pytest.mark.parametrize('case', CASES)
def test_the_first_two_tokens_follow_the_target(case):
    verifier, branching, limit = CASES[case]
    v, batch = 4, 20_000
    # far apart, so that bias would show
    target_VV, draft_VV = table(6, v), table(56, v, temperature=0.5)
    text = texts(batch, seed=5)
    root_B = jnp.zeros(batch, jnp.int32)

    if verifier is verify.k_seq:
        width, tree = branching, sequences(draft_VV, text.key_B, root_B, branching, 2)
    else:
        width, tree = branching[0], drafted(draft_VV, text.key_B, root_B, branching, limit)
    verdict = run(verifier, tree, target_VV, text, 2, width)
    accepted_B, next_B = np.asarray(verdict.accepted_B), np.asarray(verdict.next_B)
    assert (np.bincount(accepted_B) > batch / 200).all()  # every length of path is tested
    drafted_BP = np.take_along_axis(np.asarray(tree.token_BT), np.asarray(verdict.path_BP), axis=1)
    first_B = np.where(accepted_B > 0, drafted_BP[:, 1], next_B)
    second_B = np.where(accepted_B > 1, drafted_BP[:, 2], next_B)
    plain_B = np.asarray(plain_draws(target_VV, text, 2))[np.arange(batch), 1, first_B]
    second_B = np.where(accepted_B > 0, second_B, plain_B)
    counts = np.bincount(first_B * v + second_B, minlength=v * v)
    exact_VV = np.asarray(target_VV, np.float64)
    expected = np.exp(exact_VV[0][:, None] + exact_VV).ravel()
    expected *= batch / expected.sum()
    assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_drafts_of_the_target_itself_are_all_accepted():
    logprob_VV, text = table(3, 4), texts(8)
    root_B = jnp.arange(8) % 4
    tree = drafted(logprob_VV, text.key_B, root_B, (1, 1, 1))
    assert (run(verify.speculative_sampling, tree, logprob_VV, text, 3, 1).accepted_B == 3).all()
    tree = drafted(logprob_VV, text.key_B, root_B, (2, 2, 2))
    assert (run(verify.recursive_rejection, tree, logprob_VV, text, 3, 2).accepted_B == 3).all()
    tree = sequences(logprob_VV, text.key_B, root_B, 2, 3)
    assert (run(verify.k_seq, tree, logprob_VV, text, 3, 2).accepted_B == 3).all()


def test_point_masses():
    """Temperature 0 in both models: the draft's choice is accepted if it is the target's."""
    next_VV = jnp.roll(jnp.eye(4), 1, axis=1)  # 0, 1, 2, 3, 0 and so on
    target_VV = sample.log_probs(sample.Sampler(0.0), next_VV)
    draft_VV = target_VV[jnp.asarray([0, 1, 2, 1])]  # after token 3 it is wrong
    text, root_B = texts(8), jnp.arange(8) % 4
    chain = drafted(draft_VV, text.key_B, root_B, (1, 1, 1))
    tree = drafted(draft_VV, text.key_B, root_B, (2, 2, 2))  # second children are out of thin air
    greedy = run(verify.greedy_walk, chain, target_VV, text, 3, 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        greedy,
        run(verify.speculative_sampling, chain, target_VV, text, 3, 1),
    )
    wide = run(verify.recursive_rejection, tree, target_VV, text, 3, 2)
    assert list(emitted(tree, wide)) == list(emitted(chain, greedy))
    tree = sequences(draft_VV, text.key_B, root_B, 2, 3)
    k_seq = run(verify.k_seq, tree, target_VV, text, 3, 2)
    assert list(emitted(tree, k_seq)) == list(emitted(chain, greedy))
    assert (greedy.accepted_B > 0).any() and (greedy.accepted_B < 3).any()


@pytest.mark.parametrize('kind', ['recursive rejection', 'K-SEQ'])
def test_rows_do_not_depend_on_their_neighbours(kind):
    target_VV, draft_VV, text = table(1, 4), table(2, 4), texts(8)
    text = text.replace(length_B=jnp.arange(1, 9))
    root_B = jnp.arange(8) % 4
    if kind == 'K-SEQ':
        verifier, tree = verify.k_seq, sequences(draft_VV, text.key_B, root_B, 2, 3)
    else:
        verifier = verify.recursive_rejection
        tree = drafted(draft_VV, text.key_B, root_B, (2, 2, 2))
    verdict = run(verifier, tree, target_VV, text, 3, 2)
    others = jnp.asarray([0, 1, 2, 3, 0, 0, 2, 1])
    tree, text = jax.tree.map(lambda x: x[others], (tree, text))
    again = run(verifier, tree, target_VV, text, 3, 2)
    of_rows = jax.tree.map(lambda x: x[others], verdict)
    jax.tree.map(np.testing.assert_array_equal, of_rows, again)


# Pairings that would be biased.


def method(trees, branching):
    def never_called(*_):
        raise AssertionError

    return Method(never_called, never_called, never_called, trees, 7, 2, branching)


@pytest.mark.parametrize(
    ('trees', 'verifier', 'exact'),
    [
        (DraftTree, verify.recursive_rejection, 'use target-only walk'),
        (DraftTree, verify.speculative_sampling, 'use target-only walk'),
        (DraftTree, verify.k_seq, 'use target-only walk'),
        (Independent, verify.recursive_rejection, 'use K-SEQ or target-only walk'),
        (WithoutReplacement, verify.k_seq, 'use recursive rejection or target-only walk'),
    ],
)
def test_biased_pairings_are_refused_by_type(trees, verifier, exact):
    message = rf'{verifier.name} is exact for {verifier.trees.__name__} .*{trees.__name__}.*{exact}'
    with pytest.raises(TypeError, match=message):
        verify.check_pairing(method(trees, 1), verifier)
    tree = random_tree(0, 2, 7, 4, 2)
    if trees is not DraftTree:
        tree = trees(*jax.tree.leaves(tree), jnp.zeros((2, 7, 4)))
    with pytest.raises(TypeError, match=message):
        run(verifier, tree, table(0, 4), texts(2), 2, 1)


@pytest.mark.parametrize('trees', [DraftTree, Independent, WithoutReplacement])
def test_exact_pairings_are_let_through(trees):
    for verifier in verify.default_for(trees), verify.target_only_walk, verify.greedy_walk:
        verify.check_pairing(method(trees, 3), verifier)
    assert issubclass(trees, verify.default_for(trees).trees)


def test_verifiers_with_a_condition():
    wide = method(WithoutReplacement, 2)
    verify.check_pairing(method(WithoutReplacement, 1), verify.speculative_sampling)
    with pytest.raises(ValueError, match='one child per node, not 2'):
        verify.check_pairing(wide, verify.speculative_sampling)
    verify.check_pairing(wide, verify.greedy_walk, sample.Sampler(0))
    with pytest.raises(ValueError, match=r'temperature 0, not 0\.3: use recursive rejection'):
        verify.check_pairing(wide, verify.greedy_walk, sample.Sampler(0.3))
