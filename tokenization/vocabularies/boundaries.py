"""Boundary rules: which neighbouring tokens dynamic tokenization may merge.

Feher et al., Retrofitting Large Language Models with Dynamic Tokenization (2024,
arXiv:2411.18553). A rule sees the bytes of the two neighbours and not the text around them, so
a pair is allowed everywhere or nowhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

from tokenizers import Regex, pre_tokenizers

from tokenization.vocabularies.patterns import GPT2_PATTERN

Boundary = Literal['pretokens', 'word', 'word_hyphen', 'sentence']
MayMerge = Callable[[bytes, bytes], bool]

_BLANKS = frozenset(b' \t\n\r\v\f')
_MARKS = frozenset('.,!?;:()-"\'\\/`$%&*+<=>@[]^_{|}~')
_CACHED_PAIRS = 1 << 18


@dataclasses.dataclass(frozen=True)
class BoundaryRule:
    """`rule(left, right)` returns whether two neighbours, given by their bytes, may be merged.

    Under every rule, a blank (ASCII white space) may only be the first byte of the union, unless
    the union is all blanks; two line feeds are never merged. In addition

      pretokens     `pattern` must match the union as one pretoken;
      word          the union must be one word, as `str.split` finds them;
      word_hyphen   as `word`; a token of punctuation joins the token before it only if that is
                    punctuation too, or if the token is a hyphen;
      sentence      no further condition.

    >>> rule = BoundaryRule('word')
    >>> rule(b' the', b'm'), rule(b' the', b' cat')
    (True, False)

    A union that is not UTF-8, such as half a character, satisfies the further conditions. A rule
    caches its answers, so make it once.

    Attributes:
      boundary: the rule's name.
      tokens: bytes of each source token, for `word_hyphen`: a source token with a punctuation mark
        and no digit is punctuation, a merged unit never is.
      pattern: the regular expression that splits text into pretokens, for `pretokens`.
    """

    boundary: Boundary
    tokens: tuple[bytes, ...] = ()
    pattern: str = GPT2_PATTERN

    def __post_init__(self) -> None:
        if self.boundary not in get_args(Boundary):
            known = ', '.join(get_args(Boundary))
            raise ValueError(f'boundary {self.boundary!r}: expected {known}')
        if self.boundary == 'word_hyphen' and not self.tokens:
            raise ValueError('boundary word_hyphen: give the bytes of the source tokens')

    def __call__(self, left: bytes, right: bytes) -> bool:
        """Returns whether the two may be merged."""
        return self._answers(left, right)

    def __getstate__(self) -> dict[str, object]:
        """Pickles the fields without the cached answers."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @functools.cached_property
    def _answers(self) -> MayMerge:
        return functools.lru_cache(_CACHED_PAIRS)(self._decide)

    def _decide(self, left: bytes, right: bytes) -> bool:
        union = left + right
        if not _BLANKS.isdisjoint(union[1:]) and (
            union == b'\n\n' or not _BLANKS.issuperset(union)
        ):
            return False
        try:
            text = union.decode()
        except UnicodeDecodeError:
            return True
        if self.boundary == 'sentence':
            return True
        if self.boundary == 'pretokens':
            return len(self._splitter.pre_tokenize_str(text)) == 1
        return len(text.split()) == 1 and not self._joins_punctuation(left, right)

    def _joins_punctuation(self, left: bytes, right: bytes) -> bool:
        if self.boundary != 'word_hyphen' or right == b'-':
            return False
        return right in self._punctuation and left not in self._punctuation

    @functools.cached_property
    def _splitter(self) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Split(Regex(self.pattern), 'isolated')

    @functools.cached_property
    def _punctuation(self) -> frozenset[bytes]:
        return frozenset(token for token in self.tokens if _is_punctuation(token))


def _is_punctuation(token: bytes) -> bool:
    text = token.decode('utf-8', 'replace')
    return not _MARKS.isdisjoint(text) and not any(letter.isdigit() for letter in text)
