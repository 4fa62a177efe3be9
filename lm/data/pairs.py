"""Pairs of documents for preference losses: a chosen and a rejected answer to one prompt.

Row 2i holds chosen answers, row 2i + 1 the rejected ones, and a pair is the same segment of both.
Each side is a document of its own, prompt and answer after BOS; weights are 0 on the prompt and the
pair's weight on the answer. With bos = 9, L = 6, the pairs (prompt [1], chosen [2 3], rejected [4])
and (prompt [5], chosen [6], rejected [7 8]) become

    tokens     9 1 2 9 5 .       targets   1 2 3 5 6 .
               9 1 9 5 7 .                 1 4 5 7 8 .
    segments   1 1 1 2 2 0       weights   0 1 1 0 1 0
               1 1 2 2 2 0                 0 1 0 1 1 0

so that a loss sums log-probabilities by segment and subtracts row 2i + 1 from row 2i. Pairs are
never cut: one that does not fit starts the next two rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from lm.data.batches import Encode, read_options
from lm.data.documents import Documents, checked_ids
from lm.data.packing import DOCUMENTS, Batch


class Pair(NamedTuple):
    """Two answers to one prompt: bytes, or arrays of ids that need no encoding.

    Attributes:
      prompt: the shared prompt; may be empty.
      chosen: the preferred answer.
      rejected: the other one.
      weight: of the pair in the loss.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    weight: float = 1.0


def pair_batches(
    pairs: Documents,
    encode: Encode | None,
    *,
    batch_size: int,
    length: int,
    bos: int,
    seed: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    num_epochs: int | None = 1,
) -> grain.IterDataset:
    """Returns batches of pairs for one process, laid out as above, with `documents` for the host.

    States can be saved as JSON, like those of `lm.data.batches.training_batches`.

    Args:
      pairs: random access to `Pair`s, or to dicts of their fields.
      encode: from bytes to ids, for each part of a pair; None if parts are arrays of ids.
      batch_size: rows, two per pair of rows.
      length: tokens of a row, L.
      bos: the input-only id that starts a document; all other ids are smaller.
      seed: of the order in each epoch; None keeps the order of `pairs`.
      shard_index, shard_count: this process's index, and the number of processes.
      num_epochs: passes over the pairs; None repeats forever. The last batch is padded.

    Raises:
      ValueError: immediately, for invalid sizes; while iterating, naming the pair, for ids out of
        range and for a pair longer than a row.
    """
    if batch_size < 2 or batch_size % 2:
        raise ValueError(f'batch_size must be even, two rows per pair, got {batch_size}')
    if not 0 <= shard_index < shard_count or len(pairs) < shard_count:
        raise ValueError(f'{len(pairs)} pairs, shard {shard_index} of {shard_count}')
    dataset = grain.MapDataset.source(_EncodedPairs(pairs, encode, bos, length))
    dataset = dataset if seed is None else dataset.shuffle(seed)
    dataset = dataset[shard_index::shard_count].repeat(num_epochs)
    return _PairBatches(dataset.to_iter_dataset(read_options()), batch_size, length, bos)


class _Sides(NamedTuple):
    """An encoded pair: its number, the ids of both whole documents, and the prompt's length."""

    number: int
    ids: tuple[np.ndarray, np.ndarray]
    prompt: int
    weight: float


@dataclasses.dataclass(frozen=True)
class _EncodedPairs:
    """Pairs of ids, encoded as they are read."""

    pairs: Documents
    encode: Encode | None
    bos: int
    length: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> _Sides:
        given = self.pairs[index]
        pair = Pair(**given) if isinstance(given, Mapping) else Pair(*given)
        prompt, chosen, rejected = (
            checked_ids(index, x if self.encode is None else self.encode(x), self.bos)
            for x in (pair.prompt, pair.chosen, pair.rejected)
        )
        sides = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
        longest = max(map(len, sides))
        if not len(chosen) or not len(rejected) or longest > self.length:
            raise ValueError(
                f'pair {index}: answers of {len(chosen)} and {len(rejected)} tokens after a prompt '
                f'of {len(prompt)}; expected two answers, and rows of {self.length} to hold them'
            )
        return _Sides(int(index), sides, len(prompt), float(pair.weight))


class _PairBatches(grain.IterDataset):
    """Batches of a dataset of `_Sides`."""

    def __init__(self, parent: grain.IterDataset, batch_size: int, length: int, bos: int):
        super().__init__(parent)
        self._sizes = batch_size, length, bos

    def __iter__(self) -> grain.DatasetIterator:
        return _PairIterator(iter(self._parent), *self._sizes)


class _PairIterator(grain.DatasetIterator):
    """Fills two rows at a time. The state is the parent's before the next pair."""

    def __init__(self, parent: grain.DatasetIterator, batch_size: int, length: int, bos: int):
        super().__init__(parent)
        self._batch_size, self._length, self._bos = batch_size, length, bos
        self._next: _Sides | None = None  # read, but did not fit
        self._point = parent.get_state()

    def get_state(self) -> dict[str, Any]:
        return {'pairs': self._point}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state['pairs'])
        self._next, self._point = None, state['pairs']

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._look_ahead() is None:
            raise StopIteration
        shape = self._batch_size, self._length
        integers = ('tokens', 'targets', 'segments', 'positions')
        batch: Batch = {name: np.zeros(shape, np.int32) for name in integers}
        batch['weights'] = np.zeros(shape, np.float32)
        batch[DOCUMENTS] = np.full(shape, -1, np.int64)
        for row in range(0, self._batch_size, 2):
            self._fill({name: x[row : row + 2] for name, x in batch.items()})
        return batch

    def _look_ahead(self) -> _Sides | None:
        """Returns the next pair, reading it if it has not been read; None after the last."""
        if self._next is None:
            self._point = self._parent.get_state()
            self._next = next(self._parent, None)
        return self._next

    def _fill(self, rows: Batch) -> None:
        """Writes pairs into two rows until the next one does not fit."""
        used, segment = [0, 0], 0
        while (pair := self._look_ahead()) is not None:
            ends = [start + len(ids) for start, ids in zip(used, pair.ids)]
            if max(ends) > self._length:
                return
            segment += 1
            for side, (start, end, ids) in enumerate(zip(used, ends, pair.ids)):
                rows['tokens'][side, start:end] = [self._bos, *ids[:-1]]
                rows['targets'][side, start:end] = ids
                rows['segments'][side, start:end] = segment
                rows['positions'][side, start:end] = np.arange(end - start)
                rows['weights'][side, start + pair.prompt : end] = pair.weight
                rows[DOCUMENTS][side, start:end] = pair.number
            used, self._next = ends, None
