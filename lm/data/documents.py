"""From documents to packed batches: grain pipelines whose state can be saved and restored.

A document of ids t_1..t_T is read as inputs [BOS, t_1, .., t_{T-1}] with targets
[t_1, .., t_T]: every id is predicted exactly once. `lm.data.packing` lays documents end to end into
rows of L and numbers the pieces within a row as segments, which attention never crosses.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Protocol

import grain
import numpy as np
from etils import epath

from lm.data.packing import Document, PackedBatches, Packing, Window
from lm.files import array_files, atomic

Encode = Callable[[bytes], np.ndarray]

# Training rows are shuffled within windows of about this many tokens (17 bytes of memory
# each), so that the rows of a long document do not fill one batch after another.
_WINDOW_TOKENS = 1 << 21
# Batches made ahead on a thread.
_PREFETCH = 2


class Documents(Protocol):
    """Random-access documents: bytes, or arrays of ids if nothing is to be encoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def training_batches(
    documents: Documents,
    encode: Encode | None,
    *,
    batch_size: int,
    length: int,
    bos: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = None,
    workers: int = 0,
) -> grain.IterDataset:
    """Returns shuffled batches for one process, as a dataset of `Batch`.

    A batch holds int32 `tokens`, `targets`, `segments`, `positions` and float32 `weights` (1
    at each real target, 0 at padding), all [B, L], and for the host `documents`, the index of
    the document that each target is from. Documents are shuffled anew in each epoch,
    then rows within windows. The shards of an epoch are disjoint and together hold every
    document. The iterator's `get_state()` can be kept as JSON; an iterator of an equal
    pipeline continues from it exactly.

    Args:
      documents: random-access documents; picklable if `workers` > 0.
      encode: from a document's bytes to its ids; None if documents are arrays of ids.
      batch_size: rows of this process's batches, B.
      length: tokens of a row, L.
      bos: the input-only id that starts a document: all ids of documents are smaller.
      seed: of the order, in [0, 2**32).
      shard_index: which shard of the documents this process reads.
      shard_count: number of processes that read.
      num_epochs: passes over the documents; None for no end. The last batch is padded.
      workers: processes that read and encode; 0 does it on the prefetch thread. The batches
        do not depend on it, but the state does. `close()` the iterator to end them.

    Raises:
      ValueError: here, for sizes that cannot work or documents without any content; while
        iterating, naming the document, for ids that are not in [0, bos).
    """
    _check(documents, batch_size, length, bos, shard_index, shard_count)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos))
    dataset = source.shuffle(seed)[shard_index::shard_count]
    window = Window(max(1, _WINDOW_TOKENS // (batch_size * length)), len(dataset), seed)
    stream = dataset.repeat(num_epochs).to_iter_dataset(_read_options())
    if workers:
        allow_workers()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    packed = PackedBatches(stream, Packing(batch_size, length, bos, window))
    return grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=_PREFETCH)


def evaluation_batches(
    documents: Documents,
    encode: Encode | None,
    *,
    batch_size: int,
    length: int,
    bos: int,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """Returns one pass over the documents in order; the last batch is padded, with weight 0.

    Arguments and batches are as for `training_batches`, except for the shards: all processes
    pack the same `shard_count * batch_size` rows and each returns its own `batch_size`, so
    that all make the same number of steps.

    Raises:
      ValueError: as `training_batches`.
    """
    # every process reads all documents: there may be fewer of them than processes
    _check(documents, batch_size, length, bos, 0, 1)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos))
    stream = source.to_iter_dataset(_read_options())
    packed = PackedBatches(stream, Packing(shard_count * batch_size, length, bos, None))
    if shard_count == 1:
        return packed
    rows = slice(shard_index * batch_size, (shard_index + 1) * batch_size)
    return packed.map(lambda batch: {name: array[rows] for name, array in batch.items()})


def _check(
    documents: Documents, batch_size: int, length: int, bos: int, shard: int, shards: int
) -> None:
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, got {batch_size}')
    if length < 2:
        raise ValueError(f'length must be at least 2 tokens, got {length}')
    if not 1 <= bos < 2**31:
        raise ValueError(f'bos must be the size of the vocabulary, got {bos}')
    if not 0 <= shard < shards:
        raise ValueError(f'shard_index must lie in [0, {shards}), got {shard}')
    if len(documents) < shards:
        raise ValueError(
            f'{len(documents)} documents cannot be divided among {shards} processes; '
            'give more documents or use fewer processes'
        )
    # Stops at the first document with content; an endless epoch of nothing would never return.
    if not any(len(documents[i]) for i in range(len(documents))):
        raise ValueError(f'the {len(documents)} documents hold no content: nothing to train on')


