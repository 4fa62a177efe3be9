"""The loop: streams, stops, buckets, memories; `test_every_drafter` has each drafter and rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import model, rounds, stop, verify
from decoding import tree as tree_lib
from decoding.drafter import Drafter, Proposal
from decoding.drafts import chain, early_exit, lookup, recursive, recycling
from decoding.generate import bucket, generate, plain
from decoding.model import LM
from decoding.sample import Sampler, draw, log_probs
from lm.model import params, transformer
from lm.model.config import Config

V = 17
NEW = 24


def config_of(layers: int, width: int, vocab_size: int = V) -> Config:
    return Config(vocab_size, width, layers, 2, 1, 8, 2 * width, max_length=256, unroll=layers)


def make(layers: int, width: int, seed: int, vocab_size: int = V, sharp: float = 1.5) -> LM:
    """A small model; a greater `sharp` concentrates its mass on fewer tokens."""
    config = config_of(layers, width, vocab_size)
    weights = params.init(config, jax.random.key(seed))
    weights['tables']['output_VD'] *= sharp * width**0.5
    return model.transformer(config, weights)


TARGET, DRAFT = make(3, 16, 0), make(1, 8, 1)
PROMPTS = [[1, 2, 3, 1, 2], [5], [7, 7, 7, 7, 7, 7, 7], [3, 4]] * 2
KEYS = jax.random.split(jax.random.key(7), 8)
DRAFTERS = {
    'chain': chain.chain(DRAFT, 3),
    'branching': recursive.branching(DRAFT, (3, 2)),
    'beam': recursive.beam(DRAFT, 3, 3),
    'recycling': recycling.recycling(V),
    'early_exit': early_exit.early_exit(TARGET, 1, 3),
}


@functools.cache
def plain_text(temperature: float, rows: int = 8):
    """Plain sampling, which every drafter must reproduce."""
    sampler = Sampler(temperature=jnp.float32(temperature))
    return generate(TARGET, PROMPTS[:rows], key=KEYS[:rows], max_new_tokens=NEW, sampler=sampler)


def equal(actual, expected):
    """Token for token."""
    for row, other in zip(actual.tokens, expected.tokens, strict=True):
        np.testing.assert_array_equal(row, other)


def test_plain_decoding_is_the_full_forward_token_by_token():
    sampler = Sampler(temperature=jnp.float32(0.8))
    texts = [list(prompt) for prompt in PROMPTS[:4]]
    forward = jax.jit(functools.partial(transformer.forward, TARGET.params, config_of(3, 16)))
    for _ in range(NEW):
        for row, text in enumerate(texts):
            padded = jnp.asarray([text + [0] * (48 - len(text))])
            logits = forward(padded)[:, len(text) - 1]
            position = jnp.asarray([len(text)])
            logprobs = log_probs(sampler, logits)
            text.append(int(draw(logprobs, KEYS[row : row + 1], position)[0]))
    result = generate(TARGET, PROMPTS[:4], key=KEYS[:4], max_new_tokens=NEW, sampler=sampler)
    for text, prompt, tokens in zip(texts, PROMPTS, result.tokens, strict=False):
        assert text[len(prompt) :] == tokens.tolist()
    assert result.metrics.rounds == 4 * NEW and result.metrics.block_efficiency == 1


@pytest.mark.parametrize('name', ['beam', 'early_exit'])
def test_a_row_alone_gets_the_text_that_it_gets_in_a_batch(name):
    settings = {'max_new_tokens': NEW, 'drafter': DRAFTERS[name]}
    for temperature in (0.0, 0.3, 1.0):
        alone = generate(
            TARGET, PROMPTS[2:3], key=KEYS[2:3], verifier=verify.target_only_walk,
            sampler=Sampler(temperature=jnp.float32(temperature)), **settings,
        )  # fmt: skip
        np.testing.assert_array_equal(alone.tokens[0], plain_text(temperature).tokens[2])


def replay(texts: list[list[int]], depth: int, wrong: bool = False) -> Drafter:
    """Drafts the known continuations, or only wrong tokens."""
    known = jnp.asarray([text + [0] * (64 - len(text)) for text in texts])

    def propose(params, state, context, **extra):
        nodes = jnp.arange(depth + 1)
        position = (context.text.length_B - 1)[:, None] + nodes
        token = jnp.take_along_axis(known, jnp.minimum(position, 63), axis=1)
        if wrong:
            token = jnp.where(nodes > 0, (token + 1) % V, token)
        shape = token.shape
        tree = tree_lib.DraftTree(
            token, jnp.broadcast_to(nodes - 1, shape), jnp.broadcast_to(nodes, shape),
            jnp.ones(shape, bool),
        )  # fmt: skip
        return Proposal(tree, state)

    method = plain().method._replace(propose=propose, nodes=depth + 1, depth=depth)
    return plain()._replace(method=method)


def test_an_oracle_needs_the_fewest_rounds_and_an_adversary_the_most():
    expected = plain_text(1.0)
    texts = [p + t.tolist() for p, t in zip(PROMPTS, expected.tokens, strict=True)]
    for wrong, per_row in ((False, -(-NEW // 5)), (True, NEW)):
        drafter = replay(texts, 4, wrong)
        result = generate(TARGET, PROMPTS, key=KEYS, max_new_tokens=NEW, drafter=drafter)
        equal(result, expected)
        assert result.metrics.rounds == 8 * per_row
    assert result.metrics.acceptance_by_depth == (0.0,) * 4


def test_a_stop_inside_an_accepted_path_ends_the_row_there():
    expected = plain_text(1.0)
    texts = [p + t.tolist() for p, t in zip(PROMPTS, expected.tokens, strict=True)]
    ends = [int(t[i % 5 + 2]) for i, t in enumerate(expected.tokens)]
    letters = [bytes([97 + i]) for i in range(V)]
    pair = letters[expected.tokens[0][1]] + letters[expected.tokens[0][2]]
    rules = [stop.Rule(strings=(pair,)), *(stop.Rule(ids=(end,)) for end in ends[1:])]
    result = generate(
        TARGET, PROMPTS, key=KEYS, max_new_tokens=NEW, drafter=replay(texts, 4),
        stops=stop.build(rules, letters),
    )  # fmt: skip
    for row, (tokens, whole) in enumerate(zip(result.tokens, expected.tokens, strict=True)):
        if row == 0:
            written = b''.join(letters[i] for i in whole)
            length = written.index(pair) + 2
        else:
            length = whole.tolist().index(ends[row]) + 1
        np.testing.assert_array_equal(tokens, whole[:length])
    assert result.ended == ['stop'] * 8


def test_rows_have_their_own_lengths_and_are_streamed():
    seen: dict[int, list[int]] = {}
    new = [3, 1, 24, 7, 5, 2, 9, 4]
    result = generate(
        TARGET, PROMPTS, key=KEYS, max_new_tokens=new, drafter=DRAFTERS['chain'],
        verifier=verify.target_only_walk,
        stream=lambda row, tokens: seen.setdefault(row, []).extend(tokens.tolist()),
    )  # fmt: skip
    for row, (tokens, count) in enumerate(zip(result.tokens, new, strict=True)):
        np.testing.assert_array_equal(tokens, plain_text(1.0).tokens[row][:count])
        assert seen[row] == tokens.tolist()
    assert result.ended == ['length'] * 8


@pytest.mark.parametrize('name', ['beam', 'early_exit'])
def test_the_committed_cache_is_the_plain_one_and_garbage_behind_it_changes_nothing(name):
    states = {}
    for drafter in (plain(), DRAFTERS[name]):
        for poison in (False, True):
            plan, inputs, start = prefilled(drafter)
            if poison:
                start = start.replace(memory=poisoned(start.memory))
            states[drafter.method.nodes, poison] = rounds.loop(plan, inputs, start, 100)
    for state in states.values():
        expected = states[1, False]
        np.testing.assert_array_equal(state.text.length_B, expected.text.length_B)
        for row, length in enumerate(np.asarray(expected.text.length_B)):
            np.testing.assert_array_equal(
                state.text.token_BS[row, :length], expected.text.token_BS[row, :length]
            )
            assert state.memory.cache.length_B[row] == length - 1
            for field in ('k_NBKSC', 'v_NBKSC', 'position_NBKS'):
                a, e = (np.asarray(getattr(s.memory.cache, field))[:, row, :, : length - 1]
                        for s in (state, expected))  # fmt: skip
                np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize('drafter', [plain(), lookup.lookup(nodes=6, length=3, branches=2)])
def test_a_row_that_was_compacted_away_gives_the_text_of_a_hidden_one(drafter):
    """Rows of a memory are not positions of the text: a policy may keep fewer."""
    plan, inputs, start = prefilled(drafter)
    cache = start.memory.cache
    hidden = cache.replace(position_NBKS=cache.position_NBKS.at[..., 0].set(-1))
    order = jnp.asarray([*range(1, cache.k_NBKSC.shape[3]), 0])
    moved = jax.tree.map(lambda x: x[:, :, :, order] if x.ndim > 1 else x, hidden)
    gone_B = (cache.length_B > 0).astype(jnp.int32)  # a text of one token has no row yet
    ends = []
    for rows, length_B in ((hidden, cache.length_B), (moved, cache.length_B - gone_B)):
        memory = start.memory.replace(cache=rows.replace(length_B=length_B), kept_B=length_B)
        state = jax.tree.map(jnp.copy, start.replace(memory=memory))  # the loop donates it
        ends.append(rounds.loop(plan, inputs, state, 100))
    one, other = ends
    for row, length in enumerate(np.asarray(one.text.length_B)):
        np.testing.assert_array_equal(
            one.text.token_BS[row, :length], other.text.token_BS[row, :length]
        )
    np.testing.assert_array_equal(one.counts.rounds_B, other.counts.rounds_B)
    np.testing.assert_array_equal(one.memory.cache.length_B - gone_B, other.memory.cache.length_B)


def prefilled(drafter: Drafter):
    """Runs `generate` up to the first round."""
    from decoding import generate as generate_lib

    limits = np.asarray([len(p) + NEW for p in PROMPTS], np.int32)
    text, prompt = generate_lib._texts(PROMPTS, limits, KEYS)
    stops = stop.none(V, 8)
    rows = text.token_BS.shape[1] + drafter.method.nodes
    plan = rounds.Plan(TARGET.model, drafter.method, verify.target_only_walk, rows)
    sampler = Sampler(temperature=jnp.float32(1.0))
    inputs = rounds.Inputs(TARGET.params, drafter.params, None, sampler, stops.table)
    return (
        plan,
        inputs,
        rounds.prefill(plan, inputs, prompt, text, jnp.asarray(limits), stops.start_B),
    )


def poisoned(memory):
    """The memory with NaN in its unused rows."""
    cache = memory.cache
    rows = jnp.arange(cache.k_NBKSC.shape[3]) >= cache.length_B[:, None]
    behind = rows[None, :, None, :, None]
    k, v = (jnp.where(behind, jnp.nan, x) for x in (cache.k_NBKSC, cache.v_NBKSC))
    return memory.replace(cache=cache.replace(k_NBKSC=k, v_NBKSC=v))


def test_buckets_and_compilations():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 48, 49, 100)] == [
        16, 16, 24, 24, 32, 48, 48, 64, 128,
    ]  # fmt: skip
    settings = {'key': jax.random.key(0), 'drafter': chain.chain(DRAFT, 2)}
    first = generate(TARGET, [[1] * 9, [2] * 5], max_new_tokens=20, **settings)
    again = generate(TARGET, [[3] * 16, [2]], max_new_tokens=16, **settings)
    other = generate(TARGET, [[3] * 16, [2]], max_new_tokens=30, **settings)
    assert [x.metrics.compilations for x in (first, again, other)] == [2, 0, 2]


def test_a_drawn_token_is_never_the_one_that_starts_documents():
    target = model.transformer(config_of(3, 16), TARGET.params, bos=3)
    result = generate(target, [[3]] * 4, key=jax.random.key(0), max_new_tokens=40,
                      sampler=Sampler(temperature=50.0))  # fmt: skip
    assert not any((tokens == 3).any() for tokens in result.tokens)


def test_a_repetition_penalty_counts_the_path_too():
    sampler = Sampler(temperature=jnp.float32(0.7), repetition_penalty=1.5)
    settings = {'key': KEYS, 'max_new_tokens': NEW, 'sampler': sampler}
    expected = generate(TARGET, PROMPTS, **settings)
    result = generate(TARGET, PROMPTS, drafter=DRAFTERS['branching'],
                      verifier=verify.target_only_walk, **settings)  # fmt: skip
    equal(result, expected)


def test_rows_may_have_settings_of_their_own():
    temperatures = jnp.asarray([0.0, 1.0, 0.0, 1.0], jnp.float32)
    result = generate(
        TARGET, PROMPTS[:4], key=KEYS[:4], max_new_tokens=NEW, sampler=Sampler(temperatures),
        drafter=DRAFTERS['beam'], verifier=verify.target_only_walk,
    )  # fmt: skip
    for i, tokens in enumerate(result.tokens):
        np.testing.assert_array_equal(tokens, plain_text(float(temperatures[i])).tokens[i])


def test_recycling_starts_warm_from_an_earlier_call():
    call = {'key': KEYS[:2], 'max_new_tokens': NEW, 'sampler': Sampler(jnp.float32(0))}
    cold = generate(TARGET, PROMPTS[:2], drafter=DRAFTERS['recycling'], **call)
    known_VR = recycling.pool(cold.draft.successor_BVA)
    warm = generate(TARGET, PROMPTS[:2], drafter=recycling.recycling(V, warm_VA=known_VR), **call)
    assert warm.metrics.rounds < cold.metrics.rounds
    equal(warm, cold)
