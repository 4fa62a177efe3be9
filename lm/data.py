"""From documents to packed batches: grain pipelines whose state can be saved and restored.

A document of ids t_1..t_T is read as inputs [BOS, t_1, .., t_{T-1}] with targets
[t_1, .., t_T]: every id is predicted exactly once. Documents are laid end to end and cut into
rows of L, so rows are full; a document cut at the end of a row goes on in another one, where
its first input is the id before, not BOS. With bos = 9, L = 4, documents [1 2 3] and [4 5]:

    tokens     9 1 2 9    4 . . .        segments   1 1 1 2    1 0 0 0
    targets    1 2 3 4    5 . . .        positions  0 1 2 0    0 0 0 0

Segments number the pieces within a row, and attention never crosses them; 0 is padding.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

Batch = dict[str, np.ndarray]
Encode = Callable[[bytes], np.ndarray]

# Training rows are shuffled within windows of about this many tokens (9 bytes of memory
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
    at each real target, 0 at padding), all [B, L]. Documents are shuffled anew in each epoch,
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
        do not depend on it.

    Raises:
      ValueError: here, for sizes that cannot work or documents without any content; while
        iterating, naming the document, for ids that are not in [0, bos).
    """
    _check(documents, batch_size, length, bos, shard_index, shard_count)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos))
    dataset = source.shuffle(seed)[shard_index::shard_count]
    window = _Window(max(1, _WINDOW_TOKENS // (batch_size * length)), len(dataset), seed)
    # The packing thread reads ahead by whole batches; a thread pool before it costs more.
    stream = dataset.repeat(num_epochs).to_iter_dataset(_read_options())
    if workers:
        _allow_workers()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    packed = _PackedBatches(stream, _Packing(batch_size, length, bos, window))
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
    _check(documents, batch_size, length, bos, shard_index, shard_count)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos))
    stream = source.to_iter_dataset(_read_options())
    packed = _PackedBatches(stream, _Packing(shard_count * batch_size, length, bos, None))
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
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _allow_workers() -> None:
    """Lets grain start processes in a program that does not use absl's command line."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """The random-access source of ids under a pipeline."""

    documents: Documents
    encode: Encode | None
    bos: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        document = self.documents[index]
        ids = np.asarray(document if self.encode is None else self.encode(document))
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in 'iu'):
            raise ValueError(
                f'document {index}: expected a vector of integer ids, got {ids.dtype} of shape '
                f'{ids.shape}'
            )
        if ids.size and not (0 <= ids.min() and ids.max() < self.bos):
            raise ValueError(
                f'document {index}: ids must lie in [0, {self.bos}), found {ids.min()} to '
                f'{ids.max()}; was it encoded with another tokenizer?'
            )
        return ids


class _Window(NamedTuple):
    """Rows are shuffled among this many batches, fewer once this many documents were read."""

    batches: int
    documents: int
    seed: int


class _Packing(NamedTuple):
    """How documents become batches; no window keeps the rows in order."""

    batch_size: int
    length: int
    bos: int
    window: _Window | None


class _PackedBatches(grain.IterDataset):
    """Batches of a dataset of id vectors.

    grain's own `ConcatThenSplitIterDataset` is not used: its state tells tuples from lists,
    so it does not survive JSON, in which grain itself saves states.
    """

    def __init__(self, parent: grain.IterDataset, packing: _Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self._packing)


class _PackedIterator(grain.DatasetIterator):
    """Packs one window of batches at a time.

    No token is part of the state: it names the point in the documents where the window
    starts, and the batches already taken from it. Restoring packs the window again.
    """

    def __init__(self, parent: grain.DatasetIterator, packing: _Packing):
        super().__init__(parent)
        self._packing = packing
        self._document = np.zeros(0, np.int32)  # the document being packed,
        self._before = parent.get_state()  # the parent's state before it was read,
        self._offset = 0  # and how many of its ids are packed
        self._start_window(number=0)

    def _start_window(self, number: int) -> None:
        done = self._offset == len(self._document)
        self._start = {
            'documents': self._parent.get_state() if done else self._before,
            'offset': 0 if done else self._offset,
            'window': number,
        }
        self._batches: list[Batch] | Iterator[Any] = []
        self._packed: tuple[np.ndarray, ...] | None = None
        self._taken = 0

    def get_state(self) -> dict[str, Any]:
        return {**self._start, 'batch': self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state['documents'])
        self._document, self._offset = np.zeros(0, np.int32), 0
