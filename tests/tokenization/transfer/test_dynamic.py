"""Dynamic tokenization: invariants of merging, and incremental counts against recounts."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization.transfer import dynamic
from tokenization.vocabularies.boundaries import BoundaryRule
from tokenization.vocabularies.pair_merging import PairMerger

# Two ids have the same bytes, and the last id is special.
TOKENS = [b'a', b'b', b' ', b' a', b'.', b'-', b'\n', b'\xe2', b'\x82\xac', b'a', b'']
SPECIAL = len(TOKENS) - 1
RULES = [BoundaryRule(b, tuple(TOKENS)) for b in ('pretokens', 'word', 'word_hyphen', 'sentence')]

document = st.lists(st.sampled_from([*range(len(TOKENS)), 0, 0, 1]), max_size=25)
documents = st.lists(document.map(lambda d: np.asarray(d, np.int32)), max_size=5)
rules = st.sampled_from(RULES)


def spell(merged: dynamic.Merged) -> list[list[tuple[int, ...]]]:
    return [[merged.units[i] for i in document] for document in merged.documents]


def recount(texts, rule, weights=None) -> Counter:
    counts = Counter()
    for row, text in enumerate(texts):
        for pair in itertools.pairwise(text):
            left, right = (b''.join(TOKENS[i] for i in unit) for unit in pair)
            if left and right and rule(left, right):
                counts[pair] += 1 if weights is None else weights[row]
    return counts


def merge_slowly(texts, rule, merges, max_pieces):
    """The definition: count all pairs, merge the best one, repeat."""
    texts = [[(int(i),) for i in text] for text in texts]
    for _ in range(merges):
        counts = recount(texts, rule)
        if max_pieces:
            counts = {p: n for p, n in counts.items() if len(p[0] + p[1]) <= max_pieces}
        if not counts:
            break
        joined = {pair: [b''.join(TOKENS[i] for i in unit) for unit in pair] for pair in counts}
        left, right = min(counts, key=lambda p: (-counts[p], joined[p], p))
        for row, text in enumerate(texts):
            out = []
            for unit in text:
                # a unit that was just merged is not the left half of another pair
                if out and out[-1] == left and unit == right:
                    out[-1] = left + right
                else:
                    out.append(unit)
            texts[row] = out
    return texts


@given(documents, rules, st.integers(0, 12), st.sampled_from([None, 2, 3]))
def test_same_as_the_definition(texts, rule, merges, max_pieces):
    merged = dynamic.merge(texts, TOKENS, merges, rule, max_pieces)
    assert spell(merged) == merge_slowly(texts, rule, merges, max_pieces)
    assert max_pieces is None or all(len(unit) <= max_pieces for unit in merged.units)


@given(documents, rules, st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_counts_that_are_kept_equal_a_recount(texts, rule, weights):
    merger = PairMerger(texts, TOKENS, rule, weights=weights[: len(texts)])
    while True:
        now = [[merger.units[i] for i in text] for text in merger.documents()]
        kept = {tuple(merger.units[i] for i in pair): n for pair, n in merger.counts.items()}
        assert kept == recount(now, rule, weights)
        assert merger.length == sum(weights[row] * len(text) for row, text in enumerate(now))
        pair = merger.best()
        if pair is None:
            break
        assert merger.counts[pair] == max(merger.counts.values())
        merger.merge(pair)
    assert not merger.counts


@given(documents, rules)
def test_concatenation_stays_and_lengths_fall(texts, rule):
    whole = dynamic.merge(texts, TOKENS, None, rule)
    lengths = [dynamic.merge(texts, TOKENS, m, rule) for m in range(len(whole.lengths))]
    for m, merged in enumerate(lengths):
        assert [sum(text, ()) for text in spell(merged)] == [tuple(text) for text in texts]
        assert sum(map(len, merged.documents)) == whole.lengths[m] == merged.lengths[-1]
        assert merged.units == sorted({unit for text in spell(merged) for unit in text})
        assert all(len(unit) == 1 for unit in merged.units if SPECIAL in unit)
    assert np.all(np.diff(whole.lengths) < 0)
    assert spell(lengths[0]) == [[(i,) for i in text] for text in texts]  # no merges: the identity


@given(documents, rules, st.integers(0, 10), st.randoms())
def test_padding_and_order_do_not_matter(texts, rule, merges, random):
    merged = dynamic.merge(texts, TOKENS, merges, rule)
    padded = [np.concatenate([[-1, -1], text, [-1]]) for text in texts]
    assert spell(dynamic.merge(padded, TOKENS, merges, rule)) == spell(merged)
    order = random.sample(range(len(texts)), len(texts))
    shuffled = dynamic.merge([texts[i] for i in order], TOKENS, merges, rule)
    assert shuffled.units == merged.units
    assert spell(shuffled) == [spell(merged)[i] for i in order]


@given(documents, rules, st.sampled_from([0, 1, 4, None]))
def test_by_itself_a_document_does_not_see_its_batch(texts, rule, merges):
    together = dynamic.merge_each(texts, TOKENS, merges, rule, 4)
    alone = [dynamic.merge([text], TOKENS, merges, rule, 4) for text in texts]
    assert spell(together) == [spell(merged)[0] for merged in alone]
    assert together.lengths[-1:].sum() == sum(merged.lengths[-1] for merged in alone)


def test_merges_for_a_share_of_the_reduction():
    curve = np.asarray([10, 7, 5, 4, 3, 2, 2])
    assert [dynamic.merges_for([curve], s) for s in (0, 0.1, 0.375, 0.4, 0.5, 1)] == [
        0, 1, 1, 2, 2, 5
    ]  # fmt: skip
    # the second batch ends early and keeps its last length: 20, 16, 14, ...
    assert dynamic.merges_for([curve, np.asarray([10, 9])], 0.5) == 2
    assert dynamic.merges_for([np.asarray([3])], 1) == 0
    with pytest.raises(ValueError, match=r'share 1\.5'):
        dynamic.merges_for([curve], 1.5)
    with pytest.raises(ValueError, match='curves: none given'):
        dynamic.merges_for([], 0.5)


def test_batch_has_fixed_shapes():
    texts = [np.asarray([0, 1, 0, 1, 2]), np.asarray([SPECIAL, 0, 1]), np.asarray([])]
    merged = dynamic.merge(texts, TOKENS, 1, RULES[1])
    batch = dynamic.pad(merged, length=4, units=5, pieces=3)
    assert batch.pieces_UP.tolist() == [
        [0, 1, -1], [2, -1, -1], [SPECIAL, -1, -1], [-1, -1, -1], [-1, -1, -1]
    ]  # fmt: skip
    assert batch.index_BL.tolist() == [[0, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.mask_BL.sum(1).tolist() == [3, 2, 0]
    assert (batch.index_BL.dtype, batch.pieces_UP.dtype) == (np.int32, np.int32)
    for room, message in (
        ((2, 5, 3), '3 units in the longest document: expected at most 2'),
        ((4, 2, 3), '3 distinct units: expected at most 2'),
        ((4, 5, 1), '2 source ids in the longest unit: expected at most 1'),
    ):
        with pytest.raises(ValueError, match=message):
            dynamic.pad(merged, *room)


@pytest.mark.parametrize(
    ('texts', 'merges', 'message'),
    [([[0, 11]], 1, 'document 0: id 11'), ([[0]], -1, 'merges -1'),
     ([[0.5]], 1, 'expected a vector'), ([[[0]]], 1, r'int64 of shape \(1, 1\)')],
)  # fmt: skip
def test_refuses_what_is_no_document(texts, merges, message):
    with pytest.raises(ValueError, match=message):
        dynamic.merge(texts, TOKENS, merges, RULES[0])
