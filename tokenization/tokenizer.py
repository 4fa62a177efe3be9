"""The protocol of tokenizers, and the helpers that all kinds share.

The dict of kinds and `load` are in `tokenization.loading`: this module knows no kind, so that
every kind may import it.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from lm.files import json_fields

_FILE = 'tessera.json'


class Tokenizer(Protocol):
    """A lossless map from byte strings to ids: `decode(encode(data)) == data` for any bytes.

    Ids lie in `[0, vocab_size)`. Tokenizers are immutable and hold no open files.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, used or not."""
        ...

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the ids of `data`, int32 `[T]`; an empty array for no bytes."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes of `ids`; raises ValueError, naming the id, for one out of range."""
        ...

    def encode_batch(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each document."""
        ...

    def decode_batch(self, documents: Sequence[np.ndarray]) -> list[bytes]:
        """Returns `decode` of each document's ids."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes of one id.

        Raises:
          ValueError: the id is out of range, or has no bytes of its own. An id of an arithmetic
            code, for example, decodes to bytes only together with the ids before it.
        """
        ...

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer into the folder `path`; `loading.load(path)` returns it."""
        ...


class EncodesOneByOne:
    """A mixin that implements batches as loops, for tokenizers that gain nothing from batching."""

    def encode_batch(self: Any, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each document."""
        return [self.encode(document) for document in documents]

    def decode_batch(self: Any, documents: Sequence[np.ndarray]) -> list[bytes]:
        """Returns `decode` of each document's ids."""
        return [self.decode(ids) for ids in documents]


def check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns `ids` as an int64 vector.

    >>> check_ids(np.array([0, 2]), vocab_size=3)
    array([0, 2])
    >>> check_ids(np.array([0, 3]), vocab_size=3)
    Traceback (most recent call last):
    ValueError: id 3 at position 1 is out of range: the vocabulary is [0, 3)

    Raises:
      ValueError: `ids` is not a vector of integers, or an id is out of range; names the first.
    """
    ids = np.asarray(ids)
    if not ids.size:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in 'iu':
        raise ValueError(
            f'expected a vector of integer ids, got {ids.dtype} of shape {tuple(ids.shape)}'
        )
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        raise ValueError(
            f'id {ids[bad[0]]} at position {bad[0]} is out of range: the vocabulary is '
            f'[0, {vocab_size})'
        )
    return ids.astype(np.int64)


def write_kind(path: epath.PathLike, kind: str, **fields: object) -> epath.Path:
    """Creates the folder `path`, writes its `tessera.json`, and returns the folder.

    Args:
      path: the tokenizer's folder.
      kind: a key of `loading.KINDS`.
      **fields: other JSON fields of the file.
    """
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps({'kind': kind, **fields}, indent=2) + '\n')
    return folder


def read_kind(path: epath.PathLike, *expected: str) -> dict:
    """Returns the fields that `write_kind` wrote, the kind among them.

    Args:
      path: the tokenizer's folder.
      *expected: the kinds that the caller can read; none given: any.

    Raises:
      FileNotFoundError: `path` holds no tokenizer.
      ValueError: the file there is damaged, or names a kind that is not expected.
    """
    file = epath.Path(path) / _FILE
    if not file.is_file():
        raise FileNotFoundError(f'{path}: no tokenizer here ({_FILE} is missing)')
    fields = json_fields.read(file)
    if not isinstance(fields.get('kind'), str):
        raise ValueError(f'{file}: no field "kind": not a tokenizer written by this project')
    if expected and fields['kind'] not in expected:
        raise ValueError(
            f'{path}: a tokenizer of kind {fields["kind"]!r}, expected {" or ".join(expected)}'
        )
    return fields
