"""Dynamic tokenization: the units of a text are made per batch, and their rows by a network.

Feher et al., Retrofitting Large Language Models with Dynamic Tokenization (2024,
arXiv:2411.18553). Documents are source tokens; neighbours that are frequent in the batch become
one unit, again and again. A unit is the tuple of source ids that it stands for, so it has bytes,
and a row from any hypernetwork that reads source ids:

    merged = merge(documents, tokens, 1000, BoundaryRule('word', tokens))
    batch = pad(merged, length=512, units=4096, pieces=7)
    x_BLD = rows(batch.pieces_UP)['input_VD'][batch.index_BL]
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tokenization.vocabularies.boundaries import MayMerge
from tokenization.vocabularies.pair_merging import PairMerger, Unit


class Merged(NamedTuple):
    """Documents as units.

    Attributes:
      documents: int32 `[T]` each, indices into `units`.
      units: the distinct ones in use, in order, as source ids.
      lengths: int64 `[merges + 1]`: units in all documents after 0, 1, ... merges.
    """

    documents: list[np.ndarray]
    units: list[Unit]
    lengths: np.ndarray


class Batch(NamedTuple):
    """Documents in fixed shapes.

    Attributes:
      index_BL: int32, rows of `pieces_UP`; 0 where `mask_BL` is False.
      pieces_UP: int32, the source ids of each distinct unit, -1 after its last; rows beyond the
        units in use are all -1.
      mask_BL: bool, where a document has a unit.
    """

    index_BL: np.ndarray
    pieces_UP: np.ndarray
    mask_BL: np.ndarray


def merge(
    documents: Sequence[np.ndarray],
    tokens: Sequence[bytes],
    merges: int | None,
    allowed: MayMerge,
    max_pieces: int | None = None,
) -> Merged:
    """Merges the most frequent allowed pair of the batch, up to `merges` times.

    Of equally frequent pairs the one that comes first by its bytes is merged, whatever the order
    of the documents. It ends early where no pair is left.

    Args:
      documents: source ids, int `[T]` each. Negative ones are padding, and left out.
      tokens: bytes of each source id; an id with none is special, and never merged.
      merges: how many at most; None goes on to the end.
      allowed: the rule, from `boundaries.BoundaryRule`.
      max_pieces: source ids in a unit at most, so that none is too long for the hypernetwork.

    Raises:
      ValueError: a document that is no list of ids, an id that is not in `tokens`, or a negative
        number of merges.
    """
    _check(documents, tokens, merges)
    merger = PairMerger(_without_padding(documents), tokens, allowed, max_pieces)
    lengths = [merger.length, *_run(merger, merges)]
    units, (places,) = _in_order([merger])
    return Merged(places, units, np.asarray(lengths, np.int64))


def merge_each(
    documents: Sequence[np.ndarray],
    tokens: Sequence[bytes],
    merges: int | None,
    allowed: MayMerge,
    max_pieces: int | None = None,
) -> Merged:
    """As `merge`, but each document is a batch of its own: its units do not depend on the others.

    `lengths` adds up the documents' own; one that has ended keeps its last.
    """
    _check(documents, tokens, merges)
    mergers = [
        PairMerger([document], tokens, allowed, max_pieces)
        for document in _without_padding(documents)
    ]
    curves = [np.asarray([merger.length, *_run(merger, merges)], np.int64) for merger in mergers]
    units, places = _in_order(mergers)
    return Merged([place for (place,) in places], units, _add_up(curves))


def merges_for(curves: Sequence[np.ndarray], share: float) -> int:
    """Returns the fewest merges that reach a share of the greatest possible reduction.

    Args:
      curves: the `lengths` of sample batches that were merged to the end (`merges=None`). There
        every word is one unit, if the rule is `word`.
      share: of the units that merging to the end takes away: 0.1 to 0.5 in the paper, 1 for all.

    Raises:
      ValueError: no curves, or a share that is none.
    """
    if not len(curves):
        raise ValueError('curves: none given; merge a few batches with merges=None first')
    if not 0 <= share <= 1:
        raise ValueError(f'share {share}: expected 0 to 1, of the greatest possible reduction')
    total = _add_up(curves)
    most = total[0] - total[-1]
    return int(np.argmax(total[0] - total >= share * most))


def pad(merged: Merged, length: int, units: int, pieces: int) -> Batch:
    """Returns the documents in shapes `[B, length]` and `[units, pieces]`.

    Raises:
      ValueError: a document, the distinct units or the pieces of one are more than that.
    """
    longest = max(map(len, merged.documents), default=0)
    widest = max(map(len, merged.units), default=0)
    for what, found, room in (
        ('units in the longest document', longest, length),
        ('distinct units', len(merged.units), units),
        ('source ids in the longest unit', widest, pieces),
    ):
        if found > room:
            raise ValueError(f'{found} {what}: there is room for {room}')
    index_BL = np.zeros((len(merged.documents), length), np.int32)
    mask_BL = np.zeros(index_BL.shape, bool)
    for row, document in enumerate(merged.documents):
        index_BL[row, : len(document)] = document
        mask_BL[row, : len(document)] = True
    return Batch(index_BL, to_pieces(merged.units, units, pieces), mask_BL)


def to_pieces(units: Sequence[Unit], size: int, pieces: int) -> np.ndarray:
    """Returns the source ids of units, int32 `[size, pieces]`, -1 where there is none."""
    pieces_UP = np.full((size, pieces), -1, np.int32)
    for row, unit in enumerate(units):
        pieces_UP[row, : len(unit)] = unit
    return pieces_UP


def _check(documents: Sequence[np.ndarray], tokens: Sequence[bytes], merges: int | None) -> None:
    if merges is not None and merges < 0:
        raise ValueError(f'merges {merges}: expected 0 or more')
    for row, document in enumerate(documents):
        array = np.asarray(document)
        if array.ndim != 1 or (array.size and array.dtype.kind not in 'iu'):
            raise ValueError(
                f'document {row}: {array.dtype} of shape {array.shape}; expected a list of ids'
            )
        top = int(array.max(initial=-1))
        if top >= len(tokens):
            raise ValueError(
                f'document {row}: id {top}, but bytes of {len(tokens)} tokens are given; give b"" '
                'for a special one'
            )


def _without_padding(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(document) for document in documents]
    return [array[array >= 0] if array.size else array for array in arrays]


def _run(merger: PairMerger, merges: int | None) -> Iterator[int]:
    """Merges, and yields the length after each."""
    done = 0
    while (merges is None or done < merges) and (pair := merger.best()) is not None:
        merger.merge(pair)
        done += 1
        yield merger.length


def _in_order(mergers: Sequence[PairMerger]) -> tuple[list[Unit], list[list[np.ndarray]]]:
    """Returns the units in use in sorted order, and each merger's documents as their indices."""
    placed = [merger.documents() for merger in mergers]
    used = [
        [merger.units[i] for i in np.unique(np.concatenate(places)).tolist()] if places else []
        for merger, places in zip(mergers, placed, strict=True)
    ]
    units = sorted(set().union(*used))
    index = {unit: i for i, unit in enumerate(units)}
    result = []
    for merger, places in zip(mergers, placed, strict=True):
        renamed = np.asarray([index.get(unit, -1) for unit in merger.units], np.int32)
        result.append([renamed[place] for place in places])
    return units, result


def _add_up(curves: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the sum of curves, each continued by its last value."""
    size = max(map(len, curves), default=0)
    total = np.zeros(size, np.int64)
    for curve in curves:
        total += np.pad(curve, (0, size - len(curve)), mode='edge')
    return total
