"""Stop ids and stop strings as one automaton that advances token by token.

A stop string may span tokens, and may end inside one. The automaton of Aho and Corasick (1975) over
bytes finds it. Each token's bytes are run through it from every state in advance, so that on the
device a token is one look-up. For the stop string 'ab' and the tokens 'a', 'b', 'xa', 'abc':

    state               a  b  xa abc
    0  stopped          0  0  0  0
    1  nothing read     2  1  2  0
    2  'a' was read     2  0  2  0

Only the continuation is searched: a string that began in the prompt does not count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

STOPPED = 0


class Rule(NamedTuple):
    """The stops of one row; the first one met ends its text.

    Attributes:
      ids: token ids.
      strings: byte strings.
    """

    ids: tuple[int, ...] = ()
    strings: tuple[bytes, ...] = ()


@flax.struct.dataclass
class Stops:
    """The rules of a batch as arrays.

    Attributes:
      table: int32 `[states, V]`, the state after each token; as many states as the strings have
        bytes, rounded up to a power of two, so that most changes of rules do not recompile.
      start_B: int32, the state in which each row starts.
    """

    table: jax.Array
    start_B: jax.Array


def none(vocab_size: int, rows: int) -> Stops:
    """Returns an automaton that never stops: rows end at their length."""
    table = jnp.broadcast_to(jnp.asarray([[STOPPED], [1]], jnp.int32), (2, vocab_size))
    return Stops(table, jnp.ones(rows, jnp.int32))


def build(rules: Sequence[Rule], token_bytes: Sequence[bytes]) -> Stops:
    """Returns the automaton of a batch. Time and memory grow as states x V.

    Args:
      rules: of each row; equal ones share their states.
      token_bytes: the bytes of each id; empty for ids that write nothing.

    Raises:
      ValueError: an empty stop string, or an id outside of the vocabulary.
      TypeError: a stop string that is not bytes.
    """
    rules = [Rule(tuple(rule.ids), tuple(rule.strings)) for rule in rules]
    for row, rule in enumerate(rules):
        _check(row, rule, len(token_bytes))
    first: dict[Rule, int] = {}  # state in which each distinct rule starts
    next_states = [np.zeros((1, 256), np.int32)]
    states = 1
    for rule in rules:
        if rule not in first:
            first[rule] = states
            next_states.append(_byte_automaton(rule.strings, states))
            states += len(next_states[-1])
    size = 1 << (states - 1).bit_length()
    table = np.zeros((size, len(token_bytes)), np.int32)
    table[:states] = _token_automaton(np.concatenate(next_states), token_bytes)
    starts = [*first.values(), states]
    for rule, begin, end in zip(first, starts[:-1], starts[1:], strict=True):
        table[begin:end, list(rule.ids)] = STOPPED
    return Stops(jnp.asarray(table), jnp.asarray([first[rule] for rule in rules], jnp.int32))


def advance(table: jax.Array, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the state of each row after one more token, int32 `[B]`."""
    return table[state_B, token_B]


def stopped(state_B: jax.Array) -> jax.Array:
    """Returns whether each row has met a stop, bool `[B]`; a stopped row stays stopped."""
    return state_B == STOPPED


def _check(row: int, rule: Rule, vocab_size: int) -> None:
    for string in rule.strings:
        if not isinstance(string, bytes):
            raise TypeError(f'row {row}: stop string {string!r} is not bytes; encode it as UTF-8')
        if not string:
            raise ValueError(f'row {row}: an empty stop string would end every text at its start')
    for i in rule.ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f'row {row}: stop id {i} is not in the vocabulary [0, {vocab_size})')


def _byte_automaton(strings: tuple[bytes, ...], first: int) -> np.ndarray:
    """Returns the state after each byte, int32 `[states, 256]`, states numbered from `first`.

    A state is the longest suffix of the bytes read that is a prefix of a stop string.
    """
    # a string that contains another one never completes first
    shortest = [s for s in set(strings) if not any(t in s for t in strings if t != s)]
    prefixes = sorted({s[:i] for s in shortest for i in range(len(s))} | {b''}, key=len)
    index = {prefix: first + i for i, prefix in enumerate(prefixes)}
    following: dict[bytes, list[tuple[int, int]]] = {prefix: [] for prefix in prefixes}
    for string in prefixes[1:]:
        following[string[:-1]].append((string[-1], index[string]))
    for string in shortest:
        following[string[:-1]].append((string[-1], STOPPED))

    table = np.full((len(prefixes), 256), first, np.int32)
    fallback = {b'': first}  # state of the longest shorter suffix
    for prefix in prefixes:
        row = table[index[prefix] - first]
        if prefix:
            shorter = fallback[prefix[:-1]]
            fallback[prefix] = first if len(prefix) == 1 else table[shorter - first, prefix[-1]]
            row[:] = table[fallback[prefix] - first]
        for byte, state in following[prefix]:
            row[byte] = state
    return table


def _token_automaton(next_state: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """Returns the state after each token, int32 `[states, V]`, from that after each byte."""
    length_V = np.asarray([len(token) for token in token_bytes])
    order = np.argsort(-length_V, kind='stable')  # longest first: the others end before them
    start_V = (np.cumsum(length_V) - length_V)[order]
    text = np.frombuffer(b''.join(token_bytes), np.uint8)
    states = len(next_state)
    state = np.repeat(np.arange(states, dtype=np.int32)[:, None], len(token_bytes), axis=1)
    for i in range(length_V.max(initial=0)):
        n = np.count_nonzero(length_V > i)
        byte = text[start_V[:n] + i]
        state[:, :n] = next_state[state[:, :n], byte]
    table = np.empty_like(state)
    table[:, order] = state
    return table
