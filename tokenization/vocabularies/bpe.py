"""Byte-level byte-pair encoding: trained by Hugging Face `tokenizers`, applied by tiktoken.

A regular expression splits text into pretokens. Within one, the pair of neighbours whose union has
the lowest rank is merged, again and again (Sennrich et al., 2016, arXiv:1508.07909; over bytes, as
in GPT-2). The vocabulary holds all 256 bytes and no special tokens, so any byte string has an
encoding. Bytes that are not UTF-8, which neither library accepts, become one token each; the text
between them is encoded as usual.
"""

import base64
import binascii
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures

import numpy as np
import tiktoken
import tokenizers
from etils import epath
from tokenizers import models, pre_tokenizers, trainers

from lm.files import atomic
from tokenization.tokenizer import EncodesOneByOne, check_ids, read_kind, write_kind
from tokenization.vocabularies import spelling
from tokenization.vocabularies.patterns import GPT2_PATTERN

_RANKS = 'ranks.tiktoken'

# tiktoken's regular expressions overflow their stack on runs of about half a million blanks (for
# some patterns, of letters). So text is cut after each block of this many characters that is one
# run of a single class.
_BLOCK = 1 << 16
_ONE_CLASS = re.compile(r'\s+|\w+|[^\w\s]+')


@dataclasses.dataclass(frozen=True)
class BPETokenizer(EncodesOneByOne):
    """A byte-level BPE tokenizer.

    >>> bpe = BPETokenizer((*(bytes([byte]) for byte in range(256)), b'th', b'the'))
    >>> bpe.encode(b'the th')
    array([257,  32, 256], dtype=int32)

    Attributes:
      tokens: the bytes of each id, distinct. The id is also the rank of the merge that makes it.
      pattern: the regular expression that splits text before merging.
    """

    tokens: tuple[bytes, ...]
    pattern: str = GPT2_PATTERN

    def __post_init__(self):
        ranks = set(self.tokens)
        if len(ranks) < len(self.tokens) or b'' in ranks:
            raise ValueError('the tokens of a BPE vocabulary must be distinct and not empty')
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f'{len(missing)} of the 256 single bytes are missing from the vocabulary, '
                f'byte {missing[0]} first: it could not encode every text'
            )

    @classmethod
    def train(
        cls, documents: Iterable[bytes], vocab_size: int, pattern: str = GPT2_PATTERN
    ) -> 'BPETokenizer':
        """Trains a vocabulary, at about 5 MB/s; parts of documents that are not UTF-8 are skipped.

        Text with too few distinct pairs gives fewer than `vocab_size` tokens.

        Raises:
          ValueError: `vocab_size` is below 256.
        """
        if vocab_size < 256:
            raise ValueError(f'vocab_size must be at least 256, the number of bytes: {vocab_size}')
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        texts = (
            text for document in documents for text, valid in spelling.stretches(document) if valid
        )
        trained.train_from_iterator(texts, trainer)
        vocabulary = trained.get_vocab()
        letters = spelling.byte_of_letter()
        words = sorted(vocabulary, key=lambda word: vocabulary[word])
        return cls(tuple(bytes(letters[letter] for letter in word) for word in words), pattern)

    @classmethod
    def from_tiktoken_file(cls, path: epath.PathLike, pattern: str) -> 'BPETokenizer':
        """Reads ranks in tiktoken's format: a line `base64(token) rank` per token.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged, naming the line, or lacks single bytes.
        """
        file = epath.Path(path)
        if not file.exists():
            raise FileNotFoundError(f'{path}: no such file')
        tokens = _parse_ranks(file)
        try:
            return cls(tokens, pattern)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`.

        Raises:
          ValueError: the pattern is invalid, or does not match some of the text, which would be
            lost.
        """
        ids: list[int] = []
        for text, valid in spelling.stretches(data):
            if valid:
                for piece in _without_long_runs(text):
                    ids += self._split_and_merge(piece)
            else:
                ids += [self._ranks[bytes([ord(letter) - 0xDC00])] for letter in text]
        ids_T = np.array(ids, np.int32)
        if self._lengths[ids_T].sum() != len(data):
            raise ValueError(f'the pattern {self.pattern!r} does not match every character')
        return ids_T

    def _split_and_merge(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # A panic in Rust is not an Exception. It means that the pattern matches the empty
            # string, or backtracks beyond its limit.
            if type(error).__name__ != 'PanicException':
                raise
            raise ValueError(f'the pattern {self.pattern!r} cannot split a text: {error}') from None

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the ids of `data` as one pretoken: merged, without splitting by the pattern."""
        return self._encoding._encode_single_piece(data) if data else []

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the ids of each document, encoded on all cores."""
        with futures.ThreadPoolExecutor() as pool:
            return list(pool.map(self.encode, documents))

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        return b''.join([self.tokens[i] for i in check_ids(ids, len(self.tokens)).tolist()])

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id; raises ValueError if it is out of range."""
        return self.decode(np.array([token]))

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder `path`, with the ranks in tiktoken's format."""
        lines = [f'{base64.b64encode(t).decode()} {i}\n' for i, t in enumerate(self.tokens)]
        with atomic.new_folder(path) as folder:
            (folder / _RANKS).write_text(''.join(lines))
            write_kind(folder, 'bpe', vocab_size=self.vocab_size, pattern=self.pattern)

    @classmethod
    def load(cls, path: epath.PathLike) -> 'BPETokenizer':
        """Returns the tokenizer saved in `path`.

        Raises:
          FileNotFoundError, ValueError: a file is missing or damaged; names file and line.
        """
        fields = read_kind(path, 'bpe')
        if not isinstance(fields.get('pattern'), str):
            raise ValueError(f'{path}: tessera.json lacks the field "pattern"')
        loaded = cls.from_tiktoken_file(epath.Path(path) / _RANKS, fields['pattern'])
        if loaded.vocab_size != fields.get('vocab_size'):
            raise ValueError(
                f'{path}: {_RANKS} has {loaded.vocab_size} tokens, tessera.json expects '
                f'{fields.get("vocab_size")}; the file is cut short or of another tokenizer'
            )
        return loaded

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int]:
        return {token: rank for rank, token in enumerate(self.tokens)}

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(token) for token in self.tokens])

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            'bpe', pat_str=self.pattern, mergeable_ranks=self._ranks, special_tokens={}
        )

    def __getstate__(self) -> dict[str, object]:
        return {'tokens': self.tokens, 'pattern': self.pattern}

    def __repr__(self) -> str:
        return f'BPETokenizer({self.vocab_size} tokens)'


def _without_long_runs(text: str) -> Iterator[str]:
    """Yields the text in pieces, cut after each block that is one run of a single class."""
    start = 0
    for end in range(_BLOCK, len(text), _BLOCK):
        if _ONE_CLASS.fullmatch(text, end - _BLOCK, end):
            yield text[start:end]
            start = end
    yield text[start:]


def _parse_ranks(file: epath.Path) -> tuple[bytes, ...]:
    ranks: dict[int, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(text)
        except (ValueError, binascii.Error):
            raise ValueError(
                f'{file}, line {number}: expected base64 and a rank, got {line[:60]!r}'
            ) from None
        if rank in ranks or token in seen or not token:
            raise ValueError(f'{file}, line {number}: duplicate rank {rank} or token')
        ranks[rank] = token
        seen[token] = rank
    missing = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if missing is not None:
        raise ValueError(f'{file}: rank {missing} is missing; ranks must be 0, 1, 2, ...')
    return tuple(ranks[rank] for rank in range(len(ranks)))
