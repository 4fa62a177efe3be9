"""Which neighbouring tokens may become one: the boundary rules of dynamic tokenization.

Feher et al., Retrofitting Large Language Models with Dynamic Tokenization (2024,
arXiv:2411.18553). A rule looks at the bytes of the two neighbours alone, not at the text around
them, so that a pair is allowed everywhere or nowhere.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from tokenizers import Regex, pre_tokenizers

from tokenization.bpe import GPT2_PATTERN

Boundary = Literal['pretokens', 'word', 'word_hyphen', 'sentence']
MayMerge = Callable[[bytes, bytes], bool]

_BLANKS = frozenset(b' \t\n\r\v\f')
_MARKS = frozenset('.,!?;:()-"\'\\/`$%&*+<=>@[]^_{|}~')
_REMEMBERED = 1 << 18  # pairs, across batches


def may_merge(
    boundary: Boundary, tokens: Sequence[bytes] = (), pattern: str = GPT2_PATTERN
) -> MayMerge:
    """Returns the rule: `rule(left, right)` says whether two neighbours may become one unit.

    Under every rule, a blank (ASCII white space) may only be the first byte of the union, unless
    the union is all blanks; two line feeds stay two. Then

      pretokens     `pattern` takes the union as one piece;
      word          the union is one word between white space;
      word_hyphen   as `word`, and a token of punctuation is joined to what is before it only if
                    that is punctuation, too, or if the token is a hyphen;
      sentence      nothing more is asked.

    A union that is not UTF-8, such as half a character, is allowed where its text would be
    looked at. Make a rule once and keep it: it remembers its answers.

    Args:
      boundary: the rule's name.
      tokens: bytes of each source token; `word_hyphen` needs to know which are punctuation: those
        with a mark and no digit. Units that merging made are not.
      pattern: the regular expression that splits text into pretokens, for `pretokens`.

    Raises:
      ValueError: no such rule, or `word_hyphen` without tokens.
    """
    if boundary not in get_args(Boundary):
        raise ValueError(f'boundary {boundary!r}: expected {", ".join(get_args(Boundary))}')
    rules: dict[str, Callable[[bytes, bytes, str], bool]] = {
        'word': lambda left, right, text: len(text.split()) == 1,
        'sentence': lambda left, right, text: True,
    }
    if boundary == 'word_hyphen':
        rules['word_hyphen'] = _hyphen_rule(tokens)
    if boundary == 'pretokens':
        split = pre_tokenizers.Split(Regex(pattern), 'isolated').pre_tokenize_str
        rules['pretokens'] = lambda left, right, text: len(split(text)) == 1
    rule = rules[boundary]

    @functools.lru_cache(_REMEMBERED)
    def allowed(left: bytes, right: bytes) -> bool:
        union = left + right
        if not _BLANKS.isdisjoint(union[1:]) and (
            union == b'\n\n' or not _BLANKS.issuperset(union)
        ):
            return False
        try:
            text = union.decode()
        except UnicodeDecodeError:
            return True
        return rule(left, right, text)

    return allowed


def _hyphen_rule(tokens: Sequence[bytes]) -> Callable[[bytes, bytes, str], bool]:
    if not len(tokens):
        raise ValueError('boundary word_hyphen: give the bytes of the source tokens')
    punctuation = {token for token in tokens if _is_punctuation(token)}

    def rule(left: bytes, right: bytes, text: str) -> bool:
        joins = left not in punctuation and right in punctuation
        return len(text.split()) == 1 and (not joins or right == b'-')

    return rule


def _is_punctuation(token: bytes) -> bool:
    text = token.decode('utf-8', 'replace')
    return not _MARKS.isdisjoint(text) and not any(letter.isdigit() for letter in text)
