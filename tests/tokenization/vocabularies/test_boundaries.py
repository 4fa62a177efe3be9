"""Which neighbours may merge, rule by rule."""

import pickle

import pytest

from tokenization.vocabularies.boundaries import BoundaryRule

TOKENS = [bytes([byte]) for byte in range(256)] + [b'the', b' cat', b'...', b'3.', b'\xe2\x82']

# left, right, and the rules under which they may merge
ALL = {'pretokens', 'word', 'word_hyphen', 'sentence'}
CASES = [
    (b'th', b'e', ALL),
    (b' ', b'the', ALL),  # a blank may come first
    (b' th', b'e', ALL),
    (b'the', b' ', set()),
    (b'the', b' cat', set()),  # a blank inside
    (b'\n', b'the', {'word', 'word_hyphen', 'sentence'}),
    (b' ', b' ', {'pretokens', 'sentence'}),  # all blanks, but not a word
    (b'\n', b'\n', set()),  # two line feeds are never merged
    (b'\r', b'\n', {'pretokens', 'sentence'}),
    (b'\n\n', b'\n', {'pretokens', 'sentence'}),
    (b'cat', b'.', {'word', 'sentence'}),  # two pretokens, one word
    (b'cat', b'-', {'word', 'word_hyphen', 'sentence'}),
    (b'cat-', b'like', {'word', 'word_hyphen', 'sentence'}),
    (b'.', b'.', ALL),
    (b'.', b'cat', {'word', 'word_hyphen', 'sentence'}),
    (b'cat', b'3.', {'word', 'word_hyphen', 'sentence'}),  # with a digit: not punctuation
    (b'cat', b'.)', {'word', 'word_hyphen', 'sentence'}),  # merged, not a token
    (b'a\xc2', b'\xa0b', {'sentence'}),  # no-break space: white space, but not a blank
    (b'\xe2\x82', b'\xac', ALL),  # one character
    (b'the', b'\xe2\x82', ALL),  # half a character: not UTF-8
    (b'the \xe2', b'\x82', set()),  # but blanks are checked
]


@pytest.mark.parametrize('boundary', sorted(ALL))
def test_rules(boundary):
    rule = BoundaryRule(boundary, tuple(TOKENS))
    for left, right, rules in CASES:
        assert rule(left, right) == (boundary in rules), (left, right)
    copy = pickle.loads(pickle.dumps(rule))  # as a worker of a data pipeline gets it
    assert copy == rule and copy(b'th', b'e') and not copy(b'a', b' ')


def test_pretokens_follow_the_pattern():
    rule = BoundaryRule('pretokens', pattern=r'[a-z]+|-[a-z]+|[^a-z]')
    assert rule(b'-', b'cat') and not rule(b'cat', b'-')


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="boundary 'line': expected pretokens, word"):
        BoundaryRule('line')
    with pytest.raises(ValueError, match='word_hyphen: give the bytes'):
        BoundaryRule('word_hyphen')
