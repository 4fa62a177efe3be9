"""What every tokenizer is: bytes to ids and back, exactly."""

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
          ValueError: the id is out of range, or does not stand for fixed bytes by itself.
        """
        ...

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer into the folder `path`, so that `load(path)` gives it back."""
        ...


class OneByOne:
    """Batches as loops: for tokenizers whose documents gain nothing from each other's company."""

    def encode_batch(self: Any, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Returns `encode` of each document."""
        return [self.encode(document) for document in documents]

    def decode_batch(self: Any, documents: Sequence[np.ndarray]) -> list[bytes]:
        """Returns `decode` of each document's ids."""
        return [self.decode(ids) for ids in documents]


def check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns `ids` as an int64 vector; raises ValueError, naming the first id out of range."""
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
    """Makes the folder `path`, writes the file that names its tokenizer, returns the folder."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _FILE).write_text(json.dumps({'kind': kind, **fields}, indent=2) + '\n')
    return folder


def read_kind(path: epath.PathLike) -> dict:
    """Returns what `write_kind` wrote.

    Raises:
      FileNotFoundError: `path` holds no tokenizer.
      ValueError: the file there is not one of ours.
    """
    file = epath.Path(path) / _FILE
    if not file.is_file():
        raise FileNotFoundError(f'{path}: no tokenizer here ({_FILE} is missing)')
    fields = json_fields.read(file)
    if not isinstance(fields.get('kind'), str):
        raise ValueError(f'{file}: no field "kind": not a tokenizer written by this project')
    return fields


def load(path: epath.PathLike) -> Tokenizer:
    """Returns the tokenizer saved in the folder `path`; never executes code from there."""
    from tokenization.coding import arithmetic_tokenizer
    from tokenization.equal_info import codec as equal_info
    from tokenization.huggingface import tokenizer as huggingface
    from tokenization.vocabularies import alphabet as characters
    from tokenization.vocabularies import bpe, byte, string_table

    kind = read_kind(path)['kind']
    match kind:
        case 'byte':
            return byte.ByteTokenizer.load(path)
        case 'bpe':
            return bpe.BPETokenizer.load(path)
        case 'characters':
            return characters.CharacterTokenizer.load(path)
        case 'equal_info':
            return equal_info.EqualInfoTokenizer.load(path)
        case 'arithmetic':
            return arithmetic_tokenizer.ArithmeticTokenizer.load(path)
        case 'huggingface':
            return huggingface.HuggingFaceTokenizer.load(path)
        case 'string_table':
            return string_table.StringTable.load(path)
    raise ValueError(
        f'{path}: unknown tokenizer kind {kind!r}; this version knows byte, bpe, characters, '
        'equal_info, arithmetic, huggingface and string_table'
    )
