"""From documents to packed batches: grain pipelines with a checkpointable state.

A document of ids t_1..t_T is read as inputs [BOS, t_1, .., t_{T-1}] with targets [t_1, .., t_T]:
every id is predicted exactly once. `lm.data.packing` packs documents end to end into rows of L and
numbers the pieces within a row as segments, which attention never crosses. `lm.data.pairs` packs
pairs of documents.
"""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np

from lm.data.documents import Documents, checked_ids
from lm.data.packing import Document, PackedBatches, Packing, ShuffleBuffer

Encode = Callable[[bytes], np.ndarray]

# Training rows are shuffled in buffers of about this many tokens (17 bytes of memory each), so that
# a long document's rows do not fill consecutive batches.
_BUFFER_TOKENS = 1 << 21
# Batches prefetched on a thread.
_PREFETCH = 2


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
    codebooks: int = 1,
) -> grain.IterDataset:
    """Returns shuffled batches for one process, as a dataset of `lm.data.packing.Batch`.

    A batch holds int32 `tokens`, `targets`, `segments`, `positions` and float32 `weights` (1 at
    each real target, 0 at padding), all [B, L], and for the host `documents`, the index of each
    target's document. With Q codebooks, `tokens` and `targets` are [B, L, Q]. Documents are
    shuffled anew in each epoch, then rows within a shuffle buffer. The shards of an epoch are
    disjoint and together cover every document. The iterator's `get_state()` can be saved as JSON;
    an iterator of an equal pipeline resumes from it exactly.

    Args:
      documents: random-access documents; picklable if `workers` > 0.
      encode: from a document's bytes to its ids; None if documents are arrays of ids.
      batch_size: rows of this process's batches, B.
      length: tokens of a row, L.
      bos: the input-only id that starts a document; all other ids are smaller.
      seed: of the order, in [0, 2**32).
      shard_index: this process's shard of the documents.
      shard_count: number of reading processes.
      num_epochs: passes over the documents; None repeats forever. The last batch is padded.
      workers: number of processes that read and encode; 0 does so on the prefetch thread. The state
        depends on it, the batches do not. `close()` the iterator to end them.
      codebooks: ids per position, Q; documents are then `[T, Q]`.

    Raises:
      ValueError: immediately, for invalid sizes or documents without content; while iterating,
        naming the document, for ids outside of [0, bos).
    """
    check(documents, batch_size, length, bos, shard_index, shard_count)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos, codebooks))
    dataset = source.shuffle(seed)[shard_index::shard_count]
    size = max(1, _BUFFER_TOKENS // (batch_size * length))
    shuffle = ShuffleBuffer(size, len(dataset), seed)
    stream = dataset.repeat(num_epochs).to_iter_dataset(read_options())
    if workers:
        allow_workers()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    packed = PackedBatches(stream, Packing(batch_size, length, bos, shuffle, codebooks))
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
    codebooks: int = 1,
) -> grain.IterDataset:
    """Returns one pass over the documents in order; the last batch is padded, with weight 0.

    Arguments and batches are as for `training_batches`, except for the shards: all processes pack
    the same `shard_count * batch_size` rows and each returns its own `batch_size`, so that all take
    the same number of steps.

    Raises:
      ValueError: as `training_batches`.
    """
    # every process reads all documents: there may be fewer of them than processes
    check(documents, batch_size, length, bos, 0, 1)
    source = grain.MapDataset.source(_Encoded(documents, encode, bos, codebooks))
    stream = source.to_iter_dataset(read_options())
    packed = PackedBatches(stream, Packing(shard_count * batch_size, length, bos, None, codebooks))
    if shard_count == 1:
        return packed
    rows = slice(shard_index * batch_size, (shard_index + 1) * batch_size)
    return packed.map(lambda batch: {name: array[rows] for name, array in batch.items()})


def check(
    documents: Documents, batch_size: int, length: int, bos: int, shard: int, shards: int
) -> None:
    """Raises ValueError for invalid sizes, or documents without content."""
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
    # Stops at the first document with content; endless epochs of empty ones would never return.
    if not any(len(documents[i]) for i in range(len(documents))):
        raise ValueError(f'the {len(documents)} documents are all empty: nothing to train on')


def read_options() -> grain.ReadOptions:
    """Returns the options for reading on the packing thread."""
    # The packing thread reads the documents: a thread pool before it costs more.
    return grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def allow_workers() -> None:
    """Lets grain start processes in a program without absl's command line."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Documents of ids, encoded as they are read."""

    documents: Documents
    encode: Encode | None
    bos: int
    codebooks: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        document = self.documents[index]
        ids = document if self.encode is None else self.encode(document)
        return Document(int(index), checked_ids(index, ids, self.bos, self.codebooks))
