"""Documents of ids in ArrayRecord shards: one file written at a time, read by random access.

    FOLDER/index.json                          what the shards hold
    FOLDER/train-00000-of-00012.array_record   a record per document: its ids, little-endian

An id takes one byte, two or four, as the vocabulary needs (`lm.data.id_dtype`). Records are neither
grouped nor compressed, so that a file follows from its ids alone, and one read gives one document.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lm import atomic
from lm.data import checked_ids, id_dtype

FORMAT = 1
INDEX = 'index.json'
_WRITE = 'group_size:1,uncompressed'
_READ = 'readahead_buffer_size:0,max_parallelism:0'
_READ_BUFFER = 1 << 15
# Files of a split that a process keeps open; systems often allow 1024 in all.
_OPEN_FILES = 256


class Shard(NamedTuple):
    """What one file holds.

    Attributes:
      documents: records.
      tokens: ids of all documents.
      bytes: of the text that they stand for.
      file_bytes: size of the file.
      sha256: of the file, in hex.
    """

    documents: int
    tokens: int
    bytes: int
    file_bytes: int
    sha256: str


class Index(NamedTuple):
    """What a folder of shards holds.

    Attributes:
      vocab_size: all ids are smaller.
      origin: digests of what the shards were made from, by name.
      splits: the shards of each split, in their order.
    """

    vocab_size: int
    origin: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]


def file_name(split: str, index: int, count: int) -> str:
    """Returns the name of shard number `index` of `count`."""
    return f'{split}-{index:05d}-of-{count:05d}.array_record'


def write_shard(
    path: epath.PathLike, documents: Iterable[tuple[np.ndarray, int]], vocab_size: int
) -> Shard:
    """Writes documents (ids, and bytes of their text) into a file that appears when it is whole.

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


@contextlib.contextmanager
def _named(path: epath.PathLike) -> Iterator[None]:
    """Says which file could not be written: ArrayRecord raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'{path}: {atomic.cannot_write(error)}') from error


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
    """Writes JSON with sorted keys into a file that appears when it is whole."""
    with atomic.new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True) + '\n')


def write_index(folder: epath.PathLike, index: Index) -> None:
    """Writes `index.json`, which makes a folder with all its shards one that can be read."""
    splits = {name: [shard._asdict() for shard in found] for name, found in index.splits.items()}
    described = {'format': FORMAT, 'dtype': id_dtype(index.vocab_size).name, **index._asdict()}
    write_json(epath.Path(folder) / INDEX, {**described, 'splits': splits})


def read_index(folder: epath.PathLike) -> Index:
    """Returns what a folder of shards holds.

    Raises:
      FileNotFoundError: `folder` holds no shards, or not yet all of them.
      ValueError: the index is damaged, or of a format that this version does not know.
    """
    file = epath.Path(folder) / INDEX
    if not file.exists():
        raise FileNotFoundError(
            f'{folder}: no shards here ({INDEX} is missing; it is written when all of them are)'
        )
    try:
        described = json.loads(file.read_bytes())
        version = described['format']
        if version != FORMAT:
            raise ValueError(f'format {version!r}; this version reads format {FORMAT}')
        vocab_size, origin = described['vocab_size'], described['origin']
        splits = {
            str(name): tuple(shard_from(fields) for fields in found)
            for name, found in described['splits'].items()
        }
        if not (type(vocab_size) is int and 1 <= vocab_size < 2**31):
            raise ValueError(f'vocab_size {vocab_size!r}; expected 1 to 2**31 - 1')
        if described['dtype'] != id_dtype(vocab_size).name:
            raise ValueError(f'dtype {described["dtype"]!r} for {vocab_size} ids')
        if not all(isinstance(value, str) for value in dict(origin).values()):
            raise ValueError('origin: expected names and digests')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f'{error} is missing' if isinstance(error, KeyError) else error
        raise ValueError(f'{file}: damaged, or not an index of shards: {reason}') from None
    return Index(vocab_size, dict(origin), splits)


def shard_from(fields: Mapping[str, Any]) -> Shard:
    """Returns a shard from its JSON; raises ValueError, KeyError or TypeError for other than that.

    No count can be larger than the file that it counts.
    """
    shard = Shard(**{name: fields[name] for name in Shard._fields})
    counts = shard[:4]
    if not all(type(n) is int and 0 <= n < 2**53 for n in counts) or type(shard.sha256) is not str:
        raise ValueError(f'expected whole numbers and a digest, got {tuple(shard)!r:.200}')
    if max(shard.documents, shard.tokens) > shard.file_bytes:
        raise ValueError(
            f'{shard.documents} documents, {shard.tokens} ids in {shard.file_bytes} bytes'
        )
    return shard


class ShardedDocuments:
    """Documents of one split: vectors of ids, opened on first use in each process."""

    def __init__(self, folder: epath.PathLike, split: str):
        """Reads the index and looks that every file is there; opens none.

        Raises:
          FileNotFoundError: no shards, no such split, or a file is missing; names it.
          ValueError: the index or a file is damaged, or the folder is not on a local disk.
        """
        if '://' in os.fspath(folder):
            raise ValueError(f'{folder}: shards are read from a local folder: copy or mount it')
        index = read_index(folder)
        if split not in index.splits:
            raise FileNotFoundError(f'{folder}: no split {split!r}, only {sorted(index.splits)}')
        self._folder, self._shards = pathlib.Path(folder), index.splits[split]
        count = len(self._shards)
        self._files = [self._folder / file_name(split, i, count) for i in range(count)]
        self._dtype, self._name = id_dtype(index.vocab_size), f'{self._folder}, {split}'
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
            raise ValueError(f'{reader.num_records()} documents, {INDEX} says {count}')
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_readers'}


def _check_file(file: pathlib.Path, shard: Shard) -> None:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(
            f'{file}: this shard is missing; copy it again, or run tokenize again'
        ) from None
    if size != shard.file_bytes:
        raise _damaged(file, f'{size} bytes, {INDEX} says {shard.file_bytes}')


def _damaged(file: pathlib.Path, reason: str) -> ValueError:
    hint = 'copy it again, or remove it and run tokenize again'
    return ValueError(f'{file}: damaged shard: {" ".join(reason.split())}; {hint}')
