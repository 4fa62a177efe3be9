"""The compiled trie walk against longest match in plain Python."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenization.vocabularies.longest_match import LongestMatch, Strings

SINGLES = [bytes([byte]) for byte in range(256)]


def naive(text: bytes, table: dict[bytes, int]) -> list[int]:
    longest = max(map(len, table))
    ids, at = [], 0
    while at < len(text):
        size = next(n for n in range(longest, 0, -1) if text[at : at + n] in table)
        ids.append(table[text[at : at + size]])
        at += size
    return ids


words = st.one_of(
    st.text('abc', min_size=2, max_size=9).map(str.encode), st.binary(min_size=2, max_size=4)
)
pieces = st.one_of(words, st.binary(max_size=8), st.integers(0, 40).map(lambda n: b'a' * n))


@settings(max_examples=200, deadline=None)
@given(st.sets(words, max_size=60), st.lists(pieces, max_size=20), st.randoms())
def test_same_as_plain_python(words, parts, random):
    listed = SINGLES + sorted(words)
    random.shuffle(listed)
    strings = Strings.of(listed)
    match = LongestMatch.build(strings, np.arange(len(listed)))
    text = b''.join([*parts, *sorted(words)])
    ids = match.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == naive(text, {string: i for i, string in enumerate(listed)})
    assert strings.join(ids) == text


def test_only_the_given_ids_match():
    strings = Strings.of([b'xx', *SINGLES, b'xyz', b'xx'])
    match = LongestMatch.build(strings, np.arange(1, 259))
    assert [strings[i] for i in match.encode(b'xxxyz')] == [b'xx', b'xyz']
    assert match.encode(b'xxxyz').tolist() == [258, 257]
    assert match.encode(b'').tolist() == [] and strings.join(np.zeros(0, np.int32)) == b''


def test_threads_share_one_table():
    rng = np.random.default_rng(0)
    strings = Strings.of([*SINGLES, b'ab', b'abab', b'ba', b'aab'])
    match = LongestMatch.build(strings, np.arange(len(strings)))
    texts = [(97 + rng.integers(0, 2, 5000, np.uint8)).tobytes() for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(match.encode, texts))
    for text, ids in zip(texts, together):
        np.testing.assert_array_equal(ids, match.encode(text))
        assert strings.join(ids) == text


def test_bad_tables_are_refused():
    for listed, message in (
        ([*SINGLES, b''], '256 is empty'),
        ([*SINGLES, b'ab', b'ab'], 'is a duplicate'),
        (SINGLES[:7] + SINGLES[8:], 'byte 7 is missing'),
        ([*SINGLES[:7], *SINGLES[8:], b'\x07\x07'], 'byte 7 is missing'),
        ([], 'byte 0 is missing'),
    ):
        with pytest.raises(ValueError, match=message):
            LongestMatch.build(Strings.of(listed), np.arange(len(listed)))
