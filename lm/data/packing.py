"""Packing: documents laid end to end, cut into full rows, the rows shuffled in a buffer.

Documents are laid end to end and cut into rows of L, so rows are full; a document cut at the end of
a row continues in another row, where its first input is the preceding id, not BOS. With bos = 9, L
= 4, the documents [1 2 3] and [4 5] become

    tokens     9 1 2 9    4 . . .        segments   1 1 1 2    1 0 0 0
    targets    1 2 3 4    5 . . .        positions  0 1 2 0    0 0 0 0

Segments number the pieces within a row; 0 is padding. `documents` gives for each target the index
of its document in the corpus, and -1 at padding; it stays on the host. Documents of Q codebooks are
`[T, Q]`: their tokens and targets are `[B, L, Q]`, with BOS in every codebook at the start.
"""

from typing import Any, NamedTuple

import grain
import numpy as np

Batch = dict[str, np.ndarray]

# The entry of a batch that stays on the host: int64 [B, L], for finding a document.
DOCUMENTS = 'documents'
# Target of a padding position inside the packer; batches show 0 there, with weight 0.
_PADDING = -1


class Shared(NamedTuple):
    """An array of a batch without rows: every process passes the same whole array."""

    array: np.ndarray


class Document(NamedTuple):
    """The ids of a document, and its index in the corpus."""

    number: int
    ids: np.ndarray


class ShuffleBuffer(NamedTuple):
    """Rows are shuffled among this many batches, or fewer once this many documents are read."""

    batches: int
    documents: int
    seed: int


class Packing(NamedTuple):
    """How documents become batches; without a buffer, rows keep the order of the documents."""

    batch_size: int
    length: int
    bos: int
    shuffle: ShuffleBuffer | None
    codebooks: int = 1


class PackedBatches(grain.IterDataset):
    """Batches of a dataset of `Document`s.

    grain's own `ConcatThenSplitIterDataset` is not used: its state distinguishes tuples from lists,
    so it does not survive JSON, in which grain saves states.
    """

    def __init__(self, parent: grain.IterDataset, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self._packing)


class _PackedIterator(grain.DatasetIterator):
    """Packs a buffer of batches at a time.

    The state has no tokens: it records the position in the documents at which the buffer begins,
    and the number of batches taken from it. A restored iterator packs that buffer again.
    """

    def __init__(self, parent: grain.DatasetIterator, packing: Packing):
        super().__init__(parent)
        self._packing = packing
        self._forget()
        self._begin_buffer(number=0)

    def _forget(self) -> None:
        self._document = np.zeros(0, np.int32)  # the document being packed,
        self._number = -1  # its number,
        self._offset = 0  # how many of its ids are packed,
        self._before: Any = None  # and the parent's state before it was read.

    def _begin_buffer(self, number: int) -> None:
        inside = self._offset < len(self._document)
        self._point = {
            'documents': self._before if inside else self._parent.get_state(),
            'offset': self._offset if inside else 0,
            'window': number,  # of the buffer; states on disk have this name
        }
        self._rows: _Rows | None = None
        self._taken = 0

    def get_state(self) -> dict[str, Any]:
        return {**self._point, 'batch': self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._forget()
        self._parent.set_state(state['documents'])
        if state['offset']:
            self._next_document()
            self._offset = state['offset']
        self._begin_buffer(state['window'])
        self._taken = state['batch']

    def __next__(self) -> Batch:
        self._assert_not_closed()
        size = self._packing.batch_size
        if self._rows is None:
            self._rows = self._pack_buffer()
        if self._taken * size == len(self._rows.order):
            self._begin_buffer(self._point['window'] + 1)
            self._rows = self._pack_buffer()
            if not len(self._rows.order):
                raise StopIteration
        self._taken += 1
        return _finish(self._rows, self._rows.order[(self._taken - 1) * size :][:size])

    def _pack_buffer(self) -> '_Rows':
        shuffle = self._packing.shuffle
        most, documents = (1, 0) if shuffle is None else (shuffle.batches, shuffle.documents)
        batches: list[tuple[np.ndarray, ...]] = []
        read = 0
        while len(batches) < most and (not batches or read < documents):
            batch, more = self._pack_batch()
            if batch is None:
                break
            batches.append(batch)
            read += more
        empty = tuple(x[:0] for x in self._empty_batch())
        tokens, targets, starts, numbers = (np.concatenate(x) for x in zip(empty, *batches))
        order = np.arange(len(tokens))
        if shuffle is not None:
            np.random.default_rng((shuffle.seed, self._point['window'])).shuffle(order)
        return _Rows(tokens, targets, starts, numbers, order)

    def _pack_batch(self) -> tuple[tuple[np.ndarray, ...] | None, int]:
        """Returns the arrays of the next rows, as in `_Rows`, and how many documents begin."""
        batch = self._empty_batch()
        size, bos = self._packing.batch_size * self._packing.length, self._packing.bos
        # views: rows laid end to end
        tokens, targets, starts, documents = (x.reshape(size, *x.shape[2:]) for x in batch)
        filled = read = 0
        while filled < size:
            if self._offset == len(self._document):
                if not self._next_document():
                    break
                read += 1
                continue
            first = self._offset
            stop = self._offset = min(len(self._document), first + size - filled)
            end = filled + stop - first
            targets[filled:end] = self._document[first:stop]
            tokens[filled] = self._document[first - 1] if first else bos
            tokens[filled + 1 : end] = self._document[first : stop - 1]
            starts[filled] = True
            documents[filled:end] = self._number
            filled = end
        if not filled:
            return None, read
        return batch, read

    def _empty_batch(self) -> tuple[np.ndarray, ...]:
        """Returns rows of padding: tokens, targets, starts and documents, as in `_Rows`."""
        size, length, _, _, codebooks = self._packing
        shape = (size, length) if codebooks == 1 else (size, length, codebooks)
        starts = np.zeros((size, length), bool)
        starts[:, 0] = True
        documents = np.full((size, length), -1, np.int64)
        return np.zeros(shape, np.int32), np.full(shape, _PADDING, np.int32), starts, documents

    def _next_document(self) -> bool:
        self._before = self._parent.get_state()
        try:
            (self._number, self._document), self._offset = next(self._parent), 0
        except StopIteration:
            self._forget()
            return False
        return True


class _Rows(NamedTuple):
    """Packed rows of a buffer, and the order to return them in."""

    tokens_RL: np.ndarray
    targets_RL: np.ndarray
    starts_RL: np.ndarray
    documents_RL: np.ndarray
    order: np.ndarray


def _finish(rows: _Rows, order: np.ndarray) -> Batch:
    """Returns the batch of the given rows."""
    starts_BL, targets_BL = rows.starts_RL[order], rows.targets_RL[order]
    # of several codebooks, padding is padding in all
    real_BL = (targets_BL if targets_BL.ndim == 2 else targets_BL[..., 0]) != _PADDING
    columns_L = np.arange(starts_BL.shape[1], dtype=np.int32)
    begins_BL = np.maximum.accumulate(np.where(starts_BL, columns_L, 0), axis=1)
    return {
        'tokens': rows.tokens_RL[order],
        'targets': np.maximum(targets_BL, 0),
        'segments': np.cumsum(starts_BL, axis=1, dtype=np.int32) * real_BL,
        'positions': (columns_L - begins_BL) * real_BL,
        'weights': real_BL.astype(np.float32),
        DOCUMENTS: rows.documents_RL[order],
    }
