"""Packing: documents laid end to end, cut into full rows, the rows shuffled within windows.

Documents are laid end to end and cut into rows of L, so rows are full; a document cut at the
end of a row goes on in another row, where its first input is the id before, not BOS. With
bos = 9, L = 4, the documents [1 2 3] and [4 5] become

    tokens     9 1 2 9    4 . . .        segments   1 1 1 2    1 0 0 0
    targets    1 2 3 4    5 . . .        positions  0 1 2 0    0 0 0 0

Segments number the pieces within a row; 0 is padding. `documents` says of each target which
document of the corpus it is from, and -1 at padding; it stays on the host.
"""

from typing import Any, NamedTuple

import grain
import numpy as np

Batch = dict[str, np.ndarray]

# The entry of a batch that no device gets: int64 [B, L], for people who look for a document.
DOCUMENTS = 'documents'
# Target of a padding position inside the packer; batches show 0 there, with weight 0.
_PADDING = -1


class Shared(NamedTuple):
    """An array of a batch that has no rows: all processes give the same, and none a part of it."""

    array: np.ndarray


class Document(NamedTuple):
    """The ids of a document, and its number: its index in the corpus."""

    number: int
    ids: np.ndarray


class Window(NamedTuple):
    """Rows are shuffled among this many batches, fewer once this many documents were read."""

    batches: int
    documents: int
    seed: int


class Packing(NamedTuple):
    """How documents become batches; no window keeps the rows in order."""

    batch_size: int
    length: int
    bos: int
    window: Window | None


class PackedBatches(grain.IterDataset):
    """Batches of a dataset of `Document`s.

    grain's own `ConcatThenSplitIterDataset` is not used: its state tells tuples from lists,
    so it does not survive JSON, in which grain itself saves states.
    """

    def __init__(self, parent: grain.IterDataset, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackedIterator(iter(self._parent), self._packing)


class _PackedIterator(grain.DatasetIterator):
    """Packs a window of batches at a time.

    No token is part of the state: it names the point in the documents at which the window
    begins, and the batches taken from it. A restored iterator packs that window again.
    """

    def __init__(self, parent: grain.DatasetIterator, packing: Packing):
        super().__init__(parent)
        self._packing = packing
        self._forget()
        self._begin_window(number=0)

    def _forget(self) -> None:
        self._document = np.zeros(0, np.int32)  # the document being packed,
        self._number = -1  # its number,
        self._offset = 0  # how many of its ids are packed,
        self._before: Any = None  # and the parent's state before it was read.

    def _begin_window(self, number: int) -> None:
        inside = self._offset < len(self._document)
        self._point = {
            'documents': self._before if inside else self._parent.get_state(),
            'offset': self._offset if inside else 0,
            'window': number,
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
        self._begin_window(state['window'])
        self._taken = state['batch']

    def __next__(self) -> Batch:
        self._assert_not_closed()
        size = self._packing.batch_size
        if self._rows is None:
            self._rows = self._pack_window()
        if self._taken * size == len(self._rows.order):
            self._begin_window(self._point['window'] + 1)
            self._rows = self._pack_window()
            if not len(self._rows.order):
                raise StopIteration
        self._taken += 1
        return _finish(self._rows, self._rows.order[(self._taken - 1) * size :][:size])

    def _pack_window(self) -> '_Rows':
        window = self._packing.window
        most, documents = (1, 0) if window is None else (window.batches, window.documents)
        batches: list[tuple[np.ndarray, ...]] = []
        read = 0
        while len(batches) < most and (not batches or read < documents):
            batch, more = self._pack_batch()
            if batch is None:
                break
            batches.append(batch)
            read += more
        length = self._packing.length
        empty = [np.zeros((0, length), dtype) for dtype in (np.int32, np.int32, bool, np.int64)]
        tokens, targets, starts, numbers = (np.concatenate(x) for x in zip(empty, *batches))
        order = np.arange(len(tokens))
        if window is not None:
            np.random.default_rng((window.seed, self._point['window'])).shuffle(order)
        return _Rows(tokens, targets, starts, numbers, order)

    def _pack_batch(self) -> tuple[tuple[np.ndarray, ...] | None, int]:
        """Returns the arrays of the next rows, as in `_Rows`, and how many documents begin."""
        size, length, bos, _ = self._packing
        tokens = np.zeros(size * length, np.int32)
        targets = np.full(size * length, _PADDING, np.int32)
        starts = np.zeros(size * length, bool)
        starts[::length] = True
        documents = np.full(size * length, -1, np.int64)
        filled = read = 0
        while filled < size * length:
            if self._offset == len(self._document):
                if not self._next_document():
                    break
                read += 1
                continue
            first = self._offset
            stop = self._offset = min(len(self._document), first + size * length - filled)
            end = filled + stop - first
            targets[filled:end] = self._document[first:stop]
            tokens[filled] = self._document[first - 1] if first else bos
            tokens[filled + 1 : end] = self._document[first : stop - 1]
            starts[filled] = True
            documents[filled:end] = self._number
            filled = end
        if not filled:
            return None, read
        return tuple(a.reshape(size, length) for a in (tokens, targets, starts, documents)), read

    def _next_document(self) -> bool:
        self._before = self._parent.get_state()
        try:
            (self._number, self._document), self._offset = next(self._parent), 0
        except StopIteration:
            self._forget()
            return False
        return True


class _Rows(NamedTuple):
    """Packed rows of a window, and the order to return them in."""

    tokens_RL: np.ndarray
    targets_RL: np.ndarray
    starts_RL: np.ndarray
    documents_RL: np.ndarray
    order: np.ndarray


def _finish(rows: _Rows, order: np.ndarray) -> Batch:
    """Returns the batch of the given rows."""
    starts_BL, targets_BL = rows.starts_RL[order], rows.targets_RL[order]
    real_BL = targets_BL != _PADDING
    columns_L = np.arange(starts_BL.shape[1], dtype=np.int32)
    begins_BL = np.maximum.accumulate(np.where(starts_BL, columns_L, 0), axis=1)
    return {
        'tokens': rows.tokens_RL[order],
        'targets': targets_BL * real_BL,
        'segments': np.cumsum(starts_BL, axis=1, dtype=np.int32) * real_BL,
        'positions': (columns_L - begins_BL) * real_BL,
        'weights': real_BL.astype(np.float32),
        DOCUMENTS: rows.documents_RL[order],
    }
