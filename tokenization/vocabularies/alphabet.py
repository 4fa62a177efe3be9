"""The bytes of a small alphabet as tokens, for models of plain text."""

import dataclasses
import functools

import numpy as np
from etils import epath

from lm.files import atomic
from tokenization.tokenizer import EncodesOneByOne, check_ids, read_kind, write_kind

ASCII = bytes(range(128))

_KIND = 'characters'


@dataclasses.dataclass(frozen=True)
class AlphabetTokenizer(EncodesOneByOne):
    """One id per byte of an alphabet. Text with any other byte is refused.

    >>> AlphabetTokenizer(b'acgt').encode(b'tag')
    array([3, 0, 2], dtype=int32)

    Attributes:
      alphabet: the byte of each id, all distinct.
    """

    alphabet: bytes = ASCII

    def __post_init__(self):
        if not self.alphabet or len(set(self.alphabet)) < len(self.alphabet):
            raise ValueError('the bytes of an alphabet must be distinct, and at least one')

    @property
    def vocab_size(self) -> int:
        """Size of the alphabet."""
        return len(self.alphabet)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        ids = np.full(256, -1, np.int32)
        ids[list(self.alphabet)] = np.arange(len(self.alphabet))
        return ids

    def encode(self, data: bytes) -> np.ndarray:
        """Returns ids, int32 `[T]`; raises ValueError, naming the byte, for one without an id."""
        ids = self._ids[np.frombuffer(data, np.uint8)]
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            raise ValueError(f'byte {data[position]:#04x} at {position} is not in the alphabet')
        return ids

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        known = check_ids(ids, len(self.alphabet))
        return np.frombuffer(self.alphabet, np.uint8)[known].tobytes()

    def token_bytes(self, token: int) -> bytes:
        """Returns the byte of one id; raises ValueError if it is out of range."""
        return self.decode(np.array([token]))

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder `path`."""
        with atomic.new_folder(path) as folder:
            write_kind(folder, _KIND, alphabet=list(self.alphabet))

    @classmethod
    def load(cls, path: epath.PathLike) -> 'AlphabetTokenizer':
        """Returns the tokenizer saved in `path`; raises ValueError for another kind or damage."""
        alphabet = read_kind(path, _KIND).get('alphabet')
        if not isinstance(alphabet, list):  # bytes(n) of a number is n zeros
            raise ValueError(f'{path}: no alphabet of distinct bytes: expected a list')
        try:
            return cls(bytes(alphabet))
        except (TypeError, ValueError) as error:
            raise ValueError(f'{path}: no alphabet of distinct bytes: {error}') from None
