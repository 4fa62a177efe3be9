"""Bytes as tokens: the baseline of every comparison."""

import numpy as np
from etils import epath

from lm.files import atomic
from tokenization.tokenizer import EncodesOneByOne, check_ids, read_kind, write_kind


class ByteTokenizer(EncodesOneByOne):
    """256 ids: each byte is its own id.

    >>> ByteTokenizer().encode(b'Hi')
    array([ 72, 105], dtype=int32)
    """

    @property
    def vocab_size(self) -> int:
        """Always 256."""
        return 256

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the values of the bytes, int32 `[T]`."""
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_piece(self, data: bytes) -> list[int]:
        """Returns the values of the bytes."""
        return list(data)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        return check_ids(ids, 256).astype(np.uint8).tobytes()

    def token_bytes(self, token: int) -> bytes:
        """Returns the byte of one id; raises ValueError if it is out of range."""
        return self.decode(np.array([token]))

    def save(self, path: epath.PathLike) -> None:
        """Writes the folder `path`."""
        with atomic.new_folder(path) as folder:
            write_kind(folder, 'byte')

    @classmethod
    def load(cls, path: epath.PathLike) -> 'ByteTokenizer':
        """Returns the tokenizer saved in `path`; raises ValueError for another kind."""
        read_kind(path, 'byte')
        return cls()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteTokenizer)

    def __hash__(self) -> int:
        return hash(ByteTokenizer)

    def __repr__(self) -> str:
        return 'ByteTokenizer()'
