"""A tokenizer over any table of byte strings: longest match from left to right.

It serves vocabularies that no merge rules lead to: one that a hypernetwork has given rows, or a
subword vocabulary extended to a million words, over which a generated text has to be written
again (Feher et al., 2024, arXiv:2411.18553, section on decoders).
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent import futures

import numpy as np
from etils import epath
from tokenizers import Regex, pre_tokenizers

from lm.files import atomic
from tokenization.tokenizer import OneByOne, Tokenizer, check_ids, read_kind, write_kind
from tokenization.vocabularies.bpe import GPT2_PATTERN
from tokenization.vocabularies.longest_match import LongestMatch, Strings
from tokenization.vocabularies.pair_merging import PairMerger

_KIND = 'string_table'
_BYTES, _SIZES = 'strings.bin', 'sizes.bin'


@dataclasses.dataclass(frozen=True, eq=False)
class StringTable(OneByOne):
    """Ids for byte strings, among them all 256 single bytes.

    Attributes:
      strings: the bytes of each id. An id without bytes is special, and never written; of ids with
        the same bytes the lowest is.
    """

    strings: Strings

    def __post_init__(self) -> None:
        single = self.strings.offsets[:-1][self.strings.sizes == 1]
        missing = np.setdiff1d(np.arange(256), self.strings.flat[single])
        if len(missing):
            raise ValueError(f'the single byte {missing[0]} has no id: not all text has ids')

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.strings)

    @functools.cached_property
    def match(self) -> LongestMatch:
        """The trie of the strings that are written, built at the first use."""
        first: dict[bytes, int] = {}
        for i in range(len(self.strings)):
            first.setdefault(self.strings[i], i)
        first.pop(b'', None)
        return LongestMatch.build(self.strings, np.fromiter(first.values(), np.int64, len(first)))

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`: longest matches from left to right."""
        return self.match.encode(data)

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        with futures.ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, documents))

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        return self.strings.join(check_ids(ids, self.vocab_size))

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; raises ValueError if it is out of range."""
        return self.decode(np.array([token]))

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder `path`: the strings one after the other, and their sizes as uint32."""
        flat, sizes = self.strings.flat.tobytes(), self.strings.sizes.astype('<u4').tobytes()
        with atomic.new_folder(path) as folder:
            write_kind(folder, _KIND, sha256=hashlib.sha256(sizes + flat).hexdigest())
            (folder / _BYTES).write_bytes(flat)
            (folder / _SIZES).write_bytes(sizes)

    @classmethod
    def load(cls, path: epath.PathLike) -> 'StringTable':
        """Returns the tokenizer saved in `path`.

        Raises:
          FileNotFoundError, ValueError: a file is missing or damaged; names it.
        """
        fields, folder = read_kind(path), epath.Path(path)
        if fields['kind'] != _KIND:
            raise ValueError(f'{path}: a tokenizer of kind {fields["kind"]!r}, expected {_KIND}')
        for name in (_BYTES, _SIZES):
            if not (folder / name).exists():
                raise FileNotFoundError(f'{folder / name}: no such file; save the tokenizer again')
        flat, sizes = ((folder / name).read_bytes() for name in (_BYTES, _SIZES))
        if hashlib.sha256(sizes + flat).hexdigest() != fields.get('sha256'):
            raise ValueError(
                f'{path}: {_BYTES} and {_SIZES} are not what was saved here (SHA-256 differs); '
                'save the tokenizer again'
            )
        if len(sizes) % 4:
            raise ValueError(f'{folder / _SIZES}: {len(sizes)} bytes; expected a multiple of 4')
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(sizes, '<u4'), dtype=np.int64)])
        if offsets[-1] != len(flat):
            raise ValueError(f'{folder / _BYTES}: {len(flat)} bytes; the sizes are {offsets[-1]}')
        try:
            return cls(Strings(np.frombuffer(flat, np.uint8), offsets))
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None


def extended_vocabulary(
    tokenizer: Tokenizer, documents: Iterable[bytes], size: int, pattern: str = GPT2_PATTERN
) -> StringTable:
    """Returns a tokenizer's vocabulary, extended by what is frequent in documents.

    Byte-pair encoding, trained on from the tokens that the tokenizer makes of each word: its own
    ids stay, and merges follow in order, whole words at last. Smaller than `size` where every word
    of the documents has become one token.

    Args:
      tokenizer: what to extend; ids that stand for no bytes of their own are kept as special.
      documents: bytes that are not UTF-8 are passed over.
      size: ids at most.
      pattern: the regular expression that splits text into words; no token goes beyond one.

    Raises:
      ValueError: the size is below the tokenizer's own, or it lacks single bytes.
    """
    if size < tokenizer.vocab_size:
        raise ValueError(
            f'size {size}: the vocabulary to extend has {tokenizer.vocab_size} tokens already'
        )
    tokens = [_bytes_of(tokenizer, i) for i in range(tokenizer.vocab_size)]
    split = pre_tokenizers.Split(Regex(pattern), 'isolated').pre_tokenize_str
    words: Counter[str] = Counter()
    for document in documents:
        words.update(word for word, _ in split(document.decode('utf-8', 'ignore')))
    encoded = tokenizer.encode_batch([word.encode() for word in words])
    merger = PairMerger(encoded, tokens, lambda left, right: True, weights=list(words.values()))
    known = set(tokens)
    while len(tokens) < size and (pair := merger.best()) is not None:
        string = b''.join([tokens[piece] for piece in merger.merge(pair)])
        if string not in known:  # it may be there already, made of other pieces
            known.add(string)
            tokens.append(string)
    return StringTable(Strings.of(tokens))


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except ValueError:
        return b''
