"""The merge loop of byte-pair encoding, started from tokens, with incremental pair counts.

Source: Sennrich et al., 2016, arXiv:1508.07909. A merge takes time proportional to the occurrences
of its pair, not to the length of the text.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tokenization.vocabularies.boundaries import MayMerge

Unit = tuple[int, ...]  # the source ids that were merged, in order
Pair = tuple[int, int]  # indices into PairMerger.units
_NONE = -1  # no neighbour; or a node that was merged into the one before it


class PairMerger:
    """Documents as linked lists of units, with a count of each allowed pair of neighbours.

    Overlapping occurrences all count: `a a a` has the pair `a a` at two positions, of which a merge
    takes the left one.

    >>> merger = PairMerger([np.array([0, 1, 0, 1, 1])], [b'a', b'b'], lambda left, right: True)
    >>> merger.merge(merger.best())
    (0, 1)
    >>> [merger.units[i] for i in merger.documents()[0]]
    [(0, 1), (0, 1), (1,)]

    Attributes:
      units: every unit seen so far, as a tuple of source ids.
      counts: weighted occurrences, positive, of each allowed pair of indices into `units`.
      length: weighted number of units in all documents.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        tokens: Sequence[bytes],
        allowed: MayMerge,
        max_pieces: int | None = None,
        weights: Sequence[int] | None = None,
    ):
        """Counts the pairs; see `dynamic.merge`. `weights`: how often each document counts."""
        self.units: list[Unit] = []
        self.counts: Counter[Pair] = Counter()
        self._tokens, self._allowed, self._max_pieces = tokens, allowed, max_pieces
        self._bytes: list[bytes] = []
        self._index: dict[Unit, int] = {}
        self._is_allowed: dict[Pair, bool] = {}
        self._nodes: defaultdict[Pair, list[int]] = defaultdict(list)
        self._unit: list[int] = []  # of each node
        self._bounds: list[int] = [0]  # of the documents
        self._before: list[int] = []
        self._after: list[int] = []
        self._weight: list[int] = []
        for row, document in enumerate(documents):
            self._read(document.tolist(), 1 if weights is None else int(weights[row]))
        self.length = sum(self._weight)
        for node in range(len(self._unit)):
            self._change(node, self._after[node], 1)
        self._heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self._heap)

    def best(self) -> Pair | None:
        """Returns the most frequent allowed pair, or None if there is none.

        Among equally frequent pairs the first in order of their bytes is taken, so the result does
        not depend on the order of the documents.
        """
        while self._heap:
            count, *_, pair = self._heap[0]
            now = self.counts.get(pair, 0)
            if now == -count:
                return pair
            # Entries go stale: counts fall while they wait in the heap.
            heapq.heappop(self._heap)
            if now:
                heapq.heappush(self._heap, self._entry(pair))
        return None

    def merge(self, pair: Pair) -> Unit:
        """Merges the pair everywhere, from left to right, and returns the new unit."""
        left, right = pair
        new = self._unit_of(self.units[left] + self.units[right])
        grown: set[Pair] = set()
        for node in sorted(set(self._nodes[pair])):
            other = self._after[node]
            if self._unit[node] != left or other == _NONE or self._unit[other] != right:
                continue  # stale, or the right half of a pair just merged: a a a
            before, after = self._before[node], self._after[other]
            for start, end in ((before, node), (node, other), (other, after)):
                self._change(start, end, -1)
            self._unit[node], self._unit[other] = new, _NONE
            self._after[node] = after
            if after != _NONE:
                self._before[after] = node
            self.length -= self._weight[node]
            for start, end in ((before, node), (node, after)):
                if self._change(start, end, 1):
                    grown.add((self._unit[start], self._unit[end]))
        del self._nodes[pair]
        for other_pair in grown & self.counts.keys():
            heapq.heappush(self._heap, self._entry(other_pair))
        return self.units[new]

    def documents(self) -> list[np.ndarray]:
        """Returns the documents as indices into `units`, int32 `[T]` each."""
        unit = np.asarray(self._unit, np.int32)
        parts = [unit[start:end] for start, end in itertools.pairwise(self._bounds)]
        return [part[part != _NONE] for part in parts]

    def _read(self, document: list[int], weight: int) -> None:
        start, size = self._bounds[-1], len(document)
        self._bounds.append(start + size)
        self._unit += [self._unit_of((token,)) for token in document]
        self._before += [_NONE, *range(start, start + size - 1)][:size]
        self._after += [*range(start + 1, start + size), _NONE][:size]
        self._weight += [weight] * size

    def _unit_of(self, pieces: Unit) -> int:
        index = self._index.get(pieces)
        if index is None:
            index = self._index[pieces] = len(self.units)
            self.units.append(pieces)
            self._bytes.append(b''.join([self._tokens[piece] for piece in pieces]))
        return index

    def _change(self, start: int, end: int, sign: int) -> bool:
        """Adds `sign` to the count of neighbouring nodes; returns whether they may be merged."""
        if start == _NONE or end == _NONE:
            return False
        pair = self._unit[start], self._unit[end]
        allowed = self._is_allowed.get(pair)
        if allowed is None:
            allowed = self._is_allowed[pair] = self._decide(*pair)
        if not allowed:
            return False
        count = self.counts[pair] = self.counts.get(pair, 0) + sign * self._weight[start]
        if sign > 0:
            self._nodes[pair].append(start)
        elif not count:
            del self.counts[pair]
        return True

    def _decide(self, left: int, right: int) -> bool:
        pieces = len(self.units[left]) + len(self.units[right])
        if self._max_pieces is not None and pieces > self._max_pieces:
            return False
        left_bytes, right_bytes = self._bytes[left], self._bytes[right]
        # A token without bytes is special, and never merged.
        return bool(left_bytes and right_bytes) and self._allowed(left_bytes, right_bytes)

    def _entry(self, pair: Pair) -> tuple[int, bytes, bytes, Unit, Unit, Pair]:
        left, right = pair
        return (
            -self.counts[pair], self._bytes[left], self._bytes[right],
            self.units[left], self.units[right], pair,
        )  # fmt: skip
