"""Every id of every document is predicted once per epoch, from the id before it."""

import json
import pickle

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import batches as batches_lib
from lm.data import documents as data
from lm.data import packing

BOS = 300
NAMES = ('tokens', 'targets', 'segments', 'positions', 'weights', 'documents')


def as_ids(document: bytes) -> np.ndarray:
    return np.frombuffer(document, np.uint8)


def some_documents(count: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    """Documents whose first id names them and whose other ids count up: all pairs differ."""
    rng = np.random.default_rng(seed)
    return [
        (np.arange(size) + i * longest).astype(np.int32)
        for i, size in enumerate(rng.integers(0, longest, count))
    ]


def predictions(batches: list[packing.Batch]) -> list[tuple[int, int]]:
    """(input, target) of every position with weight."""
    return [
        (int(token), int(target))
        for batch in batches
        for token, target, weight in zip(
            batch['tokens'].ravel(), batch['targets'].ravel(), batch['weights'].ravel()
        )
        if weight
    ]


def expected(documents: list[np.ndarray], bos: int) -> list[tuple[int, int]]:
    return [
        (int(before), int(target))
        for ids in documents
        for before, target in zip([bos, *ids[:-1]], ids)
    ]


def assert_same(one: list[packing.Batch], other: list[packing.Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        for name in NAMES:
            np.testing.assert_array_equal(a[name], b[name])


def test_packs_the_example_of_the_docstring():
    documents = [np.array([1, 2, 3]), np.array([], int), np.array([4, 5])]
    (batch,) = batches_lib.evaluation_batches(documents, None, batch_size=2, length=4, bos=9)
    np.testing.assert_array_equal(batch['tokens'], [[9, 1, 2, 9], [4, 0, 0, 0]])
    np.testing.assert_array_equal(batch['targets'], [[1, 2, 3, 4], [5, 0, 0, 0]])
    np.testing.assert_array_equal(batch['segments'], [[1, 1, 1, 2], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch['positions'], [[0, 1, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch['weights'], [[1, 1, 1, 1], [1, 0, 0, 0]])
    assert {name: batch[name].dtype for name in NAMES} == {
        **dict.fromkeys(NAMES, np.int32),
        'weights': np.float32,
        'documents': np.int64,
    }


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.binary(max_size=30), min_size=1, max_size=8).filter(any),
    st.integers(1, 3),
    st.integers(2, 9),
)
def test_evaluation_predicts_every_byte_once_in_order(documents, batch_size, length):
    batches = list(
        batches_lib.evaluation_batches(
            documents, as_ids, batch_size=batch_size, length=length, bos=BOS
        )
    )
    assert predictions(batches) == expected([as_ids(d) for d in documents], BOS)
    assert all(batch['tokens'].shape == (batch_size, length) for batch in batches)
    # Rows are full: only the last batch has padding.
    assert all(batch['weights'].all() for batch in batches[:-1])


def test_segments_are_pieces_of_one_document():
    documents = some_documents(30)
    for batch in batches_lib.evaluation_batches(documents, None, batch_size=3, length=16, bos=2000):
        for tokens, targets, segments, positions in zip(
            *(batch[name] for name in ('tokens', 'targets', 'segments', 'positions'))
        ):
            for segment in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == segment)
                np.testing.assert_array_equal(positions[columns], np.arange(len(columns)))
                assert len({int(t) // 40 for t in targets[columns]}) == 1
                np.testing.assert_array_equal(tokens[columns][1:], targets[columns][:-1])


@pytest.mark.parametrize('shard_count', [1, 3])
def test_an_epoch_of_all_shards_is_every_document_once(shard_count):
    documents = some_documents(31)
    seen = []
    for shard in range(shard_count):
        batches = batches_lib.training_batches(
            documents,
            None,
            batch_size=4,
            length=8,
            bos=2000,
            seed=1,
            shard_index=shard,
            shard_count=shard_count,
            num_epochs=1,
        )
        seen += predictions(list(batches))
    assert sorted(seen) == sorted(expected(documents, 2000))
    assert seen != expected(documents, 2000)  # it was shuffled


def training(documents, **changes):
    options = {'batch_size': 2, 'length': 8, 'bos': 2000, 'seed': 3, **changes}
    return batches_lib.training_batches(documents, None, **options)


def take(iterator, count: int) -> list[packing.Batch]:
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize('options', [{}, {'workers': 1}, {'shard_index': 1, 'shard_count': 3}])
def test_each_target_says_its_document(options):
    batches = iter(training(some_documents(31), num_epochs=2, **options))
    for batch in batches:
        here = np.where(batch['weights'] > 0, batch['targets'] // 40, -1)
        np.testing.assert_array_equal(batch['documents'], here)
    batches.close()


def test_order_follows_from_the_seed_and_differs_by_epoch():
    documents = some_documents(12)
    first = take(iter(training(documents)), 40)
    assert_same(first, take(iter(training(documents)), 40))
    other = take(iter(training(documents, seed=4)), 40)
    assert any((a['tokens'] != b['tokens']).any() for a, b in zip(first, other))
    two = predictions(list(training(documents, num_epochs=2)))
    assert sorted(two) == sorted(2 * expected(documents, 2000))


@pytest.mark.parametrize('taken', [0, 1, 7, 30, 61])
def test_restoring_a_state_from_json_continues_exactly(taken):
    documents = some_documents(20)
    iterator = iter(training(documents))
    take(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    following = take(iterator, 30)
    fresh = iter(training(documents))
    fresh.set_state(state)
    assert json.loads(json.dumps(fresh.get_state())) == state
    assert_same(take(fresh, 30), following)
    # An iterator that already ran elsewhere goes back too.
    iterator.set_state(state)
    assert_same(take(iterator, 30), following)


@pytest.mark.parametrize('taken', range(0, 7))
def test_restoring_evaluation_gives_the_rest(taken):
    documents = some_documents(9)
    dataset = batches_lib.evaluation_batches(documents, None, batch_size=2, length=8, bos=2000)
    whole = list(dataset)
    assert len(whole) >= 6
    iterator = iter(dataset)
    take(iterator, taken)
    fresh = iter(dataset)
    fresh.set_state(json.loads(json.dumps(iterator.get_state())))
    assert_same(list(fresh), whole[taken:])


def test_states_are_checkpointed_by_grain_and_orbax(tmp_path):
    documents = some_documents(20)
    iterator = iter(training(documents))
    take(iterator, 5)
    grain.checkpoint.CheckpointHandler().save(tmp_path, item=iterator)
    following = take(iterator, 5)
    fresh = grain.checkpoint.CheckpointHandler().restore(tmp_path, item=iter(training(documents)))
    assert_same(take(fresh, 5), following)


def test_worker_processes_change_nothing():
    documents = some_documents(20)
    expected_batches = take(iter(training(documents)), 30)
    iterator = iter(training(documents, workers=2))
    assert_same(take(iterator, 15), expected_batches[:15])
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.set_state(state)
    assert_same(take(iterator, 15), expected_batches[15:])
    iterator.close()


def test_evaluation_shards_are_rows_of_the_same_batches():
    documents = some_documents(11)
    options = {'length': 8, 'bos': 2000}
    whole = list(batches_lib.evaluation_batches(documents, None, batch_size=4, **options))
    parts = [
        list(
            batches_lib.evaluation_batches(
                documents, None, batch_size=2, shard_index=i, shard_count=2, **options
            )
        )
        for i in range(2)
    ]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in NAMES} for a, b in zip(*parts)]
    assert_same(joined, whole)


def test_rows_of_a_long_document_are_spread_over_batches():
    documents = [np.arange(1000) + 1000 * i for i in range(8)]
    batches = list(training(documents, bos=9000, batch_size=10, length=10, num_epochs=1))
    in_batch = [len({int(t) // 1000 for t in batch['targets'].ravel()}) for batch in batches]
    assert np.mean(in_batch) > 4


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'length': 1}, 'length must be at least 2'),
        ({'batch_size': 0}, 'batch_size must be at least 1'),
        ({'bos': 0}, 'bos must be'),
        ({'shard_index': 2, 'shard_count': 2}, r'shard_index must lie in \[0, 2\)'),
        ({'shard_count': 4}, '3 documents cannot be divided among 4 processes'),
    ],
)
def test_sizes_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        training([np.arange(5)] * 3, **changes)


def test_documents_that_cannot_work_are_named():
    with pytest.raises(ValueError, match='the 2 documents are all empty'):
        training([b'', b''])
    for bad in ([0, 2000], [-1]):
        with pytest.raises(ValueError, match=r'document 1: ids must lie in \[0, 2000\)'):
            take(iter(training([np.arange(5), np.array(bad)])), 10)
    with pytest.raises(ValueError, match='document 0: expected a vector of integer ids'):
        take(iter(training([np.zeros((2, 2))])), 1)


@pytest.mark.parametrize(
    ('vocab_size', 'dtype'),
    [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)],
)
def test_encoded_documents_round_trip(tmp_path, vocab_size, dtype):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size) for size in (5, 0, 1000, 1)]
    documents.append(np.array([vocab_size - 1]))
    written = data.EncodedDocuments.write(tmp_path / 'a' / 'b', iter(documents), vocab_size)
    for encoded in (written, pickle.loads(pickle.dumps(written))):
        assert len(encoded) == 5
        assert encoded.tokens == 1007
        for ids, original in zip(encoded, documents):
            assert ids.dtype == dtype
            np.testing.assert_array_equal(ids, original)
    np.testing.assert_array_equal(written[-1], documents[-1])
    assert [p.name for p in (tmp_path / 'a').iterdir()] == ['b']


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r'document 1: ids must lie in \[0, 7\)'):
        data.EncodedDocuments.write(tmp_path / 'x', [np.array([1]), np.array([7])], 7)
    assert not list(tmp_path.iterdir())
    data.EncodedDocuments.write(tmp_path / 'x', [np.array([1])], 7)
    with pytest.raises(FileExistsError, match='remove it'):
        data.EncodedDocuments.write(tmp_path / 'x', [np.array([1])], 7)


def test_damaged_encoded_documents_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'ids\.npy is missing'):
        data.EncodedDocuments(tmp_path)
    data.EncodedDocuments.write(tmp_path / 'x', [np.arange(100)], 200)
    np.save(tmp_path / 'x' / 'offsets.npy', np.array([0, 90]))
    with pytest.raises(ValueError, match=r'offsets\.npy ends at 90'):
        len(data.EncodedDocuments(tmp_path / 'x'))
    with open(tmp_path / 'x' / 'ids.npy', 'r+b') as file:
        file.truncate(20)
    with pytest.raises(ValueError, match='damaged'):
        len(data.EncodedDocuments(tmp_path / 'x'))
