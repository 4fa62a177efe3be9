"""Merging of the most frequent neighbours, with counts that are kept and never taken anew.

The loop of byte-pair encoding (Sennrich et al., 2016, arXiv:1508.07909), started from tokens.
Each merge costs time for its own occurrences, not for all of the text.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from tokenization.vocabularies.boundaries import MayMerge

Unit = tuple[int, ...]  # source ids
Pair = tuple[int, int]  # indices into PairMerger.units
_NONE = -1  # no neighbour; a place that was merged away


class PairMerger:
    """Documents as linked lists of units, and the number of times each allowed pair occurs.

    What counts is every place where two units are neighbours: `a a a` has the pair `a a` twice,
    of which a merge takes the left one.

    Attributes:
      units: each unit ever seen, as the source ids that it is made of.
      counts: of the allowed pairs of units, by their indices; weighted; none is 0.
      length: units in all documents, weighted.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        tokens: Sequence[bytes],
        allowed: MayMerge,
        max_pieces: int | None = None,
        weights: Sequence[int] | None = None,
    ):
        """Reads the documents; see `dynamic.merge`. A document counts `weights` times."""
        self.units: list[Unit] = []
        self.counts: Counter[Pair] = Counter()
        self._tokens, self._allowed, self._max_pieces = tokens, allowed, max_pieces
        self._bytes: list[bytes] = []
        self._index: dict[Unit, int] = {}
        self._is_allowed: dict[Pair, bool] = {}
        self._places: defaultdict[Pair, list[int]] = defaultdict(list)
        self._unit: list[int] = []  # of each place
        self._bounds: list[int] = [0]  # of the documents
        self._before: list[int] = []
        self._after: list[int] = []
        self._weight: list[int] = []
        for row, document in enumerate(documents):
            self._read(document.tolist(), 1 if weights is None else int(weights[row]))
        self.length = sum(self._weight)
        for place in range(len(self._unit)):
            self._change(place, self._after[place], 1)
        self._heap = [self._entry(pair) for pair in self.counts]
        heapq.heapify(self._heap)

    def best(self) -> Pair | None:
        """Returns the most frequent allowed pair; of equal ones, the first by bytes, or None.

        The order does not depend on where in the documents the pairs stand.
        """
        while self._heap:
            count, *_, pair = self._heap[0]
            now = self.counts.get(pair, 0)
            if now == -count:
                return pair
            # an entry may be out of date: counts fall while it waits
            heapq.heappop(self._heap)
            if now:
                heapq.heappush(self._heap, self._entry(pair))
        return None

    def merge(self, pair: Pair) -> Unit:
        """Makes the pair one unit everywhere, each document from left to right; returns it."""
        left, right = pair
        new = self._unit_of(self.units[left] + self.units[right])
        grown: set[Pair] = set()
        for place in sorted(set(self._places[pair])):
            other = self._after[place]
            if self._unit[place] != left or other == _NONE or self._unit[other] != right:
                continue  # out of date, or the right half of a pair just merged: a a a
            before, after = self._before[place], self._after[other]
            for start, end in ((before, place), (place, other), (other, after)):
                self._change(start, end, -1)
            self._unit[place], self._unit[other] = new, _NONE
            self._after[place] = after
            if after != _NONE:
                self._before[after] = place
            self.length -= self._weight[place]
            for start, end in ((before, place), (place, after)):
                if self._change(start, end, 1):
                    grown.add((self._unit[start], self._unit[end]))
        del self._places[pair]
        for other_pair in grown & self.counts.keys():
            heapq.heappush(self._heap, self._entry(other_pair))
        return self.units[new]

    def documents(self) -> list[np.ndarray]:
        """Returns the documents as indices of units, int32 `[T]` each."""
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
        """Counts the neighbours at two places in or out; returns whether they count at all."""
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
            self._places[pair].append(start)
        elif not count:
            del self.counts[pair]
        return True

    def _decide(self, left: int, right: int) -> bool:
        pieces = len(self.units[left]) + len(self.units[right])
        if self._max_pieces is not None and pieces > self._max_pieces:
            return False
        left_bytes, right_bytes = self._bytes[left], self._bytes[right]
        # a token without bytes is a special one
        return bool(left_bytes and right_bytes) and self._allowed(left_bytes, right_bytes)

    def _entry(self, pair: Pair) -> tuple[int, bytes, bytes, Unit, Unit, Pair]:
        left, right = pair
        return (
            -self.counts[pair], self._bytes[left], self._bytes[right],
            self.units[left], self.units[right], pair,
        )  # fmt: skip