def _read_options() -> grain.ReadOptions:
    # Documents are read by the thread that packs: a pool of threads before it costs more.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def allow_workers() -> None:
    """Lets grain start processes in a program that does not use absl's command line."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """The random-access source of documents of ids under a pipeline."""

    documents: Documents
    encode: Encode | None
    bos: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        document = self.documents[index]
        ids = document if self.encode is None else self.encode(document)
        return Document(int(index), checked_ids(index, ids, self.bos))


class EncodedDocuments:
    """Documents encoded once: vectors of ids, memory-mapped from a local folder.

    The folder holds `ids.npy` (all ids end to end, in the smallest of uint8, uint16 and int32
    that the vocabulary needs) and `offsets.npy` (int64, where each document starts, and the
    end). The files are opened on first use, in each process.
    """

    def __init__(self, folder: epath.PathLike):
        """Names the folder; raises FileNotFoundError if `write` never finished it."""
        _check_local(folder)
        self._folder = pathlib.Path(folder)
        for name in ('ids.npy', 'offsets.npy'):
            if not (self._folder / name).exists():
                raise FileNotFoundError(f'{folder}: no encoded documents here ({name} is missing)')

    @classmethod
    def write(
        cls, folder: epath.PathLike, documents: Iterable[np.ndarray], vocab_size: int
    ) -> 'EncodedDocuments':
        """Writes vectors of ids, one at a time, into a folder that appears when all are there.

        Raises:
          FileExistsError: the folder exists.
          ValueError: a document is not a vector of integers in [0, vocab_size); names it.
        """
        _check_local(folder)
        folder = pathlib.Path(folder)
        if folder.exists():
            raise FileExistsError(f'{folder}: exists; remove it to encode the documents again')
        with atomic.new_folder(folder) as partial:
            sizes = [0]
            with (partial / 'ids.npy').open('wb') as file:
                dtype = id_dtype(vocab_size)
                _write_header(file, 0, dtype)
                for index, document in enumerate(documents):
                    ids = checked_ids(index, document, vocab_size)
                    file.write(ids.astype(dtype).tobytes())
                    sizes.append(len(ids))
                file.seek(0)
                _write_header(file, sum(sizes), dtype)
            np.save(partial / 'offsets.npy', np.cumsum(sizes, dtype=np.int64))
        return cls(folder)

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.array(array_files.memory_mapped(self._folder / 'offsets.npy'))
        ids = array_files.memory_mapped(self._folder / 'ids.npy')
        again = f'{self._folder}: damaged encoded documents: {{}}; remove the folder, encode again'
        if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets) or ids.ndim != 1:
            raise ValueError(again.format(f'{offsets.dtype}{offsets.shape}, {ids.shape}'))
        if ids.dtype not in (np.uint8, np.uint16, np.int32):
            raise ValueError(again.format(f'ids.npy holds {ids.dtype}'))
        if offsets[0] or np.any(offsets[1:] < offsets[:-1]):
            raise ValueError(again.format('offsets.npy does not rise from 0'))
        if len(ids) != offsets[-1]:
            raise ValueError(
                again.format(f'offsets.npy ends at {offsets[-1]}, ids.npy has {len(ids)}')
            )
        return ids, offsets

    def __getstate__(self) -> dict[str, Any]:
        return {'_folder': self._folder}

    def __len__(self) -> int:
        return len(self._arrays[1]) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the ids of a document, `[T]`, read-only."""
        ids, offsets = self._arrays
        if not -len(self) <= index < len(self):
            raise IndexError(f'document {index} of {len(self)}')
        index %= len(self)
        return np.asarray(ids[offsets[index] : offsets[index + 1]])

    @property
    def tokens(self) -> int:
        """Number of ids in all documents."""
        return int(self._arrays[1][-1])


def _check_local(folder: epath.PathLike) -> None:
    if '://' in str(folder):
        raise ValueError(f'{folder}: encoded documents are memory-mapped: give a local folder')


def _write_header(file: BinaryIO, count: int, dtype: np.dtype) -> None:
    # numpy leaves room for the length to grow, so that a header can be written over.
    header = {'descr': dtype.str, 'fortran_order': False, 'shape': (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def id_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint8, uint16 and int32, little-endian, that holds every id."""
    return np.dtype('u1' if vocab_size <= 1 << 8 else '<u2' if vocab_size <= 1 << 16 else '<i4')


def checked_ids(index: int, document: Any, vocab_size: int) -> np.ndarray:
    """Returns a document's ids; raises ValueError, naming it, unless all are in [0, vocab_size)."""
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in 'iu'):
        raise ValueError(
            f'document {index}: expected a vector of integer ids, got {ids.dtype} of shape '
            f'{ids.shape}'
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(
            f'document {index}: ids must lie in [0, {vocab_size}), found {ids.min()} to '
            f'{ids.max()}; was it encoded with another tokenizer?'
        )
    return ids
