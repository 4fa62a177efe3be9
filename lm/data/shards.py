"""Documents of ids in ArrayRecord shards: written file by file, read by random access.

    FOLDER/index.json                          the contents of all shards
    FOLDER/train-00000-of-00012.array_record   a record per document: its ids, little-endian

An id takes one, two or four bytes, depending on the vocabulary (`lm.data.documents.id_dtype`).
Records are neither grouped nor compressed, so that a file depends only on its ids, and one read
returns one document.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lm.data import shard_index
from lm.data.documents import checked_ids, id_dtype
from lm.data.shard_index import Shard
from lm.files import atomic

_WRITE = 'group_size:1,uncompressed'
_READ = 'readahead_buffer_size:0,max_parallelism:0'
_READ_BUFFER = 1 << 15
# Files per split that a process keeps open; systems often allow 1024 in total.
_OPEN_FILES = 256


def write_shard(
    path: epath.PathLike, documents: Iterable[tuple[np.ndarray, int]], vocab_size: int
) -> Shard:
    """Writes documents (ids, and bytes of their text); the file appears only once it is complete.

    Raises:
      ValueError: a document is not a vector of integers in [0, vocab_size); names it.
      OSError: the file could not be written; says why.
    """
    dtype = id_dtype(vocab_size)
    count = tokens = size = 0
    with atomic.new_file(path) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), _WRITE)
        for ids, text_bytes in documents:
            record = checked_ids(count, ids, vocab_size).astype(dtype).tobytes()
            with _named(path):
                writer.write(record)
            count, tokens, size = count + 1, tokens + len(ids), size + text_bytes
        with _named(path):
            writer.close()
        with partial.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        return Shard(count, tokens, size, partial.stat().st_size, digest)


class ShardedDocuments:
    """Documents of one split: vectors of ids, opened on first use in each process."""

    def __init__(self, folder: epath.PathLike, split: str):
        """Reads the index and checks that every file exists; opens none.

        Raises:
          FileNotFoundError: no shards, no such split, or a file is missing; names it.
          ValueError: the index or a file is damaged, or the folder is not on a local disk.
        """
        if '://' in os.fspath(folder):
            raise ValueError(f'{folder}: shards are read from a local folder: copy or mount it')
        index = shard_index.read_index(folder)
        if split not in index.splits:
            raise FileNotFoundError(f'{folder}: no split {split!r}, only {sorted(index.splits)}')
        self._shards, self._dtype = index.splits[split], id_dtype(index.vocab_size)
        count = len(self._shards)
        names = [shard_index.file_name(split, i, count) for i in range(count)]
        self._files = [pathlib.Path(folder) / name for name in names]
        self._ends = np.cumsum([shard.documents for shard in self._shards], dtype=np.int64)
        for file, shard in zip(self._files, self._shards):
            _check_file(file, shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the ids of a document, `[T]`, read-only.

        Raises:
          ValueError: its file is damaged; names it.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        index %= len(self)
        shard = int(np.searchsorted(self._ends, index, side='right'))
        place = index - int(self._ends[shard - 1] if shard else 0)
        try:
            (record,) = self._readers(shard).read([place])
            return np.frombuffer(record, self._dtype)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self._files[shard], f'document {place}: {error}') from None

    @property
    def tokens(self) -> int:
        """Number of ids in all documents."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of the text of all documents."""
        return sum(shard.bytes for shard in self._shards)

    @functools.cached_property
    def _readers(self) -> Any:
        return functools.lru_cache(_OPEN_FILES)(self._open)

    def _open(self, shard: int) -> Any:
        reader = array_record_module.ArrayRecordReader(
            str(self._files[shard]), options=_READ, file_reader_buffer_size=_READ_BUFFER
        )
        count = self._shards[shard].documents
        if not reader.ok() or reader.num_records() != count:
            raise ValueError(f'{reader.num_records()} documents, {shard_index.INDEX} says {count}')
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_readers'}


@contextlib.contextmanager
def _named(path: epath.PathLike) -> Iterator[None]:
    """Names the file that could not be written: ArrayRecord raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'{path}: {atomic.cannot_write(error)}') from error


def _check_file(file: pathlib.Path, shard: Shard) -> None:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{file}: this shard is missing; copy it again, or run tokenize again'
        ) from None
    if size != shard.file_bytes:
        raise _damaged(file, f'{size} bytes, {shard_index.INDEX} says {shard.file_bytes}')


def _damaged(file: pathlib.Path, reason: str) -> ValueError:
    hint = 'copy it again, or remove it and run tokenize again'
    return ValueError(f'{file}: damaged shard: {" ".join(reason.split())}; {hint}')
