"""Arithmetic-coded text as tokens: a representation that a language model does not learn from.

Lester et al. 2024 (Training LLMs over Neurally Compressed Text, section 3.3) call it AC: one stream
per document, cut into groups of 8 or 16 bits. It is the baseline of Equal-Info windows. Here the
first model, which gives the coder its probabilities, is a byte n-gram.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from etils import epath

from lm.files import atomic
from tokenization.coding import byte_coder
from tokenization.coding.next_byte import NextByteModel
from tokenization.coding.ngram import NGram
from tokenization.coding.symbols import encode_symbols
from tokenization.tokenizer import check_ids, read_kind, write_kind

_KIND = 'arithmetic'
_BATCH = 64
_SYMBOLS_AT_ONCE = 1 << 24
_SHORTEST = 256


@dataclasses.dataclass(frozen=True, eq=False)
class ArithmeticTokenizer:
    """A `Tokenizer` whose ids are the arithmetic code of the whole document.

    A document becomes its length in bytes, as a LEB128 varint, and its arithmetic code. The ids are
    the bytes of both, or pairs of bytes, first byte high, padded with a zero byte. An empty
    document has no ids.

    Attributes:
      ngram: the first model, which reads the document without ever being reset.
      bits_per_token: 8 or 16.
      precision: bits of the first model's CDF; Lester et al. use 14.
    """

    ngram: NGram
    bits_per_token: int = 8
    precision: int = 14

    def __post_init__(self) -> None:
        if type(self.bits_per_token) is not int or self.bits_per_token not in (8, 16):
            raise ValueError(f'bits_per_token {self.bits_per_token!r}: expected 8 or 16')
        if not (isinstance(self.precision, int) and 9 <= self.precision <= 16):
            raise ValueError(f'precision {self.precision!r}: expected 9 to 16 bits')

    @property
    def vocab_size(self) -> int:
        """256 or 65,536."""
        return 2**self.bits_per_token

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of one document, int32 `[T]`."""
        return self.encode_batch([data])[0]

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each document, faster than one by one."""
        codes = [b''] * len(documents)
        order = sorted(range(len(documents)), key=lambda row: len(documents[row]))
        while order:
            # The longest that remain, as many as fit; few shapes, so that few programs compile.
            T = max(_SHORTEST, 1 << max(len(documents[order[-1]]) - 1, 0).bit_length())
            size = 1 if len(documents) == 1 else max(1, min(_BATCH, _SYMBOLS_AT_ONCE // T))
            rows, order = order[-size:], order[:-size]
            group = [documents[row] for row in rows]
            for row, code in zip(rows, self._codes(group, T, size)):
                codes[row] = code
        return [
            self._to_ids(_varint(len(document)) + code) if document else np.zeros(0, np.int32)
            for document, code in zip(documents, codes)
        ]

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the document.

        Raises:
          ValueError: an id is out of range, or `encode` of no document gives these ids: they are
            truncated or damaged.
        """
        return self.decode_batch([ids])[0]

    def decode_batch(self, sequences: Sequence[np.ndarray]) -> list[bytes]:
        """Returns `decode` of each sequence of ids, faster than one by one."""
        sequences = [np.asarray(ids) for ids in sequences]
        lengths, codes = [], []
        for ids in sequences:
            length, code = self._parse(ids)
            lengths.append(length)
            codes.append(code)
        batch = 1 if len(sequences) == 1 else _BATCH
        documents = byte_coder.decode_bytes(self._model, codes, lengths, batch=batch)
        # Each document has exactly one code: encoding it again shows whether ids are complete.
        for ids, document, own in zip(sequences, documents, self.encode_batch(documents)):
            if not np.array_equal(ids, own):
                raise ValueError(
                    f'{len(ids)} ids are not the code of any document: they start like one of '
                    f'{len(document)} bytes, which has {len(own)} ids; truncated or damaged'
                )
        return documents

    def token_bytes(self, token: int) -> bytes:
        """Always raises ValueError: the bytes of an id depend on all the ids before it."""
        raise ValueError(f'id {token}: in an arithmetic code, single ids have no fixed bytes')

    def save(self, path: epath.PathLike) -> None:
        """Writes the n-gram and the settings into the folder `path`."""
        with atomic.new_folder(path) as folder:
            write_kind(folder, _KIND, bits_per_token=self.bits_per_token, precision=self.precision)
            self.ngram.save(folder / 'ngram')

    @classmethod
    def load(cls, path: epath.PathLike) -> 'ArithmeticTokenizer':
        """Returns the tokenizer saved in `path`.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file is damaged or of another kind.
        """
        fields = read_kind(path, _KIND)
        missing = {'bits_per_token', 'precision'} - fields.keys()
        if missing:
            raise ValueError(f'{path}: tessera.json lacks {sorted(missing)}; save it again')
        ngram = NGram.load(epath.Path(path) / 'ngram')
        return cls(ngram, fields['bits_per_token'], fields['precision'])

    @functools.cached_property
    def _model(self) -> NextByteModel:
        # One object for the tokenizer's life: jit compiles once for each.
        return self.ngram.model(self.precision)

    def _codes(self, documents: list[bytes], T: int, batch: int) -> list[bytes]:
        lower_TB = np.zeros((T, batch), np.int32)
        upper_TB = np.ones((T, batch), np.int32)
        length_B = np.zeros(batch, np.int32)
        for row, document in enumerate(documents):
            length_B[row] = length = len(document)
            lower_TB[:length, row], upper_TB[:length, row] = self.ngram.intervals(
                document, self.precision
            )
        codes, _ = encode_symbols(lower_TB, upper_TB, length_B, self.precision)
        return codes[: len(documents)]

    def _to_ids(self, data: bytes) -> np.ndarray:
        if self.bits_per_token == 16:
            data = data + b'\0' * (len(data) % 2)
        return np.frombuffer(data, f'>u{self.bits_per_token // 8}').astype(np.int32)

    def _parse(self, ids: np.ndarray) -> tuple[int, bytes]:
        """Returns the document's length and its code, or raises ValueError."""
        ids = check_ids(ids, self.vocab_size)
        if not len(ids):
            return 0, b''
        data = ids.astype(f'>u{self.bits_per_token // 8}').tobytes()
        length, size = _read_varint(data)
        code = data[size:]
        # No byte has probability 1, so a code of n bits holds a bounded number of bytes.
        least = -math.log2(1 - 254 / 2**self.precision)  # 255, and 1 for rounding
        if length * least > 8 * len(code) + 32:
            raise ValueError(
                f'{len(ids)} ids cannot hold the {length} bytes that they declare: truncated or '
                'damaged'
            )
        return length, code


def _varint(number: int) -> bytes:
    r"""Returns a number in LEB128: 7 bits per byte, lowest first, top bit set if more follow.

    >>> _varint(300)  # 2 * 128 + 44
    b'\xac\x02'
    """
    groups = bytearray()
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _read_varint(data: bytes) -> tuple[int, int]:
    """Returns the number at the start of `data`, and its size in bytes."""
    number = 0
    for index, byte in enumerate(data[:10]):
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, index + 1
    raise ValueError('the ids do not start with the length of a document: truncated or damaged')
