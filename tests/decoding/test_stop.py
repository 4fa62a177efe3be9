"""The stop automaton against searching the bytes."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding import stop
from decoding.stop import Rule

BYTES = st.binary(min_size=1, max_size=4).map(lambda s: bytes(97 + b % 2 for b in s))
RULES = st.lists(
    st.builds(
        Rule,
        st.lists(st.integers(0, 5), max_size=1).map(tuple),
        st.lists(BYTES, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=3,
)


def states(stops, tokens):
    """States of all rows after each of the same tokens."""
    state = np.asarray(stops.start_B)
    for token in tokens:
        state = np.asarray(stops.table)[state, token]
        yield state


@given(
    RULES,
    st.lists(BYTES | st.just(b''), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), max_size=12),
)
def test_stops_with_the_token_that_completes_a_string_or_is_a_stop_id(rules, vocabulary, tokens):
    stops = stop.build(rules, vocabulary)
    for n, state in enumerate(states(stops, tokens), 1):
        text = b''.join(vocabulary[token] for token in tokens[:n])
        for row, rule in enumerate(rules):
            expected = any(s in text for s in rule.strings) or set(rule.ids) & set(tokens[:n])
            assert (state[row] == stop.STOPPED) == bool(expected)


def test_on_the_device():
    vocabulary = [b'a', b'b', b'xa', b'abc', b'']
    stops = stop.build([Rule((4,), (b'ab',)), Rule(), Rule((), (b'ax',))], vocabulary)
    state_B = jax.jit(stop.advance)(stops.table, stops.start_B, jnp.asarray([2, 4, 0]))
    np.testing.assert_array_equal(stop.stopped(state_B), [False, False, False])
    state_B = jax.jit(stop.advance)(stops.table, state_B, jnp.asarray([1, 3, 2]))
    np.testing.assert_array_equal(stop.stopped(state_B), [True, False, True])
    state_B = jax.jit(stop.advance)(stops.table, state_B, jnp.asarray([0, 0, 0]))
    np.testing.assert_array_equal(stop.stopped(state_B), [True, False, True])


def test_rules_without_stops_never_stop():
    stops = stop.none(5, 2)
    for state in states(stops, range(5)):
        assert not stop.stopped(state).any()
    built = stop.build([Rule(), Rule()], [b'a'] * 5)
    jax.tree.map(np.testing.assert_array_equal, stops, built)


def test_equal_rules_share_their_states_and_sizes_are_rounded():
    vocabulary = [bytes([i]) for i in range(256)]
    one = stop.build([Rule((), (b'abc',))], vocabulary)
    many = stop.build([Rule((), (b'abc',))] * 5, vocabulary)
    np.testing.assert_array_equal(one.table, many.table)
    assert stop.build([Rule((), (b'abcdefgh',))], vocabulary).table.shape == (16, 256)


def test_a_large_vocabulary_takes_less_than_a_second():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, 32_000)
    vocabulary = [bytes(random.integers(32, 128, n, np.uint8)) for n in lengths]
    rules = [Rule((2,), (b'\n\n', b'</s>', b'\nUser:')), Rule((3,), (b'the end',))] * 4
    started = time.perf_counter()
    stop.build(rules, vocabulary)
    assert time.perf_counter() - started < 2  # 0.15 s on two idle cores


@pytest.mark.parametrize(
    ('rule', 'error', 'message'),
    [
        (Rule((), (b'',)), ValueError, 'row 1: an empty stop string'),
        (Rule((5,)), ValueError, 'row 1: stop id 5 is not in'),
        (Rule((-1,)), ValueError, 'row 1: stop id -1 is not in'),
        (Rule((), ('end',)), TypeError, 'row 1: stop string .* is not bytes'),
    ],
)
def test_bad_rules_are_refused_with_their_row(rule, error, message):
    with pytest.raises(error, match=message):
        stop.build([Rule(), rule], [b'a'] * 5)
