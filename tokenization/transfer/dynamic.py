"""Dynamic tokenization: units are merged per batch, and a hypernetwork predicts their rows.

Feher et al., Retrofitting Large Language Models with Dynamic Tokenization (2024,
arXiv:2411.18553). Documents start as source tokens, and the most frequent pair of neighbours in the
batch is merged into one unit, again and again. A unit is a tuple of source ids, so it has bytes,
and any hypernetwork that reads source ids can predict its row:

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
      units: the distinct units in use, sorted, as tuples of source ids.
      lengths: int64 `[merges + 1]`: total number of units after 0, 1, ... merges.
    """

    documents: list[np.ndarray]
    units: list[Unit]
    lengths: np.ndarray


class Batch(NamedTuple):
    """Documents as units, padded to fixed shapes.

    Attributes:
      index_BL: int32, rows of `pieces_UP`; 0 where `mask_BL` is False.
      pieces_UP: int32, the source ids of each distinct unit, padded with -1; unused rows are -1.
      mask_BL: bool, True at units and False at padding.
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

    Ties are broken by the order of the pairs' bytes, so the order of the documents does not matter.

    >>> merged = merge([np.array([0, 1, 0, 1])], [b'a', b'b'], 1, lambda left, right: True)
    >>> merged.units, merged.documents[0].tolist(), merged.lengths.tolist()
    ([(0, 1)], [0, 0], [4, 2])

    Args:
      documents: source ids, int `[T]` each. Negative ids are padding and are dropped.
      tokens: bytes of each source id; an id without bytes is special and never merged.
      merges: greatest number of merges; None continues until no allowed pair is left.
      allowed: the boundary rule, see `boundaries.BoundaryRule`.
      max_pieces: greatest number of source ids per unit, which the hypernetwork can read.

    Raises:
      ValueError: a document is not a vector of ids, an id is not in `tokens`, or `merges` is
        negative.
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
    """Like `merge`, with each document as a batch of its own, independent of the others.

    `lengths` is the sum over documents; a document without further merges keeps its last length.
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

    With n_m the total number of units after m merges and M the last merge, the smallest m with
    n_0 - n_m >= share * (n_0 - n_M).

    >>> merges_for([np.array([10, 7, 5, 4])], share=0.5)  # 3 of at most 6 units
    1

    Args:
      curves: the `lengths` of sample batches, merged until no pair is left (`merges=None`). Under
        the rule `word`, every word is one unit then.
      share: from 0 to 1; 0.1 to 0.5 in the paper.

    Raises:
      ValueError: there are no curves, or `share` is out of range.
    """
    if not len(curves):
        raise ValueError('curves: none given; merge a few batches with merges=None first')
    if not 0 <= share <= 1:
        raise ValueError(f'share {share}: expected 0 to 1, a share of the greatest reduction')
    total = _add_up(curves)
    most = total[0] - total[-1]
    return int(np.argmax(total[0] - total >= share * most))


def pad(merged: Merged, length: int, units: int, pieces: int) -> Batch:
    """Returns the documents in shapes `[B, length]` and `[units, pieces]`.

    Raises:
      ValueError: a document, the number of units or a unit's pieces exceed these sizes.
    """
    longest = max(map(len, merged.documents), default=0)
    widest = max(map(len, merged.units), default=0)
    for what, found, room in (
        ('units in the longest document', longest, length),
        ('distinct units', len(merged.units), units),
        ('source ids in the longest unit', widest, pieces),
    ):
        if found > room:
            raise ValueError(f'{found} {what}: expected at most {room}')
    index_BL = np.zeros((len(merged.documents), length), np.int32)
    mask_BL = np.zeros(index_BL.shape, bool)
    for row, document in enumerate(merged.documents):
        index_BL[row, : len(document)] = document
        mask_BL[row, : len(document)] = True
    return Batch(index_BL, to_pieces(merged.units, units, pieces), mask_BL)


def to_pieces(units: Sequence[Unit], size: int, pieces: int) -> np.ndarray:
    """Returns the source ids of units, int32 `[size, pieces]`, padded with -1."""
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
                f'document {row}: {array.dtype} of shape {array.shape}; expected a vector of ids'
            )
        top = int(array.max(initial=-1))
        if top >= len(tokens):
            raise ValueError(
                f'document {row}: id {top}, but `tokens` has {len(tokens)} entries; give b"" for a '
                'special token'
            )


def _without_padding(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    arrays = [np.asarray(document) for document in documents]
    return [array[array >= 0] if array.size else array for array in arrays]


def _run(merger: PairMerger, merges: int | None) -> Iterator[int]:
    """Merges, and yields the total length after each merge."""
    done = 0
    while (merges is None or done < merges) and (pair := merger.best()) is not None:
        merger.merge(pair)
        done += 1
        yield merger.length


def _in_order(mergers: Sequence[PairMerger]) -> tuple[list[Unit], list[list[np.ndarray]]]:
    """Returns the units in use, sorted, and each merger's documents as indices into them."""
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
    """Returns the sum of curves, each padded with its last value."""
    size = max(map(len, curves), default=0)
    total = np.zeros(size, np.int64)
    for curve in curves:
        total += np.pad(curve, (0, size - len(curve)), mode='edge')
    return total
