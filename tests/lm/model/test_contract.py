"""The contract of a model that can be stepped, for each kind of model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import reference
from lm.kernels.mask import Mask, pack_bits
from lm.kernels.scoring import Scoring
from lm.model import contract, params, rope, stepped, transformer
from lm.model.attend import Attended
from lm.model.config import Config, Lexinvariant
from lm.model.contract import Ask, Nodes, chain

V, L, ROWS = 23, 9, 24
PLAIN = Config(V, 16, 3, 4, 2, 8, 24, max_length=64)
FULL = dataclasses.replace(
    PLAIN, activation='gelu_tanh', unit_offset=True, post_norm=True, qk_norm=True, qkv_bias=True,
    attention_softcap=20.0, logit_softcap=10.0, scale_embeddings=True, tied=True, window=5,
    local_rope_theta=500.0, window_pattern=(True, False),
)  # fmt: skip
DRAWN = dataclasses.replace(PLAIN, tied=True, lexinvariant=Lexinvariant('gaussian'))
PERMUTED = dataclasses.replace(PLAIN, tied=True, lexinvariant=Lexinvariant('permuted'))
# config, whether parameters are laid out for decoding
MODELS = {
    'plain': (PLAIN, False),
    'full': (FULL, False),
    'laid out': (FULL, True),
    'gaussian': (DRAWN, False),
    'permuted': (PERMUTED, False),
}
TOKENS = jax.random.randint(jax.random.key(2), (2, L), 0, V)
KEYS = jax.random.split(jax.random.key(3), 2)


@functools.cache
def subject(name: str):
    """Returns a model, its parameters, and its jitted functions."""
    config, laid_out = MODELS[name]
    model = stepped.model(config, never=(1,))
    weights = params.init(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    weights = jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    return model, model.layout(weights) if laid_out else weights


def start(name: str, tokens=TOKENS, kept=(L, L), ask=contract.NOTHING):
    """Reads prompts; returns the memory and what was seen."""
    model, weights = subject(name)
    return jax.jit(
        lambda weights, tokens, kept_B: model.start(
            weights, chain(tokens), kept_B, ROWS, KEYS, ask=ask
        )
    )(weights, tokens, jnp.asarray(kept))


def step(name: str, memory, nodes: Nodes, **settings):
    """Steps; returns logits, the memory and what was seen."""
    model, weights = subject(name)

    @jax.jit
    def run(weights, memory, token_BT, position_BT, ancestors_BTW, x_BTD):
        traced = Nodes(token_BT, position_BT, ancestors_BTW, nodes.span, x_BTD, nodes.start_layer)
        memory, seen = model.step(weights, memory, traced, **settings)
        return model.head(weights, memory, seen.h_BTD), memory, seen

    arrays = nodes.token_BT, nodes.position_BT, nodes.ancestors_BTW, nodes.x_BTD
    return run(weights, memory, *arrays)


@pytest.mark.parametrize('name', MODELS)
def test_steps_equal_the_prompt_in_one_call(name):
    model, weights = subject(name)
    whole, seen = start(name)
    expected = model.head(weights, whole, seen.h_BTD)
    assert np.isneginf(expected[..., 1]).all()  # an id that is never drawn
    memory, first = start(name, TOKENS[:, :4], kept=(3, 2))  # rows of different lengths
    np.testing.assert_allclose(first.h_BTD, seen.h_BTD[:, :4], rtol=1e-4, atol=1e-4)
    for count in (2, 3):
        begin = jnp.asarray([3, 2] if count == 2 else [5, 4])
        at = begin[:, None] + jnp.arange(count)
        nodes = chain(jnp.take_along_axis(TOKENS, at, 1), begin)
        logits, memory, _ = step(name, memory, nodes)
        wanted = jnp.take_along_axis(expected, at[..., None], 1)
        np.testing.assert_allclose(logits, wanted, rtol=2e-4, atol=2e-4)
    taken_back = model.keep(memory, None, jnp.asarray([4, 6]), since_B=0)
    at = jnp.asarray([[4], [6]])
    again, _, _ = step(name, taken_back, Nodes(jnp.take_along_axis(TOKENS, at, 1), at))
    wanted = jnp.take_along_axis(expected, at[..., None], 1)
    np.testing.assert_allclose(again, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', MODELS)
def test_a_kept_path_is_that_path_read_as_text(name):
    model, _ = subject(name)
    memory, _ = start(name, TOKENS[:, :4], kept=(4, 4))
    # nodes  0 -> 1 -> 3,  0 -> 2, in two steps: 0 1 2, then 3 below 1
    tokens = TOKENS[:, 4:8]
    sees = np.asarray([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)
    bits = [pack_bits(jnp.broadcast_to(jnp.asarray(x), (2, *x.shape)))
            for x in (sees[:3, :3], sees[3:])]  # fmt: skip
    positions = jnp.broadcast_to(jnp.asarray([4, 5, 5, 6]), (2, 4))
    _, memory, _ = step(name, memory, Nodes(tokens[:, :3], positions[:, :3], bits[0], span=3))
    last, memory, _ = step(name, memory, Nodes(tokens[:, 3:], positions[:, 3:], bits[1], span=4))
    path = jnp.asarray([[0, 1, 3], [0, 2, 2]])
    prompt = jnp.broadcast_to(jnp.arange(4), (2, 4))  # the same, counted from the first node read
    whole = jnp.concatenate([prompt, 4 + path], axis=1)
    from_start = model.keep(memory, whole, jnp.asarray([7, 6]), since_B=0)
    memory = model.keep(memory, path, jnp.asarray([3, 2]))  # row 1 keeps 0 and 2
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(from_start), strict=True):
        np.testing.assert_array_equal(a, b)
    text = [[0, 1, 3], [0, 2]]
    following = tokens[:, :1]
    actual, _, _ = step(name, memory, Nodes(following, jnp.asarray([[7], [6]])))
    for row, kept in enumerate(text):
        ids = jnp.concatenate([TOKENS[:, :4], tokens[:, jnp.asarray(kept)], following], axis=1)
        other, seen = start(name, ids, kept=(ids.shape[1],) * 2)
        logits = model.head(subject(name)[1], other, seen.h_BTD)
        np.testing.assert_allclose(actual[row, 0], logits[row, -1], rtol=2e-4, atol=2e-4)
        if row == 0:
            np.testing.assert_allclose(last[0, 0], logits[0, 6], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('name', ['full', 'laid out'])
def test_layers_run_in_two_passes_are_one_pass(name):
    memory, seen = start(name, TOKENS[:, :4], kept=(4, 4), ask=Ask((0, 1)))
    assert list(seen.layers) == [0, 1]
    nodes = chain(TOKENS[:, 4:7], 4)
    expected, whole, asked = step(name, memory, nodes, ask=Ask((1,)))
    _, shallow, first = step(name, memory, nodes, layers=range(2))
    np.testing.assert_allclose(first.x_BTD, asked.layers[1], rtol=1e-5, atol=1e-5)
    deep = nodes._replace(x_BTD=first.x_BTD, start_layer=2)
    logits, deep_memory, rest = step(name, shallow, deep, ask=Ask((1, 2)))
    assert list(rest.layers) == [2]  # the other ran before
    np.testing.assert_array_equal(rest.layers[2], rest.x_BTD)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(deep_memory), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_skipped_layer_holds_no_key_of_the_node():
    memory, _ = start('plain', TOKENS[:, :4], kept=(4, 4))
    # a dropped node leaves rows behind, which must not be read as the next node's
    _, other, _ = step('plain', memory, chain(TOKENS[:, 8:9], 4))
    memory = subject('plain')[0].keep(other, None, jnp.zeros(2, jnp.int32))
    _, memory, _ = step('plain', memory, chain(TOKENS[:, 4:5], 4), layers=range(2))
    assert (memory.cache.position_NBKS[2, :, :, 4] == -1).all()
    assert (memory.cache.position_NBKS[:2, :, :, 4] == 4).all()
    logits, _, _ = step('plain', memory, chain(TOKENS[:, 5:6], 5))
    # rows of zeros would count as keys: replacing them by NaN changes nothing
    cache = memory.cache
    k, v = (x.at[2, :, :, 4].set(jnp.nan) for x in (cache.k_NBKSC, cache.v_NBKSC))
    poisoned = memory.replace(cache=cache.replace(k_NBKSC=k, v_NBKSC=v))
    again, _, _ = step('plain', poisoned, chain(TOKENS[:, 5:6], 5))
    np.testing.assert_array_equal(again, logits)


def test_skipped_layers_leave_the_model_of_the_others():
    picked, others = jnp.asarray([0, 2]), dataclasses.replace(PLAIN, n_layers=2)
    weights, model = subject('plain')[1], stepped.model(others, never=(1,))
    layers = jax.tree.map(lambda x: x[picked], weights['body']['layers'])
    memory, _ = start('plain', TOKENS[:, :4], kept=(4, 4))
    rows = jax.tree.map(lambda x: x[picked] if x.ndim > 1 else x, memory.cache)
    nodes = chain(TOKENS[:, 4:6], 4)
    logits, after, _ = step('plain', memory, nodes, layers=(0, 2))

    @jax.jit
    def run(weights, memory):
        memory, seen = model.step(weights, memory, nodes)
        return model.head(weights, memory, seen.h_BTD), memory.cache

    fewer = {**weights, 'body': {**weights['body'], 'layers': layers}}
    expected, expected_rows = run(fewer, memory.replace(cache=rows))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for name in ('k_NBKSC', 'v_NBKSC', 'position_NBKS'):
        found = getattr(after.cache, name)[picked]
        np.testing.assert_allclose(found, getattr(expected_rows, name), rtol=1e-5, atol=1e-5)


def test_rows_of_a_memory_are_not_positions():
    """Evicting a row by compaction and hiding it give the same logits."""
    memory, _ = start('full')
    cache = memory.cache
    hidden = cache.replace(position_NBKS=cache.position_NBKS.at[..., 3].set(-1))
    order = jnp.asarray([*range(3), *range(4, ROWS), 3])
    moved = jax.tree.map(lambda x: x[:, :, :, order] if x.ndim > 1 else x - 1, hidden)
    sees = jnp.broadcast_to(jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool), (2, 3, 3))
    positions = jnp.broadcast_to(jnp.asarray([L, L + 1, L + 1]), (2, 3))
    tree = Nodes(TOKENS[:, :3], positions, pack_bits(sees))
    results = []
    for rows in (hidden, moved):
        one = memory.replace(cache=rows, kept_B=rows.length_B)
        logits, one, _ = step('full', one, tree)
        one = subject('full')[0].keep(one, jnp.asarray([[0, 2], [0, 1]]), jnp.asarray([2, 1]))
        after, one, _ = step('full', one, Nodes(TOKENS[:, 3:4], jnp.asarray([[L + 2], [L + 1]])))
        results.append((logits, after, one.kept_B, one.cache.length_B))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[0][2] - 1, results[1][2])
    np.testing.assert_array_equal(results[0][3] - 1, results[1][3])


@pytest.mark.parametrize('name', ['plain', 'full'])
def test_mass_is_the_attention_that_each_row_received(name):
    config, _ = MODELS[name]
    memory, seen = start(name, kept=(L, L - 2), ask=Ask(mass=True))
    mass = np.asarray(seen.mass_NBKS)
    assert mass.shape == memory.cache.position_NBKS.shape and (mass[..., L:] == 0).all()
    # every query head of every kept node distributes a mass of 1
    group = config.n_heads // config.n_kv_heads
    expected = np.broadcast_to(group * np.asarray([L, L - 2])[:, None], mass.shape[1:3])
    np.testing.assert_allclose(mass.sum(-1), np.broadcast_to(expected, mass.shape[:3]), rtol=1e-5)
    assert start(name)[1].mass_NBKS is None
    # of the first layer, by hand
    weights = subject(name)[1]
    if name == 'plain':
        scoring = Scoring(config.query_scale, config.attention_softcap)
        position = jnp.broadcast_to(jnp.arange(L), (2, L))
        q, k = first_queries_and_keys(weights, config, position)
        mask = Mask(position, position[:, None])
        _, lse = reference.attention(q, k, k, mask, scoring)
        counted = position < jnp.asarray([L, L - 2])[:, None]
        by_hand = reference.column_sums(q, k, lse, mask, counted, scoring)
        np.testing.assert_allclose(mass[0][..., :L], by_hand, rtol=1e-4, atol=1e-5)


def first_queries_and_keys(weights, config, position):
    """The first layer's rotated queries and keys."""

    def attend(layer, q_BLHC, k_BLKC, v_BLKC, carry, **extra):
        q_BLHC, k_BLKC = (rope.rotate(x, position, layer.frequencies) for x in (q_BLHC, k_BLKC))
        return Attended(q_BLHC, (q_BLHC, k_BLKC.swapaxes(1, 2)))

    h, k, c = config.n_heads, config.n_kv_heads, config.head_dim
    carry = jnp.zeros((2, L, h, c)), jnp.zeros((2, k, L, c))
    return transformer.run(weights, config, chain(TOKENS), attend, carry, layers=range(1)).carry


def test_attention_is_an_argument():
    """A maker whose attention returns zeros gives the model without output matrices."""

    def blind(config, mask, cache, counted_BL=None, **extra):
        def attend(layer, q_BLHC, k_BLKC, v_BLKC, carry, **extra):
            return Attended(jnp.zeros_like(q_BLHC), carry)

        return attend

    model, weights = stepped.model(PLAIN, attend=blind), subject('plain')[1]
    layers = {**weights['body']['layers']}
    layers['wo_NHCD'] = jnp.zeros_like(layers['wo_NHCD'])
    without = {**weights, 'body': {**weights['body'], 'layers': layers}}
    memory, seen = model.start(weights, chain(TOKENS), jnp.asarray([L, L]), ROWS, KEYS)
    expected = transformer.forward(without, PLAIN, TOKENS)
    logits = model.head(weights, memory, seen.h_BTD)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_equal_models_are_the_same_functions():
    assert stepped.model(PLAIN) is stepped.model(dataclasses.replace(PLAIN), never=())
    assert stepped.model(PLAIN) is not stepped.model(PLAIN, never=(1,))
